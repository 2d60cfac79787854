"""The rule that real data may be required, shown on sessions of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Session = Callable[..., tuple[int, str]]
TWO_TESTS = """
import pytest

@pytest.mark.real_data
def test_with_images({fixture}):
    pass

def test_without_images():
    pass
"""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Run a session of its own with this suite's conftest; give its exit status and what it printed."""

    def run(test_file: str, *options: str, **variables: str) -> tuple[int, str]:
        for name in os.environ:
            if name.startswith(("CIFAR10_", "REQUIRE_")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        pytester.makepyfile(test_inner=test_file)
        pytester.makeini("[pytest]\nmarkers =\n    real_data\n    slurm\n    hosts\n")
        result = pytester.runpytest_inprocess("-p", "tests.conftest", "-q", *options)
        return int(result.ret), "\n".join(result.outlines + result.errlines)

    return run


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
    session: Session, fixture: str, variables: dict[str, str], status: int, text: str
) -> None:
    returned, output = session(TWO_TESTS.format(fixture=fixture), **variables)
    assert (returned, text in output) == (status, True), output


def test_required_real_data_cannot_be_deselected(session: Session) -> None:
    options = ("-k", "without_images")
    test_file = TWO_TESTS.format(fixture="")
    assert session(test_file, *options)[0] == 0
    returned, output = session(test_file, *options, REQUIRE_REAL_DATA="1")
    assert returned == 1, output
    assert "no real_data test passed" in output


def test_what_needs_root_is_required_likewise(session: Session) -> None:
    test_file = TWO_TESTS.format(fixture="").replace("real_data", "slurm").replace("pass", 'pytest.skip("no root")', 1)
    returned, output = session(test_file, REQUIRE_SLURM="1", REQUIRE_HOSTS="1")
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
