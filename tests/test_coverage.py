"""Prediction sets contain the label as often as you ask, in 50 simulated splits without training, and match `crepes` on
the same scores"""
import math
import pytest
from scipy import stats
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.calibration import *
from fastai_multi.core import IGNORE
from fastai_multi.data.frame import frame
from fastai_multi.data.kinds import part_of
from fastai_multi.tasks import task_of

pytestmark = pytest.mark.usefixtures('one_thread')

COVERAGE = .9
SPLITS = 50
KNOWN = 600      # items of a split that calibrate the sets
NEW = 200        # items of a split that test the sets
ITEMS = KNOWN+NEW
VOCAB = ['cup','hat','pin','sun']
INPUTS = [('image','text'), ('image',)]
PICTURE = frame((80,60), [])

def _task(block, values):
    part = part_of('y', block)
    part.setup(values)
    return task_of(part)

@pytest.fixture(scope='module')
def tasks():
    return dict(kind=_task(CategoryBlock, VOCAB), tags=_task(MultiCategoryBlock, [[v] for v in VOCAB]),
                price=_task(RegressionBlock, [10.,20.,30.]), box=_task(BBoxBlock, [[0,0,10,10]]))

def _draw(seed, missing=.1):
    "Raw predictions, labels and groups of one split. All outputs of an item without text are harder"
    g = torch.Generator().manual_seed(seed)
    def normal(*shape): return torch.randn(*shape, generator=g)
    without_text = torch.arange(ITEMS)%2
    hard = (1+2*without_text)*(.5+torch.rand(ITEMS, generator=g))
    logits = 2*normal(ITEMS, 4)/hard[:,None]
    kind = torch.multinomial(logits.softmax(1), 1, generator=g).flatten()
    odds = 2*normal(ITEMS, 4)/hard[:,None]
    tags = (torch.rand(ITEMS, 4, generator=g)<odds.sigmoid()).float()
    price = normal(ITEMS)
    box = torch.cat([torch.full((ITEMS,2), -.3), torch.full((ITEMS,2), .3)], 1)
    targs = dict(kind=kind, tags=tags, price=price+.2*hard*normal(ITEMS), box=box+.05*hard[:,None]*normal(ITEMS, 4))
    raw = dict(kind=2*logits, tags=odds, price=price, box=box)
    lost = torch.rand(ITEMS, 4, generator=g)<missing
    for i,n in enumerate(targs):
        absent_value = IGNORE if n=='kind' else math.nan
        targs[n][lost[:,i]] = absent_value
    return raw, targs, [INPUTS[i] for i in without_text.tolist()]

def _part_of(values, places): return {n: v[places] for n,v in values.items()}

class Split:
    "One split: the calibration from its first items, and the nonconformity scores of the others"
    def __init__(self, tasks, seed):
        self.tasks = tasks
        raw,targs,groups = _draw(seed)
        known = slice(0, KNOWN)
        new = slice(KNOWN, None)
        temperatures = fit_temperatures(tasks, _part_of(raw, known), _part_of(targs, known))
        honest = tempered(raw, temperatures)
        self.preds = {n: t.activation(honest[n]) for n,t in tasks.items()}
        outputs = {n: output_calibration(t, self.preds[n][known], targs[n][known], temperatures[n])
                   for n,t in tasks.items()}
        self.calibration = Calibration(outputs, groups[known])
        self.groups = groups[new]
        self.preds = _part_of(self.preds, new)
        self.targs = _part_of(targs, new)
        self.scores = {n: outputs[n].sets.nonconformity(self.preds[n], self.targs[n]) for n in tasks}

    def inside(self, joint=False):
        "For each output, whether the set of each new item contains the label; NaN without a label"
        by_group = {o: self.calibration.quantiles(COVERAGE, joint, o) for o in INPUTS}
        res = {}
        for n,s in self.scores.items():
            q = tensor([by_group[o][n] for o in self.groups])
            res[n] = torch.where(s.isnan(), math.nan, (s<=q).float())
        return res

    def size(self, name, i, q):
        "The size of the set of new item `i`: classes, tags, units, or the pixels that a box grows to the left"
        region = self.calibration.outputs[name].sets.region(self.preds[name][i], q, PICTURE)
        if name=='price': return float(region[1]-region[0])
        if name=='box': return float(40+40*self.preds['box'][i,0]-region[0])
        return len(region)

@pytest.fixture(scope='module')
def splits(tasks): return [Split(tasks, seed) for seed in range(SPLITS)]

def _law(n_known, n_new):
    "The distribution of how many of `n_new` items a quantile of `n_known` items covers"
    k = math.ceil((n_known+1)*COVERAGE-1e-9)
    return stats.betabinom(n_new, k, n_known+1-k)

def _check_band(covered, laws, what):
    "Check that the sum is within three standard deviations, and no more splits are outside their 95 % than by chance"
    expected = sum(law.mean() for law in laws)
    spread = math.sqrt(sum(law.var() for law in laws))
    said = f'{what}: {sum(covered)} items are covered, but {expected:.0f} ± {spread:.0f} are expected'
    assert abs(sum(covered)-expected)<=3*spread, said
    ends = [law.interval(.95) for law in laws]
    outside = sum(not low<=c<=high for c,(low,high) in zip(covered, ends))
    assert outside<=stats.binom.ppf(.999, len(laws), .05), f'{what}: {outside} splits are outside their 95 %'

def _counts(split, name, group, inside):
    "The number of covered new items in a group, and the distribution of that number"
    here = tensor([o==group for o in split.groups]) & ~inside[name].isnan()
    known = split.calibration.outputs[name].scores[split.calibration.members(group)]
    return int(inside[name][here].sum()), _law(int((~known.isnan()).sum()), int(here.sum()))

def _mean_size(split, name, group, n=10):
    q = split.calibration.quantile(name, COVERAGE, group)
    own = [i for i,o in enumerate(split.groups) if o==group][:n]
    return np.mean([split.size(name, i, q) for i in own])

def test_each_output_is_covered_in_each_group_of_inputs(splits, tasks):
    insides = [s.inside() for s in splits]
    rows = []
    for group in INPUTS:
        for n in tasks:
            found = [_counts(s, n, group, inside) for s,inside in zip(splits, insides)]
            covered,laws = zip(*found)
            _check_band(covered, laws, f'{n} with {group}')
            n_new = sum(law.args[0] for law in laws)
            rows.append(dict(inputs='+'.join(group), output=n, items=n_new, covered=sum(covered)/n_new,
                             size=np.mean([_mean_size(s, n, group) for s in splits])))
    table = pd.DataFrame(rows).set_index(['inputs','output'])
    print(f'\n{SPLITS} splits, coverage {COVERAGE}; mean sizes in classes, tags, units or pixels\n{table}')
    harder = table['size'].unstack('inputs')
    assert (harder['image']>harder['image+text']).all()      # sets are larger without the text

def _covered_together(split, inside):
    each = torch.stack(list(inside.values()), 1)
    each = each[~each.isnan().any(1)]
    return int(each.all(1).sum()), len(each)

def test_all_outputs_are_covered_together(splits):
    joint = [_covered_together(s, s.inside(joint=True)) for s in splits]
    alone = [_covered_together(s, s.inside()) for s in splits]
    n = sum(n for _,n in joint)
    share = sum(c for c,_ in joint)/n
    share_alone = sum(c for c,_ in alone)/n
    print(f'\nshare of items whose sets all contain the label: {share:.3f} with joint=True, {share_alone:.3f} without')
    # one half of a group's fully labelled items gives the ranks, the other half the quantile
    halves = [int(KNOWN/2*.9**4/2) for _ in splits]
    laws = [_law(half, m) for half,(_,m) in zip(halves, joint)]
    spread = math.sqrt(sum(law.var() for law in laws))/n
    equal_ranks = 4/min(halves)          # rounding to whole ranks makes the sets of the four outputs larger
    assert COVERAGE-3*spread<=share<=COVERAGE+equal_ranks+3*spread
    assert share_alone<.8

def test_one_quantile_for_all_inputs_would_fail_where_one_is_missing(tasks):
    "The test of the groups can fail: one quantile for all covers items without a text less often"
    covered = []
    n = 0
    for seed in range(10):
        split = Split(tasks, seed)
        together = Calibration(split.calibration.outputs)
        q = together.quantile('price', COVERAGE)
        scores = split.scores['price'][tensor([o==('image',) for o in split.groups])]
        covered.append(int((scores<=q).sum()))
        n += int((~scores.isnan()).sum())
    assert sum(covered)/n<.85

def test_sets_as_a_user_reads_them_hold_what_is_not_stranger(splits, tasks):
    split = splits[0]
    for n,t in tasks.items():
        q = split.calibration.quantile(n, COVERAGE, INPUTS[0])
        sets = split.calibration.outputs[n].sets
        for i in range(30):
            score = split.scores[n][i]
            if score.isnan() or abs(score-q)<1e-4: continue
            region = sets.region(split.preds[n][i], q, PICTURE)
            assert _holds(t, n, region, split.targs[n][i])==bool(score<=q), (n,i)

def _holds(task, name, region, targ):
    "Whether the set that you read contains the label"
    if name=='kind': return VOCAB[int(targ)] in region
    if name=='tags': return {VOCAB[i] for i in targ.nonzero().flatten().tolist()}<=set(region)
    if name=='price': return bool(region[0]<=task.to_user(targ)<=region[1])
    true = task.to_user(targ, PICTURE)
    return bool((region[:2]<=true[:2]+1e-3).all() and (region[2:]>=true[2:]-1e-3).all())

@pytest.fixture(scope='module')
def complete(tasks):
    "A split without missing labels: numbers in the table's units, class probabilities, and groups"
    raw,targs,groups = _draw(99, missing=0.)
    to_user = tasks['price'].to_user
    values = [np.array([float(to_user(v)) for v in o['price']]) for o in (raw, targs)]
    bins = np.array([INPUTS.index(o) for o in groups])
    return raw, targs, groups, values, bins

def test_intervals_of_a_number_are_those_of_crepes(complete, tasks):
    base = pytest.importorskip('crepes.base', reason='crepes is not installed')
    raw,targs,groups,(said,true),bins = complete
    known = slice(0, KNOWN)
    new = slice(KNOWN, None)
    scores = sets_of(tasks['price']).nonconformity(raw['price'], targs['price'])
    output = output_calibration(tasks['price'], raw['price'][known], targs['price'][known])
    for grouped in (False, True):
        theirs = base.ConformalRegressor()
        theirs.fit((true-said)[known], bins=bins[known] if grouped else None)
        theirs = theirs.predict_int(said[new], bins=bins[new] if grouped else None, confidence=COVERAGE)
        calibration = Calibration(dict(price=output), groups[known] if grouped else None)
        for i,group in enumerate(groups[new]):
            q = calibration.quantile('price', COVERAGE, group if grouped else ())
            low,high = output.sets.region(raw['price'][KNOWN+i], q)
            assert (float(low),float(high))==pytest.approx(tuple(theirs[i]), abs=1e-3)
    assert len(scores)==ITEMS

def test_sets_of_a_category_are_those_of_crepes(complete, tasks):
    base = pytest.importorskip('crepes.base', reason='crepes is not installed')
    raw,targs,groups,_,bins = complete
    probs = raw['kind'].softmax(1)
    known = slice(0, KNOWN)
    new = slice(KNOWN, None)
    output = output_calibration(tasks['kind'], probs[known], targs['kind'][known])
    theirs = base.ConformalClassifier()
    theirs.fit(output.scores.numpy(), bins=bins[known])
    theirs = theirs.predict_set(1-probs[new].numpy(), bins=bins[new], confidence=COVERAGE, smoothing=False)
    calibration = Calibration(dict(kind=output), groups[known])
    for i,group in enumerate(groups[new]):
        ours = output.sets.region(probs[KNOWN+i], calibration.quantile('kind', COVERAGE, group))
        assert set(ours)=={VOCAB[c] for c in range(4) if theirs[i,c]}

def test_sets_of_a_category_are_split_conformal_by_hand(complete, tasks):
    raw,targs,_,_,_ = complete
    probs = raw['kind'].softmax(1)
    strange = sorted(1-float(p[y]) for p,y in zip(probs[:KNOWN], targs['kind'][:KNOWN]))
    by_hand = strange[math.ceil((KNOWN+1)*COVERAGE)-1]
    output = output_calibration(tasks['kind'], probs[:KNOWN], targs['kind'][:KNOWN])
    assert Calibration(dict(kind=output)).quantile('kind')==pytest.approx(by_hand, abs=1e-6)
