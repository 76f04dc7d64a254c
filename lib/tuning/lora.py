"""LoRA: low-rank adapters beside the frozen layers of a model (Hu et al., arXiv 2106.09685).

`add_lora` puts an adapter beside each chosen layer, in place; `use_adapter` switches between several of them, also
row by row in one batch; `merge` folds one into the weights. `tuning.adapter_files` saves and loads them.

Layers have the names of the bare model, whatever is wrapped around it (`tuning.wrappers`).
"""

import copy
import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .targets import all_linear, find_targets, find_whole, sizes, warn_of_experts
from .wrappers import bare_modules, inner_name, put_module, unwrapped

__all__ = ["AdaptedLayer", "EmbeddingLoRA", "LoRA", "add_lora", "merge", "unmerge", "use_adapter"]


ONE_TO_ONE = (
    "modules_to_save can hold modules that map one tensor, given by position, to one; name a part of this one, or what "
    "it is part of"
)


class WideProduct(torch.autograd.Function):
    """x A^T in A's dtype. What is kept for backward is x as it came, and not its wider copy.

    The same numbers as `F.linear(x.to(A.dtype), A)`, since widening loses nothing and can be done again. Layers that
    read one x then keep it once between them.
    """

    @staticmethod
    def forward(ctx, x, A):
        ctx.save_for_backward(x, A)
        return F.linear(x.to(A.dtype), A)  # (..., rank)

    @staticmethod
    def backward(ctx, grad):
        x, A = ctx.saved_tensors
        to_x = (grad @ A).to(x.dtype) if ctx.needs_input_grad[0] else None
        return to_x, grad.reshape(-1, len(A)).T @ x.reshape(-1, A.shape[1]).to(A.dtype)


class LoRA(nn.Module):
    """One adapter: the map x -> scale · B A x, which starts as zero (section 4.1).

    Args:
        in_features, out_features: of the layer that it stands beside.
        rank: r; alpha: α. The scale is α/r, or α/√r with `rslora` (arXiv 2312.03732).
        dropout: the probability with which a number of x is dropped in training.

    `A` is (rank, in), drawn as in the authors' code; `B` is (out, rank), zero. Both are float32. Of an input in 16 bits
    no copy is kept for backward, unless there is dropout or autocast: these make one of their own.
    """

    def __init__(self, in_features, out_features, rank, alpha, dropout=0.0, rslora=False):
        super().__init__()
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        dropped = self.training and self.dropout.p
        if x.dtype == self.A.dtype or dropped or torch.is_autocast_enabled(x.device.type):
            low = F.linear(self.dropout(x.to(self.A.dtype)), self.A)  # (..., rank)
        else:
            low = WideProduct.apply(x, self.A)
        return F.linear(low * self.scale, self.B)  # (..., out)

    def delta(self):
        """ΔW = scale · B A, (out, in)."""
        return self.scale * (self.B @ self.A)


class EmbeddingLoRA(LoRA):
    """An adapter of an embedding: x holds token ids, so A x is a look-up. As in the authors' code A is the zero one."""

    def __init__(self, *sizes, padding_idx=None, **options):
        super().__init__(*sizes, **options)
        self.padding_idx = padding_idx  # its row is not trained, as in the embedding
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def forward(self, x):
        return F.linear(F.embedding(x, self.A.T, self.padding_idx) * self.scale, self.B)  # (..., hidden)


class AdaptedLayer(nn.Module):
    """A frozen layer and its adapters, by name.

    `active` says which of them answers: a name, None for the bare layer, or a list with one of these for each row of
    the batch. While `merged` is a name, that adapter is part of the weight and the layer costs what the bare one does.
    """

    def __init__(self, base):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()
        self.active, self.merged = None, None

    def forward(self, x):
        y = self.base(x)
        if self.merged or self.active is None:
            return y
        if isinstance(self.active, str):
            return (y + self.adapters[self.active](x)).to(y.dtype)
        _check_rows(self.active, x)
        y = y.clone()
        for name in set(self.active) - {None}:
            rows = [row for row, wanted in enumerate(self.active) if wanted == name]
            y[rows] = (y[rows] + self.adapters[name](x[rows])).to(y.dtype)
        return y

    def delta(self):
        """What merging the active adapter adds, in the shape of the base's weight."""
        delta = unwrapped(self.adapters[self.active]).delta()  # (out, in)
        turned = isinstance(unwrapped(self.base), (Conv1D, nn.Embedding))  # these keep (in, out)
        return delta.T if turned else delta

    @property
    def weight(self):
        """The base's, for models that look at it."""
        return unwrapped(self.base).weight

    @property
    def bias(self):
        return unwrapped(self.base).bias


class TrainedCopy(AdaptedLayer):
    """A frozen module and, by an adapter's name, a copy of it that is trained whole: peft's `modules_to_save`.

    It is for what is new in a model, such as a classifier's head. Copies are float32 over 16 bits, as adapters are.
    """

    def forward(self, *inputs, **options):
        if self.active is None:
            return self.base(*inputs, **options)
        if len(inputs) != 1:
            raise ValueError(ONE_TO_ONE)
        x = inputs[0]
        if not isinstance(self.active, list):
            return self.answer(self.active, x, **options)
        _check_rows(self.active, x)
        return torch.cat([self.answer(name, x[i : i + 1], **options) for i, name in enumerate(self.active)])

    def answer(self, name, x, **options):
        """What the copy of an adapter answers; None is the frozen module."""
        module = self.base if name is None else self.adapters[name]
        if name is not None and x.is_floating_point():  # an embedding's are token ids
            x = x.to(_dtype(module))
        y = module(x, **options)
        if not isinstance(y, torch.Tensor):
            raise ValueError(ONE_TO_ONE)
        return y if name is None else y.to(_dtype(self.base))


def add_lora(
    model,
    targets="all-linear",
    rank=8,
    alpha=16,
    dropout=0.0,
    rslora=False,
    name="default",
    modules_to_save=(),
):
    """Freeze the model, put an adapter beside each target, in place, and make it the active one.

    Where several processes train, call it before DistributedDataParallel or FSDP wraps the model: these note then which
    parameters there are.

    Args:
        model: any `nn.Module`. Call it again with another `name` for a second adapter.
        targets: names of layers (`nn.Linear`, `nn.Embedding` or transformers' `Conv1D`), whole or their last parts,
            e.g. `["q_proj", "v_proj"]`; "all-linear" is every linear layer but the output embedding or the head of a
            classifier. Another text is a pattern that whole names must match, as in peft's files.
        rank, alpha, dropout, rslora: as in `LoRA`.
        modules_to_save: names of modules of which the adapter trains a whole copy, e.g. `["score"]`, a new head.

    Returns:
        The names of the adapted layers in the bare model, in its order.

    Raises:
        ValueError: a rank that is no rank of the matrix, a dropout that is no probability, a name that matches nothing
            or is of no such layer, a tied weight, a merged model, or a name that is in use or cannot be used. The model
            is then as it was.
    """
    modules = frozen_modules(model)
    copied = find_whole(modules, modules_to_save)
    layers = find_targets(modules, targets, apart=copied)
    check_new(layers, name, rank, alpha, dropout)
    adapters = {path: new_adapter(layer, rank, alpha, dropout, rslora) for path, layer in layers.items()}
    adapters |= {path: trained_copy(modules[path]) for path in copied}
    insert(model, adapters, name)
    if targets == "all-linear":
        warn_of_experts(model, layers, "adapts")
    return list(layers)


def insert(model, adapters, name):
    """Freeze the model and put adapters, {name of the layer: adapter}, beside their layers; they are then active."""
    _check_free(model, adapters, name)
    model.requires_grad_(False)
    modules = bare_modules(model)
    for path, adapter in adapters.items():
        layer = modules[path]
        if not isinstance(layer, AdaptedLayer):
            kind = AdaptedLayer if isinstance(adapter, LoRA) else TrainedCopy
            layer = kind(layer).train(layer.training)
            put_module(model, path, layer)
        layer.adapters[name] = adapter.train(layer.training)
    use_adapter(model, name)


def use_adapter(model, name):
    """Let the adapter `name` answer, and train it alone; None is the bare model.

    Args:
        name: a name, None, or a list of these, one for each row of the batches to come (nothing is trained then).

    Raises:
        ValueError: no such adapter, or the model is merged.
    """
    layers = adapted_layers(model)
    names = name if isinstance(name, list) else [name]
    check_names(layers, names)
    for layer in layers.values():
        known = [each if each in layer.adapters else None for each in names]
        layer.active = known if isinstance(name, list) else known[0]
        for other, adapter in layer.adapters.items():
            adapter.requires_grad_(other == name)


@torch.no_grad()
def merge(model):
    """W + ΔW becomes the weight of each adapted layer: the active adapter then costs nothing. In the weight's dtype."""
    for layer in _to_merge(model):
        layer.weight.add_(layer.delta())
        layer.merged = layer.active


@torch.no_grad()
def unmerge(model):
    """Take ΔW out again. What rounding took in `merge` does not come back: reload where the last digit counts."""
    layers = [layer for layer in adapted_layers(model).values() if layer.merged]
    if not layers:
        raise ValueError("nothing is merged here; call merge first")
    for layer in layers:
        layer.weight.sub_(layer.delta().to(layer.weight.dtype))
        layer.merged = None


def unload(model):
    """Put the frozen layers back in place of the adapted ones, in place.

    A merged adapter stays: in the layers' weights, and as its copies of modules that it trained whole.
    """
    layers = adapted_layers(model)
    merged = next((layer.merged for layer in layers.values() if layer.merged), None)
    for path, layer in layers.items():
        copied = isinstance(layer, TrainedCopy) and merged in layer.adapters
        kept = layer.adapters[merged].to(_dtype(layer.base)) if copied else layer.base
        put_module(model, path, kept.requires_grad_(False))
    return model


def adapted_layers(model):
    """The adapted layers of a model, by name; an error if there is none."""
    layers = {path: layer for path, layer in bare_modules(model).items() if isinstance(layer, AdaptedLayer)}
    if not layers:
        raise ValueError("this model has no adapter; call add_lora or load_adapter first")
    return layers


def frozen_modules(model):
    """{name in the bare model: module} as it was before any adapter: an adapted layer counts as its frozen one."""

    def inner(module):
        return "base" if isinstance(module, AdaptedLayer) else inner_name(module)

    adapters = [layer.adapters for layer in model.modules() if isinstance(layer, AdaptedLayer)]
    unseen = {id(part) for named in adapters for part in named.modules()}
    return {path: module for path, module in bare_modules(model, inner).items() if id(module) not in unseen}


def linear_layers(model):
    """What "all-linear" means: every linear layer but the output embedding and what is in a task's head.

    Returns:
        {name in the bare model: layer}, in the model's order. A layer that has adapters is there as its `AdaptedLayer`.
    """
    modules = bare_modules(model)
    return {path: modules[path] for path in all_linear(frozen_modules(model))}


def new_adapter(layer, rank, alpha, dropout=0.0, rslora=False):
    """A new adapter for a frozen layer, on its device."""
    settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora}
    if isinstance(layer, nn.Embedding):
        adapter = EmbeddingLoRA(*sizes(layer), padding_idx=layer.padding_idx, **settings)
    else:
        adapter = LoRA(*sizes(layer), **settings)
    return adapter.to(layer.weight.device)


def trained_copy(module):
    """A copy of a frozen module to train, in float32 or better."""
    return copy.deepcopy(module).to(torch.promote_types(_dtype(module), torch.float32))


def _dtype(module):
    return next(module.parameters()).dtype


# --- checks


def check_new(layers, name, rank, alpha, dropout):
    """Refuse a name, rank, alpha or dropout that a new adapter of these layers cannot have."""
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot name an adapter; use letters, digits and _, e.g. 'reviews'; torch has taken some"
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank {rank!r} is none; it must be a whole number from 1 up, e.g. 8")
    if not isinstance(alpha, Real) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha!r} must be above 0, e.g. 16")
    if not isinstance(dropout, Real) or not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout!r} is no probability below 1, e.g. 0.05")
    for path, layer in layers.items():
        if rank > min(sizes(layer)):
            shape = " x ".join(map(str, sizes(layer)))
            raise ValueError(f"rank {rank} is above what a {shape} matrix can have ({path}); choose a lower one")


def _check_free(model, adapters, name):
    """Nothing is merged, no adapter has this name, and none trains by low rank or in part what another trains whole."""
    whole = [path for path, adapter in adapters.items() if not isinstance(adapter, LoRA)]
    for path, layer in bare_modules(model).items():
        if isinstance(layer, AdaptedLayer):
            if layer.merged:
                raise ValueError(f"adapter {layer.merged!r} is merged into the weights; call unmerge first")
            if name in layer.adapters:
                raise ValueError(f"there is an adapter {name!r} already (at {path}); give the new one another name")
            copied = isinstance(layer, TrainedCopy)
            mixed = path in adapters and (path in whole) != copied
            inside = copied and any(new.startswith(f"{path}.") for new in adapters)
            if mixed or inside or any(path.startswith(f"{outer}.") for outer in whole):
                raise ValueError(
                    f"{path} would be trained whole by one adapter and by low rank or in part by another; choose one "
                    f"way for both"
                )


def check_names(layers, names):
    """Refuse a name that no adapter has, and a merged model."""
    known = {name for layer in layers.values() for name in layer.adapters}
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"there is no adapter {name!r}; there are {sorted(known)}")
    for layer in layers.values():
        if layer.merged:
            raise ValueError(f"adapter {layer.merged!r} is merged into the weights; call unmerge first")


def _check_rows(names, x):
    if len(names) != len(x):
        raise ValueError(f"{len(names)} rows were given an adapter and the batch has {len(x)}; call use_adapter again")


def check_finite(tensors):
    """Refuse a tensor that holds a number that is not finite."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds numbers that are not finite; train again with a lower rate")


def _to_merge(model):
    """The layers whose active adapter can be merged."""
    layers = adapted_layers(model)
    check_names(layers, [])
    chosen = [layer for layer in layers.values() if layer.active is not None and not isinstance(layer, TrainedCopy)]
    if not chosen or any(isinstance(layer.active, list) for layer in chosen):
        raise ValueError("merge folds one adapter into the weights; choose it with use_adapter(model, name)")
    for layer in chosen:
        if not layer.weight.is_floating_point():
            raise ValueError("the weights are in four bits, which cannot hold the change; see qlora.dequantize_model")
        check_finite(layer.adapters[layer.active].state_dict())
    return chosen
