"""The headers that stand in for OpenCV and libjpeg-turbo, and the script that builds FFCV."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers import ROOT

BUNDLED = ROOT / "native" / "bundled"
INSTALLER = ROOT / "native" / "install_ffcv.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="FFCV is built on Linux only")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# The same calls of OpenCV as in FFCV's libffcv.cpp.
RESIZE_SOURCE = """
#include <opencv2/opencv.hpp>
extern "C" void resize(void *source, int rows, int cols, int top, int bottom, int left, int right,
                       void *target, int target_rows, int target_cols) {
    cv::Mat source_matrix(rows, cols, CV_8UC3, (uint8_t *)source);
    cv::Mat target_matrix(target_rows, target_cols, CV_8UC3, (uint8_t *)target);
    cv::resize(source_matrix.colRange(left, right).rowRange(top, bottom), target_matrix, target_matrix.size(),
               0, 0, cv::INTER_AREA);
}
"""
Resize = Callable[[NDArray[np.uint8], tuple[int, int, int, int], tuple[int, int]], NDArray[np.uint8]]


def _compile(source: str, output: Path, *flags: str) -> Path:
    file = output.with_suffix(".cpp")
    file.write_text(source)
    command = ["g++", "-O2", "-Wall", "-Wextra", "-Werror", str(file), "-o", str(output), *flags]
    subprocess.run(command, check=True)
    return output


@pytest.fixture(scope="module")
def resize_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resize")
    return _compile(RESIZE_SOURCE, folder / "resize.so", "-shared", "-fPIC", f"-I{BUNDLED}")


@pytest.fixture
def resize(resize_library: Path) -> Resize:
    function = ctypes.CDLL(str(resize_library)).resize
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 6, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]

    def call(source: NDArray[np.uint8], box: tuple[int, int, int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        top, bottom, left, right = box
        # A frame around the target shows a write outside it.
        framed = np.full((size[0] * size[1] * 3 + 128,), 123, np.uint8)
        target = framed[64:-64].reshape(*size, 3)
        rows, cols, _ = source.shape
        function(source.ctypes.data, rows, cols, top, bottom, left, right, target.ctypes.data, *size)
        assert (framed[:64] == 123).all()
        assert (framed[-64:] == 123).all()
        return target

    return call


def _random_crop(generator: np.random.Generator, kind: str) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Return a box (top, bottom, left, right) within 200x200 pixels and a target size of the wanted kind."""
    target = generator.integers(1, 49, 2)
    if kind == "by whole numbers":
        extent = target * generator.integers(1, 5, 2)
    elif kind == "smaller":
        extent = target + generator.integers(0, 150, 2)
    elif kind == "larger":
        extent = generator.integers(1, target + 1)
    else:  # one axis shrinks, the other grows
        extent = np.array([target[0] + generator.integers(1, 150), generator.integers(1, target[1] + 1)])
    top, left = (int(generator.integers(0, 200 - length + 1)) for length in extent)
    rows, columns = target
    return (top, top + int(extent[0]), left, left + int(extent[1])), (int(rows), int(columns))


@needs_compiler
@pytest.mark.parametrize("kind", ["by whole numbers", "smaller", "larger", "mixed"])
def test_resize_is_opencvs(resize: Resize, kind: str) -> None:
    cv2 = pytest.importorskip("cv2")
    generator = np.random.default_rng(0)
    differing, pixels = 0, 0
    for _ in range(2000):
        source = generator.integers(0, 256, (200, 200, 3), dtype=np.uint8)
        box, size = _random_crop(generator, kind)
        top, bottom, left, right = box
        actual = resize(source, box, size)
        expected = cv2.resize(source[top:bottom, left:right], size[::-1], interpolation=cv2.INTER_AREA)
        difference = np.abs(actual.astype(np.int16) - expected)
        assert difference.max() <= 1, (box, size)
        differing += int((difference > 0).sum())
        pixels += difference.size
    # Equal to the bit with OpenCV 5.0 on x86-64. A compiler that contracts a product and a sum may round apart.
    assert differing / pixels < 1e-3


@needs_compiler
def test_enlarging_to_twice_the_size_repeats_pixels(resize: Resize) -> None:
    source = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    enlarged = resize(source, (0, 16, 0, 12), (32, 24))
    np.testing.assert_array_equal(enlarged, source.repeat(2, axis=0).repeat(2, axis=1))


@needs_compiler
def test_no_symbol_of_the_headers_can_be_confused_with_opencvs(resize_library: Path) -> None:
    listed = subprocess.run(
        ["nm", "--dynamic", "--demangle", str(resize_library)], check=True, capture_output=True, text=True
    ).stdout
    assert " T resize" in listed
    assert "cv::" not in listed


@needs_compiler
def test_jpeg_without_libjpeg_turbo_ends_the_process_and_says_why(tmp_path: Path) -> None:
    source = "#include <turbojpeg.h>\nint main() { return tjInitDecompress() != nullptr; }\n"
    flags = (f"-I{BUNDLED / 'no_jpeg'}", "-Wno-unused-function")
    program = _compile(source, tmp_path / "decode", *flags)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGABRT
    assert "cannot decode JPEG images. Install libturbojpeg0-dev" in result.stderr


# ------------------------------------------------------------------------------------------ the installer


@pytest.fixture
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_ffcv", INSTALLER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["install_ffcv"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _run_installer(
    *arguments: str, python: str | Path = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), str(INSTALLER), *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_without_compiler_it_names_the_package_and_the_in_memory_loader(tmp_path: Path) -> None:
    result = _run_installer("--force", PATH=str(tmp_path), CXX="c++-that-is-not-there")
    assert result.returncode == 3
    assert "no C++ compiler was found (tried c++-that-is-not-there, g++" in result.stderr
    assert "sudo apt-get install g++" in result.stderr
    assert "in-memory loader" in result.stderr


@needs_compiler
def test_without_pythons_headers_it_names_the_package(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(sys, "argv", ["install_ffcv.py", "--force"])
    assert installer.main() == 3
    major, minor = sys.version_info[:2]
    assert f"sudo apt-get install python{major}.{minor}-dev" in capsys.readouterr().err


def test_elsewhere_than_on_linux_it_says_so(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sys, "argv", ["install_ffcv.py"])
    assert installer.main() == 3
    assert "FFCV runs on Linux only" in capsys.readouterr().err


@needs_compiler
def test_in_an_empty_environment_it_names_the_missing_packages(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    result = _run_installer("--mode", "headers", python=tmp_path / "empty" / "bin" / "python")
    assert result.returncode == 1
    assert "lacks opencv-python-headless, numba" in result.stderr
    assert "pip install '.[ffcv]'" in result.stderr


@needs_compiler
def test_system_mode_without_opencv_fails_and_auto_falls_back_aloud(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _tool(tmp_path, "pkg-config", 'echo "Package opencv4 was not found"; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(installer.CannotBuildError, match="libopencv-dev is not installed"):
        installer.possible_plans("system", None)
    (plan,) = installer.possible_plans("auto", None)
    assert plan.opencv == "bundled-headers"
    assert "Not building against the system's OpenCV" in capsys.readouterr().out


def test_of_opencvs_libraries_only_the_used_ones_are_linked(installer: ModuleType) -> None:
    debians = "-I/usr/include/opencv4 -L/opt/lib -lopencv_stitching -lopencv_imgproc -lopencv_core -pthread -DX=1"
    assert installer.opencv_flags(debians) == "-I/usr/include/opencv4 -L/opt/lib -lopencv_imgproc -lopencv_core"


@needs_compiler
def test_libjpeg_turbo_in_a_folder_of_its_own_is_used_and_found_at_run_time(
    installer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LDFLAGS", raising=False)
    (tmp_path / "include").mkdir()
    (tmp_path / "lib").mkdir()
    header = 'extern "C" void *tjInitDecompress();\n'
    (tmp_path / "include" / "turbojpeg.h").write_text(header)
    source = header + "void *tjInitDecompress() { return nullptr; }\n"
    _compile(source, tmp_path / "lib" / "libturbojpeg.so", "-shared", "-fPIC")

    (plan,) = installer.possible_plans("headers", tmp_path)
    assert plan.jpeg
    assert plan.turbojpeg_flags == f"-I{tmp_path}/include -L{tmp_path}/lib -lturbojpeg"
    assert plan.environment["LDFLAGS"] == f"-Wl,-rpath,{tmp_path}/lib"


@needs_compiler
def test_a_wrong_folder_for_libjpeg_turbo_is_an_error(tmp_path: Path) -> None:
    result = _run_installer("--force", "--turbojpeg", str(tmp_path))
    assert result.returncode == 3
    missing = tmp_path / "include" / "turbojpeg.h"
    # Also where the system has its own, which the compiler would find instead.
    assert f"--turbojpeg {tmp_path}: libjpeg-turbo cannot be used from there: no {missing}" in result.stderr


def test_the_stand_in_for_pkg_config_answers_what_it_was_told(tmp_path: Path) -> None:
    def ask(package: str, **variables: str) -> tuple[int, str]:
        command = [str(ROOT / "native" / "bin" / "pkg-config"), "--cflags", "--libs", package]
        environment = {"PATH": os.environ["PATH"]} | variables
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout.strip()

    told = {"FFCV_OPENCV_FLAGS": "-I/a -lm", "FFCV_TURBOJPEG_FLAGS": "-lturbojpeg"}
    assert ask("opencv4", **told) == (0, "-I/a -lm")
    assert ask("libturbojpeg", **told) == (0, "-lturbojpeg")
    assert ask("opencv4")[0] != 0
    assert ask("something", **told) == (1, "--cflags --libs something not found")  # FFCV looks for "not found"


# ------------------------------------------------------------------------------------------ the installed FFCV


@pytest.fixture
def record(installer: ModuleType) -> dict[str, Any]:
    """Return what native/install_ffcv.py recorded about this environment's FFCV."""
    found: dict[str, Any] | None = installer.installed_record()
    if found is None:
        reason = "no FFCV built by native/install_ffcv.py is installed here"
        if os.environ.get("REQUIRE_FFCV") == "1":
            pytest.fail(f"REQUIRE_FFCV=1, and {reason}")
        pytest.skip(reason)
    return found


def test_the_record_can_be_asked_for_and_goes_with_ffcv(record: dict[str, Any]) -> None:
    distribution = metadata.distribution("ffcv")
    assert json.loads(distribution.read_text("ffcv_build.json") or "") == record
    assert record["ffcv"] == distribution.version == "1.0.2"
    assert record["opencv"] in ("system", "bundled-headers")
    assert isinstance(record["jpeg"], bool)
    assert record["findings"]["resize_max_difference"] <= 1
    # Listed among FFCV's files, so that uninstalling FFCV removes it.
    assert "ffcv_build.json" in [file.name for file in distribution.files or []]


def test_a_record_of_another_build_is_not_believed(
    installer: ModuleType, record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = metadata.distribution("ffcv")
    library = Path(str(distribution.locate_file("ffcv"))) / record["library"]
    metadata_folder = tmp_path / "ffcv-1.0.2.dist-info"
    metadata_folder.mkdir()
    (tmp_path / "ffcv").mkdir()
    for name in ("METADATA", "RECORD", "ffcv_build.json"):
        (metadata_folder / name).write_text(distribution.read_text(name) or "")
    monkeypatch.syspath_prepend(str(tmp_path))
    copy = tmp_path / "ffcv" / library.name
    copy.write_bytes(library.read_bytes())
    assert installer.installed_record() == record
    copy.write_bytes(library.read_bytes() + b"\0")
    assert installer.installed_record() is None
    copy.unlink()
    assert installer.installed_record() is None


@needs_compiler
def test_a_second_installation_changes_nothing(installer: ModuleType, record: dict[str, Any]) -> None:
    if not installer.matches(record, installer.possible_plans("auto", None)[0]):
        pytest.skip("system packages came or went since: this machine would now build FFCV differently")
    result = _run_installer()
    assert result.returncode == 0
    assert "is installed already" in result.stdout
    assert "Building FFCV" not in result.stdout


@pytest.mark.slow
def test_the_installed_ffcv_returns_what_was_written(record: dict[str, Any]) -> None:
    command = [sys.executable, str(ROOT / "native" / "verify_ffcv.py"), *(["--jpeg"] if record["jpeg"] else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["resize_max_difference"] <= 1
