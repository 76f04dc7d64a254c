"""What a page says of itself to search engines: its description."""


def setup(app):
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
