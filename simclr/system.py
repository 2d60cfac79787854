"""What this process asks of its operating system: outputs that nobody reads, cores, memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class _Output(io.FileIO):
    """A descriptor whose reader may leave: what cannot be written to it is dropped."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # None where it would have to wait
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def outlive_readers() -> None:
    """Let this program go on when nobody takes its output any more: first thing in every program.

    A pipe to `head`, a terminal that was closed, a full disk under a log, `>&-`: what a program does, its files and its
    exit status do not depend on who watches.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # Closed at the start. It gets its number back, before the next file gets it, and lines that are not for it.
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.open(os.devnull, os.O_RDWR), "r+")))
        elif descriptor and stream is getattr(sys, f"__{name}__"):
            raw = _Output(descriptor, "w", closefd=False)
            text = io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw),  # as Python does
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> str | None:
    """Make glibc keep the memory that a training step frees for the next step, instead of giving it back.

    A step on a CPU allocates the same hundreds of megabytes as the step before. Given back in between, each page is
    fetched and zeroed again: a sixth of the processor time of a step of small_resnet_w32 at batch 256 (0.60 s without,
    0.50 s with). The process holds about a tenth more memory at its peak. Results are the same bits.

    For programs, not for libraries: it holds for the whole process. Not done where a MALLOC_ variable of the
    environment or GLIBC_TUNABLES says what is wanted.

    Returns:
        What was done, for people; None if nothing was, as there is no glibc or the user has decided.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return None
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return None
    if mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1):
        return "freed memory is kept for the next step"
    return None


def say_duration(seconds: float) -> str:
    """Return a duration in words, such as "6 min 40 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is about memory, a device's too, for which CPUs raise a plain RuntimeError."""
    # "DefaultCPUAllocator: can't allocate memory"; on Windows "not enough memory"
    told = ("llocate memory", "not enough memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(text in str(error) for text in told)
