"`modality_check` on models whose inputs are known"
import math
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.modality import ChangedInput, ModalityCheck, change_of, of_another_item

pytestmark = pytest.mark.usefixtures("one_thread")

class Reads(nn.Module):
    "Give the answer that the vector `name` holds, and ignore the other input"
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

# An input with little information

N_TAGS = 8

class KnownOdds(nn.Module):
    "The true log-odds of each output: much from `strong`, a little from `weak`, nothing from `noise`"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, x):
        odds = self.scale*log_odds(x.strong.nan_to_num(0.), x.weak.nan_to_num(0.))
        kind = odds[:,0]
        return Outputs.of('kind', 'tags')([torch.stack([0*kind, kind], 1), odds[:,1:]])

def log_odds(strong, weak):
    res = 3*strong+.8*weak
    res[:,1:] = res[:,1:]/2-2.5              # tags are rare
    return res

@pytest.fixture(scope='module')
def weak_check():
    rng = np.random.default_rng(0)
    n = 400
    inputs = {name: rng.normal(size=(n,1+N_TAGS)).astype(np.float32) for name in ('strong','weak','noise')}
    drawn = rng.random((n,1+N_TAGS)) < 1/(1+np.exp(-log_odds(inputs['strong'], inputs['weak'])))
    df = pd.DataFrame({**{name: list(v) for name,v in inputs.items()}, 'kind': drawn[:,0].astype(int)})
    df['tags'] = [[f't{i}' for i in np.flatnonzero(row)] for row in drawn[:,1:]]
    df['valid'] = np.arange(n)%8!=0
    block = DataBlock((MultiInputBlock(strong=FeaturesBlock, weak=FeaturesBlock, noise=FeaturesBlock),
                       MultiOutputBlock(kind=CategoryBlock, tags=MultiCategoryBlock)),
                      get_x=lambda r: {name: r[name] for name in inputs}, get_y=lambda r: dict(kind=r.kind, tags=r.tags),
                      splitter=ColSplitter('valid'))
    dls = MultiDataLoaders.from_dblock(block, df, bs=32, num_workers=0)
    assert list(dls.train.named_parts()[1]['tags'].vocab)==[f't{i}' for i in range(N_TAGS)]
    return modality_check(MultiLearner(dls, KnownOdds()))

@pytest.mark.parametrize('output', ['kind','tags'])
def test_an_input_that_carries_a_little_is_not_called_ignored(weak_check, output):
    "The input changes few decisions, so the score does not show it, but the loss does"
    by_score,by_loss = weak_check.worse(output, 'weak')
    assert by_score.low<=0<by_loss.low and by_loss.what=='loss'
    assert (output,'weak') not in weak_check.ignored and (output,'strong') not in weak_check.ignored
    said = first(s for s in weak_check.sentences() if s.startswith(f'{output} reads weak: '))
    assert str(by_score) in said and f'its {by_loss}' in said

@pytest.mark.parametrize('output', ['kind','tags'])
def test_beside_it_an_input_without_information_is_called_ignored(weak_check, output):
    assert (output,'noise') in weak_check.ignored
    assert any(s.startswith(f'{output} seems to ignore noise: ') for s in weak_check.sentences())

def test_chance_is_rarely_taken_for_reading():
    "The check reports only a few of 400 models as reading an uninformative input"
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(400):
        truth,own,other = rng.normal(size=(3,60))
        plain,changed = [SimpleNamespace(score_name='absolute error', scores=lambda e=e: torch.tensor(abs(e)),
                                         losses=torch.tensor(e**2)) for e in (truth-.5*own, truth-.5*other)]
        found = change_of(plain, changed)
        false += found['low']>0 or found['loss_low']>0
    assert .01<false/400<.07

def test_items_are_exchanged_in_batches_of_one_too(loaders):
    learn = MultiLearner(loaders, Reads('a'))
    for bs in (1, 59):                                    # 60 items: with batches of 59, the last has one item
        check = modality_check(learn, dl=loaders.valid.new(bs=bs))
        assert ('kind','a') not in check.ignored and ('kind','b') in check.ignored
        assert check.table.loc[('size','a','shuffled')].changed>.5
    with pytest.raises(ValueError, match='but the loader has 1 item'):
        modality_check(learn, dl=loaders.test_dl(loaders.valid.items.iloc[:1], with_labels=True))

def test_an_output_without_labels_is_not_judged(loaders):
    rows = loaders.valid.items.assign(kind=None)
    check = modality_check(MultiLearner(loaders, Reads('a')), dl=loaders.test_dl(rows, with_labels=True))
    assert check.sentences()[0]=='kind has no label here, so nothing shows whether it reads a.'
    assert check.ignored==[('size','b')]

def test_one_learner_for_each_set_of_inputs(shapes):
    "Each learner trains on its own inputs from the same seeds, and the random state is restored"
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
