"""Chapter 4's recorded run: what the prompt encoder is good for, on P17.

    python -m tuning.experiments.p_tuning

Six pseudo tokens are trained as plain vectors, through an MLP, and through P-tuning's BiLSTM and MLP. A fresh
encoder's vectors are short and much alike, so plain vectors have two starts: random numbers as long as embeddings, and
what a fresh encoder says. From the eight handcrafted words, plain vectors and the BiLSTM are compared. Each kind has
its own sweep of rates on one seed, chosen on 200 dev facts; then three seeds each, reported on fold 0's test facts.
"""

import torch

from ..models import load_lm
from ..p_tuning import PromptEncoder, PromptVectors
from .prompt_tuning import (
    HANDCRAFTED,
    RELATION,
    SEEDS,
    facts_with_ids,
    parse,
    share_right,
    starting_vectors,
    summary,
    tune,
)
from .record import Recorder

LENGTH = 6  # the paper's template (3,3,0)
KINDS = {  # where the vectors start, layers of the LSTM (None: no network at all), rates
    "vectors": ("random", None, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "vectors, from a fresh encoder": ("encoder", None, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "MLP": ("random", 0, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "BiLSTM and MLP": ("random", 2, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "vectors, from text": ("text", None, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "BiLSTM and MLP, from text": ("text", 2, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
}


def build(model, tokenizer, kind, seed):
    """The template and a fresh prompt encoder of a kind; its networks are drawn by `seed`."""
    start_kind, layers, _ = KINDS[kind]
    template, start = starting_vectors(model, tokenizer, start_kind, LENGTH, seed)
    torch.manual_seed(seed)
    if start_kind == "encoder":
        start = PromptEncoder(LENGTH, start.shape[1])()
    if layers is None:
        return template, PromptVectors(start)
    return template, PromptEncoder(len(start), start.shape[1], start if start_kind == "text" else None, layers)


def main(arguments=None):
    options = parse(arguments, __doc__)
    model, tokenizer = load_lm(options.model, options.device)
    model.requires_grad_(False)
    data = facts_with_ids(tokenizer, RELATION, limit=options.limit)
    settings = {"model": options.model, "steps": options.steps, "limit": options.limit}
    total = 1 + sum(len(rates) for *_, rates in KINDS.values()) + len(KINDS) * len(SEEDS)
    recorder = Recorder("p_tuning", options.out, model.device, total, **settings)

    def run(kind, lr, seed, steps, test=True):
        template, encoder = build(model, tokenizer, kind, seed)
        return tune(model, tokenizer, data, template, encoder, lr, steps, seed, test)

    recorder.piece("handcrafted", lambda: summary(share_right(model, tokenizer, HANDCRAFTED, data["test"])))
    for kind, (*_, rates) in KINDS.items():
        for lr in rates:
            recorder.piece(f"sweep/{kind}/{lr:g}", lambda k=kind, lr=lr: run(k, lr, 0, options.steps, test=False))
        best = max(rates, key=lambda lr, kind=kind: recorder.pieces[f"sweep/{kind}/{lr:g}"]["dev"])
        for seed in SEEDS:
            recorder.piece(f"trained/{kind}/{seed}", lambda k=kind, lr=best, s=seed: run(k, lr, s, options.steps))
    recorder.finish()


if __name__ == "__main__":
    main()
