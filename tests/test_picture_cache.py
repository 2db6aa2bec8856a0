"With a cache of pictures, an epoch gives the same batches bit for bit, and reads each file once"
import os, pickle, random, time, warnings
from multiprocessing import get_context
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.data.block import CategoryBlock
from fastai.vision.augment import CropPad, FlipItem, RandomCrop, RandomResizedCrop, Resize
from fastai.vision.core import Image
from fastai.vision.data import BBoxBlock, MaskBlock, PointBlock
from fastai_multi import MultiDataLoaders, PictureCache, Shrink, multi_learner, simple_cnn
from fastai_multi.data.decoders import KeptPicture, PictureOpener
from fastai_multi.data.reader import BatchReader

pytestmark = [pytest.mark.filterwarnings("ignore:.*crops training pictures at random"),
              pytest.mark.filterwarnings("ignore:The image decoding"),
              pytest.mark.filterwarnings("ignore:.*mirrors pictures")]
n = 24

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "Pictures of several shapes and modes, each with a box, points and a mask. Two are missing"
    path = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        h,w = [(48,64),(64,40),(50,50)][i%3]
        im = Image.fromarray(rng.integers(0, 255, (h//4,w//4,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC)
        Image.fromarray(rng.integers(0, 2, (h,w), dtype=np.uint8)).save(path/f'm{i}.png')
        if i%4==1: im = im.convert('L')
        if i%4==2: im = im.convert('P')
        name = f'{i}.png' if i%4>1 else f'{i}.jpg'
        im.save(path/name)
        rows.append(dict(file=None if i in (4,9) else name, kind='abc'[i%3], x1=3, y1=4, x2=20+i%7, y2=30,
                         eyes=[[5,6],[20,10+i%5]], mask=str(path/f'm{i}.png'), is_valid=i<6))
    return path,pd.DataFrame(rows)

outputs = dict(kind=CategoryBlock, box=BBoxBlock, eyes=PointBlock, mask=MaskBlock(['o','x']))

def loaders(table, item_tfms, **kwargs):
    path,df = table
    kwargs = {**dict(bs=4, num_workers=0), **kwargs}
    return MultiDataLoaders.from_df(df, path, image='file', outputs=outputs, columns=dict(box=['x1','y1','x2','y2']),
                                    valid_col='is_valid', item_tfms=item_tfms, device='cpu', **kwargs)

def epoch(dl, seed=3):
    random.seed(seed)
    torch.manual_seed(seed)
    dl.rng = random.Random(seed)
    return list(dl)

def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, (tuple,list)):
        assert len(a)==len(b)
        for o,p in zip(a, b): same(o, p)
        return
    assert a.dtype==b.dtype and a.shape==b.shape
    assert torch.equal(*(torch.nan_to_num(o.as_subclass(torch.Tensor), -7.) for o in (a,b)))

tfms = dict(crop=lambda: [Resize(32)], squish=lambda: [Resize(32, method='squish')],
            pad=lambda: [Resize(32, method='pad')],
            resized_crop=lambda: [RandomResizedCrop(32)], shrink=lambda: [Shrink(36), Resize(32)],
            shrink_crop=lambda: [Shrink(40), RandomCrop(32)], cut=lambda: [CropPad(60), RandomResizedCrop(32)],
            own_after=lambda: [Resize(32, method='squish'), FlipItem(.5)],
            own_before=lambda: [FlipItem(.5), Resize(32)])

@pytest.mark.parametrize('name', tfms)
@pytest.mark.parametrize('decoder', ['pil','torchvision'])
@pytest.mark.filterwarnings('ignore:decoder=')
def test_the_same_batches_with_a_cache_and_without(table, name, decoder):
    "Pictures and labels are equal in training and in validation, in the first epoch and in later ones"
    plain = loaders(table, tfms[name](), decoder=decoder)
    cached = loaders(table, tfms[name](), decoder=decoder, cache=PictureCache(gb=.002))
    for a,b in zip(plain, cached):
        for seed in (3,4): same(epoch(a, seed), epoch(b, seed))
    assert len(cached.train.cache)>=n-2
    opener = BatchReader.of(cached.train).opener
    file = table[0]/table[1].file[8]
    assert type(opener(file, cached.train.parts[0].parts['image'].img_cls)) is KeptPicture

@pytest.mark.parametrize('where', ['memory','disk'])
@pytest.mark.parametrize('workers', [0,2])
def test_workers_share_it_and_the_next_epoch_decodes_nothing(table, tmp_path, where, workers):
    cache = PictureCache(where, .002, tmp_path/'kept' if where=='disk' else None)
    dls = loaders(table, [Shrink(36), Resize(32)], cache=cache, num_workers=workers, threads=2, bs=6)
    expected = [epoch(dl, 5) for dl in loaders(table, [Shrink(36), Resize(32)], bs=6)]
    same([b for b in dls.valid], expected[1])
    list(dls.train)
    seen = len(cache)
    assert seen==n-2
    for _ in range(2): list(dls.train)
    assert len(cache)==seen and cache.used<=2e6
    if workers==0: same(epoch(dls.train, 5), expected[0])

def test_a_changed_file_is_read_again(table):
    dls = loaders(table, [Resize(32, method='squish')], cache='memory')
    before = dls.valid.one_batch()[0][0]
    file = table[0]/table[1].file[0]
    data = file.read_bytes()
    try:
        Image.new('RGB', (64,48), 'red').save(file)
        after = dls.valid.one_batch()[0][0]
    finally: file.write_bytes(data)
    assert (before-after).abs().mean()>.1 and after[0].mean()>.9
    os.utime(file, ns=(0,time.time_ns()))
    same(dls.valid.one_batch()[0][0], before)

def test_a_damaged_entry_is_read_from_its_picture(table, tmp_path):
    "The entry is cut short, has other bytes or is empty. The store is repaired afterwards"
    expected = loaders(table, [Resize(32)]).valid.one_batch()
    cache = PictureCache('disk', .01, tmp_path/'kept')
    valid = loaders(table, [Resize(32)], cache=cache).valid
    same(valid.one_batch(), expected)
    for k,file in enumerate(sorted(cache.store.files())):
        data = file.read_bytes()
        file.write_bytes([data[:-9], data[:60]+b'xxxx'+data[64:], b'', data][k%4])
    for _ in range(2): same(valid.one_batch(), expected)
    assert len(cache)==len(PictureCache('disk', .01, tmp_path/'kept'))==4

def test_a_disk_that_cannot_be_written_stops_the_cache_and_not_the_training(table, tmp_path, monkeypatch):
    valid = loaders(table, [Resize(32)], cache=PictureCache('disk', folder=tmp_path/'kept')).valid
    def full(self, data): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.warns(UserWarning, match='cannot be written.*No space left.*read from their own files'): list(valid)
    same(list(valid), list(loaders(table, [Resize(32)]).valid))

def put_all(cache, pictures):
    for k,v in pictures.items(): cache.put(k, v)

@pytest.mark.parametrize('where', ['memory','disk'])
def test_processes_that_write_the_same_pictures_at_once(table, tmp_path, where):
    "Every picture is stored once and complete, and a killed writer destroys nothing"
    from fastai_multi.data.picturecache import KeptPixels
    rng = np.random.default_rng(0)
    pictures = {bytes([i])*16: KeptPixels((9,9), rng.integers(0, 255, (30,30,3), dtype=np.uint8)) for i in range(1, 60)}
    cache = PictureCache(where, .01, tmp_path/'kept' if where=='disk' else None)
    cache.start(0)
    fork = get_context('fork')
    writers = [fork.Process(target=put_all, args=(cache, pictures)) for _ in range(4)]
    for p in writers: p.start()
    writers[0].kill()
    for p in writers: p.join()
    cache.store.turn.seconds = .1    # the killed process may hold the lock
    put_all(cache, pictures)
    whole = [k for k in pictures if cache.get(k) is not None]
    assert len(whole)>=len(pictures)-1
    for k in whole: assert (cache.get(k).pixels==pictures[k].pixels).all()

def test_a_full_cache_keeps_what_it_has(table):
    cache = PictureCache(gb=5e-5)
    dls = loaders(table, [Resize(32)], cache=cache)
    same(list(dls.valid), list(loaders(table, [Resize(32)]).valid))
    held = len(cache)
    assert 0<held<6 and cache.used<=5e4
    same(list(dls.valid), list(loaders(table, [Resize(32)]).valid))
    assert len(cache)==held

def test_learners_predictions_and_copies_carry_no_cache(table, tmp_path):
    dls = loaders(table, [Resize(32)], cache='memory')
    learn = multi_learner(dls, simple_cnn, pretrained=False)
    list(dls.valid)
    held = len(dls.valid.cache)
    learn.predict(table[0]/table[1].file[20])
    assert dls.test_dl(table[1][:3]).cache is None
    list(dls.test_dl(table[1][:8]))
    assert len(dls.valid.cache)==held
    learn.export(tmp_path/'learner.pkl')
    assert dls.valid.cache is not None
    assert pickle.loads(pickle.dumps(dls.valid)).cache is None
    assert dls.valid.new().cache is dls.train.cache
    assert os.path.getsize(tmp_path/'learner.pkl')<2e6

def test_words(table):
    for cache in ('ram', 3, True):
        with pytest.raises(ValueError, match="`cache` is .*'memory', 'disk', a PictureCache"):
            loaders(table, [Resize(32)], cache=cache)
    with pytest.raises(ValueError, match="`decoder` is 'cv2'; it takes 'pil' or 'torchvision'"):
        loaders(table, [Resize(32)], decoder='cv2')
    with pytest.warns(UserWarning, match=r'`RandomResizedCrop` crops training pictures at random.*Shrink\(size\)'):
        loaders(table, [RandomResizedCrop(32)], cache='memory')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dls = loaders(table, [Shrink(40), RandomResizedCrop(32)], cache='memory')
    assert repr(dls.train.cache).startswith('PictureCache: 0 pictures')

def test_torchvision_reads_what_pil_reads(table):
    "All pixels of the float tensors differ by at most 2 of 255"
    a = loaders(table, [Resize(32)]).valid.one_batch()
    b = loaders(table, [Resize(32)], decoder='torchvision').valid.one_batch()
    assert torch.equal(a[0].isnan(), b[0].isnan())
    assert (a[0]-b[0]).nan_to_num().abs().max()<2.1/255
    same(a[1], b[1])
    test_dl = loaders(table, [Resize(32)], decoder='torchvision').test_dl(table[1][:3])
    assert test_dl.decoder.name.startswith('torchvision')
