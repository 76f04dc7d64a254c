"""Terms of the glossary: its table is in order, and pages explain a term at its first use, by key, touch and mouse."""

import re

import pytest
from browser import Visit
from bs4 import BeautifulSoup
from docutils import nodes
from docutils.core import publish_doctree
from myst_parser.parsers.docutils_ import Parser
from notebook_rules import ROOT
from pages.terms import ENGLISH, Term, explain, matcher, parse
from sphinx.errors import ExtensionError

GLOSSARY = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in GLOSSARY.splitlines() if line.startswith("|")][2:]
TABLE = """
| term | 한국어 | meaning |
| --- | --- | --- |
| **deep prompt** | 심층 프롬프트 | Trained keys and values. |
| **low rank** | 저랭크 | A product of two thin ones. |
| **NF4, NormalFloat** | NF4(NormalFloat) | Sixteen levels, as in `[Y]`. |
| prompt | 프롬프트 | The text before an input. |
| **prompt tuning** | 프롬프트 튜닝 | Training a prompt's vectors. |
| scale of NF4 | 스케일 | The number that multiplies levels. |
"""
CHAPTER = "1-prompts/2-prompts-are-code"
BUTTON, OPEN = "button.term", ".meaning:popover-open"


def test_the_glossary_is_in_alphabetical_order():
    terms = [row[0].strip("*").casefold() for row in ROWS]
    assert len(terms) > 100 and terms == sorted(terms)


def test_each_meaning_is_one_sentence():
    for term, _, meaning in ROWS:
        assert re.fullmatch(r"[A-Z].*\.", meaning) and not re.search(r"[.!?] [A-Z]", meaning), term


def test_everyday_words_are_not_explained_on_pages_and_words_of_the_trade_are():
    flagged = {spelling for entry in parse(GLOSSARY) if entry.flagged for spelling in entry.spellings}
    everyday = {"code", "answer", "block", "batch", "token", "level", "scale", "position", "head", "step", "rank"}
    assert everyday.isdisjoint(flagged)
    assert {"gradient checkpointing", "verbalizer", "low rank", "NF4", "perplexity", "P@1"} <= flagged


def test_a_korean_term_has_one_spelling():
    korean = " ".join(row[1] for row in ROWS)
    for former in ("그래디언트", "미세 조정", "혼란도", "활성값", "최대값", "특이값", "매개변수", "자료형", "집합("):
        assert former not in korean
    assert {row[1] for row in ROWS} >= ENGLISH


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("| **hook** | 훅 |", r"row '\| \*\*hook\*\* \| 훅 \|': write \| term \| 한국어 \| meaning \|"),
        ("| hook | 훅 | A function. | more |", "no column empty"),
        ("| hook | 훅 | |", "no column empty"),
        ("| hook, | 훅 | A function. |", "no column empty"),
        ("| hook | hook | A function. |", "'hook' has no Hangul: write the Korean, or name it in ENGLISH"),
        ("| normalfloat | 정규 | A type. |", "'normalfloat' has a row already: keep one of the two"),
    ],
)
def test_a_row_that_is_wrong_is_named(row, fault):
    with pytest.raises(ExtensionError, match=fault):
        parse(TABLE + row)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Low rank, and low-rank", [("Low rank", "저랭크"), ("low-rank", "저랭크")]),
        ("deep\nprompts", [("deep\nprompts", "심층 프롬프트")]),
        ("(NF4) or normalfloat", [("NF4", "NF4(NormalFloat)"), ("normalfloat", "NF4(NormalFloat)")]),
        ("prompt tuning of a prompt's", [("prompt tuning", "프롬프트 튜닝"), ("prompt", "프롬프트")]),
        ("the scale of NF4", [("scale of NF4", "스케일")]),
        ("NF4x, xNF4, NF4-FA, non-NF4, prompted, slow rank", []),
    ],
)
def test_whole_words_match_and_the_longest_term_wins(text, found):
    find = matcher(parse(TABLE))
    assert [(text[start:end], entry.korean) for start, end, entry in find(text)] == found


PROSE = """
# Deep prompts

## NF4 in a heading

Code `NF4`, a link [NF4](https://example.org), a formula $NF4$.

```{figure} nowhere.png
NF4 in a caption
```

    NF4 in a listing

| NF4 above | prompt |
| --- | --- |
| a deep prompt | the **low rank**, (NF4's) |

- NF4 and low rank once more, prompt tuning.
"""


def test_a_page_explains_the_first_use_in_its_prose():
    page = publish_doctree(PROSE, parser=Parser(), settings_overrides={"myst_enable_extensions": ["dollarmath"]})
    text = page.astext()
    found = explain(page, matcher(parse(TABLE)))
    terms = list(page.findall(Term))
    assert [term.astext() for term in terms] == ["low rank", "NF4", "prompt tuning"]
    assert [entry.slug for entry in found] == [term["slug"] for term in terms] == ["low-rank", "nf4", "prompt-tuning"]
    assert page.astext() == text  # the words stay where they were
    unbroken = [node.astext() for node in page.findall(nodes.inline) if "unbroken" in node["classes"]]
    assert unbroken == ["low rank,", "(NF4's)", "prompt tuning."]


def soups(html):
    for path in sorted((html / "book").rglob("*.html")):
        yield path.relative_to(html / "book").as_posix(), BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


NO_PROSE = ["h1", "h2", "h3", "h4", "a", "pre", "code", "figcaption", "thead", ".cell", ".math", "[popover]"]


def test_on_every_page_a_term_is_explained_once_and_nowhere_but_in_prose(html):
    for name, soup in soups(html):
        article = soup.find("article")
        targets = [button["popovertarget"] for button in article.select(BUTTON)]
        assert len(set(targets)) == len(targets) < 30, name
        assert targets == [meaning["id"] for meaning in article.select("[popover]")], name
        assert not article.select(", ".join(f"{place} {BUTTON}" for place in NO_PROSE)), name
        assert not (targets and name in ("glossary.html", "references.html"))


def test_a_term_is_explained_at_its_first_use_on_a_page(html):
    word, pages = re.compile(r"\bperplexity\b", re.IGNORECASE), 0
    for name, soup in soups(html):
        if name == "glossary.html":
            continue
        article = soup.find("article")
        for place in article.select(", ".join(NO_PROSE)):
            place.decompose()
        uses = [string.parent.name for string in article.find_all(string=word)]
        assert uses == [] or (uses[0] == "button" and "button" not in uses[1:]), name
        pages += bool(uses)
    assert pages > 3


def test_each_term_of_the_glossary_has_an_address_and_its_korean_a_language(html):
    soup = BeautifulSoup((html / "book" / "glossary.html").read_text(encoding="utf-8"), "html.parser")
    rows = soup.select("article tbody tr")
    assert [row.td.get_text() for row in rows] == [row[0].strip("*") for row in ROWS]
    assert len({row["id"] for row in rows}) == len(rows)
    assert soup.find(id="term-perplexity").td.get_text() == "perplexity"
    assert all(row.select("td")[1]["lang"] == "ko" for row in rows)


def first_term(page):
    """The first term of a page that has a Korean word, with what its popover has to say by the glossary's own row."""
    term = page.locator(BUTTON).nth(
        page.locator(".meaning").evaluate_all("all => all.findIndex(one => one.querySelector('[lang=ko]'))")
    )
    word = term.text_content().casefold()
    name, korean, meaning = next(row for row in ROWS if word in row[0].strip("*").casefold().split(", "))
    return term, [f"{name.strip('*')} {korean}", meaning.replace("`", ""), "In the glossary"]


def lines(meaning):
    return re.sub(r"\n+", "\n", meaning.inner_text()).split("\n")


def test_keys_open_and_close_a_meaning_and_lead_to_the_glossary(browser, address):
    with Visit(browser, f"{address}/book/{CHAPTER}.html") as visit:
        page, keys, meaning = visit.page, visit.page.keyboard, visit.page.locator(OPEN)
        term, says = first_term(page)

        def has_focus(element):
            return element.evaluate("element => element === document.activeElement")

        page.locator("article h1").click()
        for _ in range(60):
            keys.press("Tab")
            if has_focus(term):
                break
        assert has_focus(term) and meaning.count() == 0
        keys.press("Enter")
        meaning.wait_for()
        assert lines(meaning) == says
        keys.press("Escape")
        meaning.wait_for(state="detached")
        assert has_focus(term)
        keys.press("Space")
        meaning.wait_for()
        keys.press("Tab")
        assert has_focus(meaning.locator("a"))
        keys.press("Escape")
        meaning.wait_for(state="detached")
        assert has_focus(term)
        keys.press("Enter")
        keys.press("Tab")
        keys.press("Enter")
        page.wait_for_url("**/book/glossary.html#term-*")
        assert says[0].startswith(page.locator("tr:target td").first.inner_text())
        assert visit.elsewhere(address) == [] and visit.faults == []


def test_the_mouse_opens_a_meaning_by_resting_on_its_term(browser, address):
    with Visit(browser, f"{address}/book/{CHAPTER}.html") as visit:
        meaning = visit.page.locator(OPEN)
        term, says = first_term(visit.page)
        term.hover()
        meaning.wait_for()
        assert lines(meaning) == says
        term.click()  # a click on what is open does not close it
        meaning.hover()
        visit.page.wait_for_timeout(600)
        assert meaning.is_visible()
        visit.page.mouse.move(2, 600)
        meaning.wait_for(state="detached")
        term.hover()
        meaning.wait_for()
        visit.page.keyboard.press("Escape")
        meaning.wait_for(state="detached")


def test_a_tap_opens_a_meaning_without_a_script(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 800}, has_touch=True, java_script_enabled=False)
    page.goto(f"{address}/book/{CHAPTER}.html")
    term, says = first_term(page)
    term.tap()
    page.locator(OPEN).wait_for()
    assert lines(page.locator(OPEN)) == says
    page.locator("article h1").tap()
    page.locator(OPEN).wait_for(state="detached")
    page.close()


@pytest.mark.parametrize("name", [CHAPTER, "notation"])
def test_a_meaning_opens_within_a_phones_screen_beside_its_term(browser, address, name):
    with Visit(browser, f"{address}/book/{name}.html", width=390) as visit:
        assert visit.page.locator(BUTTON).count() > 2
        for term in visit.page.locator(BUTTON).all():
            term.evaluate("term => { term.scrollIntoView({block: 'center', behavior: 'instant'}); term.click(); }")
            word, meaning = term.bounding_box(), visit.page.locator(OPEN).bounding_box()
            assert meaning["x"] >= 0 and meaning["x"] + meaning["width"] <= 390
            assert 0 < meaning["y"] - (word["y"] + word["height"]) < 20
            assert meaning["y"] + meaning["height"] <= 900


def test_the_glossary_shows_its_meanings_on_a_phone(browser, address):
    with Visit(browser, f"{address}/book/glossary.html#term-perplexity", width=390) as visit:
        meaning = visit.page.locator("tr:target td").last.bounding_box()
        assert meaning["x"] >= 0 and meaning["x"] + meaning["width"] <= 390
        assert 0 <= meaning["y"] < 900


def test_a_comma_stays_on_its_terms_line(browser, address):
    apart = """unbroken => {
      const middle = node => {
        const range = new Range();
        range.selectNodeContents(node);
        const box = range.getBoundingClientRect();
        return (box.top + box.bottom) / 2;
      };
      const paragraph = unbroken.closest('p'), term = unbroken.querySelector('button'), found = [];
      term.textContent = 'term';
      unbroken.replaceChildren(term, ',');
      paragraph.replaceChildren('some words in front ', unbroken, ' and some behind');
      for (let width = 60; width < 200; width++) {
        paragraph.style.width = width + 'px';
        if (Math.abs(middle(term) - middle(term.nextSibling)) > 8) found.push(width);
      }
      return found; }"""
    with Visit(browser, f"{address}/book/{CHAPTER}.html") as visit:
        assert visit.page.locator(".unbroken").first.evaluate(apart) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_an_open_meaning_is_accessible(browser, address, theme):
    from axe_playwright_python.sync_playwright import Axe

    with Visit(browser, f"{address}/book/{CHAPTER}.html", theme=theme) as visit:
        visit.page.locator(BUTTON).nth(1).click()
        visit.page.locator(OPEN).wait_for()
        found = Axe().run(visit.page).response["violations"]
        grave = [
            (rule["id"], node["html"][:200])
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
        assert grave == []


def test_meanings_open_from_disk_and_are_no_part_of_the_text(browser, html):
    with Visit(browser, (html / "book" / f"{CHAPTER}.html").as_uri()) as visit:
        page = visit.page
        assert "In the glossary" not in page.locator("article").inner_text()
        paragraph = page.locator("article p", has=page.locator(BUTTON)).first
        copied = paragraph.evaluate("text => { getSelection().selectAllChildren(text); return `${getSelection()}`; }")
        assert copied.split() == paragraph.text_content().split()
        first_term(page)[0].hover()
        page.locator(OPEN).wait_for()
        assert visit.elsewhere("file://") == [] and visit.faults == []
