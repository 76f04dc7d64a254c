"""`make grade`: grade a folder of notebooks, each question of each in a fence of its own.

    python lib/tools/grade.py --kit KIT --submissions FOLDER --out FOLDER

A submission's functions are called in the fence with cases drawn from the kit's seed; what they return is compared
here with the reference's. `grades.csv` has a row a student and a column a question, and `reports/` a page for each.
What is graded is kept: killed and started again, this grades the rest.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parent))
import runner
import sandbox
from kit import Kit
from tuning.files import replace

TOOLS = Path(__file__).parent
LIBRARY = TOOLS.parent / "tuning"
SKIP = "otter_ignore"  # the tag, otter's too, of cells that only show or train
LARGEST = 20 * sandbox.MEGABYTE  # of a notebook


def code_cells(path):
    """[(number, source)] of the cells to run: all code but otter's own cells and those with the tag to skip.

    What stands behind the last check is not run. That is for the question that a person reads, and may train.

    Raises:
        ValueError: it cannot be read as a notebook; the message says why.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError("not a file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST // sandbox.MEGABYTE} MB; clear its outputs")
    try:
        book = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        cells = [(number, cell) for number, cell in enumerate(book.cells, 1) if cell.cell_type == "code"]
        last = max((number for number, cell in cells if "grader.check(" in cell.source), default=len(book.cells))
        return [
            (number, str(cell.source))
            for number, cell in cells
            if SKIP not in cell.metadata.get("tags", []) and "otter.Notebook(" not in cell.source and number <= last
        ]
    except Exception as error:
        raise ValueError(f"not a notebook: {str(error)[:200]}") from None


def read_answers(data, count):
    """{case: (problem or None, tensors)} and the notebook's errors, of whatever bytes came out of the fence."""
    answers, errors, rest = {}, [], memoryview(data)
    for _ in range(count + 1):
        try:
            description, found, used = runner.unpack(rest)
        except ValueError:
            break
        rest = rest[used:]
        if not isinstance(description, dict):
            break
        if isinstance(said := description.get("errors"), list):
            errors = [str(error)[:500] for error in said[:20]]
        if isinstance(case := description.get("case"), int):
            problem = description.get("problem")
            answers.setdefault(case, (problem and str(problem)[: runner.TOO_LONG], found))
    return answers, errors


def ask(kit, request, tensors, limits):
    """Run a notebook and the calls for its question in the fence."""
    request = request | {"harness": (kit.folder / "harness.py").read_text()}
    environment = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, TOOLS / "runner.py"]
    return sandbox.run(command, runner.pack(request, tensors), limits, (runner.__file__, LIBRARY), environment)


def check_fence(kit, limits):
    """See that an empty notebook can be run, so that nobody gets zero points for a fault of this machine.

    Raises:
        RuntimeError: it cannot; with what it printed.
    """
    finished = ask(kit, {"cells": [], "question": "", "cases": []}, {}, limits)
    if not finished.answer:
        raise RuntimeError(f"an empty notebook cannot be run here ({finished.stopped}): {finished.printed}")


def grade_question(kit, question, cells, limits):
    """Points for one question, and what to say about it."""
    of, cases = kit.questions[question]["points"], kit.cases[question]
    tensors = {f"{number}/{name}": t for number, (inputs, _) in enumerate(cases) for name, t in inputs.items()}
    request = {"cells": cells, "question": question, "cases": [settings for _, settings in cases]}
    finished = ask(kit, request, tensors, limits)
    answers, errors = read_answers(finished.answer, len(cases))
    right, said = 0, []
    for number, (_, settings) in enumerate(cases):
        problem, found = answers.get(number, ("no answer", {}))
        if wrong := problem or kit.wrong(question, number, found):
            said.append(f"case {number + 1} of {len(cases)} ({json.dumps(settings)}): {wrong}")
        else:
            right += 1
    if finished.stopped:
        said.insert(0, f"stopped: {finished.stopped}")
    elif not answers:
        said.insert(0, f"the program ended with status {finished.status}; its last words: {finished.printed[-600:]!r}")
    return {"points": round(of * right / len(cases), 2), "of": of, "said": said, "errors": errors}


def grade(kit, path, limits):
    """The result of one submission: points and remarks for each question."""
    try:
        cells, problem = code_cells(path), None
    except ValueError as error:
        cells, problem = None, str(error)
    found = {}
    for question, about in kit.questions.items():
        if about["manual"]:
            found[question] = {"points": None, "of": about["points"], "said": ["graded by hand"], "errors": []}
        elif cells is None:
            found[question] = {"points": 0, "of": about["points"], "said": [problem], "errors": []}
        else:
            found[question] = grade_question(kit, question, cells, limits)
    return found


def total(result):
    return round(sum(about["points"] or 0 for about in result.values()), 2)


def report(student, kit, result):
    """A page in Markdown for one student."""
    of = sum(about["points"] for about in kit.questions.values() if not about["manual"])
    lines = [
        f"# {student}: {kit.assignment}",
        "",
        f"{total(result):g} of {of:g} points, without what is graded by hand.",
        "",
    ]
    for question, about in result.items():
        points = "by hand" if about["points"] is None else f"{about['points']:g}"
        lines += [f"## {question}: {points} of {about['of']:g}", ""]
        lines += [f"- {line}" for line in about["said"]] or ["- all cases right"]
        lines += [f"- in the notebook, {error}" for error in about["errors"]] if about["said"] else []
        lines.append("")
    return "\n".join(lines)


def write(path, text):
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def table(kit, results):
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(["student", *kit.questions, "total"])
    for student, result in results.items():
        points = ["" if about["points"] is None else f"{about['points']:g}" for about in result.values()]
        # a name that a spreadsheet would take for a formula gets an apostrophe
        rows.writerow([("'" if student[:1] in "=+-@" else "") + student, *points, f"{total(result):g}"])
    return stream.getvalue()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, required=True, help="the lecturer's folder of one assignment")
    parser.add_argument("--submissions", type=Path, required=True, help="a folder of notebooks, one a student")
    parser.add_argument("--out", type=Path, required=True, help="where grades.csv and reports/ go")
    parser.add_argument("--seconds", type=float, default=120, help="that one question may take")
    parser.add_argument("--megabytes", type=int, default=4096, help="of memory that it may take")
    options = parser.parse_args(arguments)
    kit = Kit(options.kit)
    found = sorted(options.submissions.rglob("*.ipynb"))
    paths = [path for path in found if ".ipynb_checkpoints" not in path.parts]
    if not paths:
        parser.error(f"{options.submissions} has no notebooks")
    limits = sandbox.Limits(seconds=options.seconds, memory=options.megabytes * sandbox.MEGABYTE)
    for gap in sandbox.unprotected():
        print(f"not protected from a submission here: {gap}", file=sys.stderr)
    check_fence(kit, limits)
    results, begun = {}, time.monotonic()
    for number, path in enumerate(paths, 1):
        student = path.relative_to(options.submissions).with_suffix("").as_posix()
        kept = options.out / ".graded" / (hashlib.sha256(student.encode()).hexdigest()[:16] + ".json")
        content = b"" if path.is_symlink() or not path.is_file() else path.read_bytes()
        mark = hashlib.sha256(content + f"{kit.mark} {limits}".encode()).hexdigest()
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        if known.get("mark") != mark:
            known = {"mark": mark, "result": grade(kit, path, limits)}
            write(kept, json.dumps(known))
        results[student] = known["result"]
        write(options.out / "reports" / f"{student}.md", report(student, kit, known["result"]))
        spent = time.monotonic() - begun
        print(f"[{number}/{len(paths)}] {student}: {total(known['result']):g} ({spent:.0f} s)", flush=True)
    write(options.out / "grades.csv", table(kit, results))
    print(f"wrote {options.out / 'grades.csv'}")


if __name__ == "__main__":
    main()
