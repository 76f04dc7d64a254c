"""Chapter 9's recorded run: what a language model loses in four bits, in the shape of QLoRA's table 2.

    python -m tuning.experiments.four_bits

Perplexity on review sentences and on dictionary examples, with all linear layers but the output layer rounded to each
type and back, beside that of the model as it is. Where the blocks begin is arbitrary, and decides how each number is
rounded: so each type is tried with its blocks shifted, as so many draws. The model's file was in four bits already,
so these are second roundings.
"""

import copy
from functools import cache

import torch

from ..data import load_reviews, load_wic
from ..evaluate import ratio_interval, text_losses
from ..models import load_lm
from ..nf4 import dequantize, quantize, quantize_scales
from ..qlora import linear_layers
from .record import Recorder, option_parser

WAYS = {  # kind, block size, double quantization
    "int4": ("int4", 64, False),
    "fp4": ("fp4", 64, False),
    "nf4": ("nf4", 64, False),
    "nf4, double": ("nf4", 64, True),
    "nf4, blocks of 256": ("nf4", 256, False),
    "nf4, blocks of 1024": ("nf4", 1024, False),
}
SHIFTS = (0, 1 / 4, 1 / 2, 3 / 4)  # of a block
TEXTS = {"reviews": 300, "examples": 600}


def rounded(model, kind, block_size, double, shift):
    """A copy with its linear layers' weights rounded in blocks that begin `shift` numbers later; and bits a number."""
    model, bits, numbers = copy.deepcopy(model), 0.0, 0
    for layer in linear_layers(model).values():
        packed = quantize(layer.weight.flatten().roll(-shift), kind, block_size)
        packed = quantize_scales(packed) if double else packed
        layer.weight.data = dequantize(packed).roll(shift).view_as(layer.weight)
        bits, numbers = bits + packed.bits() * layer.weight.numel(), numbers + layer.weight.numel()
    return model, bits / numbers


def main(arguments=None):
    options = option_parser(__doc__).parse_args(arguments)
    model, tokenizer = load_lm(options.model, options.device, torch.float32)
    texts = {
        "reviews": [row["sentence"] for row in load_reviews()["test"]][: options.limit or TEXTS["reviews"]],
        "examples": [row["sentence1"] for row in load_wic()["test"]][: options.limit or TEXTS["examples"]],
    }
    settings = {"model": options.model, "texts": {name: len(some) for name, some in texts.items()}}
    recorder = Recorder(
        "four_bits", options.out, model.device, 1 + len(WAYS) * len(SHIFTS), save=options.save, **settings
    )

    @cache
    def as_it_is():
        return {name: text_losses(model, tokenizer, some) for name, some in texts.items()}

    def measure(lm, bits):
        found = {"bits": bits}
        for name, some in texts.items():
            losses = text_losses(lm, tokenizer, some)
            total, count = losses.sum(dim=0)
            ratio = ratio_interval(losses, as_it_is()[name])
            found[name] = {"perplexity": (total / count).exp().item(), "tokens": int(count), "ratio": ratio}
        return found

    recorder.piece("as it is", lambda: measure(model, 32.0))
    for way, (kind, block_size, double) in WAYS.items():
        for shift in SHIFTS:
            recorder.piece(
                f"{way}/{shift}",
                lambda k=kind, b=block_size, d=double, s=shift: measure(*rounded(model, k, b, d, int(s * b))),
            )
    recorder.finish()


if __name__ == "__main__":
    main()
