"""The first hour in JupyterLab, in a real browser: README's ten lines, a table in three lines and a Korean table run
from the first cell to the last without anything red, and Tab completes. The tests need Debian's Chromium, which
`bash .ci/docs` installs, and the extra `notebook`."""
import json, os, re, shutil, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update']
SETTINGS = {'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
            'completer-extension/manager': dict(providerTimeout=20_000),   # allow for a busy machine
            'notebook-extension/tracker': dict(windowingMode='none')}   # render every cell

THREE_LINES = """df = pd.read_csv(path/'items.csv')
dls = MultiDataLoaders.from_df(df, path, image='file', outputs=['kind', 'area'], item_tfms=Resize(32), bs=16)
multi_learner(dls, simple_cnn(depth=2)).fine_tune(1)"""
KOREAN = """kinds = dict(circle='원', square='사각형', star='별', triangle='삼각형')
df = pd.DataFrame(dict(사진=df.file, 설명='왼쪽에 있는 도형', 종류=df.kind.map(kinds), 넓이=df.area))
dls = MultiDataLoaders.from_df(df, path, image='사진', text='설명', outputs=['종류', '넓이'],
                               item_tfms=Resize(32), bs=16)
learn = multi_learner(dls, simple_cnn(depth=2))
learn.fit_one_cycle(1, 4e-3)
learn.show_results(max_n=4)"""
RED = ', '.join(f'[data-mime-type="application/vnd.jupyter.{n}"]' for n in ('stderr', 'error'))
# JupyterLab never runs a cell that was started before the kernel answers
READY = """() => {
    const context = window.jupyterapp?.shell.currentWidget?.sessionContext, kernel = context?.session?.kernel;
    return context?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
# Run all cells except the last two, which are only for Tab
RUN = """number => {
    const commands = window.jupyterapp.commands, notebook = window.jupyterapp.shell.currentWidget.content;
    const run = async () => {
        for (let i = 0; i < number; i++) {
            notebook.activeCellIndex = i;
            await commands.execute('notebook:run-cell');
        }
    };
    run().then(() => window.cellsRun = '', e => window.cellsRun = String(e));
}"""
PLAIN = "plain = Learner(dls, nn.Linear(1, 1), loss_func=noop)"

def ten_lines():
    "README's code up to its first picture, with fewer items and one epoch"
    code = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)[:2]
    for old,new in [('n=1000', 'n=64'), ('(8, 4e-3)', '(1, 4e-3)')]:
        assert old in code[0], f'README no longer has {old}'
        code[0] = code[0].replace(old, new)
    return code

CELLS = [*ten_lines(), 'learn', 'dls', THREE_LINES, KOREAN, 'dls.show_batch(max_n=2)', PLAIN]

@pytest.fixture(scope='module')
def browser():
    "Start Chromium, or skip the test and say why"
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed: pip install fastai_multi[notebook]')
    if CHROMIUM is None: pytest.skip('Chromium is not installed: run `bash .ci/docs` where you may install packages')
    with playwright.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chrome
        chrome.close()

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "The address of the notebook `hour.ipynb` in its own JupyterLab"
    cells = [nbformat.v4.new_code_cell(c) for c in [*CELLS, 'plain.', 'learn.']]
    with running_lab(tmp_path_factory.mktemp('lab'), cells, 'hour.ipynb') as address: yield address

@contextmanager
def running_lab(folder, cells, notebook):
    "Run JupyterLab in a folder with a notebook of these cells, and yield its address"
    kernel = dict(name='python3', display_name='Python 3', language='python')
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), folder/notebook)
    homes = {n: folder/'jupyter'/n for n in ('CONFIG', 'DATA', 'RUNTIME')}
    for name,value in SETTINGS.items():
        file = folder/'settings/@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    env = {**os.environ, **{f'JUPYTER_{n}_DIR': str(h) for n,h in homes.items()},
           'JUPYTERLAB_SETTINGS_DIR': str(folder/'settings'), 'JUPYTERLAB_WORKSPACES_DIR': str(folder/'workspaces'),
           'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    options = ['--no-browser', '--allow-root', '--ServerApp.port=0', '--IdentityProvider.token=',
               '--expose-app-in-browser',
               f'--ServerApp.root_dir={folder}']
    with open(folder/'server.log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], env=env, cwd=folder, stdout=log,
                                  stderr=log)
    try: yield address_of(homes['RUNTIME'], server, folder/'server.log')
    finally:
        server.terminate()
        server.wait(20)

def address_of(runtime, server, log, seconds=90):
    "The address of a new server, as soon as the server has written it"
    end = time.monotonic() + seconds
    while time.monotonic()<end and server.poll() is None:
        for file in runtime.glob('jpserver-*.json'):
            if file.stat().st_size: return json.loads(file.read_text())['url']
        time.sleep(.2)
    pytest.fail(f'JupyterLab did not start: {log.read_text()[-500:]}')

@pytest.fixture(scope='module')
def page(browser, lab):
    "The notebook in the browser after all its cells have run"
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.goto(f'{lab}lab/tree/hour.ipynb')
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate(RUN, len(CELLS))
    page.wait_for_function('window.cellsRun !== undefined', timeout=180_000)
    assert page.evaluate('window.cellsRun')==''
    yield page
    if folder := os.environ.get('SCREENSHOTS'): page.screenshot(path=f'{folder}/jupyterlab.png')
    page.close()

def test_every_cell_ran_and_nothing_is_red(page):
    red = page.locator(RED).all_inner_texts()
    # the message about a font is correct if no font is installed
    assert [r for r in red if 'No installed font has the Hangul' not in r]==[] and len(red)<=1
    prompts = page.eval_on_selector_all('.jp-CodeCell .jp-InputPrompt', 'es => es.map(e => e.innerText)')
    assert prompts[:len(CELLS)]==[f'[{i+1}]:' for i in range(len(CELLS))]

def test_the_pictures_are_there(page):
    "The page shows README's results, the Korean results and batch, and the tables of epochs"
    widths = page.eval_on_selector_all('.jp-RenderedImage img', 'es => es.map(e => e.naturalWidth)')
    assert len(widths)==3 and min(widths)>100
    assert page.locator('.jp-OutputArea-output table').count()>=3
    assert any('종류_accuracy' in t for t in page.locator('.jp-OutputArea-output').all_inner_texts())

def seconds_of_tab(page, cell):
    "The seconds that Tab takes at the end of a cell, and its completions"
    page.locator('.jp-CodeCell').nth(cell).locator('.cm-content').click()
    page.keyboard.press('End')
    start = time.monotonic()
    page.keyboard.press('Tab')
    page.wait_for_selector('.jp-Completer:not(.lm-mod-hidden) .jp-Completer-item', timeout=20_000)
    taken = time.monotonic() - start
    offered = page.locator('.jp-Completer-item').all_inner_texts()
    page.keyboard.press('Escape')
    return taken,offered

def test_tab_answers_as_fast_as_on_a_learner_of_fastai(page):
    "This times the second Tab, when the completer knows fastai's names, as it does after the first cell"
    for _ in range(2):
        theirs,_ = seconds_of_tab(page, len(CELLS))
        ours,offered = seconds_of_tab(page, len(CELLS)+1)
    assert any('add_cb' in o for o in offered)
    assert ours < 3*theirs+.5
