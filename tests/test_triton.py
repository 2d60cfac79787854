from __future__ import annotations

import pytest
import torch

from simclr.losses import nt_xent
from tests.helpers import run_python
from tests.test_losses import projections, value_and_gradients

BOTH_PROGRAMS = """
from tests import triton_kernels, triton_views_kernels
triton_kernels.main()
triton_views_kernels.main()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_the_kernels_give_torchs_numbers_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    done = run_python("-c", BOTH_PROGRAMS, timeout=500, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "all kernels agree" in done.stdout
    assert "all views agree" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would compare the views of compiled kernels")
def test_on_a_gpu_triton_makes_the_views_of_the_batched_operations() -> None:
    done = run_python("-m", "tests.triton_views_kernels", "cuda")
    assert done.returncode == 0, done.stderr
    assert "all views agree" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("n", "d"), [(7, 5), (1000, 128), (4096, 256)])
def test_on_a_gpu_triton_gives_the_loss_of_float64(n: int, d: int, bf16: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: would compare compiled Triton kernels with float64")
    z1, z2 = projections(n, d)
    expected = value_and_gradients(lambda a, b: nt_xent(a, b, temperature=0.2, form="tiled"), z1, z2)
    found = value_and_gradients(
        lambda a, b: nt_xent(a, b, temperature=0.2, form="tiled", kernels="triton", bf16_matmul=bf16),
        z1.float().cuda(),
        z2.float().cuda(),
    )
    for mine, reference in zip(found, expected, strict=True):
        assert (mine.cpu().double() - reference).norm() < (2e-2 if bf16 else 1e-5) * reference.norm()
