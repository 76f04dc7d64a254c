"""The setup cell does its work where nothing is installed: a clean environment and an empty folder, as in Colab."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from notebook_rules import ROOT, code_cells, read

sys.path.insert(0, str(ROOT / "lib" / "tools"))
import notebooks

CHAPTER = ROOT / "book" / "1-prompts" / "2-prompts-are-code.ipynb"
TORCH = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
PINNED = [
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith(("ipyk", "nbc", "nbf"))
]


def tagged_clone(folder, tag):
    """The checkout's files as a repository of their own, with `tag`."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as checked out"], ["tag", tag]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)


def test_the_first_third_of_the_chapter_runs_in_a_clean_environment(tmp_path):
    repository, tag = notebooks.published()
    clone, work, venv = tmp_path / "clone", tmp_path / "empty", tmp_path / "venv"
    clone.mkdir()
    work.mkdir()
    tagged_clone(clone, tag)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, TORCH, *PINNED], check=True)
    version = [python, "-c", "import torch; print(torch.__version__, torch.__file__)"]
    before = subprocess.run(version, capture_output=True, text=True, check=True).stdout

    book = read(CHAPTER)
    cells = code_cells(book)
    third = cells[: -(-len(cells) // 3)]
    short = nbformat.v4.new_notebook(cells=third, metadata=book.metadata)
    nbformat.write(short, work / "chapter.ipynb")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "PATH": f"{venv / 'bin'}{os.pathsep}{environment['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{clone}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository,
    }
    run = "import sys, pathlib, nbformat; from nbclient import NotebookClient\n"
    run += "book = nbformat.read('chapter.ipynb', 4)\n"
    run += "NotebookClient(book, timeout=900, kernel_name='python3').execute()\n"
    run += "print(book.cells[1].outputs)\n"
    subprocess.run([python, "-m", "ipykernel", "install", "--sys-prefix"], check=True, capture_output=True)
    done = subprocess.run([python, "-c", run], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert subprocess.run(version, capture_output=True, text=True, check=True).stdout == before
    where = [python, "-c", "import tuning; print(tuning.__file__)"]
    assert str(venv) in subprocess.run(where, cwd=work, capture_output=True, text=True, check=True).stdout


def test_where_everything_is_installed_the_setup_cell_does_nothing():
    """It runs no installer: the cell is executed with a `%pip` that would be noticed."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    called = []
    shell.register_magic_function(lambda line: called.append(line), magic_name="pip")
    result = shell.run_cell(notebooks.setup_cell(*notebooks.published()))
    assert result.success and called == []


def test_every_notebook_installs_from_the_published_repository():
    repository, tag = notebooks.published()
    for path in notebooks.notebooks():
        assert code_cells(read(path))[0].source == notebooks.setup_cell(repository, tag), Path(path).name
