"""Chapter 3's recorded run: where trained prompts end up, and what is left of them among words.

    python -m tuning.experiments.learned_prompts

The trainings are the ledger's: its task, steps, dev set and rates, which its sweep chose. Each prompt is kept with five
digits a number, and scored as it is kept. Then its vectors are snapped to their nearest words and scored again,
the loss is taken along straight lines between prompts that lie far apart, and two other lengths are trained from random
words, each at the rate that dev chooses for it. (Six, the ledger's, lies between.)
"""

import torch

from ..evaluate import as_text, share_right
from ..methods import fit, prepare, right
from ..models import load_lm
from ..p_tuning import PromptVectors, answer_loss, nearest_tokens, prompt_logits
from ..prompts import embeddings_of
from . import ledger
from .record import Recorder, load_results, option_parser

STARTS = {"from the prompt": "prompt tuning, from the prompt", "random words": "prompt tuning"}
SEEDS = (0, 1, 2)
LENGTHS = (1, 20)
RATES = (0.3, 1.0, 3.0)
PLACES = 11  # on a line
SOME = 200  # test facts on a line


def digits(vectors, count=5):
    """Numbers with so many significant digits, as lists."""
    return [[float(f"{value:.{count - 1}e}") for value in row] for row in vectors.tolist()]


def scored(model, tokenizer, template, rows, vectors):
    """What a prompt has right, on dev as a share and on test city by city, and how often it answers with a country."""
    countries = {token for split in rows.values() for _, (token,) in split}
    facts = {split: [(city, token) for city, (token,) in rows[split]] for split in ("dev", "test")}
    logits = {split: prompt_logits(model, tokenizer, template, facts[split], vectors) for split in facts}
    said = logits["test"].argmax(dim=1).tolist()
    return {
        "dev": share_right(logits["dev"], facts["dev"]).double().mean().item(),
        "hits": as_text(share_right(logits["test"], facts["test"])),
        "country": sum(token in countries for token in said) / len(said),
    }


def learned(name, task, template, method, lr, seed, steps, limit=None):
    """One of the ledger's trainings, and its vectors beside the words of the vocabulary."""
    model, tokenizer = load_lm(name)
    rows = ledger.rows_of(tokenizer, task, limit)
    ready = prepare(method, model, tokenizer, template, seed)
    start, soft = ready.vectors().detach().clone(), ready.template
    embeddings = embeddings_of(model).float()
    found = {"lr": lr, "seed": seed, "template": soft}
    found["untrained"] = scored(model, tokenizer, soft, rows, start)
    history = fit(ready, rows["train"], rows["dev"], lr, steps, seed)
    kept = digits(ready.vectors().detach())
    vectors = torch.tensor(kept)
    tokens, distances = nearest_tokens(vectors, embeddings)
    before, _ = nearest_tokens(start, embeddings)
    found |= {"step": history.step, "scores": history.scores, "vectors": kept}
    found |= {"norms": vectors.norm(dim=1).tolist(), "start_norms": start.norm(dim=1).tolist()}
    found |= {"moved": (vectors - start).norm(dim=1).tolist(), "nearest": distances.tolist()}
    found["learned"] = scored(model, tokenizer, soft, rows, vectors)
    found["snapped"] = scored(model, tokenizer, soft, rows, embeddings[tokens])
    found["start words"] = [tokenizer.decode(token) for token in before]
    found["nearest words"] = [tokenizer.decode(token) for token in tokens]
    return found


def line(name, task, template, start, end, limit=None):
    """The loss on test facts at places along the straight line between two prompts."""
    model, tokenizer = load_lm(name)
    facts = [(city, token) for city, (token,) in ledger.rows_of(tokenizer, task, limit)["test"][:SOME]]
    start, end = torch.tensor(start), torch.tensor(end)
    places, losses = torch.linspace(0, 1, PLACES).tolist(), []
    for place in places:
        vectors, total = start + place * (end - start), 0.0
        for first in range(0, len(facts), 50):
            some = facts[first : first + 50]
            with torch.no_grad():
                total += len(some) * answer_loss(model, tokenizer, template, some, vectors).item()
        losses.append(total / len(facts))
    return {"distance": (end - start).norm().item(), "places": places, "losses": losses}


def of_length(name, task, length, lr, steps, test, limit=None):
    """Prompt tuning from so many random words: half of them in front of the subject, half behind it."""
    model, tokenizer = load_lm(name)
    rows = ledger.rows_of(tokenizer, task, limit)
    ready = prepare("prompt tuning", model, tokenizer, "[X] [Y].", 0)
    embeddings = embeddings_of(model).float()
    drawn = torch.randint(len(embeddings), (length,), generator=torch.Generator().manual_seed(0))
    ready.template = "[P]" * (length // 2) + " [X]" + "[P]" * (length - length // 2) + " [Y]."
    ready.encoder = ready.trained = PromptVectors(embeddings[drawn])
    history = fit(ready, rows["train"], rows["dev"], lr, steps, 0)
    found = {"lr": lr, "template": ready.template, "dev": history.dev, "step": history.step, "scores": history.scores}
    return found | ({"hits": as_text(right(ready, rows["test"]))} if test else {})


def main(arguments=None):
    parser = option_parser(__doc__, ledger.STEPS)
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS, help="other lengths to train")
    options = parser.parse_args(arguments)
    name, limit, steps, task = options.model, options.limit, options.steps, ledger.TASK
    pieces = load_results("ledger")["results"]
    template = pieces["asked"]["template"]
    rates = {kind: pieces[f"run/{method}/0"]["lr"] for kind, method in STARTS.items()}
    settings = {"model": name, "task": task, "steps": steps, "limit": limit, "template": template, "rates": rates}
    total = len(STARTS) * len(SEEDS) + 3 + len(options.lengths) * (len(RATES) + 1)
    recorder = Recorder("learned_prompts", options.out, torch.device("cpu"), total, save=options.save, **settings)
    ends = {}
    for kind, method in STARTS.items():
        for seed in SEEDS:
            key = f"{kind}/{seed}"
            ends[key] = recorder.piece(key, learned, name, task, template, method, rates[kind], seed, steps, limit)
    model, tokenizer = load_lm(name)
    words = prepare(STARTS["from the prompt"], model, tokenizer, template)
    ends["start"] = {"vectors": digits(words.vectors().detach()), "template": words.template}
    lines = [("start", "from the prompt/0"), *((f"{kind}/0", f"{kind}/1") for kind in STARTS)]
    for one, other in lines:
        between = [ends[end]["vectors"] for end in (one, other)]
        recorder.piece(f"line/{one}/{other}", line, name, task, ends[one]["template"], *between, limit)
    for length in options.lengths:
        swept = {}
        for lr in RATES:
            key = f"length/{length}/{lr:g}"
            swept[lr] = recorder.piece(key, of_length, name, task, length, lr, steps, False, limit)["dev"]
        best = max(swept, key=swept.get)
        recorder.piece(f"length/{length}", of_length, name, task, length, best, steps, True, limit)
    recorder.finish()


if __name__ == "__main__":
    main()
