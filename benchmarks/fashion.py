"""Predict five categories of real products from photo and title, with several seeds: `python -m benchmarks.fashion`

The run takes less than ten minutes on two CPU cores."""
import argparse, time
import numpy as np, pandas as pd, torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.models.image import image_encoder
from fastai_multi.models.heads import Neck, Pool
from benchmarks.data import data_path

OUTPUTS = ['gender', 'masterCategory', 'subCategory', 'baseColour', 'season']

def tfidf(df, is_valid):
    "The accuracy of TF-IDF and logistic regression on the titles, for each output"
    train = df[~is_valid]
    valid = df[is_valid]
    res = {}
    for o in OUTPUTS:
        t = train[train[o].notna()]
        v = valid[valid[o].notna()]
        vec = TfidfVectorizer(ngram_range=(1,2), sublinear_tf=True)
        clf = LogisticRegression(C=30, max_iter=2000).fit(vec.fit_transform(t.title), t[o])
        res[o] = (clf.predict(vec.transform(v.title)) == v[o]).mean()
    return res

def loaders(df, path, image, text, size, bs, workers=0, features=None):
    # a rare class may be in the validation split only
    outputs = {o: CategoryBlock(vocab=sorted(df[o].dropna().unique())) for o in OUTPUTS}
    return MultiDataLoaders.from_df(df, path, image='file' if image else None, text='title' if text else None,
                                    features=features, outputs=outputs, valid_col='is_valid', bs=bs,
                                    item_tfms=Resize(size) if image else None, num_workers=workers)

def picture_features(df, path, weights, size, bs):
    "The mean and maximum of the frozen network's last map for each picture. Without augmentation, one pass is enough"
    dls = loaders(df, path, True, False, size, bs)
    learn = multi_learner(dls, models.mobilenet_v2, weights=weights)    # adds the normalisation that the weights expect
    enc = image_encoder(models.mobilenet_v2, weights=weights).eval()
    pool = Pool()
    with torch.no_grad(): return torch.cat([pool(enc(b[0].as_subclass(Tensor))) for b in learn.dls.test_dl(df)]).numpy()

def from_photos(df, path, text, args):
    "A learner that reads the photos. Its pretrained trunk and the trunk's batch norm statistics are frozen"
    return multi_learner(loaders(df, path, True, text, args.size, args.bs), models.mobilenet_v2, weights=args.weights,
                         text='bag', neck=args.neck, heads={o: dict(p=args.p) for o in OUTPUTS}, train_bn=False,
                         cbs=BnFreeze)

def from_features(df, path, image, text, args):
    "A learner that reads the features of the pictures instead of the pictures"
    dls = loaders(df, path, False, text, args.size, args.bs, features='picture' if image else None)
    arch = {'features': partial(Neck, n_out=args.neck if text else args.image_neck)} if image else None
    return multi_learner(dls, arch, text='bag', heads={o: dict(p=args.p) for o in OUTPUTS})

def run(df, path, seed, image, text, args):
    "Train one configuration and return the accuracy of each output"
    set_seed(seed)
    learn = from_photos(df, path, text, args) if image and args.photos else from_features(df, path, image, text, args)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, args.lr)
    with learn.no_bar(): res = learn.evaluate()
    return {o: res[f'{o}_accuracy'] for o in OUTPUTS}

def verdict(runs):
    "Print by how many points `image and text` beats the better single input: for each seed's mean, and for each output"
    both = runs['image and text']
    best = pd.concat([runs['text only'], runs['image only']]).groupby(level=0).max()
    m = 100*(both['mean']-best['mean'])
    d = (100*(both-best)[OUTPUTS]).mean()
    print(f"image and text relative to the better single input: mean {m.mean():+.2f} points, sd {m.std():.2f}, "
          f"better in {(m>0).sum()} of {len(m)} seeds; "
          f"worst output {d.min():+.2f} ({d.idxmin()})")
    print('by seed: ' + ' '.join(f'{x:+.2f}' for x in m))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for n,v in dict(epochs=12, size=112, bs=64, neck=64, image_neck=256, limit=0).items():
        p.add_argument(f'--{n}', type=int, default=v)
    for n,v in dict(lr=1e-2, p=0.5).items(): p.add_argument(f'--{n}', type=float, default=v)
    p.add_argument('--seeds', type=int, nargs='+', default=range(10))
    p.add_argument('--photos', action='store_true',
                   help="read the photos in every epoch, as a first notebook would; "
                        "this takes about four minutes for each row and seed")
    args = p.parse_args()
    torch.set_num_threads(2)
    path = data_path('fashion')
    df = pd.read_csv(path/'items.csv')
    if args.limit: df = df.sample(args.limit, random_state=0).reset_index(drop=True)
    _,valid = RandomSplitter(0.2, seed=42)(df)
    df['is_valid'] = df.index.isin(valid)
    args.weights = next(data_path('weights').glob('mobilenet_v2*.pth'))
    t0 = time.perf_counter()
    fixed = {'majority class': {o: (df[df.is_valid][o].dropna() == df[~df.is_valid][o].mode()[0]).mean()
                                for o in OUTPUTS},
             'TF-IDF + logistic regression': tfidf(df, df.is_valid)}
    if not args.photos:
        df['picture'] = list(picture_features(df, path, args.weights, args.size, args.bs))
        print(f'features of {len(df)} pictures: {time.perf_counter()-t0:.0f} s', flush=True)
    runs = {n: {} for n in ('text only','image only','image and text')}
    for seed in args.seeds:
        for name in runs:
            t1 = time.perf_counter()
            runs[name][seed] = res = run(df, path, seed, 'image' in name, 'text' in name, args)
            print(f'seed {seed}, {name}: mean {100*np.mean(list(res.values())):.2f}, {time.perf_counter()-t1:.0f} s',
                  flush=True)
    runs = {n: pd.DataFrame(r).T for n,r in runs.items()}
    for r in runs.values(): r['mean'] = r.mean(axis=1)
    fixed = pd.DataFrame(fixed).T
    fixed['mean'] = fixed.mean(axis=1)
    table = {n: [f'{100*v:.1f}' for v in r] for n,r in zip(fixed.index, fixed.values)}
    table |= {n: [f'{100*a:.1f} ± {100*s:.1f}' for a,s in zip(r.mean(), r.std())] for n,r in runs.items()}
    print(pd.DataFrame(table, index=[*OUTPUTS,'mean']).T.to_string())
    verdict(runs)
    print(f'{time.perf_counter()-t0:.0f} s in total')
    return runs

if __name__ == '__main__': main()
