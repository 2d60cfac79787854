"""A step in less memory is the same step: projections, gradients, running statistics, random numbers."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr.batch_norm import replace_batch_norm
from simclr.distributed import average_gradients
from simclr.losses import barlow_twins, nt_xent
from simclr.models import ModelConfig, SimCLR
from simclr.step.recompute import recompute_blocks, require_independent_images
from tests.helpers import run_distributed

SIDE = 16
VIEWS = 24
BLOCKS = {"small_resnet_w8": 3, "resnet10t": 4, "test_vit": 6}


def make_model(encoder: str, dtype: torch.dtype = torch.float64) -> SimCLR:
    torch.manual_seed(1)
    config = ModelConfig(encoder=encoder, projector="simclr3", projector_hidden=16, projection_dim=8)
    model = SimCLR(config, SIDE).to(dtype)
    for layer in model.modules():  # as after some training
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return model.train()


def views(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(VIEWS, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)


def step(model: SimCLR, x: Tensor, autocast: Any = contextlib.nullcontext) -> Tensor:
    torch.manual_seed(9)  # for layers that draw
    with autocast():
        z: Tensor = model(x)[1]
    z1, z2 = z.chunk(2)
    torch.autograd.backward(nt_xent(z1, z2, temperature=0.2) + barlow_twins(z1, z2))
    return z.detach()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same_bits(model: SimCLR, dtype: torch.dtype, **options: Any) -> None:
    other = copy.deepcopy(model)
    recompute_blocks(other)
    for x in (views(dtype), views(dtype).flip(0) * 2):  # a second step is as good as the first
        assert torch.equal(step(model, x, **options), step(other, x, **options))
    assert len(gradients(other)) == len(list(model.parameters()))
    for mine, reference in zip(gradients(other), gradients(model), strict=True):
        assert torch.equal(mine, reference)
    for (name, mine), (_, reference) in zip(other.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(mine, reference), name
        if name.endswith("num_batches_tracked"):
            assert mine == 2
    assert other.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("encoder", BLOCKS)
def test_blocks_that_are_computed_again_give_the_same_bits(encoder: str) -> None:
    assert_same_bits(make_model(encoder), torch.float64)
    assert recompute_blocks(make_model(encoder)) == BLOCKS[encoder]


def test_so_they_do_in_autocast_and_with_layers_that_draw() -> None:
    model = make_model("small_resnet_w8", torch.float32)
    block = model.encoder.get_submodule("layer2.0")
    block.add_module("drop_block", nn.Dropout(0.5))
    assert_same_bits(model, torch.float32, autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16))


def bytes_kept(model: SimCLR) -> int:
    """What autograd holds for the backward pass of a step when the forward pass has ended."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(views())
    return sum(sizes.values())


def test_less_is_kept_for_the_backward_pass() -> None:
    model = make_model("resnet50")
    whole = bytes_kept(model)
    assert recompute_blocks(model) == 16
    assert bytes_kept(model) < whole / 3


# ------------------------------------------------------------------------------------------ several ranks


def step_of_share(rank: int, world_size: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    assert dist.get_world_size() == world_size
    model = make_model("small_resnet_w8")
    replace_batch_norm(model)
    recompute_blocks(model)
    z = step(model, torch.cat([half.chunk(world_size)[rank] for half in views().chunk(2)]))
    average_gradients(model.parameters())
    return z, gradients(model), list(model.buffers())


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_on_several_ranks_the_step_is_that_of_one(world_size: int) -> None:
    model = make_model("small_resnet_w8")
    expected = step(model, views())
    answers = run_distributed(step_of_share, world_size)
    assert len(answers) == world_size
    halves = [torch.cat([answer[0].chunk(2)[view] for answer in answers]) for view in (0, 1)]
    torch.testing.assert_close(torch.cat(halves), expected, rtol=1e-9, atol=1e-10)
    scale = max(float(gradient.norm()) for gradient in gradients(model))
    for _, mine, buffers in answers:
        for gradient, reference in zip(mine, gradients(model), strict=True):
            assert (gradient - reference).norm() < 1e-10 * scale
        torch.testing.assert_close(buffers, list(model.buffers()), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------ refusals


def test_an_encoder_without_blocks_is_refused() -> None:
    model = make_model("small_resnet_w8")
    model.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(ValueError, match="needs an encoder made of blocks in sequence, and a Sequential has none"):
        recompute_blocks(model)


def test_micro_batches_are_refused_where_they_would_be_another_network() -> None:
    require_independent_images(make_model("test_vit"))
    model = make_model("small_resnet_w8")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layer bn1 makes each image depend on the whole batch\. Use --recompute"):
            require_independent_images(model)
        replace_batch_norm(model)
