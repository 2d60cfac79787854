"""Views on CPUs: every operation of :mod:`simclr.views` in one compiled pass over each image.

An image of 32 x 32 stays in the first-level cache from its stored pixels to its finished view. Parameters are drawn by
:func:`simclr.views.sample_parameters` and filter weights by :func:`simclr.views.resize_filters`, so that only the
arithmetic on pixels is written twice. It rounds differently: :data:`TOLERANCE`.

Compiled with numba, which is there wherever FFCV is (Linux; the extra "ffcv"). numba's own threads are not used: they
abort the process when two callers meet, hang after a fork, and share their number with FFCV. Compiled code lets go
of the interpreter, so ordinary threads each compute a part of a batch.

Shape letters: b images, H and W their height and width, S side of the views, N = S * S pixels, K filter taps.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import llvmlite.binding
import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr.views import ViewParameters, ViewSpec, sample_parameters
from simclr.views.parameters import JitterOperation, require_fitting
from simclr.views.pixels import (
    blur_kernel_size,
    num_taps,
    require_blur_fits,
    require_images,
    require_normalisation,
    require_view_dtype,
    resize_filters,
)

TOLERANCE = 4e-6
"""Largest difference from :func:`simclr.views.apply_view` in float32, on pixels in [0, 1], before normalising.

Both make some thirty roundings of 2**-24 = 6e-8 per pixel, and jitter multiplies what was rounded before it by its
factors, up to 1.8**3 = 6 at the strongest settings. Where a pixel lies this close to the threshold of solarise, one may
invert it and the other not.
"""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Array = NDArray[Any]


class FusedViews:
    """Makes both views of a batch. Close it, or use it as a context manager, to end its threads.

    Args:
        spec_1: Settings of the first view.
        spec_2: Settings of the second view.
        size: Side S of the views in pixels.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, > 0.
        dtype: Of the views: float32, or bfloat16 or float16, rounded to nearest, ties to even.
        pin_memory: Whether the views are put into memory that a GPU can copy from by itself.
        threads: How many share a batch, >= 1; no effect on the result. 1 is the calling thread.

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
        threads: int = 1,
        pin_memory: bool = False,
    ) -> None:
        require_view_dtype(dtype)
        if size < 1 or threads < 1:
            raise ValueError(f"size and threads must be at least 1, got size {size} and threads {threads}")
        require_normalisation(mean, std)
        self.specs, self.size, self.dtype, self.threads = (spec_1, spec_2), size, dtype, threads
        self._pin_memory = pin_memory
        self._mean = np.array(mean, np.float32)
        self._scale = (1 / np.array(std, np.float64)).astype(np.float32)
        self._kernel = compiled().kernel
        self._pool = ThreadPoolExecutor(threads, "views") if threads > 1 else None

    def __call__(self, image: Tensor, indices: NDArray[np.integer[Any]] | Tensor, *, seed: int, epoch: int) -> Tensor:
        """Make both views of each image.

        Args:
            image: Stored pixels, uint8, (b, H, W, 3), in host memory.
            indices: Dataset indices of the same images, (b,), in host memory.
            seed: Seed of the run.
            epoch: Epoch.

        Returns:
            (2b, 3, S, S), channels_last: the b first views, then the b second ones.

        Raises:
            ValueError: As :func:`simclr.views.two_views`.
        """
        require_images(image)
        height, width = image.shape[1:3]
        drawn = [
            sample_parameters(spec, indices, seed=seed, epoch=epoch, view=view, height=height, width=width)
            for view, spec in enumerate(self.specs, start=1)
        ]
        return self.apply(image, drawn)

    def apply(self, image: Tensor, drawn: Sequence[ViewParameters]) -> Tensor:
        """Make both views with the given parameters of view 1 and view 2; the rest is as in calling the object."""
        require_images(image)
        if image.device.type != "cpu":
            raise ValueError(f"image must be in host memory, got a tensor on {image.device}; use simclr.views there")
        for parameters in drawn:
            require_fitting(parameters, image)
        b, height, width = image.shape[:3]
        pixels = image.contiguous().numpy().reshape(b, height, 3 * width)
        views = self._memory((2 * b, self.size, self.size, 3))
        # numpy has no bfloat16, so that shorter floats are written as bit patterns
        bits = views if self.dtype == torch.float32 else views.view(torch.uint16)
        out = bits.numpy().reshape(2, b, self.size * self.size * 3)
        jobs = [
            (_prepare(parameters, spec, self.size), out_of_view)
            for parameters, spec, out_of_view in zip(drawn, self.specs, out, strict=True)
        ]
        if self._pool is None:
            for job in jobs:
                self._compute(pixels, *job, slice(0, b))
        else:  # four parts of a view for each thread, as one may be held up by other work
            parts = 4 * self.threads
            slices = [slice(b * part // parts, b * (part + 1) // parts) for part in range(parts)]
            list(
                self._pool.map(
                    lambda work: self._compute(pixels, *work), [(*job, part) for job in jobs for part in slices]
                )
            )
        return views.permute(0, 3, 1, 2)

    def _memory(self, shape: tuple[int, ...]) -> Tensor:
        if self._pin_memory:
            return torch.empty(shape, dtype=self.dtype, pin_memory=True)
        # From numpy, which asks Linux for large pages: page faults in memory from torch took 14 us an image.
        memory = torch.from_numpy(np.empty(shape, np.float32 if self.dtype == torch.float32 else np.uint16))
        return memory.view(self.dtype)

    def _compute(self, pixels: _Array, p: _Prepared, out: _Array, part: slice) -> None:
        out_32, out_16 = (out, _NO_16) if out.dtype == np.float32 else (_NO_32, out)
        self._kernel(
            pixels[part],
            p.box[part],
            p.kind[part],
            p.flags[part],
            p.order[part],
            p.factors[part],
            p.sigma[part],
            *(p.taps, p.weights, p.counts, p.cubic, p.blur_kernel, p.threshold),
            *(self._mean, self._scale, _KINDS[self.dtype]),
            *(out_32[part], out_16[part]),
        )

    def close(self) -> None:
        """End the threads. May be called twice."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> FusedViews:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Prepared(NamedTuple):
    """A view's parameters as the compiled code takes them; b rows each, but for the filters."""

    box: _Array  # int64 (b, 3): top, left and width of the crop
    kind: _Array  # int64 (b, 2): rows of ``taps`` for the vertical and the horizontal axis
    flags: _Array  # bool (b, 5): flip, jitter, grayscale, blur, solarise
    order: _Array  # int64 (b, 4)
    factors: _Array  # float32 (b, 4), by JitterOperation
    sigma: _Array  # float64 (b,)
    taps: _Array  # uint64 (lengths, K, S), K even
    weights: _Array  # float32 (lengths, K, S)
    counts: _Array  # int64 (lengths,): taps that a length uses, made even
    cubic: bool
    blur_kernel: int
    threshold: np.float32


def _prepare(p: ViewParameters, spec: ViewSpec, size: int) -> _Prepared:
    lengths, kind = np.unique(np.stack([p.crop_height, p.crop_width], axis=1), return_inverse=True)
    taps, weights = resize_filters(lengths, np.zeros(len(lengths), bool), size=size, interpolation=spec.interpolation)
    even = ((0, 0), (0, 0), (0, taps.shape[2] % 2))  # a tap of weight 0 more
    taps, weights = np.pad(taps, even).transpose(0, 2, 1), np.pad(weights, even).transpose(0, 2, 1)
    counts = num_taps(lengths, size, spec.interpolation)
    kernel = blur_kernel_size(spec, size)
    if p.blur.any():
        require_blur_fits(kernel, size)
    return _Prepared(
        box=np.stack([p.crop_top, p.crop_left, p.crop_width], axis=1),
        kind=kind.reshape(-1, 2),
        flags=np.stack([p.flip, p.jitter, p.grayscale, p.blur, p.solarise], axis=1),
        order=p.jitter_order,
        factors=np.stack([p.brightness, p.contrast, p.saturation, p.hue], axis=1).astype(np.float32),
        sigma=p.blur_sigma,
        taps=taps.astype(np.uint64, order="C"),
        weights=np.ascontiguousarray(weights),
        counts=counts + counts % 2,
        cubic=spec.interpolation == "bicubic",
        blur_kernel=kernel,
        threshold=np.float32(spec.solarise_threshold),
    )


_NO_32, _NO_16 = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint16)


# ---------------------------------------------------------------------------------------------------------------
# Compiling


class Compiled(NamedTuple):
    """The compiled code, and how it came about, for people."""

    kernel: Callable[..., None]
    how: str


@functools.cache
def compiled() -> Compiled:
    """Compile, or load what an earlier process compiled (some seconds, or a tenth of one)."""
    config: Any = numba.config
    if config.DISABLE_JIT:
        raise ValueError("NUMBA_DISABLE_JIT is set, so that no views can be compiled: unset it, or use --views torch")
    started = time.perf_counter()
    folder = cache_folder()
    kernel = numba.njit(**_OPTIONS)(_views)
    if folder is None:
        _call_with_nothing(kernel)
        return Compiled(kernel, f"compiled in {time.perf_counter() - started:.1f} s; there is no folder to keep it in")
    before = config.CACHE_DIR
    try:
        config.CACHE_DIR = str(folder)
        kernel.enable_caching()
    finally:
        config.CACHE_DIR = before
    try:
        _call_with_nothing(kernel)
    except Exception:  # whatever a damaged file makes of being loaded: it is written anew
        shutil.rmtree(folder, ignore_errors=True)
        compiled.cache_clear()
        kernel = numba.njit(**_OPTIONS)(_views)
        _call_with_nothing(kernel)
        return Compiled(
            kernel, f"compiled in {time.perf_counter() - started:.1f} s; {folder} was damaged and is removed"
        )
    did = "loaded" if kernel.stats.cache_hits else "compiled"
    return Compiled(kernel, f"{did} in {time.perf_counter() - started:.1f} s, kept in {folder}")


def cache_folder() -> Path | None:
    """Where compiled code is kept between processes; None if it cannot be kept.

    Below ``XDG_CACHE_HOME`` or ~/.cache, or the folder for temporary files where those are read-only; never beside the
    source, which may be read-only or shared by machines with other processors. One folder for each source text, numba
    and processor, so that processes that compile at the same time write the same files, each in one piece.
    """
    if not hasattr(os, "getuid"):  # Windows
        return None
    host = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    text = f"{numba.__version__} {np.__version__} {host} {os.environ.get('NUMBA_CPU_NAME')}"
    key = hashlib.sha256(text.encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    user = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    for parent in (Path(user, "simclr"), Path(tempfile.gettempdir(), f"simclr-{os.getuid()}")):
        folder = parent / f"views-{key}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError:
            continue
        if about.st_uid == os.getuid() and not about.st_mode & 0o022:  # what lies there is executed
            return folder
    return None


def _call_with_nothing(kernel: Callable[..., None]) -> None:
    """Make numba compile for the types that :meth:`FusedViews.apply` passes."""
    nothing = sample_parameters(ViewSpec(), np.empty(0, np.int64), seed=0, epoch=0, view=1, height=1, width=1)
    image = np.empty((0, 1, 3), np.uint8)
    mean = np.zeros(3, np.float32)
    kernel(image, *_prepare(nothing, ViewSpec(), 1), mean, mean, 0, _NO_32, _NO_16)


# ---------------------------------------------------------------------------------------------------------------
# Compiled code. Loops run over slices, so that the compiler knows that no index is negative and uses vectors.

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    # "nnan": a minimum without branches; "reassoc": sums in several lanes; "contract": fused multiply-add. Without
    # "arcp" and "afn", which approximate.
    "fastmath": {"nnan", "ninf", "nsz", "reassoc", "contract"},
}


def _inner(function: _Function) -> _Function:
    inner: _Function = numba.njit(**_OPTIONS)(function)
    return inner


_F = np.float32
_ZERO, _ONE, _SIX = _F(0), _F(1), _F(6)
_NEXT, _LAST = np.uint64(1), np.uint64(2)
_RED, _GREEN, _BLUE = _F(0.2989), _F(0.587), _F(0.114)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (int(operation) for operation in JitterOperation)


def _views(
    pixels: _Array,  # uint8 (b, H, 3 W)
    box: _Array,
    kind: _Array,
    flags: _Array,
    order: _Array,
    factors: _Array,
    sigma: _Array,
    taps: _Array,
    weights: _Array,
    counts: _Array,
    cubic: bool,
    blur_kernel: int,
    threshold: Any,
    mean: _Array,  # float32 (3,)
    scale: _Array,  # float32 (3,)
    dtype: int,  # as in _KINDS
    out: _Array,  # float32 (b, 3 N), interleaved; used for float32
    out_16: _Array,  # uint16 (b, 3 N); used for the others
) -> None:
    most_taps, size = taps.shape[1], taps.shape[2]
    planes = np.empty((3, size * size), np.float32)
    line = np.empty(pixels.shape[2], np.float32)
    at, by = np.empty((most_taps, size), np.uint64), np.empty((most_taps, size), np.float32)
    rows, padded = np.empty((size, size), np.float32), np.empty(size + blur_kernel, np.float32)
    bell = np.empty(blur_kernel, np.float32)
    finished, shifted = np.empty(3 * size * size, np.float32), np.empty(3 * size * size, np.float32)
    for n in range(len(pixels)):
        vertical, horizontal = kind[n, 0], kind[n, 1]
        top, left, width = box[n, 0], box[n, 1], box[n, 2]
        num_y, num_x = counts[vertical], counts[horizontal]
        for k in range(num_x):
            for x in range(size):
                to = size - 1 - x if flags[n, 0] else x
                at[k, to] = np.uint64(3) * taps[horizontal, k, x]
                by[k, to] = weights[horizontal, k, x] * _F(1 / 255)
        _resize(
            pixels[n, top:, 3 * left : 3 * (left + width)],
            taps[vertical, :num_y],
            weights[vertical],
            at[:num_x],
            by,
            line,
            planes,
        )
        if cubic:
            _clamp(planes)
        if flags[n, 1]:
            for position in range(4):
                operation = order[n, position]
                factor = factors[n, operation]
                if operation == _BRIGHTNESS:
                    _blend(planes, factor, _ZERO, _ZERO)
                elif operation == _CONTRAST:
                    _blend(planes, factor, _ONE - factor, _ZERO)
                elif operation == _SATURATION:
                    _blend(planes, factor, _ZERO, _ONE - factor)
                else:
                    _shift_hue(planes, factor)
        if flags[n, 2]:
            _grayscale(planes)
        if flags[n, 3]:
            total = 0.0
            for k in range(blur_kernel):
                total += math.exp(-0.5 * ((k - blur_kernel // 2) / sigma[n]) ** 2)
            for k in range(blur_kernel):
                bell[k] = math.exp(-0.5 * ((k - blur_kernel // 2) / sigma[n]) ** 2) / total
            for c in range(3 if blur_kernel > 1 else 0):  # one pixel wide, a blur changes nothing
                _blur(planes[c].reshape(size, size), bell, rows, padded)
        if flags[n, 4]:
            _solarise(planes, threshold)
        if dtype == 0:
            _interleave(planes, mean, scale, out[n])
        else:
            _interleave(planes, mean, scale, finished)
            if dtype == 1:
                _to_bfloat16(finished, out_16[n])
            else:
                _to_float16(finished, shifted, out_16[n])


@_inner
def _resize(
    pixels: _Array, taps: _Array, weights: _Array, at: _Array, by: _Array, line: _Array, planes: _Array
) -> None:
    """Sum stored rows of uint8 (>= h, 3 w) for each row of the view, then places of that sum; taps go in pairs."""
    size, length = taps.shape[1], pixels.shape[1]
    for i in range(size):
        for k in range(0, len(taps), 2):
            row, other = pixels[taps[k, i]], pixels[taps[k + 1, i]]
            weight, other_weight = weights[k, i], weights[k + 1, i]
            if k == 0:
                for x in range(length):
                    line[x] = weight * _F(row[x]) + other_weight * _F(other[x])
            else:
                for x in range(length):
                    line[x] += weight * _F(row[x]) + other_weight * _F(other[x])
        part = slice(i * size, (i + 1) * size)
        red, green, blue = planes[0, part], planes[1, part], planes[2, part]
        for k in range(0, len(at), 2):
            places, other_places, these, others = at[k], at[k + 1], by[k], by[k + 1]
            if k == 0:
                for x in range(size):
                    place, other_place, weight, other_weight = places[x], other_places[x], these[x], others[x]
                    red[x] = weight * line[place] + other_weight * line[other_place]
                    green[x] = weight * line[place + _NEXT] + other_weight * line[other_place + _NEXT]
                    blue[x] = weight * line[place + _LAST] + other_weight * line[other_place + _LAST]
            else:
                for x in range(size):
                    place, other_place, weight, other_weight = places[x], other_places[x], these[x], others[x]
                    red[x] += weight * line[place] + other_weight * line[other_place]
                    green[x] += weight * line[place + _NEXT] + other_weight * line[other_place + _NEXT]
                    blue[x] += weight * line[place + _LAST] + other_weight * line[other_place + _LAST]


@_inner
def _clamp(planes: _Array) -> None:
    for c in range(3):
        plane = planes[c]
        for i in range(len(plane)):
            plane[i] = min(max(plane[i], _ZERO), _ONE)


@_inner
def _sum_luma(red: _Array, green: _Array, blue: _Array) -> Any:
    total = _ZERO
    for i in range(len(red)):
        total += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
    return total


@_inner
def _blend(planes: _Array, factor: Any, to_mean: Any, to_luma: Any) -> None:
    """Brightness, contrast and saturation: clamp(factor * pixel + to_mean * mean luma + to_luma * luma)."""
    red, green, blue = planes[0], planes[1], planes[2]
    if to_luma != _ZERO:
        for i in range(len(red)):
            target = to_luma * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
            red[i] = min(max(factor * red[i] + target, _ZERO), _ONE)
            green[i] = min(max(factor * green[i] + target, _ZERO), _ONE)
            blue[i] = min(max(factor * blue[i] + target, _ZERO), _ONE)
        return
    add = _ZERO
    if to_mean != _ZERO:
        total = 0.0
        for start in range(0, len(red), 1024):  # a float32 sum of all pixels of a large view would round too much
            part = slice(start, start + 1024)
            total += _sum_luma(red[part], green[part], blue[part])
        add = _F(to_mean * total / len(red))
    for c in range(3):
        plane = planes[c]
        for i in range(len(plane)):
            plane[i] = min(max(factor * plane[i] + add, _ZERO), _ONE)


@_inner
def _shift_hue(planes: _Array, turns: Any) -> None:
    """As in simclr.views, whose docstring derives it."""
    red, green, blue = planes[0], planes[1], planes[2]
    shift = _SIX * turns
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        largest, smallest = max(max(r, g), b), min(min(r, g), b)
        chroma = largest - smallest
        hue = (g + b - r + largest - (smallest + smallest)) / max(chroma, _F(1e-12))
        hue = (hue if g >= b else -hue) + shift
        hue -= _SIX * np.floor(hue * _F(1 / 6))
        red[i] = smallest + chroma * min(max(abs(hue - _F(3)) - _ONE, _ZERO), _ONE)
        green[i] = largest - chroma * min(max(abs(hue - _F(2)) - _ONE, _ZERO), _ONE)
        blue[i] = largest - chroma * min(max(abs(hue - _F(4)) - _ONE, _ZERO), _ONE)


@_inner
def _grayscale(planes: _Array) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(len(red)):
        luma = _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
        red[i] = luma
        green[i] = luma
        blue[i] = luma


@_inner
def _blur(plane: _Array, bell: _Array, rows: _Array, padded: _Array) -> None:
    """Filter columns, then rows, of (S, S) in place, with reflected borders."""
    size, reach = len(plane), len(bell) // 2
    middle = bell[reach]
    for i in range(size):
        row, centre = rows[i], plane[i]
        for k in range(1, reach + 1):
            above, below = plane[abs(i - k)], plane[size - 1 - abs(size - 1 - i - k)]
            weight = bell[reach + k]
            if k == 1:
                for x in range(size):
                    row[x] = middle * centre[x] + weight * (above[x] + below[x])
            else:
                for x in range(size):
                    row[x] += weight * (above[x] + below[x])
    for i in range(size):
        row = rows[i]
        for x in range(size):
            padded[reach + x] = row[x]
        for k in range(reach):
            padded[reach - 1 - k] = row[k + 1]
            padded[reach + size + k] = row[size - 2 - k]
        row, centre = plane[i], rows[i]
        for k in range(1, reach + 1):
            before, after = padded[reach - k : reach - k + size], padded[reach + k : reach + k + size]
            weight = bell[reach + k]
            if k == 1:
                for x in range(size):
                    row[x] = middle * centre[x] + weight * (before[x] + after[x])
            else:
                for x in range(size):
                    row[x] += weight * (before[x] + after[x])


@_inner
def _solarise(planes: _Array, threshold: Any) -> None:
    for c in range(3):
        plane = planes[c]
        for i in range(len(plane)):
            plane[i] = _ONE - plane[i] if plane[i] >= threshold else plane[i]


@_inner
def _interleave(planes: _Array, mean: _Array, scale: _Array, out: _Array) -> None:
    """Normalise (3, N) into (3 N,)."""
    red, green, blue = planes[0], planes[1], planes[2]
    mean_r, mean_g, mean_b, scale_r, scale_g, scale_b = mean[0], mean[1], mean[2], scale[0], scale[1], scale[2]
    for i in range(len(red)):
        out[3 * i] = (red[i] - mean_r) * scale_r
        out[3 * i + 1] = (green[i] - mean_g) * scale_g
        out[3 * i + 2] = (blue[i] - mean_b) * scale_b


@_inner
def _to_bfloat16(values: _Array, out: _Array) -> None:
    """The upper half of the bits, rounded to nearest, ties to even; values are finite."""
    bits = values.view(np.uint32)
    for i in range(len(bits)):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        out[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_inner
def _to_float16(values: _Array, shifted: _Array, out: _Array) -> None:
    """Rounded to nearest, ties to even, and to infinity from 65,520 on; values are finite."""
    for i in range(len(values)):
        shifted[i] = abs(values[i]) + _F(0.5)  # the unit in the last place of [0.5, 1) is that of float16 near 0
    bits, bits_near_0 = values.view(np.uint32), shifted.view(np.uint32)
    for i in range(len(bits)):
        size = bits[i] & np.uint32(0x7FFFFFFF)
        odd = (size >> np.uint32(13)) & np.uint32(1)
        normal = (size - np.uint32((127 - 15) << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
        near_0 = bits_near_0[i] - np.uint32(0x3F000000)
        half = near_0 if size < np.uint32(0x38800000) else normal  # 2**-14, the smallest normal float16
        half = half if size < np.uint32(0x477FF000) else np.uint32(0x7C00)  # 65,520
        out[i] = np.uint16(half | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))
