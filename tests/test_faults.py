"Faults outside the program: a full disk, a deleted picture, a killed worker, a lack of memory, a NaN"
import errno, io, os, subprocess, sys
import pytest, torch
from fastai.vision.all import *
from fastai_multi import *

pytestmark = pytest.mark.usefixtures('one_thread')

def learner(path, where=None, workers=0, **kwargs):
    "A small learner of drawn shapes"
    dls = MultiDataLoaders.from_csv(path, image='file', outputs=dict(kind=CategoryBlock, area=RegressionBlock),
                                    item_tfms=Resize(32), bs=8, num_workers=workers, seed=0)
    res = multi_learner(dls, simple_cnn(2, 8), path=where, **kwargs)
    for f in (res.no_bar, res.no_logging): f().__enter__()
    return res

@pytest.fixture
def full_disk(monkeypatch):
    "A function that fills the disk, so that no file larger than 1,000 bytes can be written"
    real = torch.save
    def save(obj, f, **kwargs):
        real(obj, f, **kwargs)
        if isinstance(f, io.BytesIO): return
        path = f if isinstance(f, Path) else f.name
        os.truncate(path, 1000)
        raise OSError(errno.ENOSPC, 'No space left on device', str(path))
    return lambda: monkeypatch.setattr(torch, 'save', save)

@pytest.mark.parametrize('write', ['save','export','checkpoint'])
def test_a_full_disk_leaves_the_old_file(shapes, tmp_path, full_disk, write):
    learn = learner(shapes, tmp_path)
    acts = dict(save=lambda: learn.save('model'), export=lambda: learn.export('model.pkl'),
                checkpoint=lambda: learn.fit(1, cbs=SaveModelCallback(fname='model')))
    acts[write]()
    files = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    assert len(files)==1
    full_disk()
    with pytest.raises(OSError, match='No space left'): acts[write]()
    assert {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}==files

def test_a_full_disk_stops_a_training_that_can_go_on(shapes, tmp_path, full_disk, monkeypatch):
    "The training resumes from the epoch that was saved before the disk was full"
    set_seed(0)
    whole = learner(shapes, tmp_path/'whole')
    whole.fit_one_cycle(3, 1e-2)
    set_seed(0)
    learn = learner(shapes, tmp_path/'part')
    class Fill(Callback):
        fills = True
        def before_epoch(self):
            if self.epoch==1 and self.fills: full_disk()
    with pytest.raises(OSError, match='No space left'): learn.fit_one_cycle(3, 1e-2, resume=True, cbs=Fill())
    monkeypatch.undo()
    Fill.fills = False
    set_seed(0)
    again = learner(shapes, tmp_path/'part')
    again.fit_one_cycle(3, 1e-2, resume=True, cbs=Fill())
    for a,b in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(a, b)

@pytest.mark.parametrize('workers', [0, 1])
def test_a_picture_that_vanishes_during_an_epoch_is_named(shapes, tmp_path, workers):
    shutil.copytree(shapes, tmp_path/'data')
    learn = learner(tmp_path/'data', workers=workers)
    file = tmp_path/'data'/learn.dls.train.items.file.iloc[-1]
    picture = file.read_bytes()
    class Remove(Callback):
        def before_epoch(self):
            if self.epoch==1: file.unlink()
    with pytest.raises(Exception, match=re.escape(file.name)): learn.fit(3, cbs=Remove())
    weights = [p.clone() for p in learn.model.parameters()]
    file.write_bytes(picture)
    learn.fit(1)
    assert any(not torch.equal(a, b) for a,b in zip(weights, learn.model.parameters()))

killing = """
import os, signal, sys, time, torch
from fastai.vision.all import *
from fastai_multi import *
dls = MultiDataLoaders.from_csv(sys.argv[1], image='file', outputs=dict(kind=CategoryBlock), item_tfms=Resize(32),
                                bs=8, num_workers=1)
learn = multi_learner(dls, simple_cnn(2, 8))
class Kill(Callback):
    def after_batch(self):
        if self.iter!=1: return
        os.kill(torch.multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(20)    # PyTorch's handler raises within it
with learn.no_bar(), learn.no_logging():
    try: learn.fit(1, cbs=Kill())
    except RuntimeError as e: print('stopped:', e)
    learn.fit(1)
    print(learn.evaluate()['valid_loss'])
"""

def test_a_worker_that_is_killed_stops_the_training_and_the_next_one_runs(shapes):
    "The test needs its own process, because PyTorch's signal handler raises wherever the main program is"
    run = subprocess.run([sys.executable, '-c', killing, str(shapes)], capture_output=True, text=True, timeout=300)
    assert run.returncode==0, run.stderr
    loss = run.stdout.strip().splitlines()[-1]
    assert re.search('(?s)stopped: .*worker.*killed', run.stdout)
    assert np.isfinite(float(loss))

def test_a_loss_that_is_nan_is_named_and_the_best_weights_stay(shapes, tmp_path):
    learn = learner(shapes, tmp_path)
    class Spoil(Callback):
        order = 60
        def before_batch(self):
            if self.training and self.epoch==1: self.learn.xb = (self.xb[0]*math.inf,)
    with pytest.warns(UserWarning, match="'(kind|area)'"):
        learn.fit(3, cbs=[Spoil(), SaveModelCallback(fname='best'), TerminateOnNaNCallback()])
    assert np.isfinite(learn.load('best').evaluate()['valid_loss'])

class Narrow(nn.Module):
    "A layer with memory for a given number of items"
    def __init__(self, most):
        super().__init__()
        self.most = most
    def forward(self, x):
        if len(x)>self.most: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return x

def test_out_of_memory_says_what_to_lower_and_the_advice_works(shapes):
    learn = learner(shapes)
    head = learn.model.heads['kind']
    learn.model.heads['kind'] = nn.Sequential(Narrow(4), head)
    sentence = r'Tried to allocate 2.00 GiB. This happened in training, with a batch of input 8x3x32x32.*bs=4'
    for train in (learn.fit, learn.fit_one_cycle):
        with pytest.raises(torch.OutOfMemoryError, match=sentence): train(1)
    with pytest.raises(torch.OutOfMemoryError, match='in validation'): learn.validate()
    with pytest.raises(torch.OutOfMemoryError, match='in prediction'): learn.get_preds()
    learn.dls = MultiDataLoaders(*[dl.new(bs=4) for dl in learn.dls.loaders])
    learn.fit(1, cbs=GradientAccumulation(8))
    assert np.isfinite(learn.evaluate()['valid_loss'])
