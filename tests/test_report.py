"""The report holds every deliverable, needs nothing besides itself, and says what must be said."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr import beton, report
from simclr.beton import Facts
from simclr.config import LossConfig, ProbeConfig, TrainConfig
from simclr.evaluation import Candidate, Curve
from simclr.models import ModelConfig
from simclr.report import ProbeResult, Row, Scores, Trial, ViewPairs, figures
from simclr.views import ViewSpec, describe

CLASSES = ("cat", "dog", "a|b", "<frog> & co")


def facts(num_images: int, **changes: Any) -> Facts:
    c = len(changes.get("classes", CLASSES))
    entries: dict[str, Any] = {
        "format_version": 1,
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
        "file_sha256": "f" * 64,
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


def some_pairs() -> ViewPairs:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 32, 32, 3), dtype=np.uint8)
    return ViewPairs(images[0], images[1], images[2], CLASSES)


METRICS: list[dict[str, Any]] = [
    *({"kind": "step", "step": s, "epoch": s / 10, "loss": 6 - s / 50, "learning_rate": 0.1} for s in range(1, 100)),
    *({"kind": "knn", "step": 10 * e, "epoch": e, "knn_accuracy": 40.0 + e} for e in range(1, 10)),
    {"kind": "something new", "step": 1},
]


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: its text, its images, and all that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.images, self.references, self.open = "", 0, [], []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
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
    assert report.write_report(folder, a_result(), some_pairs(), METRICS) == folder / "report.html"
    return folder


def both(folder: Path) -> list[str]:
    """The report's text in both forms, without markup."""
    return [(folder / "report.md").read_text().replace("`", ""), Page((folder / "report.html").read_text()).text]


@pytest.mark.parametrize(
    "deliverable",
    [
        "Final test accuracy 67.31 %",  # the final accuracies after fine-tuning or probing
        "final train accuracy 71.51 %",
        "SimCLR on CIFAR-10",
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
    assert page.images == 4
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in page.text
    assert "url(" not in (written / "report.html").read_text()


def test_markdown_refers_to_figures_that_exist_and_are_pictures(written: Path) -> None:
    files = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (written / "report.md").read_text())
    assert sorted(files) == ["confusion.png", "curves.png", "pairs.png", "pretraining.png"]
    for file in files:
        with Image.open(written / file) as picture:
            picture.load()
            assert picture.width > 600
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


def written_anew(folder: Path, result: ProbeResult, **options: Any) -> str:
    report.write_report(folder, result, options.get("pairs", some_pairs()), options.get("metrics", METRICS))
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
    assert "Barlow Twins on CIFAR-10" in text
    assert "barlow_twins, off-diagonal weight 0.005, centred, times 0.1" in text
    assert "Raw pixels:" not in text
    assert not (tmp_path / "pretraining.png").exists()
    figures.draw_pretraining([line for line in METRICS if line["kind"] == "step"], "barlow_twins")  # kNN not measured


def test_a_hundred_classes_one_epoch_and_divergence_are_drawn(tmp_path: Path) -> None:
    many = tuple(f"a class with a long name {i}" for i in range(100))
    confusion = np.random.default_rng(0).integers(0, 9, (100, 100))
    confusion[5] = 0  # a class without test images
    curves = {
        "train": curve(50, 1),
        "validation": curve(50, 1),
        "test": Curve(np.full((1, 1), np.nan), np.zeros((1, 1))),
    }
    result = a_result(
        train_facts=facts(1000, classes=many), test_facts=facts(400, classes=many), confusion=confusion, curves=curves
    )
    written_anew(tmp_path, result)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.height > 1500  # room for a hundred names


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
