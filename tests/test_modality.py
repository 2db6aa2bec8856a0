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

def test_one_learner_for_each_set_of_inputs(shapes):
    "Each is trained on its own inputs, from the same seeds, and the random state is put back"
    columns = dict(image='file', text='caption')
    built = []
    def learner_of(inputs):
        built.append(list(inputs))
        dls = MultiDataLoaders.from_csv(shapes, 'items.csv', **{n: columns[n] for n in inputs}, seed=0, bs=16,
                                        outputs=dict(colour=CategoryBlock, area=RegressionBlock), item_tfms=Resize(32))
        return multi_learner(dls, simple_cnn(1, width=4) if 'image' in inputs else None)
    set_seed(1)
    want = torch.rand(1)
    set_seed(1)
    found = compare_inputs(learner_of, ['image','text'], fit=1, seeds=[3])
    assert torch.equal(torch.rand(1), want)
    assert built==[['image','text'],['image'],['text']]
    assert list(found.table.columns)==['metric','image','text','image + text','best alone','gain','spread']
    assert set(found.table.index)=={'colour','area'} and 'say little about the spread' in found.sentences()[-1]

def test_the_average_of_the_best_epochs_of_a_learner(shapes):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', text='caption', seed=0, bs=16,
                                    outputs=dict(colour=CategoryBlock, area=RegressionBlock))
    learn = multi_learner(dls)
    soup = ModelSoup(2, monitor='colour_accuracy')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 1e-2, cbs=soup)
    columns = list(learn.recorder.metric_names[1:])
    scores = [v[columns.index('colour_accuracy')] for v in learn.recorder.values]
    assert soup.averaged==sorted(sorted(range(4), key=lambda e: (-scores[e], e))[:2])
    assert learn.evaluate()['colour_accuracy']>=min(scores[e] for e in soup.averaged)-.2
    learn.lr_find(num_it=4, show_plot=False)
