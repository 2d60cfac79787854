"""How long training waits for a checkpoint.

    python benchmarks/checkpoint.py [REPEATS]

The model and optimizer of the preset cifar10-simclr-100 (ResNet-18, SGD with momentum), written to a temporary folder:
in training's way (copied to host memory, then written by a thread) and in the plain way (the caller waits for the
disk). Between two saves there is the time that the disk needs, as there is at the presets' interval of one epoch.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from simclr import checkpoint
from simclr.checkpoint import CheckpointWriter, save_atomically
from simclr.models import SimCLR
from simclr.optim import make_optimizer
from simclr.presets import PRESETS


def main(repeats: int) -> None:
    """Print both stalls."""
    config = PRESETS["cifar10-simclr-100"].config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SimCLR(config.model, 32).to(device)
    optimizer = make_optimizer(model, config.optimizer)
    torch.autograd.backward(model(torch.randn(4, 3, 32, 32, device=device))[1].sum())
    optimizer.step()  # so that there is momentum
    payload = checkpoint.resumable_payload(
        model=model,
        optimizer=optimizer,
        scaler=None,
        config="{}",
        facts="{}",
        step=1,
        epoch=0,
        knn_accuracy=None,
        best_knn_accuracy=None,
        world_size=1,
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        plain = [milliseconds(lambda: save_atomically(folder / checkpoint.LAST, payload)) for _ in range(repeats)]
        size = (folder / checkpoint.LAST).stat().st_size / 2**20
        beside, whole = [], []
        with CheckpointWriter(folder, keep=2, last_step=None) as writer:
            for _ in range(repeats):
                started = time.perf_counter()
                beside.append(milliseconds(lambda: writer.save(payload, is_best=False)))
                writer.flush()
                whole.append((time.perf_counter() - started) * 1e3)
    print(f"{size:.0f} MiB on {device}, {repeats} saves, milliseconds: median (first, least, most)")
    for what, values in (("plain", plain), ("beside training", beside), ("until it is on the disk", whole)):
        print(
            f"{what:<24}{statistics.median(values):7.1f} ({values[0]:.1f}, {min(values):.1f}, {max(values):.1f})",
            flush=True,
        )


def milliseconds(do: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    do()
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
