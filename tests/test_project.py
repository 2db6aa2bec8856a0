"The package as a whole: the effects of its import, its metadata, and the order of its modules"
import ast, builtins, dis, importlib, json, re, subprocess, sys, types
from configparser import ConfigParser
from functools import lru_cache
from importlib.metadata import metadata
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
lib = root/'fastai_multi'
settings = ConfigParser(delimiters='=')
settings.read(root/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

def in_fresh_process(task, data=None):
    r = subprocess.run([sys.executable, root/'tests/state_of_fastai.py', task], input=json.dumps(data or []),
                       capture_output=True, text=True, cwd=root)
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout.splitlines()[-1])

@lru_cache
def cost(): return in_fresh_process('cost')

# The effects of the import

def test_star_import_is_quick():
    "The import adds at most a sixth to that of `fastai.vision.all`, in the best of a few runs"
    def share(found): return found['seconds']/found['base_seconds']
    shares = [share(cost())]
    while min(shares) > 1/6 and len(shares) < 5: shares.append(share(in_fresh_process('cost')))
    assert min(shares) <= 1/6, shares

def test_star_import_shows_the_public_names_and_no_module():
    assert cost()['names'] == cost()['all'] and not cost()['are_modules']
    assert {'multi_shapes', 'Outputs'} <= {*cost()['all']}

def test_star_import_hides_no_name_of_fastai():
    "You can import it before or after fastai"
    assert cost()['replaced'] == []

def test_importing_after_fastai_changes_nothing_in_it():
    r = in_fresh_process('after', cost()['modules'])
    assert r['changed'] == []
    for what in ('fastai.learner.Learner.fit', 'setting warnings', 'setting random', 'setting env'):
        assert what in r['noticed']
    assert any('_show_anything' in n for n in r['noticed'])

def test_importing_before_fastai_changes_nothing_in_it():
    with_us = in_fresh_process('before')
    without = in_fresh_process('without', cost()['modules'])
    assert len(without['state']) > 300
    assert with_us['state'].keys() == without['state'].keys()
    for name,was in without['state'].items(): assert with_us['state'][name] == was, name
    own_to_each_process = {'random', 'numpy', 'torch'}   # random states without a seed
    for k in without['settings'].keys() - own_to_each_process:
        assert with_us['settings'][k] == without['settings'][k], k

def test_a_low_module_brings_no_other():
    assert in_fresh_process('alone') == ['fastai_multi', 'fastai_multi.core']

def test_a_name_that_is_not_there():
    import fastai_multi
    with pytest.raises(AttributeError, match="no attribute 'multi_lerner'"): fastai_multi.multi_lerner
    assert not hasattr(fastai_multi, '__wrapped__')
    assert {'multi_shapes', 'core', '__version__'} <= {*dir(fastai_multi)}

# Metadata

def test_metadata_is_that_of_settings_ini():
    meta = metadata('fastai_multi')
    assert meta['Version'] == settings['version'] == cost()['version']
    assert meta['Requires-Python'] == f">={settings['min_python']}"
    assert meta['License-Expression'] == settings['license']
    plain = {r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r}
    assert {re.split('[<>=]', r)[0] for r in plain} == {re.split('[<>=]', r)[0]
                                                        for r in settings['requirements'].split()}
    assert {*meta.get_all('Provides-Extra')} >= {'hf', 'timm', 'balance', 'dev'}

# Notebooks and modules

def cells(nb, kind):
    return [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]

def exported_to(nb):
    "The module that a notebook exports to, or nothing"
    m = re.search(r'^#\|\s*default_exp (\S+)', '\n'.join(cells(nb, 'code')), re.M)
    return m and m[1]

notebooks = sorted((root/'nbs').glob('[0-9]*.ipynb'))
modules = {m: nb for nb in notebooks if (m := exported_to(nb))}   # in the order of notebook numbers
path_of = lambda m: (lib/Path(*m.split('.'))).with_suffix('.py')

def test_every_module_has_its_notebook_and_number():
    there = {'.'.join(p.relative_to(lib).with_suffix('').parts) for p in lib.rglob('*.py')
             if not p.name.startswith('_')}
    assert there == {*modules}
    for m,nb in modules.items(): assert re.fullmatch(rf'\d\d[a-z]?_{re.escape(m)}', nb.stem), nb.name
    numbers = [nb.name.partition('_')[0] for nb in notebooks if exported_to(nb)]
    assert len(numbers) == len({*numbers})

def test_readme_says_what_every_module_is_for():
    rows = re.findall(r'^\| `([\w.]+)` \| \S', (root/'README.md').read_text(encoding='utf-8'), re.M)
    assert rows == [*modules]

def code_objects(code):
    "A code object and all code objects in it"
    yield code
    for o in code.co_consts:
        if isinstance(o, types.CodeType): yield from code_objects(o)

@pytest.mark.parametrize('m', modules)
def test_every_name_is_known(m):
    "After star imports, a moved name fails only when you call the function that uses it"
    known = vars(importlib.import_module(f'fastai_multi.{m}')).keys() | vars(builtins).keys()
    code = compile(path_of(m).read_text(encoding='utf-8'), m, 'exec')
    read = {i.argval for c in code_objects(code) for i in dis.get_instructions(c) if i.opname=='LOAD_GLOBAL'}
    assert not read - known

@pytest.mark.parametrize('m', modules)
def test_module_introduces_itself(m):
    "The first code cell has `default_exp`, and the first prose has a title and the sentence of the module's docstring"
    code = cells(modules[m], 'code')
    prose = cells(modules[m], 'markdown')
    assert re.match(r'#\|\s*default_exp ', code[0])
    assert re.search(r'^# \S.*\n+> \S', prose[0], re.M)
    assert len(ast.get_docstring(ast.parse(path_of(m).read_text(encoding='utf-8'))).split()) > 3

@pytest.mark.parametrize('m', modules)
def test_no_cell_is_kept_from_running(m):
    flags = [l for s in cells(modules[m], 'code') for l in s.splitlines()
             if re.match(r'#\|\s*(eval:\s*false|notest|slow|cuda)', l)]
    assert not flags and 'skip_exec' not in ''.join(cells(modules[m], 'raw'))

@pytest.mark.parametrize('nb', notebooks, ids=lambda nb: nb.stem)
def test_stored_outputs_are_for_a_reader(nb):
    "`.ci/execute.py` keeps no progress bar, style sheet or local path, and every picture has an alternative text"
    assert nb.stat().st_size < 300*1024
    for c in json.loads(nb.read_text(encoding='utf-8'))['cells']:
        if c['cell_type']!='code': continue
        source = ''.join(c['source'])
        out = json.dumps([o for o in c['outputs']])
        assert 'image/png' not in out or '#| fig-alt: ' in source, source
        texts = re.sub(r'"image/png": (\[[^]]*\]|"[^"]*")', '', out)
        for bad in ('<progress', 'progress-bar', 'progress::', '"stderr"', '/home/', '/root/', '/tmp/', '/Users/'):
            assert bad not in texts, (bad, source)
        assert not re.search(r'"\[\d+, [\d.]+, ', texts), source

def imported(m):
    "The modules of this package that the module `m` imports"
    found = set()
    for n in ast.walk(ast.parse(path_of(m).read_text(encoding='utf-8'))):
        if isinstance(n, ast.ImportFrom):
            names = (n.module or '').split('.')
            base = m.split('.')[:-n.level] if n.level else names[1:] if names[0] == lib.name else None
            if base is None: continue
            target = '.'.join([*base, *(n.module.split('.') if n.level and n.module else [])])
            found |= {target} if target in modules else {f'{target}.{a.name}'.strip('.') for a in n.names}
        elif isinstance(n, ast.Import):
            found |= {a.name.partition('.')[2] for a in n.names if a.name.split('.')[0] == lib.name}
    return found

@pytest.mark.parametrize('m', modules)
def test_imports_follow_the_order(m):
    order = [*modules]
    above = {*order[:order.index(m)]}
    assert imported(m) <= above
    domain = m.split('.')[0]
    apart = dict(data={'models'}, models={'data'}, losses={'data', 'models'}, metrics={'data', 'models'},
                 rowmetrics={'data', 'models'}, columns={'data', 'models'}, callback={'data', 'models'})
    assert not {i for i in imported(m) if i.split('.')[0] in apart.get(domain, ())}

def test_a_public_name_has_one_home():
    homes = {}
    for m in modules:
        for n in ast.walk(ast.parse(path_of(m).read_text(encoding='utf-8'))):
            if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__':
                for name in ast.literal_eval(n.value): homes.setdefault(name, []).append(m)
    assert {n: ms for n,ms in homes.items() if len(ms)>1} == {}
