"`learn.explain` on drawn data gives the right results with every form of a learner, and changes nothing"
import math
import numpy as np, pandas as pd, pytest, torch
from copy import deepcopy
from PIL import Image
from fastai.vision.all import *
from fastai_multi import *
from torchvision.ops import box_iou
from fastai_multi.explanation import ColumnScores, HeatMap, WordScores
from small_models import save_bert
from tests.seen import texts_of_figure

BOX = ['x1','y1','x2','y2']
OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock)

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')

def quiet(learn):
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def train(learn, epochs, lr=1e-2):
    with learn.no_logging(): quiet(learn).fit_one_cycle(epochs, lr)
    return learn

def stir(learn):
    "The learner with random heads, because new heads answer a constant"
    with torch.no_grad():
        for p in learn.model.heads.parameters(): p.normal_(0, .2)
    return learn

# Pictures

@pytest.fixture(scope='module')
def colours(tmp_path_factory):
    "A learner of the colour of the largest object in a picture, and its table"
    set_seed(0)
    torch.set_num_threads(1)
    path = multi_shapes(tmp_path_factory.mktemp('explain')/'shapes', n=400, size=64, seed=0)
    df = pd.read_csv(path/'items.csv')
    dls = MultiDataLoaders.from_df(df, path, image='file', outputs=dict(colour=CategoryBlock), seed=0, bs=32,
                                   num_workers=0, item_tfms=Resize(64))
    return train(multi_learner(dls, simple_cnn(2, bn=True)), 6)

def right_answers(learn, output):
    "The explanations and boxes of the validation items that the learner predicts correctly"
    _,targs,decoded = learn.get_preds(with_decoded=True)
    right = (decoded[output]==targs[output]).nonzero().flatten().tolist()
    rows = [learn.dls.valid.items.iloc[i] for i in right]
    boxes = [tensor(r[BOX].astype(float).values)/32-1 for r in rows]    # from -1 to 1
    return [learn.explain(r, output)['image'] for r in rows], boxes

def shared(a, b):
    "The IoU of two boxes"
    return float(box_iou(a[None], b[None]))

def test_the_heat_of_the_colour_lies_in_the_objects_box(colours):
    "The heat is not in the box of another item, which lies elsewhere"
    heats,boxes = right_answers(colours, 'colour')
    inside = np.array([h.share_in(b) for h,b in zip(heats, boxes)])
    others = [next(b for b in boxes[i+1:]+boxes[:i] if shared(b, own)<.1) for i,own in enumerate(boxes)]
    elsewhere = np.array([h.share_in(b) for h,b in zip(heats, others)])
    area = np.array([float((b[2]-b[0])*(b[3]-b[1])/4) for b in boxes])
    print(f'{len(heats)} right answers; most of the heat inside the box: {(inside>.5).mean():.0%}; share of the heat '
          f'{inside.mean():.2f}, of the area {area.mean():.2f}; in the box of another item {elsewhere.mean():.2f}')
    assert len(heats)>60
    assert (inside>.5).mean()>=.8
    assert (inside>area).mean()>=.95
    assert area.mean()<.3 and (elsewhere>.5).mean()<.4 and elsewhere.mean()<inside.mean()-.25

def test_what_is_explained_is_the_predicted_class_unless_target_says_another(colours):
    row = colours.dls.valid.items.iloc[1]
    answer,_,probs = colours.predict(row)
    p = float(probs.colour.max())
    usual = colours.explain(row, 'colour')
    assert usual.score.words==f'colour = {answer.colour}'
    assert math.isclose(usual.value, math.log(p/(1-p)), rel_tol=1e-2)
    other = first(c for c in colours.dls.vocab['colour'] if c!=answer.colour)
    assert colours.explain(row, 'colour', other).value<usual.value

def test_an_encoder_without_maps_is_explained_by_covering_fields(shapes):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', outputs=dict(kind=CategoryBlock), bs=16, seed=0,
                                    num_workers=0, item_tfms=Resize(64))
    learn = stir(multi_learner(dls, net))
    piece = learn.explain(shapes/'images'/'00000.jpg')['image']
    assert piece.how=='fields covered' and piece.heat.shape==(7,7) and piece.heat.any()

# Texts

WORDS = 'the of a small large old new house tree river road cloud stone'.split()
DECIDES = dict(good='yes', fine='yes', bad='no', poor='no')

def stories(n=240):
    "Texts in which one word at any position decides"
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        word = str(rng.choice(list(DECIDES)))
        words = rng.choice(WORDS, 6).tolist()
        words.insert(rng.integers(0, 7), word)
        rows.append(dict(text=' '.join(words), answer=DECIDES[word], word=word, is_valid=i%4==0))
    return pd.DataFrame(rows)

def deciding_share(learn, df, n=20):
    "The share of correct answers whose deciding word has the largest attribution"
    found = []
    for _,r in df[df.is_valid].head(n).iterrows():
        e = learn.explain(r)
        if e.score.words!=f'answer = {r.answer}': continue
        found.append(e['text'].top==r.word)
    assert len(found)>.8*n
    return np.mean(found)

@pytest.mark.parametrize('text,epochs', [('bag',6), ('lstm',6), ('awd_lstm',0)])
def test_the_word_that_decides_has_the_largest_attribution(text, epochs):
    df = stories(240 if epochs else 100)
    dls = MultiDataLoaders.from_df(df, text='text', outputs=dict(answer=CategoryBlock), valid_col='is_valid', bs=32,
                                   num_workers=0)
    learn = quiet(multi_learner(dls, text=text))
    if epochs: train(learn, epochs)
    else: learn.probe()    # fits the words' weights linearly, which gradients of word vectors do not see
    assert deciding_share(learn, df)>=.9

def test_a_transformer_is_explained_by_integrated_gradients(tmp_path):
    save_bert(tmp_path, [*WORDS, *DECIDES])
    folder = str(tmp_path)
    df = stories()
    dls = MultiDataLoaders.from_df(df, text='text', outputs=dict(answer=CategoryBlock), valid_col='is_valid', bs=32,
                                   num_workers=0, text_block=PlainTextBlock(tok=folder, max_len=32))
    learn = multi_learner(dls, text=folder)
    learn.unfreeze()
    train(learn, 6)
    piece = learn.explain(df.iloc[0])['text']
    assert piece.how=='integrated gradients' and piece.tokens[0]=='[CLS]'
    assert deciding_share(learn, df)>=.9

# Rows, vectors, several inputs, missing inputs

def test_columns_show_what_a_row_and_a_vector_add():
    rng = np.random.default_rng(0)
    n = 200
    df = pd.DataFrame(dict(shop=rng.choice(['north','south'], n), age=rng.normal(size=n), noise=rng.normal(size=n),
                           v0=rng.normal(size=n), v1=rng.normal(size=n)))
    df['y'] = 3.*(df['shop']=='north') + df.age + 5*df.v1
    df['is_valid'] = np.arange(n)%4==0
    dls = MultiDataLoaders.from_df(df, features=['v0','v1'], cat_names=['shop'], cont_names=['age','noise'], bs=32,
                                   outputs=dict(y=RegressionBlock), valid_col='is_valid', num_workers=0)
    learn = train(multi_learner(dls), 12)
    item = df[df.is_valid & (df['shop']=='north') & (df.v1>1)].iloc[0]
    e = learn.explain(item)
    row,vector = e['row'],e['features']
    assert isinstance(row, ColumnScores) and row.names[0]=='shop = north'
    assert abs(float(row.scores[0]))>3*abs(float(row.scores[2]))
    assert vector.top.startswith('1 = ') and float(vector.scores[1])>2
    assert e.inputs['features']>e.inputs['row']
    assert math.isclose(e.value, learn.predict(item)[0].y, abs_tol=.05)

@pytest.fixture(scope='module')
def many(shapes):
    "A learner of two pictures, two texts and a row, some of them missing"
    df = pd.read_csv(shapes/'items.csv')
    df['behind'] = df.file.shift(1)
    df['size'] = df.area/100
    dls = MultiDataLoaders.from_df(df, shapes, image=dict(front='file', back='behind'), bs=16, seed=0, num_workers=0,
                                   text=dict(title='caption', body='colour'), cont_names=['size'], outputs=OUTPUTS,
                                   columns=dict(box=BOX), label_delim='|', item_tfms=Resize(64))
    return quiet(multi_learner(dls, simple_cnn(2, width=8, bn=True), split=1)), df

@pytest.mark.parametrize('output', OUTPUTS)
def test_several_pictures_and_texts_stand_side_by_side(many, output):
    learn,df = many
    e = learn.explain(df.iloc[5], output)
    assert [type(p) for p in e.pieces.values()]==[HeatMap, HeatMap, WordScores, WordScores, ColumnScores]
    assert e.missing==[] and set(e.inputs)==set(e.pieces)
    assert len(e.show())==6
    said = texts_of_figure()
    for name in ('front', 'back', 'title', 'body', 'row', 'whole inputs'): assert name in said

def test_missing_inputs_are_said(many):
    learn,df = many
    e = learn.explain(df.iloc[0], 'kind')
    assert e.missing==['back'] and e['back'] is None and 'back: missing' in repr(e)
    only = learn.explain(dict(title='a $red$ 빨간 circle'), 'kind')
    assert only.missing==['front','back','body','row'] and list(only.inputs)==['title']
    only.show()
    assert texts_of_figure().count('missing')==4

def test_wrong_arguments_are_answered_in_words(many):
    learn,df = many
    row = df.iloc[3]
    with pytest.raises(ValueError, match="output='kind'"): learn.explain(row)
    with pytest.raises(KeyError, match="Unknown output 'knd'. Did you mean 'kind'"): learn.explain(row, 'knd')
    with pytest.raises(KeyError, match="class of output 'kind' in `target`: 'dog'"): learn.explain(row, 'kind', 'dog')
    with pytest.raises(KeyError, match="'x1', 'y1', 'x2', 'y2'"): learn.explain(row, 'box', 'left')
    with pytest.raises(KeyError, match="number of output 'area'"): learn.explain(row, 'area', 2)
    with pytest.raises(KeyError, match="Unknown input 'titel'"): learn.explain(dict(titel='a'), 'kind')
    with pytest.raises(ValueError, match='nothing to predict from'): learn.explain(dict(title=None), 'kind')
    with pytest.raises(KeyError, match="Unknown input 'image'"): learn.explain(row, 'kind')['image']

# Every form, without a trace

FORMS = [{}, dict(depth=1), dict(depth=dict(box=1, kind=2)), dict(split=0), dict(split=1),
         dict(depth=dict(box=1), split=2), dict(depth=2, split=0), dict(after=dict(tags='kind'), split=1)]

@pytest.fixture(scope='module')
def pairs(shapes):
    return MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', text='caption', outputs=OUTPUTS, bs=16, seed=0,
                                     columns=dict(box=BOX), label_delim='|', num_workers=0, item_tfms=Resize(64))

def test_a_box_is_explained_by_its_sum_or_by_one_coordinate(pairs):
    learn = stir(quiet(multi_learner(pairs, simple_cnn(2))))
    row = pairs.valid.items.iloc[0]
    whole = learn.explain(row, 'box')
    one = learn.explain(row, 'box', target='x2')
    with torch.no_grad(): raw = learn.model.eval()(learn.dls.test_dl([row]).one_batch()[0]).box
    assert math.isclose(one.value, float(raw.reshape(-1,2)[:,0].max()), abs_tol=1e-4)
    assert math.isclose(whole.value, float(raw.sum()), abs_tol=1e-4)
    assert whole['image'].how=='gradient x map' and whole['image'].heat.min()>=0
    assert not torch.allclose(whole['image'].heat, one['image'].heat)

@pytest.mark.parametrize('form', FORMS, ids=str)
def test_every_depth_and_split(pairs, shapes, form):
    learn = stir(multi_learner(pairs, simple_cnn(3, width=4, bn=True), **form))
    item = (shapes/'images'/'00003.jpg', 'a red circle')
    for output in OUTPUTS:
        trunk = learn.model.trunks['image']
        e = learn.explain(item, output)
        assert e['image'].heat.shape==(64//2**trunk.depths[output],)*2
        if e['image'].how!='Grad-CAM': assert e['image'].heat.any()
        assert e['text'].tokens==['a','red','circle'] and e['text'].scores.isfinite().all()

@pytest.mark.parametrize('fusion', ['sum', 'gated', 'film', 'attention', 'tokens', 'late'])
@pytest.mark.parametrize('text', ['bag', 'lstm', 'awd_lstm'])
def test_every_fusion_and_text_encoder(pairs, shapes, fusion, text):
    learn = multi_learner(pairs, simple_cnn(2, width=8), fusion=fusion, text=text)
    e = learn.explain((shapes/'images'/'00003.jpg', 'a red circle'), 'kind')
    assert e['image'].how=='Grad-CAM' and e['image'].heat.isfinite().all()

def state_of(learn):
    model = learn.model
    return dict(modes={n: m.training for n,m in model.named_modules()},
                frozen={n: p.requires_grad for n,p in model.named_parameters()},
                hooks={n: (len(m._forward_hooks), len(m._backward_hooks)) for n,m in model.named_modules()},
                training=learn.training if hasattr(learn, 'training') else None, dl=id(learn.dl) if hasattr(learn, 'dl') else 0)

@pytest.mark.parametrize('training', [True, False])
def test_the_learner_stays_as_it_was(pairs, shapes, training):
    learn = stir(quiet(multi_learner(pairs, simple_cnn(2, width=8, bn=True), text='lstm', split=1)))
    learn.freeze('image')
    learn.model.train(training)
    learn.model.heads['box'].eval()
    for p in learn.model.parameters(): p.grad = torch.full_like(p, .5)
    before = state_of(learn)
    weights = deepcopy(learn.model.state_dict())
    for output in OUTPUTS: learn.explain((shapes/'images'/'00003.jpg', 'a red circle'), output)
    assert state_of(learn)==before
    assert all(torch.equal(v, weights[n]) for n,v in learn.model.state_dict().items())
    assert all(bool((p.grad==.5).all()) for p in learn.model.parameters())
    assert torch.is_grad_enabled()
    with torch.no_grad(): e = learn.explain((shapes/'images'/'00003.jpg', 'a red circle'), 'area')
    assert e['image'].heat.any()

def test_a_frozen_learner_and_one_without_names(shapes):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', outputs='kind', bs=16, seed=0, num_workers=0,
                                    item_tfms=Resize(64))
    learn = stir(multi_learner(dls, simple_cnn(2)))
    for p in learn.model.parameters(): p.requires_grad_(False)
    e = learn.explain(shapes/'images'/'00003.jpg')
    assert e['image'].heat.any() and e.inputs.keys()=={'image'}
    plain = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file', pref=shapes), get_y=ColReader('kind'),
                      item_tfms=Resize(64)).dataloaders(pd.read_csv(shapes/'items.csv'), num_workers=0, bs=16)
    flat = multi_learner(plain, simple_cnn(2))
    assert flat.explain(shapes/'images'/'00003.jpg').score.words.startswith(f'{first(flat.tasks)} = ')

def test_masks_and_points(shapes, tmp_path):
    df = pd.read_csv(shapes/'items.csv')
    masks = []
    for i,r in df.iterrows():
        mask = np.zeros((64,64), np.uint8)
        mask[int(r.y1):int(r.y2),int(r.x1):int(r.x2)] = 1
        Image.fromarray(mask).save(tmp_path/f'{i}.png')
        masks.append(tmp_path/f'{i}.png')
    df['mask'] = masks
    df['eye'] = [[[a,b]] for a,b in zip(df.x1, df.y1)]
    dls = MultiDataLoaders.from_df(df, shapes, image='file', bs=16, seed=0, num_workers=0, item_tfms=Resize(64),
                                   outputs=dict(mask=SegmentationBlock(['ground','thing']), eye=PointsBlock))
    learn = multi_learner(dls, simple_cnn(2))
    row = df.iloc[0]
    assert learn.explain(row, 'mask', target='thing').score.words=='mask: pixels of thing'
    assert learn.explain(row, 'mask')['image'].heat.isfinite().all()
    assert learn.explain(row, 'eye', target='y1').score.words=='eye: y1'

def test_an_output_without_a_score_is_refused_in_words(shapes):
    df = pd.read_csv(shapes/'items.csv')
    dls = MultiDataLoaders.from_df(df, shapes, image='file', bs=16, seed=0, num_workers=0, item_tfms=Resize(64),
                                   outputs=dict(both=GroupBlock(kind=CategoryBlock, colour=CategoryBlock)),
                                   columns=dict(both=dict(kind='kind', colour='colour')))
    learn = multi_learner(dls, simple_cnn(2))
    with pytest.raises(ValueError, match='Explain another output'): learn.explain(df.iloc[0])

def test_objects_are_refused_in_words(shapes):
    outputs = dict(kind=CategoryBlock, things=ObjectsBlock(label=CategoryBlock))
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', outputs=outputs, objects='boxes.csv', bs=16, seed=0,
                                    num_workers=0, item_tfms=Resize(64))
    learn = multi_learner(dls, simple_cnn(3))
    row = dls.valid.items.iloc[0]
    with pytest.raises(ValueError, match="no score for output 'things'"): learn.explain(row, 'things')
    assert learn.explain(row, 'kind').output=='kind'

def test_variants_answer_as_the_whole_model_does(many):
    learn,df = many
    e = stir(learn).explain(df.iloc[5], 'area')
    row = dict(front=learn.path/df.file[5], back=learn.path/df.behind[5], title=None, body=df.colour[5],
               row=dict(size=df['size'][5]))
    without = learn.explain(row, 'area')
    assert abs(e.value-without.value)>1e-3
    assert math.isclose(float(e.inputs['title']), e.value-without.value, rel_tol=1e-3, abs_tol=1e-3)

def test_an_exported_learner_explains(many, tmp_path):
    learn,df = many
    learn.path = tmp_path
    learn.export('learner.pkl')
    again = load_multi_learner(tmp_path/'learner.pkl')
    item = dict(front=PILImage.create(Image.new('RGB', (64,64), 'red')), title='a red circle', row=dict(size=3.))
    one,two = learn.explain(item, 'kind'),again.explain(item, 'kind')
    assert torch.allclose(one['front'].heat, two['front'].heat, atol=1e-5)
    assert torch.allclose(one['title'].scores, two['title'].scores, atol=1e-5)
    assert two['row'].scores.isfinite().all()
