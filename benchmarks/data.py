"Where the real data lies: `$FASTAI_MULTI_DATA`, or `../shared/data` beside the project"
import os
from pathlib import Path

def data_path(name):
    "The folder `name` of the real data; `FileNotFoundError` that says where it was looked for"
    for root in filter(None,
                       (os.environ.get('FASTAI_MULTI_DATA'),
                        Path(__file__).resolve().parents[1].parent/'shared'/'data')):
        if (Path(root)/name).exists(): return Path(root)/name
    raise FileNotFoundError(f'No {name!r} in $FASTAI_MULTI_DATA or ../shared/data: this needs the real data sets.')
