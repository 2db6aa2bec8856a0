"""Precision, memory layout, compilation and gradient checkpointing: how they are chosen, that they take effect, and
that they leave no trace"""
import numpy as np, pytest, random, torch, warnings
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi import learner as learner_room
from fastai_multi.callback.checkpoint import GradientCheckpointing, switch_checkpointing
from fastai_multi.device import Compiling, DeviceFacts, DevicePrecision
from fastai_multi.guard import lighter

pytestmark = pytest.mark.usefixtures('one_thread')

H100 = DeviceFacts('cuda', 'H100', (9,0), bf16=True)
OUTPUTS = dict(kind=CategoryBlock, box=BBoxBlock, area=RegressionBlock)

def loaders(shapes, text='caption', **kwargs):
    return MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', text=text, outputs=OUTPUTS, bs=8, seed=0,
                                     columns=dict(box=['x1','y1','x2','y2']), item_tfms=Resize(32), num_workers=0,
                                     **kwargs)

def quiet(dls, arch=None, **kwargs):
    "A learner that prints nothing and has the same random weights each time"
    set_seed(0)
    if arch is None: arch = simple_cnn(3, width=4, bn=True)
    learn = multi_learner(dls, arch, pretrained=False, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def start(learn, seed):
    "Reset the order of the items and the random numbers"
    set_seed(seed)
    learn.dls.train.rng = random.Random(seed)

def trained(dls, arch=None, cbs=(), **kwargs):
    "Train one epoch, and return the loss of each step and the final weights"
    learn = quiet(dls, arch, **kwargs)
    start(learn, 0)
    learn.fit(1, 3e-3, cbs=cbs)
    return torch.stack([torch.as_tensor(l) for l in learn.recorder.losses]), learn

@pytest.fixture(scope='module')
def dls(shapes): return loaders(shapes)

# How they are chosen

def test_a_cpu_trains_as_before(dls):
    learn = quiet(dls)
    assert not learn.uses_device and learn.device_setup.callbacks()==[]
    assert "half precision is chosen on CUDA only, and this is cpu" in repr(learn.device_setup)
    assert 'Device: cpu, fp32' in learn.summary() and 'Device' not in repr(learn)

def test_a_gpu_gets_bf16_and_channels_last_which_do_nothing_elsewhere(dls, monkeypatch, tmp_path):
    "A learner with a GPU's settings works on a CPU: it trains and predicts in float32, exports and prints them"
    plain,_ = trained(dls)
    monkeypatch.setattr(learner_room, 'device_facts', lambda device: H100)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found,learn = trained(dls)
    assert [type(cb).__name__ for cb in learn.device_setup.callbacks()]==['ChannelsLast','DevicePrecision']
    assert 'bf16, channels-last' in repr(learn) and 'bf16, channels-last' in learn.summary()
    torch.testing.assert_close(found[:5], plain[:5], atol=1e-3, rtol=1e-3)    # rounding errors grow with each step
    item = dls.valid_ds.items.iloc[0]
    answer = learn.predict(item)
    learn.export(tmp_path/'gpu.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_multi_learner(tmp_path/'gpu.pkl')
    torch.testing.assert_close(again.predict(item)[2].kind, answer[2].kind)

def test_what_a_user_says_wins_over_the_choice(dls, monkeypatch):
    monkeypatch.setattr(learner_room, 'device_facts', lambda device: H100)
    assert 'fp32' in quiet(dls, precision='fp32', channels_last=False).device_line()
    learn = quiet(dls, cbs=MixedPrecision('fp16'))
    assert [cb.amp_mode.value for cb in learn.cbs if isinstance(cb, MixedPrecision)]==['fp16']
    learn.to_bf16()
    assert [cb.amp_mode.value for cb in learn.cbs if isinstance(cb, MixedPrecision)]==['bf16']
    assert not learn.to_fp32().uses_device or any(isinstance(cb, ChannelsLast) for cb in learn.cbs)

@pytest.mark.parametrize('kw, exc, msg', [
    (dict(precision='half'), ValueError, "`precision` is 'half'; it takes 'fp32', 'bf16', 'fp16'"),
    (dict(channels_last=1), TypeError, '`channels_last` is 1; it takes True, False'),
    (dict(compile='inducto'), KeyError, "Did you mean 'inductor'"),
    (dict(compile=2), TypeError, '`compile` is 2; it takes True, False'),
    (dict(checkpoint='all'), TypeError, "`checkpoint` is 'all'; it takes True"),
    (dict(checkpoint=7), ValueError, '`checkpoint`=7 is beyond this simple_cnn, which has 3 stages'),
    (dict(precision='bf16', cbs=MixedPrecision()), ValueError, 'pass one of the two'),
])
def test_wrong_values_say_what_to_do(dls, kw, exc, msg):
    with pytest.raises(exc, match=msg): quiet(dls, **kw)

def test_nothing_to_run_again(shapes):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image=None, text='caption', outputs=dict(kind=CategoryBlock),
                                    bs=8, num_workers=0, seed=0)
    with pytest.raises(ValueError, match='Leave it out'): multi_learner(dls, None, checkpoint=True)

# Half precision in real computations

@pytest.mark.parametrize('balance', [None, UncertaintyWeighting, GradNorm, partial(GradientBalance, 'pcgrad')],
                         ids=['plain','uncertainty','gradnorm','pcgrad'])
def test_bf16_follows_the_losses_of_fp32(dls, balance):
    cbs = [] if balance is None else balance()
    plain,_ = trained(dls, cbs=cbs)
    cbs = [] if balance is None else balance()
    half,learn = trained(dls, cbs=cbs, precision='bf16')
    assert not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, atol=.05, rtol=.05)
    assert all(p.dtype==torch.float32 for p in learn.model.parameters())

def test_a_single_prediction_runs_in_the_precision_of_the_learner(dls):
    _,learn = trained(dls, precision='bf16')
    item = dls.valid_ds.items.iloc[0]
    with learn.no_bar(): whole = learn.get_preds(dl=dls.test_dl([item]))[0]
    single = learn.predict(item)[2]
    torch.testing.assert_close(single.kind, whole.kind[0], atol=1e-6, rtol=1e-5)
    learn.to_fp32()
    assert not torch.equal(learn.predict(item)[2].kind, single.kind)

# Channels-last

def test_channels_last_trains_the_same_and_goes_into_every_file(shapes, dls, tmp_path):
    plain,_ = trained(dls, 'resnet18', depth=2)
    found,learn = trained(dls, 'resnet18', depth=2, channels_last=True)
    torch.testing.assert_close(found[:3], plain[:3], atol=1e-3, rtol=1e-3)    # rounding errors grow with each step
    conv = first(m for m in learn.model.modules() if isinstance(m, nn.Conv2d))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    learn.save_bundle(tmp_path/'bundle', metrics=False)
    again = load_bundle(tmp_path/'bundle')
    row = dls.valid_ds.items.iloc[0]
    item = (shapes/row.file, row.caption)
    torch.testing.assert_close(again.predict(item)[2].kind, learn.predict(item)[2].kind, atol=1e-5, rtol=1e-4)

def test_channels_last_in_the_middle_of_a_training(dls):
    "The optimizer's averages follow the memory layout of the parameters"
    a,b = quiet(dls), quiet(dls)
    for learn in (a, b):
        start(learn, 1)
        learn.fit(1, 3e-3)
    b.to_channelslast(use_amp=False)
    for learn in (a, b):
        start(learn, 2)
        learn.fit(1, 3e-3, reset_opt=False)
    p,q = (torch.cat([p.flatten() for p in o.model.parameters()]) for o in (a, b))
    assert (p-q).norm() < .01*p.norm()

# Compilation

def test_compiled_training_leaves_the_model_as_it_was(shapes, tmp_path):
    "The backend of this test keeps the operations unchanged. benchmarks.gpu runs the usual backend"
    dls = loaders(shapes, text=None)
    plain,_ = trained(dls)
    seen = []
    class Look(Callback):
        def after_pred(self):
            seen.append(sum(m._compiled_call_impl is not None for m in self.model.modules()))
    found,learn = trained(dls, compile='eager', cbs=Look())
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    assert set(seen)=={3} and all(m._compiled_call_impl is None for m in learn.model.modules())
    assert list(learn.model.state_dict())==list(quiet(dls).model.state_dict())
    learn.freeze()
    learn.fit(1, 1e-3)
    learn.export(tmp_path/'compiled.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_multi_learner(tmp_path/'compiled.pkl')
    item = dls.valid_ds.items.iloc[0]
    torch.testing.assert_close(again.predict(item)[2].kind, learn.predict(item)[2].kind)

# Gradient checkpointing

def same_weights(a, b):
    for (n,p),q in zip(a.model.state_dict().items(), b.model.state_dict().values()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=n)

@pytest.mark.parametrize('checkpoint, kw', [(True, {}), (1, {}), ([2], dict(depth=dict(box=2))), (True, dict(split=1)),
                                            ([2], dict(split=0))], ids=str)
def test_checkpointing_trains_the_same(dls, kw, checkpoint):
    "The weights and the batch norm statistics are the same after an epoch"
    _,a = trained(dls, **kw)
    _,b = trained(dls, checkpoint=checkpoint, **kw)
    same_weights(a, b)
    bn = first(m for m in b.model.modules() if isinstance(m, nn.BatchNorm2d))
    assert int(bn.num_batches_tracked)==len(dls.train)
    assert all(not body.rerun for t in b.model.trunks.values() for body,_ in t.bodies())

@pytest.mark.parametrize('balance', [GradNorm, partial(GradientBalance, 'pcgrad'),
                                     partial(GradientBalance, 'pcgrad', level='parameters')],
                         ids=['gradnorm','features','parameters'])
def test_checkpointing_beside_balancing(dls, balance):
    _,a = trained(dls, cbs=balance())
    _,b = trained(dls, cbs=balance(), checkpoint=True)
    same_weights(a, b)

def kept_bytes(learn, x):
    "The bytes that a forward pass keeps for the backward pass"
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in learn.model.parameters()}
    def note(t):
        memory = t.untyped_storage()
        if memory.data_ptr() not in weights: kept[memory.data_ptr()] = memory.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, noop): preds = learn.model.train()(*x)
    assert len(preds)==3
    return sum(kept.values())

def test_checkpointing_keeps_less(shapes):
    dls = loaders(shapes, text=None)
    learn = quiet(dls, 'resnet18')
    x = dls.one_batch()[:1]
    found = {}
    for stages in (False, [4], 1, True):
        switch_checkpointing(learn.model, stages)
        found[str(stages)] = kept_bytes(learn, x)
    assert found['True'] < .4*found['False'] and found['1'] < found['[4]'] < found['False']

def test_a_model_of_hugging_face_uses_its_own(shapes, tmp_path):
    from small_models import save_bert
    save_bert(tmp_path)
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image=None, text='caption', outputs=dict(kind=CategoryBlock),
                                    text_block=PlainTextBlock(tok=str(tmp_path), max_len=32), bs=8, num_workers=0, seed=0)
    seen = []
    class Look(Callback):
        def after_pred(self): seen.append(self.model.encoders['text'].model.is_gradient_checkpointing)
    def one(**kwargs):
        set_seed(0)
        learn = multi_learner(dls, None, text=str(tmp_path), **kwargs)
        start(learn, 0)
        learn.unfreeze()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=Look())
        return learn
    a,b = one(), one(checkpoint=True)
    same_weights(a, b)
    assert set(seen[:len(seen)//2])=={False} and True in seen and not b.model.encoders['text'].model.is_gradient_checkpointing
    with pytest.raises(ValueError, match='`checkpoint`=1 is for the stages'): one(checkpoint=1)

def test_timm_in_one_pass():
    pytest.importorskip('timm')
    enc = image_encoder('timm/hrnet_w18_small')
    model = MultiModel(dict(image=enc), dict(kind=2))
    with pytest.raises(ValueError, match='statistics of its batch norms twice'): switch_checkpointing(model, True)

def test_out_of_memory_names_it(dls):
    assert any('checkpoint=True' in o for o in lighter(quiet(dls), True))
    assert not any('checkpoint=True' in o for o in lighter(quiet(dls, checkpoint=True), True))
    assert not any('checkpoint=True' in o for o in lighter(quiet(dls), False))
