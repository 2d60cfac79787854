"""How speed grows with the batch, the images' side and number, and the threads: views, and whole training steps.

    python -m benchmarks.growth
    python -m benchmarks.growth --preset cifar10-simclr-100 --batch-size 128

Views: fused, of images of noise that FFCV or this project's memory reader reads, from batches of 512 images of
32 x 32 pixels out of 8,192, with a thread per core; one of these is changed at a time. Steps: a preset's, on views that
are there. The values of one axis take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import train_simclr
from benchmarks import common
from benchmarks.pipeline import CORES, SPEC, Stream
from benchmarks.step import open_run
from simclr import system
from simclr.config import SpeedConfig, TrainConfig
from simclr.data import open_images
from simclr.presets import PRESETS
from simclr.views.fused_views import FusedViews

BASE = {"batch size": 512, "side": 32, "images": 8192, "threads": CORES}
AXES: dict[str, list[int]] = {
    "batch size": [32, 128, 512, 2048],
    "side": [32, 64, 96, 128],
    "images": [2048, 8192, 32_768, 131_072],
    "threads": [threads for threads in (1, 2, 4, 8, 16, 32, 64) if threads < CORES] + [CORES],
}
STEP_AXES: dict[str, list[int]] = {"batch size": [32, 64, 128, 256], "side": [32, 48, 64, 96]}
QUICK_BASE = {"batch size": 16, "side": 32, "images": 64, "threads": 1}
QUICK_AXES: dict[str, list[int]] = {"batch size": [8, 16], "side": [32, 48], "images": [64, 128], "threads": [1]}
Found = dict[str, dict[str, dict[str, dict[str, float | int | None]]]]
"""Axis -> what was measured -> value -> timing."""


def main() -> None:
    """Measure, print tables and write results/benchmarks/growth.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu-simclr", choices=PRESETS, help="of the steps")
    parser.add_argument("--batch-size", type=int, default=64, help="of the steps on images of several sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=common.ROOT / "results" / "benchmarks" / "growth.json")
    parser.add_argument("--quick", action="store_true", help="two values of each, a tiny network; not to be quoted")
    options = parser.parse_args()
    base, axes, step_axes, per_round = BASE, AXES, STEP_AXES, 16_384
    config = PRESETS[options.preset].config
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.quick:
            base, axes, options.rounds, options.output = QUICK_BASE, QUICK_AXES, 1, folder / "growth.json"
            step_axes, per_round, options.batch_size = {axis: QUICK_AXES[axis] for axis in STEP_AXES}, 64, 8
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder="small_resnet_w8"))
        views = measure_views(folder, base, axes, per_round, options.rounds)
        steps = measure_steps(folder, config, step_axes, options.batch_size, options.rounds)
    what = {
        "views": f"two views of each image, fused; {', '.join(f'{key} {value}' for key, value in base.items())}",
        "steps": f"one training step, {config.model.encoder}; batch size {options.batch_size}, side 32",
    }
    common.write_result(options.output, {"what": what, "views": views, "steps": steps})


def measure_views(folder: Path, base: dict[str, int], axes: dict[str, list[int]], per_round: int, rounds: int) -> Found:
    """Measure views along each axis; a round of a candidate makes those of about ``per_round`` images."""
    found: Found = {}
    for axis, values in axes.items():
        with contextlib.ExitStack() as stack:
            candidates: dict[tuple[str, int], tuple[Callable[[], object], int]] = {}
            for value in values:
                at = base | {axis: value}
                path = folder / f"{at['images']} of {at['side']}.beton"
                if not path.exists():
                    common.write_noise(path, at["images"], at["side"])
                for loader in ("ffcv", "memory"):
                    with contextlib.suppress(ValueError):  # without FFCV
                        candidates[loader, value] = view_maker(stack, path, loader, at), at["batch size"]
            found[axis] = in_turns("views", axis, candidates, per_round, rounds)
    return found


def view_maker(stack: contextlib.ExitStack, path: Path, loader: Any, at: dict[str, int]) -> Stream:
    """Return what makes the views of one batch a call."""
    source = stack.enter_context(open_images(path, backend=loader, num_workers=at["threads"]))
    mean, std = source.facts.normalisation
    fused = stack.enter_context(FusedViews(SPEC, SPEC, size=at["side"], mean=mean, std=std, threads=at["threads"]))
    return Stream(source, at["batch size"], lambda image, index: fused(image, index, seed=0, epoch=0))


def measure_steps(folder: Path, config: TrainConfig, axes: dict[str, list[int]], batch_size: int, rounds: int) -> Found:
    """Measure training steps along each axis."""
    found: Found = {}
    for axis, values in axes.items():
        with contextlib.ExitStack() as stack:
            candidates: dict[tuple[str, int], tuple[Callable[[], object], int]] = {}
            for value in values:
                at = {"batch size": batch_size, "side": 32} | {axis: value}
                candidates["train_simclr", value] = step_maker(stack, folder, config, at), at["batch size"]
            found[axis] = in_turns("steps", axis, candidates, 0, rounds)
    return found


def step_maker(
    stack: contextlib.ExitStack, folder: Path, config: TrainConfig, at: dict[str, int]
) -> Callable[[], object]:
    """Return what takes one step a call."""
    output = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
    config = dataclasses.replace(
        config,
        data=output / "noise.beton",
        speed=SpeedConfig(loader="memory"),
        output=output,
        global_batch_size=at["batch size"],
        view_sizes=(),
        num_validation=0,
    )
    common.write_noise(config.data, at["batch size"], at["side"])
    run = open_run(stack, config)
    views = next(iter(run.feed.batches(run.plan)))
    run.feed.close()
    return lambda: train_simclr.train_step(run, views)


def in_turns(
    what: str,
    axis: str,
    candidates: dict[tuple[str, int], tuple[Callable[[], object], int]],
    per_round: int,
    rounds: int,
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Time candidates, by (name, value) with their images a call, in turns; print and return images per second."""
    torch.set_num_threads(CORES)
    system.keep_freed_memory()
    labels = {key: f"{key[0]}, {axis} {key[1]}" for key in candidates}
    timings = common.interleave(
        {labels[key]: call for key, (call, _) in candidates.items()},
        rounds=rounds,
        calls={labels[key]: max(1, per_round // images) for key, (_, images) in candidates.items()},
    )
    print(f"\n| {what} | images/s | spread | others' load |\n|---|---|---|---|")
    found: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for (name, value), (_, images) in candidates.items():
        label = labels[name, value]
        print(common.table({label: timings[label]}, images=images).splitlines()[-1])
        found.setdefault(name, {})[str(value)] = common.as_json({label: timings[label]}, images=images)[label]
    return found


if __name__ == "__main__":
    main()
