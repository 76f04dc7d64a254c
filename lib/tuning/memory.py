"""Where the memory goes: live bytes by category, watched while a step runs, and counted from the shapes of layers."""

import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["held_all_along", "kept_for_backward", "kept_to_train", "moments", "plan", "qlora_sheet"]

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


def _check_sizes(found, *names):
    for name in names:
        size = getattr(found, name)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be a positive whole number")


@dataclass(frozen=True)
class Shape:
    """What the memory of a decoder such as LLaMA, Llama 3 or Qwen3 depends on.

    Args:
        hidden: the hidden size; inner: that of the MLP; layers: how many.
        heads: of attention, if None one for each 128 of the hidden size; kv_heads: of keys and values, if None as many.
        head_size: numbers of a head; vocabulary: rows of the embedding.
        qk_norms: are queries and keys normalized? tied: is the output layer the embedding?

    Raises:
        ValueError: a size that is no positive whole number, or heads that share no keys evenly.
    """

    hidden: int
    inner: int
    layers: int
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int = 128
    vocabulary: int = 32_000
    qk_norms: bool = False
    tied: bool = False

    def __post_init__(self):
        object.__setattr__(self, "heads", self.heads or max(1, self.hidden // 128))
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        _check_sizes(self, "hidden", "inner", "layers", "heads", "kv_heads", "head_size", "vocabulary")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} kv_heads cannot be shared by {self.heads} heads; take a divisor")

    @property
    def linear(self):
        """(in, out) of a layer's seven linear layers: queries, keys, values, output, gate, up, down."""
        hidden, inner = self.hidden, self.inner
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]

    @property
    def weights(self):
        """Numbers of a layer's linear layers."""
        return sum(rows * columns for rows, columns in self.linear)

    @property
    def sides(self):
        """Rows and columns of a layer's linear layers, together."""
        return sum(rows + columns for rows, columns in self.linear)

    @property
    def head(self):
        """Numbers of the output layer, and of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def norms(self):
        """Numbers of all norms: two a layer, those of queries and keys if there are, and the last one."""
        return self.layers * (2 * self.hidden + 2 * self.head_size * self.qk_norms) + self.hidden


def shape_of(config):
    """The `Shape` of a model, from its configuration, as `AutoConfig.from_pretrained("Qwen/Qwen3-8B")` gives it.

    Raises:
        ValueError: a kind of model that is not planned here.
    """
    # are queries and keys normalized? Qwen 2 has a few biases, which are not counted
    kinds = {"llama": False, "mistral": False, "qwen2": False, "qwen3": True}
    if config.model_type not in kinds:
        raise ValueError(
            f"no plan for models of the kind {config.model_type!r}, only for {', '.join(kinds)}; if yours is built "
            "alike, write its Shape(hidden, inner, layers, ...) yourself"
        )
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_size,
        config.vocab_size,
        kinds[config.model_type],
        config.tie_word_embeddings,
    )


MODELS = {name: Shape(*sizes) for name, sizes in LLAMA.items()} | {  # from the models' config.json
    "Llama-3.2-1B": Shape(2048, 8192, 16, heads=32, kv_heads=8, head_size=64, vocabulary=128_256, tied=True),
    "Llama-3-8B": Shape(4096, 14336, 32, heads=32, kv_heads=8, vocabulary=128_256),
    "Qwen3-8B": Shape(4096, 12288, 36, heads=32, kv_heads=8, vocabulary=151_936, qk_norms=True),
}

METHODS = ("AdamW", "AdamW, 16-bit", "SGD", "LOMO", "AdaLomo", "LoRA", "QLoRA", "P-tuning")
ADAPTERS = ("float32", "copies", "autocast", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """A training step to be planned or simulated: of a model with 16-bit weights, by one method.

    Args:
        method: one of `METHODS`. "AdamW" and "SGD" are mixed precision, with float32 master weights (a loop of this
            book, as in the LOMO paper's table 1); "AdamW, 16-bit" is torch's own, fused, whose states have 16 bits
            like the weights. The last three train with torch's AdamW, in float32.
        shape: a `Shape`, e.g. `MODELS["7B"]`.
        batch, length: sequences, and tokens of each; checkpointing: keep a layer's input only.
        chunk: tokens whose logits are made at once (`training.chunked_loss`), None for all.
        rank: of adapters beside all linear layers; prompt: pseudo tokens in front, from P-tuning's encoder.
        adapters: how LoRA's compute: in "float32"; the same with "copies" of their inputs in float32, which peft's keep
            for backward; in float32 under "autocast"; or in "bfloat16" as the model. QLoRA's are under autocast.

    Raises:
        ValueError: an unknown method or kind of adapters, or sizes that are not positive.
    """

    method: str
    shape: Shape
    batch: int
    length: int
    checkpointing: bool = True
    chunk: int | None = None
    rank: int = 64
    prompt: int = 20
    adapters: str = "float32"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {'; '.join(METHODS)}")
        if not isinstance(self.shape, Shape):
            raise ValueError(f"shape is {self.shape!r}; give a Shape, e.g. MODELS['7B'] or Shape(4096, 11008, 32)")
        if self.adapters not in ADAPTERS:
            raise ValueError(f"adapters are {self.adapters!r}; choose one of {', '.join(ADAPTERS)}")
        if self.adapters != "float32" and self.method != "LoRA":
            raise ValueError(f"adapters are {self.adapters!r}, which is LoRA's choice; leave it out with {self.method}")
        sizes = ["batch", "length", "rank", "prompt"]
        _check_sizes(self, *sizes, *([] if self.chunk is None else ["chunk"]))

    @property
    def full(self):
        """Are all weights trained?"""
        return self.method not in ("LoRA", "QLoRA", "P-tuning")

    @property
    def autocast(self):
        """Are products computed in 16 bits, by autocast?"""
        return self.method == "QLoRA" or self.adapters == "autocast"

    @property
    def fused(self):
        """Is the update inside backward, so that no gradient is kept?"""
        return self.method in ("LOMO", "AdaLomo")

    @property
    def tokens(self):
        """Of all sequences together."""
        return self.batch * (self.length + (self.prompt if self.method == "P-tuning" else 0))

    @property
    def logits(self):
        """How many there are at once."""
        return min(self.chunk or self.tokens, self.tokens) * self.shape.vocabulary

    @property
    def stream(self):
        """Bytes of what goes from layer to layer."""
        return (4 if self.method == "QLoRA" else 2) * self.tokens * self.shape.hidden


NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes a number, with scales and their scales


def kept_for_backward(setting):
    """Bytes that a layer keeps of each token until backward, with all kept.

    Activations have 16 bits, norms compute in 32, and attention never makes its
    whole table. A layer in four bits gives back 32 bits, as its input has.
    """
    shape, width = setting.shape, 4 if setting.method == "QLoRA" else 2
    queries, keys = shape.linear[0][1], shape.linear[1][1]  # how wide
    normalized = 2 * shape.hidden + (queries + keys if shape.qk_norms else 0)
    norms = 4 * normalized  # what goes in, in float32
    attention = 2 * (queries + 2 * keys) + 2 * queries  # and what comes out
    attention += 4 * shape.heads  # a sum for each head, of the softmax
    mlp = width * 3 * shape.inner  # gate, its SiLU, up
    return norms + attention + mlp + kept_to_train(setting, normalized)


def kept_to_train(setting, normalized):
    """Bytes that a layer keeps of each token for what is trained."""
    shape = setting.shape
    shared = 2 * (2 * shape.hidden + shape.inner)  # norms' results; down's
    inner = 7 * setting.rank  # what the adapters' first matrices give
    if setting.method == "P-tuning":
        return 0
    if setting.full:
        return shared + 2 * normalized  # each norm's result, before its weight
    if setting.adapters in ("float32", "bfloat16") and not setting.autocast:
        return shared + (4 if setting.adapters == "float32" else 2) * inner
    own = sum(rows for rows, _ in shape.linear)  # each adapter copies its input
    return (2 if setting.autocast else 4) * (own + inner)


def held_all_along(setting):
    """Bytes of parameters, states, and all gradients: what knows no batch."""
    shape, method = setting.shape, setting.method
    if not setting.full:
        return held_with_few_trained(setting)
    tables = 1 if shape.tied else 2
    numbers = shape.layers * shape.weights + tables * shape.head + shape.norms
    sides = tables * (shape.vocabulary + shape.hidden)
    sides += shape.layers * shape.sides
    states = {
        "AdamW": 12 * numbers,  # master weight and two averages, in float32
        "AdamW, 16-bit": 4 * numbers,
        "SGD": 4 * numbers,  # master weight
        "LOMO": 0,
        "AdaLomo": 4 * (sides + shape.norms),  # a number a row, and a column
    }
    gradients = 0 if setting.fused else 2 * numbers
    return 2 * numbers, states[method], gradients


def held_with_few_trained(setting):
    """As `held_all_along`, of a frozen model with adapters or a prompt."""
    shape, width = setting.shape, 2 if setting.adapters == "bfloat16" else 4
    linear = shape.layers * shape.weights
    other = (1 if shape.tied else 2) * shape.head + shape.norms
    frozen = 2 * (linear + other)
    if setting.method == "QLoRA":
        frozen = NF4 * linear + 4 * other
    trained = width * setting.rank * shape.layers * shape.sides
    if setting.method == "P-tuning":  # two LSTM layers: 12; an MLP: 2
        trained = 4 * 14 * shape.hidden**2
    return frozen + trained, 2 * trained, trained


def kept_by_all(setting):
    """Bytes kept at the end of forward, by all layers and beside them."""
    shape, tokens = setting.shape, setting.tokens
    layer = tokens * kept_for_backward(setting)
    layers = shape.layers * (setting.stream if setting.checkpointing else layer)
    last_norm = (8 if setting.full else 4) * tokens * shape.hidden
    casts = 0  # autocast's copies: of the head, and of adapters' weights
    if setting.method == "QLoRA":
        casts += 2 * shape.head
    if setting.autocast and not setting.checkpointing:
        casts += held_all_along(setting)[2] // 2
    return layers + last_norm + casts


def made_of_logits(setting):
    """Bytes while the loss's gradient is made: (activations, temporary)."""
    shape, tokens = setting.shape, setting.tokens
    logits = setting.logits
    if logits == tokens * shape.vocabulary:
        return 4 * logits, 8 * logits  # log-softmax; gradients of it, of them
    states = setting.stream  # chunks add to gradients of states and head
    head = 2 * shape.head if setting.full else 0
    chunk = 4 * logits, 8 * logits + states + head
    between = 0, states + 3 * head  # the sum so far, one more, the new sum
    return max(chunk, between, key=sum)


COPIES = {"SGD": 4, "AdamW, 16-bit": 0, "AdaLomo": 16}  # others 8


def made_by_update(setting, numbers):
    """Bytes of the float32 copies in which so many numbers are updated."""
    return COPIES.get(setting.method, 8) * numbers


def largest_weight(setting):
    """How many numbers the largest trained weight has."""
    shape = setting.shape
    if setting.full:
        return max(shape.head, shape.hidden * shape.inner)
    if setting.method == "P-tuning":
        return 2 * shape.hidden**2  # of its LSTM
    return setting.rank * max(shape.hidden, shape.inner)


def moments(setting):
    """What may be the peak of a step, beside parameters and states.

    Returns:
        {moment: bytes of (gradients, activations, temporary)}.
    """
    kept, logits = kept_by_all(setting), setting.logits
    gradients = held_all_along(setting)[2]
    casts = gradients // 2 if setting.autocast and setting.checkpointing else 0
    activations, temporary = made_of_logits(setting)
    update = made_by_update(setting, largest_weight(setting))
    at_update = kept if setting.fused else 0  # begins with the head
    if setting.full and setting.shape.tied:  # or waits for the embedding:
        update = max(update, 4 * setting.shape.head)  # two parts, and their sum
        at_update = 0
    return {  # logits in 16 bits, in 32, and their log-softmax
        "end of forward": (0, kept + casts + 10 * logits, 0),
        "start of backward": (0, kept + activations, temporary),
        **inside_blocks(setting),
        "update": (gradients, at_update, update),
    }


def inside_blocks(setting):
    """Two more moments: the last block's MLP in backward, and the first's.

    With checkpointing there are all layers' inputs, or the first's, and one
    layer is made again. Without, all layers are there, or the first.
    """
    layer = setting.tokens * kept_for_backward(setting)
    stream, last, first = setting.stream, setting.shape.layers * layer, layer
    if setting.checkpointing:
        last, first = setting.shape.layers * stream + layer, stream + layer
    made, gradients = made_by_layer(setting), gradients_there(setting)
    return {
        "last block": (gradients[0], last, made),
        "first block": (gradients[1], first, made),
    }


def made_by_layer(setting):
    """Bytes that come and go in backward through a layer's MLP."""
    shape, tokens = setting.shape, setting.tokens
    hidden, inner = tokens * shape.hidden, tokens * shape.inner
    three = 3 * 2 * inner  # gradients of SiLU, up and their product
    if setting.full or setting.adapters == "bfloat16":  # down's input is gone
        update = made_by_update(setting, shape.hidden * shape.inner)
        return max(three - 2 * inner, setting.fused * update) + 2 * hidden
    held = 4 * hidden  # the layer is made again: its MLP's input, twice
    if setting.method == "P-tuning":
        return three + held + 2 * hidden
    gradients = 8 * hidden  # of the layer's output, in 16 bits, in 32, in 16
    if setting.method == "LoRA":  # up, its adapter, their sum; not yet down
        return (2 + 4 + 4) * inner - (2 + 4) * inner + held + gradients
    unpacked = 6 * shape.hidden * shape.inner  # down's weight, from four bits
    again = (4 + 2 - 2) * inner + unpacked + held + 6 * hidden
    return max(again, 2 * three - 2 * inner + 4 * hidden)


def gradients_there(setting):
    """Bytes of gradients while the last block is in backward, and the first."""
    shape, gradients = setting.shape, held_all_along(setting)[2]
    if setting.method == "P-tuning":
        return 0, 0  # the encoder's come after the model's first block
    if not setting.full:
        return 0, gradients * (shape.layers - 1) // shape.layers
    if setting.fused:  # a tied head's waits for the embedding's
        return (2 * shape.head,) * 2 if shape.tied else (0, 0)
    last = 2 * shape.head + 2 * shape.hidden * shape.inner  # and down's
    return last, last + 2 * (shape.layers - 1) * shape.weights


def plan(setting):
    """Predict a step's peak: {category: bytes} where their sum is largest.

    Live bytes, with one weight updated after the other: a process takes more.
    """
    parameters, states, _ = held_all_along(setting)
    peak = max(moments(setting).values(), key=sum)
    return dict(zip(CATEGORIES, (parameters, states, *peak), strict=True))


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
