"""Charts to play with: the still picture first, the living chart when the reader reaches it."""


def setup(app):
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
