"Options of losses, metrics and training: weights of tags, smoothing, a metric over outputs, blended batches"
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
    "Texts with a kind, a size, and tags of which one is rare and hard to see"
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
        i = list(learn.dls.vocab[-1]['tags']).index('rare')
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
    tags = list(multi_learner(loaders(dict(tags=MultiCategoryBlock))).dls.vocab[-1]['tags'])
    with_it = torch.tensor([[float(t=='rare') for t in tags]]*2)
    assert float(loss(pred, Outputs(tags=with_it))) == pytest.approx(3*float(loss(pred, Outputs(tags=with_it*0))), rel=1e-4)

def test_weights_and_smoothing_together():
    learn = fitted(loaders(), epochs=1, class_weights=dict(kind='balanced', tags='balanced'), label_smoothing=.1)
    loss = learn.loss_func.terms['kind'].loss
    assert loss.func.label_smoothing == .1 and loss.func.weight is not None
    assert learn.loss_func.terms['tags'].loss.func.pos_weight is not None
    with learn.no_bar(): names = list(learn.evaluate())
    assert {'kind_accuracy','kind_weighted_accuracy','tags_map','size_mae'} <= {*names}
    assert not any('weighted' in n for n in names if n.startswith('tags'))

@pytest.mark.parametrize('kw, words', [
    (dict(class_weights=dict(size='balanced')), "`class_weights` is for categories and tags"),
    (dict(class_weights=dict(tags=dict(rar=2.))), "Unknown class of output 'tags' in `class_weights` 'rar'"),
    (dict(label_smoothing=dict(size=.1)), "`label_smoothing` is for categories; output 'size' is number"),
    (dict(label_smoothing=.1, loss_func=dict(kind=CrossEntropyLossFlat())), 'there is none'),
    (dict(label_smoothing=dict(kind=.1), loss_func=dict(kind=CrossEntropyLossFlat())), 'there is a loss of yours')])
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
