"""A lecturer's kit: cases drawn from its seed, what the reference answers, and the comparison with other answers.

A kit is a folder with `kit.json` (assignment, seed, questions), `harness.py` (what is called, and with what) and
`reference.py` (the functions that the assignment asks for).
"""

import copy
import functools
import hashlib
import importlib.util
import json
from pathlib import Path

import torch

FILES = ("kit.json", "harness.py", "reference.py")


class Draw:
    """What a harness draws its cases with."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def whole(self, low, high):
        """A whole number from `low` to `high` - 1."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def numbers(self, *shape):
        """A tensor of normal random numbers."""
        return torch.randn(shape, generator=self.generator)


class Kit:
    """A kit's questions; and for each that is not graded by hand its `cases` and what is `expected` for them."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if missing := [name for name in FILES if not (self.folder / name).is_file()]:
            raise FileNotFoundError(
                f"{folder} is no kit, it has no {missing[0]}; `make assignments SEED=…` writes kits"
            )
        description = json.loads((self.folder / "kit.json").read_text())
        self.assignment, self.seed, self.questions = (description[key] for key in ("assignment", "seed", "questions"))
        self.harness, reference = (load_module(self.folder / name) for name in FILES[1:])
        functions = vars(reference)
        graded = [question for question, about in self.questions.items() if not about["manual"]]
        self.cases = {question: self.draw(question) for question in graded}
        self.expected = {
            question: [self.answer(question, number, functions) for number in range(len(cases))]
            for question, cases in self.cases.items()
        }
        content = b"".join((self.folder / name).read_bytes() for name in FILES)
        self.mark = hashlib.sha256(content).hexdigest()  # of all that grades depend on

    def draw(self, question):
        """[(tensors, settings)], the same for all students."""
        digest = hashlib.sha256(f"{self.seed} {question}".encode()).digest()
        return self.harness.cases(question, Draw(int.from_bytes(digest[:6], "big")))

    def answer(self, question, number, functions):
        """What these functions give for a case, of which they get copies."""
        tensors, settings = self.cases[question][number]
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return self.harness.call(question, functions, copies, copy.deepcopy(settings))

    def wrong(self, question, number, found):
        """What is wrong with the tensors that came out for a case, or None."""
        tolerance = self.harness.TOLERANCE[question]
        for name, right in self.expected[question][number].items():
            if not isinstance(value := found.get(name), torch.Tensor):
                return f"nothing came out for {name}"
            if value.shape != right.shape:
                return f"{name} has the shape {tuple(value.shape)}, expected {tuple(right.shape)}"
            if not torch.allclose(value.double(), right.double(), rtol=tolerance, atol=tolerance):
                worst = (value.double() - right.double()).abs().max().item()
                return f"{name} is off by {worst:.2g} at the most, allowed is about {tolerance:g}"
        return None


def load_module(path):
    spec = importlib.util.spec_from_file_location(f"kit_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loaded = functools.cache(Kit)  # not all cases answered anew for each of them


def further(question, number, names, folder="."):
    """Check functions on a case in this very process, as on Gradescope; an AssertionError says what is wrong."""
    kit = loaded(folder)
    wrong = kit.wrong(question, number, kit.answer(question, number, names))
    assert not wrong, f"case {number + 1}, {kit.cases[question][number][1]}: {wrong}"
