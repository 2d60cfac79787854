"""What a run tells of itself, in its folder and on the terminal, and the lock that keeps other runs out of the folder.

manifest.json    what the results depend on, and the sessions that made them
config.json      the settings, from which train_simclr.py --config begins another run
metrics.jsonl    one JSON line per measurement
status.json      whether the run goes on, is finished, was interrupted or has failed

python -m simclr.run.runlog results/RUN    # prints status.json; the state of a run that was killed is "died"
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal, Self

import torch
import tyro
from tqdm import tqdm

from simclr import files
from simclr.run.interruption import Interrupted
from simclr.run.memory import host_memory
from simclr.system import outlive_readers, usable_cores

SECONDS_BETWEEN_LINES = 30
METRICS = "metrics.jsonl"
MANIFEST = "manifest.json"
CONFIG = "config.json"
STATUS = "status.json"
RESULT = "probe.json"
"""In the folder of an evaluation, within that of the run."""
LOCK = ".lock"
State = Literal["running", "interrupted", "finished", "failed"]
DIED = "died"
"""The state that :func:`read_status` gives a run that ended without writing so: it was killed, or its disk was full."""
_FILES_OF_A_RUN = (LOCK, STATUS, MANIFEST, METRICS, "checkpoint_*.pt", "simclr_best_epoch.pt")
_FILES_OF_A_START = ("attempts", "*.log", "*.out", "*.err")  # from job scripts
_PACKAGES = ("torch", "torchvision", "accelerate", "timm", "ffcv", "numpy", "numba", "matplotlib")


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its configuration: commit, command, versions, hardware."""
    return {
        "commit": _git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "hardware": hardware(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def hardware() -> str:
    """Return one line such as "2 cores of Intel Xeon, 24 GiB" or "4 x NVIDIA H100 80GB HBM3, CUDA 12.8"."""
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
    cores = usable_cores()
    memory = ""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = f", {host_memory() / 2**30:.0f} GiB"
    return f"{cores} cores of {_cpu_name()}{memory}"


def cpu_has_fast_bf16() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices in hardware (AMX), at several times float32's speed.

    AVX-512's bfloat16 instructions alone do not count: a matrix product took twice float32's time with them.
    """
    return "amx_bf16" in _cpu_info("flags").split()


class RunLog:
    """Writes metrics.jsonl and shows progress. Does nothing on ranks other than 0, so that callers need not ask.

    Args:
        folder: The run's folder.
        is_main: Whether this is rank 0.
        total_steps: Number of steps of the whole run, for the progress bar.
        first_step: Number of steps taken before. Lines of later steps, which an interrupted run left, are removed,
            so that every step stands in the file once.
        track: Takes what each line holds, and its step, for a tracker.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        total_steps: int,
        first_step: int = 0,
        track: Callable[[dict[str, Any], int], None] = lambda values, step: None,
    ) -> None:
        self._is_main, self._track = is_main, track
        self._started = time.perf_counter()
        if not is_main:
            return
        self._path = folder / METRICS
        self._seconds_before = _keep_lines_until(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None, mininterval=0.5
        )
        self._first_step = self._step = first_step
        self._total_steps = total_steps
        self._last_line = self._started

    def say(self, text: str) -> None:
        """Print a line, without breaking the progress bar."""
        if self._is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def write(self, kind: str, *, step: int, **values: float | int | str | None) -> None:
        """Append one JSON line {"kind": kind, "step": step, ..., "seconds": since the run's beginning}, and flush it.

        NaN and infinities, which JSON lacks, become null.
        """
        if not self._is_main:
            return
        seconds = self._seconds_before + time.perf_counter() - self._started
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {**finite, "seconds": round(seconds, 3)}
        self._file.write(json.dumps({"kind": kind, "step": step, **line}) + "\n")
        self._file.flush()
        self._track({name: value for name, value in line.items() if value is not None}, step)

    def advance(self, steps: int, **values: str) -> None:
        """Move the progress bar and show values behind it. Where output is no terminal, print a line now and then."""
        if not self._is_main:
            return
        self._bar.set_postfix(values, refresh=False)
        self._bar.update(steps)
        self._step += steps
        now = time.perf_counter()
        if self._bar.disable and (now - self._last_line >= SECONDS_BETWEEN_LINES or self._step == self._total_steps):
            self._last_line = now
            left = (now - self._started) / (self._step - self._first_step) * (self._total_steps - self._step)
            time_left = datetime.timedelta(seconds=round(left))
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            print(f"step {self._step} of {self._total_steps}, {text}, {time_left} left", flush=True)

    def sync(self) -> None:
        """Wait until all lines are on the disk: a checkpoint must not be newer than the lines it continues after.

        Raises:
            ValueError: If metrics.jsonl has been deleted or replaced, so that they never will be.
        """
        if self._is_main:
            files.sync(self._file)
            if not files.is_at(self._path, self._file):
                raise ValueError(
                    f"{self._path} was deleted or replaced while this run wrote to it, so that no line is kept: put it "
                    "back if you can, and start the run again, which goes on from its last checkpoint"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_main:
            self._bar.close()
            self._file.close()


class Status:
    """Keeps status.json, by which job scripts decide whether to start a run again. Only rank 0 writes it.

    {"state": "running", "step": of the newest checkpoint, "total_steps": of the whole run, "reason": of an end}

    A run that is killed leaves the state at "running"; :func:`read_status` tells the two apart.

    Args:
        folder: The run's folder.
        is_main: Whether this is rank 0.
        step: Step of the newest checkpoint.
        total_steps: Number of steps of the whole run.
        is_ours: Tells whether the folder is still this run's. If not, nothing is written.
    """

    def __init__(
        self, folder: Path, *, is_main: bool, step: int, total_steps: int, is_ours: Callable[[], bool] = lambda: True
    ) -> None:
        self._path, self._is_main, self._is_ours = folder / STATUS, is_main, is_ours
        self._step, self._total_steps = step, total_steps

    def saved(self, step: int) -> None:
        """Write that there is a newer checkpoint."""
        self._step = step
        self._write("running")

    def failed(self, reason: str) -> None:
        """Write that the run has failed, and why."""
        self._write("failed", reason)

    def __enter__(self) -> Self:
        if self._step < self._total_steps:
            self._write("running")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, Interrupted):
                self._write("interrupted", str(error))
            elif error is not None:
                self.failed(f"{type(error).__name__}: {error}")
            elif self._step == self._total_steps:
                self._write("finished")
            else:
                self._write("interrupted", "stop_at_step")
        except OSError as failure:
            if error is None:
                raise
            error.add_note(f"besides: {self._path} could not be written: {failure}")

    def _write(self, state: State, reason: str = "") -> None:
        if not (self._is_main and self._is_ours()):
            return
        content = {"state": state, "step": self._step, "total_steps": self._total_steps, "reason": reason}
        files.write_json(self._path, content)


def read_status(folder: Path) -> dict[str, Any]:
    """Return the content of status.json, with the state :data:`DIED` for a "running" run whose lock nobody holds.

    Raises:
        ValueError: If there is no status.json, or it cannot be read; the message says so.
    """
    path = folder / STATUS
    try:
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if status["state"] == "running" and _is_free(folder / LOCK):
            status["state"] = DIED
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} tells nothing of a run: {error!r}") from error
    return status


def saved_step(folder: Path) -> int:
    """Return the step of the newest checkpoint according to status.json; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / STATUS).read_text(encoding="utf-8"))["step"])
    return 0


class FolderInUseError(ValueError):
    """Another program trains in this folder, or it holds something else than a run."""


def require_run_or_empty(folder: Path) -> None:
    """Refuse a folder that holds other things than a run. Logs that a job script leaves there do not count.

    Raises:
        FolderInUseError: If it does; the message names them.
    """
    if not folder.exists():
        return
    entries = list(folder.iterdir())
    if any(entry.match(pattern) for entry in entries for pattern in _FILES_OF_A_RUN):
        return
    foreign = [entry for entry in entries if not any(entry.match(pattern) for pattern in _FILES_OF_A_START)]
    if foreign:
        names = ", ".join(sorted(entry.name for entry in foreign)[:5]) + (", ..." if len(foreign) > 5 else "")
        raise FolderInUseError(f"{folder} holds no run, but {names}: give an --output that is empty or does not exist")


class Lock:
    """The lock on a run's folder.

    Args:
        path: The lock's file.
        file: The same file, open; None on ranks other than 0, which hold no lock.
    """

    def __init__(self, path: Path, file: IO[str] | None) -> None:
        self._path, self._file = path, file

    def is_held(self) -> bool:
        """Return whether the folder is still the one that was locked, not deleted or made anew under its name."""
        return self._file is None or files.is_at(self._path, self._file)

    def require_held(self) -> None:
        """Raise FolderInUseError unless the lock is held."""
        if not self.is_held():
            raise FolderInUseError(
                f"{self._path.parent} was deleted, moved or made anew while this run wrote to it: it may be another "
                "run's now, so this one ends, and writes nothing there. Start it again with another --output"
            )


@contextlib.contextmanager
def locked(folder: Path, *, is_main: bool) -> Iterator[Lock]:
    """Make the folder, and keep other runs out of it until the end, however this program ends. Only rank 0 does.

    The kernel holds the lock (flock) and releases it with the process. On NFS it holds between machines where the
    server's lock service runs (Linux; not with the mount option nolock). Where a file system has no locks, a printed
    line says so.

    Raises:
        FolderInUseError: If another program holds the lock; the message names it.
    """
    if not is_main:
        yield Lock(folder / LOCK, None)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            if not files.lock(file):
                print(f"{folder} cannot be locked: see to it that no other run uses it", flush=True)
        except BlockingIOError:
            file.seek(0)
            raise FolderInUseError(
                f"another run writes to {folder}: {file.read().strip()}. Wait for its end or stop it, or give another "
                "--output"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield Lock(folder / LOCK, file)


def _is_free(lock: Path) -> bool:
    """Return whether no process holds a lock; False where that cannot be known."""
    try:
        with lock.open(encoding="utf-8") as file:
            return files.lock(file, shared=True)
    except OSError as error:
        return isinstance(error, FileNotFoundError)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a run's manifest.json; None if there is none.

    Raises:
        ValueError: If it cannot be read as one; the message says what to do.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("sessions", []), list):
            raise ValueError("it holds no sessions")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}. It tells the run's history only: put it back, or move it away to go on "
            "without that"
        ) from error
    return manifest


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; none without such a file.

    An unfinished last line, of a killed run, is left out.

    Raises:
        ValueError: If another line is no JSON object.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    # Bytes that are no text pass, so that the error below can name their line.
    *texts, _unfinished = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}; remove the line to go on") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number} is {line!r}, expected an object; remove the line to go on")
        lines.append(line)
    return lines


def read_results(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the evaluations in a run's folder: path and content of each probe.json, in the order of their names.

    Raises:
        ValueError: If one is no evaluation's result, or one of another version of this program.
    """
    results = []
    for path in sorted(folder.glob(f"*/{RESULT}")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] != 1:
                raise ValueError(f"its schema is {found['schema']!r}, this version reads 1")
            # What those who read it need
            found["config"]["mode"], [found[name] for name in ("encoder_sha256", "test_accuracy", "num_fit")]
            found["rows"][-1], [row["knn_test"] for row in found["rows"]]
            [found[name]["content_sha256"] for name in ("train_facts", "test_facts")]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no evaluation's result: {error!r}; remove it, or evaluate again") from error
        results.append((path, found))
    return results


def _keep_lines_until(path: Path, step: int) -> float:
    """Remove lines of steps after ``step``; return the seconds of the last line kept."""
    if not path.exists():
        return 0.0
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step] if step else []
    files.replace(path, "".join(json.dumps(line) + "\n" for line in kept))
    return float(kept[-1]["seconds"]) if kept else 0.0


def _git_commit() -> str:
    """Return the commit of the code, "-dirty" if it was changed since, or "unknown" outside a checkout."""
    this_file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(this_file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", this_file.name)  # fails if installed inside another project's checkout
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(field: str) -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


if __name__ == "__main__":
    outlive_readers()
    try:
        print(
            json.dumps(read_status(tyro.cli(Path, prog="python -m simclr.run.runlog", description=__doc__)), indent=2)
        )
    except ValueError as error:
        sys.exit(f"simclr.run.runlog: {error}")
