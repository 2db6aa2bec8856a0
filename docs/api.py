"Write what a page says about a public name: signature, summary, a table of parameters, and a link to the source"
import ast, importlib, inspect, io, re, tokenize
from functools import lru_cache
from pathlib import Path

from fastcore.docments import docments
from fastai_multi.docstrings import Explainer, function_of, maker_of, plain_docstring

root = Path(__file__).resolve().parent.parent
lib = root/'fastai_multi'
NONE = inspect.Parameter.empty
DEFS = ast.FunctionDef,ast.AsyncFunctionDef,ast.ClassDef

# The source

def module_file(module):
    "The file of a module, given a name such as `fastai_multi.data.parts`"
    return (root/Path(*module.split('.'))).with_suffix('.py')

@lru_cache
def source(module): return module_file(module).read_text(encoding='utf-8')

def _patched(o):
    "The class that a function under `@patch` extends: the type of its first argument"
    is_patch = any(ast.unparse(d).startswith('patch') for d in o.decorator_list)
    return ast.unparse(o.args.args[0].annotation) if is_patch and not isinstance(o, ast.ClassDef) else ''

@lru_cache
def nodes(module):
    "All classes, functions, methods and patched methods of a module, by dotted name"
    found = {}
    for o in ast.parse(source(module)).body:
        if not isinstance(o, DEFS): continue
        found['.'.join(filter(None, [_patched(o), o.name]))] = o
        if isinstance(o, ast.ClassDef): found.update({f'{o.name}.{p.name}': p for p in o.body if isinstance(p, DEFS)})
    return found

@lru_cache
def comments(module):
    "The comments of a module, by line"
    toks = tokenize.generate_tokens(io.StringIO(source(module)).readline)
    return {t.start[0]: t.string.lstrip('# ').strip() for t in toks if t.type==tokenize.COMMENT}

def first_line(o): return min([o.lineno, *[d.lineno for d in o.decorator_list]])

def constants(module):
    "The value and the comment of each name in a module's `__all__` that is neither a class nor a function"
    found = {}
    names = importlib.import_module(module).__all__
    for o in ast.parse(source(module)).body:
        if isinstance(o, ast.Assign) and len(o.targets)==1 and getattr(o.targets[0], 'id', '') in names:
            found[o.targets[0].id] = ast.unparse(o.value),comments(module).get(o.end_lineno, '')
    return found

# Signatures

def init_node(cls):
    "The node that defines the parameters of a class, if it is in this package"
    for c in cls.__mro__:
        if not c.__module__.startswith(lib.name): return
        for n in ('__init__', '__new__'):
            if n in c.__dict__: return nodes(c.__module__).get(f'{c.__name__}.{n}')

def written(node):
    "The annotation and the default of each parameter, as the source writes them"
    if node is None: return {}
    a = node.args
    res = {}
    pos = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(pos)-len(a.defaults))+a.defaults
    for p,d in [*zip(pos, defaults), *zip(a.kwonlyargs, a.kw_defaults), (a.vararg,None), (a.kwarg,None)]:
        if p: res[p.arg] = p.annotation and ast.unparse(p.annotation), d and ast.unparse(d)
    return res

def _type(t):
    if isinstance(t, str): return t
    if getattr(t, '__args__', None) or not hasattr(t, '__name__'): return re.sub(r'\b(\w+\.)+(?=\w)', '', str(t))
    return t.__name__

def _value(v):
    "The default of a parameter that is defined outside this package"
    if hasattr(v, '__name__'): return v.__name__
    return repr(v) if isinstance(v, (str,int,float,bool,type(None),tuple,list,dict)) else f'{type(v).__name__}()'

def parameters(obj, node=None):
    "A list of `(name, kind, annotation, default)`, without `self`"
    try: sig = inspect.signature(obj)
    except (ValueError,TypeError): return []
    wrote = written(node)
    res = []
    # fastai's `funcs_kwargs` adds a keyword for every method that you may replace
    events = getattr(obj, '_methods', ())
    for n,p in sig.parameters.items():
        if n in events and n not in wrote: continue
        seen = (p.annotation is not NONE and _type(p.annotation) or None,
                p.default is not NONE and _value(p.default) or None)
        anno,default = wrote.get(n, seen)
        res.append((n, p.kind, anno, default))
    own = [r for r in res if r[0] not in ('self','cls')] if res and res[0][0] in ('self','cls') else res
    return own

STARS = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}

def signature(obj, node=None):
    "The signature in one line, with types and defaults as the source writes them"
    parts = []
    ps = parameters(obj, node)
    last = None
    for n,kind,anno,default in ps:
        if last==inspect.Parameter.POSITIONAL_ONLY and kind!=last: parts.append('/')
        if kind==inspect.Parameter.KEYWORD_ONLY and last not in (kind, inspect.Parameter.VAR_POSITIONAL):
            parts.append('*')
        part = f'{STARS.get(kind, "")}{n}'
        if anno: part += f': {anno}'
        if default: part += f' = {default}' if anno else f'={default}'
        parts.append(part)
        last = kind
    if last==inspect.Parameter.POSITIONAL_ONLY: parts.append('/')
    returns = getattr(node, 'returns', None) if not inspect.isclass(obj) else None
    return f'({", ".join(parts)})' + (f' -> {ast.unparse(returns)}' if returns else '')

# Parameters

def explained(obj, node=None, module=None):
    "The comment of each parameter, and of `return`"
    function = maker_of(obj) if inspect.isclass(obj) else function_of(obj)
    if function is not None: d = Explainer(importlib.import_module(lib.name)).comments(function)
    if function is None or not d: d = fields(obj)
    return d

def fields(obj):
    "The comment of each field of a dataclass"
    if not hasattr(obj, '__dataclass_fields__'): return {}
    return {n: v.get('docment') or '' for n,v in docments(obj, full=True).items()}

def cell(s): return re.sub(r'(?<!\\)\|', r'\\|', s)

def code(s): return f'``{cell(s)}``' if '`' in s else f'`{cell(s)}`' if s else ''

def table(obj, node=None, module=None):
    "The comments of the parameters as a table, or nothing if there are none"
    d = explained(obj, node, module)
    rows = []
    own = written(node)
    for n,kind,anno,default in parameters(obj, node):
        if (kind in STARS or n not in own) and not d.get(n): continue
        rows.append([f'`{STARS.get(kind, "")}{n}`', code(anno or ''), code(default or ''), cell(d.get(n, ''))])
    returns = getattr(node, 'returns', None) if not inspect.isclass(obj) else None
    if d.get('return'): rows.append(['*returns*', code(ast.unparse(returns)) if returns else '', '', cell(d['return'])])
    if not any(r[3] for r in rows): return ''
    heads = ['parameter', 'type', 'default', 'what it is']
    keep = [i for i in range(4) if any(r[i] for r in rows)]
    line = lambda r: '| ' + ' | '.join(r[i] for i in keep) + ' |'
    return '\n'.join([line(heads), line(['---']*4), *map(line, rows)])

def summary(obj):
    "The first line of an object's own docstring"
    if inspect.isclass(obj) and not obj.__dict__.get('__doc__'): return ''
    if isinstance(obj, (classmethod,staticmethod)): obj = obj.__func__
    return plain_docstring(inspect.getdoc(obj)).strip().split('\n')[0]

# Pages

def directive(kind, head, body, module, level):
    fence = ':'*level
    return f'{fence}{{py:{kind}}} {head}\n:module: {module}\n\n{body}\n{fence}'

def locate(name, module):
    "The object called `name` in `module`, the module that defines it, and its node in the source"
    obj = importlib.import_module(module)
    for n in name.split('.'): obj = inspect.getattr_static(obj, n) if inspect.isclass(obj) else getattr(obj, n)
    raw = obj
    if isinstance(raw, (classmethod,staticmethod)): obj = raw.__func__
    home = getattr(obj.fget if isinstance(obj, property) else obj, '__module__', module) or module
    if not home.startswith(lib.name): home = module
    return obj,raw,home,nodes(home).get(name)

def methods(cls, module, apart=()):
    "The documented public methods that a class defines itself, without those that are shown elsewhere"
    for n,m in cls.__dict__.items():
        f = m.__func__ if isinstance(m, (classmethod,staticmethod)) else m.fget if isinstance(m, property) else m
        if n.startswith('_') or not inspect.isfunction(f) or f'{cls.__name__}.{n}' in apart: continue
        node = nodes(module).get(f'{cls.__name__}.{n}')
        if node and (f.__doc__ or any(v for v in explained(f, node, module).values())): yield n

def inherited(cls):
    "A table of the methods that a class inherits from this package's classes, with links to their descriptions"
    rows = []
    seen = set(vars(cls))
    for base in cls.__mro__[1:]:
        if not is_public(base): continue
        for n in methods(base, base.__module__):
            if n in seen: continue
            link = f'{{py:meth}}`{n} <{base.__module__}.{base.__name__}.{n}>`'
            rows.append(f'| {link} | {cell(summary(inspect.getattr_static(base, n)))} |')
        seen.update(vars(base))
    if not rows: return ''
    return '\n'.join(['| from other modules | |', '|---|---|', *rows])

def is_public(cls):
    "Whether one of our pages shows a class"
    if not cls.__module__.startswith(f'{lib.name}.'): return False
    return cls.__name__ in importlib.import_module(cls.__module__).__all__

def markdown(name, module, apart=(), level=8):
    "The text of a page about `name`, as MyST. `apart`: methods that are shown elsewhere"
    obj,raw,home,node = locate(name, module)
    body = [plain_docstring(inspect.getdoc(obj))] if not inspect.isclass(obj) or obj.__dict__.get('__doc__') else []
    if inspect.isclass(obj):
        init = init_node(obj)
        body.append(table(obj, init, home))
        body += [markdown(f'{name}.{n}', home, level=level-2) for n in methods(obj, home, apart)]
        body.append(inherited(obj))
        return directive('class', f'{name}{signature(obj, init)}', '\n\n'.join(filter(None, body)), module, level)
    if isinstance(obj, property): return directive('property', name, body[0], module, level)
    kind = 'function' if '.' not in name else 'method'
    if isinstance(raw, (classmethod,staticmethod)): kind = type(raw).__name__
    body.append(table(obj, node, home))
    return directive(kind, f'{name}{signature(obj, node).replace("(self, ", "(")}', '\n\n'.join(filter(None, body)),
                     module, level)

def constant(name, module, level=8):
    value,comment = constants(module)[name]
    short = value if len(value)<80 else ''
    head = directive('data', name, '', module, level).split('\n')
    return '\n'.join([*head[:2], *([f':value: {short}'] if short else []), '', comment, head[-1]])
