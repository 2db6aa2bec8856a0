"""Kill trainings at random moments and resume them: `python -m tests.killed FOLDER` prints a JSON row for each.

Every training runs in a fork of this process, so the packages are imported only once."""
import json, os, random, signal, sys, time
from functools import partial
from pathlib import Path
import torch
from fastai.vision.all import *
from fastai_multi import *

BALANCERS = dict(
    none=lambda: [],
    fixed=lambda: FixedWeights(kind=2.),
    scheduled=lambda: ScheduledWeights(kind=SchedLin(1, 5)),
    random=RandomWeighting,
    dwa=DynamicWeightAverage,
    geometric=GeometricMean,
    uncertainty=UncertaintyWeighting,
    uncertainty_closed=lambda: UncertaintyWeighting(closed_form=True),
    gradnorm=GradNorm,
    famo=FAMO,
    stopping=lambda: [TaskEarlyStopping(patience=1, keep_best=True), TaskMonitor(every=2)],
    mixup=MixUp,
    **{f'{name}_{level}': partial(GradientBalance, name, level) for level in ('features','parameters')
       for name in ('upgrad','mgda','pcgrad','gradvac','cagrad')},
    nashmtl=partial(GradientBalance, 'nashmtl'),
    alignedmtl=partial(GradientBalance, 'alignedmtl'),
    imtlg=partial(GradientBalance, 'imtlg'),
    trackers=lambda: [SaveModelCallback(), ReduceLROnPlateau(patience=1)])

def loaders(path, n_workers, text):
    "Loaders of drawn pictures, augmented and in random order"
    return MultiDataLoaders.from_csv(path, 'items.csv', image='file', text=text, bs=4, seed=0, num_workers=n_workers,
        outputs=dict(kind=CategoryBlock, area=RegressionBlock), item_tfms=Resize(32), batch_tfms=aug_transforms(size=24))

def train(path, name, file, n_workers=0, start=0):
    "Run one training, or the rest of it, and write its weights to `file`"
    torch.set_num_threads(1)
    set_seed(start)
    text = 'caption' if name=='probe' else None
    learn = multi_learner(loaders(path, n_workers, text), simple_cnn(depth=2), heads=dict(kind=dict(p=.3)),
                          path=file.parent)
    with learn.no_bar(), learn.no_logging():
        if name=='probe': learn.fine_tune(3, resume=file.stem)
        elif name=='fine_tune': learn.fine_tune(2, freeze_epochs=2, resume=file.stem)
        else: learn.fit_one_cycle(4, 3e-3, cbs=L(BALANCERS[name]()), resume=file.stem)
    torch.save([p.detach() for p in learn.model.parameters()], file)

def in_fork(*args, **kwargs):
    "Start a process that trains, and return its id"
    pid = os.fork()
    if pid: return pid
    try:
        train(*args, **kwargs)
        os._exit(0)
    except BaseException as e:
        print(f'{type(e).__name__}: {e}', file=sys.stderr)
        os._exit(1)

def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_at(share, path, name, part, n_workers, start):
    "Kill a training `share` of its first epoch's time after that epoch; return whether it was still running"
    state = part.parent/'models'/part.name
    pid = in_fork(path, name, part, n_workers, start)
    begun = time.time()
    while not state.exists():
        if time.time()-begun>60: raise TimeoutError(f'{name}: no epoch ended within a minute')
        time.sleep(.002)
    time.sleep(share*(time.time()-begun))
    os.kill(pid, signal.SIGKILL)
    return wait(pid)==-signal.SIGKILL and state.exists()

def killed(path, out, name, share, n_workers=0):
    "How far the weights of a killed and resumed training are from those of an uninterrupted one"
    whole = out/f'{name}_whole.pth'
    part = out/f'{name}_part.pth'
    assert wait(in_fork(path, name, whole, n_workers))==0, name
    while not killed_at(share, path, name, part, n_workers, 0): share = share/2    # the training had already ended
    assert wait(in_fork(path, name, part, n_workers, start=7))==0, name           # starts from other random numbers
    a,b = (torch.load(o) for o in (whole, part))
    return dict(name=name, difference=max(float((x-y).abs().max()) for x,y in zip(a,b)), workers=n_workers,
                left=[o.name for o in (out/'models').glob(f'*{name}*')])

def main(folder):
    out = Path(folder)
    path = multi_shapes(out/'shapes', n=20, size=32, seed=0)
    rng = random.Random(0)
    for name in [*BALANCERS, 'fine_tune', 'probe']: print(json.dumps(killed(path, out, name, rng.random())), flush=True)
    print(json.dumps(killed(path, out, 'none', rng.random(), n_workers=2)), flush=True)

if __name__=='__main__': main(sys.argv[1])
