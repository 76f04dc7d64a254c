"""The order of the pages, the side bar that shows it, and what each page says of itself to search engines."""

import os
import re
import sys

import pytest
import yaml
from browser import Visit, build
from bs4 import BeautifulSoup
from docutils import nodes
from notebook_rules import ROOT

sys.path.insert(0, str(ROOT / "lib"))
from pages.heads import describe, prose
from pages.order import neighbours

LORA = "2-lora/7-lora-in-practice"
QUESTION = "How much of a change of weights fits into two thin matrices?"


def number(path):
    return int(re.match(r"\d+", path.stem)[0])


CHAPTERS = [
    path.relative_to(ROOT / "book").with_suffix("").as_posix()
    for path in sorted((ROOT / "book").glob("[0-9]-*/[0-9]*.ipynb"), key=number)
]
LINE = ["index", "setup", "notation", *CHAPTERS, "scorecard", "glossary", "references"]


@pytest.fixture(scope="module")
def pages(html):
    """name -> the parsed page, of all pages that the book has."""
    return parsed(html / "book")


def parsed(folder):
    return {
        path.relative_to(folder).with_suffix("").as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in folder.rglob("*.html")
        if path.stem not in ("genindex", "search") and path.parent.name != "_static"
    }


def target(page, link):
    """The name of the page that a link on `page` leads to; None without a link."""
    if link is None or link["href"] == "#":
        return link and page
    return os.path.normpath(f"{page}/../{link['href']}").removesuffix(".html")


def step(pages, page, way):
    """Where "previous" or "next" leads, which the button and the page's head must agree on."""
    link = pages[page].select_one({"prev": "a.left-prev", "next": "a.right-next"}[way])
    assert target(page, link) == target(page, pages[page].head.find("link", rel=way))
    return target(page, link)


def walk(pages, page, way):
    while page:
        yield page
        page = step(pages, page, way)


def listed(page, soup):
    """(target, title, target of the chapter it stands under or None) of the side bar's links to pages."""
    for link in soup.select("nav.bd-docs-nav li a.reference"):
        above = link.find_parent("li").find_parent("li")
        yield target(page, link), link.get_text(" ", strip=True), above and target(page, above.a)


def test_next_leads_through_the_chapters_and_previous_back(pages):
    assert len(CHAPTERS) >= 12
    assert list(walk(pages, "index", "next")) == LINE
    assert list(walk(pages, LINE[-1], "prev")) == LINE[::-1]


def test_a_page_beside_the_line_leads_back_to_its_chapter_and_on_to_the_following(pages):
    beside = sorted(set(pages) - set(LINE))
    assert len(beside) >= 12
    for page in beside:
        folder, name = page.rsplit("/", 1)
        chapter = next(c for c in CHAPTERS if number(ROOT / c) == int(re.match(r"\d+", name)[0]))
        assert folder.startswith(chapter.rsplit("/", 1)[0])
        assert step(pages, page, "prev") == chapter
        assert step(pages, page, "next") == LINE[LINE.index(chapter) + 1]


def test_the_side_bar_shows_chapters_and_what_is_beside_them_as_their_sections(pages):
    for page, soup in pages.items():
        links = list(listed(page, soup))
        assert [place for place, _, chapter in links if chapter is None] == LINE[
            1:
        ]  # the book's name leads to the index
        assert sorted(place for place, _, _ in links) == sorted(set(pages) - {"index"})  # each once
        for place, title, chapter in links:
            if chapter is not None:
                assert place.rsplit("/", 2)[0] == chapter.rsplit("/", 1)[0]
                assert number(ROOT / place) == number(ROOT / chapter)
            if "/solutions/" in place:
                assert title == f"Solutions {number(ROOT / place)}"


def test_only_the_sections_of_the_page_at_hand_are_open(pages):
    for page, soup in pages.items():
        opened = [target(page, details.parent.a) for details in soup.select("nav.bd-docs-nav details[open]")]
        if page in ("index", "setup", "notation", "scorecard", "glossary", "references"):
            assert opened == []
        else:
            chapter = page if page in CHAPTERS else step(pages, page, "prev")
            assert opened == [chapter]


def test_sections_open_by_keyboard(browser, address):
    with Visit(browser, f"{address}/book/index.html") as visit:
        side_bar = visit.page.get_by_role("navigation", name="Main")
        solutions = side_bar.get_by_role("link", name="Solutions 7", exact=True)
        side_bar.get_by_role("link", name="7. LoRA in practice").focus()
        assert not solutions.is_visible()
        visit.page.keyboard.press("Tab")
        focused = visit.page.locator(":focus")
        assert focused.get_attribute("aria-label") == "Sections of 7. LoRA in practice"
        visit.page.keyboard.press("Enter")
        assert solutions.is_visible()
        visit.page.keyboard.press("Tab")
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_url("**/2-lora/solutions/7-lora-in-practice.html")
        assert solutions.is_visible()
        side_bar.get_by_label("Sections of 7. LoRA in practice").press("Enter")
        assert not solutions.is_visible()


def test_next_and_previous_work_in_a_browser(browser, address):
    with Visit(browser, f"{address}/book/{CHAPTERS[5]}.html") as visit:
        visit.page.get_by_role("link", name="next 7. LoRA in practice").click()
        visit.page.wait_for_url(f"**/{LORA}.html")
        visit.page.get_by_role("link", name="previous 6. ").click()
        visit.page.wait_for_url(f"**/{CHAPTERS[5]}.html")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_button_in_sight_opens_and_closes_the_side_bar(browser, address, width):
    with Visit(browser, f"{address}/book/{LORA}.html", width=width) as visit:
        chapter = visit.page.locator("nav.bd-docs-nav a", has_text="8. Instruction tuning")
        button = visit.page.get_by_role("button", name="Toggle primary sidebar")
        assert chapter.is_visible() == (width == 1280)
        button.click()
        chapter.wait_for(state="hidden" if width == 1280 else "visible")
        if width == 1280:
            button.click()
            chapter.wait_for(state="visible")
        else:
            chapter.click()
            visit.page.wait_for_url("**/8-instruction-tuning.html")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_accessibility_violation_with_sections_open(browser, address, theme):
    from axe_playwright_python.sync_playwright import Axe

    with Visit(browser, f"{address}/book/{LORA}.html", theme=theme) as visit:
        toggles = visit.page.locator("nav.bd-docs-nav summary")
        assert toggles.count() >= 12
        for place in range(toggles.count()):
            if not toggles.nth(place).evaluate("toggle => toggle.parentElement.open"):
                toggles.nth(place).press("Enter")
        found = Axe().run(visit.page, context="nav.bd-docs-nav").response
        assert "summary-name" in {rule["id"] for rule in found["passes"]}
        grave = [rule["id"] for rule in found["violations"] if rule["impact"] in ("serious", "critical")]
        assert grave == []


def test_each_page_describes_itself_in_its_own_words(pages):
    seen = set()
    for page, soup in pages.items():
        text = soup.find("meta", attrs={"name": "description"})["content"]
        assert 50 <= len(text) <= 160, (page, text)
        assert soup.find("meta", property="og:description")["content"] == text
        title = soup.find("meta", property="og:title")["content"]
        assert soup.h1.get_text().startswith(title) and soup.html["lang"] == "en"
        assert text not in seen
        seen.add(text)
        if "/solutions/" in page:
            chapter = pages[step(pages, page, "prev")].find("meta", property="og:title")["content"]
            assert text.startswith(f"Solutions to the exercises of chapter {chapter.replace('. ', ': ')}.")
        else:
            for note in soup.select("article [popover]"):
                note.extract()
            assert "".join(text.removesuffix("…").split()) in "".join(soup.article.get_text().split()), page


def test_an_unpublished_copy_names_no_address(pages):
    published = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["html"].get("baseurl")
    for soup in pages.values():
        assert bool(soup.find("link", rel="canonical")) == bool(published)


def test_links_can_be_followed_without_a_script(pages):
    for page, soup in pages.items():
        assert [a for a in soup("a") if not a.get("href") or a["href"].startswith("javascript:")] == [], page


# A small book, with what the real one does not have yet.

CONFIG = f"""
title: A trial
only_build_toc_files: true
sphinx:
  local_extensions: {{pages.order: {ROOT / "lib"}, pages.heads: {ROOT / "lib"}}}
"""
TOC = """
format: jb-book
root: index
parts:
  - caption: Part 1
    chapters:
      - file: 6-lora
        sections: [{file: solutions/6-lora, title: Solutions 6}]
      - file: 7-practice
        sections:
          - {file: lab/7a-tables, title: Laboratory 7a}
          - {file: lab/7b-relatives, title: Laboratory 7b}
          - {file: solutions/7-practice, title: Solutions 7}
  - caption: Part 2
    chapters:
      - file: 8-tuning
"""
TRIAL = {
    "index": "# A trial\n\nThis page says in one sentence what the small book is about.",
    "6-lora": f"# 6. LoRA\n\n*{QUESTION}*\n\nMore prose.",
    "7-practice": "# 7. Practice\n\n*One model, many adapters: how are they put in, trained and saved?*",
    "8-tuning": "# 8. Tuning\n\n*What does a model learn from a few dozen conversations, and what does it lose?*",
    "lab/7a-tables": "# Tables 5 to 7\n\nThe tables of the paper are measured again here, on a small model.",
    "lab/7b-relatives": "# Relatives\n\nThe relatives of the method are built here, each in a few lines of code.",
    "solutions/6-lora": "# Solutions to chapter 6\n\nOne way to solve each.",
    "solutions/7-practice": "# Solutions to chapter 7\n\nOne way to solve each.",
}


def trial(folder, **changed):
    """Build the small book with some pages changed; its pages, parsed."""
    root = folder / "source"
    for name, text in {**TRIAL, **changed}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.md").write_text(text)
    (root / "_config.yml").write_text(CONFIG)
    (root / "_toc.yml").write_text(TOC)
    return parsed(build(folder / "out", root))


def test_laboratories_are_sections_that_next_and_previous_pass_by(tmp_path):
    pages = trial(tmp_path)
    line = ["index", "6-lora", "7-practice", "8-tuning"]
    assert list(walk(pages, "index", "next")) == line
    assert list(walk(pages, "8-tuning", "prev")) == line[::-1]
    for page in ("lab/7a-tables", "lab/7b-relatives", "solutions/7-practice"):
        assert step(pages, page, "prev") == "7-practice" and step(pages, page, "next") == "8-tuning"
    for page, soup in pages.items():
        sections = [(place, title) for place, title, chapter in listed(page, soup) if chapter == "7-practice"]
        assert sections == [
            ("lab/7a-tables", "Laboratory 7a"),
            ("lab/7b-relatives", "Laboratory 7b"),
            ("solutions/7-practice", "Solutions 7"),
        ]
        toggles = [summary["aria-label"] for summary in soup.select("nav.bd-docs-nav summary")]
        assert toggles == ["Sections of 6. LoRA", "Sections of 7. Practice"]
    described = {page: soup.find("meta", attrs={"name": "description"})["content"] for page, soup in pages.items()}
    assert described["6-lora"] == QUESTION
    assert described["lab/7a-tables"].startswith("The tables of the paper")
    assert described["solutions/6-lora"] == "Solutions to the exercises of chapter 6: LoRA. " + QUESTION


def test_a_page_without_prose_stops_the_build_and_says_what_to_write(tmp_path):
    bare = (
        "# Tables 5 to 7\n\n| rank | right |\n| --- | --- |\n| 8 | what stands in a table is no prose, however long |\n"
    )
    with pytest.raises(AssertionError, match=r"7a-tables.*no description(.|\n)*write its question"):
        trial(tmp_path, **{"lab/7a-tables": bare})


def test_two_pages_that_say_the_same_stop_the_build(tmp_path):
    with pytest.raises(AssertionError, match=r"lab/7b-relatives.*the description is that of lab/7a-tables, too"):
        trial(tmp_path, **{"lab/7b-relatives": TRIAL["lab/7a-tables"]})


def test_neighbours_on_and_beside_the_line():
    includes = {"root": ["a", "b", "c"], "b": ["lab"], "lab": ["deeper"], "c": ["solutions"]}
    wanted = {
        "root": (None, "a"),
        "a": ("root", "b"),
        "b": ("a", "c"),
        "lab": ("b", "c"),
        "deeper": ("b", "c"),
        "c": ("b", None),
        "solutions": ("c", None),
    }
    assert {page: neighbours(includes, "root", page) for page in wanted} == wanted
    assert neighbours({}, "root", "root") == (None, None)  # a book of one page


LONG = "Words " * 40 + "end."


@pytest.mark.parametrize(
    ("paragraphs", "wanted"),
    [
        ([QUESTION, "More."], QUESTION),
        (["Is it so? " + QUESTION], "Is it so? " + QUESTION),  # the whole first paragraph
        (["Short.", QUESTION, "More."], "Short. " + QUESTION),  # the next one helps out
        ([QUESTION + " " + LONG], QUESTION),  # whole sentences as far as they fit
        ([LONG], "Words " * 25 + "Words…"),  # cut at a word
        (["Too short.", "This as well."], None),
        ([], None),
    ],
)
def test_describe(paragraphs, wanted):
    assert describe(paragraphs) == wanted


def test_prose_is_plain_text_of_paragraphs_and_items():
    text = nodes.paragraph("", "", nodes.emphasis("", "What is\nlost?"), nodes.Text(" Not "), nodes.literal("", "all"))
    formula = nodes.paragraph("", "With ", nodes.math("", r"\theta"))
    item = nodes.bullet_list("", nodes.list_item("", nodes.paragraph("", "An item.")))
    note = nodes.note("", nodes.paragraph("", "A note."))
    section = nodes.section("", nodes.title("", "Title"), text, formula, item, note)
    document = nodes.document("", "")
    document += section
    assert list(prose(document)) == ["What is lost? Not all", "An item."]
