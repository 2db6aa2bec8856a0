"""Compare the input path with a bare PIL loop and with plain fastai: `python -m benchmarks.input`

Each loop reads drawn JPEG pictures of 320x240, crops them at random to 128 px and makes batches of 64 with two outputs,
in floats. In each round every loop reads all the pictures once, and the order of the loops rotates from round to round.
A figure is the median over the rounds of the ratio within a round, so a machine that is busy for a while slows both
sides of the ratio. The bare loop runs twice in each round: the difference between the two is noise.

With `--cache`, the pictures are JPEG of 640x480, read at 128 and 224 px without workers, in processor time. The loops
read the bytes of each batch without batch transforms: with PIL, with plain fastai, with torchvision, from a cache in
memory, and from a cache on disk."""
import argparse, random, tempfile, time, warnings
from functools import partial
from pathlib import Path
from statistics import median, quantiles
import numpy as np, pandas as pd, torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset, DataLoader as TorchDataLoader, default_collate
from fastai.vision.all import *
from fastai_multi import *
from benchmarks.ways import rounds as timed

words = ('a the red blue green small large circle square bird car house on under beside left right of with two three '
         'old new').split()

def draw(path, n, seed=0, scale=1):
    "Draw `n` JPEG pictures of 320x240 times `scale` into `path`, and return their table with captions and labels"
    rng = np.random.RandomState(seed)
    for i in range(n):
        im = Image.fromarray(rng.randint(0, 255, (12,16,3), dtype=np.uint8))
        im = im.resize((320*scale,240*scale), Image.BICUBIC)
        d = ImageDraw.Draw(im)
        for _ in range(12):
            x,y,w,h = [scale*int(v) for v in (rng.randint(0,300), rng.randint(0,220), *rng.randint(5,80,2))]
            [d.ellipse, d.rectangle][rng.randint(2)]((x,y,x+w,y+h), fill=tuple(map(int, rng.randint(0,255,3))))
        noise = rng.randint(-12, 12, (240*scale,320*scale,3))
        Image.fromarray((np.asarray(im)+noise).clip(0,255).astype(np.uint8)).save(path/f'{i}.jpg', quality=90)
    df = pd.DataFrame(dict(file=[f'{i}.jpg' for i in range(n)], text=captions(n, rng)))
    for k in range(8): df[f'kind{k}'] = [f'c{o}' for o in rng.randint(0, 10, n)]
    df['area'] = rng.rand(n)
    return df

def captions(n, rng): return [' '.join(rng.choice(words, rng.randint(5,15))) for _ in range(n)]

class Bare(Dataset):
    "What you would write without any library: open, crop, resize, make a tensor"
    def __init__(self, path, df, outputs, size=128):
        self.size = size
        self.files = [str(path/f) for f in df.file]
        self.ys = [torch.tensor(df[o].astype('category').cat.codes.values).long() for o in outputs]
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        im = Image.open(self.files[i]).convert('RGB')
        w,h = im.size
        s = min(w,h)
        x,y = int(random.random()*(w-s)), int(random.random()*(h-s))
        im = im.crop((x,y,x+s,y+s)).resize((self.size,self.size), Image.BILINEAR)
        return torch.from_numpy(np.array(im)).permute(2,0,1), *(y[i] for y in self.ys)

def bare(path, df, outputs, bs, workers, size=128):
    dl = TorchDataLoader(Bare(path, df, outputs, size), bs, shuffle=True, drop_last=True, num_workers=workers)
    def epoch():
        for x,*y in dl: x.float().div_(255)
    return epoch

def epoch_of(dl):
    def epoch():
        for b in dl: pass
    return epoch

def fastai_loader(path, df, outputs, bs, workers, item_tfms=None):
    "The training loader of fastai's own blocks"
    dblock = DataBlock((ImageBlock, *[CategoryBlock for _ in outputs]), n_inp=1, splitter=IndexSplitter([0]),
                       item_tfms=item_tfms or Resize(128), get_x=ColReader('file', pref=path),
                       get_y=[ColReader(o) for o in outputs])
    return dblock.dataloaders(df, bs=bs, num_workers=workers, device='cpu').train

def fastai(*args): # Those of `fastai_loader`
    "The same loop with fastai's own blocks and loader"
    return epoch_of(fastai_loader(*args))

def ours(path, df, outputs, bs, workers, item_tfms=None, text=None, **kwargs):
    "The same loop with this package"
    df = df.assign(is_valid=[True]+[False]*(len(df)-1))
    dls = MultiDataLoaders.from_df(df, path, image='file', text=text,
                                   outputs={o: CategoryBlock if o.startswith('kind') else RegressionBlock
                                            for o in outputs},
                                   valid_col='is_valid', item_tfms=item_tfms or Resize(128), bs=bs, num_workers=workers,
                                   device='cpu', **kwargs)
    return epoch_of(dls.train)

def reading(path, df, item_tfms, **kwargs):
    "Read the bytes of all training batches of this package, which warms a cache"
    df = df.assign(is_valid=[True]+[False]*(len(df)-1))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')    # about what a cache holds if the first crop is random
        dls = MultiDataLoaders.from_df(df, path, image='file', outputs=dict(kind0=CategoryBlock), valid_col='is_valid',
                                       item_tfms=item_tfms, num_workers=0, device='cpu', **kwargs)
    return bytes_of(dls.train)

def bytes_of(dl):
    "Read all batches of a loader without its batch transforms"
    dl.before_iter()
    def epoch():
        for b in dl.create_batches(dl.get_idxs()): pass
    return epoch

def bare_reading(path, df, size, bs=64):
    "Read the bytes of all batches with PIL and torch alone"
    data = Bare(path, df, ['kind0'], size)
    def epoch():
        order = random.sample(range(len(data)), len(data))
        for i in range(0, len(data)-bs+1, bs): default_collate([data[j] for j in order[i:i+bs]])
    return epoch

def cached(rep, n, n_rounds):
    "Compare the cache with decoding, and the decoders with PIL alone"
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)
        df = draw(path, n+1, scale=2)
        for size in (128,224):
            print(f'\n640x480 to {size} px, {n} pictures, {n_rounds} rounds: speed, median (quartiles)')
            one_size(rep, path, df, size, n_rounds)

def one_size(rep, path, df, size, n_rounds):
    tfms = {'squish': [Resize(size, method='squish')], 'crop': [Resize(size)],
            'shrink': [Shrink(size), Resize(size)], 'shrink more': [Shrink(size*5//4), Resize(size)]}
    stores = dict(memory=lambda k: PictureCache(),
                  disk=lambda k: PictureCache('disk', folder=path/f'kept {size} {k}'))
    loops = {'bare': bare_reading(path, df, size), 'bare again': bare_reading(path, df, size)}
    for k,t in tfms.items():
        loops[k] = reading(path, df, t)
        for where,made in stores.items(): loops[f'{k} {where}'] = reading(path, df, t, cache=made(k))
    loops['fastai'] = bytes_of(fastai_loader(path, df, ['kind0'], 64, 0, Resize(size)))
    loops['torchvision'] = reading(path, df, tfms['crop'], decoder='torchvision')
    loops['torchvision memory'] = reading(path, df, tfms['shrink more'], decoder='torchvision', cache='memory')
    s = timed(loops, n_rounds)
    print(f"  bare PIL reads {len(df)/median(s['bare']):.0f} pictures per processor second")
    rep.ratio('bare against itself (the control)', s['bare'], s['bare again'])
    rep.ratio('plain fastai, relative to bare PIL', s['bare'], s['fastai'])
    rep.ratio('fastai_multi at its defaults, relative to bare PIL', s['bare'], s['crop'], 1.3)
    rep.ratio('fastai_multi at its defaults, relative to plain fastai', s['fastai'], s['crop'])
    rep.ratio("decoder='torchvision', relative to bare PIL", s['bare'], s['torchvision'], 1.3)
    for where in stores:
        rep.ratio(f"Resize(method='squish'), {where} cache, vs decoding", s['squish'], s[f'squish {where}'], 10)
        rep.ratio(f'Shrink({size}), Resize, {where} cache, vs decoding', s['shrink'], s[f'shrink {where}'], 10)
        rep.ratio(f'Shrink({size*5//4}), Resize, {where} cache, vs decoding', s['shrink more'],
                  s[f'shrink more {where}'])
        rep.ratio(f'Resize, random (whole pictures), {where} cache', s['crop'], s[f'crop {where}'])
    rep.ratio(f"the same Shrink({size*5//4}) with decoder='torchvision'", s['shrink more'], s['torchvision memory'])

class Invert(Transform):
    "A transform of your own, which no loader knows"
    def __init__(self, order): super().__init__(order=order)
    def encodes(self, x:PILImage): return PILImage.create(np.asarray(x)[:,::-1].copy())

def rounds(loops, n_rounds):
    "Seconds of each loop in each round. The order rotates"
    names = list(loops)
    res = {k: [] for k in names}
    for k in names: loops[k]()    # warm up: files in the page cache, labels encoded
    for r in range(n_rounds):
        for k in names[r%len(names):]+names[:r%len(names)]:
            t = time.perf_counter()
            loops[k]()
            res[k].append(time.perf_counter()-t)
    return res

def spread(v):
    q = quantiles(v, n=4) if len(v)>1 else [v[0]]*3
    return f'{median(v):6.3f}   ({q[0]:.3f} to {q[2]:.3f})'

class Report:
    "Print lines and remember which goals were missed"
    def __init__(self): self.missed = []
    def ratio(self, what, num, den, at_least=None):
        "Print the speed of `den`'s loop relative to `num`'s: above 1 is faster"
        v = [a/b for a,b in zip(num, den)]
        if at_least is None: self.line(what, spread(v))
        else: self.line(what, spread(v), median(v)>=at_least, f'at least {at_least}')
    def line(self, what, figure, ok=True, target=None):
        if not ok: self.missed.append(what)
        verdict = ''
        if target is not None: verdict = f'PASS ({target})' if ok else f'miss ({target})'
        print(f'  {what:<58}{figure:<32}{verdict}', flush=True)

def finish(rep):
    "Print which goals were missed"
    print(f"\n{'all goals met' if not rep.missed else 'missed: '+'; '.join(rep.missed)}")

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=768, help='pictures per epoch')
    ap.add_argument('--rounds', type=int, default=9, help='paired rounds')
    ap.add_argument('--workers', type=int, nargs='*', default=[0,2])
    ap.add_argument('--bs', type=int, default=64)
    ap.add_argument('--cache', action='store_true', help='measure the cache and the decoders instead')
    ap.add_argument('--captions', type=int, default=20000)
    args = ap.parse_args()
    torch.set_num_threads(1)
    rep = Report()
    if args.cache:
        cached(rep, args.n, args.rounds)
        return finish(rep)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)
        df = draw(path, args.n+1)
        more = [f'kind{k}' for k in range(2,8)]
        print(f'{args.n} pictures per epoch, {args.rounds} rounds, batches of {args.bs}, one thread; '
              'median (quartiles) of the ratios within a round')
        for w in args.workers:
            two = ['kind0','kind1']
            o = partial(ours, path, df, bs=args.bs, workers=w)
            f = partial(fastai, path, df, two, args.bs, w)
            r = rounds({'bare': bare(path, df, two, args.bs, w), 'bare again': bare(path, df, two, args.bs, w),
                        'fastai': f(), 'ours': o(two), 'ours, image and text': o(two, text='text'),
                        'ours, eight outputs': o(two+more), 'ours, two threads': o(two, threads=2),
                        'fastai, pad': f(Resize(128, method='pad')),
                        'ours, pad': o(two, item_tfms=Resize(128, method='pad')),
                        'fastai, own before': f([Invert(0), Resize(128)]),
                        'ours, own before': o(two, item_tfms=[Invert(0), Resize(128)]),
                        'fastai, own after': f([Resize(128), Invert(2)]),
                        'ours, own after': o(two, item_tfms=[Resize(128), Invert(2)])},
                       args.rounds)
            seen = args.n//args.bs*args.bs
            print(f"\n{w} workers: bare PIL reads {seen/median(r['bare']):.0f} pictures per second")
            print(f"  {'speed relative to the bare loop':<58}")
            rep.ratio('bare against itself (the control)', r['bare'], r['bare again'])
            rep.ratio('plain fastai', r['bare'], r['fastai'])
            rep.ratio('fastai_multi', r['bare'], r['ours'], 0.9)
            rep.ratio('fastai_multi, threads=2', r['bare'], r['ours, two threads'])
            rep.ratio('fastai_multi, image and text, relative to image only', r['ours'], r['ours, image and text'],
                      0.9 if w else 0.95)
            rep.ratio('padding instead of cropping, relative to fastai', r['fastai, pad'], r['ours, pad'], 1.5)
            rep.ratio('a transform of your own before Resize, relative to fastai', r['fastai, own before'],
                      r['ours, own before'], 1.)
            rep.ratio('a transform of your own after Resize, relative to fastai', r['fastai, own after'],
                      r['ours, own after'], 1.)
            ms = [(b-a)/seen/len(more)*1000 for a,b in zip(r['ours'], r['ours, eight outputs'])]
            rep.line('each further output, ms per item', spread(ms), median(ms)<=0.05, 'at most 0.05')
        if args.captions:
            many = pd.DataFrame(dict(text=captions(args.captions, np.random.RandomState(1)),
                                     kind0=['a','b']*(args.captions//2)))
            t = time.perf_counter()
            dls = MultiDataLoaders.from_df(many, path, text='text', image=None, outputs=dict(kind0=CategoryBlock),
                                           bs=args.bs, device='cpu')
            s = time.perf_counter()-t
            print()
            rep.line(f'{args.captions} captions prepared, in seconds', f'{s:6.3f}', s<=1.5*args.captions/20000,
                     'at most 1.5 for 20000')
    finish(rep)

if __name__ == '__main__': main()
