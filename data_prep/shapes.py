"""The built-in data set: 32 x 32 colour images of ten kinds of shape, drawn from a seed.

It is for trying the whole path without a download, and for tests; it stands for no real data set. Each image
holds one shape of random position, size, stretch, rotation and colour on a textured background with small
distractors, lighter or darker than it. So pixels say little about the kind of shape, and outlines nearly all.

Image i is a function of (seed, split, i): a longer data set begins with the shorter one. Its random numbers are
words i * ``_WORDS`` and on of numpy's Philox stream with key (seed, split), whose raw words numpy guarantees.
Pixels come from additions, multiplications and comparisons, so that every machine draws the same ones.

Shape letters used in this file:
    m   images drawn together
    s   sample points along a side of an image, ``SIZE * _SUPERSAMPLING``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_prep.convert import Chunk, ConversionError, Source, map_in_order
from simclr.system import usable_cores

SIZE = 32
VERSION = 1  # of the drawing: any change of a pixel makes another data set
_SPLITS = ("train", "test")
_SUPERSAMPLING = 3
_CHUNK = 20  # small enough to stay in the cache
_NUM_DISTRACTORS = 2
_COARSE = 6  # the coarse noise is drawn on a grid of this many points along a side

_SCALARS = 64
_COARSE_BYTES = _COARSE * _COARSE * 3
_FINE_BYTES = SIZE * SIZE
_WORDS = _SCALARS + -(-_COARSE_BYTES // 8) + _FINE_BYTES // 8
_WORDS += -_WORDS % 4  # Philox counts in blocks of 4 words, and skipping to an image skips whole blocks

Float = NDArray[np.float32]
Mask = NDArray[np.bool_]


def _star(u: Float, v: Float) -> Mask:
    # A point lies in a pentagram if it lies on the inner side of at least four of its five lines.
    inside = np.zeros(u.shape, np.uint8)
    for k in range(5):
        angle = np.pi / 2 + 2 * np.pi * k / 5
        inside += np.float32(np.cos(angle)) * u + np.float32(np.sin(angle)) * v < np.float32(np.cos(2 * np.pi / 5))
    return inside >= 4


def _heart(u: Float, v: Float) -> Mask:
    x, y = u * u, v + np.float32(0.1)
    y2 = y * y
    r = x + y2 - 1
    inside: Mask = r * r * r < x * y2 * y
    return inside


# Each kind: the points (u, v) inside it, v upwards, and the factor that gives all kinds the area of the disc.
_KINDS: dict[str, tuple[Callable[[Float, Float], Mask], float]] = {
    "arrow": (lambda u, v: np.where(v > 0, abs(u) + 0.8 * v < 0.8, (abs(u) < 0.3) & (v > -1)), 1.5),
    "bars": (lambda u, v: (abs(abs(u) - 0.65) < 0.3) & (abs(v) < 1), 1.14),
    "crescent": (lambda u, v: (u * u + v * v < 1) & ((u - 0.5) * (u - 0.5) + v * v > 0.64), 1.43),
    "cross": (lambda u, v: (np.minimum(abs(u), abs(v)) < 0.33) & (np.maximum(abs(u), abs(v)) < 1), 1.19),
    "disc": (lambda u, v: u * u + v * v < 1, 1.0),
    "heart": (_heart, 0.93),
    "ring": (lambda u, v: abs(u * u + v * v - 0.65) < 0.35, 1.2),
    "square": (lambda u, v: np.maximum(abs(u), abs(v)) < 1, 0.89),
    "star": (_star, 1.67),
    "triangle": (lambda u, v: (1.7320508 * abs(u) + v < 1) & (v > -0.5), 1.55),
}
CLASSES = tuple(_KINDS)


def shapes(seed: int, split: str, num_images: int) -> Source:
    """One split as a source.

    Args:
        seed: 0 or above; another seed gives other images.
        split: "train" or "test"; they share no image.
        num_images: How many, at least one of each kind.

    Raises:
        ConversionError: If an argument is out of range.
    """
    if not 0 <= seed < 1 << 64:
        raise ConversionError(f"--seed must be 0 or above and below 2^64, got {seed}")
    if num_images < len(CLASSES):
        raise ConversionError(f"{split} needs at least {len(CLASSES)} images, one of each kind; got {num_images}")

    def draw_from(start: int) -> Chunk:
        return draw(seed, split, start, min(start + _CHUNK, num_images))

    def chunks() -> Iterator[Chunk]:
        with ThreadPoolExecutor(usable_cores()) as pool:
            for drawn in map_in_order(pool, draw_from, range(0, num_images, _CHUNK), 50):
                images, labels = zip(*drawn, strict=True)
                yield np.concatenate(images), np.concatenate(labels)

    description = f"built-in shapes, drawing version {VERSION}, seed {seed}"
    return Source(description, split, CLASSES, num_images, chunks, is_determined=True)


def draw(seed: int, split: str, start: int, stop: int) -> Chunk:
    """Draw images ``start`` to ``stop`` - 1 of a split.

    Args:
        seed: 0 or above.
        split: "train" or "test".
        start: First index.
        stop: One past the last index.

    Returns:
        Images uint8 (m, 32, 32, 3) and labels int64 (m,), indices of ``CLASSES``. Image i is of kind i % 10.
    """
    philox = np.random.Philox(key=[seed, _SPLITS.index(split)])
    philox.advance(start * _WORDS // 4)
    words = philox.random_raw((stop - start) * _WORDS).reshape(stop - start, _WORDS)
    uniform = _Uniform((words[:, :_SCALARS] >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    noise: Float = words[:, _SCALARS:].astype("<u8").view(np.uint8).astype(np.float32) / np.float32(255)
    coarse = noise[:, :_COARSE_BYTES].reshape(-1, 3, _COARSE, _COARSE)
    fine = noise[:, _COARSE_BYTES : _COARSE_BYTES + _FINE_BYTES].reshape(-1, 1, SIZE, SIZE)
    labels = np.arange(start, stop) % len(CLASSES)

    background, foreground = _two_colours(uniform)
    image = _texture(uniform, background, coarse)
    for _ in range(_NUM_DISTRACTORS):
        _paint(image, _distractor(uniform), _spread(foreground + uniform(-0.5, 0.5, 3)))
    _paint(image, _shape(uniform, labels), _texture(uniform, foreground, coarse[:, :, ::-1, ::-1]))
    image += _spread(uniform(0.02, 0.1)) * (fine - np.float32(0.5))
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1), labels


def preview(seed: int) -> Image.Image:
    """Return a picture of 16 training images of each kind, three times enlarged, with their names."""
    columns, side, margin = 16, 3 * SIZE, 80
    images, labels = draw(seed, "train", 0, columns * len(CLASSES))
    picture = Image.new("RGB", (margin + columns * side, len(CLASSES) * side), "white")
    for label, name in enumerate(CLASSES):
        ImageDraw.Draw(picture).text((8, label * side + side // 2), name, fill="black")
        for column, image in enumerate(images[labels == label]):
            enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(enlarged, (margin + column * side, label * side))
    return picture


class _Uniform:
    """Hands out the columns of a table of uniform numbers, each once, scaled to a range."""

    def __init__(self, table: NDArray[np.float64]) -> None:
        self._table, self._used = table, 0

    def __call__(self, low: float, high: float, count: int | None = None) -> Float:
        """Float32 (m,), or (m, count)."""
        columns = self._table[:, self._used : self._used + (count or 1)]
        assert columns.shape[1] == (count or 1), "raise _SCALARS"
        self._used += count or 1
        scaled = (low + (high - low) * columns).astype(np.float32)
        return scaled if count else scaled[:, 0]


def _two_colours(uniform: _Uniform) -> tuple[Float, Float]:
    """Colours (m, 3) of background and shape: any hues, and a brightness that differs by 0.4 to 0.65 either way."""
    brightness, contrast = uniform(0, 1), uniform(0.4, 0.65)
    sign = np.where(uniform(0, 1) < 0.5, np.float32(1), np.float32(-1))
    # Both stay within 0.05 to 0.95, whichever is the brighter one.
    low = 0.05 + brightness * (0.9 - contrast)
    background, shape = np.where(sign > 0, low, low + contrast), np.where(sign > 0, low + contrast, low)
    hues = []
    for _ in range(2):
        hue = uniform(-0.3, 0.3, 3)
        hues.append(hue - (0.3 * hue[:, :1] + 0.59 * hue[:, 1:2] + 0.11 * hue[:, 2:]))  # leaves brightness as it is
    return background[:, None] + hues[0], shape[:, None] + hues[1]


def _texture(uniform: _Uniform, colour: Float, coarse: Float) -> Float:
    """``colour`` with a gradient, stripes and coarse noise, (m, 3, 32, 32)."""
    y, x = _grid(SIZE)
    gradient = _spread(uniform(-0.1, 0.1)) * x + _spread(uniform(-0.1, 0.1)) * y
    phase = _spread(uniform(-3.5, 3.5)) * x + _spread(uniform(-3.5, 3.5)) * y + _spread(uniform(0, 1))
    stripes = abs(phase - np.floor(phase) - np.float32(0.5))  # a triangular wave
    noise = _enlarge(_spread(uniform(0, 0.3)) * (coarse - np.float32(0.5)))
    noise += gradient
    noise += _spread(uniform(0, 0.08, 3)) * (stripes - np.float32(0.25))
    noise += _spread(colour)
    return noise


def _enlarge(coarse: Float) -> Float:
    """Bilinear interpolation of (m, 3, k, k) to (m, 3, 32, 32)."""
    position = np.linspace(0, coarse.shape[-1] - 1, SIZE, dtype=np.float32)
    left = np.minimum(position.astype(np.int64), coarse.shape[-1] - 2)
    weight = position - left.astype(np.float32)
    columns = coarse[..., left] * (1 - weight) + coarse[..., left + 1] * weight
    weight = weight[:, None]
    rows: Float = columns[:, :, left] * (1 - weight) + columns[:, :, left + 1] * weight
    return rows


def _distractor(uniform: _Uniform) -> Float:
    """Coverage (m, 1, 32, 32) of a small disc anywhere."""
    y, x = _grid(SIZE)
    cx, cy, radius = _spread(uniform(-1, 1)), _spread(uniform(-1, 1)), _spread(uniform(0.03, 0.1))
    distance2 = (x - cx) * (x - cx) + (y - cy) * (y - cy)
    coverage: Float = (0.5 + (radius * radius - distance2) * (SIZE / 4) / radius).clip(0, 1)
    return coverage


def _shape(uniform: _Uniform, labels: NDArray[np.int64]) -> Float:
    """Coverage (m, 1, 32, 32) of the shape, counted at 3 x 3 points per pixel."""
    radius, stretch, angle = uniform(0.36, 0.56), uniform(0.87, 1.15), uniform(0, 2 * np.pi)
    room = np.maximum(0, 1 - 1.5 * radius)
    cx, cy = uniform(-1, 1) * room, uniform(-1, 1) * room
    # In float64, where processors differ too little to move a point across an outline once it is rounded.
    cos, sin = (f(angle.astype(np.float64)).astype(np.float32) / radius for f in (np.cos, np.sin))
    coverage = np.empty((len(labels), 1, SIZE, SIZE), np.float32)
    y, x = _grid(SIZE * _SUPERSAMPLING)
    for label, (is_inside, factor) in enumerate(_KINDS.values()):
        which = np.flatnonzero(labels == label)
        dx, dy = x - cx[which, None, None], y - cy[which, None, None]
        a, b, s = cos[which, None, None] / factor, sin[which, None, None] / factor, stretch[which, None, None]
        inside = is_inside((a * dx + b * dy) * s, (a * dy - b * dx) / s)  # (m, s, s)
        counted = inside.reshape(-1, SIZE, _SUPERSAMPLING, SIZE, _SUPERSAMPLING).sum(axis=(2, 4), dtype=np.uint8)
        coverage[which, 0] = counted / np.float32(_SUPERSAMPLING**2)
    return coverage


def _spread(values: Float) -> Float:
    """(m,) or (m, 3) to (m, 1 or 3, 1, 1), to go with images of (m, 3, 32, 32)."""
    return values.reshape(len(values), -1, 1, 1)


def _paint(image: Float, coverage: Float, colour: Float) -> None:
    """Paints ``colour``, (m, 3, 1, 1) or (m, 3, 32, 32), over ``image`` (m, 3, 32, 32) in place."""
    image += coverage * (colour - image)


def _grid(count: int) -> tuple[Float, Float]:
    """Centres of ``count`` x ``count`` cells of the square from -1 to 1: y (count, 1), upwards, and x (1, count)."""
    centres = ((np.arange(count) + 0.5) * (2 / count) - 1).astype(np.float32)
    return -centres[:, None], centres[None, :]
