import sys; sys.path.insert(0, "/tmp/w")
from nb import md, code, setup, write
sys.path.insert(0, "/tmp/w/ch4")
from libsrc import lib

md(r"""
# Laboratory 4: Prompts in every layer, and encoders at work

*What changes when a prompt reaches into every layer, why does prefix tuning want a network, and what becomes of P-tuning's vectors in training?*

These are the builds and the controls behind [chapter 4](../4-p-tuning.ipynb). Run the cells in order, and read what interests you. What is trained here is recorded; the cells that build and compare run live.
""")
setup("book/2-lora/6-lora.ipynb")
code(r"""
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from transformers import DynamicCache
from tuning.data import TEMPLATES
from tuning.evaluate import difference
from tuning.experiments.record import load_results, provenance_line
from tuning.models import load_lm
from tuning.p_tuning import PromptVectors, prompt_logits
from tuning.plots import figure

model, tokenizer = load_lm(dtype=torch.float32)
model.requires_grad_(False)
recorded = load_results("p_tuning")
print(provenance_line(recorded))
runs = recorded["results"]
ledger = load_results("ledger")["results"]
ASK = "The city of [X] is in the country of [Y]."
""", tags=["hide-cell"], title="Imports, the model, the recorded runs")

md(r"""
## Keys and values without a token

**A prompt in every layer is a cache that we fill ourselves. With peft's weights ours gives peft's logits, plain and through the MLP.**

In attention every token asks with a *query*. It offers a *key*, by which it is found, and a *value*, which is taken. transformers keeps keys and values of what it
has read in a cache: a pair of tensors for each layer, (batch, heads, seq, head size). A **deep prompt** is such a pair for places where no token stands. How many
numbers are that?
""")
code(lib("p_tuning", "prefix_shape"))
code(r"""
from tuning.p_tuning import prefix_shape

shape = prefix_shape(model, 6)
print(shape, "(length, layers, key and value, heads, head size)")
print(f"{torch.Size(shape).numel():,} numbers; at the input {6 * 576:,}")
""")
md(r"""
Twenty times as many as six vectors at the input. Now a model that finds them in front of every text. Three things have to fit: the cache, a mask that lets the text look at
it, and positions that begin behind it.
""")
code(lib("p_tuning", "Prefixed"))
md(r"""
Each pass needs a cache of its own, since the model appends the text's keys and values to it. What fills it may be plain numbers, and then `PromptVectors` of chapter 3 holds them, with more numbers than
before. That is P-tuning v2's way. Prefix tuning makes them by a network:
""")
code(lib("p_tuning", "PrefixEncoder"))
md(r"""
The check, for both kinds, in a batch whose first row is padded:
""")
code(r"""
from peft import PrefixTuningConfig, get_peft_model
from tuning.p_tuning import Prefixed, PrefixEncoder

texts = [" Paris is in", " New York City is in"]
batch = tokenizer(
    texts, padding=True, padding_side="left", return_tensors="pt"
).to(model.device)
places = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}
for projection in (False, True):
    told = PrefixTuningConfig(prefix_projection=projection, **config)
    theirs = get_peft_model(model, told)
    weights = theirs.prompt_encoder["default"].state_dict()
    if projection:
        ours = PrefixEncoder(shape)
        renamed = {k.replace("transform", "mlp"): weights[k] for k in weights}
        ours.load_state_dict(renamed)
    else:
        ours = PromptVectors(weights["embedding.weight"].view(shape))
    found = Prefixed(model, ours.to(model.device))(
        batch.input_ids, batch.attention_mask, places
    )
    expected = theirs(**batch, position_ids=places)
    torch.testing.assert_close(found.logits[:, -1], expected.logits[:, -1])
    count = sum(weight.numel() for weight in ours.parameters())
    print(f"MLP {projection}: {count:,} numbers trained, peft's logits")
""")
md(r"""
The network is thrown away after training, as in P-tuning. It has 2,261,568 numbers here, and 69,120 are kept either way.

**The start that says nothing new.** What if the prefix holds the keys and values of real words? Then the model must answer as if these words stood there:
""")
code(r"""
front = tokenizer("The city of", return_tensors="pt").to(model.device)
with torch.no_grad():
    cache = model(**front, use_cache=True).past_key_values
layers = torch.stack([torch.cat(layer[:2]) for layer in cache])
own = layers.permute(3, 0, 1, 2, 4)  # (tokens, layers, 2, heads, size)
cities = ["Osaka", "Rio de Janeiro"]
behind = "[X] is in the country of [Y]."
spaced = [" " + city for city in cities]  # as after a word
prefixed = Prefixed(model, PromptVectors(own))
found = prompt_logits(prefixed, tokenizer, behind, spaced)
expected = prompt_logits(model, tokenizer, ASK, cities)
torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
print("a prefix made of words says what the words say")
""")
md(r"""
That is a start that Li and Liang recommend: the activations of real words. A random start disturbs a model that could already answer.

## How long is a key?

**The model's own keys are longer than any of the two starts, and its values lie between them.**

An embedding layer of torch begins with standard normal numbers, in peft's plain prefix and in the authors' code of P-tuning v2. The MLP begins at much smaller ones. And words?
""")
code(r"""
def lengths(prefix):  # the mean over places, layers and heads
    return prefix.norm(dim=-1).mean(dim=(0, 1, 3)).tolist()


torch.manual_seed(0)
kinds = {
    "the words' own": own,
    "plain, at the start": torch.randn(shape),
    "MLP, at the start": PrefixEncoder(shape)().detach(),
}
sizes = {
    name: dict(zip(("keys", "values"), lengths(prefix), strict=True))
    for name, prefix in kinds.items()
}
pd.DataFrame(sizes).T.round(1)
""")
code(r"""
assert abs(sizes["plain, at the start"]["keys"] - 8) < 0.2  # the root of 64
assert sizes["MLP, at the start"]["keys"] < 3
assert sizes["the words' own"]["keys"] > 10
assert 3 < sizes["the words' own"]["values"] < 8
print("plain ones begin at a length of 8, the MLP's below 3")
""", tags=["hide-cell"], title="✓ Plain ones begin at a length of 8, the MLP's below 3")
md(r"""
A vector of 64 standard normal numbers has a length of 8. The words' own keys have «KEYS», and their values «VALUES». So plain numbers are too short as keys and too long as values, and the MLP's are too short as both.

## Deep prompts, trained

**«RESULT»**

Six places in front of the handcrafted prompt, whose words stay. Three ways to fill them: plain numbers, the MLP, and as a control plain numbers that begin where that MLP begins. Each
has its own sweep on dev:
""")
code(r"""
deep = ("plain", "MLP", "plain from the MLP's start")
fig, axes = figure(
    "«TITLE: sweeps of deep prompts»", "rate", "right on dev, of 200"
)
swept = {}
for kind in deep:
    found = [
        run
        for key, run in runs.items()
        if key.startswith(f"deep, {kind}/") and key.endswith("/0")
    ]
    swept[kind] = {run["lr"]: round(200 * run["dev"]) for run in found}
    axes.plot(*zip(*sorted(swept[kind].items()), strict=True), label=kind)
axes.axhline(53, color="0.5", ls="--", label="the prompt in words")
axes.set(xscale="log", ylim=(0, 80))
axes.legend(loc="lower center")
plt.show()
""", tags=["hide-input"], title="Figure: deep prompts by rate", alt="Right on dev, of 200, over the rate, on a logarithmic axis, for three deep prompts. Plain: «N to N». MLP: «N to N». Plain from the MLP's start: «N to N». The prompt in words: 53.")
code(r"""
def of_ledger(method):
    return [ledger[f"run/{method}/{seed}"]["hits"] for seed in range(3)]


def best_of(kind):
    lr = max(swept[kind], key=swept[kind].get)
    return lr, [runs[f"deep, {kind}/{lr:g}/{seed}"] for seed in range(3)]


asked = [ledger["asked"]["hits"]] * 3
beside = of_ledger("P-tuning beside the prompt")
table = {}
for name, hits, rate, trained, kept in (
    ("asked", asked, "", 0, 0),
    ("P-tuning beside the prompt", beside, 0.003, 4_658_688, 3_456),
    *(
        (f"deep, {kind}", [run["hits"] for run in best_of(kind)[1]],
         best_of(kind)[0], best_of(kind)[1][0]["trained"],
         best_of(kind)[1][0]["kept"])
        for kind in deep
    ),
):
    table[name] = {
        "right, of 1,064": round(sum(h.count("1") for h in hits) / 3),
        "over asking": "" if hits is asked else difference(hits, asked),
        "over beside": "" if trained in (0, 4_658_688)
        else difference(hits, beside),
        "rate": rate,
        "trained": f"{trained:,}" if trained else "",
        "kept": f"{kept:,}" if kept else "",
    }
pd.DataFrame(table).T
""", tags=["hide-input"], title="Table: deep prompts on new cities, three seeds each")
code(r"""
assert table["asked"]["right, of 1,064"] == 307
assert {row["kept"] for row in list(table.values())[2:]} == {"69,120"}
# RANGES WAIT FOR THE RECORD
""", tags=["hide-cell"], title="✓ «»")
md(r"""
«1. Plain against MLP. 2. The control: same start, no network. So is it the network or its start? 3. Against P-tuning beside the prompt: is depth worth twenty times the numbers?»

Li and Liang found direct training unstable: it hung on rate and start, and ended a little lower. So they train through the MLP. The authors of P-tuning v2 report that the MLP's
use depends on the task. «What our three rows say of it.» One task and one model do not settle it.

## What becomes of the vectors

**«RESULT»**

Chapter 4's encoders begin at unlike places. The recorded runs kept how long the vectors are and how far apart, after each fifth of the training:
""")
code(r"""
fig, axes = figure(
    "«TITLE: distances in training»", "step", "distance from each other"
)
rates = {
    "MLP": f"MLP, long/{0.01:g}/0",
    "BiLSTM": f"BiLSTM, long/{0.0003:g}/0",
}
for name, key in rates.items():
    run = runs[key]
    steps = [step for step, _ in run["scores"]]
    apart = [look["apart"] for look in run["looks"]]
    axes.plot(steps, apart, label=f"{name}, four times as long")
axes.axhline(runs["words"]["apart"], color="0.5", ls="--", label="two words")
axes.set(yscale="log")
axes.legend()
plt.show()
""", tags=["hide-input"], title="Figure: how far apart six vectors are", alt="The mean distance of six vectors from each other over 600 steps, on a logarithmic axis. The MLP's begin at 6.7 and end at «N», the BiLSTM's begin at 0.2 and end at «N». Two words are 3.4 apart.")
code(r"""
# RANGES WAIT FOR THE RECORD
assert round(runs["words"]["apart"], 1) == 3.4
assert runs["BiLSTM, long/0.0003/0"]["looks"][0]["apart"] < 0.3
print("the BiLSTM begins at 0.2, two words are 3.4 apart")
""", tags=["hide-cell"], title="✓ «»")
md(r"""
«TEXT: where each ends; the BiLSTM at the end is … apart.»

## Four wordings, counted in three ways

**«RESULT»**

The authors' code takes the likeliest word of a list that several models share, without stop words and punctuation. Their list is not part of this book. Ours is made in the same spirit: whole
words of our vocabulary, with stop words left out. So we count among all tokens, among words, and among the 122 countries:
""")
code(r"""
ways = {
    "hits": "all tokens",
    "among words": "among words",
    "among countries": "among countries",
}
counted = {}
for number, wording in enumerate(TEMPLATES["P17"][:4]):
    short = wording.removesuffix(" [Y].").removeprefix("[X] is located ")
    alone = runs[f"wording/{number}/by hand"]
    added = [runs[f"wording/{number}/{seed}"] for seed in range(3)]
    counted[short, "by hand"] = {
        title: alone[way].count("1") for way, title in ways.items()
    }
    counted[short, "with vectors"] = {
        title: round(sum(run[way].count("1") for run in added) / 3)
        for way, title in ways.items()
    }
pd.DataFrame(counted).T
""", tags=["hide-input"], title="Table: right of 1,064, by wording")
code(r"""
for number in range(4):
    said = runs[f"wording/{number}/by hand"]["said"]
    print(number + 1, *(f"{token!r} {count}" for token, count in said))
""")
code(r"""
# RANGES WAIT FOR THE RECORD
table_of = pd.DataFrame(counted)
assert (table_of.loc["all tokens"] <= table_of.loc["among words"]).all()
assert (table_of.loc["among words"] <= table_of.loc["among countries"]).all()
print("fewer rivals, never fewer right")
""", tags=["hide-cell"], title="✓ Fewer rivals, never fewer right")
md(r"""
The lines show what the model says most often behind each wording by hand, over all tokens. «Behind *located in* it says *the*; to leave stop words out brings …; to let only countries compete brings …»

## Every sweep of chapter 4

Each kind has its own rates, down to hardly any learning and up to failure, and dev chooses:
""")
code(r"""
rows = {}
for kind in dict.fromkeys(key.split("/")[0] for key in runs):
    found = {
        run["lr"]: round(200 * run["dev"])
        for key, run in runs.items()
        if key.startswith(f"{kind}/") and key.endswith("/0") and "lr" in run
    }
    if kind in ("words", "wording"):
        continue
    best = max(found, key=found.get)
    rows[kind] = {
        "rates": len(found),
        "lowest": f"{min(found):g}: {found[min(found)]}",
        "chosen": f"{best:g}: {found[best]}",
        "highest": f"{max(found):g}: {found[max(found)]}",
    }
pd.DataFrame(rows).T
""", tags=["hide-input"], title="Table: rates and right of 200 on dev")
md(r"""
The long runs have three rates each, around the one that the ledger's sweep chose.

**Sources.** [Li and Liang 2021](https://arxiv.org/abs/2101.00190) (prefix tuning); [Liu et al. 2021](https://arxiv.org/abs/2103.10385) (P-tuning), and the authors'
[code](https://github.com/THUDM/P-tuning); [Liu et al. 2021b](https://arxiv.org/abs/2110.07602) (P-tuning v2), and its [code](https://github.com/THUDM/P-tuning-v2).
""")
write("/tmp/w/ch4/lab4.ipynb")
