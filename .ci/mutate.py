"""Puts one fault at a time into a copy of the package and runs the tests nearest to it: the module's own notebook, then
files of `tests/`. A fault that every test passes survives. Run by command, not in CI; a run that was stopped goes on
where it stopped.

Usage: python .ci/mutate.py [-n 150] [--seed 0] [--modules core losses] [--longest 60] [--again] [--out faults.jsonl]
"""
import argparse, ast, contextlib, copy, io, json, os, random, re, shutil, signal, sys, tempfile, time, types
from pathlib import Path

root = Path(__file__).resolve().parent.parent

# Faults: each rule gives for a node of the syntax tree what may stand in its place

OPPOSITE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
            ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
SIBLINGS = {a: b for pair in ('min max', 'amin amax', 'argmin argmax', 'any all', 'sum mean', 'nansum nanmean', 'w h',
                              'width height', 'x1 y1', 'train valid', 'pred targ', 'zeros ones', 'isnan isfinite',
                              'before_fit after_fit', 'sigmoid tanh', 'softmax log_softmax', 'floor ceil')
            for a,b in (pair.split(), pair.split()[::-1])}

def opposite(node):
    "Another comparison, sign or connective"
    if isinstance(node, ast.Compare) and len(node.ops)==1 and type(node.ops[0]) in OPPOSITE:
        yield 'comparison',with_change(node, ops=[OPPOSITE[type(node.ops[0])]()])
    if isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE and not is_text(node.left) and not is_text(node.right):
        yield 'arithmetic',with_change(node, op=OPPOSITE[type(node.op)]())
    if isinstance(node, ast.BoolOp): yield 'connective',with_change(node, op=OPPOSITE[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not): yield 'not dropped',node.operand
    if isinstance(node, ast.AugAssign) and type(node.op) in OPPOSITE:
        yield 'arithmetic',with_change(node, op=OPPOSITE[type(node.op)]())

def constant(node):
    "Another constant"
    if not isinstance(node, ast.Constant): return
    v = node.value
    if isinstance(v, bool): yield 'constant',ast.Constant(not v)
    elif isinstance(v, int): yield 'constant',ast.Constant(v+1)
    elif isinstance(v, float): yield 'constant',ast.Constant(v*2 if v else 1.)

def sibling(node):
    "A neighbour's name: min and max, width and height"
    if isinstance(node, ast.Attribute) and node.attr in SIBLINGS:
        yield 'name',with_change(node, attr=SIBLINGS[node.attr])
    if isinstance(node, ast.Name) and node.id in SIBLINGS and isinstance(node.ctx, ast.Load):
        yield 'name',with_change(node, id=SIBLINGS[node.id])

def position(node):
    "Another index, an open slice, a tuple turned round, arguments in another order"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in (0, -1):
        yield 'index',with_change(node, slice=ast.Constant(-1-node.slice.value))
    if isinstance(node, ast.Slice) and node.upper is not None: yield 'slice',with_change(node, upper=None)
    if isinstance(node, ast.Slice) and node.lower is not None: yield 'slice',with_change(node, lower=None)
    is_pair = isinstance(node, ast.Tuple) and len(node.elts)==2
    if is_pair and all(isinstance(e, (ast.Name,ast.Attribute)) for e in node.elts):
        yield 'order',with_change(node, elts=node.elts[::-1])
    if isinstance(node, ast.Call) and len(node.args)==2 and all(isinstance(a, ast.Name) for a in node.args):
        yield 'order',with_change(node, args=node.args[::-1])

def dropped(node):
    "A keyword argument, an assignment or a call left out"
    if isinstance(node, ast.Call):
        for i,k in enumerate(node.keywords):
            others = node.keywords[:i]+node.keywords[i+1:]
            if k.arg is not None: yield f'{k.arg}= dropped',with_change(node, keywords=others)
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    is_stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute,ast.Subscript))
    if is_call or is_stored: yield 'statement dropped',ast.Pass()
    if isinstance(node, ast.If): yield 'condition',with_change(node, test=ast.UnaryOp(ast.Not(), node.test))

RULES = [opposite, constant, sibling, position, dropped]

def is_text(node):
    if isinstance(node, (ast.JoinedStr,ast.List)): return True
    return isinstance(node, ast.Constant) and isinstance(node.value, str)

def with_change(node, **fields):
    "A copy of a node with other fields"
    res = copy.copy(node)
    for k,v in fields.items(): setattr(res, k, v)
    return res

def is_said(node):
    "Whether a node only makes words: an error, a message, a representation, a figure"
    if isinstance(node, (ast.Raise,ast.JoinedStr,ast.Import,ast.ImportFrom,ast.Assert)): return True
    name = getattr(node, 'name', '')
    if isinstance(node, ast.FunctionDef): return name.startswith(('refuse','no_','__repr__','did_you','plot','draw'))
    return isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '')=='__all__'

def faults_of(source):
    "Every fault of a module: the node, its line, and what stands in its place"
    res = []
    def visit(node):
        if is_said(node): return
        for rule in RULES:
            for what,new in rule(node): res.append((node, what, new))
        for child in ast.iter_child_nodes(node): visit(child)
    visit(ast.parse(source))
    return [o for o in res if hasattr(o[0], 'lineno')]

def with_fault(source, node, new):
    "The source with `new` in the place of `node`"
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines: starts.append(starts[-1]+len(line))
    a = starts[node.lineno-1]+node.col_offset
    b = starts[node.end_lineno-1]+node.end_col_offset
    text = ast.unparse(ast.fix_missing_locations(new))
    if isinstance(new, ast.expr) and not isinstance(new, (ast.Constant,ast.Name)): text = f'({text})'
    if isinstance(node, ast.If): text = text.replace('\n', '\n'+' '*node.col_offset)
    text = text.strip('()') if isinstance(node, ast.Slice) else text
    data = source.encode()
    return (data[:a]+text.encode()+data[b:]).decode()

def modules():
    "The modules with code, by name"
    files = sorted((root/'fastai_multi').rglob('*.py'))
    files = [f for f in files if not f.name.startswith('_')]
    return {'.'.join(f.relative_to(root/'fastai_multi').with_suffix('').parts): f for f in files}

def chosen(n, seed, names=None):
    "`n` faults over the modules, at least one in each, as descriptions that a file can hold"
    rng = random.Random(seed)
    by_module = {}
    for m,f in modules().items():
        if names and m not in names: continue
        source = f.read_text()
        found = list(range(len(faults_of(source))))
        rng.shuffle(found)
        by_module[m] = found
    res = []
    weights = {m: max(1, round(n*len(v)**.5)) for m,v in by_module.items()}
    total = sum(weights.values())
    for m,found in by_module.items(): res += [(m,i) for i in found[:max(1, round(n*weights[m]/total))]]
    rng.shuffle(res)
    return res[:max(n, len(by_module))]

# Tests nearest to a module: its own notebook and `test_blind_spots.py` always, and these

NEAR = {
    'core': ['test_data.py'],
    'data.text': ['test_data.py -k text', 'test_tables.py'],
    'data.geometry': ['test_augment.py', 'test_data.py -k geometry', 'test_learner.py -k boxes'],
    'data.parts': ['test_data.py', 'test_kinds.py'], 'data.items': ['test_data.py', 'test_tables.py'],
    'data.inputs': ['test_data.py', 'test_input.py', 'test_tables.py'],
    'data.outputs': ['test_data.py', 'test_tables.py'],
    'data.spatial': ['test_data.py', 'test_augment.py', 'test_tables.py'],
    'data.reader': ['test_input.py', 'test_data.py'], 'data.load': ['test_data.py', 'test_input.py'],
    'data.show': ['test_data.py -k show'], 'data.readers': ['test_data.py', 'test_tables.py'],
    'data.block': ['test_data.py'], 'data.loaders': ['test_data.py', 'test_tables.py'],
    'models': ['test_models.py', 'test_depth.py'], 'targets': ['test_losses.py'], 'terms': ['test_losses.py'],
    'losses': ['test_losses.py'],
    'metrics': ['test_losses.py', 'test_learner.py -k "table or numbers or classes_that"'],
    'callback.gradients': ['test_gradients.py'], 'callback': ['test_weights.py', 'test_gradients.py -k monitor'],
    'callback.mixup': ['test_losses.py -k mix', 'test_learner.py -k mix'],
    'tasks': ['test_kinds.py', 'test_defaults.py'],
    'batch': ['test_losses.py -k "batch or weights"'], 'answers': ['test_learner.py -k "predict or boxes or raw"'],
    'report': ['test_gradients.py -k report'], 'probe': ['test_defaults.py'], 'depth': ['test_depth.py -k finder'],
    'learner': ['test_learner.py', 'test_defaults.py']}

def tests_of(module):
    "The arguments of pytest for the tests nearest to a module, the nearest first"
    names = [module, module.rpartition('.')[0]]
    near = next((NEAR[m] for m in names if m in NEAR), ['test_learner.py'])
    found = []
    for o in ['test_blind_spots.py', *near]:
        file,_,k = o.partition(' -k ')
        if not (root/'tests'/file).exists(): continue
        found.append([f'tests/{file}', *(['-k', k.strip('"')] if k else [])])
    return found

def notebook_of(file):
    "The notebook of a module"
    name = re.search(r'File to edit: .*/(.*?\.ipynb)', file.read_text())
    return name and name[1]

# Running: one process imports fastai once, and forks for each fault

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

def run_step(module, step):
    "A notebook's or a test file's exit status, in this process"
    if step.get('notebook'):
        run_notebook(step['notebook'], module)
        return 0
    import pytest
    return int(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '-W', 'ignore', *step['tests']]))

def in_child(work, limit, f):
    "The exit status of `f` in a process of its own, or 'time', and what it printed"
    log = work/'log.txt'
    pid = os.fork()
    if pid==0:
        os.setsid()
        fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        status = 1
        try: status = f()
        except SystemExit as e: status = int(bool(e.code))
        except BaseException as e: print(f'{type(e).__name__}: {e}')
        sys.stdout.flush()
        os._exit(status)
    end = time.time()+limit
    while time.time()<end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status),log.read_text(errors='replace')
        time.sleep(.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 'time',log.read_text(errors='replace')

def copy_project():
    "A copy of what the tests need, without compiled files"
    work = Path(tempfile.mkdtemp(prefix='mutate'))
    for name in ('fastai_multi','tests','nbs','benchmarks','docs','.ci'):
        if (root/name).exists(): shutil.copytree(root/name, work/name, ignore=shutil.ignore_patterns('__pycache__'))
    for f in root.iterdir():
        if f.is_file() and not f.name.startswith('.git'): shutil.copy(f, work)
    if (root.parent/'shared').exists(): os.environ.setdefault('FASTAI_MULTI_SHARED', str(root.parent/'shared'))
    return work

class Runner:
    "Tries faults in a copy of the project"
    def __init__(self, longest):
        self.work = copy_project()
        self.longest = longest
        self.base = {}     # seconds of each step without a fault, None where it fails
        os.chdir(self.work)
        sys.path[:] = [str(self.work), *[p for p in sys.path if p and Path(p).resolve()!=root/'.ci']]
        os.environ.update(PYTHONPATH=str(self.work), PYTHONDONTWRITEBYTECODE='1', MPLBACKEND='Agg', OMP_NUM_THREADS='1')
        sys.dont_write_bytecode = True
        import pytest, pandas, fastai.vision.all, fastai.text.all, torch, IPython
        torch.set_num_threads(1)
    def steps(self, module):
        nb = notebook_of(modules()[module])
        return [dict(notebook=nb)] + [dict(tests=t) for t in tests_of(module)]
    def time_of(self, module, step):
        "Seconds that a step takes without a fault, or `None` if it fails or takes too long"
        key = json.dumps(step)
        if key not in self.base:
            start = time.time()
            status,log = in_child(self.work, self.longest, lambda: run_step(module, step))
            self.base[key] = time.time()-start if status in (0, 5) else None
            if self.base[key] is None: print(f'  left out, it fails as it is ({status}): {key}\n{log[-600:]}')
        return self.base[key]
    def try_fault(self, module, i):
        "What happens to fault `i` of a module"
        file = modules()[module]
        source = file.read_text()
        node,what,new = faults_of(source)[i]
        here = self.work/file.relative_to(root)
        res = dict(module=module, fault=i, line=node.lineno, what=what, was=source.splitlines()[node.lineno-1].strip())
        text = with_fault(source, node, new)
        res['now'] = text.splitlines()[node.lineno-1].strip()
        try: compile(text, str(here), 'exec')
        except SyntaxError: return {**res, 'end': 'no python'}
        try:
            here.write_text(text)
            return {**res, **self.run(module)}
        finally: here.write_text(source)
    def run(self, module):
        for step in self.steps(module):
            here = (self.work/modules()[module].relative_to(root))
            text = here.read_text()
            here.write_text(modules()[module].read_text())
            usual = self.time_of(module, step)
            here.write_text(text)
            if usual is None: continue
            status,log = in_child(self.work, 3*usual+20, lambda: run_step(module, step))
            by = step.get('notebook') or step['tests'][0]
            if status not in (0, 5): return dict(end='caught', by=by, status=status)
        return dict(end='survived')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('-n', type=int, default=150)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--modules', nargs='*')
    p.add_argument('--out', type=Path)
    p.add_argument('--longest', type=float, default=240, help='seconds; a file of tests that takes more is left out')
    p.add_argument('--again', action='store_true', help='try again what survived')
    a = p.parse_args()
    out = (a.out or Path(tempfile.gettempdir())/f'faults-{a.seed}.jsonl').resolve()
    done = [json.loads(o) for o in out.read_text().splitlines()] if out.exists() else []
    if a.again: done = [o for o in done if o['end']!='survived']
    tried = {(o['module'], o['fault'], o['was']) for o in done}
    todo = chosen(a.n, a.seed, a.modules)
    runner = Runner(a.longest)
    print(f'{len(todo)} faults; results in {out}', flush=True)
    for k,(m,i) in enumerate(todo):
        source = modules()[m].read_text()
        faults = faults_of(source)
        was = source.splitlines()[faults[i][0].lineno-1].strip()
        if (m,i,was) in tried: continue
        start = time.time()
        res = runner.try_fault(m, i)
        res['seconds'] = round(time.time()-start, 1)
        with out.open('a') as f: f.write(json.dumps(res)+'\n')
        done.append(res)
        place = f"{m}:{res['line']}"
        line = f"{k+1}/{len(todo)} {res['end']:9} {place} {res['what']}  {res['now'][:90]}  [{res['seconds']} s]"
        print(line, flush=True)
    shutil.rmtree(runner.work, ignore_errors=True)
    report([o for o in done if o['end']!='no python'])

def report(done):
    "The score by module, and the survivors"
    caught = [o for o in done if o['end']=='caught']
    print(f'\n{len(caught)} of {len(done)} caught ({100*len(caught)/max(1, len(done)):.0f} %)')
    for m in sorted({o['module'] for o in done}):
        here = [o for o in done if o['module']==m]
        print(f"  {m}: {sum(o['end']=='caught' for o in here)} of {len(here)}")
    print('\nSurvivors')
    for o in done:
        if o['end']!='survived': continue
        print(f"  {o['module']}:{o['line']} ({o['what']})\n    was {o['was']}\n    now {o['now']}")

if __name__=='__main__': main()
