"Answers for every kind of output: plain JSON, confidence, and predictions drawn on their pictures"
import json, pickle
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.prediction import Answer, Prediction

pytestmark = pytest.mark.usefixtures('one_thread')

OUTPUTS = dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock, eye=PointsBlock,
               mask=MaskBlock(codes=['ground','shape']), both=GroupBlock(colour=CategoryBlock, width=RegressionBlock))
COLUMNS = dict(box=['x1','y1','x2','y2'], eye=['cx','cy'], both=dict(colour='colour', width='x2'))

@pytest.fixture(scope='module')
def table(shapes, tmp_path_factory):
    "A table of pictures that are wider than high, with a mask of the box"
    folder = tmp_path_factory.mktemp('wide')
    df = pd.read_csv(shapes/'items.csv').head(40)
    for i,r in df.iterrows():
        wide = Image.new('RGB', (128,64), 'grey')
        wide.paste(Image.open(shapes/r.file), (32,0))
        wide.save(folder/f'{i}.png')
        mask = np.zeros((64,128), np.uint8)
        mask[int(r.y1):int(r.y2)+1, int(r.x1)+32:int(r.x2)+33] = 1
        Image.fromarray(mask).save(folder/f'{i}_mask.png')
    df[['x1','x2']] += 32
    return df.assign(file=[str(folder/f'{i}.png') for i in df.index], cx=(df.x1+df.x2)/2, cy=(df.y1+df.y2)/2,
                     mask=[str(folder/f'{i}_mask.png') for i in df.index])

def learner(df, outputs, **kwargs):
    columns = {n: c for n,c in COLUMNS.items() if n in outputs}
    options = {'image':'file', 'item_tfms':Resize(32, method='squish'), **kwargs}
    dls = MultiDataLoaders.from_df(df, outputs=outputs, columns=columns or None, label_delim='|', bs=8, seed=0,
                                   num_workers=0, **options)
    learn = multi_learner(dls, simple_cnn(depth=2, width=4), pretrained=False)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.fixture(scope='module')
def learn(table): return learner(table, OUTPUTS, text='caption')

def test_an_answer_is_plain_json(learn, table):
    answer,targets,probs = learn.predict(table.iloc[0])
    plain = answer.to_dict()
    assert json.loads(json.dumps(plain))==plain and list(plain)==list(OUTPUTS)
    assert type(plain['kind']) is str and type(plain['area']) is float and len(plain['box'])==4
    assert set(plain['both'])=={'colour','width'} and np.array(plain['mask']).shape==(32,32)
    more = answer.to_dict(with_probs='all')
    assert json.loads(json.dumps(more))==more
    assert more['kind_probs'].keys()==set(learn.dls.vocab['kind'])
    assert more['both.colour_confidence']==max(more['both.colour_probs'].values())
    assert 'area_confidence' not in more and 'mask_probs' not in more and 0<more['mask_confidence']<=1

def test_probabilities_are_zipped_with_the_classes(learn, table):
    answer,_,probs = learn.predict(table.iloc[0])
    vocab = learn.dls.vocab['kind']
    assert answer.probs['kind']==dict(sorted(zip(vocab, probs.kind.tolist()), key=lambda o: -o[1]))
    assert next(iter(answer.probs['kind']))==answer.kind and answer.confidence['kind']==probs.kind.max()
    given = torch.tensor([t in answer.tags for t in learn.dls.vocab['tags']])
    assert answer.confidence['tags']==pytest.approx(float(torch.where(given, probs.tags, 1-probs.tags).min()))

def test_a_prediction_is_fastais_tuple_that_shows_itself(learn, table):
    p = learn.predict(table.iloc[0])
    assert isinstance(p, tuple) and len(p)==3 and len(learn.predict(table.iloc[0], with_input=True))==4
    lines = repr(p).splitlines()
    assert [l.split()[0] for l in lines[1:-1]]==list(OUTPUTS) and 'answer, targets, probs' in lines[-1]
    assert max(map(len, lines))<=100 and p._repr_html_().count('<tr>')==1+len(OUTPUTS)
    again = pickle.loads(pickle.dumps(p))
    assert isinstance(again, Prediction) and isinstance(again[0], Answer) and repr(again)==repr(p)

def test_one_plain_target_answers_as_fastai_does(table):
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=ColReader('kind'), item_tfms=Resize(32))
    learn = multi_learner(block.dataloaders(table, bs=8, num_workers=0), simple_cnn(depth=2), pretrained=False)
    p = learn.predict(table.file[0])
    assert p[0] in learn.dls.vocab and p.to_dict(True)=={'category': p[0], 'category_confidence': p[2].max()}
    assert [*learn.predict_df(table.head(2), with_probs=True)]==['category','category_confidence']
    assert [t.get_text() for t in plot_answer(learn, table.file[0]).texts][0].startswith(f'category: {p[0]} ')

def test_a_table_of_answers_has_their_confidence(learn, table):
    plain = learn.predict_df(table.head(3))
    sure = learn.predict_df(table.head(3), with_probs=True)
    pd.testing.assert_frame_equal(sure[[*plain]], plain)
    assert [*sure.columns.drop([*plain])]==['kind_confidence','tags_confidence','mask_confidence','both.colour_confidence']
    assert sure.kind_confidence[1]==pytest.approx(learn.predict(table.iloc[1]).confidence['kind'], rel=1e-4)
    every = learn.predict_df(table.head(3), with_probs='all')
    assert sum(every['both.colour_probs'][0].values())==pytest.approx(1)

def test_a_name_that_with_probs_would_take_twice(table):
    learn = learner(table.assign(kind_confidence=1.), dict(kind=CategoryBlock, kind_confidence=RegressionBlock))
    with pytest.raises(ValueError, match="add 'kind_confidence' for the output 'kind'"):
        learn.predict_df(table.head(2), with_probs=True)
    with pytest.raises(ValueError, match="`with_probs` is 'yes'"): learn.predict_df(table.head(2), with_probs='yes')

def test_a_loss_without_probabilities_has_no_confidence(table):
    class Hinge(nn.MultiMarginLoss):
        def activation(self, pred): return pred
        def decodes(self, pred): return pred.argmax(-1)
    learn = learner(table, dict(kind=CategoryBlock, area=RegressionBlock))
    learn.loss_func = dict(kind=Hinge())
    nn.init.normal_(first(learn.model.heads['kind'].parameters()), std=9.)
    assert learn.predict(table.iloc[0]).confidence=={} and 'kind' in learn.predict(table.iloc[0]).to_dict(True)

def test_an_answer_is_drawn_on_the_picture_that_was_given(learn, table):
    "The figure shows 128 by 64 pixels, although the network reads 32 by 32"
    answer = learn.predict(table.iloc[0])[0]
    ax = plot_answer(learn, table.iloc[0])
    pic,mask = ax.images
    assert pic.get_size()==mask.get_size()==(64,128)
    seen = torch.tensor(np.array(mask.get_array()))[...,3]>0
    assert torch.equal(seen, (answer.mask>0).repeat_interleave(2,0).repeat_interleave(4,1))
    box = ax.patches[0]
    assert (box.get_x(), box.get_y())==pytest.approx(answer.box[:2].tolist(), abs=1e-3)
    assert ax.collections[0].get_offsets()[0].tolist()==pytest.approx(answer.eye[0].tolist(), abs=1e-3)
    words = ' '.join(t.get_text() for t in ax.texts)
    for name in OUTPUTS: assert name in words
    assert f'kind: {answer.kind} ' in words and '%' in words and table.caption[0] in ax.get_title(loc='left').replace('\n', ' ')
    plt.close('all')

def test_an_answer_without_a_picture_is_drawn_too(learn, table):
    ax = plot_answer(learn, (None, 'a red circle'))
    assert not ax.images and ax.get_title(loc='left')=='no picture'
    assert 'kind: ' in ' '.join(t.get_text() for t in ax.texts)
    plt.close('all')

def test_all_pictures_of_an_item_are_drawn_beside_its_answer(table):
    block = MultiInputBlock(front=ImageBlock, back=ImageBlock)
    dblock = DataBlock((block, MultiOutputBlock(kind=CategoryBlock)), get_x=lambda r: (r.file, r.file),
                       get_y=lambda r: (r.kind,), item_tfms=Resize(32))
    learn = multi_learner(dblock.dataloaders(table, bs=8, num_workers=0), simple_cnn(depth=2), pretrained=False)
    assert len(plot_answer(learn, (table.file[0], table.file[1])).images)==2
    assert len(plot_answer(learn, dict(back=table.file[1])).images)==1
    plt.close('all')

def test_found_objects_are_drawn_with_their_classes(shapes):
    by_file = dict(list(pd.read_csv(shapes/'boxes.csv').groupby('file')))
    df = pd.read_csv(shapes/'items.csv').head(32)
    df['objects'] = [[dict(box=[b.x1,b.y1,b.x2,b.y2], label=b.label) for b in by_file[f].itertuples()] for f in df.file]
    dls = MultiDataLoaders.from_df(df, shapes, image='file', outputs=dict(objects=ObjectsBlock(label=CategoryBlock)),
                                   item_tfms=Resize(64), bs=8, seed=0, num_workers=0)
    learn = multi_learner(dls, simple_cnn(depth=3), lr=1e-2, heads=dict(objects=dict(width=32, convs=1)))
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(3)
    learn.tasks['objects'].threshold = .05     # three epochs give low confidence
    p = learn.predict(df.iloc[0])
    found = p.to_dict()['objects']
    assert found and json.loads(json.dumps(found))==found and f'{len(found)} object' in repr(p)
    ax = plot_answer(learn, df.iloc[0])
    assert len(ax.patches)==len(found) and found[0]['label'] in ' '.join(t.get_text() for t in ax.texts)
    plt.close('all')
