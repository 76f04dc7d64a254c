"""Chapter 2's recorded run: how wording moves P@1 on four relations, few-shot prompts, controls, and both searches.

    python -m tuning.experiments.probe

Facts are those of `load_facts`. Templates are not trained, so on the small relations each is scored on all subjects; on
P17 on the test set of fold 0. Whatever is chosen (a paraphrase, trigger tokens) is chosen on dev, and reported on test.
"""

import itertools
import random

import torch
from datasets import concatenate_datasets

from ..data import TEMPLATES, load_facts, paraphrases
from ..evaluate import hits_at_1, most_frequent, p_at_1
from ..models import load_lm
from ..prompts import allowed_tokens, answer_id, answer_logits, encode, few_shot, search_triggers
from .record import Recorder, option_parser

RELATIONS = ("P17", "P1376", "P37", "P30")
SHOTS = (1, 2, 4, 8)
ORDERS = 24
SEEDS = 1  # of each token search
SOME = 200  # rows of P17's dev or test where many prompts are compared
STARTS = {  # where the token search begins: a neutral start, and a sentence a person would write
    "P17": ("the the the the the", "is in the country of"),
    "P1376": ("the the the the the", "is the capital city of"),
    "P37": ("the the the the the", "has the official language of"),
    "P30": ("the the the the the", "is on the continent of"),
}


class Probe:
    """A model with its tokenizer and the facts of one relation, cut to `limit` rows a split."""

    def __init__(self, model, tokenizer, relation, limit=None):
        self.model, self.tokenizer, self.relation, self.limit = model, tokenizer, relation, limit
        self.folds = range(1) if relation == "P17" else range(3)
        facts = load_facts(relation)
        self.everything = concatenate_datasets(list(facts.values()))
        self.candidates = sorted({answer_id(tokenizer, word) for word in self.everything["obj_label"]})

    def rows(self, split, fold=0):
        """(subject, answer) pairs of a split; those of `"all"` are what a template is reported on."""
        whole = split == "all" and self.relation != "P17"
        data = self.everything if whole else load_facts(self.relation, fold)["test" if split == "all" else split]
        return list(zip(data["sub_label"], data["obj_label"], strict=True))[: self.limit]

    def hits(self, template, rows, triggers=(), model=None):
        """Per row: is the answer the first choice in the whole vocabulary, and among the candidates?"""
        prompts = [encode(self.tokenizer, template, subject, triggers) for subject, _ in rows]
        logits = answer_logits(model or self.model, self.tokenizer, prompts)
        answers = [answer_id(self.tokenizer, answer) for _, answer in rows]
        return hits_at_1(logits, answers), hits_at_1(logits, answers, self.candidates)

    def report(self, template, rows, triggers=(), model=None):
        return both_ways(*self.hits(template, rows, triggers, model))


def both_ways(hits, among_candidates):
    """P@1 over the vocabulary, with its interval, and among the candidates."""
    return p_at_1(hits) | {"candidates": among_candidates.double().mean().item()}


def score_templates(probe):
    rows = probe.rows("all")
    return [{"template": template, **probe.report(template, rows)} for template in TEMPLATES[probe.relation]]


def search_paraphrases(probe):
    """Each candidate's P@1 on dev and test of each fold, and the one that dev chooses. On P17 200 rows of each."""
    templates = paraphrases(probe.relation) + TEMPLATES[probe.relation]
    splits = [(probe.rows("dev", fold)[:SOME], probe.rows("test", fold)[:SOME]) for fold in probe.folds]
    rows = sorted({row for split in splits for part in split for row in part})
    hits = [dict(zip(rows, probe.hits(template, rows)[0].tolist(), strict=True)) for template in templates]
    found = []
    for fold, (dev, test) in zip(probe.folds, splits, strict=True):
        scores = [[sum(hit[row] for row in part) / len(part) for part in (dev, test)] for hit in hits]
        best = max(range(len(templates)), key=lambda index: scores[index][0])
        chosen = {"fold": fold, "template": templates[best], "dev": scores[best][0], "test": scores[best][1]}
        found.append({**chosen, "n_dev": len(dev), "n_test": len(test), "scores": scores})
    return {"templates": templates, "folds": found}


def draw_examples(rows, count, seed):
    return random.Random(seed).sample(rows, count)


def score_few_shot(probe, template, seeds=3):
    """P@1 with 1, 2, 4 and 8 solved examples from the training facts, over `seeds` draws; all folds' tests together."""
    found = []
    for shots in SHOTS:
        for seed in range(seeds):
            hits = []
            for fold in probe.folds:
                shown = few_shot(template, draw_examples(probe.rows("train", fold), shots, seed))
                hits.append(probe.hits(shown, probe.rows("test", fold)[: 2 * SOME]))
            pooled = [torch.cat(parts) for parts in zip(*hits, strict=True)]
            found.append({"shots": shots, "seed": seed, **both_ways(*pooled)})
    return {"template": template, "draws": found}


def score_orders(probe, template, shots=4):
    """One draw of examples in all its orders, and as many other draws."""
    test, train = probe.rows("test")[:SOME], probe.rows("train")
    orders = list(itertools.permutations(draw_examples(train, shots, 0)))[:ORDERS]
    draws = [draw_examples(train, shots, seed) for seed in range(len(orders))]
    return {
        "template": template,
        "shots": shots,
        "n": len(test),
        "orders": [probe.report(few_shot(template, shown), test)["p_at_1"] for shown in orders],
        "draws": [probe.report(few_shot(template, shown), test)["p_at_1"] for shown in draws],
    }


def score_controls(probe, template, random_model):
    """What needs no knowledge: always the training set's most frequent answer, and a model that was never trained."""
    majority = []
    for fold in probe.folds:
        given = most_frequent([answer for _, answer in probe.rows("train", fold)])
        majority += [answer == given for _, answer in probe.rows("test", fold)]
    majority = torch.tensor(majority)
    return {
        "template": template,
        "majority": both_ways(majority, majority),
        "random_model": probe.report(template, probe.rows("all"), model=random_model),
    }


def search_tokens(probe, start, seed, steps, check_every=3):
    """Gradient-guided search from `start`'s tokens; the step with the best P@1 on dev is the result."""
    start = start.split()
    template = "[X]" + " [T]" * len(start) + " [Y]."
    as_ids = [[(s, answer_id(probe.tokenizer, a)) for s, a in probe.rows(split)] for split in ("train", "dev")]
    train, dev, test = as_ids[0], probe.rows("dev")[:SOME], probe.rows("test")[: 2 * SOME]
    triggers = [answer_id(probe.tokenizer, word) for word in start]
    best = {"step": 0, "triggers": triggers, "dev": probe.report(template, dev, triggers)["p_at_1"]}
    path = [{**best, "loss": None}]
    allowed = allowed_tokens(probe.model, probe.tokenizer, probe.candidates)
    steps_taken = search_triggers(probe.model, probe.tokenizer, template, triggers, train, allowed, steps, seed=seed)
    for step, (triggers, loss) in enumerate(steps_taken, start=1):
        now = {"step": step, "triggers": triggers}
        if step % check_every == 0 or step == steps:
            now["dev"] = probe.report(template, dev, triggers)["p_at_1"]
            best = now if now["dev"] > best["dev"] else best
        path.append({**now, "loss": loss})
    decode = probe.tokenizer.decode
    for point in path:
        point["text"] = decode(point["triggers"])
    return {
        "template": template,
        "seed": seed,
        "start": decode(path[0]["triggers"]),
        "start_test": probe.report(template, test, path[0]["triggers"]),
        "found": decode(best["triggers"]),
        "found_tokens": best["triggers"],
        "found_dev": best["dev"],
        "n_dev": len(dev),
        "found_test": probe.report(template, test, best["triggers"]),
        "path": path,
    }


def main(arguments=None):
    options = option_parser(__doc__, steps=30).parse_args(arguments)  # --limit: at least 8

    model, tokenizer = load_lm(options.model, options.device)
    torch.manual_seed(0)
    random_model = type(model)(model.config).to(model.device, model.dtype).eval()
    searches = [
        (relation, start, seed) for relation in RELATIONS for start in STARTS[relation] for seed in range(SEEDS)
    ]
    settings = {"model": options.model, "steps": options.steps, "limit": options.limit}
    recorder = Recorder(
        "probe", options.out, model.device, 4 * len(RELATIONS) + 1 + len(searches), save=options.save, **settings
    )
    probes = {relation: Probe(model, tokenizer, relation, options.limit) for relation in RELATIONS}
    chosen = {}
    for relation, probe in probes.items():
        recorder.piece(f"templates/{relation}", lambda probe=probe: score_templates(probe))
    for relation, probe in probes.items():
        found = recorder.piece(f"paraphrases/{relation}", lambda probe=probe: search_paraphrases(probe))
        chosen[relation] = found["folds"][0]["template"]
    for relation, probe in probes.items():
        template = chosen[relation]
        recorder.piece(f"few_shot/{relation}", lambda p=probe, t=template: score_few_shot(p, t))
        recorder.piece(f"controls/{relation}", lambda p=probe, t=template: score_controls(p, t, random_model))
    recorder.piece("orders/P17", lambda: score_orders(probes["P17"], chosen["P17"]))
    for relation, start, seed in searches:
        key = f"search/{relation}/{start.replace(' ', '_')}/{seed}"
        run = (probes[relation], start, seed, options.steps)
        recorder.piece(key, lambda run=run: search_tokens(*run))
    recorder.finish()


if __name__ == "__main__":
    main()
