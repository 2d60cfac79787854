"""Fused views: equal to simclr.views for any settings, whatever computes them, and compiled code that survives."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr.views import ViewParameters, ViewSpec, apply_view, sample_parameters, two_views
from tests.helpers import ROOT
from tests.test_views import EVERYTHING, MEAN, STD, UNIT, identity, make_images

pytest.importorskip("numba", reason="would show that the compiled views equal the others")
from simclr.views import fused_views
from simclr.views.fused_views import TOLERANCE, FusedViews


def fuse(
    images: Tensor, spec_1: ViewSpec, spec_2: ViewSpec, *, size: int, seed: int = 0, epoch: int = 0, **arguments: Any
) -> Tensor:
    with FusedViews(spec_1, spec_2, size=size, **(UNIT | arguments)) as views:
        return views(images, np.arange(len(images)), seed=seed, epoch=epoch)


def assert_equal_views(found: Tensor, expected: Tensor, threshold: float = 0.5) -> None:
    """Equal within the tolerance; a pixel that lies at the threshold may be inverted in one and not in the other."""
    assert found.shape == expected.shape
    difference = (found - expected).abs()
    at_threshold = (found - threshold).abs().minimum((expected - threshold).abs()) < TOLERANCE
    inverted = at_threshold & ((found + expected - 1).abs() < TOLERANCE)
    assert difference[~inverted].max() < TOLERANCE
    assert inverted.float().mean() < 1e-3


def random_spec(generator: np.random.Generator) -> ViewSpec:
    low, high = np.sort(generator.uniform(0.02, 1, 2))
    return ViewSpec(
        crop_scale=(float(low), float(high)),
        crop_ratio=(float(generator.uniform(0.3, 1)), float(generator.uniform(1, 3))),
        interpolation=generator.choice(["bilinear", "bicubic"]).item(),
        brightness=float(generator.uniform(0, 0.8)),
        contrast=float(generator.uniform(0, 0.8)),
        saturation=float(generator.uniform(0, 0.8)),
        hue=float(generator.uniform(0, 0.5)),
        blur_probability=0.5,
        blur_kernel=int(generator.choice([1, 3, 5, 9])),
        solarise_probability=0.5,
        solarise_threshold=float(generator.uniform(0, 1)),
    )


# Equal to the batched operations


@pytest.mark.parametrize("number", range(12))
def test_any_settings_give_the_views_of_the_batched_operations(number: int) -> None:
    generator = np.random.default_rng(number)
    height, width, size = (int(side) for side in generator.integers(6, 70, 3))
    spec_1, spec_2 = random_spec(generator), random_spec(generator)
    images = make_images(1 if number == 0 else 48, height, width, seed=number)
    seed, epoch = int(generator.integers(2**63)), int(generator.integers(2**40))
    found = fuse(images, spec_1, spec_2, size=size, seed=seed, epoch=epoch)
    arguments: dict[str, Any] = {"seed": seed, "epoch": epoch, "size": size, **UNIT}
    expected = two_views(images, np.arange(len(images)), spec_1, spec_2, **arguments)
    assert_equal_views(found.chunk(2)[0], expected[0], spec_1.solarise_threshold)
    assert_equal_views(found.chunk(2)[1], expected[1], spec_2.solarise_threshold)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (37, 53, 24), (32, 32, 96), (224, 180, 160)])
def test_all_operations_together_at_usual_sizes(height: int, width: int, size: int, interpolation: Any) -> None:
    forced: dict[str, Any] = {f"{name}_probability": 1.0 for name in ("flip", "jitter", "blur", "solarise")}
    spec = dataclasses.replace(EVERYTHING, interpolation=interpolation, **forced)
    images = make_images(16, height, width)
    expected = two_views(images, np.arange(16), spec, spec, seed=0, epoch=0, size=size, **UNIT)
    assert_equal_views(fuse(images, spec, spec, size=size), torch.cat(expected))


def test_every_order_of_jitter_with_the_strongest_factors() -> None:
    orders = np.array(list(itertools.permutations(range(4))))
    n = 2 * len(orders)
    strongest = {"brightness": np.full(n, 1.8), "contrast": np.full(n, 1.8), "saturation": np.full(n, 1.8)}
    parameters = identity(n, jitter=np.ones(n, bool), jitter_order=np.tile(orders, (2, 1)), hue=np.full(n, 0.4))
    parameters = dataclasses.replace(
        parameters, **{k: np.where(np.arange(n) < n // 2, v, 0.2) for k, v in strongest.items()}
    )
    images = make_images(n)
    with FusedViews(ViewSpec(), ViewSpec(), size=32, **UNIT) as views:
        found = views.apply(images, [parameters, parameters])
    assert_equal_views(found, apply_view(images, parameters, ViewSpec(), size=32, **UNIT).repeat(2, 1, 1, 1))


def test_views_are_normalised_channels_last_and_their_own_memory() -> None:
    images = make_images(20)
    found = fuse(images, ViewSpec(), EVERYTHING, size=32, mean=MEAN, std=STD)
    expected = two_views(images, np.arange(20), ViewSpec(), EVERYTHING, seed=0, epoch=0, size=32, mean=MEAN, std=STD)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=TOLERANCE / min(STD))
    assert found.shape == (40, 3, 32, 32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    before = found.clone()
    fuse(images, EVERYTHING, ViewSpec(), size=32)
    assert torch.equal(found, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deviation", [1e-5, 0.2, 1e3, 1e5])
def test_shorter_floats_are_the_float32_views_rounded_to_nearest(dtype: torch.dtype, deviation: float) -> None:
    arguments: dict[str, Any] = {"size": 32, "mean": (0.5, 0.25, 128 / 255), "std": (deviation,) * 3}
    images = make_images(64)
    images[4::7] = 128  # zeros after normalising, and for large deviations numbers below the smallest normal float16
    # and for small ones numbers above the largest
    exact = fuse(images, EVERYTHING, ViewSpec(), **arguments)
    found = fuse(images, EVERYTHING, ViewSpec(), dtype=dtype, **arguments)
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


# A view is a function of seed, epoch and image alone


def test_threads_and_the_rest_of_the_batch_change_nothing() -> None:
    images, indices = make_images(61), np.random.default_rng(0).permutation(50_000)[:61]
    arguments: dict[str, Any] = {"size": 32, "mean": MEAN, "std": STD}
    with FusedViews(EVERYTHING, ViewSpec(), **arguments) as views:
        whole = views(images, indices, seed=1, epoch=2).view(2, 61, 3, 32, 32)
        for part in (slice(0, 1), slice(1, 40), slice(40, 61), slice(7, 7), slice(None, None, 2)):
            found = views(images[part], torch.from_numpy(indices[part]), seed=1, epoch=2)
            assert torch.equal(found, whole[:, part].flatten(0, 1))
    for threads in (2, 3, 20):
        with FusedViews(EVERYTHING, ViewSpec(), threads=threads, **arguments) as views:
            assert torch.equal(views(images, indices, seed=1, epoch=2), whole.flatten(0, 1))


def test_parameters_are_those_of_view_1_and_view_2() -> None:
    images, indices = make_images(9), np.arange(100, 109)
    drawn: list[ViewParameters] = [
        sample_parameters(spec, indices, seed=3, epoch=4, view=view, height=32, width=32)
        for view, spec in ((1, EVERYTHING), (2, ViewSpec()))
    ]
    with FusedViews(EVERYTHING, ViewSpec(), size=32, **UNIT) as views:
        assert torch.equal(views(images, indices, seed=3, epoch=4), views.apply(images, drawn))
        assert not torch.equal(views(images, indices, seed=3, epoch=5), views.apply(images, drawn))


# Compiled code

PROGRAM = """
import hashlib, numpy as np, torch
from simclr.views import fused_views
from simclr.views import ViewSpec
image = torch.arange(8 * 16 * 16 * 3).to(torch.uint8).view(8, 16, 16, 3)
with fused_views.FusedViews(ViewSpec(), ViewSpec(), size=16, mean=(0, 0, 0), std=(1, 1, 1)) as views:
    pixels = views(image, np.arange(8), seed=0, epoch=0)
print(hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), fused_views.compiled().how)
"""


def start_program(cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": ""}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_compiled_code_is_kept_by_processes_that_compile_at_once_and_replaced_when_damaged(tmp_path: Path) -> None:
    image = torch.arange(8 * 16 * 16 * 3).to(torch.uint8).view(8, 16, 16, 3)
    expected = hashlib.sha256(fuse(image, ViewSpec(), ViewSpec(), size=16).numpy().tobytes()).hexdigest()

    def finish(program: subprocess.Popen[str]) -> str:
        output, _ = program.communicate(timeout=300)
        assert program.returncode == 0
        digest, _, how = output.strip().partition(" ")
        assert digest == expected
        return how

    for how in map(finish, [start_program(tmp_path), start_program(tmp_path)]):
        assert str(tmp_path) in how
    assert finish(start_program(tmp_path)).startswith("loaded")
    (kept,) = tmp_path.rglob("*.nbc")
    kept.write_bytes(kept.read_bytes()[:1000])
    assert "was damaged" in finish(start_program(tmp_path))


def test_code_that_others_could_change_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = fused_views.cache_folder()
    assert folder is not None
    assert folder.is_relative_to(tmp_path)
    folder.chmod(0o777)
    other = fused_views.cache_folder()
    assert other is None or not other.is_relative_to(tmp_path)


def test_without_a_writable_folder_there_is_another_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()  # no folder can be made below a file, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = fused_views.cache_folder()
    assert folder is not None
    assert folder.is_relative_to(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(in_the_way))
    assert fused_views.cache_folder() is None


def test_thread_counts_of_torch_and_numba_are_left_alone() -> None:
    import numba

    numba_before = numba.get_num_threads()  # this starts numba's own threads, and changes torch's number itself
    torch.set_num_threads(1)
    fuse(make_images(4), ViewSpec(), ViewSpec(), size=32, threads=2)
    assert (torch.get_num_threads(), numba.get_num_threads()) == (1, numba_before)


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float64}, "dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
        ({"size": 0}, "at least 1, got size 0"),
        ({"threads": 0}, "threads 0"),
        ({"std": (1, 1, 0)}, "std must be 3 finite numbers > 0"),
    ],
)
def test_settings_name_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedViews(ViewSpec(), ViewSpec(), **({"size": 32, **UNIT} | arguments))


def test_pixels_are_never_read_outside_of_the_image() -> None:
    with FusedViews(ViewSpec(), ViewSpec(), size=32, **UNIT) as views:
        with pytest.raises(ValueError, match="crop of image 0 leaves the 32 x 32 image"):
            views.apply(make_images(2), [identity(2, crop_top=np.array([1, 0]))] * 2)
        with pytest.raises(ValueError, match="has 3 rows, but there are 2 images"):
            views.apply(make_images(2), [identity(3)] * 2)
        with pytest.raises(ValueError, match="uint8 of shape"):
            views.apply(make_images(2).float(), [identity(2)] * 2)
    wide = ViewSpec(blur_probability=1.0, blur_kernel=17)
    with pytest.raises(ValueError, match="blur_kernel 17 is too wide"):
        fuse(make_images(1, 8, 8), wide, wide, size=8)


def test_numba_that_is_told_to_compile_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    with pytest.raises(ValueError, match=r"NUMBA_DISABLE_JIT is set.*--views torch"):
        fused_views.compiled.__wrapped__()
