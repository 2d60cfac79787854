"""What a run writes down: every step once, whole lines."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr.files import write_json
from simclr.run import runlog
from simclr.run.interruption import Interrupted
from simclr.run.runlog import METRICS, RunLog, Status, environment, read_metrics
from tests.launching import wait_until
from tests.ranks import other_process


@contextmanager
def opened(folder: Path, first_step: int = 0, *, is_main: bool = True) -> Iterator[RunLog]:
    with RunLog(folder, is_main=is_main, total_steps=100, first_step=first_step) as log:
        yield log


def write_steps(folder: Path, first: int, last: int) -> None:
    """As a session that has begun after step ``first`` and ends after step ``last``."""
    with opened(folder, first) as log:
        for step in range(first + 1, last + 1):
            log.write("step", step=step, loss=1 / step)
            if step % 5 == 0:
                log.write("knn", step=step, knn_accuracy=float(step))


def test_lines_are_whole_at_once_and_hold_what_was_written(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for step in (1, 2):
            log.write("step", step=step, loss=0.1 * step, note="ü\nx", nothing=None, count=3)
            lines = (tmp_path / METRICS).read_text().splitlines(keepends=True)  # a reader sees them before the end
            assert len(lines) == step
            assert all(line.endswith("}\n") for line in lines)
    first, second = read_metrics(tmp_path)
    assert second["seconds"] >= first.pop("seconds") >= 0
    assert first == {"kind": "step", "step": 1, "loss": 0.1, "note": "ü\nx", "nothing": None, "count": 3}
    assert list(first)[:2] == ["kind", "step"]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.write("step", step=1, a=math.nan, b=math.inf, c=-math.inf, d=0.0)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert [line[key] for key in "abcd"] == [None, None, None, 0.0]


def test_what_json_cannot_hold_raises(tmp_path: Path) -> None:
    with opened(tmp_path) as log, pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        log.write("step", step=1, loss=torch.ones(()))  # type: ignore[arg-type]
    assert (tmp_path / METRICS).read_text() == ""


@pytest.mark.parametrize("unfinished", ["", '{"kind": "step", "st', '{"kind": "step", "step": 8, "seconds": 9}'])
@pytest.mark.parametrize("resume_from", [0, 4, 5, 7])
def test_after_a_resume_every_step_stands_once(tmp_path: Path, unfinished: str, resume_from: int) -> None:
    write_steps(tmp_path, 0, 7)
    before = read_metrics(tmp_path)
    with (tmp_path / METRICS).open("a") as file:
        file.write(unfinished)  # no newline: the run was killed
    assert read_metrics(tmp_path) == before
    write_steps(tmp_path, resume_from, 10)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 11))
    assert [line["step"] for line in lines if line["kind"] == "knn"] == [5, 10]
    kept = [line for line in before if line["step"] <= resume_from]
    assert lines[: len(kept)] == kept
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_seconds_go_on_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"kind": "step", "step": 3, "seconds": 1000.5}\n')
    write_steps(tmp_path, 3, 4)
    assert 1000.5 <= read_metrics(tmp_path)[-1]["seconds"] < 1100


@pytest.mark.parametrize("damage", ['{"kind": "st', "", "[1, 2]", "\0\0\0", "\udcff"])
def test_a_damaged_line_in_the_middle_raises(tmp_path: Path, damage: str) -> None:
    write_steps(tmp_path, 0, 2)
    lines = (tmp_path / METRICS).read_text().splitlines()
    text = "\n".join([lines[0], damage, lines[1], ""])
    (tmp_path / METRICS).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{METRICS}, line 2 is .*remove the line to go on"):
        read_metrics(tmp_path)


def test_other_ranks_write_and_show_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path / "does not exist", is_main=False) as log:
        log.write("step", step=1, loss=1.0)
        log.say("hello")
        log.advance(1, loss="1")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_progress_is_a_line_now_and_then(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, 80) as log:
        log.say("epoch 1: 50 %")
        log.advance(10, loss="0.7")  # too soon for a line
        monkeypatch.setattr("simclr.run.runlog.SECONDS_BETWEEN_LINES", 0)
        log.advance(5, loss="0.6")
        monkeypatch.undo()
        log.advance(5, loss="0.5")  # the end always has one
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "epoch 1: 50 %"
    assert lines[1].startswith("step 95 of 100, loss 0.6, 0:00:00")
    assert lines[2:] == ["step 100 of 100, loss 0.5, 0:00:00 left"]


# --------------------------------------------------------------------------------------------- environment


def test_environment_names_what_a_result_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_simclr.py", "demo", "--output", "a folder"])
    monkeypatch.setenv("MY_API_TOKEN", "hunter2hunter2")
    facts = environment()
    assert facts["command"] == "train_simclr.py demo --output 'a folder'"
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"torchvision", "accelerate", "timm", "numpy"} <= set(facts["versions"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts["python"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["date"])
    assert facts["hardware"] == runlog.hardware()
    # No environment variables, user or host; folders only where the command names them.
    assert set(facts) == {"commit", "command", "python", "versions", "hardware", "platform", "date"}
    assert "hunter2" not in json.dumps(facts)
    assert "somewhere" not in json.dumps(facts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes the GPUs there")
def test_hardware_names_the_cpu() -> None:
    assert re.fullmatch(r"\d+ cores of \S.*, \d+ GiB", runlog.hardware())


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "simclr"
    package.mkdir()
    copy = Path(shutil.copy(runlog.__file__, package / "runlog.py"))
    monkeypatch.setattr(runlog, "__file__", str(copy))  # as if the package lay there

    def commit() -> str:
        found = environment()["commit"]
        assert isinstance(found, str)
        return found

    assert commit() == "unknown"  # no checkout
    git(tmp_path, "init", "--quiet")
    (tmp_path / "other.txt").write_text("another project's file")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    assert commit() == "unknown"  # another project's checkout
    git(tmp_path, "add", "simclr")
    git(tmp_path, "commit", "--quiet", "-m", "second")
    assert commit() == git(tmp_path, "rev-parse", "HEAD")
    copy.write_text("changed")
    assert commit() == git(tmp_path, "rev-parse", "HEAD") + "-dirty"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512_bf16 amx_bf16 amx_tile", True), ("fpu avx512_bf16", False), ("not_amx_bf16", False), ("", False)],
)
def test_fast_bf16_is_amx(flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "_cpu_info", {"flags": flags}.__getitem__)
    assert runlog.cpu_has_fast_bf16() is expected


# ---------------------------------------------------------------------------------------------- write_json


def test_write_json_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    value: dict[str, Any] = {"a": [1, 2.5, None], "b": {"ü": True}}
    write_json(path, value)
    write_json(path, value | {"c": tmp_path})
    assert json.loads(path.read_text()) == value | {"c": str(tmp_path)}
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(("bad", "error"), [(torch.ones(2), TypeError), (math.nan, ValueError), ({1, 2}, TypeError)])
def test_write_json_keeps_the_old_file_when_it_fails(tmp_path: Path, bad: Any, error: type[Exception]) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"old": 1})
    with pytest.raises(error):
        write_json(path, {"new": bad})
    blocked = tmp_path / "blocked.json"
    blocked.mkdir()
    with pytest.raises(OSError, match=r"blocked\.json"):
        write_json(blocked, {})
    assert json.loads(path.read_text()) == {"old": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocked.json", "manifest.json"]


# ------------------------------------------------------------------------------------------ status and lock


def status(folder: Path) -> dict[str, Any]:
    content = (folder / runlog.STATUS).read_text()
    found: dict[str, Any] = json.loads(content)
    assert content == json.dumps(found, indent=2) + "\n"  # a line for each key, which shell scripts read
    assert list(found) == ["state", "step", "total_steps", "reason"]
    return found


@pytest.mark.parametrize(
    ("last_step", "error", "state", "reason"),
    [
        (9, None, "finished", ""),
        (5, None, "interrupted", "stop_at_step"),
        (5, Interrupted("SIGTERM on rank 1"), "interrupted", "SIGTERM on rank 1"),
        (5, ValueError("no"), "failed", "ValueError: no"),
        (5, KeyboardInterrupt(), "failed", "KeyboardInterrupt: "),
    ],
)
def test_the_status_tells_how_a_run_stands(
    tmp_path: Path, last_step: int, error: BaseException | None, state: str, reason: str
) -> None:
    with (
        suppress(Interrupted, ValueError, KeyboardInterrupt),
        Status(tmp_path, is_main=True, step=2, total_steps=9) as kept,
    ):
        assert status(tmp_path) == {"state": "running", "step": 2, "total_steps": 9, "reason": ""}
        kept.saved(last_step)
        assert status(tmp_path) == {"state": "running", "step": last_step, "total_steps": 9, "reason": ""}
        if error is not None:
            raise error
    assert status(tmp_path) == {"state": state, "step": last_step, "total_steps": 9, "reason": reason}
    assert runlog.saved_step(tmp_path) == last_step


def test_a_run_is_running_as_long_as_its_process_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        runlog.locked(tmp_path, is_main=True),
        suppress(KeyError),
        Status(tmp_path, is_main=True, step=2, total_steps=9),
    ):
        told = runlog.read_status(tmp_path)
        assert told == status(tmp_path) == {"state": "running", "step": 2, "total_steps": 9, "reason": ""}
        killed = (tmp_path / runlog.STATUS).read_text()
        raise KeyError
    assert runlog.read_status(tmp_path)["state"] == "failed"
    (tmp_path / runlog.STATUS).write_text(killed)  # as the process would have left it, had it been killed
    assert runlog.read_status(tmp_path) == told | {"state": runlog.DIED}
    monkeypatch.setattr(sys, "argv", ["runlog", str(tmp_path)])
    runpy.run_path(runlog.__file__, run_name="__main__")
    assert json.loads(capsys.readouterr().out) == told | {"state": runlog.DIED}
    for damage in ("", "{}", "[]"):
        (tmp_path / runlog.STATUS).write_text(damage)
        with pytest.raises(ValueError, match=r"status\.json tells nothing of a run"):
            runlog.read_status(tmp_path)


@pytest.mark.parametrize("anew", [False, True])
def test_nothing_is_written_to_a_folder_that_is_another_one_now(tmp_path: Path, anew: bool) -> None:
    folder = tmp_path / "run"
    with runlog.locked(folder, is_main=True) as lock:
        with Status(folder, is_main=True, step=2, total_steps=9, is_ours=lock.is_held) as kept:
            lock.require_held()
            folder.rename(tmp_path / "elsewhere")
            if anew:
                folder.mkdir()
                (folder / runlog.LOCK).touch()
            with pytest.raises(ValueError, match="run was deleted, moved or made anew while this run wrote to it"):
                lock.require_held()
            kept.saved(5)
        assert not (folder / runlog.STATUS).exists()


@pytest.mark.parametrize("anew", [False, True])
def test_lost_metrics_are_noticed_before_a_checkpoint_is_saved(tmp_path: Path, anew: bool) -> None:
    with RunLog(tmp_path, is_main=True, total_steps=9) as log:
        log.write("step", step=1, loss=2.0)
        log.sync()
        (tmp_path / METRICS).unlink()
        if anew:
            (tmp_path / METRICS).touch()
        with pytest.raises(ValueError, match=r"metrics\.jsonl was deleted or replaced while this run wrote to it"):
            log.sync()


def test_other_ranks_write_no_status_and_hold_no_lock(tmp_path: Path) -> None:
    with Status(tmp_path, is_main=False, step=0, total_steps=9) as kept:
        kept.saved(3)
    with runlog.locked(tmp_path / "run", is_main=False):
        pass
    assert list(tmp_path.iterdir()) == []
    assert runlog.saved_step(tmp_path) == 0


def hold(folder: Path) -> None:
    with runlog.locked(folder, is_main=True):
        time.sleep(60)


def test_a_second_run_in_the_folder_is_told_who_holds_it_until_that_one_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "run" / runlog.LOCK
    with other_process(hold, tmp_path / "run") as holder:
        wait_until("the folder is held", lambda: lock.exists() and lock.read_text() != "")
        expected = f"another run writes to .*run: process {holder.pid} on {socket.gethostname()}. .*--output"
        with pytest.raises(ValueError, match=expected), runlog.locked(tmp_path / "run", is_main=True):
            pass
    with (
        runlog.locked(tmp_path / "run", is_main=True),
        pytest.raises(ValueError, match=f"process {os.getpid()} on"),
        runlog.locked(tmp_path / "run", is_main=True),
    ):
        pass
    with runlog.locked(tmp_path / "run", is_main=True):  # and is given back
        pass
