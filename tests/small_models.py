"Small Hugging Face models with random weights, written to a folder"
import pytest

WORDS = 'a red blue green yellow orange pink purple circle square star triangle on the left right small large'.split()

def save_tokenizer(path, words=WORDS):
    "Save a tokenizer of these words, and return its number of tokens"
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    vocab = {w: i for i,w in enumerate(['[PAD]', '[UNK]', '[CLS]', *words, '[SEP]'])}
    end = vocab['[SEP]']
    core = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', special_tokens=[('[CLS]',2), ('[SEP]',end)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]',
                                         sep_token='[SEP]').save_pretrained(path)
    return len(vocab)

def save_bert(path, words=WORDS, layers=2):
    "Save a BERT with a few layers"
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(vocab_size=save_tokenizer(path, words), hidden_size=16, num_hidden_layers=layers,
                                     num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(path)

def save_siglip(path):
    transformers = pytest.importorskip('transformers')
    n = save_tokenizer(path)
    layers = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(layers, vocab_size=n, max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=n-1,
                projection_size=16)
    config = transformers.SiglipConfig(text_config=text, vision_config=dict(layers, image_size=32, patch_size=8))
    transformers.SiglipModel(config).save_pretrained(path)
    size = dict(height=32, width=32)
    transformers.SiglipImageProcessor(size=size, crop_size=size).save_pretrained(path)
