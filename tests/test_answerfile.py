"Answers that a long table writes to a file equal those in memory, even after a run was killed"
import json
import numpy as np, pandas as pd, pytest
from fastai.vision.all import *
from fastai_multi import *

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    torch.manual_seed(0)
    path = multi_shapes(tmp_path_factory.mktemp('data')/'shapes', n=40, size=32, seed=0)
    outputs = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock, box=BBoxBlock)
    dls = MultiDataLoaders.from_csv(path, 'items.csv', image='file', text='caption', label_delim='|', bs=8,
        num_workers=0, outputs=outputs, columns=dict(box=['x1','y1','x2','y2']))
    return multi_learner(dls, resnet18, pretrained=False)

@pytest.fixture
def table(learn): return pd.read_csv(learn.path/'items.csv')

def read(file):
    back = pd.read_csv(file, index_col=0)
    for o in ('tags','box'): back[o] = back[o].map(json.loads)
    return back

def same(back, want):
    assert list(back.columns)==list(want.columns) and list(back.index)==list(want.index)
    assert list(back.kind)==list(want.kind)
    assert [list(o) for o in back.tags]==[list(o) for o in want.tags]
    np.testing.assert_allclose(back.area, want.area, rtol=1e-4)
    np.testing.assert_allclose(np.stack(back.box), np.stack(want.box), atol=1e-2)

def test_a_file_holds_what_the_table_holds(learn, table, tmp_path):
    table.index = table.index+100
    want = learn.predict_df(table)
    file = learn.predict_df(table, to=tmp_path/'a.csv', chunk=7)
    same(read(file), want)
    assert [o.name for o in tmp_path.iterdir()]==['a.csv']      # no progress file is left

def test_an_iterator_of_tables_and_a_list(learn, table, tmp_path):
    want = learn.predict_df(table)
    pieces = pd.read_csv(learn.path/'items.csv', chunksize=9)
    same(read(learn.predict_df(pieces, to=tmp_path/'a.csv')), want)
    items = [row for _,row in table.iterrows()]
    same(read(learn.predict_df(items, to=tmp_path/'b.csv', chunk=11)), want)

def test_parquet_with_probabilities(learn, table, tmp_path):
    pytest.importorskip('pyarrow', reason='Parquet files need pyarrow')
    want = learn.predict_df(table, with_probs=True)
    back = pd.read_parquet(learn.predict_df(table, to=tmp_path/'a.parquet', chunk=16, with_probs=True))
    same(back, want)
    np.testing.assert_allclose(back.kind_confidence, want.kind_confidence, rtol=1e-4)

class Killed(Exception): pass

def test_a_run_goes_on_where_it_was_stopped(learn, table, tmp_path, monkeypatch):
    want = learn.predict_df(table)
    seen = []
    plain = learn._table_of
    def until_third(piece, *args):
        seen.append(len(piece))
        if len(seen)==3: raise Killed
        return plain(piece, *args)
    learn._table_of = until_third
    with pytest.raises(Killed): learn.predict_df(table, to=tmp_path/'a.csv', chunk=8)
    with (tmp_path/'a.csv').open('a') as f: f.write('half a ro')
    file = learn.predict_df(table, to=tmp_path/'a.csv', chunk=10, resume=True)
    del learn._table_of
    assert seen==[8,8,8, 4,10,10]       # 16 were done; the chunks end at the same rows
    same(read(file), want)
    assert learn.predict_df(table, to=file, resume=True)==file and len(seen)==6       # finished: no prediction

def test_other_weights_do_not_go_on(learn, table, tmp_path):
    learn._table_of = lambda piece, *args: pd.DataFrame(dict(kind=['a']))
    pieces = iter([table[:1], 'not a table'])
    with pytest.raises(TypeError, match='pass an iterator of tables'): learn.predict_df(pieces, to=tmp_path/'a.csv')
    del learn._table_of
    with torch.no_grad(): first(learn.model.parameters()).add_(1)
    with pytest.raises(ValueError, match='started with the answers of different weights'):
        learn.predict_df(table, to=tmp_path/'a.csv', resume=True)

@pytest.mark.parametrize('kw, error, words', [
    (dict(resume=True), ValueError, "name it, for example to='answers.csv'"),
    (dict(to='a.txt'), KeyError, "ending of `to` '.txt'"),
    (dict(to='no/folder/a.csv'), FileNotFoundError, 'Create it first'),
    (dict(to='a.csv', chunk=0), ValueError, 'a whole number above 0'),
    (dict(to='a.csv', nonsense=1), KeyError, 'nonsense')], ids=['resume','ending','folder','chunk','option'])
def test_wrong_arguments(learn, table, kw, error, words):
    with pytest.raises(error, match=words): learn.predict_df(table, **kw)

@pytest.mark.parametrize('items, error', [(None, TypeError), ('a.csv', TypeError), ([], ValueError),
                                          (iter([]), ValueError)], ids=['none','path','list','iterator'])
def test_wrong_items(learn, tmp_path, items, error):
    with pytest.raises(error, match='`items`'): learn.predict_df(items, to=tmp_path/'a.csv')
