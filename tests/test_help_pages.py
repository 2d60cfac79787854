"""Help: every option is there, with what gives it its value, in lines that fit; the everyday page is short."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from simclr import command_line, help_pages
from simclr.command_line import parse_probe_config, parse_train_config
from simclr.config import ProbeConfig, TrainConfig, settings_of, to_json
from simclr.help_pages import Section, options_of
from simclr.presets import PRESETS

PAGES: dict[type, Sequence[Section]] = {TrainConfig: command_line._TRAIN_PAGES, ProbeConfig: command_line._PROBE_PAGES}


def from_settings(config: TrainConfig, folder: Path, *words: str) -> TrainConfig:
    (folder / "config.json").write_text(to_json(config))
    return parse_train_config(["--config", str(folder / "config.json"), *words])


def words_of(config: Any) -> list[str]:
    return [word for option in options_of(config) for word in option.words]


def shown(words: list[str], capsys: pytest.CaptureFixture[str], read: Any = parse_train_config) -> str:
    with pytest.raises(SystemExit) as ended:
        read(words)
    output, errors = capsys.readouterr()
    assert (ended.value.code, errors) == (0, "")
    return output


@pytest.mark.parametrize("name", ["demo", "fast-simclr", "cifar10-barlow-1000"])
def test_the_options_that_are_shown_are_those_that_are_read(name: str, tmp_path: Path) -> None:
    """All words of a preset's options turn any other preset into it."""
    wanted = dataclasses.replace(
        PRESETS[name].config, num_validation=7, allow_changed=("epochs", "data"), checkpoint_every_steps=3
    )
    assert from_settings(PRESETS["cpu-barlow"].config, tmp_path, *words_of(wanted)) == wanted
    assert {option.path for option in options_of(wanted)} == settings_of(wanted).keys() - {"parts_sha256"}


def test_the_options_of_the_probe_that_are_shown_are_those_that_are_read() -> None:
    wanted = ProbeConfig(run=Path("a run"), mode="finetune", pdf=True, baselines=False, learning_rates=(1 / 3, 0.1))
    assert parse_probe_config(words_of(wanted)) == wanted


@pytest.mark.parametrize("kind", PAGES)
def test_every_option_has_its_meaning_and_a_page(kind: type) -> None:
    options, (everyday, *others) = options_of(kind), PAGES[kind]
    assert [option.flag for option in options if not option.text] == []
    on_pages = {option.path for page in others for option in page.options(options)}
    assert on_pages == {option.path for option in options}
    assert {option.path for option in everyday.options(options)} < on_pages
    for page in PAGES[kind]:
        for path in page.paths:
            assert Section("", "", (path,)).options(options), f"{page.name} names {path}, which is no option"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_pages_fit_the_terminal_and_the_everyday_one_is_short(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    everyday = shown(["demo", "--help"], capsys)
    everything = shown(["demo", "--help", "all"], capsys)
    for line in (everyday + everything).splitlines():
        assert len(line) < columns or line.startswith("  --"), line  # an option that is longer itself
    assert len(everyday.splitlines()) < (120 if columns == 60 else 75)
    assert all(f"--help {page.name} " in everyday for page in command_line._TRAIN_PAGES[1:])
    assert "--epochs 8 " in everyday
    assert "--dry-run " in everyday


def test_without_a_preset_help_names_all_presets(capsys: pytest.CaptureFixture[str]) -> None:
    overview = shown(["--help"], capsys)
    assert re.findall(r"(?m)^  ([a-z0-9-]+?) +\S", overview.partition("Presets")[2])[: len(PRESETS)] == list(PRESETS)
    assert "--seed" not in overview


def test_a_page_has_its_options_alone_and_the_second_view_only_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(["cifar10-barlow-100", "--help", "views"], capsys)
    assert "--seed" not in page
    assert "--view-1.hue 0.1" in page
    assert re.findall(r"--view-2\.(\S+ \S+)", page) == ["solarise-probability 0.2"]
    assert "bilinear, bicubic" in page or '"bilinear" or "bicubic"' in page
    probe = shown(["--help", "neighbours"], capsys, parse_probe_config)
    assert probe.count("  --") == 2


@pytest.mark.parametrize(("words", "named"), [(["demo", "--help", "view"], "views"), (["--help", "x"], "optimizer")])
def test_an_unknown_page_is_refused(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_train_config(words)
    assert ended.value.code == 2
    assert re.search(rf"there is no such page; there are .*\b{named}\b", capsys.readouterr().err)


def test_a_run_that_is_repeated_shows_its_own_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = dataclasses.replace(PRESETS["demo"].config, epochs=77)
    with pytest.raises(SystemExit):
        from_settings(start, tmp_path, "--help")
    assert "--epochs 77 " in capsys.readouterr().out


def test_what_is_required_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"--run \.\.\. +Required\.", shown(["--help"], capsys, parse_probe_config))
    assert help_pages.asked_for(["--run", "x"]) is None
