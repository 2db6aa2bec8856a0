"""Measure what balancing costs: the time of a training step with each method, relative to the plain sum of losses:
`python -m benchmarks.balance`"""
import argparse, re, time, warnings
import torch
from statistics import median
from fastai.basics import *
from fastai_multi.losses import *
from fastai_multi.models.image import *
from fastai_multi.models.multi import *
from fastai_multi.callback.weights import *
from fastai_multi.callback.shared import *
from fastai_multi.callback.learned import *
from fastai_multi.callback.gradients import *

WEIGHTING = dict(fixed=partial(FixedWeights, o0=2.), random=RandomWeighting, dwa=DynamicWeightAverage,
                 geometric=GeometricMean, uncertainty=UncertaintyWeighting, famo=FAMO, gradnorm=GradNorm)
FEATURES = ('sum','upgrad','mgda','pcgrad','gradvac','alignedmtl','imtlg','cagrad','nashmtl')
PARAMETERS = ('sum','upgrad','mgda','pcgrad')

class Backward(Callback):
    "Time the backward pass"
    order = 100
    run_valid = False
    def before_fit(self): self.times = []
    def before_backward(self): self.start = time.perf_counter()
    def after_backward(self): self.times.append(time.perf_counter()-self.start)

def batch(args, n):
    torch.manual_seed(0)
    return (torch.randn(args.bs, 3, args.size, args.size), *[torch.randint(10, (args.bs,)) for _ in range(n)])

def started(model, b, n, cbs):
    "A learner in the middle of a fit. Its learning rate is 0, so all learners can share one model"
    items = list(zip(*b))
    dl = DataLoader(items, bs=len(items), num_workers=0)
    dls = DataLoaders(dl, dl)
    dls.n_inp = 1
    learn = Learner(dls, model, MultiLoss({f'o{i}': CrossEntropyLossFlat() for i in range(n)}),
                    opt_func=partial(SGD, mom=0.), lr=0., cbs=cbs)
    learn.create_opt()
    learn.n_epoch = 1
    learn.epoch = 0
    learn.dl = dls.train
    learn.n_iter = 10**6
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    return learn

def by_hand(model, b, agg):
    "TorchJD without fastai: `mtl_backward` for one output at a time, then `jac_to_grad`"
    from torchjd.autojac import mtl_backward, jac_to_grad
    opt = torch.optim.SGD(model.parameters(), lr=0.)
    lf = nn.CrossEntropyLoss()
    shared = model.shared_parameters()
    feats = SharedFeatures()
    def _step():
        feats.start(model)
        preds = model(b[0])
        mtl_backward([lf(p, y) for p,y in zip(preds, b[1:])], features=feats.stop(), parallel_chunk_size=1)
        jac_to_grad(shared, agg)
        opt.step()
        opt.zero_grad()
    return _step

def torchjd_upgrad():
    from torchjd.aggregation import UPGrad
    try: return UPGrad(),'quadprog'
    except ImportError:
        from fastai_multi.callback.aggregators import dual_cone
        return UPGrad(projector=dual_cone),'our solver, since quadprog is not installed'

def methods(model, b, n, args):
    "For each method, a function that takes one step; and the callback that times the backward pass of the plain sum"
    res = {}
    back = Backward()
    def add(name, *cbs):
        if not re.search(args.only, name) and not name.startswith('plain'): return
        try: learn = started(model, b, n, list(cbs))
        except ImportError as e: return print(f'  {name}: {e}')
        i = iter(range(10**6))
        res[name] = lambda: learn.one_batch(next(i), b)
    add('plain sum', back)
    add('plain sum again')
    for k,c in WEIGHTING.items(): add(f'weighting: {k}', c())
    for l,names in (('features', FEATURES), ('parameters', PARAMETERS)):
        for a in names: add(f'{l}: {a}', GradientBalance(a, level=l))
    add('TaskMonitor, every 10', TaskMonitor(every=10))
    agg,how = torchjd_upgrad()
    res['TorchJD by hand: upgrad'] = by_hand(model, b, agg)
    return res,back,how

def measure(args, n):
    b = batch(args, n)
    model = MultiModel(dict(image=image_encoder(args.arch)), {f'o{i}': 10 for i in range(n)}).train()
    steps,back,how = methods(model, b, n, args)
    times = {k: [] for k in steps}
    for r in range(args.rounds+1):
        for k,f in steps.items():
            t = time.perf_counter()
            f()
            if r: times[k].append(time.perf_counter()-t)
    t0 = median(times['plain sum'])
    f = 1 - median(back.times[1:])/t0
    floor = f + n*(1-f)
    print(f'\n{n} outputs: plain sum {t0*1e3:.0f} ms per step, backward share {1-f:.2f}; minimum for exact methods '
          f'{floor:.2f}; TorchJD with {how}')
    for k,v in times.items():
        ratio = median(x/y for x,y in zip(v, times['plain sum']))
        exact = k.startswith(('parameters','TorchJD'))
        print(f'  {k:<26}{ratio:6.2f}' + (f'   {ratio/floor:.2f} times the minimum' if exact else ''), flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for n,v in dict(size=128, bs=32, rounds=7, threads=1).items(): p.add_argument(f'--{n}', type=int, default=v)
    p.add_argument('--only', default='', help='run only the methods whose names match this regular expression')
    p.add_argument('--arch', default='resnet18')
    p.add_argument('--outputs', type=int, nargs='+', default=[2,3,5])
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter('ignore')
    print(f'torch {torch.__version__}, {args.threads} thread(s), {args.arch}, {args.bs} pictures of {args.size} px, '
          f'{args.rounds} interleaved rounds, median ratios to the plain sum of the same round')
    for n in args.outputs: measure(args, n)

if __name__ == '__main__': main()
