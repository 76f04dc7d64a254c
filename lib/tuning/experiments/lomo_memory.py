"""Chapter 11's and 12's runs: where the memory of a training step goes, for the shapes of LLaMA.

    python -m tuning.experiments.lomo_memory                  # simulated: fake tensors, nothing is computed
    python -m tuning.experiments.lomo_memory --device cuda    # measured, the 7B rows, ours and lomo-optim's

The LOMO paper's table 1: LLaMA-7B in float16, 8 sequences of 512 tokens, AdamW and SGD in mixed precision (float32
master weights) beside LOMO, with and without activation checkpointing.
"""

import gc
import time
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from unittest import mock

import torch
import torch.nn.functional as F

from ..memory import METHODS, PeakMemory, Setting, Shape
from ..simulate import BATCH, FULL, LENGTH, SHAPES, loss_of, simulate, step, untrained
from ..training import checkpoint_activations
from .record import Recorder, option_parser

TOY = {"toy": Shape(128, 256, 2)}


def simulated(setting, way="sdpa"):
    """Bytes by category at the simulated peak, the largest of each in the step, and `forward_minus_before`.

    Args:
        way: today's attention, "sdpa" or "eager"; or "2023", as in `as_in_2023`.
    """
    with as_in_2023() if way == "2023" else nullcontext():
        live = simulate(setting, "eager" if way == "2023" else way)
    return {"peak": live.peak, "largest": live.largest, "forward minus before": forward_minus_before(live)}


def forward_minus_before(live):
    """Bytes alive after forward that were not before: activations, as table 1's authors measured them.

    Args:
        live: what `simulate` gives.
    """
    place = next(place for place, text in live.notes.items() if text == "backward")
    return sum(live.timeline[place]) - sum(live.timeline[0])  # its first operation makes four bytes


def kept_in_2023(shape, length):
    """Bytes that a layer of `as_in_2023` keeps of each token without checkpointing, by what keeps them."""
    hidden, scores = shape.hidden, shape.heads * length
    return {
        "norms": 2 * (4 + 2 + 2 + 2) * hidden,  # input in 32 bits and in 16; result before the weight, and after
        "queries, keys, values, output": 8 * hidden,
        "cache": 4 * hidden,
        "scores": (2 + 4 + 2) * scores,  # before the maximum; softmax in 32 bits, and in 16
        "MLP": 8 * shape.inner,
    }


@contextmanager
def as_in_2023():
    """Let `simulate(setting, "eager")` run what transformers' LLaMA (4.28) and the authors' loop ran.

    Attention is as the code of that year has it; the rest was written down as remembered, and compared with nothing.

    Beside today's eager attention a layer then keeps the scores before their maximum with the lowest number; each
    norm its input in 16 bits; without checkpointing keys and values for a cache that training does not need. The loop
    keeps all that the model has given back, and the loss is computed in 16 bits.
    """
    llama, own = "transformers.models.llama.modeling_llama", "tuning.simulate.loss_of"
    patches = {
        f"{llama}.eager_attention_forward": attention_of_2023,
        f"{llama}.LlamaRMSNorm.forward": norm_of_2023,
        own: loss_of_2023,
    }
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        yield


def attention_of_2023(module, query, key, value, attention_mask, scaling, **_):
    module.cached = (key, value) if module.config.use_cache else None
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling + attention_mask  # (batch, heads, seq, seq)
    scores = torch.maximum(scores, torch.full((), torch.finfo(scores.dtype).min, dtype=scores.dtype))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


def norm_of_2023(norm, x):
    variance = x.float().square().mean(-1, keepdim=True)
    return norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon)).to(norm.weight.dtype)


def loss_of_2023(model, batch, *_):
    model.config.use_cache = not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    found = model(input_ids=batch["input_ids"], use_cache=False)  # today's cache would share what attention keeps
    logits = found.logits[:, :-1].contiguous()  # (batch, seq - 1, vocabulary)
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.found = found  # alive as long as the loss
    return loss


def measure(shape, method, device, batch=BATCH, length=LENGTH, steps=3):
    """Peak bytes and seconds of a step with random weights, activations checkpointed: on a GPU, or on the CPU."""
    device = torch.device(device)
    with torch.device(device):
        model = untrained(shape)
        ids = torch.randint(0, 32_000, (batch, length), generator=torch.Generator(device).manual_seed(0))
    checkpoint_activations(model)
    if method == "lomo-optim":
        import lomo_optim

        optimizer = lomo_optim.Lomo(model, lr=1e-5)
    else:
        optimizer = FULL[method](model)
    found = {"parameter_bytes": sum(w.numel() * w.element_size() for w in model.parameters()), "seconds": []}
    with PeakMemory(device) as memory:
        for _ in range(steps):
            start = time.perf_counter()
            step(optimizer, loss_of(model, {"input_ids": ids, "labels": ids}))
            if device.type == "cuda":
                torch.cuda.synchronize()
            found["seconds"].append(time.perf_counter() - start)
    found |= {"peak_bytes": memory.peak, "reserved_bytes": memory.reserved, "step_seconds": min(found["seconds"][1:])}
    del model, optimizer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def main(arguments=None):
    parser = option_parser(__doc__, 3, model=None)
    parser.add_argument("--sizes", nargs="*", choices=[*SHAPES, *TOY], help="of LLaMA; all to simulate, 7B to measure")
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of each")
    options = parser.parse_args(arguments)
    device, size = options.device, {"batch": options.batch, "length": options.length}
    shapes = SHAPES | TOY
    sizes = options.sizes or (["7B"] if device else list(SHAPES))
    settings = {"sizes": sizes, "measured": bool(device), **size} | ({"steps": options.steps} if device else {})
    if options.steps < 2:
        parser.error("--steps must be 2 at least: the first step is not timed")
    if device:  # AdamW's 102 GiB fit one H200; what does not fit is left out by naming other sizes
        methods = (*FULL, "lomo-optim")
        recorder = Recorder(
            "lomo_memory_measured",
            options.out,
            device,
            len(sizes) * len(methods),
            save=options.save,
            module="lomo_memory",
            **settings,
        )
        for name in sizes:
            for method in methods:
                run = (shapes[name], method, device)
                recorder.piece(f"{name}/{method}", lambda r=run: measure(*r, **size, steps=options.steps))
    else:
        short, long = (options.batch, options.length), (1, options.batch * options.length // 2)
        cases = [(*short, True), (*short, False), (*long, True)]
        total = len(sizes) * len(METHODS) * len(cases) + 4 * len(sizes[:2])
        recorder = Recorder("lomo_memory", options.out, torch.device("cpu"), total, save=options.save, **settings)
        for name in sizes:
            for method in METHODS:
                for batch, length, checkpointing in cases:
                    run = Setting(method, shapes[name], batch, length, checkpointing)
                    key = f"{name}/{method}/{'with' if checkpointing else 'without'} checkpointing/{batch}x{length}"
                    recorder.piece(key, lambda r=run: simulated(r))
        for name, way, checkpointing in product(sizes[:2], ("eager", "2023"), (True, False)):
            run = Setting("LOMO", shapes[name], *short, checkpointing)
            key = f"{name}/LOMO/{way}, {'with' if checkpointing else 'without'} checkpointing/{short[0]}x{short[1]}"
            recorder.piece(key, lambda r=run, w=way: simulated(r, w))
    recorder.finish()


if __name__ == "__main__":
    main()
