"""The pixels of a view, from stored images and parameters, by batched torch operations.

``planes`` is (3, b, S, S): each channel of the batch is one contiguous block, so that an operation between channels
runs over long contiguous rows. Which images take part in an operation is known on the host, and nothing is read back
from the device. Shape letters:

    b   images in this call       H, W   stored height and width       S   side of the square view
    n   images in a sub-batch     K      filter taps per output pixel
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr.views.parameters import (
    Interpolation,
    JitterOperation,
    ViewParameters,
    ViewSpec,
    is_integer,
    require_fitting,
)

_RADIUS: dict[Interpolation, int] = {"bilinear": 1, "bicubic": 2}  # of the filter, in pixels


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
    if not is_integer(size) or size < 1:
        raise ValueError(f"size must be an integer >= 1, got {size!r}")

    planes = _crop_resize_flip(image, parameters, size, spec.interpolation)  # (3, b, S, S)
    if spec.interpolation == "bicubic":
        planes.clamp_(0, 1)
    _jitter(planes, parameters)
    _grayscale(planes, parameters)
    _blur(planes, parameters, spec)
    _solarise(planes, parameters, spec.solarise_threshold)
    return normalise(planes, mean, std)


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
    plain = normalise(image.permute(3, 0, 1, 2).float().div_(255), mean, std)
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


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _float32(array: NDArray[Any], device: torch.device) -> Tensor:
    return _to_device(array.astype(np.float32), device)


def _crop_resize_flip(image: Tensor, p: ViewParameters, size: int, interpolation: Interpolation) -> Tensor:
    """Pixels in [0, 1] of the resized and possibly mirrored crops, (3, b, S, S)."""
    taps = functools.partial(_resize_taps, size=size, interpolation=interpolation, device=image.device)
    rows = taps(p.crop_top, p.crop_height, np.zeros_like(p.flip))
    columns = taps(p.crop_left, p.crop_width, p.flip)
    return _filter_both(image.to(torch.float32, memory_format=torch.contiguous_format), rows, columns).div_(255)


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


def normalise(planes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(planes - mean) / std of (3, b, H, W) as channels_last (b, 3, H, W); overwrites ``planes``."""
    require_normalisation(mean, std)
    for plane, centre, scale in zip(planes, mean, std, strict=True):
        plane.sub_(centre).div_(scale)
    return planes.permute(1, 2, 3, 0).contiguous().permute(0, 3, 1, 2)


def require_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError unless both hold one finite number per channel, the deviations > 0."""
    if len(mean) != 3 or not all(math.isfinite(value) for value in mean):
        raise ValueError(f"mean must be 3 finite numbers, one per channel, got {mean!r}")
    if len(std) != 3 or not all(math.isfinite(value) and value > 0 for value in std):
        raise ValueError(f"std must be 3 finite numbers > 0, one per channel, got {std!r}")


def require_view_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless the compiled ways of making views can write this dtype."""
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
