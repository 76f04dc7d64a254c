"""The book's ledger: one wish, the country of a city, and a row for each method that grants it.

    python -m tuning.experiments.ledger

The handcrafted prompt is the best on dev, and so are the number of examples to show and each method's rate: a sweep of
rates on seed 0 that goes on until the lowest learns next to nothing and the highest fails. At the chosen rate there are
three seeds, which draw what a method begins with and the order of the training facts. All train for as many steps, and
keep the state that had most of dev right, of those before the first step and after each 30.

Beside the countries of the test cities, each row has what it cost elsewhere: continents of countries, which nobody
trained on, and perplexity of other text. A prompt's vectors leave the model alone, so without them it is as it was.
Minutes and peak memory come last: of one training without looks at dev, each in a process of its own. Leave the machine
alone meanwhile.
"""

import gc
import json
import subprocess
import sys

import torch

from ..data import TEMPLATES, load_facts
from ..evaluate import (
    as_text,
    bootstrap_interval,
    elsewhere,
    facts_with_ids,
    most_frequent,
    paired_interval,
    share_right,
)
from ..memory import PeakMemory
from ..methods import METHODS, fit, prepare, right
from ..models import load_lm
from ..p_tuning import prompt_logits
from ..prompts import few_shot
from ..qlora import quantize_model
from .record import Recorder, option_parser

TASK = "P17"
SHOWN = (1, 2, 4, 8, 16, 32, 64)  # examples in front of the question
STEPS, DEV = 150, 200
SEEDS = (0, 1, 2)


def rows_of(tokenizer, task, limit=None):
    """{split: [(subject, [answer's token id])]}, of dev the first 200."""
    found = {
        split: [(subject, [answer]) for subject, answer in facts]
        for split, facts in facts_with_ids(tokenizer, task, limit=limit).items()
    }
    return found | {"dev": found["dev"][:DEV]}


def hits_of(model, tokenizer, template, rows):
    """ "0101…": which rows a prompt of words gets right, over the whole vocabulary."""
    facts = [(subject, answer) for subject, (answer,) in rows]
    return as_text(share_right(prompt_logits(model, tokenizer, template, facts), facts))


def share(hits):
    return hits.count("1") / len(hits)


def away(model, tokenizer, limit=None):
    """`evaluate.elsewhere`, with the hits as a text."""
    found = elsewhere(model, tokenizer, limit)
    return found | {"continents": as_text(found["continents"])}


def always_the_most_frequent(name, task, limit=None):
    """The answer that is the most frequent in training, given to every test city."""
    _, tokenizer = load_lm(name)
    rows = rows_of(tokenizer, task, limit)
    answer = most_frequent([token for _, (token,) in rows["train"]])
    return {"answer": tokenizer.decode(answer), "hits": as_text(token == answer for _, (token,) in rows["test"])}


def asked(name, task, four_bits=False, limit=None):
    """Every handcrafted prompt on dev, and the best of them on test and elsewhere."""
    model, tokenizer = load_lm(name)
    rows = rows_of(tokenizer, task, limit)
    dev = {template: share(hits_of(model, tokenizer, template, rows["dev"])) for template in TEMPLATES[task]}
    template = max(dev, key=dev.get)
    if four_bits:
        quantize_model(model)
    return {
        "dev": dev,
        "template": template,
        "hits": hits_of(model, tokenizer, template, rows["test"]),
        "elsewhere": away(model, tokenizer, limit),
    }


def shown(name, task, template, count, seed, test, limit=None):
    """The handcrafted prompt behind `count` training facts with their answers, drawn by the seed."""
    model, tokenizer = load_lm(name)
    rows = rows_of(tokenizer, task, limit)
    facts = load_facts(task)["train"]
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    examples = [(facts[index]["sub_label"], facts[index]["obj_label"]) for index in order]
    prompt = few_shot(template, examples)
    found = {"prompt": prompt, "dev": share(hits_of(model, tokenizer, prompt, rows["dev"]))}
    return found | ({"hits": hits_of(model, tokenizer, prompt, rows["test"])} if test else {})


def trained(name, task, template, method, lr, seed, steps, test, limit=None):
    """One training by a method, and what it scored."""
    model, tokenizer = load_lm(name)
    rows = rows_of(tokenizer, task, limit)
    ready = prepare(method, model, tokenizer, template, seed)
    history = fit(ready, rows["train"], rows["dev"], lr, steps, seed)
    found = {"lr": lr, "seed": seed, "dev": history.dev, "step": history.step, "scores": history.scores}
    found |= {"stopped": history.stopped, "seconds": history.seconds}
    found |= {"losses": [round(loss, 4) for loss in history.losses]}
    if test:
        found |= {"template": ready.template, "hits": as_text(right(ready, rows["test"]))}
        found |= {"trained": sum(weight.numel() for weight in ready.weights()), "kept_bytes": 4 * ready.kept()}
        if ready.trained is model:  # else it is as it was
            found |= {"elsewhere": away(model, tokenizer, limit)}
    return found


def cost(name, task, template, method, steps):
    """Seconds and peak memory of a training without looks at dev, in this process."""
    model, tokenizer = load_lm(name)
    rows = rows_of(tokenizer, task)
    ready = prepare(method, model, tokenizer, template)
    gc.collect()
    with PeakMemory(model.device) as memory:
        history = fit(ready, rows["train"], None, METHODS[method].rates[0], steps)
    return {"seconds": history.seconds, "steps": steps, "peak_bytes": memory.peak}


def cost_apart(*arguments):
    """`cost` in a process of its own."""
    code = "import json, sys; from tuning.experiments import ledger; "
    code += "print(json.dumps(ledger.cost(*json.loads(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {arguments} ended with status {done.returncode}; its message stands above")
    return json.loads(done.stdout.splitlines()[-1])


def sweep(rates, run, more=2):
    """The rate with the best dev share, after going on at both ends, `more` times each at most.

    Downwards until the end of training has gained no more than a quarter of what the best run has; upwards until it
    stands where it began, or below half of the best.

    Args:
        run: a function from a rate to what `trained` returns.
    """
    swept = {lr: run(lr) for lr in rates}
    start = swept[rates[0]]["scores"][0][1]

    def end(lr):
        return start if swept[lr]["stopped"] else swept[lr]["scores"][-1][1]

    for _ in range(more):
        best, low, high = max(one["dev"] for one in swept.values()), min(swept), max(swept)
        if end(low) > start + (best - start) / 4:
            swept[low / 10] = run(low / 10)
        if end(high) > max(start, best / 2):
            swept[high * 3] = run(high * 3)
    return max(swept, key=lambda lr: swept[lr]["dev"])


def row(name, chapter, hits, asked_hits, kept_bytes, untouched, **more):
    """A row of the ledger: counts with intervals over test cities, and over seeds where there are several.

    Args:
        hits: a text "0101…" a seed; asked_hits: those of the handcrafted prompt, to compare with.
        untouched: what `away` said, a seed each; one where the model is as it was; None where there is no model.
    """
    values = [torch.tensor([int(hit) for hit in text]).double() for text in hits]
    base = torch.tensor([int(hit) for hit in asked_hits]).double()
    n = len(base)

    def count(parts):
        interval = bootstrap_interval(parts[0]) if len(parts) == 1 else paired_interval(parts, same_items=True)
        return [n * value for value in (torch.cat(parts).mean().item(), *interval)]

    found = {"method": name, "chapter": chapter, "seeds": len(hits), "subjects": n, "right": count(values)}
    found |= {"over asking": count([value - base for value in values]), "kept_bytes": kept_bytes, **more}
    if untouched:
        continents = [one["continents"].count("1") for one in untouched]
        found |= {"continents": sum(continents) / len(continents), "countries": len(untouched[0]["continents"])}
        found |= {"perplexity": sum(one["perplexity"] for one in untouched) / len(untouched)}
    return found


def rows(pieces):
    """The ledger's rows, from the pieces that `main` recorded."""
    asked_first = pieces["asked"]
    hits, untouched = asked_first["hits"], [asked_first["elsewhere"]]
    most = pieces["most frequent"]
    found = [
        row("most frequent answer", 1, [most["hits"]], hits, len(most["answer"].strip().encode()), None),
        row("asked", 1, [hits], hits, len(asked_first["template"].encode()), untouched),
    ]
    runs = [pieces[f"shown/{seed}"] for seed in SEEDS]
    size = round(sum(len(run["prompt"].encode()) for run in runs) / len(runs))
    found.append(row("asked with examples", 1, [run["hits"] for run in runs], hits, size, untouched))
    for method, told in METHODS.items():
        if f"run/{method}/0" not in pieces:
            continue
        runs, spent = [pieces[f"run/{method}/{seed}"] for seed in SEEDS], pieces.get(f"cost/{method}", {})
        after = [run["elsewhere"] for run in runs if "elsewhere" in run] or untouched
        more = {"trained": runs[0]["trained"], "lr": runs[0]["lr"]}
        more |= {"seconds": spent.get("seconds"), "peak_bytes": spent.get("peak_bytes")}
        found.append(row(method, told.chapter, [r["hits"] for r in runs], hits, runs[0]["kept_bytes"], after, **more))
    return found


def main(arguments=None):
    parser = option_parser(__doc__, STEPS)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="all, if not told")
    options = parser.parse_args(arguments)
    name, limit, steps = options.model, options.limit, options.steps
    settings = {"model": name, "task": TASK, "steps": steps, "limit": limit}
    total = 4 + len(SHOWN) + len(SEEDS) + sum(len(METHODS[m].rates) + len(SEEDS) + 1 for m in options.methods)
    recorder = Recorder("ledger", options.out, torch.device("cpu"), total, save=options.save, **settings)
    recorder.piece("most frequent", always_the_most_frequent, name, TASK, limit)
    template = recorder.piece("asked", asked, name, TASK, False, limit)["template"]
    recorder.piece("asked, four bits", asked, name, TASK, True, limit)
    tried = {
        count: recorder.piece(f"sweep/shown/{count}", shown, name, TASK, template, count, 0, False, limit)["dev"]
        for count in SHOWN
    }
    best = max(tried, key=tried.get)
    for seed in SEEDS:
        recorder.piece(f"shown/{seed}", shown, name, TASK, template, best, seed, True, limit)
    for method in options.methods:

        def run(lr, method=method):
            key = f"sweep/{method}/{lr:g}"
            return recorder.piece(key, trained, name, TASK, template, method, lr, 0, steps, False, limit)

        lr = sweep(METHODS[method].rates, run)
        for seed in SEEDS:
            key = f"run/{method}/{seed}"
            recorder.piece(key, trained, name, TASK, template, method, lr, seed, steps, True, limit)
    print("costs: leave the machine alone now", flush=True)
    for method in options.methods:
        recorder.piece(f"cost/{method}", cost_apart, name, TASK, template, method, steps)
    recorder.piece("rows", rows, recorder.pieces)
    recorder.finish()


if __name__ == "__main__":
    main()
