"""The proof that the number of devices does not matter, for each loss in each form: value and gradient against the
papers' formulas as loops over float64 scalars, with different projections on every rank.

To hold another implementation against it, add it to ``CASES``: a function of two (b, d) tensors that communicates
with the other ranks of the default process group, beside the reference on the whole batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from simclr import distributed
from simclr.config import LossConfig, SpeedConfig, TrainConfig
from simclr.losses import barlow_twins, choose_nt_xent, nt_xent
from simclr.losses.tiles import TILE
from simclr.views import ViewSpec, two_views
from tests.helpers import run_distributed
from tests.test_losses import barlow_twins_by_the_paper, nt_xent_by_the_paper, projections, value_and_gradients

Loss = Callable[[Tensor, Tensor], Tensor]
WORLD_SIZES = (1, 2, 3, 4, 8)
NUM_IMAGES = 24  # which all of them divide
TEMPERATURES = (0.01, 0.1, 0.5, 2.0)
WIDTHS = (1, 5, 33)


class Case(NamedTuple):
    """A loss, its reference, and the relative error that float32 may have."""

    loss: Loss
    reference: Loss
    float32: float = 1e-5


CASES: dict[str, Case] = {}
for temperature in TEMPERATURES:
    by_the_paper = partial(nt_xent_by_the_paper, temperature=temperature)
    for form in ("matrix", "tiled"):
        CASES[f"nt_xent-{form}-{temperature}"] = Case(
            partial(nt_xent, temperature=temperature, form=form),
            by_the_paper,
            # 1 / temperature multiplies the rounding of the similarities, 1e-7, and the gradient once more
            float32=2e-7 / temperature**2 + 1e-5,
        )
for centre in (True, False):
    CASES[f"barlow_twins-{'centred' if centre else 'as_printed'}"] = Case(
        partial(barlow_twins, off_diagonal_weight=0.05, centre=centre),
        partial(barlow_twins_by_the_paper, off_diagonal_weight=0.05, centre=centre),
    )
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def batch(width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return projections(NUM_IMAGES, width, seed=width, dtype=dtype)


def share_of(rank: int, world_size: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    z1, z2 = (z.chunk(world_size)[rank].clone() for z in batch(width, dtype))
    return z1, z2


@functools.cache
def of_the_whole_batch(by_the_paper: Loss, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return value_and_gradients(by_the_paper, *batch(width))


def all_cases_on_one_rank(rank: int, world_size: int) -> dict[tuple[str, int, str], tuple[Tensor, Tensor, Tensor]]:
    assert dist.get_world_size() == distributed.world_size() == world_size
    TILE["cpu"] = 5  # several tiles, some of them cut off, for 2 * 24 / world_size rows
    try:
        return {
            (name, width, dtype): value_and_gradients(case.loss, *share_of(rank, world_size, width, DTYPES[dtype]))
            for name, case in CASES.items()
            for width in WIDTHS
            for dtype in DTYPES
        }
    finally:
        TILE["cpu"] = 512


@functools.cache
def results(world_size: int) -> list[dict[tuple[str, int, str], tuple[Tensor, Tensor, Tensor]]]:
    """All ranks' answers to all cases; the processes are started once."""
    return run_distributed(all_cases_on_one_rank, world_size, timeout=300)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_value_and_gradient_are_the_papers(world_size: int, name: str, width: int, dtype: str) -> None:
    """The ranks' mean loss, and the gradient of it, are the formula's on the whole batch."""
    value, *gradients = of_the_whole_batch(CASES[name].reference, width)
    answers = [rank[name, width, dtype] for rank in results(world_size)]
    assert len(answers) == world_size
    assert all(answer[0].dtype == DTYPES[dtype] for answer in answers)
    tolerance = 1e-9 if dtype == "float64" else CASES[name].float32
    values = torch.stack([answer[0] for answer in answers]).double()
    mean_or_each = values if name.startswith("barlow") else values.mean()  # every rank's loss is the whole
    assert ((mean_or_each - value).abs() <= tolerance * (abs(value) + 1)).all()
    for i, gradient in enumerate(gradients, start=1):
        # A rank's gradient is that of the sum of all ranks' losses; DDP divides by their number.
        mine = torch.cat([answer[i] for answer in answers]).double() / world_size
        # Width 1 has no direction to learn: the gradient is 0, and what is left is rounding.
        assert (mine - gradient).norm() <= tolerance * max(float(gradient.norm()), 1.0)


def test_the_ranks_of_these_tests_hold_different_projections() -> None:
    for width in WIDTHS:
        for z in batch(width):
            assert len(torch.unique(z, dim=0)) == NUM_IMAGES


# ------------------------------------------------------------------------------------------ one rank counts more


def with_multiples(rank: int, world_size: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    loss = CASES[name].loss
    return value_and_gradients(lambda z1, z2: (rank + 0.5) * loss(z1, z2), *share_of(rank, world_size, 5))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES if "nt_xent" not in name or name.endswith("-0.5")])
def test_a_rank_may_multiply_its_loss(name: str) -> None:
    """The gradient is that of the sum of the ranks' losses, each times what its rank multiplies it by."""
    world_size = 3
    answers = run_distributed(with_multiples, world_size, name)
    if name.startswith("barlow"):  # every rank's loss is the whole
        _, *expected = of_the_whole_batch(CASES[name].reference, 5)
        expected = [gradient * sum(rank + 0.5 for rank in range(world_size)) for gradient in expected]
    else:
        # The loss of the rows of one rank: the gradient of log sum exp of the other columns, by autograd.
        z = [z.clone().requires_grad_() for z in batch(5)]
        unit = torch.cat([torch.nn.functional.normalize(part, dim=1) for part in z])
        logits = (unit @ unit.T / 0.5).fill_diagonal_(-math.inf)
        rows = logits.logsumexp(dim=1) - logits.roll(NUM_IMAGES, 1).diagonal()
        of_ranks = torch.stack([part.mean() for part in rows.view(2, world_size, -1).transpose(0, 1)])
        total = (of_ranks * torch.tensor([rank + 0.5 for rank in range(world_size)])).sum()
        expected = list(torch.autograd.grad(total, z))
    for i, gradient in enumerate(expected, start=1):
        torch.testing.assert_close(torch.cat([answer[i] for answer in answers]), gradient, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------ refusals and choices


def uneven(rank: int, world_size: int, name: str) -> None:
    rows = 2 + (rank == 1)
    with pytest.raises(ValueError, match=r"same number of rows, got \[2, 3, 2\] on ranks 0 to 2"):
        CASES[name].loss(*(torch.randn(rows, 4) for _ in range(2)))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES if "nt_xent" not in name or name.endswith("-0.5")])
def test_uneven_shares_are_refused_on_every_rank(name: str) -> None:
    run_distributed(uneven, 3, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "rows"}, "form must be one of auto, matrix, tiled, got 'rows'"),
        ({"kernels": "cuda"}, "kernels must be one of auto, torch, triton, got 'cuda'"),
        ({"form": "matrix", "bf16_matmul": True}, "bf16_matmul needs form tiled, got form matrix"),
        ({"form": "tiled", "kernels": "triton"}, "the Triton kernels need a CUDA device, got rows on cpu"),
    ],
)
def test_forms_that_do_not_exist_or_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.ones(4, 3), torch.ones(4, 3), **arguments)


def test_a_matrix_in_bf16_is_refused_by_the_configuration() -> None:
    LossConfig(bf16_matmul=True)
    with pytest.raises(ValueError, match=r"nt_xent_form is 'matrix', expected another with loss.bf16_matmul"):
        TrainConfig(loss=LossConfig(bf16_matmul=True), speed=SpeedConfig(nt_xent_form="matrix"))


def choices(rank: int, world_size: int) -> list[str]:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    return [
        choose_nt_xent(256, cpu).form,
        choose_nt_xent(256, cuda).form,
        choose_nt_xent(1536, cuda).form,
        choose_nt_xent(32_768, cuda).form,
        choose_nt_xent(256, cuda, bf16_matmul=True).form,
    ]


@pytest.mark.distributed
def test_what_is_chosen_depends_on_size_and_device() -> None:
    alone = choices(0, 1)
    assert alone == ["tiled", "matrix", "matrix", "tiled", "tiled"]
    assert run_distributed(choices, 2) == 2 * [["tiled", "matrix", "tiled", "tiled", "tiled"]]


# ------------------------------------------------------------------------------------------ half precision, memory


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_bf16_matmul_errs_by_bf16s_rounding(temperature: float) -> None:
    z1, z2 = projections(300, 64, dtype=torch.float32)
    exact = value_and_gradients(partial(nt_xent, temperature=temperature, form="tiled"), z1, z2)
    rounded = value_and_gradients(partial(nt_xent, temperature=temperature, form="tiled", bf16_matmul=True), z1, z2)
    assert 0 < abs(rounded[0] - exact[0]) < 2e-3 / temperature
    for mine, reference in zip(rounded[1:], exact[1:], strict=True):
        assert 0 < (mine - reference).norm() / reference.norm() < 1e-2 / temperature


def largest_tensor(loss: Loss, rows: int) -> int:
    """Elements of the largest tensor that any operation makes, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    z1, z2 = (z.requires_grad_() for z in projections(rows // 2, 8, dtype=torch.float32))
    with Watch():  # type: ignore[no-untyped-call]
        torch.autograd.backward(loss(z1, z2))
    return largest


def test_tiles_hold_no_matrix_of_similarities() -> None:
    assert largest_tensor(partial(nt_xent, form="matrix"), 2048) == 2048**2
    assert largest_tensor(partial(nt_xent, form="tiled"), 2048) == 512**2


def largest_on_a_rank(rank: int, world_size: int) -> int:
    TILE["cpu"] = 16
    try:
        return largest_tensor(partial(nt_xent, form="tiled"), 512)
    finally:
        TILE["cpu"] = 512


@pytest.mark.distributed
def test_on_several_devices_nothing_is_larger_than_all_projections() -> None:
    own = 512 * 8
    assert run_distributed(largest_on_a_rank, 4) == [4 * own] * 4


# ------------------------------------------------------------------------------------------ what goes in


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_views_are_bitwise_the_same_however_a_batch_is_shared(world_size: int) -> None:
    images = torch.randint(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=torch.uint8)
    index = torch.randperm(1000)[:NUM_IMAGES]
    make = partial(
        two_views,
        spec_1=ViewSpec(blur_probability=0.5, solarise_probability=0.5),
        spec_2=ViewSpec(crop_scale=(0.08, 1.0), interpolation="bicubic"),
        seed=3, epoch=5, size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3),
    )  # fmt: skip
    whole = make(images, index)
    shares = [make(a, b) for a, b in zip(images.chunk(world_size), index.chunk(world_size), strict=True)]
    for view in (0, 1):
        assert torch.equal(torch.cat([share[view] for share in shares]), whole[view])
