"""Yours: a method of the book on a reader's own examples.

    yours("languages.jsonl", "LoRA", "The official language of [X] is [Y].")

prints what was found in the file, trains at three rates, chooses by dev, and prints the reader's rows of the ledger and
some answers before and after. `recipes/tune.py` does the same at work.
"""

import math
import time
from numbers import Real

import torch
import torch.nn.functional as F
from scipy import stats

from .chat import encode_chat
from .data import load_mine
from .evaluate import elsewhere, ledger, most_frequent
from .methods import BATCH, Ready, answer_logits_and_labels, check_method, fit, loss_of, prepare, right, says
from .models import load_lm
from .prompts import evaluating, tokens_of

__all__ = ["yours"]

USUAL = {  # the rates that the ledger's sweeps chose
    "prompt tuning": 1.0,
    "prompt tuning, from the prompt": 1e-1,
    "P-tuning, BiLSTM": 3e-4,
    "P-tuning, MLP": 1e-2,
    "P-tuning beside the prompt": 3e-3,
    "P-tuning, from the prompt": 1e-3,
    "all weights": 1e-4,
    "LoRA": 1e-3,
    "QLoRA": 1e-3,
    "LOMO": 1e-2,
    "AdaLomo": 1e-3,
}
PLAIN = "Question: [X]\nAnswer: [Y]."  # for subjects and answers, where the reader gives no template
TOKENS = 2048  # in a batch, at most
WRITTEN, EXAMPLES = 24, 10  # tokens of an answer that is written, and how many answers are, at most
COLUMNS = ("right", "loss", "continents", "perplexity", "kept a task", "minutes")


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


def asked_as(kind, template=None):
    """A line that says what is asked: the template in quotes, or that it is the chat format."""
    return "Asked in the model's own chat format." if kind == "chats" else f"Asked as {template or PLAIN!r}."


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
    longest += len(tokens_of(ready.tokenizer, ready.template)) + len(ready.vectors() if ready.encoder else ())
    return rows_a_batch(longest, len(rows))


def rows_a_batch(longest, count):
    """So many of `count` rows, the longest of so many tokens, that a batch is not too large."""
    return max(1, min(BATCH, count, TOKENS // longest))


@torch.no_grad()
def mean_loss(ready, rows, batch_size=BATCH):
    """The mean over all answers' tokens of -log p."""
    total, count = 0.0, 0
    with evaluating(ready.model):
        for start in range(0, len(rows), batch_size):
            logits, labels = answer_logits_and_labels(ready, rows[start : start + batch_size])
            total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += (labels >= 0).sum().item()
    return total / count


def subject_hits(rows, hits):
    """{subject: has it at least one of its answers?}"""
    found = {}
    for (subject, _), hit in zip(rows, hits, strict=True):
        found[subject] = found.get(subject, False) or bool(hit)
    return found


def counted(name, hits, **more):
    """A row that says how many subjects are right, with Wilson's interval, which is right for few subjects too."""
    n, k = len(hits), sum(hits.values())
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    return {"method": name, "chapter": 0, "subjects": n, "right": [k, n * interval.low, n * interval.high], **more}


def always_the_most_frequent(mine):
    """The row of always giving the answer that is the most frequent in training: what every method has to beat."""
    answer = most_frequent([answer for _, answer in mine.splits["train"]])
    rows = mine.splits["test"]
    hits = subject_hits(rows, [given == answer for _, given in rows])
    return counted("most frequent answer", hits, kept_bytes=len(answer.encode()))


def tested(name, ready, kind, rows, examples=EXAMPLES, **more):
    """A row for `evaluate.ledger`, and `answers`: subjects that are right, the loss, and what the model does elsewhere.

    Without other numbers what is kept is the template.
    """
    hits = subject_hits(rows, right(ready, rows))
    row = counted(name, hits, loss=mean_loss(ready, rows), kept_bytes=len(ready.template.encode()))
    away = elsewhere(ready.model, ready.tokenizer)
    if len(away["continents"]):
        row |= {"continents": int(away["continents"].sum()), "countries": len(away["continents"])}
    return row | {"perplexity": away["perplexity"], **more}, answers(ready, kind, rows, hits, examples)


def answers(ready, kind, rows, hits, examples=EXAMPLES):
    """{subject: (what greedy decoding answers, is it right)} for some subjects; in a template an answer is a line."""
    few = list(hits)[:examples]
    length = max(len(answer) for subject, answer in rows if subject in few)
    texts = says(ready, few, min(WRITTEN, length))
    texts = [text.partition("\n")[0] for text in texts] if kind == "facts" else texts
    return {subject: (text, hits[subject]) for subject, text in zip(few, texts, strict=True)}


def wanted(mine):
    """{subject: its answers} of the test examples, as texts."""
    found = {}
    for subject, answer in mine.splits["test"]:
        found[subject] = f"{found[subject]} / {answer}" if subject in found else answer
    return found


def legend(mine):
    """What the columns of a reader's table mean, in a few lines."""
    exact = "the reply is the same" if mine.kind == "chats" else "what is said begins with the answer"
    return [
        f"right: {exact}, letter for letter; in brackets an interval of 95 %.",
        "loss: of a token of the wanted answer, lower is better.",
        "continents of countries, and perplexity of 100 English sentences, lower is better: nobody trained on them,",
        "so they show what else the training changed. A prompt's vectors leave the model itself as it is.",
    ]


def score_for(kind):
    """A function from what is ready and dev to what is to be large.

    Facts: how many are right; of as many, the lower loss. Replies: minus the loss.
    """
    if kind == "facts":  # 1 / (1 + loss) lies between 0 and 1, so that it decides between equals only
        return lambda ready, dev: right(ready, dev).sum().item() + 1 / (1 + mean_loss(ready, dev))
    return lambda ready, dev: -mean_loss(ready, dev)


def nothing_changed(step):
    """A warning, in a list, if the state before the first step was the best; else nothing."""
    told = "Nothing was learned: the state before the first step was the best. Try other rates, or more steps."
    return [] if step else [told]


def three_rates(method):
    """The ledger's rate for the method, a third of it and three times it."""
    return [float(f"{USUAL[method] * factor:.0e}") for factor in (1 / 3, 1, 3)]


def checked_rates(method, rates):
    """The rates as a list of positive numbers; None gives the ledger's and its neighbours."""
    rates = three_rates(method) if rates is None else [rates] if isinstance(rates, Real) else list(rates)
    if not rates or any(not isinstance(lr, Real) or not 0 < lr < math.inf for lr in rates):
        raise ValueError(f"rates are {rates!r}; give positive numbers, e.g. [3e-4, 1e-3]")
    return rates


def seconds_a_step(ready, rows):
    """How long a forward and a backward pass take here."""
    start = time.perf_counter()
    loss_of(ready, rows).backward()
    for weight in ready.weights():
        weight.grad = None
    return time.perf_counter() - start


def yours(path, method, template=None, model="smollm2-135m", rates=None, steps=60, seed=0, progress=True):
    """Train a method on a reader's own examples, and print what it brought.

    It is trained at each rate, and the best on the examples to choose on is tested.

    Args:
        path: of a JSONL file, see `data.load_mine`.
        method: "prompt tuning", "P-tuning, BiLSTM", "LoRA", "QLoRA", "LOMO" or another name from `methods.METHODS`.
        template: for subjects and answers: text with `[X]` and, last, `[Y]`, e.g. "The capital of [X] is [Y]."; else
            "Question: [X]" and "Answer: [Y]" on two lines.
        model: a name that `load_lm` takes; rates: learning rates, or one; else the ledger's for this method, a third
            of it and three times it.
        steps: of each training; seed: of the splits and of what is drawn; progress: show bars.

    Returns:
        The reader's row, for `evaluate.ledger(rows, mine=…)`.

    Raises:
        ValueError: an unknown method, rates or steps that make no sense; see also `load_mine`, `prepare` and
            `template_for`.
    """
    check_method(method)
    rates = checked_rates(method, rates)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; give a whole number of 1 or more")
    mine = load_mine(path, seed)
    print(mine.said)
    lm, tokenizer = load_lm(model)
    print(asked_as(mine.kind, template))
    template, rows = template_for(tokenizer, mine.kind, template), with_ids(tokenizer, mine)
    asked = Ready("asked", lm, tokenizer, template, trained=lm)
    first, before = tested("asked", asked, mine.kind, rows["test"])
    best = None
    for lr in rates:
        ready = prepare(method, load_lm(model)[0], tokenizer, template, seed)
        size = batch_size_for(ready, rows["train"])
        if best is None:
            guess = len(rates) * steps * 1.5 * seconds_a_step(ready, rows["train"][:size]) / 60
            times = "time" if len(rates) == 1 else "times"
            print(f"\n{method}, {len(rates)} {times} {steps} steps of {size} examples: about {guess:.0f} min here.")
        done = fit(ready, rows["train"], rows["dev"], lr, steps, seed, size, 10, score_for(mine.kind), progress)
        hits = right(ready, rows["dev"]).sum()
        print(f"rate {lr:g}: {hits} of {len(rows['dev'])} to choose on right, best after step {done.step}")
        if best is None or done.dev > best[0]:
            best = done.dev, done, lr, ready
    _, done, lr, ready = best
    trained = sum(weight.numel() for weight in ready.weights())
    more = {"trained": trained, "kept_bytes": 4 * ready.kept(), "lr": lr, "seconds": done.seconds}
    row, after = tested(f"{method}, yours", ready, mine.kind, rows["test"], **more)
    print(f"\nRate {lr:g} is chosen. The examples to test on:")
    for line in nothing_changed(done.step):
        print(line)
    print(ledger([always_the_most_frequent(mine), first, row], columns=COLUMNS).to_string())
    print(*legend(mine), sep="\n")
    right_answers = wanted(mine)
    for subject, (said, hit) in before.items():
        later, hit_later = after[subject]
        print(f"\n{subject}\n  before {'✓' if hit else '✗'} {said}\n  after  {'✓' if hit_later else '✗'} {later}")
        print(f"  wanted   {right_answers[subject]}")
    return row
