"""Drawings: readable on a telephone, nothing overlaps, and each says in words what it shows."""

import itertools
import math
import re

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path
from matplotlib.text import Text
from test_plots import in_the_dark, lightness, luminance
from tuning import drawings
from tuning.drawings import (
    FROZEN,
    PHONE,
    SENT,
    TRAINED,
    Drawing,
    attention,
    book_map,
    four_places,
    four_ways,
    lora,
    p_tuning,
    prompt_in_front,
    template,
)

DRAWINGS = {
    "lora": lambda: lora(538_060_032, 9_768_960),
    "attention": lambda: attention(["The", "bank", "of", "the", "river"]),
    "p_tuning": p_tuning,
    "four_places": four_places,
    "four_ways": four_ways,
    "template": template,
    "prompt_in_front": prompt_in_front,
    "prompt_in_front of one": lambda: prompt_in_front(1),
    "prompt_in_front of six": lambda: prompt_in_front(6),
}
every = pytest.mark.parametrize("name", DRAWINGS)


def texts(figure):
    """(text, box) of each label, the box in pixels of the figure."""
    figure.canvas.draw()
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.axes and text not in ticks(text.axes)]
    return [(text, text.get_window_extent()) for text in shown]


def ticks(axes):
    return [*axes.get_xticklabels(), *axes.get_yticklabels()]


def test_every_drawing_is_tried_here():
    assert {name.split()[0] for name in DRAWINGS} == set(drawings.__all__) - {"Drawing", "book_map"}


@every
def test_labels_are_12_px_high_on_a_telephone(name):
    figure = DRAWINGS[name]().figure
    per_point = PHONE / figure.get_figwidth() / 72
    assert all(text.get_fontsize() * per_point >= 11.999 for text, _ in texts(figure))


@every
def test_labels_lie_inside_and_do_not_overlap(name):
    figure = DRAWINGS[name]().figure
    labels = texts(figure)
    assert len(labels) > 8
    for text, place in labels:
        assert place.x0 >= 0 and place.y0 >= 0, text
        assert place.x1 <= figure.bbox.width and place.y1 <= figure.bbox.height, text
    for (one, place), (other, elsewhere) in itertools.combinations(labels, 2):
        assert not place.overlaps(elsewhere), f"{one.get_text()!r} and {other.get_text()!r}"


@every
def test_no_edge_or_arrow_runs_through_a_label(name):
    figure = DRAWINGS[name]().figure
    for text, place in texts(figure):
        for patch in figure.findobj(lambda artist: isinstance(artist, Rectangle | FancyBboxPatch | FancyArrowPatch)):
            if patch is figure.patch or patch is text.axes.patch:
                continue
            for line in patch.get_path().to_polygons(patch.get_transform(), closed_only=False):
                assert not Path(line).intersects_bbox(place, filled=False), f"{text.get_text()!r} and {patch}"


@pytest.mark.parametrize("theme", [list, in_the_dark], ids=["light", "dark"])
def test_frozen_trained_and_sent_differ_in_grey_and_a_label_can_be_read_on_each(theme):
    fills = [theme(to_rgb(look["facecolor"])) for look in (FROZEN, SENT, TRAINED)]
    greys = [lightness(fill) for fill in fills]
    assert all(abs(one - other) > 6 for one, other in itertools.combinations(greys, 2))
    assert abs(greys[0] - greys[2]) > 15  # these two stand side by side
    ink = luminance(theme(to_rgb(drawings.INK)))
    for fill in fills:
        dark, light = sorted((luminance(fill), ink))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, 1.4.3


@every
def test_the_same_drawing_has_the_same_bytes_and_says_what_it_shows(name):
    first, second = (DRAWINGS[name]()._repr_mimebundle_() for _ in range(2))
    assert first == second
    assert first["image/svg+xml"].startswith("<?xml") and "dc:date" not in first["image/svg+xml"]
    assert first["text/plain"] == DRAWINGS[name]().alt and len(first["text/plain"].split()) > 30


@pytest.mark.parametrize("alt", ["", "LoRA", "A drawing of LoRA"])
def test_a_drawing_without_alternative_text_is_refused(alt):
    with pytest.raises(ValueError, match="needs a text that says what it shows"):
        Drawing(Figure(), alt)


def test_loras_sizes_are_those_given_and_its_squares_are_to_scale():
    drawing = lora(2_000_000_000, 80_000_000)
    written = " ".join(text.get_text() for text, _ in texts(drawing.figure))
    assert "2000 MB once" in written.replace("\n", " ") and "80 MB a task" in written.replace("\n", " ")
    assert "2000 MB once" in drawing.alt and "80 MB a task" in drawing.alt
    squares = [
        (patch.get_facecolor()[:3], patch.get_width())
        for patch in drawing.figure.findobj(Rectangle)
        if patch.get_width() == patch.get_height() and patch.get_y() < 60 and patch.get_linewidth()
    ]
    grey, orange = (width for _, width in squares)
    assert (grey / orange) ** 2 == pytest.approx(2_000 / 80)
    colors = [tuple(round(255 * part) for part in color) for color, _ in squares]
    assert colors == [tuple(int(look["facecolor"][i : i + 2], 16) for i in (1, 3, 5)) for look in (FROZEN, TRAINED)]


@pytest.mark.parametrize(("n", "text"), [(538_060_032, "538 MB"), (9_768_960, "9.8 MB"), (18_400_000, "18 MB")])
def test_sizes_are_written_short(n, text):
    assert drawings.megabytes(n) == text


@pytest.mark.parametrize("sizes", [(9_768_960, 538_060_032), (538, 0), (5, 5)])
def test_loras_sizes_the_wrong_way_round_are_refused(sizes):
    with pytest.raises(ValueError, match="give both files' sizes in bytes"):
        lora(*sizes)


@pytest.mark.parametrize("n", [3, 5])
def test_a_causal_model_is_drawn_looking_back_only(n):
    lines = attention(list("abcde"[:n])).figure.axes[0].lines
    looks = [line.get_xdata() for line in lines]
    both, back = looks[: n * n], looks[n * n :]
    assert len(back) == n * (n + 1) / 2
    assert any(to > start for start, to in both) and all(to <= start for start, to in back)


def test_a_text_too_wide_for_its_place_is_refused():
    with pytest.raises(ValueError, match=r"no room for \['incomprehensibilities'\]; give fewer or shorter"):
        attention(["The", "incomprehensibilities", "of", "the", "river"])
    with pytest.raises(ValueError, match="at least three tokens"):
        attention(["The", "bank"])


def fills(figure, look):
    """The boxes of a figure that have a look's fill."""
    wanted = to_rgb(look["facecolor"])
    return [box for box in figure.findobj(Rectangle) if box.get_linewidth() and box.get_facecolor()[:3] == wanted]


def test_each_token_of_a_template_has_a_vector_and_nothing_is_trained():
    figure = template().figure
    tokens = [box for box in fills(figure, SENT) if box.get_y() < 300]
    vectors = {round(box.get_x() + box.get_width() / 2) for box in fills(figure, FROZEN) if box.get_width() < 30}
    assert vectors == {round(box.get_x() + box.get_width() / 2) for box in tokens} and len(vectors) == 5
    assert not fills(figure, TRAINED)


@pytest.mark.parametrize("length", [1, 4, 6])
def test_as_many_vectors_are_kept_as_are_trained(length):
    drawing = prompt_in_front(length)
    trained = fills(drawing.figure, TRAINED)
    above = {box.get_x() for box in trained if box.get_y() > 100}
    kept = {box.get_x() for box in trained if box.get_y() < 100}
    assert len(above) == len(kept) == length
    assert f"({length}, hidden)" in drawing.alt


@pytest.mark.parametrize("length", [0, 7])
def test_more_trained_vectors_than_have_room_are_refused(length):
    with pytest.raises(ValueError, match="1 to 6 trained vectors"):
        prompt_in_front(length)


def test_two_models_of_four_are_trained_and_one_has_vectors():
    figure = four_ways().figure
    grey, orange = ([box for box in fills(figure, look) if box.get_width() == 156] for look in (FROZEN, TRAINED))
    assert len(grey) == len(orange) == 2
    assert len([box for box in fills(figure, TRAINED) if box.get_width() < 10]) == 6 * 4
    assert len(fills(figure, SENT)) == 4


# --- the map

CHAPTERS = {
    "Asking": [("1. Two ways", "1-prompts/1.html"), ("2. A < B & C", "1-prompts/2.html")],
    "Few bytes": [("12. LOMO", "4-lomo/12.html")],
}


def test_the_map_has_the_parts_in_order_and_a_link_with_a_name_for_each_chapter():
    html = book_map(CHAPTERS)
    assert re.findall(r'class="part" href="([^"]+)">([^<]+)', html) == [
        ("1-prompts/1.html", "Asking"), ("4-lomo/12.html", "Few bytes"),
    ]  # fmt: skip
    assert html.index("Asking") < html.index("2. A") < html.index("Few bytes") < html.index("12. LOMO")
    title = "2. A &lt; B &amp; C"
    assert f'<a href="1-prompts/2.html" title="{title}" aria-label="{title}">2</a>' in html and "A < B" not in html
    assert all(answer in html for answer in drawings.PARTS["Asking"][:2])
    assert drawings.PARTS["Low rank"][1] not in html


def test_a_part_of_which_the_map_knows_nothing_is_refused():
    with pytest.raises(ValueError, match=r"no part 'At work'; say in tuning.drawings.PARTS"):
        book_map({"At work": [("15. Choosing", "6-work/15.html")]})


def test_signs_keep_inside_their_square():
    for _, _, boxes in drawings.PARTS.values():
        assert all(min(x, y) >= 6 and max(x + w, y + h) <= 58 for x, y, w, h, _ in boxes)
        assert math.isclose(max(y + h for _, y, _, h, _ in boxes), 58)
