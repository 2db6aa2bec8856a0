"""Find the documentation of names of other libraries. The index that nbdev puts into fastai and fastcore has their
addresses. The names of other libraries are listed here by hand, because a build has no network to fetch their
inventories. `tests/test_site.py` checks that each name exists in the installed library."""
import importlib, re
from functools import lru_cache

from nbdev.doclinks import NbdevLookup

TORCH = 'https://docs.pytorch.org/docs/stable/'
VISION = 'https://docs.pytorch.org/vision/stable/'

# By (module of the names, its short name, page of one name), the names
BY_HAND = {
    ('torch.nn', 'nn', TORCH+'generated/torch.nn.{}.html'):
        '''Module Sequential ModuleList ModuleDict Parameter Linear Conv2d BatchNorm1d BatchNorm2d LayerNorm
        Dropout ReLU Identity Flatten Embedding EmbeddingBag LSTM GRU MultiheadAttention AdaptiveAvgPool2d
        AdaptiveMaxPool2d MaxPool2d Upsample CrossEntropyLoss BCEWithLogitsLoss MSELoss L1Loss SmoothL1Loss
        HuberLoss''',
    ('torch.nn.functional', 'F', TORCH+'generated/torch.nn.functional.{}.html'):
        'cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss softmax interpolate pad',
    ('torch', 'torch', TORCH+'generated/torch.{}.html'):
        '''Generator autocast no_grad compile manual_seed set_num_threads save load cat stack where randn rand
        randperm topk''',
    ('torch.utils.data', '', TORCH+'data.html#torch.utils.data.{}'): 'Dataset DistributedSampler',
    ('torch.optim', 'optim', TORCH+'generated/torch.optim.{}.html'): 'Adam AdamW SGD Optimizer',
    ('torchvision.models', 'models', VISION+'models/generated/torchvision.models.{}.html'):
        '''resnet18 resnet34 resnet50 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0
        convnext_tiny vit_b_16 swin_t densenet121''',
    ('torchvision.ops', 'ops', VISION+'generated/torchvision.ops.{}.html'):
        'box_iou generalized_box_iou complete_box_iou nms',
    ('pandas', 'pd', 'https://pandas.pydata.org/docs/reference/api/pandas.{}.html'): 'DataFrame Series read_csv',
    ('numpy', 'np', 'https://numpy.org/doc/stable/reference/generated/numpy.{}.html'): 'ndarray',
    ('pathlib', '', 'https://docs.python.org/3/library/pathlib.html#pathlib.{}'): 'Path',
    ('functools', '', 'https://docs.python.org/3/library/functools.html#functools.{}'): 'partial lru_cache',
}
ONE_BY_ONE = {'torch.Tensor': TORCH+'tensors.html', 'Tensor': TORCH+'tensors.html',
              'torch.utils.data.DataLoader': TORCH+'data.html#torch.utils.data.DataLoader',
              'PIL.Image': 'https://pillow.readthedocs.io/en/stable/reference/Image.html',}
# Names that are linked even without their module. Ordinary words and functions are linked only in the form `nn.Linear`
# or `torch.save`
BARE = set('''
    Module Sequential ModuleList ModuleDict Parameter MultiheadAttention EmbeddingBag CrossEntropyLoss
    BCEWithLogitsLoss MSELoss L1Loss SmoothL1Loss cross_entropy DistributedSampler AdamW resnet18 resnet34 resnet50
    mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 convnext_tiny vit_b_16 swin_t densenet121
    generalized_box_iou complete_box_iou DataFrame Series ndarray Path partial
'''.split())
# Words of our prose that happen to be names in fastai or fastcore
NOT_MEANT = set('''
    encodes decodes maps requires_grad text image box kind label tags area noop params store_attr test_eq copy L stop
    first last add sub mul truediv eq ne lt le gt ge in_ is_ not_ true null range_of
'''.split())

# The prose names the methods of these classes without the class: `predict` is ours, `lr_find` is fastai's
METHODS_OF = ['MultiLearner', 'MultiDataLoaders']
VARIABLES = dict(learn='Learner', dls='DataLoaders')
OF_LEARNER = '''
    lr_find fine_tune fit fit_one_cycle fit_flat_cos fit_sgdr validate export freeze unfreeze freeze_to
    no_bar no_logging added_cbs add_cb show_results
'''.split()
OF_FASTAI = {**dict.fromkeys(OF_LEARNER, 'Learner'), **dict.fromkeys(['show_batch','test_dl'], 'DataLoaders')}

@lru_cache
def by_hand():
    "The address for every way to write a name listed above"
    d = dict(ONE_BY_ONE)
    for (mod,short,page),names in BY_HAND.items():
        for n in names.split():
            for k in [f'{mod}.{n}', *([f'{short}.{n}'] if short else []), *([n] if n in BARE else [])]:
                d[k] = page.format(n)
    return d

@lru_cache
def nbdev_lookup(): return NbdevLookup(strip_libs=('fastai','fastcore'), incl_libs=('fastai','fastcore'))

def elsewhere(name):
    "The address of the documentation of another library's name, or nothing"
    if name in NOT_MEANT: return None
    name = (f'{OF_FASTAI[name]}.{name}' if name in OF_FASTAI and nbdev_lookup().doc(f'{OF_FASTAI[name]}.{name}')
            else name)
    return by_hand().get(name) or (nbdev_lookup().doc(name) if re.fullmatch(r'[A-Za-z_][\w.]*', name) else None)

def there(mod, name): return hasattr(importlib.import_module(mod), name)
