"From a table, files or data sets to loaders: blocks inferred from values, factories, splits"
import io
from contextlib import redirect_stdout

import matplotlib
matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, torch
from fastai.data.block import CategoryBlock, MultiCategoryBlock, RegressionBlock
from fastai.vision.augment import Resize
from fastai.vision.core import Image
from fastai_multi import *

small = dict(bs=4, num_workers=0, device='cpu')

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "A folder of pictures and a table of 40 rows"
    folder = tmp_path_factory.mktemp('table')
    rows = []
    for i in range(40):
        a = np.full((24,24,3), 40*(i%3), dtype=np.uint8)
        Image.fromarray(a).save(folder/f'{i}.png')
        rows.append(dict(file=f'{i}.png', note='a dark one' if i%3 else 'a light one', gender='fm'[i%2],
                         price=10+i/4, tags=['red|small','red','|'][i%3], stars=1+i%5, code=f'{i%4:03d}',
                         patient=f'p{i//4}', x1=2., y1=3., x2=9., y2=9., mask=f'{i}.png', day='2020-01-01'))
    return folder,pd.DataFrame(rows)

def loaders_and_lines(make):
    "Loaders, and the lines printed while they were made"
    with redirect_stdout(io.StringIO()) as out: dls = make()
    return dls,out.getvalue().splitlines()

# Blocks inferred from values

def test_blocks_are_inferred_and_printed(table):
    folder,df = table
    names = ['gender','price','tags','stars']
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_df(df, folder, text='note', outputs=names, **small))
    assert [p.kind for p in describe(dls).outputs.values()] == ['category','number','tags','category']
    assert len(lines) == 5 and all(n in l for n,l in zip(names, lines))
    assert [l.startswith('check ') for l in lines] == [False,False,False,True,False]
    assert 'stars=RegressionBlock' in lines[3]    # how to say it differently
    written = lines[-1].removeprefix('Written out: ')
    again,lines = loaders_and_lines(
        lambda: MultiDataLoaders.from_df(df, folder, text='note', **eval(f'dict({written})'), **small))
    assert not lines and repr(describe(again)) == repr(describe(dls))

def test_a_name_is_a_plain_target_that_trains(table):
    folder,df = table
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_df(df, folder, text='note', outputs='price', **small))
    assert lines[-1] == "Written out: outputs=RegressionBlock, columns='price'"
    assert isinstance(dls.one_batch()[1], torch.Tensor) and list(describe(dls).outputs) == ['price']
    learn = multi_learner(dls)
    with learn.no_logging(), learn.no_bar(): learn.fit(1)
    value,_,_ = learn.predict('a dark one')
    assert 0 < float(value) < 40

def test_a_csv_file_keeps_codes_as_written(table, tmp_path):
    _,df = table
    df.to_csv(tmp_path/'items.csv', index=False)
    dls,lines = loaders_and_lines(
        lambda: MultiDataLoaders.from_csv(tmp_path, text='note', outputs=['code','price'], **small))
    assert list(dls.vocab[-1]['code']) == ['000','001','002','003']
    assert 'Words' in lines[0] and lines[1].startswith('price: number')

def test_a_csv_file_with_one_name(table, tmp_path):
    _,df = table
    df.to_csv(tmp_path/'items.csv', index=False)
    dls,_ = loaders_and_lines(lambda: MultiDataLoaders.from_csv(tmp_path, text='note', outputs='code', **small))
    assert list(dls.vocab[-1]) == ['000','001','002','003']

def test_twenty_whole_numbers_are_decided_and_pointed_out(table):
    folder,df = table
    df = df.assign(age=[i%20 for i in range(40)], level=[i%20 for i in range(40)])
    df = pd.concat([df, df])
    outputs = dict(age=None, level=CategoryBlock)
    dls,lines = loaders_and_lines(lambda: MultiDataLoaders.from_df(df, folder, text='note', outputs=outputs, **small))
    assert [p.kind for p in describe(dls).outputs.values()] == ['number','category']
    assert lines[0].startswith('check age: number') and 'age=CategoryBlock' in lines[0]

@pytest.mark.parametrize('outputs, columns, words', [
    (['box'], dict(box=['x1','y1','x2','y2']), 'box=BBoxBlock'),
    (['mask'], None, 'holds files of pictures'),
    (['day'], None, 'holds dates'),
    (['file'], None, 'holds files of pictures'),
    (['gendr'], None, "Did you mean 'gender'?"),
    (['gender','gender'], None, "names 'gender' twice"),
    (['gender', CategoryBlock], None, 'names of columns whose blocks are inferred')])
def test_what_cannot_be_inferred_is_answered_in_words(table, outputs, columns, words):
    folder,df = table
    with pytest.raises((ValueError,KeyError,TypeError)) as e:
        MultiDataLoaders.from_df(df, folder, text='note', outputs=outputs, columns=columns, **small)
    assert words in str(e.value)

def test_inferred_blocks_survive_export(table, tmp_path):
    from fastai.learner import load_learner
    folder,df = table
    dls,_ = loaders_and_lines(lambda: MultiDataLoaders.from_df(df, folder, text='note', outputs=['gender','tags'], **small))
    learn = multi_learner(dls, path=tmp_path)
    learn.export()
    answer,_,_ = load_learner(tmp_path/'export.pkl').predict('a dark one')
    assert answer.gender in 'fm'
