"Small functions, tested with values that differ if one sign, order or constant changes"
import warnings
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.answers import first_block_step, raw_item
from fastai_multi.build import ImageModality
from fastai_multi.callback.adapt import AbsentInputs
from fastai_multi.core import BadItem, absent
from fastai_multi.data.annotations import coco_object, yolo_box
from fastai_multi.data.describe import part_lines
from fastai_multi.data.joined import joined_columns
from fastai_multi.data.kinds import part_of
from fastai_multi.data.pictures import as_bytes
from fastai_multi.data.pipeline import warn_of_flips
from fastai_multi.data.readers import are_flags
from fastai_multi.insight import readable
from fastai_multi.models.encoder import norm_buffers
from fastai_multi.models.heads import GroupHead
from fastai_multi.prediction import percent
from fastai_multi.registry import is_known
from fastai_multi.report import untouched
from fastai_multi.targets import same_shape
from fastai_multi.tiles import shared

def test_the_message_of_a_bad_item_is_its_text_alone():
    e = BadItem('too large', 3)
    assert (str(e), e.at)==('too large', 3)

def test_one_column_of_zeros_and_ones_is_no_set_of_flags():
    df = pd.DataFrame(dict(a=[0,1,1], b=[1,0,None], c=[2,0,0]))
    assert not are_flags(df, ['a'])
    assert are_flags(df, ['a','b'])
    assert not are_flags(df, ['a','c'])

def test_corners_in_pixels_of_coco_and_yolo():
    row = coco_object(dict(category_id=7, bbox=[10,20,30,5], attributes=dict(age=3)), 'a.jpg', {7: 'cat'}, 'file')
    assert row==dict(file='a.jpg', label='cat', x1=10, y1=20, x2=40, y2=25, crowd=0, age=3)
    size = dict(width=200, height=100)
    assert yolo_box([.5,.5,.2,.4], size)==pytest.approx(dict(x1=80, y1=30, x2=120, y2=70))
    assert yolo_box([.1,.2, .3,.9, .2,.4], size)==pytest.approx(dict(x1=20, y1=20, x2=60, y2=90))

def test_a_line_for_each_part_and_for_each_member_below(monkeypatch):
    monkeypatch.setattr('fastai_multi.data.describe.part_text', lambda part: 'text')
    def part(**members): return SimpleNamespace(members=members)
    assert part_lines(dict(a=part(), b=part(c=part())))==['  a: text', '  b: text', '    c: text']

def test_the_joined_columns_of_plain_outputs_and_of_groups():
    group = SimpleNamespace(members=dict(city=1, size=2))
    table = SimpleNamespace(parts=dict(kind=None, place=group), outputs=dict(kind=1))
    assert joined_columns([table])==dict(kind='kind', place=dict(city='place.city', size='place.size'))

def test_a_part_keeps_the_transforms_of_its_block():
    block = TransformBlock(type_tfms=PILImage.create, item_tfms=[Resize(9)], batch_tfms=[Brightness()])
    part = part_of('image', block, is_input=True)
    kinds = {type(t) for t in [*part.item_tfms, *part.batch_tfms]}
    assert {Resize, Brightness} <= kinds

def test_pixels_as_bytes_at_the_ends_of_each_range():
    assert as_bytes(np.array([-.5, 200.4])).tolist()==[0, 200]
    assert as_bytes(np.array([0., .5, 1.])).tolist()==[0, 128, 255]
    assert as_bytes(np.array([0, 257*9], np.uint16)).tolist()==[0, 9]
    with pytest.raises(ValueError): as_bytes(np.array([-.6, 200.]))

def test_only_a_flip_warns_of_left_and_right():
    told = []
    part = SimpleNamespace(name='eyes', has_pairs_to_tell=True, tell_pairs=told.append, what='eyes')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warn_of_flips([Brightness(), Resize(9)], [part])
    assert told==[]

def test_norm_buffers_are_those_of_batch_norms_that_follow_the_batches():
    class Other(Module):
        def __init__(self): self.register_buffer('seen', torch.zeros(1))
    still = nn.BatchNorm1d(3).eval()
    live = nn.BatchNorm1d(3)
    found = norm_buffers(nn.Sequential(still, live, Other()))
    assert [id(b) for b in found]==[id(b) for b in live.buffers()]

def test_a_group_of_heads_reads_the_map_if_a_member_does():
    plain = nn.Linear(2, 1)
    reader = nn.Linear(2, 1)
    reader.reads_map = True
    whole = nn.Linear(2, 1)
    whole.reads_map = 'all'
    assert GroupHead(dict(a=plain, b=nn.Linear(2, 1))).reads_map is False
    assert GroupHead(dict(a=plain, b=reader)).reads_map is True
    assert GroupHead(dict(a=plain, b=reader, c=whole)).reads_map=='all'

def test_percent_has_more_digits_near_its_ends():
    assert [percent(p) for p in (0, .004, .01, .5, .99, .996, 1)]==['0%', '0.40%', '1%', '50%', '99%', '99.60%', '100%']

def test_the_registry_knows_what_is_registered_and_what_torch_has():
    assert is_known('torch.nn.modules.linear:Linear')
    assert not is_known('os:system')
    register_part(Registered)
    assert is_known(f'{Registered.__module__}:Registered')

class Registered(nn.Module): pass

def test_what_is_tried_leaves_the_random_states():
    learn = SimpleNamespace(model=nn.Sequential(nn.BatchNorm1d(2)), loss_func=SimpleNamespace(step=5))
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    with untouched(learn, SimpleNamespace()):
        torch.rand(7)
        learn.model.eval()
        learn.model[0].running_mean.add_(1)
        learn.loss_func.step = 9
    assert torch.equal(torch.rand(2), want)
    assert learn.model[0].training and not learn.model[0].running_mean.any() and learn.loss_func.step==5

def test_predictions_and_targets_get_one_shape_where_only_a_last_axis_of_one_differs():
    def shapes(*sizes): return tuple(tuple(t.shape) for t in same_shape(*[torch.zeros(s) for s in sizes]))
    assert shapes((4,1), (4,))==((4,), (4,))
    assert shapes((4,), (4,1))==((4,), (4,))
    assert shapes((4,1), (4,2))==((4,1), (4,2))
    assert shapes((4,3), (4,))==((4,3), (4,))

def test_the_share_of_the_smaller_box():
    assert shared([0,0,10,10], [0,0,5,10])==1
    assert shared([0,0,10,10], [5,0,25,10])==.5
    assert shared([0,0,10,10], [10,0,25,10])==0

def test_values_of_a_table_as_cells_hold_them():
    assert readable(L('a','b'))==['a','b'] and type(readable(L(1))) is list
    assert readable('a')=='a' and readable(absent) is None
    assert readable(tensor(1.5))==1.5 and readable(tensor([1.,2.]))==[1.,2.]
    assert readable(torch.zeros(3,3))=='(3, 3)'

def test_how_many_transforms_a_raw_value_skips():
    tl = SimpleNamespace(tfms=SimpleNamespace(fs=[noop, noop, noop]), types=[Path, str, int])
    assert first_block_step(tl, 3)==2
    assert first_block_step(tl, 'a')==1
    assert first_block_step(tl, 2.5)==1

@pytest.mark.parametrize('kind', [tuple, list])
def test_raw_values_by_position(kind): assert raw_item(kind(['a','b']), dict(x=None, y=None))==('a','b')

def test_a_picture_is_prepared_with_its_mean_and_its_deviation():
    modality = object.__new__(ImageModality)
    assert ImageModality.prepared(modality, tensor(3.), (tensor(1.), tensor(4.)))==.5
    assert ImageModality.prepared(modality, 3, None)==3

@pytest.mark.parametrize('n_absent, without, is_told', [(5, True, True), (2, True, False), (0, False, False),
                                                        (2, False, True), (2, None, False)])
def test_an_absent_input_is_told_where_no_item_has_it_or_the_model_never_was_without(monkeypatch, n_absent, without,
                                                                                     is_told):
    monkeypatch.setattr('fastai_multi.callback.adapt.trained_without', lambda model, name: without)
    watch = AbsentInputs()
    watch.counts = dict(image=(n_absent,5), text=(0,5))
    assert len(watch.sentences(None))==is_told

def test_a_loader_without_parts_is_fastais():
    dl = MultiDL(TfmdLists([1,2,3,4], [lambda o: tensor(o)]), bs=2, num_workers=0)
    assert dl.parts is None
    assert [b.tolist() for b in dl]==[[1,2],[3,4]]
    assert dl.create_item(2)==3
    assert dl.decode(tensor([5])).tolist()==[5]

@pytest.fixture
def texts(shapes):
    return MultiDataLoaders.from_csv(shapes, 'items.csv', text='caption', seed=0, bs=16, num_workers=0,
                                     outputs=dict(colour=CategoryBlock, area=RegressionBlock))

def test_a_text_model_gets_the_words_weights_and_as_many_items_as_asked(texts):
    learn = multi_learner(texts)
    assert learn.model.encoders['text'].terms is not None
    text = learn.modalities['text']
    for example in (text.example, super(type(text), text).example): assert len(example(texts.train, 3))==3

def test_every_item_is_seen_to_be_a_part_or_the_whole(texts):
    from fastai_multi.probe import FrozenFeatures
    learn = multi_learner(texts)
    n = len(texts.train_ds)
    with learn.no_bar(): found = {most: FrozenFeatures(learn, most=most).is_part for most in (n-1, n, n+1)}
    assert found=={n-1: True, n: False, n+1: False}

def test_the_groups_of_parameters_with_their_sizes(texts):
    learn = multi_learner(texts)
    table = learn.summary_groups()
    assert list(table.columns)==['group','parameters','trainable','lr']
    assert table.parameters.sum()==sum(p.numel() for p in learn.model.parameters())

def test_normalised_like_another(shapes):
    from fastai_multi.state import normal_stats, normalization, normalize_like
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', seed=0, bs=16, item_tfms=Resize(32),
                                    outputs=dict(colour=CategoryBlock), batch_tfms=Normalize.from_stats([.5]*3, [.2]*3))
    other = [[.25]*3, [.5]*3]
    normalize_like(dls, other)
    for dl in dls.loaders: assert np.allclose(normal_stats(normalization(dl)), other)

def test_a_box_without_a_label_is_no_fault_of_the_box_loss():
    loss = BoxLoss(reduction='none')
    boxes = tensor([[-.5,-.5,.5,.5], [0.,0.,.5,.5]])
    missing = boxes.clone()
    missing[1] = float('nan')
    assert loss.ignores_missing
    assert torch.allclose(BoxLoss()(boxes+.1, missing), BoxLoss()(boxes[:1]+.1, missing[:1]))

def test_objects_in_words():
    from fastai_multi.objects import ObjectsTask
    task = object.__new__(ObjectsTask)
    assert [task.words(o) for o in ([1], [1,2], [])]==['1 object', '2 objects', '0 objects']
    assert 'object' not in task.words(absent)

def test_objects_beyond_a_frame_that_is_not_square():
    from fastai_multi.data.objects import ObjectBoxPart
    part = object.__new__(ObjectBoxPart)
    part.check_placed(tensor([[90.,5.,99.,9.]]), (100,10), True)
    part.refuse_beyond = lambda box, size: (_ for _ in ()).throw(ValueError(f'{box}'))
    with pytest.raises(ValueError): part.check_placed(tensor([[5.,11.,9.,12.]]), (100,10), True)
    part.check_placed(tensor([[5.,11.,9.,12.]]), (100,10), False)

def test_a_subclass_of_tensor_keeps_its_class_in_a_record():
    from fastai_multi.records import RecordReader, RecordWriter
    writer = RecordWriter()
    record = writer.record(TensorImage(torch.ones(2)))
    back = RecordReader(writer.tensors).read(record)
    assert type(back) is TensorImage and back.tolist()==[1,1]

def test_what_stands_in_the_place_of_the_loaders_loss(texts):
    with pytest.raises(AttributeError, match='the losses belong to the learner'): texts.loss_func

def test_the_words_at_an_object_leave_out_what_is_absent():
    from fastai_multi.data.objects import ObjectsPart
    part = object.__new__(ObjectsPart)
    part.outputs = ['kind','colour']
    part.member = lambda v, n: v[n]
    part.members = {n: SimpleNamespace(inner=SimpleNamespace(format=str.upper)) for n in part.outputs}
    assert part.labels(dict(kind=['cat','dog'], colour=['red',absent]), 0)=='CAT RED'
    assert part.labels(dict(kind=['cat','dog'], colour=['red',absent]), 1)=='DOG'
