"""`dls.report()` finds each planted fault with its figure, finds none in clean data, and takes bounded time for 100,000
rows"""
import random, time
import numpy as np, pandas as pd, pytest, torch
from PIL import Image, ImageDraw
from fastai.vision.all import (BBoxBlock, BBoxLblBlock, CategoryBlock, ColReader, DataBlock, ImageBlock, MaskBlock,
                               MultiCategoryBlock, PointBlock, RegressionBlock, Resize, aug_transforms)
from fastai_multi import *
from fastai_multi.data.values import cramers_v, correlation_ratio, pearson
from fastai_multi.data.duplicates import look_at, near_pairs, sides_in

def draw_picture(rng, box, colour):
    "Draw an ellipse in `box` on a grainy coloured background"
    ground = rng.integers(0, 256, (5,5,3), dtype=np.uint8)
    im = Image.fromarray(ground).resize((96,96), Image.Resampling.BICUBIC)
    ImageDraw.Draw(im).ellipse(box, fill=colour)
    return im

@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    "A folder of 200 pictures and their table, without any fault"
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp('clean')
    rows = []
    for i in range(200):
        x,y = rng.integers(0, 56, 2).tolist()
        size = int(rng.integers(24, 40))
        colour = ['red','blue','green'][rng.integers(3)]
        draw_picture(rng, [x, y, x+size, y+size], colour).save(path/f'{i}.jpg')
        rows.append(dict(file=f'{i}.jpg', text=f'Item {i} in {colour}', colour=colour, shop=['north','south'][rng.integers(2)],
                         price=20+3*rng.normal(), tags='|'.join(t for t in ('new','sale') if rng.random()<.5) or '|',
                         x1=x, y1=y, x2=x+size, y2=y+size, is_valid=i>=150))
    return path,pd.DataFrame(rows)

outputs = dict(colour=CategoryBlock, shop=CategoryBlock, tags=MultiCategoryBlock, price=RegressionBlock, box=BBoxBlock)

def loaders(path, df, **kwargs):
    options = dict(image='file', text='text', outputs=outputs, columns=dict(box=['x1','y1','x2','y2']), label_delim='|',
                   valid_col='is_valid', item_tfms=Resize(96), bs=8)
    return MultiDataLoaders.from_df(df, path, **{**options, **kwargs})

def found(report): return {f.where: f for f in report.findings}

def test_clean_data_give_no_finding(clean):
    path,df = clean
    report = loaders(path, df).report()
    assert report.findings==[], str(report)
    assert 'Nothing stands out.' in str(report) and 'Nothing stands out.' in report._repr_html_()
    items = report.tables['items']
    assert items['items'].tolist()==[150,50]==items['looked at'].tolist()==items['pictures opened'].tolist()
    assert set(report.tables)-{'association'}=={'items','missing','pictures','duplicates','texts','classes','numbers','boxes'}
    classes = report.tables['classes']
    red = classes[(classes.name=='colour') & (classes['class']=='red')].iloc[0]
    assert red.training==(df.colour[:150]=='red').sum() and red.validation==(df.colour[150:]=='red').sum()
    new = classes[(classes.name=='tags') & (classes['class']=='new')].iloc[0]
    assert new.training==df.tags[:150].str.contains('new').sum()
    price = report.tables['numbers'].set_index('split').loc['training']
    assert price['lowest']==pytest.approx(df.price[:150].min(), rel=1e-5)
    assert price['median']==pytest.approx(df.price[:150].median(), rel=1e-5)

def test_leak_of_near_duplicates(clean, tmp_path):
    path,df = clean
    df = df.copy()
    for i,j in ((150,3), (160,7), (170,11)):
        Image.open(path/f'{j}.jpg').resize((80,80)).save(tmp_path/f'{i}.jpg', quality=70)
        df.loc[i, 'file'] = str(tmp_path/f'{i}.jpg')
        df.loc[i, ['colour','shop']] = df.loc[j, ['colour','shop']]
    report = loaders(path, df).report()
    assert len(report.findings)==1
    f = found(report)["Input 'image'"]
    assert f.figures==dict(n=3, of=50, compared=150) and 'groups=' in f.advice
    leaks = report.tables['leaks']
    df.loc[160, 'shop'] = dict(north='south', south='north')[df.shop[7]]
    wrong = loaders(path, df).report().findings[1]
    assert wrong.figures==dict(n=1, of=3, labels=dict(shop=1)) and 'different labels: shop (1)' in wrong.what
    assert [t.split(',')[0] for t in leaks.training]==['item 3','item 7','item 11']
    assert [t.split('row ')[1].split()[0] for t in leaks.validation]==['150','160','170']

def test_a_report_leaves_the_random_state(clean):
    path,df = clean
    dls = loaders(path, df, batch_tfms=aug_transforms())
    state = random.getstate(),torch.get_rng_state(),np.random.get_state()[1].tolist(),dls.train.rng.getstate()
    dls.report()
    assert state[0]==random.getstate() and torch.equal(state[1], torch.get_rng_state())
    assert state[2]==np.random.get_state()[1].tolist() and state[3]==dls.train.rng.getstate()

def test_files_and_texts_in_both_splits(clean):
    path,df = clean
    df = df.copy()
    df.loc[150, 'file'] = df.file[0]
    df.loc[151, 'text'] = df.text[1].upper()+'!'
    report = loaders(path, df).report()
    assert [(f.where, f.figures['n']) for f in report.findings]==[("Input 'image'", 1), ("Input 'text'", 1)]
    assert 'in both splits: 0.jpg' in report.findings[0].what

def test_class_only_validation_has(clean):
    path,df = clean
    df = df.copy()
    df.loc[[180,190], 'shop'] = 'west'
    blocks = {**outputs, 'shop': CategoryBlock(vocab=['north','south','west'])}
    f = found(loaders(path, df, outputs=blocks).report())["Output 'shop'"]
    assert f.figures==dict(classes=['west'], n_valid=[2])
    assert "only in the validation split: 'west' (2)" in f.what and 'stratify' in f.advice

def test_rare_and_common_classes(clean):
    path,df = clean
    df = df.copy()
    df['shop'] = 'north'
    df.loc[[1,2,3,160], 'shop'] = 'south'
    few,common = [f for f in loaders(path, df).report().findings if f.where=="Output 'shop'"]
    assert few.figures==dict(classes=['south'], n_train=[3])
    assert common.figures==dict(share=147/150, n=147)

def test_outlier_and_long_tail(clean):
    path,df = clean
    df = df.copy()
    df.loc[42, 'price'] = 99999.
    f = found(loaders(path, df).report())["Output 'price'"]
    assert f.figures==dict(n=1, of=200, values=[99999.])
    assert '99,999 (item 42, row 42 of the table, training)' in f.what
    df['price'] = np.exp(2*np.random.default_rng(0).normal(size=len(df)))
    f = found(loaders(path, df).report())["Output 'price'"]
    assert 'long tail' in f.what and "scale='log'" in f.advice and f.figures['n']>=10
    scaled = loaders(path, df, outputs={**outputs, 'price': NumberBlock(scale='log')})
    assert scaled.report().findings==[]

def test_missing_columns(clean):
    path,df = clean
    df = df.copy()
    df.loc[:79, 'price'] = None
    df['text'] = None
    df.loc[:99, 'text'] = 'some words'
    report = loaders(path, df).report()
    assert found(report)["Output 'price'"].figures==dict(training=80)
    f = [f for f in report.findings if f.where=="Input 'text'" and 'missing' in f.what][0]
    assert f.figures==dict(training=50, validation=50) and 'ModalityDropout' in f.advice
    missing = report.tables['missing'].set_index('name')
    assert missing.loc['price', 'training']==80 and missing.loc['price', 'training share']==80/150

def test_small_boxes_at_input_size(clean):
    path,df = clean
    df = df.copy()
    df.loc[[0,1,2,155], 'x2'] = df.x1+12
    assert loaders(path, df).report().findings==[]    # 12 pixels in the file are 12 pixels in the input
    f = found(loaders(path, df, item_tfms=Resize(48)).report())["Output 'box'"]
    assert f.figures==dict(n=4, of=200, shortest=6., input=(48,48))

def test_words_of_side_beside_a_flip(clean):
    path,df = clean
    df = df.copy()
    df['text'] = df.text+' on the left'
    df.loc[:9, 'text'] = [f'{i} 오른쪽' for i in range(10)]
    assert loaders(path, df).report().findings==[]
    f = found(loaders(path, df, batch_tfms=aug_transforms()).report())["Input 'text'"]
    assert f.figures==dict(n=150, of=150) and 'left (140), 오른쪽 (10)' in f.what and 'do_flip=False' in f.advice
    assert loaders(path, df, batch_tfms=aug_transforms(do_flip=False)).report().findings==[]
    df['text'] = df.file
    df['shop'] = df.shop.map(dict(north='left_shop', south='right_shop'))
    f = found(loaders(path, df, batch_tfms=aug_transforms()).report())["Output 'shop'"]
    assert f.figures==dict(n=2, of=2) and 'classes name a side' in f.what

def test_outputs_that_determine_each_other(clean):
    path,df = clean
    df = df.copy()
    df['code'] = df.colour.map(dict(red=4, blue=9, green=2))
    df['weight'] = df.price*2+1
    blocks = {**outputs, 'code': CategoryBlock, 'weight': RegressionBlock}
    report = loaders(path, df, outputs=blocks).report()
    assert [f.figures['measure'] for f in report.findings]==["Pearson's r", "Cramér's V"] or \
           [f.figures['measure'] for f in report.findings]==["Cramér's V", "Pearson's r"]
    assert all(f.figures['strength']>.999 and f.figures['items']==150 for f in report.findings)
    assert set(found(report))=={"Output 'colour' and output 'code'", "Output 'price' and output 'weight'"}

def test_input_column_that_gives_the_answer_away(clean):
    path,df = clean
    dls = MultiDataLoaders.from_df(df.assign(paid=df.price), cat_names=['shop'], cont_names=['paid'],
                                   outputs=dict(price=RegressionBlock), valid_col='is_valid', bs=8)
    f, = dls.report().findings
    assert f.where=="Input 'row' and output 'price'" and 'gives the answer away' in f.advice

def test_measures_against_known_values():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 3, 3000)
    b = np.where(rng.random(3000)<.5, a, rng.integers(0, 3, 3000))
    assert cramers_v(a, b)==pytest.approx(.5, abs=.03)           # half of the labels are copies
    assert correlation_ratio(a, a+rng.normal(size=3000)*a.std())==pytest.approx(.5**.5, abs=.03)
    assert pearson(a*1., b*1.)==pytest.approx(np.corrcoef(a, b)[0,1])
    assert cramers_v(a, rng.permutation(a))<.06 and correlation_ratio(a, rng.normal(size=3000))<.06

def test_unreadable_picture_is_a_finding(clean, tmp_path):
    path,df = clean
    df = df.copy()
    (tmp_path/'broken.jpg').write_bytes(b'no picture')
    df.loc[5, 'file'] = str(tmp_path/'broken.jpg')
    f = found(loaders(path, df).report())["Input 'image'"]
    assert f.figures==dict(n=1, of=200) and 'broken.jpg' in f.what and 'item 5' in f.what

def every_kind(path, df):
    "Loaders with every kind of output"
    df = df.copy()
    masks = []
    for i,row in df.iterrows():
        mask = Image.new('L', (96,96))
        ImageDraw.Draw(mask).rectangle([row.x1, row.y1, row.x2, row.y2], fill=1)
        mask.save(path/f'mask{i}.png')
        masks.append(f'mask{i}.png')
    df['mask'] = masks
    df['ends'] = [[[r.x1, r.y1], [r.x2, r.y2]] for r in df.itertuples()]
    df['size'] = [[r.x2-r.x1, r.y2-r.y1+r.Index%7] for r in df.itertuples()]
    df['offer'] = df.price+df.index%5
    blocks = dict(colour=CategoryBlock, tags=MultiCategoryBlock, price=RegressionBlock, size=RegressionBlock, box=BBoxBlock,
                  ends=PointBlock, mask=MaskBlock(['ground','thing']), details=GroupBlock(shop=CategoryBlock, price=RegressionBlock))
    columns = dict(box=['x1','y1','x2','y2'], details=dict(shop='shop', price='offer'))
    return loaders(path, df, outputs=blocks, columns=columns)

def test_objects(clean):
    path,df = clean
    df = df.copy()
    df['things'] = [[dict(box=[r.x1, r.y1, r.x2, r.y2], sort=r.colour, price=r.price), dict(box=[0,0,20,20], sort='red')]
                    for r in df.itertuples()]
    df.loc[7, 'things'][0]['price'] = 5000.
    report = loaders(path, df, outputs=dict(things=ObjectsBlock(sort=CategoryBlock, price=RegressionBlock)), columns=None).report()
    tables = report.tables
    assert set(tables['missing'].name)=={'image','text','things.box','things.sort','things.price'}
    red = tables['classes'].query("name=='things.sort' and `class`=='red'").iloc[0]
    assert red.training==150+(df.colour[:150]=='red').sum()
    assert tables['boxes'].boxes.tolist()==[300,100] and set(tables['boxes'].name)=={'things.box'}
    assert tables['numbers']['values'].tolist()==[150,50]
    f, = report.findings
    assert f.where=="Output 'things.price'" and f.figures==dict(n=1, of=200, values=[5000.]) and 'row 7 of' in f.what

def test_every_kind_of_output(clean):
    path,df = clean
    report = every_kind(path, df).report()
    tables = report.tables
    assert set(tables['missing'].name)>={'colour','tags','price','size','box','ends','mask','details.shop','details.price'}
    assert set(tables['classes'].name)=={'colour','tags','details.shop'}
    assert set(tables['numbers'].name)=={'price','size[0]','size[1]','details.price'}
    assert set(tables['boxes'].name)=={'box'}
    assert tables['points'][['training','validation']].values.tolist()==[[150,50]]*2
    masks = tables['masks'].set_index('class')
    assert masks.loc['thing', 'in training masks']==150
    assert report._repr_html_().count('<table')==len(tables)

def test_classes_of_masks_only_validation_has(clean):
    path,df = clean
    df = df.copy()
    for i in range(len(df)): Image.fromarray(np.full((96,96), int(i==170)*2, dtype=np.uint8)).save(path/f'plain{i}.png')
    df['mask'] = [f'plain{i}.png' for i in range(len(df))]
    report = loaders(path, df, outputs=dict(mask=MaskBlock(['a','b','c'])), columns=None).report()
    assert found(report)["Output 'mask'"].figures==dict(classes=['c'])

def test_labelled_boxes_and_the_flat_form(clean):
    path,df = clean
    df = df.copy()
    df['boxes'] = [[[r.x1, r.y1, r.x2, r.y2], [0,0,30,30]] for r in df.itertuples()]
    df['labels'] = [[r.colour, 'red'] for r in df.itertuples()]
    report = loaders(path, df, outputs=dict(boxes=BBoxBlock, labels=BBoxLblBlock), columns=None).report()
    assert report.tables['boxes'].boxes.tolist()==[300,100]
    labels = report.tables['classes'].set_index('class')
    assert labels.loc['red', 'training']==150+(df.colour[:150]=='red').sum()
    flat = DataBlock((ImageBlock, CategoryBlock, RegressionBlock), n_inp=1, get_x=ColReader('file', pref=f'{path}/'),
                     get_y=[ColReader('colour'), ColReader('price')], item_tfms=Resize(64),
                     splitter=lambda o: (list(range(150)), list(range(150,200))))
    report = MultiDataLoaders.from_dblock(flat, df, bs=8).report()
    assert report.findings==[] and report.tables['items']['pictures opened'].tolist()==[150,50]
    assert set(report.tables['classes'].name)=={'category'}

def test_one_plain_target_and_text_only(clean):
    path,df = clean
    report = MultiDataLoaders.from_df(df, text='text', outputs=CategoryBlock, columns='colour', valid_col='is_valid', bs=8).report()
    assert report.findings==[] and set(report.tables['classes'].name)=={'category'}
    df = df.assign(text=df.colour)
    f, = MultiDataLoaders.from_df(df, text='text', outputs=dict(shop=CategoryBlock), valid_col='is_valid', bs=8).report().findings
    assert f.figures==dict(n=50, of=50)

def test_limits_of_pictures_and_items(clean, monkeypatch):
    path,df = clean
    dls = loaders(path, df)
    opened = []
    plain_open = Image.open
    monkeypatch.setattr(Image, 'open', lambda *args, **kwargs: opened.append(1) or plain_open(*args, **kwargs))
    report = dls.report(n_pictures=41)
    assert 0<len(opened)<=41
    assert report.tables['items']['pictures opened'].tolist()==[20,20]
    opened.clear()
    report = dls.report(n_pictures=0, n_items=30)
    assert not opened and 'pictures' not in report.tables
    assert report.tables['items']['looked at'].tolist()==[30,30]
    assert 'pixels of the files' in str(report)

def test_a_hundred_thousand_rows(tmp_path):
    n = 100_000
    rng = np.random.default_rng(0)
    for i in range(4): draw_picture(rng, [10,10,60,60], 'red').save(tmp_path/f'{i}.jpg')
    words = np.array('red blue green shirt shoe bag long short'.split())
    df = pd.DataFrame(dict(file=[f'{i%4}.jpg' for i in range(n)], text=[' '.join(o) for o in words[rng.integers(0, 8, (n,5))]],
                           colour=words[rng.integers(0, 3, n)], shop=words[rng.integers(3, 8, n)], price=rng.normal(size=n),
                           tags=['new|sale' if o else '|' for o in rng.integers(0, 2, n)], x1=1, y1=2,
                           x2=rng.integers(40, 90, n), y2=rng.integers(40, 90, n), is_valid=np.arange(n)%5==0))
    dls = loaders(tmp_path, df)
    start = time.perf_counter()
    report = dls.report(n_pictures=100)
    taken = time.perf_counter()-start
    print(f'{taken:.1f} s for {n:,} rows')
    assert taken<20
    assert report.tables['items']['looked at'].sum()==n and report.tables['items']['pictures opened'].sum()<=100
    report = dls.report(n_pictures=0, n_items=10_000)
    assert report.tables['items']['looked at'].tolist()==[10_000]*2

@pytest.mark.parametrize('kwargs,error,words', [
    (dict(n_pictures=-1), ValueError, '`n_pictures` is -1; it takes a whole number of at least 0'),
    (dict(n_pictures='all'), TypeError, "`n_pictures` is 'all', of type str; it takes a whole number"),
    (dict(n_items=0), ValueError, '`n_items` is 0'),
    (dict(n_items=True), TypeError, '`n_items` is True'),
    (dict(seed=.5), TypeError, '`seed` is 0.5')])
def test_wrong_arguments(clean, kwargs, error, words):
    path,df = clean
    with pytest.raises(error, match='.*') as e: loaders(path, df).report(**kwargs)
    assert words in str(e.value)

def test_a_bad_value_is_a_finding_and_text_stays_text(clean):
    path,df = clean
    df = df.copy()
    df.loc[160, 'x2'] = -5
    report = loaders(path, df).report()
    assert any(f.where=="Output 'box'" and 'has no area' in f.what for f in report.findings)
    assert max(map(len, str(report).split('How many items')[0].splitlines()))<=100

def test_copies_and_sides():
    rng = np.random.default_rng(3)
    a,b = draw_picture(rng, [10,10,60,60], 'red'),draw_picture(rng, [10,10,60,60], 'red')
    assert near_pairs([look_at(o) for o in (a, b, a.resize((64,64)))])==[(0,2)]
    for text in ('the left one', 'RIGHT', '왼쪽', '오른쪽', '좌측', '左', 'à gauche'): assert sides_in(text), text
    for text in ('copyright', 'leftover', 'bright', 'theleft'): assert not sides_in(text), text
