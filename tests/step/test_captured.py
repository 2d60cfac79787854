"""The step as one CUDA graph computes what the plain step computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import train_simclr
from simclr.config import LossConfig, OptimizerConfig, SpeedConfig, TrainConfig
from simclr.models import SimCLR
from simclr.run.runlog import read_metrics
from simclr.step.captured import Captured, Way, choose_way
from simclr.views import ViewSpec
from tests.runs import SMALL, train_here, weights, write_shapes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("images") / "train.beton", 80)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Rounding by TF32 moves the gradients of so small a batch by 10 % within some steps, and hides what is tested."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


class Trained(NamedTuple):
    """What a run has left."""

    steps: list[dict[str, Any]]
    """The lines about its 12 steps, in 3 epochs."""
    moved: Tensor
    """By how much each weight has moved since the start, in one vector."""


def train(output: Path, images: Path, *, compile: Any, form: Any = "auto", **changes: Any) -> Trained:
    """Train for 12 steps of 3 epochs, or as many of them as ``stop_at_step`` says."""
    defaults: dict[str, Any] = {
        "data": images,
        "output": output,
        "epochs": 3,
        "global_batch_size": 20,
        "model": SMALL,
        "optimizer": OptimizerConfig(base_learning_rate=0.003),
        "precision": "fp32",
        "num_validation": 20,
        "knn_every_epochs": 2,
        "log_every_steps": 1,
        "speed": SpeedConfig(loader="memory", compile=compile, nt_xent_form=form),
    }
    config = TrainConfig(**{**defaults, **changes})
    train_here(config)
    torch.manual_seed(config.seed)
    end = weights(config)
    moved = [(end[name].cpu() - start).flatten() for name, start in SimCLR(SMALL, 32).named_parameters()]
    return Trained([line for line in read_metrics(output) if line["kind"] == "step"], torch.cat(moved).detach())


def require_equal(one: Trained, reference: Trained) -> None:
    """Compare within what rounding does to such runs.

    At these learning rates, a change of 1e-6 in the first weights changes a loss by up to 1e-3 of itself, and where the
    weights move to by up to 4e-2 of the way; a learning rate that is 30 % off, by 0.3 of the way (seen on a CPU, with
    Muon's iteration in bfloat16 as on a GPU).
    """
    assert [line["step"] for line in one.steps] == list(range(1, 13))
    for mine, its in zip(one.steps, reference.steps, strict=True):
        assert mine["learning_rate"] == its["learning_rate"]
        assert mine["loss"] == pytest.approx(its["loss"], rel=3e-3), mine["step"]
    assert (one.moved - reference.moved).norm() < 0.1 * reference.moved.norm()


CASES: dict[str, dict[str, Any]] = {
    "sgd, each view by itself": {"batch_norm_per_view": True},
    "muon, growing views": {
        "optimizer": OptimizerConfig(name="muon", base_learning_rate=0.002),
        "view_sizes": ((16, 0.34), (24, 0.34)),
    },
    "adamw, clipped, skipping": {
        "optimizer": OptimizerConfig(name="adamw", base_learning_rate=0.002, gradient_clip_norm=0.5),
        "on_nonfinite": "skip",
    },
    "lars, Barlow Twins, blur": {
        "loss": LossConfig(name="barlow_twins", scale=0.1),
        "optimizer": OptimizerConfig(name="lars", base_learning_rate=0.1),
        "view_1": ViewSpec(blur_probability=0.5),
        "view_2": ViewSpec(blur_probability=0.5, solarise_probability=0.5),
    },
    "tiled loss": {"form": "tiled"},
}


POSSIBLE: dict[str, Any] = {
    "device": torch.device("cuda"),
    "world_size": 1,
    "has_scaler": False,
    "saves_memory": False,
    "views": "triton",
    "longest_stage": 10_000_000,
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": torch.device("cpu")}, "on cpu"),
        ({"world_size": 2, "backend": "gloo"}, "2 processes talk over gloo"),
        ({"has_scaler": True}, "fp16"),
        ({"saves_memory": True}, "recompute"),
        ({"views": "torch"}, "by torch"),
    ],
)
def test_what_cannot_be_a_graph_is_taken_launch_by_launch_with_the_reason(change: dict[str, Any], why: str) -> None:
    way = choose_way("auto", **(POSSIBLE | change))
    assert (way.is_compiled, way.is_captured) == (False, False)
    assert why in way.reason
    with pytest.raises(ValueError, match=f"compile is graph, but .*{why}.*--compile auto"):
        choose_way("graph", **(POSSIBLE | change))
    assert choose_way("default", **(POSSIBLE | change))[:2] == (True, False)


def test_a_graph_is_compiled_where_the_run_is_long_enough() -> None:
    assert choose_way("auto", **POSSIBLE)[:2] == (True, True)
    assert choose_way("auto", **(POSSIBLE | {"longest_stage": 100_000}))[:2] == (False, True)
    assert choose_way("graph", **POSSIBLE)[:2] == (False, True)
    assert choose_way("graph-compiled", **POSSIBLE)[:2] == (True, True)
    assert choose_way("none", **POSSIBLE)[:2] == (False, False)
    assert choose_way("auto", **(POSSIBLE | {"world_size": 8, "backend": "nccl"}))[:2] == (True, True)


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_refused_beside_captured_collectives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = POSSIBLE | {"world_size": 2, "backend": "nccl"}
    monkeypatch.setenv(name, "max_split_size_mb:64, expandable_segments: True")
    assert choose_way("auto", **POSSIBLE).is_captured
    assert not choose_way("auto", **several).is_captured
    with pytest.raises(ValueError, match="PYTORCH_CUDA_ALLOC_CONF has expandable_segments"):
        choose_way("graph", **several)
    monkeypatch.setenv(name, "expandable_segments:False")
    assert choose_way("graph", **several).is_captured


def test_all_ranks_take_the_way_that_each_of_them_can() -> None:
    graph, plain = Way(True, True, "it pays"), Way(False, False, "since views are made by torch, not by Triton")
    assert Way.of_all([graph, graph]) == graph
    assert Way.of_all([graph, plain, graph]) == plain._replace(reason=f"{plain.reason}, on rank 1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_a_captured_run_is_the_plain_one(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(tmp_path / "plain", images, **CASES[name], compile="none")
    train(tmp_path / "captured", images, **CASES[name], compile="graph", stop_at_step=7)
    captured = train(tmp_path / "captured", images, **CASES[name], compile="graph")
    assert "cannot be captured" not in capsys.readouterr().out
    require_equal(captured, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_graph_computes_the_same(images: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", images, compile="none")
    require_equal(train(tmp_path / "captured", images, compile="graph-compiled"), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_waits_for_the_device_is_called_plainly_and_said() -> None:
    told: list[str] = []
    captured = Captured(lambda x: (x * float(x.sum()),), told.append)
    for i in range(6):
        x = torch.full((3,), float(i), device="cuda")
        (found,) = captured("key", (x,))
        assert torch.equal(found, x * 3 * i)
    assert len(told) == 1
    assert "captur" in told[0].lower()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_where_another_rank_cannot_capture_this_one_does_not_replay() -> None:
    told: list[str] = []
    captured = Captured(lambda x: (2 * x,), told.append, lambda own: [own, "out of memory"])
    for i in range(6):
        x = torch.full((3,), float(i), device="cuda")
        assert torch.equal(captured("key", (x,))[0], 2 * x)
    assert told == ["out of memory (rank 1)"]
    assert captured._captured is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_device(name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = train_simclr.update
    strict: list[torch.Size] = []

    def watched(run: Any, views: Tensor) -> tuple[Tensor, ...]:
        if views.shape not in strict:  # what is done once for each size may wait
            strict.append(views.shape)
            return update(run, views)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return update(run, views)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train_simclr, "update", watched)
    train(tmp_path / "run", images, **CASES[name], compile="none")
    assert strict


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_reads_its_inputs_anew_and_each_key_has_its_own() -> None:
    calls: list[int] = []

    def double(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(len(x))
        return (2 * x,)

    captured = Captured(double, pytest.fail)
    for number in (4, 7):
        for i in range(8):
            x = torch.arange(number, device="cuda") + 10 * i
            (found,) = captured(number, (x,))
            assert torch.equal(found, 2 * x)
    assert calls == [4] * 4 + [7] * 4  # three plain calls and the one that is captured; the rest is replayed
