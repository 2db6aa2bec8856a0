"""Build the site from the notebooks: `python docs/build.py` (or `make docs`) writes it to _docs/ and checks its links.

The build runs no notebook: the pages show the stored outputs. It fails if there is a warning or a dead link."""
import argparse, io, shutil, sys, time, warnings
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent
sys.path.insert(0, str(here))

def build(out, jobs):
    "Stage the pages, run Sphinx on them, and return the number of pages and the warnings"
    # torch warns when fastai is imported
    warnings.filterwarnings('ignore', message='`torch.jit', category=FutureWarning)
    import stage
    from sphinx.application import Sphinx
    pages = stage.stage()
    said = io.StringIO()
    html = stage.build.parent/'html'     # MyST-NB creates a folder next to it
    for d in (out, html, stage.build.parent/'doctrees'): shutil.rmtree(d, ignore_errors=True)
    app = Sphinx(stage.build, here, html, stage.build.parent/'doctrees', 'html', freshenv=True, status=None,
                 warning=said, parallel=jobs)
    app.build(force_all=True)
    # this file names the build folder, the only thing that differs between machines
    (html/'.buildinfo').unlink(missing_ok=True)
    shutil.move(html, out)
    import fastai_multi
    objects = {n.rpartition('.')[2] for n in app.env.get_domain('py').objects}
    lost = [f'{n} is a public name, but no page shows it' for n in fastai_multi.__all__ if n not in objects]
    return pages,[l for l in said.getvalue().splitlines() if l.strip()] + lost

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', type=Path, default=root/'_docs')
    p.add_argument('--jobs', type=int, default=2)
    a = p.parse_args()
    t0 = time.perf_counter()
    pages,warnings = build(a.out, a.jobs)
    from check_links import check
    n,checked,dead = check(a.out)
    print('\n'.join([*warnings, *dead]))
    print(f'{a.out}: {pages} pages written from notebooks and Markdown, {n} with sources and indexes; {len(warnings)} '
          f'warnings; {checked} links and pictures checked, {len(dead)} dead; {time.perf_counter()-t0:.0f} s')
    sys.exit(bool(warnings or dead))

if __name__=='__main__': main()
