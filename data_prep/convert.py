"""From a source of images to one verified .beton file and its sidecar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import PIL
from numpy.typing import NDArray
from tqdm import tqdm

import simclr
from simclr import beton
from simclr.files import explain_write_error
from simclr.system import usable_cores

Chunk = tuple[NDArray[np.uint8], NDArray[np.int64]]
T = TypeVar("T")
R = TypeVar("R")


class ConversionError(ValueError):
    """The images cannot be converted; nothing was changed."""


class UnreadableError(ConversionError):
    """Some files cannot be read.

    Attributes:
        reasons: File -> why it cannot be read.
    """

    def __init__(self, reasons: dict[Path, str]) -> None:
        super().__init__(f"{len(reasons):,} files cannot be read")
        self.reasons = reasons


@dataclass
class Source:
    """The images of one split, in the order in which they are to be stored.

    Attributes:
        description: Where the images come from and what is done to them; goes to the sidecar.
        split: "train", "test", ...
        classes: Names in label order; empty if no image has a label.
        num_images: How many images ``chunks`` will yield.
        chunks: Called once; yields images uint8 (m, h, w, 3) and labels int64 (m,), -1 for no label.
        lossy: Whether some image has gone through lossy compression; final once ``chunks`` is exhausted.
        changes: What was done to images, such as "converted to RGB from mode CMYK" -> to how many; final likewise.
        is_determined: Whether ``description`` and ``split`` determine every pixel, so that a file with the same
            facts need not be made again to be known as the same.
    """

    description: str
    split: str
    classes: Sequence[str]
    num_images: int
    chunks: Callable[[], Iterator[Chunk]]
    lossy: bool = False
    changes: Counter[str] = field(default_factory=Counter)
    is_determined: bool = False


@dataclass(frozen=True)
class Storage:
    """How images are stored.

    Attributes:
        encoding: Pixels as they are, or compressed. JPEG saves space for larger images, loses detail, and needs
            an FFCV that was built with libjpeg-turbo.
        jpeg_quality: 1 to 100; used with --encoding jpeg only.
        force: Replace existing files that differ.
    """

    encoding: Literal["raw", "jpeg"] = "raw"
    jpeg_quality: int = 90
    force: bool = False


def convert(source: Source, path: Path, storage: Storage) -> beton.Facts:
    """Write one split, and say so; see ``convert_all``.

    Returns:
        The facts about the file.
    """
    ((facts, outcome),) = convert_all([(source, path)], storage)
    print(outcome)
    return facts


def convert_all(jobs: Sequence[tuple[Source, Path]], storage: Storage) -> list[tuple[beton.Facts, str]]:
    """Write splits, read them back, compare, and give the files their names once all are complete.

    Files that are already there stay as they are until then. They also stay if they are the same, or if one differs
    and ``storage.force`` is not set.

    Args:
        jobs: The images of each split, and the .beton file for them.
        storage: How to store them.

    Returns:
        The facts about each file, and a line that says what was done.

    Raises:
        UnreadableError: If there are files that cannot be read, with those of all splits.
        ConversionError: If a different file is there and may not be replaced, or the quality is out of range.
        BetonError: If a file cannot be written.
    """
    if not 1 <= storage.jpeg_quality <= 100:
        raise ConversionError(f"--jpeg-quality must be 1 to 100, got {storage.jpeg_quality}")
    done: list[tuple[beton.Facts, str]] = []
    writers: list[beton.Writer] = []
    unreadable: dict[Path, str] = {}
    with ExitStack() as stack:
        for source, path in jobs:
            if source.is_determined and (facts := _same_by_description(source, path, storage)):
                done.append((facts, f"{path}: already there and intact ({_summary(facts)})"))
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConversionError(explain_write_error(error, path)) from error
            try:
                writer, facts = _write(stack, source, path, storage)
            except UnreadableError as error:
                unreadable |= error.reasons
                continue
            outcome = f"{path}: already there and the same ({_summary(facts)})"
            if not _is_there(path, facts, storage):
                writers.append(writer)
                outcome = f"{path}: written, read back and compared ({_summary(facts)})"
            done.append((facts, outcome))
        if unreadable:
            raise UnreadableError(unreadable)
        for writer in writers:
            writer.commit()
    return done


def _write(stack: ExitStack, source: Source, path: Path, storage: Storage) -> tuple[beton.Writer, beton.Facts]:
    """Write all but the name of one file; ``stack`` then holds what removes it again unless it is committed."""
    chunks = source.chunks()
    first = next(chunks)
    _, height, width, _ = first[0].shape
    writer = stack.enter_context(
        beton.Writer(path, num_images=source.num_images, height=height, width=width, encoding=storage.encoding)
    )
    with (
        tqdm(total=source.num_images, desc=path.name, unit=" images", disable=None) as progress,
        ThreadPoolExecutor(usable_cores()) as pool,
    ):
        for images, labels in chain([first], chunks):
            if storage.encoding == "jpeg":
                streams = pool.map(lambda image: beton.encode_jpeg(image, storage.jpeg_quality), images)
                writer.add_jpeg(list(streams), labels)
            else:
                writer.add(images, labels)
            progress.update(len(images))
    facts = writer.finish(
        source=source.description,
        split=source.split,
        classes=source.classes,
        lossy_source=source.lossy,
        jpeg_quality=storage.jpeg_quality if storage.encoding == "jpeg" else None,
        written_by={"simclr": simclr.__version__, "pillow": PIL.__version__},
    )
    return writer, facts


def _is_there(path: Path, facts: beton.Facts, storage: Storage) -> bool:
    """Whether the file is already there and the same.

    Raises:
        ConversionError: If another one is, and may not be replaced.
    """
    if not path.exists() or storage.force:
        return False
    if difference := _difference(path, facts):
        raise ConversionError(
            f"{path} is already there and differs: {difference}. It was left as it is; "
            "replace it with --force or choose another --output"
        )
    return True


def _same_by_description(source: Source, path: Path, storage: Storage) -> beton.Facts | None:
    try:
        facts = beton.verify(path)
    except beton.BetonError:
        return None
    quality = storage.jpeg_quality if storage.encoding == "jpeg" else None
    wanted = (source.description, source.split, source.num_images, tuple(source.classes), storage.encoding, quality)
    found = (facts.source, facts.split, facts.num_images, facts.classes, facts.encoding, facts.jpeg_quality)
    return facts if wanted == found else None


def _difference(path: Path, new: beton.Facts) -> str | None:
    """Return how the file that is there differs from the new one; None if not."""
    try:
        old = beton.verify(path)
    except beton.BetonError as error:
        return str(error)
    before, after = asdict(old), asdict(new)
    differing = [name for name in after if before[name] != after[name] and name != "written_by"]
    # What follows from other content is named only if nothing else differs.
    telling = [name for name in differing if not name.startswith(("channel_", "tables_", "file_"))] or differing
    return "; ".join(f"{name} {before[name]!r} -> {after[name]!r}" for name in telling) or None


def _summary(facts: beton.Facts) -> str:
    quality = f" quality {facts.jpeg_quality}" if facts.encoding == "jpeg" and facts.jpeg_quality else ""
    labels = f"{facts.num_classes} classes" if facts.classes else "no labels"
    return (
        f"{facts.num_images} images of {facts.height} x {facts.width}, {labels}, {facts.encoding}{quality}, "
        f"{facts.file_bytes / 1e6:.1f} MB"
    )


def map_in_order(pool: Executor, function: Callable[[T], R], items: Sequence[T], size: int) -> Iterator[list[R]]:
    """Apply ``function`` in a pool and yield the results ``size`` at a time, in the order of ``items``.

    At most two chunks are under way, so that memory stays bounded however many items there are.
    """

    def submit(chunk: Iterable[T]) -> list[Callable[[], R]]:
        return [pool.submit(function, item).result for item in chunk]

    pending = submit(items[:size])
    for start in range(0, len(items), size):
        upcoming = submit(items[start + size : start + 2 * size])
        yield [result() for result in pending]
        pending = upcoming
