"""Fixtures and session rules of the whole suite.

CIFAR10_JPEG_ARCHIVE names a .tar.xz of CIFAR-10 as JPEG files (train/<class>/NNNN.jpg, test/<class>/NNNN.jpg).
The tests marked real_data use it and are skipped without it. Those marked slurm and hosts need root and packages. With
REQUIRE_REAL_DATA=1, REQUIRE_SLURM=1 or REQUIRE_HOSTS=1 a skipped test of that mark is a failure, and so is a session in
which none passed: continuous integration cannot lose them unnoticed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import shut_down_workers

CIFAR10_JPEG_SHA256 = "eef3a0c9b9b536d7eff5b956584990fab6b7da4629a91c7470493a7b41940856"
CIFAR10_JPEG_COUNTS = {"train": 50_000, "test": 10_000}

REQUIRED_BY = {"real_data": "REQUIRE_REAL_DATA", "slurm": "REQUIRE_SLURM", "hosts": "REQUIRE_HOSTS"}
"""The variable that forbids to skip the tests of a mark."""

_passed = pytest.StashKey[set[str]]()  # the marks of which a test has passed


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_session() -> Iterator[None]:
    yield
    shut_down_workers()


@pytest.fixture(scope="session")
def cifar10_jpeg(request: pytest.FixtureRequest) -> Path:
    """Return a folder with all of CIFAR-10 as JPEG files under train/ and test/, kept from session to session."""
    name = os.environ.get("CIFAR10_JPEG_ARCHIVE")
    if not name:
        pytest.skip("CIFAR10_JPEG_ARCHIVE is not set")
    archive = Path(name)
    if not archive.is_file():
        pytest.fail(f"CIFAR10_JPEG_ARCHIVE={name}: there is no such file")
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    if checksum != CIFAR10_JPEG_SHA256:
        pytest.fail(f"{archive} has SHA-256 {checksum}, expected {CIFAR10_JPEG_SHA256}")

    folder = request.config.rootpath / ".cache" / f"cifar10-jpeg-{checksum[:12]}"
    if _count_images(folder) != CIFAR10_JPEG_COUNTS:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            # Renamed when complete, so that an interrupted session leaves nothing that looks usable.
            with tarfile.open(archive) as tar:
                tar.extractall(f"{partial}/images", filter="data")
            Path(partial, "images").rename(folder)
        assert _count_images(folder) == CIFAR10_JPEG_COUNTS
    return folder


@pytest.fixture(scope="session")
def cifar10_beton(request: pytest.FixtureRequest, cifar10_jpeg: Path) -> Path:
    """Return a folder with train.beton and test.beton of all of CIFAR-10, kept until the code that makes them changes.

    They are made by the command that a user would type.
    """
    root = request.config.rootpath
    code = b"".join(path.read_bytes() for path in [*sorted(root.glob("data_prep/*.py")), root / "simclr" / "beton.py"])
    key = hashlib.sha256(CIFAR10_JPEG_SHA256.encode() + code).hexdigest()[:12]
    folder = root / ".cache" / f"cifar10-beton-{key}"
    if not folder.exists():
        for stale in root.glob(".cache/cifar10-beton-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            command = ["imagefolder", "--root", str(cifar10_jpeg), "--output", f"{partial}/files"]
            subprocess.run([sys.executable, "-m", "data_prep", *command], cwd=root, check=True)
            Path(partial, "files").rename(folder)
    return folder


def _count_images(folder: Path) -> dict[str, int]:
    return {split: sum(1 for _ in folder.glob(f"{split}/*/*.jpg")) for split in CIFAR10_JPEG_COUNTS}


def pytest_configure(config: pytest.Config) -> None:
    # The tests' models are small, and tests run beside their own subprocesses: threads would wait for each other.
    torch.set_num_threads(1)
    config.stash[_passed] = set()


def pytest_report_header() -> str:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    held = f", oneDNN held to {limit}" if limit else ""
    return f"torch {torch.__version__} computes with {torch.backends.cpu.get_cpu_capability()}{held}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    for mark, variable in REQUIRED_BY.items():
        if item.get_closest_marker(mark) is None:
            continue
        if report.skipped and _is_required(mark) and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome = "failed"
            report.longrepr = f"{variable}=1, and this test was skipped: {reason}"
        elif report.passed and report.when == "call":
            item.config.stash[_passed].add(mark)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _lacking(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for mark in _lacking(terminalreporter.config):
        terminalreporter.write_line(f"{REQUIRED_BY[mark]}=1, and no {mark} test passed: the session failed", red=True)


def _is_required(mark: str) -> bool:
    return os.environ.get(REQUIRED_BY[mark]) == "1"


def _lacking(config: pytest.Config) -> list[str]:
    if config.option.collectonly:
        return []
    return [mark for mark in REQUIRED_BY if _is_required(mark) and mark not in config.stash[_passed]]
