"""The commands of the README on real CIFAR-10: pretraining on 2 processes and on 1, linear probe, report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from simclr import beton
from simclr.run.runlog import read_metrics
from tests.helpers import ROOT, library_knn

CPU = ("--config_file", "accelerate_configs/cpu.yaml")
STEPS = 50
EPOCH = 50_000 // 256


def run(*command: object, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


Images = tuple[NDArray[np.uint8], NDArray[np.int64]]


def knn_of_pixels(train: Images, test: Images, facts: beton.Facts) -> float:
    """Percentage of test images that their 20 nearest training images classify, by pixels less the mean image."""
    mean, std = np.array(facts.normalisation)
    x, q = (((images / 255 - mean) / std).reshape(len(images), -1) for images, _ in (train, test))
    x, q = x - x.mean(axis=0), q - x.mean(axis=0)
    return float(100 * library_knn(20, 0.1).fit(x, train[1]).score(q, test[1]))


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_pretraining_on_two_processes_and_on_one_then_probe_and_report(cifar10_beton: Path, tmp_path: Path) -> None:
    launch = (sys.executable, "-m", "accelerate.commands.launch", *CPU)
    options: tuple[object, ...] = ("cpu-simclr", "--data", cifar10_beton / "train.beton", "--epochs", 1)
    options += ("--optimizer.warmup-epochs", 0.2, "--log-every-steps", 1)
    options += ("--model.encoder", "small_resnet_w8", "--global-batch-size", 256, "--precision", "fp32")
    options += ("--view-sizes", 24, 1.0)  # half the work of views of 32 pixels
    two, one = tmp_path / "two", tmp_path / "one"

    said = run(*launch, "--num_processes", 2, "train_simclr.py", *options, "--world-size", 2,
               "--output", two, "--stop-at-step", STEPS)  # fmt: skip
    assert f"steps_per_epoch = floor(num_images / global_batch_size) = floor(50000 / 256) = {EPOCH}" in said
    assert "global_batch_size / world_size = 256 / 2 = 128 source images" in said
    assert said.count("total_steps") == 1  # printed by one process only
    run(sys.executable, "train_simclr.py", *options, "--world-size", 1, "--output", one, "--stop-at-step", 10)

    # The same run. In float32 it differs by rounding, which the first steps of training make grow some two times each.
    on_two, on_one = ([line["loss"] for line in read_metrics(folder)] for folder in (two, one))
    assert (len(on_two), len(on_one)) == (STEPS, 10)
    assert on_two[:3] == pytest.approx(on_one[:3], rel=1e-4)
    assert sum(on_two[:10]) == pytest.approx(sum(on_one), rel=0.01)
    assert on_two[-1] < min(on_two[0], math.log(2 * 256 - 1))  # below what knowing nothing gives

    # What two processes began, one finishes.
    run(sys.executable, "train_simclr.py", *options, "--output", two)
    lines = read_metrics(two)
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    assert steps == sorted(set(steps))
    assert (lines[-1]["kind"], lines[-1]["step"]) == ("knn", EPOCH)
    worlds = [s["derived"]["world_size"] for s in json.loads((two / "manifest.json").read_text())["sessions"]]
    assert worlds == [2, 1]

    # The number, and the report; on a tenth of the images, as raw pixels take a minute on all
    facts = beton.load_facts(cifar10_beton / "train.beton")
    some = {split: tmp_path / "some" / f"{split}.beton" for split in ("train", "test")}
    drawn: dict[str, Images] = {}
    for (split, path), number in zip(some.items(), (5000, 1000), strict=True):
        images, labels = beton.read(cifar10_beton / f"{split}.beton")
        rows = np.sort(np.random.default_rng(0).permutation(len(labels))[:number])
        drawn[split] = images[rows], labels[rows]
        path.parent.mkdir(exist_ok=True)
        beton.write(path, *drawn[split], classes=facts.classes)
    one_candidate = ("--learning-rates", 0.1, "--weight-decays", 0)  # choosing has tests of its own
    options = ("--train", some["train"], "--test", some["test"], "--epochs", 10, "--num-validation", 500)
    run(sys.executable, "linear_probe.py", "--run", two, *options, *one_candidate)
    result = json.loads((two / "probe-linear" / "probe.json").read_text())
    rows_of = {row["name"]: row for row in result["rows"]}
    for row in rows_of.values():
        print(row["name"], row["knn_test"], row["classifier"]["test"])
    pixels, untrained, trained = (rows_of[name] for name in ("raw pixels", "untrained encoder", "pretrained encoder"))
    assert pixels["knn_test"] == pytest.approx(knn_of_pixels(drawn["train"], drawn["test"], facts), abs=0.2)
    assert trained["knn_test"] > untrained["knn_test"] + 2
    assert trained["classifier"]["test"] > untrained["classifier"]["test"] + 2
    for name in ("report.html", "report.md", "simclr_lin_best.pt"):
        assert (two / "probe-linear" / name).stat().st_size > 1000
