"""Compare the learning rate that `lr_find` suggests with a sweep of rates: `python -m benchmarks.rates [SET …]`

The learners read only the texts and have no probe. The figures are the rate that `lr_find` suggests, and the validation
loss after a few epochs at rates that differ by a factor of three. Each output's loss is divided by that of its constant
answer, and the figure is the mean over outputs."""
import argparse
import warnings
import pandas as pd
from fastai.vision.all import *
from fastai_multi import *
from benchmarks.sets import loaders_of

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

def learner(name, seed):
    set_seed(seed)
    return multi_learner(loaders_of(name, ('text',)))

def cost(learn):
    "The mean of the outputs' validation losses, each relative to the constant answer from the training items"
    scores = learn.evaluate()
    return float(np.mean([scores[f'{n}_loss']*learn.loss_func.scales[n] for n in learn.tasks]))

def sweep(name, seed, epochs):
    "Print the suggested rate, and the cost after training at each rate"
    learn = learner(name, seed)
    with learn.no_bar(), learn.no_logging():
        found = learn.lr_find(show_plot=False, suggest_funcs=(valley, slide))
    res = dict(set=name, seed=seed, valley=found.valley, slide=found.slide)
    for lr in RATES:
        learn = learner(name, seed)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs, lr)
            res[f'{lr:g}'] = cost(learn)
    return res

def main():
    warnings.filterwarnings('ignore')
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sets', nargs='*', default=['coco', 'drawn', 'fashion'])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    p.add_argument('--epochs', type=int, default=5)
    args = p.parse_args()
    rows = []
    for name in args.sets:
        for seed in args.seeds:
            rows.append(sweep(name, seed, args.epochs))
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).round(4).to_string(index=False))

if __name__ == '__main__': main()
