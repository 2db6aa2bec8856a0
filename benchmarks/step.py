"""Compare the time of a training step with fastai's `Learner` and with a bare loop: `python -m benchmarks.step`

A tiny model reads eight numbers and has 1 to 16 outputs of four classes. Batches have 32 items, so that the overhead
outside the model shows. Four ways train the same model with the same loader: this package; fastai's `Learner` with a
loss that sums the outputs' cross-entropies; a bare loop of PyTorch; and the bare loop again, as a control. The figures
are processor milliseconds per step: medians over interleaved rounds of one epoch each. The rows are written to
benchmarks/results/step.csv."""
import argparse
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.batch import name_batch
from fastai_multi.core import untyped
from benchmarks.serve import HERE
from benchmarks.ways import beside, rounds

def table(n_outputs, n=2048, seed=0) -> pd.DataFrame:
    "A table of eight numbers and outputs of four classes"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(rng.normal(size=(n,8)).astype('f4'), columns=[f'x{i}' for i in range(8)])
    for k in range(n_outputs): df[f'k{k}'] = rng.integers(0, 4, n).astype(str)
    return df

def loaders(n_outputs):
    "Loaders with one validation item"
    df = table(n_outputs)
    return MultiDataLoaders.from_df(df.assign(is_valid=df.index==0), image=None, features=[f'x{i}' for i in range(8)],
                                    outputs={f'k{k}': CategoryBlock for k in range(n_outputs)}, valid_col='is_valid',
                                    bs=32, num_workers=0, seed=0)

class SumOfLosses(nn.Module):
    "The sum of the outputs' cross-entropies"
    def forward(self, preds, *targets): return sum(F.cross_entropy(p, t) for p,t in zip(preds, flat_tensors(targets)))

def flat_tensors(x):
    "All tensors in nested tuples, as a list"
    if isinstance(x, (tuple,list)): return [t for o in x for t in flat_tensors(o)]
    return [untyped(x)]

class TakesTuples(nn.Module):
    "The model, called as a plain `Learner` calls it"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return tuple(self.model(untyped(x)))

def bare_loop(model, dl):
    "Train one epoch without any library"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss_func = SumOfLosses()
    def epoch():
        model.train()
        for x,y in dl:
            loss = loss_func(model(untyped(x)), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
    return epoch

def quiet_epoch(learn):
    "Train one epoch of a learner, without a progress bar"
    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return epoch

def steps(n_outputs, n_rounds, **options) -> pd.DataFrame:
    "Time each way; a row for each"
    dls = loaders(n_outputs)
    learn = multi_learner(dls, None, **options)
    plain = Learner(dls, TakesTuples(deepcopy(learn.model)), loss_func=SumOfLosses(), opt_func=learn.opt_func)
    loop = bare_loop(deepcopy(learn.model), dls.train)
    ways = {'bare loop': loop, 'bare loop again': loop, 'Learner': quiet_epoch(plain),
            'multi_learner': quiet_epoch(learn)}
    seconds = rounds(ways, n_rounds)
    res = beside(seconds, 'bare loop', len(dls.train))
    res['over_learner_ms'] = beside(seconds, 'Learner', len(dls.train)).over_ms
    res.insert(0, 'outputs', n_outputs)
    return res

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--outputs', type=int, nargs='*', default=[1,2,4,8,16])
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--out', type=Path, default=HERE/'step.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    res = pd.concat([steps(n, args.rounds) for n in args.outputs])
    res.to_csv(args.out, index=False, float_format='%.4g')
    print(res.to_string(index=False, float_format='%.3g'))
    ms = res[res.what=='multi_learner'].set_index('outputs').ms
    print(f'{ms.index[-1]} outputs take {ms.iloc[-1]/ms.iloc[0]:.2g} times as long as {ms.index[0]}.')

if __name__=='__main__': main()
