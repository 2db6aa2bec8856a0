"""Two kinds from outside the package, each a `Part` with a `Task` or `Modality`: an embedding to predict, and a signal
to read"""
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.nn import functional as F
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import BadItem, absent, present
from fastai_multi.data.parts import Part, Verdict
from fastai_multi.build import Modality
from fastai_multi.tasks import Task
from tests.seen import texts_of_figure

# An output: a direction in space

class EmbeddingPart(Part):
    "A vector whose length does not matter"
    kind = 'embedding'
    static = True

    def setup(self, values):
        self.c = len(values[0])
        self.like = torch.zeros(self.c)

    def encode(self, v):
        if self.is_missing(v): return absent
        t = torch.tensor(v, dtype=torch.float)
        if t.shape != (self.c,): raise BadItem(f'{self.what} has {len(t)} numbers, and {self.c} in the training split.')
        return t

    def compare(self, pred, true, size=None):
        cosine = F.cosine_similarity(pred, true, dim=0).item()
        return Verdict(cosine > .9, f'cosine {cosine:.2f}')

class EmbeddingBlock(TransformBlock):
    "A `TransformBlock` for embeddings"
    def make_part(self, name, is_input): return EmbeddingPart(name, is_input=is_input)

def cosine(pred, targ): return F.cosine_similarity(pred, targ, dim=-1)
def mean_cosine(pred, targ): return cosine(pred, targ).mean()

class CosineLoss:
    "One minus the cosine, for each item"
    def __call__(self, pred, targ): return 1-cosine(pred, targ)

class EmbeddingTask(Task, part=EmbeddingPart):
    "An embedding is correct if its direction is"
    mixable = False
    def loss(self, **kwargs): return CosineLoss()
    def metrics(self): return [mean_cosine]
    def activation(self, pred): return F.normalize(pred, dim=-1)

# An input: a series of numbers

class SignalPart(Part):
    "A one-dimensional signal"
    kind = 'signal'
    static = True

    def setup(self, values):
        self.c = len(values[0])
        self.like = torch.zeros(1, self.c)

    def encode(self, v):
        if self.is_missing(v): return absent
        return torch.as_tensor(np.asarray(v, dtype=np.float32))[None]

    def format(self, v): return '–' if v is absent else f'{v.shape[-1]} samples'

class SignalBlock(TransformBlock):
    "A `TransformBlock` for signals"
    def make_part(self, name, is_input): return SignalPart(name, is_input=is_input)

class SignalEncoder(nn.Module):
    "Two convolutions along time, then the mean"
    n_features = 16
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, 8, 5, 2), nn.ReLU(), nn.Conv1d(8, 16, 5, 2), nn.ReLU())
    def forward(self, x): return self.layers(x.nan_to_num()).mean(-1)

class SignalModality(Modality, part=SignalPart):
    "A signal has an encoder of its own"
    def encoder(self, options): return SignalEncoder()
    def recognises(self, raw): return isinstance(raw, np.ndarray) and raw.ndim == 1

# A table with both

KINDS = dict(kind=CategoryBlock, box=BBoxBlock, way=EmbeddingBlock)

@pytest.fixture(scope='module')
def table(shapes):
    df = pd.read_csv(shapes/'items.csv')
    df['path'] = [str(shapes/f) for f in df.file]
    rng = np.random.default_rng(0)
    classes = {k: i for i, k in enumerate(sorted(df.kind.unique()))}
    turn = np.array([classes[k] for k in df.kind])*1.5
    way = np.stack([np.cos(turn), np.sin(turn), 0*turn], 1)*rng.uniform(1, 5, (len(df), 1))
    df['way'] = [None if i % 10 == 3 else w.tolist() for i, w in enumerate(way)]
    time = np.arange(64)/8
    df['signal'] = [None if i % 10 == 7 else np.sin(time*(1+t)) for i, t in enumerate(turn)]
    return df

def inputs_of(row): return dict(image=row['path'], signal=row['signal'])
def outputs_of(row): return dict(kind=row['kind'], box=[row[c] for c in ('x1', 'y1', 'x2', 'y2')], way=row['way'])

def loaders(table, outputs=KINDS):
    blocks = MultiInputBlock(image=ImageBlock, signal=SignalBlock), MultiOutputBlock(**outputs)
    block = DataBlock(blocks, get_x=inputs_of, get_y=outputs_of, splitter=RandomSplitter(.25, seed=0),
                      item_tfms=Resize(64))
    return MultiDataLoaders.from_dblock(block, table, bs=16, num_workers=0)

def learner(table, **kwargs):
    set_seed(0)    # seeds the shuffling too
    learn = multi_learner(loaders(table, **kwargs), simple_cnn(depth=3), lr=3e-3)
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.fixture(scope='module')
def trained(table):
    learn = learner(table)
    learn.fit(20, 1e-2)    # three steps per epoch
    return learn

def test_a_batch_has_both(table):
    dls = loaders(table)
    x, y = dls.valid.one_batch()
    assert x.keys() == ('image', 'signal')
    assert x.signal.shape[1:] == (1, 64)
    assert y.way.shape[1:] == (3,)
    missing = [v is None for v in dls.valid.items.way[:len(y.way)]]
    assert (~present(y.way)).tolist() == missing
    assert [p.kind for p in describe(dls).outputs.values()] == ['category', 'box', 'embedding']

def test_show_batch_writes_them(table):
    plt.close('all')
    loaders(table).valid.show_batch(max_n=4)
    seen = texts_of_figure()
    assert '64 samples' in seen
    assert 'way:' in seen

def test_it_trains_beside_a_category_and_a_box(trained):
    res = trained.evaluate()
    assert {'way_loss', 'way_mean_cosine', 'kind_accuracy', 'box_iou'} <= set(res)
    assert res['way_mean_cosine'] > .5    # the best constant answer scores .38
    assert res['way_loss'] == pytest.approx(1-res['way_mean_cosine'], abs=1e-4)

def test_the_signal_is_read(table):
    "The signal encodes the kind, so the learner predicts the kind without pictures"
    learn = learner(table, outputs=dict(kind=CategoryBlock, way=EmbeddingBlock))
    learn.fit(8)
    flat = learn.dls.valid.new()
    kept = learn.evaluate()['kind_loss']
    shuffled = table.copy()
    shuffled['signal'] = [None]*len(table)
    lost = learn.evaluate(dl=learn.dls.test_dl(shuffled.iloc[flat.items.index], with_labels=True))['kind_loss']
    assert kept < lost

def test_results_have_a_verdict(trained):
    plt.close('all')
    trained.show_results(max_n=6)
    seen = texts_of_figure()
    assert 'way: cosine' in seen
    assert '✓' in seen or '✗' in seen

def test_predict_one_and_many(trained, table):
    row = table.iloc[0]
    answer, _, values = trained.predict(row)
    assert answer.way.shape == (3,)
    assert values.way.norm().item() == pytest.approx(1, abs=1e-4)
    alone = trained.predict(row['signal'])[0]
    assert alone.way.shape == (3,)
    assert alone.box is absent
    again = trained.predict(dict(image=row['path'], signal=row['signal']))[2]
    torch.testing.assert_close(again.way, values.way, atol=1e-4, rtol=1e-4)
    df = trained.predict_df(table.iloc[:5], num_workers=0)
    assert list(df.columns) == ['kind', 'box', 'way']
    np.testing.assert_allclose(df.way[0], values.way, atol=1e-4)

def test_mixup_is_refused_as_declared(table):
    with pytest.raises(ValueError, match="MixUp cannot blend output '(box|way)'"): learner(table).fit(1, cbs=MixUp())
    mixed = learner(table, outputs=dict(kind=CategoryBlock))
    mixed.fit(1, cbs=MixUp())
    with pytest.raises(ValueError, match="MixUp cannot blend output 'way'"):
        learner(table, outputs=dict(kind=CategoryBlock, way=EmbeddingBlock)).fit(1, cbs=MixUp())

def test_tta_and_summary(trained):
    preds, targs = trained.tta(n=2)
    assert preds.way.shape == targs.way.shape
    assert 'signal' in str(trained.summary())

def test_export_and_load(trained, table, tmp_path):
    before = trained.predict(table.iloc[1])[2]
    trained.export(tmp_path/'kinds.pkl')
    after = load_learner(tmp_path/'kinds.pkl')
    with after.no_bar(): res = after.predict(table.iloc[1])[2]
    for n in before.keys(): torch.testing.assert_close(res[n], before[n], atol=1e-5, rtol=1e-5)

def test_a_wrong_size_is_told_with_its_row(table):
    bad = table.copy()
    bad.at[4, 'way'] = [1., 2.]
    with pytest.raises(ValueError, match=r"Output 'way' has 2 numbers, and 3 in the training split"):
        dls = loaders(bad)
        for _ in dls.train.new(shuffle=False, drop_last=False): pass    # includes the last items
        for _ in dls.valid: pass
