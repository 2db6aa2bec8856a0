"Every call of a learner works for every encoder and fusion, and exports predict the same in a fresh process"
import importlib.util, subprocess, sys
import pytest
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.models.awdlstm import AWDLSTMEncoder
from fastai_multi.models.fusion import fusions
from fastai_multi.models.text import text_encoders
import fastai_multi.models.tokens    # defines two fusions
from tests.small_models import save_bert, save_siglip

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]

ENCODERS = ['cnn','resnet18','timm','bag','lstm','awd_lstm','bert','lora','siglip','row']
STAGED = ['cnn','resnet18','timm']

class Source:
    "A drawn table, small models in folders, and a learner for each combination of an encoder and a fusion"
    def __init__(self, folder):
        self.folder = folder
        self.path = multi_shapes(folder/'shapes', n=40, size=32, seed=0)
        self.df = pd.read_csv(self.path/'items.csv')
        self.df['file'] = [str(self.path/f) for f in self.df.file]
        self.df['valid'] = self.df.groupby('colour').cumcount()%2==1    # every colour is in the training split
        self.df.loc[3:4, 'caption'] = None
        self.loaders = {}
        for name,save in dict(bert=save_bert, siglip=save_siglip).items():
            (folder/name).mkdir()
            save(folder/name)

    def learner(self, encoder, fusion, **kwargs):
        set_seed(0)
        options = {**self.inputs(encoder), **kwargs}
        return multi_learner(self.dls(encoder), fusion=fusion, pretrained=encoder=='siglip', **options)

    def dls(self, encoder):
        "Loaders of a picture and a text, or of a picture and a row of the table"
        key = encoder
        if encoder not in ('bert','lora','siglip','row'): key = 'words'
        if key not in self.loaders: self.loaders[key] = self.new_loaders(key)
        return self.loaders[key]

    def new_loaders(self, key):
        options = dict(text='caption')
        if key=='row': options = dict(cat_names=['tags'], cont_names=['x1'])
        if key in ('bert','lora','siglip'):
            tok = str(self.folder/('siglip' if key=='siglip' else 'bert'))
            options['text_block'] = PlainTextBlock(tok=tok, max_len=16)
        outputs = dict(colour=CategoryBlock, area=RegressionBlock)
        return MultiDataLoaders.from_df(self.df, self.path, image='file', outputs=outputs, valid_col='valid', bs=10,
                                        item_tfms=Resize(32), num_workers=0, device='cpu', **options)

    def inputs(self, encoder):
        "The arguments of `multi_learner` for this encoder and a small second one"
        res = dict(arch=partial(simple_cnn, depth=2, width=4))
        if encoder=='row': return res
        if encoder=='resnet18': return dict(arch=resnet18, depth=1)
        if encoder=='timm': return dict(arch='timm/test_resnet', depth=2)
        if encoder=='siglip':
            dual = dual_encoders(self.folder/'siglip')
            return dict(arch=dict(image=dual.image), text=dual.text)
        if encoder=='bert': res['text'] = partial(built_bert, folder=str(self.folder/'bert'))
        if encoder=='lora': res['text'] = partial(built_bert, folder=str(self.folder/'bert'), lora=2)
        if encoder=='lstm': res['text'] = partial(text_encoders['lstm'], emb=8, hidden=8)
        if encoder=='awd_lstm': res['text'] = partial(AWDLSTMEncoder, emb_sz=8, n_hid=8, n_layers=2)
        return res

def built_bert(n_vocab, folder, lora=None): return transformer_encoder(folder, lora=lora)

@pytest.fixture(scope='session')
def source(tmp_path_factory):
    for name in ('timm','transformers','peft'):
        if not importlib.util.find_spec(name): pytest.skip(f'the matrix needs {name}, which fastai_multi[dev] brings')
    return Source(tmp_path_factory.mktemp('matrix'))

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()

def item_of(source): return source.df.iloc[21]

def raw(learn, row):
    "The probabilities and numbers that a learner predicts for a row"
    return {n: torch.as_tensor(v).float() for n,v in quiet(learn, lambda: learn.predict(row))[2].items()}

COMBINATIONS = [(e, f) for e in ENCODERS for f in fusions]

@pytest.fixture(scope='session')
def exported(source, tmp_path_factory):
    "For each combination, the learner's prediction before its export, and that of the file in a fresh process"
    folder = tmp_path_factory.mktemp('exported')
    here = {}
    for encoder,fusion in COMBINATIONS:
        learn = source.learner(encoder, fusion)
        quiet(learn, lambda: learn.fit(1, 1e-3))                    # two batches
        here[encoder,fusion] = raw(learn, item_of(source))
        learn.export(folder/f'{encoder}-{fusion}.pkl')
    item_of(source).to_pickle(folder/'row.pickle')
    code = f"""
import warnings
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai_multi import *
folder = Path({str(folder)!r})
row = pd.read_pickle(folder/'row.pickle')
res = {{}}
for file in folder.glob('*.pkl'):
    learn = load_multi_learner(file)
    with learn.no_bar(): res[file.stem] = dict(learn.predict(row)[2].items())
torch.save({{k: {{n: torch.as_tensor(v).float() for n,v in o.items()}} for k,o in res.items()}}, folder/'found.pth')
"""
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)
    return here,torch.load(folder/'found.pth')

@pytest.mark.parametrize('encoder,fusion', COMBINATIONS)
def test_a_fresh_process_predicts_the_same(exported, encoder, fusion):
    here,found = exported
    assert len(found)==len(COMBINATIONS)
    wanted = here[encoder,fusion]
    for n,v in found[f'{encoder}-{fusion}'].items():
        assert v.isfinite().all() and v.shape==wanted[n].shape
        torch.testing.assert_close(v, wanted[n], atol=1e-4, rtol=1e-4)

EACH = [*[(e, 'concat') for e in ENCODERS], *[('cnn', f) for f in fusions if f!='concat'],
        *[(e, f) for e in ('resnet18','bert') for f in ('attention','tokens')]]

# All combinations run `export`, a load in a fresh process and `predict`. The other calls run on a covering design:
# every encoder with one fusion, every fusion with one encoder, and the fusions of tokens with encoders that give maps
# and words.

def test_the_design_covers_every_encoder_every_fusion_and_every_pair():
    assert {e for e,_ in EACH}==set(ENCODERS) and {f for _,f in EACH}==set(fusions)
    assert set(text_encoders)<=set(ENCODERS)                      # add every new text encoder
    assert len(set(COMBINATIONS))==len(ENCODERS)*len(fusions) and len(set(EACH))==len(EACH)
    for encoder in ('cnn','bert'):                                # encoders that give maps and words
        assert {'attention','tokens'}<={f for e,f in EACH if e==encoder}
    assert {f for e,f in EACH if e in STAGED}==set(fusions)       # `depth` and `split` with every fusion

@pytest.mark.parametrize('encoder,fusion', EACH)
def test_everything_that_a_learner_does(source, encoder, fusion):
    learn = source.learner(encoder, fusion)
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    for level in ('features','parameters'):
        quiet(learn, lambda: learn.fit(1, 1e-3, cbs=GradientBalance('pcgrad', level=level)))
    assert any(not torch.equal(p, before[n]) for n,p in learn.model.named_parameters())
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=UncertaintyWeighting()))
    assert all(p.isfinite().all() for p in learn.model.parameters())
    row = item_of(source)
    answer = quiet(learn, lambda: learn.predict(row))
    assert answer[0].colour in learn.dls.train.named_parts()[1]['colour'].vocab
    table = quiet(learn, lambda: learn.predict_df(source.df.iloc[20:23]))
    assert table.colour.iloc[1]==answer[0].colour and abs(table.area.iloc[1]-float(answer[0].area))<1e-2
    preds,targs = quiet(learn, lambda: learn.tta(n=1))
    assert preds.colour.isfinite().all() and len(preds.area)==len(targs.area)==int(source.df.valid.sum())
    weights = {k: v.clone() for k,v in learn.model.state_dict().items()}
    assert 0<quiet(learn, lambda: learn.lr_find(num_it=4, show_plot=False)).valley<=10
    assert all(torch.equal(v, weights[k]) for k,v in learn.model.state_dict().items())
    summary,view = learn.summary(),first(learn.model.views.values())
    for name in (*learn.modalities, *learn.tasks): assert name in summary
    assert type(view.fusion).__name__.lower().removesuffix('fusion') in summary.lower()
    said = ' '.join(t.get_text() for t in plot_model(learn).texts)
    plt.close('all')
    for name in learn.tasks: assert f'{name}:' in said

@pytest.mark.parametrize('encoder,fusion', [(e, f) for e,f in EACH if e in STAGED])
@pytest.mark.parametrize('options', [dict(depth=dict(colour=1, area=2)), dict(split=1)])
def test_depth_and_split(source, encoder, fusion, options):
    if encoder=='resnet18': options = {'depth': 2, **options}
    learn = source.learner(encoder, fusion, **options)
    quiet(learn, lambda: learn.fit(1, 1e-3))
    assert all(v.isfinite().all() for v in raw(learn, item_of(source)).values())
    trunk = learn.model.trunks['image']
    if 'split' in options: assert trunk.split==1 and len(trunk.branches)==2
    else: assert trunk.depths['colour']==1 and trunk.depths['area']==2

@pytest.mark.parametrize('encoder', [e for e in ENCODERS if e not in STAGED])
def test_options_of_stages_beside_an_encoder_without_any(source, encoder):
    "The picture's encoder is cut and split, but a dual encoder, which has no stages, raises a clear error"
    if encoder!='siglip':
        learn = source.learner(encoder, 'concat', depth=1)
        assert learn.model.trunks['image'].depths=={'colour': 1, 'area': 1}
        return
    with pytest.raises(ValueError, match='`split` is about the stages of a backbone'):
        source.learner(encoder, 'concat', split=1)
