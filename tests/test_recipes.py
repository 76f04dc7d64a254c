"""The recipe that one runs at work: equal to the book's own LoRA, resumed after a kill, and clear on bad settings.

Prompt tuning gives the same in a batch as alone and as peft alone; a classifier is what transformers loads again.
"""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel
from tuning.data import load_mine
from tuning.lora import add_lora
from tuning.methods import Ready, answer_logits_and_labels, loss_of, right, says
from tuning.models import load_lm
from tuning.p_tuning import PromptEncoder
from tuning.prompts import encode
from tuning.training import train
from tuning.yours import PLAIN, mean_loss, score_for, template_for, with_ids

RECIPES = Path(__file__).parents[1] / "recipes"
TEMPLATE = "The official language of [X] is [Y]."
LEFT_OUT = "left out"
PROMPT = {"method": "prompt tuning", "start": "Name the language.", "rank": LEFT_OUT, "alpha": LEFT_OUT}
P_TUNING = {"method": "P-tuning", "vectors": 5, "encoder": "LSTM", "rank": LEFT_OUT, "alpha": LEFT_OUT}
WORDS = {"france": "the capital of paris is".split(), "korea": "seoul is the south .".split()}  # noqa: SIM905
TEXTS = [  # none twice: the words are turned and repeated
    (" ".join([*words[n % 5 :], place, *words[: n % 5], *["a"] * (n // 5)]), place)
    for place, words in WORDS.items()
    for n in range(24 if place == "france" else 16)
]


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
        said = {name: value for name, value in (told | changes).items() if value != LEFT_OUT}
        path.write_text(yaml.safe_dump(said), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory, tiny_bert):
    """The folder of a random BERT without a head, whose small weights learn in a few steps."""
    folder = tmp_path_factory.mktemp("tiny-encoder")
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(tiny_bert, initializer_range=0.02)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


@pytest.fixture
def labelled(settings, tmp_path, tiny_encoder):
    """As `settings`, for a classifier: 40 texts that a tiny BERT knows the words of, 24 of one label and 16 of two."""
    write_texts(tmp_path / "texts.jsonl", TEXTS)
    told = {"data": "texts.jsonl", "method": "classifier", "model": str(tiny_encoder), "rates": [1e-3, 1e-2]}
    told |= dict.fromkeys(("template", "rank", "alpha"), LEFT_OUT)
    return lambda **changes: settings(**told | changes)


def write_texts(path, rows):
    path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows), encoding="utf-8")


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


@pytest.mark.parametrize("method", ["LoRA", "prompt tuning"])
@pytest.mark.parametrize("kind", ["the template given", "the plain template", "questions"])
def test_the_reports_code_asks_the_adapter(settings, tmp_path, kind, method, monkeypatch, capsys):
    """The lines are run as they stand, and say what answers.jsonl says."""
    changes = {"the template given": {}, "the plain template": {"template": None}}.get(kind)
    if changes is None:
        rows = [json.dumps({"question": f"What is {n}?", "reply": f"It is {n}, and nothing else."}) for n in range(25)]
        (tmp_path / "chats.jsonl").write_text("\n".join(rows))
        changes = {"data": "chats.jsonl", "template": None}
    changes |= PROMPT if method == "prompt tuning" else {}
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
    ready = tune.ready_for(method, PeftModel.from_pretrained(model, "adapter").eval(), tokenizer, template)
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
        (
            {"method": "Lora"},
            r"unknown method 'Lora'; did you mean 'LoRA'\? Known: LoRA, prompt tuning, P-tuning, classifier",
        ),
        ({"method": "prompt-tuning"}, r"unknown method 'prompt-tuning'; did you mean 'prompt tuning'\?"),
        ({"method": ["LoRA"]}, r"unknown method \['LoRA'\]; "),
        (P_TUNING | {"encoder": "lstm"}, "encoder is 'lstm'; did you mean 'LSTM'"),
        (P_TUNING | {"encoder": 3}, "encoder is 3; known: MLP, LSTM"),
        ({"encoder": "MLP"}, "encoder is no setting of 'LoRA'; leave out encoder"),
        ({"method": None}, "unknown method None; known: LoRA, prompt tuning, P-tuning, classifier"),
        ({"method": "prompt tuning"}, "alpha is no setting of 'prompt tuning'; leave out alpha, rank; known: data, m"),
        ({"method": "classifier"}, "alpha is no .* of 'classifier'; leave out alpha, rank, template; known: data, m"),
        ({"start": "Name it."}, "start is no setting of 'LoRA'; leave out start; known"),
        (PROMPT | {"start": " "}, "start is ' '; give a text in quotes"),
        (PROMPT | {"vectors": 0}, "vectors is 0; give a whole number of 1 or more"),
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


def test_the_examples_of_the_other_methods():
    told = tune.read_settings(RECIPES / "languages-prompt.yaml")
    assert (told.method, told.data.name, told.rates) == ("prompt tuning", "languages.jsonl", (3e-2, 1e-1, 3e-1))
    assert told.of_method().keys() == {"template", "model", "method", "vectors", "start", "steps", "seed"}
    told = tune.read_settings(RECIPES / "languages-p-tuning.yaml")
    assert (told.method, told.encoder, told.rates, told.vectors) == ("P-tuning", "MLP", (3e-3, 1e-2, 3e-2), 8)
    assert told.of_method().keys() == {"template", "model", "method", "vectors", "encoder", "steps", "seed"}
    told = tune.read_settings(RECIPES / "reviews.yaml")
    assert (told.method, told.model, told.rates) == ("classifier", "minilm", (3e-5, 1e-4, 3e-4))
    splits = load_mine(told.data, told.seed, ("texts",)).splits
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 72, "dev": 24, "test": 24}


@pytest.mark.parametrize(
    ("changes", "rates", "vectors"),
    [
        ({"start": "Name the language."}, (0.03, 0.1, 0.3), None),  # as many as the text has tokens
        ({"start": LEFT_OUT}, (0.3, 1.0, 3.0), 8),
        ({"start": LEFT_OUT, "vectors": None}, (0.3, 1.0, 3.0), 8),
        ({"vectors": 5}, (0.03, 0.1, 0.3), 5),
    ],
)
def test_what_a_prompt_is_if_the_file_says_little(settings, changes, rates, vectors):
    told = tune.read_settings(settings(**PROMPT | {"rates": LEFT_OUT} | changes))
    assert told.rates == pytest.approx(rates) and told.vectors == vectors


@pytest.fixture
def with_begin(tiny_gpt2, tmp_path):
    """The folder of the tiny GPT-2 with a tokenizer that puts a token in front of each text, as Llama's does."""
    model, tokenizer = load_lm(tiny_gpt2)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    model.save_pretrained(tmp_path / "with-begin")
    tokenizer.save_pretrained(tmp_path / "with-begin")
    return tmp_path / "with-begin"


def a_prompt(settings, folder, **changes):
    """A prompt by peft whose vectors are none of the words', ready for the book's functions; and peft's model."""
    told = tune.read_settings(settings(**PROMPT | {"model": str(folder)} | changes))
    model, tokenizer = tune.adapted(told)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    return tune.ready_for("prompt tuning", model, tokenizer, TEMPLATE), model


ROWS = [("Chad", [5]), ("Saint Vincent and the Grenadines", [7, 8, 9]), ("São Tomé", [11, 12])]


@pytest.mark.parametrize("folder", ["tiny_gpt2", "with_begin"])
def test_a_prompt_in_a_padded_batch_is_the_same_as_alone_and_as_pefts(settings, folder, request):
    ready, theirs = a_prompt(settings, request.getfixturevalue(folder))
    together, labels = answer_logits_and_labels(ready, ROWS)
    assert len({len(encode(ready.tokenizer, TEMPLATE, subject)) for subject, _ in ROWS}) == 3
    for (subject, answer), logits in zip(ROWS, together, strict=True):
        alone, _ = answer_logits_and_labels(ready, [(subject, answer)])
        torch.testing.assert_close(logits[-len(answer) :], alone[0], atol=1e-4, rtol=1e-4)
        ids = ready.tokenizer(f"The official language of {subject} is").input_ids + answer[:-1]
        begins = ready.tokenizer("a").input_ids[0] == 1
        assert (ids[0] == 1) == begins == (folder == "with_begin")
        with torch.no_grad():
            reference = theirs(input_ids=torch.tensor([ids])).logits[0, -len(answer) :]
        torch.testing.assert_close(logits[-len(answer) :], reference, atol=1e-4, rtol=1e-4)
    assert (labels >= 0).sum() == 6


def test_pefts_own_batch_padded_on_the_left_is_another(settings, tiny_gpt2):
    """What `ready_for` is for: if peft mends this one day, the vectors need not be handed over any more."""
    ready, theirs = a_prompt(settings, tiny_gpt2)
    texts = [f"The official language of {subject} is" for subject, _ in ROWS]
    padded = ready.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        together = theirs(**padded).logits[0, -1]
        alone = theirs(**ready.tokenizer(texts[:1], return_tensors="pt")).logits[0, -1]
    assert (together - alone).abs().max() > 0.1


def test_a_prompt_is_trained_as_by_peft_one_at_a_time(settings, tiny_gpt2):
    ready, theirs = a_prompt(settings, tiny_gpt2)
    weight = theirs.prompt_encoder["default"].embedding.weight
    assert [id(one) for one in ready.weights()] == [id(weight)]
    ours = torch.autograd.grad(loss_of(ready, ROWS), weight)[0]
    total = 0
    for subject, answer in ROWS:
        ids = ready.tokenizer(f"The official language of {subject} is").input_ids
        labels = torch.tensor([[-100] * len(ids) + answer])
        total += theirs(input_ids=torch.tensor([ids + answer]), labels=labels).loss * len(answer)
    torch.testing.assert_close(ours, torch.autograd.grad(total / 6, weight)[0], atol=1e-5, rtol=1e-4)
    assert ours.abs().max() > 1e-3


def test_a_prompts_vectors_begin_at_its_text_or_at_words(settings, tiny_gpt2):
    words = load_lm(tiny_gpt2)[0].get_input_embeddings().weight
    told = tune.read_settings(settings(**PROMPT))
    model, tokenizer = tune.adapted(told)
    ids = tokenizer("Name the language.").input_ids
    torch.testing.assert_close(model.get_prompt(1)[0], words[ids])
    model, _ = tune.adapted(tune.read_settings(settings(**PROMPT | {"vectors": len(ids) + 2})))
    torch.testing.assert_close(model.get_prompt(1)[0], words[ids + ids[:2]])  # peft repeats the text
    told = tune.read_settings(settings(**PROMPT | {"start": LEFT_OUT, "vectors": 3}))
    first, again = (tune.adapted(told)[0].get_prompt(1)[0] for _ in range(2))
    assert first.shape == (3, 32) and torch.equal(first, again)  # drawn by the seed
    assert torch.cdist(first, words).min(dim=1).values.max() < 1e-3


def test_a_prompts_file_names_the_model_and_no_folder_of_this_machine(settings, tmp_path):
    told = tune.read_settings(settings(**PROMPT | {"model": "smollm2-135m"}))
    tune.adapted(told)[0].save_pretrained(tmp_path / "prompt")
    said = json.loads((tmp_path / "prompt/adapter_config.json").read_text())
    assert said["tokenizer_name_or_path"] == said["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_run_of_prompt_tuning(settings, tmp_path, capsys):
    tune.main([str(settings(**PROMPT, rates=[0.1, 0.3]))])
    printed = capsys.readouterr().out
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "\nprompt tuning, 2 times 6 steps.\n" in printed and text.startswith("# prompt tuning on mine.jsonl")
    assert "; start Name the language., 6 steps, seed 1; peft" in text and "| most frequent answer |" in text
    assert "Too few to conclude: 8 are to test on; collect 250 examples or more, so that 50 are." in text
    saved = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    done = json.loads((tmp_path / "out/state.json").read_text(encoding="utf-8"))
    row = next(piece["row"] for key, piece in done.items() if key.startswith("tuned/"))
    assert row["kept_bytes"] == 4 * saved["prompt_embeddings"].numel() == 4 * row["trained"]
    assert row["continents"] == done["asked"]["row"]["continents"]  # the model itself is as it was
    assert row["perplexity"] == pytest.approx(done["asked"]["row"]["perplexity"])
    told = tune.read_settings(settings(**PROMPT))
    ready = tune.Asked(told, load_mine(told.data, 1), tmp_path / "out/adapter").ready
    torch.testing.assert_close(ready.vectors(), saved["prompt_embeddings"])
    assert right(ready, with_ids(ready.tokenizer, load_mine(told.data, 1))["test"]).sum().item() == row["right"][0]
    losses = done["rate/0.3"]["losses"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("encoder", "rates"), [("MLP", (0.003, 0.01, 0.03)), ("LSTM", (1e-4, 3e-4, 9e-4))])
def test_p_tuning_has_the_ledgers_rates_for_its_encoder(settings, encoder, rates):
    told = tune.read_settings(settings(**P_TUNING | {"encoder": encoder, "rates": LEFT_OUT, "vectors": LEFT_OUT}))
    assert told.rates == pytest.approx(rates) and told.vectors == 8


def test_p_tunings_lstm_is_the_papers_encoder_and_its_mlp_has_three_layers(settings):
    model, _ = tune.adapted(tune.read_settings(settings(**P_TUNING)))
    theirs = model.prompt_encoder["default"]
    ours = PromptEncoder(5, 32)
    ours.load_state_dict({name.replace("_head", ""): weight for name, weight in theirs.state_dict().items()})
    torch.testing.assert_close(ours(), model.get_prompt(1)[0])
    model, _ = tune.adapted(tune.read_settings(settings(**P_TUNING | {"encoder": "MLP"})))
    kinds = [type(layer).__name__ for layer in model.prompt_encoder["default"].mlp_head]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert sum(w.numel() for w in model.parameters() if w.requires_grad) == 5 * 32 + 3 * (32 * 32 + 32)


def test_a_run_of_p_tuning_keeps_the_vectors_and_not_the_encoder(settings, tmp_path, capsys):
    tune.main([str(settings(**P_TUNING, rates=[1e-2]))])
    assert "\nP-tuning, 1 time 6 steps.\n" in capsys.readouterr().out
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "; vectors 5, encoder LSTM, 6 steps, seed 1; peft" in text
    saved = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert [(name, tuple(tensor.shape)) for name, tensor in saved.items()] == [("prompt_embeddings", (5, 32))]
    done = json.loads((tmp_path / "out/state.json").read_text(encoding="utf-8"))
    row = next(piece["row"] for key, piece in done.items() if key.startswith("tuned/"))
    encoder = sum(weight.numel() for weight in PromptEncoder(5, 32).parameters())
    assert row["kept_bytes"] == 4 * 5 * 32 and row["trained"] == encoder
    told = tune.read_settings(settings(**P_TUNING))
    ready = tune.Asked(told, load_mine(told.data, 1), tmp_path / "out/adapter").ready
    torch.testing.assert_close(ready.vectors(), saved["prompt_embeddings"])
    assert right(ready, with_ids(ready.tokenizer, load_mine(told.data, 1))["test"]).sum().item() == row["right"][0]


def test_a_run_of_a_classifier(labelled, tmp_path, monkeypatch, capsys):
    tune.main([str(labelled(steps=30))])
    printed = capsys.readouterr().out
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "texts.jsonl: 40 examples, each a text with its label." in printed and "Asked" not in printed + text
    assert text.startswith("# classifier on texts.jsonl") and "; 30 steps, seed 1; transformers" in text
    few = "Too few to conclude: 8 are to test on; collect 250 examples or more, so that 50 are."
    assert printed.count(few) == 2 and text.count(few) == 1
    assert "|  | right, of 8 | loss | kept a task | minutes |" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("report.md", "answers.jsonl", "state.json", "classifier", "rate-0.001", "rate-0.01")
    }
    mine = load_mine(tmp_path / "texts.jsonl", 1, ("texts",))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/classifier").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/classifier")
    answers = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["asked"], one["wanted"]) for one in answers] == mine.splits["test"]
    hits, most = sum(one["right after"] for one in answers), sum(one["wanted"] == "france" for one in answers)
    assert hits >= 6 and f"| classifier | {hits} (" in text and f"| most frequent answer | {most} (" in text
    shares = [f"{row} {100 * count / 8:.0f} (" for row, count in (("most frequent answer", most), ("classifier", hits))]
    assert all(f", {share}" in text.replace(":", ",") for share in shares) and "Right, in percent: most" in text
    for one in answers:
        with torch.no_grad():
            said = model(**tokenizer(one["asked"], return_tensors="pt")).logits.argmax().item()
        assert model.config.id2label[said] == one["after"] and one["right after"] == (one["after"] == one["wanted"])
    code = text[text.index("```python\n") + 10 : text.rindex("```")]
    monkeypatch.chdir(tmp_path / "out")
    exec(compile(code, "report", "exec"), {})
    assert f"'label': '{answers[0]['after']}'" in capsys.readouterr().out


def test_each_split_of_a_classifier_has_each_labels_share(labelled):
    for seed in range(5):
        splits = load_mine(tune.read_settings(labelled()).data, seed, ("texts",)).splits
        counts = {split: Counter(label for _, label in rows) for split, rows in splits.items()}
        for split, rows in splits.items():
            assert abs(counts[split]["france"] - 0.6 * len(rows)) <= 1, (seed, counts)
        assert len({text for rows in splits.values() for text, _ in rows}) == 40


def test_a_classifiers_batch_is_the_same_as_one_at_a_time(labelled):
    told = tune.read_settings(labelled())
    new = tune.Classifier(told, load_mine(told.data, 1, ("texts",)))
    rows = new.rows["test"]
    assert len({len(text.split()) for text, _ in rows}) > 2
    with torch.no_grad():
        together, numbers = new.logits_and_numbers(rows)
        alone = torch.cat([new.logits_and_numbers([row])[0] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    said, hits, loss = new.judged(rows)
    assert hits.tolist() == (alone.argmax(dim=1) == numbers).tolist() and said.tolist() == alone.argmax(dim=1).tolist()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(alone, numbers).item(), rel=1e-4)
    assert all(weight.requires_grad for weight in new.trained.parameters())
    assert new.tokenizer.model_max_length == 40  # what its positions hold, and where texts are cut


def test_long_texts_are_cut_at_the_context(labelled, tmp_path):
    write_texts(tmp_path / "texts.jsonl", [(f"{'paris ' * 60}{text}", label) for text, label in TEXTS])
    path = tune.run(tune.read_settings(labelled(steps=1, rates=[1e-3])))
    answers = path.read_text(encoding="utf-8").split("## Answers")[1].split("## The classifier")[0]
    assert "[...]" in answers and max(map(len, answers.splitlines())) < 400


def test_labels_that_are_numbers_are_texts(labelled, tmp_path):
    write_texts(tmp_path / "texts.jsonl", [(text, int(label == "korea")) for text, label in TEXTS])
    path = tune.run(tune.read_settings(labelled(steps=1, rates=[1e-3])))
    assert "2 different labels: '0' 24 times, '1' 16 times." in path.read_text(encoding="utf-8")


def test_a_killed_classifier_goes_on_where_it_was(labelled, tmp_path, monkeypatch):
    tune.run(tune.read_settings(labelled(output="whole")))
    calls, scores = [], tune.Classifier.score

    def killed_later(new):
        calls.append(new)
        if len(calls) == 11:  # in the second training, after some of its steps
            raise KeyboardInterrupt
        return scores(new)

    with monkeypatch.context() as patch:
        patch.setattr(tune.Classifier, "score", killed_later)
        with pytest.raises(KeyboardInterrupt):
            tune.run(tune.read_settings(labelled()))
    assert len(list((tmp_path / "out").glob("*.pt"))) == 1
    tune.run(tune.read_settings(labelled()))
    done = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("out", "whole")]
    for rate in ("rate/0.001", "rate/0.01"):
        assert [done[0][rate][name] for name in ("losses", "step", "dev")] == [
            done[1][rate][name] for name in ("losses", "step", "dev")
        ]


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([(text, "france") for text, _ in TEXTS], "all have 'france' as label; there is nothing to tell apart"),
        (TEXTS[:24] + TEXTS[24:28], "the label 'korea' has 4 of the 5 texts that it needs; collect more of them"),
        (TEXTS[:9] + TEXTS[30:], "has 19 different examples and 20 to 10,000 are used here; collect more of them"),
        ([*TEXTS, ("a", "")], "line 41 has '' as its label; expected a text that is not empty"),
        ([*TEXTS, ("a", 1.5)], "line 41 has 1.5 as its label; expected a text"),
        ([*TEXTS, ("", "france")], "line 41 has '' as its text; expected a text that is not empty"),
        ([(text, str(n)) for n, (text, _) in enumerate(TEXTS)], "'0' has 1 of the 5 .* it needs, and 39 more labels"),
    ],
)
def test_texts_that_no_classifier_can_be_made_of(labelled, tmp_path, rows, fault):
    write_texts(tmp_path / "texts.jsonl", rows)
    with pytest.raises(SystemExit, match=f"error: .*{fault}"):
        tune.main([str(labelled())])
    assert not (tmp_path / "out").exists()


def test_texts_that_are_just_enough(labelled, tmp_path):
    write_texts(tmp_path / "texts.jsonl", TEXTS[:15] + TEXTS[24:29])
    assert "| right, of 4 to choose on |" in tune.run(tune.read_settings(labelled(steps=1))).read_text()


def test_lines_of_another_kind_than_the_methods(labelled, settings, tmp_path):
    with pytest.raises(SystemExit, match="line 1 has 'subject', 'answer'; expected 'text' and 'label', in every line"):
        tune.main([str(labelled(data="mine.jsonl"))])
    with pytest.raises(SystemExit, match="has 'text', 'label'; expected 'subject' and 'answer' or 'question' and"):
        tune.main([str(settings(data="texts.jsonl"))])
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "a"}\n')
    with pytest.raises(SystemExit, match="line 2 has 'text'; expected 'text' and 'label', in every line alike"):
        tune.main([str(labelled())])
    with pytest.raises(SystemExit, match="cannot load model 'no/model'"):
        write_texts(tmp_path / "texts.jsonl", TEXTS)
        tune.main([str(labelled(model="no/model"))])
