"""CIFAR-10, CIFAR-100 and STL-10 through torchvision, which knows their files and checks them by md5.

CIFAR's batches are pickle, which executes what it reads: torchvision compares all of them, and the archive, with the
published md5 before it reads any. Archives are unpacked here, since torchvision does so without a filter.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url

from data_prep.convert import Chunk, ConversionError, Source
from data_prep.read_image import resize_and_crop
from simclr.system import usable_cores

_FILTER: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # without it, newer Pythons warn
_CHUNK = 1024


def cifar(name: Literal["CIFAR-10", "CIFAR-100"], root: Path, split: str, download: bool) -> Source:
    """Return a split of CIFAR-10 or CIFAR-100, in the order of the official Python batches.

    Args:
        name: Which of the two.
        root: Folder of the downloaded files.
        split: "train" or "test".
        download: Whether missing files may be downloaded.

    Raises:
        ConversionError: If the files are missing or damaged and could not be downloaded.
    """
    kind = datasets.CIFAR10 if name == "CIFAR-10" else datasets.CIFAR100
    data = _load(kind, name, root, download, train=split == "train")
    return _source(f"{name} (official Python version)", split, data.classes, data.data, np.array(data.targets))


def stl10(root: Path, split: str, download: bool, resolution: int | None) -> Source:
    """Return a split of STL-10, 96 x 96 pixels; images without a label get -1.

    Args:
        root: Folder of the downloaded files.
        split: "train", "test", "unlabeled" or "train+unlabeled".
        download: Whether missing files may be downloaded.
        resolution: Resize to this many pixels (bicubic, antialiased); None for 96.

    Raises:
        ConversionError: If the files are missing or damaged and could not be downloaded.
    """
    data = _load(datasets.STL10, "STL-10", root, download, split=split)
    description = "STL-10 (official binary version)"
    if resolution not in (None, 96):
        description += f", resized to {resolution} (antialiased bicubic)"
    classes = () if split == "unlabeled" else data.classes
    return _source(description, split, classes, data.data.transpose(0, 2, 3, 1), data.labels, resolution)


def _source(
    description: str,
    split: str,
    classes: list[str] | tuple[()],
    images: NDArray[np.uint8],
    labels: NDArray[Any],
    resolution: int | None = None,
) -> Source:
    def resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        assert resolution is not None
        return np.asarray(resize_and_crop(Image.fromarray(np.ascontiguousarray(image)), resolution))

    def chunks() -> Iterator[Chunk]:
        with ThreadPoolExecutor(usable_cores()) as pool:
            for start in range(0, len(images), _CHUNK):
                chunk = images[start : start + _CHUNK]
                if resolution is not None:
                    chunk = np.stack(list(pool.map(resize, chunk)))
                yield np.ascontiguousarray(chunk), labels[start : start + _CHUNK].astype(np.int64)

    return Source(description, split, classes, len(images), chunks)


def _extract(tar: tarfile.TarFile, root: Path) -> None:
    """Unpack files and folders, and nothing outside of ``root``; Pythons before 3.11.4 have no filter for that."""
    for member in tar.getmembers():
        if not (member.isfile() or member.isdir()) or not (root / member.name).resolve().is_relative_to(root.resolve()):
            raise tarfile.TarError(f"{member.name!r} in it is a link or lies outside of the folder")
    tar.extractall(root, **_FILTER)


def _load(kind: Any, name: str, root: Path, download: bool, **which: object) -> Any:
    archive = root / kind.filename
    try:
        try:
            return kind(root, **which)
        except RuntimeError:  # files are missing, or are not the published ones
            if download:
                download_url(kind.url, str(root), kind.filename, kind.tgz_md5)
            if not check_integrity(archive, kind.tgz_md5):
                raise
            with tarfile.open(archive) as tar:
                _extract(tar, root)
            return kind(root, **which)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        what = "could not be downloaded" if download else "are missing or damaged (and --no-download was given)"
        raise ConversionError(
            f"the files of {name} {what}: {error}. Get {kind.url} on any machine and put it at {archive} "
            f"(md5 {kind.tgz_md5}), then run this again"
        ) from error
