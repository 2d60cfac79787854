r"""Pretrains an encoder with SimCLR or Barlow Twins, on any number of devices.

    python train_simclr.py demo
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 \
        train_simclr.py cifar10-simclr-100 --world-size 4

With the data file, the configuration determines the weights, whatever the number of devices. A run that was cut off
continues, in the middle of an epoch too, when the same command is given again. One that is asked to stop, by a signal
to any process, saves first and ends with status 75.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr import distributed, evaluation, losses
from simclr.beton import Facts, load_facts
from simclr.command_line import parse_train_config
from simclr.config import Derived, SpeedConfig, TrainConfig, derive, flattened, from_json, to_json
from simclr.data import EpochPlan, ImageSource, open_images, validation_split
from simclr.evaluation import DivergedError, Features
from simclr.fast.captured import Captured, Way, choose_way
from simclr.fast.feed import ViewFeed
from simclr.fast.recompute import recompute_blocks, require_independent_images
from simclr.models import SimCLR, count_parameters, use_global_batch_norm
from simclr.optim import (
    describe_groups,
    learning_rate_at,
    load_optimizer_state,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from simclr.run import checkpoint, files, host, launch, memory, runlog
from simclr.run.checkpoint import CheckpointError, CheckpointWriter
from simclr.run.finite import Guard
from simclr.run.interruption import EXIT_SAVED, Interrupted, Signals
from simclr.run.peers import START_SECONDS, LostPeerError, Peers
from simclr.run.runlog import RunLog, Status
from simclr.unit_length import unit_rows
from simclr.views import describe, say_view_stages

MEASURED_AT_ONCE = 512  # images for each rank, between two signs of life; less work than a step of a batch of 128

# Fields that may differ between a run and its continuation, because the weights depend on them by rounding at most.
FREE_TO_CHANGE = frozenset(
    {"name", "data", "output", "resume", "stop_at_step", "world_size", "tracker"}
    | {"log_every_steps", "checkpoint_every_epochs", "checkpoint_every_steps", "keep_checkpoints"}
    | {"allow_changed", "timeout_seconds", "on_nonfinite"}
    | {f"speed.{field.name}" for field in dataclasses.fields(SpeedConfig)}
)


@files.explain_refusals()
def main(config: TrainConfig, signals: Signals | None = None) -> Path:
    """Pretrain.

    Args:
        config: The run.
        signals: What asks this process to stop; by default nothing does.

    Returns:
        The run's folder, with simclr_best_epoch.pt, checkpoint_last.pt, metrics.jsonl, manifest.json and status.json.

    Raises:
        ValueError: If configuration, data, devices and an earlier run in the folder do not fit together.
        DivergedError: If the gradient or a weight is not finite any more; the last good checkpoint stays.
        Interrupted: If a signal asked any rank to stop. All that was done is saved.
        LostPeerError: If another rank has died, stands still, or refuses to start.
    """
    checkpoint.require_safe_loading()
    launch.require_known_requests()
    join(signals)
    with Peers(timeout_seconds=config.timeout_seconds, signals=signals or Signals()) as peers, peers.explained():
        launch.require_one_run(peers.gather(statement(config)))
        pretrain(config, peers)
    return config.folder


def pretrain(config: TrainConfig, peers: Peers) -> None:
    """Do what :func:`main` does, once all processes have met and are known to be one run."""
    runlog.require_run_or_empty(config.folder)
    config = config.for_images(load_facts(config.data).num_images)
    accelerator, precision_reason = start_devices(config)
    is_main = accelerator.is_main_process
    kept_memory = host.keep_freed_memory() if accelerator.device.type == "cpu" else None
    with open_images(config.data, backend=config.speed.loader, device=accelerator.device) as source:
        size = image_size(source.facts, config.data)
        derived = derive(config, source.facts.num_images, accelerator.num_processes)

        feed = ViewFeed(
            source,
            config.view_1,
            config.view_2,
            seed=config.seed,
            view_stages=config.view_stages,
            choice=config.speed.views,
            device=accelerator.device,
            dtype=forward_dtype(accelerator, config),
        )
        way = way_of_steps(config, derived, accelerator, feed)
        plain_model, model, optimizer = prepare_model(config, derived, size, accelerator, way)
        if config.resume == "must" and not config.folder.exists():
            raise CheckpointError(
                f"resume is must, but there is no {config.folder}; use --resume auto to start a new run"
            )
        with runlog.locked(config.folder, is_main=is_main) as lock:
            progress = resume(config, derived, source.facts, plain_model, optimizer, accelerator)
            if is_main:
                say_start(config, derived, source, feed, way, accelerator, precision_reason, plain_model, progress)
                if kept_memory is not None:
                    print(f"memory:     {kept_memory}", flush=True)
                write_manifest(config, derived, source, feed, accelerator, progress)
            # Which images this rank reads at each step
            plan = EpochPlan(
                validation_split(derived.num_images, 0)[0],
                config.global_batch_size,
                derived.world_size,
                accelerator.process_index,
                config.seed,
            )
            # The inner ones end first: what is on its way to the disk is written before the status says how it ended.
            with (
                Status(
                    config.folder,
                    is_main=is_main,
                    step=progress.step,
                    total_steps=derived.total_steps,
                    is_ours=lock.is_held,
                ) as status,
                RunLog(
                    config.folder, is_main=is_main, total_steps=derived.total_steps, first_step=progress.step
                ) as log,
                CheckpointWriter(
                    config.folder,
                    keep=config.keep_checkpoints,
                    last_step=progress.step_of_last,
                    before=functools.partial(before_save, lock, log),
                    after=status.saved,
                ) as writer,
                peers.explained(before_exit=status.failed),
                feed,
            ):
                run = Run(
                    config=config,
                    derived=derived,
                    source=source,
                    plan=plan,
                    feed=feed,
                    accelerator=accelerator,
                    model=model,
                    plain_model=plain_model,
                    optimizer=optimizer,
                    guard=Guard(plain_model, optimizer, accelerator.scaler, config.on_nonfinite, config.folder, plan),
                    way=way,
                    progress=progress,
                    writer=writer,
                    peers=peers,
                )
                try:
                    train(run, log)
                except DivergedError as error:
                    raise DivergedError(f"{error}{_way_out(run)}") from error
    for tracker in accelerator.trackers:
        tracker.finish()


def way_of_steps(config: TrainConfig, derived: Derived, accelerator: Accelerator, feed: ViewFeed) -> Way:
    """Return how the steps of a run are computed; raise a ValueError if it cannot be done as configured."""
    smaller = sum(epochs for _, epochs in config.view_stages)
    longest = max([*(epochs for _, epochs in config.view_stages), config.epochs - smaller])
    return choose_way(
        config.speed.compile,
        device=accelerator.device,
        world_size=derived.world_size,
        has_scaler=accelerator.scaler is not None,
        saves_memory=config.speed.recompute or config.speed.micro_batch_size is not None,
        views=feed.method,
        longest_stage=longest * derived.steps_per_epoch * config.global_batch_size,
    )


def prepare_model(
    config: TrainConfig, derived: Derived, size: int, accelerator: Accelerator, way: Way
) -> tuple[SimCLR, nn.Module, Any]:
    """Return the model, as it is and as accelerate prepared it, and the optimizer; the same weights on every rank."""
    torch.manual_seed(config.seed)
    plain_model = SimCLR(config.model, size)
    for side, _ in config.view_sizes:
        plain_model.require_size(side)
    if config.speed.micro_batch_size is not None:
        require_independent_images(plain_model)
    if derived.world_size > 1 and config.global_batch_norm:
        use_global_batch_norm(plain_model, accelerator.device)
    plain_model.to(accelerator.device, dtype=parameter_dtype(config)).to(memory_format=torch.channels_last)
    if config.speed.recompute:
        recompute_blocks(plain_model)
    if way.is_captured:
        torch.backends.cudnn.benchmark = True  # shapes are fixed, and the fastest kernels are found before capture
    if way.is_compiled:
        # In place, so that the weights keep their names; what calls the encoder alone is not compiled.
        plain_model.compile(dynamic=False)
    optimizer = make_optimizer(plain_model, config.optimizer, skippable=accelerator.device.type == "cuda")
    with warnings.catch_warnings():
        # torch 2.14 names DDP's option anew; accelerate and torch 2.11 know the name that start_devices uses.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, optimizer = accelerator.prepare(plain_model, optimizer)
    return plain_model, model, optimizer


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


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What the training loop works on."""

    config: TrainConfig
    derived: Derived
    source: ImageSource
    plan: EpochPlan
    """Which images this rank reads at each step."""
    feed: ViewFeed
    """Makes their views."""
    accelerator: Accelerator
    model: nn.Module
    """As accelerate prepared it: autocast, and DDP where there are several processes."""
    plain_model: SimCLR
    """The same weights without those wrappers."""
    optimizer: Any
    guard: Guard
    """Takes optimizer steps."""
    way: Way
    """How steps are computed."""
    progress: Progress
    writer: CheckpointWriter
    peers: Peers

    @functools.cached_property
    def captured(self) -> Captured | None:
        """The step as one CUDA graph, views included, if that is how it is computed."""
        if not self.way.is_captured:
            return None
        return Captured(
            lambda *recipe: update(self, self.feed.make(*recipe)),
            lambda error: print(f"step:       launch by launch, since it cannot be captured: {error}", flush=True),
        )

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.progress.step // self.derived.steps_per_epoch


# ---------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run, log: RunLog) -> None:
    """Train from ``run.progress`` to the end, to ``stop_at_step``, or until asked to stop."""
    config, derived, progress = run.config, run.derived, run.progress
    require_same_start(run)
    meter = Meter(run, log)
    stop = min(config.stop_at_step or derived.total_steps, derived.total_steps)
    asked = ""
    run.model.train()
    while progress.step < stop:
        epoch, start_step = divmod(progress.step, derived.steps_per_epoch)
        for batch in batches(run, epoch, start_step):
            with memory.explain_shortage(run.accelerator.device, derived.per_device_batch_size, derived.world_size):
                meter.add(*train_step(run, batch))
            progress.step += 1
            run.writer.raise_if_failed()
            asked = run.peers.step_taken(progress.step)
            if asked:
                stop = progress.step
            if progress.step % config.log_every_steps == 0 or progress.step == stop:
                meter.report()
            if progress.step == stop:
                break
            if progress.step % derived.steps_per_epoch:
                measure_and_save(run, log, meter, is_last=False)
        measure_and_save(run, log, meter, is_last=progress.step == stop)
    run.peers.wait_until(run.writer.is_idle, "waiting for the disk")
    run.writer.flush()
    if asked and progress.step < derived.total_steps:
        message = (
            f"{asked}: saved after step {progress.step} of {derived.total_steps}; the same command goes on from it"
        )
        log.say(message)
        raise Interrupted(message)


def require_same_start(run: Run) -> None:
    """Refuse to train if the ranks continue after different steps, or have opened different images. Waits for all."""
    run.peers.meet()
    steps, contents = zip(*run.peers.gather((run.progress.step, run.source.facts.content_sha256)), strict=True)
    if len(set(contents)) > 1:  # though their sidecars were equal before: another file has taken the name meanwhile
        raise launch.DifferentRunsError(f"{run.config.data} was replaced while the ranks opened it; start them again")
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the checkpoints that ranks 0 to {len(steps) - 1} found in {run.config.folder} are of steps "
            f"{list(steps)}: is it on a disk that all of them share?"
        )


def train_step(run: Run, batch: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Take one optimizer step on this rank's share of a global batch; return loss, z1 and z2, on the device.

    Args:
        run: What is trained.
        batch: Of :func:`batches`: views (2b, 3, S, S), the first views of b images and then the second ones, or what
            a captured step makes them from.
    """
    set_learning_rate(run.optimizer, learning_rate(run.config, run.derived, run.progress.step))
    if isinstance(batch, Tensor):
        loss, norms, z1, z2 = update(run, batch)
    else:
        assert run.captured is not None
        loss, norms, z1, z2 = run.captured(run.feed.size, batch)
        loss, norms = loss.clone(), norms.clone()  # the next step writes over them
    run.guard.remember(norms, step=run.progress.step + 1, loss=loss)
    return loss, z1, z2


def update(run: Run, views: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update the weights; return loss, norms of the gradients, z1 and z2. The learning rate is set before."""
    config = run.config
    run.guard.begin()
    passes = whole_batch if config.speed.micro_batch_size is None else in_micro_batches
    loss, z1, z2 = passes(run, views)
    run.accelerator.unscale_gradients(run.optimizer)
    norms = run.guard.gradient_norms()
    if config.optimizer.gradient_clip_norm is not None:
        run.accelerator.clip_grad_norm_(run.plain_model.parameters(), config.optimizer.gradient_clip_norm)
    run.guard.step(norms)
    run.optimizer.zero_grad()
    return loss.detach(), norms, z1.detach(), z2.detach()


def batches(run: Run, epoch: int, start_step: int) -> Iterator[Tensor | tuple[Tensor, ...]]:
    """Return what each step of the rest of an epoch takes."""
    if run.captured is None:
        return run.feed.batches(run.plan, epoch=epoch, start_step=start_step)
    return run.feed.recipes(run.plan, epoch=epoch, start_step=start_step)


def whole_batch(run: Run, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pass this rank's views forward and backward at once; return loss, z1 and z2."""
    z1, z2 = torch.cat([run.model(group)[1] for group in normalised_together(run, views)]).chunk(2)
    return loss_and_backward(run, z1, z2), z1, z2


def in_micro_batches(run: Run, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same with some images at a time in the encoder: see :mod:`simclr.fast.recompute`."""
    assert run.config.speed.micro_batch_size is not None
    model, parts = run.plain_model, torch.split(views, 2 * run.config.speed.micro_batch_size)
    with run.accelerator.autocast():
        with torch.no_grad():
            h = torch.cat([model.encoder(part) for part in parts])
        h.requires_grad_()
        z1, z2 = torch.cat([model.projector(group) for group in normalised_together(run, h)]).chunk(2)
    loss = loss_and_backward(run, z1, z2)
    assert h.grad is not None
    for part, gradient in zip(parts, torch.split(h.grad, 2 * run.config.speed.micro_batch_size), strict=True):
        with run.accelerator.autocast():
            again = model.encoder(part)
        torch.autograd.backward(again, gradient)
    distributed.average_gradients(model.parameters())  # DDP averages only what passed through it
    return loss, z1, z2


def normalised_together(run: Run, rows: Tensor) -> tuple[Tensor, ...]:
    """Return the rows (2b, ...) of both views as they pass the network: together, or each view by itself."""
    return rows.chunk(2) if run.config.batch_norm_per_view else (rows,)


def loss_and_backward(run: Run, z1: Tensor, z2: Tensor) -> Tensor:
    """Return the loss, times its scale, after the backward pass from it."""
    config = run.config.loss
    if config.name == "nt_xent":
        loss = losses.nt_xent(
            z1,
            z2,
            temperature=config.temperature,
            form=run.config.speed.nt_xent_form,
            kernels=run.config.speed.kernels,
            bf16_matmul=config.bf16_matmul,
        )
    else:
        loss = losses.barlow_twins(z1, z2, off_diagonal_weight=config.off_diagonal_weight)
    loss = loss * config.scale
    run.accelerator.backward(loss)
    return loss


def learning_rate(config: TrainConfig, derived: Derived, step: int) -> float:
    """Return the learning rate of a step."""
    return learning_rate_at(
        step,
        peak=derived.peak_learning_rate,
        total_steps=derived.total_steps,
        warmup_steps=derived.warmup_steps,
    )


class Meter:
    """Gathers what is reported about the steps since the last report, on the device: reading it would wait for it."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self.run, self.log = run, log
        self._losses: list[Tensor] = []
        self._projections: tuple[Tensor, Tensor] | None = None  # of the last step
        self._started = time.perf_counter()

    def add(self, loss: Tensor, z1: Tensor, z2: Tensor) -> None:
        """Take in one step."""
        self._losses.append(loss)
        self._projections = z1, z2

    def report(self) -> None:
        """Write a line of metrics about the steps since the last one, and stop if one of them was not finite."""
        if self._projections is None:
            return
        config, derived, step = self.run.config, self.run.derived, self.run.progress.step
        of_this_rank = torch.cat([torch.stack(self._losses), collapse_measures(*self._projections)]).double()
        *step_losses, similarity, spread = (distributed.sum_over_ranks(of_this_rank) / derived.world_size).tolist()
        norms = self.run.guard.norms()
        num_steps, seconds = len(step_losses), time.perf_counter() - self._started
        taken = {  # without those left out because their gradient was not finite
            step - num_steps + i: (loss, norm)
            for i, (loss, norm) in enumerate(zip(step_losses, norms, strict=True), start=1)
            if math.isfinite(norm)
        }
        require_finite_losses(self.run, {number: loss for number, (loss, _) in taken.items()})

        loss = sum(loss for loss, _ in taken.values()) / len(taken) if taken else math.nan
        rate = learning_rate(config, derived, step - 1)
        images_per_second = num_steps * config.global_batch_size / seconds
        self.log.write(
            "step",
            step=step,
            epoch=step / derived.steps_per_epoch,
            loss=loss,
            learning_rate=rate,
            gradient_norm=max((norm for _, norm in taken.values()), default=math.nan),
            skipped_steps=num_steps - len(taken),
            images_per_second=round(images_per_second, 1),
            positive_similarity=similarity,
            projection_spread=spread,
        )
        self.run.accelerator.log(
            {"loss": loss, "learning_rate": rate, "images_per_second": images_per_second}, step=step
        )
        self.log.advance(num_steps, loss=f"{loss:.4f}", lr=f"{rate:.3g}", images_per_s=f"{images_per_second:.0f}")
        self._losses, self._projections = [], None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last report out of the speed."""
        self._started = time.perf_counter()


@torch.no_grad()
def collapse_measures(z1: Tensor, z2: Tensor) -> Tensor:
    """Return two numbers that tell a collapse, for this rank's rows (b, d).

    The mean cosine similarity of the two views of an image; and the mean standard deviation of a coordinate of the
    normalised projection times sqrt(d), which is 0 when all are equal and near 1 when they point everywhere.
    """
    unit_1, unit_2 = (unit_rows(z.float()) for z in (z1, z2))
    spread = unit_1.std(dim=0, correction=0).mean() * unit_1.shape[1] ** 0.5
    return torch.stack([(unit_1 * unit_2).sum(dim=1).mean(), spread])


def require_finite_losses(run: Run, losses_by_step: dict[int, float]) -> None:
    """Stop if one of the last steps' losses is not finite. Every rank has the same values, so all stop."""
    for step, loss in losses_by_step.items():
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}")


def _way_out(run: Run) -> str:
    last = run.config.folder / checkpoint.LAST
    kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
    rate = learning_rate(run.config, run.derived, max(run.progress.step - 1, 0))
    return (
        f" (epoch {run.epoch}, learning rate {rate:.3g}); {kept}. A lower --optimizer.base-learning-rate, longer "
        "--optimizer.warmup-epochs, --optimizer.gradient-clip-norm 1 or --precision fp32 may help; give the new run "
        "another --output"
    )


# ---------------------------------------------------------------------------------------------------------------
# Between steps


def measure_and_save(run: Run, log: RunLog, meter: Meter, *, is_last: bool) -> None:
    """Measure and save as far as it is due after this step, on all ranks together."""
    config, derived, progress = run.config, run.derived, run.progress
    at_end = progress.step == derived.total_steps
    is_whole = progress.step % derived.steps_per_epoch == 0
    knn_is_due = config.knn_every_epochs > 0 and is_whole and run.epoch % config.knn_every_epochs == 0
    save_is_due = (
        is_last
        or (is_whole and run.epoch % config.checkpoint_every_epochs == 0)
        or (config.checkpoint_every_steps is not None and progress.step % config.checkpoint_every_steps == 0)
    )
    if not (at_end or knn_is_due or save_is_due):
        return
    meter.report()
    require_finite_weights(run)
    is_best = False
    if can_measure(config, run.source.facts) and (at_end or knn_is_due):
        accuracy = measure_knn(run)
        progress.knn_accuracy = accuracy
        is_best = progress.best_knn_accuracy is None or accuracy > progress.best_knn_accuracy
        progress.best_knn_accuracy = max(accuracy, progress.best_knn_accuracy or 0.0)
        log.write("knn", step=progress.step, epoch=run.epoch, knn_accuracy=accuracy)
        run.accelerator.log({"knn_accuracy": accuracy}, step=progress.step)
        log.say(f"epoch {run.epoch}: validation kNN {accuracy:.2f} %" + (" (best)" if is_best else ""))
    elif at_end:
        is_best = progress.best_knn_accuracy is None  # nothing was measured: the last epoch stands for the best
    run.peers.wait_until(run.writer.is_idle, "waiting for the disk to have the checkpoint before")
    run.peers.working("saving")
    if run.accelerator.is_main_process:
        save(run, is_best=is_best)
    run.peers.working("training")
    meter.restart_clock()


def can_measure(config: TrainConfig, facts: Facts) -> bool:
    """Whether there are labels of several classes, and validation images, for kNN."""
    return bool(config.num_validation) and facts.is_labelled and facts.num_classes > 1


def measure_knn(run: Run) -> float:
    """Return kNN accuracy on the validation images in percent; every rank encodes a share and has the result.

    It is done in parts, and before each the ranks tell each other that they go on.
    """
    assert run.config.num_validation is not None
    still_measuring = functools.partial(run.peers.working, "measuring kNN accuracy")
    bank_rows, query_rows = validation_split(run.derived.num_images, run.config.num_validation)
    at_once = MEASURED_AT_ONCE * run.derived.world_size

    def parts(rows: NDArray[np.int64]) -> Iterator[Features]:
        for start in range(0, len(rows), at_once):
            still_measuring()
            yield evaluation.extract_features(
                run.plain_model.encoder,
                run.source,
                rows[start : start + at_once],
                device=run.accelerator.device,
                dtype=forward_dtype(run.accelerator, run.config),
                world_size=run.derived.world_size,
                rank=run.accelerator.process_index,
            )

    bank, queries = (Features.joined(list(parts(rows))) for rows in (bank_rows, query_rows))
    return evaluation.knn_accuracy(
        bank,
        queries,
        k=min(20, len(bank_rows)),
        num_classes=run.source.facts.num_classes,
        before_block=still_measuring,
    )


def require_finite_weights(run: Run) -> None:
    """Stop before a checkpoint that would not be good. Every rank has the same weights, so all stop."""
    norms = torch._foreach_norm([value.float() for value in run.plain_model.state_dict().values()])
    if not bool(torch.stack(list(norms)).isfinite().all()):
        raise DivergedError(f"weights are not finite after step {run.progress.step}")


def before_save(lock: runlog.Lock, log: RunLog) -> None:
    """See that the folder is still this run's, and that all lines that a checkpoint continues after are on the disk."""
    lock.require_held()
    log.sync()


def save(run: Run, *, is_best: bool) -> None:
    """Hand the state of the run to the thread that writes it."""
    payload = checkpoint.resumable_payload(
        model=run.plain_model,
        optimizer=run.optimizer,
        scaler=run.accelerator.scaler,
        config=to_json(run.config),
        facts=to_json(run.source.facts),
        step=run.progress.step,
        epoch=run.epoch,
        knn_accuracy=run.progress.knn_accuracy,
        best_knn_accuracy=run.progress.best_knn_accuracy,
        world_size=run.derived.world_size,
    )
    run.writer.save(payload, is_best=is_best)


# ---------------------------------------------------------------------------------------------------------------
# Devices, data and an earlier run


def join(signals: Signals | None = None) -> PartialState:
    """Meet the other processes that the launcher has started, or be alone; done once. Returns accelerate's view."""
    use_cpu = not torch.cuda.is_available() or launch.cpu_is_asked_for()
    with launch.saying_who_is_awaited(signals):
        try:
            return PartialState(cpu=use_cpu, timeout=datetime.timedelta(seconds=START_SECONDS))
        except ValueError as error:  # incomplete variables
            raise ValueError(f"{error}. {launch.if_alone()}") from error
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            raise LostPeerError(f"the processes of this run did not meet: {error}") from error


def statement(config: TrainConfig) -> dict[str, str]:
    """Return all that this rank's results depend on, for :func:`simclr.run.launch.require_one_run`, by name."""
    facts, device = load_facts(config.data), PartialState().device
    settings = {key: str(value) for key, value in _flat(json.loads(to_json(config))).items()}
    # Where the images lie and who reads them may differ; what they are may not.
    return {key: value for key, value in settings.items() if key not in {"data", "speed.loader"}} | {
        "the data": f"{facts.num_images} images with sha256 {facts.content_sha256[:12]}",
        "the code": launch.fingerprint_of_code(Path(__file__)),
        "the device": device.type,
        "the precision": choose_precision(config, device)[0],
        **{name: importlib.metadata.version(name) for name in ("torch", "accelerate", "timm", "numpy")},
    }


def start_devices(config: TrainConfig) -> tuple[Accelerator, str]:
    """Return accelerate's way to train on this rank's device, and why this precision was chosen."""
    state = join()
    require_world_size(config, state.num_processes)
    precision, reason = choose_precision(config, state.device)
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise ValueError(f"tracker {config.tracker} is not installed: pip install {config.tracker}")
    accelerator = Accelerator(
        cpu=state.device.type == "cpu",
        mixed_precision=precision if precision in {"bf16", "fp16"} else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.folder,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if config.tracker != "none":
        accelerator.init_trackers("simclr", config=_flat(dataclasses.asdict(config)))
    return accelerator, f"{precision} ({reason})"


def require_world_size(config: TrainConfig, num_processes: int) -> None:
    """Stop if another number of processes takes part than was asked for, here or of SLURM."""
    if config.world_size is not None and num_processes != config.world_size:
        raise ValueError(
            f"world_size is {config.world_size}, but the number of processes that take part is {num_processes}. "
            "On CPUs, `accelerate launch --cpu --num_processes N` starts one whatever N is: use --config_file "
            "accelerate_configs/cpu.yaml --num_processes N (or torchrun --nproc-per-node N)"
        )
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes < announced:
        raise ValueError(
            f"WORLD_SIZE in the environment is {announced}, but this process would train alone, as {num_processes}: "
            f"accelerate wants LOCAL_RANK too. Start it by torchrun or accelerate launch. {launch.if_alone()}"
        )
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_processes < num_tasks:
        raise ValueError(
            f"srun started {num_tasks} tasks, but this process belongs to a group of {num_processes}: they would train "
            f"{num_tasks} copies of the run. Start it as slurm/pretrain.sbatch does"
        )


def choose_precision(config: TrainConfig, device: torch.device) -> tuple[str, str]:
    """Return the precision and why."""
    asked = launch.mixed_precision_asked_for()
    if asked is not None and config.precision not in {"auto", asked}:
        raise ValueError(
            f"accelerate is told mixed precision {asked} (--mixed_precision, its configuration file or "
            f"ACCELERATE_MIXED_PRECISION), but precision is {config.precision}; leave one of the two out"
        )
    precision = asked or config.precision
    if precision != "auto":
        if precision == "fp16" and device.type == "cpu":
            raise ValueError("precision fp16 needs a GPU; use --precision bf16 or fp32 on a CPU")
        return precision, "accelerate's mixed precision" if asked else "as configured"
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "the GPU computes with it") if has_bf16 else ("fp32", "the GPU is older than bf16")
    if runlog.cpu_has_fast_bf16():
        return "bf16", "the CPU has AMX"
    return "fp32", "the CPU has no AMX, and bf16 would be slower"


def parameter_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the weights."""
    return torch.float64 if config.precision == "fp64" else torch.float32


def forward_dtype(accelerator: Accelerator, config: TrainConfig) -> torch.dtype:
    """Return the dtype of the forward pass."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return autocast.get(accelerator.mixed_precision, parameter_dtype(config))


def image_size(facts: Facts, path: Path) -> int:
    """Return the side of the images in pixels."""
    if facts.height != facts.width:
        raise ValueError(
            f"{path} holds images of {facts.height} x {facts.width} pixels; pretraining needs square ones. Convert "
            "them with a --resolution (python -m data_prep --help)"
        )
    return facts.height


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
        {key: value for key, value in _flat(json.loads(to_json(run))).items() if key not in FREE_TO_CHANGE}
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
    if earlier.content_sha256 != facts.content_sha256:
        before_now = (
            f"({earlier.source}, {earlier.num_images} images) than {config.data} ({facts.source}, {facts.num_images} "
            "images)"
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


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested dicts as one, with dotted keys and values that any tracker takes."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flattened(values).items()
    }


# ---------------------------------------------------------------------------------------------------------------
# What is said and written down


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
    print(f"loader:     {source.backend} ({source.reason})")
    print(f"views:      {feed.method} ({feed.reason})")
    print(f"devices:    {processes} on {accelerator.device.type} ({runlog.hardware()}){threads}")
    print(f"precision:  {precision}")
    compiled = "compiled for fixed shapes, for which the first step waits" if way.is_compiled else "not compiled"
    print(f"step:       {'one CUDA graph' if way.is_captured else 'launch by launch'}, {compiled} ({way.reason})")
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
    print(f"view side:  {say_view_stages(config.view_stages, facts.height)}")
    print(f"view 1:     {describe(config.view_1)}")
    print(f"view 2:     {'as view 1' if config.view_2 == config.view_1 else describe(config.view_2)}")
    if not can_measure(config, facts):
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
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Write manifest.json: what the result depends on, and the sessions that made it."""
    path = config.folder / runlog.MANIFEST
    session = {
        "environment": runlog.environment(),
        "from_step": progress.step,
        "derived": dataclasses.asdict(derived),
        "device": str(accelerator.device.type),
        "mixed_precision": accelerator.mixed_precision,
        "loader": f"{source.backend}: {source.reason}",
        "views": f"{feed.method}: {feed.reason}",
    }
    before = runlog.read_manifest(config.folder) if progress.step else None
    runlog.write_json(
        path,
        {
            **session,
            "config": json.loads(to_json(config)),
            "facts": json.loads(to_json(source.facts)),
            "sessions": [*(before or {}).get("sessions", []), session],
        },
    )


def cli() -> None:
    """Run :func:`main` with the options of the command line."""
    host.outlive_readers()
    conclude(parse_train_config(description=__doc__))


def conclude(config: TrainConfig) -> None:
    """Run :func:`main`, and end the process with the status that belongs to its outcome."""
    signals = Signals()
    signals.install()
    try:
        main(config, signals)
    except Interrupted:
        signals.ignore()
        distributed.leave()
        sys.exit(EXIT_SAVED)
    except LostPeerError as error:
        launch.tell_launcher(str(error))
        print(f"train_simclr.py: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly end would wait for the ranks that are lost
    except ValueError as error:  # what the user can put right; anything else keeps its traceback
        launch.tell_launcher(str(error))
        sys.exit(f"train_simclr.py: {error}")
    distributed.leave()


if __name__ == "__main__":
    cli()
