"""Tune a language model on your own examples, with the library that one uses at work (peft).

    python recipes/tune.py recipes/languages.yaml

The YAML file says all; `languages.yaml` explains each line. Each rate is tried and judged on the examples to choose on,
the best is reported on those to test on. A run that was stopped goes on where it was when it is started again, and a
rate that is added later is tried beside those that are finished. What it leaves in its output folder: `report.md`,
`answers.jsonl` with what was answered to the examples to test on, and `adapter` in peft's format.
"""

import argparse
import json
import logging
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft brings it, and it tells of kernels that it lacks
from peft import LoraConfig, PeftModel, get_peft_model
from tuning.data import load_mine
from tuning.evaluate import ledger
from tuning.files import sha256, write_json, write_text
from tuning.methods import Ready, loss_of, nearest, right
from tuning.models import load_lm
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
    legend,
    mean_loss,
    nothing_changed,
    score_for,
    template_for,
    tested,
    three_rates,
    wanted,
    with_ids,
)

METHODS = ("LoRA",)
ANSWERS = 200  # of the examples to test on, written to answers.jsonl


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
    rates: tuple = tuple(three_rates("LoRA"))
    steps: int = 60
    seed: int = 0


def read_settings(path):
    """The settings in a YAML file.

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
    known = {one.name for one in fields(Settings)}
    for name in said:
        if name not in known:
            near = nearest(name, known)
            meant = f"did you mean {near!r}? Known" if near else "known"
            raise ValueError(f"{path}: unknown setting {name!r}; {meant}: {', '.join(sorted(known))}")
    for name in ("data", "output"):
        if not isinstance(said.get(name), str):
            raise ValueError(f"{path}: {name} is {said.get(name)!r}; give a path, e.g. '{name}: my-{name}'")
    method = said.get("method", Settings.method)
    if method not in METHODS:
        raise ValueError(f"{path}: unknown method {method!r}; known: {', '.join(METHODS)}")
    try:
        said["rates"] = tuple(checked_rates(method, numbers(said.get("rates"))))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, least in {"rank": 1, "alpha": 1, "steps": 1, "seed": 0}.items():
        value = said.get(name, getattr(Settings, name))
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{path}: {name} is {value!r}; give a whole number of {least} or more")
    for name in ("model", "template"):
        if not isinstance(said.get(name, ""), str | None):
            raise ValueError(f"{path}: {name} is {said[name]!r}; give a text in quotes")
    said |= {name: path.parent / said[name] for name in ("data", "output")}
    return Settings(**said)


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
        told = {name: value for name, value in asdict(settings).items() if name not in ("data", "output", "rates")}
        told["data"] = sha256(settings.data)
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


def adapted(settings, folder=None):
    """A fresh model with a new adapter by peft, or with the one in `folder`; and its tokenizer."""
    model, tokenizer = load_lm(settings.model)
    if folder is not None:
        return PeftModel.from_pretrained(model, folder).eval(), tokenizer
    torch.manual_seed(settings.seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear")
    return get_peft_model(model, config).eval(), tokenizer


def tune(settings, mine, lr, folder):
    """Train an adapter at one rate and save it in `folder`; what it scored on the examples to choose on."""
    model, tokenizer = adapted(settings)
    rows = with_ids(tokenizer, mine)
    ready = Ready("LoRA", model, tokenizer, template_for(tokenizer, mine.kind, settings.template), trained=model)

    score = score_for(mine.kind)
    done = train(
        model,
        lambda batch: loss_of(ready, batch),
        rows["train"],
        lr,
        settings.steps,
        lambda: score(ready, rows["dev"]),
        batch_size=batch_size_for(ready, rows["train"]),
        seed=settings.seed,
        every=max(1, settings.steps // 6),
        checkpoint=folder.with_name(folder.name + ".pt"),
    )

    def save(new):
        model.save_pretrained(new)
        (new / "README.md").unlink(missing_ok=True)  # peft's form, with nothing filled in

    replace_folder(folder, save)
    found = {"lr": lr, "dev": done.best_score, "step": done.best_step}
    found |= {"right": right(ready, rows["dev"]).sum().item(), "loss": mean_loss(ready, rows["dev"])}
    found |= {"seconds": done.seconds, "stopped": done.stopped, "losses": done.losses}
    return found | {"trained": sum(weight.numel() for weight in ready.weights()), "kept_bytes": 4 * ready.kept()}


def replace_folder(folder, write):
    """Write a folder under a temporary name and rename it, so that there is never half of one."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def test(settings, mine, name, folder=None, **more):
    """The row of the model, or of an adapter in `folder`, and what it says to the examples to test on."""
    model, tokenizer = load_lm(settings.model) if folder is None else adapted(settings, folder)
    template = template_for(tokenizer, mine.kind, settings.template)
    ready = Ready(name, model, tokenizer, template, trained=model)
    row, said = tested(name, ready, mine.kind, with_ids(tokenizer, mine)["test"], ANSWERS, **more)
    return {"row": row, "says": said}


def compared(mine, before, after):
    """What was asked, said before and after, and wanted: a dict for each of the examples to test on."""
    found, right_answers = [], wanted(mine)
    for subject, (said, hit) in before["says"].items():
        later, hit_later = after["says"][subject]
        row = {"asked": subject, "before": said, "right before": hit, "after": later, "right after": hit_later}
        found.append(row | {"wanted": right_answers[subject]})
    return found


def report(settings, mine, table, answered, tried, best):
    """The run as Markdown."""
    lines = [f"# {settings.method} on {settings.data.name}", "", *mine.said.splitlines(), ""]
    lines += [f"Model {settings.model}; rank {settings.rank}, alpha {settings.alpha}, {settings.steps} steps, "]
    lines[-1] += f"seed {settings.seed}; peft {version('peft')}, transformers {version('transformers')}."
    lines += [asked_as(mine.kind, settings.template), "", "The examples to test on:", "", *markdown(table), ""]
    lines += [*nothing_changed(best["step"]), *legend(mine), "", "## Rates", ""]
    lines += [f"| rate | right, of {len(mine.splits['dev'])} to choose on | loss there | best step |"]
    lines += ["| --- | --- | --- | --- |"]
    for one in tried:
        mark = " **chosen**" if one is best else ""
        fault = f" {one['stopped']}" if one["stopped"] else ""
        lines.append(f"| {one['lr']:g}{mark}{fault} | {one['right']} | {one['loss']:.3f} | {one['step']} |")
    few = answered[:EXAMPLES]
    lines += ["", "## Answers", "", f"{len(few)} of the {len(answered)} that stand in `answers.jsonl`:", ""]
    lines += ["| asked | before | after | wanted |", "| --- | --- | --- | --- |"]
    for one in few:
        marked = [f"{'✓' if one[f'right {when}'] else '✗'} {one[when]}" for when in ("before", "after")]
        cells = [one["asked"], *marked, one["wanted"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "## The adapter", "", "Run this where the folder `adapter` is:", "", "```python"]
    return "\n".join([*lines, how_to_ask(settings, mine, answered[0]["asked"]), "```", ""])


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
    rows = [
        ["", *table.columns],
        ["---"] * (1 + len(table.columns)),
        *([name, *row] for name, *row in table.itertuples()),
    ]
    return ["| " + " | ".join(row) + " |" for row in rows]


def run(settings):
    """The whole run; returns the path of its report."""
    mine = load_mine(settings.data, settings.seed)
    print(mine.said)
    print(asked_as(mine.kind, settings.template))
    state = State(settings)
    before = state.once("asked", lambda: test(settings, mine, "asked"))
    times = "time" if len(settings.rates) == 1 else "times"
    print(f"{settings.method}, {len(settings.rates)} {times} {settings.steps} steps.", flush=True)
    tried = [
        state.once(f"rate/{lr:g}", lambda lr=lr: tune(settings, mine, lr, settings.output / f"rate-{lr:g}"))
        for lr in settings.rates
    ]
    best = max(tried, key=lambda one: one["dev"])
    folder = settings.output / f"rate-{best['lr']:g}"
    more = {name: best[name] for name in ("lr", "seconds", "trained", "kept_bytes")}
    after = state.once(f"tuned/{best['lr']:g}", lambda: test(settings, mine, settings.method, folder, **more))
    replace_folder(settings.output / "adapter", lambda new: shutil.copytree(folder, new))
    answered = compared(mine, before, after)
    write_text(settings.output / "answers.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answered))
    table = ledger([always_the_most_frequent(mine), before["row"], after["row"]], columns=COLUMNS)
    path = settings.output / "report.md"
    write_text(path, report(settings, mine, table, answered, tried, best))
    print(table.to_string(), *nothing_changed(best["step"]), sep="\n")
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
