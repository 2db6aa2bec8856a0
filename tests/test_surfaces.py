"Depth and surface normals, and the agreement of all labels of one object after every augmentation"
import warnings
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import untyped
from fastai_multi.data.dense import *
from fastai_multi.prior import start_other_heads
from torchvision.transforms import v2

@pytest.fixture(autouse=True)
def single(one_thread): pass

# One ball with its box, centre, mask, depth and normals

def ball(i, size=(72,64)):
    "An item: a photo of one ball, and all its labels"
    rng = np.random.default_rng(i)
    w,h = size
    r = rng.uniform(9, 14)
    cx,cy = rng.uniform(r+2, w-r-2),rng.uniform(r+2, h-r-2)
    y,x = np.mgrid[:h,:w]+.5
    across,down = (x-cx)/r,(y-cy)/r
    inside = across**2+down**2<1
    photo = np.where(inside[...,None], [200,60,40], [90,90,90]).astype(np.uint8)
    into = -np.sqrt(np.clip(1-across**2-down**2, 0, 1))
    normals = np.where(inside[...,None], np.stack([across,down,into], -1), [0,0,-1.])
    depth = np.where(inside, 1., 4.)
    depth[:2] = 0    # no sensor data
    box = [cx-r, cy-r, cx+r, cy+r]
    return dict(photo=photo, y=dict(objects=[dict(box=box, kind='ball', size=2*r)], centre=[[cx,cy]],
                                    mask=inside.astype(np.uint8), depth=depth, normals=normals))

def photo_of(o): return o['photo']
def labels_of(o): return o['y']

def balls(n=8, **kwargs):
    outputs = MultiOutputBlock(objects=ObjectsBlock(kind=CategoryBlock, size=RegressionBlock), centre=PointBlock,
                               mask=MaskBlock(['ground','ball']), depth=DepthBlock, normals=NormalsBlock)
    block = DataBlock((ImageBlock, outputs), get_x=photo_of, get_y=labels_of,
                      splitter=lambda o: (list(range(n)), list(range(n))), **kwargs)
    return MultiDataLoaders.from_dblock(block, [ball(i) for i in range(n)], bs=n, num_workers=0)

still = Resize((64,72))
moves = dict(
    nothing=dict(item_tfms=still), shrink=dict(item_tfms=[Shrink(40), RandomCrop(36)]), crop=dict(item_tfms=Resize(56)),
    pad=dict(item_tfms=Resize(80, 'pad', pad_mode='zeros')),
    reflect=dict(item_tfms=Resize(80, 'pad')), random_crop=dict(item_tfms=RandomCrop(48)),
    resized_crop=dict(item_tfms=RandomResizedCrop(56, min_scale=.4)), flip_item=dict(item_tfms=[FlipItem(p=1.), still]),
    dihedral_item=dict(item_tfms=[DihedralItem(p=1.), Resize(60)]), flip=dict(item_tfms=still, batch_tfms=Flip(p=1.)),
    dihedral=dict(item_tfms=Resize(64), batch_tfms=Dihedral(p=1.)),
    rotate=dict(item_tfms=still, batch_tfms=Rotate(max_deg=60, p=1.)),
    zoom=dict(item_tfms=still, batch_tfms=Zoom(max_zoom=1.5, p=1.)),
    all=dict(item_tfms=Resize(64), batch_tfms=aug_transforms(flip_vert=True, max_rotate=30, max_warp=0., size=56)),
    crop_gpu=dict(item_tfms=still, batch_tfms=RandomResizedCropGPU(56, min_scale=.4)),
    torchvision_flip=dict(item_tfms=[v2.RandomHorizontalFlip(1.), still]),
    torchvision_turn=dict(item_tfms=[v2.RandomRotation(60), still]),
    torchvision_crop=dict(item_tfms=v2.RandomResizedCrop(56, scale=(.4,1.))))

@pytest.mark.parametrize('name', moves)
def test_what_belongs_to_one_object_agrees(name):
    "After every augmentation, the mask is in the box, depth follows the mask, and normals point away from the centre"
    set_seed(1)
    dls = balls(**moves[name])
    seen = 0
    for _ in range(2):
        x,y = dls.train.new(shuffle=False).one_batch()
        h,w = x.shape[-2:]
        assert y.depth.shape==(8,1,h,w) and y.normals.shape==(8,3,h,w) and y.mask.shape==(8,h,w)
        maps = [untyped(t) for t in (y.objects.box, y.centre, y.mask, y.depth, y.normals)]
        for i in range(8): seen += agrees(*[t[i] for t in maps])
        lengths = untyped(y.normals).norm(dim=1)
        assert ((lengths-1).abs()<1e-3)[~lengths.isnan()].all()
    assert seen>4

def agrees(box, centre, mask, depth, normals):
    "Check one item, and return whether its ball is visible"
    h,w = mask.shape
    down,across = torch.meshgrid(torch.arange(h)+.5, torch.arange(w)+.5, indexing='ij')
    known = ~depth[0].isnan() & ~normals.isnan().any(0)
    is_ball = (mask==1) & known
    expected = torch.where(mask==1, 0., math.log(4))
    assert ((depth[0]-expected).abs()<.01)[known].float().mean()>.97    # border pixels may go either way
    if is_ball.sum()<60 or box[0].isnan().any() or centre.isnan().any(): return 0
    x1,y1,x2,y2 = ((box[0]+1)/2*torch.tensor([w,h,w,h])).tolist()
    inside = (across>x1-1.5) & (across<x2+1.5) & (down>y1-1.5) & (down<y2+1.5)
    assert inside[is_ball].float().mean()>.98
    cx,cy = ((centre.reshape(2)+1)/2*torch.tensor([w,h])).tolist()
    away = torch.stack([across-cx, down-cy])
    far = is_ball & (away.norm(dim=0)>4) & (normals[:2].norm(dim=0)>.1)    # drops border pixels of the wall behind
    cos = F.cosine_similarity(away, normals[:2], dim=0)[far]
    assert cos.mean()>.97 and cos.min()>.6
    return 1

def test_unknown_pixels_and_colours():
    "Colour transforms do not change depths, holes stay holes, and no unmeasured depth appears"
    tfms = aug_transforms(do_flip=False, max_rotate=20, max_lighting=.9, p_lighting=1.)
    dls = balls(item_tfms=still, batch_tfms=tfms)
    y = dls.train.one_batch()[1]
    values = untyped(y.depth)[~untyped(y.depth).isnan()].exp()
    assert sorted({round(float(v), 3) for v in values})==[1.,4.]
    assert dls.valid.one_batch()[1].depth[:,:,:2].isnan().all()

# A learner

@pytest.fixture(scope='module')
def rooms(tmp_path_factory): return multi_rooms(tmp_path_factory.mktemp('rooms'), n=24, size=32)

@pytest.fixture(scope='module')
def learn(rooms):
    df = pd.read_csv(rooms/'items.csv')
    df.loc[df.index%6==0, 'depth'] = None
    parts = SegmentationBlock(['floor', 'ceiling', 'wall', 'ball'])
    outputs = dict(part=parts, depth=DepthBlock(scale=.001), normals=NormalsBlock)
    dls = MultiDataLoaders.from_df(df, rooms, image='image', outputs=outputs, item_tfms=Resize(32), bs=6, seed=0,
                                   batch_tfms=aug_transforms(max_warp=0.), num_workers=0)
    set_seed(0)
    res = multi_learner(dls, simple_cnn(depth=3), heads={n: dict(width=16) for n in outputs})
    res.remove_cb(ProgressCallback)
    res.logger = noop
    start_other_heads(res)
    res.fit_one_cycle(6, 5e-3)
    return res

def test_values(learn):
    res = learn.evaluate()
    assert {'depth_abs_rel','depth_rmse','normals_mean_angle','part_accuracy'} <= set(res)
    assert res['depth_abs_rel']<2 and res['normals_mean_angle']<80

def test_a_map_without_labels_costs_nothing(learn):
    x,y = learn.dls.train.new(shuffle=False, drop_last=False, bs=24).one_batch()
    missing = untyped(y.depth).isnan().flatten(1).all(1)
    assert missing.any() and not missing.all()
    pred = learn.model.eval()(x)
    other = pred.map(torch.clone)
    other.depth[missing] += 3
    assert not torch.equal(other.depth, pred.depth)
    losses = [learn.loss_func(p, y) for p in (pred, other)]
    torch.testing.assert_close(*losses)

def test_the_head_starts_at_the_mean(rooms):
    outputs = dict(depth=DepthBlock(scale=.001))
    dls = MultiDataLoaders.from_csv(rooms, image='image', outputs=outputs, bs=8, num_workers=0, item_tfms=Resize(32),
                                    seed=0)
    learn = multi_learner(dls, simple_cnn(depth=3), heads=dict(depth=dict(width=16)))
    def off():
        with learn.no_bar(): preds,targs = learn.get_preds()
        return float((untyped(preds.depth)-untyped(targs.depth)).abs().nanmean())
    before = off()
    start_other_heads(learn)    # as `fine_tune` does
    y = dls.train.new(shuffle=False, drop_last=False, bs=24).one_batch()[1]
    bias = float(learn.model.heads['depth'].layers[-1].bias)
    assert bias == pytest.approx(float(untyped(y.depth).nanmean()), abs=1e-3)
    assert off()<before/2

def test_every_call(learn, rooms, tmp_path):
    "Every call of a learner works, and drawn maps have the size of the given picture"
    plt.close('all')
    learn.dls.show_batch(max_n=3)
    learn.show_results(max_n=2)
    file = rooms/'images'/'00001_image.png'
    answer = learn.predict(file)[0]
    assert answer.depth.shape==(32,32) and answer.normals.shape==(3,32,32)
    assert .2<float(answer.depth.median())<9
    plot_answer(learn, PILImage.create(file).resize((64,48)))
    preds,targs,dec,losses = learn.get_preds(with_decoded=True, with_loss=True)
    assert preds.depth.shape==targs.depth.shape and losses.shape==(len(learn.dls.valid.items),)
    assert learn.tta(n=1)[0].normals.shape==preds.normals.shape
    interp = MultiInterpretation.from_learner(learn)
    interp.plot_top_losses(2)
    assert len(interp['depth'].scores())==len(losses)
    assert 'depth' in str(learn.task_report()) and 'depth' in str(describe(learn.dls))
    learn.fit(1, cbs=[TaskMonitor(), GradientBalance()])
    learn.export(tmp_path/'rooms.pkl')
    learn.save_bundle(tmp_path/'bundle')
    for other in (load_learner(tmp_path/'rooms.pkl'), load_bundle(tmp_path/'bundle')):
        torch.testing.assert_close(other.predict(file)[0].depth, learn.predict(file)[0].depth, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot blend output"): learn.fit(1, cbs=MixUp())
    plt.close('all')

def test_mistakes(rooms):
    with pytest.raises(TypeError, match='which are outputs'):
        MultiInputBlock(depth=DepthBlock)
    df = pd.read_csv(rooms/'items.csv')
    df = df.assign(depth=df.image)    # a photo instead of a depth map
    with pytest.raises(ValueError, match=r'a map of depths is h,w'):
        MultiDataLoaders.from_df(df, rooms, image='image', outputs=dict(depth=DepthBlock), bs=2, item_tfms=Resize(32),
                                 num_workers=0).one_batch()
