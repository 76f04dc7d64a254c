"""Assignments: what students get, what lecturers get, and that the solutions earn everything."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "lib" / "tools"))

import course  # noqa: E402
import grade  # noqa: E402
import publish  # noqa: E402
import sandbox  # noqa: E402
from kit import Kit, load_module  # noqa: E402

MASTERS = course.masters()
NAMES = [folder.name for folder in MASTERS]
ADDRESS = ("https://github.com/ada/tuning", "v2.0.0")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("course")
    for folder in MASTERS:
        course.assign(folder, 11, out / folder.name, ADDRESS)
    return out


def definitions(source):
    """name -> syntax tree, without docstrings."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
                    inner.body = inner.body[1:]
            found[node.name] = ast.dump(node)
    return found


def cells(book, kind="code"):
    return [cell.source for cell in book.cells if cell.cell_type == kind]


def test_there_is_one_assignment_a_part():
    assert NAMES == ["1-prefixes", "2-dora", "3-three-bits", "4-signs"]


@pytest.mark.parametrize("folder", MASTERS, ids=NAMES)
def test_the_reference_is_the_solution(folder):
    master = nbformat.read(folder / "assignment.ipynb", as_version=4)
    shown = {}
    for source in cells(master):
        if not source.startswith(("# @title Set-up", "def test_")):
            shown |= definitions(source)
    for name, tree in definitions((folder / "reference.py").read_text()).items():
        assert shown.get(name) == tree, f"{name} of reference.py is not that of the notebook"


@pytest.mark.parametrize("folder", MASTERS, ids=NAMES)
def test_points_and_questions_agree(folder):
    found = course.questions(folder / "assignment.ipynb")
    harness = load_module(folder / "harness.py")
    assert set(harness.TOLERANCE) == {name for name, about in found.items() if not about["manual"]}
    assert [about["manual"] for about in found.values()].count(True) == 1
    text = "\n".join(cells(nbformat.read(folder / "assignment.ipynb", as_version=4), "markdown"))
    for number, about in enumerate(found.values(), 1):
        assert re.search(rf"## Question {number}\. .*\({about['points']} points", text)
    assert sum(about["points"] for about in found.values()) == 20


@pytest.mark.parametrize("folder", MASTERS, ids=NAMES)
def test_what_a_student_gets(folder, made):
    name = folder.name
    book = nbformat.read(made / name / "student" / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    everything = "\n".join(cells(book) + cells(book, "markdown"))
    assert not re.search(r"SOLUTION|BEGIN|END (?!QUESTION)", re.sub("<!-- .* -->", "", everything))
    assert not cells(book, "raw") and "*What to look for.*" not in everything
    assert cells(book)[0] == publish.setup_cell(ADDRESS)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    assert first.metadata["tags"] == ["hide-input"] and first.metadata["cellView"] == "form"
    assert "grader = otter.Notebook()" in cells(book)[1]
    given = definitions("\n".join(source for source in cells(book)[2:] if "%" not in source))
    solved = definitions((folder / "reference.py").read_text())
    assert not {function for function in solved if given.get(function) == solved[function]}
    graded = [
        question for question, about in course.questions(folder / "assignment.ipynb").items() if not about["manual"]
    ]
    assert sorted(path.stem for path in (made / name / "student" / "tests").iterdir()) == graded
    for path in (made / name / "student").rglob("*"):
        assert path.is_dir() or "hidden=True" not in path.read_text()


def test_a_copy_without_an_address_says_what_its_assignments_lack(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(course, "masters", lambda: MASTERS[1:2])
    monkeypatch.setattr(course, "published", lambda: None)
    course.main(["--seed", "11", "--out", str(tmp_path)])
    assert "make publish REPO=owner/name TAG=" in capsys.readouterr().out
    book = nbformat.read(tmp_path / "2-dora" / "student" / "2-dora.ipynb", as_version=4)
    assert cells(book)[0] == publish.UNPUBLISHED_CELL
    assert not (tmp_path / "2-dora" / "lecturer" / "gradescope.zip").exists()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_lecturer_gets(name, made):
    kit = Kit(made / name / "lecturer")
    assert kit.seed == 11 and all(len(cases) >= 2 for cases in kit.cases.values())
    with zipfile.ZipFile(made / name / "lecturer" / "gradescope.zip") as archive:
        files = archive.namelist()
        environment = archive.read("environment.yml").decode()
        assert "tuning-language-models @ git+https://github.com/ada/tuning@v2.0.0" in environment
        assert "smollm2" not in environment
        assert {"files/kit.json", "files/harness.py", "files/reference.py", "files/kit.py", "environment.yml"} <= set(
            files
        )
        for question, about in kit.questions.items():
            if not about["manual"]:
                test, cases = archive.read(f"tests/{question}.py").decode(), len(kit.cases[question])
                assert test.count(f"@test_case(points={about['points'] / cases}, hidden=True)") == cases
                assert test.count("points=0, hidden=False") == test.count("@test_case") - cases > 0


@pytest.mark.parametrize("name", NAMES)
def test_solutions_earn_everything_and_untouched_notebooks_nothing(name, made):
    kit, limits = Kit(made / name / "lecturer"), sandbox.Limits(seconds=60)
    solved = grade.grade(kit, made / name / "lecturer" / f"{name}-solution.ipynb", limits)
    untouched = grade.grade(kit, made / name / "student" / f"{name}.ipynb", limits)
    for question, about in kit.questions.items():
        if not about["manual"]:
            assert solved[question]["points"] == about["points"], solved[question]
            assert untouched[question]["points"] == 0, untouched[question]


WRONG = [  # (assignment, question, what stands in the solution, what a student might write)
    ("1-prefixes", "q2", "(mask.cumsum(dim=1) - 1)[:, length:]", "None"),
    ("1-prefixes", "q3", ".logsumexp(dim=1) - torch.tensor(len(words)).log()", ".exp().mean(dim=1).log()"),
    ("1-prefixes", "q4", "log_probs = (log_probs - share)", "log_probs[:] = (log_probs - share)"),
    ("1-prefixes", "q5", "loss.backward(inputs=prefix)", "loss.backward()"),
    ("1-prefixes", "q5", "part.clone().requires_grad_()", "part.requires_grad_()"),
    ("2-dora", "q2", "base.requires_grad_(False)", "base"),
    ("2-dora", "q2", ".norm(dim=1).detach()", ".norm(dim=1)"),
    ("2-dora", "q3", "return plain", "return plain.requires_grad_(False)"),
    ("2-dora", "q4", "(upper @ lower.T, full_matrices=False)", "(upper @ lower.T)"),
    ("3-three-bits", "q4", "scales.half().float()", "scales"),
    ("3-three-bits", "q5", "in_blocks(weight, block_size), n", "weight.flatten().view(-1, block_size), n"),
    (
        "4-signs",
        "q1",
        "momentum = beta * momentum + (1 - beta) * grad",
        "momentum.mul_(beta).add_(grad, alpha=1 - beta)",
    ),
    ("4-signs", "q2", "weight.grad, None", "weight.grad.clone(), torch.zeros_like(weight)"),
    ("4-signs", "q3", 'raise RuntimeError("call optimizer.backward(loss), not loss.backward()")', "return"),
]


@pytest.mark.parametrize(("name", "question", "right", "wrong"), WRONG)
def test_likely_mistakes_cost_points(name, question, right, wrong, made):
    kit = Kit(made / name / "lecturer")
    source = (made / name / "lecturer" / "reference.py").read_text()
    assert right in source

    def mistakes(source):
        functions, found = {}, []
        exec(source, functions)
        for number in range(len(kit.cases[question])):
            try:
                found.append(kit.wrong(question, number, kit.answer(question, number, functions)))
            except Exception as error:
                found.append(str(error))
        return [mistake for mistake in found if mistake]

    assert not mistakes(source) and mistakes(source.replace(right, wrong))


def run_in(folder, path):
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return book


@pytest.mark.parametrize("name", NAMES)
def test_the_public_checks_pass_for_the_solution(name, made, tmp_path):
    """As a student has them: otter's checks, in a folder with the notebook and its tests."""
    (tmp_path / "tests").mkdir()
    for path in (made / name / "student" / "tests").iterdir():
        (tmp_path / "tests" / path.name).write_bytes(path.read_bytes())
    solution = made / name / "lecturer" / f"{name}-solution.ipynb"
    (tmp_path / f"{name}.ipynb").write_bytes(solution.read_bytes())
    book = run_in(tmp_path, tmp_path / f"{name}.ipynb")
    said = [
        "".join(output.get("data", {}).get("text/plain", "") for output in cell.outputs)
        for cell in book.cells
        if cell.cell_type == "code" and cell.source.startswith("grader.check(")
    ]
    assert len(said) == len(list((tmp_path / "tests").iterdir()))
    assert all("passed" in text and "failed" not in text for text in said), said


def test_gradescope_gives_the_solution_everything_and_an_untouched_notebook_nothing(made, tmp_path):
    """By otter's own grader, with the archive that is uploaded; the public checks have no points there."""
    name = NAMES[1]
    lecturer, student = made / name / "lecturer", made / name / "student"
    points = [about["points"] for about in Kit(lecturer).questions.values() if not about["manual"]]
    for notebook, earned in ((lecturer / f"{name}-solution.ipynb", sum(points)), (student / f"{name}.ipynb", 0)):
        out = tmp_path / notebook.stem
        out.mkdir()
        command = [sys.executable, "-m", "otter", "run", "-a", lecturer / "gradescope.zip", "-o", out, "--no-logo"]
        done = subprocess.run([*command, notebook], cwd=out, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        tests = json.loads((out / "results.json").read_text())["tests"]
        scores = [(test["score"], test["max_score"]) for test in tests if test.get("max_score")]
        assert (sum(score for score, _ in scores), sum(most for _, most in scores)) == (earned, sum(points))


def test_another_seed_makes_other_cases(made, tmp_path):
    course.assign(MASTERS[1], 12, tmp_path / "other", ADDRESS)
    one, other = (json.loads((p / "lecturer" / "kit.json").read_text()) for p in (made / NAMES[1], tmp_path / "other"))
    assert one["seed"] != other["seed"]
    assert (made / NAMES[1] / "student" / "tests" / "q1.py").read_text() == (
        tmp_path / "other" / "student" / "tests" / "q1.py"
    ).read_text()
