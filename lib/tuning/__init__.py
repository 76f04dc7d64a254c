"""The library of *Tuning Language Models from Scratch*: one module a method, each readable from top to bottom."""

import warnings

__version__ = "0.1.0"

# transformers asks tqdm for a bar made of widgets and warns where there are none; the plain bar is what the book wants.
warnings.filterwarnings("ignore", message="IProgress not found")
