"The defaults learn well in a short run: no output is worse than a constant prediction"
import pickle
import numpy as np
import pandas as pd
import pytest
import torch
from types import SimpleNamespace
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.prior import ConstantBaseline, known_targets, linear_heads
from fastai_multi.probe import FrozenBatchNorm, FrozenFeatures, can_probe, fit_probe, heads_are_new

OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock, box=BBoxBlock)

def loaders(path, **kwargs):
    given = dict(image='file', text='caption', outputs=OUTPUTS, columns=dict(box=['x1','y1','x2','y2']),
                 label_delim='|', seed=0, bs=16, item_tfms=Resize(64), num_workers=0)
    return MultiDataLoaders.from_csv(path, 'items.csv', **{**given, **kwargs})

def learner(dls, **kwargs):
    torch.manual_seed(0)
    learn = multi_learner(dls, simple_cnn(depth=3), **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return multi_shapes(tmp_path_factory.mktemp('drawn')/'shapes', n=200, size=64, seed=0)

@pytest.fixture(scope='module')
def tuned(drawn):
    learn = learner(loaders(drawn))
    learn.fine_tune(3)
    learn.table = list(learn.recorder.values)     # a later validation overwrites it
    return learn

def test_heads_start_at_the_prior(drawn):
    learn = learner(loaders(drawn))
    df = learn.dls.train.items
    preds = learn.get_preds()[0]
    assert preds.kind.std(0).max() < 1e-6                       # the same prediction for every item
    shares = [(df.kind==k).mean() for k in learn.output_parts['kind'].vocab]
    np.testing.assert_allclose(preds.kind[0], shares, atol=.02)
    rates = [df.tags.str.split('|').apply(lambda ts: t in ts).mean() for t in learn.output_parts['tags'].vocab]
    np.testing.assert_allclose(preds.tags[0], rates, atol=.02)
    assert preds.area.abs().max() < 1e-4                        # in standardised units

def test_each_loss_starts_near_one(drawn):
    learn = learner(loaders(drawn))
    res = learn.evaluate(0)
    for n in ('kind','tags','area'): assert res[f'{n}_loss']*learn.loss_func.scales[n] == pytest.approx(1, abs=.05)
    assert learn.loss_func.weights == {n: 1. for n in OUTPUTS}  # the weights stay yours

def test_a_loss_of_yours_counts_as_you_wrote_it(drawn):
    learn = learner(loaders(drawn), loss_func=dict(area=nn.L1Loss()))
    assert 'area' not in learn.loss_func.scales
    assert 'kind' in learn.loss_func.scales
    alone = learner(loaders(drawn, outputs=dict(kind=CategoryBlock), columns=None, label_delim=None))
    assert not alone.loss_func.scales                           # a single loss needs no scale

def test_nothing_is_worse_than_its_constant_answer(tuned):
    table = tuned.evaluate(baseline=True)
    for m in tuned.metrics:
        if m.name.endswith('_loss'): continue
        mine, constant = table.learner[m.name], table.constant[m.name]
        if m.direction=='min': mine, constant = -mine, -constant
        assert mine >= constant, m.name

def check_training_agrees_with_evaluation(learn):
    "Check that training mode and evaluation mode give the same loss, despite batch norm and bucketing"
    model = learn.model
    losses = {}
    for mode in ('train', 'eval'):
        getattr(model, mode)()
        FrozenBatchNorm.before_train(SimpleNamespace(learn=learn))
        for layer in model.modules():
            if isinstance(layer, nn.Dropout): layer.eval()
        for encoder in model.encoders.values(): encoder.p = 0.
        sums = n = 0
        with torch.no_grad():
            for x,y in learn.dls.train.new(shuffle=True, drop_last=True):
                sums = sums+learn.loss_func(model(x), y)     # the scaled total of all outputs
                n += 1
        losses[mode] = sums/n
    model.eval()
    torch.testing.assert_close(losses['train'], losses['eval'], rtol=.1, atol=.02)

def test_training_and_evaluation_agree_on_the_training_part(tuned): check_training_agrees_with_evaluation(tuned)

def test_the_probe_is_what_the_heads_say(drawn):
    learn = learner(loaders(drawn))
    res = learn.probe()
    assert res['kind'].kept and res['kind'].probe < res['kind'].prior
    features = FrozenFeatures(learn)
    for n,o in res.items():
        head = linear_heads(learn)[n]
        key = learn.model.wide_of[n]
        dense = {k: v.to_dense() if v.is_sparse else v for k,v in features.wide[key].items()}
        x = torch.cat(list(learn.model.wides[key].blocks(dense).values()), 1)
        said = x@head.wide.start.t()+head.wide.bias
        got = learn.get_preds(0, act={n: noop})[0][n]
        torch.testing.assert_close(head.last_step(said).detach(), got.reshape(said.shape), atol=1e-3, rtol=1e-3)
        assert x.shape[1]==head.wide.n_in

def test_the_fit_is_kept_only_where_it_is_better(drawn, tmp_path):
    "A number that does not depend on the item keeps its mean as prediction"
    df = pd.read_csv(drawn/'items.csv')
    df['noise'] = np.random.default_rng(0).normal(size=len(df))
    outputs = dict(kind=CategoryBlock, noise=RegressionBlock)
    dls = MultiDataLoaders.from_df(df, drawn, image='file', text='caption', outputs=outputs, seed=0, bs=16,
                                   item_tfms=Resize(64), num_workers=0)
    learn = learner(dls)
    res = learn.probe()
    assert not res['noise'].kept
    assert 'kept at the prior' in repr(res).splitlines()[-1]
    assert learn.get_preds()[0].noise.std() < 1e-5

def test_fine_tune_says_what_is_worse_than_a_constant(drawn, capsys):
    learn = learner(loaders(drawn))
    learn.logger = print
    learn.fine_tune(1, probe=False, freeze_epochs=1)
    assert 'Probe on' not in capsys.readouterr().out
    with torch.no_grad(): linear_heads(learn)['area'].wide.bias.add_(30.)
    learn.fine_tune(1, 1e-6, freeze_epochs=0)
    said = capsys.readouterr().out
    assert '`area` is worse than a constant answer: area_mae' in said
    assert 'Probe on' not in said                               # the heads are already trained

def test_missing_labels_and_pickles(drawn):
    df = pd.read_csv(drawn/'items.csv')
    df.loc[::3, 'kind'] = None
    df.loc[1::3, 'area'] = None
    dls = MultiDataLoaders.from_df(df, drawn, image='file', text='caption', outputs=dict(kind=CategoryBlock,
                                   area=RegressionBlock), seed=0, bs=16, item_tfms=Resize(64), num_workers=0)
    learn = learner(dls, class_weights=dict(kind='balanced'))
    train = dls.train.items
    assert len(known_targets(learn, 'kind')) == train.kind.notna().sum()
    probs = learn.get_preds()[0].kind[0]
    np.testing.assert_allclose(probs, [1/len(probs)]*len(probs), atol=.02)    # balanced weights make classes equal
    assert can_probe(learn) and heads_are_new(learn)
    assert set(learn.probe()) == {'kind','area'}
    assert pickle.loads(pickle.dumps(learn.loss_func)).scales == learn.loss_func.scales

def test_without_anything_to_probe_it_is_fastai_s(drawn):
    learn = learner(loaders(drawn, text=None))
    assert not can_probe(learn)
    with pytest.raises(ValueError, match='nothing to probe'): learn.probe()
    learn.fine_tune(1, freeze_epochs=1)
    assert len(learn.recorder.values) == 1

def test_a_number_that_is_nearly_always_the_same_stays_there(drawn):
    "One item in twenty is far off. A fit of squared errors would move all the others"
    df = pd.read_csv(drawn/'items.csv')
    df['rare'] = 1.
    df.loc[::20, 'rare'] = 9.
    dls = MultiDataLoaders.from_df(df, drawn, image='file', text='caption', outputs=dict(kind=CategoryBlock,
                                   rare=RegressionBlock), seed=0, bs=16, item_tfms=Resize(64), num_workers=0)
    learn = learner(dls)
    learn.fine_tune(3)
    heads = linear_heads(learn)
    assert float(heads['rare'].rate) < .1 and float(heads['kind'].rate) == 1
    table = learn.evaluate(baseline=True).loc['rare_mae']
    assert table.learner < 1.1*table.constant

def test_noise_ends_at_its_constant_answer(drawn, capsys):
    "A fifth of the labels is held out, and training does not help on them. The other outputs keep all labels"
    df = pd.read_csv(drawn/'items.csv')
    df['noise'] = np.random.default_rng(0).normal(size=len(df))
    outputs = dict(kind=CategoryBlock, noise=RegressionBlock)
    dls = MultiDataLoaders.from_df(df, text='caption', image=None, outputs=outputs, seed=0, bs=16, num_workers=0)
    learn = multi_learner(dls)
    learn.logger = print
    seen = []
    class Look(Callback):
        order = -30
        def before_batch(self):
            if self.training: seen.append([int(self.yb[0][n].isnan().sum()) for n in ('kind','noise')])
    with learn.no_bar(): learn.fine_tune(3, cbs=Look())
    for epoch in np.split(np.array(seen), 3): assert epoch[:,0].sum() == 0 and 20 < epoch[:,1].sum() < 45
    assert learn.get_preds()[0].noise.std() < 1e-5
    assert '`noise` predicts the same for every item' in capsys.readouterr().out
    table = learn.evaluate(baseline=True).loc['noise_mae']
    assert table.learner == pytest.approx(table.constant, rel=.01)

def test_the_probe_is_validated_once(drawn, capsys):
    learn = learner(loaders(drawn))
    n = []
    class Count(Callback):
        def before_validate(self): n.append(1)
    learn.add_cb(Count())
    learn.fine_tune(1)
    assert len(n) == 2                                           # epoch 0 and epoch 1
    assert learn.evaluate(baseline=True).probe.kind_loss == pytest.approx(learn.probe_scores['kind_loss'])

def test_a_plain_fit_says_what_is_worse_than_a_constant(drawn, capsys):
    df = pd.read_csv(drawn/'items.csv')
    dls = MultiDataLoaders.from_df(df, text='caption', image=None, outputs=dict(kind=CategoryBlock, area=RegressionBlock),
                                   seed=0, bs=16, num_workers=0)
    learn = multi_learner(dls)
    learn.logger = print
    with learn.no_bar():
        learn.fit_one_cycle(2)
        assert '20 steps are few: use bs=4 or 6 epochs' in capsys.readouterr().out
        with torch.no_grad(): linear_heads(learn)['area'].wide.bias.add_(30.)
        learn.fit(1, 1e-6)
    said = capsys.readouterr().out
    assert said.count('`area` is worse than a constant answer: area_mae') == 1
    learn.lr_find(num_it=10, show_plot=False)
    assert 'worse' not in capsys.readouterr().out
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-6)
    assert not capsys.readouterr().out                           # a learner without logging prints nothing

def test_epoch_0_is_the_probe(tuned, drawn):
    start,*epochs = tuned.table
    assert len(epochs) == 3
    assert np.isnan(start[0])
    learn = learner(loaders(drawn))
    learn.probe()
    assert start[1] == pytest.approx(learn.validate()[0], rel=.01)

def test_few_steps_are_said(drawn, capsys):
    learn = learner(loaders(drawn, bs=64))
    learn.logger = print
    learn.fine_tune(1)
    assert '2 steps are few: use 30 epochs' in capsys.readouterr().out

def test_a_probe_of_many_items_reads_a_part(drawn):
    "The stored features do not grow with the number of items"
    learn = learner(loaders(drawn))
    features = FrozenFeatures(learn, most=40)
    assert features.n == 40 and features.is_part
    assert {len(x) for xs in features.wide.values() for x in xs.values()} == {40}
    assert 'a random part' in repr(fit_probe(learn, features))

def test_boxes_start_at_their_mean_place_without_a_probe(drawn):
    learn = learner(loaders(drawn, text=None))
    learn.fine_tune(1, 1e-9, freeze_epochs=0)
    preds,targs = learn.get_preds(0)
    torch.testing.assert_close(preds.box.mean(0), targs.box.mean(0), atol=.05, rtol=0)
    assert preds.box.std(0).max() < .01
    assert 'box' in learn.loss_func.scales

def test_masks_and_groups_start_at_what_is_usual(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        shown = np.zeros((16, 16), np.uint8)
        shown[:4] = 1                                            # a quarter of the pixels
        PILMask.create(shown).save(tmp_path/f'mask{i}.png')
        PILImage.create(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path/f'{i}.png')
    df = pd.DataFrame(dict(file=[f'{i}.png' for i in range(24)], mask=[f'mask{i}.png' for i in range(24)],
                           kind=['a','b','b','b']*6, width=np.arange(24.)))
    outputs = dict(mask=MaskBlock(codes=['ground','shape','none']), both=GroupBlock(kind=CategoryBlock, width=RegressionBlock))
    dls = MultiDataLoaders.from_df(df, tmp_path, image='file', outputs=outputs, seed=0, bs=8, num_workers=0)
    learn = learner(dls)
    learn.fine_tune(0, freeze_epochs=0)
    heads = learn.plain_model.heads
    shares = heads['mask'].layers[-1].bias.softmax(0)
    torch.testing.assert_close(shares, tensor([.75, .25, 0.]), atol=.01, rtol=0)
    kinds = heads['both'].members['kind'].wide.bias.softmax(0)
    assert .1 < kinds[0] < .45 and kinds.argmax() == 1
    heads['mask'].layers[-1].bias.data.fill_(1.)
    learn.fine_tune(0, freeze_epochs=0)
    assert heads['mask'].layers[-1].bias.tolist() == [1., 1., 1.]     # trained heads stay as they are

# On real photos, if they are installed

SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'

has_photographs = (SHARED/'coco_mini').exists() and any((SHARED/'weights').glob('*.pth'))

@pytest.mark.skipif(not has_photographs, reason='the photos are not installed')
def test_photographs_and_captions():
    "Tags three times better than their base rates, counts better than their mean"
    from benchmarks.defaults import loaders_of, metrics_of
    dls = loaders_of('coco')
    set_seed(0)
    learn = multi_learner(dls, mobilenet_v2, weights=first((SHARED/'weights').glob('*.pth')))
    with learn.no_bar(), learn.no_logging():
        start = metrics_of(learn)
        learn.probe()
        got = metrics_of(learn)
    assert got['tags'] > 3*start['tags']
    assert got['n_objects'] > start['n_objects']
    assert got['n_persons'] > start['n_persons']

@pytest.mark.skipif(not (SHARED/'fashion').exists() or not has_photographs, reason='the photos are not installed')
def test_training_and_evaluation_agree_on_fashion():
    from benchmarks.defaults import learner_of
    set_seed(0)
    learn = learner_of('fashion', ('image','text'), n=130)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    check_training_agrees_with_evaluation(learn)
