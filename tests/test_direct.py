"Predicting one item directly gives the same answers as a validation loop for every kind, input and option"
import numpy as np, operator, pandas as pd, pytest, torch
from PIL import Image
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import map_tensors
from fastai_multi.direct import changes_predictions, predicts_as_usual, reads_as_usual

pytestmark = pytest.mark.usefixtures('one_thread')

OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock, eye=PointsBlock,
               mask=MaskBlock(codes=['ground','shape']), both=GroupBlock(colour=CategoryBlock, width=RegressionBlock))
COLUMNS = dict(box=['x1','y1','x2','y2'], eye=['cx','cy'], both=dict(colour='colour', width='x2'))

class Watch(Callback):
    "A callback that direct prediction does not know"
    def after_pred(self): self.n = getattr(self, 'n', 0)+1

class Reversed(Callback):
    "A callback that changes the model's predictions"
    def after_pred(self): self.learn.pred = map_tensors(operator.neg, self.pred)

@pytest.fixture(scope='module')
def table(shapes, tmp_path_factory):
    "A table of pictures of two sizes, with a mask of each box"
    folder = tmp_path_factory.mktemp('wide')
    df = pd.read_csv(shapes/'items.csv').head(40)
    for i,r in df.iterrows():
        w,h = (128,64) if i%2 else (96,80)
        wide = Image.new('RGB', (w,h), 'grey')
        wide.paste(Image.open(shapes/r.file), (32,0))
        wide.save(folder/f'{i}.png')
        mask = np.zeros((h,w), np.uint8)
        mask[int(r.y1):int(r.y2)+1, int(r.x1)+32:int(r.x2)+33] = 1
        Image.fromarray(mask).save(folder/f'{i}_mask.png')
    df[['x1','x2']] += 32
    return df.assign(file=[str(folder/f'{i}.png') for i in df.index], cx=(df.x1+df.x2)/2, cy=(df.y1+df.y2)/2,
                     mask=[str(folder/f'{i}_mask.png') for i in df.index])

def shaken(learn):
    "The silent learner with random weights. Heads start at zero, which would hide mistakes before them"
    for p in learn.model.parameters(): p.data.add_(torch.randn_like(p)*.05)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def learner(df, outputs, path='.', arch='small', **kwargs):
    columns = {n: c for n,c in COLUMNS.items() if n in outputs}
    options = dict(image='file', item_tfms=Resize(32, method='squish'), columns=columns or None, label_delim='|', bs=8,
                   seed=0, num_workers=0)
    dls = MultiDataLoaders.from_df(df, path, outputs=outputs, **(options | kwargs))
    if arch=='small': arch = simple_cnn(depth=2, width=4)
    return shaken(multi_learner(dls, arch, pretrained=False))

@pytest.fixture(scope='module')
def learn(table): return learner(table, OUTPUTS, text='caption')

def same_values(a, b):
    if hasattr(a, 'keys'):
        assert type(a).__name__==type(b).__name__ and list(a.keys())==list(b.keys())
        for n in a.keys(): same_values(a[n], b[n])
    elif isinstance(a, torch.Tensor):
        assert type(a) is type(b) and a.dtype==b.dtype and a.shape==b.shape and a.device==b.device
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    else: assert type(a) is type(b) and repr(a)==repr(b)

def check_same(learn, item, direct=True, **kwargs):
    "Check that the answer to `item` equals that of the validation loop bit for bit"
    one = learn.predict(item, **kwargs)
    if direct: assert learn.direct(learn, item) is not None
    with learn.added_cbs([Watch()]):
        assert learn.direct(learn, item) is None
        other = learn.predict(item, **kwargs)
    for a,b in zip(one, other, strict=True): same_values(a, b)
    assert repr(one.to_dict('all'))==repr(other.to_dict('all')) and one.confidence==other.confidence
    assert repr(one)==repr(other)

def forms(row):
    "One item in every form that `predict` takes"
    im = PILImage.create(row.file)
    return [row, (row.file, row.caption), (Path(row.file), None), (im, row.caption), (np.array(im), row.caption),
            dict(image=row.file, text=row.caption), dict(text=row.caption), im, (None, row.caption), (row.file, '')]

@pytest.mark.parametrize('i', [0,1])
@pytest.mark.filterwarnings('ignore:Input')
def test_every_kind_and_every_form_of_an_item(learn, table, i):
    for item in forms(table.iloc[i]): check_same(learn, item)

def objects(o):
    return learner(pd.read_csv(o/'items.csv'), dict(objects=ObjectsBlock(colour=CategoryBlock), kind=CategoryBlock), o,
                   objects='boxes.csv', item_tfms=Resize(64))

def flat_form(o):
    dblock = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file', pref=o), get_y=ColReader('kind'),
                       splitter=RandomSplitter(seed=0), item_tfms=Resize(32))
    dls = MultiDataLoaders.from_dblock(dblock, pd.read_csv(o/'items.csv'), bs=8, num_workers=0)
    return shaken(multi_learner(dls, simple_cnn(2, 4)))

CASES = dict(number=lambda o: learner(pd.read_csv(o/'items.csv'), dict(area=RegressionBlock), o),
             folder=lambda o: shaken(multi_learner(MultiDataLoaders.from_path_func(
                 o, get_image_files(o/'images')[:30], lambda f: f.stem[-1], bs=8, num_workers=0,
                 item_tfms=Resize(32)), simple_cnn(2, 4))),
             random_crop=lambda o: learner(pd.read_csv(o/'items.csv'), dict(box=BBoxBlock), o,
                                           item_tfms=RandomResizedCrop(32), batch_tfms=aug_transforms(do_flip=False)),
             objects=objects, flat_form=flat_form)

@pytest.mark.parametrize('name', CASES)
def test_other_learners(shapes, name):
    learn = CASES[name](shapes)
    files = [shapes/f for f in pd.read_csv(shapes/'items.csv').file[:3]]
    for f in files: check_same(learn, PILImage.create(f))
    check_same(learn, files[0])
    check_same(learn, str(files[1]))

def test_a_text_alone_and_numbers(shapes):
    df = pd.read_csv(shapes/'items.csv')
    learn = learner(df, dict(kind=CategoryBlock), arch=None, image=None, text='caption', item_tfms=None)
    for item in ('a red circle', df.iloc[0], 'words that it never saw'): check_same(learn, item)
    both = learner(df, dict(kind=CategoryBlock), arch=None, image=None, features=['x1','y1'], item_tfms=None)
    check_same(both, df.iloc[0])
    check_same(both, [1.,2.])

@pytest.mark.filterwarnings('ignore:Input')
def test_options_and_what_the_learner_learned_later(table):
    learn = learner(table, dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock, box=BBoxBlock),
                    text='caption')
    item = (table.file[0], table.caption[0])
    before = learn.predict(item)
    learn.tune_thresholds(ds_idx=0)
    check_same(learn, item)
    learn.calibrate(ds_idx=0)
    check_same(learn, item)
    check_same(learn, item, coverage=.8)
    check_same(learn, item, with_input=True)
    learn.loss_func.weights['kind'] = 2.
    learn.fit(1, 1e-2)
    assert learn.model.training is False or learn.predict(item) is not None
    check_same(learn, item)
    assert not torch.equal(before[2].kind, learn.predict(item)[2].kind)
    learn.model.train()
    check_same(learn, item)
    assert not learn.model.training

def test_new_loaders_and_changed_transforms(table):
    learn = learner(table, dict(box=BBoxBlock, kind=CategoryBlock))
    item = table.file[1]
    check_same(learn, item)
    seen = learn.direct.made_for[0]
    learn.dls = learner(table, dict(box=BBoxBlock, kind=CategoryBlock), item_tfms=Resize(48)).dls
    check_same(learn, item)
    assert learn.direct.made_for[0] is not seen and learn.direct.made_for[0] is learn.dls.valid
    resize = first(t for t in learn.dls.valid.after_item.fs if isinstance(t, Resize))
    box = learn.predict(item)[0].box
    resize.method = ResizeMethod.Pad
    check_same(learn, item)
    assert not torch.equal(box, learn.predict(item)[0].box)
    learn.dls.valid.after_batch.add(Normalize.from_stats(*imagenet_stats, cuda=False))
    check_same(learn, item)

def test_it_goes_the_long_way_where_a_callback_may_change_the_answer(learn, table):
    item = table.iloc[0]
    plain = learn.predict(item)[2]
    learn.add_cb(Reversed())
    try:
        changed = learn.predict(item)[2]
        assert torch.allclose(changed.area, -plain.area)
    finally: learn.remove_cb(Reversed)
    assert predicts_as_usual(learn) and reads_as_usual(learn.dls)
    for cb in (UncertaintyWeighting(), ModalityDropout(), EarlyStoppingCallback(), SaveModelCallback(), TaskMonitor()):
        assert not changes_predictions(cb), cb
    for cb in (CastToTensor(), MixedPrecision(), Watch()): assert changes_predictions(cb), cb
    class Mine(type(learn)):
        def _split(self, b): super()._split(b)
    learn.__class__ = Mine
    try: assert not predicts_as_usual(learn) and learn.predict(item)[2].area==plain.area
    finally: learn.__class__ = Mine.__base__

def test_nothing_of_it_is_saved(learn, table, tmp_path):
    learn.predict(table.iloc[0])
    assert learn.direct.loader is not None
    learn.path = tmp_path
    learn.export('a.pkl')
    loaded = load_multi_learner(tmp_path/'a.pkl')
    assert loaded.direct is None or loaded.direct.loader is None
    loaded.remove_cb(ProgressCallback)
    same_values(loaded.predict(table.iloc[0])[2], learn.predict(table.iloc[0])[2])

def test_a_bad_item_is_refused_as_before(learn):
    with pytest.raises(Exception, match='nowhere.png'): learn.predict(('nowhere.png', 'a circle'))
    with pytest.raises(ValueError, match='nothing to predict from'): learn.predict((None, None))
    with pytest.raises(KeyError, match='img'): learn.predict(dict(img=None))
