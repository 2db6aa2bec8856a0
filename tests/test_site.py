"""The site without its renderer: the text about a name, the documentation of every public name, the links and the
tables. `make docs` builds the site without warnings and dead links, and `bash .ci/docs` opens it in a browser."""
import json, re, sys
from fnmatch import fnmatch
from pathlib import Path

import pytest, yaml

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'docs'))
import api, check_links, links, measured, names, outputs, stage

# Public names

@pytest.fixture(scope='module')
def report(): return names.report()

@pytest.mark.parametrize('what',
                         ['are in no module that a notebook writes', 'without a one-line summary',
                          'with parameters that no comment explains',
                          'without an example that is run below its definition'])
def test_every_public_name_is_documented(report, what):
    assert not report[what], f'{len(report[what])} public names {what}: {", ".join(report[what])}'

def test_what_counts_as_explained():
    assert names.unexplained('MultiMixUp')==[] and names.has_summary('multi_learner') and names.example('multi_learner')
    names.homes()['did_you_mean'] = 'fastai_multi.core'
    try: assert names.unexplained('did_you_mean')==['name', 'options']    # not a public name, and without comments
    finally: del names.homes()['did_you_mean']

# Pages

@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    "The text of all pages as Sphinx gets them, by name"
    was = stage.build
    stage.build = tmp_path_factory.mktemp('pages')
    try:
        stage.stage()
        def text(f):
            if f.suffix!='.ipynb': return f.read_text(encoding='utf-8')
            cells = json.loads(f.read_text(encoding='utf-8'))['cells']
            return '\n\n'.join(c['source'] if isinstance(c['source'], str) else ''.join(c['source']) for c in cells)
        return {f.stem: text(f) for f in [*stage.build.glob('*.ipynb'), *stage.build.glob('*.md')]}
    finally: stage.build = was

def test_every_notebook_is_a_page(pages):
    nbs = [nb for nb in stage.nbs.glob('*.ipynb')]
    assert {*pages} == {stage.page_of(nb) for nb in nbs} | {'api','tutorials','measured','contributing','changelog'}
    for nb in nbs:
        if nb.name!='index.ipynb': assert stage.page_of(nb) in pages['api' if stage.module_of(nb) else 'tutorials']

def test_every_public_name_is_on_its_modules_page(pages):
    lost = [n for n,m in names.homes().items() if not re.search(rf'\{{py:\w+\}} {n}\b', pages[m.partition('.')[2]])]
    assert not lost

def test_a_name_on_its_page(pages):
    "A page shows signatures as written, parameters as a table, and methods under their class"
    p = pages['data.readers']
    assert '{py:class} InputReader(image=None, text=None, features=None, pref=\'\', suff=\'\', ' in p
    assert "| `image` | `None` | Column of the picture's file" in p
    p = pages['data.loaders']
    assert '{py:classmethod} MultiDataLoaders.from_df(df, path=' in p and '| `valid_pct` |' in p
    assert '{py:data} IGNORE\n:module: fastai_multi.core\n:value: -100' in pages['core']
    assert '| `**kwargs` |' in pages['learner']
    assert not re.search(r'0x[0-9a-f]{6}', ''.join(re.findall(r'\{py:.*', '\n'.join(pages.values()))))

def test_pages_have_no_directives_and_no_exported_code(pages):
    for n,t in pages.items():
        assert not re.search(r'^#\|', t, re.M), n
        assert 'nbdev_export()' not in t or n=='contributing', n

def test_searches_have_their_entries(pages):
    "Each search of the browser test is an index entry on the page that it should find"
    sys.path.insert(0, str(root/'.ci'))
    try: from docs_browser import SEARCHES
    finally: sys.path.pop(0)
    asked = {words: page for words,page in SEARCHES.items() if not page.startswith('ko/')}
    for words,page in asked.items(): assert f'! single: {words}\n' in pages[page.removesuffix('.html')], words
    assert not any('<!-- index:' in t for t in pages.values())

def test_pages_to_look_things_up_stand_apart(pages):
    read,_,look_up = pages['tutorials'].partition('## To look things up')
    assert 'tutorial.quickstart.ipynb' in read
    for name in stage.LOOK_UP: assert f'(tutorial.{name}.ipynb)' in look_up and name not in read

def test_the_cheat_sheet_has_every_argument():
    "The cheat sheet has a line for each argument of `MultiDataLoaders.from_df` and `multi_learner`"
    import inspect
    import fastai_multi
    text = (stage.nbs/'90_tutorial.cheatsheet.ipynb').read_text(encoding='utf-8')
    for f in (fastai_multi.MultiDataLoaders.from_df, fastai_multi.multi_learner):
        lost = [n for n in inspect.signature(f).parameters if n!='kwargs' and f'`{n}`' not in text]
        assert not lost, f'arguments of {f.__name__} without a line in the cheat sheet: {lost}'

def test_outputs_are_tidied():
    assert outputs.as_on_screen('10%\r100%\nx') == '100%\nx'
    styled = '<style>a{}</style><table border="1" class="dataframe"><tr></tr></table>'
    assert stage.clean_html(styled) == '<table><tr></tr></table>'
    assert stage.clean_html('<td>0.123456</td><td>1.25</td>') == '<td>0.1235</td><td>1.25</td>'
    assert stage.clean_html('<th>kind_loss</th><td>a_b</td>') == '<th>kind_<wbr>loss</th><td>a_b</td>'

def test_outputs_are_stored_for_a_reader():
    from importlib.util import module_from_spec, spec_from_file_location
    from nbformat.v4 import new_output
    spec = spec_from_file_location('execute', root/'.ci/execute.py')
    ex = module_from_spec(spec)
    spec.loader.exec_module(ex)
    html = lambda h: new_output('display_data', {'text/html': h, 'text/plain': 'x'})
    gone = [new_output('stream', name='stderr', text='a warning'), html('<div><progress value="1"></progress></div>'),
            html('\n<style>\n    progress { border: none }</style>'), html('<div></div>')]
    assert [ex.for_the_reader(o) for o in gone] == [None]*4
    kept = ex.for_the_reader(html('<div><div></div><table class="fastprogress"><tr><td>1</td></tr></table></div>'))
    assert kept.data['text/html']=='<table><tr><td>1</td></tr></table>'
    a,b = (new_output('stream', name='stdout', text=t) for t in 'ab')
    assert [o.text for o in ex.joined([a, b])]==['ab'] and len(ex.joined([a, html('<p>'), b]))==3
    import base64, io, numpy as np
    from PIL import Image
    def png(a):
        f = io.BytesIO()
        Image.fromarray(a).save(f, 'png')
        return base64.b64encode(f.getvalue()).decode()
    noise = np.random.default_rng(0).integers(0, 255, (64,64,3), dtype=np.uint8)
    assert len(ex.smaller(png(noise)))<len(png(noise))/2 and ex.smaller(png(noise*0))==png(noise*0)

def test_links_between_notebooks_are_links_between_pages(monkeypatch):
    nb = stage.nbs/'42_models.multi.ipynb'
    for url in (nb.name, f'nbs/{nb.name}', f'../nbs/{nb.name}', 'models.multi.html'):
        assert stage.links(f'[a]({url}#b)') == '[a](models.multi.ipynb#b)', url
    got = stage.links('[a](CONTRIBUTING.md) [b](https://x.org/y.ipynb) [c](#d)')
    assert got == '[a](contributing.md) [b](https://x.org/y.ipynb) [c](#d)'
    monkeypatch.setattr(stage, 'git_url', 'https://github.com/a/b')
    assert stage.links('[a](LICENSE)') == '[a](https://github.com/a/b/blob/main/LICENSE)'

def test_links_carry_the_title_of_their_page():
    "The text of a link is the title, its start, or the name of the page's subject"
    other = []
    for nb in stage.nbs.glob('*.ipynb'):
        prose = '\n'.join(c.source for c in stage.read_nb(nb).cells if c.cell_type=='markdown')
        for text,name in re.findall(r'\[([^\]]+)\]\((\d\d[\w.]+\.ipynb)', prose):
            title = stage.title(stage.nbs/name)[0].lower()
            named = text.startswith('`') or name.endswith(f'_{text}.ipynb')
            if not title.startswith(text.lower()) and not named: other.append((nb.name, text, title))
    assert not other

# Names of other libraries

@pytest.mark.parametrize('key', links.BY_HAND, ids=lambda k: k[0])
def test_names_listed_by_hand_are_there(key):
    assert [n for n in links.BY_HAND[key].split() if not links.there(key[0], n)] == []

def test_where_names_are_documented():
    for name,page in dict(Learner='https://docs.fast.ai/learner.html#learner',
                          lr_find='https://docs.fast.ai/callback.schedule.html#learner.lr_find',
                          delegates='https://fastcore.fast.ai/meta.html#delegates').items():
        assert links.elsewhere(name) == page
    module = 'https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html'
    assert links.elsewhere('nn.Module') == links.elsewhere('torch.nn.Module') == module
    assert links.elsewhere('text') is None and links.elsewhere('no_such_name') is None

# Measured

def test_every_measured_table_has_its_command(pages):
    for f in measured.results.glob('*.csv'):
        t = measured.table(f)
        command = re.search(r'Made by `(python -m (benchmarks\.\w+)[^`]*)`', t)
        assert command, f.name
        assert (root/Path(*command[2].split('.'))).with_suffix('.py').exists(), command[1]
        assert t in pages['measured']

def test_figures_have_the_decimals_that_they_need():
    import pandas as pd
    assert measured.figures(pd.Series([1.,2.,None])) == ['1','2','']
    assert measured.figures(pd.Series([.12345,1])) == ['0.123','1.000']
    assert measured.figures(pd.Series([1234.5,2])) == ['1,234','2']

# The check of links

def test_the_check_finds_what_is_dead(tmp_path):
    (tmp_path/'a.html').write_text('<a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.html">3</a>'
                                   '<a href="#top" id="top">4</a><a href="https://x.org">5</a>'
                                   '<img src="p.png" alt=""><img src="data:,x">')
    (tmp_path/'b.html').write_text('<p id="here"></p><p id="here"></p>')
    (tmp_path/'p.png').touch()
    pages,checked,dead = check_links.check(tmp_path)
    assert (pages,checked) == (2,5)
    assert len(dead) == 4
    assert all(any(w in d for d in dead)
               for w in ("'b.html#gone' leads to no anchor", "'c.html' leads to no page", 'no alternative text',
                         "'here' is there twice"))

# Quarto, for those who have it

def test_quartos_files_are_what_nbdev_makes_and_take_in_every_notebook():
    from nbdev.config import get_config
    from nbdev.quarto import _nbdev_yml
    cfg = get_config(root)
    vals = {k: cfg[k] for k in ('title','description','branch','git_url','doc_host','doc_baseurl')}
    assert (root/'nbs/nbdev.yml').read_text() == _nbdev_yml.format(
        doc_path=cfg.doc_path.name, **vals
    ), 'run `nbdev-docs`, or `python -c "from nbdev.quarto import *; refresh_quarto_yml()"`'
    assert cfg.custom_sidebar
    assert yaml.safe_load((root/'nbs/_quarto.yml').read_text())['metadata-files'] == ['nbdev.yml','sidebar.yml']
    contents = yaml.safe_load((root/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']
    patterns = [c if isinstance(c, str) else c['contents'] for c in contents]
    for nb in stage.nbs.glob('*.ipynb'): assert sum(fnmatch(nb.name, p) for p in patterns)==1, nb.name

def test_every_tutorial_stands_on_the_front_page():
    front = (root/'README.md').read_text(encoding='utf-8')
    assert not [nb.name for nb in (root/'nbs').glob('90_tutorial.*.ipynb') if f'(nbs/{nb.name})' not in front]
