"""One training step of a LLaMA by any method of the book, simulated: shapes and dtypes, and nothing is computed.

`simulate` gives the timeline of live bytes of a model that fits no machine here (chapter 11). It puts all methods side
by side, so it imports them.
"""

from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from .lomo import AdaLomo, Bookkeeping, Lomo
from .lora import LoRA, add_lora
from .memory import LLAMA, LiveBytes
from .nf4 import SCALE_BLOCK, Quantized, dynamic_map_on, pairs_on
from .p_tuning import PromptEncoder
from .qlora import Linear4bit, linear_layers, prepare_for_training
from .training import checkpoint_activations

BATCH, LENGTH = 8, 512
RANK, ALPHA, PROMPT = 64, 16, 20
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


FULL = {
    "AdamW": lambda model: MixedPrecision(model.parameters(), 1e-5, adam=True),
    "SGD": lambda model: MixedPrecision(model.parameters(), 1e-5, adam=False),
    "LOMO": lambda model: Lomo(model, 1e-5),
    "AdaLomo": lambda model: AdaLomo(model, 1e-5),
}
SHAPES = {"1B": (2048, 5504, 16)} | LLAMA  # the first is nobody's


def llama_config(shape, attention="sdpa"):
    """Of a LLaMA with (hidden size, inner size, layers); heads of 128, as in all sizes from 7B to 65B."""
    hidden, inner, layers = shape
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        tie_word_embeddings=False,
        attn_implementation=attention,
    )


def llama(shape, attention="sdpa"):
    """A LLaMA of this shape, in 16 bits."""
    return LlamaForCausalLM._from_config(llama_config(shape, attention), dtype=DTYPE).train()


def prepare(model, method, rank=RANK, prompt=PROMPT):
    """Make a model ready for a method: `(optimizer, inputs, whole)`: `inputs(ids)` is what it is called with."""
    weights, whole = model.parameters(), model
    if method in FULL:
        return FULL[method](model), lambda ids: {"input_ids": ids, "labels": ids}, model
    model.requires_grad_(False)
    if method == "P-tuning":
        encoder = PromptEncoder(prompt, model.config.hidden_size)
        weights, whole = encoder.parameters(), nn.ModuleList([model, encoder])

        def inputs(ids):
            vectors = encoder().to(DTYPE).expand(len(ids), -1, -1)
            labels = torch.cat([ids.new_full((len(ids), prompt), -100), ids], dim=1)
            return {"inputs_embeds": torch.cat([vectors, model.get_input_embeddings()(ids)], dim=1), "labels": labels}

    else:
        if method == "QLoRA":
            for path, layer in linear_layers(model).items():
                model.set_submodule(path, Linear4bit(empty_codes(layer.weight)))
            prepare_for_training(model, checkpointing=False)
        add_lora(model, rank=rank, alpha=ALPHA)
        model.enable_input_require_grads()  # checkpointing asks for it

        def inputs(ids):
            return {"input_ids": ids, "labels": ids}

    trained = [weight for weight in weights if weight.requires_grad]
    return torch.optim.AdamW(trained, 1e-4, foreach=False), inputs, whole


def empty_codes(weight, block_size=64):
    """A `Quantized` of a weight's shape with nothing in it."""
    n = weight.numel()
    blocks = -(-n // block_size)
    codes, scales = (torch.empty(size, dtype=torch.uint8) for size in (-(-n // 2), blocks))
    second = torch.empty(-(-blocks // SCALE_BLOCK)), torch.empty(())
    return Quantized(codes, scales, second, weight.shape, weight.dtype, "nf4", block_size)


def step(model, optimizer, batch, note=lambda text: None):
    """One training step; `note` is told where backward and the optimizer's own step begin."""
    four_bits = any(isinstance(layer, Linear4bit) for layer in model.modules())
    with torch.autocast(model.device.type, DTYPE, enabled=four_bits):
        loss = model(**batch, use_cache=False).loss
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
    dynamic_map_on(torch.device("cpu"))  # made of real numbers
    pairs_on(torch.device("cpu"), "nf4")
    stay = mock.patch.object(LoRA, "to", lambda adapter, device: adapter)  # fake tensors cannot be moved
    unseen = mock.patch.object(Bookkeeping, "is_finite", lambda optimizer, grad: True)  # nor looked at
    with FakeTensorMode(allow_non_fake_inputs=True), stay, unseen:
        model = llama(shape, attention)
        optimizer, inputs, whole = prepare(model, method)
        if checkpointing:
            checkpoint_activations(model)
        ids = torch.zeros(batch, length, dtype=torch.long)
        step(model, optimizer, inputs(ids))
        with LiveBytes(whole, optimizer) as live:
            step(model, optimizer, inputs(ids), live.note)
    return live
