"""What single functions give, as numbers: places where a fault passed all other tests"""
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.callback.gradients import cosines
from fastai_multi.data.geometry import crop_value
from fastai_multi.data.infer import delimiter
from fastai_multi.depth import try_candidate
from fastai_multi.models.fusion import zeros_for
from fastai_multi.models.heads import Pool
from fastai_multi.models.tree import frozen_text
from fastai_multi.models.trunk import SharedTrunk
from fastai_multi.probe import FrozenFeatures

def numbers(n=12, **columns):
    "A table of features `a` and `b`"
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(a=rng.normal(size=n), b=rng.normal(size=n), is_valid=np.arange(n)%4==3, **columns))

def loaders(df, outputs, **kwargs):
    kw = dict(features=['a','b'], outputs=outputs, valid_col='is_valid', bs=4, num_workers=0, device='cpu')
    return MultiDataLoaders.from_df(df, **{**kw, **kwargs})

# Pictures and boxes

CROPS = dict(crop=lambda: Resize((12,20)), squish=lambda: Resize((12,20), 'squish'), pad=lambda: Resize(16, 'pad'),
             resized=lambda: RandomResizedCrop((12,20), min_scale=.3), centre=lambda: CropPad((12,20)),
             random=lambda: RandomCrop((12,10)))

@pytest.mark.parametrize('name', CROPS)
@pytest.mark.parametrize('size', [(40,18),(18,40)])
def test_a_picture_in_memory_is_cropped_as_the_transform_crops_it(name, size):
    rng = np.random.default_rng(0)
    for cls in (PILImage, PILMask):
        shape = (size[1],size[0]) if cls is PILMask else (size[1],size[0],3)
        im = cls.create(rng.integers(0, 256, shape, dtype=np.uint8))
        t = CROPS[name]()
        if hasattr(t, 'before_call'): t.before_call((im,), 0)
        found = crop_value(im, t, size, 0)
        assert np.array_equal(np.asarray(found), np.asarray(t._call('encodes', im, split_idx=0)))
        assert type(found) is cls

@pytest.mark.parametrize('size', [(100,1000),(1000,100),(40,40)])
def test_a_box_may_pass_the_edge_by_a_fiftieth_of_its_own_side(size, tmp_path):
    Image.fromarray(np.zeros((8,8,3), dtype=np.uint8)).save(tmp_path/'a.png')
    df = pd.DataFrame(dict(file=['a.png']*4, x1=1, y1=1, x2=5, y2=6, is_valid=[False,False,True,True]))
    dls = loaders(df, dict(box=BBoxBlock), path=tmp_path, features=None, image='file', item_tfms=Resize(8), bs=2,
                  columns=dict(box=['x1','y1','x2','y2']))
    part = describe(dls).outputs['box']
    w,h = size
    over_w,over_h = max(2, .02*w),max(2, .02*h)
    before = max(over_w, over_h)
    part.check_placed(tensor([[-before,-before,w+over_w,h+over_h]]), size, True)
    for box in ([0,0,w+over_w+1,h], [0,0,w,h+over_h+1], [-before-1,0,w,h], [0,-before-1,w,h]):
        box = tensor([box]).float()
        with pytest.raises(ValueError): part.check_placed(box, size, True)
        part.check_placed(box, size, False)                     # fractions of another frame are not judged in pixels

# Words and classes

def test_what_separates_tags():
    assert delimiter(['a,b','b,c','a,c','a,b,c'])==','
    assert delimiter(['a','b, a','b','a,b'])==','
    assert delimiter(['a,b','c,d']) is None                         # no word recurs: these may be sentences
    assert delimiter(['a','b','a']) is None
    assert delimiter(['a|b','a,b'])=='|' and delimiter(['a;b','a'])==';'

def test_given_classes_keep_their_order_whatever_they_are():
    dls = loaders(numbers(kind=['b',2,'a']*4), dict(kind=CategoryBlock(vocab=['b',2,'a'], sort=False)))
    assert {n: list(v) for n,v in dls.vocab.items()}==dict(kind=['b',2,'a'])
    dl = dls.test_dl(dls.train.items, with_labels=True)
    found = torch.cat([y.kind for _,y in dl])
    assert [dls.vocab['kind'][i] for i in found]==dls.train.items.kind.tolist()

def test_one_plain_target_has_fastais_c():
    assert loaders(numbers(kind=['b','c','a']*4), CategoryBlock, columns='kind').c==3
    assert loaders(numbers(kind=['b','c','a']*4), dict(kind=CategoryBlock)).c==dict(kind=3)
    assert loaders(numbers(x=np.arange(12.)), RegressionBlock, columns='x').c==1

# Parts of models

def test_every_pool_by_hand():
    x = torch.rand(2,3,4,5)+.1
    mean,most = x.mean((2,3)),x.amax((2,3))
    assert torch.allclose(Pool('avg')(x), mean) and torch.equal(Pool('max')(x), most)
    assert torch.allclose(Pool()(x), torch.cat([mean,most], 1))
    assert torch.allclose(Pool('gem')(x), (x**3).mean((2,3))**(1/3), atol=1e-5)

def test_zeros_are_where_the_module_is():
    zeros = zeros_for(nn.Linear(2, 3).to('meta', torch.float16), 4, 2)
    assert zeros.device.type=='meta' and zeros.dtype==torch.float16 and zeros.shape==(4,2)

def test_what_is_said_of_frozen_parameters():
    ps = list(nn.Linear(2, 3).parameters())
    assert frozen_text(ps)==''
    ps[0].requires_grad_(False)
    assert frozen_text(ps)=='partly frozen'
    ps[1].requires_grad_(False)
    assert frozen_text(ps)=='frozen'

@pytest.mark.parametrize('split', [1,2,3])
def test_what_all_outputs_share_passes_the_joint(split):
    "The map of the last shared stage, where balancing callbacks compare the outputs"
    trunk = SharedTrunk(image_encoder(simple_cnn(3, 4)), dict(a=3, b=3), split=split).eval()
    seen = []
    trunk.joint.register_forward_hook(lambda m, inp, out: seen.append(out))
    x = torch.randn(2,3,32,32)
    trunk(x)
    assert len(seen)==1 and torch.equal(seen[0], trunk.trunk.feature_maps(x).states[-1])
    assert seen[0].shape[1]==trunk.channels[split-1]

# Training

def test_cosines_stay_between_minus_one_and_one():
    for s in range(40):
        torch.manual_seed(s)
        g = torch.randn(7)
        found = cosines(torch.stack([g, -3*g, 2*g]))
        assert found.min()>=-1 and found.max()<=1
        assert torch.allclose(found, tensor([[1.,-1.,1.],[-1.,1.,-1.],[1.,-1.,1.]]), atol=1e-5)

def test_a_candidate_is_trained_for_its_epochs_or_its_batches():
    dls = loaders(numbers(20, x=np.arange(20.)), dict(x=RegressionBlock))
    assert len(dls.train)==3 and len(dls.valid)==2
    for batches,epochs,steps in ((None,1,3), (None,2,6), (4,1,4)):
        learn = multi_learner(dls)
        seen = []
        class Count(Callback):
            def after_step(self): seen.append(1)
        learn.add_cb(Count())
        res,ms = try_candidate(learn, batches, epochs, 1e-3)
        assert len(seen)==steps and ms>0 and 'x_mae' in res

def test_the_probe_reads_the_target_and_not_its_weight():
    df = numbers(kind=['b','c']*6, weight=np.arange(12)/4+1)
    for weight in (None, 'weight'):
        learn = multi_learner(loaders(df, dict(kind=CategoryBlock), weight=weight))
        found = FrozenFeatures(learn, learn.dls.valid).targets['kind']
        assert found.dtype==torch.long and found.tolist()==[1,1,1]
