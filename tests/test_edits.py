"Corrected labels in a CSV file beside the table reach the loaders, for every kind of output"
import pandas as pd, pytest
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.data.cells import value_text
from fastai_multi.data.edits import edits_text, read_edits

OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock, at=PointBlock)
COLUMNS = dict(box=['x1', 'y1', 'x2', 'y2'], at=['x1', 'y1'])

@pytest.fixture(scope='module')
def path(tmp_path_factory): return multi_shapes(tmp_path_factory.mktemp('shapes'), n=24, size=32, seed=0)

def loaders(path, **kwargs):
    options = dict(image='file', outputs=OUTPUTS, columns=COLUMNS, label_delim='|', valid_pct=.25, seed=0, bs=4,
                   item_tfms=Resize(32))
    return MultiDataLoaders.from_csv(path, 'items.csv', **{**options, **kwargs})

VALUES = [('kind', 'hexagon'), ('kind', 'star'), ('tags', ['big', 'filled']), ('tags', []), ('area', .25),
          ('box', [2, 3, 20, 21]), ('at', [5, 6]), ('kind', None), ('area', None), ('box', None)]

@pytest.mark.parametrize('output,value', VALUES)
def test_an_edit_comes_back_through_the_file_and_the_loaders(path, tmp_path, capsys, output, value):
    df = pd.read_csv(path/'items.csv')
    file = df.file[loaders(path).train.items.index[0]]
    edits = Edits(tmp_path/'edits.csv', key='file')
    edits.add(file, output, value)
    dls = loaders(path, edits=edits.file)
    assert f'1 value corrected ({output} 1)' in capsys.readouterr().out
    row = dls.train.items[dls.train.items.file==file].iloc[0]
    cells = [row[c] for c in COLUMNS.get(output, [output])]
    if value is None: assert all(pd.isna(c) for c in cells)
    else: assert value_text(cells if len(cells)>1 else cells[0])==value_text(value)
    others = dls.train.items[dls.train.items.file!=file]
    pd.testing.assert_frame_equal(others, df.loc[others.index], check_dtype=False)

def test_a_new_class_is_told_and_enters_the_vocabulary(path, tmp_path, capsys):
    file = loaders(path).train.items.file.iloc[0]
    edits = Edits(tmp_path/'edits.csv', key='file')
    edits.add(file, 'kind', 'hexagon')
    dls = loaders(path, edits=edits)
    assert "New in 'kind': 'hexagon'." in capsys.readouterr().out
    assert 'hexagon' in list(dls.vocab['kind'])

def test_a_bad_item_is_left_out_and_moves_no_other(path, tmp_path):
    before = loaders(path)
    gone = [before.train.items.file.iloc[2], before.valid.items.file.iloc[1]]
    edits = Edits(tmp_path/'edits.csv', key='file')
    for file in gone: edits.mark_bad(file)
    after = loaders(path, edits=edits.file)
    for a,b in zip(before.loaders, after.loaders):
        assert list(b.items.file)==[f for f in a.items.file if f not in gone]
    edits.undo()
    assert len(loaders(path, edits=edits.file).valid.items)==len(before.valid.items)

def test_positions_of_validation_rows_are_those_of_the_whole_table(path, tmp_path):
    df = pd.read_csv(path/'items.csv')
    edits = Edits(tmp_path/'edits.csv', key='file')
    edits.mark_bad(df.file[0])
    for valid_idx in ([0, 5, 23], df.index.isin([0, 5, 23])):
        dls = loaders(path, edits=edits.file, valid_idx=valid_idx)
        assert list(dls.valid.items.file)==[df.file[5], df.file[23]]

def test_the_file_is_found_in_the_folder_of_the_table(path):
    edits = Edits(path/'mine.csv', key='file')
    edits.mark_bad('00003.jpg' if (path/'00003.jpg').exists() else pd.read_csv(path/'items.csv').file[3])
    assert sum(len(dl.items) for dl in loaders(path, edits='mine.csv').loaders)==23

def test_one_output_and_one_plain_target(path, tmp_path):
    df = pd.read_csv(path/'items.csv')
    edits = Edits(tmp_path/'edits.csv', key='file')
    edits.add(df.file[0], 'kind', 'hexagon')
    for outputs,columns in [('kind', None), (['kind'], None), (CategoryBlock, 'kind')]:
        dls = MultiDataLoaders.from_df(df, path, image='file', outputs=outputs, columns=columns, edits=edits.file,
                                       valid_idx=[5, 6], item_tfms=Resize(32), bs=4)
        assert dls.train.items.kind[0]=='hexagon' and df.kind[0]!='hexagon'

def test_mistakes_are_answered(path, tmp_path):
    edits = Edits(tmp_path/'edits.csv', key='file')
    with pytest.raises(ValueError, match='there is no file'): loaders(path, edits='none.csv')
    edits.add('none.jpg', 'kind', 'star')
    with pytest.raises(KeyError, match="corrects the item 'none.jpg'"): loaders(path, edits=edits.file)
    edits.undo()
    file = pd.read_csv(path/'items.csv').file[0]
    edits.add(file, 'boxes', '1 2 3 4')
    with pytest.raises(KeyError, match="Did you mean 'box'"): loaders(path, edits=edits.file)
    edits.undo()
    edits.add(file, 'box', '1 2 3')
    with pytest.raises(ValueError, match="Output 'box' cannot read '1 2 3': 4 numbers"): loaders(path, edits=edits.file)
    edits.undo()
    edits.add(file, 'box', '9 2 3 4')     # the output's own error for a wrong value
    with pytest.raises(ValueError, match='has no area'): loaders(path, edits=edits.file, valid_idx=[1, 2])

def test_a_file_that_is_cut_anywhere_is_refused_or_whole(tmp_path):
    "A file cut anywhere reads as its whole lines or raises an error. It never reads as other edits"
    rows = [('a.jpg', 'kind', 'star', '2026-01-02T03:04:05Z'), ('b.jpg', 'tags', 'x|y, "z"', '2026-01-02T03:04:05Z')]
    text = edits_text('file', rows)
    for n in range(len('file,output,value,time\n'), len(text)):
        try: found = read_edits(text[:n], 'edits.csv')[1]
        except ValueError as e: assert 'edits.csv' in str(e)
        else: assert found==rows[:len(found)]

def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    edits = Edits(tmp_path/'edits.csv', key='file')
    edits.add('a.jpg', 'kind', 'star')
    before = edits.file.read_text()
    def fail(*args): raise OSError('no space')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError): edits.add('b.jpg', 'kind', 'star')
    assert edits.file.read_text()==before and [f.name for f in tmp_path.iterdir()]==['edits.csv']
