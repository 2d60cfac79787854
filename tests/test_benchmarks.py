"""The benchmarks still run, and their clock and scales measure what they say. Speed is not asserted."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import simulate, two_ranks
from benchmarks.step import step_flops
from simclr import distributed
from simclr.presets import PRESETS
from tests.helpers import forget_accelerate_state, run_python
from tests.runs import write_shapes


@pytest.fixture(autouse=True)
def _process_left_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    forget_accelerate_state()


@pytest.mark.parametrize("arguments", [["pipeline"], ["step"], ["step", "--with-views"]])
def test_each_benchmark_runs_and_writes_what_it_measured(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr("sys.argv", [*arguments, "--quick"])
    written: dict[str, Any] = {}
    monkeypatch.setattr(common, "write_result", lambda path, values: written.update(values))
    importlib.import_module(f"benchmarks.{arguments[0]}").main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) - 2 == len(written["candidates"]) > 0
    json.dumps(written)
    if arguments == ["step"]:
        assert min(written["limits"].values()) > 0


def test_operations_of_a_step_are_the_published_ones() -> None:
    """The CIFAR ResNet-18 is published at 0.556 billion multiplications and additions an image, forward."""
    config = dataclasses.replace(PRESETS["cifar10-simclr-100"].config, global_batch_size=3)
    forward_and_backward = 3 * 2 * 0.556e9
    assert step_flops(config) == pytest.approx(3 * 2 * forward_and_backward, rel=0.01)  # 3 images, 2 views


@pytest.mark.slow
def test_what_is_measured_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr("sys.argv", ["end_to_end", "--quick"])
    written: dict[str, Any] = {}
    monkeypatch.setattr(common, "write_result", lambda path, values: written.update(values))
    importlib.import_module("benchmarks.end_to_end").main()
    assert {"sides", "ratio"} <= written.keys()
    (tmp_path / "end_to_end.json").write_text(json.dumps(written))
    monkeypatch.setattr("sys.argv", ["figures", "--folder", str(tmp_path)])
    importlib.import_module("benchmarks.figures").main()
    said = capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.png")] == ["end_to_end.png"]
    assert f"written: {tmp_path / 'end_to_end'}.png" in said
    assert said.count("left out, as it was not measured") == 2


@pytest.mark.slow
def test_what_needs_a_gpu_runs_in_miniature_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, number in (("train", 100), ("test", 40)):
        write_shapes(tmp_path / f"{split}.beton", number, split)
    words = ["--quick", "--data", str(tmp_path / "train.beton"), "--output", str(tmp_path / "out"), "--minutes", "24"]
    done = run_python("-m", "benchmarks.gpu", *words, timeout=580, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.split("=== summary")[1]
    for piece in ("check", "step", "loss", "accuracy-fast-simclr", "simulate", "two_ranks"):
        written = json.loads((tmp_path / "out" / f"{piece}.json").read_text())
        assert written["summary"]
        assert all(line in summary for line in written["summary"])
        assert "hardware" in written["environment"]
    assert (tmp_path / "out" / "accuracy-fast-simclr.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", *words])
    assert gpu.main() == 0
    assert capsys.readouterr().out.count("done before") == 6


@pytest.mark.parametrize("way", ["none", pytest.param("default", marks=pytest.mark.slow)])
def test_one_device_makes_the_messages_of_a_rank_of_two(way: str, tmp_path: Path) -> None:
    """Two for each batch norm, and beside them as many as two real processes make: tests/test_several_processes.py."""
    row = re.search(r"`fast-simclr` \| (\d+) \|.*\| (\d+) \|", (common.ROOT / "docs" / "scaling.md").read_text())
    assert row is not None
    layers, messages = map(int, row.groups())
    common.write_noise(tmp_path / "noise.beton", 64)
    config = simulate.configured("fast-simclr", way, 16, tmp_path / "noise.beton", is_small=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile, about itself
        found = simulate.measure(config, 2, simulate.Network(), steps=1)
    assert found["batch_norm_layers"] == 9 + 2  # of the encoder, of the projector
    assert found["collectives"] == messages + 2 * (9 + 2 - layers)
    assert found["megabytes"] > 0
    assert distributed.world_size() == 1


def test_messages_between_equal_ranks() -> None:
    with simulate.rank_0_of(3, simulate.Network()) as group:
        assert group is not None
        rows = torch.arange(4.0).view(2, 2).requires_grad_()
        gathered = distributed.gather_with_grad(rows)
        assert torch.equal(gathered, torch.cat([rows] * 3))
        (gradient,) = torch.autograd.grad(gathered.square().sum(), rows)
        assert torch.equal(gradient, 3 * 2 * rows.detach())  # as often as there are ranks that want it
        assert torch.equal(distributed.total(rows.detach()), 3 * rows.detach())
        assert torch.equal(distributed.max_over_ranks(rows), rows)
        assert group.messages == 5  # the numbers of rows among them
    with simulate.rank_0_of(1, simulate.Network()) as group:
        assert group is None


def test_what_was_not_measured_is_said() -> None:
    case = {"how": "graph", "batch": 512, "images_per_second": 1e5, "collectives": 48, "megabytes": 58.0}
    one, eight = {**case, "gpus": 1, "ms": 11.0}, {**case, "gpus": 8, "ms": 2.75}
    assumed, *_, row = simulate.describe([eight, one], simulate.Network(20, 300))
    assert "two assumed numbers: 20 us a collective, 300 GB/s" in assumed
    assert row == "| graph | 512 | 8 | 2.75 | 100,000 | 50% | 48 | 58.0 |"
    assert "| not measured |" in simulate.describe([eight], simulate.Network(20, 300))[-1]


def test_ranks_that_hang_are_ended_and_said() -> None:
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert two_ranks.wait_for([sleeping], 0.2) == "had not ended after 0 s"
    assert sleeping.returncode


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_by_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "no CUDA device is visible; --quick runs everything in miniature" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_candidates_take_turns_and_are_not_counted_while_warming_up() -> None:
    order: list[str] = []
    timings = common.interleave(
        {name: lambda name=name: order.append(name) for name in "ab"},  # type: ignore[misc]
        rounds=2,
        calls={"b": 2},
    )
    assert order == ["b", "b", "a", "a", "b", "b", "b", "b", "a"]
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]


def test_the_clock_tells_seconds_of_one_call() -> None:
    timings = common.interleave(
        {"slept": lambda: time.sleep(0.05), "told": lambda: 7.0}, rounds=1, warm_up=0, calls={"slept": 2, "told": 2}
    )
    assert 0.05 <= timings["slept"].median < 2
    assert timings["told"].median == 7.0


def allocating(mib_before: int, mib: int) -> Any:
    kept = np.ones(mib_before << 17)
    return lambda: np.ones(mib << 17).sum() + kept[0]


def test_peak_memory_is_that_of_the_step_alone() -> None:
    assert 38 < common.peak_memory("tests.test_benchmarks:allocating", 100, 40) < 60


def test_a_result_names_what_it_depends_on(tmp_path: Path) -> None:
    common.write_result(tmp_path / "new" / "result.json", {"found": 1})
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written["found"] == 1
    assert {"commit", "command", "versions", "hardware", "threads"} <= written["environment"].keys()
