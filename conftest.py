"""For tests and notebooks alike: no hub, small solutions, and nbval compares all but stderr and drawings."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TUNING_QUICK"] = "1"  # solutions run at a small size: their code is checked, not their findings


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook; warnings and progress go to stderr
        collector.skip_compare += ("stderr", "image/svg+xml")
