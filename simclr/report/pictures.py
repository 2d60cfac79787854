"""What a report shows beside its numbers: augmented pairs, nearest neighbours, a map. The only user of scikit-learn."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr.config import TrainConfig
from simclr.data import EpochPlan
from simclr.unit_length import unit_rows
from simclr.views import two_views

if TYPE_CHECKING:
    from simclr.data import Batch, ImageSource
    from simclr.evaluation import Features, Normalisation

NUM_PAIRS = 8
NUM_QUERIES, NUM_NEIGHBOURS = 8, 5
LEAST_MAPPED = 10  # fewer points are no map
PERPLEXITY = 30.0
MAP_ITERATIONS = 500  # half of scikit-learn's 1,000, for half of the time


@dataclass(frozen=True, eq=False)
class ViewPairs:
    """Some images and two views of each.

    Attributes:
        stored: uint8 (k, H, W, 3).
        view_1: uint8 (k, S, S, 3).
        view_2: uint8 (k, S, S, 3).
        names: Class names, k of them; empty for unlabelled images.
    """

    stored: NDArray[np.uint8]
    view_1: NDArray[np.uint8]
    view_2: NDArray[np.uint8]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Some test images and the training images whose representations are nearest to theirs.

    Attributes:
        query: uint8 (q, H, W, 3).
        query_label: int64 (q,).
        neighbour: uint8 (q, k, H, W, 3), the nearest first.
        neighbour_label: int64 (q, k).
        similarity: float (q, k), cosine.
    """

    query: NDArray[np.uint8]
    query_label: NDArray[np.int64]
    neighbour: NDArray[np.uint8]
    neighbour_label: NDArray[np.int64]
    similarity: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Map:
    """Test images laid out in two dimensions so that near ones stay near: t-SNE.

    Attributes:
        position: float (m, 2), without a unit.
        label: int64 (m,).
        num_images: Of the test file.
        perplexity: Of t-SNE.
        iterations: Of t-SNE.
        seed: Draws the images, and t-SNE's random numbers.
        trustworthiness: 1 if each image's 10 nearest on the map are near it in the representation, too; about 0.5 by
            chance (Venna and Kaski 2001).
        seconds: What it took.
    """

    position: NDArray[np.float64]
    label: NDArray[np.int64]
    num_images: int
    perplexity: float
    iterations: int
    seed: int
    trustworthiness: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Pictures:
    """All that a report shows beside its numbers."""

    pairs: ViewPairs
    neighbours: Neighbours
    map: Map | None

    @property
    def seconds(self) -> dict[str, float]:
        """What took long."""
        return {} if self.map is None else {"map": self.map.seconds}


def view_pairs(source: ImageSource, run: TrainConfig, normalisation: Normalisation) -> ViewPairs:
    """Return images spread over a file, with the views that the first epoch of a pretraining makes of them."""
    facts, (mean, std) = source.facts, normalisation
    batch = _read(source, np.unique(np.linspace(0, facts.num_images - 1, NUM_PAIRS).astype(np.int64)))
    views = two_views(
        batch.image,
        batch.index,
        run.view_1,
        run.view_2,
        seed=run.seed,
        epoch=0,
        size=facts.height,
        mean=mean,
        std=std,
        augmentation=run.augmentation,
    )

    def pixels(view: Tensor) -> NDArray[np.uint8]:
        scaled = view.cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        array: NDArray[np.uint8] = (255 * scaled).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return array

    names = tuple(facts.classes[label] if label >= 0 else "no label" for label in batch.label.tolist())
    return ViewPairs(batch.image.cpu().numpy(), pixels(views[0]), pixels(views[1]), names)


def find_neighbours(
    train: ImageSource, test: ImageSource, train_features: Features, test_features: Features, *, seed: int
) -> Neighbours:
    """Return test images, drawn by the seed, and the training images nearest to them by cosine similarity.

    Args:
        train: Where the pixels of training images are.
        test: Where those of test images are.
        train_features: Of all training images, in the file's order.
        test_features: Of all test images, in the file's order.
        seed: Draws the test images; nothing else does, such as how well their neighbours look.
    """
    drawn = _draw(len(test_features), NUM_QUERIES, seed)
    queries = test_features.rows(drawn)
    similarities = unit_rows(queries.representation) @ unit_rows(train_features.representation).T
    similarity, nearest = similarities.topk(min(NUM_NEIGHBOURS, len(train_features)), dim=1)
    found = train_features.index[nearest].cpu().numpy()
    places, where = np.unique(found, return_inverse=True)  # an image may be near to several
    return Neighbours(
        query=_read(test, drawn).image.cpu().numpy(),
        query_label=queries.label.cpu().numpy(),
        neighbour=_read(train, places).image.cpu().numpy()[where.reshape(found.shape)],
        neighbour_label=train_features.label[nearest].cpu().numpy(),
        similarity=similarity.double().cpu().numpy(),
    )


def make_map(features: Features, *, at_most: int, seed: int) -> Map | None:
    """Lay out images in two dimensions by t-SNE (van der Maaten and Hinton 2008) of their unit-length representations.

    Args:
        features: Of all test images.
        at_most: How many of them; the time grows somewhat faster than their number.
        seed: Draws them.

    Returns:
        The map; None if it would have fewer than 10 points.
    """
    if min(at_most, len(features)) < LEAST_MAPPED:
        return None
    # A second, which nothing else has to wait for
    from sklearn.manifold import TSNE, trustworthiness
    from threadpoolctl import threadpool_limits

    started = time.perf_counter()
    drawn = features.rows(_draw(len(features), at_most, seed))
    rows = unit_rows(drawn.representation.double()).cpu().numpy()
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    layout = TSNE(perplexity=perplexity, max_iter=MAP_ITERATIONS, init="pca", random_state=seed % 2**32)
    with threadpool_limits(1):  # the same map on any machine; more threads wait for each other, on busy cores for long
        position = layout.fit_transform(rows)
    return Map(
        position=position,
        label=drawn.label.cpu().numpy(),
        num_images=len(features),
        perplexity=perplexity,
        iterations=MAP_ITERATIONS,
        seed=seed,
        trustworthiness=float(trustworthiness(rows, position, n_neighbors=min(10, len(rows) // 2 - 1))),
        seconds=time.perf_counter() - started,
    )


def _draw(n: int, at_most: int, seed: int) -> NDArray[np.int64]:
    """Return some of the numbers below n, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:at_most]).astype(np.int64)


def _read(source: ImageSource, which: NDArray[np.int64]) -> Batch:
    """Return images of a file, in the order given."""
    (batch,) = source.batches(EpochPlan(which, len(which), shuffle=False))
    return batch
