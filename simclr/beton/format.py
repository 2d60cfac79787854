"""What lies where in a .beton file: records, numbers and checksums that reading and writing share."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Encoding = Literal["raw", "jpeg"]
VERSION = 2
IMAGE_FIELD, INT_FIELD = 2, 1
FIELD_NAMES = (b"image", b"label")
MODES: dict[int, Encoding] = {0: "jpeg", 1: "raw"}
SMALLEST_PAGE, LARGEST_PAGE = 1 << 21, 1 << 31  # FFCV's own writer accepts powers of two in this range
# Offsets are spelled out because FFCV aligns these records as a C compiler on x86-64 would.
HEADER = np.dtype(
    {
        "names": ["version", "num_fields", "page_size", "num_samples", "table_offset"],
        "formats": ["<u2", "<u2", "<u4", "<u8", "<u8"],
        "offsets": [0, 2, 4, 8, 16],
        "itemsize": 24,
    }
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
METADATA = np.dtype(
    {
        "names": ["mode", "width", "height", "offset", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("index", "<u8"), ("offset", "<u8"), ("size", "<u8")])
METADATA_OFFSET = HEADER.itemsize + 2 * DESCRIPTOR.itemsize


def new_digest(encoding: str, num_images: int, height: int, width: int) -> hashlib._Hash:
    """Begin a checksum of a file's tables, or of its content: ``digest_sample`` for each sample, then the labels."""
    return hashlib.sha256(f"{encoding} {num_images} {height} {width}\n".encode())


def digest_sample(digest: hashlib._Hash, sample: bytes | NDArray[np.uint8], encoding: Encoding) -> None:
    """Take the next sample, pixels or a JPEG stream, into a ``new_digest``."""
    if encoding == "jpeg":  # so that no byte can move from one stream to the next
        digest.update(len(sample).to_bytes(8, "little"))
    digest.update(sample if isinstance(sample, bytes) else sample.data)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def page_size_for(pixels: int) -> int:
    """Return a page of at least 8 images, so that at most an eighth of it stays empty, within FFCV's limits."""
    size = SMALLEST_PAGE
    while size < 8 * pixels and size < LARGEST_PAGE:
        size *= 2
    return size
