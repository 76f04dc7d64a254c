"""Chapter 10's run on a GPU: peak memory and time of a QLoRA step for the shapes of LLaMA, 7B to 65B.

    python -m tuning.experiments.qlora_memory --device cuda

NF4 with double quantization, adapters of rank 64 beside all linear layers, one sequence of 512 tokens, activations
recomputed layer by layer, a paged AdamW. The weights are random, for memory does not depend on their values, and made
and quantized one at a time. Our layers and optimizer, and then bitsandbytes', with the same adapters.
"""

import gc
import time

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from ..lora import add_lora
from ..memory import LLAMA, MODELS, PeakMemory
from ..models import default_device, default_dtype
from ..nf4 import quantize, quantize_scales
from ..qlora import Linear4bit, PagedAdamW, linear_layers, prepare_for_training
from ..simulate import config_of
from .lomo_memory import TOY
from .record import Recorder, option_parser

RANK, ALPHA, LENGTH, STEPS = 64, 16, 512, 4


def build(shape, whose, device, dtype):
    """A LLaMA of this shape with random weights in four bits; never whole in 16."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config_of(shape))
    four_bit = ours if whose == "ours" else theirs
    torch.manual_seed(0)
    for path, layer in linear_layers(model).items():
        weight = torch.randn(layer.weight.shape, device=device, dtype=dtype) * 0.02
        model.set_submodule(path, four_bit(weight))
    for path, weight in list(model.named_parameters()):
        if weight.is_meta:  # norms and embeddings
            parent, _, name = path.rpartition(".")
            made = torch.ones(weight.shape, device=device, dtype=dtype)
            made = made if weight.dim() == 1 else made.normal_(std=0.02)
            setattr(model.get_submodule(parent), name, nn.Parameter(made, requires_grad=False))
    return model.to(device)


def ours(weight):
    return Linear4bit(quantize_scales(quantize(weight)))


def theirs(weight):
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    device = weight.device
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
    layer.weight = bnb.nn.Params4bit(weight, **options).to(device)
    return layer


def stored_bytes(model):
    """Of parameters, buffers, and what bitsandbytes keeps beside its codes."""
    held = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            held += [state.absmax, state.offset, state.state2.absmax]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def paged_bytes():
    """What bitsandbytes has in memory that the driver moves, which torch does not count."""
    import bitsandbytes.functional as F

    return sum(tensor.nbytes for tensor in F.GlobalPageManager.get_instance().paged_tensors)


def measure(shape, whose, device, dtype, length=LENGTH, rank=RANK, steps=STEPS):
    """Bytes held before a step, the peak of a step, and the seconds of one (the least of those after the first)."""
    device = torch.device(device)
    model = prepare_for_training(build(shape, whose, device, dtype)).train()
    add_lora(model, rank=rank, alpha=ALPHA)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if whose == "ours":
        optimizer = PagedAdamW(trained, lr=1e-4)
    else:
        import bitsandbytes as bnb

        optimizer = bnb.optim.PagedAdamW32bit(trained, lr=1e-4)
    ids = torch.randint(0, 32_000, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    found = {"stored_bytes": stored_bytes(model)}
    paged = 0 if whose == "ours" else paged_bytes()
    found |= {"trained": sum(weight.numel() for weight in trained), "seconds": []}
    with PeakMemory(device) as memory:
        for _ in range(steps):
            start = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found["seconds"].append(time.perf_counter() - start)
    found |= {"peak_bytes": memory.peak, "reserved_bytes": memory.reserved, "loss": loss.item()}
    found |= {"step_seconds": min(found["seconds"][1:])}
    found["paged_bytes"] = 0 if whose == "ours" else paged_bytes() - paged
    del model, optimizer, trained, loss
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def main(arguments=None):
    parser = option_parser(__doc__, STEPS, model=None)
    parser.add_argument("--sizes", nargs="*", default=list(LLAMA), choices=[*LLAMA, *TOY])
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of the sequence")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be 2 at least: the first step is not timed")
    device = torch.device(options.device or default_device())
    dtype = default_dtype(device)
    settings = {"sizes": options.sizes, "length": options.length, "steps": options.steps, "dtype": str(dtype)}
    recorder = Recorder("qlora_memory", options.out, device, 2 * len(options.sizes), save=options.save, **settings)
    for whose in ("ours", "bitsandbytes"):  # so that ours are there, whatever becomes of the other
        for size in options.sizes:
            shape = (MODELS | TOY)[size]
            rank = min(RANK, shape.hidden // 2)
            run_it = (shape, whose, device, dtype, options.length, rank, options.steps)
            recorder.piece(f"{size}/{whose}", lambda r=run_it: measure(*r))
    recorder.finish()


if __name__ == "__main__":
    main()
