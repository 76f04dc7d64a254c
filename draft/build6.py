"""Builds the draft of book/2-lora/6-lora.ipynb from the cells below."""

import sys
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

cells = []


def md(text):
    cells.append(new_markdown_cell(text.strip("\n")))


def code(text, *tags):
    cells.append(new_code_cell(text.strip("\n"), metadata={"tags": list(tags)} if tags else {}))


md(r"""
# 6. LoRA

*How little must we change to teach a model something new?*

When a textbook needs a correction, nobody prints it again. The publisher slips in a sheet of errata. Take the sheet
out, and the book is what it was.

Fine-tuning prints the book again. Each task leaves a full copy of the model, 538 MB for ours. Could we keep the old
model, and store only the change?
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
# @title Imports, model and data
import math

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tuning import drawings
from tuning.evaluate import facts_with_ids, ledger, paired_interval
from tuning.experiments.record import load_results
from tuning.lora import WideProduct
from tuning.models import load_lm
from tuning.p_tuning import answer_loss, prompt_logits
from tuning.plots import COLORS, figure
from tuning.training import batch_rows
from tuning.yours import yours

model, tokenizer = load_lm(dtype=torch.float32)
facts = facts_with_ids(tokenizer, "P17")  # (city, token id of its country)
""",
    "hide-cell",
)
code(
    r"""
# @title Drawing: LoRA's two ways, and what is sent
drawings.lora(model_bytes=538_060_032, adapter_bytes=9_768_960)
""",
    "hide-input",
)
md(r"""
There is a catch. One weight matrix W of our model has 576 × 576 numbers, and a change of W has as many. The errata
would be as long as the book. So LoRA allows only changes of one kind: a tall matrix B with eight columns, times a flat
matrix A with eight rows. That is 9,216 numbers instead of 331,776. It sounds like too few. Look:
""")
code(
    r"""
# @title The ledger: asked, all weights, LoRA on and off
recorded = load_results("ledger")["results"]["rows"]
found = {row["method"]: row for row in recorded}
met = [found[name] for name in ("asked", "all weights", "LoRA")]
met.append(found["asked"] | {"method": "LoRA, switched off"})
ledger(met, columns=("right", "continents", "kept a task"))
""",
    "hide-input",
    "result",
)
md(r"""
We asked *The city of Osaka is in the country of …* and counted: **right** of 1,064 new cities, and **continents** of 160
countries, which nobody trained on. Trained rows are means of three runs; the intervals count cities and runs.

LoRA tells as many countries as training all weights, as far as we can see, and its file is 55 times smaller.

Now the continents. We trained on countries alone, and both models now miss continents that they used to name. Small
does not mean harmless. But read the last row. It needs no run, since W was never touched: take the sheet out, and the
model is what it was.

*You need [chapter 1](../1-prompts/1-two-ways.ipynb)'s training loop and
[chapter 2](../1-prompts/2-prompts-are-code.ipynb)'s templates. About 80 seconds and 4 GB on two cores; 35 minutes of
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
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # small random numbers

    def forward(self, x):  # (..., in)
        change = x @ self.A.T @ self.B.T  # (..., out)
        return self.base(x) + self.scale * change
""")
md(r"""
That is the whole method. The matrix BA is never made: two thin products are cheaper. The scale α/r is a fixed number; a
section below says what it does.

Freeze the model, and put an adapter beside each of its 210 linear layers:
""")
code(r"""
torch.manual_seed(0)
model.requires_grad_(False)
for name, layer in list(model.named_modules()):
    if isinstance(layer, nn.Linear) and name != "lm_head":  # not the last one
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, WithLoRA(layer))

adapters = [weight for weight in model.parameters() if weight.requires_grad]
trained = sum(weight.numel() for weight in adapters)
print(f"{len(adapters) // 2} adapters, {trained:,} numbers")
""")
md(r"""
Now we ask, train for sixty steps, and ask again. A training example is a city and its country. `answer_loss` is the
loss of the country's token after the prompt, and `batch_rows` draws sixteen examples a step.
""")
code(
    r"""
ASK = "The city of [X] is in the country of [Y]."
rows = facts["test"][::5]  # cities that are not trained on


def answers():
    logits = prompt_logits(model, tokenizer, ASK, rows)  # (cities, vocab)
    return logits.argmax(dim=1).tolist()


before = answers()
optimizer = torch.optim.AdamW(adapters, lr=1e-3, weight_decay=0, fused=True)
for step in range(60):
    chosen = batch_rows(step, len(facts["train"]), 16, seed=0)
    batch = [facts["train"][row] for row in chosen]
    loss = answer_loss(model, tokenizer, ASK, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
after = answers()
""",
    "nbval-ignore-output",
)
code(
    r"""
right = {}
for when, said in (("before", before), ("after", after)):
    right[when] = sum(a == b for a, (_, b) in zip(said, rows, strict=True))
print(f"right, of {len(rows)}: {right}")
table = {
    city: {"before": one, "after": other, "right": answer}
    for (city, answer), one, other in list(zip(rows, before, after))[::27]
}
pd.DataFrame(table).T.map(tokenizer.decode)
""",
    "nbval-ignore-output",
)
code(
    r"""
# @title ✓ None of these cities was trained on, and more are right after
assert not {city for city, _ in facts["train"]} & {city for city, _ in rows}
assert right["after"] > right["before"]
print("none of these cities was trained on, and more are right after")
""",
    "hide-cell",
)
md(r"""
## As in peft

[peft](https://github.com/huggingface/peft) is the library that you will use at work. The same weights in its adapter and
in ours must give the same outputs. Here the scale is 3: at a scale of 1 a forgotten scale would not show.
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
code(
    r"""
# @title ✓ Gradients and the change of weights too
ours(x).square().sum().backward()
theirs(x).square().sum().backward()
for name, weight in (("A", theirs.lora_A), ("B", theirs.lora_B)):
    mine, expected = getattr(ours, name).grad, weight["default"].weight.grad
    assert (mine - expected).norm() < 1e-5 * expected.norm()
delta = ours.scale * ours.B @ ours.A
torch.testing.assert_close(delta, theirs.get_delta_weight("default"))
print("gradients and the change of weights too")
""",
    "hide-cell",
)
code(
    r"""
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
""",
    "hide-input",
)
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
x, g = torch.randn(48), torch.randn(32)  # one input, and its gradient
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
for start, (a, b) in {"A zero": (0, 1), "B zero": (1, 0), "both": (0, 0)}.items():
    layer = WithLoRA(base)
    layer.A.data *= a
    layer.B.data = b * torch.randn(32, 8)
    layer(x).backward(g)
    moves = [name for name in "AB" if getattr(layer, name).grad.any()]
    same = torch.equal(layer(x), base(x))
    print(f"{start:6} as the model at the start: {same}, moves: {moves}")
""")
md(r"""
With both zero nothing ever moves. With one zero the other moves first, and a step later both do. LoRA's authors chose B
[[note 1]](#notes).

## Why so little is enough

Is the change that full fine-tuning makes of low rank? No. Take the change of each of the 210 layers apart by its
singular values, the largest first. To hold nine tenths of it, the middle layer needs MEDIAN terms. An adapter has 8.

But does the model need all of that change? We put parts of it back into the untrained model, and ask:
""")
code(
    r"""
# @title Table: parts of the change put back, and trained adapters
pieces = load_results("first_directions")["results"]
PARTS = {
    "nothing": "nothing",
    "all of it": "linear layers",
    "its first term": "first 1",
    "all of it, as short as that": "shortened as first 1",
    "all but its first term": "without first 1",
    "8 random directions of it": "8 random",
}


def share_of(hits):
    values = [torch.tensor([int(hit) for hit in one]).double() for one in hits]
    low, high = paired_interval(values, same_items=True)
    n = len(values[0])
    mean = n * torch.cat(values).mean()
    return f"{mean:.0f} ({n * low:.0f} to {n * high:.0f})"


table = {
    name: share_of([pieces[f"change/{k}"][kind]["hits"] for k in range(3)])
    for name, kind in PARTS.items()
}
table |= {
    f"a trained adapter of rank {rank}": share_of(
        [pieces[f"adapter/{rank}/{k}"]["hits"] for k in range(3)]
    )
    for rank in (1, 8)
}
pd.DataFrame({"right, of 1,064": table})
""",
    "hide-input",
)
md(r"""
1. FINDING first term.
2. FINDING length.
3. FINDING spread: without the first term.

So LoRA does not work because the change is of low rank. It works because *some* change of low rank is enough
[[note 2]](#notes). This is one easy task and a small model. How many terms does a hard task need?

## When is a rank full?

Take a task with nothing to understand: learn by heart. We drew prompts of three random tokens, and gave each one of 64 words
as its answer. That is 6 bits a pair. Only the last layer has adapters. How many bits can they hold?
""")
code(
    r"""
# @title Figure: bits held, by rank
runs = load_results("full_rank")["results"]
runs = [run for key, run in runs.items() if key.startswith("run/")]
fig, axes = figure(
    FULL_TITLE,
    "pairs to learn, 6 bits each",
    "bits held",
)
for rank, color in zip((1, 4, 16, 64), COLORS, strict=False):
    mine = [run for run in runs if run["rank"] == rank]
    axes.plot(
        [6 * run["pairs"] for run in mine],
        [run["bits"] for run in mine],
        color=color,
        label=f"rank {rank}: {mine[0]['trained']:,} numbers",
    )
axes.axline((1536, 1536), (24576, 24576), color="0.6", ls=":")
axes.set(xscale="log", yscale="log")
pairs = sorted({run["pairs"] for run in runs})
axes.set_xticks([6 * count for count in pairs], pairs)
axes.set_yticks([1000, 3000, 10_000], ["1,000", "3,000", "10,000"])
axes.minorticks_off()
axes.legend()
plt.show()
""",
    "hide-input",
)
md(r"""
FINDINGS.

So ask what a task must store. The form of an answer is little. Thousands of new facts are not.

## What α/r does

Is it a knob of its own? Put $A' = \sqrt s A$ and $B' = \sqrt s B$. Then $s\,BA = B'A'$, an adapter without a scale. The
gradient of $A'$ is that of $A$ divided by $\sqrt s$. SGD heeds that size; Adam does not. So:

$$
\begin{aligned}
\text{SGD:} && \text{scale } s,\ \text{rate } \eta,\ \text{start } A &\;=\; \text{scale } 1,\ \text{rate } s\,\eta,\ \text{start } \sqrt s\,A \\
\text{Adam:} && \text{scale } s,\ \text{rate } \eta,\ \text{start } A &\;=\; \text{scale } 1,\ \text{rate } \sqrt s\,\eta,\ \text{start } \sqrt s\,A \\
\text{so, for Adam:} && 4\alpha,\ \text{rate } \eta/2,\ \text{start } A &\;=\; \alpha,\ \text{rate } \eta,\ \text{start } 2A
\end{aligned}
$$

The last line is what α changes and the rate does not: how large A starts, and so how little training turns it
[[note 3]](#notes). Here is the second line:
""")
code(r"""
def fit(layer, lr):
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=lr, eps=1e-30)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(inputs) - wanted).square().mean().backward()
        optimizer.step()


base = base.double()
inputs, wanted = torch.randn(99, 48).double(), torch.randn(99, 32).double()
scaled = WithLoRA(base, rank=8, alpha=32).double()  # s = 4
plain = WithLoRA(base, rank=8, alpha=8).double()  # s = 1
plain.A.data = 2 * scaled.A.detach()  # √s times
fit(scaled, lr=1e-3)
fit(plain, lr=2e-3)  # √s times
torch.testing.assert_close(4 * scaled.B @ scaled.A, plain.B @ plain.A)
""")
md(r"""
So in practice fix α and tune the rate. The rank hides in $s = \alpha/r$ as well; [laboratory 6](lab/6-lora.ipynb)
measures what another rank does to the first step.

## What is saved, and what is not
""")
code(
    r"""
# @title Table: numbers that a step holds, in MB
whole = 134_515_008
table = {
    "all weights": {"weights": whole, "gradients": whole, "Adam": 2 * whole},
    "LoRA": {
        "weights": whole + trained,
        "gradients": trained,
        "Adam": 2 * trained,
    },
}
table = pd.DataFrame(table).T * 4 / 1e6
table["together"] = table.sum(axis=1)
table.round().astype(int)
""",
    "hide-input",
)
md(r"""
Gradients and Adam's two averages are saved, nearly all of them. The frozen weights are not, and part 3 of this book is about
those. A third of the layers' multiplications is saved too: the gradients of the frozen weights.

And what waits for backward? Here is a trap. Take three layers that read one input, as queries, keys and values do, in 16
bits:
""")
code(r"""
from peft import get_peft_model
from tuning.lora import add_lora

x = torch.randn(512, 576, dtype=torch.bfloat16, requires_grad=True)


def three():
    return nn.Sequential(*(nn.Linear(576, 576) for _ in range(3))).bfloat16()


def three_with_peft():
    config = LoraConfig(r=8, target_modules=["0", "1", "2"])
    return get_peft_model(three(), config).base_model.model


def three_with_ours():
    layers = three()
    add_lora(layers, rank=8, alpha=16)
    return layers
""")
code(r"""
def kept(layers):  # bytes that wait for backward, weights aside
    weights = {w.untyped_storage().data_ptr() for w in layers.parameters()}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        done = [layer(x) for layer in layers]
    return sum(size for key, (size, _) in sizes.items() if key not in weights)


for make in (three, three_with_peft, three_with_ours):
    print(f"{make.__name__:16} {kept(make()) / 1e3:6.0f} kB")
""")
md(r"""
All weights trained, the layers keep their input once. peft's adapters are in float32, and each keeps a float32 copy of it.
This book's keep the input as it came, and widen it again in backward: the same numbers bit for bit, for less than a fifth of the
bytes. For a whole layer of LLaMA-7B, peft's adapters keep 1.48 times what full training keeps, and ours 0.92
[[note 4]](#notes).

## Merging

At the end $W + s\,BA$ is one matrix, as large as $W$. Add once, and the model is as fast as before. Kept beside, an
adapter can be taken off and swapped. Its two thin products are few operations, but they are calls of their own: 420 more
for each token that the model writes. That is where an adapter beside the weights is slower.
[Chapter 7](7-lora-in-practice.ipynb) measures it.

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
**Ask what you did not train.** The adapter holds 2 % of the model's numbers, and it changes the answer to every question.
The ledger's second column shows it. Before you hand an adapter on, ask twenty questions from outside its task.

**Freeze before you add, not after.** `model.requires_grad_(False)` also freezes adapters that are already there. Then
nothing is trained, and only the loss tells.
""")
code(r"""
late = WithLoRA(nn.Linear(48, 32))
late.requires_grad_(False)  # too late: A and B are parameters of this module
print("trained:", [n for n, w in late.named_parameters() if w.requires_grad])
""")
md(r"""
## Yours

Give a file of your own: 20 lines or more, each `{"subject": …, "answer": …}`. It prints your row beside the untrained
model's.
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

1. **Count LLaMA-7B's** (easy, 10 minutes). It has 32 layers of hidden size 4,096 and inner size 11,008: four square matrices for attention,
   three for the MLP, and 6,738,415,616 numbers in all. How many numbers has an adapter of rank 8 beside all of these matrices? How many MB
   in 16 bits?
2. **The other start** (medium, 20 minutes). Start A at zero and B at random, between ±1/√in. Is the model unchanged? Let `fit` return its
   loss, and compare both starts at eight rates from 0.0001 to 0.3, with five seeds each.
3. **The gradient's spectrum** (medium, 30 minutes). Write `share_held(matrix, k)`: the part of a matrix's squared length that its first k
   singular values hold. `check_share_held(share_held)` from `tuning.checks` tests it. Take the gradient of the loss on 64 facts for one
   query matrix of a fresh model, its sign, and what eight steps of Adam change. What holds most in few values, and what does that say about
   the long tail of a full change?
4. **Weight decay** (medium, 20 minutes). AdamW shrinks a weight by rate times decay in each step. A scale of s at rate η and decay λ is a
   scale of 1 at rate √s η and which decay? Write `without_scale(A, B, scale, lr, decay)`, which returns the twin's four;
   `check_without_scale(without_scale)` tests it.
5. **One product, many factors** (hard, 30 minutes). $BM$ and $M^{-1}A$ have one product for every invertible M. Write `balanced(A, B)`, whose factors
   have $AA^\top = B^\top B$, without making the large product. `check_balanced(balanced)` tests it.

## What to remember

- LoRA leaves the weights alone and trains a change of low rank beside them: $y = Wx + \frac{\alpha}{r}\,BAx$.
- B starts at zero, so that nothing changes at first; if both did, nothing would ever move.
- The change of full fine-tuning is not of low rank. A change of low rank is enough all the same, until there is more to store
  than it has room for.
- For Adam, α is a rate and the size of A's start.
- Small is not harmless. But it comes off.

## Notes

1. Which of the two is zero does matter at large rates. Hayou et al. (2024) find that with B at zero larger rates can be used,
   and that they do better.
2. That few directions can be enough was seen before LoRA. Aghajanyan et al. (2021) tuned RoBERTa along 200 random directions
   and reached nine tenths of full fine-tuning's score on one task. Enough is not the same, though. Shuttleworth et al. (2024)
   find that LoRA's matrices get new large directions, unlike any in the pretrained model, and that those go along with
   forgetting.
3. Zhang et al. (2026) report gains from a large α that no rate brings, and put them down to what is said here in one line: α
   also sets how large the start is beside the steps.
4. Counted and checked against peft in [laboratory 11](../4-lomo/lab/11-where-the-memory-goes.ipynb). Activation checkpointing
   makes the difference small: one layer at a time keeps all this.

**Sources.** [Hu et al. 2021](https://arxiv.org/abs/2106.09685) (LoRA);
[Hayou et al. 2024](https://arxiv.org/abs/2406.08447) (which factor starts at zero);
[Zhang et al. 2026](https://arxiv.org/abs/2606.12883) (what α does);
[Biderman et al. 2024](https://arxiv.org/abs/2405.09673) (the rank of full fine-tuning's change);
[Aghajanyan et al. 2021](https://arxiv.org/abs/2012.13255) (intrinsic dimension);
[Shuttleworth et al. 2024](https://arxiv.org/abs/2410.21228) (directions that LoRA adds).
""")
if __name__ == "__main__":
    nbformat.write(
        new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        ),
        sys.argv[1],
    )
