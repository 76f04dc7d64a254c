"""Runs in the fence: a submission's code, then the calls of its functions that the harness makes.

Reads the question from standard input and writes an answer for each case to the descriptor $ANSWER as soon as it has it
(both framed by `pack`). Nothing that happens here is believed; the grader compares what comes out.
"""

import json
import os
import struct
import sys
import traceback
import types

import torch
from safetensors.torch import load, save

TOO_LONG = 2000


def pack(description, tensors):
    """A JSON description and tensors as bytes, each part behind its length; what is no tensor is left out."""
    found = {
        name: t.detach().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
        if isinstance(t, torch.Tensor)
    }
    parts = json.dumps(description).encode(), save(found)
    return b"".join(struct.pack("<Q", len(part)) + part for part in parts)


def unpack(data):
    """What `pack` was given, and how many bytes of `data` that took.

    Raises:
        ValueError: it is not what `pack` makes, or not all of it.
    """
    place, parts = 0, []
    for _ in range(2):
        if len(data) < place + 8:
            raise ValueError("cut off")
        (length,) = struct.unpack_from("<Q", data, place)
        parts.append(bytes(data[place + 8 : place + 8 + length]))
        place += 8 + length
        if len(data) < place:
            raise ValueError("cut off")
    try:
        return json.loads(parts[0]), load(parts[1]), place
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(str(error)) from None


class Quiet:
    """Stands in for otter's checks, which have no say here."""

    def __getattr__(self, name):
        return lambda *arguments, **options: None


def execute(cells):
    """Run the cells as a notebook would; the names they leave, and for each that failed its number and the error."""
    from IPython.core.interactiveshell import InteractiveShell

    shell, errors = InteractiveShell.instance(), []
    shell.user_ns["grader"] = Quiet()
    for number, source in cells:
        result = shell.run_cell(source)
        if not result.success:
            error = result.error_in_exec or result.error_before_exec
            errors.append(f"cell {number}: {type(error).__name__}: {error}"[:TOO_LONG])
    return shell.user_ns, errors


def main():
    os.environ.setdefault("MPLBACKEND", "Agg")
    request, tensors, _ = unpack(sys.stdin.buffer.read())
    names, errors = execute(request["cells"])
    harness = types.ModuleType("harness")
    exec(compile(request["harness"], "harness.py", "exec"), vars(harness))
    with open(int(os.environ["ANSWER"]), "wb", buffering=0) as answer:
        answer.write(pack({"errors": errors}, {}))
        for number, settings in enumerate(request["cases"]):
            inputs = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{number}/")}
            try:
                found = harness.call(request["question"], names, inputs, settings)
                packed = pack({"case": number, "problem": None}, found)
            except Exception:
                packed = pack({"case": number, "problem": traceback.format_exc()[-TOO_LONG:]}, {})
            answer.write(packed)


if __name__ == "__main__":
    main()
