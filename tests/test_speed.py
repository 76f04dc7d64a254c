"""Pages open at once, their formulas need no script, and what the theme offers still works."""

import gzip
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pydata_sphinx_theme
import pytest
import yaml
from browser import Visit
from bs4 import BeautifulSoup
from fontTools.ttLib import TTFont
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from notebook_rules import ROOT
from pages import formulas, speed
from sphinx.errors import ExtensionError
from tuning.experiments import bench

CHAPTERS = ["1-prompts/2-prompts-are-code", "2-lora/6-lora"]


@pytest.fixture(scope="module")
def pages(html):
    """{name: the page, parsed} of all pages that the theme wrote."""
    paths = [path for path in html.rglob("*.html") if path.parent.name != "_static" and path != html / "index.html"]
    return {path.relative_to(html).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in paths}


# What a page asks for


@pytest.mark.parametrize("name", ["index", *CHAPTERS])
def test_what_a_page_asks_for_is_little(browser, address, html, name):
    """In kilobytes as a server sends them, text compressed by gzip; without pictures, and without a chart's library."""
    with Visit(browser, f"{address}/book/{name}.html", width=390) as visit:
        files = {html / urlparse(url).path.lstrip("/") for url in visit.requests if not url.startswith("data:")}
    assert html / "book" / f"{name}.html" in files
    counted = [file for file in files if "_images" not in file.parts and "charts" not in file.name]
    sizes = {
        file.name: len(file.read_bytes() if file.suffix == ".woff2" else gzip.compress(file.read_bytes())) / 1000
        for file in counted
    }
    assert sum(sizes.values()) < 250, sizes


def blocking(page):
    """Scripts from files that a browser runs before it shows the page: neither deferred nor behind all content."""
    found = []
    for script in page.select("script[src]"):
        waits = script.has_attr("defer") or script.has_attr("async") or script.get("type") == "module"
        behind = not script.find_parent("head") and not any(
            tag.name not in ("script", "footer") for tag in script.find_all_next(True)
        )
        if not (waits or behind):
            found.append(script["src"])
    return found


def test_no_script_comes_before_the_first_paint(pages):
    assert blocking(BeautifulSoup("<head><script src=a.js></script></head><body><p>Text</p></body>", "html.parser"))
    assert blocking(BeautifulSoup("<body><script src=a.js></script><p>Text</p></body>", "html.parser"))
    assert len(pages) > 20
    assert {name: found for name, page in pages.items() if (found := blocking(page))} == {}


def test_pictures_keep_their_place_and_come_late(pages, browser, address):
    pictures = {name: page.select("article img") for name, page in pages.items()}
    assert sum(map(len, pictures.values())) > 30
    for name, images in pictures.items():
        for image in images:
            assert image.get("width") and image.get("height"), (name, image["src"])
    with Visit(browser, f"{address}/book/{CHAPTERS[1]}.html", width=390) as visit:
        image = visit.page.locator("article img[loading=lazy]").last
        assert not image.evaluate("image => image.complete && image.naturalWidth > 0")
        box = image.bounding_box()
        image.scroll_into_view_if_needed()
        visit.page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
        assert abs(image.bounding_box()["height"] - box["height"]) < 1  # sizes are written in whole pixels


HEAD = """<head><script data-cfasync="false">theme()</script>
<script defer src="_static/scripts/fontawesome.js?digest=1"></script>
<link rel="preload" as="script" href="bootstrap.js" /><link rel="preload" as="script" href="theme.js" />
<script src="_static/doctools.js"></script><script>OPTIONS.name = 1;</script>
<script src="_static/searchtools.js"></script><script src="_static/language_data.js"></script>
<script src="searchindex.js"></script></head>"""
PAGE = f'<html>{HEAD}<body><article>{"word " * 400}<img src="far.png"></article></body></html>'


def test_a_page_is_rewritten():
    html = speed.rewrite(PAGE, "book/index", lambda source: (20, 10))
    head, body = html.split("</head>")
    assert head.split() == ["<html><head><script", 'data-cfasync="false">theme()</script>']
    assert body.endswith(
        '<script src="_static/doctools.js"></script><script>OPTIONS.name = 1;</script>\n</body></html>'
    )
    assert '<img width="20" height="10" loading="lazy" src="far.png">' in body
    assert "searchtools.js" in speed.rewrite(PAGE, "search", lambda source: (-1, -1))


@pytest.mark.parametrize("part", ["fontawesome.js", 'as="script" href="theme', "searchindex.js", "language_data.js"])
def test_a_page_in_which_the_theme_wrote_something_else_stops_the_build(part):
    with pytest.raises(ExtensionError, match=r"book/index has .*see what the theme writes now"):
        speed.rewrite(PAGE.replace(part, "other"), "book/index", lambda source: (-1, -1))


def test_a_style_sheet_without_icons_stops_the_build():
    with pytest.raises(ExtensionError, match=r"theme.css has .*see what the theme writes now"):
        speed.cut_icons("p{color:red}", "fa-bars", "", "theme.css")


# Icons


def test_every_icon_that_is_used_is_there(html, pages):
    """By the theme's own style sheet, as it was before it was cut."""
    theme = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static" / "styles"
    rule = r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\(\w+)"\}'
    code = {
        name: int(number, 16)
        for names, number in re.findall(rule, (theme / "pydata-sphinx-theme.css").read_text("utf-8"))
        for name in re.findall(r"fa-[\w-]+", names)
    }
    used = {name for page in pages.values() for tag in page.select("[class*=fa-]") for name in tag["class"]} & set(code)
    assert {"fa-bars", "fa-download", "fa-magnifying-glass", "fa-circle-half-stroke"} <= used
    fonts = html / "_static" / "vendor" / "fontawesome" / "webfonts"
    characters = TTFont(fonts / "fa-solid-900.woff2").getBestCmap()
    assert {name for name in used | {"fa-xmark"} if code[name] not in characters} == set()
    assert all((fonts / f"{name}.woff2").stat().st_size < 10_000 for name in speed.ICON_FONTS)


def test_icons_show(browser, address):
    with Visit(browser, f"{address}/book/{CHAPTERS[0]}.html") as visit:
        icon = visit.page.locator(".article-header-buttons .fa-download")
        shown = icon.evaluate("icon => getComputedStyle(icon, '::before').content")
        assert len(shown.strip('"')) == 1 and icon.bounding_box()["width"] > 5
        assert visit.page.evaluate("""[...document.fonts].some(
            font => font.family.includes('Awesome') && font.status == 'loaded')""")


# Search, and what else the theme offers


@pytest.mark.parametrize("opened_by", ["keyboard", "button"])
def test_search_finds_a_term(browser, address, opened_by):
    with Visit(browser, f"{address}/book/index.html") as visit:
        assert not any("search" in url for url in visit.requests)
        if opened_by == "keyboard":
            visit.page.keyboard.press("Control+k")
        else:
            visit.page.locator(".search-button__button >> visible=true").first.click()
        visit.page.keyboard.type("template")
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_url("**/search.html?q=template")
        results = visit.page.locator("#search-results li")
        results.first.wait_for(timeout=20000)
        assert "Prompts are code" in " ".join(results.all_inner_texts())
        assert visit.elsewhere(address) == [] and visit.faults == []


def test_search_works_from_disk(browser, html):
    with Visit(browser, f"{(html / 'search.html').as_uri()}?q=template") as visit:
        results = visit.page.locator("#search-results li")
        results.first.wait_for(timeout=20000)
        assert "Prompts are code" in " ".join(results.all_inner_texts())


def test_theme_side_bar_and_copying(browser, address):
    with Visit(browser, f"{address}/book/{CHAPTERS[0]}.html") as visit:
        page = visit.page
        mode = page.evaluate("document.documentElement.dataset.mode")
        page.locator(".theme-switch-button >> visible=true").first.click()
        assert page.evaluate("document.documentElement.dataset.mode") != mode
        bar = page.locator("#pst-primary-sidebar")
        assert bar.is_visible()
        page.locator("button.primary-toggle >> visible=true").first.click()
        bar.wait_for(state="hidden")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        code = page.locator("div.cell_input div.highlight >> visible=true").first
        code.hover()
        code.locator("button.copybtn").click()
        assert page.evaluate("navigator.clipboard.readText()").strip() == code.locator("pre").inner_text().strip()
        assert visit.faults == []


# Formulas


def sources():
    """{page: the number of formulas in its source} of all pages that have any, by a Markdown parser."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    markdown = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)
    found = {}
    for name in re.findall(r"'(?:file|root)': '([^']+)'", str(toc)):
        if (path := ROOT / f"{name}.md").is_file():
            texts = [path.read_text("utf-8")]
        else:
            cells = json.loads((ROOT / f"{name}.ipynb").read_text("utf-8"))["cells"]
            texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        tokens = [
            token for text in texts for block in markdown.parse(text) for token in [block, *(block.children or ())]
        ]
        if count := sum(token.type.startswith("math_") for token in tokens):
            found[f"{name}.html"] = count
    return found


def test_every_formula_of_the_sources_stands_on_its_page(pages):
    expected = sources()
    assert sum(expected.values()) > 300
    shown = {name: len(page.select("article math")) for name, page in pages.items()}
    assert {name: count for name, count in shown.items() if count} == expected


def test_no_page_shows_raw_tex(pages):
    found = {}
    for name, page in pages.items():
        for tag in page.select("article :is(pre, code, script, math)"):
            tag.decompose()
        article = page.select_one("article")
        if raw := re.findall(r"\\[a-zA-Z]{2,}.{0,20}", article.get_text() if article else ""):
            found[name] = raw
    assert found == {}


def test_the_font_has_every_character_of_the_formulas(pages):
    """A single letter is shown in its italic form, e.g. 𝑊, which is a character of its own."""
    font = TTFont(ROOT / "book" / "_static" / "fonts" / "stix-two-math.woff2").getBestCmap()
    needed = {char for page in pages.values() for math in page.select("math") for char in math.get_text()}
    needed |= {
        formulas.letter(char, "italic") for char in needed if char.isalpha() and ord(char) < 0x3D0 and char != "h"
    }
    missing = {char for char in needed if ord(char) not in font}
    assert missing == set(), "add them to CHARACTERS in lib/tools/fonts.py and run it"


@pytest.mark.parametrize("place", ["server", "disk"])
def test_formulas_are_set_in_their_font(browser, html, address, place):
    start = address if place == "server" else html.as_uri()
    with Visit(browser, f"{start}/book/{CHAPTERS[1]}.html") as visit:
        assert visit.typeset() == sources()[f"book/{CHAPTERS[1]}.html"]
        assert visit.page.evaluate("""[...document.fonts].some(
            font => font.family.includes('STIX Two Math') && font.status == 'loaded')""")


def test_formulas_never_widen_a_phone(browser, html, pages):
    for name in sources():
        with Visit(browser, (html / name).as_uri(), width=390) as visit:
            visit.page.locator("details").evaluate_all("all => all.forEach(fold => { fold.open = true; })")
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390, name
            wide = "all => all.filter(one => one.getBoundingClientRect().right > 391).map(one => one.innerHTML)"
            assert visit.page.locator("article span.math:not(table *)").evaluate_all(wide) == [], name


def spaces(tex, display=False):
    """What stands side by side in a formula: texts, and widths of spaces in em."""
    math = BeautifulSoup(formulas.mathml(tex, display), "html.parser")
    tokens = math.select("mi, mo, mn, mtext, mspace")
    return [float(token["width"].removesuffix("em")) if token.name == "mspace" else token.text for token in tokens]


THIN, MEDIUM, THICK = 0.167, 0.222, 0.278


@pytest.mark.parametrize(
    ("tex", "expected"),  # by The TeXbook, chapter 18
    [
        ("a + b = -c", ["a", MEDIUM, "+", MEDIUM, "b", THICK, "=", THICK, "−", "c"]),
        (r"\log p(x, y)", ["log", THIN, "p", "(", "x", ",", THIN, "y", ")"]),
        (r"\max(a/b, 1)", ["max", "(", "a", "/", "b", ",", THIN, "1", ")"]),
        (r"2\lVert x \rVert^2", ["2", "‖", "x", "‖", "2"]),
        (r"x_{i+1}", ["x", "i", "+", "1"]),
        (r"x\left(\frac12\right)", ["x", THIN, "(", "1", "2", ")"]),
        (r"\mathrm{mean}(x)", ["mean", "(", "x", ")"]),
        (r"A'_j B'", ["A", "′", "j", "B", "′"]),
        (r"x \sim y", ["x", THICK, "∼", THICK, "y"]),
    ],
)
def test_spaces_are_tex_s(tex, expected):
    assert spaces(tex) == expected


def test_letters_limits_and_tables():
    assert "<mi>ℒ</mi>" in formulas.mathml(r"\mathcal L") and "<mi>ℝ</mi>" in formulas.mathml(r"\mathbb R")
    assert "<mi>𝐞</mi>" in formulas.mathml(r"\mathbf e") and "<mi>𝜽</mi>" in formulas.mathml(r"\boldsymbol\theta")
    assert '<mi mathvariant="normal">Δ</mi><mi>W</mi>' in formulas.mathml(r"\Delta W")
    assert "<munder>" in formulas.mathml(r"\max_x", display=True) and "<msub>" in formulas.mathml(r"\max_x")
    table = BeautifulSoup(formulas.mathml(r"\begin{aligned} a &= b \\ &= c \end{aligned}", True), "html.parser")
    assert [cell["style"].split(";")[0] for cell in table.select("mtd")] == ["text-align:right", "text-align:left"] * 2
    assert BeautifulSoup(formulas.mathml("a < b"), "html.parser").math["alttext"] == "a < b"


@pytest.mark.parametrize(
    ("tex", "message"),
    [
        (r"a \unheard b", r"\\unheard is not known"),
        (r"\frac{a", "braces"),
        (r"\frac{a}", "has 1 parts and needs 2"),
        (r"\left( a", "ExtraLeftOrMissingRight"),
        (r"\text{of $x$}", "is not known"),
        (r"\mathfrak{1}", "there is no fraktur 1"),
    ],
)
def test_a_formula_that_cannot_be_set_is_an_error(tex, message):
    with pytest.raises(ValueError, match=message):
        formulas.mathml(tex)


def test_a_build_with_such_a_formula_fails_and_names_it(tmp_path):
    (tmp_path / "conf.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'lib')!r})\nextensions = ['myst_parser', 'pages.formulas']\n"
        "myst_enable_extensions, html_math_renderer = ['dollarmath'], 'mathml'\n"
    )
    (tmp_path / "index.md").write_text("# Page\n\nLet $\\unheard x$ be.\n\n$$x$$ (label)\n")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", tmp_path, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(r"index.md:3: .*unheard x' is not shown: .*unheard is not known; write it otherwise", done.stderr)
    assert re.search(r"index.md:5: .*a formula has a number, and none is shown", done.stderr)


# The bench


def test_the_bench_serves_text_compressed(tmp_path):
    (tmp_path / "page.html").write_text("word " * 1000)
    (tmp_path / "font.woff2").write_bytes(bytes(1000))

    def asked(name, accepted):
        request = urllib.request.Request(f"{address}/{name}", headers={"Accept-Encoding": accepted})
        with urllib.request.urlopen(request) as answer:
            return answer.headers["Content-Encoding"], answer.headers["Cache-Control"], answer.read()

    with bench.served(tmp_path) as address:
        coding, kept, data = asked("page.html", "gzip, br")
        assert (coding, kept) == ("gzip", "max-age=600") and gzip.decompress(data) == b"word " * 1000
        assert asked("page.html", "br")[::2] == (None, b"word " * 1000)
        assert asked("font.woff2", "gzip")[::2] == (None, bytes(1000))
        with pytest.raises(urllib.error.HTTPError, match="404"):
            asked("other.html", "gzip")


def test_the_bench_says_where_lighthouse_cannot_run(monkeypatch):
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    measured = bench.measure_pages()
    assert measured == {"Lighthouse": "not measured: there is no npm here"}
    assert "not measured" in bench.table({"pages": measured})[1]


def test_rows_that_are_not_measured_anew_stay():
    place = {"commit": "a", "date": "2026-01-01", "machine": "one", "versions": {}}
    other = place | {"commit": "b"}
    earlier = {"provenance": place | {"seconds": 9}, "results": {"load": {"s": 1}, "pages": {"x": 1}}}
    new = {
        "provenance": other | {"seconds": 2},
        "origins": [{"place": other, "seconds": {"pages": 2}}],
        "results": {"pages": {"x": 3}},
    }
    after = bench.merged(earlier, new)
    assert after["results"] == {"load": {"s": 1}, "pages": {"x": 3}} and after["provenance"]["commit"] == "b"
    assert after["origins"] == [{"place": place, "seconds": {"all": 9}}, *new["origins"]]
    again = bench.merged(after, new)
    assert again["origins"] == after["origins"] and again["results"] == after["results"]
