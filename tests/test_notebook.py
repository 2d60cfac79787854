"""notebooks/assignment.ipynb runs and its asserts hold; what is committed of it and its page is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simclr.run.checkpoint import load_classifier, load_pretrained
from tests.helpers import ROOT

NOTEBOOK = ROOT / "notebooks" / "assignment.ipynb"
PAGE = ROOT / "docs" / "assignment.md"


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def text_of(path: Path) -> str:
    """The text for people, without code."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    return "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    executed = tmp_path / "executed.ipynb"
    subprocess.run(
        [sys.executable, ROOT / "notebooks" / "execute.py", executed],
        cwd=tmp_path,
        env=os.environ | {"NOTEBOOK_QUICK": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=500,
    )
    assert all(cell["execution_count"] for cell in cells(executed, "code"))
    assert sum("image/png" in output.get("data", {}) for output in outputs(executed)) >= 8
    for run, loss in (("notebook-simclr", "nt_xent"), ("notebook-barlow", "barlow_twins")):
        assert load_pretrained(tmp_path / run).config.loss.name == loss
    probe = tmp_path / "notebook-simclr" / "probe-linear"
    assert len(load_classifier(probe).classes) == 10
    assert (probe / "report.html").is_file()


def test_what_is_committed_is_small_and_was_executed_in_order_on_no_named_machine() -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    code = cells(NOTEBOOK, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs(NOTEBOOK)} <= {"stream", "display_data", "execute_result"}
    printed = "".join("".join(output.get("text", "")) for output in outputs(NOTEBOOK))
    assert not re.search(r"(?<![\w~.])/\w|Warning", printed)


@pytest.mark.parametrize("deliverable", ["1a", "1b", "2", "3", "4", "5", "6", "7"])
def test_each_thing_asked_for_has_its_section(deliverable: str) -> None:
    assert f'<a id="{deliverable}"></a>\n## {deliverable}. ' in text_of(NOTEBOOK)
    assert f"(#{deliverable})" in text_of(NOTEBOOK)


def measured_on_test_images() -> dict[str, list[str]]:
    """Accuracies that results/README.md states of each preset, seed by seed, kNN and linear in turn."""
    found: dict[str, list[str]] = {}
    columns, preset = [], ""
    for line in (ROOT / "results" / "README.md").read_text(encoding="utf-8").splitlines():
        row = [cell.strip(" *") for cell in line.split("|")[1:-1]]
        if "kNN, test" in row and "linear, test" in row:
            columns = [row.index("kNN, test"), row.index("linear, test")]
        elif not row:
            columns = []
        elif columns:
            if row[0]:
                named = re.search(r"`([\w-]+)`", row[0])
                preset = named[1] if named else ""
            found.setdefault(preset, []).extend(row[column] for column in columns)
    return found


@pytest.mark.parametrize("path", [NOTEBOOK, PAGE], ids=lambda path: path.suffix)
def test_accuracies_are_those_that_were_measured(path: Path) -> None:
    measured = measured_on_test_images()
    stated = re.findall(r"^\|[^`\n]*`((?:cpu|fast)-[\w-]+)`(.*)$", text_of(path), re.MULTILINE)
    assert {preset for preset, _ in stated} == {
        "cpu-simclr",
        "cpu-simclr-16",
        "fast-simclr",
        "cpu-barlow",
        "fast-barlow",
    }
    for preset, row in stated:
        knn, linear = re.findall(r"\| (\d\d\.\d(?:, \d\d\.\d)*) (?=\|)", row)
        pairs = zip(knn.split(", "), linear.split(", "), strict=True)
        assert [number for pair in pairs for number in pair] == [number for number in measured[preset] if number], (
            preset
        )
