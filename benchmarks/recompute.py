"""The same step in less memory: time and peak memory of its forward and backward passes.

    python -m benchmarks.recompute            # about 10 minutes on 2 cores
    python -m benchmarks.recompute --quick    # seconds, to see that it runs

Blocks computed again (ResNet-18 and ResNet-50 with CIFAR stem), and micro-batches (ViT-tiny, which has no batch
normalisation), of 32 x 32 pixels, float32, NT-Xent. "whole": the plain step. "difference": of all gradients, relative,
from the plain step's. Writes results/benchmarks/recompute.json, or what --output names.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, as_json, interleave, peak_memory, write_result
from simclr.losses import nt_xent
from simclr.models import ModelConfig, SimCLR
from simclr.step.recompute import recompute_blocks

SIDE = 32


def make_step(encoder: str, images: int, way: str) -> Callable[[], list[Tensor]]:
    """Return forward and backward passes of a batch: "whole", "blocks", or in micro-batches of so many images."""
    torch.manual_seed(0)
    model: SimCLR = SimCLR(ModelConfig(encoder=encoder), SIDE).to(memory_format=torch.channels_last)
    model.train()
    x = torch.randn(2 * images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    if way == "blocks":
        recompute_blocks(model)

    def step() -> list[Tensor]:
        model.zero_grad()
        if way.isdecimal():
            parts = torch.split(x, 2 * int(way))
            with torch.no_grad():
                h = torch.cat([model.encoder(part) for part in parts])
            torch.autograd.backward(nt_xent(*model.projector(h.requires_grad_()).chunk(2)))
            assert h.grad is not None
            for part, gradient in zip(parts, torch.split(h.grad, 2 * int(way)), strict=True):
                torch.autograd.backward(model.encoder(part), gradient)
        else:
            torch.autograd.backward(nt_xent(*model(x)[1].chunk(2)))
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    return step


def make_warm_step(encoder: str, images: int, way: str) -> Callable[[], list[Tensor]]:
    """Return the step, after one of two images has loaded the libraries' code."""
    make_step(encoder, 2, "1" if way.isdecimal() else way)()
    return make_step(encoder, images, way)


def difference(mine: list[Tensor], reference: list[Tensor]) -> float:
    """Return the norm of all differences over that of all gradients."""
    differ = sum(float((a - b).double().square().sum()) for a, b in zip(mine, reference, strict=True))
    return math.sqrt(differ / sum(float(b.double().square().sum()) for b in reference))


def measure(encoder: str, images: int, ways: list[str], rounds: int) -> dict[str, Any]:
    """Measure one encoder."""
    steps = {way: make_step(encoder, images, way) for way in ["whole", *ways]}
    reference = [gradient.clone() for gradient in steps["whole"]()]
    differences = {way: difference(step(), reference) for way, step in steps.items()}
    timings = interleave(steps, rounds=rounds, warm_up=0)  # called once above
    memory = {way: peak_memory("benchmarks.recompute:make_warm_step", encoder, images, way) for way in steps}
    for way, timing in timings.items():
        of_time, of_memory = timing.median / timings["whole"].median, memory[way] / memory["whole"]
        print(
            f"| {encoder} | {images} | {way} | {timing.median:.2f} | {of_time:.2f} | {memory[way]:.0f} | "
            f"{of_memory:.2f} | {differences[way]:.1e} |",
            flush=True,
        )
    return {
        "encoder": encoder,
        "images": images,
        "seconds": as_json(timings, images=images),
        "peak_mib": {way: round(value, 1) for way, value in memory.items()},
        "difference": differences,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "recompute.json")
    options = parser.parse_args()
    print("| encoder | images | way | s | times whole | peak MiB | times whole | difference |")
    print("|---|---|---|---|---|---|---|---|")
    if options.quick:
        results = [measure("small_resnet_w8", 16, ["blocks"], 1), measure("test_vit", 8, ["4"], 1)]
    else:
        results = [
            measure("resnet18", 128, ["blocks"], 5),
            measure("resnet50", 32, ["blocks"], 5),
            measure("vit_tiny_patch16_224", 64, ["blocks", "32", "8"], 3),
        ]
    write_result(options.output, {"results": results})
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
