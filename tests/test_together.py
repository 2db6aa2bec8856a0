"""Heads of one shape run as one operation and give the same numbers as one by one. These tests also cover the
optimizer and the calls in a step that wait for the device"""
import pytest, torch
from contextlib import contextmanager
from copy import deepcopy
from fastai.vision.all import *
from fastai_multi import *
from statistics import median
from fastai_multi.models.answer import predict_together, runs_together
from fastai_multi.models.heads import BoxHead, NumberHead
from fastai_multi.models.stack import stack_key
from fastai_multi.optimizer import FusedAdam
from benchmarks.step import SumOfLosses, TakesTuples, loaders

pytestmark = pytest.mark.usefixtures('one_thread')
SIZES = dict(kind=3, colour=4, shape=3, tags=5, box=4, area=1)

def model(**kwargs):
    "A model of a picture and numbers, in double precision and without dropout"
    torch.manual_seed(0)
    encoders = dict(image=image_encoder(simple_cnn(3, width=4)), nums=nn.Sequential(nn.Linear(3, 8), nn.ReLU()))
    res = MultiModel(encoders, SIZES, head_classes=dict(box=BoxHead, area=NumberHead), **kwargs).double()
    for p in res.heads.parameters(): p.data.add_(torch.randn_like(p)*.1)
    for m in res.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    return res

def batch(): return torch.randn(6, 3, 16, 16).double(), torch.randn(6, 3).double()

def watched(m):
    "The model with a hook, which makes its heads run one by one"
    m.register_forward_hook(lambda *args: None)
    return m

FORMS = dict(shared={}, by_depth=dict(depth=dict(kind=1, colour=1, shape=2)), split=dict(split=1),
             after=dict(after=dict(colour='kind')), film=dict(fusion='film'), late=dict(fusion='late'))

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('train', [True, False])
def test_the_same_as_one_by_one(form, train):
    one = model(**FORMS[form]).train(train)
    two = watched(deepcopy(one))
    assert runs_together(one) and not runs_together(two)
    for xb in (batch(), batch()):
        ys,zs = one(*xb), two(*xb)
        for y,z in zip(ys, zs): torch.testing.assert_close(y, z, atol=1e-9, rtol=1e-9)
        sum(y.pow(2).sum() for y in ys).backward()
        sum(z.pow(2).sum() for z in zs).backward()
    for (n,p),q in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-8, rtol=1e-8, msg=n)
    for (n,b),c in zip(one.named_buffers(), two.buffers()): torch.testing.assert_close(b, c, msg=n)

def test_a_hook_on_a_head_fires_and_the_others_stay_together():
    m = model()
    seen = []
    m.heads['kind'].layers[-1].register_forward_hook(lambda *args: seen.append(1))
    m(*batch())
    assert seen==[1] and stack_key(m.heads['kind']) is None and stack_key(m.heads['colour']) is not None
    heads = {n: h for n,h in m.heads.items()}
    features = m.features(*batch())
    assert list(predict_together(heads, features, {}))==['colour','shape','tags']

def test_each_output_alone_where_its_gradient_is_asked_for():
    "Under `GradientBalance`, an output's loss reaches only its own head"
    dls = loaders(3)
    for level in ('features','parameters'):
        learn = multi_learner(dls, None, cbs=GradientBalance('pcgrad', level=level))
        seen = []
        learn.model.heads['k0'].register_forward_hook(lambda *args: seen.append(1))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert seen and all(p.isfinite().all() for p in learn.model.parameters())
        assert not learn.model._forward_hooks

@contextmanager
def counted(monkeypatch):
    "Count the calls that wait for the device: `.item()`, `float`, `int`, `bool`, `.tolist()`, `.cpu()` of a tensor"
    counts = Counter()
    with monkeypatch.context() as m:
        for name in ('item','tolist','cpu','numpy','__float__','__int__','__bool__','__index__'):
            own = getattr(torch.Tensor, name)
            def ask(self, *args, _own=own, _name=name, **kwargs):
                counts[_name] += 1
                return _own(self, *args, **kwargs)
            m.setattr(torch.Tensor, name, ask)
        yield counts

def questions(learn, monkeypatch):
    "The number of these calls in one training step"
    n = []
    class Steps(Callback):
        order = 1000
        def before_batch(self): self.before = counts.total()
        def after_batch(self):
            if self.training: n.append(counts.total()-self.before)
    with counted(monkeypatch) as counts, learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=Steps())
    return median(n)

@pytest.mark.parametrize('n_outputs', [1,8])
def test_a_step_asks_no_more_than_fastai(monkeypatch, n_outputs):
    learn = multi_learner(loaders(n_outputs), None)
    plain = Learner(learn.dls, TakesTuples(deepcopy(learn.model)), loss_func=SumOfLosses(), opt_func=FusedAdam)
    assert questions(learn, monkeypatch) <= questions(plain, monkeypatch)

def test_the_default_optimizer_does_what_adam_does():
    dls = loaders(3)
    def trained(**kwargs):
        set_seed(0)
        learn = multi_learner(dls, None, **kwargs)
        return one_cycle(learn)
    learn,other = trained(), trained(opt_func=Adam)
    assert learn.opt_func is FusedAdam and other.opt_func is Adam
    for p,q in zip(learn.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)

def one_cycle(learn):
    "The learner after an epoch without dropout, with items in a fixed order"
    for m in learn.model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    learn.dls.train.rng = random.Random(1)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    return learn

def test_saved_loaded_and_frozen_with_the_default_optimizer(tmp_path):
    learn = multi_learner(loaders(2), None, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        learn.save('a')
        other = multi_learner(learn.dls, None, path=tmp_path).load('a')
    for l in (learn, other): one_cycle(l)
    for p,q in zip(learn.model.parameters(), other.model.parameters()): assert torch.equal(p, q)
    decays = {p: learn.opt.state[p].get('do_wd', True) for p in learn.model.parameters()}
    assert not any(decays[p] for m in learn.model.modules() if isinstance(m, nn.BatchNorm1d) for p in m.parameters())
