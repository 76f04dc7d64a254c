"""The book builds without a warning, and its pages work in a real browser."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from notebook_rules import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = ["index", "setup", "notation", "1-prompts/2-prompts-are-code", "scorecard", "glossary", "references"]
CHAPTER = "1-prompts/2-prompts-are-code"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def html(tmp_path_factory):
    """The folder of a fresh, strict build: every warning is an error."""
    out = tmp_path_factory.mktemp("book")
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", ".", "--all", "--warningiserror", "--keep-going", "--quiet", "--path-output", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def address(html):
    """The book on a plain file server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        if os.environ.get("NOTHING_SKIPPED"):
            pytest.fail("NOTHING_SKIPPED is set and no Chromium is installed")
        pytest.skip("no Chromium here; the page checks need one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page that was opened, with what it asked for and complained of."""

    def __init__(self, browser, url, width=1280, theme="light"):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.requests, self.faults = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url}"))
        self.page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(url, wait_until="networkidle")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()

    def typeset(self):
        """The number of formulas that MathJax has set."""
        self.page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise", timeout=20000)
        self.page.evaluate("MathJax.startup.promise")
        return self.page.locator("mjx-container").count()

    def elsewhere(self, *own):
        return [url for url in self.requests if not url.startswith((*own, "data:", "blob:"))]


@pytest.mark.parametrize("name", PAGES)
def test_page_asks_no_other_host_and_reports_no_error(browser, address, name):
    with Visit(browser, f"{address}/book/{name}.html") as visit:
        assert visit.elsewhere(address) == [] and visit.faults == []


@pytest.mark.parametrize("name", ["notation", CHAPTER])
def test_mathematics_is_set(browser, address, name):
    with Visit(browser, f"{address}/book/{name}.html") as visit:
        assert visit.typeset() > 5
        assert visit.page.locator("mjx-merror").count() == 0
        assert "\\mathbf" not in visit.page.locator("article").inner_text()
        assert visit.elsewhere(address) == [] and visit.faults == []


def test_the_book_works_from_disk(browser, html):
    for name in ("index", CHAPTER):
        with Visit(browser, (html / "book" / f"{name}.html").as_uri()) as visit:
            if name == CHAPTER:
                assert visit.typeset() > 5
                images = visit.page.locator("article img")
                assert images.count() > 5
                assert images.evaluate_all("all => all.every(image => image.complete && image.naturalWidth > 0)")
            assert visit.elsewhere("file://") == [] and visit.faults == []


def test_the_front_address_leads_to_the_index(browser, address):
    with Visit(browser, address) as visit:
        visit.page.wait_for_url("**/book/index.html")
        assert visit.page.locator("h1").first.inner_text().startswith("Tuning Language Models from Scratch")


def test_search_finds_a_term(browser, address):
    with Visit(browser, f"{address}/search.html?q=verbalizer") as visit:
        results = visit.page.locator("#search-results li")
        results.first.wait_for(timeout=20000)
        text = " ".join(results.all_inner_texts())
        assert "Prompts are code" in text and "Glossary" in text
        assert visit.elsewhere(address) == [] and visit.faults == []


def test_the_colab_button_points_at_the_notebook(browser, address):
    from test_notebooks import notebooks

    repository, tag = notebooks.published()
    place = repository.removeprefix("https://github.com/") + f"/blob/{tag}/book/{CHAPTER}.ipynb"
    with Visit(browser, f"{address}/book/{CHAPTER}.html") as visit:
        links = visit.page.locator("a[href*='colab.research.google.com']").evaluate_all("all => all.map(a => a.href)")
        assert links == [f"https://colab.research.google.com/github/{place}"]
        assert (ROOT / "book" / f"{CHAPTER}.ipynb").is_file()


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
        if "prompts" in name or name == "notation":
            visit.typeset()
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
