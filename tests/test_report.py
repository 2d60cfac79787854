"""The report holds every deliverable, needs nothing besides itself, and says what must be said."""

from __future__ import annotations

import contextlib
import dataclasses
import html.parser
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import linear_probe
from simclr import beton, report
from simclr.beton import Facts
from simclr.config import LossConfig, ProbeConfig, TrainConfig
from simclr.data import open_images
from simclr.evaluation import Candidate, Curve, Features
from simclr.models import ModelConfig
from simclr.report import Pictures, ProbeResult, Row, Scores, Trial, figures, health, page, pictures
from simclr.report.pictures import Map, Neighbours, ViewPairs
from simclr.system import say_duration
from simclr.views import ViewSpec, describe

CLASSES = ("cat", "dog", "a|b", "<frog> & co")


def facts(num_images: int, **changes: Any) -> Facts:
    c = len(changes.get("classes", CLASSES))
    entries: dict[str, Any] = {
        "source": "CIFAR-10",
        "split": "train",
        "num_images": num_images,
        "height": 32,
        "width": 32,
        "encoding": "raw",
        "jpeg_quality": None,
        "lossy_source": False,
        "classes": CLASSES,
        "class_counts": (num_images // c,) * c,
        "channel_mean": (0.4914, 0.4822, 0.4465),
        "channel_std": (0.2470, 0.2435, 0.2616),
        "content_sha256": f"{num_images:064x}",
        "file_bytes": 1000,
        "tables_sha256": "f" * 64,
        "written_by": {},
    }
    return Facts(**{**entries, **changes})


def curve(start: float, epochs: int) -> Curve:
    fall = np.linspace(0, 1, epochs)[:, None]
    return Curve(loss=2 - fall * start / 100, accuracy=start + 10 * fall)


def a_result(**changes: Any) -> ProbeResult:
    chosen = Candidate(0.1, 1e-4)
    scores = Scores(71.51, 68.41, 67.31, 0.8111, 0.9222, 0.9333, chosen)
    entries: dict[str, Any] = {
        "config": ProbeConfig(run=Path("results/a"), learning_rates=(0.01, 0.1, 1.0), weight_decays=(0.0, 1e-4)),
        "environment": {
            "commit": "feedbeef",
            "command": "linear_probe.py --run results/a",
            "hardware": "2 abaci",
            "python": "3.99",
            "versions": {"torch": "9.8.7"},
            "date": "2031-01-02",
        },
        "checkpoint": Path("results/a/simclr_best_epoch.pt"),
        "pretraining": TrainConfig(view_2=ViewSpec(solarise_probability=0.25)),
        "pretraining_step": 9700,
        "pretraining_epoch": 97,
        "pretraining_knn": 66.66,
        "pretraining_manifest": {
            "environment": {"command": "train_simclr.py cifar10-simclr-100", "commit": "cafe123", "versions": {}}
        },
        "pretraining_facts": facts(1000),
        "train_path": Path("data/train.beton"),
        "test_path": Path("data/test.beton"),
        "train_facts": facts(1000),
        "test_facts": facts(400, split="test"),
        "num_fit": 900,
        "num_labelled": 1000,
        "rows": (
            Row("raw pixels", 3072, 41.01, 40.02, dataclasses.replace(scores, test=39.03), 1.0),
            Row("untrained encoder", 512, 31.04, 30.05, dataclasses.replace(scores, test=29.06), 2.0),
            Row("pretrained encoder", 512, 61.07, 60.08, scores, 3.0),
        ),
        "trials": tuple(
            Trial(Candidate(rate, decay), 50 + 100 * rate * (rate < 1), 1.0 if rate < 1 else math.nan)
            for rate in (0.01, 0.1, 1.0)
            for decay in (0.0, 1e-4)
        ),
        "curves": {"train": curve(61.51, 30), "validation": curve(58.41, 30), "test": curve(57.31, 30)},
        "confusion": np.array([[70, 20, 5, 5], [10, 80, 5, 5], [50, 0, 50, 0], [0, 0, 31, 69]]),
        "chance": 25.0,
        "encoder_sha256": "ab" * 32,
        "seconds": {"in all": 6.5},
    }
    return ProbeResult(**{**entries, **changes})


def some_pictures(num_classes: int = 4, num_points: int = 40) -> Pictures:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(num_points) % num_classes
    return Pictures(
        ViewPairs(images[0], images[1], images[2], CLASSES),
        Neighbours(
            images[0],
            labels[:4],
            images[:, :3].swapaxes(0, 1)[[0, 1, 2, 0]],
            labels[:12].reshape(4, 3),
            np.ones((4, 3)),
        ),
        Map(rng.normal(size=(num_points, 2)), labels, 400, 30.0, 500, 7, 0.875, 1.25),
    )


METRICS: list[dict[str, Any]] = [
    *({"kind": "step", "step": s, "epoch": s / 10, "loss": 6 - s / 50, "learning_rate": 0.1} for s in range(1, 100)),
    *({"kind": "knn", "step": 10 * e, "epoch": e, "knn_accuracy": 40.0 + e} for e in range(1, 10)),
    {"kind": "something new", "step": 1},
]


FIGURES = (
    *("classes", "confusion", "curves-accuracy", "curves-loss", "map", "neighbours-1", "pairs-1"),
    *("pretraining-knn", "pretraining-loss", "pretraining-rate"),
)


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: its text, its images, and all that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.images, self.references, self.open = "", 0, [], []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.images += tag == "img"
        assert tag not in ("script", "link", "iframe", "object")
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert report.write_report(folder, a_result(), some_pictures(), METRICS) == folder / "report.html"
    return folder


def both(folder: Path) -> list[str]:
    """The report's text in both forms, without markup."""
    return [(folder / "report.md").read_text().replace("`", ""), Page((folder / "report.html").read_text()).text]


@pytest.mark.parametrize(
    "deliverable",
    [
        "Final test accuracy 67.31 %",  # the final accuracies after fine-tuning or probing
        "final train accuracy 71.51 %",
        "custom, seed 0: SimCLR with resnet18",  # the run's name, and what was measured
        "SimCLR on CIFAR-10:",
        "nt_xent, temperature 0.5",  # hyperparameters of both stages
        "0.03 per 256 images, so 0.06 at its peak",
        "512 images, two views each",
        "0.1, chosen",
        "0.0001, chosen",
        describe(ViewSpec()),  # augmentations of both stages
        describe(ViewSpec(solarise_probability=0.25)),
        "none: features of the stored images, computed once",
        "diverged",
        "feedbeef",  # commits, versions, hardware, time, commands
        "cafe123",
        "9.8.7",
        "2 abaci",
        "in all 6.5 s",
        "python -m data_prep cifar10\npython train_simclr.py cifar10-simclr-100\npython linear_probe.py --run results",
        f"{1000:064x}",  # checksums of the data
        f"{400:064x}",
        "100 of the 1,000 training images are held out to choose on",  # protocol
        "The test images chose nothing",
        "exp(s / 0.1)",
        "ab" * 32,  # proof of frozenness
        "less the mean training image",  # what raw pixels are
        "one standard error): 2.35 points",  # sqrt(0.6731 * 0.3269 / 400)
        "epoch 97, step 9,700",
        "66.66 %",
        "Commonest mistake: a|b taken for cat (50 of 100 images)",
    ],
)
def test_both_forms_hold_every_deliverable(written: Path, deliverable: str) -> None:
    for text in both(written):
        assert deliverable in text.replace("**", "").replace("\\|", "|")


def test_the_table_of_results_has_every_number(written: Path) -> None:
    expected = [
        ["always the commonest class", "", "", "25.00", "", "", "25.00"],
        ["raw pixels", "3072", "41.01", "40.02", "71.51", "68.41", "39.03"],
        ["untrained encoder", "512", "31.04", "30.05", "71.51", "68.41", "29.06"],
        ["pretrained encoder", "512", "61.07", "60.08", "71.51", "68.41", "67.31"],
    ]
    lines = (written / "report.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| accuracy in %"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 6]]
    assert rows == expected
    page = (written / "report.html").read_text()
    for row in expected:
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in page
    said = report.summary(a_result()).splitlines()
    assert [line.split()[-5:] for line in said[3:]] == [row[2:] for row in expected[1:]]


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    page = Page((written / "report.html").read_text())
    assert page.open == []  # every element is closed
    assert page.images == len(FIGURES)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in page.text
    assert "url(" not in (written / "report.html").read_text()


def test_markdown_refers_to_figures_that_exist_and_are_pictures(written: Path) -> None:
    files = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (written / "report.md").read_text())
    assert sorted(files) == [f"{name}.png" for name in FIGURES]
    for file in files:
        with Image.open(written / file) as picture:
            picture.load()
            assert picture.width == 768  # all panels alike
            assert len(set(picture.convert("L").tobytes())) > 20  # something is drawn


def test_names_cannot_break_the_page_or_a_table(written: Path, tmp_path: Path) -> None:
    page = (written / "report.html").read_text()
    assert "<frog>" not in page
    assert "a|b taken for cat" in page
    odd = facts(1000, source="a|b <i>")
    assert "| source | a\\|b <i> | CIFAR-10 |" in written_anew(tmp_path, a_result(train_facts=odd)).splitlines()
    assert "<td>source</td><td>a|b &lt;i&gt;</td><td>CIFAR-10</td>" in (tmp_path / "report.html").read_text()


def test_json_holds_every_number_and_no_nan(written: Path) -> None:
    result = json.loads((written / "probe.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert result["test_accuracy"] == 67.31
    assert result["trials"][-1] == {
        "candidate": {"learning_rate": 1.0, "weight_decay": 1e-4},
        "accuracy": 50,
        "loss": None,
    }
    assert result["confusion"] == a_result().confusion.tolist()
    assert result["curves"]["test"]["accuracy"] == a_result().curves["test"].accuracy.tolist()
    assert result["config"]["learning_rates"] == [0.01, 0.1, 1.0]
    assert result["pretraining"]["loss"]["temperature"] == 0.5
    assert result["train_facts"]["content_sha256"] == f"{1000:064x}"
    assert result["environment"]["commit"] == "feedbeef"


def written_anew(folder: Path, result: ProbeResult, metrics: Sequence[Any] = METRICS, *, draw: bool = False) -> str:
    """The report's text; its figures are left out unless they are asked for, as drawing them takes seconds."""
    names = {name.split("-")[0] for name in FIGURES} - (set() if metrics else {"pretraining"})
    names = {"curves" if name == "classes" else name for name in names}
    left_out = mock.patch.object(report, "draw_all", return_value={name: [] for name in names})
    with contextlib.nullcontext() if draw else left_out:
        report.write_report(folder, result, some_pictures(len(result.test_facts.classes)), metrics)
    markdown, page = both(folder)
    assert len(page) > 0.5 * len(markdown)
    return markdown


DEMONSTRATION = "This is the demonstration, not a benchmark"


def test_the_built_in_shapes_are_called_a_demonstration_and_nothing_else_is(written: Path, tmp_path: Path) -> None:
    shapes = facts(1000, source="built-in shapes, drawing version 1, seed 0")
    text = written_anew(tmp_path, a_result(train_facts=shapes, test_facts=shapes))
    assert DEMONSTRATION in text
    assert (
        "python -m data_prep cifar10\naccelerate launch train_simclr.py cifar10-simclr-100\npython linear_probe" in text
    )
    assert "python -m data_prep shapes" in text
    assert all(DEMONSTRATION not in other for other in both(written))


def test_lossy_sources_are_said_to_be_lossy(written: Path, tmp_path: Path) -> None:
    said = "re-encoded with loss (JPEG)"
    assert said in written_anew(tmp_path, a_result(train_facts=facts(1000, lossy_source=True)))
    assert all(said not in text for text in both(written))


def test_the_protocol_tells_which_images_chose_the_checkpoint(tmp_path: Path) -> None:
    same = a_result(pretraining=TrainConfig(num_validation=100))
    assert "measured kNN accuracy on the same ones" in written_anew(tmp_path, same)
    other = a_result(pretraining=TrainConfig(num_validation=300))
    assert "chosen by kNN accuracy on 300 of its own 1,000" in written_anew(tmp_path, other)
    assert "not chosen by accuracy" in written_anew(tmp_path, a_result(pretraining_knn=None))


def test_fine_tuning_is_reported_as_such(tmp_path: Path) -> None:
    config = ProbeConfig(run=Path("results/a"), mode="finetune", learning_rates=(0.1,), weight_decays=(1e-4,))
    first, *others = a_result().rows
    rows = (dataclasses.replace(first, classifier=None), *others)
    text = written_anew(tmp_path, a_result(config=config, encoder_sha256=None, rows=rows))
    assert "fine-tuned with labels" in text
    assert "SHA-256 over all" not in text
    assert "Nesterov" in text
    assert describe(config.view) in text
    assert "| raw pixels | 3072 | 41.01 | 40.02 | – | – | – |" in text


def test_barlow_twins_and_runs_without_records_are_reported(tmp_path: Path) -> None:
    result = a_result(
        pretraining=TrainConfig(
            loss=LossConfig(name="barlow_twins", scale=0.1), model=ModelConfig(projector="barlow3")
        ),
        pretraining_manifest=None,
        rows=a_result().rows[-1:],
    )
    text = written_anew(tmp_path, result, metrics=[])
    assert "custom, seed 0: Barlow Twins with resnet18" in text
    assert "barlow_twins, off-diagonal weight 0.005, centred, times 0.1" in text
    assert "Raw pixels:" not in text
    assert "only the accuracies speak" in text
    drawings = figures.pretraining_drawings([line for line in METRICS if line["kind"] == "step"], "barlow_twins")
    assert list(drawings) == ["pretraining-loss", "pretraining-rate"]  # kNN not measured


def test_a_hundred_classes_one_epoch_and_divergence_are_drawn(tmp_path: Path) -> None:
    many = tuple(f"kind {i} with a long name" for i in range(100))
    confusion = np.random.default_rng(0).integers(0, 9, (100, 100))
    confusion[5] = 0  # a class without test images
    confusion[7, 3] = 90
    curves = {
        "train": curve(50, 1),
        "validation": curve(50, 1),
        "test": Curve(np.full((1, 1), np.nan), np.zeros((1, 1))),
    }
    result = a_result(
        train_facts=facts(1000, classes=many), test_facts=facts(400, classes=many), confusion=confusion, curves=curves
    )
    text = written_anew(tmp_path, result)
    assert "classes" not in figures.confusion_drawings(confusion, many)
    rows = [line for line in text.splitlines() if re.match(r"\| kind .* \| \d+ \|$", line)]
    assert len(rows) == 100
    percent = 100 * 90 / confusion[7].sum()
    accuracy = 100 * confusion[7, 7] / confusion[7].sum()
    assert rows[7] == f"| {many[7]} | {accuracy:.1f} | {many[3]} ({percent:.0f} %) | 7 |"
    assert rows[5].split("|")[2:4] == [" – ", " – "]
    drawings = figures.curves_drawings(curves) | figures.confusion_drawings(confusion, many)
    for _, make in drawings.values():
        make().draw_without_rendering()


def test_each_of_a_hundred_classes_has_its_own_colour_and_marker_and_a_place_in_the_legend() -> None:
    points, names = some_pictures(100, 100).map, ["_first", *(f"a kind with number {i}" for i in range(1, 100))]
    assert points is not None
    figure = figures.draw_map(points, names)
    looks = {
        (np.asarray(dots.get_facecolor()).tobytes(), np.asarray(dots.get_paths()[0].vertices).tobytes())
        for dots in figure.axes[0].collections
    }
    assert len(looks) == 100
    legend = figure.legends[0]
    assert [text.get_text().strip() for text in legend.get_texts()] == [figures.shortened(name, 19) for name in names]
    figure.draw_without_rendering()
    place, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= place.x0 < place.x1 <= page.x1
    assert page.y0 <= place.y0 < place.y1 < figure.axes[0].get_window_extent().y0


# ---------------------------------------------------------------------------------------------------------------
# Paper


def test_without_weasyprint_the_way_out_is_named_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(ValueError, match=r"pdf needs WeasyPrint.*pip install 'simclr\[pdf\]'"):
        page.require_pdf()
    with pytest.raises(ValueError, match="pip install"):
        linear_probe.main(ProbeConfig(run=Path("nowhere"), pdf=True))


@pytest.mark.pdf
def test_the_report_is_written_as_pdf(tmp_path: Path) -> None:
    try:
        page.require_pdf()
    except ValueError as missing:  # Pango is not of Python
        pytest.skip(str(missing))
    written_anew(tmp_path, a_result(config=dataclasses.replace(a_result().config, pdf=True)))
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert len(content) > 20_000


# ---------------------------------------------------------------------------------------------------------------
# Names in any script


def test_names_are_written_with_any_font_of_the_list_that_has_their_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # of the fonts that matplotlib brings, only one has this character
    panels: figures.Drawings = {"a": ("", lambda: figures.draw_recall(np.ones(2), ("cat", "\u20dd b")))}
    with pytest.raises(UserWarning, match="missing from font"):
        figures.draw(panels)
    monkeypatch.setattr(figures, "OTHER_SCRIPTS", ("STIXGeneral",))
    figures.draw(panels)  # a glyph that is missing is a warning, and an error here


def test_titles_of_neighbours_do_not_run_into_each_other() -> None:
    names = ("automobile", "a name of many words", "airplane", "Bernese mountain dog")
    query = np.zeros((4, 32, 32, 3), np.uint8)
    others = np.zeros((4, 7, 32, 32, 3), np.uint8)
    found = Neighbours(query, np.arange(4), others, np.arange(28).reshape(4, 7) % 4, np.ones((4, 7)))
    with matplotlib.rc_context(figures.style()):  # type: ignore[arg-type, unused-ignore]
        (_, make) = figures.neighbours_drawings(found, names)["neighbours-1"]
        figure = make()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        assert len(boxes) == 4 * 8
        for start in range(0, len(boxes), 8):
            row = boxes[start : start + 8]
            assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(row))
            assert row[0].x0 >= 0
            assert row[-1].x1 <= figure.bbox.x1


def test_wide_characters_take_two_columns() -> None:
    assert figures.shortened("飞机与汽车", 10) == "飞机与汽车"
    assert figures.shortened("飞机与汽车", 9) == "飞机与汽…"
    assert figures.shortened("airplane", 6) == "airpl…"


# ---------------------------------------------------------------------------------------------------------------
# Neighbours and map


def features_at(angles: Any, labels: Any) -> Features:
    angle = torch.as_tensor(angles, dtype=torch.float32)
    rows = torch.stack([angle.cos(), angle.sin()], dim=1) * (1 + torch.arange(len(angle)))[:, None]
    return Features(rows, torch.as_tensor(labels), torch.arange(len(angle)))


def test_neighbours_are_the_nearest_by_angle_with_their_own_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    train_angles, test_angles = rng.uniform(0, 6, 50), rng.uniform(0, 6, 20)
    images = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None], (50, 8, 8, 3)).copy()
    beton.write(tmp_path / "train.beton", images, np.arange(50) % 4)
    beton.write(tmp_path / "test.beton", images[:20] + 100, np.arange(20) % 4)
    with (
        open_images(tmp_path / "train.beton", backend="memory") as train,
        open_images(tmp_path / "test.beton", backend="memory") as test,
    ):
        bank, queries = features_at(train_angles, np.arange(50) % 4), features_at(test_angles, np.arange(20) % 4)
        found, again, other = (pictures.find_neighbours(train, test, bank, queries, seed=seed) for seed in (3, 3, 4))
    which = found.query[:, 0, 0, 0].astype(int) - 100
    assert len(set(which)) == 8
    nearest = np.argsort(-np.cos(test_angles[which][:, None] - train_angles[None]), axis=1)[:, :5]
    np.testing.assert_array_equal(found.neighbour[:, :, 0, 0, 0], nearest)
    np.testing.assert_array_equal(found.neighbour_label, nearest % 4)
    np.testing.assert_array_equal(found.query_label, which % 4)
    np.testing.assert_array_equal(found.query, again.query)
    assert not np.array_equal(found.query, other.query)


def test_the_map_keeps_groups_apart_and_is_a_function_of_the_seed() -> None:
    labels = np.arange(120) % 3
    features = features_at(2 * labels + np.random.default_rng(0).normal(0, 0.05, 120), labels)
    first, again = (pictures.make_map(features, at_most=90, seed=5) for _ in range(2))
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first.position, again.position)
    assert (len(first.label), first.num_images, first.seed) == (90, 120, 5)
    distance = np.linalg.norm(first.position[:, None] - first.position[None], axis=2) + 1e9 * np.eye(90)
    assert (first.label[distance.argmin(axis=1)] == first.label).all()
    assert first.trustworthiness > 0.9
    assert pictures.make_map(features, at_most=0, seed=5) is None
    assert pictures.make_map(features, at_most=9, seed=5) is None


# ---------------------------------------------------------------------------------------------------------------
# Is it healthy?


def steps(n: int = 40, **changes: Any) -> list[dict[str, Any]]:
    """Lines of a healthy run."""
    lines = []
    for i in range(n):
        line = {
            "kind": "step",
            "step": 10 * (i + 1),
            "epoch": (i + 1) / 10,
            "loss": 6.0 - i / n,
            "learning_rate": 0.1,
            "projection_spread": 0.9,
            "positive_similarity": 0.8,
            "skipped_steps": 0,
            "images_per_second": 1000.0,
            "gradient_norm": 1.0,
            "seconds": 10.0 * (i + 1),
        }
        lines.append(line | {name: change(i) if callable(change) else change for name, change in changes.items()})
    return lines


def knn(*accuracies: float) -> list[dict[str, Any]]:
    return [{"kind": "knn", "step": 1, "epoch": i, "knn_accuracy": a, "seconds": 1} for i, a in enumerate(accuracies)]


def remarks(result: ProbeResult, metrics: list[dict[str, Any]]) -> list[str]:
    return [finding.text for finding in health.findings(result, metrics) if not finding.is_good]


DONE = {"derived": {"total_steps": 400}, "environment": {}, "sessions": []}


@pytest.mark.parametrize(
    ("metrics", "remark"),
    [
        (steps() + knn(50, 60, 61), None),
        (steps(30), "300 of 400 steps were taken: the run did not reach its end"),
        (steps(loss=6.93), "loss went from 6.930 .* to 6.930"),
        (steps(projection_spread=lambda i: 0.9 - i / 45), "^Collapsed: the projections' spread is 0.07"),
        (steps(projection_spread=0.3), "^Near collapse: .* 0.30"),
        (steps(skipped_steps=lambda i: i == 7), "^1 of 400 steps were left out"),
        (steps(images_per_second=lambda i: 100.0 if i % 5 == 0 and i else 1000.0), r"^Uneven speed: 7 of 39 lines"),
        (steps() + knn(50, 90, 60), "but was 90.00 % at epoch 1: it fell"),
        (steps() + knn(50, 49), "Validation kNN went from 50.00 % .* to 49.00 %"),
    ],
)
def test_each_illness_is_remarked_on_and_health_is_not(metrics: list[dict[str, Any]], remark: str | None) -> None:
    found = remarks(a_result(pretraining_manifest=DONE), metrics)
    assert len(found) == (remark is not None)
    assert remark is None or re.search(remark, found[0])


def test_an_encoder_that_beats_nothing_is_remarked_on() -> None:
    rows = list(a_result().rows)
    assert rows[2].classifier is not None
    rows[1] = dataclasses.replace(rows[1], classifier=dataclasses.replace(rows[2].classifier, test=65.0))
    (found,) = remarks(a_result(rows=tuple(rows), pretraining_manifest=DONE), steps())
    assert "does not beat the untrained encoder on the test images: 67.31 % and 65.00 %" in found
    # twice the root of the sum of both variances, over 400 images
    assert f"{2 * math.sqrt((67.31 * 32.69 + 65 * 35) / 400):.2f} points" in found


def test_the_top_of_the_report_says_how_the_run_is(tmp_path: Path) -> None:
    well = written_anew(tmp_path, a_result(pretraining_manifest=DONE), steps(), draw=False)
    assert "Yes, by all 7 signs that were measured." in well
    assert "Pretraining took 6 min 40 s" in well
    ill = written_anew(tmp_path, a_result(pretraining_manifest=DONE), steps(projection_spread=0.01))
    assert "Not in every respect: 1 of 7 measured signs asks for a look." in ill
    assert ill.index("Is this run healthy") < ill.index("**Look:** Collapsed") < ill.index("## Results")


def test_durations_in_words() -> None:
    said = {7.25: "7.2 s", 59.99: "60.0 s", 400: "6 min 40 s", 7260: "2 h 01 min"}
    assert {seconds: say_duration(seconds) for seconds in said} == said


def test_own_photographs_are_not_compared_with_published_numbers(written: Path, tmp_path: Path) -> None:
    own = facts(1000, source="image folder photos", lossy_source=True)
    text = written_anew(tmp_path, a_result(train_facts=own, test_facts=own, pretraining_facts=own))
    assert "published" not in text
    assert "SimCLR on image folder photos" in text


@pytest.mark.parametrize(("rate", "said"), [(0.01, "smallest"), (0.1, None), (1.0, "largest")])
def test_a_choice_at_the_grids_edge_is_pointed_out(rate: float, said: str | None) -> None:
    remark = report.at_edge(a_result().config, Candidate(rate, 0.0))
    assert (remark is None) == (said is None)
    assert said is None or (remark is not None and said in remark and "--learning-rates" in remark)


def test_sidecar_facts_are_what_beton_writes(tmp_path: Path) -> None:
    """The facts made up here have the fields of real ones."""
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    real = beton.write(tmp_path / "a.beton", images, np.arange(8) % 4)
    assert [type(value) for value in vars(facts(8)).values()] == [type(value) for value in vars(real).values()]
