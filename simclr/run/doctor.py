"""Checks a machine before a long run: one line per check, with what was found and what to do about it.

    python -m simclr.run.doctor --data data/cifar10/train.beton --output results
    torchrun --nproc-per-node 2 -m simclr.run.doctor --data data/cifar10/train.beton --world-size 2

Under a launcher the processes also find each other and measure what lies between them: start it as the run is to be
started. Ends with status 1 if there is a problem on any process.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
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
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from accelerate import PartialState

from simclr import beton, distributed
from simclr.data import EpochPlan, open_images
from simclr.models import SimCLR
from simclr.presets import DEFAULT, PRESETS
from simclr.run import checkpoint, launch, runlog
from simclr.run.host import outlive_readers, usable_cores

WORLD, LOCAL = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))  # of the launcher
ON_CPU = launch.cpu_is_asked_for()
_PACKAGES = ("torch", "accelerate", "timm", "torchvision", "numpy")
_ALL_REDUCE_BYTES = 64 << 20  # about the gradient of a ResNet-18 with its projector in float32


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


State = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """One line of the answer."""

    state: State
    check: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<9}{self.check:<12}{self.found}{self.advice and f'. {self.advice}'}"


def warn_if(bad: bool, check: str, found: str, advice: str, state: State = "warning") -> Finding:
    """Return a warning with advice, or ok."""
    return Finding(state, check, found, advice) if bad else Finding("ok", check, found)


refuse_if = functools.partial(warn_if, state="problem")


def versions(options: Options) -> Iterator[Finding]:
    """Report what is installed, and a variable that makes it unsafe."""
    installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield Finding("ok", "versions", f"Python {platform.python_version()}, {installed}")
    try:
        checkpoint.require_safe_loading()
    except checkpoint.CheckpointError as error:
        yield Finding("problem", "environment", str(error))


def gpus(options: Options) -> Iterator[Finding]:
    """Report GPUs, their memory, driver against torch, and bfloat16."""
    built = f"torch is built {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    if torch.cuda.is_available() and not ON_CPU:
        count, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        for i in range(count) if LOCAL == 1 else {rank} & set(range(count)):  # looking at a GPU takes memory there
            free, total = torch.cuda.mem_get_info(i)
            found = f"{i}: {torch.cuda.get_device_name(i)}, {free >> 20:,} of {total >> 20:,} MiB free; {built}"
            yield warn_if(free < 0.9 * total, "GPUs", found, "Another program uses it")
        found = f"{LOCAL} process(es) and {count} GPU(s) on this machine"
        yield refuse_if(count < LOCAL, "GPUs", found, "Start one process per GPU")
        fast = torch.cuda.get_device_capability() >= (8, 0)
    else:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
        seen = "; ".join(done.stdout.splitlines()) if done and done.returncode == 0 else ""
        fast = runlog.cpu_has_fast_bf16()
        if os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in {"", "-1"}:
            yield warn_if(bool(seen), "GPUs", f"CUDA_VISIBLE_DEVICES hides {seen or 'none'}", "Unset it to use them")
        else:
            advice = "Install a newer driver, or the torch that fits this one (docs/install.md)"
            found = f"the driver finds {seen}, but torch none" if seen else "none: runs use the CPU"
            yield refuse_if(bool(seen), "GPUs", f"{found}; {built}", advice)
    yield Finding("ok", "bf16", "computed in hardware" if fast else "not fast here: --precision auto takes fp32")


def ffcv(options: Options) -> Iterator[Finding]:
    """Report whether FFCV reads back what was written."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.beton")
        beton.write(path, images, np.arange(8))
        try:
            with open_images(path, backend="ffcv") as source:
                (batch,) = source.batches(EpochPlan(np.arange(8), 8, shuffle=False))
        except (ValueError, RuntimeError) as error:  # it is not there; it fails
            obstacle = str(error).partition("FFCV: ")[2] or str(error)
            judge = refuse_if if isinstance(error, RuntimeError) else warn_if
            yield judge(True, "FFCV", f"cannot be used: {obstacle}", "Use --loader memory, or auto, which says why")
            return
    differs = not np.array_equal(batch.image.numpy(), images)
    found = "reads other pixels than were written" if differs else "reads a file that was just written"
    advice = "Build it again: python native/install_ffcv.py; until then use --loader memory"
    yield refuse_if(differs, "FFCV", f"{importlib.metadata.version('ffcv')} {found}", advice)


def data(options: Options) -> Iterator[Finding]:
    """Check the whole data file. One process per machine reads it."""
    if options.data is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    started = time.perf_counter()
    try:
        facts = beton.verify(options.data)
    except (beton.BetonError, OSError) as error:
        yield Finding("problem", "data", str(error))
        return
    found = f"{facts.num_images:,} images of {facts.height} x {facts.width}, {facts.encoding}, {facts.source}; "
    found += f"tables and sha256 are right ({facts.file_bytes / 1e6:.1f} MB in {time.perf_counter() - started:.2f} s)"
    yield Finding("ok", "data", found)


def disk(options: Options) -> Iterator[Finding]:
    """Report whether the folder can be written, and has room for the checkpoints of a run."""
    config = PRESETS[options.preset].config
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SimCLR(config.model, 32).parameters())
    count = config.keep_checkpoints + 2  # the best epoch, and the one being written
    needed = count * parameters * 2 * 4  # weights and the optimizer's momentum in float32
    folder = next(path for path in (options.output, *options.output.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        yield Finding("problem", "disk", f"cannot write in {folder}: {error}", "Give another --output")
        return
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / 1e6:,.0f} MB free; {count} checkpoints of {options.preset} take {needed / 1e6:,.0f} MB"
    judge = refuse_if if free < needed else warn_if
    yield judge(free < 2 * needed, "disk", found, "Free some space, or give another --output")


def host(options: Options) -> Iterator[Finding]:
    """Compare threads with cores; report memory that processes of one machine share."""
    cores = usable_cores()
    found = f"{LOCAL} process(es) x {torch.get_num_threads()} threads on {cores} cores"
    advice = f"export OMP_NUM_THREADS={max(1, cores // LOCAL)}"
    yield warn_if(LOCAL * torch.get_num_threads() > cores, "CPU", found, advice)
    if (shared := Path("/dev/shm")).is_dir():
        free = shutil.disk_usage(shared).free
        advice = "NCCL may fail, as in containers with 64 MiB: docker run --shm-size 1g"
        yield warn_if(free < 256 << 20, "/dev/shm", f"{free >> 20:,} MiB free", advice)


def own_name(options: Options) -> Iterator[Finding]:
    """Report where gloo would listen: at the address of this machine's own name, unless it is told the network."""
    name = socket.gethostname()
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        networks = [network for _, network in socket.if_nameindex()]
        missing = not set(chosen.split(",")) <= set(networks)
        yield refuse_if(missing, "own name", f"GLOO_SOCKET_IFNAME is {chosen}", f"There is {', '.join(networks)}")
        return
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        address = f"127... ({error})"
    way_out = "export GLOO_SOCKET_IFNAME=eth0 (your network's name), or mend /etc/hosts"
    trapped = address.startswith("127.")
    if trapped and WORLD == LOCAL:
        yield Finding("ok", "own name", f"{name} is {address}. Before several machines talk over gloo: {way_out}")
    else:
        yield refuse_if(trapped, "own name", f"{name} is {address}", f"Other machines cannot reach that: {way_out}")


def slurm(options: Options) -> Iterator[Finding]:
    """Compare what SLURM started with the processes that take part."""
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        return
    nodes, tasks = (int(os.environ.get(name, "1")) for name in ("SLURM_JOB_NUM_NODES", "SLURM_STEP_NUM_TASKS"))
    found = f"job {job}: {nodes} node(s), {tasks} task(s) in this step, {WORLD} process(es) take part"
    advice = "Start it as slurm/pretrain.sbatch does: one launcher per node"
    yield refuse_if(max(tasks, nodes) > WORLD, "SLURM", found, advice)


def processes(options: Options, device: torch.device) -> Iterator[Finding]:
    """Report how many take part, and bandwidth and clocks between them. Collective."""
    size, meant = distributed.world_size(), options.world_size or WORLD
    yield refuse_if(size != meant, "processes", f"{size} take part, {meant} are meant to", "See docs/launching.md")
    if size == 1:
        return
    values, none = torch.ones(_ALL_REDUCE_BYTES // 4, device=device), torch.zeros(1, device=device)
    seconds, skews = [], []
    for _ in range(6):
        distributed.max_over_ranks(none).item()  # all have come
        started = time.perf_counter()
        bool(distributed.sum_over_ranks(values)[0] < 0)  # waits for a GPU
        seconds.append(time.perf_counter() - started)
        distributed.max_over_ranks(none).item()
        clocks = distributed.gather(torch.tensor([time.time()], dtype=torch.float64, device=device))
        skews.append(float(clocks.max() - clocks.min()))
    median, skew = sorted(seconds[1:])[2], min(skews)
    rate = 2 * (size - 1) / size * _ALL_REDUCE_BYTES / median / 1e9
    over = "NCCL" if device.type == "cuda" else "gloo"
    found = f"{_ALL_REDUCE_BYTES >> 20} MiB in {1000 * median:.1f} ms over {over}, {rate:.2f} GB/s per process"
    yield Finding("ok", "all-reduce", found)
    advice = "Synchronise them (NTP): times in logs and of files mislead"
    yield warn_if(skew > 1, "clocks", f"at most {1000 * skew:.1f} ms apart", advice)


def from_other_ranks(findings: list[Finding], device: torch.device) -> Iterator[Finding]:
    """Yield what other ranks found to be wrong, and this one did not. Collective."""
    own = json.dumps([finding for finding in findings if finding.state != "ok"]) + "\n"
    text = distributed.gather_variable(torch.tensor(list(own.encode()), dtype=torch.uint8, device=device))
    for rank, line in enumerate(bytes(text.tolist()).decode().splitlines()):
        for finding in map(Finding._make, json.loads(line)):
            if finding not in findings:
                yield finding._replace(found=f"rank {rank}: {finding.found}")


def main(options: Options) -> int:
    """Make all checks, print what was found, on rank 0; return the exit status."""
    alone = (versions, gpus, host, ffcv, data, disk, own_name, slurm)
    findings = [finding for check in alone for finding in check(options)]
    try:
        on_cpu = ON_CPU or not torch.cuda.is_available()
        device = PartialState(cpu=on_cpu, timeout=datetime.timedelta(seconds=options.start_seconds)).device
        findings += processes(options, device)
        findings += from_other_ranks(findings, device)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        found = f"they do not find each other: {reason}"
        findings.append(Finding("problem", "processes", found, "See docs/launching.md, Traps"))
    if distributed.rank() == 0:
        print(*findings, sep="\n", flush=True)
    distributed.leave()
    return int(any(finding.state == "problem" for finding in findings))


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main(tyro.cli(Options, prog="python -m simclr.run.doctor", description=__doc__)))
