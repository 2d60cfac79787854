"""Keeps gradients that are not finite out of the weights, and writes down where they came from.

Gradients are averaged over all ranks before they are looked at. So a NaN of one rank is a NaN of all, and all decide
alike without talking to each other. On a GPU the decision is taken on the device, where the optimizer leaves out the
step by itself; the host learns of it some steps later, when metrics are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simclr import distributed
from simclr.data import EpochPlan
from simclr.evaluation import DivergedError
from simclr.files import write_json

MOST_IN_A_ROW = 10


@dataclass(frozen=True)
class _Step:
    """What is kept of a step until the host looks at it."""

    step: int
    loss: Tensor
    norms: Tensor


class Guard:
    """Takes optimizer steps with finite gradients only.

    Args:
        model: What is trained, without wrappers, so that its parameters have their own names.
        optimizer: As accelerate prepared it.
        scaler: The gradient scaler of fp16, or None. It leaves out steps itself, as part of its search for a scale.
        policy: See :class:`simclr.config.TrainConfig`.
        folder: Where a description of gradients that are not finite is written; None: nowhere.
        plan: Which images this rank takes at each step, for that description.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        scaler: Any,
        policy: Literal["stop", "skip"],
        folder: Path | None,
        plan: EpochPlan,
    ) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names, self._parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._optimizer, self._scaler = optimizer, scaler
        self._skips = policy == "skip" or scaler is not None
        self._buffers = list(model.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        self._folder, self._plan, self._rank = folder, plan, distributed.rank()
        self._steps: list[_Step] = []  # not looked at yet
        self._left_out = False  # by the host, at the step that remember() is about to hear of
        self._norms: list[float] = []  # of those looked at
        self._in_a_row = 0

    def begin(self) -> None:
        """Remember the running statistics of batch normalisation. To be called before each forward pass."""
        if self._skips:
            torch._foreach_copy_(self._buffers_before, self._buffers)

    @torch.no_grad()
    def gradient_norms(self) -> Tensor:
        """Return the l2 norm of each parameter's gradient, on the device: float32 at least, shape (parameters,).

        To be called before the gradient is clipped.
        """
        gradients = [p.grad if p.grad is not None else p.new_zeros(()) for p in self._parameters]
        return torch.stack(torch._foreach_norm(gradients))

    def step(self, norms: Tensor) -> None:
        """Take an optimizer step if the gradient is finite. On a GPU the host does not learn here whether it was.

        Args:
            norms: Of :meth:`gradient_norms`.
        """
        is_finite = torch.linalg.vector_norm(norms).isfinite()
        if self._skips:
            for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
                torch.where(is_finite, buffer, before, out=buffer)
        plain: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        if self._scaler is not None:
            self._optimizer.step()
        elif getattr(plain, "_step_supports_amp_scaling", False):
            plain.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # torch's word for "leave this step out"
            self._optimizer.step()
        elif is_finite:
            self._optimizer.step()
        else:
            self._left_out = True

    def remember(self, norms: Tensor, *, step: int, loss: Tensor) -> None:
        """Keep what is known of a step until the host looks at it.

        Args:
            norms: Of :meth:`gradient_norms`; not changed afterwards.
            step: Number of the step, from 1.
            loss: This rank's, a scalar on the device.

        Raises:
            DivergedError: As :meth:`norms`, at once where no device is waited for by it.
        """
        self._steps.append(_Step(step, loss, norms))
        if self._left_out:
            self._left_out = False
            self._look()

    def norms(self) -> list[float]:
        """Return the gradient's l2 norm at each step since the last call; the host waits for the device.

        Raises:
            DivergedError: If one was not finite and the policy is to stop, or too many were so in a row; on all ranks.
        """
        self._look()
        norms, self._norms = self._norms, []
        return norms

    def _look(self) -> None:
        steps, self._steps = self._steps, []
        if not steps:
            return
        totals: list[float] = torch.stack([torch.linalg.vector_norm(seen.norms) for seen in steps]).tolist()
        for seen, total in zip(steps, totals, strict=True):
            if math.isfinite(total):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            path = None if self._folder is None else self._describe(self._folder, seen, total)
            if not self._skips or self._in_a_row >= MOST_IN_A_ROW:
                again = f", for the {self._in_a_row}th time in a row" if self._in_a_row > 1 else ""
                raise DivergedError(
                    f"the gradient is not finite at step {seen.step}{again}; this rank's loss is {float(seen.loss)}. "
                    f"The weights did not take it in{f'; {path} has the images and norms' if path else ''}"
                )
        self._norms += totals

    def _describe(self, folder: Path, seen: _Step, total: float) -> Path:
        path = folder / f"nonfinite_step{seen.step:08d}_rank{self._rank}.json"
        epoch, step_in_epoch = divmod(seen.step - 1, len(self._plan))
        norms = dict(zip(self._names, seen.norms.tolist(), strict=True))
        write_json(
            path,
            {
                "step": seen.step,
                "epoch": epoch,
                "rank": self._rank,
                "loss_of_this_rank": str(float(seen.loss)),
                "gradient_norm": str(total),  # text, since JSON has no such numbers
                "not_finite": [name for name, norm in norms.items() if not math.isfinite(norm)],
                "gradient_norms": {name: str(norm) for name, norm in norms.items()},
                "images": next(self._plan.batches(epoch, step_in_epoch)).tolist(),
            },
        )
        return path
