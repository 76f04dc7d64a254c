"""What the rendered pages need beyond Jupyter Book: one small Sphinx extension a module, all set up here."""

PARTS = ("folds", "charts", "terms", "order", "formulas", "heads", "speed")


def setup(app):
    for part in PARTS:
        app.setup_extension(f"{__name__}.{part}")
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
