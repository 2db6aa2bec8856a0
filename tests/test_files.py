"""Missing, too large or truncated files raise an error that names the file and the row, wherever they are opened"""
import os, subprocess, sys

import numpy as np, pandas as pd, pytest
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.vision.augment import Resize
from fastai.vision.core import Image
from fastai.vision.data import ImageBlock, MaskBlock
from fastai_multi import *

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder with pictures of 8 by 8 pixels, a pipe, a picture above the limit and one above twice the limit"
    Image.fromarray(np.full((8,8,3), 9, np.uint8)).save(tmp_path/'ok.png')
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path/'mask.png')
    Image.new('L', (40,40)).save(tmp_path/'large.png')
    Image.new('L', (80,80)).save(tmp_path/'bomb.png')
    os.mkfifo(tmp_path/'pipe')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1500)
    return tmp_path

def table(**bad):
    df = pd.DataFrame(dict(file='ok.png', mask='mask.png', kind=list('abababab'), valid=[0]*6+[1]*2))
    for column,name in bad.items(): df.loc[3,column] = name
    return df

def loaders(df, folder, **kwargs):
    usual = dict(image='file', outputs=dict(kind=CategoryBlock), valid_col='valid', bs=2, num_workers=0, device='cpu',
                 item_tfms=Resize(8), shuffle=False)
    return MultiDataLoaders.from_df(df, folder, **{**usual, **kwargs})

hostile = {'pipe': 'is a pipe, but only regular files are read', '/dev/zero': 'is a device', os.sep: 'is a folder',
           'large.png': r'1,600 pixels \(40 by 40\), but the limit is 1,500.*MAX_IMAGE_PIXELS = 1600',
           'bomb.png': 'it has 6,400 pixels, but the limit is 1,500'}

@pytest.mark.filterwarnings('ignore:Image size')
@pytest.mark.parametrize('name', hostile)
def test_hostile_files_are_refused_wherever_they_are_opened(folder, name):
    "Without the check, a pipe would hang and a device would fill the memory"
    words = rf"{name}' cannot be opened \(ValueError: .*{hostile[name]}"
    row = words+r'.*\(In item 3, row 3 of the table.\)'
    df = table(file=name)
    for kwargs in ({}, dict(item_tfms=[Resize(8), lambda im: im]), dict(threads=2)):
        with pytest.raises(ValueError, match=row): list(loaders(df, folder, **kwargs).train)
    with pytest.raises(ValueError, match=f"Output 'mask'.*{row}"):
        list(loaders(table(mask=name), folder, outputs=dict(mask=MaskBlock(['a','b']))).train)
    flat = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=ColReader('kind'),
                     splitter=ColSplitter('valid'), item_tfms=Resize(8))
    full = df.assign(file=[os.path.join(folder, f) for f in df.file])
    with pytest.raises(ValueError, match=row): list(MultiDataLoaders.from_dblock(flat, full, bs=2, num_workers=0).train)
    dls = loaders(table(), folder)
    with pytest.raises(ValueError, match=words): list(dls.test_dl([folder/'ok.png', folder/name]))
    learn = multi_learner(dls, simple_cnn(2,4), pretrained=False)
    with learn.no_bar():
        with pytest.raises(ValueError, match=row): learn.predict_df(df)
        for item in (folder/name, dict(bytes=None, path=str(folder/name))):
            with pytest.raises(ValueError, match=words): learn.predict(item)

@pytest.mark.filterwarnings('ignore:Image size')
def test_large_pictures_that_are_no_files(folder):
    learn = multi_learner(loaders(table(), folder), simple_cnn(2,4), pretrained=False)
    with learn.no_bar():
        for name in ('large.png','bomb.png'):
            with pytest.raises(ValueError, match='but the limit is 1,500'): learn.predict((folder/name).read_bytes())
        with pytest.raises(ValueError, match=r'\(40 by 40\)'): learn.predict(Image.open(folder/'large.png'))
        Image.MAX_IMAGE_PIXELS = 1600    # as the message advises
        assert learn.predict(folder/'large.png')[0]['kind'] in 'ab'

def test_from_a_worker_the_sentence_stands_alone(folder):
    "The message is the same as without workers"
    messages = []
    for n in (0, 1):
        with pytest.raises(ValueError) as e: list(loaders(table(file='pipe'), folder, num_workers=n).train)
        messages.append(str(e.value))
    assert messages[0]==messages[1] and messages[0].startswith("Input 'image': the picture")

def test_a_pipe_is_no_table(folder):
    with pytest.raises(ValueError, match='is a pipe'): MultiDataLoaders.from_csv(folder, 'pipe', image='file', outputs='kind')

@pytest.mark.parametrize('form', ['PNG','JPEG','GIF','TIFF','BMP','WEBP','PPM','TGA','JPEG2000'])
def test_broken_files_are_refused_in_words(form, tmp_path):
    "A file with random changes gives a picture or our message, never PIL's error"
    from fastai_multi.core import BadItem
    from fastai_multi.data.inputs import ImagePart
    part = ImagePart('image')
    rng = np.random.RandomState(0)
    Image.fromarray(rng.randint(0, 255, (24,24,3)).astype(np.uint8)).save(tmp_path/'f', form)
    whole = (tmp_path/'f').read_bytes()
    refused = 0
    for k in range(60):
        broken = bytearray(whole)
        for _ in range(rng.choice([1,3,10])): broken[rng.randint(min(len(whole), 40))] = rng.randint(256)
        if k%3==0: broken = broken[:rng.randint(1, len(broken))]
        try: part.read(bytes(broken))
        except BadItem as e:
            assert "Input 'image'" in str(e) or "'image': the picture" in str(e)
            refused += 1
    assert refused>5

# Files of learners

_write = """
import os, signal, sys, torch
from pathlib import Path
from fastai.vision.all import *
from fastai_multi import *
path = Path(sys.argv[1])
torch.set_num_threads(1)
df = pd.DataFrame(dict(a=[float(i) for i in range(12)], kind=['x','y']*6))
dls = MultiDataLoaders.from_df(df, path, features='a', outputs=dict(kind=CategoryBlock), bs=4, num_workers=0, seed=0)
learn = multi_learner(dls, path=path)
learn.save('model')
learn.export('export.pkl')
print(*[(path/o).stat().st_size for o in ('models/model.pth','export.pkl')], flush=True)
write = torch.serialization._save
def killed(*args, **kwargs):
    "Die when all but the end of the file is written"
    write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
if os.fork()==0:
    torch.serialization._save = killed
    learn.save('model')
os.wait()
if os.fork()==0:
    torch.serialization._save = killed
    learn.export('export.pkl')
os.wait()
if os.fork()==0:
    torch.serialization._save = killed
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=SaveModelCallback(fname='model'))
os.wait()
learn.load('model')
load_learner(path/'export.pkl')
print('whole', flush=True)
"""

def test_only_a_whole_export_is_loaded(tmp_path):
    "Files that are cut short, empty, changed by a bit or of another kind are refused"
    df = pd.DataFrame(dict(a=[float(i) for i in range(12)], kind=['x','y']*6))
    dls = MultiDataLoaders.from_df(df, tmp_path, features='a', outputs=dict(kind=CategoryBlock), bs=4, num_workers=0)
    learn = multi_learner(dls, path=tmp_path)
    learn.export('export.pkl')
    again = load_multi_learner(tmp_path/'export.pkl')
    assert again.predict([3.])[2]['kind'].tolist()==learn.predict([3.])[2]['kind'].tolist()
    whole = (tmp_path/'export.pkl').read_bytes()
    for data in (b'', whole[:1], whole[:1000], whole[:-1], whole[:-30], b'x'*500, whole[1:]):
        (tmp_path/'bad.pkl').write_bytes(data)
        with pytest.raises(ValueError, match='bad.pkl.*is not a valid export of a learner'):
            load_multi_learner(tmp_path/'bad.pkl')
    weights = next(p for p in learn.model.parameters() if p.numel()>8).detach().numpy().tobytes()
    at = whole.index(weights)
    (tmp_path/'bad.pkl').write_bytes(whole[:at]+bytes([whole[at]^1])+whole[at+1:])
    with pytest.raises(ValueError, match='has changed since it was written'): load_multi_learner(tmp_path/'bad.pkl')
    learn.to_program(tmp_path/'program.pt2')
    with pytest.raises((ValueError,TypeError), match='program.pt2.*it holds something else'):
        load_multi_learner(tmp_path/'program.pt2')
    learn.save('model')
    with pytest.raises(TypeError, match=r'model.pth.*learn\.load'): load_multi_learner(tmp_path/'models'/'model.pth')
    with pytest.raises(FileNotFoundError, match="Did you mean 'export.pkl'"): load_multi_learner(tmp_path/'exprt.pkl')

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills a forked process')
def test_a_process_that_is_killed_leaves_the_old_files(tmp_path):
    "The old files stay if `save`, `export` or `SaveModelCallback` is killed while it writes"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', _write, str(tmp_path)], capture_output=True, text=True)
    lines = res.stdout.split('\n')
    assert 'whole' in lines, res.stderr[-2000:]
    sizes = [int(n) for n in lines[[i for i,l in enumerate(lines) if l.split()[:1] and l.split()[0].isdigit()][0]].split()]
    assert [(tmp_path/o).stat().st_size for o in ('models/model.pth','export.pkl')]==sizes
