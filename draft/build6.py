"""Builds the draft of book/2-lora/6-lora.ipynb from the cells below."""

import sys
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

cells = []


def md(text):
    cells.append(new_markdown_cell(text.strip("\n")))


def code(text, *tags, alt=None):
    cells.append(new_code_cell(text.strip("\n"), metadata={"tags": list(tags)} if tags else {}))
    if alt:
        cells[-1].metadata["mystnb"] = {"image": {"alt": alt}}


md(r"""
# 6. LoRA

*How little must we change to teach a model something new?*

When a textbook needs a correction, nobody prints it again. The publisher slips in a sheet of errata. Take the sheet
out, and the book is what it was.

Fine-tuning prints the book again. Each task leaves a full copy of the model: 538 MB for ours, SmolLM2 with 135 million
weights. Could we keep the old model, and store only the change?
""")
code(r"""
# @title Set-up: looks for the book's library
from importlib.util import find_spec

if find_spec("tuning") is None:
    raise ModuleNotFoundError(
        "This copy of the book has no public address to install from. "
        "On your machine, run `make lab` in its folder. For Colab, publish it: "
        "make publish REPO=owner/name TAG=v1.0.0"
    )
""", "hide-input")
code(r"""
# @title Imports, model and data
import math
import random
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tuning import drawings
from tuning.evaluate import difference, facts_with_ids, ledger
from tuning.experiments.record import load_results
from tuning.lora import WideProduct
from tuning.memory import MODELS, Setting, kept_for_backward
from tuning.models import load_lm
from tuning.p_tuning import answer_loss, prompt_logits
from tuning.plots import COLORS, figure
from tuning.yours import yours

model, tokenizer = load_lm(dtype=torch.float32)
facts = facts_with_ids(tokenizer, "P17")  # (city, token id of its country)
""", "hide-cell")
code(r"""
# @title Drawing: LoRA's two ways, and what is sent
drawings.lora(model_bytes=538_060_032, adapter_bytes=9_768_960)
""", "hide-input")
md(r"""
There is a catch. One weight matrix W of our model has 576 × 576 numbers, and a change of W has as many. The errata
would be as long as the book. So LoRA allows only changes of one kind: a tall matrix B with eight columns, times a flat
matrix A with eight rows. That is 9,216 numbers instead of 331,776. It sounds like too few. Look:
""")
code(r"""
# @title The ledger: asked, all weights, LoRA on and off
recorded = load_results("ledger")["results"]
found = {row["method"]: row for row in recorded["rows"]}
met = [found[name] for name in ("asked", "all weights", "LoRA")]
met.append(found["asked"] | {"method": "LoRA, switched off"})
ledger(met, columns=("right", "continents", "kept a task"))
""", "hide-input", "result")
md(r"""
**Right** counts new cities, after *The city of Osaka is in the country of …* **Continents** counts answers to another
question, which nobody trained. **Kept a task** is what one more task costs: a prompt of 41 bytes, a copy of the model,
or an adapter. The first row is the model as it is. Trained rows are means of three runs. In brackets stands an interval
of 95 %: other cities and other runs would mostly fall into it.

LoRA tells as many countries as training all weights, as far as we can see, and its file is 55 times smaller.

Now the continents. Both trainings make the model forget them: of 106, LoRA leaves 42, and all weights leave 4. Always
saying *Africa* would have 58. In larger models, too, LoRA forgets less than full training, and on code and mathematics
it also learns less (Biderman et al., 2024). Small does not mean harmless. But read the last row. It needs no run, since W
was never touched: take the sheet out, and the model is what it was.

*You need [chapter 1](../1-prompts/1-two-ways.ipynb)'s training loop and
[chapter 2](../1-prompts/2-prompts-are-code.ipynb)'s templates. About 90 seconds and 4 GB on two cores; to use it half, to
know why it works all of 50 minutes of reading.*

## The adapter

A guess. The adapter must start by changing nothing. Should A be zero, or B, or both? Choose. The class takes one of the
three; further down we try them all.
""")
code(r"""
class WithLoRA(nn.Module):
    def __init__(self, base, rank=8, alpha=16):
        super().__init__()
        self.base = base  # the frozen layer
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        bound = base.in_features**-0.5
        nn.init.uniform_(self.A, -bound, bound)  # small random numbers

    def forward(self, x):  # (..., in)
        change = x @ self.A.T @ self.B.T  # (..., out)
        return self.base(x) + self.scale * change
""")
md(r"""
That is the whole method. The matrix BA is never made: two thin products are cheaper. The scale α/r is a fixed number.

Freeze the model, and put an adapter beside each linear layer of its 30 blocks, 210 in all. The output table `lm_head`
stays as it is, as in peft:
""")
code(r"""
torch.manual_seed(0)
model.requires_grad_(False)
for name, layer in list(model.named_modules()):
    if isinstance(layer, nn.Linear) and name != "lm_head":
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, WithLoRA(layer))

adapters = [weight for weight in model.parameters() if weight.requires_grad]
trained = sum(weight.numel() for weight in adapters)
print(f"{len(adapters) // 2} adapters, {trained:,} numbers")
""")
md(r"""
Now we ask, train for fifty steps, and ask again. `prompt_logits` gives the scores of the next word after each prompt, and
`answer_loss` is the mean of −log p of the right country there:
""")
code(r"""
ASK = "The city of [X] is in the country of [Y]."
rows = facts["test"][::5]  # cities that are not trained on


def said(template, rows):  # the next word after each prompt
    logits = prompt_logits(model, tokenizer, template, rows)  # (rows, vocab)
    return logits.argmax(dim=1).tolist()


before = said(ASK, rows)
optimizer = torch.optim.AdamW(adapters, lr=1e-3, weight_decay=0, fused=True)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 50)  # to 0
random.seed(0)
for _ in range(50):
    batch = random.sample(facts["train"], 16)
    answer_loss(model, tokenizer, ASK, batch).backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
after = said(ASK, rows)
""", "nbval-ignore-output")
code(r"""
def right(answers, rows):
    return sum(a == b for a, (_, b) in zip(answers, rows, strict=True))


print(f"right, of {len(rows)}: {right(before, rows)}, {right(after, rows)}")
table = {"before": before, "after": after, "right": [b for _, b in rows]}
table = pd.DataFrame(table, [city for city, _ in rows])
changed = table[table["before"] != table["after"]]
changed[::10][:8].map(tokenizer.decode)  # every tenth answer that changed
""", "nbval-ignore-output")
code(r"""
# @title ✓ None of these cities was trained on, and more are right after
assert not {city for city, _ in facts["train"]} & {city for city, _ in rows}
assert right(after, rows) > right(before, rows) + 8
print("none of these cities was trained on, and more are right after")
""", "hide-cell")
md(r"""
Most of what was wrong is still wrong: a model of this size has hardly met many of these towns. Did it learn facts, or the
form of the answer? [Chapter 5](../1-prompts/5-four-ways.ipynb) asks. Here is what else we can do with the sheet:
""")
code(r"""
layers = [layer for layer in model.modules() if isinstance(layer, WithLoRA)]
for layer in layers:
    layer.scale = 0  # take it out
assert said(ASK, rows[:50]) == before[:50]
for layer in layers:
    layer.scale = 16 / 8  # and put it in again

one, x = layers[0], torch.randn(5, 576, device=model.device)
merged = one.base.weight + one.scale * one.B @ one.A  # or make it part of W
torch.testing.assert_close(x @ merged.T, one(x), rtol=1e-4, atol=1e-4)
print(f"to send: {4 * trained / 1e6:.1f} MB")
""")
md(r"""
Out, the model answers as before. **Merged**, it is as fast as before, and the sheet is glued in. Kept beside W,
the adapter can be swapped for another task's. Its products are small, but each is a call of its own, and so a model with
adapters beside it writes more slowly. [Chapter 7](7-lora-in-practice.ipynb) measures it.

## Turn it down

The adapter costs continents. Must it come out whole? How strong it is depends on one number, the scale. Let us ask for
cities and for continents with the sheet out, half in, and in:
""")
code(r"""
ELSE = "[X] is located in the continent of [Y]."
countries = facts_with_ids(tokenizer, "P30")["test"]  # 54 of them
still = {}
for part in (0, 1 / 2, 1):
    for layer in layers:
        layer.scale = part * 16 / 8
    cities = right(said(ASK, rows), rows)
    still[part] = right(said(ELSE, countries), countries)
    print(f"{part:3}: {cities} cities, {still[part]} continents")
""", "nbval-ignore-output")
code(r"""
# @title ✓ Half of the adapter loses fewer continents than all of it
assert still[1] < still[1 / 2]
continents = facts_with_ids(tokenizer, "P30")
every = [answer for split in continents.values() for _, answer in split]
africa = tokenizer(" Africa").input_ids[0]
assert (every.count(africa), len(every)) == (58, 160)  # as the text says
print("half of the adapter loses fewer continents than all of it")
""", "hide-cell")
md(r"""
Half of the adapter brings a part of the gain, and takes next to nothing. But one run, 213 cities and 54 countries say
little. These are the means of three runs, on all 1,064 cities and 160 countries:
""")
code(r"""
# @title Figure: what a change gives and takes, by its length
down = load_results("turned_down")["results"]
pieces = load_results("first_directions")["results"]
changes = [pieces[f"change/{seed}"] for seed in range(3)]
lora = {"0": [recorded["asked"] | recorded["asked"]["elsewhere"]]}
for part, label in (("0.25", "¼"), ("0.5", "½"), ("0.75", "¾")):
    lora[label] = [down[f"LoRA/{seed}"][part] for seed in range(3)]
whole_scale = [recorded[f"run/LoRA/{seed}"] for seed in range(3)]
lora["1"] = [run | run["elsewhere"] for run in whole_scale]
kinds = {"47 %": "shortened as first 1", "69 %": "shortened as first 8"}
kinds |= {"100 %": "linear layers"}
full = {
    part: [change[kind] for change in changes] for part, kind in kinds.items()
}


def mean(runs, what):
    return sum(run[what].count("1") for run in runs) / len(runs)


fig, axes = figure(
    "What is won comes first, what is lost comes last",
    "cities right, of 1,064",
    "continents right, of 160",
)
for name, shares in (("LoRA, by its scale", lora), ("linear layers, fully trained", full)):
    across = [mean(some, "hits") for some in shares.values()]
    up = [mean(some, "continents") for some in shares.values()]
    axes.plot(across, up, marker="o", label=name)
    for label, *point in zip(shares, across, up, strict=True):
        axes.annotate(label, point, (6, -3), textcoords="offset points")
axes.set(xlim=(295, 440), ylim=(0, 125))
axes.legend(loc="lower left")
plt.show()
""", "hide-input", alt="Continents right over cities right. LoRA's line starts at 307 cities and 106 continents without the adapter, goes right to "
    "402 and 102 at half its scale, and falls to 421 and 42 at the whole. The line of all weights bends down in the same way, to 416 and 6.")
md(r"""
Read LoRA's line from its left end. The first half of the scale goes to the right: 402 cities instead of 307, and 102
continents instead of 106. The second half adds 19 cities and costs 61 continents. A full training can be turned down as
well, on the straight way back to where it began. At 47 % of the way it keeps its cities and has 61 continents instead of 6: no
fewer than LoRA with as many cities.

So before you hand an adapter on, ask twenty questions from outside its task. If it fails at them, take the smallest scale
that is good enough on dev. [peft](https://github.com/huggingface/peft) has `rescale_adapter_scale` to try it; to keep it,
write the smaller `lora_alpha` into the adapter's configuration. Wortsman et al. (2021) do the like with whole models: the
mean of the weights before and after fine-tuning.

## As in peft

peft is the library that you will use at work. The same weights in its adapter and in ours must give the same outputs:
""")
code(r"""
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear

base, x = nn.Linear(48, 32).requires_grad_(False), torch.randn(5, 48)
ours = WithLoRA(base, rank=4, alpha=12)
nn.init.normal_(ours.B)
config = LoraConfig(r=4, lora_alpha=12)
theirs = PeftLinear(base, "default", config, r=4, lora_alpha=12)
theirs.lora_A["default"].weight.data = ours.A.data.clone()
theirs.lora_B["default"].weight.data = ours.B.data.clone()
torch.testing.assert_close(ours(x), theirs(x))
""")
code(r"""
# @title ✓ Gradients and the change of weights too
ours(x).square().sum().backward()
theirs(x).square().sum().backward()
for name, weight in (("A", theirs.lora_A), ("B", theirs.lora_B)):
    mine, expected = getattr(ours, name).grad, weight["default"].weight.grad
    assert (mine - expected).norm() < 1e-5 * expected.norm()
delta = ours.scale * ours.B @ ours.A
torch.testing.assert_close(delta, theirs.get_delta_weight("default"))
print("gradients and the change of weights too")
""", "hide-cell")
code(r"""
# @title Library: LoRA, which has dropout and another scale too
# tuning/lora.py
class LoRA(nn.Module):
    def __init__(
        self, in_features, out_features, rank, alpha, dropout=0.0, rslora=False
    ):
        super().__init__()
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        dropped = self.training and self.dropout.p
        if (
            x.dtype == self.A.dtype
            or dropped
            or torch.is_autocast_enabled(x.device.type)
        ):
            # (..., rank)
            low = F.linear(self.dropout(x.to(self.A.dtype)), self.A)
        else:
            low = WideProduct.apply(x, self.A)
        return F.linear(low * self.scale, self.B)  # (..., out)

    def delta(self):
        return self.scale * (self.B @ self.A)
""", "hide-input")
md(r"""
At work peft puts the adapters in, too:

```python
from peft import LoraConfig, get_peft_model

config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)  # freezes it, and adds adapters
...  # train as above
model.save_pretrained("adapter")  # 9.8 MB
```

Where to begin? In our sweep the best rate was 0.001 for LoRA, and 0.0001 for all weights. At 7 billion weights a usual
start is all linear layers, r from 16 to 64, and a rate from 0.0001 to 0.0002. Then sweep the rate. `recipes/tune.py` in
this book's repository does the whole run from one file of settings.

## Pitfalls

**Test with α ≠ r.** At α = r the scale is 1, and a merge that forgets the scale passes every test.
""")
code(r"""
for alpha in (8, 16):
    layer = WithLoRA(base, rank=8, alpha=alpha)
    nn.init.normal_(layer.B)
    forgotten = base(x) + x @ (layer.B @ layer.A).T
    passes = torch.allclose(forgotten, layer(x), atol=1e-4)
    print(f"α = {alpha:2}, r = 8: a merge without the scale passes: {passes}")
""")
md(r"""
**Count what you train.** Forget to freeze, and nothing complains. All weights are trained, at a rate that is too large for
them, and whoever saves what was trained saves a whole model.
""")
code(r"""
for freeze in (True, False):
    layer = WithLoRA(nn.Linear(576, 576).requires_grad_(not freeze))
    count = sum(w.numel() for w in layer.parameters() if w.requires_grad)
    print(f"frozen {freeze}: {count:,} numbers are trained")
""")
md(r"""
*Now you can use LoRA. The rest of the chapter says why it works, and when it will not.*

## Why B is zero

Write $y = W x + s\,B A x$ with $s = \alpha/r$, and let $g = \partial \mathcal L/\partial y$ be the gradient that arrives.
Change $B$ by a little $dB$. Then $y$ changes by $s\,dB\,(Ax)$, and the loss by $g^\top s\,dB\,(Ax)$. So the number that
multiplies $dB_{ij}$ is $s\,g_i (Ax)_j$. The same with $A$ gives

$$
\frac{\partial \mathcal L}{\partial B} = s\, g\, (A x)^\top,
\qquad
\frac{\partial \mathcal L}{\partial A} = s\, (B^\top g)\, x^\top.
$$
""")
code(r"""
x, g = torch.randn(48), torch.randn(32)  # an input; what arrives from above
ours.zero_grad()
ours(x).backward(g)
A, B, s = ours.A.detach(), ours.B.detach(), ours.scale
torch.testing.assert_close(ours.B.grad, s * torch.outer(g, A @ x))
torch.testing.assert_close(ours.A.grad, s * torch.outer(B.T @ g, x))
""")
md(r"""
Full training needs $g x^\top$, as large as $W$. Here it never appears: both gradients go through $Ax$ and $B^\top g$,
which have $r$ numbers.

And your guess is settled. The gradient of $B$ holds $A$, and the gradient of $A$ holds $B$:
""")
code(r"""
starts = {"A zero": (0, 1), "B zero": (1, 0), "both": (0, 0)}
for start, (a, b) in starts.items():
    layer = WithLoRA(base)
    layer.A.data *= a
    layer.B.data = b * torch.randn(32, 8)
    layer(x).backward(g)
    moves = [name for name in "AB" if getattr(layer, name).grad.any()]
    same = torch.equal(layer(x), base(x))
    print(f"{start:6} unchanged: {same}, moves: {moves}")
""")
md(r"""
All three leave the model unchanged. With both zero nothing ever moves. With one zero, that one moves first, and a step
later both do. So A zero would do as well. LoRA's authors took B, and at large rates B is the better choice
[[note 1]](#notes).

## How much of the change is needed?

Why are eight columns enough? Look at what training *all* weights has changed: $\Delta W$, one matrix a layer. The singular
value decomposition writes it as a sum of **terms**, matrices of rank 1, the longest first:

$$\Delta W = \sigma_1 u_1 v_1^\top + \sigma_2 u_2 v_2^\top + \dots$$

The squared length of a matrix is the sum of its squared numbers, and here that of the $\sigma_i^2$. If $\Delta W$ were of low
rank, a few terms would hold all of it.
""")
code(r"""
# @title Figure: how much of the change its first terms hold
held = pd.DataFrame([change["spectrum"]["held"] for change in changes]).mean()
fig, axes = figure(
    "The first eight terms hold less than half of the change",
    "terms of each layer's change, the longest first",
    "share of its squared length",
)
ranks = [int(rank) for rank in held.index]
axes.plot(ranks, held, marker="o")
axes.axvline(8, color="0.6", ls=":")
axes.set(xscale="log", ylim=(0, 1))
axes.set_xticks(ranks, ranks)
axes.minorticks_off()
plt.show()
""", "hide-input", alt="Share of the squared length over the number of terms: one term holds 0.22, eight hold 0.47, 64 hold 0.79.")
md(r"""
It is not. Even 64 terms leave a fifth. Biderman et al. (2024) found the like in larger models. An adapter of rank 8 cannot
make this change.

Does it have to? We put parts of the change back into the linear layers of the untrained model, and ask:
""")
code(r"""
# @title Table: parts of the change put back, and trained adapters
PARTS = {
    "nothing": "nothing",
    "all of it": "linear layers",
    "its first term": "first 1",
    "its first 8 terms": "first 8",
    "all but its first term": "without first 1",
    "all but its first 8": "without first 8",
    "all, as short as its first term": "shortened as first 1",
    "8 random directions": "8 random, drawn out",
}


def row(found):
    runs = [piece["hits"] for piece in found]
    right = sum(hits.count("1") for hits in runs) / len(runs)
    others = sum(piece["continents"].count("1") for piece in found)
    return {
        "right, of 1,064": f"{right:.0f}",
        "against all of it": difference(runs, whole),
        "continents, of 160": f"{others / len(found):.0f}",
    }


whole = [change["linear layers"]["hits"] for change in changes]
table = {
    name: row([change[kind] for change in changes])
    for name, kind in PARTS.items()
}
adapter = [pieces[f"adapter/1/{seed}"] for seed in range(3)]
table["a trained adapter of rank 1"] = row(adapter)
table["all of it"]["against all of it"] = ""
pd.DataFrame(table).T
""", "hide-input")
md(r"""
**Against all of it** is the difference on the same cities; where the interval holds zero, we see none. The counts are means
of three runs. All of it has 416 cities, not 425, since embeddings and norms stay as they were.

1. **Few directions are enough.** The first term of each layer brings 90 of the 109 cities that were gained. With the
   first eight we see no difference to the whole.
2. **They are not the only ones.** All but the first term bring as many. Even all but the first eight bring more than half.
   Not everything will do: eight random directions, as long as the first eight, bring less.
3. **A shorter change is enough, too.** Shortened to the length of its first term, the whole change keeps its cities.
4. **What is lost hangs on the first terms.** The first alone leaves 22 of 106 continents, the first eight leave 8. All but the
   first eight leave them all.

So LoRA does not work because the change of full training is of low rank. By its length it is not. But training wrote down the
task more than once, and some small change is enough. An adapter has room for that [[note 2]](#notes). Why the first terms do
most of the harm, we have not found out.

This is one easy task and a small model. Is so little enough for a hard task?

## When is a rank full?

Take a task with nothing to understand: learn by heart. A pair is a prompt of two random tokens and one of 64 words, also
drawn at random, 6 bits to remember. This time there is one adapter, beside the last linear layer of the last block. If the
model gives the right word, among the 64, the probability $p$, it holds $6 + \log_2 p$ bits of that pair: all 6 when it is
certain, none when it guesses.
""")
code(r"""
# @title Figure: bits held, by rank
filled = load_results("full_rank")["results"]
runs = [run for key, run in filled.items() if key.startswith("run/")]
runs = pd.DataFrame(runs)
fig, axes = figure(
    "Asked for more than it can hold, a rank does not hold more",
    "pairs to learn, 6 bits each",
    "bits held",
)
pairs = sorted(set(runs["pairs"]))
for rank, color in zip((1, 4, 16, 64), COLORS, strict=False):
    mine = runs[runs["rank"] == rank]
    label = f"rank {rank}: {mine['trained'].iloc[0]:,} numbers"
    axes.plot(mine.groupby("pairs")["bits"].mean(), color=color, label=label)
    longer = filled[f"longer/{rank}"]
    axes.plot(longer["pairs"], longer["bits"], "o", mfc="none", color=color)
axes.plot(pairs, [6 * n for n in pairs], color="0.6", ls=":", label="all")
axes.set(xscale="log", yscale="log", ylim=(20, 200_000))
axes.set_xticks(pairs, [f"{n:,}" for n in pairs])
axes.set_yticks([100, 1000, 10_000, 100_000])
axes.set_yticklabels(["100", "1,000", "10,000", "100,000"])
axes.minorticks_off()
axes.legend()
plt.show()
""", "hide-input", alt="Bits held over pairs to learn, on logarithmic axes. Ranks 4, 16 and 64 hold nearly all of 256 pairs. "
    "Rank 4 has 7,000 bits of 4,096 pairs and 5,000 of 16,384; rank 16 has 23,000 of either; rank 64 has 68,000 of 98,304. Rank 1 stays "
    "below 60. Open marks, four times the steps, lie a little higher.")
md(r"""
1. **With room to spare, the rank does not matter.** Ranks 4, 16 and 64 hold all of 256 pairs.
2. **Then it is full.** Rank 4 has 7,000 bits of 4,096 pairs, and fewer of 16,384. Rank 16 has 23,000 of either. Four times the
   steps, the open marks, bring them to 8,500 and 29,000: about one bit for each number trained. Rank 64 then has nine tenths,
   and is not yet full.
3. **One adapter of rank 1 hardly begins.** It moves all 64 scores along one line, so that hardly more than the words at its two
   ends can win.

So ask what your task must store. Our 1,595 cities have 119 countries. By heart that is $1595 \cdot \log_2 119$, 11,000
bits. Rank 8 beside *all* 210 layers has 2.4 million numbers. One bit a number is what one layer and one task gave, so take it as
an order of magnitude: here there is room to spare. Schulman et al. (2025) see in larger models that LoRA trains worse than all
weights once the data exceed what it can hold.

## What α/r does

In practice one fixes α, often at $2r$, and tunes the rate. Why is that nearly enough? Take an adapter without a scale,
$A' = \sqrt s A$ and $B' = \sqrt s B$. Then $B'A' = s\,BA$. What must its rate be, so that both train alike? In each step $A'$ must
move by $\sqrt s$ times what $A$ moves.

- **SGD** moves $A$ by $\eta$ times its gradient. The gradient of $A'$ is that of $A$ divided by $\sqrt s$. So its rate must be
  $s\,\eta$.
- **Adam** moves each number of $A$ by about $\eta$, whatever the gradient's size. So each of $A'$ must move by
  $\sqrt s\,\eta$, and that is its rate.

The same goes for $B$. So these are the same runs:

| optimizer | with a scale: rate, start | without: rate, start |
| --- | --- | --- |
| SGD | $\eta$, $A_0$ | $s\,\eta$, $\sqrt s\,A_0$ |
| Adam | $\eta$, $A_0$ | $\sqrt s\,\eta$, $\sqrt s\,A_0$ |

Here is Adam's line, for $s = 4$:
""")
code(r"""
def fit(layer, lr):
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=lr, eps=1e-30)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(inputs) - wanted).square().mean().backward()
        optimizer.step()


base = base.double()  # so that rounding does not blur it
inputs, wanted = torch.randn(99, 48).double(), torch.randn(99, 32).double()
scaled = WithLoRA(base, rank=8, alpha=32).double()  # s = 4
plain = WithLoRA(base, rank=8, alpha=8).double()  # s = 1
plain.A.data = 2 * scaled.A.detach()  # √s times
fit(scaled, lr=1e-3)
fit(plain, lr=2e-3)  # √s times
torch.testing.assert_close(4 * scaled.B @ scaled.A, plain.B @ plain.A)
""")
md(r"""
That holds without weight decay, and with Adam's ε so small that it plays no part. So α is a rate, and a start. What does it do that the rate alone does not? B starts at zero, and Adam moves its numbers by $\eta$.
So at first the output moves by $s\,\eta$ times the numbers of $Ax$: twice the α or twice the rate, twice as fast. But A moves
by $\eta$ as well, and α does not change that. **A larger rate moves the output and A. A larger α moves the output, and leaves A
longer where it began.** Whether that is worth a second sweep is not settled [[note 3]](#notes).

## What a training step holds
""")
code(r"""
# @title Table: numbers that a step holds, in MB
whole_model = 134_515_008
table = {
    "all weights": {
        "weights": whole_model,
        "gradients": whole_model,
        "Adam": 2 * whole_model,
    },
    "LoRA": {
        "weights": whole_model + trained,
        "gradients": trained,
        "Adam": 2 * trained,
    },
}
table = pd.DataFrame(table).T * 4 / 1e6
table["together"] = table.sum(axis=1)
table.round().astype(int)
""", "hide-input")
md(r"""
Gradients and Adam's two averages nearly vanish. The frozen weights do not; part 3 of this book is about those. Nor do the
**activations**, what forward keeps for backward: the gradient still has to travel down through every frozen layer. In a
model in 16 bits LoRA may even keep more. Of each token one block of LLaMA-7B keeps
""")
code(r"""
# @title Table: bytes that a block keeps of each token, LLaMA-7B in 16 bits
full = Setting("AdamW", MODELS["7B"], batch=1, length=512)
ways = {"all weights": full}
for whose, adapters in (("LoRA, peft", "copies"), ("LoRA, this book", "float32")):
    ways[whose] = replace(full, method="LoRA", rank=8, adapters=adapters)
kept = {whose: kept_for_backward(way) for whose, way in ways.items()}
share = {whose: size / kept["all weights"] for whose, size in kept.items()}
table = pd.DataFrame({"bytes": kept, "of all weights": share})
table.round(2)
""", "hide-input")
md(r"""
The cause: peft's adapters are in float32, and without autocast each keeps a copy of its input in float32. This book's library keeps the input in
16 bits, as it came [[note 4]](#notes). [Laboratory 11](../4-lomo/lab/11-where-the-memory-goes.ipynb) counts these bytes tensor
by tensor.

## Yours

Give a file of your own: 20 lines or more, each `{"subject": …, "answer": …}`. `yours` trains LoRA on part of it, and prints
your row beside the untrained model's.
""")
code(r"""
MINE = None  # e.g. "languages.jsonl"
if MINE:
    yours(MINE, "LoRA", "The official language of [X] is [Y].")
""")
md(r"""
## Exercises

Each has a [solution](solutions/6-lora.ipynb).

1. **Count LLaMA-7B's** (easy, 10 minutes). It has 32 blocks of hidden size 4,096 and inner size 11,008: four square matrices for attention,
   three for the MLP, and 6,738,415,616 numbers in all. How many numbers has an adapter of rank 8 beside all of these matrices? How many MB
   in 16 bits?
2. **The other start** (medium, 20 minutes). Start A at zero and B at random, between ±1/√in. Is the model unchanged? Let `fit` return its
   loss, and compare both starts at eight rates from 0.0001 to 0.3, with five seeds each.
3. **The gradient's spectrum** (medium, 30 minutes). Write `share_held(matrix, k)`: the part of a matrix's squared length that its first k
   singular values hold. `check_share_held(share_held)` from `tuning.checks` tests it. Take one query matrix of a fresh model, and the loss
   on 64 facts. Compare three matrices: its gradient, the sign of its gradient, and what eight steps of Adam change in it. Which of them do
   few values hold, and which have a long tail? Where does the tail of a full change come from?
4. **Weight decay** (medium, 20 minutes). AdamW shrinks a weight by rate times decay in each step. So the run with scale s, rate η and
   decay λ equals one without a scale, at rate √s η and which decay? Write `without_scale(A, B, scale, lr, decay)`, which returns that run's A, B, rate and
   decay; `check_without_scale(without_scale)` tests it.
5. **One product, many factors** (hard, 30 minutes). $BM$ and $M^{-1}A$ have one product for every invertible M. Write `balanced(A, B)`, whose factors
   have $AA^\top = B^\top B$, without making the large product. `check_balanced(balanced)` tests it.

## What to remember

- LoRA leaves the weights alone and trains a change of low rank beside them: $y = Wx + \frac{\alpha}{r}\,BAx$.
- B starts at zero, so that nothing changes at first; if both did, nothing would ever move.
- It comes off, and it can be turned down: at half its scale it kept most of the gain, and nearly all of the rest.
- The change of full fine-tuning is not of low rank. A change of low rank is enough all the same, until there is more to store
  than it has room for.
- With Adam, a larger rate moves the output and A; a larger α moves the output, and not A.

## Notes

1. Hayou et al. (2024) find that with B at zero larger rates can be used, and that they do better.
2. That few directions can be enough was seen before LoRA. Aghajanyan et al. (2021) trained RoBERTa along 200 random
   directions only, and reached nine tenths of full fine-tuning's score on one task. Trained, random directions can do that;
   ours were only cut out of a finished change. And what is enough need not be the same. Shuttleworth et al. (2024) find that
   LoRA's matrices get new large directions, unlike any in the pretrained model, and that those go along with forgetting.
3. Zhang et al. (2026) report gains from a large α that no rate brings. They, too, find that α makes the task's signal larger
   and does not let A drift more. The rank hides in α/r as well: [laboratory 6](lab/6-lora.ipynb) measures what it does to the
   first step.
4. The numbers are those of float32 adapters, bit for bit; a test compares. In peft `autocast_adapter_dtype=False` makes
   adapters of 16 bits, which need no copy. With activation checkpointing the difference is small, since one block at a time
   keeps all this.

**Sources.** [Hu et al. 2021](https://arxiv.org/abs/2106.09685) (LoRA);
[Hayou et al. 2024](https://arxiv.org/abs/2406.08447) (which factor starts at zero);
[Zhang et al. 2026](https://arxiv.org/abs/2606.12883) (what α does);
[Biderman et al. 2024](https://arxiv.org/abs/2405.09673) (learns less, forgets less; the rank of full fine-tuning's change);
[Schulman et al. 2025](https://thinkingmachines.ai/blog/lora/) (LoRA without regret);
[Wortsman et al. 2021](https://arxiv.org/abs/2109.01903) (between the weights before and after fine-tuning);
[Aghajanyan et al. 2021](https://arxiv.org/abs/2012.13255) (intrinsic dimension);
[Shuttleworth et al. 2024](https://arxiv.org/abs/2410.21228) (directions that LoRA adds).
""")
if __name__ == "__main__":
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), sys.argv[1])
