"""QLoRA: a frozen model in four bits, and adapters trained through it (Dettmers et al., arXiv 2305.14314).

`load_lm_4bit` (or `quantize_model`) gives a model with `Linear4bit` layers; `tuning.lora.add_lora` puts adapters beside
them; `prepare_for_training` makes the rest fit for it; `PagedAdamW` keeps its states in the host's memory.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .lora import AdaptedLayer, linear_layers
from .nf4 import check_weight, dequantize, quantize, quantize_scales
from .targets import check_called, warn_of_experts
from .training import checkpoint_activations, restore_states
from .wrappers import bare_modules, put_module

__all__ = ["FourBitProduct", "Linear4bit", "PagedAdamW", "dequantize_model", "prepare_for_training", "quantize_model"]


class FourBitProduct(torch.autograd.Function):
    """x W^T + b with W in four bits. Forward and backward each dequantize it; neither x nor W is kept in between.

    Under autocast the products are in 16 bits, but what comes back has the dtype of x, as in bitsandbytes: an adapter
    at its beginning adds less than the last place of 16 bits, and the sum would be rounded to what it was without it.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, product_dtype(x)
        bias = None if layer.bias is None else layer.bias.to(ctx.dtype)
        return F.linear(x.to(ctx.dtype), layer.dequantized(ctx.dtype), bias).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return (grad.to(ctx.dtype) @ ctx.layer.dequantized(ctx.dtype)).to(grad.dtype), None


def product_dtype(x):
    """The dtype in which a product with x is computed: autocast's where it is on, else that of x."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


class KeepsBuffers(nn.Linear):
    """A layer whose buffers move to another device with the model, and keep their dtype in a cast such as `half()`."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and buffer.dtype != self._buffers[name].dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class Linear4bit(KeepsBuffers):
    """A frozen linear layer with its weight in four bits; it computes in its input's dtype, or autocast's.

    Args:
        quantized: the weight, (out, in), from `quantize`, with `quantize_scales` or without.
        bias: (out,) or None; frozen too.

    `weight` holds the packed codes, (ceil(out · in / 2),) uint8. A parameter of whole numbers cannot be trained, and
    torch says so where it is tried.
    """

    def __init__(self, quantized, bias=None):
        nn.Module.__init__(self)  # nn.Linear's would make a weight of the full size
        self.out_features, self.in_features = quantized.shape
        self.record = replace(quantized, codes=None, scales=None, second=None)
        self.weight = nn.Parameter(quantized.codes, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("scales", quantized.scales)
        largest, mean = quantized.second or (None, None)
        self.register_buffer("scale_scales", largest)
        self.register_buffer("scale_mean", mean)

    def forward(self, x):
        return FourBitProduct.apply(x, self)

    def quantized(self):
        """The weight as `quantize` gave it."""
        second = None if self.scale_scales is None else (self.scale_scales, self.scale_mean)
        return replace(self.record, codes=self.weight.data, scales=self.scales, second=second)

    def dequantized(self, dtype):
        """(out, in), in the dtype given, by way of the weight's own."""
        return dequantize(self.quantized()).to(dtype)

    def extra_repr(self):
        return f"{self.in_features} -> {self.out_features}, {self.quantized().bits():.3f} bits"


def quantize_model(model, kind="nf4", block_size=64, double=True):
    """Replace all linear layers (`lora.linear_layers`) by their `Linear4bit`, in place; the model is frozen then.

    The output embedding and a task's head stay as they are. A warning names weights that are in no layer, such as a
    stack of experts.

    Raises:
        ValueError: the model has adapters or no linear layer, or one that is quantized already or cannot be quantized.
            The model is then as it was.
    """
    layers = layers_to_quantize(model)
    for path, layer in layers.items():  # all of them before the first is replaced
        check_weight(layer.weight, kind, block_size, path)
    warn_of_experts(model, layers, "quantizes")
    model.requires_grad_(False)
    for path, layer in layers.items():
        put_module(model, path, four_bit(layer, kind, block_size, double))
    return model


def layers_to_quantize(model):
    """{name in the bare model: linear layer}; refuses a model in which not all of them can be replaced."""
    modules = bare_modules(model)
    for path, module in modules.items():  # anywhere: adapters of other modules would be frozen, or not be found again
        if isinstance(module, AdaptedLayer):
            raise ValueError(f"{path} has an adapter; quantize the model first, then call add_lora")
    layers = linear_layers(model)
    if not layers:
        raise ValueError("this model has no linear layer to quantize")
    for path, layer in layers.items():
        if isinstance(layer, Linear4bit):
            raise ValueError(f"{path} is in four bits already")
        check_called(modules, path)
    return layers


def four_bit(layer, kind="nf4", block_size=64, double=True):
    """A linear layer in four bits; of a `Conv1D`, which keeps its weight as (in, out), the transpose."""
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # (out, in)
    quantized = quantize(weight, kind, block_size)
    return Linear4bit(quantize_scales(quantized) if double else quantized, layer.bias).train(layer.training)


def dequantize_model(model):
    """Put plain linear layers back, in place, with what the codes stand for, in the dtype of the model's first weight.

    That is the embedding's; after `prepare_for_training` it is float32. What was a `Conv1D` is an `nn.Linear` then, as
    with transformers' `dequantize`: the weights of a GPT-2 no longer are as its files have them.
    """
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
    for path, layer in bare_modules(model).items():
        if isinstance(layer, Linear4bit):
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = layer.dequantized(dtype or layer.record.dtype)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = layer.bias
            put_module(model, path, plain.train(layer.training))
    return model


def prepare_for_training(model, checkpointing=True):
    """Freeze the model, raise what is left in 16 bits to float32, and forget activations between layers.

    What is raised are the norms and the embeddings (and a head that shares their weight): at 7B half a gigabyte more.
    Call it before `add_lora`, for it freezes everything.

    Args:
        checkpointing: compute each layer's activations again in backward instead of keeping them.

    Raises:
        ValueError: the model has adapters already.
    """
    if any(isinstance(layer, AdaptedLayer) for layer in model.modules()):
        raise ValueError("this model has adapters, which this would freeze; prepare it first, then call add_lora")
    model.requires_grad_(False)
    for weight in model.parameters():
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight.data = weight.data.float()
    if checkpointing:
        checkpoint_activations(model)
    return model


class KeepsStates(torch.optim.Optimizer):
    """An optimizer whose loaded states stay in the host's memory and in their dtype; torch's take the parameters'."""

    def state_dict(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host may be under way
        return super().state_dict()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict | {"state": {}})
        restore_states(self, state_dict, in_host_memory)


def in_host_memory(weight, value):
    """A copy of `value` in the host's memory, pinned if the weight is on a GPU."""
    return torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=weight.is_cuda).copy_(value)


class PagedAdamW(KeepsStates):
    """AdamW whose two averages live in the host's memory; a step brings in those of one parameter at a time.

    For CUDA the host's memory is pinned, so that copies need not wait. bitsandbytes takes memory that the driver moves
    page by page instead, and only when the GPU runs out. Arguments as in `torch.optim.AdamW`.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, group)
        return loss

    def update(self, weight, group):
        state = self.state[weight]
        if not state:
            state["step"] = 0
            for name in ("mean", "square"):
                state[name] = in_host_memory(weight, torch.zeros(weight.shape, dtype=torch.float32))
        state["step"] += 1
        mean = state["mean"].to(weight.device, non_blocking=True)  # in
        square = state["square"].to(weight.device, non_blocking=True)
        beta1, beta2 = group["betas"]
        grad = weight.grad.float()
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        weight.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1 ** state["step"]))
        state["mean"].copy_(mean, non_blocking=True)  # out
        state["square"].copy_(square, non_blocking=True)
