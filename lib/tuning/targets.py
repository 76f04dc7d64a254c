"""Which layers of a model a method is for: by names, by a pattern, or all linear ones; the rules are peft's.

`modules` is here {name in the bare model: module}, as `bare_modules` gives it, with the model itself under "".
"""

import math
import re
import warnings
from collections import Counter

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from .wrappers import bare_modules, unwrapped

KINDS = (nn.Linear, nn.Embedding, Conv1D)
NO_STACKS = (nn.modules.conv._ConvNd, ParametrizationList)  # such as a convolution's weight, or what it is made of
HEADS = ("score", "classifier", "classification_head", "qa_outputs", "head")  # transformers' names, and this book's
UNTIE = (
    "first set config.tie_word_embeddings = False and give one of them a copy, nn.Parameter(weight.detach().clone())"
)


def sizes(layer):
    """(in_features, out_features) of a layer; an embedding maps the vocabulary to the hidden size."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape)  # nn.Embedding and Conv1D keep their weight as (in, out)


def matching(paths, name):
    """Those of the paths that are `name` or end on it."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def all_linear(modules):
    """The names of a model's linear layers, without the output embedding and what is in a task's head.

    The output embedding is large and often tied; a head is new, and is trained whole.
    """
    output = getattr(modules[""], "get_output_embeddings", lambda: None)()
    weight = None if output is None else unwrapped(output).weight  # an adapted layer's is that of the frozen one
    linear = [path for path, layer in modules.items() if isinstance(layer, (nn.Linear, Conv1D))]
    return [path for path in linear if path.split(".")[0] not in HEADS and modules[path].weight is not weight]


def outside(paths, apart):
    """The paths that are neither one of the modules `apart`, nor in one, nor the whole model."""
    return [path for path in paths if path and not any(f"{path}.".startswith(f"{other}.") for other in apart)]


def find_targets(modules, targets, apart=()):
    """{name: layer} of the layers that `targets` names; none is one of the modules `apart`, or in one of them.

    Args:
        targets: names, whole or their last parts; "all-linear"; or a pattern that whole names must match.
    """
    paths = outside(modules, apart)
    asked = None
    if targets == "all-linear":
        found = set(all_linear(modules))
    elif isinstance(targets, str):  # peft's files may hold a pattern
        asked = f"{targets} (a pattern of whole names; put names in a list)"
        found = {path for path in paths if compiled(targets).fullmatch(path)}
    else:
        found = set()
        for target in targets:
            if not matching(paths, target):
                no_target(modules, target)
            found.update(matching(paths, target))
    layers = {path: modules[path] for path in paths if path in found}
    if not layers:
        no_target(modules, asked)
    check_targets(modules, layers)
    return layers


def find_whole(modules, names):
    """The names of the modules that `names` names, whole or by their last parts, to be trained whole."""
    if isinstance(names, str):
        raise ValueError(f"modules_to_save is a text, {names!r}; put names in a list")
    found = set()
    for name in names or ():
        paths = matching(outside(modules, ()), name)
        if not paths:
            raise ValueError(f"{name!r} of modules_to_save matches no module; print(model) shows their names")
        found.update(paths)
    found = [path for path in modules if path in found and not any(path.startswith(f"{outer}.") for outer in found)]
    uses = count_uses(modules)
    for path in found:
        weights = list(modules[path].parameters())
        if isinstance(modules[path], (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(f"{path} of modules_to_save is a list of modules, which does not answer; name its parts")
        if not weights or not all(weight.is_floating_point() for weight in weights):
            raise ValueError(
                f"{path} of modules_to_save has no weights to train, or some are in few bits; leave it out"
            )
        if any(hasattr(weight, "full_tensor") for weight in weights):
            raise ValueError(f"{path} is in pieces; add or load an adapter that trains it whole before fully_shard")
        if any(uses[id(weight)] > 1 for weight in weights):
            raise ValueError(f"a weight of {path} is tied, and a trained copy would untie it: {UNTIE}")
    return found


def compiled(pattern):
    """A pattern of names, refused if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no pattern of names: {error}; put names in a list") from error


def count_uses(modules):
    """How often each parameter of the model occurs in it, by the parameter's id."""
    return Counter(id(weight) for _, weight in modules[""].named_parameters(remove_duplicate=False))


def no_target(modules, target):
    """Refuse a target, or None for all of them, that matches nothing."""
    there = {path.rsplit(".", 1)[-1] for path, layer in modules.items() if isinstance(layer, KINDS)}
    asked = "the targets match" if target is None else f"target {target!r} matches"
    raise ValueError(f"{asked} no layer; this model's linear layers and embeddings end on {sorted(there)}")


def check_targets(modules, layers):
    """Refuse layers beside which an adapter cannot stand."""
    uses = count_uses(modules)
    for path, layer in layers.items():
        kind = type(layer).__name__
        if not isinstance(layer, KINDS) or (isinstance(layer, nn.Embedding) and type(layer) is not nn.Embedding):
            raise ValueError(f"{path} is a {kind}; adapters stand beside nn.Linear, nn.Embedding, Conv1D")
        check_called(modules, path)
        if uses[id(layer.weight)] > 1:
            raise ValueError(
                f"the weight of {path} is tied: another layer uses it too, and merging would change both; {UNTIE}"
            )


def check_called(modules, path):
    """Refuse a layer whose weight torch may use without calling the layer: what stands in its place is then unseen."""
    parent = modules[path.rpartition(".")[0]]
    inside = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    if inside or isinstance(modules[path], NonDynamicallyQuantizableLinear):
        kind = type(parent).__name__
        raise ValueError(f"{path} belongs to nn.{kind}, which may use the weight without calling the layer")


# --- a mixture of experts


def warn_of_experts(model, layers, verb):
    """Say so if weights of linear maps are in no layer: a mixture of experts may stack them in one parameter.

    Args:
        layers: {name: layer} that something is done to; verb: what is done, e.g. "adapts".
    """
    stacked = stacked_weights(model)
    if stacked:
        reached = sum(math.prod(sizes(layer)) for layer in layers.values())
        warnings.warn(
            f"this {verb} layers with {reached / (reached + sum(stacked.values())):.1%} of the weights of this model's "
            f"linear maps. The rest is stacked in parameters that belong to no linear layer, and is left out: "
            f"{next(iter(stacked))} and {len(stacked) - 1} more",
            stacklevel=3,
        )


def stacked_weights(model):
    """{name in the bare model: how many numbers} of parameters that hold a stack of matrices, one for each expert."""
    return {
        f"{path}.{name}": weight.numel()
        for path, module in bare_modules(model).items()
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and len(weight) > 1 and not isinstance(module, NO_STACKS)
    }
