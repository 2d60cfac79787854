"""Rows of unit length, whatever their length was: what cosine similarity is computed from."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit_rows(z: Tensor) -> Tensor:
    """Scale each row of (r, d), float32 or float64, to unit l2 norm; rows of zeros, which have no direction, stay.

    Whatever a row's length, no square overflows or vanishes on the way. Differentiable; rows of zeros get no gradient.
    """
    rows, length, _ = scaled_rows(z)
    return rows / length


def scaled_rows(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return z times scale; the length of these rows, (r, 1), infinity for 0; and scale, powers of two, (r, 1)."""
    with torch.no_grad():  # amax and amin take a tenth of the infinity norm's time on a CPU
        scale = power_of_two(torch.maximum(z.amax(dim=1, keepdim=True), -z.amin(dim=1, keepdim=True)))
    rows = z * scale
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows, length.masked_fill(length == 0, math.inf), scale


def power_of_two(size: Tensor) -> Tensor:
    """Return powers of two that bring sizes >= 0 near 1: multiplying by them rounds nothing.

    Sizes at the ends of their dtype's range, subnormal ones too, come within a few powers of ten of 1, so that the
    squares of what is brought there are ordinary numbers. It is finite for sizes that are 0 or infinite.
    """
    tiny = torch.finfo(size.dtype).tiny
    size = size.clamp(tiny, 0.5 / tiny)  # so that neither the power nor its reciprocal is subnormal
    return torch.frexp(size).mantissa / size
