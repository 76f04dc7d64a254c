"""Folded cells on the rendered page: a title that is seen, heard and opened, and the code below it."""

import re
import subprocess
import sys

import nbformat
import pytest
from browser import Visit
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import FOLDS, ROOT, read, title

CHAPTER = "2-lora/6-lora"
PAGES = ["1-prompts/2-prompts-are-code", CHAPTER, "scorecard"]
SUMMARIES = "div.cell > details > summary"
TABLE = 'Table: the five likeliest words & their <likelihoods>, from the "likeliest" to the fifth, which isn\'t likely'
CELLS = [
    (["hide-input"], f"# @title {TABLE}\nprint(1)"),
    (["hide-cell"], "# @title ✓ Outputs as in peft's layer\n# tuning/lora.py\nassert 1 < 2\nprint(2)"),
    (["hide-cell", "earlier"], "# @title From earlier: hits_at_1(logits)\nprint(3)"),
]


def build(folder, *cells):
    """Render a book of one page, whose cells are (tags, source) and print their number, into `folder`."""
    made = [new_markdown_cell("# Folds\n\nA sentence.")]
    for number, (tags, source) in enumerate(cells, start=1):
        output = new_output("stream", text=f"printed {number}\n")
        made.append(new_code_cell(source, metadata={"tags": tags}, outputs=[output]))
    language = {"language_info": {"name": "python", "pygments_lexer": "python"}}
    (folder / "source").mkdir()
    nbformat.write(new_notebook(cells=made, metadata=language), folder / "source" / "index.ipynb")
    options = {
        "extensions": "myst_nb,pages.folds",
        "html_static_path": ROOT / "book" / "_static",
        "html_theme": "sphinx_book_theme",
        "nb_execution_mode": "off",
    }
    command = [sys.executable, "-m", "sphinx", "-C", "-q", "-W", "--keep-going", folder / "source", folder / "pages"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    return subprocess.run(command, cwd=ROOT / "lib", capture_output=True, text=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The address of a page with one fold of each kind."""
    folder = tmp_path_factory.mktemp("folds")
    done = build(folder, *CELLS)
    assert done.returncode == 0, done.stderr[-3000:]
    return (folder / "pages" / "index.html").as_uri()


def names(page):
    """The names by which a screen reader knows the folds of a page, as the browser computes them."""
    browser = page.context.new_cdp_session(page)
    root = browser.send("DOM.getDocument", {"depth": 0})["root"]["nodeId"]
    found = browser.send("DOM.querySelectorAll", {"nodeId": root, "selector": SUMMARIES})["nodeIds"]
    asked = [{"nodeId": node, "fetchRelatives": False} for node in found]
    return [browser.send("Accessibility.getPartialAXTree", ask)["nodes"][0]["name"]["value"] for ask in asked]


def tab_to(page, summary):
    """Press Tab until a fold has the focus."""
    for _ in range(200):
        page.keyboard.press("Tab")
        if summary.evaluate("summary => summary === document.activeElement"):
            return
    pytest.fail("the fold was not reached in 200 times Tab")


@pytest.mark.parametrize("name", PAGES)
def test_a_screen_reader_knows_each_fold_by_its_title(browser, address, name):
    cells = [
        cell for cell in read(ROOT / "book" / f"{name}.ipynb").cells if {*FOLDS} & {*cell.metadata.get("tags", [])}
    ]
    with Visit(browser, f"{address}/book/{name}.html") as visit:
        assert visit.page.locator("div.cell details").count() == len(cells) > 0
        assert names(visit.page) == [title(cell) for cell in cells]
        assert "@title" not in visit.page.locator("article").text_content()


def test_a_title_is_text_and_no_markup(browser, small):
    with Visit(browser, small) as visit:
        assert names(visit.page) == [title(new_code_cell(source)) for _, source in CELLS]


def test_a_fold_opens_and_closes_by_keyboard_and_its_code_is_copied_without_the_title(browser, address):
    cell = next(cell for cell in read(ROOT / "book" / f"{CHAPTER}.ipynb").cells if cell.cell_type == "code")
    source = cell.source.split("\n", 1)[1]
    with Visit(browser, f"{address}/book/{CHAPTER}.html") as visit:
        page, summary = visit.page, visit.page.locator(SUMMARIES).first
        code = page.locator("div.cell > details pre").first
        assert not code.is_visible()
        tab_to(page, summary)
        ring = summary.evaluate("summary => getComputedStyle(summary).outline")
        assert "none" not in ring and " 0px" not in ring
        page.keyboard.press("Enter")
        code.wait_for(state="visible")
        assert code.inner_text().strip() == source
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator("div.cell > details button.copybtn").first.click()
        page.locator("button.copybtn.success").wait_for()
        assert page.evaluate("navigator.clipboard.readText()").strip() == source
        summary.focus()
        page.keyboard.press("Space")
        code.wait_for(state="hidden")


def test_a_folded_input_leaves_its_output_in_sight_and_a_folded_cell_hides_it(browser, small):
    with Visit(browser, small) as visit:
        codes, outputs = visit.page.locator("div.cell_input"), visit.page.locator("div.cell_output")
        assert [code.is_visible() for code in codes.all()] == [False, False, False]
        assert [output.is_visible() for output in outputs.all()] == [True, False, False]
        for summary in visit.page.locator(SUMMARIES).all():
            tab_to(visit.page, summary)
            visit.page.keyboard.press("Enter")
        assert [code.inner_text().split("\n")[0] for code in codes.all()] == [
            "print(1)",
            "# tuning/lora.py",
            "print(3)",
        ]
        assert [output.inner_text().strip() for output in outputs.all()] == ["printed 1", "printed 2", "printed 3"]


def test_a_long_title_wraps_on_a_phone(browser, small):
    with Visit(browser, small, width=390) as visit:
        boxes = [summary.bounding_box() for summary in visit.page.locator(SUMMARIES).all()]
        assert boxes[0]["height"] > 2 * boxes[1]["height"]
        assert all(box["x"] + box["width"] <= 390 for box in boxes)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_tick_of_a_check_can_be_read(browser, small, theme):
    """By WCAG's contrast, which axe does not judge for a single character."""
    with Visit(browser, small, theme=theme) as visit:
        tick = visit.page.locator(f"{SUMMARIES} .tick")
        assert tick.inner_text() == "✓"
        colors = tick.evaluate(
            """tick => {
                let ground = tick;
                while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
                return [getComputedStyle(tick).color, getComputedStyle(ground).backgroundColor];
            }"""
        )
        dark, light = sorted(map(luminance, colors))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(color):
    """The relative luminance of a CSS color `rgb(r, g, b)` (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("small_page", [True, False], ids=["small", "chapter"])
def test_opened_folds_have_no_serious_accessibility_violation(browser, address, small, small_page, theme):
    from axe_playwright_python.sync_playwright import Axe

    url = small if small_page else f"{address}/book/{CHAPTER}.html"
    with Visit(browser, url, theme=theme) as visit:
        visit.page.locator("article details").evaluate_all("all => all.forEach(details => { details.open = true })")
        visit.page.evaluate("Promise.all(document.getAnimations().map(animation => animation.finished))")
        rules = Axe().run(visit.page, context="article").response["violations"]
        grave = [rule for rule in rules if rule["impact"] in ("serious", "critical")]
        assert [(rule["id"], node["html"][:200]) for rule in grave for node in rule["nodes"]] == []


def test_a_fold_without_a_title_ends_the_build_and_says_where(tmp_path):
    done = build(tmp_path, *CELLS, (["hide-cell"], "import torch\nprint(4)"))
    assert done.returncode != 0
    fault = "index.ipynb: WARNING: cell 5, which begins 'import torch', is folded and has no title: make its first line"
    assert fault in done.stderr
    assert "cell 4" not in done.stderr
