"Every call of a learner works with objects, alone or with a class, tags, a number and a mask"
import numpy as np, pandas as pd, pytest, torch
from matplotlib import pyplot as plt
from fastai.vision.all import *
from fastai_multi import *

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]
LABELS = ['ground','shape']

class Source:
    "Drawn pictures with objects and masks. Some kinds, areas, colours and masks are missing"
    def __init__(self, folder):
        self.path = multi_shapes(folder/'shapes', n=32, size=32, seed=3)
        self.df = pd.read_csv(self.path/'items.csv')
        self.boxes = pd.read_csv(self.path/'boxes.csv').rename(columns=dict(label='kind'))
        self.boxes.loc[self.boxes.index%4==0, 'kind'] = None
        self.boxes.loc[self.boxes.index%5==0, 'area'] = np.nan
        self.df['mask'] = [self.mask_of(f) for f in self.df.file]
        self.df.loc[::6, 'mask'] = None
        self.df.loc[1::6, 'area'] = np.nan
        self.df['v'] = self.df.index>=24
        self.boxes = self.boxes[self.boxes.file!=self.df.file[2]]    # this picture has no objects

    def mask_of(self, file):
        m = np.zeros((32,32), dtype=np.uint8)
        for b in self.boxes[self.boxes.file==file].itertuples(): m[b.y1:b.y2,b.x1:b.x2] = 1
        mask = self.path/f'mask-{Path(file).stem}.png'
        Image.fromarray(m).save(mask)
        return str(mask)

    def dls(self, form, **more):
        objects = ObjectsBlock(colour=CategoryBlock, kind=CategoryBlock, area=RegressionBlock)
        outputs = dict(objects=objects)
        if form=='beside':
            outputs |= dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock, mask=MaskBlock(LABELS))
        if 'tags' in outputs: more['label_delim'] = '|'
        return MultiDataLoaders.from_df(self.df, self.path, image='file', objects=self.boxes, outputs=outputs, bs=8,
                                        valid_col='v', item_tfms=Resize(32), num_workers=0, device='cpu', **more)

    def learner(self, form, **kwargs):
        set_seed(0)
        options = dict(arch=partial(simple_cnn, depth=3, width=8), heads=dict(objects=dict(width=32, convs=1)))
        learn = multi_learner(self.dls(form), lr=5e-3, **{**options, **kwargs})
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn

@pytest.fixture(scope='module')
def source(tmp_path_factory): return Source(tmp_path_factory.mktemp('calls'))

FORMS = ['beside','alone']

@pytest.fixture(scope='module', params=FORMS)
def trained(source, request):
    learn = source.learner(request.param)
    learn.form = request.param
    learn.fit_one_cycle(2, cbs=TaskMonitor())
    learn.tasks['objects'].threshold = .05
    return learn

# Calls that change a learner get a fresh one each time

def is_finite(learn): return np.isfinite(learn.recorder.values[-1]).any() and weights_are_finite(learn)
def weights_are_finite(learn): return all(p.isfinite().all() for p in learn.model.parameters())

def fitted(cb): return lambda learn, source: learn.fit(1, cbs=cb())

def grown(learn, source):
    "A learner with an added output keeps the scores of the objects"
    before = learn.evaluate()['objects_map']
    df = source.df.assign(again=source.df.colour)
    outputs = {n: block for n,block in dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock,
                                            mask=MaskBlock(LABELS)).items() if n in learn.tasks}
    outputs |= dict(objects=ObjectsBlock(colour=CategoryBlock, kind=CategoryBlock, area=RegressionBlock),
                    again=CategoryBlock)
    more = dict(label_delim='|') if 'tags' in outputs else {}
    dls = MultiDataLoaders.from_df(df, source.path, image='file', objects=source.boxes, outputs=outputs, bs=8,
                                   valid_col='v', item_tfms=Resize(32), num_workers=0, device='cpu', **more)
    new = learn.add_output(dls)
    new.remove_cb(ProgressCallback)
    new.logger = noop
    assert new.evaluate()['objects_map']==pytest.approx(before, abs=1e-6)
    new.fit(1)
    assert 'again' in new.tasks and weights_are_finite(new)

trainings = dict(
    fit=lambda learn, source: learn.fit(1), one_cycle=lambda learn, source: learn.fit_one_cycle(1),
    flat_cos=lambda learn, source: learn.fit_flat_cos(1), fine_tune=lambda learn, source: learn.fine_tune(1),
    lr_find=lambda learn, source: learn.lr_find(num_it=4, show_plot=False),
    frozen=lambda learn, source: (learn.freeze(), learn.fit(1), learn.unfreeze()), add_output=grown,
    uncertainty=fitted(UncertaintyWeighting), average=fitted(DynamicWeightAverage), gradnorm=fitted(GradNorm),
    pcgrad=fitted(partial(GradientBalance, 'pcgrad')),
    at_parameters=fitted(partial(GradientBalance, 'pcgrad', level='parameters')),
    monitor=fitted(TaskMonitor))

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', trainings)
def test_trainings(source, form, name):
    learn = source.learner(form)
    before = [p.detach().clone() for p in learn.model.parameters()]
    trainings[name](learn, source)
    assert weights_are_finite(learn)
    if name in ('lr_find','add_output'): return
    assert is_finite(learn)
    assert any(not torch.equal(p, q) for p,q in zip(learn.model.parameters(), before))

options = dict(
    depth=dict(depth=dict(objects=2)), split=dict(split=1), bf16=dict(precision='bf16'),
    checkpoint=dict(checkpoint=True), channels_last=dict(channels_last=True),
    weight=dict(loss_weights=dict(objects=.5)), metrics=dict(metrics=dict(objects=dict(kind=[accuracy]))),
    deep=dict(heads=dict(objects=dict(width=64, convs=2, finest=2))))

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', options)
def test_options(source, form, name):
    if form=='alone' and name=='depth': options[name] = dict(depth=2)
    learn = source.learner(form, **options[name])
    learn.fit(1)
    assert is_finite(learn)
    assert isinstance(learn.predict(source.path/source.df.file[30])[0].objects, list)

# Calls that only read a learner

def same_rows(a, b):
    "Whether two answers have the same objects"
    assert [o['colour'] for o in a]==[o['colour'] for o in b]
    assert [o['kind'] for o in a]==[o['kind'] for o in b]
    for key in ('box','score','area'):
        np.testing.assert_allclose([o[key] for o in a], [o[key] for o in b], rtol=1e-3, atol=1e-2)
    return True

def picture(source): return source.path/source.df.file[30]

def found_anew(learn, source, tmp_path):
    learn.export(tmp_path/'l.pkl')
    new = load_multi_learner(tmp_path/'l.pkl')
    return same_rows(new.predict(picture(source))[0].objects, learn.predict(picture(source))[0].objects)

def found_in_a_bundle(learn, source, tmp_path):
    learn.save_bundle(tmp_path/'bundle', metrics=False)
    new = load_bundle(tmp_path/'bundle')
    return same_rows(new.predict(picture(source))[0].objects, learn.predict(picture(source))[0].objects)

def loaded(learn, source, tmp_path):
    before = learn.validate()[0]
    learn.save(tmp_path/'w')
    learn.load(tmp_path/'w')
    return learn.validate()[0]==pytest.approx(before, rel=1e-4)

def one_answer(learn, source, tmp_path):
    rows = learn.predict(picture(source))[0].objects
    row = source.df.iloc[30]
    return same_rows(rows, learn.predict(row)[0].objects) and set(rows[0])=={'box','score','colour','kind','area'}

def many_answers(learn, source, tmp_path):
    df = learn.predict_df(source.df.iloc[29:31], num_workers=0)
    rows = learn.predict(picture(source))[0].objects
    np.testing.assert_allclose(df['objects.score'].iloc[1], [o['score'] for o in rows], rtol=1e-3)
    return list(df['objects.kind'].iloc[1])==[o['kind'] for o in rows]

def answer_file(learn, source, tmp_path):
    learn.predict_df(source.df, to=tmp_path/'answers.csv', chunk=10, num_workers=0)
    df = pd.read_csv(tmp_path/'answers.csv', index_col=0)
    return len(df)==len(source.df) and 'objects.box' in df.columns

def all_predictions(learn, source, tmp_path):
    preds,targs,dec,losses = learn.get_preds(with_decoded=True, with_loss=True)
    return len(preds.objects.box)==len(targs.objects.box)==len(dec.objects.box)==len(losses)==8

def averaged(learn, source, tmp_path):
    preds,_ = learn.tta(n=1)
    torch.testing.assert_close(preds.objects.box, learn.get_preds()[0].objects.box, equal_nan=True)
    return True

def evaluated(learn, source, tmp_path):
    res = learn.evaluate()
    return {'objects_map50','objects_map','objects_kind_accuracy','objects_area_mae'} <= set(res)

def tiles(learn, source, tmp_path):
    "With one tile, the objects are those of the whole picture, but of two overlapping ones of a class only one stays"
    whole = {(o['score'],o['colour']) for o in learn.predict(picture(source))[0].objects}
    rows = learn.predict_tiles(picture(source), tile=32, overlap=0)
    return 0<len(rows)<=len(whole) and {(o['score'],o['colour']) for o in rows} <= whole

def drawn(learn, source, tmp_path):
    plt.close('all')
    learn.show_results(max_n=4)
    learn.dls.show_batch(max_n=4)
    learn.plot_model()
    learn.plot_tasks()
    n = len(plt.get_fignums())
    plt.close('all')
    return n>=4

def said(learn, source, tmp_path):
    texts = [learn.summary(), repr(learn), str(learn.task_report()), str(learn.tree()), str(describe(learn.dls))]
    assert all('objects' in str(t) for t in texts)
    return True

def interpreted(learn, source, tmp_path):
    interp = MultiInterpretation.from_learner(learn)
    interp.plot_top_losses(2)
    interp['objects'].plot_confusion_matrix()
    plt.close('all')
    return len(interp['objects'].table())==8 and len(interp['objects'].counts())==6

def compared(learn, source, tmp_path):
    table = compare(learn, learn, resamples=2).table
    return table.loc[('objects','objects_map50'), 'difference']==0

def calibrated(learn, source, tmp_path):
    "Calibration does not change the scores of objects"
    before = learn.predict(picture(source))[0].objects
    learn.calibrate()
    return same_rows(before, learn.predict(picture(source))[0].objects)

def program(learn, source, tmp_path):
    learn.to_program(tmp_path/'l.pt2')
    return (tmp_path/'l.pt2').exists()

def onnx(learn, source, tmp_path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    learn.to_onnx(tmp_path/'l.onnx')
    return (tmp_path/'l.onnx').exists()

questions = dict(one_answer=one_answer, many_answers=many_answers, answer_file=answer_file, averaged=averaged,
                 all_predictions=all_predictions, evaluated=evaluated, tiles=tiles, drawn=drawn, said=said,
                 interpreted=interpreted, compared=compared, saved=loaded, exported=found_anew,
                 bundled=found_in_a_bundle, program=program, onnx=onnx)

@pytest.mark.parametrize('name', questions)
def test_questions(trained, source, tmp_path, name):
    before = {n: v.clone() for n,v in trained.model.state_dict().items()}
    assert questions[name](trained, source, tmp_path)
    for n,v in trained.model.state_dict().items(): assert torch.equal(v, before[n]), n

# What objects cannot do raises a clear error

refused = dict(
    mixup=(ValueError, "cannot blend output 'objects'", lambda learn, source: learn.fit(1, cbs=MixUp())),
    cutmix=(ValueError, "cannot blend output 'objects'", lambda learn, source: learn.fit(1, cbs=CutMix())),
    probe=(ValueError, 'nothing to probe', lambda learn, source: learn.probe()),
    explain=(ValueError, 'objects', lambda learn, source: learn.explain(picture(source), 'objects')),
    unknown=(KeyError, 'knd', lambda learn, source: source.learner('beside', metrics=dict(objects=dict(knd=accuracy)))),
    after=(ValueError, 'returns no vector', lambda learn, source: source.learner('beside', after=dict(kind='objects'))))

@pytest.mark.parametrize('name', refused)
def test_refusals(trained, source, name):
    error,words,call = refused[name]
    with pytest.raises(error, match=words): call(trained, source)
