"""Random tables for property tests. Each table is built, read, decoded and compared with an independent reading. Some
also train a learner, and some contain one mistake, which the error must name.
Usage: python -m tests.random_tables 5000 [first seed]"""
import linecache, math, random, sys, time, traceback, warnings
from collections import Counter

import numpy as np, pandas as pd, torch
from fastcore.foundation import L
from fastai.vision.augment import Resize
from fastai_multi import *
from tests.contents import (INPUTS, N_PICTURES, ODD_NAMES, OUTPUTS, NumberOutput, ObjectsOutput, TagsOutput, WeightColumn, Window,
                            Wrong, check, near, picture_size, pictures_folder)
from tests.mistakes import LEARNER_MISTAKES, TABLE_MISTAKES

# Tables

class Case:
    "A random table, what it means, and the arguments of its loaders"
    def __init__(self, seed):
        rng = random.Random(seed)
        self.rng = rng
        self.seed = seed
        self.n = rng.choice([2,3,5,8,12,12,16,24])
        self.pictures = [rng.randrange(N_PICTURES) for _ in range(self.n)]
        self.has_picture = [False]*self.n
        self.names_used = set()
        self.options = {}
        self.changed = {}     # arguments that a mistake changes
        self.learn = None
        self.make_split(rng)
        self.make_geometry(rng)
        self.make_contents(rng)
        self.make_table(rng)
    def make_split(self, rng):
        n_valid = rng.randint(1, max(1, self.n//3))
        rows = list(range(self.n))
        rng.shuffle(rows)
        self.valid_rows = sorted(rows[:n_valid])
        self.train_rows = sorted(rows[n_valid:])
        self.always = self.train_rows[:3]    # rows with every class, so that training sees all
        self.split = rng.choice(['bool','number','value','values'])
        flags = [r in self.valid_rows for r in range(self.n)]
        forms = dict(bool=flags, number=[int(o) for o in flags], value=['test' if o else 'train' for o in flags],
                     values=[rng.choice('ab') if o else 'c' for o in flags])
        self.split_column = self.column_name(rng, 'is_valid')
        self.split_cells = forms[self.split]
        self.options['valid_col'] = self.split_column
        if self.split=='value': self.options['valid_value'] = 'test'
        if self.split=='values': self.options['valid_value'] = sorted({o for o in self.split_cells if o!='c'})
    def make_geometry(self, rng):
        self.method = rng.choice(['squish','squish','crop','pad'])
        self.shown = rng.choice([(12,12), (12,12), (16,12), (10,14)])
    def make_contents(self, rng):
        names = rng.sample(list(INPUTS), rng.choice([1,1,2,3]))
        self.inputs = {n: INPUTS[n](self, n) for n in INPUTS if n in names}
        kinds = [k for k in OUTPUTS if 'image' in names or not k.spatial]
        kinds = [rng.choice(kinds) for _ in range(rng.choice([1,1,2,3,4]))]
        self.bare = len(kinds)==1 and rng.random()<.3 and kinds[0] is not ObjectsOutput    # a group needs a name
        self.outputs = {}
        for k in kinds:
            if k is TagsOutput and any(isinstance(o, TagsOutput) for o in self.outputs.values()): k = NumberOutput
            name = self.output_name(rng, k)
            self.outputs[name] = k(self, name)
        self.weight = None
        if not self.bare and rng.random()<.15: self.weight = WeightColumn(self, 'weight of rows')
    def output_name(self, rng, k):
        free = [o for o in (k.kind, f'{k.kind}2', f'{k.kind}3', f'{k.kind}4') if o not in self.names_used]
        name = free[0]
        if rng.random()<.3:
            odd = [o for o in ODD_NAMES if o not in self.names_used]
            name = rng.choice(odd)
        self.names_used.add(name)
        return name
    def column_name(self, rng, name, own=False):
        "The name of a column, which may differ from the output's"
        if own or rng.random()<.3 or name in INPUTS: name = rng.choice(['{} col','the {}','{}_']).format(name)
        while name in self.names_used and name not in getattr(self, 'outputs', ()): name = f'{name}_'
        return name
    def contents(self): return [*self.inputs.values(), *self.outputs.values(), *([self.weight] if self.weight else [])]
    def make_table(self, rng):
        index = rng.choice([range(self.n), range(100, 100+self.n), [7]*self.n, [f'row {i}' for i in range(self.n)],
                            pd.date_range('2020-01-01', periods=self.n),
                            pd.MultiIndex.from_tuples([(i//2,i%2) for i in range(self.n)]),
                            [i//2 for i in range(self.n)]])
        columns = {self.split_column: self.split_cells}
        for c in self.contents(): columns |= c.columns
        data = {k: v.array if isinstance(v, pd.Series) else pd.Series(list(v), dtype=object if mixed(v) else None).array
                for k,v in columns.items()}
        self.df = pd.DataFrame(data)
        order = list(self.df.columns)
        rng.shuffle(order)
        self.df = self.df[order]
        self.df.index = pd.Index(index) if not isinstance(index, range) else index
    def window(self, i): return Window(self.method, picture_size(i), self.shown)
    def arguments(self):
        "The arguments of `from_df` except the table"
        res = {n: c.reading() for n,c in self.inputs.items()}
        bs = min(4, len(self.train_rows))
        res |= dict(path=pictures_folder(), bs=bs, num_workers=0, device='cpu', **self.options)
        if 'image' in self.inputs:
            w,h = self.shown
            res['item_tfms'] = Resize((h,w), self.method)
        if self.bare:
            one, = self.outputs.values()
            return res | dict(outputs=one.block, columns=one.reading())
        columns = {n: c.reading() for n,c in self.outputs.items() if c.reading()!=n}
        res['outputs'] = {n: c.block for n,c in self.outputs.items()}
        if columns: res['columns'] = columns
        if self.weight is not None: res['weight'] = self.weight.reading()
        return res
    def describe(self):
        kinds = ', '.join(f'{c.name!r}:{c.kind}' for c in self.contents())
        return f'seed {self.seed}: {self.n} rows, {kinds}, {self.method} {self.shown}'
    # Reading
    def build(self):
        self.dls = MultiDataLoaders.from_df(self.df, **{**self.arguments(), **self.changed})
        self.description = describe(self.dls)
        return self.dls
    def part(self, name):
        parts = {**self.description.inputs, **self.description.outputs}
        if name in parts: return parts[name]
        if name in self.inputs: return next(iter(self.description.inputs.values()))
        return next(iter(self.description.outputs.values()))
    def values_by_name(self, b):
        "The values of a batch or an item by name"
        xs,ys = b[0],b[1]
        res = {}
        if len(self.inputs)==1: res[next(iter(self.inputs))] = xs
        else: res |= dict(zip(self.inputs, xs))
        if self.bare: res[next(iter(self.outputs))] = ys
        else: res |= dict(ys.items())
        return res
    def check_loader(self, dl, rows):
        "Compare every batch of a loader without shuffling with the table"
        done = 0
        for b in dl:
            vals = self.values_by_name(b)
            m = len(next(iter(vals.values())))
            here = rows[done:done+m]
            done += m
            for c in self.contents():
                name = c.name if c is not self.weight else 'item_weight'
                c.check_batch(plain(vals[name]), here)
            for item,r in zip(dl.decode_batch(b, max_n=m), here): self.check_item(item, r)
        check(done==len(rows), f'the loader has {done} items for {len(rows)} rows')
    def check_item(self, item, r):
        decoded = self.values_by_name(item)
        for c in self.outputs.values(): c.check_decoded(decoded[c.name], r)
    def check_reading(self):
        self.check_loader(self.dls.valid, self.valid_rows)
        if self.method=='squish' or 'image' not in self.inputs:
            self.check_loader(self.dls.train.new(shuffle=False, drop_last=False), self.train_rows)
        self.check_loader(self.dls.test_dl(self.df, with_labels=True), list(range(self.n)))
    # Training
    def learner(self, **kwargs):
        "A small learner"
        arch = None
        if 'image' in self.inputs: arch = simple_cnn(2, 4, 1 if self.inputs['image'].grey else 3)
        learn = multi_learner(self.dls, **{**dict(arch=arch, pretrained=False), **kwargs})
        learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
        return learn
    def quick_learner(self):
        "An untrained learner"
        if self.learn is None: self.learn = self.learner()
        return self.learn
    def check_training(self):
        torch.manual_seed(self.seed)
        self.learn = learn = self.learner()
        with learn.no_logging(): learn.fit(1, 1e-3)
        for p in learn.model.parameters(): check(bool(p.isfinite().all()), 'some weights are not finite after a step')
        rows = list(range(self.n))
        preds = learn.get_preds(dl=self.dls.test_dl(self.df))[0]
        table = learn.predict_df(self.df)
        check(list(table.columns)==self.answer_columns() or self.bare, f'predict_df has the columns {list(table.columns)}')
        check(table.index.equals(self.df.index), 'the index of predict_df differs from that of the table')
        for r in rows: self.check_answers({n: row_of(self.at(preds, n), r) for n in self.outputs}, table.iloc[r], r)
        for r in self.rng.sample(rows, min(2, self.n)): self.check_one(learn, preds, table, r)
        self.check_metrics(learn)
    def answer_columns(self):
        "The columns of `predict_df`"
        res = []
        for n,c in self.outputs.items():
            if isinstance(c, ObjectsOutput): res += [f'{n}.{m}' for m in ('box','score',*c.members)]
            else: res.append(n)
        return res
    def at(self, o, name):
        if self.bare: return o
        return o[name]
    def check_answers(self, preds, answers, r):
        for n,c in self.outputs.items():
            pred = plain(preds[n])
            if not isinstance(c, ObjectsOutput):    # predictions of objects are padded with NaN
                check(bool(pred.isfinite().all()), f'{n}: the prediction of row {r} is {pred}')
            c.check_answer(self.cell(answers, c), pred, r)
    def cell(self, answers, c):
        "The cell of an output in `predict_df`. Objects have several columns and give a dict"
        if self.bare: return answers.iloc[0]
        if not isinstance(c, ObjectsOutput): return answers[c.name]
        if answers[f'{c.name}.box'] is None: return None
        return {n: answers[f'{c.name}.{n}'] for n in ('box','score')}
    def check_one(self, learn, preds, table, r):
        "Check that `predict` gives one row the same answer as `get_preds` and `predict_df`"
        answer,_,probs = learn.predict(self.df.iloc[r])
        for n,c in self.outputs.items():
            one = plain(self.at(probs, n))
            self.check_same(n, one, plain(row_of(self.at(preds, n), r)))
            c.check_answer(self.at(answer, n), one, r)
    def check_same(self, n, one, many):
        "Compare `predict` with `get_preds` for one item. Values are tensors or groups of tensors"
        if not isinstance(one, dict): one,many = {n: one},{n: many}
        for k,v in one.items(): check(near(v, many[k], 1e-3), f'{n}: predict gives {v}, but get_preds gives {many[k]}')
    def check_metrics(self, learn):
        if self.bare or self.weight is not None: return
        found = learn.evaluate()
        preds = learn.get_preds(1)[0]
        for n,c in self.outputs.items():
            if hasattr(c, 'check_metric'): c.check_metric(found, preds[n], self.valid_rows)
        weights,scales = learn.loss_func.weights,learn.loss_func.scales
        parts = [weights[n]*scales.get(n, 1.)*found[loss_column(n)] for n in self.outputs]
        if np.isfinite(parts).all():
            check(near(sum(parts), found['valid_loss'], 1e-3), f'the sum of the losses {parts} is not {found}')

def plain(t):
    "A tensor without its subclass, or a dict of tensors for a group"
    if isinstance(t, torch.Tensor): return t.as_subclass(torch.Tensor).cpu()
    return {n: plain(v) for n,v in t.items()}

def row_of(t, r):
    "One item of a tensor or of a group of tensors"
    if isinstance(t, torch.Tensor): return t[r]
    return t.map(lambda v: v[r])

def loss_column(n):
    "The column of an output's loss. The names of the totals are taken"
    if n=='valid': return 'valid_loss_2'
    return f'{n}_loss'

def mixed(v):
    "Whether a list of cells needs a column of type `object`"
    return not all(type(o) is type(v[0]) and isinstance(o, (int,float,str)) for o in v)

# Results

def is_clear(e, words):
    "Whether the package raised an error on purpose and names what is wrong"
    frame = traceback.extract_tb(e.__traceback__)[-1]
    ours = '/fastai_multi/' in frame.filename and 'raise ' in linecache.getline(frame.filename, frame.lineno)
    text = str(e)
    missing = [w for w in words if not any(o in text for o in L(w))]      # one of several wordings
    if not ours: return f'raised in {frame.filename[-40:]}:{frame.lineno}'
    if len(text.split())<5: return 'not a sentence'
    if missing: return f'does not name {missing}'
    return ''

def short(e): return f'{type(e).__name__}: {str(e)[:300]}'

def run_right(seed, train):
    "Build, read and decode a table without a mistake, and train on some"
    case = Case(seed)
    try:
        case.build()
        case.check_reading()
        if train and len(case.train_rows)>1: case.check_training()    # batch normalisation needs two items
    except Wrong as e: return 'silently wrong',f'{case.describe()}: {e}'
    except Exception as e: return 'unclear error',f'{case.describe()}: an error, although nothing is wrong: {short(e)}'
    return 'right',case.describe()

def run_mistake(seed, learner):
    "Check a table that has a mistake in it, or in the use of its learner"
    case = Case(seed)
    mistakes = LEARNER_MISTAKES if learner else TABLE_MISTAKES
    call = None
    for m in case.rng.sample(mistakes, len(mistakes)):
        made = m.make(case, case.rng)
        if made is not None: break
    words = made
    try:
        if learner:
            words,call = made
            case.build()
            case.quick_learner()
    except Exception as e: return 'unclear error',f'{case.describe()}: an error, although nothing is wrong: {short(e)}'
    try:
        if learner: call(case)
        else:
            case.build()
            for dl in (case.dls.train, case.dls.valid):
                for _ in dl.new(shuffle=False, drop_last=False): pass
    except Exception as e:
        why = is_clear(e, words)
        return 'unclear error' if why else 'clear error',f'{case.describe()}: {m}: {why}: {short(e)}'
    return 'silently wrong',f'{case.describe()}: {m}: accepted'

def run(seed):
    "The result of a seed's table, and a note. Of ten tables, one trains, two have a mistake, and one's learner has one"
    turn = seed%10
    if turn<7: return run_right(seed, train=turn==0)
    return run_mistake(seed, learner=turn==9)

def run_all(seeds):
    "Counts of the results, and the notes of the failures"
    counts = Counter({k: 0 for k in ('right','clear error','unclear error','silently wrong')})
    notes = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for k,seed in enumerate(seeds):
            if k and k%500==0: print(f'{k} tables: {dict(counts)}', flush=True)
            end,note = run(seed)
            counts[end] += 1
            if end not in ('unclear error','silently wrong'): continue
            notes.append(f'{end}: {note}')
            print(notes[-1], flush=True)
    return counts,notes

def main(n=500, start=0):
    torch.set_num_threads(1)
    t = time.time()
    counts,notes = run_all(range(int(start), int(start)+int(n)))
    print(f'{n} tables in {time.time()-t:.0f} s: '+', '.join(f'{v} {k}' for k,v in counts.items()))
    return counts['unclear error']+counts['silently wrong']

if __name__=='__main__': sys.exit(min(1, main(*sys.argv[1:])))
