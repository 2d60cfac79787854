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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from simclr import evaluation
from simclr.run import memory
from simclr.run.interruption import Interrupted
from simclr.run.opening import Run
from simclr.system import say_duration
from simclr.views import size_at

OPTION = "--dry-run"
SECONDS_FOR_A_SIDE = 5.0
MOST_STEPS = 50

TakeStep = Callable[[Run, Any], tuple[Tensor, ...]]
Batches = Callable[[Run, int, int], Iterator[Any]]


def take_option(words: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether ``--dry-run`` is among the words of a command line, and the others."""
    return OPTION in words, [word for word in words if word != OPTION]


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
    if run.accelerator.is_main_process:
        print(f"{'dry run:':<12}nothing is written; some steps are taken for each side of the views, and forgotten")
    stop = min(config.stop_at_step or derived.total_steps, derived.total_steps)
    epochs = [step // derived.steps_per_epoch for step in range(run.progress.step, stop)]
    sides = [size_at(config.view_stages, epoch, run.source.facts.height) for epoch in epochs]
    seconds, per_step, lines = 0.0, 0.0, []
    run.model.train()
    for side, num_steps in Counter(sides).items():
        with memory.explain_shortage(run.accelerator.device, derived.per_device_batch_size, derived.world_size):
            per_step, num_timed = time_steps(run, epochs[sides.index(side)], batches, take_step)
        seconds += per_step * num_steps
        lines.append(
            f"views of {side} pixels: {num_steps:,} steps x {per_step:.3g} s = {say_duration(per_step * num_steps)} "
            f"({config.global_batch_size / per_step:,.3g} images/s; steps timed: {num_timed})"
        )
    if times := sum(knn_is_due(run, epoch) for epoch in range(run.epoch + 1, stop // derived.steps_per_epoch + 1)):
        # Each image once forward, in place of two views forward and backward
        each = per_step * derived.num_images / config.global_batch_size / 6
        seconds += times * each
        lines.append(f"kNN: {times} x about {each:.3g} s, a sixth of an epoch = {say_duration(times * each)}")
    in_all = f"in all about {say_duration(seconds)}, on this machine as busy as it is now"
    lines.append(in_all if sides else "nothing is left to do")
    peak = peak_memory(run)
    if run.accelerator.is_main_process:
        print(f"{'time:':<12}" + f"\n{'':<12}".join(lines))
        print(f"{'peak:':<12}{peak}\n{'disk:':<12}{disk_line(run)}", flush=True)


def time_steps(run: Run, epoch: int, batches: Batches, take_step: TakeStep) -> tuple[float, int]:
    """Return the seconds of a step of an epoch, and of how many that is the mean; the same on every rank."""
    device = run.accelerator.device
    endless = itertools.chain.from_iterable(batches(run, epoch, 0) for _ in itertools.count())

    def timed(num_steps: int) -> float:
        started = time.perf_counter()
        for batch in itertools.islice(endless, num_steps):
            take_step(run, batch)
            if asked := run.peers.step_taken(run.progress.step):
                raise Interrupted(f"{asked}: the dry run has ended early")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return float(max(run.peers.gather(time.perf_counter() - started))) / num_steps

    timed(1)  # compiles, captures, opens the loader
    num_steps = min(MOST_STEPS, max(1, round(SECONDS_FOR_A_SIDE / timed(1))))
    return timed(num_steps), num_steps


def knn_is_due(run: Run, epoch: int) -> bool:
    """Return whether kNN accuracy is measured after so many epochs."""
    every = run.config.knn_every_epochs
    is_due = epoch == run.config.epochs or (every > 0 and epoch % every == 0)
    return is_due and evaluation.can_measure_knn(run.source.facts, run.config.num_validation)


def peak_memory(run: Run) -> str:
    """Return what the steps took of the device's memory, and the processes of this machine's. Waits for all ranks."""
    device, here = run.accelerator.device, socket.gethostname()
    places = run.peers.gather((here, memory.host_peak() or 0, memory.device_peak(device)))
    of_host = sum(peak for host, peak, _ in places if host == here)
    # On a CPU freed memory is kept and falls into pieces: 2.4 GiB here were 4.1 after 720 steps of cpu-imagenette
    more = ", and more in a long run" if device.type == "cpu" else ""
    text = f"{gib(of_host)} of this machine's {gib(memory.host_memory())} for its processes{more}"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        text += f"; {gib(max(peak for *_, peak in places))} of {gib(total)} on the fullest GPU"
    return text


def disk_line(run: Run) -> str:
    """Return how large checkpoints are, what is free where they go, and what is wrong with that."""
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
        f"checkpoints of {whole / 1e6:,.0f} MB, at most {most / 1e6:,.0f} MB at once, in {run.config.folder}; "
        f"{gib(free)} are free there{trouble}"
    )


def num_bytes(state: Any) -> int:
    """Return the size of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(num_bytes(value) for value in state.values())
    return sum(map(num_bytes, state)) if isinstance(state, list | tuple) else 0


def gib(size: float) -> str:
    """Write a number of bytes in GiB."""
    return f"{size / 2**30:.3g} GiB"
