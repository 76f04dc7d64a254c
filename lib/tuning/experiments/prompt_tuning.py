"""Chapter 3's recorded run: prompts of free vectors on P17, by rate, start and length.

    python -m tuning.experiments.prompt_tuning

Everything is chosen on 200 dev facts and reported on all test facts of fold 0. Rates are swept for each kind of start
on one seed; the starts are then compared over three seeds, and the lengths, from random words, on one. (The handcrafted
words make eight vectors, the other starts have six: starts are compared as one would use them.)
"""

import torch

from ..evaluate import facts_with_ids, p_at_1, share_right
from ..models import load_lm
from ..p_tuning import PromptVectors, answer_loss, prompt_logits, soften
from ..prompts import embeddings_of
from ..training import train
from .record import Recorder, option_parser

RELATION = "P17"
HANDCRAFTED = "The city of [X] is in the country of [Y]."  # the best of chapter 2's on dev and test
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LENGTHS = (2, 4, 12)
SEEDS = (0, 1, 2)
STEPS = 150  # of the sweeps too: the best rate depends on the number of steps
DEV = 200


def pseudo_template(length):
    """Half of the pseudo tokens in front of the subject, half behind it: with 6, the paper's (3,3,0)."""
    return "[P]" * (length // 2) + " [X]" + "[P]" * (length - length // 2) + " [Y]."


def starting_vectors(model, tokenizer, kind, length, seed):
    """A template and where its vectors start: at the handcrafted words, at random words, or at random numbers.

    Random numbers have the embeddings' own standard deviation.
    """
    if kind == "text":
        return soften(model, tokenizer, HANDCRAFTED)
    embeddings = embeddings_of(model).float()
    generator = torch.Generator().manual_seed(seed)
    if kind == "vocabulary":
        tokens = torch.randint(len(embeddings), (length,), generator=generator)
        return pseudo_template(length), embeddings[tokens.to(embeddings.device)]
    noise = torch.randn(length, embeddings.shape[1], generator=generator).to(embeddings.device)
    return pseudo_template(length), noise * embeddings.std()


def right(model, tokenizer, template, facts, vectors=None):
    """(n,) bool: P@1 over the vocabulary, fact by fact."""
    return share_right(prompt_logits(model, tokenizer, template, facts, vectors), facts)


def tune(model, tokenizer, data, template, encoder, lr, steps, seed, test=True):
    """Train a prompt encoder (or plain vectors) on facts; what it reached, how it got there, and what it cost."""
    encoder.to(model.device)
    dev = data["dev"][:DEV]

    def score():
        with torch.no_grad():
            return right(model, tokenizer, template, dev, encoder()).double().mean().item()

    def loss_on(facts):
        return answer_loss(model, tokenizer, template, facts, encoder())

    history = train(encoder, loss_on, data["train"], lr, steps, score, seed=seed, every=max(1, steps // 5))
    vectors = encoder().detach()
    found = {
        "template": template,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "dev": history.best_score,
        "best_step": history.best_step,
        "scores": history.scores,
        "losses": [round(loss, 4) for loss in history.losses],
        "stopped": history.stopped,
        "seconds": history.seconds,
        "trainable": sum(weight.numel() for weight in encoder.parameters()),
        "kept": vectors.numel(),
        "mean_norm": vectors.norm(dim=1).mean().item(),
    }
    return {**found, "test": p_at_1(right(model, tokenizer, template, data["test"], vectors))} if test else found


def main(arguments=None):
    options = option_parser(__doc__, STEPS).parse_args(arguments)
    model, tokenizer = load_lm(options.model, options.device)
    model.requires_grad_(False)
    data = facts_with_ids(tokenizer, RELATION, limit=options.limit)
    settings = {"model": options.model, "steps": options.steps, "limit": options.limit}
    starts = ("text", "vocabulary", "random")
    total = 1 + len(starts) * (len(RATES) + len(SEEDS)) + len(LENGTHS)
    recorder = Recorder("prompt_tuning", options.out, model.device, total, save=options.save, **settings)

    def run(kind, length, lr, seed, steps, test=True):
        template, start = starting_vectors(model, tokenizer, kind, length, seed)
        return tune(model, tokenizer, data, template, PromptVectors(start), lr, steps, seed, test)

    recorder.piece("handcrafted", lambda: p_at_1(right(model, tokenizer, HANDCRAFTED, data["test"])))
    best = {}
    for kind in starts:
        for lr in RATES:
            recorder.piece(f"sweep/{kind}/{lr:g}", lambda k=kind, lr=lr: run(k, 6, lr, 0, options.steps, test=False))
        best[kind] = max(RATES, key=lambda lr, kind=kind: recorder.pieces[f"sweep/{kind}/{lr:g}"]["dev"])
    for kind in starts:
        for seed in SEEDS:
            recorder.piece(f"start/{kind}/{seed}", lambda k=kind, s=seed: run(k, 6, best[k], s, options.steps))
    for n in LENGTHS:
        recorder.piece(f"length/{n}", lambda n=n: run("vocabulary", n, best["vocabulary"], 0, options.steps))
    recorder.finish()


if __name__ == "__main__":
    main()
