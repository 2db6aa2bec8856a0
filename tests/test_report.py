"Each piece of advice in `task_report` is tested on a drawn problem where following it helps"
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import *
from fastai_multi import *

@pytest.fixture(autouse=True)
def one_state():
    "Start every test from the same random state, from which loaders draw their order"
    set_seed(0)

def table(n=320, noise=.3, seed=0):
    "A table of four features, two numbers `a` and `b` that depend on them, and `noise`, which does not"
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n,4))
    df = pd.DataFrame({f'x{i}': x[:,i] for i in range(4)})
    df['a'] = np.sin(2*x[:,0]) + x[:,1] + noise*rng.normal(size=n)
    df['b'] = x[:,2]*x[:,3] + x[:,2] + noise*rng.normal(size=n)
    df['noise'] = rng.normal(size=n)
    df['is_valid'] = np.arange(n)%4==0
    return df

def learner(outputs, df=None, bs=32, arch=None, **kwargs):
    df = table() if df is None else df
    dls = MultiDataLoaders.from_df(df, features=[c for c in df if c.startswith('x')], image=None, valid_col='is_valid',
                                   outputs={n: RegressionBlock for n in outputs}, bs=bs, num_workers=0, seed=0)
    torch.manual_seed(0)
    learn = multi_learner(dls, arch, **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def about(learn, name, **kwargs):
    "What the report says about one output"
    return ' '.join(s for s in learn.task_report(**kwargs).advice if s.startswith(f'`{name}`'))

def loss(learn, name): return learn.evaluate()[f'{name}_loss']

class Head(nn.Module):
    "A custom head whose random last layer is large"
    scale = 5.
    def __init__(self, n_in, n_out):
        super().__init__()
        self.last = nn.Linear(n_in, n_out)
        with torch.no_grad(): self.last.weight.mul_(self.scale)
    def forward(self, x): return self.last(x)

class Small(Head):
    "The same head as the report advises: its last layer starts at zero"
    scale = 0.

def trunk(n_in=4, n_out=32, norm=None):
    layers = [nn.Linear(n_in, n_out), norm, nn.ReLU()]
    return nn.Sequential(*[l for l in layers if l is not None])

def test_a_bad_start():
    after = []
    for head in (Head, Small):
        torch.manual_seed(1)
        learn = learner(['a','b'], arch=trunk(), heads=dict(a=head))
        said = about(learn, 'a')
        assert ('starts at a loss of' in said and 'start at zero' in said) == (head is Head)
        learn.fit_one_cycle(3, 1e-2)
        after.append(loss(learn, 'a'))
    assert after[1] < after[0]

def test_training_against_evaluation():
    df = table()
    df[['x0','x1','x2','x3']] += 5.
    after = []
    for norm in (nn.BatchNorm1d(32, momentum=.001), None):
        torch.manual_seed(1)
        learn = learner(['a','b'], df, arch=trunk(norm=norm))
        learn.fit_one_cycle(6, 1e-2)
        said = about(learn, 'a')
        assert ('in evaluation mode' in said and 'layers without batch norm' in said) == (norm is not None)
        after.append(loss(learn, 'a'))
    assert after[1] < after[0]

def test_too_few_steps():
    after = []
    for bs in (64, 16):
        learn = learner(['a','b'], bs=bs)
        learn.fit_one_cycle(2, 2e-3)
        if bs==64: assert 'has learned little: 6 steps' in about(learn, 'b') and 'use bs=16' in about(learn, 'b')
        after.append(loss(learn, 'b'))
    assert after[1] < after[0]

def test_few_steps_of_small_batches():
    after = []
    for epochs in (1, 8):
        learn = learner(['a','b'], bs=16)
        learn.fit_one_cycle(epochs, 1e-3)
        if epochs==1: assert 'train for more epochs' in about(learn, 'b')
        after.append(loss(learn, 'b'))
    assert after[1] < after[0]

def test_a_rate_that_is_too_low():
    after = []
    learn = learner(['a','b'], bs=16)
    learn.fit(15, 1e-6)
    assert 'Try a higher learning rate (learn.lr_find())' in about(learn, 'b')
    after.append(loss(learn, 'b'))
    learn = learner(['a','b'], bs=16)
    with learn.no_bar(): rate = learn.lr_find(show_plot=False).valley
    learn.fit(15, rate)
    after.append(loss(learn, 'b'))
    assert rate > 1e-6 and after[1] < after[0]

@pytest.mark.parametrize('way', ['epochs', 'dropout'])
def test_overfitting(way):
    df = table(60)
    for i in range(4, 40): df[f'x{i}'] = np.random.default_rng(i).normal(size=len(df))
    first = learner(['a','noise'], df, bs=16)
    first.fit_one_cycle(30, 1e-2)
    said = about(first, 'noise')
    assert 'overfits' in said and 'fewer epochs' in said and "dict(p=.5)" in said
    if way=='epochs':
        second = learner(['a','noise'], df, bs=16)
        second.fit_one_cycle(3, 3e-3)
    else:
        second = learner(['a','noise'], df, bs=16, heads=dict(noise=dict(p=.5)))
        second.fit_one_cycle(30, 1e-2)
    assert loss(second, 'noise') < loss(first, 'noise')

def loud(p, t): return 1000*(p-t)**2
def quiet(p, t): return .001*(p-t)**2

@pytest.mark.parametrize('name,own,outputs,words', [('a', loud, ['a','b'], 'decide alone'),
                                                    ('b', quiet, ['a','b','noise'], 'hardly moves')])
def test_weights_of_losses(name, own, outputs, words):
    "With few shared features the other losses drown `b`, and the advised weight makes it learn better"
    def trained(weights, epochs):
        torch.manual_seed(1)
        learn = learner(outputs, arch=trunk(4, 4), loss_func={name: own}, loss_weights=weights)
        learn.fit(epochs, 3e-3)
        return learn
    said = about(trained(None, 1), name)
    assert words in said and 'compare the metrics of all outputs' in said
    weights = {name: float(re.search(r'weighting it by ([\d.e-]+)', said)[1].rstrip('.'))}
    assert words not in about(trained(weights, 1), name)
    assert trained(weights, 15).evaluate()['b_mae'] < trained(None, 15).evaluate()['b_mae']

class Shared(nn.Module):
    "A model that predicts one number for both outputs"
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 1)
    def forward(self, x):
        f = self.line(x)
        return Outputs(a=f, b=f)
    def shared_points(self): return [self.line]

def test_a_step_against_an_output():
    "`b` is the opposite of `a`, whose loss is larger. The plain sum gives `b` up, but balanced gradients do not"
    pytest.importorskip('torchjd')
    df = table()
    df['a'] = df.x0
    df['b'] = -df.x0 + .3*df.x1
    after = []
    for cbs in (None, GradientBalance('upgrad')):
        set_seed(0)
        learn = learner(['a','b'], df)
        learn = MultiLearner(learn.dls, Shared(), loss_weights=dict(a=10.))
        if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
        learn.logger = noop
        learn.fit(1, 1e-3)
        said = ' '.join(learn.task_report().advice)
        assert "goes against `b`" in said and "GradientBalance('upgrad')" in said
        learn.fit(4, 1e-2, cbs=cbs)
        after.append(loss(learn, 'b'))
    assert after[1] < after[0]

def test_train_an_epoch_and_ask_again():
    learn = learner(['a','b'])
    assert any('Train an epoch, and ask again' in s for s in learn.task_report().advice)
    learn.fit_one_cycle(1, 1e-2)
    assert not any('ask again' in s for s in learn.task_report().advice)

def test_a_good_learner_gets_no_advice():
    learn = learner(['a','b'], table(1000), bs=16)
    learn.fit_one_cycle(8, 1e-2)
    assert about(learn, 'a') == about(learn, 'b') == ''

def test_metrics_beside_baselines():
    learn = learner(['a','b'])
    rep = learn.task_report(baselines=True)
    assert [*rep.scores][:2] == ['learner','constant']
    assert 'metrics\n' in repr(rep) and 'losses: of training items' in repr(rep)
    assert [*rep.losses] == ['training','evaluation','constant','validation','constant there']
    assert rep.losses.loc['a','constant'] == pytest.approx(1, abs=.15)

WORDS = dict(up=['sun', 'cloud', 'bird'], down=['stone', 'root', 'worm'])

def captions(n=160):
    "Texts whose words usually tell the class, and a number that nothing predicts"
    rng = np.random.default_rng(0)
    kind = rng.choice(['up','down'], n, p=[.6,.4])
    said = np.where(rng.random(n)<.1, 'down', kind)
    text = [' '.join(rng.choice(WORDS[k], 3)) for k in said]
    return pd.DataFrame(dict(text=text, kind=kind, size=rng.normal(size=n), is_valid=np.arange(n)%4==0))

def reader(**kwargs):
    dls = MultiDataLoaders.from_df(captions(), image=None, text='text', valid_col='is_valid', bs=16, num_workers=0,
                                   seed=0, outputs=dict(kind=CategoryBlock, size=RegressionBlock))
    torch.manual_seed(0)
    learn = multi_learner(dls, **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def test_baselines_of_texts():
    learn = reader()
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    t = learn.evaluate(baseline=True)
    assert [*t] == ['learner','constant','text','probe']
    valid = learn.dls.valid.items
    assert t.constant['kind_accuracy'] == pytest.approx((valid.kind=='up').mean(), abs=1e-4)
    assert t.text['kind_accuracy'] > .85 and t.probe['kind_accuracy'] > .85
    assert t.learner['kind_accuracy'] == pytest.approx(t.constant['kind_accuracy'])    # untrained
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])      # the probe changed only a copy
    assert learn.probe_scores is None
    learn.probe()
    probed = learn.evaluate()['kind_accuracy']
    learn.fit_one_cycle(2, 1e-2)
    assert learn.evaluate(baseline=True).probe['kind_accuracy'] == pytest.approx(probed)
    dl = learn.dls.test_dl(valid.iloc[:20], with_labels=True)
    assert 'probe' not in learn.evaluate(dl=dl, baseline=True)      # the probe's scores are for other items
