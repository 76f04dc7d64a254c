"""Builds book/2-lora/solutions/6-lora.ipynb."""

import sys
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

cells = []


def md(text):
    cells.append(new_markdown_cell(text.strip("\n")))


def code(text, *tags):
    cells.append(new_code_cell(text.strip("\n"), metadata={"tags": list(tags)} if tags else {}))


md(r"""
# Solutions to chapter 6

One solution for each exercise of [chapter 6](../6-lora.ipynb). Each begins with its answer.
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
from torch import nn
from tuning.checks import (
    check_balanced,
    check_share_held,
    check_without_scale,
    sized,
)
from tuning.evaluate import facts_with_ids
from tuning.models import load_lm
from tuning.p_tuning import answer_loss
""",
    "hide-cell",
)
code(
    r"""
# @title As in the chapter: the adapter
class WithLoRA(nn.Module):
    def __init__(self, base, rank=8, alpha=16):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        bound = base.in_features**-0.5
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)
""",
    "hide-cell",
)
md(r"""
## Exercise 1. Count LLaMA-7B's

**19,988,480 numbers, 40 MB in 16 bits, 337 times fewer than the model.** An adapter has $r$ rows of in and $r$ columns of out.
""")
code(r"""
hidden, inner, layers, rank = 4096, 11_008, 32, 8
sides = 4 * (hidden + hidden) + 3 * (hidden + inner)  # in and out, of seven
adapter = layers * rank * sides
print(f"{adapter:,} numbers, {2 * adapter / 1e6:.1f} MB")
print(f"{6_738_415_616 / adapter:.0f} times fewer")
""")
md(r"""
## Exercise 2. The other start

**The model is unchanged too, and in this small layer both starts end alike at every rate.**
""")
code(
    r"""
torch.manual_seed(0)
base = nn.Linear(48, 32)
inputs = torch.randn(99, 48)
wanted = inputs @ torch.randn(48, 32) / 48**0.5


def other_start(layer):
    nn.init.zeros_(layer.A)
    nn.init.uniform_(layer.B, -(48**-0.5), 48**-0.5)


def fit(layer, lr, steps=50):
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(inputs) - base(inputs) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


rows = {}
for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1):
    found = {"A random": [], "B random": []}
    for seed in range(5):
        for start, losses in found.items():
            torch.manual_seed(seed)
            layer = WithLoRA(base)
            if start == "B random":
                other_start(layer)
                assert torch.equal(layer(inputs), base(inputs))
            losses.append(fit(layer, lr))
    rows[lr] = {start: sum(losses) / 5 for start, losses in found.items()}
    rows[lr] |= {f"± {s[0]}": max(v) - min(v) for s, v in found.items()}
print(pd.DataFrame(rows).T.round(3).to_string())
""",
    "nbval-ignore-output",
)
md(r"""
A zero factor on either side makes the product zero. In each row the two means differ by no more than the seeds of one start do. That is
one small layer, fitted alone. In wide models Hayou et al. (2024) find that with B at zero larger rates can be used, and that they do
better.

## Exercise 3. The gradient's spectrum

**The first singular value holds 0.95 of the gradient's squared length, but 0.43 of its sign's. Adam's change is like the sign's, 0.45: its
tail comes from dividing number by number.**
""")
code(r"""
def share_held(matrix, k):
    # The part of the squared length in the first k singular values.
    squares = torch.linalg.svdvals(matrix).square()
    return (squares[:k].sum() / squares.sum()).item()


check_share_held(share_held)
""")
code(
    r"""
model, tokenizer = load_lm(dtype=torch.float32)
model.requires_grad_(False)
facts = facts_with_ids(tokenizer, "P17")["train"][: sized(64, 4)]
weight = model.model.layers[15].self_attn.q_proj.weight.requires_grad_(True)
ASK = "The city of [X] is in the country of [Y]."
start = weight.detach().clone()

optimizer = torch.optim.Adam([weight], lr=1e-4)
for step in range(sized(8, 2)):
    loss = answer_loss(model, tokenizer, ASK, facts)
    optimizer.zero_grad()
    loss.backward()
    if step == 0:
        gradient = weight.grad.clone()
    optimizer.step()
torch.manual_seed(0)
matrices = {
    "gradient": gradient,
    "its sign": gradient.sign(),
    "Adam's change": weight.detach() - start,
    "random numbers": torch.randn(576, 576),
}
table = {
    name: {k: share_held(matrix, k) for k in (1, 8, 64)}
    for name, matrix in matrices.items()
}
print(pd.DataFrame(table).T.round(2).to_string())
""",
    "nbval-ignore-output",
)
code(
    r"""
# @title ✓ The sign has a long tail, and Adam's change with it
if sized(True, False):
    assert table["gradient"][8] > 0.9
    assert table["its sign"][8] < table["gradient"][8] - 0.1
    assert table["Adam's change"][8] < table["gradient"][8]
assert table["random numbers"][8] < 0.1
print("the sign has a long tail, and Adam's change with it")
""",
    "hide-cell",
)
md(r"""
The gradient is a sum of $g x^\top$ over the tokens of all facts. As far as tokens agree in $x$ or in $g$, a few terms hold most of it. The sign
gives each number the same size, so that the many small numbers count as much as the few large ones. Adam's first step is that sign,
and later ones divide by the size of past gradients, number by number. So a change with a long tail need not mean a task that needs one.

## Exercise 4. Weight decay

**The decay without a scale is $\lambda/\sqrt s$.** AdamW shrinks a weight by $\eta\lambda$ of itself in each step. That must stay, and
$\sqrt s\,\eta \cdot \lambda/\sqrt s = \eta\lambda$.
""")
code(r"""
def without_scale(A, B, scale, lr, decay):
    root = scale**0.5
    return root * A, root * B, root * lr, decay / root


check_without_scale(without_scale)
""")
md(r"""
So whoever changes α and keeps rate and decay changes three things at once: the rate in effect, the start, and how much decay counts.

## Exercise 5. One product, many factors

**Take the product's singular values, and give each factor their square root.** The product is as large as a weight, but it need not be made.
QR turns both factors into a frame and a matrix of r × r; the small product of those has the same singular values.
""")
code(r"""
def balanced(A, B):
    Q_B, R_B = torch.linalg.qr(B)  # (out, r), (r, r)
    Q_A, R_A = torch.linalg.qr(A.T)  # (in, r), (r, r)
    U, sizes, Vt = torch.linalg.svd(R_B @ R_A.T)  # (r, r)
    roots = sizes.sqrt()
    return roots[:, None] * (Vt @ Q_A.T), (Q_B @ U) * roots


check_balanced(balanced)
""")
md(r"""
Then $A A^\top = B^\top B$, both the diagonal matrix of singular values. The model is the same. Its training goes on otherwise, since the
gradients are not: each holds the other factor.
""")
if __name__ == "__main__":
    nbformat.write(
        new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        ),
        sys.argv[1],
    )
