"""Compare the default with simple models on the same validation items, with the uncertainty of that choice of items:
`python -m benchmarks.paired [SET …]`

A validation split of 70 to 200 items measures an accuracy only in steps of one item. For each output, the table shows
the default, the best of the simple models (constant, linear on frozen features of all inputs or of the photo alone,
TF-IDF), and their difference with its 95 % interval. The interval is a paired bootstrap: 2,000 draws of validation
items, the same items for both. Higher is better: errors count as negative.
`as good` says whether the interval includes zero or lies above it."""
import argparse
import warnings
import numpy as np
import pandas as pd
from benchmarks.defaults import *
from benchmarks.sets import SETS, metric_of

def default(name, seed):
    "The answers of README's plain call"
    learn = trained(name, seed)
    with learn.no_bar(): preds,targs = learn.get_preds()
    if isinstance(preds, Tensor): preds,targs = [{first(learn.output_parts): o} for o in (preds, targs)]
    return {o: Answer(preds[o], targs[o], part) for o,part in learn.output_parts.items()}

def simple(name):
    "The answers of the simple models: by name, then by output"
    res = dict(constant=constant(name), linear=linear(name))
    if name in WITH_TEXT: res.update({'linear on image': linear(name, ('image',)), 'tfidf': tfidf(name)})
    return res

def differences(one, other, n=2000, seed=0):
    "How much better `one` is than `other` on `n` draws of the same items, without the draws that have no label"
    rng = np.random.default_rng(seed)
    n_items = len(one.true)
    res = []
    for _ in range(n):
        rows = rng.integers(0, n_items, n_items)
        drawn = [Answer(np.asarray(a.said)[rows], np.asarray(a.true)[rows], a.part).metric() for a in (one, other)]
        res.append(drawn[0]-drawn[1])
    return np.array(res)[np.isfinite(res)]

def rows_of(name, seed, n=2000):
    "The rows of a set, one for each output"
    ways = simple(name)
    for o,answer in default(name, seed).items():
        metrics = {w: answers[o].metric() for w,answers in ways.items()}
        best = max(metrics, key=metrics.get)
        low,high = np.quantile(differences(answer, ways[best][o], n), [.025, .975])
        yield {'set': name, 'output': o, 'default': answer.metric(), 'best simple': metrics[best], 'which': best,
               'difference': answer.metric()-metrics[best], 'low': low, 'high': high, 'as good': bool(high>=0)}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sets', nargs='*', default=list(SETS))
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    rows = [row for name in args.sets for row in rows_of(name, args.seed)]
    print(pd.DataFrame(rows).to_string(index=False, float_format='{:.3f}'.format))

if __name__ == '__main__': main()
