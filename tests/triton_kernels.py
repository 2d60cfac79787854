"""The loss's Triton kernels, interpreted, on CPU tensors: ``TRITON_INTERPRET=1 python -m tests.triton_kernels``.

A program of its own, since the variable has to be set before Triton is imported. tests/test_triton.py runs it.
"""

from __future__ import annotations

import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.losses import nt_xent
from simclr.losses.tiles import TorchTiles, nt_xent_of_rows
from simclr.losses.triton_tiles import TritonTiles
from tests import helpers
from tests.test_losses import nt_xent_by_the_paper, projections, value_and_gradients

# Rows, columns, width, whether the columns are the rows: one tile and several, cut off in every direction
SHAPES = [(6, 6, 3, True), (130, 130, 70, True), (64, 64, 64, True), (65, 33, 130, False), (2, 200, 128, False)]


def check_tiles(rows: int, columns: int, width: int, is_own: bool, scale: float) -> None:
    """Each tile sum is that of torch's operations in float64."""
    torch.manual_seed(rows)
    x = F.normalize(torch.randn(rows, width), dim=1)
    y = x if is_own else F.normalize(torch.randn(columns, width), dim=1)
    mine, reference = TritonTiles(scale, bf16=False), TorchTiles(scale, bf16=False)
    lse = reference.log_sum_exp(x.double(), y.double(), is_own=is_own)
    found = mine.log_sum_exp(x, y, is_own=is_own).double()
    torch.testing.assert_close(found, lse, rtol=1e-6, atol=1e-6 * scale)
    other_lse = lse if is_own else lse.mean() + torch.rand(columns, dtype=torch.float64)
    weights = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    exact = reference.gradient(x.double(), y.double(), lse, other_lse, *weights, is_own=is_own)
    narrow = (lse.float(), other_lse.float(), *(weight.float() for weight in weights))
    gradient = mine.gradient(x, y, *narrow, is_own=is_own).double()
    torch.testing.assert_close(gradient, exact, rtol=1e-5 * scale, atol=1e-6 * scale)


def triton_loss(z1: Tensor, z2: Tensor, *, temperature: float = 0.5) -> Tensor:
    """nt_xent by Triton; ``kernels="triton"`` alone refuses CPU tensors unless interpreted."""
    return nt_xent(z1, z2, temperature=temperature, form="tiled", kernels="triton")


def on_a_rank(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of this rank's share."""
    z1, z2 = (z.chunk(world_size)[rank] for z in projections(12, 20, dtype=torch.float32))
    return value_and_gradients(triton_loss, z1, z2)


def main() -> None:
    """Check everything; raise AssertionError at the first difference."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for shape in SHAPES:
        for scale in (2.0, 100.0):
            check_tiles(*shape, scale)
    z1, z2 = projections(40, 20)
    for temperature in (0.02, 0.5):
        expected = value_and_gradients(partial(nt_xent_by_the_paper, temperature=temperature), z1, z2)
        found = value_and_gradients(partial(triton_loss, temperature=temperature), z1.float(), z2.float())
        for mine, reference in zip(found, expected, strict=True):
            assert (mine.double() - reference).norm() <= 1e-6 / temperature * (reference.norm() + 1)

    x = F.normalize(torch.randn(100, 96), dim=1)
    exact, rounded = (float(nt_xent_of_rows(x, 0.1, kernels="triton", bf16_matmul=bf16)) for bf16 in (False, True))
    assert 0 < abs(rounded - exact) < 1e-2  # the interpreter cuts digits off, where a GPU rounds to nearest

    z1, z2 = projections(12, 20)
    _, *gradients = value_and_gradients(partial(nt_xent_by_the_paper, temperature=0.5), z1, z2)
    helpers.PRELOADED[:] = ["torch.distributed"]  # the ranks need no more
    answers = helpers.run_distributed(on_a_rank, 2)
    for i, gradient in enumerate(gradients, start=1):
        mine = torch.cat([answer[i] for answer in answers]).double() / 2
        assert (mine - gradient).norm() < 1e-5 * gradient.norm()
    helpers.shut_down_workers()
    print("all kernels agree")


if __name__ == "__main__":
    main()
