"""Golden runs: short whole runs are what they were when ``golden/runs.json`` was recorded.

    python -m tests.test_golden              # shows what has changed
    python -m tests.test_golden --overwrite  # records what the code computes now

A change that is meant to keep results keeps this file. One that is meant to change them records it anew and says so in
CHANGELOG. Runs that must give one result (on 1 or 2 processes, interrupted or not, by either reader) share one record.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import pytest
import torch

import linear_probe
import train_simclr
from data_prep.shapes import draw
from simclr import beton
from simclr.config import LossConfig, OptimizerConfig, ProbeConfig, SpeedConfig, TrainConfig
from simclr.models import ModelConfig
from simclr.run.runlog import read_metrics
from simclr.views import ViewSpec
from tests.helpers import shut_down_workers
from tests.runs import train_on, weights

RECORD = Path(__file__).parent / "golden" / "runs.json"
NUM_IMAGES, NUM_TEST, BATCH = 60, 40, 20  # 3 steps an epoch

SMALL = ModelConfig(encoder="small_resnet_w8", projector_hidden=16, projection_dim=8)
# Flips and solarisation compute without rounding; crops and colours round, in float32, as the CPU at hand does.
EXACT = ViewSpec(crop_scale=(1, 1), crop_ratio=(1, 1), jitter_probability=0, grayscale_probability=0,
                 solarise_probability=0.5)  # fmt: skip
RICH = ViewSpec(
    crop_scale=(0.08, 1.0), interpolation="bicubic", hue=0.2, blur_probability=0.5, solarise_probability=0.5
)
BARLOW: dict[str, Any] = {
    "loss": LossConfig(name="barlow_twins", scale=0.1),
    "model": dataclasses.replace(SMALL, projector="barlow3"),
    "optimizer": OptimizerConfig(name="lars", base_learning_rate=1.0, lars_trust_coefficient=0.02, lars_clip=True),
    "batch_norm_per_view": True,
}


class Case(NamedTuple):
    """One run: what differs from SimCLR with SGD and exact views in float64, and how it is run."""

    changes: dict[str, Any]
    parts: tuple[int, ...] = (1,)
    """Processes of each part; between two parts the run is interrupted, in the middle of an epoch."""
    record: str = ""
    """The case that has the same result; by default its own."""
    tolerance: float = 1e-9
    """Of the losses, and of the weights' norm; see ``tolerance_of``."""


def _optimizer(name: Any, rate: float, **others: Any) -> dict[str, Any]:
    return {"optimizer": OptimizerConfig(name=name, base_learning_rate=rate, **others)}


def _views(view_1: ViewSpec, view_2: ViewSpec, **others: Any) -> dict[str, Any]:
    """A low learning rate: these runs show what the views are, and their rounding must not grow from step to step."""
    return {"view_1": view_1, "view_2": view_2, **_optimizer("sgd", 1e-4), **others}


CASES = {
    "simclr": Case({}),
    "simclr-2-processes": Case({}, (2,), "simclr"),
    "simclr-resumed": Case({}, (1, 1), "simclr"),
    "simclr-resumed-on-2-processes": Case({}, (1, 2), "simclr"),
    "simclr-ffcv": Case({"speed": SpeedConfig(loader="ffcv")}, record="simclr"),
    "simclr-recompute": Case({"speed": SpeedConfig(loader="memory", recompute=True)}, record="simclr"),
    "simclr-matrix": Case({"speed": SpeedConfig(loader="memory", nt_xent_form="matrix")}, record="simclr"),
    "simclr-norm-per-process": Case({"global_batch_norm": False}, (2,)),
    "simclr-temperature": Case({"loss": LossConfig(temperature=0.2, scale=0.3)}),
    "simclr-three-layers": Case(
        {"model": dataclasses.replace(SMALL, projector="simclr3"), "batch_norm_per_view": True}
    ),
    "simclr-schedule": Case(
        _optimizer("sgd", 0.2, warmup_epochs=0.7, gradient_clip_norm=0.5, decay_biases_and_norms=True)
    ),
    "simclr-adamw": Case(_optimizer("adamw", 0.05, weight_decay=0.01)),
    "simclr-lars": Case(_optimizer("lars", 4.0)),
    "simclr-muon": Case(_optimizer("muon", 0.2)),
    "views": Case(_views(ViewSpec(), ViewSpec()), tolerance=1e-6),
    "views-2-processes": Case(_views(ViewSpec(), ViewSpec()), (2,), "views", tolerance=1e-6),
    "views-growing": Case(_views(ViewSpec(), ViewSpec(), view_sizes=((16, 0.5),)), tolerance=1e-6),
    "views-rich": Case(_views(RICH, ViewSpec(jitter_probability=1.0, grayscale_probability=0.5)), tolerance=1e-6),
    "views-fused": Case(
        _views(RICH, ViewSpec(), speed=SpeedConfig(loader="memory", views="fused"), precision="fp32"), tolerance=1e-5
    ),
    "barlow": Case(BARLOW),
    "barlow-2-processes": Case(BARLOW, (2,), "barlow"),
    "barlow-resumed": Case(BARLOW, (1, 1), "barlow"),
    "barlow-sgd": Case(
        {
            **BARLOW,
            "loss": LossConfig(name="barlow_twins", off_diagonal_weight=0.05),
            "batch_norm_per_view": False,
            **_optimizer("sgd", 0.02),
        }
    ),
}
PROBES: dict[str, dict[str, Any]] = {
    "linear": {},
    "augmented": {"features": "augmented", "baselines": False},
    "finetune": {"mode": "finetune", "baselines": False, "learning_rates": (0.03, 0.1)},
}


# ------------------------------------------------------------------------------------------ what is computed


def write_images(path: Path, split: str, number: int) -> None:
    """Write shapes that are a little redder, greener or bluer; which of the three is their label."""
    images, _ = draw(0, split, 0, number)
    labels = np.arange(number) % 3
    tinted = images + 60 * np.eye(3, dtype=np.int64)[labels][:, None, None]
    beton.write(path, tinted.clip(0, 255).astype(np.uint8), labels, classes=["red", "green", "blue"], split=split)


@contextlib.contextmanager
def weights_drawn_alike_everywhere() -> Iterator[None]:
    """Draw initial weights without rounding: torch's own draws differ by it between CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "uniform_"):
            patch.setattr(torch.nn.init, name, _draw_exactly)
        yield


@torch.no_grad()
def _draw_exactly(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Draw from [-s, s) with a power of two s near 1 / sqrt(fan in)."""
    scale = 2.0 ** -round(math.log2(tensor[0].numel()) / 2)
    return tensor.uniform_().mul_(2).sub_(1).mul_(scale)


def pretrain(rank: int, world_size: int, config: TrainConfig) -> None:
    """What each rank runs."""
    with weights_drawn_alike_everywhere():
        train_simclr.main(config)


def pretrained(case: Case, data: Path, output: Path) -> TrainConfig:
    """Run a case from its beginning to its end."""
    defaults: dict[str, Any] = {
        "data": data,
        "output": output,
        "epochs": 2,
        "global_batch_size": BATCH,
        "model": SMALL,
        "precision": "fp64",
        "num_validation": 20,
        "knn_every_epochs": 1,
        "log_every_steps": 1,
        "speed": SpeedConfig(loader="memory"),
        "view_1": EXACT,
        "view_2": EXACT,
        **_optimizer("sgd", 0.2),
    }
    config = TrainConfig(**{**defaults, **case.changes})
    for part, world_size in enumerate(case.parts, start=1):
        steps = dataclasses.replace(config, stop_at_step=4 if part < len(case.parts) else None)
        train_on(world_size, pretrain, steps)
    return config


def run_figures(config: TrainConfig) -> dict[str, Any]:
    """Losses, learning rates and accuracies by step, and the final weights and running statistics in three numbers."""
    lines = read_metrics(config.folder)
    final = [value for _, value in sorted(weights(config).items()) if value.is_floating_point()]
    values = torch.cat([value.double().flatten() for value in final]).numpy()
    direction = np.cos(np.arange(1, len(values) + 1, dtype=np.float64))  # no generator's, whose numbers may change
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "step"],
        "learning_rates": [line["learning_rate"] for line in lines if line["kind"] == "step"],
        "knn_accuracies": [line["knn_accuracy"] for line in lines if line["kind"] == "knn"],
        "weights": {
            "number": len(values),
            "norm": float(np.linalg.norm(values)),
            "sum": float(values.sum()),
            "projection": float(values @ direction),
        },
    }


def probe_figures(run: Path, output: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What the probe measures and chooses."""
    config = ProbeConfig(
        run=run,
        output=output,
        **{"epochs": 3, "batch_size": 20, "loader": "memory", "knn_neighbours": 5, "learning_rates": (0.03, 0.3),
           "weight_decays": (0.0, 1e-3), **changes},
    )  # fmt: skip
    with weights_drawn_alike_everywhere():
        report = linear_probe.main(config)
    result = json.loads((report.parent / "probe.json").read_text())
    return {row["name"]: {key: row[key] for key in ("width", "knn_test", "classifier")} for row in result["rows"]}


class Runs:
    """Runs every case once, and keeps its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[str, TrainConfig] = {}
        (folder / "images").mkdir()
        for split, number in (("train", NUM_IMAGES), ("test", NUM_TEST)):
            write_images(folder / "images" / f"{split}.beton", split, number)

    def figures(self, name: str) -> Any:
        """What a case or a probe comes to."""
        if name in PROBES:
            return probe_figures(self._run("simclr").folder, self.folder / name, PROBES[name])
        return run_figures(self._run(name))

    def _run(self, name: str) -> TrainConfig:
        if name not in self._done:
            self._done[name] = pretrained(CASES[name], self.folder / "images" / "train.beton", self.folder / name)
        return self._done[name]


# ------------------------------------------------------------------------------------------ what is compared


def tolerance_of(name: str) -> float:
    """How far losses may be from the record, relative.

    Between vector instructions (SSE4.1, AVX2), 1 and 2 threads, 1 and 2 processes, the runs in float64 differ by up to
    5e-14, those with views that round by 3e-8, the one in float32 by 3e-7, the probe, in float32, by 5e-6.
    """
    if name in PROBES:
        return 1e-4
    return CASES[name].tolerance


def differences(
    found: Any, recorded: Any, tolerance: float, where: str = "", size: float | None = None
) -> Iterator[tuple[str, float, bool]]:
    """Yield where two nested results differ, by how much relative to the recorded one, and whether that is too much.

    What is said of the weights is compared relative to their norm, since a sum may be near 0. Losses and weights may
    differ by rounding. Everything else, such as accuracies and learning rates, may not, since it is a count or computed
    without vectors; neither may the shape of the result.
    """
    if isinstance(recorded, dict) and isinstance(found, dict) and found.keys() == recorded.keys():
        for key, value in recorded.items():
            yield from differences(found[key], value, tolerance, f"{where}/{key}", recorded.get("norm"))
    elif isinstance(recorded, list) and isinstance(found, list) and len(found) == len(recorded):
        for i, value in enumerate(recorded):
            yield from differences(found[i], value, tolerance, f"{where}/{i}")
    elif found != recorded:
        numbers = isinstance(found, float) and isinstance(recorded, float) and (size or recorded) != 0
        relative = abs(found - recorded) / (size or abs(recorded)) if numbers else math.inf
        rounds = "loss" in where or "weights" in where
        yield f"{where} was {recorded} and is {found}", relative, not (rounds and relative <= tolerance)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def record() -> Any:
    return json.loads(RECORD.read_text())["results"]


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    if case.changes.get("speed", SpeedConfig()).loader == "ffcv":  # compiles its pipeline
        return [pytest.mark.slow]
    return [pytest.mark.distributed] if max(case.parts) > 1 else []


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=_marks(case)) for name, case in CASES.items()],
)
def test_a_run_is_the_recorded_one(runs: Runs, record: Any, name: str) -> None:
    case = CASES[name]
    speed = case.changes.get("speed", SpeedConfig())
    if speed.loader == "ffcv":
        pytest.importorskip("ffcv")
    if speed.views == "fused":
        pytest.importorskip("numba")
    require_equal(runs.figures(name), record[case.record or name], case.tolerance)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_the_recorded_one(runs: Runs, record: Any, name: str) -> None:
    require_equal(runs.figures(name), record[name], tolerance_of(name))


def require_equal(found: Any, recorded: Any, tolerance: float) -> None:
    different = list(differences(found, recorded, tolerance))
    largest = max((relative for _, relative, _ in different), default=0.0)
    print(f"largest relative difference: {largest:.0e}" if different else "equal bit for bit")
    assert [f"{what} (relative {relative:.0e})" for what, relative, is_too_much in different if is_too_much] == []


def test_nothing_is_recorded_that_is_not_compared(record: Any) -> None:
    assert record.keys() == {case.record or name for name, case in CASES.items()} | PROBES.keys()
    for optimizer in get_args(get_type_hints(OptimizerConfig)["name"]):
        assert any(case.changes.get("optimizer", OptimizerConfig()).name == optimizer for case in CASES.values())


# ------------------------------------------------------------------------------------------ recording anew


def main() -> None:
    """Compute everything, show what is not as recorded, and record it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overwrite", action="store_true", help="record the results as they are now")
    overwrite = parser.parse_args().overwrite
    before = json.loads(RECORD.read_text())["results"] if RECORD.exists() else {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for name in [*(name for name, case in CASES.items() if not case.record), *PROBES]:
            with contextlib.redirect_stdout(sys.stderr):
                results[name] = runs.figures(name)
            changes = list(differences(results[name], before.get(name), tolerance_of(name)))
            print(f"{name}: {'equal bit for bit' if not changes else 'not recorded yet' if name not in before else ''}")
            for what, relative, is_too_much in changes if name in before else []:
                print(f"    {'CHANGED' if is_too_much else 'rounding'}: {what} (relative {relative:.0e})")
    shut_down_workers()
    if before and not overwrite:
        sys.exit(f"{RECORD} is left as it is; --overwrite replaces it")
    made_by = f"torch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()}"
    RECORD.write_text(json.dumps({"recorded_with": made_by, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    from tests import test_golden  # the other processes know its functions by this name

    torch.set_num_threads(1)
    test_golden.main()
