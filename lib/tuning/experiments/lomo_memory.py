"""Chapter 11's and 12's runs: where the memory of a training step goes, for the shapes of LLaMA.

    python -m tuning.experiments.lomo_memory                  # simulated: fake tensors, nothing is computed
    python -m tuning.experiments.lomo_memory --device cuda    # measured, the 7B rows, ours and lomo-optim's

The LOMO paper's table 1: LLaMA-7B in float16, 8 sequences of 512 tokens, AdamW and SGD in mixed precision (float32
master weights) beside LOMO, with and without activation checkpointing.
"""

import gc
import time

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from ..lomo import AdaLomo, Lomo
from ..memory import LLAMA, LiveBytes
from .four_way import PeakMemory
from .record import Recorder, option_parser

BATCH, LENGTH = 8, 512
TOY = {"toy": (128, 256, 2)}
DTYPE = torch.bfloat16  # as many bytes as the paper's float16, and it needs no loss scale


class MixedPrecision(torch.optim.Optimizer):
    """SGD or Adam on float32 copies of 16-bit weights, the master weights, which are kept as state."""

    def __init__(self, params, lr, adam):
        super().__init__(params, {"lr": lr})
        self.adam = adam

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            state, lr = self.state[weight], self.param_groups[0]["lr"]
            if not state:
                state["master"] = weight.detach().float()
                state |= {n: torch.zeros_like(state["master"]) for n in (("mean", "square") if self.adam else ())}
            grad, master = weight.grad.float(), state["master"]
            if self.adam:
                mean = state["mean"].lerp_(grad, 0.1)
                square = state["square"].mul_(0.999).addcmul_(grad, grad, value=0.001)
                master.addcdiv_(mean, square.sqrt().add_(1e-8), value=-lr)
            else:
                master.add_(grad, alpha=-lr)
            weight.copy_(master)


class Unchecked(Lomo):
    """LOMO for fake tensors, which have no numbers to look at."""

    def is_finite(self, grad):
        return True


class UncheckedAda(AdaLomo):
    def is_finite(self, grad):
        return True


METHODS = {
    "AdamW": lambda model: MixedPrecision(model.parameters(), 1e-5, adam=True),
    "SGD": lambda model: MixedPrecision(model.parameters(), 1e-5, adam=False),
    "LOMO": lambda model: Unchecked(model, 1e-5),
    "AdaLomo": lambda model: UncheckedAda(model, 1e-5),
}


def llama(shape, attention="sdpa"):
    """A LLaMA with (hidden size, inner size, layers); heads of 128, as in all sizes from 7B to 65B."""
    hidden, inner, layers = shape
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return LlamaForCausalLM._from_config(config, dtype=DTYPE).train()


def step(model, optimizer, ids, note=lambda text: None):
    """One training step; `note` is told where backward and the optimizer's own step begin."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    note("backward")
    if isinstance(optimizer, Lomo | AdaLomo):
        optimizer.backward(loss)
    elif hasattr(optimizer, "fused_backward"):  # lomo-optim's
        optimizer.fused_backward(loss, 1e-5)
    else:
        loss.backward()
        note("step")
        optimizer.step()
        optimizer.zero_grad()


def simulate(shape, method, checkpointing, attention="sdpa", batch=BATCH, length=LENGTH):
    """`LiveBytes` of the second step, with fake tensors: shapes and dtypes only, nothing is allocated or computed."""
    with FakeTensorMode():
        model = llama(shape, attention)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = METHODS[method](model)
        ids = torch.zeros(batch, length, dtype=torch.long)
        step(model, optimizer, ids)
        with LiveBytes(model, optimizer) as live:
            step(model, optimizer, ids, live.note)
    return live
