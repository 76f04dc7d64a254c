"""The side bar shows chapters; next and previous follow them, past laboratories and solutions."""


def setup(app):
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
