"Photo and title in, five categories out, on real products: `python -m benchmarks.fashion` (about ten minutes on two CPU cores)"
import argparse, time
import numpy as np, pandas as pd, torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from fastai.vision.all import *
from fastai_multi import *
from benchmarks.data import data_path

OUTPUTS = ['gender', 'masterCategory', 'subCategory', 'baseColour', 'season']

def tfidf(df, is_valid):
    "Accuracy of TF-IDF and logistic regression on the title, by output"
    train,valid = df[~is_valid],df[is_valid]
    res = {}
    for o in OUTPUTS:
        t,v = train[train[o].notna()],valid[valid[o].notna()]
        vec = TfidfVectorizer(ngram_range=(1,2), sublinear_tf=True)
        clf = LogisticRegression(C=30, max_iter=2000).fit(vec.fit_transform(t.title), t[o])
        res[o] = (clf.predict(vec.transform(v.title)) == v[o]).mean()
    return res

def loaders(df, path, image, text, size, bs, workers):
    outputs = {o: CategoryBlock(vocab=sorted(df[o].dropna().unique())) for o in OUTPUTS}   # rare classes may be in the validation part only
    return MultiDataLoaders.from_df(df, path, image='file' if image else None, text='title' if text else None, outputs=outputs,
        valid_col='is_valid', bs=bs, item_tfms=Resize(size), num_workers=workers,
        batch_tfms=aug_transforms(do_flip=True, max_rotate=5, max_warp=0., max_lighting=0.1) if image else None)

def run(df, path, image, text, weights, args):
    "Train one configuration; its accuracies by output and its seconds"
    set_seed(args.seed)
    t0 = time.perf_counter()
    dls = loaders(df, path, image, text, args.size, args.bs, args.workers)
    learn = multi_learner(dls, models.mobilenet_v2 if image else None, weights=weights if image else None, pretrained=image, text='bag', neck=args.neck)
    with learn.no_bar():
        if image: learn.fine_tune(args.epochs, args.lr, freeze_epochs=args.freeze_epochs)
        else:     learn.fit_one_cycle(args.text_epochs, args.text_lr)
    with learn.no_bar(): res = learn.evaluate()
    return {o: res[f'{o}_accuracy'] for o in OUTPUTS}, time.perf_counter()-t0

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for n,v in dict(epochs=5, freeze_epochs=1, text_epochs=8, size=112, bs=64, neck=128, seed=0, workers=0, limit=0).items(): p.add_argument(f'--{n}', type=int, default=v)
    for n,v in dict(lr=1e-2, text_lr=1e-2).items(): p.add_argument(f'--{n}', type=float, default=v)
    args = p.parse_args()
    torch.set_num_threads(2)
    path = data_path('fashion')
    df = pd.read_csv(path/'items.csv')
    if args.limit: df = df.sample(args.limit, random_state=0).reset_index(drop=True)
    _,valid = RandomSplitter(0.2, seed=42)(df)
    df['is_valid'] = df.index.isin(valid)
    weights = next(data_path('weights').glob('mobilenet_v2*.pth'))
    t0 = time.perf_counter()
    rows = {'majority class': {o: (df[df.is_valid][o].dropna() == df[~df.is_valid][o].mode()[0]).mean() for o in OUTPUTS},
            'TF-IDF + logistic regression': tfidf(df, df.is_valid)}
    for name,image,text in (('text only',False,True), ('image only',True,False), ('image and text',True,True)):
        rows[name],secs = run(df, path, image, text, weights, args)
        print(f'{name}: {secs:.0f} s')
    res = pd.DataFrame(rows).T
    res['mean'] = res.mean(axis=1)
    print((res*100).round(1).to_string())
    best = res.loc[['text only','image only']].max()
    both = res.loc['image and text']
    print(f"image and text against the better of the two: mean {100*(both['mean']-best['mean']):+.1f} points; "
          f"worst output {100*(both-best)[OUTPUTS].min():+.1f} ({(both-best)[OUTPUTS].idxmin()})")
    print(f'{time.perf_counter()-t0:.0f} s in all')
    return res

if __name__ == '__main__': main()
