"""Predict the category and the box of the largest object from a photo and its caption: `python -m benchmarks.coco`

The script overfits 16 items, then trains on all. With `python -m benchmarks.coco --objects`, the learner predicts all
objects and the tags of the photo: it trains on 32 photos with at most `--most` objects and is scored on the same
photos."""
import argparse, time
import pandas as pd, torch
from fastai.vision.all import *
from fastai_multi import *
from benchmarks.data import data_path

def largest(path):
    "A row for each photo with a caption and an object: its file, its caption, and the largest object's label and box"
    images = pd.read_csv(path/'images.csv')
    boxes = pd.read_csv(path/'boxes.csv')
    boxes = boxes[boxes.iscrowd==0].assign(area=lambda b: (b.x2-b.x1)*(b.y2-b.y1))
    top = boxes.sort_values('area', ascending=False).drop_duplicates('file')
    res = images.merge(top[['file','label','x1','y1','x2','y2']], on='file')
    return res.dropna(subset=['caption']).reset_index(drop=True)

def loaders(df, path, valid_col=None, size=96, bs=16, **kwargs):
    return MultiDataLoaders.from_df(df, path, image='file', text='caption',
                                    outputs=dict(label=CategoryBlock(vocab=sorted(df.label.unique())), box=BBoxBlock),
                                    columns=dict(box=['x1','y1','x2','y2']), valid_col=valid_col, bs=bs,
                                    item_tfms=Resize(size, 'squish'), num_workers=0, **kwargs)

def overfit(path, n=16, epochs=100, lr=3e-3, weights=None, seed=0):
    "A learner that trains and validates on the same `n` items"
    set_seed(seed)
    df = largest(path).iloc[:n]
    df = pd.concat([df.assign(is_valid=False), df.assign(is_valid=True)], ignore_index=True)
    dls = loaders(df, path, 'is_valid', bs=n)
    learn = multi_learner(dls, models.mobilenet_v2, weights=weights, pretrained=weights is not None)
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn

def with_objects(path, n, most):
    "The first `n` photos with a caption and 1 to `most` objects, and these objects; a photo's tags are its classes"
    images = pd.read_csv(path/'images.csv').dropna(subset=['caption'])
    boxes = pd.read_csv(path/'boxes.csv').rename(columns=dict(iscrowd='crowd'))
    counts = images.file.map(boxes.file.value_counts()).fillna(0)
    images = images[counts.between(1, most)].head(n)
    boxes = boxes[boxes.file.isin(images.file)]
    tags = boxes.groupby('file').label.agg(lambda o: '|'.join(sorted(set(o))))
    return images.assign(tags=images.file.map(tags)), boxes

def overfit_objects(path, n=32, most=6, epochs=100, lr=3e-3, weights=None, seed=0, size=160):
    "A learner of objects and tags that trains and validates on the same `n` photos"
    set_seed(seed)
    images,boxes = with_objects(path, n, most)
    print(f'{len(images)} photos, {len(boxes)} objects of {boxes.label.nunique()} classes', flush=True)
    df = pd.concat([images.assign(is_valid=False), images.assign(is_valid=True)], ignore_index=True)
    outputs = dict(objects=ObjectsBlock(kind=CategoryBlock), tags=MultiCategoryBlock)
    dls = MultiDataLoaders.from_df(df, path, image='file', text='caption', outputs=outputs, objects=boxes, bs=8,
                                   columns=dict(objects=dict(kind='label')), valid_col='is_valid', label_delim='|',
                                   item_tfms=Resize(size, 'squish'), num_workers=0)
    learn = multi_learner(dls, models.mobilenet_v2, weights=weights, pretrained=weights is not None,
                          heads=dict(objects=dict(width=64, convs=2)))
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn

def main_objects(args, path, weights):
    t0 = time.perf_counter()
    learn = overfit_objects(path, most=args.most, epochs=args.epochs, weights=weights)
    print({k: round(float(v), 3) for k,v in learn.evaluate().items()}, f'{time.perf_counter()-t0:.0f} s', flush=True)
    if not args.pictures: return
    args.pictures.mkdir(exist_ok=True, parents=True)
    learn.show_results(max_n=9)
    plt.savefig(args.pictures/'coco_objects.png', bbox_inches='tight')

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--pictures', type=Path, help='save the pictures of show_batch and show_results in this folder')
    p.add_argument('--objects', action='store_true', help='predict all objects and the tags of 32 photos')
    p.add_argument('--most', type=int, default=6, help='the most objects that a photo may have')
    args = p.parse_args()
    torch.set_num_threads(2)
    path = data_path('coco_mini')
    weights = next(data_path('weights').glob('mobilenet_v2*.pth'))
    if args.objects: return main_objects(args, path, weights)
    t0 = time.perf_counter()
    learn = overfit(path, weights=weights)
    print('16 items:', {k: round(float(v), 3) for k,v in learn.evaluate().items()}, f'{time.perf_counter()-t0:.0f} s')
    set_seed(0)
    learn = multi_learner(loaders(largest(path), path, seed=0, batch_tfms=aug_transforms(max_warp=0.)),
                          models.mobilenet_v2, weights=weights)
    with learn.no_bar(): learn.fine_tune(args.epochs, 3e-3, freeze_epochs=2)
    if args.pictures:
        args.pictures.mkdir(exist_ok=True, parents=True)
        learn.dls.show_batch(max_n=9)
        plt.savefig(args.pictures/'coco_batch.png', bbox_inches='tight')
        learn.show_results(max_n=9)
        plt.savefig(args.pictures/'coco_results.png', bbox_inches='tight')

if __name__ == '__main__': main()
