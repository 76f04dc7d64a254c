"""Grading: solutions get everything, and nothing that a submission does gets it a point that it did not earn."""

import csv
import json
import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "lib" / "tools"))

import grade  # noqa: E402
import runner  # noqa: E402
import sandbox  # noqa: E402
from kit import Kit, further  # noqa: E402

HARNESS = """
import torch

TOLERANCE = {"q1": 1e-6, "q2": 1e-6}


def cases(question, draw):
    return [({"x": draw.numbers(n)}, {"power": power}) for n, power in ((3, 2), (5, 3))]


def call(question, functions, inputs, settings):
    if question == "q1":
        return {"y": functions["raised"](inputs["x"], settings["power"])}
    return {"y": functions["total"](inputs["x"])}
"""
REFERENCE = """
def raised(x, power):
    return x**power


def total(x):
    return x.sum().view(1)
"""
RIGHT = REFERENCE
QUICK = sandbox.Limits(seconds=40, memory=1500 * sandbox.MEGABYTE)
needs_fence = pytest.mark.skipif(
    not sandbox.has_fence() and not os.environ.get("NOTHING_SKIPPED"), reason="bubblewrap is not installed"
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit")
    questions = {"q1": {"points": 3, "manual": False}, "q2": {"points": 2, "manual": False}}
    questions["q3"] = {"points": 4, "manual": True}
    (folder / "kit.json").write_text(json.dumps({"assignment": "trial", "seed": 5, "questions": questions}))
    (folder / "harness.py").write_text(HARNESS)
    (folder / "reference.py").write_text(REFERENCE)
    return Kit(folder)


def submission(folder, *cells, name="submission.ipynb"):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(book, folder / name)
    return folder / name


def graded(kit, path, limits=QUICK):
    before = {process.pid for process in psutil.process_iter()}
    result = grade.grade(kit, path, limits)
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert not left, f"processes are left: {left}"
    return result


def points(result):
    return {question: about["points"] for question, about in result.items()}


def test_a_right_submission_gets_all_points(kit, tmp_path):
    result = graded(kit, submission(tmp_path, "1 / 0", RIGHT, "grader.check('q1')"))
    assert points(result) == {"q1": 3, "q2": 2, "q3": None}
    assert grade.total(result) == 5
    assert "ZeroDivisionError" in result["q1"]["errors"][0]


def test_what_stands_behind_the_last_check_is_not_run(kit, tmp_path):
    cells = RIGHT, "grader.check('q1')", "while True:\n    pass"
    assert points(graded(kit, submission(tmp_path, *cells))) == {"q1": 3, "q2": 2, "q3": None}


def test_wrong_and_missing_functions(kit, tmp_path):
    half = "def raised(x, power):\n    return x**2"  # right for one of two cases
    result = graded(kit, submission(tmp_path, half))
    assert points(result) == {"q1": 1.5, "q2": 0, "q3": None}
    assert "off by" in result["q1"]["said"][0] and "KeyError: 'total'" in result["q2"]["said"][0]


def test_of_two_cells_for_a_question_the_last_counts(kit, tmp_path):
    result = graded(kit, submission(tmp_path, RIGHT, "def raised(x, power):\n    return x"))
    assert points(result) == {"q1": 0, "q2": 2, "q3": None}


HOSTILE = {
    "endless loop": "while True:\n    pass",
    "endless loop in a function": "def raised(x, power):\n    while True:\n        pass",
    "memory bomb": "kept = []\nwhile True:\n    kept.append(bytearray(10**8))",
    "processes without end": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "flood of output": "while True:\n    print('x' * 10000)",
    "flood of answers": "import os\nwhile True:\n    os.write(int(os.environ['ANSWER']), b'x' * 10**6)",
    "exit": "import os\nos._exit(0)",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "a process that stays": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        time.sleep(1000)\n    os._exit(0)",
    "a perfect result, printed": "print('all cases right')\nprint('q1: 3 of 3')",
    "a perfect result, as an answer": "import os, json, struct\ndef frame(d, t=b'\\x02\\0\\0\\0\\0\\0\\0\\0{}'):\n"
    "    d = json.dumps(d).encode()\n    return struct.pack('<Q', len(d)) + d + struct.pack('<Q', len(t)) + t\n"
    "out = int(os.environ['ANSWER'])\nos.write(out, frame({'errors': []}))\n"
    "for k in range(2):\n    os.write(out, frame({'case': k, 'problem': None, 'points': 3}))",
    "answers that are no answers": "import os, struct\n"
    "os.write(int(os.environ['ANSWER']), struct.pack('<Q', 2) + b'[]' + struct.pack('<Q', 2**62))",
    "its own comparison": "import torch\ntorch.allclose = lambda *a, **k: True\n"
    "torch.Tensor.shape = property(lambda t: 0)\nclass grader:\n    check = lambda name: 'all right'\n"
    "def raised(x, power):\n    return x\ndef total(x):\n    return x",
    "a patched library": "import safetensors.torch, sys\nsafetensors.torch.save = lambda tensors: b'{}'\n"
    "main = sys.modules['__main__']\nmain.pack = lambda *a: b'right'\nmain.save = lambda t: b''",
}


@needs_fence
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_submission_gets_nothing(kit, tmp_path, what):
    limits = sandbox.Limits(seconds=12, memory=1000 * sandbox.MEGABYTE, processes=60, answer=20 * sandbox.MEGABYTE)
    start = time.monotonic()
    result = graded(kit, submission(tmp_path, HOSTILE[what]), limits)
    assert points(result) == {"q1": 0, "q2": 0, "q3": None}
    assert time.monotonic() - start < 60
    assert all(about["said"] for about in result.values())


@needs_fence
def test_the_graders_files_are_out_of_sight(kit, tmp_path):
    reference = kit.folder / "reference.py"
    cell = f"exec(open({str(reference)!r}).read())"
    result = graded(kit, submission(tmp_path, cell))
    assert points(result) == {"q1": 0, "q2": 0, "q3": None}
    assert "FileNotFoundError" in result["q1"]["errors"][0]
    search = (
        "import os\nfor folder, _, names in os.walk('/'):\n    if 'reference.py' in names:\n"
        "        exec(open(os.path.join(folder, 'reference.py')).read(), globals())"
    )
    assert points(graded(kit, submission(tmp_path, search))) == {"q1": 0, "q2": 0, "q3": None}


@needs_fence
@pytest.mark.parametrize(
    "attempt",
    [
        "import socket\nsocket.create_connection(('1.1.1.1', 53), 3)",
        f"open({str(ROOT / 'assignments' / '1-prefixes' / 'reference.py')!r})",
        f"import os\nassert os.path.exists({str(ROOT / '.git')!r})",
        "import os, signal\nos.kill(os.getppid(), 0)\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) > 8",
    ],
)
def test_what_is_out_of_reach(kit, tmp_path, attempt):
    assert graded(kit, submission(tmp_path, attempt, RIGHT))["q1"]["errors"]


def test_what_is_no_notebook(kit, tmp_path):
    for name, content in {"a.ipynb": b"{", "b.ipynb": b"\xff\xfe", "c.ipynb": b"[1, 2]", "d.ipynb": b""}.items():
        (tmp_path / name).write_bytes(content)
        result = grade.grade(kit, tmp_path / name, QUICK)
        assert points(result) == {"q1": 0, "q2": 0, "q3": None}
        assert "not a notebook" in result["q1"]["said"][0]
    (tmp_path / "e.ipynb").symlink_to(kit.folder / "reference.py")
    assert "not a file" in grade.grade(kit, tmp_path / "e.ipynb", QUICK)["q1"]["said"][0]


def test_a_batch(kit, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "group").mkdir(parents=True)
    submission(folder, RIGHT, name="anna.ipynb")
    submission(folder / "group", "def total(x):\n    return x.sum().view(1)", name="=ben.ipynb")
    (folder / "cleo.ipynb").write_text("{")
    arguments = ["--kit", str(kit.folder), "--submissions", str(folder), "--out", str(out)]
    grade.main(arguments)
    rows = list(csv.reader((out / "grades.csv").open()))
    assert rows == [
        ["student", "q1", "q2", "q3", "total"],
        ["anna", "3", "2", "", "5"],
        ["cleo", "0", "0", "", "0"],
        ["group/=ben", "0", "2", "", "2"],
    ]
    assert "all cases right" in (out / "reports" / "anna.md").read_text()
    assert "not a notebook" in (out / "reports" / "cleo.md").read_text()
    again = []
    monkeypatch.setattr(grade, "grade", lambda *arguments: again.append(arguments) or {})
    (folder / "cleo.ipynb").write_text("{}")  # handed in anew
    grade.main(arguments)
    assert [path.name for _, path, _ in again] == ["cleo.ipynb"], "what was graded is graded again"
    assert "[3/3]" in capsys.readouterr().out


def test_a_machine_that_cannot_grade_says_so(kit, tmp_path, monkeypatch):
    submission(tmp_path, RIGHT)
    monkeypatch.setattr(grade.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="an empty notebook cannot be run"):
        grade.main(["--kit", str(kit.folder), "--submissions", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "grades.csv").exists()


def test_without_a_fence(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "has_fence", lambda: False)
    monkeypatch.setattr(sandbox, "has_groups", lambda: False)
    said = " ".join(sandbox.unprotected())
    assert "network" in said and "memory" in said
    assert points(graded(kit, submission(tmp_path, RIGHT)))["q1"] == 3
    stays = HOSTILE["a process that stays"]
    assert points(graded(kit, submission(tmp_path, stays, RIGHT)))["q1"] == 3
    loop = graded(kit, submission(tmp_path, "while True:\n    pass"), sandbox.Limits(seconds=5))
    assert "stopped: time" in loop["q1"]["said"][0]


def test_cases_depend_on_the_seed(kit, tmp_path):
    other = tmp_path / "kit"
    shutil.copytree(kit.folder, other)
    about = json.loads((other / "kit.json").read_text())
    (other / "kit.json").write_text(json.dumps(about | {"seed": 6}))
    twin = Kit(other)
    assert not torch.equal(twin.cases["q1"][0][0]["x"], kit.cases["q1"][0][0]["x"])
    assert torch.equal(Kit(kit.folder).cases["q1"][0][0]["x"], kit.cases["q1"][0][0]["x"])
    (other / "reference.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"no reference.py"):
        Kit(other)


def test_further_cases_as_on_gradescope(kit):
    names = {}
    exec(REFERENCE, names)
    further("q1", 0, names, kit.folder)
    with pytest.raises(AssertionError, match="off by"):
        further("q1", 0, names | {"raised": lambda x, power: x}, kit.folder)


def test_a_case_is_not_changed_by_who_answers_it(kit):
    """In this process the reference and the submission would else share tensors, gradients included."""
    before = kit.cases["q1"][0][0]["x"].clone()

    def spoil(x, power):
        return x.zero_()

    kit.answer("q1", 0, {"raised": spoil})
    assert torch.equal(kit.cases["q1"][0][0]["x"], before)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 40, runner.pack({"case": 0}, {})[:-1]])
def test_answers_that_are_cut_off(data):
    assert grade.read_answers(data, 3) == ({}, [])


def test_pack_and_unpack():
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5)}
    description, found, used = runner.unpack(runner.pack({"x": [1]}, tensors) + b"more")
    assert description == {"x": [1]} and used == len(runner.pack({"x": [1]}, tensors))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    whole = torch.arange(4.0)  # what is no tensor is left out; two views of the same numbers are fine
    _, found, _ = runner.unpack(runner.pack({}, {"one": whole, "same": whole, "none": None, "list": [1.0]}))
    assert set(found) == {"one", "same"} and torch.equal(found["same"], whole)
