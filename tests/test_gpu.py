"""What a GPU computes, against float64 on the CPU. Each test also runs on the CPU, so that it is known to work.

``pytest -m gpu`` runs what needs a GPU, here and in the other files.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simclr.batch_norm import GlobalBatchNorm
from simclr.command_line import parse_train_config
from simclr.losses import barlow_twins, nt_xent
from simclr.models import use_global_batch_norm
from simclr.run.checkpoint import load_resumable
from simclr.run.runlog import read_manifest, read_metrics
from tests.helpers import run_distributed, run_python
from tests.runs import train_here, write_shapes
from tests.test_losses import projections, value_and_gradients

ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
LOSSES: dict[str, Any] = {
    "matrix": lambda a, b: nt_xent(a, b, temperature=0.2, form="matrix"),
    "tiled": lambda a, b: nt_xent(a, b, temperature=0.2, form="tiled", kernels="torch"),
    "barlow": barlow_twins,
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("n", "d"), [(7, 5), (600, 128)])
def test_losses_and_gradients_in_float32(device: str, name: str, n: int, d: int) -> None:
    z1, z2 = projections(n, d)
    expected = value_and_gradients(LOSSES[name], z1, z2)
    found = value_and_gradients(LOSSES[name], z1.float().to(device), z2.float().to(device))
    assert found[0].device.type == device
    for mine, reference in zip(found, expected, strict=True):
        assert relative(mine, reference) < 1e-5


# ------------------------------------------------------------------------------------------ two ranks on one device


def losses_on_a_rank(rank: int, world_size: int, device: str, z1: Tensor, z2: Tensor) -> list[list[Tensor]]:
    """Value and gradients of this rank's rows; the gradient as DDP averages it."""
    rows = slice(rank * len(z1) // world_size, (rank + 1) * len(z1) // world_size)
    own = [z[rows].float().to(device) for z in (z1, z2)]
    return [[part.cpu() for part in value_and_gradients(form, *own)] for form in LOSSES.values()]


@pytest.mark.distributed
@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_on_one_device_have_the_losses_of_one(device: str) -> None:
    """By gloo, as NCCL wants a GPU for each rank."""
    z1, z2 = projections(24, 16)
    one = [value_and_gradients(loss, z1, z2) for loss in LOSSES.values()]
    ranks = run_distributed(losses_on_a_rank, 2, device, z1, z2)
    for form, expected in enumerate(one):
        value = torch.stack([rank[form][0] for rank in ranks]).mean()
        assert relative(value, expected[0]) < 1e-5
        for which in (1, 2):
            gradient = torch.cat([rank[form][which] for rank in ranks]) / len(ranks)
            assert relative(gradient, expected[which]) < 1e-5


def normalised_on_a_rank(rank: int, world_size: int, device: str, x: Tensor) -> list[Tensor]:
    """Output, gradient and running variance of a network with batch normalisation over both ranks."""
    network = use_global_batch_norm(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), torch.device(device)).to(device)
    kind = nn.SyncBatchNorm if device == "cuda" else GlobalBatchNorm
    assert isinstance(network.get_submodule("0"), kind)
    own = x.chunk(world_size)[rank].float().to(device).requires_grad_()
    out = network(own)
    torch.autograd.backward((out * out.detach().cos()).sum())
    assert own.grad is not None
    return [out.detach().cpu(), own.grad.cpu(), network.state_dict()["0.running_var"].cpu()]


@pytest.mark.distributed
@pytest.mark.parametrize("device", DEVICES)
def test_batch_norm_over_two_ranks_is_that_of_the_whole_batch(device: str) -> None:
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = run_distributed(normalised_on_a_rank, 2, device, x)
    plain, whole = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double(), x.clone().requires_grad_()
    out = plain(whole)
    torch.autograd.backward((out * out.detach().cos()).sum())
    assert whole.grad is not None
    assert relative(torch.cat([rank[0] for rank in ranks]), out.detach()) < 1e-5
    assert relative(torch.cat([rank[1] for rank in ranks]), whole.grad) < 1e-5
    for rank in ranks:
        assert relative(rank[2], plain.state_dict()["0.running_var"]) < 1e-5


# ------------------------------------------------------------------------------------------ whole runs


@dataclasses.dataclass(frozen=True)
class Way:
    """How a run is computed, and how far its first loss may lie from float64's on the CPU."""

    options: tuple[str, ...]
    tolerance: float


WAYS = {
    "fp32": Way(("--precision", "fp32"), 1e-3),  # torch takes TF32 for convolutions on GPUs
    "bf16": Way(("--precision", "bf16"), 3e-2),
    "fp16": Way(("--precision", "fp16"), 1e-2),
    "compiled": Way(("--precision", "fp32", "--compile", "default"), 1e-3),
    "one graph": Way(("--precision", "bf16", "--compile", "graph"), 3e-2),
    "one graph, compiled": Way(("--precision", "bf16", "--compile", "graph-compiled"), 3e-2),
    "recomputed": Way(("--precision", "fp32", "--recompute"), 1e-3),
    "muon": Way(("--precision", "bf16", "--optimizer.name", "muon"), 3e-2),
    "barlow": Way(("--precision", "bf16", "--loss.name", "barlow_twins"), 3e-2),
    "views from the host": Way(("--precision", "fp32", "--views", "fused"), 1e-3),
}
ON_CPU = ("bf16", "muon")  # of the others, other files have tests there, or they need a GPU


def train(device: str, images: Path, output: Path, *options: str) -> list[dict[str, Any]]:
    """Pretrain, on a GPU in a process of its own; return the lines about steps."""
    words = shlex.split(
        "cifar10-simclr-100 --epochs 2 --global-batch-size 16 --model.encoder small_resnet_w8 --num-validation 0 "
        "--loader memory --log-every-steps 1 --checkpoint-every-steps 3"
    )
    words += ["--data", str(images), "--output", str(output), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
        if device == "cpu":
            train_here(parse_train_config(words))
        else:
            done = run_python("train_simclr.py", *words, timeout=600)
            assert done.returncode == 0, done.stderr
    assert (read_manifest(output) or {})["device"] == device
    return [line for line in read_metrics(output) if line["kind"] == "step"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("images") / "train.beton", 64)


@pytest.fixture(scope="module")
def first_losses(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The loss of the first step, in float64 on the CPU."""
    first = {}
    for name in ("nt_xent", "barlow_twins"):
        options = ("--precision", "fp64", "--stop-at-step", "1", "--loss.name", name)
        first[name] = train("cpu", images, tmp_path_factory.mktemp("float64") / "run", *options)[0]["loss"]
    return first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "name"),
    [*(("cpu", name) for name in ON_CPU), *(pytest.param("cuda", name, marks=ON_GPU) for name in WAYS)],
)
def test_a_run_begins_as_in_float64_and_goes_on_where_it_was_stopped(
    device: str, name: str, images: Path, first_losses: dict[str, float], tmp_path: Path
) -> None:
    if "compiled" in name and shutil.which("cc") is None:
        pytest.skip("Triton needs a C compiler")
    way = WAYS[name]
    train(device, images, tmp_path / "run", *way.options, "--stop-at-step", "4")
    steps = train(device, images, tmp_path / "run", *way.options)
    assert [line["step"] for line in steps] == list(range(1, 9))
    expected = first_losses["barlow_twins" if name == "barlow" else "nt_xent"]
    assert steps[0]["loss"] == pytest.approx(expected, rel=way.tolerance)
    assert all(line["skipped_steps"] == 0 or name == "fp16" for line in steps)
    assert load_resumable(tmp_path / "run" / "checkpoint_last.pt")["step"] == 8
