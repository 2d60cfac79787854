"""FFCV's own writer and loader, in a process of their own: importing ffcv changes torch's thread count.

python -m tests.ffcv_reference COMMAND ... runs any number of these, in order:
    write:IMAGES.npz:OUT.beton:{raw|jpg}:NUM_WORKERS
    read:FILE.beton:OUT.npz
    read-jpeg:FILE.beton:OUT.npz    as read, but does nothing if this ffcv was built without libjpeg-turbo
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


class Arrays:
    """Images and labels as an indexable data set."""

    def __init__(self, path: str) -> None:
        with np.load(path) as arrays:
            self.images, self.labels = arrays["images"], arrays["labels"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], int(self.labels[index])


def write(arrays: str, path: str, mode: str, num_workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    writer = DatasetWriter(path, fields, page_size=1 << 21, num_workers=num_workers)
    writer.from_indexed_dataset(Arrays(arrays), chunksize=20)


def read(path: str, arrays: str) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        path,
        batch_size=64,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    # FFCV overwrites a batch once the next one is taken, hence the copies.
    batches = [(image.copy(), label.copy()) for image, label in loader]
    images, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    np.savez(arrays, images=images, labels=labels[:, 0])


def can_decode_jpeg() -> bool:
    # Asked of the library's symbols: FFCV itself ends the process, or fills the image with whatever there was.
    from simclr.data import ffcv_source

    return bool(ffcv_source.load_ffcv().decodes_jpeg())


if __name__ == "__main__":
    for line in sys.argv[1:]:
        command, *arguments = line.split(":")
        if command == "write":
            write(arguments[0], arguments[1], arguments[2], int(arguments[3]))
        elif command == "read" or can_decode_jpeg():
            read(arguments[0], arguments[1])
