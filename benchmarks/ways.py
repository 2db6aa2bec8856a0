"Time several ways to do one thing in interleaved rounds, in processor time"
import time
from statistics import median
import pandas as pd

def rounds(ways:dict, n:int, clock=time.process_time) -> dict: # Functions by name; how many rounds
    "Seconds of each way in each round; the order rotates. By the time of the processor, other work is not in it"
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

def beside(seconds:dict, base:str, n_items:int=1) -> pd.DataFrame: # What `rounds` gave; a way; items of one call
    "A row for each way: milliseconds an item, and what it takes beyond `base` in the same round, as medians"
    rows = []
    for name,s in seconds.items():
        over = median(a-b for a,b in zip(s, seconds[base]))
        ratio = median(a/b for a,b in zip(s, seconds[base]))
        rows.append(dict(what=name, ms=1000*median(s)/n_items, over_ms=1000*over/n_items, ratio=ratio))
    return pd.DataFrame(rows)
