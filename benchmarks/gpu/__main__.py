"""Asks a GPU what it can tell, in order of worth, a few minutes for each piece; prints one summary.

    python -m benchmarks.gpu --data data/cifar10/train.beton
    python -m benchmarks.gpu step accuracy --preset cifar10-simclr-100 --seeds 0 1 2 --minutes 30
    python -m benchmarks.gpu simulate two_ranks

Each piece is a process of its own, gets its share of --minutes, and writes JSON to --output as it goes. A piece whose
file is there is not run again (--again). Time to accuracy goes on where it was cut off: give the same command until all
is done. Nothing outside this machine is needed, nor FFCV. Compiling counts; converting the images comes before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import ROOT
from benchmarks.gpu.accuracy import UNFINISHED


class Piece(NamedTuple):
    """What is asked, and the minutes that it gets."""

    what: str
    minutes: float


PIECES = {
    "check": Piece("the tests that need a GPU", 2),
    "step": Piece("the training step, and what the machine could do", 2),
    "accuracy": Piece("accuracy against seconds", 3),
    "loss": Piece("the losses at up to 131,072 rows", 1),
    "simulate": Piece("rank 0's share of a step of several GPUs, with messages of assumed times", 4.5),
    "two_ranks": Piece("two NCCL ranks on this GPU: captured, ended, killed", 4.5),
}


def main() -> int:
    """Run the pieces; return 0 if all were done, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"default: all of {', '.join(PIECES)}")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "cifar10" / "train.beton")
    parser.add_argument("--test-data", type=Path, help="default: test.beton beside it")
    parser.add_argument("--preset", default="fast-simclr")
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--minutes", type=float, help="for all pieces that are asked for together")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "gpu")
    parser.add_argument("--again", action="store_true", help="also what has been done")
    parser.add_argument("--quick", action="store_true", help="in miniature, also without a GPU; not to be quoted")
    options = parser.parse_args()
    if unknown := set(options.pieces) - set(PIECES):
        parser.error(f"unknown pieces {sorted(unknown)}; known are {', '.join(PIECES)}")
    if not torch.cuda.is_available() and not options.quick:
        parser.error("no CUDA device is visible; --quick runs everything in miniature without one")
    options.output.mkdir(parents=True, exist_ok=True)
    states = {}
    asked = {name: PIECES[name] for name in PIECES if name in (options.pieces or PIECES)}
    whole = sum(piece.minutes for piece in asked.values())
    for piece, (what, share) in asked.items():
        minutes = share if options.minutes is None else options.minutes * share / whole
        name = f"accuracy-{options.preset}" if piece == "accuracy" else piece
        result = options.output / f"{name}.json"
        if result.exists() and not options.again:
            states[piece] = f"done before: {result}"
        else:
            print(f"\n=== {piece}: {what}, at most {minutes:.1f} minutes", flush=True)
            states[piece] = run(command(piece, result, options, minutes), result, minutes)
    print("\n=== summary")
    for piece, state in states.items():
        print(f"{piece:<10}{state}")
        path = options.output / f"{f'accuracy-{options.preset}' if piece == 'accuracy' else piece}.json"
        if path.exists():
            for line in json.loads(path.read_text(encoding="utf-8"))["summary"]:
                print(f"{'':<10}{line}")
    return int(not all(state.startswith("done") for state in states.values()))


def command(piece: str, result: Path, options: argparse.Namespace, minutes: float) -> list[str]:
    """Return the command that runs a piece."""
    words = [sys.executable, "-m", f"benchmarks.gpu.{piece}", "--output", str(result)]
    if piece in {"check", "simulate"}:
        words += ["--minutes", str(minutes)]
    if piece in {"step", "simulate"}:
        words += ["--preset", options.preset]
    if piece == "accuracy":
        test_data = options.test_data or options.data.with_name("test.beton")
        words += ["--preset", options.preset, "--data", str(options.data), "--test-data", str(test_data)]
        words += ["--minutes", str(minutes), "--seeds", *options.seeds]
    return [*words, "--quick"] if options.quick else words


def run(words: list[str], result: Path, minutes: float) -> str:
    """Run a piece, and return how it ended, in words."""
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True) as process:
        try:
            # Half a minute more than a piece is told, in which it saves
            status = process.wait(60 * minutes + 30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"cut off after {minutes:.1f} minutes" + (
                f"; what was measured: {result}" if result.exists() else ""
            )
    if status == UNFINISHED:
        return "to be continued: give the same command again"
    return f"done: {result}" if status == 0 and result.exists() else f"failed with status {status}"


if __name__ == "__main__":
    sys.exit(main())
