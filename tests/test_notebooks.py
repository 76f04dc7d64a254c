"""The rules hold for every notebook of the book, and each rule catches its violation."""

import copy
import importlib
import inspect
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import NOT_REMADE, ROOT, exported, parameters, read, read_library, unshown, violations

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

def scale(x, by=2, *, times=1):
    return x * by**times

class Layer:
    def __init__(self, size, rank):
        self.size, self.rank = size, rank

class Adapter(Layer):
    pass
'''


def library(module):
    return SOURCE if module == "prompts" else None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_notebook_keeps_the_rules(path):
    chapter = path.parent.name[0].isdigit()
    assert violations(read(path), SETUP, chapter=chapter, remade=chapter and path.stem not in NOT_REMADE) == []


def test_every_core_algorithm_is_shown():
    assert unshown([read(path) for path in PATHS]) == []


def test_there_is_a_chapter():
    assert "2-prompts-are-code.ipynb" in [path.name for path in PATHS]


def test_notebooks_have_normalized_metadata():
    for path in PATHS:
        book = read(path)
        assert notebooks.normalize(copy.deepcopy(book)) == book, f"{path.name}: write it with make run"


def test_the_map_and_the_readmes_pictures_come_from_the_book():
    found = notebooks.written()
    assert "map.html" in found and len(found) > 1
    for name, text in found.items():
        assert (ROOT / "book" / "_static" / name).read_text(encoding="utf-8") == text, f"{name}: write it with make run"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"book/_static/{name}" in readme for name in found if name != "map.html")


def test_the_map_leads_to_every_chapter_by_its_title():
    shown = notebooks.written()["map.html"]
    for path in PATHS:
        if path.parent.name[0].isdigit():
            number, name = read(path).cells[0].source.splitlines()[0].removeprefix("# ").split(". ")
            title = f"{number}. {name}"
            place = f"{path.parent.name}/{path.stem}.html"
            assert f'<a href="{place}" title="{title}" aria-label="{title}">{number}</a>' in shown


def test_the_page_gets_the_text_that_a_drawing_brings_along(tmp_path):
    path = tmp_path / "one.ipynb"
    source = "from tuning import drawings\n\ndrawings.attention(['The', 'bank', 'of'])"
    nbformat.write(new_notebook(cells=[new_code_cell(source), new_code_cell("1")]), path)
    notebooks.run(path)
    alt = read(path).cells[0].metadata["mystnb"]["image"]["alt"]
    assert alt.startswith("The tokens The, bank, of, twice") and "mystnb" not in read(path).cells[1].metadata


def good():
    """A small notebook that keeps every rule."""
    card = "Why?\n\n*You need [chapter 1](a.ipynb). Ten seconds on\ntwo cores; 35 minutes of reading.*"
    cells = [
        new_markdown_cell(card),
        new_code_cell(SETUP, metadata={"tags": ["hide-input"]}),
        new_code_cell("# tuning/prompts.py\ndef twice(x):\n    return 2 * x"),
        new_code_cell("from tuning.prompts import twice\n\nprint(twice(2))", metadata={"tags": ["result"]}),
        new_code_cell("time()", metadata={"tags": ["nbval-ignore-output"]}),
        new_code_cell("assert time() > 0"),
        new_code_cell("plt.show()", metadata={"mystnb": {"image": {"alt": "A line that rises from left to right."}}}),
        new_code_cell("# @title ✓ Twice two is four\nassert twice(2) == 4", metadata={"tags": ["hide-cell"]}),
        new_code_cell(recalled("twice(x)"), metadata={"tags": ["hide-cell", "earlier"]}),
    ]
    cells[3].outputs = [new_output("stream", text="4\n")]
    cells[6].outputs = [new_output("display_data", {"image/svg+xml": "<svg/>", "text/plain": "<Figure size 600x300>"})]
    cells[8].outputs = [new_output("stream", text="6\n")]
    for count, cell in enumerate(cells[1:], start=1):
        cell.execution_count = count
    return notebooks.normalize(new_notebook(cells=cells))


def recalled(signature, line=None):
    """A cell that recalls a function of the library, by `line` where the import is another."""
    name = signature.split("(")[0]
    return f"# @title From earlier: {signature}\n{line or f'from tuning.prompts import {name}'}\n\nprint(twice(3))"


def faults(book, library=library, **options):
    return "\n".join(violations(book, SETUP, library, **options))


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
        book.cells[index].outputs = [new_output("stream", text=text)] if text else []

    return change


def progress_bar(book):
    book.cells[5].outputs = [new_output("stream", name="stderr", text="100%|###| 9/9")]


def no_alternative_text(book):
    del book.cells[6].metadata["mystnb"]


def png(book):
    book.cells[6].outputs = [new_output("display_data", {"image/png": "aVZCT1I="})]


def large_figure(book):
    book.cells[6].outputs[0].data["image/svg+xml"] = "<svg>" + 250_000 * " " + "</svg>"


def tag_with_a_typo(book):
    book.cells[4].metadata["tags"] = ["nbval-ignore-ouput"]


def set_tags(index, *tags):
    def change(book):
        book.cells[index].metadata["tags"] = list(tags)

    return change


def not_folded_in_jupyterlab(book):
    del book.cells[7].metadata["jupyter"]


def not_folded_in_colab(book):
    del book.cells[7].metadata["cellView"]


def folded_in_colab_only(book):
    book.cells[5].metadata["cellView"] = "form"


def ignored_without_assert(book):
    book.cells[5].source = "time()"


def drop_the_card(book):
    book.cells[0].source = "You need time; 35 minutes of reading."


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
        (set_source(1, publish.setup_cell(("https://github.com/ada/tuning", "v9.0.0"))), "not the setup cell"),
        (drop_the_card, "no card: a paragraph '*You need … minutes of reading.*' near the top"),
        (set_output(3, "/home/ada/book\n"), "a path of a machine in its output"),
        (set_source(5, "assert open('/tmp/x')"), "a path of a machine"),
        (set_source(0, "```{note}\n"), "a directive that Colab shows raw"),
        (no_alternative_text, "without alternative text"),
        (png, "a PNG figure"),
        (large_figure, "a figure of 250 KB; at most 200: draw its many points with rasterized=True"),
        (tag_with_a_typo, "unknown tag 'nbval-ignore-ouput'"),
        (ignored_without_assert, "neither it nor the next two assert anything"),
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
        (set_source(3, "from tuning.prompts import scale, twice as two"), "does not import the library's"),
        (set_source(5, "assert 1\n" * 21), "22 lines; at most 20"),
        (set_source(5, f"assert {'1' * 74}"), "a line of 81 characters; at most 80"),
        (set_output(3, "1" * 81 + "\n"), "a printed line of 81 characters; at most 80"),
        (
            set_source(5, "def f():\n    from tuning.prompts import encode, _inputs"),
            "private name of tuning.prompts: _in",
        ),
        (set_source(5, "from tuning.experiments.probe import Probe"), "an import from tuning.experiments.probe"),
        (set_source(5, "from tuning.experiments import probe"), "an import from tuning.experiments"),
        (set_tags(3), "0 cells with the tag 'result'"),
        (set_tags(5, "result"), "2 cells with the tag 'result'"),
        (set_source(7, "assert twice(2) == 4"), "a folded cell needs a title: make its first line `# @title …`"),
        (set_source(7, "#@title ✓ Four\nassert twice(2) == 4"), "make its first line `# @title …`, not '#@title ✓"),
        (set_source(7, "# @title Imports\n"), "a fold opens on nothing: write its code below its title"),
        (set_source(5, "# @title Imports\nassert 1"), "a cell with a title is a fold: give it the tag"),
        (not_folded_in_jupyterlab, "its fold is not the same for the page, JupyterLab and Colab"),
        (not_folded_in_colab, "its fold is not the same for the page, JupyterLab and Colab"),
        (folded_in_colab_only, "its fold is not the same for the page, JupyterLab and Colab"),
        (set_source(7, "# @title Four\nassert twice(2) == 4"), "a check is folded and its title does not begin with ✓"),
        (set_source(7, "# @title ✓Four\nassert twice(2) == 4"), "a check is folded and its title does not begin with"),
        (set_source(7, "# @title ✓ Four\nprint(twice(2))"), "the title says ✓ and the cell asserts nothing"),
        (set_source(8, recalled("twice")), "its title must read like 'From earlier: merge(model)'"),
        (set_source(8, "# @title Twice\nprint(twice(3))"), "its title must read like 'From earlier: merge(model)'"),
        (set_source(8, recalled("twice(y)")), "its title names twice(y); the library has, in this order, twice(x)"),
        (set_source(8, recalled("scale(times, x)")), "the library has, in this order, scale(x, by, times)"),
        (set_source(8, recalled("Layer(self, size)")), "the library has, in this order, Layer(size, rank)"),
        (set_source(8, recalled("thrice(x)")), "tuning/prompts.py defines no thrice with parameters"),
        (set_source(8, recalled("twice(x)", "from tuning.lora import twice")), "tuning/lora.py defines no twice"),
        (
            set_source(8, recalled("twice(x)", "import tuning")),
            "recalls twice and does not import it: add `from tuning.",
        ),
        (set_source(8, recalled("twice(x)", "from tuning.prompts import scale as twice")), "does not import it"),
        (set_output(8, None), "recalls a function and shows no example: print one small result"),
        (set_tags(8, "hide-input", "earlier"), "is folded whole: give it the tag 'hide-cell' too"),
        (set_tags(8, "hide-cell"), "its title recalls a function: give it the tag 'earlier' too"),
    ],
)
def test_each_rule_catches_its_violation(change, fault):
    book = good()
    change(book)
    assert fault in faults(book)


def test_what_only_a_chapter_in_its_new_form_keeps():
    book = good()
    set_output(3, "1" * 81 + "\n")(book)
    set_source(5, "assert 1\n" * 21)(book)
    book.cells[0].source = "- **You will build** a\n- **You need** b\n- **Cost** c"
    assert faults(book, remade=False) == "the card lacks **Download**"
    set_tags(3)(book)
    assert faults(book, chapter=False) == ""
    set_source(5, "assert 1\n" * 51)(book)
    assert "52 lines; at most 50" in faults(book, chapter=False)


def test_marked_cells_may_follow_each_other_before_their_functions_are_imported():
    book = good()
    source = "# @title Library: scale\n# tuning/prompts.py\ndef scale(x, by=2, *, times=1):\n    return x * by**times"
    book.cells.insert(3, new_code_cell(source, metadata={"tags": ["hide-input"]}, execution_count=3))
    for count, cell in enumerate(book.cells[1:], start=1):
        cell.execution_count = count
    notebooks.normalize(book)
    assert faults(book) == ""  # nobody calls it
    book.cells[4].source = "from tuning.prompts import twice\n\nprint(scale(twice(2), 1))"
    assert faults(book) == "scale: the cell after the marked one does not import the library's"
    book.cells[4].source = "import math\nfrom tuning.prompts import (\n    scale,\n    twice,\n)\nprint(twice(2))"
    assert faults(book) == ""


@pytest.mark.parametrize("signature", ["twice(x)", "scale(x)", "scale(x, times)", "Layer(size, rank)", "Adapter(rank)"])
def test_a_function_is_recalled_with_those_of_its_parameters_that_matter(signature):
    book = good()
    book.cells[8].source = recalled(signature)
    assert faults(book) == ""


@pytest.mark.parametrize("module", ["evaluate", "lomo", "lora", "p_tuning", "prompts"])
def test_parameters_are_those_that_python_tells(module):
    source = read_library(module)
    for name in exported(source):
        thing = getattr(importlib.import_module(f"tuning.{module}"), name)
        assert parameters(source, name) == list(inspect.signature(thing).parameters)


def test_docstrings_and_formatting_do_not_count():
    book = good()
    book.cells[2].source = "# tuning/prompts.py\ndef twice(x):\n    'Other words.'\n    return (2 *\n        x)"
    assert faults(book) == ""


def test_a_changed_library_function_is_noticed():
    changed = SOURCE.replace("2 * x", "x + x")
    assert "twice: the shown code is not that of" in faults(good(), lambda module: changed)


def test_a_changed_library_function_is_noticed_in_the_real_chapter():
    path = next(path for path in PATHS if path.parts[-2:] == ("lab", "2-prompts-are-code.ipynb"))
    changed = read_library("prompts").replace("largest=False", "largest=True")
    assert changed != read_library("prompts")

    def library(module):
        return changed if module == "prompts" else read_library(module)

    found = violations(read(path), SETUP, library, chapter=False)
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


def test_a_fold_is_written_from_its_tag_and_taken_away_with_it():
    cell = new_code_cell("# @title Imports\nimport torch", metadata={"tags": ["hide-cell"], "jupyter": {"a": 1}})
    for _ in range(2):
        notebooks.fold(cell)
        expected = {"tags": ["hide-cell"], "jupyter": {"a": 1, "source_hidden": True}, "cellView": "form"}
        assert cell.metadata == expected
    cell.source, cell.metadata["tags"] = "import torch", []
    notebooks.fold(cell)
    assert cell.metadata == {"tags": [], "jupyter": {"a": 1}}
    del cell.metadata["jupyter"]["a"]
    notebooks.fold(cell)
    assert cell.metadata == {"tags": []}


def test_a_fold_without_a_title_stops_a_run_before_it_begins(tmp_path):
    path = tmp_path / "one.ipynb"
    first = new_code_cell("from pathlib import Path\nPath('ran').touch()")
    nbformat.write(new_notebook(cells=[first, new_code_cell("x = 1", metadata={"tags": ["hide-input"]})]), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"needs a title: make its first line `# @title …`, not 'x = 1'"):
        notebooks.run(path)
    assert path.read_bytes() == before and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["run", "fold"])
def test_the_command_names_the_notebook_at_fault(command, tmp_path, monkeypatch):
    path = tmp_path / "one.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("# @title Imports\nimport torch")]), path)
    monkeypatch.setattr(sys, "argv", ["notebooks.py", command, str(path)])
    with pytest.raises(SystemExit, match=r"one\.ipynb: a cell with a title is a fold: give it the tag hide-input or"):
        notebooks.main()


def test_a_failing_run_leaves_the_notebook_as_it_was(tmp_path):
    path = tmp_path / "one.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.run(path)
    assert path.read_bytes() == before
