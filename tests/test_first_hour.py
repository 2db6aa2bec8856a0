"""What a fastai user types first: each row of the table in *From plain fastai* does what it says. No call ends in a
bare traceback: if a name does not exist here, the error says what to write"""
import json, pickle, re
from pathlib import Path

import pytest
from fastai_multi import *
from fastai.vision.all import *

pytestmark = pytest.mark.usefixtures('one_thread')
NOTEBOOK = Path(__file__).resolve().parent.parent/'nbs/90_tutorial.plainfastai.ipynb'
HEADING = '## Twenty things you type first'

def rows():
    "The code of each row, and what the page says about it"
    cells = [''.join(c['source']) for c in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']]
    table = next(c for c in cells if c.startswith('| you type |'))
    assert any(c.startswith(HEADING) for c in cells)
    return re.findall(r'^\| `(.+?)` \| (.+) \|$', table.replace(r'\|', '|'), re.M)

@pytest.fixture(scope='module')
def names(shapes, tmp_path_factory):
    "The variables that the rows use"
    path = tmp_path_factory.mktemp('hour')
    df = pd.read_csv(shapes/'items.csv').head(24)
    files = []
    for i,r in df.iterrows():
        folder = path/r.kind
        folder.mkdir(exist_ok=True)
        files.append(folder/f'{r.kind}_{i}.jpg')
        shutil.copy(shapes/r.file, files[-1])
    dls = MultiDataLoaders.from_df(df, shapes, image='file', outputs=dict(kind=CategoryBlock, area=RegressionBlock),
                                   item_tfms=Resize(32), bs=8, seed=0, num_workers=0)
    learn = multi_learner(dls, simple_cnn(depth=2, width=4), path=path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return dict(globals(), path=path, df=df, dls=dls, learn=learn, files=files, file=files[0])

def test_there_are_twenty(): assert len(rows())>=20

@pytest.mark.parametrize('code,says', rows())
def test_each_row_does_what_it_says(names, code, says):
    if not says.startswith('says'):
        with no_windows(): eval(code, names)
        return
    with pytest.raises(Exception) as found: eval(code, names)
    sentence = str(found.value)
    for wanted in re.findall('`(.+?)`', says): assert wanted in sentence
    assert 'rite ' in sentence or 'pass a dict' in sentence or 'is missing: ' in sentence

@contextmanager
def no_windows():
    "Open no window, and close all figures"
    was = plt.get_backend()
    plt.switch_backend('Agg')
    try: yield
    finally:
        plt.close('all')
        plt.switch_backend(was)

def test_a_name_that_is_like_another_and_one_that_is_not(names):
    for owner in (names['dls'], names['learn']):
        assert not hasattr(owner, 'wxyz') and getattr(owner, 'wxyz', 3)==3
        with pytest.raises(AttributeError, match=f'A {type(owner).__name__} has no `wxyz`[.]$'): owner.wxyz
    with pytest.raises(AttributeError, match='Did you mean `show_batch`'): names['dls'].show_bach
    with pytest.raises(AttributeError, match='Did you mean `fine_tune`'): names['learn'].finetune

def test_what_the_model_and_the_training_loader_have_is_still_there(names):
    assert names['learn'].heads is names['learn'].model.heads and names['dls'].n==names['dls'].train.n

def test_the_error_travels_between_processes(names):
    try: names['learn'].interpret
    except AttributeError as e: again = pickle.loads(pickle.dumps(e))
    assert 'MultiInterpretation' in str(again)

def test_a_regular_expression_names_the_label(names):
    dls = MultiDataLoaders.from_name_re(names['path'], names['files'], r'^([a-z]+)_\d+[.]jpg$', item_tfms=Resize(32), bs=8)
    assert set(dls.vocab)=={f.parent.name for f in names['files']}
    with pytest.raises(AssertionError, match='Failed to find'):
        MultiDataLoaders.from_path_re(names['path'], names['files'], r'(\d+)[.]png$')

def test_a_table_that_is_written_in_another_way_reads_step_by_step(shapes, tmp_path):
    "For a Korean table with semicolons and decimal commas, each message names the next argument"
    df = pd.read_csv(shapes/'items.csv').head(24)
    table = pd.DataFrame({'파일': df.file, '모양': df.kind, '잉크(%)': [f'{o/100:.1f}'.replace('.', ',') for o in df.area]})
    table.to_csv(tmp_path/'표.csv', sep=';', index=False, encoding='cp949')
    shutil.copytree(shapes/'images', tmp_path/'images')
    read = partial(MultiDataLoaders.from_csv, tmp_path, '표.csv', image='파일', outputs=['모양', '잉크(%)'], bs=8,
                   num_workers=0)
    given = {}
    for words,more in (("Korean text with encoding='cp949'", dict(encoding='cp949')),
                       ("columns: delimiter=';'", dict(delimiter=';')),
                       ("read the file with decimal=','", dict(decimal=','))):
        with pytest.raises(ValueError, match=re.escape(words)): read(**given)
        given.update(more)
    assert read(**given).c=={'모양': 4, '잉크(%)': 1}
