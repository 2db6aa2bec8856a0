"""Every fusion by name in a learner of a picture and a text: it trains, predicts with a missing input, is traced, and
loads again"""
import pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import untyped
from fastai_multi.models.awdlstm import AWDLSTMEncoder
from fastai_multi.callback.late import InputLosses
from fastai_multi.models.fusion import LateFusion, fusions
import fastai_multi.models.tokens    # defines two fusions

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope='module')
def loaders(shapes):
    return MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', text='caption', seed=0, bs=16, num_workers=0,
                                     outputs=dict(colour=CategoryBlock, area=RegressionBlock), item_tfms=Resize(32))

@pytest.mark.parametrize('name', fusions)
def test_a_learner_with_each_fusion(loaders, shapes, name, tmp_path):
    set_seed(0)
    learn = multi_learner(loaders, simple_cnn(2, width=4), fusion=name)
    start = learn.validate(0)[0]
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 1e-3)
    assert learn.validate(0)[0]<start
    picture = shapes/'images/00000.jpg'
    for item in ((picture, 'something red'), (picture, None), (None, 'something red')):
        answer = learn.predict(item)[0]
        assert answer.colour in loaders.train.named_parts()[1]['colour'].vocab
        assert answer.area==answer.area
    learn.export(tmp_path/'model.pkl')
    again = load_learner(tmp_path/'model.pkl').predict((picture, 'something red'))
    assert torch.allclose(again[2].colour, learn.predict((picture, 'something red'))[2].colour, atol=1e-5)

@pytest.mark.parametrize('name', fusions)
def test_each_fusion_is_traced_whole(loaders, name):
    learn = multi_learner(loaders, simple_cnn(2, width=4), fusion=name)
    model = learn.model.eval().cpu()
    xb = learn.dls.train.one_batch()[0].map(untyped)
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(xb)
        got = torch.compile(model, fullgraph=True, backend='eager')(xb)
    torch.testing.assert_close(tuple(got), tuple(want), atol=1e-5, rtol=1e-4)

small_awd = partial(AWDLSTMEncoder, emb_sz=8, n_hid=8, n_layers=2)

@pytest.mark.parametrize('name,text', [*[(n,'bag') for n in fusions], ('attention','lstm'), ('tokens',small_awd)])
def test_calls_of_a_learner_with_each_fusion(loaders, name, text):
    "Depths by output, a split, balancing at both levels, and the calls that inspect a model work"
    kwargs = dict(fusion=name, text=text)
    for options in (dict(depth=dict(colour=1, area=2)), dict(split=1)):
        learn = multi_learner(loaders, simple_cnn(2, width=4), **kwargs, **options)
        assert len(learn.predict((None, 'a red square'))[0])==2
    learn = multi_learner(loaders, simple_cnn(2, width=4), modality_dropout=.3, **kwargs)
    with learn.no_bar(), learn.no_logging():
        for level in ('features','parameters'):
            learn.fit(1, cbs=GradientBalance('pcgrad', level=level))
        learn.fit(1, cbs=UncertaintyWeighting())
        assert learn.tta(n=1)[0].colour.isfinite().all()
        assert 0<learn.lr_find(num_it=8, show_plot=False).valley<1
        summary = learn.summary()
    name = type(first(learn.model.views.values()).fusion).__name__.lower().removesuffix('fusion')
    assert name in summary.lower()
    assert len(learn.predict_df(loaders.items.head(3)))==3
    plot_model(learn)
    plt.close('all')
    check = modality_check(learn)
    assert set(check.table.index.get_level_values('input'))=={'image','text'}

def test_a_late_fusion_answers_from_what_there_is():
    "Without the second input, the answer is the head's answer to the first. With both, it is between the two answers"
    torch.manual_seed(0)
    model = MultiModel(dict(a=nn.Linear(3, 5), b=nn.Linear(2, 5)), dict(y=1), fusion='late').eval()    # no wide features
    for p in model.parameters(): nn.init.normal_(p, std=.5)
    fusion = first(model.views.values()).fusion
    a,b = torch.randn(4,3),torch.randn(4,2)
    nothing = torch.full_like(b, math.nan)
    with torch.no_grad():
        only_a = model(a, nothing).y
        only_b = model(torch.full_like(a, math.nan), b).y
        reads = model.read(a, b)['y']
        stacked = first(model.views.values())(reads)
        torch.testing.assert_close(only_a, model.heads['y'](stacked[:,0]))
        both = model(a, b).y
    shares = fusion.scores.softmax(0)
    torch.testing.assert_close(both, shares[0]*only_a+shares[1]*only_b)

def said_twice(n=160, seed=0):
    "A table of a text and two numbers that predict the kind: the word always, the numbers nearly always"
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    a = kind+.35*rng.normal(size=n)
    words = np.array(['cup','hat','shoe'])[kind]
    df = pd.DataFrame(dict(a=a, b=rng.normal(size=n), text=words, kind=words, is_valid=np.arange(n)%3==0))
    return MultiDataLoaders.from_df(df, text='text', features=['a','b'], outputs=dict(kind=CategoryBlock, a=NumberBlock),
                                    valid_col='is_valid', bs=16, num_workers=0, device='cpu')

def late_learner(aux):
    set_seed(0)
    learn = multi_learner(said_twice(), text='lstm', fusion=partial(LateFusion, aux=aux))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    return learn

def loss_alone(learn, name):
    "The loss of the kind with `name` as the only input"
    x,y = learn.dls.valid.one_batch()
    x = x.map(untyped)
    x = type(x)([v if n==name else learn.modalities[n].absent(v) for n,v in x.items()])
    with torch.no_grad(): return float(F.cross_entropy(learn.model.eval()(x).kind, untyped(y.kind)))

def test_auxiliary_losses_teach_the_inputs():
    plain,aux = late_learner(0.), late_learner(1.)
    assert not any(isinstance(cb, InputLosses) for cb in plain.cbs)
    def alone(learn): return sum(loss_alone(learn, name) for name in learn.modalities)
    assert alone(aux)<.95*alone(plain)    # only on average: an input that already answers well alone may lose a little
    watch = first(cb for cb in aux.cbs if isinstance(cb, InputLosses))
    assert watch.term>0
    last = aux.recorder.values[-1]
    columns = aux.evaluate()                       # the columns describe the mixture
    preds,targs = aux.get_preds(act=noop)
    assert columns['kind_loss']==pytest.approx(float(F.cross_entropy(preds.kind, targs.kind)), rel=1e-4)
    assert list(last[1:4])==pytest.approx([columns[n] for n in ('valid_loss','kind_loss','a_loss')], rel=1e-4)

def test_auxiliary_weight_is_a_number():
    with pytest.raises(ValueError, match='`aux` of a late fusion is -1'): LateFusion(dict(a=2, b=3), aux=-1)
