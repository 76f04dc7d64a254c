"""Figures: the same bytes each time, transparent, titles that stay inside, colours for both themes and for grey."""

import io
import itertools

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from tuning import plots
from tuning.plots import COLORS, SVG, dots_with_intervals, figure, panels

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(title="A finding"):
    fig, axes = figure(title, "x", "y")
    axes.plot([1, 3, 2], label="some")
    axes.legend()
    out = io.StringIO()
    fig.savefig(out, format="svg", **SVG)
    return out.getvalue()


def test_the_same_figure_has_the_same_bytes_no_date_and_no_font():
    first = drawn()
    assert first == drawn() and first != drawn("Another finding")
    assert "<date>" not in first and "dc:date" not in first and "<text" not in first


def test_a_notebook_shows_figures_as_svg_whole_and_twice_the_same():
    code = "import matplotlib.pyplot as plt\nfrom tuning.plots import figure\n\nfigure('A finding')\nplt.show()"
    book = new_notebook(cells=[new_code_cell(code), new_code_cell(code)])
    NotebookClient(book, kernel_name="python3").execute()
    first, second = (cell.outputs[0].data for cell in book.cells)
    assert set(first) == {"image/svg+xml", "text/plain"}
    assert first["image/svg+xml"] == second["image/svg+xml"]
    assert 'width="403.2pt" height="230.4pt"' in first["image/svg+xml"]  # 5.6 × 3.2 inches, nothing cropped
    assert "dc:date" not in first["image/svg+xml"]
    nbformat.validate(book)


def test_a_figure_lies_on_white_and_nothing_else_is_painted_behind_it():
    fig, axes = panels("Two", (1, 1))
    legend = axes[0].legend(handles=axes[0].plot([1, 2]), labels=["some"])
    assert fig.get_facecolor() == (1, 1, 1, 1) and all(ax.get_facecolor()[3] == 0 for ax in axes)
    assert not legend.get_frame_on()


def test_panels_stand_row_after_row():
    fig, axes = panels("Four", (1, 2), rows=2)
    fig.canvas.draw()
    places = [ax.get_window_extent() for ax in axes]
    assert places[1].x0 > places[0].x1 and places[1].y0 == places[0].y0 and places[2].y1 < places[0].y0
    assert places[3].width == pytest.approx(2 * places[2].width, rel=0.01)


def test_a_long_title_wraps_at_the_left_and_stays_inside():
    fig, axes = figure("One choice of words after another makes a title that no line of this figure can hold", "x")
    fig.canvas.draw()
    place = fig._suptitle.get_window_extent()
    assert place.height > 2 * fig._suptitle.get_fontsize() * fig.dpi / 72  # two lines
    assert 0 <= place.x0 < 0.02 * fig.bbox.width and place.x1 <= fig.bbox.width and place.y1 <= fig.bbox.height
    assert axes.get_window_extent().y1 < place.y0  # and the axes leave room for both


def luminance(rgb):
    """Relative luminance (WCAG 2.2) of three fractions."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def in_the_dark(rgb):
    """What `filter: invert(1) hue-rotate(180deg)` makes of a colour (W3C Filter Effects, 180°)."""
    r, g, b = (1 - c for c in rgb)
    turned = (
        -0.574 * r + 1.43 * g + 0.144 * b,
        0.426 * r + 0.43 * g + 0.144 * b,
        0.426 * r + 1.43 * g - 0.856 * b,
    )
    return [min(max(c, 0), 1) for c in turned]


def lightness(rgb):
    return 116 * luminance(rgb) ** (1 / 3) - 16  # L* of CIELAB


@pytest.mark.parametrize("theme", [list, in_the_dark], ids=["light", "dark"])
def test_colours_stand_out_from_the_page_and_the_first_three_from_each_other_in_grey(theme):
    page = luminance((1, 1, 1) if theme is list else [0x12 / 255] * 3)
    shown = [theme(matplotlib.colors.to_rgb(color)) for color in COLORS]
    for rgb in shown:
        dark, light = sorted((luminance(rgb), page))
        assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11
    for one, other in itertools.combinations(shown[:3], 2):
        assert abs(lightness(one) - lightness(other)) > 7


def test_dots_stand_at_their_values_from_the_top_down():
    _, axes = figure("Dots")
    rows = [{"p_at_1": 0.5, "low": 0.4, "high": 0.7}, {"p_at_1": 0.2, "low": 0.1, "high": 0.3}]
    dots_with_intervals(axes, ["first", "second"], rows)
    dots = axes.lines[0]
    assert dots.get_xdata().tolist() == [0.5, 0.2] and list(dots.get_ydata()) == [1, 0]
    spans = axes.collections[0].get_segments()
    assert [[x for x, _ in span] for span in spans] == [pytest.approx([0.4, 0.7]), pytest.approx([0.1, 0.3])]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]


def test_every_name_of_the_style_is_one_of_matplotlibs():
    assert set(plots.STYLE) <= set(matplotlib.rcParams)
