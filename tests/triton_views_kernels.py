"""The views' Triton kernels against simclr.views: on a GPU, or ``TRITON_INTERPRET=1`` on CPU tensors.

A program of its own, since the variable has to be set before Triton is imported. tests/test_triton.py runs it.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import write_noise
from simclr.data import EpochPlan, open_images
from simclr.views import ViewSpec, two_views
from simclr.views.pipeline import ViewFeed
from simclr.views.triton_views import TOLERANCE, TritonViews, parameter_table

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
PLAIN = ViewSpec()
ALL = ViewSpec(
    grayscale_probability=0.4, blur_probability=0.6, solarise_probability=0.5, crop_scale=(0.05, 1.0), hue=0.4
)
BICUBIC = dataclasses.replace(PLAIN, interpolation="bicubic", brightness=0.8, contrast=0.8, saturation=0.8)
# Stored height and width, side of the view, settings: one block and several, enlarging and shrinking
CASES = [
    (32, 32, 32, PLAIN, PLAIN),
    (32, 32, 24, PLAIN, BICUBIC),
    (20, 28, 33, ALL, PLAIN),
    (96, 64, 16, BICUBIC, ALL),
    (24, 24, 40, dataclasses.replace(ALL, blur_kernel=7), ALL),
]


def largest_difference(height: int, width: int, size: int, one: ViewSpec, two: ViewSpec, device: str) -> float:
    """Return the largest difference on pixels in [0, 1] but for those that only one of both solarises."""
    number = 3 if device == "cpu" else 48
    rng = np.random.default_rng(height * size)
    images = torch.from_numpy(rng.integers(0, 256, (number, height, width, 3), np.uint8))
    index = torch.from_numpy(rng.permutation(number)[: number * 2 // 3])
    table = parameter_table((one, two), np.arange(number), seed=3, epoch=2, height=height, width=width).to(device)
    make = TritonViews(one, two, size=size, mean=MEAN, std=STD)
    where = index.to(device)
    whole = make(images.to(device), where, table, where)
    assert whole.shape == (2 * len(index), 3, size, size)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    batch = make(images[index].to(device), torch.arange(len(index), device=device), table, where)
    assert torch.equal(whole, batch)  # from the set, or from a batch of it
    pair = two_views(images[index], index, one, two, seed=3, epoch=2, size=size, mean=MEAN, std=STD)
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
    found, expected = whole.cpu() * std + mean, torch.cat(pair) * std + mean
    off = (found - expected).abs()
    inverted = (off > TOLERANCE) & (off < 1e-4) & ((found - one.solarise_threshold).abs() < 1e-4)
    assert inverted.sum() < 10
    return float(off.masked_fill(inverted, 0).max())


def check_feed(device: str) -> None:
    """A feed whose views are Triton's yields those of a feed whose views are torch's, also from an epoch's middle.

    It draws the parameters of those images only that this rank reads.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.beton")
        write_noise(path, 10, side=12)
        alone = EpochPlan(np.arange(10), global_batch_size=4, seed=3)
        second_of_two = EpochPlan(np.arange(10), global_batch_size=4, world_size=2, rank=1, seed=3)
        # All images where the views are made, or each batch by itself: read from elsewhere, or from the host's memory
        for where, holds_all in {(device, True), (device, False), ("cpu", True)}:
            with open_images(path, backend="memory", device=where) as source:
                if not holds_all:
                    source.stored = None
                feeds = [
                    ViewFeed(source, PLAIN, ALL, seed=5, view_stages=((8, 1),), choice=choice, device=device)
                    for choice in ("triton", "torch")
                ]
                for epoch, start, plan in ((0, 1, alone), (1, 0, alone), (3, 1, second_of_two), (4, 0, second_of_two)):
                    made, expected = (list(feed.batches(plan, epoch=epoch, start_step=start)) for feed in feeds)
                    assert len(made) == len(expected) == 2 - start
                    for mine, reference in zip(made, expected, strict=True):
                        assert (mine - reference).abs().median() < TOLERANCE / min(source.facts.normalisation[1])
                        assert mine.shape[2] == (8 if epoch == 0 else 12)
                    assert feeds[0]._tables is not None
                    assert len(feeds[0]._tables.table) == 2 * plan.global_batch_size // plan.world_size
                for feed in feeds:
                    feed.close()


def main() -> None:
    """Compare all cases; raise AssertionError at the first difference."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    check_feed(device)
    for case in CASES:
        found = largest_difference(*case, device)
        print(*case[:3], f"{found:.1e}", flush=True)
        assert found < TOLERANCE, (case, found)
    print("all views agree")


if __name__ == "__main__":
    main()
