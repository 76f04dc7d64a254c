"""`make assignments`: student notebooks and the lecturer's kits, from the masters under assignments/.

    python lib/tools/course.py --seed 7 --out course

For each assignment `out/NAME/student/` has the notebook and its public checks, `out/NAME/lecturer/` the solution, what
`make grade` needs, and, in a published copy, `gradescope.zip`. The further cases are drawn from the seed; keep it to
yourself.
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from kit import FILES, Kit
from notebooks import ROOT, first_code_cell
from publish import published, set_up

TOOLS = Path(__file__).resolve().parent
MASTERS = ROOT / "assignments"
OTTER = "otter-grader==7.0.0"
OTTER_CELL = """\
# The checks of this notebook (otter-grader).
if find_spec("otter") is None:
    %pip install -q {otter}
from pathlib import Path

import otter

if not Path("tests").is_dir():
    raise FileNotFoundError("put the folder tests/, which came with this notebook, beside it (in Colab: upload it)")
grader = otter.Notebook()"""
FURTHER = """

@test_case(points={points}, hidden=True)
def test_further_case_{number}(env):
    from kit import further

    further("{question}", {number}, env)
"""
# Not the models: pip would bring what they depend on, too. A notebook's setup cell installs them without, as in Colab.
REQUIREMENTS = "tuning-language-models @ git+{repository}@{tag}\n"


def masters(folder=MASTERS):
    """The assignments' folders, in order."""
    return sorted(path.parent for path in folder.glob("*/assignment.ipynb"))


def questions(master):
    """{name: {"points": …, "manual": …}} of a master notebook."""
    found = {}
    for cell in nbformat.read(master, as_version=4).cells:
        if cell.cell_type == "raw" and cell.source.startswith("# BEGIN QUESTION"):
            about = yaml.safe_load(cell.source)
            found[about["name"]] = {"points": about["points"], "manual": about.get("manual", False)}
    return found


def student_notebook(book, address):
    """Put the setup cell and otter's own in front of what otter made of the master."""
    set_up(book, address)
    cell = nbformat.v4.new_code_cell(OTTER_CELL.format(otter=OTTER))
    book.cells.insert(book.cells.index(first_code_cell(book)) + 1, cell)
    for place, cell in enumerate(book.cells):
        cell.id = f"cell-{place}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return book


def assign(folder, seed, out, address):
    """Write the student's and the lecturer's part of one assignment to `out`, which is replaced as a whole.

    Args:
        address: what to install from, as `publish.published` returns it; None: the notebooks say so, and there is no
            `gradescope.zip`, since Gradescope's machine would find no library.
    """
    from otter.assign import main as otter_assign

    name, master = folder.name, folder / "assignment.ipynb"
    with tempfile.TemporaryDirectory() as made:
        with contextlib.redirect_stderr(io.StringIO()):
            otter_assign(str(master), made, no_pdfs=True, no_run_tests=True)
        new = Path(made, "new")
        student, lecturer = new / "student", new / "lecturer"
        student.mkdir(parents=True)
        lecturer.mkdir()
        book = nbformat.read(Path(made, "student", "assignment.ipynb"), as_version=4)
        nbformat.write(student_notebook(book, address), student / f"{name}.ipynb")
        shutil.copytree(Path(made, "student", "tests"), student / "tests")
        solution = nbformat.read(Path(made, "autograder", "assignment.ipynb"), as_version=4)
        nbformat.write(student_notebook(solution, address), lecturer / f"{name}-solution.ipynb")
        for file in FILES[1:]:
            shutil.copy(folder / file, lecturer / file)
        kit = {"assignment": name, "seed": seed, "questions": questions(master)}
        (lecturer / "kit.json").write_text(json.dumps(kit, indent=1) + "\n")
        if address is not None:
            gradescope(lecturer, student / "tests", lecturer / "gradescope.zip", address)
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(new, out)


def gradescope(lecturer, tests, out, address):
    """The autograder for Gradescope, by `otter generate`: public checks without points, further cases hidden."""
    from otter.generate import main as otter_generate

    kit = Kit(lecturer)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("tests").mkdir()
        for file in sorted(tests.glob("*.py")):
            points, cases = kit.questions[file.stem]["points"], len(kit.cases[file.stem])
            public = re.sub(r"points=\w+", "points=0", file.read_text()).replace(f"points = {points}", "")
            hidden = [FURTHER.format(question=file.stem, number=k, points=points / cases) for k in range(cases)]
            Path("tests", file.name).write_text(public + "".join(hidden))
        for file in FILES:
            shutil.copy(lecturer / file, file)
        shutil.copy(TOOLS / "kit.py", "kit.py")
        repository, tag = address
        Path("requirements.txt").write_text(REQUIREMENTS.format(repository=repository, tag=tag))
        otter_generate(tests_dir="tests", output_path=str(out), files=[*FILES, "kit.py"], no_environment=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True, help="a number that only you know")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    address = published()
    for folder in masters():
        assign(folder, options.seed, options.out.resolve() / folder.name, address)
        print(f"wrote {options.out / folder.name}")
    if address is None:
        print(
            "This copy names no repository: its notebooks run where the book is installed, but not in Colab, and there "
            "is no gradescope.zip. For both, first: make publish REPO=owner/name TAG=v1.0.0"
        )


if __name__ == "__main__":
    main()
