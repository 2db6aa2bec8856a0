"""500 random tables are built, read, decoded and compared with an independent reading. Some also train a learner, and
some contain one mistake, which the error must name. `python -m tests.random_tables 5000` tries more."""
import pytest
from tests.contents import Window, near
from tests.mistakes import LEARNER_MISTAKES, TABLE_MISTAKES
from tests.random_tables import Case, is_clear, run_all, run_mistake

N = 500
CHUNK = 100

@pytest.mark.parametrize('start', range(0, N, CHUNK))
def test_no_table_is_read_wrongly_or_refused_unclearly(start, one_thread):
    counts,notes = run_all(range(start, start+CHUNK))
    print(f'{CHUNK} tables: '+', '.join(f'{v} {k}' for k,v in counts.items()))
    assert not notes, '\n'.join(notes)
    assert counts['right']>=60 and counts['clear error']>=20

def test_every_mistake_is_made_by_some_table():
    "Each mistake must occur with the seeds of this file, or else it would not be tested"
    made = {m.name: 0 for m in [*TABLE_MISTAKES, *LEARNER_MISTAKES]}
    for seed in range(600):
        for m in TABLE_MISTAKES+LEARNER_MISTAKES:
            if made[m.name]: continue
            case = Case(seed)
            if m.make(case, case.rng) is not None: made[m.name] += 1
        if all(made.values()): break
    assert all(made.values()), [n for n,k in made.items() if not k]

def test_the_judge_is_strict():
    "An error from pandas, from a plain index or without the words does not count as clear"
    def of(f):
        try: f()
        except Exception as e: return e
    assert is_clear(of(lambda: {}['a']), [])
    assert is_clear(of(lambda: int('x')), [])
    from fastai_multi.core import check_in
    e = of(lambda: check_in('lable', ['label'], 'output'))
    assert is_clear(e, ['lable', 'output'])=='' and is_clear(e, ['price'])
    assert near([1.,float('nan')], [1.,float('nan')]) and not near([1.], [1.1]) and not near([1.], [1.,1.])
    assert Window('crop', (40,20), (10,10)).corner==(10,0) and Window('pad', (40,20), (10,10)).corner==(0,-10)

def test_tables_differ():
    assert len({Case(s).describe() for s in range(50)})>45
