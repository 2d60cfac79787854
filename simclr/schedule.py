"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def learning_rate_at(step: int, *, peak: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Return the learning rate of optimizer step ``step``: linear warm-up, then a cosine that tends to 0.

    Args:
        step: From 0 to ``total_steps - 1``.
        peak: Learning rate at the end of the warm-up.
        total_steps: Steps of the whole run.
        warmup_steps: The rate is ``peak * (step + 1) / warmup_steps`` for this many steps.

    Raises:
        ValueError: If ``step`` lies outside the run, or the warm-up is longer than it.

    Source:
        Goyal et al. 2017, arXiv:1706.02677, section 2.2 (warm-up); Loshchilov & Hutter 2017, arXiv:1608.03983,
        equation 5 without restarts.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} lies outside the run's steps 0 to {total_steps - 1}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}, expected at least 0 and less than total_steps {total_steps}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (1 + math.cos(math.pi * progress)) / 2
