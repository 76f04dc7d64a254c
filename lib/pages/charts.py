"""Charts to play with: the still picture first, the living chart when the reader reaches it.

`tuning.charts` puts a chart's description and its still into a notebook. A page gets both: the picture, and the
description in a script element that browsers do not run. `_static/charts.js` draws the one in the place of the other.
A page that is no notebook shows the chart of one:

    ```{chart} 4-lomo/11-where-the-memory-goes.ipynb
    ```
"""

import json
import os
from pathlib import Path

import nbformat
import vl_convert
from docutils import nodes
from myst_nb.core.render import load_mime_renders
from myst_nb.sphinx_ import SelectMimeType
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from tuning.charts import MIME_TYPE, VEGA_LITE

LICENCE = "/* Vega, Vega-Lite and Vega-Embed: BSD 3-Clause License, (c) University of Washington and contributors. */"


class Description:
    """MyST-NB asks this for each output of a notebook, and gets a chart's description as a script element."""

    @staticmethod
    def handle_mime(renderer, data, inline):
        if data.mime_type != MIME_TYPE:
            return None
        return [nodes.raw("", script(data.content), format="html", alt=data.content["description"])]


def script(spec):
    """A chart's description as an element that browsers do not run."""
    text = json.dumps(spec, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="{MIME_TYPE}">{text}</script>'


class ChartOf(SphinxDirective):
    """`{chart} notebook`: the first chart of a notebook, whose place is given as seen from this page."""

    required_arguments = 1

    def run(self):
        path = Path(self.get_source_info()[0]).parent / self.arguments[0]
        self.env.note_dependency(str(path))
        if not path.is_file():
            raise self.error(f"{path} is no file; give the notebook's place as seen from this page")
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                if MIME_TYPE in output.get("data", {}):
                    return [nodes.container("", *self.shown(output, path.stem), classes=["chart"])]
        raise self.error(f"{path} shows no chart; run it, or name another notebook")

    def shown(self, output, name):
        """The still, as a file that Sphinx takes along, and the description."""
        still = Path(self.env.doctreedir, f"{name}.svg")
        still.write_text(output.data["image/svg+xml"], encoding="utf-8")
        here = Path(self.env.doc2path(self.env.docname)).parent
        spec, size = output.data[MIME_TYPE], output.metadata["image/svg+xml"]
        image = nodes.image(uri=Path(os.path.relpath(still, here)).as_posix(), alt=spec["description"])
        image.attributes |= {side: f"{size[side]}px" for side in size} | {"classes": ["no-scaled-link"]}
        return [image, nodes.raw("", script(spec), format="html")]


class StillAndDescription(SphinxPostTransform):
    """Put a chart's still and its description together, before MyST-NB chooses one of the two."""

    default_priority = SelectMimeType.default_priority - 1
    formats = ("html",)

    def run(self):
        for container in list(self.document.findall(nodes.container)):
            if container.get("mime_type") != MIME_TYPE:
                continue
            (picture,) = (part for part in container.parent if part["mime_type"] == "image/svg+xml")
            (image,), (script,) = picture.children, container.children
            image["alt"] = script["alt"]
            image["classes"].append("no-scaled-link")
            picture.children = []
            picture += nodes.container("", image, script, classes=["chart"])


def add_scripts(app, pagename, templatename, context, doctree):
    """Pages with a chart get the scripts that bring it to life; no other page asks for them."""
    if doctree and any("chart" in node["classes"] for node in doctree.findall(nodes.container)):
        app.add_css_file("charts.css")
        app.add_js_file("charts.js", loading_method="defer")
        # In a function, since the bundle's short names would meet those of other scripts.
        bundle = f"{LICENCE}\n(() => {{\n{vl_convert.javascript_bundle(vl_version=VEGA_LITE)}\n}})();\n"
        Path(app.outdir, "_static", "vega.js").write_text(bundle, encoding="utf-8")


def setup(app):
    load_mime_renders().append(Description)  # what an entry point does for an installed package
    app.add_directive("chart", ChartOf)
    app.add_post_transform(StillAndDescription)
    app.connect("html-page-context", add_scripts)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
