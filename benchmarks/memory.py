"""Compare the peak memory of training with that of a bare loop: `python -m benchmarks.memory`

A ResNet-18 trains for one epoch on drawn pictures of 96 pixels, with four outputs and batches of 32. Each way runs in
its own process. A figure is the peak in megabytes, beyond what the process holds with the model and the loaders. The
bare loop runs twice: the difference is noise. The rows are written to benchmarks/results/memory.csv."""
import argparse, resource, subprocess, sys, tempfile, time
from fastai.vision.all import *
from fastai_multi import *
from benchmarks.serve import HERE
from benchmarks.step import SumOfLosses, TakesTuples, bare_loop, quiet_epoch

def loaders(path):
    "Loaders of pictures with four outputs of classes"
    df = pd.read_csv(path/'items.csv')
    df['side'] = np.where(df.x1<20, 'left', 'right')
    df['size'] = np.where(df.area>df.area.median(), 'large', 'small')
    outputs = dict.fromkeys(['kind','colour','side','size'], CategoryBlock)
    return MultiDataLoaders.from_df(df, path, image='file', outputs=outputs, item_tfms=Resize(96), bs=32, num_workers=0,
                                    seed=0)

def way(name, learn):
    "Train one epoch in one of the ways"
    if name.startswith('bare'): return bare_loop(learn.model, learn.dls.train)
    if name.startswith('multi_learner'): return quiet_epoch(learn)
    return quiet_epoch(Learner(learn.dls, TakesTuples(learn.model), loss_func=SumOfLosses(), opt_func=learn.opt_func))

def peak() -> float: # Megabytes
    "The peak memory of this process so far"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def one_way(name, path) -> tuple: # Megabytes, seconds
    "The peak memory of training beyond what the process held before, and the processor time"
    learn = multi_learner(loaders(path), resnet18, pretrained=False, checkpoint='checkpoint' in name)
    epoch = way(name, learn)
    before = peak()
    start = time.process_time()
    epoch()
    return peak()-before,time.process_time()-start

def apart(name, path) -> dict:
    "Run `one_way` in its own process"
    command = [sys.executable, '-m', 'benchmarks.memory', '--way', name, '--path', str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    mb,seconds = out.strip().splitlines()[-1].split()
    return dict(what=name, peak_mb=float(mb), seconds=float(seconds))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--way')
    parser.add_argument('--path', type=Path)
    parser.add_argument('--out', type=Path, default=HERE/'memory.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.way is not None:
        print(*one_way(args.way, args.path))
        return
    with tempfile.TemporaryDirectory() as d:
        path = multi_shapes(Path(d)/'shapes', n=160, size=64, seed=0)
        ways = ['bare loop','bare loop again','Learner','multi_learner','multi_learner, checkpoint']
        res = pd.DataFrame([apart(n, path) for n in ways])
    res['ratio'] = res.peak_mb/res.peak_mb[0]
    res.to_csv(args.out, index=False, float_format='%.4g')
    print(res.to_string(index=False, float_format='%.3g'))

if __name__=='__main__': main()
