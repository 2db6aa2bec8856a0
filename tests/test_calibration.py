"Calibrated probabilities, and prediction sets that contain the label as often as you ask"
import subprocess, sys
import pytest
from fastai.vision.all import *
from fastai_multi import *

def _rows(n, seed):
    "A table of two numbers that predict a class and an amount, with noise"
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n,2))
    p = 1/(1+np.exp(-2*x[:,0]))
    kind = np.where(rng.random(n)<p, 'cup', 'hat')
    return pd.DataFrame(dict(a=x[:,0], b=x[:,1], kind=kind, amount=3*x[:,1]+rng.normal(size=n),
                             split=np.arange(n)%2==0))

def _dls(df):
    return MultiDataLoaders.from_df(df, features=['a','b'], outputs=dict(kind=CategoryBlock, amount=RegressionBlock),
                                    valid_col='split', bs=32, num_workers=0)

@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    res = multi_learner(_dls(_rows(600, 0)), heads=dict(kind=[64], amount=[]))
    with res.no_bar(), res.no_logging(): res.fit(40, 1e-2)
    return res

def test_probabilities_become_honest(learn):
    item = _rows(1, 5).iloc[0]
    temperature = learn.calibrate().outputs['kind'].temperature
    loud = learn.model.heads['kind'].register_forward_hook(lambda head, x, out: 4*out)
    learn.calibration = None
    before = learn.predict(item)[2].kind
    kind = learn.calibrate().outputs['kind']
    after = learn.predict(item)[2].kind
    loud.remove()
    assert kind.temperature==pytest.approx(4*temperature, rel=.02)
    assert kind.error<.5*kind.error_before
    assert after.max()<before.max() and after.argmax()==before.argmax()

def test_sets_hold_the_truth_as_often_as_asked(learn):
    learn.calibrate()
    new = _rows(3000, 1)
    for joint in (False, True):
        sets = learn.predict_sets(new, .8, joint, num_workers=0, bs=256)
        kind = np.array([k in s for k,s in zip(new.kind, sets.kind)])
        amount = np.array([low<=v<=high for v,(low,high) in zip(new.amount, sets.amount)])
        if joint: assert (kind&amount).mean()==pytest.approx(.8, abs=.06)
        else:
            assert kind.mean()>=.75                   # sets of whole classes cover at least this share
            assert amount.mean()==pytest.approx(.8, abs=.06)

def test_sets_of_one_item_are_those_of_the_table(learn):
    learn.calibrate()
    new = _rows(3, 2)
    sets = learn.predict_sets(new, .9, num_workers=0)
    one = learn.predict(new.iloc[1], coverage=.9)[0]
    assert one['kind']==sets.kind[1]
    assert one['amount']==pytest.approx(sets.amount[1])

CODE = '''
import sys, warnings
warnings.simplefilter('ignore')
from fastai.vision.all import *
learn = load_learner(sys.argv[1])
import pandas as pd
print(learn.predict_sets(pd.read_csv(sys.argv[2]), .9, num_workers=0).to_csv())
'''
def test_an_exported_learner_keeps_its_calibration(learn, tmp_path):
    learn.calibrate()
    new = _rows(4, 3)
    new.to_csv(tmp_path/'new.csv', index=False)
    learn.path = tmp_path
    learn.export('calibrated.pkl')
    said = subprocess.run([sys.executable, '-c', CODE, tmp_path/'calibrated.pkl', tmp_path/'new.csv'],
                          capture_output=True, text=True, check=True).stdout
    own = learn.predict_sets(pd.read_csv(tmp_path/'new.csv'), .9, num_workers=0).to_csv()
    assert said.strip()==own.strip()

def test_training_forgets_it_and_mistakes_are_answered(learn):
    learn.calibrate()
    item = _rows(1, 5).iloc[0]
    for coverage in (0, 1, '.9'):
        with pytest.raises(ValueError, match='a probability between 0 and 1'): learn.predict(item, coverage=coverage)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-9)
    assert learn.calibration is None
    with pytest.raises(ValueError, match=r'learn.calibrate\(\)'): learn.predict(item, coverage=.9)
    with pytest.raises(ValueError, match=r'learn.calibrate\(\)'): learn.predict_sets(_rows(2, 1))
