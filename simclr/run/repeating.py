"""A run repeated from another's manifest: its settings, and what may make the numbers differ nevertheless."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simclr.beton import BetonError, Facts, load_facts
from simclr.config import TrainConfig, from_values, settings_of
from simclr.run import runlog

_PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def take_option(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the run that ``--repeat RUN`` names, if it is there, and the other words of a command line.

    Raises:
        ValueError: If it stands without a run, or twice.
    """
    others: list[str] = []
    sources: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name == "--repeat":
            sources.append(value if equals else next(left, ""))
        else:
            others.append(word)
    if len(sources) > 1 or any(not source or source.startswith("--") for source in sources):
        raise ValueError("--repeat takes one run: its folder, or its manifest.json")
    return (Path(sources[0]), others) if sources else (None, others)


def config_to_repeat(source: Path) -> TrainConfig:
    """Return the configuration that repeats a run, into a folder of its own (its name ends with "-repeat").

    The number format is the one that the run used, where it chose that by the hardware.

    Args:
        source: The run's folder, or its manifest.json.

    Raises:
        ValueError: If there is no manifest; if it does not tell all settings, or tells unknown ones; if the run went on
            with changed settings, so that its last ones do not make it.
    """
    path, manifest = _read(source)
    if "config" not in manifest or "facts" not in manifest:
        raise ValueError(f"{path} tells no settings to repeat; name the folder of a run, or its {runlog.MANIFEST}")
    try:
        config = from_values(TrainConfig, manifest["config"])
    except ValueError as error:
        raise ValueError(f"{path} cannot be repeated by this version: {error}") from error
    commands = [session.get("environment", {}).get("command", "") for session in manifest.get("sessions", [])]
    if config.allow_changed or any("--allow-changed" in command for command in commands):
        raise ValueError(
            f"the run of {path} went on with changed settings (--allow-changed), so its last ones alone do not repeat "
            f"it: repeat its commands, {'; '.join(dict.fromkeys(commands))}"
        )
    precision = config.precision
    if precision == "auto":
        precision = _PRECISIONS[manifest.get("mixed_precision", "no")]  # type: ignore[assignment]
    return dataclasses.replace(
        config,
        name=f"{config.name}-repeat",
        precision=precision,
        # What concerns the sessions of that run, and not its numbers
        output=None,
        resume="auto",
        stop_at_step=None,
        # The numbers depend on how many devices there are only if each normalises its own share
        world_size=None if config.global_batch_norm else manifest.get("derived", {}).get("world_size"),
        tracker="none",
    )


def require_same_images(source: Path, config: TrainConfig) -> None:
    """Refuse images other than those of the run that is repeated.

    Raises:
        ValueError: If the data file is not there, or holds other images; the message says which are needed.
    """
    path, manifest = _read(source)
    facts = from_values(Facts, manifest["facts"])
    wanted = (
        f"{path} tells of {facts.num_images:,} images ({facts.source}) with content sha256 "
        f"{facts.content_sha256[:12]}...; name their file with --data"
    )
    try:
        found = load_facts(config.data)
    except BetonError as error:
        raise ValueError(f"{error}. {wanted}") from error
    if found.content_sha256 != facts.content_sha256:
        raise ValueError(f"{config.data} holds other images (sha256 {found.content_sha256[:12]}...). {wanted}")


def differences(source: Path, config: TrainConfig) -> list[str]:
    """Return what is not as it was in the run that is repeated, and may change its numbers; settings as asked for."""
    _, manifest = _read(source)
    before, now = manifest.get("environment", {}), runlog.environment()
    found = [
        f"{name} was {before[name]} and is {now[name]}"
        for name in ("commit", "hardware", "python")
        if name in before and before[name] != now[name]
    ]
    versions: Mapping[str, str] = before.get("versions", {})
    found += [
        f"{name} was {version} and is {now['versions'].get(name, 'missing')}"
        for name, version in versions.items()
        if now["versions"].get(name) != version
    ]
    old, new = settings_of(config_to_repeat(source)), settings_of(config)
    return found + [
        f"{name} was {value} and is {new[name]}"
        for name, value in old.items()
        if value != new[name] and name not in {"name", "data", "output"}
    ]


def say_differences(source: Path, config: TrainConfig) -> None:
    """Print what :func:`differences` finds, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        found = differences(source, config)
        rest = f", but for what may change its numbers: {'; '.join(found)}" if found else ", in all that is known"
        print(f"repeat:     {source}{rest}", flush=True)


def _read(source: Path) -> tuple[Path, dict[str, Any]]:
    path = source / runlog.MANIFEST if source.is_dir() else source
    if path.name != runlog.MANIFEST:
        raise ValueError(f"{source} is no run to repeat; name a run's folder, or its {runlog.MANIFEST}")
    manifest = runlog.read_manifest(path.parent)
    if manifest is None:
        raise ValueError(f"there is no {path} to repeat a run from; name a run's folder, or its {runlog.MANIFEST}")
    return path, manifest
