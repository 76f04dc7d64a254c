"""Builds book/2-lora/lab/6-lora.ipynb."""

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
# Laboratory 6: LoRA

*How much of a change is needed, what does the scale do as the rank grows, and what is counted?*

These are the controls and counts behind [chapter 6](../6-lora.ipynb). Take what interests you; the sections stand alone.
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
import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tuning.evaluate import difference
from tuning.experiments.record import load_results, provenance_line
from tuning.lora import LoRA
from tuning.models import load_lm
from tuning.plots import figure, panels
from tuning.prompts import encode

model, tokenizer = load_lm(dtype=torch.float32)
""",
    "hide-cell",
)
md(r"""
## The change of full fine-tuning, term by term

All weights were tuned to the country of a city, on three seeds. The **singular value decomposition** writes the change
of each of the 210 linear layers as a sum of simple matrices, the largest first:

$$\Delta W = \sum_i \sigma_i\, u_i v_i^\top, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0.$$

The first $r$ terms are the best matrix of rank $r$, and what they leave out has the squared length
$\sum_{i>r}\sigma_i^2$ (Eckart and Young, 1936). How much do they hold?
""")
code(
    r"""
# @title Figure: share of the squared length, by rank
recorded = load_results("first_directions")
print(provenance_line(recorded))
pieces = recorded["results"]
changes = [pieces[f"change/{seed}"] for seed in range(3)]
held = pd.DataFrame([change["spectrum"]["held"] for change in changes]).mean()
eight, many = held["8"], held["64"]
RANKS = [int(rank) for rank in changes[0]["spectrum"]["held"]]
fig, axes = figure(
    f"Eight terms hold {eight:.0%} of the change, 64 hold {many:.0%}",
    "first r terms of each layer's change",
    "share of squared length",
)
for seed, change in enumerate(changes):
    axes.plot(
        RANKS, list(change["spectrum"]["held"].values()), label=f"seed {seed}"
    )
axes.set(xscale="log", ylim=(0, 1))
axes.set_xticks(RANKS, RANKS)
axes.legend()
plt.show()
terms = [change["spectrum"]["terms for nine tenths"] for change in changes]
print("terms that hold nine tenths: least, median and most of a layer", terms)
""",
    "hide-input",
    alt="Share of the squared length over the first 1 to 64 terms, for three seeds that lie on each other: 0.22, 0.29, 0.37, 0.47, 0.58, 0.79.",
)
md(r"""
The change is not of low rank. The layer in the middle needs about 60 terms for nine tenths, the simplest 9, and one
layer 275. Biderman et al. (2024) count in the same way in larger models, and find ranks ten to a hundred times those
that LoRA usually has. Ours is seven times an adapter's 8.

## Putting parts back

Each row puts one part of the change into the 210 linear layers of the untrained model. Embeddings and norms stay as they
were, so "whole, linear layers" is not quite the tuned model.
""")
code(
    r"""
# @title Table: what each part brings
PARTS = {
    "tuned": "tuned, all weights",
    "linear layers": "whole, linear layers",
    "first 1": "first term",
    "first 8": "first 8 terms",
    "first 64": "first 64 terms",
    "shortened as first 1": "whole, as short as the first term",
    "shortened as first 8": "whole, as short as the first 8",
    "without first 1": "all but the first term",
    "first 1, drawn out": "first term, as long as the whole",
    "without first 8": "all but the first 8",
    "without first 64": "all but the first 64",
    "8 random": "8 random directions",
    "8 random, drawn out": "8 random, as long as the first 8",
    "nothing": "nothing",
}


whole = [change["linear layers"]["hits"] for change in changes]


def line(kind):
    found = [change[kind] for change in changes]
    runs = [piece["hits"] for piece in found]
    right = sum(hits.count("1") for hits in runs) / 3
    continents = sum(piece["continents"].count("1") for piece in found) / 3
    return {
        "right, of 1,064": round(right),
        "beside the whole": difference(runs, whole),
        "continents, of 160": round(continents),
    }


pd.DataFrame({name: line(kind) for kind, name in PARTS.items()}).T
""",
    "hide-input",
)
md(r"""
- **Cities.** The first term alone has 397, and all but the first 410. From the first eight on we see no difference to
  the whole. Nor do we see one for the whole at 47 % or at 69 % of its length. The tuned model itself, embeddings and
  norms included, has 425.
- **Length.** The first term drawn out to the length of the whole falls to 301, below the untrained model, and names one
  continent. The same directions at their own length were nearly enough. So the length alone can ruin what the
  directions do.
- **Continents.** The whole leaves 6 of 106, its first term 22, all but its first term 89. Random directions cost none.
  So most of what is lost hangs on the longest term, and most of what is won does not need it. We have not found out why.

## Pairs that no rank can learn

In the chapter's figure, rank 64 has room for 4,096 pairs many times over, and yet misses six in a hundred. Look at what
enters its layer after the two tokens of each prompt:
""")
code(r"""
torch.manual_seed(0)
ids = torch.randint(20, len(tokenizer), (512, 2))  # two random tokens each
caught = []
layer = model.model.layers[-1].mlp.down_proj
hook = layer.register_forward_pre_hook(
    lambda module, inputs: caught.append(inputs[0][:, -1].cpu())
)
with torch.no_grad():
    for part in ids.split(128):
        model(part.to(model.device), use_cache=False)
hook.remove()
entering = torch.cat(caught)  # (512, in)
inputs = F.normalize(entering)
near = (inputs @ inputs.T).fill_diagonal_(-1).max(dim=1).values
twins = near > 0.999  # some other input has nearly the same direction
norms = entering.norm(dim=1)
print(f"{twins.float().mean():.1%} have a twin, of norm {norms[twins].mean():.0f}")
print(f"the others have a norm of {norms[~twins].mean():.0f}")
assert 0.02 < twins.float().mean() < 0.12
assert norms[twins].mean() > 4 * norms[~twins].mean()
""", "nbval-ignore-output")
md(r"""
At the first token of a text this model puts a state that is huge and always the same, on which attention can rest: an
**attention sink** (Xiao et al., 2023). In these prompts it does so at the second token as well. Then nothing is left
there that would tell one prompt from another.

## What the scale does as the rank grows

How much does the first step change the output when $r$ grows? Two facts are enough. $B$ starts at zero. And each number
of $Ax$ has the same size at every rank. With $g$ the gradient of the output and $s$ the scale:

- **SGD** moves $B$ by $-\eta s\, g (Ax)^\top$. The output moves by $s$ times that, times $Ax$: $-\eta s^2 \lVert Ax\rVert^2 g$.
  $\lVert Ax\rVert^2$ is a sum of $r$ squares, so this grows as $s^2 r$.
- **Adam** moves every number of $B$ by $\eta$, whatever its gradient's size. Output $i$ moves by $s\,\eta$ times a sum of $r$
  terms $\lvert (Ax)_j\rvert$, all of one sign, so this grows as $s\,r$.

For $\alpha/\sqrt r$ the first is level, for $\alpha/r$ the second. We measure it beside a real layer, with the inputs that
it gets from sixteen prompts.
""")
code(r"""
layer = model.model.layers[15].self_attn.q_proj
cities = "Paris Rome Osaka Lima Accra Delhi Oslo Quito Cairo Milan".split()
caught = []
hook = layer.register_forward_hook(
    lambda module, inputs, output: caught.append(inputs[0][0])
)
with torch.no_grad():
    for city in cities:
        ids = encode(tokenizer, "The city of [X] is in the country of [Y].", city)
        model(torch.tensor([ids], device=model.device))
hook.remove()
X = torch.cat(caught).cpu()  # (tokens, in)
torch.manual_seed(0)
wanted = X @ torch.randn(576, 576) / 24  # (tokens, out)
""")
code(
    r"""
def first_step(rank, rslora, optimizer, lr):
    # What an adapter adds after one step, root mean square of eight draws.
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        adapter = LoRA(576, 576, rank, alpha=16, rslora=rslora)
        step = optimizer(adapter.parameters(), lr=lr)
        (adapter(X) - wanted).square().mean().backward()
        step.step()
        found.append(adapter(X).square().mean().sqrt().item())
    return sum(found) / len(found)


RULES = {"α/r": False, "α/√r": True}
OPTIMIZERS = {"SGD": (torch.optim.SGD, 1e-2), "Adam": (torch.optim.Adam, 1e-4)}
ranks = [1, 4, 16, 64, 256]
added = {
    (name, rule): [first_step(rank, rslora, *how) for rank in ranks]
    for name, how in OPTIMIZERS.items()
    for rule, rslora in RULES.items()
}
added = pd.DataFrame(added, index=pd.Index(ranks, name="rank"))
added = added / added.loc[1]
print(added.round(2).to_string())
""",
    "nbval-ignore-output",
)
code(
    r"""
# @title Figure: one step, by rank
fig, axes = panels("After one step α/√r is level with SGD, α/r with Adam", (1, 1))
for ax, name in zip(axes, OPTIMIZERS, strict=True):
    for rule in RULES:
        ax.plot(ranks, added[name, rule], label=rule)
    ax.set(xscale="log", yscale="log", xlabel="rank", title=name, ylim=(1e-3, 30))
axes[0].set_ylabel("added to the output, rank 1 is 1")
axes[0].legend()
plt.show()
""",
    "hide-input",
    "nbval-ignore-output",
    alt="Two panels, what one step adds to the output over the rank. With SGD the scale α over root r is level and α over r "
    "falls to a thousandth; with Adam α over r is level and α over root r grows twelvefold.",
)
code(
    r"""
# @title ✓ Level where the two facts say so
last = added.loc[256]
assert last["SGD", "α/r"] < 0.02 and 0.2 < last["SGD", "α/√r"] < 3
assert 0.2 < last["Adam", "α/r"] < 3 and last["Adam", "α/√r"] > 4
print("level where the two facts say so")
""",
    "hide-cell",
)
md(r"""
This is one step from $B = 0$ in one layer. Later steps do not all push the same way, and Kalajdzievski (2023), who trained
with AdamW, found $\alpha/\sqrt r$ better at large ranks. When the best rate is the same at every rank, and when it falls
with the rank, is derived by Chen, Villar and Hayou (2026). Chapter 7 measures it.

## How many operations

A product with $n$ tokens costs $2n \cdot \text{in} \cdot \text{out}$ operations. Full training makes three for each layer:
the output, the gradient of the input, the gradient of the weight. LoRA leaves out the last, and adds thin ones. torch
counts them:
""")
code(r"""
class Beside(nn.Module):
    def __init__(self, base, adapter):
        super().__init__()
        self.base, self.adapter = base.requires_grad_(False), adapter

    def forward(self, x):
        return self.base(x) + self.adapter(x)


def operations(layer, n=256):
    x = torch.randn(n, 576, requires_grad=True)  # from the layer before
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


full = operations(nn.Linear(576, 576, bias=False))
for rank in (1, 8, 64):
    thin = Beside(nn.Linear(576, 576, bias=False), LoRA(576, 576, rank, 16))
    count = operations(thin)
    print(f"r = {rank:2}: {count / full:.2f} of full training's operations")
    assert count == 2 * 2 * 256 * 576 * 576 + 3 * 2 * 256 * rank * (576 + 576)
assert full == 3 * 2 * 256 * 576 * 576
""")
md(r"""
Up to a third is saved in a layer. In this small square one, two thirds of that are gone again at rank 64. Attention's own
products have no weights, so there LoRA saves nothing. Whether a step is faster has to be timed: chapter 7.

## GPT-3, counted

The paper's adapters have rank 4, beside the query and value matrices of 96 layers of width 12,288.
""")
code(r"""
width, layers = 12_288, 96
adapter = layers * 2 * 4 * (width + width)  # two matrices a layer, rank 4
full = 175_255_800_000  # the paper's count
print(f"{adapter:,} of {full:,}: {full / adapter:,.0f} times fewer")
print(f"in 16 bits {2 * full / 1e9:.0f} GB and {2 * adapter / 1e6:.1f} MB")
""")
md(r"""
The paper says 10,000 times fewer, and 350 GB that become 35 MB. Counted out it is 9,285 times, and 37.7 MB.

**Sources.** [Hu et al. 2021](https://arxiv.org/abs/2106.09685) (LoRA);
[Eckart and Young 1936](https://doi.org/10.1007/BF02288367) (the best matrix of lower rank);
[Biderman et al. 2024](https://arxiv.org/abs/2405.09673) (the rank of full fine-tuning's change);
[Xiao et al. 2023](https://arxiv.org/abs/2309.17453) (attention sinks);
[Kalajdzievski 2023](https://arxiv.org/abs/2312.03732) (rank-stabilized LoRA);
[Chen, Villar and Hayou 2026](https://arxiv.org/abs/2602.06204) (rates across ranks).
""")
if __name__ == "__main__":
    nbformat.write(
        new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        ),
        sys.argv[1],
    )
