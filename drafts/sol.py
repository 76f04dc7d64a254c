import sys, os
sys.path.insert(0, "/tmp/w")
from nb import md, code, setup, write
os.chdir("/work/c5")

md("""
# Solutions to chapter 5

One solution for each exercise of [chapter 5](../5-four-ways.ipynb). Each begins with its answer. Sums are rounded in another order on
another machine, and twenty steps of training make visible differences of that: your counts may be others. What should stay is what the
asserts say. All runs together take about «eight» minutes on two cores.
""", id="title")
setup("book/2-lora/6-lora.ipynb")
code("""
import copy
import random
from collections import Counter

import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch.nn.utils import clip_grad_norm_
from tuning.checks import check_lm_loss, sized
from tuning.data import load_reviews, load_wic
from tuning.evaluate import (
    bootstrap_interval,
    difference,
    facts_with_ids,
    hits_at_1,
    perplexity,
)
from tuning.models import load_lm
from tuning.p_tuning import PromptEncoder, answer_loss, prompt_logits

model, tokenizer = load_lm(dtype=torch.float32)
model.model.layers = model.model.layers[: sized(None, 2)]  # all; in tests two
model.requires_grad_(False)
STEPS, LIMIT = sized(20, 1), sized(None, 4)
CAPITAL = "The city of [X] is the capital of [Y]."
BARE = "<|endoftext|> [X] [Y]."
capitals = facts_with_ids(tokenizer, "P1376", limit=LIMIT)
""", ["hide-cell"], "Imports, model and data", id="imports")
md("""
The chapter's `fit`, with the facts as an argument, and with `extra`, which exercise 4 adds to the loss. Three short functions build on it.
""", id="fit-text")
code("""
def fit(parts, lm, template, facts, vectors=lambda: None, size=16, extra=None):
    groups = [{"params": [*part.parameters()], "lr": lr} for part, lr in parts]
    weights = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, STEPS)
    random.seed(0)
    for _ in range(STEPS):
        batch = random.sample(facts["train"], min(size, len(facts["train"])))
        loss = answer_loss(lm, tokenizer, template, batch, vectors())
        loss = loss + extra(lm) if extra else loss
        loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def with_vectors(template):  # the template, and a fresh encoder
    before, after = template.split(" [Y]")
    torch.manual_seed(0)
    encoder = PromptEncoder(6, model.config.hidden_size).to(model.device)
    return f"[P][P][P] {before}[P][P][P] [Y]{after}", encoder


def fine_tuned(template, facts, extra=None):  # a copy of the model
    tuned = copy.deepcopy(model).requires_grad_(True)
    fit([(tuned, 1e-4)], tuned, template, facts, extra=extra)
    return tuned.requires_grad_(False)


def text(hits):  # as `difference` takes them
    return "".join(str(int(hit)) for hit in hits)
""", id="fit")
md("""
## Exercise 1. A common answer

**«Three of the four: the manual prompt, P-tuning, and fine-tuning with the prompt are still right for most of the countries that do not speak English. Fine-tuning without a
prompt is right for … of 37.»**
""", id="one")
code("""
LANGUAGE = "In [X], the official language is [Y]."
facts = facts_with_ids(tokenizer, "P37", limit=LIMIT)
answers = torch.tensor([answer for _, answer in facts["test"]])
((frequent, _),) = Counter(a for _, a in facts["train"]).most_common(1)


def given(lm, template, vectors=None):  # (facts,) token ids
    logits = prompt_logits(lm, tokenizer, template, facts["test"], vectors)
    return logits.argmax(dim=1)


beside, encoder = with_vectors(LANGUAGE)
fit([(encoder, 3e-3)], model, beside, facts, encoder)
ways = {
    "most frequent answer": torch.full_like(answers, frequent),
    "manual prompt": given(model, LANGUAGE),
    "P-tuning": given(model, beside, encoder()),
    "fine-tuning": given(fine_tuned(BARE, facts), BARE),
    "prompt, fine-tuning": given(fine_tuned(LANGUAGE, facts), LANGUAGE),
}
others = answers != frequent
table = {}
for way, found in ways.items():
    table[way] = {
        f"right, of {len(answers)}": int((found == answers).sum()),
        f"others, of {others.sum()}": int((found == answers)[others].sum()),
        "says it to others": int((found[others] == frequent).sum()),
    }
table = pd.DataFrame(table).T
print("most frequent:", tokenizer.decode([frequent]).strip())
table
""", ["nbval-ignore-output"], id="one-run")
code("""
everything, other, says = (table[column] for column in table)
assert other["most frequent answer"] == 0
assert says["most frequent answer"] == others.sum()
if sized(True, False):
    assert other["manual prompt"] > 20 and other["fine-tuning"] < 15
print("always saying it has none of the others")
""", ["hide-cell"], "✓ Always the most frequent answer has none of the others", id="one-check")
md("""
The most frequent answer is right for a fifth of all, and by its making for none of the others. So what a way has there is not that guess. «…» Whether it *knows* is still not
certain: another common answer can be guessed too, and some countries are named like their language. The manual prompt is the measure,
for nothing was trained, and no training answer is in what it says.

The last column counts countries to which the common answer is given and where it is wrong. «Training makes it more frequent: …»

## Exercise 2. Two rates

**«At 0.0001 for both, the vectors move by … % of their length, and with a rate of their own by … %. On the 40 capitals … right.»** At one rate, "both" is nearly fine-tuning
with random vectors beside the prompt.
""", id="two")
code("""
rows, hits = {}, {}
for lr in sized((1e-4, 3e-3), (1e-4,)):
    beside, encoder = with_vectors(CAPITAL)
    start = encoder().detach()
    tuned = copy.deepcopy(model).requires_grad_(True)
    parts = [(tuned, 1e-4), (encoder, lr)]
    fit(parts, tuned, beside, capitals, encoder)
    far = ((encoder() - start).norm(dim=1) / start.norm(dim=1)).mean().item()
    tuned.requires_grad_(False)
    logits = prompt_logits(
        tuned, tokenizer, beside, capitals["test"], encoder()
    )
    del tuned
    hits[lr] = text(hits_at_1(logits, [a for _, a in capitals["test"]]))
    right = hits[lr].count("1")
    rows[lr] = {"moved, of their length": far, "right": right}
both = pd.DataFrame(rows).T.rename_axis("encoder's rate")
if len(hits) == 2:
    print("own rate against one rate:", difference([hits[3e-3]], [hits[1e-4]]))
both.round(2)
""", ["nbval-ignore-output"], id="two-run")
code("""
moved = both["moved, of their length"]
assert (moved > 0).all()
if sized(True, False):
    assert moved[3e-3] > 3 * moved[1e-4]
print("with a rate of their own the vectors go further")
""", ["hide-cell"], "✓ With a rate of their own the vectors go further", id="two-check")
md("""
Adam moves a number by about the rate in each step, and the weights' rate is a thirtieth of the encoder's. «…» The vectors go through the encoder, so they need not move in proportion.

## Exercise 3. How many facts?

**«Two are enough over the vocabulary: the gain is … (… to …). Among countries no number of facts brings a gain whose interval leaves out zero.»** So the
facts teach the form of the answer.
""", id="three")
code("""
countries = sorted({a for part in capitals.values() for _, a in part})
answers = [answer for _, answer in capitals["test"]]


def scores(template, vectors=None):
    test = capitals["test"]
    logits = prompt_logits(model, tokenizer, template, test, vectors)
    among = hits_at_1(logits, answers, countries)
    return {"vocabulary": hits_at_1(logits, answers), "countries": among}


by_hand, gains = scores(CAPITAL), {}
for n in sized((2, 4, 8, 57), (2,)):
    some = {"train": capitals["train"][:n]}
    beside, encoder = with_vectors(CAPITAL)
    fit([(encoder, 3e-3)], model, beside, some, encoder, size=2)
    for among, hits in scores(beside, encoder()).items():
        gain = hits.double() - by_hand[among].double()
        low, high = bootstrap_interval(gain)
        gains[n, among] = {"gain": gain.mean().item(), "low": low, "high": high}
few = (len(answers) * pd.DataFrame(gains).T).rename_axis(["facts", "among"])
print({among: int(hits.sum()) for among, hits in by_hand.items()}, "by hand")
few.round(1)
""", ["nbval-ignore-output"], id="three-run")
code("""
assert (few["low"] <= few["gain"]).all()
if sized(True, False):
    gain = few["gain"].unstack()
    assert (gain["vocabulary"] > gain["countries"]).all()
print("the gain is larger over the vocabulary")
""", ["hide-cell"], "✓ The gain is larger over the vocabulary than among countries", id="three-check")
md("""
Counts of 40 capitals. Every single fact says that a country is asked for. Among countries that much is given, and only what the model knows of the capital
counts. «57 facts in batches of two: twenty steps read forty of them.» One training each; the order of these rows says nothing.

## Exercise 4. Less harm elsewhere

**«The added loss keeps the perplexity down, of both kinds of sentences, and brings back only a part of the continents: … of … at a weight of 1. The capitals pay nothing.»**
""", id="four")
code("""
def lm_loss(logits, input_ids, mask):
    labels = input_ids.masked_fill(mask == 0, -100)[:, 1:]  # (batch, seq - 1)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


check_lm_loss(lm_loss)
""", id="four-loss")
md("""
Each weight draws the same sentences. Those that are measured are others.
""", id="four-text")
code("""
sentences = load_wic()["train"]["sentence1"][:]
plain = load_wic()["test"]["sentence1"][: sized(60, 2)]
film = load_reviews()["test"]["sentence"][: sized(100, 2)]
ELSE = "[X] is located in the continent of [Y]."
others = facts_with_ids(tokenizer, "P30", limit=LIMIT)["test"]


def sentence_loss(weight):
    generator = random.Random(0)

    def loss(lm):
        drawn = generator.sample(sentences, sized(8, 2))
        options = {"padding_side": "right", "return_tensors": "pt"}
        batch = tokenizer(drawn, padding=True, **options).to(lm.device)
        logits = lm(**batch).logits
        return weight * lm_loss(logits, batch.input_ids, batch.attention_mask)

    return loss


def ask(lm):
    def right(template, rows):
        logits = prompt_logits(lm, tokenizer, template, rows)
        return int(hits_at_1(logits, [answer for _, answer in rows]).sum())

    return {
        "capitals": right(CAPITAL, capitals["test"]),
        "continents": right(ELSE, others),
        "these sentences": round(perplexity(lm, tokenizer, plain)),
        "reviews": round(perplexity(lm, tokenizer, film)),
    }
""", id="four-code")
code("""
rows = {"not trained": ask(model)}
for weight in sized((0, 0.1, 1), (1,)):
    extra = sentence_loss(weight) if weight else None
    rows[weight] = ask(fine_tuned(CAPITAL, capitals, extra))
harm = pd.DataFrame(rows).T.rename_axis("weight")
harm
""", ["nbval-ignore-output"], id="four-run")
code("""
assert (harm[["these sentences", "reviews"]] > 1).all(axis=None)
if sized(True, False):
    assert harm["continents"][0] < harm["continents"]["not trained"]
    assert harm["these sentences"][1] < harm["these sentences"][0]
    assert harm["reviews"][1] < harm["reviews"][0]
print("the added loss keeps both perplexities lower")
""", ["hide-cell"], "✓ The added loss keeps both perplexities lower", id="four-check")
md("""
«…» That the perplexity of these sentences falls below the untrained model's is no sign of less harm. It is a second training, on sentences of a dictionary. Reviews are the
fairer test. Continents are asked for in a sentence of the kind that the first loss trains on, and the added sentences say nothing of how
such a question is answered.

## Exercise 5. Many comparisons

**In three worlds of four at least one of 28 intervals leaves out zero, though nothing is better than anything. At a level of 99.8 % this happens about once in twenty.**
""", id="five")
code("""
generator = torch.Generator().manual_seed(0)
worlds, methods, items = sized(1000, 50), 28, 400
wins = torch.rand(worlds, methods, items, generator=generator) < 0.1
losses = torch.rand(worlds, methods, items, generator=generator) < 0.1
gaps = wins.float() - losses.float()  # one item better, or one worse
z = gaps.mean(dim=2) / (gaps.std(dim=2) / items**0.5)  # (worlds, methods)
for level in (0.95, 0.99, 0.998):
    bound = stats.norm.ppf((1 + level) / 2)
    found = (z.abs() > bound).any(dim=1).float().mean().item()
    exact = 1 - level**methods
    print(f"level {level}: {found:.2f} of worlds; 1 - {level}^28 = {exact:.2f}")
""", ["nbval-ignore-output"], id="five-run")
code("""
assert abs(1 - 0.95**28 - 0.76) < 0.005 and abs(1 - 0.998**28 - 0.05) < 0.005
needed = 0.95 ** (1 / 28)
assert 0.998 < needed < 0.9982
if sized(True, False):
    bound = stats.norm.ppf(0.975)
    found = (z.abs() > bound).any(dim=1).float().mean().item()
    assert abs(found - 0.76) < 0.06
print(f"needed: {needed:.4f}")
""", ["hide-cell"], "✓ A level of 0.998 for 28 comparisons", id="five-check")
md("""
Each interval leaves out zero in one world of twenty. That none of 28 does so has the probability 0.95²⁸ = 0.24, if they do not hang together. For 0.95 in all,
each needs the level 0.95^(1/28) = 0.998. Bonferroni's rule, a twentieth divided by 28, gives nearly the same.

The chapter's intervals do hang together: ways are compared with one manual prompt, on the same items. So the probability of a false one is less than 0.76, but the
expected number, 28 times a twentieth, is the same, for expectations add up whether things hang together or not.
""", id="five-end")
write("/tmp/w/ch5/sol-5.ipynb")
