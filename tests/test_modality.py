"`modality_check` on models of which it is known what they read"
import math
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.modality import ChangedInput, ModalityCheck, of_another_item

pytestmark = pytest.mark.usefixtures("one_thread")

class Reads(nn.Module):
    "Says the answer that its vector `name` holds, and looks at no other input"
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, x):
        v = x[self.name].nan_to_num(0.)
        return Outputs.of('kind', 'size')([self.scale*20*v[:,:2], self.scale*v[:,2]])

@pytest.fixture(scope='module')
def loaders():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 120)
    size = rng.normal(size=120)
    vectors = np.stack([kind==0, kind==1, (size-size[::2].mean())/size[::2].std()], 1).astype(np.float32)
    df = pd.DataFrame(dict(kind=kind, size=size, valid=np.arange(120)%2==1))
    df['a'] = list(vectors)
    df['b'] = list(rng.normal(size=(120,3)).astype(np.float32))
    block = DataBlock((MultiInputBlock(a=FeaturesBlock, b=FeaturesBlock),
                       MultiOutputBlock(kind=CategoryBlock, size=RegressionBlock)),
                      get_x=lambda r: dict(a=r.a, b=r.b), get_y=lambda r: dict(kind=r.kind, size=r['size']),
                      splitter=ColSplitter('valid'))
    return MultiDataLoaders.from_dblock(block, df, bs=16, num_workers=0)

@pytest.fixture(scope='module')
def check(loaders): return modality_check(MultiLearner(loaders, Reads('a')))

def test_an_input_that_is_not_read_changes_nothing(check):
    unread = check.table.xs('b', level='input')
    assert (unread.difference==0).all()
    assert ('kind','b') in check.ignored and ('size','b') in check.ignored

def test_an_input_that_is_read_is_missed(check):
    assert ('kind','a') not in check.ignored and ('size','a') not in check.ignored
    shuffled = check.table.xs('shuffled', level='change').xs('a', level='input')
    assert shuffled.loc['kind'].unchanged==1 and .3<shuffled.loc['kind'].changed<.7
    assert shuffled.loc['size'].unchanged<1e-3<shuffled.loc['size'].changed

def test_absent_is_what_the_model_gets_for_a_missing_input(check):
    absent = check.table.xs('absent', level='change').xs('a', level='input')
    assert absent.loc['size'].changed>absent.loc['size'].unchanged

def test_the_words_say_it(check):
    sentences = check.sentences()
    assert sentences[0].startswith('kind reads a: with the a of another item its accuracy is worse by')
    assert sentences[1].startswith('kind seems to ignore b:')
    assert all(s in repr(check) for s in sentences)

def test_nothing_is_changed_by_the_check(loaders):
    learn = MultiLearner(loaders, Reads('a'))
    before = learn.evaluate()
    state = torch.get_rng_state()
    modality_check(learn)
    assert torch.equal(torch.get_rng_state(), state)
    assert learn.evaluate()==before
    assert not any(isinstance(cb, ChangedInput) for cb in learn.cbs)

def test_it_is_drawn(check):
    axs = check.plot()
    assert [ax.get_title() for ax in axs]==['kind','size']
    assert [t.get_text() for t in axs[0].get_yticklabels()]==['a absent','a shuffled','b absent','b shuffled']
    plt.close('all')

def test_a_harmful_input_is_named(loaders):
    class Wrong(Reads):
        def forward(self, x):
            y = super().forward(x)
            return type(y)([-y.kind, y['size']])
    sentences = modality_check(MultiLearner(loaders, Wrong('a'))).sentences()
    assert sentences[0].startswith('kind is better without its own a')
