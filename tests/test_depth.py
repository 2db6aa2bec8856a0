"`depth`, `split` and `after` in every form: the modules that are built and trained, the learner's calls, and messages"
import warnings
import numpy as np, pandas as pd, pytest, torch, torchvision
from copy import deepcopy
from PIL import Image
from fastai.vision.all import *
from fastai.callback.training import BnFreeze
from fastai_multi import *
from fastai_multi.core import flat
from fastai_multi.depth import DepthResults
from fastai_multi.models.multi import split_params

OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock)
BOX = ['x1','y1','x2','y2']

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

def loaders(path, outputs=OUTPUTS, columns={}, **kwargs):
    columns = {**({'box': BOX} if 'box' in outputs else {}), **columns}
    return MultiDataLoaders.from_csv(path, kwargs.pop('csv', 'items.csv'), outputs=outputs, columns=columns or None,
                                     label_delim='|',
                                     **{'image':'file', 'item_tfms':Resize(64), 'bs':16, 'num_workers':0, 'seed':0,
                                        **kwargs})

def cnn(depth=4, **kwargs): return simple_cnn(depth, **{'width':4, 'bn':True, **kwargs})

def learner(dls, arch=None, **kwargs):
    torch.manual_seed(0)
    learn = multi_learner(dls, cnn() if arch is None else arch,
                          **{'text':'bag', 'lr':3e-3, 'pretrained':False, **kwargs})
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def taps(learn): return learn.model.encoders['image']
def the_norms(m): return [o for o in m.modules() if isinstance(o, nn.BatchNorm2d)]

# Every form

forms = {'all': {}, 'int': dict(depth=2), 'one': dict(depth=1), 'dict': dict(depth=dict(box=2, kind=3)),
         'dict of all': dict(depth=dict(kind=3, tags=1, box=2, area=2)), 'apart': dict(split=0), 'split': dict(split=2),
         'int, split': dict(depth=3, split=2), 'int, apart': dict(depth=2, split=0),
         'dict, split': dict(depth=dict(box=2, kind=3), split=1),
         'dict around split': dict(depth=dict(box=1, kind=3, area=2), split=2),
         'dict, apart': dict(depth=dict(box=2), split=0), 'split at the end': dict(split=4),
         'after': dict(after=dict(tags='kind')), 'after two': dict(after=dict(kind='tags', area=['kind','box'])),
         'after, split': dict(after=dict(tags='kind'), split=2),
         'all of it': dict(depth=dict(box=2, kind=3), split=1, after=dict(area='box'),
                           heads=dict(kind=dict(hidden=[16], pool='avg'), tags=[]))}
archs = dict(cnn=cnn, resnet18=models.resnet18)
cases = ([('cnn',f,None) for f in forms] + [('cnn',f,'caption') for f in ('dict, split','all of it')]
         + [('resnet18',f,None) for f in ('int','dict, split')])

def numbers(learn, item): return {n: o for n,o in learn.predict(item)[2].items()}

def same(a, b, atol=1e-4):
    for n in a: torch.testing.assert_close(a[n].float(), b[n].float(), atol=atol, rtol=1e-3)

@pytest.mark.parametrize('arch,form,text', cases)
def test_every_form_does_all_that_a_learner_does(shapes, tmp_path, arch, form, text):
    dls = loaders(shapes, text=text, batch_tfms=Flip())
    arch = cnn() if arch=='cnn' else models.resnet18
    learn = learner(dls, arch, path=tmp_path, **forms[form])
    before = deepcopy(learn.model.state_dict())
    assert 1e-8 < learn.lr_find(num_it=6, show_plot=False).valley < 10
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    learn.fit_one_cycle(1, slice(1e-4, 5e-3))
    learn.fine_tune(1, 5e-3)
    assert np.isfinite([*learn.evaluate().values()]).all()
    moved = [n for n in before if '.absents.' not in n]      # no picture is missing, so its vector gets no gradient
    assert all(not torch.equal(p, before[n]) for n,p in learn.model.named_parameters() if n in moved)
    aug,targs = learn.tta(n=1)
    assert aug.keys()==targs.keys()==tuple(OUTPUTS) and aug.box.shape==targs.box.shape
    row = pd.read_csv(shapes/'items.csv').iloc[0]
    mine = numbers(learn, row)
    res = learn.predict(row)[0]
    assert res.kind in learn.output_parts['kind'].vocab and res.box.shape==(4,)
    learn.export(tmp_path/'l.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'l.pkl')
    same(numbers(again, row), mine)
    tree = learn.tree()
    text = str(learn.summary())
    params,macs = tree.total
    assert params==sum(p.numel() for p in learn.model.parameters()) and macs>0
    assert sum(r.params for r in tree if r.level==0)==params
    assert all(f'head {n}' in text for n in OUTPUTS) and 'new layers' in text
    groups = learn.summary_groups()
    assert groups.parameters.sum()==params and len(groups)==len(learn.opt.param_lists)
    drawn = [t.get_text() for t in plot_model(learn).texts]
    assert all(any(t.startswith(n) for t in drawn) for n in OUTPUTS)
    assert sum(t.startswith('stage') for t in drawn)==sum(r.name.startswith('stage') for r in tree)

@pytest.mark.parametrize('form', forms)
def test_gradients_reach_all_parameters_and_the_lists_say_who_uses_which(shapes, form):
    "Every parameter that is built is used"
    learn = learner(loaders(shapes), **forms[form])
    m = learn.model
    b = learn.dls.train.one_batch()
    m.register_forward_hook(lambda *args: None)    # run the heads one by one, else others get zero gradients
    y = m(b[0])
    by = {}
    for o in OUTPUTS:
        m.zero_grad()
        y[o].float().pow(2).sum().backward(retain_graph=True)
        by[o] = {id(p) for p in m.parameters() if p.grad is not None}
    assert set.union(*by.values())=={id(p) for p in m.parameters()}
    for o in OUTPUTS: assert {id(p) for p in m.owned_parameters(o)}==by[o]-set.union(*(v for n,v in by.items() if n!=o))
    assert {id(p) for p in m.shared_parameters()}=={i for i in set.union(*by.values())
                                                    if sum(i in v for v in by.values())>1}

@pytest.mark.parametrize('form', ['split','apart','dict, split'])
def test_a_split_changes_nothing_before_training(shapes, form):
    "Branches are copies: in evaluation they give the numbers of a shared trunk until the first step"
    kw = forms[form]
    a = learner(loaders(shapes), **kw)
    b = learner(loaders(shapes), **{k: v for k,v in kw.items() if k!='split'})
    x = a.dls.valid.one_batch()[0].as_subclass(Tensor)
    with torch.no_grad():
        for n in OUTPUTS:
            torch.testing.assert_close(taps(a).eval()(x)[n][-1], taps(b).eval()(x)[n][-1], atol=1e-5, rtol=1e-5)

# What is built and what runs

@pytest.mark.parametrize('kw,deepest',
                         [(dict(depth=2), 2), (dict(depth=dict(kind=3, tags=1, box=2, area=2)), 3),
                          (dict(depth=dict(kind=3, tags=1, box=2, area=2), split=1), 3),
                          (dict(depth=dict(kind=1, tags=1, box=2, area=2), split=0), 2)])
def test_nothing_deeper_than_the_deepest_asked_for(shapes, kw, deepest):
    learn = learner(loaders(shapes), models.resnet18, **kw)
    assert not any(f'layer{i}' in n for i in range(deepest+1, 5) for n,_ in learn.model.named_modules())
    built = [s for s in ('layer1','layer2','layer3') if any(s in n for n,_ in learn.model.named_modules())]
    assert built==[f'layer{i+1}' for i in range(deepest)]

def test_one_pass_serves_all_depths(shapes):
    "The shared trunk and each of its stages run once. A branch runs only its own stages"
    def runs(**kw):
        learn = learner(loaders(shapes), **kw)
        seen = []
        for n,m in learn.model.named_modules():
            if isinstance(m, nn.Conv2d) and 'encoders' in n:
                m.register_forward_hook(lambda m, x, y, n=n: seen.append(n))
        learn.model(learn.dls.train.one_batch()[0])
        assert len(seen)==len(set(seen))
        return len(seen)
    assert runs(depth=dict(kind=3, tags=1, box=2, area=2))==3
    assert runs()==4
    assert runs(split=2)==2+4*2
    assert runs(split=2, depth=dict(kind=3, tags=1, box=2, area=2))==2+1
    assert runs(split=0, depth=dict(kind=3, tags=1, box=2, area=2))==3+1+2+2

# Freezing, rates, batch norm

def hand_frozen(train_bn):
    "Which parameters train, by kind of module, if fastai freezes a plain network of two groups"
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4)),
                        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,2)))
    learn = Learner(DataLoaders([], []), net, loss_func=nn.MSELoss(), splitter=lambda m: [params(m[0]), params(m[1])],
                    train_bn=train_bn)
    learn.freeze()
    return dict(conv=net[0][0].weight.requires_grad, norm=net[0][1].weight.requires_grad)

@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('form', ['all','dict','split','apart','dict around split'])
def test_frozen_norms_are_as_fastai_has_them(shapes, form, train_bn):
    learn = learner(loaders(shapes), train_bn=train_bn, **forms[form])
    learn.freeze()
    want = hand_frozen(train_bn)
    for m in taps(learn).modules():
        if isinstance(m, nn.Conv2d): assert m.weight.requires_grad==want['conv']
        if isinstance(m, nn.BatchNorm2d): assert m.weight.requires_grad==m.bias.requires_grad==want['norm']==train_bn
    norms = the_norms(taps(learn))
    was = [(o.weight.detach().clone(), o.running_mean.clone()) for o in norms]
    convs = [o.weight.detach().clone() for o in taps(learn).modules() if isinstance(o, nn.Conv2d)]
    learn.fit(1, 1e-2)
    assert all(torch.equal(a, b.weight)
               for a,b in zip(convs, (o for o in taps(learn).modules() if isinstance(o, nn.Conv2d))))
    assert all(torch.equal(w, o.weight)!=train_bn for (w,_),o in zip(was, norms))
    # statistics follow the data in both cases, as in fastai ...
    assert all(not torch.equal(r, o.running_mean) for (_,r),o in zip(was, norms))
    if not train_bn:    # ... unless fastai's BnFreeze stops them
        was = [o.running_mean.clone() for o in norms]
        learn.fit(1, 1e-2, cbs=BnFreeze)
        assert all(torch.equal(r, o.running_mean) for r,o in zip(was, norms))

def test_freeze_to_and_rates_by_group(shapes):
    learn = learner(loaders(shapes), depth=dict(box=3), split=3)
    assert [*learn.summary_groups().group]==['early trunk','late trunk','branches','new layers']
    weights = lambda: [next(p for p in g if p.ndim>1) for g in learn.opt.param_lists]
    for n,train in ((-1,[0,0,0,1]), (-2,[0,0,1,1]), (-3,[0,1,1,1]), (0,[1,1,1,1])):
        learn.freeze_to(n)
        assert [p.requires_grad for p in weights()]==[bool(t) for t in train]
        assert [t>0 for t in learn.summary_groups().trainable]==[True]*4               # norms train even if frozen
        was = [p.detach().clone() for p in weights()]
        learn.fit(1, 1e-3)
        assert [not torch.equal(a, b) for a,b in zip(was, weights())]==[bool(t) for t in train]
    learn.fit(1, slice(1e-6, 1e-3))
    assert np.allclose(learn.summary_groups().lr, [1e-6,1e-5,1e-4,1e-3])
    assert np.allclose(learn.summary_groups(slice(1e-2)).lr, [1e-3]*3+[1e-2])
    assert np.allclose(learn.summary_groups([1,2,3,4]).lr, [1,2,3,4])

def test_groups_of_every_form_hold_each_parameter_once(shapes):
    for kw in forms.values():
        learn = learner(loaders(shapes, text='caption'), **kw)
        ids = [id(p) for g in split_params(learn.model) for p in g]
        assert len(ids)==len(set(ids))==len(list(learn.model.parameters()))

# Trained weights

@pytest.fixture
def weights(real): return next(real('weights').glob('mobilenet_v2*.pth'))

@pytest.mark.parametrize('kw',
                         [dict(), dict(depth=dict(kind=2, tags=2, box=2, area=4)), dict(split=2, depth=4),
                          dict(split=0, depth=2)],
                         ids=str)
def test_trained_weights_are_in_every_branch(shapes, weights, kw):
    learn = learner(loaders(shapes), models.mobilenet_v2, weights=weights, pretrained=True, **kw)
    sd = torch.load(weights, weights_only=True)
    plain = {tuple(v.shape): [] for v in sd.values()}
    for v in sd.values(): plain[tuple(v.shape)].append(v)
    t = taps(learn)
    assert t.pretrained
    assert t.stats[0]==[0.485,0.456,0.406]
    assert len([f for f in learn.dls.train.after_batch.fs if isinstance(f, Normalize)])==1
    parts = [t.trunk] if t.split else []
    parts += t.branches.values()
    for m in parts:
        for p in m.parameters(): assert any(torch.equal(p, v) for v in plain[tuple(p.shape)])
        assert not any(p.requires_grad for p in m.parameters() if p.ndim>1)            # starts frozen
    convs = [p for n,v in t.branches.items() for p in v.parameters() if p.ndim>1][:1]
    learn.unfreeze()
    learn.fit(1)
    if len(t.branches)>1:
        a,b = [next(p for p in m.parameters() if p.ndim>1) for m in t.branches.values()][:2]
        assert a.shape==b.shape and not torch.equal(a, b)                              # each learns independently

class PILImageRGBA(PILImage): _open_args = {'mode': 'RGBA'}

@pytest.mark.parametrize('split', [None, 0, 2])
@pytest.mark.parametrize('cls,n_in', [(PILImageBW,1), (PILImageRGBA,4)])
def test_other_channels_with_trained_weights(shapes, weights, cls, n_in, split):
    learn = learner(loaders(shapes, img_cls=cls), models.mobilenet_v2, weights=weights, pretrained=True, split=split,
                    depth=3)
    x = learn.dls.train.one_batch()[0]
    assert x.shape[1]==n_in and len(taps(learn).stats[0])==n_in
    w = torch.load(weights, weights_only=True)['features.0.0.weight']
    firsts = [m for m in learn.model.modules()
              if isinstance(m, nn.Conv2d) and m.in_channels==n_in and m.weight.shape[2]==3 and m.groups==1]
    assert len(firsts)==(4 if split==0 else 1)
    for m in firsts:
        torch.testing.assert_close(m.weight,
                                   w.sum(1, keepdim=True) if n_in==1 else torch.cat([w, torch.zeros_like(w[:,:1])], 1))
    learn.fit(1)
    assert np.isfinite(learn.evaluate()['valid_loss'])
    learn.predict(shapes/pd.read_csv(shapes/'items.csv').file[0])

# Heads

def test_options_of_heads(shapes):
    class Mine(nn.Module):
        reads_map = True
        def __init__(self, n_in, n_out):
            super().__init__()
            self.lin = nn.Linear(n_in+16, n_out)
        def forward(self, x, maps): return self.lin(torch.cat([x, maps['image'].amax((2,3))], 1))
    own = nn.Linear(64, 1)
    learn = learner(loaders(shapes),
                    heads=dict(kind=dict(hidden=[32,16], p=0.5, bn=False, pool='max'), tags=dict(hidden=8, pool='avg'),
                               area=own, box=[24]))
    kinds = lambda n: [type(m).__name__ for m in learn.model.heads[n].layers]
    assert kinds('kind')==['Dropout','Linear','ReLU']*2+['Dropout','Linear'] and kinds('tags')[0]=='BatchNorm1d'
    assert kinds('box')==['Linear','ReLU','Linear']
    assert [m.p for m in learn.model.heads['kind'].layers if isinstance(m, nn.Dropout)]==[0.25,0.25,0.5]
    assert [learn.model.heads[n].n_in for n in ('kind','tags')]==[32,32] and learn.model.heads['box'].n_in==64+128
    assert learn.model.heads['area'] is own
    learn.fit(1)
    learn.summary()
    plot_model(learn)
    # the function that builds a head gets both sizes
    learn = learner(loaders(shapes), depth=3, heads=dict(kind=Mine, area=nn.Linear), split=1)
    assert learn.model.heads['kind'].lin.in_features==2*16+16 and learn.model.heads['area'].in_features==2*16
    learn.fit(1)

@pytest.fixture(scope='module')
def masks(tmp_path_factory):
    "Drawn pictures with a mask of the described thing and its centre"
    path = multi_shapes(tmp_path_factory.mktemp('masks')/'shapes', n=60, size=64, seed=1)
    df = pd.read_csv(path/'items.csv')
    (path/'masks').mkdir()
    for i,r in df.iterrows():
        im = np.asarray(Image.open(path/r.file).convert('RGB')).astype(int)
        back = np.median(np.concatenate([im[0], im[-1], im[:,0], im[:,-1]]), 0)
        m = np.abs(im-back).sum(2)>90
        box = np.zeros_like(m)
        box[int(r.y1):int(r.y2)+1,int(r.x1):int(r.x2)+1] = True
        Image.fromarray((m & box).astype(np.uint8)).save(path/'masks'/f'{i}.png')
    df['mask'],df['cx'],df['cy'] = [f'masks/{i}.png' for i in df.index],(df.x1+df.x2)/2,(df.y1+df.y2)/2
    df.to_csv(path/'items.csv', index=False)
    return path

@pytest.mark.parametrize('kw', [{}, dict(depth=dict(mask=3, kind=4)), dict(split=2)], ids=['shared','dict','split'])
def test_masks_end_to_end(masks, tmp_path, kw):
    outs = dict(kind=CategoryBlock, mask=MaskBlock(codes=['ground','shape']))
    learn = learner(loaders(masks, outs), cnn(4, width=8), path=tmp_path, **kw)
    start = learn.evaluate()
    learn.fit_one_cycle(10, 1e-2)           # after six epochs, the IoU is .18 to .49
    res = learn.evaluate()
    assert res['mask_loss']<0.6*start['mask_loss'], (start, res)
    preds,targs = learn.get_preds()
    assert preds.mask.shape==(len(learn.dls.valid_ds),2,64,64) and targs.mask.shape==(len(learn.dls.valid_ds),64,64)
    found = preds.mask.argmax(1)==1
    there = targs.mask==1
    assert (found&there).sum()/(found|there).sum()>0.25                             # a single class gives 0
    learn.show_results(max_n=3)
    learn.dls.show_batch(max_n=3)
    row = pd.read_csv(masks/'items.csv').iloc[0]
    res,dec,probs = learn.predict(row)
    assert dec.mask.shape==(64,64) and set(dec.mask.unique().tolist()) <= {0,1} and probs.mask.shape==(2,64,64)
    torch.testing.assert_close(learn.predict(masks/row.file)[2].mask, probs.mask)
    aug,_ = learn.tta(n=1)
    torch.testing.assert_close(aug.mask, preds.mask)
    learn.export(tmp_path/'m.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        same(numbers(load_learner(tmp_path/'m.pkl'), row), probs)
    assert 'reads all maps' in str(learn.summary()) and plot_model(learn)

def test_a_point(masks):
    learn = learner(loaders(masks, dict(kind=CategoryBlock, eye=PointBlock), dict(eye=['cx','cy'])), depth=dict(eye=2),
                    split=1)
    start = learn.evaluate(0)['eye_loss']                              # the loss of the mean point
    learn.fit_one_cycle(20, 1e-2)
    assert learn.evaluate(0)['eye_loss'] < 0.5*start
    row = pd.read_csv(masks/'items.csv').iloc[0]
    assert learn.predict(row)[0].eye.shape==(1,2)
    learn.show_results(max_n=2)

# Your own networks

class Functions(nn.Module):
    "A network with functions between modules, as many have, and a skip from the stem to the end of `mid`"
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3,8,3,2,1)
        self.norm = nn.BatchNorm2d(8)
        self.mid = nn.Sequential(nn.Conv2d(8,8,3,1,1), nn.BatchNorm2d(8))
        self.top = nn.Conv2d(8,16,3,2,1)
        self.join = nn.ReLU()
        self.fc = nn.Linear(16,10)
    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.join(x+self.mid(F.dropout(x, 0.2, self.training)))
        return self.fc(F.relu(self.top(x)).mean((2,3)))

def sequence():
    return nn.Sequential(OrderedDict(low=nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU()),
                                     mid=nn.Sequential(nn.Conv2d(8,12,3,2,1), nn.ReLU()),
                                     high=nn.Sequential(nn.Conv2d(12,16,3,2,1), nn.ReLU())))

own_nets = dict(sequence=(sequence, ['low','mid','high']),
                named=(lambda: image_encoder(Functions(), stages=['norm','join','top']), ['norm','join','top']))

@pytest.mark.parametrize('kw',
                         [{}, dict(depth=2), dict(depth=dict(box=1, kind=2)), dict(split=1), dict(split=0, depth=2),
                          dict(depth=dict(box=1), split=2, after=dict(tags='kind'))],
                         ids=str)
@pytest.mark.parametrize('net', own_nets)
def test_a_users_network(shapes, tmp_path, net, kw):
    make,stages = own_nets[net]
    learn = learner(loaders(shapes), make(), path=tmp_path, **kw)
    assert taps(learn).stages==stages[:len(taps(learn).stages)]
    was = deepcopy(learn.model.state_dict())
    learn.fine_tune(1, 5e-3)
    assert all(not torch.equal(p, was[n]) for n,p in learn.model.named_parameters() if '.absents.' not in n)
    assert np.isfinite(learn.evaluate()['valid_loss'])
    row = pd.read_csv(shapes/'items.csv').iloc[0]
    mine = numbers(learn, row)
    same(numbers(learn, row), mine, 0)                                                # evaluation is not random
    learn.export(tmp_path/'u.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'u.pkl')
    same(numbers(again, row), mine)
    params,_ = learn.tree().total
    assert params==sum(p.numel() for p in learn.model.parameters()) and learn.summary_groups().parameters.sum()==params
    learn.summary()
    plot_model(learn)

def test_the_users_network_with_names_gives_its_own_numbers(shapes):
    torch.manual_seed(0)
    net = Functions().eval()
    enc = image_encoder(net, stages=['norm','join','top']).eval()
    x = torch.randn(2,3,32,32)
    with torch.no_grad():
        stem = net.norm(net.stem(x))
        join = net.join(F.relu(stem)+net.mid(F.relu(stem)))
        for a,b in zip(enc.maps(x), (stem, join, net.top(join))): torch.testing.assert_close(a, b)
    two = enc.cut(2)
    assert {n.split('.')[-2] for n,_ in two.named_parameters()}.isdisjoint({'top','fc'})
    assert not any('fc' in n for n,_ in enc.named_parameters())

# Messages

wrong = [(dict(depth=5), ValueError,
          '`depth`=5 is beyond PlainCNN|`depth`=5 is beyond this simple_cnn, which has 4 stages: 1: conv1 .4 '
          'channels, stride 2.; 2: conv2'),
         (dict(depth=0), ValueError, 'Choose from 1 to 4, or None for all'),
         (dict(depth=1.5), TypeError, '`depth` must be a whole number of stages or None, not 1.5'),
         (dict(depth=True), TypeError, 'not True'),
         (dict(depth=dict(box=7)), ValueError, '`depth`=7 is beyond this simple_cnn'),
         (dict(depth=dict(bos=2)), KeyError, "Unknown output in `depth` 'bos'. Did you mean 'box'"),
         (dict(depth=dict(box='2')), TypeError, "not '2'"),
         (dict(split=5), ValueError, '`split`=5 is beyond this simple_cnn'),
         (dict(split=-1), ValueError, 'Choose from 0 to 4'),
         (dict(split='no'), TypeError, '`split` must be a whole number'),
         (dict(after=dict(kind='tags', tags='kind')), ValueError, '`after` goes in a circle'),
         (dict(after=dict(kind='kind')), ValueError, "`after` goes in a circle: 'kind' after 'kind'"),
         (dict(after=dict(knd='tags')), KeyError, "Unknown output in `after` 'knd'. Did you mean 'kind'"),
         (dict(after=dict(kind='tag')), KeyError, "Did you mean 'tags'"),
         (dict(heads=dict(kind=dict(pool='mean'))), KeyError, "Unknown pool 'mean'"),
         (dict(heads=dict(kind=dict(drop=1))), KeyError, "Unknown option of the head 'kind' 'drop'"),
         (dict(heads=dict(kind=nn.Linear(3,4))), ValueError, "The head 'kind', Linear, gets 64 features")]

@pytest.mark.parametrize('kw,exc,msg', wrong, ids=lambda o: str(o)[:40] if isinstance(o, dict) else '')
def test_wrong_arguments_say_what_to_do(shapes, kw, exc, msg):
    with pytest.raises(exc, match=msg): learner(loaders(shapes), **kw)

def test_depth_and_split_need_a_picture(shapes):
    dls = loaders(shapes, dict(kind=CategoryBlock, area=RegressionBlock), image=None, text='caption', item_tfms=None)
    for kw in (dict(depth=2), dict(split=1), dict(depth=dict(kind=1))):
        words = "is about the stages of a picture's encoder, and these data have no picture: the inputs are"
        with pytest.raises(ValueError, match=f'`{first(kw)}` {words}'): multi_learner(dls, **kw)
    with pytest.raises(ValueError, match='picture'): depth_finder(dls, simple_cnn, batches=1)

# The finder

def test_the_finder_leaves_no_state_behind_and_repeats_itself(shapes):
    dls = loaders(shapes, batch_tfms=Flip())
    net = cnn()
    tfms = [[*dl.after_batch.fs] for dl in dls.loaders]
    rng = dls.train.rng.getstate()
    torch_rng = torch.get_rng_state()
    np_rng = np.random.get_state()[1].copy()
    state = deepcopy(net.state_dict())
    kw = dict(depths=[2,4], splits=[None,2], batches=3, pretrained=False, lr=5e-3)
    a = depth_finder(dls, net, **kw)
    assert [[*dl.after_batch.fs] for dl in dls.loaders]==tfms and dls.train.rng.getstate()==rng
    assert torch.equal(torch.get_rng_state(), torch_rng) and (np.random.get_state()[1]==np_rng).all()
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())
    b = depth_finder(dls, net, **kw)
    pd.testing.assert_frame_equal(a.runs.drop(columns='ms'), b.runs.drop(columns='ms'))
    assert [*a.runs.depth]==[2,4,4] and a.runs.split.isna().tolist()==[True,True,False]
    assert set(a.suggest())==set(OUTPUTS) and a.agreement.shape==(4,6) and (a.agreement.abs()<=1+1e-5).all().all()
    assert len(a.plot())==5
    # numbers from a file work too
    c = DepthResults(pd.read_csv(io.StringIO(a.runs.to_csv(index=False))), list(OUTPUTS), a.stages, None)
    assert c.suggest(0.2)==a.suggest(0.2) and len(c.plot(by='loss'))==5

def test_the_finder_with_one_plain_target_and_with_what_else_a_learner_takes(shapes):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', outputs=CategoryBlock, columns='kind',
                                    item_tfms=Resize(64), bs=16, seed=0)
    res = depth_finder(dls, partial(simple_cnn, width=4), depths=[1,3], epochs=1, seeds=[0,1])
    assert len(res.runs)==4 and res.agreement is None and res.suggest() in (1,3)
    assert len(res.plot())==2 and res.suggest(by='accuracy') in (1,3) and len(res.plot(by='accuracy'))==2
    dls = loaders(shapes, text='caption')
    res = depth_finder(dls, models.resnet18, depths=[1,2], batches=2, pretrained=False, text='bag',
                       after=dict(tags='kind'), heads=dict(kind=[8]), agreement=0)
    assert res.runs.depth.tolist()==[1,2] and (res.runs.multiply_adds.diff()[1:]>0).all()
    assert res.stages==['conv1..layer1','layer2']

def test_the_finder_puts_everything_back_after_a_crash(shapes):
    dls = loaders(shapes)
    class Broken(nn.Module):
        def forward(self, x):
            if self.training: raise RuntimeError('broken inside')
            return x
    net = nn.Sequential(nn.Conv2d(3,4,3,2,1), nn.Sequential(nn.Conv2d(4,4,3,2,1), Broken()))
    tfms = [[*dl.after_batch.fs] for dl in dls.loaders]
    rng = dls.train.rng.getstate()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match='broken inside'): depth_finder(dls, net, batches=1)
    assert [[*dl.after_batch.fs] for dl in dls.loaders]==tfms
    assert dls.train.rng.getstate()==rng
    assert torch.equal(torch.get_rng_state(), state)

def test_agreement_of_outputs_that_want_the_same(shapes):
    "Two outputs with the same labels agree fully at every depth"
    dls = loaders(shapes, dict(a=CategoryBlock, b=CategoryBlock), dict(a='kind', b='kind'))
    learn = learner(dls, heads=dict(a=dict(hidden=[], p=0, bn=False), b=dict(hidden=[], p=0, bn=False)))
    torch.nn.init.normal_(learn.model.heads['a'].layers[-1].weight)     # a zero head gives no gradient
    learn.model.heads['b'].load_state_dict(learn.model.heads['a'].state_dict())
    mode = [m.training for m in learn.model.modules()]
    was = deepcopy(learn.model.state_dict())
    c = stage_agreement(learn, 2)
    assert c.shape==(4,1) and np.allclose(c, 1, atol=1e-4)
    assert [m.training for m in learn.model.modules()]==mode
    assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
