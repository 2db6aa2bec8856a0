"""Compare objects with torchvision's own FCOS: `python -m benchmarks.objects` (blood cells, `bccd`, minutes on a core)

In this comparison, both detectors have the same backbone and weights, feature pyramid, towers, pictures, batches,
optimizer, schedule and seed; torchmetrics computes the mAP of both. `--epochs`, `--size` and `--seeds` change the run.

`python -m benchmarks.objects looked_for` trains on two halves of a drawn set in which only some classes were annotated,
with and without the column that says so. `python -m benchmarks.objects shapes --epochs 12 --bs 16 --lr 1e-2 --seeds 3`
trains a class, tags, a mask and objects with three outputs on 2,000 drawn scenes of 96 by 96 pixels: with all labels,
with half of the objects' outputs missing, and with half of the classes annotated in each picture, with and without the
column. Twelve trainings take an hour and a half on a core.
"""
import argparse, time
from collections import OrderedDict
import pandas as pd, torch
from fastai.vision.all import *
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from fastai_multi import *
from fastai_multi.models.objects import levels_of
from fastai_multi.objectmetrics import in_thousands, new_average_precision
from benchmarks.data import data_path

def loaders(size, bs, seed):
    path = data_path('bccd')
    return MultiDataLoaders.from_csv(path, image='file', outputs=dict(objects=ObjectsBlock(kind=CategoryBlock)),
                                     objects='boxes.csv', columns=dict(objects=dict(kind='label')), valid_pct=.3,
                                     seed=seed, item_tfms=Resize(size, ResizeMethod.Squish), bs=bs, num_workers=0)

class Pyramid(nn.Module):
    "The stages of an encoder and a feature pyramid, in the form that torchvision's detectors take"
    def __init__(self, encoder, width):
        super().__init__()
        self.encoder = encoder
        self.at = levels_of(encoder.strides, 8)
        self.fpn = FeaturePyramidNetwork([encoder.channels[i] for i in self.at], width, LastLevelP6P7(width, width))
        self.out_channels = width
    def forward(self, x):
        maps = self.encoder.feature_maps(x).maps()
        return self.fpn(OrderedDict((str(i), maps[i]) for i in self.at))

def torchvision_fcos(encoder, n_classes, size, stats, width):
    "torchvision's FCOS on this encoder"
    sizes = ((8,),(16,),(32,),(64,),(128,))
    mean,std = stats
    return FCOS(Pyramid(encoder, width), n_classes, min_size=min(size), max_size=max(size), image_mean=[0,0,0],
                image_std=[1,1,1], score_thresh=.05, anchor_generator=AnchorGenerator(sizes, ((1.,),)*5))

def boxes_in_pixels(y, size):
    "The objects of a batch in the form that torchvision takes"
    w,h = size
    res = []
    for box,kind in zip(y.objects.box, y.objects.kind):
        here = kind!=-100
        scale = tensor([w,h,w,h])/2
        res.append(dict(boxes=(untyped(box)[here]+1)*scale, labels=untyped(kind)[here]))
    return res

def untyped(t): return t.as_subclass(Tensor)

def train(model, loss_of, dls, epochs, lr):
    "Train either detector, and return the seconds of a step: the mean of the fastest half"
    opt = torch.optim.AdamW(model.parameters(), lr, weight_decay=.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs*len(dls.train), pct_start=.25)
    times = []
    for _ in range(epochs):
        model.train()
        for x,y in dls.train:
            start = time.perf_counter()
            loss = loss_of(untyped(x), y)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.)
            opt.step()
            sched.step()
            times.append(time.perf_counter()-start)
    times = sorted(times)[:len(times)//2]
    return sum(times)/len(times)

def score(predict, dls, size):
    "The mAP of `predict`, which returns boxes in [-1,1], scores and labels for each picture of a batch"
    metric = new_average_precision()
    for x,y in dls.valid:
        with torch.no_grad(): preds = predict(untyped(x))
        targs = [dict(boxes=in_thousands(untyped(b)[k!=-100]), labels=untyped(k)[k!=-100])
                 for b,k in zip(y.objects.box, y.objects.kind)]
        metric.update([dict(boxes=in_thousands(b), scores=s, labels=l) for b,s,l in preds], targs)
    res = metric.compute()
    return float(res['map_50']), float(res['map'])

def ours(dls, args, size, weights):
    learn = multi_learner(dls, models.mobilenet_v2, weights=weights, heads=dict(objects=dict(width=args.width)))
    task,model,loss = learn.tasks['objects'],learn.model,learn.loss_func
    step = train(model, lambda x,y: loss(model(x), y), dls, args.epochs, args.lr)
    model.eval()
    def predict(x):
        boxes,scores,labels,_ = task.detector(model(x).objects)
        return [(b[l>=0],s[l>=0],l[l>=0]) for b,s,l in zip(boxes, scores, labels)]
    return step, *score(predict, dls, size)

def theirs(dls, args, size, weights):
    encoder = image_encoder(models.mobilenet_v2, weights=weights)
    model = torchvision_fcos(encoder, len(dls.vocab['objects.kind']), size, encoder.stats, args.width)
    def loss_of(x, y): return sum(model(list(x), boxes_in_pixels(y, size)).values())
    step = train(model, loss_of, dls, args.epochs, args.lr)
    model.eval()
    w,h = size
    def predict(x):
        return [(o['boxes']/tensor([w,h,w,h])*2-1, o['scores'], o['labels']) for o in model(list(x))]
    return step, *score(predict, dls, size)

def drawn(n, size=64, folder='/tmp/fastai_multi_objects'):
    "Draw shapes with masks, and return their folder, the table of pictures and the table of objects"
    path = multi_shapes(Path(folder)/f'{n}_{size}', n=n, size=size, seed=0, masks=True)
    return path, pd.read_csv(path/'items.csv'), pd.read_csv(path/'boxes.csv')

def drawn_loaders(path, items, boxes, outputs, columns, size=64, bs=8):
    return MultiDataLoaders.from_df(items, path, image='file', objects=boxes, outputs=outputs, item_tfms=Resize(size),
                                    bs=bs, seed=0, columns=dict(objects=columns), label_delim='|', num_workers=0)

def trained(dls, epochs, seed, depth=3, width=32, lr=1e-2, **heads):
    set_seed(seed)
    heads = dict(objects=dict(width=width, convs=2), **heads)
    learn = multi_learner(dls, simple_cnn(depth, bn=True), heads=heads)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn

def found(learn, dl):
    "The share of the objects that the learner finds at its threshold, with the right class and an IoU of at least .5"
    with learn.no_bar(): _,targs,decoded = learn.get_preds(dl=dl, with_decoded=True)
    pairs = zip(*(untyped(t) for o in (targs.objects, decoded.objects) for t in (o.box, o.colour)))
    hits = []
    for box,colour,pred_box,pred_colour in pairs:
        same = colour[:,None]==pred_colour
        near = box_iou(box, pred_box) >= .5    # false where there is no box, which is NaN
        hits.append((same & near).any(1)[colour!=-100])
    return float(torch.cat(hits).float().mean())

def looked_for(epochs, seeds):
    "Print recall and mAP50 on fully annotated pictures, with and without the column"
    path,items,boxes = drawn(360)
    items['seen'] = np.where(items.index%2, 'red|green|blue', 'yellow|pink')
    seen = boxes.file.map(items.set_index('file').seen)
    some = boxes[[c in s for c,s in zip(boxes.colour, seen)]]
    outputs = dict(objects=ObjectsBlock(colour=CategoryBlock))
    whole = drawn_loaders(path, items, boxes, outputs, {}).valid
    rows = []
    for seed in range(seeds):
        for name,columns in dict(without={}, with_column=dict(looked_for='seen')).items():
            learn = trained(drawn_loaders(path, items, some, outputs, columns), epochs, seed)
            rows.append(dict(seed=seed, column=name, found=round(found(learn, whole), 3),
                             map50=round(learn.evaluate(dl=whole)['objects_map50'], 3)))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows).pivot(index='seed', columns='column', values=['found','map50'])
    print(table.describe().loc[['mean','min','max']].round(3))

ways = ['full', 'half', 'with_column', 'without']
codes = ['ground', 'circle', 'square', 'triangle', 'star']
side = 96      # pixels
small = 225    # pixels; in these pictures, a third of the objects are larger

def shape_loaders(way, n, bs):
    """Loaders of drawn pictures with a class, tags, a mask and objects; and fully annotated validation pictures

    `half`: every other object has only a box and a colour. `with_column`: in half of the pictures red, green and blue
    objects are annotated, in the others yellow and pink ones, and a column says so. `without`: no column says so."""
    path,items,boxes = drawn(n, side)
    boxes['size'] = np.where(boxes.area<small, 'small', 'large')
    columns = dict(kind='label')
    outputs = dict(objects=ObjectsBlock(colour=CategoryBlock, kind=CategoryBlock, size=CategoryBlock),
                   kind=CategoryBlock, tags=MultiCategoryBlock, mask=MaskBlock(codes))
    valid = drawn_loaders(path, items, boxes, outputs, columns, side, bs).valid
    if way=='half': boxes.loc[boxes.index%2==0, ['label','size']] = None
    if way in ('with_column','without'):
        items['seen'] = np.where(items.index%2, 'red|green|blue', 'yellow|pink')
        seen = boxes.file.map(items.set_index('file').seen)
        boxes = boxes[[c in s for c,s in zip(boxes.colour, seen)]]
    if way=='with_column': columns['looked_for'] = 'seen'
    return drawn_loaders(path, items, boxes, outputs, columns, side, bs), valid

shape_scores = ['objects_map50','objects_kind_accuracy','objects_size_accuracy','kind_accuracy','tags_f1',
                'mask_accuracy']

def shapes(args):
    "Print mAP50 of the colours, accuracy of kind and size at found boxes, the share of objects found, and other scores"
    rows = []
    for seed in range(args.seeds):
        for way in args.ways:
            dls,valid = shape_loaders(way, args.n, args.bs)
            start = time.perf_counter()
            learn = trained(dls, args.epochs, args.first_seed+seed, 4, args.width, args.lr, mask=dict(width=16))
            with learn.no_bar(): res = learn.evaluate(dl=valid)
            rows.append(dict(way=way, seed=args.first_seed+seed, **{n: round(float(res[n]), 3) for n in shape_scores},
                             found=round(found(learn, valid), 3), seconds=round(time.perf_counter()-start)))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby('way')[[*shape_scores,'found']]
    print(table.agg(['mean','min','max']).T.unstack().round(3).to_string())

def main():
    p = argparse.ArgumentParser()
    p.add_argument('what', nargs='?', default='bccd', choices=['bccd','looked_for','shapes'])
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--size', type=int, default=160)
    p.add_argument('--width', type=int, default=64)
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--seeds', type=int, default=1)
    p.add_argument('--first-seed', type=int, default=0)
    p.add_argument('--n', type=int, default=2000, help='number of drawn pictures')
    p.add_argument('--ways', nargs='+', default=ways, choices=ways)
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.what=='looked_for': return looked_for(args.epochs, args.seeds)
    if args.what=='shapes': return shapes(args)
    weights = data_path('weights')/'mobilenet_v2_imagenet_int8dequant.pth'
    size = (args.size, args.size)
    rows = []
    for seed in range(args.seeds):
        for name,run in dict(fastai_multi=ours, torchvision=theirs).items():
            set_seed(seed)
            dls = loaders(args.size, args.bs, seed)
            encoder = image_encoder(models.mobilenet_v2, weights=weights)
            mean,std = encoder.stats
            for dl in dls.loaders: dl.after_batch.add(Normalize.from_stats(mean, std, cuda=False))
            step,map50,map = run(dls, args, size, weights)
            rows.append(dict(detector=name, seed=seed, map50=round(map50, 3), map=round(map, 3),
                             step_seconds=round(step, 3)))
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).groupby('detector')[['map50','map','step_seconds']].mean().round(3))

if __name__ == '__main__': main()
