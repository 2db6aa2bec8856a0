"Whole torchvision detectors: every output uses their trunk, and the objects use their head"
import subprocess, sys
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import IGNORE
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tests.test_objects import KINDS, loaders, objects_of

FAMILIES = ('fcos','retinanet','fasterrcnn')

@pytest.fixture(autouse=True)
def single(one_thread): pass

def conv(n_in, n_out):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

def backbone():
    "A body with four layers of stride 2 and a pyramid with strides 4, 8, 16 and 32"
    body = nn.Sequential(OrderedDict(a=conv(3,16), b=conv(16,32), c=conv(32,64), d=conv(64,64)))
    return BackboneWithFPN(body, {'b': '0', 'c': '1', 'd': '2'}, [32,64,64], 32, extra_blocks=LastLevelMaxPool())

def anchors(*sizes): return AnchorGenerator(tuple((s,) for s in sizes), ((1.,),)*len(sizes))

def fcos(n):
    return FCOS(backbone(), n+1, head=FCOSHead(32, 1, n+1, num_convs=2), anchor_generator=anchors(4,8,16,32))

def retinanet(n):
    head = RetinaNetHead(32, 1, n+1, norm_layer=partial(nn.GroupNorm, 8))
    return RetinaNet(backbone(), n+1, head=head, anchor_generator=anchors(8,16,32,64))

def fasterrcnn(n):
    few = dict(rpn_post_nms_top_n_train=60, rpn_post_nms_top_n_test=30, box_batch_size_per_image=32)
    return FasterRCNN(backbone(), n+1, rpn_anchor_generator=anchors(8,16,32,64), box_head=TwoMLPHead(32*25, 1024),
                      box_roi_pool=MultiScaleRoIAlign(['0','1','2'], 5, 2), **few)

def detector(family, n):
    "A small detector with random weights for pictures of 64 pixels, with `n` classes besides the background"
    set_seed(0)
    model = globals()[family](n)
    model.transform.min_size = (64,)
    model.transform.max_size = 64
    return model

def restless(model):
    "Set random weights that find something, because torchvision starts with a probability of 1 % everywhere"
    set_seed(1)
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)): nn.init.normal_(m.weight, std=(1.5/m.weight[0].numel())**.5)
    if hasattr(model, 'head'): forget_background(model.head.classification_head)
    else: calm(model.rpn.head.cls_logits, model.rpn.head.bbox_pred, model.roi_heads.box_predictor.bbox_pred)
    return model

def calm(*layers):
    "Shrink the weights, or else scores of 1 and boxes without area leave it to rounding which boxes stay"
    for layer in layers: layer.weight.data.mul_(.1)

def forget_background(head):
    "Suppress class 0, which no box has. Random weights of an FCOS or a RetinaNet predict it, trained ones do not"
    layer = head.cls_logits
    with torch.no_grad():
        layer.weight.view(head.num_anchors, head.num_classes, -1)[:,0] = 0
        layer.bias.view(head.num_anchors, head.num_classes)[:,0] = -30

@pytest.fixture(scope='module')
def table(shapes):
    df = pd.read_csv(shapes/'items.csv')
    by_file = dict(list(pd.read_csv(shapes/'boxes.csv').groupby('file')))
    df['objects'] = [objects_of(by_file[f]) for f in df.file]
    df['objects'] = df.objects.astype(object)
    df.at[5,'objects'] = []
    return df

def dls_of(table, shapes, outputs=None, **kwargs):
    if outputs is None: outputs = dict(objects=ObjectsBlock(kind=CategoryBlock), colour=CategoryBlock)
    rows = [[{k: v for k,v in o.items() if k in ('box', *outputs['objects'].blocks)} for o in r] for r in table.objects]
    return loaders(table.assign(objects=rows), shapes, outputs, **{**dict(bs=8), **kwargs})

def learner(dls, arch, **kwargs):
    set_seed(0)
    learn = multi_learner(dls, arch, **{**dict(pretrained=False, lr=2e-3), **kwargs})
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def given_to_torchvision(learn, x, y):
    "The pictures from 0 to 1 and the objects in pixels, as torchvision takes them"
    mean,std = [tensor(v)[:,None,None] for v in learn.model.encoders['image'].stats]
    h,w = x.shape[-2:]
    targets = []
    for i in range(len(x)):
        here = ~y.box[i,:,0].isnan()
        boxes = (y.box[i,here]+1)/2*tensor([w,h,w,h]).float()
        targets.append(dict(boxes=boxes, labels=y.kind[i,here]+1))
    return list((x*std+mean).as_subclass(Tensor)), targets

@pytest.mark.parametrize('family', FAMILIES)
def test_it_finds_what_torchvision_finds(table, shapes, family):
    "The boxes, scores and classes equal the detector's own, in the pixels of the picture"
    dls = dls_of(table, shapes)
    vocab = dls.vocab['objects.kind']
    model = restless(detector(family, len(vocab))).eval()
    learn = learner(dls, model)
    x,y = dls.valid.one_batch()
    pictures,_ = given_to_torchvision(learn, x, y.objects)
    with torch.no_grad():
        own = model(pictures)
        pred = learn.model.eval()(x)
    boxes,scores,labels,_ = learn.tasks['objects'].detector(pred.objects)
    assert sum(len(o['boxes']) for o in own)>20
    for i,o in enumerate(own):
        has_area = (o['boxes'][:,2:]>o['boxes'][:,:2]).all(1)    # torchvision's FCOS also returns boxes without area
        o = {k: v[has_area] for k,v in o.items()}
        n = len(o['boxes'])
        assert (labels[i]!=IGNORE).sum()==n
        torch.testing.assert_close(scores[i,:n], o['scores'], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close((boxes[i,:n]+1)*32, o['boxes'], atol=1e-2, rtol=1e-4)
        assert (labels[i,:n]+1).tolist()==o['labels'].tolist()

PARTS = dict(fcos=dict(classification='classes', bbox_regression='boxes', bbox_ctrness='centre'),
             retinanet=dict(classification='classes', bbox_regression='boxes'),
             fasterrcnn=dict(loss_objectness='objects', loss_rpn_box_reg='proposals', loss_classifier='classes',
                             loss_box_reg='boxes'))

@pytest.mark.parametrize('family', FAMILIES)
def test_it_loses_what_torchvision_loses(table, shapes, family):
    "Each part of the training loss is equal, with samples from the same seed"
    dls = dls_of(table, shapes, bs=16)
    model = restless(detector(family, len(dls.vocab['objects.kind']))).train()
    learn = learner(dls, model)
    x,y = dls.train.one_batch()
    images,targets = given_to_torchvision(learn, x, y.objects)
    model.transform.training = False    # in training it picks a random size
    set_seed(3)
    own = model(images, targets)
    learn.model.train()
    if family=='fasterrcnn':
        learn.model.heads['objects'].choose = learn.loss_func.funcs['objects'].choose(y.objects)
    set_seed(3)
    learn.loss_func(learn.model(x), y)
    parts = learn.loss_func.funcs['objects'].parts
    for theirs,ours in PARTS[family].items():
        torch.testing.assert_close(parts[ours], own[theirs].detach(), atol=1e-4, rtol=1e-4)

@pytest.fixture(scope='module')
def finding(table, shapes):
    "A learner of each family whose random weights find objects"
    outputs = dict(objects=ObjectsBlock(kind=CategoryBlock, area=RegressionBlock), colour=CategoryBlock)
    dls = dls_of(table, shapes, outputs, valid_idx=list(range(60, 68)))
    res = {f: learner(dls, restless(detector(f, len(dls.vocab['objects.kind'])))) for f in FAMILIES}
    for learn in res.values():
        learn.tasks['objects'].detector.least = .05
        learn.tasks['objects'].threshold = .05
    return res

@pytest.mark.parametrize('family', FAMILIES)
def test_answers(finding, family, tmp_path):
    "`predict`, `predict_df`, `get_preds` and `show_results` work, and a fresh process gives the same answers"
    learn = finding[family]
    file = learn.dls.path/learn.dls.train.items.file.iloc[0]
    rows = learn.predict(file)[0].objects
    assert rows and set(rows[0]) == {'box','score','kind','area'}
    assert all(0<=v<=64 for o in rows for v in o['box'])
    df = learn.predict_df(learn.dls.train.items.iloc[:3], num_workers=0)
    assert len(df)==3
    preds,targs,losses = learn.get_preds(with_loss=True)
    assert preds.objects.box.shape==(8,learn.tasks['objects'].detector.most,4) and losses.isfinite().all()
    raw,_ = learn.get_preds(act=noop)
    torch.testing.assert_close(learn.loss_func.activation(raw).objects.box, preds.objects.box, equal_nan=True)
    assert learn.evaluate()['valid_loss']==pytest.approx(learn.evaluate()['valid_loss'])
    learn.show_results(max_n=2)
    plt.close('all')
    assert 'objects' in str(MultiInterpretation.from_learner(learn))
    learn.export(tmp_path/'learner.pkl')
    code = (f'from fastai.vision.all import *; learn = load_learner({str(tmp_path/"learner.pkl")!r}); '
            f'print("BOX", learn.predict({str(file)!r})[0].objects[0]["box"])')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert 'BOX' in out.stdout, out.stderr
    np.testing.assert_allclose(eval(out.stdout.split('BOX')[1].strip().splitlines()[0]), rows[0]['box'], atol=1e-3)

@pytest.mark.parametrize('family', FAMILIES)
def test_a_bundle(finding, family, tmp_path):
    learn = finding[family]
    file = learn.dls.path/learn.dls.train.items.file.iloc[0]
    learn.save_bundle(tmp_path/'bundle', metrics=False)
    again = load_bundle(tmp_path/'bundle')
    assert again.tasks['objects'].detector.least==learn.tasks['objects'].detector.least
    for a,b in zip(again.predict(file)[0].objects, learn.predict(file)[0].objects):
        np.testing.assert_allclose(a['box'], b['box'], atol=1e-3)

# Missing labels and freezing

@pytest.mark.parametrize('family', FAMILIES)
def test_missing_labels(table, shapes, family):
    "With crowds, boxes without a class, and empty or unannotated pictures, the loss is finite and the model trains"
    df = table.iloc[:16].copy()
    df['objects'] = [[dict(o) for o in rows] for rows in df.objects]
    for rows in df.objects:
        if rows: rows[0]['kind'] = None
    for i in range(0, 16, 4): df.at[df.index[i],'objects'] = None
    df.at[df.index[1],'objects'] = []
    for o in df.objects.iloc[2]: o['crowd'] = 1
    rows = [None if r is None else [{k: v for k,v in o.items() if k in ('box','kind','crowd','area')} for o in r]
            for r in df.objects]
    dls = loaders(df.assign(objects=rows), shapes, dict(objects=ObjectsBlock(kind=CategoryBlock, area=RegressionBlock)),
                  bs=8, valid_idx=list(range(4)))
    learn = learner(dls, detector(family, 4))
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][:2]).all()
    assert sum(not torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))>10

@pytest.mark.parametrize('family', FAMILIES)
def test_a_crowd_is_no_background(table, shapes, family):
    "Predictions inside a crowd do not change the loss of the classes"
    dls = dls_of(table, shapes)
    learn = learner(dls, restless(detector(family, 4)))
    x,y = dls.valid.one_batch()
    y = y.map(torch.clone)
    loss = learn.loss_func.funcs['objects']
    with torch.no_grad(): pred = learn.model.eval()(x)
    y.objects.box[:,0] = tensor([-1.2,-1.2,1.2,1.2])    # FCOS's first locations are on the edge
    y.objects.crowd[:] = 1
    loss(pred.objects, y.objects)
    assert float(loss.parts['classes'])==0

def test_classes_that_nobody_looked_for(table, shapes):
    "FCOS and RetinaNet leave these classes out. A Faster R-CNN says why it cannot"
    kinds = sorted({o['kind'] for r in table.objects for o in r})
    halves = ['|'.join(kinds[:2]), '|'.join(kinds[2:])]
    df = table.assign(seen=[halves[i%2] for i in range(len(table))])
    rows = [[{k: v for k,v in o.items() if k in ('box','kind')} for o in r] for r in df.objects]
    boxes = pd.DataFrame([dict(file=f, **o) for f,r in zip(df.file, rows) for o in r])
    seen = boxes.file.map(df.set_index('file').seen)
    boxes = boxes[[k in s for k,s in zip(boxes.kind, seen)]]
    boxes[['x1','y1','x2','y2']] = boxes.box.tolist()
    boxes = boxes.drop(columns='box')
    dls = loaders(df.drop(columns='objects'), shapes, dict(objects=ObjectsBlock(kind=CategoryBlock)), objects=boxes,
                  columns=dict(objects=dict(looked_for='seen')), bs=8)
    for family in ('fcos','retinanet'):
        learn = learner(dls, detector(family, 4))
        x,y = dls.valid.one_batch()
        pred = learn.model.eval()(x).map(torch.clone)
        v = learn.loss_func(pred, y)
        unseen = (y.objects.looked_for==0)[:,None].expand_as(pred.objects.logits)
        pred.objects.logits[unseen] += 3
        torch.testing.assert_close(learn.loss_func(pred, y), v)
    with pytest.raises(ValueError, match='only some classes were looked for. Adopt a RetinaNet or an FCOS'):
        learner(dls, detector('fasterrcnn', 4)).fit(1)

def frozen(model):
    "Replace batch norms by frozen ones, as torchvision does in trained detectors"
    for name,m in list(model.backbone.body.named_modules()):
        if not isinstance(m, nn.BatchNorm2d): continue
        parent,_,last = name.rpartition('.')
        new = torchvision.ops.FrozenBatchNorm2d(m.num_features)
        new.running_mean += .1
        setattr(model.backbone.body.get_submodule(parent), last, new)
    return model

@pytest.mark.parametrize('family', FAMILIES)
def test_fine_tune(table, shapes, family):
    "The detector's own parameters form a group that starts frozen, frozen norms stay, and new classes are new layers"
    dls = dls_of(table.iloc[:40], shapes)
    learn = learner(dls, AdoptedDetector(frozen(detector(family, 4)), categories=['circle','square','tree','house']),
                    pretrained=True)
    groups = learn.model.named_groups()
    assert 'objects detector' in groups and 'early trunk' in groups
    assert not any(p.requires_grad for p in groups['objects detector'])
    norms = [m for m in learn.model.modules() if isinstance(m, torchvision.ops.FrozenBatchNorm2d)]
    own = [p.clone() for p in groups['objects detector']]
    learn.fit(1)
    assert all(torch.equal(a, b) for a,b in zip(own, groups['objects detector']))
    learn.fine_tune(1, freeze_epochs=1)
    assert not all(torch.equal(a, b) for a,b in zip(own, groups['objects detector']))
    assert len(norms)==4 and all(torch.equal(m.running_mean, torch.full_like(m.running_mean, .1)) for m in norms)

@pytest.mark.parametrize('cb', [UncertaintyWeighting, GradientBalance, partial(GradientBalance, level='parameters'),
                                TaskMonitor], ids=str)
def test_balancing(table, shapes, cb):
    learn = learner(dls_of(table.iloc[:40], shapes), detector('fasterrcnn', 4))
    before = [p.clone() for p in learn.model.heads['objects'].parameters()]
    learn.fit(1, cbs=cb())
    assert np.isfinite(learn.recorder.values[-1][0])
    moved = [not torch.equal(a, b) for a,b in zip(before, learn.model.heads['objects'].parameters())]
    assert all(moved)
    assert 'objects' in str(learn.task_report(n_batches=1))

@pytest.mark.parametrize('family', FAMILIES)
def test_half_precision(table, shapes, family):
    learn = learner(dls_of(table.iloc[:40], shapes), detector(family, 4), precision='bf16')
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][:2]).all()

def test_depth_of_other_outputs(table, shapes):
    dls = dls_of(table.iloc[:40], shapes)
    learn = learner(dls, detector('retinanet', 4), depth=dict(colour=2), split=1)
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])
    with pytest.raises(ValueError, match='reads all stages'): learner(dls, detector('retinanet', 4), depth=2)
    with pytest.raises(ValueError, match="leave it out of `heads`"):
        learner(dls, detector('retinanet', 4), heads=dict(objects=dict(width=32)))
    with pytest.raises(ValueError, match='multiples of 32'):
        learner(dls_of(table.iloc[:40], shapes, item_tfms=Resize(50)), detector('retinanet', 4)).fit(1)
    only = loaders(table, shapes, dict(kind=CategoryBlock))
    with pytest.raises(ValueError, match='holds objects'): learner(only, detector('retinanet', 4))

# Weights

def test_weights_from_a_file(table, shapes, tmp_path):
    "A constructor with a state dict gives the learner's head its weights. Categories keep the rows of their classes"
    builder = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = builder(weights=None, weights_backbone=None, num_classes=6)
    torch.save(model.state_dict(), tmp_path/'detector.pth')
    dls = dls_of(table.iloc[:40], shapes)
    names = ['__background__','star','circle','square','triangle','tree']
    given = AdoptedDetector(builder, names, weights=tmp_path/'detector.pth')
    learn = learner(dls, given, pretrained=True)
    vocab = list(dls.vocab['objects.kind'])
    own = model.roi_heads.box_predictor
    new = learn.model.heads['objects'].roi.box_predictor
    for i,c in enumerate(vocab):
        torch.testing.assert_close(new.cls_score.weight[i+1], own.cls_score.weight[names.index(c)])
        torch.testing.assert_close(new.bbox_pred.bias[4*i+4:4*i+8], own.bbox_pred.bias[4*names.index(c):][:4])
    direct = learner(dls, builder, weights=tmp_path/'detector.pth', pretrained=True)
    a = direct.model.heads['objects'].neck.state_dict()
    for n,v in model.backbone.fpn.state_dict().items(): torch.testing.assert_close(a[n], v)
    assert direct.model.encoders['image'].pretrained

def test_the_users_detector_stays(table, shapes):
    "Two learners made from one detector share no weights with each other or with it"
    dls = dls_of(table.iloc[:40], shapes)
    model = detector('fcos', 4)
    before = {n: v.clone() for n,v in model.state_dict().items()}
    one,two = learner(dls, model),learner(dls, model)
    one.fit(1)
    assert not {id(p) for p in one.model.parameters()} & {id(p) for p in two.model.parameters()}
    for n,v in model.state_dict().items(): assert torch.equal(before[n], v)
