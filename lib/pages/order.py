"""The side bar shows chapters; next and previous follow them, past laboratories and solutions.

The table of contents says it all: what stands directly under a part is on the main line, and what is a section of such
a page (a laboratory, solutions) is beside it. Who reads from front to back is led along the main line. From a page
beside it "previous" goes back to its chapter, where the reader came from, and "next" on to the chapter that follows:
the side bar, and the chapter's own links, lead to the other sections.
"""


def neighbours(includes, root, page):
    """What comes before and after a page for who reads the book in order.

    Args:
        includes: page -> the pages that its table of contents names, as Sphinx's `env.toctree_includes`.
        root: the first page of the book.
        page: a page of the book.

    Returns:
        (previous, next), each the name of a page or None.
    """
    line = [root, *includes.get(root, ())]  # a book of one page has no table of contents
    chapter = page
    while chapter not in line:
        chapter = parent(includes, chapter)
    place = line.index(chapter)
    before = line[place - 1 : place] if page == chapter else [chapter]
    after = line[place + 1 : place + 2]
    return next(iter(before), None), next(iter(after), None)


def parent(includes, page):
    """The page whose table of contents names `page`; None if there is none, as for the first page and the search."""
    return next((above for above, pages in includes.items() if page in pages), None)


def set_neighbours(app, pagename, templatename, context, doctree):
    includes, root = app.env.toctree_includes, app.config.root_doc
    if pagename != root and parent(includes, pagename) is None:
        return
    for key, page in zip(("prev", "next"), neighbours(includes, root, pagename), strict=True):
        context[key] = page and {
            "link": app.builder.get_relative_uri(pagename, page),
            "title": app.builder.render_partial(app.env.titles[page])["title"],
        }


def name_toggles(app, pagename, templatename, context, doctree):
    """Give the buttons that open a chapter's sections in the side bar a name, which the theme leaves out."""
    side_bar = context["generate_toctree_html"]

    def named(*args, **kwargs):
        tree = side_bar(*args, **kwargs)
        for toggle in tree.select("li > details > summary"):
            toggle["aria-label"] = f"Sections of {toggle.find_parent('li').a.get_text()}"
        return tree

    context["generate_toctree_html"] = named


def keep_one_toggle(app, config):
    """Leave out the theme's bar above the page, which `book.css` hides: it holds a second button for the side bar.

    The theme's script listens to the first such button only, and with the hidden one first, the one in sight is dead.
    """
    config.html_theme_options["navbar_persistent"] = []


def setup(app):
    app.connect("config-inited", keep_one_toggle)
    app.connect("html-page-context", set_neighbours)
    app.connect("html-page-context", name_toggles, priority=900)  # after the theme has put its own function there
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
