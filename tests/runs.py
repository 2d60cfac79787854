"""Runs in this process or in others, and what they have left in their folders, for tests to compare."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_simclr
from data_prep.convert import Storage, convert
from data_prep.shapes import shapes
from simclr.config import TrainConfig
from simclr.models import ModelConfig
from simclr.run import checkpoint
from simclr.run.interruption import Signals
from simclr.run.runlog import read_metrics
from tests.helpers import forget_accelerate_state, run_distributed

SMALL = ModelConfig(encoder="small_resnet_w8", projector_hidden=16, projection_dim=8)


def write_shapes(path: Path, number: int, split: str = "train", *, seed: int = 0) -> Path:
    """Write some of the drawn images of data_prep.shapes; return the path."""
    convert(shapes(seed, split, number), path, Storage())
    return path


def train_here(config: TrainConfig) -> Path:
    """Pretrain on one device in this process."""
    try:
        return train_simclr.main(config)
    finally:
        forget_accelerate_state()


def type_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Do in this process what ``python train_simclr.py WORDS`` does; errors of the user raise SystemExit."""
    monkeypatch.setattr(sys, "argv", ["train_simclr.py", *map(str, words)])
    monkeypatch.setattr(Signals, "install", lambda self: None)
    try:
        train_simclr.cli()
    finally:
        forget_accelerate_state()


def train_on(world_size: int, pretrain: Callable[[int, int, TrainConfig], None], config: TrainConfig) -> None:
    """Let each rank call ``pretrain(rank, world_size, config)``: one in this process, several in others."""
    if world_size > 1:
        run_distributed(pretrain, world_size, config)
        return
    try:
        pretrain(0, 1, config)
    finally:
        forget_accelerate_state()


def weights(config: TrainConfig, name: str = checkpoint.LAST) -> dict[str, Tensor]:
    model: dict[str, Tensor] = checkpoint.load_safely(config.folder / name)["model"]
    return model


def is_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    """Metrics without what the clock says."""
    return [
        {key: value for key, value in line.items() if key not in {"seconds", "images_per_second"}}
        for line in read_metrics(config.folder)
    ]
