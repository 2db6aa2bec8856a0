"""Frozen epochs with features from memory, compared with reading the items: `python -m benchmarks.frozen [SET …]`

Five frozen epochs of a pretrained `mobilenet_v2`, each way in its own process, in turn: seconds, and peak memory."""
import argparse
import multiprocessing
import resource
import time
import warnings
import pandas as pd
from fastai.vision.all import *
from fastai_multi import *
from benchmarks.data import data_path
from benchmarks.sets import SETS, loaders_of

WAYS = {'read each epoch': False, 'from memory': True, 'three augmented passes': 3}

def seconds(name, way, epochs=5):
    "Seconds of frozen epochs, and the most memory (MB) that the process had before and after"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    set_seed(0)
    learn = multi_learner(loaders_of(name), mobilenet_v2, weights=first(data_path('weights').glob('*.pth')))
    with learn.no_bar(), learn.no_logging():
        learn.validate()                               # everything is loaded
        before = peak()
        start = time.perf_counter()
        learn.fine_tune(0, freeze_epochs=epochs, probe=False, cache=WAYS[way])
        return time.perf_counter()-start, before, peak()

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sets', nargs='*', default=['coco', 'fashion'], choices=list(SETS))
    p.add_argument('--repeats', type=int, default=3)
    args = p.parse_args()
    rows = []
    for _ in range(args.repeats):
        for name in args.sets:
            for way in WAYS: rows.append((name, way, *measured(name, way)))
    table = pd.DataFrame(rows, columns=['set', 'way', 'seconds', 'MB before', 'MB peak'])
    print(table.groupby(['set', 'way'], sort=False).median().round(1).to_string())

def measured(name, way):
    "The figures of a way, from a process of its own"
    with multiprocessing.get_context('spawn').Pool(1) as pool: return pool.apply(seconds, (name, way))

if __name__ == '__main__': main()
