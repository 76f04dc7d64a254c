"""The one figure style of the book: plain, readable at 700 px and in grey."""

import matplotlib.pyplot as plt
from cycler import cycler

__all__ = ["COLORS", "dots_with_intervals", "figure", "panels"]

# Okabe and Ito's colours, which differ in lightness too; the hatches and markers of a figure tell the rest.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"]
STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=["o", "s", "^", "D", "v", "x"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 10,
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "lines.markersize": 5,
}


def figure(title, xlabel=None, ylabel=None, size=(7, 3.2)):
    """A figure with one pair of axes in the book's style; the title states what it shows.

    Args:
        size: in inches, (width, height).

    Returns:
        `(figure, axes)`.
    """
    plt.rcParams.update(STYLE)
    fig, axes = plt.subplots(figsize=size)
    axes.set(title=title, xlabel=xlabel or "", ylabel=ylabel or "")
    return fig, axes


def panels(title, width_ratios=(1, 1), size=(7, 3.4)):
    """A figure with several pairs of axes side by side, under one title.

    Args:
        width_ratios: one number a panel.

    Returns:
        `(figure, axes)`, with one of the axes a panel.
    """
    plt.rcParams.update(STYLE)
    fig, axes = plt.subplots(1, len(width_ratios), figsize=size, width_ratios=width_ratios)
    fig.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    return fig, axes


def dots_with_intervals(axes, labels, rows, color=COLORS[0]):
    """One line a label, the first on top: a dot at `p_at_1`, a bar from `low` to `high`.

    Args:
        rows: dicts with `p_at_1`, `low` and `high`, as fractions.
    """
    places = range(len(rows) - 1, -1, -1)
    values = [row["p_at_1"] for row in rows]
    spans = [[row["p_at_1"] - row["low"] for row in rows], [row["high"] - row["p_at_1"] for row in rows]]
    axes.errorbar(values, places, xerr=spans, fmt="o", color=color, capsize=3, linewidth=1.2)
    axes.set_yticks(places, labels)
    axes.set_ylim(-0.6, len(rows) - 0.4)
