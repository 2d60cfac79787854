"""Accuracy against seconds of training, for a preset and several seeds, in pieces that go on where they were cut off.

Run by ``python -m benchmarks.gpu accuracy``. Pretraining runs as a user runs it; after --minutes it is asked to stop,
saves, and the next call goes on. Seconds are those that the runs' metrics tell: start-up left out, measuring included.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import common
from simclr.beton import load_facts
from simclr.presets import PRESETS
from simclr.run import runlog

UNFINISHED = 75  # as train_simclr.py ends when it was asked to stop
THRESHOLDS = (75.0, 80.0, 85.0, 90.0)
QUICK = shlex.split(
    "--epochs 1 --optimizer.warmup-epochs 0 --global-batch-size 16 --num-validation 20 --model.encoder small_resnet_w8"
)
QUICK_PROBE = ["--epochs", "1", "--num-validation", "20", "--no-baselines"]


def main() -> int:
    """Go on with the runs; write once all are done. Return 0, or UNFINISHED."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--quick", action="store_true", help="a tiny network and one epoch")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    runs = []
    for seed in options.seeds:
        folder = options.output.parent / "runs" / f"{options.preset}-seed{seed}"
        words = ["--seed", str(seed), "--output", str(folder), "--data", str(options.data), "--loader", "memory"]
        if options.quick:
            words += QUICK
        status = until([sys.executable, "train_simclr.py", options.preset, *words], deadline)
        if status == 0 and not (folder / "probe-linear" / "probe.json").exists():
            stored = load_facts(options.data).height
            sides = [str(stored * quarters // 4) for quarters in (4, 5, 6)]
            probe = [sys.executable, "linear_probe.py", "--run", str(folder), "--test", str(options.test_data)]
            probe += ["--image-sizes", *sides, *(QUICK_PROBE if options.quick else [])]
            status = until(probe, deadline)
        if status:
            return UNFINISHED if time.monotonic() >= deadline or status == UNFINISHED else status
        runs.append(collect(folder, seed))
    draw(options.output.with_suffix(".png"), options.preset, runs)
    summary = [line for run in runs for line in describe(run)]
    print(*summary, sep="\n")
    common.write_result(options.output, {"summary": summary, "preset": options.preset, "runs": runs})
    return 0


def until(words: list[str], deadline: float) -> int:
    """Run a command; at the deadline ask it to stop, and wait until it has saved. Returns its status."""
    with subprocess.Popen(words, cwd=common.ROOT) as process:
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            return process.wait(50)


def collect(folder: Path, seed: int) -> dict[str, Any]:
    """Return what a finished run measured."""
    lines = runlog.read_metrics(folder)
    knn = [(line["seconds"], line["epoch"], line["knn_accuracy"]) for line in lines if line["kind"] == "knn"]
    probe = json.loads((folder / "probe-linear" / "probe.json").read_text(encoding="utf-8"))
    row = probe["rows"][-1]
    test = {"knn": row["knn_test"], "linear": row["classifier"]["test"]}
    return {"seed": seed, "seconds": lines[-1]["seconds"], "knn_validation": knn, "test": test}


def describe(run: dict[str, Any]) -> list[str]:
    """Return a run in lines."""
    knn, linear = run["test"]["knn"], run["test"]["linear"]
    lines = [
        f"seed {run['seed']}: {run['seconds'] / 60:.1f} min of training; test: kNN {knn:.1f} %, linear {linear:.1f} %"
    ]
    for threshold in THRESHOLDS:
        reached = [seconds for seconds, _, accuracy in run["knn_validation"] if accuracy >= threshold]
        if reached:
            lines.append(f"seed {run['seed']}: validation kNN {threshold:g} % after {reached[0] / 60:.1f} min")
    return lines


def draw(path: Path, preset: str, runs: list[dict[str, Any]]) -> None:
    """Draw validation accuracy against minutes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        minutes = [seconds / 60 for seconds, _, _ in run["knn_validation"]]
        axes.plot(
            minutes, [accuracy for _, _, accuracy in run["knn_validation"]], marker=".", label=f"seed {run['seed']}"
        )
    axes.set(xlabel="minutes of training", ylabel="validation kNN, %", title=preset)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
