"""Boxes, points and masks follow the picture through the whole input path: each batch is compared with what its
pictures show"""
import random

import numpy as np, pandas as pd, pytest, torch
from fastai.data.block import CategoryBlock
from fastai.vision.augment import (CropPad, Dihedral, DihedralItem, Flip, FlipItem, RandomCrop, RandomErasing,
                                   RandomResizedCrop, RandomResizedCropGPU, RatioResize, Resize, Rotate, Warp, Zoom,
                                   aug_transforms)
from fastai.vision.core import Image, PILImage, TensorPoint
from fastai.vision.data import BBoxBlock, BBoxLblBlock, MaskBlock, PointBlock
from PIL import ImageDraw
from fastai_multi.data.frame import frame, to_pixels
from fastai_multi.data.geometry import safe_tfms
from fastai_multi.data.describe import describe
from fastai_multi.data.loaders import MultiDataLoaders

colours = dict(red=(255,0,0), blue=(0,0,255))

def draw(i, path):
    "Draw a grey picture with a red box, a green dot and usually a blue box"
    w,h = [(96,64),(64,96),(80,80)][i%3]
    rng = random.Random(i)
    im = Image.new('RGB', (w,h), (90,90,90))
    m = Image.new('L', (w,h), 0)
    d = ImageDraw.Draw(im)
    x,y = rng.randint(4,w//2-26), rng.randint(4,h//2-24)
    boxes = [[x,y,x+22,y+18]]
    if i%4: boxes.append([w//2+rng.randint(1,8), h//2+rng.randint(1,8), w-rng.randint(4,10), h-rng.randint(4,10)])
    for (x1,y1,x2,y2),c in zip(boxes, colours.values()): d.rectangle((x1,y1,x2-1,y2-1), fill=c)
    x1,y1,x2,y2 = boxes[0]
    ImageDraw.Draw(m).rectangle((x1,y1,x2-1,y2-1), fill=1)
    dot = w-12,12
    d.ellipse((dot[0]-3,dot[1]-3,dot[0]+3,dot[1]+3), fill=(0,255,0))
    im.save(path/f'{i}.png')
    m.save(path/f'm{i}.png')
    return dict(file=f'{i}.png', first=boxes[0], boxes=boxes, what=list(colours)[:len(boxes)], dot=[dot],
                mask=str(path/f'm{i}.png'), is_valid=i>=12)

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp('drawn')
    return path,pd.DataFrame([draw(i, path) for i in range(24)])

def loaders(table, item_tfms, batch_tfms=None, **kwargs):
    return MultiDataLoaders.from_df(table[1], table[0], image='file',
                                    outputs=dict(first=BBoxBlock, boxes=BBoxBlock, what=BBoxLblBlock, dot=PointBlock,
                                                 mask=MaskBlock(['ground','red'])),
                                    valid_col='is_valid', item_tfms=item_tfms, batch_tfms=batch_tfms, bs=12,
                                    device='cpu', **kwargs)

def found(im, ch):
    "The box around the pixels in which channel `ch` dominates"
    im = im.as_subclass(torch.Tensor)
    m = im[ch]-im[[c for c in range(3) if c!=ch]].amax(0) > .4
    if not m.any(): return None
    ys = m.any(1).nonzero().flatten()
    xs = m.any(0).nonzero().flatten()
    return torch.stack([xs[0],ys[0],xs[-1]+1,ys[-1]+1]).float()

def check(dl, tol=2., hull=False, seed=0):
    "Compare each batch of `dl` with its pictures, and return how many boxes and points were compared"
    random.seed(seed)
    torch.manual_seed(seed)
    seen = 0
    for x,y in dl:
        h,w = x.shape[-2:]
        sz = torch.tensor([w,h]).float()
        vocab = describe(dl).outputs['what'].vocab
        assert x.isfinite().all()
        for k in range(len(x)):
            labels = [vocab[i] for i in y.what[k].tolist()]
            def see(b, ch):
                nonlocal seen
                f = found(x[k], ch)
                if b.isnan().any(): assert f is None or (f[2:]-f[:2]).min()<=3, (b,f)
                else:
                    p = (b.as_subclass(torch.Tensor)+1).view(2,2)*sz/2
                    assert (p[0]<p[1]).all() and (p>=-1e-3).all() and (p<=sz+1e-3).all()
                    if f is None: assert (p[1]-p[0]).min()<=3, p
                    elif hull: assert (p[0]<=f[:2]+tol).all() and (p[1]>=f[2:]-tol).all(), (p,f)
                    else: assert (p.view(-1)-f).abs().max()<=tol, (p,f)
                    seen += 1
                return f
            f = see(y.first[k], 0)
            for c,ch in (('red',0),('blue',2)):
                at = [j for j,l in enumerate(labels) if l==c]
                assert len(at)<=1
                if at: see(y.boxes[k,at[0]], ch)
            for j,l in enumerate(labels): assert (l=='#na#') == bool(y.boxes[k,j].isnan().any())
            g = found(x[k], 1)
            p = ((y.dot[k,0]+1)*sz/2).as_subclass(torch.Tensor)
            if g is not None and (g[:2]>3).all() and (g[2:]<sz-3).all():
                assert ((g[:2]+g[2:])/2-p).abs().max()<=tol, (g,p)
                seen += 1
            m = found(torch.stack([y.mask[k], y.mask[k]*0, y.mask[k]*0]).float(), 0)
            if f is not None and m is not None and (f[2:]-f[:2]).min()>3: assert (f-m).abs().max()<=tol+1, (f,m)
    return seen

def tfm_names(o): return ' '.join(type(t).__name__ for t in o) if isinstance(o, list) else str(o)

items = [[Resize(64, method='crop')],
         [Resize(64, method='squish')],
         [Resize((48,80), method='pad', pad_mode='zeros')],
         [Resize((80,48), method='squish')],
         [RandomResizedCrop(64, min_scale=.4)],
         [RandomResizedCrop((48,64), min_scale=.5)],
         [RandomCrop(56)],
         [RandomCrop(110)],
         [CropPad(72, pad_mode='zeros')],
         [FlipItem(), Resize(64, method='squish')],
         [DihedralItem(), Resize((48,64), method='squish')],
         [CropPad(90, pad_mode='zeros'), FlipItem(), DihedralItem(), RandomResizedCrop(64, min_scale=.6)],
         [RatioResize(70), CropPad(64)]]

@pytest.mark.parametrize('tfms', items,
                         ids=tfm_names)
def test_item_transforms(table, tfms):
    for dl in loaders(table, tfms): assert check(dl) > 12

batches = [([Flip(p=.5)], False), ([Dihedral(p=.8, pad_mode='zeros')], False), ([Zoom(max_zoom=1.5, p=1.)], False),
           ([Zoom(min_zoom=.6, max_zoom=.8, p=1., pad_mode='zeros')], False),
           ([Rotate(max_deg=30, p=1., pad_mode='zeros')], True), ([Warp(magnitude=.3, p=1., pad_mode='zeros')], True),
           ([RandomResizedCropGPU(56, min_scale=.4)], False), ([Flip(size=(48,56))], False),
           *[(aug_transforms(size=56, min_scale=s, flip_vert=True, max_lighting=.05, pad_mode='zeros'), True)
             for s in (1.,.75,.3)]]

@pytest.mark.parametrize('tfms,hull', batches,
                         ids=tfm_names)
@pytest.mark.parametrize('size', [(56,80)],
                         ids=tfm_names)
def test_batch_transforms(table, tfms, hull, size):
    for dl in loaders(table, Resize(size, method='squish'), tfms): assert check(dl, hull=hull) > 12

def test_erasing_leaves_targets_alone(table):
    a,b = (loaders(table, Resize(64), t, shuffle=False) for t in (None, [RandomErasing(p=1.)]))
    ys = []
    for dls in (a,b):
        random.seed(0)
        ys.append(dls.train.one_batch()[1])
    for o,p in zip(*ys): assert torch.equal(torch.nan_to_num(o, -7.), torch.nan_to_num(p, -7.))

def test_in_workers_and_copies(table):
    dls = loaders(table, RandomResizedCrop(64, min_scale=.5), aug_transforms(max_lighting=0, pad_mode='zeros'))
    assert check(dls.train.new(num_workers=2), hull=True) > 6 and check(dls.valid.new(num_workers=1)) > 6
    assert check(dls.test_dl(table[1], with_labels=True)) > 12

def test_the_crop_that_removes_every_box(table):
    x,y = loaders(table, RandomCrop(12), [RandomResizedCropGPU(12, min_scale=.3)]).train.one_batch()
    assert y.boxes.isnan().any() and not y.boxes.isnan().all(-1).logical_xor(y.boxes.isnan().any(-1)).any()

@pytest.mark.parametrize('tfms',
                         [[Resize(48)], [Resize((48,80), method='pad')], [Resize(48, method='squish')],
                          [RandomResizedCrop(48)], [CropPad(110), Resize((40,56))]],
                         ids=tfm_names)
@pytest.mark.parametrize('batch_tfms',
                         [None, aug_transforms(size=32, min_scale=.5), [RandomResizedCropGPU((24,40), valid_scale=.8)]],
                         ids=['none','aug','crop'])
def test_boxes_return_to_the_picture(table, tfms, batch_tfms):
    "`frame` maps a validation batch back to the pixels of the file"
    dl = loaders(table, tfms, batch_tfms).valid
    x,y = dl.one_batch()
    n = 0
    for k,(_,row) in enumerate(table[1][table[1].is_valid].iterrows()):
        m = frame(Image.open(table[0]/row.file).size, dl.after_item, dl.after_batch)
        b = y.first[k]
        if not b.isnan().any() and b.abs().max()<1:
            assert (to_pixels(b, m)-torch.tensor(row['first'])).abs().max() < .01
            n += 1
        if not y.dot[k].isnan().any():
            assert (to_pixels(y.dot[k], m)-torch.tensor(row['dot'])).abs().max() < .01
            n += 1
    assert n > 0

def test_a_transform_that_would_be_wrong_is_refused(table):
    class Mine(RandomResizedCropGPU): "A subclass of a refused transform"
    with pytest.raises(ValueError, match='Derive it from `SafeRandomResizedCropGPU`'):
        loaders(table, Resize(64), [Mine(32)])
    dls = MultiDataLoaders.from_df(table[1].assign(n=[str(len(o)) for o in table[1].boxes]), table[0], image='file',
                                   outputs=CategoryBlock, columns='n', item_tfms=Resize(64), batch_tfms=[Mine(32)],
                                   bs=4, device='cpu')
    assert dls.one_batch()[0].shape[-2:] == (32,32)    # it is allowed if no output lies in the picture
