"""All data layers together: every block in batches, augmented and shown; missing values; copied, test and pickled
loaders; real boxes and keypoints"""
import io, json, math, pickle, subprocess, sys
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
from matplotlib import pyplot as plt
from fastcore.all import first
from fasttransform import Transform
from fastai.torch_core import Tensor, TensorImage, TensorCategory, TensorMultiCategory, TensorMask, TitledFloat
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import ColReader, Normalize, RandomSplitter
from fastai.text.core import BaseTokenizer
from fastai.text.data import TensorText, TextBlock
from fastai.vision.augment import (CropPad, Dihedral, FlipItem, RandomCrop, RandomResizedCrop, Resize, Zoom,
                                   aug_transforms)
from fastai.vision.core import Image, TensorBBox, TensorPoint, imagenet_stats
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, MaskBlock, PointBlock
from fastai_multi import *
from fastai_multi.core import IGNORE, flat, is_missing, present

root = Path(__file__).resolve().parent.parent

# A drawn data set: a bright box on a dark background, with every kind of label

def draw_item(i, folder):
    w,h = [(60,40),(40,60),(50,50)][i%3]
    x1,y1 = 4+i%7, 5+i%5
    x2,y2 = x1+20+i%4, y1+18
    a = np.full((h,w,3), 30, dtype=np.uint8)
    a[y1:y2,x1:x2] = (220,80,40)
    Image.fromarray(a).save(folder/f'{i}.png')
    m = np.zeros((h,w), dtype=np.uint8)
    m[y1:y2,x1:x2] = 1
    Image.fromarray(m).save(folder/f'm{i}.png')
    kind = ['cup','car','tree'][i%3]
    return dict(file=f'{i}.png', caption=f'a {["small","big"][i%2]} {kind}'+' on a very long shelf'*(i%2), kind=kind,
                tags=['|','warm','warm|big'][i%3], x1=x1, y1=y1, x2=x2, y2=y2, price=10.+i, lat=float(i), lon=-2.*i,
                mask=f'm{i}.png', boxes=[[x1,y1,x2,y2]]*(i%3), labels=['a','b'][:i%3], eyes=[[x1,y1],[x2-1,y2-1]],
                vec=[1.,float(i)])

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')
    return folder,pd.DataFrame([draw_item(i, folder) for i in range(24)])

class Halves(Transform):
    "A transform for the output of a custom block"
    def encodes(self, o): return torch.tensor([o/2.])
    def decodes(self, o): return TitledFloat(float(o)*2)

def every_block(folder):
    return dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, price=RegressionBlock,
                place=RegressionBlock(n_out=2), boxes=BBoxBlock, labels=BBoxLblBlock, eyes=PointBlock,
                mask=MaskBlock(['ground','thing']), half=TransformBlock(type_tfms=Halves()))

columns = dict(box=['x1','y1','x2','y2'], place=['lat','lon'], half='price')

def loaders(table, outputs=None, df=None, **kwargs):
    folder,full = table
    df = (full if df is None else df).copy()
    outputs = every_block(folder) if outputs is None else outputs
    kw = dict(image='file', text='caption', bs=6, valid_pct=.25, seed=1, num_workers=0, device='cpu',
              item_tfms=Resize(32), label_delim='|',
              columns={k:v for k,v in columns.items() if k in outputs} if isinstance(outputs, dict) else None)
    return MultiDataLoaders.from_df(df, folder, outputs=outputs, **{**kw, **kwargs})

@pytest.fixture(scope='module')
def dls(table):
    return loaders(table, batch_tfms=[*aug_transforms(size=28, min_scale=.75), Normalize.from_stats(*imagenet_stats)])

def leaves(b): return {n:t for part in b for n,t in part.items()}

# Batches

def test_every_block_in_one_batch(dls):
    for dl in dls.loaders:
        x,y = dl.one_batch()
        assert type(x) is ImageText and isinstance(y, Outputs)
        assert type(x.image) is TensorImage and x.image.shape==(6,3,28,28) and x.image.dtype==torch.float32
        assert y.kind.shape==(6,)
        assert y.tags.shape==(6,2)
        assert y.box.shape==(6,4)
        assert y.price.shape==(6,)
        assert y.place.shape==(6,2)
        assert y.boxes.shape[::2]==(6,4)
        assert y.labels.shape==y.boxes.shape[:2]
        assert y.eyes.shape==(6,2,2)
        assert y.mask.shape==(6,28,28)
        assert y.half.shape==(6,1)
        assert [type(t) for t in (y.kind, y.tags, y.box, y.eyes, y.mask)]==[
            TensorCategory, TensorMultiCategory, TensorBBox, TensorPoint, TensorMask
        ]
        for t in (y.box, y.boxes): assert t[~t.isnan()].abs().max()<=1

def test_describe(dls):
    d = describe(dls)
    assert {n:p.kind for n,p in d.inputs.items()}==dict(image='image', text='text') and d.named
    assert {n:(p.kind,p.c) for n,p in d.outputs.items()}==dict(
        kind=('category',3), tags=('tags',2), box=('box',4), price=('number',1), place=('number',2), boxes=('boxes',4),
        labels=('labels',d.outputs['labels'].c), eyes=('points',4), mask=('mask',2), half=('other',1)
    )
    assert describe(dls.valid).outputs['kind'] is d.outputs['kind']

def test_numbers_are_standardised_by_the_training_split(table, dls):
    p = describe(dls).outputs['price']
    train = dls.train_ds.items
    assert float(p.mean)==pytest.approx(train.price.mean()) and float(p.std)==pytest.approx(train.price.std(ddof=0))
    i = dls.valid_ds.items.iloc[0]
    assert float(p.decode(dls.valid.one_batch()[1].price[0]))==pytest.approx(i.price, abs=1e-4)

def test_geometry_follows_the_picture(table):
    "The box, the points and the mask match the bright box of each picture after crops, flips and rotations"
    for item in (Resize(48), Resize(48, 'squish'), Resize(48, 'pad', 'zeros'), RandomResizedCrop(48, min_scale=.6),
                 [Resize(60), RandomCrop(48)], [FlipItem(.5), Resize(48)], [CropPad(64), Resize(48)]):
        dls = loaders(table, dict(box=BBoxBlock, eyes=PointBlock, mask=MaskBlock()), item_tfms=item,
                      batch_tfms=[Dihedral(), Zoom(max_zoom=1.2)], bs=18)
        for dl in dls.loaders:
            x,y = dl.one_batch()
            for im,box,m in zip(x.image, y.box, y.mask):
                bright = im[0]>.55
                assert bool(((m==1)==bright).float().mean()>.9)
                if box.isnan().any() or bright.sum()<80: continue
                ys,xs = torch.where(bright)
                seen = torch.tensor([xs.min(), ys.min(), xs.max()+1, ys.max()+1])*2/48-1
                assert (seen-box).abs().max()<4*2/48, (item, seen, box)

# Missing values

def with_holes(df):
    df = df.copy().astype(object)
    for c in ('kind','tags','x1','y1','x2','y2','price','lat','lon','mask','boxes','eyes'):
        df.loc[df.index[::4], c] = None
    df.loc[df.index[1::4], 'file'] = None
    df.loc[df.index[2::4], 'caption'] = ''
    return df

def test_missing_labels_pictures_and_texts(table):
    df = with_holes(table[1])
    df['half'] = [None if is_missing(p) else float(p) for p in df.price]
    dls = loaders(table, df=df, columns={**columns, 'half':'half'}, batch_tfms=aug_transforms(size=28, min_scale=.75),
                  shuffle=False, seed=3, bs=18)
    x,y = dls.train.one_batch()
    rows = dls.train_ds.items
    order = list(dls.train.get_idxs())
    nolabel = [is_missing(rows.kind.iloc[i]) for i in order]
    nopic   = [is_missing(rows.file.iloc[i]) for i in order]
    notext  = [rows.caption.iloc[i]=='' for i in order]
    assert any(nolabel) and any(nopic) and any(notext)
    for n in ('kind','tags','price','place','half'): assert present(y[n]).tolist()==[not o for o in nolabel], n
    assert (~present(x.image)).tolist()==nopic and (x.text==0).all(1).tolist()==notext
    assert x.image[[i for i,o in enumerate(nopic) if not o]].isfinite().all()
    gone = [a or b for a,b in zip(nolabel, nopic)]
    for n in ('box','eyes','mask'): assert all((~present(y[n]))[i] for i,g in enumerate(gone) if g), n
    assert ((y.labels==IGNORE).all(1)).tolist()==gone
    assert not any(c in describe(dls).outputs['kind'].vocab for c in ('nan','None','#na#'))

def test_a_batch_with_nothing_at_all(table):
    df = table[1].copy().astype(object)
    df.loc[df.index[:6], ['file','caption']] = None
    df['v'] = [False]*6+[False]*12+[True]*6
    dls = loaders(table, df=df, valid_col='v', item_tfms=Resize(40), batch_tfms=aug_transforms())
    dl = dls.test_dl(df.iloc[:6], with_labels=True)
    x,y = dl.one_batch()
    assert x.image.shape==(6,3,40,40)
    assert x.image.isnan().all()
    assert x.text.shape==(6, 1)
    assert present(y.kind).all()
    assert not present(y.box).any()

def test_labels_missing_in_a_whole_batch(table):
    df = table[1].copy().astype(object)
    df.loc[df.index[12:], ['kind','tags','price','x1','y1','x2','y2','eyes','boxes','lat','lon']] = None
    df['v'] = [False]*12+[True]*12
    outs = {k:v for k,v in every_block(table[0]).items() if k not in ('mask','half')}
    x,y = loaders(table, outs, df=df, valid_col='v').valid.one_batch()
    for n in ('kind','tags','price','place','box','boxes','eyes'): assert not present(y[n]).any(), n

def test_no_box_is_not_no_label(table):
    df = table[1].copy()
    x,y = loaders(table, dict(boxes=BBoxBlock, labels=BBoxLblBlock), df=df, bs=18, shuffle=False).train.one_batch()
    assert not (y.labels==IGNORE).any() and (y.labels==0).all(1).any()
    assert ((y.labels==0)==y.boxes.isnan().all(-1)).all()

def test_a_crop_that_removes_boxes(table):
    dls = loaders(table, dict(box=BBoxBlock, boxes=BBoxBlock, labels=BBoxLblBlock, eyes=PointBlock),
                  item_tfms=[Resize(96), RandomCrop(24)], bs=18)
    seen = [dls.train.one_batch()[1] for _ in range(8)]
    assert any(y.box.isnan().any() for y in seen)
    for y in seen:
        assert ((y.labels==0)==y.boxes.isnan().all(-1)).all()
        for t in (y.box,y.boxes): assert (t[...,2:]>t[...,:2])[~t.isnan().any(-1)].all()

# Inputs

def test_picture_alone_text_alone_features_alone(table):
    for kw,typ in ((dict(text=None),TensorImage), (dict(image=None),TensorText),
                   (dict(image=None, text=None, features='vec'),Tensor)):
        if 'image' in kw: kw['item_tfms'] = None
        d = loaders(table, CategoryBlock, columns='kind', **kw)
        x,y = d.one_batch()
        assert type(x) is typ and type(y) is TensorCategory and not describe(d).named

def test_features_beside_picture_and_text(table):
    d = loaders(table, CategoryBlock, columns='kind', features=['lat','lon'], shuffle=False)
    x,y = d.train.one_batch()
    assert x.keys()==('image','text','features')
    rows = d.train_ds.items.iloc[list(d.train.get_idxs())[:6]]
    assert x.features.tolist()==rows[['lat','lon']].values.tolist()

def test_texts_of_like_length_share_a_batch(table):
    folder,df = table
    df = pd.concat([df]*4, ignore_index=True)
    d = loaders(table, CategoryBlock, columns='kind', df=df, image=None, item_tfms=None)
    short = lambda dl: sum((x!=0).sum(1).max()==(x!=0).sum(1).min() for x,_ in dl)/len(dl)
    assert short(d.train)>.7 > short(d.train.new(bucket=False))
    assert list(d.valid.get_idxs())==list(range(len(d.valid_ds)))

def test_vocabulary_is_of_the_training_split(table):
    df = table[1].copy()
    df['v'] = df.index>=18
    df.loc[df.v, 'caption'] = 'zebra zebra zebra'
    d = loaders(table, CategoryBlock, columns='kind', df=df, valid_col='v')
    assert 'zebra' not in describe(d).inputs['text'].vocab

# fastai's own calls

def test_flat_blocks_of_fastai(table):
    folder,df = table
    block = DataBlock((ImageBlock, TextBlock.from_df('caption', tok=BaseTokenizer(), min_freq=1), CategoryBlock,
                       CategoryBlock),
                      n_inp=2,
                      getters=[ColReader('file', pref=folder), ColReader('text'), ColReader('kind'), ColReader('kind')],
                      splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    plain = DataBlock((ImageBlock, CategoryBlock), getters=[ColReader('file', pref=folder), ColReader('kind')],
                      splitter=RandomSplitter(seed=1),
                      item_tfms=Resize(32)).dataloaders(df, bs=4, device='cpu', num_workers=0)
    for dls in (MultiDataLoaders.from_dblock(block, df, bs=4, device='cpu', num_workers=0),
                DataLoaders(*[dl.new(cls=MultiDL) for dl in block.dataloaders(df, bs=4, device='cpu', num_workers=0)])):
        img,txt,a,b = dls.one_batch()
        assert type(dls.train) is MultiDL
        assert img.shape==(4,3,32,32)
        assert type(txt) is TensorText
        assert type(a) is TensorCategory
        assert torch.equal(a, b)
        d = describe(dls)
        assert list(d.inputs)==['image','text']
        assert list(d.outputs)==['category','category_2']
        assert d.outputs['category'].c==3
        assert d.inputs['text'].pad_id==d.inputs['text'].vocab.index('xxpad')
        assert (txt[:,0]!=d.inputs['text'].pad_id).all()
        dls.show_batch()
        plt.close('all')
        dls.train.show_results((img,txt,a,b), (a,b))
        plt.close('all')
        assert len(dls.test_dl(df.iloc[:3].assign(text=df.caption)).one_batch())==2
    assert describe(plain).outputs['category'].c==3

def test_plain_fastai_targets_beside_our_inputs(table):
    folder,df = table
    x = dict(get_x=InputReader('file','caption', pref=folder), splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    for block,col,kind in ((CategoryBlock,'kind','category'), (RegressionBlock,'price','number'),
                           (PointBlock,'eyes','points'), (BBoxBlock,['x1','y1','x2','y2'],'box'),
                           (MultiCategoryBlock,'labels','tags')):
        d = DataBlock((ImageTextBlock, block), get_y=ColReader(col),
                      **x).dataloaders(df, bs=4, device='cpu', num_workers=0)
        xb,yb = d.one_batch()
        (n,p), = describe(d).outputs.items()
        assert (n,p.kind)==(kind,kind) and not describe(d).named and len(yb)==4 and p.c
        d.show_batch()
        plt.close('all')
    d = DataBlock((ImageTextBlock, RegressionBlock), get_y=ColReader('price'),
                  **x).dataloaders(df, bs=20, device='cpu', num_workers=0)
    assert abs(float(d.one_batch()[1].mean()))<1e-3, 'standardised'

def test_summary(table):
    folder,df = table
    def y(r): return dict(kind=r['kind'], box=[r['x1'],r['y1'],r['x2'],r['y2']], boxes=r['boxes'], labels=r['labels'])
    block = DataBlock((ImageTextBlock,
                       MultiOutputBlock(kind=CategoryBlock, box=BBoxBlock, boxes=BBoxBlock, labels=BBoxLblBlock)),
                      get_x=InputReader('file','caption', pref=folder), get_y=y, item_tfms=Resize(32),
                      batch_tfms=aug_transforms())
    out = io.StringIO()
    with redirect_stdout(out): block.summary(df, show_batch=True)
    plt.close('all')
    assert 'Building one batch' in out.getvalue() and 'failed' not in out.getvalue() and 'applying' in out.getvalue()

def test_a_block_serves_two_data_sets(table):
    folder,df = table
    block = DataBlock((ImageTextBlock, MultiOutputBlock(kind=CategoryBlock, price=RegressionBlock)),
                      get_x=InputReader('file','caption', pref=folder), get_y=OutputReader(kind='kind', price='price'),
                      splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    a = block.dataloaders(df, bs=4, num_workers=0, device='cpu')
    mean = float(describe(a).outputs['price'].mean)
    b = block.dataloaders(df[df.kind!='cup'], bs=4, num_workers=0, device='cpu')
    assert describe(a).outputs['kind'].c==3
    assert describe(b).outputs['kind'].c==2
    assert float(describe(a).outputs['price'].mean)==mean

# Loaders made from loaders

def same(a, b):
    a,b = ([t.as_subclass(Tensor) for t in flat(o)] for o in (a,b))
    return (len(a)==len(b)
            and all(torch.equal(torch.nan_to_num(p.float()), torch.nan_to_num(q.float())) for p,q in zip(a,b)))

def test_workers_give_the_same_batches(table):
    df = with_holes(table[1])
    df['half'] = [None if is_missing(p) else float(p) for p in df.price]
    d = loaders(table, df=df, columns={**columns, 'half':'half'})
    for a,b in zip(d.valid, d.valid.new(num_workers=2)):
        assert same(a, b)
        assert [type(o) for o in flat(a)]==[type(o) for o in flat(b)]
        assert type(a[0]) is type(b[0])
        assert type(a[1]) is type(b[1])
    assert sum(len(y.kind) for _,y in d.train.new(num_workers=2, drop_last=False))==len(d.train_ds)

def test_new_and_test_dl(table, dls):
    df = table[1]
    dl = dls.test_dl(df.iloc[:5])
    assert type(dl) is MultiDL
    assert len(dl.one_batch())==1
    assert type(dl.one_batch()[0]) is ImageText
    assert len(dl.dataset)==5
    full = dls.test_dl(df.iloc[:5], with_labels=True)
    assert full.one_batch()[1].kind.tolist()==[['car','cup','tree'].index(k) for k in df.kind[:5]]
    assert same(full.one_batch()[0], dl.one_batch()[0])
    dl = dls.train.new(bs=3, shuffle=False)
    assert dl.bs==3 and type(dl) is MultiDL and dl.one_batch()[1].kind.shape==(3,)
    dl = dls.test_dl(df.drop(columns=['kind','price']).iloc[:2])
    assert dl.one_batch()[0].image.shape[0]==2
    dl = dls.test_dl([(table[0]/'0.png', 'a big cup'), (None, 'a car'), (table[0]/'1.png', None)])
    assert present(dl.one_batch()[0].image).tolist()==[True,False,True]

def test_loaders_pickle(table, dls, tmp_path):
    "Loaders are pickled as `Learner.export` does it, and read in a fresh process"
    d = dls.new_empty()
    with open(tmp_path/'dls.pkl','wb') as f: pickle.dump(d, f)
    df = table[1].iloc[:4]
    df.to_pickle(tmp_path/'df.pkl')
    code = f'''
import pickle, pandas as pd, torch
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fastai_multi import *
from fastai_multi.core import IGNORE, flat, is_missing, present
import test_data
d = pickle.load(open({str(tmp_path/'dls.pkl')!r},'rb'))
x, = d.test_dl(pd.read_pickle({str(tmp_path/'df.pkl')!r}), num_workers=0).one_batch()
print(float(torch.nan_to_num(x.image).double().sum()), int(x.text.sum()))
print(describe(d).outputs['kind'].vocab[0], type(x).__name__)
'''
    r = subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, cwd=root)
    assert r.returncode==0, r.stderr[-2000:]
    x, = dls.test_dl(df).one_batch()
    got = r.stdout.split()
    assert float(got[0])==pytest.approx(float(x.image.double().sum()), rel=1e-5)
    assert got[1:]==[str(int(x.text.sum())),'car','ImageText']

def test_making_loaders_opens_at_most_three_pictures(table, monkeypatch):
    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, 'open', lambda f, *a, **k: (opened.append(f), real_open(f, *a, **k))[1])
    loaders(table, batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    assert len(opened)<=3, opened
    opened.clear()
    d = loaders(table, CategoryBlock, columns='kind', df=pd.concat([table[1]]*5, ignore_index=True))
    d.train.lengths
    assert len(opened)<=3, opened

def test_names_survive_pinned_memory(table):
    "torch turns tuples into lists when it pins memory"
    dl = loaders(table).valid
    b = dl.do_batch([dl.do_item(i) for i in range(3)])
    got = dl.after_batch(tuple(list(o) for o in b))
    assert type(got[0]) is ImageText and got[1].keys()==b[1].keys() and same(got, dl.after_batch(b))

def test_added_transforms_run_once(table):
    d = loaders(table, CategoryBlock, columns='kind')
    d.add_tfms([Normalize.from_stats(*imagenet_stats, cuda=False)], 'after_batch')
    for dl in d.loaders: assert sum(isinstance(t, Normalize) for t in dl.after_batch.fs)==1
    assert d.one_batch()[0].image.min()<-.5

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_placement_on_a_gpu(table):
    x,y = loaders(table, device='cuda', batch_tfms=aug_transforms()).one_batch()
    assert all(t.is_cuda for t in [*flat(x), *flat(y)])

# Showing

def texts(fig): return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]

def test_show_batch_names_every_target(dls):
    dls.show_batch(max_n=4)
    said = '\n'.join(texts(plt.gcf()))
    plt.close('all')
    for n in describe(dls).outputs:
        if n!='labels': assert n in said, n

def test_show_results_marks_right_and_wrong(table):
    d = loaders(table, dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, price=RegressionBlock))
    x,y = b = d.valid.one_batch()
    for out,ok in ((y, '✓'), (type(y)([(y.kind+1)%3, 1-y.tags, -y.box[:,[2,3,0,1]]*.1, y.price+3]), '✗')):
        d.valid.show_results(b, out, max_n=3)
        said = [t for t in texts(plt.gcf()) if t[0] in '✓✗']
        plt.close('all')
        assert len(said)==12 and all(t[0]==ok for t in said), said
    d.valid.show_results((x,), y, max_n=2)
    plt.close('all')
    dl = d.test_dl(table[1].iloc[:3])
    dl.show_results(dl.one_batch(), y.map(lambda t: t[:3]))
    plt.close('all')
    dl.show_batch()
    plt.close('all')
    d.train.show_batch(unique=True, max_n=2)
    plt.close('all')

# Mistakes

@pytest.mark.parametrize('change,words', [
    (dict(image='fil'), "`image` names the column 'fil', which the table does not have. Did you mean 'file'?"),
    (dict(text='captoin'), "Did you mean 'caption'?"),
    (dict(columns=dict(knd='kind')), "Unknown output in `columns` 'knd'. Did you mean 'kind'?"),
    (dict(columns=dict(kind='kin')), "`columns['kind']` names the column 'kin'"),
    (dict(outputs=dict(kinds=CategoryBlock)), "Output 'kinds' is not a column of the table. Did you mean 'kind'?"),
    (dict(outputs=dict(where=BBoxBlock)), "or if it has several, give them: columns={'where': …}."),
    (dict(outputs=None), '`outputs` is missing'),
    (dict(outputs=CategoryBlock), 'one block without a name needs its column'),
    (dict(outputs=dict(kind=3)), "The block of output 'kind' is 3"),
    (dict(image=None, text=None), 'There is no input'),
    (dict(valid_col='is_valid'), "`valid_col` names the column 'is_valid'"),
    (dict(outputs=dict(tags=MultiCategoryBlock)),
     "Output 'tags' is '|', where a list was expected. Split it first, or give `label_delim=`"),
    (dict(outputs=dict(box=BBoxBlock), columns=dict(box=['x1','y1','x2','y2']), image=None),
     "Output 'box' lies in a picture, but there is no picture among the inputs: ['text']"),
    (dict(outputs=[CategoryBlock]), 'it takes a dict of blocks by output'),
    (dict(outputs='mask'), "The block of output 'mask' cannot be inferred: its column holds files of pictures"),
    (dict(image=['file','file']), "`image` names the column 'file' twice"),
    (dict(image=[]), '`image` is an empty list'),
    (dict(itemtfms=Resize(32)), "Unknown argument 'itemtfms'. Did you mean 'item_tfms'?"),
    (dict(folder='pics'), "There is no folder"),
    (dict(suff='.jpg'), "nor any other of the table. Files are searched in `path`"),
    (dict(valid_pct=0), 'both need some'),
])
def test_mistakes_in_a_call(table, change, words):
    folder,df = table
    right = dict(image='file', text='caption', outputs=dict(kind=CategoryBlock), item_tfms=Resize(32), num_workers=0)
    with pytest.raises((KeyError,ValueError,TypeError)) as e:
        MultiDataLoaders.from_df(df[::3], folder, **{**right, **change})
    assert words in str(e.value), str(e.value)

def test_every_argument_of_fastais_loaders_is_taken(table):
    class Own(MultiDL):
        def __init__(self, *args, mine=None, **kwargs): super().__init__(*args, **kwargs)
    kw = dict(image='file', outputs=dict(kind=CategoryBlock), item_tfms=Resize(32), bs=4)
    d = MultiDataLoaders.from_df(table[1], table[0], **kw, val_shuffle=True, val_num_workers=0, num_workers=0,
                                 dl_kwargs=[{}, dict(bs=2)], drop_last=False, after_iter=None, dl_type=Own, mine=1)
    assert d.valid.bs==2 and d.valid.shuffle and type(d.train) is Own

def mistake(table, words, outputs=dict(kind=CategoryBlock), df=None, **kw):
    with pytest.raises(ValueError) as e:
        for dl in loaders(table, outputs, df=df, **kw).loaders:
            for _ in dl: pass
    for w in words: assert w in str(e.value), str(e.value)

def test_mistakes_in_the_data(table):
    df = table[1]
    mistake(table, ["`image`: 1 of 24 files is missing", "nowhere.png' (row 5)", 'empty the cell'],
            df=df.assign(file=[f if i!=5 else 'nowhere.png' for i,f in enumerate(df.file)]))
    (table[0]/'broken.png').write_bytes(b'no picture')
    mistake(table, ["the picture", 'broken.png', 'cannot be opened', 'row 5 of the table'],
            df=df.assign(file=[f if i!=5 else 'broken.png' for i,f in enumerate(df.file)]), drop_last=False)
    mistake(table,
            ["Output 'box': the box [4, 5, 400, 23] reaches beyond its picture, which is 60 wide and 40 high",
             'row 0 of the table'],
            dict(box=BBoxBlock), df=df.assign(x2=[400 if i==0 else v for i,v in enumerate(df.x2)]), drop_last=False)
    mistake(table, ["Output 'box': the box", 'has no area'], dict(box=BBoxBlock), df=df.assign(x2=df.x1))
    mistake(table, ["Input 'image' differs in size within a batch", 'item_tfms=Resize(size)'], item_tfms=None)
    mistake(table, ["Output 'labels' has 2 labels, but output 'boxes' has 1 boxes"],
            dict(boxes=BBoxBlock, labels=BBoxLblBlock), df=df.assign(boxes=[[[1,1,9,9]]]*24, labels=[['a','b']]*24))
    mistake(table, ["Output 'kind' has no label in the training split"], df=df.assign(kind=None))
    mistake(table, ["Output 'price' is 'dear', where a number was expected"], dict(price=RegressionBlock),
            df=df.assign(price=['dear']*24))
    mistake(table, ["Input 'text' is 3, of type int, where a text was expected"], df=df.assign(caption=3))
    mistake(table, ["x2 = x+width", 'row 5 of the table'], dict(box=BBoxBlock),
            df=df.assign(x2=[v if i!=5 else 1 for i,v in enumerate(df.x2)]))
    mistake(table, ["all boxes of the training split lie between 0 and 1", 'multiply them by its width'],
            dict(box=BBoxBlock), df=df.assign(**df[['x1','y1','x2','y2']]/1000))
    mistake(table, ["is a text: give one column for each number"], dict(box=BBoxBlock),
            df=df.assign(box='[1, 2, 3, 4]'), columns=None)
    mistake(table, ["pd.to_numeric(column, errors='coerce')"], dict(price=RegressionBlock), df=df.assign(price='1,99'))
    mistake(table, ["`valid_col`='v' holds the texts 'False'"], df=df.assign(v='False'), valid_col='v')
    mistake(table, ["without rows"], df=df[:0])
    mistake(table, ["`columns['kind']` names the column 'kind', which the table has 2 times"],
            df=pd.concat([df, df[['kind']]], axis=1))
    mistake(table, ["has the class 0.5", 'use RegressionBlock'],
            df=df.assign(kind=[.1 if i<20 else .5 for i in range(24)], v=df.index>=20), valid_col='v')
    v = df.assign(v=df.index>=20, kind=[k if i<20 else 'boat' for i,k in enumerate(df.kind)])
    mistake(table, ["Output 'kind' has the class 'boat', which is not in the training split", 'vocab=', 'item 20'],
            df=v, valid_col='v')

# Tables and splits

def split_of(table, df, **kw):
    "The rows of the training and the validation split"
    d = loaders(table, dict(kind=CategoryBlock), df=df, image=None, item_tfms=None, **kw)
    return [sorted(ds.items.index) for ds in (d.train_ds, d.valid_ds)]

@pytest.mark.parametrize('values,valid_value', [
    ([i>=18 for i in range(24)], None),
    ([int(i>=18) for i in range(24)], None),
    ([float(i>=18) for i in range(24)], None),
    (['train']*18+['valid']*6, 'valid'),
    ([0]*9+[1]*9+[2]*6, 2),
    (['train']*18+['valid']*3+['test']*3, ['valid','test']),
    ([True]*18+[False]*6, False),
])
def test_a_column_that_splits(table, values, valid_value):
    split = split_of(table, table[1].assign(v=values), valid_col='v', valid_value=valid_value)
    assert split==[list(range(18)), list(range(18, 24))]

@pytest.mark.parametrize('values,words', [
    (['False','True']*12, "`valid_col`='v' holds the texts 'False', 'True'; it takes True and False, or 1 and 0"),
    ([i%4 for i in range(24)], "`valid_col`='v' holds the values 0, 1, 2, 3; it takes True and False"),
    ([1.,math.nan]*12, "`valid_col`='v' is empty in 12 of 24 rows, first in row 1"),
    ([True,None]*12, "is empty in 12 of 24 rows"),
    (pd.array([1,None]*12, dtype='Int64'), "is empty in 12 of 24 rows"),
    ([0]*24, 'puts 0 of 24 rows into validation'),
])
def test_a_column_that_does_not_say_how_to_split(table, values, words):
    with pytest.raises(ValueError) as e: split_of(table, table[1].assign(v=values), valid_col='v')
    assert words in str(e.value)

def test_nullable_booleans_split(table):
    values = pd.array([False]*18+[True]*6, dtype='boolean')
    assert split_of(table, table[1].assign(v=values), valid_col='v')[1]==list(range(18, 24))

def test_columns_of_0_and_1_are_tags(table):
    warm = [i%3!=0 for i in range(24)]
    big = [float(i%3==2) for i in range(24)]
    warm[5] = None
    big[5] = None
    df = table[1].assign(warm=pd.Series(warm, dtype=object), big=big)
    kw = dict(columns=dict(tags=['warm','big']), image=None, item_tfms=None)
    d = loaders(table, dict(tags=MultiCategoryBlock), df=df, **kw)
    assert list(describe(d).outputs['tags'].vocab)==['big','warm']
    y = d.test_dl(df.iloc[:6], with_labels=True).one_batch()[1].tags
    assert y[:5].tolist()==[[0,0],[0,1],[1,1],[0,0],[0,1]]
    assert not present(y)[5]
    names = df.assign(warm='a', big=['b','c']*12)     # two columns of tags
    assert list(describe(loaders(table, dict(tags=MultiCategoryBlock), df=names, **kw)).outputs['tags'].vocab)==[*'abc']
    coded = MultiCategoryBlock(encoded=True, vocab=['warm','big'])
    d = loaders(table, dict(tags=coded), df=df.dropna(subset=['warm']), **kw)
    assert list(describe(d).outputs['tags'].vocab)==['warm','big']

def test_a_csv_file_keeps_its_classes(table, tmp_path):
    df = pd.DataFrame(dict(caption=['a','b']*12, code=['007','7','NA','']*6, level=['1','2','3','']*6,
                           flag=['True','False']*12, price=['1.5','','2','3']*6))
    df.to_csv(tmp_path/'items.csv', index=False)
    outputs = dict(code=CategoryBlock, level=CategoryBlock, flag=CategoryBlock, price=RegressionBlock)
    kw = dict(text='caption', outputs=outputs, seed=1, num_workers=0, bs=4, device='cpu')
    with pytest.warns(UserWarning, match="the column 'code' holds 'NA' in 6 rows, and 'NA' is read as a class"):
        d = MultiDataLoaders.from_csv(tmp_path, **kw)
    vocabs = {n: list(p.vocab) for n,p in describe(d).outputs.items() if p.vocab is not None}
    assert vocabs==dict(code=['007','7','NA'], level=[1,2,3], flag=[False,True])
    y = d.train.new(bs=len(d.train_ds), shuffle=False).one_batch()[1]
    rows = d.train_ds.items
    assert present(y.code).tolist()==[not is_missing(v) for v in rows.code]
    d = MultiDataLoaders.from_csv(tmp_path, na_values=['NA'], **kw)     # as pandas reads a missing value
    assert list(describe(d).outputs['code'].vocab)==[7.]
    df.to_csv(tmp_path/'latin.csv', index=False, encoding='utf-16', sep=';')
    d = MultiDataLoaders.from_csv(tmp_path, 'latin.csv', encoding='utf-16', sep=';', dtype=dict(code=str), **kw)
    assert list(describe(d).outputs['code'].vocab)==['007','7']

@pytest.mark.parametrize('kw,words', [
    (dict(bs=0), '`bs` is 0; the batch size must be at least 1'),
    (dict(bs=-1), '`bs` is -1'),
    (dict(bs='x'), "`bs` is 'x', of type str; it must be a whole number"),
    (dict(bs=2.5), '`bs` is 2.5, of type float'),
    (dict(seed='x'), "`seed` is 'x', of type str"),
    (dict(valid_pct=20), '`valid_pct` is 20; it is the fraction of items for validation, between 0 and 1'),
    (dict(valid_pct=-.1), '`valid_pct` is -0.1'),
    (dict(outputs={3: CategoryBlock}, columns={3: 'kind'}), "The name of an output is 3, of type int; it must be"),
    (dict(outputs={}), '`outputs` is empty'),
])
def test_numbers_and_names_that_cannot_be(table, kw, words):
    with pytest.raises((ValueError,TypeError)) as e: loaders(table, **{**dict(outputs=dict(kind=CategoryBlock)), **kw})
    assert words in str(e.value), str(e.value)

def test_numbers_of_numpy_and_names_like_self(table):
    df = table[1].rename(columns=dict(kind='self'))
    d = loaders(table, {'self': CategoryBlock}, df=df, bs=np.int64(1), seed=np.int64(1))
    assert d.train.one_batch()[1]['self'].shape==(1,)
    assert sorted(d.train_ds.items.index)==sorted(loaders(table, {'self': CategoryBlock}, df=df).train_ds.items.index)

@pytest.mark.parametrize('block,values,words', [
    (CategoryBlock, [1,'a'], "mixes classes of the types"),
    (CategoryBlock, [True,'a'], "Make them one type, for example texts with `.astype(str)`"),
    (CategoryBlock, ['a',[1]], "has the class [1], of type list; a class is one value"),
    (CategoryBlock, ['a',(1,2)], "has the class (1, 2), of type tuple; a class is one value"),
    (CategoryBlock, ['a',{'a':1}], "has the class {'a': 1}, of type dict"),
    (MultiCategoryBlock, [['a'],['b',None]], "has None among its classes. Leave it out of the list"),
    (MultiCategoryBlock, [['a'],['b',math.nan]], "has nan among its classes"),
    (MultiCategoryBlock, [['a'],['b',1]], "mixes classes of the types str and int"),
    (MultiCategoryBlock, [['a'],['b',['c']]], "has the class ['c'], of type list"),
    (MultiCategoryBlock(vocab=['a','b']), [['a'],['b',None]], "has None among its classes"),
])
def test_classes_that_are_none(table, block, values, words):
    "The message names the output and the row"
    odd = pd.Series([values[0]]*20+[values[1]]*4, dtype=object)
    kw = dict(df=table[1].assign(odd=odd, v=[i<3 for i in range(24)]), image=None, item_tfms=None, valid_col='v')
    with pytest.raises(ValueError) as e: loaders(table, dict(odd=block), **kw)
    assert words in str(e.value), str(e.value)
    assert "Output 'odd'" in str(e.value)
    assert 'row 20 of the table' in str(e.value), str(e.value)

def test_an_attribute_error_of_a_getter_is_told_as_it_is(table):
    folder,df = table
    files = [folder/f for f in df.file]
    dblock = DataBlock((ImageTextBlock, CategoryBlock),
                       get_x=lambda f: (f, f'a {f.name if f in files[:20] else f.nmae}'),
                       get_y=lambda f: 'a' if f in files[::2] else 'b', splitter=RandomSplitter(seed=1),
                       item_tfms=Resize(32))
    dls = dblock.dataloaders(files[:20], bs=4, num_workers=0)
    with pytest.raises(AttributeError, match="has no attribute 'nmae'"): list(dls.test_dl(files[20:], num_workers=0))

def test_mistakes_reach_the_user_from_workers(table):
    df = table[1]
    d = loaders(table, CategoryBlock, columns='kind')
    dl = d.test_dl(df.assign(file=[f if i!=5 else 'nowhere.png' for i,f in enumerate(df.file)]), num_workers=1)
    with pytest.raises(ValueError, match='nowhere.png.*cannot be opened'): list(dl)

# Real data

def test_blood_cells_many_boxes(real):
    path = real('bccd')
    boxes = pd.read_csv(path/'boxes.csv').groupby('file')
    df = pd.read_csv(path/'items.csv').head(60)
    df['boxes'] = [boxes.get_group(f)[['x1','y1','x2','y2']].values.tolist() if f in boxes.groups else []
                   for f in df.file]
    df['cells'] = [boxes.get_group(f).label.tolist() if f in boxes.groups else [] for f in df.file]
    d = MultiDataLoaders.from_df(df, path, image='file',
                                 outputs=dict(boxes=BBoxBlock, cells=BBoxLblBlock, n_rbc=RegressionBlock), seed=1, bs=8,
                                 num_workers=0, device='cpu', item_tfms=Resize(128, 'squish'),
                                 batch_tfms=aug_transforms(size=112, min_scale=.6))
    x,y = d.one_batch()
    assert y.boxes.shape[0]==8
    assert y.boxes.shape[1]>5
    assert ((y.cells==0)==y.boxes.isnan().all(-1)).all()
    assert list(describe(d).outputs['cells'].vocab)==['#na#','Platelets','RBC','WBC']
    d.show_batch(max_n=2)
    plt.close('all')
    x,y = d.valid.one_batch()
    (its,) = [d.valid.show_results((x,y), y, show=False)[0]]
    row = d.valid_ds.items.iloc[0]
    got = its[0][1]['boxes'].as_subclass(Tensor)
    scale = torch.tensor([112/float(row.width), 112/float(row.height)]*2)
    assert torch.allclose(got.sort(0)[0], (torch.tensor(row.boxes).float()*scale).sort(0)[0], atol=1.5)

def test_photos_with_captions_keypoints_and_boxes(real):
    path = real('coco_mini')
    items = json.loads((path/'annotations.json').read_text())['items'][:80]
    def row(o):
        person = first(p for p in o['objects'] if p.get('keypoints') and any(k[2] for k in p['keypoints']))
        big = first(p for p in o['objects'] if not p['iscrowd'])
        return dict(file=o['file'], caption=o['captions'][0] if o['captions'] else None,
                    joints=[[x,y] if v else [math.nan]*2 for x,y,v in person['keypoints']] if person else None,
                    box=big['bbox'] if big else None, what=big['label'] if big else None)
    df = pd.DataFrame([row(o) for o in items])
    vocab = sorted({k for k in df.what if isinstance(k, str)})
    d = MultiDataLoaders.from_df(df, path, image='file', text='caption',
                                 outputs=dict(what=CategoryBlock(vocab=vocab), box=BBoxBlock, joints=PointBlock),
                                 seed=1, bs=16, num_workers=0, device='cpu',
                                 item_tfms=RandomResizedCrop(96, min_scale=.5), batch_tfms=aug_transforms())
    x,y = d.one_batch()
    assert y.joints.shape==(16,17,2) and y.box.shape==(16,4) and describe(d).outputs['joints'].c==34
    ok = y.joints[~y.joints.isnan()]
    assert len(ok)==0 or ok.abs().max()<=1.001
    d.show_batch(max_n=4)
    plt.close('all')

def test_arguments_that_no_dblock_passes_on(tmp_path):
    "fastai drops these arguments without a message"
    block = DataBlock((CategoryBlock, CategoryBlock), get_y=lambda o: o)
    for k in ('item_tfms','batch_tfms','splitter','get_x'):
        with pytest.raises(KeyError, match=rf'`{k}` belongs to the DataBlock'):
            MultiDataLoaders.from_dblock(block, list('abababab'), bs=2, **{k: None})
    with pytest.raises(KeyError, match="Unknown argument 'valid_pct'"):
        MultiDataLoaders.from_dblock(block, list('abababab'), bs=2, valid_pct=.2)
    assert MultiDataLoaders.from_dblock(block, list('abababab'), bs=2, val_bs=1, num_workers=0).valid.bs==1

def test_a_csv_file_that_does_not_read(tmp_path):
    def read(data, **kwargs):
        (tmp_path/'t.csv').write_bytes(data)
        return MultiDataLoaders.from_csv(tmp_path, 't.csv', features='a', outputs='kind', bs=2, num_workers=0, **kwargs)
    rows = 'a,kind\n'+'\n'.join(f'{i},caf\xe9{i%2}' for i in range(10))
    with pytest.raises(ValueError, match="t.csv' is not encoded in utf-8: it holds the byte 0xe9.*encoding="):
        read(rows.encode('latin1'))
    assert list(describe(read(rows.encode('latin1'), encoding='latin1')).outputs['kind'].vocab)==['caf\xe90','caf\xe91']
    for data in (b'', b'a,kind\n1,2\n1,2,3\n'):
        with pytest.raises(ValueError, match="t.csv' cannot be read as a table"): read(data)
