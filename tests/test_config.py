from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr import beton, command_line
from simclr.beton import Facts
from simclr.command_line import parse_probe_config, parse_train_config
from simclr.config import (
    LossConfig,
    OptimizerConfig,
    ProbeConfig,
    SpeedConfig,
    TrainConfig,
    derive,
    from_json,
    settings_of,
    to_json,
)
from simclr.models import ModelConfig, SimCLR
from simclr.presets import DEFAULT, PRESETS
from simclr.views import ViewSpec


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_build(name: str) -> None:
    preset = PRESETS[name]
    assert preset.config.name == name
    assert preset.source
    assert "measured" in preset.expected or "%" in preset.expected
    assert SimCLR(preset.config.model, 32).representation_dim >= 96
    derived = derive(preset.config, 50_000, 1)
    assert derived.total_steps == preset.config.epochs * (50_000 // preset.config.global_batch_size)
    assert from_json(TrainConfig, to_json(preset.config)) == preset.config


@pytest.mark.parametrize("method", ["simclr", "barlow"])
@pytest.mark.parametrize("epochs", [100, 1000])
def test_cifar10_presets_of_both_methods(method: str, epochs: int) -> None:
    config = PRESETS[f"cifar10-{method}-{epochs}"].config
    assert (config.epochs, config.model.encoder) == (epochs, "resnet18")
    assert config.loss.name == {"simclr": "nt_xent", "barlow": "barlow_twins"}[method]


def test_derived_numbers() -> None:
    config = TrainConfig(
        epochs=100, global_batch_size=512, optimizer=OptimizerConfig(base_learning_rate=0.06, warmup_epochs=2.5)
    )
    derived = derive(config, 50_000, 4)
    assert derived.per_device_batch_size == 128
    assert (derived.steps_per_epoch, derived.left_out_per_epoch) == (97, 336)
    assert derived.total_steps == 9700
    assert derived.warmup_steps == 242  # 2.5 * 97 = 242.5, rounded to even
    assert derived.peak_learning_rate == pytest.approx(0.12)
    # The schedule does not depend on the number of devices.
    one = derive(config, 50_000, 1)
    assert dataclasses.replace(one, world_size=4, per_device_batch_size=128) == derived
    for equation in derived.equations(config):
        assert "=" in equation


@pytest.mark.parametrize(
    ("changes", "num_images", "world_size", "message"),
    [
        (
            {"global_batch_size": 510},
            50_000,
            4,
            "510 is not divisible by the 4 processes. Use --global-batch-size 508 or 512$",
        ),
        ({"global_batch_size": 2}, 50_000, 4, "Use --global-batch-size 4$"),
        (
            {"global_batch_size": 512},
            500,
            2,
            "has 500 images: they do not fill one batch of global_batch_size 512. Use --global-batch-size 500$",
        ),
        ({"num_validation": 5000}, 5000, 1, "has 5000 images: .* leaves none .* Use --num-validation 500$"),
        # All at once, with values that work together
        (
            {"num_validation": 5000, "global_batch_size": 510},
            240,
            4,
            r"240 images: they do not fill one batch of global_batch_size 510; global_batch_size 510 is not divisible "
            r"by the 4 processes; num_validation 5000 .*\. Use --global-batch-size 240, --num-validation 24$",
        ),
        ({}, 1, 1, "has 1 image, and pretraining compares an image with others"),
    ],
)
def test_numbers_that_do_not_fit_name_those_that_do(
    changes: dict[str, Any], num_images: int, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        derive(TrainConfig(**changes), num_images, world_size)


@pytest.mark.parametrize(
    ("num_images", "given", "expected"),
    [(50_000, None, 5000), (10_000, None, 1000), (240, None, 24), (9, None, 0), (240, 7, 7), (240, 0, 0)],
)
def test_a_tenth_of_the_images_measures_by_default(num_images: int, given: int | None, expected: int) -> None:
    config = TrainConfig(num_validation=given)
    assert config.for_images(num_images) == dataclasses.replace(config, num_validation=expected)


def images_in(folder: Path, number: int) -> Path:
    path = folder / f"{number}.beton"
    beton.write(path, np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), dtype=np.uint8), [0] * number)
    return path


@pytest.mark.parametrize(("number", "expected"), [(240, 64), (20, 8), (5, 2), (2, 2), (512, 512), (511, 128)])
def test_a_presets_batch_follows_few_images_aloud(
    number: int, expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["cifar10-simclr-100", "--data", str(images_in(tmp_path, number))]
    config = parse_train_config(words)
    assert config.global_batch_size == expected
    assert derive(config, number, 1).steps_per_epoch >= 1
    said = capsys.readouterr().out
    assert (f"{expected} instead of the preset's 512, since" in said) == (expected < 512)
    # What is asked for stays, and is refused where it does not fit
    for option in (["--global-batch-size", "512"], ["--global-batch-size=512"], ["--global_batch_size", "512"]):
        assert parse_train_config([*words, *option]).global_batch_size == 512
    monkeypatch.setenv("RANK", "1")
    assert parse_train_config(words) == config
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (TrainConfig, {"epochs": 0}, "epochs is 0, expected at least 1"),
        (TrainConfig, {"seed": -1}, "seed is -1, expected 0 to 2"),
        (TrainConfig, {"seed": 2**64}, "seed is 18446744073709551616, expected 0 to 2"),
        (TrainConfig, {"epochs": 2**63}, "epochs is 9223372036854775808, expected at least 1, and below 2"),
        (TrainConfig, {"timeout_seconds": 1e20}, r"timeout_seconds is 1e\+20, expected > 0, and at most 1e9"),
        (TrainConfig, {"global_batch_size": 1}, "global_batch_size is 1, expected at least 2"),
        (TrainConfig, {"name": "a/b"}, "name is 'a/b', expected a name for a folder"),
        (TrainConfig, {"stop_at_step": 0}, "stop_at_step is 0"),
        (TrainConfig, {"speed": SpeedConfig(micro_batch_size=0)}, "speed.micro_batch_size is 0, expected at least 1"),
        (TrainConfig, {"view_sizes": ((0, 0.5),)}, r"view_sizes\[0\]\[0\] is 0, expected at least 1"),
        (
            TrainConfig,
            {"speed": SpeedConfig(micro_batch_size=4, compile="default")},
            "compile is 'default', expected auto or none with micro_batch_size",
        ),
        (
            TrainConfig,
            {"view_sizes": ((16, 0.6), (24, 0.6))},
            "expected shares of the epochs that are at most 1 in all",
        ),
        (
            TrainConfig,
            {"epochs": 5, "optimizer": OptimizerConfig(warmup_epochs=5)},
            "warmup_epochs is 5.0, expected less than epochs, 5",
        ),
        (
            TrainConfig,
            {"optimizer": OptimizerConfig(base_learning_rate=0)},
            "optimizer.base_learning_rate is 0.0, expected > 0",
        ),
        (TrainConfig, {"optimizer": OptimizerConfig(momentum=1)}, "momentum is 1"),
        (TrainConfig, {"optimizer": OptimizerConfig(gradient_clip_norm=0)}, "or None for no clipping"),
        (TrainConfig, {"loss": LossConfig(temperature=0)}, "loss.temperature is 0.0, expected > 0"),
        (TrainConfig, {"loss": LossConfig(off_diagonal_weight=-1)}, "off_diagonal_weight is -1"),
        (ModelConfig, {"projection_dim": 0}, "model.projection_dim is 0, expected at least 1"),
        (ProbeConfig, {"run": Path("x"), "epochs": 0}, "epochs is 0"),
        (ProbeConfig, {"run": Path("x"), "seed": 2**64}, "seed is 18446744073709551616"),
        (
            ProbeConfig,
            {"run": Path("x"), "weight_decays": (0.0, math.nan)},
            r"weight_decays\[1\] is nan, expected a finite",
        ),
        (ProbeConfig, {"run": Path("x"), "learning_rates": (0.1, 0.0)}, r"learning_rates\[1\] is 0.0, expected > 0"),
    ],
)
def test_fields_out_of_range_are_named(part: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part(**changes)


def numbers_in(values: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The name of each number with a point in parsed JSON, and where it stands."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        where = str(key) if isinstance(key, str) else name
        if isinstance(value, dict | list):
            yield from numbers_in(value, where)
        elif isinstance(value, float):
            yield where, values, key


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(view_sizes=((16, 0.5),), optimizer=OptimizerConfig(gradient_clip_norm=1.0)),
        ProbeConfig(run=Path("x")),
    ],
    ids=["train", "probe"],
)
def test_no_number_may_be_infinite_or_none(config: Any, number: float) -> None:
    """Every one is refused by its name; what is written down as JSON could not hold it."""
    values = json.loads(to_json(config))
    found = list(numbers_in(values))
    assert len(found) > 25
    for name, holder, key in found:
        before, holder[key] = holder[key], number
        with pytest.raises(ValueError, match=rf"{name}\b.* is {number}, expected a finite number"):
            from_json(type(config), json.dumps(values))
        holder[key] = before
    assert from_json(type(config), json.dumps(values)) == config


def test_the_paths_of_a_configuration_may_be_text() -> None:
    assert TrainConfig(data="a/b", output="c") == TrainConfig(data=Path("a/b"), output=Path("c"))  # type: ignore[arg-type]
    probe = ProbeConfig(run="r", test="t")  # type: ignore[arg-type]
    assert probe == ProbeConfig(run=Path("r"), test=Path("t"))


@pytest.mark.parametrize(
    ("epochs", "sizes", "expected"),
    [
        (10, (), ()),
        (10, ((16, 0.7),), ((16, 7),)),
        (10, ((16, 0.35), (24, 0.35)), ((16, 3), (24, 4))),
        (1, ((24, 0.85),), ((24, 0),)),  # what is left is of the stored side
        (3, ((16, 0.1), (20, 0.9)), ((16, 0), (20, 3))),
    ],
)
def test_shares_of_the_epochs_become_whole_ones(epochs: int, sizes: Any, expected: Any) -> None:
    assert TrainConfig(epochs=epochs, view_sizes=sizes).view_stages == expected


def test_json_gives_an_equal_configuration_back() -> None:
    config = TrainConfig(
        data=Path("a b/c.beton"),
        output=Path("d"),
        stop_at_step=3,
        optimizer=OptimizerConfig(gradient_clip_norm=1.5, base_learning_rate=1e-5),
        view_1=ViewSpec(crop_scale=(0.3, 0.9), blur_kernel=5),
        view_sizes=((16, 0.5), (24, 0.25)),
    )
    assert from_json(TrainConfig, to_json(config)) == config
    probe = ProbeConfig(run=Path("r"), mode="finetune", learning_rates=(0.5,))
    assert from_json(ProbeConfig, to_json(probe)) == probe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("seed"), r"TrainConfig has missing fields \['seed'\]$"),
        (lambda c: c.update(fast=1), r"TrainConfig has unknown fields \['fast'\]$"),
        (lambda c: c.update(seed="0"), "seed is '0', expected a whole number"),
        (lambda c: c.update(epochs=True), "epochs is True, expected a whole number"),
        (lambda c: c.update(precision="fp8"), "precision is 'fp8', expected one of auto, fp32, bf16, fp16, fp64"),
        (lambda c: c["optimizer"].update(momentum=None), "optimizer.momentum is None, expected a number"),
        (lambda c: c["view_1"].update(crop_scale=[0.1]), r"view_1.crop_scale is \[0.1\], expected a list of 2"),
        (lambda c: c.update(model=3), "model is 3, expected an object"),
    ],
)
def test_json_that_does_not_fit_is_refused_by_field(change: Any, message: str) -> None:
    values = json.loads(to_json(TrainConfig()))
    change(values)
    with pytest.raises(ValueError, match=message):
        from_json(TrainConfig, json.dumps(values))


def test_a_table_comes_back_from_json() -> None:
    facts = Facts(
        "s", "train", 1, 8, 8, "raw", None, False, ("a",), (1,), (0.5,) * 3, (0.2,) * 3, "c" * 64, "f" * 64, 1, {}
    )
    facts = dataclasses.replace(facts, written_by={"simclr": "0.1"})
    assert from_json(Facts, to_json(facts)) == facts
    with pytest.raises(ValueError, match=r"written_by.simclr is 1, expected text"):
        from_json(Facts, to_json(facts).replace('"0.1"', "1"))


def test_the_command_line_overrides_single_fields_of_a_preset() -> None:
    words = (
        "cifar10-simclr-1000 --seed 3 --optimizer.base-learning-rate 0.5 --view-2.blur-probability 0.5 --data x.beton"
    )
    config = parse_train_config(words.split())
    preset = PRESETS["cifar10-simclr-1000"].config
    assert config == dataclasses.replace(
        preset,
        seed=3,
        data=Path("x.beton"),
        optimizer=dataclasses.replace(preset.optimizer, base_learning_rate=0.5),
        view_2=dataclasses.replace(preset.view_2, blur_probability=0.5),
    )
    assert config.folder == Path("results/cifar10-simclr-1000-seed3")
    assert dataclasses.replace(config, name="mine").folder == Path("results/mine-seed3")
    assert dataclasses.replace(config, output=Path("there")).folder == Path("there")


def test_without_a_preset_the_default_is_meant() -> None:
    assert parse_train_config([]) == PRESETS[DEFAULT].config
    assert parse_train_config(["--seed", "4"]) == dataclasses.replace(PRESETS[DEFAULT].config, seed=4)


def test_a_file_of_settings_that_does_not_do_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    for content, words, message in (
        (None, ["--config", str(file)], f"--config {file}: .*No such file.*; name the config.json of a run"),
        ("{}", ["--config", str(file)], f"--config {file}: TrainConfig has missing fields .*; name the config.json"),
        (to_json(TrainConfig()), ["--config"], "--config takes a file"),
        (to_json(TrainConfig()), ["demo", "--config", str(file)], "demo"),
    ):
        if content is not None:
            file.write_text(content)
        with pytest.raises(SystemExit) as ended:
            parse_train_config(words)
        assert ended.value.code == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nope"], "there is no preset nope; there are demo, "),
        (["demo", "--sed", "1"], "--sed"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--epochs", "0"], "epochs is 0, expected at least 1"),
        (["demo", "--loss.temperature", "inf"], "loss.temperature is inf, expected a finite number"),
    ],
)
def test_unknown_words_end_the_program(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_train_config(words)
    assert ended.value.code == 2
    assert re.search(named, capsys.readouterr().err)


def test_options_of_speed_stand_together_and_keep_their_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    words = "demo --loader memory --views torch --compile default --nt-xent-form tiled --kernels torch"
    assert parse_train_config(words.split()).speed == SpeedConfig("memory", "torch", "default", "tiled", "torch")
    assert parse_train_config(["--recompute"]).speed == SpeedConfig(recompute=True)
    assert parse_train_config(["--micro-batch-size", "4"]).speed == SpeedConfig(micro_batch_size=4)
    shown = help_of(["demo", "--help", "all"], capsys)
    assert "None of these changes a result by more than rounding." in shown
    for field in dataclasses.fields(SpeedConfig):
        assert f" --{field.name.replace('_', '-')}" in shown


def help_of(words: list[str], capsys: pytest.CaptureFixture[str], read: Any = parse_train_config) -> str:
    """Help as one line, without frames."""
    with pytest.raises(SystemExit) as ended:
        read(words)
    output, errors = capsys.readouterr()
    assert (ended.value.code, errors) == (0, "")
    return " ".join(output.replace("│", "").split())


def test_help_shows_everyday_options_with_their_values_and_all_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everyday, everything = (help_of(["demo", *words], capsys) for words in (["--help"], ["--help", "all"]))
    for path in command_line._EVERYDAY:
        assert f" --{path.replace('_', '-')} " in everyday
    assert "(default: 8)" in everyday.partition("--epochs")[2].partition(" --")[0]
    assert "--dry-run" in everyday
    assert "--view-1.hue" not in everyday
    assert "--momentum" not in everyday
    for path in settings_of(TrainConfig()):
        assert re.search(rf"--{path.removeprefix('speed.').replace('_', '-')}\b", everything), path
    (tmp_path / "config.json").write_text(to_json(dataclasses.replace(PRESETS["demo"].config, epochs=77)))
    assert "(default: 77)" in help_of(["--config", str(tmp_path / "config.json"), "-h"], capsys)
    probe = help_of(["--help"], capsys, parse_probe_config)
    assert "(required)" in probe.partition("--run")[2].partition(" --")[0]
    assert "--knn-temperature" not in probe
    assert "--knn-temperature" in help_of(["--help", "all"], capsys, parse_probe_config)


def test_without_a_preset_help_names_all_presets(capsys: pytest.CaptureFixture[str]) -> None:
    overview = help_of(["--help"], capsys)
    assert all(f"• {name} Result: " in overview for name in PRESETS)
    assert "--seed" not in overview
