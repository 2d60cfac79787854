"""An exported encoder gives the same representations, is plain safetensors, and is refused when damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from simclr.config import TrainConfig, to_json
from simclr.export import NAME, load_encoder
from simclr.models import ModelConfig, SimCLR
from simclr.run import checkpoint
from simclr.run.checkpoint import CheckpointError
from tests.run.test_checkpoint import FACTS

ROOT = Path(__file__).resolve().parents[1]
X = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def write_run(folder: Path, encoder: str) -> SimCLR:
    torch.manual_seed(0)
    config = TrainConfig(model=ModelConfig(encoder, stem="patch2", projector_hidden=6, projection_dim=5))
    model = SimCLR(config.model, FACTS.height)
    model(X)  # running statistics of its own
    known: dict[str, Any] = {"config": to_json(config), "facts": to_json(FACTS), "step": 12, "epoch": 2}
    payload = checkpoint.model_payload(model=model, **known, knn_accuracy=1.0, best_knn_accuracy=1.0)
    checkpoint.save_atomically(folder / checkpoint.BEST, payload)
    return model.eval()


def export(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simclr.export", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_an_exported_encoder_is_the_pretrained_one(tmp_path: Path) -> None:
    model = write_run(tmp_path, "resnet18")
    assert checkpoint.load_pretrained(str(tmp_path)).path == tmp_path / checkpoint.BEST
    done = export(tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.encoder(X)
        found = load_encoder(str(tmp_path / NAME))
        assert not any(module.training for module in found.encoder.modules())
        assert torch.equal(found.encoder(X), expected)
        # Without this project: timm's model, with the stem that the metadata names
        plain = timm.create_model("resnet18", num_classes=0)
        plain.conv1, plain.maxpool = torch.nn.Conv2d(3, 64, 2, 2, bias=False), torch.nn.Identity()
        plain.load_state_dict(safetensors.torch.load_file(tmp_path / NAME), strict=True)
        assert torch.equal(plain.eval()(X), expected)
    assert found.metadata["encoder"] == "resnet18"
    assert (found.metadata["image_size"], found.metadata["step"]) == ("16", "12")
    assert found.metadata["mean"] == "[0.1, 0.2, 0.3333333333333333]"


def test_what_is_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "small_resnet_w8")
    path = tmp_path / "out.safetensors"
    done = export(tmp_path / checkpoint.BEST, "--output", path)
    assert done.returncode == 0, done.stderr
    good = path.read_bytes()
    load_encoder(path)
    damaged = bytearray(good)
    damaged[-3] ^= 1  # in a weight: safetensors itself does not notice
    for content, message in ((bytes(damaged), "damaged"), (good[:-1], "cannot be read"), (b"", "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_encoder(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"not written by simclr.export: its metadata lacks \['encoder'"):
        load_encoder(path)


def test_a_run_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    done = export(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("simclr.export: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
