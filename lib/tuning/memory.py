"""Where the memory goes: live bytes by category, watched while a step runs, and counted from the shapes of layers."""

import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["held_all_along", "kept_for_backward", "moments", "plan", "qlora_sheet"]

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
        peak: bytes by category at the moment when their sum is largest.
        largest: the most bytes of each category, each at a moment of its own.
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
    def largest(self):
        return dict(zip(CATEGORIES, map(max, zip(*self.timeline, strict=True)), strict=True))

    @property
    def peak(self):
        return dict(zip(CATEGORIES, max(self.timeline, key=sum), strict=True))


METHODS = ("AdamW", "SGD", "LOMO", "AdaLomo", "LoRA", "QLoRA", "P-tuning")


def kept_for_backward(method, hidden, inner, heads, rank=64):
    """Bytes that a LLaMA layer keeps of each token until backward, without checkpointing.

    Activations have 16 bits, normalization computes in 32, and attention never makes its whole table. A trained linear
    layer keeps its input; a frozen one keeps nothing, but an adapter beside it keeps a copy of its own: in 32 bits, or
    under autocast, as with QLoRA, in 16. What a layer in four bits gives back has 32, as its input.
    """
    norms = 2 * 4 * hidden
    attention = 2 * 3 * hidden + 2 * hidden + 4 * heads  # queries, keys, values; output; a sum a head
    mlp = 3 * (4 if method == "QLoRA" else 2) * inner  # gate, its SiLU, up
    inputs = 6 * hidden + inner, rank * 7  # of the seven linear layers, and what the adapters' first matrices give
    if method == "LoRA":
        own = 4 * sum(inputs)
    elif method == "QLoRA":
        own = 2 * sum(inputs)
    elif method == "P-tuning":
        own = 0
    else:  # both norms' outputs, before and after their weight; the input of the last layer
        own = 2 * 4 * hidden + 2 * inner
    return norms + attention + mlp + own


def held_all_along(method, shape, rank=64, vocabulary=32_000):
    """What does not depend on the batch: bytes of parameters, optimizer states, and all gradients together.

    Arguments as in `plan`.
    """
    hidden, inner, layers = shape
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    other = 2 * vocabulary * hidden + (2 * layers + 1) * hidden  # embedding, head, norms
    sides = layers * (4 * 2 * hidden + 3 * (hidden + inner))  # rows and columns of the linear layers
    if method in ("LoRA", "QLoRA", "P-tuning"):
        trained = 14 * hidden * hidden if method == "P-tuning" else rank * sides
        frozen = linear * (4.127 / 8) + 4 * other if method == "QLoRA" else 2 * (linear + other)
        return frozen + 4 * trained, 8 * trained, 4 * trained
    all_of_them = linear + other
    states = {"AdamW": 12 * all_of_them, "SGD": 4 * all_of_them, "LOMO": 0}  # float32 master weights, averages
    states["AdaLomo"] = 4 * (sides + 2 * (vocabulary + hidden))
    gradients = 0 if "LOMO" in method.upper() else 2 * all_of_them
    return 2 * all_of_them, states[method], gradients


def moments(method, shape, tokens, checkpointing, rank=64, vocabulary=32_000):
    """What may be the peak of a step beside parameters and states: (gradients, activations, temporary), bytes of each.

    Arguments as in `plan`, but for `tokens`, of all sequences together.
    """
    hidden, inner, layers = shape
    gradients = held_all_along(method, shape, rank, vocabulary)[2]
    layer = tokens * kept_for_backward(method, hidden, inner, hidden // 128, rank)
    stream = tokens * hidden * (4 if method == "QLoRA" else 2)  # from layer to layer
    kept = layers * (stream if checkpointing else layer) + 8 * tokens * hidden  # and the last norm
    logits, head = tokens * vocabulary, vocabulary * hidden
    casts = 2 * (gradients // 4 + head) if method == "QLoRA" else 0  # autocast's copies
    copies = {"AdamW": 2, "SGD": 1, "LOMO": 2, "AdaLomo": 4}.get(method, 0)  # of the head
    found = [
        (0, kept + casts + 10 * logits, 0),  # end of forward: in 16 bits, in 32, log-softmax
        (0, kept + (0 if checkpointing else casts) + 4 * logits, 8 * logits),  # the loss's gradient
        (gradients, 0 if gradients else kept, copies * 4 * head),  # the update
    ]
    if checkpointing:  # the last layer, made again with all inputs kept; and the first
        missing = 2 * head + 0.8 * gradients / layers if gradients and copies else 0
        inside = 6 * inner * (max(tokens, hidden) if method == "QLoRA" else tokens)  # or a weight being unpacked
        found.append((0, kept + layer, inside))
        found.append((gradients - missing, layer, inside))
    return found


def plan(method, shape, batch, length, checkpointing=True, rank=64, prompt=20, vocabulary=32_000):
    """Predict the peak of a training step of a LLaMA with 16-bit weights: bytes by category.

    Args:
        method: one of `METHODS`. AdamW and SGD keep master weights; the last three train with AdamW, in float32.
        shape: (hidden size, inner size, layers), as in `LLAMA`; heads have 128 numbers.
        batch, length: sequences, and tokens of each; checkpointing: keep a layer's input only.
        rank: of adapters beside all linear layers; prompt: pseudo tokens in front, from P-tuning's encoder.

    Returns:
        {category: bytes} at the moment when their sum is largest. Live bytes: a process takes more.

    Raises:
        ValueError: an unknown method, or sizes that are not positive.
    """
    _check_plan(method, *shape, batch, length)
    parameters, states, _ = held_all_along(method, shape, rank, vocabulary)
    tokens = batch * (length + (prompt if method == "P-tuning" else 0))
    peak = max(moments(method, shape, tokens, checkpointing, rank, vocabulary), key=sum)
    return dict(zip(CATEGORIES, (parameters, states, *peak), strict=True))


def _check_plan(method, *sizes):
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes must be positive, got {sizes}")


class PeakMemory:
    """The most memory in use while a block runs, in bytes: of the GPU, or of this process on Linux; else None.

    `peak` is what tensors held; on a GPU `reserved` is what torch had taken from it for them, None elsewhere.
    """

    def __init__(self, device):
        self.cuda, self.peak, self.reserved = torch.device(device).type == "cuda", None, None

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
        return self

    def __exit__(self, *_):
        status = Path("/proc/self/status")
        if self.cuda:
            self.peak, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        elif status.exists():
            mark = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
            self.peak = int(mark.split()[1]) * 1024 if mark else None
