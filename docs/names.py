"List what the documentation of the public names lacks: `python docs/names.py`"
import ast, inspect, sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fastcore.nbio import read_nb

import api, stage

@lru_cache
def notebooks(): return {m: nb for nb in sorted(stage.nbs.glob('*.ipynb')) if (m := stage.module_of(nb))}

@lru_cache
def homes():
    "The module whose `__all__` has each public name"
    import fastai_multi
    return {n: m for m in notebooks() for n in stage.public(m) if n in fastai_multi.__all__}

def directives(cell):
    return {l[2:].split()[0].rstrip(':') for l in cell.source.splitlines() if l.startswith('#|') and l[2:].split()}

def defines(cell, name):
    return any(getattr(o, 'name', '')==name or name in [getattr(t, 'id', '') for t in getattr(o, 'targets', [])]
               for o in cell.parsed_() or [])

def used(cell, name):
    return any(isinstance(n, ast.Name) and n.id==name or isinstance(n, ast.Attribute) and n.attr==name
               for o in cell.parsed_() or [] for n in ast.walk(o))

def example(name):
    "Whether a cell below the definition of `name` uses it, is shown on its page and runs in CI"
    defined = False
    for c in read_nb(notebooks()[homes()[name]]).cells:
        if c.cell_type!='code': continue
        d = directives(c)
        if d & {'export','exports'} and defines(c, name): defined = True
        elif defined and not d & {'export','exports','exporti','hide','eval','default_exp'} and used(c, name):
            return True
    return False

def unexplained(name):
    "The parameters without a comment that this package defines, without those that `delegates` adds"
    obj,raw,home,node = api.locate(name, homes().get(name.split('.')[0]))
    if isinstance(obj, property) or not callable(obj): return []
    if inspect.isclass(obj): node = api.init_node(obj)
    d = api.explained(obj, node, home)
    own = api.written(node)
    return [n for n,kind,_,_ in api.parameters(obj, node) if n in own and kind not in api.STARS and not d.get(n)]

def is_constant(name): return name in api.constants(homes()[name])

def has_summary(name):
    m = homes()[name]
    return bool(api.constants(m)[name][1] if is_constant(name) else api.summary(getattr(sys.modules[m], name)))

def public_methods(name):
    "The methods of a public class that its page shows"
    obj,_,home,_ = api.locate(name, homes()[name])
    return [f'{name}.{n}' for n in api.methods(obj, home)] if inspect.isclass(obj) else []

def report():
    "The names with each fault"
    import fastai_multi
    names = fastai_multi.__all__
    found = {n: unexplained(n) for n in homes() if not is_constant(n)}
    return {'are in no module that a notebook writes': [n for n in names if n not in homes()],
            'without a one-line summary': [n for n in homes() if not has_summary(n)],
            'with parameters that no comment explains': [f'{n} ({", ".join(ps)})' for n,ps in found.items() if ps],
            'without an example that is run below its definition': [n for n in homes() if not example(n)]}

def methods_report():
    found = {f'{m}': unexplained(m) for n in homes() if not is_constant(n) for m in public_methods(n)}
    return [f'{m} ({", ".join(ps)})' for m,ps in found.items() if ps]

if __name__=='__main__':
    for what,names in report().items(): print(f'{len(names)} {what}:', ', '.join(names) or '-', sep='\n  ')
    found = methods_report()
    print(f'{len(found)} methods of public classes with parameters that no comment explains (not a fault):',
          ', '.join(found) or '-', sep='\n  ')
