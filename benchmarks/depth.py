"""What depth costs: the time of a ResNet's forward and backward pass at each depth, relative to the whole
network and to the same network cut by hand: `python -m benchmarks.depth`"""
import argparse, time
import pandas as pd, torch, torchvision
from pathlib import Path
from statistics import median
from torch import nn
from torch.nn import functional as F
from fastai_multi.models.image import image_encoder
from fastai_multi.models.multi import MultiModel

STEM = ['conv1','bn1','relu','maxpool']

def by_hand(net, depth, n_out):
    "The stem and the first stages of torchvision's `net`, followed by average pooling and a linear head"
    mods = [getattr(net, n) for n in STEM+[f'layer{i+1}' for i in range(depth)]]
    c = [p for n,p in mods[-1].named_parameters() if 'bn' in n][-1].shape[0]
    return nn.Sequential(*mods, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, n_out))

def ours(net, depth, n_out):
    return MultiModel(dict(image=image_encoder(net, depth=depth)), dict(label=n_out), heads=dict(label=nn.Linear),
                      pool='avg', named=False)

def both(args, depth):
    "Our network, the one cut by hand, and that one again as a control: all three have the same weights"
    make = getattr(torchvision.models, args.arch)
    torch.manual_seed(0)
    hand = by_hand(make(weights=None), depth, args.n_out)
    torch.manual_seed(0)
    own = ours(make(weights=None), depth, args.n_out)
    torch.manual_seed(0)
    again = by_hand(make(weights=None), depth, args.n_out)
    lin = next(m for m in own.heads.modules() if isinstance(m, nn.Linear))
    lin.load_state_dict(hand[-1].state_dict())
    again[-1].load_state_dict(hand[-1].state_dict())
    return dict(ours=own.train(), hand=hand.train(), control=again.train())

def step(net, x, y):
    for p in net.parameters(): p.grad = None
    t = time.perf_counter()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    return time.perf_counter()-t, loss.item()

def measure(args):
    torch.manual_seed(1)
    x = torch.randn(args.bs, 3, args.size, args.size)
    y = torch.randint(args.n_out, (args.bs,))
    nets = {(d,k): m for d in range(1, 5) for k,m in both(args, d).items()}
    took = {k: [] for k in nets}
    for r in range(args.rounds+args.warm):
        # the network that is timed first in one round is timed last in the next
        order = list(nets) if r%2 else list(nets)[::-1]
        for k in order:
            t,loss = step(nets[k], x, y)
            if r>=args.warm: took[k].append(t)
            elif not r: assert abs(loss-took.setdefault(('loss',k[0]), loss))<1e-4, f'{k}: another network'
    ratio = lambda a,b: median(s/t for s,t in zip(took[a], took[b]))
    return pd.DataFrame([dict(depth=d, ms=1e3*median(took[d,'ours']), ms_hand=1e3*median(took[d,'hand']),
                              relative=ratio((d,'ours'), (4,'ours')), to_hand=ratio((d,'ours'), (d,'hand')),
                              control=ratio((d,'control'), (d,'hand')), rounds=args.rounds) for d in range(1, 5)])

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for n,v in dict(size=128, bs=8, rounds=15, warm=2, n_out=10, threads=1).items():
        p.add_argument(f'--{n}', type=int, default=v)
    p.add_argument('--arch', default='resnet18', choices=['resnet18','resnet34','resnet50'])
    p.add_argument('--out', type=Path, help='write the table to this file too')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, {args.threads} thread(s), {args.arch}, {args.bs} pictures of {args.size} px, '
          f'{args.rounds} interleaved rounds; median ratios within a round')
    res = measure(args)
    print(res.round(3).to_string(index=False))
    if args.out: res.to_csv(args.out, index=False, float_format='%.5g')
    worst = res.to_hand.max()
    print(f'ours takes at most {100*(worst-1):+.1f} % longer than the same network cut by hand; the control differs '
          f'from its twin by up to {100*(res.control-1).abs().max():.1f} %')

if __name__ == '__main__': main()
