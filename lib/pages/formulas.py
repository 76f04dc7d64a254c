"""Formulas as MathML, which a browser sets without a script."""


def setup(app):
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
