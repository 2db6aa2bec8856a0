"Bundles of Hugging Face text models, LoRA, both encoders of CLIP, masks, surfaces, objects, groups and calibration"
import json, shutil, subprocess, sys
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import flat
from fastai_multi.deploy import load_bundle
from fastai_multi.models.dual import dual_encoders
from fastai_multi.models.text import transformer_encoder
from fastai_multi.registry import NotInRegistry
from small_models import save_bert, save_siglip

pytest.importorskip('safetensors')
pytestmark = pytest.mark.usefixtures('one_thread')

def drawn_maps(path):
    "The table of drawn shapes, with a mask of each box, a depth map and a normal map"
    df = pd.read_csv(path/'items.csv')
    for name in ('mask','depth','normals'):
        (path/name).mkdir(exist_ok=True)
        df[name] = [f'{name}/{i}.png' for i in df.index]
    for r in df.itertuples():
        mask = np.zeros((64,64), np.uint8)
        mask[int(r.y1):int(r.y2), int(r.x1):int(r.x2)] = 1
        Image.fromarray(mask).save(path/r.mask)
        Image.fromarray(np.where(mask, 1000, 2000).astype(np.uint16)).save(path/r.depth)
        Image.fromarray(np.dstack([np.full_like(mask, 128), np.full_like(mask, 128), 255-100*mask])).save(path/r.normals)
    return df

def loaders(o, **kwargs):
    options = dict(outputs=dict(kind=CategoryBlock, area=RegressionBlock), image='file', item_tfms=Resize(32), bs=8,
                   num_workers=0, seed=0)
    return MultiDataLoaders.from_df(o.df, o.shapes, **(options | kwargs))

def of_texts(o, folder):
    return loaders(o, image=None, item_tfms=None, text='caption', text_block=PlainTextBlock(tok=str(folder), max_len=16))

def lora(o):
    pytest.importorskip('peft')
    return multi_learner(of_texts(o, o.bert), text=transformer_encoder(o.bert, lora=2))

def both_encoders(o):
    dual = dual_encoders(o.siglip)
    block = PlainTextBlock(tok=str(o.siglip), max_len=16)
    return multi_learner(loaders(o, text='caption', text_block=block), dict(image=dual.image), text=dual.text)

def objects(o):
    block = ObjectsBlock(colour=CategoryBlock, area=RegressionBlock)
    dls = loaders(o, objects='boxes.csv', outputs=dict(objects=block, kind=CategoryBlock),
                  item_tfms=Resize(64))
    return multi_learner(dls, simple_cnn(3, 8), heads=dict(objects=dict(width=32, convs=1)))

def group(o):
    outputs = dict(kind=CategoryBlock, both=GroupBlock(colour=CategoryBlock, width=RegressionBlock))
    dls = loaders(o, outputs=outputs, columns=dict(both=dict(colour='colour', width='x2')))
    return multi_learner(dls, simple_cnn(2, 4))

def mask(o, block): return multi_learner(loaders(o, outputs=dict(mask=block, kind=CategoryBlock)), simple_cnn(3, 4))

def surfaces(o):
    outputs = dict(depth=DepthBlock(scale=.001), normals=NormalsBlock)
    return multi_learner(loaders(o, outputs=outputs), simple_cnn(3, 4))

def calibrated(o):
    outputs = dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=RegressionBlock, box=BBoxBlock)
    dls = loaders(o, outputs=outputs, columns=dict(box=['x1','y1','x2','y2']), label_delim='|')
    return multi_learner(dls, simple_cnn(2, 4))

def timm_model(o):
    pytest.importorskip('timm')
    return multi_learner(loaders(o), 'test_vit', pretrained=False)

KINDS = dict(bert=lambda o: multi_learner(of_texts(o, o.bert), text=str(o.bert)), lora=lora, dual=both_encoders,
             mask=lambda o: mask(o, MaskBlock(['ground','shape'])),
             void=lambda o: mask(o, SegmentationBlock(['ground','shape'], void=255)),
             surfaces=surfaces, objects=objects, group=group, calibrated=calibrated, timm=timm_model)

def shaken(learn):
    "The learner with random weights. Heads start at zero, which would hide mistakes before them"
    for p in learn.model.parameters(): p.data.add_(torch.randn_like(p)*.05)
    return learn

def numbers(learn, item):
    "All values that `predict` computes, as lists"
    with learn.no_bar(): return [t.float().flatten().tolist() for t in flat(learn.predict(item)[2])]

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    "The folders of drawn shapes and of two Hugging Face models with random weights"
    root = tmp_path_factory.mktemp('kinds')
    shapes = multi_shapes(root/'shapes', n=32, size=64, seed=0)
    res = SimpleNamespace(root=root, shapes=shapes, df=drawn_maps(shapes), bert=root/'bert', siglip=root/'siglip')
    torch.manual_seed(0)
    save_bert(res.bert)
    save_siglip(res.siglip)
    return res

@pytest.fixture(scope='module')
def made(source):
    "For each kind, a learner saved as a bundle and an item. The folders of the original models are deleted"
    res = {}
    for n,make in KINDS.items():
        torch.manual_seed(0)
        learn = shaken(make(source))
        if n=='calibrated': learn.calibrate()
        folder = source.root/f'bundle-{n}'
        learn.save_bundle(folder, metrics=False)
        row = learn.dls.valid.items.iloc[0]
        item = {}
        if 'image' in learn.modalities: item['image'] = str(source.shapes/row.file)
        if 'text' in learn.modalities: item['text'] = row.caption
        res[n] = SimpleNamespace(learn=learn, item=item, folder=folder)
    for folder in (source.bert, source.siglip): shutil.rmtree(folder)
    return res

def close(found, wanted):
    assert len(found)==len(wanted)>0
    for a,b in zip(found, wanted): assert np.allclose(a, b, atol=1e-6, rtol=1e-5, equal_nan=True)

@pytest.mark.parametrize('kind', KINDS)
def test_the_same_predictions(made, source, kind):
    o = made[kind]
    again = load_bundle(o.folder, path=source.shapes)
    close(numbers(again, o.item), numbers(o.learn, o.item))
    rows = o.learn.dls.valid.items
    with o.learn.no_bar(), again.no_bar():
        wanted = o.learn.predict_df(rows, num_workers=0)
        pd.testing.assert_frame_equal(again.predict_df(rows, num_workers=0), wanted, rtol=1e-5)

CODE = '''
import json, sys, warnings
warnings.simplefilter('ignore')
from fastai_multi.core import flat
from fastai_multi.deploy import load_bundle
found = {}
for n,(folder,item) in json.load(sys.stdin).items():
    learn = load_bundle(folder)
    with learn.no_bar(): found[n] = [t.float().flatten().tolist() for t in flat(learn.predict(item)[2])]
print(json.dumps(found))
'''

@pytest.fixture(scope='module')
def elsewhere(made):
    "The predictions of each bundle in a fresh process"
    asked = json.dumps({n: (str(o.folder), o.item) for n,o in made.items()})
    out = subprocess.run([sys.executable, '-c', CODE], input=asked, capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])

@pytest.mark.parametrize('kind', KINDS)
def test_a_fresh_process_predicts_the_same(made, elsewhere, kind):
    close(elsewhere[kind], numbers(made[kind].learn, made[kind].item))

@pytest.mark.parametrize('kind', KINDS)
def test_no_folder_of_this_machine_is_named(made, source, kind):
    for file in made[kind].folder.iterdir(): assert str(source.root) not in file.read_bytes().decode('latin-1'), file

@pytest.mark.parametrize('kind', ['mask','surfaces','group'])
def test_an_exported_network_gives_the_same(made, tmp_path, kind):
    "This covers the kinds that `test_export` does not test"
    pytest.importorskip('onnxscript')
    assert made[kind].learn.to_onnx(tmp_path/'learner.onnx').difference<1e-4

def test_calibration_is_kept(made, source):
    o = made['calibrated']
    again = load_bundle(o.folder, path=source.shapes)
    assert again.calibration.outputs['kind'].temperature==o.learn.calibration.outputs['kind'].temperature
    rows = o.learn.dls.valid.items
    with o.learn.no_bar(), again.no_bar():
        assert o.learn.predict_sets(rows, .9).equals(again.predict_sets(rows, .9))
        assert str(o.learn.predict(o.item, coverage=.9)[0])==str(again.predict(o.item, coverage=.9)[0])

def test_lora_still_trains_its_own_matrices_only(made, source):
    again = load_bundle(made['lora'].folder)
    encoder = again.model.encoders['text']
    again.unfreeze()
    assert all(p.requires_grad==('lora_' in n) for n,p in encoder.model.named_parameters())
    base = {n: p.detach().clone() for n,p in encoder.model.named_parameters()}
    again.dls = made['lora'].learn.dls
    with again.no_bar(), again.no_logging(): again.fit_one_cycle(1, 1e-2)
    moved = {n for n,p in encoder.model.named_parameters() if not torch.equal(p, base[n])}
    assert moved and all('lora_' in n for n in moved)

# What a bundle cannot name

def targets(r): return dict(kind=r.kind, both=dict(colour=r.colour, width=r.x2-r.x1))

def test_a_function_of_yours_is_refused_until_it_is_registered(source, tmp_path, monkeypatch):
    outputs = dict(kind=CategoryBlock, both=GroupBlock(colour=CategoryBlock, width=RegressionBlock))
    block = DataBlock((ImageBlock, MultiOutputBlock(**outputs)), get_x=ColReader('file', pref=f'{source.shapes}/'),
                      get_y=targets, item_tfms=Resize(32), splitter=RandomSplitter(seed=0))
    dls = MultiDataLoaders.from_dblock(block, source.df, bs=8, num_workers=0, path=source.shapes)
    learn = shaken(multi_learner(dls, simple_cnn(2, 4)))
    with pytest.raises(NotInRegistry, match=r'register_part\(targets\)'): learn.save_bundle(tmp_path/'bundle')
    assert not list(tmp_path.iterdir())
    from fastai_multi import registry
    monkeypatch.setattr(registry, '_registered', {})
    register_part(targets)
    learn.save_bundle(tmp_path/'bundle', metrics=False)
    again = load_bundle(tmp_path/'bundle')
    item = source.shapes/source.df.file[0]
    close(numbers(again, item), numbers(learn, item))

class OwnConfig:
    "A class that claims to be a configuration but is none"

def test_only_configurations_of_these_packages_are_named(monkeypatch):
    from fastai_multi.registry import check_known, name_of, named_object
    transformers = pytest.importorskip('transformers')
    class Config(transformers.BertConfig): pass
    for cls in (Config, OwnConfig):
        with pytest.raises(NotInRegistry, match='register_part'): check_known(name_of(cls), cls, '')
    for name in ('transformers.utils.hub:cached_file', 'transformers.pipelines.base:Pipeline', 'peft.peft_model:PeftConfig',
                 'transformers.configuration_utils:os'):
        with pytest.raises(NotInRegistry): named_object(name)
