"""Encoders, stems and projectors; and a whole model on several processes against one."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers.drop import DropBlock2d, DropPath
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr import models, parts
from simclr.batch_norm import GlobalBatchNorm
from simclr.losses import barlow_twins, nt_xent
from simclr.models import (
    ModelConfig,
    SimCLR,
    Stem,
    count_parameters,
    make_encoder,
    make_projector,
    use_global_batch_norm,
)
from simclr.small_resnet import SmallResNet, widening
from tests.helpers import run_distributed


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are small, and threads that wait for each other on busy cores make them ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ENCODERS = {
    ("resnet18", 16): 512,
    ("resnet50", 16): 2048,
    ("small_resnet_w16", 32): 64,
    ("small_resnet_w16_d96", 32): 96,
    ("resnet18_d640", 32): 640,
    ("vit_tiny_patch16_224", 32): 192,
    ("convnext_atto", 16): 320,
    ("mobilenetv3_small_050", 16): 1024,
    ("tf_efficientnet_lite0", 16): 1280,
    ("test_efficientnet", 96): 256,
    ("vit_tiny_patch16_224", 96): 192,
}


@pytest.mark.parametrize(("name", "size"), ENCODERS)
def test_forward_returns_representation_and_projection(name: str, size: int) -> None:
    width = ENCODERS[name, size]
    torch.manual_seed(0)
    model = SimCLR(ModelConfig(encoder=name, projector_hidden=24, projection_dim=12), image_size=size)
    assert model.training
    assert model.representation_dim == width
    x = torch.randn(2, 3, size, size)
    h, z = model(x)
    assert (h.shape, z.shape) == ((2, width), (2, 12))
    torch.autograd.backward(z.square().sum())
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without_gradient == []

    model.eval()
    expected = model(x)
    assert torch.equal(expected[1], model.projector(expected[0]))
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)


def test_parameter_counts() -> None:
    """By hand for the CIFAR ResNet-18: 11,689,512 published, less 513,000 of fc and 64 * 3 * (49 - 9) of the stem."""
    assert count_parameters(make_encoder("resnet18", "cifar", 32)) == 11_168_832
    assert count_parameters(make_encoder("resnet18", "original", 32)) == 11_689_512 - 513_000
    frozen = nn.Linear(3, 4).requires_grad_(False)
    assert count_parameters(nn.Sequential(frozen, nn.Linear(4, 2))) == 10


@pytest.mark.parametrize(
    ("name", "stem", "size", "kernel", "stride", "map_side", "has_pool"),
    [
        ("resnet18", "auto", 32, 3, 1, 32, False),
        ("resnet18", "auto", 64, 3, 1, 64, False),
        ("resnet18", "auto", 65, 7, 2, 17, True),
        ("resnet18", "cifar", 96, 3, 1, 96, False),
        ("resnet18", "patch2", 32, 2, 2, 16, False),
        ("resnet18", "original", 32, 7, 2, 8, True),
        ("small_resnet_w8", "auto", 32, 2, 2, 16, False),
        ("small_resnet_w8", "auto", 96, 2, 2, 48, False),
        ("small_resnet_w8", "cifar", 32, 3, 1, 32, False),
    ],
)
def test_stems(name: str, stem: Stem, size: int, kernel: int, stride: int, map_side: int, has_pool: bool) -> None:
    encoder = make_encoder(name, stem, size)
    first = encoder.get_submodule("conv1")
    assert isinstance(first, nn.Conv2d)
    assert (first.kernel_size, first.stride) == ((kernel, kernel), (stride, stride))
    assert isinstance(encoder.get_submodule("maxpool"), nn.MaxPool2d) is has_pool
    sides = []
    encoder.get_submodule("layer1").register_forward_hook(lambda *args: sides.append(tuple(args[1][0].shape[2:])))
    encoder.eval()(torch.zeros(1, 3, size, size))
    assert sides == [(map_side, map_side)]


def test_small_resnet_has_one_block_per_stage_at_the_widths_named() -> None:
    encoder = make_encoder("small_resnet_w16", "auto", 32)
    for stage, width in (("layer1", 16), ("layer2", 32), ("layer3", 64)):
        blocks = list(encoder.get_submodule(stage).children())
        assert len(blocks) == 1
        assert {m.out_channels for m in blocks[0].modules() if isinstance(m, nn.Conv2d)} == {width}
    assert list(encoder.get_submodule("layer4").parameters()) == []


def test_small_resnet_widens_its_representation_before_it_is_averaged() -> None:
    """ReLU, then the mean over the map: the order matters, and the parts before it stay those of the narrow network."""
    torch.manual_seed(0)
    narrow = make_encoder("small_resnet_w8", "auto", 32)
    wide = make_encoder("small_resnet_w8_d20", "auto", 32)
    assert {n for n, _ in wide.named_parameters()} - {n for n, _ in narrow.named_parameters()} == {
        "layer4.0.weight",
        "layer4.1.weight",
        "layer4.1.bias",
    }
    wide.load_state_dict(narrow.state_dict(), strict=False)
    x = torch.randn(3, 3, 32, 32)
    maps: list[Tensor] = []
    narrow.get_submodule("layer3").register_forward_hook(lambda *args: maps.append(args[2]))
    narrow.eval()(x)
    weight = wide.get_parameter("layer4.0.weight")[:, :, 0, 0]
    widened = torch.einsum("oc,bchw->bohw", weight, maps[0]) / (1 + 1e-5) ** 0.5  # of batch normalisation, untrained
    torch.testing.assert_close(wide.eval()(x), widened.clamp_min(0).mean((2, 3)))


def test_a_transformers_patches_fit_small_images() -> None:
    proj = make_encoder("vit_tiny_patch16_224", "auto", 32).get_submodule("patch_embed.proj")
    assert isinstance(proj, nn.Conv2d)
    assert proj.kernel_size == (4, 4)  # 8 x 8 patches
    original = make_encoder("vit_tiny_patch16_224", "original", 32).get_submodule("patch_embed.proj")
    assert isinstance(original, nn.Conv2d)
    assert original.kernel_size == (16, 16)


LINEAR, NORM, RELU = nn.Linear, nn.BatchNorm1d, nn.ReLU


@pytest.mark.parametrize(
    ("kind", "batch_norm", "layers", "biases"),
    [
        ("simclr2", True, [LINEAR, NORM, RELU, LINEAR], [False, True]),
        ("simclr2", False, [LINEAR, RELU, LINEAR], [True, True]),
        ("simclr3", True, [LINEAR, NORM, RELU, LINEAR, NORM, RELU, LINEAR, NORM], [False, False, False]),
        ("barlow3", False, [LINEAR, NORM, RELU, LINEAR, NORM, RELU, LINEAR], [False, False, False]),
    ],
)
def test_projectors(kind: str, batch_norm: bool, layers: list[type], biases: list[bool]) -> None:
    config = ModelConfig(projector=kind, projector_hidden=7, projection_dim=5, projector_batch_norm=batch_norm)
    projector = make_projector(config, 11)
    assert [type(layer) for layer in projector.children()] == layers
    linear = [layer for layer in projector.children() if isinstance(layer, nn.Linear)]
    widths = [11, *[7] * (len(linear) - 1), 5]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(itertools.pairwise(widths))
    assert [layer.bias is not None for layer in linear] == biases
    if kind == "simclr3":  # its last normalisation has no scale and shift
        assert list(projector[-1].parameters()) == []  # type: ignore[index]


def test_no_projector_is_the_identity() -> None:
    model = SimCLR(ModelConfig(encoder="small_resnet_w8", projector="none"), image_size=16)
    h, z = model(torch.randn(2, 3, 16, 16))
    assert torch.equal(h, z)


@pytest.mark.parametrize("name", ["resnet18", "small_resnet_w8", "vit_tiny_patch16_224"])
def test_the_seed_decides_the_weights(name: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return dict(SimCLR(ModelConfig(encoder=name), image_size=32).state_dict())

    first, again, other = weights(3), weights(3), weights(4)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "stem", "size", "message"),
    [
        ("resnet1_8", "auto", 32, r"no model named 'resnet1_8'; near: .*\bresnet18\b"),
        ("resnet18.imaginary", "auto", 32, "no model named 'resnet18.imaginary'.*imaginary"),
        ("small_resnet_w", "auto", 32, "expected small_resnet_w and a width, such as small_resnet_w48"),
        ("small_resnet_w0", "auto", 32, "expected small_resnet_w and a width"),
        ("small_resnet_wide", "auto", 32, "expected small_resnet_w and a width"),
        ("small_resnet_w8_d", "auto", 32, "small_resnet_w48, or with _d and the representation's width"),
        ("small_resnet_w8_d0", "auto", 32, "expected small_resnet_w and a width"),
        ("small_resnet_w7", "auto", 32, "7 input channels.*wrong for fewer than 8.*oneDNN issue 6035"),
        ("small_resnet_w3_d16", "cifar", 32, "3 input channels.*use a wider network, such as small_resnet_w8"),
        ("nfnet_f0", "cifar", 32, "stem.conv1, is a ScaledStdConv2d, not a plain convolution; use stem original"),
        ("inception_v3", "original", 32, "cannot take 32x32 images with this stem"),
        ("vit_tiny_patch16_224", "original", 15, "cannot|timm"),
    ],
)
def test_encoders_that_cannot_be_made_raise(name: str, stem: Stem, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimCLR(ModelConfig(encoder=name, stem=stem), image_size=size)


@pytest.mark.parametrize(
    ("name", "stem", "size", "read"),
    [
        ("vit_tiny_patch16_224", "original", 40, 32),
        ("vit_tiny_patch16_224", "auto", 37, 36),
        ("convnext_atto", "original", 33, 32),
        ("resnet18", "patch2", 33, 32),
        ("small_resnet_w8", "auto", 17, 16),
    ],
)
def test_an_edge_that_is_never_read_is_refused(name: str, stem: Stem, size: int, read: int) -> None:
    with pytest.raises(ValueError, match=f"reads {read} of the {size} rows and columns .* use images of side {read}"):
        SimCLR(ModelConfig(encoder=name, stem=stem), size)


@pytest.mark.parametrize(("size", "patch"), [(32, 4), (50, 5), (40, 5), (33, 3), (64, 8)])
def test_a_transformers_patches_divide_the_image(size: int, patch: int) -> None:
    proj = SimCLR(ModelConfig("vit_tiny_patch16_224"), size).encoder.get_submodule("patch_embed.proj")
    assert proj.kernel_size == (patch, patch)


def test_an_edge_of_smaller_views_that_is_never_read_is_refused() -> None:
    model = SimCLR(ModelConfig("small_resnet_w8"), 16)
    model.require_size(12)
    with pytest.raises(ValueError, match="reads 12 of the 13 rows"):
        model.require_size(13)


def test_timms_stochastic_depth_and_dropout_are_left_out() -> None:
    model = SimCLR(ModelConfig("rexnet_100"), 32)  # by itself it has dropout at its end
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x)[0], model(x)[0])


class RandomInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, training=self.training)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.RReLU(), RandomInside(), DropPath(0.2), DropBlock2d(0.1)])
def test_a_layer_that_draws_random_numbers_is_refused(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_layer(*_: object) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setattr(models, "make_encoder", with_layer)
    with pytest.raises(ValueError, match=rf"layer encoder.1, a {type(layer).__name__}, draws random numbers"):
        SimCLR(ModelConfig(), 32)
    monkeypatch.undo()
    monkeypatch.setitem(parts.PROJECTORS._own, "own", lambda width, _: nn.Sequential(nn.Linear(width, 4), nn.Dropout()))
    with pytest.raises(ValueError, match=r"layer projector\.1, a Dropout"):
        SimCLR(ModelConfig("small_resnet_w8", projector="own"), 32)


def test_looking_for_random_numbers_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = SimCLR(ModelConfig("small_resnet_w8"), 16)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    encoder = make_encoder("small_resnet_w8", "auto", 16)
    make_projector(ModelConfig(), 32)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(model.encoder.buffers(), encoder.buffers(), strict=True))


@pytest.mark.parametrize("field", ["projector_hidden", "projection_dim"])
def test_widths_below_one_raise(field: str) -> None:
    with pytest.raises(ValueError, match=f"model.{field} is 0, expected at least 1"):
        ModelConfig(**{field: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_are_right_on_this_cpu_at_the_least_width(threads: int) -> None:
    """In float32 and channels last, as trained, against float64 in the plain layout."""
    torch.manual_seed(0)
    model = make_encoder("small_resnet_w8", "auto", 32)
    exact = copy.deepcopy(model).double()
    x = torch.randn(64, 3, 32, 32)
    torch.set_num_threads(threads)
    model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)).square().sum().backward()
    exact(x.double()).square().sum().backward()
    for (name, parameter), reference in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert reference.grad is not None
        difference = (parameter.grad - reference.grad).norm() / reference.grad.norm()
        assert difference < 1e-3, (name, float(difference))


# ---------------------------------------------------------------------------------------- several processes

SIDE, N = 16, 8


def whole_step(rank: int, world_size: int, config: ModelConfig, loss: Any) -> dict[str, Any]:
    """One step on this rank's share of a fixed global batch, in float64, with distinct images everywhere."""
    torch.manual_seed(0)
    model = SimCLR(config, SIDE).double()
    network: nn.Module = model
    if world_size > 1:
        assert dist.get_world_size() == world_size
        use_global_batch_norm(model, torch.device("cpu"))
        assert any(isinstance(layer, GlobalBatchNorm) for layer in model.modules())
        network = DistributedDataParallel(model, broadcast_buffers=False)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, N, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    images += torch.arange(N).view(1, N, 1, 1, 1) / N  # shards of different distribution
    view_1, view_2 = (view.chunk(world_size)[rank] for view in images)
    h, z = network(torch.cat([view_1, view_2]))
    value = loss(*z.chunk(2))
    torch.autograd.backward(value)
    return {
        "h": h.detach().chunk(2)[0],
        "value": value.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (ModelConfig("small_resnet_w8", projector="simclr2", projector_hidden=8, projection_dim=6), nt_xent),
        (ModelConfig("small_resnet_w8", projector="simclr3", projector_hidden=8, projection_dim=6), nt_xent),
        (ModelConfig("test_efficientnet", projector="barlow3", projector_hidden=8, projection_dim=6), barlow_twins),
    ],
)
def test_a_whole_model_on_two_processes_is_the_one_on_one(config: ModelConfig, loss: Any) -> None:
    expected = whole_step(0, 1, config, loss)
    results = run_distributed(whole_step, 2, config, loss)
    check = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-10)
    check(torch.cat([result["h"] for result in results]), expected["h"])
    check(torch.stack([result["value"] for result in results]).mean(), expected["value"])
    for result in results:
        check(result["gradients"], expected["gradients"])
        check(result["buffers"], expected["buffers"])


def test_global_batch_norm_keeps_the_state_dict() -> None:
    model = SimCLR(ModelConfig("test_efficientnet", projector="simclr3"), SIDE)
    before = copy.deepcopy(model.state_dict())
    for device in ("cpu", "cuda"):  # the conversion itself runs without a GPU
        converted = use_global_batch_norm(copy.deepcopy(model), torch.device(device))
        after = converted.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        left = [m for m in converted.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        assert left == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_global_batch_norm_refuses_unknown_layers(device: str) -> None:
    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="layer 0 is a Odd, whose batch statistics"):
        use_global_batch_norm(nn.Sequential(Odd(3)), torch.device(device))


@pytest.mark.parametrize("representation_dim", [None, 40])
@pytest.mark.parametrize("width", [16, 64])  # at 64, the first block has no convolution in its shortcut
def test_small_resnet_is_timms_resnet_to_the_bit(width: int, representation_dim: int | None) -> None:
    torch.manual_seed(0)
    reference: nn.Module = ResNet(
        BasicBlock,  # type: ignore[arg-type]
        layers=(1, 1, 1),
        channels=(width, 2 * width, 4 * width),
        num_classes=0,
        zero_init_last=False,
    )
    reference.layer4 = nn.Identity() if representation_dim is None else widening(4 * width, representation_dim)
    torch.manual_seed(0)
    own = SmallResNet(width, representation_dim)
    expected = reference.state_dict()
    assert list(own.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())
    x = torch.randn(4, 3, 32, 32)
    outputs = [model(x) for model in (own, reference)]
    assert torch.equal(*outputs)
    for output in outputs:
        torch.autograd.backward(output.square().sum())
    gradients = zip(own.parameters(), reference.parameters(), strict=True)
    assert all(a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad) for a, b in gradients)


def test_a_run_of_a_small_network_does_not_import_what_takes_long() -> None:
    """timm brings along torchvision, and that torch.compile: more than half of the time in which a process starts."""
    code = (
        "import sys, torch, train_simclr, linear_probe\n"
        "from simclr.models import ModelConfig, SimCLR\n"
        "SimCLR(ModelConfig(encoder='small_resnet_w8_d16'), 32)(torch.zeros(2, 3, 32, 32))[1].sum().backward()\n"
        "print(*({'timm', 'torchvision', 'torch._dynamo'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
