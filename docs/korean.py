"""Make the Korean pages from the English notebooks and the prose of korean.md.

`python docs/korean.py` lists stale and missing translations. With `--seen` it also stores the digests of the English
text."""
import hashlib, json, re, sys
from pathlib import Path

here = Path(__file__).resolve().parent
nbs = here.parent/'nbs'
file = here/'korean.md'
CELL = re.compile(r'^<!-- ([\w-]+)(?: ([0-9a-f]{8}|-))? -->$', re.M)

def text_of(source): return source if isinstance(source, str) else ''.join(source)
def digest(source): return hashlib.sha256(text_of(source).encode()).hexdigest()[:8]

def translations():
    "By notebook and cell id, the digest of the English text and the Korean text"
    parts = re.split(r'^<!-- notebook (\S+) -->$', file.read_text(encoding='utf-8'), flags=re.M)
    found = {}
    for name,body in zip(parts[1::2], parts[2::2]):
        pieces = CELL.split(body)
        found[name] = {cell: (of, text.strip()) for cell,of,text in zip(pieces[1::3], pieces[2::3], pieces[3::3])}
    return found

def names(): return [*translations()]

def with_comments(code, pairs):
    "`code` with translated comments. Each line of `pairs` is a translation: English → Korean"
    for line in pairs.splitlines():
        english,_,korean = line.partition(' → ')
        if code.count(f'# {english}')!=1: raise ValueError(f'korean.md: no comment "# {english}" in:\n{code}')
        code = code.replace(f'# {english}', f'# {korean}')
    return code

def translate(name, cells):
    "Put the Korean text into the `cells` of the notebook `name`, and drop cells whose Korean text is empty"
    said = translations()[name]
    kept = []
    for c in cells:
        _,korean = said.get(c['id'], (None, None))
        if korean=='': continue
        if korean is not None:
            english = text_of(c['source'])
            c['source'] = korean if c['cell_type']=='markdown' else with_comments(english, korean)
        kept.append(c)
    return kept

def cells_of(name): return json.loads((nbs/name).read_text(encoding='utf-8'))['cells']

def is_comment(cell): return re.fullmatch(r'<!--.*-->', text_of(cell['source']).strip())

def faults():
    "A line for each stale or missing translation"
    found = []
    for name,said in translations().items():
        cells = {c['id']: c for c in cells_of(name)}
        found += [f'{name}: there is no cell {i}' for i in said if i not in cells]
        for i,c in cells.items():
            if i not in said:
                if c['cell_type']=='markdown' and not is_comment(c): found.append(f'{name}: cell {i} is not translated')
            elif said[i][0] not in ('-', digest(c['source'])):
                found.append(f'{name}: the English text of cell {i} has changed')
    return found

def mark_seen():
    "Write the digest of the English text after the id of each cell"
    text = file.read_text(encoding='utf-8')
    for name,said in translations().items():
        cells = {c['id']: c for c in cells_of(name)}
        for i,(of,_) in said.items():
            if of!='-' and i in cells:
                text = re.sub(rf'^<!-- {i}(?: [0-9a-f]{{8}})? -->$', f'<!-- {i} {digest(cells[i]["source"])} -->', text,
                              flags=re.M)
    file.write_text(text, encoding='utf-8')

if __name__=='__main__':
    if '--seen' in sys.argv: mark_seen()
    print('\n'.join(faults()) or 'All translations match the current English text')
