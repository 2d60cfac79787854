"""What is reported about the steps of a run while it goes on."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from simclr.evaluation import DivergedError
from simclr.run.opening import Run
from simclr.unit_length import unit_rows


class Meter:
    """Gathers what is reported about the steps since the last report, on the device: reading it would wait for it."""

    def __init__(self, run: Run) -> None:
        self.run, self.log = run, run.log
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
        # By the hosts, who have waited for their devices: nothing is sent between GPUs beside captured steps.
        of_all = self.run.peers.gather(of_this_rank.tolist())
        *step_losses, similarity, spread = (sum(values) / derived.world_size for values in zip(*of_all, strict=True))
        norms = self.run.guard.norms()
        num_steps, seconds = len(step_losses), time.perf_counter() - self._started
        taken = {  # without those left out because their gradient was not finite
            step - num_steps + i: (loss, norm)
            for i, (loss, norm) in enumerate(zip(step_losses, norms, strict=True), start=1)
            if math.isfinite(norm)
        }
        for number, (loss, _) in taken.items():  # the same on every rank, so all stop
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} at step {number}")

        loss = sum(loss for loss, _ in taken.values()) / len(taken) if taken else math.nan
        rate = derived.learning_rate(step - 1)
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
