"""The losses against the papers' formulas, written out as loops over scalars in float64; on 1, 2 and 4 processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr.losses import barlow_twins, nt_xent
from tests.helpers import run_distributed

Loss = Callable[[Tensor, Tensor], Tensor]


def nt_xent_by_the_paper(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    """Algorithm 1 and equation 1 of arXiv:2002.05709; images 2k-1 and 2k of the paper are z1[k], z2[k]."""
    z = [row for pair in zip(z1, z2, strict=True) for row in pair]

    def s(i: int, j: int) -> Tensor:
        cosine: Tensor = (z[i] * z[j]).sum() / (z[i].square().sum().sqrt() * z[j].square().sum().sqrt())
        return cosine

    def l(i: int, j: int) -> Tensor:  # noqa: E743  the paper's name
        logits = [s(i, k) / temperature for k in range(len(z)) if k != i]
        largest = max(float(logit.detach()) for logit in logits)
        denominator = torch.stack([(logit - largest).exp() for logit in logits]).sum()
        return -(s(i, j) / temperature - largest - denominator.log())

    return torch.stack([l(i, i + 1) + l(i + 1, i) for i in range(0, len(z), 2)]).sum() / len(z)


def barlow_twins_by_the_paper(z1: Tensor, z2: Tensor, *, off_diagonal_weight: float, centre: bool) -> Tensor:
    """Equations 1 and 2 of arXiv:2103.03230; centred, as its text says, or as the equations are printed."""
    n, d = z1.shape

    def feature(z: Tensor, i: int) -> list[Tensor]:
        mean = sum(z[:, i]) / n if centre else 0.0
        return [z[b, i] - mean for b in range(n)]

    total = torch.zeros((), dtype=z1.dtype)
    for i in range(d):
        for j in range(d):
            a, b = feature(z1, i), feature(z2, j)
            norms = torch.stack(a).square().sum().sqrt() * torch.stack(b).square().sum().sqrt()
            c = torch.stack([x * y for x, y in zip(a, b, strict=True)]).sum() / norms
            total = total + ((1 - c) ** 2 if i == j else off_diagonal_weight * c**2)
    return total


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "nt_xent": (nt_xent, partial(nt_xent_by_the_paper, temperature=0.5)),
    "nt_xent at 0.1": (partial(nt_xent, temperature=0.1), partial(nt_xent_by_the_paper, temperature=0.1)),
    "barlow_twins": (barlow_twins, partial(barlow_twins_by_the_paper, off_diagonal_weight=5e-3, centre=True)),
    "barlow_twins as printed": (
        partial(barlow_twins, off_diagonal_weight=0.2, centre=False),
        partial(barlow_twins_by_the_paper, off_diagonal_weight=0.2, centre=False),
    ),
}


def projections(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two views' projections that resemble each other, with means and scales of their own per feature."""
    generator = torch.Generator().manual_seed(seed)
    common, noise_1, noise_2 = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    scale, shift = torch.rand(2, d, generator=generator, dtype=torch.float64)
    z1, z2 = ((common + noise) * (0.2 + scale) + shift for noise in (noise_1, noise_2))
    return z1.to(dtype), z2.to(dtype)


def value_and_gradients(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = loss(z1, z2)
    gradient_1, gradient_2 = torch.autograd.grad(value, (z1, z2))
    return value.detach(), gradient_1, gradient_2


# ---------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 4), (7, 3), (8, 16)])
def test_value_and_gradient_are_the_papers(name: str, n: int, d: int) -> None:
    loss, reference = LOSSES[name]
    actual = value_and_gradients(loss, *projections(n, d))
    torch.testing.assert_close(actual, value_and_gradients(reference, *projections(n, d)), rtol=1e-10, atol=1e-12)
    assert actual[0].shape == ()


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    z1, z2 = projections(5, 3)
    assert torch.autograd.gradcheck(LOSSES[name][0], (z1.requires_grad_(), z2.requires_grad_()))


@pytest.mark.parametrize("name", LOSSES)
def test_symmetric_and_independent_of_the_order_of_images(name: str) -> None:
    loss, (z1, z2) = LOSSES[name][0], projections(6, 4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for other in (loss(z2, z1), loss(z1[order], z2[order])):
        torch.testing.assert_close(other, loss(z1, z2))


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("n", [2, 5])
def test_nt_xent_closed_forms(n: int, temperature: float) -> None:
    def value(z1: Tensor, z2: Tensor) -> float:
        return nt_xent(z1, z2, temperature=temperature).item()

    axes = torch.eye(2 * n, dtype=torch.float64)
    same, other, t = axes[:n], axes[n:], 1 / temperature
    ones = torch.ones(n, 3, dtype=torch.float64)
    assert value(ones, ones) == pytest.approx(math.log(2 * n - 1))
    assert value(same, other) == pytest.approx(math.log(2 * n - 1))
    assert value(same, same) == pytest.approx(math.log(math.exp(t) + 2 * n - 2) - t)
    assert value(same, -same) == pytest.approx(math.log(math.exp(-t) + 2 * n - 2) + t)
    z1, z2 = projections(n, 3)
    lengths = torch.linspace(1e-3, 1e3, n, dtype=torch.float64)[:, None]
    assert value(z1 * lengths, z2 / lengths) == pytest.approx(value(z1, z2))


def test_barlow_twins_closed_forms() -> None:
    d, weight = 3, 0.25
    # columns of a Hadamard matrix: centred and uncorrelated
    z = torch.tensor([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], dtype=torch.float64)
    repeated = z[:, :1].expand(4, d)
    for centre in (True, False):
        loss = partial(barlow_twins, off_diagonal_weight=weight, centre=centre)
        assert loss(z, z).item() == pytest.approx(0)
        assert loss(z, -z).item() == pytest.approx(4 * d)
        assert loss(z, z[:, [1, 2, 0]]).item() == pytest.approx(d + weight * d)
        assert loss(repeated, repeated).item() == pytest.approx(weight * d * (d - 1))
        scale = torch.tensor([1e-3, 2.0, 500.0], dtype=torch.float64)
        assert loss(z * scale, z).item() == pytest.approx(0)
    shifted = z + torch.tensor([1.0, -2.0, 10.0])
    assert barlow_twins(shifted, z).item() == pytest.approx(0)
    # Not centred, C_ii is 1 / sqrt(1 + shift^2), and nothing else correlates
    expected = sum((1 - 1 / math.sqrt(1 + shift**2)) ** 2 for shift in (1, -2, 10))
    assert barlow_twins(shifted, z, centre=False).item() == pytest.approx(expected)


@pytest.mark.parametrize("n", [4, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_barlow_twins_of_constant_features(n: int, dtype: torch.dtype) -> None:
    """A constant feature does not correlate, whatever rounding error centring leaves of it; nor does it learn."""
    z1, z2 = (z.contiguous() for z in projections(n, 8, dtype=dtype))
    constants = torch.tensor([0.0, 0.1, -3.3, 1e6, 1e-6], dtype=dtype)
    z1[:, :5], z2[:, :5] = constants, -constants
    value, *gradients = value_and_gradients(partial(barlow_twins, off_diagonal_weight=0.1), z1, z2)
    rest = barlow_twins(z1[:, 5:], z2[:, 5:], off_diagonal_weight=0.1)
    torch.testing.assert_close(value, rest + 5)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient[:, :5].abs().max() == 0
        assert gradient[:, 5:].abs().max() > 0


def test_nt_xent_of_a_projection_of_zeros() -> None:
    z1, z2 = projections(4, 3, dtype=torch.float32)
    z1[1] = 0
    value, gradient_1, gradient_2 = value_and_gradients(nt_xent, z1, z2)
    assert value.isfinite()
    assert torch.equal(gradient_1[1], torch.zeros(3))
    assert gradient_1.abs().max() < 10
    assert gradient_2.isfinite().all()


def extreme_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    z1, z2 = projections(6, 8)
    return {"ordinary": (z1, z2), "equal views": (z1, z1 + 1e-6 * z2), "opposite views": (z1, -z1 + 1e-6 * z2)}


@pytest.mark.parametrize("kind", extreme_pairs())
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_nt_xent_is_stable_in_float32_at_temperature_0_01(kind: str, scale: float) -> None:
    z1, z2 = (z.float() for z in extreme_pairs()[kind])
    actual = value_and_gradients(partial(nt_xent, temperature=0.01), z1 * scale, z2 * scale)
    expected = value_and_gradients(partial(nt_xent_by_the_paper, temperature=0.01), z1.double(), z2.double())
    # float32's rounding of a similarity, 1e-7, divided by the temperature
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=5e-5)
    for mine, reference in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine.double() * scale, reference, rtol=2e-3, atol=2e-4)


# -------------------------------------------------------------------------- the ends of float32's range

FORMS: dict[str, tuple[Loss, Loss]] = {
    **{
        f"nt_xent, {form}": (partial(nt_xent, form=form), partial(nt_xent_by_the_paper, temperature=0.5))
        for form in ("matrix", "tiled")
    },
    **{
        f"barlow_twins{'' if centre else ' as printed'}": (
            partial(barlow_twins, centre=centre),
            partial(barlow_twins_by_the_paper, off_diagonal_weight=5e-3, centre=centre),
        )
        for centre in (True, False)
    },
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("scale", [*(float(f"1e{power}") for power in range(-43, 39, 4)), 1e38, 3e38, "mixed"])
def test_lengths_and_deviations_anywhere_in_float32(name: str, scale: float | str) -> None:
    """Value and gradient are the formula's of the same numbers in float64; a gradient beyond float32 is infinite."""
    loss, reference = FORMS[name]
    z1, z2 = projections(6, 8)
    if isinstance(scale, str):  # each row, or each feature, has a scale of its own
        powers = torch.logspace(-37, 37, 6 if "nt_xent" in name else 8, dtype=torch.float64)
        scales = powers[:, None] if "nt_xent" in name else powers
    else:
        scales = torch.tensor(scale, dtype=torch.float64)
    largest = torch.maximum(z1.abs().max(), z2.abs().max())
    z1, z2 = ((scales * (z / largest)).float() for z in (z1, z2))
    value, *gradients = value_and_gradients(loss, z1, z2)
    expected, *exact = value_and_gradients(reference, z1.double(), z2.double())
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=0)
    for mine, gradient in zip(gradients, exact, strict=True):
        limits = torch.finfo(torch.float32)
        fits, beyond = gradient.abs() < 0.99 * limits.max, gradient.abs() > 1.01 * limits.max
        assert not mine.isnan().any()
        assert (mine[beyond] == gradient[beyond].sign() * math.inf).all()
        # relative to the row's or the feature's largest, and to the least number that float32 has
        size = gradient.abs().amax(dim=1 if "nt_xent" in name else 0, keepdim=True)
        error = (mine.double() - gradient).abs()
        assert (error <= 1e-4 * size + 8 * limits.smallest_normal * limits.eps)[fits].all()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one number", "a row", "a feature", "all"])
def test_what_is_not_finite_gives_no_finite_loss(name: str, value: float, where: str) -> None:
    z1, z2 = projections(6, 8, dtype=torch.float32)
    at: Any = {"one number": (2, 3), "a row": (2, slice(None)), "a feature": (slice(None), 3), "all": ...}[where]
    z1[at] = value
    for pair in ((z1, z2), (z2, z1), (z1, z1)):
        assert FORMS[name][0](*pair).isnan()


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("n", [16, 1000])
def test_barlow_twins_of_features_far_from_zero(ratio: float, n: int) -> None:
    """Of features a few of whose last digits vary, those digits are what counts."""
    z1, z2 = projections(n, 6)
    centres = torch.tensor([1, -1, 3, 1e-3, -1e30, 1e-30], dtype=torch.float64)
    z1, z2 = (((1 + z / ratio) * centres).float() for z in (z1 - z1.mean(0), z2 - z2.mean(0)))
    value, *gradients = value_and_gradients(barlow_twins, z1, z2)
    wide = [
        (z - z.mean(dim=0)).requires_grad_() for z in (z1.double(), z2.double())
    ]  # the loops take seconds for these
    unit = [z / torch.linalg.vector_norm(z, dim=0) for z in wide]
    c = unit[0].T @ unit[1]
    expected = (1 - c.diagonal()).square().sum() + 5e-3 * (c - torch.diag(c.diagonal())).square().sum()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=0)
    for mine, gradient in zip(gradients, torch.autograd.grad(expected, wide), strict=True):
        assert ((mine - gradient).norm(dim=0) <= 1e-4 * gradient.norm(dim=0)).all()


@pytest.mark.parametrize("loss", [partial(nt_xent, temperature=0.01), barlow_twins])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_computed_in_float32_at_least(loss: Loss, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    # lengths of 10^4: their squares do not fit into float16
    z1, z2 = ((1e4 * z / z.abs().max()).to(dtype) for z in projections(16, 64))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss(z1.requires_grad_(), z2.requires_grad_())
    gradients = torch.autograd.grad(value, (z1, z2))  # outside, as torch asks for
    expected, *expected_gradients = value_and_gradients(loss, z1.detach().to(wide), z2.detach().to(wide))
    assert value.dtype == wide
    assert torch.equal(value, expected)
    for gradient, wide_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, wide_gradient.to(dtype))


GOOD = torch.ones(4, 3)


@pytest.mark.parametrize("loss", [nt_xent, barlow_twins])
@pytest.mark.parametrize(
    ("z1", "z2", "message"),
    [
        (GOOD, torch.ones(4, 2), r"shape \(b, d\) with b, d >= 1, got \(4, 3\) and \(4, 2\)"),
        (GOOD, torch.ones(3, 3), r"got \(4, 3\) and \(3, 3\)"),
        (torch.ones(4), torch.ones(4), r"got \(4,\) and \(4,\)"),
        (torch.ones(2, 2, 2), torch.ones(2, 2, 2), r"got \(2, 2, 2\)"),
        (GOOD[:0], GOOD[:0], r"got \(0, 3\)"),
        (GOOD[:, :0], GOOD[:, :0], r"got \(4, 0\)"),
        (GOOD, GOOD.double(), r"same floating-point dtype, got torch.float32 and torch.float64"),
        (GOOD.long(), GOOD.long(), r"floating-point dtype, got torch.int64"),
        (GOOD.to(torch.complex64), GOOD.to(torch.complex64), r"floating-point dtype, got torch.complex64"),
        (GOOD, GOOD.to_sparse(), r"must be dense, got torch.strided and torch.sparse_coo; z.to_dense\(\)"),
        (GOOD, GOOD.to("meta"), r"must be on the same device, got cpu and meta"),
        (GOOD[:1], GOOD[:1], "needs at least 2 source images in the whole batch, got 1"),
    ],
)
def test_bad_projections_raise(loss: Loss, z1: Tensor, z2: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(z1, z2)


@pytest.mark.parametrize("loss", [nt_xent, barlow_twins])
@pytest.mark.parametrize("other", [None, GOOD.numpy(), GOOD.tolist()])
def test_what_is_no_tensor_is_refused(loss: Loss, other: Any) -> None:
    kind = type(other).__name__
    with pytest.raises(TypeError, match=rf"torch tensors of shape \(b, d\), got Tensor and {kind}; torch.as_tensor"):
        loss(GOOD, other)


def test_settings_are_numbers_and_get_no_gradient() -> None:
    z1, z2 = projections(6, 4)
    for form in ("matrix", "tiled"):
        of_tensor = nt_xent(z1, z2, temperature=torch.tensor(0.25), form=form)  # type: ignore[arg-type]
        assert torch.equal(of_tensor, nt_xent(z1, z2, temperature=0.25, form=form))
        with pytest.raises(ValueError, match=r"temperature is a tensor that requires a gradient, .* pass float\(temp"):
            nt_xent(z1, z2, temperature=torch.tensor(0.5, requires_grad=True), form=form)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"off_diagonal_weight is a tensor that requires a gradient"):
        barlow_twins(z1, z2, off_diagonal_weight=torch.tensor(0.5, requires_grad=True))  # type: ignore[arg-type]
    for other in (None, "0.5", [0.5], torch.ones(2)):
        with pytest.raises(TypeError, match="temperature must be a number, got"):
            nt_xent(z1, z2, temperature=other)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature_and_weight_raise(value: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be a positive finite number, got {value}"):
        nt_xent(GOOD, GOOD, temperature=value)
    if value:
        with pytest.raises(ValueError, match=f"off_diagonal_weight must be finite and >= 0, got {value}"):
            barlow_twins(GOOD, GOOD, off_diagonal_weight=value)


# ---------------------------------------------------------------------------------------- several processes


def loss_of_share(rank: int, world_size: int, name: str, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert dist.get_world_size() == world_size
    mine = [z.chunk(world_size)[rank].clone() for z in (z1, z2)]
    return value_and_gradients(LOSSES[name][0], *mine)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_any_number_of_devices_is_one_device(name: str, world_size: int) -> None:
    """The ranks' mean loss and its gradient are those of the paper's formula on the whole batch."""
    z1, z2 = projections(8, 5)
    assert all(not torch.equal(a, b) for a, b in zip(z1.chunk(4)[:-1], z1.chunk(4)[1:], strict=True))
    expected, *expected_gradients = value_and_gradients(LOSSES[name][1], z1, z2)
    results = run_distributed(loss_of_share, world_size, name, z1, z2)
    values = torch.stack([value for value, *_ in results])
    torch.testing.assert_close(values.mean(), expected, rtol=1e-10, atol=1e-12)
    if name.startswith("barlow"):
        torch.testing.assert_close(values, expected.expand(world_size), rtol=1e-10, atol=1e-12)
    for i, gradient in enumerate(expected_gradients, start=1):
        # each rank's gradient is that of the sum of all ranks' losses, with respect to its rows
        of_the_mean = torch.cat([result[i] for result in results]) / world_size
        torch.testing.assert_close(of_the_mean, gradient, rtol=1e-10, atol=1e-12)


def small_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).double()


def images() -> tuple[Tensor, Tensor]:
    return projections(8, 6, seed=3)


def gradients_through_ddp(rank: int, world_size: int, name: str) -> list[Tensor]:
    assert dist.get_world_size() == world_size
    model: nn.Module = DistributedDataParallel(small_model())
    view_1, view_2 = (x.chunk(world_size)[rank] for x in images())
    z1, z2 = model(torch.cat([view_1, view_2])).chunk(2)
    torch.autograd.backward(LOSSES[name][0](z1, z2))
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_parameter_gradients_of_ddp_are_those_of_one_device(name: str, world_size: int) -> None:
    model = small_model()
    torch.autograd.backward(LOSSES[name][1](*(model(x) for x in images())))
    expected = [p.grad for p in model.parameters()]
    for gradients in run_distributed(gradients_through_ddp, world_size, name):
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def half_precision_share(rank: int, world_size: int, loss: Loss, z1: Tensor, z2: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss(*(z.chunk(world_size)[rank] for z in (z1, z2)))


@pytest.mark.distributed
@pytest.mark.parametrize("loss", [partial(nt_xent, temperature=0.01), barlow_twins])
def test_half_precision_is_gathered_in_float32(loss: Loss) -> None:
    z1, z2 = (z.bfloat16() for z in projections(8, 16))
    values = torch.stack(run_distributed(half_precision_share, 2, loss, z1, z2))
    torch.testing.assert_close(values.mean(), loss(z1.float(), z2.float()), rtol=1e-6, atol=1e-6)


def extreme_share(rank: int, world_size: int) -> tuple[list[Tensor], bool]:
    """Value and gradients of features of very different sizes, and whether another rank's NaN is noticed."""
    z1, z2 = (z.chunk(world_size)[rank].contiguous() for z in extreme_features())
    found = value_and_gradients(barlow_twins, z1, z2)
    z1[0, 0] = math.nan if rank == 1 else z1[0, 0]
    return list(found), bool(barlow_twins(z1, z2).isnan())


def extreme_features() -> tuple[Tensor, Tensor]:
    z1, z2 = projections(8, 5)
    scales = torch.tensor([1e-30, 1e30, 1, 1, 1e19], dtype=torch.float64)
    shifts = torch.tensor([0, 0, 1e6, 0, -1e25], dtype=torch.float64)
    z1, z2 = ((z * scales + shifts).float() for z in (z1, z2))
    z1[:, 3] = 0.1  # constant
    return z1, z2


@pytest.mark.distributed
def test_features_of_any_size_on_several_devices() -> None:
    expected, *gradients = value_and_gradients(barlow_twins, *extreme_features())
    answers = run_distributed(extreme_share, 2)
    for (value, *_), noticed in answers:
        torch.testing.assert_close(value, expected)
        assert noticed
    for i, gradient in enumerate(gradients, start=1):
        mine = torch.cat([found[i] for found, _ in answers]) / 2
        assert ((mine - gradient).double().norm(dim=0) <= 1e-5 * gradient.double().norm(dim=0)).all()


def uneven(rank: int, world_size: int, loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"same number of rows, got \[4, 3\] on ranks 0 to 1"):
        loss(GOOD[: 4 - rank], GOOD[: 4 - rank])


def single_pair(rank: int, world_size: int, loss: Loss) -> float:
    """One image a rank is enough: the whole batch counts."""
    return float(loss(GOOD[:1] + rank * torch.arange(3), GOOD[:1]))


@pytest.mark.distributed
@pytest.mark.parametrize("loss", [nt_xent, barlow_twins])
def test_numbers_of_images_per_rank(loss: Loss) -> None:
    run_distributed(uneven, 2, loss)
    assert all(math.isfinite(value) for value in run_distributed(single_pair, 2, loss))


@pytest.mark.parametrize("loss", [barlow_twins, partial(nt_xent, form="tiled")])
def test_a_second_derivative_is_an_error_where_there_is_none(loss: Callable[..., Tensor]) -> None:
    z = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r'differentiated once.*form="matrix"'):
        torch.autograd.grad(loss(z, z.detach().flip(0)), z, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(loss)(z.detach(), z.detach())
