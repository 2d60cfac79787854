"""What a step of each loss costs on W devices: arithmetic, memory, communication, as formulas held against clocks.

    python -m benchmarks.scaling              # tables for up to 1,024 GPUs, computed
    python -m benchmarks.scaling --measure    # the same formulas for 1, 2 and 4 processes here, beside measured times

docs/scaling.md explains the formulas. A machine is five numbers; communication is latency plus bytes over bandwidth.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import ROOT, on_ranks, write_result
from simclr.losses import barlow_twins, nt_xent

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Machine:
    """What the formulas know of a device and its links.

    Attributes:
        flops: Floating-point operations of matrix products per second and device.
        exps: Elements per second and device of what happens to a tile besides products.
        memory: Bytes per second and device to and from memory.
        bandwidth: Bytes per second that a device sends and, at the same time, receives.
        latency: Seconds until the first byte of a message.
    """

    flops: float
    exps: float
    memory: float
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cost:
    """One device's share of one step: value and gradient of a loss."""

    flops: float
    exps: float
    traffic: float
    """Bytes to and from memory, of what does not stay in a cache."""
    received: float
    """Bytes from other devices."""
    messages: float
    """One after the other."""
    held: float
    """Bytes of memory besides the projections."""

    def seconds(self, machine: Machine) -> float:
        """Return the time, without overlap of computing and transfers."""
        computing = self.flops / machine.flops + self.exps / machine.exps + self.traffic / machine.memory
        return computing + self.received / machine.bandwidth + self.messages * machine.latency


def nt_xent_cost(form: str, n: int, d: int, size: int) -> Cost:
    """``form``: matrix or tiled; n source images on ``size`` devices, width d."""
    rows, columns = 2 * n / size, 2 * n
    product = 2 * rows * columns * d
    received = (size - 1) * rows * d * FLOAT  # everybody else's rows, once
    collective = math.ceil(math.log2(size))  # messages, by recursive doubling
    around_rows = 24 * rows * d * FLOAT  # normalising them, and its backward pass
    own = 6 * rows * d * FLOAT
    if form == "matrix":
        # Product, quotient, mask, softmax, and backward through each; then gradients travel back to their rows.
        passes = 15 * rows * columns * FLOAT
        held = 4 * rows * columns * FLOAT + 4 * columns * d * FLOAT
        return Cost(3 * product, 2 * rows * columns, passes + around_rows, 2 * received, 4 * collective, held)
    # Of the own block only the upper half, in both passes; the backward pass has one product more.
    visits = 2 - 1 / size
    flops, exps = product * (visits + 1), rows * columns * visits
    return Cost(flops, exps, around_rows, received, 4 * collective, own + columns * d * FLOAT)


def barlow_cost(n: int, d: int, size: int) -> Cost:
    """N source images on ``size`` devices, width d."""
    collective, pairs = math.ceil(math.log2(size)), n / size
    flops, traffic = 6 * pairs * d**2, (30 * pairs * d + 16 * d**2) * FLOAT
    held = (8 * pairs * d + 5 * d**2) * FLOAT
    return Cost(flops, 0, traffic, 2 * (size - 1) / size * (d**2 + 10 * d) * FLOAT, 9 * collective, held)


# An H100 by its data sheet, at what large products reach of it, and one 400 Gb/s port for each GPU. Not measured.
H100_F32 = Machine(flops=50e12, exps=3e12, memory=2.5e12, bandwidth=45e9, latency=15e-6)
H100_BF16 = Machine(flops=500e12, exps=3e12, memory=2.5e12, bandwidth=45e9, latency=15e-6)


def print_tables() -> None:
    """Print what docs/scaling.md shows."""
    print("NT-Xent, d = 128, milliseconds and MiB on each device\n")
    print("| n | W | matrix | tiled | tiled, bf16 factors | MiB: matrix | tiled |")
    print("|---|---|---|---|---|---|---|")
    for n in (4096, 32_768, 262_144):
        for size in (1, 8, 64, 1024):
            costs = [nt_xent_cost(form, n, 128, size) for form in ("matrix", "tiled")]
            times = [cost.seconds(H100_F32) for cost in costs] + [costs[1].seconds(H100_BF16)]
            cells = [f"{t * 1e3:,.2f}" for t in times] + [f"{cost.held / 2**20:,.1f}" for cost in costs]
            print(f"| {n:,} | {size:,} | {' | '.join(cells)} |")
    print("\nBarlow Twins, milliseconds on each device (float32)\n")
    print("| n | d | W = 8 | W = 64 | W = 1,024 |\n|---|---|---|---|---|")
    for n in (2048, 32_768):
        for d in (512, 2048, 8192):
            times = [barlow_cost(n, d, size).seconds(H100_F32) * 1e3 for size in (8, 64, 1024)]
            print(f"| {n:,} | {d:,} | {' | '.join(f'{t:,.2f}' for t in times)} |")


# ---------------------------------------------------------------------------------------------- against clocks

MEASURED: list[tuple[str, int, int, Callable[[int], Cost], Callable[[Tensor, Tensor], Tensor]]] = [
    *[
        (f"nt_xent, {form}", 4096, 128, partial(nt_xent_cost, form, 4096, 128), partial(nt_xent, form=form))
        for form in ("matrix", "tiled")
    ],
    ("barlow_twins", 2048, 1024, partial(barlow_cost, 2048, 1024), barlow_twins),
]


def timed(once: Callable[[], object], rounds: int = 5) -> float:
    """Return the median seconds of a collective step."""
    seconds = []
    for number in range(rounds + 1):
        dist.barrier()
        started = time.perf_counter()
        once()
        dist.barrier()
        if number:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def calibrate(size: int) -> Machine:
    """Measure the five numbers, with all processes at work at once as in a step."""
    a, b, out = torch.randn(512, 128), torch.randn(128, 512), torch.rand(512, 512)
    large, small = torch.zeros(1 << 22), torch.zeros(1)
    flops = 100 * 2 * 512 * 512 * 128 / timed(lambda: [torch.mm(a, b, out=out) for _ in range(100)])
    # What a visit does to a tile: exponential, sums both ways, in the backward pass a factor instead of the sums
    out.fill_(0.5)
    exps = (
        100
        * 512
        * 512
        / timed(lambda: [(torch.exp(out, out=out).clamp_(max=1), out.sum(1), out.sum(0)) for _ in range(100)])
    )
    memory = 2 * FLOAT * len(large) / timed(lambda: large + 1)  # into fresh memory, as autograd's intermediates
    if size == 1:
        return Machine(flops, exps, memory, math.inf, 0.0)
    collective = math.ceil(math.log2(size))
    slow, quick = (
        timed(partial(dist.all_gather, list(part.new_empty(size, len(part))), part)) for part in (large, small)
    )
    return Machine(flops, exps, memory, (size - 1) * FLOAT * len(large) / (slow - quick), quick / collective)


def all_steps() -> list[tuple[str, int, int, int, float, float]]:
    """Measure all steps on this rank; the last two entries are measured and computed seconds."""
    size, rows = dist.get_world_size(), []
    machine = calibrate(size)
    for name, n, d, cost, loss in MEASURED:
        torch.manual_seed(dist.get_rank())
        z1, z2 = (z.requires_grad_() for z in torch.randn(2, n // size, d))
        measured = timed(lambda z1=z1, z2=z2, loss=loss: torch.autograd.grad(loss(z1, z2), (z1, z2)))  # type: ignore[misc]
        rows.append((name, n, d, size, measured, cost(size).seconds(machine)))
    return rows


def measure(output: Path) -> None:
    """Print measured beside computed times, and write them."""
    rows = [row for size in (1, 2, 4) for row in on_ranks(all_steps, size)]
    print(
        "| step | n | d | processes | measured ms | computed ms | measured / computed |\n|---|---|---|---|---|---|---|"
    )
    for name, n, d, size, measured, computed in rows:
        print(
            f"| {name} | {n:,} | {d:,} | {size} | {measured * 1e3:.0f} | {computed * 1e3:.0f} | "
            f"{measured / computed:.2f} |"
        )
    keys = ("step", "n", "d", "processes", "measured_seconds", "computed_seconds")
    write_result(output, {"rows": [dict(zip(keys, row, strict=True)) for row in rows]})
    print(f"written: {output}")


def main() -> None:
    """Print, or measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "scaling.json")
    options = parser.parse_args()
    if options.measure:
        measure(options.output)
    else:
        print_tables()


if __name__ == "__main__":
    main()
