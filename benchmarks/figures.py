"""Draws the figures of results/benchmarks from the JSON files that lie there.

python -m benchmarks.figures
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.common import ROOT

# Okabe and Ito's palette, distinguishable with any colour vision. This project is blue everywhere.
BLUE, GREY = "#0072B2", "#999999"
OTHERS = ["#D55E00", "#009E73", "#CC79A7", "#555555"]
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "lines.linewidth": 1.8,
    "lines.marker": "o",
    "lines.markersize": 4,
    "savefig.dpi": 100,
}


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "benchmarks")
    folder: Path = parser.parse_args().folder
    for name, draw in FIGURES.items():
        path = folder / f"{name}.json"
        if not path.exists():
            print(f"left out, as it was not measured: {path}")
            continue
        with matplotlib.rc_context(STYLE):
            draw(json.loads(path.read_text(encoding="utf-8"))).savefig(
                path.with_suffix(".png"), metadata={"Software": None}
            )
        print(f"written: {path.with_suffix('.png')}")


def pipeline(result: Mapping[str, Any]) -> Figure:
    """Images per second of each pipeline, the fastest on top."""
    rates = {name: one["images_per_second"] for name, one in result["candidates"].items()}
    rates = dict(sorted(rates.items(), key=lambda pair: pair[1]))
    figure = Figure(figsize=(9, 0.6 + 0.36 * len(rates)), layout="constrained")
    axes = figure.subplots()
    # Those that make no two normalised views with colours are not what the others are.
    colours = [BLUE if "fused" in name or "this project" in name else GREY for name in rates]
    bars = axes.barh(list(rates), list(rates.values()), color=colours, height=0.7)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates.values()], padding=3)
    axes.set(xscale="log", xlim=(300, 4 * max(rates.values())), title=f"Images/s: {result['what']}")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def loss(result: Mapping[str, Any]) -> Figure:
    """Time and memory of the losses against the rows."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    time, memory, barlow = figure.subplots(1, 3)
    for axes, cases, quantity, title in (
        (time, result["nt_xent"], milliseconds, "NT-Xent, width 128: ms"),
        (memory, result["nt_xent"], peak, "NT-Xent, width 128: peak MiB"),
        (barlow, result["barlow_twins"], milliseconds, "Barlow Twins, width 2048: ms"),
    ):
        lines: dict[str, dict[int, float]] = {}
        for case in cases:
            for name in case["seconds"]:
                lines.setdefault(name, {})[case["rows"]] = quantity(case, name)
        draw_lines(axes, lines, title, "rows (projections)")
        axes.set_yscale("log")
    return figure


def milliseconds(case: Mapping[str, Any], name: str) -> float:
    """Return the time of a candidate."""
    return float(case["seconds"][name]["median_seconds"] * 1e3)


def peak(case: Mapping[str, Any], name: str) -> float:
    """Return the peak memory of a candidate in MiB."""
    return float(case["peak_mib"][name])


def end_to_end(result: Mapping[str, Any]) -> Figure:
    """Accuracy against seconds from the folder of images."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, side), colour in zip(result["sides"].items(), [BLUE, *OTHERS], strict=False):
        axes.plot(side["seconds"], side["knn_accuracy"], color=colour, label=name)
        if side["seconds_to_accuracy"] is not None:
            axes.axvline(side["seconds_to_accuracy"], color=colour, linestyle=":", linewidth=1, marker="")
    axes.axhline(result["accuracy"], color=GREY, linestyle=":", linewidth=1, marker="")
    axes.set(xlabel="seconds from the folder of images, without measuring", ylabel="validation kNN, %")
    axes.set_title(result["what"], fontsize=9)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def draw_lines(axes: Axes, lines: Mapping[str, Mapping[int, float]], title: str, label: str) -> None:
    """Draw a line for each name, over the values that were measured; this project's in blue."""
    others = iter(OTHERS)
    for name, points in lines.items():
        is_ours = name.startswith("ours")
        axes.plot(list(points), list(points.values()), color=BLUE if is_ours else next(others), label=name)
    values = sorted({value for points in lines.values() for value in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel=label)
    axes.legend(frameon=False, fontsize=8)


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "pipeline": pipeline,
    "loss": loss,
    "end_to_end": end_to_end,
}


if __name__ == "__main__":
    main()
