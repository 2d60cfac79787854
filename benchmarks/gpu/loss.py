"""Time and memory of the losses at up to 131,072 rows. Run by ``python -m benchmarks.gpu loss``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.loss import TEMPERATURE, plain
from simclr.losses import barlow_twins, nt_xent

WIDTH = 128


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def tiles(kernels: Any, bf16_matmul: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z1, z2: nt_xent(
            z1, z2, temperature=TEMPERATURE, form="tiled", kernels=kernels, bf16_matmul=bf16_matmul
        )

    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain cross-entropy": plain,
        "nt_xent, matrix": lambda z1, z2: nt_xent(z1, z2, temperature=TEMPERATURE, form="matrix"),
        "nt_xent, tiles by torch": tiles("torch"),
    }
    if device.type == "cuda":
        losses |= {
            "nt_xent, tiles by Triton": tiles("triton"),
            "nt_xent, tiles by Triton, bfloat16": tiles("triton", bf16_matmul=True),
        }
    cases = [
        measure(losses, rows, WIDTH, device, rounds=1 if options.quick else 9)
        for rows in ([64, 256] if options.quick else [1024, 4096, 16_384, 65_536, 131_072])
    ]
    cases += [
        measure({"barlow_twins": barlow_twins}, rows, width, device, rounds=1 if options.quick else 9)
        for rows, width in ([(64, 32)] if options.quick else [(2048, 2048), (8192, 2048), (8192, 8192)])
    ]
    summary = [
        f"{case['rows']:>7} rows, width {case['width']}: "
        + "; ".join(f"{name} {found['ms']:.2f} ms, {found['mib']:.0f} MiB" for name, found in case["losses"].items())
        for case in cases
    ]
    print(*summary, sep="\n")
    common.write_result(options.output, {"summary": summary, "device": device.type, "cases": cases})


def measure(
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]], rows: int, width: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Return milliseconds and peak memory of value and gradient; what does not fit into memory is left out."""
    z1, z2 = torch.randn(2, rows // 2, width, generator=torch.Generator().manual_seed(0)).to(device)
    z1.requires_grad_(), z2.requires_grad_()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(z1, z2), (z1, z2))

    fitting, memory = {}, {}
    for name, loss in losses.items():
        try:
            memory[name] = peak_mib(step(loss), device)
            fitting[name] = step(loss)
        except torch.OutOfMemoryError:
            print(f"{name}: {rows} rows do not fit")
    timings = common.interleave(fitting, rounds=rounds)
    return {
        "rows": rows,
        "width": width,
        "losses": {
            name: {"ms": t.median * 1e3, "spread": t.spread, "mib": memory[name]} for name, t in timings.items()
        },
    }


def peak_mib(once: Callable[[], object], device: torch.device) -> float:
    """Return by how much a call's peak memory on the GPU exceeds what was in use; 0 on a CPU, see benchmarks.loss."""
    if device.type != "cuda":
        once()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


if __name__ == "__main__":
    main()
