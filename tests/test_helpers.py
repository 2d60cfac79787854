from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import RankError, run_distributed


def _sum_over_ranks(rank: int, world_size: int, offset: torch.Tensor) -> tuple[int, int, int, torch.Tensor]:
    value = offset + rank
    dist.all_reduce(value)
    return rank, dist.get_world_size(), os.getpid(), value


def _draw(rank: int, world_size: int) -> torch.Tensor:
    return torch.rand(4)


def _raise_on_last_rank(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise ValueError(f"rank {rank} objects")
    dist.barrier()


def _die_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def _hang_on_rank_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        _sleep_long()


def _sleep_long() -> None:
    time.sleep(600)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_runs_in_its_own_process_of_one_group(world_size: int) -> None:
    results = run_distributed(_sum_over_ranks, world_size, torch.tensor([10.0], dtype=torch.float64))
    total = 10.0 * world_size + sum(range(world_size))
    assert [rank for rank, _, _, _ in results] == list(range(world_size))
    assert {size for _, size, _, _ in results} == {world_size}
    assert len({pid for _, _, pid, _ in results} | {os.getpid()}) == world_size + 1
    for _, _, _, value in results:
        torch.testing.assert_close(value, torch.tensor([total], dtype=torch.float64))


@pytest.mark.distributed
def test_random_numbers_differ_between_ranks_and_repeat_between_calls() -> None:
    first, second = run_distributed(_draw, 2), run_distributed(_draw, 2)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.distributed
def test_a_failing_rank_is_reported_and_the_next_call_works() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 2 of 3 raised.*in _raise_on_last_rank.*rank 2 objects"):
        run_distributed(_raise_on_last_rank, 3)
    with pytest.raises(RankError, match="rank 1 of 2 died with exit code 7"):
        run_distributed(_die_on_rank_one, 2)
    with pytest.raises(TimeoutError, match=r"(?s)did not return within 1 s.*_sleep_long"):
        run_distributed(_hang_on_rank_zero, 2, timeout=1)
    assert len(run_distributed(_draw, 2)) == 2


def test_a_world_without_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size is 0"):
        run_distributed(_draw, 0)
