"""Formulas as MathML, which a browser sets without a script.

latex2mathml writes elements as LaTeX names them; MathML Core, which browsers speak, knows no letters by `mathvariant`,
no `columnalign` and no spaces by class. `mend` sets what is missing by TeX's own rules (The TeXbook, chapter 18).
"""

import re
import unicodedata
from functools import cache
from html import unescape
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from docutils import nodes
from latex2mathml.converter import convert_to_element
from latex2mathml.symbols_parser import SYMBOLS_FILE
from sphinx.util import logging

LOG = logging.getLogger(__name__)
SCRIPTS = {"msub", "msup", "msubsup", "munder", "mover", "munderover"}  # the first child is the base
TALL = {"mfrac", "mtable", "munder", "munderover", "mover", "mroot"}
KNOWN = {  # what latex2mathml does not know, by what it does; its \lVert grows with what it embraces
    r"\\arg": r"\\operatorname{arg}",
    r"\\[lr]vert": "|",
    r"\\[lr]Vert": r"\\|",
}
ACCENTS = {"^": "ˆ", "~": "˜"}
PRIMES = ("′", "″", "‴", "⁗")
PARTS = dict.fromkeys(["msub", "msup", "munder", "mover", "mfrac", "mroot"], 2) | {"msubsup": 3, "munderover": 3}
ROWS = {"math", "mrow", "mstyle", "mtd", "msqrt", "mpadded", "mphantom"}  # children stand beside one another
LIMITS = {"max", "min", "sup", "inf", "lim"}
CLASSES = ("ord", "op", "bin", "rel", "open", "close", "punct", "inner")
WIDTHS = ("", "0.167em", "0.222em", "0.278em")  # none, thin, medium, thick
SPACES = (  # between a class (row) and the next (column), as in The TeXbook, p. 170
    "01230001",
    "11030001",
    "22002002",
    "33003003",
    "00000000",
    "01230001",
    "11011111",
    "11231011",
)


@cache
def classes():
    """The class of each character that has one, from latex2mathml's table of symbols."""
    found = {}
    for line in Path(SYMBOLS_FILE).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            code, _, _, _, _, category, *_ = line.split("^")
            found[chr(int(code, 16))] = category.removeprefix("math")
    return found | {":": "rel", "*": "bin", "!": "close"}


def mathml(tex, display=False):
    """A formula in TeX as a <math> element, in a string.

    Raises:
        ValueError: it cannot be converted.
    """
    tex = " ".join(tex.split())
    source = tex.replace("{aligned}", "{split}")
    for command, known in KNOWN.items():
        source = re.sub(rf"{command}(?![a-zA-Z])", known, source)
    if r"\\" in re.sub(r"(?s)\\begin\{.*\\end\{[^}]*\}", "", source):
        source = rf"\begin{{split}}{source}\end{{split}}"
    if (braces := re.sub(r"\\.", "", tex)).count("{") != braces.count("}"):
        raise ValueError("its braces do not pair")
    try:
        math = convert_to_element(source, display="block" if display else "inline")
    except Exception as error:  # the converter lets slip whatever goes wrong inside
        raise ValueError(f"latex2mathml says {type(error).__name__} {error}".rstrip()) from error
    for element in math.iter():
        element.text = unescape(element.text or "")
        if re.search(r"[\\$]", element.text) or element.get("linebreak"):
            raise ValueError(f"{element.text or 'a new line outside of a known environment'} is not known")
        if len(element) != PARTS.get(element.tag, len(element)):
            raise ValueError(f"<{element.tag}> has {len(element)} parts and needs {PARTS[element.tag]}")
    mend(math, "display" if display else "text")
    math.attrib = ({"display": "block"} if display else {}) | {"alttext": tex}
    return tostring(math, encoding="unicode")


def mend(element, style):
    """Mend an element and all below it; `style` is TeX's: display, text or script."""
    if element.get("displaystyle"):
        style = "display" if element.get("displaystyle") == "true" else "text"
    children = list(element)
    if (
        style == "display"
        and element.tag == "msub"
        and (children[0].text in LIMITS or children[0].get("movablelimits"))
    ):
        element.tag = "munder"
    if element.tag in ("msup", "msubsup") and children[-1].text in PRIMES:  # the font's prime is raised already
        children = unraise(element, *children)
    if element.tag == "mover" and children[1].text in ACCENTS:
        children[1].text = ACCENTS[children[1].text]
        children[1].attrib.setdefault("stretchy", "false")
    if children and children[0].get("fence") == "true" and not any(part.tag in TALL for part in element.iter()):
        for fence in (child for child in children if child.get("fence")):
            fence.set("stretchy", "false")  # as TeX: a subscript alone does not make its brackets grow
    for place, child in enumerate(children):
        if element.tag in SCRIPTS and place:
            below = "script"
        elif element.tag == "mfrac":
            below = "text" if style == "display" else "script"
        elif element.tag == "mtable" and style == "display" and not element.get("displaystyle"):
            below = "text"
        else:
            below = style
        mend(child, below)
    if element.tag in ("mi", "mn", "mtext"):
        mend_letter(element)
    elif element.tag == "mo":
        element.attrib |= {"lspace": "0", "rspace": "0"}
    elif element.tag == "mspace" and element.get("width") == "negativethinmathspace":
        element.set("width", "-0.167em")
    elif element.tag == "mtr":
        align(children)
    if element.tag in ROWS:
        space(element, style)


def unraise(element, base, *scripts):
    """A prime stands beside its base; returns the new parts."""
    *subscript, prime = scripts
    row = [base, prime]
    if subscript:
        element.tag, row = "msub", [Element("mrow"), *subscript]
        row[0].extend([base, prime])
        row[0].text = ""
    else:
        element.tag = "mrow"
    element[:] = row
    return row


def mend_letter(element):
    """Letters of other alphabets are characters of their own, and capital Greek letters stand upright."""
    variant = element.attrib.pop("mathvariant", None)
    if variant == "normal" or "Α" <= element.text <= "Ω":
        element.set("mathvariant", "normal")
    elif variant:
        element.text = "".join(letter(char, variant) if char.isalnum() else char for char in element.text)
    elif element.text == "~":  # what latex2mathml writes for \sim
        element.text = "∼"


def letter(char, variant):
    """A character in another alphabet, e.g. ("L", "script") is ℒ."""
    variant = variant.replace("bold-", "bold ").upper()
    name = re.sub("LATIN |GREEK |LETTER ", "", unicodedata.name(char))
    for full in (f"MATHEMATICAL {variant} {name}", f"{variant} {name}"):
        try:
            return unicodedata.lookup(full)
        except KeyError:
            continue
    raise ValueError(f"there is no {variant.lower()} {char}")


def align(cells):
    """Align the cells of a table's row; one set to the left closes up to one before it that is set to the right."""
    before = None
    for cell in cells:
        place = cell.attrib.pop("columnalign", "center")
        closing = {"right": ";padding-right:0"}.get(place) or {"right": ";padding-left:0"}.get(before, "")
        cell.set("style", f"text-align:{place}{closing}")
        before = place


def space(row, style):
    """Join upright letters to words, and put TeX's spaces between atoms; in scripts only those beside an operator."""
    children = []
    for child in row:
        if child.tag != "mspace" and children and is_upright(child) and is_upright(children[-1]):
            children[-1].text += child.text
            continue
        children.append(child)
    atoms = [child for child in children if child.tag != "mspace"]
    kinds = dict(zip(atoms, atom_classes(atoms), strict=True))
    row[:] = []
    left = None
    for child in children:
        if right := kinds.get(child):
            width = WIDTHS[int(SPACES[CLASSES.index(left)][CLASSES.index(right)])] if left else ""
            if width and (style != "script" or (width == WIDTHS[1] and "op" in (left, right))):
                row.append(Element("mspace", width=width))
            left = right
        row.append(child)


def is_upright(element):
    return element.tag == "mi" and element.get("mathvariant") == "normal" and element.text.isascii()


def atom_classes(atoms):
    """TeX's class of each atom of a row. Bars open and close in turn; a sign without two operands is ordinary."""
    found, bars = [], 0
    for atom in atoms:
        core = atom
        while core.tag in SCRIPTS:
            core = core[0]
        text = core.text
        if core.tag == "mrow" and len(core) and core[0].get("fence") == "true":
            found.append("inner")
        elif core.tag in ("mi", "mo") and len(text) > 1 and not core.get("mathvariant"):
            found.append("op")  # log, max
        elif classes().get(text) == "fence":
            found.append(("open", "close")[bars % 2])
            bars += 1
        else:
            found.append(classes().get(text, "ord"))
    found = [kind if kind in CLASSES else "ord" for kind in found]
    for place, kind in enumerate(found):
        before, after = [None, *found][place], [*found, None][place + 1]
        if kind == "bin" and (
            before in (None, "bin", "op", "rel", "open", "punct") or after in (None, "rel", "close", "punct")
        ):
            found[place] = "ord"
    return found


def visit_inline(translator, node):
    write(translator, node, "span")


def visit_block(translator, node):
    if node.get("number"):
        LOG.warning("a formula has a number, and none is shown: take its label away", location=node)
    write(translator, node, "div", tabindex="0")  # for the keyboard to scroll it on a phone's width


def write(translator, node, tag, **attributes):
    try:
        formula = mathml(node.astext(), display=tag == "div")
    except ValueError as error:
        LOG.warning(f"the formula {node.astext().strip()!r} is not shown: {error}; write it otherwise", location=node)
        formula = ""
    translator.body.append(f"{translator.starttag(node, tag, '', CLASS='math', **attributes)}{formula}</{tag}>")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.add_css_file("formulas.css")
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
