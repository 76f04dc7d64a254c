"""The run that puts parts of a change back: each part against a plain computation, and a small run of one piece."""

import math

import pytest
import torch
from tuning.experiments import first_directions as run
from tuning.models import load_lm


@pytest.fixture
def parts():
    torch.manual_seed(0)
    changes = {"a": torch.randn(12, 20), "b": torch.randn(16, 10)}
    return changes, {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}


def put_back(parts, kind):
    return {name: run.kinds_of(parts, 0)[kind](*three) for name, three in parts.items()}


def norm(changes):
    return math.sqrt(sum(change.square().sum().item() for change in changes.values()))


def test_each_part_of_a_change(parts):
    changes, parts = parts
    whole, nothing = put_back(parts, "linear layers"), put_back(parts, "nothing")
    for name, change in changes.items():
        torch.testing.assert_close(whole[name], change, atol=1e-5, rtol=1e-5)
        assert not nothing[name].any()
        top = put_back(parts, "first 2")[name]
        assert torch.linalg.matrix_rank(top) == 2
        one = put_back(parts, "first 1")[name] + put_back(parts, "without first 1")[name]
        torch.testing.assert_close(one, change, atol=1e-5, rtol=1e-5)
        seen = put_back(parts, "8 random")[name]
        assert torch.linalg.matrix_rank(seen) == 8
        drawn = put_back(parts, "8 random, drawn out")[name]
        assert drawn.norm().item() == pytest.approx(put_back(parts, "first 8")[name].norm().item(), rel=1e-4)
        torch.testing.assert_close(drawn / drawn.norm(), seen / seen.norm())
    for rank in (1, 8):
        shorter = norm(put_back(parts, f"shortened as first {rank}"))
        assert shorter == pytest.approx(norm(put_back(parts, f"first {rank}")), rel=1e-4)
        drawn = put_back(parts, f"first {rank}, drawn out")
        assert norm(drawn) == pytest.approx(norm(changes), rel=1e-4)
        for name, change in put_back(parts, f"first {rank}").items():
            torch.testing.assert_close(drawn[name] / norm(drawn), change / norm(put_back(parts, f"first {rank}")))
    left = put_back(parts, "without first 8")
    assert norm(left) ** 2 == pytest.approx(norm(changes) ** 2 - norm(put_back(parts, "first 8")) ** 2, rel=1e-4)


def test_the_spectrum(parts):
    changes, parts = parts
    found = run.spectrum(parts)
    squared = norm(changes) ** 2
    assert found["held"][64] == pytest.approx(1.0)
    assert found["held"][4] == pytest.approx(norm(put_back(parts, "first 4")) ** 2 / squared, rel=1e-4)
    few, _, most = found["terms for nine tenths"]
    for terms, enough in ((few - 1, False), (most, True)):
        shares = [s[:terms].square().sum() / s.square().sum() for _, s, _ in parts.values()]
        assert all(share >= 0.9 for share in shares) == enough


def test_nothing_put_back_is_the_untrained_model(monkeypatch):
    """On the real model, two steps: its layers have the names that the run looks for."""
    monkeypatch.setattr(run, "RANKS", (1,))
    found = run.change("smollm2-135m", "The city of [X] is in the country of [Y].", 1e-4, 0, 2, limit=20)
    model, tokenizer = load_lm()
    rows = run.rows_of(tokenizer, run.TASK, 20)
    ready = run.prepare("LoRA", model, tokenizer, "The city of [X] is in the country of [Y].")
    assert found["nothing"] == run.hits_and_away(ready, rows, 20)  # an adapter begins as nothing
    assert found["tuned"]["perplexity"] != found["nothing"]["perplexity"] and 0 < found["relative length"] < 0.01
