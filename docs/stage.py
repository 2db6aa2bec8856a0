"""Turn the notebooks into the pages that Sphinx reads: run nbdev's own processing, then add what MyST-NB needs.

nbdev's `proc_nbs` runs a chain of processors over each notebook. One of them runs the exported cells again, to read the
documentation of the new definitions. Here the same chain reads the exported package, which CI keeps equal to the
notebooks. So no cell runs, and staging takes seconds, while `proc_nbs` takes a minute and a half."""
import ast, importlib, re, shutil
from configparser import ConfigParser
from pathlib import Path

from fastcore.nbio import read_nb, write_nb, mk_cell
from nbdev.config import get_config, nbpath2html
from nbdev.process import NBProcessor, Processor
from nbdev.processors import (FilterDefaults, FrontmatterProc, add_fold, add_links, add_show_docs, clean_show_doc,
                              exec_show_docs, insert_warning, _default_exp, _show_docs)

import api, korean, measured
from outputs import as_on_screen, lift_picture, text_of

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
settings = ConfigParser(delimiters='=')
settings.read(root/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
# The address of the repository: `git_url` of settings.ini, or what nbdev reads from pyproject.toml. It is empty while
# the repository has no public address; the site then shows the sources itself.
git_url = (settings.get('git_url') or get_config(root).git_url or '').rstrip('/')
branch = get_config(root).branch
# by the number of the first notebook in the group
GROUPS = {0: 'Core and data', 30: 'Models', 48: 'Training', 68: 'Learner', 80: 'Results'}
PROJECT = {'CONTRIBUTING.md': 'contributing', 'CHANGELOG.md': 'changelog'}

def page_of(nb): return nbpath2html(Path(nb.name)).stem if nb.name!='index.ipynb' else 'index'
def module_of(nb):
    m = _default_exp(read_nb(nb))
    return m and f'fastai_multi.{m}'
def group_of(nb):
    "The group of a notebook, by its number"
    number = int(nb.name[:2])    # a letter may follow, as in fastai's own notebooks: 04a is between 04 and 05
    return GROUPS[max(n for n in GROUPS if n<=number)]
def at_git(path): return f'{git_url}/blob/{branch}/{path}'

# Processors

class own_show_docs(Processor):
    "Replace each `show_doc` cell by the text of `api` about the name, and do the same for constants, unlike nbdev"
    def begin(self):
        self.module = self.nb.module_
        if not self.module: return
        self.apart = {ast.unparse(t.value.args[0]) for c in self.nb.cells for t in _show_docs(c.parsed_() or [])}
        for c in reversed(self.nb.cells):
            names = [t.id for o in c.parsed_() or [] if isinstance(o, ast.Assign) for t in o.targets
                     if isinstance(t, ast.Name)] if 'export' in c.directives_ else []
            for n in reversed([n for n in names if n in api.constants(self.module)]):
                self.nb.cells.insert(self.nb.cells.index(c)+1, mk_cell(api.constant(n, self.module), 'markdown'))
    def cell(self, cell):
        if cell.cell_type!='code' or not (shows := _show_docs(cell.parsed_() or [])): return
        names = [ast.unparse(t.value.args[0]) for t in shows]
        cell.cell_type = 'markdown'
        cell.outputs = []
        cell.source = '\n\n'.join(api.markdown(n, self.module, self.apart) for n in names
                                  if self.module and self.known(n)) or None
    def known(self, name):
        obj = getattr(importlib.import_module(self.module), name.split('.')[0], None)
        # fastai registers dispatched functions such as `show_batch`, so they are not exported
        return obj is not None and type(obj).__name__!='Function'

def clean_html(h):
    """A table without the style sheet that pandas and fastai add, with numbers in four digits. A heading such as
    `kind_accuracy` may break after `_`, so that a table of epochs fits"""
    h = re.sub(r'<(style|script)\b.*?</\1>', '', h, flags=re.S)
    h = re.sub(r'(?<=<td>)-?\d+\.\d{5,}(?=</td>)', lambda m: f'{float(m[0]):.4g}', h)
    h = re.sub(r'(?<=<th>)[^<]+(?=</th>)', lambda m: m[0].replace('_', '_<wbr>'), h)
    return re.sub(r' border="1"| class="dataframe"', '', h)

class tidy_outputs(Processor):
    "Clean stored outputs, translate Quarto's directives for MyST-NB, and give pictures alternative texts"
    def cell(self, cell):
        if cell.cell_type!='code': return
        d = cell.directives_
        outs = []
        tags = []
        for o in cell.get('outputs', []):
            data = o.get('data', {})
            if o.get('name')=='stderr': continue
            if o['output_type']=='stream':
                o['text'] = as_on_screen(text_of(o['text']))
                if not o['text'].strip(): continue
            if 'text/html' in data:
                data['text/html'] = clean_html(text_of(data['text/html']))
                if not re.sub(r'<[^>]*>|\s', '', data['text/html']) and 'image' not in ' '.join(data): continue
            outs.append(o)
        cell.outputs = [] if d.get('output')=='false' else outs
        if d.get('echo')=='false': tags.append('remove-input')
        if d.get('include')=='false':
            cell.source = None
            return
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if not cell.source:
            cell.source = None
            return
        if self.nb.module_ and not cell.outputs and self.only_tests(cell): tags.append('hide-input')
        cell.metadata = dict(tags=tags,
                             mystnb=dict(image=dict(alt=self.alt(cell)), code_prompt_show='Tests',
                                         code_prompt_hide='Tests'))
    def only_tests(self, cell):
        "Whether a cell only tests: the prose has already said what it tests"
        calls = [o.value for o in cell.parsed_() or [] if isinstance(o, ast.Expr) and isinstance(o.value, ast.Call)]
        return calls and len(calls)==len(cell.parsed_()) and all(ast.unparse(c.func).startswith('test_') for c in calls)
    def alt(self, cell):
        if 'fig-alt' in cell.directives_: return cell.directives_['fig-alt'].strip('"\'')
        tree = cell.parsed_()
        last = ast.unparse(tree[-1]) if tree else cell.source.splitlines()[-1]
        return f'Picture made by {last if len(last)<120 else last[:120]+" …"}'.replace('\n', ' ')

class page_links(Processor):
    "Turn links to notebooks and files of the repository into links between pages"
    def cell(self, cell):
        if cell.cell_type!='markdown': return
        cell.source = links(re.sub(r'^#\|.*\n', '', cell.source, flags=re.M))
        if self.nb.korean_: cell.source = korean_links(cell.source)
        module = lambda m: f'| [`{m[1]}`]({m[1]}.ipynb) |' if api.module_file(f'fastai_multi.{m[1]}').exists() else m[0]
        if not self.nb.below_: cell.source = re.sub(r'^\| `([\w.]+)` \|', module, cell.source, flags=re.M)

class search_entries(Processor):
    "Make a search find a page first by the words of `<!-- index: gpu, fp16 -->` in one of its text cells"
    def cell(self, cell):
        if cell.cell_type!='markdown': return
        def entries(m):
            words = [w.strip() for w in m[1].split(',')]
            return ''.join(f'```{{index}} ! single: {w}\n```\n\n' for w in words)
        cell.source = re.sub(r'<!-- index: (.*?) -->\n', entries, cell.source, flags=re.S)

class title_first(Processor):
    "Mark the sentence under a title, and add a module's names or a link to a tutorial's notebook"
    def begin(self):
        cell = next((c for c in self.nb.cells if c.cell_type=='markdown' and re.match(r'# \S', c.source.lstrip())),
                    None)
        if cell is None: raise ValueError(f'{self.nb.path_}: no cell begins with a title, `# …`')
        cell.source = re.sub(r'((?:^> ?.*\n?)+)', lambda m: '{.lead}\n' + re.sub(r'^> ?', '', m[1], flags=re.M),
                             cell.source, count=1, flags=re.M)
        at = self.nb.cells.index(cell)+1
        if self.nb.below_:
            self.nb.cells.insert(at, mk_cell(self.nb.below_, 'markdown'))
            at += 1
        for name in reversed(LEADING.get(self.nb.module_, [])): self.lead(name, at)
    def lead(self, name, at):
        "Move the text about `name` to the top of the page"
        cell = next(c for c in self.nb.cells if re.search(rf'\{{py:\w+\}} {name}\(', c.source or ''))
        self.nb.cells.remove(cell)
        self.nb.cells.insert(at, cell)

class top_picture(Processor):
    "Put a picture in the place of `<!-- picture -->`"
    def begin(self): lift_picture(self.nb.cells, self.write)
    def write(self, picture):
        (build/'files'/'top.png').write_bytes(picture)
        return 'files/top.png'

class Pages(FilterDefaults):
    "nbdev's chain of processors without those for Quarto, and with our own way to read documentation"
    def base_procs(self):
        quarto = FrontmatterProc,insert_warning,clean_show_doc,add_links,add_fold
        return [own_show_docs if p is exec_show_docs else p for p in super().base_procs()
                if p not in quarto] + [top_picture, tidy_outputs, page_links, search_entries, title_first]

def links(md):
    "Rewrite links of the notebooks and the README as links of the staged pages"
    md = md.replace('](README.ko.md)', '](ko/index.ipynb)')
    def to(m):
        url,_,frag = m[2].partition('#')
        frag = frag and f'#{frag}'
        if not url or re.match(r'\w+:', url): return m[0]
        name = Path(url).name
        if name in PROJECT: return f'{m[1]}({PROJECT[name]}.md{frag})'
        if name=='README.md': return f'{m[1]}(index.ipynb{frag})'
        if name.endswith('.ipynb') and (nbs/name).exists(): return f'{m[1]}({page_of(nbs/name)}.ipynb{frag})'
        if name.endswith('.html'): return f'{m[1]}({name[:-5]}.ipynb{frag})'
        for base in (root, nbs):
            f = (base/url).resolve()
            if f.is_dir() and git_url: return f'{m[1]}({at_git(f.relative_to(root).as_posix())})'
            if f.is_file():
                if git_url and f.suffix not in ('.png','.jpg','.svg','.gif'):
                    return f'{m[1]}({at_git(f.relative_to(root).as_posix())}{frag})'
                (build/'files').mkdir(exist_ok=True)
                shutil.copy2(f, build/'files'/f.name)
                return f'{m[1]}(files/{f.name})'
        return m[0]
    return re.sub(r'(\])\(([^)\s]+)\)', to, md)

def korean_links(md):
    "Rewrite the links of a Korean page, which is in its own folder, to Korean pages where they exist"
    ours = [page_of(nbs/n) for n in korean.names()]
    def to(m):
        name,_,frag = m[1].partition('#')
        page = name.removesuffix('.ipynb')
        if re.match(r'\w+:', name): return m[0]
        if page in ours: return m[0]
        return f'](../{m[1]})'
    md = re.sub(r'\]\(([^)\s#]+(?:#[^)\s]*)?)\)', to, md)
    return md.replace('](english:', '](../')

# Pages

build = root/'build'/'docs'/'pages'

def get_it(nb):
    "A link to a notebook"
    if git_url: return f'[`{nb.name}`]({at_git(f"nbs/{nb.name}")})'
    shutil.copy2(nb, build/'files'/nb.name)
    return f'{{download}}`{nb.name} <files/{nb.name}>`'

def public(module): return importlib.import_module(module).__all__

# What you call first comes first on the page of its module
LEADING = {'fastai_multi.learner': ['multi_learner'], 'fastai_multi.data.loaders': ['MultiDataLoaders']}

def name_row(module, n):
    s = (api.constants(module)[n][1] if n in api.constants(module)
         else api.summary(getattr(importlib.import_module(module), n)))
    return f'| {{py:obj}}`~{module}.{n}` | {api.cell(s)} |'

def names_table(module):
    "The public names of a module, each with its sentence: first those that a notebook needs, then the others, folded"
    import fastai_multi
    names = sorted(public(module), key=lambda n: n not in LEADING.get(module, []))
    table = lambda names: '\n'.join(['| name | what it is |', '|---|---|', *[name_row(module, n) for n in names]])
    used = [n for n in names if n in fastai_multi.__all__]
    rest = [n for n in names if n not in used]
    if not used or not rest: return table(names)
    return (f'{table(used)}\n\n<details class="inside"><summary>{len(rest)} more names, for those who extend the '
            f'package</summary>\n\n{table(rest)}\n\n</details>')

def below(nb, module):
    "The text below the title of a notebook"
    if module:
        return (f':::{{py:module}} {module}\n:::\n\n{{.made}}\nModule `{module}`, written by the notebook {get_it(nb)}.'
                f'\n\n:::{{container}} names\n{names_table(module)}\n:::')
    return f'{{.made}}\nThis page is the notebook {get_it(nb)}: every output was made by running it.'

def title(nb):
    "A notebook's title and the sentence below it"
    for c in read_nb(nb).cells:
        if c.cell_type=='markdown' and (m := re.match(r'(?:#\|.*\n)*\s*# (.+)\n*((?:>.*\n?)*)', c.source)):
            return m[1].strip(),re.sub(r'^> ?', '', m[2], flags=re.M).replace('\n', ' ').strip()
    return nb.stem,''

def toctree(entries, caption='', hidden=True, depth=1):
    opts = [f':caption: {caption}']*bool(caption) + [':hidden:']*hidden + [f':maxdepth: {depth}']
    return '\n'.join(['```{toctree}', *opts, '', *entries, '```'])

def picture(nb):
    "The first picture among a notebook's outputs, as a file for its entry in the list"
    import base64
    for c in read_nb(nb).cells:
        for o in c.get('outputs', []):
            if 'image/png' in o.get('data', {}):
                (build/'files').mkdir(exist_ok=True)
                f = build/'files'/f'{page_of(nb)}.png'
                f.write_bytes(base64.b64decode(''.join(o['data']['image/png'])))
                return f'files/{f.name}'

# Tutorials for looking things up, not for reading from start to end
LOOK_UP = 'cheatsheet','plainfastai','questions','glossary','gallery'
def is_look_up(nb): return nb.stem.rpartition('.')[2] in LOOK_UP

def story(nb, number=''):
    "A tutorial's entry in the list: its title, its sentence and its first picture"
    name,sentence = title(nb)
    pic = picture(nb)
    shown = f'\n![A picture of the tutorial {name}]({pic})\n' if pic else ''
    return (f'::::{{container}} story\n:::{{container}}\n**{number}[{name}]({page_of(nb)}.ipynb)**\n\n'
            f'{links(sentence)}\n:::\n{shown}::::')

def tutorials_page(tutorials):
    read = [nb for nb in tutorials if not is_look_up(nb)]
    look_up = [nb for nb in tutorials if is_look_up(nb)]
    parts = ['# Tutorials\n\n{.lead}\nOne tutorial for each task. Each is a notebook that CI runs from top to bottom.']
    parts += [story(nb, f'{i+1}. ') for i,nb in enumerate(read)]
    if not tutorials: parts.append('There are none yet.')
    if look_up: parts += ['## To look things up', *map(story, look_up)]
    parts.append(toctree([page_of(nb) for nb in read], caption='Tutorials'))
    if look_up: parts.append(toctree([page_of(nb) for nb in look_up], caption='To look things up'))
    return '\n\n'.join(parts)

def api_page(modules):
    parts = ['# API\n\n{.lead}\nA page for each module: what it is for, every public name with its parameters, and '
             'examples that were run.']
    for name in dict.fromkeys(map(group_of, modules)):
        group = {nb: m for nb,m in modules.items() if group_of(nb)==name}
        short = {nb: m.partition('.')[2] for nb,m in group.items()}
        rows = [f'| [`{short[nb]}`]({page_of(nb)}.ipynb) | {api.cell(links(title(nb)[1]))} | '
                f'{", ".join(f"{{py:obj}}`~{m}.{n}`" for n in public(m))} |' for nb,m in group.items()]
        parts.append('\n'.join([f'## {name}\n\n:::{{container}} modules\n', '| module | what it is for | names |',
                                '|---|---|---|', *rows, ':::']))
        parts.append(toctree([f'{s} <{page_of(nb)}>' for nb,s in short.items()], caption=name))
    return '\n\n'.join(parts)

def in_order(tutorials, index):
    "The tutorials in the order of index.ipynb, then those that it does not name, by name"
    text = '\n'.join(c.source for c in read_nb(index).cells if c.cell_type=='markdown')
    at = {nb: text.find(nb.name) for nb in tutorials}
    return sorted(tutorials, key=lambda nb: (at[nb]<0, at[nb], nb.name))

def put(n, page, last=''):
    "Write a notebook as the page `page`, with `last` as its last cell"
    Pages()(n)
    for c in n.cells:
        for k in [k for k in c if k.endswith('_')]: del c[k]
    if last: n.cells.append(mk_cell(last, 'markdown'))
    for k in [k for k in n if k.endswith('_')]: del n[k]
    for i,c in enumerate(n.cells): c['id'] = f'cell-{i}'
    n.metadata = dict(kernelspec=dict(name='python3', language='python', display_name='Python 3'))
    write_nb(n, build/f'{page}.ipynb')

def put_korean(nb):
    "Write the Korean page of a notebook"
    n = read_nb(nb)
    n.cells[:] = korean.translate(nb.name, n.cells)
    for c in n.cells:
        if c.cell_type=='markdown': c.source = c.source.replace('](../', '](english:')
    n.korean_ = True
    n.module_ = None
    made = get_it(nb).replace('<files/', '<../files/')
    n.below_ = (f'{{.made}}\n이 문서의 코드와 출력은 노트북 {made}에서 왔습니다. '
                f'모든 출력은 실제로 실행한 결과입니다.\n\n'
                f'{{.made}}\n[English](../{page_of(nb)}.ipynb)')
    front = nb.name=='index.ipynb'
    if front: n.below_ = ''
    others = [page_of(nbs/o) for o in korean.names() if o!='index.ipynb']
    put(n, f'ko/{page_of(nb)}', toctree(others, caption='튜토리얼') if front else '')

def stage():
    "Write all pages anew, and return their number"
    shutil.rmtree(build, ignore_errors=True)
    (build/'files').mkdir(parents=True)
    notebooks = sorted(nbs.glob('*.ipynb'))
    modules = {nb: m for nb in notebooks if (m := module_of(nb))}
    index = nbs/'index.ipynb'
    tutorials = in_order([nb for nb in notebooks if nb not in modules and nb!=index], index)
    top = {'tutorials': 'Tutorials', 'api': 'API', 'measured': 'Measured',
           **{p: p.capitalize() for f,p in PROJECT.items() if (root/f).exists()}, 'ko/index': '한국어'}
    for nb in notebooks:
        n = read_nb(nb)
        n.korean_ = False
        n.module_ = modules.get(nb)
        n.below_ = below(nb, modules.get(nb)) if nb!=index else ''
        # the navigation bar of the site links to Korean
        if nb==index: n.cells[:] = [c for c in n.cells if c.source!='[한국어](README.ko.md)']
        if nb!=index and nb.name in korean.names(): n.below_ += f'\n\n{{.made}}\n[한국어](ko/{page_of(nb)}.ipynb)'
        put(n, page_of(nb), toctree([f'{t} <{p}>' for p,t in top.items()]) if nb==index else '')
    (build/'ko').mkdir()
    for name in korean.names(): put_korean(nbs/name)
    write = lambda name, text: (build/f'{name}.md').write_text(text + '\n', encoding='utf-8')
    write('tutorials', tutorials_page(tutorials))
    write('api', api_page(modules))
    write('measured', measured.page(index, build/'files', links))
    for f,p in PROJECT.items():
        if (root/f).exists(): write(p, links((root/f).read_text(encoding='utf-8')))
    return sum(f.suffix in ('.ipynb', '.md') for d in (build, build/'ko') for f in d.iterdir())
