"Defaults are part of the interface: a changed default changes every user's results"
import inspect
import pytest
import fastai_multi
from fastai_multi import *

DEFAULTS = {
    'Numericaliser': dict(max_vocab=30000, min_freq=2, max_len=256, shared=False),
    'safe_tfms': dict(refuse=True),
    'NumberBlock': dict(scale='linear'),
    'ImageTextBlock': dict(max_vocab=30000, min_freq=2, max_len=256, shared=False),
    'PlainTextBlock': dict(max_vocab=30000, min_freq=2, max_len=256, shared=False),
    'SegmentationBlock': dict(resize=False),
    'InputReader': dict(pref='', suff=''),
    'MultiDataLoaders': dict(path='.'),
    'kfold_dls': dict(path='.', folds=5),
    'multi_shapes': dict(n=500, size=128, seed=42, missing=0.0, masks=False),
    'image_encoder': dict(n_in=3, pretrained=False),
    'simple_cnn': dict(depth=3, width=16, n_in=3, grid=1, ks=3, bn=False, pool=True),
    'text_encoder': dict(pad_id=0),
    'MultiModel': dict(fusion='concat', named=True, pool='concat'),
    'BoxLoss': dict(l1=1.0, giou=1.0, beta=0.1, reduction='mean'),
    'MultiLoss': dict(named=True, reduction='mean'),
    'DynamicWeightAverage': dict(temperature=2.0),
    'UncertaintyWeighting': dict(lr=0.02, closed_form=False),
    'GradNorm': dict(alpha=1.5, lr=0.025),
    'FAMO': dict(lr=0.025, wd=0.001, every=4),
    'GradientBalance': dict(aggregator='upgrad', level='features'),
    'TaskMonitor': dict(every=10, show=False),
    'TaskEarlyStopping': dict(patience=3, min_delta=0.0, keep_best=False),
    'compare_single_task': dict(fit=5, seeds=3),
    'MultiCutMix': dict(alpha=1.0, text='features'),
    'MultiMixUp': dict(alpha=0.4, text='features'),
    'MultiMixUpOrCutMix': dict(mixup_alpha=0.4, cutmix_alpha=1.0, p_cutmix=0.5, text='features'),
    'multi_learner': dict(text='bag', fusion='concat', modality_dropout=0., pretrained=True, normalize=True),
    'depth_finder': dict(epochs=1, agreement=4),
    'stage_agreement': dict(batches=4),
    'modality_check': dict(ds_idx=1, seed=42),
    'MultiLearner.fine_tune': dict(lr_mult=100, pct_start=0.3, div=5.0, probe=True, resume=False, cache=True),
    'MultiLearner.get_preds': dict(ds_idx=1, with_input=False, with_decoded=False, with_loss=False, inner=False,
                                   reorder=True),
    'MultiLearner.predict': dict(with_input=False, joint=False),
    'MultiLearner.tta': dict(ds_idx=1, n=4, beta=0.25, use_max=False),
    'MultiLearner.evaluate': dict(ds_idx=1, baseline=False),
    'MultiLearner.tune_thresholds': dict(by_tag=False, ds_idx=1),
    'MultiLearner.task_report': dict(n_batches=8, baselines=False),
    'MultiLearner.plot_tasks': dict(cosines=False),
    'MultiDataLoaders.from_df': dict(path='.', suff='', valid_pct=0.2, fold=0, bs=64, shuffle=True),
    'MultiDataLoaders.from_csv': dict(csv_fname='items.csv', header='infer', quoting=0, suff='', valid_pct=0.2,
                                      fold=0, bs=64, shuffle=True),
    'MultiDataLoaders.from_folder': dict(train='train', valid='valid', suff='', fold=0, bs=64, shuffle=True),
    'MultiInterpretation.top_losses': dict(k=9, largest=True),
    'MultiInterpretation.plot_top_losses': dict(k=9, largest=True),
    'MultiInterpretation.slices': dict(n=4, max_values=20, metrics=True, resamples=100),
    'MultiInterpretation.disagreements': dict(k=9),
    'TaskMonitor.plot': dict(log=True),
    'MultiDL.show_batch': dict(max_n=9, show=True, unique=False),
    'MultiDL.show_results': dict(max_n=9, show=True),
}

@pytest.mark.parametrize('name', DEFAULTS)
def test_defaults(name):
    "Defaults that are numbers, words or switches keep their values. Other tests check what they do"
    owner,_,method = name.partition('.')
    f = getattr(fastai_multi, owner)
    if method: f = getattr(f, method)
    found = {p.name: p.default for p in inspect.signature(f).parameters.values() if p.default is not p.empty}
    assert {k: v for k,v in found.items() if isinstance(v, (bool,int,float,str))} == DEFAULTS[name]
