"`label_plan`: properties of every plan for any table"
import math
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.labelplan import Coverage, choose, labelled_cells
from fastai_multi.uncertainty import OutputUncertainty, SeenItems, Space, Squeeze

pytestmark = pytest.mark.usefixtures("one_thread")
OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock, box=BBoxBlock)
CORNERS = ['x1','y1','x2','y2']
COLUMN = dict(box='x1')

def loaders(df, path, **kwargs):
    given = dict(image='file', valid_col='is_valid', label_delim='|', item_tfms=Resize(32), bs=16, num_workers=0)
    return MultiDataLoaders.from_df(df, path, **{**given, **kwargs})

@pytest.fixture(scope='module')
def table(shapes):
    "A table in which each output lacks about a third of the training labels, at random"
    df = pd.read_csv(shapes/'items.csv')
    df.index = [f'row {i}' for i in range(len(df))]
    df['is_valid'] = [i%4==0 for i in range(len(df))]
    rng = np.random.default_rng(0)
    for columns in (['kind'], ['tags'], ['area'], CORNERS):
        df.loc[~df.is_valid & (rng.random(len(df))<.35), columns] = None
    return df

@pytest.fixture(scope='module')
def learn(table, shapes):
    set_seed(0)
    learn = multi_learner(loaders(table, shapes, outputs=OUTPUTS, columns=dict(box=CORNERS)), simple_cnn(2, width=4))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    return learn

@pytest.mark.parametrize('budget,cost', [(3, 1), (20, dict(box=5)), (7.5, dict(kind=.5, tags=2)),
                                         (10_000, dict(box=5))])
def test_a_plan_stays_in_its_budget_and_proposes_missing_labels_once(learn, table, budget, cost):
    plan = label_plan(learn, table, budget, cost)
    assert 0<len(plan) and plan.cost.sum()<=budget
    assert list(plan.columns)==['item','output','gain','cost']
    assert not plan.duplicated(['item','output']).any()
    for o in plan.itertuples(): assert pd.isna(table.loc[o.item, COLUMN.get(o.output, o.output)])
    prices = cost if isinstance(cost, dict) else {}
    assert plan.cost.tolist()==[prices.get(o, 1) for o in plan.output]

def test_the_best_comes_first_and_the_same_seed_gives_the_same_plan(learn, table):
    plan = label_plan(learn, table, 25, dict(box=3))
    rate = plan.gain/plan.cost
    assert rate.is_monotonic_decreasing
    assert plan.equals(label_plan(learn, table, 25, dict(box=3)))
    assert plan[:10].equals(label_plan(learn, table, 10**4, dict(box=3))[:10])

def test_what_counts_is_the_proportion_of_costs(learn, table):
    plan = label_plan(learn, table, 15, dict(kind=1, tags=2, area=1, box=5))
    scaled = label_plan(learn, table, 150, dict(kind=10, tags=20, area=10, box=50))
    assert plan[['item','output']].equals(scaled[['item','output']])
    dear = label_plan(learn, table, 15, dict(kind=15)).output
    assert (dear=='kind').sum()<(label_plan(learn, table, 15).output=='kind').sum()

def test_pieces_of_the_table_and_of_the_sum_change_little(learn, table):
    plan = label_plan(learn, table, 12)
    assert plan[['item','output']].equals(label_plan(learn, table, 12, chunk=7)[['item','output']])
    part = label_plan(learn, table, 12, most=40)
    assert len(part)==12 and part.equals(label_plan(learn, table, 12, most=40))

def test_a_copy_is_not_chosen_as_long_as_something_else_is_left(learn, table):
    hidden = table[~table.is_valid][['file']].head(12)
    copies = hidden.set_axis([f'copy of {i}' for i in hidden.index])
    plan = label_plan(learn, pd.concat([hidden, copies]), 1000, outputs='kind')
    assert 1<len(plan)<=len(hidden)
    assert plan['item'].str.removeprefix('copy of ').is_unique
    alone = label_plan(learn, table[table.is_valid][["file"]].head(1), 5)
    assert sorted(alone.output)==sorted(OUTPUTS)      # with one item, the mean is the item itself

def test_an_output_without_labels_gets_the_most(table, shapes):
    df = table.assign(kind=pd.read_csv(shapes/'items.csv').kind.to_numpy())
    colours = pd.read_csv(shapes/'items.csv').colour
    df['colour'] = colours.where(np.arange(len(df))<14).to_numpy()
    set_seed(0)
    dls = loaders(df, shapes, outputs=dict(kind=CategoryBlock, colour=CategoryBlock))
    learn = multi_learner(dls, simple_cnn(2, width=4))
    df = df.assign(kind=[k if i%2 else None for i,k in enumerate(df.kind)])
    counts = label_plan(learn, df, 20).output.value_counts()
    assert counts['colour']>counts.get('kind', 0)

def test_tables_without_columns_of_outputs_and_labels_to_look_at_again(learn, table):
    assert not any(c.any() for c in labelled_cells(learn.dls, table[['file']], OUTPUTS).values())
    assert set(label_plan(learn, table[['file']], 12)['output'])<=set(OUTPUTS)
    again = label_plan(learn, table[table.is_valid], 5, relabel=True)
    assert len(again)==5
    with pytest.raises(ValueError, match='nothing to plan'): label_plan(learn, table[table.is_valid], 5)

def test_one_plain_output_and_text_alone(table, shapes):
    df = table.assign(kind=pd.read_csv(shapes/'items.csv').kind.to_numpy())
    dls = loaders(df, shapes, image=None, item_tfms=None, text='caption', outputs=CategoryBlock, columns='kind')
    learn = multi_learner(dls)
    plan = label_plan(learn, df.assign(kind=None), 4)
    assert len(plan)==4 and plan.output.nunique()==1

def test_a_kind_that_says_nothing_is_taken_as_unknown(learn, table):
    class Told(type(learn.tasks['kind'])): pass
    class Nothing(OutputUncertainty, task=Told): pass
    tasks = learn.tasks
    learn.tasks = {**tasks, 'kind': Told(tasks['kind'].part)}
    try:
        with pytest.warns(UserWarning, match="'kind' is of kind 'category', which has neither"):
            plan = label_plan(learn, table, 5, outputs='kind')
    finally:
        learn.tasks = tasks
        OutputUncertainty.registry.pop(Told)
    assert len(plan)==5

def test_numbers_are_as_unsure_as_their_neighbours_were_wrong(learn):
    items = SeenItems(learn, Squeeze())
    items.add(learn.dls.valid, with_labels=True)
    off = items.close().errors('area')
    assert len(off)==20 and (off>=0).all() and (off<=1).all()
    truth = items.targs['area'].flatten()
    by_hand = (items.preds['area'].flatten()-truth).abs()/(truth-truth.mean()).abs().mean()
    assert torch.allclose(off, by_hand.clamp(0, 1), atol=1e-4)

def test_a_choice_by_heap_is_the_greedy_choice():
    torch.manual_seed(1)
    drawn = dict(any=torch.randn(30, 5))
    vectors = Space(drawn)(drawn)
    unsure = dict(a=torch.rand(30), b=torch.rand(30))
    cost = dict(a=1, b=2)
    places = torch.arange(30)
    found = choose(Coverage(vectors, unsure, places), vectors, {n: torch.ones(30)>0 for n in cost}, cost, 15)
    cover = Coverage(vectors, unsure, places)
    left = 15
    for o in found:
        gains = cover.gains(vectors, ['a','b'])
        rates = torch.stack([gains[n]/cost[n]*(cost[n]<=left) for n in ('a','b')])
        assert o.gain/o.cost==pytest.approx(float(rates.max()), rel=1e-4)
        cover.add(o.output, vectors[[o.place]])
        left -= o.cost

@pytest.mark.parametrize('args,message', [
    (dict(budget=5, cost=dict(bx=1)), 'Unknown output in `cost`'), (dict(budget=5, cost=dict(box=-1)), 'above 0'),
    (dict(budget=5, cost='much'), "`cost` of 'kind' is 'much'"), (dict(budget=.5), 'the cheapest missing label'),
    (dict(budget=math.nan), '`budget` is nan'), (dict(budget='5'), "`budget` is '5'"),
    (dict(budget=5, outputs='knd'), 'Unknown output in `outputs`')])
def test_mistakes_are_answered_in_words(learn, table, args, message):
    with pytest.raises((ValueError, KeyError), match=message): label_plan(learn, table, **args)

def test_what_is_no_table_of_items_is_answered_in_words(learn, table):
    with pytest.raises(TypeError, match='DataFrame'): label_plan(learn, 'items.csv', 5)
    with pytest.raises(ValueError, match='no rows'): label_plan(learn, table[:0], 5)
    with pytest.raises(ValueError, match='reset_index'): label_plan(learn, pd.concat([table, table]), 5)

def test_a_plan_feeds_the_review(learn, table, tmp_path):
    pytest.importorskip('ipywidgets')
    plan = label_plan(learn, table, 6, outputs=['kind', 'area'])
    review = Review(learn, items=plan, file=tmp_path/'edits.csv', table=table)
    assert [o.key for o in review.items]==table.file[list(dict.fromkeys(plan['item']))].tolist()
    first_output = plan.output[0]
    review.forms[first_output].text = dict(kind='star', area='12')[first_output]
    review.save()
    assert list(review.edits.latest())==[(table.file[plan['item'][0]], first_output)]

def test_every_kind_of_output_can_be_planned(shapes, tmp_path):
    df = pd.read_csv(shapes/'items.csv').head(24)
    df['is_valid'] = [i%3==0 for i in range(len(df))]
    for i,name in enumerate(df.file):
        mask = np.zeros((64,64), np.uint8)
        mask[:i+10] = 1
        PILImage.create(mask).save(tmp_path/f'{i}.png')
    df['mask'] = [str(tmp_path/f'{i}.png') for i in range(len(df))]
    df.loc[4:8, ['mask','kind','x1','y1','x2','y2','area']] = None
    outputs = dict(mask=SegmentationBlock(codes=['no','yes']), at=PointsBlock, sizes=RegressionBlock(n_out=2),
                   group=GroupBlock(kind=CategoryBlock, area=RegressionBlock))
    columns = dict(at=CORNERS, sizes=['x1','y1'], group=dict(kind='kind', area='area'))
    dls = loaders(df, shapes, outputs=outputs, columns=columns)
    learn = multi_learner(dls, simple_cnn(2, width=4))
    plan = label_plan(learn, df, 1000)
    assert set(plan.output)==set(outputs) and set(plan['item'])<=set(range(4, 9))

def test_objects_can_be_planned(shapes):
    df = pd.read_csv(shapes/'items.csv').head(16)
    boxes = pd.read_csv(shapes/'boxes.csv')
    dls = MultiDataLoaders.from_df(df, shapes, image='file', objects=boxes, item_tfms=Resize(64), bs=8, num_workers=0,
                                   outputs=dict(objects=ObjectsBlock(label=CategoryBlock)))
    learn = multi_learner(dls, simple_cnn(4, width=4))
    plan = label_plan(learn, df[['file']], 3)
    assert len(plan)<=3 and set(plan.output)<={'objects'}
