"""A chart on its page: the still first, alive when the reader reaches it, by keyboard, in both themes, from disk."""

import io
import json
import shutil
from html.parser import HTMLParser

import matplotlib.image
import nbformat
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import Visit, build
from notebook_rules import ROOT
from tuning.charts import MIME_TYPE, choose, planner
from tuning.experiments.record import load_results

PAGE = "book/1-prompts/2-prompts-are-code.html"
BARS = ".chart svg [aria-roledescription=bar]"


def recorded():
    """The choices and, for each, what is said of its bars."""
    return {
        f"{wording['prompt']} …": [
            f"{word['token']!r}: {word['probability']:.3f}" + (", right answer" if word["right"] else "")
            for word in wording["words"]
        ]
        for wording in load_results("wordings")["results"]["P17"]["wordings"]
    }


def reach(visit):
    """Scroll to the chart and wait until it lives."""
    visit.page.locator(".chart").scroll_into_view_if_needed()
    visit.page.locator(BARS).first.wait_for()
    visit.page.locator(".chart img").wait_for(state="detached")


def shown(page):
    return page.locator(BARS).evaluate_all("bars => bars.map(bar => bar.getAttribute('aria-label'))")


def libraries(visit):
    return [url for url in visit.requests if url.endswith("/vega.js")]


def test_the_libraries_come_when_the_chart_is_reached_and_nothing_moves(browser, address):
    with Visit(browser, f"{address}/{PAGE}") as visit:
        still = visit.page.locator(".chart img")
        assert libraries(visit) == [] and still.count() == 1
        assert still.get_attribute("alt").startswith("Five bars, the likeliest words after 'Acapulco")
        height = visit.page.evaluate("document.documentElement.scrollHeight")
        reach(visit)
        assert len(libraries(visit)) == 1
        assert visit.page.evaluate("document.documentElement.scrollHeight") == height
        assert visit.page.locator(".chart details, .chart .vega-actions").count() == 0
        assert visit.elsewhere(address) == [] and visit.faults == []


def test_pages_without_a_chart_ask_for_nothing_of_it(browser, address):
    with Visit(browser, f"{address}/book/glossary.html") as visit:
        assert not [url for url in visit.requests if "/charts." in url or "/vega." in url]


def test_arrow_keys_show_what_is_recorded_for_each_choice(browser, address):
    with Visit(browser, f"{address}/{PAGE}") as visit:
        reach(visit)
        buttons = visit.page.get_by_role("group", name="Which wording makes the model name the country?")
        assert buttons.get_by_role("radio").count() == 8
        buttons.get_by_role("radio").first.focus()
        for place, (choice, labels) in enumerate(recorded().items()):
            if place:
                visit.page.keyboard.press("ArrowDown")
                outline = visit.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none"
            assert buttons.get_by_role("radio", name=choice, exact=True).is_checked()
            visit.page.locator(".chart svg").get_by_text(choice, exact=True).wait_for()  # its title
            assert shown(visit.page) == labels
        assert sum("right answer" in label for labels in recorded().values() for label in labels) > 0


def test_a_choice_made_before_the_chart_lives_counts(browser, address):
    choices = recorded()
    last = list(choices)[-1]
    with Visit(browser, f"{address}/{PAGE}") as visit:
        button = visit.page.get_by_role("radio", name=last, exact=True)
        button.evaluate("button => button.click()")
        assert libraries(visit) == []
        reach(visit)
        assert shown(visit.page) == choices[last]


def test_without_javascript_the_still_is_there(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/{PAGE}")
    still = page.locator(".chart img")
    assert still.is_visible() and len(still.get_attribute("alt")) > 60
    box = still.bounding_box()
    assert box["width"] > 400 and box["height"] > 200
    assert page.locator(".chart input").count() == 0
    context.close()


def test_without_the_libraries_the_still_stays_and_no_button_is_dead(browser, address):
    with Visit(browser, f"{address}/{PAGE}") as visit:
        visit.page.route("**/vega.js", lambda route: route.abort())
        visit.page.locator(".chart").scroll_into_view_if_needed()
        visit.page.locator(".chart fieldset").wait_for(state="detached")
        assert visit.page.locator(".chart img").is_visible()
        assert any("vega.js was not loaded" in fault for fault in visit.faults)


def test_the_chart_lives_from_disk(browser, html):
    with Visit(browser, (html / PAGE).as_uri()) as visit:
        reach(visit)
        assert shown(visit.page) == next(iter(recorded().values()))
        assert visit.elsewhere("file://") == [] and visit.faults == []


def test_the_chart_fits_a_phone(browser, address):
    with Visit(browser, f"{address}/{PAGE}", width=390) as visit:
        for label in visit.page.locator(".chart label").all():
            box = label.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        reach(visit)
        for _ in recorded():
            box = visit.page.locator(".chart svg").bounding_box()
            assert box["width"] > 300 and box["x"] + box["width"] <= 390
            title = visit.page.locator(".chart svg .role-title text").first.bounding_box()
            assert title["x"] + title["width"] <= box["x"] + box["width"]
            visit.page.locator(".chart input:checked").press("ArrowDown")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390


def contrast(picture):
    """Between the lightest and the darkest pixel of a PNG (WCAG 2.1)."""
    parts = matplotlib.image.imread(io.BytesIO(picture))[:, :, :3]  # (height, width, 3), from 0 to 1
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return (luminance.max() + 0.05) / (luminance.min() + 0.05)


def test_words_can_be_read_in_the_theme_that_is_switched_to(browser, address):
    with Visit(browser, f"{address}/{PAGE}") as visit:
        reach(visit)
        words = visit.page.locator(".chart svg .role-title").first
        seen = []
        for theme in ("light", "dark"):
            visit.page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
            visit.page.wait_for_timeout(500)  # the theme's colours fade
            assert contrast(words.screenshot()) >= 4.5
            seen.append(words.locator("text").first.evaluate("text => getComputedStyle(text).fill"))
        assert len(set(seen)) == 2


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_accessibility_violation_once_the_chart_lives(browser, address, theme):
    with Visit(browser, f"{address}/{PAGE}", theme=theme) as visit:
        reach(visit)
        found = Axe().run(visit.page, context=".chart").response
        assert found["violations"] == [] and len(found["passes"]) > 3


class Descriptions(HTMLParser):
    """The text of a page's script elements that hold a chart's description."""

    def __init__(self):
        super().__init__()
        self.inside, self.found = False, []

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "script" and dict(attributes).get("type") == MIME_TYPE
        self.found += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def test_whatever_a_bar_is_called_its_description_arrives_whole(tmp_path):
    """A word may be a tag that would end the script element."""

    rows = [{"choice": "a", "bar": "</script><!-- & é", "value": 1, "right": False}]
    data, metadata = choose(rows, "Why?", "One bar.", "nothing")._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data, metadata=metadata)
    cells = [nbformat.v4.new_markdown_cell("# A chart"), nbformat.v4.new_code_cell("chart", outputs=[output])]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    nbformat.write(book, tmp_path / "index.ipynb")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (tmp_path / "_config.yml").write_text(
        "title: A chart\nexecute: {execute_notebooks: 'off'}\nsphinx: {extra_extensions: [pages.charts]}\n"
    )
    page = Descriptions()
    page.feed((build(tmp_path / "out", tmp_path) / "index.html").read_text(encoding="utf-8"))
    assert [json.loads(text) for text in page.found] == [data[MIME_TYPE]]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A book of two pages: one.ipynb makes a planner, and index.md shows the same."""
    root = tmp_path_factory.mktemp("planned")
    rows = [
        {"choice": {"model": model, "checkpointing": how}, "bar": bar, "parts": {"parameters": size, "states": size}}
        for model, size in (("7B", 12.5), ("65B", 121.6))
        for how in ("on", "off")
        for bar in ("LOMO", "LoRA")
    ]
    data, metadata = planner(rows, "Which bar does your card hold?", "Two bars.")._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data, metadata=metadata)
    cells = [nbformat.v4.new_markdown_cell("# A chart"), nbformat.v4.new_code_cell("chart", outputs=[output])]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    nbformat.write(book, root / "one.ipynb")
    (root / "index.md").write_text("# Its chart\n\n```{chart} one.ipynb\n```\n")
    (root / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters: [{file: one}]\n")
    (root / "_config.yml").write_text(
        "title: A chart\nexecute: {execute_notebooks: 'off'}\nsphinx: {extra_extensions: [pages.charts], "
        f"config: {{html_static_path: ['{ROOT / 'book' / '_static'}']}}}}\n"
    )
    return root


def test_menus_choose_the_planners_setting(browser, planned, tmp_path):
    html = build(tmp_path / "out", planned)
    for page in ("index", "one"):
        with Visit(browser, (html / f"{page}.html").as_uri(), width=390) as visit:
            visit.page.locator(".chart select").first.select_option("65B")  # which may be before the chart lives
            reach(visit)
            visit.page.locator(".chart select").last.select_option("off")
            title = visit.page.locator(".chart svg").get_by_text("model: 65B, checkpointing: off", exact=True)
            title.wait_for()
            assert visit.page.locator(".chart svg").get_by_text("LOMO: 243.2 GiB", exact=True).count() == 1
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
            found = Axe().run(visit.page, context=".chart").response["violations"]
            assert not found, [node["html"] for fault in found for node in fault["nodes"]]


@pytest.mark.parametrize(("named", "message"), [("two.ipynb", "is no file"), ("none.ipynb", "shows no chart; run it")])
def test_a_page_that_asks_for_a_chart_that_is_not_there_is_told(planned, tmp_path, named, message):
    root = tmp_path / "book"
    shutil.copytree(planned, root)
    nbformat.write(nbformat.v4.new_notebook(), root / "none.ipynb")
    (root / "index.md").write_text(f"# Its chart\n\n```{{chart}} {named}\n```\n")
    with pytest.raises(AssertionError, match=message):
        build(tmp_path / "out", root)
