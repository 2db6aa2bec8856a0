"Gives setuptools the metadata that `settings.ini` holds"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
cfg = ConfigParser(delimiters='=')
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lib = cfg['lib_name']

extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}
extras['dev'] += [r for name,rs in extras.items() if name != 'dev' for r in rs]

setup(
    name=lib, version=cfg['version'], description=cfg['description'], author=cfg['author'], keywords=cfg['keywords'].split(),
    license_expression=cfg['license'], license_files=['LICENSE'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Framework :: Jupyter', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3 :: Only',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    packages=find_packages(include=[lib, f'{lib}.*']), zip_safe=False,
    entry_points={'nbdev': [f'{lib} = {lib}._modidx:d']},
)
