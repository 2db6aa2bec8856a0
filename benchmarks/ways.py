"Time several ways to do the same thing in interleaved rounds, in processor time"
import time
from statistics import median
import pandas as pd

def rounds(ways:dict, n:int, clock=time.process_time) -> dict: # Functions by name; the number of rounds
    "The seconds of each way in each round. The order rotates, and processor time leaves out other programs"
    names = list(ways)
    res = {k: [] for k in names}
    for k in names: ways[k]()
    for r in range(n):
        at = r%len(names)
        for k in names[at:]+names[:at]:
            start = clock()
            ways[k]()
            res[k].append(clock()-start)
    return res

def beside(seconds:dict, base:str, n_items:int=1) -> pd.DataFrame: # From `rounds`; a way; items of one call
    "A row for each way: median milliseconds per item, in total and beyond `base` in the same round"
    rows = []
    for name,s in seconds.items():
        over = median(a-b for a,b in zip(s, seconds[base]))
        ratio = median(a/b for a,b in zip(s, seconds[base]))
        rows.append(dict(what=name, ms=1000*median(s)/n_items, over_ms=1000*over/n_items, ratio=ratio))
    return pd.DataFrame(rows)
