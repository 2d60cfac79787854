"""Checks a machine before a long run: one line per check, with what was found and what to do about it.

    python -m simclr.doctor --data data/cifar10/train.beton --output results
    torchrun --nproc-per-node 2 -m simclr.doctor --data data/cifar10/train.beton --world-size 2

Under a launcher the processes also find each other and measure what lies between them: start it as the run is to be
started. Ends with status 1 if there is a problem on any process.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from accelerate import PartialState

from simclr import beton, checkpoint, distributed, runlog
from simclr.data import EpochPlan, open_images
from simclr.models import SimCLR
from simclr.presets import DEFAULT, PRESETS

_PACKAGES = ("torch", "accelerate", "timm", "torchvision", "numpy")
_ALL_REDUCE_BYTES = 64 << 20  # about the gradient of a ResNet-18 with its projector in float32
_MOST_SKEW_SECONDS = 1.0
_LEAST_SHARED_MEMORY = 256 << 20  # containers often have 64 MiB


@dataclasses.dataclass(frozen=True)
class Options:
    """What the run will use."""

    data: Path | None = None
    """The .beton file: its tables, its facts and every byte of it are checked."""
    output: Path = Path("results")
    """Where runs are to be written."""
    preset: Literal[*PRESETS] = DEFAULT  # type: ignore[valid-type]
    """Whose checkpoints have to fit on the disk."""
    world_size: int | None = None
    """How many processes are meant to take part."""
    start_seconds: float = 60.0
    """How long a process waits for the others."""


class Finding(NamedTuple):
    """One line of the answer."""

    state: Literal["ok", "warning", "problem"]
    check: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<9}{self.check:<12}{self.found}{self.advice and f'. {self.advice}'}"


Check = Callable[[Options], Iterator[Finding]]


# ---------------------------------------------------------------------------------------------------------------
# This process alone


def versions(options: Options) -> Iterator[Finding]:
    """What is installed, and variables that make it unsafe."""
    found = [f"Python {platform.python_version()}"]
    found += [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    yield Finding("ok", "versions", ", ".join(found))
    try:
        checkpoint.require_safe_loading()
    except checkpoint.CheckpointError as error:
        yield Finding("problem", "environment", str(error))


def gpus(options: Options) -> Iterator[Finding]:
    """GPUs, their memory, and driver against torch."""
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    seen = _nvidia_smi()
    if not torch.cuda.is_available():
        if not seen:
            yield Finding("ok", "GPUs", f"none: runs use the CPU ({built})")
        elif os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in {"", "-1"}:
            yield Finding("warning", "GPUs", f"hidden by CUDA_VISIBLE_DEVICES: {seen}", "Unset it to use them")
        else:
            advice = "Install a newer driver, or the torch that fits this one (docs/install.md)"
            yield Finding("problem", "GPUs", f"the driver finds {seen}, but torch none; {built}", advice)
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found = f"{i}: {torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {built}"
        busy = free < 0.9 * total
        yield Finding("warning" if busy else "ok", "GPUs", found, "Another program uses it" if busy else "")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > torch.cuda.device_count():
        found = f"{local} processes on this machine share {torch.cuda.device_count()} GPUs"
        yield Finding("problem", "GPUs", found, "Start one process per GPU")


def bf16(options: Options) -> Iterator[Finding]:
    """Whether bfloat16 is fast here."""
    if torch.cuda.is_available():
        fast, what = torch.cuda.get_device_capability() >= (8, 0), "GPU"
    else:
        fast, what = runlog.cpu_has_fast_bf16(), "CPU"
    yield Finding("ok", "bf16", f"the {what} {'computes with it' if fast else 'has none: --precision auto takes fp32'}")


def ffcv(options: Options) -> Iterator[Finding]:
    """Whether FFCV reads back what was written."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.beton")
        beton.write(path, images, np.arange(8))
        try:
            with open_images(path, backend="ffcv") as source:
                (batch,) = source.batches(EpochPlan(np.arange(8), 8, shuffle=False))
        except ValueError as error:
            obstacle = str(error).partition("FFCV: ")[2] or str(error)
            yield Finding("warning", "FFCV", f"images are kept in memory, because {obstacle}")
            return
    same = np.array_equal(batch.image.numpy(), images)
    advice = "" if same else "Build it again: python native/install_ffcv.py; until then use --loader memory"
    version = importlib.metadata.version("ffcv")
    found = f"{version} {'reads a file that was just written' if same else 'reads other pixels than were written'}"
    yield Finding("ok" if same else "problem", "FFCV", found, advice)


def data(options: Options) -> Iterator[Finding]:
    """The data file, whole. One process per machine reads it."""
    if options.data is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    started = time.perf_counter()
    try:
        facts = beton.verify(options.data)
    except (beton.BetonError, OSError) as error:
        yield Finding("problem", "data", str(error))
        return
    found = f"{facts.num_images:,} images of {facts.height} x {facts.width}, {facts.encoding}, {facts.source}; "
    found += f"tables and sha256 are right ({facts.file_bytes / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s)"
    yield Finding("ok", "data", found)


def disk(options: Options) -> Iterator[Finding]:
    """Whether checkpoints fit, and whether the folder can be written."""
    config = PRESETS[options.preset].config
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SimCLR(config.model, 32).parameters())
    one = 4 * 2 * parameters  # float32; weights and the optimizer's momentum
    needed = one * (config.keep_checkpoints + 2)  # the best epoch, and the one being written
    folder = next(path for path in (options.output, *options.output.absolute().parents) if path.exists())
    what = f"{folder}: {shutil.disk_usage(folder).free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed "
    what += f"({config.keep_checkpoints + 2} checkpoints of {options.preset})"
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        yield Finding("problem", "disk", f"cannot write in {folder}: {error}", "Give another --output")
        return
    free = shutil.disk_usage(folder).free
    state: Literal["ok", "warning", "problem"] = (
        "ok" if free > 2 * needed else "warning" if free > needed else "problem"
    )
    yield Finding(state, "disk", what, "" if state == "ok" else "Free some space, or give another --output")


def shared_memory(options: Options) -> Iterator[Finding]:
    """What processes of one machine exchange data in (NCCL)."""
    if sys.platform == "linux":
        free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        small = free < _LEAST_SHARED_MEMORY
        advice = "NCCL may fail: give the container more (docker run --shm-size 1g, or --ipc host)" if small else ""
        yield Finding("warning" if small else "ok", "/dev/shm", f"{free / 2**20:,.0f} MiB free", advice)


def threads(options: Options) -> Iterator[Finding]:
    """Threads of all processes of this machine against its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = f"{local} process(es) x {torch.get_num_threads()} threads on {cores} cores"
    many = local * torch.get_num_threads() > cores
    advice = f"export OMP_NUM_THREADS={max(1, cores // local)}" if many else ""
    yield Finding("warning" if many else "ok", "CPU", found, advice)


def hostname(options: Options) -> Iterator[Finding]:
    """Where gloo would listen: at the address of this machine's own name, unless it is told the network."""
    name, several = socket.gethostname(), _world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        missing = set(chosen.split(",")) - {name for _, name in socket.if_nameindex()}
        advice = f"It has {', '.join(name for _, name in socket.if_nameindex())}" if missing else ""
        found = f"GLOO_SOCKET_IFNAME is {chosen}" + (", which this machine does not have" if missing else "")
        yield Finding("problem" if missing else "ok", "own name", found, advice)
        return
    way_out = "export GLOO_SOCKET_IFNAME=eth0 (your network's name), or mend /etc/hosts"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield Finding("problem" if several else "warning", "own name", f"{name} does not resolve: {error}", way_out)
        return
    if not address.startswith("127."):
        yield Finding("ok", "own name", f"{name} is {address}")
    elif several:
        found = f"{name} is {address}, where no other machine reaches it over gloo"
        yield Finding("problem", "own name", found, way_out)
    else:
        yield Finding(
            "ok", "own name", f"{name} is {address}: fine on one machine. Over gloo between several: {way_out}"
        )


def slurm(options: Options) -> Iterator[Finding]:
    """What SLURM started against the processes that take part."""
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        return
    nodes, tasks = (int(os.environ.get(name, "1")) for name in ("SLURM_JOB_NUM_NODES", "SLURM_STEP_NUM_TASKS"))
    found = f"job {job}: {nodes} node(s), {tasks} task(s) in this step, {_world_size()} process(es) take part"
    if _world_size() < max(tasks, nodes):
        yield Finding("problem", "SLURM", found, "Start it as slurm/pretrain.sbatch does: one launcher per node")
    else:
        yield Finding("ok", "SLURM", found)


# ---------------------------------------------------------------------------------------------------------------
# Between processes


def processes(options: Options) -> Iterator[Finding]:
    """Whether all processes find each other; then bandwidth and clocks between them."""
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    try:
        state = PartialState(cpu=on_cpu, timeout=datetime.timedelta(seconds=options.start_seconds))
        seconds, skew = _all_reduce_seconds(state.device), _clock_skew(state.device)
    except (RuntimeError, ValueError, OSError) as error:
        advice = "Compare rank, address and port of all machines (docs/launching.md, Traps)"
        yield Finding("problem", "processes", f"they do not find each other: {str(error).splitlines()[0]}", advice)
        return
    size = distributed.world_size()
    found = f"{size} take{'s' if size == 1 else ''} part"
    if (meant := options.world_size or _world_size()) != size:
        yield Finding("problem", "processes", f"{found}, but {meant} are meant to", "See docs/launching.md")
    else:
        yield Finding("ok", "processes", found)
    if size == 1:
        return
    gigabytes = 2 * (size - 1) / size * _ALL_REDUCE_BYTES / seconds / 1e9
    over = "NCCL" if state.device.type == "cuda" else "gloo"
    found = f"{_ALL_REDUCE_BYTES >> 20} MiB in {1000 * seconds:.1f} ms over {over}: {gigabytes:.2f} GB/s per process"
    yield Finding("ok", "all-reduce", found)
    apart = skew > _MOST_SKEW_SECONDS
    advice = "Synchronise them (NTP): times in logs and file dates would mislead" if apart else ""
    yield Finding("warning" if apart else "ok", "clocks", f"at most {1000 * skew:.1f} ms apart", advice)


def _all_reduce_seconds(device: torch.device) -> float:
    """Return the median of five sums over ranks."""
    values = torch.ones(_ALL_REDUCE_BYTES // 4, device=device)
    seconds = []
    for _ in range(6):
        distributed.any_rank(False, device)  # all have come; and on a GPU, it is idle
        started = time.perf_counter()
        distributed.any_rank(bool(distributed.sum_over_ranks(values)[0] < 0), device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[2]


def _clock_skew(device: torch.device) -> float:
    """Return the seconds between the earliest and the latest clock, and the moments at which they were read."""

    def read() -> float:
        distributed.any_rank(False, device)
        clocks = distributed.gather(torch.tensor([time.time()], dtype=torch.float64, device=device))
        return float(clocks.max() - clocks.min())

    return min(read() for _ in range(5))


def _from_all_ranks(findings: list[Finding]) -> list[Finding]:
    """Return this rank's findings and what other ranks found to be wrong. Collective call."""
    own = json.dumps([finding for finding in findings if finding.state != "ok"]) + "\n"
    device = PartialState().device
    text = distributed.gather_variable(torch.tensor(list(own.encode()), dtype=torch.uint8, device=device))
    others = []
    for rank, line in enumerate(bytes(text.tolist()).decode().splitlines()):
        for finding in map(Finding._make, json.loads(line)):
            if finding not in findings:
                others.append(finding._replace(found=f"rank {rank}: {finding.found}"))
    return [*findings, *others]


# ---------------------------------------------------------------------------------------------------------------


ALONE: tuple[Check, ...] = (versions, gpus, bf16, threads, shared_memory, ffcv, data, disk, hostname, slurm)


def examine(options: Options) -> list[Finding]:
    """Make all checks."""
    findings = [finding for check in ALONE for finding in check(options)]
    between = list(processes(options))
    findings += between
    reached = _world_size() == 1 or between[-1].check == "clocks"
    return _from_all_ranks(findings) if reached else findings


def main(options: Options) -> int:
    """Print what was found, on rank 0; return the exit status."""
    findings = examine(options)
    if distributed.rank() == 0:
        print(*findings, sep="\n", flush=True)
    distributed.leave()
    return int(any(finding.state == "problem" for finding in findings))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _nvidia_smi() -> str:
    """Return what the driver knows of GPUs; empty without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(
        f"{name} (driver {driver})" for name, _, driver in (s.partition(", ") for s in done.stdout.splitlines())
    )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m simclr.doctor", description=__doc__)))
