"""Chapter 6's run: how much of what full fine-tuning changed is needed for what it learned?

    python -m tuning.experiments.first_directions

All weights are tuned to the country of a city as in the ledger (its prompt, rate and steps), on three seeds. The change
of each linear layer is taken apart by its singular values, and parts of it are put back into the untrained model: the
first terms, at several ranks, and controls. Beside them stand adapters of ranks 1 and 8, trained, and the spectra.

Controls: the whole change of the linear layers shortened to the length of its first terms (over all layers), and the
first terms drawn out to the length of the whole; the change without its first terms; eight random directions of each
layer's input; and these drawn out to the length of the first eight terms.
"""

import math

import torch

from ..evaluate import as_text
from ..methods import fit, prepare, right
from ..models import load_lm
from .ledger import STEPS, TASK, away, rows_of
from .record import Recorder, load_results, option_parser

RANKS = (1, 2, 4, 8, 16, 64)
SEEDS = (0, 1, 2)
ADAPTERS = (1, 8)


def changes_of(model, linear, before):
    """{layer: its change taken apart, `(U, sigma, Vt)`}."""
    return {
        name: torch.linalg.svd(model.get_submodule(name).weight.detach() - before[name], full_matrices=False)
        for name in linear
    }


def length(parts, start=0, end=None):
    """The length (Frobenius norm) of the terms from `start` to `end`, over all layers."""
    return math.sqrt(sum(sigma[start:end].square().sum().item() for _, sigma, _ in parts.values()))


def first(rank, factor=1.0):
    return lambda U, sigma, Vt: factor * ((U[:, :rank] * sigma[:rank]) @ Vt[:rank])


def without_first(rank):
    return lambda U, sigma, Vt: (U[:, rank:] * sigma[rank:]) @ Vt[rank:]


def shortened(factor):
    return lambda U, sigma, Vt: factor * ((U * sigma) @ Vt)


def in_random_directions(rank, seed, drawn_out):
    """The change as `rank` random directions of its input see it, drawn out to the length of its first terms."""
    generator = torch.Generator().manual_seed(seed)

    def part(U, sigma, Vt):
        Q, _ = torch.linalg.qr(torch.randn(Vt.shape[1], rank, generator=generator))  # (in, rank)
        found = (U * sigma) @ (Vt @ Q) @ Q.T
        return found * (sigma[:rank].norm() / found.norm()) if drawn_out else found

    return part


def kinds_of(parts, seed):
    """{what is put back: a function from a layer's `(U, sigma, Vt)` to a matrix (out, in)}."""
    whole = length(parts)
    found = {f"first {rank}": first(rank) for rank in RANKS}
    found |= {"linear layers": shortened(1.0), "nothing": shortened(0.0)}
    for rank in (1, 8):
        found[f"shortened as first {rank}"] = shortened(length(parts, 0, rank) / whole)
        found[f"first {rank}, drawn out"] = first(rank, whole / length(parts, 0, rank))
    found |= {f"without first {rank}": without_first(rank) for rank in (1, 8, 64)}
    found["8 random"] = in_random_directions(8, seed, drawn_out=False)
    return found | {"8 random, drawn out": in_random_directions(8, seed, drawn_out=True)}


def spectrum(parts):
    """Shares of the squared length that the first terms hold, and how many terms hold nine tenths, over the layers."""
    whole = length(parts) ** 2
    held = {rank: length(parts, 0, rank) ** 2 / whole for rank in RANKS}
    terms = []
    for _, sigma, _ in parts.values():
        share = sigma.square().cumsum(0) / sigma.square().sum()
        terms.append((share < 0.9).sum().item() + 1)
    terms = sorted(terms)
    return {"held": held, "terms for nine tenths": [terms[0], terms[len(terms) // 2], terms[-1]]}


def change(name, template, lr, seed, steps, limit=None):
    """One full fine-tuning: the spectra of its change, and test hits with each part of it put back."""
    model, tokenizer = load_lm(name, dtype=torch.float32)
    linear = [path for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and path != "lm_head"]
    untrained = {key: value.clone() for key, value in model.state_dict().items()}
    before = {path: untrained[f"{path}.weight"] for path in linear}
    rows = rows_of(tokenizer, TASK, limit)
    ready = prepare("all weights", model, tokenizer, template, seed)
    history = fit(ready, rows["train"], rows["dev"], lr, steps, seed)
    found = {"tuned": hits_and_away(ready, rows, limit), "step": history.step}
    with torch.no_grad():
        parts = changes_of(model, linear, before)
        found["spectrum"] = spectrum(parts)
        whole = sum(before[path].square().sum().item() for path in linear)
        found["relative length"] = length(parts) / math.sqrt(whole)
        model.load_state_dict(untrained)
        for kind, part in kinds_of(parts, seed).items():
            for path in linear:
                model.get_submodule(path).weight.copy_(before[path] + part(*parts[path]))
            found[kind] = hits_and_away(ready, rows, limit)
    return found


def adapter(name, template, rank, lr, seed, steps, limit=None):
    """A trained adapter of this rank (α = 2 r), by its dev share and test hits."""
    model, tokenizer = load_lm(name, dtype=torch.float32)
    rows = rows_of(tokenizer, TASK, limit)
    ready = prepare("LoRA", model, tokenizer, template, seed, rank, 2 * rank)
    history = fit(ready, rows["train"], rows["dev"], lr, steps, seed)
    found = {"rank": rank, "lr": lr, "dev": history.dev, "step": history.step}
    found |= {"trained": sum(weight.numel() for weight in ready.weights())}
    return found | hits_and_away(ready, rows, limit)


def hits_and_away(ready, rows, limit):
    return {"hits": as_text(right(ready, rows["test"]))} | away(ready.model, ready.tokenizer, limit)


def main(arguments=None):
    parser = option_parser(__doc__, STEPS)
    options = parser.parse_args(arguments)
    name, steps, limit = options.model, options.steps, options.limit
    ledger = load_results("ledger")
    if ledger is None:
        parser.error("the ledger is not recorded, whose prompt and rates this takes; run tuning.experiments.ledger")
    pieces = ledger["results"]
    template, full = pieces["asked"]["template"], pieces["run/all weights/0"]["lr"]
    rates = [key.split("/")[2] for key in pieces if key.startswith("sweep/LoRA/")]
    settings = {"model": name, "steps": steps, "limit": limit}
    total = len(SEEDS) * (1 + len(ADAPTERS)) + len(rates)
    recorder = Recorder("first_directions", options.out, torch.device("cpu"), total, save=options.save, **settings)
    for seed in SEEDS:
        recorder.piece(f"change/{seed}", change, name, template, full, seed, steps, limit)
    swept = {
        rate: recorder.piece(f"sweep/1/{rate}", adapter, name, template, 1, float(rate), 0, steps, limit)
        for rate in rates
    }
    best = {1: float(max(swept, key=lambda rate: swept[rate]["dev"])), 8: pieces["run/LoRA/0"]["lr"]}
    for rank in ADAPTERS:
        for seed in SEEDS:
            recorder.piece(f"adapter/{rank}/{seed}", adapter, name, template, rank, best[rank], seed, steps, limit)
    recorder.finish()


if __name__ == "__main__":
    main()
