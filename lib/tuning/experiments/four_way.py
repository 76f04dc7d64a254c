"""Chapter 5's recorded run: manual prompt, fine-tuning, both, and P-tuning, on probing and on language understanding.

    python -m tuning.experiments.four_way
    python -m tuning.experiments.four_way --model bert-base-cased --lama LAMA --superglue SUPERGLUE --out results

Probing: P17 with three seeds, P1376 and P37 with their three folds as seeds, P@1 over the whole vocabulary. Language
understanding in the paper's few-shot setting: 32 examples to train on and 32 to choose on, three draws; there the
paper's P-tuning trains the language model too, so it is run both ways. Each method's rate is swept on one task of each
kind and one draw, on dev, and then fixed. Beside the score on the task, every row says what the method cost elsewhere:
P@1 on a relation that was not touched, and perplexity on other text.
"""

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..data import RELATIONS, load_facts, load_lama, load_reviews, load_superglue, load_wic, text_of
from ..evaluate import (
    UNTOUCHED,
    balanced,
    bootstrap_interval,
    most_frequent,
    one_token_facts,
    perplexity,
    untouched_hits,
)
from ..lora import add_lora, unload
from ..memory import PeakMemory
from ..models import load_lm
from ..p_tuning import PromptEncoder, answer_loss, prompt_logits, soften
from ..prompts import answer_id
from ..training import Classifier, last_token, mean_of_tokens, train
from .record import Recorder, option_parser

METHODS = ("manual prompt", "fine-tuning", "manual prompt and fine-tuning", "P-tuning")
TUNED_TOO = "P-tuning and fine-tuning"  # on language understanding only
LORA = "manual prompt and LoRA"  # chapter 7's, recorded by `lora_tasks`
RATES = {
    "fine-tuning": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    "manual prompt and fine-tuning": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    "P-tuning": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    TUNED_TOO: (3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    LORA: (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
PROBES = {  # the best of chapter 2's handcrafted templates on all facts, and the number of steps
    "P17": ("The city of [X] is in the country of [Y].", 80),
    "P1376": ("The city of [X] is the capital of [Y].", 60),
    "P37": ("In [X], the official language is [Y].", 60),
}
UNDERSTANDING = {  # the template, the label words in the order of the classes, and the number of steps
    "reviews": ("Review: [X]\nSentiment: [Y].", ("negative", "positive"), 40),
    "wic": ("[X] Answer: [Y].", ("no", "yes"), 40),
}
WITH_SUPERGLUE = {  # needs --superglue
    "boolq": ("[X] Answer: [Y].", ("no", "yes"), 40),
    "cb": ("[X] Answer: [Y].", ("yes", "no", "maybe"), 40),
    "rte": ("[X] Answer: [Y].", ("yes", "no"), 40),
}
SWEPT_ON = ("P17", "reviews")
SHOTS = 32
SEEDS = (0, 1, 2)
DEV, TEST = 200, 400  # rows of dev and test at most, but for P17's test


@dataclass
class Task:
    """One task with one draw of its data, as (text, answer) pairs in `train`, `dev` and `test`.

    `words` is None for probing, where an answer is a token id; else the label words' ids, and an answer is an index.
    `template` is the manual one. `other_text` are sentences that the task does not use.
    """

    name: str
    seed: int
    template: str
    words: list | None
    steps: int
    rows: dict = field(repr=False)
    other_text: list = field(repr=False)


def probing_task(tokenizer, relation, seed, other_text, lama=None, limit=None):
    """A relation with the facts that are one token; fold `seed` where there are folds, LAMA's own files if given."""
    template, steps = PROBES[relation]
    data = load_lama(Path(lama) / relation) if lama else load_facts(relation, 0 if relation == "P17" else seed)
    rows = {split: one_token_facts(tokenizer, facts)[:limit] for split, facts in data.items()}
    _check_splits(relation, rows)
    rows["dev"] = rows["dev"][:DEV]
    template = RELATIONS[relation].template if lama else template
    return Task(relation, seed, template, None, steps, rows, other_text)


def understanding_task(tokenizer, name, seed, other_text, source=None, limit=None):
    """32 examples to train on, 32 to choose on, drawn by `seed`; at most 400 to test on.

    Where the test set has no labels, as SuperGLUE's, its validation set is the test set, and dev is drawn from train.
    """
    template, words, steps = (UNDERSTANDING | WITH_SUPERGLUE)[name]
    data = load_reviews(source) if name == "reviews" else load_superglue(name, source)
    rows = {}
    for split, part in data.items():
        rows[split] = [(text_of(name, row), int(row["label"])) for row in part if "label" in row]
    labelled = rows.get("test") or []
    if not labelled or min(label for _, label in labelled) < 0:
        rows["test"] = rows["dev"]
        drawn = random.Random(seed).sample(rows["train"], min(2 * SHOTS, len(rows["train"])))
        rows["train"], rows["dev"] = drawn[:SHOTS], drawn[SHOTS:]
    else:
        rows["train"], rows["dev"] = (balanced(rows[split], SHOTS, seed) for split in ("train", "dev"))
    rows["test"] = rows["test"][: limit or TEST]
    _check_splits(name, rows)
    ids = [answer_id(tokenizer, word) for word in words]
    return Task(name, seed, template, ids, steps, rows, other_text)


def _check_splits(name, rows):
    for split in ("train", "dev", "test"):
        if not rows.get(split):
            raise ValueError(f"{name}: no {split} rows; expected the files train.jsonl, dev.jsonl and test.jsonl")


class Method:
    """A method on a task: what is trained, the loss of a batch, and which rows are right."""

    def __init__(self, name, model, tokenizer, task):
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.template, self.encoder, self.classifier = task.template, None, None
        model.requires_grad_("fine-tuning" in name)
        self.trained = model
        torch.manual_seed(task.seed)
        if name == LORA:
            add_lora(model, "all-linear", rank=8, alpha=16)
        if "P-tuning" in name:
            self.template, start = soften(model, tokenizer, task.template)
            self.encoder = PromptEncoder(len(start), start.shape[1], start).to(model.device)
            self.trained = self.encoder if name == "P-tuning" else nn.ModuleList([model, self.encoder])
        elif name == "fine-tuning" and task.words is None:
            self.template = "[X] [Y]."  # nothing but the subject
        elif name == "fine-tuning":
            body, pool = (model.base_model, mean_of_tokens if tokenizer.mask_token else last_token)
            self.classifier = self.trained = Classifier(body, tokenizer, len(task.words), pool)

    def vectors(self):
        return None if self.encoder is None else self.encoder()

    def loss(self, batch):
        if self.classifier is None:
            return answer_loss(self.model, self.tokenizer, self.template, batch, self.vectors(), self.task.words)
        labels = torch.tensor([label for _, label in batch], device=self.model.device)
        return F.cross_entropy(self.classifier([text for text, _ in batch]), labels)

    @torch.no_grad()
    def answers(self, rows, batch_size=32):
        """(n,): the answers given, token ids or classes."""
        texts = [text for text, _ in rows]
        if self.classifier is not None:
            parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
            return torch.cat([self.classifier(part).argmax(dim=1).cpu() for part in parts])
        logits = prompt_logits(self.model, self.tokenizer, self.template, texts, self.vectors())
        return (logits if self.task.words is None else logits[:, self.task.words]).argmax(dim=1)

    def right(self, rows):
        """(n,) bool."""
        return self.answers(rows) == torch.tensor([answer for _, answer in rows])


def run(name, model, tokenizer, task, lr, steps=None, test=True):
    """Train one method on one task; its score, its rows' hits, its cost here and elsewhere. The model is restored."""
    method = Method(name, model, tokenizer, task)
    before = copy.deepcopy(model.state_dict()) if "fine-tuning" in name else None
    found = {"method": name, "task": task.name, "seed": task.seed, "lr": lr}
    try:
        with PeakMemory(model.device) as memory:
            if name in RATES:
                batch_size = min(16 if task.words is None else 8, len(task.rows["train"]))
                history = train(
                    method.trained,
                    method.loss,
                    task.rows["train"],
                    lr,
                    steps or task.steps,
                    score=lambda: method.right(task.rows["dev"]).double().mean().item(),
                    batch_size=batch_size,
                    seed=task.seed,
                    every=max(1, (steps or task.steps) // 5),
                )
                found |= {"dev": history.best_score, "step": history.best_step, "seconds": history.seconds}
                found |= {"stopped": history.stopped, "scores": history.scores}
            else:
                found |= {"dev": method.right(task.rows["dev"]).double().mean().item(), "seconds": 0.0}
        trainable = sum(w.numel() for w in method.trained.parameters() if w.requires_grad) if name in RATES else 0
        kept = trainable
        if method.encoder is not None:  # its vectors are kept, the networks that made them are not
            kept += method.vectors().numel() - sum(w.numel() for w in method.encoder.parameters())
        found |= {"trainable": trainable, "stored_bytes": 4 * kept, "peak_bytes": memory.peak}
        if test:
            given, wanted = method.answers(task.rows["test"]), torch.tensor([a for _, a in task.rows["test"]])
            hits = given == wanted
            low, high = bootstrap_interval(hits)
            found |= {"test": hits.double().mean().item(), "low": low, "high": high, "n": len(hits)}
            found |= {"hits": "".join(str(int(hit)) for hit in hits), "elsewhere": elsewhere(model, tokenizer, task)}
            found |= {} if task.words is None else {"macro_f1": macro_f1(given, wanted)}
    finally:
        if before is not None:
            model.load_state_dict(before)
        if name == LORA:
            unload(model)
        model.requires_grad_(False).eval()
    return found


def macro_f1(given, wanted):
    """The mean over the classes that occur of 2 × right / (given + wanted): SuperGLUE's second metric for CB."""
    scores = []
    for label in wanted.unique():
        right = ((given == label) & (wanted == label)).sum()
        scores.append(2 * right / ((given == label).sum() + (wanted == label).sum()))
    return torch.stack(scores).double().mean().item()


def elsewhere(model, tokenizer, task):
    """What the model as it is does on a relation that no task uses, and on text that this task does not use."""
    hits = untouched_hits(model, tokenizer)  # none where the model knows none of the answers as one token
    p_at_1 = hits.double().mean().item() if len(hits) else None
    return {"relation": UNTOUCHED[0], "p_at_1": p_at_1, "perplexity": perplexity(model, tokenizer, task.other_text)}


def majority(task):
    """Always the most frequent training answer: its hits on test."""
    answers = [answer for _, answer in task.rows["train"]]
    given = most_frequent(answers)
    hits = torch.tensor([answer == given for _, answer in task.rows["test"]])
    row = {"method": "majority class", "task": task.name, "seed": task.seed}
    return {**row, "test": hits.double().mean().item(), "n": len(hits)}


def main(arguments=None):
    parser = option_parser(__doc__)
    parser.add_argument("--lama", default=None, help="folder with a folder a relation, each with LAMA's JSONL files")
    parser.add_argument("--superglue", default=None, help="folder of the unpacked release, or a hub id")
    parser.add_argument("--reviews", default=None, help="folder of SST-2's JSONL files, or a hub id")
    options = parser.parse_args(arguments)

    model, tokenizer = load_lm(options.model, options.device, torch.float32)
    model.requires_grad_(False)
    torch.manual_seed(0)
    random_model = type(model)(model.config).to(model.device, model.dtype).eval().requires_grad_(False)
    plain = [row["sentence1"] for row in load_wic()["test"]][:100]
    film = [row["sentence"] for row in load_reviews()["test"]][-100:]

    def task(name, seed):
        if name in PROBES:
            return probing_task(tokenizer, name, seed, plain, options.lama, options.limit)
        source = options.reviews if name == "reviews" else options.superglue
        return understanding_task(tokenizer, name, seed, plain if name == "reviews" else film, source, options.limit)

    names = [*PROBES, *UNDERSTANDING, *(WITH_SUPERGLUE if options.superglue else ())]
    methods = {name: METHODS if name in PROBES else (*METHODS, TUNED_TOO) for name in names}
    total = sum(len(RATES.get(method, ())) for swept in SWEPT_ON for method in methods[swept])
    total += sum(1 + len(SEEDS) * (1 + len(chosen)) for chosen in methods.values())
    settings = {"model": options.model, "lama": options.lama, "superglue": options.superglue}
    settings |= {"reviews": options.reviews, "steps": options.steps, "limit": options.limit}
    recorder = Recorder("four_way", options.out, model.device, total, save=options.save, **settings)
    best = {}
    for swept in SWEPT_ON:
        for method in methods[swept][1:]:
            keys = {lr: f"sweep/{swept}/{method}/{lr:g}" for lr in RATES[method]}
            for lr, key in keys.items():
                run_it = (method, model, tokenizer, (swept, 0), lr)
                recorder.piece(key, lambda r=run_it: run(*r[:3], task(*r[3]), r[4], options.steps, test=False))
            best[swept, method] = max(keys, key=lambda lr, keys=keys: recorder.pieces[keys[lr]]["dev"])
    for name in methods:
        swept = SWEPT_ON[0] if name in PROBES else SWEPT_ON[1]
        for seed in SEEDS:
            recorder.piece(f"control/majority/{name}/{seed}", lambda t=name, s=seed: majority(task(t, s)))
            for method in methods[name]:
                run_it = (method, model, tokenizer, (name, seed), best.get((swept, method)))
                key = f"run/{name}/{method}/{seed}"
                recorder.piece(key, lambda r=run_it: run(*r[:3], task(*r[3]), r[4], options.steps))
        run_it = ("P-tuning", random_model, tokenizer, (name, 0), best[swept, "P-tuning"])
        key = f"control/random model/{name}"
        recorder.piece(key, lambda r=run_it: run(*r[:3], task(*r[3]), r[4], options.steps))
    recorder.finish()


if __name__ == "__main__":
    main()
