"""Measure depth and split on real pictures and write the tables to benchmarks/results:
`python -m benchmarks.depth_tables cifar|fashion|steps`

`cifar` and `fashion` take about twenty minutes each on one CPU core. `steps` times a training step of each
configuration for the products, in turns."""
import argparse, time, tempfile
import pandas as pd, torch
from statistics import median
from PIL import Image
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.learner import name_batch
from benchmarks.data import data_path

HERE = Path(__file__).resolve().parent/'results'
OUTPUTS = ['gender','masterCategory','subCategory','baseColour','season']
# The configurations for the products. MobileNetV2 has five stages. A fine-grained class needs the last ones, a colour
# may not.
CONFIGS = {'shared': {}, 'depth 4': dict(depth=4),
           'depth by output': dict(depth=dict(gender=5, masterCategory=4, subCategory=5, baseColour=3, season=4)),
           'after': dict(after=dict(subCategory='masterCategory')), 'split 4': dict(split=4), 'split 0': dict(split=0)}

def small(df, src, dst, size):
    "`df` with its pictures resized once, for all runs, to squares of `size` pixels in `dst`"
    for f in df.file:
        to = dst/f
        to.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(src/f) as im: im.convert('RGB').resize((size,size), Image.BILINEAR).save(to, quality=95)
    return df

def save(rows, file):
    "Write `rows` after each run, so that a stopped benchmark leaves a valid table"
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(file, index=False, float_format='%.6g')

def begun(file, args):
    "The rows of a table to continue"
    return pd.read_csv(file).to_dict('records') if args.resume and file.exists() else []

# CIFAR-10

ARCHS = {'simple_cnn': (simple_cnn, [2,3,4,6]), 'simple_cnn, bn': (partial(simple_cnn, bn=True), [2,3,4,6]),
         'resnet18': (models.resnet18, [1,2,3,4])}

def cifar_items(path, n):
    "The file, class and split of `n` training pictures, equally many of each class, and of the test pictures"
    rows = [(str(f.relative_to(path)), f.parent.name, part=='test') for part in ('train','test')
            for f in sorted((path/part).glob('*/*.jpg'))]
    df = pd.DataFrame(rows, columns=['file','label','is_valid'])
    return pd.concat([df[~df.is_valid].groupby('label').head(n//10), df[df.is_valid]], ignore_index=True)

def cifar(args):
    path = data_path('cifar10')
    file = args.out/'depth_cifar.csv'
    t0 = time.perf_counter()
    rows = begun(file, args)
    with tempfile.TemporaryDirectory() as d:
        df = small(cifar_items(path, args.n), path, Path(d), args.size)
        dls = MultiDataLoaders.from_df(df, d, image='file', outputs=dict(label=CategoryBlock), valid_col='is_valid',
                                       bs=args.bs, num_workers=0,
                                       batch_tfms=[Flip(), Normalize.from_stats(*cifar_stats)])
        for seed in args.seeds:
            for name,(arch,depths) in ARCHS.items():
                if any((r['arch'],r['seed'])==(name,seed) for r in rows): continue
                res = depth_finder(dls, arch, depths=depths, epochs=args.epochs, lr=args.lr, seeds=[seed],
                                   pretrained=False, metrics=dict(label=accuracy)).runs.assign(arch=name)
                rows += res.to_dict('records')
                save(rows, file)
                print(f'{time.perf_counter()-t0:.0f} s',
                      res[['arch','depth','seed','label_accuracy','ms']].to_string(index=False), sep='\n', flush=True)
    table = pd.DataFrame(rows).groupby(['arch','depth'], sort=False)
    means = table[['label_loss','label_accuracy','parameters','multiply_adds','ms']].mean()
    print(means.join(table.label_accuracy.agg(['min','max'])).to_string())

# Products

def fashion_items(path, limit):
    df = pd.read_csv(path/'items.csv')
    if limit: df = df.sample(limit, random_state=0).reset_index(drop=True)
    df['is_valid'] = df.index.isin(RandomSplitter(0.2, seed=42)(df)[1])
    # the model cannot learn a class that is not in the training split
    for o in OUTPUTS: df.loc[df.is_valid & ~df[o].isin(df[~df.is_valid][o]), o] = np.nan
    return df[['file','is_valid',*OUTPUTS]]

def fashion_learner(df, d, name, seed, args):
    "The learner of one configuration. It depends on the seed alone, not on earlier runs"
    set_seed(seed)
    dls = MultiDataLoaders.from_df(df, d, image='file', outputs={o: CategoryBlock for o in OUTPUTS},
                                   valid_col='is_valid', bs=args.bs, num_workers=0, seed=seed, batch_tfms=Flip())
    return multi_learner(dls, models.mobilenet_v2, weights=next(data_path('weights').glob('mobilenet_v2*.pth')),
                         **CONFIGS[name])

def fashion_run(learn, args):
    "Train and return a row with the metrics and the size of the model"
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(args.epochs, args.lr, freeze_epochs=1)
        res = learn.evaluate()
    params,macs = learn.tree().total
    acc = {f'{o}_accuracy': res[f'{o}_accuracy'] for o in OUTPUTS}
    return dict(acc, mean_accuracy=np.mean(list(acc.values())), valid_loss=res['valid_loss'], parameters=params,
                multiply_adds=macs)

def fashion(args):
    path = data_path('fashion')
    file = args.out/'depth_fashion.csv'
    t0 = time.perf_counter()
    rows = begun(file, args)
    with tempfile.TemporaryDirectory() as d:
        df = small(fashion_items(path, args.n), path, Path(d), args.size)
        for seed in args.seeds:
            for name in args.configs:
                if any((r['config'],r['seed'])==(name,seed) for r in rows): continue
                rows.append(dict(config=name, seed=seed,
                                 **fashion_run(fashion_learner(df, Path(d), name, seed, args), args)))
                save(rows, file)
                print(f"{time.perf_counter()-t0:.0f} s  {name:<16} seed {seed}  "
                      f"mean accuracy {rows[-1]['mean_accuracy']:.4f}", flush=True)
    table = pd.DataFrame(rows).groupby('config', sort=False)
    print(table.mean().drop(columns='seed').join(table.mean_accuracy.agg(['min','max'])).T.to_string())

def steps(args):
    "Write the milliseconds of a training step of each configuration, timed in turns so that they are comparable"
    path = data_path('fashion')
    took = {}
    with tempfile.TemporaryDirectory() as d:
        df = small(fashion_items(path, args.n or 400), path, Path(d), args.size)
        learns = {n: fashion_learner(df, Path(d), n, 0, args) for n in args.configs}
        b = learns[args.configs[0]].dls.train.one_batch()
        for l in learns.values():
            l.unfreeze()
            l.model.train()
        for r in range(args.rounds+1):
            for n,l in learns.items():
                t = time.perf_counter()
                x,y = name_batch(b[:1], b[1:], l.description)
                l.loss_func(l.model(*x), *y).backward()
                l.opt.set_hypers(lr=0.)
                l.opt.step()
                l.opt.zero_grad()
                if r: took.setdefault(n, []).append(1000*(time.perf_counter()-t))
    rows = [dict(config=n, ms=median(t), relative=median(a/b for a,b in zip(t, took[args.configs[0]])), rounds=len(t))
            for n,t in took.items()]
    save(rows, args.out/'depth_fashion_steps.csv')
    print(pd.DataFrame(rows).to_string(index=False))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('what', choices=['cifar','fashion','steps'])
    p.add_argument('--n', type=int, default=None,
                   help='training pictures (cifar) or pictures in total (fashion); 2000 by default')
    p.add_argument('--size', type=int, default=None, help='pixels; by default 32 for cifar and 64 for fashion')
    p.add_argument('--epochs', type=int, default=None)
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--bs', type=int, default=64)
    p.add_argument('--lr', type=float, default=None)
    p.add_argument('--out', type=Path, default=HERE)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--resume', action='store_true', help='keep the rows of the table and run the missing ones')
    p.add_argument('--configs', nargs='+', choices=[*CONFIGS], default=[*CONFIGS])
    args = p.parse_args()
    defaults = dict(cifar=dict(n=2000, size=32, epochs=5, lr=3e-3), fashion=dict(n=2000, size=64, epochs=3, lr=5e-3))
    defaults['steps'] = dict(defaults['fashion'], n=0)
    for k,v in defaults[args.what].items(): setattr(args, k, v if getattr(args, k) is None else getattr(args, k))
    torch.set_num_threads(args.threads)
    dict(cifar=cifar, fashion=fashion, steps=steps)[args.what](args)

if __name__ == '__main__': main()
