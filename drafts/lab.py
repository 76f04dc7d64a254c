import sys, os, re, ast
sys.path.insert(0, "/tmp/w")
from nb import md, code, setup, write
os.chdir("/work/c5")


def lib(module, *names):
    src, out = open(f"lib/tuning/{module}.py").read(), []
    for node in ast.parse(src).body:
        if getattr(node, "name", None) in names:
            seg = ast.get_source_segment(src, node)
            d = ast.get_source_segment(src, node.body[0])
            seg = re.sub(r"\n[ \t]*" + re.escape(d) + r"\n+", "\n", seg, count=1)
            out.append(seg)
    code = f"# tuning/{module}.py\n" + "\n\n\n".join(out)
    long = 'f"seeds with {counts} items cannot share them; pass same_items=False"'
    return code.replace(long, 'f"seeds with {counts} items cannot share them; "\n            "pass same_items=False"')


md("""
# Laboratory 5: How fair, how sure

*Which rates did each way get, would more steps have helped, and what can three runs tell?*

The searches, checks and further tables behind [chapter 5](../5-four-ways.ipynb). All of it is recorded, but for the interval, which is
built here. Run the cells in order, and read what interests you.
""", id="title")
setup("book/2-lora/6-lora.ipynb")
code("""
import matplotlib.pyplot as plt
import pandas as pd
import torch
from tuning.evaluate import as_hits
from tuning.experiments.record import load_results, provenance_line
from tuning.plots import COLORS, panels

loaded = load_results("ways")
print(provenance_line(loaded))
recorded = loaded["results"]
ledger = load_results("ledger")["results"]  # the country of a city has most
rows = {(row["task"], row["way"]): row for row in recorded["rows"]}
TASKS = {
    "P17": "country of a city",
    "P1376": "country of a capital",
    "P37": "official language",
    "reviews": "reviews",
    "wic": "word in context",
}
WAYS = list(dict.fromkeys(way for _, way in rows))
TRAINED = WAYS[3:]
IN_LEDGER = {
    "P-tuning": "P-tuning beside the prompt",
    "manual prompt and fine-tuning": "all weights",
    "P-tuning, pseudo tokens alone": "P-tuning, BiLSTM",
}
""", ["hide-cell"], "Imports and the recorded runs", id="imports")
md("""
## Rates

**«Trained vectors want rates of thirty to a hundred times the weights' …»**

Each way's rate was searched on the first task of each kind, with one seed. One rate: a sweep that goes on at both ends, down to where next to nothing is learned and up to where
training fails. The share of dev that is right at each rate:
""", id="rates")
code("""
SWEPT = ("P17", "P1376", "reviews")


def sweep_of(task, way):
    # {rate: share of dev right}, from the ledger where it has the way
    pieces, start = recorded, f"sweep/{way}/{task}/"
    if task == "P17" and way in IN_LEDGER:
        pieces, start = ledger, f"sweep/{IN_LEDGER[way]}/"
    found = {}
    for key, piece in pieces.items():
        if key.startswith(start):
            rate = piece["lr"]
            rate = tuple(rate) if isinstance(rate, list) else rate
            found[rate] = piece["dev"]
    return found


fig, axes = panels("«Each way has rates of its own»", (1, 1, 1), (5.6, 3.6))
for ax, task in zip(axes, SWEPT, strict=True):
    for way, marker, color in zip(TRAINED, "os^Dv", COLORS, strict=False):
        swept = sorted(sweep_of(task, way).items())
        if swept and not isinstance(swept[0][0], tuple):
            ax.plot(*zip(*swept, strict=True), color=color, marker=marker)
    ax.set(xscale="log", title=TASKS[task].replace(" of", "\\nof"))
for way, marker, color in zip(TRAINED, "os^Dv", COLORS, strict=False):
    if way != "P-tuning and fine-tuning":
        axes[0].plot([], [], color=color, marker=marker, label=way)
axes[0].set_ylabel("share of dev right")
axes[1].set_xlabel("learning rate")
fig.legend(loc="outside lower center", ncols=2)
plt.show()
""", ["hide-input"], "Figure: the share of dev that is right, by rate", id="sweeps", alt="«what the figure says, once recorded»")
md("""
Two rates: the search begins at a pair, and goes to the best of its four neighbours, until none is better. A neighbour has about three times or a third
of the model's rate, or ten times or a tenth of the other part's. For vectors and weights it begins at the rates that each has alone, for a
new head at 0.00003 and 0.01.
""", id="pairs-text")
code("""
BOTH = "P-tuning and fine-tuning"
SEARCHES = [("P17", BOTH), ("P1376", BOTH)]
SEARCHES += [("reviews", BOTH), ("reviews", "fine-tuning")]
fig, axes = panels("«What was tried …»", (1, 1), (5.6, 6), rows=2)
for ax, (task, way) in zip(axes, SEARCHES, strict=True):
    for (first, second), dev in sweep_of(task, way).items():
        chosen = rows[task, way]["lr"] == [first, second]
        look = {"ha": "center", "va": "center"}
        look |= {"weight": "bold", "color": COLORS[1]} if chosen else {}
        ax.text(first, second, f"{dev:.2f}", **look)
        ax.plot(first, second, alpha=0)  # so that the axes reach there
    ax.set(xscale="log", yscale="log", title=TASKS[task])
    ax.margins(0.25)
    ax.set_ylabel("vectors' rate" if "P-tuning" in way else "head's rate")
fig.supxlabel("model's rate")
plt.show()
""", ["hide-input"], "Figure: pairs of rates, and the share of dev that is right", id="pairs", alt="«what the figure says, once recorded»")
md("""
The chosen pair is orange. «What the figure says.» A dev of 19 or 32 has few different shares, and many pairs are equal in it. Then the lower loss on dev decides, which is why shares
end in odd digits: a ten-thousandth of the loss is taken off.

## Steps

**«Twice as many steps would have changed nothing that the intervals can tell.»**

All ways take 150 steps on the country of a city, and 60 on the small tasks. A way whose best state on dev was its last one might go on to rise. So these
were trained again with twice as many steps, and the new head in any case:
""", id="steps")
code(lib("evaluate", "paired_interval"), id="interval")
code("""
from tuning.evaluate import paired_interval

longer = {}
for key, piece in recorded.items():
    if key.startswith("twice/"):
        _, way, task = key.split("/")
        once = recorded[f"run/{way}/{task}/0"]
        gap = as_hits(piece["hits"]) - as_hits(once["hits"])
        low, high = paired_interval([gap], same_items=True)
        longer[TASKS[task], way] = {
            "steps": len(piece["losses"]),
            "best at": piece["step"],
            "dev, once": f"{once['dev']:.3f}",
            "dev, twice": f"{piece['dev']:.3f}",
            "test, twice minus once": f"{100 * gap.mean():+.1f} "
            f"({100 * low:+.1f} to {100 * high:+.1f})",
        }
pd.DataFrame(longer).T
""", ["hide-input"], "Table 1: twice as many steps", id="twice")
md("""
Points of a hundred, on the same test items, one run each. «What the table says.»

## How sure can one be?

**Three runs that agree on 100 items know no more than 100 items tell.**

The function above makes the intervals of the chapter. A run's score depends on the items that it is tested on, and on its seed: the order of the batches, the new weights, the
examples that were drawn. An interval over items alone would ignore that another seed gives another score. So in each of 2,000 rounds both are drawn anew, **which
runs** and **which items**. If all runs share one test set, an item is drawn for all of them at once, for a hard item is hard in each. If each has its own, they are
drawn run by run. Two methods that are compared stay paired: what is drawn are differences.
""", id="sure")
code("""
agree = [(torch.arange(100) < 30).float()] * 3  # three runs, the same 30 items
shared = paired_interval(agree, same_items=True)
apart = paired_interval(agree, same_items=False)
half = 1.96 * (0.3 * 0.7 / 100) ** 0.5  # of the normal curve, for 100 items
print("one test set:       {:.2f} to {:.2f}".format(*shared))
print(f"the normal curve:   {0.3 - half:.2f} to {0.3 + half:.2f}")
print("taken for 300 items: {:.2f} to {:.2f}, too narrow".format(*apart))
assert abs(shared[0] - 0.3 + half) < 0.02 > abs(shared[1] - 0.3 - half)
assert apart[1] - apart[0] < 0.7 * (shared[1] - shared[0])
""", id="sure-code")
md("""
With three runs the interval is rather too narrow than too wide: three say little about all that might have been.

## Vectors against each other way

**«…»**

The chapter compares with the manual prompt. Here P-tuning is compared with the others:
""", id="others")
code("""
def beyond(task, one, other):
    # points by which one way is ahead of another, with the interval
    both = [rows[task, way]["hits"] for way in (one, other)]
    both = [hits * (3 // len(hits)) for hits in both]  # one run, or three
    gaps = [as_hits(a) - as_hits(b) for a, b in zip(*both, strict=True)]
    ends = paired_interval(gaps, same_items=task not in ("P1376", "P37"))
    mean = 100 * torch.cat(gaps).mean()
    return f"{mean:+.0f} ({100 * ends[0]:+.0f} to {100 * ends[1]:+.0f})"


pd.DataFrame(
    {
        name: {
            f"over {way}": beyond(task, "P-tuning", way)
            for way in WAYS[1:]
            if way != "P-tuning" and (task, way) in rows
        }
        for task, name in TASKS.items()
    }
).fillna("")
""", ["hide-input"], "Table 2: points by which P-tuning is ahead", id="beyond")
md("""
«What the table says.» These are «23» more intervals, so one or two that leave out zero say nothing.

## How many examples in context?

**«…»**

For each task and draw dev chose among 1, 2, 4, 8, 16 and 32 examples, or 64 for the country of a city:
""", id="examples")
code("""
counts = {}
for task, name in TASKS.items():
    if task == "P17":
        lines = ledger["shown/0"]["prompt"].count("\\n")
        counts[name] = {f"run {seed}": lines for seed in range(3)}
        continue
    for seed in range(3):
        piece = recorded[f"shown/{task}/{seed}"]
        counts.setdefault(name, {})[f"run {seed}"] = piece["count"]
pd.DataFrame(counts).T
""", ["hide-input"], "Table 3: examples that dev chose", id="counts")
code("""
fig, axes = panels("«More examples …»", (1, 1), (5.6, 3.4))
for ax, pair in zip(axes, (("P1376", "P37"), ("reviews", "wic")), strict=True):
    for task, color, marker in zip(pair, COLORS, "os", strict=False):
        tried = [recorded[f"shown/{task}/{seed}"]["tried"] for seed in range(3)]
        places = sorted({count for run in tried for _, count in run})
        means = [
            sum(dev for run in tried for dev, count in run if count == place)
            / sum(count == place for run in tried for _, count in run)
            for place in places
        ]
        ax.plot(places, means, color=color, marker=marker, label=TASKS[task])
    ax.set(xscale="log", xlabel="examples in context", ylim=(0, 1))
    ax.set_xticks(places, places)
    ax.minorticks_off()
    ax.legend()
axes[0].set_ylabel("share of dev right")
plt.show()
""", ["hide-input"], "Figure: the share of dev that is right, by examples", id="examples-figure", alt="«what the figure says, once recorded»")
md("""
«…»

## Run by run

**«On the small relations the splits differ more than the ways do.»**

In percent, each of three runs. On the small relations a run is a split with test facts of its own:
""", id="runs")
code("""
by_run = {}
for (task, way), row in rows.items():
    shares = [100 * as_hits(hits).mean().item() for hits in row["hits"]]
    told = " · ".join(f"{share:.0f}" for share in shares)
    by_run.setdefault(TASKS[task], {})[way] = told
pd.DataFrame(by_run).fillna("")
""", ["hide-input"], "Table 4: three runs of each way, in percent", id="by-run")
md("""
«…»

## Searched words

**«A search over words gets about … of what vectors get, on the small relations.»**

[Laboratory 2](2-prompts-are-code.ipynb) lets dev choose among 57 to 74 sentences of a small grammar. On the same test facts, in percent; of the country of a city the first 200 only:
""", id="searched")
code("""
searched = load_results("probe")["results"]
beside = {}
for task in ("P17", "P1376", "P37"):
    folds = searched[f"paraphrases/{task}"]["folds"]
    first = 200 if task == "P17" else None
    told = {"searched words": sum(f["test"] for f in folds) / len(folds)}
    for way in ("manual prompt", "P-tuning", "examples in context"):
        hits = [as_hits(text)[:first] for text in rows[task, way]["hits"]]
        told[way] = sum(run.mean().item() for run in hits) / len(hits)
    beside[TASKS[task]] = {name: round(100 * x) for name, x in told.items()}
pd.DataFrame(beside)
""", ["hide-input"], "Table 5: words that were searched, examples, and vectors", id="searched-table")
md("""
«…» So how much a trained prompt is worth depends on how hard one has looked for words.

## Macro-F1

**«…»**

Accuracy counts items. **Macro-F1** takes F1 class by class, and their mean: a way that always says *no* scores little. SuperGLUE uses it for one task with
three unequal classes. Here two classes are nearly equal:
""", id="f1")
code("""
scores = {}
for (task, way), row in rows.items():
    if "macro_f1" in row:
        mean = sum(row["macro_f1"]) / len(row["macro_f1"])
        told = f"{100 * mean:.0f}, {100 * row['right'][0]:.0f}"
        scores.setdefault(TASKS[task], {})[way] = told
pd.DataFrame(scores)
""", ["hide-input"], "Table 6: macro-F1 and accuracy, in percent", id="f1-table")
md("""
«Where macro-F1 is well below accuracy, one class is given too often: …»

## On the paper's own data

The data here are this book's. LAMA and SuperGLUE, and the BERT that the paper uses, need a model hub or files of your own. The program that made this
record takes them:

```
python -m tuning.experiments.ways --model bert-base-cased --lama LAMA --superglue SUPERGLUE --out results
```

- `LAMA` holds a folder for each relation, P17, P1376 and P37, with `train.jsonl`, `dev.jsonl` and `test.jsonl`. Facts whose answer is not one token of the model are left out, and the manual prompt is LAMA's own.
- `SUPERGLUE` is the unpacked release, or a hub id such as `aps/super_glue`. BoolQ, CB and RTE come beside word in context. Their tests have no labels, so the validation set is tested on, and both sets of 32 are drawn from train.
- `--reviews` takes SST-2 in GLUE's files, or a hub id.

COPA, ReCoRD, MultiRC and WSC do not fit one word for each class. The path is tested on small files in these formats and a tiny BERT. With real ones it has not been run here.

**Sources.** [Liu et al. 2021](https://arxiv.org/abs/2103.10385) (P-tuning; version 2 of 2023);
[Petroni et al. 2019](https://arxiv.org/abs/1909.01066) (LAMA);
[Wang et al. 2019](https://arxiv.org/abs/1905.00537) (SuperGLUE).
""", id="hub")
write("/tmp/w/ch5/lab-5.ipynb")
