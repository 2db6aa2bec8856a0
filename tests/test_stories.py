"The five user stories behind the package: each does what its last column says"
import shutil
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch
from torch import nn
import torch.nn.functional as F
from fastai.vision.all import *
from fastai_multi import *

def quiet(learn):
    learn.remove_cb(ProgressCallback) if hasattr(learn, 'progress') else None
    learn.logger = noop
    return learn

# S0: several tasks and modalities in fastai

class Captions:
    "Turn a picture's path into a picture and a text, which a function of the file gives"
    def __init__(self, df): self.texts = dict(zip(df.file.map(lambda f: Path(f).name), df.caption))
    def __call__(self, f): return f, self.texts[f.name]

@pytest.fixture(scope='module')
def folders(shapes, tmp_path_factory):
    "Some drawn pictures, in a folder for each kind"
    path = tmp_path_factory.mktemp('folders')
    df = pd.read_csv(shapes/'items.csv').iloc[:24]
    for f,k in zip(df.file, df.kind):
        (path/k).mkdir(exist_ok=True)
        shutil.copy(shapes/f, path/k/Path(f).name)
    return path, df

def test_s0_image_and_text_in_a_plain_datablock(folders, one_thread):
    path,df = folders
    dblock = DataBlock(blocks=(ImageTextBlock, CategoryBlock), get_items=get_image_files, get_x=Captions(df),
                       get_y=parent_label, splitter=RandomSplitter(0.2, seed=42), item_tfms=Resize(46),
                       batch_tfms=[*aug_transforms(size=32, min_scale=0.75), Normalize.from_stats(*imagenet_stats)])
    dls = dblock.dataloaders(path, bs=8, num_workers=0)
    x,y = dls.one_batch()
    assert isinstance(x, ImageText) and x.image.shape==(8,3,32,32) and x.text.ndim==2 and y.shape==(8,)
    learn = quiet(multi_learner(dls, resnet50, metrics=accuracy, pretrained=False))
    learn.fine_tune(1, freeze_epochs=1)
    loss,acc = learn.validate()
    assert np.isfinite(loss) and 0<=acc<=1
    item = dls.train_ds[0][0]
    assert isinstance(item, ImageText)
    assert item.show() is not None                    # the tuple shows itself
    label,idx,probs = learn.predict(get_image_files(path)[0])
    vocab = learn.output_parts['category'].vocab
    assert label in vocab and probs.shape==(len(vocab),) and idx==probs.argmax()

# S1: several tasks on one input of tensors, then several inputs of tensors

def tensor_item(r): return torch.tensor([r[f'x{i}'] for i in range(10)], dtype=torch.float32)
def tensor_targets(r):
    return dict(values=torch.tensor([r[f'y{i}'] for i in range(5)], dtype=torch.float32), label=int(r['label']))
def as_floats(o): return torch.as_tensor(o, dtype=torch.float32)

def test_s1_two_heads_give_the_numbers_of_the_hand_written_loop():
    rng = np.random.default_rng(0)
    df = pd.DataFrame({**{f'x{i}': rng.normal(size=100) for i in range(10)},
                       **{f'y{i}': rng.normal(size=100) for i in range(5)}, 'label': rng.integers(0, 3, 100)})
    values = TransformBlock(type_tfms=as_floats)      # a custom block
    dblock = DataBlock(blocks=(FeaturesBlock, MultiOutputBlock(values=values, label=CategoryBlock)), get_x=tensor_item,
                       get_y=tensor_targets, splitter=IndexSplitter([0,1]))
    dls = dblock.dataloaders(df, bs=98, shuffle=False, drop_last=False, num_workers=0)
    heads = dict(values=nn.Linear(10,5), label=nn.Linear(10,3))
    by_hand = deepcopy(heads)
    learn = quiet(multi_learner(dls, nn.Identity(), heads=heads,
                                loss_func=dict(values=nn.MSELoss(), label=nn.CrossEntropyLoss()), metrics={},
                                opt_func=partial(SGD, mom=0.), wd=0.))
    learn.fit(100, 0.01)

    x = torch.stack([tensor_item(r) for _,r in df[2:].iterrows()])
    y = torch.stack([tensor_targets(r)['values'] for _,r in df[2:].iterrows()])
    c = torch.tensor(df.label[2:].to_numpy())
    opt = torch.optim.SGD([p for m in by_hand.values() for p in m.parameters()], lr=0.01)
    for _ in range(100):
        loss = F.mse_loss(by_hand['values'](x), y) + F.cross_entropy(by_hand['label'](x), c)    # the default is the sum
        loss.backward()
        opt.step()
        opt.zero_grad()
    preds,targs = learn.get_preds(act=noop, ds_idx=0)
    torch.testing.assert_close(preds['values'], by_hand['values'](x).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(preds.label, by_hand['label'](x).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(targs['values'], y)

def test_s1_two_tensor_inputs_are_fused():
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    label = rng.integers(0, 10, 200)
    codes = rng.normal(size=(10,1000))
    df = pd.DataFrame(dict(a=list((codes[label] + 0.5*rng.normal(size=(200,1000))).astype('float32')),
                           b=list((codes[label] + 0.5*rng.normal(size=(200,1000))).astype('float32')), label=label))
    dblock = DataBlock(blocks=(MultiInputBlock(a=FeaturesBlock, b=FeaturesBlock),
                               MultiOutputBlock(label=CategoryBlock)),
                       get_x=lambda r: dict(a=r.a, b=r.b), get_y=lambda r: dict(label=r.label),
                       splitter=RandomSplitter(0.2, seed=0))
    dls = dblock.dataloaders(df, bs=32, num_workers=0)
    x,_ = dls.one_batch()
    assert x.a.shape==(32,1000) and x.b.shape==(32,1000)
    mlp = lambda: nn.Sequential(nn.Linear(1000,512), nn.ReLU())
    learn = quiet(multi_learner(dls, dict(a=mlp(), b=mlp()), heads=dict(label=[256])))
    linears = [(m.in_features,m.out_features) for m in learn.model.modules() if isinstance(m, nn.Linear)]
    assert linears == [(1000,512),(1000,512),(1024,256),(256,10)]
    learn.fit(4, 0.001)
    assert learn.evaluate()['label_accuracy'] > 0.9

# S2: category and box

def test_s2_category_and_box(shapes):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', outputs=dict(label=CategoryBlock, box=BBoxBlock),
        columns=dict(label='kind', box=['x1','y1','x2','y2']), seed=0, bs=16, item_tfms=Resize(64), num_workers=0)
    learn = quiet(multi_learner(dls, simple_cnn(widths=[32,64]), heads=dict(label=[128], box=[256]), opt_func=Adam,
                                lr=1e-3))
    widths = {n: [m.out_features for m in h.modules() if isinstance(m, nn.Linear)] for n,h in learn.model.heads.items()}
    assert widths == dict(label=[128,4], box=[256,4])
    before = learn.evaluate()
    learn.fit_one_cycle(16, 3e-3)
    res = learn.evaluate()
    assert [*res] == ['valid_loss','label_loss','box_loss','label_accuracy','box_iou']
    scale = learn.loss_func.scales['label']
    assert res['valid_loss'] == pytest.approx(res['label_loss']*scale+res['box_loss'], rel=1e-3)
    assert res['box_iou'] > before['box_iou'] and res['box_loss'] < before['box_loss']
    fig = learn.show_results(max_n=4)

# S3: picture and text, binary output

def test_s3_picture_and_text_from_a_dataframe_in_one_call(shapes):
    df = pd.read_csv(shapes/'items.csv')
    df['big'] = (df.area > df.area.median()).map({True:'big', False:'small'})
    dls = MultiDataLoaders.from_df(df, shapes, image='file', text='caption', outputs=dict(big=CategoryBlock),
                                   valid_pct=0.2, seed=1, bs=32, item_tfms=Resize(64), num_workers=0)
    learn = quiet(multi_learner(dls, simple_cnn(depth=3), text='lstm'))
    emb = first(m for m in learn.model.modules() if isinstance(m, nn.Embedding))
    lstm = first(m for m in learn.model.modules() if isinstance(m, nn.RNNBase))
    assert emb.embedding_dim==100 and 2*lstm.hidden_size==256      # both directions
    train_words = set(' '.join(df.caption[dls.train_ds.items.index].dropna()).lower().replace(',',' ').split())
    assert set(learn.input_parts['text'].vocab[2:]) <= train_words    # no words of validation texts only
    learn.fit(1)
    assert 0 <= learn.evaluate()['big_accuracy'] <= 1

# S4: depth of a CNN

@pytest.fixture(scope='module')
def cifar(real, tmp_path_factory):
    "A few pictures of four classes, in CIFAR-10's folders"
    src = real('cifar10')
    path = tmp_path_factory.mktemp('cifar')
    for part,n in (('train',40),('test',10)):
        for c in ('airplane','cat','frog','truck'):
            (path/part/c).mkdir(parents=True)
            for f in sorted((src/part/c).glob('*.jpg'))[:n]: shutil.copy(f, path/part/c)
    return path

def cifar_dls(path):
    dblock = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                       splitter=GrandparentSplitter(train_name='train', valid_name='test'))
    return dblock.dataloaders(path, bs=32, num_workers=0)

@pytest.mark.parametrize('depth', [2,3,4])
def test_s4_a_cnn_of_any_depth(cifar, depth):
    dls = cifar_dls(cifar)
    plain = quiet(Learner(dls, simple_cnn(depth=depth, n_out=dls.c), loss_func=CrossEntropyLossFlat(),
                          metrics=accuracy))
    multi = quiet(multi_learner(dls, simple_cnn(depth=depth), loss_func=CrossEntropyLossFlat(), metrics=accuracy))
    for learn in (plain, multi):
        assert len([m for m in learn.model.modules() if isinstance(m, nn.Conv2d)]) == depth
        learn.fit_one_cycle(2, 3e-3)
        loss,acc = learn.validate()
        assert np.isfinite(loss) and 0<=acc<=1
