"""The order of the images, and the in-memory source. What concerns FFCV is in test_data_ffcv.py."""

from __future__ import annotations

import itertools
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simclr import beton, data
from simclr.data import EpochPlan, few_labels, open_images, validation_split

NUM_IMAGES, HEIGHT, WIDTH = 1003, 8, 6


def numbered_images(n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images whose pixels all follow from their index, and labels 0 to 4."""
    generator = np.random.Generator(np.random.Philox(7))
    images = generator.integers(0, 256, (n, HEIGHT, WIDTH, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    return images, np.arange(n) % 5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "numbered.beton"
    beton.write(path, *numbered_images(NUM_IMAGES))
    return path


def every_rank(world_size: int, epoch: int = 0, start_step: int = 0, **fields: object) -> list[list[NDArray[np.int64]]]:
    """[rank][step] -> this rank's slice."""
    fields = {"indices": np.arange(NUM_IMAGES), "global_batch_size": 64, **fields}
    plans = [EpochPlan(world_size=world_size, rank=rank, **fields) for rank in range(world_size)]  # type: ignore[arg-type]
    return [list(plan.batches(epoch, start_step)) for plan in plans]


def philox_4x64_10(key: tuple[int, int], num_draws: int) -> list[int]:
    """Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", in Python's integers; first counter is 1."""
    mask, draws = 2**64 - 1, []
    for count in itertools.count(1):
        (k0, k1), (c0, c1, c2, c3) = key, (count, 0, 0, 0)
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        draws += [c0, c1, c2, c3]
        if len(draws) >= num_draws:
            return draws[:num_draws]
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------------
# EpochPlan


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_epoch_reads_each_image_at_most_once_and_ranks_never_overlap(world_size: int) -> None:
    for epoch in range(3):
        seen = np.concatenate(list(itertools.chain(*every_rank(world_size, epoch))))
        assert len(seen) == NUM_IMAGES // 64 * 64
        assert len(np.unique(seen)) == len(seen)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_are_the_same_for_every_world_size(world_size: int, drop_last: bool) -> None:
    (alone,) = every_rank(1, epoch=5, seed=3, drop_last=drop_last)
    together = every_rank(world_size, epoch=5, seed=3, drop_last=drop_last)
    assert len(together) == world_size
    for step, batch in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([rank[step] for rank in together]), batch)
    assert {len(rank) for rank in together} == {len(alone)}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_take_equal_shares_of_a_training_batch(world_size: int) -> None:
    shares = {len(rows) for rank in every_rank(world_size) for rows in rank}
    assert shares == {64 // world_size}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_epoch_resumed_at_any_step_continues_the_same_sequence(world_size: int) -> None:
    whole = every_rank(world_size, epoch=2)
    num_steps = len(whole[0])
    assert num_steps == 15
    for start_step in range(num_steps + 1):
        resumed = every_rank(world_size, epoch=2, start_step=start_step)
        for rank in range(world_size):
            assert len(resumed[rank]) == num_steps - start_step
            for rows, expected in zip(resumed[rank], whole[rank][start_step:], strict=True):
                np.testing.assert_array_equal(rows, expected)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    def order(seed: int, epoch: int) -> bytes:
        return np.concatenate(every_rank(1, epoch, seed=seed, drop_last=False)[0]).tobytes()

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    np.random.seed(0)  # noqa: NPY002 - the global generator, which must not matter
    torch.manual_seed(0)
    assert all(order(*key) == orders[key] for key in reversed(list(orders)))


def test_order_is_the_rank_of_philox_draws() -> None:
    """Against a second implementation: results stay comparable between versions of numpy and of this project."""
    for seed, epoch in [(0, 0), (0, 1), (2**64 - 1, 7), (123456789, 999)]:
        draws = philox_4x64_10((seed, epoch), 100)
        expected = sorted(range(100), key=draws.__getitem__)
        plan = EpochPlan(np.arange(100), 100, seed=seed)
        assert next(plan.batches(epoch)).tolist() == expected


def test_every_image_is_equally_likely_at_every_place() -> None:
    n, num_epochs = 8, 4000
    plan = EpochPlan(np.arange(n), n, seed=11)
    orders = np.stack([next(plan.batches(epoch)) for epoch in range(num_epochs)])
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi_square = ((counts - num_epochs / n) ** 2 / (num_epochs / n)).sum()
    assert chi_square < 85.4  # 99.9 % quantile with 7 * 7 degrees of freedom


def test_only_the_given_indices_are_read() -> None:
    indices = np.random.Generator(np.random.Philox(1)).permutation(NUM_IMAGES)[:300]
    for world_size in (1, 3):
        seen = np.concatenate(list(itertools.chain(*every_rank(world_size, indices=indices, drop_last=False))))
        assert sorted(seen.tolist()) == sorted(indices.tolist())


def test_without_shuffling_the_order_of_indices_is_kept() -> None:
    indices = np.arange(NUM_IMAGES)[::-1]
    for epoch in (0, 3):
        (batches,) = every_rank(1, epoch, indices=indices, shuffle=False, drop_last=False)
        np.testing.assert_array_equal(np.concatenate(batches), indices)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("num_images", "global_batch_size"), [(1003, 100), (1003, 64), (5, 7), (9, 2), (12, 5)])
def test_evaluation_reads_every_image_exactly_once(world_size: int, num_images: int, global_batch_size: int) -> None:
    ranks = every_rank(
        world_size,
        indices=np.arange(num_images),
        global_batch_size=global_batch_size,
        shuffle=False,
        drop_last=False,
    )
    for slices in zip(*ranks, strict=True):  # the same number of steps on every rank
        sizes = [len(rows) for rows in slices]
        assert max(sizes) - min(sizes) <= 1
    for slices_of_a_rank in ranks:  # what the readers rely on: only the last batch is smaller
        assert len({len(rows) for rows in slices_of_a_rank[:-1]}) <= 1
        assert len(slices_of_a_rank[-1]) <= len(slices_of_a_rank[0])
    in_order = [rows for slices in zip(*ranks, strict=True) for rows in slices]
    np.testing.assert_array_equal(np.concatenate(in_order), np.arange(num_images))


def test_a_rank_without_images_still_makes_every_step() -> None:
    ranks = every_rank(4, indices=np.arange(9), global_batch_size=4, drop_last=False, shuffle=False)
    assert [[rows.tolist() for rows in rank] for rank in ranks] == [
        [[0], [4], [8]],
        [[1], [5], []],
        [[2], [6], []],
        [[3], [7], []],
    ]


def test_length_is_the_number_of_steps() -> None:
    for n, size, drop_last, expected in [(10, 5, True, 2), (11, 5, True, 2), (11, 5, False, 3), (4, 5, False, 1)]:
        plan = EpochPlan(np.arange(n), size, drop_last=drop_last)
        assert len(plan) == len(list(plan.batches())) == expected


def test_a_plan_cannot_be_changed_from_outside() -> None:
    indices = np.arange(8)
    plan = EpochPlan(indices, 8, shuffle=False)
    indices[:] = 0
    assert next(plan.batches()).tolist() == list(range(8))
    with pytest.raises(ValueError, match="read-only"):
        plan.indices[0] = 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_batch_size": 1000, "world_size": 3}, r"1000 is not divisible by world_size 3; use 999 or 1002"),
        ({"global_batch_size": 2, "world_size": 4}, r"2 is not divisible by world_size 4; use 4$"),
        ({"global_batch_size": 1004}, r"1003 images do not fill one batch of global_batch_size 1004"),
        ({"global_batch_size": 0}, r"global_batch_size must be an integer >= 1, got 0"),
        ({"global_batch_size": 32.0}, r"global_batch_size must be an integer >= 1, got 32.0"),
        ({"world_size": 0}, r"world_size must be an integer >= 1, got 0"),
        ({"world_size": 2, "rank": 2}, r"rank must be an integer from 0 to 1, got 2"),
        ({"rank": -1}, r"rank must be an integer from 0 to 0, got -1"),
        ({"seed": -1}, r"seed must be an integer from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, r"seed must be an integer from 0 to 18446744073709551615, got"),
        ({"indices": np.arange(0)}, r"indices is empty"),
        ({"indices": np.array([3, -1, 2])}, r"indices must be >= 0, got -1"),
        ({"indices": np.array([3, 4, 3, 3])}, r"indices must not repeat: 2 of 4 do"),
        ({"indices": np.arange(4.0)}, r"must be a 1-D array of int64, got float64 \(4,\)"),
        ({"indices": np.ones(NUM_IMAGES, bool)}, r"must be a 1-D array of int64, got bool \(1003,\)"),
        ({"indices": np.arange(4, dtype=np.uint64)}, r"must be a 1-D array of int64, got uint64 \(4,\)"),
        ({"indices": np.arange(4).reshape(2, 2)}, r"must be a 1-D array of int64, got int64 \(2, 2\)"),
    ],
)
def test_impossible_plans_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochPlan(**{"indices": np.arange(NUM_IMAGES), "global_batch_size": 64, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16), r"start_step must be an integer from 0 to 15, got 16"),
        ((0, -1), r"start_step must be an integer from 0 to 15, got -1"),
        ((-1, 0), r"epoch must be an integer from 0 to 18446744073709551615, got -1"),
        ((1.5, 0), r"epoch must be an integer .* got 1.5"),
    ],
)
def test_impossible_positions_are_refused_at_the_call(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochPlan(np.arange(NUM_IMAGES), 64).batches(*arguments)


# ---------------------------------------------------------------------------------------------------------------
# validation_split


def test_validation_split_divides_the_images() -> None:
    train, validation = validation_split(50_000, 5_000)
    assert (len(train), len(validation)) == (45_000, 5_000)
    assert train.dtype == validation.dtype == np.dtype(np.int64)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(50_000))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    # A random tenth of each stretch of the file: files are often sorted by class.
    assert np.bincount(validation // 5_000, minlength=10).std() < 3 * np.sqrt(5_000 * 0.1 * 0.9)


def test_validation_split_never_changes() -> None:
    draws = philox_4x64_10((int.from_bytes(b"VALIDATE", "big"), 0), 200)
    expected = sorted(sorted(range(200), key=draws.__getitem__)[:20])
    assert validation_split(200, 20)[1].tolist() == expected
    assert set(expected) < set(validation_split(200, 50)[1].tolist())


@pytest.mark.parametrize("numbers", [(10, 10), (10, -1), (0, 0), (10, 2.5)])
def test_impossible_splits_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"num_(images|validation) must be an integer"):
        validation_split(*numbers)


def test_nothing_may_be_held_out() -> None:
    train, validation = validation_split(10, 0)
    assert (train.tolist(), validation.tolist()) == (list(range(10)), [])


# ---------------------------------------------------------------------------------------------------------------
# The in-memory source, and opening


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_memory_yields_the_stored_images(tmp_path: Path, encoding: beton.Encoding, world_size: int) -> None:
    path = tmp_path / "x.beton"
    beton.write(path, *numbered_images(300), encoding=encoding)
    images, labels = beton.read(path)
    with open_images(path, backend="memory") as source:
        for rank in range(world_size):
            plan = EpochPlan(np.arange(300), 128, world_size, rank, seed=1, drop_last=False)
            batches = list(source.batches(plan, epoch=4))
            assert len(batches) == len(plan) == 3
            for batch, rows in zip(batches, plan.batches(4), strict=True):
                assert (batch.image.dtype, batch.label.dtype, batch.index.dtype) == (
                    torch.uint8,
                    torch.int64,
                    torch.int64,
                )
                assert batch.image.is_contiguous()
                np.testing.assert_array_equal(batch.index.numpy(), rows)
                np.testing.assert_array_equal(batch.image.numpy(), images[rows])
                np.testing.assert_array_equal(batch.label.numpy(), labels[rows])


def test_batches_own_their_memory(file: Path) -> None:
    plan = EpochPlan(np.arange(NUM_IMAGES), 100, shuffle=False)
    with open_images(file, backend="memory") as source:
        for batch in source.batches(plan):
            for tensor in batch:
                tensor.fill_(99)
        for batch, rows in zip(source.batches(plan), plan.batches(), strict=True):
            np.testing.assert_array_equal(batch.index.numpy(), rows)
            np.testing.assert_array_equal(batch.image.numpy(), numbered_images(NUM_IMAGES)[0][rows])


@pytest.mark.gpu
def test_memory_can_live_on_a_gpu(file: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: images and labels would come from its memory, equal to the CPU's")
    plan = EpochPlan(np.arange(NUM_IMAGES), 100)
    with (
        open_images(file, backend="memory", device="cuda") as resident,
        open_images(file, backend="memory") as expected,
    ):
        for ours, theirs in zip(resident.batches(plan), expected.batches(plan), strict=True):
            assert (ours.image.device.type, ours.label.device.type, ours.index.device.type) == ("cuda", "cuda", "cpu")
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


def test_a_plan_for_another_file_is_refused_at_the_call(file: Path) -> None:
    with open_images(file, backend="memory") as source:
        with pytest.raises(ValueError, match=r"reads image 1003, but .* has 1003 images \(0 to 1002\)"):
            source.batches(EpochPlan(np.arange(NUM_IMAGES + 1), 10))
        with pytest.raises(ValueError, match="start_step must be an integer from 0 to 10, got 11"):
            source.batches(EpochPlan(np.arange(NUM_IMAGES), 100), start_step=11)


def test_a_closed_source_says_so(file: Path) -> None:
    plan = EpochPlan(np.arange(NUM_IMAGES), 100)
    with open_images(file, backend="memory") as source:
        started = source.batches(plan)
        next(started)
    source.close()
    for read in (lambda: next(started), lambda: source.batches(plan)):
        with pytest.raises(ValueError, match="was closed; open it again"):
            read()


@pytest.mark.parametrize("backend", ["auto", "ffcv", "memory"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: beton.sidecar_path(path).unlink(), "no such file; it holds the facts"),
        (lambda path: path.write_bytes(path.read_bytes()[:-12]), "sha256 of its tables"),
        (lambda path: _flip_byte(path, at=3 << 20), "sha256"),
    ],
    ids=["no file", "no sidecar", "cut", "one pixel"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: object, message: str, backend: data.BackendChoice) -> None:
    path = tmp_path / "x.beton"
    beton.write(path, *numbered_images(20_000))
    assert callable(damage)
    damage(path)
    with pytest.raises(beton.BetonError, match=message):
        open_images(path, backend=backend)


def _flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_checksum_of_a_large_file_is_left_out_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.beton"
    beton.write(path, *numbered_images(20_000))
    with open_images(path, backend="memory") as source:
        assert source.reason.endswith("checksum verified")
    monkeypatch.setattr(data, "_CHECKSUM_LIMIT_BYTES", 2 << 20)
    _flip_byte(path, at=3 << 20)
    with open_images(path, backend="memory") as source:
        assert source.reason.endswith("tables checked, checksum not (more than 2 MiB)")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(beton.BetonError, match="sha256 of its tables"):
        open_images(path, backend="memory")


def test_of_a_folder_the_files_in_it_are_named(tmp_path: Path) -> None:
    with pytest.raises(beton.BetonError, match=r"is a folder\. .*data_prep"):
        open_images(tmp_path)
    for name in ("train", "test"):
        (tmp_path / f"{name}.beton").touch()
    with pytest.raises(
        beton.BetonError, match=r"is a folder\. Name a .beton file in it: .*/test\.beton, .*/train\.beton"
    ):
        open_images(str(tmp_path))


def test_unknown_options_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match='backend must be "auto", "ffcv" or "memory", got \'resident\''):
        open_images(file, backend="resident")  # type: ignore[arg-type]
    for num_workers in (0, -1, 1.5):
        with pytest.raises(ValueError, match="num_workers must be an integer >= 1, got"):
            open_images(file, num_workers=num_workers)  # type: ignore[arg-type]


def _hide_ffcv(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


def _install_another_version(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    info = folder / "ffcv-1.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ffcv\nVersion: 1.1.0\n")
    monkeypatch.syspath_prepend(folder)


def _be_on_macos(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_hide_ffcv, "ffcv is not installed (to install it: python native/install_ffcv.py)"),
        (_install_another_version, "ffcv 1.1.0 is installed, and only 1.0.2 is supported"),
        (_be_on_macos, "FFCV runs on Linux only, and this is darwin"),
    ],
    ids=["absent", "another version", "macOS"],
)
def test_without_ffcv_auto_reads_from_memory_and_says_why(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, why: str
) -> None:
    assert callable(change)
    change(monkeypatch, tmp_path)
    with open_images(file) as source:
        assert source.backend == "memory"
        assert why in source.reason
        assert "\n" not in source.reason
    with pytest.raises(ValueError, match="cannot be read with FFCV") as refusal:
        open_images(file, backend="ffcv")
    assert why in str(refusal.value)
    assert '--loader memory (in Python: backend="memory")' in str(refusal.value)


# -------------------------------------------------------------------------------------------------------- few labels


def labels_of(counts: tuple[int, ...], unlabelled: int = 0) -> NDArray[np.int64]:
    labels = np.repeat(np.arange(-1, len(counts)), (unlabelled, *counts))
    return np.random.default_rng(0).permutation(labels)


@pytest.mark.parametrize(("fraction", "fit", "choose"), [(0.01, 4, 1), (0.1, 40, 10), (0.014, 6, 1), (0.992, 397, 99)])
def test_few_labels_are_the_same_number_of_each_class(fraction: float, fit: int, choose: int) -> None:
    labels = labels_of((500, 500, 500), unlabelled=70)
    drawn = few_labels(labels, num_classes=3, fraction=fraction, seed=4)
    for indices, number in zip(drawn, (fit, choose), strict=True):
        assert np.bincount(labels[indices], minlength=3).tolist() == [number] * 3
        assert (np.diff(indices) > 0).all()
    assert not set(drawn[0]) & set(drawn[1])


def test_few_labels_are_drawn_by_the_seed_and_a_smaller_part_is_part_of_a_larger_one() -> None:
    labels = labels_of((100, 100))

    def draw(fraction: float, seed: int) -> set[int]:
        return {int(i) for part in few_labels(labels, num_classes=2, fraction=fraction, seed=seed) for i in part}

    assert draw(0.1, 0) == draw(0.1, 0) != draw(0.1, 1)
    assert draw(0.05, 0) < draw(0.1, 0) < draw(0.5, 0)
    seen = np.bincount([i for seed in range(400) for i in draw(0.1, seed)], minlength=200)
    assert 15 <= seen.min() <= 40 <= seen.max() <= 68  # 40 are expected, with a deviation of 6


def test_a_class_with_fewer_images_gives_all_it_has() -> None:
    labels = labels_of((100, 3))
    fit, choose = few_labels(labels, num_classes=2, fraction=0.2, seed=0)
    assert np.bincount(labels[fit]).tolist() == [8, 2]
    assert np.bincount(labels[choose]).tolist() == [2, 1]


@pytest.mark.parametrize(("counts", "fraction"), [((100, 100), 0.01), ((100, 1), 0.5), ((100, 0), 0.5)])
def test_a_class_without_two_labels_is_refused(counts: tuple[int, ...], fraction: float) -> None:
    with pytest.raises(ValueError, match=r"label_fraction .* 2 of each are needed.*--label-fraction 0\.0"):
        few_labels(labels_of(counts), num_classes=2, fraction=fraction, seed=0)
