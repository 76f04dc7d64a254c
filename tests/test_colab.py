"""The setup cell does its work where nothing is installed: a clean environment and an empty folder, as in Colab."""

import subprocess
import sys
from pathlib import Path

import pytest
from notebook_rules import ROOT, code_cells, read

sys.path.insert(0, str(ROOT / "lib" / "tools"))
import colab
import notebooks
import publish

CHAPTER = Path("book", "1-prompts", "2-prompts-are-code.ipynb")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return colab.environment_with_torch(tmp_path_factory.mktemp("base") / "venv")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    colab.published_copy(folder)
    return folder


def test_the_first_third_of_a_chapter_runs_in_a_clean_environment(base, clone, tmp_path):
    python = colab.layered(base, tmp_path / "venv")
    found = colab.run(clone / CHAPTER, python, clone, tmp_path / "empty", share=1 / 3)
    assert found["downloaded"] > 50e6 and found["setup"] < found["whole"]
    where = [python, "-E", "-c", "import tuning; print(tuning.__file__)"]
    assert str(tmp_path / "venv") in subprocess.run(where, cwd=tmp_path, capture_output=True, text=True).stdout


def test_an_assignment_runs_in_a_clean_environment(base, clone, tmp_path):
    address = publish.published(clone / "_config.yml")
    notebook, files = colab.students_notebook(colab.course.masters()[1], tmp_path / "course", address)
    colab.run(notebook, colab.layered(base, tmp_path / "venv"), clone, tmp_path / "empty", files=files)


def test_a_failing_notebook_is_an_error(base, clone, tmp_path):
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import torch\nassert False, 'broken'")])
    nbformat.write(book, tmp_path / "broken.ipynb")
    with pytest.raises(RuntimeError, match=r"broken\.ipynb fails in a clean environment"):
        colab.run(tmp_path / "broken.ipynb", base, clone, tmp_path / "empty")


def test_what_pip_downloaded():
    log = "  Downloading a-1.whl (1.5 MB)\n  Using cached b.whl (20 kB)\n  Downloading c.metadata (9 bytes)\n"
    assert colab.downloaded(log) == pytest.approx(1.5e6 + 20e3 + 9)


@pytest.mark.parametrize("address", [None, ("https://github.com/ada/tuning", "v2.0.0")])
def test_where_everything_is_installed_the_setup_cell_does_nothing(address):
    """It runs no installer: the cell is executed with a `%pip` that would be noticed."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    called = []
    shell.register_magic_function(lambda line: called.append(line), magic_name="pip")
    result = shell.run_cell(publish.setup_cell(address))
    assert result.success and not called


def test_the_setup_cell_of_an_unpublished_copy_says_what_to_do(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"make lab.*make publish REPO=owner/name TAG="):
        exec(publish.UNPUBLISHED_CELL, {})


def test_every_notebook_has_the_setup_cell_of_this_copy():
    for path in notebooks.notebooks():
        assert code_cells(read(path))[0].source == publish.setup_cell(publish.published()), Path(path).name
