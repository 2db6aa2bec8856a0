"Find the real data in `$FASTAI_MULTI_DATA`, or in `../shared/data` next to the project"
import os
from pathlib import Path

def data_path(name):
    "The folder `name` of the real data. A `FileNotFoundError` names the places that were searched"
    roots = [Path(__file__).resolve().parents[2]/'shared'/'data']
    if os.environ.get('FASTAI_MULTI_DATA'): roots.insert(0, Path(os.environ['FASTAI_MULTI_DATA']))
    for root in roots:
        if (root/name).exists(): return root/name
    raise FileNotFoundError(f'No {name!r} in $FASTAI_MULTI_DATA or ../shared/data. This needs the real data sets.')
