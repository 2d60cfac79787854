"""Views on GPUs: both views of a batch in one Triton launch, from stored pixels to what the network reads.

:mod:`simclr.views` says what a view is and draws its parameters: here those of all images that this rank reads in an
epoch at once, as a table that lies on the device (:func:`parameter_table`), so that a batch costs the host one launch
and no arithmetic. Only the
arithmetic on pixels is written again. It rounds differently: :data:`TOLERANCE`.

Each program makes one view of one image, in blocks of pixels. The mean that contrast needs is known only after all
pixels have passed the operations before it, so pixels are computed twice where colours are jittered; a view may then be
of any size. A blur needs finished neighbours: where one can occur, the first launch leaves its pixels in float32, and a
second one blurs, solarises and normalises them.

With ``TRITON_INTERPRET=1`` in the environment before this module is imported, the kernels run on CPU tensors, slowly,
for tests.

Shape letters: n images in the table, m images in memory, b images of a batch, H and W their height and width, S side
of the views.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# What is marked @triton.jit is in Triton's language, which only looks like Python.

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from simclr.views import ViewSpec, sample_parameters
from simclr.views.pixels import blur_kernel_size, require_blur_fits, require_normalisation, require_view_dtype

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TOLERANCE = 1e-5
"""Largest difference from :func:`simclr.views.apply_view` in float32, on pixels in [0, 1], before normalising.

As for the fused views, and here filter weights are float32 from the start. Where a pixel lies this close to the
threshold of solarise, one may invert it and the other not.
"""

# Columns of the table, float32. Four of the order and four factors, in the order of views.JitterOperation.
_TOP, _LEFT, _HEIGHT, _WIDTH, _FLIP, _JITTER, _ORDER, _FACTOR, _GRAY, _BLUR, _SIGMA, _SOLARISE = (
    tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 6, 10, 14, 15, 16, 17)
)
_COLUMNS = tl.constexpr(18)
_CONTRAST, _HUE = tl.constexpr(1), tl.constexpr(3)  # views.JitterOperation
_MOST_PIXELS = 1024  # in a block
_BICUBIC = {"bilinear": 0, "bicubic": 1}


def parameter_table(
    specs: tuple[ViewSpec, ViewSpec], indices: NDArray[np.int64], *, seed: int, epoch: int, height: int, width: int
) -> Tensor:
    """Draw the parameters of both views of an epoch's images, with the same bits as batch by batch.

    Args:
        specs: Settings of the first and of the second view.
        indices: The images' positions in the data file, (n,).
        seed: Seed of the run.
        epoch: From 0.
        height: H.
        width: W.

    Returns:
        float32, (n, 2, columns), in host memory: what :class:`TritonViews` takes.
    """
    table = np.empty((len(indices), 2, _COLUMNS.value), np.float32)
    for i, spec in enumerate(specs):
        p = sample_parameters(spec, indices, seed=seed, epoch=epoch, view=i + 1, height=height, width=width)
        columns = [p.crop_top, p.crop_left, p.crop_height, p.crop_width, p.flip, p.jitter, *p.jitter_order.T]
        columns += [p.brightness, p.contrast, p.saturation, p.hue, p.grayscale, p.blur, p.blur_sigma, p.solarise]
        for column, values in enumerate(columns):
            table[:, i, column] = values
    return torch.from_numpy(table)


class TritonViews:
    """Makes both views of a batch on a GPU.

    Args:
        spec_1: Settings of the first view.
        spec_2: Settings of the second view.
        size: S.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, > 0.
        dtype: Of the views: float32, bfloat16 or float16.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        spec_1: ViewSpec,
        spec_2: ViewSpec,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        require_view_dtype(dtype)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        require_normalisation(mean, std)
        self.specs, self.size, self.dtype = (spec_1, spec_2), size, dtype
        self._normalisation = (*(float(value) for value in mean), *(1 / float(value) for value in std))
        self._reach = [0, 0]
        for i, spec in enumerate(self.specs):
            if spec.blur_probability:
                kernel = blur_kernel_size(spec, size)
                require_blur_fits(kernel, size)
                self._reach[i] = kernel // 2
        self._block = min(_MOST_PIXELS, triton.next_power_of_2(size * size))

    def __call__(self, image: Tensor, row: Tensor, table: Tensor, entry: Tensor) -> Tensor:
        """Make both views of b images, without waiting for the device.

        Args:
            image: Stored pixels, uint8, (m, H, W, 3), contiguous.
            row: Which of them, int64, (b,), in [0, m).
            table: Of :func:`parameter_table`, for images of this size.
            entry: Rows of the table for them, int64, (b,), in [0, n).

        Returns:
            (2b, 3, S, S), channels_last: the b first views, then the b second ones; (pixel - mean) / std.
        """
        b, size = len(row), self.size
        out = torch.empty(2 * b, size, size, 3, dtype=self.dtype, device=image.device)
        blurs = max(self._reach) > 0
        first = torch.empty_like(out, dtype=torch.float32) if blurs else out
        one, two = self.specs
        thresholds = (one.solarise_threshold, two.solarise_threshold)
        _make_views[(b, 2)](
            image, row, table, entry, first, image.shape[1], image.shape[2], b,
            _BICUBIC[one.interpolation], _BICUBIC[two.interpolation], *thresholds, *self._normalisation,
            SIZE=size, BLOCK=self._block, FINISH=not blurs,
        )  # fmt: skip
        if blurs:
            _blur_and_finish[(b, 2)](
                first, table, entry, out, b, *self._reach, *thresholds, *self._normalisation,
                SIZE=size, BLOCK=self._block,
            )  # fmt: skip
        return out.permute(0, 3, 1, 2)


@triton.jit
def _luma(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _weight(tap, centre, stretch, length, bicubic):
    """The filter of views.resize_filters, before it is normalised."""
    distance = tl.abs(tap + 0.5 - centre) / stretch
    if bicubic:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = tl.where(distance < 1, near, tl.where(distance < 2, far, 0.0))
    else:
        weight = tl.maximum(1 - distance, 0.0)
    return tl.where((tap >= 0) & (tap < length), weight, 0.0)


@triton.jit
def _resized(pixels, row, pixel, bicubic, width, SIZE: tl.constexpr):
    """Crop, resize and flip: three channels in [0, 1] of the view's pixels."""
    top, left = tl.load(row + _TOP), tl.load(row + _LEFT)
    crop_height, crop_width = tl.load(row + _HEIGHT), tl.load(row + _WIDTH)
    y, x = tl.minimum(pixel // SIZE, SIZE - 1), pixel % SIZE  # beyond the last pixel: any, it is not stored
    x = tl.where(tl.load(row + _FLIP) > 0, SIZE - 1 - x, x)
    radius = tl.where(bicubic > 0, 2.0, 1.0)
    scale_y, scale_x = crop_height / SIZE, crop_width / SIZE
    stretch_y, stretch_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    centre_y, centre_x = (y + 0.5) * scale_y, (x + 0.5) * scale_x
    first_y = tl.floor(centre_y - radius * stretch_y + 0.5)
    first_x = tl.floor(centre_x - radius * stretch_x + 0.5)
    red = pixel * 0.0
    green, blue, sum_y, sum_x = red, red, red, red
    for step_y in range(tl.ceil(2 * radius * stretch_y).to(tl.int32)):
        tap_y = first_y + step_y
        weight_y = _weight(tap_y, centre_y, stretch_y, crop_height, bicubic)
        sum_y += weight_y
        source_y = (top + tl.minimum(tl.maximum(tap_y, 0.0), crop_height - 1)).to(tl.int32)
        line_red, line_green, line_blue = red * 0.0, red * 0.0, red * 0.0
        sum_x = red * 0.0
        for step_x in range(tl.ceil(2 * radius * stretch_x).to(tl.int32)):
            tap_x = first_x + step_x
            weight_x = _weight(tap_x, centre_x, stretch_x, crop_width, bicubic)
            sum_x += weight_x
            source_x = (left + tl.minimum(tl.maximum(tap_x, 0.0), crop_width - 1)).to(tl.int32)
            at = pixels + (source_y * width + source_x) * 3
            line_red += weight_x * tl.load(at).to(tl.float32)
            line_green += weight_x * tl.load(at + 1).to(tl.float32)
            line_blue += weight_x * tl.load(at + 2).to(tl.float32)
        red += weight_y * line_red
        green += weight_y * line_green
        blue += weight_y * line_blue
    scale = 1.0 / (255.0 * sum_y * sum_x)
    red, green, blue = red * scale, green * scale, blue * scale
    if bicubic:
        red, green, blue = _unit(red), _unit(green), _unit(blue)
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, row, until, mean_luma):
    """The first ``until`` colour operations; contrast, if among them, towards ``mean_luma``."""
    for position in range(until):
        operation = tl.load(row + _ORDER + position).to(tl.int32)
        factor = tl.load(row + _FACTOR + operation)
        if operation == _HUE:  # views.pixels._shift_hue
            largest, smallest = tl.maximum(tl.maximum(red, green), blue), tl.minimum(tl.minimum(red, green), blue)
            chroma = largest - smallest
            hue = (green + blue - red + largest - 2 * smallest) / tl.maximum(chroma, 1e-12)
            hue = tl.where(green >= blue, hue, -hue) + 6 * factor
            hue = hue - 6 * tl.floor(hue / 6)
            red = smallest + chroma * _unit(tl.abs(hue - 3) - 1)
            green = largest - chroma * _unit(tl.abs(hue - 2) - 1)
            blue = largest - chroma * _unit(tl.abs(hue - 4) - 1)
        else:
            target = _luma(red, green, blue)  # of saturation
            if operation == _CONTRAST:
                target = target * 0.0 + mean_luma
            if operation == 0:  # brightness
                target = target * 0.0
            red = _unit(factor * red + (1 - factor) * target)
            green = _unit(factor * green + (1 - factor) * target)
            blue = _unit(factor * blue + (1 - factor) * target)
    return red, green, blue


@triton.jit
def _finish(at, red, green, blue, solarise, threshold, m0, m1, m2, s0, s1, s2, inside):
    """Solarise, normalise and store."""
    if solarise > 0:
        red = tl.where(red >= threshold, 1 - red, red)
        green = tl.where(green >= threshold, 1 - green, green)
        blue = tl.where(blue >= threshold, 1 - blue, blue)
    tl.store(at, ((red - m0) * s0).to(at.dtype.element_ty), mask=inside)
    tl.store(at + 1, ((green - m1) * s1).to(at.dtype.element_ty), mask=inside)
    tl.store(at + 2, ((blue - m2) * s2).to(at.dtype.element_ty), mask=inside)


@triton.jit
def _make_views(
    images, rows, table, index, out, height, width, batch, bicubic_1, bicubic_2, threshold_1, threshold_2,
    m0, m1, m2, s0, s1, s2, SIZE: tl.constexpr, BLOCK: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    i, view = tl.program_id(0), tl.program_id(1)
    pixels = images + tl.load(rows + i).to(tl.int64) * height * width * 3
    row = table + (tl.load(index + i).to(tl.int64) * 2 + view) * _COLUMNS
    bicubic = tl.where(view == 0, bicubic_1, bicubic_2)
    threshold = tl.where(view == 0, threshold_1, threshold_2)
    jitters = tl.load(row + _JITTER) > 0
    mean_luma = 0.0
    if jitters:
        before = 0  # operations before contrast
        for position in range(1, 4):
            before = tl.where(tl.load(row + _ORDER + position) == _CONTRAST, position, before)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, SIZE * SIZE, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            red, green, blue = _resized(pixels, row, pixel, bicubic, width, SIZE)
            red, green, blue = _jitter(red, green, blue, row, before, 0.0)
            total += tl.where(pixel < SIZE * SIZE, _luma(red, green, blue), 0.0)
        mean_luma = tl.sum(total) / (SIZE * SIZE)
    for start in range(0, SIZE * SIZE, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        red, green, blue = _resized(pixels, row, pixel, bicubic, width, SIZE)
        if jitters:
            red, green, blue = _jitter(red, green, blue, row, 4, mean_luma)
        if tl.load(row + _GRAY) > 0:
            red = _luma(red, green, blue)
            green, blue = red, red
        at = out + ((view * batch + i).to(tl.int64) * SIZE * SIZE + pixel) * 3
        inside = pixel < SIZE * SIZE
        if FINISH:
            _finish(
                at, red, green, blue, tl.load(row + _SOLARISE), threshold, m0, m1, m2, s0, s1, s2, inside
            )  # fmt: skip
        else:
            tl.store(at, red, mask=inside)
            tl.store(at + 1, green, mask=inside)
            tl.store(at + 2, blue, mask=inside)


@triton.jit
def _blur_and_finish(
    first, table, index, out, batch, reach_1, reach_2, threshold_1, threshold_2, m0, m1, m2, s0, s1, s2,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, view = tl.program_id(0), tl.program_id(1)
    row = table + (tl.load(index + i).to(tl.int64) * 2 + view) * _COLUMNS
    threshold = tl.where(view == 0, threshold_1, threshold_2)
    reach = tl.where(tl.load(row + _BLUR) > 0, tl.where(view == 0, reach_1, reach_2), 0)
    falloff = -0.5 / (tl.load(row + _SIGMA) * tl.load(row + _SIGMA))
    total = 0.0
    for offset in range(-reach, reach + 1):
        total += tl.exp(falloff * offset * offset)
    base = (view * batch + i).to(tl.int64) * SIZE * SIZE
    for start in range(0, SIZE * SIZE, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        inside = pixel < SIZE * SIZE
        y, x = tl.minimum(pixel // SIZE, SIZE - 1), pixel % SIZE
        red = pixel * 0.0
        green, blue = red, red
        for step_y in range(-reach, reach + 1):
            source_y = SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(y + step_y))  # the border reflects
            weight_y = tl.exp(falloff * step_y * step_y) / total
            for step_x in range(-reach, reach + 1):
                source_x = SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(x + step_x))
                weight = weight_y * tl.exp(falloff * step_x * step_x) / total
                at = first + (base + source_y * SIZE + source_x) * 3
                red += weight * tl.load(at)
                green += weight * tl.load(at + 1)
                blue += weight * tl.load(at + 2)
        to = out + (base + pixel) * 3
        _finish(
            to, red, green, blue, tl.load(row + _SOLARISE), threshold, m0, m1, m2, s0, s1, s2, inside
        )  # fmt: skip
