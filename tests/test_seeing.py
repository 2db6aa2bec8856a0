"The first hour: what Tab completes, what `?` explains, what a learner and its loaders look like, what answers look like"
import importlib, inspect, pkgutil, time

import pytest
from fastai.vision.all import *
from IPython.core.completer import IPCompleter, provisionalcompleter
from IPython.core.oinspect import Inspector

import fastai_multi
from fastai_multi import *

@pytest.fixture(scope='module')
def dls(shapes):
    return MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', text='caption',
        outputs=dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock),
        columns=dict(box=['x1', 'y1', 'x2', 'y2']), label_delim='|', bs=16, seed=0, num_workers=0)

@pytest.fixture(scope='module')
def learn(dls): return multi_learner(dls, simple_cnn)

# Typing

@pytest.fixture(scope='module')
def completer(dls, learn):
    plain = Learner(dls, learn.model, loss_func=nn.MSELoss(), opt_func=Adam)
    x,y = dls.one_batch()
    names = dict(learn=learn, dls=dls, plain=plain, x=x, y=y, heads=learn.model.heads)
    return IPCompleter(namespace=names, disable_matchers=['IPCompleter.magic_matcher'])    # magics need a shell

def completions(completer, text):
    with provisionalcompleter(): return [o.text for o in completer.completions(text, len(text))]

def seconds(completer, text):
    start = time.process_time()
    completions(completer, text)
    return time.process_time()-start

@pytest.mark.parametrize('text', ['learn.', 'dls.', 'learn.model.', 'learn.dls.', 'learn.fit('])
def test_tab_answers_as_fast_as_for_a_plain_learner(completer, text):
    "The completer reads source anew each time: names that come by star imports cost it seconds"
    seconds(completer, 'plain.')
    seconds(completer, text)    # the first time it parses the files
    bound = None
    for _ in range(4):
        plain = seconds(completer, 'plain.fit(' if '(' in text else 'plain.')
        bound = max(.2, 3*plain)
        took = seconds(completer, text)
        if took<=bound: return
    pytest.fail(f'{text!r} took {took:.2f} s, and the bound is {bound:.2f} s')

def test_tab_knows_our_methods_and_the_names_of_outputs(completer):
    assert {'fine_tune', 'predict_df', 'task_report'} <= {*completions(completer, 'learn.')}
    assert {'kind', 'tags', 'box', 'area'} <= {*completions(completer, 'y.')}
    assert {'kind', 'tags', 'box', 'area'} <= {*completions(completer, "y['")}
    assert {'image', 'text'} <= {*completions(completer, "x['")}
    assert {'kind', 'box'} <= {*completions(completer, "heads['")}

explained_calls = dict(multi_learner=multi_learner, MultiLearner=MultiLearner, fine_tune=MultiLearner.fine_tune,
                       from_csv=MultiDataLoaders.from_csv, from_df=MultiDataLoaders.from_df, show_batch=MultiDL.show_batch,
                       predict=MultiLearner.predict, ImageTextBlock=ImageTextBlock, TaskMonitor=TaskMonitor)

@pytest.mark.parametrize('name', explained_calls)
def test_question_mark_explains_every_parameter(name):
    obj = explained_calls[name]
    shown = Inspector(theme_name='nocolor').info(obj, name)['docstring']
    for n,p in inspect.signature(obj).parameters.items():
        if n in ('self', 'kwargs', 'args') or p.kind==p.VAR_POSITIONAL: continue
        assert f'\n    {n}: ' in shown, n

def test_every_comment_of_a_parameter_is_in_a_docstring():
    "Of all modules: what fastcore finds in the source stands in `__doc__`"
    from fastcore.docments import docments
    from fastai_multi.docstrings import function_of
    n_seen = 0
    for m in pkgutil.walk_packages(fastai_multi.__path__, 'fastai_multi.'):
        if m.ispkg or m.name.endswith('_modidx'): continue
        module = importlib.import_module(m.name)
        for name in module.__all__:
            f = function_of(getattr(module, name))
            if f is None or f.__module__!=m.name or f.__name__=='<lambda>': continue
            for parameter,comment in docments(f, returns=False).items():
                if not comment or parameter in ('self', 'cls'): continue
                ending = comment.split('; ')[-1]     # several parameters may share a line and its comment
                assert ending in f.__doc__, (m.name, name, parameter)
                n_seen += 1
    assert n_seen>300
