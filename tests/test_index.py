"""The index says what was recorded, and lists the chapters as the table of contents has them."""

import re
from statistics import mean

import pytest
import yaml
from notebook_rules import ROOT, read
from tuning.data import TEMPLATES
from tuning.experiments.record import load_results

TEXT = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
METHODS = {  # how a row of the first table begins -> where its runs are recorded
    "Ask well": ("four_way", "manual prompt", "none"),
    "P-tuning": ("four_way", "P-tuning", "18 kB"),
    "LoRA": ("lora_tasks", "manual prompt and LoRA", "9.8 MB"),
    "All weights": ("four_way", "manual prompt and fine-tuning", "538 MB"),
}


def three_runs(experiment, method):
    results = load_results(experiment)["results"]
    return [results[f"run/P17/{method}/{seed}"] for seed in range(3)]


def right(runs):
    return [round(run["test"] * run["n"]) for run in runs]


@pytest.mark.parametrize("start", METHODS)
def test_the_first_table_shows_the_recorded_runs(start):
    experiment, method, kept = METHODS[start]
    runs = three_runs(experiment, method)
    continents = mean(run["elsewhere"]["p_at_1"] for run in runs) * 160
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| {start}"))
    shown = [cell.strip() for cell in line.strip("|").split("|")]
    assert shown[1:] == [f"{mean(right(runs)):.0f}", f"{continents:.0f}", kept]
    size = runs[0]["stored_bytes"]
    assert size == 0 or kept in (f"{size / 1e3:.0f} kB", f"{size / 1e6:.1f} MB", f"{size / 1e6:.0f} MB")
    assert {run["n"] for run in runs} == {1064} and "| country of a city, of 1,064 |" in TEXT


def test_what_the_index_says_of_the_runs():
    lora, full = (
        right(three_runs("lora_tasks", "manual prompt and LoRA")),
        right(three_runs("four_way", "manual prompt and fine-tuning")),
    )
    text = " ".join(TEXT.split())
    assert f"gets 307 of 1,064 cities right. Tuned by LoRA it gets {mean(lora):.0f}" in text
    assert f"LoRA's runs gave {min(lora)} to {max(lora)} and those of all weights {min(full)} to {max(full)}" in text
    assert round(538060032 / 9768960) == 55 and "55 times smaller" in text
    assert TEMPLATES["P17"][7].replace("[X]", "Osaka").replace("[Y].", "…") in text
    assert "With LoRA on, 46 are right instead of 106; with all weights trained, 7." in text  # as in the table
    asked, off = (line for line in TEXT.splitlines() if line.startswith(("| Ask well", "| LoRA, taken off")))
    assert asked.split("|")[2:4] == off.split("|")[2:4]


@pytest.mark.parametrize("method", ["AdamW", "LoRA", "LOMO", "QLoRA"])
def test_the_second_table_shows_the_simulation_and_what_was_measured(method):
    simulated = load_results("lomo_memory")["results"][f"7B/{method}/with checkpointing/8x512"]
    table = TEXT[TEXT.index("## On a model of 7 billion") :]
    line = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
    assert line.endswith(f"| {sum(simulated['peak'].values()) / 2**30:.1f} |")
    measured = load_results("lomo_memory_measured")
    if f"7B/{method}" in measured["results"]:
        peak = measured["results"][f"7B/{method}"]["peak_bytes"] / 2**30
        assert f"{peak:.1f} for {method}" in table and measured["provenance"]["machine"] in table


def test_the_chapters_are_those_of_the_table_of_contents():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    files = [entry["file"] for part in parts if part["caption"].startswith("Part") for entry in part["chapters"]]
    listed = re.findall(r"^\|.*\| (\d+)\. \[(.+)\]\((.+)\) \|", TEXT, re.MULTILINE)
    titles = [read(ROOT / f"{file}.ipynb").cells[0].source.splitlines()[0] for file in files]
    assert [f"# {number}. {title}" for number, title, _ in listed] == titles
    assert [f"book/{address}" for _, _, address in listed] == [f"{file}.ipynb" for file in files]
    assert "ready" not in TEXT
