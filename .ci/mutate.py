"""Put one fault at a time into a copy of the package and run the tests that reach it: first the module's own notebook,
and if that passes, the nearest files of `tests/`. A fault survives if every test passes. Run this by hand, not in CI;
a run that was stopped continues where it stopped.

One process imports fastai once and forks for each step. The first run of a notebook or a test file records which
functions of the package each test enters; the record is valid until the test file changes. From `tests/`, a fault gets
the tests that enter its function, the fastest first. Limits are processor seconds, not wall-clock seconds, so a busy
machine does not change the result.

Usage: python .ci/mutate.py [-n 150] [--seed 0] [--modules core losses] [--again] [--report] [--out faults.jsonl]
"""
import argparse, hashlib, json, os, random, re, resource, shutil, signal, sys, tempfile, time, types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from faults import all_faults, described, faults_of

root = Path(__file__).resolve().parent.parent
here = root/'.ci'
# Files of `tests/` nearest to a module, after those for all modules; `data` stands for `data.block` and the like

NEAR = {
    'core': 'data', 'figures': 'seeing',
    'data': 'data tables loaders', 'data.text': 'text data', 'data.files': 'files values',
    'data.crops': 'input augment', 'data.geometry': 'augment values', 'data.frame': 'augment values',
    'data.kinds': 'kinds input',
    'data.pictures': 'values files', 'data.masks': 'values', 'data.items': 'data values', 'data.inputs': 'input data',
    'data.numbers': 'values inputs', 'data.spatial': 'augment values', 'data.elements': 'augment values nested',
    'data.reader': 'input', 'data.pipeline': 'input', 'data.decoding': 'data seeing', 'data.load': 'input data',
    'data.readers': 'tables data',
    'data.show': 'seeing data', 'data.infer': 'loaders first_hour', 'data.describe': 'seeing', 'data.splits': 'loaders',
    'data.sources': 'loaders files', 'data.tables': 'inputs', 'data.joined': 'joined', 'data.names': 'first_hour',
    'data.arguments': 'loaders', 'data.loaders': 'loaders learner',
    'data.objects': 'objects', 'data.annotations': 'objects',
    'models': 'models depth', 'models.dual': 'dual', 'models.fusion': 'fusion models', 'models.objects': 'objects',
    'models.tabular': 'inputs', 'models.text': 'text models', 'models.tokens': 'fusion', 'models.wide': 'defaults',
    'targets': 'losses', 'terms': 'losses options', 'rowmetrics': 'losses values thresholds', 'losses': 'losses options',
    'metrics': 'losses options', 'columns': 'losses learner',
    'callback': 'weights gradients', 'callback.adapt': 'learner inputs', 'callback.aggregators': 'gradients',
    'callback.gradients': 'gradients', 'callback.mixup': 'losses options', 'callback.monitor': 'gradients report',
    'callback.soup': 'options inputs', 'linear': 'defaults gradients',
    'detection': 'objects', 'objectmetrics': 'objects', 'objects': 'objects', 'tiles': 'objects',
    'prediction': 'answers', 'answerfile': 'answerfile', 'answering': 'answers learner', 'answers': 'answers learner',
    'calibration': 'calibration', 'tasks': 'kinds options', 'batch': 'losses', 'report': 'report', 'prior': 'defaults',
    'probe': 'defaults', 'aside': 'defaults', 'cache': 'cache', 'build': 'options defaults export', 'rates': 'options',
    'state': 'options learner', 'export': 'export learner', 'loading': 'learner', 'registry': 'bundle',
    'records': 'bundle', 'bundle': 'bundle', 'deploy': 'bundle', 'serve': 'serve', 'resume': 'resume',
    'learner': 'learner options', 'depth': 'depth', 'insight': 'interpretation seeing',
    'interpretation': 'interpretation', 'compare': 'report', 'controls': 'report', 'modality': 'modality',
    'docstrings': 'seeing'}

def near(module):
    "The files of `tests/` for a module"
    names = NEAR.get(module) or NEAR.get(module.partition('.')[0]) or 'learner'
    files = [root/'tests'/f'test_{n}.py' for n in ['exact', 'arguments', 'by_value', 'blind_spots', *names.split()]]
    return [f for f in files if f.exists()]

# Modules and the faults to try

def modules():
    "The modules with code, by name"
    files = sorted((root/'fastai_multi').rglob('*.py'))
    files = [f for f in files if not f.name.startswith('_')]
    return {'.'.join(f.relative_to(root/'fastai_multi').with_suffix('').parts): f for f in files}

def chosen(n, seed, names=None):
    "`n` faults, spread over the modules by the square root of their number of faults, at least one in each"
    rng = random.Random(seed)
    by_module = {}
    for m,f in modules().items():
        if names and m not in names: continue
        source = f.read_text()
        faults = faults_of(source)
        if not faults: continue
        rng.shuffle(faults)
        by_module[m] = source,faults
    shares = {m: len(faults)**.5 for m,(_,faults) in by_module.items()}
    scale = n/sum(shares.values())
    res = []
    for m,(source,faults) in by_module.items():
        k = max(1, round(scale*shares[m]))
        res += [dict(module=m, **described(source, f)[0]) for f in faults[:k]]
    rng.shuffle(res)
    return res

def find(row):
    "Where the fault of a row is now: (module, line, functions around it, text with the fault), or `None`"
    files = modules()
    names = sorted(files, key=lambda m: m!=row['module'])    # its own module first: code moves
    for m in names:
        source = files[m].read_text()
        if row['was'] not in source: continue
        for fault in faults_of(source):
            said,text = described(source, fault)
            if all(said[k]==row[k] for k in said): return m,fault[0].lineno,fault[3],text

def notebook_of(module):
    "The notebook of a module"
    name = re.search(r'File to edit: .*/(.*?\.ipynb)', modules()[module].read_text())
    return name and name[1]

# Running in a fork

def run_notebook(nb, module):
    "The notebook's own tests, with the module's code from its file"
    import importlib
    main = types.ModuleType('__main__')
    sys.modules['__main__'] = main
    found = vars(importlib.import_module(f'fastai_multi.{module}'))
    vars(main).update({k: v for k,v in found.items() if not k.startswith('__') or k=='__getattr__'})
    from IPython.display import display
    main.display = display
    os.chdir('nbs')
    for i,cell in enumerate(json.loads(Path(nb).read_text())['cells']):
        source = ''.join(cell['source'])
        is_exported = re.search(r'^#\|\s*(export|exporti|default_exp)\b', source, re.M)
        if cell['cell_type']!='code' or is_exported or re.search(r'^#\|\s*eval:\s*false', source, re.M): continue
        exec(compile(source, f'{nb}[{i}]', 'exec'), vars(main))
    os.chdir('..')
    return 0

def run_tests(tests, *plugins):
    "The exit status of pytest over some files or tests"
    import pytest
    args = ['-q', '-p', 'no:cacheprovider', '-W', 'ignore', '--tb=short', *tests]
    if not plugins: args.insert(0, '-x')
    return int(pytest.main(args, plugins=list(plugins)))

def in_child(log, limit, f):
    "The exit status of `f` in a process of its own and what it printed; a negative status beyond `limit` seconds"
    pid = os.fork()
    if pid==0:
        os.setsid()
        fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit)+1, int(limit)+1))
        status = 1
        try: status = f()
        except SystemExit as e: status = int(bool(e.code))
        except BaseException as e: print(f'{type(e).__name__}: {e}')
        sys.stdout.flush()
        os._exit(status)
    end = time.time()+20*limit+60
    while True:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status),log.read_text(errors='replace')
        if time.time()>end: os.killpg(pid, signal.SIGKILL)
        time.sleep(.05)

# Which test passes which lines

class Watch:
    "Notes the functions of the package that are entered, as (module, text of the first line)"
    def __init__(self, package):
        self.package = f'{package}{os.sep}'
        self.texts = {}
        self.hits = set()
    def __call__(self, frame, event, arg):
        code = frame.f_code
        if code.co_filename.startswith(self.package): self.hits.add((code.co_filename, code.co_firstlineno))
    def __enter__(self):
        self.hits = set()
        self.start = time.process_time()
        sys.settrace(self)
    def __exit__(self, *args):
        sys.settrace(None)
        self.seconds = time.process_time()-self.start
    def text_of(self, file, k):
        "A line's text, which a change elsewhere in the file leaves as it is"
        if file not in self.texts: self.texts[file] = Path(file).read_text().splitlines()
        module = '.'.join(Path(file[len(self.package):]).with_suffix('').parts)
        return f'{module}:{self.texts[file][k-1].strip()}'
    def row(self, **kwargs):
        lines = sorted({self.text_of(*o) for o in self.hits if Path(o[0]).name!='__init__.py'})
        return json.dumps(dict(**kwargs, seconds=round(self.seconds, 3), lines=lines))

class NoteTests:
    "A pytest plugin: a row for each test that passes"
    def __init__(self, watch, file):
        self.watch = watch
        self.file = file
        self.failed = set()
    def pytest_runtest_logreport(self, report):
        if report.outcome!='passed': self.failed.add(report.nodeid)
    def pytest_runtest_protocol(self, item, nextitem):
        from _pytest.runner import runtestprotocol
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        with self.watch: runtestprotocol(item, nextitem=nextitem)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if item.nodeid not in self.failed:
            with self.file.open('a') as f: f.write(self.watch.row(test=item.nodeid)+'\n')
        return True

def digest(file): return hashlib.sha1(file.read_bytes()).hexdigest()[:12]

class Reach:
    "For each test and notebook its seconds and its lines; files that changed are run again"
    def __init__(self, work, folder, longest):
        self.work = work
        self.folder = folder
        self.longest = longest
        self.rows = {}
        self.imported = None
        folder.mkdir(exist_ok=True, parents=True)
    def of(self, file, module=None):
        "The rows of a test file or a notebook"
        name = file.relative_to(root).as_posix()
        if name not in self.rows:
            at = self.folder/f'{file.stem}-{digest(file)}.jsonl'
            if not at.exists(): self.note(file, at, module)
            self.rows[name] = [json.loads(o) for o in at.read_text().splitlines()]
        return self.rows[name]
    def of_import(self):
        "The functions that the import of the package enters"
        if self.imported is None:
            at = self.folder/'import.json'
            def note():
                import fastai_multi
                watch = Watch(self.work/'fastai_multi')
                with watch: fastai_multi.multi_learner
                at.write_text(watch.row())
                return 0
            in_child(self.work/'log.txt', self.longest, note)
            self.imported = json.loads(at.read_text())['lines']
        return self.imported
    def note(self, file, at, module):
        part = at.with_suffix('.part')
        part.unlink(missing_ok=True)
        watch = Watch(self.work/'fastai_multi')
        def tests(): return run_tests([f'tests/{file.name}'], NoteTests(watch, part))
        def notebook():
            import importlib
            importlib.import_module(f'fastai_multi.{module}')
            with watch: run_notebook(file.name, module)
            part.write_text(watch.row(notebook=file.name)+'\n')
            return 0
        f = tests if module is None else notebook
        status,log = in_child(self.work/'log.txt', self.longest, f)
        if status not in (0, 5): print(f'  {file.name} as it is ends with {status}: {log[-300:]}', flush=True)
        part.touch()
        part.rename(at)
        n = len(at.read_text().splitlines())
        print(f'  noted {file.name}: {n} passed', flush=True)
# Trying a fault

def copy_project():
    "A copy of what the tests need, compiled so that a changed file is noticed by its content"
    import compileall, py_compile
    work = Path(tempfile.mkdtemp(prefix='mutate')).resolve()
    for name in ('fastai_multi','tests','nbs','benchmarks','docs','.ci'):
        if (root/name).exists(): shutil.copytree(root/name, work/name, ignore=shutil.ignore_patterns('__pycache__'))
    for f in root.iterdir():
        if f.is_file() and not f.name.startswith('.git'): shutil.copy(f, work)
    by_content = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(work/'fastai_multi', quiet=1, invalidation_mode=by_content)
    if (root.parent/'shared').exists(): os.environ.setdefault('FASTAI_MULTI_SHARED', str(root.parent/'shared'))
    return work

def warm():
    "Import once what every step imports"
    import importlib
    import fastai.vision.all, fastai.text.all, fastai.tabular.all, torch
    for name in ('pytest', 'IPython.display', 'timm', 'torchjd', 'torchmetrics', 'sklearn.metrics', 'hypothesis'):
        try: importlib.import_module(name)
        except ImportError: pass
    torch.set_num_threads(1)

class Runner:
    "Tries faults in a copy of the project"
    def __init__(self, folder, longest, budget):
        self.work = copy_project()
        self.budget = budget
        self.reach = Reach(self.work, folder, longest)
        os.chdir(self.work)
        sys.path[:] = [str(self.work), *[p for p in sys.path if p and Path(p).resolve()!=here]]
        os.environ.update(PYTHONPATH=str(self.work), MPLBACKEND='Agg', OMP_NUM_THREADS='1')
        warm()
    def enters(self, row, module, heads):
        "Whether a test enters one of the functions around a fault, or the module if an import enters them"
        heads = {f'{module}:{o}' for o in heads}
        if not heads or not heads.isdisjoint(self.reach.of_import()):
            return any(o.startswith(f'{module}:') for o in row['lines'])
        return not heads.isdisjoint(row['lines'])
    def notebook(self, module, heads):
        "The notebook as a step (name, seconds, function), if it enters the fault's function"
        nb = notebook_of(module)
        for row in self.reach.of(root/'nbs'/nb, module):
            if self.enters(row, module, heads): yield nb,row['seconds'],lambda: run_notebook(nb, module)
    def tests(self, module, heads):
        "The tests that enter the fault's function, by file, the quickest first until the budget is spent"
        # `test_arguments.py` reads defaults and calls nothing
        rows = [row for f in near(module) for row in self.reach.of(f)
                if f.name=='test_arguments.py' or self.enters(row, module, heads)]
        spent,names = 0,[]
        for row in sorted(rows, key=lambda o: o['seconds']):
            spent += row['seconds']
            if spent>self.budget: break
            names.append(row['test'])
        by_file = {}
        for o in names: by_file.setdefault(o.partition('::')[0], []).append(o)
        names = [o for tests in by_file.values() for o in tests]
        if names: yield f'{len(names)} tests',spent,lambda: run_tests(names)
    def try_fault(self, row, steps):
        "What happens to a fault in some steps: `self.notebook` or `self.tests`"
        place = find(row)
        if place is None: return dict(end='gone')
        module,line,heads,text = place
        file = self.work/modules()[module].relative_to(root)
        try: compile(text, str(file), 'exec')
        except SyntaxError: return dict(line=line, end='no python')
        steps = list(steps(module, heads))
        before = file.read_text()
        try:
            file.write_text(text)
            return dict(line=line, **self.run(steps))
        finally: file.write_text(before)
    def run(self, steps):
        for name,seconds,f in steps:
            status,log = in_child(self.work/'log.txt', 4*seconds+30, f)
            if status in (0, 5): continue
            failed = re.search(r'^(?:FAILED|ERROR) (\S+)', log, re.M)
            by = failed[1] if failed else name
            if status<0: by += ' (does not end)'
            return dict(end='caught', by=by)
        return dict(end='survived', by=' + '.join(name for name,_,_ in steps))

# Rows, reasons and the report

KEYS = ('module','what','was','now')

def key(row): return tuple(row[k] for k in KEYS)

def read(file):
    if not file.exists(): return []
    return [json.loads(o) for o in file.read_text().splitlines() if o.strip()]

def write(file, rows): file.write_text(''.join(json.dumps(o, ensure_ascii=False)+'\n' for o in rows))

def reasons():
    "Why a fault changes nothing that a user can see, by hand: `equivalent.jsonl`"
    return {key(o): o['reason'] for o in read(here/'equivalent.jsonl')}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-n', type=int, default=150)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--modules', nargs='*')
    p.add_argument('--out', type=Path, help='the rows; `.ci/faults-SEED.jsonl`')
    reach = Path(tempfile.gettempdir())/'mutate-reach'
    p.add_argument('--reach', type=Path, default=reach, help='a folder for what each test enters')
    p.add_argument('--longest', type=float, default=60, help='seconds for a test file; later tests are not used')
    p.add_argument('--budget', type=float, default=30, help='seconds of tests for a fault, the quickest first')
    p.add_argument('--again', action='store_true', help='try again what survived')
    p.add_argument('--report', action='store_true', help='only print the report')
    a = p.parse_args()
    out = (a.out or here/f'faults-{a.seed}.jsonl').resolve()
    done = read(out)
    if a.report: return report(done)
    if a.again: todo = [o for o in done if o['end']=='survived' and key(o) not in reasons()]
    else:
        tried = {key(o) for o in done if o['end']!='to test'}
        todo = [o for o in chosen(a.n, a.seed, a.modules) if key(o) not in tried] if len(tried)<a.n else []
    runner = Runner(a.reach.resolve(), a.longest, a.budget)
    print(f'{len(todo)} faults; results in {out}', flush=True)
    todo = sorted(todo, key=lambda o: o['module'])
    stages = [('notebook', runner.notebook), ('tests', runner.tests)]
    if a.again: stages = stages[1:]    # a notebook that a fault passed is seldom what changed
    for name,steps in stages:
        left = []
        for k,row in enumerate(todo):
            row = {n: row[n] for n in KEYS}
            start = time.time()
            if name=='notebook' and any(key(o)==key(row) and o['end']=='to test' for o in done):
                left.append(row)
                continue
            row.update(runner.try_fault(row, steps))
            if row['end']=='survived' and name=='notebook':
                row['end'] = 'to test'
                left.append(row)
            done = [o for o in done if key(o)!=key(row)]+[row]
            write(out, done)
            place = f"{row['module']}:{row.get('line')}"
            seconds = f'{time.time()-start:.0f} s'
            said = f"{row['end']:9} {place} {row['what']}  {row['now'][:90]}"
            print(f'{name} {k+1}/{len(todo)} {said}  [{seconds}]', flush=True)
        todo = left
    shutil.rmtree(runner.work, ignore_errors=True)
    report(done)

def report(done):
    "The score by module, the survivors, and those that change nothing with their reason"
    why = reasons()
    done = [o for o in done if o['end'] in ('caught','survived')]
    same = [o for o in done if o['end']=='survived' and key(o) in why]
    real = [o for o in done if o not in same]
    caught = [o for o in real if o['end']=='caught']
    share = 100*len(caught)/max(1, len(real))
    print(f'\n{len(done)} faults: {len(caught)} caught, {len(real)-len(caught)} survived, {len(same)} change nothing')
    print(f'{share:.1f} % of those that change something; {100*len(caught)/max(1, len(done)):.1f} % of all')
    for m in sorted({o['module'] for o in done}):
        here = [o for o in done if o['module']==m]
        n_same = sum(o in same for o in here)
        print(f"  {m}: {sum(o['end']=='caught' for o in here)} of {len(here)-n_same}"+n_same*' =')
    out = {}
    for f in modules().values():
        for k,v in all_faults(f.read_text())[1].items(): out[k] = out.get(k, 0)+v
    print(f'Possible faults that are not tried, for they only make words or looks: {out}')
    for title,rows in (('Survivors', [o for o in real if o['end']=='survived']), ('Change nothing', same)):
        print(f'\n{title}')
        for o in rows:
            print(f"  {o['module']}:{o['line']} ({o['what']})\n    was {o['was']}\n    now {o['now']}")
            if key(o) in why: print(f'    {why[key(o)]}')

if __name__=='__main__': main()
