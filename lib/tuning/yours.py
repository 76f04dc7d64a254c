"""Yours: a method of the book on a reader's own examples.

    yours("languages.jsonl", "LoRA", "The official language of [X] is [Y].")

prints what was found in the file, trains at three rates, chooses by dev, and prints the reader's rows of the ledger and
some answers before and after. `recipes/tune.py` does the same at work.
"""

import time

import torch

from .chat import encode_chat
from .data import MINE, load_mine
from .evaluate import bootstrap_interval, elsewhere, ledger
from .methods import BATCH, METHODS, Ready, fit, loss_of, prepare, right, says, share_right
from .models import load_lm
from .prompts import tokens_of

__all__ = ["yours"]

USUAL = {  # the rates that the ledger's sweeps chose
    "prompt tuning": 3e-2,
    "prompt tuning, from the prompt": 3e-2,
    "P-tuning, BiLSTM": 1e-3,
    "P-tuning, MLP": 1e-2,
    "P-tuning beside the prompt": 1e-3,
    "P-tuning, from the prompt": 1e-3,
    "all weights": 1e-4,
    "LoRA": 1e-3,
    "QLoRA": 1e-3,
    "LOMO": 3e-3,
    "AdaLomo": 3e-4,
}
PLAIN = "Question: [X]\nAnswer: [Y]."  # for subjects and answers, where the reader gives no template
TOKENS = 2048  # in a batch, at most
WRITTEN = 24  # tokens of an answer that is shown, at most


def template_for(tokenizer, kind, template=None):
    """What is asked: the template given, a plain one for facts, the tokenizer's chat format for questions.

    Raises:
        ValueError: a template is given for questions, or the tokenizer has no chat format.
    """
    if kind == "facts":
        return template or PLAIN
    if template:
        raise ValueError("questions and replies are asked in the model's own chat format; leave the template out")
    if not tokenizer.chat_template:
        raise ValueError("this model has no chat format; give subjects and answers, or choose an instruction model")
    asked = [{"role": "user", "content": "[X]"}]
    return tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) + " [Y]"


def with_ids(tokenizer, mine):
    """The splits with token ids for answers: {split: [(subject, ids)]}. A reply's last one is the end token."""
    if mine.kind == "facts":
        return {split: [(s, tokens_of(tokenizer, " " + a)) for s, a in rows] for split, rows in mine.splits.items()}

    def reply_ids(question, reply):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return [label for label in encode_chat(tokenizer, messages)[1] if label >= 0]

    return {split: [(q, reply_ids(q, r)) for q, r in rows] for split, rows in mine.splits.items()}


def batch_size_for(ready, rows):
    """So many rows that a batch has 2,048 tokens at most, and 16 rows at most."""
    longest = max(len(tokens_of(ready.tokenizer, subject)) + len(answer) for subject, answer in rows)
    return max(1, min(BATCH, len(rows), TOKENS // (longest + len(tokens_of(ready.tokenizer, ready.template)))))


def mean_loss(ready, rows, batch_size=BATCH):
    """-log p of an answer's token, the mean over batches of like size."""
    with torch.no_grad():
        parts = [loss_of(ready, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return sum(part.item() for part in parts) / len(parts)


def subject_hits(rows, hits):
    """(subjects,) float64: has the subject at least one of its answers?"""
    found = {}
    for (subject, _), hit in zip(rows, hits.tolist(), strict=True):
        found[subject] = found.get(subject, False) or hit
    return torch.tensor(list(found.values())).double()


def counted(name, hits, **more):
    """A row that says how many subjects are right, with an interval."""
    count = [len(hits) * value for value in (hits.mean().item(), *bootstrap_interval(hits))]
    return {"method": name, "chapter": 0, "subjects": len(hits), "right": count, **more}


def most_frequent(mine):
    """The row of always giving the answer that is the most frequent in training: what every method has to beat."""
    answers = [answer for _, answer in mine.splits["train"]]
    answer = max(sorted(set(answers)), key=answers.count)
    rows = mine.splits["test"]
    hits = subject_hits(rows, torch.tensor([given == answer for _, given in rows]))
    return counted("most frequent answer", hits, kept_bytes=len(answer.encode()))


def row_of(name, ready, rows, **more):
    """A row for `evaluate.ledger`: test subjects that are right, and what the model does elsewhere."""
    found = counted(name, subject_hits(rows, right(ready, rows)))
    away = elsewhere(ready.model, ready.tokenizer)
    if len(away["continents"]):
        found |= {"continents": int(away["continents"].sum())}
    return found | {"perplexity": away["perplexity"], **more}


def answers(ready, kind, rows):
    """{subject: what greedy decoding answers} for three of the rows; in a template an answer ends with its line."""
    subjects = list(dict.fromkeys(subject for subject, _ in rows))[:3]
    texts = says(ready, subjects, min(WRITTEN, max(len(answer) for _, answer in rows)))
    texts = [text.partition("\n")[0] for text in texts] if kind == "facts" else texts
    return dict(zip(subjects, texts, strict=True))


def score_for(kind):
    """What is to be large on dev. Facts: the share right, and of equals the lower loss. Replies: minus the loss."""
    if kind == "facts":
        return lambda ready, dev: (share_right(ready, dev), -mean_loss(ready, dev))
    return lambda ready, dev: (-mean_loss(ready, dev),)


def three_rates(method):
    """The ledger's rate for the method, a third of it and three times it."""
    return [float(f"{USUAL[method] * factor:.0e}") for factor in (1 / 3, 1, 3)]


def yours(path, method, template=None, model="smollm2-135m", rates=None, steps=60, seed=0, progress=True):
    """Train a method on a reader's own examples, and print what it brought.

    Args:
        path: of a JSONL file, see `data.load_mine`.
        method: a name from `methods.METHODS`.
        template: for subjects and answers: text with `[X]` and `[Y]`, which stands last; else a plain one.
        model: a name that `load_lm` takes; rates: to choose from on dev, else the ledger's and its neighbours.
        steps: of each training.

    Returns:
        The reader's row, for `evaluate.ledger(rows, mine=…)`.

    Raises:
        ValueError: see `load_mine`, `prepare` and `template_for`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    mine = load_mine(path, seed)
    print(mine.said)
    lm, tokenizer = load_lm(model)
    template, rows = template_for(tokenizer, mine.kind, template), with_ids(tokenizer, mine)
    asked = Ready("asked", lm, tokenizer, template, trained=lm)
    before = answers(asked, mine.kind, rows["test"])
    first = row_of("asked", asked, rows["test"], kept_bytes=len(template.encode()))
    del asked
    rates = rates or three_rates(method)
    best, start = None, time.perf_counter()
    for lr in rates:
        ready = prepare(method, load_lm(model)[0], tokenizer, template, seed)
        size = batch_size_for(ready, rows["train"])
        if best is None:
            print(f"{len(rates)} trainings of {steps} steps, {size} examples each: some minutes. Rates: {rates}.")
        done = fit(ready, rows["train"], rows["dev"], lr, steps, seed, size, 10, score_for(mine.kind), progress)
        if best is None or done.dev > best[0]:
            best = done.dev, done, lr, ready
    _, done, lr, ready = best
    trained = sum(weight.numel() for weight in ready.weights())
    more = {"trained": trained, "kept_bytes": 4 * ready.kept(), "lr": lr, "seconds": done.seconds}
    row = row_of(f"{method}, yours", ready, rows["test"], **more)
    columns = ("right", "continents", "perplexity", "kept a task", "rate", "minutes")
    print(
        f"\nOf {row['subjects']} {MINE[mine.kind][0]}s to test on, in {(time.perf_counter() - start) / 60:.1f} minutes:"
    )
    print(ledger([most_frequent(mine), first, row], columns=columns).to_string())
    wanted, after = dict(reversed(mine.splits["test"])), answers(ready, mine.kind, rows["test"])
    for subject, said in before.items():
        print(f"\n{subject}\n  before: {said}\n  after:  {after[subject]}\n  wanted: {wanted[subject]}")
    return row
