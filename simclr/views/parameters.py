"""The random decisions of a view: its settings, and the hash that they are drawn from.

The hash
--------
All arithmetic is on unsigned 64-bit integers and wraps. ``mix`` is the finaliser of splitmix64 (Steele, Lea
and Flood 2014, "Fast splittable pseudorandom number generators", with Stafford's mix13 constants)::

    mix(z):  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
             z = (z ^ (z >> 27)) * 0x94D049BB133111EB
             return z ^ (z >> 31)

    G   = 0x9E3779B97F4A7C15
    key = mix(mix(mix(mix(seed + G) ^ epoch) ^ index) + view)
    u   = (mix(key + (slot + 1) * G) >> 11) * 2**-53            # float64 in [0, 1), 53 random bits

so slot k of an image holds output number k of the splitmix64 generator whose state is the image's key.

The slots
---------
=========  ==============================================================================================
slot       meaning of its uniform u
=========  ==============================================================================================
0          flip if u < flip_probability
1          jitter colours if u < jitter_probability
2          order of the four colour operations: row floor(24 u) of ``JITTER_ORDERS``
3, 4, 5    brightness, contrast, saturation factor: max(0, 1 - a) + u (1 + a - max(0, 1 - a)), a the amount
6          hue shift in turns: hue (2 u - 1)
7          grayscale if u < grayscale_probability
8          blur if u < blur_probability
9          blur sigma in pixels: low + u (high - low)
10         solarise if u < solarise_probability
16 + 4 a   crop attempt a = 0..9: area, as a fraction of the image: low + u (high - low)
17 + 4 a   crop attempt a: log of width / height: log(low) + u (log(high) - log(low))
18 + 4 a   crop attempt a: top = floor(u (H - height + 1))
19 + 4 a   crop attempt a: left = floor(u (W - width + 1))
1024 + k   number k of views that somebody has registered (:meth:`View.uniforms`)
=========  ==============================================================================================

A slot never changes its meaning. A new operation takes a new slot, so older ones keep their values. The
uniforms are the same bits on every machine. The crop's height and width go through exp and sqrt in float64,
which may differ in the last bit between numpy builds: that moves a crop edge only where the exact side lies
within about 1e-14 of a half-integer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simclr.schema import Must, NotNegative, Share, Size, check_fields

CROP_ATTEMPTS = 10
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
Interpolation = Literal["bilinear", "bicubic"]
Interval = Annotated[tuple[float, float], Must(lambda ends: 0 < ends[0] <= ends[1], "(low, high) with 0 < low <= high")]
Areas = Annotated[
    tuple[float, float], Must(lambda ends: 0 < ends[0] <= ends[1] <= 1, "(low, high) with 0 < low <= high <= 1")
]
Turns = Annotated[float, Must(lambda value: 0 <= value <= 0.5, "in [0, 0.5]")]
Odd = Annotated[Size, Must(lambda value: value % 2 == 1, "an odd number, or None")]


class Slot(IntEnum):
    """Where each random decision of a view is found in the hash; see the table at the top of the module."""

    FLIP = 0
    JITTER = 1
    JITTER_ORDER = 2
    BRIGHTNESS = 3
    CONTRAST = 4
    SATURATION = 5
    HUE = 6
    GRAYSCALE = 7
    BLUR = 8
    BLUR_SIGMA = 9
    SOLARISE = 10
    CROP = 16
    OWN = 1024


class JitterOperation(IntEnum):
    """The numbers by which ``ViewParameters.jitter_order`` names the colour operations."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


JITTER_ORDERS: NDArray[np.int64] = np.array(list(itertools.permutations(JitterOperation)), dtype=np.int64)
"""All 24 orders of the colour operations, (24, 4), in lexicographic order."""


@dataclass(frozen=True)
class ViewSpec:
    """How one view is drawn and computed.

    The operations run in this order: crop and resize, flip, colour jitter, grayscale, blur, solarise,
    normalise. Amounts have the meaning of the torchvision transforms of the same name. The defaults are those
    of SimCLR for CIFAR-10 with colour strength 0.5 and crops of at least 20 % of the area.

    Attributes:
        crop_scale: Smallest and largest area of the crop, as fractions of the image's area, in (0, 1].
        crop_ratio: Smallest and largest width / height of the crop, > 0.
        interpolation: "bilinear" or "bicubic", both antialiased where the crop is larger than the view.
        flip_probability: Probability of a horizontal flip.
        jitter_probability: Probability of colour jitter; the four operations come in random order.
        brightness: Amount a >= 0; the factor is uniform in [max(0, 1 - a), 1 + a].
        contrast: As ``brightness``.
        saturation: As ``brightness``.
        hue: Largest shift of the hue in turns, in [0, 0.5].
        grayscale_probability: Probability that all three channels become the luma.
        blur_probability: Probability of a Gaussian blur.
        blur_sigma: Smallest and largest standard deviation of the blur in pixels of the view, > 0.
        blur_kernel: Width of the blur's kernel in pixels, odd. None takes 10 % of the view's side, as SimCLR
            does; see ``blur_kernel_size``.
        solarise_probability: Probability that pixels at or above the threshold are inverted.
        solarise_threshold: On pixels in [0, 1].

    Raises:
        ValueError: If a field is outside its range; the message names field, value and range.

    Source:
        Chen et al. 2020, arXiv:2002.05709, appendices A and B.9; Zbontar et al. 2021, arXiv:2103.03230,
        section 2.2, for solarise and views with different settings.
    """

    crop_scale: Areas = (0.2, 1.0)
    crop_ratio: Interval = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip_probability: Share = 0.5
    jitter_probability: Share = 0.8
    brightness: NotNegative = 0.4
    contrast: NotNegative = 0.4
    saturation: NotNegative = 0.4
    hue: Turns = 0.1
    grayscale_probability: Share = 0.2
    blur_probability: Share = 0.0
    blur_sigma: Interval = (0.1, 2.0)
    blur_kernel: Odd | None = None
    solarise_probability: Share = 0.0
    solarise_threshold: Share = 0.5

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ViewParameters:
    """The random decisions for one view of b images, as numpy arrays of length b.

    Attributes:
        crop_top: First row of the crop, int64.
        crop_left: First column of the crop, int64.
        crop_height: Rows of the crop, int64, >= 1.
        crop_width: Columns of the crop, int64, >= 1.
        flip: Whether the view is mirrored, bool.
        jitter: Whether colours are jittered, bool. The five entries below are drawn in any case.
        jitter_order: ``JitterOperation`` numbers in the order in which they are applied, int64, (b, 4).
        brightness: Factor, float64, >= 0.
        contrast: Factor, float64, >= 0.
        saturation: Factor, float64, >= 0.
        hue: Shift in turns, float64, in [-0.5, 0.5].
        grayscale: Whether the view is made gray, bool.
        blur: Whether the view is blurred, bool.
        blur_sigma: Standard deviation in pixels of the view, float64.
        solarise: Whether bright pixels are inverted, bool.
    """

    crop_top: NDArray[np.int64]
    crop_left: NDArray[np.int64]
    crop_height: NDArray[np.int64]
    crop_width: NDArray[np.int64]
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    jitter_order: NDArray[np.int64]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    grayscale: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    blur_sigma: NDArray[np.float64]
    solarise: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.crop_top)


def sample_parameters(
    spec: ViewSpec,
    indices: NDArray[np.integer[Any]] | Tensor,
    *,
    seed: int,
    epoch: int,
    view: int,
    height: int,
    width: int,
) -> ViewParameters:
    """Draw one view's parameters for the images of a batch.

    Row i depends on ``indices[i]`` and the keyword arguments alone, not on the rest of the batch. No random
    generator is read or moved. The distributions are those of torchvision's ``RandomResizedCrop``,
    ``ColorJitter``, ``GaussianBlur`` and the Bernoulli choices around them.

    Args:
        spec: The view's settings.
        indices: Dataset indices, (b,), any integer type, >= 0, in host memory.
        seed: Seed of the run, in [0, 2**64).
        epoch: Epoch, in [0, 2**64).
        view: Number of the view; ``two_views`` uses 1 and 2.
        height: Stored height H of the images in pixels.
        width: Stored width W of the images in pixels.

    Returns:
        Parameters of length b.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind.
    """
    for name, value in (("height", height), ("width", width)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    keys = image_keys(indices, seed=seed, epoch=epoch, view=view)
    u = uniforms(keys, range(Slot.SOLARISE + 1)).T
    top, left, crop_height, crop_width = _sample_crops(spec, keys, height, width)
    return ViewParameters(
        crop_top=top,
        crop_left=left,
        crop_height=crop_height,
        crop_width=crop_width,
        flip=u[Slot.FLIP] < spec.flip_probability,
        jitter=u[Slot.JITTER] < spec.jitter_probability,
        jitter_order=JITTER_ORDERS[(u[Slot.JITTER_ORDER] * len(JITTER_ORDERS)).astype(np.int64)],
        brightness=_between(max(0.0, 1 - spec.brightness), 1 + spec.brightness, u[Slot.BRIGHTNESS]),
        contrast=_between(max(0.0, 1 - spec.contrast), 1 + spec.contrast, u[Slot.CONTRAST]),
        saturation=_between(max(0.0, 1 - spec.saturation), 1 + spec.saturation, u[Slot.SATURATION]),
        hue=_between(-spec.hue, spec.hue, u[Slot.HUE]),
        grayscale=u[Slot.GRAYSCALE] < spec.grayscale_probability,
        blur=u[Slot.BLUR] < spec.blur_probability,
        blur_sigma=_between(*spec.blur_sigma, u[Slot.BLUR_SIGMA]),
        solarise=u[Slot.SOLARISE] < spec.solarise_probability,
    )


def image_keys(indices: NDArray[np.integer[Any]] | Tensor, *, seed: int, epoch: int, view: int) -> NDArray[np.uint64]:
    """One hash key per image; the formula is at the top of the module.

    Args:
        indices: Dataset indices, (b,), any integer type, >= 0, in host memory.
        seed: Seed of the run, in [0, 2**64).
        epoch: Epoch, in [0, 2**64).
        view: Number of the view, in [0, 2**64); ``two_views`` uses 1 and 2.

    Returns:
        Keys, (b,), uint64.

    Raises:
        ValueError: If an argument is out of range or not an integer, or ``indices`` is not (b,).
    """
    if isinstance(indices, Tensor) and indices.device.type != "cpu":
        raise ValueError(
            f"indices must be in host memory, got a tensor on {indices.device}: the parameters are drawn on the "
            "host, and fetching the indices would wait for the device; pass the loader's CPU tensor"
        )
    index = np.asarray(indices)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"indices must be integers of shape (b,), got {index.dtype} of shape {index.shape}")
    if index.size and int(index.min()) < 0:
        raise ValueError(f"indices must be >= 0, got {int(index.min())}")
    for name, value in (("seed", seed), ("epoch", epoch), ("view", view)):
        if not is_integer(value) or not 0 <= value <= _MASK:
            raise ValueError(f"{name} must be an integer in [0, 2**64), got {value!r}")
    key = _mix(np.array([(int(seed) + _GOLDEN) & _MASK], dtype=np.uint64))
    key = _mix(key ^ np.uint64(epoch))
    key = _mix(key ^ index.astype(np.uint64))
    return _mix(key + np.uint64(view))


def uniforms(keys: NDArray[np.uint64], slots: Sequence[int]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits for each key and slot.

    Args:
        keys: From ``image_keys``, (b,).
        slots: k slot numbers, >= 0.

    Returns:
        float64, (b, k).
    """
    # Python integers do not overflow; numpy scalars would warn about the wrap that the hash relies on.
    steps = np.array([(slot + 1) * _GOLDEN & _MASK for slot in slots], dtype=np.uint64)
    bits = _mix(keys[:, None] + steps) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def describe(spec: ViewSpec) -> str:
    """The settings in one line, for logs and reports."""
    parts = [
        f"crop {spec.crop_scale[0]:g} to {spec.crop_scale[1]:g} of the area, "
        f"ratio {spec.crop_ratio[0]:.3g} to {spec.crop_ratio[1]:.3g}, {spec.interpolation}",
        f"flip p={spec.flip_probability:g}",
        f"jitter p={spec.jitter_probability:g} (brightness {spec.brightness:g}, contrast {spec.contrast:g}, "
        f"saturation {spec.saturation:g}, hue {spec.hue:g})",
        f"grayscale p={spec.grayscale_probability:g}",
    ]
    if spec.blur_probability:
        kernel = "10 % of the side" if spec.blur_kernel is None else f"{spec.blur_kernel} px"
        low, high = spec.blur_sigma
        parts.append(f"blur p={spec.blur_probability:g} (sigma {low:g} to {high:g} px, kernel {kernel})")
    else:
        parts.append("no blur")
    if spec.solarise_probability:
        parts.append(f"solarise p={spec.solarise_probability:g} (threshold {spec.solarise_threshold:g})")
    else:
        parts.append("no solarise")
    return "; ".join(parts)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def _between(low: float, high: float, u: NDArray[np.float64]) -> NDArray[np.float64]:
    return low + (high - low) * u


def _sample_crops(
    spec: ViewSpec, keys: NDArray[np.uint64], height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Top, left, height and width of each crop: the first of ten attempts that fits, else a central crop."""
    crops = np.zeros((4, len(keys)), np.int64)
    low, high = math.log(spec.crop_ratio[0]), math.log(spec.crop_ratio[1])
    waiting = np.arange(len(keys))  # images without a crop yet
    for slot in range(Slot.CROP, Slot.CROP + 4 * CROP_ATTEMPTS, 4):
        u = uniforms(keys[waiting], range(slot, slot + 4)).T
        area, ratio = height * width * _between(*spec.crop_scale, u[0]), np.exp(_between(low, high, u[1]))
        widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        top = (u[2] * (height - heights + 1)).astype(np.int64)
        left = (u[3] * (width - widths + 1)).astype(np.int64)
        crops[:, waiting[fits]] = np.stack([top, left, heights, widths])[:, fits]
        waiting = waiting[~fits]
        if not waiting.size:
            break

    central_height, central_width = height, width
    if width / height < spec.crop_ratio[0]:
        central_height = max(1, round(width / spec.crop_ratio[0]))
    elif width / height > spec.crop_ratio[1]:
        central_width = max(1, round(height * spec.crop_ratio[1]))
    central = ((height - central_height) // 2, (width - central_width) // 2, central_height, central_width)
    crops[:, waiting] = np.array(central)[:, None]
    top, left, crop_height, crop_width = crops
    return top, left, crop_height, crop_width


def is_integer(value: object) -> bool:
    """Whether this is an integer of Python's or numpy's, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def require_fitting(p: ViewParameters, image: Tensor) -> None:
    """Raise ValueError unless the parameters are those of b images of this size."""
    b, height, width = image.shape[:3]
    for field in fields(p):
        if len(getattr(p, field.name)) != b:
            raise ValueError(
                f"parameters.{field.name} has {len(getattr(p, field.name))} rows, but there are {b} images"
            )
    if not np.array_equal(np.sort(p.jitter_order, axis=1), np.tile(np.arange(4), (b, 1))):
        raise ValueError("each row of parameters.jitter_order must hold 0, 1, 2 and 3 once, in some order")
    outside = (
        (p.crop_top < 0)
        | (p.crop_left < 0)
        | (p.crop_height < 1)
        | (p.crop_width < 1)
        | (p.crop_top + p.crop_height > height)
        | (p.crop_left + p.crop_width > width)
    )
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"crop of image {row} leaves the {height} x {width} image: top {p.crop_top[row]}, "
            f"left {p.crop_left[row]}, height {p.crop_height[row]}, width {p.crop_width[row]}; "
            "draw the parameters with the height and width of these images"
        )
