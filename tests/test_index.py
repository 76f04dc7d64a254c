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
    assert (
        f"Three runs of LoRA gave {min(lora)} to {max(lora)}, three runs of all weights {min(full)} to {max(full)}"
        in text
    )
    assert round(538060032 / 9768960) == 55 and "55 times smaller" in text
    assert TEMPLATES["P17"][7].replace("[X]", "Osaka").replace("[Y].", "…") in text


@pytest.mark.parametrize(
    ("start", "experiment", "piece"),
    [
        ("| 7B | AdamW, all weights | 8 × 512 |", "lomo_memory_measured", "7B/AdamW"),
        ("| 7B | SGD, all weights | 8 × 512 |", "lomo_memory_measured", "7B/SGD"),
        ("| 7B | LOMO, all weights | 8 × 512 |", "lomo_memory_measured", "7B/LOMO"),
        ("| 7B | QLoRA | 1 × 512 |", "qlora_memory", "7B/ours"),
        ("| 65B | QLoRA | 1 × 512 |", "qlora_memory", "65B/ours"),
    ],
)
def test_the_second_table_shows_what_was_measured_on_a_gpu(start, experiment, piece):
    run = load_results(experiment)
    assert run["provenance"]["machine"] == "NVIDIA H200" and "an NVIDIA H200" in TEXT
    settings = run["provenance"]["settings"]
    assert f"{settings.get('batch', 1)} × {settings['length']}" in start
    assert f"{start} {run['results'][piece]['peak_bytes'] / 2**30:.1f} GiB |" in TEXT


def test_the_chapters_are_those_of_the_table_of_contents():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    files = [entry["file"] for part in parts if part["caption"].startswith("Part") for entry in part["chapters"]]
    listed = re.findall(r"^\|.*\| (\d+)\. \[(.+)\]\((.+)\) \|", TEXT, re.MULTILINE)
    titles = [read(ROOT / f"{file}.ipynb").cells[0].source.splitlines()[0] for file in files]
    assert [f"# {number}. {title}" for number, title, _ in listed] == titles
    assert [f"book/{address}" for _, _, address in listed] == [f"{file}.ipynb" for file in files]
    assert "ready" not in TEXT
