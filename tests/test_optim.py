"""The learning rate's closed forms, LARS against its formula in plain numbers, and which parameters decay."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr.config import OptimizerConfig
from simclr.models import ModelConfig, SimCLR
from simclr.optim import (
    LARS,
    Muon,
    _shares,
    describe_groups,
    make_optimizer,
    orthogonalise,
    parameter_groups,
    set_learning_rate,
)
from simclr.schedule import learning_rate_at
from tests.helpers import run_distributed

# -------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.2),  # 1 / 10 of the warm-up
        (4, 1.0),
        (9, 2.0),  # its end: the peak
        (10, 2.0),  # the cosine's beginning: the peak
        (10 + 30, 1.5),  # a third of the cosine: (1 + cos 60 degrees) / 2
        (10 + 45, 1.0),  # half of it: midway
        (99, 2.0 * (1 - math.cos(math.pi / 90)) / 2),  # the last step, one before the end
    ],
)
def test_learning_rate_closed_forms(step: int, expected: float) -> None:
    rate = learning_rate_at(step, peak=2.0, total_steps=100, warmup_steps=10)
    assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (100, 0), (100, 99), (1000, 100)])
def test_learning_rate_rises_then_falls_and_stays_positive(total: int, warmup: int) -> None:
    rates = [learning_rate_at(step, peak=0.3, total_steps=total, warmup_steps=warmup) for step in range(total)]
    assert all(0 < rate <= 0.3 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) == pytest.approx(0.3)
    backwards = [
        learning_rate_at(step, peak=0.3, total_steps=total, warmup_steps=warmup) for step in reversed(range(total))
    ]
    assert backwards[::-1] == rates  # of the step alone, whatever was asked before


@pytest.mark.parametrize("step", [-1, 10])
def test_learning_rate_outside_the_run_raises(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} lies outside the run's steps 0 to 9"):
        learning_rate_at(step, peak=1.0, total_steps=10)


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_learning_rate_with_a_warmup_longer_than_the_run_raises(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"warmup_steps is {warmup}, expected at least 0 and less than total_steps 10"):
        learning_rate_at(0, peak=1.0, total_steps=10, warmup_steps=warmup)


# ----------------------------------------------------------------------------------------------------- LARS


def norm(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values))


def lars_by_hand(w: list[float], gradients: list[list[float]], rates: list[float], options: dict[str, Any]) -> Any:
    """LARS on one tensor in Python's floats, which are float64."""
    buffer = [0.0] * len(w)
    for g, lr in zip(gradients, rates, strict=True):
        decayed = [gi + options["weight_decay"] * wi for gi, wi in zip(g, w, strict=True)]
        scale = 1.0
        if options["adapt"] and norm(w) > 0 and norm(decayed) > 0:
            scale = options["trust_coefficient"] * norm(w) / norm(decayed)
            if options["clip"]:
                scale = 1.0 if lr == 0 else min(scale / lr, 1.0)
        buffer = [options["momentum"] * b + scale * d for b, d in zip(buffer, decayed, strict=True)]
        w = [wi - lr * b for wi, b in zip(w, buffer, strict=True)]
    return w


def take_steps(optimizer: torch.optim.Optimizer, parameter: Tensor, gradients: Tensor, rates: list[float]) -> None:
    for gradient, rate in zip(gradients, rates, strict=True):
        set_learning_rate(optimizer, rate)
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


RATES = [0.05, 0.5, 2.0, 0.0, 0.3, 1e-4]


def random_run(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return weights, scale * torch.randn(len(RATES), 3, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("gradient_scale", [1.0, 1e-3])  # with the small ones, clipping does limit
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lars_is_its_formula(
    weight_decay: float, momentum: float, adapt: bool, clip: bool, gradient_scale: float, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"weight_decay": weight_decay, "momentum": momentum, "adapt": adapt, "clip": clip}
    weights, gradients = random_run(gradient_scale)
    parameter = nn.Parameter(weights.to(dtype, copy=True))
    take_steps(LARS([parameter], lr=0.0, trust_coefficient=0.02, **options), parameter, gradients, RATES)
    expected = lars_by_hand(
        weights.flatten().tolist(), gradients.flatten(1).tolist(), RATES, {**options, "trust_coefficient": 0.02}
    )
    rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (1e-4, 1e-5)
    torch.testing.assert_close(parameter.flatten().tolist(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("gradient_scale", [1e-4, 1.0])
def test_a_clipped_step_is_the_smaller_of_the_two_rates(gradient_scale: float) -> None:
    """Without momentum: w moves by min(trust * |w| / |g|, lr) * g, on either side of the limit."""
    weights, gradients = random_run(gradient_scale)
    lr, gradient = 0.05, gradients[0]
    own_rate = 0.02 * weights.norm() / gradient.norm()
    assert bool(own_rate > lr) == (gradient_scale < 1)
    parameter = nn.Parameter(weights.clone())
    take_steps(LARS([parameter], lr, momentum=0.0, trust_coefficient=0.02, clip=True), parameter, gradients[:1], [lr])
    torch.testing.assert_close(parameter.detach(), weights - own_rate.clamp(max=lr) * gradient)


@pytest.mark.parametrize(("weights", "gradient"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("clip", [True, False])
def test_zero_norms_take_plain_steps(weights: float, gradient: float, clip: bool) -> None:
    """A tensor that starts at zero, such as a zero-initialised scale, moves; nothing becomes nan."""
    parameter = nn.Parameter(torch.full((2, 2), weights))
    take_steps(LARS([parameter], 0.1, clip=clip), parameter, torch.full((1, 2, 2), gradient), [0.1])
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), weights - 0.1 * gradient))


def test_lars_skips_parameters_without_gradient_and_runs_a_closure() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LARS([used, unused], lr=0.1, adapt=False)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (used**2).sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert used.tolist() == pytest.approx([0.8, 0.8])
    assert unused.tolist() == [1.0, 1.0]
    assert unused not in optimizer.state


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -0.1), ("momentum", 1.0), ("momentum", -0.1), ("weight_decay", -1e-4), ("trust_coefficient", 0.0)],
)
def test_lars_options_out_of_range_raise(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"LARS: {name} is {value}, expected"):
        LARS([{"params": [nn.Parameter(torch.ones(2))], name: value}], lr=0.1)


# ----------------------------------------------------------------------------------------------------- Muon


def orthogonalised_by_hand(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The polynomial, five times over, on each singular value; the singular vectors stay."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(matrix)
    if len(s) > 1:
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    product: NDArray[np.float64] = u * s @ vt
    return product


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_orthogonalise_works_on_singular_values(shape: tuple[int, int], size: float) -> None:
    matrix = size * np.random.default_rng(0).standard_normal(shape)
    found = orthogonalise(torch.from_numpy(matrix)[None])[0].numpy()
    np.testing.assert_allclose(found, orthogonalised_by_hand(matrix), rtol=0, atol=1e-12)
    values = np.linalg.svd(found, compute_uv=False)
    assert 0.65 < values.min() <= values.max() < 1.25


def test_what_has_no_direction_stays() -> None:
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))
    one_direction = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0, 0.0]))
    found = orthogonalise(one_direction[None])[0]
    assert torch.linalg.matrix_rank(found, rtol=1e-4) == 1
    torch.testing.assert_close(found / found.norm(), one_direction / one_direction.norm())


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (16, 3), (7,), ()], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_muon_is_its_formula(shape: tuple[int, ...], momentum: float) -> None:
    generator = np.random.default_rng(0)
    w, gradients = generator.standard_normal(shape), generator.standard_normal((len(RATES), *shape))
    parameter = nn.Parameter(torch.tensor(w))
    optimizer = Muon([parameter], lr=0.0, momentum=momentum, weight_decay=0.1)
    take_steps(optimizer, parameter, torch.from_numpy(gradients), RATES)
    buffer = np.zeros(shape)
    for g, lr in zip(gradients, RATES, strict=True):
        buffer = momentum * buffer + g
        matrix = (g + momentum * buffer).reshape(shape[0] if len(shape) > 1 else 1, -1)
        direction = orthogonalised_by_hand(matrix).reshape(shape)
        w = w - lr * (0.2 * math.sqrt(max(matrix.shape)) * direction + 0.1 * w)
    np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-10, atol=1e-12)


def steps_of_muon(rank: int, world_size: int) -> tuple[dict[str, Tensor], list[str]]:
    """Three steps of matrices of several shapes and of vectors; the result, and what was sent in the last step."""
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(8, 4, 3, 3), (8, 4, 3, 3), (8, 4, 3, 3), (6, 8), (4, 4), (5,), (), (1, 7)]
    parameters = {str(i): nn.Parameter(torch.randn(shape, dtype=torch.float64)) for i, shape in enumerate(shapes)}
    optimizer = Muon(parameters.values(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
    momenta = {f"momentum {name}": optimizer.state[p]["momentum_buffer"] for name, p in parameters.items()}
    sent = [event.name for event in profile.events() if event.name.startswith("c10d::")]
    return {name: p.detach() for name, p in parameters.items()} | momenta, sent


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_muon_on_several_ranks_is_muon_on_one(world_size: int) -> None:
    expected, _ = steps_of_muon(0, 1)
    for found, sent in run_distributed(steps_of_muon, world_size):
        assert sent == ["c10d::_allgather_base_"]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


def test_each_matrix_is_orthogonalised_by_one_rank_and_all_ranks_are_as_busy() -> None:
    stacks = ((4, 64, 576), (3, 128, 1152), (1, 512, 4608), (3, 512, 512), (20, 1, 64))
    for world_size in (1, 2, 3, 8):
        shares = _shares(stacks, world_size)
        for (k, rows, _), share in zip(stacks, shares, strict=True):
            owned = [matrix for of_rank in share for matrix in range(k)[of_rank]]
            assert sorted(owned) == sorted(list(range(k)) * (world_size if rows == 1 else 1))
    # The dearest one is more than all others together: it has a rank of its own.
    sizes = [[of_rank.stop - of_rank.start for of_rank in share] for share in _shares(stacks, 2)]
    assert sizes == [[0, 4], [0, 3], [1, 0], [0, 3], [20, 20]]


@pytest.mark.parametrize("kind", [LARS, Muon])
def test_a_step_to_be_left_out_changes_nothing(kind: Any) -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = kind([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
    for found_inf, gradient in ((1.0, math.nan), (0.0, 1.0), (1.0, math.inf)):
        before = copy.deepcopy((parameter.detach(), optimizer.state[parameter].get("momentum_buffer")))
        optimizer.found_inf = torch.tensor(found_inf)
        parameter.grad = torch.full((2, 3), gradient)
        optimizer.step()
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(parameter, before[0]) == bool(found_inf)
        assert torch.equal(buffer, torch.zeros(2, 3) if before[1] is None else before[1]) == bool(found_inf)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "muon"])
def test_the_saved_state_continues_bit_for_bit(name: Any) -> None:
    config = OptimizerConfig(name=name, weight_decay=0.1, lars_clip=True)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        return model, make_optimizer(model, config)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_learning_rate(optimizer, 0.1 / (step + 1))
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            torch.autograd.backward(model(x).square().mean())
            optimizer.step()

    model, optimizer = fresh()
    train(model, optimizer, range(3))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = fresh()
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    train(resumed, resumed_optimizer, range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


# --------------------------------------------------------------------------------------------------- groups


@pytest.fixture(scope="module")
def model() -> SimCLR:
    return SimCLR(ModelConfig("resnet18", projector="simclr2", projector_hidden=16, projection_dim=8), image_size=32)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "muon"])
@pytest.mark.parametrize("decay_all", [True, False])
def test_groups_hold_every_parameter_once(model: SimCLR, name: Any, decay_all: bool) -> None:
    config = OptimizerConfig(name=name, weight_decay=1e-4, decay_biases_and_norms=decay_all)
    groups = parameter_groups(model, config)
    by_name = dict(model.named_parameters())
    names = [n for group in groups for n in group["names"]]
    assert sorted(names) == sorted(by_name)
    for group in groups:
        assert all(by_name[n] is p for n, p in zip(group["names"], group["params"], strict=True))
    optimizer = make_optimizer(model, config)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(by_name)
    assert {id(p) for p in held} == {id(p) for p in by_name.values()}


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "muon"])
def test_biases_and_normalisation_are_excluded_everywhere(model: SimCLR, name: Any) -> None:
    """Found by module, where the code looks at shapes: also in the downsampling paths and the projector."""
    expected = {
        f"{path}.{parameter}"
        for path, module in model.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
        if parameter == "bias" or isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    }
    assert {"encoder.layer2.0.downsample.1.weight", "projector.1.weight", "projector.3.bias"} <= expected
    decayed, excluded = parameter_groups(model, OptimizerConfig(name=name, weight_decay=0.5))
    assert set(excluded["names"]) == expected
    assert (decayed["weight_decay"], excluded["weight_decay"]) == (0.5, 0.0)
    assert (decayed.get("adapt"), excluded.get("adapt")) == ((True, False) if name == "lars" else (None, None))

    (everything,) = parameter_groups(model, OptimizerConfig(name=name, weight_decay=0.5, decay_biases_and_norms=True))
    assert everything["weight_decay"] == 0.5
    assert everything.get("adapt") == (True if name == "lars" else None)


def test_frozen_parameters_are_in_no_group() -> None:
    layer = nn.Linear(2, 3)
    layer.bias.requires_grad_(False)
    (group,) = parameter_groups(layer, OptimizerConfig())
    assert group["names"] == ["weight"]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8}),
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.999)}),
        ("lars", LARS, {"momentum": 0.8, "trust_coefficient": 0.02, "clip": True}),
        ("muon", Muon, {"momentum": 0.8}),
    ],
)
def test_make_optimizer_passes_the_configuration_on(
    model: SimCLR, name: Any, kind: type, expected: dict[str, Any]
) -> None:
    config = OptimizerConfig(name=name, momentum=0.8, weight_decay=0.3, lars_trust_coefficient=0.02, lars_clip=True)
    optimizer = make_optimizer(model, config)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected
        assert group["lr"] == 0.0
    set_learning_rate(optimizer, 0.7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]


def test_describe_groups() -> None:
    network = nn.Sequential(nn.Linear(10, 100), nn.BatchNorm1d(100), nn.Linear(100, 20))
    lines = describe_groups(parameter_groups(network, OptimizerConfig(name="lars", weight_decay=1e-4)))
    assert lines == [
        "2 tensors, 3,000 parameters, weight decay 0.0001, LARS adapts: 0.weight, 2.weight",
        "4 tensors, 320 parameters, weight decay 0, LARS does not adapt: 0.bias, 1.weight, 1.bias, ... 2.bias",
    ]
    lines = describe_groups(parameter_groups(network, OptimizerConfig(name="sgd", decay_biases_and_norms=True)))
    assert lines == ["6 tensors, 3,320 parameters, weight decay 0.0005: 0.weight, 0.bias, 1.weight, ... 2.bias"]
