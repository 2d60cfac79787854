from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional as F

from data_prep import shapes
from data_prep.__main__ import main
from data_prep.shapes import CLASSES, draw
from simclr import beton
from tests.helpers import library_knn


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["shapes", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_an_image_depends_on_seed_split_and_index_alone() -> None:
    images, labels = draw(3, "train", 0, 60)
    for start, stop in ((0, 1), (1, 20), (13, 14), (17, 60)):
        again, again_labels = draw(3, "train", start, stop)
        np.testing.assert_array_equal(again, images[start:stop])
        np.testing.assert_array_equal(again_labels, labels[start:stop])
    others = [draw(4, "train", 0, 60)[0], draw(3, "test", 0, 60)[0]]
    for i, image in enumerate(images):
        assert not any((image == other).all() for group in others for other in group)
        assert not any((image == other).all() for other in images[:i])


def test_a_longer_data_set_begins_with_the_shorter_one() -> None:
    def first(n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images, labels = zip(*shapes.shapes(0, "train", n).chunks(), strict=True)
        return np.concatenate(images), np.concatenate(labels)

    images, labels = first(2010)
    assert images.shape == (2010, 32, 32, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(first(1003)[0], images[:1003])
    assert np.bincount(labels).tolist() == [201] * 10


def test_the_drawing_has_not_changed() -> None:
    # If this changes, results on the shapes are not comparable any more: raise shapes.VERSION.
    images, labels = draw(0, "train", 0, 100)
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.tobytes()).hexdigest()
    assert (shapes.VERSION, digest) == (1, "97fb002f45c5e192810a7f00c4c6ba3eba6928f39fb757e836d3126710332716")


def test_all_kinds_have_the_same_area_so_that_it_tells_nothing() -> None:
    y, x = shapes._grid(1000)
    for name, (is_inside, factor) in shapes._KINDS.items():
        inside = is_inside(2 * x + 0 * y, 2 * y + 0 * x)  # a square of side 4
        assert not inside[[0, -1]].any(), name
        assert not inside[:, [0, -1]].any(), name
        area = 16 * inside.mean() * factor**2
        assert area == pytest.approx(np.pi, rel=0.03), name


def test_raw_pixels_fail() -> None:
    (train, train_labels), (test, test_labels) = draw(0, "train", 0, 4000), draw(0, "test", 0, 1000)
    mean, std = train.mean(axis=(0, 1, 2)), train.std(axis=(0, 1, 2))
    x, q = (((images - mean) / std).reshape(len(images), -1).astype(np.float32) for images in (train, test))

    assert 10 < 100 * library_knn(20, 0.1).fit(x, train_labels).score(q, test_labels) < 30

    targets = np.eye(10, dtype=np.float32)[train_labels] - 0.1
    gram = x.T @ x / len(x)
    weights = np.linalg.solve(gram + np.eye(len(gram), dtype=np.float32), x.T @ targets / len(x))
    assert 100 * ((q @ weights).argmax(axis=1) == test_labels).mean() < 30


@pytest.mark.slow
def test_a_small_convolutional_network_succeeds() -> None:
    torch.manual_seed(0)
    (train, train_labels), (test, test_labels) = draw(0, "train", 0, 6000), draw(0, "test", 0, 1000)
    x, q = ((torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1) for images in (train, test))
    y = torch.from_numpy(train_labels)

    def block(width_in: int, width_out: int, kernel: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(width_in, width_out, kernel, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(width_out), nn.ReLU()]

    layers = [*block(3, 16, 4, 2), *block(16, 32, 3, 1), *block(32, 48, 3, 2), *block(48, 64, 3, 1)]
    layers += [*block(64, 96, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-3)
    epochs, steps = 6, len(x) // 100
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).view(steps, 100):
            images = x[batch] if torch.rand(()) < 0.5 else x[batch].flip(3)
            optimizer.zero_grad()
            F.cross_entropy(network(images), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        predicted = network(q).argmax(1).numpy()
    assert 100 * (predicted == test_labels).mean() > 85


def test_the_command_writes_both_splits_and_knows_them_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--output", tmp_path / "out", "--num-train", 230, "--num-test", 40)
    code, text = run(capsys, *sizes, "--preview", tmp_path / "preview.png")
    assert code == 0, text
    for split, n in (("train", 230), ("test", 40)):
        images, labels = beton.read(tmp_path / "out" / f"{split}.beton")
        expected, expected_labels = draw(0, split, 0, n)
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, expected_labels)
        facts = beton.verify(tmp_path / "out" / f"{split}.beton")
        assert facts.classes == CLASSES
        assert facts.source == "built-in shapes, drawing version 1, seed 0"
        assert facts.class_counts == (n // 10,) * 10
    with Image.open(tmp_path / "preview.png") as picture:
        pixels = np.asarray(picture)
    column, row = 2, 7
    corner = pixels[96 * row : 96 * (row + 1) : 3, 80 + 96 * column : 80 + 96 * (column + 1) : 3]
    np.testing.assert_array_equal(corner, draw(0, "train", 0, 30)[0][10 * column + row])

    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    code, text = run(capsys, *sizes)
    assert code == 0
    assert text.count("already there and intact") == 2
    code, text = run(capsys, *sizes, "--seed", 1)
    assert code == 1
    assert "differs" in text
    assert "--force" in text
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", -1), "--seed must be 0 or above"),
        (("--num-train", 9), "train needs at least 10 images"),
        (("--num-test", 0), "test needs at least 10 images"),
    ],
)
def test_impossible_arguments_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    code, text = run(capsys, "--output", tmp_path / "out", *options)
    assert code == 1
    assert message in text
    assert not (tmp_path / "out").exists()


def test_a_preview_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--output", tmp_path / "out", "--num-train", 20, "--num-test", 20)
    for name in ("missing/preview.png", "preview.unknown"):
        code, text = run(capsys, *sizes, "--preview", tmp_path / name)
        assert code == 1
        assert "cannot write" in text
