"""`make floors`: the unit tests at the lower bounds of pyproject.toml, in an environment of their own (`.venv-floors`).

    python3.11 lib/tools/floors.py                     # every unit test
    python3.11 lib/tools/floors.py tests/test_lora.py  # or what pytest is told

Standard library only. pip gets each bound as a pin, and refuses a bound that another one's needs contradict. PyTorch is
the one of requirements.txt: its builds for other years' CUDA would be gigabytes more.
"""

import os
import re
import subprocess
import sys
import tomllib

import bootstrap
from bootstrap import ROOT

TOOLS = ("pytest", "pytest-xdist", "nbval", "nbclient", "nbformat")
# These test what the book is made and taught with, which is pinned.
OTHERS = {
    "test_assignments", "test_book", "test_chart_pages", "test_colab", "test_folds", "test_grading", "test_notebooks",
    "test_order", "test_pictures", "test_publish", "test_speed", "test_terms", "test_tools",
}  # fmt: skip


def check_python(version=sys.version_info):
    if tuple(version[:2]) != bootstrap.PYTHON_NEEDED:
        needed = ".".join(map(str, bootstrap.PYTHON_NEEDED))
        raise SystemExit(
            f"The lower bounds are tried with Python {needed}, which is one of them, and {sys.executable} is "
            f"{version[0]}.{version[1]}. Name another one: make floors PYTHON=python{needed}"
        )


def pins():
    """What the environment is made of: pyproject's lower bounds; torch and the tools of the tests as everywhere."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = [need.replace(">=", "==") for need in needs if not need.startswith("torch>=")]
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return bounds + [line for line in requirements if re.split("==", line)[0] in {"torch", *TOOLS}]


def unit_tests():
    return [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if path.stem not in OTHERS]


def main(arguments):
    check_python()
    venv = ROOT / ".venv-floors"
    bootstrap.set_up(venv, *pins())
    pytest = [venv / "bin" / "pytest", "-n", "2", "--dist", "loadfile", *(arguments or unit_tests())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes of one thread beat one of two
    raise SystemExit(subprocess.run(pytest, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
