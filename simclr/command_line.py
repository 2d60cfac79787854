"""The command lines of pretraining (a preset, and settings that differ from it) and of the probe, and their help.

python train_simclr.py cifar10-simclr-100 --data data/cifar10/train.beton --seed 1
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from simclr import parts
from simclr.beton import BetonError, load_facts
from simclr.config import ProbeConfig, TrainConfig, from_json
from simclr.presets import DEFAULT, PRESETS

Config = TypeVar("Config")

_EVERYDAY = (
    *("name", "data", "output", "seed", "epochs", "global_batch_size", "view_sizes", "num_validation", "precision"),
    *("world_size", "tracker", "loss.name", "loss.temperature", "model.encoder", "optimizer.name"),
    "optimizer.base_learning_rate",
)
_EVERYDAY_OF_PROBE = (
    *("run", "mode", "label_fraction", "train", "test", "image_sizes", "output", "baselines", "pdf", "seed"),
)
_DRY_RUN = "--dry-run says all that is derived, and what time, memory and disk a run takes; it writes nothing."
_HELP = ("--help", "-h")
_SUPPRESS: Any = tyro.conf.Suppress


def parse_probe_config(arguments: Sequence[str] | None = None, description: str = "") -> ProbeConfig:
    """Read the options of linear_probe.py, by default from the command line; help and errors end the program."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return _read(ProbeConfig, words, _EVERYDAY_OF_PROBE, description)


def parse_train_config(arguments: Sequence[str] | None = None, description: str = "") -> TrainConfig:
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
    program = "train_simclr.py"
    if start is not None:
        about = f"With the settings of {file}. {_DRY_RUN}"
        return _read(TrainConfig, words, _EVERYDAY, about, start, f"{program} --config {file}")
    if words and words[0] in _HELP and "all" not in words:
        about = f"{description}\n\nPRESET --help shows options. Without a preset, {DEFAULT} is meant."
        choices = {name: (f"Result: {preset.expected}.", preset.config) for name, preset in PRESETS.items()}
        tyro.extras.overridable_config_cli(choices, args=["--help"], description=about, prog=program)
    name = words.pop(0) if words and not words[0].startswith("-") else DEFAULT
    if name not in PRESETS:
        print(f"there is no preset {name}; there are {', '.join(PRESETS)}", file=sys.stderr)
        sys.exit(2)
    preset = PRESETS[name]
    about = f"Source: {preset.source}.\n\nResult: {preset.expected}.\n\n{_DRY_RUN}"
    config = _read(TrainConfig, words, _EVERYDAY, about, preset.config, f"{program} {name}")
    options = {word.split("=")[0].replace("_", "-") for word in words}
    return config if "--global-batch-size" in options else _fit_batch(config)


def _read(
    kind: type[Config],
    words: Sequence[str],
    everyday: Collection[str],
    about: str,
    default: Any = tyro.MISSING_NONPROP,
    program: str | None = None,
) -> Config:
    """Read options by tyro. ``--help`` shows the everyday ones, ``--help all`` all of them."""
    asked = next((i for i, word in enumerate(words) if word in _HELP), None)
    if asked is not None and list(words[asked + 1 : asked + 2]) != ["all"]:
        kind, default = _only(everyday, kind, default)
        about += "\n\nThese are the everyday options. --help all shows all of them."
    config: Config = tyro.cli(kind, default=default, args=words, prog=program, description=about)
    return config


def _only(names: Collection[str], kind: Any, default: Any) -> tuple[Any, Any]:
    """Return a dataclass, and a value of it, of which help shows some fields alone: tyro hides none that it reads."""
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {} if default is tyro.MISSING_NONPROP else dict(vars(default))
    for name, hint in hints.items():
        below = [path.removeprefix(f"{name}.") for path in names if path.startswith(f"{name}.")]
        if below:
            hints[name], values[name] = _only(below, hint, values[name])
        elif name not in names:
            hints[name] = _SUPPRESS[hint]
    shown = type(kind.__name__, (kind,), {"__annotations__": hints, "__doc__": kind.__doc__})
    return shown, shown(**values) if values else default


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
