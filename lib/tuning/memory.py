"""Where the memory goes: bytes by category, counted from the shapes of a model's layers."""

__all__ = ["qlora_sheet"]

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
