"""A table with a photo, two texts and a row of four categories and three numbers, each of which carries a part of the
answer: with all of them, a learner is better than with any subset"""
from itertools import combinations
import pytest
from fastai.vision.all import *
from fastai_multi import *

pytestmark = pytest.mark.usefixtures('one_thread')

WORDS = dict(new=1., used=0., broken=-1.)
CATS = [f'option{k}' for k in range(4)]
CONTS = [f'size{k}' for k in range(3)]
INPUTS = ['image','title','body','row']

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "Drawn pictures, dark or light, with texts and columns. The price adds up what each input says, in equal parts"
    path = multi_shapes(tmp_path_factory.mktemp('data')/'offers', n=400, size=32, seed=0)
    df = pd.read_csv(path/'items.csv')[['file','tags']]
    rng = np.random.default_rng(0)
    states = {n: rng.choice(list(WORDS), len(df)) for n in ('title','body')}
    df['title'] = [f'a {w} shape for sale' for w in states['title']]
    df['body'] = [f'its frame is {w} and its box is here' for w in states['body']]
    for n in CATS: df[n] = rng.choice(['yes','no'], len(df))
    for n in CONTS: df[n] = rng.normal(size=len(df))
    parts = [df.tags.fillna('').str.contains('dark').astype(float),
             *(pd.Series([WORDS[w] for w in s]) for s in states.values()),
             (df[CATS]=='yes').sum(axis=1) + df[CONTS].sum(axis=1)]
    df['price'] = sum((p-p.mean())/p.std() for p in parts)
    df['is_valid'] = df.index%4==0
    return path, df

def error(table, inputs):
    "The mean absolute error of a learner that is given some of the inputs"
    path,df = table
    given = dict(image=None)
    if 'image' in inputs: given = dict(image='file', item_tfms=Resize(32))
    texts = {n: n for n in inputs if n in ('title','body')}
    if texts: given['text'] = texts
    if 'row' in inputs: given.update(cat_names=CATS, cont_names=CONTS)
    set_seed(0)
    dls = MultiDataLoaders.from_df(df, path, outputs=dict(price=RegressionBlock), valid_col='is_valid', bs=32,
                                   num_workers=0, **given)
    learn = multi_learner(dls, simple_cnn(2, width=8, bn=True) if 'image' in inputs else None)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    return learn.evaluate()['price_mae']

def test_all_inputs_beat_every_subset(table):
    every = error(table, INPUTS)
    for n in range(1, len(INPUTS)):
        for inputs in combinations(INPUTS, n): assert every < .5*error(table, inputs), inputs
