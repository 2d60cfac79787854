"""Fixtures and session rules of the whole suite.

CIFAR10_JPEG_ARCHIVE names a .tar.xz of CIFAR-10 as JPEG files (train/<class>/NNNN.jpg, test/<class>/NNNN.jpg).
The tests marked real_data use it and are skipped without it. Those marked slurm and hosts need root and packages, those
marked pdf Pango. With REQUIRE_REAL_DATA=1, REQUIRE_SLURM=1, REQUIRE_HOSTS=1 or REQUIRE_PDF=1 a skipped test of that
mark is a failure, and so is a session in which none passed: continuous integration cannot lose them unnoticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import shut_down_workers

CIFAR10_JPEG_SHA256 = "eef3a0c9b9b536d7eff5b956584990fab6b7da4629a91c7470493a7b41940856"
CIFAR10_JPEG_COUNTS = {"train": 50_000, "test": 10_000}

REQUIRED_BY = {mark: f"REQUIRE_{mark.upper()}" for mark in ("real_data", "slurm", "hosts", "pdf")}
"""The variable that forbids to skip the tests of a mark."""

SLOWEST_FIRST = [
    *("test_whole_path", "test_benchmarks", "test_notebook", "test_slurm", "test_hosts", "test_faults", "test_launch")
]
"""Files that two workers must not begin last, when one would wait for the other."""

QUICK_MARKS = {"slow", "distributed", "slurm", "hosts", "real_data", "gpu"}
QUICK_FIXTURES = {"ffcv_folder"}
QUICK_FILES = [
    "test_benchmarks",
    "test_conftest",
    "test_data_ffcv",
    "test_export",
    "test_faults",
    "test_helpers",
    "test_system",
    "test_hosts",
    "test_launch",
    "test_native",
    "test_scripts",
    "test_slurm",
    "test_whole_path",
]
QUICK_TESTS = [
    "test_a_disk_that_fills_during_training_stops_the_run_which_goes_on_when_there_is_space",
    "test_a_full_disk_is_named_and_leaves_nothing",
    "test_a_hundred_classes_one_epoch_and_divergence_are_drawn",
    "test_a_kill_at_any_moment_leaves_a_whole_file",
    "test_a_log_that_finds_no_space_says_so_and_keeps_its_lines",
    "test_a_second_run_in_the_folder_is_told_who_holds_it_until_that_one_is_killed",
    "test_a_terminal_sees_progress_and_an_interrupt_leaves_nothing",
    "test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new",
    "test_augmented_features_give_another_classifier_and_the_same_knn",
    "test_blocks_that_are_computed_again_give_the_same_bits",
    "test_ffcv_gives_the_same_weights_bit_for_bit",
    "test_fine_tuning_saves_the_whole_tuned_model",
    "test_fused_views_give_the_same_run_with_any_loader_and_in_pieces",
    "test_images_that_are_not_there_end_the_process_without_a_traceback",
    "test_less_is_kept_for_the_backward_pass",
    "test_no_random_flip_or_cut_anywhere_passes",
    "test_raw_pixels_fail",
    "test_results_lie_beside_the_run_by_kind_and_replacing_them_is_said",
    "test_so_does_one_whose_views_grow",
    "test_the_protocol_tells_which_images_chose_the_checkpoint",
    "test_the_seed_decides",
    "test_the_test_set_chooses_nothing",
    "test_user_errors_end_the_process_with_1_and_without_a_traceback",
    "test_what_is_not_given_follows_the_run_and_the_images",
]
"""What --quick leaves out, since it starts processes, compiles or takes long: all of it stands here."""

_passed = pytest.StashKey[set[str]]()  # the marks of which a test has passed


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_session() -> Iterator[None]:
    yield
    shut_down_workers()


@pytest.fixture
def folder_for_all() -> Iterator[Path]:
    """Return a folder that every user may enter and write to; tmp_path is open to the one who runs the tests alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


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
    with _one_at_a_time(folder.parent):
        if _count_images(folder) != CIFAR10_JPEG_COUNTS:
            shutil.rmtree(folder, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
                # Renamed when complete, so that an interrupted session leaves nothing that looks usable.
                with tarfile.open(archive) as tar:
                    # Its SHA-256 is known; Python 3.11.2, Debian 12's, has no filter
                    options: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                    tar.extractall(f"{partial}/images", **options)
                Path(partial, "images").rename(folder)
            assert _count_images(folder) == CIFAR10_JPEG_COUNTS
    return folder


@pytest.fixture(scope="session")
def cifar10_beton(request: pytest.FixtureRequest, cifar10_jpeg: Path) -> Path:
    """Return a folder with train.beton and test.beton of all of CIFAR-10, kept until the code that makes them changes.

    They are made by the command that a user would type.
    """
    root = request.config.rootpath
    sources = [*sorted(root.glob("data_prep/*.py")), *sorted(root.glob("simclr/beton/*.py"))]
    code = b"".join(path.read_bytes() for path in sources)
    key = hashlib.sha256(CIFAR10_JPEG_SHA256.encode() + code).hexdigest()[:12]
    folder = root / ".cache" / f"cifar10-beton-{key}"
    with _one_at_a_time(folder.parent):
        if not folder.exists():
            for stale in root.glob(".cache/cifar10-beton-*"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
                command = ["imagefolder", "--root", str(cifar10_jpeg), "--output", f"{partial}/files"]
                subprocess.run([sys.executable, "-m", "data_prep", *command], cwd=root, check=True)
                Path(partial, "files").rename(folder)
    return folder


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Make a folder, and have pytest-xdist's other processes wait while this one fills it."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _count_images(folder: Path) -> dict[str, int]:
    return {split: sum(1 for _ in folder.glob(f"{split}/*/*.jpg")) for split in CIFAR10_JPEG_COUNTS}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what starts processes, compiles or takes long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slowest_first = {name: i for i, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: slowest_first.get(item.path.stem, len(slowest_first)))
    if not config.option.quick:
        return

    def is_quick(item: pytest.Item) -> bool:
        is_marked = any(item.get_closest_marker(mark) for mark in QUICK_MARKS)
        needs = QUICK_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        is_named = item.path.stem in QUICK_FILES or item.name.split("[")[0] in QUICK_TESTS
        return not (is_marked or needs or is_named)

    left_out = [item for item in items if not is_quick(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if is_quick(item)]


def pytest_configure(config: pytest.Config) -> None:
    # The tests' models are small, and tests run beside others and their own processes: threads would spin while they
    # wait for each other, in the processes that tests start too.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.stash[_passed] = set()
    config.pluginmanager.register(_Passed(config))


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
        is_required = item.get_closest_marker(mark) is not None and _is_required(mark)
        if is_required and report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome = "failed"
            report.longrepr = f"{variable}=1, and this test was skipped: {reason}"
    return report


class _Passed:
    """Notes the marks of which a test has passed, in this process or in another of pytest-xdist's."""

    def __init__(self, config: pytest.Config) -> None:
        self.marks = config.stash[_passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when == "call":
            self.marks.update(mark for mark in REQUIRED_BY if mark in report.keywords)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _lacking(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for mark in _lacking(terminalreporter.config):
        terminalreporter.write_line(f"{REQUIRED_BY[mark]}=1, and no {mark} test passed: the session failed", red=True)


def _is_required(mark: str) -> bool:
    return os.environ.get(REQUIRED_BY[mark]) == "1"


def _lacking(config: pytest.Config) -> list[str]:
    if config.option.collectonly or hasattr(config, "workerinput"):  # one of xdist's processes sees a part of the tests
        return []
    return [mark for mark in REQUIRED_BY if _is_required(mark) and mark not in config.stash[_passed]]
