"""Compare the validation loss of `fusion='tokens'` with that of `'concat'` on the drawn set, by learning rate.

`python -m benchmarks.tokens` prints means and spreads, and takes about two minutes on one core. With `--shared` it
compares one encoder for two pictures with two encoders."""
import argparse, tempfile, warnings
from fastai.vision.all import *
from fastai_multi import *

def drawn(n=360):
    "A drawn table with a second picture and marked validation rows"
    path = multi_shapes(Path(tempfile.mkdtemp())/'shapes', n=n, size=48, seed=0)
    df = pd.read_csv(path/'items.csv')
    df['valid'] = np.arange(n)%4==3
    df['back'] = df.file.sample(frac=1, random_state=0).values
    df['back_kind'] = df.set_index('file').kind.loc[df.back].values
    return path,df

def loss(dls, seed, lr, epochs, **kwargs):
    "The validation loss after training"
    set_seed(seed)
    learn = multi_learner(dls, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
        return float(learn.validate()[0])

def loaders(path, df, seed, **kwargs):
    set_seed(seed)
    return MultiDataLoaders.from_df(df, path, valid_col='valid', item_tfms=Resize(32), bs=16, num_workers=0,
                                    device='cpu', **kwargs)

def by_rate(path, df, seeds):
    "The rows of both fusions, with a bag of words and with an LSTM, at three rates"
    outputs = dict(kind=CategoryBlock, colour=CategoryBlock, area=NumberBlock)
    for text,bn,lrs in (('bag', True, (1e-3,4e-3,1e-2)), ('lstm', False, (4e-3,))):
        for lr in lrs:
            for fusion in ('concat','tokens'):
                cnn = partial(simple_cnn, depth=3, width=16, bn=bn)
                found = [loss(loaders(path, df, s, image='file', text='caption', outputs=outputs), s, lr, 6, arch=cnn,
                              text=text, fusion=fusion) for s in range(seeds)]
                yield dict(text=text, lr=lr, way=fusion), found

def by_share(path, df, seeds):
    "The rows of two pictures with one encoder each, and with a shared one"
    outputs = dict(kind=CategoryBlock, back_kind=CategoryBlock)
    for share in (None, True):
        cnn = partial(simple_cnn, depth=3, width=16, bn=True)
        found = [loss(loaders(path, df, s, image=['file','back'], outputs=outputs), s, 4e-3, 8, arch=cnn, share=share)
                 for s in range(seeds)]
        yield dict(way=f'share={share}'), found

if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--seeds', type=int, default=2)
    p.add_argument('--shared', action='store_true')
    args = p.parse_args()
    warnings.simplefilter('ignore')
    path,df = drawn()
    rows = by_share if args.shared else by_rate
    for row,found in rows(path, df, args.seeds):
        print(*row.values(), f'{np.mean(found):.3f} ± {np.std(found):.3f}', flush=True)
