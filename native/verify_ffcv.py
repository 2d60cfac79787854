"""Shows that the installed FFCV works, by `python native/verify_ffcv.py [--jpeg]`.

Writes small .beton files with FFCV, reads them with FFCV's own Loader, and compares the results with the
images that went in, and FFCV's resize with OpenCV's. Prints what it found as one JSON line; a failure is a
traceback and a non-zero exit status. Runs apart from its caller, because a broken native library can end or
block its whole process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import cv2
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.libffcv import resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter
from numpy.typing import NDArray

NUM_IMAGES, HEIGHT, WIDTH = 24, 40, 32
JPEG_QUALITY = 90
# FFCV asks libjpeg-turbo for its fast transform and OpenCV for its exact one; they differ by a few levels.
JPEG_TOLERANCE = 3.0


class Images:
    """A data set as FFCV's writer takes it: it has a length, and items that are tuples."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (NUM_IMAGES, 5, 4, 3), dtype=np.uint8)
        # Smooth, as photographs are: JPEG reproduces noise badly with any decoder.
        self.images = np.stack([cv2.resize(image, (WIDTH, HEIGHT)) for image in coarse])

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], index


def round_trip(folder: Path, mode: str) -> NDArray[np.uint8]:
    """Write the images with FFCV and return what FFCV's Loader reads."""
    path = folder / f"{mode}.beton"
    fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=JPEG_QUALITY), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Images())
    loader = Loader(
        str(path),
        batch_size=NUM_IMAGES // 2,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    # Copied batch by batch: FFCV writes later batches into the same memory.
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    labels = np.concatenate([labels for _, labels in batches]).ravel()
    if not np.array_equal(labels, np.arange(NUM_IMAGES)):
        raise SystemExit(f"FFCV returned labels {labels.tolist()} instead of 0..{NUM_IMAGES - 1}")
    return np.concatenate([images for images, _ in batches])


def through_jpeg(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the images as OpenCV's JPEG decoder gives them back, as floats to subtract from."""
    decoded = []
    for image in images:
        # OpenCV's order is blue, green, red.
        _, code = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        back = cv2.imdecode(code, cv2.IMREAD_COLOR)
        assert back is not None
        decoded.append(back[..., ::-1])
    return np.stack(decoded).astype(np.float64)


def resize_difference(num_crops: int) -> int:
    """Return the largest difference between FFCV's and OpenCV's INTER_AREA over random crops, of 255 levels."""
    generator = np.random.default_rng(1)
    largest = 0
    for crop in range(num_crops):
        height, width = generator.integers(1, 130, 2)
        source = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        top, left = generator.integers(0, height), generator.integers(0, width)
        bottom, right = generator.integers(top + 1, height + 1), generator.integers(left + 1, width + 1)
        if crop % 3 == 0:  # shrink by whole numbers, which OpenCV treats apart
            rows, columns = (bottom - top + 1) // 2, max(1, (right - left) // 3)
            bottom, right = min(height, top + 2 * rows), min(width, left + 3 * columns)
        else:
            rows, columns = generator.integers(1, 100, 2)
        target = np.empty((rows, columns, 3), np.uint8)
        resize_crop(source, top, bottom, left, right, target)
        size = (int(columns), int(rows))
        expected = cv2.resize(source[top:bottom, left:right], size, interpolation=cv2.INTER_AREA)
        largest = max(largest, int(np.abs(target.astype(np.int16) - expected).max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description="Show that the installed FFCV works.")
    parser.add_argument("--jpeg", action="store_true", help="decode JPEG images too")
    parser.add_argument("--crops", type=int, default=2000, help="random crops for the resize comparison")
    arguments = parser.parse_args()

    images = Images().images
    found: dict[str, object] = {"opencv_compared": cv2.__version__}
    with tempfile.TemporaryDirectory(prefix="ffcv-") as folder:
        if not np.array_equal(round_trip(Path(folder), "raw"), images):
            raise SystemExit("FFCV changed raw images between writing and reading")
        if arguments.jpeg:
            difference = np.abs(round_trip(Path(folder), "jpg") - through_jpeg(images)).mean()
            if difference > JPEG_TOLERANCE:
                raise SystemExit(f"FFCV's JPEG images differ from OpenCV's by {difference:.1f} levels on average")
            found["jpeg_mean_difference"] = round(float(difference), 3)
    found["resize_max_difference"] = largest = resize_difference(arguments.crops)
    if largest > 1:
        raise SystemExit(f"FFCV's resize differs from OpenCV's by {largest} levels")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
