"""Compare `label_plan` with random choice on drawn sets and on fashion: `python -m benchmarks.labels [SET …]`

    python -m benchmarks.labels                  run all sets with three budgets and three seeds
    python -m benchmarks.labels --table          print the table of the rows measured so far

A learner is probed on a few fully labelled items: its linear heads read the frozen features of a pretrained MobileNetV2
and TF-IDF. Then cells of the other training items, chosen in one of three ways, get their labels, and a new learner is
probed. Each output is scored on validation items: accuracy for categories, average precision for tags, and for numbers
how much smaller the absolute error is than that of a constant. In `frames`, a drawn set, 60 % of the training pictures
are copies of 15. Rows that are already in benchmarks/results/labels.csv are not run again."""
import argparse
import csv
import warnings
import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.uncertainty import SeenItems, Squeeze
from benchmarks.data import data_path
from benchmarks.sets import read_set

RESULTS = Path(__file__).parent/'results'/'labels.csv'
COLUMNS = ['set', 'way', 'budget', 'seed', 'output', 'labels', 'metric']
SIZES = dict(drawn=600, frames=600, fashion=1000)
BUDGETS = (150, 300, 600)
WAYS = ('random', 'least sure', 'label_plan')
START = 60           # items that have all labels at the start

def set_of(name):
    "The table of a set and the arguments of `from_df`; `frames` is the drawn set with copies in the training split"
    if name!='frames': return read_set(name, SIZES[name])
    df,given = read_set('drawn', SIZES[name])
    rng = np.random.default_rng(0)
    train = rng.permutation(df.index[~df.is_valid])
    repeated = train[:int(.6*len(train))]
    scenes = train[-15:]
    df.loc[repeated] = df.loc[rng.choice(scenes, len(repeated))].to_numpy()
    return df, given

class Pool:
    "A set whose training labels are hidden, except those of a few items"
    def __init__(self, name, seed):
        self.full,self.given = set_of(name)
        self.path = self.given.pop('path')
        if not (self.path/self.full.file[0]).exists(): self.given['folder'] = 'images'
        self.outputs = self.given['outputs']
        self.train = self.full.index[~self.full.is_valid]
        self.start = np.random.default_rng(seed).permutation(self.train)[:START]

    def table(self, cells=()): # Pairs of item and output
        "The table with the labels of the first items and of these cells"
        res = self.full.copy()
        for o in self.outputs:
            shown = [*self.start, *[i for i,n in cells if n==o]]
            res[o] = res[o].astype(object)
            res.loc[self.train.difference(shown), o] = None
        return res

    def learner(self, cells=()):
        "A probed learner of the items with a label"
        df = self.table(cells)
        df = df[df.is_valid | df[list(self.outputs)].notna().any(axis=1)]
        for o,block in self.outputs.items():
            if block is not CategoryBlock: continue
            seen = set(df[~df.is_valid][o].dropna())
            df = df.assign(**{o: [v if v in seen else None for v in df[o]]})    # `score` reads the whole table
        dls = MultiDataLoaders.from_df(df, self.path, valid_col='is_valid', num_workers=0, **self.given)
        set_seed(0)
        learn = multi_learner(dls, mobilenet_v2, weights=first(data_path('weights').glob('*.pth')))
        with learn.no_bar(), learn.no_logging(): learn.probe()
        return learn

    def open_cells(self):
        hidden = self.train.difference(self.start)
        return [(i, o) for i in hidden for o in self.outputs if pd.notna(self.full.loc[i, o])]

    def chosen(self, way, learn, n, seed):
        "The first `n` cells that this way chooses"
        cells = self.open_cells()
        if way=='random': return [cells[k] for k in np.random.default_rng(seed+100).permutation(len(cells))[:n]]
        hidden = self.table().loc[self.train.difference(self.start)]
        if way=='label_plan':
            here = set(cells)
            with learn.no_bar(): plan = label_plan(learn, hidden, 2*n)
            return [c for c in zip(plan['item'], plan.output) if c in here][:n]
        seen = SeenItems(learn, Squeeze())
        seen.add(learn.dls.test_dl(hidden))
        unsure = pd.DataFrame({o: u.numpy() for o,u in seen.close().unsure.items()}, index=hidden.index)
        return sorted([c for c in cells if c[1] in unsure], key=lambda c: -unsure.loc[c])[:n]

def score(pool, learn):
    "The score of each output on the validation items"
    truth = pool.full[pool.full.is_valid]
    with learn.no_bar(): said = learn.predict_df(truth, with_probs='all')
    res = {}
    for o,block in pool.outputs.items():
        here = truth[o].notna()
        if block is CategoryBlock: res[o] = float((said[o]==truth[o])[here].mean())
        elif block is MultiCategoryBlock: res[o] = tags_score(said[f'{o}_probs'][here], truth[o][here])
        else: res[o] = number_score(said[o][here], truth[o][here])
    return res

def tags_score(probs, truth):
    "The mean average precision of the tags"
    tags = sorted({t for words in truth for t in words.split('|') if t})
    found = [average_precision_score([t in words.split('|') for words in truth], [p.get(t, 0.) for p in probs])
             for t in tags]
    return float(np.mean(found))

def number_score(said, truth):
    "The share by which the mean absolute error is smaller than that of the median"
    truth = truth.astype(float)
    return float(1-(said.astype(float)-truth).abs().mean()/(truth-truth.median()).abs().mean())

def read(out):
    "The rows measured so far"
    if not out.exists(): return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(out)

def write(out, key, cells, res):
    "Write the figures of one run"
    is_new = not out.exists()
    with out.open('a', newline='') as f:
        table = csv.writer(f)
        if is_new: table.writerow(COLUMNS)
        for o,v in res.items(): table.writerow([*key, o, sum(n==o for _,n in cells), f'{v:.4f}'])
    print(*key, f'{np.mean(list(res.values())):.3f}', flush=True)

def measure(name, seed, out):
    "Run what is missing for one set and seed"
    table = read(out)
    done = set(zip(table.set, table.way, table.budget, table.seed))
    keys = [(name, w, b, seed) for w in WAYS for b in BUDGETS]
    if all(k in done for k in [(name, 'start', 0, seed), *keys]): return
    pool = Pool(name, seed)
    learn = pool.learner()
    if (name, 'start', 0, seed) not in done: write(out, (name, 'start', 0, seed), (), score(pool, learn))
    for way in WAYS:
        left = [b for b in BUDGETS if (name, way, b, seed) not in done]
        if not left: continue
        cells = pool.chosen(way, learn, max(left), seed)    # a longer plan begins with the shorter one
        for b in left: write(out, (name, way, b, seed), cells[:b], score(pool, pool.learner(cells[:b])))

def summary(table):
    "For each set, way and budget, the mean score's mean and spread over seeds, and its gain over random choice"
    runs = table.groupby(['set','way','budget','seed'], sort=False).metric.mean()
    rows = []
    for (name,way,budget),found in runs.groupby(level=[0,1,2], sort=False):
        row = dict(set=name, way=way, budget=budget, mean=found.mean(), spread=found.std())
        if way not in ('start', 'random'):
            gain = found.droplevel([0,1,2])-runs.loc[name, 'random', budget]
            row.update({'more than random': gain.mean(), 'spread of that': gain.std()})
        rows.append(row)
    return pd.DataFrame(rows)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sets', nargs='*', default=list(SIZES))
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--out', type=Path, default=RESULTS)
    p.add_argument('--table', action='store_true', help='print the table and measure nothing')
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    if not args.table:
        for seed in args.seeds:
            for name in args.sets: measure(name, seed, args.out)
    print(summary(read(args.out)).to_string(index=False, float_format='%.3f', na_rep=''))

if __name__=='__main__': main()
