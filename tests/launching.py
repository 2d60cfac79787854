"""Runs as people start them, by commands and launchers, and what they leave in their folders."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from simclr.command_line import parse_train_config
from simclr.config import TrainConfig
from simclr.run import checkpoint, runlog
from tests.helpers import ROOT
from tests.runs import train_here

CONFIGS = ROOT / "accelerate_configs"
JOBS = ROOT / "slurm"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NUM_IMAGES = 64
BATCH = 16

# A small run in float64, where two runs that are the same differ by rounding alone.
SMALL_RUN = (
    f"cifar10-simclr-100 --epochs 2 --global-batch-size {BATCH} --model.encoder small_resnet_w8 "
    "--model.projector-hidden 16 --model.projection-dim 8 --num-validation 0 --loader memory --precision fp64"
).split()
needs_bash = pytest.mark.skipif(sys.platform != "linux", reason="the job scripts need bash and run on Linux")


# ------------------------------------------------------------------------------------------ starting


def environment(**variables: str) -> dict[str, str]:
    """This process's environment as a login shell would have it, on the CPU, with ``variables`` on top."""
    foreign = re.compile(
        r"ACCELERATE_|SLURM_|OMPI_|PMI_|PET_|TORCHELASTIC_|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_|VENV$"
    )
    clean = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    clean |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}",
        "HF_HOME": os.devnull,  # no accelerate configuration of the user's own
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    return clean | variables


@contextlib.contextmanager
def started(*command: str | Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start a command in the project's folder; at the end nothing that it started is left."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def run(*command: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Return exit status and output of a command."""
    with started(*command, env=env) as process:
        output, _ = process.communicate(timeout=120)
        return process.returncode, output


def accelerate(config: str, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return [*launcher, "--config_file", str(CONFIGS / config), *options]


def small_run(images: Path, output: Path, world_size: int, *more: str) -> list[str]:
    """The command of a run that counts; ``more`` options are stronger than those of SMALL_RUN."""
    where = ["--data", str(images), "--output", str(output), "--world-size", str(world_size)]
    return ["train_simclr.py", *SMALL_RUN, *where, *more]


def small_config(images: Path, output: Path, world_size: int, *more: str) -> TrainConfig:
    """What the command of :func:`small_run` reads from its words."""
    return parse_train_config(small_run(images, output, world_size, *more)[1:])


def run_here(images: Path, output: Path, *more: str) -> Path:
    """The small run by this process alone, on the CPU; returns its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train_here(small_config(images, output, 1, *more))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ------------------------------------------------------------------------------------------ looking


def wait_until(what: str, holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"after {seconds} s not yet: {what}"
        time.sleep(0.1)


def last_step(folder: Path) -> int:
    """The step that the run's last line of metrics is about."""
    if not (folder / runlog.METRICS).exists():
        return 0
    return max((line["step"] for line in runlog.read_metrics(folder)), default=0)


def assert_close_weights(folder: Path, reference: Path, tolerance: float = 1e-10) -> None:
    """Two runs have ended with the same weights, but for rounding."""
    found, expected = (checkpoint.load_safely(run / checkpoint.LAST)["model"] for run in (folder, reference))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=tolerance), name
