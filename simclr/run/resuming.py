"""How far an earlier run in the folder has come, and whether this one may go on from there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from simclr import distributed
from simclr.beton import Facts
from simclr.config import Derived, SpeedConfig, TrainConfig, from_json, settings_of
from simclr.optim import load_optimizer_state
from simclr.run import checkpoint, runlog
from simclr.run.checkpoint import CheckpointError

# Fields that may differ between a run and its continuation, because the weights depend on them by rounding at most.
FREE_TO_CHANGE = frozenset(
    {"name", "data", "parts", "output", "resume", "stop_at_step", "world_size", "tracker", "tracker_project"}
    | {"log_every_steps", "checkpoint_every_epochs", "checkpoint_every_steps", "keep_checkpoints"}
    | {"allow_changed", "timeout_seconds", "on_nonfinite"}
    | {f"speed.{field.name}" for field in dataclasses.fields(SpeedConfig)}
)


@dataclasses.dataclass
class Progress:
    """How far a run has come. With the weights and the optimizer's state, this is all that continuing needs."""

    step: int = 0
    """Optimizer steps taken."""
    knn_accuracy: float | None = None
    """Validation kNN accuracy in percent, measured last."""
    best_knn_accuracy: float | None = None
    step_of_last: int | None = None
    """Of the checkpoint_last.pt that the run continued from, if it was intact."""


def resume(
    config: TrainConfig, derived: Derived, facts: Facts, model: nn.Module, optimizer: Any, accelerator: Accelerator
) -> Progress:
    """Continue the run that the output folder holds, if there is one and it is wanted."""
    newest = checkpoint.load_newest(config.folder)
    if newest is None:
        if step := runlog.saved_step(config.folder):
            raise CheckpointError(
                f"{config.folder / runlog.STATUS} tells of a checkpoint of step {step}, but there is none. Put it "
                "back, or begin anew with another --output"
            )
        if config.resume == "must":
            raise CheckpointError(
                f"resume is must, but there is no {config.folder / checkpoint.LAST}; use --resume auto to start a new "
                "run"
            )
        return Progress()
    if config.resume == "never":
        raise CheckpointError(
            f"resume is never, but {config.folder} holds a run; give another --output, or use --resume auto to go on"
        )
    saved = newest.payload
    require_same_run(config, facts, saved, newest.path)
    require_step_of_run(config, derived, saved, newest.path)
    copy = config.folder / checkpoint.PARTS
    if config.parts is not None and copy.exists() and copy.read_bytes() != config.parts.read_bytes():
        raise CheckpointError(
            f"{config.parts} is not what this run was trained with so far, which is {copy}: name that with --parts, or "
            "remove it to go on with the new file"
        )
    if accelerator.is_main_process:
        for reason in newest.passed_over:
            print(f"passed over: {reason}")
    model.load_state_dict(saved["model"], strict=True)
    load_optimizer_state(optimizer, saved["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])
    return Progress(
        saved["step"],
        saved["knn_accuracy"],
        saved["best_knn_accuracy"],
        step_of_last=None if newest.passed_over else saved["step"],
    )


def require_same_run(config: TrainConfig, facts: Facts, saved: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run with another configuration or other images, unless allowed; show the difference."""
    before, now = (
        {key: value for key, value in settings_of(run).items() if key not in FREE_TO_CHANGE}
        for run in (from_json(TrainConfig, saved["config"]), config)
    )
    different = {
        key: f"{key} was {before.get(key)} and is {now.get(key)}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    }
    refused = [key for key in different if not _is_allowed(key, config.allow_changed)]
    if refused:
        raise CheckpointError(
            f"{path} is of a run with another configuration: {'; '.join(different[key] for key in refused)}. Give the "
            "earlier values to go on, another --output for a new run, or "
            f"--allow-changed {' '.join(refused)} to go on as another run than either"
        )
    earlier = from_json(Facts, saved["facts"])
    if others := earlier.differences(facts):
        before_now = (
            f"({earlier.source}, {earlier.num_images} images) than {config.data} ({facts.source}, {facts.num_images} "
            f"images): of what the sidecars say, {others} differs"
        )
        different["data"] = f"other images {before_now}"
        if not _is_allowed("data", config.allow_changed):
            raise CheckpointError(
                f"{path} is of a run on other images {before_now}. Name that file with --data, or give another --output"
            )
    if distributed.rank() == 0:
        for difference in different.values():
            print(f"changed:    {difference} (--allow-changed)")


def require_step_of_run(config: TrainConfig, derived: Derived, saved: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint that this run cannot have written, or that lies behind its end."""
    step, epoch = saved["step"], saved["epoch"]
    if step > derived.total_steps:
        raise CheckpointError(
            f"{path} is of step {step}, and the run has {derived.total_steps} steps: it is of another run. Give more "
            "--epochs (with --allow-changed epochs) to go on from it, or another --output"
        )
    if epoch != step // derived.steps_per_epoch and not config.allow_changed:
        raise CheckpointError(
            f"{path} is of step {step} and epoch {epoch}, but at {derived.steps_per_epoch} steps per epoch that is "
            f"epoch {step // derived.steps_per_epoch}: it is of another run. Give another --output"
        )


def _is_allowed(key: str, allowed: tuple[str, ...]) -> bool:
    """Whether a setting or one that it belongs to is named."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)
