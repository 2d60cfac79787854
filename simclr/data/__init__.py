"""Batches of stored images: which images form a batch, and how their pixels are read.

The order of the images is a pure function of (seed, epoch): no generator, sampler or reader holds a state. Global
batch k of an epoch is the same set of images for every number of devices, and an epoch can start at any step.

    plan = EpochPlan(train_indices, global_batch_size=1024, world_size=4, rank=2, seed=0)
    with open_images("cifar10-train.beton") as source:
        print(source.backend, source.reason)
        for image, label, index in source.batches(plan, epoch=3, start_step=17):
            ...

Two backends read the same file and yield the same batches, bit for bit: FFCV, which reads and decodes in a
background thread, and "memory", which keeps all images decoded in memory, also in a GPU's.

Shape letters: n images in the file, b images of one batch on this rank, H and W their height and width in pixels.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr import beton
from simclr.beton import Facts
from simclr.distributed import divisible_batches

Backend = Literal["ffcv", "memory"]
BackendChoice = Literal["auto", "ffcv", "memory"]

_CHECKSUM_LIMIT_BYTES = 1 << 30  # sha256 of a file this large takes 1 to 4 seconds; it is read at every opening
_VALIDATION_KEY = (0x56414C4944415445, 0)  # "VALIDATE"; differs from every (seed, epoch) in use
_FEW_LABELS_KEY = 0x4C4142454C000000  # "LABEL", and room for the classes; larger than every epoch in use


class Batch(NamedTuple):
    """Images of one step on this rank. The tensors own their memory: keep them as long as needed.

    Attributes:
        image: uint8 (b, H, W, 3), contiguous, RGB, on the source's device.
        label: int64 (b,), on the source's device; -1 for an image without a label.
        index: int64 (b,), position of each image in the file; always on the CPU.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one needs here


# ---------------------------------------------------------------------------------------------------------------
# Order


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """Which images this rank reads at each step of each epoch: a pure function of its fields and the epoch.

    Epoch e orders ``indices`` by a permutation p that depends on (seed, e) alone. Global batch k is
    ``p[k * global_batch_size : (k + 1) * global_batch_size]``, and each rank takes a contiguous slice of it, so
    that the slices of all ranks, in rank order, are the global batch for every world size.

    Attributes:
        indices: Images to read, positions in the file: 1-D integers >= 0 without repetition.
        global_batch_size: Images per step over all ranks.
        world_size: Number of ranks.
        rank: This rank, 0 to ``world_size - 1``.
        seed: 0 to 2**64 - 1.
        shuffle: Whether to permute; False keeps the order of ``indices`` in every epoch.
        drop_last: True, for training: every step has ``global_batch_size`` images, the same number on each rank,
            and the images that are left over sit out this epoch. False, for evaluation: every image is read exactly
            once, ranks differ by at most one image, and a rank's slice of the last batch may be empty. Every rank
            still makes every step, so that collective calls stay matched.

    Raises:
        ValueError: If a field is out of range; if ``drop_last`` and the batch cannot be divided evenly; if
            ``drop_last`` and there are fewer images than one batch.
    """

    indices: NDArray[np.int64]
    global_batch_size: int
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True

    def __post_init__(self) -> None:
        indices = np.asarray(self.indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not np.can_cast(indices.dtype, np.int64):
            raise ValueError(f"indices must be a 1-D array of int64, got {indices.dtype} {indices.shape}")
        indices = indices.astype(np.int64)  # a copy, so that nobody changes the plan afterwards
        indices.flags.writeable = False
        object.__setattr__(self, "indices", indices)

        if len(indices) == 0:
            raise ValueError("indices is empty: there is no image to read")
        if indices.min() < 0:
            raise ValueError(f"indices must be >= 0, got {indices.min()}")
        if num_repeated := len(indices) - len(np.unique(indices)):
            raise ValueError(f"indices must not repeat: {num_repeated} of {len(indices)} do")
        _require_integer("global_batch_size", self.global_batch_size, 1)
        _require_integer("world_size", self.world_size, 1)
        _require_integer("rank", self.rank, 0, self.world_size - 1)
        _require_integer("seed", self.seed, 0, 2**64 - 1)
        if not self.drop_last:
            return
        if self.global_batch_size % self.world_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by world_size {self.world_size}; "
                f"use {divisible_batches(self.global_batch_size, self.world_size)}"
            )
        if len(indices) < self.global_batch_size:
            raise ValueError(
                f"{len(indices)} images do not fill one batch of global_batch_size {self.global_batch_size}; "
                f"use more images or a global_batch_size of at most {len(indices)}"
            )

    def __len__(self) -> int:
        """Return the steps per epoch, the same on every rank."""
        full, left_over = divmod(len(self.indices), self.global_batch_size)
        return full + (left_over > 0 and not self.drop_last)

    def batches(self, epoch: int = 0, start_step: int = 0) -> Iterator[NDArray[np.int64]]:
        """Return this rank's slice of each global batch.

        Args:
            epoch: From 0.
            start_step: First step to yield, 0 to ``len(self)``; the steps before it are skipped at no cost.

        Returns:
            An iterator over ``len(self) - start_step`` arrays, int64 (b,).

        Raises:
            ValueError: If ``epoch`` or ``start_step`` is out of range; at the call, not at the first step.
        """
        _require_integer("epoch", epoch, 0, 2**64 - 1)
        _require_integer("start_step", start_step, 0, len(self))
        order = self.indices
        if self.shuffle:
            order = order[_permutation(len(order), (self.seed, epoch))]
        return (self._slice(order, step) for step in range(start_step, len(self)))

    def _slice(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        batch = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        share, left_over = divmod(len(batch), self.world_size)  # the first left_over ranks take one image more
        start = self.rank * share + min(self.rank, left_over)
        return batch[start : start + share + (self.rank < left_over)]


def validation_split(num_images: int, num_validation: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split a training set, always in the same way: it depends on the two numbers alone, on no seed.

    So a checkpoint chosen by one program and a classifier chosen by another never trained on the images they are
    chosen on, and runs with different seeds are compared on the same images.

    Args:
        num_images: Images in the training set.
        num_validation: How many of them to hold out, 0 to ``num_images - 1``; drawn at random, not by class. A
            smaller validation set is part of each larger one.

    Returns:
        Indices of the training and of the validation images, each int64 and sorted.

    Raises:
        ValueError: If a number is out of range.
    """
    _require_integer("num_images", num_images, 1)
    _require_integer("num_validation", num_validation, 0, num_images - 1)
    order = _permutation(num_images, _VALIDATION_KEY)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def few_labels(
    labels: NDArray[np.int64], *, num_classes: int, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw a part of the labelled images, as many of each class, and hold out a fifth of it to choose on.

    Each class gives k images, ``fraction`` of all labelled images over the number of classes, rounded; a class that has
    fewer gives all. What a smaller fraction draws is part of what a larger one draws with the same seed.

    Args:
        labels: Of all images of the training set, int64 (n,); -1 for an image without a label.
        num_classes: c.
        fraction: In (0, 1].
        seed: Of the draw, in [0, 2**64).

    Returns:
        Indices of the images to fit on and of those to choose on (of each class a fifth, rounded down, but at least 1),
        each int64 and sorted.

    Raises:
        ValueError: If a class gives fewer than 2 images.

    Source:
        Chen et al. 2020, arXiv:2002.05709, section 6 and appendix B.5: 1 % and 10 %, balanced by class.
    """
    num_labelled = int((labels >= 0).sum())
    k = math.floor(fraction * num_labelled / num_classes + 0.5)
    fit, choose = [], []
    for number in range(num_classes):
        members = np.flatnonzero(labels == number)
        drawn = members[_permutation(len(members), (seed, _FEW_LABELS_KEY + number))][:k]
        if len(drawn) < 2:
            raise ValueError(
                f"label_fraction {fraction:g} of {num_labelled} labelled images in {num_classes} classes is {k} of "
                f"each, and class {number} has {len(members)}; 2 of each are needed, one to fit on and one to choose "
                f"on. Use --label-fraction {2 * num_classes / num_labelled:.2g} or more, and a file that has them"
            )
        held_out = max(1, len(drawn) // 5)
        choose.append(drawn[:held_out])
        fit.append(drawn[held_out:])
    return np.sort(np.concatenate(fit)), np.sort(np.concatenate(choose))


@functools.lru_cache(maxsize=2)
def _permutation(n: int, key: tuple[int, int]) -> NDArray[np.int64]:
    """Return a permutation of 0..n-1 for each key; the last two are kept, so that an epoch's can be made beforehand.

    Sorting Philox's raw output instead of calling ``Generator.permutation``: numpy guarantees that the raw output
    of a bit generator never changes, but not what its distributions make of it (NEP 19).
    """
    draws = np.random.Philox(key=np.array(key, np.uint64)).random_raw(n)
    order = np.argsort(draws, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def _require_integer(name: str, value: int, least: int, most: int | None = None) -> None:
    expected = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be {expected}, got {value!r}") from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} must be {expected}, got {value}")


# ---------------------------------------------------------------------------------------------------------------
# Sources


def open_images(
    path: str | os.PathLike[str],
    *,
    backend: BackendChoice = "auto",
    num_workers: int | None = None,
    device: torch.device | str = "cpu",
) -> ImageSource:
    """Open a .beton file for reading, after checking it.

    The checksum of its tables is always compared, as FFCV would crash, hang or return wrong pixels where they are
    damaged. That of its content is for files of up to 1 GiB (CIFAR-10: 0.1 to 0.7 seconds); for larger ones ``reason``
    says that this was left out, and ``simclr.beton.verify`` does it.

    Args:
        path: The .beton file; its sidecar of facts must lie beside it.
        backend: "ffcv"; "memory", which needs n * H * W * 3 bytes and no FFCV; or "auto": FFCV where it can read
            this file, memory elsewhere. ``ImageSource.reason`` says which was chosen and why, in one line.
        num_workers: FFCV's decoding threads. By default 1 for raw images, since copying them keeps up with any
            device, and up to 4 for JPEG. Never more than this process has cores. No effect on "memory".
        device: Where ``Batch.image`` and ``Batch.label`` are put. With "memory" the whole set is kept there. On a
            machine with several GPUs select this process's GPU first (``accelerate.Accelerator`` does).

    Returns:
        The open source; also a context manager.

    Raises:
        BetonError: If the file or its sidecar is missing, damaged, or one of another file.
        ValueError: If an argument is out of range, or ``backend="ffcv"`` cannot read this file here; the message
            says why and what to do.
    """
    if backend not in ("auto", "ffcv", "memory"):
        raise ValueError(f'backend must be "auto", "ffcv" or "memory", got {backend!r}')
    if num_workers is not None:
        _require_integer("num_workers", num_workers, 1)
    path = Path(path)
    facts = beton.load_facts(path)
    before = _version(path)
    source = _open_checked(path, facts, backend, num_workers, torch.device(device))
    if _version(path) != before:
        source.close()
        raise beton.BetonError(f"{path} was changed while it was opened; start again when it is whole")
    return source


def _open_checked(
    path: Path, facts: Facts, backend: BackendChoice, num_workers: int | None, device: torch.device
) -> ImageSource:
    if facts.file_bytes <= _CHECKSUM_LIMIT_BYTES:
        beton.verify(path, facts)
        checked = "checksum verified"
    else:
        beton.check(path, facts)
        checked = f"tables checked, checksum not (more than {_CHECKSUM_LIMIT_BYTES >> 20} MiB)"

    because = "as asked for"
    if backend != "memory":
        from simclr.data.ffcv_source import FFCVSource, ffcv_obstacle

        obstacle = ffcv_obstacle(facts.encoding)
        if obstacle is None:
            return FFCVSource(path, facts, device, checked, num_workers)
        if backend == "ffcv":
            raise ValueError(
                f"{path} cannot be read with FFCV: {obstacle}. Or read it with --loader memory (in Python: "
                'backend="memory")'
            )
        because = f"because {obstacle}"
    return _MemorySource(path, facts, device, f"{because}; {checked}")


def _version(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written to or another one takes its name."""
    if not path.exists():
        return ()
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class ImageSource(ABC):
    """The images of one .beton file. Made by ``open_images``; also a context manager.

    It is neither a torch Dataset nor a DataLoader: it needs no ``accelerator.prepare``, which returns it untouched.
    The ranks of a run share nothing but their ``EpochPlan``.

    Attributes:
        path: The .beton file.
        facts: What is known about it.
        device: Where images and labels of the batches are.
        backend: "ffcv" or "memory".
        reason: Why this backend, and what was checked, in one line for the user.
        stored: All images, uint8 (n, H, W, 3), contiguous, on ``device``; None if they are not held there.
    """

    backend: Backend
    stored: Tensor | None = None

    def __init__(self, path: Path, facts: Facts, device: torch.device, reason: str) -> None:
        self.path, self.facts, self.device, self.reason = path, facts, device, reason
        self._is_open = True

    def batches(self, plan: EpochPlan, *, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """Read this rank's batches of one epoch. Stopping early is fine; several iterators may be open at once.

        Args:
            plan: Which images, in which order.
            epoch: From 0.
            start_step: First step to read, 0 to ``len(plan)``.

        Returns:
            An iterator over ``len(plan) - start_step`` batches.

        Raises:
            ValueError: At the call, if an argument is out of range or the plan names an image that the file does
                not have; at any time, if the source is closed.
            BetonError: While iterating with FFCV, before a batch that was read after the file was written to.
            RuntimeError: While iterating with FFCV, if its thread fails or this process was forked from the one
                that opened the source.
        """
        self._check_open()
        if plan.indices.max() >= self.facts.num_images:
            raise ValueError(
                f"the plan reads image {plan.indices.max()}, but {self.path} has {self.facts.num_images} images "
                f"(0 to {self.facts.num_images - 1})"
            )
        return self._read(plan.batches(epoch, start_step))

    def close(self) -> None:
        """Free memory and end background threads; open iterators end with an error. May be called twice."""
        self._is_open = False

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _read(self, slices: Iterator[NDArray[np.int64]]) -> Iterator[Batch]: ...

    def _check_open(self) -> None:
        if not self._is_open:
            raise ValueError(f"{self.path} was closed; open it again with open_images")


class _MemorySource(ImageSource):
    """All images decoded in memory; a batch is one gather."""

    backend = "memory"

    def __init__(self, path: Path, facts: Facts, device: torch.device, reason: str) -> None:
        images, labels = beton.read(path)
        size = f"{images.nbytes / 2**20:.0f} MiB"
        super().__init__(path, facts, device, f"{size} of images in memory ({device}), {reason}")
        # One row per image: index_select copies rows five times as fast as it copies (H, W, 3) blocks.
        self._pixels = torch.from_numpy(images).flatten(1).to(device)
        self.stored = self._pixels.view(images.shape)
        self._labels = torch.from_numpy(labels).to(device)

    def _read(self, slices: Iterator[NDArray[np.int64]]) -> Iterator[Batch]:
        shape = (-1, self.facts.height, self.facts.width, 3)
        for rows in slices:
            self._check_open()
            index = torch.from_numpy(rows.copy())
            if self.device.type == "cpu":
                # By numpy, on this thread alone: torch's would be taken from a step that runs meanwhile.
                pixels = torch.from_numpy(self._pixels.numpy().take(rows, axis=0))
                label = torch.from_numpy(self._labels.numpy().take(rows))
            else:
                at = sent(index, self.device)
                pixels, label = self._pixels.index_select(0, at), self._labels.index_select(0, at)
            yield Batch(pixels.view(shape), label, index)

    def close(self) -> None:
        super().close()
        self._pixels = self._labels = torch.empty(0)
        self.stored = None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; the host's may be overwritten at once if that is a GPU.

    To a GPU it goes through pinned memory, so that no one waits for it; torch uses that memory again after the copy.
    """
    travels = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if travels else tensor.to(device)
