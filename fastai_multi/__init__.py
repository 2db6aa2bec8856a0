"""One fastai `Learner` that takes several inputs and predicts several outputs of different kinds: categories, tags, numbers, boxes, points, masks.
Every input and output keeps its name from the table to the prediction, and what you know of fastai works: `show_batch`, `lr_find`, `fine_tune`,
`show_results`, `predict`, `get_preds`, `tta`, `export`, metrics and callbacks."""

import importlib as _importlib, pkgutil as _pkgutil, warnings as _warnings
from threading import RLock as _RLock
from importlib.metadata import PackageNotFoundError as _NotInstalled, version as _version

try: __version__ = _version(__name__)
except _NotInstalled: __version__ = '0+not.installed'

# What a notebook needs under a short name.
# The rest of a module's `__all__` is one import away, as in `from fastai_multi.core import flat`.
_public = """Inputs Outputs ImageText Numericaliser OnPart safe_tfms MultiDL
    FeaturesBlock RowBlock NumberBlock GroupBlock ImageTextBlock MultiInputBlock MultiOutputBlock OneOutputBlock PlainTextBlock
    PointsBlock SegmentationBlock DepthBlock NormalsBlock WeightBlock ObjectsBlock describe
    read_coco read_voc read_yolo load_multi_learner
    InputReader OutputReader MultiDataLoaders stream_dls PictureCache Shrink kfold_dls multi_shapes multi_rooms
    Edits apply_edits Tiles AdoptedDetector
    image_encoder simple_cnn text_encoder transformer_encoder dual_encoders awd_lstm_encoder vector_encoder MultiModel
    BoxLoss MultiLoss f1_multi map_multi mask_accuracy point_distance
    FixedWeights ScheduledWeights RandomWeighting DynamicWeightAverage GeometricMean UncertaintyWeighting GradNorm FAMO
    GradientBalance ShowWeights TaskMonitor TaskEarlyStopping task_gradients compare_single_task find_rates learning_curves
    OverOutputs MultiCutMix MultiMixUp MultiMixUpOrCutMix MultiLearner multi_learner plot_answer plot_model depth_finder
    stage_agreement MultiInterpretation compare Review review_page ModalityDropout ModelSoup modality_check
    compare_inputs label_plan load_bundle from_hub register_part GradientCheckpointing""".split()

# The modules are read when a public name is first asked for: `import fastai_multi.core` reads `core` alone,
# and a module that is being read may itself import others of this package.
_lock,_reading = _RLock(),False

# What the first import of fastai says in red about its own source and its libraries, and no reader can change
_about_fastai = ['`torch.jit.script` is', "The 'mode.chained_assignment' option is deprecated", 'IProgress not found']

def _read_fastai():
    "Import what `fastai.vision.all` offers, with all methods of a `Learner`, without these warnings"
    ours = []
    for start in _about_fastai:
        _warnings.filterwarnings('ignore', message=start)
        ours.append(_warnings.filters[0])
    try: _importlib.import_module('fastai.vision.all')
    # filters that libraries add for themselves stay, which `catch_warnings` would undo
    finally: _warnings.filters[:] = [f for f in _warnings.filters if f not in ours]

def _gather():
    "Import every module, explain it, and put the public names of its `__all__` here"
    _read_fastai()
    explain = _importlib.import_module(f'{__name__}.docstrings').explain
    names = {}
    for m in sorted(_pkgutil.walk_packages(__path__, f'{__name__}.'), key=lambda m: m.name):
        if m.ispkg or m.name.rpartition('.')[2].startswith('_'): continue
        mod = _importlib.import_module(m.name)
        explain(mod)
        names.update({n: getattr(mod, n) for n in mod.__all__ if n in _public})
    globals().update({n: names[n] for n in _public}, __all__=list(_public))

def __getattr__(name):
    global _reading
    with _lock:
        if not _reading and (name == '__all__' or not name.startswith('_')):
            _reading = True
            try:
                if '__all__' not in globals(): _gather()
            finally: _reading = False
            if name in globals(): return globals()[name]
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

def __dir__(): return sorted({*globals(), *__getattr__('__all__')})
