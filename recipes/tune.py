"""Tune a language model on your own examples, with the library that one uses at work (peft).

    python recipes/tune.py recipes/languages.yaml

The YAML file says all; `languages.yaml` explains each line. Each rate is tried and judged on the examples to choose on,
the best is reported on those to test on. A run that was killed goes on where it was when it is started again. What it
leaves in its output folder: `report.md`, and the adapter in peft's format.
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
from tuning.methods import Ready, loss_of, right
from tuning.models import load_lm
from tuning.training import train
from tuning.yours import (
    COLUMNS,
    always_the_most_frequent,
    batch_size_for,
    legend,
    mean_loss,
    nothing_changed,
    score_for,
    template_for,
    tested,
    wanted,
    with_ids,
)

METHODS = ("LoRA",)


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
    rates: tuple = (3e-4, 1e-3, 3e-3)
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
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds no settings; write lines such as 'data: examples.jsonl'")
    known = {one.name for one in fields(Settings)}
    for name in said:
        if name not in known:
            raise ValueError(f"{path}: unknown setting {name!r}; known: {', '.join(sorted(known))}")
    for name in ("data", "output"):
        if not isinstance(said.get(name), str):
            raise ValueError(f"{path}: {name} is {said.get(name)!r}; give a path, e.g. '{name}: my-{name}'")
    rates = said.get("rates", Settings.rates)
    rates = rates if isinstance(rates, list | tuple) else [rates]
    try:
        said["rates"] = tuple(float(rate) for rate in rates)  # YAML reads 1e-3 as a text
    except (TypeError, ValueError):
        raise ValueError(f"{path}: rates are {rates!r}; give numbers, e.g. 'rates: [3.0e-4, 1.0e-3]'") from None
    if not said["rates"] or min(said["rates"]) <= 0:
        raise ValueError(f"{path}: rates are {rates!r}; give one positive number at least")
    for name in ("rank", "alpha", "steps"):
        value = said.get(name, getattr(Settings, name))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path}: {name} is {value!r}; give a whole number of 1 or more")
    if said.get("method", Settings.method) not in METHODS:
        raise ValueError(f"{path}: unknown method {said['method']!r}; known: {', '.join(METHODS)}")
    said |= {name: path.parent / said[name] for name in ("data", "output")}
    return Settings(**said)


class State:
    """What a run has finished, in `output/state.json`; a run with other settings or data does not take it up."""

    def __init__(self, settings):
        self.path = settings.output / "state.json"
        told = {name: str(value) for name, value in asdict(settings).items() if name not in ("data", "output")}
        told["data"] = sha256(settings.data)
        self.done = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"settings": told}
        differ = sorted(name for name, value in told.items() if self.done["settings"].get(name) != value)
        if differ:
            raise ValueError(
                f"{settings.output} holds a run with other {', '.join(differ)}; name another folder, or delete that one"
            )

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
    replace_folder(folder, model.save_pretrained)
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
    """The row of the model, or of an adapter in `folder`, and what it says to ten of the examples to test on."""
    model, tokenizer = load_lm(settings.model) if folder is None else adapted(settings, folder)
    template = template_for(tokenizer, mine.kind, settings.template)
    ready = Ready(name, model, tokenizer, template, trained=model)
    row, said = tested(name, ready, mine.kind, with_ids(tokenizer, mine)["test"], **more)
    return {"row": row, "says": said}


def report(settings, mine, table, before, tried, best, after):
    """The run as Markdown."""
    lines = [f"# {settings.method} on {settings.data.name}", "", *mine.said.splitlines(), ""]
    lines += [f"Model {settings.model}; rank {settings.rank}, alpha {settings.alpha}, {settings.steps} steps, "]
    lines[-1] += f"seed {settings.seed}; peft {version('peft')}, transformers {version('transformers')}."
    lines += [
        "",
        "The examples to test on:",
        "",
        *markdown(table),
        "",
        *nothing_changed(best["step"]),
        *legend(mine),
        "",
    ]
    lines += [
        "## Rates",
        "",
        f"| rate | right, of {len(mine.splits['dev'])} to choose on | loss there | best step |",
        "| --- | --- | --- | --- |",
    ]
    for one in tried:
        mark = " **chosen**" if one is best else ""
        fault = f" {one['stopped']}" if one["stopped"] else ""
        lines.append(f"| {one['lr']:g}{mark}{fault} | {one['right']} | {one['loss']:.3f} | {one['step']} |")
    lines += ["", "## Answers", "", "| asked | before | after | wanted |", "| --- | --- | --- | --- |"]
    right_answers = wanted(mine)
    for subject, said in before["says"].items():
        texts = [f"{'✓' if hit else '✗'} {text}" for text, hit in (said, after["says"][subject])]
        cells = [subject, *texts, right_answers[subject]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "## The adapter", "", f"In peft's format; load model {settings.model} first:", "", "```python"]
    lines += ["from peft import PeftModel", f'model = PeftModel.from_pretrained(model, "{settings.output}/adapter")']
    return "\n".join([*lines, "```", ""])


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
    settings.output.mkdir(parents=True, exist_ok=True)
    state = State(settings)
    before = state.once("asked", lambda: test(settings, mine, "asked"))
    print(f"{len(settings.rates)} rates, {settings.steps} steps each.", flush=True)
    tried = [
        state.once(f"rate/{lr:g}", lambda lr=lr: tune(settings, mine, lr, settings.output / f"rate-{lr:g}"))
        for lr in settings.rates
    ]
    best = max(tried, key=lambda one: one["dev"])
    folder = settings.output / f"rate-{best['lr']:g}"
    more = {name: best[name] for name in ("lr", "seconds", "trained", "kept_bytes")}
    after = state.once("tuned", lambda: test(settings, mine, settings.method, folder, **more))
    replace_folder(settings.output / "adapter", lambda new: shutil.copytree(folder, new))
    path = settings.output / "report.md"
    table = ledger([always_the_most_frequent(mine), before["row"], after["row"]], columns=COLUMNS)
    write_text(path, report(settings, mine, table, before, tried, best, after))
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


if __name__ == "__main__":
    main()
