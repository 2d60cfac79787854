"""From a folder of JPEG files to an accuracy: seconds, by this project and by a plain script.

    python -m benchmarks.end_to_end --images photos/train
    python -m benchmarks.end_to_end --images photos/train --number 10000     # minutes on 2 cores

This project converts the folder, then trains by the loop of train_simclr.py, its log and checkpoints included. The
plain script is what is written otherwise: torchvision's ImageFolder with lightly's SimCLRTransform in a DataLoader of a
worker per core, lightly's NTXentLoss, each view by itself, float32, torch's default layout. Without lightly,
torchvision's transforms and a masked cross-entropy take its place, and the result says so. Images, encoder, projector,
optimizer, schedule, batch, and the views' sizes and settings are the same; their random numbers are not.

Each side trains an epoch in turn, and after it the same kNN measures its encoder on the same validation images. Counted
are conversion, setting up, and training. Not counted, on both sides: imports and measuring. Both find the files in the
page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import train_simclr
from benchmarks import common
from benchmarks.pipeline import lightly_transform, torchvision_transform
from benchmarks.step import Loss, give_back_freed_memory, masked_nt_xent, open_run, plain_step
from data_prep import shapes
from data_prep.convert import Storage, convert
from data_prep.find import find
from data_prep.image_folder import image_folder
from simclr import system
from simclr.beton import Facts
from simclr.config import TrainConfig, derive
from simclr.models import SimCLR
from simclr.optim import make_optimizer, set_learning_rate
from simclr.presets import PRESETS
from simclr.views import size_at

OURS, PLAIN = "train_simclr", "a plain script"


def main() -> None:
    """Measure, print a table and write results/benchmarks/end_to_end.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with one folder of images of one size per class")
    parser.add_argument("--number", type=int, help="take this many of them, spread over the classes")
    parser.add_argument("--preset", default="cpu-simclr", choices=PRESETS)
    parser.add_argument("--encoder", help="instead of the preset's")
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--batch-size", type=int, help="instead of the preset's")
    parser.add_argument("--validation", type=int, help="validation images; default: a tenth")
    parser.add_argument("--accuracy", type=float, help="in %%; default: the highest that both sides reach")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=common.ROOT / "results" / "benchmarks" / "end_to_end.json")
    parser.add_argument("--quick", action="store_true", help="a tiny network on drawn images; not to be quoted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.quick:
            options.images, options.output = draw_images(folder / "drawn", 200), folder / "end_to_end.json"
            options.encoder, options.epochs, options.batch_size, options.number = "small_resnet_w8", 2, 16, 100
        if options.images is None:
            parser.error("--images is missing: a folder with one folder of images per class")
        try:
            config = configure(options, folder)
        except ValueError as error:
            parser.error(str(error))
        result = measure(config, take(options.images, folder / "images", options.number), options)
    print_table(result)
    common.write_result(options.output, result)


def configure(options: argparse.Namespace, folder: Path) -> TrainConfig:
    """Return the run that both sides make; its log and checkpoints go to ``folder``.

    Raises:
        ValueError: If the plain script cannot make it.
    """
    config = PRESETS[options.preset].config
    view = config.view_1
    if config.loss.name != "nt_xent" or config.view_2 != view or view.blur_probability or view.solarise_probability:
        raise ValueError(f"{options.preset}: the plain script knows SimCLR only, with two equal views without blur")
    return dataclasses.replace(
        config,
        epochs=options.epochs or config.epochs,
        global_batch_size=options.batch_size or config.global_batch_size,
        model=dataclasses.replace(config.model, encoder=options.encoder or config.model.encoder),
        seed=options.seed,
        data=folder / "train.beton",
        output=folder / "run",
        num_validation=0,  # measured here, outside the clock
    )


def draw_images(root: Path, number: int) -> Path:
    """Write images of the built-in shapes as JPEG files."""
    for index, (pixels, label) in enumerate(zip(*shapes.draw(0, "train", 0, number), strict=True)):
        path = root / shapes.CLASSES[label] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return root


def take(images: Path, folder: Path, number: int | None) -> Path:
    """Return a folder with ``number`` of the images, as links, after reading them once."""
    (tree,) = find(images).splits.values()
    which = np.arange(len(tree.paths))
    if number is not None:
        which = which[np.linspace(0, len(which) - 1, min(number, len(which))).astype(int)]
    for index in which:
        path = tree.paths[index]
        link = folder / tree.classes[tree.labels[index]] / f"{index}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
        path.read_bytes()
    return folder


def measure(config: TrainConfig, images: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train on both sides, an epoch in turn, and return seconds and accuracies."""
    with contextlib.ExitStack() as stack:
        started = time.perf_counter()
        (tree,) = find(images).splits.values()
        facts = convert(image_folder(tree, "train"), config.data, Storage())
        converted = time.perf_counter() - started
        ours = Ours(stack, config)
        before = {OURS: time.perf_counter() - started}
        started = time.perf_counter()
        plain = Plain(config, images, facts, ours.run.accelerator.device)
        before[PLAIN] = time.perf_counter() - started
        validation = options.validation or facts.num_images // 10
        accuracies: dict[str, list[float]] = {OURS: [], PLAIN: []}

        def turn(name: str, epoch: Callable[[], float], model: SimCLR) -> Callable[[], float]:
            measured = dataclasses.replace(
                ours.run, plain_model=model, config=dataclasses.replace(config, num_validation=validation)
            )

            def once() -> float:
                seconds = epoch()
                accuracies[name].append(train_simclr.measure_knn(measured))
                print(
                    f"{name}: epoch {len(accuracies[name])}, {seconds:.1f} s, kNN {accuracies[name][-1]:.2f} %",
                    flush=True,
                )
                return seconds

            return once

        turns = {OURS: turn(OURS, ours.epoch, ours.run.plain_model), PLAIN: turn(PLAIN, plain.epoch, plain.model)}
        timings = common.interleave(turns, rounds=config.epochs, warm_up=0)
    target = options.accuracy or min(max(values) for values in accuracies.values())
    sides = {
        name: {
            "seconds_before": before[name],
            "seconds_of_epochs": timing.seconds,
            "seconds": (before[name] + np.cumsum(timing.seconds)).tolist(),
            "knn_accuracy": accuracies[name],
            "elsewhere": timing.elsewhere,
            "median_seconds": timing.median,
        }
        for name, timing in timings.items()
    }
    for side in sides.values():
        passed = np.flatnonzero(np.array(side["knn_accuracy"]) >= target)
        side["seconds_to_accuracy"] = side["seconds"][passed[0]] if len(passed) else None
    times = [sides[name]["seconds_to_accuracy"] for name in (OURS, PLAIN)]
    return {
        "what": f"{options.preset}, {config.model.encoder}, {facts.num_images} images, {config.epochs} epochs, batch "
        f"{config.global_batch_size}; kNN on {validation} validation images",
        "plain_script": plain.description,
        "seconds_to_convert": converted,
        "accuracy": target,
        "sides": sides,
        "ratio": None if None in times else times[1] / times[0],
    }


class Ours:
    """This project's run on ``config.data``, an epoch at a time."""

    def __init__(self, stack: contextlib.ExitStack, config: TrainConfig) -> None:
        self.run = open_run(stack, config)

    def epoch(self) -> float:
        """Train; return the seconds."""
        system.keep_freed_memory()
        stop = self.run.progress.step + self.run.derived.steps_per_epoch
        config = dataclasses.replace(self.run.config, stop_at_step=stop)
        started = time.perf_counter()
        train_simclr.train(dataclasses.replace(self.run, config=config))
        common.wait_for_gpu()
        return time.perf_counter() - started


class Plain:
    """The same run as most would write it, an epoch at a time."""

    def __init__(self, config: TrainConfig, images: Path, facts: Facts, device: torch.device) -> None:
        has_lightly = importlib.util.find_spec("lightly") is not None
        temperature = config.loss.temperature
        self._loss: Loss = partial(masked_nt_xent, temperature=temperature)
        self.description = "torchvision's transforms, a masked cross-entropy (lightly is not installed)"
        if has_lightly:
            import lightly
            from lightly.loss import NTXentLoss

            self._loss = NTXentLoss(temperature)
            self.description = f"SimCLRTransform and NTXentLoss of lightly {lightly.__version__}"
        self._transform = lightly_transform if has_lightly else torchvision_transform
        self._config, self._facts, self._device = config, facts, device
        self._derived = derive(config, facts.num_images, 1)
        self._images = ImageFolder(images)
        self._loader = torch.utils.data.DataLoader(
            self._images,
            config.global_batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=system.usable_cores(),
            pin_memory=device.type == "cuda",
            multiprocessing_context="fork",
        )
        torch.manual_seed(config.seed)
        self.model = SimCLR(config.model, facts.height).to(device)
        self._optimizer = make_optimizer(self.model, config.optimizer)
        self._step = 0

    def epoch(self) -> float:
        """Train; return the seconds."""
        give_back_freed_memory()
        config, derived, facts = self._config, self._derived, self._facts
        self.model.train()
        started = time.perf_counter()
        size = size_at(config.view_stages, self._step // derived.steps_per_epoch, facts.height)
        self._images.transform = self._transform(*facts.normalisation, config.view_1, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
            batches = iter(self._loader)
        for views, _ in batches:
            set_learning_rate(self._optimizer, derived.learning_rate(self._step))
            view_1, view_2 = (view.to(self._device, non_blocking=True) for view in views)
            plain_step(self.model, self._optimizer, self._loss, view_1, view_2)
            self._step += 1
        return time.perf_counter() - started


def print_table(result: dict[str, Any]) -> None:
    """Print the result."""
    print(f"{result['what']}\nthe plain script: {result['plain_script']}")
    print(f"converted in {result['seconds_to_convert']:.1f} s")
    print(f"| | s before training | s per epoch | others' load | kNN at the end | s to {result['accuracy']:.1f} % |")
    print("|---|---|---|---|---|---|")
    for name, side in result["sides"].items():
        load = "" if side["elsewhere"] is None else f"{side['elsewhere']:.0%}"
        reached = side["seconds_to_accuracy"]
        print(
            f"| {name} | {side['seconds_before']:.1f} | {side['median_seconds']:.1f} | {load} | "
            f"{side['knn_accuracy'][-1]:.1f} % | {'not reached' if reached is None else f'{reached:.0f}'} |"
        )
    if result["ratio"] is not None:
        print(f"{OURS} is {result['ratio']:.2f} times as fast")


if __name__ == "__main__":
    main()
