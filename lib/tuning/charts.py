"""Charts to play with, by Altair: alive in JupyterLab, in Colab and on the book's pages, a still picture elsewhere."""

import csv
import hashlib
import io
import json
import math
import numbers
import re

import altair
import vl_convert

from .plots import COLORS

__all__ = ["Chart", "choose", "compare", "planner"]

VEGA_LITE = "5.21"  # JupyterLab and Colab show version 5, and none that came later
MIME_TYPE = "application/vnd.vegalite.v5+json"
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"  # the format's name; nothing asks for this address
INK = "#757575"  # readable on white and on black, since a notebook's theme is not known here
WIDTH = 430  # of what is plotted, in pixels; a page makes it as wide as its column


class Chart:
    """A chart to play with; each place shows what it can: the living chart, its first state as a picture, or a line.

    Args:
        drawing: an Altair chart.
        question: what the reader can find out by playing.
        alt: what the picture shows, for readers who do not see it.

    Raises:
        ValueError: no question, or no alternative text.
    """

    def __init__(self, drawing, question, alt):
        if not (question or "").strip().endswith("?"):
            raise ValueError(
                f"a chart must answer a question, and {question!r} is none; "
                "write one, e.g. 'Which wording makes the model name the country?'"
            )
        if not (alt or "").strip():
            raise ValueError("a chart needs alternative text; let alt say what its picture shows")
        look = drawing.properties(description=alt, background="transparent").configure_view(stroke=None)
        look = look.configure_axis(
            grid=False, labelColor=INK, titleColor=INK, labelFontSize=12, titleFontSize=12, titleFontWeight="normal"
        )
        look = look.configure_title(
            color=INK, anchor="start", frame="bounds", fontSize=12.5, fontWeight="normal", offset=8
        )
        self.question, self.spec = question, look.to_dict() | {"$schema": SCHEMA}

    def still(self):
        """The chart as it is before anyone plays, as SVG."""
        return vl_convert.vegalite_to_svg(self.spec, vl_version=VEGA_LITE)

    def _repr_mimebundle_(self, include=None, exclude=None):
        picture = self.still()
        width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', picture).groups())
        data = {MIME_TYPE: self.spec, "image/svg+xml": picture, "text/plain": f"A chart to play with: {self.question}"}
        return data, {"image/svg+xml": {"width": width, "height": height}}


def choose(rows, question, alt, scale):
    """Bars for one of several cases, which the reader chooses by radio buttons.

    Args:
        rows: dicts with `choice` (the case that a bar belongs to), `bar` (its name), `value` and `right` (is it the
            right one?). Cases and bars are shown in their order.
        question: what the reader can find out by choosing; it stands above the radio buttons.
        alt: what the picture of the first case shows, for readers who do not see it.
        scale: what the values are, with their unit, e.g. "probability of the next word".

    Returns:
        A `Chart`, which a notebook shows.

    Raises:
        ValueError: no rows, one that lacks a key, a value that is no finite number, no question, no alternative text.
    """
    check_rows(rows, ("choice", "bar", "value", "right"))
    bars, counts = [], {}
    for row in rows:
        counts[row["choice"]] = place = counts.get(row["choice"], 0) + 1
        label = f"{row['bar']}: {row['value']:.3f}" + (", right answer" if row["right"] else "")
        bar = {"choice": row["choice"], "place": place, "value": float(row["value"]), "right": bool(row["right"])}
        bars.append(bar | {"label": label})
    choice = radio_buttons(question, list(counts), bars[0]["choice"])
    chosen = altair.Chart(altair.Data(values=bars)).transform_filter(altair.datum.choice == choice)
    chosen = chosen.encode(y=altair.Y("place:O", axis=None))
    span = altair.Scale(domain=[0, max(bar["value"] for bar in bars)], nice=True)  # the same for all cases
    thick = chosen.mark_bar(height=12, yOffset=9).encode(
        x=altair.X("value:Q", title=scale, scale=span, axis=altair.Axis(tickCount=5)),
        color=altair.condition("datum.right", altair.value(COLORS[1]), altair.value(COLORS[4])),
        description="label:N",
    )
    # A label stands above its bar and not beside it, so that both have the whole width of a phone.
    words = chosen.mark_text(align="left", yOffset=-7, fontSize=13, color=INK, aria=False)
    words = words.encode(x=altair.value(0), text="label:N")
    drawing = altair.layer(thick, words).add_params(choice)
    drawing = drawing.properties(width=WIDTH, height=altair.Step(36), title=altair.Title(altair.expr(choice.name)))
    return Chart(drawing, question, alt)


def radio_buttons(question, options, value):
    """Altair's parameter for a choice; those of one name are one group in the whole page, so each has its own name."""
    bind = altair.binding_radio(options=options, name=question)
    return altair.param(name=own_name(question), value=value, bind=bind)


def own_name(text):
    return f"choice_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def compare(rows, question, alt, across, up):
    """Points for things that are good at two matters, as large as they cost; the reader chooses one, or touches it.

    Args:
        rows: dicts with `choice` (a point's name), `value` (across: the number and the two ends of its interval), `up`,
            `size` (from 0 to 1) and `said` (lines that stand above the chart when it is chosen).
        question, alt: as for `choose`; alt says what the picture of the first row shows.
        across, up: titles of the axes.

    Returns:
        A `Chart`, which a notebook shows.

    Raises:
        ValueError: no rows, one that lacks a key or stands there twice, no question, no alternative text.
    """
    check_rows([row | {"value": row.get("value", [math.nan])[0]} for row in rows], ("choice", "up", "size", "said"))
    names = [row["choice"] for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"each row needs a name of its own, and the names are {', '.join(names)}")
    choice = radio_buttons(question, names, names[0])
    points = [
        {"choice": row["choice"], "up": float(row["up"]), "size": 60 + 540 * row["size"]}
        | dict(zip(("value", "low", "high"), map(float, row["value"]), strict=True))
        | {"label": ", ".join([f"{row['choice']}: {row['said'][0]}", *row["said"][1:]])}
        for row in rows
    ]
    chosen = altair.datum.choice == choice
    base = altair.Chart(altair.Data(values=points)).encode(y=altair.Y("up:Q", title=up, scale=altair.Scale(nice=True)))
    ends = [min(point["low"] for point in points), max(point["high"] for point in points)]
    span = altair.Scale(domain=ends, zero=False, nice=True)  # the same whichever is chosen
    intervals = base.transform_filter(chosen).mark_rule(strokeWidth=2, color=COLORS[1], aria=False)
    intervals = intervals.encode(x=altair.X("low:Q"), x2="high:Q")
    dots = base.mark_point(filled=True, opacity=0.75, stroke=INK, strokeWidth=1).encode(
        x=altair.X("value:Q", title=across, scale=span, axis=altair.Axis(tickCount=5)),
        size=altair.Size("size:Q", scale=None),
        color=altair.condition(chosen, altair.value(COLORS[1]), altair.value(COLORS[4])),
        description="label:N",
    )
    said = json.dumps({row["choice"]: [row["choice"], *row["said"]] for row in rows}, ensure_ascii=False)
    title = altair.Title(altair.expr(f"({said})[{choice.name}]"))
    drawing = altair.layer(intervals, dots).add_params(choice)
    return Chart(drawing.properties(width=WIDTH, height=280, title=title), question, alt)


CARDS = (16, 24, 48, 80)  # what is sold as GB are GiB, and the driver keeps some of it: of a T4's 16 it leaves 15
WIDEST = 106  # GiB; longer bars are cut off, and their label tells


def planner(rows, question, alt):
    """Stacked bars of memory, one a method, against the sizes of cards, for a setting chosen from several menus.

    Args:
        rows: dicts with `choice` ({menu: option}, both texts), `bar` (its name), `parts` ({category: GiB}, the same
            categories in each row) and, where it was measured, `measured` (GiB). Menus, options and bars are shown in
            their order. A row that leaves a menu out stands there for all of its options. The setting of the first row
            with something measured, or of the first row, is shown at first.
        question, alt: as for `choose`; alt says what the picture of the first setting shows.

    Returns:
        A `Chart`, which a notebook shows. GiB are rounded to 0.1; a thousand rows take some 50 kB.

    Raises:
        ValueError: no rows, one that lacks a key, has other categories or a value that is no finite number, a bar that
            is there twice in one setting, no question, no alternative text.
    """
    check_rows([row | {"value": _total(row)} for row in rows], ("choice", "bar", "parts"))
    categories, bars = list(rows[0]["parts"]), list(dict.fromkeys(row["bar"] for row in rows))
    choices = _menus(rows, question)
    base = altair.Chart(_table(rows, choices, categories)).encode(y=altair.Y("bar:N", sort=bars, axis=None))
    for place, choice in enumerate(choices.values()):
        chosen = f"datum.m{place} == indexof({json.dumps(choice.param.bind.options)}, {choice.name})"
        base = base.transform_filter(f"!isValid(datum.m{place}) || {chosen}")
    measured = "isValid(datum.measured) ? ', measured ' + format(datum.measured, ',.1f') : ''"
    base = base.transform_calculate(said=f"datum.bar + ': ' + format(datum.total, ',.1f') + ' GiB' + ({measured})")
    words = base.mark_text(align="left", yOffset=-7, fontSize=13, color=INK, aria=False)
    words = words.encode(x=altair.value(0), text="said:N")
    dots = base.transform_filter("isValid(datum.measured)").mark_point(
        shape="diamond", filled=True, size=110, yOffset=9, color=COLORS[3], opacity=1, clip=True, aria=False
    )
    rules, sizes = _cards(bars)
    drawing = altair.layer(rules, _stacks(base, categories), dots.encode(x="measured:Q"), words, sizes)
    names = [f"{json.dumps(menu + ': ')} + {choice.name}" for menu, choice in choices.items()]
    lines = [" + ', ' + ".join(names[start : start + 2]) for start in range(0, len(names), 2)]
    title = altair.Title(altair.expr(f"[{', '.join([json.dumps(question), *lines])}]"))
    drawing = drawing.add_params(*choices.values())
    return Chart(drawing.properties(width=WIDTH, height=altair.Step(38), title=title), question, alt)


def _menus(rows, question):
    """{menu: Altair's parameter for it}; the first setting is one that was measured, if one was."""
    options = {}
    for row in rows:
        for menu, option in row["choice"].items():
            options.setdefault(menu, {}).setdefault(option)
    first = next((row for row in rows if row.get("measured")), rows[0])["choice"]
    return {
        menu: altair.param(
            name=own_name(question + menu),
            value=first.get(menu, next(iter(those))),
            bind=altair.binding_select(options=list(those), name=menu),
        )
        for menu, those in options.items()
    }


def _stacks(base, categories):
    """The bars themselves, as a layer."""
    parts = base.transform_fold(categories, as_=["part", "GiB"]).transform_calculate(
        place=f"indexof({json.dumps(categories)}, datum.part)", label="datum.said + '; ' + datum.part + ' ' + datum.GiB"
    )
    across = altair.X(
        "GiB:Q",
        title="GiB alive at the peak; the lines are cards, in GB",
        scale=altair.Scale(domain=[0, WIDEST], nice=False),
        axis=altair.Axis(tickCount=6),
    )
    colors = altair.Scale(domain=categories, range=[COLORS[index] for index in (0, 1, 2, 4, 5)][: len(categories)])
    legend = altair.Legend(title=None, orient="top", columns=3, labelFontSize=12, labelColor=INK)
    return parts.mark_bar(height=12, yOffset=9, clip=True).encode(
        x=across, color=altair.Color("part:N", scale=colors, legend=legend), order="place:Q", description="label:N"
    )


def _cards(bars):
    """A line a card behind each bar, which leaves the words alone, and the cards' sizes on top: two layers."""
    cards = altair.Chart(altair.Data(values=[{"GiB": size, "bar": bar} for bar in bars for size in CARDS]))
    cards = cards.encode(x="GiB:Q")
    rules = cards.mark_tick(orient="vertical", size=18, thickness=1.5, yOffset=9, color=INK, aria=False)
    sizes = cards.transform_filter(altair.datum.bar == bars[0])
    sizes = sizes.mark_text(baseline="bottom", dy=-2, fontSize=12, color=INK, aria=False)
    rules = rules.encode(y=altair.Y("bar:N", sort=bars, axis=None))
    return rules, sizes.encode(y=altair.value(0), text="GiB:N")


def _total(row):
    """The sum of a row's parts, NaN if one is no number."""
    values = [*row.get("parts", {}).values(), row.get("measured") or 0]
    return sum(values[:-1]) if all(isinstance(value, numbers.Real) for value in values) else math.nan


def _table(rows, choices, categories):
    """The rows as comma-separated text, in which an option is its number: short, since it goes into each page."""
    text, seen = io.StringIO(), set()
    menus = {menu: choice.param.bind.options for menu, choice in choices.items()}
    writer = csv.writer(text, lineterminator="\n")
    fields = [f"m{place}" for place in range(len(menus))]
    writer.writerow([*fields, "bar", "total", *categories, "measured"])
    for number, row in enumerate(rows):
        if list(row["parts"]) != categories:
            raise ValueError(f"row {number} has the parts {', '.join(row['parts'])}; expected {', '.join(categories)}")
        chosen = [
            options.index(row["choice"][menu]) if menu in row["choice"] else "" for menu, options in menus.items()
        ]
        if (*chosen, row["bar"]) in seen:
            raise ValueError(f"row {number} is a second bar {row['bar']!r} for {row['choice']}; give each one row")
        seen.add((*chosen, row["bar"]))
        measured = row.get("measured")
        parts = [f"{row['parts'][name]:.1f}" for name in categories]
        writer.writerow([*chosen, row["bar"], f"{_total(row):.1f}", *parts, f"{measured:.1f}" if measured else ""])
    kinds = dict.fromkeys([*fields, "total", *categories, "measured"], "number")
    return altair.InlineData(values=text.getvalue(), format=altair.CsvDataFormat(type="csv", parse=kinds))


def check_rows(rows, needed):
    """Raise a `ValueError` unless there are rows, each with the keys `needed` and a finite `value`."""
    if not rows:
        raise ValueError("a chart needs data, and there are no rows; were they filtered away?")
    for number, row in enumerate(rows):
        missing = [key for key in needed if key not in row]
        if missing:
            raise ValueError(f"row {number} has no {', '.join(missing)}; each row needs {', '.join(needed)}")
        value = row["value"]
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"row {number} has the value {value!r}; drop it, or give a finite number")
