"""What a step on several GPUs would take, told by one: it does rank 0's share, and waits where ranks would talk.

Run by ``python -m benchmarks.gpu simulate``. The step is training's own, with the process group replaced by one whose
messages are a copy and a wait of a modelled time: a latency, and the bytes over a bandwidth. These two numbers are
assumed, and no rank ever waits for a slower one. Arithmetic, launches, graph and packing are measured. All ranks are
taken to hold rank 0's rows, so that every number stays finite.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, _create_work_from_future

import train_simclr
from benchmarks import common
from benchmarks.gpu.step import endless, seconds_of
from simclr import distributed
from simclr.batch_norm import GlobalBatchNorm
from simclr.config import SpeedConfig, TrainConfig, derive
from simclr.presets import PRESETS
from simclr.run import opening
from simclr.run.interruption import Signals
from simclr.run.peers import Peers

NUM_IMAGES = 50_000  # CIFAR-10's, so that epochs begin as often as there
WAYS = ("graph", "graph-compiled")
BATCHES = (512, 4096)
SIZES = (1, 8, 2, 4)  # in order of worth: the time may end in between


class Network(NamedTuple):
    """What is assumed of the links between GPUs; by default that messages take no time."""

    latency_us: float = 0.0
    gigabytes_per_second: float = math.inf
    """As NCCL's tests count it (bus bandwidth): an all-reduce moves each byte 2 (W - 1) / W times."""


class Modelled(dist.ProcessGroup):
    """Stands for the process group of rank 0 of ``size`` ranks that all hold the same tensors.

    torch's own collectives end here, eager, in a backward pass, in compiled code and within a captured graph.
    """

    def __init__(self, size: int, network: Network) -> None:
        super().__init__(0, size)  # type: ignore[call-arg]
        self.messages, self.bytes = 0, 0
        self._size, self._network = size, network
        waits = torch.cuda.is_available() and network != Network()
        self._cycles_per_second = cycles_per_second() if waits else 0.0

    @property
    def group_name(self) -> Any:  # torch names only groups that are not written in Python
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:  # noqa: N802
        return "modelled"

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        for tensor in tensors:
            if opts is None or opts.reduceOp == dist.ReduceOp.SUM:
                tensor.mul_(self._size)
            self._send(tensor, 2 * (self._size - 1) / self._size)
        return _done()

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        output.view(self._size, *input.shape).copy_(input.expand(self._size, *input.shape))
        self._send(output, (self._size - 1) / self._size)
        return _done()

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, own)
        return _done()

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        output.copy_(input[: len(output)]).mul_(self._size)
        self._send(input, (self._size - 1) / self._size)
        return _done()

    # Their names before torch 2.14
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def _send(self, tensor: Tensor, times: float) -> None:
        """Count a message, and have the device wait as long as it would take."""
        size = tensor.numel() * tensor.element_size()
        self.messages += 1
        self.bytes += size
        if self._cycles_per_second:
            seconds = self._network.latency_us * 1e-6 + times * size / (self._network.gigabytes_per_second * 1e9)
            torch.cuda._sleep(int(seconds * self._cycles_per_second))  # type: ignore[no-untyped-call]


def _done() -> dist.Work:
    future: torch.futures.Future[None] = torch.futures.Future()
    future.set_result(None)
    return _create_work_from_future(future)


def cycles_per_second() -> float:
    """Return how fast the GPU counts while it waits."""
    cycles = 100_000_000
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
    return cycles / seconds_of(lambda: torch.cuda._sleep(cycles))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def rank_0_of(size: int, network: Network) -> Iterator[Modelled | None]:
    """Have this process open runs as rank 0 of ``size``; None, and nothing is changed, for a size of 1."""
    if size == 1:
        yield None
        return
    group = Modelled(size, network)
    dist.Backend._plugins.pop("MODELLED", None)
    dist.Backend.register_backend("modelled", lambda *_: group, devices=["cpu", "cuda"])
    dist.init_process_group("modelled", rank=0, world_size=size, store=HashStore())
    way_of_steps = opening.way_of_steps
    try:
        with (
            mock.patch.object(distributed, "backend", return_value="nccl"),
            mock.patch.object(opening, "derive", lambda config, images, _: derive(config, images, size)),
            # As every captured or compiled step does, also where a miniature on a CPU is neither
            mock.patch.object(
                opening, "way_of_steps", lambda *known: way_of_steps(*known)._replace(averages_gradients=True)
            ),
        ):
            yield group
    finally:
        dist.destroy_process_group()


def measure(config: TrainConfig, size: int, network: Network, steps: int) -> dict[str, Any]:
    """Return what a step of ``size`` ranks takes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config = dataclasses.replace(config, output=Path(folder, "run"))
        # They meet before there is a group, so that this process talks to nobody but itself
        peers = stack.enter_context(Peers(timeout_seconds=600, signals=Signals()))
        group = stack.enter_context(rank_0_of(size, network))
        with contextlib.redirect_stdout(sys.stderr):
            run = stack.enter_context(opening.open_run(config, peers, train_simclr.update))
        run.model.train()
        batches = endless(lambda: train_simclr.batches(run, 0, 0))

        def one_step() -> None:
            train_simclr.train_step(run, next(batches))

        first = seconds_of(one_step)
        before = (0, 0) if group is None else (group.messages, group.bytes)
        seconds_of(one_step)  # not yet captured: a graph that is replayed tells the host nothing
        after = (0, 0) if group is None else (group.messages, group.bytes)
        seconds_of(one_step, 8 if steps > 8 else 1)
        ms = 1e3 * min(seconds_of(one_step, steps) for _ in range(3))
        run.guard.norms()
        return {
            "how": config.speed.compile,
            "batch": config.global_batch_size,
            "gpus": size,
            "ms": ms,
            "images_per_second": config.global_batch_size / ms * 1e3,
            "collectives": after[0] - before[0],
            "megabytes": (after[1] - before[1]) / 1e6,
            "batch_norm_layers": sum(
                isinstance(layer, GlobalBatchNorm | nn.SyncBatchNorm) for layer in run.plain_model.modules()
            ),
            "is_captured": run.way.is_captured,
            "first_step_seconds": first,
        }


def main() -> None:
    """Measure all cases, each in its process, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="fast-simclr", choices=PRESETS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.5, help="after which no further case is begun")
    parser.add_argument("--latency-us", type=float, default=20.0, help="assumed, of each collective")
    parser.add_argument("--gigabytes-per-second", type=float, default=300.0, help="assumed, bus bandwidth")
    parser.add_argument("--quick", action="store_true", help="a tiny network, 1 and 2 ranks, no waits on a CPU")
    parser.add_argument("--only", nargs=4, metavar=("WAY", "BATCH", "GPUS", "DATA"), help="one case, printed as JSON")
    options = parser.parse_args()
    network = Network(options.latency_us, options.gigabytes_per_second)
    if options.only:
        way, batch, size, data = options.only
        case = configured(options.preset, way, int(batch), Path(data), is_small=options.quick)
        print(json.dumps(measure(case, int(size), network, 2 if options.quick else 30)))
        return
    deadline = time.monotonic() + 60 * options.minutes
    found: list[dict[str, Any]] = []
    left_out: list[str] = []
    cases = [(way, batch, size) for way in WAYS for batch in BATCHES for size in SIZES]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "noise.beton")
        if options.quick:
            cases = [("none", 16, size) for size in (1, 2)]
        common.write_noise(data, 64 if options.quick else NUM_IMAGES)
        for way, batch, size in cases:
            words = [sys.executable, "-m", "benchmarks.gpu.simulate", *sys.argv[1:]]
            words += ["--only", way, str(batch), str(size), str(data)]
            name, seconds_left = f"{way}, batch {batch}, {size} GPUs", deadline - time.monotonic()
            try:
                done = subprocess.run(
                    words, cwd=common.ROOT, capture_output=True, text=True, check=False, timeout=max(0.1, seconds_left)
                )
            except subprocess.TimeoutExpired:
                left_out.append(f"{name}: not measured, for want of time")
            else:
                if done.returncode:
                    left_out.append(f"{name}: failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
                else:
                    found.append(json.loads(done.stdout.splitlines()[-1]))
            summary = [*describe(found, network), *left_out]
            common.write_result(
                options.output,
                {"summary": summary, "preset": options.preset, "assumed": network._asdict(), "cases": found},
            )
    print(*summary, sep="\n")


def configured(preset: str, way: Any, batch: int, data: Path, *, is_small: bool) -> TrainConfig:
    """Return the run of a case."""
    config = PRESETS[preset].config
    if is_small:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder="small_resnet_w8"))
    return dataclasses.replace(
        config,
        data=data,
        global_batch_size=batch,
        speed=SpeedConfig(loader="memory", compile=way),
        precision="fp32" if is_small else "bf16",
        num_validation=0,
        view_sizes=(),
    )


def describe(cases: list[dict[str, Any]], network: Network) -> list[str]:
    """Return the cases as a Markdown table, under what was assumed for it.

    Efficiency is that of one GPU's measured step, computed the same way, over the share of it that each of several has.
    """
    alone = {(case["how"], case["batch"]): case["ms"] for case in cases if case["gpus"] == 1}
    lines = [
        f"one GPU, measured; several: rank 0's share, measured, and two assumed numbers: {network.latency_us:g} us a "
        f"collective, {network.gigabytes_per_second:g} GB/s",
        "| how | global batch | GPUs | ms | images/s | efficiency | collectives | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in sorted(cases, key=lambda case: (case["how"], case["batch"], case["gpus"])):
        one = alone.get((case["how"], case["batch"]))
        efficiency = "not measured" if one is None else f"{one / case['gpus'] / case['ms']:.0%}"
        lines.append(
            f"| {case['how']} | {case['batch']:,} | {case['gpus']} | {case['ms']:.2f} "
            f"| {case['images_per_second']:,.0f} | {efficiency} | {case['collectives']} | {case['megabytes']:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
