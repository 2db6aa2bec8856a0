"""Print as JSON what importing `fastai_multi` does in a fresh process. `test_project.py` runs this file with one of the
names in `tasks`."""
import gc, importlib, json, os, random, re, sys, time, types, warnings

def star(module):
    "The namespace after `from module import *`"
    ns = {}
    exec(f'from {module} import *', ns)
    ns.pop('__builtins__')
    return ns

def ours(name): return name.split('.')[0] == 'fastai_multi'

# What is watched: fastai, its own libraries, and the classes that people patch
roots = 'fastai', 'fastcore', 'fasttransform', 'fastprogress'

def watched():
    "The name and the dict of each watched module and class"
    for name,mod in sorted(sys.modules.items()):
        if name.split('.')[0] not in roots or not isinstance(mod, types.ModuleType): continue
        yield name, vars(mod)
        for k,v in list(vars(mod).items()):
            if isinstance(v, type) and v.__module__ == name: yield f'{name}.{k}', vars(v)
    import builtins, pathlib, numpy, pandas, torch, PIL.Image
    yield 'builtins', vars(builtins)
    for c in (pathlib.Path, numpy.ndarray, pandas.DataFrame, pandas.Series, torch.Tensor, torch.nn.Module,
              torch.utils.data.DataLoader, torch.optim.Optimizer, PIL.Image.Image):
        yield f'{c.__module__}.{c.__qualname__}', vars(c)

def shown(o):
    "The `repr` without addresses, which differ between processes"
    return re.sub(r' at 0x[0-9a-f]+', '', repr(o))

def settings():
    "The global settings of the process, as comparable values"
    import locale, logging, matplotlib, multiprocessing, numpy as np, pandas as pd, signal, torch
    from fastcore.foundation import defaults
    return dict(warnings=sorted(map(repr, warnings.filters)), env=dict(os.environ), path=list(sys.path),
                cwd=os.getcwd(),
                hooks=[shown(f)
                       for f in (sys.excepthook, sys.displayhook, warnings.showwarning, *sys.meta_path,
                                 *sys.path_hooks)],
                signals=[repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)], locale=locale.getlocale(),
                logging=[repr(h) for h in logging.getLogger().handlers] + [logging.getLogger().level],
                start_method=multiprocessing.get_start_method(allow_none=True), recursion=sys.getrecursionlimit(),
                defaults={k: shown(v) for k,v in vars(defaults).items()}, random=hash(random.getstate()),
                numpy=[repr(a) for a in np.random.get_state()], torch=torch.get_rng_state().tolist(),
                threads=[torch.get_num_threads(), torch.get_num_interop_threads()],
                dtype=str(torch.get_default_dtype()), grad=torch.is_grad_enabled(),
                deterministic=torch.are_deterministic_algorithms_enabled(), print=repr(torch._tensor_str.PRINT_OPTS),
                cudnn=[torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
                       torch.backends.cudnn.enabled],
                matmul=torch.get_float32_matmul_precision(), sharing=torch.multiprocessing.get_sharing_strategy(),
                errors=np.geterr(),
                pandas=[pd.get_option(o) for o in ('display.max_rows', 'display.max_columns', 'display.max_colwidth')],
                rc={k: repr(v) for k,v in matplotlib.rcParams.items() if k != 'backend'})

def members(v, depth=2):
    "The members of a container, or the value itself, so that a later comparison sees what was added"
    if depth and isinstance(v, dict): return {id(k): (k, members(x, depth-1)) for k,x in v.items()}
    if depth and type(v) in (list, tuple, set, frozenset): return [members(x, depth-1) for x in v]
    return v

def same(a, b):
    if a is b: return True
    if type(a) is dict and type(b) is dict: return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if type(a) in (list, tuple) and type(b) is type(a): return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, (int, float, str, bool)) and type(a) is type(b) and a == b

def methods(f):
    "The implementation and signature of each method of a plum function. plum cannot resolve some of fastai's"
    return [(impl, sig) for impl,sig,_ in f._resolved + f._pending]

def dispatched(ns):
    from plum import Function
    return {k: v for k,v in ns.items() if isinstance(v, Function)}

def own_types(impl, sig):
    "Whether the signature names a type of `fastai_multi`"
    found = False
    todo = list(sig.types if sig else impl.__annotations__.values())
    while todo and not found:
        t = todo.pop()
        todo += t if isinstance(t, tuple) else getattr(t, '__args__', ())
        found = ours(getattr(t, '__module__', '') or '')
    return found

class Snapshot:
    "A copy of fastai's modules, classes and dispatch tables and of the process's settings, to compare by identity"
    def __init__(self):
        # keeps `v` too, so that Python reuses no `id`
        self.held = {n: {k: (v, members(v)) for k,v in ns.items()} for n,ns in watched()}
        self.tables = {(n,k): methods(f) for n,ns in watched() for k,f in dispatched(ns).items()}
        self.settings = settings()

    def differences(self):
        "What has changed, except for new methods for types of `fastai_multi`"
        changed = []
        for n,ns in watched():
            if n not in self.held:
                changed.append(f'{n} is imported')
                continue
            old = self.held[n]
            changed += [f'{n}.{k}' for k in {*old, *ns}
                        if k not in old or k not in ns or not same(old[k][1], members(ns[k]))]
            for k,f in dispatched(ns).items():
                was,now = [[impl for impl,_ in ms] for ms in (self.tables.get((n,k), []), methods(f))]
                changed += [f'{n}.{k} lost the method of {m.__module__}' for m in was if m not in now]
                changed += [f'{n}.{k} gained {m.__module__}.{m.__qualname__}{m.__annotations__}'
                            for m,sig in methods(f) if m not in was and not own_types(m, sig)]
        now = settings()
        return sorted(set(changed)) + [f'setting {k}' for k in now if now[k] != self.settings[k]]

def after(modules):
    "What importing `fastai_multi` changes in fastai, after all its other imports were made"
    star('fastai.vision.all')
    for m in modules:
        try: importlib.import_module(m)
        except Exception: pass
    was = Snapshot()
    star('fastai_multi')
    changed = was.differences()
    # The differences for a package that does patch
    from fastai.learner import Learner
    from fastai.data.core import show_batch
    Learner.fit = lambda self: None
    show_batch.dispatch(_show_anything)
    warnings.simplefilter('ignore')
    random.random()
    os.environ['FASTAI_MULTI_WAS_HERE'] = '1'
    return dict(changed=changed, noticed=was.differences())

def _show_anything(x: int, y: str, samples, ctxs=None): pass

def told(v):
    "A description of `v` that is the same in every process"
    if isinstance(v, (staticmethod, classmethod)): return told(v.__func__)
    if isinstance(v, property): return [told(f) for f in (v.fget, v.fset, v.fdel)]
    if isinstance(v, types.FunctionType):
        return f'{v.__module__}.{v.__qualname__} {v.__code__.co_filename}:{v.__code__.co_firstlineno}'
    if isinstance(v, type): return f'{v.__module__}.{v.__qualname__} of {[b.__qualname__ for b in v.__mro__]}'
    if isinstance(v, (int, float, str, bool, type(None))): return repr(v)
    if type(v) in (list, tuple): return [told(x) for x in v]
    return type(v).__qualname__

def described(_):
    "The state of fastai after the imports made so far"
    return dict(state={n: {k: told(v) for k,v in ns.items() if not k.startswith('__')} for n,ns in watched()},
                settings=settings())

def before(modules):
    star('fastai_multi')
    star('fastai.vision.all')
    return described(modules)

def without(modules):
    "Import fastai and the other libraries without `fastai_multi`"
    for m in modules:
        try: importlib.import_module(m)
        except Exception: pass
    star('fastai.vision.all')
    return described(modules)

def cost(_):
    "The seconds of fastai's import and of ours after it, the names that ours adds, and the modules that it loads"
    start = time.perf_counter()
    base = star('fastai.vision.all')
    base_seconds = time.perf_counter()-start
    gc.disable()    # collecting fastai's garbage during our import would take longer than the import
    start = time.perf_counter()
    ns = star('fastai_multi')
    seconds = time.perf_counter()-start
    gc.enable()
    import fastai_multi
    return dict(seconds=seconds, base_seconds=base_seconds, names=sorted(ns), all=sorted(fastai_multi.__all__),
                modules=[m for m in sys.modules if not ours(m)], version=fastai_multi.__version__,
                are_modules=[n for n,v in ns.items() if isinstance(v, types.ModuleType)],
                replaced=[n for n in ns if n in base and base[n] is not ns[n]])

def alone(_):
    "The modules that importing one low module loads"
    import fastai_multi.core
    return [m for m in sys.modules if ours(m)]

tasks = dict(after=after, before=before, without=without, cost=cost, alone=alone)

if __name__ == '__main__':
    result = tasks[sys.argv[1]](json.loads(sys.stdin.read() or '[]'))
    print('\n' + json.dumps(result))
