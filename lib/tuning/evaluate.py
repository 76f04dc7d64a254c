"""What measures: which answers are right, losses and perplexity of texts, and intervals.

Everything here takes what a model gave, or a model as transformers has it; no method of the book is imported.
"""

import math
import random
from contextlib import suppress

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats

from .data import load_facts, load_wic
from .prompts import answer_id, answer_logits, encode, evaluating

__all__ = ["bootstrap_interval", "hits_at_1", "paired_interval"]


def hits_at_1(logits, answer_ids, candidates=None):
    """Which prompts give their answer the highest score; their mean is P@1 (precision at 1).

    Args:
        logits: (n, vocab_size); answer_ids: n token ids.
        candidates: token ids to choose among; the whole vocabulary if None.

    Returns:
        (n,) bool.
    """
    if candidates is not None:
        others = torch.ones(logits.shape[1], dtype=torch.bool)
        others[list(candidates)] = False
        logits = logits.masked_fill(others, -torch.inf)
    return logits.argmax(dim=1) == torch.as_tensor(answer_ids)


def share_right(logits, facts):
    """`hits_at_1` for (subject, answer's token id) pairs, over the whole vocabulary: (len(facts),) bool."""
    return hits_at_1(logits, [answer for _, answer in facts])


def bootstrap_interval(hits, rounds=2000, level=0.95, seed=0):
    """The percentile bootstrap interval of a mean, over items (by `scipy.stats.bootstrap`).

    Args:
        hits: (n,) bool or float, two at least; for a difference of two methods on the same items, the n differences.

    Returns:
        `(low, high)` floats.
    """
    values = torch.as_tensor(hits).double().numpy()
    options = {"n_resamples": rounds, "confidence_level": level, "method": "percentile"}
    found = stats.bootstrap([values], np.mean, **options, rng=np.random.default_rng(seed))
    return tuple(end.item() for end in found.confidence_interval)


def ratio_interval(losses, base, rounds=2000, level=0.95):
    """The ratio of two perplexities and its percentile bootstrap interval over texts, the same ones for both.

    Args:
        losses, base: (texts, 2) float64 each, from `text_losses`.

    Returns:
        `(ratio, low, high)` floats.
    """

    def ratio(total, count, base_total, base_count, axis=-1):
        return np.exp(total.sum(axis) / count.sum(axis) - base_total.sum(axis) / base_count.sum(axis))

    columns = [column.numpy() for found in (losses, base) for column in found.T]
    options = {"n_resamples": rounds, "confidence_level": level, "method": "percentile", "paired": True}
    found = stats.bootstrap(columns, ratio, **options, vectorized=True, rng=np.random.default_rng(0))
    return (ratio(*columns).item(), *(end.item() for end in found.confidence_interval))


def paired_interval(gains, same_items, rounds=2000, level=0.95, seed=0):
    """The percentile bootstrap interval of a mean gain over seeds and items: both are drawn anew in each round.

    Args:
        gains: one (n,) tensor a seed: for each item, how much better one method did than another.
        same_items: whether an item stands at the same place in every seed. It is then drawn for all seeds at once;
            else (repeated splits) each seed draws from its own items.

    Returns:
        `(low, high)` floats. Few seeds say little about seeds: with three, the interval is too narrow on that side.

    Raises:
        ValueError: the same items, but not as many of them in every seed.
    """
    if same_items and len({len(gain) for gain in gains}) > 1:
        counts = [len(gain) for gain in gains]
        raise ValueError(f"seeds with {counts} items cannot share them; pass same_items=False")
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(n, (n,), generator=generator)

    means = []
    for _ in range(rounds):
        shared = draw(len(gains[0]))
        drawn = [gains[k][shared if same_items else draw(len(gains[k]))] for k in draw(len(gains))]
        means.append(torch.cat(drawn).double().mean())
    tail = (1 - level) / 2
    low, high = torch.stack(means).quantile(torch.tensor([tail, 1 - tail]).double())
    return low.item(), high.item()


def as_hits(recorded):
    """Recorded hits, a text with 1 for each item that was right and 0 for each that was not, as (n,) float64."""
    return torch.tensor([int(hit) for hit in recorded]).double()


def as_text(hits):
    """Hits as they are recorded, a text such as "0110": what `as_hits` reads."""
    return "".join(str(int(hit)) for hit in hits)


def difference(one, other):
    """How many more of the same items one method has right than another, as a text with its interval of 95 %.

    Args:
        one, other: the recorded hits of each, a text a seed, as `as_hits` takes them.

    Returns:
        E.g. "+48 (+26 to +70)": items, the mean over seeds, and its `paired_interval`.

    Raises:
        ValueError: not as many seeds, or not as many items.
    """
    runs = [[as_hits(hits) for hits in method] for method in (one, other)]
    counts = [[len(hits) for hits in method] for method in runs]
    if counts[0] != counts[1] or len(set(counts[0])) != 1:
        raise ValueError(f"runs with {counts[0]} and {counts[1]} items cannot be paired; give the same items and seeds")
    gaps = [mine - theirs for mine, theirs in zip(*runs, strict=True)]
    low, high = paired_interval(gaps, same_items=True)
    n = counts[0][0]
    return f"{n * torch.cat(gaps).mean():+.0f} ({n * low:+.0f} to {n * high:+.0f})"


def p_at_1(hits):
    """P@1 with its interval, as a row: {"p_at_1", "low", "high", "n"}."""
    low, high = bootstrap_interval(hits)
    return {"p_at_1": hits.double().mean().item(), "low": low, "high": high, "n": len(hits)}


def accuracy(right):
    """Accuracy with its interval, as a row: {"accuracy", "low", "high", "n_test"}."""
    low, high = bootstrap_interval(right)
    return {"accuracy": right.double().mean().item(), "low": low, "high": high, "n_test": len(right)}


@torch.no_grad()
def predictions(classifier, rows, batch_size=64):
    """(n,) bool: which (text, label) rows a function from texts to logits (texts, classes) gets right."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))  # texts of like length waste little on padding
    right = torch.empty(len(rows), dtype=torch.bool)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        guesses = classifier([rows[row][0] for row in chosen]).argmax(dim=1).cpu()
        right[chosen] = guesses == torch.tensor([rows[row][1] for row in chosen])
    return right


def perplexity(model, tokenizer, texts, batch_size=16):
    """exp of the mean -log p of each token after the first of its text; None for a masked model."""
    if tokenizer.mask_token:
        return None
    total, count = text_losses(model, tokenizer, texts, batch_size).sum(dim=0).tolist()
    if not count:
        raise ValueError("no text has a second token to predict; give longer ones")
    return math.exp(total / count)


@torch.no_grad()
def text_losses(model, tokenizer, texts, batch_size=16):
    """(texts, 2) float64: for each text the sum of -log p of its tokens after the first, and their number.

    The model is in evaluation mode meanwhile.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("there are no texts to score; is the list empty?")
    found = []
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            chosen = [text or tokenizer.pad_token for text in texts[start : start + batch_size]]  # one token, no loss
            batch = tokenizer(chosen, padding=True, padding_side="right", return_tensors="pt").to(model.device)
            logits = model(**batch).logits[:, :-1].float()  # (batch, seq - 1, vocab)
            labels = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, -100)
            loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (batch, seq - 1)
            found.append(torch.stack([loss.sum(dim=1), (labels >= 0).sum(dim=1)], dim=1))
    return torch.cat(found).double().cpu()


def facts_with_ids(tokenizer, relation, fold=0, limit=None):
    """The splits of a relation as lists of (subject, answer's token id)."""
    return {
        split: [(s, answer_id(tokenizer, a)) for s, a in zip(rows["sub_label"], rows["obj_label"], strict=True)][:limit]
        for split, rows in load_facts(relation, fold).items()
    }


def most_frequent(answers):
    """The answer that occurs most often; of several the first in order."""
    return max(sorted(set(answers)), key=answers.count)


def balanced(rows, count, seed):
    """`count` of the (text, label) rows, half of label 0 and half of 1, drawn by `seed`; all if `count` is None."""
    if count is None:
        return rows
    generator = random.Random(seed)
    halves = [generator.sample([row for row in rows if row[1] == label], count // 2) for label in (0, 1)]
    drawn = halves[0] + halves[1]
    generator.shuffle(drawn)
    return drawn


UNTOUCHED = ("P30", "[X] is located in the continent of [Y].")  # what no page trains on


def one_token_facts(tokenizer, facts):
    """(subject, answer's token id) of the facts whose answer is one token for this model."""
    found = []
    for row in facts:
        with suppress(ValueError):
            found.append((row["sub_label"], answer_id(tokenizer, row["obj_label"])))
    return found


def untouched_hits(model, tokenizer, limit=None):
    """(n,) bool: the continents of countries, those that are one token of this tokenizer; `limit` countries at most."""
    relation, template = UNTOUCHED
    facts = [fact for rows in load_facts(relation).values() for fact in one_token_facts(tokenizer, rows)][:limit]
    if not facts:
        return torch.zeros(0, dtype=torch.bool)
    prompts = [encode(tokenizer, template, subject) for subject, _ in facts]
    return share_right(answer_logits(model, tokenizer, prompts), facts)


def elsewhere(model, tokenizer, limit=None):
    """What a model does where nobody trained it: which continents of countries are right, and perplexity of sentences.

    Returns:
        {"continents": as `untouched_hits`, "perplexity": a float, None for a masked model}. The sentences are 100 of
        the word-in-context pairs'.
    """
    sentences = [row["sentence1"] for row in load_wic()["test"]][: min(100, limit or 100)]
    return {
        "continents": untouched_hits(model, tokenizer, limit),
        "perplexity": perplexity(model, tokenizer, sentences),
    }


def in_bytes(count):
    """A number of bytes with its unit, powers of ten: "38 B", "13.8 KB", "9.8 MB", "538 MB"."""
    if count is None:
        return ""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000


def counts(row, key, sign=""):
    """A row's count with its interval, as text; "" where it has none."""
    return f"{{:{sign}.0f}} ({{:{sign}.0f}} to {{:{sign}.0f}})".format(*row[key]) if key in row else ""


COLUMNS = {  # of the ledger: what a row says, as text
    "right": lambda row: counts(row, "right"),
    "over asking": lambda row: "" if row["method"] == "asked" else counts(row, "over asking", "+"),
    "loss": lambda row: f"{row['loss']:.2f}" if "loss" in row else "",
    "continents": lambda row: f"{row['continents']:.0f}" if "continents" in row else "",
    "perplexity": lambda row: f"{row['perplexity']:.0f}" if row.get("perplexity") else "",
    "kept a task": lambda row: in_bytes(row["kept_bytes"]),
    "trained": lambda row: f"{row['trained']:,}" if row.get("trained") else "",
    "rate": lambda row: f"{row['lr']:g}" if row.get("lr") else "",
    "minutes": lambda row: f"{row['seconds'] / 60:.1f}" if row.get("seconds") else "",
    "memory": lambda row: in_bytes(row.get("peak_bytes")),
}
OF = {"right": "subjects", "continents": "countries"}  # counts, and the key of what they are counted among
SHOWN = ("right", "continents", "kept a task", "trained", "minutes", "memory")


def ledger(rows, chapter=None, columns=SHOWN, mine=None):
    """The book's ledger as a table: a row for each method that the reader has met.

    Args:
        rows: dicts as `experiments.ledger` records them, its piece "rows".
        chapter: rows of later chapters are left out; None shows all.
        columns: names from `COLUMNS`, six at most.
        mine: a row of the reader's own, to stand last.

    Returns:
        A pandas `DataFrame` of texts with the methods as index. A column of counts says of how many in its title, or
        in each cell where rows were counted among different numbers.

    Raises:
        ValueError: an unknown column, or more than six; no row is left.
    """
    unknown = [column for column in columns if column not in COLUMNS]
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}; choose from {', '.join(COLUMNS)}")
    if len(columns) > 6:
        raise ValueError(f"{len(columns)} columns do not fit a page; choose six at most")
    met = [row for row in rows if chapter is None or row["chapter"] <= chapter]
    met += [mine] if mine else []
    if not met:
        raise ValueError(f"no row of the ledger is met by chapter {chapter}")
    titles, among = {}, {}
    for column in columns:
        among[column] = {row[OF[column]] for row in met if column in OF and OF[column] in row}
        titles[column] = f"{column}, of {min(among[column]):,}" if len(among[column]) == 1 else column

    def cell(row, column):
        text = COLUMNS[column](row)
        return f"{text}, of {row[OF[column]]:,}" if text and len(among[column]) > 1 else text

    table = {row["method"]: {titles[column]: cell(row, column) for column in columns} for row in met}
    return pd.DataFrame(table).T


def ledger_points(rows, chapter=None):
    """The ledger's rows as `charts.compare` takes them: countries across, continents up, as large as what is kept.

    Rows that say nothing of continents are left out. From 10 B to 1 GB a point grows with the logarithm.
    """
    found = []
    for row in rows:
        if "continents" not in row or (chapter is not None and row["chapter"] > chapter):
            continue
        size = (math.log10(max(row["kept_bytes"], 10)) - 1) / 8
        said = [
            f"{counts(row, 'right')} of {row['subjects']:,} cities",
            f"{COLUMNS['continents'](row)} continents of {row['countries']} countries",
            f"{COLUMNS['kept a task'](row)} kept a task",
        ]
        point = {"choice": row["method"], "value": row["right"], "up": row["continents"], "size": min(size, 1.0)}
        found.append(point | {"said": said})
    return found
