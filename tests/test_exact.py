"""Exact values of single functions whose faults passed all other tests"""
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi import losses
from fastai_multi.callback.gradients import cosines
from fastai_multi.compare import run_once
from fastai_multi.data.elements import parts_tfm
from fastai_multi.data.geometry import crop_value
from fastai_multi.data.infer import delimiter
from fastai_multi.depth import try_candidate
from fastai_multi.linear import Logistic, item_coordinates, ridge
from fastai_multi.models.fusion import zeros_for
from fastai_multi.models.heads import Pool
from fastai_multi.models.tabular import PresentNorm, VectorEncoder
from fastai_multi.models.tree import frozen_text
from fastai_multi.models.trunk import SharedTrunk
from fastai_multi.prior import TextBaseline
from fastai_multi.probe import FrozenFeatures
from fastai_multi.report import LearningAdvice, valid_losses

def numbers(n=12, **columns):
    "A table of features `a` and `b`"
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(a=rng.normal(size=n), b=rng.normal(size=n), is_valid=np.arange(n)%4==3, **columns))

def loaders(df, outputs, **kwargs):
    kw = dict(features=['a','b'], outputs=outputs, valid_col='is_valid', bs=4, num_workers=0, device='cpu')
    return MultiDataLoaders.from_df(df, **{**kw, **kwargs})

# Pictures and boxes

CROPS = dict(crop=lambda: Resize((12,20)), squish=lambda: Resize((12,20), 'squish'), pad=lambda: Resize(16, 'pad'),
             resized=lambda: RandomResizedCrop((12,20), min_scale=.3), centre=lambda: CropPad((12,20)),
             random=lambda: RandomCrop((12,10)))

@pytest.mark.parametrize('name', CROPS)
@pytest.mark.parametrize('size', [(40,18),(18,40)])
def test_a_picture_in_memory_is_cropped_as_the_transform_crops_it(name, size):
    rng = np.random.default_rng(0)
    for cls in (PILImage, PILMask):
        shape = (size[1],size[0]) if cls is PILMask else (size[1],size[0],3)
        im = cls.create(rng.integers(0, 256, shape, dtype=np.uint8))
        t = CROPS[name]()
        if hasattr(t, 'before_call'): t.before_call((im,), 0)
        found = crop_value(im, t, size, 0)
        assert np.array_equal(np.asarray(found), np.asarray(t._call('encodes', im, split_idx=0)))
        assert type(found) is cls

@pytest.mark.parametrize('size', [(100,1000),(1000,100),(40,40)])
def test_a_box_may_pass_the_edge_by_a_fiftieth_of_its_own_side(size, tmp_path):
    Image.fromarray(np.zeros((8,8,3), dtype=np.uint8)).save(tmp_path/'a.png')
    df = pd.DataFrame(dict(file=['a.png']*4, x1=1, y1=1, x2=5, y2=6, is_valid=[False,False,True,True]))
    dls = loaders(df, dict(box=BBoxBlock), path=tmp_path, features=None, image='file', item_tfms=Resize(8), bs=2,
                  columns=dict(box=['x1','y1','x2','y2']))
    part = describe(dls).outputs['box']
    w,h = size
    over_w,over_h = max(2, .02*w),max(2, .02*h)
    before = max(over_w, over_h)
    part.check_placed(tensor([[-before,-before,w+over_w,h+over_h]]), size, True)
    for box in ([0,0,w+over_w+1,h], [0,0,w,h+over_h+1], [-before-1,0,w,h], [0,-before-1,w,h]):
        box = tensor([box]).float()
        with pytest.raises(ValueError): part.check_placed(box, size, True)
        part.check_placed(box, size, False)                     # the check in pixels ignores fractions of another frame

# Words and classes

def test_what_separates_tags():
    assert delimiter(['a,b','b,c','a,c','a,b,c'])==','
    assert delimiter(['a','b, a','b','a,b'])==','
    assert delimiter(['a,b','c,d']) is None                         # no word repeats, so these may be sentences
    assert delimiter(['a','b','a']) is None
    assert delimiter(['a|b','a,b'])=='|' and delimiter(['a;b','a'])==';'

def test_given_classes_keep_their_order_whatever_they_are():
    dls = loaders(numbers(kind=['b',2,'a']*4), dict(kind=CategoryBlock(vocab=['b',2,'a'], sort=False)))
    assert {n: list(v) for n,v in dls.vocab.items()}==dict(kind=['b',2,'a'])
    dl = dls.test_dl(dls.train.items, with_labels=True)
    found = torch.cat([y.kind for _,y in dl])
    assert [dls.vocab['kind'][i] for i in found]==dls.train.items.kind.tolist()

def test_one_plain_target_has_fastais_c():
    assert loaders(numbers(kind=['b','c','a']*4), CategoryBlock, columns='kind').c==3
    assert loaders(numbers(kind=['b','c','a']*4), dict(kind=CategoryBlock)).c==dict(kind=3)
    assert loaders(numbers(x=np.arange(12.)), RegressionBlock, columns='x').c==1

# Parts of models

def test_every_pool_by_hand():
    x = torch.rand(2,3,4,5)+.1
    mean,most = x.mean((2,3)),x.amax((2,3))
    assert torch.allclose(Pool('avg')(x), mean) and torch.equal(Pool('max')(x), most)
    assert torch.allclose(Pool()(x), torch.cat([mean,most], 1))
    assert torch.allclose(Pool('gem')(x), (x**3).mean((2,3))**(1/3), atol=1e-5)

def test_zeros_are_where_the_module_is():
    zeros = zeros_for(nn.Linear(2, 3).to('meta', torch.float16), 4, 2)
    assert zeros.device.type=='meta' and zeros.dtype==torch.float16 and zeros.shape==(4,2)

def test_what_is_said_of_frozen_parameters():
    ps = list(nn.Linear(2, 3).parameters())
    assert frozen_text(ps)==''
    ps[0].requires_grad_(False)
    assert frozen_text(ps)=='partly frozen'
    ps[1].requires_grad_(False)
    assert frozen_text(ps)=='frozen'

@pytest.mark.parametrize('split', [1,2,3])
def test_what_all_outputs_share_passes_the_joint(split):
    "Balancing callbacks compare the outputs at the map of the last shared stage"
    trunk = SharedTrunk(image_encoder(simple_cnn(3, 4)), dict(a=3, b=3), split=split).eval()
    seen = []
    trunk.joint.register_forward_hook(lambda m, inp, out: seen.append(out))
    x = torch.randn(2,3,32,32)
    trunk(x)
    assert len(seen)==1 and torch.equal(seen[0], trunk.trunk.feature_maps(x).states[-1])
    assert seen[0].shape[1]==trunk.channels[split-1]

# Training

def test_cosines_stay_between_minus_one_and_one():
    for s in range(40):
        torch.manual_seed(s)
        g = torch.randn(7)
        found = cosines(torch.stack([g, -3*g, 2*g]))
        assert found.min()>=-1 and found.max()<=1
        assert torch.allclose(found, tensor([[1.,-1.,1.],[-1.,1.,-1.],[1.,-1.,1.]]), atol=1e-5)

def test_a_candidate_is_trained_for_its_epochs_or_its_batches():
    dls = loaders(numbers(20, x=np.arange(20.)), dict(x=RegressionBlock))
    assert len(dls.train)==3 and len(dls.valid)==2
    for batches,epochs,steps in ((None,1,3), (None,2,6), (4,1,4), (1,1,1), (2,1,2)):
        learn = multi_learner(dls)
        seen = []
        class Count(Callback):
            def after_step(self): seen.append(1)
        learn.add_cb(Count())
        res,ms = try_candidate(learn, batches, epochs, 1e-3)
        assert len(seen)==steps and ms>0 and 'x_mae' in res

def test_the_probe_reads_the_target_and_not_its_weight():
    df = numbers(kind=['b','c']*6, weight=np.arange(12)/4+1)
    for weight in (None, 'weight'):
        learn = multi_learner(loaders(df, dict(kind=CategoryBlock), weight=weight))
        found = FrozenFeatures(learn, learn.dls.valid).targets['kind']
        assert found.dtype==torch.long and found.tolist()==[1,1,1]

def test_numbers_are_added_over_processes(monkeypatch):
    t = tensor([1.,2.])
    assert losses.sum_processes(t) is t
    monkeypatch.setattr(losses, 'num_distrib', lambda: 2)
    monkeypatch.setattr(losses, 'maybe_gather', lambda o: torch.cat([o, 10*o]))
    assert losses.sum_processes(t).tolist()==[11.,22.]

def test_learned_weights_stay_within_ten_thousand():
    cb = UncertaintyWeighting(lr=5.)
    cb.state = dict(log_vars=tensor([9.,-9.]))
    for _ in range(3): w = cb.weigh(tensor([1e9,1e-9]), tensor([4.,4.]))
    assert cb.state['log_vars'].tolist()==pytest.approx([math.log(1e4), -math.log(1e4)])
    assert w.tolist()==pytest.approx([1e-4,1e4], rel=1e-3)

def test_class_weights_and_a_loss_of_ones_own_are_refused():
    dls = loaders(numbers(kind=['b','c','a']*4), dict(kind=CategoryBlock))
    for own in (dict(kind=CrossEntropyLossFlat()), CrossEntropyLossFlat()):
        with pytest.raises(ValueError, match='`class_weights` works with the default loss of categories and tags'):
            multi_learner(dls, class_weights=dict(kind='balanced'), loss_func=own)

def test_the_report_measures_validation_as_evaluate_does():
    "The batches have 4, 4 and 1 items, some without a label"
    df = numbers(36, x=np.arange(36.)**2, kind=['b','c','a']*12)
    df.loc[[7,11,15], 'x'] = np.nan
    learn = multi_learner(loaders(df, dict(x=RegressionBlock, kind=CategoryBlock)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        res = learn.evaluate()
    found = valid_losses(learn, 9)
    assert found['validation'].tolist()==pytest.approx([res['x_loss'], res['kind_loss']], rel=1e-4)
    train,valid = df[~df.is_valid],df[df.is_valid]
    x = ((valid.x-train.x.mean())/train.x.std(ddof=0)).dropna()
    assert float(found['constant'][0])==pytest.approx((x**2).mean(), rel=1e-3)

def test_other_loaders_bring_their_own_description():
    make = lambda n: loaders(numbers(n, x=np.arange(n)*1., kind=['b','c','a']*(n//3)),
                             dict(x=RegressionBlock, kind=CategoryBlock))
    learn = multi_learner(make(12))
    learn.probe_scores = dict(x_mae=1.)
    learn.dls = make(24)
    assert learn.probe_scores is None                  # the scores belong to other items
    for n,part in describe(learn.dls).outputs.items():
        assert learn.output_parts[n] is part and learn.tasks[n].part is part
    for n,part in describe(learn.dls).inputs.items(): assert learn.input_parts[n] is part

def test_new_items_are_checked_before_they_are_predicted():
    learn = multi_learner(loaders(numbers(x=np.arange(12.)), dict(x=RegressionBlock)))
    with pytest.raises(TypeError, match='For one item, call `predict`'): learn.predict_df('a.png')
    with pytest.raises(ValueError, match='nothing to predict'): learn.predict_df([])
    with pytest.raises(ValueError, match='nothing to predict'): learn.predict_df(numbers()[:0])

def test_a_flag_that_is_none_is_found_when_the_loaders_are_made():
    df = numbers(p=[0,1]*6, q=[1,0,0]*4)
    tags = dict(outputs=dict(tags=MultiCategoryBlock), columns=dict(tags=['p','q']))
    assert list(loaders(df, **tags).vocab['tags'])==['p','q']
    df.loc[5, 'q'] = 2
    with pytest.raises(ValueError, match=r'Found in .*5'): loaders(df, **tags)

@pytest.mark.parametrize('n_classes', [1,2,3])
def test_words_tell_classes_apart_if_there_are_two(n_classes):
    words = ['cup','car','tree'][:n_classes]
    df = numbers(36, kind=(words*36)[:36], note=[f'a {w}' for w in (words*36)[:36]])
    block = CategoryBlock(vocab=['car','cup','tree'])
    learn = multi_learner(loaders(df, dict(kind=block), features=None, text='note'))
    found = TextBaseline(learn)
    assert list(found.models)==(['kind'] if n_classes>1 else [])

@pytest.mark.parametrize('arch', ['tf_mobilenetv3_small_minimal_100','resnet10t','vit_tiny_patch16_224'])
@pytest.mark.parametrize('depth', [1,2])
def test_a_shallow_network_of_timm_holds_nothing_that_never_runs(arch, depth):
    pytest.importorskip('timm')
    enc = image_encoder(arch, depth=depth).train()
    enc(torch.randn(2,3,64,64)).sum().backward()
    assert [n for n,p in enc.named_parameters() if p.grad is None]==[]

class Unknown(Transform):
    "An item transform that the reader does not know, so that fastai's own pipeline reads the items"
    def encodes(self, x:PILImage): return x

@pytest.mark.parametrize('tfms', [[], [Unknown()]], ids=['short way','long way'])
def test_without_a_picture_there_are_neither_boxes_nor_labels(tfms, tmp_path):
    for i in range(4): Image.fromarray(np.full((20,30,3), 40*i, dtype=np.uint8)).save(tmp_path/f'{i}.png')
    boxes = [[[1,2,9,8],[3,3,7,9]]]*4
    df = pd.DataFrame(dict(file=['0.png','1.png',None,'3.png'], boxes=boxes, labels=[['x','y']]*4,
                           is_valid=[False,False,True,True]))
    dls = loaders(df, dict(boxes=BBoxBlock, labels=BBoxLblBlock), path=tmp_path, features=None, image='file',
                  item_tfms=[*tfms, Resize(16, 'squish')], bs=2)
    _,y = dls.valid.one_batch()
    assert y.labels.tolist()==[[-100,-100],[1,2]]
    assert bool(y.boxes[0].isnan().all()) and not y.boxes[1].isnan().any()

def test_the_chosen_logistic_fit_is_at_its_minimum():
    torch.manual_seed(2)
    z = torch.randn(200,12)*torch.logspace(0, -2, 12)
    y = (z@torch.randn(12,4)*3).argmax(1)
    model = Logistic(F.cross_entropy, torch.zeros(4))
    found = model.choose(z, y)
    def cost(w, b): return float(F.cross_entropy(z@w+b, y, reduction='sum') + found.penalty/2*(w**2).sum())
    least = cost(*model.fit(z, y, found.penalty, steps=1000))
    assert cost(found.weight, found.bias)==pytest.approx(least, rel=1e-3)

def test_one_run_of_a_comparison_by_hand():
    dls = loaders(numbers(x=np.arange(12.), kind=['b','c','a']*4), dict(x=RegressionBlock, kind=CategoryBlock))
    made = []
    def make(outputs):
        made.append(multi_learner(dls))
        return made[-1]
    rows = run_once(make, ['x','kind'], lambda learn: learn.fit(1), 0, {})
    with made[0].no_bar(): res = made[0].evaluate()
    assert [(o['output'],o['metric'],o['up']) for o in rows]==[('x','x_mae',False),('kind','kind_accuracy',True)]
    for o in rows:
        assert o['value']==pytest.approx(res[o['metric']]) and o['seed']==0 and o['together']
        assert o['parameters']==sum(p.numel() for p in made[0].model.parameters())

def test_values_of_another_form_are_none_and_columns_go_by_name_or_place():
    dls = loaders(numbers(x=np.arange(12.), kind=['b','c','a']*4), dict(x=RegressionBlock, kind=CategoryBlock))
    targets = dls.valid.parts[1]
    assert targets.values((1.,'b'))==[1.,'b']
    for other in ((1.,), (1.,'b',3), 5., 'ab'): assert targets.values(other) is None
    tfm = parts_tfm(dls.train_ds.tls[1])
    x,kind = [1.,2.],['b','c']
    assert tfm.split_columns(dict(p=x, q=kind))==dict(x=x, kind=kind)
    assert tfm.split_columns(dict(kind=kind, x=x))==dict(x=x, kind=kind)

def test_the_loss_of_a_ridge_fit_is_a_mean_over_its_numbers():
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    y = x@torch.randn(5, 1) + torch.randn(60, 1)
    space = item_coordinates(x@x.T)
    one,two = ridge(space, y),ridge(space, torch.cat([y, y], 1))
    assert two.loss==pytest.approx(one.loss) and two.penalty==one.penalty
    assert torch.allclose(two.weight[:,1:], one.weight, atol=1e-5)

def test_an_encoder_that_all_outputs_read_is_shared():
    dls = loaders(numbers(x=np.arange(12.), kind=['b','c','a']*4), dict(x=RegressionBlock, kind=CategoryBlock))
    model = multi_learner(dls).model
    shared = {id(p) for p in model.shared_parameters()}
    assert shared>={id(p) for p in model.encoders.parameters()}
    for n,head in model.heads.items():
        own = {id(p) for p in model.owned_parameters(n)}
        assert own>={id(p) for p in head.parameters()} and not own & shared

def test_how_many_features_a_vector_gives():
    assert [VectorEncoder(n).n_features for n in (1,16,17,20,128,200)]==[32,32,34,40,256,256]
    assert VectorEncoder(20, 7).n_features==7

@pytest.mark.parametrize('training,validation,said', [(.6,1.1,True), (.8,1.1,False), (.6,.9,False)])
def test_overfitting_is_more_than_the_constant_there_and_much_less_here(training, validation, said):
    for unit in (1., 100.):
        row = pd.Series({'evaluation': training*unit, 'constant': unit, 'validation': validation*unit,
                         'constant there': unit})
        assert bool(LearningAdvice.overfit(None, 'x', row))==said

def test_features_far_from_zero_come_back_as_they_were():
    df = pd.DataFrame(dict(place=[1e9+3*i for i in range(8)], kind=list('abababab')))
    dls = MultiDataLoaders.from_df(df, features='place', outputs=dict(kind=CategoryBlock), bs=6, num_workers=0,
                                   valid_idx=[6,7], shuffle=False)
    part = describe(dls).inputs['features']
    assert [float(part.decode(o)) for o in dls.train.one_batch()[0]]==[1e9+3*i for i in range(6)]

def test_a_norm_of_present_numbers_is_batch_norm_where_none_is_missing():
    ours,theirs = PresentNorm(3),nn.BatchNorm1d(3)
    state = dict(weight=tensor([2.,.5,-1.]), bias=tensor([1.,0.,3.]), running_mean=tensor([.1,2.,-3.]),
                 running_var=tensor([4.,.25,1.]), num_batches_tracked=tensor(5))
    for m in (ours,theirs): m.load_state_dict(state)
    x = torch.randn(7,3)*3
    for training in (False,True):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    for n,v in theirs.state_dict().items(): torch.testing.assert_close(ours.state_dict()[n], v)

def test_the_steps_that_are_few_are_those_of_the_training(capsys):
    df = pd.DataFrame(dict(a=np.arange(20.), kind=list('ab')*10))
    dls = MultiDataLoaders.from_df(df, features='a', outputs=dict(kind=CategoryBlock), bs=4, num_workers=0,
                                   valid_idx=range(12,20))
    learn = multi_learner(dls)
    with learn.no_bar(), learn.no_logging(): assert len(dls.train)==3 and len(dls.valid)==2
    with learn.no_bar(): learn.fit(1)
    assert '3 steps are few' in capsys.readouterr().out

def test_rows_of_several_splits_have_numbers_of_their_own():
    "Messages name an item by its row, so no two splits share a number"
    datasets = pytest.importorskip('datasets')
    def split(n): return datasets.Dataset.from_dict(dict(a=[float(i) for i in range(n)], kind=list('ab')*(n//2)))
    data = datasets.DatasetDict(train=split(8), validation=split(4))
    dls = MultiDataLoaders.from_hf(data, features='a', outputs=dict(kind=CategoryBlock), bs=4, num_workers=0)
    rows = [i for dl in dls.loaders for i in dl.items.index]
    assert sorted(rows)==list(range(12))
