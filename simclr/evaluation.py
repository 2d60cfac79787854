"""How good a representation is: its features, k nearest neighbours, and a linear classifier on top.

Shape letters: n images asked for, m rows, D representation width, c classes, g candidates trained at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from simclr import distributed
from simclr.data import EpochPlan
from simclr.views import plain_view

if TYPE_CHECKING:
    from simclr.data import Batch, ImageSource

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

# Bounds the similarity matrix that kNN holds at a time, in elements: 64 MiB in float32.
_SIMILARITIES_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class Features:
    """Representations of images, with what they are measured against.

    Attributes:
        representation: float32 or float64 (m, D).
        label: int64 (m,), on the same device.
        index: int64 (m,), on the same device: place of each image in its file.
    """

    representation: Tensor
    label: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def rows(self, which: NDArray[np.int64]) -> Features:
        """Return the features at the given rows, in that order."""
        at = torch.from_numpy(which).to(self.label.device)
        return Features(self.representation[at], self.label[at], self.index[at])


# ---------------------------------------------------------------------------------------------------------------
# Features


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode; afterwards give each of its parts the mode that it had, mixed modes included."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def extract_features(
    encoder: nn.Module,
    source: ImageSource,
    indices: NDArray[np.int64],
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    world_size: int = 1,
    rank: int = 0,
    normalisation: Normalisation | None = None,
) -> Features:
    """Encode images as they are, without augmentation, in eval mode and without gradients.

    Every image is encoded once, by one rank, and every rank receives all features: none is dropped to make
    batches even, and the result does not depend on ``world_size`` beyond rounding (kernels may sum in another
    order for another batch size). The encoder's training mode is restored.

    Args:
        encoder: (b, 3, H, W) -> (b, D), on ``device``.
        source: Images.
        indices: Which images, int64 (n,).
        batch_size: Images at a time per rank. Changes speed, not results.
        device: Where to compute, and where the features are returned.
        dtype: Of the forward pass: float32, or bfloat16 / float16 for autocast.
        world_size: Number of ranks that share the work.
        rank: This rank.
        normalisation: Per-channel (mean, std) on the scale where 255 is 1. Default: the source's own, which is
            right for training images only; test images take the training images'.

    Returns:
        Features of all n images in the order of ``indices``, float32, on every rank.

    Raises:
        ValueError: If there are no indices, or a representation is not finite.

    Note:
        Collective call if ``world_size`` > 1: every rank must make it, with the same indices.
    """
    n = len(indices)
    if n == 0:
        raise ValueError("no images to extract features of: indices is empty")
    mean, std = source.facts.normalisation if normalisation is None else normalisation
    if n < world_size:  # too few to share: every rank encodes them all
        world_size, rank = 1, 0
    own = indices[rank * n // world_size : (rank + 1) * n // world_size]
    representations, labels, seen = [], [], []
    device_type = torch.device(device).type
    with evaluating(encoder), torch.inference_mode():
        for batch in _in_order(source, own, batch_size):
            image = plain_view(batch.image.to(device, non_blocking=True), mean=mean, std=std)
            with torch.autocast(device_type, dtype, enabled=dtype != torch.float32):
                representations.append(encoder(image).float())
            labels.append(batch.label.to(device))
            seen.append(batch.index.to(device))
    # Concatenated outside inference mode, whose tensors a later autograd computation would refuse.
    representation, label, index = torch.cat(representations), torch.cat(labels), torch.cat(seen)
    if world_size > 1:
        assert distributed.world_size() == world_size, (distributed.world_size(), world_size)
        representation, label, index = (distributed.gather_variable(part) for part in (representation, label, index))
    assert np.array_equal(index.cpu().numpy(), indices), "the source returned other images than asked for"
    if not bool(representation.isfinite().all()):
        bad = int((~representation.isfinite().all(dim=1)).sum())
        raise ValueError(f"{bad} of {n} representations are not finite: the encoder's weights have diverged")
    return Features(representation, label, index)


def raw_pixel_features(
    source: ImageSource,
    indices: NDArray[np.int64],
    *,
    normalisation: Normalisation | None = None,
    centre: Tensor | None = None,
) -> Features:
    """Return the pixels themselves as features, the baseline that any encoder should pass.

    Args:
        source: Images.
        indices: Which images, int64 (n,).
        normalisation: As :func:`extract_features`.
        centre: Mean training image to subtract, float32 (D,), as :func:`mean_image` returns it; None for none.

    Returns:
        Features on the CPU: float32 (n, 3 * H * W), channels first, less the channel mean, over the channel
        standard deviation, less ``centre``.
    """
    mean, std = source.facts.normalisation if normalisation is None else normalisation
    pixels, labels, seen = [], [], []
    for batch in _in_order(source, indices, 512):
        rows = plain_view(batch.image, mean=mean, std=std).contiguous().flatten(1)
        pixels.append(rows if centre is None else rows - centre)
        labels.append(batch.label)
        seen.append(batch.index)
    return Features(torch.cat(pixels), torch.cat(labels), torch.cat(seen))


def mean_image(features: Features) -> Tensor:
    """Return the mean of raw pixel features, float32 (D,), summed in float64."""
    return features.representation.double().mean(dim=0).float()


def _in_order(source: ImageSource, indices: NDArray[np.int64], batch_size: int) -> Iterator[Batch]:
    plan = EpochPlan(indices=indices, global_batch_size=batch_size, shuffle=False, drop_last=False)
    return source.batches(plan)


# ---------------------------------------------------------------------------------------------------------------
# k nearest neighbours


def knn_predict(
    bank: Features, queries: Features, *, k: int = 20, temperature: float = 0.1, num_classes: int
) -> Tensor:
    """Classify by the k nearest neighbours of each query, weighted by similarity.

    A neighbour with cosine similarity s votes for its label with weight exp(s / temperature). Computed in the
    dtype of the features, for a block of queries at a time.

    Args:
        bank: Labelled features (m, D).
        queries: Features (q, D); their labels are not looked at.
        k: Number of neighbours, at most m.
        temperature: > 0, unitless.
        num_classes: c; labels of the bank lie in [0, c).

    Returns:
        Predicted labels, int64 (q,).

    Raises:
        ValueError: If k, the temperature or a label of the bank is out of range, or the widths differ.

    Source:
        Wu et al. 2018, arXiv:1805.01978, section 3.4; k = 200 and temperature 0.07 there.
    """
    _require_labels(bank, num_classes, "the bank")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, expected 1 to {len(bank)}, the number of images in the bank")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    if bank.representation.shape[1] != queries.representation.shape[1]:
        raise ValueError(
            f"the bank's features have width {bank.representation.shape[1]}, "
            f"the queries' have {queries.representation.shape[1]}"
        )
    bank_rows = F.normalize(bank.representation, dim=1)
    predictions = []
    for block in queries.representation.split(max(1, _SIMILARITIES_AT_ONCE // len(bank))):
        similarity, neighbour = (F.normalize(block, dim=1) @ bank_rows.T).topk(k, dim=1)
        weight = (similarity / temperature).exp()
        votes = weight.new_zeros(len(block), num_classes).scatter_add_(1, bank.label[neighbour], weight)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    bank: Features, queries: Features, *, k: int = 20, temperature: float = 0.1, num_classes: int
) -> float:
    """Return the percentage of queries that :func:`knn_predict` classifies rightly. Arguments and errors as there."""
    _require_labels(queries, num_classes, "the queries")
    predicted = knn_predict(bank, queries, k=k, temperature=temperature, num_classes=num_classes)
    return percent_equal(predicted, queries.label)


def percent_equal(predicted: Tensor, label: Tensor) -> float:
    """Return how many entries are equal, in percent."""
    return 100 * int((predicted == label).sum()) / len(label)


def _require_labels(features: Features, num_classes: int, what: str) -> None:
    low, high = int(features.label.min()), int(features.label.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{what} holds labels from {low} to {high}, expected 0 to {num_classes - 1}; "
            "images without a label (-1) cannot be measured"
        )
