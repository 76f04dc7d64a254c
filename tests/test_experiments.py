import ast
import copy
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from tuning import data, records
from tuning.evaluate import balanced, perplexity, ratio_interval
from tuning.experiments import (
    bench,
    four_bits,
    four_way,
    full_tuning,
    instruction,
    learning_curve,
    lomo_memory,
    lora,
    lora_tasks,
    probe,
    prompt_tuning,
    qlora_memory,
    record,
)
from tuning.models import load_encoder, load_lm
from tuning.nf4 import dequantize, quantize
from tuning.prompts import allowed_tokens
from tuning.qlora import quantize_model


def recorder(folder, total=2, **settings):
    return record.Recorder("trial", folder, "cpu", total, module="lora", **settings)


def test_a_killed_run_repeats_nothing_finished(tmp_path):
    calls = []

    def compute(key):
        calls.append(key)
        return {"key": key}

    first = recorder(tmp_path, seed=0)
    first.piece("a/b", lambda: compute("a"))
    del first  # killed here
    second = recorder(tmp_path, seed=0)
    assert second.piece("a/b", lambda: compute("a")) == {"key": "a"}
    second.piece("c", lambda: compute("c"))
    path = second.finish()
    assert calls == ["a", "c"]
    saved = json.loads(path.read_text())
    assert saved["results"] == {"a/b": {"key": "a"}, "c": {"key": "c"}}
    assert [list(origin["seconds"]) for origin in saved["origins"]] == [["a/b", "c"]]
    assert set(saved["origins"][0]["place"]) == {"commit", "date", "machine", "versions"}
    assert set(saved["provenance"]) == {
        "command", "commit", "date", "device", "machine", "seconds", "settings", "versions",
    }  # fmt: skip
    assert not (tmp_path / ".partial").exists()


def test_pieces_of_other_settings_are_not_taken_up(tmp_path):
    recorder(tmp_path, seed=0).piece("a", lambda: 0)
    assert recorder(tmp_path, seed=1).piece("a", lambda: 1) == 1


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library in place of the book's: the experiment `trial` imports `one`, which imports `two`."""
    package = tmp_path / "package"
    (package / "experiments").mkdir(parents=True)
    (package / "one.py").write_text("from . import two\n")
    (package / "two.py").write_text('def f():\n    """Words."""\n    return 1\n')
    (package / "three.py").write_text("x = 1\n")
    (package / "experiments" / "trial.py").write_text("from ..one import f\nfrom .record import Recorder\n")
    monkeypatch.setattr(record, "PACKAGE", package)
    yield package
    record.code_hash.cache_clear()


def taken_up(folder, **options):
    """Whether a new run takes up the piece that an earlier one left."""
    record.code_hash.cache_clear()
    return record.Recorder("trial", folder, "cpu", 1, save=True).piece("a", lambda: "new", **options) == "old"


def test_a_piece_is_valid_while_the_modules_behind_it_are_unchanged(tmp_path, library, monkeypatch):
    record.code_hash.cache_clear()
    record.Recorder("trial", tmp_path, "cpu", 1, save=True).piece("a", lambda: "old")
    saved = (tmp_path / "trial.part.json").read_text()
    monkeypatch.setattr(record, "code_commit", lambda: "another commit")
    monkeypatch.setattr(record, "machine", lambda: "another machine")
    assert taken_up(tmp_path)
    (library / "three.py").write_text("x = 2\n")  # nothing imports it
    (library / "two.py").write_text('def f():  # why\n    """Other words."""\n    return 1\n')
    assert taken_up(tmp_path)
    (library / "two.py").write_text("def f():\n    return 2\n")
    assert not taken_up(tmp_path)
    (tmp_path / "trial.part.json").write_text(saved)
    assert not taken_up(tmp_path, modules=("three",))


def test_an_unknown_module_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no module 'lorra'"):
        recorder(tmp_path).piece("a", lambda: 1, modules=("lorra",))


def test_what_an_experiment_depends_on():
    behind = record.imported(["experiments.lora"])
    assert {"lora", "training", "prompts", "experiments.learning_curve"} <= behind.keys()
    assert not {"lomo", "experiments.record", "experiments.four_way"} & behind.keys()


def test_pieces_are_functions_of_plain_arguments(tmp_path):
    assert recorder(tmp_path).piece("a", pow, 2, 5) == 32


def test_a_long_run_goes_on_elsewhere(tmp_path, monkeypatch):
    """Pieces kept with --save are all that a clone on another machine needs."""
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(record, "machine", lambda: "the first")
    recorder(here, save=True).piece("a", lambda: 1)
    there.mkdir()
    (there / "trial.part.json").write_bytes((here / "trial.part.json").read_bytes())
    monkeypatch.setattr(record, "machine", lambda: "the second")
    second = recorder(there, save=True)
    assert second.piece("a", lambda: 2) == 1
    second.piece("b", lambda: 3)
    saved = json.loads(second.finish().read_text())
    assert saved["results"] == {"a": 1, "b": 3}
    places = [(origin["place"]["machine"], list(origin["seconds"])) for origin in saved["origins"]]
    assert places == [("the first", ["a"]), ("the second", ["b"])]
    assert not (there / "trial.part.json").exists()


def test_a_run_without_save_takes_saved_pieces_up_and_leaves_them(tmp_path):
    recorder(tmp_path, save=True).piece("a", lambda: 1)
    second = recorder(tmp_path)
    assert second.piece("a", lambda: 2) == 1
    second.piece("b", lambda: 3)
    assert list(json.loads((tmp_path / "trial.part.json").read_text())) == ["a"]


def test_a_valid_piece_is_taken_wherever_it_is(tmp_path):
    """A stale piece of an earlier try on this machine does not hide a good one that came with the repository."""
    recorder(tmp_path, steps=1).piece("a", lambda: "stale")
    recorder(tmp_path, save=True, steps=2).piece("a", lambda: "good")
    assert recorder(tmp_path, save=True, steps=2).piece("a", lambda: "again") == "good"
    assert recorder(tmp_path, steps=2).piece("a", lambda: "again") == "good"


def test_a_piece_is_at_once_what_will_be_read(tmp_path):
    assert recorder(tmp_path).piece("a", lambda: {1: (2, 3)}) == {"1": [2, 3]}


def test_the_hash_of_code_is_the_same_in_every_python():
    """What `ast.dump` writes differs: later versions have fields more, and leave empty ones out."""
    tree = ast.parse("def f(a, *, b=None):\n    return [a, 'b', 1.5]\n")
    expected = ["Module", ["body", [["FunctionDef", ["name", "'f'"], ["args", ["arguments",
        ["args", [["arg", ["arg", "'a'"]]]], ["kwonlyargs", [["arg", ["arg", "'b'"]]]],
        ["kw_defaults", [["Constant"]]]]],
        ["body", [["Return", ["value", ["List", ["elts", [["Name", ["id", "'a'"], ["ctx", ["Load"]]],
        ["Constant", ["value", "'b'"]], ["Constant", ["value", "1.5"]]]], ["ctx", ["Load"]]]]]]]]]]]  # fmt: skip
    assert record._plain(tree) == expected


def test_a_file_of_pieces_that_is_no_json_is_named(tmp_path):
    (tmp_path / "trial.part.json").write_text("<<<<<<< HEAD")
    with pytest.raises(ValueError, match=r"trial\.part\.json is not JSON"):
        recorder(tmp_path)


def test_results_are_those_of_the_package_however_the_path_is_written(monkeypatch):
    monkeypatch.setattr(record, "code_commit", lambda: "abc-dirty")
    for folder in (record.RESULTS / ".." / "results", Path(os.path.relpath(record.RESULTS))):
        with pytest.raises(RuntimeError, match="committed code only"):
            recorder(folder)


def test_every_experiment_can_save(tmp_path):
    assert record.option_parser("An experiment.").parse_args(["--save"]).save


@pytest.mark.parametrize("commit", [None, "abc-dirty"])
def test_results_come_from_committed_code_only(commit, monkeypatch):
    monkeypatch.setattr(record, "code_commit", lambda: commit)
    with pytest.raises(RuntimeError, match="committed code only"):
        recorder(record.RESULTS)


def test_dirty_code_is_noticed(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], cwd=tmp_path, check=True)

    package = tmp_path / "tuning" / "experiments"
    package.mkdir(parents=True)
    (tmp_path / "tuning" / "prompts.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    clean = record.code_commit()
    assert len(clean) == 40
    (tmp_path / "tuning" / "notes.md").write_text("prose is no code")
    assert record.code_commit() == clean
    (tmp_path / "tuning" / "prompts.py").write_text("x = 2\n")
    assert record.code_commit() == clean + "-dirty"


def test_what_is_not_recorded_says_so(tmp_path):
    assert record.load_results("nothing", tmp_path) is None
    assert record.provenance_line(None) == "not yet measured"


def test_the_committed_run_is_whole():
    saved = record.load_results("probe")
    keys = saved["results"].keys()
    for relation in probe.RELATIONS:
        assert {f"{part}/{relation}" for part in ("templates", "paraphrases", "few_shot", "controls")} <= keys
        assert len(saved["results"][f"templates/{relation}"]) >= 8
        assert sum(key.startswith(f"search/{relation}/") for key in keys) == len(probe.STARTS[relation]) * probe.SEEDS
    assert "dirty" not in saved["provenance"]["commit"]
    assert saved["provenance"]["settings"]["limit"] is None
    assert record.provenance_line(saved).startswith("recorded 20")


def test_probe_runs_on_a_tiny_model(tmp_path, tiny_gpt2, monkeypatch):
    """The whole command, small: two relations, few rows, few candidates."""
    monkeypatch.setattr(probe, "RELATIONS", ("P17", "P1376"))
    monkeypatch.setattr(probe, "ORDERS", 2)
    few = {relation: tuple(choices[:1] for choices in grammar) for relation, grammar in data.PARAPHRASES.items()}
    monkeypatch.setattr(data, "PARAPHRASES", few)
    monkeypatch.setattr(sys, "argv", ["probe"])
    probe.main(["--model", str(tiny_gpt2), "--device", "cpu", "--limit", "8", "--steps", "2", "--out", str(tmp_path)])
    saved = record.load_results("probe", tmp_path)["results"]
    assert len(saved) == 4 * 2 + 1 + 4
    assert saved["templates/P17"][0]["n"] == 8
    chosen = saved["paraphrases/P1376"]["folds"][0]
    assert chosen["dev"] == max(dev for dev, _ in chosen["scores"])
    path = saved["search/P17/is_in_the_country_of/0"]
    assert path["start"].split() == ["is", "in", "the", "country", "of"] and len(path["path"]) == 3
    assert not list(Path(tmp_path).glob("**/*.tmp"))


def test_triggers_may_not_be_answers_or_names(smollm2):
    allowed = allowed_tokens(*smollm2, probe.Probe(*smollm2, "P17", 8).candidates)
    encode = lambda text: smollm2[1](text).input_ids[0]  # noqa: E731
    assert allowed[encode(" the")] and allowed[encode(" country")]
    assert not any(allowed[encode(text)] for text in (" France", " Paris", "<|im_end|>", "\n"))


def test_paraphrases_are_distinct_templates(smollm2):
    from tuning.prompts import encode

    for relation in probe.RELATIONS:
        templates = data.paraphrases(relation)
        assert len(set(templates)) == len(templates) >= 36
        assert all(encode(smollm2[1], template, "Osaka") for template in templates)


def test_learning_curve_runs_small(tmp_path, monkeypatch):
    """The whole command on few rows; the default models, since it needs both kinds."""
    monkeypatch.setattr(learning_curve, "SIZES", (8, None))
    monkeypatch.setattr(learning_curve, "SHOTS", (0, 2))
    monkeypatch.setattr(learning_curve, "SEEDS", (0, 1))
    monkeypatch.setattr(learning_curve, "RATES", (1e-4, 1e-3))
    monkeypatch.setattr(learning_curve, "DEV", 8)
    monkeypatch.setattr(sys, "argv", ["learning_curve"])
    learning_curve.main(["--device", "cpu", "--limit", "40", "--steps", "1", "--out", str(tmp_path)])
    saved = record.load_results("learning_curve", tmp_path)["results"]
    assert len(saved) == 2 + 1 + 1 + 2 + 2 * 2 + 1 + 2
    chosen = max((saved[f"sweep/8/{lr:g}"]["dev"], -lr) for lr in (1e-4, 1e-3))
    assert saved["fine_tuned/all/1"]["lr"] == -chosen[1] and saved["fine_tuned/all/1"]["n"] == 40
    assert saved["asked/2/1"]["as asked"]["n_test"] == 40 and saved["asked/0/0"]["last"] is None
    assert saved["frozen/SmolLM2"]["all/1"]["n"] == 40 and saved["frozen/MiniLM"]["8/0"]["n"] == 8
    words = saved["words"]
    assert len(words["pairs"]) == 8 and len(words["chosen"]["8"]) == learning_curve.DRAWS
    assert words["pairs"]["negative/positive"]["as asked"] == saved["asked/0/0"]["as asked"]
    assert 0 <= saved["chat"]["first choice is a label"] <= 1


def test_vectors_of_a_frozen_model_do_not_depend_on_the_batch():
    body, tokenizer = load_encoder(dtype=torch.float32)
    texts = ["A triumph.", "A bore of two hours, and a loud one.", "Fine."]
    together = learning_curve.vectors_of(body, tokenizer, texts)
    for index, text in enumerate(texts):
        alone = learning_curve.vectors_of(body, tokenizer, [text])
        for how in learning_curve.POOLS:
            torch.testing.assert_close(together[how][index], alone[how][0], atol=1e-4, rtol=1e-4)


def test_a_draw_is_balanced_and_depends_on_its_seed():
    rows = [(f"text {i}", i % 2) for i in range(40)]
    drawn = balanced(rows, 8, 0)
    assert sum(label for _, label in drawn) == 4 and len(set(drawn)) == 8
    assert balanced(rows, 8, 0) == drawn != balanced(rows, 8, 1)
    assert balanced(rows, None, 0) == rows


def test_soft_prompts_are_trained_on_a_tiny_model(tmp_path, tiny_gpt2, monkeypatch):
    monkeypatch.setattr(prompt_tuning, "SEEDS", (0, 1))
    monkeypatch.setattr(prompt_tuning, "LENGTHS", (6, 3))
    monkeypatch.setattr(sys, "argv", ["prompt_tuning"])
    arguments = ["--model", str(tiny_gpt2), "--device", "cpu", "--limit", "20", "--steps", "2", "--out", str(tmp_path)]
    prompt_tuning.main(arguments)
    saved = record.load_results("prompt_tuning", tmp_path)["results"]
    assert len(saved) == 1 + 3 * (5 + 2) + 2
    for key, run in saved.items():
        if key != "handcrafted":
            assert len(run["losses"]) == 2 and run["kept"] == run["template"].count("[P]") * 32
    kept = saved["start/text/1"]
    assert kept["template"] == "[P][P][P] [X][P][P][P][P][P] [Y]" and kept["test"]["n"] == 20
    best = max((run["dev"], -run["lr"]) for key, run in saved.items() if key.startswith("sweep/text/"))
    assert kept["lr"] == -best[1]


@pytest.mark.parametrize("length", [2, 6, 7])
def test_pseudo_templates_have_their_length(length):
    assert prompt_tuning.pseudo_template(length).count("[P]") == length


def write_rows(folder, **splits):
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def small_four_way(monkeypatch):
    monkeypatch.setattr(four_way, "RATES", {method: rates[:2] for method, rates in four_way.RATES.items()})
    monkeypatch.setattr(four_way, "SEEDS", (0,))
    monkeypatch.setattr(four_way, "SHOTS", 4)
    monkeypatch.setattr(sys, "argv", ["four_way"])


def test_four_way_runs_on_a_tiny_causal_model(tmp_path, tiny_gpt2, small_four_way, monkeypatch):
    monkeypatch.setattr(four_way, "PROBES", {"P17": four_way.PROBES["P17"]})
    arguments = ["--model", str(tiny_gpt2), "--device", "cpu", "--limit", "20", "--steps", "1", "--out", str(tmp_path)]
    four_way.main(arguments)
    saved = record.load_results("four_way", tmp_path)["results"]
    assert len(saved) == 2 * (3 + 4) + (4 + 2) + 2 * (5 + 2)
    for task, n in (("P17", 20), ("reviews", 20), ("wic", 20)):
        for method in four_way.METHODS if task == "P17" else (*four_way.METHODS, four_way.TUNED_TOO):
            run = saved[f"run/{task}/{method}/0"]
            assert run["n"] == n and run["hits"].count("1") == round(n * run["test"])
    trained = saved["run/reviews/fine-tuning/0"]["trainable"]
    assert trained == saved["run/P17/fine-tuning/0"]["trainable"] + 2 * 32 + 2
    assert saved["run/P17/P-tuning/0"]["stored_bytes"] == 4 * 8 * 32
    both = saved["run/reviews/P-tuning and fine-tuning/0"]
    assert both["trainable"] > saved["run/reviews/manual prompt and fine-tuning/0"]["trainable"]
    vectors = saved["run/reviews/P-tuning/0"]["stored_bytes"]
    whole = saved["run/reviews/manual prompt and fine-tuning/0"]["stored_bytes"]
    assert both["stored_bytes"] == whole + vectors and vectors > 0
    assert saved["run/P17/manual prompt/0"]["trainable"] == 0
    # The prompted model is as it was, so what it does elsewhere is too; each run begins at the same weights.
    assert saved["run/P17/P-tuning/0"]["elsewhere"] == saved["run/P17/manual prompt/0"]["elsewhere"]
    assert saved["run/wic/manual prompt/0"]["elsewhere"]["perplexity"] > 1


def test_four_way_reads_lama_and_superglue_with_a_masked_model(tmp_path, tiny_bert, small_four_way, monkeypatch):
    """The command for the real data and a hub's BERT, on local files in their formats."""
    monkeypatch.setattr(four_way, "PROBES", {"P1376": four_way.PROBES["P1376"]})
    monkeypatch.setattr(four_way, "SWEPT_ON", ("P1376", "reviews"))
    for tasks in ("UNDERSTANDING", "WITH_SUPERGLUE"):
        known = {
            name: (template, ("is", "of", "a")[: len(words)], 1)
            for name, (template, words, _) in getattr(four_way, tasks).items()
        }
        monkeypatch.setattr(four_way, tasks, known)
    facts = [{"sub_label": "london", "obj_label": "britain"}, {"sub_label": "paris", "obj_label": "france"}] * 2
    unknown = {"sub_label": "oslo", "obj_label": "norway"}
    write_rows(tmp_path / "lama" / "P1376", train=facts, dev=facts[:2], test=[*facts[:2], unknown])
    entails = {"premise": "paris is", "hypothesis": "south"}
    for folder, row, labels in [
        ("WiC", {"word": "a", "sentence1": "a", "sentence2": "a is"}, [False, True]),
        ("BoolQ", {"question": "is a", "passage": "paris is a"}, [False, True]),
        ("CB", entails, ["entailment", "contradiction", "neutral"]),
        ("RTE", entails, ["entailment", "not_entailment"]),
    ]:
        labelled = [{**row, "label": labels[i % len(labels)], "idx": i} for i in range(16)]
        write_rows(tmp_path / "superglue" / folder, train=labelled, val=labelled[:6], test=[row])
    reviews = [{"sentence": "paris is" if i % 2 else "south", "label": i % 2} for i in range(16)]
    write_rows(tmp_path / "sst2", train=reviews, val=reviews[:8], test=[{"sentence": "a", "label": -1}])
    arguments = ["--model", str(tiny_bert), "--device", "cpu", "--steps", "1", "--out", str(tmp_path / "out")]
    arguments += ["--lama", str(tmp_path / "lama"), "--superglue", str(tmp_path / "superglue")]
    four_way.main([*arguments, "--reviews", str(tmp_path / "sst2")])
    saved = record.load_results("four_way", tmp_path / "out")["results"]
    assert saved["run/P1376/manual prompt/0"]["n"] == 2, "the answer that this model does not know is left out"
    assert saved["run/reviews/fine-tuning/0"]["n"] == 8
    for task in ("wic", "boolq", "cb", "rte"):
        assert saved[f"run/{task}/P-tuning/0"]["n"] == 6 and 0 <= saved[f"run/{task}/fine-tuning/0"]["macro_f1"] <= 1
    assert saved["run/wic/manual prompt/0"]["elsewhere"] == {"relation": "P30", "p_at_1": None, "perplexity": None}


def test_four_way_names_what_lama_lacks(tmp_path, gpt2):
    write_rows(tmp_path / "P17", test=[{"sub_label": "Paris", "obj_label": "France"}])
    with pytest.raises(ValueError, match=r"P17: no train rows; expected the files train\.jsonl"):
        four_way.probing_task(gpt2[1], "P17", 0, [], lama=tmp_path)


def test_macro_f1_is_the_mean_of_the_classes():
    """Three classes, one never given: by hand (2/3 + 0 + 6/7) / 3."""
    import torch

    given, wanted = torch.tensor([0, 0, 2, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 2, 1])
    by_hand = (2 * 1 / (2 + 1) + 0 + 2 * 3 / (4 + 3)) / 3
    assert four_way.macro_f1(given, wanted) == pytest.approx(by_hand)
    assert four_way.macro_f1(wanted, wanted) == 1


def test_perplexity_is_that_of_each_text_alone(gpt2):
    import torch

    model, tokenizer = gpt2
    texts = ["The film is good.", "A much longer sentence about a film that nobody saw in the end."]
    losses, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    expected = torch.tensor(losses / tokens).exp().item()
    assert perplexity(model, tokenizer, texts) == pytest.approx(expected, rel=1e-4)


def test_lora_runs_small(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "SEEDS", (0,))
    monkeypatch.setattr(lora, "RANKS", (2,))
    monkeypatch.setattr(lora, "SIZES", (8, 16))
    monkeypatch.setattr(lora, "COUNT", 16)
    monkeypatch.setattr(lora, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(lora, "FULL_RATES", (1e-4,))
    monkeypatch.setattr(sys, "argv", ["lora"])
    lora.main(["--device", "cpu", "--limit", "40", "--steps", "2", "--out", str(tmp_path)])
    saved = record.load_results("lora", tmp_path)["results"]
    assert len(saved) == 1 + 4 * 2 + 8 + 4 + 4 + 1
    trained = {key: run["trained"] for key, run in saved.items() if "trained" in run}
    assert {trained[f"budget/{name}/0"] for name in lora.BUDGET} == {6 * 27_648, 6 * 26_880}
    assert trained["sweep/r = 8/0.001"] == trained["sweep/attention, r = 18/0.001"] == 8 * trained["data/r = 1/16/0"]
    assert trained["data/full/8/0"] == 22_713_216 and saved["data/full/8/0"]["n"] == 8
    best = max((saved[f"sweep/r = 8/{lr:g}"]["dev"], -lr) for lr in (1e-3, 1e-2))
    assert saved["rank/all/2/0"]["lr"] == saved["budget/MLP/0"]["lr"] == -best[1]
    for found in saved["directions"].values():
        assert len(found["8 and 64"]) == 8 and len(found["8 and 64"][0]) == 64
        assert found["amplified, r = 8"]["factor"] > 0


def test_similarity_of_subspaces():
    """1 where one holds the other, 0 where they are orthogonal, and never outside."""
    A = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    same = lora.similarity(A, A)
    assert torch.allclose(same.diagonal(), torch.ones(3), atol=1e-5)
    assert torch.allclose(lora.similarity(A[:1], A)[0, 2], torch.tensor(1.0), atol=1e-5)
    apart = lora.similarity(torch.eye(10)[:2], torch.eye(10)[5:8])
    assert apart.abs().max() < 1e-6 and same.min() >= 0 and same.max() < 1 + 1e-5


def test_amplification_against_numpy():
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    weight, delta = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    found = lora.amplification(weight, delta, r=2)
    U, _, Vt = np.linalg.svd(delta.numpy())
    assert found["weight within delta"] == pytest.approx(
        np.linalg.norm(U[:, :2].T @ weight.numpy() @ Vt[:2].T), rel=1e-5
    )
    _, sigma, _ = np.linalg.svd(weight.numpy())
    assert found["weight within weight"] == pytest.approx(np.linalg.norm(sigma[:2]), rel=1e-5)
    assert found["factor"] == pytest.approx(np.linalg.norm(delta.numpy()) / found["weight within delta"], rel=1e-5)


def test_lora_tasks_run_on_a_tiny_model(tmp_path, tiny_gpt2, small_four_way, monkeypatch):
    """A GPT-2, whose layers are Conv1D, and no wrapper is left in it after a run."""
    monkeypatch.setattr(lora_tasks, "PROBES", {"P17": four_way.PROBES["P17"]})
    monkeypatch.setattr(lora_tasks, "RATES", {four_way.LORA: (1e-3, 1e-2)})
    monkeypatch.setattr(lora_tasks, "SEEDS", (0,))
    arguments = ["--model", str(tiny_gpt2), "--device", "cpu", "--limit", "20", "--steps", "1", "--out", str(tmp_path)]
    lora_tasks.main(arguments)
    saved = record.load_results("lora_tasks", tmp_path)["results"]
    assert len(saved) == 2 * 2 + 3
    run = saved[f"run/P17/{four_way.LORA}/0"]
    assert run["stored_bytes"] == 4 * run["trainable"] == 4 * 2 * 8 * ((32 + 96) + (32 + 32) + 2 * (32 + 128))
    assert run["n"] == 20 and run["lr"] in (1e-3, 1e-2)


def test_instruction_runs_small(tmp_path, monkeypatch):
    """The whole command on few rows, with the first words of replies only."""
    short = instruction.reply
    told = records.conversation("What is 2 plus 3?", "5.")
    monkeypatch.setattr(
        instruction, "reply", lambda model, tokenizer, asked, _=0, *rest: short(model, tokenizer, asked, 3, *rest)
    )
    monkeypatch.setattr(instruction, "answered", lambda *_: [told])
    monkeypatch.setattr(instruction, "RATES", {name: rates[2:3] for name, rates in instruction.RATES.items()})
    monkeypatch.setattr(instruction, "SEEDS", (0,))
    monkeypatch.setattr(instruction, "GENERAL", ("What is the opposite of hot?", "What is 2 plus 3?"))
    monkeypatch.setattr(instruction, "UNRELATED", ("What is the opposite of tall?", "What is 4 plus 5?"))
    monkeypatch.setattr(instruction, "SHOWN", ("Where is Osaka?",))
    monkeypatch.setattr(sys, "argv", ["instruction"])
    instruction.main(["--device", "cpu", "--limit", "3", "--steps", "1", "--out", str(tmp_path)])
    saved = record.load_results("instruction", tmp_path)["results"]
    assert len(saved) == 1 + 3 + 4
    untrained = saved["untrained"]["elsewhere"]
    assert untrained["unrelated answered with a record"] == 0
    for name in ("LoRA", "full", "P-tuning", instruction.MIXED):
        run = saved[f"run/{name}/0"]
        assert run["seen wordings"]["n"] == 3 and len(run["replies"]) == 1
        same = run["elsewhere"]["perplexity"] == untrained["perplexity"]
        assert same == (name == "P-tuning" or run["step"] == 0)


def test_records_are_read_strictly():
    record_ = {"place": "Osaka", "country": "Japan", "continent": "Asia"}
    assert records.read_record(records.to_json(record_)) == record_
    for wrong in ("", "Osaka", '{"place": "Osaka"}', '["place"]', records.to_json(record_) + " It is large."):
        assert records.read_record(wrong) is None
    assert records.read_record('{"place": "Osaka", "country": "Japan", "continent": 3}') is None
    assert records.read_record('{"country": "Japan", "place": "Osaka", "continent": "Asia"}') is None  # other order


def test_nothing_tested_is_trained_on():
    cities = records.place_records()
    places = {split: {row["place"] for row in rows} for split, rows in cities.items()}
    assert not places["train"] & places["test"] and len(places["test"]) > 500
    assert not set(records.WORDINGS) & set(records.UNSEEN)
    assert not set(records.GENERAL) & {*records.UNRELATED, *records.SHOWN}
    asked = records.ask_for(cities["test"][:50], records.UNSEEN, 0)
    assert all(record_["place"] in question for question, record_ in asked)
    assert len({question.replace(record_["place"], "{}") for question, record_ in asked}) == len(records.UNSEEN)


def test_the_bench_of_adapters_on_a_tiny_model(tiny_gpt2, monkeypatch):
    """That it runs, alternates both libraries and has a budget for each figure; what it finds there means nothing."""
    real = bench.load_lm
    monkeypatch.setattr(bench, "load_lm", lambda **options: real(tiny_gpt2, **options))
    monkeypatch.setattr(bench, "lora_peak", lambda whose, device: 1.0)
    found = bench.measure_lora("cpu", rounds=1)
    assert set(found) <= set(bench.BUDGETS) and all(value > 0 for value in found.values())
    assert len(found) == 5
    ours, weights = bench.lora_model("ours", "cpu")
    before = weights[1].detach().clone()
    bench.lora_step(ours, weights)()
    assert not torch.equal(weights[1], before)  # a step trains


def test_the_bench_of_lomo_on_a_tiny_model(tiny_gpt2, monkeypatch):
    pytest.importorskip("lomo_optim")
    real = bench.load_lm
    monkeypatch.setattr(bench, "load_lm", lambda **options: real(tiny_gpt2, **options))
    monkeypatch.setattr(bench, "peak_of", lambda step, device: 1.0)
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.ones(4, 8, dtype=torch.long))
    found = bench.measure_lomo("cpu", rounds=1)
    assert {name for name in found if "lomo-optim" in name} <= set(bench.BUDGETS)
    assert len(found) == 6 and all(value > 0 for value in found.values())


def test_full_tuning_runs_on_a_tiny_model(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(full_tuning, "RATES", {name: rates[:1] for name, rates in full_tuning.RATES.items()})
    monkeypatch.setattr(full_tuning, "SEEDS", (0,))
    monkeypatch.setattr(full_tuning, "TRAIN", 16)
    monkeypatch.setattr(full_tuning, "sweep", partial(full_tuning.sweep, more=0))
    monkeypatch.setattr(full_tuning, "WORDS", ("london", "paris"))  # which that model's vocabulary has
    arguments = ["--limit", "8", "--steps", "2", "--out", str(tmp_path)]
    full_tuning.main(["--model", str(tiny_llama[1]), "--device", "cpu", *arguments])
    results = record.load_results("full_tuning", tmp_path)["results"]
    assert len(results) == 1 + 3 * len(full_tuning.RATES)
    for name in full_tuning.RATES:
        assert results[f"run/{name}/0"]["n"] == 8 and results[f"run/{name}/0"]["perplexity elsewhere"] > 1
    held = {name: results[f"live/{name}"]["largest"]["gradients"] for name in full_tuning.RATES}
    assert held["LOMO"] < held["AdamW"] and held["AdaLomo"] < held["AdamW"]
    rows = record.method_rows(results, full_tuning.RATES, "AdamW", full_tuning.SEEDS)
    assert rows["LoRA"]["trained"] == rows["QLoRA"]["trained"] != rows["LOMO"]["trained"]
    assert record.gain(results, "LOMO", "LOMO", full_tuning.SEEDS) == (0, 0, 0)


def test_a_gain_of_recorded_runs():
    right = {"one": ("1100", "1110"), "other": ("1000", "1000")}
    runs = {
        f"run/{name}/{k}": {"hits": hits} for name, both in right.items() for k, hits in enumerate((*both, both[0]))
    }
    mean, low, high = record.gain(runs, "one", "other")
    assert mean == pytest.approx(4 / 12) and low <= mean <= high
    assert record.gain(runs, "other", "one")[0] == -mean


@pytest.mark.parametrize(("best", "tried"), [(3e-3, 3), (3e-4, 5), (3e-2, 5), (1e3, 6)])
def test_a_sweep_goes_on_beyond_its_edge(best, tried):
    asked = []

    def score(lr):
        asked.append(lr)
        return -abs(math.log(lr / best))

    found = full_tuning.sweep((1e-3, 3e-3, 1e-2), score)
    assert found == min(asked, key=lambda lr: abs(math.log(lr / best)))
    assert len(asked) == len(set(asked)) == tried


def test_a_training_that_breaks_down_is_noted_and_the_model_left_alone(tiny_gpt2):
    model, tokenizer = load_lm(tiny_gpt2, "cpu", torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = full_tuning.labelled_reviews()
    data = {"train": rows["train"], "dev": rows["dev"][:8]}
    found = full_tuning.run("LOMO", model, tokenizer, data, 1e30, 0, 6, test=False)
    assert "not finite" in found["stopped"] and found["dev"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_a_model_loses_in_four_bits(tmp_path, tiny_llama):
    four_bits.main(["--model", str(tiny_llama[1]), "--limit", "6", "--device", "cpu", "--out", str(tmp_path)])
    results = record.load_results("four_bits", tmp_path)["results"]
    assert list(results) == ["as it is", *(f"{way}/{shift}" for way in four_bits.WAYS for shift in four_bits.SHIFTS)]
    assert results["nf4/0"]["bits"] == pytest.approx(4.5)
    assert 4.1 < results["nf4, double/0.5"]["bits"] < 4.3
    for way, found in results.items():
        ratio, low, high = found["reviews"]["ratio"]
        assert low <= ratio <= high
        assert ratio == pytest.approx(found["reviews"]["perplexity"] / results["as it is"]["reviews"]["perplexity"])
        assert (ratio == 1) is (way == "as it is")
    assert results["nf4/0"]["reviews"] != results["nf4/0.5"]["reviews"]


def test_shifted_blocks(tiny_llama):
    model, _ = tiny_llama
    weight, twin = model.model.layers[0].mlp.up_proj.weight, quantize_model(copy.deepcopy(model), double=False)
    plain, bits = four_bits.rounded(model, "nf4", 64, False, 0)
    assert bits == 4.5 and torch.equal(plain.lm_head.weight, model.lm_head.weight)
    expected = twin.model.layers[0].mlp.up_proj.dequantized(torch.float32)
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, expected)
    moved = four_bits.rounded(model, "nf4", 64, False, 16)[0].model.layers[0].mlp.up_proj.weight.flatten()
    block = weight.detach().flatten()[16:80]
    assert torch.equal(moved[16:80], dequantize(quantize(block)))


def test_the_interval_of_a_ratio_of_perplexities():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 30, (400,), generator=generator).double()
    base = torch.stack([counts * (3 + torch.randn(400, generator=generator).double()), counts], dim=1)
    more = base.clone()
    more[:, 0] += 0.1 * counts  # every token's loss by as much: no variance is left in the ratio
    assert ratio_interval(more, base) == pytest.approx([math.exp(0.1)] * 3)
    more[:, 0] += 0.5 * counts * torch.randn(400, generator=generator).double()
    _, low, high = ratio_interval(more, base)
    deviation = 0.5 * counts.square().sum().sqrt() / counts.sum()  # of the log, by hand
    assert math.log(high / low) == pytest.approx(2 * 1.96 * deviation.item(), rel=0.15)


def test_qlora_memory_runs_at_toy_size(tmp_path):
    qlora_memory.main(["--sizes", "toy", "--length", "12", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)])
    results = record.load_results("qlora_memory", tmp_path)["results"]
    ours, theirs = results["toy/ours"], results["toy/bitsandbytes"]
    toy = qlora_memory.TOY["toy"]
    hidden, inner, layers = toy.hidden, toy.inner, toy.layers
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    rest = 2 * 32_000 * hidden + (2 * layers + 1) * hidden
    expected = linear * (4 / 8 + 1 / 64) + 4 * (rest + ours["trained"])  # codes, scales in a byte; float32
    assert ours["stored_bytes"] == pytest.approx(expected, rel=0.01)
    assert ours["trained"] == theirs["trained"] == 64 * layers * (4 * 2 * hidden + 3 * (hidden + inner))
    assert ours["stored_bytes"] == pytest.approx(theirs["stored_bytes"], rel=1e-4)  # scales included
    assert theirs["paged_bytes"] == 0  # on the CPU bitsandbytes pages nothing
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)  # the same weights, to a few codes of the scales


def test_one_step_cannot_be_timed(tmp_path):
    for module in (qlora_memory, lomo_memory):
        with pytest.raises(SystemExit):
            module.main(["--sizes", "toy", "--steps", "1", "--out", str(tmp_path)])


def test_pieces_of_another_device_are_not_taken_up(tmp_path):
    calls = []
    for device in ("cpu", "cuda"):
        record.Recorder("trial", tmp_path, device, 1, module="lora", seed=0).piece("a", lambda: calls.append(1))
    assert len(calls) == 2


def test_without_git_the_environment_names_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(record.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    monkeypatch.delenv("TUNING_COMMIT", raising=False)
    assert record.code_commit() is None
    monkeypatch.setenv("TUNING_COMMIT", "abc")
    assert record.code_commit() == "abc"


def test_a_model_is_built_in_four_bits_only():
    for whose in ("ours", "bitsandbytes"):
        model = qlora_memory.build(qlora_memory.TOY["toy"], whose, torch.device("cpu"), torch.bfloat16)
        assert not any(weight.is_meta for weight in model.parameters())
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        assert model.lm_head.weight.dtype == torch.bfloat16


def test_the_bench_of_four_bits_on_a_tiny_model(tiny_gpt2, monkeypatch):
    linear = nn.Linear(64, 32).requires_grad_(False)
    monkeypatch.setattr(bench, "four_bit_model", lambda whose, device: (linear, None))
    monkeypatch.setattr(bench, "lora_step", lambda model, weights: lambda: model(torch.ones(2, 64)))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    found = bench.measure_four_bits("cpu", rounds=1)
    assert set(found) <= set(bench.BUDGETS) and all(value > 0 for value in found.values())
    assert len(found) == 5
