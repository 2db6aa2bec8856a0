"""Measure memory, errors, times and batches of the service while several clients send requests:
`python -m benchmarks.serve` (10,000 requests in a few minutes; see `--requests` and `--clients`)

The service runs from a bundle in its own process, as `python -m fastai_multi.serve` starts it. After each thousand
requests, a row of benchmarks/results/serve.csv records the memory of the service, the errors, and the milliseconds from
request to answer."""
import argparse, asyncio, re, socket, subprocess, sys, tempfile, time
from contextlib import contextmanager
import numpy as np, pandas as pd, torch
from fastai.vision.all import *
from fastai_multi import *

HERE = Path(__file__).resolve().parent/'results'

def trained(path):
    "A small trained learner of pictures and captions"
    dls = MultiDataLoaders.from_csv(path, image='file', text='caption', label_delim='|', item_tfms=Resize(64), bs=16,
                                    outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock),
                                    columns=dict(box=['x1','y1','x2','y2']), num_workers=0, seed=0)
    learn = multi_learner(dls, simple_cnn(4, 8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    return learn

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def wait_until_up(url, process, seconds=90):
    "Wait until the service answers. Raise an error if it ends before"
    import httpx
    end = time.perf_counter()+seconds
    while time.perf_counter()<end:
        if process.poll() is not None: raise RuntimeError(f'The service ended with status {process.returncode}.')
        try:
            if httpx.get(f'{url}/healthz').status_code==200: return
        except httpx.TransportError: pass
        time.sleep(.2)
    raise TimeoutError(f'The service did not start within {seconds} seconds.')

@contextmanager
def serving(bundle):
    "A service in its own process; yields its address and its process"
    port = free_port()
    process = subprocess.Popen([sys.executable, '-m', 'fastai_multi.serve', str(bundle), '--port', str(port)])
    url = f'http://127.0.0.1:{port}'
    try:
        wait_until_up(url, process)
        yield url, process
    finally:
        process.terminate()
        process.wait(20)

def memory(process) -> float: # Megabytes
    "The memory that a process holds"
    out = subprocess.run(['ps', '-o', 'rss=', '-p', str(process.pid)], capture_output=True, text=True, check=True)
    return int(out.stdout)/1024

async def client(url, todo, items, times, statuses):
    "One client, which takes a number, sends that item and waits for the answer"
    import httpx
    async with httpx.AsyncClient(timeout=60) as http:
        while todo:
            picture,text = items[todo.pop()%len(items)]
            start = time.perf_counter()
            try:
                answer = await http.post(f'{url}/predict', files=dict(image=picture), data=dict(text=text))
                status = answer.status_code
            except httpx.HTTPError as e: status = type(e).__name__
            times.append(1000*(time.perf_counter()-start))
            statuses.append(status)

async def send(url, items, n, clients):
    "Send `n` requests from several clients at once, and return milliseconds and statuses"
    times = []
    statuses = []
    todo = list(range(n))
    await asyncio.gather(*[client(url, todo, items, times, statuses) for _ in range(clients)])
    return times, statuses

def batches(url):
    "The number of predicted batches, and of the items in them"
    import httpx
    text = httpx.get(f'{url}/metrics').text
    return [float(re.search(rf'^predict_batch_size_{n} (\S+)$', text, re.M)[1]) for n in ('count','sum')]

def load(url, process, items, requests=10_000, clients=16, every=1000) -> pd.DataFrame:
    "A row after each `every` requests: memory in MB, errors, milliseconds, requests per second, items per batch"
    rows = [dict(requests=0, memory_mb=memory(process))]
    done = 0
    while done<requests:
        n = min(every, requests-done)
        before = batches(url)
        start = time.perf_counter()
        times,statuses = asyncio.run(send(url, items, n, clients))
        seconds = time.perf_counter()-start
        count,total = np.subtract(batches(url), before)
        done += n
        p50,p95,p99 = np.percentile(times, [50,95,99])
        wrong = sum(s!=200 for s in statuses)
        rows.append(dict(requests=done, memory_mb=memory(process), errors=wrong, p50_ms=p50, p95_ms=p95, p99_ms=p99,
                         per_second=n/seconds, batch=total/count))
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--requests', type=int, default=10_000)
    parser.add_argument('--clients', type=int, default=16)
    parser.add_argument('--out', type=Path, default=HERE/'serve.csv')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        path = multi_shapes(Path(d)/'shapes', n=200, size=64, seed=0)
        learn = trained(path)
        learn.save_bundle(Path(d)/'bundle', metrics=False)
        df = pd.read_csv(path/'items.csv')
        items = [((path/r.file).read_bytes(), r.caption) for r in df.itertuples()]
        with serving(Path(d)/'bundle') as (url,process):
            res = load(url, process, items, args.requests, args.clients)
    res.to_csv(args.out, index=False, float_format='%.4g')
    print(res.to_string(index=False))

if __name__=='__main__': main()
