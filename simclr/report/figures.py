"""The figures of an evaluation, on white, which is read on dark pages too. The only user of matplotlib.

Each figure is one or several panels of the same width: beside each other on a wide page, below each other on a narrow
one, so that their text is read on both.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from simclr.evaluation import Curve
from simclr.report.pictures import Map, Neighbours, Pictures, ViewPairs
from simclr.report.results import ProbeResult

PANEL_WIDTH = 4.8  # in inches
MOST_NAMED_CLASSES = 20  # beyond this a cell of the confusion matrix is too small for its number
MOST_IN_LEGEND = 100


TEXT, MUTED, GRID = "#1a1a1a", "#555555", "#e3e3e3"
# Okabe and Ito's colours, distinguishable with any colour vision
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
COLOUR_OF = {"train": BLUE, "validation": GREEN, "test": ORANGE}
OTHER_SCRIPTS = ("Noto Sans", "Arial Unicode", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI")
"""How families are called that have the characters of class names which DejaVu Sans lacks."""


@dataclass(frozen=True)
class Panel:
    """A part of a figure, as PNG."""

    name: str
    """Of the file, without its ending."""
    title: str
    """What it shows, for those who do not see it."""
    png: bytes


# By the file's name: the title, and what draws it
Drawings = dict[str, tuple[str, Callable[[], Figure]]]


def style() -> dict[str, Any]:
    """Return matplotlib's settings."""
    return {
        "font.family": [
            "DejaVu Sans",
            *(n for n in sorted(font_manager.get_font_names()) if n.startswith(OTHER_SCRIPTS)),
        ],
        "font.size": 10,
        "text.parse_math": False,  # class names may hold dollar signs
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "savefig.dpi": 160,
        "grid.color": GRID,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), TEXT),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    }


def draw(drawings: Drawings) -> list[Panel]:
    """Draw panels, by name."""

    def png(make: Callable[[], Figure]) -> bytes:
        file = io.BytesIO()
        make().savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()

    with matplotlib.rc_context(style()):  # type: ignore[arg-type, unused-ignore]
        return [Panel(name, title, png(make)) for name, (title, make) in drawings.items()]


def draw_all(result: ProbeResult, pictures: Pictures, metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Panel]]:
    """Draw what a report shows, by figure. Without metrics there is no "pretraining", without a map no "map"."""
    names = result.test_facts.classes
    drawings = {
        "curves": curves_drawings(result.curves),
        "confusion": confusion_drawings(result.confusion, names),
        "pairs": pairs_drawings(pictures.pairs),
        "neighbours": neighbours_drawings(pictures.neighbours, names),
    }
    if metrics:
        drawings["pretraining"] = pretraining_drawings(metrics, result.pretraining.loss.name)
    if (points := pictures.map) is not None:
        drawings["map"] = {"map": ("Map of test images", lambda: draw_map(points, names))}
    return {name: draw(panels) for name, panels in drawings.items()}


def curves_drawings(curves: Mapping[str, Curve]) -> Drawings:
    """Return loss and accuracy of each split against epochs."""

    def panel(quantity: str, title: str, ending: str) -> Figure:
        figure, axes = panel_figure(title)
        for name, curve in curves.items():
            values = getattr(curve, quantity)[:, 0]
            colour, stroke = COLOUR_OF[name], "--" if name == "validation" else "-"
            marker, label = "o" if len(values) == 1 else "", ending.format(name, values[-1])
            axes.plot(range(1, len(values) + 1), values, stroke, color=colour, marker=marker, label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return figure

    loss, accuracy = "Cross-entropy (nats)", "Accuracy (%)"
    return {
        "curves-loss": (loss, lambda: panel("loss", loss, "{} {:.3f}")),
        "curves-accuracy": (accuracy, lambda: panel("accuracy", accuracy, "{} {:.2f}")),
    }


_COLLAPSE = {"positive_similarity": "similarity of views", "projection_spread": "spread"}


def pretraining_drawings(metrics: Sequence[Mapping[str, Any]], loss_name: str) -> Drawings:
    """Return what pretraining measured against epochs: as much of it as the lines have."""
    loss = f"{loss_name} loss{' (nats)' if loss_name == 'nt_xent' else ''}"
    shown = [
        ("loss", loss, "step", {"loss": ""}),
        ("knn", "kNN accuracy, validation (%)", "knn", {"knn_accuracy": ""}),
        ("collapse", "Collapse measures (0: all projections alike)", "step", _COLLAPSE),
        ("gradient", "Gradient norm, largest since the line before", "step", {"gradient_norm": ""}),
        ("speed", "Images per second", "step", {"images_per_second": ""}),
        ("rate", "Learning rate", "step", {"learning_rate": ""}),
    ]

    def panel(title: str, kind: str, series: Mapping[str, str]) -> Figure:
        figure, axes = panel_figure(title)
        for (key, label), colour in zip(series.items(), (BLUE, ORANGE), strict=False):
            epochs, values = measured(metrics, kind, key)
            last = f"{values[-1]:,.0f}" if values[-1] >= 100 else f"{values[-1]:.3g}"
            marker = "o" if len(values) < 30 else ""
            axes.plot(
                epochs, values, color=colour, marker=marker, markersize=4, label=f"{label or 'at the end'} {last}"
            )
        if kind == "step" and "images_per_second" in series:
            axes.set_ylim(bottom=0)
        axes.legend()
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=epochs[-1] >= 3))
        return figure

    drawings: Drawings = {}
    for name, title, kind, wanted in shown:
        series = {key: label for key, label in wanted.items() if measured(metrics, kind, key)[1]}
        if series:
            drawn = partial(panel, title=title, kind=kind, series=series)
            drawings[f"pretraining-{name}"] = title, drawn
    return drawings


def measured(metrics: Sequence[Mapping[str, Any]], kind: str, key: str) -> tuple[list[float], list[float]]:
    """Return the epochs at which a number was measured, and the numbers."""
    lines = [line for line in metrics if line["kind"] == kind and line.get(key) is not None]
    return [line["epoch"] for line in lines], [line[key] for line in lines]


def pairs_drawings(pairs: ViewPairs) -> Drawings:
    """Return images as stored (top row) and the two views that pretraining makes of each; four to a panel."""
    rows = {"stored": pairs.stored, "view 1": pairs.view_1, "view 2": pairs.view_2}

    def panel(start: int) -> Figure:
        four = slice(start, start + 4)
        tiles = [[Tile(image) for image in images[four]] for images in rows.values()]
        for tile, name in zip(tiles[0], pairs.names[four], strict=False):  # no names of unlabelled images
            tile.title = name
        return draw_tiles(tiles, 4, list(rows))

    title = "Images, and two views of each"
    starts = range(0, len(pairs.stored), 4)
    return {f"pairs-{start // 4 + 1}": (title, partial(panel, start=start)) for start in starts}


def neighbours_drawings(found: Neighbours, names: Sequence[str]) -> Drawings:
    """Return test images (left) with the training images nearest to them; four to a panel."""

    def row(i: int) -> list[Tile]:
        own = found.query_label[i]
        tiles = [Tile(found.query[i], names[own], TEXT)]
        for image, label in zip(found.neighbour[i], found.neighbour_label[i], strict=True):
            if label == own:
                tiles.append(Tile(image, "✓", GREEN, is_framed=True))
            else:
                tiles.append(Tile(image, f"✗ {names[label]}", ORANGE, is_framed=True))
        return tiles

    def panel(start: int) -> Figure:
        rows = [row(i) for i in range(start, min(start + 4, len(found.query)))]
        return draw_tiles(rows, 1 + found.neighbour.shape[1])

    title = "Test images, and their nearest training images"
    starts = range(0, len(found.query), 4)
    return {f"neighbours-{start // 4 + 1}": (title, partial(panel, start=start)) for start in starts}


@dataclass
class Tile:
    """An image among others."""

    image: NDArray[np.uint8]
    title: str = ""
    colour: str | None = None
    """Of title and frame; None: muted."""
    is_framed: bool = False


def draw_tiles(rows: Sequence[Sequence[Tile]], columns: int, labels: Sequence[str] = ()) -> Figure:
    """Return images in rows of so many columns, titles above them, and labels of the rows at the left.

    All are drawn in the same axes, whose units are inches: matplotlib takes 20 ms for each axes.
    """
    left, gap, above = 0.25 if labels else 0.0, 0.08, 0.2
    side = (PANEL_WIDTH - left) / columns - gap
    heights = [gap + side + (above if any(tile.title for tile in row) else 0) for row in rows]
    figure = Figure(figsize=(PANEL_WIDTH, sum(heights)))
    axes = figure.add_axes((0, 0, 1, 1))
    bare(axes)
    bottom = 0.0
    for number, row in enumerate(rows):
        bottom += heights[number]
        if labels:
            axes.text(left / 2, bottom - side / 2, labels[number], rotation=90, ha="center", va="center")
        for column, tile in enumerate(row):
            x, colour = left + gap / 2 + column * (side + gap), tile.colour or MUTED
            height, width = (side * length / max(tile.image.shape[:2]) for length in tile.image.shape[:2])
            axes.imshow(tile.image, interpolation="nearest", extent=(x, x + width, bottom, bottom - height))
            if tile.is_framed:
                axes.add_patch(Rectangle((x, bottom), width, -height, fill=False, color=colour, linewidth=2.5))
            title = axes.text(x, bottom - side - 0.05, tile.title, fontsize=9 if columns <= 4 else 8, color=colour)
            longest = width_of(tile.title)
            while longest > 2 and title.get_window_extent().width > (side + gap / 2) * figure.dpi:
                longest -= 1
                title.set_text(shortened(tile.title, longest))
    axes.set(xlim=(0, PANEL_WIDTH), ylim=(bottom + gap / 2, 0), aspect="auto")
    return figure


_MARKERS = "os^DvPX*<>"
_TEN_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined, unused-ignore]


def draw_map(points: Map, names: Sequence[str]) -> Figure:
    """Return points coloured by class, ten colours times ten markers, with a legend of up to 100 classes below."""
    c = len(names)
    has_legend = c <= MOST_IN_LEGEND
    columns, longest = min(3, c), 19
    rows = math.ceil(c / columns) if has_legend else 0
    figure = Figure(figsize=(PANEL_WIDTH, 4.6 + 0.165 * rows), layout="constrained")
    axes = figure.subplots()
    for k in range(c):
        own = points.position[points.label == k]
        axes.scatter(
            own[:, 0],
            own[:, 1],
            s=13 if c <= 10 else 16,
            marker=_MARKERS[k // 10 % len(_MARKERS)],
            color=_TEN_COLOURS[k % 10],
            linewidths=0,
            alpha=0.85,
            label=legend_text(names[k], longest),
        )
    bare(axes)
    axes.spines[:].set(visible=True, color=GRID)
    if has_legend:
        figure.legend(
            loc="outside lower left",
            ncols=columns,
            fontsize=8,
            markerscale=1.6,
            handletextpad=0.1,
            columnspacing=0.8,
            labelspacing=0.25,
            borderpad=0,
        )
    return figure


@dataclass(frozen=True)
class Band:
    """A line, and the range around it."""

    label: str
    look: int
    """Number of its colour and stroke, the same in every panel."""
    places: Sequence[float]
    mean: Sequence[float]
    least: Sequence[float]
    largest: Sequence[float]


def draw_bands(bands: Sequence[Band], title: str, against: str) -> Figure:
    """Return lines with their ranges, and a legend below."""
    figure, axes = panel_figure(title, 3.0 + 0.2 * len(bands))
    colours = [BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#8888DD"]
    looks = [(colour, stroke) for stroke in ("-", "--", ":", "-.") for colour in colours]
    for band in bands:
        colour, stroke = looks[band.look % len(looks)]
        marker = "o" if len(band.places) < 30 else ""
        axes.plot(
            band.places, band.mean, stroke, color=colour, marker=marker, markersize=4, label=legend_text(band.label, 60)
        )
        if list(band.least) != list(band.largest):
            axes.fill_between(band.places, band.least, band.largest, color=colour, alpha=0.25, linewidth=0)
    axes.set_xlabel(against)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    figure.legend(loc="outside lower left", borderpad=0)
    return figure


def confusion_drawings(confusion: NDArray[np.int64], names: Sequence[str]) -> Drawings:
    """Return the confusion matrix, each row in percent of its true class, and up to 20 classes' accuracies."""
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    drawings: Drawings = {
        "confusion": ("Confusion matrix", lambda: draw_confusion(percent, names)),
    }
    if len(names) <= MOST_NAMED_CLASSES:
        drawings["classes"] = ("Accuracy of each class", lambda: draw_recall(np.diag(percent), names))
    return drawings


def draw_confusion(percent: NDArray[np.float64], names: Sequence[str]) -> Figure:
    """Return the confusion matrix in percent; with names and numbers up to 20 classes."""
    c = len(names)
    figure = Figure(figsize=(PANEL_WIDTH, PANEL_WIDTH), layout="constrained")
    axes = figure.subplots()
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="equal")
    axes.grid(visible=False)
    axes.set(title="Confusion (% of the true class)", xlabel="predicted", ylabel="true")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if c > MOST_NAMED_CLASSES:
        return figure
    font = 8 if c <= 12 else 6
    written = [shortened(name, 12) for name in names]
    axes.set_xticks(range(c), written, fontsize=font, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(c), written, fontsize=font)
    for i, j in np.ndindex(c, c):
        value = float(percent[i, j])
        if round(value) >= 1:
            colour = "white" if value > 55 else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=font, color=colour)
    return figure


def draw_recall(recall: NDArray[np.float64], names: Sequence[str]) -> Figure:
    """Return the accuracy of each class as bars."""
    c = len(names)
    figure = Figure(figsize=(PANEL_WIDTH, max(1.6, min(PANEL_WIDTH, 0.8 + 0.36 * c))), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(c), recall, color=BLUE, height=0.7)
    axes.set(title="Accuracy of each class (%)", xlim=(0, 112), xticks=[0, 50, 100])
    axes.grid(visible=False, axis="y")
    font = 9 if c <= 12 else 8
    axes.set_yticks(range(c), [shortened(name, 18) for name in names], fontsize=font)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for i, value in enumerate(recall):
        axes.text(value + 1.5, i, f"{value:.1f}", va="center", fontsize=font)
    return figure


# ---------------------------------------------------------------------------------------------------------------
# Parts


def panel_figure(title: str, height: float = 3.0) -> tuple[Figure, Axes]:
    """Return an empty panel of the usual width."""
    figure = Figure(figsize=(PANEL_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def bare(axes: Axes) -> None:
    """Leave nothing of axes but what is drawn in them."""
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def legend_text(text: str, longest: int) -> str:
    """Return a text for a legend; matplotlib passes over those that begin with an underscore."""
    return f" {shortened(text, longest)}" if text.startswith("_") else shortened(text, longest)


def shortened(text: str, longest: int) -> str:
    """Return a text of at most so many columns, with … for what was left out."""
    if width_of(text) <= longest:
        return text
    kept = text
    while width_of(kept) > longest - 1:
        kept = kept[:-1]
    return kept + "…"


def width_of(text: str) -> int:
    """Return how many columns a text takes: two for each wide character, such as a Chinese one."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
