"""Whole runs on 2, 3 and 4 processes are the run on one, whoever averages the gradients; and what a step sends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import train_simclr
from simclr.config import LossConfig, OptimizerConfig, SpeedConfig, TrainConfig
from simclr.run import opening
from simclr.run.runlog import read_metrics
from tests.runs import SMALL, train_on, weights, write_shapes

BARLOW: dict[str, Any] = {
    "loss": LossConfig(name="barlow_twins", scale=0.1),
    "model": dataclasses.replace(SMALL, projector="barlow3"),
}
CASES: dict[str, dict[str, Any]] = {
    "simclr, views together, sgd": {},
    "simclr, each view by itself, muon": {
        "batch_norm_per_view": True,
        "optimizer": OptimizerConfig(name="muon", base_learning_rate=0.1, weight_decay=0.01),
    },
    "barlow, each view by itself, lars": {
        **BARLOW,
        "batch_norm_per_view": True,
        "optimizer": OptimizerConfig(name="lars", base_learning_rate=0.5, lars_trust_coefficient=0.02),
    },
    "barlow, views together, adamw": {**BARLOW, "optimizer": OptimizerConfig(name="adamw", base_learning_rate=0.05)},
}
WAYS = [(2, True), (2, False), (3, True), (4, False)]


def averages_itself() -> None:
    """Let the steps of this process average gradients themselves, as where they are captured."""
    choose = opening.way_of_steps
    opening.way_of_steps = lambda *arguments: choose(*arguments)._replace(averages_gradients=True)


def pretrain(rank: int, world_size: int, config: TrainConfig) -> None:
    train_simclr.main(config)


def pretrain_averaging(rank: int, world_size: int, config: TrainConfig) -> None:
    choose = opening.way_of_steps
    averages_itself()
    try:
        train_simclr.main(config)
    finally:
        opening.way_of_steps = choose


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("images") / "train.beton", 24)


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """Each case on one process."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {name: settings(images, folder / str(i), changes) for i, (name, changes) in enumerate(CASES.items())}
    for config in runs.values():
        train_on(1, pretrain, config)
    return runs


def settings(images: Path, output: Path, changes: dict[str, Any]) -> TrainConfig:
    """Four steps of 12 images, in 2 epochs, in float64."""
    defaults: dict[str, Any] = {
        "data": images,
        "output": output,
        "epochs": 2,
        "global_batch_size": 12,
        "model": SMALL,
        "optimizer": OptimizerConfig(base_learning_rate=0.1),
        "precision": "fp64",
        "num_validation": 4,
        "knn_every_epochs": 0,
        "log_every_steps": 1,
        "speed": SpeedConfig(loader="memory"),
    }
    return TrainConfig(**{**defaults, **changes})


def require_equal(found: TrainConfig, expected: TrainConfig) -> None:
    losses = [
        [line["loss"] for line in read_metrics(run.folder) if line["kind"] == "step"] for run in (found, expected)
    ]
    assert len(losses[1]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, value in weights(expected).items():  # and running statistics
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-11, atol=1e-12)


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "in_step"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_is_one(
    name: str, world_size: int, in_step: bool, images: Path, alone: dict[str, TrainConfig], tmp_path: Path
) -> None:
    config = settings(images, tmp_path / "run", CASES[name])
    train_on(world_size, pretrain_averaging if in_step else pretrain, config)
    require_equal(config, alone[name])


@pytest.mark.distributed
def test_a_run_goes_on_with_two_then_three_processes_then_one(
    images: Path, alone: dict[str, TrainConfig], tmp_path: Path
) -> None:
    name = "simclr, each view by itself, muon"
    config = settings(images, tmp_path / "run", CASES[name])
    for world_size, stop in ((2, 1), (3, 3), (1, None)):
        train_on(world_size, pretrain, dataclasses.replace(config, stop_at_step=stop))
    require_equal(config, alone[name])
