"""The .beton file format and its sidecar of facts: written, checked and read with numpy alone.

A .beton file is what FFCV 1.0.2 reads: here always one ``RGBImageField`` named "image" and one ``IntField``
named "label", all images of one size and one encoding.

    header            version, number of fields, page size, number of samples, where the allocation table starts
    two descriptors   type and name of each field, 1024 bytes of arguments that FFCV's two fields ignore
    metadata          per sample: encoding, width, height, where its bytes start, label
    pages             the samples' bytes; no sample crosses a page
    allocation table  per sample: its index, where its bytes start, how many they are

FFCV trusts all of it: damaged tables make it crash, hang, or return wrong pixels. ``check`` refuses such a
file before FFCV sees it. What the format has no room for (class names, channel statistics, source, checksums)
stands in a JSON file beside it, ``FILE.beton.json``, read into ``Facts``. The checksum of the content also
stands in the image field's unused arguments, so that a sidecar that belongs to another file is noticed without
reading the pixels.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, Literal, Required, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simclr.run import files
from simclr.run.files import PathLike
from simclr.schema import Count, Must, Size, from_values, require

Encoding = Literal["raw", "jpeg"]

SIDECAR_VERSION = 1
_BETON_VERSION = 2
_IMAGE_FIELD, _INT_FIELD = 2, 1
_FIELD_NAMES = (b"image", b"label")
_MODES: dict[int, Encoding] = {0: "jpeg", 1: "raw"}
_SMALLEST_PAGE, _LARGEST_PAGE = 1 << 21, 1 << 31  # FFCV's own writer accepts powers of two in this range
_DIGEST_TAG = b"content-sha256:"
_CHUNK_BYTES = 32 << 20

# Offsets are spelled out because FFCV aligns these records as a C compiler on x86-64 would.
_HEADER = np.dtype(
    {
        "names": ["version", "num_fields", "page_size", "num_samples", "table_offset"],
        "formats": ["<u2", "<u2", "<u4", "<u8", "<u8"],
        "offsets": [0, 2, 4, 8, 16],
        "itemsize": 24,
    }
)
_DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
_METADATA = np.dtype(
    {
        "names": ["mode", "width", "height", "offset", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
_ALLOCATION = np.dtype([("index", "<u8"), ("offset", "<u8"), ("size", "<u8")])
_METADATA_OFFSET = _HEADER.itemsize + 2 * _DESCRIPTOR.itemsize


Quality = Annotated[int, Must(lambda value: 1 <= value <= 100, "1 to 100")]
Fraction = Annotated[float, Must(lambda value: 0 <= value <= 1, "in [0, 1]")]
Sha256 = Annotated[str, Must(re.compile("[0-9a-f]{64}").fullmatch, "64 hexadecimal digits")]


class BetonError(ValueError):
    """A .beton file or its sidecar is missing, damaged, stale, or cannot be written."""


@dataclass(frozen=True)
class Facts:
    """What is known about one .beton file; stored beside it as ``FILE.beton.json``.

    Attributes:
        format_version: ``SIDECAR_VERSION`` of the code that wrote it.
        source: Where the images came from and what was done to them, for people.
        split: "train", "test", "unlabeled", ...
        num_images: Number of images.
        height: Height of every image in pixels.
        width: Width of every image in pixels.
        encoding: "raw" or "jpeg".
        jpeg_quality: Quality of the stored JPEG, 1 to 100; None for raw or if unknown.
        lossy_source: Whether the images had gone through lossy compression before they were converted.
        classes: Names in label order; empty if no image has a label.
        class_counts: Images per class, in label order. Images without a label (-1) are in none.
        channel_mean: Mean of the stored pixels / 255, in the order R, G, B.
        channel_std: Population standard deviation of the stored pixels / 255, in the order R, G, B.
        content_sha256: Of the samples in index order and their labels, whatever the page layout. Samples are
            decoded pixels for "raw", and JPEG streams for "jpeg", as JPEG decoders differ in the last bit.
        file_bytes: Size of the .beton file.
        file_sha256: Of the whole .beton file.
        written_by: Versions of the software that wrote it.
    """

    format_version: int
    source: str
    split: str
    num_images: Size
    height: Size
    width: Size
    encoding: Encoding
    jpeg_quality: Quality | None
    lossy_source: bool
    classes: tuple[str, ...]
    class_counts: tuple[Count, ...]
    channel_mean: tuple[Fraction, Fraction, Fraction]
    channel_std: tuple[Fraction, Fraction, Fraction]
    content_sha256: Sha256
    file_bytes: Size
    file_sha256: Sha256
    written_by: dict[str, str]

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if no image has a label."""
        return len(self.classes)

    @property
    def is_labelled(self) -> bool:
        """Whether every image has a label."""
        return self.num_classes > 0 and sum(self.class_counts) == self.num_images

    @property
    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Per-channel (mean, std) on the scale where 255 is 1.

        Raises:
            BetonError: If a channel is constant, so that it cannot be divided by its deviation.
        """
        if min(self.channel_std) <= 0:
            constant = [c for c, std in zip(("red", "green", "blue"), self.channel_std, strict=True) if std <= 0]
            raise BetonError(
                f"all pixels of all images have the same {' and '.join(constant)}, and normalising would divide by 0. "
                "Convert images whose three channels vary; where there are fewer, repeat one, as in a grey image"
            )
        return self.channel_mean, self.channel_std


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


def sidecar_path(path: PathLike) -> Path:
    """Return where the facts about ``path`` are kept: "x.beton" -> "x.beton.json"."""
    return Path(f"{os.fspath(path)}.json")


# ---------------------------------------------------------------------------------------------------------------
# Checking


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
        raise BetonError(f"{path}: no such file. {_HOW_TO_CONVERT}")
    with path.open("rb") as file:
        layout = _check_tables(path, file, path.stat().st_size)
    if facts is not None:
        _check_facts(path, layout, facts)
    return layout


def _check_tables(path: Path, file: IO[bytes], file_bytes: int) -> Layout:
    def damaged(what: str) -> BetonError:
        return BetonError(f"{path}: {what}. The file is damaged or unfinished. {_HOW_TO_CONVERT}")

    def unsupported(what: str) -> BetonError:
        return BetonError(f"{path}: {what}. {_HOW_TO_CONVERT}")

    if file_bytes < _METADATA_OFFSET:
        raise damaged(f"{file_bytes} bytes are too few for a .beton file")
    header = np.frombuffer(file.read(_HEADER.itemsize), _HEADER)[0]
    if header["version"] != _BETON_VERSION:
        raise unsupported(f"not a .beton file of version {_BETON_VERSION} (its first number is {header['version']})")
    if header["num_fields"] != 2:
        raise unsupported(f"expected the 2 fields 'image' and 'label', found {header['num_fields']} fields")
    descriptors = np.frombuffer(file.read(2 * _DESCRIPTOR.itemsize), _DESCRIPTOR)
    types, names = tuple(descriptors["type_id"].tolist()), tuple(descriptors["name"].tolist())
    if types != (_IMAGE_FIELD, _INT_FIELD) or names != _FIELD_NAMES:
        raise unsupported(
            f"expected RGBImageField 'image' (type {_IMAGE_FIELD}) and IntField 'label' (type {_INT_FIELD}), "
            f"found names {names} of types {types}"
        )
    content_sha256 = _unpack_digest(descriptors["arguments"][0].tobytes())
    if content_sha256 == "" or any(descriptors["arguments"][1].tobytes()):
        raise damaged("the arguments of its fields are neither empty nor a content checksum")

    page_size, n, table = int(header["page_size"]), int(header["num_samples"]), int(header["table_offset"])
    if not _SMALLEST_PAGE <= page_size <= _LARGEST_PAGE or page_size & (page_size - 1):
        raise damaged(f"page size {page_size} is not a power of 2 from {_SMALLEST_PAGE} to {_LARGEST_PAGE}")
    if n < 1:
        raise damaged("it says that it has no images")
    metadata_end = _METADATA_OFFSET + n * _METADATA.itemsize
    if metadata_end > file_bytes:
        raise damaged(f"{file_bytes} bytes cannot hold the metadata of {n} images")
    if table < metadata_end or table + n * _ALLOCATION.itemsize != file_bytes:
        raise damaged(
            f"the allocation table of {n} images should be its last {n * _ALLOCATION.itemsize} bytes, "
            f"but starts at byte {table} of {file_bytes}"
        )
    metadata = np.frombuffer(file.read(n * _METADATA.itemsize), _METADATA)
    file.seek(table)
    allocations = np.frombuffer(file.read(n * _ALLOCATION.itemsize), _ALLOCATION)

    modes = np.unique(metadata["mode"]).tolist()
    if len(modes) != 1 or modes[0] not in _MODES:
        raise unsupported(f"expected one encoding for all images, 0 (JPEG) or 1 (raw), found {modes}")
    encoding = _MODES[modes[0]]
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
    first_page = _round_up(metadata_end, page_size)
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
        "class_counts": _class_counts(path, layout.labels, facts.num_classes),
    }
    if layout.content_sha256 is not None:
        found["content_sha256"] = layout.content_sha256
    for name, value in found.items():
        if getattr(facts, name) != value:
            raise BetonError(
                f"{path}: {name} is {value}, but its sidecar {sidecar_path(path).name} says {getattr(facts, name)}. "
                f"The two do not belong together. {_HOW_TO_CONVERT}"
            )


def _class_counts(path: PathLike, labels: NDArray[np.int64], num_classes: int) -> tuple[int, ...]:
    if labels.max() >= num_classes:
        raise BetonError(f"{path}: label {labels.max()} is out of range for {num_classes} classes")
    return tuple(np.bincount(labels[labels >= 0], minlength=num_classes).tolist())


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
            f"The file has changed since it was written. {_HOW_TO_CONVERT}"
        )
    return facts


# ---------------------------------------------------------------------------------------------------------------
# Reading


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


Samples = NDArray[np.uint8] | list[bytes]  # raw: (m, h * w * 3); jpeg: m streams


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


# ---------------------------------------------------------------------------------------------------------------
# Writing


class Writer:
    """Writes one .beton file and its sidecar, image by image, in index order and in constant memory.

    The same images and labels give the same bytes. Everything goes to ``FILE.beton.partial`` in the same folder;
    ``finish`` completes it, reads it back and compares; ``commit`` gives it its name. Until ``commit`` an
    existing file stays as it is, and leaving the ``with`` block without ``commit`` removes the partial file::

        with Writer("train.beton", num_images=50_000, height=32, width=32) as writer:
            for images, labels in chunks:
                writer.add(images, labels)
            facts = writer.finish(source="CIFAR-10", split="train", classes=names)
            writer.commit()
    """

    def __init__(self, path: PathLike, *, num_images: int, height: int, width: int, encoding: Encoding = "raw") -> None:
        """Open the partial file.

        Args:
            path: The .beton file to be.
            num_images: How many images will be added, at least 1.
            height: Height of every image, 1 to 65535 pixels.
            width: Width of every image, 1 to 65535 pixels.
            encoding: "raw", filled with ``add``, or "jpeg", filled with ``add_jpeg``.

        Raises:
            BetonError: If an argument is out of range, the folder cannot be written to, the disk has too little
                space, or another process is writing the same file.
        """
        if num_images < 1 or not (1 <= height <= 65535 and 1 <= width <= 65535):
            raise BetonError(f"cannot store {num_images} images of {height} x {width}; sizes are 1 to 65535")
        if encoding not in _MODES.values():
            raise BetonError(f"encoding must be 'raw' or 'jpeg', got {encoding!r}")
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._encoding: Encoding = encoding
        self._shape = (height, width, 3)
        self._num_images = num_images
        self._num_added = 0
        self._facts: Facts | None = None
        self._committed = False
        self._page_size = _page_size_for(height * width * 3)
        self._page = np.zeros(self._page_size, np.uint8)
        self._page_used = 0
        self._metadata = np.zeros(num_images, _METADATA)
        self._metadata["mode"] = next(mode for mode, name in _MODES.items() if name == encoding)
        self._metadata["height"], self._metadata["width"] = height, width
        self._sizes = np.zeros(num_images, np.int64)
        self._next_page = _round_up(_METADATA_OFFSET + self._metadata.nbytes, self._page_size)
        self._digest = _content_digest(encoding, num_images, height, width)
        with _disk_errors(self.path):
            if encoding == "raw":  # the size of JPEG streams is not known yet
                self._check_free_space()
            self._file = _open_exclusively(self._partial)
            self._file.truncate(0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if sys.platform == "win32":
            self._file.close()
        # Neither may hide the error that led here, such as a full disk.
        if not self._committed:  # removed while the lock is held: the next partial file may be another process's
            with suppress(OSError):
                self._partial.unlink()
        with suppress(OSError):
            self._file.close()

    def add(self, images: NDArray[np.uint8], labels: ArrayLike) -> None:
        """Append raw images.

        Args:
            images: uint8 (m, h, w, 3), RGB.
            labels: Integers (m,); -1 for an image without a label.

        Raises:
            BetonError: If shapes or types differ from what was announced, or writing fails.
        """
        if self._encoding != "raw":
            raise BetonError(f"{self.path} holds JPEG streams; use add_jpeg")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self._shape:
            raise BetonError(f"expected uint8 images of shape (m, *{self._shape}), got {images.dtype} {images.shape}")
        self._append(list(images.reshape(len(images), math.prod(self._shape))), labels)

    def add_jpeg(self, streams: Sequence[bytes], labels: ArrayLike) -> None:
        """Append JPEG streams.

        Args:
            streams: m complete JPEG files in memory, RGB, of the size that was announced.
            labels: Integers (m,); -1 for an image without a label.

        Raises:
            BetonError: If the file was opened for raw images, a stream is empty or too large, or writing fails.
        """
        if self._encoding != "jpeg":
            raise BetonError(f"{self.path} holds raw images; use add")
        self._append([np.frombuffer(stream, np.uint8) for stream in streams], labels)

    def _append(self, samples: list[NDArray[np.uint8]], labels: ArrayLike) -> None:
        start, stop = self._num_added, self._num_added + len(samples)
        if stop > self._num_images:
            raise BetonError(f"{self.path}: {stop} images added, but {self._num_images} were announced")
        if self._facts is not None:
            raise BetonError(f"{self.path} is finished; nothing can be added")
        self._metadata["label"][start:stop] = _checked_labels(labels, len(samples))
        for i, sample in enumerate(samples, start):
            size = len(sample)
            if not 1 <= size <= self._page_size:
                raise BetonError(f"{self.path}: image {i} has {size} bytes; 1 to {self._page_size} are possible")
            if self._page_used + size > self._page_size:
                self._write_page()
            _digest_sample(self._digest, sample, self._encoding)
            self._page[self._page_used : self._page_used + size] = sample
            self._metadata["offset"][i] = self._next_page + self._page_used
            self._sizes[i] = size
            self._page_used += size
        self._num_added = stop

    def _write_page(self) -> None:
        self._page[self._page_used :] = 0
        with _disk_errors(self.path):
            self._file.seek(self._next_page)
            self._file.write(self._page.data)
        self._next_page += self._page_size
        self._page_used = 0

    def finish(self, **about: Unpack[About]) -> Facts:
        """Complete the partial file, read it back and compare it with what was added.

        Returns:
            The facts that ``commit`` will store.

        Raises:
            BetonError: If images are missing, a label is out of range, the disk is full, or the file on disk is
                not what was added.
        """
        if self._num_added != self._num_images:
            raise BetonError(f"{self.path}: {self._num_images} images were announced, {self._num_added} added")
        labels = self._metadata["label"]
        _class_counts(self.path, labels, len(about["classes"]))
        self._digest.update(labels.astype("<i8").tobytes())
        content_sha256 = self._digest.hexdigest()

        self._write_page()
        header = np.zeros(1, _HEADER)
        header["version"], header["num_fields"] = _BETON_VERSION, 2
        header["page_size"], header["num_samples"] = self._page_size, self._num_images
        header["table_offset"] = self._next_page
        descriptors = np.zeros(2, _DESCRIPTOR)
        descriptors["type_id"], descriptors["name"] = (_IMAGE_FIELD, _INT_FIELD), _FIELD_NAMES
        descriptors["arguments"][0] = _DIGEST_TAG + content_sha256.encode()
        allocations = np.zeros(self._num_images, _ALLOCATION)
        allocations["index"] = np.arange(self._num_images)
        allocations["offset"], allocations["size"] = self._metadata["offset"], self._sizes
        with _disk_errors(self.path):
            self._file.seek(self._next_page)
            self._file.write(allocations.tobytes())
            self._file.seek(0)
            self._file.write(header.tobytes() + descriptors.tobytes() + self._metadata.tobytes())
            files.sync(self._file)
            if hasattr(os, "posix_fadvise"):  # read back from the disk, not from memory
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._facts = describe(self._partial, **about)
        if self._facts.content_sha256 != content_sha256:
            raise BetonError(f"{self._partial}: what was read back is not what was written; is the disk healthy?")
        return self._facts

    def commit(self) -> None:
        """Give the finished file its name and store its facts, in place of any earlier ones.

        Both lie on the disk, whole, before anything earlier goes. The old sidecar goes first: a crash at any moment
        leaves a complete file, old or new, and either its own sidecar or none.

        Raises:
            BetonError: If ``finish`` has not been called, or a file cannot be written or replaced.
        """
        if self._facts is None:
            raise BetonError(f"{self.path}: commit before finish")
        sidecar = sidecar_path(self.path)
        with _disk_errors(self.path), files.atomic_write(sidecar) as file:
            file.write(_facts_as_json(self.path, self._facts))
            files.sync(file)
            sidecar.unlink(missing_ok=True)
            files.sync_folder(self.path.parent)
            if sys.platform == "win32":
                self._file.close()
            self._partial.replace(self.path)
            self._committed = True

    def _check_free_space(self) -> None:
        height, width, _ = self._shape
        pages = -(-self._num_images // (self._page_size // (height * width * 3)))
        needed = self._next_page + pages * self._page_size + self._num_images * _ALLOCATION.itemsize
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise BetonError(
                f"{self.path} needs {needed / 1e6:.1f} MB, but {self.path.parent} has only {free / 1e6:.1f} MB free. "
                "Free some space or write it elsewhere"
            )


def write(
    path: PathLike,
    images: NDArray[np.uint8],
    labels: ArrayLike,
    *,
    encoding: Encoding = "raw",
    jpeg_quality: int = 90,
    source: str = "arrays in memory",
    split: str = "train",
    classes: Sequence[str] | None = None,
    lossy_source: bool = False,
) -> Facts:
    """Write images that are in memory, and their sidecar; an existing file is replaced once that is complete.

    Args:
        path: The .beton file.
        images: uint8 (n, h, w, 3), RGB.
        labels: Integers (n,); -1 for an image without a label.
        encoding: "raw" or "jpeg".
        jpeg_quality: 1 to 100; for "jpeg" only.
        source: As in ``About``, like the rest.
        split: "train", "test", ...
        classes: Names in label order. By default "0", "1", ... up to the largest label.
        lossy_source: Whether the images had gone through lossy compression before.

    Returns:
        The facts as stored.

    Raises:
        BetonError: As ``Writer``.
    """
    if images.ndim != 4:
        raise BetonError(f"expected images of shape (n, h, w, 3), got {images.shape}")
    n, height, width, _ = images.shape
    if classes is None:
        classes = [str(label) for label in range(int(_checked_labels(labels, n).max(initial=-1)) + 1)]
    about = About(source=source, split=split, classes=classes, lossy_source=lossy_source)
    with Writer(path, num_images=n, height=height, width=width, encoding=encoding) as writer:
        if encoding == "raw":
            writer.add(images, labels)
        else:
            writer.add_jpeg([encode_jpeg(image, jpeg_quality) for image in images], labels)
            about["jpeg_quality"] = jpeg_quality
        facts = writer.finish(**about)
        writer.commit()
    return facts


def encode_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """Compress one image.

    Args:
        image: uint8 (h, w, 3), RGB.
        quality: 1 to 100, as libjpeg counts it.

    Returns:
        A baseline JPEG file with 4:2:0 chroma subsampling; the same bytes each time with one Pillow version.

    Raises:
        BetonError: If the quality is out of range or the array is no RGB image.
    """
    from PIL import Image  # raw files need no Pillow

    if not 1 <= quality <= 100:
        raise BetonError(f"jpeg_quality must be 1 to 100, got {quality}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise BetonError(f"expected a uint8 image of shape (h, w, 3), got {image.dtype} {image.shape}")
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Facts


class About(TypedDict, total=False):
    """What only the one who has the images can say about them.

    Attributes:
        source: Where the images came from and what was done to them.
        split: "train", "test", ...
        classes: Names in label order; empty if no image has a label.
        lossy_source: Whether the images had gone through lossy compression before; False if not given.
        jpeg_quality: Quality with which the stored JPEG streams were made; None if raw or unknown.
        written_by: Versions of the software in charge; numpy's is added.
    """

    source: Required[str]
    split: Required[str]
    classes: Required[Sequence[str]]
    lossy_source: bool
    jpeg_quality: int | None
    written_by: dict[str, str]


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
    digest = _content_digest(layout.encoding, layout.num_images, layout.height, layout.width)
    total, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)  # exact: integers do not round
    start = 0
    for samples in _chunks(path, layout):
        pixels = np.empty((len(samples), *shape), np.uint8)
        _decode(path, layout, samples, start, out=pixels)
        for sample in samples:
            _digest_sample(digest, sample, layout.encoding)
        flat = pixels.reshape(len(pixels), math.prod(shape))
        total += flat.sum(axis=0, dtype=np.int64).reshape(-1, 3).sum(axis=0)
        squares += np.square(flat, dtype=np.uint16).sum(axis=0, dtype=np.int64).reshape(-1, 3).sum(axis=0)
        start += len(samples)
    digest.update(layout.labels.astype("<i8").tobytes())
    content_sha256 = digest.hexdigest()
    if layout.content_sha256 not in (None, content_sha256):
        raise BetonError(
            f"{path}: its content has sha256 {content_sha256}, but it was written with {layout.content_sha256}. "
            f"The file is damaged. {_HOW_TO_CONVERT}"
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
        class_counts=_class_counts(path, layout.labels, len(about["classes"])),
        channel_mean=(mean[0] / 255, mean[1] / 255, mean[2] / 255),
        channel_std=(std[0] / 255, std[1] / 255, std[2] / 255),
        content_sha256=content_sha256,
        file_bytes=Path(path).stat().st_size,
        file_sha256=file_sha256(path),
        written_by={**about.get("written_by", {}), "numpy": np.__version__},
    )


def save_facts(path: PathLike, facts: Facts) -> None:
    """Store the facts about ``path`` beside it, in one step.

    Raises:
        BetonError: If ``facts`` do not belong to the file, or the sidecar cannot be written.
    """
    check(path, facts)
    sidecar = sidecar_path(path)
    with _disk_errors(sidecar), files.atomic_write(sidecar) as file:
        file.write(_facts_as_json(path, facts))


def _facts_as_json(path: PathLike, facts: Facts) -> bytes:
    text = json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BetonError(
            f"{sidecar_path(path)}: {text[error.start - 20 : error.end + 20]!r} is not text that UTF-8 can hold, such "
            "as the name of a folder in another encoding. Give the classes, source and split other names"
        ) from error


def load_facts(path: PathLike) -> Facts:
    """Read the sidecar of a .beton file.

    Args:
        path: The .beton file (not the sidecar).

    Returns:
        Its facts. That they belong to the file is for ``check`` or ``verify`` to say.

    Raises:
        BetonError: If ``path`` is a folder, or the sidecar is missing, of another version, has unknown, missing or
            ill-typed entries, or contradicts itself.
    """
    if Path(path).is_dir():
        held = ", ".join(str(file) for file in sorted(Path(path).glob("*.beton")))
        raise BetonError(f"{path} is a folder. " + (f"Name a .beton file in it: {held}" if held else _HOW_TO_CONVERT))
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise BetonError(
            f"{sidecar}: no such file; it holds the facts about {Path(path).name}. {_HOW_TO_CONVERT}. "
            f"For a .beton file that FFCV's own DatasetWriter made: python -m data_prep sidecar {path} --help"
        )
    try:
        entries = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BetonError(f"{sidecar}: not a readable sidecar: {error}. {_HOW_TO_CONVERT}") from error
    try:
        return _facts_from(entries)
    except ValueError as error:
        raise BetonError(f"{sidecar}: {error}. {_HOW_TO_CONVERT}") from error


def _facts_from(entries: Any) -> Facts:
    if isinstance(entries, dict):
        version = entries.get("format_version")
        require(version == SIDECAR_VERSION, "format_version", version, f"{SIDECAR_VERSION}, which this code reads")
    facts = from_values(Facts, entries)
    if len(facts.class_counts) != facts.num_classes or sum(facts.class_counts) > facts.num_images:
        raise ValueError(f"class_counts {facts.class_counts} do not fit {facts.num_classes} classes")
    return facts


# ---------------------------------------------------------------------------------------------------------------
# Small parts

_HOW_TO_CONVERT = "To make the file and its sidecar, see: python -m data_prep --help (add --force to replace them)"


def _unpack_digest(arguments: bytes) -> str | None:
    """Return the checksum in a field's arguments; None if they are empty, "" if they are something else."""
    text = arguments.rstrip(b"\0")
    if not text:
        return None
    digest = text.removeprefix(_DIGEST_TAG).decode("ascii", "replace")
    return digest if text.startswith(_DIGEST_TAG) and re.fullmatch("[0-9a-f]{64}", digest) else ""


def _content_digest(encoding: str, num_images: int, height: int, width: int) -> hashlib._Hash:
    return hashlib.sha256(f"{encoding} {num_images} {height} {width}\n".encode())


def _digest_sample(digest: hashlib._Hash, sample: bytes | NDArray[np.uint8], encoding: Encoding) -> None:
    if encoding == "jpeg":  # so that no byte can move from one stream to the next
        digest.update(len(sample).to_bytes(8, "little"))
    digest.update(sample if isinstance(sample, bytes) else sample.data)


def file_sha256(path: PathLike) -> str:
    """Return the checksum of a whole file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _page_size_for(pixels: int) -> int:
    """Return a page of at least 8 images, so that at most an eighth of it stays empty, within FFCV's limits."""
    size = _SMALLEST_PAGE
    while size < 8 * pixels and size < _LARGEST_PAGE:
        size *= 2
    return size


def _checked_labels(labels: ArrayLike, num_images: int) -> NDArray[np.int64]:
    array = np.asarray(labels)
    if array.shape != (num_images,) or (num_images and array.dtype.kind not in "iu"):
        raise BetonError(f"expected {num_images} whole numbers as labels, got {array.dtype} {array.shape}")
    if num_images and int(array.min()) < -1:
        raise BetonError(f"labels must be -1 (no label) or above, got {array.min()}")
    return array.astype(np.int64)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Raise BetonError in place of the operating system's refusals to write ``path``."""
    try:
        yield
    except OSError as error:
        raise BetonError(files.explain_write_error(error, path)) from error


def _open_exclusively(partial: Path) -> IO[bytes]:
    """Open a partial file for writing and lock it, so that two processes never fill the same one."""
    file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
    try:
        # Without locks (Windows) an open file cannot be replaced, which serves the same purpose.
        if files.lock(file) and not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            raise BlockingIOError(errno.EWOULDBLOCK, "finished by another process in this moment")
    except OSError:
        file.close()
        raise
    return file
