"""Files that are whole or not there, and a trace that tells the model that a file belongs to."""

import hashlib
import json
import math
import os
from pathlib import Path

from .wrappers import unwrapped, whole

__all__ = ["replace", "same_trace", "sha256", "trace", "write_json", "write_text"]


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


def write_text(path, text):
    """Write a text, as a whole or not at all."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    """Write a value as indented JSON, as a whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256(path):
    """The checksum of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trace(model):
    """What tells a model from others: how wide its input embeddings are, and the lengths of rows 0, 1, 2, 4, 8, ...

    They are nearly the same in every dtype, stay whole where linear layers are put in four bits, and stay the first
    ones where the vocabulary is made larger or smaller. A copy that was fine-tuned hardly differs.

    Returns:
        A list of numbers: the columns, and the lengths; an empty one for a model without a table of input embeddings.
    """
    weight = _input_table(model)
    if weight is None:
        return []
    rows = [0, *(2**power for power in range(len(weight).bit_length()) if 2**power < len(weight))]
    lengths = weight[rows].float().norm(dim=1).tolist()
    return [weight.shape[1], *(float(f"{length:.3g}") for length in lengths)]


def same_trace(one, other):
    """Whether two traces are of one model, in whatever dtype and with however many tokens; none is that of none."""
    both = list(zip(one, other, strict=False))  # the rows that both have
    return bool(one) == bool(other) and one[:1] == other[:1] and all(math.isclose(a, b, rel_tol=0.02) for a, b in both)


def _input_table(model):
    """A model's input embeddings, (tokens, hidden); None if it has none, as one that sees images or hears."""
    try:
        embeddings = unwrapped(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one of several inputs
        return None
    weight = None if embeddings is None else getattr(unwrapped(embeddings), "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    return whole(weight.detach())
