"Several pictures or texts share one encoder: `multi_learner(…, share=…)`"
import subprocess, sys
import pytest
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.models.trunk import SharedTrunk
from tests.small_models import save_bert

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:Input ')]

def table(path):
    "The drawn set with a second picture and a second text. Some are missing"
    df = pd.read_csv(path/'items.csv')
    df['back'] = df.file.values[::-1]
    df['note'] = [f'note {c} {k}' for c,k in zip(df.colour, df.kind)]
    df.loc[:6, 'back'] = None
    df.loc[3:9, 'note'] = None
    df['valid'] = [i%4==3 for i in range(len(df))]
    return df

def loaders(path, **kwargs):
    given = dict(image=dict(front='file', back='back'), text=dict(title='caption', body='note'), valid_col='valid',
                 outputs=dict(kind=CategoryBlock, area=RegressionBlock), item_tfms=Resize(32), bs=16, device='cpu',
                 text_block=PlainTextBlock(shared=True), num_workers=0)
    return MultiDataLoaders.from_df(table(path), path, **{**given, **kwargs})

def cnn(): return simple_cnn(2, width=4, bn=True)

def trained(learn, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, **kwargs)
    return learn

@pytest.fixture(scope='module')
def learn(shapes): return trained(multi_learner(loaders(shapes), cnn, share=True, modality_dropout=.2))

def n_params(o): return sum(p.numel() for p in o.parameters())

def test_one_set_of_weights_counted_once(shapes, learn):
    apart,together = [multi_learner(loaders(shapes), cnn, share=share) for share in (None, ['front','back'])]
    assert n_params(apart.model)-n_params(together.model)==n_params(together.model.encoders['front'])
    encoders = learn.model.encoders
    assert encoders['front'] is encoders['back'] and encoders['title'].emb is encoders['body'].module.emb
    ids = [id(p) for g in learn.splitter(learn.model) for p in g]
    assert len(ids)==len(set(ids))==len(list(learn.model.parameters()))
    summary = learn.summary()
    assert 'the encoder of front' in summary and 'the encoder of title' in str(learn)
    ax = plot_model(learn)
    said = ' '.join(t.get_text() for t in ax.texts)
    plt.close('all')
    assert 'front and back: simple_cnn' in said and 'title and body: BagEncoder' in said

def test_what_stands_for_a_missing_input_stays_its_own(learn):
    view = first(learn.model.views.values())
    assert {*view.absents}>={'front','back','title','body'}
    front,back = view.absents['front'].vector,view.absents['back'].vector
    assert view.absents['back'].n_absent>0 and not torch.equal(front, back)

def test_a_shared_trunk_reads_each_picture_as_alone(learn):
    "In evaluation, a picture's maps do not depend on the other pictures, whatever their size"
    trunk = learn.model.encoders['front'].eval()
    front,back = torch.rand(3,3,32,32),torch.rand(3,3,32,32)
    back[1] = math.nan
    with torch.no_grad():
        together = trunk(front, back)
        in_turn = trunk(front, torch.rand(3,3,24,24))
        for one,x in zip(together, (front,back)):
            torch.testing.assert_close(one['kind'][-1], trunk(x)['kind'][-1])
            assert torch.equal(one['kind'].here, trunk(x)['kind'].here)
        torch.testing.assert_close(in_turn[0]['kind'][-1], together[0]['kind'][-1])
        assert in_turn[1]['kind'][-1].shape[-1]==6

def test_batch_norm_sees_the_pictures_of_all_that_share():
    "In training, the statistics are those of one batch with all present pictures"
    body = image_encoder(cnn())
    alone = deepcopy(body)
    trunk = SharedTrunk(body, dict(kind=None))
    front,back = torch.rand(4,3,16,16),torch.rand(4,3,16,16)+1
    back[0] = math.nan
    trunk(front, back)
    alone.feature_maps(torch.cat([front, back]))
    for a,b in zip(trunk.buffers(), alone.buffers()): assert torch.allclose(a.float(), b.float())
    before = [b.clone() for b in trunk.buffers()]
    trunk(torch.full_like(front, math.nan), torch.full_like(front, math.nan))
    assert all(torch.equal(a, b) for a,b in zip(trunk.buffers(), before))

@pytest.mark.parametrize('options', [dict(depth=dict(kind=1)), dict(split=1), dict(split=0)])
@pytest.mark.parametrize('level', ['features','parameters'])
def test_depth_split_and_balancing(shapes, options, level):
    learn = multi_learner(loaders(shapes), cnn, share=['front','back'], **options)
    trained(learn, cbs=GradientBalance('pcgrad', level=level))
    assert all(p.grad is None or p.grad.isfinite().all() for p in learn.model.parameters())
    assert learn.model.encoders['front'] is learn.model.encoders['back']

def test_frozen_by_name_and_rates(shapes):
    learn = multi_learner(loaders(shapes), cnn, share=True)
    learn.freeze('front')
    assert not any(p.requires_grad for p in learn.model.encoders['back'].parameters())
    learn.unfreeze('front')
    with pytest.raises(ValueError, match="'front' and 'back' share parameters"):
        learn.rates(1e-3, dict(front=1e-4, back=1e-5))
    trained(learn)

def test_a_pretrained_trunk_is_frozen_and_fine_tuned(shapes, tmp_path):
    torch.save(resnet18().state_dict(), tmp_path/'w.pth')
    learn = multi_learner(loaders(shapes), resnet18, depth=1, weights=tmp_path/'w.pth', share=True)
    assert not any(p.requires_grad for m in learn.model.encoders['back'].modules() for p in m.parameters(recurse=False)
                   if isinstance(m, nn.Conv2d))
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, freeze_epochs=2)
    assert [*learn.model.named_groups()][-1]=='new layers'
    assert all(v==v for v in learn.evaluate().values())

def test_stage_agreement_reads_both_pictures(shapes):
    learn = trained(multi_learner(loaders(shapes), cnn, share=True))
    res = stage_agreement(learn, batches=1)
    assert len(res)==2 and (res.abs()>0).all(axis=None)

def answers(learn, df):
    with learn.no_bar(): return learn.predict(df.iloc[40])[2].kind

def test_exported_bundled_traced(shapes, learn, tmp_path):
    df = table(shapes)
    wanted = answers(learn, df)
    learn.export(tmp_path/'learner.pkl')
    learn.save_bundle(tmp_path/'bundle', metrics=False)
    for again in (load_learner(tmp_path/'learner.pkl'), load_bundle(tmp_path/'bundle', path=shapes)):
        assert torch.allclose(answers(again, df), wanted, atol=1e-5)
        assert again.model.encoders['front'] is again.model.encoders['back']
        assert again.model.encoders['body'].module is again.model.encoders['title']
    learn.save(tmp_path/'weights')
    learn.load(tmp_path/'weights')
    assert torch.equal(answers(learn, df), wanted)
    assert learn.to_onnx(tmp_path/'learner.onnx').difference<1e-4
    assert learn.to_program(tmp_path/'learner.pt2').difference<1e-4

def test_calls_of_a_learner(shapes, learn):
    df = table(shapes)
    with learn.no_bar(), learn.no_logging():
        assert learn.tta(n=1)[0].kind.shape[0]==20
        assert 0<learn.lr_find(num_it=8, show_plot=False).valley<1
        check = modality_check(learn)
    plt.close('all')
    assert {*check.table.index.get_level_values('input')}=={'front','back','title','body'}
    row = dict(front=shapes/df.file[40], back=shapes/df.back[40], title=df.caption[40], body=df.note[40])
    for left_out in row:
        item = {k: v for k,v in row.items() if k!=left_out}
        with learn.no_bar(): assert learn.predict(item)[0].area==learn.predict(item)[0].area
    learn.explain(df.iloc[40], output='kind')
    assert len(learn.predict_df(df.head(3)))==3
    trained(learn, cbs=MixUp())

def test_one_vocabulary_over_the_columns(shapes):
    apart = loaders(shapes, text_block=PlainTextBlock()).train.named_parts()[0]
    both = loaders(shapes).train.named_parts()[0]
    assert both['title'].vocab==both['body'].vocab and both['title'].c==both['body'].c
    assert {*both['title'].vocab}>={*apart['title'].vocab}|{*apart['body'].vocab}
    with pytest.raises(ValueError, match='text_block=PlainTextBlock.shared=True.'):
        multi_learner(loaders(shapes, text_block=PlainTextBlock()), cnn, share=['title','body'])

def test_one_model_of_hugging_face_for_two_texts(shapes, tmp_path):
    save_bert(tmp_path)
    dls = loaders(shapes, image=None, text_block=PlainTextBlock(tok=str(tmp_path), max_len=16))
    learn = trained(multi_learner(dls, text=str(tmp_path), share=True))
    assert learn.model.encoders['body'].module is learn.model.encoders['title']

def test_a_module_given_once_is_one_encoder(shapes):
    assert multi_learner(loaders(shapes), cnn()).model.owners=={'back': 'front'}
    assert multi_learner(loaders(shapes), cnn(), share=False).model.owners=={}
    assert multi_learner(loaders(shapes), cnn).model.owners=={}
    with pytest.raises(ValueError, match="'front' is image, and 'title' is text"):
        multi_learner(loaders(shapes), cnn, share=['front','title'])

def test_a_neck_is_read_or_refused(shapes):
    alone = dict(image='file', text=None, text_block=None)
    n = [n_params(multi_learner(loaders(shapes, **alone), cnn, neck=neck).model) for neck in (None,4)]
    assert n[0]!=n[1]
    multi_learner(loaders(shapes, **alone), cnn, neck=0)
    with pytest.raises(ValueError, match='this fusion reads their places'):
        multi_learner(loaders(shapes), cnn, fusion='tokens', neck=4)
    with pytest.raises(ValueError, match='no input of these data does'):
        multi_learner(loaders(shapes, image=None), neck=4)
