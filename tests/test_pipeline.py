"""The feed: views are those of the seed whoever makes them, and the thread ends, fails and waits as it should."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.convert import Storage, convert
from data_prep.shapes import shapes
from simclr.data import EpochPlan, ImageSource, open_images
from simclr.views import ViewSpec, two_views
from simclr.views.pipeline import Ahead, ViewFeed

OTHER = ViewSpec(crop_scale=(0.5, 1.0), blur_probability=0.5)
PLAN = EpochPlan(np.arange(50), 16, seed=5)  # 3 steps


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageSource]:
    path = tmp_path_factory.mktemp("images") / "train.beton"
    convert(shapes(0, "train", 50), path, Storage())
    with open_images(path, backend="memory") as opened:
        yield opened


def views_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def by_hand(source: ImageSource, epoch: int, start_step: int = 0, side: int = 32) -> list[Tensor]:
    mean, std = source.facts.normalisation
    return [
        torch.cat(
            two_views(batch.image, batch.index, ViewSpec(), OTHER, seed=9, epoch=epoch, size=side, mean=mean, std=std)
        )
        for batch in source.batches(PLAN, epoch=epoch, start_step=start_step)
    ]


def test_torch_views_are_the_two_views_of_each_batch(source: ImageSource) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with ViewFeed(source, ViewSpec(), OTHER, seed=9, choice="torch", dtype=dtype) as feed:
            found = list(feed.batches(PLAN, epoch=3, start_step=1))
        assert [view.dtype for view in found] == [dtype] * 2
        assert all(map(torch.equal, found, [view.to(dtype) for view in by_hand(source, 3, 1)]))


@pytest.mark.parametrize("choice", ["torch", "fused"])
def test_views_have_the_side_of_their_epoch(source: ImageSource, choice: Any) -> None:
    if choice == "fused":
        pytest.importorskip("numba")
    with ViewFeed(source, ViewSpec(), OTHER, seed=9, view_stages=((16, 1), (40, 2)), choice=choice) as feed:
        for epoch, side in ((0, 16), (2, 40), (1, 40), (3, 32), (9, 32)):
            found = list(feed.batches(PLAN, epoch=epoch, start_step=1))
            assert [tuple(views.shape[1:]) for views in found] == [(3, side, side)] * 2
            torch.testing.assert_close(torch.cat(found), torch.cat(by_hand(source, epoch, 1, side)), rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_views_are_those_of_the_seed_epoch_and_batch(source: ImageSource, dtype: torch.dtype) -> None:
    fused_views = pytest.importorskip("simclr.views.fused_views")
    mean, std = source.facts.normalisation
    with ViewFeed(source, ViewSpec(), OTHER, seed=9, dtype=dtype) as feed:
        assert feed.method == "fused"
        for epoch in (0, 1):
            with fused_views.FusedViews(ViewSpec(), OTHER, size=32, mean=mean, std=std, dtype=dtype) as views:
                expected = [
                    views(batch.image, batch.index, seed=9, epoch=epoch) for batch in source.batches(PLAN, epoch=epoch)
                ]
            found = list(feed.batches(PLAN, epoch=epoch))
            assert len(found) == 3
            assert all(map(torch.equal, found, expected))
            bound = 3e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(torch.cat(found).float(), torch.cat(by_hand(source, epoch)), rtol=0, atol=bound)


def test_views_are_made_beside_the_step_where_it_leaves_a_core(
    source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr("simclr.views.pipeline._spare_cores", lambda: 0)
    with ViewFeed(source, ViewSpec(), OTHER, seed=9) as feed:
        within = list(feed.batches(PLAN))
        assert "within the step" in feed.reason
        assert views_threads() == []
    monkeypatch.setattr("simclr.views.pipeline._spare_cores", lambda: 1)
    with ViewFeed(source, ViewSpec(), OTHER, seed=9) as feed:
        assert "ahead of the step" in feed.reason
        assert all(map(torch.equal, feed.batches(PLAN), within))
        batches = feed.batches(PLAN)
        next(batches)
        assert len(views_threads()) == 1
        batches = feed.batches(PLAN)  # an epoch that was left early does not keep its thread
        next(batches)
        assert len(views_threads()) == 1
    assert views_threads() == []


def test_wrong_plans_are_refused_at_the_call(source: ImageSource) -> None:
    with (
        ViewFeed(source, ViewSpec(), OTHER, seed=9) as feed,
        pytest.raises(ValueError, match="the plan reads image 50"),
    ):
        feed.batches(EpochPlan(np.arange(51), 16))


# What is chosen, and why


def test_float64_is_left_to_the_batched_operations(source: ImageSource) -> None:
    feed = ViewFeed(source, ViewSpec(), OTHER, seed=9, dtype=torch.float64)
    assert feed.method == "torch"
    assert "float64" in feed.reason
    with pytest.raises(ValueError, match=r"views fused cannot be had, since in float64.*--views torch"):
        ViewFeed(source, ViewSpec(), OTHER, seed=9, dtype=torch.float64, choice="fused")


def test_without_numba_the_batched_operations_serve(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    feed = ViewFeed(source, ViewSpec(), OTHER, seed=9)
    assert feed.method == "torch"
    assert "pip install 'simclr[ffcv]'" in feed.reason
    with pytest.raises(ValueError, match="numba does not import"):
        ViewFeed(source, ViewSpec(), OTHER, seed=9, choice="fused")


# The thread


def numbers(then: Callable[[], Any] | None = None, made: list[int] | None = None) -> Generator[int]:
    try:
        for number in range(100):
            if made is not None:
                made.append(number)
            yield number
            if number == 2 and then is not None:
                then()
    finally:
        if made is not None:
            made.append(-1)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_items_come_in_order_and_the_thread_ends_with_them() -> None:
    ahead = Ahead(numbers(), 2)
    assert list(ahead) == list(range(100))
    assert views_threads() == []
    assert list(ahead) == []


def test_items_are_made_before_they_are_asked_for_but_not_without_bound() -> None:
    made: list[int] = []
    ahead = Ahead(numbers(made=made), 2)
    assert next(ahead) == 0
    wait_until(lambda: len(made) == 4)  # one was taken, two wait in the queue, one waits for room
    time.sleep(0.2)
    assert made == [0, 1, 2, 3]
    ahead.close()


def test_leaving_early_closes_thread_and_generator() -> None:
    made: list[int] = []
    ahead = Ahead(numbers(made=made), 2)
    next(ahead)
    ahead.close()
    ahead.close()
    assert made[-1] == -1
    assert views_threads() == []
    with pytest.raises(RuntimeError, match="closed before their end"):  # and never looks like a short epoch
        next(ahead)


def test_errors_of_the_thread_are_raised_where_items_are_taken() -> None:
    def fail() -> None:
        raise KeyError("broken image")

    ahead = Ahead(numbers(then=fail), 2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="broken image"):
        next(ahead)
    assert views_threads() == []


def test_a_thread_that_is_gone_is_noticed() -> None:
    """In a forked process, where no thread is left. It must raise within 20 s instead of waiting."""
    ahead = Ahead(numbers(), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own warning against forking with threads
        child = os.fork()
    if child == 0:
        try:
            list(ahead)
        except RuntimeError as error:
            os._exit(0 if "do not survive a fork" in str(error) else 2)
        os._exit(3)
    status: list[int] = []
    try:
        wait_until(lambda: _ended(child, status))
    finally:
        if not status:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert status == [0]
    ahead.close()


def _ended(child: int, status: list[int]) -> bool:
    pid, code = os.waitpid(child, os.WNOHANG)
    if pid:
        status.append(os.waitstatus_to_exitcode(code))
    return bool(status)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would show that a GPU is fed the CPU's views")
@pytest.mark.parametrize("choice", ["torch", "fused"])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_gpu_gets_the_views_of_the_cpu(source: ImageSource, choice: Any, on_device: bool) -> None:
    with (
        open_images(source.path, backend="memory", device="cuda" if on_device else "cpu") as opened,
        ViewFeed(opened, ViewSpec(), OTHER, seed=9, choice=choice, device="cuda") as feed,
    ):
        found = torch.cat(list(feed.batches(PLAN))).cpu()
    torch.testing.assert_close(found, torch.cat(by_hand(source, 0)), rtol=0, atol=3e-5)
