"""An exported encoder gives the same representations wherever it is loaded, says what was measured, and is whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.models import _registry
from torch import Tensor, nn

from data_prep.read_image import Loaded, read_image
from simclr import files
from simclr.config import TrainConfig, to_json
from simclr.evaluation import combined_sha256, fingerprint
from simclr.export import CARD, CONFIG, ONNX, PROGRAM, WEIGHTS, Options, load_encoder, main
from simclr.export.timm_alone import timm_alone
from simclr.models import ModelConfig, SimCLR, Stem, make_encoder
from simclr.run import checkpoint, runlog
from simclr.run.checkpoint import CheckpointError
from simclr.views import plain_view
from tests.helpers import ROOT
from tests.run.test_checkpoint import FACTS

X = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """An encoder that neither timm nor this project builds by a name."""

    def __init__(self, tracing: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.convolution, self.tracing = nn.Conv2d(3, 6, 5, stride=2, padding=2), tracing

    def forward(self, x: Tensor) -> Tensor:
        return self.tracing(self.convolution(x).relu().mean((2, 3)))


def write_run(folder: Path, encoder: str, stem: Stem = "cifar", own: nn.Module | None = None, **facts: Any) -> SimCLR:
    """A run's folder with a checkpoint and what export reads besides."""
    torch.manual_seed(0)
    all_facts = dataclasses.replace(FACTS, **facts)
    network = ModelConfig(encoder, stem=stem, projector_hidden=6, projection_dim=5)
    config = TrainConfig(name="a run", model=network, num_validation=2)
    model = SimCLR(config.model, all_facts.height)
    model(torch.randn(5, 3, all_facts.height, all_facts.width))  # running statistics of its own
    known: dict[str, Any] = {"config": to_json(config), "facts": to_json(all_facts), "step": 12, "epoch": 2}
    payload = checkpoint.model_payload(model=model, **known, knn_accuracy=61.25, best_knn_accuracy=61.25)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_atomically(folder / checkpoint.BEST, payload)
    return model.eval()


def write_probe(folder: Path, sha256: str, accuracy: float) -> None:
    rows = [
        {"name": name, "knn_test": value - 1, "classifier": classifier, "image_size": 16}
        for name, value, classifier in (
            ("raw pixels", 40.0, None),
            ("pretrained encoder", accuracy, {"test": accuracy}),
        )
    ]
    facts = json.loads(to_json(dataclasses.replace(FACTS, source="CIFAR-10 (tests)", split="test", lossy_source=True)))
    config = {"mode": "linear", "features": "cached", "knn_neighbours": 3, "num_validation": 2, "epochs": 9}
    found = {
        "schema": 1,
        "test_accuracy": accuracy,
        "num_fit": 8,
        "config": config,
        "rows": rows,
        "encoder_sha256": sha256,
        "pretraining_step": 12,
        "train_facts": facts,
        "test_facts": facts,
        "chance": 50.0,
        "notes": ["A note."],
        "environment": {"date": "2026-01-02T03:04:05", "hardware": "a computer", "command": "linear_probe.py --run x"},
    }
    folder.mkdir()
    files.write_json(folder / "probe.json", found)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small network, exported with everything."""
    run = tmp_path_factory.mktemp("small")
    model = write_run(run, "small_resnet_w8_d24", "auto")
    write_probe(run / "probe-linear", combined_sha256(fingerprint(model.encoder)), 76.54)
    write_probe(run / "probe-earlier", "0" * 64, 99.99)
    manifest = {"environment": {"hardware": "a GPU", "date": "2026-01-01T", "commit": "abc", "command": "train.py"}}
    files.write_json(run / runlog.MANIFEST, manifest | {"sessions": []})
    assert main(Options(run, license="mit")) == run / "encoder"
    assert sorted(path.name for path in (run / "encoder").iterdir()) == sorted({CARD, CONFIG, ONNX, PROGRAM, WEIGHTS})
    return run / "encoder"


def expect(folder: Path, encoder: nn.Module, size: int | None = None) -> None:
    """Lay beside an export a photograph, its pixels by the conversion, and what the probe makes of them."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(pixels).save(folder / "photo.jpg", exif=exif)
    loaded = read_image(folder / "photo.jpg", FACTS.height)
    assert isinstance(loaded, Loaded)
    images = torch.from_numpy(loaded.pixels.copy())[None]
    mean, std = FACTS.normalisation
    with torch.no_grad():
        expected = encoder(plain_view(images, mean=mean, std=std, size=size))
    np.save(folder / "images.npy", images.numpy())
    np.save(folder / "expected.npy", expected.numpy())


@pytest.mark.slow
def test_every_way_out_gives_the_probes_features_in_a_process_without_this_project(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = {"all": load_encoder(small).encoder}
    shutil.copytree(small, tmp_path / "all")  # where it was written plays no part
    encoders["cifar"] = write_run(tmp_path / "1", "resnet18").encoder
    main(Options(tmp_path / "1", tmp_path / "cifar", program=False))
    encoders["original"] = write_run(tmp_path / "2", "resnet18", "original").encoder
    main(Options(tmp_path / "2", tmp_path / "original", program=False))
    larger = write_run(tmp_path / "3", "small_resnet_w8").encoder
    main(Options(tmp_path / "3", tmp_path / "larger", onnx="no", image_size=24))
    own = Own().eval()
    monkeypatch.setitem(_registry._model_entrypoints, "of_my_own", lambda **_: own)
    write_run(tmp_path / "4", "of_my_own", "original")
    main(Options(tmp_path / "4", tmp_path / "own", onnx="no"))
    monkeypatch.undo()
    for name, encoder in (encoders | {"own": own}).items():
        expect(tmp_path / name, encoder)
    expect(tmp_path / "larger", larger, size=24)

    names = ["all", "cifar", "original", "own", "larger"]
    words = [Path(__file__).with_name("clean_process.py"), ROOT, *(tmp_path / name for name in names)]
    command = [sys.executable, "-I", *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    compared = json.loads(done.stdout)
    refusal = compared["own"].pop()
    assert "timm has no model named 'of_my_own'" in refusal
    assert "torch.export.load('encoder.pt2').module() needs no code" in refusal
    assert compared == {
        "all": ["encoder.pt2", "encoder.onnx", "model(x)", "hub"],
        "cifar": ["model(x)", "hub"],
        "original": ["model(x)", "local-dir", "hub"],
        "own": ["encoder.pt2"],
        "larger": ["encoder.pt2", "model(x)", "hub"],
    }


def test_the_card_states_what_was_measured_on_these_weights_and_how(small: Path) -> None:
    text = (small / CARD).read_text(encoding="utf-8")
    data: Any = huggingface_hub.ModelCard(text).data
    assert (data.license, data.pipeline_tag, data.get("library_name")) == ("mit", "image-feature-extraction", None)
    assert {"timm", "simclr", "arxiv:2002.05709"} <= set(data.tags or ())
    for part in (
        "| pretrained encoder | 75.54 | 76.54 |",
        "| raw pixels | 39.00 | – |",
        "chosen on 2 of the 7 training images",
        "lossy compression",
        "A note.",
        "measured on other weights than these: probe-earlier",
        "held-out training images: 61.25 %",
        "on a GPU, 2026-01-01, commit abc: `python train.py`",
    ):
        assert part in text
    assert "99.99" not in text


def test_config_says_what_each_file_takes_and_gives(small: Path) -> None:
    config = json.loads((small / CONFIG).read_text(encoding="utf-8"))
    assert "architecture" not in config  # timm would build another network
    about = config["simclr"]
    assert (about["image_size"], about["representation_dim"], about["encoder"]) == (16, 24, "small_resnet_w8_d24")
    assert about[f"{PROGRAM}, {ONNX}"].startswith("uint8 (batch, 16, 16, 3), RGB")
    assert about[WEIGHTS].startswith("float32 (batch, 3, 16, 16), RGB")


def test_a_checkpoint_without_a_probe_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_run(tmp_path, "small_resnet_w8")
    main(Options(tmp_path / checkpoint.BEST, tmp_path / "out", program=False))
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert "Nothing was measured on test images" in text
    assert "encoder.pt2" not in text
    with torch.no_grad():
        found = load_encoder(tmp_path / "out")
        assert torch.equal(found.encoder(X), model.encoder(X))
    assert not any(module.training for module in found.encoder.modules())
    assert (found.image_size, found.normalisation) == (16, FACTS.normalisation)
    assert "step 12, 32 numbers an image" in capsys.readouterr().out


def test_what_is_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "small_resnet_w8")
    path = main(Options(tmp_path, program=False)) / WEIGHTS
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[-3] ^= 1  # in a weight: safetensors itself does not notice
    for content, message in ((bytes(damaged), "damaged"), (good[:-1], "cannot be read"), (b"", "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_encoder(path.parent)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"not written by simclr.export: its metadata lacks \['encoder'"):
        load_encoder(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_encoder(tmp_path / "nothing")


def test_onnx_without_its_packages_is_said_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    write_run(tmp_path, "small_resnet_w8")
    with pytest.raises(CheckpointError, match=r"encoder.onnx needs onnxscript: pip install .simclr\[export\]"):
        main(Options(tmp_path, onnx="yes"))
    assert not (tmp_path / "encoder").exists()
    main(Options(tmp_path))
    assert "encoder.onnx was not written, as onnxscript are missing: pip install" in capsys.readouterr().out
    assert not (tmp_path / "encoder" / ONNX).exists()
    assert (tmp_path / "encoder" / PROGRAM).exists()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="needs the program too"):
        main(Options(tmp_path, onnx="yes", program=False))


def by_hand(h: Tensor) -> Tensor:
    return h + 1 if bool((h.sum() > 0).item()) else h


def otherwise_when_traced(h: Tensor) -> Tensor:
    return h + 1 if torch.compiler.is_compiling() else h


@pytest.mark.parametrize(
    ("tracing", "message"),
    [
        (by_hand, "torch.export cannot make a program of this encoder .*--no-program"),
        (otherwise_when_traced, "encoder.pt2 does not give the encoder's representations of 1 images"),
    ],
)
def test_a_file_that_would_be_wrong_is_not_written_and_the_earlier_export_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracing: Callable[[Tensor], Tensor], message: str
) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / CONFIG).write_text("earlier")
    monkeypatch.setitem(_registry._model_entrypoints, "of_my_own", lambda **_: Own(tracing).eval())
    write_run(tmp_path, "of_my_own", "original")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        main(Options(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "encoder" / CONFIG).read_text() == "earlier"
    main(Options(tmp_path, program=False))
    assert (tmp_path / "encoder" / CONFIG).read_text() != "earlier"


def test_what_others_put_there_is_not_replaced(tmp_path: Path) -> None:
    write_run(tmp_path, "small_resnet_w8")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds other files than an export's, such as notes.txt, simclr_best"):
        main(Options(tmp_path, tmp_path))
    with pytest.raises(CheckpointError, match="is a file"):
        main(Options(tmp_path, tmp_path / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no simclr_best_epoch\.pt"):
        main(Options(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "stem", "expected"),
    [
        ("resnet18_d40", "patch2", "model.layer4.append(nn.Sequential(nn.Conv2d(512, 40, 1, bias=False)"),
        ("mobilenetv3_small_050", "cifar", "model.conv_stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)"),
        ("vit_tiny_patch16_224", "auto", '("vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=2)'),
    ],
)
def test_timm_alone_builds_it(name: str, stem: Stem, expected: str) -> None:
    encoder = make_encoder(name, stem, 16).eval()
    found = timm_alone(encoder, name, X)
    assert found is not None
    assert expected in found.lines
    assert (found.call is not None) == (stem == "auto")
    names: dict[str, Any] = {}
    exec(found.lines, names)
    names["model"].load_state_dict(encoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(X), encoder(X))


def test_lines_that_would_build_another_network_are_not_handed_out() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_encoder("small_resnet_w8", "cifar", 16)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x) + 1
            return result

    assert timm_alone(Shifted().eval(), "small_resnet_w8", X) is None
    # The same parts and weights, and another way through them
    encoder = make_encoder("small_resnet_w8", "cifar", 16).eval()
    encoder.register_forward_hook(lambda module, inputs, output: output + 1)
    assert timm_alone(encoder, "small_resnet_w8", X) is None
