"""Fine-tuning on a GPU: precision, channels-last, fused AdamW, beside fastai's `vision_learner`:
`python -m benchmarks.gpu`"""
import argparse, sys, tempfile, time
import pandas as pd, torch
from statistics import median
from fastai.vision.all import *
from fastai.callback.fp16 import AMPMode
from fastai_multi import *

class Throughput(Callback):
    "Images a second of the training batches after the first five of an epoch, with the device idle at both ends"
    order = 100
    def _now(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return time.perf_counter()
    def before_fit(self): self.rates = []
    def before_train(self): self.seen = 0
    def before_batch(self):
        if self.training and self.iter==5:
            self.start = self._now()
            self.seen = 0
    def after_batch(self):
        if self.training and self.iter>=5: self.seen += find_bs(self.yb)
    def after_train(self):
        if self.seen: self.rates.append(self.seen/(self._now()-self.start))

def fused_adamw(params, lr, **kwargs):
    return OptimWrapper(params, torch.optim.AdamW, lr=lr, fused=torch.cuda.is_available())

def shapes(args):
    path = multi_shapes(Path(args.path or tempfile.mkdtemp())/'shapes', n=args.n, size=args.size, seed=0)
    return path, pd.read_csv(path/'items.csv')

def multi(args):
    path,_ = shapes(args)
    dls = MultiDataLoaders.from_csv(path, 'items.csv', image='file', text='caption',
                                    columns=dict(box=['x1','y1','x2','y2']), label_delim='|', seed=0,
                                    outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock,
                                                 area=RegressionBlock),
                                    bs=args.bs, num_workers=args.workers, item_tfms=Resize(args.size),
                                    batch_tfms=aug_transforms())
    return multi_learner(dls, getattr(models, args.arch), pretrained=False)

def plain(args):
    path,df = shapes(args)
    dls = ImageDataLoaders.from_df(df, path, fn_col='file', label_col='kind', seed=0, bs=args.bs,
                                   num_workers=args.workers, item_tfms=Resize(args.size), batch_tfms=aug_transforms())
    return vision_learner(dls, getattr(models, args.arch), pretrained=False)

def run(make, args, seed, precision='fp32', channels_last=False, fused=False):
    "Losses by epoch and images a second of one run"
    set_seed(seed, reproducible=False)
    learn = make(args)
    if fused: learn.opt_func = fused_adamw
    if channels_last:
        learn.to_channelslast(use_amp=precision!='fp32',
                              amp_mode=AMPMode(precision) if precision!='fp32' else AMPMode.FP16)
    elif precision=='fp16': learn.to_fp16()
    elif precision=='bf16': learn.to_bf16()
    speed = Throughput()
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(args.epochs, args.lr, freeze_epochs=1, cbs=speed)
    return [float(v[1]) for v in learn.recorder.values], median(speed.rates) if speed.rates else float('nan')

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for n,v in dict(n=6000, size=128, bs=64, epochs=4, workers=8, seeds=2).items():
        p.add_argument(f'--{n}', type=int, default=v)
    p.add_argument('--arch', default='resnet18')
    p.add_argument('--lr', type=float, default=3e-3)
    p.add_argument('--path')
    args = p.parse_args()
    if not torch.cuda.is_available(): sys.exit('benchmarks.gpu: no GPU here, nothing was measured')
    print(torch.cuda.get_device_name(), 'torch', torch.__version__)
    configs = {'vision_learner fp32': (plain, {}), 'vision_learner bf16': (plain, dict(precision='bf16')),
               'fp32': (multi, {}), 'fp16': (multi, dict(precision='fp16')), 'bf16': (multi, dict(precision='bf16')),
               'bf16, channels-last': (multi, dict(precision='bf16', channels_last=True)),
               'bf16, fused AdamW': (multi, dict(precision='bf16', fused=True))}
    rows = {}
    for seed in range(args.seeds):          # interleaved: every configuration once a round
        for name,(make,kw) in configs.items():
            losses,rate = run(make, args, seed, **kw)
            rows.setdefault(name, []).append((losses, rate))
            print(f"seed {seed} {name:<22} {rate:8.0f} images/s   valid loss by epoch "
                  f"{' '.join(f'{l:.3f}' for l in losses)}", flush=True)
    base = median(r for _,r in rows['vision_learner fp32'])
    print('\nimages a second, and relative to vision_learner fp32:')
    for name,rs in rows.items():
        print(f"  {name:<22} {median(r for _,r in rs):8.0f}  {median(r for _,r in rs)/base:5.2f}   final loss "
              f"{' / '.join(f'{l[-1]:.3f}' for l,_ in rs)}")

if __name__ == '__main__': main()
