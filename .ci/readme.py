"""Write README.md, README.ko.md and their pictures from nbs/index.ipynb with its stored outputs.

Usage: python .ci/readme.py [--check]
With --check, write nothing; the exit status says whether a README is stale.
"""
import base64, re, sys
from copy import deepcopy
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'docs'))
import korean
from outputs import as_on_screen, lift_picture, text_of
pictures = Path('README_files')

def split_directives(source):
    "The `#|` lines at the top of a cell, and the rest"
    lines = source.splitlines()
    n = next((i for i,l in enumerate(lines) if l.strip() and not l.startswith('#|')), len(lines))
    return [l[2:].strip() for l in lines[:n]], '\n'.join(lines[n:]).strip()

def output_block(o, files, alt):
    "One output of a cell as markdown; a picture goes into `files` and is linked, with `alt` as its text"
    data = o.get('data', {})
    if 'image/png' in data:
        return f'![{alt}]({kept(base64.b64decode(text_of(data["image/png"])), files)})'
    if 'text/markdown' in data: return text_of(data['text/markdown']).strip()
    if 'text/html' in data:
        table = re.search(r'<table.*</table>', text_of(data['text/html']), re.S)
        if table: return re.sub(r'\n\s*', '\n', table[0])
        if 'object>' in text_of(data.get('text/plain', '')): return ''
    text = as_on_screen(text_of(o['text'] if o['output_type'] == 'stream' else data.get('text/plain', ''))).strip('\n')
    return f'```text\n{text}\n```' if text and o.get('name') != 'stderr' else ''

def kept(picture, files):
    "Keep the bytes of a picture among `files`; returns its path"
    path = (pictures/f'figure-{len(files)+1}.png').as_posix()
    files[path] = picture
    return path

def links(text):
    "Links as the READMEs need them, which stand one folder higher than the notebooks"
    text = re.sub(r'\]\((\d\d[a-z]?_[\w.]+\.ipynb)\)', r'](nbs/\1)', text)
    return text.replace('](../index.ipynb', '](README.md')

def readme(cells, name):
    "Path -> bytes of everything that the cells of a notebook make: the README `name` and its pictures"
    blocks = []
    files = {}
    lift_picture(cells, lambda picture: kept(picture, files))
    for c in cells:
        directives,body = split_directives(text_of(c['source']))
        if 'hide' in directives or not body: continue
        if c['cell_type'] == 'markdown': blocks.append(links(body))
        elif c['cell_type'] == 'code':
            if 'echo: false' not in directives: blocks.append(f'```python\n{body}\n```')
            alt = next((d.removeprefix('fig-alt: ') for d in directives if d.startswith('fig-alt: ')), '')
            if 'output: false' not in directives:
                blocks += [b for o in c['outputs'] if (b := output_block(o, files, alt))]
    blocks.append('<!-- Made from nbs/index.ipynb by `python .ci/readme.py`: edit the notebook -->')
    return {name: ('\n\n'.join(blocks) + '\n').encode(), **files}

index = korean.cells_of('index.ipynb')
made = readme(deepcopy(index), 'README.md')
made.update(readme(korean.translate('index.ipynb', index), 'README.ko.md'))
there = {p.relative_to(root).as_posix(): p.read_bytes()
         for p in [root/'README.md', root/'README.ko.md', *(root/pictures).glob('*')] if p.exists()}
if '--check' in sys.argv:
    stale = sorted(n for n in {*made, *there} if made.get(n) != there.get(n))
    if stale: sys.exit(f'{", ".join(stale)}: not what nbs/index.ipynb makes. Run `python .ci/readme.py` and commit.')
else:
    for n in there.keys() - made.keys(): (root/n).unlink()
    for n,b in made.items():
        (root/n).parent.mkdir(exist_ok=True)
        (root/n).write_bytes(b)
