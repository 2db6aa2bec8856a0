"""How much the answers of ONNX and torch.export files differ from the learner's, and how long they take, for
each architecture: `python -m benchmarks.exports` (about ten minutes on one CPU core; `--only resnet18 LSTM` runs some)

benchmarks/results/exports.csv has a row for each architecture and file: the largest difference between the answers of
the file and the learner's, or the error message; the learner's own rounding error, which is the difference between its
answers and those in double precision; and the milliseconds that the learner's model and the file take for one item in
one thread. The weights are random, no layer is zero, and batch normalisation has statistics.

`python -m benchmarks.exports --int8` trains the default learner of `benchmarks.defaults` on fashion and cifar10,
exports it in single precision and in 8-bit integers, and writes each metric, the megabytes and the milliseconds to
benchmarks/results/int8.csv."""
import argparse, tempfile, time
import pandas as pd, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.export import ExportedModel, examples, import_onnx, rounding

HERE = Path(__file__).resolve().parent/'results'
OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock)
PICTURES = ['resnet18', 'mobilenet_v2', 'efficientnet_b0', 'convnext_tiny', 'swin_t', 'vit_b_16']

def loaders(path, **kwargs):
    "Loaders of drawn shapes"
    options = dict(outputs=OUTPUTS, label_delim='|', bs=8, num_workers=0, seed=0)
    return MultiDataLoaders.from_csv(path, **(options | kwargs))

def of_pictures(path, arch, size=64):
    "A learner of pictures"
    dls = loaders(path, image='file', item_tfms=Resize(size), batch_tfms=Normalize.from_stats(*imagenet_stats))
    return multi_learner(dls, arch, pretrained=False)

def of_texts(path, text): return multi_learner(loaders(path, text='caption'), text=text)

def save_bert(path):
    "A folder with a small BERT of random weights and its tokenizer"
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = ['a', 'red', 'blue', 'green', 'circle', 'square', 'star', 'triangle', 'on', 'the', 'left', 'right']
    core = Tokenizer(models.WordLevel({w: i for i,w in enumerate(['[PAD]','[UNK]','[CLS]','[SEP]',*words])}, '[UNK]'))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=[('[CLS]',2), ('[SEP]',3)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]',
                                         sep_token='[SEP]').save_pretrained(path)
    config = transformers.BertConfig(vocab_size=len(words)+4, hidden_size=64, num_hidden_layers=4,
                                     num_attention_heads=4, intermediate_size=128, max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(path)
    return path

def of_bert(path, lora=None):
    from fastai_multi.models.text import transformer_encoder
    folder = save_bert(path/'bert')
    dls = loaders(path, text='caption', text_block=PlainTextBlock(tok=str(folder), max_len=32))
    return multi_learner(dls, text=transformer_encoder(folder, lora=lora))

def of_both(path, **kwargs):
    dls = loaders(path, image='file', text='caption', item_tfms=Resize(64))
    return multi_learner(dls, simple_cnn(3, 16), **kwargs)

def of_objects(path):
    block = ObjectsBlock(colour=CategoryBlock, area=RegressionBlock)
    dls = loaders(path, image='file', objects='boxes.csv', outputs=dict(objects=block), item_tfms=Resize(64))
    return multi_learner(dls, resnet18, pretrained=False, heads=dict(objects=dict(width=64, convs=2)))

def learners(path):
    "By name, the function that makes a learner, and the arguments of its export"
    res = {'bag of words': (partial(of_texts, path, 'bag'), {}), 'LSTM': (partial(of_texts, path, 'lstm'), {}),
           'LSTM, tokens=16': (partial(of_texts, path, 'lstm'), dict(tokens=16)), 'BERT': (partial(of_bert, path), {}),
           'BERT with LoRA': (partial(of_bert, path, 8), {})}
    for n in PICTURES:
        size = 64
        if n in ('swin_t', 'vit_b_16'): size = 224
        res[n] = (partial(of_pictures, path, getattr(models, n), size), {})
    res['picture and words'] = (partial(of_both, path), {})
    res['picture and words, fusion tokens'] = (partial(of_both, path, fusion='tokens'), {})
    res['objects, resnet18'] = (partial(of_objects, path), {})
    return res

def as_if_trained(learn):
    "Give the learner random weights where a layer starts at zero, and batch normalisation statistics"
    for p in learn.model.parameters():
        if not p.any(): p.data.normal_(0, .05)
    norms = [m for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms: m.momentum = None    # averages over the batches
    model = ExportedModel(learn).train()
    model.model = learn.model.train()
    with torch.no_grad():
        for _ in range(4*bool(norms)): model(*examples(learn, 8))
    return learn

def milliseconds(run, n=15):
    "The time of the fastest call, because other programs may use the machine too"
    times = []
    for _ in range(n):
        start = time.perf_counter()
        with torch.no_grad(): run()
        times.append(1000*(time.perf_counter()-start))
    return min(times)

def onnx_runner(file):
    "A function that runs the file in one thread, as the learner does"
    onnxruntime = import_onnx()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    names = [i.name for i in session.get_inputs()]
    return lambda *xs: session.run(None, {n: x.numpy() for n,x in zip(names, xs)})

def program_runner(file): return torch.export.load(file).module()

def row(name, what, learn, file, kwargs):
    "The row of one file: its difference and times, or the error message"
    write,runner = dict(onnx=(learn.to_onnx, onnx_runner), program=(learn.to_program, program_runner))[what]
    res = dict(architecture=name, file=what)
    start = time.perf_counter()
    try: written = write(file, tolerance=1, **kwargs)
    except ValueError as e: return dict(res, difference=None, refusal=str(e))
    res |= dict(difference=written.difference, refusal='', export_s=time.perf_counter()-start)
    xs = examples(learn, 1, kwargs.get('tokens', 8))
    model = ExportedModel(learn)
    res['rounding'] = rounding(learn, model, **kwargs) or math.nan
    run = runner(file)
    res['learner_ms'] = milliseconds(lambda: model(*xs))
    res['file_ms'] = milliseconds(lambda: run(*xs))
    res['megabytes'] = file.stat().st_size/1e6
    return res

def int8_rows(name, folder):
    "What 8-bit integers cost and save on a set of `benchmarks.defaults`, with one seed"
    from benchmarks.defaults import trained
    learn = trained(name, 0)
    res = []
    exact = learn.to_onnx(folder/'exact.onnx').file
    small = learn.to_onnx(folder/'int8.onnx', int8=True)
    for n,row in small.metrics.iterrows():
        if not n.endswith('loss'): res.append(dict(set=name, what=n, exact=row.learner, int8=row.int8))
    xs = examples(learn, 1, 8)
    runs = [onnx_runner(f) for f in (exact, small.file)]
    times = [milliseconds(lambda: run(*xs), 50) for run in runs]
    res.append(dict(set=name, what='milliseconds', exact=times[0], int8=times[1]))
    sizes = [f.stat().st_size/1e6 for f in (exact, small.file)]
    res.append(dict(set=name, what='megabytes', exact=sizes[0], int8=sizes[1]))
    return res

def measure_int8(out=HERE/'int8.csv'):
    rows = []
    with tempfile.TemporaryDirectory() as d:
        for name in ('fashion', 'cifar'): rows += int8_rows(name, Path(d))
    res = pd.DataFrame(rows)
    res.to_csv(out, index=False, float_format='%.4g')
    print(res.to_string(index=False))

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='+', help='run only the architectures of these names')
    parser.add_argument('--int8', action='store_true', help='compare 8-bit integers with single precision')
    parser.add_argument('--out', type=Path, default=HERE/'exports.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.int8: return measure_int8()
    rows = []
    with tempfile.TemporaryDirectory() as d:
        path = multi_shapes(Path(d)/'shapes', n=32, size=64, seed=0)
        for name,(make,kwargs) in learners(path).items():
            if args.only and name not in args.only: continue
            set_seed(0)
            learn = as_if_trained(make())
            for what,suffix in dict(onnx='onnx', program='pt2').items():
                file = Path(d)/f'model.{suffix}'
                rows.append(row(name, what, learn, file, kwargs))
                print({k: v for k,v in rows[-1].items() if v!=''}, flush=True)
                file.unlink(missing_ok=True)
                pd.DataFrame(rows).to_csv(args.out, index=False, float_format='%.3g')

if __name__=='__main__': main()
