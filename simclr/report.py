"""Figures and the report of an evaluation, as Markdown and as one HTML file. The only matplotlib user.

A report is a list of blocks (headings, paragraphs, tables, figures), written once and rendered twice.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from simclr.beton import Facts
from simclr.checkpoint import CLASSIFIER
from simclr.config import ProbeConfig, TrainConfig, to_json
from simclr.evaluation import Candidate, Curve
from simclr.runlog import write_json
from simclr.views import describe, say_view_stages

MARKDOWN, HTML, RESULT = "report.md", "report.html", "probe.json"

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
_MOST_NAMED_CLASSES = 20  # beyond this a cell of the confusion matrix is too small for its number

METHODS = {"nt_xent": "SimCLR", "barlow_twins": "Barlow Twins"}
CLASSIFIERS = {"linear": "linear classifier", "finetune": "fine-tuned"}


@dataclass(frozen=True)
class Scores:
    """What a classifier reaches: accuracy in percent and mean cross-entropy in nats."""

    train: float
    validation: float
    """Of a classifier that was not fitted on the validation images."""
    test: float
    train_loss: float
    validation_loss: float
    test_loss: float
    chosen: Candidate


@dataclass(frozen=True)
class Row:
    """One representation, measured. Accuracies in percent."""

    name: str
    width: int
    knn_validation: float
    knn_test: float
    classifier: Scores | None
    seconds: float


@dataclass(frozen=True)
class Trial:
    """One candidate, measured on the validation images after the last epoch."""

    candidate: Candidate
    accuracy: float
    loss: float


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Everything that an evaluation found out; ``probe.json`` holds it."""

    config: ProbeConfig
    environment: Mapping[str, Any]
    checkpoint: Path
    pretraining: TrainConfig
    pretraining_step: int
    pretraining_epoch: int
    pretraining_knn: float | None
    pretraining_manifest: Mapping[str, Any] | None
    """The run folder's manifest.json; None if the checkpoint lies elsewhere."""
    pretraining_facts: Facts
    train_path: Path
    test_path: Path
    train_facts: Facts
    test_facts: Facts
    num_fit: int
    """Images of the training file that candidates were fitted on; the validation images are the others."""
    rows: tuple[Row, ...]
    """The pretrained encoder stands last."""
    trials: tuple[Trial, ...]
    curves: Mapping[str, Curve]
    """Of the pretrained encoder's classifier, g = 1. validation: of the fit that was chosen."""
    confusion: NDArray[np.int64]
    """Of the test images, (true class, predicted class)."""
    chance: float
    """Test accuracy of naming the most frequent training class always, in percent."""
    encoder_sha256: str | None
    """Over the frozen encoder's weights and buffers, before and after; None where it was trained."""
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> Row:
        """The pretrained encoder's row."""
        return self.rows[-1]

    @property
    def scores(self) -> Scores:
        """The pretrained encoder's classifier."""
        assert self.rows[-1].classifier is not None
        return self.rows[-1].classifier

    @property
    def chosen(self) -> Candidate:
        """The hyperparameters chosen for the pretrained encoder."""
        return self.scores.chosen


@dataclass(frozen=True, eq=False)
class ViewPairs:
    """Some images and two views of each, for a picture.

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


def write_report(folder: Path, result: ProbeResult, pairs: ViewPairs, metrics: Sequence[Mapping[str, Any]]) -> Path:
    """Write the figures, ``probe.json``, ``report.md`` and ``report.html``.

    Args:
        folder: Where to; exists.
        result: What was measured.
        pairs: Images for the picture of augmented pairs.
        metrics: The pretraining's metric lines; empty if they are not at hand.

    Returns:
        The HTML file. It holds its figures and refers to nothing outside itself.
    """
    with matplotlib.rc_context(_STYLE):
        figures = {
            "curves": draw_curves(result.curves, CLASSIFIERS[result.config.mode]),
            "confusion": draw_confusion(result.confusion, result.test_facts.classes),
            "pairs": draw_pairs(pairs),
        }
        if metrics:
            figures["pretraining"] = draw_pretraining(metrics, result.pretraining.loss.name)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    write_json(folder / RESULT, to_plain(result))
    blocks = _blocks(result, set(figures))
    (folder / MARKDOWN).write_text(render_markdown(blocks), encoding="utf-8")
    (folder / HTML).write_text(render_html(blocks, folder), encoding="utf-8")
    return folder / HTML


def to_plain(result: ProbeResult) -> dict[str, Any]:
    """Return the result as what JSON can hold; numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, ProbeConfig | TrainConfig | Facts):
            return json.loads(to_json(value))
        if isinstance(value, Candidate):
            return value._asdict()
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, np.ndarray):
            return plain(value.tolist())
        if isinstance(value, Mapping):
            return {str(name): plain(entry) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return value if isinstance(value, int | str | None) else str(value)

    entries: dict[str, Any] = plain(result)
    return {"schema": 1, "test_accuracy": result.scores.test, **entries}


def summary(result: ProbeResult) -> str:
    """Return the table of results as text for a terminal."""
    header, rows = _results(result)
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------
# Figures


def draw_curves(curves: Mapping[str, Curve], classifier: str) -> Figure:
    """Return loss and accuracy of each split against epochs, side by side."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, quantity, unit in ((loss, "loss", "nats"), (accuracy, "accuracy", "%")):
        ends = []
        for name, curve in curves.items():
            values = getattr(curve, quantity)[:, 0]
            epochs = np.arange(1, len(values) + 1)
            colour, style = _SPLIT_COLOURS[name], "--" if name == "validation" else "-"
            axes.plot(epochs, values, style, color=colour, marker="o" if len(values) == 1 else "")
            ends.append(
                (
                    float(values[-1]),
                    f"{name} {values[-1]:.3f}" if unit == "nats" else f"{name} {values[-1]:.2f} %",
                    colour,
                )
            )
        axes.set_title(f"{'Cross-entropy' if quantity == 'loss' else 'Accuracy'} ({unit})")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_ends(axes, ends)
    figure.suptitle(f"{classifier.capitalize()}, by epoch", x=0.01, ha="left", fontweight="bold")
    return figure


def draw_pretraining(metrics: Sequence[Mapping[str, Any]], loss_name: str) -> Figure:
    """Return pretraining's loss, validation kNN accuracy and learning rate against epochs."""
    steps = [line for line in metrics if line["kind"] == "step" and line["loss"] is not None]
    measured = [line for line in metrics if line["kind"] == "knn" and line["knn_accuracy"] is not None]
    unit = " (nats)" if loss_name == "nt_xent" else ""
    panels: list[tuple[str, str, list[Any]]] = [(f"{loss_name} loss{unit}", "loss", steps)]
    if measured:
        panels.append(("kNN accuracy, validation (%)", "knn_accuracy", measured))
    panels.append(("Learning rate", "learning_rate", steps))
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (title, key, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
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
    grid = figure.subplots(3, k, squeeze=False)
    for row, (title, images) in enumerate(
        (("stored", pairs.stored), ("view 1", pairs.view_1), ("view 2", pairs.view_2))
    ):
        for column, image in enumerate(images):
            axes = grid[row, column]
            axes.imshow(image, interpolation="nearest")
            axes.grid(visible=False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0 and pairs.names:
                axes.set_title(_shortened(pairs.names[column], 12), fontsize=10, loc="center", color=_GREY)
        grid[row, 0].set_ylabel(title, fontsize=11)
    return figure


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Return the confusion matrix, each row in percent of its true class, and the accuracy of each class."""
    c = len(classes)
    totals = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    percent = 100 * confusion / totals
    named = c <= _MOST_NAMED_CLASSES
    size = max(3.0, 0.5 * c if named else 0.11 * c)
    figure = Figure(figsize=(size + 4.6, size + 1.4), layout="constrained")
    matrix, bars = figure.subplots(1, 2, width_ratios=[size, 2.6], sharey=True)
    font = 10 if named else 6

    matrix.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    matrix.grid(visible=False)
    matrix.set_title("Confusion (% of the true class)")
    matrix.set_xlabel("predicted")
    matrix.set_ylabel("true")
    names = [_shortened(name, 16) for name in classes]
    matrix.set_xticks(
        range(c),
        names,
        rotation=90 if not named else 45,
        ha="center" if not named else "right",
        rotation_mode="default" if not named else "anchor",
        fontsize=font,
    )
    matrix.set_yticks(range(c), names, fontsize=font)
    matrix.tick_params(length=0)
    matrix.spines[:].set_visible(False)
    if named:
        for i, j in np.ndindex(c, c):
            if round(percent[i, j]) >= 1:
                colour = "white" if percent[i, j] > 62 else "black"
                matrix.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=9, color=colour)

    recall = np.diag(percent)
    bars.barh(range(c), recall, color=_BLUE, height=0.7)
    bars.set_title("Accuracy of each class (%)")
    bars.set_xlim(0, 118)
    bars.set_xticks([0, 50, 100])
    bars.grid(visible=False, axis="y")
    bars.tick_params(axis="y", length=0, labelleft=False)
    for i, value in enumerate(recall):
        bars.text(value + 2, i, f"{value:.1f}", va="center", fontsize=font)
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write a label at the right end of each line, moved apart where they would overlap."""
    if not ends:
        return
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


# ---------------------------------------------------------------------------------------------------------------
# What the report says


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Lines to be typed."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with a header; its first column names the rows."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True
    """Whether the columns after the first are numbers, to be aligned right."""


@dataclass(frozen=True)
class Picture:
    """A figure, by its file's name in the report's folder."""

    file: str
    caption: str


Block = Heading | Paragraph | Bullets | Code | Table | Picture


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _results(result: ProbeResult) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    kind = "linear" if result.config.mode == "linear" else "fine-tuned"
    header = ("accuracy in %", "width", "kNN val.", "kNN test", f"{kind} train", f"{kind} val.", f"{kind} test")
    rows = tuple(
        (
            row.name,
            str(row.width),
            _percent(row.knn_validation),
            _percent(row.knn_test),
            *(_percent(getattr(row.classifier, split, None)) for split in ("train", "validation", "test")),
        )
        for row in result.rows
    )
    chance = ("always the commonest class", "", "", _percent(result.chance), "", "", _percent(result.chance))
    return header, (chance, *rows)


def _blocks(result: ProbeResult, figures: set[str]) -> list[Block]:
    return [
        *_say_result(result),
        *_say_curves(result),
        *_say_protocol(result),
        *_say_data(result),
        *_say_probe(result),
        *_say_pretraining(result, figures),
        *_say_how(result),
    ]


def _say_result(result: ProbeResult) -> list[Block]:
    scores, trained, facts = result.scores, result.trained, result.test_facts
    method = METHODS[result.pretraining.loss.name]
    error = math.sqrt(scores.test * (100 - scores.test) / facts.num_images)
    what = (
        "a linear classifier on the frozen encoder"
        if result.config.mode == "linear"
        else "the encoder fine-tuned with labels"
    )
    blocks: list[Block] = [
        Heading(1, f"{method} on {_data_name(result.train_facts)}: evaluation of {result.pretraining.model.encoder}"),
        Paragraph(
            f"**Final test accuracy {scores.test:.2f} %, final train accuracy {scores.train:.2f} %** with {what}; "
            f"kNN on the frozen encoder {trained.knn_test:.2f} % on the test images. Naming the commonest class always "
            f"gives {result.chance:.2f} %. Sampling error of the test accuracy ({facts.num_images:,} images, one "
            f"standard error): {error:.2f} points; another seed of the pretraining varies it besides."
        ),
    ]
    if _is_demonstration(result.train_facts):
        blocks += [
            Paragraph(
                "**This is the demonstration, not a benchmark.** The images are shapes drawn by the program, so that "
                "everything can be tried without a download. The numbers show that the whole path works, and say "
                "nothing about photographs. To go on to CIFAR-10:"
            ),
            Code(
                "python -m data_prep cifar10\n"
                "accelerate launch train_simclr.py cifar10-simclr-100\n"
                "python linear_probe.py --run results/cifar10-simclr-100-seed0"
            ),
        ]
    header, rows = _results(result)
    blocks += [Heading(2, "Results"), Table(header, rows)]
    blocks.append(
        Paragraph(
            "val.: the validation images, measured with what was fitted on the other training images only. train: the "
            "final classifier, on all images of the training file."
        )
    )
    blocks += [Bullets(result.notes)] if result.notes else []
    return blocks


def _say_curves(result: ProbeResult) -> list[Block]:
    scores = result.scores
    names = result.test_facts.classes
    totals = result.confusion.sum(axis=1)
    recall = 100 * np.diag(result.confusion) / np.maximum(totals, 1)
    worst = np.argsort(recall, kind="stable")[:3]
    wrong = result.confusion - np.diag(np.diag(result.confusion))
    i, j = np.unravel_index(int(wrong.argmax()), wrong.shape)
    said = f"Lowest: {', '.join(f'{names[k]} {recall[k]:.1f} %' for k in worst)}."
    if wrong[i, j]:
        said += f" Commonest mistake: {names[i]} taken for {names[j]} ({wrong[i, j]} of {totals[i]} images)."
    return [
        Heading(2, "Loss and accuracy by epoch"),
        Picture(
            "curves.png",
            "Cross-entropy and accuracy after each epoch, on images without augmentation. train and test: the final "
            "fit, on all images of the training file. validation (dashed): the fit with the same hyperparameters on "
            "the others, by which they were chosen. The test curve is shown, never used.",
        ),
        Table(
            ("after the last epoch", "train", "validation", "test"),
            (
                ("loss (nats)", f"{scores.train_loss:.4f}", f"{scores.validation_loss:.4f}", f"{scores.test_loss:.4f}"),
                ("accuracy (%)", _percent(scores.train), _percent(scores.validation), _percent(scores.test)),
            ),
        ),
        Heading(2, "Which classes are confused"),
        Picture("confusion.png", f"Test images. {said}"),
    ]


def _say_protocol(result: ProbeResult) -> list[Block]:
    config, facts = result.config, result.train_facts
    num_validation = facts.num_images - result.num_fit
    points = [
        f"{num_validation:,} of the {facts.num_images:,} training images are held out to choose on, always the same "
        f"ones for a file of this size. {_say_checkpoint(result)}",
        f"Each of the {len(result.trials)} pairs of learning rate and weight decay was fitted on the other "
        f"{result.num_fit:,}. The highest validation accuracy after the last epoch decides; then the lower validation "
        "loss; then the order of the candidates. Each representation in the table chose for itself.",
        f"With the chosen pair, a final classifier was fitted on all {facts.num_images:,} training images. Its test "
        "accuracy after the last epoch is the one reported. The test images chose nothing: no hyperparameter, no "
        "epoch, no checkpoint.",
        f"kNN: the {config.knn_neighbours} nearest neighbours by cosine similarity s, each voting with weight "
        f"exp(s / {config.knn_temperature:g}). Bank for validation: the other {result.num_fit:,} training images; for "
        f"test: all {facts.num_images:,}.",
    ]
    if config.mode == "linear":
        points += [
            "Linear classifier: multinomial logistic regression on the encoder's output, standardised by the mean and "
            "deviation of each feature over the images fitted on. SGD with momentum from weights of zero; weight decay "
            "not on biases; learning rate by a cosine over the epochs.",
            "The encoder was frozen: in eval mode, no parameter with a gradient, and SHA-256 over all its weights and "
            f"buffers the same before and after: `{result.encoder_sha256}`.",
        ]
    else:
        points.append(
            "Fine-tuning: encoder and linear classifier (from zero) trained together from the pretrained weights, by "
            "SGD with Nesterov momentum, a cosine over the steps, weight decay only on parameters of two or more "
            "dimensions. The encoder is not frozen; kNN is measured before."
        )
    if len(result.rows) > 1:
        points.append(
            "Raw pixels: all pixels of an image, less the channel mean, over the channel deviation, less the mean "
            "training image. Untrained encoder: the same architecture from the same seed, before its first step. Both "
            "went through the same code."
        )
    return [Heading(2, "Protocol"), Bullets(tuple(points))]


def _say_checkpoint(result: ProbeResult) -> str:
    """Return how the checkpoint came about, and which images had a say in it."""
    if result.pretraining_knn is None:
        return "The checkpoint was not chosen by accuracy: pretraining did not measure kNN."
    here, there = result.train_facts, result.pretraining_facts
    num_validation = here.num_images - result.num_fit
    before = result.pretraining.for_images(there.num_images).num_validation
    if here.content_sha256 == there.content_sha256 and before == num_validation:
        return (
            "Pretraining saw them without labels, and measured kNN accuracy on the same ones to choose its best epoch."
        )
    return (
        f"The pretraining's best epoch was chosen by kNN accuracy on {before:,} of its own "
        f"{there.num_images:,} training images."
    )


def _say_data(result: ProbeResult) -> list[Block]:
    train, test = result.train_facts, result.test_facts
    rows: list[tuple[str, ...]] = [
        ("file", f"`{result.train_path}`", f"`{result.test_path}`"),
        ("source", train.source, test.source),
        ("images", f"{train.num_images:,}", f"{test.num_images:,}"),
        ("size", f"{train.height} x {train.width} pixels", f"{test.height} x {test.width} pixels"),
        ("stored as", _storage(train), _storage(test)),
        ("lossy before conversion", *("yes (JPEG or alike)" if f.lossy_source else "no" for f in (train, test))),
        ("classes", f"{train.num_classes}", f"{test.num_classes}"),
        ("images per class", _range(train.class_counts), _range(test.class_counts)),
        ("content SHA-256", f"`{train.content_sha256}`", f"`{test.content_sha256}`"),
    ]
    blocks: list[Block] = [Heading(2, "Data"), Table(("", "train", "test"), tuple(rows), numeric=False)]
    mean, std = result.pretraining_facts.normalisation
    said = (
        f"Normalised with the channel means {_numbers(mean)} and deviations {_numbers(std)} of the images pretrained "
        "on (pixels / 255)."
    )
    if train.lossy_source or test.lossy_source:
        said += (
            " The images were re-encoded with loss (JPEG) before they were converted, so numbers are not quite "
            "comparable with those published for the original pixels."
        )
    return [*blocks, Paragraph(said)]


def _say_probe(result: ProbeResult) -> list[Block]:
    config = result.config
    is_linear = config.mode == "linear"
    augmentation = (
        "none: features of the stored images, computed once"
        if is_linear and config.features == "cached"
        else f"{describe(config.view)}; anew in each epoch"
    )
    rows = [
        ("mode", config.mode),
        ("augmentation of training images", augmentation),
        ("augmentation of validation and test images", "none"),
        ("optimizer", f"SGD, momentum {config.momentum:g}{'' if is_linear else ', Nesterov'}"),
        ("learning rate", f"{result.chosen.learning_rate:g}, chosen; cosine to 0"),
        ("weight decay", f"{result.chosen.weight_decay:g}, chosen"),
        ("epochs", str(config.epochs)),
        ("batch size", str(config.batch_size)),
        ("seed", str(config.seed)),
        ("precision of the encoder", config.precision),
    ]
    title = "Linear classifier" if is_linear else "Fine-tuning"
    by_candidate = {trial.candidate: trial for trial in result.trials}

    def cell(candidate: Candidate) -> str:
        trial = by_candidate[candidate]
        if not math.isfinite(trial.loss):
            return "diverged"
        return f"**{trial.accuracy:.2f}**" if candidate == result.chosen else f"{trial.accuracy:.2f}"

    trials = tuple(
        (f"{rate:g}", *(cell(Candidate(rate, decay)) for decay in config.weight_decays))
        for rate in config.learning_rates
    )
    blocks: list[Block] = [
        Heading(2, f"{title}: hyperparameters and augmentation"),
        Table(("", "value"), tuple(rows), numeric=False),
        Paragraph(
            "Validation accuracy in percent of each candidate after the last epoch, with the chosen one in bold "
            f"(losses: `{RESULT}`):"
        ),
        Table(("learning rate", *(f"weight decay {decay:g}" for decay in config.weight_decays)), trials),
    ]
    if edge := at_edge(config, result.chosen):
        blocks.append(Paragraph(edge))
    return blocks


def at_edge(config: ProbeConfig, chosen: Candidate) -> str | None:
    """Return a remark if the chosen learning rate is the largest or smallest candidate, so that more may help."""
    rates = sorted(set(config.learning_rates))
    if len(rates) == 1 or chosen.learning_rate not in (rates[0], rates[-1]):
        return None
    end, hint = ("smallest", "smaller") if chosen.learning_rate == rates[0] else ("largest", "larger")
    return (
        f"The chosen learning rate {chosen.learning_rate:g} is the {end} candidate: try {hint} ones too "
        "(`--learning-rates`)."
    )


def _say_pretraining(result: ProbeResult, figures: set[str]) -> list[Block]:
    run, loss, optimizer, model = (
        result.pretraining,
        result.pretraining.loss,
        result.pretraining.optimizer,
        result.pretraining.model,
    )
    objective = {
        "nt_xent": f"nt_xent, temperature {loss.temperature:g}",
        "barlow_twins": f"barlow_twins, off-diagonal weight {loss.off_diagonal_weight:g}, centred",
    }[loss.name]
    peak = optimizer.base_learning_rate * run.global_batch_size / 256
    knn = "not measured" if result.pretraining_knn is None else f"{result.pretraining_knn:.2f} %"
    rows = [
        ("checkpoint", f"`{result.checkpoint}`, epoch {result.pretraining_epoch}, step {result.pretraining_step:,}"),
        ("validation kNN at that epoch", knn),
        ("objective", objective + (f", times {loss.scale:g}" if loss.scale != 1 else "")),
        ("encoder", f"{model.encoder}, stem {model.stem}, width {result.trained.width}"),
        ("projector", f"{model.projector}, hidden {model.projector_hidden}, output {model.projection_dim}"),
        ("optimizer", f"{optimizer.name}, momentum {optimizer.momentum:g}, weight decay {optimizer.weight_decay:g}"),
        (
            "learning rate",
            f"{optimizer.base_learning_rate:g} per 256 images, so {peak:g} at its peak; warm-up "
            f"{optimizer.warmup_epochs:g} epochs, then a cosine",
        ),
        ("epochs", str(run.epochs)),
        ("global batch size", f"{run.global_batch_size} images, two views each"),
        ("precision", run.precision),
        ("batch normalisation", "over all devices" if run.global_batch_norm else "per device"),
        ("seed", str(run.seed)),
        ("side of the views", say_view_stages(run.view_stages, result.pretraining_facts.height)),
        ("augmentation, view 1", describe(run.view_1)),
        ("augmentation, view 2", describe(run.view_2)),
        ("data", f"{result.pretraining_facts.source}, {result.pretraining_facts.num_images:,} images without labels"),
    ]
    blocks: list[Block] = [
        Heading(2, "Pretraining: hyperparameters and augmentation"),
        Table(("", "value"), tuple(rows), numeric=False),
    ]
    if "pretraining" in figures:
        blocks.append(Picture("pretraining.png", "Pretraining's loss, validation kNN accuracy and learning rate."))
    caption = "Images as stored, and the two views of each that the first epoch of pretraining sees."
    return [*blocks, Picture("pairs.png", caption)]


def _say_how(result: ProbeResult) -> list[Block]:
    environment = result.environment
    manifest = result.pretraining_manifest or {}
    before = manifest.get("environment", {})
    prepare = next(
        (command for name, command in _CONVERSIONS.items() if result.train_facts.source.startswith(name)), ""
    )
    commands = [prepare] if prepare else []
    if "command" in before:
        world_size = manifest.get("derived", {}).get("world_size", 1)
        config_file = f"accelerate_configs/{'cpu' if manifest.get('device') == 'cpu' else 'multi_gpu'}.yaml"
        several = f"accelerate launch --config_file {config_file} --num_processes {world_size}"
        launch = "python" if world_size == 1 else several
        commands.append(f"{launch} {before['command']}")
    commands.append(f"python {environment['command']}")
    rows = [("", "pretraining", "evaluation")]
    for name, key in (("commit", "commit"), ("hardware", "hardware"), ("platform", "platform"), ("date", "date")):
        rows.append((name, str(before.get(key, "–")), str(environment.get(key, "–"))))
    versions = [{"python": e.get("python", "–"), **e.get("versions", {})} for e in (before, environment)]
    rows += [(name, versions[0].get(name, "–"), version) for name, version in versions[1].items()]
    took = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    return [
        Heading(2, "How to repeat it"),
        Paragraph("The commands, in order:"),
        Code("\n".join(commands)),
        Table(rows[0], tuple(rows[1:]), numeric=False),
        Paragraph(f"Time of the evaluation: {took}."),
        Paragraph(
            f"Beside this report: `{CLASSIFIER}` (encoder and classifier; `simclr.checkpoint.load_classifier` loads "
            f"it), `{RESULT}` (all numbers), and the figures."
        ),
    ]


_CONVERSIONS = {
    "built-in shapes": "python -m data_prep shapes",
    "CIFAR-100": "python -m data_prep cifar100",
    "CIFAR-10": "python -m data_prep cifar10",
    "STL-10": "python -m data_prep stl10",
}


def _data_name(facts: Facts) -> str:
    return facts.source.split(",")[0].strip()


def _is_demonstration(facts: Facts) -> bool:
    return facts.source.startswith("built-in shapes")


def _storage(facts: Facts) -> str:
    return "raw pixels" if facts.encoding == "raw" else f"JPEG, quality {facts.jpeg_quality or 'unknown'}"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


# ---------------------------------------------------------------------------------------------------------------
# Rendering. Texts may hold `code` and **bold**.


def render_markdown(blocks: Sequence[Block]) -> str:
    """Return the blocks as Markdown (GitHub's, for the tables)."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(file, caption):
            return f"![{caption}]({file})\n\n{caption}"
        case Table(header, rows, numeric):
            line = "|" + "|".join(["---", *["---:" if numeric else "---"] * (len(header) - 1)]) + "|"
            cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
            return "\n".join([cells[0], line, *cells[1:]])


def render_html(blocks: Sequence[Block], folder: Path) -> str:
    """Return the blocks as one HTML page that holds the figures of ``folder`` and refers to nothing else."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(file, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode("ascii")
            return (
                f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )
        case Table(header, rows, numeric):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            lines = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
            return f'<div class="wide {"numbers" if numeric else "words"}">{table}</div>'


def _inline(text: str) -> str:
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)


_CSS = """
:root { color-scheme: light; }
body { max-width: 58rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 0.9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 0.3rem 0.8rem 0.3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #999; }
.numbers td + td, .numbers th + th { text-align: right; padding-left: 0.8rem; font-variant-numeric: tabular-nums; }
.words td + td { overflow-wrap: anywhere; } .words td:first-child { min-width: 9rem; color: #444; }
code { font-size: 0.88em; } pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
"""
