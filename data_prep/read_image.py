"""One image file to RGB pixels of 8 bits, and what had to be changed for that."""

from __future__ import annotations

import importlib
import stat
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")  # some may be lossless; it is rare, and need not be said
# What Pillow converts to RGB with at most 8 bits per channel before and after.
_CONVERTED_MODES = ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr")
# Pillow opens these, but needs other programs to see pixels in them, or never does.
_NOT_BY_ITSELF = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_TO_8_BITS = "magick IN -auto-level -depth 8 OUT.png"

_ORIENTATION = 0x0112  # EXIF's number of the tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = "turned upright, as their EXIF orientation asks"
NO_EXIF = "taken as they lie: their EXIF, which may hold an orientation, cannot be read"
FIRST = "of several frames, pages or layers: the first is stored"
HIGH_BYTE = "of more than 8 bits per channel: the 8 highest are stored"
DARK = f"of more than 8 bits, of which the highest are not used: nearly black. To scale them first: {_TO_8_BITS}"
ENLARGED = "enlarged: smaller than the resolution"

# Suffixes of what people keep among images and Pillow does not read.
_WAYS_OUT = {
    "HEIF photographs: pip install pillow-heif and run this again, or convert them to JPEG": ".heic .heif .hif",
    "AVIF images: pip install --upgrade pillow and run this again": ".avif .avifs",
    "JPEG XL images: convert them (djxl IN.jxl OUT.png)": ".jxl",
    "camera raw: export them as JPEG or TIFF": ".arw .cr2 .cr3 .crw .dng .nef .nrw .orf .pef .raf .raw .rw2 .srw",
    "videos: take frames out of them (ffmpeg -i IN -vf fps=1 OUT%05d.png)": ".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm",
    "drawings and documents: export them as PNG": ".ai .emf .eps .pdf .ps .svg .wmf",
    "archives: unpack them and run this again": ".7z .gz .rar .tar .tgz .zip",
}
_WAY_OUT = {suffix: way for way, suffixes in _WAYS_OUT.items() for suffix in suffixes.split()}


@dataclass(frozen=True)
class Loaded:
    """An image as it is stored.

    Attributes:
        pixels: uint8 (h, w, 3), RGB.
        is_lossy: Whether it has gone through lossy compression.
        changes: What was done to it, each in words that follow a number of images.
    """

    pixels: NDArray[np.uint8]
    is_lossy: bool
    changes: tuple[str, ...]


@cache
def readable_suffixes() -> frozenset[str]:
    """Return the file suffixes, in lower case, that Pillow reads here; HEIF's too where pillow-heif is there."""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    # The common formats first: opening a file tries them in the order in which they were imported.
    Image.preinit()
    for common in ("WebP", "Tiff"):
        importlib.import_module(f"PIL.{common}ImagePlugin")
    registered = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in registered.items() if kind in Image.OPEN and kind not in _NOT_BY_ITSELF)


def advice_for(suffix: str) -> str | None:
    """Return what files with this suffix are and how to get images from them; None if that is not known."""
    return _WAY_OUT.get(suffix)


def read_image(path: Path, resolution: int | None) -> Loaded | str:
    """Read one file.

    Args:
        path: The file.
        resolution: Resize the shorter side to this many pixels and crop the centre to a square; None: as it is.

    Returns:
        Its pixels, the right way up; or why there are none.
    """
    changes = []
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe waits for whoever fills it
            raise ValueError("it is no file, but a folder, pipe or device")
        with Image.open(path) as image:
            is_lossy = image.format in _LOSSY_FORMATS
            if getattr(image, "is_animated", False):
                changes.append(FIRST)
            is_16_bit = _is_16_bit(image)  # before anything else, as loading the pixels forgets it
            if is_16_bit:
                changes.append(HIGH_BYTE)
            elif image.mode != "RGB":
                changes.append(f"converted to RGB from mode {image.mode}")
            orientation = _orientation(image)
            rgb = _to_rgb(image)
            # Pillow turns TIFF files itself while it loads them, and then forgets their orientation.
            if orientation in _TURNS and _orientation(image) == orientation:
                rgb = rgb.transpose(_TURNS[orientation])
        if is_16_bit and np.asarray(rgb).max() < 64:
            changes.append(DARK)
        if orientation in _TURNS:
            changes.append(TURNED)
        elif orientation is None:
            changes.append(NO_EXIF)
        if resolution is not None:
            if min(rgb.size) < resolution:
                changes.append(ENLARGED)
            rgb = resize_and_crop(rgb, resolution)
        return Loaded(np.asarray(rgb), is_lossy, tuple(changes))
    except Exception as error:  # damaged files make Pillow raise nearly anything
        hint = advice_for(path.suffix.lower())
        return f"{error or type(error).__name__}" + (f" ({hint})" if hint else "")


def _orientation(image: Image.Image) -> int | None:
    """EXIF's orientation, 1 if there is none; None if the EXIF cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels may be good all the same
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("P", "PA"):  # straight to RGB, Pillow warns of palettes with transparency
        return image.convert("RGBA").convert("RGB")
    if image.mode == "RGB" or image.mode in _CONVERTED_MODES:
        return image.convert("RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() >= 0 and values.max() < 1 << 16:
            return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
        raise ValueError(f"values from {values.min()} to {values.max()}; convert it to 8 bits ({_TO_8_BITS})")
    raise ValueError(f"mode {image.mode} has no fixed range or meaning; convert it to 8-bit RGB ({_TO_8_BITS})")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether the file has 16 bits per channel, of which 8 are kept; for colour only the decoder's arguments say so."""
    if image.mode.startswith("I"):
        return True
    for tile in getattr(image, "tile", ()):
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
