"""Check that the page, the anchor and the picture of every link on the built site exist:
`python docs/check_links.py [FOLDER]`"""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

class Page(HTMLParser):
    "The links and the anchors of a page"
    def __init__(self, text):
        super().__init__()
        self.links = []
        self.anchors = set()
        self.unlabelled = []
        self.repeated = []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        for k in ('id','name'):
            if k=='id' and a.get(k) in self.anchors: self.repeated.append(a[k])
            if a.get(k) and (k=='id' or tag=='a'): self.anchors.add(a[k])
        for k in ('href','src'):
            if k in a and tag!='base': self.links.append(a[k] or '')
        if tag=='img' and 'alt' not in a: self.unlabelled.append(a.get('src', '')[:80])

def check(site):
    "Return the number of pages, the number of checked links, and a line for each dead link"
    site = Path(site).resolve()
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html')) if '_static' not in p.parts}
    n = 0
    dead = []
    for p,page in pages.items():
        name = p.relative_to(site)
        dead += [f'{name}: the picture {src} has no alternative text' for src in page.unlabelled]
        dead += [f'{name}: the anchor {a!r} is there twice' for a in page.repeated]
        for link in page.links:
            u = urlsplit(link)
            if u.scheme or u.netloc: continue    # on another site, or a picture inside the page
            n += 1
            to = (p.parent/unquote(u.path)).resolve() if u.path else p
            if to.is_dir(): to /= 'index.html'
            if not to.is_relative_to(site) or not to.exists(): dead.append(f'{name}: {link!r} leads to no page')
            elif u.fragment and to in pages and unquote(u.fragment) not in pages[to].anchors:
                dead.append(f'{name}: {link!r} leads to no anchor')
    return len(pages),n,dead

if __name__=='__main__':
    n,checked,dead = check(sys.argv[1] if len(sys.argv)>1 else Path(__file__).resolve().parent.parent/'_docs')
    print(*dead, f'{n} pages, {checked} links and pictures checked, {len(dead)} dead', sep='\n')
    sys.exit(bool(dead))
