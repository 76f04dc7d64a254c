"""Chapter 5's recorded run: manual prompt, fine-tuning, both, and P-tuning, on relations and on language understanding.

    python -m tuning.experiments.ways --save
    python -m tuning.experiments.ways --model bert-base-cased --lama LAMA --superglue SUPERGLUE --out results

The protocol is the ledger's, and so are its runs of the first task, the country of a city, with three seeds. Of two
small relations the three folds are the seeds. Language understanding has 32 examples to train on and 32 to choose on,
in three draws. For each task and draw dev chooses the manual prompt's wording, and how many examples to show.

A method's rate is swept on one task of each kind and one draw, and the other tasks of the kind take it. Where two parts
are trained, each has a rate of its own: the search begins at a pair, and goes on to its best neighbour until none is
better. On the small tasks one rate for both parts is tried too. All methods of a kind take as many steps; those that
were best at the last of them, and the new head in any case, are tried with twice as many. Rate and state are chosen by
the share of dev that is right. Where dev is small, equal shares are common, and the lower loss decides between them.

Beside the hits on test each run has what the model does elsewhere: continents of countries, and perplexity of sentences
of another data set. The untrained model's stand for a run that has left every bit of the model's weights as it was.
"""

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..data import RELATIONS, TEMPLATES, load_facts, load_lama, load_reviews, load_superglue, load_wic, text_of
from ..evaluate import (
    as_hits,
    as_text,
    balanced,
    bootstrap_interval,
    most_frequent,
    one_token_facts,
    paired_interval,
    perplexity,
    untouched_hits,
)
from ..methods import METHODS, Ready, fit, prompt_encoder
from ..models import context_length, default_device, load_lm
from ..p_tuning import answer_loss, prompt_logits
from ..prompts import answer_id, encode, few_shot
from ..training import Classifier, last_token, mean_of_tokens
from .ledger import sweep
from .record import Recorder, load_results, option_parser

FREQUENT, MANUAL, EXAMPLES = "most frequent answer", "manual prompt", "examples in context"
HEAD, WEIGHTS = "fine-tuning", "manual prompt and fine-tuning"
PROMPT, BOTH, ALONE = "P-tuning", "P-tuning and fine-tuning", "P-tuning, pseudo tokens alone"
WAYS = (PROMPT, WEIGHTS, HEAD, BOTH, ALONE)  # those that train; the last one on relations only
TABLE = (FREQUENT, MANUAL, EXAMPLES, ALONE, PROMPT, HEAD, WEIGHTS, BOTH)  # the order of rows
IN_LEDGER = {WEIGHTS: "all weights", PROMPT: "P-tuning beside the prompt", ALONE: "P-tuning, BiLSTM"}
RATES = {  # that a sweep begins with
    PROMPT: METHODS[IN_LEDGER[PROMPT]].rates,
    WEIGHTS: (3e-7, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    HEAD: (3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    ALONE: METHODS[IN_LEDGER[ALONE]].rates,
}
WITH_HEAD = (3e-5, 1e-2)  # where the search begins, of the body and of its new head
LADDER = [float(f"{digit}e{power}") for power in range(-9, 2) for digit in (1, 3)]
MOST = 8  # pairs, from which on a search ends

COUNTRY, SMALL = "P17", ("P1376", "P37")
ASKS = ("[X] Answer: [Y].", "[X]\nAnswer: [Y].", "[X] The answer is [Y].")
NO_YES = [(template, words) for template in ASKS for words in (("no", "yes"), ("false", "true"))]
UNDERSTANDING = {  # wordings, each with its label words in the order of the classes
    "reviews": [
        ("Review: [X]\nSentiment: [Y].", ("negative", "positive")),
        ("[X] It was [Y].", ("terrible", "great")),
        ("[X] All in all, it was [Y].", ("bad", "good")),
        ("Review: [X]\nIs the review positive? Answer: [Y].", ("no", "yes")),
        ("[X] The review is [Y].", ("negative", "positive")),
    ],
    "wic": [*NO_YES, ("[X] The two senses are [Y].", ("different", "same"))],
}
WITH_SUPERGLUE = {  # needs --superglue
    "boolq": NO_YES,
    "cb": [(template, ("yes", "no", "maybe")) for template in ASKS],
    "rte": [(template, words[::-1]) for template, words in NO_YES],
}
WORDINGS = UNDERSTANDING | WITH_SUPERGLUE
SHOTS, TEST, DEV = 32, 400, 200
SHOWN = (1, 2, 4, 8, 16, 32)  # examples in front of the question
SEEDS = (0, 1, 2)
STEPS, FEW_STEPS = 150, 60  # of the first task, and of those with few examples
BATCH = {"relations": 16, "understanding": 8}


def kind_of(task):
    return "relations" if task in RELATIONS else "understanding"


def rows_of(tokenizer, task, seed, given):
    """{split: [(text, answer)]}; the answer is a token's id in a relation, else a class.

    Args:
        seed: of small relations the fold; of language understanding it draws the examples.
        given: plain values, as every piece takes them: "model", "device", "limit", and where the real data are or None,
            "lama", "superglue" and "reviews".
    """
    if kind_of(task) == "relations":
        fold = 0 if task == COUNTRY else seed
        data = load_lama(Path(given["lama"]) / task) if given["lama"] else load_facts(task, fold)
        rows = {split: one_token_facts(tokenizer, facts)[: given["limit"]] for split, facts in data.items()}
        rows["dev"] = rows.get("dev", [])[:DEV]
    else:
        reviews = task == "reviews"
        data = load_reviews(given["reviews"]) if reviews else load_superglue(task, given["superglue"])
        rows = drawn(task, data, seed)
        rows["test"] = rows.get("test", [])[: given["limit"] or TEST]
    for split in ("train", "dev", "test"):
        if not rows.get(split):
            raise ValueError(f"{task}: no {split} rows; expected the files train.jsonl, dev.jsonl and test.jsonl")
    return rows


def drawn(task, data, seed):
    """32 examples to train on and 32 to choose on, drawn by the seed.

    Where test has no labels, as in SuperGLUE, the validation set is the test set, and dev is drawn from train.
    """
    rows = {s: [(text_of(task, row), int(row["label"])) for row in part if "label" in row] for s, part in data.items()}
    labelled = rows.get("test")
    if labelled and min(label for _, label in labelled) >= 0:
        return rows | {split: balanced(rows[split], SHOTS, seed) for split in ("train", "dev")}
    some = random.Random(seed).sample(rows["train"], min(2 * SHOTS, len(rows["train"])))
    return {"train": some[:SHOTS], "dev": some[SHOTS:], "test": rows["dev"]}


def wordings(task, given):
    """Handcrafted (template, label words) pairs; a relation has no label words, for any token may answer."""
    if kind_of(task) == "understanding":
        return WORDINGS[task]
    return [(template, None) for template in ([RELATIONS[task].template] if given["lama"] else TEMPLATES[task])]


def ids_of(tokenizer, words):
    return None if words is None else [answer_id(tokenizer, word) for word in words]


@dataclass
class Way(Ready):
    """A model that is ready for a way on a task.

    Attributes:
        words: the label words' ids, which alone compete; None for the whole vocabulary.
        classifier: the body with its new head, where there is one.
        trained: where two parts are trained, an `nn.ModuleList` of them, in the order of their rates.
    """

    words: list | None = None
    classifier: nn.Module | None = field(default=None, repr=False)

    def groups(self, lr):
        """A parameter group for each part, with a rate of its own."""
        if not isinstance(self.trained, nn.ModuleList):
            return super().groups(lr)
        weights = [[weight for weight in part.parameters() if weight.requires_grad] for part in self.trained]
        return [{"params": part, "lr": rate} for part, rate in zip(weights, lr, strict=True)]

    def kept(self):
        """How many numbers are kept for the task: weights, and a prompt's vectors without the networks behind them."""
        if self.encoder is None:
            return super().kept()
        behind = {id(weight) for weight in self.encoder.parameters()}
        return sum(weight.numel() for weight in self.weights() if id(weight) not in behind) + self.vectors().numel()

    @torch.no_grad()
    def logits(self, rows, batch_size=32):
        """(rows, choices) on the CPU: tokens of the vocabulary, or classes."""
        texts = [text for text, _ in rows]
        if self.classifier is None:
            found = prompt_logits(self.model, self.tokenizer, self.template, texts, self.vectors(), batch_size)
            return found if self.words is None else found[:, self.words]
        parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        return torch.cat([self.classifier(part).cpu() for part in parts])


def prepare(way, model, tokenizer, template, words=None, seed=0):
    """Make a model ready for a way, in place.

    Args:
        way: one of `WAYS`, or "manual prompt", which trains nothing.
        template, words: the manual prompt and the label words' ids. Without a prompt a relation has only the subject,
            behind a first token, and language understanding has a new head.
    """
    torch.manual_seed(seed)
    model.requires_grad_("fine-tuning" in way).eval()
    if way == HEAD and words is not None:
        pool = mean_of_tokens if tokenizer.mask_token else last_token
        classifier = Classifier(model.base_model, tokenizer, len(words), pool)
        parts = nn.ModuleList([classifier.body, classifier.head])
        return Way(way, model, tokenizer, template, None, parts, words, classifier)
    if "P-tuning" in way:
        kind = IN_LEDGER[ALONE if way == ALONE else PROMPT]
        template, encoder = prompt_encoder(kind, model, tokenizer, template)
        encoder = encoder.to(model.device)
        trained = nn.ModuleList([model, encoder]) if way == BOTH else encoder
        return Way(way, model, tokenizer, template, encoder, trained, words)
    template = after_a_first_token(tokenizer) if way == HEAD else template
    return Way(way, model, tokenizer, template, None, model, words)


def after_a_first_token(tokenizer):
    """The bare subject behind a token: the one that the tokenizer puts first itself, else one that ends a text."""
    if tokenizer("a").input_ids[0] in tokenizer.all_special_ids:  # BERT's [CLS], LLaMA's <s>
        return "[X] [Y]."
    known = tokenizer.get_vocab()
    first = next(token for token in ("<|endoftext|>", tokenizer.bos_token, tokenizer.eos_token) if token in known)
    return f"{first} [X] [Y]."


def loss_of(way, rows):
    """The mean over rows of -log p of the answer."""
    if way.classifier is None:
        return answer_loss(way.model, way.tokenizer, way.template, rows, way.vectors(), way.words)
    labels = torch.tensor([label for _, label in rows], device=way.model.device)
    return F.cross_entropy(way.classifier([text for text, _ in rows]), labels)


def answers_of(rows):
    return torch.tensor([answer for _, answer in rows])


def score_of(logits, rows):
    """The share that is right; of few rows less a ten-thousandth of the loss, which decides between equal shares."""
    share = (logits.argmax(dim=1) == answers_of(rows)).double().mean().item()
    return share if len(rows) >= DEV else share - F.cross_entropy(logits, answers_of(rows)).item() / 10_000


def tested(logits, rows, words):
    """Hits on test as a text, and macro-F1 where there are classes."""
    given, wanted = logits.argmax(dim=1), answers_of(rows)
    return {"hits": as_text(given == wanted)} | ({} if words is None else {"macro_f1": macro_f1(given, wanted)})


def macro_f1(given, wanted):
    """The mean over the classes that occur of 2 × right / (given + wanted): SuperGLUE's second metric for CB."""
    scores = []
    for label in wanted.unique():
        right = ((given == label) & (wanted == label)).sum()
        scores.append(2 * right / ((given == label).sum() + (wanted == label).sum()))
    return torch.stack(scores).double().mean().item()


def load(given):
    return load_lm(given["model"], given["device"], torch.float32)  # in 16 bits small updates of weights get lost


def away(model, tokenizer, task, limit=None):
    """Hits on continents as a text, and perplexity of 100 sentences of a data set that is not the task's."""
    film, plain = load_reviews()["test"]["sentence"][-100:], load_wic()["test"]["sentence1"][:100]
    sentences = list(film if task == "wic" else plain)[: limit or 100]
    hits = as_text(untouched_hits(model, tokenizer, limit))
    return {"continents": hits, "perplexity": perplexity(model, tokenizer, sentences)}


def untouched(given):
    """What the untrained model does elsewhere, beside words in context and beside the other tasks."""
    model, tokenizer = load(given)
    return {which: away(model, tokenizer, which, given["limit"]) for which in ("wic", "others")}


def most_frequent_answer(given, task, seed):
    """The answer that is the most frequent in training, given to every row of test."""
    rows = rows_of(load(given)[1], task, seed, given)
    answer = most_frequent([answer for _, answer in rows["train"]])
    return {"hits": as_text(answers_of(rows["test"]) == answer)}


def asked(given, task, seed):
    """Every handcrafted wording on dev, and the best of them on test."""
    model, tokenizer = load(given)
    rows, tried = rows_of(tokenizer, task, seed, given), []
    for template, words in wordings(task, given):
        ready = prepare(MANUAL, model, tokenizer, template, ids_of(tokenizer, words))
        tried.append((score_of(ready.logits(rows["dev"]), rows["dev"]), template, words, ready))
    score, template, words, ready = max(tried, key=lambda one: one[0])
    found = {"dev": score, "template": template, "words": words, "tried": [one[:3] for one in tried]}
    return found | tested(ready.logits(rows["test"]), rows["test"], words)


def shown(given, task, seed, template, words):
    """The manual prompt behind training examples: as many as dev chooses, of what the context holds; None if none."""
    model, tokenizer = load(given)
    rows, ids = rows_of(tokenizer, task, seed, given), ids_of(tokenizer, words)
    order = torch.randperm(len(rows["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
    solved = [rows["train"][index] for index in order]
    solved = [(text, words[answer] if words else tokenizer.decode(answer).strip()) for text, answer in solved]
    longest = max((text for split in ("dev", "test") for text, _ in rows[split]), key=len)
    tried = []
    for count in SHOWN:
        prompt = few_shot(template, solved[:count], "\n\n" if words else "\n")
        if count > len(solved) or len(encode(tokenizer, prompt, longest)) > context_length(model, tokenizer):
            break
        ready = prepare(MANUAL, model, tokenizer, prompt, ids)
        tried.append((score_of(ready.logits(rows["dev"], 8), rows["dev"]), count, ready))
    if not tried:
        return None
    score, count, ready = max(tried, key=lambda one: one[0])
    found = {"dev": score, "count": count, "prompt": ready.template, "tried": [one[:2] for one in tried]}
    return found | tested(ready.logits(rows["test"], 8), rows["test"], words)


def trained(given, way, task, seed, template, words, lr, steps, test, untaught=False):
    """One training, and what it scored.

    Args:
        test: whether test, and the model elsewhere, are looked at.
        untaught: whether the model has random weights instead of its own.
    """
    model, tokenizer = load(given)
    if untaught:
        torch.manual_seed(0)
        model = type(model)(model.config).to(model.device, model.dtype)
    rows, ids = rows_of(tokenizer, task, seed, given), ids_of(tokenizer, words)
    before = checksum(model)
    ready = prepare(way, model, tokenizer, template, ids, seed)
    batch, every = min(BATCH[kind_of(task)], len(rows["train"])), max(1, steps // 5)

    def score(ready, dev):
        return score_of(ready.logits(dev), dev)

    history = fit(ready, rows["train"], rows["dev"], lr, steps, seed, batch, every, score, loss=loss_of)
    found = {"lr": lr, "seed": seed, "dev": history.dev, "step": history.step, "scores": history.scores}
    found |= {"stopped": history.stopped, "seconds": history.seconds}
    found |= {"losses": [round(loss, 4) for loss in history.losses], "as before": checksum(model) == before}
    if test:
        found |= {"template": ready.template, **tested(ready.logits(rows["test"]), rows["test"], words)}
        found |= {"trained": sum(weight.numel() for weight in ready.weights()), "kept_bytes": 4 * ready.kept()}
        if not found["as before"]:
            found |= {"elsewhere": away(model, tokenizer, task, given["limit"])}
    return found


def checksum(model):
    """What tells whether any bit of a model's weights has changed."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def on_ladder(rate):
    return min(range(len(LADDER)), key=lambda place: abs(LADDER[place] / rate - 1))


def climb(start, run, most=MOST):
    """The pair of rates that none of its four neighbours beats on dev; or the best when `most` pairs were tried.

    A neighbour has about three times or a third of the first rate, or ten times or a tenth of the second.

    Args:
        start: a pair to begin near; run: a function from a pair of rates to what `trained` returns.
    """
    tried = {}

    def dev(place):
        if place not in tried:
            tried[place] = run([LADDER[index] for index in place])["dev"]
        return tried[place]

    best, last = tuple(map(on_ladder, start)), None
    while best != last and len(tried) < most:
        one, other = last = best
        around = [(one + 1, other), (one - 1, other), (one, other + 2), (one, other - 2)]
        inside = [place for place in around if min(place) >= 0 and max(place) < len(LADDER)]
        best = max([best, *inside], key=dev)  # of equal ones the present
    return [LADDER[index] for index in best]


def interval(hits, task, base=None):
    """The mean share that is right, or its gain over `base`, with an interval over items and runs: three numbers."""
    values = [as_hits(text) for text in hits]
    if base:
        base = base * (len(hits) // len(base))
        values = [one - as_hits(other) for one, other in zip(values, base, strict=True)]
    paired = paired_interval(values, same_items=task not in SMALL) if len(values) > 1 else bootstrap_interval(values[0])
    return [torch.cat(values).mean().item(), *paired]


def summary(pieces, tasks, from_ledger):
    """A row for each task and way: shares with intervals, what it cost elsewhere, and the hits themselves.

    Args:
        pieces: what `main` recorded; from_ledger: the ledger's pieces, which stand for runs of the first task, or {}.
    """
    found = []
    for task in tasks:
        runs = runs_of(pieces, task, from_ledger if task == COUNTRY else {})
        before = pieces["untouched"]["wic" if task == "wic" else "others"]
        for way, some in runs.items():
            hits, one = [run["hits"] for run in some], some[0]
            row = {"task": task, "way": way, "right": interval(hits, task)}
            row["over manual"] = interval(hits, task, [run["hits"] for run in runs[MANUAL]])
            row |= {"lr": one.get("lr"), "trained": one.get("trained", 0), "kept_bytes": kept_bytes(one)}
            row |= {"hits": hits, "items": [len(text) for text in hits]}
            after = [run.get("elsewhere", before) for run in some] if way != FREQUENT else []
            row |= {"continents": [one["continents"].count("1") for one in after]}
            row |= {"countries": len(before["continents"])}
            if before["perplexity"] is not None:
                row["perplexity"] = [one["perplexity"] / before["perplexity"] for one in after]
            if "macro_f1" in one:
                row["macro_f1"] = [run["macro_f1"] for run in some]
            found.append(row)
    return found


def runs_of(pieces, task, from_ledger):
    """{way: its runs, one a seed}, of the ways that were tried on the task, in the order of `TABLE`.

    Of what draws nothing the ledger has one run.
    """
    keys = {FREQUENT: "most frequent", MANUAL: "asked", EXAMPLES: "shown"}
    runs = {way: [pieces.get(f"{keys.get(way, f'run/{way}')}/{task}/{s}") for s in SEEDS] for way in TABLE}
    if from_ledger:
        runs[FREQUENT], runs[MANUAL] = [from_ledger["most frequent"]], [from_ledger["asked"]]
        runs[EXAMPLES] = [from_ledger[f"shown/{seed}"] for seed in SEEDS]
        runs |= {way: [from_ledger[f"run/{name}/{seed}"] for seed in SEEDS] for way, name in IN_LEDGER.items()}
    return {way: some for way, some in runs.items() if all(some)}


def kept_bytes(run):
    """What is kept of a run: its numbers, or the bytes of its words; None where there are neither."""
    return run.get("kept_bytes") or len(run.get("prompt", run.get("template", "")).encode()) or None


def ledger_of(given, steps):
    """The recorded ledger's pieces if these stand for what would be run here, else {}."""
    recorded = load_results("ledger")
    same = recorded and recorded["provenance"]["settings"]["model"] == given["model"]
    return recorded["results"] if same and steps is None and not (given["lama"] or given["limit"]) else {}


class Run:
    """The recorder with what all pieces share, and the rates that were found on each kind's first task."""

    def __init__(self, recorder, given, steps, from_ledger):
        self.recorder, self.given, self.steps, self.from_ledger = recorder, given, steps, from_ledger
        self.best = {}  # {(kind's first task, way): (its rate, the step of the best state)}

    def piece(self, key, compute, *arguments):
        return self.recorder.piece(key, compute, self.given, *arguments)

    def in_ledger(self, task, way=None):
        return bool(self.from_ledger) and task == COUNTRY and (way is None or way in IN_LEDGER)

    def steps_of(self, task):
        return self.steps or (STEPS if task == COUNTRY else FEW_STEPS)

    def manual(self, task, seed):
        """The manual prompt that dev chose: its template and label words."""
        found = self.from_ledger["asked"] if self.in_ledger(task) else self.recorder.pieces[f"asked/{task}/{seed}"]
        return found["template"], found.get("words")

    def train(self, key, way, task, seed, lr, test, times=1, untaught=False):
        more = (*self.manual(task, seed), lr, times * self.steps_of(task), test, untaught)
        return self.piece(key, trained, way, task, seed, *more)

    def untrained(self, task):
        """What needs no training."""
        if self.in_ledger(task):
            return
        for seed in SEEDS:
            self.piece(f"most frequent/{task}/{seed}", most_frequent_answer, task, seed)
            self.piece(f"asked/{task}/{seed}", asked, task, seed)
            self.piece(f"shown/{task}/{seed}", shown, task, seed, *self.manual(task, seed))

    def sweep(self, task, way):
        """Find a way's rate, or its pair of rates, on a task."""
        if self.in_ledger(task, way):
            found = self.from_ledger[f"run/{IN_LEDGER[way]}/0"]
            self.best[task, way] = found["lr"], found["step"]
            return

        def run(lr):
            said = " and ".join(f"{rate:g}" for rate in lr) if isinstance(lr, list) else f"{lr:g}"
            return self.train(f"sweep/{way}/{task}/{said}", way, task, 0, lr, False)

        if way == BOTH:
            lr = climb([self.best[task, part][0] for part in (WEIGHTS, PROMPT)], run)
        elif way == HEAD and kind_of(task) == "understanding":
            lr = climb(WITH_HEAD, run)
        else:
            lr = sweep(RATES[way], run)
        self.best[task, way] = lr, run(lr)["step"]

    def runs(self, task, way, swept):
        if not self.in_ledger(task, way):
            for seed in SEEDS:
                self.train(f"run/{way}/{task}/{seed}", way, task, seed, self.best[swept, way][0], True)

    def one_rate(self, task, way):
        """What two parts would do at one rate, the model's."""
        lr, _ = self.best[task, way]
        if isinstance(lr, list) and task != COUNTRY:
            self.train(f"one rate/{way}/{task}", way, task, 0, [lr[0], lr[0]], True)

    def twice(self, task, way):
        """Twice as many steps, where the best state was the last one, and for a new head."""
        lr, step = self.best[task, way]
        if step == self.steps_of(task) or (way == HEAD and kind_of(task) == "understanding"):
            self.train(f"twice/{way}/{task}", way, task, 0, lr, True, times=2)


def main(arguments=None):
    parser = option_parser(__doc__)
    parser.add_argument("--lama", default=None, help="folder with a folder a relation, each with LAMA's JSONL files")
    parser.add_argument("--superglue", default=None, help="folder of the unpacked release, or a hub id")
    parser.add_argument("--reviews", default=None, help="folder of SST-2's JSONL files, or a hub id")
    options = parser.parse_args(arguments)
    given = {key: getattr(options, key) for key in ("model", "device", "limit", "lama", "superglue", "reviews")}
    device = torch.device(options.device or default_device())
    groups = [[*UNDERSTANDING, *(WITH_SUPERGLUE if options.superglue else ())], SMALL, [COUNTRY]]
    tasks = [task for group in groups for task in group]
    ways = [[way for way in WAYS if way != ALONE or kind_of(group[0]) == "relations"] for group in groups]
    total = 1 + 3 * len(SEEDS) * len(tasks) + 2 + len(SMALL)  # with the ledger and searches that go on, about
    total += sum(len(chosen) * (MOST + len(SEEDS) * len(group)) for group, chosen in zip(groups, ways, strict=True))
    settings = {key: value for key, value in given.items() if key != "device"} | {"steps": options.steps}
    recorder = Recorder("ways", options.out, device, total, save=options.save, **settings)
    run = Run(recorder, given, options.steps, ledger_of(given, options.steps))
    run.piece("untouched", untouched)
    for task in tasks:
        run.untrained(task)
    for late in (False, True):  # pseudo tokens alone come last
        for group, chosen in zip(groups, ways, strict=True):
            for way in [way for way in chosen if (way == ALONE) == late]:
                run.sweep(group[0], way)
                for task in group:
                    run.runs(task, way, group[0])
                run.twice(group[0], way)
                run.one_rate(group[0], way)
        for group in groups if not late else ():
            for task in [task for task in group if kind_of(task) == "relations"]:
                lr = run.best[group[0], PROMPT][0]
                run.train(f"untaught/{PROMPT}/{task}", PROMPT, task, 0, lr, True, untaught=True)
    recorder.piece("rows", summary, recorder.pieces, [COUNTRY, *SMALL, *groups[0]], run.from_ledger)
    recorder.finish()


if __name__ == "__main__":
    main()
