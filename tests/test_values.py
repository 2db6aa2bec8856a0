"""Batches and answers contain the values of the table and the files: points, masks, numbers, pixels, classes and texts
in every form of storage. A value that cannot be read raises an error with its row and file."""
import math, os, pickle, warnings
from io import BytesIO
from unicodedata import normalize

import matplotlib
matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter
from fastai.vision.augment import DisplayedTransform, Flip, FlipItem, RandTransform, Resize, Rotate, aug_transforms
from fastai.torch_core import TensorImage
from fastai.vision.core import Image, PILImage
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, MaskBlock, PointBlock
from torchvision import transforms
from torchvision.transforms import v2
from fasttransform import Transform
from PIL import ImageOps
from fastai_multi import *
from fastai_multi.core import IGNORE, untyped
from fastai_multi.data.text import split_words

w,h = 40,20

def picture_of(i):
    a = np.zeros((h,w,3), dtype=np.uint8)
    a[4:8,4+i%4:10+i%4] = 255
    return a

@pytest.fixture
def folder(tmp_path):
    for i in range(12): Image.fromarray(picture_of(i)).save(tmp_path/f'{i}.png')
    return tmp_path

def table(n=12, **columns):
    df = pd.DataFrame(dict(file=[f'{i}.png' for i in range(n)], valid=[i>=8 for i in range(n)]))
    for k,v in columns.items(): df[k] = pd.Series([v(i) for i in range(n)]) if callable(v) else v
    return df

def loaders(df, path, outputs, **kwargs):
    kw = dict(image='file', valid_col='valid', bs=4, num_workers=0, device='cpu', shuffle=False)
    return MultiDataLoaders.from_df(df, path, outputs=outputs, **{**kw, **kwargs})

def rows(dl): return dl.dataset.items.index

# Points

def two(i): return [[4+i%4,5],[30,5+i%2]]

def test_points_that_cannot_be_are_refused(folder):
    def refused(points, *said, outputs=PointBlock):
        with pytest.raises(ValueError) as e:
            for dl in loaders(table(eyes=points), folder, dict(eyes=outputs)).loaders: list(dl)
        for s in said: assert s in str(e.value), e.value
    refused(lambda i: [[.1,.2],[.5,.6]], "Output 'eyes'", 'lie between 0 and 1')
    refused(lambda i: [[4,500],[30,5]] if i==2 else two(i), 'the point [4, 500] lies far outside', '40 wide and 20 high',
            'row 2')
    refused(lambda i: [[4,500],[30,5]] if i==9 else two(i), 'far outside', 'row 9')
    refused(lambda i: two(i)[:1] if i==3 else two(i), 'has 1 points, but 2', 'row 3')
    refused(lambda i: two(i)*2 if i==10 else two(i), 'has 4 points, but 2', 'row 10')
    refused(lambda i: [4+i%4,5,2,30,5,1], 'x, y, v')
    refused(lambda i: [4+i%4,5,2,30,5,1,9,9,0], 'x, y, v', 'row 0')
    refused(two, '`flip_pairs` is [(0, 5)]', 'points 0 to 1', outputs=PointsBlock(flip_pairs=[(0,5)]))

def pixels_of(y, size=(w,h)): return (y.as_subclass(torch.Tensor)+1)/2*torch.tensor(size)

@pytest.mark.parametrize('item,batch,turned', [
    (FlipItem(1.), None, lambda p: [[w-p[1][0],p[1][1]],[w-p[0][0],p[0][1]]]),
    (None, Flip(p=1.), lambda p: [[w-p[1][0],p[1][1]],[w-p[0][0],p[0][1]]]),
    (v2.RandomHorizontalFlip(1.), None, lambda p: [[w-p[1][0],p[1][1]],[w-p[0][0],p[0][1]]]),
    (v2.RandomVerticalFlip(1.), None, lambda p: [[p[1][0],h-p[1][1]],[p[0][0],h-p[0][1]]]),
    (None, Rotate(p=1., draw=180.), lambda p: [[w-p[0][0],h-p[0][1]],[w-p[1][0],h-p[1][1]]]),    # no mirror image
])
def test_points_change_places_in_a_mirror_image(folder, item, batch, turned):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dls = loaders(table(eyes=two), folder, dict(eyes=PointsBlock(flip_pairs=[(0,1)])), item_tfms=item,
                      batch_tfms=batch)
    _,y = dls.train.one_batch()
    wanted = torch.tensor([turned(two(i)) for i in rows(dls.train)[:4]], dtype=torch.float)
    assert torch.allclose(pixels_of(y.eyes), wanted, atol=1e-3)
    _,y = dls.valid.one_batch()    # validation data stay as they are
    assert torch.allclose(pixels_of(y.eyes), torch.tensor([two(i) for i in rows(dls.valid)[:4]]).float(), atol=1e-3)

def test_several_points_and_a_flip_warn_once_if_nothing_is_said_of_pairs(folder):
    def said(outputs, **kwargs):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            dls = loaders(table(eyes=two, nose=lambda i: [20,9]), folder, outputs, **kwargs)
            dls.test_dl(dls.valid_ds.items)
        return [str(o.message) for o in told if 'flip_pairs' in str(o.message)]
    assert said(dict(eyes=PointBlock), batch_tfms=aug_transforms())
    assert said(dict(eyes=PointBlock), item_tfms=FlipItem(.5))
    assert said(dict(eyes=PointBlock), item_tfms=v2.RandomHorizontalFlip())
    assert not said(dict(eyes=PointBlock), batch_tfms=aug_transforms(do_flip=False))
    assert not said(dict(eyes=PointsBlock(flip_pairs=[])), batch_tfms=aug_transforms())
    assert not said(dict(nose=PointBlock), batch_tfms=aug_transforms())

def test_a_missing_category_among_the_inputs_has_an_index_of_its_own(folder):
    df = pd.DataFrame(dict(kind=[None if i%3==0 else 'ab'[i%2] for i in range(12)], size=range(12)))
    block = DataBlock((MultiInputBlock(kind=CategoryBlock, size=FeaturesBlock), RegressionBlock), get_x=lambda r: r,
                      get_y=lambda r: float(r['size']), splitter=IndexSplitter([9,10,11]))
    dls = MultiDataLoaders.from_dblock(block, df, bs=9, device='cpu', num_workers=0, shuffle=False)
    x,_ = dls.train.one_batch()
    part = describe(dls).inputs['kind']
    assert x.kind.tolist()==[2 if i%3==0 else i%2 for i in range(9)]
    assert torch.nn.Embedding(part.c, 3)(x.kind.as_subclass(torch.Tensor)).shape==(9,3)

# Masks

def mask_of(i):
    m = np.zeros((h,w), dtype=np.uint8)
    m[4:8,4+i%4:10+i%4] = 1
    return m

def with_masks(folder, draw):
    for i in range(12): draw(i).save(folder/f'm{i}.png')
    return table(mask=lambda i: f'm{i}.png')

def as_palette(a):
    m = Image.fromarray(a, 'P')
    m.putpalette([0,0,0, 128,0,0, 0,128,0, 128,128,0, 0,0,128])
    return m

def seen(dls, name='mask'):
    "Every mask of the loaders, by row"
    return {i: m for dl in dls.loaders for i,m in zip(rows(dl), torch.cat([b[1][name].as_subclass(torch.Tensor)
                                                                             for b in dl]))}

def test_indices_of_a_palette_are_the_classes(folder):
    df = with_masks(folder, lambda i: as_palette(mask_of(i)*4))
    dls = loaders(df, folder, dict(mask=MaskBlock(list('abcde'))), drop_last=False)
    for i,m in seen(dls).items(): assert m.tolist()==(mask_of(i)*4).tolist()

def test_numbers_that_are_no_class_are_refused_with_their_file(folder):
    df = with_masks(folder, lambda i: Image.fromarray(mask_of(i)*(255 if i==2 else 1)))
    with pytest.raises(ValueError) as e: list(loaders(df, folder, dict(mask=MaskBlock(['ground','thing']))).train)
    for s in ('m2.png', 'holds the numbers 0, 255', "2 codes, ['ground', 'thing']", 'values=[0,255]', 'row 2'):
        assert s in str(e.value), e.value
    with_masks(folder, lambda i: Image.fromarray(mask_of(i)*255))
    dls = loaders(df, folder, dict(mask=SegmentationBlock(['ground','thing'], values=[0,255])), drop_last=False)
    for i,m in seen(dls).items(): assert m.tolist()==mask_of(i).tolist()

def test_colours_and_a_missing_file_name_the_mask(folder):
    df = with_masks(folder, lambda i: Image.fromarray(picture_of(i)[...,::-1]*np.array([1,2,3], dtype=np.uint8)))
    with pytest.raises(ValueError, match='m0.png.*colours'): list(loaders(df, folder, dict(mask=MaskBlock())).train)

def test_void_pixels_count_neither_in_the_loss_nor_in_a_metric(folder):
    def draw(i):
        m = mask_of(i)
        m[:3] = 255
        return Image.fromarray(m)
    dls = loaders(with_masks(folder, draw), folder, dict(mask=SegmentationBlock(['ground','thing'], void=255)))
    x,y = dls.valid.one_batch()
    assert (y.mask[:,:3]==IGNORE).all() and (y.mask[:,3:]!=IGNORE).all()
    learn = multi_learner(dls, simple_cnn, pretrained=False)
    loss,_,right = learn.validate()
    with torch.no_grad(): pred = learn.model.eval()(x.as_subclass(torch.Tensor))
    pred = pred[0] if isinstance(pred, tuple) else pred
    t = y.mask.as_subclass(torch.Tensor)[:,3:]
    assert loss==pytest.approx(float(F.cross_entropy(pred[:,:,3:], t)), rel=1e-4)
    assert right==pytest.approx(float((pred[:,:,3:].argmax(1)==t).float().mean()), rel=1e-4)

def test_the_size_of_a_mask_is_that_of_its_picture(folder):
    df = with_masks(folder, lambda i: Image.fromarray(mask_of(i)[::2,::2]))
    with pytest.raises(ValueError) as e: list(loaders(df, folder, dict(mask=MaskBlock(['g','t']))).train)
    for s in ('m0.png', '20 wide and 10 high', '40 wide and 20 high', 'resize=True', 'row 0'): assert s in str(e.value)
    dls = loaders(df, folder, dict(mask=SegmentationBlock(['g','t'], resize=True)), drop_last=False)
    for i,m in seen(dls).items(): assert m.tolist()==np.kron(mask_of(i)[::2,::2], np.ones((2,2))).tolist()
    with_masks(folder, lambda i: Image.fromarray(mask_of(i)[:,:30]))
    with pytest.raises(ValueError, match='30 wide and 20 high'):
        list(loaders(df, folder, dict(mask=SegmentationBlock(['g','t'], resize=True))).train)

def test_a_mask_upright_over_a_photo_stored_rotated(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(12): Image.fromarray(picture_of(i)).save(folder/f'{i}.jpg', exif=exif)
    df = with_masks(folder, lambda i: Image.fromarray(np.rot90(mask_of(i), 3)))
    df['file'] = [f'{i}.jpg' for i in range(12)]
    with pytest.raises(ValueError, match='m0.png.*Their orientations differ.*EXIF'):
        list(loaders(df, folder, dict(mask=MaskBlock(['g','t'])), item_tfms=Resize(16)).train)

# Numbers

def test_numbers_beyond_a_float32_keep_their_differences(folder):
    days = [20240101+i for i in range(12)]
    df = table(price=lambda i: 1e9+i, day=days, at=lambda i: 1e9+i)
    dls = loaders(df, folder, dict(price=RegressionBlock, day=RegressionBlock), features='at')
    parts = describe(dls).outputs
    for dl in dls.loaders:
        x,y = dl.one_batch()
        i = torch.tensor(list(rows(dl)[:4]))
        assert torch.allclose(parts['price'].to_units(y.price)-1e9, i.double(), atol=1e-5)
        assert [round(float(parts['day'].decode(d))) for d in y.day]==[days[k] for k in i]
        assert torch.allclose(x.features[:,0].diff(), torch.ones(3))
    learn = multi_learner(dls, dict(image=simple_cnn), pretrained=False)
    p = learn.get_preds(dl=dls.valid)[0].price.double().reshape(-1)
    mean,std = df.price[:8].mean(),df.price[:8].std(ddof=0)
    assert learn.evaluate()['price_mae']==pytest.approx(float((p*std+mean-torch.tensor(df.price[8:].values)).abs().mean()))

@pytest.mark.parametrize('row', [3,10])
@pytest.mark.parametrize('value', [math.inf, -math.inf, 1e300])
def test_infinite_numbers_are_refused_with_their_row(folder, row, value):
    def col(i): return value if i==row else float(i)
    for kw in (dict(outputs=dict(num=RegressionBlock)), dict(outputs=dict(o=RegressionBlock), features='num'),
               dict(outputs=dict(num=RegressionBlock), columns=dict(num=['num','o']))):
        with pytest.raises(ValueError, match='finite numbers are expected|too large|so large') as e:
            dls = loaders(table(num=col, o=lambda i: float(i)), folder, **kw)
            for dl in dls.loaders: list(dl)
        assert f'row {row} ' in str(e.value)

def test_a_number_that_leaves_no_standard_deviation_is_refused(folder):
    "Standardising with such a number would turn all others into 0"
    with pytest.raises(ValueError, match=r"'num' is 1e\+300, so large.*row 3 of the table"):
        loaders(table(num=lambda i: 1e300 if i==3 else float(i)), folder, dict(num=RegressionBlock))

# Pixels

def stored(ramp, form):
    if form=='uint16': return (ramp*65535).round().astype(np.uint16)
    if form=='floats 0..1': return ramp
    if form=='floats 0..255': return ramp*255
    if form=='int64': return (ramp*255).round().astype(np.int64)
    if form=='tensor': return torch.tensor(ramp, dtype=torch.float32)[None].repeat(3,1,1)
    f = BytesIO()
    if form=='PNG of 16 bits': Image.fromarray((ramp*65535).round().astype(np.uint16)).save(f, 'png')
    if form=='TIFF of floats': Image.fromarray(ramp.astype(np.float32)).save(f, 'tiff')
    return f

forms = ['uint16', 'floats 0..1', 'floats 0..255', 'int64', 'tensor', 'PNG of 16 bits', 'TIFF of floats']

@pytest.mark.parametrize('form', forms)
def test_pictures_of_every_type_and_range(tmp_path, form):
    ramp = np.linspace(0, 1, h*w).reshape(h,w)
    v = stored(ramp, form)
    ways = [v]
    if isinstance(v, BytesIO):
        (tmp_path/'a.img').write_bytes(v.getvalue())
        ways += [tmp_path/'a.img', v.getvalue(), dict(bytes=v.getvalue(), path=None)]
    for way in ways:
        df = pd.DataFrame(dict(im=[way]*4, y=[0.,1.,2.,3.]))
        block = DataBlock((ImageBlock, RegressionBlock), get_x=lambda r: r.im, get_y=lambda r: r.y,
                          splitter=IndexSplitter([3]))
        for cls in (OneOutputBlock, lambda b: b):
            b = DataBlock((MultiInputBlock(im=ImageBlock), cls(RegressionBlock)), get_x=lambda r: (r.im,),
                          get_y=lambda r: r.y, splitter=IndexSplitter([3]))
            x,_ = MultiDataLoaders.from_dblock(b, df, bs=2, device='cpu', num_workers=0).one_batch()
            im = x.im if hasattr(x, 'im') else x
            assert np.abs(im[0,0].numpy()-ramp).max()<=1/255

def test_pictures_of_no_known_range_are_refused(tmp_path):
    for a in (np.full((h,w), 3000), np.full((h,w), -.7), np.full((h,w), 1.5), np.array([[0.,np.nan]]), np.zeros((h,w,2))):
        b = DataBlock((MultiInputBlock(im=ImageBlock), OneOutputBlock(RegressionBlock)), get_x=lambda r: (r.im,),
                      get_y=lambda r: r.y, splitter=IndexSplitter([3]))
        df = pd.DataFrame(dict(im=[a]*4, y=[0.,1.,2.,3.]))
        with pytest.raises(ValueError, match="Input 'im': the picture 'ndarray' cannot be opened"):
            MultiDataLoaders.from_dblock(b, df, bs=2, device='cpu', num_workers=0).one_batch()

def test_the_flat_form_of_fastai_opens_the_same_files(folder):
    df = with_masks(folder, lambda i: as_palette(mask_of(i)*4))
    for i in range(12): Image.fromarray(np.full((h,w), 30000, dtype=np.uint16)).save(folder/f'd{i}.png')
    def loaders_of(codes):
        block = DataBlock((ImageBlock, MaskBlock(codes)), get_x=lambda i: folder/f'd{i}.png',
                          get_y=lambda i: folder/f'm{i}.png', splitter=IndexSplitter([10,11]))
        return MultiDataLoaders.from_dblock(block, list(range(12)), bs=4, num_workers=0, device='cpu', shuffle=False)
    x,y = loaders_of(list('abcde')).train.one_batch()
    assert y[0].tolist()==(mask_of(0)*4).tolist()
    assert torch.allclose(x*255, torch.full_like(x, round(30000/257)), atol=1e-3)
    with pytest.raises(ValueError, match='m0.png.*holds the numbers 0, 4'): loaders_of(list('ab')).one_batch()

# Transforms that are not fastai's

def spatial(folder):
    df = with_masks(folder, lambda i: Image.fromarray(mask_of(i)))
    df['box'] = [[4+i%4,4,10+i%4,8] for i in range(12)]
    df['eyes'] = [two(i) for i in range(12)]
    return df,dict(mask=MaskBlock(['g','t']), box=BBoxBlock, eyes=PointsBlock(flip_pairs=[(0,1)]))

@pytest.mark.parametrize('f', [transforms.ColorJitter((.3,.5)), v2.ColorJitter((.3,.5)), transforms.RandomGrayscale(1.),
                               transforms.Compose([transforms.RandomInvert(1.), transforms.GaussianBlur(3)])])
def test_colours_change_pictures_only(folder, f):
    df,outputs = spatial(folder)
    plain = loaders(df, folder, outputs).train.one_batch()
    x,y = loaders(df, folder, outputs, item_tfms=f).train.one_batch()
    for a,b in zip(y, plain[1]): assert torch.equal(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor))
    if not isinstance(f, transforms.RandomGrayscale): assert not torch.equal(x, plain[0])

@pytest.mark.parametrize('f', [v2.RandomHorizontalFlip(1.), v2.RandomAffine(20, translate=(.1,.1)), v2.CenterCrop((16,30)),
                               v2.Compose([v2.Resize((40,60)), v2.RandomVerticalFlip(1.), v2.ColorJitter(.1)])])
def test_geometry_of_torchvision_moves_everything(folder, f):
    df,outputs = spatial(folder)
    dls = loaders(df, folder, outputs, item_tfms=f)
    for dl in dls.loaders:
        x,y = dl.one_batch()
        H,W = x.shape[-2:]
        bright = x[:,0]>.5
        assert float((bright==(y.mask==1)).float().mean())>.97
        for b,m,p in zip(y.box, bright, y.eyes):
            ys,xs = torch.where(m)
            found = torch.tensor([xs.min(), ys.min(), xs.max()+1, ys.max()+1])
            box = ((b.as_subclass(torch.Tensor)+1).view(2,2)/2*torch.tensor([W,H])).view(4)
            if isinstance(f, v2.RandomAffine): assert (box[:2]<=found[:2]+1).all() and (box[2:]>=found[2:]-1).all()
            else: assert (box-found).abs().max()<=1

def test_geometry_that_would_leave_boxes_behind_is_refused(folder):
    df,outputs = spatial(folder)
    for f in (transforms.RandomHorizontalFlip(), transforms.Compose([transforms.ColorJitter(), transforms.RandomRotation(9)]),
              lambda im: im.rotate(90)):
        with pytest.raises(ValueError, match="Output 'mask' lies in the picture"): loaders(df, folder, outputs, item_tfms=f)
    with pytest.raises(ValueError, match='Give it in `item_tfms`'):
        loaders(df, folder, outputs, batch_tfms=v2.RandomHorizontalFlip())
    def darker(x:PILImage): return PILImage.create(np.array(x)//2)
    x,y = loaders(df, folder, outputs, item_tfms=darker).train.one_batch()
    assert x.max()<.51 and y.mask.max()==1
    kind = dict(kind=CategoryBlock)
    x,_ = loaders(table(kind=lambda i: 'ab'[i%2]), folder, kind, item_tfms=lambda im: im.rotate(180)).train.one_batch()
    assert torch.equal(x[0,0].flip(0,1)>.5, torch.tensor(picture_of(0)[...,0])>127)

class Negative(Transform):
    "A custom transform without annotations"
    def encodes(self, o): return PILImage(ImageOps.invert(o))

class Shifted(RandTransform):
    def encodes(self, o): return PILImage(ImageOps.invert(o))

class Darker(Transform):
    def encodes(self, x:PILImage): return PILImage.create(np.array(x)//2)
    def decodes(self, x:TensorImage): return x*2

class Negated(DisplayedTransform):
    order = 20    # runs after bytes become floats
    def encodes(self, t): return -t
    def decodes(self, t): return -t

def test_transforms_of_yours_run_on_pictures_only(folder):
    df,outputs = spatial(folder)
    for t in (Negative(), Negative, Shifted(p=1.)):
        with pytest.raises(ValueError, match=r"Output 'mask' lies in the picture.*def encodes\(self, x:PILImage\)"):
            loaders(df, folder, outputs, item_tfms=t)
    plain = loaders(df, folder, outputs).train.one_batch()
    x,y = loaders(df, folder, outputs, item_tfms=Darker()).train.one_batch()
    assert x.max()<.51 and torch.equal(y.mask.long(), plain[1].mask.long())
    df = table(kind=lambda i: 'ab'[i%2], price=lambda i: i)
    kinds = dict(kind=CategoryBlock, price=RegressionBlock)
    plain = loaders(df, folder, kinds)
    for t in (Negative(), Shifted(p=1.)):
        dls = loaders(df, folder, kinds, item_tfms=t)
        for dl,before in zip(dls.loaders, plain.loaders):
            (x,y),(x0,y0) = dl.one_batch(),before.one_batch()
            assert torch.equal(y.kind, y0.kind) and torch.equal(y.price, y0.price)
            is_negative = torch.allclose(untyped(x), 1-untyped(x0), atol=1e-6)
            assert is_negative==(isinstance(t, Negative) or dl is dls.train)    # a `RandTransform` is for training
    dls = loaders(df, folder, kinds, batch_tfms=Negated())
    x,y = dls.train.one_batch()
    assert x.max()<=0 and torch.equal(y.price, plain.train.one_batch()[1].price)
    assert untyped(dls.train.decode((x,y))[0]).min()>=0                         # decoding undoes it, for `show_batch`

def test_a_transform_without_annotation_needs_a_picture(folder):
    df = table(kind=lambda i: 'ab'[i%2]).assign(words='a b', size=1.)
    options = dict(bs=4, num_workers=0, seed=0)
    for t,name in ((Negated(), 'Negated'), (lambda o: o, '<lambda>')):
        for inputs,words in ((dict(text='words'), 'text'), (dict(features='size'), 'features')):
            for how in ('item_tfms','batch_tfms'):
                with pytest.raises(ValueError, match=rf"{name!r} takes values of any type.*OnPart\('{words}'"):
                    MultiDataLoaders.from_df(df, outputs=CategoryBlock, columns='kind', **inputs, **{how: t}, **options)
    dls = MultiDataLoaders.from_df(df, outputs=CategoryBlock, columns='kind', features='size', **options,
                                   item_tfms=OnPart('features', Negated()))
    assert (dls.one_batch()[0]==-1).all()

def test_a_prediction_does_not_depend_on_a_draw_of_torchvision(folder):
    df,_ = spatial(folder)
    dls = loaders(df, folder, dict(box=BBoxBlock), item_tfms=[v2.CenterCrop((16,30)), v2.RandomHorizontalFlip(.5)])
    learn = multi_learner(dls, simple_cnn, pretrained=False)
    boxes = [learn.predict_df(df).box.tolist() for _ in range(3)]
    assert boxes[0]==boxes[1]==boxes[2]
    pred = learn.get_preds(dl=dls.test_dl(df))[0]
    pred = (pred.box if hasattr(pred, 'box') else pred).view(-1,2,2)
    back = ((pred+1)/2*torch.tensor([30,16])+torch.tensor([5,2])).view(-1,4)    # the crop begins at 5,2
    assert torch.allclose(torch.tensor(boxes[0]), back, atol=1e-2)

# Storage

def test_boxes_and_points_from_a_parquet_file(folder):
    df = table(boxes=lambda i: [[1,2,9,9],[10,3,20,9]][:1+i%2], eyes=two)
    df['names'] = [['a','b'][:1+i%2] for i in range(12)]
    lists = loaders(df, folder, dict(boxes=BBoxBlock, names=BBoxLblBlock, eyes=PointBlock)).train.one_batch()[1]
    stored = df.copy()
    for c in ('boxes','eyes'): stored[c] = [nested(v) for v in df[c]]
    stored['names'] = [np.array(v, dtype=object) for v in df.names]
    y = loaders(stored, folder, dict(boxes=BBoxBlock, names=BBoxLblBlock, eyes=PointBlock)).train.one_batch()[1]
    for a,b in zip(y, lists): assert torch.equal(a.nan_to_num(9.), b.nan_to_num(9.))

def nested(v):
    res = np.empty(len(v), dtype=object)
    for i,o in enumerate(v): res[i] = np.array(o, dtype=float)
    return res

def test_a_gap_in_one_of_several_columns(folder):
    df = table(a=pd.array([1,2,3,4]*3, dtype='Int64'), b=pd.array([5,None,7,8]*3, dtype='Int64'))
    dls = loaders(df, folder, dict(at=RegressionBlock(n_out=2)), columns=dict(at=['a','b']), features=['a','b'])
    x,y = dls.train.one_batch()
    for t in (x.features, y.at): assert t.isnan().tolist()==[[False,i==1] for i in range(4)]
    corners = table(x1=1, y1=2, x2=9, y2=pd.array([9,None]*6, dtype='Int64'))
    with pytest.raises(ValueError, match="Output 'box'.*some of its corners are missing.*row 1"):
        loaders(corners, folder, dict(box=BBoxBlock), columns=dict(box=['x1','y1','x2','y2'])).one_batch()

def test_pictures_held_in_the_table(folder):
    def png(i): return (folder/f'{i}.png').read_bytes()
    kind = dict(kind=CategoryBlock)
    plain = loaders(table(kind=lambda i: 'ab'[i%2]), folder, kind).train.one_batch()[0]
    for form in (lambda i: dict(bytes=png(i), path=None), lambda i: dict(bytes=None, path=str(folder/f'{i}.png')),
                 lambda i: BytesIO(png(i)), png):
        df = table(kind=lambda i: 'ab'[i%2])
        df['file'] = [form(i) for i in range(12)]
        dls = loaders(df, folder, kind)
        for _ in range(2): assert torch.equal(dls.train.one_batch()[0], plain)
        learn = multi_learner(dls, simple_cnn, pretrained=False)
        assert learn.predict(form(3))[0].kind==learn.predict(folder/'3.png')[0].kind
    x = loaders(df.assign(file=[None, *df.file[1:]]), folder, kind).train.one_batch()[0]
    assert x[0].isnan().all() and not x[1:].isnan().any()

def test_names_that_are_numbers_and_names_of_windows(folder):
    kind = dict(kind=CategoryBlock)
    df = table(kind=lambda i: 'ab'[i%2])
    plain = loaders(df, folder, kind).train.one_batch()[0]
    for ids in (range(12), [float(i) for i in range(12)], pd.array(range(12), dtype='Int64')):
        assert torch.equal(loaders(df.assign(file=ids), folder, kind, suff='.png').train.one_batch()[0], plain)
    deep = folder.parent/'deep'
    if not deep.exists(): os.symlink(folder, deep)
    names = [f'deep\\{i}.png' for i in range(12)]
    assert torch.equal(loaders(df.assign(file=names), folder.parent, kind).train.one_batch()[0], plain)

# Classes

classes = dict(integers=([0,1],int), booleans=([False,True],bool), gaps=([2.,3.],int), texts=(['b','a'],str))

@pytest.mark.parametrize('name', classes)
def test_answers_are_the_values_of_the_table(folder, name):
    values,typ = classes[name]
    df = table(c=[values[i%2] for i in range(12)])
    if name=='gaps': df.loc[3,'c'] = None
    learn = multi_learner(loaders(df, folder, dict(c=CategoryBlock)), simple_cnn, pretrained=False)
    answers = learn.predict_df(df)
    indices = learn.get_preds(dl=learn.dls.test_dl(df))[0].c.argmax(1)
    wanted = [sorted(values)[i] for i in indices]
    assert answers.c.tolist()==wanted
    here = df.c.notna()
    assert (answers.c==df.c)[here].mean()==np.mean([a==b for a,b in zip(wanted, df.c)])*12/here.sum()
    one = learn.predict(df.iloc[0])[0].c
    assert one==wanted[0] and isinstance(one, typ)
    assert list(describe(learn.dls).outputs['c'].vocab)==sorted(values)

def test_a_categorical_keeps_its_categories_and_their_order(folder):
    sizes = pd.CategoricalDtype(['small','mid','large','huge'], ordered=True)
    df = table(size=pd.Categorical([['large','small','mid'][i%3] for i in range(12)], dtype=sizes))
    learn = multi_learner(loaders(df, folder, dict(size=CategoryBlock)), simple_cnn, pretrained=False)
    assert list(describe(learn.dls).outputs['size'].vocab)==list(sizes.categories)
    assert learn.dls.train.one_batch()[1]['size'].tolist()==df['size'].cat.codes[:4].tolist()
    answers = learn.predict_df(df)
    assert answers['size'].dtype==sizes
    assert (answers['size']<='huge').all()

def test_composed_and_decomposed_letters_are_one_class_one_word_one_file(folder):
    names = ['\ud55c\uae00','caf\u00e9']
    def form(i): return ['NFC','NFD'][i//2%2]
    df = table(kind=lambda i: normalize(form(i), names[i%2]), text=lambda i: normalize(form(i), f'{names[i%2]} it'),
               tags=lambda i: [normalize(form(i), names[i%2])])
    df['file'] = [normalize('NFD' if i%3 else 'NFC', f'\ud55c{i}.png') for i in range(12)]
    for i in range(12): (folder/f'{i}.png').rename(folder/normalize(form(i), f'\ud55c{i}.png'))
    dls = loaders(df, folder, dict(kind=CategoryBlock, tags=MultiCategoryBlock), text='text',
                  text_block=PlainTextBlock(min_freq=1))
    x,y = dls.train.one_batch()
    assert not x.image.isnan().any()
    for n in ('kind','tags'): assert list(describe(dls).outputs[n].vocab)==sorted(names)
    assert y.kind.tolist()==[sorted(names).index(names[i%2]) for i in range(4)]
    assert torch.equal(x.text[0], x.text[2]) and torch.equal(x.text[1], x.text[3])
    assert set(describe(dls).inputs['text'].vocab)=={'xxpad','xxunk','it',*names}

@pytest.mark.parametrize('text', ['नमस्ते दुनिया', 'สวัสดี ชาวโลก', 'مَرْحَبًا بِالعَالَم', 'é à', 'தமிழ் மொழி'])
def test_marks_stay_in_their_word(text): assert split_words(text)==text.split()

def test_dollars_are_drawn(folder):
    from matplotlib import pyplot as plt
    name = '$\\frac$'
    df = table(kind=lambda i: [name,'$5 or $6'][i%2], text=lambda i: f'for {name}', boxes=lambda i: [[2,3,9,9]],
               names=lambda i: [name])
    dls = loaders(df, folder, dict(kind=CategoryBlock, boxes=BBoxBlock, names=BBoxLblBlock), text='text')
    dls.show_batch()
    fig = plt.gcf()
    fig.canvas.draw()
    texts = [t.get_text().replace(r'\$', '$') for ax in fig.axes for t in ax.texts]
    assert f'kind: {name}' in texts and name in texts
    assert 'for $\\ frac $' in [ax.get_title('left').replace(r'\$', '$') for ax in fig.axes]    # the tokens
    plt.close(fig)
