"What the stored outputs of a notebook hold, for the site, the README and whoever stores them"

def text_of(x):
    "Notebooks keep a text as it is or as a list of lines"
    return x if isinstance(x, str) else ''.join(x)

def as_on_screen(text):
    "What a terminal shows of `text` in the end: a progress bar that was written over is gone"
    lines = []
    for line in text.split('\n'):
        screen = ''
        for part in line.split('\r'): screen = part + screen[len(part):]
        lines.append(screen.rstrip())
    return '\n'.join(lines)
