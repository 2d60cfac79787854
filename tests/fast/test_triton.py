from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr.losses import nt_xent
from tests.test_losses import projections, value_and_gradients

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("program", "end"), [("triton_kernels", "all kernels agree"), ("triton_views_kernels", "all views agree")]
)
def test_the_kernels_give_torchs_numbers_in_tritons_interpreter(program: str, end: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.fast.{program}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert end in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would compare the views of compiled kernels")
def test_on_a_gpu_triton_makes_the_views_of_the_batched_operations() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fast.triton_views_kernels", "cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
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
