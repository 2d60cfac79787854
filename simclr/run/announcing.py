"""What a run says and writes down about itself before its first step."""

from __future__ import annotations

import dataclasses
import sys

import torch
from accelerate import Accelerator

from simclr import files, losses
from simclr.config import Derived, TrainConfig, to_json
from simclr.data import ImageSource
from simclr.evaluation import can_measure_knn
from simclr.models import SimCLR, count_parameters
from simclr.optim import describe_groups, parameter_groups
from simclr.run import checkpoint, runlog
from simclr.run.devices import parameter_dtype
from simclr.run.resuming import Progress
from simclr.step.captured import Way
from simclr.views import describe, say_view_stages
from simclr.views.pipeline import ViewFeed


def say_start(
    config: TrainConfig,
    derived: Derived,
    source: ImageSource,
    feed: ViewFeed,
    way: Way,
    accelerator: Accelerator,
    precision: str,
    model: SimCLR,
    progress: Progress,
) -> None:
    """Print what is going to be done, with every derived number as an equation."""
    facts = source.facts
    processes = f"{derived.world_size} process{'es' if derived.world_size > 1 else ''}"
    threads = f", {torch.get_num_threads()} CPU threads each" if accelerator.device.type == "cpu" else ""
    print(f"run:        {config.name}, seed {config.seed}, {config.loss.name}; folder {config.folder}")
    print(f"data:       {config.data}: {facts.num_images:,} images of {facts.height} x {facts.width}; {facts.source}")
    if config.parts is not None:
        print(f"parts:      {config.parts}")
    print(f"loader:     {source.backend} ({source.reason})")
    print(f"views:      {feed.method} ({feed.reason})")
    print(f"devices:    {processes} on {accelerator.device.type} ({runlog.hardware()}){threads}")
    print(f"precision:  {precision}")
    print(f"step:       {way.describe()}{' on each rank' if derived.world_size > 1 else ''}")
    if derived.world_size > 1:
        by = "one all-reduce, within the step" if way.averages_gradients else "DDP, during the backward pass"
        print(f"gradients:  averaged over {derived.world_size} processes by {by}")
    if config.speed.recompute:
        print("recompute:  the encoder's blocks, again in the backward pass")
    norm = "over all devices" if config.global_batch_norm else "per device: the run depends on their number"
    print(f"batch norm: {norm}; {'each view by itself' if config.batch_norm_per_view else 'both views together'}")
    print(f"loss:       {config.loss.name}: {describe_loss(config, derived, accelerator.device)}")
    for i, line in enumerate(derived.equations(config)):
        print(f"{'' if i else 'derived:':<12}{line}")
    encoder, projector = count_parameters(model.encoder), count_parameters(model.projector)
    print(f"parameters: encoder {config.model.encoder} {encoder:,} + {config.model.projector} projector {projector:,}")
    for i, line in enumerate(describe_groups(parameter_groups(model, config.optimizer))):
        print(f"{'' if i else config.optimizer.name + ':':<12}{line}")
    print(f"view side:  {say_view_stages(config.view_stages, facts.height, config.epochs)}")
    if config.augmentation != "standard":
        print(f"views of:   {config.augmentation}, which has these settings at hand:")
    print(f"view 1:     {describe(config.view_1)}")
    print(f"view 2:     {'as view 1' if config.view_2 == config.view_1 else describe(config.view_2)}")
    if not can_measure_knn(facts, config.num_validation):
        unlabelled = "all images are of one class" if facts.is_labelled else "the images have no labels"
        why = unlabelled if config.num_validation else "num_validation is 0"
        print(f"kNN:        not measured, since {why}; {checkpoint.BEST} will be the last epoch")
    if progress.step:
        print(f"resuming:   after step {progress.step} of {derived.total_steps}")
    if config.stop_at_step is not None and derived.total_steps > progress.step >= config.stop_at_step:
        print(f"nothing to do: the run is already past stop_at_step {config.stop_at_step}")
    if progress.step == derived.total_steps:
        print(f"finished:   nothing is left to do; a new run needs another --output than {config.folder}")
    sys.stdout.flush()


def describe_loss(config: TrainConfig, derived: Derived, device: torch.device) -> str:
    """Return in which form the loss is computed, and why."""
    loss = config.loss
    if loss.name == "barlow_twins":
        return "the correlation of the whole batch, summed over devices"
    if loss.name != "nt_xent":
        return f"of the whole batch, computed on each device; {loss.describe().removeprefix(f'{loss.name}, ')}"
    choice = losses.choose_nt_xent(
        derived.per_device_batch_size,
        device,
        parameter_dtype(config),
        form=config.speed.nt_xent_form,
        kernels=config.speed.kernels,
        bf16_matmul=loss.bf16_matmul,
    )
    return f"{choice.form} ({choice.reason}){f', {choice.kernels} kernels' if choice.form == 'tiled' else ''}"


def write_manifest(
    config: TrainConfig,
    derived: Derived,
    source: ImageSource,
    feed: ViewFeed,
    way: Way,
    accelerator: Accelerator,
    progress: Progress,
) -> str:
    """Write manifest.json, what the result depends on and the sessions that made it; config.json; a copy of own parts.

    Returns:
        When the first session began.
    """
    path = config.folder / runlog.MANIFEST
    if config.parts is not None:
        files.replace(config.folder / checkpoint.PARTS, config.parts.read_bytes())
    session = {
        "environment": runlog.environment(),
        "from_step": progress.step,
        "derived": dataclasses.asdict(derived),
        "device": str(accelerator.device.type),
        "mixed_precision": accelerator.mixed_precision,
        "loader": f"{source.backend}: {source.reason}",
        "views": f"{feed.method}: {feed.reason}",
        "step": way.describe(),
    }
    before = runlog.read_manifest(config.folder) if progress.step else None
    sessions = [*(before or {}).get("sessions", []), session]
    files.replace(config.folder / runlog.CONFIG, to_json(config))
    files.write_json(
        path,
        {
            **session,
            "config": dataclasses.asdict(config),
            "facts": dataclasses.asdict(source.facts),
            "sessions": sessions,
        },
    )
    begun: str = sessions[0]["environment"]["date"]
    return begun
