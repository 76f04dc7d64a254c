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
    [*METHODS, "LoRA, peft's"],
):
    if rank == 64 and "LoRA" not in method:
        continue  # it has no rank
    setting = Setting(
        method.partition(", peft")[0],
        MODELS[name],
        batch,
        length,
        checkpointing,
        rank=rank,
        adapters="copies" if "peft" in method else "float32",
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
Each bar is one training step, at the moment when it holds most. The lines are cards; a diamond was measured on a GPU. Take
LLaMA-7B with 8 sequences of 512 tokens. AdamW holds 101 GiB: eight times the file. LOMO trains the same weights with 15.
*Which bars does your card hold?* Leave a tenth of it free.

A file's GB are 10⁹ bytes, so 13.5 GB are 12.6 GiB. A card's GB are GiB, or nearly.

The bars are arithmetic on the model's shape. In this chapter you find out what they count, watch a real step do it, and
see both agree.

*You need [chapter 1](../1-prompts/1-two-ways.ipynb)'s loop. A minute and 3.4 GB on two cores; 40 minutes of reading.*
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
`tree_leaves` finds the tensors in whatever an operation gave back:
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

`weakref.finalize` calls a function when its object dies: that is the whole trick. The library's `LiveBytes` is this
watcher with an account for each of our four kinds, and a fifth: **temporary**, what backward and the optimizer compute
with for a moment. How does it tell them apart? What an operation makes while gradients are recorded is an activation; the rest is
temporary, until a hook on a weight says that this is its gradient, or the optimizer has it as a state [[note 4]](#notes).

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
    f"The peak, {sum(peak.values()):.1f} GiB, is near the end of backward",
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
place = max(range(len(live.timeline)), key=lambda i: sum(live.timeline[i]))
top = sum(peak.values())
axes.vlines(place, sum(live.timeline[place - 40]) / GiB, top, color=COLORS[5])
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
    "rise until backward begins and fall in it, gradients take their place, and a spike near the end of backward is "
    "the peak.",
)
code(
    r"""
# @title ✓ Parameters once, states twice, and the peak is late in backward
number = 4 * model.num_parameters() / GiB
assert abs(peak["parameters"] / number - 1) < 0.01
assert abs(peak["optimizer states"] / number - 2) < 0.01
begins = {text: place for place, text in live.notes.items()}
assert begins["backward"] < place <= begins["update"]
print("parameters once, states twice, and the peak is late in backward")
""",
    "hide-cell",
)
md(r"""
Read it from below. Parameters and states never move. Activations rise through forward. In backward they go, layer by
layer, and gradients take their place.

The peak is a spike at the end of backward. This model uses one table as its first and as its last layer, so the table's gradient
comes in two parts. The last layer's part has waited since backward began: the band on top. Now the first layer's comes, and
their sum. Three times 0.11 GiB are there for a moment, and count as temporary until the sum is the gradient.

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
part = 4 * 20e6 / 6.738e9  # rank 8 has 20 million numbers
recipes = {  # weight, gradient, master weight, averages
    "AdamW, float32": (4, 4, 0, 8),
    "AdamW, mixed precision": (2, 2, 4, 8),
    "AdamW, all in 16 bits": (2, 2, 0, 4),
    "SGD, mixed precision": (2, 2, 4, 0),
    "SGD, all in 16 bits": (2, 2, 0, 0),
    "LOMO, 16 bits": (2, 0, 0, 0),
    "LoRA, rank 8, float32 over 16 bits": (2 + part, part, 0, 2 * part),
    "QLoRA, rank 8, over 4 bits": (0.52 + part, part, 0, 2 * part),
}
names = ["weight", "gradient", "master", "averages"]
table = pd.DataFrame(recipes, index=names).T
table.insert(0, "bytes", table.sum(axis=1))
table.insert(1, "7B, GiB", (table["bytes"] * 6.738e9 / GiB).round(1))
table.round(2)
""",
    "hide-input",
)
md(r"""
The master weights stand among the optimizer's states in the chart: that is SGD's orange bar.

Two rows surprise. Mixed precision saves AdamW nothing here: sixteen bytes, as in float32. What it saves is time, and a good part of
the activations. And AdamW all in 16 bits takes eight bytes. That is what `torch.optim.AdamW` does if you give it a model in 16
bits: its averages have the weights' format, there are no master weights, and small updates are lost. LOMO in 16 bits loses them
too; chapter 12 comes back to it. So when a table says AdamW, ask whose [[note 1]](#notes).
""")
md(r"""
## Keep less: checkpointing

Parameters stand still; activations grow with every token. **Activation checkpointing** keeps only a block's input, and
computes the block once more when backward comes to it:
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
A block makes 2, 2 and 0.5 MiB; eight blocks make 36. With checkpointing only the results of 0.5 are kept, 4 MiB. Ours count as temporary,
since no gradients are recorded where they are made. And the gradients are the same [[note 2]](#notes). The price is a second forward. A step is
about three forwards of work, one for forward and two for backward, so three become four at most.

On the real model:
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
What is left? Not the layers' inputs: 30 layers × 256 tokens × 576 numbers are 17 MiB. It is the **logits**. 256 tokens
times a vocabulary of 49,152 are 48 MiB, and again for their softmax. So do them in pieces, and make each piece again
in backward:
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
What is left now are the layers' inputs, one layer made again, and the logits of 64 tokens. The larger the vocabulary, the more this
matters: Llama 3 has 128,256 tokens in it. Large trainers have kernels for it.

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
# @title ✓ As the plan has it, to 1 %
assert abs(sum(plan(lomo).values()) / sum(live.peak.values()) - 1) < 0.01
print("as the plan has it, to 1 %")
""",
    "hide-cell",
)
md(r"""
The LOMO paper's table 1 has 14.58 GiB for this step, and 102.2 for AdamW's, where ours holds 101.4. Its LOMO row has 0.24 GiB of
gradients: that is one tensor, the largest gradient, 32,000 × 4,096 numbers of 16 bits. Ours is larger, since at its peak the logits
stand there three times in 32 bits, and no gradient of a weight is there yet [[note 3]](#notes).

## The plan: at which moment?

A simulation takes a quarter of a minute. Arithmetic takes none, and it says why. First: what does a layer keep of each token? Inputs of
its linear layers and norms, queries, keys and values, and the parts of its MLP. [Laboratory 11](lab/11-where-the-memory-goes.ipynb) counts them one
by one, and `kept_for_backward` adds them up:
""")
code(r"""
full = Setting("AdamW", MODELS["7B"], batch=8, length=512, checkpointing=False)
token = kept_for_backward(full)
layers = 32 * full.tokens * token / GiB
print(f"{token:,} bytes a token and layer; all kept {layers:.1f} GiB")
""")
md(r"""
With checkpointing a layer keeps its input only, 2 × hidden bytes a token. All 32 keep 1.00 GiB, and the last norm 0.12. The step has
131 million logits. Then five moments may hold most, beside parameters and states:

1. **End of forward.** What is kept, and 10 bytes a logit: in 16 bits, in 32, and as log-softmax. 1.12 + 1.22.
2. **Start of backward.** What is kept, and 12 bytes a logit: log-softmax, its gradient, the logits' gradient. 1.12 + 1.46.
3. **Last layer.** The inputs of all layers, and this one made again: 186,496 bytes a token, and more that comes and goes.
4. **First layer.** One layer made again. If the method keeps gradients, those of all other layers are there.
5. **Update.** All gradients, if the method keeps them, and for one weight at a time two copies in 32 bits: 12.55 + 0.98. LOMO updates
   the last layer's weight first, when all inputs are still there: 1.12 + 0.98.
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
        **inside_layers(setting),
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

adamw = Setting("AdamW", MODELS["7B"], batch=8, length=512, checkpointing=True)
table = {
    setting.method: {
        name: sum(parts) / GiB for name, parts in moments(setting).items()
    }
    for setting in (adamw, lomo)
}
print(pd.DataFrame(table).round(2).to_string())
""")
md(r"""
AdamW's peak is its update: 13.53, on 12.55 of parameters and 75.31 of states. LOMO's is the start of backward: 2.59 on 12.55, which makes the
15.14 of the simulation. No smaller batch helps AdamW here. It would help LOMO. A model with one table at both ends, as SmolLM2, may peak
just before its update, as we saw: the plan counts that as part of the fifth.

How far is the plan from simulations of other models?
""")
code(
    r"""
# @title Table: the plan beside simulations, and beside a GPU
rows = {}
for key, found in load_results("lomo_memory")["results"].items():
    name, method, how, size = key.split("/")
    if "," in how or name not in MODELS:
        continue  # of table 1, or nobody's model
    batch, length = map(int, size.split("x"))
    setting = Setting(
        method, MODELS[name], batch, length, how.startswith("with ")
    )
    off = sum(plan(setting).values()) / sum(found["peak"].values()) - 1
    rows.setdefault(method, {}).setdefault(name, []).append(100 * abs(off))
table = pd.DataFrame(rows).T.map(max)
print("off by, %; the worst of three: 8 × 512 tokens with and without")
print("checkpointing, 2,048 tokens with it (adapters of rank 64)")
print(table.to_string(float_format="{:.2f}".format))
""",
    "hide-input",
)
code(
    r"""
# @title ✓ Within 1 % of each simulation and of each measurement
assert table.max().max() < 1
for method in ("AdamW", "SGD", "LOMO", "AdaLomo"):
    setting = Setting(method, MODELS["7B"], 8, 512)
    found = load_results("lomo_memory_measured")["results"][f"7B/{method}"]
    assert abs(sum(plan(setting).values()) / found["peak_bytes"] - 1) < 0.01
    assert 1.04 < found["reserved_bytes"] / found["peak_bytes"] < 1.1
print("within 1 % of each simulation and of each measurement")
""",
    "hide-cell",
)
md(r"""
On a GPU, an NVIDIA H200, four steps of 7B were measured: 101.4 GiB for AdamW, 50.8 for SGD, 15.2 for LOMO and 15.7 for
AdaLomo. The plan is within 1 % of each. What torch had *taken* from the card was 5 to 9 % more, for the gaps between tensors.

One bar of the chart may have surprised you. LoRA of rank 8 trains 0.3 % of the numbers, and holds as much as LOMO, which trains all. Both hold the
model in 16 bits, and neither holds gradients or states to speak of. Below that only fewer bits help: QLoRA. P-tuning's states are its
encoder's, which is large at this width and is thrown away after training.

## At work

- `torch.cuda.max_memory_allocated()` is what tensors held at the peak: our number. `torch.cuda.max_memory_reserved()` is what torch took
  from the card for them, with the gaps between. What your card must have is the second, and half a GiB for CUDA itself.
- `torch.cuda.memory._record_memory_history()` and `_dump_snapshot("step.pickle")` record each allocation with the line of
  code that made it; drop the file on pytorch.org/memory_viz.
- torch's own `torch.distributed._tools.mem_tracker.MemTracker` counts by category as ours does. Ours has a timeline.
- Out of memory? Ask at which moment. In forward, in backward's start or in a layer, a smaller batch with accumulation helps,
  checkpointing, or chunked logits. At the update none of these does: take 8-bit states, or a method with fewer bytes.
- Gaps grow where lengths vary. `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` makes them smaller.

## Pitfalls

**Evaluate under `no_grad`, or keep losses as numbers.** A loss is a tensor with its graph behind it. `backward` lets go of the graph; an
evaluation calls none, so a list of losses keeps every batch:
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

Give the folder or the hub id of a model of the kind of Llama, Mistral or Qwen. It prints what a step of 2,048 tokens holds.
""")
code(r"""
MINE = None  # e.g. "Qwen/Qwen3-8B", or a folder with a config.json
if MINE:
    shape = shape_of(AutoConfig.from_pretrained(MINE))
    for method in METHODS:
        peak = sum(plan(Setting(method, shape, 1, 2048)).values()) / GiB
        print(f"{method:14} {peak:6.1f} GiB")
""")
md(r"""
## Exercises

Each has a [solution](solutions/11-where-the-memory-goes.ipynb).

1. **By hand** (easy, 15 minutes). SmolLM2 has 134,515,008 parameters. How many GiB of parameters, gradients and states are
   there with AdamW in float32, with SGD with momentum (one average), and with AdamW on adapters of rank 8, which have
   2,442,240 numbers? Check the last with `watch` and `add_lora` from `tuning.lora`.
2. **Where activations overtake** (easy, 20 minutes). Draw the plan of LOMO at 7B and 512 tokens over batches of 1 to 64, with
   and without checkpointing. From which batch on do activations and temporary bytes exceed the parameters? At which batch
   does it reach 24 GiB?
3. **Every second layer** (medium, 30 minutes). Checkpoint pairs of `blocks`. What is kept after forward, and what is the most
   during backward? Which number of blocks to a segment is best for 8 blocks, and for 32? Chen et al. say the square root.
   Why not here?
4. **Small batches, added up** (medium, 30 minutes). Call `backward` on eight parts of a batch before one step, each loss
   divided by eight. Which category changes, and which does not? Do the gradients agree?
5. **Eight-bit states** (hard, 40 minutes). bitsandbytes' AdamW8bit keeps its averages in 8 bits, with a float32 scale for each
   256 numbers. Weights below 4,096 numbers keep 32 bits; two tables of 256 float32 numbers are shared by all. Write
   `eight_bit_states(shapes)`; `check_eight_bit_states(eight_bit_states)` from `tuning.checks` tests it. Compare with a watched
   `AdamW8bit` on `blocks`.

## What to remember

- A step holds parameters, states, gradients and activations. The first three are multiples of the number of weights;
  activations grow with tokens.
- AdamW in mixed precision takes sixteen bytes a weight, as in float32. It saves time, and part of the activations.
- Checkpointing keeps a layer's input and pays with one more forward at most. Logits can be made in chunks.
- The peak is a moment, not a sum of maxima. Ask which one before you choose what to save.
- Count before you rent a card. Then add a tenth, for the gaps.

## Notes

1. Table 1 of the LOMO paper, and "AdamW" in this chapter, is mixed precision with weights in 16 bits and master weights: a loop of this
   book. "AdamW, 16-bit" is torch's own, fused. torch's default on a GPU is `foreach`, which updates all weights at once, with temporary
   copies of all: [laboratory 11](lab/11-where-the-memory-goes.ipynb) watches it. torch's autocast is another mixed precision: weights
   and gradients stay in 32 bits, and 16-bit copies of the weights come on top.
2. Our lines have gaps that torch's closes. Dropout would draw other numbers the second time, unless the generator's state
   is put back. And the block's input must require a gradient, or autograd never calls backward. Where weights are frozen,
   backward is about one forward of work, so two become three.
3. Without checkpointing the paper has 45.6 GiB of activations, where today's code keeps 23.4. Its authors measured what is there after
   forward minus what was before. With attention as Hugging Face's LLaMA had it in 2023, and other things of that year as we remember them,
   a simulation has 43.4. The rest we could not find. [Laboratory 11](lab/11-where-the-memory-goes.ipynb) counts it by hand.
4. `LiveBytes` sees what operations return, not what a kernel takes and gives back inside. All that is made while gradients are recorded
   counts as an activation. The plan has no accumulation: there, gradients wait through the next forward. Of peft's adapters it knows
   the float32 copies, which matter without checkpointing: [chapter 6](../2-lora/6-lora.ipynb).

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
