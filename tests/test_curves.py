"`find_rates` and `learning_curves`: their results, and that they do not change the learner"
import random
import pytest
from matplotlib import pyplot as plt
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.curves import own_parts

pytestmark = pytest.mark.usefixtures('one_thread')

def _rows(n=96):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n,2))
    return pd.DataFrame(dict(a=x[:,0], b=x[:,1], kind=np.where(x[:,0]>0, 'cup', 'hat'), amount=x[:,1],
                             is_valid=np.arange(n)%3==0))

def _learner(outputs=('kind','amount'), **kwargs):
    blocks = dict(kind=CategoryBlock, amount=RegressionBlock)
    dls = MultiDataLoaders.from_df(_rows(), features=['a','b'], outputs={n: blocks[n] for n in outputs},
                                   valid_col='is_valid', bs=16, num_workers=0)
    return multi_learner(dls, heads={n: [16] for n in outputs}, **kwargs)

@pytest.fixture
def learn():
    set_seed(0)
    res = _learner()
    with res.no_bar(), res.no_logging(): res.fit(1, 1e-2)
    return res

def test_it_leaves_the_learner_and_the_random_numbers_as_they_were(learn):
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    order = learn.dls.train.rng.getstate()
    state = torch.get_rng_state()
    rates = find_rates(learn, show_plot=False)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert learn.dls.train.rng.getstate()==order and torch.equal(torch.get_rng_state(), state)
    assert rates==find_rates(learn, show_plot=False)         # the learner is unchanged, so the result is the same
    assert rates and all(1e-6<=lr<=10 for lr in rates.values())

def test_a_part_that_is_frozen_or_moves_nothing_has_no_rate(learn):
    learn.freeze('kind')
    assert 'kind' not in own_parts(learn.plain_model)
    with pytest.raises(KeyError, match='Unknown part'): find_rates(learn, 'kind')
    learn.unfreeze('kind')
    assert set(find_rates(learn, ['amount'], show_plot=False))<={'amount'}

def test_one_picture_has_all_parts(learn):
    ax = plt.subplots()[1]
    find_rates(learn, ax=ax)
    said = [t.get_text().split(':')[0] for t in ax.get_legend().get_texts()]
    assert said==list(own_parts(learn.plain_model))
    plt.close('all')

def test_balanced_gradients_and_one_output(learn):
    balanced = _learner(cbs=UncertaintyWeighting())
    with balanced.no_bar(), balanced.no_logging(): balanced.fit(1, 1e-2)
    assert find_rates(balanced, show_plot=False)
    one = _learner(('kind',))
    with one.no_bar(), one.no_logging(): one.fit(1, 1e-2)
    assert set(find_rates(one, show_plot=False))<={'kind','trunk','features'}

def test_courses_are_those_of_the_recorder():
    seen = []
    def fit(learn):
        learn.fit(1, 1e-2)
        learn.evaluate()
        learn.fit(1, 1e-2)
        seen.append([learn.evaluate()[c] for c in ('kind_accuracy','amount_mae')])
    state = torch.get_rng_state()
    curves = learning_curves(_learner, fit, seeds=[3,4])
    assert torch.equal(torch.get_rng_state(), state)
    last = curves.runs.query('epoch==2').pivot(index='seed', columns='output', values='value')
    assert last[['kind','amount']].to_numpy()==pytest.approx(np.array(seen), abs=1e-4)
    assert curves.table.loc[('kind',2),'high']==pytest.approx(last.kind.max())
    axs = curves.plot()
    assert [ax.get_title() for ax in axs]==['kind (higher is better)','amount (lower is better)']
    assert 'kind' in repr(curves) and '<table' in curves._repr_html_()
    plt.close('all')
