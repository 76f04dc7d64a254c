"""Chapter 9's recorded run: what a language model loses in four bits, in the shape of QLoRA's table 2.

    python -m tuning.experiments.four_bits

Perplexity on review sentences and on dictionary examples, with all linear layers but the output layer quantized to
each type, and for NF4 over block sizes; each with an interval for its ratio to that of the model as it is, and to that
of NF4 with double quantization. The model's file was in four bits already, so these are second roundings.
"""

import copy
from functools import cache

import torch

from ..data import load_reviews, load_wic
from ..models import load_lm
from ..qlora import Linear4bit, dequantize_model, quantize_model
from .four_way import text_losses
from .record import Recorder, option_parser

WAYS = {  # kind, block size, double quantization
    "int4": ("int4", 64, False),
    "fp4": ("fp4", 64, False),
    "nf4": ("nf4", 64, False),
    "nf4, double": ("nf4", 64, True),
    "nf4, blocks of 256": ("nf4", 256, False),
    "nf4, blocks of 1024": ("nf4", 1024, False),
}
BASE = "nf4, double"
TEXTS = 1000


def ratio_interval(losses, base, rounds=2000, level=0.95):
    """The ratio of two perplexities and its percentile bootstrap interval over texts, the same ones for both.

    Args:
        losses, base: (texts, 2) float64 each, from `text_losses`.

    Returns:
        `(ratio, low, high)` floats.
    """
    draw = torch.randint(len(base), (rounds, len(base)), generator=torch.Generator().manual_seed(0))
    ratios = []
    for chosen in (torch.arange(len(base)).unsqueeze(0), draw):
        logs = [found[chosen, 0].sum(dim=1) / found[chosen, 1].sum(dim=1) for found in (losses, base)]
        ratios.append((logs[0] - logs[1]).exp())
    low, high = ratios[1].quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)).tolist()
    return ratios[0].item(), low, high


def main(arguments=None):
    options = option_parser(__doc__).parse_args(arguments)
    model, tokenizer = load_lm(options.model, options.device, torch.float32)
    texts = {
        "reviews": [row["sentence"] for row in load_reviews()["test"]][: options.limit or TEXTS],
        "examples": [row["sentence1"] for row in load_wic()["test"]][: options.limit or TEXTS],
    }
    settings = {"model": options.model, "texts": {name: len(some) for name, some in texts.items()}}
    recorder = Recorder("four_bits", options.out, model.device, 1 + len(WAYS), **settings)

    def read(lm):
        return {name: text_losses(lm, tokenizer, some) for name, some in texts.items()}

    def in_four_bits(way):
        """The model with its linear layers' numbers rounded, and bits a number of theirs, scales included."""
        kind, block_size, double = WAYS[way]
        lm = quantize_model(copy.deepcopy(model), kind, block_size, double)
        layers = [layer.quantized() for layer in lm.modules() if isinstance(layer, Linear4bit)]
        numbers = [layer.shape.numel() for layer in layers]
        bits = sum(layer.bits() * n for layer, n in zip(layers, numbers, strict=True)) / sum(numbers)
        return dequantize_model(lm), bits

    @cache
    def read_in(way):
        """Bits a number, and the losses of each text; of a base more than one piece asks."""
        lm, bits = (model, 32.0) if way == "as it is" else in_four_bits(way)
        return bits, read(lm)

    def measure(way):
        bits, losses = read_in(way)
        found = {"bits": bits}
        for name, loss in losses.items():
            total, count = loss.sum(dim=0)
            found[name] = {"perplexity": (total / count).exp().item(), "tokens": int(count)}
            for base in ("as it is", BASE):
                found[name][f"over {base}"] = ratio_interval(loss, read_in(base)[1][name])
        return found

    for way in ("as it is", *WAYS):
        recorder.piece(way, lambda w=way: measure(w))
    recorder.finish()


if __name__ == "__main__":
    main()
