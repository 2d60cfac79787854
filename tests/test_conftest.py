"""The rule that real data may be required, shown on sessions of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TWO_TESTS = """
import pytest

@pytest.mark.real_data
def test_with_images({fixture}):
    pass

def test_without_images():
    pass
"""


def _session(folder: Path, test_file: str, *options: str, **variables: str) -> tuple[int, str]:
    (folder / "test_inner.py").write_text(test_file)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    real_data\n    slurm\n    hosts\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CIFAR10_", "REQUIRE_"))}
    environment |= variables | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-q", *options]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("fixture", "variables", "status", "text"),
    [
        ("cifar10_jpeg", {}, 0, "1 passed, 1 skipped"),
        ("cifar10_jpeg", {"REQUIRE_REAL_DATA": "1"}, 1, "CIFAR10_JPEG_ARCHIVE is not set"),
        ("cifar10_jpeg", {"CIFAR10_JPEG_ARCHIVE": "/nowhere.tar.xz"}, 1, "there is no such file"),
        ("cifar10_jpeg", {"CIFAR10_JPEG_ARCHIVE": __file__}, 1, "has SHA-256"),
        ("", {"REQUIRE_REAL_DATA": "1"}, 0, "2 passed"),
    ],
)
def test_required_real_data_cannot_be_skipped(
    tmp_path: Path, fixture: str, variables: dict[str, str], status: int, text: str
) -> None:
    returned, output = _session(tmp_path, TWO_TESTS.format(fixture=fixture), **variables)
    assert (returned, text in output) == (status, True), output


def test_required_real_data_cannot_be_deselected(tmp_path: Path) -> None:
    options = ("-k", "without_images")
    test_file = TWO_TESTS.format(fixture="")
    assert _session(tmp_path, test_file, *options)[0] == 0
    returned, output = _session(tmp_path, test_file, *options, REQUIRE_REAL_DATA="1")
    assert returned == 1, output
    assert "no real_data test passed" in output


def test_what_needs_root_is_required_likewise(tmp_path: Path) -> None:
    test_file = TWO_TESTS.format(fixture="").replace("real_data", "slurm").replace("pass", 'pytest.skip("no root")', 1)
    returned, output = _session(tmp_path, test_file, REQUIRE_SLURM="1", REQUIRE_HOSTS="1")
    assert returned == 1, output
    assert "REQUIRE_SLURM=1, and this test was skipped: Skipped: no root" in output
    assert "REQUIRE_HOSTS=1, and no hosts test passed" in output


@pytest.mark.real_data
@pytest.mark.slow
def test_the_archive_is_all_of_cifar10(cifar10_jpeg: Path) -> None:
    for split, per_class in (("train", 5000), ("test", 1000)):
        counts = {folder.name: sum(1 for _ in folder.iterdir()) for folder in (cifar10_jpeg / split).iterdir()}
        assert len(counts) == 10
        assert set(counts.values()) == {per_class}
