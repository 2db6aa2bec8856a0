"""Write the page of measured results: the section of index.ipynb, then every table in benchmarks/results with the
command that makes it"""
import ast, re, shutil
from pathlib import Path

import pandas as pd
from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent
results = root/'benchmarks'/'results'

# How to show each table: its `title`; the columns `by` which the others are averaged over seeds; the columns that are
# `only` shown; the `command`, if the script's docstring names another; and a `text`.
# A table without an entry is shown unchanged, because only its author knows what to average.
TABLES = dict(defaults=dict(title='What the default learns', by=['set','output','way'], only=['metric'],
                            command='python -m benchmarks.defaults',
                            text='Higher is better: accuracy, mean average precision, IoU, and the negative mean '
                                 'absolute error'),
              balance_fashion=dict(title='Product photos: ways to balance', by=['method','lr']),
              depth_cost=dict(title='What depth costs',
                              command='python -m benchmarks.depth --out benchmarks/results/depth_cost.csv'),
              depth_cifar=dict(
                  title='CIFAR-10 by depth', by=['arch','depth'],
                  only=['label_loss','label_accuracy','parameters','multiply_adds','ms'],
                  command='python -m benchmarks.depth_tables cifar',
                  text='Accuracy of the plain CNN and of a ResNet, cut at each depth and trained from scratch'
              ),
              depth_fashion=dict(title='Product photos: depth and split', by=['config'],
                                 command='python -m benchmarks.depth_tables fashion',
                                 only=['gender_accuracy','masterCategory_accuracy','subCategory_accuracy',
                                       'baseColour_accuracy','season_accuracy','mean_accuracy','parameters',
                                       'multiply_adds'],
                                 text='Five outputs of one pretrained `mobilenet_v2`: which stages are kept for each '
                                      'output, and which are shared'),
              depth_fashion_steps=dict(title='Product photos: the time of a step',
                                       command='python -m benchmarks.depth_tables steps',
                                       text='A training step of each configuration above, timed in turns'),
              exports=dict(title='Files of ONNX and torch.export', command='python -m benchmarks.exports',
                           text='The largest difference from the learner, or why there is no file; milliseconds for one item'),
              predict=dict(title='One prediction beside the call of the model', command='python -m benchmarks.predict',
                           text='Processor time in milliseconds, in total and beyond the model or the loop'),
              step=dict(title='A training step beside a plain Learner and a loop', command='python -m benchmarks.step',
                        text='Processor time of a step in milliseconds, in total and beyond the loop and the Learner'),
              growth=dict(title='Loaders by rows and outputs', command='python -m benchmarks.growth',
                          text='Processor time in seconds, to create the loaders and to read their first batch'),
              memory=dict(title='Memory at the peak of training', command='python -m benchmarks.memory',
                          text='Peak memory in megabytes beyond what the process held before the first step, and the '
                               'processor time of the epoch in seconds'),
              fusion=dict(title='Product photos: inputs, fusions and text encoders', by=['way','output'],
                          only=['accuracy','missing'], command='python -m benchmarks.fusion',
                          text='Accuracy on the validation items, and where 30 % of them have no photo and 30 % no '
                               'title; the last rows by `python -m benchmarks.fusion tuning`'),
              captions=dict(title='Photos with captions for three of four', by=['way','output'], only=['metric'],
                            command='python -m benchmarks.captions',
                            text='Mean average precision of tags, negative mean absolute error of counts'),
              captions_check=dict(title='What they lose without an input', by=['output','input','change','score'],
                                  only=['unchanged','changed','difference','low','high','loss','loss_low','loss_high'],
                                  command='python -m benchmarks.captions',
                                  text='`modality_check` of the learner of photo and MiniLM'),
              labels=dict(title='Which cells to label next', by=['set','budget','output','way'], only=['metric'],
                          command='python -m benchmarks.labels',
                          text='The score of each output with so many labels, chosen in three ways; `start` has the '
                               'first ones only'),
              int8=dict(title='What integers cost', command='python -m benchmarks.exports --int8',
                        text='Each metric of the learner and of its network in 8-bit integers'),
              text=dict(title='Texts to numbers, and a step of a text model', command='python -m benchmarks.text',
                        text='Ratios to the first row of each kind; processor time in milliseconds for one text or '
                             'one step'),
              serve=dict(title='Requests to the service', command='python -m benchmarks.serve',
                         text='Memory, errors and times after each thousand requests from 16 clients'),)

def section(index):
    "The text under `## Measured` in index.ipynb, with its headings unchanged"
    inside = False
    found = []
    for c in read_nb(index).cells:
        if c.cell_type!='markdown': continue
        for i,part in enumerate(re.split(r'(?m)^(?=## )', c.source)):
            if part.startswith('## '): inside = part.startswith('## Measured')
            if inside: found.append(re.sub(r'^## Measured.*\n', '', part).strip())
    return '\n\n'.join(filter(None, found))

def made_by(file):
    "The command and the docstring of a table's script: one that mentions it, or whose name is the start of the table's"
    scripts = {p: p.read_text(encoding='utf-8')
               for p in sorted((root/'benchmarks').glob('*.py'), key=lambda p: (-len(p.stem), p.stem))}
    speak = ([p for p,t in scripts.items() if re.search(rf'\b{file.stem}\b', t)]
             or [p for p in scripts if file.stem.startswith(p.stem)])
    for p in speak:
        doc = ' '.join((ast.get_docstring(ast.parse(scripts[p])) or '').split())
        if m := re.search(r'`(python -m benchmarks[^`]*)`', doc): return m[1],doc
    return None,''

def figures(col):
    "A column as text. All its figures have as many decimals as the largest one needs"
    if not pd.api.types.is_numeric_dtype(col): return ['' if pd.isna(v) else str(v).replace('|', r'\|') for v in col]
    top = col.abs().max()
    whole = (col.dropna() % 1 == 0).all()
    n = 0 if whole or top>=1000 else 1 if top>=100 else 2 if top>=10 else 3
    return ['' if pd.isna(v) else f'{v:,.{n}f}' for v in col]

def markdown_table(df):
    num = [pd.api.types.is_numeric_dtype(t) for t in df.dtypes]
    line = lambda r: '| ' + ' | '.join(r) + ' |'
    return '\n'.join([line([str(c).replace('_', ' ') for c in df.columns]), line(['---:' if n else '---' for n in num]),
                      *map(line, zip(*[figures(df[c]) for c in df]))])

def table(file):
    "One CSV as a section of the page"
    how = TABLES.get(file.stem, {})
    df = pd.read_csv(file, comment='#')
    command,doc = made_by(file)
    command = how.get('command') or command
    if command is None:
        raise ValueError(f'{file.name}: no script in benchmarks/ mentions it and has a command in its '
                         'docstring. Give its `command` in docs/measured.py.')
    note = ''
    by = [c for c in how.get('by', []) if c in df]
    if by:
        n = df.groupby(by, sort=False, dropna=False).size()
        only = [c for c in how.get('only', df.columns)
                if c in df and c not in by and c!='seed' and pd.api.types.is_numeric_dtype(df[c])]
        df = df.groupby(by, sort=False, dropna=False)[only].mean().reset_index()
        note = f' Means over {n.min()}{f" to {n.max()}" if n.max()>n.min() else ""} seed{"s" if n.max()>1 else ""}.'
    text = how.get('text') or re.split(r'[:.] `python', doc)[0]
    return f'''## {how.get("title") or file.stem.replace("_", " ").capitalize()}

{text.rstrip(".:")}.{note}

{{.command}}
Made by `{command}`; all runs in [{file.name}](files/{file.name}).

{markdown_table(df)}'''

def page(index, files, links):
    parts = ['# Measured\n\n{.lead}\nEach figure stands next to the command that made it.', links(section(index))]
    for f in sorted(results.glob('*.csv')):
        shutil.copy2(f, files/f.name)
        parts.append(table(f))
    return '\n\n'.join(parts)
