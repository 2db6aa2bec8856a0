"Two processes on the CPU train as one process with twice the batch size does"
import os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.distributed import *
from small_models import save_bert, save_siglip
from tests import together

pytest.importorskip('accelerate')
ROOT = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    path = multi_shapes(tmp_path_factory.mktemp('together')/'shapes', n=24, size=64, seed=0)
    save_bert(path/'bert')
    save_siglip(path/'siglip')
    return path

@pytest.fixture(scope='module')
def two(source, tmp_path_factory):
    "The results of each of two processes by case, and the folder of their files"
    out = tmp_path_factory.mktemp('two')
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m',
                          'tests.together', source, out], env=env, cwd=ROOT, capture_output=True, text=True,
                         timeout=400)
    assert run.returncode==0, run.stdout[-2000:]+run.stderr[-6000:]
    return [torch.load(out/f'found_{rank}.pth', weights_only=False) for rank in range(2)], out

@pytest.fixture(scope='module')
def one(source, tmp_path_factory):
    "The results of one process with twice the batch size, by case"
    n = torch.get_num_threads()
    try: return together.run_all(source, tmp_path_factory.mktemp('one'))
    finally: torch.set_num_threads(n)

def tensors(x, at=''):
    "All tensors and numbers in `x`, by their path"
    if isinstance(x, torch.Tensor): return {at: x.float()}
    if isinstance(x, (int,float)): return {at: torch.tensor(float(x))}
    if isinstance(x, dict): pairs = x.items()
    else: pairs = enumerate(x)
    return {k: t for name,v in pairs for k,t in tensors(v, f'{at} {name}').items()}

CASES = ['three_outputs', 'no_label_in_one', 'plain_target',
         *[f'weights_{n}' for n in together.WEIGHTINGS if n!='random'], *[f'fusion_{n}' for n in together.MODELS],
         *together.encoders(Path()), 'objects', 'stopped', 'resumed']

@pytest.mark.parametrize('name', CASES)
def test_as_one_process_with_twice_the_batch(one, two, name):
    "Losses, scores, predictions in the order of the data, and weights are equal"
    mine = tensors(two[0][0][name])
    for k,t in tensors(one[name]).items():
        torch.testing.assert_close(mine[k], t, atol=1e-4, rtol=1e-4, equal_nan=True, msg=lambda m: f'{name}{k}: {m}')

@pytest.mark.parametrize('name', [*CASES, 'mixed', 'weights_random', 'fine_tuned'])
def test_all_processes_end_alike(two, name):
    a,b = (tensors(o[name]) for o in two[0])
    assert a.keys()==b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)

def test_the_cases_are_no_toys(one):
    "Losses are finite and differ, the first process of one case has no label, and the last batches are not full"
    epochs = one['three_outputs']['epochs']
    assert epochs.isfinite().all() and not torch.equal(epochs[0], epochs[1])
    dls = together.loaders(drop_last=False)
    assert dls.train.n%8 and dls.valid.n%8 and len(one['three_outputs']['preds'][0])==dls.valid.n

def test_resumed_is_the_whole_training(two):
    for found in two[0]: assert torch.equal(found['resumed']['weights'], found['resumed']['resumed'])

def test_files_of_rank_0_predict(two):
    "The exported learner and the bundle predict the same as the processes"
    found,out = two
    row = together.table().iloc[0]
    for learn in (load_learner(out/'learner.pkl'), load_bundle(out/'bundle')):
        assert learn.predict(row)[0].area==pytest.approx(found[0]['stopped']['rows'][0], abs=1e-4)
        assert not hasattr(learn, 'multi_distributed_trainer')

@pytest.mark.parametrize('name,words', [
    ('parameters', "Use level='features' with `distrib_ctx`"), ('rates', 'do not train the same thing. They differ in: rates'),
    ('split', 'the items of a split'), ('small', 'in each of 2 processes, and there are 38. Give bs=19 or less'),
    ('search', 'cannot run inside `distrib_ctx`')])
def test_what_cannot_be_is_said(two, name, words):
    for found in two[0]: assert words in found['refused']['said'][name]

def test_without_other_processes_nothing_changes(tmp_path):
    learn = together.learner(together.loaders(path=tmp_path))
    callbacks = list(learn.cbs)
    with learn.distrib_ctx() as inside: assert inside is learn and list(learn.cbs)==callbacks
    assert not learn.loss_func.is_shared

def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(ImportError, match=r'fastai_multi\[scale\]'): make_accelerator({})

@pytest.mark.parametrize('n', [1, 7, 8, 9, 16, 17])
@pytest.mark.parametrize('n_processes', [2, 3])
def test_parts_are_the_whole_in_equal_steps(n, n_processes):
    parts = [process_part(list(range(n)), 4, rank, n_processes) for rank in range(n_processes)]
    assert len({len(p) for p in parts})==1
    assert {i for p in parts for i in p}==set(range(n))
    bs = 4*n_processes
    for k in range(0, n, bs):
        step = [i for p in parts for i in p[k//n_processes:k//n_processes+4]]
        assert step[:min(bs, n-k)]==list(range(k, min(k+bs, n)))
