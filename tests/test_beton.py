from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from simclr import beton
from simclr.beton import BetonError, Writer
from simclr.data import open_images
from tests.helpers import ROOT, run_on_small_disk, run_python

HAS_FFCV = importlib.util.find_spec("ffcv") is not None
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and limits")

# The format by its offsets, written down once more and independently of simclr.beton.
HEADER, DESCRIPTOR, METADATA, ALLOCATION = 24, 1 + 16 + 1024, 24, 24
FIRST_METADATA = HEADER + 2 * DESCRIPTOR
N = 64
PAGE = 1 << 21


def make_arrays(n: int = N, size: int = 32, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return images, generator.integers(0, 10, n)


def smooth_images(n: int, height: int, width: int) -> NDArray[np.uint8]:
    """Images that JPEG stores nearly unchanged."""
    y, x = np.mgrid[0:height, 0:width]
    phase = np.arange(n)[:, None, None, None] + np.arange(3)
    waves: NDArray[np.float64] = 127 + 100 * np.sin(0.1 * (x + 2 * y)[None, :, :, None] + phase)
    return waves.astype(np.uint8)


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("shape", [(32, 32), (1, 1), (7, 50), (96, 96)])
def test_raw_images_come_back_exactly(tmp_path: Path, shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (700, *shape, 3), dtype=np.uint8)
    labels = generator.integers(-1, 5, 700)
    facts = beton.write(tmp_path / "a.beton", images, labels, classes=list("abcde"))
    images_read, labels_read = beton.read(tmp_path / "a.beton")
    assert images_read.dtype == np.uint8
    assert labels_read.dtype == np.int64
    np.testing.assert_array_equal(images_read, images)
    np.testing.assert_array_equal(labels_read, labels)
    assert beton.load_facts(tmp_path / "a.beton") == facts == beton.verify(tmp_path / "a.beton")
    assert not facts.is_labelled


def test_jpeg_streams_come_back_as_pillow_decodes_them(tmp_path: Path) -> None:
    images, labels = smooth_images(30, 40, 56), np.arange(30) % 3
    facts = beton.write(tmp_path / "a.beton", images, labels, encoding="jpeg", jpeg_quality=95)
    assert (facts.encoding, facts.jpeg_quality) == ("jpeg", 95)
    images_read, labels_read = beton.read(tmp_path / "a.beton")
    streams = [beton.encode_jpeg(image, 95) for image in images]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(stream))) for stream in streams])
    np.testing.assert_array_equal(images_read, expected)
    np.testing.assert_array_equal(labels_read, labels)
    assert np.abs(images_read.astype(int) - images).mean() < 3


def test_facts_agree_with_float64_arithmetic(tmp_path: Path) -> None:
    images, labels = make_arrays(300)
    labels[:3] = -1
    classes = [f"c{i}" for i in range(11)]
    path = tmp_path / "a.beton"
    facts = beton.write(path, images, labels, source="noise", split="test", classes=classes, lossy_source=True)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(facts.channel_mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(facts.channel_std, scaled.std((0, 1, 2)), rtol=1e-12)
    assert facts.normalisation == (facts.channel_mean, facts.channel_std)
    assert facts.class_counts == tuple(int((labels == i).sum()) for i in range(11))
    assert (facts.num_images, facts.height, facts.width, facts.num_classes) == (300, 32, 32, 11)
    assert (facts.source, facts.split, facts.lossy_source) == ("noise", "test", True)
    assert facts.file_bytes == (tmp_path / "a.beton").stat().st_size


def test_a_constant_channel_has_no_normalisation(tmp_path: Path) -> None:
    images, labels = make_arrays()
    images[..., 1] = 77
    facts = beton.write(tmp_path / "a.beton", images, labels)
    assert facts.channel_std[1] == 0
    with pytest.raises(BetonError, match=r"have the same green, .* Convert images whose three channels vary"):
        _ = facts.normalisation


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_same_content_gives_the_same_bytes_however_it_is_added(tmp_path: Path, encoding: beton.Encoding) -> None:
    images, labels = make_arrays(1500)
    facts = beton.write(tmp_path / "a.beton", images, labels, encoding=encoding)
    with Writer(tmp_path / "b.beton", num_images=1500, height=32, width=32, encoding=encoding) as writer:
        for start, stop in ((0, 1), (1, 700), (700, 700), (700, 1500)):
            if encoding == "raw":
                writer.add(images[start:stop], labels[start:stop])
            else:
                writer.add_jpeg([beton.encode_jpeg(i, 90) for i in images[start:stop]], labels[start:stop])
        quality = 90 if encoding == "jpeg" else None
        again = writer.finish(source=facts.source, split="train", classes=facts.classes, jpeg_quality=quality)
        writer.commit()
    assert again == facts
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert (
        beton.sidecar_path(tmp_path / "a.beton").read_bytes() == beton.sidecar_path(tmp_path / "b.beton").read_bytes()
    )


# ------------------------------------------------------------------------------------------- FFCV's own reading


@pytest.fixture(scope="module")
def ffcv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our files read by FFCV, and FFCV's own files; all by one process, as importing ffcv takes seconds."""
    if not HAS_FFCV:
        pytest.skip("ffcv is not installed; it would read our files and write files for us to read")
    folder = tmp_path_factory.mktemp("ffcv")
    images, labels = make_arrays(1500)
    np.savez(folder / "noise.npz", images=images, labels=labels)
    labels[::7] = -1
    beton.write(folder / "ours.beton", images, labels)
    beton.write(folder / "ours-jpeg.beton", smooth_images(200, 48, 64), np.arange(200), encoding="jpeg")
    writes = [
        f"write:{folder}/noise.npz:{folder}/{mode}-{workers}.beton:{mode}:{workers}"
        for mode, workers in (("raw", 1), ("raw", 3), ("jpg", 1), ("jpg", 3))
    ]
    reads = [f"read:{folder}/ours.beton:{folder}/ours.npz", f"read-jpeg:{folder}/ours-jpeg.beton:{folder}/jpeg.npz"]
    result = run_python("-m", "tests.ffcv_reference", *writes, *reads)
    assert result.returncode == 0, result.stderr
    return folder


def test_ffcv_reads_our_raw_file(ffcv_folder: Path) -> None:
    images, labels = make_arrays(1500)
    labels[::7] = -1
    with np.load(ffcv_folder / "ours.npz") as read:
        np.testing.assert_array_equal(read["images"], images)
        np.testing.assert_array_equal(read["labels"], labels)


def test_ffcv_reads_our_jpeg_file(ffcv_folder: Path) -> None:
    if not (ffcv_folder / "jpeg.npz").exists():
        pytest.skip("this ffcv was built without libjpeg-turbo; it would decode our JPEG streams")
    with np.load(ffcv_folder / "jpeg.npz") as read:
        np.testing.assert_array_equal(read["labels"], np.arange(200))
        # FFCV asks libjpeg-turbo for its fast, less exact inverse transform; Pillow does not.
        difference = np.abs(read["images"].astype(int) - beton.read(ffcv_folder / "ours-jpeg.beton")[0])
        assert difference.max() <= 16
        assert difference.mean() < 2


def test_our_file_is_byte_for_byte_ffcvs_but_for_the_checksum(tmp_path: Path, ffcv_folder: Path) -> None:
    beton.write(tmp_path / "ours.beton", *make_arrays(1500))
    ours = bytearray((tmp_path / "ours.beton").read_bytes())
    start = HEADER + 1 + 16  # the image field's arguments, which FFCV leaves empty and ignores
    assert ours[start : start + 15] == b"content-sha256:"
    ours[start : start + 1024] = bytes(1024)
    assert bytes(ours) == (ffcv_folder / "raw-1.beton").read_bytes()


@pytest.mark.parametrize("name", ["raw-1", "raw-3", "jpg-1", "jpg-3"])
def test_we_read_what_ffcvs_writer_wrote(tmp_path: Path, ffcv_folder: Path, name: str) -> None:
    images, labels = make_arrays(1500)
    path = Path(shutil.copy(ffcv_folder / f"{name}.beton", tmp_path))
    with pytest.raises(BetonError, match="python -m data_prep sidecar"):
        beton.load_facts(path)
    facts = beton.describe(path, source="FFCV", split="train", classes=[str(i) for i in range(10)])
    beton.save_facts(path, facts)
    assert beton.verify(path) == facts
    images_read, labels_read = beton.read(path)
    np.testing.assert_array_equal(labels_read, labels)
    if facts.encoding == "raw":  # the checksum of the content does not depend on the layout of the pages
        np.testing.assert_array_equal(images_read, images)
        ours = beton.write(tmp_path / "ours.beton", images, labels)
        assert facts.content_sha256 == ours.content_sha256
        assert facts.tables_sha256 != ours.tables_sha256
    else:
        error = np.abs(images_read.astype(int) - images).mean()
        other = np.abs(images_read.astype(int) - images[::-1]).mean()
        assert error < 50 < 70 < other  # JPEG keeps little of noise, but enough to tell images apart


# ------------------------------------------------------------------------------------------------------- damage


def table_offset(data: bytes | bytearray) -> int:
    return int(struct.unpack_from("<Q", data, 16)[0])


def metadata(i: int, field: str) -> int:
    return FIRST_METADATA + i * METADATA + {"mode": 0, "width": 1, "height": 3, "offset": 5, "label": 16}[field]


def allocation_5(data: bytearray) -> int:
    return table_offset(data) + 5 * ALLOCATION


Change = tuple[Callable[[bytearray], int], str, int]  # where a number lies, its form, its new value
DAMAGES: dict[str, tuple[str, list[Change]]] = {
    "version": ("not a .beton file of version 2", [(lambda _: 0, "H", 3)]),
    "fields": ("not a .beton file of version 2", [(lambda _: 2, "H", 3)]),
    "type": ("not a .beton file of version 2", [(lambda _: HEADER, "B", 3)]),
    "name": ("not a .beton file of version 2", [(lambda _: HEADER + 1, "B", ord("j"))]),
    "no samples": ("do not fit its 0 images", [(lambda _: 8, "Q", 0)]),
    "2^62 samples": ("do not fit its", [(lambda _: 8, "Q", 1 << 62)]),
    "table in the pixels": ("do not fit its 64 images", [(lambda _: 16, "Q", PAGE)]),
    "page size": ("contradict", [(lambda _: 4, "I", 0)]),
    "one height": ("one encoding and one size", [(lambda _: metadata(5, "height"), "H", 65535)]),
    "one mode": ("one encoding and one size", [(lambda _: metadata(5, "mode"), "B", 0)]),
    "one label": ("contradict", [(lambda _: metadata(5, "label"), "q", -2)]),
    "one offset": ("contradict", [(lambda _: metadata(5, "offset"), "Q", PAGE)]),
    "index": ("contradict", [(allocation_5, "Q", 6)]),
    "size": ("contradict", [(lambda data: allocation_5(data) + 16, "Q", 1 << 20)]),
    "beyond the end": (
        "contradict",
        [(lambda _: metadata(5, "offset"), "Q", 1 << 63), (lambda data: allocation_5(data) + 8, "Q", 1 << 63)],
    ),
    "across pages": (
        "contradict",
        [(lambda _: metadata(5, "offset"), "Q", 2 * PAGE - 9), (lambda d: allocation_5(d) + 8, "Q", 2 * PAGE - 9)],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tables_get_no_sidecar(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.beton"
    facts = beton.write(path, *make_arrays())
    data = bytearray(path.read_bytes())
    message, changes = DAMAGES[damage]
    for place, form, value in changes:
        struct.pack_into("<" + form, data, place(data), value)
    path.write_bytes(data)
    with pytest.raises(BetonError, match=rf"a\.beton: .*{message}.*python -m data_prep"):
        beton.describe(path, source="", split="train", classes=facts.classes)
    with pytest.raises(
        BetonError, match=r"a\.beton: .*sha256 of its tables"
    ):  # nor does FFCV, which may hang, see them
        open_images(path, backend="ffcv" if HAS_FFCV else "memory")


@pytest.mark.parametrize("size", [0, 20, HEADER + 100, FIRST_METADATA + 100, PAGE + 5, 2 * PAGE, 2 * PAGE + 24 * N - 1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    facts = beton.write(tmp_path / "a.beton", *make_arrays())
    os.truncate(tmp_path / "a.beton", size)
    with pytest.raises(BetonError, match=r"a\.beton: .*data_prep"):
        beton.describe(tmp_path / "a.beton", source="", split="train", classes=facts.classes)
    for refuse in (beton.check, beton.verify, beton.read, beton.image_digests):
        with pytest.raises(BetonError, match=r"a\.beton: .*sha256 of its tables.*data_prep"):
            refuse(tmp_path / "a.beton")


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_changed_pixels_pass_the_check_and_fail_verification(tmp_path: Path, encoding: beton.Encoding) -> None:
    path = tmp_path / "a.beton"
    facts = beton.write(path, *make_arrays(), encoding=encoding)
    data = bytearray(path.read_bytes())
    offset = int(beton.check(path, facts).offsets[5])
    data[offset : offset + 64] = bytes(64)
    path.write_bytes(data)
    beton.check(path, facts)
    with pytest.raises(BetonError, match="sha256 of its content"):
        beton.verify(path)
    if encoding == "jpeg":
        with pytest.raises(BetonError, match="image 5 is not a readable JPEG"):
            beton.describe(path, source="", split="train", classes=facts.classes)
        with pytest.raises(BetonError, match="image 5 is not a readable JPEG"):
            beton.read(path)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    facts = beton.write(tmp_path / "no.beton", *make_arrays())
    (tmp_path / "no.beton").unlink()
    with pytest.raises(BetonError, match=r"no such file.*python -m data_prep"):
        beton.check(tmp_path / "no.beton", facts)


# ------------------------------------------------------------------------------------------------------ sidecar


def edit_sidecar(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    sidecar = beton.sidecar_path(path)
    entries = json.loads(sidecar.read_text())
    change(entries)
    sidecar.write_text(json.dumps(entries))


BAD_SIDECARS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown entry": (lambda e: e.update(colour="red"), r"Facts has unknown fields \['colour'\]"),
    "missing entry": (lambda e: e.pop("channel_std"), r"Facts has missing fields \['channel_std'\]"),
    "text for a number": (lambda e: e.update(num_images="64"), "num_images"),
    "no images": (lambda e: e.update(num_images=0), "num_images"),
    "encoding": (lambda e: e.update(encoding="png"), "encoding"),
    "quality": (lambda e: e.update(jpeg_quality=101), "jpeg_quality"),
    "mean of 127": (lambda e: e.update(channel_mean=[127, 127, 127]), "channel_mean"),
    "checksum": (lambda e: e.update(content_sha256="0" * 63), "content_sha256"),
}


@pytest.mark.parametrize("name", BAD_SIDECARS)
def test_a_wrong_sidecar_is_refused(tmp_path: Path, name: str) -> None:
    beton.write(tmp_path / "a.beton", *make_arrays())
    change, message = BAD_SIDECARS[name]
    edit_sidecar(tmp_path / "a.beton", change)
    with pytest.raises(BetonError, match=rf"a\.beton\.json.*{message}.*python -m data_prep"):
        beton.load_facts(tmp_path / "a.beton")


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_sidecar_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    beton.write(tmp_path / "a.beton", *make_arrays())
    beton.sidecar_path(tmp_path / "a.beton").write_text(text, encoding="utf-8")
    with pytest.raises(BetonError, match=r"a\.beton\.json.*python -m data_prep"):
        beton.load_facts(tmp_path / "a.beton")


def test_a_sidecar_of_another_file_of_the_same_size_is_refused_without_reading_pixels(tmp_path: Path) -> None:
    images, labels = make_arrays()
    beton.write(tmp_path / "a.beton", images, labels)
    beton.write(tmp_path / "b.beton", 255 - images, labels)
    shutil.copy(tmp_path / "b.beton", tmp_path / "a.beton")
    with pytest.raises(BetonError, match="one of the two belongs to another"):
        beton.check(tmp_path / "a.beton")


@pytest.mark.parametrize("entry", [{"num_images": 65}, {"height": 16}, {"width": 16}, {"encoding": "jpeg"}])
def test_facts_that_differ_from_the_tables_are_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    facts = beton.write(tmp_path / "a.beton", *make_arrays())
    with pytest.raises(BetonError, match="sha256 of its tables"):
        beton.check(tmp_path / "a.beton", replace(facts, **entry))


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    images, _ = make_arrays()
    with pytest.raises(BetonError, match="label 3 is out of range for 3 classes"):
        beton.write(tmp_path / "a.beton", images, np.arange(N) % 4, classes=["a", "b", "c"])
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- what can go wrong


def test_wrong_arguments_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    images, labels = make_arrays()
    path = tmp_path / "a.beton"
    about = beton.About(source="", split="train", classes=[str(i) for i in range(10)])
    with pytest.raises(BetonError, match="uint8"):
        beton.write(path, images.astype(np.float32), labels)
    with pytest.raises(BetonError, match="64 whole numbers"):
        beton.write(path, images, labels[:-1])
    with pytest.raises(BetonError, match="whole numbers"):
        beton.write(path, images, labels / 2)
    with pytest.raises(BetonError, match="-1"):
        beton.write(path, images, labels - 3)
    with pytest.raises(BetonError, match="0 images"):
        beton.write(path, images[:0], labels[:0])
    with pytest.raises(BetonError, match="jpeg_quality"):
        beton.write(path, images, labels, encoding="jpeg", jpeg_quality=0)
    with pytest.raises(BetonError, match="encoding"):
        beton.write(path, images, labels, encoding="png")  # type: ignore[arg-type]
    with Writer(path, num_images=N, height=32, width=32) as writer:
        writer.add(images[:10], labels[:10])
        with pytest.raises(BetonError, match="use add"):
            writer.add_jpeg([b"x"], [0])
        with pytest.raises(BetonError, match="64 images were announced, 10 added"):
            writer.finish(**about)
        with pytest.raises(BetonError, match="before finish"):
            writer.commit()
        with pytest.raises(BetonError, match="74 images added, but 64"):
            writer.add(images, labels)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_before_commit_and_nothing_is_left_without_it(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    old = beton.write(path, *make_arrays(seed=1))
    images, labels = make_arrays(seed=2)
    with Writer(path, num_images=N, height=32, width=32) as writer:
        writer.add(images, labels)
        new = writer.finish(source="", split="train", classes=old.classes)
        assert new.content_sha256 != old.content_sha256
        assert beton.verify(path) == old
    assert beton.verify(path) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.beton", "a.beton.json"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("there is no lock on Windows")
    images, labels = make_arrays()
    with Writer(tmp_path / "a.beton", num_images=N, height=32, width=32) as writer:
        with pytest.raises(BetonError, match="another process is writing"):
            beton.write(tmp_path / "a.beton", images, labels)
        writer.add(images, labels)
        facts = writer.finish(source="", split="train", classes=[str(i) for i in range(10)])
        writer.commit()
    assert beton.verify(tmp_path / "a.beton") == facts


def test_a_disk_that_changes_what_is_written_is_noticed(tmp_path: Path) -> None:
    images, labels = make_arrays(1500)  # more than one page, so that the first is on disk before the end
    with Writer(tmp_path / "a.beton", num_images=1500, height=32, width=32) as writer:
        writer.add(images, labels)
        with (tmp_path / "a.beton.partial").open("r+b") as file:
            file.seek(PAGE + 1000)
            assert file.read(1) == images.reshape(-1)[1000:1001].tobytes()
            file.seek(PAGE + 1000)
            file.write(bytes([images.reshape(-1)[1000] ^ 1]))
        with pytest.raises(BetonError, match="what was read back is not what was written"):
            writer.finish(source="", split="train", classes=[str(i) for i in range(10)])
    assert list(tmp_path.iterdir()) == []


def test_a_crash_between_file_and_sidecar_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.beton"
    beton.write(path, *make_arrays(seed=1))
    images, labels = make_arrays(seed=2)
    rename = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target == beton.sidecar_path(path):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        beton.write(path, images, labels)
    with pytest.raises(BetonError, match=r"no such file.*python -m data_prep"):
        beton.load_facts(path)
    monkeypatch.undo()
    beton.save_facts(path, beton.describe(path, source="", split="train", classes=[str(i) for i in range(10)]))
    np.testing.assert_array_equal(beton.read(path)[0], images)


@pytest.mark.parametrize("broken", ["name", "disk"])
def test_a_sidecar_that_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a.beton"
    old = beton.write(path, *make_arrays(seed=1))
    classes, message = [str(i) for i in range(10)], "the disk is full"
    if broken == "name":
        classes[3], message = os.fsdecode(b"caf\xe9"), r"caf\\udce9.*is not text that UTF-8 can hold"
    else:
        open_file = Path.open

        def full(self: Path, *arguments: Any, **options: Any) -> Any:
            if self.name.startswith(".a.beton.json."):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return open_file(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", full)
    with pytest.raises(BetonError, match=message):
        beton.write(path, *make_arrays(seed=2), classes=classes)
    monkeypatch.undo()
    assert beton.verify(path) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.beton", "a.beton.json"]


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_equal_images_and_no_others_have_equal_digests(tmp_path: Path, encoding: beton.Encoding) -> None:
    images, labels = make_arrays(300)
    images[[7, 250]] = images[3]
    images[9] = images[3]
    images[9, 31, 31, 2] ^= 128
    beton.write(tmp_path / "a.beton", images, labels, encoding=encoding)
    order = np.random.default_rng(1).permutation(300)[:90]
    beton.write(tmp_path / "b.beton", images[order], labels[order] * 0, encoding=encoding)
    first, second = beton.image_digests(tmp_path / "a.beton"), beton.image_digests(tmp_path / "b.beton")
    assert second == [first[i] for i in order]
    assert first[3] == first[7] == first[250]
    assert len(set(first)) == 298


WRITE_FOREVER = """
import sys
import numpy as np
from simclr import beton
sets = [np.full((1500, 32, 32, 3), value, np.uint8) for value in (1, 2)]
sets[0][0], sets[1][0] = 0, 0
print("ready", flush=True)
while True:
    for images in sets:
        beton.write(sys.argv[1], images, np.zeros(len(images), int))
"""


@needs_posix
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    generator = random.Random(0)
    seen = set()
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.15 + 0.1 * generator.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if not path.exists():
            continue
        if beton.sidecar_path(path).exists():
            beton.verify(path)
        else:
            beton.save_facts(path, beton.describe(path, source="", split="train", classes=["0"]))
        images, _ = beton.read(path)
        assert (images[1:] == images[1, 0, 0, 0]).all()
        seen.add(int(images[1, 0, 0, 0]))
    assert seen <= {1, 2}
    assert seen, "no file was ever finished; the test did not test anything"


FULL_DISK = """
import sys
import numpy as np
from pathlib import Path
from simclr import beton
folder = Path(sys.argv[1])
images = np.random.default_rng(0).integers(0, 256, (4000, 32, 32, 3), dtype=np.uint8)
old = beton.write(folder / "a.beton", images[:600], np.zeros(600, int))
for encoding in ("raw", "jpeg"):
    try:
        beton.write(folder / "a.beton", images, np.zeros(4000, int), encoding=encoding)
    except beton.BetonError as error:
        print(error)
assert beton.verify(folder / "a.beton") == old
assert sorted(p.name for p in folder.iterdir()) == ["a.beton", "a.beton.json"]
print("intact")
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    result = run_on_small_disk(tmp_path, "6m", 'exec "$@"', sys.executable, "-c", FULL_DISK, tmp_path)
    assert result.returncode == 0, result.stderr
    raw, jpeg, intact = result.stdout.splitlines()
    assert "needs 14.8 MB, but" in raw
    assert "MB free" in raw
    assert "the disk is full; free some space" in jpeg
    assert intact == "intact"
