from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from simclr import files
from simclr.beton import writing
from simclr.run import runlog


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    (tmp_path / ".a.01234567.tmp").touch()  # left behind by a program that was killed
    with pytest.raises(TypeError), files.atomic_write(path, durable=durable) as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    with files.atomic_write(path, durable=durable) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_only_what_is_to_last_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    with files.atomic_write(tmp_path / "a", durable=False):
        pass
    assert synced == []
    with files.atomic_write(tmp_path / "b"):
        pass
    assert synced == [(tmp_path / "b").stat().st_ino, tmp_path.stat().st_ino]


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as first, (tmp_path / "lock").open() as second:
        assert files.lock(first, shared=True)
        assert files.lock(second, shared=True)
        with pytest.raises(BlockingIOError):
            files.lock(second)
        first.close()
        assert files.lock(second)


def test_folders_that_cannot_be_flushed_and_missing_locks_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse_with(number: int) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        monkeypatch.setattr(fcntl, "flock", refuse)

    for number in (errno.EINVAL, errno.ENOTSUP):
        refuse_with(number)
        files.sync_folder(tmp_path)
    for number in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
        refuse_with(number)
        with runlog.locked(tmp_path, is_main=True), writing._open_exclusively(tmp_path / "a.beton"):
            assert "cannot be locked: see to it that no other run uses it" in capsys.readouterr().out
    refuse_with(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_folder(tmp_path)
    with pytest.raises(OSError, match="Input/output error"), (tmp_path / "a.beton").open() as file:
        files.lock(file)


def test_only_refusals_are_explained() -> None:
    with pytest.raises(ConnectionResetError), files.explain_refusals():
        raise ConnectionResetError(104, "reset")
    with pytest.raises(files.RefusedError, match=r"x/y: No space left.*free some space"), files.explain_refusals():
        raise OSError(errno.ENOSPC, "No space left on device", "x/y")


@pytest.mark.parametrize(
    "name", ["ENOSPC", "EDQUOT", "EACCES", "EPERM", "EFBIG", "EROFS", "ENOTDIR", "ENOENT", "EAGAIN"]
)
def test_whoever_cannot_write_learns_what_to_do(name: str) -> None:
    number = getattr(errno, name)
    text = files.explain_write_error(OSError(number, os.strerror(number)), "folder/a.beton")
    start = f"cannot write folder/a.beton: {os.strerror(number)}: "
    assert text.startswith(start)
    assert text.endswith(". An existing file was left as it is")
    assert len(text) > len(start) + 60
    assert "something else" in files.explain_write_error(OSError("something else"), "a")


def fill_and_fail(folder: Path) -> None:
    with files.atomic_folder(folder) as new:
        (new / "second").write_text("2")
        (new / "second" / "third").write_text("3")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    left_behind = tmp_path / ".folder.0123.tmp"
    left_behind.mkdir()
    with files.atomic_folder(folder) as new:
        (new / "first").write_text("1")
        assert not folder.exists()
    with pytest.raises(NotADirectoryError):
        fill_and_fail(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (folder / "first").read_text() == "1"
    with files.atomic_folder(folder) as new:
        (new / "second").write_text("2")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/second"]


def test_memory_that_cannot_be_had_and_long_names_are_explained(tmp_path: Path) -> None:
    with pytest.raises(files.RefusedError, match=r"out of memory: .*A smaller model"), files.explain_refusals():
        torch.zeros(1 << 60)
    with pytest.raises(RuntimeError, match="other"), files.explain_refusals():
        raise RuntimeError("other")
    with pytest.raises(files.RefusedError, match="name is too long; take a shorter"), files.explain_refusals():
        (tmp_path / ("a" * 256)).touch()
