"""Builds the draft of chapter 11 from the cells below."""

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
# 11. Where the memory goes

*Which bytes does a training step hold, and when?*

The file of a model with 7 billion weights has 13.5 GB. Your card has 24. You load the model, and it fits. You take the
first training step, and it ends: out of memory. The weights were there already. What else came?

Chapters 6 to 10 made training smaller, and told you so in bytes. Here you learn to count these bytes yourself: first by
hand, then by watching a real step, then for models that fit no machine of yours.
""")
code(
    r"""
# @title Set-up: looks for the book's library
from importlib.util import find_spec

if find_spec("tuning") is None:
    raise ModuleNotFoundError(
        "This copy of the book has no public address to install from. "
        "On your machine, run `make lab` in its folder. For Colab, publish it: "
        "make publish REPO=owner/name TAG=v1.0.0"
    )
""",
    "hide-input",
)
code(
    r"""
# @title Imports
import weakref
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from tuning.charts import planner
from tuning.experiments.record import load_results
from tuning.memory import (
    CATEGORIES,
    METHODS,
    MODELS,
    LiveBytes,
    Setting,
    kept_for_backward,
    plan,
    shape_of,
)
from tuning.models import load_lm
from tuning.plots import COLORS, figure
from tuning.simulate import simulate
from tuning.training import checkpoint_activations

GiB = 2**30
""",
    "hide-cell",
)
code(
    r"""
# @title The planner: a training step, method by method
found = load_results("lomo_memory_measured")["results"]
measured = {
    ("7B", method, 8, 512, True): found[f"7B/{method}"]["peak_bytes"] / GiB
    for method in ("AdamW", "SGD", "LOMO", "AdaLomo")
}
names = {"7B": "LLaMA-7B", "13B": "LLaMA-13B", "65B": "LLaMA-65B"}
rows = []
for name, batch, length, checkpointing, rank, method in product(
    ("7B", "13B", "65B", "Llama-3.2-1B", "Llama-3-8B", "Qwen3-8B"),
    (1, 8),
    (512, 2048, 8192),
    (True, False),
    (8, 64),
    METHODS,
):
    if rank == 64 and "LoRA" not in method:
        continue  # it has no rank
    setting = Setting(
        method, MODELS[name], batch, length, checkpointing, rank=rank
    )
    choice = {
        "model": names.get(name, name),
        "sequences": str(batch),
        "tokens of each": f"{length:,}",
        "checkpointing": "on" if checkpointing else "off",
    }
    if "LoRA" in method:
        choice["rank"] = str(rank)
    row = {"choice": choice, "bar": method}
    row["parts"] = {part: size / GiB for part, size in plan(setting).items()}
    key = (name, method, batch, length, checkpointing)
    if key in measured:
        row["measured"] = measured[key]
    rows.append(row)
planner(
    rows,
    "Which bars does your card hold?",
    "Bars of the memory of a training step of LLaMA-7B with 8 sequences of 512 "
    "tokens, one a method, beside lines for cards of 16, 24, 48 and 80 GB. "
    "AdamW's is 101 GiB, mostly optimizer states. LOMO's, LoRA's and QLoRA's "
    "are near or below the first line.",
)
""",
    "hide-input",
    "result",
)
md(r"""
Each bar is one training step, at the moment when it holds most; the parts get their names below. A line is a card. A diamond was measured on a GPU. Take
LLaMA-7B with 8 sequences of 512 tokens. The second bar was your failed step: torch's AdamW on a model in 16 bits holds 50.6 GiB.

The first bar is AdamW done with care: it keeps a copy of every weight in 32 bits, and holds 101. So does SGD, and that is its orange part. LOMO trains the same weights with
15. It updates each weight as soon as its gradient comes, and throws the gradient away; the next chapter builds it.

So on your card of 24 GB you can train by LOMO, AdaLomo, LoRA, QLoRA or P-tuning. Leave an eighth of the card free, for gaps and for CUDA
itself. The units: a GiB is $2^{30}$ bytes. A file's GB is $10^9$ bytes, so its 13.5 GB are 12.6 GiB. A card of 24 GB has 24 GiB, or a little less.

The bars are arithmetic on the model's shape. In this chapter you find out what they count, watch a real step do it, and
see both agree.

*You need [chapter 1](../1-prompts/1-two-ways.ipynb)'s loop. It runs in a minute and takes 3.4 GB on two cores; 60 minutes of reading.*
""")
md(r"""
## One layer, by hand

A step holds four kinds of numbers. **Parameters** are the weights. **Gradients** are as many, for the weights that are
trained. **Optimizer states** are what the optimizer keeps from step to step: AdamW keeps two averages for each weight.
**Activations** are what forward has made and backward will need, or what is in use.

Take one linear layer, $y = xW^\top$, in float32: 4 bytes a number. Before you read on, a guess. With 64 tokens, which of
the four is the largest, and which the smallest?
""")
code(r"""
tokens, inputs, outputs = 64, 1000, 4000
weights = 4 * inputs * outputs  # bytes
by_hand = {
    "parameters": weights,
    "optimizer states": 2 * weights,
    "gradients": weights,
    "activations": 4 * tokens * (inputs + outputs),  # x; y in use
}
for name, size in by_hand.items():
    print(f"{name:17} {size / 2**20:6.2f} MiB")
""")
md(r"""
Backward needs $x$, since the gradient of $W$ is $g_y^\top x$, with $g_y$ the gradient of $y$. That is why $x$ is kept. Only
the activations grow with the number of tokens. At 64 tokens they are almost nothing. At 4,096 tokens this layer's would be
five times its weights.

## Watch it

Is it so? torch can be asked. A **dispatch mode** sees every operation and its results. A tensor's numbers lie in a
**storage**, which views share. So count each storage once, when it appears, and take it off when it goes.
`tree_leaves` finds the tensors in whatever an operation gave back, and `weakref.finalize` calls a function when an object dies:
""")
code(r"""
class Watcher(TorchDispatchMode):
    live = 0  # bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return found

    def count(self, storage):
        if not hasattr(storage, "counted"):
            storage.counted = True  # the mark lives as long as it does
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, size):
        self.live += size
""")
code(r"""
x = torch.randn(tokens, inputs)
layer = nn.Linear(inputs, outputs, bias=False)
layer.weight.untyped_storage().counted = True  # was there before
with Watcher() as watcher:
    y = layer(x)
    print(f"after forward  {watcher.live / 2**20:6.2f} MiB: y")
    y.sum().backward()
    print(f"after backward {watcher.live / 2**20:6.2f} MiB: and W's gradient")
    del y
    print(f"after del y    {watcher.live / 2**20:6.2f} MiB")
""")
md(r"""
The gradient's 15.26 MiB are as by hand. Of the activations y is 0.98; x, the other 0.24, was made before anyone watched.

The mark works because torch hands out one and the same Python object as long as a storage lives.

The library's `LiveBytes` is this watcher with five accounts, four for our kinds and one for what is **temporary**. It sorts by two rules
[[note 1]](#notes):

- What an operation makes while gradients are recorded is an activation: so in forward. Anything else is temporary: so in backward, in the optimizer,
  and under `no_grad`.
- When a weight gets its gradient, or an optimizer its state, that tensor moves to its own account.

`live` is what the accounts hold now, `timeline` what they held after each operation, `peak` what they held when their sum was largest, and `largest` the most of
each.

Now a real step: SmolLM2, four rows of 64 tokens, AdamW. The first step makes the optimizer's states, so we watch the
second.
""")
code(r"""
def watch(model, optimizer, loss_of):
    # Watches the second of two steps.
    def step(note=lambda text: None):
        loss = loss_of(model)
        note("backward")
        loss.backward()
        note("update")
        optimizer.step()
        optimizer.zero_grad()

    step()
    with LiveBytes(model, optimizer) as live:
        step(live.note)
    return live
""")
code(
    r"""
model, tokenizer = load_lm(dtype=torch.float32)
model.train()
torch.manual_seed(0)
ids = torch.randint(1000, 49_000, (4, 64), device=model.device)


def loss_of(lm):
    return lm(input_ids=ids, labels=ids, use_cache=False).loss


# foreach=False: one weight after the other
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)
live = watch(model, optimizer, loss_of)
peak = {name: size / GiB for name, size in live.peak.items()}
for name, size in peak.items():
    print(f"{name:17} {size:5.2f} GiB")
print(f"together          {sum(peak.values()):5.2f} GiB, at the peak")
""",
    "nbval-ignore-output",
)
code(
    r"""
# @title Plot: live bytes through a training step
fig, axes = figure(
    f"The peak, {sum(peak.values()):.1f} GiB: backward meets the update",
    "operation of the step",
    "live, GiB",
)
columns = [
    [size / GiB for size in column]
    for column in zip(*live.timeline, strict=True)
]
axes.stackplot(
    range(len(live.timeline)),
    columns,
    labels=CATEGORIES,
    colors=[COLORS[index] for index in (0, 1, 2, 4, 5)],  # as in the chart
    lw=0.4,
    edgecolor="white",
    rasterized=True,
)
for place, text in live.notes.items():
    if text != "end":
        axes.axvline(place, color="black", lw=0.8, ls=":")
        axes.text(place, 0.04, f" {text}", fontsize=9, color="white")
top = sum(peak.values())
sums = [sum(moment) / GiB for moment in live.timeline]
begins = {text: place for place, text in live.notes.items()}
tops = {
    "in backward": max(range(begins["update"]), key=sums.__getitem__),
    "in the update": max(
        range(begins["update"], len(sums)), key=sums.__getitem__
    ),
}
place = tops["in backward"]
axes.vlines(place, sums[place - 40], top, color=COLORS[5])
axes.plot(place, top, "o", color="black", ms=5)
axes.text(
    place - 120, top, "peak, for a moment", ha="right", va="center", fontsize=10
)
axes.set(xlim=(0, len(live.timeline)), ylim=(0, 1.12 * top))
fig.legend(loc="outside lower center", ncols=3)
plt.show()
""",
    "hide-input",
    "nbval-ignore-output",
    alt="Live bytes over the operations of a step, stacked: parameters and optimizer states are level bands, activations "
    "rise until backward begins and fall in it, gradients take their place. A spike where backward ends and the "
    "update begins is the peak.",
)
code(
    r"""
# @title ✓ Parameters once, states twice, and two peaks of equal height
number = 4 * model.num_parameters() / GiB
assert abs(peak["parameters"] / number - 1) < 0.01
assert abs(peak["optimizer states"] / number - 2) < 0.01
assert begins["update"] - 40 < tops["in backward"] < begins["update"]
for place in tops.values():
    assert abs(sums[place] / top - 1) < 0.01
print("parameters once, states twice, and two peaks of equal height")
""",
    "hide-cell",
)
md(r"""
Read it from below. Parameters and states never move. Activations rise through forward. In backward they go, block by
block, and gradients take their place.

The dot is the peak, and it lasts for a moment. The largest weight is the table of tokens, 0.11 GiB. This model uses it at both ends, so its gradient
comes in two parts. The first is there since backward began: that is the grey band. At the end of backward the second comes, and a new tensor for
their sum. Then the update begins with the same table, beside all gradients, and AdamW needs two temporary tensors of its size on the way to the step. Both
moments hold 2.22 GiB.

So nearly all of this step is a multiple of the number of parameters. That is the first thing to ask of a recipe: **how
many bytes a parameter?**

## Sixteen bits, and the update that was lost

In 16 bits weights and gradients take half. But an update is often too small for 16 bits. bfloat16 has eight significant
bits: below 1 the next number is 0.996. Take a thousandth off, five hundred times:
""")
code(r"""
weight, master = torch.ones(1, dtype=torch.bfloat16), torch.ones(1)
for _ in range(500):
    weight -= 1e-3  # rounds back to where it was
    master -= 1e-3
print(f"bfloat16 {weight.item():.3f}, float32 {master.item():.3f}")
""")
md(r"""
The weight in 16 bits never moved. Hence **mixed precision**: forward and backward in 16 bits, and beside each weight a
copy in float32, the **master weight**, which takes the update.
""")
code(
    r"""
# @title Table: bytes a parameter, by recipe
numbers = 6.738e9
part = round(4 * 20e6 / numbers, 3)  # rank 8 has 20 million numbers
few = plan(Setting("QLoRA", MODELS["7B"], 1, 1, rank=8))
few = few["parameters"] / numbers
recipes = {  # weight, gradient, master weight, averages
    "AdamW, float32": (4, 4, 0, 8),
    "AdamW, mixed precision": (2, 2, 4, 8),
    "AdamW, all in 16 bits": (2, 2, 0, 4),
    "SGD, mixed precision": (2, 2, 4, 0),
    "SGD, all in 16 bits": (2, 2, 0, 0),
    "LOMO, 16 bits": (2, 0, 0, 0),
    "LoRA, rank 8, float32 over 16 bits": (2 + part, part, 0, 2 * part),
    "QLoRA, rank 8, layers in 4 bits": (few, part, 0, 2 * part),
}
names = ["weight", "gradient", "master", "averages"]
table = pd.DataFrame(recipes, index=names).T
table.insert(0, "bytes", table.sum(axis=1))
table.insert(1, "7B, GiB", (table["bytes"] * numbers / GiB).round(1))
table.map(lambda size: f"{size:.3f}".rstrip("0").rstrip("."))
""",
    "hide-input",
)
md(r"""
In the chart the master weights stand among the optimizer's states. QLoRA takes more than half a byte, since peft's preparation for it keeps embedding and
head in 32 bits.

Mixed precision saves AdamW nothing here: sixteen bytes, as in float32. What it saves is time, and a good part of the activations.

Whose AdamW is yours?

- With master weights, as in the LOMO paper and here, it takes **16 bytes**.
- torch's **autocast**, which trainers switch on by `bf16=True`, takes 16 too, if the model was loaded in 32 bits: weights and gradients stay so, and in a step come
  16-bit copies of the weights.
- `torch.optim.AdamW` on a model that was loaded in 16 bits takes **8**, with autocast or without. Its averages have 16 bits, and small updates are lost. So look
  at `model.dtype` before you train. LOMO in 16 bits loses updates too; chapter 12 comes back to it.
- On a GPU torch updates all weights at once, with temporary copies of all: 12.6 GiB more at 7B in 16 bits. `fused=True` makes none, and the chart counts it
  so.
""")
md(r"""
## Keep less: checkpointing

Parameters stand still; activations grow with every token. **Activation checkpointing** keeps only a block's input, and
computes the block once more when backward comes to it. An `autograd.Function` says what forward and backward do; `ctx` carries
what is kept from one to the other:
""")
code(r"""
class Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)  # nothing else is kept
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()  # a new graph
        with torch.enable_grad():
            y = ctx.block(x)  # once more
        y.backward(grad)  # adds to the gradients of the block's weights
        return None, x.grad  # for block, and for x
""")
code(r"""
from torch.utils.checkpoint import checkpoint as recompute

def block():
    return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))


torch.manual_seed(0)
blocks = nn.Sequential(*(block() for _ in range(8)))
h = torch.randn(512, 256, requires_grad=True)
ways = {
    "plain": lambda block, x: block(x),
    "ours": Checkpoint.apply,
    "torch's": lambda block, x: recompute(block, x, use_reentrant=False),
}
""")
code(r"""
grads, kept = {}, {}
for name, call in ways.items():
    blocks.zero_grad()
    with LiveBytes(blocks) as live:
        y = h
        for block in blocks:
            y = call(block, y)
        loss = y.square().mean()
        kept[name] = live.live["activations"] + live.live["temporary"]
        loss.backward()
    grads[name] = [weight.grad.clone() for weight in blocks.parameters()]
    del y, loss
for name, size in kept.items():
    print(f"{name:8} {size / 2**20:5.1f} MiB")
""")
code(
    r"""
# @title ✓ The same gradients as without, and as with torch's
for name in ("ours", "torch's"):
    for one, other in zip(grads["plain"], grads[name], strict=True):
        torch.testing.assert_close(one, other)
assert kept["ours"] < kept["plain"] / 5 and kept["torch's"] < kept["plain"] / 5
print("the same gradients as without, and as with torch's")
""",
    "hide-cell",
)
md(r"""
A block makes 2, 2 and 0.5 MiB; eight blocks make 36. With checkpointing only the results of 0.5 are kept, 4 MiB. And the gradients are the same [[note 2]](#notes). The price is a second forward. A step is
about three forwards of work, one for forward and two for backward, so three become four at most.

On the real model, `checkpoint_activations` calls torch's checkpointing for every block:
""")
code(
    r"""
def most_activations(lm, loss_of=loss_of):
    with LiveBytes(lm) as live:
        loss_of(lm).backward()
    lm.zero_grad()
    return live.largest["activations"] / 2**20


most = {"all kept": most_activations(model)}
checkpoint_activations(model)
most["checkpointing"] = most_activations(model)
print({name: f"{size:.0f} MiB" for name, size in most.items()})
""",
    "nbval-ignore-output",
)
code(
    r"""
# @title ✓ Less than half with checkpointing
assert most["checkpointing"] < most["all kept"] / 2
print("less than half with checkpointing")
""",
    "hide-cell",
)
md(r"""
What is left? Not the blocks' inputs: 30 blocks × 256 tokens × 576 numbers are 17 MiB. It is the **logits**. 256 tokens
times a vocabulary of 49,152 are 48 MiB, and again for their softmax. So do them in pieces. `recompute` is torch's checkpointing: it makes the logits of a piece, takes their loss, forgets them, and makes them again in
backward. Labels of −100 do not count.
""")
code(r"""
# tuning/training.py
def chunked_loss(states, weight, labels, size=1024):
    _check_chunks(states, labels, size)  # do they fit?
    # the last token of a row has no next
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()

    def summed(states, labels):
        logits = F.linear(states, weight)  # (size, vocabulary)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="sum")

    chunks = zip(states.flatten(0, 1).split(size), labels.split(size), strict=True)
    losses = [recompute(summed, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum() / (labels != -100).sum()
""")
code(
    r"""
from tuning.training import chunked_loss


def in_chunks(lm):
    states = lm.model(input_ids=ids, use_cache=False).last_hidden_state
    return chunked_loss(states, lm.lm_head.weight, ids, size=64)


print(f"and in chunks: {most_activations(model, in_chunks):.0f} MiB")
with torch.no_grad():
    torch.testing.assert_close(in_chunks(model), loss_of(model))
""",
    "nbval-ignore-output",
)
md(r"""
With blocks and logits made again, the largest moment has the blocks' inputs, 17 MiB, and the logits of 64 tokens with their softmax, 12 MiB each. The larger the vocabulary, the more this
matters: Llama 3 has 128,256 tokens in it.

## A model that fits no machine of yours

Nothing in this account depends on the values of the numbers. torch has **fake tensors**: a shape, a format, and nothing
in them.
""")
code(r"""
with FakeTensorMode():
    big = torch.empty(100_000, 100_000)  # would be 37 GiB
    print(big @ big)
""")
md(r"""
So a step of LLaMA-7B can be watched on a laptop. `simulate` builds the model from fake tensors, takes two steps, and
watches the second. Here is LOMO's, the method of the next chapter: it updates each weight inside backward, and keeps
neither gradients nor states.
""")
code(
    r"""
lomo = Setting("LOMO", MODELS["7B"], batch=8, length=512, checkpointing=True)
live = simulate(lomo)
for name, size in live.peak.items():
    print(f"{name:17} {size / GiB:6.2f} GiB")
print(f"together          {sum(live.peak.values()) / GiB:6.2f} GiB")
""",
    "nbval-ignore-output",
)
code(
    r"""
# @title ✓ As in the chart above, to 1 %
assert abs(sum(plan(lomo).values()) / sum(live.peak.values()) - 1) < 0.01
print("as in the chart above, to 1 %")
""",
    "hide-cell",
)
md(r"""
The LOMO paper has 14.58 GiB for this step and 102.2 for AdamW's, both within 4 % of ours. [Note 3](#notes) tells what its authors measured.

## The plan: at which moment?

A simulation takes a quarter of a minute. Arithmetic takes none, and it says why. First: what does a block keep of each token, if nothing is made again?
""")
code(r"""
hidden, inner, heads = 4096, 11_008, 32  # LLaMA-7B; 2 bytes a number
keeps = {
    "the norms' inputs, in 32 bits": 2 * 4 * hidden,
    "their results, before their weights": 2 * 2 * hidden,
    "queries, keys, values; attention's output": 4 * 2 * hidden,
    "its softmax's sums, in 32 bits": 4 * heads,
    "what these three read, what the MLP reads": 2 * 2 * hidden,
    "the MLP's gate, its SiLU, up, their product": 4 * 2 * inner,
}
setting = Setting("AdamW", MODELS["7B"], 8, 512, checkpointing=False)
assert sum(keeps.values()) == kept_for_backward(setting)
print(f"{sum(keeps.values()):,} bytes a token and block")
""")
md(r"""
For 32 blocks and 4,096 tokens that is 22.8 GiB. With checkpointing a block keeps its input only, 2 × hidden bytes a token, 1.00 GiB for all 32. The last norm keeps 0.12.
So inputs of 1.12 GiB wait. There are 131 million logits. Then there are five moments at which a step may hold most:

1. **End of forward: 2.35.** The inputs, and 10 bytes a logit: 2 as they come, 4 in 32 bits, 4 for their log-softmax. 1.12 + 1.22.
2. **Start of backward: 2.59.** The inputs, and 12 bytes a logit: the log-softmax, its gradient and the logits' gradient, 4 each. 1.12 + 1.46.
3. **Last block: 2.1 to 2.2.** The logits are gone. The blocks' inputs, 1.00, and this block made again, 0.71. What backward makes there comes and goes. A method that keeps
   gradients has two large ones.
4. **First block: 0.7 and more.** One block made again. A method that keeps gradients has those of all other blocks, 12.01.
5. **Update.** A method that keeps gradients has them all, 12.55. One weight at a time needs two tensors in 32 bits: 0.98 for the largest, the head. LOMO updates the head
   first, while the inputs still wait: 1.12 + 0.98.

The head has as many numbers as there are logits here, 131 million, since 8 × 512 tokens happen to be the hidden size. So do not take one 0.98 for the other:
""")
code(
    r"""
# @title Library: parameters, states and gradients; the moments
# tuning/memory.py
def held_all_along(setting):
    shape, method = setting.shape, setting.method
    if not setting.full:
        return held_with_few_trained(setting)
    tables = 1 if shape.tied else 2
    numbers = shape.layers * shape.weights + tables * shape.head + shape.norms
    sides = tables * (shape.vocabulary + shape.hidden)
    sides += shape.layers * shape.sides
    states = {
        "AdamW": 12 * numbers,  # master weight and two averages, in float32
        "AdamW, 16-bit": 4 * numbers,
        "SGD": 4 * numbers,  # master weight
        "LOMO": 0,
        "AdaLomo": 4 * (sides + shape.norms),  # a number a row, and a column
    }
    gradients = 0 if setting.fused else 2 * numbers
    return 2 * numbers, states[method], gradients


def moments(setting):
    kept, logits = kept_by_all(setting), setting.logits
    gradients = held_all_along(setting)[2]
    casts = gradients // 2 if setting.autocast and setting.checkpointing else 0
    activations, temporary = made_of_logits(setting)
    update = made_by_update(setting, largest_weight(setting))
    at_update = kept if setting.fused else 0  # begins with the head
    if setting.full and setting.shape.tied:  # or waits for the embedding:
        update = max(update, 4 * setting.shape.head)  # two parts, and their sum
        at_update = 0
    return {  # logits in 16 bits, in 32, and their log-softmax
        "end of forward": (0, kept + casts + 10 * logits, 0),
        "start of backward": (0, kept + activations, temporary),
        **inside_blocks(setting),
        "update": (gradients, at_update, update),
    }


def plan(setting):
    parameters, states, _ = held_all_along(setting)
    peak = max(moments(setting).values(), key=sum)
    return dict(zip(CATEGORIES, (parameters, states, *peak), strict=True))
""",
    "hide-input",
)
code(r"""
from tuning.memory import moments, plan

adamw = Setting("AdamW", MODELS["7B"], 8, 512, checkpointing=True)
kinds = ("gradients", "activations", "temporary")
for setting in (adamw, lomo):
    parts = pd.DataFrame(moments(setting), index=kinds).T / GiB
    parts["together"] = parts.sum(axis=1)
    print(setting.method, parts.round(2).to_string(), sep="\n")
""")
md(r"""
AdamW's peak is its update. No smaller batch helps there. LOMO's is the start of backward, and there it helps: 2.59 on 12.55 of parameters makes the 15.14
of the simulation.

On a GPU, an NVIDIA H200, four methods were measured at this setting: 101.4 GiB for AdamW, 50.8 for SGD, 15.2 for LOMO and 15.7 for AdaLomo. The plan is within
1 % of each, and of each simulation of eight methods and seven models [[note 4]](#notes). The other bars have not been measured. What torch had *taken* from the card
was 5 to 9 % more.
""")
code(
    r"""
# @title ✓ Within 1 % of each simulation and of each measurement
for key, found in load_results("lomo_memory")["results"].items():
    name, method, how, size = key.split("/")
    if "," in how or name not in MODELS:
        continue  # of the paper's table
    batch, length = map(int, size.split("x"))
    setting = Setting(
        method, MODELS[name], batch, length, how.startswith("with ")
    )
    off = sum(plan(setting).values()) / sum(found["peak"].values()) - 1
    assert abs(off) < 0.01
for method in ("AdamW", "SGD", "LOMO", "AdaLomo"):
    setting = Setting(method, MODELS["7B"], 8, 512)
    found = load_results("lomo_memory_measured")["results"][f"7B/{method}"]
    assert abs(sum(plan(setting).values()) / found["peak_bytes"] - 1) < 0.01
    assert 1.045 < found["reserved_bytes"] / found["peak_bytes"] < 1.095
print("within 1 % of each simulation and of each measurement")
""",
    "hide-cell",
)
md(r"""
One bar of the chart may have surprised you. LoRA of rank 8 trains 0.3 % of the numbers, and holds as much as LOMO, which trains all. Both hold the
model in 16 bits, and neither holds gradients or states to speak of. Only fewer bits bring the model itself below that on the card: QLoRA.

## At work

- `torch.cuda.max_memory_allocated()` is what tensors held at the peak: our number, and what kernels used inside. `torch.cuda.max_memory_reserved()` is what torch took
  from the card for them. A card with room for that and half a GiB for CUDA itself is safe.
- `torch.cuda.memory._record_memory_history()` and `_dump_snapshot("step.pickle")` record each allocation with the line of
  code that made it; drop the file on pytorch.org/memory_viz.
- torch's own `torch.distributed._tools.mem_tracker.MemTracker` counts by category as ours does. Ours has a timeline.
- transformers checkpoints by `model.gradient_checkpointing_enable()`.
- Out of memory? Ask at which moment. In forward or at backward's start, take a smaller batch, checkpointing, or chunked logits. You can make up for a smaller
  batch by accumulation; then gradients wait through the next forward. LOMO keeps no gradients, so it cannot accumulate. Later in backward, or at the
  update, none of these helps much: say `fused=True`, take 8-bit states, or a method with fewer bytes.
- torch keeps free blocks for later, and gaps grow where lengths vary. `PYTORCH_ALLOC_CONF=expandable_segments:True` makes them smaller; before torch 2.9 it was
  `PYTORCH_CUDA_ALLOC_CONF`.

## Pitfalls

**Keep losses as numbers, and evaluate under `no_grad`.** A loss is a tensor with its graph behind it. `backward` frees that
graph. But an evaluation never calls `backward`, so each loss in your list keeps the graph of its batch. A number keeps nothing. And under `no_grad` no
graph is made in the first place.
""")
code(r"""
alive = {}
for keep in ("tensors", "numbers"):
    losses = []
    with LiveBytes(blocks) as live:
        for _ in range(3):
            loss = blocks(h).square().mean()
            losses.append(loss if keep == "tensors" else loss.item())
            del loss
        alive[keep] = live.live["activations"] / 2**20
print({name: f"{size:.1f} MiB" for name, size in alive.items()})
""")
md(r"""
**Switch the model to training before you trust checkpointing.** `from_pretrained` gives models in evaluation mode, and such a
model does not checkpoint.
""")
code(
    r"""
checkpoint_activations(model)
for mode in (True, False):
    model.train(mode)
    most[mode] = most_activations(model)
    print(f"training {mode}: {most[mode]:.0f} MiB")
assert most[True] < most[False] / 2
""",
    "nbval-ignore-output",
)
md(r"""
**Set gradients to None.** `zero_grad()` does so. `zero_grad(set_to_none=False)`, which older code asks for, writes zeros and keeps
the memory.

## Yours

Give the folder or the hub id of a model of the kind of Llama, Mistral or Qwen. The cell prints what a step of 2,048 tokens holds, by method. As long as `MINE` is
None, it takes Llama-3.2-1B:
""")
code(r"""
MINE = None  # e.g. "Qwen/Qwen3-8B", or a folder with a config.json
shape = MODELS["Llama-3.2-1B"]
if MINE:
    shape = shape_of(AutoConfig.from_pretrained(MINE))
for method in METHODS:
    peak = sum(plan(Setting(method, shape, 1, 2048, rank=8)).values()) / GiB
    print(f"{method:14} {peak:6.1f} GiB")
""")
md(r"""
Here QLoRA saves little. This small model has a large vocabulary, 128,256 tokens, so the logits are most of its step.

## Exercises

Each has a [solution](solutions/11-where-the-memory-goes.ipynb).

1. **By hand** (easy, 15 minutes). SmolLM2 has 134,515,008 parameters. How many GiB of parameters, gradients and states are
   there with AdamW in float32, with SGD with momentum (one average), and with AdamW on adapters of rank 8, which have
   2,442,240 numbers? Check the last with `watch` and `add_lora` from `tuning.lora`.
2. **Where activations overtake** (easy, 20 minutes). Draw the plan of LOMO at 7B and 512 tokens over batches of 1 to 64, with
   and without checkpointing. From which batch on do activations and temporary bytes exceed the parameters? At which batch
   does it reach 24 GiB?
3. **Every second block** (medium, 30 minutes). Checkpoint `blocks` in segments: first pairs, then four, then all eight. What is kept after forward, and what is
   the most during backward? Which number of blocks to a segment is best for 8 blocks, and for 32? Chen et al. (2016) say the square root of their
   number. Why not here?
4. **Small batches, added up** (medium, 30 minutes). Take SmolLM2, AdamW and eight rows of 64 tokens. Call `backward` on one row after the other before one step, each loss
   divided by eight. Which category changes, and which does not? Where is the peak? Do the gradients agree?
5. **Eight-bit states** (hard, 40 minutes). bitsandbytes' AdamW8bit keeps its averages in 8 bits, with a float32 scale for each
   256 numbers. Weights below 4,096 numbers keep 32 bits; two tables of 256 float32 numbers are shared by all. Write
   `eight_bit_states(shapes)`; `check_eight_bit_states(eight_bit_states)` from `tuning.checks` tests it. Compare with a watched
   `AdamW8bit` on `blocks`.

## What to remember

- A step holds parameters, states, gradients and activations. The first three are multiples of the number of weights;
  activations grow with tokens.
- AdamW with master weights takes sixteen bytes a weight, as in float32. Mixed precision saves time, and part of the activations.
- Checkpointing keeps a block's input and pays with one more forward at most. Logits can be made in chunks.
- The peak is a moment, not a sum of maxima. Ask which one before you choose what to save.
- Count before you rent a card. Then leave an eighth of it free.

## Notes

1. What checkpointing makes again in backward counts as an activation too, since gradients are recorded there. `LiveBytes` sees what operations return, not what
   a kernel takes and gives back inside. It does not disturb what it watches: by torch's profiler, the sum of the table's two gradients is a tensor of its
   own also when nobody watches ([laboratory 11](lab/11-where-the-memory-goes.ipynb)).
2. Our lines have gaps that torch's closes. Dropout would draw other numbers the second time, unless the generator's state
   is put back. And the block's input must require a gradient, or autograd never calls backward. Where weights are frozen,
   backward is about one forward of work, so two become three.
3. The paper's row adds up categories, each at its largest; ours is one moment. Its 0.24 GiB of gradients are one tensor, the largest gradient, 32,000 × 4,096
   numbers of 16 bits. Without checkpointing it has 45.6 GiB of activations, where today's code keeps 23.4. Its authors measured what is there after
   forward minus what was before. With attention as Hugging Face's LLaMA had it in 2023, and other things of that year as we remember them,
   a simulation has 43.4. The rest we could not find. [Laboratory 11](lab/11-where-the-memory-goes.ipynb) counts it by hand.
4. [Laboratory 11](lab/11-where-the-memory-goes.ipynb) has the table. "AdamW" in this chapter is the loop with master weights; "AdamW, 16-bit" is torch's own, fused. Attention is
   torch's `scaled_dot_product_attention`. Written out, it keeps the scores, which grow with the square of the length. The plan has no accumulation, no offloading
   and one device.

**Sources.** [Lv et al. 2023](https://arxiv.org/abs/2306.09782) (LOMO, table 1); [Chen et al. 2016](https://arxiv.org/abs/1604.06174) (checkpointing);
[Micikevicius et al. 2018](https://arxiv.org/abs/1710.03740) (mixed precision);
[Touvron et al. 2023](https://arxiv.org/abs/2302.13971) (LLaMA's shapes);
[torch: fake tensors](https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html).
""")
if __name__ == "__main__":
    nbformat.write(
        new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        ),
        sys.argv[1],
    )
