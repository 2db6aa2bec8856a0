"""The README's example on drawn shapes: `make demo`

It prints the score of each output, and the scores of a constant guess and of linear models of the captions' words."""
import argparse, time
from fastai.vision.all import *
from fastai_multi import *

def iou(a, b):
    "The IoU of paired boxes, each a row of `x1,y1,x2,y2`"
    area = lambda t: (t[:,2:]-t[:,:2]).clip(0).prod(1)
    both = area(np.concatenate([np.maximum(a[:,:2], b[:,:2]), np.minimum(a[:,2:], b[:,2:])], 1))
    return both / (area(a)+area(b)-both)

def f1(said, true): return 2*(said & true).sum() / (said.sum()+true.sum())

def blind_scores(train, valid):
    "Scores on `valid` of the constant answer that is best on `train`: the most common class, the mean box, ..."
    tags = sorted({t for s in train.tags for t in s.split('|') if t})
    has = lambda df: np.array([[t in s.split('|') for t in tags] for s in df.tags])
    always = lambda chosen, df: np.broadcast_to(chosen, (len(df), len(tags)))
    share = has(train).mean(0)
    chosen = max((share >= s for s in share), key=lambda c: f1(always(c, train), has(train)))
    boxes = lambda df: df[['x1', 'y1', 'x2', 'y2']].to_numpy(float)
    return dict(kind_accuracy=(valid.kind == train.kind.mode()[0]).mean(),
                tags_f1=f1(always(chosen, valid), has(valid)),
                box_iou=iou(np.broadcast_to(boxes(train).mean(0), (len(valid),4)), boxes(valid)).mean(),
                area_mae=(valid.area-train.area.mean()).abs().mean())

class Table:
    "A logger for a `Learner` that prints the total losses and the metrics of each epoch in at most 100 columns"
    def __init__(self, learn):
        self.learn = learn
        self.shown = None
    def __call__(self, row):
        names = list(self.learn.recorder.metric_names)
        if self.shown is None:
            own_losses = {f'{n}_loss' for n in self.learn.output_parts}
            self.shown = [i for i,n in enumerate(names) if n not in own_losses]
            self.widths = [max(len(names[i]), 7) for i in self.shown]
            self._line(names)
        self._line(row)
    def _line(self, row):
        cells = [f'{row[i]:.4g}' if isinstance(row[i], float) else str(row[i]) for i in self.shown]
        print('  '.join(c.rjust(w) for c,w in zip(cells, self.widths)), flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--folder', type=Path, default=Path('demo'), help='save the data and the pictures in this folder')
    p.add_argument('--n', type=int, default=1000, help='the number of pictures to draw')
    p.add_argument('--epochs', type=int, default=10)
    args = p.parse_args()
    start = time.perf_counter()
    set_seed(42)

    path = multi_shapes(args.folder/'shapes', n=args.n)
    dls = MultiDataLoaders.from_csv(path, 'items.csv', image='file', text='caption',
            outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock),
            columns=dict(box=['x1', 'y1', 'x2', 'y2']), label_delim='|', bs=32, seed=42,
            item_tfms=Resize(96), batch_tfms=aug_transforms(do_flip=False))   # 'left' would be wrong when mirrored
    dls.show_batch(max_n=9)
    plt.savefig(args.folder/'batch.png', bbox_inches='tight')

    # train from scratch: drawn shapes need no weights from photos
    learn = multi_learner(dls, resnet18, depth=3, pretrained=False)
    print(f'{len(dls.train_ds)} training pictures, {len(dls.valid_ds)} validation pictures\n')
    learn.logger = Table(learn)
    with learn.no_bar():
        learn.fit_one_cycle(args.epochs, 4e-3)
        learn.show_results(max_n=9)
    plt.savefig(args.folder/'results.png', bbox_inches='tight')

    with learn.no_bar(), learn.no_logging(): table = learn.evaluate(baseline=True)
    got = table.learner
    blind = blind_scores(dls.train_ds.items, dls.valid_ds.items)
    print(f"\n{'on the validation items':<24}{'the model':>12}{'a blind guess':>16}{'only the words':>16}")
    for name,b in blind.items():
        words = table.text[name]
        said = '-' if np.isnan(words) else f'{words:.4g}'    # a linear model of words predicts no boxes
        print(f'{name:<24}{got[name]:>12.4g}{b:>16.4g}{said:>16}')
    print(f"\nWrote {args.folder/'batch.png'} and {args.folder/'results.png'} after {time.perf_counter()-start:.0f} "
          "s in total.")
    worse = [n for n,b in blind.items() if (got[n] >= b if n.endswith('mae') else got[n] <= b)]
    if worse: sys.exit(f"These scores are no better than a blind guess: {', '.join(worse)}")

if __name__ == '__main__': main()
