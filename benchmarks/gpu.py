"""Compare training on a GPU with a hand-written loop and with fastai: `python -m benchmarks.gpu`

The benchmark measures the images per second and the losses of each epoch for a hand-written loop (bf16, channels last,
fused AdamW, compiled), for fastai's `vision_learner`, and for this package at its defaults, compiled, and in each
precision. Then it runs 200 steps of each balancing method. Every way runs once in each round, in turn. `--tiny` runs
everything on any device in a minute. It only shows that the benchmark works: its figures mean nothing."""
import argparse, sys, tempfile, time
import pandas as pd, torch
from functools import partial
from statistics import median
from fastai.vision.all import *
from fastai_multi import *

class Throughput(Callback):
    "Images per second in the training batches after the first ones of an epoch. The device is idle at both ends"
    order = 100
    def __init__(self, skip): self.skip = skip
    def before_fit(self): self.rates = []
    def before_train(self): self.seen = 0
    def before_batch(self):
        if self.training and self.iter==self.skip:
            self.start = now()
            self.seen = 0
    def after_batch(self):
        if self.training and self.iter>=self.skip: self.seen += find_bs(self.yb)
    def after_train(self):
        if self.seen: self.rates.append(self.seen/(now()-self.start))

def now():
    "The time when the device has finished all its work"
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()

# Models and data

def multi_dls(args):
    tfms = dict(item_tfms=Resize(args.size), batch_tfms=aug_transforms())
    outputs = dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock)
    return MultiDataLoaders.from_csv(args.path, 'items.csv', image='file', text='caption', outputs=outputs,
                                     columns=dict(box=['x1','y1','x2','y2']), label_delim='|', seed=0, bs=args.bs,
                                     num_workers=args.workers, **tfms)

def multi(args, **kwargs):
    return multi_learner(multi_dls(args), getattr(models, args.arch), pretrained=False, **kwargs)

def plain(args, half=False):
    df = pd.read_csv(args.path/'items.csv')
    dls = ImageDataLoaders.from_df(df, args.path, fn_col='file', label_col='kind', seed=0, bs=args.bs,
                                   num_workers=args.workers, item_tfms=Resize(args.size), batch_tfms=aug_transforms())
    learn = vision_learner(dls, getattr(models, args.arch), pretrained=False)
    if half: learn.to_bf16()
    return learn

# Ways to train: each returns the losses by epoch and the images per second

def by_learner(args, make):
    learn = make(args)
    speed = Throughput(args.skip)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, args.lr, cbs=speed)
    return [float(v[1]) for v in learn.recorder.values], median(speed.rates)

def by_hand(args):
    "The package's network, losses and batches in a hand-written loop"
    learn = multi(args, precision='fp32', channels_last=False)
    device = learn.dls.device
    model = learn.model.to(device, memory_format=torch.channels_last)
    forward = model
    if not args.tiny: forward = torch.compile(model)
    opt = torch.optim.AdamW(model.parameters(), args.lr, fused=True)
    steps = args.epochs*len(learn.dls.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=steps)
    losses = []
    rates = []
    for _ in range(args.epochs):
        forward.train()
        seen = 0
        for i,(x,y) in enumerate(learn.dls.train):
            if i==args.skip:
                start = now()
                seen = 0
            with torch.autocast(device.type, dtype=torch.bfloat16): loss = learn.loss_func(forward(x), y)
            loss.backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
            seen += find_bs(y)
        rates.append(seen/(now()-start))
        losses.append(validated(forward, learn))
    return losses, median(rates)

def validated(forward, learn):
    "The mean validation loss"
    forward.eval()
    with torch.no_grad(): found = [learn.loss_func(forward(x), y) for x,y in learn.dls.valid]
    return float(torch.stack(found).mean())

ways = {'by hand': by_hand,
        'vision_learner fp32': partial(by_learner, make=plain),
        'vision_learner bf16': partial(by_learner, make=partial(plain, half=True)),
        'default': partial(by_learner, make=multi),
        'default, compiled': partial(by_learner, make=partial(multi, compile=True)),
        'fp32': partial(by_learner, make=partial(multi, precision='fp32', channels_last=False)),
        'fp16': partial(by_learner, make=partial(multi, precision='fp16')),
        'bf16': partial(by_learner, make=partial(multi, precision='bf16'))}

# Balancing

balancing = dict(sum=list, random=RandomWeighting, dwa=DynamicWeightAverage, geometric=GeometricMean,
                 uncertainty=UncertaintyWeighting, famo=FAMO, gradnorm=GradNorm,
                 upgrad=partial(GradientBalance, 'upgrad'), mgda=partial(GradientBalance, 'mgda'),
                 cagrad=partial(GradientBalance, 'cagrad'))

class Steps(Callback):
    "End a fit after a number of steps, and record their times and losses"
    order = 101
    run_valid = False
    def __init__(self, n): self.n = n
    def before_fit(self):
        self.times = []
        self.losses = []
    def before_batch(self): self.start = now()
    def after_batch(self):
        self.times.append(now()-self.start)
        self.losses.append(self.loss.item())
        if len(self.times)>=self.n: raise CancelFitException

def balanced(args, method):
    "Milliseconds per step, and the loss of the last steps"
    learn = multi(args)
    watch = Steps(args.steps)
    with learn.no_bar(), learn.no_logging(): learn.fit(1000, 1e-3, cbs=[*L(method()), watch])
    return 1000*median(watch.times[args.skip:]), sum(watch.losses[-10:])/10

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for n,v in dict(n=6000, size=128, bs=64, epochs=4, workers=8, seeds=2, steps=200, skip=5).items():
        p.add_argument(f'--{n}', type=int, default=v)
    p.add_argument('--arch', default='resnet18')
    p.add_argument('--lr', type=float, default=3e-3)
    p.add_argument('--path')
    p.add_argument('--tiny', action='store_true', help='run for a minute on any device, to test this file')
    args = p.parse_args()
    if args.tiny: vars(args).update(n=60, size=32, bs=8, epochs=1, workers=0, seeds=1, steps=12, skip=1)
    elif not torch.cuda.is_available(): sys.exit('benchmarks.gpu: this machine has no GPU, so nothing was measured')
    args.path = multi_shapes(Path(args.path or tempfile.mkdtemp())/'shapes', n=args.n, size=args.size, seed=0)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'
    print(name, 'torch', torch.__version__)
    print_ways(args)
    print_balancing(args)

def print_ways(args):
    rows = {}
    for seed in range(args.seeds):
        for name,way in ways.items():
            if args.tiny and 'compiled' in name: way = partial(by_learner, make=partial(multi, compile='eager'))
            set_seed(seed, reproducible=False)
            losses,rate = way(args)
            rows.setdefault(name, []).append((losses, rate))
            print(f"seed {seed} {name:<20} {rate:8.0f} images/s   valid loss by epoch "
                  f"{' '.join(f'{l:.3f}' for l in losses)}", flush=True)
    base = median(r for _,r in rows['by hand'])
    print('\nimages per second, and relative to the hand-written loop (goal of the default: .9)')
    for name,found in rows.items():
        rate = median(r for _,r in found)
        print(f"  {name:<20} {rate:8.0f}  {rate/base:5.2f}   last loss {' / '.join(f'{l[-1]:.3f}' for l,_ in found)}")

def print_balancing(args):
    print(f'\n{args.steps} steps of each balancing method: ms per step, relative to the sum, mean loss of the last ten')
    base = None
    for name,method in balancing.items():
        set_seed(0, reproducible=False)
        ms,loss = balanced(args, method)
        if base is None: base = ms
        print(f'  {name:<20} {ms:8.1f}  {ms/base:5.2f}   {loss:.3f}', flush=True)

if __name__ == '__main__': main()
