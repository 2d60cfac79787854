"""A dry run says what the run would take, by steps that are really taken, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_simclr
from simclr import beton
from simclr.config import OptimizerConfig, SpeedConfig, TrainConfig, derive
from simclr.models import ModelConfig
from simclr.run import checkpoint, dry_run
from simclr.run.interruption import Interrupted, Signals
from simclr.run.runlog import read_metrics
from tests.helpers import forget_accelerate_state, run_distributed
from tests.runs import is_equal, train_here, weights

NUM_IMAGES, BATCH = 60, 20  # 3 steps an epoch


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("dry")
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 16, 16, 3), dtype=np.uint8)
    beton.write(folder / "train.beton", images, np.arange(NUM_IMAGES) % 3)
    return TrainConfig(
        name="small",
        data=folder / "train.beton",
        output=folder / "run",
        epochs=5,
        global_batch_size=BATCH,
        model=ModelConfig(encoder="small_resnet_w8", projector_hidden=16, projection_dim=8),
        optimizer=OptimizerConfig(base_learning_rate=0.1),
        view_sizes=((8, 0.4),),
        num_validation=15,
        knn_every_epochs=2,
        speed=SpeedConfig(loader="memory"),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "SECONDS_FOR_A_SIDE", 0.01)


def rehearse(config: TrainConfig, signals: Signals | None = None) -> None:
    try:
        train_simclr.main(config, signals, is_dry=True)
    finally:
        forget_accelerate_state()


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    }


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_dry_run_writes_nothing_and_says_what_a_run_says(
    config: TrainConfig, tracker: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.data.parent
    monkeypatch.chdir(folder)
    before = content(folder)
    rehearse(dataclasses.replace(config, output=folder / "deeper" / "still", tracker=tracker))
    assert content(folder) == before
    said = capsys.readouterr().out
    for line in derive(config, NUM_IMAGES, 1).equations(config):
        assert line in said
    assert re.search(r"views of 8 pixels: 6 steps x \S+ s = .* images/s; steps timed: \d+", said)
    assert re.search(r"views of 16 pixels: 9 steps x", said)
    assert re.search(r"kNN: 3 x about \S+ s", said)
    assert re.search(r"peak: +\S+ GiB of this machine's \S+ GiB for its processes", said)
    assert bool(re.search(r"\S+ GiB of \S+ GiB on the fullest GPU", said)) == torch.cuda.is_available()


def test_a_run_that_is_begun_is_left_as_it_is_and_what_is_left_of_it_is_told(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end is measured: a run with a dry one in its middle has the weights, and the measurements, that were told."""
    parts, whole = (
        dataclasses.replace(config, output=tmp_path / "parts"),
        dataclasses.replace(config, output=tmp_path / "w"),
    )
    train_here(dataclasses.replace(parts, stop_at_step=7))
    before = content(parts.folder)
    capsys.readouterr()
    rehearse(parts)
    said = capsys.readouterr().out
    assert content(parts.folder) == before
    assert "resuming:   after step 7 of 15" in said
    assert "of 8 pixels" not in said
    assert "views of 16 pixels: 8 steps x" in said
    told = re.search(r"kNN: (\d+) x", said)
    num_before = [line["kind"] for line in read_metrics(parts.folder)].count("knn")
    train_here(parts)
    num_after = [line["kind"] for line in read_metrics(parts.folder)].count("knn")
    assert told is not None
    assert int(told[1]) == num_after - num_before == 2
    train_here(whole)
    assert is_equal(weights(parts), weights(whole))

    rehearse(parts)
    assert "nothing is left to do" in capsys.readouterr().out
    size = (parts.folder / checkpoint.LAST).stat().st_size
    told_mb = re.search(r"checkpoints of (\d+) MB", said)
    assert told_mb is not None
    assert abs(int(told_mb[1]) - size / 1e6) < 1


def test_a_dry_run_is_refused_what_the_run_would_be(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"holds no run, but photo\.jpg"):
        rehearse(dataclasses.replace(config, output=tmp_path))


def test_a_disk_that_does_not_do_is_told(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rehearse(config)
    assert "TOO LITTLE" not in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(os, "access", lambda *_: False)
    rehearse(config)
    said = capsys.readouterr().out
    assert "TOO LITTLE, free some space" in said
    assert f"{config.data.parent} CANNOT BE WRITTEN TO" in said


def test_a_signal_ends_a_dry_run(config: TrainConfig) -> None:
    signals = Signals()
    signals.received = signal.SIGINT
    with pytest.raises(Interrupted, match="SIGINT: the dry run has ended early"):
        rehearse(config, signals)
    assert not config.folder.exists()


def _rehearse_on_two(rank: int, world_size: int, config: TrainConfig) -> None:
    dry_run.SECONDS_FOR_A_SIDE = 0.01
    log = config.data.parent / f"rank{rank}.log"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        train_simclr.main(config, is_dry=True)


@pytest.mark.distributed
def test_a_dry_run_on_two_ranks_is_told_once_and_writes_nothing(config: TrainConfig) -> None:
    run_distributed(_rehearse_on_two, 2, dataclasses.replace(config, world_size=2))
    first, second = ((config.data.parent / f"rank{rank}.log").read_text() for rank in (0, 1))
    assert not config.folder.exists()
    assert "global_batch_size / world_size = 20 / 2 = 10 source images" in first
    assert "views of 16 pixels: 9 steps x" in first
    assert second == ""
