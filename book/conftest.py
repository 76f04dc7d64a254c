"""How nbval compares the notebooks: all but stderr, where warnings and progress go."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TUNING_QUICK"] = "1"  # solutions run at a small size: it checks their code


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook
        collector.skip_compare += ("stderr",)
