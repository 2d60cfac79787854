"""Everything the library knows about other processes. The only module that uses ``torch.distributed``.

All functions also work without a process group, as a world of one.

Shape letters: b rows on this rank, n = world_size * b rows on all ranks, ... any further dimensions.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch 2.14 gives two collectives new names and warns of the old ones; torch 2.11 knows only the old.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    """Return the number of processes that train together (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0 to ``world_size() - 1`` (0 without a process group)."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def divisible_batches(size: int, world_size: int, most: float = math.inf) -> str:
    """Return in words which batches next to ``size`` images, at most ``most``, ``world_size`` processes can share."""
    below = int(min(size, most)) // world_size * world_size
    return " or ".join(str(batch) for batch in (below, below + world_size) if 0 < batch <= most)


def leave() -> None:
    """Leave the process group, at the end of a program; nothing happens without one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _GatherRows(torch.autograd.Function):
    """Concatenate every rank's rows; the backward pass sums the gradients that all ranks hold for ours."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((len(gradient) // world_size(), *gradient.shape[1:]))
        _reduce_scatter(own, gradient.contiguous(), op=dist.ReduceOp.SUM)
        return own


class _SumOverRanks(torch.autograd.Function):
    """Sum a tensor over ranks; since every rank uses the sum, so is the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


class _SharedGradient(torch.autograd.Function):
    """The identity; the backward pass sums the gradient over ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


def gather_with_grad(rows: Tensor, *, known_equal: bool = False) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, keeping the gradient.

    The gradient that reaches ``rows`` is the sum over ranks of the gradients of their copies. With a loss that
    is averaged over ranks, as DDP averages parameter gradients, that is exactly the gradient of one device
    holding all rows. (``accelerator.gather`` drops the gradient when, and only when, there are several ranks.)

    Args:
        rows: Tensor of shape (b, ...), the same shape and dtype on every rank.
        known_equal: Whether the caller has made :func:`require_equal_rows`, which is otherwise made here.

    Returns:
        Tensor of shape (n, ...): rank 0's rows first. ``rows`` itself in a world of one.

    Raises:
        ValueError: If the ranks hold different numbers of rows; the message names them. Every rank raises at the
            first call; later, at least every rank whose number has changed, and the others wait for those in vain.

    Note:
        Collective call: every rank must make it. Differentiable once.
    """
    if world_size() == 1:
        return rows
    if not known_equal:
        require_equal_rows(rows)
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


def gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, without gradient; every rank must hold the same number.

    ``rows`` itself in a world of one. Collective call; :func:`require_equal_rows` is the caller's to make.
    """
    if world_size() == 1:
        return rows
    gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    _all_gather(gathered, rows.contiguous())
    return gathered


def gather_variable(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, where ranks may hold different numbers of rows.

    No gradient. For evaluation, whose last batch may be uneven. Collective call.

    Args:
        rows: Tensor of shape (b_r, ...); trailing dimensions and dtype the same on every rank.

    Returns:
        Tensor of shape (sum of all b_r, ...), on every rank.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    counts = _all_counts(rows).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = rows.new_empty((world_size() * max(counts), *rows.shape[1:]))
    _all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered.chunk(world_size()), counts, strict=True)])


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise sum of ``values`` over all ranks, keeping the gradient. Collective call."""
    if world_size() == 1:
        return values
    total: Tensor = _SumOverRanks.apply(values)
    return total


def max_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise maximum of ``values`` over all ranks, without gradient. Collective call."""
    if world_size() == 1:
        return values.detach()
    largest = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def shared_gradient(value: Tensor) -> Tensor:
    """Return ``value``, the same on every rank; what the ranks' losses ask of it is summed over ranks, once, here.

    So what comes before it, which every rank makes alike, needs no communication in its backward pass. Collective in
    the backward pass.
    """
    if world_size() == 1:
        return value
    shared: Tensor = _SharedGradient.apply(value)
    return shared


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each parameter's gradient by its mean over ranks, by one all-reduce. Collective call.

    As DDP does it at the end of a backward pass; for backward passes that DDP does not see.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat /= world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class SideChannel:
    """Small messages between the ranks' hosts: a gloo group of their own, so that no GPU is waited for.

    All methods but ``set_timeout`` are collective calls; in a world of one they answer at once.

    Args:
        timeout: How long a rank waits for the others, here and in training's collectives, until it is changed.
    """

    def __init__(self, timeout: datetime.timedelta) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        self._vote: tuple[Tensor, Any] | None = None
        self.set_timeout(timeout)

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """Change the timeout, of training's collectives too."""
        if self._group is not None:
            # torch 2.14 has a public name for it.
            change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            for group in (self._group, dist.group.WORLD):
                change(timeout, group)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value (numbers, text, dicts of them), in rank order.

        Raises RuntimeError after the timeout, on every rank.
        """
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * world_size()
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def vote(self, number: int) -> int:
        """Send a number to all ranks; return the largest one that any rank sent at the call before (at first 0).

        The numbers travel during the step between two calls. So nobody waits for them, and every rank learns the
        same at the same step.
        """
        if self._group is None:
            return number
        cast = torch.tensor([number])
        before = self._vote
        self._vote = cast, dist.all_reduce(cast, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if before is None:
            return 0
        largest, work = before
        work.wait()
        return int(largest)


def store() -> Any:
    """Return a new connection to the key-value store that all ranks share; None in a world of one."""
    if world_size() == 1:
        return None
    own = dist.distributed_c10d._get_default_store().clone()
    own.set_timeout(datetime.timedelta(seconds=5))
    return own


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective call failed because another rank has died, or did not come in time."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))


# The number of rows that all ranks held at the last check, per process group. On CUDA, reading the others' counts
# makes the host wait for the device, so a rank reads them only where its own count is another than then. The counts
# are gathered every time, so that all ranks make the same collective calls: wherever counts differ, at least one rank
# differs from the last common count, reads, and raises.
_last_common_count: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def require_equal_rows(rows: Tensor) -> None:
    """Raise ValueError, with the numbers, unless every rank holds as many rows; see :func:`gather_with_grad`.

    Collective call. Costs no wait for the device while the number stays what it was.
    """
    if world_size() == 1:
        return
    counts_on_device = _all_counts(rows)
    if _last_common_count.get(dist.group.WORLD) == len(rows):
        return
    counts = counts_on_device.tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"every rank must hold the same number of rows, got {counts} on ranks 0 to {len(counts) - 1}; "
            "use a global batch size that the number of processes divides, and drop the last batch"
        )
    _last_common_count[dist.group.WORLD] = len(rows)


def _all_counts(rows: Tensor) -> Tensor:
    """Return the number of rows on each rank, int64, shape (world_size,), on the device of ``rows``."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = count.new_empty(world_size())
    _all_gather(counts, count)
    return counts


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, in which sums over devices are taken, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
