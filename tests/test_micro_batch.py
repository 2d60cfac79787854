"""A batch taken in micro-batches gives the step of the whole batch: projections, gradients, running statistics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr.batch_norm import GlobalBatchNorm, replace_batch_norm
from simclr.distributed import average_gradients
from simclr.losses import barlow_twins, nt_xent
from simclr.micro_batch import BatchInParts, split_into_units
from simclr.models import ModelConfig, SimCLR
from tests.helpers import run_distributed

SIDE = 16
VIEWS = 24


def make_model(encoder: str, projector: str = "simclr3", dtype: torch.dtype = torch.float64) -> SimCLR:
    torch.manual_seed(1)
    config = ModelConfig(encoder=encoder, projector=projector, projector_hidden=16, projection_dim=8)  # type: ignore[arg-type]
    model = SimCLR(config, SIDE).to(dtype)
    for layer in model.modules():  # as after some training
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    replace_batch_norm(model)
    return model.train()


class Parallel(nn.Module):
    """An encoder that its children, run in order, do not make up."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3))
        self.right = nn.Sequential(nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6))
        self.last = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.left(x) + self.right(x)).relu().mean((2, 3))
        return y


def parallel_model() -> SimCLR:
    model = make_model("small_resnet_w8").double()
    torch.manual_seed(2)
    model.encoder = Parallel().double()
    model.projector = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).double()
    replace_batch_norm(model)
    return model.train()


def views(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(VIEWS, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)


def loss(z: Tensor) -> Tensor:
    z1, z2 = z.chunk(2)
    return nt_xent(z1, z2, temperature=0.2) + barlow_twins(z1, z2)


def plainly(model: SimCLR, x: Tensor) -> Tensor:
    z: Tensor = model(x)[1]
    torch.autograd.backward(loss(z))
    return z.detach()


def in_parts(model: SimCLR, x: Tensor, rows: int, autocast: Any = contextlib.nullcontext) -> Tensor:
    way = BatchInParts(split_into_units(model, SIDE), rows, autocast)
    z = way.project(x).requires_grad_()
    torch.autograd.backward(loss(z))
    assert z.grad is not None
    way.backward(z.grad)
    return z.detach()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


ENCODERS = ["small_resnet_w8", "resnet10t", "resnet50", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("encoder", [*ENCODERS, "parallel"])
@pytest.mark.parametrize("rows", [VIEWS, 7, 2])  # one part; a last one that is smaller; many
def test_parts_give_the_step_of_the_whole(encoder: str, rows: int) -> None:
    if encoder == "resnet50" and rows == 2:
        pytest.skip("small_resnet_w8 shows it in less time")
    model = parallel_model() if encoder == "parallel" else make_model(encoder)
    other = copy.deepcopy(model)
    expected, found = plainly(model, views()), in_parts(other, views(), rows)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert len(gradients(other)) == len(gradients(model)) == len(list(model.parameters()))
    scale = max(float(gradient.norm()) for gradient in gradients(model))
    for mine, reference in zip(gradients(other), gradients(model), strict=True):
        assert (mine - reference).norm() < 1e-10 * scale
    # Running statistics were updated, once
    for (name, mine), reference in zip(other.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12, msg=name)
        if name.endswith("num_batches_tracked"):
            assert mine == 1


def test_statistics_of_each_micro_batch_would_be_another_step() -> None:
    # So the test above would notice.
    model = make_model("small_resnet_w8")
    other = copy.deepcopy(model)
    expected = plainly(model, views())
    found = torch.cat([other(part)[1] for part in views().split(7)])  # type: ignore[no-untyped-call]
    assert (found - expected).norm() > 0.1 * expected.norm()


def test_a_second_batch_is_as_exact_as_the_first() -> None:
    model = make_model("small_resnet_w8")
    other = copy.deepcopy(model)
    for x in (views(), views().flip(0) * 2):
        plainly(model, x)
        in_parts(other, x, 5)
    for mine, reference in zip(gradients(other), gradients(model), strict=True):  # summed over both
        assert (mine - reference).norm() <= 1e-10 * (reference.norm() + 1)
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()), rtol=1e-10, atol=1e-12)


def test_in_autocast_parts_round_as_the_whole_does() -> None:
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    exact, whole, parts = (make_model("small_resnet_w8", dtype=torch.float32) for _ in range(3))
    x = views(torch.float32)
    plainly(exact, x)
    with autocast():
        z: Tensor = whole(x)[1]
    torch.autograd.backward(loss(z))
    assert in_parts(parts, x, 5, autocast).dtype == torch.bfloat16
    of_rounding, of_parts = (
        sum(float((a - b).square().sum()) for a, b in zip(gradients(one), gradients(other), strict=True)) ** 0.5
        for one, other in ((whole, exact), (parts, whole))
    )
    assert of_rounding > 0
    assert of_parts < 0.5 * of_rounding


# ------------------------------------------------------------------------------------------ memory


@contextlib.contextmanager
def watching_passes(model: nn.Module) -> Iterator[list[tuple[int, bool]]]:
    """Rows of each pass through a convolution, and whether it left a graph."""
    seen: list[tuple[int, bool]] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, x, _y: seen.append((len(x[0]), torch.is_grad_enabled())))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_no_pass_is_of_more_than_a_micro_batch() -> None:
    model = make_model("small_resnet_w8")
    with watching_passes(model) as seen:
        in_parts(model, views(), 7)
    assert max(rows for rows, _ in seen) == 7


@pytest.mark.parametrize("has_batch_norm", [False, True])
def test_passes_are_as_many_as_said(has_batch_norm: bool) -> None:
    """Without batch normalisation one forward pass more; a layer that its unit begins with costs no more either."""
    model = make_model("small_resnet_w8", "none")
    normalise = (lambda: GlobalBatchNorm(4)) if has_batch_norm else nn.Identity
    torch.manual_seed(0)
    model.encoder = nn.Sequential(
        nn.Conv2d(3, 4, 3), normalise(), nn.ReLU(), nn.Conv2d(4, 4, 3), normalise(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 8),
    ).double()  # fmt: skip
    units = split_into_units(model.train(), SIDE)
    assert len(units) == (3 if has_batch_norm else 1)
    with watching_passes(model) as seen:
        in_parts(model, views(), VIEWS // 2)
    has_graph = [graph for rows, graph in seen if rows == VIEWS // 2]
    # 2 micro-batches through 2 convolutions, without a graph and with one
    assert (has_graph.count(False), has_graph.count(True)) == (4, 4)


def bytes_kept(step: Any) -> int:
    """The most bytes that autograd holds for backward passes at any time."""
    held: dict[int, int] = {}
    most = 0

    class Handle:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal most
            self.tensor = tensor.detach()  # itself, an output would hold its own graph
            held[id(self)] = tensor.numel() * tensor.element_size()
            most = max(most, sum(held.values()))

        def __del__(self) -> None:
            del held[id(self)]

    with torch.autograd.graph.saved_tensors_hooks(Handle, lambda handle: handle.tensor):
        step()
    return most


def test_autograd_keeps_a_micro_batch_at_most() -> None:
    model = make_model("small_resnet_w8")
    whole = bytes_kept(lambda: plainly(model, views()))
    parts = bytes_kept(lambda: in_parts(model, views(), 2))
    assert parts < whole / 8


# ------------------------------------------------------------------------------------------ several ranks


def step_of_share(rank: int, world_size: int, rows: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    assert dist.get_world_size() == world_size
    model = make_model("small_resnet_w8")
    x = torch.cat([half.chunk(world_size)[rank] for half in views().chunk(2)])
    z = in_parts(model, x, rows)
    average_gradients(model.parameters())
    return z, gradients(model), list(model.buffers())


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_parts_on_several_ranks_give_the_step_of_one(world_size: int) -> None:
    model = make_model("small_resnet_w8")
    expected = plainly(model, views())
    answers = run_distributed(step_of_share, world_size, 3)
    assert len(answers) == world_size
    halves = [torch.cat([answer[0].chunk(2)[view] for answer in answers]) for view in (0, 1)]
    torch.testing.assert_close(torch.cat(halves), expected, rtol=1e-9, atol=1e-10)
    scale = max(float(gradient.norm()) for gradient in gradients(model))
    for _, mine, buffers in answers:
        for gradient, reference in zip(mine, gradients(model), strict=True):
            assert (gradient - reference).norm() < 1e-10 * scale
        torch.testing.assert_close(buffers, list(model.buffers()), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------ refusals


def test_layers_that_draw_anew_in_each_pass_are_refused() -> None:
    model = make_model("small_resnet_w8")
    model.projector = nn.Sequential(model.projector, nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"layer projector.1 drops units at random"):
        split_into_units(model, SIDE)


def test_a_layer_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = GlobalBatchNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.norm(x)).mean((2, 3))
            return y

    model = make_model("small_resnet_w8", "none")
    model.encoder = Twice().double()
    with pytest.raises(ValueError, match="runs twice in one pass"):
        in_parts(model.train(), views(), 5)
