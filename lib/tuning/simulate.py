"""One training step of a LLaMA by any method of the book, simulated: shapes and dtypes, and nothing is computed.

`simulate` gives the timeline of live bytes of a model that fits no machine here (chapter 11). It puts all methods side
by side, so it imports them.
"""

from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from .lomo import AdaLomo, Bookkeeping, Lomo
from .lora import LoRA, add_lora
from .memory import MODELS, LiveBytes, Shape
from .nf4 import SCALE_BLOCK, Quantized, dynamic_map_on, pairs_on
from .p_tuning import PromptEncoder
from .qlora import Linear4bit, linear_layers, prepare_for_training
from .training import checkpoint_activations, chunked_loss

BATCH, LENGTH = 8, 512
ALPHA = 16
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
    "AdamW, 16-bit": lambda model: torch.optim.AdamW(model.parameters(), 1e-5, fused=True),
    "SGD": lambda model: MixedPrecision(model.parameters(), 1e-5, adam=False),
    "LOMO": lambda model: Lomo(model, 1e-5),
    "AdaLomo": lambda model: AdaLomo(model, 1e-5),
}
SHAPES = {"1B": Shape(2048, 5504, 16)} | MODELS  # the first is nobody's


def config_of(shape, attention="sdpa"):
    """transformers' configuration of a `Shape`: a Qwen3's if queries and keys are normalized, else a LLaMA's."""
    kind = Qwen3Config if shape.qk_norms else LlamaConfig
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
        attn_implementation=attention,
    )


def untrained(shape, attention="sdpa"):
    """A model of this `Shape` with random weights, in 16 bits."""
    return AutoModelForCausalLM.from_config(config_of(shape, attention), dtype=DTYPE).train()


def prepare(model, setting):
    """Make a model ready for a method: `(optimizer, inputs, whole)`: `inputs(ids)` is what it is called with."""
    weights, whole, method = model.parameters(), model, setting.method
    if method in FULL:
        return FULL[method](model), lambda ids: {"input_ids": ids, "labels": ids}, model
    model.requires_grad_(False)
    if method == "P-tuning":
        encoder = PromptEncoder(setting.prompt, model.config.hidden_size)
        weights, whole = encoder.parameters(), nn.ModuleList([model, encoder])

        def inputs(ids):
            vectors = encoder().to(DTYPE).expand(len(ids), -1, -1)
            labels = torch.cat([ids.new_full((len(ids), setting.prompt), -100), ids], dim=1)
            return {"inputs_embeds": torch.cat([vectors, model.get_input_embeddings()(ids)], dim=1), "labels": labels}

    else:
        if method == "QLoRA":
            for path, layer in linear_layers(model).items():
                model.set_submodule(path, Linear4bit(empty_codes(layer.weight)))
            prepare_for_training(model, checkpointing=False)
        add_lora(model, rank=setting.rank, alpha=ALPHA)
        if setting.adapters == "copies":
            for adapter in (module for module in model.modules() if isinstance(module, LoRA)):
                adapter.forward = partial(with_copies, adapter)
        if setting.adapters == "bfloat16":
            for weight in model.parameters():
                weight.data = weight.data.to(DTYPE)
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


def loss_of(model, batch, chunk=None, autocast=False):
    """The loss of a batch, as transformers computes it, or in chunks of this many tokens."""
    with torch.autocast(model.device.type, DTYPE, enabled=autocast):
        if chunk is None:
            return model(**batch, use_cache=False).loss
        labels = batch.pop("labels")
        states = model.model(**batch, use_cache=False).last_hidden_state  # (batch, seq, hidden)
        return chunked_loss(states, model.lm_head.weight, labels, chunk)


def step(optimizer, loss, note=lambda text: None):
    """Backward and update; `note` is told where backward and the optimizer's own step begin."""
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


def with_copies(adapter, x):
    """`LoRA.forward` as peft has it: the input's copy in float32 is kept for backward."""
    return F.linear(F.linear(x.to(adapter.A.dtype), adapter.A) * adapter.scale, adapter.B)


def simulate(setting, attention="sdpa"):
    """`LiveBytes` of a `Setting`'s second step, with fake tensors: shapes and dtypes, nothing allocated or computed."""
    dynamic_map_on(torch.device("cpu"))  # made of real numbers
    pairs_on(torch.device("cpu"), "nf4")
    stay = mock.patch.object(LoRA, "to", lambda adapter, device: adapter)  # fake tensors cannot be moved
    unseen = mock.patch.object(Bookkeeping, "is_finite", lambda optimizer, grad: True)  # nor looked at
    # transformers looks whether several texts are packed in a row; where it cannot look, it would make a mask.
    unpacked = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with FakeTensorMode(allow_non_fake_inputs=True), stay, unseen, unpacked:
        model = untrained(setting.shape, attention)
        optimizer, inputs, whole = prepare(model, setting)
        if setting.checkpointing:
            checkpoint_activations(model)
        ids = torch.zeros(setting.batch, setting.length, dtype=torch.long)
        step(optimizer, loss_of(model, inputs(ids), setting.chunk, setting.autocast))
        with LiveBytes(whole, optimizer) as live:
            step(optimizer, loss_of(model, inputs(ids), setting.chunk, setting.autocast), live.note)
    return live
