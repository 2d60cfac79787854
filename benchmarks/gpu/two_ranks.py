"""Two real ranks on one GPU: does a step captured with NCCL's messages in it train, end, and notice a lost rank?

Run by ``python -m benchmarks.gpu two_ranks``. One process, two ranks launch by launch, and two that replay their graphs
take the same steps; then one of two is killed while they replay. It shows that this works, not how fast it is: two
processes take turns on the GPU. In miniature and without one, two processes over gloo, launch by launch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from simclr.run import runlog

RUN = shlex.split(
    "cpu-simclr --model.encoder small_resnet_w8 --global-batch-size 32 --num-validation 0 --loader memory "
    "--log-every-steps 1 --checkpoint-every-epochs 1000 --precision fp32"
)
KILLED_AFTER = 12  # steps, of which the first three are not yet replayed
WELL = "ended by itself"
TOLERANCE = 1e-3  # of a loss; float32, and other kernels in a graph


def main() -> int:
    """Run all, print and write; return 0 if all was as it should be, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=55.0, help="after which a run is taken to hang")
    parser.add_argument("--quick", action="store_true", help="few steps; without a GPU two processes over gloo")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.quick:
        parser.error("two NCCL ranks need a CUDA device, and none is visible")
    steps = 3 if options.quick else options.steps
    runs = {"one process": (1, "none"), "two ranks": (2, "none")}
    if torch.cuda.is_available():
        runs["two ranks, captured"] = (2, "graph")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common.write_noise(folder / "noise.beton", 512)
        losses: dict[str, list[float]] = {}
        ends: dict[str, str] = {}
        for run, (size, way) in runs.items():
            output = folder / run.replace(" ", "-")
            ends[run] = wait_for(start(size, way, output, "--stop-at-step", str(steps)), options.seconds)
            losses[run] = losses_of(output)
            if ends[run] != WELL:
                print(f"{run}: {ends[run]}", *(last_lines(output, rank) for rank in range(size)), sep="\n")
            write(options.output, losses, ends)
        lost = kill_one(2, list(runs.values())[-1][1], folder / "killed", options.seconds)
    print(*write(options.output, losses, ends, lost), sep="\n")
    is_good = (
        set(ends.values()) == {WELL}
        and all(len(each) == steps for each in losses.values())
        and largest_difference(losses) < TOLERANCE
        and lost["names_it"]
    )
    return int(not is_good)


def write(
    path: Path, losses: dict[str, list[float]], ends: dict[str, str], lost: dict[str, Any] | None = None
) -> list[str]:
    """Write what is known so far, as the time may end before the rest is; return it in lines."""
    difference = largest_difference(losses)
    summary = [
        *table(losses),
        f"largest relative difference of a loss from one process's: {difference:.1e}",
        *(f"{run}: {end}" for run, end in ends.items()),
    ]
    if lost is not None:
        named = "it named rank 1" if lost["names_it"] else "it did not name rank 1"
        summary.append(
            f"rank 1 killed while ranks {lost['while']}: rank 0 {lost['end']} after {lost['seconds']:.1f} s; {named}: "
            f"{lost['said']}"
        )
    common.write_result(
        path, {"summary": summary, "losses": losses, "difference": difference, "ends": ends, "killed": lost}
    )
    return summary


def start(size: int, way: str, output: Path, *more: str) -> list[subprocess.Popen[bytes]]:
    """Start the ranks of a run, each with its output in a file."""
    words = [sys.executable, "train_simclr.py", *RUN, "--data", str(output.parent / "noise.beton")]
    words += ["--output", str(output), "--compile", way, "--world-size", str(size), *more]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(size):
        place = {} if size == 1 else places(rank, size) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with log_of(output, rank).open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    words,
                    cwd=common.ROOT,
                    env={**os.environ, "NVIDIA_TF32_OVERRIDE": "0", **place},  # float32 throughout
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return ranks


def places(rank: int, size: int) -> dict[str, str]:
    """Return what puts a rank beside the others: on the CPU, or on one GPU, which NCCL has to be asked for."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    if not torch.cuda.is_available():
        return place | {"LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"NCCL_MAX_CTAS": "4"}  # few blocks, so that both ranks' kernels find room
    if torch.cuda.nccl.version() >= (2, 30):  # type: ignore[no-untyped-call]
        return place | {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    # As if they were on two machines that talk over sockets
    return place | {
        "NCCL_HOSTID": f"host{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_NVLS_ENABLE": "0",
    }


def wait_for(ranks: list[subprocess.Popen[bytes]], seconds: float) -> str:
    """Return in words how the ranks ended; those that hang are ended."""
    deadline = time.monotonic() + seconds
    try:
        statuses = [rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        return f"had not ended after {seconds:.0f} s"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return WELL if not any(statuses) else f"ended with status {', '.join(map(str, statuses))}"


def kill_one(size: int, way: str, output: Path, seconds: float) -> dict[str, Any]:
    """Kill the last rank of a long run in its course, and return how rank 0 ended and what it said."""
    ranks = start(size, way, output, "--epochs", "4000")
    try:
        deadline = time.monotonic() + seconds
        while len(losses_of(output)) < KILLED_AFTER and time.monotonic() < deadline and ranks[0].poll() is None:
            time.sleep(0.1)
        ranks[-1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        try:
            end = f"ended with status {ranks[0].wait(seconds)}"
        except subprocess.TimeoutExpired:
            end = "had not ended"
        waited, steps = time.monotonic() - killed, len(losses_of(output))
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = last_lines(output, 0, 1)
    return {
        "while": ("replay" if way == "graph" else "train") + f", after step {steps}",
        "end": end,
        "seconds": waited,
        "said": said,
        "names_it": steps >= KILLED_AFTER and "rank 1 is dead" in said,
    }


def log_of(output: Path, rank: int) -> Path:
    """Return where a rank's output is."""
    return output.with_name(f"{output.name}.rank{rank}.log")


def last_lines(output: Path, rank: int, number: int = 5) -> str:
    """Return the last lines that a rank wrote."""
    return "\n".join(log_of(output, rank).read_text(encoding="utf-8", errors="replace").splitlines()[-number:])


def losses_of(output: Path) -> list[float]:
    """Return the loss of each step so far."""
    return [line["loss"] for line in runlog.read_metrics(output) if line["kind"] == "step"]


def largest_difference(losses: dict[str, list[float]]) -> float:
    """Return by how much a loss differs from one process's at the same step, relatively, at most."""
    one, *others = losses.values()
    return max((abs(x - y) / abs(x) for other in others for x, y in zip(one, other, strict=False)), default=0.0)


def table(losses: dict[str, list[float]]) -> list[str]:
    """Return the losses side by side."""
    lines = [f"| step | {' | '.join(losses)} |", "|---" * (len(losses) + 1) + "|"]
    for step in range(max(map(len, losses.values()))):
        each = [f"{of_run[step]:.6f}" if step < len(of_run) else "" for of_run in losses.values()]
        lines.append(f"| {step + 1} | {' | '.join(each)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
