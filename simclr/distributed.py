"""Everything the library knows about other processes. The only module that uses ``torch.distributed``.

All functions also work without a process group, as a world of one.

Shape letters: b rows on this rank, n = world_size * b rows on all ranks, ... any further dimensions.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterable, Iterator
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


def backend() -> str:
    """Return what carries messages between the processes' devices, such as nccl or gloo; empty in a world of one."""
    return str(dist.get_backend()) if world_size() > 1 else ""


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
        return total(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


class _SharedGradient(torch.autograd.Function):
    """The identity; the backward pass sums the gradient over ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.are_alike = _are_alike
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * world_size() if ctx.are_alike else sum_over_ranks(gradients[0])


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
    torch.compile passes it without a break.
    """
    if world_size() == 1:
        return rows
    if torch.compiler.is_compiling():
        ops = torch.ops._c10d_functional
        traced: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(rows.contiguous(), world_size(), _group_name()))
        return traced
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
    summed: Tensor = _SumOverRanks.apply(values)
    return summed


def total(values: Tensor) -> Tensor:
    """Return the elementwise sum of ``values`` over all ranks, without gradient. Collective call.

    torch.compile passes it without a break.
    """
    if world_size() == 1:
        return values
    if torch.compiler.is_compiling():
        ops = torch.ops._c10d_functional
        traced: Tensor = ops.wait_tensor(ops.all_reduce(values, "sum", _group_name()))
        return traced
    summed = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, op=dist.ReduceOp.SUM)
    return summed


def _group_name() -> str:
    return str(dist.group.WORLD.group_name)  # type: ignore[union-attr]  # there is a group


def gather_weights(weight: Tensor) -> Tensor:
    """Return what each rank multiplies its loss by, a scalar, as (world_size,).

    Collective call, except within :func:`alike`.
    """
    return weight.expand(world_size()) if _are_alike else gather(weight.reshape(1))


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
    the backward pass, except within :func:`alike`.
    """
    if world_size() == 1:
        return value
    shared: Tensor = _SharedGradient.apply(value)
    return shared


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each parameter's gradient by its mean over ranks, by one all-reduce. Collective call.

    As DDP does it during a backward pass; for steps that DDP does not see, or that are captured in a CUDA graph. The
    gradients are then parts of one tensor.
    """
    having = [parameter for parameter in parameters if parameter.grad is not None]
    if world_size() == 1 or not having:
        return
    as_stored = [_as_stored(parameter.grad) for parameter in having if parameter.grad is not None]
    flat = torch.cat([dense.reshape(-1) for dense, _ in as_stored])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    flat /= world_size()
    sizes = [dense.numel() for dense, _ in as_stored]
    for parameter, (dense, order), mean in zip(having, as_stored, torch.split(flat, sizes), strict=True):
        parameter.grad = mean.view(dense.shape).permute([order.index(i) for i in range(dense.ndim)])


def _as_stored(x: Tensor) -> tuple[Tensor, list[int]]:
    """Return ``x`` with its dimensions in the order in which they lie in memory, so that flattening it copies nothing.

    And that order.
    """
    order = sorted(range(x.ndim), key=lambda dimension: -x.stride()[dimension])
    return x.permute(order), order


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
_are_alike = False


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Say that all ranks hold as many rows, and multiply their losses by the same, so that nobody has to ask.

    That saves two messages a step. Anywhere else a loss asks, since a wrong answer would be a wrong gradient.
    """
    global _are_alike
    before, _are_alike = _are_alike, True
    try:
        yield
    finally:
        _are_alike = before


def require_equal_rows(rows: Tensor) -> None:
    """Raise ValueError, with the numbers, unless every rank holds as many rows; see :func:`gather_with_grad`.

    Collective call, except within :func:`alike`. The host waits for the device where the number is another
    than at the last call.
    """
    if world_size() == 1 or _are_alike:
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
    count = torch.full((1,), len(rows), device=rows.device)  # torch.tensor would make the host wait for a GPU
    counts = count.new_empty(world_size())
    _all_gather(counts, count)
    return counts


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, in which sums over devices are taken, or as it is if it is float64."""
    return x if x.dtype in {torch.float32, torch.float64} else x.float()
