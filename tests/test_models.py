"Backbones cut at every depth equal torchvision's and timm's own features; weights; the whole model"
import logging, pickle, re
from copy import deepcopy
import pytest, torch, torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from fastai_multi.core import Inputs
from fastai_multi.models.image import *
from fastai_multi.models.text import *
from fastai_multi.models.tabular import *
from fastai_multi.models.heads import *
from fastai_multi.models.wide import *
from fastai_multi.models.multi import *

# name: (stages, picture size, whether strides are exact: networks without padding lose a few more pixels)
families = dict(resnet18=(4,64,True), resnet50=(4,64,True), mobilenet_v2=(5,64,True), mobilenet_v3_small=(4,64,True),
                mobilenet_v3_large=(5,64,True), efficientnet_b0=(5,64,True), convnext_tiny=(4,64,True),
                densenet121=(4,64,True), regnet_y_400mf=(4,64,True), shufflenet_v2_x0_5=(3,64,True),
                mnasnet0_5=(5,64,True), squeezenet1_1=(3,64,False), vgg11=(4,64,True), alexnet=(2,96,False),
                swin_t=(4,64,True), maxvit_t=(4,224,True), inception_v3=(5,160,False))

def build(name):
    kw = dict(init_weights=False) if name=='inception_v3' else {}     # skips its slow initialisation
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **kw).eval()

def last_node(stage, model):
    "The name of a stage's last module for torchvision's `create_feature_extractor`"
    a,_,b = stage.partition('..')
    inner = f"{a.rpartition('.')[0]}.{b}"
    return a if not b else inner if inner in dict(model.named_modules()) else b

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.mark.parametrize('name', families)
def test_every_depth_of_a_torchvision_model(name):
    n,px,exact = families[name]
    model = build(name)
    full = image_encoder(model).eval()
    assert full.depth==n, full.stages
    x = torch.randn(1, 3, px, px if name=='maxvit_t' else px*3//2)
    nodes = {last_node(s, model): s for s in full.stages}
    with torch.no_grad():
        own = create_feature_extractor(model, nodes)(x)
        maps = full.maps(x)
    for i,(s,m) in enumerate(zip(full.stages, maps)):
        o = own[s]
        if name=='swin_t' and i<n-1: o = o.permute(0,3,1,2)
        if name=='densenet121' and i==n-1: o = o.relu()                # torchvision applies it in `forward`
        torch.testing.assert_close(m, o, atol=1e-5, rtol=1e-5)
        assert m.shape[1]==full.channels[i]
        if exact: assert m.shape[2]==px//full.strides[i]
    assert full.strides==sorted(set(full.strides))
    pickled = pickle.loads(pickle.dumps(full))
    for d in range(1, n+1):
        enc = image_encoder(model, depth=d).eval()
        assert (enc.stages, enc.channels, enc.strides, enc.n_features)==(
            full.stages[:d], full.channels[:d], full.strides[:d], full.channels[d-1]
        )
        if d<n: assert sum(p.numel() for p in enc.parameters()) < sum(p.numel() for p in full.parameters())
        y = enc(x)
        torch.testing.assert_close(y.detach(), maps[d-1], atol=1e-5, rtol=1e-5)
        enc.zero_grad()
        y.sum().backward()
        assert all(p.grad is not None for p in enc.parameters())       # no unused parameter
        early,late = enc.param_groups()
        assert len(early)+len(late)==len(list(enc.parameters())) and (len(early)>0)==(d>1) and late
    with torch.no_grad(): torch.testing.assert_close(pickled(x), maps[-1])
    with pytest.raises(ValueError, match=f'has {n} stages: 1: '): image_encoder(model, depth=n+1)

def test_the_last_map_is_what_the_classifier_pools():
    for name,head in (('mobilenet_v3_small','classifier'), ('densenet121','classifier'), ('resnet18','fc'),
                      ('swin_t','head'), ('efficientnet_b0','classifier')):
        model = build(name)
        seen = []
        h = model.get_submodule(head).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        x = torch.randn(2,3,64,64)
        with torch.no_grad():
            model(x)
            h.remove()
            torch.testing.assert_close(image_encoder(model).eval()(x).mean((2,3)), seen[0].flatten(1), atol=1e-5,
                                       rtol=1e-4)

def test_a_vision_transformer():
    model = torchvision.models.vit_b_16(weights=None).eval()
    enc = image_encoder(model, depth=2).eval()
    assert enc.stages==['layer1','layer2'] and enc.channels==[768]*2 and enc.strides==[16]*2
    assert enc(torch.randn(1,3,64,96)).shape==(1,768,4,6)
    full = image_encoder(model).eval()
    x = torch.randn(1,3,224,224)
    with torch.no_grad():
        tokens = model.encoder(torch.cat([model.class_token, model._process_input(x)], 1))
        torch.testing.assert_close(full(x).flatten(2).transpose(1,2), tokens[:,1:], atol=1e-5, rtol=1e-5)
    assert pickle.loads(pickle.dumps(enc)).stages==enc.stages

@pytest.mark.parametrize('name', ['resnet18','mobilenet_v2'])
def test_a_cut_network_trains_as_the_whole_one(name):
    "In training mode, batch norm sees the same numbers"
    model = build(name)
    x = torch.randn(4,3,64,64)
    enc = pickle.loads(pickle.dumps(image_encoder(model)))
    own = create_feature_extractor(model, {last_node(enc.stages[-1], model): 'y'})
    torch.testing.assert_close(enc.train()(x), own.train()(x)['y'])
    bufs = lambda m: [b for n,b in m.named_buffers() if 'running' in n]
    for a,b in zip(bufs(enc), bufs(own)): torch.testing.assert_close(a, b)

def flat_key(k):
    "A parameter's name without its containers, in timm's network or in our chain of its modules"
    return re.sub(r'^(body_stages_\d+_|body_vit_|body_net_|model_)|^', '',
                  re.sub(r'^body_stages_(\d+)_(?=norm1|attn|norm2|mlp|ls)', r'blocks_\1_', k.replace('.','_')))

timm_levels = dict(resnet18=[4,8,16,32], mobilenetv3_small_050=[4,8,16,32], efficientnet_b0=[2,4,8,16,32],
                   convnext_atto=[4,8,16,32], vit_tiny_patch16_224=[16]*12, swin_tiny_patch4_window7_224=[4,8,16,32],
                   densenet121=[4,8,16,32], regnety_002=[4,8,16,32], hrnet_w18_small=[4,8,16,32], pvt_v2_b0=[4,8,16,32],
                   edgenext_xx_small=[4,8,16,32], mobilevit_xxs=[2,4,8,16,32], mobilenetv4_conv_small=[4,8,16,32],
                   ese_vovnet19b_dw=[4,8,16,32])

def timm_whole(name):
    "timm's own feature network with all levels. A vision transformer accepts pictures of other sizes, as ours does"
    import timm
    kw = dict(features_only=True, **dict(dynamic_img_size=True) if name[:3]=='vit' else {})
    with torch.device('meta'): n = len(timm.create_model(name, **kw).feature_info.info)
    torch.manual_seed(0)
    return timm.create_model(name, out_indices=tuple(range(n)), **kw).eval()

@pytest.mark.parametrize('name', timm_levels)
def test_every_depth_of_a_timm_model(name):
    pytest.importorskip('timm', reason="timm is the extra [timm]")
    levels = timm_levels[name]
    px = 224 if name[:4]=='swin' else 64
    n = None
    whole = timm_whole(name)
    x = torch.randn(1,3,px,px)
    with torch.no_grad(): own = whole(x)[-len(levels):]
    if name[:4]=='swin': own = [o.permute(0,3,1,2) for o in own]
    theirs = {flat_key(k): v for k,v in whole.state_dict().items()}
    for d in range(len(levels), 0, -1):
        enc = image_encoder('timm/'+name, depth=d).eval()
        assert enc.strides==levels[:d] and len(enc.channels)==d==len(enc.stages)
        sd = {flat_key(k): k for k in enc.state_dict()}
        assert set(sd) <= set(theirs)                                  # timm's modules with timm's names
        enc.load_state_dict({k: theirs[f] for f,k in sd.items()})
        maps = enc.maps(x)
        assert [m.shape[1] for m in maps]==enc.channels and [px//m.shape[2] for m in maps]==enc.strides
        for m,o in zip(maps, own): torch.testing.assert_close(m.detach(), o, atol=1e-5, rtol=1e-5)
        if n is not None: assert sum(p.numel() for p in enc.parameters()) < n  # each smaller depth drops a stage
        n = sum(p.numel() for p in enc.parameters())
        maps[-1].sum().backward()
        used = all(p.grad is not None for p in enc.parameters())
        # in hrnet the branches run in parallel: each level needs all branches, but not all of each
        assert used or 'hrnet' in name
        early,late = enc.param_groups()
        assert late and (len(early)>0)==(d>1) and len(early)+len(late)==len(list(enc.parameters()))
    with pytest.raises(ValueError, match=f'has {len(levels)} stages'): image_encoder('timm/'+name, depth=99)

def test_a_network_of_one_pass_is_shared_or_apart_and_never_split():
    pytest.importorskip('timm', reason="timm is the extra [timm]")
    enc = image_encoder('timm/hrnet_w18_small', depth=2)
    x = torch.randn(2,3,64,64)
    for split in (None, 0):
        model = MultiModel(dict(image=enc), dict(a=2, b=3), split=split).eval()
        assert [o.shape for o in model(x)]==[(2,2),(2,3)]
    with pytest.raises(ValueError, match='none of them can be copied alone. `split` can be None .all shared. or 0'):
        MultiModel(dict(image=enc), dict(a=2, b=3), split=1)
    with pytest.raises(ValueError, match='choose its depth when you make it'): enc.cut(1)

# weights

def fake_download(sd):
    def _get(*args, **kwargs):
        if isinstance(sd, Exception): raise sd
        return sd
    return _get

def test_weights_by_name(monkeypatch):
    model = build('mobilenet_v3_small')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fake_download(model.state_dict()))
    x = torch.randn(1,3,64,64)
    for kw in (dict(pretrained=True), dict(weights='IMAGENET1K_V1'),
               dict(weights=torchvision.models.MobileNet_V3_Small_Weights.DEFAULT)):
        enc = image_encoder('mobilenet_v3_small', depth=3, **kw).eval()
        torch.testing.assert_close(enc(x), model.features[:9](x))
        assert enc.pretrained and enc.stats==([0.485,0.456,0.406],[0.229,0.224,0.225])
    grey = image_encoder('mobilenet_v3_small', n_in=1, pretrained=True).eval()
    torch.testing.assert_close(grey(x[:,:1]), model.features(x[:,:1].expand(-1,3,-1,-1)), atol=1e-4, rtol=1e-4)
    assert len(grey.stats[0])==1
    assert not image_encoder('mobilenet_v3_small').pretrained
    assert image_encoder('mobilenet_v3_small').stats is None

def test_weights_that_cannot_be_downloaded(monkeypatch):
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fake_download(OSError('no route')))
    with pytest.raises(
        ConnectionError,
        match="resnet18 could not be downloaded .*weights='file.pth', or start untrained, pretrained=False"
    ):
        image_encoder('resnet18', pretrained=True)

def test_a_real_file_of_weights(real):
    file = next(real('weights').glob('mobilenet_v2*.pth'))
    model = torchvision.models.mobilenet_v2(weights=None)
    model.load_state_dict(torch.load(file, weights_only=True))
    model.eval()
    x = torch.randn(2,3,96,96)
    with torch.no_grad():
        for d,end in ((2,4),(5,19)):
            enc = image_encoder(torchvision.models.mobilenet_v2, depth=d, weights=file).eval()
            torch.testing.assert_close(enc(x), model.features[:end](x), atol=1e-5, rtol=1e-4)
        assert enc.stats==([0.485,0.456,0.406],[0.229,0.224,0.225])
    with pytest.raises(ValueError, match='The weights in .* do not fit resnet18: it lacks conv1.weight, bn1.weight'):
        image_encoder('resnet18', weights=file)

# the whole model

def model_of_all():
    torch.manual_seed(0)
    return MultiModel(dict(image=image_encoder('resnet18', depth=2), text=text_encoder('lstm', 30),
                           title=text_encoder('bag', 30), nums=vector_encoder(4)),
                      dict(kind=5, tags=7, price=1, box=4, eyes=4),
                      head_classes=dict(box=BoxHead, eyes=PointsHead, price=NumberHead))

def batch_of_all(bs=16):
    torch.manual_seed(1)
    x = [torch.randn(bs,3,64,64), torch.randint(1,30,(bs,9)), torch.randint(1,30,(bs,6)), torch.randn(bs,4)]
    for i in range(bs): x[1][i,1+i%9:] = 0
    x[0][1],x[1][2],x[2][3],x[3][4] = float('nan'),0,0,float('nan')
    return x

def test_one_by_one_and_in_a_batch_give_the_same_numbers():
    model = model_of_all().eval()
    x = batch_of_all()
    with torch.no_grad():
        y = model(*x)
        for i in (0,1,2,3,4,15):
            alone = [o[i:i+1] for o in x]
            alone[1] = alone[1][:,:max(1, int((alone[1]!=0).sum()))]
            for a,b in zip(model(alone), y): torch.testing.assert_close(a[0], b[i], atol=1e-5, rtol=1e-4)
    assert all(o.isfinite().all() for o in y) and y.eyes.shape==(16,2,2)

def test_a_step_asks_the_device_for_nothing():
    "On the meta device tensors have no values, so reading one fails"
    model = model_of_all().to('meta').train()
    y = model([o.to('meta') for o in batch_of_all()])
    sum(o.sum() for o in y).backward()
    assert y.box.shape==(16,4) and all(p.grad is not None for p in model.parameters())

def in_channels_last(model, x):
    model.to(memory_format=torch.channels_last)
    return [x[0].to(memory_format=torch.channels_last), *x[1:]]

def test_channels_last():
    model = model_of_all().eval()
    x = batch_of_all()
    with torch.no_grad():
        y = model(*x)
        z = model(*in_channels_last(model, x))
    for a,b in zip(z, y): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

@torch.no_grad()
def lstm_takes_bfloat16():
    "Whether PyTorch's own LSTM runs in bfloat16 on this CPU; without AVX-512 it does not"
    with torch.autocast('cpu', torch.bfloat16):
        try: nn.LSTM(4, 4)(torch.zeros(1,1,4))
        except RuntimeError: return False
    return True

def test_autocast():
    if not lstm_takes_bfloat16(): pytest.skip("PyTorch's LSTM has no bfloat16 on this CPU")
    model = model_of_all().eval()
    x = batch_of_all()
    with torch.no_grad():
        y = model(*x)
        with torch.autocast('cpu', torch.bfloat16): z = model(*in_channels_last(model, x))
    for a,b in zip(z, y): assert a.isfinite().all() and (a.float()-b).abs().max() < 0.15*max(1., b.abs().max())

def test_groups_follow_the_stages_that_are_kept():
    for d,early in ((1,None),(2,1),(3,1),(4,2)):
        enc = image_encoder('resnet18', depth=d)
        groups = split_params(MultiModel(dict(image=enc, text=text_encoder('bag', 30)), dict(kind=3)))
        n = [sum(p.numel() for p in s.parameters()) for s in enc.body.stages]
        got = [sum(p.numel() for p in g) for g in groups[:-1]]
        assert got==([sum(n)] if early is None else [sum(n[:early]), sum(n[early:])])

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_cuda_without_a_wait():
    model = model_of_all().cuda().train()
    x = [o.cuda() for o in batch_of_all()]
    sum(o.float().sum() for o in model(*x)).backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        with torch.autocast('cuda', torch.bfloat16): sum(o.float().sum() for o in model(*x)).backward()
    finally: torch.cuda.set_sync_debug_mode('default')
    assert all(p.grad.isfinite().all() for p in model.parameters())

def test_features_that_depend_on_the_size_of_the_picture():
    with pytest.raises(ValueError, match='put an nn.AdaptiveAvgPool2d before'):
        image_encoder(nn.Sequential(simple_cnn(widths=[8]), nn.Flatten()))
    assert image_encoder(nn.Sequential(simple_cnn(widths=[8]), nn.AdaptiveAvgPool2d(4), nn.Flatten())).n_features==128

# the order of outputs, names, and other tools

def image_and_text(outputs, **kwargs):
    "A small model of a picture and a text"
    torch.manual_seed(0)
    encoders = dict(image=image_encoder(simple_cnn(3, width=4, bn=True)), text=text_encoder('bag', 30))
    classes = dict(box=BoxHead, mask=MaskHead)
    classes = {n: c for n,c in classes.items() if n in outputs}
    return MultiModel(encoders, outputs, head_classes=classes, **kwargs).eval()

def picture_and_words(bs=4):
    torch.manual_seed(1)
    picture = torch.randn(bs,3,32,32)
    words = torch.randint(1, 30, (bs,7))
    picture[0] = float('nan')
    words[1] = 0
    return picture,words

def close(a, b, atol=1e-5):
    assert a.keys()==b.keys()
    for n in a.keys(): torch.testing.assert_close(a[n], b[n], atol=atol, rtol=1e-4)

OUTPUTS = dict(kind=5, tags=7, box=4)
FORMS = [{}, dict(depth=dict(box=2)), dict(split=2), dict(split=0), dict(heads=dict(kind=dict(pool='avg'), tags=[8])),
         dict(depth=dict(box=1), split=2, after=dict(tags='kind'))]

@pytest.mark.parametrize('form', FORMS, ids=str)
def test_the_order_of_the_outputs_does_not_matter(form):
    xb = picture_and_words()
    model = image_and_text(OUTPUTS, **form)
    other = image_and_text(dict(reversed(OUTPUTS.items())), **form)
    for p in other.parameters(): torch.nn.init.constant_(p, 0.1)
    assert {*model.state_dict()}=={*other.state_dict()}
    other.load_state_dict(model.state_dict())
    y = model(*xb)
    z = other(*xb)
    assert z.keys()==tuple(reversed(OUTPUTS))
    for n in OUTPUTS: torch.testing.assert_close(z[n], y[n])

@pytest.mark.parametrize('form', FORMS[:4], ids=str)
def test_names_of_modules_do_not_depend_on_what_else_is_predicted(form):
    model = image_and_text(OUTPUTS, **form)
    fewer = image_and_text({n: OUTPUTS[n] for n in ('kind','box')}, **form)
    assert {*fewer.state_dict()} < {*model.state_dict()}

def test_inputs_are_read_by_name():
    picture,words = picture_and_words()
    model = image_and_text(OUTPUTS)
    y = model(picture, words)
    for xb in (Inputs(text=words, image=picture), dict(text=words, image=picture)):
        close(model(xb), y)
    close(model((Inputs(text=words, image=picture),)), y)
    with pytest.raises(KeyError, match="Unknown input 'photo'"): model(Inputs(photo=picture, text=words))
    with pytest.raises(KeyError, match=r"but got \['text'\]: \['image'\] are missing"): model(dict(text=words))
    with pytest.raises(KeyError, match="Unknown input 'nums'"): model(dict(image=picture, text=words, nums=words))
    with pytest.raises(ValueError, match="inputs .*, but got 3 tensors"): model(picture, words, words)

def test_a_head_replaced_and_one_added():
    xb = picture_and_words()
    model = image_and_text(OUTPUTS, split=2, depth=dict(box=2))
    before = model(*xb)
    keys = {*model.state_dict()}
    model.set_head('kind', [16], 6)
    model.set_head('late', None, 3)
    model.set_head('mask', dict(width=8), 2, MaskHead, like='tags', after='kind')
    y = model(*xb)
    assert y.keys()==('kind','tags','box','late','mask')
    assert (y.kind.shape, y.late.shape, y.mask.shape)==((4,6), (4,3), (4,2,32,32))
    for n in ('tags','box'): torch.testing.assert_close(y[n], before[n])
    assert {k for k in keys if not k.startswith('heads.kind')} <= {*model.state_dict()}
    assert model.plan.view_of['late']=='depth_2' and model.plan.view_of['mask']=='only_tags'
    close(pickle.loads(pickle.dumps(model))(*xb), y)
    groups = split_params(model)
    assert sum(len(g) for g in groups)==len(list(model.parameters()))
    with pytest.raises(ValueError, match=r"\['mask'\] come after 'kind' and read its 6 numbers"):
        model.set_head('kind', [8], 5)
    close(model(*xb), y)                                                # the error changes nothing

def test_one_encoder_for_two_inputs_is_listed_once():
    image = image_encoder(simple_cnn(3, width=4))
    text = text_encoder('bag', 30)
    model = MultiModel(dict(front=image, back=image, title=text, body=text), dict(a=2, b=3))
    picture,words = picture_and_words()
    for parameters in (model.shared_parameters(), [p for g in split_params(model) for p in g]):
        ids = [id(p) for p in parameters]
        assert len(ids)==len(set(ids))
    assert {id(p) for p in image.parameters()} <= {id(p) for p in model.shared_parameters()}
    hooks = model.shared_points()
    assert len({id(m) for m in hooks})==len(hooks)
    assert model(picture, picture, words, words).a.shape==(4,2)

def tools_case(name):
    "A model and its arguments"
    picture,words = picture_and_words()
    both = dict(kind=5, box=4, mask=2)
    lstm = dict(text=text_encoder('lstm', 30))
    if name=='text': return MultiModel(lstm, dict(kind=5, price=1)).eval(),(words,)
    if name=='bare text': return MultiModel(lstm, dict(kind=5), named=False).eval(),(words,)
    if name=='image and text by name': return image_and_text(both, split=1),(Inputs(text=words, image=picture),)
    if name=='image and text': return image_and_text(both, depth=dict(box=2), after=dict(box='kind')),(picture,words)
    encoder = image_encoder('resnet18', depth=2)
    classes = dict(eyes=PointsHead, box=BoxHead)
    return MultiModel(dict(image=encoder), dict(kind=5, eyes=4, box=4), head_classes=classes).eval(),(picture,)

TOOLS_CASES = ['image','text','bare text','image and text','image and text by name']

class AllMaps(nn.Module):
    "Read the maps of every stage, and the last one twice"
    def __init__(self, enc):
        super().__init__()
        self.enc = enc
    def forward(self, x):
        maps = self.enc.feature_maps(x)
        return [*maps.upto(1).maps(), maps[-1]],maps.image

def small_vit():
    return torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2,
                                                hidden_dim=16, mlp_dim=32)

@pytest.mark.parametrize('arch', [simple_cnn(2, width=4, bn=True), small_vit()], ids=['cnn','vit'])
def test_an_encoder_is_traced_whole(arch):
    model = AllMaps(image_encoder(arch)).eval()
    torch._dynamo.reset()
    x = torch.randn(3, 3, 32, 32)
    x[1] = float('nan')                                                # a missing picture
    with torch.no_grad():
        maps,image = model(x)
        for traced in (torch.compile(model, fullgraph=True, backend='eager'),
                       torch.export.export(model, (x,), strict=True).module()):
            again,again_image = traced(x)
            torch.testing.assert_close(again, maps, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(again_image, image, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('name', TOOLS_CASES)
def test_compile_takes_the_whole_model(name):
    model,xb = tools_case(name)
    torch._dynamo.reset()
    with torch.no_grad():
        y = model(*xb)
        z = torch.compile(model, fullgraph=True, backend='aot_eager')(*xb)
    assert type(z) is type(y)
    torch.testing.assert_close(tuple(z), tuple(y), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('name', TOOLS_CASES)
def test_export_makes_a_program(name, tmp_path):
    model,xb = tools_case(name)
    torch._dynamo.reset()
    with torch.no_grad(): y = model(*xb)
    program = torch.export.export(model, xb, strict=True)
    z = program.module()(*xb)
    assert type(z) is type(y)
    torch.testing.assert_close(tuple(z), tuple(y), atol=1e-5, rtol=1e-4)
    torch.export.save(program, tmp_path/'model.pt2')
    logging.disable(logging.WARNING)                                   # one of PyTorch's warnings lacks an argument
    try: again = torch.export.load(tmp_path/'model.pt2').module()(*xb)
    finally: logging.disable(logging.NOTSET)
    assert type(again) is type(y)
    torch.testing.assert_close(tuple(again), tuple(y), atol=1e-5, rtol=1e-4)

def test_a_compiled_model_trains():
    model = image_and_text(dict(kind=5, box=4), split=1).train()
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, backend='aot_eager')(*picture_and_words())
    sum(o.sum() for o in y).backward()
    assert all(p.grad is not None for p in model.parameters())

def test_an_exported_program_takes_batches_of_any_size():
    model = image_and_text(dict(kind=5, box=4))
    torch._dynamo.reset()
    size = {0: torch.export.Dim('items', min=2, max=64)}
    program = torch.export.export(model, picture_and_words(), dynamic_shapes=((size,size),), strict=True).module()
    xb = picture_and_words(9)
    with torch.no_grad(): close(program(*xb), model(*xb))

# the prior, and linear maps of wide features

def some_terms():
    "The words and pairs of words in drawn texts"
    torch.manual_seed(2)
    return TermWeights(list(torch.randint(2, 30, (60,8))), 30, pad_id=0, unk_id=1)

def wide_model(**kwargs):
    "A model of a picture, a text with terms and a vector, with one output of each kind"
    torch.manual_seed(0)
    encoders = dict(image=image_encoder(simple_cnn(3, width=4, bn=True)),
                    text=text_encoder('bag', 30, terms=some_terms()), nums=vector_encoder(4))
    classes = dict(box=BoxHead, eyes=PointsHead, price=NumberHead)
    return MultiModel(encoders, dict(kind=5, tags=7, price=1, box=4, eyes=4), head_classes=classes, **kwargs)

def wide_batch(bs=6):
    picture,words = picture_and_words(bs)
    return picture,words,torch.randn(bs,4)

PRIOR = dict(kind=torch.arange(5.), tags=-torch.arange(7.), price=torch.tensor([3.]),
             box=torch.tensor([0.1,0.2,-1.,-0.5]), eyes=torch.tensor([0.1,0.2,-0.3,0.4]))

def put_prior(model):
    for n,bias in PRIOR.items():
        with torch.no_grad(): model.heads[n].wide.bias.copy_(bias)

def maps_by_hand(model):
    "Put random weights into the linear map of each head, and return them"
    res = {}
    for n,head in model.heads.items():
        res[n] = torch.randn(len(PRIOR[n]), head.n_wide)
        head.wide.put(res[n], PRIOR[n])
    return res

WIDE_FORMS = [{}, dict(split=1), dict(split=0), dict(depth=dict(box=2), after=dict(tags='kind')),
              dict(neck=0, heads=dict(kind=dict(pool='avg', bn=True), tags=dict(hidden=[], p=0)))]

@pytest.mark.parametrize('form', WIDE_FORMS, ids=str)
@pytest.mark.parametrize('train', [True, False])
def test_a_new_head_says_its_prior_whatever_the_input(form, train):
    model = wide_model(**form).train(train)
    put_prior(model)
    for xb in (wide_batch(), [100*x if x.is_floating_point() else x for x in wide_batch()]):
        y = model(*xb)
        for n,bias in PRIOR.items():
            want = model.heads[n].last_step(bias.expand(6, -1))
            assert torch.equal(y[n], want), n

def test_a_new_box_is_the_middle_half_of_the_frame():
    y = wide_model()(*wide_batch())
    torch.testing.assert_close(y.box, torch.tensor([-.5,-.5,.5,.5]).expand(6,4), atol=1e-4, rtol=0)
    assert not y.kind.any() and not y.eyes.any()

@pytest.mark.parametrize('form', WIDE_FORMS, ids=str)
def test_a_linear_map_put_by_hand_is_what_the_head_gives(form):
    model = wide_model(**form).eval()
    weights = maps_by_hand(model)
    xb = wide_batch()
    with torch.no_grad():
        y = model(*xb)
        reads = model.read(*xb)
        for n,w in weights.items():
            x = model.wides[model.wide_of[n]](model.wide_inputs(n, reads))
            want = model.heads[n].last_step(x@w.t()+PRIOR[n])
            torch.testing.assert_close(y[n], want, atol=1e-5, rtol=1e-4)

def test_what_is_wide():
    model = wide_model().eval()
    picture,words,nums = wide_batch()
    reads = model.read(picture, words, nums)
    last = reads['kind']['image'][-1]
    wide = model.wide_inputs('kind', reads)
    assert [*wide]==['image','text','nums']
    torch.testing.assert_close(wide['image'], torch.cat([last.mean((2,3)), last.amax((2,3))], 1))
    torch.testing.assert_close(model.wide_inputs('box', reads)['image'][:,:16], last[:,0].flatten(1))  # a map of 4 x 4
    torch.testing.assert_close(wide['text'], some_terms()(words))
    torch.testing.assert_close(wide['nums'], nums/(1+1e-5)**0.5)
    assert model.wide_of==dict(kind='depth_3', tags='depth_3', price='depth_3', box='fields_depth_3',
                               eyes='fields_depth_3')
    assert model.heads['kind'].n_wide==model.wides['depth_3'].n_features==32+some_terms().n_features+4

def test_an_absent_input_adds_nothing():
    model = wide_model().eval()
    maps_by_hand(model)
    xb = wide_batch(40)
    reads = model.read(*xb)
    for n,key in model.wide_of.items(): model.wides[key].fit(model.wide_inputs(n, reads))
    picture,words,nums = [x.clone() for x in xb]
    picture[3] = float('nan')
    words[4] = 0
    nums[5] = float('nan')
    reads = model.read(picture, words, nums)
    for n,key in model.wide_of.items():
        blocks = model.wides[key].blocks(model.wide_inputs(n, reads))
        for i,name in ((3,'image'), (4,'text'), (5,'nums')):
            assert not blocks[name][i].any() and blocks[name][2].any()
    nums[5] = 0.
    nums[5,1] = float('nan')                                           # one number of several is missing
    assert model(picture, words, nums).kind.isfinite().all()

def test_wide_features_are_on_one_scale_after_fit():
    model = wide_model().eval()
    picture = 50+20*torch.randn(64,3,32,32)
    words = torch.randint(2, 30, (64,8))
    nums = 1e4+100*torch.randn(64,4)
    model.encoders['nums'].fit(nums)
    reads = model.read(picture, words, nums)
    wide = model.wides['depth_3']
    given = model.wide_inputs('kind', reads)
    wide.fit(given)
    for n,x in wide.blocks(given).items(): assert 0.8 < x.pow(2).sum(1).mean() < 1.05, n

def test_training_moves_the_linear_map_if_its_rate_is_not_zero():
    for rate in (0.,1.):
        model = wide_model().train()
        for n,head in model.heads.items():
            head.wide.put(torch.zeros(len(PRIOR[n]), head.n_wide), PRIOR[n], rate=rate)
        opt = torch.optim.SGD(model.parameters(), 0.1)
        sum(o.pow(2).sum() for o in model(*wide_batch())).backward()
        opt.step()
        for head in model.heads.values(): assert head.wide.weight.any()==(rate>0)

def test_a_copy_keeps_the_linear_map_and_the_scales():
    model = wide_model().eval()
    maps_by_hand(model)
    xb = wide_batch(40)
    reads = model.read(*xb)
    for n,key in model.wide_of.items(): model.wides[key].fit(model.wide_inputs(n, reads))
    y = model(*xb)
    other = wide_model().eval()
    other.load_state_dict(model.state_dict())
    for again in (deepcopy(model), pickle.loads(pickle.dumps(model)), other): close(again(*xb), y)
    assert all(not h.wide.rate for h in other.heads.values())

def test_a_head_added_reads_wide_features_and_leaves_the_scales_alone():
    torch.manual_seed(0)
    model = MultiModel(dict(image=image_encoder(simple_cnn(3, width=4)), nums=vector_encoder(4)), dict(kind=5)).eval()
    xb = (torch.randn(8,3,32,32), torch.randn(8,4))
    model.wides['depth_3'].fit(model.wide_inputs('kind', model.read(*xb)))
    before = {k: v.clone() for k,v in model.wides.state_dict().items()}
    model.set_head('more', [8], 3)
    model.set_head('box', None, 4, BoxHead)
    assert model.wide_of==dict(kind='depth_3', more='depth_3', box='fields_depth_3')
    assert all(torch.equal(model.wides.state_dict()[k], v) for k,v in before.items())
    assert model(*xb).box.shape==(8,4)
    model.set_head('kind', nn.Linear(160,5))                           # a module of yours is called as usual
    assert 'kind' not in model.wide_of and model(*xb).kind.shape==(8,5)
    with pytest.raises(ValueError, match="The head 'kind' reads 7 wide features, but the inputs give 36: .*n_wide=36"):
        model.set_head('kind', Head(160, 5, n_wide=7))
    assert isinstance(model.heads['kind'], nn.Linear)
    model.set_head('kind', Head(160, 5, n_wide=36))
    assert model.wide_of['kind']=='depth_3'

class OwnHead(nn.Module):
    "A custom head class that does not use wide features"
    options = ('width',)
    def __init__(self, n_in, n_out, maps=None, width=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_in, width), nn.Linear(width, n_out))
    def forward(self, features): return self.layers(features)

def test_a_head_class_of_yours_is_called_as_ever():
    image = image_encoder(simple_cnn(2, width=4))
    model = MultiModel(dict(image=image), dict(a=2, b=3), heads=dict(a=dict(width=4)), head_classes=dict(a=OwnHead))
    assert model(torch.randn(2,3,16,16)).a.shape==(2,2) and model.wide_of==dict(b='depth_2')

def test_a_trained_encoder_of_yours_is_wide_and_an_untrained_one_is_not():
    for trained,n_wide in ((True,6), (False,0)):
        own = nn.Linear(4, 6)
        own.pretrained = trained
        model = MultiModel(dict(nums=vector_encoder(4, own)), dict(kind=3)).eval()
        assert model.heads['kind'].n_wide==n_wide and ('kind' in model.wide_of)==trained
        x = torch.randn(5,4)
        if trained: torch.testing.assert_close(model.wide_inputs('kind', model.read(x))['nums'], own(x))

def test_texts_without_a_frequent_term():
    terms = TermWeights([torch.tensor([i]) for i in range(2, 20)], 30)
    model = MultiModel(dict(text=text_encoder('lstm', 30, terms=terms)), dict(kind=3))
    assert terms.n_features==0 and model.heads['kind'].n_wide==0 and model(torch.ones(2,4).long()).kind.shape==(2,3)

def test_two_inputs_share_an_encoder_with_terms():
    text = text_encoder('bag', 30, terms=some_terms())
    model = MultiModel(dict(title=text, body=text), dict(kind=3)).eval()
    words = torch.randint(2, 30, (4,7))
    wide = model.wide_inputs('kind', model.read(words, words.flip(1)))
    torch.testing.assert_close(wide['body'], some_terms()(words.flip(1)))
    assert model.wides['all'].n_features==2*some_terms().n_features

@pytest.mark.parametrize('train', [False, True])
def test_wide_features_in_a_compiled_and_an_exported_model(train):
    model = wide_model(split=1).train(train)
    maps_by_hand(model)
    xb = wide_batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    if train:
        sum(o.sum() for o in compiled(*xb)).backward()
        assert all(p.grad is not None for p in model.parameters())
        return
    with torch.no_grad():
        y = model(*xb)
        close(compiled(*xb), y)
        size = {0: torch.export.Dim('items', min=2, max=64)}
        program = torch.export.export(model, xb, dynamic_shapes=((size,)*3,), strict=True).module()
        close(program(*wide_batch(9)), model(*wide_batch(9)))

def test_what_a_target_was_before_the_last_step():
    corners = torch.tensor([[-.5,-.25,.5,.75],[0.,0.,.1,.2]])
    box = BoxHead(3)
    torch.testing.assert_close(box.last_step(box.to_raw(corners)), corners)
    points = PointsHead(3, 4)
    torch.testing.assert_close(points.last_step(points.to_raw(corners.unflatten(1, (2,2)))),
                               corners.unflatten(1, (2,2)))
    assert NumberHead(3, 1).to_raw(torch.arange(3)).tolist()==[[0.],[1.],[2.]]
