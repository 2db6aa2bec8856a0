"""Make a virtual environment with a wheel and only what the wheel requires, without extras.

Usage: python .ci/wheel_env.py WHEEL FOLDER

The requirements come from the current environment as hard links (copies on another disk), so nothing is downloaded
again. The metadata of the wheel decide which ones, so a requirement that `settings.ini` lacks is missing here too.
"""
import os, shutil, subprocess, sys, sysconfig, venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.metadata import parse_email
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def closure(requirements):
    "Installed distributions that `requirements` need, directly or not, with the extras that each asks of the next"
    found = {}
    todo = [(Requirement(str(r)), '') for r in requirements]
    seen = set()
    while todo:
        req,extra = todo.pop()
        if req.marker and not req.marker.evaluate({'extra': extra}): continue
        key = (canonicalize_name(req.name), frozenset(req.extras))
        if key in seen: continue
        seen.add(key)
        try: dist = found.setdefault(key[0], distribution(req.name))
        except PackageNotFoundError: sys.exit(f'{req} is required and is not installed in {sys.prefix}')
        todo += [(Requirement(r), e) for r in dist.requires or [] for e in ('', *req.extras)]
    return found

def link(dist, site, to):
    "Put the files of `dist` that lie in `site` at the same places in `to`"
    for f in dist.files:
        src = Path(dist.locate_file(f))
        if not src.resolve().is_relative_to(site) or src.suffix == '.pyc' or not src.is_file(): continue
        dst = to/src.resolve().relative_to(site)
        dst.parent.mkdir(parents=True, exist_ok=True)
        if dst.exists(): continue
        try: os.link(src, dst)
        except OSError: shutil.copy2(src, dst)

wheel = Path(sys.argv[1]).resolve()
env = Path(sys.argv[2]).resolve()
with ZipFile(wheel) as z: meta = z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA')))
dists = closure(parse_email(meta)[0]['requires_dist'])

venv.create(env, clear=True, with_pip=False)
site = Path(sysconfig.get_path('purelib')).resolve()
to = env/site.relative_to(Path(sys.prefix).resolve())
for d in dists.values(): link(d, site, to)
pip = [sys.executable, '-m', 'pip', '--python', str(env/'bin/python')]
subprocess.run([*pip, 'install', '-qq', '--no-index', '--no-deps', str(wheel)], check=True)
subprocess.run([*pip, 'check'], check=True)
print(f'{env.name}: {wheel.name} and the {len(dists)} distributions it requires')
