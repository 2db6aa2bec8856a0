"Loaders from tables, files or data sets: blocks inferred from values, factories and splits"
import io
from contextlib import redirect_stdout

import matplotlib
matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
import fastai.callback.schedule    # `fine_tune`
from fastai.data.block import CategoryBlock, MultiCategoryBlock, RegressionBlock
from fastai.vision.augment import Resize
from fastai.vision.core import Image
from fastai_multi import *

small = dict(bs=4, num_workers=0, device='cpu')

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "A folder of pictures and a table of 40 rows"
    folder = tmp_path_factory.mktemp('table')
    rows = []
    for i in range(40):
        a = np.full((24,24,3), 40*(i%3), dtype=np.uint8)
        Image.fromarray(a).save(folder/f'{i}.png')
        rows.append(dict(file=f'{i}.png', note='a dark one' if i%3 else 'a light one', gender='fm'[i%2],
                         price=10+i/4, tags=['red|small','red','|'][i%3], stars=1+i%5, code=f'{i%4:03d}',
                         patient=f'p{i//4}', x1=2., y1=3., x2=9., y2=9., mask=f'{i}.png', day='2020-01-01'))
    return folder,pd.DataFrame(rows)

def loaders_and_lines(make):
    "Loaders, and the lines printed while they were made"
    with redirect_stdout(io.StringIO()) as out: dls = make()
    return dls,out.getvalue().splitlines()

# Blocks inferred from values

def test_blocks_are_inferred_and_printed(table):
    folder,df = table
    names = ['gender','price','tags','stars']
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_df(df, folder, text='note', outputs=names, **small))
    assert [p.kind for p in describe(dls).outputs.values()] == ['category','number','tags','category']
    assert len(lines) == 5 and all(n in l for n,l in zip(names, lines))
    assert [l.startswith('check ') for l in lines] == [False,False,False,True,False]
    assert 'stars=RegressionBlock' in lines[3]    # the line says how to change the block
    written = lines[-1].removeprefix('Written out: ')
    again,lines = loaders_and_lines(
        lambda: MultiDataLoaders.from_df(df, folder, text='note', **eval(f'dict({written})'), **small))
    what = lambda dls: [(n, p.kind, p.c, list(p.vocab or [])) for n,p in describe(dls).outputs.items()]
    assert not lines and what(again) == what(dls)

def test_a_name_is_a_plain_target_that_trains(table):
    folder,df = table
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_df(df, folder, text='note', outputs='price', **small))
    assert lines[-1] == "Written out: outputs=RegressionBlock, columns='price'"
    assert isinstance(dls.one_batch()[1], torch.Tensor) and list(describe(dls).outputs) == ['price']
    learn = multi_learner(dls)
    with learn.no_logging(), learn.no_bar(): learn.fit(1)
    value,_,_ = learn.predict('a dark one')
    assert 0 < float(value) < 40

def test_a_csv_file_keeps_codes_as_written(table, tmp_path):
    _,df = table
    df.to_csv(tmp_path/'items.csv', index=False)
    dls,lines = loaders_and_lines(
        lambda: MultiDataLoaders.from_csv(tmp_path, text='note', outputs=['code','price'], **small))
    assert list(dls.vocab['code']) == ['000','001','002','003']
    assert 'Words' in lines[0] and lines[1].startswith('price: number')

def test_a_csv_file_with_one_name(table, tmp_path):
    _,df = table
    df.to_csv(tmp_path/'items.csv', index=False)
    dls,_ = loaders_and_lines(lambda: MultiDataLoaders.from_csv(tmp_path, text='note', outputs='code', **small))
    assert list(dls.vocab[-1]) == ['000','001','002','003']

def test_twenty_whole_numbers_are_decided_and_pointed_out(table):
    folder,df = table
    df = df.assign(age=[i%20 for i in range(40)], level=[i%20 for i in range(40)])
    df = pd.concat([df, df])
    outputs = dict(age=None, level=CategoryBlock)
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_df(df, folder, text='note', outputs=outputs, **small))
    assert [p.kind for p in describe(dls).outputs.values()] == ['number','category']
    assert lines[0].startswith('check age: number') and 'age=CategoryBlock' in lines[0]

@pytest.mark.parametrize('outputs, columns, words', [
    (['box'], dict(box=['x1','y1','x2','y2']), 'box=BBoxBlock'),
    (['mask'], None, 'holds files of pictures'),
    (['day'], None, 'holds dates'),
    (['file'], None, 'holds files of pictures'),
    (['gendr'], None, "Did you mean 'gender'?"),
    (['gender','gender'], None, "names 'gender' twice"),
    (['gender', CategoryBlock], None, 'names of columns whose blocks are inferred')])
def test_what_cannot_be_inferred_is_answered_in_words(table, outputs, columns, words):
    folder,df = table
    with pytest.raises((ValueError,KeyError,TypeError)) as e:
        MultiDataLoaders.from_df(df, folder, text='note', outputs=outputs, columns=columns, **small)
    assert words in str(e.value)

def test_inferred_blocks_survive_export(table, tmp_path):
    from fastai.learner import load_learner
    folder,df = table
    dls,_ = loaders_and_lines(lambda: MultiDataLoaders.from_df(df, folder, text='note', outputs=['gender','tags'], **small))
    learn = multi_learner(dls, path=tmp_path)
    learn.export()
    answer,_,_ = load_learner(tmp_path/'export.pkl').predict('a dark one')
    assert answer.gender in 'fm'

# Files

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder in ImageNet's layout with two classes, eight training pictures and four validation pictures"
    root = tmp_path_factory.mktemp('folders')
    for split,n in (('train',4),('valid',2)):
        for kind,colour in (('cup','red'),('car','blue')):
            (root/split/kind).mkdir(parents=True)
            for i in range(n): Image.new('RGB', (30,20+i), colour).save(root/split/kind/f'{kind}_{i}.png')
    return root

def test_from_folder_is_as_fastais(folder):
    from fastai.vision.data import ImageDataLoaders
    theirs = ImageDataLoaders.from_folder(folder, item_tfms=Resize(16), **small)
    ours = MultiDataLoaders.from_folder(folder, item_tfms=Resize(16), **small)
    assert list(ours.vocab) == list(theirs.vocab)
    assert [len(dl.dataset) for dl in ours.loaders] == [len(dl.dataset) for dl in theirs.loaders] == [8,4]
    x,y = ours.one_batch()
    assert x.shape == (4,3,16,16) and type(y).__name__ == 'TensorCategory'

def test_files_of_pictures_are_predicted_as_they_are(folder, tmp_path):
    from fastai.data.transforms import get_image_files
    from fastai.learner import load_learner
    dls = MultiDataLoaders.from_folder(folder, item_tfms=Resize(16), **small)
    learn = multi_learner(dls, simple_cnn(2), path=tmp_path)
    learn.export()
    files = get_image_files(folder/'valid')
    for l in (learn, load_learner(tmp_path/'export.pkl')):
        with l.no_bar():
            table = l.predict_df(files)
            assert len(table) == 4 and set(table.iloc[:,0]) <= {'cup','car'}
            assert str(l.predict(files[0])[0]) == table.iloc[0,0]

def test_a_label_function_of_several_outputs(folder):
    from fastai.data.transforms import get_image_files
    files = get_image_files(folder)
    labels = lambda f: dict(kind=f.parent.name, number=int(f.stem[-1])/2)
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_path_func(
        folder, files, labels, text_func=lambda f: f.parent.name, item_tfms=Resize(16), seed=1, **small))
    assert [p.kind for p in describe(dls).outputs.values()] == ['category','number'] and len(lines) == 3
    x,_ = dls.one_batch()
    assert x.keys() == ('image','text')
    with pytest.raises(ValueError, match="where a dict with a value for each of"):
        MultiDataLoaders.from_name_func(folder, files, lambda n: {'kind': n[0], n[0]: 1} if n[1]=='u' else {'kind': 'c'})

def test_lists_of_labels_for_each_output(folder):
    files = [f'train/cup/cup_{i}.png' for i in range(4)]*3
    dls = MultiDataLoaders.from_lists(folder, files, dict(kind=['a','b']*6, tags=[['x'],['x','y']]*6),
                                      outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock), item_tfms=Resize(16),
                                      **small)
    assert dls.one_batch()[1].tags.shape == (4,2)
    with pytest.raises(ValueError, match="holds 12 files, but 'label' has 3 values"):
        MultiDataLoaders.from_lists(folder, files, [1,2,3])

def test_a_missing_folder_is_named(folder):
    with pytest.raises(ValueError, match="in a folder 'val' of .* Did you mean 'valid'"):
        MultiDataLoaders.from_folder(folder, valid='val')

@pytest.mark.parametrize('arg', ['fn_col','label_col','y_block','text_col','y_names','blocks','get_y','n_out','vocab'])
def test_fastais_names_are_answered_with_ours(table, arg):
    folder,df = table
    with pytest.raises(KeyError) as e: MultiDataLoaders.from_df(df, folder, text='note', outputs=['gender'], **{arg: 'x'})
    assert f"`{arg}` is fastai's name. Here write " in str(e.value)

# Data sets

class Drawn(torch.utils.data.Dataset):
    "Pictures of random grey, with a mask of the same grey. Both must come from one call"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        grey = int(torch.randint(1, 200, (1,)))
        picture = np.full((16,16,3), grey, dtype=np.uint8)
        return dict(image=picture, note=f'note {i}'),dict(kind='ab'[i%2], price=torch.tensor(i/4), mask=picture[...,0])

def test_a_pytorch_data_set_with_names():
    from fastai.vision.data import MaskBlock
    outputs = dict(kind=CategoryBlock, price=RegressionBlock, mask=MaskBlock(codes=list(range(200))))
    dls = MultiDataLoaders.from_dsets(Drawn(12), Drawn(4), outputs=outputs, **small)
    assert [len(dl.dataset) for dl in dls.loaders] == [12,4]
    assert [i for dl in dls.loaders for i in dl.dataset.items.index] == list(range(16))
    x,y = dls.train.one_batch()
    assert ((x.image[:,0]*255).round().numpy() == y.mask.numpy()).all()
    learn = multi_learner(dls, simple_cnn(2))
    with learn.no_logging(), learn.no_bar():
        learn.fit(1)
        assert list(learn.predict_df(Drawn(3))['kind'].isin(['a','b'])) == [True]*3

def test_a_pytorch_data_set_infers_what_is_not_said():
    class Plain(Drawn):
        def __getitem__(self, i):
            x,y = super().__getitem__(i)
            return x,dict(kind=y['kind'], price=y['price'])
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_dsets(Plain(12), seed=1, **small))
    d = describe(dls)
    assert list(d.inputs) == ['image','text'] and list(d.outputs) == ['kind','price'] and len(lines) == 3
    assert len(dls.train_ds) == 10

def test_normalised_pictures_are_refused():
    class Normalised(Drawn):
        def __getitem__(self, i): return dict(image=torch.randn(3,8,8)*2),dict(kind='ab'[i%2])
    with pytest.raises(ValueError, match='before it is normalised'):
        MultiDataLoaders.from_dsets(Normalised(12), outputs=dict(kind=CategoryBlock), **small).one_batch()

@pytest.mark.parametrize('items, words', [([(1,2)]*9, 'must be a dict by name'), ([], 'is empty'),
                                          (iter([1]), 'has no length')])
def test_data_sets_without_names(items, words):
    with pytest.raises(TypeError, match=words): MultiDataLoaders.from_dsets(items)

@pytest.fixture
def hf(tmp_path):
    "A Hugging Face data set on disk"
    hub = pytest.importorskip('datasets')
    n = 16
    pictures = [Image.fromarray(np.full((20,30,3), 10*i, dtype=np.uint8)) for i in range(n)]
    pictures[3] = None
    columns = dict(photo=pictures, note=[f'note {i}' for i in range(n)], kind=[i%3 for i in range(n)],
                   tags=[['red'],['big','red']]*(n//2), price=[i/3 for i in range(n)], rest=['x']*n)
    features = hub.Features(dict(photo=hub.Image(), note=hub.Value('string'), kind=hub.ClassLabel(names=['cup','car','tree']),
                                 tags=hub.List(hub.Value('string')), price=hub.Value('float32'), rest=hub.Value('string')))
    hub.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path/'set')
    return hub.load_from_disk(tmp_path/'set')

def test_a_hugging_face_data_set(hf, tmp_path):
    from fastai.learner import load_learner
    kw = dict(image='photo', text='note', outputs=['kind','tags','price'], item_tfms=Resize(16), **small)
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_hf(hf, seed=1, **kw))
    assert list(dls.vocab['kind']) == ['cup','car','tree'] and len(lines) == 4     # in the order of the data set
    items = dls.train_ds.items
    assert 'rest' not in items and callable(items['photo'].iloc[0])    # pictures and unused columns stay on disk
    x,y = dls.test_dl(hf, with_labels=True).one_batch()
    grey = (x.image[:,0,0,0]*255).round().tolist()
    assert grey[:3] == [0,10,20] and bool(x.image[3].isnan().all())
    assert [dls.vocab['kind'][k] for k in y.kind] == ['cup','car','tree','cup']
    learn = multi_learner(dls, simple_cnn(2), path=tmp_path)
    with learn.no_logging(), learn.no_bar(): learn.fit(1)
    learn.export()
    assert len(load_learner(tmp_path/'export.pkl').predict_df(hf.select(range(3)))) == 3

def test_hugging_face_splits_and_selections(hf):
    parts = dict(train=hf.select(range(12)).shuffle(seed=1), validation=hf.select(range(12, 16)), test=hf)
    kw = dict(image='photo', outputs=dict(kind=CategoryBlock), item_tfms=Resize(16), **small)
    dls = MultiDataLoaders.from_hf(parts, **kw)
    assert [len(dl.dataset) for dl in dls.loaders] == [12,4]
    assert dls.valid.one_batch()[0][0,0,0,0]*255 == pytest.approx(120, abs=.1)
    assert [len(dl.dataset) for dl in MultiDataLoaders.from_hf(parts, valid='test', **kw).loaders] == [12,16]
    with pytest.raises(KeyError, match="Did you mean 'photo'"): MultiDataLoaders.from_hf(hf, **{**kw, 'image': 'phto'})
    with pytest.raises(TypeError, match='streaming'): MultiDataLoaders.from_hf(hf.to_iterable_dataset(), **kw)

def test_hugging_face_workers_read_from_disk(hf):
    kw = dict(image='photo', outputs=dict(kind=CategoryBlock), item_tfms=Resize(16), bs=4, device='cpu', seed=1)
    dls = MultiDataLoaders.from_hf(hf, num_workers=1, **kw)
    assert len(list(dls.train)) == 3

def test_any_other_data_is_no_hugging_face_data_set():
    with pytest.raises(TypeError, match='it takes a Hugging Face `datasets.Dataset`'):
        MultiDataLoaders.from_hf([1,2], text='note', outputs='kind')

# Splits

@pytest.fixture(scope='module')
def visits():
    "A table of 40 patients, each with 1 to 6 rows, with a rare class, tags and a skewed number"
    rng = np.random.default_rng(1)
    rows = []
    for p in range(40):
        for _ in range(1+p%6):
            rows.append(dict(note='a note', patient=f'p{p}', kind='rare' if rng.random()<.1 else 'often',
                             tags='|'.join(t for t in ('a','b') if rng.random()<.2) or '|', price=float(rng.exponential())))
    return pd.DataFrame(rows)

visit_outputs = dict(kind=CategoryBlock, tags=MultiCategoryBlock, price=RegressionBlock)

def visit_loaders(df, make=MultiDataLoaders.from_df, **kw):
    return make(df, text='note', outputs=visit_outputs, label_delim='|', **small, **kw)

def test_folds_keep_groups_together_and_cover_all_rows(visits):
    seen = []
    for dls in visit_loaders(visits, kfold_dls, folds=4, groups='patient', stratify=['kind','price']):
        train,valid = dls.train_ds.items,dls.valid_ds.items
        assert not set(train.patient) & set(valid.patient)
        assert abs(len(valid)-len(visits)/4) <= 2
        assert abs((valid.kind=='rare').mean()-(visits.kind=='rare').mean()) < .04
        seen += valid.index.tolist()
    assert sorted(seen) == list(range(len(visits)))

def test_folds_are_as_even_as_scikit_learns(visits):
    "The rare class is spread at least as evenly as by `StratifiedGroupKFold`, which stratifies only classes"
    from sklearn.model_selection import StratifiedGroupKFold
    theirs = [(visits.kind[v]=='rare').mean() for _,v in StratifiedGroupKFold(4).split(visits, visits.kind, visits.patient)]
    ours = [(dls.valid_ds.items.kind=='rare').mean()
            for dls in visit_loaders(visits, kfold_dls, folds=4, groups='patient', stratify='kind')]
    assert np.ptp(ours) <= np.ptp(theirs)+.01

def test_one_fold_is_the_same_in_every_call(visits):
    a,b = (visit_loaders(visits, folds=4, fold=2, groups='patient') for _ in range(2))
    assert a.valid_ds.items.index.tolist() == b.valid_ds.items.index.tolist()
    c = visit_loaders(visits, folds=4, fold=2, groups='patient', seed=5)
    assert c.valid_ds.items.index.tolist() != a.valid_ds.items.index.tolist()

def test_a_random_split_may_be_stratified_by_tags(visits):
    dls = visit_loaders(visits, valid_pct=.25, stratify='tags', seed=1)
    for tag in 'ab':
        share = visits.tags.str.contains(tag).mean()
        assert abs(dls.valid_ds.items.tags.str.contains(tag).mean()-share) < .02

def test_positions_masks_and_splitters(visits):
    from fastai.data.transforms import IndexSplitter
    n = len(visits)
    for kw in (dict(valid_idx=[3,7]), dict(valid_idx=np.isin(np.arange(n), [3,7])), dict(splitter=IndexSplitter([3,7]))):
        assert visit_loaders(visits, **kw).valid_ds.items.index.tolist() == [3,7]

@pytest.mark.parametrize('kw, words', [
    (dict(valid_idx=[1], valid_col='kind'), '`valid_col` and `valid_idx` are given'),
    (dict(valid_idx=[999]), 'holds the position 999; positions go from 0'),
    (dict(valid_idx=['p1']), 'valid_idx=df.index.isin'),
    (dict(folds=4, fold=4), 'a number from 0 to 3'), (dict(folds=1), 'it must be at least 2'),
    (dict(folds=50, groups='patient'), 'has 40 groups, but 50 folds'),
    (dict(stratify='kin'), "Did you mean 'kind'"), (dict(groups='patiens'), "Did you mean 'patient'"),
    (dict(splitter=3), '`splitter` is 3; it takes a function')])
def test_splits_that_cannot_be(visits, kw, words):
    with pytest.raises((ValueError,KeyError,TypeError)) as e: visit_loaders(visits, **kw)
    assert words in str(e.value)

# Numbers with a range and a scale

def priced(n=400, seed=0):
    "Texts with a word that tells the price, over four orders of magnitude, and stars from 0 to 4"
    rng = np.random.default_rng(seed)
    words = ['screw','lamp','bike','car']
    kind = rng.integers(0, 4, n)
    return pd.DataFrame(dict(note=[f'a {words[k]}' for k in kind], price=10.**(kind+rng.normal(0, .1, n)),
                             stars=np.clip(kind+rng.normal(1, .3, n), 0, 4)))

def fitted(df, outputs, **kw):
    dls = MultiDataLoaders.from_df(df, text='note', outputs=outputs, bs=64, num_workers=0, device='cpu', seed=1)
    learn = multi_learner(dls, **kw)
    with learn.no_logging(), learn.no_bar(): learn.fine_tune(4, 1e-2)
    return learn

def test_a_number_on_a_logarithmic_scale_is_in_the_users_units():
    df = priced()
    outputs = dict(price=NumberBlock(scale='log'), stars=NumberBlock(range=(0,4)))
    learn = fitted(df, outputs)
    with learn.no_bar():
        table = learn.predict_df(df)
        said = learn.evaluate()
        answer,_,_ = learn.predict('a screw')
    right = np.log10(table['price']/df['price']).abs()
    assert right.mean() < .15                                  # the relative error is small for small prices too
    assert table['stars'].min() >= 0 and table['stars'].max() <= 4
    assert float(answer.price) == pytest.approx(1, rel=.5)
    valid = learn.dls.valid_ds.items
    by_hand = (table['price']-df['price']).abs()[valid.index].mean()
    assert said['price_mae'] == pytest.approx(by_hand, rel=1e-3)

def test_a_logarithmic_scale_does_better_in_proportion_than_a_plain_number():
    df = priced()
    errors = []
    for block in (NumberBlock(scale='log'), RegressionBlock):
        learn = fitted(df, dict(price=block))
        with learn.no_bar(): table = learn.predict_df(df)
        errors.append((np.log10(table['price'].clip(lower=.01)/df['price'])).abs().mean())
    assert errors[0] < .5*errors[1]

def test_a_range_is_reached_and_not_passed():
    "A sigmoid never reaches its ends, but our predictions reach them and stop there"
    df = priced().assign(stars=lambda d: (d['price']>30)*4.)
    learn = fitted(df, dict(stars=NumberBlock(range=(0,4))))
    learn.model.heads['stars'].wide.bias.data += 1.
    with learn.no_bar():
        table = learn.predict_df(df)
        preds,_ = learn.get_preds()
    assert table['stars'].max() == 4 and table['stars'].min() >= 0
    part = learn.output_parts['stars']
    assert float(part.to_units(preds.stars).max()) == 4.

def test_values_beyond_a_range_are_found_with_their_row():
    df = priced().assign(stars=lambda d: d['stars'].where(d.index!=7, 9.))
    with pytest.raises(ValueError, match=r"Output 'stars' is 9, beyond its range from 0 to 4.*row 7"):
        fitted(df, dict(stars=NumberBlock(range=(0,4))))
    df = priced().assign(price=0.)
    with pytest.raises(ValueError, match="Use scale='log1p'"): fitted(df, dict(price=NumberBlock(scale='log')))

def test_a_sigmoid_on_standardised_values_is_refused():
    from fastai.layers import SigmoidRange
    df = priced()
    dls = MultiDataLoaders.from_df(df, text='note', outputs=dict(stars=RegressionBlock), **small)
    with pytest.raises(ValueError, match='NumberBlock'):
        multi_learner(dls, heads=dict(stars=torch.nn.Sequential(torch.nn.LazyLinear(1), SigmoidRange(0,4))))

def test_several_scaled_numbers_survive_export(tmp_path):
    from fastai.learner import load_learner
    df = priced()
    dls = MultiDataLoaders.from_df(df.assign(twice=2*df['price']), text='note', outputs=dict(both=NumberBlock(scale='log1p')),
                                   columns=dict(both=['price','twice']), seed=1, **small)
    learn = multi_learner(dls, path=tmp_path)
    learn.export()
    a,b = (l.predict('a bike')[0].both for l in (learn, load_learner(tmp_path/'export.pkl')))
    assert len(a) == 2 and torch.allclose(torch.as_tensor(a), torch.as_tensor(b)) and min(a) > 0

@pytest.mark.parametrize('arg', ['ps','y_range','concat_pool','cut','n_out','lin_ftrs','custom_head'])
def test_fastais_names_in_multi_learner_are_answered(table, arg):
    folder,df = table
    dls = MultiDataLoaders.from_df(df, folder, text='note', outputs=dict(gender=CategoryBlock), **small)
    with pytest.raises(KeyError) as e: multi_learner(dls, **{arg: 1})
    assert f"`{arg}` is fastai's name. Here write " in str(e.value)
