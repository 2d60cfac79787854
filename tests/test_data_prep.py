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
from PIL import Image
from torchvision import datasets

from data_prep.__main__ import main
from data_prep.image_folder import scan
from data_prep.read_image import resize_and_crop
from simclr import beton

REPOSITORY = Path(__file__).parents[1]
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


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/cat"], "split train but no test or val"),
        (["test/cat"], "split test but no train"),
        (["train/cat", "test/cat", "test/dog"], "classes of train and test differ: dog"),
    ],
)
def test_a_missing_split_or_class_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: list[str], message: str
) -> None:
    for folder in folders:
        (tmp_path / "in" / folder).mkdir(parents=True)
        Image.fromarray(noise(0)).save(tmp_path / "in" / folder / "0.png")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "out")
    assert code == 1
    assert message in text
    assert not (tmp_path / "out").exists()


def test_several_splits_need_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tree(tmp_path / "in" / "train")
    make_tree(tmp_path / "in" / "test")
    code, text = run(capsys, "imagefolder", "--root", tmp_path / "in", "--output", tmp_path / "x.beton")
    assert code == 1
    assert "give a folder as --output" in text


def break_file(root: Path) -> str:
    (root / "dog" / "2.png").write_bytes(b"this is no image")
    (root / "cat" / "1.png").write_bytes((root / "cat" / "1.png").read_bytes()[:200])
    return r"unreadable images; .*\n  .*cat.1\.png: .*\n  .*dog.2\.png: cannot identify"


def break_many_files(root: Path) -> str:
    for i in range(30, 50):
        (root / "dog" / f"{i}.png").touch()
    return r"the search stopped here(.*\n  .*dog.\d+\.png: cannot identify[^\n]*){10}\n$"


def empty_class(root: Path) -> str:
    (root / "bee").mkdir()
    (root / "bee" / "notes.txt").touch()
    return "no images in class 'bee'"


def sixteen_bit_grey(root: Path) -> str:
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(root / "dog" / "9.png")
    return r"dog.9\.png: mode I;16 with more than 8 bits"


def sixteen_bit_png(root: Path) -> str:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, rows = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0), (b"\0" + bytes(16 * 2 * 3)) * 16
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (root / "dog" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return r"dog.9\.png: mode RGB with more than 8 bits"


def sixteen_bit_ppm(root: Path) -> str:
    (root / "dog" / "9.ppm").write_bytes(b"P6 16 16 65535\n" + bytes(16 * 16 * 6))
    return r"dog.9\.ppm: mode RGB with more than 8 bits"


def floating_point(root: Path) -> str:
    Image.fromarray(np.zeros((16, 16), np.float32)).save(root / "emu" / "9.tiff")
    return r"emu.9\.tiff: mode F with more than 8 bits"


def another_size(root: Path) -> str:
    Image.fromarray(noise(0, 16, 20)).save(root / "emu" / "9.png")
    return r"cat.0\.png is 16 x 16, .*emu.9\.png is 20 x 16; .*--resolution"


def no_classes(root: Path) -> str:
    shutil.rmtree(root)
    root.mkdir()
    Image.fromarray(noise(0)).save(root / "0.png")
    return "has no class folders"


def no_folder(root: Path) -> str:
    shutil.rmtree(root)
    return "is not a folder"


@pytest.mark.parametrize(
    "spoil",
    [
        break_file,
        break_many_files,
        empty_class,
        sixteen_bit_grey,
        sixteen_bit_png,
        sixteen_bit_ppm,
        floating_point,
        another_size,
        no_classes,
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
    assert not (tmp_path / "out").exists() or files_below(tmp_path / "out") == {}


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
    (root / "dog" / "Thumbs.db").touch()
    (root / "dog" / ".hidden.png").touch()
    (root / "README").touch()
    (root / ".git").mkdir()
    code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "a.beton")
    assert code == 0, text
    stored = beton.read(tmp_path / "a.beton")[0][2:-1]
    for (name, image), pixels in zip(images.items(), stored, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")), err_msg=name)
    for part in ("1 images", "2 images converted to RGB from mode P", "mode LA", "mode CMYK", "mode RGBA", "mode 1"):
        assert part in text
    assert "2 files skipped: hidden" in text
    assert "1 files skipped: not an image by its name" in text
    assert "1 files skipped: outside a class folder" in text


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_tree(tmp_path / "pets")
    (root / "dog").chmod(0)
    try:
        if os.access(root / "dog", os.R_OK):
            pytest.skip("this user may read everything")
        code, text = run(capsys, "imagefolder", "--root", root, "--output", tmp_path / "out")
    finally:
        (root / "dog").chmod(0o700)
    assert code == 1
    assert "cannot list" in text


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
    assert "3 images were smaller than the resolution and were enlarged" in text


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
    tree = scan(root)
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
    assert "file_sha256" not in text  # of no help to the user
    assert "--force" in text
    assert files_below(tmp_path / "out") == before
    code, text = run(capsys, "imagefolder", "--root", second, "--output", output, "--force")
    assert code == 0, text
    np.testing.assert_array_equal(beton.read(output)[0][0], noise(100))
    beton.verify(output)


def test_a_lost_sidecar_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, output = make_tree(tmp_path / "pets"), tmp_path / "out" / "a.beton"
    command = ("imagefolder", "--root", root, "--output", output)
    assert run(capsys, *command)[0] == 0
    before = files_below(tmp_path / "out")
    beton.sidecar_path(output).unlink()
    assert run(capsys, *command)[0] == 0
    assert files_below(tmp_path / "out") == before


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
        command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
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
    process = subprocess.Popen([sys.executable, "-m", "data_prep", *command], cwd=REPOSITORY, stderr=theirs)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small file system in a namespace")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    mounted = f'mount -t tmpfs -o size=4m none "{tmp_path}"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a file system in a namespace of its own")
    convert = f'"{sys.executable}" -m data_prep shapes --num-train 2500 --output "{tmp_path}/out"'
    script = f'{mounted}; {convert}; {convert} --encoding jpeg; ls -A "{tmp_path}/out"'
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=REPOSITORY, text=True, capture_output=True, timeout=120
    )
    raw, jpeg = result.stderr.splitlines()
    assert raw.startswith(f"error: {tmp_path}/out/train.beton needs 10.5 MB, but {tmp_path}/out has only")
    assert jpeg.startswith(f"error: cannot write {tmp_path}/out/train.beton: the disk that holds")
    assert "is full; free some space" in jpeg
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
