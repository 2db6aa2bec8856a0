"Options of losses, metrics and training: tag weights, smoothing, a metric over outputs, blended batches"
import matplotlib
matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
import fastai.callback.schedule    # `fit_one_cycle`
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, MultiCategoryBlock, RegressionBlock
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import RecallMulti, accuracy
from fastai.vision.augment import Resize
from fastai.vision.core import Image
from fastai_multi import *

def written(n=300, seed=0):
    "Texts with a kind, a size and two tags, one of them rare and hard to learn"
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    rare = rng.random(n)<.08
    hint = np.where(rng.random(n)<.7, rare, rng.random(n)<.1)
    words = np.array(['cup','car','tree'])
    return pd.DataFrame(dict(note=[f'a {words[k]}{" shiny" if h else ""}' for k,h in zip(kind, hint)], kind=words[kind],
                             tags=[['rare']*int(r)+['round']*int(k==0) for r,k in zip(rare, kind)], size=kind+.5))

every = dict(kind=CategoryBlock, tags=MultiCategoryBlock, size=RegressionBlock)

def loaders(outputs=every, **kw):
    return MultiDataLoaders.from_df(written(), text='note', outputs=outputs, bs=32, num_workers=0, device='cpu', seed=2, **kw)

def fitted(dls, epochs=3, **kw):
    learn = multi_learner(dls, **kw)
    with learn.no_logging(), learn.no_bar(): learn.fine_tune(epochs, 5e-3)
    return learn

def test_balanced_tags_find_the_rare_one():
    found = []
    for weights in (None, dict(tags='balanced')):
        learn = fitted(loaders(dict(tags=MultiCategoryBlock)), class_weights=weights, metrics=dict(tags=RecallMulti()))
        with learn.no_bar(): preds,targs = learn.get_preds(ds_idx=0)
        i = list(learn.dls.vocab['tags']).index('rare')
        found.append(float(preds.tags[:,i][targs.tags[:,i]==1].mean()))
    assert found[1] > found[0]+.2

def test_weights_of_one_change_nothing_for_tags():
    dls = loaders(dict(tags=MultiCategoryBlock))
    plain,ones = (multi_learner(dls, class_weights=w).loss_func for w in (None, dict(tags=dict(rare=1., round=1.))))
    pred,targ = Outputs(tags=torch.randn(8, 2)),Outputs(tags=torch.randint(0, 2, (8,2)).float())
    assert float(plain(pred, targ)) == pytest.approx(float(ones(pred, targ)))

def test_a_weight_counts_the_items_that_have_the_tag():
    loss = multi_learner(loaders(dict(tags=MultiCategoryBlock)), class_weights=dict(tags=dict(rare=5.))).loss_func
    pred = Outputs(tags=torch.zeros(2, 2))
    tags = list(multi_learner(loaders(dict(tags=MultiCategoryBlock))).dls.vocab['tags'])
    with_it = torch.tensor([[float(t=='rare') for t in tags]]*2)
    assert float(loss(pred, Outputs(tags=with_it))) == pytest.approx(3*float(loss(pred, Outputs(tags=with_it*0))), rel=1e-4)

def test_weights_and_smoothing_together():
    learn = fitted(loaders(), epochs=1, class_weights=dict(kind='balanced', tags='balanced'), label_smoothing=.1)
    loss = learn.loss_func.terms['kind'].loss
    assert loss.func.label_smoothing == .1
    rows = learn.dls.train.items
    counts = [(rows.kind==c).sum() for c in learn.dls.vocab['kind']]
    assert loss.func.weight.tolist() == pytest.approx([sum(counts)/(len(counts)*c) for c in counts], rel=1e-4)
    tags = [sum(t in found for found in rows.tags) for t in learn.dls.vocab['tags']]
    expected = [(len(rows)-k)/k for k in tags]
    assert learn.loss_func.terms['tags'].loss.func.pos_weight.tolist() == pytest.approx(expected, rel=1e-4)
    with learn.no_bar(): names = list(learn.evaluate())
    assert {'kind_accuracy','kind_weighted_accuracy','tags_map','size_mae'} <= {*names}
    assert not any('weighted' in n for n in names if n.startswith('tags'))

@pytest.mark.parametrize('kw, words', [
    (dict(class_weights=dict(size='balanced')), "`class_weights` is for categories and tags"),
    (dict(class_weights=dict(tags=dict(rar=2.))), "Unknown class of output 'tags' in `class_weights` 'rar'"),
    (dict(label_smoothing=dict(size=.1)), "`label_smoothing` is for categories; output 'size' is number"),
    (dict(label_smoothing=.1, loss_func=dict(kind=CrossEntropyLossFlat())), 'no output is one'),
    (dict(label_smoothing=dict(kind=.1), loss_func=dict(kind=CrossEntropyLossFlat())), 'you passed your own')])
def test_options_of_losses_that_cannot_be(kw, words):
    with pytest.raises((ValueError,KeyError)) as e: multi_learner(loaders(), **kw)
    assert words in str(e.value)

# One number for several outputs

def test_a_metric_over_outputs_beside_the_loss_columns(tmp_path):
    df = written().assign(again=lambda d: d['kind'])
    outputs = dict(kind=CategoryBlock, again=CategoryBlock, size=RegressionBlock)
    dls = MultiDataLoaders.from_df(df, text='note', outputs=outputs, bs=32, num_workers=0, device='cpu', seed=2)
    score = OverOutputs(accuracy, dict(kind=2, again=1))
    learn = multi_learner(dls, metrics=dict(kind=accuracy, again=accuracy, recall=score), path=tmp_path)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1, cbs=SaveModelCallback(monitor='recall'))
        said = learn.evaluate()
    assert list(said) == ['valid_loss','kind_loss','again_loss','size_loss','kind_accuracy','again_accuracy','recall']
    assert said['recall'] == pytest.approx((2*said['kind_accuracy']+said['again_accuracy'])/3)
    learn = multi_learner(dls, metrics=score)
    with learn.no_logging(), learn.no_bar(): said = learn.evaluate()
    assert list(said)[-2:] == ['size_mae','score'] and len(said) == 8

# MixUp or CutMix

def test_one_or_the_other_in_a_training(tmp_path):
    for i in range(12): Image.fromarray(np.full((24,24,3), 20*i, dtype=np.uint8)).save(tmp_path/f'{i}.png')
    df = pd.DataFrame(dict(file=[f'{i}.png' for i in range(12)], kind=['a','b']*6, size=np.arange(12.)))
    dls = MultiDataLoaders.from_df(df, tmp_path, image='file', outputs=dict(kind=CategoryBlock, size=RegressionBlock),
                                   item_tfms=Resize(16), bs=5, num_workers=0, device='cpu', seed=1)
    learn = multi_learner(dls, simple_cnn(2))
    mix = MultiMixUpOrCutMix()
    ways = []
    draw = mix.draw
    def noted(xs):
        res = draw(xs)
        ways.append(mix.way.what)
        return res
    mix.draw = noted
    with learn.no_logging(), learn.no_bar(): learn.fit(4, cbs=mix)
    assert {*ways} == {'MixUp','CutMix'} and np.isfinite(learn.recorder.values[-1]).all()

# Parts by name

def pictures(folder, n=24):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        a = rng.integers(0, 255, (24,24,3)).astype(np.uint8)
        Image.fromarray(a).save(folder/f'{i}.png')
        rows.append(dict(file=f'{i}.png', kind='ab'[i%2], size=float(i)))
    return MultiDataLoaders.from_df(pd.DataFrame(rows), folder, image='file', item_tfms=Resize(32), bs=8, num_workers=0,
                                    outputs=dict(kind=CategoryBlock, size=RegressionBlock), device='cpu', seed=1)

def state_of(learn, name):
    from fastai_multi.rates import layers_within, part_parameters
    ps = part_parameters(learn.plain_model, name)
    stats = [b for l in layers_within(learn.plain_model, ps) for b in l.buffers()]
    return [t.detach().clone() for t in [*ps, *stats]]

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b))

def test_a_part_frozen_by_name_stays_so_in_fine_tune(tmp_path):
    learn = multi_learner(pictures(tmp_path), simple_cnn(3), split=1)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1, 1e-2)
        learn.freeze('kind')
        before = {n: state_of(learn, n) for n in ('kind','size','trunk')}
        assert any(t.dtype==torch.int64 for t in before['kind'])      # batch norm counts its batches
        learn.fine_tune(1, 1e-2, probe=False)
        after = {n: state_of(learn, n) for n in before}
        assert same(before['kind'], after['kind'])
        assert not same(before['size'], after['size']) and not same(before['trunk'], after['trunk'])
        learn.unfreeze('kind')
        learn.fit(1, 1e-2)
    assert not same(after['kind'], state_of(learn, 'kind')) and not learn.held

def test_a_frozen_trunk_keeps_its_statistics(tmp_path):
    learn = multi_learner(pictures(tmp_path), simple_cnn(3))
    learn.freeze('trunk')
    before = state_of(learn, 'trunk')
    with learn.no_logging(), learn.no_bar(): learn.fine_tune(1, 1e-2)
    assert same(before, state_of(learn, 'trunk'))
    learn.unfreeze()                      # parts frozen by name stay frozen
    assert not any(p.requires_grad for p in learn.model.encoders['image'].parameters())

def test_rates_by_name_hold_throughout_fine_tune(tmp_path):
    from fastai.callback.core import Callback
    class Rates(Callback):
        def before_fit(self): self.seen = []
        def after_batch(self):
            if self.training: self.seen.append({id(p): h['lr'] for p,_,_,h in self.opt.all_params() if p.requires_grad})
    learn = multi_learner(pictures(tmp_path), simple_cnn(3), split=1)
    watch = Rates()
    with learn.no_logging(), learn.no_bar():
        learn.fine_tune(2, 1e-3, probe=False, lrs=dict(kind=3e-2, trunk=1e-6), cbs=watch)
    top = {}
    for rates in watch.seen:
        for k,v in rates.items(): top[k] = max(top.get(k, 0), v)
    from fastai_multi.rates import part_parameters
    def of(n): return [top[id(p)] for p in part_parameters(learn.plain_model, n)]
    assert len({*of('kind')}) == 1 and of('kind')[0] == pytest.approx(3e4*max(of('trunk')), rel=1e-6)
    assert max(of('size')) == pytest.approx(of('kind')[0]*5e-4/3e-2, rel=1e-6)
    table = learn.summary_groups()
    assert {'kind','trunk','new layers'} <= {*table['group']}

def test_freezing_groups_means_the_same_with_rates_by_name(tmp_path):
    a,b = (multi_learner(pictures(tmp_path), simple_cnn(3), split=1) for _ in range(2))
    b.rates(1e-3, dict(kind=1e-2))
    for n in (-1, 0, 1):
        for l in (a, b): l.freeze_to(n)
        assert [p.requires_grad for p in a.model.parameters()] == [p.requires_grad for p in b.model.parameters()]

@pytest.mark.parametrize('do, words', [
    (lambda l: l.freeze('kid'), "Unknown part 'kid'. Did you mean 'kind'"),
    (lambda l: l.unfreeze('kind'), "Unknown part; these are frozen by name 'kind'"),
    (lambda l: l.fine_tune(1, lrs=dict(kind=0)), "learn.freeze('kind')"),
    (lambda l: l.fine_tune(1, lrs=dict(trunk=1e-3, image=1e-3)), "share parameters"),
    (lambda l: l.fine_tune(1, lrs=1e-3), '`lrs` is 0.001; it takes a dict')])
def test_parts_that_cannot_be(tmp_path, do, words):
    learn = multi_learner(pictures(tmp_path, 16), simple_cnn(2))
    with pytest.raises((ValueError,KeyError,TypeError)) as e, learn.no_logging(), learn.no_bar(): do(learn)
    assert words in str(e.value)

def test_a_learner_with_frozen_parts_is_exported(tmp_path):
    from fastai.learner import load_learner
    learn = multi_learner(pictures(tmp_path), simple_cnn(2), path=tmp_path)
    learn.freeze('kind')
    learn.rates(1e-3, dict(size=1e-2))
    learn.export()
    assert load_learner(tmp_path/'export.pkl').held == ('kind',)

# Options of heads

def test_a_head_pools_and_activates_as_told(tmp_path):
    heads = dict(kind=dict(hidden=[16], pool='gem', act=torch.nn.SiLU))
    learn = multi_learner(pictures(tmp_path), simple_cnn(2), heads=heads, path=tmp_path)
    power, = [p for n,p in learn.model.named_parameters() if n.endswith('pool.power')]
    before = power.item()
    assert any(isinstance(m, torch.nn.SiLU) for m in learn.model.heads['kind'].modules())
    assert not any(isinstance(m, torch.nn.SiLU) for m in learn.model.heads['size'].modules())
    with learn.no_logging(), learn.no_bar(): learn.fine_tune(1, 1e-2)
    assert power.item() != before and np.isfinite(learn.recorder.values[-1]).all()
