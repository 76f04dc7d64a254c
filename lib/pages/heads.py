"""What a page says of itself to search engines and previews: its question, or else the first sentences of its prose."""

import html
import re
from pathlib import PurePosixPath

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging

from .order import parent

SHORTEST, LONGEST = 50, 160  # characters of a description; what search engines show in full
PROSE = (nodes.section, nodes.bullet_list, nodes.enumerated_list, nodes.list_item)
SENTENCE_END = re.compile(r"(?<=[^A-Z][.?!])\s+(?=[A-Z])")  # not behind an initial, as in "E. Hu"

logger = logging.getLogger(__name__)


def prose(document):
    """The paragraphs of a page as plain text, items of lists too; not tables, cells, and what holds a formula."""
    for paragraph in document.findall(nodes.paragraph):
        around = paragraph.parent
        while isinstance(around, PROSE):
            around = around.parent
        not_text = [*paragraph.findall(nodes.math), *paragraph.findall(nodes.raw), *paragraph.findall(nodes.image)]
        not_yet_text = [link for link in paragraph.findall(addnodes.pending_xref) if not link.astext()]
        if around is document and not not_text and not not_yet_text:
            yield " ".join(paragraph.astext().split())


def describe(paragraphs):
    """A description of 50 to 160 characters: the first paragraph, others only as long as it is too short.

    Whole sentences as far as they fit; a first one that is too long is cut at a word. None if all are too short.
    """
    text = ""
    for paragraph in paragraphs:
        for sentence in SENTENCE_END.split(paragraph):
            longer = f"{text} {sentence}".strip()
            if len(longer) > LONGEST:
                return text if len(text) >= SHORTEST else longer[: LONGEST - 1].rsplit(" ", 1)[0].rstrip(" ,;:(–") + "…"
            text = longer
        if len(text) >= SHORTEST:
            return text
    return None


def read(app, document):
    app.env.metadata[app.env.docname]["description"] = describe(prose(document))


def description(env, page):
    """A page's description; that of solutions names the chapter, whose description follows if there is room."""
    if PurePosixPath(page).parent.name != "solutions":
        return env.metadata[page]["description"]
    chapter = parent(env.toctree_includes, page)
    title = env.titles[chapter].astext().replace(". ", ": ", 1)  # "12. LOMO"
    return describe([f"Solutions to the exercises of chapter {title}.", env.metadata[chapter]["description"] or ""])


def check(app, env):
    """Each page has a description, and no two the same; what has not is a warning, an error in a strict build."""
    seen = {}
    for page in sorted(env.found_docs):
        text = description(env, page)
        if text is None:
            logger.warning(
                f"no description: the page's prose has fewer than {SHORTEST} characters; write its question, one "
                f"sentence of {SHORTEST} to {LONGEST} characters without formulas, in italics under its title",
                location=page,
            )
        elif text in seen:
            logger.warning(
                f"the description is that of {seen[text]}, too: {text!r}; let the first sentence under the title say "
                "what only this page is about",
                location=page,
            )
        seen.setdefault(text, page)


def write(app, pagename, templatename, context, doctree):
    if pagename not in app.env.found_docs:
        return  # the search and the index of words, which Sphinx makes
    if pagename == app.config.root_doc:
        context["title"] = description(app.env, pagename)  # its own is the book's, which the theme adds to every title
    text = html.escape(description(app.env, pagename) or "")
    title = html.escape(app.env.titles[pagename].astext())
    context["metatags"] = context.get("metatags", "") + (
        f'<meta name="description" content="{text}" />\n'
        f'<meta property="og:title" content="{title}" />\n'
        f'<meta property="og:description" content="{text}" />\n'
    )


def setup(app):
    app.connect("doctree-read", read)
    app.connect("env-check-consistency", check)
    app.connect("html-page-context", write)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
