"""The figures of an evaluation. The only user of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from simclr.config import TrainConfig
from simclr.data import EpochPlan, ImageSource
from simclr.evaluation import Curve, Normalisation
from simclr.report.results import ProbeResult, ViewPairs
from simclr.views import two_views

# Okabe and Ito's palette, distinguishable with any colour vision.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
_SPLIT_COLOURS = {"train": _BLUE, "validation": _GREEN, "test": _ORANGE}
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "text.parse_math": False,  # class names may hold dollar signs
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "savefig.dpi": 150,
}
_NUM_PICTURED = 8
_MOST_NAMED_CLASSES = 20  # beyond this a cell of the confusion matrix is too small for its number


def view_pairs(source: ImageSource, run: TrainConfig, normalisation: Normalisation) -> ViewPairs:
    """Return images spread over a file, with the views that the first epoch of a pretraining makes of them."""
    facts, (mean, std) = source.facts, normalisation
    which = np.unique(np.linspace(0, facts.num_images - 1, _NUM_PICTURED).astype(np.int64))
    (batch,) = source.batches(EpochPlan(which, len(which), shuffle=False))
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


def draw_all(folder: Path, result: ProbeResult, pairs: ViewPairs, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw what a report shows as PNG files; return their names. Without metrics there is no pretraining.png."""
    with matplotlib.rc_context(_STYLE):
        figures = {
            "curves.png": draw_curves(result.curves, f"{result.classifier_name}, by epoch"),
            "confusion.png": draw_confusion(result.confusion, result.test_facts.classes),
            "pairs.png": draw_pairs(pairs),
        }
        if metrics:
            figures["pretraining.png"] = draw_pretraining(metrics, result.pretraining.loss.name)
        for name, figure in figures.items():
            figure.savefig(folder / name, metadata={"Software": None})
    return list(figures)


def draw_curves(curves: Mapping[str, Curve], title: str) -> Figure:
    """Return loss and accuracy of each split against epochs, side by side."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, quantity, subtitle, ending in (
        (loss, "loss", "Cross-entropy (nats)", "{} {:.3f}"),
        (accuracy, "accuracy", "Accuracy (%)", "{} {:.2f} %"),
    ):
        ends = []
        for name, curve in curves.items():
            values = getattr(curve, quantity)[:, 0]
            colour, style = _SPLIT_COLOURS[name], "--" if name == "validation" else "-"
            axes.plot(range(1, len(values) + 1), values, style, color=colour, marker="o" if len(values) == 1 else "")
            ends.append((float(values[-1]), ending.format(name, values[-1]), colour))
        axes.set_title(subtitle)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_ends(axes, ends)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def draw_pretraining(metrics: Sequence[Mapping[str, Any]], loss_name: str) -> Figure:
    """Return pretraining's loss, validation kNN accuracy and learning rate against epochs."""
    steps = [line for line in metrics if line["kind"] == "step" and line["loss"] is not None]
    measured = [line for line in metrics if line["kind"] == "knn" and line["knn_accuracy"] is not None]
    panels: list[tuple[str, str, list[Any]]] = [
        (f"{loss_name} loss{' (nats)' if loss_name == 'nt_xent' else ''}", "loss", steps),
        *([("kNN accuracy, validation (%)", "knn_accuracy", measured)] if measured else []),
        ("Learning rate", "learning_rate", steps),
    ]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (title, key, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        epochs, values = [line["epoch"] for line in lines], [line[key] for line in lines]
        axes.plot(epochs, values, color=_BLUE, marker="o" if len(values) < 30 else "", markersize=4)
        if key != "learning_rate" and values:
            _label_ends(axes, [(float(values[-1]), f"{values[-1]:.2f}", _BLUE)])
        axes.set_title(title)
        axes.set_xlabel("epoch")
    figure.suptitle("Pretraining", x=0.01, ha="left", fontweight="bold")
    return figure


def draw_pairs(pairs: ViewPairs) -> Figure:
    """Return a picture of images as stored (top row) and the two views that pretraining makes of each."""
    k = len(pairs.stored)
    figure = Figure(figsize=(0.6 + 1.15 * k, 3.9), layout="constrained")
    rows = {"stored": pairs.stored, "view 1": pairs.view_1, "view 2": pairs.view_2}
    grid = figure.subplots(len(rows), k, squeeze=False)
    for row_of_axes, (title, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(row_of_axes, images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.grid(visible=False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row_of_axes[0].set_ylabel(title, fontsize=11)
    for axes, name in zip(grid[0], pairs.names, strict=False):  # unlabelled images have no names
        axes.set_title(_shortened(name, 12), fontsize=10, loc="center", color=_GREY)
    return figure


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Return the confusion matrix, each row in percent of its true class, and the accuracy of each class."""
    c = len(classes)
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    is_named = c <= _MOST_NAMED_CLASSES
    size = max(3.0, 0.5 * c if is_named else 0.11 * c)
    figure = Figure(figsize=(size + 4.6, size + 1.4), layout="constrained")
    matrix, bars = figure.subplots(1, 2, width_ratios=[size, 2.6], sharey=True)
    font = 10 if is_named else 6

    matrix.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    matrix.grid(visible=False)
    matrix.set(title="Confusion (% of the true class)", xlabel="predicted", ylabel="true")
    names = [_shortened(name, 16) for name in classes]
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_named else {"rotation": 90}
    matrix.set_xticks(range(c), names, fontsize=font, **slant)
    matrix.set_yticks(range(c), names, fontsize=font)
    matrix.tick_params(length=0)
    matrix.spines[:].set_visible(False)
    if is_named:
        for i, j in np.ndindex(c, c):
            if round(percent[i, j]) >= 1:
                colour = "white" if percent[i, j] > 62 else "black"
                matrix.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=9, color=colour)

    recall = np.diag(percent)
    bars.barh(range(c), recall, color=_BLUE, height=0.7)
    bars.set(title="Accuracy of each class (%)", xlim=(0, 118), xticks=[0, 50, 100])
    bars.grid(visible=False, axis="y")
    bars.tick_params(axis="y", length=0, labelleft=False)
    for i, value in enumerate(recall):
        bars.text(value + 2, i, f"{value:.1f}", va="center", fontsize=font)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write a label (height, text, colour) at the right end of each line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    finite = sorted((end for end in ends if math.isfinite(end[0])), key=lambda end: end[0])
    places: list[float] = []
    for value, _, _ in finite:
        places.append(max(value, places[-1] + gap) if places else value)
    excess = sum(place - value for place, (value, _, _) in zip(places, finite, strict=True)) / max(1, len(finite))
    for place, (_, text, colour) in zip(places, finite, strict=True):
        axes.annotate(
            text,
            xy=(1.0, place - excess),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=10,
            annotation_clip=False,
        )


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
