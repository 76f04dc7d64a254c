"""Run an experiment in resumable pieces and write its results together with where they come from."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
LIBRARIES = ("torch", "transformers", "datasets")


class Recorder:
    """Collects the pieces of one experiment; killed and started again, it repeats none that is finished.

    Args:
        name: the experiment's name; the result is `folder/name.json`.
        folder: where to write. Into the package's own `results` only from a tree without uncommitted code.
        device: what it runs on, a `torch.device`.
        total: how many pieces there will be, for the progress line.
        module: the module that is run, if its name is not the result's.
        settings: what the outcome depends on (model, seed, sizes). Pieces of other settings, of another device or of
            another commit are not taken up again. Where there is no git, TUNING_COMMIT in the environment names it.

    Raises:
        RuntimeError: the code has uncommitted changes.
    """

    def __init__(self, name, folder, device, total, module=None, **settings):
        self.commit = code_commit()
        if Path(folder) == RESULTS and (self.commit is None or self.commit.endswith("-dirty")):
            raise RuntimeError(
                "results are recorded from committed code only: commit the changes under lib/, or write elsewhere "
                "with --out FOLDER"
            )
        self.name, self.folder, self.device, self.total = name, Path(folder), str(device), total
        self.module = module or name
        self.settings = json.loads(json.dumps(settings))
        self.partial = self.folder / ".partial" / name
        self.partial.mkdir(parents=True, exist_ok=True)
        self.pieces, self.seconds = {}, 0.0

    def piece(self, key, compute):
        """The result of `compute()`, from this call or from an earlier, killed run."""
        path = self.partial / (key.replace("/", "-") + ".json")
        stamp = {"commit": self.commit, "device": self.device, "settings": self.settings}
        saved = json.loads(path.read_text()) if path.is_file() else {}
        if saved.get("stamp") != stamp:
            start = time.perf_counter()
            value = compute()
            saved = {"stamp": stamp, "seconds": time.perf_counter() - start, "value": value}
            write_json(path, saved)
        self.pieces[key] = saved["value"]
        self.seconds += saved["seconds"]
        done = len(self.pieces)
        print(f"[{done}/{self.total}] {key}: {saved['seconds']:.0f} s; {self.total - done} left", flush=True)
        return saved["value"]

    def finish(self):
        """Write the result file and remove the pieces; returns its path."""
        provenance = {
            "command": "python -m " + " ".join([f"tuning.experiments.{self.module}", *sys.argv[1:]]),
            "commit": self.commit,
            "date": datetime.now(UTC).date().isoformat(),
            "device": self.device,
            "machine": machine(),
            "seconds": round(self.seconds),
            "versions": {library: version(library) for library in LIBRARIES if find_spec(library)},
            "settings": self.settings,
        }
        path = self.folder / f"{self.name}.json"
        write_json(path, {"provenance": provenance, "results": self.pieces})
        for piece in self.partial.iterdir():
            piece.unlink()
        self.partial.rmdir()
        print(f"wrote {path.name}: {self.seconds:.0f} s of computing", flush=True)
        return path


def option_parser(doc, steps=None, model="smollm2-135m"):
    """The options that all experiments have: the first line of `doc`, the default of --steps and that of --model."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if model:
        parser.add_argument("--model", default=model, help="or a hub id, or a folder")
    parser.add_argument("--device", default=None)
    parser.add_argument("--steps", type=int, default=steps, help="of each training or search, to try things out")
    parser.add_argument("--limit", type=int, default=None, help="rows a split, to try things out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    return parser


def load_results(name, folder=RESULTS):
    """The recorded `{"provenance": …, "results": …}` of an experiment, or None where it is not yet measured."""
    path = Path(folder) / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def provenance_line(recorded):
    """One line that says where recorded results come from."""
    if recorded is None:
        return "not yet measured"
    p = recorded["provenance"]
    versions = ", ".join(f"{library} {number}" for library, number in p["versions"].items())
    return (
        f"recorded {p['date']} by `{p['command']}` at {p['commit'][:7]}: {p['seconds']} s on {p['machine']}; {versions}"
    )


def write_json(path, value):
    """Write to a temporary name and rename, so that a killed run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def machine():
    """The machine in words: GPU, or processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{os.cpu_count()} CPU cores ({cpu})"


def code_commit():
    """The last commit that touched the library's code, with "-dirty" for uncommitted changes; None outside git."""
    package = Path(__file__).parents[1]
    sources = [":(glob)**/*.py"]

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%H", "--", *sources)
        dirty = git("status", "--porcelain", "--", *sources)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TUNING_COMMIT")
    return commit + ("-dirty" if dirty else "") if commit else None
