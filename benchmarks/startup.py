"""How long train_simclr.py takes from its launch to the end of its first step, and what takes it.

    python -m benchmarks.startup --data data/cifar10/train.beton

Each start is a new process. "compiled code new" has no cache of compiled views, as on a machine's first run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import common

WAYS: dict[str, list[str]] = {
    "FFCV, fused views": ["--loader", "ffcv", "--views", "fused"],
    "FFCV, fused views, compiled code new": ["--loader", "ffcv", "--views", "fused"],
    "memory, fused views": ["--loader", "memory", "--views", "fused"],
    "memory, torch views": ["--loader", "memory", "--views", "torch"],
}


def main() -> None:
    """Measure, print a table and write results/benchmarks/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/cifar10/train.beton"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=common.ROOT / "results" / "benchmarks" / "startup.json")
    parser.add_argument("--quick", action="store_true", help="one start on made-up images; not to be quoted")
    options = parser.parse_args()
    ways = dict(WAYS)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            ways, options.rounds = {"memory, torch views": WAYS["memory, torch views"]}, 1
            options.data, options.output = Path(folder, "noise.beton"), Path(folder, "startup.json")
            common.write_noise(options.data, 300)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for number in range(options.rounds):
            for name, arguments in ways.items():
                output = Path(folder, f"{number} {name}")
                cache = {"XDG_CACHE_HOME": str(output / "cache")} if "new" in name else {}
                found[name].append(start(options.data, output, arguments, cache))
    medians = {
        name: {part: statistics.median(one[part] for one in starts) for part in starts[0]}
        for name, starts in found.items()
    }
    parts = list(next(iter(medians.values())))
    print(f"| seconds | {' | '.join(parts)} |\n|---|{'---|' * len(parts)}")
    for name, seconds in medians.items():
        print(f"| {name} | {' | '.join(f'{seconds[part]:.1f}' for part in parts)} |")
    common.write_result(
        options.output,
        {"what": "train_simclr.py cpu-simclr, launch to the end of the first step, seconds", "candidates": medians},
    )


def start(data: Path, output: Path, arguments: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Start a run, end it after its first step, and return the seconds that its parts took."""
    code = "from benchmarks import startup; startup._child()"
    fixed = ["--data", str(data), "--output", str(output), "--stop-at-step", "1", "--num-validation", "0"]
    command = [sys.executable, "-c", code, "cpu-simclr", "--global-batch-size", "256", *fixed, *arguments]
    launched = time.time()
    variables = os.environ | environment | {"LAUNCHED": str(launched)}
    done = subprocess.run(command, cwd=common.ROOT, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} ended with status {done.returncode}: {done.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _child() -> None:
    """Run the program with a clock around its parts."""
    launched = float(os.environ["LAUNCHED"])
    import train_simclr
    from simclr.command_line import parse_train_config
    from simclr.run import opening
    from simclr.views.pipeline import ViewFeed

    seconds = {"imports": time.time() - launched}

    @contextlib.contextmanager
    def clock(part: str) -> Iterator[None]:
        before = time.time()
        try:
            yield
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.time() - before

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with clock(part):
                return function(*arguments, **named)

        return call

    def first_batch(feed: ViewFeed, *arguments: Any, **named: Any) -> Iterator[Any]:
        batches = iter(batches_of(feed, *arguments, **named))
        with clock("first batch"):
            first = next(batches)
        yield first
        yield from batches

    def first_step(*arguments: Any, **named: Any) -> Any:
        with clock("first step"):
            result = step(*arguments, **named)
        seconds["in all"] = time.time() - launched
        return result

    batches_of, step = ViewFeed.batches, train_simclr.train_step
    for part, name in (
        ("devices", "start_devices"),
        ("data", "open_images"),
        ("model", "SimCLR"),
        ("views", "ViewFeed"),
    ):
        setattr(opening, name, timed(part, getattr(opening, name)))
    ViewFeed.batches = first_batch  # type: ignore[assignment, method-assign]
    train_simclr.train_step = first_step
    with clock("command line"):
        config = parse_train_config()
    train_simclr.main(config)
    total = seconds.pop("in all")
    seconds["other"] = total - sum(seconds.values())
    print(json.dumps({**seconds, "in all": total}))


if __name__ == "__main__":
    main()
