"""Situations in which tests once missed faults: pictures of different and non-square sizes, padding other than 0,
networks with their own statistics, item weights under mixing, validation data, the second epoch, numbers that no two
items share, and every argument of a public function, changed once with a measured effect"""
import inspect, math
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from matplotlib import pyplot as plt
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.targets import item_weights, mixture
from fastai_multi.metrics import metric_direction
from fastai_multi.device import Compiling, DevicePrecision
from fastai_multi.rowmetrics import box_iou, point_distance
from fastai_multi.callback.weights import step_weights

SIZES = [(40,20), (20,40), (30,30), (24,36), (50,18), (18,26)]
PRIMES = [2.,3.,5.,7.,11.,13.,17.,19.,23.,29.,31.,37.]

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "Twelve pictures of six sizes. No two items share a number, a caption length or a box"
    folder = tmp_path_factory.mktemp('sizes')
    rng = np.random.default_rng(3)
    rows = []
    for i,p in enumerate(PRIMES):
        w,h = SIZES[i%6]
        Image.fromarray(rng.integers(0, 256, (h,w,3), dtype=np.uint8)).save(folder/f'{i}.png')
        words = ['big','red','old','car'][:1+i%4]
        rows.append(dict(file=f'{i}.png', caption=' '.join(words), kind='abc'[i%3], tags='|'.join('xyz'[:1+i%3]),
                         price=p, x1=1+i%3, y1=2+i%2, x2=9+i%5, y2=10+i%4,
                         weight=1+i/4, vec=p/10, is_valid=i in (1,3,8,10)))
    return folder,pd.DataFrame(rows)

BLOCKS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, price=RegressionBlock, box=BBoxBlock)

def loaders(table, outputs=None, **kwargs):
    folder,df = table
    outputs = BLOCKS if outputs is None else outputs
    kw = dict(image='file', outputs=outputs, label_delim='|', valid_col='is_valid', item_tfms=Resize(16, 'squish'),
              bs=4, num_workers=0, device='cpu')
    if isinstance(outputs, dict) and 'box' in outputs: kw['columns'] = dict(box=['x1','y1','x2','y2'])
    if kwargs.get('valid_pct') is not None: kw.pop('valid_col')
    return MultiDataLoaders.from_df(df, folder, **{**kw, **kwargs})

def learner(dls, arch=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    if arch is None: arch = simple_cnn(2, 4)
    learn = multi_learner(dls, arch, **{**dict(pretrained=False), **kwargs})
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    return learn

def quiet_fit(learn, n=1, lr=1e-2, **kwargs):
    torch.manual_seed(0)
    with learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn

# Pictures of different and non-square sizes

def window(size, shown, method):
    "The corner and the size of the part of a picture that validation shows, computed by hand"
    w,h = size
    if method=='squish': return 0,0,w,h
    pick = max if method=='pad' else min
    m = pick(w/shown[0], h/shown[1])
    cw,ch = int(m*shown[0]),int(m*shown[1])
    return int((w-cw)/2),int((h-ch)/2),cw,ch

@pytest.mark.parametrize('method', ['squish','crop','pad'])
def test_each_box_returns_to_the_pixels_of_its_own_picture(table, method):
    folder,df = table
    dls = loaders(table, dict(box=BBoxBlock), item_tfms=Resize((12,20), method))    # 12 high, 20 wide
    learn = learner(dls)
    preds = learn.get_preds(dl=dls.test_dl(df))[0].box
    table_ = learn.predict_df(df)
    for i,(pred,found) in enumerate(zip(preds, table_.box)):
        x,y,w,h = window(SIZES[i%6], (20,12), method)
        x1,y1,x2,y2 = ((pred+1)/2*tensor([w,h,w,h])+tensor([x,y,x,y])).tolist()
        width,height = SIZES[i%6]
        expected = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
        assert np.allclose(found, expected, atol=.02), (i, found, expected)
        assert np.allclose(learn.predict(df.iloc[i])[0].box, found, atol=.02)

def test_a_rectangle_of_cutmix_is_as_wide_as_the_picture_is(table):
    "If pictures are 4 times as wide as high, so is the rectangle, and its area sets the blend of the labels"
    dls = loaders(table, dict(price=RegressionBlock), item_tfms=Resize((16,64), 'squish'), bs=8)
    seen = []
    class Before(Callback):
        order = -5
        run_valid = False
        def before_batch(self): self.learn.before = (self.x if isinstance(self.x, Tensor) else self.x[0]).clone()
    class After(Callback):
        order = 50
        run_valid = False
        def before_batch(self):
            x = self.x if isinstance(self.x, Tensor) else self.x[0]
            changed = (x!=self.learn.before).any(0).any(0)    # h,w: where any item differs
            _,share = mixture(self.yb)
            ys,xs = torch.where(changed)
            if not len(ys): return
            w,h = int(xs.max()-xs.min()+1),int(ys.max()-ys.min()+1)
            seen.append((w, h, float(share[0]), self.learn.cut.rect))
    learn = learner(dls)
    cut = MultiCutMix()
    learn.cut = cut
    for s in range(6):
        torch.manual_seed(s)
        with learn.no_logging(): learn.fit(1, 1e-3, cbs=[Before(), cut, After()])
    assert len(seen)>=3
    for w,h,share,(left,right,top,bottom) in seen:
        assert w==round(right*64)-round(left*64) and h==round(bottom*16)-round(top*16)
        assert share==pytest.approx(1-w*h/(64*16), abs=1e-4)
    inside = [(w,h) for w,h,_,(l,r,t,b) in seen if l>0 and r<1 and t>0 and b<1]
    for w,h in inside: assert abs(w-4*h)<=8

# Padding other than 0

def test_texts_are_padded_with_the_blocks_number_everywhere(table):
    _,df = table
    vocab = ['big','red','xxunk','old','car','xxpad']
    dls = loaders(table, dict(price=RegressionBlock), image=None, text='caption', item_tfms=None,
                  text_block=PlainTextBlock(vocab=vocab, max_len=3))
    assert describe(dls).inputs['text'].pad_id==5
    for dl in (dls.valid, dls.train.new(shuffle=False, drop_last=False), dls.test_dl(df)):
        rows = dl.items.caption.tolist()
        for b in dl:
            ids = b[0] if isinstance(b[0], Tensor) else b[0].text
            for row in ids.tolist():
                words = rows.pop(0).split()[:3]                  # cut at the end, not at the front
                assert row==[vocab.index(w) for w in words]+[5]*(len(row)-len(words))

@pytest.mark.parametrize('kind', ['bag','lstm'])
def test_padding_does_not_change_what_a_text_says(kind):
    torch.manual_seed(0)
    enc = text_encoder(kind, 9, pad_id=5).eval()
    ids = tensor([[1,2,3]])
    padded = tensor([[1,2,3,5,5,5],[4,4,4,4,4,6]])
    zeros = tensor([[1,2,3,0,0,0],[4,4,4,4,4,6]])
    with torch.no_grad():
        assert torch.allclose(enc(ids)[0], enc(padded)[0], atol=1e-5)
        assert not torch.allclose(enc(ids)[0], enc(zeros)[0], atol=1e-3)

# Networks with their own statistics

def test_a_networks_statistics_normalise_training_and_validation_alike(table):
    mean,std = [.2,.4,.6],[.1,.5,.25]
    folder,df = table
    plain = loaders(table, dict(price=RegressionBlock))
    expected = [dl.new(shuffle=False, drop_last=False).one_batch()[0] for dl in plain.loaders]
    dls = loaders(table, dict(price=RegressionBlock))
    enc = image_encoder(simple_cnn(2, 4))
    enc.stats = (mean, std)
    learner(dls, enc)
    for dl,x in zip(dls.loaders, expected):
        found = dl.new(shuffle=False, drop_last=False).one_batch()[0]
        assert torch.allclose(found, (x-tensor(mean)[:,None,None])/tensor(std)[:,None,None], atol=1e-4)
    dls = loaders(table, dict(price=RegressionBlock))
    learner(dls, enc, normalize=False)
    assert torch.allclose(dls.valid.one_batch()[0], expected[1])

# Item weights under mixing

def test_a_blended_loss_counts_each_item_by_its_own_weight(table):
    "MixUp with item weights: the sum of w_i*s_i*l(p_i,y_i) + w_j*(1-s_i)*l(p_i,y_j), over the sum of the weights"
    dls = loaders(table, dict(price=RegressionBlock, kind=CategoryBlock), weight='weight', bs=8)
    learn = learner(dls)
    seen = []
    class Watch(Callback):
        order = 60
        run_valid = False
        def after_loss(self):
            y,(other,share) = self.yb[0],mixture(self.yb)
            w,v = item_weights(self.yb),item_weights((other,))
            p,q = self.pred.price.reshape(-1),self.pred.kind
            own = (p-y.price.reshape(-1))**2*w*share
            partner = (p-other.price.reshape(-1))**2*v*(1-share)
            price = (own+partner).sum()/(w*share+v*(1-share)).sum()
            seen.append((float(self.loss_func.losses['price']), float(price)))
    quiet_fit(learn, cbs=[MultiMixUp(), Watch()])
    assert seen
    for found,expected in seen: assert found==pytest.approx(expected, rel=1e-4)

# Validation data as much as training data

def test_validation_is_measured_in_the_units_of_the_training_data(table):
    "The units agree in our form and in fastai's flat form"
    folder,df = table
    price = dict(zip(df.file, df.price))
    flat = DataBlock((ImageBlock, RegressionBlock), get_y=lambda f: price[f.name], item_tfms=Resize(16, 'squish'),
                     get_items=lambda p: [folder/f for f in df.file], splitter=IndexSplitter(df.index[df.is_valid]))
    flat_dls = flat.dataloaders(folder, bs=4, num_workers=0, device='cpu')
    for dls in (loaders(table, dict(price=RegressionBlock)), flat_dls):
        learn = learner(dls)
        train = df[~df.is_valid].price
        valid = df[df.is_valid].price.to_numpy()
        raw = learn.get_preds()[0]
        raw = raw if isinstance(raw, Tensor) else raw[0]
        said = raw.reshape(-1).numpy()*train.std(ddof=0)+train.mean()
        found = learn.evaluate()
        mae = found[[k for k in found if k.endswith('mae')][0]]
        assert mae==pytest.approx(abs(said-valid).mean(), rel=1e-4)
        loss = (((said-valid)/train.std(ddof=0))**2).mean()
        assert found['valid_loss']==pytest.approx(loss, rel=1e-3)

# The second epoch

def test_the_columns_of_the_second_epoch_are_of_the_second_epoch(table):
    learn = learner(loaders(table))
    rows = []
    class Keep(Callback):
        order = 90
        def after_epoch(self):
            names = ['valid_loss', *[m.name for m in self.learn.metrics]]
            rows.append(dict(zip(names, self.recorder.values[-1][1:])))
    quiet_fit(learn, 2, cbs=Keep())
    found = learn.evaluate()
    assert rows[0]!=rows[1]
    for n,v in rows[1].items(): assert v==pytest.approx(found[n], rel=1e-3, abs=1e-5), n

def test_weights_of_the_third_epoch_come_from_the_two_before(table):
    "Dynamic weight average computes the weights of epoch 3 from the losses of epochs 1 and 2, as checked by hand"
    learn = learner(loaders(table, dict(kind=CategoryBlock, price=RegressionBlock), bs=8))
    cb = DynamicWeightAverage(temperature=1.5)
    means,weights = [],[]
    class Watch(Callback):
        order = 70
        run_valid = False
        def before_train(self): self.sums = []
        def after_loss(self):
            self.sums.append([float(v) for v in self.loss_func.losses.values()])
            weights.append(step_weights(self.learn).tolist())
        def after_train(self): means.append(np.mean(self.sums, 0))
    quiet_fit(learn, 3, 5e-2, cbs=[cb, Watch()])
    ratio = means[1]/means[0]/1.5
    expected = 2*np.exp(ratio)/np.exp(ratio).sum()
    start = np.array(weights[0])    # the scales of the losses: the callback's weights are equal for two epochs
    assert np.allclose(weights[1]/start, 1) and np.allclose(weights[2]/start, expected, rtol=1e-3)
    assert abs(expected[0]-expected[1])>1e-3

def test_the_output_that_learns_more_slowly_gets_more_from_gradnorm():
    cb = GradNorm(alpha=1.)
    w = torch.ones(2)
    norms = tensor([3.,3.])
    ok = torch.ones(2, dtype=torch.bool)
    g = cb.grad_w(w, norms, tensor([.9,.3]), ok)       # 90 % of the first loss is left, 30 % of the second
    assert g.tolist()==[-3.,3.]                        # descent gives the first more weight, the second less
    assert cb.grad_w(w, tensor([1.,5.]), tensor([.5,.5]), ok).tolist()==[-1.,5.]

# Numbers that no two items share

def test_metrics_of_single_rows_by_hand():
    p,t = tensor([[.1,.2]]),tensor([[.4,.6]])
    assert float(point_distance(p[:,None], t[:,None]))==pytest.approx(.25)
    boxes = tensor([[-.5,-.5,.5,0.]]),tensor([[0.,-1.,1.,.25]])
    assert float(box_iou(*boxes))==pytest.approx((.5*.5)/(.5*1+1.25*1-.25))
    scores = tensor([[.9,-.2,.3],[-.1,2.,-3.]])
    truth = tensor([[1.,1.,0.],[0.,1.,0.]])
    assert float(f1_multi(scores.sigmoid(), truth))==pytest.approx(2*2/(2*2+1+1))
    logits = tensor([[[[2.,0.,0.]],[[0.,1.,3.]]]])       # 1,2 classes,1,3
    assert float(mask_accuracy(logits, tensor([[[0,1,0]]])))==pytest.approx(2/3)

def test_every_usual_metric_has_its_direction():
    for m in (accuracy, f1_multi, mask_accuracy, box_iou, F1Score(), RocAuc(), R2Score()):
        assert metric_direction(m)=='max'
    for m in (mae, mse, rmse, error_rate, point_distance, Perplexity()): assert metric_direction(m)=='min'

def test_balanced_weights_are_those_of_the_training_rows(table):
    _,df = table
    df = df.assign(kind=list('aacaabbcabca'))
    dls = loaders((table[0], df), dict(price=RegressionBlock, kind=CategoryBlock))
    n = df[~df.is_valid].kind.value_counts()
    learn = learner(dls, class_weights=dict(kind='balanced'))
    expected = [n.sum()/(3*n[c]) for c in 'abc']
    assert learn.class_weights['kind'].tolist()==pytest.approx(expected)
    assert dls.train.values('price').numel()==len(df[~df.is_valid])

def test_a_lone_plain_target_keeps_fastais_columns(table):
    learn = learner(loaders(table, CategoryBlock, columns='kind'))
    quiet_fit(learn)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','time']

def test_gradients_of_all_heads_add_up_to_the_plain_ones(table):
    "`GradientBalance('sum')` equals a plain backward pass, also with heads that read the map"
    pytest.importorskip('torchjd')
    dls = loaders(table, bs=8)
    grads = []
    for cbs in ([], [GradientBalance('sum')], [GradientBalance('sum', level='parameters')]):
        learn = learner(dls)
        for m in learn.model.modules():
            if isinstance(m, nn.Dropout): m.p = 0.
        for p in learn.model.parameters():                  # a new head answers its prior: zeros pass no gradient
            if not p.any(): nn.init.normal_(p, std=.1)
        class Keep(Callback):
            def before_step(self):
                grads.append([p.grad.clone() for p in self.learn.model.parameters() if p.grad is not None])
                raise CancelFitException()
        quiet_fit(learn, cbs=[*cbs, Keep()])
    for other in grads[1:]:
        assert len(other)==len(grads[0])
        for a,b in zip(grads[0], other): assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)

# Every argument of a public function changed once

def arguments_of(f, *leave_out):
    "The names of a function's arguments"
    ps = inspect.signature(f).parameters.values()
    return {p.name for p in ps if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}-{'self', *leave_out}

def covers(f, tests, *leave_out):
    "Check that every argument has a test, so that you cannot add one without a test"
    missing = arguments_of(f, *leave_out)-set(tests)
    assert not missing, f'{f.__name__}: no test for {sorted(missing)}'

def test_every_argument_of_a_numericaliser():
    texts = ['a b b','b c c','d d d e']
    def words(s, **kwargs):
        num = Numericaliser(**kwargs)
        num.setup(texts)
        return [num.vocab[i] for i in num.encode(s).tolist()]
    assert words('a b c d e')==['xxunk','b','c','d','xxunk']
    def shared(is_shared):
        "The words of a second column, in its own row and in that of the first column"
        num = Numericaliser(min_freq=1, shared=is_shared)
        for column in (['b b'], ['z z']): num.see(column)
        num.setup(['z z'])
        return [num.vocab[i] for i in num.encode('z b').tolist()]
    tests = dict(tok=lambda: words('a b', tok=lambda s: list(s), min_freq=1)==['a',' ','b'],
                 vocab=lambda: words('a b', vocab=['a'])==['a','xxunk'],
                 max_vocab=lambda: words('b c d', max_vocab=2)==['b','xxunk','d'],
                 min_freq=lambda: words('a b c d e', min_freq=1)==list('abcde'),
                 max_len=lambda: words('b c d', max_len=2)==['b','c'],
                 shared=lambda: shared(True)==['z','b'] and shared(False)==['z','xxunk'])
    covers(Numericaliser, tests)
    for n,f in tests.items(): assert f(), n

def test_every_argument_of_from_df(table):
    folder,df = table
    price = dict(price=RegressionBlock)
    def rows(dls): return dls.train.items.file.tolist(),dls.valid.items.file.tolist()
    def made(**kwargs): return loaders(table, price, **kwargs)
    def x(**kwargs): return made(**kwargs).one_batch()[0]
    def words(**kwargs):
        return describe(made(image=None, text='caption', item_tfms=None, **kwargs)).inputs['text'].vocab
    renamed = folder,df.rename(columns=dict(price='cost'))
    short = folder,df.assign(file=[f[:-4] for f in df.file])
    inner = folder.parent,df
    fixed = rows(loaders(table, price, valid_pct=.25, seed=5))
    tests = dict(
        df=lambda: len(loaders((folder, df[:9]), price).train.items)==6,
        path=lambda: loaders(table, price).path==folder,
        image=lambda: loaders(table, price).one_batch()[0].shape==(4,3,16,16),
        text=lambda: 'big' in words(),
        features=lambda: x(image=None, features=['vec','weight'], item_tfms=None).shape==(4,2),
        outputs=lambda: list(describe(loaders(table)).outputs)==list(BLOCKS),
        columns=lambda: list(describe(loaders(renamed, price, columns=dict(price='cost'))).outputs)==['price'],
        label_delim=lambda: list(describe(loaders((folder, df.assign(tags=df.tags.str.replace('|', ';'))),
                                 dict(tags=MultiCategoryBlock), label_delim=';')).outputs['tags'].vocab)==['x','y','z'],
        weight=lambda: made(weight='weight').valid.one_batch()[1].item_weight.flatten().tolist()==[1.25,1.75,3.,3.5],
        folder=lambda: loaders(inner, price, folder=folder.name).one_batch()[0].shape==(4,3,16,16),
        suff=lambda: loaders(short, price, suff='.png').one_batch()[0].shape==(4,3,16,16),
        valid_pct=lambda: len(rows(loaders(table, price, valid_pct=.25))[1])==3,
        seed=lambda: rows(made(valid_pct=.25, seed=5))==fixed!=rows(made(valid_pct=.25, seed=6)),
        valid_col=lambda: rows(loaders(table, price))[1]==df[df.is_valid].file.tolist(),
        valid_value=lambda: rows(made(valid_col='kind', valid_value=['a','b']))[0]==df[df.kind=='c'].file.tolist(),
        item_tfms=lambda: loaders(table, price, item_tfms=Resize((8,10))).one_batch()[0].shape==(4,3,8,10),
        batch_tfms=lambda: x(batch_tfms=Normalize.from_stats([0.]*3, [.5]*3, cuda=False)).max()>1.5,
        img_cls=lambda: loaders(table, price, img_cls=PILImageBW).one_batch()[0].shape==(4,1,16,16),
        text_block=lambda: len(words(text_block=PlainTextBlock(max_vocab=2)))==4,
        bs=lambda: loaders(table, price, bs=3).one_batch()[0].shape[0]==3,
        val_bs=lambda: loaders(table, price, val_bs=2).valid.one_batch()[0].shape[0]==2,
        shuffle=lambda: not loaders(table, price, shuffle=False).train.shuffle,
        device=lambda: loaders(table, price, device=torch.device('cpu')).device==torch.device('cpu'))
    for n,f in tests.items(): assert f(), n

def test_every_argument_of_simple_cnn():
    x = torch.randn(2,3,32,32)
    def shape(net, x=x): return tuple(net(x).shape)
    tests = dict(depth=lambda: shape(simple_cnn(2, 4))==(2,8,8,8), width=lambda: shape(simple_cnn(1, 6))==(2,6,16,16),
                 n_in=lambda: shape(simple_cnn(1, 4, n_in=1), x[:,:1])==(2,4,16,16),
                 widths=lambda: shape(simple_cnn(widths=[5,7]))==(2,7,8,8),
                 n_out=lambda: shape(simple_cnn(1, 4, n_out=9))==(2,9),
                 grid=lambda: simple_cnn(1, 4, n_out=9, grid=3).classifier[-1].in_features==36,
                 ks=lambda: first(simple_cnn(1, ks=5).parameters()).shape[2:]==(5,5),
                 bn=lambda: any(isinstance(m, nn.BatchNorm2d) for m in simple_cnn(1, bn=True).modules()),
                 pool=lambda: shape(simple_cnn(2, 4, pool=False))==(2,8,32,32))
    covers(simple_cnn, tests)
    for n,f in tests.items(): assert f(), n

def test_every_argument_of_box_loss():
    p,t = tensor([[-.5,-.4,.2,.6],[0.,0.,.5,.7]]),tensor([[-.4,-.6,.3,.5],[-.2,.1,.4,.4]])
    d = (p-t).abs()
    smooth = torch.where(d<.1, d*d/.2, d-.05).mean(1)
    wide = torch.where(d<.5, d*d, d-.25).mean(1)
    overlap = BoxLoss(l1=0., reduction='none')(p, t)
    tests = dict(l1=lambda: torch.allclose(BoxLoss(l1=3., giou=0.)(p, t), 3*smooth.mean(), atol=1e-5),
                 giou=lambda: torch.allclose(BoxLoss(l1=0., giou=2.)(p, t), 2*overlap.mean(), atol=1e-5),
                 beta=lambda: torch.allclose(BoxLoss(giou=0., beta=.5)(p, t), wide.mean(), atol=1e-5),
                 reduction=lambda: torch.allclose(BoxLoss(giou=0., reduction='none')(p, t), smooth, atol=1e-5))
    covers(BoxLoss, tests)
    for n,f in tests.items(): assert f(), n

def test_every_argument_of_multi_shapes(tmp_path):
    one = multi_shapes(tmp_path/'one', n=6, size=32, seed=1)
    df = pd.read_csv(one/'items.csv')
    def drawn(name, **kwargs): return multi_shapes(tmp_path/name, **{**dict(n=6, size=32, seed=1), **kwargs})
    def other(name, **kwargs): return pd.read_csv(drawn(name, **kwargs)/'items.csv')
    again = other('again')
    tests = dict(path=lambda: one==tmp_path/'one', n=lambda: len(other('n', n=9))==9,
                 size=lambda: Image.open(first(get_image_files(drawn('size', size=48)))).size==(48,48),
                 seed=lambda: again.equals(df) and not other('seed', seed=2).equals(df),
                 missing=lambda: other('missing', n=40, missing=.5).isna().any().any() and not df.isna().any().any(),
                 masks=lambda: list(other('masks', masks=True).columns)==[*df.columns, 'mask'])
    covers(multi_shapes, tests)
    for n,f in tests.items(): assert f(), n

def test_every_argument_of_multi_learner(table, tmp_path):
    dls = loaders(table)
    file = tmp_path/'resnet18.pth'
    torch.save(resnet18().state_dict(), file)
    def resnet(**kwargs): return learner(loaders(table), resnet18, **{**dict(weights=file), **kwargs})
    def first_filters(learn): return first(p for p in learn.model.parameters() if p.ndim==4)
    def normalized(learn): return any(isinstance(t, Normalize) for t in learn.dls.train.after_batch.fs)
    def is_frozen(learn): return not all(p.requires_grad for p in learn.model.parameters())
    def drops(learn): return any(isinstance(cb, ModalityDropout) for cb in learn.cbs)
    with_weights = resnet()
    both = loaders(table, text='caption', text_block=PlainTextBlock(min_freq=1))
    def n_params(learn): return sum(p.numel() for p in learn.model.parameters())
    def cnn(): return simple_cnn(3, 4)
    base = n_params(learner(dls, cnn()))
    base2 = n_params(learner(both, cnn()))
    l1 = nn.L1Loss()
    heavy = learner(dls, cnn(), loss_weights=dict(price=3.)).evaluate()
    usual = learner(dls, cnn())
    plain = usual.evaluate()
    scale = usual.loss_func.scales.get('price', 1.)
    more = heavy['valid_loss']-plain['valid_loss']
    folder,df = table
    pair = loaders((folder, df.assign(back=df.file)), image=['file','back'])
    def has(kind, **kwargs): return any(isinstance(cb, kind) for cb in learner(dls, cnn(), **kwargs).cbs)
    def in_order(**kwargs):
        learn = learner(dls, cnn(), **kwargs)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        weight = [p for p in learn.model.parameters() if p.ndim==4][1]
        return weight.is_contiguous(memory_format=torch.channels_last)
    tests = dict(
        dls=lambda: learner(dls).dls is dls or learner(dls).dls.train is dls.train,
        arch=lambda: n_params(learner(dls, simple_cnn(3, 8)))>base,
        depth=lambda: n_params(learner(dls, cnn(), depth=1))<base,
        split=lambda: n_params(learner(dls, cnn(), split=1))>base,
        text=lambda: n_params(learner(both, cnn(), text='lstm'))!=base2,
        fusion=lambda: any(isinstance(m, Sum) for m in learner(both, cnn(), fusion=Sum).model.modules()),
        neck=lambda: n_params(learner(both, cnn(), neck=16))<base2,
        heads=lambda: n_params(learner(dls, cnn(), heads=dict(kind=[50])))!=base,
        after=lambda: n_params(learner(dls, cnn(), after=dict(kind='price')))!=base,
        loss_func=lambda: loss_of(learner(dls, cnn(), loss_func=dict(price=l1)), 'price')!=plain['price_loss'],
        loss_weights=lambda: more==pytest.approx(2*scale*plain['price_loss'], rel=1e-3),
        class_weights=lambda: loss_of(learner(dls, cnn(), class_weights={'kind': [1,5,1]}), 'kind')!=plain['kind_loss'],
        metrics=lambda: 'kind_error_rate' in learner(dls, cnn(), metrics=dict(kind=error_rate)).evaluate(),
        label_smoothing=lambda: loss_of(learner(dls, cnn(), label_smoothing=.2), 'kind')!=plain['kind_loss'],
        normalize=lambda: normalized(with_weights) and not normalized(resnet(normalize=False)),
        pretrained=lambda: is_frozen(with_weights) and not is_frozen(resnet(weights=None, pretrained=False)),
        weights=lambda: torch.equal(first_filters(with_weights), torch.load(file)['conv1.weight']),
        modality_dropout=lambda: drops(learner(both, cnn(), modality_dropout=.2)) and not drops(usual),
        share=lambda: n_params(learner(pair, cnn, share=True))<n_params(learner(pair, cnn)),
        precision=lambda: has(DevicePrecision, precision='bf16') and not has(DevicePrecision),
        channels_last=lambda: in_order(channels_last=True) and not in_order(),
        compile=lambda: has(Compiling, compile='eager') and not has(Compiling),
        checkpoint=lambda: has(GradientCheckpointing, checkpoint=True) and not has(GradientCheckpointing))
    covers(multi_learner, tests)
    for n,f in tests.items(): assert f(), n

class Sum(nn.Module):
    "A custom fusion"
    def __init__(self, sizes):
        super().__init__()
        self.maps = nn.ModuleList(nn.LazyLinear(8) for _ in sizes)
        self.n_features = 8
    def forward(self, feats): return sum(m(f) for m,f in zip(self.maps, feats.values()))

def loss_of(learn, name): return learn.evaluate()[f'{name}_loss']

def test_every_argument_of_get_preds(table):
    learn = learner(loaders(table))
    _,df = table
    n_train,n_valid = int((~df.is_valid).sum()),int(df.is_valid.sum())
    def rows(res): return len(res[0].kind)
    plain = learn.get_preds()
    halves = learn.get_preds(act=dict(price=lambda p: p*0+.5))[0]
    order = learn.get_preds(dl=learn.dls.valid.new(shuffle=True), reorder=True)[0].price
    seen = []
    class Watch(Callback):
        def after_pred(self): seen.append(1)
    learn.get_preds(cbs=Watch())
    ends = []
    class Ends(Callback):
        def after_epoch(self): ends.append(1)
    learn.get_preds(cbs=Ends(), inner=True)
    n_inner = len(ends)
    learn.get_preds(cbs=Ends())
    losses = learn.get_preds(with_loss=True)[-1]
    loss = learn.evaluate()['valid_loss']
    tests = dict(ds_idx=lambda: rows(learn.get_preds(0))==n_train-n_train%4 or rows(learn.get_preds(0))==n_train,
                 dl=lambda: rows(learn.get_preds(dl=learn.dls.test_dl(df)))==12,
                 with_input=lambda: learn.get_preds(with_input=True)[0].shape==(n_valid,3,16,16),
                 with_decoded=lambda: torch.equal(learn.get_preds(with_decoded=True)[2].kind, plain[0].kind.argmax(-1)),
                 with_loss=lambda: len(losses)==n_valid and float(losses.mean())==pytest.approx(loss, rel=1e-2),
                 act=lambda: bool((halves.price==.5).all()) and torch.equal(halves.kind, plain[0].kind),
                 inner=lambda: (n_inner, len(ends))==(0, 1), reorder=lambda: torch.allclose(order, plain[0].price), cbs=lambda: len(seen)>0)
    covers(learn.get_preds, tests)
    for n,f in tests.items(): assert f(), n

def test_every_argument_of_the_grid(table):
    dls = loaders(table, text='caption', text_block=PlainTextBlock(min_freq=1))
    learn = learner(dls)
    def grid(f=None, **kwargs):
        plt.close('all')
        (f or dls.valid.show_batch)(**kwargs)
        fig = plt.gcf()
        axes = [ax for ax in fig.axes if ax.images or ax.texts or ax.get_title()]
        return fig,len(fig.axes),len(axes)
    assert grid(max_n=2)[2]<grid(max_n=4)[2]
    assert tuple(grid(max_n=2, figsize=(7,3))[0].get_size_inches())==(7,3)
    spec = grid(max_n=4, nrows=4, ncols=1)[0].axes[0].get_subplotspec().get_gridspec()
    assert (spec.nrows,spec.ncols)[0]>=4
    assert tuple(grid(learn.show_results, max_n=2, figsize=(8,5))[0].get_size_inches())==(8,5)
    plt.close('all')

def test_more_batches_than_there_are_do_not_dilute_an_agreement(table):
    _,df = table
    df = df.assign(twin=df.price)
    dls = loaders((table[0], df), dict(price=RegressionBlock, twin=RegressionBlock))
    learn = learner(dls, simple_cnn(3, 4))
    for batches in (2, 4, 8):
        found = stage_agreement(learn, batches=batches)
        values = found.select_dtypes('number').to_numpy()
        assert np.isfinite(values).all()
    assert len(dls.train)==2
