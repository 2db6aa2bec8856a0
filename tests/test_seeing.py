"The first hour: what Tab completes, what `?` explains, and how a learner, its loaders and its answers look"
import importlib, inspect, pkgutil, re, time, warnings

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
    "The completer reads the source again each time, and names from star imports cost it seconds"
    seconds(completer, 'plain.')
    seconds(completer, text)    # the first call parses the files
    bound = None
    for _ in range(4):
        plain = seconds(completer, 'plain.fit(' if '(' in text else 'plain.')
        bound = max(.2, 3*plain)
        took = seconds(completer, text)
        if took<=bound: return
    pytest.fail(f'{text!r} took {took:.2f} s, but the bound is {bound:.2f} s')

def test_tab_knows_our_methods_and_the_names_of_outputs(completer):
    assert {'fine_tune', 'predict_df', 'task_report'} <= {*completions(completer, 'learn.')}
    assert {'kind', 'tags', 'box', 'area'} <= {*completions(completer, 'y.')}
    assert {'kind', 'tags', 'box', 'area'} <= {*completions(completer, "y['")}
    assert {'image', 'text'} <= {*completions(completer, "x['")}
    assert {'kind', 'box'} <= {*completions(completer, "heads['")}

explained_calls = dict(multi_learner=multi_learner, MultiLearner=MultiLearner, fine_tune=MultiLearner.fine_tune,
                       from_csv=MultiDataLoaders.from_csv, from_df=MultiDataLoaders.from_df,
                       show_batch=MultiDL.show_batch, predict=MultiLearner.predict,
                       ImageTextBlock=ImageTextBlock, TaskMonitor=TaskMonitor)

@pytest.mark.parametrize('name', explained_calls)
def test_question_mark_explains_every_parameter(name):
    obj = explained_calls[name]
    shown = Inspector(theme_name='nocolor').info(obj, name)['docstring']
    for n,p in inspect.signature(obj).parameters.items():
        if n in ('self', 'kwargs', 'args') or p.kind==p.VAR_POSITIONAL: continue
        assert f'\n    {n}: ' in shown, n

def test_every_comment_of_a_parameter_is_in_a_docstring():
    "In all modules, `__doc__` has every comment that fastcore finds in the source"
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
                ending = comment.split('; ')[-1]     # several parameters may share a line and a comment
                assert ending in f.__doc__, (m.name, name, parameter)
                n_seen += 1
    assert n_seen>300

# Display

def test_loaders_say_what_they_hold(dls):
    text = repr(dls)
    assert text.startswith('64 training and 16 validation items, in batches of 16')
    lines = {l.split()[1]: l for l in text.splitlines()[2:]}
    assert [*lines] == ['image', 'text', 'kind', 'tags', 'box', 'area']
    counts = [int(o) for o in re.findall(r'\w+ (\d+)', lines['kind'].split('classes: ')[1])]
    assert sum(counts)==64 and counts==sorted(counts, reverse=True)
    assert lines['kind'].endswith(' 0') and 'from ' in lines['area']
    assert dls._repr_html_().count('<tr>')==7

def test_missing_values_are_counted(shapes):
    df = pd.read_csv(shapes/'items.csv')
    df.loc[:9, 'kind'] = None
    dls = MultiDataLoaders.from_df(df, shapes, image='file', outputs=dict(kind=CategoryBlock, area=RegressionBlock),
                                   bs=16, seed=0, num_workers=0)
    kind,area = repr(dls).splitlines()[-2:]
    assert kind.split()[-1]=='10' and area.split()[-1]=='0'

def test_a_large_table_is_not_encoded_to_be_shown(shapes):
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', outputs=dict(kind=CategoryBlock), bs=16,
                                    num_workers=0)
    assert dls.train.column_at_hand('kind', most=10) is None
    assert dls.train.column_at_hand('kind') is not None

def test_empty_cells_of_pictures_and_texts_are_counted(shapes):
    df = pd.read_csv(shapes/'items.csv')
    df.loc[:4, 'caption'] = None
    df.loc[5:6, 'file'] = None
    dls = MultiDataLoaders.from_df(df, shapes, image='file', text='caption', outputs=dict(kind=CategoryBlock), bs=16,
                                   num_workers=0)
    image,text,_ = repr(dls).splitlines()[2:]
    assert image.split()[-1]=='2' and text.split()[-1]=='5'

def test_one_loader_says_what_it_holds(dls):
    text = repr(dls.valid)
    assert text.startswith('MultiDL: 16 items, in batches of 16')
    assert text.endswith('image, text -> kind, tags, box, area')

def test_factories_make_the_class_they_are_called_on(shapes):
    class Mine(MultiDataLoaders): pass
    dls = Mine.from_csv(shapes, 'items.csv', image='file', outputs=dict(kind=CategoryBlock), bs=16, num_workers=0)
    assert type(dls) is Mine

def test_vocab_and_c_are_dicts_by_name(dls):
    assert list(dls.vocab['kind'])==list(describe(dls).outputs['kind'].vocab)
    assert set(dls.vocab)=={'text', 'kind', 'tags'}
    assert dls.c == dict(kind=len(dls.vocab['kind']), tags=len(dls.vocab['tags']), box=4, area=1)

def test_a_learner_says_what_it_is(learn):
    text = repr(learn)
    n = sum(p.numel() for p in learn.model.parameters())
    assert text.startswith('MultiModel: ')
    for words in (f'{n/1000:.3g} K parameters', 'simple_cnn, depth 3', 'Optimizer: FusedAdam'): assert words in text
    for name in ('kind', 'tags', 'box', 'area'): assert re.search(rf'head +{name}', text)
    learn.model.encoders['image'].requires_grad_(False)
    assert re.search(r'image +simple_cnn.*frozen', repr(learn))
    learn.model.requires_grad_(True)
    assert repr(describe(learn))==repr(describe(learn.dls)) and '<table>' in learn._repr_html_()

def test_rates_as_given_and_counts_in_short(dls):
    learn = multi_learner(dls, simple_cnn, lr=slice(1e-5, 3e-3))
    assert 'learning rate slice(1e-05, 0.003)' in repr(learn)
    groups = learn.summary().split('\n\n')[1]
    assert re.search(r'new layers +[0-9.]+ K +[0-9.]+ K +0[.]003', groups)

def test_reports_are_tables_in_a_notebook(learn):
    report = learn.task_report(1)
    assert report._repr_html_().count('<table>')>=2 and 'losses: of training items' in repr(report)

def test_wide_characters_align(shapes):
    df = pd.read_csv(shapes/'items.csv').assign(색=lambda d: d.kind.map(lambda o: f'색 {o}'))
    dls = MultiDataLoaders.from_df(df, shapes, image='file', outputs={'색': CategoryBlock, 'area': RegressionBlock},
                                   bs=16, num_workers=0)
    from fastai_multi.figures import display_width
    a,b = repr(dls).splitlines()[-2:]
    assert display_width(a[:a.index('category')])==display_width(b[:b.index('number')])

# Pictures

def results(learn, **kwargs):
    with learn.no_bar(): learn.show_results(**kwargs)
    fig = plt.gcf()
    plt.close(fig)
    return fig

def test_drawn_colours_are_not_those_of_the_verdicts(learn):
    from matplotlib.colors import to_hex
    fig = results(learn, max_n=4)
    assert fig.axes[0].get_gridspec().get_geometry()==(2,2)
    drawn = {to_hex(p.get_edgecolor()) for ax in fig.axes for p in ax.patches if p.get_linewidth()>1}
    words = {to_hex(t.get_color()) for ax in fig.axes for t in ax.texts if t.get_text()[:1] in '✓✗'}
    assert len(drawn)==2 and words and not drawn & words
    samples, = fig.legends
    assert [o.get_linestyle() for o in samples.get_lines()]==['-', '--']
    assert {to_hex(o.get_color()) for o in samples.get_lines()}==drawn

def test_all_pictures_of_an_item_are_drawn(shapes):
    df = pd.read_csv(shapes/'items.csv')
    block = MultiInputBlock(front=ImageBlock, back=ImageBlock)
    dblock = DataBlock((block, MultiOutputBlock(kind=CategoryBlock)), get_x=lambda r: (shapes/r.file, shapes/r.file),
                       get_y=lambda r: (r.kind,), item_tfms=Resize(32))
    dblock.dataloaders(df, bs=8, num_workers=0).show_batch(max_n=2)
    fig = plt.gcf()
    plt.close(fig)
    assert [len(ax.images) for ax in fig.axes]==[2, 2]

@pytest.fixture(scope='module')
def unlabelled(shapes, tmp_path_factory):
    "A learner of every kind of output whose validation items have no labels"
    df = pd.read_csv(shapes/'items.csv')
    folder = tmp_path_factory.mktemp('masks')
    for i in range(len(df)): PILMask.create(np.full((64,64), i%2, dtype=np.uint8)).save(folder/f'{i}.png')
    df['mask'] = [str(folder/f'{i}.png') for i in range(len(df))]
    df = df.assign(px=df.x1.astype(float), py=df.y1.astype(float), half=df.area/2)
    names = ['kind', 'tags', 'x1', 'y1', 'x2', 'y2', 'area', 'mask', 'px', 'py', 'half']
    df[names] = df[names].astype(object)
    df.loc[:15, names] = None
    blocks = dict(kind=CategoryBlock, tags=MultiCategoryBlock, box=BBoxBlock, area=RegressionBlock, point=PointBlock,
                  price=NumberBlock(range=(0, 5000)), mask=MaskBlock(codes=['no', 'yes']))
    columns = dict(box=['x1', 'y1', 'x2', 'y2'], point=['px', 'py'], price='half')
    dls = MultiDataLoaders.from_df(df, shapes, image='file', outputs=blocks, columns=columns, label_delim='|', bs=16,
                                   valid_idx=range(16), num_workers=0)
    return multi_learner(dls, simple_cnn(2, width=4))

def test_a_missing_truth_is_marked_for_every_kind(unlabelled):
    fig = results(unlabelled, max_n=2)
    texts = [t.get_text() for ax in fig.axes[1::2] for t in ax.texts]      # the right column is predicted
    for name in unlabelled.dls.c:
        lines = [t for t in texts if t.startswith(f'{name}: ')]
        assert len(lines)==2 and all('no label' in t for t in lines), (name, lines)

def test_empty_masks_are_counted(unlabelled):
    mask = repr(unlabelled.dls).splitlines()[-1]
    assert mask.split()[1]=='mask' and mask.split()[-1]=='16'

def test_a_model_is_drawn_with_units_sizes_and_the_fusion(learn):
    ax = learn.plot_model()
    texts = ' | '.join(t.get_text() for t in ax.texts)
    plt.close(ax.figure)
    for words in ('reads 3 x 64 x 64', 'tokens', 'MACs: multiply-adds', 'concat\n', 'channels', 'In a head: '):
        assert words in texts, words

def test_plots_have_fonts_for_names_in_any_script(shapes):
    df = pd.read_csv(shapes/'items.csv').assign(모양=lambda d: d.kind.map(lambda o: f'모양 {o}'))
    dls = MultiDataLoaders.from_df(df, shapes, image='file', text='caption', outputs={'모양': CategoryBlock},
                                   item_tfms=Resize(32), bs=16, seed=0, num_workers=0)
    learn = multi_learner(dls, simple_cnn(2, width=4))
    interp = MultiInterpretation.from_learner(learn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        for draw in (interp['모양'].plot_confusion_matrix, interp['모양'].plot_calibration, learn.plot_model):
            draw()
            plt.gcf().canvas.draw()
            plt.close('all')
    assert not [w for w in seen if 'Glyph' in str(w.message)]

def test_an_answer_in_place_of_a_learner_is_answered_in_words(learn, shapes):
    file = shapes/'images/00000.jpg'
    with learn.no_bar(): answer = learn.predict((file, 'a'))[0]
    with pytest.raises(TypeError, match=r'plot_answer\(learn, item\)'): plot_answer(answer, file)

def test_any_script_is_drawn_without_a_warning_for_each_character(learn, shapes):
    from fastai_multi.figures import legible, say_missing
    say_missing.cache_clear()
    before = dict(plt.rcParams)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        fig,ax = plt.subplots()
        for i,text in enumerate(['✓ 한국어로 쓴 글', '中文', 'あいう', 'مرحبا', '😀']):
            drawn,fonts = legible(text)
            ax.text(.1, i/5, drawn, family=fonts)
        fig.canvas.draw()
        plt.close(fig)
    said = [str(w.message) for w in seen]
    assert len(said)==len({*said})<=4 and not any('Glyph' in s for s in said)
    assert legible('✓ 한')[0][0]=='✓' and dict(plt.rcParams)==before
