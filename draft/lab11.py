"""Builds book/4-lomo/lab/11-where-the-memory-goes.ipynb."""

import sys
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

cells = []


def md(text):
    cells.append(new_markdown_cell(text.strip("\n")))


def code(text, *tags):
    cells.append(new_code_cell(text.strip("\n"), metadata={"tags": list(tags)} if tags else {}))


md(r"""
# Laboratory 11: where the memory goes

*What does `foreach` take, what do blocks and adapters keep, and how did the LOMO paper measure?*

These are the controls and counts behind [chapter 11](../11-where-the-memory-goes.ipynb). Take what interests you; the sections
stand alone.
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
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from tuning.experiments.record import load_results, provenance_line
from tuning.lora import add_lora
from tuning.memory import MODELS, LiveBytes, Setting, Shape, plan
from tuning.simulate import untrained

GiB = 2**30
""",
    "hide-cell",
)
md(r"""
## One weight after the other, or all at once

torch's AdamW has three ways. `foreach=False` updates one weight after the other. `foreach=True`, the default on a GPU, takes
all weights in each operation, and its temporary tensors are those of all weights. `fused=True` computes in one kernel and
makes none. A step with a model of four layers of LLaMA-7B, from fake tensors, all in 16 bits:
""")
code(
    r"""
rows = {}
for name in ("one by one", "foreach", "fused"):
    how = {"foreach": name == "foreach"} if name != "fused" else {"fused": True}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = untrained(Shape(4096, 11008, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **how)
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        with LiveBytes(model, optimizer) as live:
            optimizer.step()
    rows[name] = live.largest
table = pd.DataFrame(rows).T.div(GiB)[["parameters", "optimizer states", "temporary"]]
print(table.round(2).to_string())
assert table["temporary"]["foreach"] > 0.9 * table["parameters"]["foreach"]
assert table["temporary"]["fused"] < 0.01
""",
    "nbval-ignore-output",
)
md(r"""
`foreach` takes as much again as the weights. For 7B in 16 bits that is 12.5 GiB, at the moment when all gradients are there.
So on a card that is nearly full, say `fused=True`.

## Does the watcher disturb?

`LiveBytes` is a dispatch mode, and a mode may change what torch does. One case matters for the page's timeline: two gradients of one weight are added,
and torch can do so in place where nobody else holds the first. torch's profiler tells what happens unwatched:
""")
code(r"""
from torch import nn
from torch.profiler import ProfilerActivity, profile

table = nn.Parameter(torch.randn(1100, 50))  # a model's first and last layer
states = nn.functional.embedding(torch.arange(6), table)
loss = nn.functional.linear(states, table).logsumexp(-1).sum()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
    loss.backward()
sums = [e for e in seen.events() if e.name.startswith("aten::add")]
for event in sums:
    print(f"{event.name}: {event.cpu_memory_usage:,} new bytes")
assert [event.cpu_memory_usage for event in sums] == [4 * 1100 * 50]
""")
md(r"""
The sum is a new tensor of the table's size, as the watcher has it.

## What a block keeps of each token

The plan needs it, and it can be counted by hand. For
LLaMA-7B the hidden size is 4,096, the MLP's inner size 11,008, and queries, keys and values are 4,096 wide.

| what | bytes a token | why |
| --- | --- | --- |
| two norms | 8 × hidden | they compute in 32 bits, and keep their inputs in 32 bits |
| attention | 2 × (2 queries + keys + values), 4 a head | with its output, as wide as the queries |
| MLP | 6 × inner | the gate, its SiLU, the other branch |
| what is trained | 8 × hidden + 2 × inner | inputs of the linear layers, results of the norms |
""")
code(r"""
# tuning/memory.py
def kept_for_backward(setting):
    shape, width = setting.shape, 4 if setting.method == "QLoRA" else 2
    queries, keys = shape.linear[0][1], shape.linear[1][1]  # how wide
    normalized = 2 * shape.hidden + (queries + keys if shape.qk_norms else 0)
    norms = 4 * normalized  # what goes in, in float32
    attention = 2 * (queries + 2 * keys) + 2 * queries  # and what comes out
    attention += 4 * shape.heads  # a sum for each head, of the softmax
    mlp = width * 3 * shape.inner  # gate, its SiLU, up
    return norms + attention + mlp + kept_to_train(setting, normalized)
""")
code(
    r"""
# @title Library: what a layer keeps for what is trained in it
# tuning/memory.py
def kept_to_train(setting, normalized):
    shape = setting.shape
    shared = 2 * (2 * shape.hidden + shape.inner)  # norms' results; down's
    inner = 7 * setting.rank  # what the adapters' first matrices give
    if setting.method == "P-tuning":
        return 0
    if setting.full:
        return shared + 2 * normalized  # each norm's result, before its weight
    if setting.adapters in ("float32", "bfloat16") and not setting.autocast:
        return shared + (4 if setting.adapters == "float32" else 2) * inner
    own = sum(rows for rows, _ in shape.linear)  # each adapter copies its input
    return (2 if setting.autocast else 4) * (own + inner)
""",
    "hide-input",
)
code(r"""
from tuning.memory import kept_for_backward

full = Setting("AdamW", MODELS["7B"], batch=8, length=512)
parts = [8 * 4096, 2 * 4 * 4096 + 4 * 32, 6 * 11008, 8 * 4096 + 2 * 11008]
assert sum(parts) == kept_for_backward(full)
print(f"{parts}, together {sum(parts):,} bytes a token")
""")
md(r"""
## What an adapter keeps

Full fine-tuning keeps the input of each linear layer, in 16 bits. A frozen layer needs none. But an adapter does. peft's
adapters are in float32 over a model in 16 bits, and each keeps a float32 copy of its input, also where queries, keys and
values read the same one. This book's keeps the input as it came, and widens it again in backward: the same numbers, bit for
bit.
""")
code(r"""
def saved(model, layers):
    # Bytes that autograd saves in a forward pass of 32 tokens, but weights.
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False).logits.sum()
    return sum(size for key, size in sizes.items() if key not in weights)


def with_peft(model):
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model.enable_input_require_grads()
    return get_peft_model(model, config)


def with_ours(model):
    add_lora(model, rank=8, alpha=16)
    model.enable_input_require_grads()
    return model


ways = {"all weights": lambda model: model, "peft": with_peft, "ours": with_ours}
kept = {}
for name, ready in ways.items():
    one, three = (
        saved(ready(untrained(Shape(512, 1376, layers))), layers)
        for layers in (1, 3)
    )
    kept[name] = (three - one) / 2 / 32
for name, size in kept.items():
    print(f"{name:12} {size:,.0f} bytes a layer and token: ", end="")
    print(f"{size / kept['all weights']:.2f}")
""")
code(
    r"""
# @title ✓ As the plan says
settings = {
    "all weights": ("SGD", "float32"),
    "peft": ("LoRA", "copies"),
    "ours": ("LoRA", "float32"),
}
for name, (method, adapters) in settings.items():
    setting = Setting(
        method, Shape(512, 1376, 1), 2, 16, rank=8, adapters=adapters
    )
    assert abs(kept_for_backward(setting) / kept[name] - 1) < 0.01
print("as the plan says")
""",
    "hide-cell",
)
md(r"""
So LoRA need not keep more than full fine-tuning. It matters without checkpointing: with it, one layer at a time keeps all this.

## How far the plan is from simulations

Each number is the worst of three settings: 8 sequences of 512 tokens with and without checkpointing, and 2,048 tokens with it.
""")
code(
    r"""
# @title Table: the plan beside simulations
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
print("off by, % (adapters of rank 64)")
print(table.to_string(float_format="{:.2f}".format))
""",
    "hide-input",
)
md(r"""
The plan has no fitted number. QLoRA is furthest, since its kernels' own temporary tensors are planned by their sizes alone.

## Table 1, as its authors measured

The LOMO paper says how much memory activations take. Its authors told how they measured: what is there after forward, less what
was there before. So we simulate that, with the code of today and with that of 2023.
""")
code(
    r"""
# @title Table: activations of LLaMA-7B, forward minus before
recorded = load_results("lomo_memory")
print(provenance_line(recorded))
runs = recorded["results"]
KEYS = {
    "today": "7B/LOMO/{} checkpointing/8x512",
    "today, eager attention": "7B/LOMO/eager, {} checkpointing/8x512",
    "2023": "7B/LOMO/2023, {} checkpointing/8x512",
}
rows = {
    name: {
        how: runs[key.format(how)]["forward minus before"] / GiB
        for how in ("without", "with")
    }
    for name, key in KEYS.items()
}
rows["the paper"] = {"without": 45.61, "with": 1.79}
print(pd.DataFrame(rows).T.round(2).to_string())
""",
    "hide-input",
)
md(r"""
By hand, a layer of 2023's code keeps of each token, with $h$ the hidden size, $m$ the inner size and $s$ the scores of a token,
heads × length:

- norms: $20h$ bytes, the input in 32 bits and in 16, the result before its weight and after, for two norms;
- queries, keys, values and attention's output: $8h$;
- a cache of keys and values, which training does not need: $4h$;
- scores: $8s$, 2 before they are kept above the lowest number, 4 as a softmax in 32 bits, 2 in 16;
- the MLP: $8m$.

What is left of the paper's figure, 2.2 GiB, is 5 %. Its totals without checkpointing are each 1.00 GiB more than their parts,
so one of the two figures is not what the other says.
""")
code(
    r"""
# @title Table: simulated beside the paper's table 1, GiB
PAPER = {
    "AdamW": {"with": 102.20, "without": 147.02},
    "SGD": {"with": 51.99, "without": 96.81},
    "LOMO": {"with": 14.58, "without": 59.40},
}
rows = {}
for method, totals in PAPER.items():
    for how, total in totals.items():
        peak = runs[f"7B/{method}/{how} checkpointing/8x512"]["peak"]
        row = {part: size / GiB for part, size in peak.items()}
        row |= {"together": sum(row.values()), "the paper": total}
        rows[f"{method}, {how}"] = row
table = pd.DataFrame(rows).T.rename(columns={"optimizer states": "states"})
print(table.round(2).to_string())
""",
    "hide-input",
)
md(r"""
With checkpointing we are within 4 % of the paper's totals. The columns mean something else, though: the paper adds up its
parts, ours is what is alive at one moment. For AdamW and SGD that is the update, when hardly an activation is left. For LOMO
it is the start of backward, when three numbers of 32 bits are alive for each logit.

**Sources.** [Lv et al. 2023](https://arxiv.org/abs/2306.09782) (table 1; issues 36 and 80 of
[their repository](https://github.com/OpenLMLab/LOMO) say how it was measured).
""")
if __name__ == "__main__":
    nbformat.write(
        new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        ),
        sys.argv[1],
    )
