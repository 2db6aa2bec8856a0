"Objects as rows: many boxes per picture, each with its own named outputs, next to outputs of the whole picture"
import math, os, shutil, subprocess, sys, textwrap
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.core import IGNORE
from tests.seen import texts_of_figure

KINDS = dict(colour=CategoryBlock, kind=CategoryBlock, area=RegressionBlock)

def objects_of(boxes):
    return [dict(box=[b.x1,b.y1,b.x2,b.y2], colour=b.colour, kind=b.label, area=b.area) for b in boxes.itertuples()]

@pytest.fixture(scope='module')
def table(shapes):
    "Pictures with objects. Some kinds are missing, some pictures are not annotated, and one has no objects"
    df = pd.read_csv(shapes/'items.csv')
    by_file = dict(list(pd.read_csv(shapes/'boxes.csv').groupby('file')))
    df['objects'] = [objects_of(by_file[f]) for f in df.file]
    for rows in df.objects[::3]: rows[0]['kind'] = None
    df['objects'] = df.objects.astype(object)
    for i in range(0, len(df), 9): df.at[i,'objects'] = None
    df.at[5,'objects'] = []
    return df

def loaders(table, shapes, outputs=None, **kwargs):
    if outputs is None: outputs = dict(objects=ObjectsBlock(**KINDS), kind=CategoryBlock, tags=MultiCategoryBlock)
    kwargs = {**dict(item_tfms=Resize(64), bs=16, seed=0, num_workers=0, label_delim=dict(tags='|')), **kwargs}
    if 'tags' not in outputs: kwargs.pop('label_delim')
    return MultiDataLoaders.from_df(table, shapes, image='file', outputs=outputs, **kwargs)

def test_objects_beside_a_group_with_columns_of_its_own(table, shapes):
    "The reader gives one column of objects, and one for each member of the group"
    df = table.assign(shop=['a','b']*(len(table)//2))
    outputs = dict(details=GroupBlock(shop=CategoryBlock, size=RegressionBlock), objects=ObjectsBlock(**KINDS))
    dls = loaders(df, shapes, outputs, columns=dict(details=dict(shop='shop', size='area')))
    i = next(i for i,v in enumerate(dls.train.items.objects) if v)
    item = dls.train_ds[i][-1]
    row = dls.train.items.iloc[i]
    assert dls.vocab['details.shop'][item.details.shop]==row.shop
    assert len(item.objects.box)==len(row.objects)

def learner(dls, trunk=None, **kwargs):
    set_seed(0)
    kwargs.setdefault('heads', dict(objects=dict(width=32, convs=1)))
    learn = multi_learner(dls, trunk or simple_cnn(depth=3), lr=1e-2, **kwargs)
    if hasattr(learn, 'progress'): learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.fixture(scope='module')
def trained(table, shapes):
    learn = learner(loaders(table, shapes))
    learn.fit_one_cycle(3)
    return learn

@pytest.fixture(autouse=True)
def single(one_thread): pass

# Data

def test_the_overview_counts_pictures_that_nobody_looked_at(table, shapes):
    dls = loaders(table, shapes)
    n = sum(o is None for o in table.objects)
    line = next(l for l in str(describe(dls)).splitlines() if 'objects' in l.split())
    assert line.split()[-1] == str(n)

def test_a_batch(table, shapes):
    dls = loaders(table, shapes)
    y = dls.train.new(shuffle=False, drop_last=False, bs=80).one_batch()[1].objects
    assert y.keys() == ('box','score','crowd','colour','kind','area','looked_for')
    rows = dls.train.items.objects.tolist()
    n = [0 if r is None else len(r) for r in rows]
    here = ~y.box.isnan().any(-1)
    assert here.sum(1).tolist() == n
    assert (y.looked_for.isnan().all(1)).tolist() == [r is None for r in rows]
    assert (y.colour!=-100).sum(1).tolist() == n
    assert (y.kind!=-100).sum(1).tolist() == [sum(o['kind'] is not None for o in r or []) for r in rows]
    assert torch.equal(~y.area.isnan(), here)
    assert 'objects' in str(describe(dls))

def test_ways_to_give_them(shapes):
    "Give objects as a list of dicts, a dict of lists or a table, with no objects, no annotation or missing numbers"
    file = shapes/pd.read_csv(shapes/'items.csv').file[0]
    one = dict(box=[1,2,9,9], kind='a', age=2.)
    ways = [[one, dict(box=[3,3,30,40], kind='b')], dict(box=[[1,2,9,9]], kind=['a'], age=[4.]), pd.DataFrame([one]),
            [], None, float('nan')]
    items = [dict(file=file, y=dict(objects=w)) for w in ways]
    block = DataBlock((ImageBlock, MultiOutputBlock(objects=ObjectsBlock(kind=CategoryBlock, age=RegressionBlock))),
                      get_x=lambda o: o['file'], get_y=lambda o: o['y'], splitter=lambda o: (list(range(len(o))), [0]))
    dls = MultiDataLoaders.from_dblock(block, items, bs=6, shuffle=False, num_workers=0)
    y = dls.train.new(shuffle=False, drop_last=False).one_batch()[1].objects
    assert y.kind.tolist() == [[0,1], [0,-100], [0,-100], *[[-100,-100]]*3]
    assert y.age.isnan().sum(1).tolist() == [1,1,1,2,2,2]
    assert y.looked_for.isnan().all(1).tolist() == [False]*4+[True]*2

def test_rows_leave_with_their_boxes(table, shapes):
    "After any crop, flip or rotation, a row without a box is empty, and a row with a box has its colour"
    tfms = [RandomResizedCrop(48, min_scale=.1)], aug_transforms(do_flip=True, flip_vert=True, max_rotate=20)
    dls = loaders(table, shapes, item_tfms=tfms[0], batch_tfms=tfms[1])
    empty = 0
    for _ in range(4):
        for x,y in dls.train:
            y = y.objects
            gone = y.box.isnan().any(-1)
            assert torch.equal(gone, y.colour==-100)
            assert torch.equal(gone, y.score.isnan())
            looked = ~y.looked_for.isnan().all(1)
            empty += (gone.all(1) & looked).sum()
            for i,j in (~gone).nonzero().tolist():
                x1,y1,x2,y2 = ((y.box[i,j]+1)*24).tolist()
                assert 0<=x1<x2<=48.01 and 0<=y1<y2<=48.01
    assert empty>0    # crops removed all boxes of some pictures

def test_colour_stays_with_its_box(shapes):
    "The pixel in the middle of a circle's box has the object's colour after every flip and rotation"
    df = pd.read_csv(shapes/'items.csv')
    by_file = dict(list(pd.read_csv(shapes/'boxes.csv').groupby('file')))
    df['objects'] = [objects_of(by_file[f][lambda d: d.label=='circle']) for f in df.file]
    dls = loaders(df, shapes, dict(objects=ObjectsBlock(colour=CategoryBlock, kind=CategoryBlock, area=RegressionBlock)),
                  batch_tfms=aug_transforms(flip_vert=True, max_rotate=30, max_zoom=1, max_lighting=0, max_warp=0))
    paint = dict(red=(213,94,0), yellow=(240,228,66), green=(0,158,115), blue=(0,114,178), pink=(204,121,167))
    vocab = dls.vocab['objects.colour']
    right,seen = 0,0
    for x,y in dls.train:
        for i,j in (y.objects.colour!=-100).nonzero().tolist():
            cx,cy = ((y.objects.box[i,j,:2]+y.objects.box[i,j,2:]+2)*16).int().clamp(1,62).tolist()
            mean = x[i,:,cy-1:cy+2,cx-1:cx+2].mean((1,2))*255
            near = min(vocab, key=lambda c: (tensor(paint[c])-mean).abs().sum())
            right += near==vocab[y.objects.colour[i,j]]
            seen += 1
    assert seen>10 and right/seen>.9

def test_a_second_table(shapes):
    "A file, a table and a column of rows give the same batch"
    df = pd.read_csv(shapes/'items.csv')
    boxes = pd.read_csv(shapes/'boxes.csv')
    by_file = dict(list(boxes.groupby('file')))
    outputs = dict(objects=ObjectsBlock(**KINDS))
    columns = dict(objects=dict(kind='label'))
    df['objects'] = [objects_of(by_file[f]) for f in df.file]
    want = loaders(df, shapes, outputs).valid.one_batch()[1].objects
    plain = df.drop(columns='objects')
    for table in ('boxes.csv', boxes):
        got = loaders(plain, shapes, outputs, objects=table, columns=columns).valid.one_batch()[1].objects
        for n,v in want.items(): torch.testing.assert_close(got[n], v, equal_nan=True)
    dls = MultiDataLoaders.from_csv(shapes, image='file', outputs=outputs, objects='boxes.csv', columns=columns, bs=8,
                                    item_tfms=Resize(64), num_workers=0)
    assert dls.one_batch()[1].objects.keys() == want.keys()

def test_classes_that_nobody_looked_for(shapes):
    "Predictions of these classes change neither the loss nor mAP"
    df = pd.read_csv(shapes/'items.csv')
    boxes = pd.read_csv(shapes/'boxes.csv')
    df['seen'] = np.where(df.index%2, 'red|blue|green', 'yellow|pink')
    of = boxes.file.map(df.set_index('file').seen)
    boxes = boxes[[c in s for c,s in zip(boxes.colour, of)]]
    dls = loaders(df, shapes, dict(objects=ObjectsBlock(colour=CategoryBlock)), objects=boxes,
                  columns=dict(objects=dict(looked_for='seen')))
    y = dls.valid.one_batch()[1].objects
    assert set(y.looked_for.sum(1).tolist()) == {2.,3.}
    learn = learner(dls)
    learn.fit(1)
    before = learn.validate()
    x,y = dls.valid.one_batch()
    pred = learn.model.eval()(x)
    other = pred.map(torch.clone)
    other.objects.logits[(y.objects.looked_for==0)[:,None].expand_as(other.objects.logits)] += 3
    at = other.objects.logits!=pred.objects.logits
    assert at.any()
    boxed = [learn.loss_func(p, y) for p in (pred, other)]
    torch.testing.assert_close(*boxed)

# A learner

def test_a_narrow_head_trains_on_one_small_picture(table, shapes):
    "The coarsest map has a single location, where PyTorch refuses to normalise one channel alone"
    outputs = dict(objects=ObjectsBlock(area=RegressionBlock))
    rows = [[dict(box=[8,8,56,56], area=9.)]]*10
    df = table.iloc[:10].assign(objects=rows)
    learn = learner(loaders(df, shapes, outputs, bs=1, item_tfms=Resize(8)))
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])

def test_it_learns_where_and_what(tmp_path):
    "The learner finds boxes and colours of drawn shapes, and the colour of the largest"
    path = multi_shapes(tmp_path/'shapes', n=240, size=64, seed=1)
    df = pd.read_csv(path/'items.csv')
    by_file = dict(list(pd.read_csv(path/'boxes.csv').groupby('file')))
    df['objects'] = [objects_of(by_file[f]) for f in df.file]
    outputs = dict(objects=ObjectsBlock(colour=CategoryBlock, area=RegressionBlock), colour=CategoryBlock)
    df['objects'] = [[{k: v for k,v in o.items() if k!='kind'} for o in rows] for rows in df.objects]
    dls = loaders(df, path, outputs, bs=8)
    learn = learner(dls, simple_cnn(depth=3, bn=True), heads=dict(objects=dict(width=32, convs=2)))
    learn.fit_one_cycle(14, 1e-2)
    res = learn.evaluate()
    assert res['objects_map50']>.75, res
    assert res['objects_area_mae']<80, res

def test_values(trained):
    res = trained.evaluate()
    assert {'objects_loss','objects_map50','objects_map','objects_kind_accuracy','objects_area_mae','kind_accuracy'} <= set(res)
    assert np.isfinite(res['objects_loss'])

def test_get_preds(trained):
    preds,targs,dec,losses = trained.get_preds(with_decoded=True, with_loss=True)
    n = len(trained.dls.valid.items)
    assert preds.objects.box.shape == (n,100,4)
    assert preds.objects.kind.shape == (n,100,4)
    assert targs.objects.box.shape[0] == n and losses.shape == (n,)
    sure = ~dec.objects.box.isnan().any(-1)
    assert (dec.objects.score[sure]>=.4).all()
    assert torch.equal(dec.objects.kind!=-100, sure)

def test_predict(trained, table, shapes, tmp_path):
    trained.tasks['objects'].threshold = .1
    row = table.iloc[trained.dls.valid.items.index[0]]
    rows = trained.predict(row)[0].objects
    assert rows and set(rows[0]) == {'box','score','colour','kind','area'}
    assert trained.predict(shapes/row.file)[0].objects == rows
    scores = [o['score'] for o in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(0<=v<=64 for o in rows for v in o['box'])
    big = PILImage.create(shapes/row.file).resize((640,320))      # boxes are in pixels of the given picture
    boxes = [o['box'] for o in trained.predict(big)[0].objects]
    assert max(max(b[0::2]) for b in boxes)>64
    df = trained.predict_df(table.iloc[:4], num_workers=0)
    members = ['box','score','colour','kind','area']
    assert list(df.columns) == [*(f'objects.{n}' for n in members), 'kind', 'tags']
    assert all(len(a)==len(b) for a,b in zip(df['objects.box'], df['objects.colour']))
    assert trained.predict_df(table.assign(file=None).iloc[:2], num_workers=0)['objects.box'].isna().all()
    trained.tasks['objects'].threshold = .4

def test_pictures(trained):
    plt.close('all')
    trained.dls.valid.show_batch(max_n=4)
    assert '□ objects' in texts_of_figure()
    trained.tasks['objects'].threshold = .05
    plt.close('all')
    trained.show_results(max_n=6)
    seen = texts_of_figure()
    assert 'found, ' in seen and ' missed, ' in seen
    assert {'found','missed','false'} <= set(seen.split())
    trained.tasks['objects'].threshold = .4

def test_export(trained, table, shapes, tmp_path):
    "An export predicts objects in a fresh process"
    trained.tasks['objects'].threshold = .1
    trained.export(tmp_path/'objects.pkl')
    file = shapes/table.file[1]
    want = trained.predict(file)[0].objects
    code = (f'from fastai.vision.all import *; learn = load_learner({str(tmp_path/"objects.pkl")!r}); '
            f'print("BOX", learn.predict({str(file)!r})[0].objects[0]["box"])')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert 'BOX' in out.stdout, out.stderr
    got = eval(out.stdout.split('BOX')[1].strip().splitlines()[0])
    np.testing.assert_allclose(got, want[0]['box'], atol=1e-3)
    trained.tasks['objects'].threshold = .4

def test_save_load_and_lr_find(trained, tmp_path):
    trained.save(tmp_path/'w')
    before = trained.validate()
    trained.lr_find(num_it=4, show_plot=False)
    trained.load(tmp_path/'w')
    assert trained.validate()[0] == pytest.approx(before[0], rel=1e-4)

@pytest.mark.parametrize('cb', [UncertaintyWeighting, DynamicWeightAverage, GradNorm, GradientBalance,
                                partial(GradientBalance, level='parameters'), TaskMonitor], ids=str)
def test_balancing(table, shapes, cb):
    learn = learner(loaders(table.iloc[:40], shapes))
    learn.fit(1, cbs=cb())
    assert np.isfinite(learn.recorder.values[-1][0])

def test_depth_and_split(table, shapes):
    learn = learner(loaders(table.iloc[:40], shapes), depth=dict(objects=2), split=1)
    assert len(learn.model.heads['objects'].at)==1
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])

def test_tta_report_and_interpretation(trained):
    preds,_ = trained.tta(n=1)
    torch.testing.assert_close(preds.objects.box, trained.get_preds()[0].objects.box, equal_nan=True)
    assert 'objects' in str(trained.task_report())
    interp = MultiInterpretation.from_learner(trained)
    plt.close('all')
    interp.plot_top_losses(2)
    assert 'objects' in str(interp)
    assert 'objects' in str(trained.summary())

def test_interpretation_counts_objects(trained):
    one = MultiInterpretation.from_learner(trained)['objects']
    counts = one.counts()
    targs = one.targs
    known = ~targs.box[...,0].isnan() & (targs.colour!=IGNORE) & (targs.crowd==0) & one.labelled[:,None]
    assert counts.loc['all','true']==int(known.sum())
    assert (counts['found']+counts.confused+counts.missed==counts.true).all()
    assert counts.loc['all'].recall==pytest.approx(counts.loc['all','found']/int(known.sum()))
    scores = one.scores()
    assert (scores.isnan()==~one.labelled).all() and 0<=scores.nanmean()<=1
    assert one.plot_confusion_matrix().get_xticklabels()[-1].get_text()=='(nothing)'
    slices = MultiInterpretation.from_learner(trained).slices('kind')
    assert 'objects_map50' in slices.index.get_level_values('metric')
    assert len(one.table())==len(one.losses)
    same = compare(trained, trained, resamples=2).table.loc['objects']
    assert same.loc['objects_map50','difference']==0 and math.isnan(same.loc['objects_map50','low'])
    plt.close('all')

def test_mixup_is_refused(table, shapes):
    for cb in (MixUp, CutMix):
        with pytest.raises(ValueError, match="cannot blend output 'objects'"):
            learner(loaders(table, shapes)).fit(1, cbs=cb())

def test_items_with_weights(table, shapes):
    learn = learner(loaders(table.assign(w=np.where(table.index%2, 2., .5)).iloc[:40], shapes, weight='w'))
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])

def test_a_metric_of_ones_own(table, shapes):
    dls = loaders(table, shapes)
    learn = learner(dls, metrics=dict(objects=dict(kind=[accuracy, F1Score(average='macro')])))
    assert learn.metrics.attrgot('name')[-2:] == ['objects_kind_accuracy','objects_kind_f1_score']
    learn.fit(1)
    with pytest.raises(KeyError, match="Unknown output of the objects 'objects' in `metrics` 'knd'"):
        learner(dls, metrics=dict(objects=dict(knd=accuracy)))

# Mistakes

def test_mistakes(table, shapes):
    def with_objects(*rows): return table.iloc[:len(rows)].assign(objects=list(rows))
    good = [dict(box=[1,2,9,9], kind='a')]
    only = dict(objects=ObjectsBlock(kind=CategoryBlock))
    with pytest.raises(ValueError, match='a dict for each object'):
        loaders(with_objects(good, [[1,2,3,4]]), shapes, only, valid_idx=[0])
    with pytest.raises(ValueError, match="has the member 'knd'"):
        loaders(with_objects(good, [dict(box=[1,2,3,4], knd='a')]), shapes, only, valid_idx=[0])
    with pytest.raises(ValueError, match='x2 = x\\+width'):
        loaders(with_objects(good, [dict(box=[30,20,5,9], kind='a')]), shapes, only, valid_idx=[0])
    with pytest.raises(ValueError, match='must be pixels of the picture'):
        loaders(with_objects(good, [dict(box=[.1,.2,.5,.9], kind='a')]), shapes, only, valid_idx=[0])
    with pytest.raises(ValueError, match="class 'b', which is not in the training split"):
        loaders(with_objects(good, [dict(box=[1,2,9,9], kind='b')]), shapes, only, valid_idx=[1])
    dls = loaders(with_objects(good, [dict(box=[70,2,90,9], kind='a')]), shapes, only, valid_idx=[0], bs=1)
    with pytest.raises(ValueError, match='reaches beyond its picture'): dls.train.one_batch()
    with pytest.raises(ValueError, match='multiple of 32'):
        learner(loaders(table, shapes), heads=dict(objects=dict(width=50)))
    with pytest.raises(ValueError, match='returns no vector'): learner(loaders(table, shapes), after=dict(kind='objects'))

def test_boxes_are_repaired(table, shapes):
    rows = [dict(box=[-5,2,30,70], kind='a'), dict(box=[5,5,5,9], kind='b'), dict(box=[9,9,20,20], kind='b')]
    df = table.iloc[:2].assign(objects=[rows, rows])
    with pytest.warns(UserWarning, match='1 of 3 boxes have no area and are left out'):
        dls = loaders(df, shapes, dict(objects=ObjectsBlock(kind=CategoryBlock)), valid_idx=[0], bs=1)
    y = dls.train.one_batch()[1].objects
    assert y.kind.tolist() == [[0,-100,1]]
    np.testing.assert_allclose(((y.box[0,0]+1)*32).tolist(), [0,2,30,64], atol=1e-3)

def test_small_boxes_are_told(table, shapes):
    rows = [dict(box=[4.2,4.2,5.1,5.1], kind='a'), dict(box=[20,20,40,40], kind='b')]
    df = table.iloc[:4].assign(objects=[rows]*4)
    dls = loaders(df, shapes, dict(objects=ObjectsBlock(kind=CategoryBlock)), valid_idx=[0], bs=3)
    learn = learner(dls)
    with pytest.warns(UserWarning, match='3 of 6 boxes of this batch contain no location'): learn.fit(1)
    assert learn.loss_func.funcs['objects'].n_unheld>=3

# Two processes

def run_twice(code, tmp_path):
    "Run `code` in two processes that communicate"
    head = f'''
        import os, sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from test_objects import *
        torch.set_num_threads(1)
        rank = int(os.environ['RANK'])
        shapes,out = Path({str(tmp_path)!r})/'shapes',Path({str(tmp_path)!r})
        '''
    env = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(30500+os.getpid()%1000),
               OMP_NUM_THREADS='1')
    code = textwrap.dedent(head)+textwrap.dedent(code)
    ps = [subprocess.Popen([sys.executable, '-c', code], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)),
                           stderr=subprocess.PIPE, text=True) for r in range(2)]
    errs = [p.communicate(timeout=300)[1] for p in ps]
    assert all(p.returncode==0 for p in ps), errs[0][-3000:]+errs[1][-3000:]

def drawn_table(shapes):
    df = pd.read_csv(shapes/'items.csv')
    by_file = dict(list(pd.read_csv(shapes/'boxes.csv').groupby('file')))
    df['objects'] = [objects_of(by_file[f]) for f in df.file]
    for i in range(0, len(df), 3): df.at[i,'objects'] = []
    return df

def step_of(learn, x, y, wrap=noop):
    "The model's parameters after two steps, without dropout"
    model = wrap(learn.model.eval())
    opt = torch.optim.SGD(model.parameters(), .1)
    for _ in range(2):
        learn.loss_func(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return {n: p.detach() for n,p in learn.model.named_parameters()}

def test_two_processes_step_as_one(shapes, tmp_path):
    "Two processes with half a batch each take the step of the whole batch, and no parameter is left out"
    shutil.copytree(shapes, tmp_path/'shapes')
    run_twice('''
        import torch.distributed as dist
        dist.init_process_group('gloo')
        learn = learner(loaders(drawn_table(shapes), shapes))
        x,y = learn.dls.valid.one_batch()
        half = slice(8*rank, 8*rank+8)
        res = step_of(learn, x[half], y.map(lambda t: t[half]), nn.parallel.DistributedDataParallel)
        if rank==0: torch.save(res, out/'p.pth')
        dist.barrier()
        dist.destroy_process_group()''', tmp_path)
    learn = learner(loaders(drawn_table(shapes), shapes))
    x,y = learn.dls.valid.one_batch()
    torch.testing.assert_close(torch.load(tmp_path/'p.pth'), step_of(learn, x, y), atol=1e-5, rtol=1e-4)

# Tiles

def test_tiles_of_a_large_picture(trained, table, shapes):
    "Four pictures side by side give the objects of each, in pixels of the whole. Other inputs are refused"
    trained.tasks['objects'].threshold = .1    # three epochs give low scores
    files = [shapes/f for f in table.file[-4:]]
    large = PILImage.create(np.zeros((128,128,3), dtype=np.uint8))
    corners = [(0,0), (64,0), (0,64), (64,64)]
    want = []
    for f,(x,y) in zip(files, corners):
        small = PILImage.create(f)
        large.paste(small, (x,y))
        for o in trained.predict(small)[0]['objects']:
            x1,y1,x2,y2 = o['box']
            want.append((o['score'], [x1+x,y1+y,x2+x,y2+y]))
    rows = trained.predict_tiles(large, tile=64, overlap=0)
    got = [(o['score'], o['box']) for o in rows]
    assert len(got) > 0
    for score,box in got:
        assert any(np.isclose(score, s, atol=1e-4) and np.allclose(box, b, atol=1e-3) for s,b in want), (score, box, want)
    trained.tasks['objects'].threshold = .4
    scores = [s for s,_ in got]
    assert scores == sorted(scores, reverse=True)
    assert {'box','score','colour','kind','area'} <= set(rows[0])
    with pytest.raises(ValueError, match='less than the tile'): trained.predict_tiles(large, tile=64, overlap=64)
    plain = learner(loaders(table, shapes, dict(kind=CategoryBlock)), heads=None)
    with pytest.raises(TypeError, match='none holds objects'): plain.predict_tiles(large)
