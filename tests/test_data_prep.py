from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import datasets

from data_prep.__main__ import main
from data_prep.find import find
from data_prep.image_folder import UNREADABLE
from data_prep.read_image import resize_and_crop
from simclr import beton
from tests.helpers import ROOT, as_nobody, run_on_small_disk, run_python

CLASSES = ("cat", "dog", "emu")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and what was printed of one command."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def noise(seed: int, height: int = 16, width: int = 16) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_tree(root: Path, per_class: int = 5, seed: int = 0) -> Path:
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(noise(100 * seed + 10 * c + i)).save(root / name / f"{i}.png")
    return root


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------ image folders


def test_a_tree_is_stored_in_torchvisions_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets", per_class=40)
    for name, seed in (("b/10.png", 901), ("a/2.png", 902), ("a/z/1.png", 903)):  # folders inside a class
        (root / "dog" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(seed)).save(root / "dog" / name)
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "pets.beton")
    assert code == 0, text
    images, labels = beton.read(tmp_path / "pets.beton")
    reference = datasets.ImageFolder(str(root))
    assert len(reference) == len(images) == 123
    np.testing.assert_array_equal(labels, reference.targets)
    for image, (expected, _) in zip(images, reference, strict=True):
        np.testing.assert_array_equal(image, np.asarray(expected))
    facts = beton.verify(tmp_path / "pets.beton")
    assert facts.classes == tuple(reference.classes) == CLASSES
    assert facts.class_counts == (40, 43, 40)
    assert (facts.split, facts.lossy_source, facts.encoding) == ("pets", False, "raw")
    assert "123 images of 16 x 16, 3 classes" in text


def test_splits_become_a_file_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, split in enumerate(("train", "val", "test")):
        make_tree(tmp_path / "in" / split, seed=seed)
    assert run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out")[0] == 0
    for seed, split in enumerate(("train", "val", "test")):
        images, _ = beton.read(tmp_path / "out" / f"{split}.beton")
        np.testing.assert_array_equal(images[0], noise(100 * seed))
        assert beton.verify(tmp_path / "out" / f"{split}.beton").split == split
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_the_usual_names_of_splits_are_known_in_any_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"Training": "train", "VALID": "val", "Test": "test"}
    for seed, name in enumerate(names):
        make_tree(tmp_path / "in" / name, seed=seed)
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 0, text
    for seed, split in enumerate(names.values()):
        assert beton.verify(tmp_path / "out" / f"{split}.beton").split == split
        np.testing.assert_array_equal(beton.read(tmp_path / "out" / f"{split}.beton")[0][0], noise(100 * seed))
    assert run(capsys, "imagefolder", "--root", tmp_path / "in" / "Training", "--output", tmp_path / "one")[0] == 0
    assert beton.verify(tmp_path / "one" / "train.beton").classes == CLASSES


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["test/cat/0.png"], "has the split test but no train"),
        (["train/cat/0.png", "test/cat/0.png", "test/dog/0.png"], "classes of train and test differ: 'dog'"),
        (["train/0.png", "test/cat/0.png"], "classes of train and test differ: 'cat'"),
        (["train/cat/0.png", "Training/cat/0.png"], "two of 'Training', 'train' are the same split"),
        (["train/cat/0.png", "test/cat/0.png", "validation set/cat/0.png"], "'validation set' looks like a split"),
        (["train2017/cat/0.png", "val2017/cat/0.png"], "'train2017', 'val2017' looks like a split"),
        (["train/cat/0.png", "cat/0.png"], "'train' may be a split, or a class like 'cat'"),
        (["test/0.png", "cat/0.png"], "'test' may be a split, or a class like 'cat'"),
        (["pets/train/0.png", "pets/test/0.png"], "'pets/test', 'pets/train' looks like a split inside of a class"),
        (["train/cat/0.png", "test/cat/0.jxl"], r"no images in the split 'test'.*\.jxl 1; JPEG XL images: convert"),
        (["cat/0.png", "dog/0.mov", "dog/1.mov"], r"no images in class 'dog'.*\.mov 2; videos: take frames"),
        (["1.png", "2.png", "cat/0.png"], "2 images lie beside the folders and 1 in them"),
        (["cat/notes.txt"], r"holds no images that can be taken, only: 1 files that are no images .*\(\.txt\)"),
    ],
)
def test_what_can_be_understood_in_two_ways_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], images: list[str], message: str
) -> None:
    for name in images:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(0)).save(tmp_path / "in" / name, "PNG")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 1
    assert re.search(message, text), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("classes", "alike"), [(("boat", "train"), "train"), (("beaker", "test tube"), "test tube")])
def test_a_class_may_be_called_like_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: tuple[str, ...], alike: str
) -> None:
    for name in classes:
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(noise(0)).save(tmp_path / "in" / name / "0.png")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "a.beton")
    assert code == 0, text
    assert beton.verify(tmp_path / "a.beton").classes == classes
    assert f"taken for classes, though called like splits: '{alike}'" in text


def test_folders_beside_the_splits_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "test", "extra"):
        make_tree(tmp_path / "in" / name)
    (tmp_path / "in" / "annotations").mkdir()
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 0, text
    assert "15 images beside the splits (extra): move them into one" in text


def test_test_images_are_drawn_by_a_fixed_rule_from_each_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_tree(tmp_path / "in", per_class=20)
    (root / "emu" / "only.png").write_bytes((root / "emu" / "0.png").read_bytes())
    (root / "yak").mkdir()
    Image.fromarray(noise(999)).save(root / "yak" / "0.png")
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "other")
    for folder, output in ((root, "a"), (moved, "b")):
        options = ("--output", tmp_path / output, "--test-fraction", 0.2)
        code, text = run(capsys, "imagefolder", "--root", folder, *options)
        assert code == 0, text
        assert "so the same ones for the same files; none of the 1 classes with a single image" in text
    expected: dict[str, list[NDArray[np.uint8]]] = {"train": [], "test": []}
    for name in (*CLASSES, "yak"):
        paths = sorted((root / name).iterdir())
        rank = sorted(paths, key=lambda path: hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest())
        for path in paths:
            drawn = len(paths) > 1 and path in rank[:4]
            expected["test" if drawn else "train"].append(np.asarray(Image.open(path)))
    for split, images in expected.items():
        np.testing.assert_array_equal(beton.read(tmp_path / "a" / f"{split}.beton")[0], np.stack(images))
        facts = [beton.verify(tmp_path / output / f"{split}.beton") for output in "ab"]
        assert facts[0].content_sha256 == facts[1].content_sha256
        assert facts[0].classes == (*CLASSES, "yak")
        assert "0.2 of each class, by SHA-256 of the path" in facts[0].source
    assert facts[0].class_counts == (4, 4, 4, 0)


@pytest.mark.parametrize(
    ("fraction", "has_test", "message"),
    [(0.0, False, "must lie between 0 and 1"), (1.5, False, "must lie between 0 and 1"), (0.1, True, "found.*'test'")],
)
def test_a_test_fraction_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fraction: float, has_test: bool, message: str
) -> None:
    for name in ("train", "test") if has_test else ("train",):
        make_tree(tmp_path / "in" / name)
    command = ("imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out", "--test-fraction", fraction)
    code, text = run(capsys, *command)
    assert code == 1
    assert re.search(message, text), text


def test_images_without_classes_are_stored_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path / "all")
    (tmp_path / "flat" / "raw").mkdir(parents=True)
    (tmp_path / "flat" / "raw" / "0.cr2").touch()
    for i, path in enumerate(sorted((tmp_path / "all").rglob("*.png"))):
        path.rename(tmp_path / "flat" / f"{i:02d}.png")
    command = ("imagefolder", "--root", tmp_path / "flat", "--output", tmp_path / "out", "--test-fraction", 0.2)
    code, text = run(capsys, *command)
    assert code == 0, text
    assert "nothing can be measured on them" in text
    assert "1 camera raw (.cr2): export them as JPEG or TIFF" in text
    for split, number in (("train", 12), ("test", 3)):
        facts, (_, labels) = (
            beton.verify(tmp_path / "out" / f"{split}.beton"),
            beton.read(tmp_path / "out" / f"{split}.beton"),
        )
        assert (facts.num_images, facts.classes, facts.is_labelled) == (number, (), False)
        assert (labels == -1).all()


def test_one_class_is_said_to_measure_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path / "in" / "photos")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "a.beton")
    assert code == 0, text
    assert "one class only (photos): the images can be pretrained on, but nothing can be measured" in text


def test_unlabelled_images_may_lie_beside_labelled_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "unlabelled"):
        make_tree(tmp_path / "in" / name)
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 0, text
    assert beton.verify(tmp_path / "out" / "train.beton").is_labelled
    assert beton.verify(tmp_path / "out" / "unlabeled.beton").classes == ()


# ------------------------------------------------------------------------------------------------------- lists


def test_a_list_names_images_labels_and_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "0.png").rename(tmp_path / os.fsdecode(b"caf\xe9, 1.png"))
    rows: list[tuple[bytes, str, str]] = [(b'"caf\xe9, 1.png"', "2", "Train")]
    rows += [(f"pets/cat/{i}.png".encode(), "2", "train") for i in range(1, 5)]
    rows += [(f"pets/dog/{i}.png".encode(), "10", "test" if i < 2 else "train") for i in range(5)]
    rows += [(f"{tmp_path}/pets/emu/0.png".encode(), "2", "testing"), (b"pets/emu/1.png", "10", "unlabeled")]
    lines = [b"\xef\xbb\xbfPath,label,SPLIT", *(b",".join((p, la.encode(), sp.encode())) for p, la, sp in rows)]
    (tmp_path / "list.csv").write_bytes(b"\r\n".join(lines) + b"\r\n")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "list.csv", "--output", tmp_path / "out")
    assert code == 0, text
    images, labels = beton.read(tmp_path / "out" / "train.beton")
    np.testing.assert_array_equal(images, [noise(seed) for seed in (0, 1, 2, 3, 4, 12, 13, 14)])
    np.testing.assert_array_equal(labels, [0] * 5 + [1] * 3)
    assert beton.verify(tmp_path / "out" / "train.beton").classes == ("2", "10")  # as numbers
    assert beton.read(tmp_path / "out" / "test.beton")[1].tolist() == [1, 1, 0]
    assert beton.verify(tmp_path / "out" / "unlabeled.beton").classes == ()
    assert "image list list.csv" in beton.verify(tmp_path / "out" / "test.beton").source


def test_a_list_of_paths_alone_has_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets")
    (tmp_path / "a list.csv").write_text("\n".join(["path", *map(str, sorted(root.rglob("*.png")))]))
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "a list.csv", "--output", tmp_path / "out")
    assert code == 0, text
    facts = beton.verify(tmp_path / "out" / "a list.beton")
    assert (facts.num_images, facts.classes) == (15, ())
    rows = ("path;label;Width", "pets/cat/0.png;x;16", "pets/dog/0.png;;16", "pets/emu/0.png;y;16")
    (tmp_path / "b.csv").write_text("\n".join(rows))
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "b.csv", "--output", tmp_path / "out")
    assert code == 0, text
    assert beton.read(tmp_path / "out" / "b.beton")[1].tolist() == [0, -1, 1]
    assert "1 images of b have no label" in text
    assert "columns that are not read: 'width'" in text


def test_every_wrong_line_of_a_list_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path / "pets")
    lines = ["path,label,split", "pets/cat/0.png,cat,train", "pets/a,b.png,cat,train", ",cat,train"]
    lines += ["pets/cat/0.png,dog,test", "pets/cat/1.png,cat,holdout", "pets/cat/2.png,cat"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    (tmp_path / "b.csv").write_text("file,label\nx.png,cat\n")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "a.csv", "--output", tmp_path / "out")
    assert code == 1
    for part in ("5 lines", "line 3: more cells", "line 4: no path", "line 5: pets/cat/0.png stands in line 2 too"):
        assert part in text
    assert "line 6: split 'holdout' is none of train" in text
    assert "line 7: split '' is none of" in text
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "b.csv", "--output", tmp_path / "out")
    assert code == 1
    assert "the columns are 'file', 'label'. Its first line should name the columns: path once" in text
    assert not (tmp_path / "out").exists()


def test_an_open_quote_a_second_label_and_another_spelling_of_a_path_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tree(tmp_path / "pets")
    (tmp_path / "pets" / "link").symlink_to("cat")
    for lines, message in (
        (['"pets/cat/0.png,cat', 'pets/cat/1.png,cat"'], "line 2: unexpected end of data; quotes come in pairs"),
        (["pets/cat/0.png,cat", "./pets/cat/0.png,cat"], "line 3: ./pets/cat/0.png stands in line 2 too"),
        (["pets/cat/0.png,cat", "pets/link/0.png,cat"], "line 3: pets/link/0.png stands in line 2 too"),
        (["x" * 200_000 + ",cat"], "line 2: field larger than field limit"),
    ):
        (tmp_path / "a.csv").write_text("\n".join(["path,label", *lines]))
        code, text = run(capsys, "imagefolder", "--root", tmp_path / "a.csv", "--output", tmp_path / "out")
        assert code == 1
        assert message in text
    (tmp_path / "a.csv").write_text("path,label,Label\npets/cat/0.png,cat,dog\n")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "a.csv", "--output", tmp_path / "out")
    assert code == 1
    assert "the columns are 'path', 'label', 'label'. Its first line should name the columns: path once" in text


# ------------------------------------------------------------------------------------- what lies among images


def test_several_splits_need_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path / "in" / "train")
    make_tree(tmp_path / "in" / "test")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "x.beton")
    assert code == 1
    assert "give a folder as --output" in text


def break_files(root: Path) -> str:
    (root / "dog" / "2.png").write_bytes(b"this is no image")
    (root / "cat" / "1.png").write_bytes((root / "cat" / "1.png").read_bytes()[:200])
    return r"2 unreadable images.*\n  .*cat.1\.png: .*\n  .*dog.2\.png: cannot identify"


def empty_class(root: Path) -> str:
    (root / "bee").mkdir()
    (root / "bee" / "notes.txt").touch()
    return "no images in class 'bee'"


def floating_point(root: Path) -> str:
    Image.fromarray(np.zeros((16, 16), np.float32)).save(root / "emu" / "9.tiff")
    return r"emu.9\.tiff: mode F has no fixed range.*magick IN -auto-level -depth 8"


def another_size(root: Path) -> str:
    Image.fromarray(noise(0, 16, 20)).save(root / "emu" / "9.png")
    return r"cat.0\.png is 16 x 16, .*emu.9\.png is 20 x 16; .*--resolution"


def no_folder(root: Path) -> str:
    shutil.rmtree(root)
    return "is not a folder"


@pytest.mark.parametrize(
    "spoil",
    [
        break_files,
        empty_class,
        floating_point,
        another_size,
        no_folder,
    ],
)
def test_a_bad_tree_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], str]
) -> None:
    root = make_tree(tmp_path / "pets")
    message = spoil(root)
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "out")
    assert code == 1
    with pytest.raises(AssertionError, match=message):  # pytest's own search, so that its report shows the text
        raise AssertionError(text)
    assert not (tmp_path / "out").exists() or set(files_below(tmp_path / "out")) <= {UNREADABLE}


def test_other_colour_modes_are_converted_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets", per_class=1)
    rgb = Image.fromarray(noise(7) // 8 * 8)
    grey, alpha = rgb.convert("L"), Image.fromarray(noise(8)[..., 0])
    with_alpha = rgb.copy()
    with_alpha.putalpha(alpha)
    palette = Image.fromarray(noise(9)[..., 0] % 7).convert("P")
    palette.putpalette(list(range(21)) * 12)
    images = {
        "1.png": grey,
        "2.png": Image.merge("LA", (grey, alpha)),
        "3.png": with_alpha,
        "4.png": palette,
        "5.png": grey.convert("1"),
        "6.tiff": rgb.convert("CMYK"),
        "7.png": palette,
    }
    for name, image in images.items():
        if name == "7.png":
            image.save(root / "dog" / name, transparency=bytes([0, 128, 255]))
        else:
            image.save(root / "dog" / name)
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "a.beton")
    assert code == 0, text
    stored = beton.read(tmp_path / "a.beton")[0][2:-1]
    for (name, image), pixels in zip(images.items(), stored, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")), err_msg=name)
    for part in ("2 converted to RGB from mode P", "mode LA", "mode CMYK", "mode RGBA", "mode 1", "1 converted to RGB"):
        assert part in text


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp"])
def test_every_exif_orientation_is_turned_as_pillow_does_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "in" / "dog").mkdir(parents=True)
    blocks = Image.fromarray(noise(4, 4, 3)).resize((40, 24), Image.Resampling.NEAREST)
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        blocks.save(tmp_path / "in" / "dog" / f"{orientation}.{kind}", exif=exif)
    options = ("--resolution", 24)
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "a.beton", *options)
    assert code == 0, text
    assert "7 turned upright, as their EXIF orientation asks" in text
    images = beton.read(tmp_path / "a.beton")[0]
    # What each means for an array of rows, written down from the standard's table.
    meaning: list[Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = [
        lambda a: a,
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2),
        lambda a: np.rot90(a, -1),
        lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        lambda a: np.rot90(a),
        lambda a: a,
    ]
    for orientation, (pixels, turn) in enumerate(zip(images, meaning, strict=True)):
        with Image.open(tmp_path / "in" / "dog" / f"{orientation}.{kind}") as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        np.testing.assert_array_equal(pixels, np.asarray(resize_and_crop(upright, 24)), err_msg=str(orientation))
        if kind == "png":
            np.testing.assert_array_equal(np.asarray(upright), turn(np.asarray(blocks)), err_msg=str(orientation))


def test_an_orientation_that_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets", per_class=1)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0up!\0\0\0\0\0"  # the orientation "up!"
    Image.fromarray(noise(1)).save(root / "dog" / "9.jpg", exif=exif)
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "a.beton")
    assert code == 0, text
    assert "1 taken as they lie: their EXIF" in text


def sixteen_bit_png(values: NDArray[np.uint16]) -> bytes:
    """A colour PNG of 16 bits per channel, which Pillow reads and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def test_of_16_bits_the_high_byte_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in" / "dog"
    folder.mkdir(parents=True)
    colour = np.random.default_rng(0).integers(0, 1 << 16, (16, 16, 3), dtype=np.uint16)
    grey = colour[..., 0].copy()
    (folder / "0.png").write_bytes(sixteen_bit_png(colour))
    Image.fromarray(grey).save(folder / "1.png")
    Image.fromarray(grey).save(folder / "2.tiff")
    (folder / "3.pgm").write_bytes(b"P5 16 16 65535\n" + grey.astype(">u2").tobytes())
    (folder / "4.ppm").write_bytes(b"P6 16 16 65535\n" + colour.astype(">u2").tobytes())
    Image.fromarray(grey >> 4).save(folder / "5.png")  # 12 bits, as many instruments write them
    Image.fromarray(grey.astype(np.int32)).save(folder / "6.tiff")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "a.beton")
    assert code == 0, text
    assert "7 of more than 8 bits per channel: the 8 highest are stored" in text
    assert "1 of more than 8 bits, of which the highest are not used: nearly black" in text
    images = beton.read(tmp_path / "a.beton")[0].astype(int)
    greys = np.repeat(grey[..., None], 3, axis=2)
    for i, values in enumerate((colour, greys, greys, greys, colour, greys >> 4, greys)):
        error = np.abs(images[i] - (values >> 8)).max()
        assert error <= (1 if i == 4 else 0), i  # Pillow rounds PPM
    for wrong in (-1, 1 << 16):
        values = grey.astype(np.int32)
        values[0, 0] = wrong
        Image.fromarray(values).save(folder / "7.tiff")
        code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "b.beton")
        assert code == 1
        assert re.search(r"7\.tiff: values from -?\d+ to \d+; convert it to 8 bits", text), text


def spoil_many(root: Path) -> list[Path]:
    """27 unreadable files of several kinds; the rest of the class stays as it is."""
    bad = [root / "dog" / f"{i}.png" for i in range(30, 50)]
    for path in bad:
        path.touch()
    for number in range(6):
        jpeg = io.BytesIO()
        Image.fromarray(noise(number)).save(jpeg, "JPEG")
        (root / "emu" / f"cut {number}.jpg").write_bytes(jpeg.getvalue()[: 100 + 80 * number])
        bad.append(root / "emu" / f"cut {number}.jpg")
    (root / "emu" / "lost.jpg").symlink_to("nowhere")
    return [*bad, root / "emu" / "lost.jpg"]


def test_all_unreadable_files_of_all_splits_are_listed_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [path for split in ("train", "test") for path in spoil_many(make_tree(tmp_path / "in" / split))]
    command = ("imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out")
    code, text = run(capsys, *command)
    assert code == 1
    listed = (tmp_path / "out" / UNREADABLE).read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [str(path) for path in bad]
    for path in bad:
        assert f"\n  {path}: " in text
    assert "54 unreadable images, and no others" in text
    assert "--unreadable skip" in text
    assert set(files_below(tmp_path / "out")) == {UNREADABLE}
    code, text = run(capsys, *command, "--unreadable", "skip")
    assert code == 0, text
    assert f"54 files that cannot be read, listed in {tmp_path / 'out' / UNREADABLE}" in text
    for path in bad:
        path.unlink()
    skipped = files_below(tmp_path / "out")
    code, text = run(capsys, *command[:-1], tmp_path / "clean")
    assert code == 0, text
    assert {name: data for name, data in skipped.items() if name != UNREADABLE} == files_below(tmp_path / "clean")
    assert run(capsys, *command)[0] == 0
    assert UNREADABLE not in files_below(tmp_path / "out")


def test_a_class_that_cannot_be_read_at_all_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets")
    for path in (root / "dog").iterdir():
        path.write_bytes(b"")
    command = ("imagefolder", "--root", root, "--output", tmp_path / "out", "--unreadable", "skip")
    code, text = run(capsys, *command)
    assert code == 1
    assert "not one image of class 'dog' is readable" in text


def test_each_folder_is_taken_once_whatever_links_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets")
    (root / "emu").rename(tmp_path / "far away")
    (root / "emu").symlink_to(tmp_path / "far away")
    for link in (root / "cat" / "a", root / "dog" / "all", tmp_path / "far away" / "back"):
        link.symlink_to(root)
    (root / "dog" / "up").symlink_to(tmp_path)
    (tmp_path / "foreign.png").write_bytes((root / "cat" / "0.png").read_bytes())
    (root / "alias").symlink_to("dog")
    (root / "dog" / "loop").symlink_to("loop")
    (root / "cat" / "z").mkdir()
    (root / "cat" / "z" / "self").symlink_to(".")
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "a.beton")
    assert code == 0, text
    facts = beton.verify(tmp_path / "a.beton")
    assert (facts.classes, facts.class_counts) == (CLASSES, (5, 5, 5))
    assert "6 links to folders that are taken already, or that hold this one" in text


def test_names_of_classes_that_look_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets")
    for old, new in (("cat", "caf\u00e9"), ("dog", "cafe\u0301"), ("emu", "Caf\u00e9")):
        (root / old).rename(root / new)
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "a.beton")
    assert code == 0, text
    assert beton.verify(tmp_path / "a.beton").classes == ("Caf\u00e9", "caf\u00e9")
    assert beton.verify(tmp_path / "a.beton").class_counts == (5, 10)
    assert "look alike, each a class of its own: 'Caf\u00e9', 'caf\u00e9'" in text


def test_a_pipe_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets")
    os.mkfifo(tmp_path / "pipe.png")
    (root / "cat" / "link.png").symlink_to(tmp_path / "pipe.png")
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "out")
    assert code == 1
    assert "cat/link.png: it is no file, but a folder, pipe or device" in text


def test_names_that_are_not_utf8_are_stored_and_shown_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_tree(tmp_path / os.fsdecode(b"p\xe9ts"))
    (root / "emu").rename(root / os.fsdecode(b"\xe9mu"))
    (root / "cat" / "0.png").rename(root / "cat" / os.fsdecode(b"\xe9.png"))
    command = ("imagefolder", "--root", root, "--output", tmp_path / "out")
    code, text = run(capsys, *command)
    assert code == 0, text
    assert beton.verify(tmp_path / "out" / r"p\xe9ts.beton").classes == ("cat", "dog", r"\xe9mu")
    assert r"stored with escapes, as the names are not UTF-8: '\xe9mu'" in text
    (root / "cat" / os.fsdecode(b"\xe9.png")).write_bytes(b"")
    code, text = run(capsys, *command, "--force")
    assert code == 1
    assert r"cat/\xe9.png: cannot identify" in text
    assert os.fsencode(root / "cat") + b"/\xe9.png\t" in (tmp_path / "out" / UNREADABLE).read_bytes()


def test_an_odd_folder_is_converted_by_one_command_that_says_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_tree(tmp_path / "photos", per_class=6)
    cat, turned = root / "cat", Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise(1, 20, 30)).save(cat / "turned.jfif", "JPEG", exif=turned)
    frames = [Image.fromarray(noise(seed)) for seed in range(3)]
    frames[0].save(cat / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(cat / "print.JPEG")
    Image.fromarray(noise(2)).resize((400, 300)).save(cat / "large.bmp")
    Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(cat / "deep.tif")
    (cat / "cut.jpg").write_bytes((cat / "turned.jfif").read_bytes()[:400])
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "desktop.ini", "notes.txt", "clip.mp4", "new.jxl", "raw.NEF"):
        (cat / name).write_bytes(b"x")
    for folder in ("@eaDir", "__MACOSX", ".yak"):
        shutil.copytree(root / "dog", (cat if folder == "@eaDir" else root) / folder)
    (root / "0.png").write_bytes((cat / "0.png").read_bytes())
    (cat / "again").symlink_to(root)
    options = ("--resolution", 16, "--test-fraction", 0.2, "--unreadable", "skip")
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "out", *options)
    assert code == 0, text
    block = text[text.index("stored:") :].replace(str(tmp_path), "")
    for line in (
        "  /out/train.beton: written, read back and compared (19 images of 16 x 16, 3 classes, raw, 4.2 MB)",
        "  /out/test.beton: written, read back and compared (4 images of 16 x 16, 3 classes, raw, 4.2 MB)",
        "        1 turned upright, as their EXIF orientation asks",
        "        1 of several frames, pages or layers: the first is stored",
        "        1 converted to RGB from mode CMYK",
        "        1 of more than 8 bits per channel: the 8 highest are stored",
        "       16 files that systems leave behind (@eaDir, Thumbs.db and the like)",
        "        6 images with hidden names or in hidden folders (.yak): rename them if they are to be taken",
        "        1 images beside the class folders (photos): move them into one if they are to be taken",
        "        1 links to folders that are taken already, or that hold this one (again)",
        "        1 files that are no images by their names (.txt)",
        "        1 videos (.mp4): take frames out of them (ffmpeg -i IN -vf fps=1 OUT%05d.png)",
        "        1 camera raw (.nef): export them as JPEG or TIFF",
        "        1 JPEG XL images (.jxl): convert them (djxl IN.jxl OUT.png)",
        "        1 files that cannot be read, listed in /out/unreadable-images.txt",
        "  test images: 0.2 of each class, by SHA-256 of the path, so the same ones for the same files",
    ):
        assert f"{line}\n" in block, (line, block)


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".avif"])
def test_what_pillow_reads_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    if suffix not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not read {suffix}")
    root = make_tree(tmp_path / "pets", per_class=1)
    Image.fromarray(noise(7)).save(root / "dog" / f"1{suffix}")
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "a.beton")
    assert code == 0, text
    with Image.open(root / "dog" / f"1{suffix}") as image:
        np.testing.assert_array_equal(beton.read(tmp_path / "a.beton")[0][2], np.asarray(image.convert("RGB")))


def test_a_folder_that_cannot_be_listed_is_named(folder_for_all: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(folder_for_all / "pets")
    (root / "dog").chmod(0)
    with as_nobody():
        code, text = run(capsys, "imagefolder", "--root", root, "--output", folder_for_all / "out")
    (root / "dog").chmod(0o700)
    assert code == 1
    assert f"cannot list {root / 'dog'}: Permission denied" in text


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (33, 100), (100, 33), (20, 11), (32, 32), (301, 47)])
def test_resizing_equals_torchvisions(size: tuple[int, int]) -> None:
    transforms = torchvision.transforms
    image = Image.fromarray(noise(3, *size))
    reference = transforms.Compose(
        [transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )
    np.testing.assert_array_equal(np.asarray(resize_and_crop(image, 32)), np.asarray(reference(image)))


def test_resolution_makes_one_size_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets", per_class=1)
    Image.fromarray(noise(5, 40, 60)).save(root / "dog" / "9.jpg")
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "a.beton", "--resolution", 24)
    assert code == 0, text
    facts = beton.verify(tmp_path / "a.beton")
    assert (facts.height, facts.width, facts.num_images) == (24, 24, 4)
    assert "pets, shorter side resized to 24 (antialiased bicubic), centre-cropped" in facts.source
    assert facts.lossy_source  # one of them is a JPEG
    assert "3 enlarged: smaller than the resolution" in text


def test_large_images_are_resized_before_jpeg_encodes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "dog").mkdir(parents=True)
    for i, size in enumerate([(300, 200), (97, 160), (128, 96)]):
        blocks = Image.fromarray(noise(i)).resize(size, Image.Resampling.BICUBIC)
        blocks.save(tmp_path / "in" / "dog" / f"{i}.jpg", quality=95)
    options = ("--resolution", 96, "--encoding", "jpeg", "--jpeg-quality", 80)
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "a.beton", *options)
    assert code == 0, text
    images, _ = beton.read(tmp_path / "a.beton")
    assert images.shape == (3, 96, 96, 3)
    for i, pixels in enumerate(images):
        with Image.open(tmp_path / "in" / "dog" / f"{i}.jpg") as image:
            stream = beton.encode_jpeg(np.asarray(resize_and_crop(image, 96)), 80)
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(stream))))


def test_jpeg_encoding_stores_the_quality_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets", per_class=30)
    for quality in (30, 95):
        output = tmp_path / f"{quality}.beton"
        options = ("--encoding", "jpeg", "--jpeg-quality", quality)
        code, text = run(capsys, "imagefolder", "--root", root, "--output", output, *options)
        assert code == 0, text
        facts = beton.verify(output)
        assert (facts.encoding, facts.jpeg_quality, facts.lossy_source) == ("jpeg", quality, False)
    images, _ = beton.read(tmp_path / "95.beton")
    layout = beton.check(tmp_path / "95.beton")
    (tree,) = find(root).splits.values()
    for i in (0, 63, 64, 89):
        stream = beton.encode_jpeg(np.asarray(Image.open(tree.paths[i])), 95)
        start = int(layout.offsets[i])
        assert (tmp_path / "95.beton").read_bytes()[start : start + int(layout.sizes[i])] == stream
    assert layout.sizes.sum() > 1.2 * beton.check(tmp_path / "30.beton").sizes.sum()
    assert images.shape == (90, 16, 16, 3)
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "x", "--jpeg-quality", 0)
    assert code == 1
    assert "--jpeg-quality must be 1 to 100" in text


@pytest.mark.real_data
@pytest.mark.slow
def test_all_of_cifar10_is_stored_as_pillow_decodes_it(cifar10_jpeg: Path, cifar10_beton: Path) -> None:
    # Mean and deviation of these files, as an independent implementation measured them. JPEG at quality 75 keeps the
    # published means (0.4914, 0.4822, 0.4465) and lowers the published deviations (0.2470, 0.2435, 0.2616).
    measured = [(0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)]
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for split, per_class in (("train", 5000), ("test", 1000)):
        facts = beton.verify(cifar10_beton / f"{split}.beton")
        assert (facts.num_images, facts.height, facts.width) == (10 * per_class, 32, 32)
        assert (facts.classes, facts.class_counts) == (names, (per_class,) * 10)
        assert (facts.split, facts.encoding, facts.lossy_source) == (split, "raw", True)
        images, labels = beton.read(cifar10_beton / f"{split}.beton")
        np.testing.assert_array_equal(labels, np.repeat(np.arange(10), per_class))
        total, squares = np.zeros(3), np.zeros(3)
        for label, name in enumerate(names):
            pixels = np.stack(
                [np.asarray(Image.open(path)) for path in sorted((cifar10_jpeg / split / name).iterdir())]
            )
            np.testing.assert_array_equal(images[labels == label], pixels)
            values = pixels.reshape(-1, 3) / 255
            total += values.sum(axis=0)
            squares += (values**2).sum(axis=0)
        mean = total / (10 * per_class * 1024)
        std = np.sqrt(squares / (10 * per_class * 1024) - mean**2)
        np.testing.assert_allclose(facts.normalisation, [mean, std], rtol=0, atol=1e-9)
        if split == "train":
            np.testing.assert_allclose(facts.normalisation, measured, rtol=0, atol=5.1e-5)


# ------------------------------------------------------------------------------------------------ existing files


def test_converting_again_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets")
    command = ("imagefolder", "--root", root, "--output", tmp_path / "out")
    assert run(capsys, *command)[0] == 0
    before = files_below(tmp_path / "out")
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").iterdir())]
    code, text = run(capsys, *command)
    assert code == 0
    assert "already there and the same" in text
    assert files_below(tmp_path / "out") == before
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").iterdir())] == times
    assert set(before) == {"pets.beton", "pets.beton.json"}
    assert run(capsys, *command[:-1], tmp_path / "elsewhere")[0] == 0
    assert files_below(tmp_path / "elsewhere") == before


def test_a_different_file_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "a.beton"
    first, second = make_tree(tmp_path / "1" / "pets"), make_tree(tmp_path / "2" / "pets", seed=1)
    assert run(capsys, "imagefolder", "--root", first, "--output", output)[0] == 0
    before = files_below(tmp_path / "out")
    code, text = run(capsys, "imagefolder", "--root", second, "--output", output)
    assert code == 1
    assert "differs" in text
    assert "content_sha256" in text
    assert "tables_sha256" not in text  # of no help to the user
    assert "--force" in text
    assert files_below(tmp_path / "out") == before
    code, text = run(capsys, "imagefolder", "--root", second, "--output", output, "--force")
    assert code == 0, text
    np.testing.assert_array_equal(beton.read(output)[0][0], noise(100))
    beton.verify(output)


def test_splits_are_replaced_together_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        make_tree(tmp_path / "in" / split)
    command = ("imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out")
    assert run(capsys, *command)[0] == 0
    before = files_below(tmp_path / "out")
    Image.fromarray(noise(77)).save(tmp_path / "in" / "train" / "cat" / "0.png")
    (tmp_path / "in" / "test" / "cat" / "0.png").write_bytes(b"")
    assert run(capsys, *command, "--force")[0] == 1
    assert {name: data for name, data in files_below(tmp_path / "out").items() if name != UNREADABLE} == before
    Image.fromarray(noise(78)).save(tmp_path / "in" / "test" / "cat" / "0.png")
    assert run(capsys, *command)[0] == 1
    assert run(capsys, *command, "--force")[0] == 0
    for split, seed in (("train", 77), ("test", 78)):
        np.testing.assert_array_equal(beton.read(tmp_path / "out" / f"{split}.beton")[0][0], noise(seed))


def test_a_damaged_file_is_not_replaced_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, output = make_tree(tmp_path / "pets"), tmp_path / "out" / "a.beton"
    command = ("imagefolder", "--root", root, "--output", output)
    assert run(capsys, *command)[0] == 0
    whole = output.read_bytes()
    output.write_bytes(whole[:-1])
    code, text = run(capsys, *command)
    assert code == 1
    assert "differs" in text
    assert output.read_bytes() == whole[:-1]
    assert run(capsys, *command, "--force")[0] == 0
    assert output.read_bytes() == whole


def test_user_errors_end_the_process_with_1_and_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = make_tree(tmp_path / "pets")
    for arguments in (
        ("imagefolder", "--root", tmp_path / "nowhere", "--output", tmp_path / "out"),
        ("imagefolder", "--root", root, "--output", tmp_path / "file" / "out"),
        ("inspect", tmp_path / "nothing.beton"),
    ):
        result = run_python("-m", "data_prep", *arguments)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pets"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_progress_and_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = ["shapes", "--output", str(tmp_path / "out"), "--num-train", "1000000"]
    process = subprocess.Popen([sys.executable, "-m", "data_prep", *command], cwd=ROOT, stderr=theirs)
    seen = b""
    while not re.search(rb"train\.beton: .*[1-9]\d*/1000000 .* images/s", seen):
        seen += os.read(ours, 4096)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["train.beton.partial"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    os.close(theirs)
    while not seen.endswith(b"interrupted; the file under way was not written\r\n"):
        seen += os.read(ours, 4096)
    os.close(ours)
    assert b"Traceback" not in seen
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    convert = f'"{sys.executable}" -m data_prep shapes --num-train 2500 --output "{tmp_path}/out"'
    script = f'{convert}; {convert} --encoding jpeg; ls -A "{tmp_path}/out"'
    result = run_on_small_disk(tmp_path, "4m", script)
    raw, jpeg = result.stderr.splitlines()
    assert raw.startswith(f"error: {tmp_path}/out/train.beton needs 10.5 MB, but {tmp_path}/out has only")
    assert jpeg.startswith(f"error: cannot write {tmp_path}/out/train.beton: No space left on device")
    assert "the disk is full; free some space" in jpeg
    assert result.stdout == ""  # nothing written, nothing left


# ------------------------------------------------------------------------------------------ inspect and sidecar


def test_inspect_prints_the_facts_and_finds_a_changed_pixel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.beton"
    beton.write(path, np.stack([noise(i) for i in range(6)]), [0, 1, 2, 0, 1, 2], classes=CLASSES, source="noise")
    code, text = run(capsys, "inspect", path)
    assert code == 0
    for part in ("num_images      6", "('cat', 'dog', 'emu')", "source          noise", "(2, 2, 2)"):
        assert part in text
    data = bytearray(path.read_bytes())
    data[int(beton.check(path).offsets[3])] ^= 1
    path.write_bytes(data)
    assert run(capsys, "inspect", path)[0] == 0
    code, text = run(capsys, "inspect", path, "--verify")
    assert code == 1
    assert "sha256" in text


def test_sidecar_adopts_a_file_that_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.beton"
    facts = beton.write(path, np.stack([noise(i) for i in range(6)]), [0, 1, 2, 0, 1, 2], classes=CLASSES)
    command = ("sidecar", path, "--source", facts.source, "--classes", *CLASSES)
    code, text = run(capsys, *command)
    assert code == 1
    assert "already there" in text
    beton.sidecar_path(path).unlink()
    assert run(capsys, *command)[0] == 0
    assert beton.verify(path) == facts


# --------------------------------------------------------------------------------- CIFAR and STL-10, as published


def save_with_md5(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def fake_cifar(root: Path, kind: Any, per_batch: int = 20) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Files in the published format with other pixels, and the md5 sums that torchvision should expect of them."""
    generator = np.random.default_rng(0)
    is_100 = kind is datasets.CIFAR100
    lists: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for attribute, split in (("train_list", "train"), ("test_list", "test")):
        entries, images, labels = [], [], []
        for name, _ in getattr(kind, attribute):
            data = generator.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
            targets = generator.integers(0, 10, per_batch).tolist()
            batch = {"data": data, "fine_labels" if is_100 else "labels": targets}
            entries.append([name, save_with_md5(root / kind.base_folder / name, pickle.dumps(batch))])
            images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += targets
        lists[attribute] = entries
        arrays[split], arrays[f"{split} labels"] = np.concatenate(images), np.array(labels)
    names = [f"name{i}" for i in range(100 if is_100 else 10)]
    meta = root / kind.base_folder / kind.meta["filename"]
    lists["meta"] = {**kind.meta, "md5": save_with_md5(meta, pickle.dumps({kind.meta["key"]: names}))}
    return lists, arrays


@pytest.mark.parametrize(("command", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_files_are_converted_without_network(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    kind: Any,
    packed: bool,
) -> None:
    root = tmp_path / "downloads"
    lists, arrays = fake_cifar(root, kind)
    if packed:
        with tarfile.open(root / kind.filename, "w:gz") as archive:
            archive.add(root / kind.base_folder, kind.base_folder)
        lists["tgz_md5"] = hashlib.md5((root / kind.filename).read_bytes()).hexdigest()
        shutil.rmtree(root / kind.base_folder)
    for attribute, value in lists.items():
        monkeypatch.setattr(kind, attribute, value)
    code, text = run(capsys, command, "--root", root, "--output", tmp_path / "out", "--no-download")
    assert code == 0, text
    for split in ("train", "test"):
        images, labels = beton.read(tmp_path / "out" / f"{split}.beton")
        np.testing.assert_array_equal(images, arrays[split])
        np.testing.assert_array_equal(labels, arrays[f"{split} labels"])
        facts = beton.verify(tmp_path / "out" / f"{split}.beton")
        assert facts.classes == tuple(f"name{i}" for i in range(facts.num_classes))
        assert (facts.split, facts.lossy_source) == (split, False)
        assert facts.num_classes == (100 if command == "cifar100" else 10)
        assert facts.source.startswith("CIFAR-100 " if command == "cifar100" else "CIFAR-10 ")


def fake_stl10(root: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    generator = np.random.default_rng(0)
    folder = root / datasets.STL10.base_folder
    md5: dict[str, str] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for split, n in (("train", 12), ("test", 8), ("unlabeled", 20)):
        images = generator.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)
        arrays[split] = images
        # Published column by column: (n, 3, width, height).
        md5[f"{split}_X.bin"] = save_with_md5(folder / f"{split}_X.bin", images.transpose(0, 3, 2, 1).tobytes())
        arrays[f"{split} labels"] = np.full(n, -1) if split == "unlabeled" else generator.integers(0, 10, n)
        if split != "unlabeled":
            labels = (arrays[f"{split} labels"] + 1).astype(np.uint8).tobytes()
            md5[f"{split}_y.bin"] = save_with_md5(folder / f"{split}_y.bin", labels)
    (folder / "class_names.txt").write_text("".join(f"name{i}\n" for i in range(10)))
    arrays["train+unlabeled"] = np.concatenate([arrays["train"], arrays["unlabeled"]])
    arrays["train+unlabeled labels"] = np.concatenate([arrays["train labels"], arrays["unlabeled labels"]])
    train = [[name, md5[name]] for name in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")]
    return {"train_list": train, "test_list": [[n, md5[n]] for n in ("test_X.bin", "test_y.bin")]}, arrays


def test_stl10_files_are_converted_unlabelled_ones_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists, arrays = fake_stl10(tmp_path)
    for attribute, value in lists.items():
        monkeypatch.setattr(datasets.STL10, attribute, value)
    splits = ("train", "test", "unlabeled", "train+unlabeled")
    code, text = run(capsys, "stl10", "--root", tmp_path, "--output", tmp_path / "out", "--splits", *splits)
    assert code == 0, text
    for split in splits:
        images, labels = beton.read(tmp_path / "out" / f"{split}.beton")
        np.testing.assert_array_equal(images, arrays[split])
        np.testing.assert_array_equal(labels, arrays[f"{split} labels"])
        facts = beton.verify(tmp_path / "out" / f"{split}.beton")
        assert facts.is_labelled == (split in ("train", "test"))
        assert facts.num_classes == (0 if split == "unlabeled" else 10)
        assert sum(facts.class_counts) == (labels >= 0).sum()
    small = ("stl10", "--root", tmp_path, "--output", tmp_path / "small", "--splits", "test", "--resolution", 32)
    assert run(capsys, *small)[0] == 0
    images, _ = beton.read(tmp_path / "small" / "test.beton")
    expected = Image.fromarray(arrays["test"][3]).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images[3], np.asarray(expected))
    assert "resized to 32 (antialiased bicubic)" in beton.load_facts(tmp_path / "small" / "test.beton").source


@pytest.mark.parametrize(
    ("command", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100), ("stl10", datasets.STL10)]
)
def test_missing_files_are_asked_for_by_name_and_md5(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, kind: Any
) -> None:
    arguments = (command, "--root", tmp_path / "data", "--output", tmp_path / "out")
    # A port where nothing listens: the download fails at once, with or without a network.
    monkeypatch.setattr(kind, "url", f"http://127.0.0.1:9/{kind.filename}")
    for options, message in ((("--no-download",), "--no-download was given"), ((), "could not be downloaded")):
        code, text = run(capsys, *arguments, *options)
        assert code == 1
        assert message in text
        assert f"put it at {tmp_path / 'data' / kind.filename} (md5 {kind.tgz_md5})" in text
        assert not (tmp_path / "out").exists()


def test_a_damaged_archive_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / datasets.CIFAR10.filename).write_bytes(b"half an archive")
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:9/{datasets.CIFAR10.filename}")
    code, text = run(capsys, "cifar10", "--root", tmp_path, "--output", tmp_path / "out", "--no-download")
    assert code == 1
    assert "missing or damaged" in text
