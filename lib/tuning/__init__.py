"""The library of *Tuning Language Models from Scratch*: one module a method, each readable from top to bottom."""

__version__ = "0.1.0"
