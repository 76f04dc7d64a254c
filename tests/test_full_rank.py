"""The run that fills ranks: the last layer alone says what the whole model says, and pairs are memorized."""

import json
import math

import pytest
import torch
from tuning.experiments import full_rank
from tuning.lora import LoRA


def test_the_last_layer_on_kept_inputs_says_what_the_model_says(smollm2):
    model, tokenizer = smollm2
    ids, words, answers = full_rank.pairs_of(model, tokenizer, 6, seed=3)
    assert ids.shape == (6, 2) and len(set(words.tolist())) == 64 and answers.max() < 64
    assert not set(words.tolist()) & set(tokenizer.all_special_ids)
    last = full_rank.LastLayer(model, ids, words, answers, batch_size=4)
    torch.manual_seed(0)
    adapter = LoRA(1536, 576, rank=2, alpha=6)
    torch.nn.init.normal_(adapter.B, std=0.05)
    beside = model.model.layers[-1].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: output + adapter(inputs[0])
    )
    try:
        with torch.no_grad():
            whole = model(input_ids=ids).logits[:, -1][:, words]
            torch.testing.assert_close(last.logits(adapter, torch.arange(6)), whole, atol=2e-4, rtol=1e-4)
    finally:
        beside.remove()
    bits, share = last.held(adapter, 6)
    losses = torch.nn.functional.cross_entropy(whole, answers, reduction="none") / math.log(2)
    assert bits == pytest.approx(6 * max(0.0, 6 - losses.mean().item()), abs=1e-2)
    assert share == (whole.argmax(1) == answers).double().mean().item()


def test_a_few_pairs_are_memorized_by_rank_8_and_not_by_rank_1():
    eight = full_rank.memorize("smollm2-135m", 8, 32, 64, 1e-2, 0, 200)
    assert eight["right"] == 1.0 and 170 < eight["bits"] <= 192 and eight["trained"] == 8 * (1536 + 576)
    assert eight["bits a number"] == eight["bits"] / eight["trained"] and len(eight["curve"]) >= 6
    one = full_rank.memorize("smollm2-135m", 1, 32, 64, 1e-2, 0, 200)
    assert one["bits"] < eight["bits"]


def test_a_small_run_writes_every_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(full_rank, "RANKS", (1, 2))
    monkeypatch.setattr(full_rank, "PAIRS", (8, 16))
    monkeypatch.setattr(full_rank, "RATES", (1e-2, 1e-1))
    full_rank.main(["--out", str(tmp_path), "--steps", "6"])
    pieces = json.loads((tmp_path / "full_rank.json").read_text())["results"]
    assert len(pieces) == 2 * (2 + 2 * 2 + 1)
    assert pieces["run/2/8/1"]["pairs"] == 8 and pieces["longer/2"]["steps"] == 24
