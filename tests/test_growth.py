"Long tables take bounded time, and give the same classes and messages as short ones"
import gc
import numpy as np, pandas as pd, pytest
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import ask_each, gc_paused, is_missing
from fastai_multi.data.outputs import CategoryPart
from benchmarks.growth import loaders, table

pytestmark = pytest.mark.usefixtures('one_thread')

def test_a_question_for_each_class_not_for_each_row(monkeypatch):
    asked = []
    own = CategoryPart.is_missing
    monkeypatch.setattr(CategoryPart, 'is_missing', lambda self, v: asked.append(v) or own(self, v))
    dls = loaders(table(3000, 2), text=False)
    dls.one_batch()
    assert len(asked)<200 and gc.isenabled()
    assert list(dls.vocab['k0'])==[str(i) for i in range(10)]

@pytest.mark.parametrize('values', [['b','a',None,'b'], [3,1,math.nan,3], [True,False,True,None],
                                    ['a',None,math.nan,'b']])
def test_the_same_classes_as_one_by_one(values):
    df = pd.DataFrame(dict(x=np.arange(24.), k=pd.Series(values*6, dtype=object)))
    dls = MultiDataLoaders.from_df(df, image=None, features=['x'], outputs=dict(k=CategoryBlock), bs=4, num_workers=0)
    here = {v for v in values if not is_missing(v)}
    assert set(dls.vocab['k'])==here and list(dls.vocab['k'])==sorted(here)
    n = sum(is_missing(v) for v in values)*6
    column = pd.concat([pd.Series(dl.column('k').missing) for dl in dls.loaders])
    assert column.sum()==n

def test_messages_name_the_row():
    df = pd.DataFrame(dict(x=np.arange(8.), k=['a','b','a',['c'],'a','b','a','b'], v=[False]*6+[True]*2))
    with pytest.raises(ValueError, match='k') as e:
        MultiDataLoaders.from_df(df, image=None, features=['x'], outputs=dict(k=CategoryBlock), valid_col='v', bs=2)
    assert '3' in str(e.value)

def test_blank_cells_are_no_labels():
    df = pd.DataFrame(dict(x=np.arange(12.), k=['a',' ','b','']*3))
    dls = MultiDataLoaders.from_df(df, image=None, features=['x'], outputs=dict(k=CategoryBlock), bs=2, num_workers=0)
    assert list(dls.vocab['k'])==['a','b']

def test_questions_are_asked_once():
    assert ask_each(is_missing, ['a',None,'a']).tolist()==[False,True,False]
    assert ask_each(is_missing, []).tolist()==[]
    with gc_paused(): assert not gc.isenabled()
    assert gc.isenabled()
