"""What a run would take: some of its steps, taken on its devices and forgotten.

python train_simclr.py PRESET --dry-run

Everything is opened as for the run itself, so what would be refused is refused, and all that is derived is printed. Its
folder is not made, locked or written to. Compiled code is kept in its caches, as after any run.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr import evaluation
from simclr.config import Derived, TrainConfig
from simclr.run import memory
from simclr.run.devices import forward_dtype
from simclr.run.interruption import Interrupted
from simclr.run.opening import Run
from simclr.templates import say_duration
from simclr.views import whole_stages

OPTION = "--dry-run"
SECONDS_FOR_A_SIDE = 5.0
MOST_STEPS = 50
SLOW_STEP = 20.0
"""Seconds; where the first step takes longer, on a CPU, no other one is taken."""
MEASURED = 512
"""Images for each rank whose encoding is timed."""

TakeStep = Callable[[Run, Any], tuple[Tensor, ...]]
Batches = Callable[[Run, int, int], Iterator[Any]]


def take_option(words: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether ``--dry-run`` is among the words of a command line, and the others."""
    return OPTION in words, [word for word in words if word != OPTION]


class Stage(NamedTuple):
    """Epochs with views of one side."""

    side: int
    first_epoch: int
    num_steps: int
    """Still to be taken."""


def stages_left(config: TrainConfig, derived: Derived, stored_side: int, step: int) -> list[Stage]:
    """Return the stages of a run with the steps of each that are left after ``step``; those with none are left out."""
    stages, first = [], 0
    stop = min(config.stop_at_step or derived.total_steps, derived.total_steps)
    for side, epochs in whole_stages(config.view_stages, stored_side, config.epochs):
        begin, end = first * derived.steps_per_epoch, (first + epochs) * derived.steps_per_epoch
        num_steps = min(end, stop) - max(begin, step)
        if num_steps > 0:
            stages.append(Stage(side, first, num_steps))
        first += epochs
    return stages


def dry_run(run: Run, batches: Batches, take_step: TakeStep) -> None:
    """Take some steps at each side of the views, and print what the run would take. On all ranks together.

    Args:
        run: Opened with ``is_dry``; its weights are of no use afterwards.
        batches: ``(run, epoch, first step)`` -> what each step takes.
        take_step: Takes one.

    Raises:
        OutOfMemoryError: If a step does not fit; the message says what would.
        Interrupted: If any rank was asked to stop.
    """
    config, derived = run.config, run.derived
    stages = stages_left(config, derived, run.source.facts.height, run.progress.step)
    say(run, f"{'dry run:':<12}nothing is written; some steps are taken for each side of the views, and forgotten")
    seconds, lines = 0.0, []
    run.model.train()
    for stage in stages:
        with memory.explain_shortage(run.accelerator.device, derived.per_device_batch_size, derived.world_size):
            per_step, num_taken = time_steps(run, stage, batches, take_step)
        seconds += per_step * stage.num_steps
        lines.append(
            f"views of {stage.side} pixels: {stage.num_steps:,} steps x {per_step:.3g} s = "
            f"{say_duration(per_step * stage.num_steps)} ({rate(config.global_batch_size / per_step)} images/s; "
            f"{num_taken} step{'s' * (num_taken > 1)} timed)"
        )
    if stages and (times := num_knn(run)):
        per_measuring = time_encoding(run)
        seconds += times * per_measuring
        lines.append(
            f"kNN: {times} x {per_measuring:.3g} s to encode the images = {say_duration(times * per_measuring)}"
        )
    in_all = f"in all about {say_duration(seconds)}, on this machine as busy as it is now"
    lines.append(in_all if stages else "nothing is left to do")
    for i, line in enumerate(lines):
        say(run, f"{'' if i else 'time:':<12}{line}")
    for i, line in enumerate(memory_lines(run)):
        say(run, f"{'' if i else 'peak:':<12}{line}")
    say(run, f"{'disk:':<12}{disk_line(run)}")


def say(run: Run, line: str) -> None:
    """Print a line, once for all ranks."""
    if run.accelerator.is_main_process:
        print(line, flush=True)


def time_steps(run: Run, stage: Stage, batches: Batches, take_step: TakeStep) -> tuple[float, int]:
    """Return the seconds of a step of a stage, and of how many that is the mean; the same on every rank."""
    endless = itertools.chain.from_iterable(batches(run, stage.first_epoch, 0) for _ in itertools.count())

    def timed(num_steps: int) -> float:
        synchronise(run.accelerator.device)
        started = time.perf_counter()
        for batch in itertools.islice(endless, num_steps):
            take_step(run, batch)
            if asked := run.peers.step_taken(run.progress.step):
                raise Interrupted(f"{asked}: the dry run has ended early")
        synchronise(run.accelerator.device)
        return float(max(run.peers.gather(time.perf_counter() - started))) / num_steps

    first = timed(1)  # compiles, captures, opens the loader
    if first > SLOW_STEP and run.accelerator.device.type == "cpu":
        return first, 1
    num_steps = min(MOST_STEPS, max(1, round(SECONDS_FOR_A_SIDE / timed(1))))
    return timed(num_steps), num_steps


def num_knn(run: Run) -> int:
    """Return how often kNN accuracy is still to be measured."""
    config, derived = run.config, run.derived
    if not evaluation.can_measure_knn(run.source.facts, config.num_validation):
        return 0
    stop = min(config.stop_at_step or derived.total_steps, derived.total_steps) // derived.steps_per_epoch
    due = {config.epochs} | (
        set(range(0, config.epochs, config.knn_every_epochs)) if config.knn_every_epochs else set()
    )
    return sum(run.epoch < epoch <= stop for epoch in due)


def time_encoding(run: Run) -> float:
    """Return the seconds that encoding all images takes, from encoding some of them; the same on every rank."""
    num_images, world_size = run.derived.num_images, run.derived.world_size
    rows = np.arange(min(MEASURED * world_size, num_images))
    synchronise(run.accelerator.device)
    started = time.perf_counter()
    evaluation.extract_features(
        run.plain_model.encoder,
        run.source,
        rows,
        device=run.accelerator.device,
        dtype=forward_dtype(run.accelerator, run.config),
        world_size=world_size,
        rank=run.accelerator.process_index,
    )
    synchronise(run.accelerator.device)
    return float(max(run.peers.gather(time.perf_counter() - started))) * num_images / len(rows)


def memory_lines(run: Run) -> list[str]:
    """Return what the steps took of the device's memory, and the processes of this machine's. Waits for all ranks."""
    device = run.accelerator.device
    places = run.peers.gather((socket.gethostname(), memory.host_peak(), memory.device_peak(device)))
    lines = []
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        most = max(of_device for *_, of_device in places)
        lines.append(f"of the GPU: {gib(most)} of {gib(total)} at the peak{', the fullest rank' * (len(places) > 1)}")
    here = [of_host for host, of_host, _ in places if host == socket.gethostname()]
    if None not in here:
        available = memory.host_available()
        free = f", of which {gib(available)} are available now" if available is not None else ""
        # On a CPU freed memory is kept and falls into pieces: 2.4 GiB here were 4.1 after 720 steps of cpu-imagenette
        more = " after these steps, and more in a long run" if device.type == "cpu" else ""
        each = f"{gib(max(here))} at the peak of {'this process' if len(here) == 1 else 'a process'}{more}"
        together = f", {gib(sum(here))} of all {len(here)} on this machine" if len(here) > 1 else ""
        lines.append(f"of the host: {each}{together}; it has {gib(memory.host_memory())}{free}")
    return lines


def disk_line(run: Run) -> str:
    """Return how large checkpoints are, and what is free where they go."""
    model = num_bytes(run.plain_model.state_dict())
    whole = model + num_bytes(run.optimizer.state_dict())
    most = (run.config.keep_checkpoints + 1) * whole + 2 * model  # while one is replaced, both are there
    folder = run.config.folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    trouble = "" if free > most else ": TOO LITTLE, free some space or name another --output"
    if not os.access(existing, os.W_OK):
        trouble += f"; {existing} CANNOT BE WRITTEN TO, name another --output"
    return (
        f"checkpoints of {mb(whole)}, at most {mb(most)} at once, in {run.config.folder}; "
        f"{gib(free)} are free there{trouble}"
    )


def num_bytes(state: Any) -> int:
    """Return the size of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(num_bytes(value) for value in state.values())
    return sum(num_bytes(value) for value in state) if isinstance(state, list | tuple) else 0


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(images_per_second: float) -> str:
    """Write images per second for people."""
    return f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"


def gib(size: float) -> str:
    """Write a number of bytes in GiB."""
    return f"{size / 2**30:.3g} GiB"


def mb(size: float) -> str:
    """Write a number of bytes in MB, as file managers do."""
    return f"{size / 1e6:,.0f} MB"
