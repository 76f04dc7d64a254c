"""Charts to play with: what a notebook gets of them, and what their pictures show."""

import html
import json
import math
import re

import numpy as np
import pytest
import vl_convert
from tuning.charts import INK, MIME_TYPE, VEGA_LITE, WIDEST, WIDTH, Chart, choose, compare, planner
from tuning.plots import COLORS

QUESTION, ALT, SCALE = "Which city is larger?", "Two bars: Lima is the longer one.", "millions of people"
VALUES = {"Peru": {"Lima": 10.1, "Cusco": 0.4}, "Ghana": {"Accra": 2.4, "Kumasi": 3.6, "Tema": 0.2}}
RIGHT = {"Lima", "Kumasi"}
ROWS = [
    {"choice": country, "bar": city, "value": value, "right": city in RIGHT}
    for country, cities in VALUES.items()
    for city, value in cities.items()
]


def changed(number, **values):
    """The rows, with one of them changed."""
    return [row | values if place == number else row for place, row in enumerate(ROWS)]


def bundle(rows=ROWS):
    return choose(rows, QUESTION, ALT, SCALE)._repr_mimebundle_()


def bars(picture):
    """The (label, length in pixels, colour) of each bar of an SVG."""
    found = re.findall(r'<path aria-label="[^"]*"[^>]*aria-roledescription="bar"[^>]*>', picture)
    patterns = (r'aria-label="([^"]*)"', r' d="M[\d.]+,[\d.]+h([\d.]+)v', r'fill="(#\w+)"')
    parts = [[re.search(pattern, path)[1] for pattern in patterns] for path in found]
    return [(label, float(length), color) for label, length, color in parts]


def test_a_notebook_gets_the_chart_its_still_and_a_line():
    data, metadata = bundle()
    assert list(data) == [MIME_TYPE, "image/svg+xml", "text/plain"]
    assert MIME_TYPE == "application/vnd.vegalite.v5+json" and data[MIME_TYPE]["$schema"].endswith("/vega-lite/v5.json")
    assert data[MIME_TYPE]["description"] == ALT and QUESTION in data["text/plain"]
    size = metadata["image/svg+xml"]
    assert f'width="{size["width"]}" height="{size["height"]}"' in data["image/svg+xml"]
    json.dumps(data, allow_nan=False)


def test_two_runs_give_the_same_bytes():
    assert json.dumps(bundle()) == json.dumps(bundle())


def test_values_of_numpy_become_json():
    rows = [row | {"value": np.float32(row["value"]), "right": np.bool_(row["right"])} for row in ROWS]
    spec = json.loads(json.dumps(bundle(rows)[0][MIME_TYPE]))
    assert spec["data"]["values"][0]["value"] == pytest.approx(10.1) and spec["data"]["values"][0]["right"] is True


@pytest.mark.parametrize("country", VALUES)
def test_each_choice_shows_its_own_bars_in_their_order(country):
    spec = bundle()[0][MIME_TYPE]
    (choice,) = spec["params"]
    assert choice["bind"]["options"] == list(VALUES) and choice["value"] == "Peru"
    assert choice["bind"]["name"] == QUESTION
    choice["value"] = country
    picture = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    cities = VALUES[country]
    ends = [", right answer" if city in RIGHT else "" for city in cities]
    labels = [f"{city}: {value:.3f}{end}" for (city, value), end in zip(cities.items(), ends, strict=True)]
    found = bars(picture)
    assert [label for label, _, _ in found] == labels
    assert all(f">{label}</text>" in picture for label in labels)
    assert f">{country}</text>" in picture and f">{SCALE}</text>" in picture
    scale = bars(bundle()[0]["image/svg+xml"])[0][1] / VALUES["Peru"]["Lima"]  # pixels of 1, the same for all choices
    assert [length for _, length, _ in found] == pytest.approx([scale * value for value in cities.values()], abs=0.1)
    assert len({color for label, _, color in found if label.endswith("right answer")}) == 1
    assert len({color for _, _, color in found}) == 2


def test_two_charts_on_a_page_are_two_groups_of_buttons():
    names = [choose(ROWS, question, ALT, SCALE).spec["params"][0]["name"] for question in (QUESTION, "Which is older?")]
    assert len(set(names)) == 2 and all(name.isidentifier() for name in names)


def luminance(color):
    """Relative luminance of a colour such as "#0072B2", from 0 to 1 (WCAG 2.1)."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("background", ["#ffffff", "#14181e"])
def test_all_colours_stand_out_from_a_light_and_a_dark_page(background):
    """By 3 to 1, WCAG's bound for graphics and large letters; on the book's pages words get the theme's own colour."""
    data, _ = bundle()
    assert data[MIME_TYPE]["background"] == "transparent"
    used = {color for _, _, color in bars(data["image/svg+xml"])} | {INK}
    assert used > {COLORS[1]}
    for color in used:
        lighter, darker = sorted((luminance(color), luminance(background)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3, color


@pytest.mark.parametrize(
    ("rows", "question", "alt", "message"),
    [
        ([], QUESTION, ALT, "there are no rows"),
        (changed(1, value=math.nan), QUESTION, ALT, "row 1 has the value nan; drop it, or give a finite number"),
        (changed(0, value=math.inf), QUESTION, ALT, "row 0 has the value inf"),
        (changed(2, value=None), QUESTION, ALT, "row 2 has the value None"),
        (changed(2, value="3"), QUESTION, ALT, "row 2 has the value '3'"),
        ([{"choice": "Peru", "value": 1}], QUESTION, ALT, "row 0 has no bar, right; each row needs choice, bar"),
        (ROWS, "", ALT, "must answer a question"),
        (ROWS, "Cities.", ALT, "'Cities.' is none; write one"),
        (ROWS, QUESTION, " ", "needs alternative text; let alt say"),
        (ROWS, QUESTION, None, "needs alternative text"),
    ],
)
def test_a_chart_that_cannot_be_read_is_refused(rows, question, alt, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(rows, question, alt, SCALE)


def test_any_altair_chart_can_be_shown():
    altair = pytest.importorskip("altair")
    drawing = altair.Chart(altair.Data(values=[{"rank": 1}])).mark_point().encode(x="rank:Q")
    data, _ = Chart(drawing, QUESTION, ALT)._repr_mimebundle_()
    assert data[MIME_TYPE]["mark"] == {"type": "point"} and "<svg" in data["image/svg+xml"]


POINTS = [
    {"choice": "asked", "value": [307, 280, 335], "up": 106, "size": 0.0, "said": ["307 of 1,064", "106 of 160"]},
    {"choice": 'all "weights"', "value": [417, 390, 440], "up": 7, "size": 1.0, "said": ["417 of 1,064", "7 of 160"]},
]


def points(rows=POINTS):
    return compare(rows, "What does it cost?", "Two points.", "countries", "continents")._repr_mimebundle_()[0]


def place_of_points(picture):
    return re.findall(r'transform="translate\(([\d.,]+)\)"[^>]*d="M[\d.]+,0A', picture)


@pytest.mark.parametrize("number", [0, 1])
def test_the_chosen_point_has_its_interval_and_its_words_above(number):
    spec = points()[MIME_TYPE]
    (choice,) = spec["params"]
    assert choice["bind"]["options"] == [row["choice"] for row in POINTS] and choice["value"] == "asked"
    choice["value"] = POINTS[number]["choice"]
    picture = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    written = [html.unescape(text) for text in re.findall(r">([^<]+)</t(?:ext|span)>", picture)]
    assert {POINTS[number]["choice"], *POINTS[number]["said"]} <= set(written)
    assert not [line for line in POINTS[1 - number]["said"] if line in written]
    assert {"countries", "continents"} <= set(written)
    marks = re.findall(r'<path aria-label="([^"]*)"[^>]*aria-roledescription="point"[^>]*>', picture)
    assert [html.unescape(mark) for mark in marks] == [
        ", ".join([f"{r['choice']}: {r['said'][0]}", r["said"][1]]) for r in POINTS
    ]
    assert place_of_points(picture) == place_of_points(points()["image/svg+xml"])  # nothing moves with the choice
    assert picture.count(f'fill="{COLORS[1]}"') == 1 and picture.count(f'stroke="{COLORS[1]}"') == 1


def test_larger_points_cost_more():
    paths = re.findall(
        r'd="M([\d.]+),0A[^"]*"[^>]*>|aria-roledescription="point" d="M([\d.]+)', points()["image/svg+xml"]
    )
    radii = [float(a or b) for a, b in paths]
    assert len(radii) == 2 and radii[1] > 2 * radii[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        ([POINTS[0], POINTS[0]], "each row needs a name of its own, and the names are asked, asked"),
        ([{"choice": "asked", "value": [1, 0, 2], "up": 3}], "row 0 has no size, said"),
        ([POINTS[0] | {"value": [math.nan, 0, 1]}], "row 0 has the value nan"),
    ],
)
def test_points_that_cannot_be_read_are_refused(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        points(rows)


PARTS = {"parameters": 12.55, "optimizer states": 75.31, "gradients": 12.5}


def plans(**changes):
    """Two models, two settings of checkpointing, three bars, one of which has a rank."""
    found = []
    for scale, model in enumerate(("7B", "13B"), 1):
        for how in ("on", "off"):
            for bar, factor in (("AdamW", 1), ("AdamW, 16-bit", 0.5)):
                choice = {"model": model, "checkpointing": how}
                parts = {part: scale * factor * size for part, size in PARTS.items()}
                found.append({"choice": choice, "bar": bar, "parts": parts})
            for rank in ("8", "64"):
                choice = {"model": model, "checkpointing": how, "rank": rank}
                found.append({"choice": choice, "bar": "LoRA", "parts": {part: int(rank) / 8 for part in PARTS}})
    found[4]["measured"] = 101.45
    found[1] |= changes
    return found


def stacked(**chosen):
    """Of the picture for a setting: {what is said of a part of a bar: length}, and all words."""
    spec = planner(plans(), "Which bar fits?", "Bars.").spec
    for param in spec["params"]:
        param["value"] = chosen.get(param["bind"]["name"], param["value"])
    picture = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    words = [html.unescape(text) for text in re.findall(r">([^<]+)</t(?:ext|span)>", picture)]
    return {label: length for label, length, _ in bars(picture)}, words


def test_the_planner_begins_where_something_was_measured():
    spec = planner(plans(), "Which bar fits?", "Bars.").spec
    menus = {param["bind"]["name"]: param for param in spec["params"]}
    options = {name: param["bind"]["options"] for name, param in menus.items()}
    assert options == {"model": ["7B", "13B"], "checkpointing": ["on", "off"], "rank": ["8", "64"]}
    assert {name: param["value"] for name, param in menus.items()} == {
        "model": "7B",
        "checkpointing": "off",
        "rank": "8",
    }
    assert all(param["bind"]["input"] == "select" for param in menus.values())
    assert len({param["name"] for param in menus.values()}) == 3
    lengths, words = stacked()
    assert "AdamW: 100.4 GiB, measured 101.5" in words and "16" in words and "80" in words
    assert {"Which bar fits?", "model: 7B, checkpointing: off", "rank: 8"} <= set(words)
    assert len(lengths) == 9


@pytest.mark.parametrize(("model", "rank"), [("7B", "8"), ("13B", "64")])
def test_the_bars_are_those_of_the_setting_that_is_chosen(model, rank):
    lengths, words = stacked(model=model, rank=rank, checkpointing="on")
    scale, adapters = (1, 1) if model == "7B" else (2, 8)
    totals = [scale * 100.36, scale * 50.18, 3 * adapters]
    names = ["AdamW", "AdamW, 16-bit", "LoRA"]
    said = [f"{name}: {total:.1f} GiB" for name, total in zip(names, totals, strict=True)]
    assert [word for word in words if "GiB" in word and ":" in word] == said
    pixel = lengths[f"{said[2]}; gradients {adapters}"] / adapters
    assert pixel == pytest.approx(WIDTH / WIDEST, rel=0.01)  # pixels a GiB
    half = lengths[f"{said[1]}; parameters {scale * 6.275:.1f}"]
    assert half == pytest.approx(pixel * round(scale * 6.275, 1), rel=0.01)


def test_a_planner_of_a_thousand_rows_is_small():
    rows = [
        row | {"choice": row["choice"] | {"tokens": str(tokens)}} for tokens in range(64) for row in plans(measured=1)
    ]
    assert len(rows) > 1000 and len(json.dumps(planner(rows, "Which bar fits?", "Bars.").spec)) < 75_000


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        ([{"choice": {}, "bar": "LOMO"}], "row 0 has no parts"),
        (plans(parts=PARTS | {"gradients": math.nan}), "row 1 has the value nan"),
        (plans(parts=PARTS | {"gradients": None}), "row 1 has the value nan"),
        (plans(parts={"parameters": 1.0}), "row 1 has the parts parameters; expected parameters, optimizer states"),
        (plans(bar="AdamW"), "row 1 is a second bar 'AdamW' for {'model': '7B', 'checkpointing': 'on'}"),
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        planner(rows, "Which bar fits?", "Bars.")
