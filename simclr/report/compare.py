"""A table and a figure of several runs, as Markdown and as one HTML file.

    python -m simclr.report.compare results/a-seed0 results/a-seed1 results/b-seed0 --output results/a-and-b

Runs that differ in nothing but the seed are one row and one line, with their spread. What was measured on other images,
or in another way, has another letter. All is read from manifest.json, metrics.jsonl and the probe.json files in the
runs' folders; nothing is measured anew.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro
from tyro.conf import Positional

from simclr import files, system
from simclr.beton import Facts
from simclr.config import TrainConfig, from_values, settings_of
from simclr.report.figures import Band, draw, draw_bands, measured
from simclr.report.health import duration_of
from simclr.report.page import write_page
from simclr.run import runlog
from simclr.run.resuming import FREE_TO_CHANGE
from simclr.system import say_duration

NAME = "compare"
# Settings of an evaluation that change no number, or by the seed's chance only.
_NO_PROTOCOL = frozenset({"run", "train", "test", "output", "seed", "loader", "baselines", "map_points", "pdf"})
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    runs: Positional[tuple[Path, ...]]
    """Folders of pretraining runs."""

    output: Path
    """The folder for compare.md, compare.html and the figure."""


@dataclass(frozen=True, eq=False)
class Record:
    """A run, as its folder tells of it."""

    folder: Path
    config: TrainConfig
    facts: Facts
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    probes: tuple[Mapping[str, Any], ...]

    @property
    def steps(self) -> int:
        """Steps taken."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def is_whole(self) -> bool:
        """Whether the run reached its end."""
        return self.steps >= int(self.manifest["derived"]["total_steps"])

    @property
    def hardware(self) -> str:
        """What it ran on."""
        count = self.manifest["derived"]["world_size"]
        return f"{self.manifest['environment']['hardware']}{f', {count} processes' if count > 1 else ''}"

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What its numbers depend on, besides the seed, by name."""
        left_out = FREE_TO_CHANGE | {"seed", "num_validation", "knn_every_epochs"}
        own = {key: value for key, value in settings_of(self.config).items() if key not in left_out}
        return {"data": self.facts.content_sha256} | own | ({} if self.is_whole else {"steps taken": self.steps})


@dataclass(frozen=True, eq=False)
class Recipe:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: tuple[Record, ...]


def read_run(folder: Path) -> Record:
    """Read what a run's folder tells.

    Raises:
        ValueError: If it is no run's folder, or a file in it is damaged.
    """
    manifest = runlog.read_manifest(folder)
    if manifest is None:
        what = "is not there" if not folder.exists() else f"holds no run, as it has no {runlog.MANIFEST}"
        raise ValueError(f"{folder} {what}; name folders that train_simclr.py has written")
    try:
        config, facts = from_values(TrainConfig, manifest["config"]), from_values(Facts, manifest["facts"])
        int(manifest["derived"]["total_steps"]), manifest["environment"]["hardware"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / runlog.MANIFEST} does not tell what was run: {error!r}") from error
    probes = tuple(probe for _, probe in runlog.read_results(folder))
    return Record(folder, config, facts, manifest, runlog.read_metrics(folder), probes)


def protocol_of(probe: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that an evaluation's numbers depend on besides the encoder, by name."""
    own = {name: value for name, value in probe["config"].items() if name not in _NO_PROTOCOL}
    images = {f"{part} images": probe[f"{part}_facts"]["content_sha256"] for part in ("train", "test")}
    return {**images, **own, "images fitted on": probe["num_fit"]}


def recipes_of(records: Sequence[Record]) -> list[Recipe]:
    """Return the runs by recipe, in the order given; recipes of the same name are told apart by a letter."""
    groups = list(grouped(records, lambda record: frozen(record.settings)).values())
    names = [runs[0].config.name for runs in groups]
    recipes = []
    for i, (name, runs) in enumerate(zip(names, groups, strict=True)):
        letter = f" ({_letters(names[: i + 1].count(name) - 1)})" if names.count(name) > 1 else ""
        run = runs[0]
        cut = "" if run.is_whole else f", cut off at step {run.steps:,} of {run.manifest['derived']['total_steps']:,}"
        recipes.append(Recipe(f"{name}{letter}{cut}", tuple(runs)))
    return recipes


def compare(config: CompareConfig) -> Path:
    """Write the comparison; return the HTML file.

    Raises:
        ValueError: If a folder is no run's, or is named twice.
    """
    if not config.runs:
        raise ValueError("no run was named; give folders of runs, such as results/*-seed0")
    resolved = [folder.resolve() for folder in config.runs]
    if twice := sorted({str(folder) for folder in config.runs if resolved.count(folder.resolve()) > 1}):
        raise ValueError(f"{', '.join(twice)} is named twice; a run counts once")
    recipes = recipes_of([read_run(folder) for folder in config.runs])
    rows = [row for recipe in recipes for row in rows_of(recipe)]
    bands = [spread_of(recipe, look) for look, recipe in enumerate(recipes)]
    title = "kNN accuracy, validation (%), by epoch"
    drawings = {"knn-epochs": (title, lambda: draw_bands([band for band in bands if band.places], title, "epoch"))}
    differences = differing([recipe.runs[0].settings for recipe in recipes])
    config.output.mkdir(parents=True, exist_ok=True)
    write_page(
        config.output,
        NAME,
        {"knn": draw(drawings if any(band.places for band in bands) else {})},
        num_runs=len(config.runs),
        table=table_of(rows),
        remarks=remarks(rows),
        recipes=[
            f"**{recipe.label}** ({', '.join(f'`{run.folder}`' for run in recipe.runs)})"
            + "".join(f", {name} {values[i]}" for name, values in differences.items())
            for i, recipe in enumerate(recipes)
        ],
    )
    return config.output / f"{NAME}.html"


@dataclass(frozen=True, eq=False)
class Row:
    """A recipe, as it was evaluated in one way."""

    recipe: Recipe
    probes: tuple[Mapping[str, Any], ...]
    """The evaluations; none if there are none of the recipe."""

    @property
    def images(self) -> str:
        """What the validation accuracies were measured on."""
        run = self.recipe.runs[0]
        return frozen([run.facts.content_sha256, run.config.num_validation])

    @property
    def way(self) -> dict[str, Any]:
        """What the evaluations' numbers depend on besides the encoder."""
        return protocol_of(self.probes[0])


def rows_of(recipe: Recipe) -> list[Row]:
    """Return a row for each way in which a recipe's runs were evaluated, or one without evaluations."""
    probes = [probe for run in recipe.runs for probe in run.probes]
    ways = grouped(probes, lambda probe: frozen(protocol_of(probe))).values()
    return [Row(recipe, tuple(entries)) for entries in ways] or [Row(recipe, ())]


def table_of(rows: Sequence[Row]) -> list[list[str]]:
    """Return what was measured, by letter where numbers do not compare, then the highest first; a header first."""
    of_images = letters_of([row.images for row in rows])
    of_ways = letters_of([frozen(row.way) for row in rows if row.probes])
    found = []
    for row in rows:
        runs = row.recipe.runs
        seconds = [time for run in runs if (time := duration_of(run.metrics)) is not None]
        last = [values[-1] for run in runs if (values := measured(run.metrics, "knn", "knn_accuracy")[1])]
        knn = [float(probe["rows"][-1]["knn_test"]) for probe in row.probes]
        tested = [float(probe["test_accuracy"]) for probe in row.probes]
        images, way = of_images[row.images], of_ways[frozen(row.way)] if row.probes else ""
        cells = [
            row.recipe.label,
            ", ".join(str(run.config.seed) for run in runs),
            f"{runs[0].steps:,}",
            say_duration(statistics.fmean(seconds)) if seconds else "–",
            say_spread(last, images),
            row.probes[0]["config"]["mode"] if row.probes else "–",
            say_spread(knn, way),
            say_spread(tested, way),
        ]
        highest_first = [-statistics.fmean(values) if values else 0.0 for values in (tested, last)]
        found.append(((not row.probes, way, images, highest_first), cells))
    header = ["run", "seeds", "steps", "time", "kNN val.", "evaluation", "kNN test", "test"]
    return [header, *(cells for _, cells in sorted(found, key=lambda entry: entry[0]))]


def remarks(rows: Sequence[Row]) -> list[str]:
    """Return what a reader has to know before comparing."""
    found = []
    if len({row.images for row in rows}) > 1:
        found.append("**Not one ranking:** kNN val. of another letter is of other images, and does not compare.")
    if ways := differing([row.way for row in rows if row.probes]):
        found.append(
            "**Not one ranking:** tests of another letter were made in another way, and do not compare; the ways "
            f"differ in {', '.join(ways)}."
        )
    if len(hardware := sorted({run.hardware for row in rows for run in row.recipe.runs})) > 1:
        found.append(f"Times are of different hardware, and do not compare: {'; '.join(hardware)}.")
    return found


def letters_of(keys: Sequence[str]) -> dict[str, str]:
    """Return " (a)", " (b)" and so on for the different keys; "" if there is only one."""
    different = list(dict.fromkeys(keys))
    return {key: f" ({_letters(i)})" if len(different) > 1 else "" for i, key in enumerate(different)}


def differing(values: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what is not the same everywhere, by name; checksums are shortened."""
    names = list(dict.fromkeys(name for entry in values for name in entry))
    return {
        name: [_shown(entry.get(name)) for entry in values]
        for name in names
        if len({frozen(entry.get(name)) for entry in values}) > 1
    }


def say_spread(values: Sequence[float], letter: str = "") -> str:
    """Return the mean, and the sample's standard deviation where there are several."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.2f}"
    return (f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean) + letter


def spread_of(recipe: Recipe, look: int) -> Band:
    """Return a recipe's validation accuracy: mean, least and largest at the steps that all its runs measured.

    Args:
        recipe: The runs.
        look: Number of its colour and stroke.
    """
    by_step = [
        {line["step"]: line for line in run.metrics if line["kind"] == "knn" and line.get("knn_accuracy") is not None}
        for run in recipe.runs
    ]
    steps = sorted(set.intersection(*(set(lines) for lines in by_step)))
    epochs, values = (
        np.array([[lines[step][what] for step in steps] for lines in by_step], dtype=float)
        for what in ("epoch", "knn_accuracy")
    )
    numbers = (array.tolist() for array in (epochs.mean(0), values.mean(0), values.min(0), values.max(0)))
    return Band(recipe.label, look, *numbers)


def grouped(entries: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return the entries by key, in their order."""
    groups: dict[K, list[T]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def frozen(values: Any) -> str:
    """Return settings as a key."""
    return json.dumps(values, sort_keys=True)


def _letters(number: int) -> str:
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")


def _shown(value: Any) -> str:
    text = "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{text[:12]}…`" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def cli() -> None:
    """Run :func:`compare` with the options of the command line."""
    system.outlive_readers()
    try:
        with files.explain_refusals():
            print(compare(tyro.cli(CompareConfig, description=__doc__)))
    except ValueError as error:
        sys.exit(f"compare: {error}")


if __name__ == "__main__":
    cli()
