"Gradient methods, the task monitor and the report: their mathematical laws, and the training around them"
import os, subprocess, sys, textwrap
import pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai.callback.all import *
from fastai.callback.fp16 import AMPMode
from torch.amp import GradScaler, autocast
from fastai_multi import *
from fastai_multi.callback.weights import *
from fastai_multi.callback.shared import *
from fastai_multi.callback.aggregators import *
from fastai_multi.callback.gradients import *
from fastai_multi.callback.monitor import *
from fastai_multi.compare import *
from fastai_multi.report import *

LEVELS = ('features','parameters')
OUTPUTS = dict(kind=CategoryBlock, colour=CategoryBlock, area=RegressionBlock)

class Two(nn.Module):
    "A trunk and a linear head for each output"
    def __init__(self, names):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 1) for _ in names])
        self.names = names
    def forward(self, x):
        f = self.trunk(x)
        return Outputs.of(*self.names)([h(f)[:,0] for h in self.heads])
    def shared_points(self): return [self.trunk]
    def shared_parameters(self): return list(self.trunk.parameters())
    def owned_parameters(self, n): return list(self.heads[self.names.index(n)].parameters())

class Scaled:
    "The squared error times a factor"
    def __init__(self, k=1.): self.k = k
    def __call__(self, p, t): return self.k*(p-t)**2

def _sum(x): return x.sum()
def _against(x): return -3*x.sum()
def _max(x): return x.amax()

class Keep(Callback):
    "Record the gradients that the optimizer gets, and each output's own gradient at the shared parameters"
    order = -20
    def before_fit(self):
        self.steps = []
        self.rows = []
    def after_loss(self):
        if self.training:
            self.rows.append(task_gradients(self.learn.loss_func.live,
                                            [p for p in self.model.shared_parameters() if p.requires_grad]))
    def before_step(self):
        self.steps.append([None if p.grad is None else p.grad.clone() for p in self.model.parameters()])

def toy(cbs=None, fs=(_sum, _against, _max), scale=None, weights=None, holes=(), net=None, n=32, bs=8, **kwargs):
    torch.manual_seed(0)
    names = tuple('abcde'[:len(fs)])
    x = torch.randn(n, 4)
    ys = [torch.stack([f(o) for o in x]) for f in fs]
    for i,j in holes: ys[i][j] = math.nan
    items = list(zip(x, *ys))
    dls = DataLoaders(DataLoader(items, bs=bs, num_workers=0), DataLoader(items[:8], bs=8, num_workers=0))
    dls.n_inp = 1
    loss = MultiLoss({o: Scaled((scale or {}).get(o, 1.)) for o in names}, weights)
    return Learner(dls, deepcopy(net) if net else Two(names), loss, **{'lr':.05, 'opt_func':SGD, 'cbs':cbs, **kwargs})

def fit(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)
    return learn

def params(learn): return torch.cat([p.detach().view(-1) for p in learn.model.parameters()])
def flat_grads(gs): return torch.cat([g.view(-1) for g in gs if g is not None])

def multi(data, outputs=OUTPUTS, cbs=None, **kwargs):
    torch.manual_seed(0)
    dls = MultiDataLoaders.from_csv(data, 'items.csv', image='file', outputs=outputs, seed=0, bs=16, num_workers=0,
                                    item_tfms=Resize(32))
    learn = multi_learner(dls, simple_cnn(depth=3), cbs=cbs, **{'lr':3e-3, **kwargs})
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    dls.train.rng.seed(0)
    return learn

@pytest.mark.parametrize('level', LEVELS)
def test_an_output_that_stops_early_leaves_the_balance(level):
    "After `b` stops, its head does not change, and the trunk trains with the two other outputs"
    class Heads(Callback):
        order = 60
        def before_fit(self): self.at = []
        def after_epoch(self): self.at.append([h.weight.detach().clone() for h in self.model.heads])
    stop = TaskEarlyStopping(patience=1, min_delta=0.)
    heads = Heads()
    keep = Keep()
    stop._value = lambda n: 1. if n=='b' else -float(stop.epoch)             # `b` does not improve
    learn = fit(toy([GradientBalance('upgrad', level), stop],
                    opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))),
                4, cbs=[heads, keep])
    assert stop.stopped==dict(b=1)
    assert learn.gradient_balance.last_weights[1]==0
    assert (learn.gradient_balance.last_weights[[0,2]]>0).all()
    a,b,c = zip(*heads.at)
    assert torch.equal(b[1], b[3]) and not torch.equal(a[1], a[3]) and not torch.equal(c[1], c[3])
    step = flat_grads(keep.steps[-1][:2])
    J = keep.rows[-1]
    w = learn.gradient_balance.last_weights
    torch.testing.assert_close(step, J[[0,2]].T@w[[0,2]], atol=1e-4, rtol=1e-3)      # only a's and c's gradients

def test_rows_are_kept_from_one_step_to_the_next_and_no_longer():
    class Look(Callback):
        order = 60
        def before_fit(self):
            self.before = []
            self.after = []
        def before_batch(self): self.before.append(self.learn.gradient_balance.kept is not None)
        def before_backward(self): self.after.append(self.learn.gradient_balance.kept is not None)
        def after_batch(self):
            if self.training:
                assert all(g is None or g is not p.grad for gs in self.learn.gradient_balance.kept
                           for g,p in zip(gs, self.model.shared_parameters()))
    look = Look()
    learn = fit(toy(GradientBalance('upgrad', 'parameters')), cbs=look)
    assert look.before==[False,True,True,True,False] and not any(look.after) and learn.gradient_balance.kept is None
    class Crash(Callback):
        def before_step(self): raise CancelFitException()
    assert fit(toy(GradientBalance('upgrad', 'parameters')), cbs=Crash()).gradient_balance.kept is None

# Laws

class Double(Callback):
    "Compute in double precision, so that rounding does not look like a difference"
    order = 20
    def before_batch(self): self.learn.xb = (self.xb[0].double(),)
    def after_loss(self): self.learn.loss = self.loss.float()          # `Recorder` cannot mix precisions

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('kw',
                         [dict(), dict(depth=dict(kind=2)), dict(split=2), dict(split=0),
                          dict(after=dict(colour='kind'))],
                         ids=['shared','depths','split','nothing shared','after'])
def test_sum_is_plain_backward(shapes, level, kw):
    grads = []
    for cb in (None, GradientBalance('sum', level), GradientBalance('mean', level)):
        keep = Keep()
        learn = multi(shapes, **kw, heads={n: dict(p=0.) for n in OUTPUTS})
        learn.model.double()
        keep.after_loss = noop
        torch.manual_seed(1)
        learn.dls.train.rng.seed(0)
        with learn.no_bar(): learn.fit(1, cbs=[keep, Double()]+L(cb))
        grads.append(keep.steps[0])
    for a in grads[1:]:
        for g,h in zip(grads[0], a):
            if h is None: assert g is None or not g.any()
            elif g is None: assert not h.any()
            else: assert (g-h).abs().max() < 1e-6

@pytest.mark.parametrize('level', LEVELS)
def test_one_output_is_plain_training_bitwise(level, shapes):
    assert torch.equal(params(fit(toy(GradientBalance('upgrad', level), fs=[_sum]), 2)), params(fit(toy(fs=[_sum]), 2)))
    a,b = (fit(multi(shapes, dict(kind=CategoryBlock), cbs)) for cbs in (GradientBalance(level=level), None))
    assert torch.equal(params(a), params(b))

# the last two need a solver: torchjd[full]
METHODS = ('upgrad','mgda','pcgrad','gradvac','alignedmtl','imtlg','dualproj','sum','mean','cagrad','nashmtl')

@pytest.mark.parametrize('name', METHODS)
def test_equal_tasks_get_equal_weights_and_order_does_not_matter(name):
    w = GramianWeights(name, 3, {})(torch.ones(3,3)*7)
    # Nash-MTL solves w*(G@w)=1, so three equal gradients share one step of length sqrt(3)
    torch.testing.assert_close(w, torch.full((3,), 3**-.5 if name=='nashmtl' else 1.), atol=1e-3, rtol=0)
    torch.manual_seed(0)
    J = torch.randn(4, 50) + torch.tensor([1.,-1.,.5,.2])[:,None]*torch.randn(50)
    order = [2,0,3,1]
    a,b = (GramianWeights(name, 4, {}) for _ in range(2))
    if name in ('pcgrad','gradvac'):        # these draw the order at random, so take the mean over draws
        a,b = (lambda g, f=f: torch.stack([_fresh(f.name, 4)(g) for _ in range(300)]).mean(0) for f in (a,b))
    tol = .05 if name in ('pcgrad','gradvac') else 1e-3
    torch.testing.assert_close(a(J@J.T)[order], b(J[order]@J[order].T), atol=tol, rtol=tol)

def _fresh(name, n): return GramianWeights(name, n, {})

@pytest.mark.parametrize('name', METHODS)
def test_scale_of_all_losses_changes_no_weight(name):
    torch.manual_seed(0)
    J = torch.randn(3, 20)
    ws = []
    for k in (1., 1e-6, 65536.):
        torch.manual_seed(1)
        ws.append(_fresh(name, 3)((k*J)@(k*J).T))
    for w in ws[1:]: torch.testing.assert_close(w, ws[0], atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('name', ['cagrad','nashmtl'])
@pytest.mark.parametrize('level', LEVELS)
def test_methods_with_a_solver_train(name, level):
    keep = Keep()
    learn = fit(toy(GradientBalance(name, level), holes=[(0, range(8))]), 2, cbs=keep)
    assert params(learn).isfinite().all() and learn.gradient_balance.skipped==0 and len(keep.steps)==8

def test_a_factor_on_one_loss():
    J = torch.eye(3, 6)
    K = J*torch.tensor([10.,1.,1.])[:,None]
    w = lambda n, J: _fresh(n, 3)(J@J.T)
    # without a conflict nothing changes: ten times the gradient has ten times the influence
    for n in ('sum','mean','upgrad','pcgrad','gradvac','dualproj'):
        torch.testing.assert_close(w(n, K), torch.ones(3), atol=1e-4, rtol=0)
    # the influence is equal for any length
    torch.testing.assert_close(w('imtlg', K)*torch.tensor([10.,1.,1.])/w('imtlg', K)[1], torch.ones(3), atol=1e-3,
                               rtol=0)
    assert w('mgda', K)[0]<.05 and abs(w('mgda', K)[1]-w('mgda', K)[2])<2e-2    # the shortest combination
    torch.testing.assert_close(w('alignedmtl', K)*torch.tensor([10.,1.,1.]), torch.ones(3), atol=1e-3, rtol=0)

@pytest.mark.parametrize('name', ['upgrad','mgda','dualproj'])
def test_steps_conflict_with_no_output(name):
    torch.manual_seed(0)
    for n in (2,3,5):
        for _ in range(20):
            J = torch.randn(n, 30) + 2*torch.randn(n,1)*torch.randn(30)
            step = _fresh(name, n)(J@J.T)@J
            assert (J@step).min() >= -(2e-2 if name=='mgda' else 1e-4)*J.norm(dim=1).max()**2
    keep = Keep()
    fit(toy([GradientBalance(name, 'parameters'), keep]), 2)
    n = sum(p.numel() for p in Two('abc').trunk.parameters())
    for J,gs in zip(keep.rows, keep.steps):
        assert (J@flat_grads(gs)[:n]).min() >= -(2e-2 if name=='mgda' else 1e-4)*J.norm(dim=1).max()**2

def test_heads_get_their_own_gradient_at_the_level_of_parameters():
    own = Keep()
    keep = Keep()
    fit(toy(own))
    fit(toy([GradientBalance('mgda','parameters'), keep]))
    for a,b in zip(own.steps[0][2:], keep.steps[0][2:]): torch.testing.assert_close(a, b)

def test_exact_solver_beside_torchjds():
    pytest.importorskip('quadprog')
    pytest.importorskip('qpsolvers')
    from torchjd.linalg import QuadprogProjector
    q = QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)
    torch.manual_seed(0)
    for n in (2,3,5,8):
        J = torch.randn(n, 100).double()
        G = J@J.T/100
        torch.testing.assert_close(dual_cone(torch.eye(n), G), q(torch.eye(n).double(), G), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('name,kw',
                         [('graddrop',{}),('config',{}),('excessmtl',{}),('trimmedmean',dict(trim_number=1)),
                          ('random',{}),('pcd',{}),('fairgrad',{}),('constant',dict(weights=torch.ones(3)))])
def test_every_other_aggregator_steps_by_its_law(name, kw):
    "Each step has one sign per element, or is the median of three, or combines the outputs' gradients"
    keep = Keep()
    learn = fit(toy([GradientBalance(name, 'parameters', **kw), keep], holes=[(0, range(8))]), 2)
    assert len(keep.steps)==8 and learn.gradient_balance.skipped==0
    factor = learn.gradient_balance.weigher.factor(3)
    for J,gs in zip(keep.rows[1:4], keep.steps[1:4]):                # one output has no label in the first batch
        step = flat_grads(gs[:2])
        if name=='graddrop':
            ways = [J.clamp(min=0).sum(0), J.clamp(max=0).sum(0)]
            off = torch.stack([(step/factor-o).abs() for o in ways]).amin(0)
        elif name=='trimmedmean': off = step-J.median(0).values*factor
        else: off = step-J.T@torch.linalg.lstsq(J.T, step[:,None]).solution[:,0]
        assert off.norm() < 1e-3*step.norm() and step.norm()>0

# The training around them

class CPUMixed(MixedPrecision):
    "fastai's callback, made to work on a CPU"
    def __init__(self, dtype, scale=False, on=True):
        super().__init__()
        self.dtype = dtype
        self.scale = scale
        self.on = on
    def before_fit(self):
        self.autocast = autocast('cpu', dtype=self.dtype, enabled=self.on)
        self.learn.scaler = GradScaler('cpu', init_scale=256., enabled=self.scale)
        self.scales = L()

@pytest.mark.parametrize('level', LEVELS)
def test_loss_scale_changes_nothing(level):
    a = fit(toy(GradientBalance('upgrad', level)), 2)
    b = fit(toy([GradientBalance('upgrad', level), CPUMixed(torch.float16, True, False)]), 2)
    torch.testing.assert_close(params(a), params(b), atol=1e-6, rtol=1e-5)

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('dtype,scale', [(torch.bfloat16, False), (torch.float16, True)], ids=['bf16','fp16'])
@pytest.mark.parametrize('name', ['upgrad','mgda'])
def test_half_precision(shapes, level, dtype, scale, name):
    mon = TaskMonitor(1)
    learn = fit(multi(shapes, cbs=[GradientBalance(name, level), mon, CPUMixed(dtype, scale)]), 1)
    assert params(learn).isfinite().all() and learn.gradient_balance.skipped==0 and not torch.is_autocast_enabled('cpu')
    full = TaskMonitor(1)
    fit(multi(shapes, cbs=[GradientBalance(name, level), full]), 1)
    a,b = mon.table().iloc[0],full.table().iloc[0]
    for n in OUTPUTS: assert a[f'{n}_grad']==pytest.approx(b[f'{n}_grad'], rel=.2)

def test_overflow_is_left_to_the_scaler():
    class Huge(CPUMixed):
        def before_fit(self):
            super().before_fit()
            self.learn.scaler = GradScaler('cpu', init_scale=2.**127, growth_interval=1000)
    for level in LEVELS:
        learn = toy([GradientBalance('upgrad', level), Huge(torch.float16, True, False)], scale=dict(a=1e6))
        before = params(learn)
        fit(learn, 1)
        assert params(learn).isfinite().all() and learn.gradient_balance.skipped==0

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('cbs',
                         [lambda: [GradientAccumulation(16)], lambda: [GradientClip(.1)],
                          lambda: [GradientAccumulation(16), GradientClip(.1), CPUMixed(torch.float16, True, False)]],
                         ids=['accumulation','clip','all'])
def test_accumulation_and_clipping(level, cbs):
    a = fit(toy(cbs()), 2)
    b = fit(toy([GradientBalance('sum', level), *cbs()]), 2)
    torch.testing.assert_close(params(a), params(b), atol=1e-6, rtol=1e-5)
    assert params(fit(toy([GradientBalance('upgrad', level), *cbs()]), 2)).isfinite().all()

@pytest.mark.parametrize('level', LEVELS)
def test_frozen_and_partly_frozen_trunks(level):
    net = Two(('a','b','c'))
    for p in net.trunk.parameters(): p.requires_grad_(False)
    a = fit(toy(net=net))
    b = fit(toy(GradientBalance('upgrad', level), net=net))
    torch.testing.assert_close(params(a), params(b))
    assert all(p.grad is None for p in b.model.trunk.parameters())
    net.trunk[0].weight.requires_grad_(True)
    keep = Keep()
    learn = fit(toy([GradientBalance('upgrad', level), keep], net=net))
    assert keep.steps[0][0] is not None and keep.steps[0][1] is None
    assert [p.requires_grad for p in learn.model.parameters()][:2]==[True, False]

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('name', ['upgrad','mgda','pcgrad','gradvac','imtlg','alignedmtl'])
def test_outputs_without_labels_take_no_part(level, name):
    "If only `a` and `b` have labels, a learner of three outputs trains as one of `a` and `b`"
    net = Two(('a','b','c'))
    two = Two(('a','b'))
    two.load_state_dict({k: v for k,v in net.state_dict().items() if not k.startswith('heads.2')})
    a,b = Keep(),Keep()
    fit(toy([GradientBalance(name, level), a], holes=[(2, range(32))], net=net))
    fit(toy([GradientBalance(name, level), b], fs=(_sum, _against), net=two))
    for g,h in zip(a.steps[0][:2], b.steps[0][:2]): torch.testing.assert_close(g, h, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('level', LEVELS)
def test_users_weights_multiply_first(level):
    a = fit(toy(GradientBalance('upgrad', level), weights=dict(a=2., b=.5)))
    b = fit(toy(GradientBalance('upgrad', level), scale=dict(a=2., b=.5)))
    torch.testing.assert_close(params(a), params(b), atol=1e-6, rtol=1e-5)
    assert dict(a.loss_func.weights)==dict(a=2., b=.5, c=1.)
    c = fit(toy(GradientBalance('upgrad', level), weights=dict(a=0.)))
    assert not any(p.grad is not None and p.grad.any() for p in c.model.owned_parameters('a'))

@pytest.mark.parametrize('level', LEVELS)
def test_losses_that_are_not_finite_skip_the_step(level):
    class NoNumbers(Callback):
        order = -50
        def after_pred(self):
            if self.training and self.iter in self.at: self.learn.pred = self.pred.map(lambda t: t*math.nan)
    NoNumbers.at = (0,1,2,3)
    learn = toy([GradientBalance('upgrad', level), NoNumbers()], opt_func=Adam)
    before = params(learn)
    fit(learn)
    assert torch.equal(params(learn), before) and learn.gradient_balance.skipped==4
    NoNumbers.at = (1,)
    learn = fit(toy([GradientBalance('upgrad', level), NoNumbers(), GradientAccumulation(16)]), 2)
    assert params(learn).isfinite().all() and learn.gradient_balance.skipped==2
    assert not torch.equal(params(learn), before)

class Stop(Callback):
    "Raise an exception at an event of the second batch"
    order = 30
    def __init__(self, event, exc):
        self.event = event
        self.exc = exc
    def __call__(self, event):
        if event==self.event and getattr(self, 'training', False) and self.learn.iter==1: raise self.exc
        return super().__call__(event)

def left(learn):
    "Everything that a callback could leave behind"
    return dict(hooks=sum(len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks)
                          for m in learn.model.modules()),
                requires_grad=[p.requires_grad for p in learn.model.parameters()],
                weights=dict(learn.loss_func.weights), reduction=learn.loss_func.reduction,
                losses=list(learn.loss_func.funcs.values()).__len__(),
                grads=[None if p.grad is None else bool(p.grad.any()) for p in learn.model.parameters()],
                groups=len(learn.opt.param_lists))

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('event',
                         ['before_batch','after_pred','after_loss','before_backward','before_step','after_step',
                          'after_batch'])
@pytest.mark.parametrize('exc', [CancelFitException, CancelBatchException, CancelTrainException, ZeroDivisionError])
def test_a_stopped_fit_leaves_what_a_plain_one_leaves(level, event, exc):
    if event=='after_batch' and exc is CancelBatchException: return          # fastai does not catch this there
    seen = []
    for cbs in ([], [GradientBalance('upgrad', level), TaskMonitor(1)]):
        learn = toy([*cbs, Stop(event, exc)])
        try: fit(learn)
        except ZeroDivisionError: pass
        if event!='before_batch' or exc is not ZeroDivisionError: seen.append(left(learn))
        learn.remove_cb(Stop)
        fit(learn)
        seen.append(left(learn))
    n = len(seen)//2
    for a,b in zip(seen[:n], seen[n:]):
        # at this point plain fastai has no gradients or all of them
        if exc is ZeroDivisionError and event in ('after_loss','before_backward'): a['grads'] = b['grads']
        assert a==b

def test_fit_twice_lr_find_fine_tune_save_and_export(shapes, tmp_path):
    for level in LEVELS:
        learn = multi(shapes, cbs=[GradientBalance('gradvac', level), TaskMonitor(2)], path=tmp_path)
        before = params(learn)
        assert 1e-8 < learn.lr_find(num_it=5, show_plot=False).valley < 10
        assert torch.equal(before, params(learn)) and not len(learn.task_monitor.table())
        fit(learn)
        fit(learn)
        with learn.no_bar(): learn.fine_tune(1, freeze_epochs=1)
        assert len(learn.task_monitor.table()) == sum(i%2==0 for i in range(learn.task_monitor.step))
        learn.save('it')
        learn.load('it')
        fit(learn)
        learn.export(tmp_path/'e.pkl')
        again = load_learner(tmp_path/'e.pkl')
        assert again.gradient_balance.level==level and len(again.task_monitor.table())

@pytest.mark.parametrize('level', LEVELS)
def test_predictions_of_a_learner_that_was_exported_or_copied(shapes, level, tmp_path, monkeypatch):
    learn = fit(multi(shapes, cbs=[GradientBalance(level=level), TaskMonitor(1), ShowWeights()], path=tmp_path))
    row = pd.read_csv(shapes/'items.csv').iloc[0]
    want = learn.predict(row)[2]
    learn.export(tmp_path/'e.pkl')
    for module in ('torchjd','torchjd.aggregation'): monkeypatch.setitem(sys.modules, module, None)   # not installed
    for new in (load_learner(tmp_path/'e.pkl'), deepcopy(learn)):
        for n,p in new.predict(row)[2].items(): torch.testing.assert_close(p, want[n])
    monkeypatch.undo()
    for got,p in zip(deepcopy(learn).get_preds()[0], learn.get_preds()[0]): torch.testing.assert_close(got, p)
    after = []
    for new in (deepcopy(learn), deepcopy(learn)):
        torch.manual_seed(1)
        new.dls.train.rng.seed(0)
        after.append(params(fit(new)))
    assert torch.equal(*after) and not torch.equal(params(learn), after[0])

@pytest.mark.parametrize('level', LEVELS)
def test_a_callback_without_its_learner_breaks_no_prediction(level):
    cb = GradientBalance(level=level)
    learn = fit(toy(cb))
    want = learn.get_preds()[0]
    fit(toy(), cbs=cb)                                     # a second learner, which removes it again
    assert cb.learn is None
    for got,p in zip(learn.get_preds()[0], want): assert torch.equal(got, p)
    with pytest.raises(ValueError, match='This GradientBalance was also added to another learner'): fit(learn)

# One object for several learners, and your own loss terms

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('name', ['upgrad','gradvac','nashmtl'])
def test_one_object_for_several_learners_starts_afresh(level, name):
    cb = GradientBalance(name, level)
    mon = TaskMonitor(1)
    for k in (1., 3.):
        fresh = fit(toy(GradientBalance(name, level), scale=dict(a=k)), 2)
        for cbs in ([cb, mon], None):
            torch.manual_seed(0)
            learn = fit(toy(cbs, scale=dict(a=k)), 2, cbs=None if cbs else [cb, mon])
            torch.testing.assert_close(params(learn), params(fresh), atol=1e-6, rtol=1e-5)
            assert list(mon.table().index)==list(range(8))

def penalty_of(model, pred): return model.trunk[0].weight.pow(2).sum() + sum(p.pow(2).mean() for p in pred)

class Penalty(Callback):
    "Add a term to the loss that depends on parameters and on predictions"
    run_valid = False
    def __init__(self, order, in_place): store_attr()
    def after_loss(self):
        extra = penalty_of(self.model, self.pred)
        if self.in_place: self.learn.loss_grad += extra
        else: self.learn.loss_grad = self.loss_grad + extra

class Penalised(MultiLoss):
    "The same term in a loss"
    def __call__(self, pred, *targs): return super().__call__(pred, *targs) + penalty_of(self.model, pred)

def penalised(cbs, **kwargs):
    learn = toy(cbs, **kwargs)
    learn.loss_func = Penalised(learn.loss_func.funcs, dict(learn.loss_func.weights))
    learn.loss_func.model = learn.model
    return learn

@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('cbs', [lambda: [], lambda: [GradientAccumulation(24)],
                                 lambda: [GradientAccumulation(24), CPUMixed(torch.float16, True, False)]],
                         ids=['plain','accumulation','and scale'])
@pytest.mark.parametrize('name', ['sum','upgrad','graddrop'])
def test_loss_terms_of_ones_own_add_their_gradient(level, cbs, name):
    "The step with a penalty minus the step without it is the penalty's own gradient"
    if name=='graddrop' and level=='features': return                        # not available at the features
    def _first(make, *more):
        keep = Keep()
        torch.manual_seed(3)
        fit(make([GradientBalance(name, level), *more, keep, *cbs()], weights=dict(a=.5)))
        return flat_grads(keep.steps[2 if cbs() else 0])
    plain = _first(toy)
    wanted = flat_grads(penalty_gradients(len(cbs()))) + plain
    makes = [(penalised,)] + [(toy, Penalty(order, in_place)) for order in (-20,0) for in_place in (False,True)]
    for make,*more in makes: torch.testing.assert_close(_first(make, *more), wanted, atol=1e-4, rtol=1e-4)

def penalty_gradients(accumulated):
    "The penalty's gradient at the first step: for one batch, or the mean over three accumulated batches"
    learn = toy()
    x = torch.stack([o[0] for o in learn.dls.train.dataset])
    batches = [x[i:i+8] for i in range(0, 24 if accumulated else 8, 8)]
    loss = sum(penalty_of(learn.model, learn.model(b)) for b in batches)/len(batches)
    loss.backward()
    scale = 256. if accumulated>1 else 1.
    return [scale*p.grad for p in learn.model.parameters()]

def test_validation_has_the_users_own_loss():
    learn = fit(toy([GradientBalance('mgda'), TaskMonitor(1)], weights=dict(a=2.)))
    plain = toy(weights=dict(a=2.), net=learn.model)
    assert learn.validate()[0]==pytest.approx(plain.validate()[0])

def test_refusals(shapes):
    with pytest.raises(
        ValueError,
        match='GradientBalance and DynamicWeightAverage both balance|DynamicWeightAverage and GradientBalance both'
    ):
        fit(toy([GradientBalance(), DynamicWeightAverage()]))
    with pytest.raises(KeyError, match="Did you mean 'pcgrad'"): GradientBalance('pc_gradd')
    with pytest.raises(ValueError, match="needs level='parameters'"): fit(toy(GradientBalance('config')))
    with pytest.raises(TypeError, match='has one loss'):
        fit(Learner(toy().dls, nn.Linear(4,1), nn.MSELoss(), cbs=GradientBalance()))
    with pytest.raises(TypeError, match='shared_points'):
        fit(Learner(toy().dls, nn.Linear(4,1), MultiLoss(dict(a=Scaled(),b=Scaled(),c=Scaled())),
                    cbs=GradientBalance()))
    learn = toy(GradientBalance())
    learn.model = nn.DataParallel(learn.model)
    with pytest.raises(TypeError, match='distrib_ctx'): fit(learn)

def test_without_torchjd_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchjd', None)
    monkeypatch.setitem(sys.modules, 'torchjd.aggregation', None)
    with pytest.raises(ImportError, match=r'fastai_multi\[balance\]'): GradientBalance()
    GRADS = task_gradients(dict(a=torch.zeros(())), [torch.zeros(2)])
    assert not GRADS.any()

def test_two_processes_step_as_one(tmp_path):
    "Two processes with half of each batch take the same step as one process with the whole batch"
    code = f'''
        import os, sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        import torch.distributed as dist
        torch.set_num_threads(1)
        from test_gradients import *
        rank,n = int(os.environ['RANK']),int(os.environ['WORLD_SIZE'])
        dist.init_process_group('gloo')
        class Wrap(Callback):
            order = 11
            def before_fit(self): self.learn.model = nn.parallel.DistributedDataParallel(self.learn.model)
            def after_fit(self): self.learn.model = self.learn.model.module
        learn = toy([GradientBalance('upgrad'), Wrap()])
        items = learn.dls.train.dataset
        mine = [o for i in range(0, 32, 8) for o in items[i+4*rank:i+4*rank+4]]
        learn.dls.loaders[0] = DataLoader(mine, bs=4, num_workers=0)
        learn.remove_cb(Recorder)
        with learn.no_bar():
            learn._do_epoch_validate = noop
            learn.fit(1)
        if rank==0: torch.save(params(learn), {str(tmp_path/'p.pth')!r})
        try: fit(toy(GradientBalance(level='parameters')))
        except ValueError as e: assert "Use level='features'" in str(e)
        else: raise AssertionError
        dist.barrier()
        dist.destroy_process_group()'''
    env = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(29500+os.getpid()%1000),
               OMP_NUM_THREADS='1')
    ps = [subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)),
                           stderr=subprocess.PIPE, text=True) for r in range(2)]
    errs = [p.communicate(timeout=180)[1] for p in ps]
    assert all(p.returncode==0 for p in ps), errs[0][-3000:]+errs[1][-3000:]
    torch.testing.assert_close(torch.load(tmp_path/'p.pth'), params(fit(toy(GradientBalance('upgrad')))), atol=1e-5,
                               rtol=1e-4)

# Inspection

def test_report_of_a_trunk_pulled_both_ways_and_of_one_that_is_not(shapes):
    df = pd.read_csv(shapes/'items.csv')
    for sign,conflict in ((1,False),(-1,True)):
        df['more'],df['less'] = df.area,sign*3*df.area
        dls = MultiDataLoaders.from_df(df, shapes, image='file',
                                       outputs=dict(more=RegressionBlock, less=RegressionBlock), seed=0, bs=16,
                                       num_workers=0, item_tfms=Resize(32))
        torch.manual_seed(0)
        learn = multi_learner(dls, simple_cnn(depth=2), heads=dict(more=[], less=[]))
        nn.init.normal_(learn.model.heads['more'].layers[-1].weight, std=.01)     # zero weights pass no gradient
        learn.model.heads['less'].load_state_dict(learn.model.heads['more'].state_dict())
        rep = learn.task_report(4)
        assert (rep.cosines.loc['more','less']<-.1)==conflict
        assert any('pull against each other' in a for a in rep.advice)==conflict
        assert any('No conflict' in a for a in rep.advice)!=conflict

def test_report_leaves_nothing_behind(shapes):
    for frozen in (False, True):
        learn = multi(shapes)
        if frozen:
            learn.freeze()
            [p.requires_grad_(False) for g in learn.opt.param_lists[:-1] for p in g]
        fit(learn)
        learn.model.eval()
        before = (left(learn), {k: v.clone() for k,v in learn.model.state_dict().items()}, torch.get_rng_state(),
                  learn.dls.train.rng.getstate(), random.getstate(), learn.loss_func.step,
                  [m.training for m in learn.model.modules()])
        rep = learn.task_report(3)
        after = (left(learn), learn.model.state_dict(), torch.get_rng_state(), learn.dls.train.rng.getstate(),
                 random.getstate(), learn.loss_func.step, [m.training for m in learn.model.modules()])
        assert before[0]==after[0]
        assert torch.equal(before[2], after[2])
        assert before[3:]==after[3:]
        assert all(torch.equal(v, after[1][k]) for k,v in before[1].items())
        assert rep.table.gradient.notna().all() and (rep.table.labelled==1).all() and rep.n_batches==3
        learn.dls.train.rng.seed(0)
        order = learn.dls.train.get_idxs()
        learn.dls.train.rng.seed(0)
        learn.task_report(1)
        assert learn.dls.train.get_idxs()==order

def test_report_of_a_crash_leaves_nothing(shapes, monkeypatch):
    learn = multi(shapes)
    state = torch.get_rng_state()
    hooks = left_hooks(learn)
    monkeypatch.setattr(MultiLoss, '__call__', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): learn.task_report()
    assert torch.equal(state, torch.get_rng_state()) and left_hooks(learn)==hooks

def left_hooks(learn): return sum(len(m._forward_hooks) for m in learn.model.modules())

def test_report_counts_labels(shapes):
    df = pd.read_csv(shapes/'items.csv').astype(dict(kind=object))
    df.loc[df.index[5:], 'kind'] = None
    dls = MultiDataLoaders.from_df(df, shapes, image='file', outputs=dict(kind=CategoryBlock, area=RegressionBlock),
                                   seed=0, bs=16, num_workers=0, item_tfms=Resize(32))
    rep = multi_learner(dls, simple_cnn(depth=2)).task_report(4)
    assert rep.table.labelled['area']==1 and rep.table.labelled['kind']<.2 and '`kind`' in rep.advice[0]

def test_monitor_in_tables_and_loggers(shapes, tmp_path):
    from fastai.callback.progress import CSVLogger
    learn = multi(shapes, cbs=[TaskMonitor(1, show=True), ShowWeights(), UncertaintyWeighting()], path=tmp_path)
    with learn.no_bar(): learn.fit(2, cbs=CSVLogger())
    df = pd.read_csv(tmp_path/'history.csv')
    assert {'kind_grad','kind_colour_cos','kind_weight'} <= set(df.columns)
    assert df.kind_grad.notna().all()
    assert (df.kind_colour_cos.abs()<=1).all()
    t = learn.task_monitor.table()
    n = len(t)//2
    assert df.kind_grad[1]==pytest.approx(t.kind_grad[n:].mean(), rel=1e-3)
    learn.plot_tasks()
    learn.plot_tasks(cosines=True)
    assert len(learn.evaluate()) == 1+len(learn.metrics)

def test_predictions_fetched_in_the_middle_of_a_fit(shapes):
    "W&B's callback fetches predictions after each validation like this: for other items, without a recorder"
    values = []
    for more in ([], [1]):
        heads = {n: dict(p=0.) for n in OUTPUTS}      # no dropout, which would draw differently
        learn = multi(shapes, heads=heads, cbs=[TaskMonitor(1, show=True), ShowWeights(), UncertaintyWeighting(),
                                                TaskEarlyStopping(patience=1, min_delta=100.)])
        cbs = [FetchPredsCallback(dl=learn.dls.test_dl(learn.dls.valid_ds.items[:3], with_labels=True), with_input=True)
               for _ in more]
        torch.manual_seed(2)
        with learn.no_bar(): learn.fit(3, cbs=cbs)
        values.append((learn.recorder.values, learn.task_early_stopping.best['kind'].best,
                       learn.task_early_stopping.stopped))
    torch.testing.assert_close(torch.tensor(values[0][0]), torch.tensor(values[1][0]))
    assert values[0][1]==pytest.approx(values[1][1]) and values[0][2]==values[1][2] and len(values[0][2])==3

def test_monitor_in_tensorboard(shapes, tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = multi(shapes, cbs=[TaskMonitor(1, show=True), ShowWeights(), UncertaintyWeighting()], path=tmp_path)
    with learn.no_bar(): learn.fit(1, cbs=TensorBoardCallback(log_dir=tmp_path/'tb', log_preds=False))
    scalars = EventAccumulator(str(tmp_path/'tb')).Reload().Tags()['scalars']
    assert {'kind_loss','kind_grad','kind_colour_cos','kind_weight'} <= set(scalars)

def test_monitor_changes_nothing(shapes):
    assert torch.equal(params(fit(multi(shapes, cbs=TaskMonitor(1)))), params(fit(multi(shapes))))
