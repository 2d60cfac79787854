r"""Pretrains an encoder with SimCLR or Barlow Twins, on any number of devices.

    python train_simclr.py demo
    python train_simclr.py demo --dry-run
    python train_simclr.py --config results/demo-seed0/config.json --name again
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 \
        train_simclr.py cifar10-simclr-100 --world-size 4

With the data file, the configuration determines the weights, whatever the number of devices; --config takes that of
another run. --dry-run says what a run would be and take, and writes nothing. A run that was cut off continues, in the
middle of an epoch too, when the same command is given again. One that is asked to stop, by a signal to any process,
saves first and ends with status 75.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr import distributed, evaluation, files, losses, system
from simclr.command_line import parse_train_config
from simclr.config import TrainConfig, to_json
from simclr.data import validation_split
from simclr.evaluation import DivergedError, Features, can_measure_knn
from simclr.optim import set_learning_rate
from simclr.run import checkpoint, dry_run, launch, memory
from simclr.run.devices import forward_dtype, join
from simclr.run.interruption import EXIT_SAVED, Interrupted, Signals
from simclr.run.meter import Meter
from simclr.run.opening import Run, open_run, require_equal_weights, statement
from simclr.run.peers import LostPeerError, Peers
from simclr.views import size_at

MEASURED_AT_ONCE = 512  # images for each rank, between two signs of life; less work than a step of a batch of 128


@files.explain_refusals()
def main(config: TrainConfig, signals: Signals | None = None, *, is_dry: bool = False) -> Path:
    """Pretrain.

    Args:
        config: The run.
        signals: What asks this process to stop; by default nothing does.
        is_dry: Whether to say what the run would take instead, and write nothing: see :mod:`simclr.run.dry_run`.

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
    join()
    with (
        Peers(timeout_seconds=config.timeout_seconds, signals=signals or Signals()) as peers,
        peers.explain_lost_ranks(),
    ):
        launch.require_one_run(peers.gather(statement(config, Path(__file__))))
        with open_run(config, peers, update, is_dry=is_dry) as run:
            dry_run.dry_run(run, batches, train_step) if is_dry else train(run)
    return config.folder


# ---------------------------------------------------------------------------------------------------------------
# The loop


def train(run: Run) -> None:
    """Train from ``run.progress`` to the end, to ``stop_at_step``, or until asked to stop."""
    config, derived, progress = run.config, run.derived, run.progress
    meter = Meter(run)
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
                measure_and_save(run, meter, is_last=False)
        measure_and_save(run, meter, is_last=progress.step == stop)
    run.peers.wait_until(run.writer.is_idle, "waiting for the disk")
    run.writer.flush()
    if asked and progress.step < derived.total_steps:
        message = (
            f"{asked}: saved after step {progress.step} of {derived.total_steps}; the same command goes on from it"
        )
        run.log.say(message)
        raise Interrupted(message)


def train_step(run: Run, batch: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Take one optimizer step on this rank's share of a global batch; return loss, z1 and z2, on the device.

    Args:
        run: What is trained.
        batch: Of :func:`batches`: views (2b, 3, S, S), the first views of b images and then the second ones, or what
            a captured step makes them from.
    """
    set_learning_rate(run.optimizer, run.derived.learning_rate(run.progress.step))
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
    with distributed.alike():  # the plan sees to it, and all take the same loss
        loss, z1, z2 = passes(run, views)
    if run.way.averages_gradients:  # else DDP has, during the backward pass
        distributed.average_gradients(run.plain_model.parameters())
    run.accelerator.unscale_gradients(run.optimizer)
    norms = run.guard.gradient_norms()
    if config.optimizer.gradient_clip_norm is not None:
        run.accelerator.clip_grad_norm_(run.plain_model.parameters(), config.optimizer.gradient_clip_norm)
    run.guard.step(norms)
    run.optimizer.zero_grad()
    return loss.detach(), norms, z1.detach(), z2.detach()


def batches(run: Run, epoch: int, start_step: int) -> Iterator[Tensor | tuple[Tensor, ...]]:
    """Return what each step of the rest of an epoch takes."""
    run.peers.expect(size_at(run.config.view_stages, epoch, run.source.facts.height))
    if run.captured is None:
        return run.feed.batches(run.plan, epoch=epoch, start_step=start_step)
    return run.feed.recipes(run.plan, epoch=epoch, start_step=start_step)


def whole_batch(run: Run, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pass this rank's views forward and backward at once; return loss, z1 and z2."""
    z1, z2 = torch.cat([run.model(group)[1] for group in normalised_together(run, views)]).chunk(2)
    return loss_and_backward(run, z1, z2), z1, z2


def in_micro_batches(run: Run, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same with some images at a time in the encoder: see :mod:`simclr.step.recompute`."""
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
    return loss, z1, z2


def normalised_together(run: Run, rows: Tensor) -> tuple[Tensor, ...]:
    """Return the rows (2b, ...) of both views as they pass the network: at once, or each view by itself."""
    return rows.chunk(run.passes)


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
    elif config.name == "barlow_twins":
        loss = losses.barlow_twins(z1, z2, off_diagonal_weight=config.off_diagonal_weight)
    else:
        loss = losses.own_objective(config.name, z1, z2, dict(config.settings))
    loss = loss * config.scale
    run.accelerator.backward(loss)
    return loss


# ---------------------------------------------------------------------------------------------------------------
# Between steps


def measure_and_save(run: Run, meter: Meter, *, is_last: bool) -> None:
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
    require_equal_weights(run)
    is_best = False
    if can_measure_knn(run.source.facts, config.num_validation) and (at_end or knn_is_due):
        accuracy = measure_knn(run)
        progress.knn_accuracy = accuracy
        is_best = progress.best_knn_accuracy is None or accuracy > progress.best_knn_accuracy
        progress.best_knn_accuracy = max(accuracy, progress.best_knn_accuracy or 0.0)
        run.log.write("knn", step=progress.step, epoch=run.epoch, knn_accuracy=accuracy)
        run.log.say(f"epoch {run.epoch}: validation kNN {accuracy:.2f} %" + (" (best)" if is_best else ""))
    elif at_end:
        is_best = progress.best_knn_accuracy is None  # nothing was measured: the last epoch stands for the best
    run.peers.wait_until(run.writer.is_idle, "waiting for the disk to have the checkpoint before")
    run.peers.working("saving")
    if run.accelerator.is_main_process:
        save(run, is_best=is_best)
    run.peers.working("training")
    meter.restart_clock()


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


def cli() -> None:
    """Run :func:`main` with the options of the command line."""
    system.outlive_readers()
    is_dry, words = dry_run.take_option(sys.argv[1:])
    conclude(parse_train_config(words, description=__doc__), is_dry=is_dry)


def conclude(config: TrainConfig, *, is_dry: bool = False) -> None:
    """Run :func:`main`, and end the process with the status that belongs to its outcome."""
    signals = Signals()
    signals.install()
    try:
        main(config, signals, is_dry=is_dry)
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
