"""Files that are whole or not there, and the trace that tells models apart."""

import json

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from tuning.files import replace, same_trace, sha256, trace, write_json
from tuning.lora import add_lora
from tuning.qlora import quantize_model


def test_a_half_written_file_is_never_left(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"a": "é"})

    def killed(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(tmp_path / "deep" / "x.json", killed)
    with pytest.raises(TypeError):
        write_json(tmp_path / "deep" / "x.json", {"a": object()})
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "deep" / "x.json").read_text(encoding="utf-8")) == {"a": "é"}


def test_the_checksum_is_that_of_coreutils(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def llama(seed, hidden=32):
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=70, **sizes))


def gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=70, n_embd=32, n_layer=1, n_head=2))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_trace_tells_models_apart_and_not_dtypes(build):
    here = trace(build(0))
    assert same_trace(here, trace(build(0).bfloat16())) and same_trace(here, trace(build(0).half()))
    assert same_trace(here, trace(build(0).double()))
    assert not same_trace(here, trace(build(1)))
    assert same_trace(here, json.loads(json.dumps(here)))


def test_a_trace_is_that_of_the_frozen_model_whatever_is_done_to_it():
    here = trace(llama(0))
    adapted = llama(0)
    add_lora(adapted, ["embed_tokens", "q_proj"], rank=2, alpha=8)
    nn.init.normal_(adapted.model.embed_tokens.adapters["default"].A)
    assert same_trace(here, trace(adapted))
    assert same_trace(here, trace(quantize_model(llama(0))))
    assert same_trace(here, trace(torch.compile(llama(0)))) and same_trace(here, trace(nn.DataParallel(llama(0))))
    assert not same_trace(here, trace(llama(0, hidden=64)))


@pytest.mark.parametrize("part", ["embed_tokens", "embed_tokens.base"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, checkpoint_wrapper])
def test_a_trace_looks_through_what_is_wrapped_around_the_embeddings(part, wrap):
    model = llama(0)
    if part.endswith("base"):
        add_lora(model, ["embed_tokens"], rank=2, alpha=8)
    model.model.set_submodule(part, wrap(model.model.get_submodule(part)))
    assert trace(model) == trace(llama(0))


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def vit():
    return ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8))


def wav2vec2():
    convolutions = {"conv_dim": (16,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2Model(Wav2Vec2Config(**SIZES, **convolutions))


def clip():
    return CLIPModel(CLIPConfig(text_config=SIZES, vision_config=SIZES | {"image_size": 16, "patch_size": 8}))


def layers():
    return nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 3))


@pytest.mark.parametrize("build", [vit, wav2vec2, clip, layers])
def test_a_model_without_a_table_of_input_embeddings_has_no_trace(build):
    assert trace(build()) == [] and same_trace([], [])
    assert not same_trace([], trace(llama(0))) and not same_trace(trace(llama(0)), [])


@pytest.mark.parametrize("tokens", [1, 2, 3, 52, 64, 65, 69, 71, 200])
def test_a_trace_stays_where_the_vocabulary_changes(tokens):
    here, resized = trace(llama(0)), llama(0)
    resized.resize_token_embeddings(tokens)
    assert same_trace(here, trace(resized)) and same_trace(trace(resized), here)
    weight = resized.get_input_embeddings().weight
    rows = [0, *(2**power for power in range(8) if 2**power < tokens)]
    expected = torch.linalg.vector_norm(weight[rows].double(), dim=1).tolist()
    assert trace(resized) == pytest.approx([32, *expected], rel=0.01)
    other = llama(1)
    other.resize_token_embeddings(tokens)
    assert tokens < 3 or not same_trace(here, trace(other))
