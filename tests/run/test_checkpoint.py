"""Checkpoints survive kills and full disks; damaged, foreign and malicious files are refused by name."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import pickle
import random
import resource
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr.beton import Facts
from simclr.config import OptimizerConfig, TrainConfig, to_json
from simclr.models import ModelConfig, SimCLR
from simclr.optim import make_optimizer
from simclr.run import checkpoint
from simclr.run.checkpoint import (
    SCHEMA,
    CheckpointError,
    CheckpointWriter,
    HostCopies,
    load_newest,
    load_pretrained,
    load_resumable,
    load_safely,
    save_atomically,
)
from simclr.views import ViewSpec
from tests.ranks import other_process

CONFIG = TrainConfig(
    data=Path("elsewhere/train.beton"),
    output=None,
    seed=3,
    model=ModelConfig("small_resnet_w8", projector_hidden=6, projection_dim=5),
    optimizer=OptimizerConfig(name="lars", gradient_clip_norm=1.5),
    view_2=ViewSpec(crop_scale=(0.3, 0.9), solarise_probability=0.2),
)
FACTS = Facts(
    source="drawn",
    split="train",
    num_images=7,
    height=16,
    width=16,
    encoding="raw",
    jpeg_quality=None,
    lossy_source=False,
    classes=("one", "two"),
    class_counts=(3, 4),
    channel_mean=(0.1, 0.2, 1 / 3),
    channel_std=(0.4, 0.5, 0.6),
    content_sha256="0" * 64,
    file_bytes=1234,
    tables_sha256="1" * 64,
    written_by={"numpy": "2.0"},
)


def a_model(seed: int = 0) -> SimCLR:
    torch.manual_seed(seed)
    model = SimCLR(CONFIG.model, FACTS.height)
    model(torch.randn(4, 3, 16, 16))  # running statistics of its own
    return model


def about(model: SimCLR, **changes: Any) -> dict[str, Any]:
    known = {"config": to_json(CONFIG), "facts": to_json(FACTS), "step": 12, "epoch": 2}
    return {"model": model, **known, "knn_accuracy": 40.5, "best_knn_accuracy": 41.0, **changes}


def write_best(path: Path, **changes: Any) -> SimCLR:
    """A checkpoint with entries changed, or removed where the change is None."""
    model = a_model()
    payload = checkpoint.model_payload(**about(model)) | changes
    save_atomically(path, {key: value for key, value in payload.items() if value is not None})
    return model


# ------------------------------------------------------------------------------------------ there and back


def test_a_pretrained_model_comes_back_whole(tmp_path: Path) -> None:
    model = write_best(tmp_path / checkpoint.BEST)
    for path in (tmp_path, tmp_path / checkpoint.BEST):  # a folder stands for its best epoch
        loaded = load_pretrained(path)
        state = loaded.model.state_dict()
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert loaded.config == CONFIG
        assert loaded.facts == FACTS
        assert (loaded.step, loaded.epoch, loaded.knn_accuracy) == (12, 2, 40.5)
        assert loaded.path == tmp_path / checkpoint.BEST
        assert not any(module.training for module in loaded.model.modules())


def test_a_resumable_checkpoint_comes_back_whole_and_is_a_model_too(tmp_path: Path) -> None:
    model, path = a_model(), tmp_path / checkpoint.LAST
    optimizer = make_optimizer(model, CONFIG.optimizer)
    _, z = model(torch.randn(4, 3, 16, 16))
    torch.autograd.backward(z.square().sum())
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    known = {"optimizer": optimizer, "world_size": 4, **about(model)}
    save_atomically(path, checkpoint.resumable_payload(scaler=scaler, **known))

    saved = load_resumable(path)
    assert (saved["kind"], saved["world_size"], saved["step"]) == ("resumable", 4, 12)
    assert (saved["knn_accuracy"], saved["best_knn_accuracy"]) == (40.5, 41.0)
    assert saved["scaler"] == scaler.state_dict()
    other = a_model(seed=1)
    other.load_state_dict(saved["model"])
    resumed = make_optimizer(other, CONFIG.optimizer)
    resumed.load_state_dict(saved["optimizer"])
    before, after = optimizer.state_dict(), resumed.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for key, state in before["state"].items():
        assert torch.equal(state["momentum_buffer"], after["state"][key]["momentum_buffer"])
    assert load_pretrained(path).step == 12

    save_atomically(path, checkpoint.resumable_payload(scaler=None, **known))
    assert load_resumable(path)["scaler"] == {}


def test_files_get_ordinary_permissions_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        save_atomically(tmp_path / "a.pt", {"schema": SCHEMA})
        save_atomically(tmp_path / "a.pt", {"schema": SCHEMA})
    finally:
        os.umask(mask)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert (tmp_path / "a.pt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, (2, np.float64(3))]}, r"payload\['a'\]\[1\]\[1\] is a float64"),
        ({"path": Path("x")}, r"payload\['path'\] is a \w*Path"),
        ({Path("x"): 1}, r"a key of payload is a \w*Path"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=f"{where}, which a checkpoint cannot hold"):
        save_atomically(tmp_path / "a.pt", value)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- writing


def kill_writers(path: Path, counts: Path) -> None:
    """Start 25 of them one after the other; count how many left a file half written, and the files written."""
    torch.set_num_threads(1)  # threads do not survive a fork
    delays = random.Random(0)

    def payload(i: int) -> dict[str, Any]:
        return {"schema": SCHEMA, "i": i, "tensors": [torch.full((250_000,), float(i)) for _ in range(8)]}

    save_atomically(path, payload(0))
    last, in_the_middle = 0, 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # should the parent end first
            for i in itertools.count(last + 1):
                save_atomically(path, payload(i))
        time.sleep(delays.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        in_the_middle += any(path.parent.glob(".*.tmp"))
        saved = load_safely(path)
        assert saved["i"] >= last, (saved["i"], last)
        assert len(saved["tensors"]) == 8
        assert all((t == saved["i"]).all() for t in saved["tensors"])
        last = saved["i"]
    counts.write_text(f"{in_the_middle} {last}")


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "run" / "x.pt"
    path.parent.mkdir()
    with other_process(kill_writers, path, tmp_path / "counts") as killing:
        killing.join(120)
        assert killing.exitcode == 0
    in_the_middle, written = map(int, (tmp_path / "counts").read_text().split())
    assert in_the_middle >= 3  # else this test has shown nothing
    assert written >= 3
    save_atomically(path, {"schema": SCHEMA})  # and the next program that saves tidies up
    assert [p.name for p in path.parent.iterdir()] == ["x.pt"]


@contextmanager
def full_disk(_: Path) -> Any:
    """No file can grow beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_says_so_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_atomically(path, {"schema": SCHEMA, "old": True})
    with full_disk(path), pytest.raises(CheckpointError, match=r"cannot write .*x\.pt: .*The old file stays"):
        save_atomically(path, {"schema": SCHEMA, "new": torch.zeros(100_000)})
    assert load_safely(path) == {"schema": SCHEMA, "old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


# --------------------------------------------------------------------------------------- damaged and hostile


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def test_no_flipped_bit_changes_what_is_loaded(tmp_path: Path) -> None:
    """All over the file. Some bytes hold nothing: padding, dates, sizes that stand there twice."""
    path = tmp_path / "x.pt"
    payload = {"schema": SCHEMA, "weight": torch.randn(40), "count": torch.arange(7), "config": "{}", "step": 5}
    save_atomically(path, payload)
    content = path.read_bytes()
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = load_safely(path)
        except CheckpointError:
            refused += 1
        else:
            assert same(found, payload)
    assert refused > len(content) // 3


def test_a_flipped_bit_in_a_weight_is_what_torch_alone_would_not_notice(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    weight = torch.full((1000,), 1.25)
    save_atomically(path, {"schema": SCHEMA, "weight": weight})
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 2003] ^= 0x40
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["weight"], weight)
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged .*archive/data/0 in it has a wrong checksum"):
        load_safely(path)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_file_raises(tmp_path: Path, kept: float) -> None:
    write_best(tmp_path / checkpoint.BEST)
    content = (tmp_path / checkpoint.BEST).read_bytes()
    (tmp_path / checkpoint.BEST).write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=rf"{checkpoint.BEST} is damaged or no checkpoint of this project"):
        load_pretrained(tmp_path)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("hello"), "damaged or no checkpoint"),
        (lambda path: path.write_bytes(pickle.dumps({"schema": SCHEMA})), "damaged or no checkpoint"),
        (write_zip, "damaged or no checkpoint"),
        (lambda path: save_atomically(path, {"state_dict": {}}), "has schema None, this version reads 3"),
        (lambda path: save_atomically(path, {"schema": 1}), "has schema 1, this version reads 3"),
        (lambda path: save_atomically(path, [1, 2]), "has schema 'list', this version reads 3"),  # type: ignore[arg-type]
        (lambda path: path.mkdir(), "no checkpoint at"),
        (lambda path: None, "no checkpoint at"),
    ],
)
@pytest.mark.parametrize("load", [load_safely, load_resumable])
def test_foreign_files_raise_naming_the_file(
    tmp_path: Path, write: Callable[[Path], object], message: str, load: Callable[[Path], object]
) -> None:
    path = tmp_path / "foreign.pt"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("forced", [False, True])
def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path, victim = tmp_path / "x.pt", tmp_path / "victim"
    torch.save({"schema": SCHEMA, "model": Malicious(victim)}, path)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged or no checkpoint.*(?i:unsupported|weights)"):
        load_safely(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists()  # it would have


# ---------------------------------------------------------------------------------------------- not fitting


def renamed(model: SimCLR, old: str, new: str | None) -> dict[str, Tensor]:
    state = dict(copy.deepcopy(model.state_dict()))
    value = state.pop(old)
    return state | ({new: value} if new else {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": renamed(a_model(), "encoder.bn1.running_mean", None)}, "Missing key.*encoder.bn1.running_mean"),
        ({"model": renamed(a_model(), "encoder.bn1.bias", "encoder.bn1.b")}, "Unexpected key.*encoder.bn1.b"),
        ({"model": a_model().state_dict() | {"projector.0.weight": torch.zeros(2, 2)}}, "size mismatch for projector"),
        ({"model": {}}, "Missing key"),
        ({"model": "weights"}, "does not fit"),
        ({"config": to_json(CONFIG).replace('"seed"', '"sead"')}, "unknown fields .'sead'.*missing fields .'seed'"),
        ({"config": "{"}, "does not fit this version of the code"),
        ({"config": 5}, "does not fit this version of the code"),
        ({"facts": to_json(FACTS).replace("1234", "-1.5")}, "file_bytes is -1.5, expected a whole number"),
        ({"facts": None}, r"is no pretrained model: it lacks \['facts'\]"),
    ],
)
def test_contents_that_do_not_fit_raise(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_best(tmp_path / checkpoint.BEST, **changes)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        load_pretrained(tmp_path)
    assert str(tmp_path / checkpoint.BEST) in str(caught.value)


def test_a_model_alone_cannot_be_continued_from(tmp_path: Path) -> None:
    write_best(tmp_path / checkpoint.BEST, extra=1)
    lacking = r"it lacks \['optimizer', 'scaler', 'world_size'\] and has besides \['extra'\]"
    with pytest.raises(CheckpointError, match=f"cannot be continued from: {lacking}"):
        load_resumable(tmp_path / checkpoint.BEST)


def test_a_folder_without_a_best_epoch_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"holds no {checkpoint.BEST}; .*name its {checkpoint.LAST}"):
        load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        load_pretrained(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------- the last ones, in the background


def a_payload(step: int) -> dict[str, Any]:
    model = a_model()
    optimizer = make_optimizer(model, CONFIG.optimizer)
    known = about(model, step=step, best_knn_accuracy=float(step))
    return checkpoint.resumable_payload(optimizer=optimizer, scaler=None, world_size=1, **known)


def write_steps(folder: Path, *steps: int, keep: int = 3, last_step: int | None = None) -> None:
    with CheckpointWriter(folder, keep=keep, last_step=last_step) as writer:
        for step in steps:
            writer.save(a_payload(step), is_best=step == steps[0])


def test_the_last_ones_are_kept_under_names_of_their_own(tmp_path: Path) -> None:
    write_steps(tmp_path, 4, 8, 12, 16)
    kept = {path.name: load_safely(path)["step"] for path in tmp_path.iterdir()}
    assert kept == {
        checkpoint.LAST: 16,
        "checkpoint_step00000012.pt": 12,
        "checkpoint_step00000008.pt": 8,
        checkpoint.BEST: 4,
    }
    write_steps(tmp_path, 20, keep=1, last_step=16)  # another program goes on, and keeps fewer
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.LAST, checkpoint.BEST}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, cut, zero, flip])
def test_any_damage_to_any_file_is_noticed_and_the_newest_intact_one_is_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    write_steps(tmp_path, 4, 8, 12)
    files = [checkpoint.LAST, "checkpoint_step00000008.pt", "checkpoint_step00000004.pt"]
    for number, step_left in enumerate([8, 4], start=1):
        damage(tmp_path / files[number - 1])
        found = load_newest(tmp_path)
        assert found is not None
        assert (found.payload["step"], found.path) == (step_left, tmp_path / files[number])
        passed = [
            str(tmp_path / name) for name in files[:number] if name == checkpoint.LAST or damage is not Path.unlink
        ]
        assert len(found.passed_over) == len(passed)
        for reason, path in zip(found.passed_over, passed, strict=True):
            assert path in reason  # and why
            assert "damaged" in reason or "no checkpoint at" in reason
    damage(tmp_path / files[2])
    if damage is Path.unlink:
        assert load_newest(tmp_path) is None
    else:
        with pytest.raises(
            CheckpointError, match=r"none of its checkpoints is intact: .*_last.*step00000008.*00000004"
        ):
            load_newest(tmp_path)
    damage(tmp_path / checkpoint.BEST)
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path)


def test_what_may_not_be_read_is_neither_called_damaged_nor_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, 4, 8)
    last, opened = tmp_path / checkpoint.LAST, Path.open

    def failing(number: int) -> Callable[..., Any]:
        """What a disk or a user without rights meets, whatever user runs this test."""

        def fail(path: Path, *arguments: Any) -> Any:
            if path == last:
                raise OSError(number, os.strerror(number), str(path))
            return opened(path, *arguments)

        return fail

    monkeypatch.setattr(Path, "open", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        load_newest(tmp_path)
    monkeypatch.setattr(Path, "open", failing(errno.EIO))  # a disk that fails has lost it
    found = load_newest(tmp_path)
    assert found is not None
    assert (found.payload["step"], found.passed_over) == (
        4,
        (f"{last} is damaged or cannot be read: Input/output error",),
    )


def test_what_was_passed_over_is_replaced_and_what_was_continued_from_stays(tmp_path: Path) -> None:
    write_steps(tmp_path, 4, 8, 12)
    for name in (checkpoint.LAST, "checkpoint_step00000008.pt"):
        flip(tmp_path / name)
    write_steps(tmp_path, 8, keep=2)  # as the run that continues after step 4
    kept = {path.name: load_safely(path)["step"] for path in tmp_path.iterdir()}
    assert kept == {checkpoint.LAST: 8, "checkpoint_step00000004.pt": 4, checkpoint.BEST: 8}


def test_what_changes_after_save_returned_is_not_written(tmp_path: Path) -> None:
    payload = a_payload(4)
    weight = payload["model"]["projector.0.weight"]
    before, is_filled = weight.clone(), threading.Event()

    def wait() -> None:
        assert is_filled.wait(10)

    with CheckpointWriter(tmp_path, keep=2, last_step=None, before=wait) as writer:
        writer.save(payload, is_best=False)
        weight.fill_(7.0)  # as the next optimizer step would, before the thread writes
        is_filled.set()
    assert torch.equal(load_resumable(tmp_path / checkpoint.LAST)["model"]["projector.0.weight"], before)


def test_host_copies_keep_values_types_and_memory_format_in_the_same_buffers() -> None:
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    payload = {"a": [channels_last, (1, "x")], "b": {0: torch.arange(3)}, "c": None}
    copies = HostCopies()
    first = copies.take(payload)
    assert same(first["b"], payload["b"])
    assert torch.equal(first["a"][0], channels_last)
    assert first["a"][0].is_contiguous(memory_format=torch.channels_last)
    assert first["a"][1] == (1, "x")
    assert first["a"][0].data_ptr() != channels_last.data_ptr()
    assert copies.take(payload)["a"][0].data_ptr() == first["a"][0].data_ptr()


def test_a_failure_in_the_background_is_raised_at_the_next_step_and_at_the_end(tmp_path: Path) -> None:
    def save_too_much(writer: CheckpointWriter) -> None:
        writer.save(a_payload(8) | {"optimizer": {"big": torch.zeros(100_000)}}, is_best=False)

    def save_and_leave() -> None:
        with CheckpointWriter(tmp_path, keep=2, last_step=4) as writer:
            save_too_much(writer)

    def train_on(writer: CheckpointWriter) -> None:
        while True:
            writer.raise_if_failed()

    write_steps(tmp_path, 4)
    with full_disk(tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint_last\.pt"):
            save_and_leave()
        with CheckpointWriter(tmp_path, keep=2, last_step=4) as writer:
            save_too_much(writer)
            with pytest.raises(CheckpointError, match="cannot write"):
                train_on(writer)
            writer.raise_if_failed()  # once
    found = load_newest(tmp_path)
    assert found is not None
    assert (found.payload["step"], found.passed_over) == (4, ())


def test_each_save_tells_when_it_is_on_the_disk(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    def last() -> int:
        return int(load_safely(tmp_path / checkpoint.LAST)["step"]) if (tmp_path / checkpoint.LAST).exists() else 0

    with CheckpointWriter(
        tmp_path,
        keep=1,
        last_step=None,
        before=lambda: told.append(("before", last())),
        after=lambda step: told.append(("after", last() if step == last() else -1)),
    ) as writer:
        for step in (1, 2):
            writer.save(a_payload(step), is_best=False)
    assert told == [("before", 0), ("after", 1), ("before", 1), ("after", 2)]
