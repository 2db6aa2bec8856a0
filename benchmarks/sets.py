"Read the development sets of `benchmarks.defaults` as the README does, and compute one metric for each output"
import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.data.outputs import CategoryPart, TagsPart
from fastai_multi.data.numbers import NumberPart
from fastai_multi.rowmetrics import box_iou
from benchmarks.data import data_path

def split(df, share, seed=0):
    "`df` with a random share of its rows marked for validation"
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
    df.loc[df.title.isin(df[~df.is_valid].title), 'is_valid'] = False          # no title is in both splits
    for c in classes:                                        # a class that is not in the training split is no label
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

FILLER = ' This picture was drawn by a program and says nothing else of interest to anybody.'

def drawn(n):
    "The table of drawn pictures. One caption in five is many times longer than the others"
    path = Path('demo')/f'defaults_{n}'
    if not (path/'items.csv').exists(): multi_shapes(path, n=n, size=64, seed=0)
    df = split(pd.read_csv(path/'items.csv'), .25)
    n_fillers = np.random.default_rng(1).choice([0, 0, 0, 0, 4], len(df))
    df['caption'] = [c+FILLER*k for c,k in zip(df.caption, n_fillers)]
    outputs = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock)
    return df, dict(path=path, image='file', text='caption', outputs=outputs, label_delim='|', item_tfms=Resize(64),
                    bs=32)

SETS = dict(coco=(coco, None), bccd=(bccd, None), fashion=(fashion, 800), cifar=(cifar, 2000), drawn=(drawn, 600))

def read_set(name, n=None):
    "The table of a development set (a large set has at most `n` items) and the arguments of `from_df`"
    make,usual = SETS[name]
    return make(n or usual)

def loaders_of(name, inputs=('image','text'), n=None, outputs=None):
    "The loaders of a development set as the README makes them, with some of its inputs and outputs"
    df,given = read_set(name, n)
    path = given.pop('path')
    if outputs is not None:
        given['outputs'] = {o: given['outputs'][o] for o in outputs}
        given['columns'] = {o: c for o,c in given.get('columns', {}).items() if o in outputs} or None
    for i in ('image','text'):
        if i not in inputs: given.pop(i, None)
    if 'image' not in inputs: given.pop('item_tfms')
    elif not (path/df.file[0]).exists(): given['folder'] = 'images'
    return MultiDataLoaders.from_df(df, path, valid_col='is_valid', num_workers=0, **given)

def metric_of(pred, targ, part):
    "Accuracy, mean average precision, negative mean absolute error in your units, or mean IoU of boxes"
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
    "One metric for each output on the validation items; higher is better"
    with learn.no_bar(): preds,targs = learn.get_preds()
    if isinstance(preds, Tensor): return {n: metric_of(preds, targs, p) for n,p in learn.output_parts.items()}
    return {n: metric_of(preds[n], targs[n], part) for n,part in learn.output_parts.items()}
