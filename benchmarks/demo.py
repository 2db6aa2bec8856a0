"The README's ten lines on drawn shapes, and what each output scores beside a guess that never looks: `make demo`"
import argparse, time
from fastai.vision.all import *
from fastai_multi import *

def iou(a, b):
    "Overlap of paired boxes, each a row of `x1,y1,x2,y2`"
    area = lambda t: (t[:,2:]-t[:,:2]).clip(0).prod(1)
    both = area(np.concatenate([np.maximum(a[:,:2], b[:,:2]), np.minimum(a[:,2:], b[:,2:])], 1))
    return both / (area(a)+area(b)-both)

def blind_scores(train, valid):
    "Scores on `valid` of always saying the commonest class, the commoner answer to each tag, or the mean of `train`"
    tags = sorted({t for s in train.tags for t in s.split('|') if t})
    has = lambda df: np.array([[t in s.split('|') for t in tags] for s in df.tags])
    boxes = lambda df: df[['x1', 'y1', 'x2', 'y2']].to_numpy(float)
    return dict(kind_accuracy=(valid.kind == train.kind.mode()[0]).mean(), tags_accuracy_multi=((has(train).mean(0) > .5) == has(valid)).mean(),
                box_iou=iou(np.broadcast_to(boxes(train).mean(0), boxes(valid).shape), boxes(valid)).mean(),
                area_mae=(valid.area-train.area.mean()).abs().mean())

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--folder', type=Path, default=Path('demo'), help='where the pictures go, and the data')
    p.add_argument('--n', type=int, default=1000, help='pictures to draw')
    p.add_argument('--epochs', type=int, default=8)
    args = p.parse_args()
    start = time.perf_counter()
    set_seed(42)

    path = multi_shapes(args.folder/'shapes', n=args.n)
    dls = MultiDataLoaders.from_csv(path, 'items.csv', image='file', text='caption',
            outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock),
            columns=dict(box=['x1', 'y1', 'x2', 'y2']), label_delim='|', seed=42,
            item_tfms=Resize(96), batch_tfms=aug_transforms(do_flip=False))   # a mirrored picture would make 'on the left' a lie
    dls.show_batch(max_n=9)
    plt.savefig(args.folder/'batch.png', bbox_inches='tight')

    learn = multi_learner(dls, resnet18, depth=3, pretrained=False)   # from scratch: a drawn set needs no photographs' weights
    learn.fit_one_cycle(args.epochs, 4e-3)
    learn.show_results(max_n=9)
    plt.savefig(args.folder/'results.png', bbox_inches='tight')

    got,blind = learn.evaluate(),blind_scores(dls.train_ds.items, dls.valid_ds.items)
    print(f"\n{'on the validation items':<24}{'the model':>12}{'a blind guess':>16}")
    for name,b in blind.items(): print(f'{name:<24}{got[name]:>12.3f}{b:>16.3f}')
    print(f"\n{args.folder/'batch.png'} and {args.folder/'results.png'} are written. {time.perf_counter()-start:.0f} s in all.")
    worse = [n for n,b in blind.items() if (got[n] >= b if n.endswith('mae') else got[n] <= b)]
    if worse: sys.exit(f"No better than a blind guess: {', '.join(worse)}")

if __name__ == '__main__': main()
