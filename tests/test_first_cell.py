"The first cell of a notebook prints nothing red and defines every name that you call"
import nbformat
from nbclient import NotebookClient

WITHOUT_WIDGETS = "import sys\nsys.modules['ipywidgets'] = None     # as where the extra `notebook` is not installed"
METHODS = '''fine_tune fit_one_cycle fit_flat_cos fit_sgdr lr_find no_bar no_logging to_fp16 to_bf16 to_fp32 to_channelslast
    to_contiguous summary tta export predict validate get_preds show_results freeze unfreeze freeze_to save load'''
CHECK = f"""missing = [n for n in {METHODS.split()} if not hasattr(MultiLearner, n)]
from fastai.learner import Recorder
missing += [n for n in ('plot_loss', 'plot_sched', 'plot_lr_find') if not hasattr(Recorder, n)]
print(missing)"""

def outputs(*cells):
    "The outputs of the cells of a new notebook, run in its own kernel"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, kernel_name='python3', timeout=300).execute()
    return [o for c in nb.cells for o in c.outputs]

def test_the_first_cell_prints_nothing_red():
    "The star import alone also gives a learner all of fastai's methods. test_jupyterlab.py tests this with widgets"
    found = outputs(WITHOUT_WIDGETS, 'from fastai_multi import *', CHECK, 'from fastai.vision.all import *')
    assert [(o.name, o.text) for o in found]==[('stdout', '[]\n')]
