"""GlobalBatchNorm on several processes against torch's batch normalisation of the whole batch on one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers.evo_norm import EvoNorm2dB0
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn

from simclr.batch_norm import GlobalBatchNorm, groups_of, replace_batch_norm
from simclr.distributed import average_gradients
from tests.helpers import run_distributed

C = 3


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (C, 4, 5)
    """Of one image."""
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    shares: dict[int, list[int]] = field(default_factory=lambda: {1: [8], 2: [4, 4], 4: [2, 2, 2, 2]})
    """Images per rank, by world size."""
    offset: float = 0.0

    def layer(self) -> nn.Module:
        kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(self.shape)]
        layer: nn.Module = kind(C, **self.options)
        generator = torch.Generator().manual_seed(5)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        return layer.to(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Two batches of eight images, and the weights of the outputs in the loss. No two images are equal."""
        generator = torch.Generator().manual_seed(6)
        made = torch.randn(2, 2, 8, *self.shape, generator=generator, dtype=torch.float64)
        made[:, 0] = made[:, 0] * (1 + torch.arange(8.0).view(8, *[1] * len(self.shape))) + 2 + self.offset
        made = made.to(self.dtype)
        if self.channels_last:
            return [tuple(t.to(memory_format=torch.channels_last) for t in pair) for pair in made]
        return [(x, weight) for x, weight in made]


CASES = {
    "2d": Case(),
    "1d": Case(shape=(C,)),
    "1d with length": Case(shape=(C, 6)),
    "3d": Case(shape=(C, 2, 3, 2)),
    "cumulative average": Case(options={"momentum": None}),
    "other options": Case(options={"momentum": 0.3, "eps": 0.1}),
    "not affine": Case(shape=(C,), options={"affine": False}),
    "no running statistics": Case(options={"track_running_stats": False}),
    "channels last": Case(channels_last=True),
    "float32": Case(dtype=torch.float32),
    "float32 far from zero": Case(dtype=torch.float32, offset=1e4),
    "bfloat16": Case(dtype=torch.bfloat16, channels_last=True),
    "uneven": Case(shares={1: [8], 2: [3, 5], 4: [1, 4, 0, 3]}),
}


def train_and_evaluate(layer: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Two training steps, then eval mode; everything that can be seen from outside."""
    outputs, gradients = [], []
    for i in range(len(batches)):
        x, weight = batches[i][0].clone().requires_grad_(), batches[i][1]  # clone keeps the memory format
        y = layer.train()(x)
        assert y.dtype == x.dtype
        assert y.stride() == x.stride() or x.numel() == 0
        torch.autograd.backward((y * weight).sum())
        outputs.append(y.detach())
        gradients.append(x.grad)
    with torch.no_grad():
        outputs.append(layer.eval()(batches[0][0]))
    return {
        "outputs": outputs,
        "input gradients": gradients,
        "parameter gradients": [p.grad for p in layer.parameters()],
        "state": dict(layer.state_dict()),
    }


def share(x: Tensor, counts: list[int], rank: int) -> Tensor:
    return torch.split(x, counts)[rank]


def on_rank(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    assert dist.get_world_size() == world_size
    layer = replace_batch_norm(case.layer())
    assert isinstance(layer, GlobalBatchNorm)
    counts = case.shares[world_size]
    return train_and_evaluate(layer, [(share(x, counts, rank), share(w, counts, rank)) for x, w in case.batches()])


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_devices_is_torchs_layer_on_the_whole_batch(name: str, world_size: int) -> None:
    case = CASES[name]
    # low precision is compared with float64 on the same rounded numbers
    expected = train_and_evaluate(case.layer().double(), [(x.double(), w.double()) for x, w in case.batches()])
    results = run_distributed(on_rank, world_size, case)
    rtol, atol = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 2e-2)}[case.dtype]
    if case.offset:  # float32 numbers near 10^4 lie 10^-3 apart, and so do those of torch's running mean
        rtol, atol = 1e-3, 2e-3

    def check(actual: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=rtol, atol=atol)

    for what in ("outputs", "input gradients"):
        last = 2 if "track_running_stats" in case.options else None  # in eval mode, that layer's batch is its own
        for i, wanted in enumerate(expected[what][:last]):
            check(torch.cat([result[what][i] for result in results]), wanted)
    for i, wanted in enumerate(expected["parameter gradients"]):
        check(torch.stack([result["parameter gradients"][i] for result in results]).sum(0), wanted)
    for result in results:
        assert result["state"].keys() == expected["state"].keys()
        for key, wanted in expected["state"].items():
            check(result["state"][key], wanted)
            assert torch.equal(result["state"][key], results[0]["state"][key])


def views_by_themselves(network: nn.Module, views: list[Tensor]) -> list[Tensor]:
    """The gradients and running statistics of a network through which the views pass one after the other."""
    y = torch.cat([network(view) for view in views])
    torch.autograd.backward(y.square().mean() + (y**3).mean())
    return [p.grad for p in network.parameters() if p.grad is not None] + list(network.buffers())


def in_one_pass(rank: int, world_size: int, backend: str) -> list[Tensor]:
    """The same of both views in one pass, each normalised by itself, compiled where a backend is named."""
    network = replace_batch_norm(small_network(), groups=2)
    x = torch.cat([view.chunk(world_size)[rank] for view in two_views_of_eight()])
    forward: Any = torch.compile(network, backend=backend, fullgraph=True) if backend else network
    y = forward(x.to(memory_format=torch.channels_last))
    torch.autograd.backward(y.square().mean() + (y**3).mean())
    average_gradients(network.parameters())
    return [p.grad for p in network.parameters() if p.grad is not None] + list(network.buffers())


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)]
    layers += [nn.BatchNorm2d(2, affine=False, momentum=None), nn.Flatten(), nn.Linear(2 * 16, 5), nn.BatchNorm1d(5)]
    return nn.Sequential(*layers).double()


def two_views_of_eight() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    one, two = torch.randn(2, 8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return one, 2 * two + 1


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_both_views_in_one_pass_are_the_views_one_after_the_other(world_size: int, backend: str) -> None:
    """Also through torch.compile without a break in the graph, collectives in it."""
    expected = views_by_themselves(small_network(), list(two_views_of_eight()))
    for found in run_distributed(in_one_pass, world_size, backend):
        for mine, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-13)


def test_gradcheck() -> None:
    layer = GlobalBatchNorm(C).double()
    x = Case(shape=(C, 2)).batches()[0][0].requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_autocast_keeps_the_inputs_dtype_and_float32_statistics() -> None:
    layer, x = GlobalBatchNorm(C), CASES["bfloat16"].batches()[0][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.running_mean is not None
    torch.testing.assert_close(layer.running_mean, 0.1 * x.float().mean((0, 2, 3)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.act = BatchNormAct2d(4, act_layer=nn.PReLU, inplace=False)
        self.frozen = BatchNormAct2d(4, apply_act=False).eval()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 5, bias=False), nn.BatchNorm1d(5, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.head(self.frozen(self.act(self.stem(x))))
        return h


def test_replacing_changes_neither_function_nor_names_nor_objects() -> None:
    torch.manual_seed(0)
    network = Network().double()
    network.frozen.weight.requires_grad_(False)
    nn.init.normal_(network.act.bias)
    original, x = copy.deepcopy(network), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    objects = {name: id(value) for name, value in network.state_dict(keep_vars=True).items()}

    assert replace_batch_norm(network) is network
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    assert sum(isinstance(layer, GlobalBatchNorm) for layer in network.modules()) == 4
    assert {name: id(value) for name, value in network.state_dict(keep_vars=True).items()} == objects
    assert not network.frozen.training
    assert network.act.training
    assert not network.frozen.weight.requires_grad
    actual, expected = (train_and_return(n, x) for n in (network, original))
    torch.testing.assert_close(actual, expected)
    assert replace_batch_norm(network) is network  # nothing is left to replace
    assert groups_of(network) == 1
    assert groups_of(replace_batch_norm(Network(), groups=2)) == 2


def train_and_return(network: Network, x: Tensor) -> list[Tensor | None]:
    y = network(x)
    torch.autograd.backward(y.square().sum() + (y**3).sum())
    return [y, network.eval()(x), *(p.grad for p in network.parameters()), *network.buffers()]


def test_unknown_layers_with_batch_statistics_are_refused() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    split = SplitBatchNorm2d(4)  # type: ignore[no-untyped-call]
    refused: list[nn.Module] = [split, EvoNorm2dB0(4), Odd(4), nn.InstanceNorm2d(4, track_running_stats=True)]
    for layer in refused:
        network = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(layer))
        with pytest.raises(ValueError, match=rf"layer 1\.0 is a {type(layer).__name__}, whose batch statistics"):
            replace_batch_norm(network)
        assert type(network[0]) is nn.BatchNorm2d  # refused before anything was changed
    for without in (nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)):
        assert replace_batch_norm(without) is without


def test_bad_input_raises() -> None:
    layer = GlobalBatchNorm(C)
    for shape in ((4,), (4, 2), (4, 2, 3, 3)):
        with pytest.raises(ValueError, match=r"expected an input of shape \(b, 3, \.\.\.\), got"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match="more than 1 value per channel over all ranks"):
        layer(torch.zeros(1, C))
    assert int(layer.num_batches_tracked or 0) == 0


def one_value_per_rank(rank: int, world_size: int) -> Tensor:
    output: Tensor = GlobalBatchNorm(C)(torch.full((1, C), 10.0 + rank))
    return output.detach()


@pytest.mark.distributed
def test_one_value_per_rank_is_enough() -> None:
    rows = torch.cat(run_distributed(one_value_per_rank, 2))
    torch.testing.assert_close(rows, torch.tensor([[-1.0] * C, [1.0] * C]), rtol=1e-4, atol=1e-4)
