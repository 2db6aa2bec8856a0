"""Weighting callbacks and early stopping of single outputs on a real `MultiLearner`, with everything else that a fit
does and everything that can end it"""
import pickle, warnings
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.vision.all import *
from fastai.callback.all import *
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tensorboard import TensorBoardCallback
import random
from fastai_multi import *
from fastai_multi.callback.weights import *
from fastai_multi.targets import mixture
from fastai_multi.callback.learned import *
from fastai_multi.callback.stopping import *

METHODS = dict(fixed=lambda: FixedWeights(box=2.), scheduled=lambda: ScheduledWeights(box=SchedLin(1,5)),
               random=lambda: RandomWeighting(3), dwa=DynamicWeightAverage, geometric=GeometricMean,
               uncertainty=UncertaintyWeighting, closed=lambda: UncertaintyWeighting(closed_form=True),
               gradnorm=GradNorm, famo=lambda: FAMO(every=1))
every_method = pytest.mark.parametrize('method', METHODS)
torch.set_num_threads(1)
OUTPUTS = dict(kind=CategoryBlock, box=BBoxBlock, area=RegressionBlock)

@pytest.fixture(scope='module')
def holes(shapes, tmp_path_factory):
    "The drawn set, in which half of the kinds and a third of the areas are unlabelled"
    path = tmp_path_factory.mktemp('holes')
    df = pd.read_csv(shapes/'items.csv')
    df.loc[df.index%2==0, 'kind'] = np.nan
    df.loc[df.index%3==0, 'area'] = np.nan
    df['file'] = [str(shapes/f) for f in df.file]
    df.to_csv(path/'items.csv', index=False)
    return path

def loaders(path, outputs=OUTPUTS, **kwargs):
    columns = None
    if not isinstance(outputs, dict): columns = 'kind'
    elif 'box' in outputs: columns = dict(box=['x1','y1','x2','y2'])
    return MultiDataLoaders.from_csv(path, 'items.csv', image='file', outputs=outputs, columns=columns,
                                     item_tfms=Resize(32), **{**dict(bs=16, num_workers=0, seed=0), **kwargs})

def learner(dls, cbs=None, **kwargs):
    torch.manual_seed(0)
    learn = multi_learner(dls, kwargs.pop('arch', simple_cnn(depth=2, width=8)), cbs=cbs, **{'lr':3e-3, **kwargs})
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(learn, n=1, **kwargs):
    torch.manual_seed(1)
    learn.dls.train.rng = random.Random(1)
    learn.fit(n, **kwargs)
    return learn

def same(a, b):
    return (a.keys()==b.keys()
            and all(torch.equal(v.nan_to_num(-1.), b[k].nan_to_num(-1.)) for k,v in a.items()))
def params(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def hooks(model): return sum(len(m._forward_hooks) for m in model.modules())

def left_behind(learn):
    "Everything that a callback could have changed"
    opt = learn.opt
    lf = learn.loss_func
    names = {id(p): n for n,p in learn.model.named_parameters()}
    return dict(loss=type(lf), weights=dict(lf.weights), reduction=lf.reduction,
                groups=[[names[id(p)] for p in g] for g in opt.param_lists], hypers=[sorted(h) for h in opt.hypers],
                requires_grad={n: p.requires_grad for n,p in learn.model.named_parameters()},
                has_grad={n: p.grad is not None for n,p in learn.model.named_parameters()}, hooks=hooks(learn.model),
                metrics=learn.metrics.attrgot('name'), cbs=[type(cb).__name__ for cb in learn.cbs])

# Training

@every_method
def test_trains_with_missing_labels_and_reports_the_same_losses(holes, method):
    learn = fit(learner(loaders(holes), [METHODS[method](), ShowWeights()]), 2)
    assert params(learn).isfinite().all()
    names = learn.recorder.metric_names
    assert names[-4:-1] == ['kind_weight','box_weight','area_weight']
    assert all(len(v)==len(names)-2 for v in learn.recorder.values)
    row = dict(zip(names[1:-1], learn.recorder.values[-1]))
    # your own weights multiply losses on the scale of their priors
    scales = learn.loss_func.scales
    assert row['valid_loss']==pytest.approx(sum(row[f'{o}_loss']*scales.get(o, 1) for o in OUTPUTS), rel=.05)
    assert all(0<row[f'{o}_weight']<1e4 for o in OUTPUTS)
    assert learn.evaluate()['valid_loss']==pytest.approx(row['valid_loss'], rel=1e-4)

def test_the_same_step_as_weights_of_the_loss(holes):
    dls = loaders(holes)
    a = fit(learner(dls, FixedWeights(box=3., kind=.5)))
    b = fit(learner(dls, loss_weights=dict(box=3., kind=.5)))
    assert torch.equal(params(a), params(b))
    c = fit(learner(dls, FixedWeights(box=1.5), loss_weights=dict(box=2., kind=.5)))
    assert torch.equal(params(c), params(b)) and c.loss_func.weights['box']==2.

@every_method
@pytest.mark.parametrize('outputs', [dict(kind=CategoryBlock), CategoryBlock], ids=['named','plain'])
def test_one_output_is_plain_training(shapes, method, outputs):
    if method in ('fixed','scheduled'): cb = type(METHODS[method]())()
    else: cb = METHODS[method]()
    dls = loaders(shapes, outputs)
    assert torch.equal(params(fit(learner(dls, cb))), params(fit(learner(dls))))

def test_one_plain_loss_is_refused_in_words(shapes):
    learn = learner(loaders(shapes, CategoryBlock), UncertaintyWeighting(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(TypeError, match='UncertaintyWeighting needs the loss of each output'): learn.fit(1)
    learn = learner(loaders(shapes, CategoryBlock), TaskEarlyStopping(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(TypeError, match='TaskEarlyStopping needs the loss of each output'): learn.fit(1)

def test_two_at_once_are_refused(shapes):
    learn = learner(loaders(shapes), [GradNorm(), ShowWeights()])
    with pytest.raises(ValueError, match='(GradNorm and FAMO)|(FAMO and GradNorm)'): learn.fit(1, cbs=FAMO())
    fit(learn)                                              # the second callback is removed

# With other callbacks

@every_method
@pytest.mark.parametrize('cbs',
                         [lambda: [GradientAccumulation(32)], lambda: [GradientAccumulation(32), GradientClip(.1)]],
                         ids=['accumulation','and clip'])
def test_accumulation_and_clipping(holes, method, cbs):
    "Two batches make one step, and the norm of its gradient is at most the clip"
    steps = Steps()
    learn = fit(learner(loaders(holes), [METHODS[method](), *cbs(), steps]))
    assert len(learn.dls.train)==4 and len(steps.norms)==2
    if len(cbs())==2: assert steps.norms==pytest.approx([.1, .1], rel=1e-3)
    else: assert min(steps.norms)>.1

class Steps(Callback):
    "The gradient norm of every step"
    order = 50
    def before_fit(self): self.norms = []
    def before_step(self):
        grads = [p.grad.flatten() for p in self.learn.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(grads).norm()))

def test_accumulated_weights_act_once(shapes):
    "Accumulating two halves of a batch gives the step of the whole batch"
    res = []
    for bs,cbs in ((16, []), (8, [GradientAccumulation(16)])):
        dls = loaders(shapes, bs=bs, valid_pct=.2)
        dls.loaders[0] = dls.train.new(shuffle=False, drop_last=False)
        torch.manual_seed(0)
        learn = learner(dls, [FixedWeights(box=7.), *cbs], opt_func=SGD, arch=simple_cnn(depth=1, width=4))
        for m in learn.model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()
                m.train = lambda mode=True, m=m: m
            if isinstance(m, nn.Dropout): m.p = 0.
        res.append(params(fit(learn)))
    torch.testing.assert_close(*res, rtol=1e-4, atol=1e-5)

@every_method
def test_fastais_mixed_precision_on_the_cpu(holes, method):
    "On a CPU fastai's autocast warns and does nothing, but all its events run"
    dls = loaders(holes)
    plain = fit(learner(dls, METHODS[method]()))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = fit(learner(dls, METHODS[method]()).to_fp16())
    torch.testing.assert_close(params(learn), params(plain), atol=1e-6, rtol=1e-5)

class CpuBf16(Callback):
    "Real bfloat16, instead of `MixedPrecision`"
    order = MixedPrecision.order
    def before_fit(self): self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)
    def before_batch(self): self.autocast.__enter__()
    def after_pred(self): self.learn.pred = to_float(self.pred)
    def after_loss(self): self.autocast.__exit__(None, None, None)
    @property
    def name(self): return 'mixed_precision'

@every_method
def test_bfloat16(holes, method):
    a,b = (fit(learner(loaders(holes), [METHODS[method](), Weights(), *cbs]), 2) for cbs in ([], [CpuBf16()]))
    assert params(b).isfinite().all() and not torch.equal(params(a), params(b))
    torch.testing.assert_close(b.weights.ws[0], a.weights.ws[0], rtol=.1, atol=.05)

class Weights(Callback):
    "The weights of every step"
    order = 70
    run_valid = False
    def __init__(self): self.ws = []
    def after_batch(self):
        balancer = first(cb for cb in self.learn.cbs if isinstance(cb, Balancer))
        self.ws.append(torch.stack([torch.as_tensor(w) for w in balancer.weights.values()]))

@every_method
def test_freezing_and_rates_of_the_model_are_not_touched(shapes, method):
    dls = loaders(shapes)
    plain,learn = (learner(dls, cbs, arch=simple_cnn(depth=3, width=8)) for cbs in (None, METHODS[method]()))
    assert len(learn.splitter(learn.model))>2
    for l in (plain, learn):
        l.freeze()
        fit(l, lr=slice(1e-3))
    assert left_behind(learn)['requires_grad']==left_behind(plain)['requires_grad']
    for l in (plain, learn):
        l.unfreeze()
        l.fit_one_cycle(1, slice(1e-5, 1e-3))
    assert learn.opt.hypers.attrgot('lr')==plain.opt.hypers.attrgot('lr')
    assert left_behind(learn)['groups']==left_behind(plain)['groups']
    for p in learn.model.encoders.parameters(): p.requires_grad_(False)
    still = [p.detach().clone() for p in learn.model.encoders.parameters()]
    before = params(learn)
    fit(learn)
    assert all(torch.equal(a, b) for a,b in zip(still, learn.model.encoders.parameters()))
    assert not torch.equal(before, params(learn))
    learn.fine_tune(1)

def test_mixup_and_weights(shapes):
    "The loss of a blended batch is the weighted sum of the outputs' blended losses"
    seen = []
    class Watch(Callback):
        order = 70
        run_valid = False
        def after_loss(self):
            _,share = mixture(self.yb)
            values = torch.stack([v.detach() for v in self.loss_func.losses.values()])
            by_hand = float((step_weights(self.learn)*values).sum())
            seen.append((float(self.learn.loss_grad.detach()), by_hand, float(share.min())))
    fit(learner(loaders(shapes, dict(kind=CategoryBlock, area=RegressionBlock)), [RandomWeighting(3), MixUp(), Watch()]))
    assert len(seen)==4 and min(share for *_,share in seen)<.99
    for total,by_hand,_ in seen: assert total==pytest.approx(by_hand, rel=1e-4)

# All ways to end a fit

class Bang(Callback):
    "Raise an exception in the given event of the second training batch"
    order = 30
    run_valid = False
    def __init__(self, event, e):
        self.e = e
        setattr(self, event, self._raise)
    def _raise(self):
        if self.learn.train_iter==1: raise self.e

ENDINGS = [CancelBatchException(), CancelFitException(), RuntimeError('bang')]

@pytest.mark.parametrize('event', ['before_batch','after_loss','after_backward','before_step','after_step'])
@pytest.mark.parametrize('e', ENDINGS, ids=lambda e: type(e).__name__)
def test_nothing_is_left_behind_however_a_fit_ends(shapes, event, e):
    def _after(cbs):
        learn = learner(dls, loss_weights=dict(box=2.))
        try: learn.fit(1, cbs=[Bang(event, e), *cbs])
        except RuntimeError: pass
        # a hook whose only call an error prevented is removed now
        with torch.no_grad(): learn.model.eval()(dls.valid.one_batch()[0])
        return left_behind(learn)
    dls = loaders(shapes)
    plain = _after([])
    for n,m in METHODS.items(): assert _after([m(), TaskEarlyStopping(1), ShowWeights()])==plain, n

def test_a_crash_inside_the_trunk_leaves_no_hook_that_lives(shapes):
    learn = learner(loaders(shapes))
    class Once(Exception): pass
    def boom(*a): raise Once
    h = first(learn.model.encoders.values()).register_forward_pre_hook(boom)
    with pytest.raises(Once): learn.fit(1, cbs=GradNorm())
    h.remove()
    learn.validate()
    assert hooks(learn.model)==0
    pickle.dumps(learn.model)

# Fit again, save, load, export

@every_method
def test_fit_twice_lr_find_fine_tune(shapes, method, tmp_path):
    learn = fit(learner(loaders(shapes), METHODS[method](), path=tmp_path))
    cb = first(o for o in learn.cbs if isinstance(o, Balancer))
    before = {k: v.clone() for k,v in cb.state.items()}
    ps = params(learn)
    assert 1e-8 < learn.lr_find(num_it=6, show_plot=False).valley < 11
    assert torch.equal(ps, params(learn))
    learn.validate()                                        # like any use of the learner, this applies the loaded state
    assert same(before, cb.state)
    fit(learn)
    learn.fine_tune(1, freeze_epochs=1)
    fit(learn, reset_opt=True)
    assert params(learn).isfinite().all()
    if before: assert not same(before, cb.state)

OPTS = dict(Adam=Adam, ranger=ranger, AdamW=partial(OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('method,opt',
                         [(m, 'Adam') for m in METHODS] + [('uncertainty', 'ranger'), ('uncertainty', 'AdamW'),
                                                           ('famo', 'AdamW')])
def test_saved_and_loaded_with_the_learner(shapes, method, opt, tmp_path):
    opt_func = OPTS[opt]
    dls = loaders(shapes)
    learn = fit(learner(dls, METHODS[method](), path=tmp_path, opt_func=opt_func), 3)
    cb = first(o for o in learn.cbs if isinstance(o, Balancer))
    learn.save('it')
    new = learner(dls, METHODS[method](), path=tmp_path, opt_func=opt_func).load('it')
    new.validate()
    got = first(o for o in new.cbs if isinstance(o, Balancer)).state
    assert same(cb.state, got)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        # a learner without the callback can load the file too
        plain = learner(dls, path=tmp_path, opt_func=opt_func).load('it')
    fit(plain)
    plain.save('plain')
    fit(new.load('plain'))

@every_method
def test_export(shapes, method, tmp_path):
    learn = fit(learner(loaders(shapes), [METHODS[method](), ShowWeights(), TaskEarlyStopping()], path=tmp_path))
    row = pd.read_csv(shapes/'items.csv').iloc[0]
    twin = deepcopy(learn)
    learn.export()
    new = load_learner(tmp_path/'export.pkl')
    cb,old = (first(o for o in l.cbs if isinstance(o, Balancer)) for l in (new, learn))
    assert same(cb.state, old.state)
    for n,p in learn.predict(row)[2].items(): torch.testing.assert_close(new.predict(row)[2][n], p)
    assert torch.equal(params(fit(learn)), params(fit(twin)))     # it continues as if it had not been exported

@every_method
def test_a_copy_predicts_and_goes_on(shapes, method):
    learn = fit(learner(loaders(shapes), [METHODS[method](), ShowWeights(), TaskEarlyStopping()]))
    new = deepcopy(learn)
    row = pd.read_csv(shapes/'items.csv').iloc[0]
    for n,p in learn.predict(row)[2].items(): torch.testing.assert_close(new.predict(row)[2][n], p)
    assert same(balancer(new).state, balancer(learn).state) and balancer(new).state is not balancer(learn).state
    assert torch.equal(params(fit(new)), params(fit(learn)))

def test_a_plain_loss_in_prediction_is_no_mistake(shapes):
    learn = fit(learner(loaders(shapes, CategoryBlock), [UncertaintyWeighting(), ShowWeights(), TaskEarlyStopping()]))
    learn.loss_func = CrossEntropyLossFlat()
    learn.remove_cb(Recorder)
    assert len(learn.get_preds()[0])==len(learn.dls.valid_ds)

# One object for several learners

def balancer(learn): return first(cb for cb in learn.cbs if isinstance(cb, Balancer))

@every_method
@pytest.mark.parametrize('opt', ['Adam','AdamW'])
def test_one_object_for_several_learners_starts_afresh(shapes, method, opt):
    cb = METHODS[method]()
    folds = [loaders(shapes, seed=k) for k in range(2)]
    for dls in folds:
        fresh = fit(learner(dls, METHODS[method](), opt_func=OPTS[opt]), 2)
        again = fit(learner(dls, cb, opt_func=OPTS[opt]), 2)
        assert torch.equal(params(again), params(fresh)) and same(cb.state, balancer(fresh).state)
    for dls in folds:
        fresh = fit(learner(dls, METHODS[method](), opt_func=OPTS[opt]), 2)
        assert torch.equal(params(fit(learner(dls, opt_func=OPTS[opt]), 2, cbs=cb)), params(fresh))

@every_method
def test_the_learner_that_lost_its_callback_to_another_says_so(shapes, method):
    cb = METHODS[method]()
    a,b = (learner(loaders(shapes), [cb]) for _ in range(2))
    with pytest.raises(ValueError, match='was also added to another learner'): fit(a)
    fit(b)
    a.get_preds()

@pytest.mark.parametrize('every', [3, 5])
def test_famo_resumes_exactly(shapes, every, tmp_path):
    dls = loaders(shapes)
    learn = fit(learner(dls, FAMO(every=every), path=tmp_path))
    assert len(dls.train)%every!=0
    learn.save('it')
    new = learner(dls, FAMO(every=every), path=tmp_path).load('it')
    for l in (learn, new): fit(l, 2)
    assert torch.equal(params(learn), params(new)) and same(balancer(learn).state, balancer(new).state)
    assert balancer(new).count==3*len(dls.train)

# Your own loss terms

def penalty_of(pred): return sum(p.float().pow(2).mean() for p in pred)

class Penalised(MultiLoss):
    "A penalty in a subclass"
    def __call__(self, pred, *targs): return super().__call__(pred, *targs) + penalty_of(pred)

class Penalty(Callback):
    "A penalty from a callback"
    run_valid = False
    def __init__(self, order, in_place): store_attr()
    def after_loss(self):
        if self.in_place: self.learn.loss_grad += penalty_of(self.pred)
        else: self.learn.loss_grad = self.loss_grad + penalty_of(self.pred)

class Grads(Callback):
    "The gradients of the first step, by parameter"
    order = -20
    def before_step(self):
        if self.train_iter: return
        self.found = {n: p.grad.clone() for n,p in self.model.named_parameters() if p.grad is not None}

def first_gradients(dls, cbs, change=noop, **kwargs):
    grads = Grads()
    fit(change(learner(dls, [*cbs, grads], opt_func=SGD, **kwargs)))
    return grads.found

def penalised(learn):
    scales = learn.loss_func.scales
    learn.loss_func = Penalised(learn.loss_func.funcs, dict(learn.loss_func.weights))
    learn.loss_func.scales = scales
    return learn

@pytest.mark.parametrize('method', [None, *METHODS])
def test_loss_terms_of_ones_own_add_their_gradient(holes, method):
    "The first step with a penalty minus the step without it is the same for every method, and is not zero"
    dls = loaders(holes, bs=32)
    def _first(*cbs, change=noop, method=method):
        if method: cbs = (*cbs, METHODS[method]())
        return first_gradients(dls, cbs, change, loss_weights=dict(area=2.))
    with_penalty,without = _first(change=penalised, method=None),_first(method=None)
    extra = {n: g-without[n] for n,g in with_penalty.items()}
    assert sum(g.norm() for g in extra.values())>.1
    plain = _first()
    steps = [_first(change=penalised)]
    steps += [_first(Penalty(order, in_place)) for order in (-20,0) for in_place in (False,True)]
    for step in steps:
        for n,g in step.items(): torch.testing.assert_close(g-plain[n], extra[n], atol=1e-4, rtol=1e-3)

def test_an_output_that_stopped_leaves_loss_terms_of_ones_own(shapes):
    class Now(TaskEarlyStopping):
        "Mute the output `kind` from the start"
        def before_train(self): self.muted = {'kind'}
    dls = loaders(shapes)
    got = first_gradients(dls, [Now()], penalised)
    want = first_gradients(dls, [], penalised, loss_weights=dict(kind=0.))
    assert want.keys()-got.keys()=={n for n in want if n.startswith('heads.kind')}
    for n,g in got.items(): torch.testing.assert_close(g, want[n], atol=1e-5, rtol=1e-4)

def test_log_variances_go_on_with_a_new_optimizer(shapes):
    cb = UncertaintyWeighting()
    learn = fit(learner(loaders(shapes), cb))
    s = cb.state['log_vars'].clone()
    fit(learn, 0, reset_opt=True)
    assert torch.equal(cb.state['log_vars'], s)
    learn.opt.clear_state()
    fit(learn, 0)
    assert torch.equal(cb.state['log_vars'], s)

def test_loggers_see_the_columns(shapes, tmp_path):
    learn = learner(loaders(shapes), [UncertaintyWeighting(), ShowWeights()], path=tmp_path)
    fit(learn, 2, cbs=[CSVLogger(), TensorBoardCallback(tmp_path/'tb', trace_model=False, log_preds=False)])
    df = pd.read_csv(tmp_path/'history.csv')
    assert {'kind_weight','box_weight','area_weight'} <= set(df.columns) and df.box_weight.between(.1, 10).all()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    ea = EventAccumulator(str(tmp_path/'tb'))
    ea.Reload()
    assert 'box_weight' in ea.Tags()['scalars']

# No waiting for the device

class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ('_local_scalar_dense','nonzero','masked_select','is_nonzero')
        assert not any(o in str(func) for o in waits), f'{func} waits for the device'
        return func(*args, **(kwargs or {}))

@every_method
def test_no_number_is_asked_for_in_a_step(shapes, method, monkeypatch):
    cb = METHODS[method]()
    n = []
    for ev in ('before_batch','after_loss','after_step'):
        f = getattr(cb, ev, None)
        if not callable(f): continue
        def _run(f=f):
            n.append(ev)
            with NoSync(): f()
        object.__setattr__(cb, ev, _run)
    fit(learner(loaders(shapes), cb), 3)
    assert n

# Comparison with TorchJD

def test_the_same_as_torchjds_scalarizers():
    tj = pytest.importorskip('torchjd.scalarization')
    g = torch.Generator().manual_seed(0)
    seq = [torch.rand(3, generator=g)+.1 for _ in range(12)]
    def weights(f, v):                                      # the gradient of the scalarizer with respect to the losses
        v = v.clone().requires_grad_()
        return torch.autograd.grad(f(v), v)[0]
    ones = torch.ones(3)
    for v in seq:
        a,b = GeometricMean().weigh(v, ones),weights(tj.GeometricMean(), v)
        torch.testing.assert_close(a/a.sum(), b/b.sum())
    cb = UncertaintyWeighting(lr=.02)
    uw = tj.UW(3)
    cb.state = {}
    opt = torch.optim.Adam(uw.parameters(), lr=.02)
    for v in seq:
        torch.testing.assert_close(cb.weigh(v, ones), 2*weights(uw, v))
        opt.zero_grad()
        (2*uw(v)).backward()
        opt.step()
    cb = DynamicWeightAverage()
    dwa = tj.DWA(2.)
    cb.state = {}
    for epoch in range(4):
        cb.before_train()
        for v in seq[epoch*3:epoch*3+3]: torch.testing.assert_close(cb.weigh(v, 5*ones), weights(dwa, v))
        cb.after_train()
        dwa.step()
    cb = FAMO()
    famo = tj.FAMO(3)
    cb.state = {}
    for v,after in zip(seq, seq[1:]):
        torch.testing.assert_close(cb.weigh(v, ones), 3*weights(famo, v), rtol=1e-4, atol=1e-5)
        cb.learn_shares(v, after, ones.bool())
        famo.update(after)

# Early stopping

@pytest.mark.parametrize('method', [None, *METHODS])
def test_a_stopped_output_no_longer_moves(shapes, method):
    class Now(TaskEarlyStopping):
        "`box` stops after the first epoch"
        def after_epoch(self):
            if not self.fresh and 'box' not in self.stopped:
                self._keep('box')
                self.best['box'].update(1., self.epoch)
                self._stop('box')
    stop = Now()
    learn = learner(loaders(shapes), [stop, ShowWeights(), *([METHODS[method]()] if method else [])], wd=.1)
    class Keep(Callback):
        order = 70
        def after_epoch(self):
            self.learn.ws.append({n: torch.cat([p.detach().flatten() for p in self.model.owned_parameters(n)])
                                  for n in OUTPUTS})
    learn.ws = []
    learn.fit(3, cbs=Keep())
    assert torch.equal(learn.ws[0]['box'], learn.ws[2]['box'])
    assert not torch.equal(learn.ws[0]['kind'], learn.ws[2]['kind'])
    assert stop.stopped==dict(box=0)
    assert all(p.requires_grad for p in learn.model.parameters())
    assert learn.loss_func.weights['box']==1.
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['box_weight']==0 and row['kind_weight']>0 and row['box_loss']>0

def test_early_stopping_by_metric_with_best_state(shapes, capsys):
    stop = TaskEarlyStopping(1, monitor=dict(kind='accuracy', box='box_iou'), keep_best=True, min_delta=2.)
    learn = fit(learner(loaders(shapes), stop), 8)
    assert stop.best['kind'].sign==-1 and stop.stopped['kind']==1 and stop.stopped['box']==1
    assert 'Epoch 1: kind stopped, kind_accuracy was best in epoch 0' in capsys.readouterr().out
    assert len(learn.recorder.values)<=8
    was = dict(stop.stopped)
    learn.validate()
    learn.get_preds()
    assert stop.stopped==was
    learn = fit(learner(loaders(shapes, CategoryBlock), TaskEarlyStopping(1, min_delta=1e3)), 6)
    assert len(learn.recorder.values)==2
