"""What a run survives, and what it notices: kills, signals, stopped ranks, NaN, full memory. On real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import train_simclr
from data_prep.convert import Storage, convert
from data_prep.shapes import shapes
from simclr import beton
from simclr.beton import sidecar_path
from simclr.config import OptimizerConfig, SpeedConfig, TrainConfig
from simclr.data import EpochPlan
from simclr.evaluation import DivergedError
from simclr.models import ModelConfig
from simclr.optim import make_optimizer
from simclr.run import checkpoint, devices, memory, opening, peers, runlog
from simclr.run.interruption import EXIT_SAVED, SIGNALS, Signals
from simclr.run.resuming import Progress
from simclr.step.nonfinite import Guard
from tests.helpers import ROOT, run_python
from tests.ranks import Ranks, ranks
from tests.runs import is_equal, lines, train_here, weights

BATCH = 24  # of 100 images: 4 steps an epoch
STEPS = 4
EPOCHS = 8
KILLS = int(os.environ.get("CHAOS_KILLS", "20"))
KILLED = -signal.SIGKILL
needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV maps its file; it is not here")


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
        "model": ModelConfig(encoder="small_resnet_w8", projector_hidden=16, projection_dim=8),
        "optimizer": OptimizerConfig(base_learning_rate=2.0, warmup_epochs=1),
        "precision": "fp64",
        "view_sizes": ((16, 1.0),),  # a quarter of the work
        "num_validation": 30,
        "knn_every_epochs": 2,
        "checkpoint_every_steps": 3,
        "log_every_steps": 1,
        "speed": SpeedConfig(loader="memory"),
    }
    return TrainConfig(**{**defaults, **changes})


def replace(owner: Any, name: str, value: Any) -> None:
    """Break something in this process, a rank's."""
    setattr(owner, name, value)


def finish(config: TrainConfig, world_size: int, logs: Path) -> None:
    with ranks(config, world_size, logs) as running:
        assert running.wait() == [0] * world_size, running.output(0)


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

    replace(os, "fsync", slow)


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


# ------------------------------------------------------------------------------------------ asked to stop


@pytest.mark.distributed
@pytest.mark.slow
def test_any_signal_on_any_rank_once_or_twice_saves_every_step_and_ends_with_status_75(
    images: Path, tmp_path: Path
) -> None:
    whole = settings(images, tmp_path / "whole", epochs=25, knn_every_epochs=0)
    config = dataclasses.replace(whole, output=tmp_path / "run")
    finish(whole, 2, tmp_path / "logs")
    step = 0
    for i, number in enumerate(SIGNALS):
        for rank in (0, 1):
            times = 1 + (i + rank) % 2  # every signal, and every rank, gets one and two
            earlier_metrics = metrics_file(config)
            with ranks(config, 2, tmp_path / "logs") as running:
                while metrics_file(config) == earlier_metrics:
                    assert running.is_alive(), running.output(0)
                    time.sleep(0.002)
                wait_for_step(running, config, step + 1)
                for _ in range(times):
                    running.send(number, rank)
                assert running.wait(30) == [EXIT_SAVED, EXIT_SAVED], running.output(0) + running.output(1)
                output = running.output(0)
            found = status(config)
            assert found["step"] > step
            step = found["step"]
            assert step == checkpoint.load_resumable(config.folder / checkpoint.LAST)["step"]
            assert step == max(line["step"] for line in lines(config))  # no step was taken that is not saved
            assert found["state"] == "interrupted"
            assert found["reason"].startswith(f"{signal.Signals(number).name} on rank {rank}: saved after step {step}")
            assert found["reason"] in output
    finish(config, 2, tmp_path / "logs")
    assert status(config) == {"state": "finished", "step": 100, "total_steps": 100, "reason": ""}
    assert is_equal(weights(config), weights(whole))
    assert lines(config) == lines(whole)


def test_a_signal_before_the_first_step_is_not_lost(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run")
    with ranks(config, 1, tmp_path / "logs", ask_at_once) as running:
        assert running.wait() == [EXIT_SAVED]
    assert (status(config)["state"], status(config)["step"]) == ("interrupted", 1)


def ask_at_once(rank: int) -> None:
    """SIGUSR1 while the process is still starting."""
    start = devices.start_devices

    def asked(config: TrainConfig) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return start(config)

    replace(opening, "start_devices", asked)


# ------------------------------------------------------------------------------------------ lost and standing still


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("victim", "name"),
    [(1, "rank 1 is dead or stopped: last heard of at step"), (0, "host of the ranks' common store, rank 0")],
)
def test_a_killed_rank_is_noticed_and_named_within_5_seconds(
    images: Path, tmp_path: Path, victim: int, name: str
) -> None:
    config = settings(images, tmp_path / "run", epochs=1000, knn_every_epochs=0)
    with ranks(config, 2, tmp_path / "logs") as running:
        wait_for_step(running, config, 20)
        time.sleep(1.5)  # so that each has told of itself
        running.send(signal.SIGKILL, victim)
        started = time.monotonic()
        assert running.wait(5, (1 - victim,)) == [1], running.output(1 - victim)
        print(f"noticed after {time.monotonic() - started:.1f} s")
        assert name in running.output(1 - victim)
    newest = checkpoint.load_newest(config.folder)
    assert newest is not None
    # What rank 0 had under way to the disk has arrived, unless it was itself killed: then never less than it told of.
    assert newest.payload["step"] >= status(config)["step"]
    if victim == 1:
        assert newest.payload["step"] == status(config)["step"]
        assert status(config)["state"] == "failed"
        assert name in status(config)["reason"]


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_noticed_and_named_within_the_timeout_and_5_seconds(
    images: Path, tmp_path: Path, victim: int
) -> None:
    timeout = 3.0
    config = settings(images, tmp_path / "run", epochs=1000, knn_every_epochs=0, timeout_seconds=timeout)
    with ranks(config, 2, tmp_path / "logs") as running:
        wait_for_step(running, config, 20)
        time.sleep(1.5)  # so that each has told of itself
        running.send(signal.SIGSTOP, victim)
        started = time.monotonic()
        assert running.wait(timeout + 5, (1 - victim,)) == [1], running.output(1 - victim)
        print(f"noticed after {time.monotonic() - started:.1f} s")
        expected = "rank 1 is dead or stopped" if victim else "rank 0"
        assert expected in running.output(1 - victim)
        running.send(signal.SIGCONT, victim)  # it finds itself alone, and ends too
        assert running.wait(timeout + 10, (victim,)) == [1]


def stand_still(rank: int) -> None:
    """A loader that never yields its sixth batch."""
    step = train_simclr.train_step

    def stuck(run: Any, *arguments: Any) -> Any:
        if run.progress.step == 5:
            time.sleep(1000)
        return step(run, *arguments)

    replace(train_simclr, "train_step", stuck)


def test_a_rank_that_stands_still_is_ended_by_its_watchdog_with_all_stacks(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", timeout_seconds=2.0)
    with ranks(config, 1, tmp_path / "logs", stand_still) as running:
        wait_for_step(running, config, 5)
        assert running.wait(2 + 5) == [peers.EXIT_STOOD_STILL], running.output(0)
        output = running.output(0)
    assert re.search(r"rank 0 has stood still for \d s after step 5, training", output)
    assert "in stuck" in output  # where
    assert (status(config)["state"], status(config)["step"]) == ("failed", 4)
    assert "stood still" in status(config)["reason"]
    train_here(config)


def stand_still_within(module: str, function: str, how: Callable[[], object], rank_struck: int, rank: int) -> None:
    """One rank stands still when a function is called."""
    if rank == rank_struck:
        replace(importlib.import_module(module), function, lambda *arguments, **more: how())


def stop_itself() -> None:
    """As SIGSTOP from outside, which its watchdog cannot notice either. Before, it has told what it does."""
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("module", "function", "doing"),
    [
        ("simclr.evaluation", "extract_features", "measuring kNN accuracy"),  # knn_predict: the test below
        ("simclr.run.checkpoint", "resumable_payload", "saving"),
    ],
)
def test_a_rank_that_stands_still_between_steps_is_ended_within_the_timeout_and_5_seconds(
    images: Path, tmp_path: Path, module: str, function: str, doing: str
) -> None:
    config = settings(images, tmp_path / "run", timeout_seconds=2.0, checkpoint_every_steps=4, knn_every_epochs=1)
    prepare = functools.partial(stand_still_within, module, function, functools.partial(time.sleep, 1000), 0)
    with ranks(config, 1, tmp_path / "logs", prepare) as running:
        wait_for_step(running, config, 4)
        started = time.monotonic()
        assert running.wait(2 + 5) == [peers.EXIT_STOOD_STILL], running.output(0)
        print(f"noticed after {time.monotonic() - started:.1f} s")
        assert re.search(rf"rank 0 has stood still for \d s after step 4, {doing}", running.output(0))
    assert status(config)["state"] == "failed"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("module", "function", "victim", "expected"),
    [
        (
            "simclr.evaluation",
            "knn_predict",
            1,
            "rank 1 is dead or stopped: last heard of at step 4, measuring kNN accuracy",
        ),
        # The other rank waits in SideChannel.meet, and rank 0 holds the common store, too.
        ("simclr.run.checkpoint", "resumable_payload", 0, "rank 1 ends after step 4, training: the host of the ranks'"),
    ],
)
def test_a_rank_that_is_stopped_between_steps_is_noticed_within_the_timeout_and_5_seconds(
    images: Path, tmp_path: Path, module: str, function: str, victim: int, expected: str
) -> None:
    config = settings(images, tmp_path / "run", timeout_seconds=2.0, checkpoint_every_steps=4, knn_every_epochs=1)
    prepare = functools.partial(stand_still_within, module, function, stop_itself, victim)
    with ranks(config, 2, tmp_path / "logs", prepare) as running:
        wait_for_step(running, config, 4)
        started = time.monotonic()
        assert running.wait(2 + 5, (1 - victim,)) == [1], running.output(1 - victim)
        print(f"noticed after {time.monotonic() - started:.1f} s")
        assert expected in running.output(1 - victim)


def very_slow_disk(seconds: float, rank: int) -> None:
    """The second time that the disk is asked to be done, it takes long."""
    fsync, calls = os.fsync, itertools.count()

    def slow(descriptor: int) -> None:
        time.sleep(seconds if next(calls) == 1 else 0)
        fsync(descriptor)

    replace(os, "fsync", slow)


@pytest.mark.distributed
def test_a_disk_that_takes_longer_than_the_timeout_is_waited_for_on_all_ranks(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", timeout_seconds=1.0, stop_at_step=6)
    with ranks(config, 2, tmp_path / "logs", functools.partial(very_slow_disk, 7.0)) as running:
        started = time.monotonic()
        assert running.wait() == [0, 0], running.output(0)
        assert time.monotonic() - started > 7
    assert status(config)["step"] == 6


def dead_disk(rank: int) -> None:
    """A disk that never answers, neither the checkpoint nor the watchdog's words, and less patience."""
    replace(peers, "START_SECONDS", 1.0)
    replace(runlog.Status, "failed", lambda *arguments: time.sleep(1000))
    very_slow_disk(1000.0, rank)


def test_a_disk_that_never_answers_ends_the_run(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", timeout_seconds=1.0)
    with ranks(config, 1, tmp_path / "logs", dead_disk) as running:
        assert running.wait() == [peers.EXIT_STOOD_STILL], running.output(0)
        assert re.search(r"rank 0 has stood still for \d s after step 4, waiting for the disk", running.output(0))


def test_a_process_that_was_stopped_and_goes_on_is_not_taken_for_one_that_stands_still(
    images: Path, tmp_path: Path
) -> None:
    config = settings(images, tmp_path / "run", epochs=1000, knn_every_epochs=0, timeout_seconds=0.5, stop_at_step=80)
    with ranks(config, 1, tmp_path / "logs") as running:
        wait_for_step(running, config, 20)
        running.send(signal.SIGSTOP, 0)
        time.sleep(5)  # longer than timeout and margin
        running.send(signal.SIGCONT, 0)
        assert running.wait() == [0], running.output(0)


def fail_on_rank_1(rank: int) -> None:
    """No memory for the sixth step."""
    if rank != 1:
        return
    step = train_simclr.train_step

    def failing(run: Any, *arguments: Any) -> Any:
        if run.progress.step == 5:
            torch.empty(1 << 50)
        return step(run, *arguments)

    replace(train_simclr, "train_step", failing)


@pytest.mark.distributed
def test_a_rank_without_memory_says_what_to_lower_and_the_others_say_why_it_left(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run")
    with ranks(config, 2, tmp_path / "logs", fail_on_rank_1) as running:
        assert running.wait(20) == [1, 1]
        said = "out of memory on cpu with per_device_batch_size 12. Use --recompute, or more devices"
        assert said in running.output(1)
        assert "Traceback" not in running.output(1)
        assert f"rank 1 has left at step 5: OutOfMemoryError: {said}" in running.output(0)
    assert said in status(config)["reason"]


def test_other_errors_are_not_taken_for_full_memory() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory.explain_shortage(torch.device("cpu"), 12, 2):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.distributed
def test_ranks_that_found_different_checkpoints_refuse_to_train(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", stop_at_step=3)
    train_here(config)
    with ranks(dataclasses.replace(config, stop_at_step=6), 2, tmp_path / "logs", own_folder) as running:
        assert running.wait() == [1, 1]
        assert "ranks 0 to 1 found in" in running.output(0)
        assert "are of steps [3, 0]: is it on a disk that all of them share?" in running.output(0)


def own_folder(rank: int) -> None:
    """Rank 1 sees no checkpoint, as on a machine with a disk of its own."""
    if rank == 1:
        replace(opening, "resume", lambda *arguments: Progress())


# ------------------------------------------------------------------------------------------ the data file


def own_copy(images: Path, folder: Path) -> Path:
    """A data file that a test may spoil."""
    folder.mkdir(exist_ok=True)
    for source in (images, sidecar_path(images)):
        shutil.copy(source, folder / source.name)
    return folder / images.name


def assert_is_the_run_of_good_images(config: TrainConfig, images: Path) -> None:
    good = dataclasses.replace(
        config, data=images, output=config.folder.with_name("good"), speed=SpeedConfig(loader="memory")
    )
    train_here(good)
    assert is_equal(weights(config), weights(good))


def overwrite(path: Path) -> None:
    """In place, as `cp` does it, with a file as long; a little later, so that some steps are taken before."""
    with path.open("r+b") as file:
        file.seek(1 << 21)
        file.write(bytes(100 * 32 * 32 * 3))


def replace_file(path: Path) -> None:
    """As data_prep writes: a new file takes the name."""
    shutil.copy(path, path.with_suffix(".new"))
    overwrite(path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@needs_ffcv
@pytest.mark.parametrize("change", [overwrite, os.utime])
def test_images_that_are_overwritten_are_not_trained_on(
    images: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    data = own_copy(images, tmp_path / "data")
    changes: dict[str, Any] = {"speed": SpeedConfig(loader="ffcv"), "checkpoint_every_steps": 1, "knn_every_epochs": 0}
    config = settings(data, tmp_path / "run", epochs=10_000, **changes)
    with ranks(config, 1, tmp_path / "logs") as running:
        wait_for_step(running, config, 10)
        change(data)
        started, before = time.monotonic(), steps_logged(config)
        assert running.wait(5) == [1], running.output(0)
        print(f"noticed after {time.monotonic() - started:.2f} s and {steps_logged(config) - before} steps")
        assert f"{data} was written to after it was opened" in running.output(0)
        assert "Traceback" not in running.output(0)
    step = status(config)["step"]
    assert status(config)["state"] == "failed"
    assert step == steps_logged(config) >= 10  # nothing is lost but the step that was not taken
    assert_is_the_run_of_good_images(dataclasses.replace(config, stop_at_step=step), images)


@needs_ffcv
def test_a_file_that_another_one_takes_the_name_of_is_read_to_the_end_and_others_are_refused_afterwards(
    images: Path, tmp_path: Path
) -> None:
    data = own_copy(images, tmp_path / "data")
    config = settings(
        data, tmp_path / "run", speed=SpeedConfig(loader="ffcv"), epochs=1000, knn_every_epochs=0, stop_at_step=40
    )
    with ranks(config, 1, tmp_path / "logs") as running:
        wait_for_step(running, config, 10)
        replace_file(data)
        assert running.wait() == [0], running.output(0)
    assert_is_the_run_of_good_images(config, images)
    with pytest.raises(ValueError, match=r"train\.beton: the sha256 of its content is"):
        train_here(dataclasses.replace(config, stop_at_step=50))


@needs_ffcv
def test_of_a_file_that_is_cut_off_nothing_is_trained_on_and_the_run_is_not_said_to_go_on(
    images: Path, tmp_path: Path
) -> None:
    data = own_copy(images, tmp_path / "data")
    config = settings(data, tmp_path / "run", speed=SpeedConfig(loader="ffcv"), epochs=10_000, knn_every_epochs=0)
    with ranks(config, 1, tmp_path / "logs") as running:
        wait_for_step(running, config, 10)
        os.truncate(data, 100)
        started = time.monotonic()
        (code,) = running.wait(5)
        print(f"noticed after {time.monotonic() - started:.2f} s, by status {code}")
        output = running.output(0)
    # Which comes first is left to chance: FFCV reads ahead, and where there are no pages any more the kernel ends it.
    if code == 1:
        assert f"{data} was written to after it was opened" in output
        assert runlog.read_status(config.folder)["state"] == "failed"
    else:
        assert code == -signal.SIGBUS
        assert status(config)["state"] == "running"
        assert runlog.read_status(config.folder)["state"] == runlog.DIED
    shutil.copy(images, data)
    train_here(dataclasses.replace(config, stop_at_step=20, speed=SpeedConfig(loader="memory")))


READ_WHAT_HAS_NO_NAME = """
import os, sys
import numpy as np
from simclr.data import EpochPlan, open_images
path, other = sys.argv[1:]
plan = EpochPlan(np.arange(100), 10, shuffle=False)
with open_images(path, backend="memory") as source:
    expected = [batch.image.numpy() for batch in source.batches(plan)]
with open_images(path, backend="ffcv") as source:
    os.replace(other, path)  # before the first batch is read
    assert all(np.array_equal(batch.image, pixels) for batch, pixels in zip(source.batches(plan), expected))
"""


@needs_ffcv
def test_another_file_of_the_name_is_not_read(images: Path, tmp_path: Path) -> None:
    data, other = own_copy(images, tmp_path), own_copy(images, tmp_path / "other")
    beton.write(other, np.zeros((100, 32, 32, 3), np.uint8), np.zeros(100, np.int64))
    done = run_python("-c", READ_WHAT_HAS_NO_NAME, data, other)
    assert done.returncode == 0, done.stderr


def test_images_in_memory_are_those_that_were_there_at_the_start(images: Path, tmp_path: Path) -> None:
    data = own_copy(images, tmp_path / "data")
    config = settings(data, tmp_path / "run", epochs=1000, knn_every_epochs=0, stop_at_step=40)
    with ranks(config, 1, tmp_path / "logs") as running:
        wait_for_step(running, config, 10)
        overwrite(data)
        assert running.wait() == [0], running.output(0)
    assert_is_the_run_of_good_images(config, images)


# ------------------------------------------------------------------------------------------ the run's folder


def test_a_folder_that_was_deleted_and_made_anew_is_left_to_whom_it_belongs(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", epochs=10_000, checkpoint_every_steps=20, knn_every_epochs=0)
    with ranks(config, 1, tmp_path / "logs") as running:
        wait_for_step(running, config, 10)
        shutil.rmtree(config.folder)
        with runlog.locked(config.folder, is_main=True):  # another run's
            started = time.monotonic()
            assert running.wait(30) == [1], running.output(0)
            print(f"noticed after {time.monotonic() - started:.2f} s")
        assert f"{config.folder} was deleted, moved or made anew while this run wrote to it" in running.output(0)
        assert "Traceback" not in running.output(0)
    assert [path.name for path in config.folder.iterdir()] == [runlog.LOCK]


# ------------------------------------------------------------------------------------------ who reads the output


WORDS = ["demo", "--model.encoder", "small_resnet_w8", "--global-batch-size", "24", "--num-validation", "0"]
WORDS += ["--loader", "memory", "--views", "torch", "--log-every-steps", "1", "--checkpoint-every-epochs", "100000"]


def command(images: Path, folder: Path, epochs: int) -> list[str]:
    more = ["--data", str(images), "--output", str(folder), "--epochs", str(epochs)]
    return [sys.executable, "train_simclr.py", *WORDS, *more]


@pytest.mark.parametrize("redirection", ["| head -n 1", ">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_training_goes_on_when_nobody_reads_its_output(images: Path, tmp_path: Path, redirection: str) -> None:
    script = f"set -o pipefail; {shlex.join(command(images, tmp_path / 'run', 1))} {redirection}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert runlog.read_status(tmp_path / "run")["state"] == "finished"
    assert len(runlog.read_metrics(tmp_path / "run")) == 4


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid, to give a process a terminal of its own")
def test_a_run_whose_terminal_is_closed_saves_every_step(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run")
    words = ["setsid", "--ctty", *command(images, config.folder, 100_000)]
    terminal, inside = os.openpty()
    os.set_blocking(terminal, False)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, whose children inherit it
    running = subprocess.Popen(words, cwd=ROOT, stdin=inside, stdout=inside, stderr=inside)
    signal.signal(signal.SIGHUP, before)
    try:
        os.close(inside)
        deadline = time.monotonic() + 60
        while steps_logged(config) < 10:
            with contextlib.suppress(BlockingIOError):
                os.read(terminal, 1 << 16)
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.close(terminal)
        started = time.monotonic()
        assert running.wait(20) == EXIT_SAVED
        print(f"ended after {time.monotonic() - started:.2f} s")
    finally:
        running.kill()
        running.wait()
    found = runlog.read_status(config.folder)
    assert (found["state"], found["step"]) == ("interrupted", steps_logged(config))
    assert found["reason"].startswith("SIGHUP: saved after step ")


def test_nohup_keeps_its_meaning() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = {number: signal.getsignal(number) for number in SIGNALS if number != signal.SIGHUP}
    try:
        Signals().install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        for number, handler in others.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------ not finite


def spoil(step_spoilt: int, rank_spoilt: int, rank: int) -> None:
    """The views of one step are not numbers, on one rank."""
    step = train_simclr.train_step

    def spoilt(run: Any, views: torch.Tensor) -> Any:
        if (run.progress.step + 1, rank) == (step_spoilt, rank_spoilt):
            views = torch.cat([views.chunk(2)[0] * math.nan, views.chunk(2)[1]])
        return step(run, views)

    replace(train_simclr, "train_step", spoilt)


spoil_step_6_on_rank_1 = functools.partial(spoil, 6, 1)


def dumped(config: TrainConfig, step: int, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.folder / f"nonfinite_step{step:08d}_rank{rank}.json").read_text())
    return found


@pytest.mark.distributed
def test_nan_on_one_rank_stops_all_before_the_step_with_a_description_each(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", checkpoint_every_steps=1)
    with ranks(config, 2, tmp_path / "logs", spoil_step_6_on_rank_1) as running:
        wait_for_step(running, config, 5)
        assert running.wait(10) == [1, 1]
        for rank in (0, 1):
            assert "the gradient is not finite at step 6; this rank's loss is nan. The weights did not take it" in (
                running.output(rank)
            )
    assert (status(config)["state"], status(config)["step"]) == ("failed", 5)
    order = next(itertools.islice(EpochPlan(np.arange(100), BATCH).batches(1), 1, None))  # of step 6, in epoch 1
    for rank in (0, 1):
        found = dumped(config, 6, rank)
        assert (found["step"], found["epoch"], found["rank"]) == (6, 1, rank)
        assert found["images"] == order.reshape(2, -1)[rank].tolist()
        assert "encoder.conv1.weight" in found["not_finite"]
        assert found["gradient_norms"]["encoder.conv1.weight"] == "nan"
    train_here(config)  # it was the images' fault, and they are well again
    assert status(config)["state"] == "finished"


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(base_learning_rate=2.0),
        OptimizerConfig(name="adamw", base_learning_rate=0.01),
        OptimizerConfig(name="lars", base_learning_rate=1.0, gradient_clip_norm=0.5),
    ],
    ids=["sgd", "adamw", "lars"],
)
@pytest.mark.parametrize("step", [1, 6])
def test_skip_leaves_out_one_step_and_nothing_else(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, optimizer: OptimizerConfig
) -> None:
    """Against a run that does nothing at that step. Whether to skip is decided by the host, or on the device."""
    changes: dict[str, Any] = {"optimizer": optimizer, "epochs": 2, "num_validation": 0}
    left_out = settings(images, tmp_path / "left-out", **changes)
    take = train_simclr.train_step

    def leave_out(run: Any, *arguments: Any) -> Any:
        if run.progress.step + 1 != step:
            return take(run, *arguments)
        run.guard._norms.append(0.0)
        nothing = torch.ones(BATCH, 8, dtype=torch.float64)
        return nothing.sum(), nothing, nothing

    monkeypatch.setattr(train_simclr, "train_step", leave_out)
    train_here(left_out)
    expected = weights(left_out)
    monkeypatch.setattr(train_simclr, "train_step", take)
    spoil(step, 0, 0)
    for decides in ("host", "device"):
        make = functools.partial(make_optimizer, skippable=decides == "device")
        monkeypatch.setattr(opening, "make_optimizer", lambda model, config, make=make, **_: make(model, config))
        skipped = settings(images, tmp_path / decides, on_nonfinite="skip", log_every_steps=3, **changes)
        train_here(skipped)
        for name, value in weights(skipped).items():
            assert torch.allclose(value, expected[name], rtol=1e-12, atol=1e-14), (decides, name)
        assert sum(line["skipped_steps"] for line in lines(skipped)) == 1
        assert dumped(skipped, step, 0)["step"] == step


def test_skipping_ends_after_10_in_a_row(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(images, tmp_path / "run", on_nonfinite="skip", num_validation=0)
    measure = Guard.gradient_norms
    count = itertools.count(1)

    def spoilt(guard: Guard) -> Tensor:
        # one, then a finite one, then all
        return measure(guard) * (math.nan if next(count) not in {2} else 1.0)

    monkeypatch.setattr(Guard, "gradient_norms", spoilt)
    with pytest.raises(DivergedError, match="not finite at step 12, for the 10th time in a row"):
        train_here(config)
    assert [line["skipped_steps"] for line in lines(config)] == [1, 0, *[1] * 9]
