"""Is a run healthy? Sentences, each derived from a measured number, with the limit that it was held against."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from simclr.config import TrainConfig
from simclr.report.results import ProbeResult

COLLAPSED_SPREAD, SMALL_SPREAD = 0.1, 0.5
SLOW_SHARE = 0.5
"""A line of metrics is slow below this share of the median speed; more than a tenth of slow lines is remarked on."""
STANDARD_ERRORS = 2.0
"""By how many of them two accuracies must differ to be called different."""


class Finding(NamedTuple):
    """A sentence about a run."""

    is_good: bool
    text: str


def findings(result: ProbeResult, metrics: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Return what the numbers say about a run, remarks first. Without metrics only the accuracies speak."""
    run = result.pretraining
    steps = [line for line in metrics if line["kind"] == "step"]
    total = (result.pretraining_manifest or {}).get("derived", {}).get("total_steps")
    found = [
        *_about_its_end(steps, total),
        *_about_the_loss(steps, run),
        *_about_collapse(steps),
        *_about_gradients(steps),
        *_about_knn([line for line in metrics if line["kind"] == "knn"], num_images=_num_validation(result)),
        *_about_use(result),
        *_about_speed(steps),
    ]
    return sorted(found, key=lambda finding: finding.is_good)


def duration_of(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how long pretraining took in seconds, over all sessions; None if the lines do not tell."""
    return max((float(line["seconds"]) for line in metrics if line.get("seconds") is not None), default=None)


def _num_validation(result: ProbeResult) -> int:
    facts = result.pretraining_facts
    return result.pretraining.for_images(facts.num_images).num_validation or 0


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if line.get(key) is not None]


def _end(values: Sequence[float]) -> float:
    """Return the mean of the last tenth."""
    return statistics.fmean(values[-max(1, len(values) // 10) :])


def _about_its_end(steps: Sequence[Mapping[str, Any]], total: int | None) -> Iterator[Finding]:
    if steps and total:
        taken = steps[-1]["step"]
        said = f"{taken:,} of {total:,} steps were taken"
        yield Finding(taken >= total, f"{said}." if taken >= total else f"{said}: the run did not reach its end.")


def _about_the_loss(steps: Sequence[Mapping[str, Any]], run: TrainConfig) -> Iterator[Finding]:
    losses = [value / run.loss.scale for value in _values(steps, "loss")]
    if len(losses) < 2:
        return
    first, last = losses[0], _end(losses)
    fell = f"The loss went from {first:.3f} in the first line to {last:.3f}, the mean of the last tenth"
    if run.loss.name == "nt_xent":
        alike = math.log(2 * run.global_batch_size - 1)
        yield Finding(
            last < min(first, 0.99 * alike),
            f"{fell}; projections that are all alike give ln(2n - 1) = {alike:.3f} with n = {run.global_batch_size}.",
        )
    else:
        yield Finding(last < first, f"{fell}.")


def _about_collapse(steps: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    spreads, similarities = _values(steps, "projection_spread"), _values(steps, "positive_similarity")
    if not spreads:
        return
    spread = _end(spreads)
    measured = f"the projections' spread is {spread:.2f} (0: all alike, 1: they point everywhere)"
    if similarities:
        measured += f", two views of an image have a cosine similarity of {_end(similarities):.2f}"
    if spread < COLLAPSED_SPREAD:
        yield Finding(False, f"Collapsed: {measured}. Below {COLLAPSED_SPREAD:g} the projections tell nothing apart.")
    elif spread < SMALL_SPREAD:
        yield Finding(False, f"Near collapse: {measured}; {SMALL_SPREAD:g} and more is usual.")
    else:
        yield Finding(True, f"No collapse: {measured}.")


def _about_gradients(steps: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    skipped = _values(steps, "skipped_steps")
    if not skipped:
        return
    left_out, taken = round(sum(skipped)), steps[-1]["step"]
    if left_out:
        yield Finding(False, f"{left_out:,} of {taken:,} steps were left out, as their gradient was not finite.")
    else:
        yield Finding(True, f"The gradient was finite in all {taken:,} steps.")


def _about_knn(lines: Sequence[Mapping[str, Any]], num_images: int) -> Iterator[Finding]:
    measured = [line for line in lines if line.get("knn_accuracy") is not None]
    if len(measured) < 2 or not num_images:
        return
    first, last = measured[0], measured[-1]
    best = max(measured, key=lambda line: float(line["knn_accuracy"]))
    error = STANDARD_ERRORS * _standard_error(best["knn_accuracy"], num_images)
    rose = (
        f"Validation kNN went from {first['knn_accuracy']:.2f} % (epoch {first['epoch']:g}) to "
        f"{last['knn_accuracy']:.2f} % (epoch {last['epoch']:g})"
    )
    if last["knn_accuracy"] < best["knn_accuracy"] - error:
        yield Finding(
            False,
            f"{rose}, but was {best['knn_accuracy']:.2f} % at epoch {best['epoch']:g}: it fell by more than "
            f"{STANDARD_ERRORS:g} standard errors.",
        )
        return
    yield Finding(last["knn_accuracy"] > first["knn_accuracy"], f"{rose}.")
    before = measured[-2]
    if last["knn_accuracy"] > before["knn_accuracy"] + error:
        yield Finding(
            True,
            f"It still rose at the end, by {last['knn_accuracy'] - before['knn_accuracy']:.2f} points since epoch "
            f"{before['epoch']:g}: more epochs may help.",
        )


def _about_use(result: ProbeResult) -> Iterator[Finding]:
    ours = result.trained
    for row in result.rows[:-1]:
        kind, a, b = "kNN", ours.knn_test, row.knn_test
        if ours.classifier is not None and row.classifier is not None:
            kind, a, b = "classifier", ours.classifier.test, row.classifier.test
        n = result.test_facts.num_images
        error = STANDARD_ERRORS * math.hypot(_standard_error(a, n), _standard_error(b, n))
        name = row.name if row.name == "raw pixels" else f"the {row.name}"
        verb = "beats" if a > b + error else "does not beat"
        yield Finding(
            a > b + error,
            f"The pretrained encoder {verb} {name} on the test images: {a:.2f} % and {b:.2f} % ({kind}; "
            f"{STANDARD_ERRORS:g} standard errors of the difference are {error:.2f} points).",
        )


def _about_speed(steps: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    speeds = _values(steps, "images_per_second")[1:]  # the first line has the start in it
    if len(speeds) < 10:
        return
    median = statistics.median(speeds)
    slow = sum(speed < SLOW_SHARE * median for speed in speeds)
    said = (
        f"{slow} of {len(speeds)} lines of metrics below {100 * SLOW_SHARE:.0f} % of the median {median:,.0f} images/s"
    )
    if slow > len(speeds) / 10:
        yield Finding(False, f"Uneven speed: {said}. Something else used the machine, or the images came late.")
    else:
        yield Finding(True, f"Even speed: {said}.")


def _standard_error(percent: float, num_images: int) -> float:
    """Return an accuracy's standard error over test images, in points."""
    return math.sqrt(max(percent * (100 - percent), 0) / max(num_images, 1))
