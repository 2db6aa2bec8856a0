"Losses, metrics and MixUp inside fastai's own `Learner`: what crosses modules"
import copy, math, pickle
from functools import partial
import numpy as np, pytest, torch, torchmetrics
import torch.nn.functional as F
from torch import nn, Tensor
from fastcore.all import L
from fastai.data.all import DataLoader, DataLoaders
from fastai.learner import Learner, CastToTensor
from fastai.callback.all import (Callback, MixUp, ProgressCallback, TrackerCallback, SaveModelCallback,
                                 EarlyStoppingCallback, ReduceLROnPlateau)
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy, F1Score
from fastai.optimizer import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from fastai_multi.core import *
from fastai_multi.losses import *
from fastai_multi.metrics import *
from fastai_multi.callback.mixup import *

KINDS = dict(kind='category', tags='tags', area='number', box='box')
SIZES = dict(kind=3, tags=4, area=1, box=4)
Y = Outputs.of(*KINDS)
nan = math.nan

class Items:
    "`n` items of 8 features and four targets, every third label of each output missing if `holes`"
    def __init__(self, n=24, holes=True):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 8, generator=g)
        a = torch.rand(n, 2, generator=g)-1
        self.y = Y([torch.randint(0, 3, (n,), generator=g), torch.randint(0, 2, (n,4), generator=g).float(),
                    torch.randn(n, generator=g), torch.cat([a, a+.5], 1)])
        if holes:
            for i,t in enumerate(self.y): t[i%3::3] = IGNORE if i==0 else nan
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y.map(lambda t: t[i])

class Model(nn.Module):
    def __init__(self, sizes=SIZES):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({n: nn.Linear(8, c) for n,c in sizes.items()})
    def forward(self, x):
        f = self.body(x).relu()
        return Outputs.make({n: h(f) for n,h in self.heads.items()})

class Names(Callback):
    "The targets under their names, at the place of `CastToTensor`"
    order = CastToTensor.order
    def before_batch(self): self.learn.yb = (Y(flat(self.yb)),)

def losses(): return {n: default_loss(k) for n,k in KINDS.items()}

def learner(items=None, model=None, loss=None, metrics=None, cbs=None, path=None, bs=8):
    items = items or Items()
    dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items, bs=bs))
    learn = Learner(dls, model or Model(), loss or MultiLoss(losses()), lr=.01, metrics=output_metrics(metrics, KINDS),
                    path=path)
    learn.remove_cbs([CastToTensor, ProgressCallback])
    learn.add_cb(Names())
    for cb in L(cbs):
        learn.add_cb(set_direction(cb, learn.metrics) if isinstance(cb, TrackerCallback) else as_multi(cb))
    return learn

def fit(learn, n=1, **kwargs):
    with learn.no_logging(): learn.fit(n, **kwargs)
    return learn

def columns(learn, epoch=-1): return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[epoch]))

def test_table():
    cols = columns(fit(learner()))
    assert list(cols) == ['train_loss','valid_loss','kind_loss','tags_loss','area_loss','box_loss','kind_accuracy',
                          'tags_f1','area_mae','box_iou']
    assert all(map(math.isfinite, cols.values()))

def test_columns_are_exact_whatever_the_batches():
    model = Model()
    items = Items()
    with torch.no_grad(): p = model(items.x)
    here = {n: present(t) for n,t in items.y.items()}
    want = dict(kind_loss=F.cross_entropy(p.kind[here['kind']], items.y.kind[here['kind']]),
                area_loss=F.mse_loss(p.area[here['area']][:,0], items.y.area[here['area']]),
                box_loss=BoxLoss()(p.box, items.y.box),
                kind_accuracy=accuracy(p.kind[here['kind']], items.y.kind[here['kind']]),
                area_mae=(p.area[:,0]-items.y.area).abs().nanmean(), box_iou=box_iou(p.box, items.y.box))
    for bs in (24, 7, 1):
        learn = learner(items, model, bs=bs)
        got = dict(zip(['valid_loss', *learn.metrics.attrgot('name')], learn.validate()))
        for k,v in want.items(): assert abs(got[k]-v.item())<1e-5, (bs, k)

def test_nothing_labelled_is_nan_and_training_goes_on():
    items = Items()
    items.y.area[:] = nan
    learn = fit(learner(items,
                        cbs=[EarlyStoppingCallback(monitor='area_mae', patience=5),
                             ReduceLROnPlateau(monitor='area_loss')]))
    cols = columns(learn)
    assert math.isnan(cols['area_mae'])
    assert math.isnan(cols['area_loss'])
    assert math.isfinite(cols['train_loss'])
    assert math.isfinite(cols['valid_loss'])
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_one_output_is_its_plain_training():
    items = Items(holes=False)
    model = Model(dict(kind=3))
    plain = copy.deepcopy(model)
    multi = copy.deepcopy(model)
    class One(Callback):
        order = CastToTensor.order
        def __init__(self, named): self.named = named
        def before_batch(self):
            y = flat(self.yb)[0]
            self.learn.yb = (Outputs(kind=y),) if self.named else (y,)
    def run(m, loss, named):
        dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
        learn = Learner(dls, m, loss, lr=.1, opt_func=SGD)
        learn.remove_cbs([CastToTensor, ProgressCallback])
        learn.add_cb(One(named))
        fit(learn, 3)
    ce = CrossEntropyLossFlat(weight=torch.tensor([1.,2.,3.]))
    run(plain, lambda p,y: ce(p.kind, y), False)
    run(multi, MultiLoss(dict(kind=CrossEntropyLossFlat(weight=torch.tensor([1.,2.,3.])))), True)
    for a,b,o in zip(plain.parameters(), multi.parameters(), model.parameters()):
        assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, o, atol=1e-3)

def test_rows_without_label_weigh_nothing():
    "The gradient of a batch is the gradient of its labelled rows, for each output"
    items = Items()
    model = Model()
    for n in KINDS:
        lf = MultiLoss({n: losses()[n]})
        def grad(x, t):
            model.zero_grad()
            lf(Outputs.make({n: model(x)[n]}), Outputs.make({n: t})).backward()
            return model.body.weight.grad.clone()
        t = items.y[n]
        here = present(t)
        assert 0 < here.sum() < len(t)
        assert torch.allclose(grad(items.x, t), grad(items.x[here], t[here]), atol=1e-6), n

def test_each_metric_reads_its_own_head():
    "Heads of one shape: only the output whose head is right scores, for every make of metric and any order of heads"
    names = ['a','b','c']
    t = torch.randint(0, 4, (16,))
    hit = F.one_hot(t, 4).float()
    miss = F.one_hot((t+1)%4, 4).float()
    class Fixed(nn.Module):
        def __init__(self, right):
            super().__init__()
            self.right = right
            self.w = nn.Parameter(torch.zeros(1))
        def forward(self, i): return Outputs.make({n: (hit if n==self.right else miss)[i]+self.w for n in names})
    class Ds:
        def __len__(self): return 16
        def __getitem__(self, i): return i, Outputs(a=t[i], b=t[i], c=t[i])
    makes = lambda: [accuracy, partial(accuracy, axis=-1), F1Score(average='micro'),
                     torchmetrics.Accuracy('multiclass', num_classes=4)]
    for right in names:
        dls = DataLoaders(DataLoader(Ds(), bs=5), DataLoader(Ds(), bs=5))
        learn = Learner(dls, Fixed(right), MultiLoss({n: CrossEntropyLossFlat() for n in names}),
                        metrics=output_metrics({n: makes() for n in names}, {n: 'category' for n in names}))
        with learn.no_bar(): vals = dict(zip(['valid_loss', *learn.metrics.attrgot('name')], learn.validate()))
        for n in names:
            for k,v in vals.items():
                if k.startswith(f'{n}_') and not k.endswith('_loss'): assert abs(v-(n==right))<1e-6, (right, k, v)
            assert (vals[f'{n}_loss']<1) == (n==right)

class Waits(TorchDispatchMode):
    "Collects the operations whose result the CPU has to wait for on another device"
    waits = ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', 'unique')
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        masked = (name in ('index', 'index_put', 'index_put_')
                  and any(isinstance(o, Tensor) and o.dtype==torch.bool for o in args[1] if o is not None))
        if name in self.waits or masked: self.seen.append(name)
        return func(*args, **(kwargs or {}))

def test_a_step_waits_for_nothing():
    items = Items()
    model = Model()
    lf = MultiLoss(losses(), weights=dict(box=2.))
    metrics = output_metrics(None, KINDS)
    class Learn: training = True
    learn = Learn()
    learn.loss_func = lf
    for m in metrics: m.reset()
    with Waits() as w:
        for i in range(3):
            lf.weights['kind'] = 1.+i
            learn.pred = model(items.x)
            learn.yb = (items.y,)
            lf(learn.pred, items.y).backward()
            for m in metrics: m.accumulate(learn)
        assert w.seen == []
        torch.ones(2)[torch.tensor([True,False])], torch.ones(1).item()
    assert set(w.seen) >= {'index', '_local_scalar_dense'}    # it does notice

def test_trackers_follow_the_better_direction(tmp_path):
    "`area_mae` rises epoch by epoch: the first model is the best"
    class Worse(Callback):
        order = -1
        def before_validate(self): self.learn.model.heads['area'].bias.data += 1.
    save = SaveModelCallback(monitor='area_mae')
    stop = EarlyStoppingCallback(monitor='box_iou', patience=9)
    slow = ReduceLROnPlateau(monitor='area_mae', patience=1)
    learn = learner(cbs=[save, stop, slow, Worse()], path=tmp_path)
    fit(learn, 3, lr=0.)
    maes = [columns(learn, i)['area_mae'] for i in range(3)]
    assert maes == sorted(maes) and save.best == maes[0] and save.comp is np.less and stop.comp is np.greater
    assert slow.comp is np.less

def test_get_preds():
    learn = learner()
    preds,targs,dec,each = learn.get_preds(with_decoded=True, with_loss=True)
    assert type(preds) is Y and each.shape == (24,)
    assert torch.allclose(preds.kind.sum(1), torch.ones(24))
    assert (dec.box[:,2:]>=dec.box[:,:2]).all()
    assert dec.kind.dtype == torch.long
    assert learn.loss_func.reduction == 'mean'
    first_kind = int(present(targs.kind).nonzero()[0])
    assert each[first_kind] >= -preds.kind[first_kind, targs.kind[first_kind]].log() - 1e-4

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    items = Items()
    model = Model()
    pred = model(items.x)
    full = MultiLoss(losses())(pred, items.y)
    with torch.autocast('cpu', torch.bfloat16): half = MultiLoss(losses())(pred.map(lambda o: o.to(dtype)), items.y)
    assert half.dtype == torch.float32 and abs(half-full) < .02*full
    half.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

def test_mixup_by_fastais_name():
    "fastai's `MixUp` given to a learner of outputs that can be blended, and of one that cannot"
    kinds = ['kind','tags','area']
    class Some(Names):
        def before_batch(self):
            self.learn.yb = (Outputs.make({n: t for n,t in Y(flat(self.yb)).items() if n in kinds}),)
    items = Items()
    model = Model({n: SIZES[n] for n in kinds})
    dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
    lf = MultiLoss({n: l for n,l in losses().items() if n in kinds})
    learn = Learner(dls, model, lf, cbs=as_multi(MixUp()), metrics=output_metrics(None, {n: KINDS[n] for n in kinds}))
    learn.remove_cbs([CastToTensor, ProgressCallback])
    learn.add_cb(Some())
    fit(learn, 2)
    assert learn.loss_func is lf
    assert all(p.isfinite().all() for p in model.parameters())
    assert math.isfinite(columns(learn)['train_loss'])
    with pytest.raises(ValueError, match="MixUp cannot blend output 'box'"): fit(learner(cbs=MixUp()))

def test_export_keeps_losses_and_metrics(tmp_path):
    lf,ms = pickle.loads(pickle.dumps((MultiLoss(losses(), weights=dict(box=2.)), output_metrics(None, KINDS))))
    items = Items()
    model = Model()
    assert torch.allclose(lf(model(items.x), items.y),
                          MultiLoss(losses(), weights=dict(box=2.))(model(items.x), items.y))
    assert [m.name for m in ms] == [m.name for m in output_metrics(None, KINDS)]

def test_typed_predictions_and_targets():
    "As a batch taken by hand has them: `x,y = dls.one_batch(); learn.loss_func(learn.model(x), y)`"
    from fastai.torch_core import TensorCategory, TensorImage
    from fastai.vision.core import TensorBBox
    lf = MultiLoss(dict(a=CrossEntropyLossFlat(), b=MSELossFlat()))
    p = (torch.randn(4,3),torch.randn(4,1,4))
    t = (torch.tensor([0,1,2,0]),torch.randn(4,1,4))
    typed = lf(Outputs(a=TensorImage(p[0]), b=TensorImage(p[1])), Outputs(a=TensorCategory(t[0]), b=TensorBBox(t[1])))
    assert type(typed) is torch.Tensor and torch.equal(typed, lf(Outputs(a=p[0], b=p[1]), Outputs(a=t[0], b=t[1])))
