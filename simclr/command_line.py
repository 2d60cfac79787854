"""The command line of pretraining: a preset, and settings that differ from it.

python train_simclr.py cifar10-simclr-100 --data data/cifar10/train.beton --seed 1
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

import tyro

from simclr import parts
from simclr.beton import BetonError, load_facts
from simclr.config import TrainConfig
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


def parse_train_config(
    arguments: Sequence[str] | None = None, description: str | None = None, start: TrainConfig | None = None
) -> TrainConfig:
    """Read ``[PRESET] [--field value ...]``, by default from the command line; with ``start``, no preset but that.

    Without either, :data:`simclr.presets.DEFAULT` is meant. Unknown presets, fields and values end the program, with
    a message. Where the data file has too few images for the preset's batch, and none is asked for, a smaller one is
    taken, aloud.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if start is not None:
        return tyro.cli(TrainConfig, default=start, args=words, description=description)
    if not words or (words[0].startswith("-") and words[0] not in {"-h", "--help"}):
        words = [DEFAULT, *words]
    options = {word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for option in sorted(options & _CHANGED_OPTIONS.keys()):
        print(f"{option} {_CHANGED_OPTIONS[option]}", file=sys.stderr)
        sys.exit(2)
    try:
        _load_parts(words)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    choices = {
        name: (f"{preset.source}. Result: {preset.expected}.", preset.config) for name, preset in PRESETS.items()
    }
    config: TrainConfig = tyro.extras.overridable_config_cli(choices, args=words, description=description)
    return config if "--global-batch-size" in options else _fit_batch(config)


def _load_parts(words: Sequence[str]) -> None:
    """Execute the file of ``--parts``, so that the names in the other options are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--parts")
    try:
        path = parser.parse_known_args(words)[0].parts
    except argparse.ArgumentError:
        return  # --parts without a file, which is refused by what reads all options
    if path not in (None, "None"):
        parts.load(path)


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
