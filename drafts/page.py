import sys, os, re, ast
sys.path.insert(0, "/tmp/w")
from nb import md, code, setup, write
os.chdir("/work/c5")

md("""
# 5. The four-way experiment

*Words, weights, both, or vectors: which way is best, and what does it cost?*

A paper that brings a new method shows it in a table beside older ones. Often the new one was tuned with more care than they were. Whoever has to
choose wants a table in which all had the same chance.

P-tuning's authors compare four ways. One may ask with a **manual prompt**, which is words chosen by hand. One may train all weights, which is
**fine-tuning**, with the manual prompt or without. Or one trains vectors beside the prompt, and leaves the weights alone:
""", id="title")
setup("book/2-lora/6-lora.ipynb")
code("""
import copy
import random
from collections import Counter

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tuning import drawings
from tuning.data import load_wic, text_of
from tuning.evaluate import (
    as_hits,
    facts_with_ids,
    hits_at_1,
    ledger,
    paired_interval,
)
from tuning.experiments.record import load_results
from tuning.models import load_lm
from tuning.p_tuning import PromptEncoder, answer_loss, prompt_logits
from tuning.plots import COLORS, figure
from tuning.yours import yours

model, tokenizer = load_lm(dtype=torch.float32)
model.requires_grad_(False)
recorded = load_results("ways")["results"]
rows = {(row["task"], row["way"]): row for row in recorded["rows"]}
""", ["hide-cell"], "Imports, the model, the recorded runs", id="imports")
code("drawings.four_ways()", ["hide-input"], "Drawing: four ways to one answer", id="drawing",
     alt="Four pictures of a model that answers Japan; orange is trained, grey and locked is frozen. Manual prompt: the words The city of Osaka is in, before a grey model. Fine-tuning: only the name Osaka, before an orange model. Manual prompt and fine-tuning: the words, before an orange model. P-tuning: the words with three orange vectors on each side, before a grey model.")
md("""
Two more belong beside them. One may train the vectors *and* the weights. Or one trains nothing, and puts solved **examples in context**, that
is, in front of the question. Here are all six on the task that you know, the country of a city:
""", id="six")
code("""
def in_ledger(row):
    n, away = row["items"][0], row["continents"]
    found = {"method": row["way"], "chapter": 5, "subjects": n}
    found["right"] = [n * share for share in row["right"]]
    if row["way"] != "manual prompt":
        found["over asking"] = [n * share for share in row["over manual"]]
    if away:
        found["continents"] = sum(away) / len(away)
        found["countries"] = row["countries"]
    return found | {key: row[key] for key in ("kept_bytes", "trained")}


shown = ("right", "over asking", "continents", "kept a task", "trained")
country = [in_ledger(row) for row in recorded["rows"] if row["task"] == "P17"]
ledger(country, columns=shown)
""", ["hide-input", "result"], "The ledger: eight rows for the country of a city", id="ledger")
code("""
cities = {row["method"]: round(row["right"][0]) for row in country}
kept = {row["method"]: row.get("continents") for row in country}
told = ("manual prompt", "examples in context", "P-tuning")
assert [cities[way] for way in told] == [307, 341, 364]
assert cities["manual prompt and fine-tuning"] == 425
assert cities["P-tuning, pseudo tokens alone"] == 293
assert round(kept["manual prompt and fine-tuning"]) == 4
assert {kept[way] for way in told} == {106}
hits = [
    [as_hits(text) for text in rows["P17", way]["hits"]]
    for way in ("manual prompt and fine-tuning", "P-tuning")
]
gaps = [one - other for one, other in zip(*hits, strict=True)]
low, high = (1064 * end for end in paired_interval(gaps, same_items=True))
assert (round(1064 * torch.cat(gaps).mean().item())) == 61
assert (round(low), round(high)) == (20, 109)
print("61 cities (20 to 109) more than P-tuning")
""", ["hide-cell"], "✓ All weights are ahead of the vectors by 61 cities (20 to 109)", id="ledger-check")
md("""
**Right** counts new cities, as the mean of three runs, with an interval of 95 %. **Continents** counts answers to another question, which nobody trained.
**P-tuning** has six vectors beside the manual prompt [[note 1]](#notes). *Pseudo tokens alone* has the vectors and no words, as in the paper's knowledge probing.
Elsewhere in this book the ledger calls the manual prompt *asked*, and fine-tuning with it *all weights*.

Trained weights win. With the manual prompt they have 61 cities more than P-tuning (20 to 109). «Without it …; with vectors as well …» The price stands beside it. Of the 106 continents that
the model had right, 4 are left, and each task keeps a whole model, 538 MB. P-tuning keeps 13.8 KB, and all continents.

*You need [chapter 4](4-p-tuning.ipynb)'s encoder and [chapter 2](2-prompts-are-code.ipynb)'s templates. About «80» seconds and «3.5» GB on two
cores; «32» minutes of reading.*

A guess. These runs had 1,595 cities to train on. Suppose that you have 32 examples of a task, and no more. Which is ahead then: trained weights,
trained vectors, or the examples in context? Write your order down; further below stands ours.
""", id="ledger-text")

md("""
## Four ways, live

All ways that train lower the same loss. $T(x)$ is the prompt for the subject $x$, $y$ its answer, and $p$ the model's probability:

$$\\mathcal L = -\\frac1n \\sum_{i=1}^{n} \\log p\\,\\big(y_i \\mid T(x_i)\\big).$$

They differ in what $T$ is and in what may move:

| way | $T(x)$ | trained |
| --- | --- | --- |
| manual prompt | words around $x$ | nothing |
| fine-tuning | $x$ alone | the model |
| manual prompt and fine-tuning | words around $x$ | the model |
| P-tuning | words and vectors around $x$ | the network that writes the vectors |

The live task is a small one, the country of a capital: 57 to train on, 40 to test on. Each country has one capital, so **no answer of the
test set occurs in training**. Learning by heart cannot help.
""", id="live")
code("""
facts = facts_with_ids(tokenizer, "P1376")  # (capital, id of its country)
ASK = "The city of [X] is the capital of [Y]."
BESIDE = "[P][P][P] The city of [X] is the capital of[P][P][P] [Y]."
BARE = "<|endoftext|> [X] [Y]."  # the name alone, behind a first token
""", id="templates")
md("""
`BARE` has a token in front, which in this model's pretraining stood between texts. For [chapter 2](2-prompts-are-code.ipynb) found that the very first place is
a bad one, and fine-tuning is not to lose by that. One function trains every way. Each part of what moves brings a rate of its own:
""", id="templates-text")
code("""
STEPS = 20


def fit(parts, lm, template, vectors=lambda: None):
    groups = [{"params": [*part.parameters()], "lr": lr} for part, lr in parts]
    weights = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, STEPS)
    random.seed(0)
    for _ in range(STEPS):
        batch = random.sample(facts["train"], 16)
        answer_loss(lm, tokenizer, template, batch, vectors()).backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
""", id="fit")
md("""
`parts` are modules with their rates, `lm` is the model that answers, and `vectors` gives the prompt's vectors, where there are any. Two rates serve here, of the size that the record below found: 0.003 for the encoder, 0.0001 for the weights.
""", id="fit-text")
code("""
ELSE = "[X] is located in the continent of [Y]."
others = facts_with_ids(tokenizer, "P30")["test"]  # 54 countries
test, logits = facts["test"], {}
logits["manual prompt"] = prompt_logits(model, tokenizer, ASK, test)
untrained = prompt_logits(model, tokenizer, ELSE, others)
away = {"manual prompt": untrained, "P-tuning": untrained}

torch.manual_seed(0)
encoder = PromptEncoder(6, model.config.hidden_size).to(model.device)
fit([(encoder, 3e-3)], model, BESIDE, encoder)
logits["P-tuning"] = prompt_logits(model, tokenizer, BESIDE, test, encoder())

for way, template in ("fine-tuning", BARE), ("prompt, fine-tuning", ASK):
    tuned = copy.deepcopy(model).requires_grad_(True)
    fit([(tuned, 1e-4)], tuned, template)
    logits[way] = prompt_logits(tuned, tokenizer, template, test)
    away[way] = prompt_logits(tuned, tokenizer, ELSE, others)
""", ["nbval-ignore-output"], id="train")
md("""
What was learned, the facts or the form of the answer? Score twice: over the whole vocabulary, and with only countries allowed.
""", id="form")
code("""
countries = sorted({answer for part in facts.values() for _, answer in part})
answers = [answer for _, answer in test]
table = {}
for way, found in logits.items():
    first = [answer for _, answer in others]
    table[way] = {
        f"right, of {len(test)}": hits_at_1(found, answers),
        "among countries": hits_at_1(found, answers, countries),
        f"continents, of {len(others)}": hits_at_1(away[way], first),
    }
table = pd.DataFrame(table).T.map(lambda hits: int(hits.sum()))
table
""", ["nbval-ignore-output", "hide-input"], "Table: right in the vocabulary and among countries", id="form-table")
code("""
right, among, still = (table[column] for column in table)
assert len(facts["train"]) == 57 and (among >= right).all()
assert not {answer for _, answer in facts["train"]} & {*answers}
gained = right["P-tuning"] - right["manual prompt"]
knew = among["manual prompt"] - right["manual prompt"]
print(f"P-tuning gains {gained}; the model knew {knew} more than it said")
""", ["hide-cell", "nbval-ignore-output"], "✓ Among countries the manual prompt is right far more often", id="form-check")
md("""
The manual prompt has «18» right. Allow only countries, and it has «30»: the model knew them, but said *the* or *New*. P-tuning gains «…» in the first
column and «…» in the second. **It learned what kind of answer is wanted, and little else.** Two facts are enough for most of that, as exercise 3 finds. Fine-tuning without words learned
the form too, and «has fewer among countries than the untrained model: what the words asked for is gone».

The last column is the continents again. A trained prompt is not there when another question is asked, so its row is the untrained model's. «Of the fine-tuned models …»
What do they say instead? The commonest replies, untrained and fine-tuned with the prompt:
""", id="form-text")
code("""
for way in ("manual prompt", "prompt, fine-tuning"):
    replies = away[way].argmax(dim=1).tolist()
    common = Counter(tokenizer.decode(i).strip() for i in replies)
    named = sum(reply in countries for reply in replies)
    print(f"{way}: {dict(common.most_common(4))}; a country {named} times")
""", ["nbval-ignore-output"], id="replies")
code("""
assert still["P-tuning"] == still["manual prompt"]
assert named > 3  # of the fine-tuned model
print("fine-tuned, the model names countries where a continent is asked for")
""", ["hide-cell"], "✓ Fine-tuned, it names countries where a continent is asked for", id="replies-check")
md("""
«It was taught to answer such a sentence with a country, and now it does so when a continent is asked for.» Again the form has changed.

This was one run of 20 steps on one split, and its last state was kept. The record below has 60 steps, three splits, and rates that were
searched. Where the two differ, believe the record.

## The same chance for all

- **Rates.** Each way has its own sweep on dev. Where two parts are trained, each has its own rate. The authors use two
  optimizers. One optimizer with two **parameter groups**, as `fit` has it, takes the same step:
""", id="fair")
code("""
body, prompt = nn.Linear(4, 4), nn.Linear(4, 4)
two = copy.deepcopy([body, prompt])
groups = [
    {"params": body.parameters(), "lr": 1e-4},
    {"params": prompt.parameters(), "lr": 3e-3},
]
one = torch.optim.AdamW(groups, weight_decay=0)
apart = [torch.optim.AdamW(two[0].parameters(), lr=1e-4, weight_decay=0)]
apart += [torch.optim.AdamW(two[1].parameters(), lr=3e-3, weight_decay=0)]
x = torch.randn(8, 4)
prompt(body(x)).square().mean().backward()
two[1](two[0](x)).square().mean().backward()
for optimizer in (one, *apart):
    optimizer.step()
assert torch.equal(body.weight, two[0].weight)
assert torch.equal(prompt.weight, two[1].weight)
print("one optimizer with two groups steps as two optimizers")
""", id="groups")
md("""
- **No words, fairly.** On relations the bare name stands behind a first token. On other tasks fine-tuning gets a **new head**, whose rate is
  searched apart from the model's.
- **Steps.** All ways take 150 steps on the country of a city and 60 on the small tasks. Dev chooses the state to keep; the one
  before training competes [[note 2]](#notes). For those that were best at the last step we tried twice as many ([laboratory, table 1](lab/5-four-ways.ipynb)).
- **Words.** For each task dev chooses the manual prompt, among five to ten wordings. It also chooses how many examples
  stand in context.

Rates were searched on one task of each kind, with one seed, and the others took them. [Laboratory 5](lab/5-four-ways.ipynb) shows the searches.

## Five tasks

To the country of a city come two small relations, the country of a capital and the official language of a country, each in three
splits. The other two are not about facts. **Reviews** asks whether a sentence from a film review is positive. It has only clear sentences. **Word in context** is one of
SuperGLUE's tasks, and our pairs are built from WordNet in its form:
""", id="tasks")
code("""
pair = load_wic()["test"][0]
print(text_of("wic", pair).replace('" "', '"\\n"').replace('" Is', '"\\nIs'))
print("yes" if pair["label"] else "no")
""", id="pair")
md("""
For these two there are 32 examples to train on and 32 to choose on, drawn three times, and 400 to test on. A word stands for each
class, and only these words compete.
""", id="understanding")
code("""
TASKS = {
    "P17": "country of a city",
    "P1376": "country of a capital",
    "P37": "official language",
    "reviews": "reviews",
    "wic": "word in context",
}
WAYS = list(dict.fromkeys(way for _, way in rows))
percent = pd.DataFrame(
    {
        name: {
            way: f"{100 * rows[task, way]['right'][0]:.0f}"
            for way in WAYS
            if (task, way) in rows
        }
        for task, name in TASKS.items()
    }
)
untaught = "P-tuning, a model of random weights"
for task in ("P17", "P1376", "P37"):
    run = as_hits(recorded[f"untaught/P-tuning/{task}"]["hits"])
    percent.loc[untaught, TASKS[task]] = f"{100 * run.mean():.0f}"
percent.fillna("")
""", ["hide-input"], "Table: right on five tasks, in percent", id="percent")
md("""
Means of three runs; the last row is one run. The first and the last row are controls. They know nothing of the world, and show what training answers alone
can bring. On the capitals that is nothing, since no answer comes twice.

Which differences are more than chance? Each way against the manual prompt, item by item:
""", id="percent-text")
code("""
COMPARED = WAYS[2:]
fig, axes = figure(
    "«The weights win where there is data»",
    "percent right, more than the manual prompt",
    size=(5.6, 6.4),
)
for place, way in enumerate(COMPARED):
    found = [rows.get((task, way)) for task in TASKS]
    at = [-i - 0.13 * place for i, row in enumerate(found) if row]
    gain = [[100 * x for x in row["over manual"]] for row in found if row]
    span = [[g - low for g, low, _ in gain], [high - g for g, _, high in gain]]
    marker, color = "os^Dvx"[place], COLORS[place]
    look = {"fmt": marker, "color": color, "capsize": 2, "linewidth": 1.2}
    axes.errorbar([g[0] for g in gain], at, xerr=span, label=way, **look)
axes.axvline(0, color="0.4", linewidth=1)
axes.set_yticks([-i - 0.33 for i in range(5)], list(TASKS.values()))
fig.legend(loc="outside lower center", ncols=2)
plt.show()
""", ["hide-input"], "Figure: gains over the manual prompt, with intervals", id="gains", alt="«what the figure says, once recorded»")
md("""
1. **«Where there is data, weights win.»** «On the country of a city …»
2. **«On the small relations a trained prompt does what trained weights do.»** «…: the interval of the difference holds zero.»
3. **«Examples in context …»** «with the same 32 examples» [[note 4]](#notes)
4. **«Words or no words.»** «Fine-tuning without a prompt is behind fine-tuning with it on … of five tasks.»
5. **«Word in context stays at chance»** for all.

The figure makes 28 comparisons. If nothing were better than the manual prompt, about one interval in twenty would still leave out zero, so here one or
two. Do not build on a single interval that begins just beside zero [[note 3]](#notes).

## What it cost elsewhere

Scores hide a price. Each trained model was asked for continents, and read a hundred sentences of a data set that its task does not use. For
these its **perplexity** is told, as times that of the untrained model; 1 is unchanged:
""", id="findings")
code("""
assert sum((task, way) in rows for task in TASKS for way in COMPARED) == 28
KINDS = {"relations": ("P17", "P1376", "P37")}
KINDS["32 examples"] = ("reviews", "wic")
elsewhere = {}
for way in ("P-tuning", *(way for way in WAYS if "fine-tuning" in way)):
    elsewhere[way] = {}
    for kind, tasks in KINDS.items():
        runs = [rows[task, way] for task in tasks]
        left = [count for row in runs for count in row["continents"]]
        times = [ratio for row in runs for ratio in row["perplexity"]]
        told = f"{min(left)} to {max(left)}"
        elsewhere[way][f"continents, {kind}"] = told
        told = f"{min(times):.2f} to {max(times):.2f}"
        elsewhere[way][f"perplexity, {kind}"] = told
pd.DataFrame(elsewhere).T
""", ["hide-input"], "Table: continents of 160 and perplexity, lowest to highest run", id="elsewhere")
md("""
Nine runs on relations and six with 32 examples; untrained the model has 106 continents. P-tuning changes nothing: after each run every bit of the weights was compared. «Fine-tuning without words: all nine raise the perplexity, … to …
times. With words …: continents fall to …, and the perplexity hardly shows it.» «With 32 examples and smaller rates …»

So the perplexity of some text is no alarm for everything. Ask what you would miss.

## What agrees with the paper

| the paper | here |
| --- | --- |
| P-tuning beats the best discrete prompt, 43.3 → 50.6 (LAMA-34k) | «manual → P-tuning, mean of three relations» |
| with 11 billion weights, 45.2 → 64.2 (LAMA-29k) | not measured: a larger model |
| a prompt without words is enough there | not here: pseudo tokens alone have 293 cities, the manual prompt 307 |
| in the few-shot setting P-tuning trains prompt and model | «both together: … » |

The paper's models, facts and candidates are others, so only directions can agree [[note 5]](#notes). «…»

## Pitfalls

**Give new parts a rate of their own.** A new head begins at random numbers, and the model does not. The search found «0.00003» for
the model and «0.01» for the head. What if both had the model's rate? And vectors beside trained weights?
""", id="paper")
code("""
said = {("fine-tuning", "reviews"): "new head, reviews"}
said["P-tuning and fine-tuning", "P1376"] = "vectors and weights, capitals"
for (way, task), name in said.items():
    same = recorded[f"one rate/{way}/{task}"]
    own = recorded[f"run/{way}/{task}/0"]
    gap = as_hits(own["hits"]) - as_hits(same["hits"])
    low, high = paired_interval([gap], same_items=True)
    print(f"{name}: rates {own['lr']}, or {same['lr'][0]} for both;")
    print(f"  own rates {100 * gap.mean():+.0f} ({100 * low:+.0f} to", end=" ")
    print(f"{100 * high:+.0f}) points")
""", id="one-rate")
md("""
«What the two lines say.» One draw each.

**A trained prompt scores on a model that knows nothing.** On the official language a model of random weights reaches «20» %, and so does the
most frequent answer, *English*. What a method has beyond that it took from the model.

**Do not report the best run.** Three runs are three tickets in a lottery:
""", id="rates-text")
code("""
luck = {}
for (task, way), row in rows.items():
    shares = [as_hits(hits).mean().item() for hits in row["hits"]]
    luck[task, way] = 100 * (max(shares) - sum(shares) / len(shares))
worst = pd.Series(luck).drop("most frequent answer", level=1)
print(worst.unstack(0)[list(TASKS)].max().round(0).astype(int).to_dict())
""", id="luck")
md("""
So many points the best of three lies above the mean, at most, on each task. On the small relations each run has its own test facts too.

## Yours

Give a file of your own: 20 lines or more, each `{"subject": …, "answer": …}`. Two ways, one row each, and the manual prompt's beside them:
""", id="yours")
code("""
MINE = None  # e.g. "languages.jsonl"
if MINE:
    for way in ("P-tuning beside the prompt", "all weights"):
        yours(MINE, way, "The official language of [X] is [Y].")
""", id="mine")
md("""
At work do the same before you choose: the manual prompt, examples in context, one method that leaves the weights alone, and one that
does not. `recipes/tune.py` writes a report for each file of settings.

## Exercises

Each has a [solution](solutions/5-four-ways.ipynb). The live part's `fit` trains them, half a minute a run.

1. **A common answer** (easy, 20 minutes). Run the four ways on the official language, `"P37"`, with *In [X], the official language is [Y].* Then
   leave out the test countries whose language is the one that is most frequent in training. Which ways still know something?
2. **Two rates** (medium, 30 minutes). Train encoder and weights together on the capitals, once at 0.0001 for both and once with 0.003 for the
   encoder. How far do the six vectors move, of their length at the start?
3. **How many facts?** (medium, 25 minutes). P-tuning on 2, 4, 8 and all 57 capitals, in batches of 2. From how many on is it ahead of the manual
   prompt, over the vocabulary and among countries, with an interval?
4. **Less harm elsewhere** (hard, 60 minutes). Write `lm_loss(logits, input_ids, mask)`, the mean of −log p of each token after the first of its row, pads left out.
   `check_lm_loss(lm_loss)` from `tuning.checks` tests it. Fine-tune with the manual prompt on a loss that adds it, weighted by 0, 0.1 and 1, for eight sentences a
   step from `load_wic()["train"]["sentence1"]`. What happens to capitals, to continents, and to the perplexity of these sentences and of reviews?
5. **Many comparisons** (easy, 15 minutes). Twenty-eight methods are all as good as the manual prompt. Simulate 400 test items for each, a thousand times. How
   often does at least one interval of 95 % leave out zero? What must the level be, so that this happens once in twenty?

## What to remember

- Four ways differ in what may move: nothing, the weights, the prompt, or both. Examples in context are the fifth, and move nothing.
- A comparison is fair when each part of each way has its own rate, steps follow one rule, and no baseline is made of straw.
- A few dozen facts teach a prompt the form of the answer. «With many facts the weights win.»
- Trained weights change what the model does elsewhere, and perplexity alone does not show it. Trained vectors leave the rest as it was.
- Each score needs its controls, and a table of many intervals holds a false one.

## Notes

1. The paper has two versions. The first (2021) compares these ways on relations and on SuperGLUE. The second (2023) puts its vectors beside a manual
   prompt, as our P-tuning here. This book's start at the prompt's words, [chapter 4](4-p-tuning.ipynb)'s variant, has 373 cities (343 to 402).
2. Trainings take 150 steps of 16 cities, 60 of 16 facts, or 60 of 8 texts, with five looks at dev after the one before training. Where dev is small, equal shares are common;
   the lower loss decides between them. AdamW without decay, the gradient's norm clipped to 1.
3. An interval says how much the mean would vary with other items and other runs. Three runs say little about runs, so it is rather too narrow. The splits of a small
   relation also overlap: one's training facts are another's test facts. And who counts labels honestly counts the 32 to choose on too (Perez et al., 2021).
4. Le Scao and Rush (2021) count how many examples a prompt is worth, against a new head. Mosbach et al. (2023) compare fine-tuning and examples in context in models
   of one size, up to 30 billion weights, and find that both do alike on data of another kind.
5. On the paper's own data, where a hub is reached:
   `python -m tuning.experiments.ways --model bert-base-cased --lama LAMA --superglue SUPERGLUE --out results`. BoolQ, CB and RTE come beside word in context, with
   macro-F1. [Laboratory 5](lab/5-four-ways.ipynb) says what the folders hold.

**Sources.** [Liu et al. 2021](https://arxiv.org/abs/2103.10385) (P-tuning; version 2 of 2023);
[Petroni et al. 2019](https://arxiv.org/abs/1909.01066) (LAMA);
[Zhong et al. 2021](https://arxiv.org/abs/2104.05240) (the model of random weights as a control);
[Wang et al. 2019](https://arxiv.org/abs/1905.00537) (SuperGLUE);
[Pilehvar and Camacho-Collados 2018](https://arxiv.org/abs/1808.09121) (word in context);
[Perez et al. 2021](https://arxiv.org/abs/2105.11447) (true few-shot learning);
[Le Scao and Rush 2021](https://arxiv.org/abs/2103.08493) (what a prompt is worth);
[Mosbach et al. 2023](https://arxiv.org/abs/2305.16938) (fine-tuning and examples in context).
""", id="exercises")
write("/tmp/w/ch5/5-four-ways.ipynb")
