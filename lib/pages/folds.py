"""Folded cells: the title is what the reader sees, and the name by which a screen reader knows the fold."""

import re
from html import escape

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode, HideInputCells
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

TITLE = re.compile(r"# @title (\S.*)\n?")  # the form that lib/tools/notebooks.py writes and checks
LOG = logging.getLogger(__name__)


class Titles(SphinxPostTransform):
    """Take the title of each folded cell from its code, before MyST-NB wraps the cell in its fold."""

    default_priority = HideInputCells.default_priority - 1
    formats = ("html",)

    def run(self, **_):
        for cell in self.document.findall(nodes.container):
            if "hide_mode" not in cell:
                continue
            code = cell.next_node(nodes.literal_block)
            match = TITLE.match(code.astext())
            if match:
                cell["prompt_show"] = match[1]
                # The code is highlighted only where the node's source is its text.
                code.rawsource = code.astext()[match.end() :]
                code.children = [nodes.Text(code.rawsource)]
            else:
                LOG.warning(
                    "cell %d, which begins %r, is folded and has no title: make its first line `# @title …`, "
                    "or take away its tag hide-input or hide-cell",
                    cell["cell_index"] + 1,
                    code.astext().split("\n", 1)[0],
                    location=self.env.docname,
                )


def open_fold(translator, node):
    """A closed fold whose one line is the title; the tick of a check has a colour of its own."""
    title = re.sub("^✓", '<span class="tick">✓</span>', escape(node["prompt_show"]))
    translator.body.append(f'<details class="fold">\n<summary>{title}</summary>\n')


def close_fold(translator, _):
    translator.body.append("</details>\n")


def setup(app):
    app.add_post_transform(Titles)
    app.add_node(HideCodeCellNode, override=True, html=(open_fold, close_fold))
    app.add_css_file("folds.css")
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
