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

Fine-tuning prints the book again. Each task leaves a full copy of the model, 538 MB for ours. Could we keep the old
model, and store only the change?
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
question, which nobody trained. **Kept a task** is what one more task costs: a prompt, a copy of the model, or an
adapter. Trained rows are means of three runs. In brackets stands an interval of 95 %: other cities and other runs
would mostly fall into it.

LoRA tells as many countries as training all weights, as far as we can see, and its file is 55 times smaller.

Now the continents. We trained countries alone, and both models now miss continents that they used to name: LoRA has 42
right and all weights 4, where always saying *Africa* would have 58. In larger models, too, LoRA forgets less than full
training, and on code and mathematics it also learns less (Biderman et al., 2024). Small does not mean harmless. But read
the last row. Take the sheet out, and the model is what it was.

*You need [chapter 1](../1-prompts/1-two-ways.ipynb)'s training loop and
[chapter 2](../1-prompts/2-prompts-are-code.ipynb)'s templates. About 80 seconds and 4 GB on two cores; 40 minutes of
reading.*

## The adapter

Before the code, a guess. The adapter must start by changing nothing. Should A be zero, or B, or both? Choose; soon we
try all three.
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
That is the whole method. The matrix BA is never made: two thin products are cheaper. The scale α/r is a fixed number; a
section below says what it does.

Freeze the model, and put an adapter beside each linear layer of its 30 blocks, 210 in all. The output table `lm_head` stays as it
is, as in peft:
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
Now we ask, train for sixty steps, and ask again. `prompt_logits` gives the scores of the next word after each prompt, and
`answer_loss` is the loss of the country there. In the ledger's sweep the rate 0.001 was best for LoRA, and a tenth of it for all weights.
""")
code(r"""
ASK = "The city of [X] is in the country of [Y]."
rows = facts["test"][::7]  # cities that are not trained on


def said(template, rows):  # the next word after each prompt
    logits = prompt_logits(model, tokenizer, template, rows)  # (rows, vocab)
    return logits.argmax(dim=1).tolist()


before = said(ASK, rows)
optimizer = torch.optim.AdamW(adapters, lr=1e-3, weight_decay=0, fused=True)
random.seed(0)
for step in range(60):
    batch = random.sample(facts["train"], 16)
    loss = answer_loss(model, tokenizer, ASK, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
after = said(ASK, rows)
""", "nbval-ignore-output")
code(r"""
def right(answers, rows):
    return sum(a == b for a, (_, b) in zip(answers, rows, strict=True))


print(f"right, of {len(rows)}: {right(before, rows)}, {right(after, rows)}")
table = {"before": before, "after": after, "right": [b for _, b in rows]}
table = pd.DataFrame(table, [city for city, _ in rows])
table[::19].map(tokenizer.decode)
""", "nbval-ignore-output")
code(r"""
# @title ✓ None of these cities was trained on, and more are right after
assert not {city for city, _ in facts["train"]} & {city for city, _ in rows}
assert right(after, rows) > right(before, rows)
print("none of these cities was trained on, and more are right after")
""", "hide-cell")
md(r"""
Most of what was wrong is still wrong: a model of this size has hardly met many of these towns. Did it learn facts, or the form of the
answer? [Chapter 5](../1-prompts/5-four-ways.ipynb) asks. Here is what else we can do with the sheet:
""")
code(r"""
layers = [layer for layer in model.modules() if isinstance(layer, WithLoRA)]
for layer in layers:
    layer.scale = 0  # take it out
assert said(ASK, rows) == before
for layer in layers:
    layer.scale = 16 / 8  # and put it in again
assert said(ASK, rows) == after

one, x = layers[0], torch.randn(5, 576, device=model.device)
merged = one.base.weight + one.scale * one.B @ one.A  # or make it part of W
torch.testing.assert_close(x @ merged.T, one(x), rtol=1e-4, atol=1e-4)
print(f"to send: {4 * trained / 1e6:.1f} MB")
""")
md(r"""
Out, the model gives every answer of before. **Merged**, it is as fast as before, and the sheet is glued in. Kept beside W, the
adapter can be swapped for another task's. Its products are small, but each is a call of its own, and so a model with adapters beside it writes
more slowly. [Chapter 7](7-lora-in-practice.ipynb) measures it.

## As in peft

[peft](https://github.com/huggingface/peft) is the library that you will use at work. The same weights in its adapter and
in ours must give the same outputs:
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
    print(f"{start:6} as the model at the start: {same}, moves: {moves}")
""")
md(r"""
With both zero nothing ever moves. With one zero, that one moves first, and a step later both do. Either start would do. LoRA's authors
chose B, and at large rates that is the better choice [[note 1]](#notes).

## How much of the change is needed?

Why should eight columns be enough? Look at what training *all* weights has changed: $\Delta W$, one matrix a layer. The singular value
decomposition writes it as a sum of **terms**, matrices of rank 1, the longest first:

$$\Delta W = \sigma_1 u_1 v_1^\top + \sigma_2 u_2 v_2^\top + \dots, \qquad \sigma_1 \ge \sigma_2 \ge \dots$$

The squared length of a matrix is the sum of its squared numbers, and here of the $\sigma_i^2$. If $\Delta W$ were of low rank, a few terms would hold all
of it.
""")
code(r"""
# @title Figure: how much of the change its first terms hold
pieces = load_results("first_directions")["results"]
spectra = [pieces[f"change/{seed}"]["spectrum"] for seed in range(3)]
held = {int(rank): share for rank, share in spectra[0]["held"].items()}
fig, axes = figure(
    f"The first eight terms hold {held[8]:.0%} of the change",
    "terms of each layer's change, the longest first",
    "share of its squared length",
)
for seed, spectrum in enumerate(spectra):
    shares = list(spectrum["held"].values())
    axes.plot(list(held), shares, color=COLORS[seed], label=f"run {seed + 1}")
axes.axvline(8, color="0.6", ls=":")
axes.set(xscale="log", ylim=(0, 1))
axes.set_xticks(list(held), list(held))
axes.minorticks_off()
axes.legend()
plt.show()
""", "hide-input", alt=SPECTRUM_ALT)
md(r"""
It is not. In half of the layers, MEDIAN terms or more are needed to hold nine tenths. Biderman et al. (2024) found the same in larger
models. An adapter of rank 8 cannot make this change.

Does it have to? We put parts of the change back into the untrained model, and ask:
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
    "all of it, as short as its first term": "shortened as first 1",
    "8 random directions, as long as the first 8": "8 random, drawn out",
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


changes = [pieces[f"change/{seed}"] for seed in range(3)]
whole = [change["linear layers"]["hits"] for change in changes]
table = {
    name: row([change[kind] for change in changes])
    for name, kind in PARTS.items()
}
table |= {
    f"a trained adapter of rank {rank}": row(
        [pieces[f"adapter/{rank}/{seed}"] for seed in range(3)]
    )
    for rank in (1, 8)
}
table["all of it"]["against all of it"] = ""
pd.DataFrame(table).T
""", "hide-input")
md(r"""
All of it means all linear layers; embeddings and norms stay as they were. An interval that holds zero says that we see no difference.

1. FINDING first term.
2. FINDING length.
3. FINDING spread: without the first term.

So LoRA works, but not because the change of full training is of low rank. By its length it is not. It works because the task needs so little of it
[[note 2]](#notes).

## Turn it down

Half of a change did better than all of it. Can we have half of an adapter? That is one number, its scale. Let us ask the model that we trained for cities
and for continents, with the sheet out, half in, and in:
""")
code(r"""
ELSE = "[X] is located in the continent of [Y]."
countries = facts_with_ids(tokenizer, "P30")["test"]  # (country, continent)
still = {}
for part in (0, 1 / 2, 1):
    for layer in layers:
        layer.scale = part * 16 / 8
    cities = right(said(ASK, rows), rows)
    still[part] = right(said(ELSE, countries), countries)
    print(f"{part:3}: {cities} cities, {still[part]} continents")
""", "nbval-ignore-output")
code(r"""
# @title ✓ Continents are lost with the whole adapter, fewer with half
assert still[1] < still[1 / 2]
print("continents are lost with the whole adapter, fewer with half")
""", "hide-cell")
md(r"""
Of LIVE54 countries. Is this luck? Here are three recorded runs, on all test cities and countries:
""")
code(r"""
# @title Figure: what a change gives and takes, by its length
down = load_results("turned_down")["results"]
lora = {"none": [recorded["asked"] | recorded["asked"]["elsewhere"]]}
for part, label in (("0.25", "¼"), ("0.5", "½"), ("0.75", "¾")):
    lora[label] = [down[f"LoRA/{seed}"][part] for seed in range(3)]
whole_scale = [recorded[f"run/LoRA/{seed}"] for seed in range(3)]
lora["all"] = [run | run["elsewhere"] for run in whole_scale]
kinds = ("nothing", "shortened as first 1", "shortened as first 8")
full = {kind: [change[kind] for change in changes] for kind in kinds}
full["all"] = [change["linear layers"] for change in changes]


def mean(runs, what):
    return sum(run[what].count("1") for run in runs) / len(runs)


fig, axes = figure(DOWN_TITLE, "cities right, of 1,064", "continents, of 160")
for name, parts in (("LoRA, by its scale", lora), ("all weights", full)):
    across = [mean(runs, "hits") for runs in parts.values()]
    up = [mean(runs, "continents") for runs in parts.values()]
    axes.plot(across, up, marker="o", label=name)
    if parts is lora:
        for label, *point in zip(parts, across, up, strict=True):
            axes.annotate(label, point, (4, 6), textcoords="offset points")
axes.set_ylim(0, 125)
axes.legend(loc="lower left")
plt.show()
""", "hide-input", alt=DOWN_ALT)
md(r"""
FINDING down.

[peft](https://github.com/huggingface/peft) has it as `rescale_adapter_scale(model, 0.5)`. For whole models it is the
mean of the weights before and after training, which Wortsman et al. (2021) recommend. It costs nothing, so try it before
you hand an adapter on. And ask twenty questions from outside its task, whatever the scale.

This is one easy task and a small model. Will so little be enough for a hard task?

## When is a rank full?

Take a task with nothing to understand: learn by heart. A pair is a prompt of three random tokens and one of 64 words, also drawn at
random, 6 bits to remember. Only the last of the 30 blocks has adapters, and we train until they take up no more. If the model gives
the right word the probability $p$, it holds $6 + \log_2 p$ bits of that pair: all 6 when it is certain, none when it guesses.
""")
code(r"""
# @title Figure: bits held, by rank
runs = load_results("full_rank")["results"]
runs = [run for key, run in runs.items() if key.startswith("run/")]
fig, axes = figure(FULL_TITLE, "pairs to learn, 6 bits each", "bits held")
for rank, color in zip((1, 4, 16, 64), COLORS, strict=False):
    mine = [run for run in runs if run["rank"] == rank]
    axes.plot(
        [6 * run["pairs"] for run in mine],
        [run["bits"] for run in mine],
        color=color,
        label=f"rank {rank}: {mine[0]['trained']:,} numbers",
    )
axes.plot((1536, 24576), (1536, 24576), color="0.6", ls=":", label="all")
axes.set(xscale="log", yscale="log")
pairs = sorted({run["pairs"] for run in runs})
axes.set_xticks([6 * count for count in pairs], pairs)
axes.set_yticks([1000, 3000, 10_000], ["1,000", "3,000", "10,000"])
axes.minorticks_off()
axes.legend()
plt.show()
""", "hide-input", alt=FULL_ALT)
md(r"""
FINDINGS.

So ask what your task must store. FINDING scale.

## What α/r does

The scale $s = \alpha/r$ is a fixed number. Is it only another learning rate? Let $A' = \sqrt s A$ and $B' = \sqrt s B$. Then
$s\,BA = B'A'$, an adapter without a scale. Train both, and compare one step of A:

- The gradient of $A'$ is that of $A$ divided by $\sqrt s$, by the chain rule.
- **SGD** moves $A$ by $\eta$ times its gradient. So $A' = \sqrt s A$ moves by $\sqrt s\,\eta$ times that, which is $s\,\eta$ times its own.
- **Adam** moves each number by about $\eta$, whatever the gradient's size. So $A'$ moves by $\sqrt s\,\eta$.

The same goes for $B$. So these are the same runs:

| optimizer | scale, rate, start of A | without a scale: rate, start of A |
| --- | --- | --- |
| SGD | $s$, $\eta$, $A_0$ | $s\,\eta$, $\sqrt s\,A_0$ |
| Adam | $s$, $\eta$, $A_0$ | $\sqrt s\,\eta$, $\sqrt s\,A_0$ |

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
So α is a rate, and one thing more. With Adam the output begins to move at a speed of $s\,\eta$, while A turns at a speed of $\eta$. A larger rate
makes both faster. A larger α makes the output faster, and lets A turn as before.

In practice one fixes α, often at $2r$, and tunes the rate. Whether tuning the second knob pays is not settled [[note 3]](#notes). The rank
hides in $s = \alpha/r$ as well: [laboratory 6](lab/6-lora.ipynb) measures what it does to the first step.

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
Gradients and Adam's two averages nearly vanish. The frozen weights do not; part 3 of this book is about those. Nor do the **activations**, what
forward keeps for backward: the gradient still has to travel down through every frozen layer. In 16 bits LoRA may even keep more. Bytes that one block of LLaMA-7B
keeps of each token, as [laboratory 11](../4-lomo/lab/11-where-the-memory-goes.ipynb) counts them:
""")
code(r"""
full = kept_for_backward(Setting("AdamW", MODELS["7B"], 1, 512))
for whose, adapters in (("peft's", "copies"), ("this book's", "float32")):
    setting = Setting("LoRA", MODELS["7B"], 1, 512, rank=8, adapters=adapters)
    kept = kept_for_backward(setting)
    print(f"{whose:11} {kept:,}, {kept / full:.2f} of full training's {full:,}")
""")
md(r"""
peft's adapters are in float32 over a model in 16 bits, and each keeps a float32 copy of its input. This book's library keeps the input as it
came, and widens it again in backward [[note 4]](#notes). Full training keeps a little more than that: its norms are trained, too.

## Pitfalls

**Test with α ≠ r.** At α = r the scale is 1, and a merge that forgets the scale passes every test.
""")
code(r"""
for alpha in (8, 16):
    layer = WithLoRA(base, rank=8, alpha=alpha).double()
    nn.init.normal_(layer.B)
    forgotten = base(inputs) + inputs @ (layer.B @ layer.A).T
    passes = torch.allclose(forgotten, layer(inputs))
    print(f"α = {alpha:2}, r = 8: a merge without the scale passes: {passes}")
""")
md(r"""
**Count what you train.** Forget to freeze, and nothing complains. All weights are trained, at a rate that is too large for them, and the file
has the whole model in it.
""")
code(r"""
for freeze in (True, False):
    layer = WithLoRA(nn.Linear(576, 576).requires_grad_(not freeze))
    count = sum(w.numel() for w in layer.parameters() if w.requires_grad)
    print(f"frozen {freeze}: {count:,} numbers are trained")
""")
md(r"""
## Yours

Give a file of your own: 20 lines or more, each `{"subject": …, "answer": …}`. `yours` trains LoRA on part of it, and prints your row beside the
untrained model's.
""")
code(r"""
MINE = None  # e.g. "languages.jsonl"
if MINE:
    yours(MINE, "LoRA", "The official language of [X] is [Y].")
""")
md(r"""
At work peft puts the adapters in. `recipes/tune.py` in this book's repository does the whole run from one file of
settings. These lines are its heart:

```python
from peft import LoraConfig, get_peft_model

config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)  # freezes it, and adds adapters
...  # train as ever
model.save_pretrained("adapter")  # 9.8 MB
```

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
- The change of full fine-tuning is not of low rank. A change of low rank is enough all the same, until there is more to store
  than it has room for.
- The rate moves the output and turns A. α moves the output alone.
- Small is not harmless. But it comes off, and at half its scale it gave back most of what it took.

## Notes

1. Hayou et al. (2024) find that with B at zero larger rates can be used, and that they do better.
2. That few directions can be enough was seen before LoRA. Aghajanyan et al. (2021) trained RoBERTa along 200 random directions only, and
   reached nine tenths of full fine-tuning's score on one task. Trained, random directions can do that; ours were only cut out of a finished
   change. Enough is not the same, though. Shuttleworth et al. (2024) find that LoRA's matrices get new large directions, unlike any in the
   pretrained model, and that those go along with forgetting.
3. Zhang et al. (2026) report gains from a large α that no rate brings. They, too, find that α makes the task's signal larger and does not let A drift
   more.
4. The numbers are those of float32 adapters, bit for bit; a test compares. In peft `autocast_adapter_dtype=False` makes adapters of 16 bits, which need
   no copy. With activation checkpointing the difference is small, since one layer at a time keeps all this.
   [Laboratory 11](../4-lomo/lab/11-where-the-memory-goes.ipynb) counts with peft.

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
