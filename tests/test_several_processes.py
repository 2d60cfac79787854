"""Whole runs on 2, 3 and 4 processes are the run on one, whoever averages the gradients; and what a step sends."""

from __future__ import annotations

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import train_simclr
from benchmarks.common import write_noise
from simclr.config import LossConfig, OptimizerConfig, SpeedConfig, TrainConfig
from simclr.presets import PRESETS
from simclr.run import opening
from simclr.run.interruption import Signals
from simclr.run.launch import DifferentRunsError
from simclr.run.peers import START_SECONDS, Peers
from simclr.run.runlog import read_metrics
from tests.helpers import ROOT, run_distributed
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


# What a step sends


def messages_of_a_step(rank: int, world_size: int, name: str, data: Path, output: Path) -> dict[str, int]:
    """Count a step's collectives, of every kind and whoever starts them, where the step averages gradients itself."""
    config = dataclasses.replace(
        PRESETS[name].config,
        data=data,
        output=output,
        global_batch_size=4,
        view_sizes=(),
        num_validation=0,
        knn_every_epochs=0,
        precision="fp32",
        speed=SpeedConfig(loader="memory", nt_xent_form="matrix"),  # as on GPUs at these presets' batches
    )
    choose = opening.way_of_steps
    averages_itself()
    try:
        with (
            Peers(timeout_seconds=60, signals=Signals()) as peers,
            opening.open_run(config, peers, train_simclr.update, is_dry=True) as run,
        ):
            run.model.train()
            batches = train_simclr.batches(run, 0, 0)
            train_simclr.train_step(run, next(batches))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                train_simclr.train_step(run, next(batches))
    finally:
        opening.way_of_steps = choose
    return collections.Counter(str(event.name) for event in profile.events() if event.name.startswith("c10d::"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["cifar10-simclr-100", "fast-simclr", "fast-barlow", "cifar10-barlow-100"])
def test_a_step_sends_as_many_messages_as_the_table_says(name: str, tmp_path: Path) -> None:
    row = re.search(rf"^\| `{name}` \|.*\| (\d+) \|$", (ROOT / "docs" / "scaling.md").read_text(), re.MULTILINE)
    assert row is not None
    write_noise(tmp_path / "noise.beton", 8)
    for found in run_distributed(messages_of_a_step, 2, name, tmp_path / "noise.beton", tmp_path / "run"):
        assert sum(found.values()) == int(row[1]), found


# Ranks stay equal


def pretrain_and_err_on_rank_1(rank: int, world_size: int, config: TrainConfig) -> str:
    """Rank 1's memory errs in the last digit of one weight, in the second epoch."""
    step = train_simclr.train_step

    def erring(run: Any, batch: Any) -> Any:
        found = step(run, batch)
        if rank == 1 and run.progress.step == 2:
            weight = next(run.plain_model.encoder.parameters()).data
            weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.full_like(weight[0, 0, 0, 0], 10.0))
        return found

    train_simclr.train_step = erring
    try:
        train_simclr.main(config)
    except DifferentRunsError as error:
        return str(error)
    finally:
        train_simclr.train_step = step
    return "trained"


@pytest.mark.distributed
def test_a_rank_with_other_weights_is_named_and_the_last_good_checkpoint_stays(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", {})
    for message in run_distributed(pretrain_and_err_on_rank_1, 3, config):
        assert re.search(r"after step 4 rank 1 holds other weights than rank 0: encoder\.\S+ differs", message), message
    good = settings(images, tmp_path / "good", {"stop_at_step": 2})
    train_on(1, pretrain, good)
    for name, value in weights(good).items():
        torch.testing.assert_close(weights(config)[name], value, rtol=1e-11, atol=1e-12)


def test_the_first_step_of_each_size_of_view_has_the_time_of_a_start(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    step = train_simclr.train_step

    def noting(run: Any, batch: Any) -> Any:
        limits.append(run.peers._limit)
        return step(run, batch)

    monkeypatch.setattr(train_simclr, "train_step", noting)
    changes = {"epochs": 4, "view_sizes": ((16, 0.5),), "timeout_seconds": 77.0}
    train_on(1, pretrain, settings(images, tmp_path / "run", changes))
    assert limits == [START_SECONDS, 77, 77, 77, START_SECONDS, 77, 77, 77]
