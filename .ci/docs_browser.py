"""Open the built site in a real browser, Debian's Chromium, at desktop and phone width, light and dark

The checks are in `Visit.open` and `checks_of`.

Usage: python .ci/docs_browser.py [--site _docs] [--screenshots FOLDER]"""
import argparse, functools, http.server, shutil, sys, tempfile, threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import sync_playwright

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
DESKTOP = dict(width=1280, height=900)
PHONE = dict(width=390, height=844)

# What is wider than the window: the page (not against `innerWidth`: a phone zooms out until all fits), or a part of it
# that is no box for code, a table, an output or a formula and so should not scroll by itself
WIDE = '''inner => {
  const found = [], page = document.documentElement.scrollWidth,
        own = 'pre, dt, .highlight, .cell_output, .cell_output *, .pst-scrollable-table-container, .formula, code, ' +
              'span, dialog, dialog *';
  if (page > inner) found.push(`${page} px wide in a window of ${inner}`);
  for (const e of document.querySelectorAll('body, body *'))
    if (e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !e.matches(own) &&
        ['auto','scroll','hidden','clip'].includes(getComputedStyle(e).overflowX) &&
        e.getBoundingClientRect().width > 5)
      found.push(`${e.tagName}.${e.className} of ${e.clientWidth} px holds ${e.scrollWidth} px`);
  return found.slice(0, 4);
}'''

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

def served(site):
    "The site on a port of this machine"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server,f'http://127.0.0.1:{server.server_address[1]}/'

class Visit:
    "Pages opened one after the other, and what was wrong with them"
    def __init__(self, context, url):
        self.context = context
        self.url = url
        self.faults = []
        self.opened = 0
    def open(self, name, look=None):
        page = self.context.new_page()
        page.on('console',
                lambda m: self.faults.append(f'{name}: console says {m.text}') if m.type in ('error','warning')
                else None)
        page.on('pageerror', lambda e: self.faults.append(f'{name}: {e}'))
        page.on('request',
                lambda r: None if r.url.startswith((self.url, 'data:', 'blob:'))
                else self.faults.append(f'{name}: asks for {r.url}'))
        page.on('response', lambda r: self.faults.append(f'{name}: {r.status} for {r.url}') if r.status>=400 else None)
        page.goto(self.url+name, wait_until='load')
        page.wait_for_timeout(100)     # what scripts have to say, they say now
        self.opened += 1
        self.faults += [f'{name}: {w}' for w in page.evaluate(WIDE, page.viewport_size['width'])]
        self.faults += [f'{name}: no alternative text for {s}'
                        for s in page.evaluate("[...document.images].filter(i => !i.alt && i.closest('main, "
                                               "article')).map(i => i.src.slice(0, 80))")]
        self.faults += [f'{name}: a picture that does not load, {s}'
                        for s in page.evaluate('[...document.images].filter(i => i.complete && !i.naturalWidth && '
                                               'i.offsetParent).map(i => i.src.slice(0, 80))')]
        if look: look(page)
        page.close()

def finds(name, among):
    "A look at the page of search results: `name` is found, on one of the pages `among`"
    def look(page):
        page.wait_for_selector('#search-results ul.search li a', timeout=20000)
        hrefs = page.eval_on_selector_all('#search-results ul.search li a', 'es => es.map(e => e.getAttribute("href"))')
        if not any(a in h for h in hrefs for a in among): raise AssertionError(f'search for {name!r} finds {hrefs[:5]}')
    return look

# What people search for -> the page that answers it, which must come first
SEARCHES = dict.fromkeys(['install', 'gpu', 'bert', 'hugging face', 'deploy', 'confusion matrix', 'class weights'],
                         'tutorial.questions.html')
SEARCHES['내보내기'] = 'ko/tutorial.quickstart.html'

def first_is(words, wanted):
    "A look at the page of search results: the first of them is the page `wanted`"
    def look(page):
        page.wait_for_selector('#search-results ul.search li a', timeout=20000)
        page.wait_for_timeout(500)    # results come one after the other
        first = page.locator('#search-results ul.search li a').first.get_attribute('href')
        if wanted not in first: raise AssertionError(f'search for {words!r} finds {first} first, not {wanted}')
    return look

def typed(name, wanted):
    "A search as a reader does it: open the box, type, press enter"
    def look(page):
        page.locator('.search-button-field:visible, .search-button:visible').first.click()
        page.locator('input[type=search]:visible').first.fill(name)
        page.keyboard.press('Enter')
        page.wait_for_url('**/search.html?**')
        finds(name, [wanted])(page)
    return look

def switched(page):
    "A Korean page says its language, and leads to the English one and back"
    def language(): return page.evaluate('document.documentElement.lang')
    alternates = page.eval_on_selector_all('link[hreflang]', 'es => es.map(e => e.hreflang)')
    if language()!='ko' or sorted(alternates)!=['en', 'ko']: raise AssertionError(f'{language()}, {alternates}')
    page.locator('main a', has_text='English').first.click()
    page.wait_for_load_state()
    if language()!='en': raise AssertionError('the link to English leads to a page in another language')
    page.locator('main a', has_text='한국어').first.click()
    page.wait_for_load_state()
    if language()!='ko': raise AssertionError('the link to Korean leads to a page in another language')

def epochs_fit(page):
    "The table of epochs of the quick start, with four outputs, fits a desktop's window"
    table = page.locator('.text_html', has=page.locator('th', has_text='train_')).first
    inner,outer = table.evaluate('e => [e.scrollWidth, e.clientWidth]')
    if inner>outer+1: raise AssertionError(f'the table of epochs takes {inner} px and has {outer}')

def checks_of(visit, kind):
    "What a reader does beyond opening pages: search, type a search, change the language, read the table of epochs"
    res = [partial(visit.open, f"search.html?q={quote(words)}", first_is(words, wanted))
           for words,wanted in SEARCHES.items()]
    res.append(partial(visit.open, 'search.html?q=multi_learner', finds('multi_learner', ['learner.html'])))
    res.append(partial(visit.open, 'index.html', typed('multi_learner', 'learner.html')))
    res.append(partial(visit.open, 'ko/tutorial.quickstart.html', switched))
    if kind=='desktop': res.append(partial(visit.open, 'tutorial.quickstart.html', epochs_fit))
    return res

def shot(folder, name, look):
    "A look at a page that saves its picture, the window and the whole page"
    def _look(page):
        folder.mkdir(parents=True, exist_ok=True)
        file = f'{name.removesuffix(".html").replace("/", "-")}-{look}'
        page.screenshot(path=folder/f'{file}.png')
        page.screenshot(path=folder/f'{file}-full.png', full_page=True)
    return _look

def opened_at(kind, size, names, shots, url, chromium, folder):
    "Open all pages at one size in a light window, and the pages in `shots` in a dark one: number of pages, faults"
    faults = []
    opened = 0
    with tempfile.TemporaryDirectory() as profiles, sync_playwright() as play:
        for scheme in ('light','dark'):
            context = play.chromium.launch_persistent_context(
                f'{profiles}/{scheme}', executable_path=chromium, headless=True, args=FLAGS, viewport=size,
                color_scheme=scheme, device_scale_factor=1, is_mobile=kind=='phone', has_touch=kind=='phone'
            )
            visit = Visit(context, url)
            for name in names if scheme=='light' else shots:
                visit.open(name, shot(folder, name, f'{kind}-{scheme}') if folder and name in shots else None)
            for check in checks_of(visit, kind) if scheme=='light' else []:
                try: check()
                except Exception as e: visit.faults.append(f'asked at {size["width"]} px: {e}')
            faults += [f'[{kind}, {scheme}] {f}' for f in visit.faults]
            opened += visit.opened
            context.close()
    return opened,faults

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--site', default=Path(__file__).resolve().parent.parent/'_docs', type=Path)
    p.add_argument('--screenshots', type=Path)
    p.add_argument('--chromium',
                   default=shutil.which('chromium') or shutil.which('chromium-browser')
                   or shutil.which('google-chrome'))
    a = p.parse_args()
    if not a.chromium: sys.exit('There is no chromium here: apt-get install chromium')
    names = [f.relative_to(a.site).as_posix()
             for pages in ('*.html', 'ko/*.html', '_modules/*/learner.html') for f in sorted(a.site.glob(pages))]
    shots = ['index.html', *[n for n in names if n.startswith(('tutorial.', 'ko/'))], 'tutorials.html', 'learner.html',
             'data.loaders.html', 'api.html', 'measured.html']
    shots = list(dict.fromkeys(shots))
    server,url = served(a.site)
    with ProcessPoolExecutor(2, mp_context=get_context('spawn')) as pool:
        visits = [pool.submit(opened_at, kind, size, names, shots, url, a.chromium, a.screenshots)
                  for kind,size in dict(desktop=DESKTOP, phone=PHONE).items()]
        found = [v.result() for v in visits]
    server.shutdown()
    faults = [f for _,fs in found for f in fs]
    opened = sum(n for n,_ in found)
    print('\n'.join(faults))
    print(f'{opened} pages opened in {a.chromium} at {DESKTOP["width"]} and {PHONE["width"]} px; {len(faults)} faults')
    sys.exit(bool(faults))

if __name__=='__main__': main()
