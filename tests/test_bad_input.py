"""Files that are damaged, places that may not be used, disks that fill up: a clear error at once, nothing lost."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pickle
import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

import linear_probe
from data_prep import __main__ as data_prep
from data_prep import torchvision_sets
from simclr import beton, files
from simclr.beton import BetonError
from simclr.config import OptimizerConfig, ProbeConfig, SpeedConfig, TrainConfig, derive
from simclr.data import open_images
from simclr.run import checkpoint, runlog
from simclr.run.runlog import RunLog, read_metrics
from tests.helpers import as_nobody, run_on_small_disk, run_python
from tests.runs import SMALL, train_here
from tests.test_data_prep import fake_cifar

N = 64
# Where the metadata ends, the page of pixels begins, and the allocation table does.
METADATA_END, PAGE, TABLE = 24 + 2 * (1 + 16 + 1024) + N * 24, 1 << 21, 2 * (1 << 21)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.beton"
    pixels = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    beton.write(path, pixels, np.arange(N) % 10, classes=[str(i) for i in range(10)])
    return path


def settings(images: Path, output: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        data=images,
        output=output,
        model=SMALL,
        optimizer=OptimizerConfig(warmup_epochs=0),
        global_batch_size=16,
        epochs=1,
        num_validation=0,
        speed=SpeedConfig(loader="memory", views="torch"),
    )
    return dataclasses.replace(config, **changes)


# ---------------------------------------------------------------------------------------------- damaged images


def refused(path: Path) -> bool:
    """Whether the file is refused, before FFCV could open it: as long as it is not, no source is made."""
    try:
        open_images(path, backend="ffcv" if importlib.util.find_spec("ffcv") else "memory").close()
    except BetonError as error:
        return str(path) in str(error)
    return False


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    for source in (images, beton.sidecar_path(images)):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    return tmp_path / images.name


def test_no_random_flip_or_cut_anywhere_passes(damaged: Path) -> None:
    assert not refused(damaged)
    good, generator = damaged.read_bytes(), random.Random(0)
    assert len(good) == TABLE + N * 24
    regions = ((0, METADATA_END), (PAGE, PAGE + N * 32 * 32 * 3), (TABLE, len(good)))  # not the empty rest of a page
    for trial in range(300):
        at = generator.randrange(*regions[trial % 3])
        if trial % 5:
            bit = generator.randrange(8)
            bad, what = good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :], f"bit {bit} of byte {at}"
        else:
            bad, what = good[:at], f"cut at {at}"
        damaged.write_bytes(bad)
        assert refused(damaged), what


def test_a_file_that_changes_while_it_is_opened_is_refused(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = beton.verify

    def verified_and_replaced(path: Path, facts: beton.Facts | None = None) -> beton.Facts:
        facts = verify(path, facts)
        shutil.copy(path, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        return facts

    monkeypatch.setattr(beton, "verify", verified_and_replaced)
    with pytest.raises(BetonError, match="was changed while it was opened"):
        open_images(damaged, backend="memory")


# ------------------------------------------------------------------------------------------- rights, full disks


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="its own files are open to this user")
def test_places_without_rights_are_named_at_once(images: Path, tmp_path: Path, folder_for_all: Path) -> None:
    run = train_here(settings(images, tmp_path / "done"))
    tree = tmp_path / "tree"
    tree.mkdir(mode=0o700)
    readable = folder_for_all / images.name
    folder_for_all.chmod(0o755)
    for source in (images, beton.sidecar_path(images)):
        (folder_for_all / source.name).write_bytes(source.read_bytes())
    attempts: dict[str, Callable[[], object]] = {
        "data": lambda: train_here(settings(images, folder_for_all / "run")),
        "output": lambda: train_here(settings(readable, folder_for_all / "run")),
        "probe": lambda: linear_probe.main(ProbeConfig(run=run)),
    }
    for attempt in attempts.values():
        with as_nobody(), pytest.raises(files.RefusedError, match="Permission denied: this user may not"):
            attempt()
    for source in (tree, readable):
        with as_nobody():
            words = ["imagefolder", "--root", str(source), "--output", str(tree / "x")]
            assert data_prep.main(words) == 1
    assert len(list(folder_for_all.iterdir())) == 2
    assert list(tree.iterdir()) == []


LOG_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from simclr import files
from simclr.run.runlog import RunLog
with files.explain_refusals(), RunLog(Path(sys.argv[1]), is_main=True, total_steps=99) as log:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    for step in range(99):
        log.write("train", step=step, loss=0.5)
"""


def test_a_log_that_finds_no_space_says_so_and_keeps_its_lines(tmp_path: Path) -> None:
    done = run_python("-c", LOG_ON_A_FULL_DISK, tmp_path)
    assert done.returncode == 1
    assert (
        "RefusedError: writing: File too large: files of this process or file system may not be larger" in done.stderr
    )
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert len(lines) >= 10
    with RunLog(tmp_path, is_main=True, total_steps=99, first_step=3) as log:  # and goes on behind them
        log.write("train", step=4, loss=0.5)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_disk_that_fills_during_training_stops_the_run_which_goes_on_when_there_is_space(
    images: Path, tmp_path: Path
) -> None:
    words = ["--data", str(images), "--output", str(tmp_path / "run"), "--model.encoder", "small_resnet_w8"]
    words += ["--epochs", "4", "--global-batch-size", "16", "--num-validation", "0", "--loader", "memory"]
    words += ["--checkpoint-every-steps", "1", "--keep-checkpoints", "99", "--views", "torch"]
    command = f'"{sys.executable}" train_simclr.py demo "$@"; echo "status $?"; cat "{tmp_path}/run/status.json"'
    script = f'{command}; ls -A "{tmp_path}/run"; mount -o remount,size=64m "{tmp_path}"; {command}'
    done = run_on_small_disk(tmp_path, "1m", script, *words)
    print(done.stdout, done.stderr)
    full, again = done.stdout.split("status 1\n")
    assert "step" in full
    assert "is the disk full or read-only? The old file stays" in done.stderr
    assert "Traceback" not in done.stderr
    assert '"state": "failed"' in again
    assert ".tmp" not in again
    assert "resuming:   after step " in again
    assert "status 0\n" in again
    assert '"state": "finished"' in again


# ---------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("batch", [N, 2 * N])
def test_more_processes_than_images_are_refused_with_a_number_that_works(images: Path, batch: int) -> None:
    config = settings(images, Path("unused"), global_batch_size=batch)
    with pytest.raises(ValueError, match=f"use more images or at most {N} processes"):
        derive(config, N, 2 * N)
    assert derive(dataclasses.replace(config, global_batch_size=N), N, N).per_device_batch_size == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epochs": 1}', "\\ud800"])
def test_a_checkpoint_whose_configuration_cannot_be_read_is_refused(images: Path, tmp_path: Path, text: str) -> None:
    folder = train_here(settings(images, tmp_path / "run"))
    payload = checkpoint.load_safely(folder / checkpoint.BEST)
    checkpoint.save_atomically(folder / checkpoint.BEST, payload | {"config": text})
    with pytest.raises(checkpoint.CheckpointError, match=checkpoint.BEST):
        checkpoint.load_pretrained(folder)


def test_a_step_that_the_run_cannot_have_reached_is_refused(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run")
    last = train_here(config) / checkpoint.LAST
    payload = checkpoint.load_resumable(last)
    for changes, message in (
        (
            {"step": 1_000_000},
            r"is of step 1000000, and the run has 4 steps: it is of another run\. Give more --epochs",
        ),
        ({"step": 2}, "is of step 2 and epoch 1, but at 4 steps per epoch that is epoch 0"),
    ):
        checkpoint.save_atomically(last, payload | changes)
        with pytest.raises(checkpoint.CheckpointError, match=message):
            train_here(config)


def test_a_damaged_manifest_is_named_and_what_to_do(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run")
    manifest = train_here(config) / "manifest.json"
    for damage in ("", "[]", '{"sessions": 1}', "\udcff"):
        manifest.write_bytes(damage.encode(errors="surrogateescape"))
        attempts: tuple[Callable[[], object], ...] = (
            lambda: train_here(config),
            lambda: linear_probe.main(ProbeConfig(run=config.folder)),
        )
        for attempt in attempts:
            with pytest.raises(ValueError, match=rf"{manifest} is damaged: .*move it away to go on without"):
                attempt()
    manifest.unlink()
    train_here(config)
    assert len(json.loads(manifest.read_text())["sessions"]) == 1


def test_a_folder_of_other_things_is_no_output_and_stays_as_it_is(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "home"
    output.mkdir()
    for name in ("job.log", "slurm-7-node0.log", "attempts"):  # what the start of a run itself leaves there
        (output / name).touch()
    runlog.require_run_or_empty(output)
    (output / "thesis.tex").touch()
    before = sorted(output.iterdir())
    with pytest.raises(ValueError, match=r"home holds no run, but thesis\.tex: give an --output that is empty"):
        train_here(settings(images, output))
    assert sorted(output.iterdir()) == before
    (output / "thesis.tex").unlink()
    train_here(settings(images, output))
    (output / "notes.txt").touch()  # beside a run everything is welcome
    train_here(settings(images, output))


# ------------------------------------------------------------------------------------------------------ security


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_programs_do_not_start_where_torch_would_execute_checkpoints(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    with pytest.raises(ValueError, match="unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        train_here(settings(images, tmp_path / "run"))
    with pytest.raises(ValueError, match="unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        linear_probe.main(ProbeConfig(run=tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    checkpoint.require_safe_loading()


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("kind", [datasets.CIFAR10, datasets.CIFAR100])
@pytest.mark.parametrize("part", ["train_list", "test_list", "meta"])
def test_no_file_of_cifar_is_unpickled_that_is_not_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: Any, part: str
) -> None:
    victim, root = tmp_path / "victim", tmp_path / "root"
    lists, _ = fake_cifar(root, kind)
    for attribute, value in lists.items():
        monkeypatch.setattr(kind, attribute, value)
    name = kind.meta["filename"] if part == "meta" else lists[part][-1][0]
    bad = root / kind.base_folder / name
    bad.write_bytes(pickle.dumps(Malicious(victim)))
    command = "cifar100" if kind is datasets.CIFAR100 else "cifar10"
    words = [command, "--root", str(root), "--output", str(tmp_path / "out"), "--no-download"]
    assert data_prep.main(words) == 1
    assert "missing or damaged" in capsys.readouterr().err
    assert not victim.exists()
    pickle.loads(bad.read_bytes())
    assert victim.exists()  # it would have


@pytest.mark.parametrize("has_filter", [True, False])
def test_archives_do_not_write_outside_their_folder(
    has_filter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_filter and hasattr(tarfile, "data_filter"):  # as Pythons before 3.11.4 unpack
        monkeypatch.setattr(torchvision_sets, "_FILTER", {"filter": "fully_trusted"})
    root = tmp_path / "root"
    root.mkdir()
    archive = root / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        entry = tarfile.TarInfo("../escaped")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    words = ["cifar10", "--root", str(root), "--output", str(tmp_path / "out"), "--no-download"]
    assert data_prep.main(words) == 1
    assert not (tmp_path / "escaped").exists()
