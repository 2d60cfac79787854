"""Embeddings of a folder are the probe's features, by file name, whatever interrupts; odd input is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.convert import ConversionError, Storage
from data_prep.find import find
from data_prep.image_folder import convert_found
from simclr import beton
from simclr.beton import Facts
from simclr.data import open_images
from simclr.embed import Journal, Options, main
from simclr.evaluation import extract_features
from simclr.export import Options as ExportOptions
from simclr.export import main as export
from simclr.run.checkpoint import load_pretrained
from tests.helpers import ROOT
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


def test_after_an_interruption_anywhere_only_the_rest_is_computed(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = draw(tmp_path / "photos")
    main(Options(run, photos, tmp_path / "whole.npy"))
    (photos / "cat" / "bad.jpg").write_bytes(b"no image")
    options = Options(run, photos, tmp_path / "a.npy", batch_size=4)
    with pytest.raises(ValueError, match="1 unreadable images"):
        main(options)  # all are computed, and kept
    partial = tmp_path / "a.npy.partial"
    (photos / "cat" / "bad.jpg").unlink()
    kept = {path.name: path.read_bytes() for path in partial.iterdir()}
    lines = kept["files.jsonl"]
    for cut in (0, 1, len(lines) // 2, len(lines) - 1):
        whole = lines[:cut].count(b"\n")
        partial.mkdir(exist_ok=True)
        for name, content in kept.items():
            (partial / name).write_bytes(content)
        (partial / "files.jsonl").write_bytes(lines[:cut])  # the line under way is cut off; its numbers may be there
        capsys.readouterr()
        main(options)
        text = capsys.readouterr().out
        assert f"computed:   {9 - whole} images" in text
        assert (f"resumed:    {whole} images" in text) == (whole > 0)
        assert not partial.exists()
        assert read_npy(tmp_path / "a.npy")[0] == read_npy(tmp_path / "whole.npy")[0]
        np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "whole.npy"), rtol=1e-4, atol=1e-5)
        (tmp_path / "a.npy").unlink()

    # Twice: what goes on behind a line that was cut off can be gone on from again
    partial.mkdir()
    for name, content in kept.items():
        (partial / name).write_bytes(content[:-3] if name == "files.jsonl" else content)
    (photos / "cat" / "bad.jpg").touch()
    with pytest.raises(ValueError, match="1 unreadable images"):
        main(options)
    (photos / "cat" / "bad.jpg").unlink()
    capsys.readouterr()
    main(options)
    assert "resumed:    9 images" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "whole.npy"), rtol=1e-4, atol=1e-5)
    (tmp_path / "a.npy").unlink()

    # Numbers that were cut off, too; a file that is another one now; and one more
    for name, content in kept.items():
        partial.mkdir(exist_ok=True)
        (partial / name).write_bytes(content[:-7] if name == "rows.f32" else content)
    Image.fromarray(noise(99, 30, 30)).save(photos / "cat" / "grey.png")
    Image.fromarray(noise(98, 30, 30)).save(photos / "first.png")
    main(options)
    assert "computed:   3 images" in capsys.readouterr().out
    main(Options(run, photos, tmp_path / "b.npy"))
    assert read_npy(tmp_path / "a.npy")[0] == read_npy(tmp_path / "b.npy")[0]
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_killed_process_is_gone_on_from(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = draw(tmp_path / "photos", 400)
    output = tmp_path / "a.parquet"
    words = ["--run", run, "--images", photos, "--output", output, "--batch-size", "4"]
    process = subprocess.Popen([sys.executable, "-m", "simclr.embed", *map(str, words)], cwd=ROOT)
    journal = tmp_path / "a.parquet.partial" / "files.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.stat().st_size < 500:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    main(Options(run, photos, output))
    assert "resumed:    " in capsys.readouterr().out
    main(Options(run, photos, tmp_path / "whole.parquet"))
    names, features = read_parquet(output)
    whole_names, whole = read_parquet(tmp_path / "whole.parquet")
    assert names == whole_names
    np.testing.assert_allclose(features, whole, rtol=1e-4, atol=1e-5)


def test_unreadable_files_are_all_named_and_left_out_only_if_asked(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = draw(tmp_path / "photos", 3)
    (photos / "bad.png").write_bytes(b"no image")
    (photos / "dog" / "0.jpg").symlink_to(tmp_path / "gone.jpg")
    output = tmp_path / "a.parquet"
    with pytest.raises(
        ValueError, match=r"(?s)2 unreadable images.*bad.png: cannot identify.*dog/0.jpg: .*--unreadable"
    ):
        main(Options(run, photos, output))
    assert not output.exists()
    bad = tmp_path / "a.parquet.unreadable.txt"
    assert bad.read_text().count("\n") == 2
    main(Options(run, photos, output, unreadable="skip"))
    names, _ = read_parquet(output)
    assert names == ["cat/0.jpg", "cat/grey.png", "dog/2.jpg", "dog/deep.png", "dog/old/1.jpg"]
    assert f"2 files that cannot be read, listed in {bad}" in capsys.readouterr().out
    for name in ("bad.png", "dog/0.jpg"):
        (photos / name).unlink()
    main(Options(run, photos, output, force=True))
    assert not bad.exists()
    assert len(read_parquet(output)[0]) == 5


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_an_output_that_is_there_stays_unless_replacing_is_asked_for(
    tmp_path: Path, run: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, output = draw(tmp_path / "photos", 1), tmp_path / f"a.{kind}"
    options = Options(run, photos, output)
    main(options)
    before = output.read_bytes()
    capsys.readouterr()
    main(options)
    assert "already there, of the same 3 images and the same encoder" in capsys.readouterr().out
    write_run(tmp_path / "other", "small_resnet_w8", "patch2")
    for other in (Options(tmp_path / "other", photos, output), Options(run, photos, output, image_size=24)):
        with pytest.raises(
            ValueError, match="already there, of other images or another encoder; replace it with --for"
        ):
            main(other)
    output.with_suffix(".json" if kind == "npy" else ".parquet").write_bytes(b"{}")  # of another program
    with pytest.raises(ValueError, match="already there, of other images"):
        main(options)
    main(Options(run, photos, output, force=True))
    assert output.read_bytes() == before
    assert main(options) == output


def test_a_partial_result_of_another_encoder_or_in_another_process_is_not_gone_on_from(
    tmp_path: Path, run: Path
) -> None:
    photos = draw(tmp_path / "photos", 1)
    (photos / "bad.png").touch()
    options = Options(run, photos, tmp_path / "a.npy")
    with pytest.raises(ValueError, match="unreadable"):
        main(options)
    write_run(tmp_path / "other", "small_resnet_w8", "patch2")
    with pytest.raises(ValueError, match=r"a.npy.partial was begun with another encoder_sha256; .* --force"):
        main(Options(tmp_path / "other", photos, tmp_path / "a.npy"))
    job: dict[str, Any] = json.loads((tmp_path / "a.npy.partial" / "job.json").read_text())
    with Journal.open(tmp_path / "a.npy.partial", job, width=32, anew=False) as journal:
        assert len(journal.done) == 3
        with pytest.raises(ValueError, match="another process is writing"):
            main(options)
    (photos / "bad.png").unlink()
    main(Options(tmp_path / "other", photos, tmp_path / "a.npy", force=True))
    assert len(np.load(tmp_path / "a.npy")) == 3


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
