"""The contents of the random tables in `tests/random_tables.py`: for each kind of input and output, its cells, their
meaning, and the batch, the decoded item and the answer that they must give. Nothing here reads with the package."""
import math, tempfile
from collections import Counter
from pathlib import Path

import numpy as np, pandas as pd, torch
from PIL import Image
from fastcore.basics import ifnone
from fastai.data.block import CategoryBlock, MultiCategoryBlock, RegressionBlock
from fastai.vision.core import PILImageBW
from fastai.vision.data import BBoxBlock, MaskBlock, PointBlock
from fastai_multi import *

class Wrong(AssertionError):
    "The package read or predicted something that differs from the table"

def check(good, note):
    if not good: raise Wrong(note)

def near(a, b, tol=1e-4):
    "Whether numbers are equal within rounding. NaN equals NaN"
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    return a.shape==b.shape and np.allclose(a, b, rtol=tol, atol=tol, equal_nan=True)

# Pictures and masks, drawn once per process

SIZES = [(24,16), (16,24), (20,20), (31,12), (13,29), (40,26), (17,18)]
N_PICTURES = 28
N_CLASSES = 3    # of a mask

def picture_size(i): return SIZES[i%len(SIZES)]

def draw_pictures(folder):
    "Draw pictures of different sizes and shapes, and a mask for each"
    rng = np.random.default_rng(0)
    (folder/'pics').mkdir()
    (folder/'masks').mkdir()
    (folder/'a folder.png').mkdir()
    for i in range(N_PICTURES):
        w,h = picture_size(i)
        coarse = rng.integers(0, 256, (3,4,3), dtype=np.uint8)
        Image.fromarray(coarse).resize((w,h), Image.BILINEAR).save(folder/'pics'/f'{i}.png')
        classes = rng.integers(0, N_CLASSES, (h//4+1,w//4+1), dtype=np.uint8)
        Image.fromarray(classes.repeat(4, 0).repeat(4, 1)[:h,:w]).save(folder/'masks'/f'{i}.png')
    (folder/'broken.png').write_bytes((folder/'pics'/'0.png').read_bytes()[:60])
    (folder/'text.png').write_text('no picture at all')
    (folder/'empty.png').write_bytes(b'')

_folder = None

def pictures_folder():
    "The folder of the pictures, which are drawn at the first call"
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix='tables')
        draw_pictures(Path(_folder.name))
    return Path(_folder.name)

class Window:
    "The part of a picture that `Resize` shows on validation data, computed independently"
    def __init__(self, method, size, shown):
        w,h = size
        sw,sh = shown
        if method=='squish': self.cut = (w,h)
        else:
            pick = min
            if method=='pad': pick = max
            m = pick(w/sw, h/sh)
            self.cut = (int(m*sw), int(m*sh))
        self.corner = (int(.5*(w-self.cut[0])), int(.5*(h-self.cut[1])))
        self.shown = shown
        self.size = size
    def to_unit(self, points):
        "Convert points from pixels of the file to -1..1 of the shown part"
        return (np.asarray(points, dtype=np.float64)-self.corner)/self.cut*2-1
    def to_pixels(self, points):
        "Convert points from -1..1 of the shown part to pixels of the file"
        return (np.asarray(points, dtype=np.float64)+1)/2*self.cut+self.corner
    def look(self, im, resample):
        "The shown part of the picture"
        x,y = self.corner
        return im.crop((x, y, x+self.cut[0], y+self.cut[1])).resize(self.shown, resample)

# Contents: one class for each kind of column. `cells` makes the columns, and `values` holds what they mean

MISSING = [None, float('nan'), pd.NA]
MISSING_TEXTS = [None, float('nan'), pd.NA, '', '  ']

class Content:
    "A kind of input or output: its cells, what they mean, and the batch and the answer that they must give"
    is_input = False
    spatial = False
    def __init__(self, case, name):
        self.case = case
        self.name = name
        self.values = []          # for each row, what its cells mean, or `None`
        self.columns = {}         # the table's columns
        self.make(case.rng)
    @property
    def one(self): return next(iter(self.columns))
    def holes(self, rng, p=.2):
        "Whether the cell of each row is empty. At least one training row has a value"
        if rng.random()<.5: p = 0.
        res = [rng.random()<p for _ in range(self.case.n)]
        for i in self.case.always: res[i] = False
        return res
    def reading(self):
        "The columns in the form that the factory takes"
        cols = list(self.columns)
        if len(cols)==1: return cols[0]
        return cols
    def said(self):
        "The name of this content in messages"
        if self.is_input or not self.case.bare: return repr(self.name)
        return self.kind
    def check_answer(self, answer, pred, row): pass

# Inputs

class PictureInput(Content):
    is_input = True
    kind = 'image'
    def make(self, rng):
        case = self.case
        self.grey = rng.random()<.2
        files = [f'{i}.png' for i in case.pictures]
        holes = self.holes(rng)
        self.values = [None if hole else i for i,hole in zip(case.pictures, holes)]
        case.has_picture = [v is not None for v in self.values]
        style = rng.choice(['folder','path','suffix','absolute'])
        root = pictures_folder()
        case.options |= dict(folder=dict(folder='pics', suffix='pics').get(style))
        if style=='suffix':
            files = [f[:-4] for f in files]
            case.options['suff'] = '.png'
        if style=='path': files = [f'pics/{f}' for f in files]
        if style=='absolute': files = [str(root/'pics'/f) for f in files]
        cells = [f if v is not None else rng.choice(MISSING_TEXTS) for f,v in zip(files, self.values)]
        self.columns = {case.column_name(rng, self.name): cells}
        if self.grey: case.options['img_cls'] = PILImageBW
    def look(self, i):
        im = Image.open(pictures_folder()/'pics'/f'{i}.png').convert('L' if self.grey else 'RGB')
        a = np.asarray(self.case.window(i).look(im, Image.BILINEAR), dtype=np.float64)/255
        return a[None] if self.grey else a.transpose(2, 0, 1)
    def check_batch(self, t, rows):
        for o,r in zip(t, rows):
            i = self.values[r]
            if i is None: check(bool(o.isnan().all()), f'{self.name}: row {r} has no picture, but the batch has pixels')
            elif self.case.method!='pad':
                check(np.abs(o.numpy()-self.look(i)).max()<=1.01/255, f'{self.name}: the pixels of row {r} differ')

WORDS = dict(latin='red green blue tall small round old new house tree'.split(),
             greek='μικρό μεγάλο σπίτι δέντρο'.split(), russian='красный зелёный дом дерево'.split(),
             german='grün straße größe öl'.split(),             chinese=list('红色绿树房子'),
             turkish='ışık ağaç çiçek'.split(), emoji=['🙂','🚗','🌳'], hindi='हिन्दी लाल घर'.split(),
             thai='บ้าน สีแดง'.split(), arabic='بَيْت أحمر'.split(), price='$ $$ 5'.split())

class TextInput(Content):
    is_input = True
    kind = 'text'
    def make(self, rng):
        case = self.case
        self.words = WORDS[rng.choice(list(WORDS))]
        holes = self.holes(rng)
        self.values = []
        for hole in holes:
            words = [rng.choice(self.words) for _ in range(rng.randint(1, 6))]
            if rng.random()<.1: words.append(f'rare{rng.randint(0, 10**9)}')
            self.values.append(None if hole else words)
        self.min_freq = rng.choice([1,2,2,3])
        self.max_len = rng.choice([256,256,2,4])
        if (self.min_freq,self.max_len)!=(2,256):
            case.options['text_block'] = PlainTextBlock(min_freq=self.min_freq, max_len=self.max_len)
        case_words = [[w.upper() if rng.random()<.1 and w.isascii() else w for w in v or ()] for v in self.values]
        if len(self.values)>3 and rng.random()<.2:    # two joined columns
            one,two = zip(*[(v[:len(v)//2], v[len(v)//2:]) for v in case_words])
            cols = dict(first=one, second=two)
            self.columns = {case.column_name(rng, f'{self.name} {k}', True): [self.cell(rng, v) for v in vs]
                            for k,vs in cols.items()}
        else: self.columns = {case.column_name(rng, self.name): [self.cell(rng, v) for v in case_words]}
    def cell(self, rng, words):
        if not words: return rng.choice(MISSING_TEXTS)
        return rng.choice([' ','  ',' \n']).join(words)
    def known(self):
        count = Counter(w for r in self.case.train_rows for w in self.values[r] or ())
        return {w for w,n in count.items() if n>=self.min_freq}
    def check_batch(self, t, rows):
        known = self.known()
        vocab = self.case.part(self.name).vocab
        check(set(vocab)-{'xxpad','xxunk'}==known,
              f'{self.name}: the vocabulary is {list(vocab)}, but the texts have {sorted(known)}')
        for ids,r in zip(t.tolist(), rows):
            expected = [w if w in known else 'xxunk' for w in (self.values[r] or ())[:self.max_len]]
            found = [vocab[i] for i in ids]
            check(found==expected+['xxpad']*(len(found)-len(expected)), f'{self.name}: row {r} reads as {found}')

class FeaturesInput(Content):
    is_input = True
    kind = 'features'
    def make(self, rng):
        case = self.case
        k = rng.randint(1, 3)
        whole = rng.random()<.3
        holes = self.holes(rng)
        self.values = []
        for hole in holes:
            v = [rng.randint(-5, 9) if whole else round(rng.gauss(0, 10), 3) for _ in range(k)]
            self.values.append(None if hole else v)
        if rng.random()<.3:    # one column of vectors
            make = rng.choice([list, tuple, np.array])
            cells = [None if v is None else make(v) for v in self.values]
            self.columns = {case.column_name(rng, self.name): cells}
            return
        for j in range(k):
            cells = [None if v is None else v[j] for v in self.values]
            self.columns[case.column_name(rng, f'{self.name} {j}', True)] = numeric_cells(rng, cells, whole)
    def check_batch(self, t, rows):
        for o,r in zip(t.numpy(), rows):
            expected = self.values[r]
            if expected is None: expected = [math.nan]*len(o)
            check(near(o, np.float32(expected)), f'{self.name}: row {r} reads as {o}, but the table has {expected}')

def numeric_cells(rng, cells, whole):
    "A column of numbers, of any type that can hold them and `None`"
    has_holes = any(v is None for v in cells)
    types = ['float64', 'float32', 'object', 'Float64']
    small = all(v is None or abs(v)<2**31 for v in cells)
    if whole: types += ['Int64', 'Int32' if small else 'Int64']
    if whole and not has_holes: types += ['int64', 'int32' if small else 'int64']
    if whole and not has_holes and 0<=min(cells)<=max(cells)<256: types += ['uint8', 'int16']
    typ = rng.choice(types)
    if typ=='object': return [rng.choice(MISSING) if v is None else v for v in cells]
    return pd.Series(cells, dtype='Float64' if has_holes else None).astype(typ)

# Outputs

CLASSES = [['cup','car','tree'], ['a','b'], ['0','1','10'], ['001','01','1'], [1,2,30], [0,1], [True,False], [1.5,2.5],
           ['ψ','ß','é'], ['红','绿'], ['a b','a|b','a,b'], ['NA','nan','None'], [-1,5], ['x'], [3],
           ['true','True'], ['🙂','🚗'], ['A','a']]

def same_class(found, v):
    "Whether an answer is the class `v` and has its type: a text or a number"
    return found==v and isinstance(found, str)==isinstance(v, str)

class CategoryOutput(Content):
    kind = 'category'
    block = staticmethod(CategoryBlock)
    def make(self, rng):
        case = self.case
        self.classes = rng.choice(CLASSES)
        holes = self.holes(rng)
        self.values = [None if hole else rng.choice(self.classes) for hole in holes]
        for i,v in zip(case.always, self.classes): self.values[i] = v
        seen = {self.values[r] for r in case.train_rows}
        self.values = [v if v in seen else None for v in self.values]
        self.columns = {case.column_name(rng, self.name): self.cells(rng)}
    def cells(self, rng):
        here = [v for v in self.values if v is not None]
        texts = isinstance(here[0], str)
        has_holes = len(here)<len(self.values)
        types = ['object','object','category']
        if texts: types.append('string')
        if isinstance(here[0], bool): types.append('boolean')
        elif isinstance(here[0], int): types += ['Int64', 'float64' if has_holes else 'int64']
        typ = rng.choice(types)
        if typ!='object': return pd.Series(self.values, dtype='object').astype(typ)
        choices = MISSING_TEXTS if texts else MISSING
        return pd.Series([rng.choice(choices) if v is None else v for v in self.values], dtype='object')
    def vocab(self): return list(self.case.part(self.name).vocab)
    def check_batch(self, t, rows):
        vocab = self.vocab()
        seen = {self.values[r] for r in self.case.train_rows}-{None}
        check(len(vocab)==len(seen), f'{self.name}: the classes are {vocab}, but the table has {seen}')
        for o,r in zip(t.tolist(), rows):
            v = self.values[r]
            if v is None: check(o==-100, f'{self.name}: row {r} has no label, but reads as class {o}')
            else: check(o>=0 and same_class(vocab[o], v), f'{self.name}: row {r} is {v!r}, but reads as {o} of {vocab}')
    def check_decoded(self, o, r): self.check_same(o, self.values[r], r)
    def check_same(self, o, v, r):
        if v is None: check(is_nothing(o), f'{self.name}: row {r} has no label, but decodes to {o!r}')
        else: check(same_class(o, v), f'{self.name}: row {r} is {v!r}, but decodes to {o!r}')
    def check_answer(self, answer, pred, row):
        check(near(pred.sum(), 1.), f'{self.name}: probabilities sum to {float(pred.sum())}')
        best = self.vocab()[int(pred.argmax())]
        check(same_class(answer, best), f'{self.name}: the answer is {answer!r}, but {best!r} is most probable')
    def check_metric(self, found, preds, rows):
        here = [(p,r) for p,r in zip(preds, rows) if self.values[r] is not None]
        if not here: return
        share = np.mean([same_class(self.vocab()[int(p.argmax())], self.values[r]) for p,r in here])
        check(near(found[f'{self.name}_accuracy'], share), f'{self.name}: the accuracy is {found}, but {share} by hand')

def is_nothing(o): return o is None or type(o).__name__=='Absent' or isinstance(o, float) and math.isnan(o)

class TagsOutput(Content):
    kind = 'tags'
    block = staticmethod(MultiCategoryBlock)
    def make(self, rng):
        case = self.case
        self.classes = rng.choice([o for o in CLASSES if isinstance(o[0], str) and not any('|' in c for c in o)])
        holes = self.holes(rng)
        self.values = [None if hole else {c for c in self.classes if rng.random()<.5} for hole in holes]
        for i in case.always: self.values[i] = set(self.classes)
        style = rng.choice(['list','delimited','flags'])
        if style=='flags' and len(self.classes)<2: style = 'list'
        if style=='flags': return self.make_flags(rng)
        if style=='delimited': cells = [self.delimited(rng, v) for v in self.values]
        else: cells = [self.listed(rng, v) for v in self.values]
        self.columns = {case.column_name(rng, self.name): cells}
    def delimited(self, rng, v):
        "A cell of tags: the delimiter alone means no tags, and an empty cell means no label"
        self.case.options['label_delim'] = '|'
        if v is None: return rng.choice(MISSING_TEXTS)
        return rng.choice(['|',' | ']).join(sorted(v)) or '|'
    def listed(self, rng, v):
        if v is None: return rng.choice(MISSING)
        return rng.choice([list,tuple])(v)
    def make_flags(self, rng):
        typ = rng.choice([int,float,bool])
        for c in self.classes:
            cells = [None if v is None else typ(c in v) for v in self.values]
            self.columns[c] = cells
    def check_batch(self, t, rows):
        vocab = list(self.case.part(self.name).vocab)
        check(sorted(vocab)==sorted(self.classes),
              f'{self.name}: the tags are {vocab}, but the table has {self.classes}')
        for o,r in zip(t.numpy(), rows):
            v = self.values[r]
            expected = [math.nan if v is None else float(c in v) for c in vocab]
            check(near(o, expected), f'{self.name}: row {r} has {v}, but reads as {o} of {vocab}')
    def check_decoded(self, o, r):
        v = self.values[r]
        if v is None: check(is_nothing(o), f'{self.name}: row {r} has no label, but decodes to {o!r}')
        else: check(not is_nothing(o) and set(o)==v, f'{self.name}: row {r} has {v}, but decodes to {o!r}')
    def check_answer(self, answer, pred, row):
        vocab = list(self.case.part(self.name).vocab)
        expected = {c for c,p in zip(vocab, pred.tolist()) if p>.5}
        check(set(answer)==expected, f'{self.name}: the answer is {answer!r}, but {expected} are probable')
        check(0<=float(pred.min()) and float(pred.max())<=1, f'{self.name}: probabilities {pred}')

SCALES = [(0,1), (100,30), (-3,.01), (1e5,1e4), (0,1e-3), (5,0), (1e6,3e5), (1.7e9,50), (1e12,1e3)]    # mean, spread

class NumberOutput(Content):
    kind = 'number'
    def make(self, rng):
        case = self.case
        self.k = rng.choice([1,1,2,3])
        self.block = RegressionBlock
        if self.k>1 and rng.random()<.5: self.block = RegressionBlock(n_out=self.k)
        centre,spread = rng.choice(SCALES)
        whole = rng.random()<.3 and spread>=1
        holes = self.holes(rng)
        some_holes = self.k>1 and rng.random()<.2
        self.values = []
        for i,hole in enumerate(holes):
            v = [rng.gauss(centre, spread) for _ in range(self.k)]
            if whole: v = [round(o) for o in v]
            if some_holes and i not in case.always and rng.random()<.3: v[0] = None
            self.values.append(None if hole else v)
        for j in range(self.k):
            name = case.column_name(rng, self.name) if self.k==1 else case.column_name(rng, f'{self.name} {j}', True)
            cells = [None if v is None else v[j] for v in self.values]
            self.columns[name] = numeric_cells(rng, cells, whole)
        self.values = [self.as_stored(i) for i in range(case.n)]
    def as_stored(self, i):
        "The numbers of row `i` as the columns hold them, which may round them to their type"
        cells = [list(c)[i] for c in self.columns.values()]
        numbers = [math.nan if pd.isna(v) else float(v) for v in cells]
        if all(map(math.isnan, numbers)): return None
        return numbers
    def statistics(self):
        rows = np.array([self.values[r] for r in self.case.train_rows if self.values[r] is not None])
        mean = np.nanmean(rows, 0)
        std = np.nanstd(rows, 0)
        return mean,np.where(std>1e-12*np.maximum(1, abs(mean)), std, 1.)
    def check_batch(self, t, rows):
        mean,std = self.statistics()
        check(t.shape==((len(rows),) if self.k==1 else (len(rows),self.k)), f'{self.name}: shape {tuple(t.shape)}')
        for o,r in zip(t.reshape(-1,self.k).numpy(), rows):
            expected = [math.nan]*self.k
            if self.values[r] is not None: expected = (np.array(self.values[r])-mean)/std
            rounding = float(1e-6*abs(mean/std).max())+1e-4
            check(near(o, expected, rounding), f'{self.name}: row {r} reads as {o}, but the table has {expected}')
    def check_decoded(self, o, r):
        v = self.values[r]
        if v is None: check(is_nothing(o), f'{self.name}: row {r} has no label, but decodes to {o!r}')
        else: check(self.is_close(o, v), f'{self.name}: row {r} is {v}, but decodes to {o!r}')
    def is_close(self, o, v):
        "Whether numbers are equal within single precision, in units of the standard deviation"
        mean,std = self.statistics()
        return near((np.reshape(o, -1)-mean)/std, (np.array(v)-mean)/std, 1e-4)
    def in_units(self, pred):
        mean,std = self.statistics()
        return pred.reshape(-1).numpy()*std+mean
    def check_answer(self, answer, pred, row):
        check(np.isfinite(np.reshape(answer, -1)).all(), f'{self.name}: the answer is {answer}')
        check(near(np.reshape(answer, -1), self.in_units(pred)),
              f'{self.name}: the answer is {answer} for the prediction {pred}')
    def check_metric(self, found, preds, rows):
        off = [self.in_units(p)-self.values[r] for p,r in zip(preds, rows) if self.values[r] is not None]
        off = np.array(off)
        if not off.size or np.isnan(off).any(): return
        mae = abs(off).mean()
        check(near(found[f'{self.name}_mae'], mae, 1e-3), f'{self.name}: the error is {found}, but {mae} by hand')

class BoxOutput(Content):
    kind = 'box'
    block = staticmethod(BBoxBlock)
    spatial = True
    def make(self, rng):
        case = self.case
        holes = self.holes(rng)
        self.values = []
        whole = rng.random()<.5
        for i,hole in zip(case.pictures, holes):
            w,h = picture_size(i)
            x1,y1 = rng.uniform(0, w-4),rng.uniform(0, h-4)
            box = [x1, y1, rng.uniform(x1+2, w), rng.uniform(y1+2, h)]
            if whole: box = [int(x1), int(y1), int(x1)+3, int(y1)+4]
            self.values.append(None if hole else box)
        if rng.random()<.4:
            make = rng.choice([list, tuple, np.array])
            cells = [rng.choice(MISSING) if v is None else make(v) for v in self.values]
            self.columns = {case.column_name(rng, self.name): cells}
            return
        for j in range(4):
            cells = [None if v is None else v[j] for v in self.values]
            self.columns[case.column_name(rng, f'{self.name} {j}', True)] = numeric_cells(rng, cells, whole)
    def expected(self, r):
        if self.values[r] is None or not self.case.has_picture[r]: return None
        corners = self.case.window(self.case.pictures[r]).to_unit(np.reshape(self.values[r], (2,2)))
        box = np.clip(corners, -1, 1).reshape(-1)
        if box[0]>=box[2]-1e-4 or box[1]>=box[3]-1e-4: return None
        return box
    def check_batch(self, t, rows):
        for o,r in zip(t.numpy(), rows):
            expected = self.expected(r)
            if expected is None: expected = [math.nan]*4
            check(near(o, expected, 1e-3), f'{self.name}: row {r} reads as {o}, but the table has {expected}')
    def check_decoded(self, o, r):
        v = self.expected(r)
        if v is None: return check(is_nothing(o), f'{self.name}: row {r} has no box, but decodes to {o!r}')
        w,h = self.case.shown
        expected = (v+1)/2*[w,h,w,h]
        check(near(np.reshape(o, -1), expected, 1e-2), f'{self.name}: row {r} decodes to {o}, but is {expected}')
    def check_answer(self, answer, pred, row):
        if not self.case.has_picture[row]: return check(is_nothing(answer), f'{self.name}: a box without a picture')
        window = self.case.window(self.case.pictures[row])
        expected = window.to_pixels(pred.numpy().reshape(-1,2))
        expected = np.clip(expected, 0, window.size).reshape(-1)
        check(near(np.reshape(answer, -1), expected, 1e-2),
              f'{self.name}: the answer is {answer}, but {expected} in pixels')

class PointsOutput(BoxOutput):
    kind = 'points'
    block = staticmethod(PointBlock)
    def make(self, rng):
        case = self.case
        self.n = rng.choice([1,1,2,3])
        holes = self.holes(rng)
        self.values = []
        for i,hole in zip(case.pictures, holes):
            w,h = picture_size(i)
            points = [[rng.uniform(1.5, w-1), rng.uniform(1.5, h-1)] for _ in range(self.n)]
            self.values.append(None if hole else points)
        if rng.random()<.5:
            cells = [rng.choice(MISSING) if v is None else v for v in self.values]
            self.columns = {case.column_name(rng, self.name): cells}
            return
        for j in range(2*self.n):
            cells = [None if v is None else v[j//2][j%2] for v in self.values]
            self.columns[case.column_name(rng, f'{self.name} {j}', True)] = numeric_cells(rng, cells, False)
    def expected(self, r):
        if self.values[r] is None or not self.case.has_picture[r]: return None
        res = self.case.window(self.case.pictures[r]).to_unit(self.values[r])
        res[(abs(res)>1.0001).any(-1)] = math.nan
        if np.isnan(res).all(): return None
        return res
    def check_batch(self, t, rows):
        check(t.shape==(len(rows),self.n,2), f'{self.name}: shape {tuple(t.shape)}')
        for o,r in zip(t.numpy(), rows):
            expected = self.expected(r)
            if expected is None: expected = np.full((self.n,2), math.nan)
            check(near(o, expected, 1e-3), f'{self.name}: row {r} reads as {o}, but the table has {expected}')
    def check_decoded(self, o, r):
        v = self.expected(r)
        if v is None: return check(is_nothing(o), f'{self.name}: row {r} has no points, but decodes to {o!r}')
        check(near(o, (v+1)/2*self.case.shown, 1e-2), f'{self.name}: row {r} decodes to {o}')

class MaskOutput(Content):
    kind = 'mask'
    spatial = True
    def make(self, rng):
        case = self.case
        self.block = MaskBlock(codes=[f'code {i}' for i in range(N_CLASSES)])
        holes = self.holes(rng)
        root = pictures_folder()
        self.values = [None if hole else i for i,hole in zip(case.pictures, holes)]
        cells = [rng.choice(MISSING_TEXTS) if v is None else str(root/'masks'/f'{v}.png') for v in self.values]
        self.columns = {case.column_name(rng, self.name): cells}
    def check_batch(self, t, rows):
        for o,r in zip(t.numpy(), rows):
            i = self.values[r]
            if i is None or not self.case.has_picture[r]:
                check((o==-100).all(), f'{self.name}: row {r} has no mask, but reads as classes {set(o.flatten())}')
            elif self.case.method!='pad':
                im = Image.open(pictures_folder()/'masks'/f'{i}.png')
                expected = np.asarray(self.case.window(i).look(im, Image.NEAREST))
                check((o==expected).all(), f'{self.name}: the classes of row {r} differ')
    def check_decoded(self, o, r): pass
    def check_answer(self, answer, pred, row):
        check(bool((torch.as_tensor(answer)==pred.argmax(0)).all()),
              f'{self.name}: the answer does not have the most probable classes')

class ObjectsOutput(Content):
    "Any number of objects, even none. Some lack a class or a number, and some pictures were not annotated"
    kind = 'objects'
    spatial = True
    classes = ['cup','car','tree']
    def make(self, rng):
        case = self.case
        self.has_classes = rng.random()<.8
        self.has_numbers = rng.random()<.6
        members = {}
        if self.has_numbers: members['size'] = RegressionBlock
        if self.has_classes: members['what'] = CategoryBlock
        self.members = list(members)
        self.block = ObjectsBlock(**members)
        holes = self.holes(rng)
        self.values = [None if hole else self.some(rng, i, r) for r,(i,hole) in enumerate(zip(case.pictures, holes))]
        for r in case.always: self.values[r] = [self.one_object(rng, case.pictures[r], c) for c in self.classes]
        forms = ['dicts','dicts','lists','tables']
        form = rng.choice(forms)
        cells = [rng.choice([None, float('nan')]) if v is None else self.cell(form, v) for v in self.values]
        self.columns = {case.column_name(rng, self.name): cells}
    def one_object(self, rng, picture, what, size=None):
        w,h = picture_size(picture)
        x1,y1 = rng.uniform(0, w-5),rng.uniform(0, h-5)
        res = dict(box=[x1, y1, rng.uniform(x1+3, w), rng.uniform(y1+3, h)])
        if self.has_numbers: res['size'] = ifnone(size, round(rng.gauss(50, 10), 2))
        if self.has_classes: res['what'] = what
        return res
    def some(self, rng, picture, row):
        "0 to 4 objects, some with missing values"
        res = []
        for _ in range(rng.choice([0,0,1,2,3,4])):
            o = self.one_object(rng, picture, rng.choice(self.classes))
            for n in ('size','what'):
                if n in o and rng.random()<.3: o[n] = None
            res.append(o)
        return res
    def cell(self, form, v):
        "The objects of a picture as a list of dicts, a dict of lists, or a table"
        if form=='tables' and v: return pd.DataFrame(v)
        if form=='lists' and v: return {n: [o[n] for o in v] for n in v[0]}
        return [dict(o) for o in v]
    def expected(self, r):
        "The visible objects with their boxes in -1..1; `None` if the picture was not annotated"
        if self.values[r] is None or not self.case.has_picture[r]: return None
        window = self.case.window(self.case.pictures[r])
        res = []
        for o in self.values[r]:
            box = np.clip(window.to_unit(np.reshape(o['box'], (2,2))), -1, 1).reshape(-1)
            if box[0]<box[2]-1e-4 and box[1]<box[3]-1e-4: res.append({**o, 'box': box})
        return res
    def statistics(self):
        sizes = [o['size'] for r in self.case.train_rows for o in self.values[r] or () if o['size'] is not None]
        return np.mean(sizes),max(np.std(sizes), 1e-12)
    def check_batch(self, t, rows):
        vals = {n: v.as_subclass(torch.Tensor) for n,v in t.items()}
        for k,r in enumerate(rows):
            one = {n: v[k] for n,v in vals.items()}
            expected = self.expected(r)
            looked = not bool(one['looked_for'].isnan().all())
            check(looked==(expected is not None),
                  f'{self.name}: row {r} reads as annotated: {looked}, but the table has {expected}')
            here = ~one['box'].isnan().any(-1)
            want = expected or []
            check(int(here.sum())==len(want),
                  f'{self.name}: row {r} has {len(want)} objects, but reads as {one["box"]}')
            if not want: continue
            boxes = np.array([o['box'] for o in want])
            check(near(one['box'][here].numpy(), boxes, 1e-3),
                  f'{self.name}: row {r} reads as {one["box"]}, not {boxes}')
            self.check_members({n: v[here] for n,v in one.items() if n!='looked_for'}, want, r)
    def check_members(self, one, want, r):
        if self.has_classes:
            vocab = list(self.case.part(self.name).classes)
            found = [None if i==-100 else vocab[i] for i in one['what'].tolist()]
            check(found==[o['what'] for o in want], f'{self.name}: row {r} reads as {found}, not {want}')
        if self.has_numbers:
            mean,std = self.statistics()
            sizes = [math.nan if o['size'] is None else (o['size']-mean)/std for o in want]
            check(near(one['size'].reshape(-1).numpy(), sizes, 1e-3), f'{self.name}: row {r} reads as {one["size"]}')
    def check_decoded(self, o, r):
        expected = self.expected(r)
        rows = self.case.part(self.name).rows(o)
        if expected is None: return check(is_nothing(rows),
                                          f'{self.name}: row {r} has no objects, but decodes to {rows}')
        check(len(rows)==len(expected), f'{self.name}: row {r} decodes to {rows}, but is {expected}')
        for found,want in zip(rows, expected):
            if self.has_classes and want['what'] is not None:
                check(found['what']==want['what'], f'{self.name}: row {r} decodes to {rows}, but is {expected}')
    def check_answer(self, answer, pred, row):
        "Check a list of dicts, or its columns: boxes are inside the picture, and the most confident object is first"
        if not self.case.has_picture[row]: return check(is_nothing(answer), f'{self.name}: objects without a picture')
        by_column = answer
        if isinstance(answer, list): by_column = {n: [o[n] for o in answer] for n in ('box','score')}
        boxes = np.reshape(by_column['box'], (-1,4))
        w,h = picture_size(self.case.pictures[row])
        check(bool((boxes>=-1e-3).all() and (boxes<=np.array([w,h,w,h])+1e-2).all()),
              f'{self.name}: boxes beyond the picture of {w,h}: {boxes}')
        check(bool((boxes[:,2:]>=boxes[:,:2]).all()), f'{self.name}: swapped corners: {boxes}')
        scores = list(by_column['score'])
        check(scores==sorted(scores, reverse=True), f'{self.name}: scores {scores}')

class WeightColumn(Content):
    kind = 'weight'
    def make(self, rng):
        holes = self.holes(rng)
        self.values = [None if hole else rng.choice([0.5,1.,2.,3.]) for hole in holes]
        self.columns = {self.case.column_name(rng, self.name): numeric_cells(rng, self.values, False)}
    def check_batch(self, t, rows):
        expected = [1. if self.values[r] is None else self.values[r] for r in rows]
        check(near(t.flatten().numpy(), expected),
              f'{self.name}: the batch has {t.flatten().tolist()}, but the table has {expected}')

INPUTS = dict(image=PictureInput, text=TextInput, features=FeaturesInput)
OUTPUTS = [CategoryOutput, TagsOutput, NumberOutput, BoxOutput, PointsOutput, MaskOutput, ObjectsOutput]
ODD_NAMES = ['unit price','count','index','shape','größe','价格','a.b','a-b','x,y','class','price %','name','values','T',
             'items','0','loss','valid','keys','image_','Kind','kind ','losses','lambda','__x','data','y','named']
