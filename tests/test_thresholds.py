"Tags have one threshold, which displays, predictions, exported files and loaded learners all use"
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import *
from fastai_multi import *

N = 120

@pytest.fixture(scope='module')
def table():
    "A table of features that give the probability of each of three tags. Some tags are missing"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N,3))
    there = rng.random((N,3)) < 1/(1+np.exp(2-2*x))
    tags = ['|'.join(t for t,h in zip('abc', row) if h) or '|' for row in there]
    df = pd.DataFrame(dict(tags=tags, kind=np.where(x[:,0]>0, 'up', 'down'), **{f'x{i}': x[:,i] for i in range(3)}))
    df.loc[::10,'tags'] = None
    return df

def learner(df, outputs=None, columns=None, **kwargs):
    outputs = outputs or dict(tags=MultiCategoryBlock, kind=CategoryBlock)
    dls = MultiDataLoaders.from_df(df, features=['x0','x1','x2'], image=None, outputs=outputs, columns=columns,
                                   label_delim='|', bs=16, seed=0, num_workers=0)
    torch.manual_seed(0)
    learn = multi_learner(dls, **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(2, 1e-2)
    return learn

@pytest.mark.parametrize('by_tag', [False, True])
def test_everything_follows_the_threshold(table, tmp_path, by_tag):
    learn = learner(table)
    before = learn.evaluate()
    choice = learn.tune_thresholds(by_tag=by_tag)['tags']
    after = learn.evaluate()
    assert before['tags_f1'] == pytest.approx(choice.before)
    assert after['tags_f1'] == pytest.approx(choice.f1)
    assert after['tags_f1'] > before['tags_f1']
    assert after['tags_map'] == before['tags_map']                  # mAP needs no threshold
    probs,_,dec = learn.get_preds(with_decoded=True)
    vocab = learn.output_parts['tags'].vocab
    cuts = choice.threshold
    if by_tag: cuts = tensor([cuts[t] for t in vocab])
    assert torch.equal(dec.tags, probs.tags>cuts)
    valid = learn.dls.valid.items
    said = learn.predict_df(valid).tags
    want = [[t for t,d in zip(vocab, row) if d] for row in dec.tags]
    assert [*said] == want
    assert [*learn.predict(valid.iloc[3])[0].tags] == want[3]
    learn.export(tmp_path/'export.pkl')
    again = load_learner(tmp_path/'export.pkl')
    assert [*again.predict_df(valid).tags] == want
    dl = again.dls.test_dl(valid, with_labels=True)
    assert again.evaluate(dl=dl)['tags_f1'] == pytest.approx(choice.f1)
    learn.save(tmp_path/'weights')
    learn.tasks['tags'].threshold = .999
    learn.load(tmp_path/'weights')                                  # the weights file has the threshold
    assert learn.evaluate()['tags_f1'] == pytest.approx(choice.f1)
    other = deepcopy(learn)
    other.tasks['tags'].threshold = .999                            # a copy has its own threshold
    assert other.evaluate()['tags_f1'] < choice.f1
    assert learn.evaluate()['tags_f1'] == pytest.approx(choice.f1)

def test_one_for_each_tag_is_at_least_as_good(table):
    learn = learner(table)
    one = learn.tune_thresholds()['tags'].f1
    assert learn.tune_thresholds(by_tag=True)['tags'].f1 >= one

def test_it_says_what_it_chose(table, capsys):
    learn = learner(table)
    learn.logger = print
    capsys.readouterr()
    learn.tune_thresholds()
    said = capsys.readouterr().out
    assert said.startswith('`tags`: tags are predicted above a probability of 0.')
    assert 'F1' in said and 'before' in said

def test_a_loss_with_a_threshold_of_its_own(table):
    learn = learner(table, loss_func=dict(tags=BCEWithLogitsLossFlat(thresh=.3)))
    probs,targs = learn.get_preds()
    assert learn.evaluate()['tags_f1'] == pytest.approx(float(f1_multi((probs.tags>.3).float()-.5, targs.tags)))
    learn.tune_thresholds()
    assert learn.loss_func.funcs['tags'].thresh == learn.tasks['tags'].threshold
    learn = learner(table, loss_func=dict(tags=nn.BCEWithLogitsLoss()))
    choice = learn.tune_thresholds()['tags']
    assert learn.evaluate()['tags_f1'] == pytest.approx(choice.f1)

def test_one_output_without_a_name(table):
    learn = learner(table, outputs=MultiCategoryBlock, columns='tags')
    assert learn.metrics.attrgot('name') == ['map','f1']
    choice, = learn.tune_thresholds().values()
    assert learn.evaluate()['f1'] == pytest.approx(choice.f1)

def test_without_tags_it_says_so(table):
    with pytest.raises(ValueError, match='no threshold to tune: it needs an output of tags'):
        learner(table, outputs=dict(kind=CategoryBlock)).tune_thresholds()
