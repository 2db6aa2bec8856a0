"""Train in several processes: `python -m torch.distributed.run --nproc_per_node 2 -m tests.together FOLDER`

In one process the same trainings have twice the batch size. The results are written to FOLDER."""
import sys, time
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.models.awdlstm import AWDLSTMEncoder
from tests.small_models import WORDS

N = max(num_distrib(), 1)
RANK = rank_distrib()

def with_gaps(values, share, seed):
    "The values with a share of them removed"
    gone = np.random.default_rng(seed).random(len(values))<share
    return [None if g else v for v,g in zip(values, gone)]

def table(n=52):
    "A table of numbers with three outputs. Most areas have no label, so a process may have none in a batch"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(rng.normal(size=(n,4)).round(3), columns=list('abcd'))
    df['text'] = [' '.join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(n)]
    df['kind'] = with_gaps(np.where(df.a>0, 'p', np.where(df.b>0, 'q', 'r')), .2, 1)
    df['tags'] = with_gaps([[t for t in 'xyz' if rng.random()<.4] for _ in range(n)], .2, 2)
    df['area'] = with_gaps((df.c*2+df.d).round(3), .8, 3)
    df['w'] = rng.uniform(.2, 2., n).round(2)
    df['is_valid'] = np.arange(n)%7>4
    return df

OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock)

def loaders(bs=8, outputs=OUTPUTS, path='.', drop_last=True, **kwargs):
    "Loaders of a table of numbers, with `bs` items for all processes together"
    set_seed(0)
    kwargs = {**dict(features=list('abcd')), **kwargs}
    dls = MultiDataLoaders.from_df(table(), path, outputs=outputs, valid_col='is_valid', bs=bs//N, num_workers=0,
                                   **kwargs)
    if not drop_last: dls.loaders[0] = dls.train.new(drop_last=False)
    return dls

def stays(mode=True):
    "Replace the `train` method of a batch norm"

def plain(model):
    "The model without random draws and without layers that depend on the size of the batch"
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
            m.train = stays
        if isinstance(m, nn.modules.dropout._DropoutNd): m.p = 0.
        for k,v in list(vars(m).items()):
            if isinstance(v, float) and (k in ('p','embed_p') or 'dropout' in k): setattr(m, k, 0.)
        if hasattr(m, 'weight_p'): m.weight_p = 1e-9    # fastai's WeightDropout breaks at 0
    return model

def learner(dls, *args, **kwargs):
    set_seed(1)
    learn = multi_learner(dls, *args, **kwargs)
    plain(learn.model)
    learn.remove_cbs([o for o in learn.cbs if isinstance(o, ProgressCallback)])
    learn.logger = noop
    return learn

def found(learn):
    "The results of a training: losses of the epochs, scores, predictions and weights"
    epochs = torch.tensor([list(map(float, v)) for v in learn.recorder.values])
    scores = learn.evaluate()
    preds,targs = learn.get_preds()
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    return dict(epochs=epochs, weights=weights, preds=list(preds), targs=list(targs),
                scores={k: torch.tensor(float(v)) for k,v in scores.items()})

def trained(learn, epochs=1, lr=1e-2, cbs=None, predicts=False):
    with learn.distrib_ctx():
        learn.fit(epochs, lr, cbs=cbs)
        if predicts: return found(learn)
        epochs = torch.tensor([list(map(float, v)) for v in learn.recorder.values])
        return dict(epochs=epochs, weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]))

# Three outputs with missing labels, item weights and last batches that are not full

def three_outputs():
    return trained(learner(loaders(weight='w', drop_last=False), opt_func=SGD), 2, .01, predicts=True)

def no_label_in_one():
    "Train with a first process that has no label in any batch"
    dls = loaders(outputs=dict(kind=CategoryBlock, area=RegressionBlock))
    learn = learner(dls, opt_func=SGD)
    class Unlabelled(Callback):
        def before_batch(self):
            if not self.training: return
            y = self.learn.yb[0]
            area = y.area.clone()
            rank = RANK if N>1 else None
            if rank!=1: area[:4] = math.nan
            self.learn.yb = (type(y)([y.kind, area]),)
    return trained(learn, 1, .01, Unlabelled())

def one_plain_target():
    return trained(learner(loaders(outputs=CategoryBlock, columns='kind')), predicts=True)

def mixed():
    "MixUp blends inputs and labels within a process, and all processes end equal"
    learn = learner(loaders(outputs=dict(kind=CategoryBlock, area=RegressionBlock)))
    res = trained(learn, 1, cbs=MultiMixUp(.4))
    return dict(rank_weights=res['weights'])

# Callbacks that weight losses

WEIGHTINGS = dict(fixed=lambda: FixedWeights(kind=2., area=0.), scheduled=lambda: ScheduledWeights(kind=SchedLin(1, 5)),
    random=RandomWeighting, dwa=DynamicWeightAverage, geometric=GeometricMean, uncertainty=UncertaintyWeighting,
    uncertainty_closed=lambda: UncertaintyWeighting(closed_form=True), gradnorm=GradNorm, famo=lambda: FAMO(every=2),
    upgrad=lambda: GradientBalance('upgrad'), mgda=lambda: GradientBalance('mgda'),
    cagrad=lambda: GradientBalance('cagrad'), imtlg=lambda: GradientBalance('imtlg'),
    monitor=lambda: [ShowWeights(), TaskMonitor(every=2), TaskEarlyStopping(patience=1)])

def weighted(name):
    learn = learner(loaders(), opt_func=SGD)
    cb = WEIGHTINGS[name]()
    if name=='random' and RANK==0: torch.manual_seed(5)    # the processes draw from different states
    res = trained(learn, dict(dwa=3, monitor=2).get(name, 1), .01, cb)
    if name=='random': return dict(rank_weights=res['weights'], seen=cb.last_weights)
    if name=='monitor': res.pop('epochs')    # gradient columns belong to one process
    return res

# Encoders and fusions of a picture and a text

# The text encoder for each fusion
MODELS = dict(concat='bag', sum='bag', gated='lstm', film='bag', attention='lstm', tokens='bag', late='bag')

def pictured(path, bs=8, text='text', **kwargs):
    df = table(24)
    items = pd.read_csv(path/'items.csv')
    df['file'] = items.file[:24]
    df.loc[::5, 'text'] = None
    set_seed(0)
    return MultiDataLoaders.from_df(df, path, image='file', text=text, outputs=OUTPUTS, valid_col='is_valid',
                                    bs=bs//N, num_workers=0, item_tfms=Resize(32), **kwargs)

def fused(path, fusion):
    neck = None if fusion in ('attention','tokens') else 8    # these fusions read places instead of one vector
    return trained(learner(pictured(path), simple_cnn(2, 4), text=MODELS[fusion], fusion=fusion, neck=neck,
                           pretrained=False, opt_func=SGD))

def cnn(): return simple_cnn(2, 4)
def tokens_of(folder):
    if folder is None: return {}
    return dict(text_block=PlainTextBlock(tok=str(folder), max_len=16))

def encoded(path, arch, text='bag', tok=None): # `tok`: the folder of the tokenizer's model
    dls = pictured(path, **tokens_of(tok))
    if callable(arch): arch = arch()    # draws the weights after the seed is set
    if callable(text): text = text()
    return trained(learner(dls, arch, text=text, neck=8, pretrained=False, opt_func=SGD))

def lstm_of_fastai(): return partial(AWDLSTMEncoder, emb_sz=8, n_hid=8, n_layers=2)

def dual(path):
    "Both encoders of one small SigLIP"
    both = dual_encoders(path/'siglip')
    dls = pictured(path, **tokens_of(path/'siglip'))
    return trained(learner(dls, dict(image=both.image), text=both.text, opt_func=SGD))

def with_row(path):
    dls = pictured(path, text=None, cat_names=['text'], cont_names=list('ab'))
    return trained(learner(dls, cnn(), neck=8, pretrained=False, opt_func=SGD))

def encoders(path):
    "The trainings, by the name of the tested encoder"
    bert = path/'bert'
    return dict(bert=partial(encoded, path, cnn, str(bert), bert),
                lora=partial(encoded, path, cnn, partial(transformer_encoder, bert, lora=2), bert),
                awd_lstm=partial(encoded, path, cnn, lstm_of_fastai), dual=partial(dual, path),
                row=partial(with_row, path), timm=partial(encoded, path, 'test_resnet'),
                resnet18=partial(encoded, path, partial(resnet18, weights=None)))

# Objects: rows of different lengths in each process

def objects(path):
    df = pd.read_csv(path/'items.csv')[:14].assign(is_valid=np.arange(14)>8)
    boxes = {f: [dict(box=[b.x1,b.y1,b.x2,b.y2], kind=b.label) for b in g.itertuples()]
             for f,g in pd.read_csv(path/'boxes.csv').groupby('file')}
    df['objects'] = [boxes[f] for f in df.file]
    set_seed(0)
    outputs = dict(objects=ObjectsBlock(kind=CategoryBlock), colour=CategoryBlock)
    dls = MultiDataLoaders.from_df(df, path, image='file', outputs=outputs, valid_col='is_valid', bs=8//N,
                                   num_workers=0, item_tfms=Resize(64))
    learn = learner(dls, simple_cnn(3, 4), heads=dict(objects=dict(width=32, convs=1)),
                    opt_func=SGD, metrics={})
    with learn.distrib_ctx():
        learn.fit(1, 1e-3)
        weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
        targs = learn.get_preds()[1]
        return dict(weights=weights, boxes=targs.objects.box, kinds=targs.objects.kind)

# Other calls

def stopped_and_saved(out):
    "Early stopping stops both processes, both load the best epoch, and the files are written once"
    learn = learner(loaders(path=out), opt_func=SGD)
    with learn.distrib_ctx():
        learn.fit(4, .01, cbs=[SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=2, min_delta=.5)])
        res = found(learn)
        for m in learn.model.modules(): vars(m).pop('train', None)
        learn.export('learner.pkl')
        learn.save_bundle(out/'bundle')
    res['rows'] = learn.predict_df(table()[:7]).area.tolist()    # each process alone again
    return res

def resumed(out):
    "A training that an error ends resumes after its last epoch"
    class Ends(Callback):
        at = 2
        def before_epoch(self):
            if self.epoch==self.at: raise RuntimeError('ended')
    def make(): return learner(loaders(path=out))
    whole = make()
    with whole.distrib_ctx(): whole.fit_one_cycle(3, 1e-2)
    with make().distrib_ctx() as learn:
        try: learn.fit_one_cycle(3, 1e-2, cbs=Ends(), resume='half')
        except RuntimeError as e: assert 'ended' in str(e)
    learn = make()
    Ends.at = None
    with learn.distrib_ctx(): learn.fit_one_cycle(3, 1e-2, cbs=Ends(), resume='half')
    a,b = (torch.cat([p.detach().flatten() for p in o.model.parameters()]) for o in (whole, learn))
    return dict(weights=a, resumed=b)

def fine_tuned(path):
    "Run the probe, frozen epochs from memory and the whole model. All processes end equal"
    learn = learner(pictured(path), simple_cnn(2, 4), pretrained=False)
    learn.model.encoders['image'].pretrained = True
    learn.freeze()
    with learn.distrib_ctx(): learn.fine_tune(1, 1e-3, freeze_epochs=2)
    return dict(rank_weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]))

def refused(out):
    "The error messages of what is not possible"
    said = {}
    def note(name, f):
        try: f()
        except Exception as e: said[name] = f'{type(e).__name__}: {e}'
    learn = learner(loaders())
    def fit(**kwargs):
        with learn.distrib_ctx(): learn.fit(1, **kwargs)
    note('parameters', lambda: fit(cbs=GradientBalance(level='parameters')))
    note('rates', lambda: fit(lr=1e-3*(RANK+1)))
    df = table()
    seed = RANK
    other = MultiDataLoaders.from_df(df, features=list('abcd'), outputs=OUTPUTS, bs=4, num_workers=0, seed=seed)
    learn = learner(other)
    note('split', fit)
    learn = learner(loaders(bs=60))
    note('small', fit)
    learn = learner(loaders())
    def search():
        with learn.distrib_ctx(): learn.lr_find()
    note('search', search)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    assert all(torch.equal(p, q) for p,q in zip(before, learn.model.parameters()))
    if RANK==0: learn.evaluate()    # alone, while the other process continues
    return dict(said=said)

def cases(path, out):
    "The trainings, by name"
    res = dict(three_outputs=three_outputs, no_label_in_one=no_label_in_one, plain_target=one_plain_target,
               mixed=mixed)
    res |= {f'weights_{n}': partial(weighted, n) for n in WEIGHTINGS}
    res |= {f'fusion_{n}': partial(fused, path, n) for n in MODELS}
    res |= encoders(path)
    res |= dict(objects=partial(objects, path), stopped=partial(stopped_and_saved, out), resumed=partial(resumed, out),
                fine_tuned=partial(fine_tuned, path))
    if N>1: res['refused'] = partial(refused, out)
    return res

def run_all(path, out, only=()):
    "The results of all cases, by name"
    torch.set_num_threads(1)
    res = {}
    for name,f in cases(path, out).items():
        if only and name not in only: continue
        start = time.time()
        res[name] = f()
        if RANK==0: print(f'{name} {time.time()-start:.1f} s', flush=True)
    return res

if __name__=='__main__':
    path,out = map(Path, sys.argv[1:3])
    res = run_all(path, out, sys.argv[3:])
    torch.save(res, out/f'found_{RANK}.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
