"""What the tests share: a default model that is loaded once, and tiny models that are made on the spot."""

import pytest
import torch
from browser import address, browser, html  # noqa: F401


@pytest.fixture(scope="session")
def smollm2():
    from tuning.models import load_lm

    return load_lm(device="cpu")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """The folder of a random BERT with a masked-language head, whose vocabulary knows a few words."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + "the capital of is . britain france london paris south korea seoul a".split()  # noqa: SIM905
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, smollm2):
    """The folder of a random GPT-2 (another causal architecture, with learned positions) and a real tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=49152, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    smollm2[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tiny_bert):
    from tuning.models import load_lm

    return load_lm(tiny_bert, device="cpu")


@pytest.fixture(scope="session")
def gpt2(tiny_gpt2):
    from tuning.models import load_lm

    return load_lm(tiny_gpt2, device="cpu")


@pytest.fixture
def lm(request):
    """The model and tokenizer of the fixture that a test is parametrized with."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def tiny_llama(tmp_path, tiny_bert):
    """A tiny model, and the folder that it and a tokenizer are saved in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((tiny_bert / file).read_bytes())
    return model, tmp_path / "model"
