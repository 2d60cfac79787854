"""Whole runs as a launcher starts them: a process for each rank, to be killed, stopped and signalled."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from simclr.config import TrainConfig
from tests.helpers import _LOOPBACK, PRELOADED, _environment

_CONTEXT = multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def other_process(function: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """Call a function in a process that has imported torch already; it is killed at the end of the block."""
    _CONTEXT.set_forkserver_preload(PRELOADED)
    process = _CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def ordinary(rank: int) -> None:
    """What most ranks are prepared with: nothing."""


class Ranks:
    """The processes of one run.

    Args:
        config: The run.
        world_size: How many.
        logs: A folder for what they print, one file each.
        prepare: Called in each process with its rank before training, to break something there.
    """

    def __init__(
        self, config: TrainConfig, world_size: int, logs: Path, prepare: Callable[[int], None] = ordinary
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"rank{rank}.log" for rank in range(world_size)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        _CONTEXT.set_forkserver_preload(PRELOADED)
        self._processes = [
            _CONTEXT.Process(target=_train, args=(config, rank, world_size, port, log, prepare), daemon=True)
            for rank, log in enumerate(self._logs)
        ]
        with _environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=_LOOPBACK):
            for process in self._processes:
                process.start()

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal, also to ranks that have ended."""
        for rank in ranks:
            pid = self._processes[rank].pid
            assert pid is not None
            if self._processes[rank].is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self, seconds: float = 60.0, ranks: tuple[int, ...] | None = None) -> list[int]:
        """Return the exit codes of all ranks, or of some; fails if they have not ended in time."""
        deadline = time.monotonic() + seconds
        codes = []
        for rank in range(len(self._processes)) if ranks is None else ranks:
            process = self._processes[rank]
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"rank {rank} still runs after {seconds} s:\n{self.output(rank)}"
            codes.append(process.exitcode)
        return codes

    def is_alive(self) -> bool:
        """Whether any rank runs."""
        return any(process.is_alive() for process in self._processes)

    def output(self, rank: int) -> str:
        """What a rank has printed."""
        return self._logs[rank].read_text() if self._logs[rank].exists() else ""

    def end(self) -> None:
        """Leave no process behind."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()


@contextlib.contextmanager
def ranks(
    config: TrainConfig, world_size: int, logs: Path, prepare: Callable[[int], None] = ordinary
) -> Iterator[Ranks]:
    """Start a run; none of its processes outlives the block."""
    started = Ranks(config, world_size, logs, prepare)
    try:
        yield started
    finally:
        started.end()


def _train(
    config: TrainConfig, rank: int, world_size: int, port: int, log: Path, prepare: Callable[[int], None]
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    import torch
    from tqdm import tqdm

    import train_simclr

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system's, which a killed process leaves behind
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare(rank)
    train_simclr.conclude(config)
