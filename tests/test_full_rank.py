"""The run that fills ranks: the last layer alone says what the whole model says, and pairs are memorized."""

import math

import pytest
import torch
from tuning.experiments import full_rank
from tuning.lora import add_lora, unload


def test_the_last_layer_on_kept_states_says_what_the_model_says(smollm2):
    model, tokenizer = smollm2
    ids, words, answers = full_rank.pairs_of(model, tokenizer, 6, seed=3)
    assert ids.shape == (6, 3) and len(set(words.tolist())) == 64 and answers.max() < 64
    assert not set(words.tolist()) & set(tokenizer.all_special_ids)
    last = full_rank.LastLayer(model, ids, words, batch_size=4)
    add_lora(last.layer, "all-linear", rank=2, alpha=6)
    try:
        for name, weight in last.layer.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(weight, std=0.05)
        with torch.no_grad():
            whole = model(input_ids=ids).logits[:, -1]
            torch.testing.assert_close(last.logits(torch.arange(6)), whole[:, words], atol=2e-4, rtol=1e-4)
            bits, share = full_rank.held(last, answers)
        losses = torch.nn.functional.cross_entropy(whole[:, words], answers, reduction="none") / math.log(2)
        assert bits == pytest.approx(6 * max(0.0, 6 - losses.mean().item()), abs=1e-2)
        assert share == (whole[:, words].argmax(1) == answers).double().mean().item()
    finally:
        unload(last.layer)


def test_a_few_pairs_are_memorized_and_the_run_ends_when_it_takes_up_no_more(monkeypatch):
    monkeypatch.setattr(full_rank, "BLOCK", 20)
    found = full_rank.memorize("smollm2-135m", 4, 32, 1e-2, 0, 6)
    assert found["right"] == 1.0 and 180 < found["bits"] <= 192 and found["trained"] == 40_704
    assert found["bits a number"] == found["bits"] / 40_704 and found["steps"] < 120
    assert found["bits"] == max(bits for bits, _ in found["curve"])
