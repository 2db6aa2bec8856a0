"Learners with added outputs and classes keep their old predictions"
import subprocess, sys
import pytest
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import flat, untyped
from fastai_multi.keeping import KeepAnswers
from tests.small_models import save_bert

pytestmark = pytest.mark.usefixtures('one_thread')

def things(n=200, seed=0, kinds=('cup','hat'), shift=0.):
    "A table of two numbers. The kind is the side of a line, and the price is a curve over the other axis"
    rng = np.random.default_rng(seed)
    a,b = rng.normal(size=(2,n))
    edges = np.linspace(-1, 1, len(kinds)+1)[1:-1]
    tags = np.where(a>0, 'right', '')+np.where(b>0, '|up', '|')
    return pd.DataFrame(dict(a=a, b=b, kind=np.array(kinds)[np.digitize(a+.3*b, edges)], heavy=2*b+1, tags=tags,
                             price=np.sin(3*a)*b+shift, is_valid=np.arange(n)%4==0))

def loaders(df, outputs, **kwargs):
    return MultiDataLoaders.from_df(df, features=['a','b'], outputs=outputs, valid_col='is_valid', bs=32, num_workers=0,
                                    device='cpu', label_delim='|', **kwargs)

old_outputs = dict(kind=CategoryBlock, heavy=NumberBlock)
more_outputs = dict(price=NumberBlock, **old_outputs)    # the new one is first

def encoder(): return vector_encoder(2, nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU()))

def trained(dls, epochs=8, **kwargs):
    set_seed(0)
    learn = multi_learner(dls, encoder(), **kwargs)
    quiet(learn, lambda: learn.fit_one_cycle(epochs, 1e-2))
    return learn

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()

@pytest.fixture(scope='module')
def learn(): return trained(loaders(things(), old_outputs))

def answers(learn, *x):
    with torch.no_grad(): return learn.model.eval()(*x)

def same(a, b): return all(torch.equal(untyped(p), untyped(q)) for p,q in zip(flat((a,)), flat((b,)), strict=True))

def test_old_answers_are_equal_to_the_bit(learn):
    x = torch.randn(200, 2)
    before = answers(learn, x)
    state = {k: v.clone() for k,v in learn.model.state_dict().items()}
    new = learn.add_output(loaders(things(seed=1), more_outputs))
    quiet(new, lambda: new.fine_tune(2, probe=False))
    quiet(new, lambda: new.fit_one_cycle(3, 1e-2, wd=.3))
    after = answers(new, x)
    assert same(after.kind, before.kind) and same(after.heavy, before.heavy)
    grown = new.model.state_dict()
    assert all(torch.equal(v, grown[k]) for k,v in state.items())       # includes batch norm statistics
    assert new.growth().moved==[]
    assert set(new.growth().table.verdict)=={'the same'}
    assert list(new.dls.train.dataset[0][1].keys())==['price','kind','heavy']
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in state.items())    # the old learner is unchanged

def test_old_answers_stay_through_several_growths(learn):
    "Heads of one shape run as one operation, but the older ones run as before"
    x = torch.randn(200, 2)
    df = things(seed=1)
    kinds = things(seed=1, kinds=('bag','cup','hat'))
    steps = [learn.add_output(loaders(df, more_outputs))]
    steps.append(steps[-1].add_class(loaders(kinds, more_outputs)))
    steps.append(steps[-1].add_output(loaders(kinds, dict(more_outputs, tags=MultiCategoryBlock))))
    before = answers(learn, x)
    for i,new in enumerate(steps):
        quiet(new, lambda: new.fit(1, 1e-2))
        after = answers(new, x)
        assert same(after.heavy, before.heavy)
        assert same(after.kind if i==0 else after.kind[:,[1,2]], before.kind)

def test_new_output_learns(learn):
    new = learn.add_output(loaders(things(600, seed=1), more_outputs), heads=dict(price=[64]))
    quiet(new, lambda: new.fit_one_cycle(1, 0.))
    before = new.evaluate()['price_mae']
    quiet(new, lambda: new.fit_one_cycle(12, 1e-2))
    assert new.evaluate()['price_mae']<.85*before
    assert 'kind_accuracy' in new.evaluate() and 'price_loss' in new.evaluate()
    assert 'price' in new.predict(things(1).iloc[0])[0].keys()

def test_probe_leaves_old_heads_alone(shapes):
    outputs = dict(kind=CategoryBlock, area=RegressionBlock)
    learn = multi_learner(shape_loaders(shapes, outputs, image=None, text='caption'))
    quiet(learn, learn.probe)            # the old heads are linear fits: their hidden layers add nothing yet
    x = learn.dls.one_batch()[:1]
    before = answers(learn, *x)
    more = shape_loaders(shapes, dict(outputs, colour=CategoryBlock), image=None, text='caption')
    for keep in ('freeze', 'distil'):
        new = learn.add_output(more, keep=keep)
        assert list(quiet(new, new.probe))==['colour']
        after = answers(new, *x)
        assert same(after.kind, before.kind) and same(after.area, before.area)
    new = learn.add_output(more)
    quiet(new, lambda: new.fine_tune(1))
    after = answers(new, *x)
    assert same(after.kind, before.kind) and same(after.area, before.area)
    assert bool(new.model.heads['colour'].layers[-1].weight.any())

def test_distilled_answers_move_less():
    learn = trained(loaders(things(), old_outputs))
    new = things(seed=1)
    new.loc[~new.is_valid & (new.index>3), ['kind','heavy']] = None         # leaves few old labels for training
    dls = loaders(new, dict(more_outputs, kind=CategoryBlock(vocab=['cup','hat'])))
    moved = {}
    for keep in (None, 'distil'):
        set_seed(0)
        grown = learn.add_output(dls, keep=keep, loss_weights=dict(price=3.), weight=3.)
        quiet(grown, lambda: grown.fit_one_cycle(8, 3e-2))
        table = grown.growth().table
        moved[keep] = table.after['heavy_mae']-table.before['heavy_mae']
    assert moved['distil']<.5*moved[None]

@pytest.mark.parametrize('keep', ['freeze','distil'])
def test_classes_are_mapped_by_name(keep):
    learn = trained(loaders(things(kinds=('cup','hat')), dict(old_outputs, tags=MultiCategoryBlock)))
    df = things(seed=1, kinds=('bag','cup','eel','hat'))
    df['tags'] = df.tags+np.where(df.a+df.b>1, '|far', '')
    x = torch.randn(100, 2)
    before = answers(learn, x)
    new = learn.add_class(loaders(df, dict(old_outputs, tags=MultiCategoryBlock)), keep=keep)
    assert list(new.dls.vocab['kind'])==['bag','cup','eel','hat']
    assert list(new.dls.vocab['tags'])==['far','right','up']
    start = answers(new, x)
    assert same(start.kind[:,[1,3]], before.kind) and same(start.tags[:,[1,2]], before.tags)
    probs = new.get_preds(ds_idx=0)[0]
    train = df[~df.is_valid]
    for i,n in ((0,'bag'), (2,'eel')):                # a new class starts at its share of the labels
        assert float(probs.kind[:,i].mean())==pytest.approx((train.kind==n).mean(), abs=.1)
    assert float(probs.tags[:,0].mean())==pytest.approx(train.tags.str.contains('far').mean(), abs=.02)
    quiet(new, lambda: new.fit_one_cycle(10, 1e-2))
    after = answers(new, x)
    assert same(after.kind[:,[1,3]], before.kind)==(keep=='freeze')
    got = new.predict_df(df[df.is_valid])
    of_new = df[df.is_valid].kind.isin(['bag','eel'])
    assert (got.kind==df[df.is_valid].kind)[of_new.values].mean()>.5
    assert set(new.growth().table.index)=={'kind_accuracy','heavy_mae','tags_map','tags_f1'}

def test_report_tells_what_moved(learn):
    new = learn.add_output(loaders(things(seed=1, shift=5.), more_outputs), keep=None)
    with torch.no_grad(): new.model.heads['heavy'].wide.bias += .3
    report = new.growth()
    assert report.moved==['heavy_mae'] and report.table.verdict['heavy_mae']=='worse'
    assert 'Worse: heavy_mae' in repr(report) and '<table' in report._repr_html_()
    assert new.growth(tolerance=100.).moved==[]
    assert report.table.before['kind_accuracy']==learn.evaluate()['kind_accuracy']

def test_a_learner_from_a_file_grows_too(learn, tmp_path):
    learn.path = tmp_path
    learn.export('learn.pkl')
    loaded = load_multi_learner(tmp_path/'learn.pkl')
    df = things(seed=1, kinds=('bag','cup','hat'))
    new = loaded.add_class(loaders(df, old_outputs))
    x = torch.randn(50, 2)
    assert same(answers(new, x).kind[:,[1,2]], answers(learn, x).kind)
    report = new.growth()                               # measured on the new items, of which bags have no old label
    valid = df[df.is_valid & (df.kind!='bag')]
    right = loaded.predict_df(valid).kind==valid.kind.values
    assert report.table.before['kind_accuracy']==pytest.approx(right.mean())
    new.path = tmp_path
    new.export('new.pkl')
    again = load_multi_learner(tmp_path/'new.pkl')
    assert same(answers(again, x), answers(new, x))
    assert again.growth().table.equals(new.growth().table)          # the export has the report but no items
    new.save_bundle(tmp_path/'bundle', metrics=False)
    bundle = load_bundle(tmp_path/'bundle')
    assert same(answers(bundle, x), answers(new, x))
    bundle.dls = loaders(df, old_outputs)
    quiet(bundle, lambda: bundle.fit_one_cycle(2, 1e-2))          # frozen parts stay frozen after a bundle
    assert same(answers(bundle, x).kind[:,[1,2]], answers(learn, x).kind)

def test_what_the_learner_had_goes_on():
    learn = trained(loaders(things(), dict(old_outputs, tags=MultiCategoryBlock)), epochs=2, opt_func=SGD, wd=.02,
                    loss_func=dict(heavy=L1LossFlat()), loss_weights=dict(kind=2.), class_weights=dict(kind='balanced'),
                    metrics=dict(kind=[accuracy, F1Score(average='macro')]), cbs=[UncertaintyWeighting()])
    learn.tasks['tags'].threshold = .3
    df = things(seed=1, kinds=('bag','cup','hat'))
    new = learn.add_output(loaders(df, dict(more_outputs, tags=MultiCategoryBlock)), metrics=rmse, keep='distil',
                           loss_func=dict(price=MSELossFlat()))
    assert new.opt_func is SGD and new.wd==.02
    assert isinstance(new.loss_func.funcs['heavy'], L1LossFlat().__class__)
    assert new.loss_func.weights['kind']==2. and new.given_losses=={'heavy','price'}
    assert new.class_weights['kind'].tolist()[1:]==learn.class_weights['kind'].tolist()
    assert [m.name for m in new.metrics if m.output=='price']==['price_loss','price_rmse']
    mine,theirs = ([m.name for m in o.metrics if m.output=='kind'] for o in (new, learn))
    assert mine==theirs
    assert new.tasks['tags'].threshold==.3
    assert any(isinstance(cb, UncertaintyWeighting) for cb in new.cbs)
    quiet(new, lambda: new.fit_one_cycle(2, 1e-2))
    assert any(isinstance(cb, KeepAnswers) and cb.term>=0 for cb in new.cbs)

def shape_loaders(path, outputs, df=None, **kwargs):
    columns = dict(box=['x1','y1','x2','y2']) if 'box' in outputs else None
    options = dict(path=path, image='file', columns=columns, label_delim='|', item_tfms=Resize(32), bs=16,
                   num_workers=0, seed=0, device='cpu')
    return MultiDataLoaders.from_df(ifnone(df, pd.read_csv(path/'items.csv')), outputs=outputs, **{**options, **kwargs})

old_shapes = dict(kind=CategoryBlock, box=BBoxBlock)
all_shapes = dict(area=RegressionBlock, kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock)
models = dict(depth=dict(depth=dict(kind=1, box=2)), split=dict(split=1), tokens=dict(fusion='tokens', text='lstm'),
              attention=dict(fusion='attention', text='lstm'), late=dict(fusion='late'), gated=dict(fusion='gated'))

@pytest.mark.parametrize('name', models)
def test_models_of_pictures_and_texts_grow(shapes, name):
    learn = multi_learner(shape_loaders(shapes, old_shapes, text='caption'), simple_cnn(2, width=8), **models[name])
    quiet(learn, lambda: learn.fit(1, 1e-3))
    x = learn.dls.one_batch()[:1]
    before = answers(learn, *x)
    like = 'box' if name=='split' else None
    new = learn.add_output(shape_loaders(shapes, all_shapes, text='caption'), like=like)
    quiet(new, lambda: new.fine_tune(1))
    after = answers(new, *x)
    assert all(same(after[n], before[n]) for n in old_shapes)
    if name!='split': return
    with pytest.raises(ValueError, match='pass `like`'):
        learn.add_output(shape_loaders(shapes, all_shapes, text='caption'))

def test_masks_and_objects(shapes):
    outputs = dict(things=ObjectsBlock(label=CategoryBlock))
    few = dict(objects='boxes.csv')
    learn = multi_learner(shape_loaders(shapes, outputs, **few), simple_cnn(3, width=8))
    quiet(learn, lambda: learn.fit(1, 1e-3))
    x = learn.dls.one_batch()[:1]
    before = answers(learn, *x)
    new = learn.add_output(shape_loaders(shapes, dict(outputs, kind=CategoryBlock), **few))
    quiet(new, lambda: new.fit(1, 1e-3))
    assert same(answers(new, *x).things, before.things)
    held = learn.add_output(shape_loaders(shapes, dict(outputs, kind=CategoryBlock), **few), keep='distil')
    quiet(held, lambda: held.fit(1, 1e-3))
    assert math.isfinite(first(cb.term for cb in held.cbs if isinstance(cb, KeepAnswers)))

def mask_loaders(path, codes, n=12):
    "Loaders of pictures, drawn into `path`, whose left half has the last class"
    rows = []
    for i in range(n):
        at = np.zeros((24,24), dtype=np.uint8)
        at[:,:12] = len(codes)-1
        for folder,values in (('images', at*80), ('masks', at)):
            (path/folder).mkdir(exist_ok=True)
            Image.fromarray(values).save(path/folder/f'{i}.png')
        rows.append(dict(file=f'images/{i}.png', where=f'masks/{i}.png'))
    return MultiDataLoaders.from_df(pd.DataFrame(rows), path, image='file', outputs=dict(where=MaskBlock(codes=codes)),
                                    bs=4, num_workers=0, seed=0, device='cpu')

def test_masks_get_classes(tmp_path):
    (tmp_path/'old').mkdir()
    (tmp_path/'new').mkdir()
    learn = multi_learner(mask_loaders(tmp_path/'old', ['ground','tree']), simple_cnn(2, width=8))
    quiet(learn, lambda: learn.fit(1, 1e-3))
    new = learn.add_class(mask_loaders(tmp_path/'new', ['ground','car','tree']))
    x = learn.dls.one_batch()[:1]
    assert same(first(answers(new, *x))[:,[0,2]], first(answers(learn, *x)))
    quiet(new, lambda: new.fit(2, 1e-2))
    assert same(first(answers(new, *x))[:,[0,2]], first(answers(learn, *x)))
    assert 'where_accuracy' in new.growth().table.index

def test_text_models_of_hugging_face(shapes, tmp_path):
    save_bert(tmp_path/'bert')
    text = dict(image=None, text='caption', text_block=PlainTextBlock(tok=str(tmp_path/'bert'), max_len=32))
    learn = multi_learner(shape_loaders(shapes, dict(kind=CategoryBlock), **text), text=str(tmp_path/'bert'))
    quiet(learn, lambda: learn.fit(1, 1e-3))
    x = learn.dls.one_batch()[:1]
    before = answers(learn, *x)
    new = learn.add_output(shape_loaders(shapes, dict(colour=CategoryBlock, kind=CategoryBlock), **text))
    quiet(new, lambda: new.fine_tune(1))
    assert same(answers(new, *x).kind, before.kind)

def test_mistakes_are_answered_in_words(learn):
    df = things(seed=1)
    with pytest.raises(ValueError, match="add 'heavy' to `outputs`.*pd.concat"):
        learn.add_output(loaders(df, dict(kind=CategoryBlock, price=NumberBlock)))
    with pytest.raises(ValueError, match='no new output.*add_class'): learn.add_output(loaders(df, old_outputs))
    with pytest.raises(ValueError, match='no new class.*add_output'): learn.add_class(loaders(df, more_outputs))
    with pytest.raises(ValueError, match=r"the classes \['hat'\] of the learner are missing"):
        learn.add_class(loaders(things(kinds=('cup','eel')), old_outputs))
    with pytest.raises(ValueError, match='the same block'):
        learn.add_output(loaders(df, dict(more_outputs, kind=MultiCategoryBlock)))
    with pytest.raises(ValueError, match='inputs.*can only get more outputs'):
        learn.add_output(MultiDataLoaders.from_df(df, text='kind', outputs=more_outputs, num_workers=0))
    with pytest.raises(ValueError, match="`keep` is 'frozen'"):
        learn.add_output(loaders(df, more_outputs), keep='frozen')
    with pytest.raises(KeyError, match='new output or classes in `heads`'):
        learn.add_output(loaders(df, more_outputs), heads=dict(kind=[3]))
    with pytest.raises(ValueError, match='did not grow'): learn.growth()
    chained = trained(loaders(df, old_outputs), epochs=1, after=dict(heavy='kind'))
    with pytest.raises(ValueError, match="come `after` it"):
        chained.add_class(loaders(things(kinds=('bag','cup','hat')), old_outputs))
    one = trained(loaders(df, old_outputs), epochs=1, loss_func=lambda p,*t: p.heavy.square().mean())
    with pytest.raises(ValueError, match="does not know \\['price'\\]"): one.add_output(loaders(df, more_outputs))
