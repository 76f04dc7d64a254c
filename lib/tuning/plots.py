"""The one figure style of the book: SVG that is readable at 700 and at 350 px, in the dark theme and in grey."""

import sys
from textwrap import fill

import matplotlib.pyplot as plt
from cycler import cycler

__all__ = ["COLORS", "dots_with_intervals", "figure", "panels"]

# Okabe and Ito's hues. The first three differ in lightness too, and all stand out from a white page as well as from a
# dark one, where the page turns lightness around and keeps the hue. Markers tell the rest.
COLORS = ["#00528F", "#E07000", "#007F5F", "#B0508A", "#3D8FC4", "#777777"]
# Written at 5.6 inches and 11 points, letters are 15 px high where there is room, and 10 px on a phone.
WIDTH = 5.6
STYLE = {
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=["o", "s", "^", "D", "v", "x"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,  # of what is drawn as points inside an SVG: images, and what is `rasterized`
    "figure.facecolor": "white",  # for notebooks in the dark and for the README; the book's pages let it vanish
    "figure.labelsize": 11,
    "figure.titlesize": 12,
    "font.size": 11,
    "grid.alpha": 0.35,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.markersize": 5,
    "savefig.facecolor": "auto",
    "svg.fonttype": "path",  # a picture on a page cannot use the page's fonts
    "svg.hashsalt": "tuning",  # the same figure has the same bytes
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}
SVG = {"metadata": {"Date": None, "Creator": None}, "bbox_inches": None}


def begin():
    """Set the book's style, in a notebook also that figures are shown as SVG, whole and without a date."""
    plt.rcParams.update(STYLE)
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", **SVG)


def figure(title, xlabel=None, ylabel=None, size=(WIDTH, 3.2)):
    """A figure with one pair of axes in the book's style; the title states what it shows.

    Args:
        size: in inches, (width, height).

    Returns:
        `(figure, axes)`.
    """
    fig, (axes,) = panels(title, (1,), size)
    axes.set(xlabel=xlabel or "", ylabel=ylabel or "")
    return fig, axes


def panels(title, width_ratios=(1, 1), size=(WIDTH, 3.4), rows=1):
    """A figure with several pairs of axes side by side, under one title, which wraps at the figure's width.

    Args:
        width_ratios: one number a panel of a row.
        rows: more than one for more panels than a telephone has room for beside each other.

    Returns:
        `(figure, axes)`, with one of the axes a panel, row after row.
    """
    begin()
    fig, axes = plt.subplots(rows, len(width_ratios), figsize=size, width_ratios=width_ratios, squeeze=False)
    fig.suptitle(title, x=0.01, ha="left", wrap=True)
    return fig, axes.flatten()


def dots_with_intervals(axes, labels, rows, color=COLORS[0]):
    """One line a label, the first on top: a dot at `p_at_1`, a bar from `low` to `high`. Long labels wrap.

    Args:
        rows: dicts with `p_at_1`, `low` and `high`, as fractions.
    """
    places = range(len(rows) - 1, -1, -1)
    values = [row["p_at_1"] for row in rows]
    spans = [[row["p_at_1"] - row["low"] for row in rows], [row["high"] - row["p_at_1"] for row in rows]]
    axes.errorbar(values, places, xerr=spans, fmt="o", color=color, capsize=3, linewidth=1.2)
    axes.set_yticks(places, [fill(label, 24) for label in labels])
    axes.set_ylim(-0.6, len(rows) - 0.4)
