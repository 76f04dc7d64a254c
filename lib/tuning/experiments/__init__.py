"""Recorded experiments: `python -m tuning.experiments.NAME` writes `results/NAME.json`, which the chapters plot."""
