"""Where the memory goes: live bytes by category, watched while a step runs, and counted from the shapes of layers."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CATEGORIES", "LiveBytes", "qlora_sheet"]

CATEGORIES = ("parameters", "optimizer states", "gradients", "activations", "temporary")

LLAMA = {  # hidden size, inner size, layers (Touvron et al., arXiv 2302.13971, table 2)
    "7B": (4096, 11008, 32),
    "13B": (5120, 13824, 40),
    "33B": (6656, 17920, 60),
    "65B": (8192, 22016, 80),
}


def qlora_sheet(hidden, inner, layers, rank=64, vocabulary=32_000):
    """What a LLaMA takes while it is tuned, without activations: in full, and with QLoRA by category.

    In full a number has weight and gradient in 16 bits and Adam's two averages in 32. With QLoRA the linear layers are
    in NF4 with double quantization, embedding, head and norms in float32, and adapters beside all linear layers have
    weight, gradient and averages in float32.

    Args:
        hidden, inner: the hidden size and that of the MLP; layers: how many.

    Returns:
        A dict: the number of parameters, and bytes of the rest.
    """
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    other = 2 * vocabulary * hidden + (2 * layers + 1) * hidden
    adapters = rank * layers * (4 * 2 * hidden + 3 * (hidden + inner))
    bits = 4 + 8 / 64 + 32 / (64 * 256)  # code, scale, scale of scales
    parts = {
        "NF4 and scales": linear * bits / 8,
        "embedding, head, norms": 4 * other,
        "adapters and gradients": 8 * adapters,
        "Adam, may be paged": 8 * adapters,
    }
    total = linear + other
    return {"parameters": total, "full": 12 * total, **parts, "QLoRA": sum(parts.values())}


class LiveBytes(TorchDispatchMode):
    """Watches what is alive while a model trains: bytes by category after every operation.

        with LiveBytes(model, optimizer) as live:
            loss = ...
            live.note("backward")
            loss.backward()

    What an operation makes while gradients are recorded counts as an activation, also when checkpointing makes it
    again in backward; the rest as temporary, until it proves to be a weight's gradient. An optimizer's states are those
    that it has at the beginning or at a note, so watch the second step. Storage is counted once, however many views it
    has, until the last tensor with it is gone. What a kernel takes and gives back inside is not seen. It works with
    fake tensors too, where nothing is computed.

    Attributes:
        timeline: one tuple of bytes an operation, in the order of `CATEGORIES`.
        notes: {place in the timeline: text}.
        peak: the tuple with the largest sum.
    """

    def __init__(self, model, optimizer=None):
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.known, self.timeline, self.notes = weakref.WeakKeyDictionary(), [], {}

    def __enter__(self):
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self.count(tensor, "parameters")
        self.hooks = [
            weight.register_hook(lambda grad: self.count(grad, "gradients"))
            for weight in self.model.parameters()
            if weight.requires_grad
        ]
        self.note("forward")
        return super().__enter__()

    def __exit__(self, *error):
        self.note("end")
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        category = "activations" if torch.is_grad_enabled() else "temporary"
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self.count(tensor, category)
        self.timeline.append(tuple(self.live.values()))
        return found

    def count(self, tensor, category):
        """Count a tensor's storage under this category from now on."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = [category, storage.nbytes()]
            weakref.finalize(storage, self.forget, self.known[storage])
            self.live[category] += storage.nbytes()
        entry = self.known[storage]
        self.live[entry[0]] -= entry[1]
        entry[0] = category
        self.live[category] += entry[1]

    def forget(self, entry):
        self.live[entry[0]] -= entry[1]

    def note(self, text):
        """Give the place in the timeline a name, and look up what has become an optimizer's state."""
        self.notes[len(self.timeline)] = text
        for state in (self.optimizer.state if self.optimizer else {}).values():
            for value in state.values():
                if torch.is_tensor(value):
                    self.count(value, "optimizer states")

    @property
    def peak(self):
        return dict(zip(CATEGORIES, max(self.timeline, key=sum), strict=True))
