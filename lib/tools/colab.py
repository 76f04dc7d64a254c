"""`make colab`: run notebooks as Colab does, in a clean environment with PyTorch and nothing of this repository.

    python lib/tools/colab.py                      # every chapter, and every assignment as a student gets it
    python lib/tools/colab.py book/1-prompts/2-prompts-are-code.ipynb assignments/2-dora/assignment.ipynb
    python lib/tools/colab.py --with transformers==5.18.0 book/2-lora/7-lora-in-practice.ipynb

Each notebook runs from top to bottom in an empty folder and an environment of its own. The address that its set-up cell
installs from leads to a copy of this checkout; a checkout that names none is published in the copy. Printed are the
seconds of the set-up cell and of the whole, and what was downloaded; that PyTorch was replaced is an error.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import course
import notebooks
import publish
from notebooks import ROOT

STAND_IN = ("reader/tuning-language-models", "v0.0.1")  # what an unpublished checkout is called in the copy
RUN = """
import json, sys, time, nbformat
from nbclient import NotebookClient
book, share = nbformat.read("notebook.ipynb", 4), float(sys.argv[1])
if share < 1:
    code = [k for k, cell in enumerate(book.cells) if cell.cell_type == "code"]
    del book.cells[code[-(-int(share * len(code)) // 1)] :]
start, seconds = time.perf_counter(), []
client = NotebookClient(book, timeout=1800, kernel_name="python3")
with client.setup_kernel():
    for k, cell in enumerate(book.cells):
        begun = time.perf_counter()
        client.execute_cell(cell, k)
        if cell.cell_type == "code":
            seconds.append(time.perf_counter() - begun)
print(json.dumps({"setup": seconds[0], "whole": time.perf_counter() - start}))
"""
WHICH_SITE = "import site; print(site.getsitepackages()[0])"
WHICH_TORCH = "import torch; print(torch.__version__, torch.__file__)"


def published_copy(folder):
    """The checkout's files as a tagged repository of their own; returns the address and tag that its notebooks name."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    if publish.published(folder / "_config.yml") is None:
        publish.publish(*STAND_IN, root=folder)
    address = publish.published(folder / "_config.yml")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as checked out"], ["tag", address[1]]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return address


def pinned(*starts):
    """The lines of requirements.txt that begin so."""
    return [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith(starts)]


def environment_with_torch(folder, also=()):
    """A new environment that has PyTorch, what runs notebooks, and `also`, as Colab has more; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, *pinned("torch==", "ipykernel", "nbclient", "nbformat"), *also], check=True)
    return python


def layered(base, folder):
    """A new environment in which what the one of `base` (its Python) has is there already."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    site, own = (
        subprocess.run([p, "-c", WHICH_SITE], capture_output=True, text=True, check=True).stdout.strip()
        for p in (base, python)
    )
    Path(own, "base.pth").write_text(site + "\n")
    return python


def downloaded(log):
    """Bytes that pip fetched or took from its cache, by its log."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "bytes": 1}
    found = re.findall(r"(?:Downloading|Using cached) \S+ \(([\d.]+) (kB|MB|GB|bytes)\)", log)
    return sum(float(number) * units[unit] for number, unit in found)


def run(notebook, python, clone, folder, share=1.0, files=()):
    """Run a notebook in an empty folder with this Python.

    Args:
        clone: the repository that the published address leads to.
        share: of its code cells, from the first.
        files: (path, bytes) of what lies beside it.

    Returns:
        A dict: seconds of the `setup` cell and of the `whole`, bytes `downloaded`.

    Raises:
        RuntimeError: a cell failed, or PyTorch is another one than before.
    """
    folder.mkdir(parents=True)
    for name, content in (("notebook.ipynb", notebook.read_bytes()), *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {
        "PATH": f"{python.parent}{os.pathsep}{environment['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_LOG": str(folder.parent / f"{folder.name}.log"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{clone}.insteadOf",
        "GIT_CONFIG_VALUE_0": publish.published(clone / "_config.yml")[0],
    }
    before = subprocess.run([python, "-c", WHICH_TORCH], capture_output=True, text=True, check=True).stdout
    subprocess.run([python, "-m", "ipykernel", "install", "--sys-prefix"], check=True, capture_output=True)
    done = subprocess.run([python, "-c", RUN, str(share)], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{notebook.name} fails in a clean environment:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    if subprocess.run([python, "-c", WHICH_TORCH], capture_output=True, text=True, check=True).stdout != before:
        raise RuntimeError(f"{notebook.name} replaced PyTorch: {before}")
    log = Path(environment["PIP_LOG"])
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"downloaded": downloaded(log.read_text()) if log.is_file() else 0}


def students_notebook(master, folder, address):
    """An assignment as students get it: the notebook, and (path, bytes) of what lies beside it."""
    course.assign(master, 0, folder, address)
    tests = [(f"tests/{path.name}", path.read_bytes()) for path in (folder / "student" / "tests").iterdir()]
    return folder / "student" / f"{master.name}.ipynb", tests


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="chapters or assignments; without any, all of them")
    parser.add_argument("--with", dest="also", nargs=1, action="extend", default=[], help="what is installed already")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone = folder / "clone"
        clone.mkdir()
        address = published_copy(clone)
        chapters = [path for path in notebooks.notebooks() if "solutions" not in path.parts]
        masters = [master / "assignment.ipynb" for master in course.masters()]
        chosen = []
        for path in [path.resolve() for path in options.notebooks] or chapters + masters:
            if path in masters:
                chosen.append(students_notebook(path.parent, folder / "course" / path.parent.name, address))
            else:
                chosen.append((clone / path.relative_to(ROOT) if path.is_relative_to(ROOT) else path, ()))
        base = environment_with_torch(folder / "base", options.also)
        print(f"{'notebook':34} {'setup, s':>9} {'whole, s':>9} {'download, MB':>13}", flush=True)
        slow, failed = [], []
        for number, (path, files) in enumerate(chosen):
            python = layered(base, folder / f"venv{number}")
            try:
                found = run(path, python, clone, folder / f"empty{number}", files=files)
            except RuntimeError as error:
                print(error, flush=True)
                failed.append(path.name)
                continue
            slow += [path.name] if found["setup"] > 60 else []
            numbers = f"{found['setup']:9.0f} {found['whole']:9.0f} {found['downloaded'] / 1e6:13.0f}"
            print(f"{path.stem:34} {numbers}", flush=True)
        if slow:
            print(f"setup took more than 60 s: {', '.join(slow)}")
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
