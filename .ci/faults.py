"""The faults that `mutate.py` puts into the package: for a node of the syntax tree, each rule gives the nodes that can
replace it.

Code that only writes text or sets the look of figures is left out, and counted: errors and assertions, texts with
values, imports, `__all__`, annotations, the arguments of warnings, `__repr__` and similar methods, the messages of
`refuse_...` functions (their conditions are tried), and the look of figures (functions `plot...` and `draw...`, arguments such as `figsize` and `color`).
"""
import ast, copy, re

OPPOSITE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
            ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
PAIRS = ('min max', 'amin amax', 'argmin argmax', 'any all', 'sum mean', 'nansum nanmean', 'w h', 'width height',
         'x1 y1', 'train valid', 'pred targ', 'zeros ones', 'isnan isfinite', 'before_fit after_fit', 'sigmoid tanh',
         'softmax log_softmax', 'floor ceil')
SIBLINGS = {a: b for pair in PAIRS for a,b in (pair.split(), pair.split()[::-1])}
LOOKS = {'figsize', 'color', 'c', 'cmap', 'alpha', 'lw', 'linewidth', 's', 'fontsize', 'size', 'rotation', 'ha', 'va',
         'stacklevel', 'marker', 'edgecolor', 'facecolor', 'pad', 'wspace', 'hspace', 'zorder', 'dpi', 'labelpad'}

ASKS = {'isinstance', 'issubclass', 'getattr', 'hasattr', 'setattr'}    # turned round they raise at once: too easy

# The rules: each yields the node to replace, the fault's name, and the new node

def opposite(node):
    "Another comparison, sign or connective"
    if isinstance(node, ast.Compare) and len(node.ops)==1 and type(node.ops[0]) in OPPOSITE:
        yield node,'comparison',with_change(node, ops=[OPPOSITE[type(node.ops[0])]()])
    if isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE and not is_text(node.left) and not is_text(node.right):
        yield node,'arithmetic',with_change(node, op=OPPOSITE[type(node.op)]())
    if isinstance(node, ast.BoolOp): yield node,'connective',with_change(node, op=OPPOSITE[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not): yield node,'not dropped',node.operand
    if isinstance(node, ast.AugAssign) and type(node.op) in OPPOSITE:
        yield node,'arithmetic',with_change(node, op=OPPOSITE[type(node.op)]())

def constant(node):
    "Another constant"
    if not isinstance(node, ast.Constant): return
    v = node.value
    if isinstance(v, bool): yield node,'constant',ast.Constant(not v)
    elif isinstance(v, int): yield node,'constant',ast.Constant(v+1)
    elif isinstance(v, float): yield node,'constant',ast.Constant(v*2 if v else 1.)

def sibling(node):
    "A neighbour's name: min and max, width and height"
    if isinstance(node, ast.Attribute) and node.attr in SIBLINGS:
        yield node,'name',with_change(node, attr=SIBLINGS[node.attr])
    if isinstance(node, ast.Name) and node.id in SIBLINGS and isinstance(node.ctx, ast.Load):
        yield node,'name',with_change(node, id=SIBLINGS[node.id])

def position(node):
    "Another index, an open slice, a tuple turned round, arguments in another order"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in (0, -1):
        yield node,'index',with_change(node, slice=ast.Constant(-1-node.slice.value))
    if isinstance(node, ast.Slice) and node.upper is not None: yield node,'slice',with_change(node, upper=None)
    if isinstance(node, ast.Slice) and node.lower is not None: yield node,'slice',with_change(node, lower=None)
    is_pair = isinstance(node, ast.Tuple) and len(node.elts)==2
    if is_pair and all(isinstance(e, (ast.Name,ast.Attribute)) for e in node.elts):
        yield node,'order',with_change(node, elts=node.elts[::-1])
    if not isinstance(node, ast.Call) or getattr(node.func, 'id', '') in ASKS: return
    if len(node.args)==2 and all(isinstance(a, ast.Name) for a in node.args):
        yield node,'order',with_change(node, args=node.args[::-1])

def dropped(node):
    "A keyword argument, an assignment or a call left out; a condition turned round"
    if isinstance(node, ast.Call):
        for i,k in enumerate(node.keywords):
            others = node.keywords[:i]+node.keywords[i+1:]
            if k.arg is None or k.arg in LOOKS: continue
            yield node,f'{k.arg}= dropped',with_change(node, keywords=others)
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    is_stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute,ast.Subscript))
    if is_call or is_stored: yield node,'statement dropped',ast.Pass()
    if isinstance(node, (ast.If,ast.IfExp)): yield node.test,'condition',ast.UnaryOp(ast.Not(), node.test)

RULES = [opposite, constant, sibling, position, dropped]

def is_text(node):
    if isinstance(node, (ast.JoinedStr,ast.List)): return True
    return isinstance(node, ast.Constant) and isinstance(node.value, str)

def with_change(node, **fields):
    "A copy of a node with other fields"
    res = copy.copy(node)
    for k,v in fields.items(): setattr(res, k, v)
    return res

# What is left out

def left_out(node):
    "Why no fault is put into a node, or `None`: 'words' and 'looks'"
    if isinstance(node, (ast.Raise,ast.JoinedStr,ast.Import,ast.ImportFrom,ast.Assert)): return 'words'
    if isinstance(node, ast.FunctionDef):
        if re.match(r'plot|_?draw', node.name): return 'looks'
        if re.match(r'no_|__repr__|__str__|_repr|did_you', node.name): return 'words'
    if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '')=='__all__': return 'words'
    if isinstance(node, ast.Call) and getattr(node.func, 'attr', getattr(node.func, 'id', ''))=='warn': return 'words'
    if isinstance(node, ast.keyword) and node.arg in LOOKS: return 'looks'

def children(node):
    "The parts of a node that do something: no annotation"
    for name,value in ast.iter_fields(node):
        if name in ('annotation', 'returns'): continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST): yield child

def heads(owners, lines):
    "The first lines of the functions that a fault stands in, or else of those of its class; none: the whole module"
    kinds = (ast.FunctionDef,ast.Lambda)
    found = [o for o in owners if isinstance(o, kinds)]
    if not found:
        around = [o for o in owners if isinstance(o, ast.ClassDef)]
        if around: found = [o for o in ast.walk(around[-1]) if isinstance(o, kinds)]
    firsts = [min([o.lineno, *(d.lineno for d in getattr(o, 'decorator_list', []))]) for o in found]
    return sorted({lines[k-1].strip() for k in firsts})

def all_faults(source):
    "Every fault of a module as (node, name, new node, functions), and the number of faults left out, by reason"
    found,out = [],{}
    lines = source.splitlines()
    def visit(node, owners, reason):
        reason = reason or left_out(node)
        refuses = any(isinstance(o, ast.FunctionDef) and re.match('_?refuse', o.name) for o in owners)
        for rule in RULES:
            for old,what,new in rule(node):
                why = reason or ('words' if refuses and what not in ('condition','connective','comparison') else None)
                if why: out[why] = out.get(why, 0)+1
                elif hasattr(old, 'lineno'): found.append((old, what, new, heads([*owners, node], lines)))
        for child in children(node): visit(child, [*owners, node], reason)
    visit(ast.parse(source), [], None)
    return found,out

def faults_of(source):
    "Every fault of a module that is tried"
    return all_faults(source)[0]

def with_fault(source, node, new):
    "The source with `new` in the place of `node`"
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True): starts.append(starts[-1]+len(line))
    a = starts[node.lineno-1]+node.col_offset
    b = starts[node.end_lineno-1]+node.end_col_offset
    text = ast.unparse(ast.fix_missing_locations(new))
    if isinstance(new, ast.expr) and not isinstance(new, (ast.Constant,ast.Name,ast.Slice)): text = f'({text})'
    return (data[:a]+text.encode()+data[b:]).decode()

def described(source, fault):
    "A fault as words that survive changes elsewhere in the file: its name and its line before and after"
    node,what,new,_ = fault
    text = with_fault(source, node, new)
    k = node.lineno-1
    return dict(what=what, was=source.splitlines()[k].strip(), now=text.splitlines()[k].strip()),text
