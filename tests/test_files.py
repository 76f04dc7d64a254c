"""Files that are whole or not there, and the trace that tells models apart."""

import json

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
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


def layers(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 3))


@pytest.mark.parametrize("build", [llama, gpt2, layers])
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
    assert same_trace(here, trace(torch.compile(llama(0))))
    assert not same_trace(here, trace(llama(0, hidden=64)))
