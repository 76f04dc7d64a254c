"""Names of the bare model: what torch.compile, DataParallel, FSDP or checkpointing wraps around a module is unseen.

A wrapper adds a part to the name of all that is in it (`_orig_mod.score`), which no other program expects in a file.
"""

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile's, FSDP's, checkpointing's


def inner_name(module):
    """The name under which a wrapper holds what it wraps; None for a module that is no wrapper."""
    if isinstance(module, (nn.DataParallel, DistributedDataParallel, AveragedModel)):
        return "module"  # only in these: a model may have a part of this name
    return next((name for name in INNER if name in module._modules), None)


def unwrapped(module):
    """The module without what is wrapped around it."""
    while name := inner_name(module):
        module = getattr(module, name)
    return module


def bare_modules(model, inner=inner_name):
    """{name: module} of all that is in a model, under the names that it has in the bare one; wrappers are not there.

    Args:
        inner: a function that tells wrappers from other modules, as `inner_name` does.
    """
    names, found = {}, {}
    for path, module in model.named_modules():
        outer, _, own = path.rpartition(".")
        if not path:
            names[path] = ""
        elif own == inner(model.get_submodule(outer)):
            names[path] = names[outer]
        else:
            names[path] = f"{names[outer]}.{own}".removeprefix(".")
        found[names[path]] = module  # what is wrapped comes after its wrapper, and takes its place
    return found


def bare_state(module):
    """{name: tensor} of a module's parameters and of the buffers that are saved, under the names of the bare one."""
    state = {}
    for path, part in bare_modules(module).items():
        tensors = {**part._parameters, **part._buffers}
        for name, tensor in tensors.items():
            if tensor is not None and name not in part._non_persistent_buffers_set:
                state[f"{path}.{name}".removeprefix(".")] = tensor
    return state


def put_module(model, path, new):
    """Put a module in the place that the bare model calls `path`, inside of what is wrapped around the old one."""
    *outer, name = path.split(".")
    place = unwrapped(model)
    for part in outer:
        place = unwrapped(getattr(place, part))
    while inner := inner_name(getattr(place, name)):
        place, name = getattr(place, name), inner
    setattr(place, name, new)
    if name == "_orig_mod":
        place._initialize()  # torch.compile holds on to the old one's forward


def whole(tensor):
    """A tensor that FSDP keeps in pieces (a DTensor) as a whole; all processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
