import json
import subprocess
import sys
from pathlib import Path

import pytest
from tuning.experiments import learning_curve, p_tuning, probe, prompt_tuning, record


def recorder(folder, total=2, **settings):
    return record.Recorder("trial", folder, "cpu", total, **settings)


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
    assert set(saved["provenance"]) == {
        "command", "commit", "date", "device", "machine", "seconds", "settings", "versions",
    }  # fmt: skip
    assert not (tmp_path / ".partial" / "trial").exists()


def test_pieces_of_other_settings_are_not_taken_up(tmp_path):
    recorder(tmp_path, seed=0).piece("a", lambda: 0)
    assert recorder(tmp_path, seed=1).piece("a", lambda: 1) == 1


def test_a_half_written_file_is_never_left(tmp_path):
    record.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        record.write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


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
    few = {relation: tuple(choices[:1] for choices in grammar) for relation, grammar in probe.PARAPHRASES.items()}
    monkeypatch.setattr(probe, "PARAPHRASES", few)
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
    allowed = probe.allowed_tokens(*smollm2, probe.Probe(*smollm2, "P17", 8).candidates)
    encode = lambda text: smollm2[1](text).input_ids[0]  # noqa: E731
    assert allowed[encode(" the")] and allowed[encode(" country")]
    assert not any(allowed[encode(text)] for text in (" France", " Paris", "<|im_end|>", "\n"))


def test_paraphrases_are_distinct_templates(smollm2):
    from tuning.prompts import encode

    for relation in probe.RELATIONS:
        templates = probe.paraphrases(relation)
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
    assert len(saved) == 2 + 2 * 2 + 1 + 2
    chosen = max((saved[f"sweep/{lr:g}"]["dev"], -lr) for lr in (1e-4, 1e-3))
    assert saved["fine_tuned/all/1"]["lr"] == -chosen[1] and saved["fine_tuned/all/1"]["n"] == 40
    assert saved["asked/2/1"]["as asked"]["n_test"] == 40


def test_a_draw_is_balanced_and_depends_on_its_seed():
    rows = [(f"text {i}", i % 2) for i in range(40)]
    drawn = learning_curve.balanced(rows, 8, 0)
    assert sum(label for _, label in drawn) == 4 and len(set(drawn)) == 8
    assert learning_curve.balanced(rows, 8, 0) == drawn != learning_curve.balanced(rows, 8, 1)
    assert learning_curve.balanced(rows, None, 0) == rows


@pytest.mark.parametrize(("module", "pieces"), [(prompt_tuning, 1 + 2 * 5 + 3 * 2 + 1), (p_tuning, 1 + 4 * 5 + 4 * 2)])
def test_soft_prompts_are_trained_on_a_tiny_model(module, pieces, tmp_path, tiny_gpt2, monkeypatch):
    monkeypatch.setattr(module, "SEEDS", (0, 1))
    monkeypatch.setattr(prompt_tuning, "LENGTHS", (6, 3))
    monkeypatch.setattr(sys, "argv", [module.__name__])
    arguments = ["--model", str(tiny_gpt2), "--device", "cpu", "--limit", "20", "--steps", "2", "--out", str(tmp_path)]
    module.main(arguments)
    saved = record.load_results(module.__name__.split(".")[-1], tmp_path)["results"]
    assert len(saved) == pieces
    for key, run in saved.items():
        if key != "handcrafted":
            assert len(run["losses"]) == 2 and run["kept"] == run["template"].count("[P]") * 32
    kept = saved["start/text/1" if module is prompt_tuning else "trained/BiLSTM and MLP, from text/1"]
    assert kept["template"] == "[P][P][P] [X][P][P][P][P][P] [Y]." and kept["test"]["n"] == 20
    sweep = "sweep/text/" if module is prompt_tuning else "sweep/BiLSTM and MLP, from text/"
    best = max((run["dev"], -run["lr"]) for key, run in saved.items() if key.startswith(sweep))
    assert kept["lr"] == -best[1]


@pytest.mark.parametrize("length", [2, 6, 7])
def test_pseudo_templates_have_their_length(length):
    assert prompt_tuning.pseudo_template(length).count("[P]") == length
