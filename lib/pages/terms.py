"""Terms of the glossary explain themselves where a page first uses them.

At its first use in a page's prose a term that the glossary has in bold becomes a button, which opens a popover: the
term's Korean, its meaning and a link to its row. Keys and touch need no script; `terms.js` adds the mouse's hover.
"""

import re
from html import escape
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError

PAGE = "book/glossary"
SOURCES = {PAGE, "book/references"}  # pages whose own words are not explained
# Names, and terms that Korean texts leave in English.
ENGLISH = {
    "AdaLomo",
    "FakeTensor",
    "in-context learning(ICL)",
    "LOMO",
    "NF4(NormalFloat)",
    "P@1",
    "P-tuning",
    "paged optimizer",
    "QLoRA",
}
NO_PROSE = (
    nodes.caption,
    nodes.FixedTextElement,
    nodes.footnote,
    nodes.legend,
    nodes.literal,
    nodes.math,
    nodes.raw,
    nodes.reference,
    nodes.thead,
    addnodes.download_reference,
)
NOT_OPEN = {"cell", "dropdown", "toggle", "sd-card"}  # classes of cells, of prose folded away, of cards that are links
HANGUL = re.compile("[가-힣]")


class Entry(NamedTuple):
    spellings: tuple[str, ...]
    korean: str
    meaning: str
    flagged: bool

    @property
    def slug(self):
        return nodes.make_id(self.spellings[0])


def parse(markdown):
    """The entries of the glossary's table, in its order; ExtensionError names a row that is not as it should be."""
    entries, known = [], set()
    for line in [line for line in markdown.splitlines() if line.startswith("|")][2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        spellings = tuple(spelling.strip() for spelling in cells[0].strip("*").split(","))
        check(len(cells) == 3 and all([*cells, *spellings]), line, "write | term | 한국어 | meaning |, no column empty")
        korean, meaning = cells[1:]
        advice = f"{korean!r} has no Hangul: write the Korean, or name it in ENGLISH of lib/pages/terms.py"
        check(HANGUL.search(korean) or korean in ENGLISH, line, advice)
        for spelling in spellings:
            check(spelling.casefold() not in known, line, f"{spelling!r} has a row already: keep one of the two")
            known.add(spelling.casefold())
        entries.append(Entry(spellings, korean, meaning, cells[0].startswith("**")))
    return entries


def check(right, line, advice):
    if not right:
        raise ExtensionError(f"{PAGE}.md, row {line!r}: {advice}")


def matcher(entries):
    """A function that yields a text's terms as (start, end, entry): whole words, also with -s, the longest first."""
    owners = {spelling.casefold(): entry for entry in entries for spelling in entry.spellings}
    words = [re.escape(word).replace(r"\ ", r"[\s-]") for word in sorted(owners, key=len, reverse=True)]
    pattern = re.compile(rf"(?<![\w-])({'|'.join(words)})s?(?![\w-])", re.IGNORECASE)

    def find(text):
        for match in pattern.finditer(text):
            word = match[1].casefold()
            yield match.start(), match.end(), owners.get(word) or owners[re.sub(r"[\s-]", " ", word)]

    return find


class Term(nodes.inline):
    """The first use of a term; its text stays in the sentence and in the search."""


class Meanings(nodes.Element):
    """The popovers of a page, behind its text."""


def in_prose(text):
    """Whether a text stands in a paragraph, a list or a table, outside code, links, captions and what is folded."""
    above, node = [], text
    while node := node.parent:
        above.append(node)
    return any(isinstance(node, nodes.paragraph) for node in above) and not any(
        isinstance(node, NO_PROSE) or NOT_OPEN.intersection(node.get("classes", ())) for node in above
    )


def explain(doctree, find):
    """Turn each flagged term's first use into a Term; what the page's title names, the page itself explains."""
    title = next(doctree.findall(nodes.title), None)
    seen = {entry for _, _, entry in find(title.astext())} if title else set()
    found = []
    for text in filter(in_prose, list(doctree.findall(nodes.Text))):
        parts, done = [], 0
        for start, end, entry in find(text):
            if entry.flagged and entry not in seen:
                seen.add(entry)
                found.append(entry)
                parts += [nodes.Text(text[done:start]), Term("", text[start:end], slug=entry.slug)]
                done = end
        if parts:
            parts.append(nodes.Text(text[done:]))
            text.parent.replace(text, [part for part in parts if part.astext()])
    for term in list(doctree.findall(Term)):
        keep_together(term)
    return found


def keep_together(term):
    """Put a term and the bracket or comma that touches it on one line: browsers may break a line beside a button."""
    while isinstance(term.parent, (nodes.emphasis, nodes.strong)) and len(term.parent) == 1:
        term = term.parent
    parent, place = term.parent, term.parent.index(term)
    before, after = parent[:place], parent[place + 1 :]
    unbroken = nodes.inline("", "", term, classes=["unbroken"])
    if before and isinstance(before[-1], nodes.Text):
        space, touching = re.fullmatch(r"(.*?)(\S*)", before.pop(), re.DOTALL).groups()
        before.append(nodes.Text(space))
        unbroken.insert(0, nodes.Text(touching))
    if after and isinstance(after[0], nodes.Text):
        touching, rest = re.fullmatch(r"(\S*)(.*)", after.pop(0), re.DOTALL).groups()
        after.insert(0, nodes.Text(rest))
        unbroken.append(nodes.Text(touching))
    parent.children = []
    parent.extend([*before, unbroken, *after])


def popover(entry, glossary):
    korean = f' <span lang="ko">{escape(entry.korean)}</span>' if HANGUL.search(entry.korean) else ""
    meaning = re.sub("`(.+?)`", r"<code>\1</code>", escape(entry.meaning, quote=False))
    return (
        f'<div popover class="meaning" id="meaning-{entry.slug}">'
        f"<p><strong>{escape(', '.join(entry.spellings))}</strong>{korean}</p>"
        f'<p>{meaning}</p><p><a href="{glossary}#term-{entry.slug}">In the glossary</a></p></div>\n'
    )


def resolved(app, doctree, docname):
    if app.builder.format != "html":
        return
    if docname == PAGE:
        rows = next(doctree.findall(nodes.tbody)).findall(nodes.row)
        for row, entry in zip(rows, app.config.glossary, strict=True):
            row["ids"].append(f"term-{entry.slug}")
            row[1]["classes"].append("language-ko")  # docutils writes it as lang="ko"
    if docname not in SOURCES and (found := explain(doctree, matcher(app.config.glossary))):
        glossary = app.builder.get_relative_uri(docname, PAGE)
        doctree += Meanings(html="".join(popover(entry, glossary) for entry in found))


def visit_term(self, node):
    self.body.append(
        f'<button type="button" class="term" popovertarget="meaning-{node["slug"]}" popovertargetaction="show">'
    )


def depart_term(self, node):
    self.body.append("</button>")


def visit_meanings(self, node):
    self.body.append(node["html"])


def depart_meanings(self, node):
    pass


def setup(app):
    text = Path(app.srcdir, f"{PAGE}.md").read_text(encoding="utf-8")
    app.add_config_value("glossary", parse(text), "html")  # a changed glossary has every page written anew
    app.add_node(Term, html=(visit_term, depart_term))
    app.add_node(Meanings, html=(visit_meanings, depart_meanings))
    app.add_css_file("terms.css")
    app.add_js_file("terms.js", loading_method="defer")
    app.connect("doctree-resolved", resolved)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
