"""Pages that open at once: nothing that can wait is asked for before the first paint."""


def setup(app):
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
