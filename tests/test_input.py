"The fast path gives the same batches as the slow path and plain fastai, bit for bit"
import random, warnings
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fasttransform import ItemTransform, Transform
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import ColReader, IndexSplitter, Normalize
from fastai.text.data import TextBlock
from fastai.text.core import BaseTokenizer
from fastai.vision.augment import (CropPad, DihedralItem, FlipItem, RandomCrop, RandomResizedCrop, Resize, ResizeMethod,
                                   aug_transforms)
from fastai.vision.core import Image, PILImage, PILImageBW
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, MaskBlock, PointBlock
from fastai_multi.core import flat, present
from fastai_multi.data.load import MultiDL
from fastai_multi.data.loaders import MultiDataLoaders
from fastai_multi.data.reader import BatchReader

n = 21

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "A table of pictures of several shapes and modes, in which some of every input and output are missing"
    path = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        h,w = [(48,64),(64,40),(50,50)][i%3]
        im = Image.fromarray(rng.integers(0, 255, (h//4,w//4,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC)
        Image.fromarray(rng.integers(0, 2, (h,w), dtype=np.uint8)).save(path/f'm{i}.png')
        if i%5==1: im = im.convert('L')
        if i%5==2: im = im.convert('P')
        if i%5==3: im = im.convert('RGBA')
        name = f'{i}.png' if i%5 in (2,3) else f'{i}.jpg'
        im.save(path/name)
        rows.append(dict(file=None if i in (4,9) else name, caption='' if i==5 else 'a red square on grey '*(1+i%4),
            kind=None if i==6 else 'abc'[i%3], tags=['|','x','x|y'][i%3],
            area=float('nan') if i==7 else i/3, x1=3, y1=4, x2=20+i%7, y2=30, eyes=[[5,6],[20,10+i%5]],
                boxes=[[1,2,10,12],[5,5,25,20]][:i%3], what=['cat','dog'][:i%3], mask=f'm{i}.png', is_valid=i<3))
    df = pd.DataFrame(rows)
    df.loc[8, ['x1','y1','x2','y2']] = np.nan
    return path,df

blocks = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock, box=BBoxBlock, eyes=PointBlock,
              boxes=BBoxBlock, what=BBoxLblBlock, mask=MaskBlock(['o','x']))

def loaders(table, names=tuple(blocks), image='file', text='caption', item_tfms=(), **kwargs):
    path,df = table
    df = df.assign(mask=[str(path/m) for m in df['mask']])
    cols = dict(box=['x1','y1','x2','y2'])
    return MultiDataLoaders.from_df(df, path, image=image, text=text, outputs={k: blocks[k] for k in names},
                                    columns={k:v for k,v in cols.items() if k in names}, label_delim='|',
                                    valid_col='is_valid', item_tfms=list(item_tfms), bs=4, device='cpu', **kwargs)

def the_long_way(dl): return dl.new(create_item=partial(MultiDL.create_item, dl))

def epoch(dl, seed=3):
    random.seed(seed)
    torch.manual_seed(seed)
    dl.rng = random.Random(seed)
    return list(dl)

def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, tuple):
        assert len(a) == len(b)
        for o,p in zip(a, b): same(o, p)
    else:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(torch.nan_to_num(a.as_subclass(torch.Tensor), -7.),
                           torch.nan_to_num(b.as_subclass(torch.Tensor), -7.))

def agree(dl, whole=None):
    "Check that `dl` gives the same epochs on both paths"
    reader = BatchReader.of(dl) if dl.before_iter() is None else None
    assert reader is not None
    assert whole is None or reader.whole == whole
    long = the_long_way(dl)
    assert BatchReader.of(long) is None
    a,b = epoch(dl),epoch(long)
    assert len(a) == len(b) > 0
    for o,p in zip(a, b): same(o, p)
    return a

class Darker(Transform):
    def encodes(self, x:PILImage): return PILImage.create(np.asarray(x)//2)

class Whole(ItemTransform):
    "A transform that needs the whole item and draws a random number"
    order = 3
    def encodes(self, b):
        random.random()
        return b

crops = [[Resize(24)], [Resize((20,32), method='pad', pad_mode='zeros')], [Resize((20,32), method='pad')],
         [Resize(24, method='squish')], [RandomResizedCrop(24, min_scale=.3)], [RandomResizedCrop((20,28))],
         [RandomCrop(30)], [CropPad(70), Resize(16)]]
own = [[Darker(), Resize(24)], [Resize(24), Darker(order=2)], [FlipItem(), RandomResizedCrop(24), DihedralItem()],
       [CropPad(70), Darker(), Resize(24), Whole()]]

@pytest.mark.parametrize('tfms', crops, ids=str)
def test_known_transforms(table, tfms):
    dls = loaders(table, item_tfms=tfms)
    for dl in dls: agree(dl, whole=True)

@pytest.mark.parametrize('tfms', own, ids=str)
def test_own_transforms_keep_their_place(table, tfms):
    dls = loaders(table, item_tfms=tfms)
    for dl in dls: agree(dl, whole=False)

@pytest.mark.parametrize('image,text', [('file',None), (None,'caption'), ('file','caption')])
def test_inputs(table, image, text):
    dls = loaders(table, ['kind','tags','area'], image, text, [Resize(24)] if image else [])
    b = agree(dls.train, whole=True)[0]
    assert b[1].kind.shape == (4,)

def test_features(table):
    path,df = table
    df = df.assign(vec=[None if i==5 else [i,1.] for i in range(n)], is_valid=[i<3 for i in range(n)])
    dls = MultiDataLoaders.from_df(df, path, image='file', features='vec', outputs=dict(area=RegressionBlock),
                                   valid_col='is_valid', item_tfms=Resize(24), bs=4, device='cpu')
    bs = agree(dls.train, whole=True)
    # a shuffled epoch drops its last, short batch
    assert sum((~present(b[0].features)).sum() for b in bs) in (0,1)

class Photo:
    "A custom picture class that `Resize` and `ToTensor` support"
    def __init__(self, im): self.im = im

def test_names_on_both_sides(table):
    "An output may have the same name as an input"
    path,df = table
    df = df.assign(image=df.boxes, text=df.what)
    dls = MultiDataLoaders.from_df(df, path, image='file', text='caption',
                                   outputs=dict(image=BBoxBlock, text=BBoxLblBlock), valid_col='is_valid',
                                   item_tfms=Resize(24), bs=4, device='cpu')
    bs = agree(dls.train, whole=True)
    assert all(b[1].image.shape[:2] == b[1].text.shape for b in bs)

def test_a_picture_type_of_one_s_own(table):
    "Known transforms treat an added type as fastai does"
    from fastai.data.block import TransformBlock
    from fastai.data.transforms import ToTensor
    from fastai_multi.data.geometry import SafeResize
    @SafeResize
    def encodes(self, x:Photo): return Photo(x.im.resize((5,6)))
    @ToTensor
    def encodes(self, x:Photo): return torch.from_numpy(np.array(x.im.convert('L')))
    path,df = table
    df = df[df.file.notna()].assign(again=[str(path/f) for f in df.file[df.file.notna()]])
    outputs = dict(kind=CategoryBlock, again=TransformBlock(type_tfms=lambda f: Photo(Image.open(f))))
    dls = MultiDataLoaders.from_df(df, path, image='file', outputs=outputs, valid_col='is_valid', item_tfms=Resize(24),
                                   bs=4, device='cpu')
    assert agree(dls.train, whole=True)[0][1].again.shape == (4,6,5)

def test_absent_pictures_are_marked(table):
    dls = loaders(table, ['kind','box'], text=None, item_tfms=[Resize(24)], shuffle=False)
    bs = agree(dls.train, whole=True)
    x = torch.cat([b[0] for b in bs])
    box = torch.cat([b[1].box for b in bs])
    gone = [i-3 for i in (4,9)]
    assert (~present(x)).nonzero().flatten().tolist() == gone
    assert (~present(box)).nonzero().flatten().tolist() == sorted([*gone, 8-3])

def test_augmented(table):
    dls = loaders(table, item_tfms=[Resize(32)],
                  batch_tfms=[*aug_transforms(size=24, min_scale=.6), Normalize.from_stats([.5]*3, [.5]*3)])
    for dl in dls: agree(dl, whole=True)

def test_workers_and_order(table):
    dls = loaders(table, item_tfms=[Resize(24)])
    one = [epoch(dls.valid.new(num_workers=w, shuffle=s)) for w in (0,2) for s in (False,True)]
    for a,b in ((one[0],one[2]), (one[1],one[3])):
        for o,p in zip(a, b): same(o, p)

def test_test_sets(table):
    dls = loaders(table, item_tfms=[Resize(24)])
    df = table[1].assign(mask=[str(table[0]/m) for m in table[1]['mask']])
    for with_labels in (True, False): agree(dls.test_dl(df, with_labels=with_labels), whole=True)
    for b in epoch(dls.test_dl(df)): assert len(b) == 1

def test_items_that_are_no_table(table):
    "The items are dicts that getters read, with points and a mask"
    from fastai_multi.data.block import ImageTextBlock, MultiOutputBlock
    path,df = table
    rows = [dict(pair=(None if not isinstance(r.file, str) else path/r.file, r.caption),
        outs=dict(kind=r.kind, eyes=r.eyes, mask=path/r['mask'])) for _,r in df.iterrows()]
    dblock = DataBlock((ImageTextBlock,
                        MultiOutputBlock(kind=CategoryBlock, eyes=PointBlock, mask=MaskBlock(['o','x']))),
                       get_x=lambda o: o['pair'], get_y=lambda o: o['outs'], splitter=IndexSplitter([0,1,2]),
                       item_tfms=Resize(24))
    for dl in dblock.dataloaders(rows, bs=4, device='cpu'): agree(dl, whole=True)

def test_flat_form(table):
    path,df = table
    df = df[df.file.notna() & df.kind.notna() & df.area.notna()]
    dblock = DataBlock((ImageBlock, TextBlock.from_df('caption', tok=BaseTokenizer()), CategoryBlock, RegressionBlock),
                       n_inp=2, splitter=IndexSplitter([0,1]), item_tfms=Resize(24),
                       get_x=[ColReader('file', pref=path), ColReader('text')],
                       get_y=[ColReader('kind'), ColReader('area')], dl_type=MultiDL)
    for dl in dblock.dataloaders(df, bs=4, device='cpu'): agree(dl)

# Against plain fastai

@pytest.mark.parametrize('tfm', [Resize(24), Resize((20,32)), Resize(24, method=ResizeMethod.Squish),
    Resize((20,32), method=ResizeMethod.Pad), RandomResizedCrop(24), RandomCrop(30)], ids=str)
@pytest.mark.parametrize('cls', [PILImage, PILImageBW])
def test_pixels_are_fastai_s(table, tfm, cls):
    path,df = table
    df = df[df.file.notna() & df.kind.notna()].assign(is_valid=[i<3 for i in range(n-3)])
    dblock = DataBlock((ImageBlock(cls), CategoryBlock), get_x=ColReader('file', pref=path), get_y=ColReader('kind'),
        splitter=IndexSplitter([0,1,2]), item_tfms=tfm)
    theirs = dblock.dataloaders(df, bs=4, device='cpu', shuffle=False)
    ours = MultiDataLoaders.from_df(df, path, image='file', outputs=CategoryBlock, columns='kind', valid_col='is_valid',
                                    item_tfms=tfm, img_cls=cls, bs=4, device='cpu', shuffle=False)
    for a,b in zip(ours, theirs):
        reader = BatchReader.of(a) if a.before_iter() is None else None
        assert reader.whole
        for o,p in zip(epoch(a), epoch(b)):
            same(o[0], p[0])
            assert o[1].tolist() == p[1].tolist()

def test_an_error_names_the_item(table):
    path,df = table
    (path/'broken.jpg').write_bytes(b'not a picture')
    df = df.assign(file=['broken.jpg' if i==11 else f for i,f in enumerate(df.file)])
    for tfms in ([Resize(24)], [Darker(), Resize(24)]):
        dls = loaders((path, df), ['kind'], text=None, item_tfms=tfms, shuffle=False)
        with pytest.raises(ValueError, match=r"broken.jpg' cannot be opened .*row 11 of the table"): list(dls.train)

def test_transparent_pixels_are_white_in_training_and_in_answers(tmp_path):
    "The colours under transparent pixels are never read, from RGBA or a palette, and there is no warning"
    im = Image.new('RGBA', (32,32), (255,128,0,0))
    im.paste((0,0,255,255), (0,0,32,16))
    im.save(tmp_path/'0.png')
    im.save(tmp_path/'1.webp', lossless=True, exact=True)
    palette = Image.fromarray(np.repeat(np.array([0,1], np.uint8), 16*32).reshape(32,32), mode='P')
    palette.putpalette([0,0,255, 255,128,0])
    palette.save(tmp_path/'2.png', transparency=b'\xff\x00')
    files = ['0.png', '1.webp', '2.png']
    df = pd.DataFrame(dict(file=files, kind=list('aba'), is_valid=[False,False,True]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dls = MultiDataLoaders.from_df(df, tmp_path, image='file', outputs=dict(kind=CategoryBlock), bs=1, num_workers=0,
                                       valid_col='is_valid', item_tfms=Resize(32))
        asked = [dls.test_dl(df).one_batch()[0], dls.test_dl([im]).one_batch()[0]]
    for x in [dls.train_ds[0][0], dls.train_ds[1][0], dls.valid_ds[0][0]]:
        assert x.getpixel((5,30))==(255,255,255)
        assert x.getpixel((5,5))==(0,0,255)
    for x in asked: assert (x[0,:,30,5]==1).all()
