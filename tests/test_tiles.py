"Training on tiles of large pictures: their contents, the split, and the way back to the picture"
import numpy as np
import pandas as pd
import warnings
import pytest
import torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import absent, untyped
from fastai_multi.data.crops import *
from fastai_multi.data.readers import *
from fastai_multi.data.surfaces import *
from fastai_multi.data.tile import *
from fastai_multi.tiles import *

@pytest.fixture(autouse=True)
def single(one_thread): pass

# Laws

def cuts(n, seed=0):
    "Random sizes of a picture, a tile and an overlap"
    rng = np.random.default_rng(seed)
    for _ in range(n):
        w,h = rng.integers(1, 300, 2).tolist()
        tile = int(rng.integers(2, 120))
        yield w, h, tile, int(rng.integers(0, tile)), rng

def test_every_pixel_is_in_a_tile():
    for w,h,tile,overlap,_ in cuts(300):
        seen = np.zeros((h,w), bool)
        frames = tile_frames(w, h, tile, overlap)
        for x1,y1,x2,y2 in frames:
            assert (x2-x1, y2-y1)==(min(tile, w), min(tile, h))
            seen[y1:y2,x1:x2] = True
        assert seen.all()
        assert len(frames)==len(set(frames))

def pictures(n, most=lambda overlap: overlap):
    "Random cuts with boxes up to the size of the overlap, also on the edges of pictures and tiles"
    for w,h,tile,overlap,rng in cuts(n):
        side = most(overlap)
        if side<1 or len(tile_frames(w, h, tile, overlap))>200: continue
        boxes = []
        for _ in range(rng.integers(0, 7)):
            bw,bh = rng.integers(1, min(side, w)+1),rng.integers(1, min(side, h)+1)
            x,y = rng.integers(0, w-bw+1),rng.integers(0, h-bh+1)
            boxes.append([int(x), int(y), int(x+bw), int(y+bh)])
        yield (w,h), tile, overlap, boxes

def tiles_with(boxes, size, tile, overlap):
    "For each frame, its objects: the box in the whole picture, its name, and whether it is a crowd"
    names = [f'n{i}' for i in range(len(boxes))]
    part = ObjectsBlock(kind=CategoryBlock).make_part('objects', False)
    rows = [dict(box=b, kind=n) for b,n in zip(boxes, names)]
    for frame in tile_frames(*size, tile, overlap):
        found = part.in_tile(rows, Tile('', frame, size), .5)
        for box,kind,crowd in zip(found['box'], found['kind'], found['crowd']):
            yield frame, [v+frame[k%2] for k,v in enumerate(box)], kind, crowd

def area_of(b): return (b[2]-b[0])*(b[3]-b[1])

def test_small_objects_are_whole_in_some_tile():
    "Boxes of tiles are the picture's boxes clipped to the tile, and each box up to the overlap is whole in some tile"
    n = 0
    for size,tile,overlap,boxes in pictures(120):
        whole = set()
        for (x1,y1,x2,y2),box,kind,crowd in tiles_with(boxes, size, tile, overlap):
            given = boxes[int(kind[1:])]
            assert box==[max(given[0],x1), max(given[1],y1), min(given[2],x2), min(given[3],y2)]
            assert crowd==(area_of(box)<.5*area_of(given))
            if box==given: whole.add(kind)
        assert len(whole)==len(boxes)
        n += len(boxes)
    assert n>150

def test_merged_tiles_are_the_picture():
    "Merging the true boxes of all tiles gives the picture's boxes, if these are at least 3 pixels below the overlap"
    n = 0
    for size,tile,overlap,boxes in pictures(120, lambda overlap: overlap-3):
        rows,cut = [],[]
        for frame,box,kind,crowd in tiles_with(boxes, size, tile, overlap):
            if crowd: continue
            rows.append(dict(box=box, kind=kind, score=1.))
            cut.append(touches_seam(box, frame, size))
        merged = merge_tiles(rows, cut, 'kind')
        assert sorted((o['kind'], o['box']) for o in merged)==[(f'n{i}', b) for i,b in enumerate(boxes)]
        n += len(boxes)
    assert n>150

# Loaders

KINDS = ['dot','bar']

def draw_pictures(path, n=10, size=(300,200), objects=6, seed=0):
    "Draw large pictures with small objects, masks, depths, points and a category"
    rng = np.random.default_rng(seed)
    rows = []
    w,h = size
    for i in range(n):
        a = np.full((h,w,3), 200, dtype=np.uint8)
        a[...,2] = np.arange(w)%256          # each column has its own colour
        mask = np.zeros((h,w), dtype=np.uint8)
        found = []
        for k in range(objects):
            x,y = int(rng.integers(0, w-12)), int(rng.integers(0, h-12))
            kind = KINDS[k%2]
            bw,bh = (8,8) if kind=='dot' else (12,6)
            a[y:y+bh,x:x+bw] = (220,30,30) if kind=='dot' else (30,160,30)
            mask[y:y+bh,x:x+bw] = 1
            found.append(dict(box=[x,y,x+bw,y+bh], kind=kind))
        Image.fromarray(a).save(path/f'{i}.png')
        Image.fromarray(mask).save(path/f'mask{i}.png')
        depth = 1+np.arange(h*w, dtype=np.float32).reshape(h,w)
        np.save(path/f'depth{i}.npy', depth)
        points = rng.integers(0, [w,h], (3,2)).astype(float).tolist()
        rows.append(dict(file=f'{i}.png', mask=f'mask{i}.png', depth=f'depth{i}.npy', objects=found, points=points,
                         place=['field','town'][i%2], x1=10., y1=20., x2=50., y2=44.))
    return pd.DataFrame(rows)

@pytest.fixture(scope='module')
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp('large')
    return path, draw_pictures(path)

def everything():
    return dict(objects=ObjectsBlock(kind=CategoryBlock), mask=SegmentationBlock(['none','thing']), depth=DepthBlock,
                points=PointsBlock(flip_pairs=[]), box=BBoxBlock, place=CategoryBlock)

def loaders(large, outputs=None, tiles=Tiles(128, overlap=32), **kwargs):
    path,df = large
    if outputs is None: outputs = dict(objects=ObjectsBlock(kind=CategoryBlock))
    if 'box' in outputs: kwargs['columns'] = dict(box=['x1','y1','x2','y2'])
    return MultiDataLoaders.from_df(df, path, image='file', outputs=outputs, tiles=tiles, **{**dict(bs=4, seed=0,
                                    num_workers=0, device='cpu'), **kwargs})

def tiles_in(dl): return dl.dataset.items.file.tolist()

def test_tiles_are_the_picture(large, capsys):
    "Tiles together give the files' pixels, masks and depths, boxes and points stay in place, and one line is printed"
    path,df = large
    dls = loaders(large, everything())
    told = capsys.readouterr().out
    assert "'place' of the whole picture" in told and told.count('\n')==1
    dl = dls.valid
    seen = {}
    for b in dl.new(bs=1, shuffle=False):
        x,y = b
        tile = tiles_in(dl)[len(seen)]
        seen[len(seen)] = tile
        x1,y1,x2,y2 = tile.frame
        row = df[df.file==Path(tile.source).name].iloc[0]
        a = np.array(Image.open(path/row.file))[y1:y2,x1:x2]
        assert np.array_equal((x[0].permute(1,2,0)*255).round().numpy(), a)
        assert np.array_equal(y.mask[0].numpy(), np.array(Image.open(path/row['mask']))[y1:y2,x1:x2])
        assert torch.allclose(y.depth[0,0].exp(), torch.from_numpy(np.load(path/row.depth)[y1:y2,x1:x2]), rtol=1e-4)
        assert dls.vocab['place'][y.place[0]]==row.place
        want = torch.tensor(row.points)
        here = ((want>=torch.tensor([x1,y1])) & (want<=torch.tensor([x2,y2]))).all(1)
        got = (y.points[0]+1)/2*torch.tensor([x2-x1,y2-y1])+torch.tensor([x1,y1])
        assert torch.equal(~y.points[0].isnan().any(-1), here)
        assert torch.allclose(got[here], want[here], atol=1e-3)
        left = np.clip(min(50,x2)-max(10,x1), 0, None)*np.clip(min(44,y2)-max(20,y1), 0, None)/(40*24)
        assert bool(y.box.isnan().any())==(left<.5)
        boxes = (y.objects.box[0]+1)/2*torch.tensor([x2-x1,y2-y1]*2)+torch.tensor([x1,y1]*2)
        for box,crowd,kind in zip(boxes, y.objects.crowd[0], y.objects.kind[0]):
            if box.isnan().any(): continue
            fits = [o for o in row.objects if o['kind']==dls.vocab['objects.kind'][kind]
                    and np.allclose(box, np.clip(o['box'], [x1,y1]*2, [x2,y2]*2), atol=1e-2)]
            assert fits
    assert len(seen)==len(dl.dataset)==2*6

def test_splits_are_by_picture(large):
    dls = loaders(large)
    files = [{str(t.source) for t in tiles_in(dl)} for dl in dls.loaders]
    assert not files[0] & files[1]
    assert [len(f) for f in files]==[8,2]
    assert 'tiles of 8 and 2 pictures' in str(describe(dls))

def test_empty_tiles(tmp_path):
    "Training keeps a share of the empty tiles, the same in each run, and validation keeps all"
    df = draw_pictures(tmp_path, 6, (600,400), objects=1)
    def counts(empty, seed=0):
        dls = loaders((tmp_path,df), tiles=Tiles(128, overlap=16, empty=empty), seed=seed)
        lists = [[len(o['box']) for o in dl.dataset.items.objects] for dl in dls.loaders]
        return [(sum(n>0 for n in o), sum(n==0 for n in o)) for o in lists], [repr(t) for t in tiles_in(dls.train)]
    (full,n),valid = counts(1.)[0]
    assert counts(0.)[0]==[(full,0), valid]
    assert counts(.25)[0]==[(full,round(n/4)), valid]
    assert valid[1]>0
    assert counts(.25)[1]==counts(.25)[1]
    assert counts(.25)[1]!=counts(.25, seed=1)[1]

def test_pictures_without_labels_are_not_empty(large):
    path,df = large
    df = df.assign(objects=[None]*4+df.objects.tolist()[4:])
    dls = loaders((path,df), tiles=Tiles(128, overlap=32, empty=0.), valid_idx=[8,9])
    nothing = dls.train.dataset.items.objects.isna()
    assert nothing.sum()==4*6
    y = dls.train.new(bs=64, shuffle=False, drop_last=False).one_batch()[1]
    assert y.objects.looked_for.isnan().all(1).sum()==4*6

def test_small_pictures_are_one_item(tmp_path):
    df = draw_pictures(tmp_path, 5, (60,40), objects=2)
    dls = loaders((tmp_path,df), bs=2)
    assert len(dls.train.dataset)==4
    x,y = dls.valid.one_batch()
    assert x.shape[-2:]==(128,128)    # padded, not enlarged
    sides = (y.objects.box[...,2:]-y.objects.box[...,:2])*64
    assert set(sides[~sides.isnan()].round().tolist()) <= {6.,8.,12.}

def values_of(dl):
    return [(x, *y.objects) for x,y in dl]

@pytest.mark.parametrize('kwargs', [dict(num_workers=2), dict(cache='memory'), dict(cache='memory', num_workers=2),
                                    dict(decoder='torchvision'), dict(threads=2), dict(cache='disk')])
def test_ways_of_reading(large, tmp_path, kwargs):
    "Workers, threads, a cache and torchvision read the same tiles, also in the second epoch"
    if kwargs.get('cache')=='disk': kwargs = dict(cache=PictureCache('disk', folder=tmp_path/'kept'))
    plain = values_of(loaders(large, item_tfms=Resize(64)).valid)
    dls = loaders(large, item_tfms=Resize(64), **kwargs)
    near = dict(atol=2/255) if kwargs.get('decoder') else dict(atol=1e-6)
    for _ in range(2):
        found = values_of(dls.valid)
        assert len(found)==len(plain)
        for a,b in zip(plain, found):
            for u,v in zip(a, b): torch.testing.assert_close(untyped(u), untyped(v), equal_nan=True, rtol=0, **near)

def test_a_cache_decodes_each_picture_once(large, monkeypatch):
    decoded = []
    load = LazyPicture.load
    def counted(self):
        if type(self) is LazyPicture: decoded.append(str(self.file))
        return load(self)
    monkeypatch.setattr(LazyPicture, 'load', counted)
    dls = loaders(large, cache='memory', tiles=Tiles(128, overlap=32, empty=1.))
    for _ in range(2):
        for _ in dls.train: pass
    assert sorted(decoded)==sorted(set(decoded))
    assert len(decoded)==8
    decoded.clear()
    for _ in loaders(large).valid: pass      # in order without a cache, a picture stays decoded for all its tiles
    assert len(decoded)==2

def test_no_picture_is_decoded_to_make_loaders(large, monkeypatch):
    "Only the first is decoded, because fastai reads one item to find its type, with and without tiles"
    from PIL import ImageFile
    decoded = []
    load = ImageFile.ImageFile.load
    def counted(self):
        decoded.append(self)
        return load(self)
    monkeypatch.setattr(ImageFile.ImageFile, 'load', counted)
    counts = []
    for tiles in (None, Tiles(128, overlap=32)):
        decoded.clear()
        loaders(large, tiles=tiles)
        counts.append(len(decoded))
    assert counts[0]==counts[1]<=2

def test_random_transforms_after_the_tile(large):
    "The middle of each dot is red after random crops, flips and rotations of tiles"
    tfms = dict(item_tfms=RandomResizedCrop(96, min_scale=.6, ratio=(1,1)),
                batch_tfms=aug_transforms(flip_vert=True, max_rotate=20, max_lighting=0, max_warp=0))
    dls = loaders(large, **tfms)
    seen = 0
    for x,y in [b for _ in range(3) for b in dls.train]:
        for i,j in (y.objects.kind==dls.vocab['objects.kind'].o2i['dot']).nonzero().tolist():
            box = (y.objects.box[i,j]+1)*48
            if y.objects.crowd[i,j] or (box[2:]-box[:2]).min()<7 or box.min()<2 or box.max()>94: continue
            cx,cy = ((box[:2]+box[2:])/2).int().tolist()
            r,g,b = x[i,:,cy,cx].tolist()
            overlapped = g>r
            assert overlapped or r>.6 and g<.4, (r,g,b)
            seen += 1
    assert seen>20

def test_other_factories(large):
    path,df = large
    objects = pd.DataFrame([dict(file=f, x1=o['box'][0], y1=o['box'][1], x2=o['box'][2], y2=o['box'][3], kind=o['kind'])
                            for f,os_ in zip(df.file, df.objects) for o in os_])
    df[['file','place']].to_csv(path/'items.csv', index=False)
    kwargs = dict(outputs=dict(objects=ObjectsBlock(kind=CategoryBlock)), objects=objects, tiles=Tiles(128, overlap=32),
                  bs=4, seed=0, num_workers=0)
    a = MultiDataLoaders.from_csv(path, image='file', **kwargs).valid.one_batch()
    b = loaders(large).valid.one_batch()
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1].objects.box.nan_to_num(9), b[1].objects.box.nan_to_num(9))
    dls = MultiDataLoaders.from_path_func(path, [path/f for f in df.file], lambda f: int(f.stem)%2, tiles=128, bs=4,
                                          num_workers=0)
    assert len(dls.valid.dataset)==2*12

@pytest.mark.parametrize('kwargs,words', [
    (dict(tiles='512'), 'tiles=512'),
    (dict(tiles=64), 'less than the tile'),
    (dict(sampler=[0,1]), 'the items are tiles'),
    (dict(outputs=dict(boxes=BBoxBlock, labels=BBoxLblBlock)), 'ObjectsBlock')])
def test_mistakes(large, kwargs, words):
    path,df = large
    df = df.assign(boxes=[[o['box'] for o in rows] for rows in df.objects], labels=[[o['kind'] for o in rows] for rows in df.objects])
    with pytest.raises((ValueError,TypeError), match=words): loaders((path,df), **kwargs)

def test_a_file_in_two_rows(large):
    path,df = large
    twice = pd.concat([df,df], ignore_index=True)
    with pytest.raises(ValueError, match="groups='file'"): loaders((path,twice))
    assert len(loaders((path,twice), groups='file').train)

# A learner

def learner(dls):
    set_seed(0)
    learn = multi_learner(dls, simple_cnn(depth=3), lr=1e-2, heads=dict(objects=dict(width=32, convs=1)))
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def test_a_learner_knows_its_tiles(large, tmp_path):
    "`predict_tiles` cuts as in training, also after an export, and gives the same objects for each batch size"
    path,df = large
    learn = learner(loaders(large, dict(objects=ObjectsBlock(kind=CategoryBlock), place=CategoryBlock)))
    learn.fit_one_cycle(2)
    learn.tasks['objects'].threshold = .1
    seen = []
    answers_of = learn.answers_of
    learn.answers_of = lambda items: seen.append([o.size for o in items]) or answers_of(items)
    want = learn.predict_tiles(path/'0.png')
    assert sum(map(len, seen))==6 and set(map(tuple, sum(seen, [])))=={(128,128)}
    assert max(map(len, seen))==4
    del learn.answers_of
    for other in (learn.predict_tiles(path/'0.png', bs=1), learn.predict_tiles(path/'0.png', tile=128, overlap=32)):
        assert [o['kind'] for o in other]==[o['kind'] for o in want]
        assert np.allclose([o['box'] for o in other], [o['box'] for o in want], atol=1e-2)
    found = learn.evaluate_tiles()
    assert set(found)=={'map50','map'} and -1<=found['map']<=found['map50']<=1
    assert learn.tasks['objects'].threshold==.1
    learn.show_results(max_n=2)
    learn.dls.show_batch(max_n=2)
    learn.dls.report(n_pictures=4)
    learn.export(tmp_path/'tiles.pkl')
    loaded = load_multi_learner(tmp_path/'tiles.pkl')
    again = loaded.predict_tiles(path/'0.png')
    assert np.allclose([o['box'] for o in again], [o['box'] for o in want], atol=1e-2)
    with pytest.raises(ValueError, match='pass one'): loaded.evaluate_tiles()
    learn.save_bundle(tmp_path/'bundle', metrics=False)
    again = load_bundle(tmp_path/'bundle').predict_tiles(path/'0.png')
    assert np.allclose([o['box'] for o in again], [o['box'] for o in want], atol=1e-2)
    assert loaded.evaluate_tiles(learn.dls.pictures[1])==found

def test_a_whole_picture_is_told(large):
    "`predict` and `predict_df` warn for a picture larger than the tiles and name `predict_tiles`, but not for a tile"
    path,df = large
    learn = learner(loaders(large))
    file = path/df.file[0]
    words = 'trained on tiles of 128 pixels.*predict_tiles'
    with pytest.warns(UserWarning, match=words): learn.predict(file)
    with pytest.warns(UserWarning, match=words): learn.predict_df(df.head(2))
    with warnings.catch_warnings(record=True) as seen, learn.no_bar():
        warnings.simplefilter('always')
        learn.predict(PILImage.create(file).crop((0,0,128,128)))
        learn.predict_tiles(file)
    assert not [w for w in seen if 'tiles' in str(w.message)]

@pytest.mark.parametrize('outputs', [dict(mask=SegmentationBlock(['none','thing'])), dict(place=CategoryBlock)])
def test_a_whole_picture_is_told_without_objects(large, outputs):
    "A learner of masks or categories that was trained on tiles warns, too; it has no `predict_tiles`"
    path,df = large
    learn = multi_learner(loaders(large, outputs), simple_cnn(depth=2))
    words = 'trained on tiles of 128 pixels.*Cut a large picture'
    with learn.no_bar(), pytest.warns(UserWarning, match=words): learn.predict(path/df.file[0])
    with learn.no_bar(), pytest.warns(UserWarning, match=words): learn.predict_df(df.head(2))
    with warnings.catch_warnings(record=True) as seen, learn.no_bar():
        warnings.simplefilter('always')
        learn.predict(PILImage.create(path/df.file[0]).crop((0,0,128,128)))
    assert not [w for w in seen if 'tiles' in str(w.message)]

def test_true_objects_score_one(large):
    "`evaluate_tiles` gives 1 to a learner that predicts the true objects"
    path,df = large
    learn = learner(loaders(large))
    truth = {}
    for row in df.itertuples(): truth[np.array(Image.open(path/row.file)).tobytes()] = row.objects
    learn.predict_tiles = lambda im, **kwargs: [{**o, 'score': .9} for o in truth[np.array(im).tobytes()]]
    assert learn.evaluate_tiles()==dict(map50=1., map=1.)
