"""The report of an evaluation: ``probe.json``, figures, and one text as Markdown, as one HTML file, as PDF if wanted.

``report.jinja`` is the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.beton import Facts
from simclr.config import ProbeConfig
from simclr.evaluation import Candidate
from simclr.files import write_json
from simclr.report.figures import MOST_IN_LEGEND, MOST_NAMED_CLASSES, draw_all
from simclr.report.health import duration_of, findings
from simclr.report.page import require_pdf, write_page, write_pdf
from simclr.report.pictures import Pictures, find_neighbours, make_map, view_pairs
from simclr.report.results import ProbeResult, Row, Scores, Trial, to_plain
from simclr.run.checkpoint import CLASSIFIER
from simclr.run.runlog import RESULT
from simclr.templates import percent as _percent
from simclr.views import describe, say_view_stages

__all__ = [
    "Pictures",
    "ProbeResult",
    "Row",
    "Scores",
    "Trial",
    "at_edge",
    "find_neighbours",
    "make_map",
    "require_pdf",
    "summary",
    "view_pairs",
    "write_labels",
    "write_report",
]

NAME, LABELS = "report", "labels.json"
_CONVERSIONS = {
    "built-in shapes": "python -m data_prep shapes",
    "CIFAR-100": "python -m data_prep cifar100",
    "CIFAR-10": "python -m data_prep cifar10",
    "STL-10": "python -m data_prep stl10",
}


def write_report(folder: Path, result: ProbeResult, pictures: Pictures, metrics: Sequence[Mapping[str, Any]]) -> Path:
    """Write the figures, ``probe.json``, ``report.md``, ``report.html`` and, if configured, ``report.pdf``.

    Args:
        folder: Where to; exists.
        result: What was measured.
        pictures: What is shown besides.
        metrics: The pretraining's metric lines; empty if they are not at hand.

    Returns:
        The HTML file. It holds its figures and refers to nothing outside itself.
    """
    write_json(folder / RESULT, to_plain(result))
    page = write_page(
        folder,
        NAME,
        draw_all(result, pictures, metrics),
        result=result,
        pictures=pictures,
        health=findings(result, metrics),
        duration=duration_of(metrics),
        results=_results_table(result),
        trials=_trials_table(result),
        mistakes=_mistakes(result),
        classes=_classes_table(result),
        commands=_commands(result),
        environments=_environments(result),
        edge=at_edge(result.config, result.scores.chosen),
        describe=describe,
        view_stages=say_view_stages(
            result.pretraining.view_stages, result.pretraining_facts.height, result.pretraining.epochs
        ),
        is_published=result.train_facts.source.startswith(("CIFAR-", "STL-10")),
        most_named=MOST_NAMED_CLASSES,
        most_in_legend=MOST_IN_LEGEND,
        classifier_file=CLASSIFIER,
        result_file=RESULT,
        labels_file=LABELS,
    )
    if result.config.pdf:
        write_pdf(page, folder / f"{NAME}.pdf")
    return folder / f"{NAME}.html"


def write_labels(
    folder: Path, train: Facts, config: ProbeConfig, *, fit: NDArray[np.int64], validation: NDArray[np.int64]
) -> None:
    """Write ``labels.json``: which training images had labels, for others to draw the same."""
    about = {"label_fraction": config.label_fraction, "seed": config.seed, "content_sha256": train.content_sha256}
    write_json(folder / LABELS, about | {"fit": fit.tolist(), "validation": validation.tolist()})


def _results_table(result: ProbeResult) -> list[list[str]]:
    """Return the accuracies of every representation, a header first."""
    kind = "linear" if result.config.mode == "linear" else "fine-tuned"
    chance = _percent(result.chance)
    return [
        ["accuracy in %", "width", "kNN val.", "kNN test", f"{kind} train", f"{kind} val.", f"{kind} test"],
        ["always the commonest class", "", "", chance, "", "", chance],
        *(
            [row.name, str(row.width), _percent(row.knn_validation), _percent(row.knn_test)]
            + [_percent(getattr(row.classifier, split, None)) for split in ("train", "validation", "test")]
            for row in result.rows
        ),
    ]


def summary(result: ProbeResult) -> str:
    """Return the table of results as text for a terminal."""
    table = _results_table(result)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    header, *lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])  # names left, numbers right
        for row in table
    )
    return "\n".join([header, "-" * len(header), *lines])


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


def _trials_table(result: ProbeResult) -> list[list[str]]:
    """Return what each candidate reached, learning rates down and weight decays across, the chosen one in bold."""
    config = result.config
    cells = {
        trial.candidate: f"{trial.accuracy:.2f}" if math.isfinite(trial.loss) else "diverged" for trial in result.trials
    }
    cells[result.scores.chosen] = f"**{cells[result.scores.chosen]}**"
    return [
        ["learning rate", *(f"weight decay {decay:g}" for decay in config.weight_decays)],
        *(
            [f"{rate:g}", *(cells[Candidate(rate, decay)] for decay in config.weight_decays)]
            for rate in config.learning_rates
        ),
    ]


def _classes_table(result: ProbeResult) -> list[list[str]]:
    """Return for each class how much is recognised and what it is taken for most often; a header first."""
    rows = [["class", "accuracy (%)", "most often taken for", "number"]]
    for k, name in enumerate(result.test_facts.classes):
        counts = result.confusion[k]
        total, wrong = int(counts.sum()), counts.copy()
        wrong[k] = 0
        j = int(wrong.argmax())
        taken_for = f"{result.test_facts.classes[j]} ({100 * wrong[j] / total:.0f} %)" if wrong[j] else "–"
        rows.append([name, f"{100 * counts[k] / total:.1f}" if total else "–", taken_for, str(k)])
    return rows


def _mistakes(result: ProbeResult) -> str:
    """Return which classes are recognised least, and what is taken for what most often."""
    names, confusion = result.test_facts.classes, result.confusion
    totals = confusion.sum(axis=1)
    recall = 100 * np.diag(confusion) / np.maximum(totals, 1)
    worst = np.argsort(recall, kind="stable")[:3]
    wrong = confusion - np.diag(np.diag(confusion))
    i, j = np.unravel_index(int(wrong.argmax()), wrong.shape)
    lowest = f"Lowest: {', '.join(f'{names[k]} {recall[k]:.1f} %' for k in worst)}."
    if not wrong[i, j]:
        return lowest
    return f"{lowest} Commonest mistake: {names[i]} taken for {names[j]} ({wrong[i, j]} of {totals[i]} images)."


def _commands(result: ProbeResult) -> str:
    """Return the commands that lead to this result, as far as they are known."""
    source, manifest = result.train_facts.source, result.pretraining_manifest or {}
    commands = [command for name, command in _CONVERSIONS.items() if source.startswith(name)][:1]  # CIFAR-100 is no -10
    if command := manifest.get("environment", {}).get("command"):
        world_size = manifest.get("derived", {}).get("world_size", 1)
        config_file = f"accelerate_configs/{'cpu' if manifest.get('device') == 'cpu' else 'multi_gpu'}.yaml"
        several = f"accelerate launch --config_file {config_file} --num_processes {world_size}"
        commands.append(f"{'python' if world_size == 1 else several} {command}")
    return "\n".join([*commands, f"python {result.environment['command']}"])


def _environments(result: ProbeResult) -> list[list[str]]:
    """Return what pretraining and evaluation ran on, side by side: name, there, here."""
    before, now = (result.pretraining_manifest or {}).get("environment", {}), result.environment
    names = ("commit", "hardware", "platform", "date", "python")
    return [
        *([name, before.get(name, "–"), now.get(name, "–")] for name in names),
        *([name, before.get("versions", {}).get(name, "–"), version] for name, version in now["versions"].items()),
    ]
