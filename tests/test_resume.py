"A killed training resumes, and ends with the same weights"
import json, subprocess, sys
from pathlib import Path
import pytest
from fastai.vision.all import *
from fastai_multi import *

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "The rows of `tests/killed.py` for the killed trainings"
    run = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'tests.killed', tmp_path_factory.mktemp('killed')],
                         capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode==0, run.stderr[-2000:]
    return [json.loads(o) for o in run.stdout.splitlines() if o.startswith('{')]

def test_trainings_killed_at_random_moments_end_the_same(rows):
    assert len(rows)>=20
    assert {o['difference'] for o in rows}=={0.}, rows
    assert not any(o['left'] for o in rows), rows

def _learner(path, shapes):
    set_seed(0)
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', outputs=dict(kind=CategoryBlock), seed=0, bs=16,
                                    item_tfms=Resize(32), num_workers=0)
    return multi_learner(dls, simple_cnn(depth=2), path=path)

class Stop(Callback):
    "Interrupt the training at the end of the second epoch, as a user would"
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def before_validate(self):
        if self.epoch==1 and self.on: raise KeyboardInterrupt()
    def __init__(self, on): self.on = on

def test_an_epoch_that_was_interrupted_counts_as_not_begun(tmp_path, shapes, capsys):
    whole = _learner(tmp_path, shapes)
    with whole.no_bar(): whole.fit(2, cbs=Stop(False), resume=True)
    learn = _learner(tmp_path, shapes)
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Stop(True), resume=True)
    with learn.no_bar(): learn.fit(2, cbs=Stop(False), resume=True)          # the same learner in the same process
    assert 'Resuming after 1 of 2 epochs' in capsys.readouterr().out
    assert len(learn.recorder.values)==2
    for a,b in zip(whole.model.parameters(), learn.model.parameters()): assert torch.equal(a, b)

def test_the_file_of_another_training_is_refused_before_anything_changes(tmp_path, shapes):
    learn = _learner(tmp_path, shapes)
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Stop(True), resume=True)
    other = _learner(tmp_path, shapes)
    before = [p.detach().clone() for p in other.model.parameters()]
    with other.no_bar(), pytest.raises(ValueError, match='It had 3, and this one has 4'):
        other.fit(4, cbs=Stop(False), resume=True)
    for a,b in zip(before, other.model.parameters()): assert torch.equal(a, b)
    with pytest.raises(TypeError, match='`resume` is 1.5'): other.fit_one_cycle(1, resume=1.5)
