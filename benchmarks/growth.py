"""Measure the time to make loaders and a first batch, by the number of rows and outputs: `python -m benchmarks.growth`

The table has four numbers, with or without a caption, 1 to 16 outputs of ten classes, and up to `--most` rows. Times
are processor seconds, the minimum over `--rounds`. The printed exponent is the slope of a straight line through the
logarithms: 1 means linear. The rows are written to benchmarks/results/growth.csv."""
import argparse, gc, resource, time
from fastai.vision.all import *
from fastai_multi import *
from benchmarks.serve import HERE

FEATURES = [f'x{i}' for i in range(4)]
WORDS = 'a the red blue green small large circle square bird car house on under beside left right with two'.split()

def table(n, n_outputs, seed=0) -> pd.DataFrame:
    "A table of captions of eight words, numbers and classes"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(rng.normal(size=(n, len(FEATURES))), columns=FEATURES)
    df['caption'] = [' '.join(o) for o in np.array(WORDS)[rng.integers(0, len(WORDS), (n,8))]]
    for k in range(n_outputs): df[f'k{k}'] = rng.integers(0, 10, n).astype(str)
    return df

def loaders(df, text):
    "Loaders of a table"
    outputs = {c: CategoryBlock for c in df if c[0]=='k'}
    column = 'caption' if text else None
    return MultiDataLoaders.from_df(df, image=None, text=column, features=FEATURES, outputs=outputs, bs=64,
                                    num_workers=0, seed=0)

def once(n, n_outputs, text) -> dict:
    "Seconds to make the loaders and to read the first batch"
    df = table(n, n_outputs)
    gc.collect()
    times = [time.process_time()]
    dls = loaders(df, text)
    times.append(time.process_time())
    dls.one_batch()
    times.append(time.process_time())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    return dict(rows=n, outputs=n_outputs, text=text, loaders_s=times[1]-times[0], batch_s=times[2]-times[1],
                peak_mb=memory)

def best(n_rounds, *args) -> dict:
    "The fastest of several runs"
    return min([once(*args) for _ in range(n_rounds)], key=lambda r: r['loaders_s']+r['batch_s'])

def slope(x, y) -> float:
    "The exponent with which `y` grows in `x`"
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--most', type=int, default=100_000)
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--out', type=Path, default=HERE/'growth.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    once(100, 1, True)
    counts = [n for n in (1000, 10_000, 100_000, 1_000_000) if n<=args.most]
    rows = [best(args.rounds, n, 4, text) for text in (False,True) for n in counts]
    rows += [best(args.rounds, 10_000, k, False) for k in (1,2,8,16)]
    res = pd.DataFrame(rows)
    res.to_csv(args.out, index=False, float_format='%.4g')
    print(res.to_string(index=False, float_format='%.3g'))
    for text in (False,True):
        seen = res[(res.text==text) & (res.outputs==4) & (res['rows']>=10_000)]
        if len(seen)>1: print(f'text={text}: exponent {slope(seen.rows, seen.loaders_s+seen.batch_s):.2f} in rows')
    seen = res[(res.rows==10_000) & ~res.text].sort_values('outputs')
    print(f'exponent {slope(seen.outputs, seen.loaders_s+seen.batch_s):.2f} in outputs')

if __name__=='__main__': main()
