"""Tune a language model on your own examples, with the libraries that one uses at work (peft and transformers).

    python recipes/tune.py recipes/languages.yaml           LoRA, by peft
    python recipes/tune.py recipes/languages-prompt.yaml    prompt tuning, by peft
    python recipes/tune.py recipes/languages-p-tuning.yaml  P-tuning, by peft
    python recipes/tune.py recipes/reviews.yaml             a classifier, by transformers

The YAML file says all, and these four explain each line. Each rate is tried and judged on the examples to choose on,
the best is reported on those to test on. A run that was stopped goes on where it was when it is started again, and a
rate that is added later is tried beside those that are finished. What it leaves in its output folder: `report.md`,
`answers.jsonl` with what was answered to the examples to test on, and `adapter` in peft's format, or `classifier` in
transformers'.
"""

import argparse
import json
import logging
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
import yaml

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft brings it, and it tells of kernels that it lacks
from peft import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tuning.data import load_mine
from tuning.evaluate import ledger
from tuning.files import sha256, write_json, write_text
from tuning.methods import Ready, loss_of, nearest, right
from tuning.models import load_classifier, load_lm, model_source
from tuning.prompts import embedding_size
from tuning.training import train
from tuning.yours import (
    COLUMNS,
    EXAMPLES,
    PLAIN,
    WRITTEN,
    always_the_most_frequent,
    asked_as,
    batch_size_for,
    checked_rates,
    counted,
    legend,
    mean_loss,
    nothing_changed,
    rows_a_batch,
    score_for,
    subject_hits,
    template_for,
    tested,
    three_rates,
    wanted,
    with_ids,
)

ANSWERS = 200  # of the examples to test on, written to answers.jsonl
FEW = 50  # examples to test on: fewer tell little apart
VECTORS = 8  # of a prompt that begins at no text
ENCODERS = {"MLP": "P-tuning, MLP", "LSTM": "P-tuning, BiLSTM"}  # peft's name of an encoder -> the book's ledger's


@dataclass(frozen=True)
class Method:
    """What is known of a method before it is run.

    Attributes:
        model: the one that it takes if no other is named; own: settings that not every method has.
        kinds: of examples, see `data.MINE`; kept: the folder with what was trained; made_by: packages.
    """

    model: str
    own: tuple
    kinds: tuple
    kept: str
    made_by: tuple


LMS = ("facts", "chats")  # what a language model is asked
METHODS = {
    "LoRA": Method("smollm2-135m", ("template", "rank", "alpha"), LMS, "adapter", ("peft", "transformers")),
    "prompt tuning": Method("smollm2-135m", ("template", "vectors", "start"), LMS, "adapter", ("peft", "transformers")),
    "P-tuning": Method("smollm2-135m", ("template", "vectors", "encoder"), LMS, "adapter", ("peft", "transformers")),
    "classifier": Method("minilm", (), ("texts",), "classifier", ("transformers",)),
}


@dataclass(frozen=True)
class Settings:
    """What the YAML file says. `data` and `output` are looked up from the file's folder."""

    data: Path
    output: Path
    template: str | None = None
    model: str = "smollm2-135m"
    method: str = "LoRA"
    rank: int = 8
    alpha: int = 16
    vectors: int | None = None  # None: as many as `start` has tokens
    start: str | None = None  # None: random words
    encoder: str = "MLP"
    rates: tuple = tuple(three_rates("LoRA"))
    steps: int = 60
    seed: int = 0

    def of_method(self):
        """What its method takes: {name: value}, without paths and rates."""
        left_out = {"data", "output", "rates"} | (OWN - {*METHODS[self.method].own})
        return {name: value for name, value in asdict(self).items() if name not in left_out}


OWN = {name for method in METHODS.values() for name in method.own}


def read_settings(path):
    """The settings in a YAML file. What it leaves out is as the method usually has it.

    Raises:
        FileNotFoundError: no such file; ValueError: it is not YAML, a setting is missing, unknown, or makes no sense.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; copy recipes/languages.yaml and change it")
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        advice = "put a text in quotes if it begins with [ or holds a colon, e.g. template: '[X] is in [Y].'"
        raise ValueError(f"{path} is not YAML; {advice}. {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds no settings; write lines such as 'data: examples.jsonl'")
    method = said.get("method", Settings.method)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"{path}: unknown method {method!r}; {meant(method, METHODS)}")
    others = OWN - {*METHODS[method].own}
    known = sorted({one.name for one in fields(Settings)} - others)
    if useless := sorted(others & said.keys()):
        advice = f"leave out {', '.join(useless)}; known: {', '.join(known)}"
        raise ValueError(f"{path}: {useless[0]} is no setting of {method!r}; {advice}")
    for name in said:
        if name not in known:
            raise ValueError(f"{path}: unknown setting {name!r}; {meant(name, known)}")
    for name in ("data", "output"):
        if not isinstance(said.get(name), str):
            raise ValueError(f"{path}: {name} is {said.get(name)!r}; give a path, e.g. '{name}: my-{name}'")
    for name in ("model", "template", "start"):
        value = said.get(name)
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{path}: {name} is {value!r}; give a text in quotes")
    said |= {name: path.parent / said[name] for name in ("data", "output")}
    said["model"] = said.get("model") or METHODS[method].model
    if "vectors" in METHODS[method].own and not said.get("start") and said.get("vectors") is None:
        said["vectors"] = VECTORS
    if said.get("encoder", Settings.encoder) not in (*ENCODERS,):
        raise ValueError(f"{path}: encoder is {said['encoder']!r}; {meant(str(said['encoder']), ENCODERS)}")
    try:
        said["rates"] = tuple(checked_rates(usual(method, said), numbers(said.get("rates"))))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, least in {"rank": 1, "alpha": 1, "vectors": 1, "steps": 1, "seed": 0}.items():
        value = said.get(name, getattr(Settings, name))
        if value is None and name == "vectors":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{path}: {name} is {value!r}; give a whole number of {least} or more")
    return Settings(**said)


def meant(name, known):
    """The end of a message on an unknown name."""
    near = nearest(name, known)
    return f"{f'did you mean {near!r}? Known' if near else 'known'}: {', '.join(known)}"


def usual(method, said):
    """The name by which the book's ledger knows what is trained; its rate is the middle of those that are tried."""
    if method == "classifier":
        return "all weights"
    if method == "P-tuning":
        return ENCODERS[said.get("encoder", Settings.encoder)]
    return "prompt tuning, from the prompt" if method == "prompt tuning" and said.get("start") else method


def numbers(rates):
    """Rates as YAML gives them, with texts as numbers where they are some: YAML reads 1e-3 as a text."""
    if isinstance(rates, list):
        return [numbers(rate) for rate in rates]
    try:
        return float(rates) if isinstance(rates, str) else rates
    except ValueError:
        return rates


class State:
    """What a run has finished, in `output/state.json`; a run with other settings or data does not take it up.

    Its rates may be others: each is a piece of its own.
    """

    def __init__(self, settings):
        self.path = settings.output / "state.json"
        told = settings.of_method() | {"data": sha256(settings.data)}
        self.done = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"settings": told}
        there = self.done["settings"]
        differ = [name for name in told if there.get(name) != told[name]]
        values = [f"{name} {there.get(name)!r}, not {told[name]!r}" for name in differ if name != "data"]
        if differ:
            raise ValueError(
                f"{settings.output} holds a run with {'; '.join(values + ['other data'] * ('data' in differ))}. "
                "Name another output, or delete that folder"
            )
        finished = ", ".join(f"{one['lr']:g}" for key, one in self.done.items() if key.startswith("rate/"))
        if finished:
            print(f"Going on from {self.path}: finished rates {finished}.")

    def once(self, key, compute):
        """What `compute()` gives, from this run or from the one that was killed."""
        if key not in self.done:
            self.done[key] = compute()
            write_json(self.path, self.done)
        return self.done[key]


def peft_config(settings, tokenizer, width):
    """What peft is told of a model whose tokens enter it as `width` numbers."""
    if settings.method == "LoRA":
        return LoraConfig(
            task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear"
        )
    if settings.method == "P-tuning":  # peft's MLP has three layers; its LSTM is the paper's if it is half as wide
        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=settings.vectors,
            encoder_reparameterization_type=settings.encoder,
            encoder_hidden_size=width // 2 if settings.encoder == "LSTM" else width,
        )
    if not settings.start:
        return PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=settings.vectors, prompt_tuning_init="SAMPLE_VOCAB"
        )
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.vectors or len(tokenizer(settings.start).input_ids),
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=settings.start,
        tokenizer_name_or_path=str(model_source(settings.model)),
    )


def adapted(settings, folder=None):
    """A fresh model with what peft adds to it, new or from `folder`; and its tokenizer."""
    model, tokenizer = load_lm(settings.model)
    if folder is not None:
        return PeftModel.from_pretrained(model, folder).eval(), tokenizer
    torch.manual_seed(settings.seed)
    config = peft_config(settings, tokenizer, embedding_size(model))
    theirs = get_peft_model(model, config).eval()
    if settings.start:
        config.tokenizer_name_or_path = model.name_or_path  # this goes into the file, where a folder would say nothing
    return theirs, tokenizer


def ready_for(name, model, tokenizer, template):
    """What the book's functions take: a language model as it is, or with what peft added to it.

    They put a prompt's vectors right before the first word. Where a batch is padded on the left, peft's own forward
    puts them in front of the padding, and so further from a short question than they are when it is asked alone.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        bare, vectors = model.get_base_model(), lambda: model.get_prompt(batch_size=1)[0]  # (vectors, hidden)
        return Ready(name, bare, tokenizer, template, encoder=vectors, trained=model)
    return Ready(name, model, tokenizer, template, trained=model)


class Asked:
    """A language model that is asked and writes: one with a new adapter or prompt, with one from `folder`, or `plain`.

    Attributes:
        rows: {split: [(subject, answer's token ids)]}; trained: the module to train; columns: of the report's table.
    """

    columns, legend = COLUMNS, staticmethod(legend)

    def __init__(self, settings, mine, folder=None, plain=False):
        self.trained, tokenizer = load_lm(settings.model) if plain else adapted(settings, folder)
        template = template_for(tokenizer, mine.kind, settings.template)
        self.ready = ready_for(settings.method, self.trained, tokenizer, template)
        self.kind, self.rows = mine.kind, with_ids(tokenizer, mine)
        self.batch_size = batch_size_for(self.ready, self.rows["train"])

    def loss(self, rows):
        return loss_of(self.ready, rows)

    def score(self):
        """Of the examples to choose on: a number that is to be large."""
        return score_for(self.kind)(self.ready, self.rows["dev"])

    def measure(self):
        """How many of the examples to choose on are right, and the loss there."""
        rows = self.rows["dev"]
        return right(self.ready, rows).sum().item(), mean_loss(self.ready, rows)

    def kept(self):
        """How many numbers are kept for the task."""
        return self.ready.kept()

    def save(self, folder):
        self.trained.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's form, with nothing filled in

    def tested(self, name, **more):
        """The row of the examples to test on, and what is said to some of them."""
        return tested(name, self.ready, self.kind, self.rows["test"], ANSWERS, **more)


class Classifier:
    """An encoder with a head that tells the labels apart, new or from `folder`; the methods are those of `Asked`.

    Attributes:
        rows: {split: [(text, the label's number)]}; trained: all of the model; columns: of the report's table.
    """

    columns = ("right", "loss", "kept a task", "minutes")

    def __init__(self, settings, mine, folder=None):
        self.labels = sorted({label for pairs in mine.splits.values() for _, label in pairs})
        number = {label: place for place, label in enumerate(self.labels)}
        torch.manual_seed(settings.seed)
        self.trained, self.tokenizer = load_classifier(self.labels, folder or settings.model)
        self.rows = {split: [(text, number[label]) for text, label in pairs] for split, pairs in mine.splits.items()}
        ids = self.tokenizer([text for text, _ in self.rows["train"]], truncation=True).input_ids
        self.batch_size = rows_a_batch(max(map(len, ids)), len(ids))

    @staticmethod
    def legend(mine):
        return [
            "right: the label is the same; in brackets an interval of 95 %.",
            "loss: -log p of the right label, lower is better.",
        ]

    def logits_and_numbers(self, rows):
        """Logits (rows, labels) in float32, and the right labels' numbers (rows,)."""
        texts, numbers = zip(*rows, strict=True)
        batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.trained.device)
        return self.trained(**batch).logits.float(), torch.tensor(numbers, device=self.trained.device)

    def loss(self, rows):
        return F.cross_entropy(*self.logits_and_numbers(rows))

    @torch.no_grad()
    def judged(self, rows):
        """The numbers of the labels that are said (rows,), which are right (rows,) bool, and the mean loss."""
        size = self.batch_size
        found = [self.logits_and_numbers(rows[start : start + size]) for start in range(0, len(rows), size)]
        logits, numbers = map(torch.cat, zip(*found, strict=True))
        said = logits.argmax(dim=1)
        return said, said == numbers, F.cross_entropy(logits, numbers).item()

    def score(self):
        hits, loss = self.measure()
        return hits + 1 / (1 + loss)  # of as many that are right, the lower loss

    def measure(self):
        _, hits, loss = self.judged(self.rows["dev"])
        return hits.sum().item(), loss

    def kept(self):
        return sum(weight.numel() for weight in self.trained.parameters())

    def save(self, folder):
        self.trained.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def tested(self, name, **more):
        rows = self.rows["test"]
        said, found, loss = self.judged(rows)
        hits = subject_hits(rows, found)
        labels = {text: self.labels[number] for (text, _), number in zip(rows, said.tolist(), strict=True)}
        return counted(name, hits, loss=loss, **more), {text: (labels[text], hits[text]) for text in [*hits][:ANSWERS]}


def learner(settings, mine, folder=None):
    """What is trained, new or from `folder`."""
    return (Classifier if mine.kind == "texts" else Asked)(settings, mine, folder)


def tune(settings, mine, lr, folder):
    """Train at one rate and save what was trained in `folder`; what it scored on the examples to choose on."""
    new = learner(settings, mine)
    done = train(
        new.trained,
        new.loss,
        new.rows["train"],
        lr,
        settings.steps,
        new.score,
        batch_size=new.batch_size,
        seed=settings.seed,
        every=max(1, settings.steps // 6),
        checkpoint=folder.with_name(folder.name + ".pt"),
    )
    replace_folder(folder, new.save)
    hits, loss = new.measure()
    found = {"lr": lr, "dev": done.best_score, "step": done.best_step, "right": hits, "loss": loss}
    found |= {"seconds": done.seconds, "stopped": done.stopped, "losses": done.losses}
    trained = sum(weight.numel() for weight in new.trained.parameters() if weight.requires_grad)
    return found | {"trained": trained, "kept_bytes": 4 * new.kept()}


def replace_folder(folder, write):
    """Write a folder under a temporary name and rename it, so that there is never half of one."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def test(name, model, **more):
    """The row of a model, and what it says to the examples to test on: {subject: (text, is it right)}."""
    row, said = model.tested(name, **more)
    return {"row": row, "says": said}


def compared(mine, before, after):
    """What was asked, said before (if anything) and after, and wanted: a dict for each of the examples to test on."""
    found, right_answers = [], wanted(mine)
    for subject, (later, hit_later) in after["says"].items():
        said, hit = before["says"][subject] if before else (None, None)
        row = {"asked": subject, "before": said, "right before": hit} if before else {"asked": subject}
        found.append(row | {"after": later, "right after": hit_later, "wanted": right_answers[subject]})
    return found


def in_percent(rows):
    """How many are right as shares, in a line: a row's name, its share, and the interval of 95 %."""
    said = []
    for row in rows:
        share, low, high = (f"{100 * count / row['subjects']:.0f}" for count in row["right"])
        said.append(f"{row['method']} {share} ({low} to {high})")
    return f"Right, in percent: {', '.join(said)}."


def too_few(mine):
    """A warning, in a list, if so few examples are to test on that they tell little apart; else nothing."""
    count, more = len(wanted(mine)), f"collect {5 * FEW} examples or more, so that {FEW} are"
    return [f"Too few to conclude: {count} are to test on; {more}."] if count < FEW else []


def report(settings, mine, said, answered, tried, best):
    """The run as Markdown; `said` are the lines on the examples to test on."""
    method, told = METHODS[settings.method], settings.of_method()
    own = [f"{name} {told[name]}" for name in method.own if name != "template" and told[name] is not None]
    lines = [f"# {settings.method} on {settings.data.name}", "", *mine.said.splitlines(), ""]
    lines += [f"Model {settings.model}; {', '.join([*own, f'{settings.steps} steps'])}, seed {settings.seed}; "]
    lines[-1] += ", ".join(f"{name} {version(name)}" for name in method.made_by) + "."
    lines += [*asked_line(settings, mine), "", "The examples to test on:", "", *said, "", "## Rates", ""]
    lines += [f"| rate | right, of {len(mine.splits['dev'])} to choose on | loss there | best step |"]
    lines += ["| --- | --- | --- | --- |"]
    for one in tried:
        mark = " **chosen**" if one is best else ""
        fault = f" {one['stopped']}" if one["stopped"] else ""
        lines.append(f"| {one['lr']:g}{mark}{fault} | {one['right']} | {one['loss']:.3f} | {one['step']} |")
    few = answered[:EXAMPLES]
    lines += ["", "## Answers", "", f"{len(few)} of the {len(answered)} that stand in `answers.jsonl`:", ""]
    names = [name for name in ("asked", "before", "after", "wanted") if name in answered[0]]
    lines += [table_row(names), table_row(["---"] * len(names))]
    for one in few:
        marks = {name: "✓ " if one[f"right {name}"] else "✗ " for name in names if f"right {name}" in one}
        lines.append(table_row([shorten(marks.get(name, "") + one[name], 300) for name in names]))
    lines += ["", f"## The {method.kept}", "", f"Run this where the folder `{method.kept}` is:", "", "```python"]
    code = how_to_classify if mine.kind == "texts" else how_to_ask
    return "\n".join([*lines, code(settings, mine, answered[0]["asked"]), "```", ""])


def asked_line(settings, mine):
    """A line that says what a language model is asked, in a list; a classifier is asked nothing."""
    return [] if mine.kind == "texts" else [asked_as(mine.kind, settings.template)]


def how_to_classify(settings, mine, text):
    """Code that loads the classifier with transformers and gives it a text."""
    return f"""from transformers import pipeline

classify = pipeline("text-classification", "classifier")
print(classify({text!r}, truncation=True))"""


def how_to_ask(settings, mine, subject):
    """Code that loads the adapter with peft and asks it."""
    if mine.kind == "chats":
        asked = f"""chat = [{{"role": "user", "content": {subject!r}}}]
text = tokenizer.apply_chat_template(
    chat, tokenize=False, add_generation_prompt=True
)"""
    else:
        before = (settings.template or PLAIN).partition("[Y]")[0].rstrip(" ").replace("[X]", subject)
        asked = f"text = {before!r}"
    special = ", add_special_tokens=False" if mine.kind == "chats" else ""
    return f"""from peft import PeftModel
from tuning.models import load_lm

model, tokenizer = load_lm({settings.model!r})
model = PeftModel.from_pretrained(model, "adapter").eval()
{asked}
inputs = tokenizer(text, return_tensors="pt"{special}).to(model.device)
written = model.generate(
    **inputs, max_new_tokens={WRITTEN}, do_sample=False
)[0, inputs.input_ids.shape[1] :]
print(tokenizer.decode(written, skip_special_tokens=True))"""


def markdown(table):
    """A DataFrame as the lines of a Markdown table."""
    head = ["", *table.columns]
    return [table_row(row) for row in (head, ["---"] * len(head), *([name, *row] for name, *row in table.itertuples()))]


def table_row(cells):
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def run(settings):
    """The whole run; returns the path of its report."""
    method = METHODS[settings.method]
    mine = load_mine(settings.data, settings.seed, method.kinds)
    print(mine.said, *asked_line(settings, mine), *too_few(mine), sep="\n")
    state, before = State(settings), None
    if mine.kind != "texts":  # a new head knows nothing yet
        before = state.once("asked", lambda: test("asked", Asked(settings, mine, plain=True)))
    times = "time" if len(settings.rates) == 1 else "times"
    print(f"{settings.method}, {len(settings.rates)} {times} {settings.steps} steps.", flush=True)
    tried = [
        state.once(f"rate/{lr:g}", lambda lr=lr: tune(settings, mine, lr, settings.output / f"rate-{lr:g}"))
        for lr in settings.rates
    ]
    best = max(tried, key=lambda one: one["dev"])
    folder = settings.output / f"rate-{best['lr']:g}"
    more = {name: best[name] for name in ("lr", "seconds", "trained", "kept_bytes")}
    after = state.once(f"tuned/{best['lr']:g}", lambda: test(settings.method, learner(settings, mine, folder), **more))
    replace_folder(settings.output / method.kept, lambda new: shutil.copytree(folder, new))
    answered = compared(mine, before, after)
    write_text(settings.output / "answers.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answered))
    rows = [always_the_most_frequent(mine), *([before["row"]] if before else []), after["row"]]
    kind = Classifier if mine.kind == "texts" else Asked
    table = ledger(rows, columns=kind.columns)
    notes = [in_percent(rows), *too_few(mine), *nothing_changed(best["step"])]
    path = settings.output / "report.md"
    said = [*markdown(table), "", *notes, *kind.legend(mine)]
    write_text(path, report(settings, mine, said, answered, tried, best))
    print(table.to_string(), *notes, sep="\n")
    print(f"report: {path}")
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="a YAML file, such as recipes/languages.yaml")
    options = parser.parse_args(arguments)
    try:
        run(read_settings(options.settings))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
