"""Writes .beton files and their sidecars, whole or not at all."""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simclr import files
from simclr.beton.facts import About, BetonError, Facts, count_classes, facts_as_json, sidecar_path
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
    page_size_for,
    round_up,
)
from simclr.beton.reading import describe
from simclr.files import PathLike


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
        if encoding not in MODES.values():
            raise BetonError(f"encoding must be 'raw' or 'jpeg', got {encoding!r}")
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._encoding: Encoding = encoding
        self._shape = (height, width, 3)
        self._num_images = num_images
        self._num_added = 0
        self._facts: Facts | None = None
        self._committed = False
        self._page_size = page_size_for(height * width * 3)
        self._page = np.zeros(self._page_size, np.uint8)
        self._page_used = 0
        self._metadata = np.zeros(num_images, METADATA)
        self._metadata["mode"] = next(mode for mode, name in MODES.items() if name == encoding)
        self._metadata["height"], self._metadata["width"] = height, width
        self._sizes = np.zeros(num_images, np.int64)
        self._next_page = round_up(METADATA_OFFSET + self._metadata.nbytes, self._page_size)
        self._digest = new_digest(encoding, num_images, height, width)
        with _disk_errors(self.path):
            if encoding == "raw":  # the size of JPEG streams is not known yet
                self._check_free_space()
            self._file = _open_exclusively(self._partial)
            self._file.truncate(0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        if sys.platform == "win32":
            self._file.close()
        # Neither may hide the error that led here, such as a full disk.
        if not self._committed:  # removed while the lock is held: the next partial file may be another process's
            with suppress(OSError):
                self._partial.unlink()
        with suppress(OSError):
            self._file.close()

    def add(self, images: NDArray[np.uint8], labels: ArrayLike) -> None:
        """Append raw images, uint8 (m, h, w, 3) RGB, and their labels, integers (m,); -1 for an image without a label.

        Raises BetonError if shapes or types differ from what was announced, or writing fails.
        """
        if self._encoding != "raw":
            raise BetonError(f"{self.path} holds JPEG streams; use add_jpeg")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self._shape:
            raise BetonError(f"expected uint8 images of shape (m, *{self._shape}), got {images.dtype} {images.shape}")
        self._append(list(images.reshape(len(images), math.prod(self._shape))), labels)

    def add_jpeg(self, streams: Sequence[bytes], labels: ArrayLike) -> None:
        """Append JPEG files in memory, RGB, of the size that was announced, and their labels as in ``add``.

        Raises BetonError if the file was opened for raw images, a stream is empty or too large, or writing fails.
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
            digest_sample(self._digest, sample, self._encoding)
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
        count_classes(self.path, labels, len(about["classes"]))
        self._digest.update(labels.astype("<i8").tobytes())
        content_sha256 = self._digest.hexdigest()

        self._write_page()
        header = np.zeros(1, HEADER)
        header["version"], header["num_fields"] = VERSION, 2
        header["page_size"], header["num_samples"] = self._page_size, self._num_images
        header["table_offset"] = self._next_page
        descriptors = np.zeros(2, DESCRIPTOR)
        descriptors["type_id"], descriptors["name"] = (IMAGE_FIELD, INT_FIELD), FIELD_NAMES
        # FFCV ignores it. It makes the tables differ, and so their checksum, where two files differ in pixels only.
        descriptors["arguments"][0] = f"content-sha256:{content_sha256}".encode()
        allocations = np.zeros(self._num_images, ALLOCATION)
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
            file.write(facts_as_json(self.path, self._facts))
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
        needed = self._next_page + pages * self._page_size + self._num_images * ALLOCATION.itemsize
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
    """Write images uint8 (n, h, w, 3) RGB with labels (n,), -1 for none, and their sidecar, as :class:`Writer` does.

    By default the classes are called "0", "1", ... up to the largest label. The other arguments are those of ``About``.
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
    """Return a uint8 (h, w, 3) RGB image as a baseline JPEG file with 4:2:0 chroma subsampling.

    The same bytes each time with one Pillow version. Raises BetonError if the quality is not 1 to 100, or the array is
    no RGB image.
    """
    from PIL import Image  # raw files need no Pillow

    if not 1 <= quality <= 100:
        raise BetonError(f"jpeg_quality must be 1 to 100, got {quality}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise BetonError(f"expected a uint8 image of shape (h, w, 3), got {image.dtype} {image.shape}")
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return stream.getvalue()


def save_facts(path: PathLike, facts: Facts) -> None:
    """Store the facts about ``path`` beside it, in one step. Raises BetonError if they cannot be written."""
    sidecar = sidecar_path(path)
    with _disk_errors(sidecar), files.atomic_write(sidecar) as file:
        file.write(facts_as_json(path, facts))


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
        if files.lock(file) and not files.is_at(partial, file):
            raise BlockingIOError(errno.EWOULDBLOCK, "finished by another process in this moment")
    except OSError:
        file.close()
        raise
    return file
