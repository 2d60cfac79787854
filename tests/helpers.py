"""What several test modules share: running one function on N real processes."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
"""Of the repository."""

# Imported once, by the process that forks all others. torch's optimizers import torch._dynamo, ResNets timm.
PRELOADED = ["torch.distributed", "torch._dynamo", "numpy", "timm", "train_simclr"]
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def run_python(*words: object, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` in the root of the repository, with these environment variables besides."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def small_disk(folder: Path, size: str) -> str:
    """Return the shell command that makes ``folder`` a file system of ``size``, for ``unshare -rm sh -c``; or skip."""
    command = f'mount -t tmpfs -o size={size} none "{folder}"'
    if not sys.platform.startswith("linux"):
        pytest.skip("mounts a small file system in a namespace")
    if subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a file system in a namespace of its own")
    return command


def run_on_small_disk(folder: Path, size: str, script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script on these words, in the root of the repository, while ``folder`` is such a file system."""
    command = ["unshare", "-rm", "sh", "-c", f"{small_disk(folder, size)} || exit 1; {script}", "sh", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root, who may do everything, gives up its rights for a while; other users have none to give up."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def library_knn(k: int, temperature: float) -> Any:
    """Return scikit-learn's classifier by neighbours that vote as SimCLR's evaluations weight them (cosine)."""
    from sklearn.neighbors import KNeighborsClassifier  # two seconds, which ranks need not wait for

    return KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))


class RankError(RuntimeError):
    """A rank raised or died. The message holds its rank and its traceback."""


def run_distributed(function: Callable[..., Any], world_size: int, /, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` on every rank of a real gloo process group.

    The processes are started once and kept for the session, so that a call costs milliseconds after the
    first one; each call gets a new process group. A call that fails in any way ends all processes, and the
    next call starts fresh ones: nothing of a broken test reaches another.

    In each process, before ``function`` is called: ``dist.get_world_size() == world_size`` is asserted,
    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and their like are set, torch uses one thread, and torch's,
    numpy's and Python's generators are seeded with the rank, hence repeatable and different on each rank.
    Values patched in the test's own process (``monkeypatch``) are not seen there.

    Args:
        function: a function at the top level of a module; it is sent by name.
        world_size: number of processes, at least 1.
        *args: sent to each rank; anything that pickles, tensors included.
        timeout: seconds for the whole call, and of the group's collectives.

    Returns:
        What ``function`` returned, by rank.

    Raises:
        RankError: a rank raised or died; the first that did is reported.
        TimeoutError: not all ranks returned in time; the message shows where each of the others stood.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}: at least 1 process is needed")
    return _POOL.run(function, world_size, args, timeout)


def shut_down_workers() -> None:
    """End all processes that run_distributed keeps."""
    _POOL.kill()


@dataclass
class _Worker:
    process: ForkServerProcess
    connection: Connection


@dataclass
class _Call:
    """What a rank needs to know of one call."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    world_size: int
    timeout: float
    folder: str  # the rendezvous file and the stack dumps live here


class _Pool:
    """Worker processes that outlive a test; rank r is always worker r."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []

    def run(self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            calls = [_Call(function, args, rank, world_size, timeout, folder) for rank in range(world_size)]
            # Pickled before anything is sent: an argument that does not pickle must leave no rank waiting.
            # Bytes, not Connection.send, whose pickler would share tensors' memory between processes.
            messages = [pickle.dumps(call) for call in calls]
            try:
                self._grow(world_size)
                for worker, message in zip(self.workers, messages, strict=False):
                    worker.connection.send_bytes(message)
                return self._collect(world_size, timeout, Path(folder))
            except BaseException:
                self.kill()
                raise

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.process.close()
            worker.connection.close()
        self.workers.clear()

    def _grow(self, size: int) -> None:
        if len(self.workers) >= size:
            return
        # A server that has imported torch once and forks each worker: starting one takes a tenth of a second.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with _environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=_LOOPBACK):
            while len(self.workers) < size:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self.workers.append(_Worker(process, ours))

    def _collect(self, world_size: int, timeout: float, folder: Path) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        by_connection = {worker.connection: rank for rank, worker in enumerate(self.workers[:world_size])}
        while by_connection:
            ready = wait(list(by_connection), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(self._where_they_stand(sorted(by_connection.values()), timeout, folder))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = by_connection.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process = self.workers[rank].process
                    process.join(timeout=10)
                    raise RankError(f"rank {rank} of {world_size} died with exit code {process.exitcode}") from None
                if not succeeded:
                    raise RankError(f"rank {rank} of {world_size} raised:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def _where_they_stand(self, ranks: list[int], timeout: float, folder: Path) -> str:
        for rank in ranks:
            pid = self.workers[rank].process.pid
            assert pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
        lines = [f"rank(s) {', '.join(map(str, ranks))} did not return within {timeout:g} s"]
        for rank in ranks:
            dump = _dump_file(folder, rank)
            stack = dump.read_text() if dump.exists() else ""
            lines.append(f"rank {rank} was at:\n{stack or '(not yet started)'}")
        return "\n".join(lines)


_POOL = _Pool()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _dump_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-of-rank-{rank}.txt"


# ---------------------------------------------------------------------------------- in the worker processes


def _serve(connection: Connection) -> None:
    """Answer calls until the test process closes its end or kills this one."""
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, _run_call(pickle.loads(message))))
        except BaseException:
            # The group is left as it is: taking it down here would make the other ranks fail too, and the
            # test process could then report one of them instead of this, the first.
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _run_call(call: _Call) -> Any:
    import random

    import numpy as np
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(call.rank),
        LOCAL_RANK=str(call.rank),
        WORLD_SIZE=str(call.world_size),
        LOCAL_WORLD_SIZE=str(call.world_size),
        MASTER_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME=_LOOPBACK,
    )
    torch.set_num_threads(1)
    torch.manual_seed(call.rank)
    np.random.seed(call.rank)  # noqa: NPY002  the code under test may use the legacy generator
    random.seed(call.rank)
    with _dump_file(Path(call.folder), call.rank).open("w") as dump:
        faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True)
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{call.folder}/rendezvous",
                rank=call.rank,
                world_size=call.world_size,
                timeout=timedelta(seconds=call.timeout),
            )
            assert dist.get_world_size() == call.world_size
            assert dist.get_rank() == call.rank
            result = call.function(call.rank, call.world_size, *call.args)
            assert dist.is_initialized(), "the function under test took the process group down"
            dist.barrier()  # no rank leaves while another still communicates
            dist.destroy_process_group()
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    forget_accelerate_state()
    return result


def forget_accelerate_state() -> None:
    """Undo that accelerate keeps rank, world size and precision for the life of a process; the next run has others."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
