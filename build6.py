"""Builds book/2-lora/6-lora.ipynb from the cells below (a draft's tool; removed when the chapter is merged)."""
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

cells = []
def md(text): cells.append(new_markdown_cell(text.strip("\n")))
def code(text, *tags): cells.append(new_code_cell(text.strip("\n"), metadata={"tags": list(tags)} if tags else {}))

md(r"""
# 6. LoRA

*How little must we change to teach a model something new?*

When a textbook needs a correction, nobody prints it again. The publisher slips in a sheet of errata. Take the sheet
out, and the book is what it was.

Fine-tuning prints the book again. Each task leaves a full copy of the model, 538 MB for ours. Could we keep the old
model, and store only the change?
""")
code(r"""
# @title Drawing: LoRA's two ways, and what is sent
from tuning import drawings

drawings.lora(model_bytes=538_060_032, adapter_bytes=9_768_960)
""", "hide-input")
md(r"""
There is a catch. One weight matrix W of our model has 576 × 576 numbers, and a change of W has as many. The errata
would be as long as the book. So LoRA allows only changes of one kind: a tall matrix B with eight columns, times a flat
matrix A with eight rows. That is 9,216 numbers instead of 331,776. It sounds like too few. Look:
""")
code(r"""
# @title The ledger: asked, all weights, LoRA on and off
from tuning.evaluate import ledger
from tuning.experiments.record import load_results

recorded = {row["method"]: row for row in load_results("ledger")["results"]["rows"]}
rows = [recorded[name] for name in ("asked", "all weights", "LoRA")]
rows.append(recorded["asked"] | {"method": "LoRA, switched off"})
ledger(rows, columns=("right", "continents", "kept a task", "trained"))
""", "hide-input", "result")
md(r"""
*Right*: countries of 1,064 new cities. *Continents*: of 160 countries, which nobody trained on. The trained rows are
means of three runs, and the intervals count cities and runs.

LoRA's file is 55 times smaller. [finding about right vs all weights.] Now the continents: [finding]. Small does not
mean harmless. But read the last row. It needs no run, since W was never touched: take the sheet out, and the model is
what it was.

You need [chapter 2](../1-prompts/2-prompts-are-code.ipynb)'s templates and [chapter 1](../1-prompts/1-two-ways.ipynb)'s
loop; 75 seconds and 4 GB on two cores; 30 minutes of reading.
""")
md(r"""
## The adapter

Before the code, a guess. The adapter must start by changing nothing. Should A be zero, or B, or both? Choose; below we
try all three.
""")
code(r"""
# @title Imports, model and data
import torch
import torch.nn.functional as F
from torch import nn
from tuning.evaluate import facts_with_ids, share_right
from tuning.models import load_lm
from tuning.p_tuning import answer_loss, prompt_logits
from tuning.prompts import answer_logits, encode
from tuning.training import batch_rows

model, tokenizer = load_lm(dtype=torch.float32)
facts = facts_with_ids(tokenizer, "P17")  # (city, token id of its country)
""", "hide-cell")
code(r"""
class WithLoRA(nn.Module):
    def __init__(self, base, rank=8, alpha=16):
        super().__init__()
        self.base = base  # the frozen layer
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):  # (..., in)
        low = x @ self.A.T  # (..., r)
        return self.base(x) + self.scale * (low @ self.B.T)  # (..., out)
""")
md(r"""
That is the whole method. The number α/r is a fixed scale; a section below says what it does. BA itself is never formed
in training: two thin products are cheaper.

Now put one beside each of the model's 210 linear layers, and freeze the rest.
""")
code(r"""
torch.manual_seed(0)
model.requires_grad_(False)
for name, layer in list(model.named_modules()):
    if isinstance(layer, nn.Linear) and name != "lm_head":
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, WithLoRA(layer))

adapters = [weight for weight in model.parameters() if weight.requires_grad]
print(f"{len(adapters) // 2} adapters,", end=" ")
print(f"{sum(weight.numel() for weight in adapters):,} numbers")
""")
md(r"""
We ask as [chapter 2](../1-prompts/2-prompts-are-code.ipynb) did, and train on pairs of a city and its country. The
loss is that of the country's token. `answer_loss` computes it, for a batch of pairs.
""")
code(r"""
ASK = "The city of [X] is in the country of [Y]."


def says(cities):
    logits = prompt_logits(model, tokenizer, ASK, cities)  # (cities, vocab)
    return [tokenizer.decode(token) for token in logits.argmax(dim=1)]


cities = [...]
before = says(cities)

optimizer = torch.optim.AdamW(adapters, lr=1e-3, weight_decay=0, fused=True)
for step in range(30):
    batch = [facts["train"][row] for row in batch_rows(step, 1595, 16, 0)]
    loss = answer_loss(model, tokenizer, ASK, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
""", "nbval-ignore-output")
