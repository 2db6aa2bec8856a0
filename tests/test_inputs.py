"Several texts and pictures, rows of a table, and missing inputs, from the table to the prediction"
import subprocess, sys, warnings
import pytest
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.callback.adapt import AbsentInputs, ModalityDropout, trained_without

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:Input ')]

def table(path):
    "The drawn set with a second picture, a second text and a row. Some of each input are missing"
    df = pd.read_csv(path/'items.csv')
    df['back'] = df.file.values[::-1]
    df['note'] = [f'note {c} {k}' for c,k in zip(df.colour, df.kind)]
    df['shop'] = [('a','b','c')[i%3] for i in range(len(df))]
    df['place'] = [('x',None,'y')[i%3] for i in range(len(df))]
    df['age'] = np.arange(len(df))/4.
    df['width'] = [None if i%9==0 else i/10. for i in range(len(df))]
    df.loc[:10, 'caption'] = None
    df.loc[5:15, 'file'] = None
    df.loc[20:23, ['shop','place','age','width']] = None
    df['valid'] = [i%4==3 for i in range(len(df))]
    return df

everything = dict(image=['file','back'], text=dict(title='caption', body='note'), cat_names=['shop','place'],
                  cont_names=['age','width'], outputs=dict(kind=CategoryBlock, area=RegressionBlock), valid_col='valid',
                  item_tfms=Resize(32), bs=16, device='cpu')

def cnn(): return simple_cnn(2, width=4, bn=True)

@pytest.fixture(scope='module')
def data(shapes): return shapes,table(shapes)

@pytest.fixture(scope='module')
def learn(data):
    path,df = data
    res = multi_learner(MultiDataLoaders.from_df(df, path, **everything), cnn, modality_dropout=.3)
    with res.no_bar(), res.no_logging(): res.fit(1, 1e-3)
    return res

def test_every_input_has_its_name(learn):
    x = learn.dls.one_batch()[0]
    assert list(x.keys())==['file','back','title','body','row']
    assert list(learn.model.encoders.keys())==list(x.keys())
    # shop, place, FillMissing's column for width (not for age, which is missing only in whole rows) and two numbers
    assert x.row.shape[1]==5

def test_every_input_is_shown(learn):
    learn.dls.show_batch(max_n=4)
    texts = [t.get_text() for ax in plt.gcf().axes for t in ax.texts]
    assert any('row: shop' in t for t in texts) and any('back' in t for t in texts)
    plt.close('all')

def test_a_fit_with_gaps_is_finite(learn):
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert all(v==v for v in learn.evaluate().values())
    assert all(trained_without(learn.model, n) for n in learn.modalities)

@pytest.mark.parametrize('left_out', ['file','back','title','body','row'])
def test_predict_without_one_input_says_so(data, learn, left_out):
    path,df = data
    row = df.iloc[40]
    columns = dict(title=['caption'], body=['note'], row=['shop','place','age','width']).get(left_out, [left_out])
    with learn.no_bar(), pytest.warns(UserWarning, match=f"Input '{left_out}' is absent here"):
        by_row = learn.predict(row.drop(columns))
    inputs = dict(file=path/row.file, back=path/row.back, title=row.caption, body=row.note,
                  row=dict(shop=row.shop, place=row.place, age=row.age, width=row.width))
    inputs.pop(left_out)
    with learn.no_bar(): by_dict = learn.predict(inputs)
    assert by_row[0].kind==by_dict[0].kind
    assert torch.allclose(by_row[2].kind, by_dict[2].kind, atol=1e-5)
    with learn.no_bar(), pytest.warns(UserWarning, match=f"Input '{left_out}' is absent in all 3 items"):
        many = learn.predict_df(df.iloc[40:43].drop(columns=columns))
    assert many.kind.iloc[0]==by_row[0].kind

def test_a_class_that_training_never_had(data, learn):
    path,df = data
    with learn.no_bar():
        new = learn.predict(dict(body='a note', row=dict(shop='new', place='x', age=3., width=2.)))[2]
        gap = learn.predict(dict(body='a note', row=dict(place='x', age=3., width=2.)))[2]
    assert torch.equal(new.area, gap.area)

def test_a_wrong_column_of_the_row(learn):
    with learn.no_bar(), pytest.raises(KeyError, match="Did you mean 'shop'"):
        learn.predict(dict(row=dict(shops='a')))

def test_it_predicts_the_same_in_a_fresh_process(data, learn, tmp_path):
    path,df = data
    learn.export(tmp_path/'learner.pkl')
    with learn.no_bar(): here = learn.predict(df.iloc[40])[0]
    code = f"""
import warnings, pandas as pd
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai_multi import *
learn = load_learner({str(tmp_path/'learner.pkl')!r})
df = pd.read_pickle({str(tmp_path/'df.pkl')!r})
with learn.no_bar(): print(learn.predict(df.iloc[40])[0].area)
"""
    df.to_pickle(tmp_path/'df.pkl')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert abs(float(out.split()[-1])-here.area)<1e-3

def test_calls_of_a_learner(learn):
    with learn.no_bar(), learn.no_logging():
        assert learn.tta(n=1)[0].kind.shape[0]==20
        assert 'RowEncoder' in learn.summary()
    plot_model(learn)
    plt.close('all')

# Missing pictures and batch norm

def blanked(x, rows):
    res = x.clone()
    res[rows] = math.nan
    return res

def test_missing_pictures_leave_batch_norm_alone():
    "The statistics come from the present pictures, whatever is missing in the batch"
    enc = image_encoder(cnn())
    alone = deepcopy(enc)
    x = torch.rand(6,3,16,16)
    enc.feature_maps(blanked(x, [1,4])).maps()
    alone.feature_maps(x[[0,2,2,3,0,5]]).maps()    # present pictures fill the gaps in turn
    for a,b in zip(enc.buffers(), alone.buffers()): assert torch.allclose(a.float(), b.float())
    before = [b.clone() for b in enc.buffers()]
    enc.feature_maps(blanked(x, slice(None))).maps()
    assert all(torch.equal(a, b) for a,b in zip(enc.buffers(), before))

@pytest.mark.parametrize('missing', [[], [0], [0,1,2], [0,1,2,3]])
@pytest.mark.parametrize('split', [None, 1])
def test_batches_with_some_or_no_picture_train(missing, split):
    encoders = dict(image=image_encoder(cnn()), nums=vector_encoder(2))
    m = MultiModel(encoders, dict(a=2, b=1), split=split)
    x = dict(image=blanked(torch.rand(4,3,16,16), missing), nums=torch.rand(4,2))
    y = m(x)
    sum(o.pow(2).sum() for o in y).backward()
    assert all(o.isfinite().all() for o in y)
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())

def test_what_stands_for_a_missing_input_is_learned():
    m = MultiModel(dict(a=vector_encoder(2), b=vector_encoder(2)), dict(y=1))
    opt = torch.optim.SGD(m.parameters(), .1)
    x = dict(a=torch.randn(8,2), b=torch.full((8,2), math.nan))
    absent = first(m.views.values()).absents['b']
    for _ in range(3):
        opt.zero_grad()
        (m(x).y-3.).pow(2).mean().backward()
        opt.step()
    assert absent.shift.abs().sum()>0 and absent.n_absent==24
    assert trained_without(m, 'b') and not trained_without(m, 'a')

def test_modality_dropout_is_checked(data):
    path,df = data
    dls = MultiDataLoaders.from_df(df, path, text='caption', outputs=dict(kind=CategoryBlock), valid_col='valid')
    with pytest.raises(ValueError, match='these data have one'): multi_learner(dls, modality_dropout=.2)
    dls = MultiDataLoaders.from_df(df, path, **everything)
    with pytest.raises(KeyError, match="Did you mean 'title'"): multi_learner(dls, cnn, modality_dropout=dict(titel=.2))

# One input with and without a name

def test_one_named_input_behaves_as_an_unnamed_one(data):
    path,df = data
    df = df.dropna(subset=['file'])
    for image in ('file', dict(front='file')):
        dls = MultiDataLoaders.from_df(df, path, image=image, outputs=dict(kind=CategoryBlock), valid_col='valid',
                                       item_tfms=Resize(32), bs=16, device='cpu')
        learn = multi_learner(dls, cnn)
        name = first(learn.modalities)
        file = path/df.file.iloc[0]
        with learn.no_bar():
            alone = learn.predict(file)
            by_name = learn.predict({name: file})
            by_row = learn.predict(df.iloc[0])
        assert torch.equal(alone[2].kind, by_name[2].kind) and torch.equal(alone[2].kind, by_row[2].kind)

def test_two_inputs_of_one_name(data):
    path,df = data
    with pytest.raises(ValueError, match="Two inputs are called 'note'"):
        MultiDataLoaders.from_df(df, path, image=['note'], text=dict(note='note'), outputs='kind')
