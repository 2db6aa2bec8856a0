"ONNX and `torch.export` files give the learner's answers"
import json
import pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import untyped
from fastai_multi.export import ExportedModel, onnx_runner
from small_models import save_bert, save_siglip

pytest.importorskip('onnxscript')
pytestmark = pytest.mark.usefixtures('one_thread')

outputs = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=NumberBlock(range=(0, None), scale='log1p'))

def loaders(path, **kwargs):
    "Loaders of drawn shapes. Pictures are normalised"
    options = dict(outputs=dict(outputs), label_delim='|', bs=8, num_workers=0, seed=0)
    if 'image' in kwargs:
        options['outputs']['box'] = BBoxBlock
        options |= dict(columns=dict(box=['x1','y1','x2','y2']), item_tfms=Resize(32),
                        batch_tfms=Normalize.from_stats(*imagenet_stats))
    return MultiDataLoaders.from_csv(path, **options, **kwargs)

def randomised(learn):
    "The learner with random weights. Heads start at zero, which would hide mistakes before them"
    for p in learn.model.parameters(): p.data.normal_(0, .2)
    return learn

def answers_of(learn, model):
    "The predictions of `get_preds` for a batch, in your units, and the batch as inputs of the exported model"
    dl = learn.dls.valid
    x = dl.one_batch()[0]
    tensors = [x] if isinstance(x, Tensor) else list(x)
    xs = []
    for m,t in zip(learn.modalities.values(), tensors):
        t = untyped(t)
        if m.has_stages: t = t*model.std+model.mean
        xs.append(t)
    with learn.no_bar(): preds = learn.get_preds(dl=dl)[0]
    wanted = {}
    for n,task in learn.tasks.items():
        wanted[n] = preds[n][:len(tensors[0])]
        if task.to_units is not None: wanted[n] = task.to_units(wanted[n]).float()
    return xs, wanted

def test_a_picture_and_its_text(shapes, tmp_path):
    learn = randomised(multi_learner(loaders(shapes, image='file', text='caption'), simple_cnn(2, 4), fusion='gated',
                                     depth=dict(kind=1, box=2), neck=8))
    res = learn.to_onnx(tmp_path/'model.onnx')
    assert res.difference<1e-5
    assert res.inputs==dict(image='float32 batch,3,32,32', text='int64 batch,tokens')
    assert list(res.outputs)==['kind','tags','area','box']
    model = ExportedModel(learn)
    xs,wanted = answers_of(learn, model)
    for n,found in zip(wanted, onnx_runner(tmp_path/'model.onnx')(*xs)):
        assert torch.allclose(torch.from_numpy(found), wanted[n], rtol=1e-4, atol=1e-5), n

def test_pictures_alone_with_points(shapes, tmp_path):
    dls = MultiDataLoaders.from_csv(shapes, image='file', outputs=dict(kind=CategoryBlock, corner=PointBlock),
                                    columns=dict(corner=['x1','y1']), item_tfms=Resize(32), bs=8, num_workers=0)
    learn = randomised(multi_learner(dls, simple_cnn(2, 4), split=1))
    res = learn.to_onnx(tmp_path/'model.onnx')
    assert res.difference<1e-5 and res.outputs==dict(kind='float32 batch,4', corner='float32 batch,1,2')

def test_pictures_keep_the_size_of_their_files(shapes, tmp_path):
    "Without an item transform, the size comes from the files: 64 by 64 in one table and 48 by 48 in the other"
    for size in (64, 48):
        folder = multi_shapes(tmp_path/str(size), n=10, size=size, seed=0)
        dls = MultiDataLoaders.from_csv(folder, image='file', outputs=dict(kind=CategoryBlock), bs=4, num_workers=0)
        learn = randomised(multi_learner(dls, simple_cnn(2, 4)))
        assert learn.to_program(tmp_path/'model.pt2').inputs==dict(image=f'float32 batch,3,{size},{size}')

def test_an_lstm_reads_texts_of_one_length(shapes, tmp_path):
    learn = randomised(multi_learner(loaders(shapes, text='caption'), text='lstm'))
    with pytest.raises(ValueError, match='pass tokens=64'): learn.to_onnx(tmp_path/'any.onnx')
    res = learn.to_onnx(tmp_path/'new'/'model.onnx', tokens=6)
    assert res.difference<1e-5 and res.inputs==dict(text='int64 batch,6')

def test_a_plain_target_as_a_program(shapes, tmp_path):
    dls = MultiDataLoaders.from_csv(shapes, text='caption', outputs=CategoryBlock, columns='kind', bs=8, num_workers=0)
    learn = randomised(multi_learner(dls))
    assert learn.to_program(tmp_path/'new'/'model.pt2').difference<1e-6
    run = torch.export.load(tmp_path/'new'/'model.pt2').module()
    probs, = run(torch.randint(5, (4,3)))
    assert torch.allclose(probs.sum(1), torch.ones(4))

def test_a_file_that_differs_is_not_kept(shapes, tmp_path):
    learn = randomised(multi_learner(loaders(shapes, text='caption')))
    with pytest.raises(ValueError, match='differ from the learner'): learn.to_program(tmp_path/'model.pt2', tolerance=-1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_made(shapes, tmp_path):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', outputs=dict(kind=CategoryBlock),
                                    item_tfms=Resize(32), bs=8, num_workers=0)
    learn = multi_learner(dls, simple_cnn(depth=2))
    assert Path(learn.to_program(str(tmp_path/'new'/'kind.pt2')).file).exists()
    assert [o.name for o in (tmp_path/'new').iterdir()]==['kind.pt2']

# Text models of Hugging Face, and objects

def test_a_text_model_of_hugging_face(shapes, tmp_path):
    from fastai_multi.models.text import transformer_encoder
    pytest.importorskip('peft')
    save_bert(tmp_path/'bert')
    dls = loaders(shapes, text='caption', text_block=PlainTextBlock(tok=str(tmp_path/'bert'), max_len=16))
    learn = randomised(multi_learner(dls, text=transformer_encoder(tmp_path/'bert', lora=2)))
    res = learn.to_onnx(tmp_path/'model.onnx')
    assert res.difference<1e-5 and res.inputs==dict(text='int64 batch,tokens, at most 32')
    import onnxruntime
    from tokenizers import Tokenizer
    session = onnxruntime.InferenceSession(tmp_path/'model.onnx')
    meta = json.loads(session.get_modelmeta().custom_metadata_map['fastai_multi.json'])
    ids = Tokenizer.from_str(meta['inputs']['text']['tokenizer']).encode('a red circle').ids
    with learn.no_bar(): probs = learn.predict('a red circle')[2].kind
    assert np.allclose(session.run(['kind'], dict(text=np.array([ids])))[0][0], probs, atol=1e-5)
    model = ExportedModel(learn)
    xs,wanted = answers_of(learn, model)
    for n,found in zip(wanted, onnx_runner(tmp_path/'model.onnx')(*xs)):
        assert torch.allclose(torch.from_numpy(found), wanted[n], rtol=1e-4, atol=1e-5), n

def test_both_encoders_of_siglip(shapes, tmp_path):
    from fastai_multi.models.dual import dual_encoders
    save_siglip(tmp_path/'siglip')
    dual = dual_encoders(tmp_path/'siglip')
    block = PlainTextBlock(tok=str(tmp_path/'siglip'), max_len=16)
    dls = MultiDataLoaders.from_csv(shapes, image='file', text='caption', text_block=block, item_tfms=Resize(32), bs=8,
                                    outputs=dict(kind=CategoryBlock), num_workers=0)
    learn = randomised(multi_learner(dls, dict(image=dual.image), text=dual.text))
    res = learn.to_program(tmp_path/'model.pt2')
    assert res.difference<1e-5 and res.inputs['text']=='int64 batch,tokens'    # the model cuts or pads to 16

def test_objects_of_every_place(shapes, tmp_path):
    "The file gives the boxes and scores of all locations. After suppression they are the learner's objects"
    from torchvision.ops import batched_nms
    block = ObjectsBlock(colour=CategoryBlock, area=RegressionBlock)
    dls = MultiDataLoaders.from_csv(shapes, image='file', objects='boxes.csv', outputs=dict(objects=block),
                                    item_tfms=Resize(64), bs=8, num_workers=0)
    learn = multi_learner(dls, simple_cnn(3, 8), heads=dict(objects=dict(width=32, convs=1)))
    for p in learn.model.parameters(): p.data.add_(torch.randn_like(p)*.05)
    res = learn.to_onnx(tmp_path/'model.onnx')
    assert res.difference<1e-5 and list(res.outputs)==['objects.box','objects.score','objects.area']
    x = untyped(dls.valid.one_batch()[0])
    found = [torch.from_numpy(o) for o in onnx_runner(tmp_path/'model.onnx')(x)]
    with learn.no_bar(): wanted = learn.get_preds(dl=dls.valid)[0].objects
    detector = learn.tasks['objects'].detector
    seen = 0
    for i in range(len(x)):
        box,score,area = [o[i] for o in found]
        place,label = (score>detector.least).nonzero(as_tuple=True)
        big = (box[place,2:]>box[place,:2]).all(1)
        place = place[big]
        label = label[big]
        best = batched_nms(box[place], score[place,label], label, detector.nms)[:detector.most]
        n = int((~wanted.box[i,:,0].isnan()).sum())
        assert len(best)==n
        seen += n
        assert torch.allclose(score[place,label][best], wanted.score[i,:n], atol=1e-4)
        assert torch.allclose(box[place][best], wanted.box[i,:n], atol=1e-3)
        values = learn.tasks['objects'].tasks['area'].to_units(wanted.area[i,:n])
        assert torch.allclose(area[place][best], values.flatten().float(), rtol=1e-3, atol=.01)
    assert seen>0

# In 8-bit integers

def metrics_moved(res):
    "The largest change of a metric or loss, relative for values above 1"
    own = res.metrics['learner']
    return float(((res.metrics['int8']-own).abs()/own.abs().clip(lower=1)).max())

def test_int8_of_a_picture_and_its_text(shapes, tmp_path):
    learn = multi_learner(loaders(shapes, image='file', text='caption'), simple_cnn(2, 16), neck=8)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    weights = {k: v.clone() for k,v in learn.model.state_dict().items()}
    exact = learn.to_onnx(tmp_path/'exact.onnx')
    res = learn.to_onnx(tmp_path/'new'/'model.onnx', int8=True)
    assert res.inputs==exact.inputs and res.outputs==exact.outputs
    assert res.file.stat().st_size<.8*exact.file.stat().st_size
    assert res.metrics['learner'].to_dict()==learn.evaluate()
    assert metrics_moved(res)<.1
    assert all(torch.equal(v, weights[k]) for k,v in learn.model.state_dict().items())
    assert [o.name for o in (tmp_path/'new').iterdir()]==['model.onnx']

def test_int8_measures_a_network_that_it_harms(shapes, tmp_path):
    "One weight far above the others uses up the steps of its row, and the metrics show the harm"
    learn = multi_learner(loaders(shapes, text='caption'))
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    for m in learn.model.modules():
        if isinstance(m, nn.Linear): m.weight.data[:,0] += 500
    assert metrics_moved(learn.to_onnx(tmp_path/'model.onnx', int8=True))>.01

def test_int8_of_an_lstm_of_one_length(shapes, tmp_path):
    learn = multi_learner(loaders(shapes, text='caption'), text='lstm')
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    res = learn.to_onnx(tmp_path/'model.onnx', tokens=12, int8=True)
    assert res.inputs==dict(text='int64 batch,12') and metrics_moved(res)<.1

def test_int8_of_objects_and_a_plain_target(shapes, tmp_path):
    dls = MultiDataLoaders.from_csv(shapes, image='file', objects='boxes.csv', item_tfms=Resize(64), bs=8,
                                    outputs=dict(objects=ObjectsBlock(colour=CategoryBlock)), num_workers=0)
    learn = multi_learner(dls, simple_cnn(3, 8), heads=dict(objects=dict(width=32, convs=1)))
    res = learn.to_onnx(tmp_path/'objects.onnx', int8=True)
    assert 'objects_map50' in res.metrics.index or 'objects_map' in res.metrics.index
    dls = MultiDataLoaders.from_csv(shapes, image='file', outputs=CategoryBlock, columns='kind', item_tfms=Resize(32),
                                    bs=8, num_workers=0)
    learn = multi_learner(dls, simple_cnn(2, 8))
    assert metrics_moved(learn.to_onnx(tmp_path/'plain.onnx', int8=True))<.1
