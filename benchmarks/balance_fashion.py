"""Ways to balance five outputs of very different difficulty, on product photos: `python -m benchmarks.balance_fashion`
writes benchmarks/results/balance_fashion.csv"""
import argparse, time
import numpy as np, pandas as pd, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.models.heads import Neck
from benchmarks.data import data_path
from benchmarks.fashion import OUTPUTS, loaders, picture_features

OUT = Path(__file__).parent/'results'/'balance_fashion.csv'

# For each method, the callbacks of a fit. Fixed weights are tuned together with the learning rate
METHODS = {'sum': [{}], 'fixed weights, tuned': [dict(weights='level'), dict(weights='hard'), dict(weights='easy')],
           'uncertainty': [dict(cb=UncertaintyWeighting)], 'logs of losses': [dict(cb=GeometricMean)],
           'GradNorm': [dict(cb=GradNorm)], 'UPGrad, features': [dict(cb=partial(GradientBalance, 'upgrad'))],
           'UPGrad, parameters': [dict(cb=partial(GradientBalance, 'upgrad', level='parameters'))]}
LRS = [3e-3, 1e-2, 3e-2]
HARD = ['baseColour', 'season']

def weights_of(kind, learn):
    "Fixed weights of equal gradient norms, or three times as much for the hard or the easy outputs"
    if kind=='level':
        g = learn.task_report(n_batches=4).table.gradient
        return dict((g.median()/g).round(3))
    return {o: 3. if (o in HARD)==(kind=='hard') else 1. for o in OUTPUTS}

def run(df, path, seed, lr, args, cb=None, weights=None):
    "Train once and return each output's accuracy and the seconds"
    set_seed(seed)
    dls = loaders(df, path, False, False, args.size, args.bs, features='picture')
    learn = multi_learner(dls, {'features': partial(Neck, n_out=args.neck)}, heads={o: dict(p=.25) for o in OUTPUTS})
    if weights: learn.loss_func.weights.update(weights_of(weights, learn))
    t0 = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, lr, cbs=[cb()] if cb else None)
    secs = time.perf_counter()-t0
    with learn.no_bar(): res = learn.evaluate()
    return {**{o: res[f'{o}_accuracy'] for o in OUTPUTS}, 'mean': np.mean([res[f'{o}_accuracy'] for o in OUTPUTS]),
            'seconds': secs}

def tuned(inner, path, options, args):
    "The learning rate and the weights with the best mean accuracy on a fifth of the training split"
    tried = [(run(inner, path, 100, lr, args, **o)['mean'], lr, o) for o in options for lr in LRS]
    return max(tried, key=lambda t: t[0])[1:]

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for n,v in dict(epochs=10, size=112, bs=64, neck=64, threads=1, limit=0).items():
        p.add_argument(f'--{n}', type=int, default=v)
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    path = data_path('fashion')
    df = pd.read_csv(path/'items.csv')
    if args.limit: df = df.sample(args.limit, random_state=0).reset_index(drop=True)
    df['is_valid'] = df.index.isin(RandomSplitter(0.2, seed=42)(df)[1])
    args.weights = next(data_path('weights').glob('mobilenet_v2*.pth'))
    df['picture'] = list(picture_features(df, path, args.weights, args.size, args.bs))
    inner = df[~df.is_valid].reset_index(drop=True)
    inner['is_valid'] = inner.index.isin(RandomSplitter(0.2, seed=7)(inner)[1])
    rows = []
    for name,options in METHODS.items():
        lr,o = tuned(inner, path, options, args)
        for seed in args.seeds:
            rows.append(dict(method=name, lr=lr, weights=o.get('weights',''), seed=seed,
                             **run(df, path, seed, lr, args, **o)))
        last = pd.DataFrame(rows[-len(args.seeds):]).drop(columns=['seconds'])
        print(last.to_string(header=len(rows)==len(args.seeds), index=False, float_format='%.4f'), flush=True)
        OUT.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_csv(OUT, index=False, float_format='%.5g')
    print(summary(pd.DataFrame(rows)).to_string())

def summary(runs):
    "Mean and standard deviation over seeds in per cent, and time relative to the plain sum, for each method"
    g = runs.groupby('method', sort=False)
    m,s = g[[*OUTPUTS,'mean']].mean()*100,g[[*OUTPUTS,'mean']].std()*100
    res = m.round(1).astype(str)+' ± '+s.round(1).astype(str)
    res['lr'],t = g.lr.first(),g.seconds.median()
    res['time'] = (t/t['sum']).round(2)
    return res

if __name__ == '__main__': main()
