"""Execute notebooks in their own kernel, as Jupyter does, and store the outputs that a reader wants: no progress bars, no
style sheets, no warnings of other libraries, pictures in 256 colours. Then clean the notebooks.

Usage: python .ci/execute.py nbs/90_tutorial.depth.ipynb ...
"""
import base64, io, os, subprocess, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from PIL import Image

os.environ.pop('MPLBACKEND', None)    # a backend set in the shell, such as Agg, would leave the notebooks without pictures
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'docs'))
from outputs import text_of

def smaller(png):
    "The picture in 256 colours, if that halves it: drawn scenes are noisy, and PNG keeps noise as it is"
    res = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB')
    image.quantize(256, dither=Image.Dither.NONE).save(res, 'png', optimize=True)
    few = base64.b64encode(res.getvalue()).decode()
    return few if 2*len(few)<len(png) else png

def for_the_reader(output):
    "`output` without what only moves while the cell runs, or None where nothing is left"
    if output.output_type=='stream': return None if output.name=='stderr' else output
    data = output.get('data', {})
    if 'image/png' in data: data['image/png'] = smaller(text_of(data['image/png']))
    if 'text/html' not in data: return output
    html = text_of(data['text/html'])
    if '<progress' in html or '<style>\n    progress' in html: return None
    if 'fastprogress' in html:
        if '<table' not in html: return None
        table = html[html.index('<table'):html.index('</table>')+len('</table>')]
        output['data'] = nbformat.from_dict({'text/html': table.replace(' class="fastprogress"', ''),
                                             'text/plain': 'The table of epochs'})
    return None if html.strip() in ('', '<div></div>') else output

def kept(cell):
    "The outputs of `cell` that are stored: none where it hides them"
    if cell.source.startswith('#| output: false'): return []
    return joined([o for o in map(for_the_reader, cell.outputs) if o is not None])

def joined(outputs):
    "`outputs` with what was printed line by line in one piece"
    res = []
    for o in outputs:
        if res and o.output_type=='stream'==res[-1].output_type: res[-1].text = text_of(res[-1].text)+text_of(o.text)
        else: res.append(o)
    return res

def execute(path):
    "Run `path` from its folder and write its outputs; if a cell fails, what ran before it is written too"
    nb = nbformat.read(path, 4)
    start = time.perf_counter()
    client = NotebookClient(nb, timeout=900, kernel_name='python3', store_widget_state=False,
                            resources=dict(metadata=dict(path=str(path.parent))))
    try: client.execute()
    finally:
        for c in nb.cells:
            if c.cell_type=='code': c.outputs = kept(c)
        nbformat.write(nb, path)
        subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', path], cwd=root, check=True)
    print(f'{path.name}: {time.perf_counter()-start:.0f} s')

if __name__ == '__main__':
    if not sys.argv[1:]: sys.exit(__doc__)
    for name in sys.argv[1:]: execute(Path(name).resolve())
