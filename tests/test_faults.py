"""What a run survives, and what it notices: kills, signals, stopped ranks, NaN, full memory. On real processes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_simclr
from data_prep.convert import Storage, convert
from data_prep.shapes import shapes
from simclr import checkpoint, memory, peers, runlog
from simclr.config import OptimizerConfig, TrainConfig
from simclr.evaluation import DivergedError
from simclr.interruption import EXIT_SAVED, SIGNALS
from simclr.models import ModelConfig
from simclr.optim import make_optimizer
from simclr.runlog import read_metrics
from tests.helpers import forget_accelerate_state
from tests.ranks import Ranks, ranks

BATCH = 24  # of 100 images: 4 steps an epoch
STEPS = 4
EPOCHS = 8
KILLS = int(os.environ.get("CHAOS_KILLS", "20"))
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "train.beton"
    convert(shapes(0, "train", 100), path, Storage())
    return path


def settings(images: Path, output: Path, **changes: Any) -> TrainConfig:
    """A small run in float64 that saves every third step and after each epoch."""
    defaults: dict[str, Any] = {
        "data": images,
        "output": output,
        "epochs": EPOCHS,
        "global_batch_size": BATCH,
        "model": ModelConfig(encoder="small_resnet_w4", projector_hidden=16, projection_dim=8),
        "optimizer": OptimizerConfig(base_learning_rate=2.0, warmup_epochs=1),
        "precision": "fp64",
        "num_validation": 30,
        "knn_every_epochs": 2,
        "checkpoint_every_steps": 3,
        "log_every_steps": 1,
        "loader": "memory",
    }
    return TrainConfig(**{**defaults, **changes})


def finish(config: TrainConfig, world_size: int, logs: Path) -> None:
    with ranks(config, world_size, logs) as running:
        assert running.wait() == [0] * world_size, running.output(0)


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


def status(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.folder / runlog.STATUS).read_text())
    return found


def steps_logged(config: TrainConfig) -> int:
    """Lines of metrics that have been written so far."""
    path = config.folder / runlog.METRICS
    return path.read_bytes().count(b'"kind": "step"') if path.exists() else 0


def metrics_file(config: TrainConfig) -> int:
    """Which file it is: a run that begins or continues writes it anew."""
    path = config.folder / runlog.METRICS
    return path.stat().st_ino if path.exists() else 0


def wait_for_step(running: Ranks, config: TrainConfig, step: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while steps_logged(config) < step:
        assert time.monotonic() < deadline, running.output(0)
        assert running.is_alive(), running.output(0)
        time.sleep(0.002)


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Number of ranks, and a whole run on them."""
    world_size: int = request.param
    folder = tmp_path_factory.mktemp("whole")
    config = settings(images, folder / "run")
    finish(config, world_size, folder / "logs")
    return world_size, config


# ------------------------------------------------------------------------------------------ killed anywhere


def slow_disk(rank: int) -> None:
    """Each time the disk is asked to be done, it takes longer, so that many kills fall into a save."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.03)
        fsync(descriptor)

    os.fsync = slow


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_killed_anywhere_and_started_again_gives_the_same_weights_and_metrics(
    uninterrupted: tuple[int, TrainConfig], tmp_path: Path
) -> None:
    world_size, whole = uninterrupted
    config = dataclasses.replace(whole, output=tmp_path / "run")
    moments = random.Random(world_size)
    wanted = KILLS // 2 if world_size == 1 else KILLS - KILLS // 2
    kills, inside_a_save, lost, finished = 0, 0, [0], 0
    while kills < wanted or not finished:
        saved, earlier_metrics = runlog.saved_step(config.folder), metrics_file(config)
        with ranks(config, world_size, tmp_path / "logs", slow_disk) as running:
            # Anywhere: also before the first step, and, where few steps are left, at the end; often inside a save.
            ahead = moments.choice([0, 1, 2, 3, 4, 5, 8]) if kills < wanted else 10**6
            while ahead and running.is_alive():
                if metrics_file(config) != earlier_metrics and steps_logged(config) >= saved + ahead:
                    break
                time.sleep(0.001)
            if ahead and kills % 3:
                deadline = time.monotonic() + 0.3
                while not any(config.folder.glob(".*.tmp")) and time.monotonic() < deadline:
                    time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.03 if ahead else 0.6))
            reached = steps_logged(config)
            running.send(signal.SIGKILL, *(moments.choice([(0,), (1,), (0, 1)]) if world_size == 2 else (0,)))
            time.sleep(moments.uniform(0, 0.1))
            running.send(signal.SIGKILL, *range(world_size))  # as their launcher does
            codes = running.wait()
        if codes == [0] * world_size:
            assert status(config)["state"] == "finished"
            assert is_equal(weights(config), weights(whole))
            assert is_equal(weights(config, checkpoint.BEST), weights(whole, checkpoint.BEST))
            assert lines(config) == lines(whole)
            finished += 1
            config = dataclasses.replace(whole, output=tmp_path / f"run{finished}")
            continue
        assert KILLED in codes, running.output(0)
        kills += 1
        inside_a_save += any(config.folder.glob(".*.tmp"))
        newest = checkpoint.load_newest(config.folder) if config.folder.exists() else None
        assert newest is None or newest.passed_over == ()
        step = newest.payload["step"] if newest else 0
        assert step >= saved
        lost.append(reached - step)
    print(f"{kills} kills of {world_size} rank(s), {inside_a_save} inside a save, at most {max(lost)} steps lost")
    assert inside_a_save >= kills / 5
    assert max(lost) <= 2 * 3  # the interval, and as much again if the save before is still on its way to a slow disk
