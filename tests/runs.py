"""What a finished or interrupted run has left in its folder, for tests to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simclr.config import TrainConfig
from simclr.run import checkpoint
from simclr.run.runlog import read_metrics


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
