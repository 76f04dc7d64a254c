"""Pictures on the pages: they lie on no box in either theme, and the map of the index leads to every chapter."""

import io
import itertools

import matplotlib.image
import pytest
from browser import Visit
from notebook_rules import ROOT
from notebooks import parts

CHAPTER = "1-prompts/1-two-ways"


def color(page, x, y):
    """The colour of one pixel of what the window shows, as (red, green, blue)."""
    shot = page.screenshot(clip={"x": x, "y": y, "width": 1, "height": 1})
    return tuple(round(255 * part) for part in matplotlib.image.imread(io.BytesIO(shot))[0, 0, :3])


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_picture_lies_on_the_page_itself(browser, address, theme, width):
    with Visit(browser, f"{address}/book/{CHAPTER}.html", width, theme) as visit:
        pictures = visit.page.locator("article .cell_output img")
        assert pictures.count() > 2
        for picture in pictures.all():
            assert picture.get_attribute("src").endswith(".svg") and len(picture.get_attribute("alt")) > 20
            picture.scroll_into_view_if_needed()
            visit.page.wait_for_function("image => image.complete && image.naturalWidth", arg=picture.element_handle())
            place = picture.bounding_box()
            assert place["x"] >= 0 and place["x"] + place["width"] <= width
            beside = color(visit.page, place["x"] - 4, place["y"] + 3)
            assert color(visit.page, place["x"] + 1, place["y"] + 3) == beside
            assert sum(beside) < 100 if theme == "dark" else beside == (255, 255, 255)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_map_leads_to_every_chapter_by_keyboard(browser, address, width):
    chapters = [chapter for found in parts(ROOT).values() for chapter in found]
    with Visit(browser, f"{address}/book/index.html", width) as visit:
        plan = visit.page.get_by_role("navigation", name="Map of the book")
        for title, to in chapters:
            link = plan.get_by_role("link", name=title, exact=True)
            place = link.bounding_box()
            assert link.get_attribute("href") == to and min(place["width"], place["height"]) >= 24  # WCAG 2.2, 2.5.8
            assert visit.page.request.get(f"{address}/book/{to}").ok
        names = [link.inner_text() for link in plan.locator("a").all()]
        plan.locator("a").first.focus()
        reached = []
        for _ in names:
            reached.append(visit.page.evaluate("document.activeElement.innerText"))
            visit.page.keyboard.press("Tab")
        assert reached == names
        plan.get_by_role("link", name=chapters[1][0]).press("Enter")
        visit.page.wait_for_url(f"**/{chapters[1][1]}")


def test_the_stations_of_the_map_stand_in_a_row_and_on_a_phone_in_a_column(browser, address):
    for width, beside in ((1280, True), (390, False)):
        with Visit(browser, f"{address}/book/index.html", width) as visit:
            places = [station.bounding_box() for station in visit.page.locator(".book-map li").all()]
        assert len(places) == len(parts(ROOT)) and all(place["x"] + place["width"] <= width for place in places)
        for one, other in itertools.pairwise(places):
            assert other["x"] > one["x"] + one["width"] if beside else other["y"] > one["y"] + one["height"]
