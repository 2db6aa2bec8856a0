"Find the real data: `$FASTAI_MULTI_DATA`, or `../shared/data` beside the project"
import os
from pathlib import Path

def data_path(name):
    "The folder `name` of the real data; `FileNotFoundError` that says where it was looked for"
    roots = [Path(__file__).resolve().parents[2]/'shared'/'data']
    if os.environ.get('FASTAI_MULTI_DATA'): roots.insert(0, Path(os.environ['FASTAI_MULTI_DATA']))
    for root in roots:
        if (root/name).exists(): return root/name
    raise FileNotFoundError(f'No {name!r} in $FASTAI_MULTI_DATA or ../shared/data: this needs the real data sets.')
