"""The book builds without a warning, and its pages work in a real browser."""

import pytest
from browser import Visit

PAGES = ["index", "setup", "notation", "1-prompts/2-prompts-are-code", "scorecard", "glossary", "references"]
CHAPTER = "1-prompts/2-prompts-are-code"


@pytest.mark.parametrize("name", PAGES)
def test_page_asks_no_other_host_and_reports_no_error(browser, address, name):
    with Visit(browser, f"{address}/book/{name}.html") as visit:
        assert visit.elsewhere(address) == [] and visit.faults == []


@pytest.mark.parametrize("name", ["notation", CHAPTER])
def test_mathematics_is_set(browser, address, name):
    with Visit(browser, f"{address}/book/{name}.html") as visit:
        assert visit.typeset() > 5
        assert "\\mathbf" not in visit.page.locator("article").inner_text()
        assert visit.elsewhere(address) == [] and visit.faults == []


def test_the_book_works_from_disk(browser, html):
    for name in ("index", CHAPTER):
        with Visit(browser, (html / "book" / f"{name}.html").as_uri()) as visit:
            if name == CHAPTER:
                assert visit.typeset() > 5
                images = visit.page.locator("article img")
                assert images.count() > 5
                images.evaluate_all("all => all.forEach(image => { image.loading = 'eager'; })")
                images.evaluate_all("all => Promise.all(all.map(image => image.decode()))")  # fails if one is missing
            assert visit.elsewhere("file://") == [] and visit.faults == []


def test_the_front_address_leads_to_the_index(browser, address):
    with Visit(browser, address) as visit:
        visit.page.wait_for_url("**/book/index.html")
        assert visit.page.locator("h1").first.inner_text().startswith("Tuning Language Models from Scratch")


def test_search_finds_a_term(browser, address):
    with Visit(browser, f"{address}/search.html?q=template") as visit:
        results = visit.page.locator("#search-results li")
        results.first.wait_for(timeout=20000)
        text = " ".join(results.all_inner_texts())
        assert "Prompts are code" in text and "Glossary" in text
        assert visit.elsewhere(address) == [] and visit.faults == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_no_serious_accessibility_violation(browser, address, name, theme):
    """In both themes; the rules include the contrast of text, so a dark page that cannot be read fails."""
    from axe_playwright_python.sync_playwright import Axe

    with Visit(browser, f"{address}/book/{name}.html", theme=theme) as visit:
        assert visit.page.evaluate("document.documentElement.dataset.theme") == theme
        found = Axe().run(visit.page).response["violations"]
        grave = [
            (rule["id"], node["html"][:200], node.get("failureSummary", "")[:300])
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
        assert grave == []


@pytest.mark.parametrize("name", PAGES)
def test_nothing_overflows_a_phone(browser, address, name):
    with Visit(browser, f"{address}/book/{name}.html", width=390) as visit:
        width = visit.page.evaluate("document.documentElement.scrollWidth")
        wide = visit.page.evaluate(
            """() => [...document.querySelectorAll('article *')].filter(element => {
                 for (let up = element; up; up = up.parentElement) {
                     if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(up).overflowX)) return false;
                     if (up.tagName === 'ARTICLE') break;
                 }
                 return element.getBoundingClientRect().right > 391 && element.getBoundingClientRect().width > 0;
               }).map(element => element.outerHTML.slice(0, 120))"""
        )
        assert width <= 390 and wide == []
