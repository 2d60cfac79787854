"""Checkpoints: written atomically, loaded strictly and without executing anything in them.

Two files in a run's folder, of one format:

    checkpoint_last.pt      everything needed to continue (also optimizer and gradient scaler)
    simclr_best_epoch.pt    the model of the epoch with the best validation kNN accuracy

No random-number state is saved because none is used: order and views are functions of the seed and the step.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simclr.beton import Facts
from simclr.config import TrainConfig, from_json
from simclr.models import SimCLR

SCHEMA = 1
LAST = "checkpoint_last.pt"
BEST = "simclr_best_epoch.pt"
_MODEL_KEYS = {"schema", "kind", "model", "config", "facts", "step", "epoch", "knn_accuracy", "best_knn_accuracy"}
_RESUME_KEYS = _MODEL_KEYS | {"optimizer", "scaler", "world_size"}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not what was asked for."""


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model and what is known about it."""

    model: SimCLR
    """In eval mode."""
    config: TrainConfig
    facts: Facts
    """Of the images it was pretrained on."""
    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epochs finished."""
    knn_accuracy: float | None
    """Validation kNN accuracy in percent, if it was measured."""
    path: Path


def save_atomically(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` so that ``path`` is at every moment either the old file or the whole new one.

    Args:
        path: Where to. Its folder must exist.
        payload: Tensors, numbers, strings, and dicts and lists of them, so that loading needs no code.

    Raises:
        CheckpointError: If the disk is full or the folder cannot be written; the old file stays.
        TypeError: If the payload holds anything else, which :func:`load_safely` would refuse.
    """
    _require_plain(payload, "payload")
    # A name of its own, so that two programs that write at once cannot mix their bytes.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        for left_behind in path.parent.glob(f".{path.name}.*.tmp"):  # by a program killed while it wrote
            left_behind.unlink()
        with temporary.open("xb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError about file positions
        raise CheckpointError(
            f"cannot write {path}: {error}; is the disk full or read-only? The old file stays"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_safely(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_atomically`, on the CPU, executing nothing.

    Raises:
        CheckpointError: If it is missing, damaged, holds anything but plain data, or has another schema.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        _check_archive(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise half a dozen kinds for damaged files
        raise CheckpointError(f"{path} is damaged or no checkpoint of this project: {error}") from error
    if not isinstance(payload, dict) or payload.get("schema") != SCHEMA:
        found = payload.get("schema") if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(f"{path} has schema {found!r}, this version reads {SCHEMA}")
    return payload


def save_resumable(path: Path, *, optimizer: torch.optim.Optimizer, scaler: Any, world_size: int, **model: Any) -> None:
    """Write everything needed to continue. ``model``: what :func:`model_payload` takes."""
    save_atomically(
        path,
        model_payload(**model)
        | {
            "kind": "resumable",
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "world_size": world_size,
        },
    )


def model_payload(
    *,
    model: nn.Module,
    config: str,
    facts: str,
    step: int,
    epoch: int,
    knn_accuracy: float | None,
    best_knn_accuracy: float | None,
) -> dict[str, Any]:
    """Return the contents of ``simclr_best_epoch.pt``; ``config`` and ``facts`` are JSON text."""
    return {
        "schema": SCHEMA,
        "kind": "model",
        "model": model.state_dict(),
        "config": config,
        "facts": facts,
        "step": step,
        "epoch": epoch,
        "knn_accuracy": knn_accuracy,
        "best_knn_accuracy": best_knn_accuracy,
    }


def load_resumable(path: Path) -> dict[str, Any]:
    """Read ``checkpoint_last.pt``. Raises CheckpointError as :func:`load_safely`, or if it cannot be continued."""
    payload = load_safely(path)
    if set(payload) != _RESUME_KEYS:
        raise CheckpointError(f"{path} cannot be continued from: {_difference(set(payload), _RESUME_KEYS)}")
    return payload


def load_pretrained(path: Path, device: torch.device | str = "cpu") -> Pretrained:
    """Load a pretrained model, every weight and buffer of it.

    Args:
        path: A checkpoint, or a run's folder, which stands for its ``simclr_best_epoch.pt``.
        device: Where the model goes.

    Raises:
        CheckpointError: If there is none, it is damaged, or its weights do not fit its configuration exactly.
    """
    if path.is_dir():
        if not (path / BEST).is_file():
            raise CheckpointError(
                f"{path} holds no {BEST}; pretraining writes it when it measures kNN accuracy and at its end. "
                f"To use an unfinished run, name its {LAST}"
            )
        path = path / BEST
    payload = load_safely(path)
    missing = _MODEL_KEYS - set(payload)
    if missing:
        raise CheckpointError(f"{path} is no pretrained model: it lacks {sorted(missing)}")
    try:
        config = from_json(TrainConfig, payload["config"])
        facts = from_json(Facts, payload["facts"])
        model = SimCLR(config.model, image_size=facts.height)
        model.load_state_dict(payload["model"], strict=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version of the code: {error}") from error
    return Pretrained(
        model=model.to(device).eval(),
        config=config,
        facts=facts,
        step=payload["step"],
        epoch=payload["epoch"],
        knn_accuracy=payload["knn_accuracy"],
        path=path,
    )


def _difference(found: set[str], expected: set[str]) -> str:
    return f"it lacks {sorted(expected - found)} and has besides {sorted(map(str, found - expected))}"


def _check_archive(path: Path) -> None:
    """Raise if a bit of the contents has changed; torch.load does not look at the zip archive's checksums."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of its part {damaged} is wrong")
        for part in archive.infolist():
            # What torch takes for a folder it does not read at all, and returns memory as it finds it.
            if part.external_attr or part.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"its part {part.filename} is not as torch writes it")


def _require_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _require_plain(key, f"a key of {where}")
            _require_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, entry in enumerate(value):
            _require_plain(entry, f"{where}[{i}]")
    # By type, since numpy's float64 is a float
    elif not isinstance(value, torch.Tensor) and type(value) not in (type(None), bool, int, float, str):
        raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold; convert it before")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable (POSIX; Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
