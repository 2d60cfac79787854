"""How long training waits for a checkpoint, and what a checkpoint costs in all.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --preset cpu-simclr

A preset's model and optimizer, with momentum, saved to a temporary folder in turns: in training's way (copied to host
memory, then written by a thread) and in the plain way (the caller waits for the disk). Between two saves there is the
time that the disk needs, as there is at the presets' interval of one epoch. Beside a step that keeps all cores busy,
training loses at most the wait and the processor time of a save.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from simclr.models import SimCLR
from simclr.optim import make_optimizer
from simclr.presets import PRESETS
from simclr.run import checkpoint
from simclr.run.checkpoint import CheckpointWriter, save_atomically


def main() -> None:
    """Measure, print, and write results/benchmarks/checkpoint_<preset>.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cifar10-simclr-100", choices=PRESETS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="default: results/benchmarks/checkpoint_<preset>.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = PRESETS[options.preset].config
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
    processor: list[float] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        with CheckpointWriter(folder, keep=2, last_step=None) as writer:

            def beside() -> float:
                used, started = time.process_time(), time.perf_counter()
                writer.save(payload, is_best=False)
                waited = time.perf_counter() - started
                writer.flush()
                processor.append(time.process_time() - used)
                return waited

            candidates = {
                "the plain way": lambda: save_atomically(folder / "plain.pt", payload),
                "beside training": beside,
            }
            timings = common.interleave(candidates, rounds=options.rounds)
        size = (folder / "plain.pt").stat().st_size / 2**20
    for what, timing in timings.items():
        print(f"{what:<16} {timing.median * 1e3:7.1f} ms of waiting, spread {timing.spread:.0%}")
    cost = sorted(processor)[len(processor) // 2]
    print(f"{size:.0f} MiB on {device}; processor time of a save beside training: {cost * 1e3:.0f} ms")
    common.write_result(
        options.output or common.ROOT / "results" / "benchmarks" / f"checkpoint_{options.preset}.json",
        {
            "what": f"a checkpoint of {options.preset}, {size:.1f} MiB, on {device}",
            "waiting": common.as_json(timings),
            "processor_seconds_beside_training": cost,
        },
    )


if __name__ == "__main__":
    main()
