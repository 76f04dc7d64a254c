"""The recipe that one runs at work: equal to the book's own LoRA, resumed after a kill, and clear on bad settings."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tuning.data import load_mine
from tuning.lora import add_lora
from tuning.methods import Ready, loss_of, right, says
from tuning.models import load_lm
from tuning.training import train
from tuning.yours import PLAIN, mean_loss, score_for, template_for, with_ids

RECIPES = Path(__file__).parents[1] / "recipes"
TEMPLATE = "The official language of [X] is [Y]."


def recipe():
    spec = importlib.util.spec_from_file_location("tune", RECIPES / "tune.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tune"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


tune = recipe()


@pytest.fixture
def settings(tmp_path, tiny_gpt2):
    """A YAML file beside its data, and a function that writes it with changes."""
    lines = (RECIPES / "languages.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    told = {"data": "mine.jsonl", "output": "out", "template": TEMPLATE, "model": str(tiny_gpt2), "rank": 2, "alpha": 6}
    told |= {"rates": [1e-2, 5e-2], "steps": 6, "seed": 1}

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(told | changes), encoding="utf-8")
        return path

    return write


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def test_the_example_that_comes_with_it():
    settings = tune.read_settings(RECIPES / "languages.yaml")
    assert settings == tune.Settings(RECIPES / "languages.jsonl", RECIPES / "runs/languages", TEMPLATE)
    assert sum(map(len, load_mine(settings.data).splits.values())) == 136


def test_a_run_leaves_a_report_and_an_adapter_that_peft_loads(settings, tmp_path, capsys):
    tune.main([str(settings())])
    printed = capsys.readouterr().out
    assert "40 examples, each a subject with its answer." in printed and "report: " in printed
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "Asked as 'The official language of [X] is [Y].'." in printed and "\nLoRA, 2 times 6 steps.\n" in printed
    assert text.startswith("# LoRA on mine.jsonl") and text.count("**chosen**") == 1 and "| right, of 8 |" in text
    table = [line for line in text.splitlines() if line.startswith(("| asked | 0 (", "| LoRA |"))]
    assert "| most frequent answer |" in text and "rank 2, alpha 6, 6 steps, seed 1; peft" in text
    assert len(table) == 2 and all(line.count("|") == 8 for line in table)
    done = json.loads((tmp_path / "out/state.json").read_text(encoding="utf-8"))
    row = next(piece["row"] for key, piece in done.items() if key.startswith("tuned/"))
    model, tokenizer = load_lm(tune.read_settings(settings()).model)
    model = PeftModel.from_pretrained(model, tmp_path / "out/adapter").eval()
    rows = with_ids(tokenizer, load_mine(tmp_path / "mine.jsonl", seed=1))["test"]
    hits = right(Ready("LoRA", model, tokenizer, TEMPLATE, trained=model), rows)
    assert hits.sum().item() == row["right"][0]
    assert row["kept_bytes"] == 4 * sum(
        t.numel() for t in load_file(tmp_path / "out/adapter/adapter_model.safetensors").values()
    )
    assert not list((tmp_path / "out").glob("*.part")) and not list((tmp_path / "out").glob("*.pt"))
    assert str(tmp_path) not in text.replace(str(tune.read_settings(settings()).model), "")
    assert not list((tmp_path / "out").rglob("README.md"))


@pytest.mark.parametrize("kind", ["the template given", "the plain template", "questions"])
def test_the_reports_code_asks_the_adapter(settings, tmp_path, kind, monkeypatch, capsys):
    """The lines are run as they stand, and say what answers.jsonl says."""
    changes = {"the template given": {}, "the plain template": {"template": None}}.get(kind)
    if changes is None:
        rows = [json.dumps({"question": f"What is {n}?", "reply": f"It is {n}, and nothing else."}) for n in range(25)]
        (tmp_path / "chats.jsonl").write_text("\n".join(rows))
        changes = {"data": "chats.jsonl", "template": None}
    told = tune.read_settings(settings(rates=[1e-2], steps=2, **changes))
    text = tune.run(told).read_text(encoding="utf-8")
    answers = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text(encoding="utf-8").splitlines()]
    mine = load_mine(told.data, told.seed)
    assert [one["asked"] for one in answers] == list(dict.fromkeys(asked for asked, _ in mine.splits["test"]))
    code = text[text.index("```python\n") + 10 : text.rindex("```")]
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    exec(compile(code, "report", "exec"), {})
    printed = capsys.readouterr().out.strip()
    assert printed and printed.startswith(answers[0]["after"])
    model, tokenizer = load_lm(told.model)
    template = template_for(tokenizer, mine.kind, told.template)
    assert template == {"the template given": TEMPLATE, "the plain template": PLAIN}.get(kind, template)
    ready = Ready("LoRA", PeftModel.from_pretrained(model, "adapter").eval(), tokenizer, template)
    ready.trained = ready.model
    assert printed == says(ready, [answers[0]["asked"]], 24)[0]


def test_the_same_numbers_as_the_books_lora_from_the_same_start(settings, tmp_path, monkeypatch):
    loads = tune.load_lm

    def load_without_dropout(name):
        model, tokenizer = loads(name)
        without_dropout(model)
        return model, tokenizer

    monkeypatch.setattr(tune, "load_lm", load_without_dropout)
    told = tune.read_settings(settings())
    mine = load_mine(told.data, told.seed)
    theirs = tune.tune(told, mine, 5e-2, tmp_path / "rate")

    model, tokenizer = load_without_dropout(told.model)
    add_lora(model, "all-linear", rank=2, alpha=6)
    start, _ = tune.adapted(told)
    begins = {name: weight for name, weight in start.named_parameters() if "lora_A" in name}
    ours = {name: weight for name, weight in model.named_parameters() if name.endswith(".A")}
    assert len(begins) == len(ours) > 0
    with torch.no_grad():
        for name, weight in ours.items():
            place = name.removesuffix(".adapters.default.A")
            weight.copy_(begins[f"base_model.model.{place}.lora_A.default.weight"])
    rows = with_ids(tokenizer, mine)
    ready = Ready("LoRA", model, tokenizer, TEMPLATE, trained=model)
    done = train(
        model,
        lambda batch: loss_of(ready, batch),
        rows["train"],
        5e-2,
        6,
        lambda: score_for(mine.kind)(ready, rows["dev"]),
        batch_size=16,
        seed=1,
        every=1,
    )
    torch.testing.assert_close(torch.tensor(theirs["losses"]), torch.tensor(done.losses), atol=1e-4, rtol=1e-5)
    assert theirs["dev"] == pytest.approx(done.best_score, rel=1e-5) and theirs["step"] == done.best_step
    assert theirs["right"] == right(ready, rows["dev"]).sum().item()
    assert theirs["loss"] == pytest.approx(mean_loss(ready, rows["dev"]), rel=1e-4)
    assert theirs["trained"] == sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert theirs["losses"][-1] < theirs["losses"][0] - 0.1


@pytest.mark.parametrize("point", ["in the second training", "before the report"])
def test_a_killed_run_goes_on_where_it_was(settings, tmp_path, monkeypatch, point):
    tune.run(tune.read_settings(settings(output="whole")))
    calls, trains = [], tune.train

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    def train_until_the_second(*arguments, **options):
        calls.append(arguments[3])
        if len(calls) == 2:
            scores, measure = [], arguments[5]

            def score():
                scores.append(0)
                return killed() if len(scores) > 3 else measure()

            arguments = (*arguments[:5], score)
        return trains(*arguments, **options)

    with monkeypatch.context() as patch:
        if point == "in the second training":
            patch.setattr(tune, "train", train_until_the_second)
        else:
            patch.setattr(tune, "report", killed)
        with pytest.raises(KeyboardInterrupt):
            tune.run(tune.read_settings(settings()))
    assert not (tmp_path / "out/report.md").exists()
    assert len(list((tmp_path / "out").glob("*.pt"))) == (point == "in the second training")
    again = []
    monkeypatch.setattr(tune, "train", lambda *a, **o: again.append(a[3]) or trains(*a, **o))
    tune.run(tune.read_settings(settings()))
    assert again == ([5e-2] if point == "in the second training" else [])

    def numbers(folder):
        done = json.loads((tmp_path / folder / "state.json").read_text(encoding="utf-8"))
        return [done[f"rate/{rate}"][name] for rate in ("0.01", "0.05") for name in ("dev", "step", "losses")]

    assert numbers("out") == numbers("whole")


def test_where_nothing_is_right_the_lower_loss_is_kept(settings, tmp_path):
    """Answers of several tokens are seldom right at once: the share right alone would keep the untrained state."""
    lines = [json.dumps({"subject": f"city {n}", "answer": f"a longer answer of {n % 5}"}) for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    path = tune.run(tune.read_settings(settings(rates=[1e-2], steps=6)))
    done = json.loads((tmp_path / "out/state.json").read_text(encoding="utf-8"))
    assert done["rate/0.01"]["right"] == 0 and done["rate/0.01"]["step"] > 0
    saved = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert all(weight.any() for name, weight in saved.items() if "lora_B" in name)
    assert "Nothing was learned" not in path.read_text(encoding="utf-8")


def test_a_training_that_brings_nothing_is_told(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "score_for", lambda kind: lambda ready, dev: 0.0)  # the first state wins a tie
    text = tune.run(tune.read_settings(settings(rates=[1e-2], steps=2))).read_text(encoding="utf-8")
    told = "Nothing was learned: the state before the first step was the best. Try other rates, or more steps."
    assert told in text and told in capsys.readouterr().out


def test_questions_and_replies(settings, tmp_path):
    lines = [json.dumps({"question": f"What is {n} | {n}?", "reply": f"It is\n{n}."}) for n in range(25)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    path = tune.run(tune.read_settings(settings(data="chats.jsonl", template=None, rates=[1e-2], steps=2)))
    text = path.read_text(encoding="utf-8")
    answers = text[text.index("## Answers") : text.index("## The adapter")].strip().splitlines()
    assert answers[2] == "5 of the 5 that stand in `answers.jsonl`:" and len(answers) == 11
    assert all(line.replace("\\|", "").count("|") == 5 for line in answers[4:])


def test_a_folder_of_another_run_is_not_taken_up(settings):
    tune.main([str(settings(steps=1, rates=[1e-2]))])
    with pytest.raises(SystemExit, match=r"error: .*out holds a run with rank 2, not 3; steps 1, not 2\. Name another"):
        tune.main([str(settings(steps=2, rates=[1e-2], rank=3))])


def test_a_rate_that_is_added_is_tried_beside_those_that_are_finished(settings, tmp_path, monkeypatch, capsys):
    tune.main([str(settings(steps=2, rates=[1e-2]))])
    capsys.readouterr()
    trained, trains = [], tune.train
    monkeypatch.setattr(tune, "train", lambda *a, **o: trained.append(a[3]) or trains(*a, **o))
    tune.main([str(settings(steps=2, rates=[1e-2, 0.1]))])
    assert trained == [0.1] and "finished rates 0.01." in capsys.readouterr().out
    rates = [line for line in (tmp_path / "out/report.md").read_text().splitlines() if line.startswith("| 0.")]
    assert len(rates) == 2 and [line.split()[1] for line in rates] == ["0.01", "0.1"]
    row = json.loads((tmp_path / "out/state.json").read_text())
    best = max((row["rate/0.01"], row["rate/0.1"]), key=lambda one: one["dev"])
    assert row[f"tuned/{best['lr']:g}"]["row"]["lr"] == best["lr"]


def test_a_run_that_cannot_start_leaves_nothing(settings, tmp_path):
    with pytest.raises(SystemExit, match="cannot load model 'no/model'"):
        tune.main([str(settings(model="no/model"))])
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_stopped_says_how_to_go_on(settings, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", stopped)
    with pytest.raises(SystemExit, match=r"^stopped; the same command goes on from here$"):
        tune.main([str(settings())])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"rate": 1e-3}, "unknown setting 'rate'; did you mean 'rates'. Known: alpha, data, method"),
        ({"epochs": 3}, "unknown setting 'epochs'; known: alpha, data, method"),
        ({"data": None}, "data is None; give a path, e.g. 'data: my-data'"),
        ({"output": 3}, "output is 3; give a path"),
        ({"rates": ["fast"]}, r"run.yaml: rates are \['fast'\]; give positive numbers"),
        ({"rates": []}, r"run.yaml: rates are \[\]; give positive numbers"),
        ({"rates": [0.0]}, r"run.yaml: rates are \[0.0\]; give positive numbers"),
        ({"rank": 0}, "rank is 0; give a whole number of 1 or more"),
        ({"steps": 1.5}, "steps is 1.5; give a whole number"),
        ({"alpha": True}, "alpha is True; give a whole number"),
        ({"seed": -1}, "seed is -1; give a whole number of 0 or more"),
        ({"template": ["X"]}, r"template is \['X'\]; give a text in quotes"),
        ({"model": 7}, "model is 7; give a text in quotes"),
        ({"method": "Lora"}, "unknown method 'Lora'; known: LoRA"),
        ({"data": "none.jsonl"}, "there is no file .*none.jsonl"),
    ],
)
def test_bad_settings_end_in_one_line(settings, changes, fault):
    with pytest.raises(SystemExit, match=f"error: .*{fault}"):
        tune.main([str(settings(**changes))])


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no file .*none.yaml; copy recipes/languages.yaml"):
        tune.main([str(tmp_path / "none.yaml")])
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(SystemExit, match="holds no settings; write lines such as"):
        tune.main([str(tmp_path / "list.yaml")])
    (tmp_path / "broken.yaml").write_text("data: [\n")
    with pytest.raises(SystemExit, match=r"broken.yaml is not YAML"):
        tune.main([str(tmp_path / "broken.yaml")])
    (tmp_path / "quotes.yaml").write_text("data: a.jsonl\noutput: out\ntemplate: [X] is in [Y].\n")
    with pytest.raises(SystemExit, match=r"quotes.yaml is not YAML; put a text in quotes .* template: '\[X\] is in"):
        tune.main([str(tmp_path / "quotes.yaml")])


def test_a_rate_in_the_short_form_is_a_number(settings, tmp_path):
    path = settings()
    path.write_text(path.read_text().replace("- 0.01", "- 1e-2"))
    assert tune.read_settings(path).rates == (1e-2, 5e-2)
