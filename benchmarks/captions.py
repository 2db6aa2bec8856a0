"""Train on photos of which three quarters have a caption, read by MiniLM: `python -m benchmarks.captions`

On `coco_mini`, the learners predict tags and the numbers of objects and persons from the photo and its first caption;
85 of the 356 photos have no caption. Each learner trains with `fine_tune(5)` as in `benchmarks.defaults`, with three
seeds. Then `modality_check` measures what each output loses without an input, and with the input of another item. The
rows are written to benchmarks/results/captions.csv (scores by way and seed) and captions_check.csv (the check of each
seed)."""
import argparse
import warnings
from fastai.vision.all import *
from fastai_multi import *
from benchmarks.data import data_path
from benchmarks.defaults import EPOCHS
from benchmarks.fusion import minilm
from benchmarks.sets import metrics_of, read_set

HERE = Path(__file__).resolve().parent/'results'
WAYS = ('photo', 'caption by MiniLM', 'photo and bag of words', 'photo and MiniLM')

def learner_of(way):
    "The learner from the README's call, with the inputs of `way`"
    df,given = read_set('coco')
    path = given.pop('path')
    options = {}
    arch = mobilenet_v2
    if 'MiniLM' in way:
        given['text_block'] = PlainTextBlock(tok=minilm())
        options['text'] = minilm()
    if way=='photo': given.pop('text')
    if way.startswith('photo'): options['weights'] = first(data_path('weights').glob('*.pth'))
    else:
        arch = None
        given.pop('image')
        given.pop('item_tfms')
    dls = MultiDataLoaders.from_df(df, path, valid_col='is_valid', num_workers=0, **given)
    return multi_learner(dls, arch, **options)

def trained(way, seed, epochs=EPOCHS):
    "The learner of `way` after `fine_tune`"
    set_seed(seed)
    learn = learner_of(way)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(epochs)
    return learn

def append(rows, out):
    "Append rows to a CSV file"
    pd.DataFrame(rows).to_csv(out, mode='a', header=not out.exists(), index=False, float_format='%.4f')

def is_done(way, seed, out):
    if not out.exists(): return False
    table = pd.read_csv(out)
    return bool(((table.way==way) & (table.seed==seed)).any())

def measure(way, seed, args):
    "Write the scores of a way; with both inputs and MiniLM, write the check too"
    out = args.folder/'captions.csv'
    if is_done(way, seed, out): return
    learn = trained(way, seed, args.epochs)
    scores = metrics_of(learn)
    if way==WAYS[-1]:
        with learn.no_bar(): check = modality_check(learn)
        print(*check.sentences(), sep='\n', flush=True)
        append(check.table.reset_index().assign(seed=seed), args.folder/'captions_check.csv')
    append([dict(way=way, seed=seed, output=o, metric=v) for o,v in scores.items()], out)
    print(way.ljust(24), seed, {o: round(v, 3) for o,v in scores.items()}, flush=True)

def show(folder):
    "Print the mean and the spread of the scores over seeds, and the means of the check"
    table = pd.read_csv(folder/'captions.csv')
    print('\nmean average precision of tags; negative mean absolute error of counts')
    stats = table.groupby(['way','output'], sort=False).metric.agg(['mean','std'])
    print(stats.apply(lambda r: f"{r['mean']:.3f} ± {r['std']:.3f}", axis=1).unstack()[table.output.unique()].to_string())
    check = pd.read_csv(folder/'captions_check.csv')
    print('\nmodality_check: means over seeds')
    by = ['output','input','change','score']
    print(check.groupby(by, sort=False)[['unchanged','changed','difference','low','high']].mean().round(3).to_string())

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--epochs', type=int, default=EPOCHS)
    p.add_argument('--folder', type=Path, default=HERE)
    p.add_argument('--table', action='store_true', help='print the tables and measure nothing')
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    for seed in args.seeds:
        for way in WAYS:
            if not args.table: measure(way, seed, args)
    show(args.folder)

if __name__ == '__main__': main()
