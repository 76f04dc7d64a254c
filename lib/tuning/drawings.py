"""Drawings of mechanisms, in one look: frozen is grey, trained is orange, sent is blue.

Lengths are pixels of a telephone, on which a drawing is `PHONE` wide: what is 13 high here is 13 high there.
"""

import io
import math
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath

from .plots import COLORS, STYLE, SVG

__all__ = [
    "Drawing",
    "attention",
    "book_map",
    "four_places",
    "four_ways",
    "lora",
    "p_tuning",
    "prompt_in_front",
    "template",
]

PHONE = 350  # px
WIDTH = 4.8  # inches
LETTERS = 13  # px
INK = "#333333"
LINE = 1.4
FROZEN = {"facecolor": "#E8E8E8", "edgecolor": COLORS[5]}
TRAINED = {"facecolor": "#F6AA64", "edgecolor": COLORS[1]}
SENT = {"facecolor": "#BBD8EF", "edgecolor": COLORS[0]}
COMPUTED = {"facecolor": "none", "edgecolor": INK}
EMPTY = {"facecolor": "none", "edgecolor": COLORS[5], "linestyle": (0, (2, 2))}


class Drawing:
    """A picture and the text that says the same: a notebook shows the one and keeps the other beside it.

    Args:
        figure: a figure of matplotlib.
        alt: what the picture says, for readers who do not see it.

    Raises:
        ValueError: without such a text.
    """

    def __init__(self, figure, alt):
        if len(alt.split()) < 5:
            raise ValueError(f"a drawing needs a text that says what it shows, in a sentence or two; got {alt!r}")
        self.figure, self.alt = figure, alt

    def svg(self):
        """The picture as the text of an SVG file, the same text each time."""
        out = io.StringIO()
        with rc_context(STYLE):
            self.figure.savefig(out, format="svg", **SVG)
        return out.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/svg+xml": self.svg(), "text/plain": self.alt}


def sheet(height):
    """Empty axes over a sheet of PHONE × `height` px; (0, 0) is its lower left corner."""
    with rc_context({**STYLE, "figure.constrained_layout.use": False}):
        axes = Figure((WIDTH, WIDTH * height / PHONE)).add_axes((0, 0, 1, 1), xlim=(0, PHONE), ylim=(0, height))
    axes.axis("off")
    return axes


def write(axes, x, y, text, size=LETTERS, ha="center", **how):
    """Text of `size` px; (x, y) is its middle, or the middle of its left side."""
    axes.text(x, y, text, fontsize=size * 72 * WIDTH / PHONE, ha=ha, va="center", color=INK, **how)


def box(axes, x, y, width, height, look, text=""):
    """A box with its lower left corner at (x, y), and a text in its middle."""
    axes.add_patch(Rectangle((x, y), width, height, linewidth=LINE, **look))
    if text:
        write(axes, x + width / 2, y + height / 2, text)


def parcel(axes, x, y, side):
    """The blue hull of something that is sent, with its lower left corner at (x, y)."""
    look = {"facecolor": "none", "edgecolor": SENT["edgecolor"], "linewidth": LINE}
    axes.add_patch(FancyBboxPatch((x + 4, y + 4), side - 8, side - 8, boxstyle="round,pad=4,rounding_size=6", **look))


def arrow(axes, start, end):
    """The one kind of arrow."""
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "color": INK, "linewidth": LINE}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **look))


def lock(axes, x, y):
    """A small lock around (x, y): what it stands on is not trained."""
    axes.add_patch(Arc((x, y + 2), 8, 11, theta1=0, theta2=180, color=INK, linewidth=LINE))
    axes.add_patch(Rectangle((x - 6, y - 7), 12, 9, color=INK, linewidth=0))


def lora(model_bytes, adapter_bytes):
    """LoRA's two ways from x to y, and what is sent: the model once, an adapter for each task.

    Args:
        model_bytes, adapter_bytes: the sizes of the two files.
    """
    if not 0 < adapter_bytes < model_bytes:
        raise ValueError(
            f"an adapter of {adapter_bytes} bytes for a model of {model_bytes}: give both files' sizes in bytes, the "
            "model's first; an adapter is the smaller one"
        )
    whole, part = megabytes(model_bytes), megabytes(adapter_bytes)
    axes = sheet(318)
    box(axes, 10, 162, 24, 88, SENT, "x")
    box(axes, 98, 216, 88, 88, FROZEN, "W\nfrozen")
    lock(axes, 173, 290)
    write(axes, 142, 166, "trained")
    box(axes, 98, 133, 88, 22, TRAINED, "A")
    write(axes, 142, 121, "(r, in)", 12)
    box(axes, 224, 100, 22, 88, TRAINED, "B")
    write(axes, 235, 90, "(out, r)", 12)
    write(axes, 274, 150, "× α/r", ha="left")
    axes.add_patch(Circle((287, 206), 11, facecolor="none", edgecolor=INK, linewidth=LINE))
    write(axes, 287, 206, "+", 16)
    box(axes, 316, 162, 24, 88, SENT, "y")
    for start, end in (
        ((38, 228), (94, 256)), ((190, 256), (276, 211)),  # through W
        ((38, 184), (94, 147)), ((190, 144), (220, 144)), ((250, 156), (280, 195)),  # past it
        ((299, 206), (313, 206)),
    ):  # fmt: skip
        arrow(axes, start, end)

    side = 44
    small = side * math.sqrt(adapter_bytes / model_bytes)  # areas as the bytes
    write(axes, 10, 38, "what\nyou send", ha="left")
    parcel(axes, 98, 10, 56)
    box(axes, 104, 16, side, side, FROZEN)
    write(axes, 162, 38, f"{whole}\nonce", ha="left")
    parcel(axes, 230, 10, 56)
    box(axes, 258 - small / 2, 38 - small / 2, small, small, TRAINED)
    write(axes, 294, 38, f"{part}\na task", ha="left")
    return Drawing(
        axes.figure,
        "Two ways lead from x to y. One goes through the large matrix W, grey and locked. The other goes past it, "
        "through two thin orange matrices, first A, of shape (r, in), then B, of shape (out, r), and is multiplied by "
        "α/r. The two are added. Below, what you send, areas to scale: a large grey square, "
        f"{whole} once, and a tiny orange one, {part} a task.",
    )


def megabytes(n):
    """`538 MB`, `9.8 MB`: whole from ten on, else with a tenth."""
    return f"{n / 1e6:.0f} MB" if n >= 1e7 else f"{n / 1e6:.1f} MB"


def attention(words):
    """Who may look at whom: every token at every other one, or only back. The middle one's looks are drawn strongly.

    Args:
        words: the tokens of a sentence as text, at least three.
    """
    if len(words) < 3:
        raise ValueError(f"the middle one of at least three tokens looks left and right; got {len(words)}: {words}")
    step, middle = PHONE / len(words), len(words) // 2
    wide = [word for word in words if TextPath((0, 0), word, size=LETTERS).get_extents().width > step - 12]
    if wide:
        raise ValueError(f"{len(words)} tokens side by side leave no room for {wide}; give fewer or shorter ones")
    axes = sheet(312)
    for title, foot, causal in (
        ("Encoder (BERT): looks both ways", 170, False),
        ("Causal model (GPT): looks only back", 10, True),
    ):
        write(axes, 4, foot + 130, title, 14, ha="left", weight="bold")
        for i, word in enumerate(words):
            x, strong = (i + 0.5) * step, i == middle
            for j in range(i + 1 if causal else len(words)):
                look = (
                    {"color": SENT["edgecolor"], "linewidth": 2.2} if strong else {"color": "#AAAAAA", "linewidth": 1}
                )
                axes.plot((x, (j + 0.5) * step), (foot + 104, foot + 25), marker="", zorder=1 + strong, **look)
            axes.add_patch(Circle((x, foot + 104), 7, linewidth=LINE, zorder=3, **(SENT if strong else FROZEN)))
            box(axes, x - step / 2 + 4, foot, step - 8, 24, EMPTY if causal and i > middle else SENT, word)
    return Drawing(
        axes.figure,
        f"The tokens {', '.join(words)}, twice, with lines from each to those that it may look at. Above, an encoder: "
        "each looks at all. Below, a causal model: each looks at itself and at those before it. There "
        f"{words[middle]!r} sees {', '.join(words[: middle + 1])}, and not {', '.join(words[middle + 1 :])}.",
    )


def p_tuning():
    """P-tuning's prompt encoder, from its six trained embeddings down to what the frozen model reads and answers."""
    axes = sheet(328)
    pseudo, subject = (23, 69, 115, 235, 281, 327), 175  # middles of columns; the subject's is wider
    write(axes, subject, 302, "trained")
    box(axes, 2, 240, 346, 26, TRAINED, "bidirectional LSTM, two layers")
    box(axes, subject - 34, 120, 68, 24, COMPUTED, "e(Osaka)")
    arrow(axes, (subject, 118), (subject, 96))
    for number, x in enumerate(pseudo):
        box(axes, x - 20, 290, 40, 24, TRAINED, f"$s_{number}$")
        box(axes, x - 20, 180, 40, 24, TRAINED, "MLP")
        box(axes, x - 20, 120, 40, 24, COMPUTED, f"$h_{number}$")
        for start, end in ((288, 268), (238, 206), (178, 146), (118, 96)):
            arrow(axes, (x, start), (x, end))
    box(axes, 2, 58, 346, 36, FROZEN, "frozen language model")
    lock(axes, 332, 76)
    arrow(axes, (327, 56), (327, 32))
    write(axes, 327, 20, "Japan")
    return Drawing(
        axes.figure,
        "Six trained embeddings, s0 to s5, orange, pass through a bidirectional LSTM of two layers and then each "
        "through the same MLP, orange too, and become the vectors h0 to h5. These stand around the subject, e(Osaka), "
        "three on each side, in the input of the frozen language model, grey and locked. Behind the last it answers: "
        "Japan.",
    )


def vector(axes, x, y, look, width=24, height=52):
    """An embedding: a standing row of four numbers around x, with its lower side at y."""
    for row in range(4):
        box(axes, x - width / 2, y + row * height / 4, width, height / 4, look)


def template():
    """A template as a function: the subject goes in, tokens come out, and their vectors go to the frozen network."""
    axes = sheet(350)
    columns = (("The", 92), ("capital", 148), ("of", 204), ("Britain", 260), ("is", 316))
    for y, name in (
        (335, "subject"),
        (282, "template"),
        (225, "tokens"),
        (154, "vectors"),
        (136, "(seq,"),
        (120, "hidden)"),
    ):
        write(axes, 2, y, name, 12, ha="left")
    box(axes, 201, 323, 58, 24, SENT, "Britain")
    arrow(axes, (230, 321), (230, 297))  # to [X]
    box(axes, 66, 269, 276, 26, COMPUTED, "The capital of [X] is [Y].")
    arrow(axes, (204, 267), (204, 242))
    for word, x in columns:
        box(axes, x - 26, 213, 52, 24, SENT, word)
        arrow(axes, (x, 211), (x, 175))
        vector(axes, x, 119, FROZEN)
        arrow(axes, (x, 117), (x, 97))
    box(axes, 66, 58, 276, 36, FROZEN, "frozen language model")
    lock(axes, 326, 76)
    arrow(axes, (316, 56), (316, 32))
    write(axes, 316, 20, "London?")
    return Drawing(
        axes.figure,
        "The subject, Britain, goes into the template, The capital of [X] is [Y]., in the place of [X]. Out come five "
        "tokens: The, capital, of, Britain, is. Each has a vector beneath it, and the five together are a matrix of "
        "shape (seq, hidden). The frozen language model, grey and locked, reads them. Behind the last token, where [Y] "
        "would stand, its answer is read: London?",
    )


def prompt_in_front(length=4):
    """A prompt as a matrix: trained vectors in front of a subject's, and beneath them what is kept for the task.

    Args:
        length: how many vectors are trained, 1 to 6.
    """
    if not 1 <= length <= 6:
        raise ValueError(f"1 to 6 trained vectors have room beside the subject; got {length}")
    axes = sheet(332)
    step = PHONE / (length + 2)
    write(axes, length * step / 2, 318, "trained, no words" if length > 2 else "trained")
    for column in range(length + 2):
        x, ours = (column + 0.5) * step, column < length
        if ours:
            write(axes, x, 284, f"$h_{column}$")
        else:
            box(axes, x - step / 2 + 2, 272, step - 4, 24, SENT, ("New", "Delhi")[column - length])
            arrow(axes, (x, 270), (x, 250))
        vector(axes, x, 194, TRAINED if ours else FROZEN)
        arrow(axes, (x, 192), (x, 172))
    write(axes, (length + 1) * step, 318, "subject")
    box(axes, 2, 134, 346, 36, FROZEN, "frozen language model")
    lock(axes, 332, 152)
    arrow(axes, (PHONE - step / 2, 132), (PHONE - step / 2, 108))
    write(axes, PHONE - step / 2, 96, "India")

    write(axes, 2, 38, "what\nyou keep", ha="left")
    parcel(axes, 90, 10, 56)
    for column in range(length):
        width = 44 / length
        vector(axes, 96 + (column + 0.5) * width, 16, TRAINED, width, 44)
    rows = "1 vector" if length == 1 else f"{length} vectors"
    write(axes, 158, 38, f"{rows} a task,\na matrix ({length}, hidden)", ha="left")
    return Drawing(
        axes.figure,
        f"In front of the frozen language model, grey and locked, stand vectors side by side. First {rows}, h0"
        + (f" to h{length - 1}" if length > 1 else "")
        + ", orange: trained, with no words above them. Then the vectors of the subject's tokens, New and Delhi, grey. "
        "Behind the last token the model answers: India. Below, what you keep for a task: the orange matrix alone, of "
        f"shape ({length}, hidden).",
    )


PLACES = {"a vector": TRAINED, "a key and a value": TRAINED, "a computed state": FROZEN, "no token": EMPTY}


def place(axes, x, y, what):
    """What stands at one position of one layer; a key and a value share the place."""
    box(axes, x, y, 21, 16, PLACES[what])
    if what == "a key and a value":
        axes.plot((x + 10.5, x + 10.5), (y, y + 16), marker="", color=TRAINED["edgecolor"], linewidth=LINE)


def four_places():
    """Where four methods put what they train: positions from left to right, layers from the input up."""
    axes = sheet(370)
    at_input, in_depth = ("a vector", "a computed state"), ("no token", "a key and a value")  # the input, each layer
    methods = (
        ("Prompt tuning", "trained directly", (0, 1, 2), at_input),
        ("P-tuning", "made by a network", (0, 1, 4), at_input),
        ("Prefix tuning", "made by a network", (0, 1, 2), in_depth),
        ("P-tuning v2", "trained either way", (0, 1, 2), in_depth),
    )
    for number, (name, made, positions, ours) in enumerate(methods):
        left, foot = (48, 204)[number % 2], (230, 60)[number // 2]
        write(axes, left, foot + 126, name, 14, ha="left", weight="bold")
        write(axes, left, foot + 108, made, 12, ha="left")
        for row in range(5):
            for column in range(6):
                what = ours[row > 0] if column in positions else "a computed state"
                place(axes, left + 24 * column, foot + 19 * row, what)
        if left == 48:
            write(axes, 4, foot + 8, "input", 12, ha="left")
            write(axes, 4, foot + 55, "layers", 12, ha="left")
    for number, what in enumerate(PLACES):
        x, y = (48, 204)[number // 2], (26, 4)[number % 2]
        place(axes, x, y, what)
        write(axes, x + 30, y + 8, what, 12, ha="left")
    return Drawing(
        axes.figure,
        "Four grids of positions and layers; orange is trained, grey computed. Prompt tuning has orange vectors, "
        "trained directly, at the first positions of the input. P-tuning has them at the input too, in front of the "
        "words and among them, made by a network. Prefix tuning and P-tuning v2 have an orange key and value at the "
        "first positions of every layer above the input, where no token stands; prefix tuning makes them by a network, "
        "P-tuning v2 trains them directly or makes them by one.",
    )


def four_ways():
    """Four ways to one answer, as four pictures: words or not in front of the model, and what is trained."""
    axes = sheet(372)
    ways = (
        ("manual prompt", True, False, False),
        ("fine-tuning", False, False, True),
        ("manual prompt\nand fine-tuning", True, False, True),
        ("P-tuning", True, True, False),
    )
    for number, (name, words, vectors, weights) in enumerate(ways):
        left, foot = (8, 186)[number % 2], (198, 6)[number // 2]
        middle = left + 78
        write(axes, left, foot + 155, name, 13, ha="left", weight="bold")
        if words:
            width = 100 if vectors else 156
            box(axes, middle - width / 2, foot + 100, width, 34, SENT, "The city of\nOsaka is in")
        else:
            box(axes, middle - 28, foot + 100, 56, 34, SENT, "Osaka")
        if vectors:
            for column in range(3):
                for x in (left + 4, left + 134):
                    vector(axes, x + 9 * column, foot + 100, TRAINED, 7, 34)
        arrow(axes, (middle, foot + 98), (middle, foot + 78))
        box(axes, left, foot + 42, 156, 34, TRAINED if weights else FROZEN, "model")
        if not weights:
            lock(axes, left + 140, foot + 59)
        arrow(axes, (middle, foot + 40), (middle, foot + 20))
        write(axes, middle, foot + 8, "Japan")
    return Drawing(
        axes.figure,
        "Four pictures of a model that answers Japan; orange is trained, grey and locked is frozen. Manual prompt: the "
        "words The city of Osaka is in, before a grey model. Fine-tuning: only the name Osaka, before an orange model. "
        "Manual prompt and fine-tuning: the words, before an orange model. P-tuning: the words with three orange "
        "vectors on each side, before a grey model.",
    )


# What each part of the book asks and answers, and its sign: boxes (x, y, width, height, look), with y downwards.
PARTS = {
    "Asking": (
        "How far does asking go?",
        "One word can decide the answer. P‑tuning trains vectors instead of words.",
        [(6, 6, 52, 34, FROZEN)] + [(x, 46, 10, 12, TRAINED if x != 34 else FROZEN) for x in (6, 20, 34, 48)],
    ),
    "Low rank": (
        "How little must we change?",
        "LoRA freezes each weight matrix and trains two thin ones beside it.",
        [(6, 6, 36, 36, FROZEN), (48, 6, 10, 36, TRAINED), (6, 48, 36, 10, TRAINED)],
    ),
    "Few bits": (
        "How small can the rest be?",
        "QLoRA keeps the frozen weights in four bits and trains LoRA beside them.",
        [(6, 6, 36, 36, EMPTY), (24, 24, 18, 18, FROZEN), (48, 6, 10, 36, TRAINED), (6, 48, 36, 10, TRAINED)],
    ),
    "Few bytes": (
        "Can we change everything?",
        "LOMO trains every weight and never holds all the gradients.",
        [(6, y, 30, 10, TRAINED) for y in (6, 20, 34, 48)]
        + [(44, y, 14, 10, SENT if y == 34 else EMPTY) for y in (6, 20, 34, 48)],
    ),
}


def book_map(parts):
    """The map of the book for its index, as HTML: the parts in their order, what each answers, links to its chapters.

    Args:
        parts: name of a part -> list of (title, address) of its chapters; a title is like `2. Prompts are code`.
    """
    stations = []
    for name, chapters in parts.items():
        if name not in PARTS:
            raise ValueError(f"the map knows no part {name!r}; say in tuning.drawings.PARTS what it asks and answers")
        question, answer, boxes = PARTS[name]
        stations += [
            "<li>",
            sign(boxes),
            f'<a class="part" href="{chapters[0][1]}">{name}</a>',
            f"<em>{question}</em>",
            f"<span>{answer}</span>",
            '<span class="chapters">',
            *(link(escape(title), to) for title, to in chapters),
            "</span>",
            "</li>",
        ]
    key = [
        f"<span>{sign([(6, 6, 52, 52, look)])} {text}</span>"
        for text, look in (
            ("frozen", FROZEN),
            ("trained", TRAINED),
            ("held for a moment", SENT),
            ("no longer held", EMPTY),
        )
    ]
    begin, end = (
        ['<nav class="book-map" aria-label="Map of the book">', "<ol>"],
        ["</ol>", "<p>", *key, "</p>", "</nav>"],
    )
    return "\n".join([*begin, *stations, *end, ""])


def sign(boxes):
    """Boxes (x, y, width, height, look) as a small picture, which says nothing that the text beside it does not say."""
    drawn = "".join(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{look["facecolor"]}" '
        f'stroke="{look["edgecolor"]}" stroke-dasharray="{3 if look is EMPTY else "none"}"/>'
        for x, y, width, height, look in boxes
    )
    return f'<svg viewBox="5 5 54 54" aria-hidden="true">{drawn}</svg>'


def link(title, to):
    """A chapter's number; its title for those who point at it or hear the page."""
    return f'<a href="{to}" title="{title}" aria-label="{title}">{title.split(".")[0]}</a>'
