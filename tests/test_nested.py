"A custom group: two numbers and a category under one name, with its own head, loss and metric"
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.nn import functional as F
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.callback.weights import Balancer
from fastai_multi.core import Named
from fastai_multi.data.block import GroupPart
from fastai_multi.losses import GroupLoss
from fastai_multi.tasks import GroupTask
from tests.seen import texts_of_figure

# The kind: an object's place and class

class ThingPart(GroupPart):
    "A place and a class. A prediction is correct if the class is, and if the place is near"

class ThingBlock(GroupBlock):
    "Two numbers and a category under one name"
    part_class = ThingPart
    def __init__(self): super().__init__(place=RegressionBlock(n_out=2), kind=CategoryBlock)

class ThingHead(nn.Module):
    "One hidden layer for all members of a thing"
    options = ()
    def __init__(self, n_in, n_out, maps=None):
        super().__init__()
        self.hidden = nn.Linear(n_in, 32)
        self.place = nn.Linear(32, n_out['place'])
        self.kind = nn.Linear(32, n_out['kind'])
    def forward(self, features):
        x = F.relu(self.hidden(features))
        return dict(place=self.place(x), kind=self.kind(x))

class ThingLoss:
    "The squared error of the place plus the cross-entropy of the class, for each item"
    def __call__(self, pred, targ):
        off = F.mse_loss(pred.place, targ.place, reduction='none').mean(1)
        return off + F.cross_entropy(pred.kind, targ.kind, reduction='none')

def found(pred, targ):
    "The share of things with the correct kind and a place within 16 pixels"
    near = (pred.place-targ.place).norm(dim=1) < 16
    return (near & (pred.kind.argmax(1)==targ.kind)).float().mean()

class ThingTask(GroupTask, part=ThingPart):
    "A thing is scored as a whole"
    head_class = ThingHead
    def loss(self, **kwargs): return ThingLoss()
    def metrics(self): return [found, *super().metrics()]

# A table in which some things are missing, and some have no kind

OUTPUTS = dict(colour=CategoryBlock, thing=ThingBlock)
COLUMNS = dict(thing=dict(place=['x1','y1']))

@pytest.fixture(scope='module')
def table(shapes):
    df = pd.read_csv(shapes/'items.csv')
    df['kind'] = [None if i % 10 == 3 else k for i,k in enumerate(df.kind)]
    df.loc[::8, ['x1','y1']] = np.nan
    df['weight'] = np.where(df.index % 2, 2., .5)
    return df

def loaders(table, shapes, outputs=OUTPUTS, columns=COLUMNS, **kwargs):
    return MultiDataLoaders.from_df(table, shapes, image='file', outputs=outputs, columns=columns, item_tfms=Resize(64),
                                    bs=16, seed=0, num_workers=0, **kwargs)

def learner(dls, **kwargs):
    set_seed(0)
    learn = multi_learner(dls, simple_cnn(depth=3), lr=3e-3, **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.fixture(scope='module')
def trained(table, shapes):
    learn = learner(loaders(table, shapes))
    learn.fit(6, 1e-2)
    return learn

def test_a_batch_holds_a_group(table, shapes):
    dls = loaders(table, shapes)
    _,y = dls.valid.one_batch()
    assert y.keys() == ('colour','thing')
    assert y.thing.keys() == ('place','kind')
    assert y.thing.place.shape == (16,2)
    assert y.thing.kind.shape == (16,)
    rows = dls.valid.items
    assert y.thing.place.isnan().all(1).tolist() == rows.x1.isna().tolist()
    assert (y.thing.kind==-100).tolist() == rows.kind.isna().tolist()
    said = str(describe(dls))
    assert 'thing   group' in said

def test_every_way_to_give_it(table, shapes):
    "An item may be a dict, a tuple, a dict without a member, a dict by leaf, or nothing"
    ways = [dict(place=[1.,2.], kind='a'), ([3.,4.], 'b'), dict(kind='a'), dict(place=[5.,7.]), None]
    items = [dict(x=float(i), y=dict(n=float(i), who=w)) for i,w in enumerate(ways)]
    items.append(dict(x=0., y={'n': 0., 'who.place': [1.,1.], 'who.kind': 'b'}))
    block = DataBlock((FeaturesBlock, MultiOutputBlock(n=RegressionBlock, who=ThingBlock)), get_x=lambda o: o['x'],
                      get_y=lambda o: o['y'], splitter=lambda o: (list(range(len(o))), [0,1]))
    dls = block.dataloaders(items, bs=6, shuffle=False, num_workers=0)
    for dl in (dls.train, dls.train.new(num_workers=1)):
        y = dl.new(shuffle=False, drop_last=False).one_batch()[1]
        assert y.who.kind.tolist() == [0,1,0,-100,-100,1]
        assert y.who.place.isnan().all(1).tolist() == [False,False,True,False,True,False]
    with pytest.raises(ValueError, match="Output 'who' is 3, but it is a group: give a dict of its members"):
        block.dataloaders([*items, dict(x=0., y=dict(n=0., who=3))], bs=2)

def test_show_batch_and_results(trained):
    plt.close('all')
    trained.dls.valid.show_batch(max_n=6)
    assert 'thing.place: ' in texts_of_figure()
    plt.close('all')
    trained.show_results(max_n=6)
    seen = texts_of_figure()
    assert 'thing: place: ' in seen and 'kind: ' in seen
    assert '✓ thing' in seen or '✗ thing' in seen

def test_it_trains_beside_a_category(trained):
    res = trained.evaluate()
    names = ['thing_loss','thing_found','thing_place_mae','thing_kind_accuracy','colour_accuracy']
    assert set(names) <= set(res)
    assert all(np.isfinite(res[n]) for n in names)
    assert res['thing_place_mae'] > 1            # in pixels, not in standard deviations

def test_loss_and_metrics_count_what_is_labelled(trained):
    "Loss and metrics equal the numbers by hand"
    preds,targs = trained.get_preds(act=noop)
    p = preds.thing
    t = targs.thing
    whole = ~t.place.isnan().any(1) & (t.kind!=-100)
    assert 0 < whole.sum() < len(whole)
    want = ThingLoss()(p.map(lambda o: o[whole]), t.map(lambda o: o[whole])).mean()
    res = trained.evaluate()
    assert res['thing_loss'] == pytest.approx(want.item(), rel=1e-4)
    known = t.kind!=-100
    right = (p.kind.argmax(1)==t.kind)[known].float().mean()
    assert res['thing_kind_accuracy'] == pytest.approx(right.item(), rel=1e-4)

def test_get_preds_by_name(trained):
    preds,targs,dec,losses = trained.get_preds(with_decoded=True, with_loss=True)
    n = len(trained.dls.valid.items)
    assert preds.thing.kind.shape == (n,len(trained.output_parts['thing'].members['kind'].vocab))
    assert torch.allclose(preds.thing.kind.sum(1), torch.ones(n))
    assert dec.thing.kind.shape == (n,) and dec.thing.place.shape == (n,2)
    assert targs.thing.keys() == preds.thing.keys()
    assert losses.shape == (n,)

def test_predict_one_and_many(trained, table, shapes):
    row = table.iloc[2]
    answer,dec,_ = trained.predict(row)
    assert set(answer.thing) == {'place','kind'}
    assert answer.thing['kind'] in set(table.kind.dropna())
    assert len(answer.thing['place']) == 2 and abs(answer.thing['place'][0]) < 200      # pixels
    assert isinstance(dec.thing, Named)
    df = trained.predict_df(table.iloc[:5], num_workers=0)
    assert list(df.columns) == ['colour','thing.place','thing.kind']
    assert df['thing.kind'][2] == answer.thing['kind']
    np.testing.assert_allclose(df['thing.place'][2], answer.thing['place'], rtol=1e-3)

def test_export_and_load(trained, table, tmp_path):
    before = trained.predict(table.iloc[1])[2]
    trained.export(tmp_path/'things.pkl')
    after = load_learner(tmp_path/'things.pkl')
    with after.no_bar(): res = after.predict(table.iloc[1])[2]
    torch.testing.assert_close(res.thing.place, before.thing.place, atol=1e-5, rtol=1e-5)

def test_weights_of_losses_and_items(table, shapes):
    learn = learner(loaders(table, shapes, weight='weight'), loss_weights=dict(thing=3.))
    learn.fit(1)
    b = learn.dls.train.one_batch()
    learn._split(b)
    pred = learn.model(*learn.xb)
    total = learn.loss_func(pred, *learn.yb)
    values = learn.loss_func.step.values
    scales = [learn.loss_func.scales.get(n, 1.) for n in ('colour','thing')]
    assert total.item() == pytest.approx((values[0]*scales[0] + 3*values[1]*scales[1]).item(), rel=1e-4)
    w = b[1].item_weight.reshape(-1)
    t = learn.yb[0].thing
    whole = ~t.place.isnan().any(1) & (t.kind!=-100)
    each = ThingLoss()(pred.thing.map(lambda o: o[whole]), t.map(lambda o: o[whole]))
    assert values[1].item() == pytest.approx(((each*w[whole]).sum()/w[whole].sum()).item(), rel=1e-4)

@pytest.mark.parametrize('cb', [UncertaintyWeighting, DynamicWeightAverage, GradNorm, GradientBalance,
                                partial(GradientBalance, level='parameters'), TaskMonitor], ids=str)
def test_balancing(table, shapes, cb):
    "Each batch has weights for two outputs: the group has one weight, and its members have none"
    seen = []
    class Watch(Callback):
        order = 70
        run_valid = False
        def after_batch(self):
            for o in self.learn.cbs:
                if isinstance(o, Balancer): seen.append(o.last_weights.tolist())
    learn = learner(loaders(table, shapes))
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    learn.fit(1, cbs=[cb(), Watch()])
    moved = [n for n,p in learn.model.named_parameters() if not torch.equal(p, before[n])]
    used = [n for n in before if '.absents.' not in n]            # no input is missing
    assert {n.split('.')[0] for n in moved} == {n.split('.')[0] for n in used}
    if not isinstance(cb(), TaskMonitor):
        assert len(seen)==len(learn.dls.train)
        assert all(len(w)==2 and min(w)>=0 and max(w)>0 for w in seen)
    if isinstance(cb(), TaskMonitor): learn.plot_tasks()

def test_report_tta_summary_and_baseline(trained):
    assert 'thing' in str(trained.task_report(n_batches=2))
    preds,targs = trained.tta(n=2)
    assert len(preds.thing.kind) == len(preds.thing.place) == len(targs.colour)
    assert 'thing' in str(trained.summary())
    assert 'thing_found' in trained.evaluate(baseline=True).index

def test_mixup_is_refused(table, shapes):
    learn = learner(loaders(table, shapes))
    with pytest.raises(ValueError, match="MixUp cannot blend output 'thing'"): learn.fit(1, cbs=MixUp())

def test_a_metric_by_member(table, shapes):
    dls = loaders(table, shapes)
    learn = learner(dls, metrics=dict(thing=dict(kind=[accuracy, F1Score(average='macro')], place=mae)))
    learn.fit(1)
    assert {'thing_kind_accuracy','thing_kind_f1_score','thing_place_mae'} <= set(learn.evaluate())
    with pytest.raises(KeyError, match="Unknown member of the group 'thing' in `metrics` 'knd'"):
        learner(dls, metrics=dict(thing=dict(knd=accuracy)))

# Without a custom class

def test_a_group_of_usual_members(table, shapes):
    "The members have heads, losses and metrics. The group is the only output, and its members lie in the picture"
    outputs = dict(thing=GroupBlock(box=BBoxBlock, kind=CategoryBlock, area=RegressionBlock))
    df = table.assign(x1=table.x1.fillna(2), y1=table.y1.fillna(2))
    df.loc[df.index%5==1, ['x1','y1','x2','y2']] = np.nan
    columns = dict(thing=dict(box=['x1','y1','x2','y2']))
    learn = learner(loaders(df, shapes, outputs, columns))
    assert isinstance(learn.loss_func.funcs['thing'], GroupLoss)
    learn.fine_tune(2)
    res = learn.evaluate()
    assert {'thing_box_iou','thing_kind_accuracy','thing_area_mae'} <= set(res) and res['thing_box_iou'] > .05
    preds,targs = learn.get_preds()
    assert preds.thing.box.shape == targs.thing.box.shape
    answer = learn.predict(df.iloc[0])[0].thing
    assert 0 <= answer['box'][0] <= 64
    assert learn.predict_df(df.assign(file=None).iloc[:2], num_workers=0)['thing.box'].isna().all()
    plt.close('all')
    learn.dls.show_batch()
    learn.show_results()
    assert '□ thing.box' in texts_of_figure() or 'thing: box: overlap' in texts_of_figure()

# Boxes with their labels

OBJECTS = dict(objects=GroupBlock(boxes=BBoxBlock, labels=BBoxLblBlock), many=CategoryBlock)

class Slots(nn.Module):
    "Three boxes and their classes"
    def __init__(self, n_in, n_classes):
        super().__init__()
        self.boxes = nn.Linear(n_in, 12)
        self.labels = nn.Linear(n_in, 3*n_classes)
    def forward(self, x):
        return Outputs(boxes=self.boxes(x).unflatten(1, (3,4)).tanh(), labels=self.labels(x).unflatten(1, (3,-1)))

class SlotLoss:
    "The loss of the first boxes in the order of the slots. Pictures without boxes have no loss"
    ignores_missing = True
    def __call__(self, pred, targ):
        n = min(3, targ.boxes.shape[1])
        here = ~targ.boxes[:,:n].isnan().any(-1)
        off = (pred.boxes[:,:n]-targ.boxes[:,:n].nan_to_num()).abs().mean(-1)
        ce = F.cross_entropy(pred.labels[:,:n].transpose(1,2), targ.labels[:,:n].clamp(min=0), reduction='none')
        return torch.where(here, off+ce, 0.).sum(1)
    def decodes(self, pred): return Outputs(boxes=pred.boxes, labels=pred.labels.argmax(-1))

def object_rows(shapes):
    boxes = pd.read_csv(shapes/'boxes.csv')
    rows = []
    for i,(file,g) in enumerate(boxes.groupby('file')):
        objects = dict(boxes=g[['x1','y1','x2','y2']].values.tolist(), labels=g.label.tolist())
        if i%7==1: objects = dict(boxes=[], labels=[])
        if i%7==2: objects = None
        rows.append(dict(file=shapes/file, y=dict(objects=objects, many='yes' if len(g)>2 else 'no')))
    return rows

def object_learner(shapes):
    block = DataBlock((ImageBlock, MultiOutputBlock(**OBJECTS)), get_x=lambda o: o['file'], get_y=lambda o: o['y'],
                      splitter=RandomSplitter(seed=0), item_tfms=Resize(64), batch_tfms=aug_transforms(size=48))
    dls = MultiDataLoaders.from_dblock(block, object_rows(shapes), bs=8, num_workers=0)
    n = len(dls.train.named_parts()[1]['objects'].members['labels'].vocab)
    return learner(dls, heads=dict(objects=lambda n_in, n_out: Slots(n_in, n)), loss_func=dict(objects=SlotLoss()),
                   metrics=dict(many=accuracy))

def test_boxes_with_labels_are_one_output(shapes):
    set_seed(0)
    learn = object_learner(shapes)
    x,y = learn.dls.train.one_batch()
    assert y.objects.boxes.shape[:2] == y.objects.labels.shape
    learn.fit(2)
    dl = learn.dls.valid
    preds,targs,dec = learn.get_preds(with_decoded=True)
    n = len(dl.items)
    assert targs.objects.boxes.shape[:2] == targs.objects.labels.shape and len(targs.objects.boxes) == n
    assert dec.objects.labels.shape == (n,3)
    answer = learn.predict(dl.items[0])[0].objects
    assert answer['boxes'].shape == (3,4) and len(answer['labels']) <= 3
    assert -10 < answer['boxes'].min() and answer['boxes'].max() < 80     # pixels of the file
    assert list(learn.predict_df(dl.items[:3]).columns) == ['objects.boxes','objects.labels','many']
    plt.close('all')
    dl.show_batch()
    learn.show_results()
    assert 'objects: boxes: 3 predicted' in texts_of_figure().replace('\n', ' ')

def test_the_short_form_keeps_its_names(shapes):
    "`boxes` and `labels` of a `MultiOutputBlock` are two outputs with the same values as in a group"
    def first_batch(blocks, get_y):
        block = DataBlock((ImageBlock, MultiOutputBlock(**blocks)), get_x=lambda o: o['file'], get_y=get_y,
                          splitter=RandomSplitter(seed=0), item_tfms=Resize(64))
        return block.dataloaders(object_rows(shapes), bs=8, num_workers=0).valid.one_batch()[1]
    def flat_y(o): return o['y']['objects'] or dict(boxes=None, labels=None)
    short = first_batch(dict(boxes=BBoxBlock, labels=BBoxLblBlock), flat_y)
    group = first_batch(OBJECTS, lambda o: o['y'])
    assert short.keys() == ('boxes','labels')
    for n in short.keys(): torch.testing.assert_close(short[n], group.objects[n], equal_nan=True)

def test_mistakes(table, shapes):
    with pytest.raises(KeyError, match="Unknown member of the group 'thing' in `columns` 'plce'"):
        loaders(table, shapes, columns=dict(thing=dict(plce='x1')))
    with pytest.raises(TypeError, match="it takes a dict by member: columns="):
        loaders(table, shapes, columns=dict(thing='x1'))
    with pytest.raises(ValueError, match="A group needs a name"): OneOutputBlock(ThingBlock)
    with pytest.raises(ValueError, match="Two outputs are called 'a.b'"):
        MultiOutputBlock(**{'a.b': CategoryBlock, 'a': GroupBlock(b=CategoryBlock)})
    two = loaders(table, shapes, dict(thing=GroupBlock(kind=CategoryBlock), colour=CategoryBlock), None)
    with pytest.raises(ValueError, match="cannot come after 'thing', which is a group"):
        learner(two, after=dict(colour='thing'))
    dls = loaders(table, shapes)
    broken = learner(dls, loss_func=dict(thing=lambda p, t: p.place-t.kind))
    with pytest.raises(ValueError, match="The loss of output 'thing'.*failed on predictions place"): broken.fit(1)

def test_only_groups_have_members():
    "No kind uses the names that describe the form of a group for something else"
    from fastai_multi.data.parts import Part
    for cls in Part.classes:
        if issubclass(cls, GroupPart): continue
        for n in ('members','leaves','batch_type','split','flatten','unflatten','as_target','columns','cells'):
            assert getattr(cls, n) is getattr(Part, n), f'{cls.__name__}.{n}'
