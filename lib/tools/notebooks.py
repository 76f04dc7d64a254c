"""Work on the book's notebooks: `run` executes them in place, `fold` only writes the folds that their tags ask for."""

import argparse
import re
import sys
import time
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from tuning.drawings import book_map
from tuning.files import replace, write_text

ROOT = Path(__file__).resolve().parents[2]
FOLDS = ("hide-input", "hide-cell")
TITLE = re.compile(r"# @title (\S.*)")
FIGURE = "image/svg+xml"


def notebooks(root=ROOT):
    """All notebooks of the book, in reading order."""
    found = (root / "book").rglob("*.ipynb")
    return sorted(path for path in found if not {"_build", ".ipynb_checkpoints"} & set(path.parts))


def first_code_cell(book):
    return next(cell for cell in book.cells if cell.cell_type == "code")


def title(cell):
    """What the first line `# @title …` of a folded cell says; None without that line."""
    match = TITLE.fullmatch(cell.source.split("\n", 1)[0])
    return match[1] if match else None


def fold(cell):
    """Write the fold that the tag `hide-input` or `hide-cell` asks for, for JupyterLab and Colab, or take it away.

    The rendered page folds by the tag itself. All three show the title.

    Raises:
        ValueError: a fold without a title or without code, or a title without a fold.
    """
    metadata = cell.metadata
    metadata.get("jupyter", {}).pop("source_hidden", None)
    metadata.pop("cellView", None)
    tagged = [tag for tag in metadata.get("tags", []) if tag in FOLDS]
    start = cell.source.split("\n", 1)[0]
    if tagged and title(cell) is None:
        raise ValueError(f"a folded cell needs a title: make its first line `# @title …`, not {start!r}")
    if tagged and cell.source.strip() == start:
        raise ValueError(f"a fold opens on nothing: write its code below its title, or delete the cell: {start!r}")
    if title(cell) is not None and not tagged:
        raise ValueError(f"a cell with a title is a fold: give it the tag hide-input or hide-cell: {start!r}")
    if tagged:
        metadata.setdefault("jupyter", {})["source_hidden"] = True
        metadata["cellView"] = "form"
    elif not metadata.get("jupyter", True):
        del metadata["jupyter"]


def run(path):
    """Execute a notebook in its folder and write it back with normalized metadata; returns the seconds it took."""
    book = normalize(nbformat.read(path, as_version=4))  # a fault in it is told before the minutes that a run takes
    start = time.perf_counter()
    client = NotebookClient(book, timeout=900, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute()
    seconds = time.perf_counter() - start
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                print(output.text, end="", file=sys.stderr)
    write(normalize(book), path)
    return seconds


def normalize(book):
    """Keep of the metadata what means something, and no more, so that a second run changes as little as possible."""
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            fold(cell)
            cell.outputs = merge_streams(cell.outputs)
            describe(cell)
    return book


def describe(cell):
    """Give the rendered page the alternative text of a drawing or chart, which its output brings along."""
    for output in cell.outputs:
        text = output.get("data", {}).get("text/plain", "")
        if FIGURE in output.get("data", {}) and text and not text.startswith("<Figure"):
            cell.metadata.setdefault("mystnb", {}).setdefault("image", {})["alt"] = text


def merge_streams(outputs):
    """One output for consecutive pieces of stdout, which are cut otherwise in every run; no stderr (progress bars)."""
    merged = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if merged and output.output_type == merged[-1].output_type == "stream" and output.name == merged[-1].name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def write(book, path):
    nbformat.validate(book)
    replace(path, lambda temporary: nbformat.write(book, temporary))


def written(root=ROOT):
    """File name -> text of what book/_static holds of the notebooks: the map, and pictures for the README.

    Such a picture is the figure of a cell with the tag `readme-picture`.
    """
    found = {"map.html": book_map(parts(root))}
    for path in notebooks(root):
        for cell in nbformat.read(path, as_version=4).cells:
            if "readme-picture" in cell.metadata.get("tags", []):
                found[f"{path.stem}.svg"] = cell.outputs[-1].data[FIGURE]
    return found


def parts(root=ROOT):
    """Name of a part -> [(title, address as seen from the index)] of its chapters, from the table of contents."""
    contents = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    found = {}
    for part in contents["parts"]:
        name = re.fullmatch(r"Part \d+ · (.+)", part["caption"])
        if name:
            found[name[1]] = [chapter(root, entry["file"]) for entry in part["chapters"]]
    return found


def chapter(root, place):
    """(title, address) of a chapter; its title is the first line of its first cell."""
    heading = nbformat.read(root / f"{place}.ipynb", as_version=4).cells[0].source.split("\n", 1)[0]
    return heading.removeprefix("# "), f"{place.removeprefix('book/')}.html"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("paths", nargs="*", type=Path)
    commands.add_parser("fold").add_argument("paths", nargs="*", type=Path)
    options = parser.parse_args()
    for path in options.paths or notebooks():
        if not path.is_file():
            raise SystemExit(f"{path} is no file; e.g. make run CHAPTER=book/1-prompts/2-prompts-are-code.ipynb")
        try:
            if options.command == "fold":
                write(normalize(nbformat.read(path, as_version=4)), path)
            else:
                print(f"{path}: {run(path.resolve()):.0f} s", flush=True)
        except ValueError as error:  # a fault in the notebook itself
            raise SystemExit(f"{path}: {error}") from error
    for name, text in written().items():
        write_text(ROOT / "book" / "_static" / name, text)


if __name__ == "__main__":
    main()
