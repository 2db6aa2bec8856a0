"Frozen epochs read features from memory: the training is the same after one pass over the items"
import random
import pytest
import torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import flat
from fastai_multi.cache import cached_features, reason_not_to_cache, still_inputs

OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock, box=BBoxBlock)

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return multi_shapes(tmp_path_factory.mktemp('drawn')/'shapes', n=60, size=32, seed=0)

def learner(path, trained=True, heads=None, **kwargs):
    "A learner whose trunk counts as trained, and a counter of the pictures that the trunk read"
    given = dict(image='file', text='caption', outputs=OUTPUTS, columns=dict(box=['x1','y1','x2','y2']),
                 label_delim='|', seed=0, bs=8, item_tfms=Resize(32), num_workers=0)
    dls = MultiDataLoaders.from_csv(path, 'items.csv', **{**given, **kwargs})
    torch.manual_seed(0)
    learn = multi_learner(dls, simple_cnn(depth=3, bn=True), heads=heads, train_bn=False)
    learn.logger = noop
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    trunk = learn.plain_model.encoders['image']
    trunk.pretrained = trained
    learn.met = []
    trunk.trunk.register_forward_pre_hook(lambda m, x: learn.met.append(len(x[0])))
    feature_maps = trunk.trunk.feature_maps
    trunk.trunk.feature_maps = lambda x: (learn.met.append(len(x)), feature_maps(x))[1]
    return learn

def tuned(path, cache, **kwargs):
    "Fine-tune with or without a cache"
    learn = learner(path, **kwargs)
    learn.freeze()
    for dl in learn.dls.loaders: dl.rng = random.Random(1)
    torch.manual_seed(1)
    learn.fine_tune(0, 1e-2, freeze_epochs=3, probe=False, cache=cache)
    return learn

def test_training_from_memory_is_the_same_training(drawn):
    given = dict(text=None, heads=dict(kind=dict(p=0.), tags=dict(p=0.)))     # dropout would draw differently
    plain = tuned(drawn, False, **given)
    cached = tuned(drawn, True, **given)
    for (n,a),b in zip(plain.model.state_dict().items(), cached.model.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda m: f'{n}: {m}')
    start = learner(drawn, **given).plain_model.heads['kind'].layers
    assert not torch.equal(start[-1].weight, cached.plain_model.heads['kind'].layers[-1].weight)
    assert sum(cached.met) < sum(plain.met)/2

def test_items_are_encoded_once(drawn):
    learn = learner(drawn)
    learn.freeze()
    n = sum(len(dl.dataset) for dl in learn.dls.loaders)
    with cached_features(learn) as why:
        assert why is None
        assert sum(learn.met) == n
        learn.fit_one_cycle(2, 1e-3)
        learn.validate()
        assert sum(learn.met) == n
    learn.validate()
    assert sum(learn.met) == n+len(learn.dls.valid.dataset)
    assert 'forward' not in vars(learn.plain_model.encoders['image'])
    assert type(learn.dls.train).__name__ == 'MultiDL'

def test_augmented_passes_take_turns(drawn):
    learn = learner(drawn, item_tfms=RandomResizedCrop(32, min_scale=.3))
    learn.freeze()
    def rows(epoch):
        learn.epoch = epoch
        return {int(row) for b in learn.dls.train for row in flat(tuple(b))[0]}
    n = len(learn.dls.train.dataset)
    with cached_features(learn, 2):
        store = learn.plain_model.encoders['image'].forward.__self__
        assert rows(0) <= set(range(n))
        assert rows(1) <= set(range(n, 2*n))
        assert rows(2) <= set(range(n))
        maps = store.parts['map 3']
        assert not torch.allclose(maps[:n], maps[n:2*n])       # two augmentations of the same pictures

def test_without_augmented_passes_nothing_is_drawn(drawn):
    learn = learner(drawn, text=None, item_tfms=RandomResizedCrop(32, min_scale=.3))
    learn.freeze()
    with torch.no_grad():                                  # a fresh head answers the same for all pictures
        for p in learn.model.heads['kind'].parameters(): p.normal_()
    def answers(seed):
        "The model's predictions for each row of the cache"
        set_seed(seed)
        learn.model.eval()
        with cached_features(learn), torch.no_grad():
            x = [b[0] for b in learn.dls.train]
            rows = torch.cat([flat((o,))[0] for o in x])
            said = torch.cat([learn.model(o).kind for o in x])
        return said[rows.argsort()]
    torch.testing.assert_close(answers(1), answers(2))

def test_missing_labels_and_texts_come_as_they_are(drawn):
    df = pd.read_csv(drawn/'items.csv')
    df.loc[::3, 'area'] = np.nan
    df.loc[::4, 'caption'] = None
    given = dict(image='file', text='caption', outputs=dict(area=RegressionBlock), seed=0, bs=8, num_workers=0)
    learn = multi_learner(MultiDataLoaders.from_df(df, drawn, **given), simple_cnn(depth=2), train_bn=False)
    learn.plain_model.encoders['image'].pretrained = True
    learn.freeze()
    before = learn.get_preds()
    with cached_features(learn) as why, learn.no_bar():
        assert why is None
        after = learn.get_preds()
    torch.testing.assert_close(after[0].area, before[0].area)
    torch.testing.assert_close(after[1].area, before[1].area, equal_nan=True)

def test_what_speaks_against_it_is_said(drawn, capsys):
    learn = learner(drawn, trained=False)
    with cached_features(learn) as why: assert why is None and not learn.met
    learn = learner(drawn, outputs=dict(kind=CategoryBlock), columns=None)
    learn.unfreeze()
    assert not still_inputs(learn.plain_model)
    learn.freeze()
    assert still_inputs(learn.plain_model) == ['image']
    assert 'MultiMixUp changes the inputs' in reason_not_to_cache(learn, MultiMixUp())
    with cached_features(learn, limit=1000) as why: assert 'more than 0 MB' in why
    learn.logger = print
    learn.fine_tune(0, 1e-3, freeze_epochs=2, probe=False, cbs=MultiMixUp())
    assert 'Frozen epochs read the items each time: MultiMixUp changes the inputs' in capsys.readouterr().out
    with pytest.raises(ValueError, match='`cache` is -1'):
        learn.fine_tune(0, 1e-3, freeze_epochs=2, probe=False, cache=-1)
