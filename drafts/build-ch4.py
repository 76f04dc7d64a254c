import sys; sys.path.insert(0, "/tmp/w")
from nb import md, code, setup, write
sys.path.insert(0, "/tmp/w/ch4")
from libsrc import lib
sys.path.insert(0, "/work/c4/lib")
from tuning import drawings

md(r"""
# 4. P-tuning

*What is a network good for that is thrown away after training?*

Chapter 3 put six free vectors around the name of a city. Each is a parameter of its own. A step of training may move one and leave
the next where it was. A sentence is not like that. In *The city of [X] is in the country of*, each word is there because of the others.

**P-tuning** (Liu et al., 2021) lets one small network write all the vectors [[note 1]](#notes). The network is trained, and the language model is
frozen. Afterwards the network goes, and what it wrote is kept:
""", id="title")
setup("book/2-lora/6-lora.ipynb")
code(r"""
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from tuning import drawings
from tuning.data import TEMPLATES
from tuning.evaluate import (
    as_hits,
    difference,
    facts_with_ids,
    hits_at_1,
    ledger,
    paired_interval,
)
from tuning.experiments.record import load_results
from tuning.models import load_encoder, load_lm
from tuning.p_tuning import (
    PromptVectors,
    encode_pseudo,
    load_prompt,
    prompt_logits,
    save_prompt,
)
from tuning.plots import COLORS, dots_with_intervals, figure, panels
from tuning.prompts import embeddings_of, encode
from tuning.yours import yours

model, tokenizer = load_lm(dtype=torch.float32)
model.requires_grad_(False)  # no weight of the model changes in this chapter
hidden = model.config.hidden_size  # 576
facts = facts_with_ids(tokenizer, "P17")  # (city, token id of its country)
""", tags=["hide-cell"], title="Imports, model and data", id="imports")
code(r"""
drawings.p_tuning()
""", tags=["hide-input"], title="Drawing: a network writes the prompt", id="drawing", alt=drawings.p_tuning().alt)
md(r"""
The orange part is the **prompt encoder**. What does it bring?
""", id="what-it-brings")
code(r"""
recorded = load_results("ledger")["results"]
ledger(
    recorded["rows"],
    chapter=4,
    columns=("right", "over asking", "trained", "kept a task"),
)
""", tags=["hide-input", "result"], title="The ledger: P-tuning in four forms", id="ledger")
md(r"""
**P-tuning, BiLSTM** is the drawing. **MLP** is the same without the BiLSTM. Both have no word but the name of the city. **Beside the prompt** keeps
the words of the handcrafted prompt and adds six vectors, made by the drawing's network. **From the prompt** is a variant of this book and not in the paper: it begins at the handcrafted
words. The numbers are means of three recorded runs, with an interval of 95 %, over cities and runs.

Three of the four pass asking by 51 to 66 cities. The drawing itself does not: it has 293, and asking 307. Plain vectors, with no network at
all, have 349. So two questions wait in this chapter. How is the method built? And why does its best-known part lag here?

*You need [chapter 3](3-from-words-to-vectors.ipynb)'s places for vectors and [chapter 1](1-two-ways.ipynb)'s training loop. About «SECONDS» seconds and «GB» GB on two cores;
«MINUTES» minutes of reading.*

## One sentence, as the model reads it

The paper's example is *The capital of Britain is [MASK]*. *Britain* is the context, `[MASK]` is the target, and the other words are the prompt.
A model reads none of them. It reads embeddings, and we write $\mathbf e(w)$ for the embedding of a word:

$$
\{\mathbf e(\text{The}),\, \mathbf e(\text{capital}),\, \mathbf e(\text{of}),\, \mathbf e(\text{Britain}),\, \mathbf e(\text{is}),\, \mathbf e([\text{MASK}])\}.
$$

P-tuning keeps the embeddings of context and target. In the place of the prompt it puts **pseudo tokens** $P_0$ to $P_m$. They have no
embedding. The encoder gives each a vector $h_j = h(P_j)$:

$$
\{h_0, \dots, h_i,\; \mathbf e(\text{Britain}),\; h_{i+1}, \dots, h_m,\; \mathbf e([\text{MASK}])\}.
$$

Here is what is read in each case, token by token. First a masked model's tokenizer, then ours:
""", id="ledger-text")
code(r"""
def as_read(tokenizer, template):
    encode_row = encode_pseudo if "[P]" in template else encode
    ids = encode_row(tokenizer, template, "Britain")
    words = tokenizer.batch_decode([[max(i, 0)] for i in ids])
    named = zip(ids, words, strict=True)
    names = [f"h{-1 - i}" if i < 0 else f"e({w.strip()})" for i, w in named]
    print(" ", *names)


_, masked = load_encoder()
print("masked, in words, and as (3,3,3):")
as_read(masked, "The capital of [X] is [Y].")
as_read(masked, "[P][P][P] [Y][P][P][P] [X][P][P][P]")
print("causal, in words, as (3,3,0), and with words and vectors:")
as_read(tokenizer, "The capital of [X] is [Y].")
as_read(tokenizer, "[P][P][P] [X][P][P][P] [Y].")
as_read(tokenizer, "[P][P][P] The capital of [X] is[P][P][P] [Y].")
""", id="as-read")
md(r"""
**(3,3,3)** counts the vectors: three, then three, then three. It is what the authors' code gives to BERT, with the mask before the subject. To GPT it gives **(3,3,0)**. A causal
model writes its answer behind the last token and never looks at what would follow, so a third group would do nothing. This
is the template of our first two rows.

The last line is P-tuning as the paper's final version (2023) has it: handcrafted words stay, and vectors are added.

## A network that writes the prompt

Each pseudo token has a trained row $s_j$, so that $S$ is a matrix (length, hidden). An **LSTM** reads its rows one by one and carries a
memory from row to row. Two of them run, one from each end, and each gives half of the hidden size. A two-layer **MLP** then turns each place's
result into a vector:

$$
h_j = \mathrm{MLP}\big(\big[\overrightarrow{\mathrm{LSTM}}(s_0, \dots, s_j) : \overleftarrow{\mathrm{LSTM}}(s_j, \dots, s_m)\big]\big).
$$
""", id="template-text")
code(r"""
class Encoder(nn.Module):
    def __init__(self, length, hidden):
        super().__init__()
        self.embedding = nn.Embedding(length, hidden)
        self.lstm = nn.LSTM(
            hidden, hidden // 2, 2, bidirectional=True, batch_first=True
        )
        self.mlp = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)
        )

    def forward(self):
        S = self.embedding.weight.unsqueeze(0)  # (1, length, hidden)
        states, _ = self.lstm(S)  # (1, length, 2 * hidden // 2)
        return self.mlp(states[0])  # (length, hidden)
""", id="method")
md(r"""
The encoder takes no input. It does not see the city. Once it is trained, its output is six constants.

Why have it at all? The paper of 2021 gives two reasons. The embeddings of a trained model lie apart from each other, so a vector that starts at random
and takes short steps may be stuck near its start. And the words of a prompt should depend on each other, which free vectors do not.

**The check.** peft has this encoder too, as the form `"LSTM"` of its P-tuning. With peft's weights, ours must give peft's vectors:
""", id="why-network")
code(r"""
from peft import PromptEncoder as PeftEncoder
from peft import PromptEncoderConfig

sizes = {"num_virtual_tokens": 6, "token_dim": hidden}
sizes |= {"num_transformer_submodules": 1, "encoder_hidden_size": hidden // 2}
theirs = PeftEncoder(
    PromptEncoderConfig(encoder_reparameterization_type="LSTM", **sizes)
)
weights = {
    name.replace("_head", ""): weight
    for name, weight in theirs.state_dict().items()
}
ours = Encoder(6, hidden)
ours.load_state_dict(weights)  # refuses a name or a shape that does not fit
torch.testing.assert_close(ours(), theirs(torch.arange(6)))
""", id="peft")
code(lib("p_tuning", "PromptEncoder").replace('f"a hidden size of {hidden_size} cannot be halved for two directions"', 'f"a hidden size of {hidden_size} cannot be halved "\n                "for two directions"'), tags=["hide-cell"], title="Library: the encoder, with or without its LSTM", id="library-encoder")
code(r"""
from tuning.p_tuning import PromptEncoder

library = PromptEncoder(6, hidden)
library.load_state_dict(weights)
torch.testing.assert_close(library(), ours())
found, expected = (
    torch.autograd.grad(encoder().square().sum(), list(encoder.parameters()))
    for encoder in (library, ours)
)
for one, other in zip(found, expected, strict=True):
    torch.testing.assert_close(one, other)
print("the library's encoder is ours, in vectors and gradients")
""", tags=["hide-cell"], title="✓ The library's encoder is ours, in vectors and gradients", id="library-check")
md(r"""
The library's `PromptEncoder` is this class with two options more: `lstm_layers=0` leaves the LSTM out, and `start` is told below.

## Six vectors, or one?

A guess, before any training. Six rows $s_j$ are drawn at random, 34 apart. Two words stand 3.4 apart on average. How far apart are the six vectors that
come out of an encoder with random weights: as far as words, or further, or nearer?
""", id="guess")
code(r"""
def looks(vectors):
    return vectors.norm(dim=1).mean().item(), torch.pdist(vectors).mean().item()


torch.manual_seed(0)
starts = {
    "BiLSTM": PromptEncoder(6, hidden)(),
    "MLP": PromptEncoder(6, hidden, lstm_layers=0)(),
    "random words": embeddings_of(model, torch.randint(49152, (6,)).tolist()),
}
for name, vectors in starts.items():
    length, apart = looks(vectors)
    print(f"{name:12}  length {length:.1f}, {apart:.1f} apart")
""", id="looks")
code(r"""
length, apart = looks(starts["BiLSTM"])
assert 0.6 < length < 0.8 and 0.2 < apart < 0.3
assert 5 < looks(starts["MLP"])[0] < looks(starts["MLP"])[1] < 8
assert 2.5 < looks(starts["random words"])[0] < 3.8
assert 2.5 < looks(starts["random words"])[1] < 4.5
assert round(load_results("p_tuning")["results"]["words"]["apart"], 1) == 3.4
torch.manual_seed(0)
encoder = PromptEncoder(6, hidden)
assert 33 < looks(encoder.embedding.weight)[1] < 35
nothing = encoder.mlp(torch.zeros(hidden))  # of states that are zero
assert 0.8 < nothing.norm() / encoder().norm(dim=1).mean() < 1
print("the six begin as nearly one: most of each is the MLP's bias")
""", tags=["hide-cell"], title="✓ The BiLSTM's six vectors begin as nearly one", id="looks-check")
md(r"""
The MLP's vectors are longer than words and further apart. The BiLSTM's are short, and hardly apart at all. What an LSTM gives out is small: a gate
between 0 and 1, times a number between −1 and 1. The MLP makes it smaller still, and adds the same bias to all six. So most of each vector is that bias. At its start this prompt says one
thing six times.

Does it matter? Guess again: which of the two has more of 266 new cities right after forty steps, and do six vectors come out?
""", id="looks-text")
code(r"""
from tuning.training import train

point = PromptVectors(torch.zeros(1, 1))
train(point, lambda rows: (point() - 3).square().sum(), [0] * 16, 0.3, 99)
print(f"{point().item():.0f}")  # the loss is least at 3
""", tags=["hide-cell", "earlier"], title="From earlier: train(trained, loss_on, rows, lr, steps)", id="earlier-train")
code(r"""
from tuning.p_tuning import answer_loss

BARE = "[P][P][P] [X][P][P][P] [Y]."  # (3,3,0)
rows = facts["test"][::4]  # cities that are not trained on


def p_tuned(lstm_layers, lr):
    torch.manual_seed(0)
    encoder = PromptEncoder(6, hidden, lstm_layers=lstm_layers)

    def loss_on(batch):
        return answer_loss(model, tokenizer, BARE, batch, encoder())

    history = train(encoder, loss_on, facts["train"], lr, steps=40)
    return encoder, history.losses


encoders, losses = {}, {}
for name, layers, lr in (("BiLSTM", 2, 3e-4), ("MLP", 0, 1e-2)):
    encoders[name], losses[name] = p_tuned(layers, lr)
""", id="train")
code(r"""
answers = [answer for _, answer in rows]
table, hits = {}, {}
for name, encoder in encoders.items():
    vectors = encoder().detach()
    logits = prompt_logits(model, tokenizer, BARE, rows, vectors)
    hits[name] = hits_at_1(logits, answers)
    length, apart = looks(vectors)
    table[name] = {
        f"right, of {len(rows)}": hits[name].sum().item(),
        "loss, last ten steps": round(sum(losses[name][-10:]) / 10, 2),
        "length": round(length, 1),
        "apart": round(apart, 1),
    }
pd.DataFrame(table).T
""", tags=["nbval-ignore-output"], id="trained-table")
code(r"""
of = pd.DataFrame(table).T
right = of.iloc[:, 0]
# RANGES WAIT FOR THE RUN
assert 20 < right["BiLSTM"] < right["MLP"] < 110
assert of["apart"]["BiLSTM"] < 3 < 6 < of["apart"]["MLP"]
assert not {city for city, _ in facts["train"]} & {city for city, _ in rows}
both = [difference([h.int().tolist()], [hits["BiLSTM"].int().tolist()])
        for h in (hits["MLP"],)]
print("MLP over BiLSTM:", *both)
""", tags=["hide-cell", "nbval-ignore-output"], title="✓ After forty steps the MLP is ahead, and its vectors are further apart", id="trained-check")
md(r"""
Each has the rate that the ledger's sweep chose for it. After forty steps the MLP has «LIVE MLP» right and the BiLSTM «LIVE BILSTM». The BiLSTM's vectors are «LIVE APART» apart, «WORDS
for what that means: nearer than two words». This run is live, with one seed. The ledger's runs are nearly four times as long.

## What is kept

Now throw the network away:
""", id="trained-text")
code(r"""
learned = encoders["MLP"]().detach()
trained = {
    name: sum(weight.numel() for weight in encoder.parameters())
    for name, encoder in encoders.items()
}
del encoders, encoder
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "country.safetensors"
    save_prompt(path, model, BARE, learned)
    template, loaded = load_prompt(path, model)
again = prompt_logits(model, tokenizer, template, rows[:32], loaded)
assert torch.equal(hits_at_1(again, answers[:32]), hits["MLP"][:32])
print(f"trained: {trained['BiLSTM']:,} or {trained['MLP']:,} numbers")
print(f"kept: {loaded.numel():,} numbers, {4 * loaded.numel():,} bytes")
""", id="kept")
code(r"""
paper = PromptEncoder(9, 768)  # (3,3,3) on BERT-base
assert sum(weight.numel() for weight in paper.parameters()) == 8_278_272
assert paper().numel() == 6_912
assert (trained["BiLSTM"], trained["MLP"]) == (4_658_688, 668_160)
print("8,278,272 numbers trained and 6,912 kept for BERT-base")
""", tags=["hide-cell"], title="✓ BERT-base: 8,278,272 numbers trained, 6,912 kept", id="kept-check")
md(r"""
Six vectors are left, in 13.8 KB, and they answer as before. For BERT-base and (3,3,3) it is 6,912 numbers of 8,278,272.

So the network is a way to *train*. It gives the model nothing that six vectors could not give. A good prompt that
it finds exists as plain vectors too; the question is which way leads there.

## Why does the BiLSTM lag?

With no words, the BiLSTM has 293 right and plain vectors 349. Paired by city and run, it is behind by 56, with an interval from 28 to 82. Two reasons offer themselves.
It may be **slow**: then more steps help. Or it may be the **start**, six vectors that are nearly one: then another start helps.

For the first, the BiLSTM and the MLP train four times as long. For the second, the BiLSTM keeps its weights, and its output is moved and stretched by fixed numbers: at the start
the mean is zero and the length that of words. Each has a sweep of its own:
""", id="kept-text")
code(r"""
runs = load_results("p_tuning")["results"]


def best_of(kind):  # the hits of the seeds at the rate that dev chose
    swept = {
        key: run
        for key, run in runs.items()
        if key.startswith(f"{kind}/") and key.endswith("/0")
    }
    lr = max(swept.values(), key=lambda run: run["dev"])["lr"]
    return [runs[f"{kind}/{lr:g}/{seed}"]["hits"] for seed in range(3)]


def of_ledger(method):
    return [recorded[f"run/{method}/{seed}"]["hits"] for seed in range(3)]


def counted(hits):  # a dot and its interval
    values = [as_hits(one) for one in hits]
    low, high = paired_interval(values, same_items=True)
    ends = {"p_at_1": torch.cat(values).mean().item(), "low": low, "high": high}
    return {name: 1064 * value for name, value in ends.items()}


shown = {
    "plain vectors": of_ledger("prompt tuning"),
    "MLP": of_ledger("P-tuning, MLP"),
    "MLP, four times as long": best_of("MLP, long"),
    "BiLSTM": of_ledger("P-tuning, BiLSTM"),
    "BiLSTM, four times as long": best_of("BiLSTM, long"),
    "BiLSTM, spread at the start": best_of("BiLSTM, spread"),
}
fig, axes = figure(
    "«TITLE: what mends the BiLSTM»", "right, of 1,064 new cities"
)
dots_with_intervals(axes, list(shown), [counted(hits) for hits in shown.values()])
axes.axvline(307, color="0.5", ls="--", lw=1)
axes.text(307, 5.5, "asked", ha="center", va="bottom", fontsize=10)
plt.show()
""", tags=["hide-input"], title="Figure: more steps, or another start", id="lag", alt="Right of 1,064 new cities, with intervals of 95 %. Plain vectors 349, MLP 358, MLP four times as long «N», BiLSTM 293, BiLSTM four times as long «N», BiLSTM spread at the start «N». Asked: 307.")
code(r"""
plain, lagging = shown["plain vectors"], shown["BiLSTM"]
assert difference(lagging, plain) == "-56 (-82 to -28)"
for name in list(shown)[4:]:
    print(f"{name}: over BiLSTM {difference(shown[name], lagging)}, "
          f"over plain vectors {difference(shown[name], plain)}")
print("MLP, long, over MLP:",
      difference(shown["MLP, four times as long"], shown["MLP"]))
# RANGES WAIT FOR THE RECORD
""", tags=["hide-cell"], title="✓ «What mends the BiLSTM»", id="lag-check")
md(r"""
1. **Four times the steps.** «N» right, «DIFFERENCE» over the short run. «The MLP gains as much / less.»
2. **Another start.** «N» right, «DIFFERENCE» over the same encoder, and «DIFFERENCE» against plain vectors.
3. «CONCLUSION: which of the two, or neither, and what it does not show: one task, one model.»

Some of this was built into the choice of numbers. The authors train far longer, up to a hundred passes over the facts [[note 2]](#notes). With a BiLSTM,
do that, or spread its start.

## Words stay, vectors are added

The paper's case study asks for the country of a place in four wordings. By hand BERT-base answers 31, 20, 31 and 51 % of them. The third
and the fourth differ by one word, a last *In*. Then vectors are added, three in front and three before the answer, and the words stay.

Do the four wordings come together? The authors' code lets only some words compete, and the whole vocabulary is a harder test [[note 3]](#notes). We count in
both ways, with the 122 countries of our facts as the words that may compete:
""", id="lag-text")
code(r"""
wordings = TEMPLATES["P17"][:4]
said = [wording.removesuffix(" [Y].") + " …" for wording in wordings]
fig, both = panels(
    "«TITLE: wordings»", (1, 1), (5.6, 3.6)
)
for axes, way, name in zip(
    both,
    ("among countries", "hits"),
    ("among countries", "whole vocabulary"),
    strict=True,
):
    by_hand = [runs[f"wording/{n}/by hand"][way] for n in range(4)]
    added = [[runs[f"wording/{n}/{s}"][way] for s in range(3)] for n in range(4)]
    dots_with_intervals(axes, said, [counted([h] * 3) for h in by_hand], "0.5")
    dots_with_intervals(axes, said, [counted(h) for h in added])
    axes.set(title=name, xlabel="right, of 1,064", xlim=(-20, 520))
both[1].set_yticklabels([])
for name, color in (("by hand", "0.5"), ("with vectors", COLORS[0])):
    both[1].plot([], [], "o", color=color, label=name)
both[1].legend(loc="upper right")
plt.show()
""", tags=["hide-input"], title="Figure: four wordings, by hand in grey, with vectors in blue", id="wordings", alt="Right of 1,064 cities for four wordings, among countries and over the whole vocabulary. By hand, in grey: «N, N, N, N» among countries and «N» over the vocabulary. With vectors, in blue: «N to N» and «N to N».")
code(r"""
spread = {}
for way in ("among countries", "hits"):
    by_hand = [runs[f"wording/{n}/by hand"][way].count("1") for n in range(4)]
    added = [
        sum(runs[f"wording/{n}/{s}"][way].count("1") for s in range(3)) / 3
        for n in range(4)
    ]
    spread[way] = [max(x) - min(x) for x in (by_hand, added)]
    print(way, by_hand, [round(x) for x in added], spread[way])
# RANGES WAIT FOR THE RECORD
""", tags=["hide-cell"], title="✓ «The wordings come together, or not»", id="wordings-check")
md(r"""
Over the whole vocabulary our model has «0 to 7» of 1,064 right by hand. It answers *the* and not a country [[note 3]](#notes). Among countries it has «A, B, C and D»: it knows more than it says. With
vectors all four have «RANGE» right, «RANGE» among countries. «WORDS: the difference between the best and the worst falls from … to …».

So added vectors repair a wording. «They do not reach / reach» the better sentence *The city of [X] is in the country of*, which has 307 by hand and 364 with vectors.

## Which network?

Now the encoder alone changes, without words and beside the handcrafted prompt. Each kind has its own sweep and three seeds:
""", id="wordings-text")
code(r"""
kinds = {
    "no network": ("prompt tuning", "vectors beside the prompt"),
    "MLP": ("P-tuning, MLP", "MLP beside the prompt"),
    "BiLSTM and MLP": ("P-tuning, BiLSTM", "P-tuning beside the prompt"),
}
columns = {}
for name, (bare, beside) in kinds.items():
    bare = of_ledger(bare)
    beside = of_ledger(beside) if beside.startswith("P-") else best_of(beside)
    columns[name] = (bare, beside)
ablation = {}
for name, of_both in columns.items():
    ablation[name] = {}
    for place, hits_here, plain in zip(
        ("no words", "beside"), of_both, columns["no network"], strict=True
    ):
        mean = sum(one.count("1") for one in hits_here) / 3
        ablation[name][place] = f"{mean:.0f}"
        ablation[name][f"{place}, over none"] = (
            "" if hits_here is plain else difference(hits_here, plain)
        )
pd.DataFrame(ablation).T
""", tags=["hide-input"], title="Table: right of 1,064, by encoder", id="ablation")
code(r"""
assert ablation["MLP"]["no words, over none"] == "+9 (-18 to +38)"
assert (
    ablation["BiLSTM and MLP"]["no words, over none"] == "-56 (-82 to -28)"
)
assert ablation["BiLSTM and MLP"]["beside"] == "364"
# RANGES WAIT FOR THE RECORD
print("without words the MLP and plain vectors cannot be told apart")
""", tags=["hide-cell"], title="✓ Without words the MLP and plain vectors cannot be told apart", id="ablation-check")
md(r"""
Without words, these cities cannot tell the MLP from plain vectors, and the BiLSTM is behind both. Beside the prompt «RESULT: plain «N», MLP «N», BiLSTM 364; what the intervals tell».

The paper's final version reports another picture: LSTM and MLP work well in general, and plain vectors are unstable and can be much worse. «Ours were not: … .» We
swept the rate of each. For plain vectors the good rates lie near 1, a hundred times those of a network or more. At a usual rate of 0.0001 they have 2 of 200 dev cities.

**This book's start.** `PromptEncoder(…, start=H)` adds its output to given vectors $H$, and its last layer begins at zero. So training begins exactly at a handcrafted prompt. The
ledger's row has 373. Plain vectors from the same start have 366: ahead by 7, with an interval from 16 fewer to 30 more.

## In front, among the words, or in every layer

Four methods have names that are much alike. They differ in where the vectors stand:
""", id="ablation-text")
code(r"""
drawings.four_places()
""", tags=["hide-input"], title="Drawing: where four methods put their vectors", id="four-places", alt=drawings.four_places().alt)
md(r"""
**Prefix tuning** (Li and Liang, 2021) puts nothing among the words. In every layer it adds trained keys and values in front of those of the text. Each
token of the text may look at them. An MLP makes them in training and then goes, as P-tuning's encoder does. It was made for
writing, with GPT-2 and BART.

**P-tuning v2** (Liu et al., 2021b) is not P-tuning with a new network. It is prefix tuning, with the MLP or without it, for tasks of understanding. Its authors report that it
matches the training of all weights in models of ordinary size. Six such places have 69,120 numbers here, twenty times our six vectors. [Laboratory 4](lab/4-p-tuning.ipynb) builds both in a few lines, compares them
with peft, and trains both.

## When P-tuning, when LoRA?
""", id="places-text")
code(r"""
compared = ["asked", "prompt tuning, from the prompt"]
compared += ["P-tuning beside the prompt", "P-tuning, from the prompt", "LoRA"]
ledger(
    [row for row in recorded["rows"] if row["method"] in compared],
    columns=("right", "continents", "kept a task", "minutes", "memory"),
)
""", tags=["hide-input"], title="The ledger: three prompts, and LoRA", id="when")
code(r"""
lora, softened = of_ledger("LoRA"), of_ledger("P-tuning, from the prompt")
assert difference(lora, softened) == "+48 (+26 to +70)"
plain = of_ledger("prompt tuning, from the prompt")
assert difference(softened, plain) == "+7 (-16 to +30)"
assert difference(of_ledger("P-tuning beside the prompt"), plain) == (
    "-3 (-23 to +18)"
)
by_name = {row["method"]: row for row in recorded["rows"]}
assert round(by_name["LoRA"]["continents"]) == 42
assert round(by_name["P-tuning, from the prompt"]["continents"]) == 106
print("LoRA has 48 more cities right (26 to 70), and 64 continents less")
""", tags=["hide-cell"], title="✓ LoRA has 48 more cities right, and 64 continents fewer", id="when-check")
md(r"""
**LoRA** is chapter 6's method: it changes the model itself, by thin matrices. It has 48 more cities right, with an interval from 26 to 70, and it needs about as many
minutes. Take it when the task is worth megabytes and you want all that training can bring.

Take a prompt when the model must stay as it is. Continents tell: 106 with any prompt, 42 under LoRA, on countries that nobody trained on. A prompt is 500
times smaller, and in one batch each question may bring its own.

And P-tuning or plain vectors? From a handcrafted prompt our facts cannot tell them apart. Begin with plain vectors, at a rate that you have swept. Add the MLP if they are unstable. Where
you have no sentence to begin at, the ledger gives no reason for the BiLSTM.

## Pitfalls

**peft's P-tuning is another encoder, in another place.** Its default is an MLP of three layers, and all its vectors stand in front:
""", id="when-text")
code(r"""
default = PeftEncoder(PromptEncoderConfig(**sizes))
print(*(type(layer).__name__ for layer in default.mlp_head))
assert not hasattr(default, "lstm_head")
""", id="peft-default")
md(r"""
The paper's encoder needs `encoder_reparameterization_type="LSTM"` and `encoder_hidden_size` at half of the model's, as in the check above. The places among
the words you do not get.

**Give each encoder a sweep of its own.** At a rate of 0.03 the MLP has 58 of 200 dev cities, and the BiLSTM 21. At 0.0001 they have 57 and 51, and plain vectors
2. One rate for all would have compared rates, and not methods:
""", id="peft-default-text")
code(r"""
table = {}
for method in ("prompt tuning", "P-tuning, MLP", "P-tuning, BiLSTM"):
    swept = [recorded[k] for k in recorded if k.startswith(f"sweep/{method}/")]
    table[method] = {run["lr"]: round(200 * run["dev"]) for run in swept}
dev = pd.DataFrame(table).T.sort_index(axis=1)[[1e-4, 1e-3, 1e-2, 3e-2, 1.0]]
assert dev[0.03][1:].tolist() == [58, 21]
assert dev[0.0001].tolist() == [2, 57, 51]
dev.rename(columns="{:g}".format).astype("Int64").astype(str)
""", tags=["hide-input"], title="Table: right of 200 on dev, by rate; <NA> was not tried", id="sweeps")
md(r"""
## Yours

Give a file of your own: 20 lines or more, each `{"subject": …, "answer": …}`. `yours` keeps your sentence, adds six vectors beside it, and prints your row:
""", id="yours-text")
code(r"""
MINE = None  # e.g. "languages.jsonl"
if MINE:
    ASK = "The official language of [X] is [Y]."
    yours(MINE, "P-tuning beside the prompt", ASK)
""", id="yours")
md(r"""
At work `recipes/tune.py`, in this book's repository, does the run by peft, from a file of settings. `languages-p-tuning.yaml` is one to copy, and these lines are P-tuning's:

```yaml
method: P-tuning
vectors: 8        # in front of the question
encoder: MLP      # peft's three layers; LSTM is the paper's
rates: [3.0e-3, 1.0e-2, 3.0e-2]
```

## Exercises

Each has a [solution](solutions/4-p-tuning.ipynb). Train by `train`, for 40 steps, half a minute a run. Without a `score` it keeps the last state.

1. **Who depends on whom?** (easy, 10 minutes, no training). Write `depends(encoder)`, a (length, length) table of bools: does vector $h_j$ depend on row $s_k$? Use gradients;
   `check_depends(depends)` from `tuning.checks` tests it. What do you find with and without the LSTM? Without it, one step of SGD on a loss of $h_0$ alone moves how many vectors, and how many if they are plain?
2. **Spread the start** (medium, 30 minutes). Write `spread(vectors, length)`, which moves vectors to mean zero and stretches them by one factor until their mean length is `length`. `check_spread(spread)` tests it. Put it
   behind the BiLSTM, with the shift and the factor of the start kept fixed, at the length of words, and train at the rates 0.00003, 0.0003 and 0.003. How many of 200 dev cities are right, and how many without the spread at 0.0003?
3. **An anchor** (medium, 30 minutes). The paper calls a word that stays among the vectors an anchor. Train the MLP encoder in *[P][P][P] [X] [P] country[P] [Y].* and with *the* in the place of *country*, two seeds each. Does the word
   help? Why is *the* a fairer control than no word at all?
4. **A batch with a deep prompt** (medium, 20 minutes; with laboratory 4). Write `deep_inputs(mask, length)`: from the tokens' mask (batch, seq), padded on the left, the whole mask with `length` ones in front, and the tokens' position ids,
   which count those places and no padding. `check_deep_inputs(deep_inputs)` tests it. Show that a city's logits behind a random deep prompt do not depend on the others in its batch, and that without the position ids they do.
5. **A start of zeros** (hard, 25 minutes). With `start` zero in all eight places of the softened prompt, the gradient is no number. Show it. What does RMSNorm, $x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$ with $\epsilon = 10^{-5}$, do to the gradient of a vector of zeros,
   and how often does that happen on the way back? Does it still happen if one word stands in front?

## What to remember

- P-tuning writes all vectors of a prompt by one small network. The network is a way to train, and only the vectors are kept.
- Its vectors may stand anywhere, alone around the subject or beside handcrafted words.
- «The start or the steps: the BiLSTM's six vectors begin as nearly one.» Look at where an encoder begins before you judge it.
- «With a rate of its own for each, no network beat plain vectors here by more than chance can explain.» The paper reports otherwise for its tasks.
- Prompt tuning and P-tuning act at the input, prefix tuning and P-tuning v2 in every layer. LoRA gains more, and changes the model.

## Notes

1. The paper, *GPT Understands, Too*, has two versions on arXiv, of 2021 and 2023. The first has pseudo tokens in place of the prompt, the BiLSTM and its two reasons. The final version adds vectors to handcrafted words, and compares LSTM, MLP and no network.
   This chapter says which it means.
2. The authors' code for these facts uses Adam at 0.00001 with weight decay 0.0005, batches of 8 and a rate that falls by 2 % each pass, for at most 100 passes, and stops after 20 without a gain on dev. Its code for few-shot tasks has a wider LSTM, and trains the
   language model too.
3. By default their code takes the likeliest word of a list that several models' vocabularies share, from which stop words such as *the* are taken out. Our laboratory counts among such words as well. What the
   four wordings say over the whole vocabulary stands there too.

**Sources.** [Liu et al. 2021](https://arxiv.org/abs/2103.10385) (P-tuning, both versions), and the authors'
[code](https://github.com/THUDM/P-tuning);
[Li and Liang 2021](https://arxiv.org/abs/2101.00190) (prefix tuning);
[Liu et al. 2021b](https://arxiv.org/abs/2110.07602) (P-tuning v2);
[Lester et al. 2021](https://arxiv.org/abs/2104.08691) (prompt tuning).
""", id="end")
write("/tmp/w/ch4/4-p-tuning.ipynb")
