"""Checks a .beton file before anything trusts it, and reads it."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from simclr.beton.facts import (
    HOW_TO_CONVERT,
    About,
    BetonError,
    Facts,
    count_classes,
    load_facts,
    sidecar_path,
)
from simclr.beton.format import (
    ALLOCATION,
    DESCRIPTOR,
    FIELD_NAMES,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    METADATA,
    METADATA_OFFSET,
    MODES,
    VERSION,
    Encoding,
    digest_sample,
    new_digest,
)
from simclr.files import PathLike

Samples = NDArray[np.uint8] | list[bytes]  # raw: (m, h * w * 3); jpeg: m streams
_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the samples of a checked .beton file lie: of each, where its bytes start, how many they are, its label."""

    num_images: int
    height: int
    width: int
    encoding: Encoding
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]


def check(path: PathLike, facts: Facts | None = None) -> Layout:
    """Compare a .beton file's tables with its sidecar, or ``facts`` read from that, without reading a pixel.

    It takes milliseconds. Returns where the samples lie. Raises BetonError if either file is missing, or they do not
    belong together.
    """
    path, facts = Path(path), facts or load_facts(path)
    if not path.is_file():
        raise BetonError(f"{path}: no such file. {HOW_TO_CONVERT}")
    if path.stat().st_size == facts.file_bytes:
        tables = _read_tables(path, facts.num_images)
        digest = new_digest(facts.encoding, facts.num_images, facts.height, facts.width)
        if _sha256(digest, *tables) == facts.tables_sha256:
            return _layout(tables, facts.encoding, facts.height, facts.width)
    raise BetonError(
        f"{path}: its size or the sha256 of its tables differs from what {sidecar_path(path).name} says. The file is "
        f"damaged or unfinished, or one of the two belongs to another. {HOW_TO_CONVERT}"
    )


def _read_tables(path: Path, num_images: int) -> tuple[bytes, bytes, bytes]:
    """Return header and descriptors, the metadata, and the allocation table."""
    with path.open("rb") as file:
        head, metadata = file.read(METADATA_OFFSET), file.read(num_images * METADATA.itemsize)
        file.seek(max(0, path.stat().st_size - num_images * ALLOCATION.itemsize))
        return head, metadata, file.read()


def _layout(tables: tuple[bytes, bytes, bytes], encoding: Encoding, height: int, width: int) -> Layout:
    metadata, allocations = np.frombuffer(tables[1], METADATA), _by_index(tables[2])
    offsets, sizes, labels = (
        column.astype(np.int64) for column in (metadata["offset"], allocations["size"], metadata["label"])
    )
    return Layout(len(metadata), height, width, encoding, offsets, sizes, labels)


def _by_index(table: bytes) -> NDArray[np.void]:
    """Return the allocation table in the order of the samples; FFCV's writer with several processes has another."""
    allocations: NDArray[np.void] = np.frombuffer(table, ALLOCATION)
    return allocations[np.argsort(allocations["index"])]


def _sha256(digest: hashlib._Hash, *parts: bytes) -> str:
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _examine(path: Path) -> tuple[Layout, str]:
    """Check the tables of a file that has no sidecar; return where its samples lie, and the tables' checksum."""

    def refused(what: str) -> BetonError:
        return BetonError(f"{path}: {what}. {HOW_TO_CONVERT}")

    if not path.is_file():
        raise refused("no such file")
    file_bytes, head = path.stat().st_size, _read_tables(path, 0)[0]
    if len(head) < METADATA_OFFSET:
        raise refused(f"{file_bytes} bytes are too few for a .beton file")
    header, fields = np.frombuffer(head, HEADER, 1)[0], np.frombuffer(head, DESCRIPTOR, 2, HEADER.itemsize)
    found = header["version"], header["num_fields"], *fields["type_id"], *fields["name"]
    if found != (VERSION, 2, IMAGE_FIELD, INT_FIELD, *FIELD_NAMES):
        raise refused(f"not a .beton file of version {VERSION} with RGBImageField 'image' and IntField 'label' only")
    n, page_size, table = int(header["num_samples"]), int(header["page_size"]), int(header["table_offset"])
    metadata_end = METADATA_OFFSET + n * METADATA.itemsize
    if n < 1 or metadata_end > table or table + n * ALLOCATION.itemsize != file_bytes:
        raise refused(f"{file_bytes} bytes do not fit its {n} images. The file is damaged or unfinished")
    tables = _read_tables(path, n)
    metadata, allocations = np.frombuffer(tables[1], METADATA), _by_index(tables[2])
    ranges = [(int(metadata[name].min()), int(metadata[name].max())) for name in ("mode", "height", "width")]
    (mode, _), (height, _), (width, _) = ranges
    if any(least != most for least, most in ranges) or mode not in MODES or 0 in (height, width):
        raise refused(f"expected images of one encoding and one size, found modes, heights and widths from-to {ranges}")
    layout, starts, sizes = _layout(tables, MODES[mode], height, width), allocations["offset"], allocations["size"]
    if not (
        np.array_equal(allocations["index"], np.arange(n))
        and np.array_equal(starts, metadata["offset"])
        and ((starts >= metadata_end) & (starts < table) & (sizes >= 1) & (sizes <= page_size)).all()
        and (starts // page_size == (starts + sizes - 1) // page_size).all()
        and (layout.encoding == "jpeg" or (sizes == height * width * 3).all())
        and (layout.labels >= -1).all()
    ):
        raise refused("its tables contradict each other. The file is damaged")
    return layout, _sha256(_digest(layout), *tables)


def verify(path: PathLike, facts: Facts | None = None) -> Facts:
    """Compare a .beton file's tables and content with its sidecar, or ``facts`` read from that; return its facts.

    Raises BetonError if anything differs, or either file is missing or damaged.
    """
    facts = facts or load_facts(path)
    layout = check(path, facts)
    found = _content_sha256(path, layout)
    if found != facts.content_sha256:
        raise BetonError(
            f"{path}: the sha256 of its content is {found}, but its sidecar says {facts.content_sha256}. "
            f"The file has changed since it was written. {HOW_TO_CONVERT}"
        )
    return facts


def read(path: PathLike) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read all images, uint8 (n, h, w, 3), and labels, int64 (n,) with -1 for none, into memory, after ``check``.

    JPEG streams are decoded with Pillow, in threads. FFCV's own decoder takes libjpeg-turbo's fast settings and differs
    by up to 10 of 255 levels; ``simclr.data`` has FFCV decode to Pillow's pixels. Raises BetonError as ``check``, or if
    a JPEG stream cannot be decoded.
    """
    layout = check(path)
    images = np.empty((layout.num_images, layout.height, layout.width, 3), np.uint8)
    start = 0
    for samples in _chunks(path, layout):
        _decode(path, layout, samples, start, out=images[start : start + len(samples)])
        start += len(samples)
    return images, layout.labels


def image_digests(path: PathLike) -> list[bytes]:
    """Return 16 bytes of BLAKE2 over the pixels or the JPEG stream of each stored image, after ``check``.

    Equal images of equal size have equal digests in any two files of one encoding.
    """
    return [
        hashlib.blake2b(sample, digest_size=16, usedforsecurity=False).digest()
        for samples in _chunks(path, check(path))
        for sample in samples
    ]


def describe(path: PathLike, **about: Unpack[About]) -> Facts:
    """Read a whole .beton file, FFCV's own included, and work out its facts, for ``save_facts``; store nothing.

    Raises BetonError if the file is missing, is not a .beton with one image and one label per sample, has images of
    several sizes or encodings, is damaged, or has a label out of range.
    """
    path = Path(path)
    layout, tables_sha256 = _examine(path)
    shape = (layout.height, layout.width, 3)
    total, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)  # exact: integers do not round
    start = 0
    for samples in _chunks(path, layout):
        pixels = np.empty((len(samples), *shape), np.uint8)
        _decode(path, layout, samples, start, out=pixels)
        flat = pixels.reshape(len(pixels), math.prod(shape))
        total += flat.sum(axis=0, dtype=np.int64).reshape(-1, 3).sum(axis=0)
        squares += np.square(flat, dtype=np.uint16).sum(axis=0, dtype=np.int64).reshape(-1, 3).sum(axis=0)
        start += len(samples)
    num_pixels = layout.num_images * layout.height * layout.width
    mean = [int(s) / num_pixels for s in total]
    # n * squares - total^2 in Python's integers: nothing cancels, so a constant channel gives exactly 0.
    std = [math.sqrt(num_pixels * int(q) - int(s) ** 2) / num_pixels for s, q in zip(total, squares, strict=True)]
    return Facts(
        source=about["source"],
        split=about["split"],
        num_images=layout.num_images,
        height=layout.height,
        width=layout.width,
        encoding=layout.encoding,
        jpeg_quality=about.get("jpeg_quality"),
        lossy_source=about.get("lossy_source", False),
        classes=tuple(about["classes"]),
        class_counts=count_classes(path, layout.labels, len(about["classes"])),
        channel_mean=(mean[0] / 255, mean[1] / 255, mean[2] / 255),
        channel_std=(std[0] / 255, std[1] / 255, std[2] / 255),
        content_sha256=_content_sha256(path, layout),
        tables_sha256=tables_sha256,
        file_bytes=path.stat().st_size,
        written_by={**about.get("written_by", {}), "numpy": np.__version__},
    )


def _digest(layout: Layout) -> hashlib._Hash:
    return new_digest(layout.encoding, layout.num_images, layout.height, layout.width)


def _content_sha256(path: PathLike, layout: Layout) -> str:
    digest = _digest(layout)
    for samples in _chunks(path, layout):
        for sample in samples:
            digest_sample(digest, sample, layout.encoding)
    return _sha256(digest, layout.labels.astype("<i8").tobytes())


def _chunks(path: PathLike, layout: Layout) -> Iterator[Samples]:
    """Yield samples in index order as they are stored, some 32 MiB of pixels at a time."""
    data: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    n, pixels = layout.num_images, layout.height * layout.width * 3
    step = max(1, _CHUNK_BYTES // pixels)
    # A run is a stretch of samples that follow one another in the file too: one copy moves it whole.
    follows = layout.offsets[1:] == (layout.offsets + layout.sizes)[:-1]
    breaks = np.flatnonzero(~follows) + 1
    for start in range(0, n, step):
        stop = min(start + step, n)
        if layout.encoding == "jpeg":
            spans = zip(layout.offsets[start:stop].tolist(), layout.sizes[start:stop].tolist(), strict=True)
            yield [data[offset : offset + size].tobytes() for offset, size in spans]
            continue
        chunk = np.empty((stop - start, pixels), np.uint8)
        inner = breaks[np.searchsorted(breaks, start, "right") : np.searchsorted(breaks, stop, "left")]
        for first, last in zip([start, *inner.tolist()], [*inner.tolist(), stop], strict=True):
            offset = int(layout.offsets[first])
            chunk[first - start : last - start] = data[offset : offset + (last - first) * pixels].reshape(-1, pixels)
        yield chunk


def _decode(path: PathLike, layout: Layout, samples: Samples, start: int, out: NDArray[np.uint8]) -> None:
    """Write the pixels of ``samples``, the first of which has index ``start``, to ``out`` (m, h, w, 3)."""
    if isinstance(samples, np.ndarray):
        out[...] = samples.reshape(out.shape)
        return
    from PIL import Image  # raw files need no Pillow

    def decode(item: tuple[int, bytes]) -> None:
        i, stream = item
        try:
            with Image.open(io.BytesIO(stream), formats=["JPEG"]) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BetonError(f"{path}: image {start + i} is not a readable JPEG: {error}") from error
        if pixels.shape != out[i].shape:
            raise BetonError(f"{path}: JPEG {start + i} has shape {pixels.shape}, expected {out[i].shape}")
        out[i] = pixels

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, enumerate(samples)):
            pass
