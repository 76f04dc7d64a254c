"""The rules hold for every notebook of the book, and each rule catches its violation."""

import base64
import copy
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import PRINTS_WIDER, ROOT, read, unshown, violations

sys.path.insert(0, str(ROOT / "lib" / "tools"))
import notebooks
import publish

PATHS = notebooks.notebooks()
SETUP = publish.setup_cell(publish.published())
SOURCE = '''
__all__ = ["twice"]

def twice(x):
    """Double it."""
    return 2 * x
'''
PIXEL = base64.b64encode(b"png").decode()


def library(module):
    return SOURCE if module == "prompts" else None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_notebook_keeps_the_rules(path):
    chapter = path.parent.name[0].isdigit()
    assert violations(read(path), SETUP, chapter=chapter, wider=not chapter or path.stem in PRINTS_WIDER) == []


def test_every_core_algorithm_is_shown():
    assert unshown([read(path) for path in PATHS]) == []


def test_there_is_a_chapter():
    assert "2-prompts-are-code.ipynb" in [path.name for path in PATHS]


def test_notebooks_have_normalized_metadata():
    for path in PATHS:
        book = read(path)
        assert notebooks.normalize(copy.deepcopy(book)) == book, f"{path.name}: write it with make run"


def test_pictures_in_the_readme_come_from_the_notebooks():
    for name, data in notebooks.readme_pictures().items():
        assert (ROOT / "book" / "_static" / name).read_bytes() == data


def good():
    """A small notebook that keeps every rule."""
    card = "- **You will build** a\n- **You need** b\n- **Cost** c\n- **Download** d"
    cells = [
        new_markdown_cell(card),
        new_code_cell(SETUP),
        new_code_cell("# tuning/prompts.py\ndef twice(x):\n    return 2 * x"),
        new_code_cell("from tuning.prompts import twice\n\nprint(twice(2))"),
        new_code_cell("time()", metadata={"tags": ["nbval-ignore-output"]}),
        new_code_cell("assert time() > 0"),
        new_code_cell("plt.show()", metadata={"mystnb": {"image": {"alt": "A line that rises from left to right."}}}),
    ]
    cells[3].outputs = [new_output("stream", text="4\n")]
    cells[6].outputs = [new_output("display_data", {"image/png": PIXEL})]
    for count, cell in enumerate(cells[1:], start=1):
        cell.execution_count = count
    return new_notebook(cells=cells)


def faults(book, library=library):
    return "\n".join(violations(book, SETUP, library))


def test_a_good_notebook_passes():
    assert faults(good()) == ""


def strip(book):
    for cell in book.cells[1:]:
        cell.outputs, cell.execution_count = [], None


def strip_outputs_only(book):
    for cell in book.cells[1:]:
        cell.outputs = []


def out_of_order(book):
    book.cells[3].execution_count = 9


def error_output(book):
    book.cells[5].outputs = [new_output("error", ename="ValueError", evalue="", traceback=[])]


def set_source(index, text):
    def change(book):
        book.cells[index].source = text

    return change


def set_output(index, text):
    def change(book):
        book.cells[index].outputs = [new_output("stream", text=text)]

    return change


def progress_bar(book):
    book.cells[5].outputs = [new_output("stream", name="stderr", text="100%|###| 9/9")]


def no_alternative_text(book):
    del book.cells[6].metadata["mystnb"]


def svg(book):
    book.cells[6].outputs = [new_output("display_data", {"image/svg+xml": "<svg/>"})]


def tag_with_a_typo(book):
    book.cells[4].metadata["tags"] = ["nbval-ignore-ouput"]


def ignored_without_assert(book):
    book.cells[5].source = "time()"


def drop_the_card(book):
    book.cells[0].source = "- **You will build** a"


TWICE = "def twice(x):\n    return 2 * x"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (strip, "not executed from top to bottom"),
        (strip_outputs_only, "the notebook was stripped"),
        (out_of_order, "execution counts"),
        (error_output, "an error output: ValueError"),
        (progress_bar, "stderr in its output"),
        (set_source(1, SETUP + " "), "not the setup cell"),
        (set_source(1, SETUP.replace("==", ">=", 1)), "not the setup cell"),
        (drop_the_card, "the card lacks **You need**"),
        (set_output(3, "/home/ada/book\n"), "a path of a machine in its output"),
        (set_source(5, "assert open('/tmp/x')"), "a path of a machine"),
        (set_source(0, "```{note}\n"), "a directive that Colab shows raw"),
        (no_alternative_text, "without alternative text"),
        (svg, "an SVG figure"),
        (tag_with_a_typo, "unknown tag 'nbval-ignore-ouput'"),
        (ignored_without_assert, "neither it nor the next cell asserts"),
        (set_source(4, "# NBVAL_IGNORE_OUTPUT\ntime()"), "a marker that must be a tag"),
        (set_source(2, "# tuning/prompt.py\n" + TWICE), "the library has no such module"),
        (set_source(2, "#tuning/prompts.py\n" + TWICE), "a marker with a typo"),
        (set_source(2, "# Tuning/prompts.py\n" + TWICE), "a marker with a typo"),
        (set_source(2, "# tuning/prompts.py:\n" + TWICE), "a marker with a typo"),
        (set_source(2, "# tuning.prompts.py\n" + TWICE), "a marker with a typo"),
        (set_source(2, "x = 1\n# tuning/prompts.py is what follows\n" + TWICE), "a marker with a typo"),
        (set_source(2, "# tuning/prompts.py\nx = 1"), "on a cell without a definition"),
        (set_source(2, "# tuning/prompts.py\n" + TWICE.replace("2", "3")), "not that of tuning/prompts.py"),
        (set_source(2, "# tuning/prompts.py\n" + TWICE.replace("twice", "thrice")), "thrice: not in tuning/prompts.py"),
        (set_source(3, "print(twice(2))"), "does not import the library's"),
        (set_source(5, "assert 1\n" * 45), "lines; at most"),
        (
            set_source(5, "def f():\n    from tuning.prompts import encode, _inputs"),
            "private name of tuning.prompts: _in",
        ),
        (set_source(5, "from tuning.experiments.probe import Probe"), "an import from tuning.experiments.probe"),
        (set_source(5, "from tuning.experiments import probe"), "an import from tuning.experiments"),
    ],
)
def test_each_rule_catches_its_violation(change, fault):
    book = good()
    change(book)
    assert fault in faults(book)


def test_docstrings_and_formatting_do_not_count():
    book = good()
    book.cells[2].source = "# tuning/prompts.py\ndef twice(x):\n    'Other words.'\n    return (2 *\n        x)"
    assert faults(book) == ""


def test_a_changed_library_function_is_noticed():
    changed = SOURCE.replace("2 * x", "x + x")
    assert "twice: the shown code is not that of" in faults(good(), lambda module: changed)


def test_a_changed_library_function_is_noticed_in_the_real_chapter():
    from notebook_rules import read_library

    path = next(path for path in PATHS if path.name == "2-prompts-are-code.ipynb")
    changed = read_library("prompts").replace("largest=False", "largest=True")
    assert changed != read_library("prompts")
    found = violations(read(path), SETUP, lambda module: changed if module == "prompts" else read_library(module))
    assert found == ["hotflip: the shown code is not that of tuning/prompts.py"]


def test_an_algorithm_that_no_chapter_shows_is_noticed():
    assert unshown([good()], library) == []
    more = SOURCE.replace('["twice"]', '["twice", "thrice"]')
    missing = unshown([good()], lambda module: more if module == "prompts" else None)
    assert missing == ["tuning/prompts.py: no chapter shows thrice"]


# --- the tools that write notebooks


def test_run_executes_in_place_and_twice_the_same(tmp_path):
    path = tmp_path / "one.ipynb"
    first = "import sys\nprint(1)\nprint(2, file=sys.stderr)"
    book = new_notebook(cells=[new_code_cell(first), new_code_cell("1 + 1")])
    nbformat.write(book, path)
    notebooks.run(path)
    saved = path.read_bytes()
    notebooks.run(path)
    assert path.read_bytes() == saved and b"execution_count" in saved
    assert [cell.execution_count for cell in read(path).cells] == [1, 2]
    assert [output.get("name") for output in read(path).cells[0].outputs] == ["stdout"]


def test_a_failing_run_leaves_the_notebook_as_it_was(tmp_path):
    path = tmp_path / "one.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.run(path)
    assert path.read_bytes() == before
