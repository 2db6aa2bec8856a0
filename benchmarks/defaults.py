"""Compare README's plain call with simple baselines on development sets: `python -m benchmarks.defaults [SET …]`

    python -m benchmarks.defaults                        run every set and every way, with three seeds
    python -m benchmarks.defaults --ablate               also run the default without each of its parts
    python -m benchmarks.defaults --jobs 16              use 16 processes, and a GPU if there is one
    python -m benchmarks.defaults --table                print the tables of the rows measured so far

Each row has one set, way, seed and output. Rows that are already in benchmarks/results/defaults.csv (`--out`) are not
run again."""
import argparse
import csv
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from typing import NamedTuple
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import absent, untyped
from fastai_multi.data.outputs import TagsPart, CategoryPart
from fastai_multi.data.numbers import NumberPart
from fastai_multi.models.text import BagEncoder
from fastai_multi.prior import complete_priors, linear_heads, wake
from fastai_multi.aside import LabelsAside
from fastai_multi.probe import FrozenBatchNorm, FrozenFeatures
from benchmarks.data import data_path
from benchmarks.sets import *

RESULTS = Path(__file__).parent/'results'/'defaults.csv'
COLUMNS = ['set', 'way', 'seed', 'output', 'metric', 'seconds']
WITH_TEXT = ('coco', 'fashion', 'drawn')
BOTH = ('image', 'text')
EPOCHS = 5

# The default, and the changes to it

class Change:
    "What a run changes in the default"
    def __init__(self, learner=None, # Arguments of `multi_learner`, or a function of the loaders that returns them
                 tune=None, # Arguments of `fine_tune`
                 start=None): # Called with the learner before training
        self.learner = learner or {}
        self.tune = tune or {}
        self.start = start

    def options(self, dls):
        if callable(self.learner): return self.learner(dls)
        return self.learner

def forget_prior(learn):
    "Start the heads in the usual way: with zero biases and random last layers"
    for head in linear_heads(learn).values():
        nn.init.zeros_(head.wide.bias)
        wake(head)

class NoScales(dict):
    "Scales that stay at 1"
    def __setitem__(self, k, v): pass

def forget_scales(learn):
    if hasattr(learn.loss_func, 'scales'): learn.loss_func.scales = NoScales()

def without_terms(dls):
    "Read the text as a bag of words, without the TF-IDF terms"
    part = describe(dls).inputs.get('text')
    if part is None: return {}
    return dict(text=BagEncoder(part.c, pad_id=part.pad_id))

class LiveBatchNorm(Callback):
    "Remove `FrozenBatchNorm`"
    order = -50
    def before_fit(self): self.learn.remove_cbs([cb for cb in self.learn.cbs if isinstance(cb, FrozenBatchNorm)])

class LinearOnly(Callback):
    "Keep the hidden layers of heads at zero"
    def _clear(self):
        for head in linear_heads(self.learn).values(): nn.init.zeros_(head.layers[-1].weight)
    def after_step(self): self._clear()

class TenthRate(Callback):
    "Reduce the weight of the hidden layers of all heads to a tenth"
    def before_fit(self):
        for head in linear_heads(self.learn).values(): head.rate.clamp_(max=.1)

class AllLabels(Callback):
    "Stop `LabelsAside` from holding out labels"
    order = -50
    def before_fit(self):
        for cb in self.learn.cbs:
            if isinstance(cb, LabelsAside): cb.names = []

class Average(Callback):
    "End with the mean of the weights over all steps"
    order = 80
    def before_fit(self):
        self.n = 0
        self.mean = None
    def before_batch(self):
        if self.training and self.mean is None: self._note()
    def after_step(self): self._note()
    def _note(self):
        new = self.learn.model.state_dict()
        if self.mean is None: self.mean = deepcopy(new)
        self.n += 1
        for k,v in new.items():
            if v.is_floating_point(): self.mean[k].lerp_(v, 1/self.n)
    def after_fit(self):
        if self.mean is not None: self.learn.model.load_state_dict(self.mean)

class Quiet(Callback):
    "Reduce the loss of outputs whose fit was not kept to a tenth"
    order = -60
    def before_fit(self):
        for cb in self.learn.cbs:
            if isinstance(cb, LabelsAside): self._hush(cb.names)
    def _hush(self, names):
        for n in names: self.learn.loss_func.scales[n] /= 10

def more_dropout(dls): return dict(heads={n: dict(p=.5) for n in describe(dls).outputs})

ABLATIONS = {
    'no probe': Change(tune=dict(probe=False, base_lr=6e-3)),
    'no prior, no probe': Change(tune=dict(probe=False, base_lr=6e-3), start=forget_prior),
    'no scales': Change(start=forget_scales),
    'no wide text': Change(without_terms),
    'no frozen batch norm': Change(tune=dict(cbs=LiveBatchNorm)),
    'no hidden layers': Change(tune=dict(cbs=LinearOnly)),
    'hidden layers / 10': Change(tune=dict(cbs=TenthRate)),
    'no labels aside': Change(tune=dict(cbs=AllLabels)),
    'rate 2e-3': Change(tune=dict(base_lr=2e-3)),
}
TRIALS = {
    'rate x 3': Change(tune=dict(base_lr=18e-3)),
    'rate x 2': Change(tune=dict(base_lr=12e-3)),
    'faster trunk': Change(tune=dict(lr_mult=30)),
    'no neck': Change(dict(neck=0)),
    'quiet': Change(tune=dict(cbs=Quiet)),
    'rate / 10': Change(tune=dict(base_lr=6e-4)),
    'trunk / 10': Change(tune=dict(lr_mult=1000)),
    'average': Change(tune=dict(cbs=Average)),
    'dropout': Change(more_dropout),
    'decay': Change(dict(wd=.3)),
    'frozen': Change(tune=dict(epochs=0, freeze_epochs=EPOCHS)),
}
CHANGES = {**ABLATIONS, **TRIALS}

# Runs

def learner_of(name, inputs, n=None, outputs=None, change=None):
    "The learner of README's plain call, with some inputs and outputs of a set"
    dls = loaders_of(name, inputs, n, outputs)
    arch = None
    if 'image' in inputs: arch = mobilenet_v2
    options = {} if change is None else change.options(dls)
    if arch is not None: options = {'weights': first(data_path('weights').glob('*.pth')), **options}
    return multi_learner(dls, arch, **options)

def trained(name, seed, inputs=BOTH, n=None, outputs=None, change=None, epochs=EPOCHS):
    "The learner of a plain call after `fine_tune`"
    set_seed(seed)
    learn = learner_of(name, inputs, n, outputs, change)
    tune = dict(epochs=epochs)
    if change is not None:
        if change.start is not None: change.start(learn)
        tune.update(change.tune)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(**tune)
    return learn

def train(*args, **kwargs):
    "The metrics of a plain call after `fine_tune`"
    return metrics_of(trained(*args, **kwargs))

def probed(name, n=None):
    "The metrics of the probe before training"
    learn = learner_of(name, BOTH, n)
    with learn.no_bar(), learn.no_logging(): learn.probe()
    return metrics_of(learn)

class Answer(NamedTuple):
    "The predictions and the labels of one output on the validation items"
    said:object
    true:object
    part:object
    def metric(self): return metric_of(*self)

def metrics_by(answers): return {o: a.metric() for o,a in answers.items()}

def constant(name, n=None):
    "Answer every item with the mean, the base rates or the most common class"
    learn = learner_of(name, BOTH, n)
    complete_priors(learn)
    targs = targets_of(learn)
    res = {}
    for o,prior in learn.priors.items():
        said = learn.tasks[o].shaped(prior.expand(len(targs[o]), -1))
        res[o] = Answer(said, targs[o], learn.output_parts[o])
    return res

def linear(name, inputs=BOTH, n=None):
    "Ridge and logistic regression of scikit-learn on the frozen features of these inputs"
    learn = learner_of(name, inputs, n)
    with learn.no_bar():
        train = FrozenFeatures(learn)
        valid = FrozenFeatures(learn, learn.dls.valid)
    res = {}
    for o,part in learn.output_parts.items():
        key = learn.model.wide_of[o]
        wide = deepcopy(learn.model.wides[key]).cpu()
        wide.fit(dense(train.wide[key]))
        x,x_valid = [torch.cat(list(wide.blocks(dense(f.wide[key])).values()), 1).numpy() for f in (train, valid)]
        y = train.targets[o]
        here = learn.tasks[o].labelled(y).numpy()
        said = fit_linear(part, x[here], y.numpy()[here], x_valid)
        res[o] = Answer(said, valid.targets[o], part)
    return res

def dense(xs): return {k: x.to_dense() if x.is_sparse else x for k,x in xs.items()}

def tfidf(name, n=None):
    "The same regressions on scikit-learn's TF-IDF of the texts alone"
    learn = learner_of(name, ('text',), n)
    column = read_set(name, n)[1]['text']
    texts = [dl.items[column].fillna('') for dl in (learn.dls.train, learn.dls.valid)]
    reader = TfidfVectorizer(ngram_range=(1, 2), min_df=2).fit(texts[0])
    x,x_valid = [reader.transform(t).toarray() for t in texts]
    targs = targets_of(learn)
    res = {}
    for o,part in learn.output_parts.items():
        here,y = labels_of(learn.dls.train, o)
        res[o] = Answer(fit_linear(part, x[here], y.numpy(), x_valid), targs[o], part)
    return res

def targets_of(learn):
    "The validation labels of each output"
    with learn.no_bar(): targs = learn.get_preds()[1]
    if isinstance(targs, Tensor): return {first(learn.output_parts): targs}
    return targs

def labels_of(dl, output):
    "Which items of a loader have a label, and their labels"
    column = dl.column(output)
    here = np.array([column[i] is not absent for i in range(len(column))])
    return here, torch.stack([untyped(column[i]) for i in here.nonzero()[0]])

def fit_linear(part, x, y, x_valid):
    "What scikit-learn's linear models predict for `x_valid`"
    if isinstance(part, CategoryPart): return fit_classes(x, y, x_valid, part.c)
    if not isinstance(part, TagsPart): return RidgeCV(np.logspace(-2, 3, 11)).fit(x, y).predict(x_valid)
    res = np.zeros((len(x_valid), y.shape[1]))
    for i in range(y.shape[1]):
        if 0<y[:,i].sum()<len(y): res[:,i] = LogisticRegression(C=10).fit(x, y[:,i]).predict_proba(x_valid)[:,1]
    return res

def fit_classes(x, y, x_valid, n_classes):
    "Logistic regression with the best of three penalties on a quarter of the items"
    inner = np.random.default_rng(0).random(len(y)) < .25
    best = 30.
    if len(set(y[~inner]))>1:
        scores = {c: LogisticRegression(C=c, max_iter=300).fit(x[~inner], y[~inner]).score(x[inner], y[inner])
                  for c in (3., 30., 300.)}
        best = max(scores, key=scores.get)
    model = LogisticRegression(C=best, max_iter=300).fit(x, y)
    res = np.zeros((len(x_valid), n_classes))
    res[:,model.classes_] = model.predict_proba(x_valid)
    return res

# Run the rows one after another, or several at once

class Job(NamedTuple):
    "A set, a way and a seed, and the output if the learner has only one"
    set:str
    way:str
    seed:str
    output:str=''
    n:int=None
    epochs:int=EPOCHS

def run(job):
    "Run a job and return its metrics by output, and its seconds"
    warnings.filterwarnings('ignore')
    start = time.perf_counter()
    res = metrics_of_job(job)
    return job, res, time.perf_counter()-start

def metrics_of_job(job):
    name,n = job.set,job.n
    if job.way=='constant': return metrics_by(constant(name, n))
    if job.way=='linear': return metrics_by(linear(name, BOTH, n))
    if job.way=='linear on image': return metrics_by(linear(name, ('image',), n))
    if job.way=='tfidf': return metrics_by(tfidf(name, n))
    if job.way=='probe': return probed(name, n)
    given = dict(n=n, epochs=job.epochs)
    if job.way=='image': return train(name, int(job.seed), ('image',), **given)
    if job.way=='text': return train(name, int(job.seed), ('text',), **given)
    if job.way=='alone': return train(name, int(job.seed), outputs=[job.output], **given)
    return train(name, int(job.seed), change=CHANGES.get(job.way), **given)

def jobs_of(name, seeds, changes, n=None, epochs=EPOCHS):
    "All jobs for one set"
    given = read_set(name, n)[1]
    has_text = name in WITH_TEXT
    once = ['constant', 'probe', 'linear']
    if has_text: once += ['linear on image', 'tfidf']
    ways = ['joint']
    if has_text: ways += ['image', 'text']
    ways += [c for c in changes if has_text or c!='no wide text']
    res = [Job(name, w, '-', '', n, epochs) for w in once]
    for seed in map(str, seeds):
        res += [Job(name, w, seed, '', n, epochs) for w in ways]
        if len(given['outputs'])>1: res += [Job(name, 'alone', seed, o, n, epochs) for o in given['outputs']]
    return res

def read(out):
    "The rows measured so far"
    if not out.exists(): return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(out, dtype=dict(seed=str))

def is_done(job, table):
    here = (table.set==job.set) & (table.way==job.way) & (table.seed==job.seed)
    if job.output: here = here & (table.output==job.output)
    return bool(here.any())

def write(out, job, res, seconds):
    is_new = not out.exists()
    with out.open('a', newline='') as f:
        table = csv.writer(f)
        if is_new: table.writerow(COLUMNS)
        for o,v in res.items(): table.writerow([job.set, job.way, job.seed, o, f'{v:.4f}', f'{seconds:.1f}'])
    print(job.set.ljust(8), f'{job.way} {job.seed}'.ljust(24), f'{seconds:5.0f} s ',
          ' '.join(f'{o} {v:.3f}' for o,v in res.items()), flush=True)

def one_thread(): torch.set_num_threads(1)

def run_all(jobs, n_processes, out):
    "Run the jobs and write the figures of each as soon as it is done"
    if n_processes<2:
        for job in jobs: write(out, *run(job))
        return
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(n_processes, mp_context=spawn, initializer=one_thread) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs]): report(out, done)

def report(out, done):
    "Write the figures of a job that is done, or print its error"
    error = done.exception()
    if error is None: write(out, *done.result())
    else: print(f'failed: {error!r}', flush=True)

# Tables

SIMPLE = ('constant', 'linear', 'linear on image', 'tfidf', 'image', 'text', 'alone')

def summary(table):
    "For each output, the default, the others, and whether the default is within two standard errors of the best"
    stats = table.groupby(['set', 'output', 'way'], sort=False).metric.agg(['mean', 'std', 'count']).reset_index()
    rows = []
    for (name,output),ways in stats.groupby(['set', 'output'], sort=False):
        ways = ways.set_index('way')
        if 'joint' in ways.index: rows.append(summary_row(name, output, ways))
    return pd.DataFrame(rows)

def summary_row(name, output, ways):
    error = (ways['std'].fillna(0)**2/ways['count']).pow(.5)
    others = ways.loc[[w for w in SIMPLE if w in ways.index], 'mean']
    best = others.idxmax()
    gap = ways['mean']['joint']-others[best]
    within = 2*(error['joint']**2+error[best]**2)**.5
    row = dict(set=name, output=output, joint=ways['mean']['joint'], spread=ways['std']['joint'])
    for w in ('probe', *SIMPLE): row[w] = ways['mean'].get(w, float('nan'))
    return {**row, 'best other': best, 'gap': gap, 'within': within, 'as good': bool(gap>=-within)}

def change_table(table):
    "For each output and change, how much better (+) or worse (-) than the default it is, in the metric's units"
    means = table.groupby(['set', 'output', 'way'], sort=False).metric.mean().unstack('way')
    changes = [c for c in CHANGES if c in means]
    return means[changes].sub(means['joint'], axis=0)

def show(table):
    with pd.option_context('display.width', 250, 'display.max_columns', 50, 'display.float_format', '{:.3f}'.format):
        print(summary(table).to_string(index=False))
        if any(c in set(table.way) for c in CHANGES): print('\nEach change minus the default:\n', change_table(table))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sets', nargs='*', default=list(SETS))
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--ablate', action='store_true', help='also run the default without each of its parts')
    p.add_argument('--try', dest='trials', nargs='*', help='also run these changes, or all: '+', '.join(CHANGES))
    p.add_argument('--only', nargs='*', help='run only these ways')
    p.add_argument('--jobs', type=int, default=1, help='the number of processes')
    p.add_argument('--n', type=int, help='use at most this many items of a large set')
    p.add_argument('--epochs', type=int, default=EPOCHS)
    p.add_argument('--out', type=Path, default=RESULTS)
    p.add_argument('--table', action='store_true', help='print the tables and measure nothing')
    args = p.parse_args()
    if not args.table: measure(args)
    show(read(args.out))

def measure(args):
    changes = list(ABLATIONS) if args.ablate else []
    if args.trials is not None: changes += [c for c in args.trials or TRIALS if c not in changes]
    table = read(args.out)
    jobs = []
    for name in args.sets: jobs += jobs_of(name, args.seeds, changes, args.n, args.epochs)
    jobs = [j for j in jobs if not is_done(j, table) and (not args.only or j.way in args.only)]
    jobs.sort(key=lambda j: (j.seed!='-', j.seed))            # one seed of all sets before the next seed
    if 'drawn' in args.sets: read_set('drawn', args.n)        # draw it once, before the processes start
    print(f'{len(jobs)} runs left', flush=True)
    run_all(jobs, args.jobs, args.out)

if __name__ == '__main__': main()
