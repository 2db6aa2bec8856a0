"`MultiInterpretation` for each kind of output, compared with values computed by hand"
import math, warnings
import matplotlib
matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.insight import OutputInterpretation, interpretation_of
from fastai_multi.interpretation import column_groups, interval, wilson
from fastai_multi.tasks import Task

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope='module')
def table(shapes):
    df = pd.read_csv(shapes/'items.csv').head(24)
    df.index = [f'row {i}' for i in range(len(df))]
    df['is_valid'] = [i%2==0 for i in range(len(df))]
    df.loc['row 0', 'kind'] = None
    df.loc['row 2', ['x1','y1','x2','y2']] = math.nan
    df.loc['row 4', 'area'] = math.nan
    df['side'] = df.x2-df.x1
    return df

@pytest.fixture(scope='module')
def learn(table, shapes):
    outputs = dict(kind=CategoryBlock, colour=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock,
                   size=RegressionBlock(n_out=2))
    dls = MultiDataLoaders.from_df(table, shapes, image='file', outputs=outputs, valid_col='is_valid', bs=8,
                                   columns=dict(box=['x1','y1','x2','y2'], size=['area','side']), label_delim='|',
                                   item_tfms=Resize(32), num_workers=0)
    set_seed(0)
    return multi_learner(dls, simple_cnn(2, width=4))

@pytest.fixture(scope='module')
def interp(learn): return MultiInterpretation.from_learner(learn)

def test_it_reads_every_output_of_every_validation_item(interp, table):
    assert len(interp)==12
    assert list(interp.index)==list(table.index[table.is_valid])
    assert list(interp.keys())==['kind','colour','tags','box','size']
    assert 'kind (category): 11 of 12 items labelled' in repr(interp)
    with pytest.raises(KeyError, match='Unknown output'): interp['knd']

def test_the_table_holds_what_the_user_gave(interp, table):
    rows = table[table.is_valid]
    kinds = interp['kind'].table()
    assert kinds.true.iloc[0] is None or pd.isna(kinds.true.iloc[0])
    assert kinds.true.iloc[1:].tolist()==rows.kind.iloc[1:].tolist()
    assert math.isnan(kinds.loss.iloc[0])
    assert interp['colour'].table().true.tolist()==rows.colour.tolist()

def test_losses_are_those_of_the_learner_item_by_item(interp, learn):
    total = learn.get_preds(with_loss=True)[-1]
    assert torch.allclose(interp.losses, total, atol=1e-5)
    vals = learn.evaluate()
    for n in interp.keys(): assert float(interp[n].losses.nanmean())==pytest.approx(vals[f'{n}_loss'], rel=.2)
    assert float(interp['colour'].losses.mean())==pytest.approx(vals['colour_loss'], rel=1e-4)

def test_confusion_counts_labelled_items(interp):
    cm = interp['kind'].confusion_matrix()
    vocab = interp['kind'].vocab
    rows = interp['kind'].table().dropna()
    for i,true in enumerate(vocab):
        for j,said in enumerate(vocab): assert cm[i,j]==((rows.true==true) & (rows.predicted==said)).sum()
    wrong = {(t,s): n for t,s,n in interp['kind'].most_confused()}
    assert sum(wrong.values())==cm.sum()-np.trace(cm)

def test_numbers_are_in_the_units_of_the_table(interp, table):
    rows = table[table.is_valid]
    size = interp['size']
    assert torch.allclose(size.true[4].double(), tensor(rows[['area','side']].to_numpy()[4]).double(), atol=1e-2)
    assert size.errors()[2].isnan().any()
    by_range = size.error_by_range(2, column=1)
    assert by_range['items'].sum()==rows.side.notna().sum()
    error = size.errors()[:,1]
    assert by_range['mean absolute error'].mul(by_range['items']).sum()==pytest.approx(float(error.abs().nansum()), rel=1e-4)

def test_boxes_without_a_label_are_left_out(interp, learn):
    ious = interp['box'].ious()
    assert ious[1].isnan() and ious.isnan().sum()==1
    assert float(ious.nanmean())==pytest.approx(learn.evaluate()['box_iou'], abs=1e-4)
    assert interp['box'].iou_by_size(2)['items'].sum()==11

def test_tags_one_by_one(interp, table):
    from sklearn.metrics import f1_score
    rows = interp['tags'].per_tag()
    asked = table[table.is_valid].tags.fillna('')
    for tag,row in rows.iterrows():
        true = asked.str.split('|').map(lambda o: tag in o).to_numpy()
        said = interp['tags'].decoded[:,interp['tags'].vocab.index(tag)].numpy()
        assert row['true']==true.sum() and row['predicted']==said.sum()
        if true.any() or said.any(): assert row['f1']==pytest.approx(f1_score(true, said))

def test_the_worst_come_first_and_the_missing_never(interp):
    losses,places = interp.top_losses(12, output='kind')
    assert len(losses)==11 and 0 not in places.tolist()
    assert (losses.diff()<=0).all()
    assert interp.top_losses(1)[1].item()==int(interp.losses.argmax())
    assert interp.top_losses(2, largest=False, output='box')[0][0]<=losses.max()

def test_pictures_are_drawn(interp):
    plt.close('all')
    interp.plot_top_losses(2)
    assert sum(bool(ax.images) for ax in plt.gcf().axes)==2
    plt.close('all')
    interp['box'].plot_top_losses(2)
    interp['kind'].plot_confusion_matrix(normalize=True)
    interp['tags'].plot_precision_recall()
    interp['size'].plot_scatter(column=1)
    interp['size'].plot_residuals()
    interp['box'].plot_ious()
    plt.close('all')

def test_slices_are_means_of_the_rows(interp):
    res = interp.slices(['colour','side'], n=2, metrics=False)
    colours = interp.items.colour.to_numpy()
    for colour in set(colours):
        want = interp['box'].scores()[colours==colour].nanmean()
        assert res.loc[('colour',colour,'box','IoU'),'score']==pytest.approx(float(want), abs=1e-5, nan_ok=True)
    assert res.loc['side'].xs('colour', level='output')['items'].sum()==interp.items.side.notna().sum()
    with pytest.raises(KeyError, match='column of the table'): interp.slices('colr')

def test_slices_have_every_metric_of_the_epoch_table(interp, learn):
    interp.items['all'] = 'yes'
    res = interp.slices('all', resamples=20).xs('yes', level='value').xs('all', level='column')
    del interp.items['all']
    vals = learn.evaluate()
    columns = [k for k in vals if not k.endswith('_loss')]
    twins = dict(kind_accuracy=('kind','accuracy'), colour_accuracy=('colour','accuracy'), box_iou=('box','IoU'))
    for k in columns:
        row = res.loc[twins.get(k, (k.split('_')[0], k))]
        assert row.score==pytest.approx(float(vals[k]), abs=1e-4), k
        assert row.low<=row.score<=row.high, k
    assert len(res)==len(columns)+2                          # tags and size add no columns of scores
    assert res.loc['kind','items'].tolist()==[11]

def test_thresholds_are_in_the_table_of_tags(learn):
    tags = MultiInterpretation.from_learner(learn)['tags']
    assert (tags.per_tag().threshold==.5).all()
    before = tags.task.cut.value
    tags.task.cut.value = torch.linspace(.1, .9, len(tags.vocab))
    table = MultiInterpretation.from_learner(learn)['tags'].per_tag()
    assert table.threshold[tags.vocab].tolist()==pytest.approx(torch.linspace(.1, .9, len(tags.vocab)).tolist())
    tags.task.cut.value = before

def test_disagreements_are_ordered_by_lift(interp):
    rows = interp.disagreements(5)
    assert rows.lift.is_monotonic_increasing
    assert rows.place.is_unique

def test_a_contradiction_is_found():
    from fastai_multi.interpretation import pair_rows
    true = tensor([0,0,0,1,1,1])
    rows = pair_rows('a', (tensor([0,0,0,1,1,0]), true, 'xy'), 'b', (true, true, 'uv'))
    lifts = [r[-1] for r in rows]
    assert min(lifts)==lifts[5] and rows[5][:5]==(5,'a','x','b','v')

def test_two_learners_on_the_same_items(interp, learn):
    same = interp.compare(MultiInterpretation.from_learner(learn))
    assert (same.difference.astype(float)==0).all()
    train = MultiInterpretation.from_learner(learn, ds_idx=0)
    with pytest.raises(ValueError, match='not the same ones'): interp.compare(train)

def test_one_plain_output(table, shapes):
    rows = table.dropna(subset=['kind'])
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file', pref=shapes), get_y=ColReader('kind'),
                      splitter=ColSplitter(), item_tfms=Resize(32))
    learn = multi_learner(block.dataloaders(rows, bs=4, num_workers=0), simple_cnn(2, width=4))
    interp = MultiInterpretation.from_learner(learn)
    name = first(interp.keys())
    acc = learn.validate()[1]
    assert np.trace(interp[name].confusion_matrix())/len(interp)==pytest.approx(acc)
    interp.plot_top_losses(2)
    plt.close('all')

def test_points_and_masks(tmp_path):
    from PIL import Image
    rows = []
    for i in range(6):
        Image.new('RGB', (16,16), (40*i,0,0)).save(tmp_path/f'{i}.png')
        Image.fromarray(np.full((16,16), i%2, np.uint8)).save(tmp_path/f'm{i}.png')
        rows.append(dict(file=f'{i}.png', mask=str(tmp_path/f'm{i}.png'), eye=[[4.,4.],[8.,i+1.]], is_valid=i>2))
    dls = MultiDataLoaders.from_df(pd.DataFrame(rows), tmp_path, image='file', valid_col='is_valid', num_workers=0, bs=3,
                                   outputs=dict(eye=PointBlock, mask=MaskBlock(codes=['no','yes'])))
    learn = multi_learner(dls, simple_cnn(2, width=4))
    interp = MultiInterpretation.from_learner(learn)
    vals = learn.evaluate()
    assert float(interp['mask'].scores().mean())==pytest.approx(vals['mask_accuracy'], abs=1e-5)
    assert interp['mask'].per_class()['share of pixels'].sum()==pytest.approx(1)
    assert interp['eye'].distances().shape==(3,2)
    want = (interp['eye'].decoded-interp['eye'].targs).norm(dim=-1)/2
    assert torch.allclose(interp['eye'].distances(), want)

def test_a_kind_of_yours_brings_its_own():
    class MyTask(Task): pass
    class MyInterpretation(OutputInterpretation, task=MyTask): pass
    class Nearer(MyTask): pass
    assert interpretation_of(Nearer(None)) is MyInterpretation
    assert interpretation_of(Task(None)) is OutputInterpretation

def test_a_learner_of_fastai_is_answered_in_words(learn):
    plain = Learner(learn.dls, nn.Linear(1,1), loss_func=MSELossFlat())
    with pytest.raises(TypeError, match='one plain output use fastai'): MultiInterpretation.from_learner(plain)

def test_fastais_interpretation_of_named_outputs_is_answered_in_words(learn):
    with pytest.raises(TypeError, match='MultiInterpretation.from_learner'): Interpretation.from_learner(learn)

def test_fastais_interpretation_reads_one_plain_output(table, shapes):
    rows = table.dropna(subset=['kind'])
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file', pref=shapes), get_y=ColReader('kind'),
                      splitter=ColSplitter(), item_tfms=Resize(32))
    learn = multi_learner(block.dataloaders(rows, bs=4, num_workers=0), simple_cnn(2, width=4))
    Interpretation.from_learner(learn).plot_top_losses(2)
    found = ClassificationInterpretation.from_learner(learn).confusion_matrix()
    assert found.sum()==len(learn.dls.valid_ds)

def test_intervals():
    assert wilson(.5, 100)['low']==pytest.approx(.4038, abs=1e-3)
    assert interval(np.array([2.,4.]))['mean']==3
    groups = column_groups(pd.Series(['a']*3+['b']*2+['c', None]), 4, 2)
    assert groups.tolist()[:5]==['a']*3+['b']*2 and groups[5:].isna().all()

def test_the_calibration_error_is_that_by_hand(interp):
    kind = interp['kind']
    by_bin = {}
    for p,y in zip(kind.preds.tolist(), kind.targs.tolist()):
        if y<0: continue
        by_bin.setdefault(min(int(max(p)*10), 9), []).append((max(p), p.index(max(p))==y))
    n = sum(map(len, by_bin.values()))
    assert n==11                                             # without the unlabelled item
    apart = [abs(sum(c for c,_ in o)-sum(right for _,right in o)) for o in by_bin.values()]
    assert kind.calibration_error()==pytest.approx(sum(apart)/n, abs=1e-5)
    ax = kind.plot_calibration()
    assert f'{kind.calibration_error():.3f}' in ax.get_title()
    confidence,right = interp['tags'].confidence()
    assert len(confidence)==len(right)==interp['tags'].targs.numel()
    with pytest.raises(ValueError, match="'size' is of kind 'number', which has no probabilities"):
        interp['size'].plot_calibration()

def test_two_learners_are_compared_metric_by_metric(learn, table, interp):
    set_seed(1)
    other = multi_learner(learn.dls, simple_cnn(3, width=4))
    res = compare(learn, other, resamples=50)
    vals = other.evaluate()
    assert res.table.loc[('tags','tags_f1'),'second']==pytest.approx(float(vals['tags_f1']), abs=1e-4)
    assert res.table.loc[('size','size_mae'),'first']==pytest.approx(float(learn.evaluate()['size_mae']), abs=1e-3)
    assert (res.table.low<=res.table.high).all()
    counts = res.changes.loc['kind']
    assert counts.sum()==11                                  # without the unlabelled item
    gain = (counts['wrong to right']-counts['right to wrong'])/11
    assert res.table.loc[('kind','accuracy'),'difference']==pytest.approx(gain, abs=1e-6)
    changed = res.changed('kind')
    assert set(changed.index)<=set(table.index[table.is_valid])
    for row in changed[changed.change=='right to wrong'].itertuples():
        assert row.first==row.true!=row.second
    assert 'right to wrong' in repr(res) and '<table' in res._repr_html_()
    nothing = compare(learn, learn, resamples=5)
    assert (nothing.table.difference.dropna()==0).all() and (nothing.table.better=='').all()
    with pytest.raises(TypeError, match='is a Learner'): compare(learn, Learner(learn.dls, learn.model, noop))

def test_learners_without_a_shared_output_are_not_compared(learn, table, shapes):
    dls = MultiDataLoaders.from_df(table, shapes, image='file', outputs=dict(price=RegressionBlock), valid_col='is_valid',
                                   columns=dict(price='area'), bs=8, item_tfms=Resize(32), num_workers=0)
    with pytest.raises(ValueError, match='share no output'): compare(learn, multi_learner(dls, simple_cnn(2, width=4)))

def test_right_is_the_verdict_that_is_shown(interp):
    assert torch.equal(interp['kind'].right().nan_to_num(-1), interp['kind'].scores().nan_to_num(-1))
    assert torch.equal(interp['box'].right()==1, interp['box'].scores()>=.5)
