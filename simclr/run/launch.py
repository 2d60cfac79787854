"""Before training begins: what a launcher asks of this process, the wait for the others, and that all are one run.

The ranks of a run never send each other configuration or data. Each is started by a command of its own, on several
machines by hand, so each says what it is about to compute, and none begins unless all say the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from simclr.run.interruption import SIGNALS

SECONDS_UNTIL_SAID = 10.0
"""How long a process waits for the others before it says so."""

_MOST_NAMED = 12
_OFF = frozenset({"", "0", "no", "none", "false"})
_DDP_ONLY = "every device holds the whole model here (DDP): take distributed_type MULTI_GPU or NO"

# What accelerate's launcher and configuration files set and this project does otherwise, and its own way to it.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": _DDP_ONLY,
    "ACCELERATE_USE_FSDP": _DDP_ONLY,
    "ACCELERATE_USE_MEGATRON_LM": _DDP_ONLY,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _DDP_ONLY,
    "ACCELERATE_USE_SAGEMAKER": _DDP_ONLY,
    "ACCELERATE_IN_TPU_POD": "TPUs are not supported",
    "ACCELERATE_DOWNCAST_BF16": "TPUs are not supported",
    "ACCELERATE_DYNAMO_BACKEND": "use --compile",
    "ACCELERATE_GRADIENT_CLIPPING": "use --optimizer.gradient-clip-norm",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "use --recompute, which takes the whole batch in less memory",
}


class DifferentRunsError(ValueError):
    """The processes that have met are not processes of one run."""


# ---------------------------------------------------------------------------------------------------------------
# What a launcher asks for


def cpu_is_asked_for() -> bool:
    """Return whether accelerate is told to leave GPUs alone (``ACCELERATE_USE_CPU``)."""
    word = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    yes = {"1", "true", "t", "yes", "y", "on"}
    if word not in yes | {"", "0", "false", "f", "no", "n", "off"}:
        raise ValueError(f"ACCELERATE_USE_CPU is {word!r}, expected true or false; or unset it")
    return word in yes


def mixed_precision_asked_for() -> str | None:
    """Return what accelerate is told by ``--mixed_precision`` or a configuration file: "bf16", "fp16", or None.

    Raises:
        ValueError: If it is told anything else, such as "fp8".
    """
    word = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if word in _OFF:
        return None
    if word not in {"bf16", "fp16"}:
        raise ValueError(f"accelerate is told mixed precision {word}; here it is no, bf16 or fp16")
    return word


def require_known_requests() -> None:
    """Refuse what accelerate's launcher asks for and this project would ignore.

    Raises:
        ValueError: If there is such a request; the message names all of them, each with the way out.
    """
    refused = [
        f"{name}={os.environ[name]}: {way_out}"
        for name, way_out in _REFUSED.items()
        if os.environ.get(name, "").lower() not in _OFF | ({"1"} if name.endswith("_STEPS") else set())
    ]
    if refused:
        raise ValueError(
            "accelerate is asked for what this project does not do, by its launcher, its configuration file or the "
            f"environment: {'; '.join(refused)}"
        )


# ---------------------------------------------------------------------------------------------------------------
# Waiting for the others


@contextlib.contextmanager
def saying_who_is_awaited() -> Iterator[None]:
    """Say whom this process waits for, if that takes long; signals end it meanwhile as they end any program.

    While processes meet, the main thread stands in C++, where Python's handlers of signals do not run.
    """
    size = from_environment("WORLD_SIZE", 1)
    if size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(SECONDS_UNTIL_SAID, lambda: print(_who_is_awaited(size), file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _who_is_awaited(size: int) -> str:
    rank = from_environment("RANK", 0)
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    whom = f"the other {size - 1} of {size} processes" if rank == 0 else "rank 0 and the others"
    return (
        f"rank {rank} waits for {whom} of this run, to meet at {place}. Start them, and see that this address and port "
        f"are open between the machines. {if_alone()}"
    )


def if_alone() -> str:
    """Return what to do about variables of a launcher that an earlier command has left in the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return f"If this was to be the only process: unset {' '.join(name for name in names if name in os.environ)}"


def from_environment(name: str, default: int) -> int:
    """Return a number that launchers set. Raises ValueError if it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} is {text!r}, expected a number; launchers set it")
    return int(text)


# ---------------------------------------------------------------------------------------------------------------
# Being one run


def fingerprint_of_code(*others: Path) -> str:
    """Return a checksum of this package's source and of other files, such as the program, in 12 hexadecimal digits."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in [*sorted(package.rglob("*.py")), *others]:
        digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def require_one_run(statements: Sequence[Mapping[str, str]]) -> None:
    """Refuse to begin unless all ranks are about to compute the same.

    Args:
        statements: What each rank says of its run, by rank: name -> value. It must be all that a result depends on.

    Raises:
        DifferentRunsError: If they differ; the message names what, and the ranks, and is the same on every rank.
    """
    different = []
    for name in sorted({name for statement in statements for name in statement}):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, statement in enumerate(statements):
            ranks_by_value.setdefault(statement.get(name, "not given"), []).append(rank)
        if len(ranks_by_value) > 1:
            values = (f"{value} on rank{'s' * (len(r) > 1)} {_listed(r)}" for value, r in ranks_by_value.items())
            different.append(f"{name} is {', '.join(values)}")
    if different:
        more = len(different) - _MOST_NAMED
        raise DifferentRunsError(
            f"these processes are not one run: {'; '.join(different[:_MOST_NAMED])}"
            f"{f'; and {more} more' if more > 0 else ''}. Start all of them with the same command, code and images"
        )


def _listed(ranks: list[int]) -> str:
    """Write 0, 1, 2, 5 as "0 to 2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


# ---------------------------------------------------------------------------------------------------------------
# Telling the launcher


def tell_launcher(message: str) -> None:
    """Have torchrun, and ``accelerate launch`` for several processes, end their report with this message.

    Without it, their last lines say where to read about tracebacks, whatever this process has printed.
    """
    if (name := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:
        return
    report = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):
        Path(name).write_text(json.dumps(report), encoding="utf-8")
