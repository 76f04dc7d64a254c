"""Chapter 6's run: a trained adapter, turned down.

    python -m tuning.experiments.turned_down

LoRA is trained to the country of a city as in the ledger (its prompt, rate, steps and seeds), and then added with a
part of its scale. What is left of the task, and what of everything else? Nothing is chosen. At the whole scale and at
none the ledger has the rows.
"""

import torch

from ..lora import LoRA
from ..methods import fit, prepare
from ..models import load_lm
from .first_directions import hits_and_away
from .ledger import SEEDS, STEPS, TASK, rows_of
from .record import Recorder, load_results, option_parser

FACTORS = (0.25, 0.5, 0.75)


def turned_down(name, template, lr, seed, steps, factors, limit=None):
    """{factor: hits on test and elsewhere, with every adapter's scale times the factor}, after one training."""
    model, tokenizer = load_lm(name)
    rows = rows_of(tokenizer, TASK, limit)
    ready = prepare("LoRA", model, tokenizer, template, seed)
    history = fit(ready, rows["train"], rows["dev"], lr, steps, seed)
    found = {"lr": lr, "seed": seed, "dev": history.dev, "step": history.step}
    scales = {module: module.scale for module in model.modules() if isinstance(module, LoRA)}
    for factor in factors:
        for module, scale in scales.items():
            module.scale = factor * scale
        found[f"{factor:g}"] = hits_and_away(ready, rows, limit)
    return found


def main(arguments=None):
    parser = option_parser(__doc__, STEPS)
    options = parser.parse_args(arguments)
    name, steps, limit = options.model, options.steps, options.limit
    ledger = load_results("ledger")
    if ledger is None:
        parser.error("the ledger is not recorded, whose prompt and rate this takes; run tuning.experiments.ledger")
    pieces = ledger["results"]
    template, lr = pieces["asked"]["template"], pieces["run/LoRA/0"]["lr"]
    settings = {"model": name, "steps": steps, "limit": limit}
    recorder = Recorder("turned_down", options.out, torch.device("cpu"), len(SEEDS), save=options.save, **settings)
    for seed in SEEDS:
        recorder.piece(f"LoRA/{seed}", turned_down, name, template, lr, seed, steps, FACTORS, limit)
    recorder.finish()


if __name__ == "__main__":
    main()
