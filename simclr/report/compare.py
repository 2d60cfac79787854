"""Tables and figures of several runs, as Markdown and as one HTML file.

    python -m simclr.report.compare results/a-seed0 results/a-seed1 results/b-seed0 --output results/a-and-b

Runs that differ in nothing but the seed are one row and one line, with their spread. What was measured on other images,
or in another way, stands in a table of its own. All is read from manifest.json, metrics.jsonl and the probe.json files
in the runs' folders; nothing is measured anew.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro
from tyro.conf import Positional

from simclr.beton import Facts
from simclr.config import TrainConfig, from_values, settings_of
from simclr.report.figures import Band, Drawing, Panel, draw, draw_bands, measured
from simclr.report.fonts import lettering
from simclr.report.health import duration_of
from simclr.report.page import write_page
from simclr.run import files, host, runlog
from simclr.run.resuming import FREE_TO_CHANGE
from simclr.templates import say_duration

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
    """The folder for compare.md, compare.html and the figures."""


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

    @property
    def validation(self) -> tuple[str, int]:
        """What its validation accuracies were measured on."""
        return self.facts.content_sha256, self.config.num_validation or 0


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
    records = [read_run(folder) for folder in config.runs]
    recipes = recipes_of(records)
    config.output.mkdir(parents=True, exist_ok=True)

    sets = grouped(recipes, lambda recipe: recipe.runs[0].validation)
    figures: dict[str, list[Panel]] = {}
    pretraining = []
    for number, ((_, num_validation), members) in enumerate(sets.items(), start=1):
        letters = lettering([recipe.label for recipe in members])
        figures[f"set-{number}"] = draw(curves(members, number, letters.names), letters.families)
        facts = members[0].runs[0].facts
        table = pretraining_table(members)
        pretraining.append(
            {"facts": facts, "num_validation": num_validation, "table": table, "figure": f"set-{number}"}
        )

    found = [(recipe, record, probe) for recipe in recipes for record in recipe.runs for probe in record.probes]
    protocols = grouped(found, lambda entry: frozen(protocol_of(entry[2])))
    evaluations = [
        {"probe": entries[0][2], "table": evaluation_table(entries)}
        for entries in protocols.values()  # in the order of the runs
    ]
    write_page(
        config.output,
        NAME,
        figures,
        records=records,
        recipes=recipes,
        pretraining=pretraining,
        evaluations=evaluations,
        differences=differences_table(recipes),
        protocol_differences=differing([protocol_of(entries[0][2]) for entries in protocols.values()]),
        remarks=remarks(recipes),
        runs=runs_table(records),
    )
    return config.output / f"{NAME}.html"


# ---------------------------------------------------------------------------------------------------------------
# Tables


def pretraining_table(recipes: Sequence[Recipe]) -> list[list[str]]:
    """Return what pretraining measured itself, the highest last validation accuracy first; a header first."""
    rows = []
    for recipe in recipes:
        accuracies = [measured(run.metrics, "knn", "knn_accuracy")[1] for run in recipe.runs]
        last = [values[-1] for values in accuracies if values]
        speeds = [measured(run.metrics, "step", "images_per_second")[1] for run in recipe.runs]
        medians = [statistics.median(values) for values in speeds if values]
        rows.append(
            (
                statistics.fmean(last) if last else -math.inf,
                [
                    recipe.label,
                    seeds_of(recipe.runs),
                    f"{recipe.runs[0].steps:,}",
                    say_times(recipe.runs),
                    f"{statistics.fmean(medians):,.0f}" if medians else "–",
                    say_spread([max(values) for values in accuracies if values]),
                    say_spread(last),
                ],
            )
        )
    header = ["run", "seeds", "steps", "time", "images/s", "kNN val., best", "kNN val., last"]
    return [header, *(row for _, row in sorted(rows, key=lambda entry: -entry[0]))]


def evaluation_table(entries: Sequence[tuple[Recipe, Record, Mapping[str, Any]]]) -> list[list[str]]:
    """Return test accuracies measured in one way, the highest first; a header first."""
    kind = "linear" if entries[0][2]["config"]["mode"] == "linear" else "fine-tuned"
    rows = []
    for recipe, members in grouped(entries, lambda entry: entry[0]).items():
        probes = [probe for _, _, probe in members]
        tested = [float(probe["test_accuracy"]) for probe in probes]
        runs = [record for _, record, _ in members]
        knn = [float(probe["rows"][-1]["knn_test"]) for probe in probes]
        cells = [recipe.label, seeds_of(runs), say_times(runs), say_spread(knn), say_spread(tested)]
        rows.append((statistics.fmean(tested), cells))
    header = ["run", "seeds", "time of pretraining", "kNN test", f"{kind} test"]
    return [header, *(row for _, row in sorted(rows, key=lambda entry: -entry[0]))]


def differences_table(recipes: Sequence[Recipe]) -> list[list[str]]:
    """Return the settings in which the recipes differ; a header first, and nothing else if there are none."""
    settings = [recipe.runs[0].settings for recipe in recipes]
    header = ["setting", *(recipe.label for recipe in recipes)]
    return [header, *([key, *values] for key, values in differing(settings).items())]


def runs_table(records: Sequence[Record]) -> list[list[str]]:
    """Return each run with where it lies and what it ran on; a header first."""
    header = ["folder", "name", "seed", "steps", "time", "hardware", "commit", "begun"]
    rows = []
    for record in records:
        environment, first = record.manifest["environment"], (record.manifest.get("sessions") or [record.manifest])[0]
        rows.append(
            [
                f"`{record.folder}`",
                record.config.name,
                str(record.config.seed),
                f"{record.steps:,} of {record.manifest['derived']['total_steps']:,}",
                say_times([record]),
                record.hardware,
                f"`{environment.get('commit', '–')[:12]}`",
                first.get("environment", {}).get("date", "–")[:10],
            ]
        )
    return [header, *rows]


def differing(values: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what is not the same everywhere, by name; checksums are shortened."""
    names = list(dict.fromkeys(name for entry in values for name in entry))
    return {
        name: [_shown(entry.get(name)) for entry in values]
        for name in names
        if len({frozen({"": entry.get(name)}) for entry in values}) > 1
    }


def remarks(recipes: Sequence[Recipe]) -> list[str]:
    """Return what a reader has to know before comparing."""
    found = []
    hardware = sorted({run.hardware for recipe in recipes for run in recipe.runs})
    if len(hardware) > 1:
        found.append(f"Times are of different hardware, and do not compare: {'; '.join(hardware)}.")
    for recipe in recipes:
        seeds = [run.config.seed for run in recipe.runs]
        if len(set(seeds)) < len(seeds):
            found.append(f"{recipe.label} has several runs of one seed, so its spread is not one over seeds.")
    few = [recipe.label for recipe in recipes if len(recipe.runs) == 1]
    if few:
        found.append(f"One seed only, so that nothing is known of the spread: {', '.join(few)}.")
    missing = [str(run.folder) for recipe in recipes for run in recipe.runs if not run.probes]
    if missing:
        found.append(f"Not evaluated yet (python linear_probe.py --run FOLDER): {', '.join(missing)}.")
    return found


def seeds_of(runs: Sequence[Record]) -> str:
    """Return the seeds in words."""
    return ", ".join(str(run.config.seed) for run in runs)


def say_spread(values: Sequence[float]) -> str:
    """Return the mean, and the sample's standard deviation where there are several."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def say_times(runs: Sequence[Record]) -> str:
    """Return the mean time of pretraining."""
    seconds = [time for run in runs if (time := duration_of(run.metrics)) is not None]
    return say_duration(statistics.fmean(seconds)) if seconds else "–"


# ---------------------------------------------------------------------------------------------------------------
# Figures


def curves(recipes: Sequence[Recipe], number: int, names: Sequence[str]) -> dict[str, Drawing]:
    """Return panels: validation accuracy against epochs and seconds, and each kind of loss against epochs.

    Args:
        recipes: Measured on the same validation images.
        number: Of this set of recipes, for the files' names.
        names: Of the recipes, as figures write them.
    """
    everyone = list(range(len(recipes)))
    accuracy = "kNN accuracy, validation (%)"
    wanted = [  # file, title, kind of lines, what, against what, which recipes
        (f"knn-epochs-{number}", f"{accuracy}, by epoch", "knn", "knn_accuracy", "epoch", everyone),
        (f"knn-seconds-{number}", f"{accuracy}, by seconds", "knn", "knn_accuracy", "seconds", everyone),
    ]
    losses = grouped(everyone, lambda i: _kind_of_loss(recipes[i].runs[0].config))
    for k, (loss, which) in enumerate(losses.items(), start=1):
        wanted.append((f"loss-{number}-{k}", f"Loss: {loss}", "step", "loss", "epoch", which))
    drawings: dict[str, Drawing] = {}
    for file, title, kind, key, against, which in wanted:
        bands = [spread_of(recipes[i].runs, kind, key, against, names[i], i) for i in which]
        if shown := [band for band in bands if band.places]:
            drawings[file] = (title, functools.partial(draw_bands, shown, title, against))
    return drawings


def spread_of(runs: Sequence[Record], kind: str, key: str, against: str, name: str = "", look: int = 0) -> Band:
    """Return a quantity's mean, least and largest value over runs, at the steps that all of them measured.

    Args:
        runs: Of one recipe.
        kind: Of the lines of metrics.
        key: The quantity.
        against: "epoch" or "seconds", of which the mean over the runs is taken.
        name: Of the recipe.
        look: Number of its colour and stroke.
    """
    by_step = [
        {line["step"]: line for line in run.metrics if line["kind"] == kind and line.get(key) is not None}
        for run in runs
    ]
    steps = sorted(set.intersection(*(set(lines) for lines in by_step)))
    places, values = (
        np.array([[lines[step][what] for step in steps] for lines in by_step], dtype=float) for what in (against, key)
    )
    return Band(
        name, look, *(array.tolist() for array in (places.mean(0), values.mean(0), values.min(0), values.max(0)))
    )


def _kind_of_loss(config: TrainConfig) -> str:
    """Return what makes two losses comparable: the objective with its settings, and what it grows with."""
    is_barlow = config.loss.name == "barlow_twins"
    grows_with = f"width {config.model.projection_dim}" if is_barlow else f"batch {config.global_batch_size}"
    return f"{config.loss.describe()}, {grows_with}"


# ---------------------------------------------------------------------------------------------------------------
# Parts


def grouped(entries: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return the entries by key, in their order."""
    groups: dict[K, list[T]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def frozen(values: Mapping[str, Any]) -> str:
    """Return settings as a key."""
    return json.dumps(values, sort_keys=True)


def _letters(number: int) -> str:
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")


def _shown(value: Any) -> str:
    text = "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{text[:12]}…`" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def cli() -> None:
    """Run :func:`compare` with the options of the command line."""
    host.outlive_readers()
    try:
        with files.explain_refusals():
            print(compare(tyro.cli(CompareConfig, description=__doc__)))
    except ValueError as error:
        sys.exit(f"compare: {error}")


if __name__ == "__main__":
    cli()
