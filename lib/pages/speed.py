"""Pages that open at once: nothing that can wait is asked for before the first paint.

The theme asks on every page for a script that draws any icon there is (490 KB compressed), for fonts of all icons, and
for the index of the search. Here each page that was written is rewritten, and the icons are cut to those that are used.
Each step looks for what it takes away and stops the build where that is missing, so that a new theme is noticed.
"""

import io
import re
from pathlib import Path

import imagesize
from fontTools import subset
from fontTools.ttLib import TTFont
from sphinx.errors import ExtensionError

EARLY = 1500  # characters of text above a picture that the first screen may show
ICON_RULE = re.compile(r'((?:\.fa-[\w-]+::?before,?)+)\{content:"\\([0-9a-f]+)"\}')
ICON_FONTS = ("fa-solid-900", "fa-regular-400", "fa-brands-400")


def take(pattern, text, page, least=1):
    """What matches a pattern, and the text without it.

    Raises:
        ExtensionError: it matches less often than expected.
    """
    found = re.findall(pattern, text, flags=re.DOTALL)
    if len(found) < least:
        raise ExtensionError(
            f"{page} has no {pattern!r}, which the theme wrote when lib/pages/speed.py was made: see what the theme "
            "writes now, and mend that file"
        )
    return found, re.sub(pattern, "", text, flags=re.DOTALL)


def rewrite(html, page, pictures):
    """A page that opens at once.

    Args:
        html: what the theme wrote.
        page: its name, e.g. "book/index".
        pictures: a function that gives the width and the height of a picture, in pixels, or (-1, -1).
    """
    head, end, body = html.partition("</head>")
    _, head = take(r'<script defer src="[^"]*/fontawesome\.js[^"]*"></script>\s*', head, page)
    _, head = take(r'<link rel="preload" as="script" [^>]*>\s*', head, page, least=2)
    if page != "search":  # a page only leads to search.html, which asks for these itself
        _, head = take(
            r'<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>\s*', head, page, 3
        )
    scripts, head = take(r"<script(?! data-cfasync).*?</script>\s*", head, page)  # the one that stays sets the theme
    start, close, rest = body.rpartition("</body>")
    return head + end + late(start, pictures) + "".join(scripts) + close + rest


def late(body, pictures):
    """Pictures keep their place free, and those below the first screen are loaded when the reader comes near."""
    article = body.find("<article")

    def mend(match):
        tag = match[0]
        above = re.sub(r"<[^>]*>|\s+", " ", body[article : match.start()]) if article >= 0 else ""
        if "loading=" not in tag and len(above) > EARLY:
            tag = tag.replace("<img", '<img loading="lazy"', 1)
        width, height = pictures(match["source"])
        if width > 0 and not re.search(r"\s(width|height)=", tag):
            tag = tag.replace("<img", f'<img width="{width}" height="{height}"', 1)
        return tag

    return re.sub(r'<img\b[^>]*?\ssrc="(?P<source>[^"]*)"[^>]*>', mend, body)


def cut_icons(style, scripts_and_pages, other_styles, where):
    """The theme's style sheet without the icons that no page names, and the characters of those that stay."""
    used = set(re.findall(r"fa-[\w-]+", scripts_and_pages))
    rules, _ = take(ICON_RULE.pattern, style, where)
    kept = {code for names, code in rules if used & set(re.findall(r"fa-[\w-]+", names))}
    style = ICON_RULE.sub(lambda rule: rule[0] if rule[2] in kept else "", style)
    written = style + other_styles
    codes = {int(code, 16) for code in re.findall(r"\\([ef][0-9a-f]{3})\b", written)}
    return style, codes | {ord(char) for char in re.findall("[\ue000-\uf8ff]", written)}


def write_icons(static, scripts_and_pages):
    path = static / "styles" / "pydata-sphinx-theme.css"
    others = "".join(other.read_text("utf-8") for other in static.rglob("*.css") if other != path)
    style, codes = cut_icons(path.read_text("utf-8"), scripts_and_pages, others, path.name)
    path.write_text(style, "utf-8")
    for name in ICON_FONTS:
        file = static / "vendor" / "fontawesome" / "webfonts" / f"{name}.woff2"
        if not file.is_file():
            raise ExtensionError(f"the theme has no font {file}: see which it brings, and mend lib/pages/speed.py")
        options = subset.Options(flavor="woff2", layout_features=[])
        font = TTFont(io.BytesIO(file.read_bytes()), recalcTimestamp=False)
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=codes)
        cutter.subset(font)
        subset.save_font(font, file, options)


def finish(app, exception, written):
    if exception or app.builder.format != "html":
        return
    out = Path(app.outdir)
    for page in written:
        path = Path(app.builder.get_outfilename(page))
        html = rewrite(path.read_text("utf-8"), page, lambda source, path=path: size(path.parent / source))
        path.write_text(html, "utf-8")
    texts = [*out.rglob("*.html"), *(out / "_static").rglob("*.js")]
    texts = [path.read_text("utf-8") for path in texts if path.name != "fontawesome.js"]
    write_icons(out / "_static", "".join(texts))


def size(picture):
    return tuple(map(round, imagesize.get(picture))) if picture.is_file() else (-1, -1)


def setup(app):
    written = []  # by this build; the pages of earlier ones are rewritten already
    app.connect("html-page-context", lambda app, page, *_: written.append(page))
    app.connect("build-finished", lambda app, exception: finish(app, exception, written))
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": False}
