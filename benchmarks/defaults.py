"""What README's plain call learns on development sets, beside simple baselines: `python -m benchmarks.defaults [SET …]`

Each row is one set, one way and one seed; rows that stand in benchmarks/results/defaults.csv are not run again."""
import argparse, csv
import numpy as np, pandas as pd, torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import average_precision_score
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.data.outputs import CategoryPart, TagsPart, NumberPart
from fastai_multi.rowmetrics import box_iou
from fastai_multi.probe import FrozenFeatures
from benchmarks.data import data_path

RESULTS = Path(__file__).parent/'results'/'defaults.csv'
INPUTS = {'joint': ('image','text'), 'image only': ('image',), 'text only': ('text',)}

def split(df, share, seed=0):
    "`df` with a random share of its rows for validation"
    df['is_valid'] = np.random.default_rng(seed).random(len(df)) < share
    return df

def coco(n):
    df = pd.read_csv(data_path('coco_mini')/'images.csv')
    counts = df.labels.dropna().str.split('|').explode().value_counts()
    often = set(counts[counts >= 12].index)
    df['tags'] = ['|'.join(t for t in str(labels).split('|') if t in often) or '|' for labels in df.labels]
    outputs = dict(tags=MultiCategoryBlock, n_objects=RegressionBlock, n_persons=RegressionBlock)
    return split(df, .3), dict(path=data_path('coco_mini'), image='file', text='caption', outputs=outputs,
                               label_delim='|', item_tfms=Resize(96), bs=16)

def fashion(n):
    classes = ['gender', 'masterCategory', 'subCategory', 'baseColour', 'season']
    df = pd.read_csv(data_path('fashion')/'items.csv')
    df = split(df.sample(n or len(df), random_state=0).reset_index(drop=True), .25)
    for c in classes:                                        # a class that training never saw is no label
        seen = set(df[~df.is_valid][c].dropna())
        df[c] = [v if v in seen else None for v in df[c]]
    outputs = {**{c: CategoryBlock for c in classes}, 'year': RegressionBlock}
    return df, dict(path=data_path('fashion'), image='file', text='title', outputs=outputs, item_tfms=Resize(96), bs=32)

def bccd(n):
    df = pd.read_csv(data_path('bccd')/'items.csv')
    boxes = pd.read_csv(data_path('bccd')/'boxes.csv')
    boxes['size'] = (boxes.x2-boxes.x1)*(boxes.y2-boxes.y1)
    largest = boxes.sort_values('size').groupby('file').last()
    corners = ['x1', 'y1', 'x2', 'y2']
    for c in corners: df[c] = df.file.map(largest[c])
    outputs = dict(n_rbc=RegressionBlock, n_wbc=RegressionBlock, n_platelets=RegressionBlock, box=BBoxBlock)
    return split(df, .3), dict(path=data_path('bccd'), image='file', outputs=outputs, columns=dict(box=corners),
                               item_tfms=Resize(128, ResizeMethod.Squish), bs=16)

def cifar(n):
    root = data_path('cifar10')
    files = sorted(root.glob('train/*/*.jpg'))
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:n]]
    parts = []
    for is_valid,fs in ((False, files), (True, sorted(root.glob('test/*/*.jpg')))):
        names = [str(f.relative_to(root)) for f in fs]
        parts.append(pd.DataFrame(dict(file=names, label=[f.parent.name for f in fs], is_valid=is_valid)))
    return pd.concat(parts, ignore_index=True), dict(path=root, image='file', outputs=dict(label=CategoryBlock), bs=64)

def drawn(n):
    path = multi_shapes(Path('demo')/'defaults', n=n, size=64, seed=0)
    outputs = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock)
    return split(pd.read_csv(path/'items.csv'), .25), dict(path=path, image='file', text='caption', outputs=outputs,
                                                           label_delim='|', item_tfms=Resize(64), bs=32)

SETS = dict(coco=(coco, None), bccd=(bccd, None), fashion=(fashion, 800), cifar=(cifar, 2000), drawn=(drawn, 600))

def loaders_of(name, inputs=('image','text'), n=None):
    "The loaders of a development set as README makes them, with some of its inputs"
    make,usual = SETS[name]
    df,given = make(n or usual)
    path = given.pop('path')
    for i in ('image','text'):
        if i not in inputs: given.pop(i, None)
    if 'image' not in inputs: given.pop('item_tfms')
    elif not (path/df.file[0]).exists(): given['folder'] = 'images'
    return MultiDataLoaders.from_df(df, path, valid_col='is_valid', num_workers=0, **given)

def metric_of(pred, targ, part):
    "Accuracy, mean average precision, minus the mean absolute error in the user's units, or mean overlap of boxes"
    pred = np.asarray(pred)
    targ = np.asarray(targ)
    if isinstance(part, CategoryPart):
        here = targ>=0
        return float((pred[here].argmax(1)==targ[here]).mean())
    if isinstance(part, TagsPart):
        used = [i for i in range(targ.shape[1]) if targ[:,i].any()]
        return float(np.mean([average_precision_score(targ[:,i], pred[:,i]) for i in used]))
    if isinstance(part, NumberPart):
        errors = np.abs(pred.reshape(len(pred))-targ.reshape(len(targ)))
        return float(-np.nanmean(errors)*float(part.std))
    return float(box_iou(tensor(pred), tensor(targ)).mean())

def metrics_of(learn):
    "A metric by output on the validation items; more is better"
    preds,targs = learn.get_preds()
    return {n: metric_of(preds[n], targs[n], part) for n,part in learn.output_parts.items()}

def phases(name, seed, inputs, epochs=5):
    "The metrics after each phase of `fine_tune`"
    set_seed(seed)
    dls = loaders_of(name, inputs)
    weights = first((data_path('weights')).glob('*.pth'))
    arch = mobilenet_v2 if 'image' in inputs else None
    learn = multi_learner(dls, arch, weights=weights)
    with learn.no_bar(), learn.no_logging():
        yield 'prior', metrics_of(learn)
        learn.probe()
        yield 'probe', metrics_of(learn)
        learn.fine_tune(epochs)
        yield 'all', metrics_of(learn)

def linear(name, inputs):
    "Ridge and logistic regression (scikit-learn) on the frozen features of these inputs"
    learn = multi_learner(loaders_of(name, inputs), mobilenet_v2, weights=first(data_path('weights').glob('*.pth')))
    with learn.no_bar():
        train = FrozenFeatures(learn)
        valid = FrozenFeatures(learn, learn.dls.valid)
    res = {}
    for n,part in learn.output_parts.items():
        if n not in learn.priors: continue
        key = learn.model.wide_of[n]
        dense = {k: x.to_dense() if x.is_sparse else x for k,x in train.wide[key].items()}
        learn.model.wides[key].fit(dense)
        x,x_valid = [_features(learn.model.wides[key], f.wide[key]) for f in (train, valid)]
        y = train.targets[n]
        here = learn.tasks[n].labelled(y).numpy()
        said = _fit(part, x[here], y.numpy()[here], x_valid)
        res[n] = metric_of(said, valid.targets[n], part)
    return res

def _features(wide, xs):
    blocks = wide.blocks({k: x.to_dense() if x.is_sparse else x for k,x in xs.items()})
    return torch.cat(list(blocks.values()), 1).numpy()

def _fit(part, x, y, x_valid):
    "What scikit-learn's linear models say of `x_valid`"
    if isinstance(part, NumberPart): return RidgeCV(np.logspace(-2, 3, 11)).fit(x, y).predict(x_valid)
    if isinstance(part, CategoryPart):
        clf = LogisticRegression(C=30, max_iter=500).fit(x, y)
        res = np.zeros((len(x_valid), part.c))
        res[:,clf.classes_] = clf.predict_proba(x_valid)
        return res
    res = np.zeros((len(x_valid), y.shape[1]))
    for i in range(y.shape[1]):
        if 0<y[:,i].sum()<len(y): res[:,i] = LogisticRegression(C=10).fit(x, y[:,i]).predict_proba(x_valid)[:,1]
    return res

def done():
    "What stands in the table: set, way and seed"
    if not RESULTS.exists(): return set()
    with RESULTS.open() as f: return {tuple(r[:3]) for r in csv.reader(f)}

def write(name, way, seed, res):
    new = not RESULTS.exists()
    with RESULTS.open('a', newline='') as f:
        table = csv.writer(f)
        if new: table.writerow(['set', 'way', 'seed', 'output', 'metric'])
        for o,v in res.items(): table.writerow([name, way, seed, o, f'{v:.4f}'])
    print(name.ljust(8), f'{way} {seed}'.ljust(20), ' '.join(f'{o} {v:.3f}' for o,v in res.items()), flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('sets', nargs='*', default=list(SETS))
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    args = p.parse_args()
    for name in args.sets:
        has_text = name in ('coco', 'fashion', 'drawn')
        ways = {w: i for w,i in INPUTS.items() if has_text or w=='joint'}
        for way,inputs in ways.items():
            if way!='text only' and (name, f'{way}: linear', '-') not in done():
                write(name, f'{way}: linear', '-', linear(name, inputs))
            for seed in args.seeds:
                if (name, f'{way}: all', str(seed)) in done(): continue
                for phase,res in phases(name, seed, inputs): write(name, f'{way}: {phase}', seed, res)

if __name__ == '__main__': main()
