"Fixtures of several test files: one drawn data set, and the real data if they are installed"
import random
import numpy as np
import pytest, torch
from benchmarks.data import data_path
from fastai_multi import multi_shapes

torch.set_num_threads(2)

@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    "A small drawn set, made once"
    return multi_shapes(tmp_path_factory.mktemp('data')/'shapes', n=80, size=64, seed=0)

@pytest.fixture(scope='session')
def real():
    "The folder of a real data set by name, or a skip that says why"
    def _get(name):
        try: return data_path(name)
        except FileNotFoundError as e: pytest.skip(str(e))
    return _get

@pytest.fixture(autouse=True)
def one_state():
    "Every test starts from the same random state, whatever ran before it"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

@pytest.fixture
def one_thread():
    "Small pictures: more threads only wait for each other"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def pytest_collection_modifyitems(items):
    "fastai's star import brings fastcore's `test_eq` and its like along, which are no tests of ours"
    items[:] = [i for i in items
                if getattr(i, 'function', None) is None or i.function.__module__.startswith(('tests','test_'))]
