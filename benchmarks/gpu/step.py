"""The training step on a GPU: images per second, its parts, and what the machine could do.

Run by ``python -m benchmarks.gpu step``. Every variant is measured in a process of its own, whole steps first, with the
views made beside them; then the parts one after the other, waiting for the device after each, which makes their sum
longer than a step. Beside them a plain script: torchvision's transforms in a DataLoader, float32, each view by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import train_simclr
from benchmarks import common
from benchmarks.pipeline import Decoded, torchvision_transform
from benchmarks.step import masked_nt_xent, matrix_product_rate, open_run, plain_step, step_flops
from simclr.config import SpeedConfig, TrainConfig
from simclr.losses import nt_xent
from simclr.models import SimCLR
from simclr.presets import PRESETS
from simclr.run.opening import Run
from simclr.system import usable_cores


class Variant(NamedTuple):
    """One way to compute the same step."""

    precision: Any = "bf16"
    tf32: bool = True
    compile: Any = "none"
    on_device: bool = True


VARIANTS = {
    "bfloat16, one graph, compiled": Variant(compile="graph-compiled"),
    "bfloat16, one graph": Variant(compile="graph"),
    "bfloat16": Variant(),
    "bfloat16, compiled": Variant(compile="default"),
    "bfloat16, images sent from the host": Variant(on_device=False),
    "float32, TF32 where torch takes it": Variant("fp32"),
}
PLAIN = "a plain script"


def main() -> None:
    """Measure all variants, each in its process, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-simclr-100", choices=PRESETS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="a tiny network, two variants")
    parser.add_argument("--only", help="one variant, printed as JSON")
    options = parser.parse_args()
    config = PRESETS[options.preset].config
    config = dataclasses.replace(config, global_batch_size=options.batch_size or config.global_batch_size)
    if options.quick:
        model = dataclasses.replace(config.model, encoder="small_resnet_w8")
        config, options.steps = dataclasses.replace(config, global_batch_size=8, model=model), 2
    if options.only:
        print(json.dumps(measure_plain(config, options.steps) if options.only == PLAIN else measure(config, options)))
        return
    limits = measure_limits(options.quick)
    found: dict[str, dict[str, Any]] = {}
    # Those that tell the most come first, and each is written down at once: the time may end in between.
    for name in ["bfloat16", PLAIN] if options.quick else [*VARIANTS, PLAIN]:
        words = [sys.executable, "-m", "benchmarks.gpu.step", *sys.argv[1:], "--only", name]
        done = subprocess.run(words, cwd=common.ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
        summary = summarise(config, limits, found)
        print(summary[-1], flush=True)
        common.write_result(
            options.output,
            {"summary": summary, "limits": limits, "batch": config.global_batch_size, "variants": found},
        )


def summarise(config: TrainConfig, limits: dict[str, float], found: dict[str, dict[str, Any]]) -> list[str]:
    """Return what was measured in lines, the last variant last."""
    flops = step_flops(config)
    summary = [
        "limits: " + ", ".join(f"{name} {value:,.1f}" for name, value in limits.items()),
        f"a step of {config.model.encoder}, {config.global_batch_size} images: {flops / 1e12:.3f} TFLOP",
    ]
    for name, one in found.items():
        rate = flops * one["images_per_second"] / config.global_batch_size / 1e12
        seconds = 50_000 / one["images_per_second"]
        ratio = one["images_per_second"] / next(iter(found.values()))["images_per_second"]
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in one.get("parts_ms", {}).items())
        limit = limits["bfloat16 TFLOP/s" if name.startswith("bfloat16") else "TF32 TFLOP/s"]
        summary.append(
            f"{name}: {one['images_per_second']:,.0f} images/s, {seconds:.2f} s for 50,000, {ratio:.2f} of the first, "
            f"{rate / limit:.0%} of the matrix products' limit" + (f"; ms: {parts}" if parts else "")
        )
    return summary


def measure(config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one of :data:`VARIANTS` in this process."""
    variant = VARIANTS[options.only]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = variant.tf32
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        config = dataclasses.replace(
            config,
            data=Path(name, "noise.beton"),
            speed=SpeedConfig(loader="memory", compile=variant.compile),
            output=Path(name),
            precision=variant.precision,
            num_validation=0,
            view_sizes=(),
        )
        common.write_noise(config.data, 64 * config.global_batch_size)
        with contextlib.redirect_stdout(sys.stderr):
            run = open_run(stack, config, on_device=variant.on_device)
        views = endless(lambda: train_simclr.batches(run, 0, 0))

        def one_step() -> None:
            train_simclr.train_step(run, next(views))

        first = seconds_of(one_step)
        seconds_of(one_step, 10 if options.steps > 10 else 1)
        whole = seconds_of(one_step, options.steps)
        run.guard.norms()
        parts: dict[str, float] = {}
        for _ in range(0 if run.captured else options.steps):
            for part, seconds in step_in_parts(run, views).items():
                parts[part] = parts.get(part, 0.0) + seconds * 1e3 / options.steps
        on_gpu = torch.cuda.is_available()
        return {
            "images_per_second": config.global_batch_size / whole,
            "first_step_seconds": first,
            "parts_ms": parts,
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        }


def step_in_parts(run: Run, views: Iterator[Tensor]) -> dict[str, float]:
    """Take a step as train_simclr takes it, and return the seconds of its parts."""
    seconds: dict[str, float] = {}

    def part(name: str, do: Callable[[], Any]) -> Any:
        kept: list[Any] = []
        seconds[name] = seconds_of(lambda: kept.append(do()))
        return kept[0]

    batch = part("data", lambda: next(views))
    run.guard.begin()
    groups = list(batch.chunk(2)) if run.config.batch_norm_per_view else [batch]
    z = part("forward", lambda: torch.cat([run.model(group)[1] for group in groups]))
    loss = part("loss", lambda: nt_xent(*z.chunk(2), temperature=run.config.loss.temperature))
    part("backward", lambda: run.accelerator.backward(loss))

    def optimizer() -> None:
        run.guard.step(run.guard.gradient_norms())
        run.optimizer.zero_grad()

    part("optimizer", optimizer)
    return seconds


def measure_plain(config: TrainConfig, steps: int) -> dict[str, Any]:
    """What most would write: float32, the default layout, a worker per core, each view by itself."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = np.random.default_rng(0).integers(0, 256, (8 * config.global_batch_size, 32, 32, 3), np.uint8)
    transform = torchvision_transform((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    loader = torch.utils.data.DataLoader(
        Decoded(pixels, transform),
        config.global_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=usable_cores(),
        pin_memory=device == "cuda",
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    torch.manual_seed(0)
    model = SimCLR(config.model, 32).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    batches = endless(lambda: iter(loader))
    loss = partial(masked_nt_xent, temperature=config.loss.temperature)

    def one_step() -> None:
        view_1, view_2 = (view.to(device, non_blocking=True) for view in next(batches))
        plain_step(model, optimizer, loss, view_1, view_2)

    seconds_of(one_step, min(steps, 10))
    return {"images_per_second": config.global_batch_size / seconds_of(one_step, steps)}


def endless(epoch: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yield from one epoch after another."""
    while True:
        yield from epoch()


def seconds_of(do: Callable[[], object], times: int = 1) -> float:
    """Return the seconds of a call, until the device is done with it: the mean over ``times``."""
    common.wait_for_gpu()
    started = time.perf_counter()
    for _ in range(times):
        do()
    common.wait_for_gpu()
    return (time.perf_counter() - started) / times


def measure_limits(quick: bool) -> dict[str, float]:
    """Return what matrix products and copies reach on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, size = (256, 1 << 20) if quick else (8192, 1 << 30)
    limits = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bfloat16", torch.bfloat16, True),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        limits[f"{name} TFLOP/s"] = matrix_product_rate(n, dtype, rounds=2 if quick else 20) / 1e12
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = common.interleave({"copy": lambda: target.copy_(source)}, rounds=2 if quick else 20)["copy"]
    limits["copy on the device, read and written, GB/s"] = 2 * size / timing.median / 1e9
    return limits


if __name__ == "__main__":
    main()
