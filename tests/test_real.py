"Real photos, real titles and captions, real pretrained weights; skipped with a reason if they are not installed"
import numpy as np, pandas as pd, pytest
from fastai.vision.all import *
from fastai_multi import *
from benchmarks import coco, fashion, fusion

@pytest.fixture
def weights(real): return next(real('weights').glob('mobilenet_v2*.pth'))

def test_sixteen_photos_can_be_overfitted(real, weights):
    learn = coco.overfit(real('coco_mini'), weights=weights)
    res = learn.evaluate()
    assert res['label_accuracy']==1 and res['box_iou']>=0.8, res
    learn.dls.show_batch(max_n=4)
    learn.show_results(max_n=4)

def test_pretrained_weights_from_a_file_are_used_frozen_and_normalised(real, weights):
    df = coco.largest(real('coco_mini')).iloc[:32]
    learn = multi_learner(coco.loaders(df, real('coco_mini')), models.mobilenet_v2, weights=weights)
    norm = [f for f in learn.dls.train.after_batch.fs if isinstance(f, Normalize)]
    assert len(norm)==1
    torch.testing.assert_close(norm[0].mean.flatten().cpu(), tensor(imagenet_stats[0]), atol=1e-4, rtol=0)
    state = torch.load(weights, weights_only=True)
    conv = first(m for m in learn.model.modules() if isinstance(m, nn.Conv2d))
    assert any(v.shape==conv.weight.shape and torch.equal(v, conv.weight) for v in state.values())
    assert not conv.weight.requires_grad

def test_fashion_trains_on_photo_and_title(real, weights):
    "In a small part of `python -m benchmarks.fashion`, titles alone must already beat the majority class"
    df = pd.read_csv(real('fashion')/'items.csv').sample(600, random_state=0).reset_index(drop=True)
    df['is_valid'] = df.index.isin(RandomSplitter(0.2, seed=42)(df)[1])
    learn = multi_learner(fashion.loaders(df, real('fashion'), False, True, 64, 32, 0), lr=1e-2)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 1e-2)
    res = learn.evaluate()
    for o in ('gender','masterCategory'):
        majority = (df[df.is_valid][o]==df[~df.is_valid][o].mode()[0]).mean()
        assert res[f'{o}_accuracy'] > majority, (o, res)

def test_gaps_leave_each_product_an_input(real):
    "This checks the validation items of `python -m benchmarks.fusion missing`"
    items = pd.read_csv(real('fashion')/'items.csv')
    gaps = fusion.with_gaps(items)
    no_photo,no_title = gaps.file.isna(),gaps.title.isna()
    assert not (no_photo & no_title).any()
    assert abs(no_photo.mean()-.3)<.03 and abs(no_title.mean()-.3)<.03
    assert gaps.file[~no_photo].equals(items.file[~no_photo])
    assert not fusion.with_gaps(items, ('text',)).file.isna().any()
