"Losses, metrics and MixUp inside fastai's own `Learner`, across modules"
import copy, math, pickle, re
from functools import partial
import numpy as np, pytest, torch, torchmetrics
import torch.nn.functional as F
from torch import nn, Tensor
from fastcore.all import L
from fastai.data.all import DataLoader, DataLoaders
from fastai.learner import AvgLoss, AvgSmoothLoss, CastToTensor, Learner, Recorder
from fastai.callback.all import (Callback, CutMix, MixUp, ProgressCallback, TrackerCallback, SaveModelCallback,
                                 EarlyStoppingCallback, ReduceLROnPlateau)
from fastai.losses import (BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLoss, FocalLossFlat,
                           LabelSmoothingCrossEntropy, MSELossFlat)
from fastai.metrics import accuracy, mae, F1Score, Perplexity
from fastai.optimizer import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.torch_core import apply, to_device
from fastai_multi.core import *
from fastai_multi.targets import *
from fastai_multi.losses import *
from fastai_multi.rowmetrics import *
from fastai_multi.metrics import *
from fastai_multi.columns import *
from fastai_multi.callback.mixup import *

USUAL = dict(kind=[accuracy], tags=[f1_multi], area=[mae], box=[box_iou])
SIZES = dict(kind=3, tags=4, area=1, box=4)
Y = Outputs.of(*SIZES)
nan = math.nan

class Items:
    "`n` items of 8 features and four outputs. If `holes`, every third label of each output is missing"
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
    "Name the outputs, instead of `CastToTensor`"
    order = CastToTensor.order
    def before_batch(self): self.learn.yb = (Y(flat(self.yb)),)

def losses(): return dict(kind=CrossEntropyLossFlat(), tags=BCEWithLogitsLossFlat(), area=MSELossFlat(), box=BoxLoss())

def learner(items=None, model=None, loss=None, metrics=None, cbs=None, path=None, bs=8):
    items = items or Items()
    dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items, bs=bs))
    learn = Learner(dls, model or Model(), loss or MultiLoss(losses()), lr=.01, metrics=output_metrics(metrics, USUAL),
                    path=path)
    exact_losses(learn.recorder)
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
    assert cols['valid_loss']==pytest.approx(sum(cols[f'{n}_loss'] for n in SIZES), rel=1e-5)

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
    model = Model()
    before = copy.deepcopy(model)
    items.y.area[:] = nan
    learn = fit(learner(items, model, cbs=[EarlyStoppingCallback(monitor='area_mae', patience=5),
                                           ReduceLROnPlateau(monitor='area_loss')]))
    cols = columns(learn)
    assert math.isnan(cols['area_mae'])
    assert math.isnan(cols['area_loss'])
    assert cols['valid_loss']==pytest.approx(sum(cols[f'{n}_loss'] for n in SIZES if n!='area'), rel=1e-5)
    for n in SIZES:
        still = torch.equal(before.heads[n].bias, model.heads[n].bias)
        assert still==(n=='area'), n

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
    "For each output, the gradient of a batch is the gradient of its labelled rows"
    items = Items()
    model = Model()
    for n in SIZES:
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
    "With heads of one shape, only the output with the correct head scores, for every metric and any order of heads"
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
                        metrics=output_metrics({n: makes() for n in names}, {n: [] for n in names}))
        with learn.no_bar(): vals = dict(zip(['valid_loss', *learn.metrics.attrgot('name')], learn.validate()))
        for n in names:
            for k,v in vals.items():
                if k.startswith(f'{n}_') and not k.endswith('_loss'): assert abs(v-(n==right))<1e-6, (right, k, v)
            assert (vals[f'{n}_loss']<1) == (n==right)

class Waits(TorchDispatchMode):
    "Collect the operations for which the CPU would have to wait on another device"
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
    metrics = output_metrics(None, USUAL)
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
    assert set(w.seen) >= {'index', '_local_scalar_dense'}    # the check can fail

def test_trackers_follow_the_better_direction(tmp_path):
    "`area_mae` rises with each epoch, so the first model is the best"
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
    exact = torch.autograd.grad(full, list(model.parameters()), retain_graph=True)
    half.backward()
    for p,g in zip(model.parameters(), exact): assert (p.grad-g).norm() < .03*g.norm()

def test_mixup_by_fastais_name():
    "fastai's `MixUp` works if all outputs can be blended, and raises an error if one cannot"
    kinds = ['kind','tags','area']
    class Some(Names):
        def before_batch(self):
            self.learn.yb = (Outputs.make({n: t for n,t in Y(flat(self.yb)).items() if n in kinds}),)
    items = Items()
    model = Model({n: SIZES[n] for n in kinds})
    dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
    lf = MultiLoss({n: l for n,l in losses().items() if n in kinds})
    learn = Learner(dls, model, lf, cbs=as_multi(MixUp()), metrics=output_metrics(None, {n: USUAL[n] for n in kinds}))
    learn.remove_cbs([CastToTensor, ProgressCallback])
    learn.add_cb(Some())
    fit(learn, 2)
    assert learn.loss_func is lf
    assert all(p.isfinite().all() for p in model.parameters())
    assert math.isfinite(columns(learn)['train_loss'])
    with pytest.raises(ValueError, match="MixUp cannot blend output 'box'"): fit(learner(cbs=MixUp()))

def test_export_keeps_losses_and_metrics(tmp_path):
    lf,ms = pickle.loads(pickle.dumps((MultiLoss(losses(), weights=dict(box=2.)), output_metrics(None, USUAL))))
    items = Items()
    model = Model()
    assert torch.allclose(lf(model(items.x), items.y),
                          MultiLoss(losses(), weights=dict(box=2.))(model(items.x), items.y))
    assert [m.name for m in ms] == [m.name for m in output_metrics(None, USUAL)]

def test_typed_predictions_and_targets():
    "A batch by hand has these types: `x,y = dls.one_batch(); learn.loss_func(learn.model(x), y)`"
    from fastai.torch_core import TensorCategory, TensorImage
    from fastai.vision.core import TensorBBox
    lf = MultiLoss(dict(a=CrossEntropyLossFlat(), b=MSELossFlat()))
    p = (torch.randn(4,3),torch.randn(4,1,4))
    t = (torch.tensor([0,1,2,0]),torch.randn(4,1,4))
    typed = lf(Outputs(a=TensorImage(p[0]), b=TensorImage(p[1])), Outputs(a=TensorCategory(t[0]), b=TensorBBox(t[1])))
    assert type(typed) is torch.Tensor and torch.equal(typed, lf(Outputs(a=p[0], b=p[1]), Outputs(a=t[0], b=t[1])))

# The meaning of an output does not depend on its loss

WEIGHTS = torch.tensor([1.,2.,5.])
CLASS_LOSSES = [
    CrossEntropyLossFlat(weight=WEIGHTS), CrossEntropyLossFlat(ignore_index=0), nn.CrossEntropyLoss(ignore_index=0),
    nn.CrossEntropyLoss(label_smoothing=.1, weight=WEIGHTS), nn.CrossEntropyLoss(reduction='sum'), nn.MultiMarginLoss(),
    FocalLoss(), FocalLossFlat(weight=WEIGHTS), LabelSmoothingCrossEntropy(weight=WEIGHTS),
    LabelSmoothingCrossEntropy(eps=.2), F.cross_entropy, partial(F.cross_entropy, weight=WEIGHTS),
    partial(F.cross_entropy, ignore_index=0, label_smoothing=.2), partial(F.cross_entropy, reduction='sum'),
    lambda p,t: F.cross_entropy(p, t, weight=WEIGHTS), lambda p,t: F.cross_entropy(p, t, reduction='none')]

@pytest.mark.parametrize('loss', CLASS_LOSSES, ids=lambda loss: re.sub(r' at 0x\w+', '', str(loss)))
def test_a_batch_with_all_labels_has_the_loss_itself(loss):
    g = torch.Generator().manual_seed(1)
    p = torch.randn(9, 3, generator=g, requires_grad=True)
    t = torch.tensor([0,1,2,2,1,0,0,1,2])
    own = loss(p, t).mean()
    holes = torch.cat([t, torch.full((4,), IGNORE)])
    both = torch.cat([p, torch.randn(4, 3, generator=g)])
    for pred,targ in ((p,t), (both,holes)):
        ours = MultiLoss(dict(kind=loss))(Outputs(kind=pred), Outputs(kind=targ))
        assert torch.allclose(ours, own, atol=1e-6)
        for a,b in zip(torch.autograd.grad(ours, p), torch.autograd.grad(own, p, retain_graph=True)):
            assert torch.allclose(a, b, atol=1e-6)

def test_probabilities_and_classes_whatever_the_loss():
    p = torch.randn(5, 3)
    given = dict(activations=dict(kind=partial(F.softmax, dim=-1)), decoders=dict(kind=partial(torch.argmax, dim=-1)))
    for loss in CLASS_LOSSES:
        lf = MultiLoss(dict(kind=loss), **given)
        act = lf.activation(Outputs(kind=p))
        assert torch.allclose(act.kind, p.softmax(-1)), loss
        assert torch.equal(lf.decodes(act).kind, p.argmax(-1)), loss

def regression_learner(metric, shape, bs=5):
    class Ds:
        def __len__(self): return 14
        def __getitem__(self, i): return torch.tensor([float(i)]), Outputs(n=TARGETS[i].view(shape))
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(.5))
        def forward(self, x): return Outputs(n=self.w*x+(x%3))                        # bs,1
    dls = DataLoaders(DataLoader(Ds(), bs=bs), DataLoader(Ds(), bs=bs))
    learn = Learner(dls, Half(), MultiLoss(dict(n=MSELossFlat())), metrics=output_metrics(dict(n=metric), dict(n=[])))
    learn.remove_cbs([CastToTensor, ProgressCallback])
    return learn

TARGETS = torch.rand(14, generator=torch.Generator().manual_seed(0))*9+1
PREDS = .5*torch.arange(14.)+torch.arange(14.)%3
def own_error(p, t): return (p-t).abs().max()
NEEDED = dict(MinkowskiDistance=[3], CriticalSuccessIndex=[5.])    # required arguments of metrics

@pytest.mark.parametrize('shape', [(), (1,)])
@pytest.mark.parametrize('metric', ['MeanAbsoluteError', 'MeanSquaredError', 'R2Score', 'PearsonCorrCoef',
                                    'SpearmanCorrCoef', 'KendallRankCorrCoef', 'ConcordanceCorrCoef',
                                    'ExplainedVariance', 'MeanAbsolutePercentageError', 'LogCoshError',
                                    'MeanSquaredLogError', 'NormalizedRootMeanSquaredError', 'RelativeSquaredError',
                                    'SymmetricMeanAbsolutePercentageError', 'TweedieDevianceScore',
                                    'WeightedMeanAbsolutePercentageError', 'MinkowskiDistance', 'CriticalSuccessIndex',
                                    'own'])
def test_a_number_has_one_shape_in_metrics(metric, shape):
    if metric=='own': make = lambda: own_error
    else: make = partial(getattr(torchmetrics.regression, metric), *NEEDED.get(metric, []))
    learn = regression_learner(make(), shape, bs=14 if metric=='own' else 5)
    with learn.no_logging(): got = float(learn.validate()[-1])
    assert abs(got-float(make()(PREDS, TARGETS))) < 1e-4

def test_loss_metrics_read_their_output():
    items = Items()
    model = Model()
    with torch.no_grad(): p = model(items.x)
    here = present(items.y.kind)
    want = F.cross_entropy(p.kind[here], items.y.kind[here])
    for bs in (24, 5):
        learn = learner(items, model, metrics=dict(kind=[Perplexity(), AvgLoss()], area=AvgLoss()), bs=bs)
        with learn.no_logging(): got = dict(zip(learn.metrics.attrgot('name'), learn.validate()[1:]))
        assert abs(got['kind_perplexity']-want.exp()) < 1e-4
        assert abs(got['kind_loss_2']-want) < 1e-5
        assert abs(got['area_loss_2']-got['area_loss']) < 1e-6

def test_class_weights_leave_the_plain_name_alone():
    items = Items()
    model = Model()
    with torch.no_grad(): right = (model(items.x).kind.argmax(1)==items.y.kind).float()
    here = present(items.y.kind)
    w = WEIGHTS[items.y.kind.clamp(min=0)]*here
    learn = learner(items, model)
    learn.metrics = output_metrics(dict(kind=accuracy), USUAL, class_weights=dict(kind=WEIGHTS))
    with learn.no_logging(): got = dict(zip(learn.metrics.attrgot('name'), learn.validate()[1:]))
    assert abs(got['kind_accuracy']-right[here].mean()) < 1e-6
    assert abs(got['kind_weighted_accuracy']-(right*w).sum()/w.sum()) < 1e-6
    assert got['kind_accuracy'] != got['kind_weighted_accuracy']

def test_total_loss_does_not_depend_on_the_batches():
    "The total is the weighted sum of the columns in validation and in training"
    items = Items()
    model = Model()
    seen = []
    for bs in (2, 7, 24):
        learn = learner(items, model, MultiLoss(losses(), weights=dict(kind=2., box=.5)), bs=bs)
        learn.remove_cb(Recorder)
        learn.add_cb(exact_losses(Recorder(train_metrics=True, add_time=False, beta=0.)))
        fit(learn, 1, lr=0.)
        cols = columns(learn)
        total = 2*cols['valid_kind_loss']+cols['valid_tags_loss']+cols['valid_area_loss']+.5*cols['valid_box_loss']
        assert abs(cols['valid_loss']-total) < 1e-5
        if bs==24: assert abs(cols['train_loss']-cols['valid_loss']) < 1e-4
        seen.append(cols['valid_loss'])
    assert max(seen)-min(seen) < 1e-5

def test_no_label_in_validation_is_no_best_loss():
    items = Items()
    empty = Items()
    for i,t in enumerate(empty.y): t[:] = IGNORE if i==0 else nan
    learn = learner(items)
    learn.dls = DataLoaders(DataLoader(items, bs=8), DataLoader(empty, bs=8))
    best = TrackerCallback()
    learn.add_cb(best)
    fit(learn, 2)
    assert math.isnan(columns(learn)['valid_loss'])
    assert best.best == math.inf and not best.new_best

def test_a_penalty_of_your_own_is_in_the_total_loss():
    class Penalised(MultiLoss):
        def __call__(self, pred, *targs): return super().__call__(pred, *targs)+3.
    items = Items()
    learn = learner(items, loss=Penalised(losses()))
    with learn.no_logging(): got = dict(zip(['valid_loss', *learn.metrics.attrgot('name')], learn.validate()))
    assert abs(got['valid_loss']-3-sum(got[f'{n}_loss'] for n in SIZES)) < 1e-4

def test_smoothed_loss_is_fastais_where_all_is_labelled():
    items = Items(holes=False)
    got = []
    for exact in (False, True):
        torch.manual_seed(0)
        learn = learner(items, Model())
        if not exact:
            learn.recorder.loss = AvgLoss()
            learn.recorder.smooth_loss = AvgSmoothLoss()
        fit(learn, 3)
        got.append(torch.stack(list(learn.recorder.losses)+[torch.tensor(v[1]) for v in learn.recorder.values]))
    assert torch.allclose(got[0], got[1], atol=1e-4)

# Item weights and mixtures are values

def test_weights_and_mixtures_survive_what_happens_to_a_batch():
    y = Items(n=6).y
    w = torch.arange(1., 7.)
    other = torch.tensor([5,4,3,2,1,0])
    mixed = mix_targets(weigh_items(y, w), weigh_items(y, w).map(lambda t: t[other]), torch.full((6,), .75))
    p = Model()(Items(n=6).x)
    want = MultiLoss(losses())(p, mixed)
    assert abs(want-MultiLoss(losses())(p, y)) > 1e-3
    for same in (mixed.map(lambda t: t.clone()), apply(lambda t: t+0, mixed), to_device((mixed,), 'cpu')[0],
                 pickle.loads(pickle.dumps(mixed)), copy.deepcopy(mixed)):
        assert same.keys() == y.keys() and isinstance(same, Outputs)
        assert torch.equal(item_weights((same,)), w)
        assert torch.equal(MultiLoss(losses())(p, same), want)
    rows = torch.tensor([4,1])
    few = mixed.map(lambda t: t[rows])
    assert torch.equal(item_weights(few), w[rows])
    assert torch.equal(item_weights(mixture(few)[0]), w[other][rows])

class Weighed(Names):
    "Name the outputs, and weigh each item by its area"
    def before_batch(self):
        y = Y(flat(self.yb))
        self.learn.yb = (weigh_items(y, y.area.nan_to_num().abs()+.5),)

def test_weights_are_gathered_with_the_targets():
    learn = learner(bs=7)
    learn.remove_cb(Names)
    learn.add_cb(Weighed())
    _,targs = learn.get_preds()
    assert torch.allclose(item_weights(targs), targs.area.nan_to_num().abs()+.5)
    assert len(item_weights(targs)) == 24
    assert type(plain_targets(targs)) is Y

def test_mixed_targets_keep_each_items_weight_in_training():
    "Under MixUp, the partner counts with its own weight"
    kinds = ['kind','area']
    class Some(Weighed):
        def before_batch(self):
            super().before_batch()
            w = item_weights(self.yb)
            self.learn.yb = (weigh_items(Outputs.make({n: self.yb[0][n] for n in kinds}), w),)
    seen = []
    class Check(Callback):
        order = 9.8
        run_valid = False
        def before_batch(self):
            other,share = mixture(self.yb)
            assert torch.allclose(item_weights(other), other.area.nan_to_num().abs()+.5)
            seen.append(share)
    items = Items()
    dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
    lf = MultiLoss({n: l for n,l in losses().items() if n in kinds})
    learn = Learner(dls, Model({n: SIZES[n] for n in kinds}), lf, cbs=[as_multi(MixUp()), Check()])
    learn.remove_cbs([CastToTensor, ProgressCallback])
    learn.add_cb(Some())
    fit(learn, 2)
    assert len(seen) == 6 and all((s<1).any() for s in seen)

def test_mixup_and_cutmix_together_are_refused():
    learn = learner(loss=MultiLoss(dict(kind=CrossEntropyLossFlat())))
    for cb in (as_multi(MixUp()), as_multi(CutMix())): learn.add_cb(cb)
    with pytest.raises(ValueError, match='both blend the batch'): fit(learn)
