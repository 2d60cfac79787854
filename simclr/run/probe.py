"""Opens what an evaluation works on, an encoder and images to measure it on, or says why they do not fit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simclr import beton, parts, system
from simclr.beton import Facts
from simclr.config import ProbeConfig, default_num_validation
from simclr.data import ImageSource, few_labels, open_images, validation_split
from simclr.evaluation import Candidate
from simclr.run import launch, runlog
from simclr.run.checkpoint import BEST, LAST, Pretrained, load_pretrained, require_safe_loading

LARGEST_PIXEL_FEATURES = 4 << 30
"""In bytes; beyond this the raw-pixel baseline is left out, and that is said."""

LEAST_STEPS = 16
"""Batches in an epoch with few labels, at least, unless they had fewer than 8 images: with one or two batches, 50
epochs would end long before a fit."""

MOST_TRAINED_ON = 0.1
"""Share of the test images; with more training images among them, nothing is measured."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What every representation is measured on."""

    config: ProbeConfig
    """With the sizes that fit the number of training images."""
    pretrained: Pretrained
    pretraining_manifest: Mapping[str, Any] | None
    pretraining_metrics: Sequence[Mapping[str, Any]]
    """Both as far as they lie beside the checkpoint."""
    train: ImageSource
    test: ImageSource
    fit: NDArray[np.int64]
    """Training images that candidates are fitted on."""
    validation: NDArray[np.int64]
    """Training images that candidates are chosen on."""
    labelled: NDArray[np.int64]
    """Both, sorted: all training images whose labels may be looked at."""
    device: torch.device
    output: Path
    """Where the results go."""
    notes: tuple[str, ...]
    """What the reader of the results has to know."""

    @property
    def candidates(self) -> list[Candidate]:
        """Every learning rate with every weight decay."""
        return [Candidate(*pair) for pair in product(self.config.learning_rates, self.config.weight_decays)]

    def images(self, source: ImageSource) -> NDArray[np.int64]:
        """Return the indices of the images of a file that are measured on: of training images, the labelled ones."""
        return self.labelled if source is self.train else np.arange(source.facts.num_images, dtype=np.int64)

    @property
    def has_room_for_pixels(self) -> bool:
        """Whether all training images' pixels in float32 stay within what is held at once."""
        facts = self.train.facts
        return len(self.labelled) * facts.height * facts.width * 3 * 4 <= LARGEST_PIXEL_FEATURES


@contextlib.contextmanager
def open_probe(config: ProbeConfig) -> Iterator[Probe]:
    """Load the encoder, open the images, and say what is going to be done; the images are closed at the end.

    Raises:
        ValueError: If the run, the data and the configuration do not fit together; the message says what to do.
    """
    require_safe_loading()
    if config.parts is not None:
        parts.load(config.parts)
    device = choose_device(config)
    pretrained = load_pretrained(checkpoint_of(config), device)
    for side in config.image_sizes:
        pretrained.model.require_size(side)
    folder = pretrained.path.parent
    manifest, metrics = runlog.read_manifest(folder), runlog.read_metrics(folder)
    train_path, test_path = find_files(config, pretrained)
    with (
        open_images(train_path, backend=config.loader, device=device) as train,
        open_images(test_path, backend=config.loader, device=device) as test,
    ):
        notes = require_comparable(config, pretrained, train, test)
        if config.label_fraction < 1:
            fit, validation = few_labels(
                beton.check(train.path).labels,
                num_classes=train.facts.num_classes,
                fraction=config.label_fraction,
                seed=config.seed,
            )
            config = with_few_labels(config, len(fit))
        else:
            config = with_sizes(config, pretrained, train)
            assert config.num_validation is not None
            fit, validation = validation_split(train.facts.num_images, config.num_validation)
        probe = Probe(
            config=config,
            pretrained=pretrained,
            pretraining_manifest=manifest,
            pretraining_metrics=metrics,
            train=train,
            test=test,
            fit=fit,
            validation=validation,
            labelled=np.union1d(fit, validation),
            device=device,
            output=config.output or folder / default_output(config),
            notes=tuple(notes),
        )
        probe.output.mkdir(parents=True, exist_ok=True)
        say_start(probe)
        yield probe


def checkpoint_of(config: ProbeConfig) -> Path:
    """Return what is measured: with few labels the last checkpoint, since kNN with all labels chose the best one."""
    return config.run / LAST if config.label_fraction < 1 and config.run.is_dir() else config.run


def choose_device(config: ProbeConfig) -> torch.device:
    """Return the first GPU, or the CPU if there is none or accelerate is told so."""
    launch.require_known_requests()
    if (asked := launch.mixed_precision_asked_for()) not in {None, config.precision}:
        raise ValueError(
            f"accelerate is told mixed precision {asked}, but precision is {config.precision}; the probe takes it from "
            "--precision alone (fp32 or bf16)"
        )
    if torch.cuda.is_available() and not launch.cpu_is_asked_for():
        return torch.device("cuda")
    system.keep_freed_memory()
    return torch.device("cpu")


def default_output(config: ProbeConfig) -> str:
    """Return the name of the folder for this kind of evaluation."""
    is_augmented = config.mode == "linear" and config.features == "augmented"
    few = f"-labels-{config.label_fraction:g}" if config.label_fraction < 1 else ""
    return ("probe-linear-augmented" if is_augmented else f"probe-{config.mode}") + few


def find_files(config: ProbeConfig, pretrained: Pretrained) -> tuple[Path, Path]:
    """Return the files of the training and test images.

    Raises:
        ValueError: If one is not there; the message names the option.
    """
    train = config.train or pretrained.config.data
    if not train.exists():
        which = "" if config.train else f", the file that {pretrained.path} was pretrained on,"
        raise ValueError(f"{train}{which} is not there; name the training images with --train FILE.beton")
    test = config.test or train.with_name("test.beton")
    if not test.exists():
        raise ValueError(
            f"there are no test images at {test}; name them with --test FILE.beton, or convert them first "
            "(python -m data_prep --help)"
        )
    return train, test


def with_sizes(config: ProbeConfig, pretrained: Pretrained, train: ImageSource) -> ProbeConfig:
    """Return the settings with num_validation, knn_neighbours and batch_size that fit the number of training images.

    What is given stays. By default the validation images are those that the run measured kNN on.

    Raises:
        ValueError: If what is given does not fit; the message names all that must change, with values that work.
    """
    n = train.facts.num_images
    if n < 2:
        raise ValueError(f"{train.path} has 1 image, but one is needed to fit on and another one to choose on")
    usual = max(1, default_num_validation(n))
    as_before = pretrained.config.num_validation if n == pretrained.facts.num_images else None
    num_validation = config.num_validation or as_before or usual
    neighbours = config.knn_neighbours or min(20, max(1, n - num_validation))
    if num_validation + neighbours > n:
        given = {"--num-validation": num_validation, "--knn-neighbours": neighbours}
        fitting = {"--num-validation": usual, "--knn-neighbours": min(neighbours, n - usual)}
        changes = ", ".join(f"{name} {value}" for name, value in fitting.items() if value != given[name])
        raise ValueError(
            f"num_validation {num_validation} leaves {max(0, n - num_validation)} of the {n} images of {train.path}, "
            f"but {neighbours} neighbours are needed; use {changes}"
        )
    return dataclasses.replace(
        config,
        num_validation=num_validation,
        knn_neighbours=neighbours,
        batch_size=min(config.batch_size, n),
    )


def with_few_labels(config: ProbeConfig, num_fit: int) -> ProbeConfig:
    """Return the settings with knn_neighbours and batch_size that fit the number of labelled images.

    Raises:
        ValueError: If more neighbours are asked for than there are.
    """
    neighbours = config.knn_neighbours or min(20, num_fit)
    if neighbours > num_fit:
        raise ValueError(f"knn_neighbours is {neighbours}, but {num_fit} labelled images are fitted on; use {num_fit}")
    most = max(min(8, num_fit), num_fit // LEAST_STEPS)
    return dataclasses.replace(config, knn_neighbours=neighbours, batch_size=min(config.batch_size, most))


def require_comparable(config: ProbeConfig, pretrained: Pretrained, train: ImageSource, test: ImageSource) -> list[str]:
    """Compare training, test and pretraining images; return what the reader of the results has to know.

    Raises:
        ValueError: If nothing can be measured on these images: labels are missing or differ, sizes differ, test
            images are training images, or training images are others than pretrained on and were not named.
    """
    for source, option in ((train, "--train"), (test, "--test")):
        is_drawn_from = source is train and config.label_fraction < 1
        _require_measurable(source, pretrained.facts, option, all_labelled=not is_drawn_from)
    if train.facts.classes != test.facts.classes:
        raise ValueError(
            f"the classes differ: {train.path} has {list(train.facts.classes)}, {test.path} has "
            f"{list(test.facts.classes)}. Name files of one data set with --train and --test"
        )
    others = train.facts.differences(pretrained.facts)
    is_pretraining_file = not others
    if not is_pretraining_file and config.train is None:
        raise ValueError(
            f"{train.path} is not the file that was pretrained on: of what its sidecar says, {others} "
            "differs. If it is to be measured on nevertheless, name it with --train"
        )
    notes = _compare_test_with_training(train, test)
    if config.label_fraction < 1 and pretrained.path.name == BEST and pretrained.knn_accuracy is not None:
        notes.append(
            f"Few labels are used here, but this checkpoint was chosen by kNN accuracy with all labels; {LAST} was not."
        )
    if not is_pretraining_file:
        notes.append(
            f"Measured on another file than pretrained on ({train.facts.source!r}; pretraining: "
            f"{pretrained.facts.source!r}), normalised with pretraining's channel means and deviations."
        )
    return notes


def _require_measurable(source: ImageSource, before: Facts, option: str, *, all_labelled: bool) -> None:
    path, facts = source.path, source.facts
    if not facts.is_labelled and (all_labelled or not sum(facts.class_counts)):
        raise ValueError(
            f"{path} has {facts.num_images - sum(facts.class_counts):,} images without a label; accuracy needs "
            f"labels. Name a labelled file with {option}"
        )
    if facts.num_classes < 2:
        raise ValueError(
            f"{path} has one class only, {facts.classes[0]!r}, so that every answer is right. Name a file of "
            f"several classes with {option}"
        )
    if (facts.height, facts.width) != (before.height, before.width):
        raise ValueError(
            f"{path} holds images of {facts.height} x {facts.width} pixels, but the encoder was pretrained on "
            f"{before.height} x {before.width}. Convert them to that size, or name another file with {option}"
        )


def _compare_test_with_training(train: ImageSource, test: ImageSource) -> list[str]:
    """Refuse too many test images that are training images; return a note about few."""
    if train.facts.encoding != test.facts.encoding:
        return [
            f"Whether test images are training images was not compared: the ones are {test.facts.encoding}, "
            f"the others {train.facts.encoding}."
        ]
    trained_on, test_images = set(beton.image_digests(train.path)), beton.image_digests(test.path)
    equal = sum(image in trained_on for image in test_images)
    share = f"{equal:,} of the {len(test_images):,} test images ({100 * equal / len(test_images):.1f} %)"
    if equal > MOST_TRAINED_ON * len(test_images):
        raise ValueError(
            f"{share} in {test.path} are also training images in {train.path}, pixel by pixel; up to "
            f"{100 * MOST_TRAINED_ON:g} % are measured. Name other images with --test, or divide the images anew "
            "(python -m data_prep imagefolder --test-fraction 0.1)"
        )
    return [f"{share} are also training images, pixel by pixel."] if equal else []


def say_start(probe: Probe) -> None:
    """Print what is going to be done."""
    config, pretrained = probe.config, probe.pretrained
    print(f"encoder:    {pretrained.path} ({pretrained.config.model.encoder}, epoch {pretrained.epoch})")
    for name, source in (("train:", probe.train), ("test:", probe.test)):
        print(f"{name:<12}{source.path}, {source.facts.num_images:,} images ({source.reason})")
    few = f" of {probe.train.facts.num_images:,}" if config.label_fraction < 1 else ""
    print(
        f"choice:     {len(probe.labelled):,}{few} training images = {len(probe.fit):,} to fit "
        f"+ {len(probe.validation):,} to choose on"
    )
    if few:
        print(f"labels:     {100 * config.label_fraction:g} %, as many of each class, drawn by seed {config.seed}")
    print(f"kNN:        {config.knn_neighbours} neighbours; classifier: batches of {config.batch_size}")
    print(
        f"candidates: {len(config.learning_rates)} learning rates x {len(config.weight_decays)} weight decays = "
        f"{len(probe.candidates)}, {config.epochs} epochs each ({config.mode})"
    )
    print(f"device:     {probe.device} ({runlog.hardware()}), {config.precision}\noutput:     {probe.output}")
    if (probe.output / runlog.RESULT).exists():
        print("note:       replaces the earlier evaluation there")
    for note in probe.notes:
        print(f"note:       {note}")
    if config.baselines and not probe.has_room_for_pixels:
        print(f"note:       raw pixels are left out: they would take more than {LARGEST_PIXEL_FEATURES >> 30} GiB")
    print(flush=True)
