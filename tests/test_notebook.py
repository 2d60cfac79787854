"""notebooks/assignment.ipynb: it runs, on less of everything; its asserts hold; what is committed is small and true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simclr.presets import PRESETS
from simclr.run.checkpoint import load_classifier, load_pretrained

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "assignment.ipynb"
PAGE = ROOT / "docs" / "assignment.md"


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def shown(path: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def text() -> str:
    return "\n".join("".join(cell["source"]) for cell in cells(NOTEBOOK, "markdown"))


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    output = tmp_path / "executed.ipynb"
    subprocess.run(
        [sys.executable, ROOT / "notebooks" / "execute.py", output],
        cwd=tmp_path,
        env=os.environ | {"NOTEBOOK_QUICK": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=400,
    )
    assert all(cell["execution_count"] for cell in cells(output, "code"))
    assert sum("image/png" in output.get("data", {}) for output in shown(output)) >= 8
    # What an assignment has handed in
    for run, loss in (("notebook-simclr", "nt_xent"), ("notebook-barlow", "barlow_twins")):
        assert load_pretrained(tmp_path / run).config.loss.name == loss
    probe = tmp_path / "notebook-simclr" / "probe-linear"
    assert len(load_classifier(probe).classes) == 10
    assert (probe / "report.html").is_file()


def test_what_is_committed_is_small_and_was_run_in_order_on_no_named_machine() -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    code = cells(NOTEBOOK, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in shown(NOTEBOOK)} <= {"stream", "display_data", "execute_result"}
    printed = "".join("".join(output.get("text", "")) for output in shown(NOTEBOOK))
    assert not re.search(r"/(home|root|tmp|work|Users)\b", printed)
    assert "Warning" not in printed


@pytest.mark.parametrize("deliverable", ["1a", "1b", "2", "3", "4", "5", "6", "7"])
def test_each_thing_asked_for_has_its_section(deliverable: str) -> None:
    assert f'<a id="{deliverable}"></a>' in text()
    assert f"(#{deliverable})" in text()


@pytest.mark.parametrize("place", ["notebook", "page"])
def test_accuracies_are_those_of_results(place: str) -> None:
    measured = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*`((?:cpu|fast)-[a-z0-9-]+)`.*$", text() if place == "notebook" else PAGE.read_text(), re.M)
    tables = text() if place == "notebook" else PAGE.read_text(encoding="utf-8")
    lines = [line for line in tables.splitlines() if line.startswith("|") and re.search(r"\| \d\d\.\d", line)]
    accuracies = [number for line in lines for number in re.findall(r"\b\d\d\.\d\b", line) if "`" in line]
    assert set(rows) <= set(PRESETS)
    assert len(accuracies) >= 22
    assert [number for number in accuracies if not re.search(rf"(?<![\d.]){number}(?![\d])", measured)] == []


def test_every_file_and_option_of_the_page_exists() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (PAGE.parent / link).exists(), link
    options = set(re.findall(r"`[^`]*?(train_simclr|linear_probe)\.py[^`]*`", page))
    assert options == {"train_simclr", "linear_probe"}
