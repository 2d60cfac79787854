"""What several devices compute, relative to one device on the whole batch: loss, length and direction of the gradient.

    pip install lightly                  # or: pip install -e '.[benchmarks]'
    python -m benchmarks.invariance      # a minute; prints a Markdown table

Every rank holds other projections (64 images in all, width 8). The gradient is with respect to the projections,
averaged over ranks as DDP averages that of the parameters. Rows that name no package are the usual ways to write it.
Writes results/benchmarks/invariance.json, or what --output names.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT, on_ranks, write_result
from simclr.distributed import gather, gather_with_grad
from simclr.losses import barlow_twins, nt_xent

IMAGES, WIDTH, TEMPERATURE, WEIGHT = 64, 8, 0.5, 5e-3
Loss = Callable[..., Tensor]


def cross_entropy(z1: Tensor, z2: Tensor, all_z1: Tensor, all_z2: Tensor, first: int) -> Tensor:
    """NT-Xent of local rows, the first of which is image ``first``, against given columns."""
    rows, columns = (F.normalize(torch.cat(pair), dim=1) for pair in ((z1, z2), (all_z1, all_z2)))
    own = first + torch.arange(len(z1))
    itself, positive = torch.cat([own, own + len(all_z1)]), torch.cat([own + len(all_z1), own])
    logits = (rows @ columns.T / TEMPERATURE).scatter(1, itself[:, None], -torch.inf)
    return F.cross_entropy(logits, positive)


def with_own_gradient(z: Tensor) -> Tensor:
    """Gather; the gradient reaches the own copy only."""
    parts = list(gather(z.detach()).chunk(dist.get_world_size()))
    parts[dist.get_rank()] = z
    return torch.cat(parts)


def without_gather(z1: Tensor, z2: Tensor) -> Tensor:
    """Each device by itself."""
    return cross_entropy(z1, z2, z1, z2, 0)


def gather_without_gradient(z1: Tensor, z2: Tensor) -> Tensor:
    """Local rows against columns without gradient."""
    return cross_entropy(z1, z2, gather(z1.detach()), gather(z2.detach()), dist.get_rank() * len(z1))


def own_gradient_whole_matrix(z1: Tensor, z2: Tensor) -> Tensor:
    """The whole matrix on each device, with gradient in the own slice."""
    all_z1, all_z2 = with_own_gradient(z1), with_own_gradient(z2)
    return cross_entropy(all_z1, all_z2, all_z1, all_z2, 0)


def barlow_from(c: Tensor) -> Tensor:
    """Barlow Twins of a cross-correlation."""
    diagonal = c.diagonal()
    return (1 - diagonal).square().sum() + WEIGHT * (c - torch.diag(diagonal)).square().sum()


def standardised(z: Tensor, over: Tensor) -> Tensor:
    """Standardise by the statistics of a batch."""
    return (z - over.mean(0)) / over.var(0, correction=0).sqrt()


def barlow_reduced_outside_autograd(z1: Tensor, z2: Tensor, *, of_whole_batch: bool) -> Tensor:
    """Sum the devices' correlations by an all_reduce that autograd does not see."""
    over = [gather_with_grad(z) if of_whole_batch else z for z in (z1, z2)]  # as SyncBatchNorm, or BatchNorm
    c = standardised(z1, over[0]).T @ standardised(z2, over[1]) / (len(z1) * dist.get_world_size())
    total = c.detach().clone()
    dist.all_reduce(total)
    return barlow_from(c + (total - c.detach()))


def theirs(module: str, name: str, **arguments: Any) -> Loss:
    """Return a loss of another package."""
    loss: Loss = getattr(importlib.import_module(module), name)(**arguments)
    return loss


def their_nt_xent() -> Loss:
    """Return lightly's."""
    return theirs("lightly.loss", "NTXentLoss", temperature=TEMPERATURE, gather_distributed=True)


def their_barlow_twins() -> Loss:
    """Return lightly's."""
    return theirs("lightly.loss", "BarlowTwinsLoss", lambda_param=WEIGHT, gather_distributed=True)


def idiom(loss: Loss, **settings: Any) -> Callable[[], Loss]:
    """Return a maker of a loss that needs no package."""
    return lambda: partial(loss, **settings)


# Method, name, maker, package that it needs
ROWS: list[tuple[str, str, Callable[[], Loss], str]] = [
    ("NT-Xent", "ours, matrix", idiom(nt_xent, temperature=TEMPERATURE, form="matrix"), ""),
    ("NT-Xent", "ours, tiled", idiom(nt_xent, temperature=TEMPERATURE, form="tiled"), ""),
    ("NT-Xent", "lightly", their_nt_xent, "lightly"),
    ("NT-Xent", "no gather", idiom(without_gather), ""),
    ("NT-Xent", "gather without gradient, local rows", idiom(gather_without_gradient), ""),
    ("NT-Xent", "gradient in the own slice, whole matrix", idiom(own_gradient_whole_matrix), ""),
    ("Barlow Twins", "ours", idiom(barlow_twins, off_diagonal_weight=WEIGHT), ""),
    ("Barlow Twins", "lightly", their_barlow_twins, "lightly"),
    (
        "Barlow Twins",
        "common statistics, all_reduce outside autograd",
        idiom(barlow_reduced_outside_autograd, of_whole_batch=True),
        "",
    ),
    (
        "Barlow Twins",
        "statistics per device, all_reduce outside autograd",
        idiom(barlow_reduced_outside_autograd, of_whole_batch=False),
        "",
    ),
]


def batch() -> tuple[Tensor, Tensor]:
    """Return both views' projections of all images."""
    common, *noise = torch.randn(3, IMAGES, WIDTH, generator=torch.Generator().manual_seed(0))
    z1, z2 = (common + part for part in noise)
    return z1, z2


def value_and_gradient(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient (2, b, d)."""
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = loss(z1, z2)
    return value.detach(), torch.stack(torch.autograd.grad(value, (z1, z2)))


def all_rows() -> list[tuple[str, str, float, Tensor]]:
    """Compute all rows on this rank's share; return mean loss, and gradient (n, 2, d), as DDP would make them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = []
    for method, name, make, package in ROWS:
        if package and importlib.util.find_spec(package) is None:
            continue
        value, gradient = value_and_gradient(make(), *(z.chunk(size)[rank] for z in batch()))
        mean, shares = gather(value.reshape(1)).mean(), gather(gradient.transpose(0, 1)) / size
        rows.append((method, name, float(mean), shares))
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "invariance.json")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()

    references = {
        method: value_and_gradient(loss, *(z.double() for z in batch()))
        for method, loss in (("NT-Xent", partial(nt_xent, temperature=TEMPERATURE)), ("Barlow Twins", barlow_twins))
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for size in options.world_sizes:
        for method, name, value, shares in on_ranks(all_rows, size):
            expected, gradient = references[method]
            mine, true = shares.double().flatten(), gradient.transpose(0, 1).flatten()
            found.setdefault((method, name), []).append(
                {
                    "devices": size,
                    "loss": value / float(expected),
                    "gradient": float(mine.norm() / true.norm()),
                    "cosine": float(F.cosine_similarity(mine, true, dim=0)),
                }
            )
    print(f"on {' / '.join(map(str, options.world_sizes))} devices, relative to one device:\n")
    print("| loss | how | loss | length of the gradient | cosine to the true gradient |\n|---|---|---|---|---|")
    for (method, name), rows in found.items():
        cells = [" / ".join(f"{row[key]:.4g}" for row in rows) for key in ("loss", "gradient", "cosine")]
        print(f"| {method} | {name} | {' | '.join(cells)} |")
    write_result(
        options.output, {"rows": [{"method": m, "name": n, "results": rows} for (m, n), rows in found.items()]}
    )
    print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    main()
