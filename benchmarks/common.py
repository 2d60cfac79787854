"""What every benchmark needs: rounds that take turns, peak memory in a fresh process, results as JSON.

timings = interleave({"ours": ours, "theirs": theirs}, rounds=9)
ratio = timings["theirs"].median / timings["ours"].median
grown = peak_memory("benchmarks.loss:nt_xent_step", 1024)
write_result(Path("results/benchmarks/loss.json"), {"seconds": as_json(timings), "memory": grown})
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from simclr import beton, files
from simclr.run import runlog

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """What the rounds of one candidate took.

    Attributes:
        seconds: One entry per round.
        elsewhere: Share of the machine's CPU time that other programs took while this candidate ran, in [0, 1]; None
            where it cannot be read (it is read on Linux). Figures with more than a tenth are not worth quoting.
    """

    seconds: tuple[float, ...]
    elsewhere: float | None

    @property
    def median(self) -> float:
        """Of the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    calls: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Time callables in turns, so that what disturbs the machine for a while disturbs all of them.

    A round calls every candidate; every second round goes backwards. Where there is a GPU, its queue is empty
    at both ends of a timed stretch.

    Args:
        candidates: Name -> callable. One that returns a float has timed itself, in seconds: a pipeline, say, that is
            not to be timed while it fills.
        rounds: Timed rounds, >= 1.
        warm_up: Rounds before them, not counted: compilation, page faults, caches.
        calls: Name -> calls per round, for candidates too short to be timed singly; 1 where not given. ``seconds``
            are then those of one call.

    Returns:
        Name -> timing, in the order of ``candidates``.

    Raises:
        ValueError: If ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    busy: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for number in range(-warm_up, rounds):
        names = list(candidates)
        for name in names if number % 2 == 0 else reversed(names):
            times = 1 if calls is None else calls.get(name, 1)
            gc.collect()  # a candidate's garbage is not to be collected in the next one's time
            wait_for_gpu()
            before, started = _cpu_seconds(), time.perf_counter()
            own = 0.0
            for _ in range(times):
                result = candidates[name]()
                own += result if isinstance(result, float) else 0.0
            wait_for_gpu()
            elapsed = time.perf_counter() - started
            if number >= 0:
                seconds[name].append((own or elapsed) / times)
                after = _cpu_seconds()
                if before is not None and after is not None:
                    busy[name].append((after - before, elapsed))
    cores = os.cpu_count() or 1
    return {
        name: Timing(
            tuple(seconds[name]),
            min(1.0, max(0.0, sum(used for used, _ in busy[name]) / cores / sum(wall for _, wall in busy[name])))
            if busy[name]
            else None,
        )
        for name in candidates
    }


def peak_memory(function: str, *arguments: float | str, rounds: int = 1) -> float:
    """Return by how much a step's peak memory exceeds what was in use before it, in MiB, in a fresh process.

    Resident memory of a CPU process, the median over ``rounds`` processes. Linux only. ru_maxrss would not do: a
    child inherits its parent's, and setting up may have peaked higher than the step.

    Args:
        function: "package.module:name" of a function that prepares inputs and returns the step, a callable without
            arguments. It is called with ``arguments``; what it does itself does not count.
        arguments: Numbers and strings.
        rounds: Number of processes.

    Raises:
        RuntimeError: If the process fails; the message ends with its error output.
    """
    code = "import sys; from benchmarks import common; common._report_peak(sys.argv[1], sys.argv[2])"
    grown = []
    for _ in range(rounds):
        command = [sys.executable, "-c", code, function, json.dumps(arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{function}{arguments} ended with status {done.returncode}: {done.stderr[-2000:]}")
        grown.append(float(done.stdout.split()[-1]))
    return statistics.median(grown)


def on_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> Any:
    """Call ``function(*arguments)`` on ``size`` processes, of one thread each, that form a gloo group.

    Args:
        function: At the top level of a module.
        size: Processes; alone, one forms a group too.
        arguments: What pickles.

    Returns:
        What it returned on rank 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_on_a_rank, (size, folder, function, arguments), nprocs=size)  # type: ignore[no-untyped-call]
        return torch.load(Path(folder, "result"), weights_only=False)  # written by the process above


def _on_a_rank(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    result = function(*arguments)
    if rank == 0:
        torch.save(result, Path(folder, "result"))
    dist.barrier()
    dist.destroy_process_group()


def as_json(timings: Mapping[str, Timing], *, images: int | None = None) -> dict[str, dict[str, float | int | None]]:
    """Return timings as numbers for a result file; with ``images`` per call, images per second too."""
    return {
        name: {
            "median_seconds": timing.median,
            "spread": round(timing.spread, 3),
            "rounds": len(timing.seconds),
            "elsewhere": None if timing.elsewhere is None else round(timing.elsewhere, 3),
            **({} if images is None else {"images_per_second": round(images / timing.median, 1)}),
        }
        for name, timing in timings.items()
    }


def write_noise(path: Path, number: int, side: int = 32) -> None:
    """Write a .beton file of ``number`` images of noise, ``side`` x ``side``."""
    pixels = np.random.default_rng(0).integers(0, 256, (number, side, side, 3), np.uint8)
    beton.write(path, pixels, np.zeros(number, np.int64), classes=["noise"], source="noise")


def write_result(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as JSON beside what they depend on: commit, command, versions, hardware, threads."""
    environment = runlog.environment()
    del environment["platform"]
    environment["threads"] = torch.get_num_threads()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"environment": environment, **values})


def table(timings: Mapping[str, Timing], *, images: int, against: str | None = None) -> str:
    """Return a Markdown table: images per second, how they spread, and how often faster ``against`` is than each."""
    ratio = "" if against is None else f" {against} is faster by |"
    lines = [f"| | images/s | spread | others' load |{ratio}", f"|---|---|---|---|{'' if against is None else '---|'}"]
    for name, timing in timings.items():
        load = "" if timing.elsewhere is None else f"{timing.elsewhere:.0%}"
        line = f"| {name} | {images / timing.median:,.0f} | {timing.spread:.0%} | {load} |"
        if against is not None:
            line += f" {timing.median / timings[against].median:.2f} |"
        lines.append(line)
    return "\n".join(lines)


def wait_for_gpu() -> None:
    """Return when the GPU, if there is one, has done all that it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_seconds() -> float | None:
    """Return CPU seconds that programs other than this one and its ended children have used since the start."""
    try:
        text = Path("/proc/stat").read_text(encoding="ascii")
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, text.split("\n", 1)[0].split()[1:])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def _report_peak(function: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    step = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew from what is in use
    before = _resident_mib("VmRSS")
    step()
    print(_resident_mib("VmHWM") - before)


def _resident_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
