"""Compare frozen epochs that take features from memory with reading the items: `python -m benchmarks.frozen [SET …]`

A pretrained `mobilenet_v2` trains five frozen epochs in each way. The ways take turns, each in its own process. The
figures are the seconds and the peak memory."""
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
    "Print the seconds of the frozen epochs, and the process's peak memory (MB) before and after them"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    set_seed(0)
    learn = multi_learner(loaders_of(name), mobilenet_v2, weights=first(data_path('weights').glob('*.pth')))
    with learn.no_bar(), learn.no_logging():
        learn.validate()                               # loads everything
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
    "The figures of a way, measured in its own process"
    with multiprocessing.get_context('spawn').Pool(1) as pool: return pool.apply(seconds, (name, way))

if __name__ == '__main__': main()
