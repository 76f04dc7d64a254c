"""The index says what was recorded, and lists the chapters as the table of contents has them."""

import re
from statistics import mean

import pytest
import yaml
from notebook_rules import ROOT, read
from tuning.data import TEMPLATES, load_facts
from tuning.evaluate import in_bytes
from tuning.experiments.record import load_results
from tuning.memory import MODELS, Setting, plan

TEXT = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
ROWS = {row["method"]: row for row in load_results("ledger")["results"]["rows"]}
METHODS = {  # how a row of the first table begins -> its row of the ledger
    "Ask well": "asked",
    "Ask with examples": "asked with examples",
    "P-tuning, from the prompt": "P-tuning, from the prompt",
    "LoRA, rank 8": "LoRA",
    "LoRA, taken off": "asked",
    "All weights": "all weights",
}


@pytest.mark.parametrize("start", METHODS)
def test_the_first_table_shows_the_ledger(start):
    row = ROWS[METHODS[start]]
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| {start} |"))
    shown = [cell.strip() for cell in line.strip("|").split("|")]
    kept = "" if start == "LoRA, taken off" else in_bytes(row["kept_bytes"])
    assert shown[1:] == [f"{row['right'][0]:.0f}", f"{row['continents']:.0f}", kept]
    assert row["subjects"] == 1064 and row["countries"] == 160
    assert "| country of a city, of 1,064 | continent of a country, of 160 |" in TEXT


def test_what_the_index_says_of_the_ledger():
    pieces = load_results("ledger")["results"]
    text = " ".join(TEXT.split())
    lora, full = ([pieces[f"run/{m}/{seed}"]["hits"].count("1") for seed in range(3)] for m in ("LoRA", "all weights"))
    asked = f"{ROWS['asked']['right'][0]:.0f}"
    assert f"gets {asked} of 1,064 cities right. Tuned by LoRA it gets {mean(lora):.0f}" in text
    assert f"LoRA's runs gave {min(lora)} to {max(lora)} and those of all weights {min(full)} to {max(full)}" in text
    assert f"a random start, which tells {ROWS['P-tuning, BiLSTM']['right'][0]:.0f}." in text
    africa = [fact for split in load_facts("P30").values() for fact in split if fact["obj_label"] == "Africa"]
    assert f"Always saying *Africa* would get {len(africa)}." in text
    ratio = ROWS["all weights"]["kept_bytes"] / ROWS["LoRA"]["kept_bytes"]
    assert f"{ratio:.0f} times smaller" in text
    assert TEMPLATES["P17"][7].replace("[X]", "Osaka").replace("[Y].", "…") in text
    lost = [f"{ROWS[method]['continents']:.0f}" for method in ("LoRA", "asked", "all weights")]
    assert "With LoRA on, {} are right instead of {}; with all weights trained, {}.".format(*lost) in text


def test_what_the_index_says_of_7_billion_is_planned_and_measured():
    measured = load_results("lomo_memory_measured")
    text = " ".join(TEXT[TEXT.index("## On a model of 7 billion") :].split())
    for method, said in (
        ("AdamW", "holds {:.0f} GiB with AdamW"),
        ("LOMO", "LOMO trains the same weights with {:.0f};"),
    ):
        planned = sum(plan(Setting(method, MODELS["7B"], batch=8, length=512)).values()) / 2**30
        assert said.format(planned) in text
        assert said.format(measured["results"][f"7B/{method}"]["peak_bytes"] / 2**30) in text
    assert measured["provenance"]["machine"] in text


def test_the_chapters_are_those_of_the_table_of_contents():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    files = [entry["file"] for part in parts if part["caption"].startswith("Part") for entry in part["chapters"]]
    listed = re.findall(r"^\|.*\| (\d+)\. \[(.+)\]\((.+)\) \|", TEXT, re.MULTILINE)
    titles = [read(ROOT / f"{file}.ipynb").cells[0].source.splitlines()[0] for file in files]
    assert [f"# {number}. {title}" for number, title, _ in listed] == titles
    assert [f"book/{address}" for _, _, address in listed] == [f"{file}.ipynb" for file in files]
    assert "ready" not in TEXT
