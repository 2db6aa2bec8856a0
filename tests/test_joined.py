"`MultiDataLoaders.from_tables` joins several tables with different outputs, classes and inputs"
import pandas as pd
import pytest
import torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.data.joined import SourceBatches

@pytest.fixture(autouse=True)
def single(one_thread): pass

@pytest.fixture(scope='module')
def items(shapes): return pd.read_csv(shapes/'items.csv')

def two_tables(items):
    "Two tables: the first half of the pictures has kinds and captions, the second half kinds, tags and areas"
    half = len(items)//2
    one = dict(df=items[:half], text='caption', outputs=dict(kind=CategoryBlock))
    other = dict(df=items[half:], outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock),
                 label_delim=dict(tags='|'))
    return dict(named=one, measured=other)

def joined(tables, path, **kwargs):
    kwargs = {**dict(image='file', item_tfms=Resize(32), bs=8, seed=0, num_workers=0, verbose=False), **kwargs}
    return MultiDataLoaders.from_tables(tables, path, **kwargs)

def test_what_a_table_lacks_is_missing(items, shapes):
    dls = joined(two_tables(items), shapes)
    for dl in dls.loaders:
        dl = dl.new(shuffle=False, drop_last=False, bs=len(dl.dataset))
        x,y = dl.one_batch()
        measured = torch.tensor((dl.items.source=='measured').tolist())
        assert 0 < measured.sum() < len(measured)
        assert torch.equal(~y.area.isnan(), measured)
        assert torch.equal(~y.tags.isnan().any(1), measured)
        classes = [dls.vocab['kind'][k] for k in y.kind]
        assert classes == dl.items.kind.tolist()
        assert classes == items.set_index('file').kind[dl.items.file].tolist()
    lacks = dls.train.items.caption.isna()
    assert torch.equal(torch.tensor(lacks.tolist()), torch.tensor((dls.train.items.source=='measured').tolist()))

def test_each_table_is_split_by_itself(items, shapes):
    tables = two_tables(items)
    tables['named']['valid_pct'] = 0
    tables['measured']['valid_pct'] = .5
    dls = joined(tables, shapes)
    assert set(dls.valid.items.source) == {'measured'}
    assert len(dls.valid.items) == len(tables['measured']['df'])//2
    assert (dls.train.items.source=='named').sum() == len(tables['named']['df'])

def test_classes_are_merged_and_told(items, shapes, capsys):
    kinds = sorted(items.kind.unique())
    tables = {n: dict(df=items[items.kind.isin(k)], outputs=dict(kind=CategoryBlock), valid_pct=.3)
              for n,k in dict(a=kinds[:2], b=kinds[1:]).items()}
    tables['a']['df'] = tables['a']['df'].iloc[::2]
    tables['b']['df'] = tables['b']['df'].iloc[1::2]
    with pytest.warns(UserWarning, match='left out') if set(tables['a']['df'].file)&set(tables['b']['df'].file) \
        else nullcontext(): dls = joined(tables, shapes, verbose=True)
    assert list(dls.vocab['kind']) == kinds
    said = capsys.readouterr().out
    assert f'kind: {len(kinds)} classes' in said
    assert f'{kinds[:2]} in a' in said

def test_training_mixed_and_by_source(items, shapes):
    "Losses stay finite if a whole batch lacks an output, and every batch comes from one table"
    dls = joined(two_tables(items), shapes, batches='source')
    missing = set()
    for x,y in dls.train:
        gone = y.area.isnan()
        assert gone.all() or not gone.any()
        missing.add(bool(gone[0]))
    assert missing == {True, False}
    for way in ('source', 'mixed'):
        set_seed(0)
        learn = multi_learner(joined(two_tables(items), shapes, batches=way), simple_cnn(depth=2), text='bag')
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        assert np.isfinite(list(learn.evaluate().values())).all()
    answer = learn.predict(items.iloc[0])[0]
    assert set(answer.keys()) >= {'kind','tags','area'}

def test_shares(items, shapes):
    half = len(items)//2
    tables = [dict(df=items[:half], outputs=['kind']), dict(df=items[half:], outputs=['kind'])]
    for way in ('mixed', 'source'):
        set_seed(0)
        dls = joined(tables, shapes, shares=[.8, .2], batches=way, bs=4)
        drawn = []
        for _ in range(10): drawn += dls.train.items.source.iloc[list(dls.train.get_idxs())].tolist()
        assert .7 < np.mean([s=='table 1' for s in drawn]) < .9

def test_batches_by_source_show_each_row_once():
    drawn = list(SourceBatches(list('aabbbb'), 2))
    assert sorted(drawn) == list(range(6))

def test_the_same_picture_in_two_tables(items, shapes):
    "A validation picture of one table is not a training picture of the other"
    tables = [dict(df=items, outputs=dict(kind=CategoryBlock), seed=1),
              dict(df=items, outputs=dict(area=RegressionBlock), seed=2)]
    with pytest.warns(UserWarning, match='show a picture that another table uses for validation'):
        dls = joined(tables, shapes)
    assert not set(dls.train.items.file) & set(dls.valid.items.file)

def test_objects_of_half_of_the_classes(items, shapes):
    "A picture was annotated only for the classes of its own table, and members that the table lacks are missing"
    boxes = pd.read_csv(shapes/'boxes.csv')
    half = len(items)//2
    warm = boxes.colour.isin(['red','yellow','pink'])
    one = ObjectsBlock(colour=CategoryBlock)
    other = ObjectsBlock(colour=CategoryBlock, kind=CategoryBlock)
    tables = dict(warm=dict(df=items[:half], objects=boxes[warm], outputs=dict(objects=one)),
                  cold=dict(df=items[half:], objects=boxes[~warm], columns=dict(objects=dict(kind='label')),
                            outputs=dict(objects=other)))
    dls = joined(tables, shapes)
    vocab = list(dls.vocab['objects.colour'])
    assert set(vocab) == set(boxes.colour)
    dl = dls.train.new(shuffle=False, drop_last=False, bs=len(dls.train.dataset))
    y = dl.one_batch()[1].objects
    for source,looked,colour,kind in zip(dl.items.source, y.looked_for, y.colour, y.kind):
        own = {'red','yellow','pink'} if source=='warm' else {'blue','green'}
        assert {c for c,o in zip(vocab, looked) if o==1} == own
        assert {vocab[c] for c in colour[colour!=-100]} <= own
        assert (kind!=-100).sum() == (0 if source=='warm' else (colour!=-100).sum())

def test_folders_and_masks(items, shapes, tmp_path):
    "The files of inputs and masks are found in the folder of their own table"
    import shutil
    for k in range(2):
        folder = tmp_path/str(k)
        folder.mkdir()
        for f in items.file[k*10:k*10+10]:
            shutil.copy(shapes/f, folder)
            PILMask.create(np.full((64,64), k, dtype=np.uint8)).save(folder/f'{Path(f).stem}.png')
    tables = []
    for k in range(2):
        df = pd.DataFrame(dict(file=[Path(f).name for f in items.file[k*10:k*10+10]]))
        df['mask'] = [f'{Path(f).stem}.png' for f in df.file]
        tables.append(dict(df=df, folder=str(k), outputs=dict(mask=MaskBlock(codes=['no','yes']))))
    dls = joined(tables, tmp_path, valid_pct=.5, bs=2)
    dl = dls.train.new(shuffle=False, bs=10)
    y = dl.one_batch()[1]
    assert y.mask.flatten(1).float().mean(1).tolist() == [0.]*5+[1.]*5

def test_mistakes(items, shapes):
    def call(tables, **kwargs): return joined(tables, shapes, **kwargs)
    kinds = dict(df=items, outputs=dict(kind=CategoryBlock))
    for tables,message in {
        'items.csv': '`tables` is .*it takes a list of dicts',
        (): '`tables` is',
    }.items():
        with pytest.raises(TypeError, match=message): call(tables)
    with pytest.raises(TypeError, match='outputs by name'): call([dict(df=items, outputs=CategoryBlock)])
    with pytest.raises(TypeError, match='it takes a pandas DataFrame'): call([dict(df='items.csv', outputs=['kind'])])
    with pytest.raises(ValueError, match='kind number in another|is of the kind category in one table'):
        call([kinds, dict(df=items, outputs=dict(kind=RegressionBlock), columns=dict(kind='area'))])
    with pytest.raises(ValueError, match='use the classes of all tables'):
        call([kinds, dict(df=items, outputs=dict(kind=CategoryBlock(vocab=sorted(items.kind.unique()))))])
    with pytest.raises(KeyError, match='argument of the table'): call([dict(kinds, imag='file')])
    with pytest.raises(ValueError, match='too few for a batch of 500'): call([kinds], batches='source', bs=500)
    with pytest.raises(KeyError, match='way in `batches`'): call([kinds], batches='sources')
    with pytest.raises(ValueError, match='for each table of'): call([kinds], shares=[1,2])
    with pytest.raises(ValueError, match='both need some'): call([dict(kinds, valid_pct=0)])
    with pytest.raises(ValueError, match='give that output another name'):
        call([dict(df=items, outputs=dict(file=CategoryBlock), columns=dict(file='kind'))])
