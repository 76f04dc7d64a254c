"""How nbval compares the notebooks: all but stderr, where warnings and progress go."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook
        collector.skip_compare += ("stderr",)
