"""Both views of each batch, made by whatever makes them soonest here.

Views are a function of seed, epoch and image. So they may be made by one process or another, by a thread that runs some
batches ahead, or within the step, by numba on a CPU or by Triton on a GPU: nothing of a run depends on it but rounding.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from simclr.data import Batch, EpochPlan, ImageSource, sent
from simclr.system import usable_cores
from simclr.views import ViewSpec, require_function_of_the_image, size_at, two_views

if TYPE_CHECKING:
    from simclr.views import fused_views, triton_views

ViewsMethod = Literal["fused", "triton", "torch", "own"]
ViewsChoice = Literal["auto", "fused", "triton", "torch"]

AHEAD = 2  # batches that wait, so that one that took long to read is not felt
_Item = TypeVar("_Item")


class ViewFeed:
    """Makes the views of a run. A context manager, at whose end its threads end.

    Args:
        source: Images.
        view_1: Settings of the first view.
        view_2: Settings of the second view.
        seed: Seed of the run.
        view_stages: As :func:`simclr.views.size_at` takes them.
        augmentation: "standard", or the name of views that somebody has registered, which are made by their function
            on ``device``.
        choice: fused: :mod:`simclr.views.fused_views`, on the CPU. triton: :mod:`simclr.views.triton_views`, on a GPU.
            torch: :mod:`simclr.views`, on ``device``. auto: the first that can be had and computes on ``device``; torch
            if ``dtype`` is float64. They differ by rounding.
        device: Where the step runs.
        dtype: Of the views, as the network takes them.

    Attributes:
        method: What was chosen.
        in_background: Whether a thread makes the views of the next batches while a step runs.
        reason: Why, and how it is done, in one line for the user.

    Raises:
        ValueError: If fused or Triton's views were asked for and cannot be made, or registered ones do not keep their
            promise; the message says what to do.
    """

    def __init__(
        self,
        source: ImageSource,
        view_1: ViewSpec,
        view_2: ViewSpec,
        *,
        seed: int,
        view_stages: Sequence[tuple[int, int]] = (),
        augmentation: str = "standard",
        choice: ViewsChoice = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.specs, self.seed, self.view_stages = source, (view_1, view_2), seed, view_stages
        self.device, self.dtype, self.augmentation = torch.device(device), dtype, augmentation
        self._running: Ahead[Tensor] | None = None
        self._fused: dict[int, fused_views.FusedViews] = {}  # by the views' side
        self._triton: dict[int, triton_views.TritonViews] = {}
        self._tables: _Tables | None = None
        self.size = source.facts.height
        wanted: ViewsMethod = choice if choice != "auto" else "triton" if self.device.type == "cuda" else "fused"
        obstacle = _obstacle(wanted, self.device, dtype, augmentation)
        if choice != "auto" and obstacle is not None:
            raise ValueError(f"views {choice} cannot be had, since {obstacle}. Or use --views torch")
        self.method: ViewsMethod = wanted if obstacle is None else "torch"
        if augmentation != "standard":
            self.method = "own"
        # Beside a step that keeps all cores busy, a thread only gets in its way (measured: decision 0010); and torch's
        # operations would run on as many threads again. Triton's views are one launch: there is nothing to do ahead.
        self.in_background = (self.device.type == "cuda" and self.method != "triton") or (
            self.method == "fused" and _spare_cores() > 0
        )
        where = f"{AHEAD} batches ahead of the step" if self.in_background else "within the step"
        how = f"on {self.device.type}"
        mean, std = source.facts.normalisation
        sizes = {*(side for side, _ in view_stages), source.facts.height}
        if self.method == "fused":
            from simclr.views import fused_views  # needs numba

            threads = 1 if self.in_background else torch.get_num_threads()
            for size in sizes:
                self._fused[size] = fused_views.FusedViews(
                    *self.specs,
                    size=size,
                    mean=mean,
                    std=std,
                    dtype=dtype,
                    threads=threads,
                    pin_memory=self.device.type == "cuda",
                )
            how = f"numba, {threads} thread{'s' if threads > 1 else ''}, {fused_views.compiled().how}"
        elif self.method == "triton":
            from simclr.views import triton_views

            for size in sizes:
                self._triton[size] = triton_views.TritonViews(*self.specs, size=size, mean=mean, std=std, dtype=dtype)
            self._tables = _Tables(self)
        elif self.method == "own":
            for size in sizes:
                for spec in self.specs:
                    require_function_of_the_image(augmentation, spec, size=size, stored=source.facts.height)
        why = "as configured" if choice != "auto" else f"since {obstacle}"
        self.reason = f"{where}, {how}" + ("" if choice == "auto" and obstacle is None else f"; {why}")

    def batches(self, plan: EpochPlan, *, epoch: int = 0, start_step: int = 0) -> Iterator[Tensor]:
        """Yield the views of this rank's batches of one epoch. Stopping early is fine; one epoch at a time.

        Args:
            plan: Which images, in which order.
            epoch: From 0.
            start_step: First step, 0 to ``len(plan)``.

        Yields:
            (2b, 3, S, S), channels_last, on the device: the b first views, then the b second ones. S is the epoch's.

        Raises:
            ValueError: At the call, as :meth:`simclr.data.ImageSource.batches`.
            RuntimeError: While iterating in a forked process, which has no background thread.
        """
        if self.method == "triton":
            return (self.make(*recipe) for recipe in self.recipes(plan, epoch=epoch, start_step=start_step))
        batches = self.source.batches(plan, epoch=epoch, start_step=start_step)
        made = (self._make(batch, epoch) for batch in batches)
        if not self.in_background:
            return made
        self.close()
        self._running = Ahead(made, AHEAD, _begin_on(self.device))
        return self._running

    def recipes(self, plan: EpochPlan, *, epoch: int = 0, start_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield what :meth:`make` makes the views of each batch from; for steps that make them themselves, with Triton.

        Arguments and errors as for :meth:`batches`. :attr:`size` is then the side of the epoch's views.
        """
        assert self._tables is not None
        self.size = size_at(self.view_stages, epoch, self.source.facts.height)
        order, entries = (each[start_step:] for each in self._tables.load(plan, epoch))
        if self._stored is not None:
            return zip(order, entries, strict=True)
        batches = self.source.batches(plan, epoch=epoch, start_step=start_step)
        within = torch.arange(plan.global_batch_size // plan.world_size, device=self.device)
        return ((within, entry, sent(batch.image, self.device)) for batch, entry in zip(batches, entries, strict=True))

    def make(self, row: Tensor, entry: Tensor, image: Tensor | None = None) -> Tensor:
        """Return the views of a batch of the epoch of :meth:`recipes`, as :meth:`batches` yields them.

        Args:
            row: Which of the images, int64, (b,), on the device.
            entry: Where the parameters of their views lie in the epoch's table, int64, (b,), on the device.
            image: The batch's images, uint8, (b, H, W, 3), on the device; None if the source holds all images there.
        """
        assert self._tables is not None
        image = self._stored if image is None else image
        assert image is not None
        return self._triton[self.size](image, row, self._tables.table, entry)

    @property
    def _stored(self) -> Tensor | None:
        """All images, if the source holds them where the step runs."""
        return self.source.stored if self.source.device.type == self.device.type else None

    def _make(self, batch: Batch, epoch: int) -> Tensor:
        size = size_at(self.view_stages, epoch, self.source.facts.height)
        if self.method == "fused":
            views = self._fused[size](batch.image.cpu(), batch.index, seed=self.seed, epoch=epoch)
            # Pinned memory is not used again before the copy has ended: torch's allocator waits for it.
            return views.to(self.device, non_blocking=True)
        mean, std = self.source.facts.normalisation
        image = sent(batch.image, self.device)
        pair = two_views(
            image,
            batch.index,
            *self.specs,
            seed=self.seed,
            epoch=epoch,
            size=size,
            mean=mean,
            std=std,
            augmentation=self.augmentation,
        )
        return torch.cat(pair).to(self.dtype)

    def close(self) -> None:
        """End the background thread, if one runs. May be called twice; the feed can be used again."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def __enter__(self) -> ViewFeed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        for fused in self._fused.values():
            fused.close()
        if self._tables is not None:
            self._tables.close()


def _spare_cores() -> int:
    """Cores that this process may use and the steps of the processes on this machine leave alone."""
    cores = usable_cores()
    return cores - torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class _Tables:
    """Which images this rank reads in an epoch, and the parameters of their views, on the device.

    The parameters lie always at the same place. The next epoch's are drawn meanwhile, by a thread.
    """

    def __init__(self, feed: ViewFeed) -> None:
        self._feed = feed
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "parameters of views")
        self._drawn: dict[tuple[EpochPlan, int], concurrent.futures.Future[tuple[Tensor, Tensor]]] = {}
        self._loaded: tuple[EpochPlan, int] | None = None
        self._order = self._entries = self.table = torch.empty(0)

    def load(self, plan: EpochPlan, epoch: int) -> tuple[Tensor, Tensor]:
        """Let :attr:`table` hold this epoch's parameters, for what is launched from now on.

        Returns:
            The images of each of this rank's batches, and where :attr:`table` has the parameters of their views; both
            int64, (steps, b), on the device.
        """
        if (plan, epoch) != self._loaded:
            drawn = self._drawn.pop((plan, epoch), None) or self._draw(plan, epoch)
            order, parameters = drawn.result()
            self._order = order.to(self._feed.device, non_blocking=True)
            if self.table.shape == parameters.shape:
                self.table.copy_(parameters, non_blocking=True)
            else:
                self.table = parameters.to(self._feed.device)
                self._entries = torch.arange(order.numel(), device=self._feed.device).view(order.shape)
            self._loaded = plan, epoch
            self._drawn = {(plan, epoch + 1): self._draw(plan, epoch + 1)}
        return self._order, self._entries

    def _draw(self, plan: EpochPlan, epoch: int) -> concurrent.futures.Future[tuple[Tensor, Tensor]]:
        from simclr.views.triton_views import parameter_table

        facts, on_gpu = self._feed.source.facts, self._feed.device.type == "cuda"

        def draw() -> tuple[Tensor, Tensor]:
            order = np.stack(list(plan.batches(epoch)))
            table = parameter_table(
                self._feed.specs,
                order.reshape(-1),
                seed=self._feed.seed,
                epoch=epoch,
                height=facts.height,
                width=facts.width,
            )
            drawn = torch.from_numpy(order), table
            return (drawn[0].pin_memory(), drawn[1].pin_memory()) if on_gpu else drawn

        return self._thread.submit(draw)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def _obstacle(method: ViewsMethod, device: torch.device, dtype: torch.dtype, augmentation: str) -> str | None:
    """Why views cannot be made this way, or None."""
    if method == "torch":
        return None
    if augmentation != "standard":
        return f"{augmentation} is a function of your own"
    if dtype == torch.float64:
        return "in float64, which compares runs, the batched operations are used everywhere"
    if method == "triton":
        return _triton_obstacle(device)
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba does not import ({error}; to install it: pip install 'simclr[ffcv]')"
    return None


def _triton_obstacle(device: torch.device) -> str | None:
    try:
        from simclr.views.triton_views import IS_INTERPRETED
    except ImportError as error:
        return f"Triton does not import ({error})"
    if device.type != "cuda" and not IS_INTERPRETED:
        return f"Triton computes on GPUs, and this run on {device.type}"
    if not IS_INTERPRETED and not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler, gcc, clang or CC"
    return None


class Ahead(Generic[_Item]):
    """Takes items from a generator in a thread of its own, a few ahead of whoever iterates.

    What the generator raises is raised where its item would have come. :meth:`close` ends thread and generator; so
    does the end of the items.

    Args:
        items: Is run in the thread.
        depth: Items that may wait, >= 1, besides the one that is made.
        begin: Is called in the thread first.
    """

    def __init__(self, items: Generator[_Item], depth: int, begin: Callable[[], object] | None = None) -> None:
        self._items, self._process = items, os.getpid()
        self._ended = False  # by what the generator did
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "ahead", begin)
        self._waiting = collections.deque(self._thread.submit(next, items) for _ in range(depth + 1))

    def __iter__(self) -> Iterator[_Item]:
        return self

    def __next__(self) -> _Item:
        if self._ended:
            raise StopIteration
        if os.getpid() != self._process:
            raise RuntimeError("views are made by a thread, and threads do not survive a fork of the process")
        if not self._waiting:  # an epoch must not look shorter than it is
            raise RuntimeError("the views were closed before their end; ask the feed for batches again")
        try:
            item = self._waiting.popleft().result()
        except BaseException as error:
            self._ended = isinstance(error, StopIteration)
            self.close()
            raise
        self._waiting.append(self._thread.submit(next, self._items))
        return item

    def close(self) -> None:
        """End the thread and wait for it. May be called twice."""
        self._waiting.clear()
        self._thread.shutdown(cancel_futures=True)
        self._items.close()


def _begin_on(device: torch.device) -> Callable[[], object] | None:
    """Return what lets another thread work on this thread's GPU and stream; None on the CPU.

    Both are chosen per thread. On the same stream, the views are there before the step that takes them, and their
    memory is not used again before that step has ended, without any event.
    """
    if device.type != "cuda":
        return None
    return functools.partial(torch.cuda.set_stream, torch.cuda.current_stream(device))  # and its device
