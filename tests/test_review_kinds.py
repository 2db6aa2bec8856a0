"Corrections of a review reach the loaders through the file of edits, for every kind of output that you can correct"
import pandas as pd, pytest
from fastai.vision.all import *
from fastai_multi import *

OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, flags=MultiCategoryBlock, listed=MultiCategoryBlock,
               area=RegressionBlock, size=RegressionBlock(n_out=2), box=BBoxBlock, frame=BBoxBlock, at=PointBlock,
               two=PointsBlock(flip_pairs=[]), level=NumberBlock(range=(0, 1)), code=CategoryBlock,
               pair=GroupBlock(colour=CategoryBlock, far=RegressionBlock))
COLUMNS = dict(box=['x1', 'y1', 'x2', 'y2'], size=['w', 'h'], at=['x1', 'y1'], flags=['round', 'red'],
               two=['x1', 'y1', 'x2', 'y2'], pair=dict(colour='colour', far='w'))
# What you enter for each output, as the file of edits stores it
ENTERED = dict(kind='star', tags='dark|outlined', flags='red', listed='b', area='7.5', size='3 4.5', box='2 3 20 21',
               frame='4 5 21 22', at='7 8', two='1 2 11 12', level='0.25', code='2')
ENTERED.update({'pair.colour': 'red', 'pair.far': '9'})

@pytest.fixture(scope='module')
def path(tmp_path_factory): return multi_shapes(tmp_path_factory.mktemp('kinds'), n=24, size=32, seed=0)

@pytest.fixture(scope='module')
def table(path):
    df = pd.read_csv(path/'items.csv')
    df['w'] = df.x2-df.x1
    df['h'] = df.y2-df.y1
    df['round'] = [int(k=='circle') for k in df.kind]
    df['red'] = [int(i%2) for i in df.index]
    df['listed'] = [['a', 'b'][:i%3] for i in df.index]
    df['frame'] = df[['x1', 'y1', 'x2', 'y2']].values.tolist()
    df['level'] = df.index/24
    df['code'] = df.index%3
    return df

def loaders(df, path, outputs=OUTPUTS, columns=COLUMNS, **kwargs):
    options = dict(image='file', valid_idx=range(16, 24), bs=8, item_tfms=Resize(32), num_workers=0)
    if outputs is OUTPUTS: options['label_delim'] = dict(tags='|')
    return MultiDataLoaders.from_df(df, path, outputs=outputs, columns=columns, **{**options, **kwargs})

@pytest.fixture(scope='module')
def learn(table, path): return multi_learner(loaders(table, path), simple_cnn(depth=2))

@pytest.mark.parametrize('output', ENTERED)
def test_what_a_person_enters_is_what_the_loaders_read(learn, table, path, tmp_path, output):
    review = Review(learn, [3, 17], file=tmp_path/'edits.csv')
    form = review.forms[output]
    assert not form.is_changed
    before = form.text
    form.text = ENTERED[output] if ENTERED[output]!=before else ''
    entered = form.text
    review.save()
    assert review.note.value.count('Saved')==1
    again = Review(learn, [3, 17], file=tmp_path/'edits.csv')
    assert again.forms[output].text==entered
    dls = loaders(table, path, edits=tmp_path/'edits.csv')
    reader = dls.train.output_reader.readers[output]
    editor = again.items.editors[output]
    assert editor.label(dls.train.items.loc[3])==entered
    for c in reader.cols: assert dls.train.items[c].drop(3).tolist()==table[c].iloc[:16].drop(3).tolist()

def test_every_kind_can_be_left_without_a_label(learn, table, path, tmp_path):
    review = Review(learn, [3], file=tmp_path/'edits.csv')
    alone = [n for n in review.forms if n not in ('at', 'two')]      # these share columns with the box
    for n in alone: review.forms[n].text = ''
    review.save()
    dls = loaders(table, path, edits=tmp_path/'edits.csv')
    row = dls.train.items.loc[3]
    for n in alone: assert review.items.editors[n].label(row)=='', n

def test_a_plain_target_and_a_table_of_texts(table, path, tmp_path):
    dls = loaders(table, path, CategoryBlock, 'kind')
    learn = multi_learner(dls, simple_cnn(depth=1))
    review = Review(learn, [3], file=tmp_path/'edits.csv')
    form, = review.forms.values()
    form.text = next(k for k in ('star', 'circle') if k!=form.text)
    review.save()
    assert list(review.edits)[0][:3]==(table.file[3], 'kind', form.text)
    assert loaders(table, path, CategoryBlock, 'kind', edits=tmp_path/'edits.csv').train.items.kind[3]==form.text

    texts = MultiDataLoaders.from_df(table, text='caption', outputs=['kind'], valid_idx=range(16, 24), bs=8)
    review = Review(multi_learner(texts, text='bag'), [3], file=tmp_path/'texts.csv')     # captions are not unique
    assert review.edits.key=='index'
    review.mark_bad()
    assert 3 not in apply_edits(table, tmp_path/'texts.csv').index
    assert table.caption[3] in review.picture.value

def test_masks_and_objects_are_shown_and_not_corrected(table, path, tmp_path):
    df = table.copy()
    (path/'masks').mkdir(exist_ok=True)
    for i,f in enumerate(df.file): Image.new('L', (32, 32), i%2).save(path/f'masks/{i}.png')
    df['mask'] = [f'masks/{i}.png' for i in range(len(df))]
    dls = loaders(df, path, dict(mask=MaskBlock(codes=['no', 'yes']), kind=CategoryBlock), None)
    review = Review(multi_learner(dls, simple_cnn(depth=2)), [3], file=tmp_path/'edits.csv')
    assert list(review.forms)==['kind'] and len(review.outputs.children)>=2

def test_two_pictures_and_a_picture_that_is_missing(table, path, tmp_path):
    df = table.assign(back=table.file[::-1].tolist())
    df.loc[3, 'back'] = None
    dls = loaders(df, path, dict(kind=CategoryBlock), None, image=['file', 'back'])
    review = Review(multi_learner(dls, simple_cnn(depth=1)), [3, 4], file=tmp_path/'edits.csv')
    assert 'back: no picture' in review.picture.value and review.edits.key=='file'
    review.next()
    assert review.picture.value.count('<img')==2

def test_a_plan_walks_rows_of_another_table(learn, table, path, tmp_path):
    new = table.iloc[:4].set_axis(['a', 'b', 'c', 'd']).assign(kind=None)
    plan = pd.DataFrame(dict(item=['c', 'a', 'c'], output=['kind', 'box', 'area'], gain=[3., 2., 1.], cost=1.))
    review = Review(learn, plan, file=tmp_path/'edits.csv', table=new)
    assert [review.items[i].row.name for i in range(2)]==['c', 'a']
    assert list(review.forms)[:2]==['kind', 'area'] and review.forms['kind'].text==''
    review.forms['kind'].text = 'star'
    review.next()
    assert apply_edits(new, tmp_path/'edits.csv').kind.tolist()[2]=='star'

def test_a_damaged_file_is_told_in_the_widget(learn, tmp_path):
    review = Review(learn, [3], file=tmp_path/'edits.csv')
    (tmp_path/'edits.csv').write_text('file,output,value,time\na.jpg,ki')
    review.forms['kind'].text = ''
    review.buttons['Save'].click()
    assert 'breaks off or is damaged in line 2' in review.note.value
