"""Mistakes in a random table or its arguments, one at a time, and the words that the error must contain"""
import math
import numpy as np, pandas as pd, torch
from fastai.data.block import CategoryBlock
from fastai.metrics import accuracy
from fastai_multi import *
from tests.contents import pictures_folder

class Mistake:
    "A mistake: `make(case, rng)` makes it and returns the words of the error, or `None` if it does not apply"
    def __init__(self, make, stage):
        self.make = make
        self.name = make.__name__
        self.stage = stage
    def __repr__(self): return self.name

TABLE_MISTAKES = []
LEARNER_MISTAKES = []

def in_table(f):
    "Register a mistake in the table or in the arguments of `from_df`"
    TABLE_MISTAKES.append(Mistake(f, 'table'))
    return f

def in_learner(f):
    "Register a mistake in the use of a learner. Its `make` also returns the call that must fail"
    LEARNER_MISTAKES.append(Mistake(f, 'learner'))
    return f

# Cells

def set_cell(case, column, r, value):
    "Put any value into a cell of the table"
    cells = list(case.df[column])
    cells[r] = value
    res = np.empty(len(cells), dtype=object)
    for i,v in enumerate(cells): res[i] = v
    case.df[column] = pd.Series(res, index=case.df.index, dtype=object)

def label(case, r):
    "The name of row `r` in messages"
    v = case.df.index[r]
    return repr(v.item() if hasattr(v, 'item') else v)

def output_of(case, rng, *kinds):
    "One of the table's inputs or outputs of these kinds, or `None`"
    found = [c for c in case.contents() if c.kind in kinds]
    return rng.choice(found) if found else None

def filled_row(case, rng, content, least=1):
    "A row where the content has a value, but not the only such training row"
    rows = [r for r in range(case.n) if content.values[r] is not None]
    if len([r for r in rows if r in case.train_rows])<=least: rows = [r for r in rows if r not in case.train_rows]
    return rng.choice(rows) if rows else None

def spoil(case, rng, kinds, values, one_column=False, picture=False, content=None):
    "Put one of `values` into a cell. The error must name the output, the row and the value"
    if content is None: content = output_of(case, rng, *kinds)
    if content is None or one_column and len(content.columns)>1: return None
    r = filled_row(case, rng, content)
    if r is None or picture and not case.has_picture[r]: return None
    value = rng.choice(values)
    set_cell(case, rng.choice(list(content.columns)), r, value)
    return [content.said(), label(case, r)]

@in_table
def text_for_a_number(case, rng): return spoil(case, rng, ['number'], ['abc','12 €','1,5'])
@in_table
def list_for_a_number(case, rng): return spoil(case, rng, ['number'], [[1.,2.,3.,4.],{'a': 1},{1.5}], True)
@in_table
def list_for_a_class(case, rng): return spoil(case, rng, ['category'], [['a','b'],('a',),{'a'},{'a': 1}], True)
@in_table
def text_for_tags(case, rng):
    content = output_of(case, rng, 'tags')
    if content is None or len(content.columns)>1 or 'label_delim' in case.options: return None
    return spoil(case, rng, ['tags'], ['a', 5, 'a b', True], content=content)
@in_table
def odd_tags(case, rng):
    content = output_of(case, rng, 'tags')
    if content is None or len(content.columns)>1 or 'label_delim' in case.options: return None
    return spoil(case, rng, ['tags'], [[['a']], ['a',None], [('a','b')], [{}], ['a',math.nan], [pd.NA]], content=content)
@in_table
def text_for_a_flag(case, rng):
    content = output_of(case, rng, 'tags')
    if content is None or len(content.columns)==1: return None
    r = filled_row(case, rng, content)
    if r is None: return None
    column = rng.choice(list(content.columns))
    set_cell(case, column, r, rng.choice([2, 'yes', .5]))
    return [column]
@in_table
def text_for_features(case, rng):
    words = spoil(case, rng, ['features'], ['abc', [[1.],[2.,3.]], {'a': 1}])
    return words and ['features', *words[1:]]
@in_table
def ragged_features(case, rng):
    words = spoil(case, rng, ['features'], [[1.]*7, np.zeros((2,3))], True)
    return words and words[:1]+['shape']
@in_table
def number_for_a_text(case, rng):
    content = output_of(case, rng, 'text')
    if content is None: return None
    return spoil(case, rng, ['text'], [['a','b'],{'a': 1},5,1.5], True)
@in_table
def text_for_a_box(case, rng): return spoil(case, rng, ['box'], ['[1, 2, 3, 4]','abc',[1,2,3],[[1,2],[3]]], True, True)
@in_table
def corner_missing(case, rng):
    content = output_of(case, rng, 'box')
    if content is None or len(content.columns)==1: return None
    return spoil(case, rng, ['box'], [None, math.nan, pd.NA], picture=True, content=content)
@in_table
def box_without_area(case, rng):
    content = output_of(case, rng, 'box')
    if content is None: return None
    r = filled_row(case, rng, content, 0)
    if r is None or not case.has_picture[r]: return None
    box = list(content.values[r])
    box[2] = box[0]-rng.choice([0, 3])
    put_box(case, content, r, box)
    return [content.said(), place(case, r), 'area']
@in_table
def box_beyond_its_picture(case, rng):
    content = output_of(case, rng, 'box')
    if content is None: return None
    r = filled_row(case, rng, content, 0)
    if r is None or not case.has_picture[r]: return None
    x1,y1,x2,y2 = content.values[r]
    put_box(case, content, r, rng.choice([[x1,y1,x2+50,y2], [x1,y1,x2,y2+50], [x1-50,y1,x2,y2], [x1,y1-50,x2,y2]]))
    return [content.said(), place(case, r), 'beyond']
def place(case, r):
    "The names of a row in messages: transforms are set up with the first item of the training split"
    if r!=case.train_rows[0]: return label(case, r)
    return label(case, r),'first item of the training split'
def put_box(case, content, r, box):
    cols = list(content.columns)
    if len(cols)==1: return set_cell(case, cols[0], r, box)
    for c,v in zip(cols, box): set_cell(case, c, r, v)
@in_table
def boxes_as_fractions(case, rng):
    content = output_of(case, rng, 'box')
    if content is None: return None
    for r,v in enumerate(content.values):
        if v is not None: put_box(case, content, r, [.1,.2,.5,.6])
    return [content.said(), 'pixels']
@in_table
def several_boxes_in_validation(case, rng):
    content = output_of(case, rng, 'box')
    if content is None or len(content.columns)>1: return None
    r = case.valid_rows[0]
    if not case.has_picture[r]: return None
    set_cell(case, content.one, r, [[1,1,5,5],[2,2,6,6]])
    return [content.said(), label(case, r)]
@in_table
def text_for_points(case, rng): return spoil(case, rng, ['points'], ['(1, 2)', [1,2,3], {'x': 1}], True, True)
@in_table
def class_only_in_validation(case, rng):
    content = output_of(case, rng, 'category', 'tags')
    if content is None or len(content.columns)>1 or 'label_delim' in case.options: return None
    r = case.valid_rows[0]
    new = 'never seen'
    if content.kind=='category' and not isinstance(content.classes[0], str): new = 99
    set_cell(case, content.one, r, new if content.kind=='category' else [new])
    return [content.said(), label(case, r), repr(new), 'vocab']
@in_table
def no_label_in_training(case, rng):
    content = output_of(case, rng, 'category', 'tags', 'number')
    if content is None: return None
    for c in content.columns:
        for r in case.train_rows: set_cell(case, c, r, None)
    return [content.said(), 'training split']
@in_table
def mixed_classes(case, rng):
    content = output_of(case, rng, 'category')
    if content is None or len(case.train_rows)<3: return None
    rows = [r for r in case.train_rows if content.values[r] is not None]
    if len(rows)<2: return None
    new = 5 if isinstance(content.classes[0], str) else 'five'
    set_cell(case, content.one, rows[-1], new)
    return [content.said(), label(case, rows[-1]), 'mixes']
@in_table
def bad_weight(case, rng):
    if case.weight is None: return None
    r = rng.randrange(case.n)
    set_cell(case, case.weight.one, r, rng.choice([-1., 'x', math.inf, -math.inf, [1,2]]))
    return ["'item_weight'", label(case, r)]

# Files

def bad_file(case, rng, name):
    content = output_of(case, rng, 'image')
    if content is None: return None
    r = rng.randrange(case.n)
    set_cell(case, content.one, r, str(pictures_folder()/name))
    if 'suff' in case.options: set_cell(case, content.one, r, str(pictures_folder()/name)[:-4])
    return ['image', name]
@in_table
def missing_file(case, rng): return bad_file(case, rng, 'nowhere.png')
@in_table
def broken_file(case, rng):
    if any(c.spatial for c in case.outputs.values()): return None    # the header may raise another error
    return bad_file(case, rng, 'broken.png')
@in_table
def text_file(case, rng): return bad_file(case, rng, 'text.png')
@in_table
def empty_file(case, rng): return bad_file(case, rng, 'empty.png')
@in_table
def folder_for_a_file(case, rng): return bad_file(case, rng, 'a folder.png')
@in_table
def number_for_a_file(case, rng):
    numbers = [] if 'suff' in case.options else [5, 1.5]          # with a suffix, a number is a name: 5.png
    words = spoil(case, rng, ['image'], [*numbers, ['a.png'], {'a': 1}])
    return words and words[:1]
@in_table
def missing_mask(case, rng):
    return spoil(case, rng, ['mask'], [str(pictures_folder()/o) for o in ('no.png','broken.png','a folder.png')], True)

# Arguments

def given(case, words, **kwargs):
    "Replace arguments of the case"
    case.changed = kwargs
    return words

def columns_of(case): return case.arguments().get('columns', {})

@in_table
def unknown_column(case, rng):
    n = rng.choice(list(case.inputs))
    return given(case, [n, 'no such column'], **{n: 'no such column'})
@in_table
def unknown_target_column(case, rng):
    if case.bare: return given(case, ['columns', 'no such column'], columns='no such column')
    n = rng.choice(list(case.outputs))
    return given(case, ['columns', n, 'no such column'], columns={**columns_of(case), n: 'no such column'})
@in_table
def unknown_output(case, rng):
    if case.bare: return None
    return given(case, ['columns', 'no such output'], columns={**columns_of(case), 'no such output': 'x'})
@in_table
def no_input(case, rng): return given(case, ['image','text','features'], image=None, text=None, features=None)
@in_table
def no_outputs(case, rng):
    if case.weight is not None: return None
    v = rng.choice([{}, None, 'nope', ['nope'], 5, True])
    return given(case, ['utput'], outputs=v, columns=None)
@in_table
def output_is_no_block(case, rng):
    if case.bare: return None
    n = rng.choice(list(case.outputs))
    v = rng.choice(['CategoryBlock', 5, [CategoryBlock], accuracy, {}])
    return given(case, [n], outputs={**case.arguments()['outputs'], n: v})
@in_table
def output_name_no_text(case, rng):
    return given(case, ['name'], outputs={rng.choice([1, ('a',), None]): CategoryBlock}, columns=None)
@in_table
def no_table(case, rng):
    case.df = rng.choice([None, {'a': [1]}, 'table.csv', 5, [1,2], case.df.iloc[:0], case.df.iloc[:,0]])
    return ['df']
@in_table
def one_row(case, rng):
    case.df = case.df.iloc[:1]
    return ['valid_col']
@in_table
def bad_share(case, rng):
    v = rng.choice([-.1, 1.5, 'x', math.nan, 20, [.2], None, 1, 0, 1e-9])
    return given(case, ['valid_pct'], valid_col=None, valid_value=None, valid_pct=v)
@in_table
def bad_seed(case, rng):
    return given(case, ['seed'], valid_col=None, valid_value=None, seed=rng.choice(['x', 1.5, [1]]))
@in_table
def bad_split_column(case, rng):
    case.options.pop('valid_value', None)
    set_cell(case, case.split_column, case.valid_rows[0], rng.choice(['x', 2, None, math.nan, pd.NA, .5]))
    return ['valid_col', repr(case.split_column)]
@in_table
def unknown_split_column(case, rng): return given(case, ['valid_col', 'no such column'], valid_col='no such column')
@in_table
def unknown_split_value(case, rng): return given(case, ['valid_value', 'nope'], valid_value='nope')
@in_table
def all_for_validation(case, rng):
    v = rng.choice([True, False])
    case.df[case.split_column] = v
    return given(case, ['valid_col'], valid_value=None)
@in_table
def bad_batch_size(case, rng): return given(case, ['bs'], bs=rng.choice([0, -1, 'x', 2.5, [4]]))
@in_table
def bad_validation_batch_size(case, rng): return given(case, ['val_bs'], val_bs=rng.choice([0, -1, 'x', 2.5]))
@in_table
def unknown_argument(case, rng): return given(case, ['batch_sise'], batch_sise=4)
@in_table
def bad_item_tfms(case, rng): return given(case, ['item_tfms'], item_tfms=rng.choice(['Resize', 12, {'a': 1}]))
@in_table
def bad_batch_tfms(case, rng): return given(case, ['batch_tfms'], batch_tfms=rng.choice(['Normalize', 12]))
@in_table
def bad_picture_class(case, rng):
    if 'image' not in case.inputs: return None
    return given(case, ['img_cls'], img_cls=rng.choice(['L', 5, dict]))
@in_table
def bad_text_block(case, rng):
    if 'text' not in case.inputs: return None
    return given(case, ['text_block'], text_block=rng.choice(['words', 5, dict]))
@in_table
def bad_delimiter(case, rng):
    content = output_of(case, rng, 'tags')
    if content is None or 'label_delim' not in case.options: return None
    return given(case, ['label_delim'], label_delim=rng.choice([5, '', ['|']]))
@in_table
def bad_folder(case, rng):
    if 'image' not in case.inputs or case.options.get('folder') is None: return None
    return given(case, ['folder'], folder=rng.choice(['no such folder', 5]))
@in_table
def bad_suffix(case, rng):
    if 'image' not in case.inputs: return None
    return given(case, ['suff'], suff=rng.choice([5, ['.png']]))
@in_table
def unknown_weight(case, rng):
    if case.bare: return None
    return given(case, ['weight', 'no such column'], weight='no such column')
@in_table
def bad_path(case, rng): return given(case, ['path'], path=rng.choice([5, ['a'], {}]))
@in_table
def same_column_twice(case, rng):
    if case.bare: return None
    n = rng.choice(list(case.outputs))
    c = next(iter(case.outputs[n].columns))
    double = case.df.rename(columns={case.split_column: c})
    case.df = pd.concat([case.df, double[[c]].iloc[:,:1]], axis=1)
    return [repr(c)]

# Learners: these return the words and the call that must fail

def building(words, **kwargs): return words,lambda case: case.learner(**kwargs)
def using(words, f): return words,lambda case: f(case.quick_learner())

@in_learner
def no_arch(case, rng):
    if 'image' not in case.inputs: return None
    return building(['arch'], arch=rng.choice([None, 'resnet17x', 5, {}, {'nope': simple_cnn}, [], '', object()]))
@in_learner
def arch_without_picture(case, rng):
    if 'image' in case.inputs: return None
    return building(['arch'], arch=rng.choice(['resnet18', simple_cnn, 5]))
@in_learner
def bad_depth(case, rng):
    if 'image' not in case.inputs: return building(['depth'], depth=2)
    n = next(iter(case.outputs))
    return building(['depth'], depth=rng.choice([99, 0, -1, 'x', 1.5, [1], {'nope': 1}, {n: 99}, {n: 'x'}]))
@in_learner
def bad_split(case, rng):
    if 'image' not in case.inputs: return building(['split'], split=1)
    return building(['split'], split=rng.choice([99, -1, 'x', 1.5, [1]]))
@in_learner
def bad_text_encoder(case, rng):
    if 'text' not in case.inputs: return None
    return building(['text'], text=rng.choice(['nope', 5, None, '', []]))
@in_learner
def bad_fusion(case, rng):
    if len(case.inputs)<2: return None
    return building(['fusion'], fusion=rng.choice(['nope', 5, None, '', []]))
@in_learner
def bad_neck(case, rng):
    if len(case.inputs)<2 or 'image' not in case.inputs: return None
    return building(['neck'], neck=rng.choice(['x', -1, 1.5, [4]]))
@in_learner
def bad_heads(case, rng):
    n = next(iter(case.outputs))
    if case.bare: return building(['heads'], heads=rng.choice([{'nope': [8]}, 5, 'x']))
    of_one = rng.choice(['x', ['x'], {'hiden': [4]}, -3])
    return building(['head'], heads=rng.choice([{'nope': [8]}, 5, 'x', {n: of_one}]))
@in_learner
def bad_loss_weights(case, rng):
    if case.bare: return building(['loss_weights'], loss_weights={'nope': 2.})
    n = next(iter(case.outputs))
    of_one = rng.choice(['x', -1, math.nan])
    return building(['weight'], loss_weights=rng.choice([{'nope': 2.}, [1,2,3], 5, 'x', {n: of_one}]))
@in_learner
def bad_class_weights(case, rng):
    n = next(iter(case.outputs))
    if case.bare: return None
    v = rng.choice([{'nope': 'balanced'}, 'balanced', 5, [1,2], {n: 'x'}, {n: [1]*99}])
    return building(['class_weights'], class_weights=v)
@in_learner
def bad_metrics(case, rng):
    if case.bare: return building(['metrics'], metrics=rng.choice(['accuracy', {'nope': accuracy}, 5]))
    n = next(iter(case.outputs))
    v = rng.choice([{'nope': accuracy}, 'accuracy', {n: 'accuracy'}, {n: 5}, 5, accuracy])
    return building(['metric'], metrics=v)
@in_learner
def bad_loss(case, rng):
    if case.bare: return building(['loss_func'], loss_func=rng.choice(['mse', 5]))
    n = next(iter(case.outputs))
    return building(['loss'], loss_func=rng.choice(['mse', 5, {'nope': torch.nn.MSELoss()}, {n: 'mse'}, {n: 5}]))
@in_learner
def bad_after(case, rng):
    if case.bare: return None
    n = next(iter(case.outputs))
    return building(['after'], after=rng.choice([{n: 'nope'}, {'nope': n}, {n: n}, 5, 'x', {n: 5}]))
@in_learner
def unknown_learner_argument(case, rng): return building(['archh'], archh=5)
@in_learner
def no_loaders(case, rng):
    v = rng.choice([None, 5, 'x', case.df, [1]])
    return ['dls'],lambda case: multi_learner(v, simple_cnn)
@in_learner
def bad_item(case, rng):
    v = rng.choice([5, None, (1,2,3,4), {'nope': 1}, object(), 'nowhere.png', [], {}, pd.DataFrame(), math.nan, b'xx'])
    is_text = isinstance(v, str)
    if is_text and 'text' in case.inputs and 'image' not in case.inputs: return None
    if 'features' in case.inputs and isinstance(v, (int,float)): return None
    return using([], lambda learn: learn.predict(v))
@in_learner
def row_without_column(case, rng):
    if len(case.inputs)>1: return None      # `predict` accepts a missing input and warns
    c = next(iter(next(iter(case.inputs.values())).columns))
    row = case.df.iloc[0].drop(c)
    return using([str(c)], lambda learn: learn.predict(row))
@in_learner
def bad_items(case, rng):
    v = rng.choice([5, None, {}, 'x', case.df.iloc[:0], [], case.df[[case.split_column]], object()])
    return using([], lambda learn: learn.predict_df(v))
@in_learner
def unknown_argument_of_predict_df(case, rng):
    return using(['nonsense'], lambda learn: learn.predict_df(case.df, nonsense=1))
@in_learner
def bad_batch_size_of_predict_df(case, rng):
    v = rng.choice([0, -1, 'x', 2.5])
    return using(['bs'], lambda learn: learn.predict_df(case.df, bs=v))
@in_learner
def bad_loader_number(case, rng):
    v = rng.choice([7, -9, 'x', None])
    return using(['ds_idx'], lambda learn: learn.get_preds(v))
@in_learner
def bad_loader(case, rng):
    v = rng.choice([5, 'x', case.df, []])
    f = rng.choice(['get_preds','evaluate','validate','tta','task_report'])
    return using(['dl'], lambda learn: getattr(learn, f)(dl=v))
@in_learner
def bad_activation(case, rng):
    v = rng.choice([5, {'nope': torch.sigmoid}, 'x'])
    return using(['act'], lambda learn: learn.get_preds(act=v))
@in_learner
def bad_epochs(case, rng):
    v = rng.choice(['x', -1, 1.5, None])
    return using(['epoch'], lambda learn: learn.fit(v))
@in_learner
def bad_rate(case, rng):
    v = rng.choice(['x', [1,2,3,4,5,6,7,8,9], {}, -1., math.nan])
    return using(['lr'], lambda learn: learn.fit(1, v))
@in_learner
def evaluate_without_labels(case, rng):
    return using(['labels'], lambda learn: learn.evaluate(dl=learn.dls.test_dl(case.df)))
