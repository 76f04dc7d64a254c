"""Files that are whole or not there, and a trace that tells the model that a file belongs to."""

import hashlib
import json
import math
import os
from pathlib import Path

import torch

__all__ = ["replace", "same_trace", "sha256", "trace", "write_json"]


def replace(path, write):
    """Have `write(temporary)` write a file and rename it to `path`, so that a killed run leaves no half file.

    Folders on the way are made. If `write` fails, what stood at `path` is still there and nothing else is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as indented JSON, as a whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256(path):
    """The checksum of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trace(model):
    """What tells a model from others: the shape of its input embeddings and the lengths of sixteen of their rows.

    They are nearly the same in every dtype, and stay whole where linear layers are put in four bits. A copy that was
    fine-tuned hardly differs. A module without input embeddings leaves the trace of its first matrix, adapters aside.

    Returns:
        A list of numbers: the rows, the columns, and the lengths; an empty one if there is no matrix.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    named = {"": embeddings.weight} if embeddings is not None else dict(model.named_parameters())
    frozen = [weight.detach() for name, weight in named.items() if ".adapters." not in name]
    weight = next((weight for weight in frozen if weight.dim() == 2 and weight.is_floating_point()), None)
    if weight is None:
        return []
    if hasattr(weight, "full_tensor"):  # where FSDP has cut it into pieces
        weight = weight.full_tensor()
    some = torch.linspace(0, len(weight) - 1, 16).long().to(weight.device)
    lengths = weight[some].float().norm(dim=1).tolist()
    return [*weight.shape, *(float(f"{length:.3g}") for length in lengths)]


def same_trace(one, other):
    """Whether two traces are of one model, in whatever dtype."""
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=0.02) for a, b in zip(one, other, strict=True))
