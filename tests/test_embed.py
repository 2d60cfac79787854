"""Embeddings of a folder are the probe's features, by file name, all or none; odd input is named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import simclr.embed
from data_prep.convert import ConversionError, Storage
from data_prep.find import find
from data_prep.image_folder import convert_found
from simclr import beton
from simclr.beton import Facts
from simclr.data import open_images
from simclr.embed import Options, main
from simclr.evaluation import extract_features
from simclr.export import Options as ExportOptions
from simclr.export import main as export
from simclr.run.checkpoint import load_pretrained
from tests.test_data_prep import noise
from tests.test_export import write_run

SIDE = 16


def draw(folder: Path, number: int = 7, *, size: tuple[int, int] = (20, 28)) -> Path:
    """Images in nested folders: turned by EXIF, grey, of 16 bits, and of other sizes among them."""
    for below in ("cat", "dog/old"):
        (folder / below).mkdir(parents=True)
    for i in range(number):
        below = ("cat", "dog/old", "dog")[i % 3]
        image, exif = Image.fromarray(noise(i, *size)), Image.Exif()
        exif[0x0112] = 1 + i % 8
        image.save(folder / below / f"{i}.jpg", exif=exif)
    Image.fromarray(noise(50, 40, 30)).convert("L").save(folder / "cat" / "grey.png")
    Image.fromarray(noise(51, 30, 17).astype(np.uint16)[..., 0] * 200).save(folder / "dog" / "deep.png")
    return folder


def read_parquet(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == ["file", "feature"]
    features = table["feature"].combine_chunks()
    return table["file"].to_pylist(), features.flatten().to_numpy().reshape(len(features), -1)


def read_npy(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return about["files"], np.load(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, "small_resnet_w8")
    return folder


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_they_are_the_probes_features_of_the_converted_images(
    tmp_path: Path, encoding: Literal["raw", "jpeg"], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = draw(tmp_path / "photos")
    (photos / ".hidden.png").write_bytes((photos / "cat" / "grey.png").read_bytes())
    convert_found(find(photos), tmp_path / "train.beton", SIDE, "refuse", Storage(encoding, jpeg_quality=60))
    facts: Facts = beton.load_facts(tmp_path / "train.beton")
    write_run(tmp_path / "run", "small_resnet_w8", **{f: getattr(facts, f) for f in Facts.__dataclass_fields__})
    probed = load_pretrained(tmp_path / "run")
    with open_images(tmp_path / "train.beton", backend="memory") as source:
        every = np.arange(facts.num_images)
        features = {size: extract_features(probed.model.encoder, source, every, size=size) for size in (None, 24)}
    expected = {size: found.representation.numpy() for size, found in features.items()}
    in_order = [str(path.relative_to(photos)) for path in find(photos).splits["photos"].paths]

    main(Options(tmp_path / "run", photos, tmp_path / "a.parquet"))
    names, found = read_parquet(tmp_path / "a.parquet")
    assert names == sorted(in_order)
    by_name = dict(zip(names, found, strict=True))
    np.testing.assert_allclose(np.stack([by_name[name] for name in in_order]), expected[None], rtol=1e-5, atol=1e-6)
    text = capsys.readouterr().out
    for part in ("9 images, 32 numbers each", "turned upright", "converted to RGB from mode L", "more than 8 bits"):
        assert part in text
    assert "1 images with hidden names" in text

    # The converted file itself: the same by number, to the bit, as all are one batch in either case
    main(Options(tmp_path / "run", tmp_path / "train.beton", tmp_path / "c.npy"))
    names, found = read_npy(tmp_path / "c.npy")
    assert names == [f"{name.split('/')[0]}/{i}" for i, name in enumerate(in_order)]
    np.testing.assert_array_equal(found, expected[None])

    # Another side, other batches, and an export in place of the run
    export(ExportOptions(tmp_path / "run", tmp_path / "out", program=False))
    main(Options(tmp_path / "out", photos, tmp_path / "b.npy", batch_size=2, image_size=24))
    names, found = read_npy(tmp_path / "b.npy")
    by_name = dict(zip(names, found, strict=True))
    np.testing.assert_allclose(np.stack([by_name[name] for name in in_order]), expected[24], rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["photos", "train.beton", "train.beton.json", "run", "out", "a.parquet", "b.npy", "b.json", "c.npy", "c.json"]
    )


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_what_breaks_off_leaves_the_output_that_was_there_and_nothing_else(
    tmp_path: Path, run: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, output = draw(tmp_path / "photos"), tmp_path / f"a.{kind}"
    main(Options(run, photos, output))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    whole, calls = simclr.embed.embed, []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(simclr.embed, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(Options(run, photos, output, batch_size=3, image_size=24, force=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_unreadable_files_are_all_named_and_left_out_only_if_asked(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = draw(tmp_path / "photos", 3)
    (photos / "bad.png").write_bytes(b"no image")
    (photos / "dog" / "0.jpg").symlink_to(tmp_path / "gone.jpg")
    output = tmp_path / "a.npy"
    with pytest.raises(
        ValueError, match=r"(?s)2 unreadable images.*bad.png: cannot identify.*dog/0.jpg: .*--unreadable"
    ):
        main(Options(run, photos, output))
    assert not output.exists()
    bad = tmp_path / "a.npy.unreadable.txt"
    assert bad.read_text().count("\n") == 2
    main(Options(run, photos, output, unreadable="skip"))
    names, features = read_npy(output)
    assert names == ["cat/0.jpg", "cat/grey.png", "dog/2.jpg", "dog/deep.png", "dog/old/1.jpg"]
    assert len(features) == 5
    assert f"2 files that cannot be read, listed in {bad}" in capsys.readouterr().out
    for name in ("bad.png", "dog/0.jpg"):
        (photos / name).unlink()
    main(Options(run, photos, output, force=True))
    assert not bad.exists()
    assert len(read_npy(output)[0]) == 5


def test_an_output_that_is_there_stays_unless_replacing_is_asked_for(tmp_path: Path, run: Path) -> None:
    photos, output = draw(tmp_path / "photos", 1), tmp_path / "a.npy"
    main(Options(run, photos, output))
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"a\.npy is already there; replace it with --force, or choose another"):
        main(Options(run, photos, output, image_size=24))
    assert output.read_bytes() == before
    main(Options(run, photos, output, image_size=24, force=True))
    assert output.read_bytes() != before


def test_names_in_any_bytes_and_bad_input(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"caf\xe9.png", '猫, "1".png'.encode()):
        Image.fromarray(noise(1)).save(photos / os.fsdecode(name))
    main(Options(run, photos, tmp_path / "a.parquet"))
    assert read_parquet(tmp_path / "a.parquet")[0] == ["caf\\xe9.png", '猫, "1".png']
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "film.mov").touch()
    convert_found(find(photos), tmp_path / "larger.beton", 24, "refuse", Storage())
    for options, message in (
        (Options(run, photos, tmp_path / "a.csv"), "expected a file ending in .parquet or .npy"),
        (Options(run, photos, photos), "expected a file ending"),
        (Options(run, tmp_path / "none", tmp_path / "b.npy"), "is not a folder"),
        (Options(run, empty, tmp_path / "b.npy"), r"no images that can be taken, only: 1 videos: .*\.mov"),
        (Options(tmp_path / "none", photos, tmp_path / "b.npy"), "none"),
        (Options(run, photos, tmp_path / "b.npy", device="cuda:77"), "--device cuda:77: "),
        (Options(run, tmp_path / "none.beton", tmp_path / "b.npy"), r"none\.beton"),
        (Options(run, tmp_path / "larger.beton", tmp_path / "b.npy"), "24 x 24 pixels, but the encoder takes 16 x 16"),
    ):
        with pytest.raises((ValueError, ConversionError), match=message):
            main(options)
    assert not list(tmp_path.glob("b.npy*"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="needs pyarrow: pip install"):
        main(Options(run, photos, tmp_path / "c.parquet"))
