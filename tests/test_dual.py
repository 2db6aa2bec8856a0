"Small CLIP and SigLIP models with random weights, saved as folders, give one learner both its encoders"
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.models.dual import dual_encoders
from small_models import save_tokenizer

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module', params=['clip','siglip'])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    n = save_tokenizer(path)
    text = dict(vocab_size=n, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=n-1)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=8)
    torch.manual_seed(0)
    if request.param=='clip':
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        transformers.CLIPModel(config).save_pretrained(path)
        processor = transformers.CLIPImageProcessor
    else:
        text['projection_size'] = 16
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        transformers.SiglipModel(config).save_pretrained(path)
        processor = transformers.SiglipImageProcessor
    processor(size=dict(height=32, width=32), crop_size=dict(height=32, width=32)).save_pretrained(path)
    return path

def test_features_are_those_of_the_model_itself(folder):
    dual = dual_encoders(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    x = torch.randn(3,3,32,32)
    length = dict(padding=True)
    if dual.text.length: length = dict(padding='max_length', max_length=16)
    ids = tok(['a red circle on the left', 'a star'], return_tensors='pt', **length).input_ids
    with torch.no_grad():
        image = model.get_image_features(pixel_values=x)
        text = model.get_text_features(input_ids=ids)
        image,text = [getattr(o, 'pooler_output', o) for o in (image, text)]    # transformers 5 returns an object
        torch.testing.assert_close(dual.image.eval()(x), image, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(dual.text.eval()(ids), text, atol=1e-5, rtol=1e-4)
        assert dual.image(torch.randn(1,3,48,40)).shape==(1,dual.image.n_features)

def test_both_halves_in_one_learner(folder, shapes, tmp_path):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', text='caption', seed=0, bs=16, num_workers=0,
                                    outputs=dict(colour=CategoryBlock, area=RegressionBlock), item_tfms=Resize(32),
                                    text_block=PlainTextBlock(tok=str(folder), max_len=16))
    dual = dual_encoders(folder)
    learn = multi_learner(dls, dict(image=dual.image), text=dual.text)
    assert not first(dual.image.parameters()).requires_grad and not first(dual.text.parameters()).requires_grad
    stats = first(t for t in dls.train.after_batch.fs if isinstance(t, Normalize))
    assert torch.allclose(stats.mean.flatten().cpu(), torch.tensor(dual.image.stats[0]), atol=1e-4)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    picture = shapes/'images/00000.jpg'
    items = ((picture,'a red star'), (picture,None), (None,'a red star'))
    with learn.no_bar(): answers = [learn.predict(i)[2] for i in items]
    assert not torch.equal(answers[0].colour, answers[1].colour)
    learn.export(tmp_path/'model.pkl')
    with learn.no_bar(): again = load_learner(tmp_path/'model.pkl').predict((picture, 'a red star'))[2]
    torch.testing.assert_close(again.colour, answers[0].colour)

def test_a_model_of_texts_alone_is_refused(tmp_path):
    n = save_tokenizer(tmp_path)
    config = transformers.BertConfig(vocab_size=n, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                     intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='BertModel, which has no halves'): dual_encoders(tmp_path)

@pytest.mark.parametrize('options', [dict(depth=2), dict(split=1), dict(depth=dict(colour=1)), dict(weights='x.pth'),
                                     dict(pretrained=False)])
def test_what_an_encoder_cannot_use_is_refused(folder, shapes, options):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', text='caption', seed=0, bs=16, num_workers=0,
                                    outputs=dict(colour=CategoryBlock, area=RegressionBlock), item_tfms=Resize(32),
                                    text_block=PlainTextBlock(tok=str(folder), max_len=16))
    dual = dual_encoders(folder)
    with pytest.raises(ValueError, match="input 'image'.*DualImageEncoder"):
        multi_learner(dls, dict(image=dual.image), text=dual.text, **options)
    with pytest.raises(ValueError, match="pass one of the two"):
        multi_learner(dls, dict(image=dual.image, text=dual.text), text='lstm')
