"""Correct labels in a real browser, in JupyterLab and on the page without a kernel: edit, undo, reload or restart, and
read the file of edits with `apply_edits`. The tests need Debian's Chromium and the extra `notebook`."""
import os
from importlib.util import find_spec
from pathlib import Path
import nbformat, pandas as pd, pytest
from fastai.vision.all import *
from fastai_multi import *
from test_jupyterlab import CHROMIUM, FLAGS, READY, RED, RUN, running_lab

PHONE = dict(width=390, height=844)
SETUP = """from fastai_multi import *
from fastai.vision.all import *
df = pd.read_csv('items.csv')
dls = MultiDataLoaders.from_df(df, '.', image='file', text='caption', label_delim='|', valid_idx=range(16, 24), bs=8,
                               outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock,
                                            area=RegressionBlock),
                               columns=dict(box=['x1', 'y1', 'x2', 'y2']), item_tfms=Resize(32), num_workers=0)
set_seed(0)
interp = MultiInterpretation.from_learner(multi_learner(dls, simple_cnn(depth=2)))"""
SHOW = "Review(interp, [16, 17, 18], file='edits.csv')"

@pytest.fixture(scope='module')
def browser():
    "Start Chromium, or skip the test and say why"
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if CHROMIUM is None: pytest.skip('Chromium is not installed: run `bash .ci/docs` where you may install packages')
    with playwright.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chrome
        chrome.close()

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    "A drawn data set, in which some texts look like HTML tags"
    path = multi_shapes(tmp_path_factory.mktemp('shapes'), n=24, size=96, seed=0)
    df = pd.read_csv(path/'items.csv')
    df.loc[16, 'caption'] = '<img src=x onerror=alert(1)> </script> & "so"'
    df.to_csv(path/'items.csv', index=False)
    return path

@pytest.fixture(scope='module')
def interp(path):
    "The object of the cell in JupyterLab, for the page"
    space = {}
    here = os.getcwd()
    os.chdir(path)
    try: exec(SETUP, space)
    finally: os.chdir(here)
    space['dls'].train.input_reader.pictures['image'].pref = path
    return space['interp']

def shot(page, name):
    if folder := os.environ.get('SCREENSHOTS'): page.screenshot(path=f'{folder}/{name}.png', full_page=True)

def downloaded(page, folder):
    "The file that the button downloads"
    with page.expect_download() as waiting: page.click('#download')
    assert waiting.value.suggested_filename=='edits.csv'
    waiting.value.save_as(folder/'edits.csv')
    return folder/'edits.csv'

def fits(page):
    "Check that nothing is wider than the window"
    return page.evaluate('document.documentElement.scrollWidth') <= page.viewport_size['width']

@pytest.mark.parametrize('size', [dict(width=1200, height=900), PHONE], ids=['notebook', 'phone'])
def test_the_page_without_a_kernel(browser, interp, path, tmp_path, size):
    page_file = review_page(interp, tmp_path/'review.html', items=[16, 17, 18])
    context = browser.new_context(viewport=size, offline=True, accept_downloads=True)
    page = context.new_page()
    faults,asked = [],[]
    page.on('pageerror', lambda e: faults.append(str(e)))
    page.on('dialog', lambda d: faults.append(d.message))
    page.on('request', lambda r: asked.append(r.url))
    page.goto(page_file.as_uri())
    assert '<img src=x onerror=alert(1)>' in page.inner_text('#figure') and page.locator('#figure img').count()==1
    df = pd.read_csv(path/'items.csv')

    page.select_option('select[aria-label=kind]', label='(a new class …)')      # a new class, tags, a typed box
    page.fill('[aria-label="new class of kind"]', 'hexagon, "regular"')
    page.fill('[aria-label="new tags of tags"]', 'shiny')
    for n,v in dict(x1=5, y1=6, x2=70, y2=71.5).items(): page.fill(f'[aria-label="box {n}"]', str(v))
    shot(page, f'reviewpage-{size["width"]}')
    assert fits(page)
    page.click('#next')
    page.fill('[aria-label="box x2"]', '1')                                      # a mistake is reported, not saved
    page.click('#next')
    assert 'x1 < x2' in page.inner_text('#note') and '2 of 3' in page.inner_text('#where')
    page.fill('[aria-label="area"]', 'large')
    page.fill('[aria-label="box x2"]', '90')
    page.click('#save')
    assert 'takes numbers' in page.inner_text('#note')
    page.fill('[aria-label="area"]', '')
    page.click('text=Draw it')                                                   # a box drawn with the mouse
    frame = page.locator('.picture').bounding_box()
    at = lambda x,y: (frame['x']+frame['width']*x, frame['y']+frame['height']*y)
    page.mouse.move(*at(.25, .5))
    page.mouse.down()
    page.mouse.move(*at(.75, .875))
    page.mouse.up()
    page.click('#save')
    page.click('#bad')
    assert 'marked as bad' in page.inner_text('#note')
    page.click('#next')
    page.select_option('select[aria-label=kind]', label='(no label)')
    page.click('#save')
    page.click('#undo')
    assert 'Undone' in page.inner_text('#note')

    page.reload()
    assert '3 of 3' in page.inner_text('#where') and '(6)' in page.inner_text('#download')
    page.click('#previous')
    page.click('#previous')
    assert page.input_value('[aria-label="new class of kind"]')=='hexagon, "regular"'
    fixed = apply_edits(df, downloaded(page, tmp_path), dict(box=['x1', 'y1', 'x2', 'y2']), '|')
    assert fixed.loc[16, 'kind']=='hexagon, "regular"' and fixed.loc[16, 'tags'].split('|')[-1]=='shiny'
    assert fixed.loc[16, ['x1', 'y1', 'x2', 'y2']].tolist()==[5, 6, 70, 71.5]
    assert 17 not in fixed.index and fixed.loc[18].tolist()==df.loc[18].tolist()
    edits = Edits(tmp_path/'edits.csv').latest()
    drawn = [float(v) for v in edits[df.file[17], 'box'].split()]
    assert all(abs(a-b)<=2 for a,b in zip(drawn, [24, 48, 72, 84])) and edits[df.file[17], 'area']==''
    assert not faults and all(u.startswith(('file:', 'data:', 'blob:')) for u in asked)
    context.close()

def test_the_page_begins_with_a_file_of_edits(browser, interp, path, tmp_path):
    df = pd.read_csv(path/'items.csv')
    Edits(tmp_path/'mine.csv', key='file').add(df.file[16], 'kind', 'star')
    file = review_page(interp, tmp_path/'review.html', items=[16, 17], edits=tmp_path/'mine.csv')
    page = browser.new_page(viewport=PHONE)
    page.goto(file.as_uri())
    assert '(1)' in page.inner_text('#download') and 'label: star' in page.inner_text('#outputs')
    with page.expect_download() as waiting: page.click('#download')
    waiting.value.save_as(tmp_path/'back.csv')
    assert (tmp_path/'back.csv').read_text()==(tmp_path/'mine.csv').read_text()
    page.close()

RESTART = "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"

def run_cells(page):
    "Run the two cells of the notebook and wait for the widget"
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate(RUN, 2)
    page.wait_for_function('window.cellsRun !== undefined', timeout=120_000)
    assert page.evaluate('window.cellsRun')==''
    page.wait_for_selector('.review select', timeout=60_000)

def draw_a_box(page, widget):
    "Draw a box with the mouse, which needs anywidget, and return its corners"
    widget.get_by_role('button', name='Draw it').click()
    page.wait_for_selector('.review-drawing')
    frame = widget.locator('.review-picture').bounding_box()
    page.mouse.move(frame['x']+frame['width']*.25, frame['y']+frame['height']*.5)
    page.mouse.down()
    page.mouse.move(frame['x']+frame['width']*.75, frame['y']+frame['height']*.875)
    page.mouse.up()
    page.wait_for_selector('.review-drawing', state='detached')
    page.wait_for_function("!['5', '7'].includes(document.querySelector('.review input[placeholder=none]').value)")
    return [int(widget.get_by_label(n, exact=True).input_value()) for n in ('x1', 'y1', 'x2', 'y2')]

def test_the_widget_in_jupyterlab(browser, path):
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed: pip install fastai_multi[notebook]')
    pytest.importorskip('ipywidgets', reason='ipywidgets is not installed: pip install fastai_multi[notebook]')
    df = pd.read_csv(path/'items.csv')
    edits = path/'edits.csv'
    cells = [nbformat.v4.new_code_cell(c) for c in (SETUP, SHOW)]
    with running_lab(path, cells, 'review.ipynb') as address:
        page = browser.new_page(viewport=dict(width=1100, height=1000))
        page.goto(f'{address}lab/tree/review.ipynb')
        run_cells(page)
        widget = page.locator('.review')
        assert '<img src=x onerror=alert(1)>' in widget.inner_text()
        old = df.kind[16]
        new = next(k for k in sorted(set(df.kind)) if k!=old)
        widget.locator('select').first.select_option(new)
        for n,v in dict(x1=5, y1=6, x2=70, y2=71.5).items(): widget.get_by_label(n, exact=True).fill(str(v))
        box = [5, 6, 70, 71.5]
        if find_spec('anywidget'): box = draw_a_box(page, widget)
        else: assert 'pip install anywidget' in widget.inner_text()
        if folder := os.environ.get('SCREENSHOTS'): page.screenshot(path=f'{folder}/review-lab.png')
        widget.get_by_role('button', name='Next').click()
        page.wait_for_function("document.querySelector('.review').innerText.includes('2 of 3')")
        assert len(Edits(edits))==2
        widget.get_by_role('button', name='Mark as bad').click()
        page.wait_for_function("document.querySelector('.review').innerText.includes('marked as bad')")
        assert len(Edits(edits))==3
        widget.get_by_role('button', name='Undo').click()
        page.wait_for_function("document.querySelector('.review').innerText.includes('Undone')")
        assert len(Edits(edits))==2

        page.evaluate(RESTART)
        page.evaluate('() => { delete window.cellsRun }')
        run_cells(page)
        page.wait_for_function("document.querySelector('.review').innerText.includes('2 edits')")
        assert page.locator('.review select').first.input_value()==new
        assert page.locator(RED).all_inner_texts()==[]
        page.close()
    fixed = apply_edits(df, edits, dict(box=['x1', 'y1', 'x2', 'y2']), '|')
    assert fixed.kind[16]==new and fixed.loc[16, ['x1', 'y1', 'x2', 'y2']].tolist()==box
    assert len(fixed)==len(df)
