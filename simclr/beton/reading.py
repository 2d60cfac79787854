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
from typing import IO, Unpack

import numpy as np
from numpy.typing import NDArray

from simclr.beton.facts import (
    HOW_TO_CONVERT,
    SIDECAR_VERSION,
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
    LARGEST_PAGE,
    METADATA,
    METADATA_OFFSET,
    MODES,
    SMALLEST_PAGE,
    VERSION,
    Encoding,
    content_digest,
    digest_sample,
    file_sha256,
    round_up,
    unpack_digest,
)
from simclr.run.files import PathLike

Samples = NDArray[np.uint8] | list[bytes]  # raw: (m, h * w * 3); jpeg: m streams
_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the samples of a checked .beton file lie.

    Attributes:
        num_images: n, at least 1.
        height: Height of every image in pixels.
        width: Width of every image in pixels.
        encoding: "raw" or "jpeg".
        page_size: Bytes per page.
        offsets: Where each sample's bytes start, int64 (n,).
        sizes: How many bytes each sample has, int64 (n,).
        labels: int64 (n,); -1 for an image without a label.
        content_sha256: The checksum that the file itself carries; None if FFCV's own writer made it.
    """

    num_images: int
    height: int
    width: int
    encoding: Encoding
    page_size: int
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    content_sha256: str | None


def check(path: PathLike, facts: Facts | None = None) -> Layout:
    """Check every table of a .beton file, and that ``facts`` belong to it, without reading a pixel.

    It takes milliseconds. A changed pixel or JPEG stream passes; ``verify`` is the one that notices.

    Args:
        path: The .beton file.
        facts: Its facts, if they are to be compared too.

    Returns:
        Where the samples lie.

    Raises:
        BetonError: If the file is missing, is not a .beton with one image and one label per sample, has images
            of several sizes or encodings, is damaged, or is not the file that ``facts`` describe.
    """
    path = Path(path)
    if not path.is_file():
        raise BetonError(f"{path}: no such file. {HOW_TO_CONVERT}")
    with path.open("rb") as file:
        layout = _check_tables(path, file, path.stat().st_size)
    if facts is not None:
        _check_facts(path, layout, facts)
    return layout


def _check_tables(path: Path, file: IO[bytes], file_bytes: int) -> Layout:
    def damaged(what: str) -> BetonError:
        return BetonError(f"{path}: {what}. The file is damaged or unfinished. {HOW_TO_CONVERT}")

    def unsupported(what: str) -> BetonError:
        return BetonError(f"{path}: {what}. {HOW_TO_CONVERT}")

    if file_bytes < METADATA_OFFSET:
        raise damaged(f"{file_bytes} bytes are too few for a .beton file")
    header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
    if header["version"] != VERSION:
        raise unsupported(f"not a .beton file of version {VERSION} (its first number is {header['version']})")
    if header["num_fields"] != 2:
        raise unsupported(f"expected the 2 fields 'image' and 'label', found {header['num_fields']} fields")
    descriptors = np.frombuffer(file.read(2 * DESCRIPTOR.itemsize), DESCRIPTOR)
    types, names = tuple(descriptors["type_id"].tolist()), tuple(descriptors["name"].tolist())
    if types != (IMAGE_FIELD, INT_FIELD) or names != FIELD_NAMES:
        raise unsupported(
            f"expected RGBImageField 'image' (type {IMAGE_FIELD}) and IntField 'label' (type {INT_FIELD}), "
            f"found names {names} of types {types}"
        )
    content_sha256 = unpack_digest(descriptors["arguments"][0].tobytes())
    if content_sha256 == "" or any(descriptors["arguments"][1].tobytes()):
        raise damaged("the arguments of its fields are neither empty nor a content checksum")

    page_size, n, table = int(header["page_size"]), int(header["num_samples"]), int(header["table_offset"])
    if not SMALLEST_PAGE <= page_size <= LARGEST_PAGE or page_size & (page_size - 1):
        raise damaged(f"page size {page_size} is not a power of 2 from {SMALLEST_PAGE} to {LARGEST_PAGE}")
    if n < 1:
        raise damaged("it says that it has no images")
    metadata_end = METADATA_OFFSET + n * METADATA.itemsize
    if metadata_end > file_bytes:
        raise damaged(f"{file_bytes} bytes cannot hold the metadata of {n} images")
    if table < metadata_end or table + n * ALLOCATION.itemsize != file_bytes:
        raise damaged(
            f"the allocation table of {n} images should be its last {n * ALLOCATION.itemsize} bytes, "
            f"but starts at byte {table} of {file_bytes}"
        )
    metadata = np.frombuffer(file.read(n * METADATA.itemsize), METADATA)
    file.seek(table)
    allocations = np.frombuffer(file.read(n * ALLOCATION.itemsize), ALLOCATION)

    modes = np.unique(metadata["mode"]).tolist()
    if len(modes) != 1 or modes[0] not in MODES:
        raise unsupported(f"expected one encoding for all images, 0 (JPEG) or 1 (raw), found {modes}")
    encoding = MODES[modes[0]]
    heights, widths = np.unique(metadata["height"]).tolist(), np.unique(metadata["width"]).tolist()
    if len(heights) != 1 or len(widths) != 1 or heights[0] < 1 or widths[0] < 1:
        raise unsupported(
            f"expected images of one size, found heights {heights[0]} to {heights[-1]} "
            f"and widths {widths[0]} to {widths[-1]}"
        )

    # FFCV's writer with several processes stores the table in another order than the samples.
    order = np.argsort(allocations["index"], kind="stable")
    allocations = allocations[order]
    if not np.array_equal(allocations["index"], np.arange(n, dtype=np.uint64)):
        raise damaged("the allocation table does not name each image once")
    if not np.array_equal(allocations["offset"], metadata["offset"]):
        raise damaged("metadata and allocation table disagree about where an image starts")
    # Bounds come before arithmetic: sums of unsigned numbers that a damaged file gives would wrap around.
    if (allocations["offset"] >= table).any() or (allocations["size"] > page_size).any():
        raise damaged("an image lies beyond the data")
    offsets, sizes = allocations["offset"].astype(np.int64), allocations["size"].astype(np.int64)
    first_page = round_up(metadata_end, page_size)
    if (offsets < first_page).any() or (offsets + sizes > table).any() or (sizes < 1).any():
        raise damaged("an image lies outside the data")
    if (offsets // page_size != (offsets + sizes - 1) // page_size).any():
        raise damaged("an image crosses a page")
    by_offset = np.argsort(offsets, kind="stable")
    if (offsets[by_offset][1:] < (offsets + sizes)[by_offset][:-1]).any():
        raise damaged("two images share bytes")
    height, width = heights[0], widths[0]
    if encoding == "raw" and (sizes != height * width * 3).any():
        raise damaged(f"a raw image of {height} x {width} does not have {height * width * 3} bytes")
    labels = metadata["label"].astype(np.int64)
    if labels.min() < -1:
        raise damaged(f"label {labels.min()} is below -1 (no label)")
    return Layout(n, height, width, encoding, page_size, offsets, sizes, labels, content_sha256)


def _check_facts(path: Path, layout: Layout, facts: Facts) -> None:
    found: dict[str, object] = {
        "num_images": layout.num_images,
        "height": layout.height,
        "width": layout.width,
        "encoding": layout.encoding,
        "file_bytes": path.stat().st_size,
        "class_counts": count_classes(path, layout.labels, facts.num_classes),
    }
    if layout.content_sha256 is not None:
        found["content_sha256"] = layout.content_sha256
    for name, value in found.items():
        if getattr(facts, name) != value:
            raise BetonError(
                f"{path}: {name} is {value}, but its sidecar {sidecar_path(path).name} says {getattr(facts, name)}. "
                f"The two do not belong together. {HOW_TO_CONVERT}"
            )


def verify(path: PathLike, facts: Facts | None = None) -> Facts:
    """Check a .beton file, its sidecar, and every byte of it against the sidecar's checksum.

    Args:
        path: The .beton file.
        facts: What the sidecar says, if it was read before.

    Returns:
        Its facts.

    Raises:
        BetonError: If anything differs, or either file is missing or damaged.
    """
    facts = facts or load_facts(path)
    check(path, facts)
    digest = file_sha256(path)
    if digest != facts.file_sha256:
        raise BetonError(
            f"{path}: its sha256 is {digest}, but its sidecar says {facts.file_sha256}. "
            f"The file has changed since it was written. {HOW_TO_CONVERT}"
        )
    return facts


def read(path: PathLike) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read all images and labels into memory, after ``check``.

    JPEG streams are decoded with Pillow, in threads. FFCV's own decoder takes libjpeg-turbo's fast settings and
    differs by up to 10 of 255 levels; ``simclr.data`` has FFCV decode to Pillow's pixels. Raw images are equal.

    Args:
        path: The .beton file; its sidecar is not needed.

    Returns:
        Images uint8 (n, h, w, 3) and labels int64 (n,), -1 for an image without a label.

    Raises:
        BetonError: As ``check``, or if a JPEG stream cannot be decoded.
    """
    layout = check(path)
    images = np.empty((layout.num_images, layout.height, layout.width, 3), np.uint8)
    start = 0
    for samples in _chunks(path, layout):
        _decode(path, layout, samples, start, out=images[start : start + len(samples)])
        start += len(samples)
    return images, layout.labels


def image_digests(path: PathLike) -> list[bytes]:
    """Return one digest per stored image, in index order: 16 bytes of BLAKE2 over its pixels or its JPEG stream.

    Equal images of equal size have equal digests in any two files of one encoding.

    Raises:
        BetonError: As ``check``.
    """
    return [
        hashlib.blake2b(sample, digest_size=16, usedforsecurity=False).digest()
        for samples in _chunks(path, check(path))
        for sample in samples
    ]


def describe(path: PathLike, **about: Unpack[About]) -> Facts:
    """Read a whole .beton file, FFCV's own included, and work out its facts; store nothing.

    Returns:
        The facts, for ``save_facts``.

    Raises:
        BetonError: As ``check``, if a label is out of range, if a JPEG stream cannot be decoded, or if the file
            carries a content checksum and its content differs.
    """
    layout = check(path)
    shape = (layout.height, layout.width, 3)
    digest = content_digest(layout.encoding, layout.num_images, layout.height, layout.width)
    total, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)  # exact: integers do not round
    start = 0
    for samples in _chunks(path, layout):
        pixels = np.empty((len(samples), *shape), np.uint8)
        _decode(path, layout, samples, start, out=pixels)
        for sample in samples:
            digest_sample(digest, sample, layout.encoding)
        flat = pixels.reshape(len(pixels), math.prod(shape))
        total += flat.sum(axis=0, dtype=np.int64).reshape(-1, 3).sum(axis=0)
        squares += np.square(flat, dtype=np.uint16).sum(axis=0, dtype=np.int64).reshape(-1, 3).sum(axis=0)
        start += len(samples)
    digest.update(layout.labels.astype("<i8").tobytes())
    content_sha256 = digest.hexdigest()
    if layout.content_sha256 not in (None, content_sha256):
        raise BetonError(
            f"{path}: its content has sha256 {content_sha256}, but it was written with {layout.content_sha256}. "
            f"The file is damaged. {HOW_TO_CONVERT}"
        )

    num_pixels = layout.num_images * layout.height * layout.width
    mean = [int(s) / num_pixels for s in total]
    # n * squares - total^2 in Python's integers: nothing cancels, so a constant channel gives exactly 0.
    std = [math.sqrt(num_pixels * int(q) - int(s) ** 2) / num_pixels for s, q in zip(total, squares, strict=True)]
    return Facts(
        format_version=SIDECAR_VERSION,
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
        content_sha256=content_sha256,
        file_bytes=Path(path).stat().st_size,
        file_sha256=file_sha256(path),
        written_by={**about.get("written_by", {}), "numpy": np.__version__},
    )


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
