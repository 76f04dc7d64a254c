"""Terms of the glossary explain themselves where a page first uses them."""


def setup(app):
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
