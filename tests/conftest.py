"Fixtures for several test files: a drawn data set, and the real data if they are installed"
import random
import numpy as np
import pytest, torch
from benchmarks.data import data_path
from fastai_multi import multi_shapes

torch.set_num_threads(1)    # small models, and two test processes on two cores

@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    "The folder of a small drawn data set, made once per session"
    return multi_shapes(tmp_path_factory.mktemp('data')/'shapes', n=80, size=64, seed=0)

@pytest.fixture(scope='session')
def real():
    "Return the folder of a real data set by name, or skip the test and say why"
    def _get(name):
        try: return data_path(name)
        except FileNotFoundError as e: pytest.skip(str(e))
    return _get

@pytest.fixture(autouse=True)
def one_state():
    "Start every test from the same random state, whatever ran before it"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

@pytest.fixture
def one_thread():
    "Use one thread: with small pictures, several threads only wait for each other"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def pytest_collection_modifyitems(items):
    "Drop fastcore's `test_eq` and similar functions, which fastai's star import brings and which are not our tests"
    items[:] = [i for i in items
                if getattr(i, 'function', None) is None or i.function.__module__.startswith(('tests','test_'))]
