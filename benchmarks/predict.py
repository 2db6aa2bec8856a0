"""Compare `predict` with a call of the model alone, and `predict_df` with a bare loop: `python -m benchmarks.predict`

A small model reads a picture of 64 px and a text, and has three outputs. Each way runs once in each round, and the
order rotates. A figure is the median over the rounds, in processor milliseconds. The model runs twice in each round:
the difference between the two is noise. The rows are written to benchmarks/results/predict.csv."""
import argparse, tempfile
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.answers import item_dl
from fastai_multi.batch import name_batch
from benchmarks.serve import HERE, trained
from benchmarks.ways import beside, rounds

class Unknown(Callback):
    "A callback that `predict` does not know, so that it runs fastai's validation loop"
    def after_pred(self): pass

def inputs(learn, b):
    "The inputs of a batch in the form that the model takes"
    return name_batch(b[:learn.dls.n_inp], (), learn.description)[0]

def call(learn, b):
    "Run only the model on a batch"
    with torch.no_grad(): return learn.model(*inputs(learn, b))

def long_way(learn, item):
    "Predict with fastai's validation loop"
    with learn.added_cbs([Unknown()]): return learn.predict(item)

def one_item(learn, path, df, n_rounds) -> pd.DataFrame:
    "Compare `predict` with a call of the model on a batch that is already read"
    row = df.iloc[0]
    item = (path/row.file, row.caption)
    loaded = (PILImage.create(item[0]), row.caption)
    b = item_dl(learn.dls, item, learn.modalities).one_batch()
    learn.model.eval()
    model = partial(call, learn, b)
    ways = {'model': model, 'model again': model, 'predict((path, text))': partial(learn.predict, item),
            'predict((picture, text))': partial(learn.predict, loaded), 'predict(row)': partial(learn.predict, row),
            'predict, by the long way': partial(long_way, learn, item)}
    return beside(rounds(ways, n_rounds), 'model')

def many_items(learn, df, n_rounds, bs=64) -> pd.DataFrame:
    "Compare `predict_df` with a loop over the same loader that keeps nothing, in milliseconds per row"
    def loop():
        for b in learn.dls.test_dl(df, bs=bs): call(learn, b)
    ways = {'loop, a row': loop, 'loop again, a row': loop, 'predict_df, a row': partial(learn.predict_df, df, bs=bs)}
    return beside(rounds(ways, n_rounds), 'loop, a row', len(df))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=100)
    parser.add_argument('--items', type=int, default=600)
    parser.add_argument('--out', type=Path, default=HERE/'predict.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        path = multi_shapes(Path(d)/'shapes', n=200, size=64, seed=0)
        learn = trained(path)
        df = pd.read_csv(path/'items.csv')
        many = pd.concat([df]*math.ceil(args.items/len(df)), ignore_index=True).head(args.items)
        with learn.no_bar():
            res = pd.concat([one_item(learn, path, df, args.rounds), many_items(learn, many, max(3, args.rounds//10))])
    res.to_csv(args.out, index=False, float_format='%.4g')
    print(res.to_string(index=False, float_format='%.3g'))

if __name__=='__main__': main()
