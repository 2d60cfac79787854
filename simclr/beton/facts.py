"""The sidecar of a .beton file: what the format has no room for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Required, TypedDict

import numpy as np
from numpy.typing import NDArray

from simclr.beton.format import Encoding
from simclr.files import PathLike
from simclr.schema import Count, Must, Share, Size, from_values

HOW_TO_CONVERT = "To make the file and its sidecar, see: python -m data_prep --help (add --force to replace them)"
Quality = Annotated[int, Must(lambda value: 1 <= value <= 100, "1 to 100")]
Sha256 = Annotated[str, Must(re.compile("[0-9a-f]{64}").fullmatch, "64 hexadecimal digits")]


class BetonError(ValueError):
    """A .beton file or its sidecar is missing, damaged, stale, or cannot be written."""


@dataclass(frozen=True)
class Facts:
    """What is known about one .beton file; stored beside it as ``FILE.beton.json``.

    Attributes:
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
        tables_sha256: Of all that lies before the first page and behind the last.
        file_bytes: Size of the .beton file.
        written_by: Versions of the software that wrote it.
    """

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
    channel_mean: tuple[Share, Share, Share]
    channel_std: tuple[Share, Share, Share]
    content_sha256: Sha256
    tables_sha256: Sha256
    file_bytes: Size
    written_by: dict[str, str]

    @property
    def identity(self) -> dict[str, object]:
        """What makes two files the same to a run: pixels and labels, how they are normalised, what labels mean."""
        return {name: getattr(self, name) for name in ("content_sha256", "channel_mean", "channel_std", "classes")}

    def differences(self, other: Facts) -> str:
        """Return in words which entries of :attr:`identity` differ; empty if none does."""
        return ", ".join(name for name, value in self.identity.items() if value != other.identity[name])

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


def sidecar_path(path: PathLike) -> Path:
    """Return where the facts about ``path`` are kept: "x.beton" -> "x.beton.json"."""
    return Path(f"{os.fspath(path)}.json")


def load_facts(path: PathLike) -> Facts:
    """Read the sidecar of a .beton file. That it belongs to the file is for ``check`` or ``verify`` to say.

    Raises BetonError if ``path`` is a folder, or the sidecar is missing, or has unknown, missing or ill-typed entries.
    """
    if Path(path).is_dir():
        held = ", ".join(str(file) for file in sorted(Path(path).glob("*.beton")))
        raise BetonError(f"{path} is a folder. " + (f"Name a .beton file in it: {held}" if held else HOW_TO_CONVERT))
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise BetonError(
            f"{sidecar}: no such file; it holds the facts about {Path(path).name}. {HOW_TO_CONVERT}. "
            f"For a .beton file that FFCV's own DatasetWriter made: python -m data_prep sidecar {path} --help"
        )
    try:
        return from_values(Facts, json.loads(sidecar.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BetonError(f"{sidecar}: not a readable sidecar: {error}. {HOW_TO_CONVERT}") from error


def facts_as_json(path: PathLike, facts: Facts) -> bytes:
    """Return the text of the sidecar of ``path``. Raises BetonError if UTF-8 cannot hold it."""
    text = json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BetonError(
            f"{sidecar_path(path)}: {text[error.start - 20 : error.end + 20]!r} is not text that UTF-8 can hold, such "
            "as the name of a folder in another encoding. Give the classes, source and split other names"
        ) from error


def count_classes(path: PathLike, labels: NDArray[np.int64], num_classes: int) -> tuple[int, ...]:
    """Return how many of ``labels`` (n,) each class has. Raises BetonError if one is ``num_classes`` or more."""
    if labels.max() >= num_classes:
        raise BetonError(f"{path}: label {labels.max()} is out of range for {num_classes} classes")
    return tuple(np.bincount(labels[labels >= 0], minlength=num_classes).tolist())
