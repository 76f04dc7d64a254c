"""Run a program that is not trusted: fenced in, limited, and heard only through a pipe.

The fence is bubblewrap's (`bwrap`), where it is installed and may run: no network, no other processes in sight, of the
files only the system's programs and what is shown to it, and nothing to write to but a folder in memory. Control groups
limit processes and memory together, where they can be made. Where these are missing, limits of single processes are
what is left; `unprotected` says what that means.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

MEGABYTE = 2**20
GROUPS = Path("/sys/fs/cgroup")
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
PRINTED = 4000  # bytes that are kept of what it prints


@dataclass(frozen=True)
class Limits:
    """Seconds by the clock; bytes of memory; processes and threads; bytes of a file, and of the answer."""

    seconds: float = 120
    memory: int = 4096 * MEGABYTE
    processes: int = 128
    file: int = 64 * MEGABYTE
    answer: int = 256 * MEGABYTE


@dataclass
class Finished:
    """How it ended: exit status; why it was stopped ("" if it was not); its answer; the end of what it printed."""

    status: int
    stopped: str
    answer: bytes
    printed: str
    peak: int  # bytes of memory of its largest process, as the system counted them


def run(command, question=b"", limits=None, show=(), environment=None):
    """Run `command` with `question` on its standard input; its answer is what it writes to the descriptor $ANSWER.

    It starts in an empty folder that is gone afterwards, as are all processes that it started.

    Args:
        show: files and folders that a fenced program may read, beside the system's programs and this Python.
        environment: variables it gets beside PATH, HOME and ANSWER; nothing else is handed on.

    Returns:
        A `Finished`.
    """
    limits, fenced = limits or Limits(), has_fence()
    before, tasks = set(psutil.Process().children(recursive=True)), _tasks()
    _adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="fence-") as folder, _group(limits) as groups:
        (read, write), (read_printed, write_printed) = os.pipe(), os.pipe()
        variables = {"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "TMPDIR": folder, "ANSWER": str(write)}
        process = subprocess.Popen(
            [*(_fence(folder, show) if fenced else ()), *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=write_printed,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            cwd=folder,
            env=variables | (environment or {}),
            start_new_session=True,
            preexec_fn=lambda: _limit(limits, groups, tasks),
        )
        os.close(write)
        os.close(write_printed)
        answer, printed = _Reader(read, limits.answer), _Reader(read_printed, PRINTED, tail=True)
        threading.Thread(target=_feed, args=(process.stdin, question), daemon=True).start()
        deadline, stopped, usage = time.monotonic() + limits.seconds, "", None
        while usage is None:
            pid, status, found = os.wait4(process.pid, os.WNOHANG)
            if pid:
                usage, process.returncode = found, os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline or answer.too_long:
                stopped = "time" if not answer.too_long else "length of the answer"
                os.killpg(process.pid, signal.SIGKILL)
                deadline = float("inf")
            else:
                time.sleep(0.02)
        _kill_all(before, groups)
        stopped = stopped or _overrun(groups)
        return Finished(process.returncode, stopped, answer.finish(), printed.text(), usage.ru_maxrss * 1024)


def unprotected():
    """What a program could do on this system although it runs in `run`, in words; empty where nothing is left open."""
    found = []
    if not has_fence():
        found.append("it can use the network and this user's files: bubblewrap is not installed, or may not run")
    if not has_groups():
        found.append("its memory is limited for each process, not for all together: no control group can be made")
        if os.geteuid() == 0:
            found.append("the number of its processes is not limited: process limits do not bind root")
    return found


@cache
def has_fence():
    """Whether bubblewrap is here and may build its fence."""
    if not shutil.which("bwrap"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([*_fence(folder, ()), "true"], capture_output=True, check=False).returncode == 0


@cache
def has_groups():
    """Whether control groups can be made that limit processes and memory."""
    with _group(Limits()) as groups:
        return bool(groups)


def _fence(folder, show):
    options = "bwrap --unshare-all --die-with-parent --cap-drop ALL --dev /dev --proc /proc"
    shown = (*SYSTEM, sys.prefix, sys.base_prefix, *show)
    shared = [option for place in dict.fromkeys(map(str, shown)) for option in ("--ro-bind-try", place, place)]
    return [*options.split(), *shared, "--tmpfs", folder, "--chdir", folder]


def _limit(limits, groups, tasks):
    """In the child, before it becomes the program."""
    own = {
        resource.RLIMIT_AS: 3 * limits.memory,  # of addresses, of which libraries reserve more than they use
        resource.RLIMIT_FSIZE: limits.file,
        resource.RLIMIT_CPU: int(os.cpu_count() * limits.seconds) + 1,
        resource.RLIMIT_CORE: 0,
    }
    if not groups:
        own[resource.RLIMIT_AS] = limits.memory + 2048 * MEGABYTE
        own[resource.RLIMIT_NPROC] = limits.processes + tasks
    for kind, value in own.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    for group in groups:
        (group / "cgroup.procs").write_text("0")


def _tasks():
    """Processes and threads of this user, which its limit counts together."""
    return sum(p.info["num_threads"] or 1 for p in psutil.process_iter(["num_threads", "uids"]) if _mine(p))


def _mine(process):
    return process.info["uids"] is not None and process.info["uids"].real == os.getuid()


@contextlib.contextmanager
def _group(limits):
    """Folders of new control groups that limit processes and memory; none where they cannot be made."""
    name, made = f"fence-{uuid.uuid4().hex[:12]}", []
    unified = (GROUPS / "cgroup.controllers").exists()
    wanted = (
        {GROUPS / name: {"pids.max": limits.processes, "memory.max": limits.memory, "memory.swap.max": 0}}
        if unified
        else {
            GROUPS / "pids" / name: {"pids.max": limits.processes},
            GROUPS / "memory" / name: {"memory.limit_in_bytes": limits.memory},
        }
    )
    try:
        for folder, values in wanted.items():
            folder.mkdir()
            made.append(folder)
            for file, value in values.items():
                if (folder / file).exists() or "swap" not in file:
                    (folder / file).write_text(str(value))
    except OSError:
        _remove(made)
        made = []
    try:
        yield made
    finally:
        _remove(made)


def _remove(groups):
    for folder in groups:
        for _ in range(100):
            try:
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:  # a process in it is not gone yet
                time.sleep(0.02)


def _overrun(groups):
    """Which limit of the groups was reached, or ""."""
    for folder in groups:
        for file, key, what in (
            ("memory.events", "oom_kill", "memory"),
            ("memory.oom_control", "oom_kill", "memory"),
            ("pids.events", "max", "number of processes"),
        ):
            with contextlib.suppress(OSError):
                counts = dict(line.split() for line in (folder / file).read_text().splitlines())
                if int(counts.get(key, 0)):
                    return what
    return ""


def _adopt_orphans():
    """Have processes whose parent is gone become children of this one, so that they can be found (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _kill_all(before, groups):
    """Kill what is left: everything in the groups, and every descendant that was not there before."""
    for _ in range(200):
        pids = {int(pid) for folder in groups for pid in (folder / "cgroup.procs").read_text().split()}
        pids |= {child.pid for child in set(psutil.Process().children(recursive=True)) - before}
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _feed(pipe, question):
    with contextlib.suppress(OSError):
        pipe.write(question)
    with contextlib.suppress(OSError):
        pipe.close()


class _Reader(threading.Thread):
    """Reads a descriptor to its end: all of it up to a limit, or only its last bytes."""

    def __init__(self, descriptor, limit, tail=False):
        super().__init__(daemon=True)
        self.descriptor, self.limit, self.tail = descriptor, limit, tail
        self.found, self.too_long = bytearray(), False
        self.start()

    def run(self):
        with open(self.descriptor, "rb", buffering=0) as stream:
            while chunk := stream.read(MEGABYTE):
                self.found += chunk
                if len(self.found) > self.limit:
                    if self.tail:
                        del self.found[: -self.limit]
                    else:
                        self.too_long, self.found = True, bytearray()
                        return

    def finish(self):
        self.join(timeout=10)
        return bytes(self.found)

    def text(self):
        return self.finish().decode("utf-8", errors="replace")
