"""The evaluation from end to end: what chooses, what is saved, what is reported, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import linear_probe
from simclr import beton, evaluation, report
from simclr.config import ProbeConfig, TrainConfig, to_json
from simclr.data import few_labels, validation_split
from simclr.models import SimCLR
from simclr.run import checkpoint, probe
from tests.runs import SMALL, is_equal

SIDE, NUM_TRAIN, NUM_TEST, NUM_VALIDATION = 16, 120, 60, 40
CLASSES = ("red", "green", "blue")
RATES, DECAYS = (0.01, 0.1, 0.3), (0.0, 1e-3)


def coloured(n: int, seed: int, classes: int = 3) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise with a faint colour that tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    images = rng.normal(128, 50, (n, SIDE, SIDE, 3)) + 20 * np.eye(3)[labels % 3][:, None, None]
    return images.clip(0, 255).astype(np.uint8), labels


def write(path: Path, n: int, seed: int, **changes: Any) -> beton.Facts:
    images, labels = coloured(n, seed)
    return beton.write(path, images, changes.pop("labels", labels), **{"classes": CLASSES, **changes})


def write_run(folder: Path, data: Path, facts: beton.Facts) -> None:
    """A run as pretraining leaves it; its encoder is a random one with used batch normalisation."""
    folder.mkdir()
    config = TrainConfig(data=data, model=SMALL, seed=5, num_validation=NUM_VALIDATION, epochs=2, global_batch_size=32)
    torch.manual_seed(6)
    model = SimCLR(SMALL, SIDE)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, SIDE, SIDE))
    payload = checkpoint.model_payload(
        model=model,
        config=to_json(config),
        facts=to_json(facts),
        step=6,
        epoch=2,
        knn_accuracy=41.5,
        best_knn_accuracy=41.5,
    )
    checkpoint.save_atomically(folder / checkpoint.BEST, payload)
    lines: list[dict[str, Any]] = [
        {"kind": "step", "step": s, "epoch": s / 3, "loss": 3 - s / 6, "learning_rate": 0.1, "seconds": s}
        for s in range(1, 7)
    ]
    lines.append({"kind": "knn", "step": 6, "epoch": 2, "knn_accuracy": 41.5, "seconds": 7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = {
        "commit": "0123abc",
        "command": "train_simclr.py tiny --seed 5",
        "hardware": "an abacus",
        "versions": {},
    }
    (folder / "manifest.json").write_text(json.dumps({"environment": environment, "sessions": []}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/train.beton, data/test.beton and a pretraining run."""
    place = tmp_path_factory.mktemp("place")
    (place / "data").mkdir()
    facts = write(place / "data" / "train.beton", NUM_TRAIN, seed=0)
    write(place / "data" / "test.beton", NUM_TEST, seed=1, split="test")
    write_run(place / "run", place / "data" / "train.beton", facts)
    return place


@pytest.fixture(autouse=True)
def _figures_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes seconds; the outcome below has them."""
    names = ("curves", "confusion", "pairs", "neighbours")
    monkeypatch.setattr(report, "draw_all", lambda *_: {name: [] for name in names})


def settings(place: Path, output: Path | None, **changes: Any) -> ProbeConfig:
    defaults: dict[str, Any] = {
        "learning_rates": RATES,
        "weight_decays": DECAYS,
        "epochs": 5,
        "batch_size": 32,
        "num_validation": NUM_VALIDATION,
        "knn_neighbours": 5,
        "loader": "memory",
        "map_points": 0,
    }
    return ProbeConfig(run=place / "run", output=output, **{**defaults, **changes})


def numbers(report: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"probe.json holds {constant}, which is no JSON")

    result: dict[str, Any] = json.loads((report.parent / "probe.json").read_text(), parse_constant=refuse)
    return result


def test_results_lie_beside_the_run_by_kind_and_replacing_them_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = write(tmp_path / "train.beton", NUM_TRAIN, seed=0)
    write(tmp_path / "test.beton", NUM_TEST, seed=1)
    write_run(tmp_path / "run", tmp_path / "train.beton", facts)
    runs: list[tuple[dict[str, Any], bool]] = [
        ({}, False),
        ({"features": "augmented"}, False),
        ({"mode": "finetune", "learning_rates": (0.1,)}, False),
        ({}, True),
    ]
    for changes, replaces in runs:
        linear_probe.main(settings(tmp_path, None, baselines=False, epochs=1, **changes))
        assert ("replaces the earlier evaluation" in capsys.readouterr().out) == replaces
    folders = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert folders == {"probe-linear", "probe-linear-augmented", "probe-finetune"}


@pytest.fixture(scope="module")
def outcome(place: Path) -> Path:
    """The report of the standard evaluation."""
    return linear_probe.main(settings(place, place / "out", map_points=2000))


def test_everything_that_was_promised_is_written(outcome: Path) -> None:
    promised = {"simclr_lin_best.pt", "probe.json", "report.md", "report.html"}
    promised |= {f"{name}.png" for name in ("confusion", "classes", "map", "pretraining-loss", "pretraining-knn")}
    promised |= {f"{name}.png" for name in ("pretraining-rate", "curves-loss", "curves-accuracy")}
    promised |= {f"{name}-{i}.png" for name in ("pairs", "neighbours") for i in (1, 2)}
    assert {path.name for path in outcome.parent.iterdir()} == promised


def test_all_three_representations_are_measured(outcome: Path) -> None:
    rows = numbers(outcome)["rows"]
    assert [row["name"] for row in rows] == ["raw pixels", "untrained encoder", "pretrained encoder"]
    assert [row["width"] for row in rows] == [3 * SIDE * SIDE, 32, 32]
    for row in rows:
        assert 0 < row["knn_test"] <= 100
        assert row["classifier"]["test"] > 100 / 3  # the colour tells the class, and every one of them sees it
    assert rows[1]["classifier"] != rows[2]["classifier"]


def test_the_saved_classifier_gives_the_reported_accuracies_on_stored_pixels(place: Path, outcome: Path) -> None:
    result = numbers(outcome)
    classifier = checkpoint.load_classifier(outcome.parent)
    assert classifier.classes == CLASSES
    for split, n in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        images, labels = beton.read(place / "data" / f"{split}.beton")
        with torch.no_grad():
            predicted = classifier(torch.from_numpy(images)).argmax(dim=1).numpy()
        accuracy = 100 * np.mean(predicted == labels)
        assert result["rows"][-1]["classifier"][split] == pytest.approx(accuracy, abs=100 / n + 1e-9)  # one near tie
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (labels, predicted), 1)
    assert np.abs(np.array(result["confusion"]) - confusion).sum() <= 2
    assert np.trace(result["confusion"]) / NUM_TEST == pytest.approx(result["test_accuracy"] / 100)


def test_images_are_read_at_the_side_that_validation_images_choose(place: Path, tmp_path: Path) -> None:
    sides = (8, 16, 24)
    alone = {}
    for side in sides:
        report = linear_probe.main(settings(place, tmp_path / str(side), baselines=False, image_sizes=(side,)))
        alone[side] = numbers(report)["rows"][-1]
    assert len({row["knn_validation"] for row in alone.values()}) > 1
    report = linear_probe.main(settings(place, tmp_path / "chosen", baselines=False, image_sizes=sides))
    best = max(sides, key=lambda side: alone[side]["knn_validation"])
    chosen = numbers(report)["rows"][-1]
    assert chosen == {**alone[best], "seconds": chosen["seconds"]}
    assert f"resized to a side of {best} pixels" in " ".join((report.parent / "report.md").read_text().split())
    # The saved classifier reads images at that side by itself
    classifier = checkpoint.load_classifier(report.parent)
    assert classifier.size == best
    images, labels = coloured(NUM_TEST, seed=1)
    with torch.inference_mode():
        right = classifier(torch.from_numpy(images)).argmax(dim=1).numpy() == labels
    assert 100 * right.mean() == pytest.approx(chosen["classifier"]["test"])


def test_a_side_whose_edge_is_never_read_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads 8 of the 9 rows"):
        linear_probe.main(settings(place, tmp_path / "out", image_sizes=(9,)))


@pytest.mark.parametrize("changes", [{"mode": "finetune"}, {"features": "augmented"}])
def test_views_have_the_side_of_the_stored_images(place: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"image_sizes is \(8,\), expected none"):
        settings(place, None, image_sizes=(8,), **changes)


def test_the_encoder_in_the_file_is_the_pretrained_one(place: Path, outcome: Path) -> None:
    pretrained = checkpoint.load_pretrained(place / "run")
    saved = checkpoint.load_classifier(outcome.parent)
    before = evaluation.fingerprint(pretrained.model.encoder)
    assert evaluation.fingerprint(saved.encoder) == before
    assert numbers(outcome)["encoder_sha256"] == evaluation.combined_sha256(before)
    assert numbers(outcome)["encoder_sha256"] in outcome.read_text()


def test_an_encoder_that_moves_during_the_probe_stops_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = linear_probe.choose_and_fit

    def meddling(opened: probe.Probe, *arguments: Any) -> linear_probe.Fitted:
        next(opened.pretrained.model.encoder.buffers()).add_(1e-3)
        return honest(opened, *arguments)

    monkeypatch.setattr(linear_probe, "choose_and_fit", meddling)
    with pytest.raises(RuntimeError, match="not frozen"):
        linear_probe.main(settings(place, tmp_path, baselines=False))
    assert not (tmp_path / checkpoint.CLASSIFIER).exists()


def test_the_untrained_encoder_is_the_pretrainings_own_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[nn.Module] = []
    honest = linear_probe.measure_encoder

    def remembering(opened: probe.Probe, name: str, encoder: nn.Module) -> linear_probe.Measured:
        measured.append(encoder)
        return honest(opened, name, encoder)

    monkeypatch.setattr(linear_probe, "measure_encoder", remembering)
    with probe.open_probe(settings(place, place / "baselines", epochs=1)) as opened:
        names = [row.name for row in linear_probe.measure_baselines(opened)]
    assert names == ["raw pixels", "untrained encoder"]
    torch.manual_seed(5)  # the run's seed
    assert evaluation.fingerprint(measured[0]) == evaluation.fingerprint(SimCLR(SMALL, SIDE).encoder)


def test_pixels_are_normalised_as_in_pretraining_then_centred_by_the_mean_training_image(
    place: Path, tmp_path: Path
) -> None:
    with probe.open_probe(settings(place, tmp_path)) as opened:
        found = linear_probe.pixels(opened)
        mean, std = np.array(opened.pretrained.facts.normalisation)
        files = [beton.read(source.path) for source in (opened.train, opened.test)]
    expected = [((images / 255 - mean) / std).transpose(0, 3, 1, 2).reshape(len(images), -1) for images, _ in files]
    for features, pixels, (_, labels) in zip(found, expected, files, strict=True):
        np.testing.assert_allclose(features.representation, pixels - expected[0].mean(axis=0), atol=1e-5)
        assert features.label.tolist() == labels.tolist()


@pytest.mark.parametrize(
    "changes",
    [{}, {"features": "augmented"}, {"mode": "finetune", "epochs": 2}],
    ids=["cached", "augmented", "finetune"],
)
def test_the_test_set_chooses_nothing(place: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    images, labels = beton.read(place / "data" / "test.beton")
    shuffled = np.random.default_rng(3).permutation(labels)
    beton.write(tmp_path / "shuffled.beton", images, shuffled, classes=CLASSES, split="test")
    reports = [
        linear_probe.main(settings(place, tmp_path / name, test=test, baselines=False, **changes))
        for name, test in (("true", None), ("false", tmp_path / "shuffled.beton"))
    ]
    true, false = (numbers(report) for report in reports)
    assert true["test_accuracy"] != false["test_accuracy"]
    assert true["trials"] == false["trials"]
    assert true["rows"][0]["classifier"]["chosen"] == false["rows"][0]["classifier"]["chosen"]
    weights = [evaluation.fingerprint(checkpoint.load_classifier(report.parent)) for report in reports]
    assert weights[0] == weights[1]


def test_validation_labels_choose_but_do_not_train(place: Path, tmp_path: Path, outcome: Path) -> None:
    """Other validation labels change the trials' accuracies, and no weight of the fit that they measure."""
    images, labels = beton.read(place / "data" / "train.beton")
    _, validation = validation_split(NUM_TRAIN, NUM_VALIDATION)
    labels[validation] = (labels[validation] + 1) % 3
    beton.write(tmp_path / "train.beton", images, labels, classes=CLASSES)
    config = settings(place, tmp_path / "out", train=tmp_path / "train.beton", test=place / "data" / "test.beton")
    other = numbers(linear_probe.main(dataclasses.replace(config, baselines=False)))
    before = numbers(outcome)
    assert [t["accuracy"] for t in other["trials"]] != [t["accuracy"] for t in before["trials"]]
    # the highest validation accuracy was chosen, as listed
    for result in (other, before):
        best = max(result["trials"], key=lambda trial: (trial["accuracy"], -trial["loss"]))
        assert result["rows"][-1]["classifier"]["chosen"] == best["candidate"]
        assert result["rows"][-1]["classifier"]["validation"] == best["accuracy"]


def test_augmented_features_give_another_classifier_and_the_same_knn(
    place: Path, tmp_path: Path, outcome: Path
) -> None:
    other = numbers(linear_probe.main(settings(place, tmp_path, features="augmented", baselines=False)))
    before = numbers(outcome)["rows"][-1]
    assert other["rows"][0]["knn_test"] == before["knn_test"]
    assert other["rows"][0]["classifier"]["train_loss"] != before["classifier"]["train_loss"]
    assert "crop 0.5 to 1 of the area" in (tmp_path / "report.md").read_text()


def test_fine_tuning_saves_the_whole_tuned_model(place: Path, tmp_path: Path) -> None:
    report = linear_probe.main(settings(place, tmp_path, mode="finetune", epochs=3, learning_rates=(0.05,)))
    result = numbers(report)
    assert [row["classifier"] is None for row in result["rows"]] == [True, False, False]
    assert result["encoder_sha256"] is None
    pretrained = checkpoint.load_pretrained(place / "run")
    tuned = checkpoint.load_classifier(report.parent)
    assert evaluation.fingerprint(tuned.encoder) != evaluation.fingerprint(pretrained.model.encoder)
    images, labels = beton.read(place / "data" / "test.beton")
    with torch.no_grad():
        right = (tuned(torch.from_numpy(images)).argmax(dim=1).numpy() == labels).mean()
    assert result["test_accuracy"] == pytest.approx(100 * right, abs=100 / NUM_TEST + 1e-9)


def test_the_console_shows_all_numbers_and_the_report(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = linear_probe.main(settings(place, tmp_path))
    said = capsys.readouterr().out
    assert "replaces" not in said
    assert str(report) in said
    assert "120 training images = 80 to fit + 40 to choose on" in said
    assert "3 learning rates x 2 weight decays = 6" in said
    for row in numbers(report)["rows"]:
        line = next(line for line in said.splitlines()[-9:] if line.startswith(row["name"]))
        scores = row["classifier"]
        values = (row["knn_validation"], row["knn_test"], scores["train"], scores["validation"], scores["test"])
        assert [f"{value:.2f}" for value in values] == line.split()[-5:]


# ---------------------------------------------------------------------------------------------------------------
# Refusals, each before anything is computed or written


def refused(config: ProbeConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        linear_probe.main(config)
    assert config.output is not None
    assert not config.output.exists()


def test_a_missing_or_wrong_run_is_refused(place: Path, tmp_path: Path) -> None:
    config = settings(place, tmp_path / "out")
    refused(dataclasses.replace(config, run=tmp_path / "none"), "no checkpoint at .*none")
    refused(dataclasses.replace(config, run=place / "data"), "holds no simclr_best_epoch.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    refused(dataclasses.replace(config, run=tmp_path / "junk.pt"), "junk.pt is damaged or no checkpoint")


def test_a_classifier_is_no_pretrained_encoder(place: Path, tmp_path: Path, outcome: Path) -> None:
    config = settings(place, tmp_path / "out")
    refused(dataclasses.replace(config, run=outcome.parent / checkpoint.CLASSIFIER), "is no pretrained model")


def test_missing_images_are_named_with_the_option(place: Path, tmp_path: Path) -> None:
    refused(settings(place, tmp_path / "out", train=tmp_path / "a.beton"), r"a\.beton is not there; .*--train")
    refused(settings(place, tmp_path / "out", test=tmp_path / "b.beton"), r"no test images at .*b\.beton.*--test")


def test_a_training_file_that_changed_since_pretraining_is_refused_until_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = tmp_path / "data" / "train.beton"
    write_run(tmp_path / "run", data, write(data, NUM_TRAIN, seed=0))
    write(data, NUM_TRAIN, seed=2)
    write(tmp_path / "data" / "test.beton", NUM_TEST, seed=1)
    refused(settings(tmp_path, tmp_path / "out"), "is not the file that was pretrained on.*name it with --train")
    report = linear_probe.main(settings(tmp_path, tmp_path / "out", train=data, baselines=False))
    assert "Measured on another file than pretrained on" in report.read_text()


def test_data_that_do_not_fit_are_refused(place: Path, tmp_path: Path) -> None:
    out, train = tmp_path / "out", place / "data" / "train.beton"
    images, labels = coloured(NUM_TEST, seed=1)
    beton.write(tmp_path / "small.beton", images[:, :8, :8].copy(), labels, classes=CLASSES)
    refused(settings(place, out, test=tmp_path / "small.beton"), r"8 x 8 pixels, but .* pretrained on 16 x 16.*--test")
    labels[::2] = -1
    beton.write(tmp_path / "half.beton", images, labels, classes=CLASSES)
    refused(settings(place, out, test=tmp_path / "half.beton"), r"has 30 images without a label.*--test")
    write(tmp_path / "renamed.beton", NUM_TEST, seed=1, classes=("red", "green", "cyan"))
    refused(settings(place, out, test=tmp_path / "renamed.beton"), r"classes differ.*'blue'.*'cyan'")
    write(tmp_path / "one.beton", NUM_TEST, seed=1, labels=np.zeros(NUM_TEST, int), classes=("red",))
    refused(settings(place, out, test=tmp_path / "one.beton"), "one class only, 'red'.*--test")
    refused(settings(place, out, test=train), r"120 of the 120 test images \(100.0 %\) .* are also training images")


def test_training_images_among_the_test_images_are_counted_and_too_many_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on, labels = beton.read(place / "data" / "train.beton")
    images, test_labels = coloured(NUM_TEST, seed=1)
    for number in (6, 7):  # of 60: 10 % pass
        images[::-1][:number], test_labels[::-1][:number] = trained_on[90 : 90 + number], labels[90 : 90 + number]
        beton.write(tmp_path / f"{number}.beton", images, test_labels, classes=CLASSES)
    refused(settings(place, tmp_path / "out", test=tmp_path / "7.beton"), r"7 of the 60 test images \(11.7 %\)")
    report = linear_probe.main(settings(place, tmp_path / "out", test=tmp_path / "6.beton", baselines=False, epochs=1))
    said = "6 of the 60 test images (10.0 %) are also training images, pixel by pixel."
    assert said in report.with_name("report.md").read_text()
    assert said in capsys.readouterr().out


def test_settings_that_do_not_fit_are_refused(place: Path, tmp_path: Path) -> None:
    refused(settings(place, tmp_path / "out", num_validation=118), r"leaves 2 of the 120 .* use --num-validation 12$")
    both = settings(place, tmp_path / "out", num_validation=500, knn_neighbours=119)
    refused(both, r"num_validation 500 leaves 0 .* use --num-validation 12, --knn-neighbours 108$")
    neighbours = settings(place, tmp_path / "out", num_validation=None, knn_neighbours=119)
    refused(neighbours, r"num_validation 40 leaves 80 .* use --num-validation 12, --knn-neighbours 108$")
    with pytest.raises(ValueError, match=r"learning_rates\[1\] is 0\.0, expected > 0"):
        settings(place, tmp_path, learning_rates=(0.1, 0.0))
    with pytest.raises(ValueError, match="momentum is 1"):
        settings(place, tmp_path, momentum=1.0)


def test_what_is_not_given_follows_the_run_and_the_images(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sizes_of(**changes: Any) -> list[int]:
        config = settings(place, tmp_path / "out", num_validation=None, knn_neighbours=None, baselines=False, **changes)
        used = numbers(linear_probe.main(dataclasses.replace(config, epochs=1)))["config"]
        return [used[name] for name in ("num_validation", "knn_neighbours", "batch_size")]

    assert sizes_of(batch_size=32) == [NUM_VALIDATION, 20, 32]  # the run's
    assert "kNN:        20 neighbours" in capsys.readouterr().out
    few = tmp_path / "few.beton"
    write(few, 14, seed=5)
    assert sizes_of(train=few, test=place / "data" / "test.beton", batch_size=32) == [1, 13, 14]
    assert "kNN:        13 neighbours; classifier: batches of 14" in capsys.readouterr().out


def test_the_candidates_depend_on_the_mode() -> None:
    linear, tuned = (ProbeConfig(run=Path("r"), mode=mode) for mode in ("linear", "finetune"))
    assert len(linear.learning_rates) * len(linear.weight_decays) == 24
    assert tuned.learning_rates != linear.learning_rates
    assert ProbeConfig(run=Path("r"), learning_rates=(0.5,)).learning_rates == (0.5,)


def test_the_command_line_refuses_unknown_options_and_says_what_is_wrong(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["linear_probe.py", "--run", str(place / "run"), "--epoch", "3"])
    with pytest.raises(SystemExit) as stop:
        linear_probe.cli()
    assert stop.value.code not in (0, None)
    assert "--epoch" in "".join(capsys.readouterr())
    monkeypatch.setattr("sys.argv", ["linear_probe.py", "--run", str(place / "nowhere")])
    with pytest.raises(SystemExit, match=r"no checkpoint at .*nowhere"):
        linear_probe.cli()


def test_several_processes_are_told_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["linear_probe.py", "--run", "results/a b"])
    with pytest.raises(
        SystemExit, match=r"one process, but 2 were started\. Use: python linear_probe\.py --run 'results/a b'"
    ):
        linear_probe.cli()


def test_pixels_too_large_to_hold_are_left_out_aloud(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "LARGEST_PIXEL_FEATURES", 1000)
    result = numbers(linear_probe.main(settings(place, tmp_path)))
    assert [row["name"] for row in result["rows"]] == ["untrained encoder", "pretrained encoder"]
    assert "raw pixels are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "told mixed precision bf16, but precision is fp32; .* from --precision"),
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP=true"),
    ],
)
def test_what_accelerate_is_asked_for_in_vain_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        linear_probe.main(ProbeConfig(run=tmp_path))


# -------------------------------------------------------------------------------------------------------- few labels

FEW: dict[str, Any] = {"label_fraction": 0.25, "num_validation": None, "seed": 3}  # of 40 images of each class 10


@pytest.mark.parametrize("mode", ["linear", "augmented", "finetune"])
def test_with_few_labels_all_others_and_their_images_change_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Images that were not drawn are blackened, and their labels turned, once the images to fit on are drawn."""
    changes: dict[str, Any] = {
        "linear": FEW,
        "augmented": FEW | {"features": "augmented", "baselines": False},
        "finetune": FEW | {"mode": "finetune", "learning_rates": (0.1,), "epochs": 2, "baselines": False},
    }[mode]
    shutil.copy(place / "run" / checkpoint.BEST, place / "run" / checkpoint.LAST)
    once = numbers(linear_probe.main(settings(place, tmp_path / "once", **changes)))
    opened = probe.open_probe

    @contextlib.contextmanager
    def poisoned(config: ProbeConfig) -> Iterator[probe.Probe]:
        with opened(config) as measured:
            others = np.setdiff1d(np.arange(NUM_TRAIN), np.union1d(measured.fit, measured.validation))
            assert len(others) == 90
            source: Any = measured.train
            source.stored[others] = 0
            source._labels[others] = (source._labels[others] + 1) % 3
            yield measured

    monkeypatch.setattr(linear_probe, "open_probe", poisoned)
    again = numbers(linear_probe.main(settings(place, tmp_path / "again", **changes)))
    for key in ("rows", "trials", "curves", "confusion"):
        left, right = (json.dumps(without_seconds(found[key])) for found in (once, again))
        assert left == right, key
    saved = [checkpoint.load_safely(tmp_path / name / "simclr_lin_best.pt")["model"] for name in ("once", "again")]
    assert is_equal(*saved)


def without_seconds(found: Any) -> Any:
    return [{**row, "seconds": 0} for row in found] if isinstance(found, list) and "seconds" in found[0] else found


def test_the_labels_that_were_drawn_are_listed_and_the_report_says_how_many(place: Path) -> None:
    shutil.copy(place / "run" / checkpoint.BEST, place / "run" / checkpoint.LAST)
    report = linear_probe.main(settings(place, None, **FEW, baselines=False))
    assert report.parent.name == "probe-linear-labels-0.25"
    listed, (_, labels) = json.loads((report.parent / "labels.json").read_text()), coloured(NUM_TRAIN, 0)
    expected = few_labels(labels, num_classes=3, fraction=0.25, seed=3)
    assert (listed["fit"], listed["validation"]) == tuple(part.tolist() for part in expected)
    assert (listed["label_fraction"], listed["seed"]) == (0.25, 3)
    assert listed["content_sha256"] == beton.load_facts(place / "data" / "train.beton").content_sha256
    found, text = numbers(report), (report.parent / "report.md").read_text()
    assert (found["num_fit"], found["num_labelled"], found["config"]["batch_size"]) == (24, 30, 8)
    assert "**25 % of the labels** (30 training images)" in text
    assert "of 120 labelled training images, 30 were drawn by the seed 3" in text
    assert "was fitted on all 30 labelled training images" in text
    assert "The checkpoint was chosen by no label" in text


def test_with_few_labels_a_folder_stands_for_the_checkpoint_that_no_label_chose(place: Path, tmp_path: Path) -> None:
    last = checkpoint.load_safely(place / "run" / checkpoint.BEST)
    checkpoint.save_atomically(place / "run" / checkpoint.LAST, last | {"epoch": 7})
    few = settings(place, tmp_path / "last", **FEW, baselines=False)
    assert numbers(linear_probe.main(few))["pretraining_epoch"] == 7
    named = dataclasses.replace(few, run=place / "run" / checkpoint.BEST, output=tmp_path / "best")
    report = linear_probe.main(named)
    assert numbers(report)["pretraining_epoch"] == 2
    assert "chosen by kNN accuracy with all labels" in report.with_suffix(".md").read_text()


def test_few_labels_may_be_all_that_a_file_has(place: Path, tmp_path: Path) -> None:
    _, labels = coloured(NUM_TRAIN, 0)
    labels[60:] = -1
    write(tmp_path / "train.beton", NUM_TRAIN, seed=0, labels=labels)
    few = FEW | {"label_fraction": 0.5, "train": tmp_path / "train.beton", "test": place / "data" / "test.beton"}
    shutil.copy(place / "run" / checkpoint.BEST, place / "run" / checkpoint.LAST)
    found = numbers(linear_probe.main(settings(place, tmp_path / "out", **few, baselines=False)))
    assert found["num_labelled"] == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_fraction": 0.0}, "label_fraction is 0.0, expected above 0, and at most 1"),
        ({"label_fraction": 1.5}, "label_fraction is 1.5, expected above 0, and at most 1"),
        ({"num_validation": 10}, "num_validation is 10, expected none with a label_fraction"),
        ({"label_fraction": 0.01}, r"is 0 of each, and class 0 has 40; .*--label-fraction 0.05"),
        ({"knn_neighbours": 25}, "knn_neighbours is 25, but 24 labelled images are fitted on; use 24"),
    ],
)
def test_few_labels_that_cannot_be_are_refused(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copy(place / "run" / checkpoint.BEST, place / "run" / checkpoint.LAST)
    with pytest.raises(ValueError, match=message):
        linear_probe.main(settings(place, tmp_path / "out", **(FEW | changes)))
