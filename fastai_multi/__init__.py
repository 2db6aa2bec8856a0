"Many inputs, many outputs, one fastai `Learner`"

import importlib as _importlib, pkgutil as _pkgutil
from threading import RLock as _RLock
from importlib.metadata import PackageNotFoundError as _NotInstalled, version as _version

try: __version__ = _version(__name__)
except _NotInstalled: __version__ = '0+not.installed'

# The modules are read when a public name is first asked for: `import fastai_multi.core` reads `core` alone,
# and a module that is being read may itself import others of this package.
_lock,_reading = _RLock(),False

def _gather():
    "Import every module and put the names of its `__all__` here, with an `__all__` of all of them"
    names = {}
    for m in sorted(_pkgutil.walk_packages(__path__, f'{__name__}.'), key=lambda m: m.name):
        if m.ispkg or m.name.rpartition('.')[2].startswith('_'): continue
        mod = _importlib.import_module(m.name)
        names.update({n: getattr(mod, n) for n in mod.__all__})
    globals().update(names, __all__=sorted(names))

def __getattr__(name):
    global _reading
    with _lock:
        if not _reading and (name == '__all__' or not name.startswith('_')):
            _reading = True
            try:
                if '__all__' not in globals(): _gather()
            finally: _reading = False
            if name in globals(): return globals()[name]
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

def __dir__(): return sorted({*globals(), *__getattr__('__all__')})
