"""The command lines of pretraining (a preset, and settings that differ from it) and of the probe, and their help.

python train_simclr.py cifar10-simclr-100 --data data/cifar10/train.beton --seed 1
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

from simclr import help_pages, parts
from simclr.beton import BetonError, load_facts
from simclr.config import ProbeConfig, TrainConfig, from_json
from simclr.help_pages import Section
from simclr.presets import DEFAULT, PRESETS

_CENTRED = "was given up: Barlow Twins' features are always centred, as in the paper's text and code; leave it out"
_CHANGED_OPTIONS = {
    "--loss.nt-xent-form": "is now --nt-xent-form",
    "--loss.kernels": "is now --kernels",
    "--loss.barlow-twins-form": "was given up: there is one form; leave it out",
    "--loss.centre": _CENTRED,
    "--loss.no-centre": _CENTRED,
    "--optimizer.final-learning-rate": "was given up: the learning rate always falls to 0; leave it out",
}

_TRAIN_PAGES = (
    Section(
        "everyday",
        "Everyday options, as they are in this preset. What is on or off is shown as it is; --X turns --no-X around:",
        (
            *("name", "data", "output", "seed", "epochs", "global_batch_size", "loss.name", "loss.temperature"),
            *("model.encoder", "optimizer.name", "optimizer.base_learning_rate", "view_sizes", "num_validation"),
            *("precision", "speed.recompute", "world_size", "tracker"),
        ),
    ),
    Section("loss", "The objective.", ("loss",)),
    Section(
        "model",
        "Encoder and projector, batch normalisation, number format.",
        ("model", "global_batch_norm", "batch_norm_per_view", "precision"),
    ),
    Section("optimizer", "Optimizer and learning rate.", ("epochs", "global_batch_size", "optimizer", "on_nonfinite")),
    Section(
        "views",
        "The two random views of each image.",
        ("view_sizes", "augmentation", "view_1", "view_2"),
        twins=("view_1", "view_2"),
    ),
    Section(
        "speed",
        "How fast, and in how much memory. None of these changes a result by more than rounding.",
        ("speed",),
    ),
    Section("measure", "What is measured on the way, and where it goes.", (
        *("num_validation", "knn_every_epochs", "log_every_steps", "tracker", "tracker_project"),
    )),
    Section("run", "The run, its folder, going on, several processes.", (
        *("name", "data", "output", "seed", "resume", "allow_changed", "checkpoint_every_epochs"),
        *("checkpoint_every_steps", "keep_checkpoints", "stop_at_step", "world_size", "timeout_seconds", "parts"),
    )),
)  # fmt: skip
_PROBE_PAGES = (
    Section(
        "everyday",
        "Everyday options. What is on or off is shown as it is; --X turns --no-X around:",
        ("run", "mode", "label_fraction", "train", "test", "image_sizes", "output", "baselines", "pdf", "seed"),
    ),
    Section("images", "What is measured, and where the report goes.", (
        *("run", "train", "test", "output", "num_validation", "label_fraction", "image_sizes", "loader", "parts"),
        "seed",
    )),
    Section("classifier", "The classifier on top, and the encoder under it.", (
        *("mode", "features", "epochs", "batch_size", "learning_rates", "weight_decays", "momentum", "precision"),
    )),
    Section("neighbours", "k nearest neighbours.", ("knn_neighbours", "knn_temperature")),
    Section("views", "Views for --features augmented and --mode finetune.", ("view",)),
    Section("report", "What the report has.", ("baselines", "map_points", "pdf")),
)  # fmt: skip


def parse_probe_config(arguments: Sequence[str] | None = None, description: str | None = None) -> ProbeConfig:
    """Read the options of linear_probe.py, by default from the command line; help and errors end the program."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if (section := help_pages.asked_for(words)) is not None:
        _show_help("python linear_probe.py --run RUN", ProbeConfig, _PROBE_PAGES, section, description or "")
    return tyro.cli(ProbeConfig, args=words, description=description)


def parse_train_config(arguments: Sequence[str] | None = None, description: str | None = None) -> TrainConfig:
    """Read ``[PRESET | --config FILE] [--field value ...]``, by default from the command line.

    FILE is what a run has written as config.json. Without either, :data:`simclr.presets.DEFAULT` is meant. Unknown
    presets, fields and values end the program, with a message. Where the data file has too few images for the preset's
    batch, and none is asked for, a smaller one is taken, aloud.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        own, _ = _value_of("--parts", words)
        if own not in (None, "None"):
            parts.load(own)  # before names are read that it makes known
        file, words = _value_of("--config", words)
        start = None if file is None else _read_config(Path(file))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if (section := help_pages.asked_for(words)) is not None:
        _show_train_help(words, section, description or "", start)
    if start is not None:
        return tyro.cli(TrainConfig, default=start, args=words, description=description)
    if not words or words[0].startswith("-"):
        words = [DEFAULT, *words]
    options = {word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for option in sorted(options & _CHANGED_OPTIONS.keys()):
        print(f"{option} {_CHANGED_OPTIONS[option]}", file=sys.stderr)
        sys.exit(2)
    choices = {
        name: (f"{preset.source}. Result: {preset.expected}.", preset.config) for name, preset in PRESETS.items()
    }
    config: TrainConfig = tyro.extras.overridable_config_cli(choices, args=words, description=description)
    return config if "--global-batch-size" in options else _fit_batch(config)


_NO_SETTINGS = (
    ("--dry-run", "Say all that is derived, and what time, memory and disk the run takes. Writes nothing."),
    ("--config FILE", "In place of a preset: the config.json of another run. Options override it."),
)


def _show_train_help(words: Sequence[str], section: str, description: str, start: TrainConfig | None) -> NoReturn:
    program = "python train_simclr.py"
    if start is not None:
        _show_help(f"{program} --config FILE", start, _TRAIN_PAGES, section)
    if words[0] in PRESETS:
        preset = PRESETS[words[0]]
        about = f"Source: {preset.source}.\n\nResult: {preset.expected}."
        _show_help(f"{program} {words[0]}", preset.config, _TRAIN_PAGES, section, about, _NO_SETTINGS)
    if section:
        _show_help(f"{program} {DEFAULT}", PRESETS[DEFAULT].config, _TRAIN_PAGES, section)
    pages = ", ".join([*(page.name for page in _TRAIN_PAGES[1:]), help_pages.ALL])
    print(f"usage: {program} PRESET [options]\n\n{help_pages.paragraphs(description)}\n")
    print(f"Presets, and what they reach ({DEFAULT}, if none is named):")
    print(help_pages.table([(name, preset.expected) for name, preset in PRESETS.items()]))
    print("\nOptions:")
    print(
        help_pages.table(
            [
                ("PRESET --help", "The everyday options of a preset, with its values."),
                ("PRESET --help PAGE", f"Others: {pages}."),
                *_NO_SETTINGS,
            ]
        )
    )
    sys.exit(0)


def _show_help(
    command: str,
    config: Any,
    pages: Sequence[Section],
    section: str,
    about: str = "",
    more: Sequence[tuple[str, str]] = (),
) -> NoReturn:
    try:
        print(help_pages.page(command, config, pages, section, about=about, more=more))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _value_of(option: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of an option, None where it is not given, and the other words. Raises ValueError without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(option)
    try:
        found, others = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(f"{option} takes a file") from error
    value: str | None = getattr(found, option[2:])
    return value, others


def _read_config(path: Path) -> TrainConfig:
    try:
        return from_json(TrainConfig, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: {error}; name the config.json of a run of this version") from error


def _fit_batch(config: TrainConfig) -> TrainConfig:
    """Take a batch that fits the images, and say so."""
    try:
        num_images = load_facts(config.data).num_images
    except BetonError:
        return config  # which training refuses, saying more
    if config.global_batch_size <= num_images:
        return config
    fitting = 1 << max(1, (num_images // 2).bit_length() - 1)  # at most half of the images: two steps an epoch
    if os.environ.get("RANK", "0") == "0":
        print(
            f"batch:      {fitting} instead of the preset's {config.global_batch_size}, since {config.data} has "
            f"{num_images} images; the learning rate follows, see below (--global-batch-size sets another)",
            flush=True,
        )
    return dataclasses.replace(config, global_batch_size=fitting)
