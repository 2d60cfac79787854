"""Image trees as torchvision's ImageFolder reads them: ROOT/CLASS/.../image.jpg."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from data_prep.convert import Chunk, ConversionError, Source, map_in_order
from simclr.host import usable_cores

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "val", "test")
# What Pillow converts to RGB with at most 8 bits per channel before and after.
_CONVERTED_MODES = ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr")
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")  # WebP may be lossless; it is rarely so, and the file need not say
_CHUNK = 64
_MOST_NAMED = 10


@dataclass(frozen=True)
class Tree:
    """The images below one folder, in torchvision's order.

    Attributes:
        classes: Names of the class folders, sorted.
        paths: Image files, by class, then by folder and name.
        labels: Class index of each, int64 (n,).
        skipped: How many files of which kind were left out.
    """

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    skipped: dict[str, int]


def find_splits(root: Path) -> dict[str, Path]:
    """Finds what ``root`` holds: a ``train`` folder and others beside it, or one tree of classes.

    Args:
        root: The folder that the user named.

    Returns:
        Split name -> its class tree.

    Raises:
        ConversionError: If ``root`` is no folder, or has ``train`` but neither ``val`` nor ``test``.
    """
    if not root.is_dir():
        raise ConversionError(f"{root} is not a folder; --root should hold one folder of images per class")
    found = {name: root / name for name in SPLITS if (root / name).is_dir()}
    if not found:
        return {root.resolve().name: root}
    if "train" not in found or len(found) == 1:
        there, missing = sorted(found), "train" if "train" not in found else "test or val"
        raise ConversionError(
            f"{root} has the split {' and '.join(there)} but no {missing}. Add it, or convert one split alone: "
            f"--root {found[there[0]]} --output FILE.beton"
        )
    return found


def scan(root: Path) -> Tree:
    """Lists the images of one class tree.

    Args:
        root: A folder with one folder per class, each with images at any depth.

    Returns:
        Classes, files and labels. Hidden and non-image files are skipped and counted.

    Raises:
        ConversionError: If there are no class folders, a class has no images, or a folder cannot be listed.
    """
    skipped: Counter[str] = Counter()
    classes, paths, labels = [], [], []

    def refuse(error: OSError) -> NoReturn:
        raise ConversionError(f"cannot list {error.filename}: {error.strerror}") from error

    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        refuse(error)
    for entry in entries:
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif entry.is_dir():
            classes.append(entry.name)
        else:
            skipped["outside a class folder"] += 1
    if not classes:
        raise ConversionError(f"{root} has no class folders; expected {root}/CLASS/image.jpg")
    for label, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(root / name, onerror=refuse, followlinks=True)):
            hidden_folder = any(part.startswith(".") for part in Path(folder).relative_to(root).parts)
            for file in sorted(files):
                if hidden_folder or file.startswith("."):
                    skipped["hidden"] += 1
                elif not file.lower().endswith(EXTENSIONS):
                    skipped["not an image by its name"] += 1
                else:
                    paths.append(Path(folder, file))
                    labels.append(label)
    counts = np.bincount(np.array(labels, np.int64), minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        raise ConversionError(
            f"{root}: no images in class {_some(empty)}; expected files ending in {', '.join(EXTENSIONS)}. "
            "Add images or remove the folder"
        )
    return Tree(tuple(classes), tuple(paths), np.array(labels, np.int64), dict(skipped))


def image_folder(root: Path, split: str, resolution: int | None = None) -> Source:
    """One class tree as a source. EXIF orientation is not applied, as torchvision's ImageFolder does not.

    Args:
        root: A folder with one folder per class.
        split: Name of the split for the sidecar.
        resolution: Resize the shorter side to this many pixels (bicubic, antialiased) and crop the centre to a
            square; None to store images of one size as they are.

    Raises:
        ConversionError: As ``scan``; from ``chunks`` if images are unreadable, of an unsupported mode, or differ
            in size and no resolution is given.
    """
    if resolution is not None and resolution < 1:
        raise ConversionError(f"--resolution must be at least 1, got {resolution}")
    tree = scan(root)
    folder = root.resolve()
    description = f"image folder {folder.parent.name}/{folder.name}"
    if resolution is not None:
        description += f", shorter side resized to {resolution} (antialiased bicubic), centre-cropped to a square"
    source = Source(description, split, tree.classes, len(tree.paths), lambda: _chunks(tree, resolution, source))
    source.notes += [f"{count} files skipped: {kind}" for kind, count in sorted(tree.skipped.items())]
    return source


def _chunks(tree: Tree, resolution: int | None, source: Source) -> Iterator[Chunk]:
    modes: Counter[str] = Counter()
    bad: list[str] = []
    enlarged = 0
    shape: tuple[int, ...] | None = None
    start = 0
    with ThreadPoolExecutor(usable_cores()) as pool:
        for results in map_in_order(pool, lambda path: _load(path, resolution), tree.paths, _CHUNK):
            for path, result in zip(tree.paths[start : start + len(results)], results, strict=True):
                if isinstance(result, str):
                    bad.append(f"{path}: {result}")
                    continue
                modes[result.mode] += result.mode != "RGB"
                enlarged += result.is_enlarged
                source.lossy |= result.is_lossy
                shape = shape or result.pixels.shape
                if result.pixels.shape != shape:
                    raise ConversionError(
                        f"images differ in size: {tree.paths[0]} is {shape[1]} x {shape[0]}, {path} is "
                        f"{result.pixels.shape[1]} x {result.pixels.shape[0]}; choose one size with --resolution"
                    )
            if len(bad) >= _MOST_NAMED:
                break
            labels = tree.labels[start : start + len(results)]
            start += len(results)
            if not bad:  # after the first bad image the rest is only searched for others
                yield np.stack([result.pixels for result in results if not isinstance(result, str)]), labels
    if bad:
        more = "" if len(bad) < _MOST_NAMED else " (the search stopped here)"
        listed = "\n  ".join(bad[:_MOST_NAMED])
        raise ConversionError(f"unreadable images{more}; repair or remove them:\n  {listed}")
    source.notes += [f"{n} images converted to RGB from mode {mode}" for mode, n in sorted(modes.items()) if n]
    if enlarged:
        source.notes.append(f"{enlarged} images were smaller than the resolution and were enlarged")


@dataclass(frozen=True)
class _Loaded:
    pixels: NDArray[np.uint8]
    mode: str
    is_lossy: bool
    is_enlarged: bool


def _load(path: Path, resolution: int | None) -> _Loaded | str:
    """The pixels of one file, or why there are none."""
    try:
        with Image.open(path) as image:
            mode, kind = image.mode, image.format
            if mode not in ("RGB", *_CONVERTED_MODES) or _is_16_bit(image):
                return f"mode {mode} with more than 8 bits per channel or of unknown meaning is not supported"
            # A palette with transparency goes through RGBA: straight to RGB, Pillow warns.
            rgb = image.convert("RGBA").convert("RGB") if mode in ("P", "PA") else image.convert("RGB")
        is_enlarged = False
        if resolution is not None:
            is_enlarged = min(rgb.size) < resolution
            rgb = resize_and_crop(rgb, resolution)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        return str(error)
    return _Loaded(np.asarray(rgb), mode, kind in _LOSSY_FORMATS, is_enlarged)


def _is_16_bit(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow would cut 16-bit colour to 8 bits on loading; only the decoder's arguments say so."""
    for tile in image.tile:
        for argument in tile.args if isinstance(tile.args, tuple) else (tile.args,):
            if ";16" in str(argument) or (tile.codec_name.startswith("ppm") and argument in range(256, 65536)):
                return True
    return False


def resize_and_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Resizes the shorter side to ``resolution``, bicubic and antialiased, and crops the centre to a square.

    The same pixels as torchvision's ``Resize(resolution, BICUBIC)`` and ``CenterCrop(resolution)``.
    """
    width, height = image.size
    shorter = min(width, height)
    if shorter != resolution:
        width, height = int(resolution * width / shorter), int(resolution * height / shorter)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    return image.crop((left, top, left + resolution, top + resolution))


def _some(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(map(repr, names[:_MOST_NAMED])) + (f" and {rest} more" if rest > 0 else "")
