"""Two random views of each image: settings, parameters and the operations that apply them.

A view's random parameters are a pure function of ``(seed, epoch, dataset index, view)``. There is no
generator and no state, so an image gets the same views on 1 or 64 devices, in any batch, in any order, and
after a resume. The parameters are drawn on the host with numpy for the whole batch; the pixels are then
computed by batched torch operations, which are the same on every device.

Shape letters used in this file:
    b   images in this call       H, W   stored height and width       S   side of the square view
    n   images in a sub-batch     K      filter taps per output pixel

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

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr import parts

Interpolation = Literal["bilinear", "bicubic"]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

CROP_ATTEMPTS = 10
_RADIUS: dict[Interpolation, int] = {"bilinear": 1, "bicubic": 2}  # of the filter, in pixels


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

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = None
    solarise_probability: float = 0.0
    solarise_threshold: float = 0.5

    def __post_init__(self) -> None:
        # A spec read back from JSON has lists where tuples were written; equality and hashing want tuples.
        for name, high in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            object.__setattr__(self, name, _range(name, getattr(self, name), high))
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation must be one of {', '.join(get_args(Interpolation))}, got {self.interpolation!r}"
            )
        for field in fields(self):
            if field.name.endswith("_probability"):
                _require_number(field.name, getattr(self, field.name), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            _require_number(name, getattr(self, name), 0, math.inf)
        _require_number("hue", self.hue, 0, 0.5)
        _require_number("solarise_threshold", self.solarise_threshold, 0, 1)
        kernel = self.blur_kernel
        if kernel is not None and (not _is_integer(kernel) or kernel < 1 or kernel % 2 == 0):
            raise ValueError(f"blur_kernel must be None or an odd integer >= 1, got {kernel!r}")


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
        if not _is_integer(value) or not 0 <= value <= _MASK:
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
        if not _is_integer(value) or value < 1:
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


@torch.no_grad()
def apply_view(
    image: Tensor,
    parameters: ViewParameters,
    spec: ViewSpec,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Compute one view of each image.

    Equal to the functions of ``torchvision.transforms.v2.functional`` on a float image in [0, 1], with
    ``antialias=True``, within float32 rounding (``tests/test_views.py`` gives the figures), with one
    difference: bicubic values are clamped to [0, 1]. Bicubic weights are negative in places, so a float
    result overshoots; HSV has no meaning there, and recipes that resize 8-bit images saturate too.

    Runs in float32 whatever autocast says, without waiting for the device.

    Args:
        image: Stored pixels, uint8, (b, H, W, 3), on any device. Not modified.
        parameters: One row per image, in the same order.
        spec: Its interpolation, blur kernel and solarise threshold are used.
        size: Side S of the view in pixels.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, > 0.

    Returns:
        float32, (b, 3, S, S), channels_last, on the device of ``image``: (pixel - mean) / std.

    Raises:
        ValueError: If shapes, dtype or lengths do not fit, or a crop leaves the image.
    """
    require_images(image)
    require_fitting(parameters, image)
    if not _is_integer(size) or size < 1:
        raise ValueError(f"size must be an integer >= 1, got {size!r}")

    planes = _crop_resize_flip(image, parameters, size, spec.interpolation)  # (3, b, S, S)
    if spec.interpolation == "bicubic":
        planes.clamp_(0, 1)
    _jitter(planes, parameters)
    _grayscale(planes, parameters)
    _blur(planes, parameters, spec)
    _solarise(planes, parameters, spec.solarise_threshold)
    return _normalise(planes, mean, std)


def size_at(view_stages: Sequence[tuple[int, int]], epoch: int, stored: int) -> int:
    """Return the side of an epoch's views in pixels.

    Args:
        view_stages: Sides, and the epochs that each holds for, in order.
        epoch: From 0.
        stored: Side of the stored images, which holds after those epochs.
    """
    for side, epochs in view_stages:
        if epoch < epochs:
            return side
        epoch -= epochs
    return stored


def whole_stages(view_stages: Sequence[tuple[int, int]], stored: int, epochs: int) -> list[tuple[int, int]]:
    """Return sides and the epochs that each holds for, with the epochs that are left at the stored images' side."""
    left = epochs - sum(length for _, length in view_stages)
    return [(side, length) for side, length in (*view_stages, (stored, left)) if length]


def say_view_stages(view_stages: Sequence[tuple[int, int]], stored: int, epochs: int) -> str:
    """Return :func:`whole_stages` in words."""
    stages = whole_stages(view_stages, stored, epochs)
    return ", then ".join(f"{side} pixels for {length} epochs" for side, length in stages)


def two_views(
    image: Tensor,
    indices: NDArray[np.integer[Any]] | Tensor,
    spec_1: ViewSpec,
    spec_2: ViewSpec,
    *,
    seed: int,
    epoch: int,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: str = "standard",
) -> tuple[Tensor, Tensor]:
    """Two views of each image, with the parameters of view 1 and view 2.

    Args:
        image: Stored pixels, uint8, (b, H, W, 3), on any device.
        indices: Dataset indices of the same images, (b,), in host memory.
        spec_1: Settings of the first view.
        spec_2: Settings of the second view.
        seed: Seed of the run, in [0, 2**64).
        epoch: Epoch, in [0, 2**64).
        size: Side S of the views in pixels.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, > 0.
        augmentation: "standard", or the name of one that somebody has registered: see :func:`own_view`.

    Returns:
        view_1 and view_2, each float32, (b, 3, S, S), channels_last, on the device of ``image``.

    Raises:
        ValueError: As ``sample_parameters`` and ``apply_view``.
    """
    require_images(image)
    if augmentation != "standard":
        own_1, own_2 = (
            own_view(augmentation, image, View(indices, seed, epoch, number, spec, size), mean=mean, std=std)
            for number, spec in ((1, spec_1), (2, spec_2))
        )
        return own_1, own_2
    height, width = image.shape[1:3]
    view_1, view_2 = (
        apply_view(
            image,
            sample_parameters(spec, indices, seed=seed, epoch=epoch, view=view, height=height, width=width),
            spec,
            size=size,
            mean=mean,
            std=std,
        )
        for view, spec in ((1, spec_1), (2, spec_2))
    )
    return view_1, view_2


@dataclass(frozen=True, eq=False)
class View:
    """One view of each image of a batch, for a function that somebody has registered to make its pixels from.

    All that it gives is a function of seed, epoch, image and view, so that such views are the same on every number of
    devices and after a resume, as the standard ones are.
    """

    indices: NDArray[np.integer[Any]] | Tensor
    """Dataset indices of the images, (b,), in host memory."""
    seed: int
    epoch: int
    number: int
    """1 or 2."""
    spec: ViewSpec
    """The settings --view-1 or --view-2."""
    size: int
    """Side S of the view in pixels."""

    def uniforms(self, number: int, device: torch.device | str = "cpu") -> Tensor:
        """Return ``number`` random numbers in [0, 1) for each image, float32 (b, number); the same at every call."""
        keys = image_keys(self.indices, seed=self.seed, epoch=self.epoch, view=self.number)
        u = uniforms(keys, range(Slot.OWN, Slot.OWN + number))
        return torch.from_numpy(np.floor(u * 2**24) * 2.0**-24).float().to(device)  # rounded down, so never to 1

    def standard(self, image: Tensor) -> Tensor:
        """Return the standard view, pixels in [0, 1], float32 (b, 3, S, S), to be changed further."""
        height, width = image.shape[1:3]
        parameters = sample_parameters(
            self.spec,
            self.indices,
            seed=self.seed,
            epoch=self.epoch,
            view=self.number,
            height=height,
            width=width,
        )
        return apply_view(image, parameters, self.spec, size=self.size, mean=(0, 0, 0), std=(1, 1, 1))


@torch.no_grad()
def own_view(name: str, image: Tensor, view: View, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute one view of each image by a function that somebody has registered (:mod:`simclr.parts`).

    Args:
        name: Of the function: (uint8 (b, H, W, 3), :class:`View`) -> pixels in [0, 1], floating point (b, 3, S, S).
        image: Stored pixels, uint8, (b, H, W, 3), on any device.
        view: Which view, of which images.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, > 0.

    Returns:
        float32, (b, 3, S, S), channels_last, on the device of ``image``: (pixel - mean) / std.

    Raises:
        ValueError: If the function returns anything else.
    """
    pixels = parts.VIEWS[name](image, view)
    expected = (len(image), 3, view.size, view.size)
    if not isinstance(pixels, Tensor) or pixels.shape != expected or not pixels.is_floating_point():
        what = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else f"a {type(pixels).__name__}"
        raise ValueError(f"the views {name} must be floating point {expected}, and are {what}")
    return _normalise(pixels.to(image.device).permute(1, 0, 2, 3).float().contiguous().clone(), mean, std)


def require_function_of_the_image(name: str, view: ViewSpec, *, size: int, stored: int) -> None:
    """Refuse registered views in which an image's view depends on anything but seed, epoch, image and view.

    Tried with three images of noise: each alone, and all three in another order.

    Args:
        name: Of the function.
        view: Its settings.
        size: Side of the views in pixels.
        stored: Side of the stored images in pixels.

    Raises:
        ValueError: If it does, or as :func:`own_view`.
    """
    noise = np.random.Philox(key=0).random_raw(3 * stored * stored * 3) % 256
    image, indices = torch.from_numpy(noise.astype(np.uint8)).view(3, stored, stored, 3), np.array([5, 0, 3])

    def make(rows: list[int]) -> Tensor:
        of = View(indices[rows], 1, 2, 1, view, size)
        return own_view(name, image[rows], of, mean=(0, 0, 0), std=(1, 1, 1))

    together, alone = make([2, 0, 1]), torch.cat([make([row]) for row in (2, 0, 1)])
    if not torch.allclose(together, alone, rtol=0, atol=1e-3):
        raise ValueError(
            f"the views {name} of an image differ from call to call, or with the other images of the batch, so that a "
            "run would depend on the number of devices; draw random numbers from view.uniforms only, and make each "
            "view from its image alone"
        )


@torch.no_grad()
def plain_view(image: Tensor, *, mean: Sequence[float], std: Sequence[float], size: int | None = None) -> Tensor:
    """The image itself, normalised and not augmented, as evaluation wants it.

    Args:
        image: Stored pixels, uint8, (b, H, W, 3), on any device.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, > 0.
        size: Side S in pixels to resize to, bilinear and antialiased. None: as stored.

    Returns:
        float32, (b, 3, H, W) or (b, 3, S, S), channels_last, on the device of ``image``: (pixel / 255 - mean) / std.

    Raises:
        ValueError: If ``image`` is not uint8 (b, H, W, 3), or ``mean`` or ``std`` do not fit.
    """
    require_images(image)
    plain = _normalise(image.permute(3, 0, 1, 2).float().div_(255), mean, std)
    if size is None or plain.shape[2:] == (size, size):
        return plain
    return F.interpolate(plain, (size, size), mode="bilinear", antialias=True)


def blur_kernel_size(spec: ViewSpec, size: int) -> int:
    """Width of the blur's kernel in pixels for a view of side ``size``.

    Without ``spec.blur_kernel`` it is the odd number 2 * (size // 10 // 2) + 1, and at least 3: 3 for 32,
    9 for 96, 23 for 224.

    Source:
        The SimCLR authors' TensorFlow code, which takes 10 % of the side and makes it odd.
    """
    return spec.blur_kernel if spec.blur_kernel is not None else max(3, 2 * (size // 10 // 2) + 1)


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


# Drawing parameters, on the host


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


# Computing pixels. ``planes`` is (3, b, S, S): each channel of the batch is one contiguous block, so that an
# operation between channels runs over long contiguous rows. Which images take part in an operation is known
# on the host, and nothing is read back from the device.


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _float32(array: NDArray[Any], device: torch.device) -> Tensor:
    return _to_device(array.astype(np.float32), device)


def _filter_rows(images: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows, with their own taps for each image.

    Args:
        images: (n, H, ...), contiguous.
        taps: Rows to sum for each output row, int64, (n, S, K), in [0, H).
        weights: Their weights, float32, (n, S, K).

    Returns:
        (n, S, ...), contiguous.
    """
    n, height, *row = images.shape
    _, size, num_taps = taps.shape
    first_row = torch.arange(0, n * height, height, device=images.device).view(n, 1, 1)
    # A bag is one output row: gather and weighted sum in one pass, in float32 also under autocast or TF32.
    rows = F.embedding_bag(
        (taps + first_row).view(-1, num_taps),
        images.view(n * height, math.prod(row)),
        mode="sum",
        per_sample_weights=weights.reshape(-1, num_taps),
    )
    return rows.view(n, size, *row)


def _filter_both(images: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """Filter rows, then columns, of (n, H, W, 3), contiguous; each argument is (taps, weights) of ``_filter_rows``.

    Returns:
        (3, n, S, S), contiguous.
    """
    # One name for all, so that each is freed as soon as the next is there and its memory is used again.
    images = _filter_rows(images, rows[0], rows[1])  # (n, S, W, 3)
    images = images.permute(0, 2, 3, 1).contiguous()
    images = _filter_rows(images, columns[0], columns[1])  # (n, S, 3, S): column, channel, row
    return images.permute(2, 0, 3, 1).contiguous()


def resize_filters(
    length: NDArray[np.int64], mirrored: NDArray[np.bool_], *, size: int, interpolation: Interpolation
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Taps and weights that resize an axis of ``length`` pixels to ``size`` pixels, for each of n lengths.

    The filter is as wide as a source pixel when enlarging and as a view pixel when shrinking (antialiasing); taps
    outside of the axis are left out and the others normalised, as torchvision and Pillow do.

    Args:
        length: Source pixels, (n,), >= 1.
        mirrored: Whether to reverse the result, (n,).
        size: S.
        interpolation: bilinear, a triangle; bicubic, Keys' cubic with a = -1/2.

    Returns:
        Taps, int64, in [0, length), and weights, computed in float64 and rounded to float32, both (n, S, K). K is
        the largest number of taps among the lengths; weights beyond a length's own number are 0.
    """
    lengths, is_mirrored = length[:, None, None].astype(np.float64), mirrored[:, None, None]
    radius = _RADIUS[interpolation]
    pixel = np.arange(size)[:, None]
    pixel = np.where(is_mirrored, size - 1 - pixel, pixel)
    scale = lengths / size
    stretch = np.maximum(scale, 1)
    centre = (pixel + 0.5) * scale
    # The taps start at the first source pixel whose centre is inside the filter, and end with the last one.
    tap = np.floor(centre - radius * stretch + 0.5) + np.arange(num_taps(length, size, interpolation).max(initial=1))
    distance = np.abs(tap + 0.5 - centre) / stretch
    if interpolation == "bilinear":
        weight = np.maximum(1 - distance, 0)
    else:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = np.where(distance < 1, near, far) * (distance < 2)
    weight *= (tap >= 0) & (tap < lengths)
    weight /= weight.sum(axis=2, keepdims=True)
    return tap.clip(0, lengths - 1).astype(np.int64), weight.astype(np.float32)


def num_taps(length: NDArray[np.int64], size: int, interpolation: Interpolation) -> NDArray[np.int64]:
    """How many source pixels the filter of each length spans at most."""
    taps: NDArray[np.int64] = np.ceil(2 * _RADIUS[interpolation] * np.maximum(length / size, 1)).astype(np.int64)
    return taps


def _resize_taps(
    start: NDArray[np.int64],
    length: NDArray[np.int64],
    mirrored: NDArray[np.bool_],
    *,
    size: int,
    interpolation: Interpolation,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Taps and weights that resize pixels [start, start + length) of one axis to ``size`` pixels.

    Many crops have the same length, so that the weights are computed once for each length and looked up for each
    image.

    Returns:
        Taps, int64, and weights, float32, both (n, S, K), on ``device``.
    """
    kinds, kind = np.unique(2 * length + mirrored, return_inverse=True)
    tap, weight = resize_filters(kinds // 2, kinds % 2 == 1, size=size, interpolation=interpolation)
    index = _to_device(kind, device)
    taps = _to_device(tap, device).index_select(0, index)
    taps += _to_device(start, device).view(-1, 1, 1)
    return taps, _to_device(weight, device).index_select(0, index)


def _crop_resize_flip(image: Tensor, p: ViewParameters, size: int, interpolation: Interpolation) -> Tensor:
    """Pixels in [0, 1] of the resized and possibly mirrored crops, (3, b, S, S)."""
    taps = functools.partial(_resize_taps, size=size, interpolation=interpolation, device=image.device)
    rows = taps(p.crop_top, p.crop_height, np.zeros_like(p.flip))
    columns = taps(p.crop_left, p.crop_width, p.flip)
    return _filter_both(image.to(torch.float32, memory_format=torch.contiguous_format), rows, columns).div_(255)


def _luma(planes: Tensor) -> Tensor:
    red, green, blue = planes.unbind()
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _jitter(planes: Tensor, p: ViewParameters) -> None:
    """Apply the four colour operations in place, each image in its own order.

    Brightness, contrast and saturation are one operation: clamp(f * x + (1 - f) * t), where the target t is
    0, the mean luma or the luma. So images are grouped by the position of hue alone: 4 groups, not 24.
    """
    factors = np.stack([p.brightness, p.contrast, p.saturation, p.hue], axis=1)  # (b, 4), by JitterOperation
    factors = np.take_along_axis(factors, p.jitter_order, axis=1)  # (b, 4), by position
    to_mean = np.where(p.jitter_order == JitterOperation.CONTRAST, 1 - factors, 0)
    to_luma = np.where(p.jitter_order == JitterOperation.SATURATION, 1 - factors, 0)
    coefficients = np.stack([factors, to_mean, to_luma], axis=2)  # (b, 4, 3)
    for hue_position in range(4):
        is_member = p.jitter & (p.jitter_order[:, hue_position] == JitterOperation.HUE)
        members = np.flatnonzero(is_member)
        if members.size == 0:
            continue
        index = _to_device(members, planes.device)
        group = planes.index_select(1, index).flatten(2)  # (3, n, S * S)
        steps = _float32(coefficients[members], planes.device).permute(1, 2, 0).unsqueeze(3)  # (4, 3, n, 1)
        for position, (factor, mean_weight, luma_weight) in enumerate(steps):
            if position == hue_position:
                _shift_hue(group, factor)
            else:
                target = _luma(group)
                mean = target.mean(dim=1, keepdim=True)
                target.mul_(luma_weight).add_(mean.mul_(mean_weight))
                torch.addcmul(target, group, factor, out=group).clamp_(0, 1)
        planes.index_copy_(1, index, group.view(3, -1, *planes.shape[2:]))


def _shift_hue(planes: Tensor, turns: Tensor) -> None:
    """Add ``turns``, (n, 1), to the hue of (3, n, pixels) in place; value and saturation stay.

    This is HSV and back without its six cases. With M and m the largest and smallest channel and h the hue in
    sixths of a turn, h = t where green >= blue and h = -t elsewhere, t = (green + blue - red + M - 2 m) / (M - m).
    Back, red = m + (M - m) clamp(|h - 3| - 1), green = M - (M - m) clamp(|h - 2| - 1) and
    blue = M - (M - m) clamp(|h - 4| - 1) for h in [0, 6) and a clamp to [0, 1]. Both ways are continuous, so
    rounding cannot pick a wrong sector; and nothing branches on the data, which costs more than the arithmetic.
    """
    red, green, blue = planes.unbind()
    largest = torch.maximum(red, green)
    torch.maximum(largest, blue, out=largest)
    smallest = torch.minimum(red, green)
    torch.minimum(smallest, blue, out=smallest)
    chroma = largest - smallest
    hue = (green + blue).sub_(red).add_(largest).sub_(smallest, alpha=2)
    scratch = chroma.clamp(min=1e-12)  # a gray pixel has no hue, and any value does: its chroma is 0
    hue.div_(scratch)
    torch.sub(green, blue, out=scratch)
    hue.copysign_(scratch).add_(6 * turns)
    torch.div(hue, 6, out=scratch)
    hue.sub_(scratch.floor_(), alpha=6)
    for channel, centre in ((red, 3), (green, 2), (blue, 4)):
        share = torch.sub(hue, centre, out=scratch).abs_().sub_(1).clamp_(0, 1)
        if channel is red:
            torch.addcmul(smallest, chroma, share, out=channel)
        else:
            torch.addcmul(largest, chroma, share, value=-1, out=channel)


def _grayscale(planes: Tensor, p: ViewParameters) -> None:
    if p.grayscale.any():
        index = _to_device(np.flatnonzero(p.grayscale), planes.device)
        luma = _luma(planes.index_select(1, index))
        planes.index_copy_(1, index, luma.expand(3, -1, -1, -1))


def _blur(planes: Tensor, p: ViewParameters, spec: ViewSpec) -> None:
    """Separable Gaussian in place, with reflected borders."""
    if not p.blur.any():
        return
    size = planes.shape[-1]
    kernel = blur_kernel_size(spec, size)
    require_blur_fits(kernel, size)
    reach = kernel // 2
    members = np.flatnonzero(p.blur)
    offset = np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (offset / p.blur_sigma[members, None]) ** 2)
    weight /= weight.sum(axis=1, keepdims=True)
    mirrored = np.abs(np.arange(size)[:, None] + offset)
    taps = size - 1 - np.abs(size - 1 - mirrored)  # (S, K)

    index = _to_device(members, planes.device)
    shape = (len(members), size, kernel)
    both = (
        _to_device(taps, planes.device).expand(shape),
        _float32(weight[:, None], planes.device).expand(shape),
    )
    blurred = _filter_both(planes.index_select(1, index).permute(1, 2, 3, 0).contiguous(), both, both)
    planes.index_copy_(1, index, blurred)


def _solarise(planes: Tensor, p: ViewParameters, threshold: float) -> None:
    if p.solarise.any():
        index = _to_device(np.flatnonzero(p.solarise), planes.device)
        group = planes.index_select(1, index)
        planes.index_copy_(1, index, torch.where(group >= threshold, 1 - group, group))


def _normalise(planes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(planes - mean) / std of (3, b, H, W) as channels_last (b, 3, H, W); overwrites ``planes``."""
    require_normalisation(mean, std)
    for plane, centre, scale in zip(planes, mean, std, strict=True):
        plane.sub_(centre).div_(scale)
    return planes.permute(1, 2, 3, 0).contiguous().permute(0, 3, 1, 2)


# Checking input


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_number(name: str, value: object, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        allowed = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and >= {low:g}"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")


def _range(name: str, value: object, high: float) -> tuple[float, float]:
    if isinstance(value, tuple | list) and len(value) == 2:
        first, last = value
        if _is_number(first) and _is_number(last) and 0 < first <= last <= high:
            return (float(first), float(last))
    bound = f" <= {high:g}" if math.isfinite(high) else ", both finite"
    raise ValueError(f"{name} must be (low, high) with 0 < low <= high{bound}, got {value!r}")


def require_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError unless both hold one finite number per channel, the deviations > 0."""
    if len(mean) != 3 or not all(math.isfinite(value) for value in mean):
        raise ValueError(f"mean must be 3 finite numbers, one per channel, got {mean!r}")
    if len(std) != 3 or not all(math.isfinite(value) and value > 0 for value in std):
        raise ValueError(f"std must be 3 finite numbers > 0, one per channel, got {std!r}")


def require_view_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless the compiled ways of making views (:mod:`simclr.fast`) can write this dtype."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")


def require_blur_fits(kernel: int, size: int) -> None:
    """Raise ValueError if a blur of ``kernel`` pixels cannot reflect the border of a view of side ``size``."""
    if kernel // 2 >= size:
        raise ValueError(
            f"blur_kernel {kernel} is too wide to reflect the border of a {size} px view; "
            f"it must be at most {2 * size - 1}"
        )


def require_images(image: Tensor) -> None:
    """Raise ValueError unless ``image`` is uint8 (b, H, W, 3)."""
    if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[3] != 3 or 0 in image.shape[1:3]:
        raise ValueError(f"image must be uint8 of shape (b, H, W, 3), got {image.dtype} of shape {tuple(image.shape)}")


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
