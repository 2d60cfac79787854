"""W&B and trackio get a run's name, project and numbers; without a network. For TensorBoard see tests/test_train.py."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator

from simclr.config import TrainConfig, settings_of
from simclr.run.devices import tracked
from simclr.run.runlog import RunLog
from tests.helpers import forget_accelerate_state


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    yield
    forget_accelerate_state()


def config_in(folder: Path, tracker: str) -> TrainConfig:
    return TrainConfig(name="mine", seed=3, output=folder, tracker=tracker, tracker_project="all-mine")  # type: ignore[arg-type]


def write_lines(folder: Path, accelerator: Accelerator, step: int) -> None:
    with RunLog(folder, is_main=True, total_steps=9, first_step=step - 1, track=accelerator.log) as log:
        log.write("step", step=step, loss=step / 2, gradient_norm=float("nan"), skipped_steps=1)
        log.write("knn", step=step, knn_accuracy=41.5)


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # of the package's own code
def test_wandb(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    config = config_in(tmp_path, "wandb")
    ids = []
    for first_session, step in (("yesterday", 1), ("yesterday", 2), ("today", 1)):
        accelerator = Accelerator(cpu=True, log_with="wandb", project_dir=tmp_path)
        with tracked(accelerator, config, first_session):
            write_lines(tmp_path, accelerator, step)
            run = wandb.run
            ids.append(run.id)
            assert (run.name, run.project, run.offline) == ("mine-seed3", "all-mine", True)
            assert Path(run.dir).is_relative_to(tmp_path)
            assert dict(run.config) == settings_of(config)
            accelerator.log({"end": 1}, step=step + 1)  # W&B takes a step in when the next one begins
            found = {name: run.summary[name] for name in ("loss", "skipped_steps", "knn_accuracy")}
            assert found == {"loss": step / 2, "skipped_steps": 1, "knn_accuracy": 41.5}
            assert "gradient_norm" not in run.summary.keys()  # noqa: SIM118
        assert wandb.run is None  # finished
    assert ids[0] == ids[1] != ids[2]  # a continued run goes on, another one in the same folder is another


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # of the package's own code
def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    config = config_in(tmp_path, "trackio")
    for step in (1, 2):
        accelerator = Accelerator(cpu=True, log_with="trackio", project_dir=tmp_path)
        with tracked(accelerator, config, "yesterday"):
            write_lines(tmp_path, accelerator, step)
    (database,) = (tmp_path / "trackio").glob("all*mine.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({name for name, *_ in rows}) == 1
    assert rows[0][0].startswith("mine-seed3-")
    seen = [(step, {k: v for k, v in json.loads(text).items() if k != "seconds"}) for _, step, text in rows]
    assert seen == [
        entry
        for step in (1, 2)
        for entry in ((step, {"loss": step / 2, "skipped_steps": 1}), (step, {"knn_accuracy": 41.5}))
    ]
