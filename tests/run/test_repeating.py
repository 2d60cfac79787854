"""A run is repeated from another's manifest, number for number; what it cannot be repeated from is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr import beton, parts
from simclr.config import OptimizerConfig, SpeedConfig, TrainConfig
from simclr.models import ModelConfig
from simclr.run import repeating
from simclr.run.runlog import MANIFEST
from tests.runs import is_equal, lines, train_here, type_command, weights


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run whose settings are those of no preset."""
    folder = tmp_path_factory.mktemp("first")
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    beton.write(folder / "train.beton", images, np.arange(60) % 3)
    config = TrainConfig(
        name="first",
        data=folder / "train.beton",
        output=folder / "run",
        seed=7,
        epochs=2,
        global_batch_size=20,
        model=ModelConfig(encoder="small_resnet_w8", projector_hidden=16, projection_dim=8),
        optimizer=OptimizerConfig(base_learning_rate=0.37, warmup_epochs=0.5),
        num_validation=15,
        log_every_steps=1,
        speed=SpeedConfig(loader="memory"),
    )
    train_here(config)
    return config


@pytest.mark.parametrize("source", [".", MANIFEST])
def test_a_repeated_run_is_the_same_bit_for_bit(
    first: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    type_command(monkeypatch, "--repeat", first.folder / source)
    again = dataclasses.replace(first, output=tmp_path / "results" / "first-repeat-seed7")
    assert is_equal(weights(again), weights(first))
    assert lines(again) == lines(first)
    assert f"repeat:     {first.folder / source}, in all that is known" in capsys.readouterr().out


def test_one_setting_is_changed_and_said(
    first: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "other"
    type_command(monkeypatch, f"--repeat={first.folder}", "--seed", 8, "--output", output)
    other = dataclasses.replace(first, output=output)
    assert not is_equal(weights(other), weights(first))
    said = capsys.readouterr().out
    assert f"repeat:     {first.folder}, but for what may change its numbers: seed was 7 and is 8" in said


def test_a_run_with_parts_of_its_own_is_repeated_if_they_are_named(
    first: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "_loaded", {})
    monkeypatch.setattr(parts.OBJECTIVES, "_own", {})
    own = tmp_path / "own.py"
    own.write_text(
        "from simclr.parts import register_objective\n\n\n"
        "@register_objective\ndef far_apart(z1, z2):\n    return -(z1 - z2).square().mean()\n"
    )
    folder = changed(first, tmp_path / "with_parts")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["config"] |= {"parts": str(own), "parts_sha256": parts.sha256_of(own)}
    manifest["config"]["loss"]["name"] = "far_apart"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="name that file with --parts"):
        type_command(monkeypatch, "--repeat", folder)
    type_command(monkeypatch, "--repeat", folder, "--parts", own)
    (metrics,) = (tmp_path / "results").glob("*/metrics.jsonl")
    assert '"loss": -' in metrics.read_text()  # the other objectives are not negative


def changed(first: TrainConfig, folder: Path, **changes: Any) -> Path:
    """The first run's manifest with something else in it."""
    manifest = json.loads((first.folder / MANIFEST).read_text())
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))
    return folder


def test_where_the_machine_chose_its_choice_is_kept(first: TrainConfig, tmp_path: Path) -> None:
    config = json.loads((first.folder / MANIFEST).read_text())["config"]
    assert repeating.config_to_repeat(changed(first, tmp_path / "a", mixed_precision="bf16")).precision == "bf16"
    assert repeating.config_to_repeat(changed(first, tmp_path / "b", mixed_precision="no")).precision == "fp32"
    local = changed(first, tmp_path / "c", config=config | {"global_batch_norm": False}, derived={"world_size": 4})
    assert repeating.config_to_repeat(local).world_size == 4  # where the numbers depend on it
    session = {"resume": "must", "stop_at_step": 3, "world_size": 2, "tracker": "wandb", "output": "x"}
    own = repeating.config_to_repeat(changed(first, tmp_path / "d", config=config | session))
    assert (own.resume, own.stop_at_step, own.world_size, own.tracker, own.output) == ("auto", None, None, "none", None)


def test_what_cannot_be_repeated_is_refused(
    first: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, *words: object) -> None:
        with pytest.raises(SystemExit) as stop:
            type_command(monkeypatch, *words)
        assert message in str(stop.value)
        assert "\n" not in str(stop.value)

    manifest = json.loads((first.folder / MANIFEST).read_text())
    config = manifest["config"]
    refused(f"there is no {tmp_path / MANIFEST}", "--repeat", tmp_path)
    refused("is no run to repeat", "--repeat", first.data)
    refused("--repeat takes one run", "--repeat")
    refused("--repeat takes one run", "--repeat", "--seed", "1")
    refused("--repeat takes one run", "--repeat", "a", "--repeat", "b")
    unknown = changed(first, tmp_path / "unknown", config=config | {"flavour": "sour"})
    refused("has unknown fields ['flavour']", "--repeat", unknown)
    missing = changed(first, tmp_path / "missing", config={k: v for k, v in config.items() if k != "epochs"})
    refused("has missing fields ['epochs']", "--repeat", missing)
    mixed = changed(first, tmp_path / "mixed", config=config | {"allow_changed": ["epochs"]})
    refused("went on with changed settings (--allow-changed)", "--repeat", mixed)
    gone = changed(first, tmp_path / "gone", config=config | {"data": str(tmp_path / "gone.beton")})
    sha = manifest["facts"]["content_sha256"][:12]
    refused(f"tells of 60 images ({manifest['facts']['source']}) with content sha256 {sha}", "--repeat", gone)
    images = np.zeros((60, 16, 16, 3), dtype=np.uint8)
    beton.write(tmp_path / "other.beton", images, np.arange(60) % 3)
    refused("holds other images", "--repeat", first.folder, "--data", tmp_path / "other.beton")
    assert not (tmp_path / "results").exists()
