"""Micro-batches: time and peak memory of a step's forward and backward passes, against the size of a micro-batch.

    python -m benchmarks.micro_batch            # about 10 minutes on 2 cores
    python -m benchmarks.micro_batch --quick    # seconds, to see that it runs

ResNet-18 with CIFAR stem (batch normalisation: the whole batch's), and ViT-tiny (layer normalisation), 32 x 32 pixels,
float32, NT-Xent. "whole": the plain step. "difference": of all gradients, relative, from the plain step's. Writes
results/benchmarks/micro_batch.json, or what --output names.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, as_json, interleave, peak_memory, write_result
from simclr.batch_norm import replace_batch_norm
from simclr.losses import nt_xent
from simclr.micro_batch import BatchInParts, split_into_units
from simclr.models import ModelConfig, SimCLR

SIDE = 32


def make_model(encoder: str) -> SimCLR:
    """Return a model in training mode, its weights from a fixed seed."""
    torch.manual_seed(0)
    config = ModelConfig(encoder=encoder, projector_batch_norm="vit" not in encoder)
    model: SimCLR = SimCLR(config, SIDE).to(memory_format=torch.channels_last)
    return model.train()


def make_step(encoder: str, images: int, part: int) -> Callable[[], list[Tensor]]:
    """Return forward and backward passes of a batch, in micro-batches of ``part`` images, whole if 0."""
    model = make_model(encoder)
    x = torch.randn(2 * images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    units: list[nn.Sequential] = []
    if part:
        replace_batch_norm(model)
        units = split_into_units(model, SIDE)

    def step() -> list[Tensor]:
        model.zero_grad()
        if part:
            way = BatchInParts(units, 2 * part, contextlib.nullcontext)
            z = way.project(x).requires_grad_()
            torch.autograd.backward(nt_xent(*z.chunk(2)))
            assert z.grad is not None
            way.backward(z.grad)
        else:
            torch.autograd.backward(nt_xent(*model(x)[1].chunk(2)))
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    return step


def make_warm_step(encoder: str, images: int, part: int) -> Callable[[], list[Tensor]]:
    """Return the step, after one of two images has loaded the libraries' code."""
    make_step(encoder, 2, min(part, 1))()
    return make_step(encoder, images, part)


def difference(mine: list[Tensor], reference: list[Tensor]) -> float:
    """Return the norm of all differences over that of all gradients."""
    differ = sum(float((a - b).double().square().sum()) for a, b in zip(mine, reference, strict=True))
    return math.sqrt(differ / sum(float(b.double().square().sum()) for b in reference))


def measure(encoder: str, images: int, parts: list[int], rounds: int) -> dict[str, Any]:
    """Measure one encoder."""
    steps = {part: make_step(encoder, images, part) for part in [0, *parts]}
    reference = [gradient.clone() for gradient in steps[0]()]
    differences = {part: difference(steps[part](), reference) for part in parts}
    names = {part: f"{part}" if part else "whole" for part in steps}
    timings = interleave({names[part]: steps[part] for part in steps}, rounds=rounds, warm_up=0)  # called once above
    memory = {part: peak_memory("benchmarks.micro_batch:make_warm_step", encoder, images, part) for part in steps}
    for part, name in names.items():
        of_time = timings[name].median / timings["whole"].median
        print(
            f"| {encoder} | {images} | {name} | {timings[name].median:.2f} | {of_time:.2f} | {memory[part]:.0f} | "
            f"{memory[part] / memory[0]:.2f} | {differences.get(part, 0):.1e} |",
            flush=True,
        )
    return {
        "encoder": encoder,
        "images": images,
        "seconds": as_json(timings, images=images),
        "peak_mib": {names[part]: round(value, 1) for part, value in memory.items()},
        "difference": {names[part]: value for part, value in differences.items()},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "micro_batch.json")
    options = parser.parse_args()
    print("| encoder | images | micro-batch | s | times whole | peak MiB | times whole | difference |")
    print("|---|---|---|---|---|---|---|---|")
    if options.quick:
        results = [measure("small_resnet_w8", 16, [4], 1)]
    else:
        results = [
            measure("resnet18", 128, [64, 32, 16, 8], 3),
            measure("vit_tiny_patch16_224", 128, [64, 32, 16, 8], 3),
        ]
    write_result(options.output, {"results": results})
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
