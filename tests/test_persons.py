"A flip keeps left and right of a person's keypoints apart in reading, showing, training and prediction"
import json
import numpy as np, pandas as pd, pytest, torch
from matplotlib import pyplot as plt
from torchvision.transforms import v2
from PIL import ImageDraw
from fastai.vision.all import *
from fastai_multi import *
from tests.seen import texts_of_figure

pytestmark = pytest.mark.usefixtures('one_thread')
JOINTS = ['head','left hand','right hand']
HANDS = {1: (220,40,40), 2: (40,60,220)}    # colours of gloves
SIDE = 48

def person(i, folder, gloves):
    "Draw a person who faces you, with the left hand on the right. Every fourth hides the right hand"
    rng = np.random.default_rng(i)
    cx,cy,r = rng.uniform(18, 30),rng.uniform(16, 24),rng.uniform(9, 13)
    joints = [[cx,cy-8], [cx+r,cy+rng.uniform(0, 8)], [cx-r,cy+rng.uniform(0, 8)]]
    im = Image.new('RGB', (SIDE,SIDE), (90,90,90))
    draw = ImageDraw.Draw(im)
    draw.ellipse((cx-6, cy-4, cx+6, cy+14), fill=(60,160,70))
    for k,(x,y) in enumerate(joints):
        colour = (230,190,150)
        if gloves and k in HANDS: colour = HANDS[k]
        if k==2 and i%4==3: continue
        draw.ellipse((x-3, y-3, x+3, y+3), fill=colour)
    if i%4==3: joints[2] = [float('nan')]*2
    im.save(folder/f'{i}.png')
    seen = [p for p in joints if p[0]==p[0]]
    xs,ys = zip(*seen, (cx-6,cy-4), (cx+6,cy+14))
    box = [max(0, min(xs)-3), max(0, min(ys)-3), min(SIDE, max(xs)+3), min(SIDE, max(ys)+3)]
    return dict(file=f'{i}.png', joints=joints, box=box, objects=[dict(box=box, kind='person')])

def persons(folder, n=16, gloves=True, pairs=None, **kwargs):
    table = pd.DataFrame([person(i, folder, gloves) for i in range(n)])
    outputs = dict(box=BBoxBlock, joints=PointsBlock(pairs, JOINTS), objects=ObjectsBlock(kind=CategoryBlock))
    kwargs = {**dict(bs=8, valid_idx=range(n-8, n), num_workers=0, device='cpu'), **kwargs}
    return MultiDataLoaders.from_df(table, folder, image='file', outputs=outputs, **kwargs)

def untyped(t): return t.as_subclass(Tensor)

def pixels(t, w, h): return (untyped(t).reshape(-1,2)+1)/2*torch.tensor([w,h])

def nearest_hand(x, point):
    "The hand whose colour the picture has at a point, or `None`"
    h,w = x.shape[-2:]
    at = pixels(point, w, h)[0].int()
    px,py = at.tolist()
    if not (1<px<w-2 and 1<py<h-2): return None
    seen = untyped(x)[:,py,px]*255
    off = {k: (seen-torch.tensor(c).float()).abs().max() for k,c in HANDS.items()}
    best = min(off, key=off.get)
    return best if off[best]<60 else None

still = dict(item_tfms=Resize(64))
mirrors = dict(item=dict(item_tfms=[FlipItem(p=1.), Resize(64)]), batch=dict(batch_tfms=Flip(p=1.), **still),
               torchvision=dict(item_tfms=[v2.RandomHorizontalFlip(1.), Resize(64)]),
               upside_down=dict(item_tfms=[v2.RandomVerticalFlip(1.), Resize(64)]))
turns = dict(none=still, half=dict(batch_tfms=Rotate(p=1., draw=180.), **still),
             twice=dict(item_tfms=[FlipItem(p=1.), Resize(64)], batch_tfms=Flip(p=1.)))

def hands_seen(dl, swapped):
    "Check that no hand has the colour of the other, and count those with their own colour"
    seen = 0
    for x,y in dl:
        for im,joints in zip(x, y.joints):
            for k in HANDS:
                found = nearest_hand(im, joints[k])
                if found is None: continue
                assert found==(3-k if swapped else k)
                seen += 1
    return seen

@pytest.mark.parametrize('name', [*mirrors, *turns])
def test_a_mirrored_left_hand_is_a_right_hand(tmp_path, name):
    "In a mirror image the point `left hand` is where the right hand was. Rotations and double flips swap nothing"
    dls = persons(tmp_path, **{**mirrors, **turns}[name])
    assert hands_seen(dls.train, swapped=name in mirrors)>10
    assert hands_seen(dls.valid, swapped=False)>8    # validation does not flip

@pytest.mark.parametrize('name', [*mirrors, *turns])
def test_box_objects_and_points_move_together(tmp_path, name):
    "The person's box equals the box among the objects and contains all points. A hidden hand stays hidden"
    dls = persons(tmp_path, **{**mirrors, **turns}[name])
    hidden = 0
    for x,y in dls.train:
        h,w = x.shape[-2:]
        torch.testing.assert_close(untyped(y.objects.box)[:,0], untyped(y.box))
        for box,joints in zip(y.box, y.joints):
            low,high = pixels(box, w, h)
            points = pixels(joints, w, h)
            here = ~points.isnan().any(1)
            assert ((points[here]>=low-.1) & (points[here]<=high+.1)).all()
            hidden += int((~here).sum())
    assert hidden>0

def test_random_flips_and_turns(tmp_path):
    "Both hands of a person are swapped, or neither. Both cases occur"
    dls = persons(tmp_path, batch_tfms=aug_transforms(max_rotate=20, max_warp=0., max_lighting=0.), **still)
    ways = set()
    for _ in range(6):
        for x,y in dls.train:
            for im,joints in zip(x, y.joints):
                found = {k: nearest_hand(im, joints[k]) for k in HANDS}
                swapped = {found[k]!=k for k in HANDS if found[k] is not None}
                assert len(swapped)<2
                ways |= swapped
    assert ways=={True,False}

def trained(folder, pairs):
    set_seed(0)
    dls = persons(folder, 72, gloves=False, pairs=pairs, batch_tfms=Flip(), **still)
    learn = multi_learner(dls, simple_cnn(depth=4, bn=True), heads=dict(objects=dict(width=32, convs=1)))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(14, 1e-2)
    return learn

def widths(learn, folder):
    "For each validation picture, how many pixels the predicted left hand is to the right of the right hand"
    files = [folder/f for f in learn.dls.valid.items.file]
    answers = [learn.predict(f)[0].joints for f in files]
    return np.array([float(a['left hand'][0])-float(a['right hand'][0]) for a in answers])

def check_named_answers(learn, folder, answer):
    "The points have their names in JSON, in a table, in a bundle and in the words below a picture"
    head = [float(v) for v in answer.joints['head']]
    assert json.loads(json.dumps(answer.to_dict()))['joints']['head']==pytest.approx(head)
    df = learn.predict_df(pd.DataFrame(dict(file=['70.png'])), num_workers=0)
    assert [*df['joints'][0]]==JOINTS
    learn.save_bundle(folder/'bundle')
    again = load_bundle(folder/'bundle').predict(folder/'70.png')[0]
    assert {n: p.tolist() for n,p in again.joints.items()}=={n: p.tolist() for n,p in answer.joints.items()}
    assert learn.tasks['joints'].words(answer.joints).startswith('head (')
    plt.close('all')
    plot_answer(learn, folder/'70.png')
    assert 'joints' in texts_of_figure()

def test_a_learner_tells_left_from_right(tmp_path):
    "With bare hands and half of the pictures mirrored, the names keep the hands apart; without pairs they collapse"
    for name in ('pairs','none'): (tmp_path/name).mkdir()
    learn = trained(tmp_path/'pairs', None)
    told = widths(learn, tmp_path/'pairs')
    untold = widths(trained(tmp_path/'none', []), tmp_path/'none')
    print(told, untold)
    assert (told>10).all()
    assert abs(untold).mean()<.5*told.mean()
    answer = learn.predict(tmp_path/'pairs'/'70.png')[0]
    x1,y1,x2,y2 = answer.box
    assert all(0<=float(v)<=SIDE for v in (x1,y1,x2,y2)) and [*answer.joints]==JOINTS
    check_named_answers(learn, tmp_path/'pairs', answer)
    plt.close('all')
    learn.show_results(max_n=4)
    assert '● joints' in texts_of_figure() or 'joints' in texts_of_figure()
    plt.close('all')
