"""The ledger's recorder: a small run of it, its sweeps, its rows; and what is recorded."""

import pytest
import torch
from tuning.evaluate import elsewhere
from tuning.experiments import ledger
from tuning.experiments.record import load_results
from tuning.methods import METHODS, Method
from tuning.models import load_lm

FEW = {name: Method(METHODS[name].chapter, (1e-3, 1e-2)) for name in ("P-tuning, MLP", "LoRA", "LOMO")}


def test_a_small_ledger(tmp_path, tiny_gpt2, monkeypatch):
    monkeypatch.setattr(ledger, "METHODS", FEW)
    monkeypatch.setattr(ledger, "SEEDS", (0, 1))
    monkeypatch.setattr(ledger, "SHOWN", (1, 2))
    monkeypatch.setattr(ledger, "sweep", lambda rates, run: max(rates, key=lambda lr: run(lr)["dev"]))
    asked_apart = []
    monkeypatch.setattr(ledger, "cost_apart", lambda *a: asked_apart.append(a) or {"seconds": 90.0, "peak_bytes": 1e9})
    arguments = ["--model", str(tiny_gpt2), "--limit", "30", "--steps", "2", "--out", str(tmp_path)]
    ledger.main([*arguments, "--methods", *FEW])
    pieces = load_results("ledger", tmp_path)["results"]
    assert len(pieces) == 4 + 2 + 2 + 3 * (2 + 2 + 1)
    rows = {row["method"]: row for row in pieces["rows"]}
    assert list(rows) == ["most frequent answer", "asked", "asked with examples", *FEW]
    for row in rows.values():
        count, low, high = row["right"]
        assert 0 <= low <= count <= high <= row["subjects"] == 30
        assert row["seeds"] == (1 if row["method"] in ("most frequent answer", "asked") else 2)
    for method in FEW:
        runs = [pieces[f"run/{method}/{seed}"] for seed in (0, 1)]
        assert rows[method]["right"][0] == pytest.approx(sum(run["hits"].count("1") for run in runs) / 2)
        assert rows[method]["lr"] == runs[0]["lr"] and rows[method]["seconds"] == 90.0
    untrained = elsewhere(*load_lm(tiny_gpt2), limit=30)
    for method in ("asked", "asked with examples", "P-tuning, MLP"):  # these leave the model as it was
        assert rows[method]["continents"] == untrained["continents"].sum()
        assert rows[method]["perplexity"] == pytest.approx(untrained["perplexity"])
    assert "elsewhere" not in pieces["run/P-tuning, MLP/0"] and "elsewhere" in pieces["run/LOMO/0"]
    assert "continents" not in rows["most frequent answer"]
    assert [call[3] for call in asked_apart] == list(FEW) and {call[1] for call in asked_apart} == {"P17"}


def test_a_cost_is_measured_in_a_process_of_its_own(tiny_gpt2):
    template = "The city of [X] is in [Y]."
    found = ledger.cost_apart(str(tiny_gpt2), "P17", template, "LoRA", 2)
    assert found["steps"] == 2 and found["seconds"] > 0 and found["peak_bytes"] > 1e8
    with pytest.raises(RuntimeError, match=r"measuring .*'lora'.* ended with status 1"):
        ledger.cost_apart(str(tiny_gpt2), "P17", template, "lora", 2)


def landscape(ends):
    """A function from a rate to a run that begins at 0.2 and ends as told; and the rates that were asked for."""
    tried = []

    def run(lr):
        tried.append(lr)
        end = ends(lr)
        return {"scores": [[0, 0.2], [150, end]], "dev": max(0.2, end), "stopped": None}

    return run, tried


@pytest.mark.parametrize(
    ("ends", "more", "best"),
    [
        (lambda lr: {1e-4: 0.21, 1e-3: 0.4, 1e-2: 0.1}[lr], [], 1e-3),
        (lambda lr: 0.1 if lr > 2e-2 else 0.4 if lr > 5e-3 else 0.2, [3e-2], 1e-2),  # goes on until it fails
        (lambda lr: 0.2 if lr < 5e-5 else 0.1 if lr > 5e-3 else 0.4, [1e-5], 1e-4),  # until nothing is learned
        (lambda lr: 0.4, [1e-5, 3e-2, 1e-6, 9e-2], 1e-4),  # twice at each end at most
    ],
)
def test_a_sweep_reaches_from_no_learning_to_failure(ends, more, best):
    run, tried = landscape(ends)
    assert ledger.sweep((1e-4, 1e-3, 1e-2), run) == best
    assert tried == pytest.approx([1e-4, 1e-3, 1e-2, *more])


def test_a_training_that_stopped_has_failed():
    def run(lr):
        stopped = "not finite" if lr > 5e-3 else None
        return {"scores": [[0, 0.2], [30, 0.5]], "dev": 0.5 if lr > 5e-4 else 0.2, "stopped": stopped}

    tried = []
    ledger.sweep((1e-4, 1e-3, 1e-2), lambda lr: tried.append(lr) or run(lr))
    assert max(tried) == 1e-2


def test_a_row_counts_cities_and_pairs_them():
    hits, asked = ["1100110000", "1110110000"], "1000000000"
    untouched = [{"continents": "1100", "perplexity": 10.0}, {"continents": "1000", "perplexity": 12.0}]
    row = ledger.row("LoRA", 6, hits, asked, 100, untouched, lr=1e-3)
    assert row["right"][0] == pytest.approx(4.5) and row["over asking"][0] == pytest.approx(3.5)
    assert 0 < row["right"][1] < 4.5 < row["right"][2] < 10
    assert (row["continents"], row["countries"], row["perplexity"], row["lr"]) == (1.5, 4, 11.0, 1e-3)
    alone = ledger.row("asked", 1, [asked], asked, 40, None)
    assert alone["over asking"] == [0, 0, 0] and "continents" not in alone


RECORDED = load_results("ledger")


@pytest.mark.skipif(RECORDED is None, reason="the ledger is not yet recorded")
def test_what_is_recorded_holds_together():
    pieces = RECORDED["results"]
    rows = {row["method"]: row for row in pieces["rows"]}
    assert set(rows) == {"most frequent answer", "asked", "asked with examples", *METHODS}
    for method in METHODS:
        runs = [pieces[f"run/{method}/{seed}"] for seed in ledger.SEEDS]
        swept = {key: piece for key, piece in pieces.items() if key.startswith(f"sweep/{method}/")}
        assert len(swept) >= 5 and max(swept.values(), key=lambda one: one["dev"])["lr"] == runs[0]["lr"]
        assert all(len(run["hits"]) == 1064 and run["stopped"] is None for run in runs)
        assert torch.tensor(rows[method]["right"]).isfinite().all() and rows[method]["seconds"] > 10
        assert min(run["lr"] for run in swept.values()) < runs[0]["lr"] < max(run["lr"] for run in swept.values())
