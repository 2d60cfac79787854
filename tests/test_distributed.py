"""Collectives against what one process computes on the rows of all ranks. Every rank holds other data."""

from __future__ import annotations

import contextlib
import datetime
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr import distributed
from tests.helpers import RankError, run_distributed

WORLD_SIZES = [1, 2, 3, 4]


def all_rows(n: int, *trailing: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *trailing, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def share(rows: Tensor, rank: int, world_size: int) -> Tensor:
    return rows.chunk(world_size)[rank].clone()


def check_gather_with_grad(rank: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size
    assert (distributed.rank(), distributed.world_size()) == (rank, world_size)
    for trailing in ((), (3,), (2, 5)):
        whole = all_rows(2 * world_size, *trailing)
        rows = share(whole, rank, world_size).requires_grad_()
        gathered = distributed.gather_with_grad(rows)
        assert torch.equal(gathered, whole)
        # Every rank weighs the gathered rows differently: the gradient is the sum of the weights over ranks.
        weights = [all_rows(len(whole), *trailing, seed=10 + r) for r in range(world_size)]
        (gathered * weights[rank]).sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(rows.grad, share(sum(weights, start=torch.zeros(())), rank, world_size))


def check_layouts_and_dtypes(rank: int, world_size: int) -> None:
    whole = all_rows(3 * world_size, 4, dtype=torch.float32)
    transposed = share(whole, rank, world_size).T.contiguous().T.requires_grad_()
    assert not transposed.is_contiguous()
    gathered = distributed.gather_with_grad(transposed)
    assert torch.equal(gathered, whole)
    gathered.sum().backward()  # type: ignore[no-untyped-call]  # an expanded gradient, which is not contiguous either
    assert torch.equal(transposed.grad, torch.full_like(transposed, world_size))  # type: ignore[arg-type]
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        typed = (10 * whole.abs()).to(dtype)
        assert torch.equal(distributed.gather_with_grad(share(typed, rank, world_size)), typed)


def check_row_counts_may_change(rank: int, world_size: int) -> None:
    for n in (4, 2, 2, 4):
        whole = all_rows(n * world_size, seed=n)
        assert torch.equal(distributed.gather_with_grad(share(whole, rank, world_size)), whole)


def gather_uneven(rank: int, world_size: int, counts: list[int]) -> str:
    with pytest.raises(ValueError, match="same number of rows") as caught:
        distributed.gather_with_grad(torch.zeros(counts[rank], 2))
    return str(caught.value)


def check_gather_variable(rank: int, world_size: int) -> None:
    for counts in ([5] * world_size, list(range(world_size)), list(range(world_size, 0, -1)), [0] * world_size):
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            parts = [(all_rows(c, 3, seed=r) * 10).to(dtype) for r, c in enumerate(counts)]
            assert torch.equal(distributed.gather_variable(parts[rank]), torch.cat(parts))
    with_grad = all_rows(rank + 1, 2).requires_grad_()
    assert not distributed.gather_variable(with_grad).requires_grad


def check_sum_over_ranks(rank: int, world_size: int) -> None:
    parts = [all_rows(3, 4, seed=r) for r in range(world_size)]
    values = parts[rank].T.requires_grad_()  # not contiguous
    before = values.detach().clone()
    total = distributed.sum_over_ranks(values)
    torch.testing.assert_close(total, torch.stack(parts).sum(0).T)
    assert torch.equal(values, before)
    weights = [all_rows(4, 3, seed=20 + r) for r in range(world_size)]
    (total * weights[rank]).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(values.grad, torch.stack(weights).sum(0))
    assert distributed.sum_over_ranks(torch.tensor(rank + 1)).item() == world_size * (world_size + 1) // 2


def check_max_over_ranks(rank: int, world_size: int) -> None:
    parts = [all_rows(2, 3, seed=r) for r in range(world_size)]
    values = parts[rank].T.requires_grad_()
    largest = distributed.max_over_ranks(values)
    assert torch.equal(largest, torch.stack(parts).amax(0).T)
    assert not largest.requires_grad
    assert torch.equal(values.detach(), parts[rank].T)  # unchanged


def check_average_gradients(rank: int, world_size: int) -> None:
    """The gradients of DDP, to the last bit on two ranks; on more, the order of a sum depends on where it lies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2 * 16, 3))
    model = model.to(memory_format=torch.channels_last)
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    x = all_rows(2 * world_size, 3, 6, 6, dtype=torch.float32).chunk(world_size)[rank]
    gradients = []
    for is_in_ddp in (True, False):
        model.zero_grad()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True) if is_in_ddp else model
        wrapped(x).square().sum().backward()
        if not is_in_ddp:
            distributed.average_gradients(model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    in_ddp, averaged = gradients
    assert len(in_ddp) >= len(averaged) == 6
    for theirs, ours, parameter in zip(in_ddp[-6:], averaged, list(model.parameters())[-6:], strict=True):
        assert ours.stride() == parameter.stride()
        tolerance = 0 if world_size <= 2 else 4 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def check_alike_ranks_ask_nothing(rank: int, world_size: int) -> None:
    """A shared gradient is what the ranks would have summed."""
    for are_alike in (False, True):
        value = torch.tensor(2.0, requires_grad=True)
        with distributed.alike() if are_alike else contextlib.nullcontext():
            distributed.require_equal_rows(torch.zeros(3 + are_alike * rank, 1))  # would raise, if it asked
            (distributed.shared_gradient(value) * 5).backward()  # type: ignore[no-untyped-call]
        assert value.grad is not None
        assert float(value.grad) == 5 * world_size


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    "check",
    [
        check_gather_with_grad,
        check_layouts_and_dtypes,
        check_row_counts_may_change,
        check_gather_variable,
        check_sum_over_ranks,
        check_max_over_ranks,
        check_average_gradients,
        check_alike_ranks_ask_nothing,
    ],
)
def test_collectives(check: object, world_size: int) -> None:
    run_distributed(check, world_size)  # type: ignore[arg-type]


@pytest.mark.distributed
@pytest.mark.parametrize("counts", [[3, 2], [2, 0], [4, 4, 4, 3]])
def test_uneven_rows_raise_on_every_rank_and_name_the_counts(counts: list[int]) -> None:
    for message in run_distributed(gather_uneven, len(counts), counts):
        assert f"got {counts} on ranks 0 to {len(counts) - 1}" in message


@pytest.mark.distributed
def test_uneven_rows_after_even_ones_raise_on_the_rank_that_changed() -> None:
    with pytest.raises((RankError, TimeoutError)) as caught:
        run_distributed(gather_uneven_later, 2, timeout=10)
    assert "got [3, 2] on ranks 0 to 1" in str(caught.value)


def gather_uneven_later(rank: int, world_size: int) -> None:
    distributed.gather_with_grad(torch.zeros(3, 2))
    distributed.gather_with_grad(torch.zeros(3 - rank, 2))


def gather_without_a_warning(rank: int, world_size: int) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return distributed.SideChannel(datetime.timedelta(seconds=60)).gather(rank + 3)


@pytest.mark.distributed
def test_the_side_channel_gathers_and_warns_of_nothing() -> None:
    assert run_distributed(gather_without_a_warning, 2) == [[3, 4], [3, 4]]


def test_without_a_process_group_it_is_a_world_of_one() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_with_grad(rows) is rows
    assert distributed.sum_over_ranks(rows) is rows
    assert torch.equal(distributed.gather_variable(rows), rows)
    assert not distributed.gather_variable(rows).requires_grad
    assert torch.equal(distributed.max_over_ranks(rows), rows)
    distributed.leave()  # nothing to leave


def leave_twice(rank: int, world_size: int) -> int:
    distributed.leave()
    distributed.leave()
    left = distributed.world_size()
    # run_distributed wants a group at the end
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    return left


@pytest.mark.distributed
def test_leave_takes_the_group_down() -> None:
    assert run_distributed(leave_twice, 1) == [1]
