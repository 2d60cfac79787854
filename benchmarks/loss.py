"""The losses against others': time and peak memory of value and gradient, on one process and on two.

    pip install lightly pytorch-metric-learning     # or: pip install -e '.[benchmarks]'
    python -m benchmarks.loss                       # about 10 minutes on 2 cores
    python -m benchmarks.loss --quick               # seconds, to see that it runs

Candidates take turns; a figure is the median over rounds. Rows are projections: two for each source image. What is not
installed is left out, and said. Writes results/benchmarks/loss.json, or what --output names.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT, as_json, interleave, on_ranks, peak_memory, write_result
from simclr.losses import barlow_twins, nt_xent

TEMPERATURE = 0.5
Loss = Callable[[Tensor, Tensor], Tensor]


def plain(z1: Tensor, z2: Tensor) -> Tensor:
    """The masked cross-entropy that a short script holds: the whole matrix, autograd."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def make_loss(name: str, gather: bool = False) -> Loss:
    """Return a candidate; ``gather``: over the projections of all processes."""
    if name == "ours":
        return lambda z1, z2: nt_xent(z1, z2, temperature=TEMPERATURE)
    if name == "ours, Barlow Twins":
        return barlow_twins
    if name == "plain cross-entropy":
        return plain
    if name == "lightly":
        from lightly.loss import NTXentLoss

        return NTXentLoss(temperature=TEMPERATURE, gather_distributed=gather)  # type: ignore[no-any-return]
    if name == "lightly, Barlow Twins":
        from lightly.loss import BarlowTwinsLoss

        return BarlowTwinsLoss(gather_distributed=gather)  # type: ignore[no-any-return]
    if name == "pytorch-metric-learning":
        from pytorch_metric_learning.losses import NTXentLoss as TheirLoss
        from pytorch_metric_learning.losses import SelfSupervisedLoss

        return SelfSupervisedLoss(TheirLoss(temperature=TEMPERATURE))  # type: ignore[no-any-return]
    raise ValueError(f"no candidate named {name!r}")


PACKAGES = {"lightly": "lightly", "lightly, Barlow Twins": "lightly"}
PACKAGES["pytorch-metric-learning"] = "pytorch_metric_learning"


def is_available(name: str) -> bool:
    """Whether a candidate's package is installed."""
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None


def step(name: str, rows: int, width: int, gather: bool = False) -> Callable[[], Tensor]:
    """Return a callable that computes value and gradient; the value."""
    loss = make_loss(name, gather)
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    common, *noise = torch.randn(3, rows // 2, width, generator=generator)
    z1, z2 = ((common + part).requires_grad_() for part in noise)

    def once() -> Tensor:
        value = loss(z1, z2)
        torch.autograd.grad(value, (z1, z2))
        return value.detach()

    return once


def warm_step(name: str, rows: int, width: int) -> Callable[[], Tensor]:
    """Return the step, after one of few rows has loaded the libraries' code and started their threads."""
    step(name, 128, width)()
    return step(name, rows, width)


def one_process(names: dict[str, int], rows: int, width: int, rounds: int, quick: bool) -> dict[str, Any]:
    """Time and memory at one size; ``names``: candidates, with the most rows that each is asked to take."""
    names = {name: most for name, most in names.items() if rows <= most and is_available(name)}
    steps = {name: step(name, rows, width) for name in names}
    values = {name: float(once()) for name, once in steps.items()}
    timings = interleave(steps, rounds=rounds, warm_up=0)
    del steps
    memory = {
        name: peak_memory("benchmarks.loss:warm_step", name, rows, width, rounds=1 if quick else 3) for name in names
    }
    for name, timing in timings.items():
        ours = next(iter(timings))
        print(
            f"{rows:>6} rows, width {width:>4}  {name:<24} {timing.median * 1e3:10.1f} ms  {memory[name]:8.1f} MiB"
            f"   {timing.median / timings[ours].median:6.2f} x the time"
            f"   others' load {timing.elsewhere or 0:.0%}",
            flush=True,
        )
    return {
        "rows": rows,
        "width": width,
        "seconds": as_json(timings),
        "peak_mib": {name: round(value, 2) for name, value in memory.items()},
        "value": values,
    }


def together(once: Callable[[], Tensor]) -> Callable[[], float]:
    """Return the step as all ranks begin and end it together; it times itself."""

    def timed() -> float:
        dist.barrier()
        started = time.perf_counter()
        once()
        dist.barrier()
        return time.perf_counter() - started

    return timed


def cases_on_a_rank(cases: list[tuple[int, int, list[str]]], rounds: int) -> list[dict[str, Any]]:
    """Time each case (rows in all, width, candidates), with this rank's share of the rows."""
    size, found = dist.get_world_size(), []
    for rows, width, names in cases:
        steps = {name: together(step(name, rows // size, width, gather=True)) for name in names}
        seconds = as_json(interleave(steps, rounds=rounds))
        found.append({"rows": rows, "width": width, "processes": size, "seconds": seconds})
    return found


def several_processes(cases: list[tuple[int, int, list[str]]], size: int, rounds: int) -> list[dict[str, Any]]:
    """Time each case on ``size`` processes with one thread each, over gloo."""
    cases = [(rows, width, [name for name in names if is_available(name)]) for rows, width, names in cases]
    found: list[dict[str, Any]] = on_ranks(cases_on_a_rank, size, cases, rounds)
    for case in found:
        first, *_ = case["seconds"].values()
        for name, timing in case["seconds"].items():
            seconds = timing["median_seconds"]
            print(
                f"{case['rows']:>6} rows, width {case['width']:>4}  {name:<24} {seconds * 1e3:10.1f} ms on each of "
                f"{size} processes   {seconds / first['median_seconds']:6.2f} x the time"
            )
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "loss.json")
    options = parser.parse_args()
    missing = sorted({package for name, package in PACKAGES.items() if not is_available(name)})
    print(f"left out, since not installed: {', '.join(missing)}" if missing else "all candidates are installed")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; value and gradient, float32")

    sizes = [64, 256] if options.quick else [1024, 4096, 16_384, 65_536]
    most = 64 if options.quick else 1024
    candidates = {
        "ours": 1 << 20,
        "plain cross-entropy": 16_384,
        "lightly": 16_384,
        "pytorch-metric-learning": most // 2,  # of pairs times negatives, it holds all: 15 GiB at 1,024 rows
    }
    pairs = [
        one_process(candidates, rows, 128, 3 if options.quick else {1024: 15, 4096: 9}.get(rows, 3), options.quick)
        for rows in ([most // 2, *sizes])
    ]
    widths = [(64, 32)] if options.quick else [(2048, 2048), (8192, 2048)]
    barlow = [
        one_process({"ours, Barlow Twins": 1 << 20, "lightly, Barlow Twins": 1 << 20}, rows, width, 5, options.quick)
        for rows, width in widths
    ]
    both, barlows = ["ours", "lightly"], ["ours, Barlow Twins", "lightly, Barlow Twins"]
    spread = several_processes(
        [(64, 32, both), (64, 32, barlows)]
        if options.quick
        else [(4096, 128, both), (16_384, 128, both), (2048, 2048, barlows)],
        size=2,
        rounds=3 if options.quick else 5,
    )
    write_result(options.output, {"nt_xent": pairs, "barlow_twins": barlow, "processes": spread})
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
