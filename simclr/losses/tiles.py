"""NT-Xent without the matrix of all similarities: it is computed tile by tile, and again in the backward pass.

Memory is O(rows * d) for what comes in and goes out, and one tile. :func:`simclr.losses.nt_xent` is the way in.

Shape letters used in this file:
    r   rows on this rank, both views of its source images: view 1 of all, then view 2 of all
    m   rows of any rank (equal r)          W   ranks          d   width of a row

With x the rows of unit length, s_ij = x_i . x_j / temperature, l_i = log sum_{j != i} exp(s_ij) over the rows of all
ranks, and g_q what the caller multiplies rank q's loss by, the sum of all ranks' losses has the gradient

    1 / (r * temperature) * (sum_{j != i} (g_rank(i) exp(s_ij - l_i) + g_rank(j) exp(s_ij - l_j)) x_j
                             - 2 g_rank(i) x_positive(i))

with respect to x_i: the second term of the sum is what x_i does as a column of the others. So a rank computes the whole
gradient of its own rows from the others' rows and their r numbers l_j, and no gradient travels between ranks. Before
x_i = z_i / |z_i|, a gradient g of x_i is (g - x_i (x_i . g)) / |z_i|.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simclr import distributed
from simclr.losses import differentiable_once
from simclr.unit_length import scaled_rows

if TYPE_CHECKING:
    from simclr.losses import Kernels
    from simclr.losses.triton_tiles import TritonTiles

# Rows and columns of a tile. On CPUs a float32 tile of 512 x 512, 1 MiB, stays in a core's L2 cache (256 to 1,024 were
# within 10 % of each other); on GPUs larger ones keep the multiprocessors busy (not measured).
TILE = {"cpu": 512, "cuda": 4096}

# While all similarities lie in [-40, 40], their exponentials and sums of 10^15 of them are ordinary float32 numbers,
# and no maximum has to be subtracted. float64 reaches further.
_DIRECT_UP_TO = {torch.float32: 40.0, torch.float64: 300.0}


def nt_xent_of_rows(z: Tensor, temperature: float, *, kernels: Kernels, bf16_matmul: bool) -> Tensor:
    """Return the mean NT-Xent loss of this rank's rows against the rows of all ranks, in nats.

    Args:
        z: Projections, float32 or float64, (r, d), equally many on every rank; row i and row (i + r / 2) % r are a
            positive pair. A row of zeros has similarity 0 to all others, and gradient 0.
        temperature: > 0.
        kernels: What computes a tile: torch's operations, or Triton's fused kernel (float32 on CUDA).
        bf16_matmul: Whether factors of matrix products are rounded to bfloat16; sums stay float32.

    Note:
        Collective call, forward and backward, if there are several ranks. Differentiable once.
    """
    loss: Tensor = _NTXent.apply(z, temperature, kernels, bf16_matmul)
    return loss


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, kernels: Kernels, bf16: bool) -> Tensor:
        x, length, scale = scaled_rows(z)
        x.div_(length)
        tiles = _tiles(kernels, 1 / temperature, bf16)
        columns = distributed.gather(x)
        lse = x.new_full((len(x),), -math.inf)
        for owner, block in _blocks(columns):
            lse = torch.logaddexp(lse, tiles.log_sum_exp(x, block, is_own=owner == distributed.rank()))
        ctx.tiles, ctx.temperature = tiles, temperature
        ctx.save_for_backward(x, length, scale, lse, columns, distributed.gather(lse))
        one, other = x.chunk(2)
        loss: Tensor = lse.mean() - torch.linalg.vecdot(one, other).mean() / temperature
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, length, scale, lse, columns, columns_lse = ctx.saved_tensors
        weights = distributed.gather_weights(gradient.to(x.dtype))  # of each rank's loss
        own = distributed.rank()
        total: Tensor | None = None
        for (owner, block), (_, block_lse) in zip(_blocks(columns), _blocks(columns_lse), strict=True):
            part = ctx.tiles.gradient(x, block, lse, block_lse, weights[own], weights[owner], is_own=owner == own)
            total = part if total is None else total.add_(part)
        assert total is not None
        for part, positive in zip(total.chunk(2), reversed(x.chunk(2)), strict=True):
            part.addcmul_(positive, weights[own], value=-2)
        along = torch.linalg.vecdot(x, total)[
            :, None
        ]  # the loss does not depend on a row's length, so neither does it move along the row
        total.addcmul_(x, along, value=-1).div_(length * (len(x) * ctx.temperature)).mul_(scale)
        return total, None, None, None


def _blocks(gathered: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (rank, its rows) for all ranks, this one first."""
    parts = gathered.chunk(distributed.world_size())
    for step in range(len(parts)):
        owner = (distributed.rank() - step) % len(parts)
        yield owner, parts[owner]


def _tiles(kernels: Kernels, scale: float, bf16: bool) -> TorchTiles | TritonTiles:
    if kernels == "torch":
        return TorchTiles(scale, bf16)
    from simclr.losses.triton_tiles import TritonTiles

    return TritonTiles(scale, bf16)


class TorchTiles:
    """One rank's rows against one rank's columns, in tiles, by torch's operations.

    Args:
        scale: 1 / temperature.
        bf16: Whether factors of matrix products are rounded to bfloat16.
    """

    def __init__(self, scale: float, bf16: bool) -> None:
        self._scale, self._bf16 = scale, bf16

    def log_sum_exp(self, x: Tensor, columns: Tensor, *, is_own: bool) -> Tensor:
        """Return log sum_j exp(s_ij) over the columns (m, d), without j = i if they are the rows (r, d) themselves."""
        direct = self._is_direct(x)
        accumulated = x.new_zeros(len(x)) if direct else x.new_full((len(x),), -math.inf)

        def add(rows: slice, logits: Tensor, dim: int) -> None:
            if direct:
                accumulated[rows] += logits.sum(dim)
            else:
                accumulated[rows] = torch.logaddexp(accumulated[rows], torch.logsumexp(logits, dim))

        for rows, over, logits in self._logits(x, columns, is_own):
            if direct:
                logits.exp_()
            add(rows, logits, 1)
            if is_own and over != rows:  # the matrix is symmetric, and only its upper half is visited
                add(over, logits, 0)
        return accumulated.log() if direct else accumulated

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
        direct = self._is_direct(x)
        total = torch.zeros_like(x)
        scratch = None
        if direct:
            lse, columns_lse = weight * lse.neg().exp(), columns_weight * columns_lse.neg().exp()
        for rows, over, logits in self._logits(x, columns, is_own):
            if direct:
                if scratch is None or scratch.shape != logits.shape:
                    scratch = torch.empty_like(logits)
                torch.add(lse[rows, None], columns_lse[over], out=scratch)
                coefficients = logits.exp_().mul_(scratch)
            else:
                by_row = (logits - lse[rows, None]).exp_() * weight
                coefficients = by_row + (logits - columns_lse[over]).exp_() * columns_weight
            total[rows].add_(self._matmul(coefficients, columns[over]))
            if is_own and over != rows:
                total[over].add_(self._matmul(coefficients.T, x[rows]))
        return total

    def _logits(self, x: Tensor, columns: Tensor, is_own: bool) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (rows, columns, their s_ij) tile by tile; the tensor is valid until the next one is taken."""
        side = TILE.get(x.device.type, TILE["cuda"])
        buffer: Tensor | None = None
        for top in range(0, len(x), side):
            rows = slice(top, min(top + side, len(x)))
            scaled = x[rows] * self._scale
            for left in range(top if is_own else 0, len(columns), side):
                over = slice(left, min(left + side, len(columns)))
                shape = (rows.stop - rows.start, over.stop - over.start)
                if buffer is None or buffer.shape != shape:
                    buffer = x.new_empty(shape)
                self._matmul(scaled, columns[over].T, out=buffer)
                if is_own and over == rows:
                    buffer.fill_diagonal_(-math.inf)
                yield rows, over, buffer

    def _matmul(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        if not self._bf16:
            return torch.mm(left, right, out=out)
        if left.is_cuda:
            product = torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=left.dtype)
        else:  # a CPU's bfloat16 product is rounded to bfloat16; this one is not
            product = left.bfloat16().to(left.dtype) @ right.bfloat16().to(left.dtype)
        return product if out is None else out.copy_(product)

    def _is_direct(self, x: Tensor) -> bool:
        return self._scale <= _DIRECT_UP_TO[x.dtype]
