"""Chapter 4's recorded run: what the prompt encoder is good for, on P17.

    python -m tuning.experiments.p_tuning

Pseudo tokens are trained through an MLP and through P-tuning's BiLSTM and MLP, six of them from random numbers, and
through the latter also from the eight handcrafted words. The plain vectors to compare with are chapter 3's run, which
has the same facts, steps, seeds and templates. Each kind has its own sweep of rates on one seed, chosen on 200 dev
facts; then three seeds each, reported on fold 0's test facts. Last, P-tuning starts at each of the four wordings of
the paper's case study: does the spread over wordings shrink?
"""

import torch

from ..data import TEMPLATES
from ..evaluate import facts_with_ids, p_at_1
from ..models import load_lm
from ..p_tuning import PromptEncoder, soften
from ..prompts import embedding_size
from .prompt_tuning import (
    HANDCRAFTED,
    RELATION,
    SEEDS,
    STEPS,
    pseudo_template,
    right,
    tune,
)
from .record import Recorder, option_parser

LENGTH = 6  # the paper's template (3,3,0)
KINDS = {"MLP": 0, "BiLSTM and MLP": 2, "BiLSTM and MLP, from text": 2}  # layers of the LSTM
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WORDINGS = TEMPLATES[RELATION][:4]  # the paper's


def build(model, tokenizer, kind, seed, wording=HANDCRAFTED):
    """The template and a fresh prompt encoder of a kind; its networks are drawn by `seed`."""
    template, start = pseudo_template(LENGTH), None
    if kind.endswith("from text"):
        template, start = soften(model, tokenizer, wording)
    torch.manual_seed(seed)
    return template, PromptEncoder(template.count("[P]"), embedding_size(model), start, KINDS[kind])


def main(arguments=None):
    options = option_parser(__doc__, STEPS).parse_args(arguments)
    model, tokenizer = load_lm(options.model, options.device)
    model.requires_grad_(False)
    data = facts_with_ids(tokenizer, RELATION, limit=options.limit)
    settings = {"model": options.model, "steps": options.steps, "limit": options.limit}
    total = 1 + len(KINDS) * (len(RATES) + len(SEEDS)) + len(WORDINGS)
    recorder = Recorder("p_tuning", options.out, model.device, total, save=options.save, **settings)

    def run(kind, lr, seed, wording=HANDCRAFTED, test=True):
        template, encoder = build(model, tokenizer, kind, seed, wording)
        return tune(model, tokenizer, data, template, encoder, lr, options.steps, seed, test)

    def by_hand(template):
        return p_at_1(right(model, tokenizer, template, data["test"]))

    recorder.piece("handcrafted", lambda: by_hand(HANDCRAFTED))
    for kind in KINDS:
        for lr in RATES:
            recorder.piece(f"sweep/{kind}/{lr:g}", lambda k=kind, lr=lr: run(k, lr, 0, test=False))
        best = max(RATES, key=lambda lr, kind=kind: recorder.pieces[f"sweep/{kind}/{lr:g}"]["dev"])
        for seed in SEEDS:
            recorder.piece(f"trained/{kind}/{seed}", lambda k=kind, lr=best, s=seed: run(k, lr, s))
    for k, wording in enumerate(WORDINGS):  # `best` is that of the kind that starts from text, the last
        recorder.piece(
            f"wording/{k}",
            lambda w=wording, lr=best: {"wording": w, "by hand": by_hand(w), **run(kind, lr, 0, w)},
        )
    recorder.finish()


if __name__ == "__main__":
    main()
