"""How much memory there is and was taken; and when it is full, a message that says what to change."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

from simclr.system import is_out_of_memory


class OutOfMemoryError(ValueError):
    """The device's memory does not hold a step."""


def device_peak(device: torch.device) -> int:
    """Return the most bytes of a GPU that torch has held so far; 0 for a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def host_peak() -> int | None:
    """Return the most bytes of main memory that this process has held so far; None where Python does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def host_memory() -> int:
    """Return the bytes of main memory. Raises OSError, ValueError or AttributeError where the system does not tell."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def explain_shortage(device: torch.device, per_device_batch_size: int, world_size: int) -> Iterator[None]:
    """Turn torch's and Python's errors for memory that cannot be had into one that names what fits.

    Args:
        device: Of the step.
        per_device_batch_size: Source images of a step on it.
        world_size: Number of devices.

    Raises:
        OutOfMemoryError: In place of those errors; others pass.
    """
    static = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fits = _estimate(device, static, per_device_batch_size)
        where = device if device.type == "cuda" else device.type
        raise OutOfMemoryError(
            f"out of memory on {where} with per_device_batch_size {per_device_batch_size}"
            f"{f'; about {fits} source images would fit' if fits else ''}. Use --recompute, or more devices, which "
            f"leave the result as it is, or lower --global-batch-size (now {per_device_batch_size * world_size}). "
            f"{error}"
        ) from error


def _estimate(device: torch.device, static: int, per_device_batch_size: int) -> int | None:
    """Return how many images would fit at most, if a step's memory grows with them as it has until it failed."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.max_memory_allocated(device) - static
    usable = free + torch.cuda.memory_reserved(device) - static
    if not 0 < usable < total or used <= 0:
        return None
    # The failed step would have needed more than it had got; so this is an upper bound.
    return min(per_device_batch_size - 1, int(per_device_batch_size * 0.9 * usable / max(used, usable)))
