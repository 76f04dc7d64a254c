"""LoRA: low-rank adapters beside the frozen layers of a model (Hu et al., arXiv 2106.09685).

`add_lora` puts an adapter beside each chosen layer, in place; `use_adapter` switches between several of them, also
row by row in one batch; `merge` folds one into the weights. `tuning.adapter_files` saves and loads them.
"""

import math
import re
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .wrappers import bare_modules, unwrapped

__all__ = ["AdaptedLayer", "EmbeddingLoRA", "LoRA", "add_lora", "merge", "unmerge", "use_adapter"]


class LoRA(nn.Module):
    """One adapter: the map x -> scale · B A x, which starts as zero (section 4.1).

    Args:
        in_features, out_features: of the layer that it stands beside.
        rank: r; alpha: α. The scale is α/r, or α/√r with `rslora` (arXiv 2312.03732).
        dropout: the probability with which a number of x is dropped in training.

    `A` is (rank, in), drawn as in the authors' code; `B` is (out, rank), zero. Both are float32.
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
        x = self.dropout(x.to(self.A.dtype))  # (..., in)
        return F.linear(F.linear(x, self.A) * self.scale, self.B)  # (..., out)

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
        delta = self.adapters[self.active].delta()  # (out, in)
        return delta.T if isinstance(self.base, (Conv1D, nn.Embedding)) else delta  # these keep (in, out)

    @property
    def weight(self):
        """The base's, for models that look at it."""
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias


def add_lora(model, targets="all-linear", rank=8, alpha=16, dropout=0.0, rslora=False, name="default"):
    """Freeze the model, put an adapter beside each target, in place, and make it the active one.

    Args:
        model: any `nn.Module`. Call it again with another `name` for a second adapter.
        targets: names of layers (`nn.Linear`, `nn.Embedding` or transformers' `Conv1D`), whole or their last parts,
            e.g. `["q_proj", "v_proj"]`; "all-linear" is every linear layer but the output embedding or the head of a
            classifier. Another text is a pattern that whole names must match, as in peft's files.
        rank, alpha, dropout, rslora: as in `LoRA`.

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        ValueError: a rank that is no rank of the matrix, a dropout that is no probability, a target that matches
            nothing or is no such layer, a tied weight, a merged model, or a name that is in use or cannot be used.
            The model is then as it was.
    """
    layers = _targets(model, targets)
    _check_new(layers, name, rank, alpha, dropout)
    _check_free(model, name)
    if targets == "all-linear":
        warn_of_experts(model, layers, "adapts")
    model.requires_grad_(False)
    for path, layer in layers.items():
        if not isinstance(layer, AdaptedLayer):
            layer = AdaptedLayer(layer).train(layer.training)
            model.set_submodule(path, layer)
        adapter = _new_adapter(layer.base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        layer.adapters[name] = adapter.to(layer.weight.device).train(layer.training)
    use_adapter(model, name)
    return list(layers)


def use_adapter(model, name):
    """Let the adapter `name` answer, and train it alone; None is the bare model.

    Args:
        name: a name, None, or a list of these, one for each row of the batches to come (nothing is trained then).

    Raises:
        ValueError: no such adapter, or the model is merged.
    """
    layers = adapted_layers(model)
    names = name if isinstance(name, list) else [name]
    _check_names(layers, names)
    for layer in layers.values():
        known = [each if each in layer.adapters else None for each in names]
        layer.active = known if isinstance(name, list) else known[0]
        for other, adapter in layer.adapters.items():
            adapter.requires_grad_(other == name)


@torch.no_grad()
def merge(model):
    """W + ΔW becomes the weight of each adapted layer: the active adapter then costs nothing. In the weight's dtype."""
    for layer in _to_merge(model):
        layer.base.weight += layer.delta()
        layer.merged = layer.active


@torch.no_grad()
def unmerge(model):
    """Take ΔW out again. What rounding took in `merge` does not come back: reload where the last digit counts."""
    layers = [layer for layer in adapted_layers(model).values() if layer.merged]
    if not layers:
        raise ValueError("nothing is merged here; call merge first")
    for layer in layers:
        layer.base.weight -= layer.delta().to(layer.base.weight.dtype)
        layer.merged = None


def unload(model):
    """Put the frozen layers back in place of the adapted ones, in place; a merged adapter stays in their weights."""
    for path, layer in adapted_layers(model).items():
        model.set_submodule(path, layer.base)
    return model


def adapted_layers(model):
    """The adapted layers of a model, by name; an error if there is none."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdaptedLayer)}
    if not layers:
        raise ValueError("this model has no adapter; call add_lora or load_adapter first")
    return layers


# --- which layers

HEADS = ("score", "classifier", "classification_head", "qa_outputs", "head")  # transformers' names, and this book's


def linear_layers(model):
    """What "all-linear" means: every linear layer but the output embedding and what is in a task's head.

    peft's rule, with its task types. The output embedding is large and often tied; a head is new, and trained whole.

    Returns:
        {name in the bare model: layer}, in the model's order. A layer that has adapters is there as its `AdaptedLayer`.
    """
    bare = unwrapped(model)
    output = getattr(bare, "get_output_embeddings", lambda: None)()
    output = None if output is None else unwrapped(output)
    return {
        path: layer
        for path, layer in _outer_layers(model).items()
        if isinstance(_base(layer), (nn.Linear, Conv1D)) and layer is not output and path.split(".")[0] not in HEADS
    }


def warn_of_experts(model, layers, verb):
    """Say so if weights of linear maps are in no layer: a mixture of experts may stack them in one parameter.

    Args:
        layers: {name: layer} that something is done to; verb: what is done, e.g. "adapts".
    """
    stacked = stacked_weights(model)
    if stacked:
        reached = sum(math.prod(_sizes(_base(layer))) for layer in layers.values())
        share = reached / (reached + sum(stacked.values()))
        warnings.warn(
            f"this {verb} layers with {share:.1%} of the weights of this model's linear maps. The rest is stacked in "
            f"parameters that belong to no linear layer, and is left out: {next(iter(stacked))} and "
            f"{len(stacked) - 1} more",
            stacklevel=3,
        )


def stacked_weights(model):
    """{name in the bare model: how many numbers} of parameters that hold a stack of matrices, one for each expert."""
    return {
        f"{path}.{name}": weight.numel()
        for path, module in bare_modules(model).items()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and len(weight) > 1 and not isinstance(module, nn.modules.conv._ConvNd)
    }


def _outer_layers(model):
    """{name in the bare model: module} without what is inside of an `AdaptedLayer`."""
    modules = bare_modules(model)
    inside = {id(part) for module in modules.values() if isinstance(module, AdaptedLayer) for part in module.modules()}
    return {p: m for p, m in modules.items() if p and (isinstance(m, AdaptedLayer) or id(m) not in inside)}


def _sizes(base):
    """(in_features, out_features) of a layer; an embedding maps the vocabulary to the hidden size."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    return tuple(base.weight.shape)  # nn.Embedding and Conv1D keep their weight as (in, out)


def _new_adapter(base, **settings):
    if isinstance(base, nn.Embedding):
        return EmbeddingLoRA(*_sizes(base), padding_idx=base.padding_idx, **settings)
    return LoRA(*_sizes(base), **settings)


def _targets(model, targets):
    """The layers that `targets` names, by their whole name: peft's rules."""
    layers = _outer_layers(model)
    if isinstance(targets, str) and targets != "all-linear":  # peft's files may hold a pattern
        matching = {path: layer for path, layer in layers.items() if re.fullmatch(targets, path)}
        return _check_targets(model, matching, f"{targets} (a pattern of whole names; put names in a list)")
    if targets == "all-linear":
        return _check_targets(model, linear_layers(model))
    found = {}
    for target in targets:
        matching = [path for path in layers if path == target or path.endswith(f".{target}")]
        if not matching:
            _check_targets(model, {}, target)
        found |= {path: layers[path] for path in matching}
    return _check_targets(model, {path: layer for path, layer in layers.items() if path in found})


def _base(layer):
    return layer.base if isinstance(layer, AdaptedLayer) else layer


def _check_targets(model, layers, target=None):
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    if not layers:
        there = {path.rsplit(".", 1)[-1] for path, layer in model.named_modules() if isinstance(layer, kinds)}
        asked = "the targets match" if target is None else f"target {target!r} matches"
        raise ValueError(f"{asked} no layer; this model's linear layers and embeddings end on {sorted(there)}")
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for path, layer in layers.items():
        base = _base(layer)
        if not isinstance(base, kinds) or (isinstance(base, nn.Embedding) and type(base) is not nn.Embedding):
            raise ValueError(
                f"{path} is a {type(base).__name__}; adapters stand beside nn.Linear, nn.Embedding, Conv1D"
            )
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(base, NonDynamicallyQuantizableLinear) or isinstance(parent, nn.TransformerEncoderLayer):
            raise ValueError(
                f"{path} belongs to nn.{type(parent).__name__}, which may use the weight without calling the layer"
            )
        if uses[id(base.weight)] > 1:
            raise ValueError(
                f"the weight of {path} is tied: another layer uses it too, and merging would change both; first set "
                f"config.tie_word_embeddings = False and give one of them a copy, nn.Parameter(weight.detach().clone())"
            )
    return layers


def _check_new(layers, name, rank, alpha, dropout):
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot name an adapter; use letters, digits and _, e.g. 'reviews'; torch has taken some"
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank {rank!r} is none; it must be a whole number from 1 up, e.g. 8")
    if not alpha > 0:
        raise ValueError(f"alpha {alpha!r} must be above 0, e.g. 16")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout!r} is no probability below 1, e.g. 0.05")
    for path, layer in layers.items():
        if rank > min(_sizes(_base(layer))):
            shape = " x ".join(map(str, _sizes(_base(layer))))
            raise ValueError(f"rank {rank} is above what a {shape} matrix can have ({path}); choose a lower one")


def _check_free(model, name):
    """No adapter of this name, and nothing merged."""
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer):
            if layer.merged:
                raise ValueError(f"adapter {layer.merged!r} is merged into the weights; call unmerge first")
            if name in layer.adapters:
                raise ValueError(f"there is an adapter {name!r} already (at {path}); give the new one another name")


def _check_names(layers, names):
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


def _check_finite(tensors):
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds numbers that are not finite; train again with a lower rate")


def _to_merge(model):
    """The layers whose active adapter can be merged."""
    layers = adapted_layers(model)
    _check_names(layers, [])
    chosen = [layer for layer in layers.values() if layer.active is not None]
    if not chosen or any(isinstance(layer.active, list) for layer in chosen):
        raise ValueError("merge folds one adapter into the weights; choose it with use_adapter(model, name)")
    for layer in chosen:
        if not layer.base.weight.is_floating_point():
            raise ValueError("the weights are in four bits, which cannot hold the change; see qlora.dequantize_model")
        _check_finite(layer.adapters[layer.active].state_dict())
    return chosen
