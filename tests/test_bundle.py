"A bundle stores a learner in a folder without pickle: it predicts the same, and a damaged bundle raises an error"
import json, os, shutil, subprocess, sys, types
from pathlib import Path
import pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.bundle import bundle_files, digest
from fastai_multi.core import flat
from fastai_multi.deploy import from_hub, load_bundle
from fastai_multi.registry import NotInRegistry

pytest.importorskip('safetensors')
pytestmark = pytest.mark.usefixtures('one_thread')

def loaders(path, outputs=None, **kwargs):
    "Loaders of drawn shapes"
    options = dict(outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, area=NumberBlock(range=(0, None))),
                   label_delim='|', bs=8, num_workers=0, seed=0)
    options['outputs'].update(outputs or {})
    if 'image' in kwargs: options['item_tfms'] = Resize(32)
    return MultiDataLoaders.from_csv(path, **(options | kwargs))

def shaken(learn):
    "The learner with random weights. Heads start at zero, which would hide mistakes before them"
    for p in learn.model.parameters(): p.data.add_(torch.randn_like(p)*.05)
    return learn

box = dict(outputs=dict(box=BBoxBlock), columns=dict(box=['x1','y1','x2','y2']))
point = dict(outputs=dict(corner=PointBlock), columns=dict(corner=['x1','y1']))
cases = dict(
    concat=lambda p: multi_learner(loaders(p, image='file', text='caption', **box), simple_cnn(2, 4)),
    gated=lambda p: multi_learner(loaders(p, image='file', text='caption'), simple_cnn(2, 4), fusion='gated', neck=8),
    film=lambda p: multi_learner(loaders(p, image='file', text='caption'), simple_cnn(2, 4), fusion='film'),
    sum=lambda p: multi_learner(loaders(p, image='file', text='caption'), simple_cnn(2, 4), fusion='sum'),
    attention=lambda p: multi_learner(loaders(p, image='file', text='caption'), simple_cnn(2, 4), fusion='attention'),
    tokens=lambda p: multi_learner(loaders(p, image='file', text='caption'), simple_cnn(2, 4), fusion='tokens'),
    depth=lambda p: multi_learner(loaders(p, image='file', **point), resnet18, pretrained=False, split=1,
                                  depth=dict(kind=1, tags=2, area=2, corner=2), after=dict(area='kind')),
    normal=lambda p: multi_learner(loaders(p, image='file', batch_tfms=[*aug_transforms(do_flip=False),
                                   Normalize.from_stats(*imagenet_stats)]), simple_cnn(2, 4)),
    lstm=lambda p: multi_learner(loaders(p, text='caption'), text='lstm'),
    texts=lambda p: multi_learner(loaders(p, text=dict(a='caption', b='colour'))),
    rows=lambda p: multi_learner(loaders(p, cat_names=['colour'], cont_names=['x1','y1'])),
    numbers=lambda p: multi_learner(loaders(p, features=['x1','y1']), loss_func=dict(area=nn.L1Loss())),
    weights=lambda p: multi_learner(loaders(p, text='caption'), class_weights=dict(kind='balanced'),
                                    label_smoothing=.1),
    plain=lambda p: multi_learner(MultiDataLoaders.from_csv(p, text='caption', outputs=CategoryBlock, columns='kind',
                                                            bs=8, num_workers=0)))

@pytest.mark.parametrize('name', cases)
def test_the_same_predictions(shapes, tmp_path, name):
    learn = shaken(cases[name](shapes))
    learn.save_bundle(tmp_path/'bundle', metrics=False)
    again = load_bundle(tmp_path/'bundle', path=shapes)
    items = learn.dls.valid.items
    with learn.no_bar(), again.no_bar():
        wanted = learn.get_preds(dl=learn.dls.test_dl(items))[0]
        found = again.get_preds(dl=again.dls.test_dl(items))[0]
        for a,b in zip(flat(wanted), flat(found)): assert torch.allclose(a, b, atol=1e-6, equal_nan=True)
        assert learn.predict_df(items).equals(again.predict_df(items))

@pytest.fixture(scope='module')
def learn(shapes):
    torch.manual_seed(0)
    learn = multi_learner(loaders(shapes, image='file', text='caption'), simple_cnn(2, 4))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.tasks['tags'].cut.value = .3
    return learn

@pytest.fixture(scope='module')
def kept(learn, tmp_path_factory):
    folder = tmp_path_factory.mktemp('kept')/'bundle'
    learn.save_bundle(folder)
    return folder

@pytest.fixture
def bundle(kept, tmp_path):
    "A copy of a bundle that a test may damage"
    return Path(shutil.copytree(kept, tmp_path/'bundle'))

def with_record(bundle, change):
    "The bundle with a changed learner.json and its right checksum"
    file = bundle/'learner.json'
    record = json.loads(file.read_text())
    file.write_text(json.dumps(change(record)))
    manifest = json.loads((bundle/'manifest.json').read_text())
    manifest['files'] = {n: digest(bundle/n) for n in bundle_files}
    (bundle/'manifest.json').write_text(json.dumps(manifest))
    return bundle

def test_a_fresh_process_predicts_the_same(learn, kept, shapes):
    code = ('import sys, json, warnings; warnings.simplefilter("ignore")\n'
            'from fastai_multi.deploy import load_bundle\n'
            'learn = load_bundle(sys.argv[1])\n'
            'with learn.no_bar(): print(json.dumps(learn.predict((sys.argv[2], "a red circle"))[2].kind.tolist()))')
    picture = shapes/learn.dls.valid.items.iloc[0]['file']
    out = subprocess.run([sys.executable, '-c', code, str(kept), str(picture)], capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    with learn.no_bar(): wanted = learn.predict((picture, 'a red circle'))[2].kind
    assert torch.allclose(torch.tensor(json.loads(out.stdout)), wanted, atol=1e-6)

def test_what_goes_along(learn, kept):
    again = load_bundle(kept)
    assert again.tasks['tags'].cut.value==.3
    card = (kept/'README.md').read_text()
    for text in ('kind_accuracy', '| kind | category |', 'circle', '- torch '): assert text in card, text
    for file in kept.iterdir(): assert str(learn.path) not in file.read_bytes().decode('latin-1'), file

def test_it_can_be_trained_again(kept, shapes):
    again = load_bundle(kept)
    before = first(again.model.parameters()).clone()
    again.dls = loaders(shapes, image='file', text='caption')
    with again.no_bar(), again.no_logging(): again.fit_one_cycle(1)
    assert not torch.equal(first(again.model.parameters()), before)

@pytest.mark.parametrize('name', ['os:system', 'posix:system', 'subprocess:Popen', 'builtins:eval', 'torch.hub:load',
                                  'fastai.basics:os.system', 'fastai_multi.registry:importlib.import_module', 'a/b', 7])
def test_no_other_name_is_looked_up(bundle, name, monkeypatch):
    ran = []
    monkeypatch.setattr(os, 'system', ran.append)
    for evil in ({'is': 'name', 'of': name}, {'is': 'object', 'of': name, 'state': {'a': 1}},
                 {'is': 'partial', 'items': [{'is': 'name', 'of': name}, {'is': 'tuple', 'items': ['true']}, {}]}):
        changed = with_record(bundle, lambda r: dict(r, items=[['dls', evil], *r['items']]))
        with pytest.raises(NotInRegistry, match='not in the registry'): load_bundle(changed)
    assert not ran

def test_a_tensor_of_another_shape(bundle):
    from safetensors.torch import load_file, save_file
    tensors = load_file(bundle/'weights.safetensors')
    name = first(n for n in tensors if n.endswith('.weight') and tensors[n].ndim==2)
    tensors[name] = torch.zeros(3, 3)
    save_file(tensors, bundle/'weights.safetensors')
    with pytest.raises(ValueError, match='has shape'): load_bundle(with_record(bundle, lambda r: r))

def test_weights_that_answer_otherwise(bundle):
    from safetensors.torch import load_file, save_file
    tensors = {n: t+.5 if t.is_floating_point() else t for n,t in load_file(bundle/'weights.safetensors').items()}
    save_file(tensors, bundle/'weights.safetensors')
    with pytest.raises(ValueError, match='is not a whole bundle'): load_bundle(with_record(bundle, lambda r: r))

@pytest.mark.parametrize('name', bundle_files)
def test_changed_files(bundle, name):
    data = (bundle/name).read_bytes()
    (bundle/name).write_bytes(data[:-1]+bytes([data[-1]^1]))
    with pytest.raises(ValueError, match=f'{name} has a different SHA-256'): load_bundle(bundle)
    (bundle/name).write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match='cut short'): load_bundle(bundle)
    (bundle/name).unlink()
    with pytest.raises(ValueError, match='is missing'): load_bundle(bundle)
    (bundle/name).symlink_to('/etc/hostname')
    with pytest.raises(ValueError, match='not a regular file'): load_bundle(bundle)

def test_manifests(bundle):
    file = bundle/'manifest.json'
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(dict(manifest, format=2, versions=dict(fastai_multi='9.0'))))
    with pytest.raises(ValueError, match='written by fastai_multi 9.0'): load_bundle(bundle)
    file.write_text(json.dumps(dict(manifest, files={**manifest['files'], '../x': {}})))
    with pytest.raises(ValueError, match='its manifest lists'): load_bundle(bundle)
    file.write_text('['*100_000)
    with pytest.raises(ValueError, match='cannot be read'): load_bundle(bundle)

def test_a_folder_in_use(learn, bundle, tmp_path):
    with pytest.raises(FileExistsError, match='replace=True'): learn.save_bundle(bundle)
    learn.save_bundle(bundle, metrics=dict(score=.5), replace=True)
    assert '| score | 0.5 |' in (bundle/'README.md').read_text()
    (bundle/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='is not a bundle'): learn.save_bundle(bundle, replace=True)
    assert sorted(o.name for o in tmp_path.iterdir())==['bundle']

def test_nothing_is_left_of_a_failure(learn, tmp_path, monkeypatch):
    import safetensors.torch
    def full(*args, **kwargs): raise OSError('No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(OSError, match='No space'): learn.save_bundle(tmp_path/'bundle', metrics=False)
    assert not list(tmp_path.iterdir())
    assert len(learn.dls.train.dataset)

class Half(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.lin = nn.Linear(2, n)
        self.n_features = n
    def forward(self, x): return self.lin(x)/2

def test_a_module_of_yours(shapes, tmp_path, monkeypatch):
    learn = multi_learner(loaders(shapes, features=['x1','y1']), Half(3))
    with pytest.raises(NotInRegistry, match=r'register_part\(Half\)'):
        learn.save_bundle(tmp_path/'bundle', metrics=False)
    from fastai_multi import registry
    monkeypatch.setattr(registry, '_registered', {})
    register_part(Half)
    learn.save_bundle(tmp_path/'bundle', metrics=False)
    assert any(isinstance(m, Half) for m in load_bundle(tmp_path/'bundle').model.modules())
    registry._registered.clear()
    with pytest.raises(NotInRegistry, match='before you load'): load_bundle(tmp_path/'bundle')

def test_the_hub(learn, tmp_path, monkeypatch):
    "Calls match the signatures of `huggingface_hub`, with a folder instead of the network"
    hub = tmp_path/'hub'
    class HfApi:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, private=False, exist_ok=False): (hub/repo_id).mkdir(parents=True)
        def upload_folder(self, *, repo_id, folder_path, commit_message=None):
            shutil.copytree(folder_path, hub/repo_id, dirs_exist_ok=True)
            return f'https://hub/{repo_id}'
    def snapshot_download(repo_id, revision=None, allow_patterns=None): return str(hub/repo_id)
    fake = types.SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', fake)
    assert learn.push_to_hub('me/shapes', metrics=False, commit_message='First')=='https://hub/me/shapes'
    assert type(from_hub('me/shapes')) is MultiLearner
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ImportError, match=r'fastai_multi\[bundle\]'): from_hub('me/shapes')
