"""Checks for an environment in which only the wheel is installed. Usage, from any other folder: python .ci/installed.py VERSION"""
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

extras = [n for n in ('timm', 'transformers', 'torchjd', 'torchmetrics', 'nbdev', 'pytest') if find_spec(n)]
if extras: sys.exit(f'Not an environment without extras: {", ".join(extras)} can be imported')

import fastai_multi
before = set(globals())
from fastai_multi import *
names = set(globals()) - before
if not Path(fastai_multi.__file__).is_relative_to(sys.prefix):
    sys.exit(f'{fastai_multi.__file__} is not the installed one')
if fastai_multi.__version__ != sys.argv[1]:
    sys.exit(f'The wheel says version {fastai_multi.__version__}, settings.ini {sys.argv[1]}')
if not names >= set(fastai_multi.__all__) - before: sys.exit('The star import leaves out names of `__all__`')
print(f'fastai_multi {fastai_multi.__version__}: {len(fastai_multi.__all__)} public names, '
      f'{len(list(distributions()))} distributions')
