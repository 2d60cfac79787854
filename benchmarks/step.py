"""How many images per second a training step takes, by this project's loop and by others, on the same views.

    python -m benchmarks.step
    python -m benchmarks.step --preset cpu-simclr --batch-size 256 --with-views

The same network, batch, views, optimizer and precision for all; what differs is the loop around them. With
--with-views, this project's loop makes its views too: beside the step, within it, or by batched torch operations.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train_simclr
from benchmarks import common
from simclr import system
from simclr.config import SpeedConfig, TrainConfig
from simclr.models import SimCLR
from simclr.presets import PRESETS
from simclr.run import opening
from simclr.run.devices import forward_dtype
from simclr.run.interruption import Signals
from simclr.run.opening import Run
from simclr.run.peers import Peers
from simclr.views.fused_views import FusedViews
from simclr.views.pipeline import AHEAD, Ahead, ViewFeed

OURS = "train_simclr"
Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Measure, print a table and write results/benchmarks/step.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cifar10-simclr-100")
    parser.add_argument("--encoder", help="instead of the preset's")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=common.ROOT / "results" / "benchmarks" / "step.json")
    parser.add_argument("--with-views", action="store_true")
    parser.add_argument("--quick", action="store_true", help="seconds, with a tiny network; not to be quoted")
    options = parser.parse_args()
    config = PRESETS[options.preset].config
    encoder, batch_size = options.encoder or config.model.encoder, options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            encoder, batch_size, options.rounds = "small_resnet_w8", 8, 1
            options.output = Path(folder, "step.json")
        config = dataclasses.replace(
            config,
            data=Path(folder, "noise.beton"),
            speed=SpeedConfig(loader="memory"),
            output=Path(folder),
            global_batch_size=batch_size,
            model=dataclasses.replace(config.model, encoder=encoder),
            batch_norm_per_view=False,
            view_sizes=(),
            num_validation=0,
        )
        common.write_noise(config.data, 64 * batch_size)
        with contextlib.ExitStack() as stack:
            candidates, ours = prepare(stack, config, with_views=options.with_views)
            timings = common.interleave(candidates, rounds=options.rounds)
        print(common.table(timings, images=batch_size, against=ours))
        result: dict[str, Any] = {
            "what": f"one training step: {encoder}, {batch_size} images, 2 views each",
            "candidates": common.as_json(timings, images=batch_size),
        }
        if not options.with_views:
            flops = step_flops(config)
            limits = measure_limits(2 * batch_size, 128 if options.quick else 2048, options.rounds)
            result |= {"flop": flops, "limits": limits}
            rate = flops / timings[ours].median / 1e9
            reached = ", ".join(f"{rate / limit:.0%} of {name} ({limit:,.0f})" for name, limit in limits.items())
            print(f"{ours}: {flops / 1e9:,.0f} GFLOP a step, {rate:,.0f} GFLOP/s: {reached}")
        common.write_result(options.output, result)


def open_run(stack: contextlib.ExitStack, config: TrainConfig, *, on_device: bool = True) -> Run:
    """Return this project's run, ready for its first step.

    Args:
        stack: Closes what the run holds.
        config: The run; its data must exist.
        on_device: Whether the images lie where the step runs, or are sent there from the host.
    """
    peers = stack.enter_context(Peers(timeout_seconds=config.timeout_seconds, signals=Signals()))
    config = dataclasses.replace(config, output=config.folder / "run")
    images_on = None if on_device else torch.device("cpu")
    run = stack.enter_context(opening.open_run(config, peers, train_simclr.update, images_on))
    run.model.train()
    return run


def prepare(
    stack: contextlib.ExitStack, config: TrainConfig, *, with_views: bool
) -> tuple[dict[str, Callable[[], object]], str]:
    """Return one step of each loop, and which is this project's."""
    run = open_run(stack, config)
    source, plan, feed = run.source, run.plan, run.feed
    dtype = forward_dtype(run.accelerator, config)
    views = next(iter(feed.batches(plan)))
    feed.close()
    if with_views:
        by_torch = ViewFeed(source, *feed.specs, seed=0, choice="torch", device=feed.device, dtype=dtype)
        torch_views = iter(stack.enter_context(by_torch).batches(plan))
        mean, std = source.facts.normalisation
        threads = torch.get_num_threads()
        fused = stack.enter_context(
            FusedViews(config.view_1, config.view_2, size=32, mean=mean, std=std, dtype=dtype, threads=threads)
        )
        stored = iter(source.batches(plan))
        one = stack.enter_context(
            FusedViews(config.view_1, config.view_2, size=32, mean=mean, std=std, dtype=dtype, threads=1)
        )
        beside = Ahead((one(batch.image, batch.index, seed=0, epoch=0) for batch in source.batches(plan)), AHEAD)
        stack.callback(beside.close)

        def within() -> None:
            batch = next(stored)
            train_simclr.train_step(run, fused(batch.image, batch.index, seed=0, epoch=0))

        return {
            "beside the step": lambda: train_simclr.train_step(run, next(beside)),
            f"within the step, {threads} threads": within,
            "batched torch operations within the step": lambda: train_simclr.train_step(run, next(torch_views)),
            "no views, always the same batch": lambda: train_simclr.train_step(run, views),
        }, "beside the step"
    view_1, view_2 = (view.float().contiguous(memory_format=torch.contiguous_format) for view in views.chunk(2))

    def ours() -> None:
        system.keep_freed_memory()
        train_simclr.train_step(run, views)

    def ours_giving_back() -> None:
        give_back_freed_memory()
        train_simclr.train_step(run, views)

    temperature = config.loss.temperature
    loops: dict[str, Callable[[], object]] = {
        OURS: ours,
        "the same without keeping memory": ours_giving_back,
        "a plain script": plain_loop(config, view_1, view_2, partial(masked_nt_xent, temperature=temperature)),
    }
    if importlib.util.find_spec("lightly") is None:
        print("left out, as it is not installed: lightly")
    else:
        from lightly.loss import NTXentLoss

        loops["a plain script with lightly's loss"] = plain_loop(config, view_1, view_2, NTXentLoss(temperature))
    return loops, OURS


def step_flops(config: TrainConfig) -> float:
    """Return the floating-point operations of a step's forward and backward pass, both views, without the loss."""
    model, images = SimCLR(config.model, 32), 4
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(model(torch.randn(images, 3, 32, 32))[1].sum())
    return float(counter.get_total_flops()) / images * 2 * config.global_batch_size


def measure_limits(images: int, side: int, rounds: int) -> dict[str, float]:
    """Return what this device reaches in float32, in GFLOP/s: what a step's arithmetic is made of, and nothing else.

    Args:
        images: How many the convolutions take: those of ResNet-18's four stages on 32 x 32 images, channels last.
        side: Of the matrices.
        rounds: How often each is timed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    maps = [
        torch.randn(images, width, pixels, pixels, device=device).to(memory_format=torch.channels_last)
        for width, pixels in ((64, 32), (128, 16), (256, 8), (512, 4))
    ]
    weights = [torch.randn(x.shape[1], x.shape[1], 3, 3, device=device) for x in maps]
    weights = [weight.to(memory_format=torch.channels_last) for weight in weights]

    def convolve() -> None:
        with torch.no_grad():
            for x, weight in zip(maps, weights, strict=True):
                F.conv2d(x, weight, padding=1)

    flops = sum(2 * 9 * x.numel() * x.shape[1] for x in maps)
    seconds = common.interleave({"": convolve}, rounds=rounds)[""].median
    return {
        "a matrix product": matrix_product_rate(side, torch.float32, rounds) / 1e9,
        "ResNet-18's convolutions forward": flops / seconds / 1e9,
    }


def matrix_product_rate(side: int, dtype: torch.dtype, rounds: int) -> float:
    """Return the floating-point operations per second of a product of two square matrices on this device."""
    a, b = torch.randn(2, side, side, device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)
    return 2 * side**3 / common.interleave({"": lambda: a @ b}, rounds=rounds)[""].median


def plain_loop(config: TrainConfig, view_1: Tensor, view_2: Tensor, loss: Loss) -> Callable[[], object]:
    """Return that step in float32 and torch's default layout."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model: nn.Module = SimCLR(config.model, 32).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        give_back_freed_memory()
        plain_step(model, optimizer, loss, view_1, view_2)

    return step


def plain_step(model: nn.Module, optimizer: Any, loss: Loss, view_1: Tensor, view_2: Tensor) -> None:
    """Take the step of most examples, lightly's among them: each view by itself."""
    value = loss(model(view_1)[1], model(view_2)[1])
    optimizer.zero_grad()
    torch.autograd.backward(value)
    optimizer.step()
    value.item()  # to print it, as such scripts do


def masked_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as most scripts write it: the whole similarity matrix, its diagonal masked."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    n = len(z1)
    return F.cross_entropy(similarity, (torch.arange(2 * n, device=z.device) + n) % (2 * n))


def give_back_freed_memory() -> None:
    """Put glibc's thresholds to where it puts them itself once blocks of 32 MiB have been freed."""
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)
        mallopt(-1, 64 << 20)


if __name__ == "__main__":
    main()
