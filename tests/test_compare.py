"""Runs are compared by recipe with their spread, and what does not compare is not ranked together."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr.config import ProbeConfig, TrainConfig, to_json
from simclr.report import compare, figures
from simclr.report.compare import CompareConfig
from simclr.report.results import to_plain
from tests.test_report import Page, a_result, facts

STEPS = 40


def write_run(
    folder: Path,
    accuracies: list[float],
    *,
    config: TrainConfig,
    data: int = 1000,
    tested: dict[str, float] | None = None,
    steps: int = STEPS,
    hardware: str = "2 abaci",
    seconds: float = 10.0,
) -> Path:
    """A run's folder as pretraining and the probe leave it; ``tested``: by the folder of the evaluation."""
    folder.mkdir(parents=True)
    manifest = {
        "environment": {"hardware": hardware, "commit": "cafe" * 10, "date": "2031-01-02"},
        "derived": {"total_steps": STEPS, "world_size": 1},
        "config": json.loads(to_json(dataclasses.replace(config, num_validation=100))),
        "facts": json.loads(to_json(facts(data))),
        "sessions": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines: list[dict[str, Any]] = [
        {"kind": "step", "step": s, "epoch": s / 10, "loss": 5 - s / STEPS, "images_per_second": 100.0, "seconds": s}
        for s in range(10, steps + 1, 10)
    ]
    lines += [
        {"kind": "knn", "step": 10 * i, "epoch": i, "knn_accuracy": a, "seconds": seconds * i}
        for i, a in enumerate(accuracies, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, accuracy in (tested or {}).items():
        result = a_result()
        scores = dataclasses.replace(result.scores, test=accuracy)
        row = dataclasses.replace(result.trained, classifier=scores, knn_test=accuracy - 5)
        (folder / name).mkdir()
        (folder / name / "probe.json").write_text(json.dumps(to_plain(dataclasses.replace(result, rows=(row,)))))
    return folder


def table(folder: Path) -> list[list[str]]:
    """The cells of the Markdown file's table, without the line below the header."""
    lines = [line for line in (folder / "compare.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def compared(folder: Path, *runs: Path) -> tuple[str, list[list[str]]]:
    page = compare.compare(CompareConfig(runs, folder))
    assert page == folder / "compare.html"
    return (folder / "compare.md").read_text(), table(folder)


A, B = TrainConfig(name="a"), TrainConfig(name="b", epochs=50)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one recipe, and one run of a better one; all evaluated in the same way."""
    place = tmp_path_factory.mktemp("three")
    for seed, (last, tested) in enumerate([(60.0, 70.0), (64.0, 73.0)]):
        config = dataclasses.replace(A, seed=seed)
        write_run(place / f"a{seed}", [50.0, 66.5, last], config=config, tested={"probe-linear": tested})
    write_run(place / "b", [40.0, 80.0], config=B, tested={"probe-linear": 90.0}, seconds=3.0)
    compare.compare(CompareConfig((place / "a0", place / "a1", place / "b"), place / "out"))
    return place


def test_seeds_are_one_row_with_their_spread_and_the_best_stands_first(three: Path) -> None:
    def spread(*values: float) -> str:
        return f"{statistics.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"

    assert table(three / "out") == [
        ["run", "seeds", "steps", "time", "kNN val.", "evaluation", "kNN test", "test"],
        ["b", "0", "40", "40.0 s", "80.00", "linear", "85.00", "90.00"],
        ["a", "0, 1", "40", "40.0 s", spread(60, 64), "linear", spread(65, 68), spread(70, 73)],
    ]


def test_what_differs_is_told_and_what_does_not_is_not(three: Path) -> None:
    text = (three / "out" / "compare.md").read_text()
    assert f"- **a** (`{three / 'a0'}`, `{three / 'a1'}`), epochs 100\n- **b** (`{three / 'b'}`), epochs 50\n" in text
    assert "Not one ranking" not in text


def test_the_page_holds_its_figure_and_the_same_table(three: Path) -> None:
    text = (three / "out" / "compare.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert page.images == 1
    assert "](knn-epochs.png)" in (three / "out" / "compare.md").read_text()
    assert (three / "out" / "knn-epochs.png").read_bytes().startswith(b"\x89PNG")
    for row in table(three / "out")[1:]:
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in text


def test_lines_are_means_and_ranges_at_the_steps_that_all_seeds_measured(tmp_path: Path) -> None:
    runs = [
        compare.read_run(write_run(tmp_path / str(i), values, config=A))
        for i, values in enumerate([[50.0, 60.0, 70.0], [54.0, 68.0]])
    ]
    band = compare.spread_of(compare.Recipe("_a", tuple(runs)), 0)
    assert (band.places, band.mean, band.least, band.largest) == ([1, 2], [52, 64], [50, 60], [54, 68])
    figure = figures.draw_bands([band], "t", "epoch")
    (line,) = figure.axes[0].lines
    assert [np.asarray(values).tolist() for values in line.get_data()] == [[1, 2], [52, 64]]
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_a"]
    assert len(figure.axes[0].collections) == 1  # the range


def test_other_images_and_other_protocols_have_letters_of_their_own_and_it_is_said(tmp_path: Path) -> None:
    probe = {"probe-linear": 70.0}
    same = write_run(tmp_path / "same", [50.0], config=A, tested=probe)
    longer = dataclasses.replace(a_result().config, epochs=7)
    other_protocol = write_run_with(tmp_path / "longer", B, longer)
    other_images = write_run(tmp_path / "images", [99.0], config=A, data=2000)
    text, (_, *rows) = compared(tmp_path / "out", same, other_protocol, other_images)
    assert [(row[0], row[4], row[7]) for row in rows] == [
        ("a (a)", "50.00 (a)", "70.00 (a)"),
        ("b", "51.00 (a)", "67.31 (b)"),
        ("a (b)", "99.00 (b)", "–"),
    ]
    assert "**Not one ranking:** kNN val. of another letter is of other images" in text
    assert "in another way, and do not compare; the ways differ in epochs." in text


def write_run_with(folder: Path, config: TrainConfig, probe: ProbeConfig) -> Path:
    """A run that was evaluated with other settings."""
    write_run(folder, [51.0], config=config)
    (folder / "probe-linear").mkdir()
    (folder / "probe-linear" / "probe.json").write_text(json.dumps(to_plain(a_result(config=probe))))
    return folder


def test_settings_that_change_no_number_do_not_part_runs(tmp_path: Path) -> None:
    free = dataclasses.replace(A, output=Path("elsewhere"), seed=4, log_every_steps=3)
    config = dataclasses.replace(a_result().config, baselines=False, seed=9, map_points=5)
    one = write_run(tmp_path / "one", [50.0], config=A, tested={"probe-linear": 70.0})
    _, rows = compared(tmp_path / "out", one, write_run_with(tmp_path / "two", free, config))
    assert [row[:2] for row in rows[1:]] == [["a", "0, 4"]]


def test_a_run_that_was_cut_off_is_no_seed_of_a_whole_one(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", [50.0], config=A)
    cut = write_run(tmp_path / "cut", [10.0], config=dataclasses.replace(A, seed=1), steps=20)
    _, rows = compared(tmp_path / "out", whole, cut)
    assert {row[0]: row[1] for row in rows[1:]} == {"a (a)": "0", "a (b), cut off at step 20 of 40": "1"}


def test_times_of_different_hardware_are_remarked_on(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), [50.0], config=A, hardware=f"{i} abaci") for i in range(2)]
    text, _ = compared(tmp_path / "out", *runs)
    assert "Times are of different hardware, and do not compare: 0 abaci; 1 abaci." in text


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    def refused(message: str, *runs: Path) -> None:
        with pytest.raises(ValueError, match=message):
            compare.compare(CompareConfig(runs, tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    run = write_run(tmp_path / "run", [50.0], config=A, tested={"probe-linear": 70.0})
    refused("no run was named")
    refused("nowhere is not there", tmp_path / "nowhere")
    refused("holds no run, as it has no manifest.json", tmp_path)
    refused("is named twice", run, tmp_path / "run")
    whole = json.loads((run / "probe-linear" / "probe.json").read_text())
    (run / "probe-linear" / "probe.json").write_text("{}")
    refused(r"probe\.json is no evaluation's result: KeyError\('schema'\)", run)
    (run / "probe-linear" / "probe.json").write_text(json.dumps(whole | {"train_facts": {}}))
    refused(r"probe\.json is no evaluation's result: KeyError\('content_sha256'\)", run)
    (run / "manifest.json").write_text('{"sessions": []}')
    refused(r"manifest\.json does not tell what was run: KeyError\('config'\)", run)
