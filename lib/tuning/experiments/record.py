"""Run an experiment in resumable pieces and write its results together with where they come from."""

import argparse
import ast
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from ..evaluate import as_hits, paired_interval
from ..files import write_json

PACKAGE = Path(__file__).parents[1]
RESULTS = PACKAGE / "results"
LIBRARIES = ("torch", "transformers", "datasets")


class Recorder:
    """Collects the pieces of one experiment; killed and started again, it repeats none that is finished.

    A finished piece is taken up again while what it came from is unchanged: the code of the modules that it names, its
    settings, and the kind of device. Another commit, another day or another machine do not matter; each piece keeps
    where it came from.

    Args:
        name: the experiment's name; the result is `folder/name.json`.
        folder: where to write. Into the package's own `results` only from a tree without uncommitted code.
        device: what it runs on, a `torch.device`.
        total: how many pieces there will be, for the progress line.
        module: the module that is run, if its name is not the result's.
        save: keep finished pieces in `folder/name.part.json`, to be committed, so that a long run goes on elsewhere;
            else in a folder that git ignores.
        settings: what the outcome depends on (model, seed, sizes).

    Raises:
        RuntimeError: the code has uncommitted changes.
    """

    def __init__(self, name, folder, device, total, module=None, save=False, **settings):
        self.commit = code_commit()
        if Path(folder).resolve() == RESULTS.resolve() and (self.commit is None or self.commit.endswith("-dirty")):
            raise RuntimeError(
                "results are recorded from committed code only: commit the changes under lib/, or write elsewhere "
                "with --out FOLDER"
            )
        self.name, self.folder, self.device, self.total = name, Path(folder), str(device), total
        self.module = module or name
        self.settings = json.loads(json.dumps(settings))
        self.saved, self.local = self.folder / f"{name}.part.json", self.folder / ".partial" / f"{name}.json"
        self.path = self.saved if save else self.local
        self.finished = {path: read_json(path) for path in (self.saved, self.local)}  # of earlier runs, valid or not
        self.pieces, self.origins = {}, {}

    def piece(self, key, compute, *arguments, modules=None):
        """The result of `compute(*arguments)`, from this call or from an earlier one.

        Args:
            modules: names of the library's modules that the result depends on, e.g. ("lora", "training"); what these
                import counts too. None is the module of the experiment.
        """
        code = code_hash(*(modules or [f"experiments.{self.module}"]))
        stamp = {"code": code, "device": self.device, "settings": self.settings}
        earlier = [pieces[key] for pieces in self.finished.values() if key in pieces]
        found = next((piece for piece in earlier if piece["stamp"] == stamp), None)
        if found is None:
            start = time.perf_counter()
            value = json.loads(json.dumps(compute(*arguments)))  # as it will be read
            origin = self.origin() | {"seconds": round(time.perf_counter() - start, 1)}
            found = {"stamp": stamp, "origin": origin, "value": value}
        if self.finished[self.path].get(key) != found:
            self.finished[self.path][key] = found
            write_json(self.path, self.finished[self.path])
        self.pieces[key], self.origins[key] = found["value"], found["origin"]
        done, seconds = len(self.pieces), found["origin"]["seconds"]
        print(f"[{done}/{self.total}] {key}: {seconds:.0f} s; {self.total - done} left", flush=True)
        return found["value"]

    def origin(self):
        """Where a piece that is computed now comes from."""
        return {
            "commit": self.commit,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "versions": {library: version(library) for library in LIBRARIES if find_spec(library)},
        }

    def finish(self):
        """Write the result file and remove the pieces; returns its path.

        `provenance` is that of the run that ends here; `origins` says of each piece where it came from.
        """
        origins = []
        for key, origin in self.origins.items():
            place = {what: value for what, value in origin.items() if what != "seconds"}
            group = next((one for one in origins if one["place"] == place), None)
            if group is None:
                origins.append(group := {"place": place, "seconds": {}})
            group["seconds"][key] = origin["seconds"]
        seconds = sum(sum(group["seconds"].values()) for group in origins)
        provenance = {
            "command": "python -m " + " ".join([f"tuning.experiments.{self.module}", *sys.argv[1:]]),
            "device": self.device,
            "seconds": round(seconds),
            "settings": self.settings,
        }
        path = self.folder / f"{self.name}.json"
        write_json(path, {"provenance": self.origin() | provenance, "origins": origins, "results": self.pieces})
        for pieces in (self.saved, self.local):
            pieces.unlink(missing_ok=True)
        with suppress(OSError):  # other runs may have pieces there
            self.local.parent.rmdir()
        print(f"wrote {path.name}: {seconds:.0f} s of computing", flush=True)
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
    parser.add_argument(
        "--save", action="store_true", help="keep finished pieces in NAME.part.json: commit it, and go on elsewhere"
    )
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
    days = sorted({p["date"], *(origin["place"]["date"] for origin in recorded.get("origins", ()))})
    date = p["date"] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    versions = ", ".join(f"{library} {number}" for library, number in p["versions"].items())
    commit = (p["commit"] or "no git")[:7]
    return f"recorded {date} by `{p['command']}` at {commit}: {p['seconds']} s on {p['machine']}; {versions}"


def gain(runs, one, other, seeds=(0, 1, 2)):
    """How much more of the test sentences one method has right than another: the mean over seeds, and its interval."""
    hits = [[as_hits(runs[f"run/{method}/{seed}"]["hits"]) for seed in seeds] for method in (one, other)]
    gains = [a - b for a, b in zip(*hits, strict=True)]
    return (torch.cat(gains).mean().item(), *paired_interval(gains, same_items=True))


def method_rows(runs, methods, base, seeds=(0, 1, 2)):
    """For each method of the recorded runs what a table shows; `base` is what the others are compared with."""
    rows = {}
    for method in methods:
        three, live = [runs[f"run/{method}/{seed}"] for seed in seeds], runs[f"live/{method}"]
        scores = [run["test"] for run in three]
        elsewhere = [run["perplexity elsewhere"] / runs["untrained"]["perplexity elsewhere"] for run in three]
        rows[method] = {
            "rate": f"{three[0]['lr']:g}",
            "test": f"{sum(scores) / len(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})",
            f"over {base}": ""
            if method == base
            else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain(runs, method, base, seeds)),
            "perplexity elsewhere": f"x {min(elsewhere):.2f} to {max(elsewhere):.2f}",
            "trained": f"{live['trained']:,}",
            "stored, MB": round(4 * live["trained"] / 1e6),
            "gradients, MB": round(live["largest"]["gradients"] / 1e6),
            "peak, MB": round(sum(live["peak"].values()) / 1e6),
            "ms a step": round(1000 * min(run["seconds"] for run in three) / len(three[0]["losses"])),
        }
        if method != base:
            mean, low, high = gain(runs, method, base, seeds)
            rows[method][f"over {base}"] = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return rows


def read_json(path):
    """What a JSON file holds; an empty dict where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend or delete it") from error


@cache
def code_hash(*modules):
    """A hash of the code of some of the library's modules and of all that they import, without docstrings and comments.

    The recorder's own module does not count. Data files do, where `data` is among the modules.
    """
    digest = hashlib.sha256()
    for module, tree in sorted(imported(modules).items()):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{module} {_plain(tree)}".encode())
        if module == "data":
            for path in sorted((PACKAGE / "corpora").glob("**/*.jsonl")):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _plain(node):
    """A syntax tree as nested lists. `ast.dump` would not do: it differs between versions of Python."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [[name, _plain(value)] for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *fields]


def imported(modules):
    """{module: its syntax tree} of these modules of the library and of all that they import from it."""
    found, todo = {}, list(modules)
    while todo:
        module = todo.pop()
        path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        if module in found or module == "experiments.record":
            continue
        if not path.is_file():
            raise ValueError(f"the library has no module {module!r}; name one as in ('lora', 'experiments.lora')")
        found[module] = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(found[module]):
            if isinstance(node, ast.ImportFrom) and node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
                names = [base] if node.module else [".".join([*parents, alias.name]) for alias in node.names]
                todo += names
    return found


def machine():
    """The machine in words: GPU, or processor and its cores."""
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
