"""The tiles of :mod:`simclr.losses.tiles` as fused Triton kernels: similarities never leave the multiprocessor.

With ``TRITON_INTERPRET=1`` in the environment before this module is imported, the kernels run on CPU tensors, slowly,
for tests.

Shape letters: r rows of this rank, m columns of any rank, d width of both.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# What is marked @triton.jit is in Triton's language, which only looks like Python.

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Rows and columns of a tile, and how much of the width is multiplied at a time.
_ROWS, _COLUMNS, _WIDTH = 64, 64, 64


class TritonTiles:
    """One rank's rows against one rank's columns; the numbers of ``simclr.losses.tiles``'s torch tiles.

    Args:
        scale: 1 / temperature.
        bf16: Whether factors of matrix products are rounded to bfloat16. Sums are float32 either way.
    """

    def __init__(self, scale: float, bf16: bool) -> None:
        self._scale, self._bf16 = scale, bf16

    def log_sum_exp(self, x: Tensor, columns: Tensor, *, is_own: bool) -> Tensor:
        """Return log sum_j exp(s_ij) over the columns (m, d), without j = i if they are the rows (r, d) themselves."""
        _require_float32(x)
        lse = x.new_empty(len(x))
        grid = (triton.cdiv(len(x), _ROWS),)
        _log_sum_exp[grid](
            x, columns, lse, len(x), len(columns), x.shape[1], self._scale,
            IS_OWN=is_own, BF16=self._bf16, ROWS=_ROWS, COLUMNS=_COLUMNS, WIDTH=_WIDTH,
        )  # fmt: skip
        return lse

    def gradient(
        self,
        x: Tensor,
        columns: Tensor,
        lse: Tensor,
        columns_lse: Tensor,
        weight: Tensor,
        columns_weight: Tensor,
        *,
        is_own: bool,
    ) -> Tensor:
        """Return sum_j (weight exp(s_ij - lse_i) + columns_weight exp(s_ij - columns_lse_j)) column_j, (r, d)."""
        _require_float32(x)
        total = torch.empty_like(x)
        # A program makes _WIDTH of a row's d numbers; a wider row computes its similarities once for each.
        grid = (triton.cdiv(len(x), _ROWS), triton.cdiv(x.shape[1], _WIDTH))
        _gradient[grid](
            x, columns, lse, columns_lse, weight, columns_weight, total, len(x), len(columns), x.shape[1], self._scale,
            IS_OWN=is_own, BF16=self._bf16, ROWS=_ROWS, COLUMNS=_COLUMNS, WIDTH=_WIDTH,
        )  # fmt: skip
        return total


def _require_float32(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"the Triton kernels compute in float32, got {x.dtype}; use kernels torch")
    if not x.is_cuda and not IS_INTERPRETED:
        raise ValueError(f"the Triton kernels need a CUDA device, got rows on {x.device}; use kernels torch")


# The interpreter rounds to bfloat16 but cannot multiply it.
_MULTIPLIES_BF16: tl.constexpr = tl.constexpr(not IS_INTERPRETED)


@triton.jit
def _product(left, right, BF16: tl.constexpr):
    """Multiply float32 matrices, their factors rounded to bfloat16 or not; the sums are float32."""
    if BF16:
        left, right = left.to(tl.bfloat16), right.to(tl.bfloat16)
        if not _MULTIPLIES_BF16:
            left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _similarities(
    x, columns, row, column, num_rows, num_columns, width, scale,
    IS_OWN: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return a tile of s_ij; -inf outside the matrix and, for own columns, where a row meets itself."""
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        left = tl.load(
            x + row[:, None] * width + k[None, :], mask=(row < num_rows)[:, None] & (k < width)[None, :], other=0.0
        )
        right = tl.load(
            columns + column[None, :] * width + k[:, None],
            mask=(column < num_columns)[None, :] & (k < width)[:, None],
            other=0.0,
        )
        product += _product(left, right, BF16)
    product = tl.where((column < num_columns)[None, :], product * scale, float("-inf"))
    if IS_OWN:
        product = tl.where(row[:, None] == column[None, :], float("-inf"), product)
    return product


@triton.jit
def _log_sum_exp(
    x, columns, lse, num_rows, num_columns, width, scale,
    IS_OWN: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        logits = _similarities(
            x, columns, row, column, num_rows, num_columns, width, scale, IS_OWN, BF16, ROWS, COLUMNS, WIDTH
        )
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        # A tile may hold nothing but a row's meeting with itself: -inf - -inf is not a number.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        largest = new_largest
    tl.store(lse + row, largest + tl.log(total), mask=row < num_rows)


@triton.jit
def _gradient(
    x, columns, lse, columns_lse, weight, columns_weight, gradient, num_rows, num_columns, width, scale,
    IS_OWN: tl.constexpr, BF16: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row_lse = tl.load(lse + row, mask=row < num_rows, other=0.0)
    row_weight, column_weight = tl.load(weight), tl.load(columns_weight)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        logits = _similarities(
            x, columns, row, column, num_rows, num_columns, width, scale, IS_OWN, BF16, ROWS, COLUMNS, WIDTH
        )
        column_lse = tl.load(columns_lse + column, mask=column < num_columns, other=0.0)
        coefficients = row_weight * tl.exp(logits - row_lse[:, None])
        coefficients += column_weight * tl.exp(logits - column_lse[None, :])
        right = tl.load(
            columns + column[:, None] * width + k[None, :],
            mask=(column < num_columns)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        total += _product(coefficients, right, BF16)
    tl.store(
        gradient + row[:, None] * width + k[None, :],
        total,
        mask=(row < num_rows)[:, None] & (k < width)[None, :],
    )
