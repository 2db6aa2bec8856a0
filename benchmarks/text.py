"""Compare tokenizing and a step of a text model with the same work without this package: `python -m benchmarks.text`

There are 20,000 captions: those of coco_mini, repeated, if it is installed, or else random words. Everything runs in
one thread. In each round every way does all its work once, and the order rotates. A ratio is the median over rounds of
the ratio within a round. The way at the top of each table runs twice: the difference between the two is noise.

The goals: the default tokenizer takes at most 1.5 s; a Hugging Face tokenizer takes at most 1.2 times as long as
`tokenizers` alone; a step of MiniLM takes at most 1.1 times as long as the same model in a bare loop. The rows are
written to benchmarks/results/text.csv."""
import argparse
import os
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import untyped
from benchmarks.data import data_path
from benchmarks.fusion import minilm
from benchmarks.input import captions as drawn_captions
from benchmarks.step import flat_tensors
from benchmarks.ways import beside, rounds

ALONE = 'tokenizers, one text after the other'
HERE_HF = 'a Hugging Face tokenizer, to a column'
HERE_OWN = 'the default tokenizer, words and column'
HERE = Path(__file__).resolve().parent/'results'

def captions(n):
    "`n` captions. Those of coco_mini repeat"
    try: found = list(pd.read_csv(data_path('coco_mini')/'captions.csv').caption)
    except FileNotFoundError: found = drawn_captions(n, np.random.RandomState(0))
    return [found[i%len(found)] for i in range(n)]

def tokenizers_alone(texts):
    "Functions that turn texts into numbers with the package `tokenizers`, one at a time and all in one call"
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(str(Path(minilm())/'tokenizer.json'))
    tok.no_padding()
    tok.enable_truncation(256)
    def one_by_one(): return [tok.encode(s).ids for s in texts]
    def in_one_call(): return [o.ids for o in tok.encode_batch(texts)]
    return one_by_one, in_one_call

def tokenizer_table(n, n_rounds) -> pd.DataFrame:
    "The seconds of each way to turn texts into numbers"
    texts = captions(n)
    one_by_one,in_one_call = tokenizers_alone(texts)
    hf = text_part(tok=minilm())
    check_same(hf.encoder.ids(texts[:500]), one_by_one()[:500])
    column = pd.Series(texts)
    def hugging_face(): return hf.encode_column(column)
    def default():
        own = text_part()
        own.setup(column)
        return own.encode_column(column)
    ways = {ALONE: one_by_one, f'{ALONE} again': one_by_one, 'tokenizers, all in one call': in_one_call,
            HERE_HF: hugging_face, HERE_OWN: default}
    res = beside(rounds(ways, n_rounds), ALONE, n)
    res.insert(1, 'seconds', res.pop('ms')*n/1000)
    return res.drop(columns='over_ms')

def text_part(**kwargs):
    "The part that turns the texts of a loader into numbers"
    return PlainTextBlock(**kwargs).make_part('text', True)

def check_same(mine, theirs):
    if mine!=theirs: raise AssertionError("This package's numbers differ from those of tokenizers.")

# Training steps

def learner_of(texts, bs=32):
    "A learner of four classes that fine-tunes MiniLM on texts"
    df = pd.DataFrame(dict(text=texts, kind=[f'k{i%4}' for i in range(len(texts))]))
    dls = MultiDataLoaders.from_df(df.assign(is_valid=df.index==0), text='text', outputs=dict(kind=CategoryBlock), bs=bs,
                                   text_block=PlainTextBlock(tok=minilm()), valid_col='is_valid', num_workers=0, seed=0)
    learn = multi_learner(dls, text=minilm())
    learn.unfreeze()
    return learn

def bare_loop(model, batches):
    "Train on the batches once without any library"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    def epoch():
        model.train()
        for x,y in batches:
            loss = F.cross_entropy(flat_tensors(model(untyped(x)))[0], flat_tensors(y)[0])
            loss.backward()
            opt.step()
            opt.zero_grad()
    return epoch

def epoch_of(learn):
    "Train one epoch of a learner, without a progress bar"
    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-5)
    return epoch

def step_table(n_steps, n_rounds) -> pd.DataFrame:
    "The milliseconds of a training step of MiniLM"
    learn = learner_of(captions(32*n_steps+1))
    loop = bare_loop(deepcopy(learn.model), learn.dls.train)
    ways = {'bare loop': loop, 'bare loop again': loop, 'multi_learner': epoch_of(learn)}
    return beside(rounds(ways, n_rounds), 'bare loop', n_steps)

def verdicts(tokens, steps):
    "For each goal, whether it is met"
    seconds = tokens.set_index('what').seconds[HERE_OWN]
    hf = tokens.set_index('what').ratio[HERE_HF]
    step = steps.set_index('what').ratio['multi_learner']
    return {f'the default tokenizer takes {seconds:.2f} s, at most 1.5': seconds<=1.5,
            f'a Hugging Face tokenizer takes {hf:.2f} times as long as tokenizers alone, at most 1.2': hf<=1.2,
            f'a step takes {step:.3f} times as long as in the bare loop, at most 1.1': step<=1.1}

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--captions', type=int, default=20000)
    parser.add_argument('--steps', type=int, default=8, help='the training steps of each way in a round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--out', type=Path, default=HERE/'text.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = tokenizer_table(args.captions, args.rounds)
    print(tokens.to_string(index=False, float_format='%.3g'), flush=True)
    steps = step_table(args.steps, args.rounds)
    print(steps.to_string(index=False, float_format='%.4g'))
    pd.concat([tokens, steps]).to_csv(args.out, index=False, float_format='%.4g')
    for what,kept in verdicts(tokens, steps).items(): print('met: ' if kept else 'missed: ', what)

if __name__ == '__main__': main()
