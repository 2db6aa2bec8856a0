"Read the stored outputs of a notebook, for the site, for the README and for `.ci/execute.py`"
import base64, re

def text_of(x):
    "The text of a notebook field, which is a string or a list of lines"
    return x if isinstance(x, str) else ''.join(x)

def as_on_screen(text):
    "What a terminal finally shows of `text`, without overwritten progress bars"
    lines = []
    for line in text.split('\n'):
        screen = ''
        for part in line.split('\r'): screen = part + screen[len(part):]
        lines.append(screen.rstrip())
    return '\n'.join(lines)

def lift_picture(cells, write):
    """Move the first picture of the outputs from its own cell to the cell that has `<!-- picture -->`

    `write` takes the picture's bytes and returns its address."""
    wanted = next((c for c in cells if c['cell_type']=='markdown' and '<!-- picture -->' in text_of(c['source'])), None)
    if wanted is None: return
    for c in cells:
        for o in c.get('outputs', []):
            if 'image/png' not in o.get('data', {}): continue
            source = text_of(c['source'])
            alt = re.search(r'^#\| fig-alt: (.*)$', source, re.M)
            address = write(base64.b64decode(text_of(o['data']['image/png'])))
            shown = f'![{alt[1]}]({address})' if alt else f'![]({address})'
            wanted['source'] = text_of(wanted['source']).replace('<!-- picture -->', shown)
            c['outputs'] = [p for p in c['outputs'] if p is not o]
            return
