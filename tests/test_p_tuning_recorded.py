"""Chapter 4's recorded run, on a tiny model; and its own parts."""

import json

import pytest
import torch
from tuning.data import TEMPLATES
from tuning.experiments import ledger, p_tuning, record
from tuning.methods import METHODS, fit, prepare
from tuning.models import load_lm
from tuning.p_tuning import PromptEncoder
from tuning.prompts import embeddings_of

PROMPT = "The city of [X] is in the country of [Y]."


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(p_tuning, "SEEDS", (0, 1))
    monkeypatch.setattr(p_tuning, "RATES", {kind: rates[1:3] for kind, rates in p_tuning.RATES.items()})
    monkeypatch.setattr(ledger, "sweep", lambda rates, run, more: max(rates, key=lambda lr: run(lr)["dev"]))


def test_runs_small_and_keeps_what_the_page_needs(tmp_path, tiny_gpt2, small):
    p_tuning.main(["--model", str(tiny_gpt2), "--limit", "20", "--steps", "5", "--out", str(tmp_path)])
    found = record.load_results("p_tuning", tmp_path)["results"]
    assert len(found) == 1 + 6 * (2 + 1) + 2 * (3 + 1) + 4 * (1 + 2)
    trained = {key: piece for key, piece in found.items() if key != "words" and "by hand" not in key}
    for key, run in trained.items():
        longer = 4 if "long" in key else 1
        assert len(run["losses"]) == run["steps"] == 5 * longer
        assert len(run["looks"]) == len(run["scores"]) == 6
        assert len(run["hits"]) == 20 and set(run["hits"]) <= set("01") and run["stopped"] is None
        assert run["kept"] == (6 * 2 * 2 * 32 if key.startswith("deep") else 6 * 32)
        assert set(run["looks"][0]) == ({"keys", "values"} if key.startswith("deep") else {"length", "apart"})
    for number, wording in enumerate(TEMPLATES["P17"][:4]):
        run, alone = found[f"wording/{number}/1"], found[f"wording/{number}/by hand"]
        assert run["template"].replace("[P]", "").strip() == wording and run["template"].count("[P]") == 6
        for piece in (run, alone):
            shares = [ledger.share(piece[name]) for name in ("hits", "among words", "among countries")]
            assert shares == sorted(shares)  # fewer rivals, never fewer right
            counts = [count for _, count in piece["said"]]
            assert counts == sorted(counts, reverse=True) and sum(counts) <= 20 and 1 <= len(counts) <= 5
    assert {key for key in trained if key.startswith("MLP, long/") and key.endswith("/0")} == {
        f"MLP, long/{lr:g}/0"
        for lr in (1e-2 / 3, 1e-2, 3e-2)  # around the ledger's rate
    }
    assert set(found["words"]) == {"length", "apart", "keys", "values"}


def test_parts_are_recorded_one_by_one(tmp_path, tiny_gpt2, small):
    arguments = ["--model", str(tiny_gpt2), "--limit", "16", "--steps", "1", "--out", str(tmp_path), "--parts"]
    p_tuning.main([*arguments, "deep control"])
    found = record.load_results("p_tuning", tmp_path)["results"]
    assert next(iter(found)) == "words" and all(key.startswith("deep, plain from") for key in list(found)[1:])


def test_a_kind_of_the_ledgers_is_trained_as_there(gpt2, tiny_gpt2):
    """The long runs differ from the ledger's in nothing but the number of steps."""
    model, tokenizer = gpt2
    rows = ledger.rows_of(tokenizer, "P17", 20)
    for kind, method in (("BiLSTM", "P-tuning, BiLSTM"), ("BiLSTM beside the prompt", p_tuning.BESIDE)):
        ready = prepare(method, model, tokenizer, PROMPT, 1)
        history = fit(ready, rows["train"], rows["dev"], 1e-3, 5, 1, every=1)
        found = p_tuning.trained(str(tiny_gpt2), "P17", PROMPT, kind, 1e-3, 1, 5, limit=20)
        assert found["losses"] == pytest.approx(history.losses, abs=1e-4)
        assert found["scores"] == json.loads(json.dumps(history.scores))


def test_spread_vectors_begin_as_long_as_told_around_zero():
    torch.manual_seed(0)
    encoder = PromptEncoder(6, 32)
    spread = p_tuning.Spread(encoder, 3.0)
    start = spread()
    assert start.norm(dim=1).mean().item() == pytest.approx(3.0, rel=1e-5)
    torch.testing.assert_close(start.mean(dim=0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cosine_similarity(start, encoder() - encoder().mean(dim=0)), torch.ones(6))
    assert sum(weight.numel() for weight in spread.parameters()) == sum(w.numel() for w in encoder.parameters())


@pytest.mark.parametrize("kind", ["vectors beside the prompt", "MLP beside the prompt", "BiLSTM, spread"])
def test_what_a_kind_begins_with_is_drawn_by_its_seed(kind, tiny_gpt2):
    model, tokenizer = load_lm(tiny_gpt2)
    one, same, other = (p_tuning.made(kind, model, tokenizer, PROMPT, seed) for seed in (0, 0, 1))
    assert torch.equal(one.vectors(), same.vectors()) and not torch.equal(one.vectors(), other.vectors())
    assert one.template.count("[P]") == 6 and ("country" in one.template) == ("beside" in kind)
    assert not any(weight.requires_grad for weight in model.parameters())
    if kind.startswith("vectors"):
        assert all((embeddings_of(model) == vector).all(dim=1).any() for vector in one.vectors())


def test_the_control_begins_where_prefix_tunings_mlp_begins(tiny_gpt2):
    model, tokenizer = load_lm(tiny_gpt2)
    deep = {kind: p_tuning.made(f"deep, {kind}", model, tokenizer, PROMPT, 1) for kind in ("plain", "MLP")}
    control = p_tuning.made("deep, plain from the MLP's start", model, tokenizer, PROMPT, 1)
    assert torch.equal(control.trained(), deep["MLP"].trained())
    assert deep["plain"].trained().std().item() == pytest.approx(1, abs=0.1)
    assert len(control.weights()) == len(deep["plain"].weights()) == 1 and len(deep["MLP"].weights()) == 5


def test_looks_measure_lengths_and_distances():
    square = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    assert p_tuning.looks(square) == {"length": 3.5, "apart": 5.0}
    deep = torch.zeros(2, 3, 2, 1, 4)
    deep[:, :, 0], deep[:, :, 1, :, 0] = 1.0, 5.0
    assert p_tuning.looks(deep) == {"keys": 2.0, "values": 5.0}


def test_words_are_whole_words_without_stop_words(smollm2):
    tokenizer = smollm2[1]
    of = lambda text: tokenizer(text).input_ids[0]  # noqa: E731
    words = p_tuning.words_of(tokenizer, {7})
    assert {of(" Japan"), of(" country"), 7} <= words
    assert not words & {of(" the"), of(" The"), of("Japan"), of(","), of(" ,"), of(" 1")}
    assert 10_000 < len(words) < len(tokenizer)


RECORDED = record.load_results("p_tuning")


@pytest.mark.skipif("words" not in (RECORDED or {"results": {}})["results"], reason="not yet recorded")
def test_what_is_recorded_holds_together():
    pieces = RECORDED["results"]
    held = record.load_results("ledger")["results"]
    for kind, rates in p_tuning.RATES.items():
        swept = {
            piece["lr"]: piece for key, piece in pieces.items() if key.startswith(f"{kind}/") and key.endswith("/0")
        }
        best = max(swept, key=lambda lr: swept[lr]["dev"])
        assert len(swept) >= len(rates) and min(swept) < best < max(swept)
        assert all(f"{kind}/{best:g}/{seed}" in pieces for seed in p_tuning.SEEDS)
    for kind, method in (("BiLSTM", "P-tuning, BiLSTM"), ("MLP", "P-tuning, MLP")):
        assert METHODS[method].chapter == 4
        assert f"{kind}, long/{held[f'run/{method}/0']['lr']:g}/0" in pieces
