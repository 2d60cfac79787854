"""Builds and installs FFCV into the Python that runs this, by `python native/install_ffcv.py`.

FFCV is published as source only, and its build asks for OpenCV and libjpeg-turbo with their headers. Where they
are installed, FFCV is built against them. Elsewhere it is built against the small headers in native/bundled/,
without root rights: FFCV then handles raw images, and JPEG too if libjpeg-turbo is there. The result is tried
out (verify_ffcv.py) and its abilities are recorded as ffcv_build.json in FFCV's metadata folder, from where

    importlib.metadata.distribution("ffcv").read_text("ffcv_build.json")

returns them. Needs nothing but Python's standard library. Exit status: 0 FFCV is installed and works; 3 this
machine cannot build it, the in-memory loader takes its place; 1 something unexpected failed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORD_NAME = "ffcv_build.json"
RECORD_FORMAT = 1
REQUIREMENT = HERE / "ffcv.txt"  # name, version and checksum
VERSION = "1.0.2"
# What importing FFCV and building it need in this environment: module -> package.
NEEDED_PACKAGES = {
    "cv2": "opencv-python-headless",
    "numba": "numba",
    "numpy": "numpy",
    "PIL": "pillow",
    "pip": "pip",
    "psutil": "psutil",
    "setuptools": "setuptools",
    "torch": "torch",
    "tqdm": "tqdm",
}
EXIT_FAILED = 1
EXIT_CANNOT_BUILD = 3
WITHOUT_FFCV = (
    "Nothing is lost without FFCV: the in-memory loader reads the same .beton files and returns the same batches "
    "and is chosen by itself."
)
HOW_TO_GET_JPEG = (
    "For JPEG files: sudo apt-get install libturbojpeg0-dev   (Ubuntu also: libturbojpeg-dev),\n"
    "  with libopencv-dev and pkg-config beside it to use the system's OpenCV; then run this again."
)


class CannotBuildError(Exception):
    """This machine lacks something that building FFCV needs; the message says what and how to get it."""


class BuildFailedError(Exception):
    """The build, or the trial of its result, failed although everything seemed to be there."""


@dataclass(frozen=True)
class Plan:
    """What FFCV is to be built against."""

    opencv: str  # "system" or "bundled-headers"
    jpeg: bool
    opencv_flags: str  # -I, -L and -l only: FFCV's setup.py fails on all others
    turbojpeg_flags: str
    environment: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        opencv = "the system's OpenCV" if self.opencv == "system" else "this project's headers in place of OpenCV"
        return f"{opencv}, {'raw and JPEG images' if self.jpeg else 'raw images only'}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build and install FFCV into the Python that runs this script.",
        epilog="Exit status: 0 FFCV works; 3 this machine cannot build it; 1 something unexpected failed.",
    )
    parser.add_argument(
        "--mode",
        choices=("auto", "system", "headers"),
        default="auto",
        help="build against the system's OpenCV, this project's headers, or the first that is possible",
    )
    parser.add_argument(
        "--turbojpeg",
        type=Path,
        metavar="DIR",
        help="folder with include/turbojpeg.h and lib/libturbojpeg.so, if libjpeg-turbo is not the system's",
    )
    parser.add_argument("--force", action="store_true", help="build even if FFCV is installed as wanted")
    arguments = parser.parse_args()
    try:
        return install(arguments.mode, arguments.turbojpeg, arguments.force)
    except CannotBuildError as error:
        print(f"{error}\n{WITHOUT_FFCV}", file=sys.stderr)
        return EXIT_CANNOT_BUILD
    except BuildFailedError as error:
        print(f"{error}\n{WITHOUT_FFCV}", file=sys.stderr)
        return EXIT_FAILED


def install(mode: str, turbojpeg: Path | None, force: bool) -> int:
    if sys.platform != "linux":
        raise CannotBuildError(f"FFCV runs on Linux only, this is {platform.system()}.")
    installed = installed_record()
    try:
        plans = possible_plans(mode, turbojpeg)
    except CannotBuildError as error:
        if installed is None or force or mode != "auto":
            raise
        say(f"FFCV {VERSION} is installed ({describe_record(installed)}); as before. {error}")
        return 0
    if installed is not None and not force and matches(installed, plans[0]):
        say(f"FFCV {VERSION} is installed already: {plans[0].describe()}.")
        if not plans[0].jpeg:
            say(HOW_TO_GET_JPEG)
        return 0
    check_packages()
    for plan in plans:
        try:
            build(plan)
            break
        except BuildFailedError as error:
            if plan is plans[-1]:
                raise
            say(f"Building FFCV against {plan.describe()} failed, the next way is tried. {error}")
    if not plan.jpeg:
        say(HOW_TO_GET_JPEG)
    return 0


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------- what this machine has


def possible_plans(mode: str, turbojpeg: Path | None) -> list[Plan]:
    """Return the ways to build FFCV here, the best first; raise CannotBuildError if there is none."""
    compiler = working_compiler()
    plans = []
    if mode != "headers":
        system = system_plan(compiler, turbojpeg)
        if isinstance(system, Plan):
            plans.append(system)
        elif mode == "system":
            raise CannotBuildError(f"FFCV cannot be built against the system's OpenCV: {system}")
        else:
            say(f"Not building against the system's OpenCV: {system}")
    if mode != "system":
        flags = turbojpeg_flags(compiler, turbojpeg)
        plans.append(
            Plan(
                opencv="bundled-headers",
                jpeg=flags is not None,
                # setup.py expects at least one library; libm is always there.
                opencv_flags=f"-I{HERE / 'bundled'} -lm",
                turbojpeg_flags=flags if flags is not None else f"-I{HERE / 'bundled' / 'no_jpeg'}",
                environment=compiler_environment(compiler, turbojpeg),
            )
        )
    return plans


def working_compiler() -> str:
    """Return a C++ compiler that compiles and links a Python extension; say what is missing otherwise."""
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or ""
    candidates = [*shlex.split(configured)[:1], "g++", "c++", "clang++"]
    compiler = next((found for name in candidates if (found := shutil.which(name))), None)
    if compiler is None:
        raise CannotBuildError(
            f"FFCV cannot be built: no C++ compiler was found (tried {', '.join(candidates)}).\n{apt_install('g++')}"
        )
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise CannotBuildError(
            f"FFCV cannot be built: Python's own headers are missing ({include / 'Python.h'}).\n{apt_install(package)}"
        )
    output = try_compile(compiler, "#include <Python.h>\n#include <vector>\n", [f"-I{include}"])
    if output is not None:
        raise CannotBuildError(
            f"FFCV cannot be built: {compiler} does not compile a Python extension:\n{output}\n{apt_install('g++')}"
        )
    return compiler


def system_plan(compiler: str, turbojpeg: Path | None) -> Plan | str:
    """Return the plan that uses the system's OpenCV, or in words why there is none."""
    pkg_config = shutil.which("pkg-config")
    if pkg_config is None:
        return "pkg-config is not installed."
    asked = subprocess.run([pkg_config, "--cflags", "--libs", "opencv4"], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        return "pkg-config does not know opencv4 (libopencv-dev is not installed)."
    jpeg_flags = turbojpeg_flags(compiler, turbojpeg)
    if jpeg_flags is None:
        return "libjpeg-turbo is not installed with its header."
    flags = opencv_flags(asked.stdout)
    source = "#include <opencv2/opencv.hpp>\nvoid f(cv::Mat a, cv::Mat b) { cv::resize(a, b, b.size()); }\n"
    output = try_compile(compiler, source, shlex.split(flags))
    if output is not None:
        return f"the OpenCV that pkg-config names does not compile:\n{output}"
    return Plan(
        opencv="system",
        jpeg=True,
        opencv_flags=flags,
        turbojpeg_flags=jpeg_flags,
        environment=compiler_environment(compiler, turbojpeg),
    )


def opencv_flags(pkg_config_output: str) -> str:
    """Reduce what pkg-config says about OpenCV to what FFCV uses and its setup.py accepts.

    FFCV uses two of OpenCV's some sixty libraries. Naming all of them would tie FFCV to each, and with them to
    a version of every video and GUI library of the system.
    """
    tokens = shlex.split(pkg_config_output)
    places = [token for token in tokens if token[:2] in ("-I", "-L")]
    libraries = [token for token in tokens if token in ("-lopencv_core", "-lopencv_imgproc", "-lopencv_world")]
    return shlex.join([*places, *libraries])


def turbojpeg_flags(compiler: str, folder: Path | None) -> str | None:
    """Return the flags that compile and link against libjpeg-turbo, None if it is not there."""
    if folder is None:
        flags = "-lturbojpeg"
    else:
        folder = folder.resolve()
        # Looked for here, since a compiler that does not find them there goes on with the system's.
        for file in (folder / "include" / "turbojpeg.h", folder / "lib" / "libturbojpeg.so"):
            if not file.exists():
                raise CannotBuildError(f"--turbojpeg {folder}: libjpeg-turbo cannot be used from there: no {file}")
        flags = f"-I{folder / 'include'} -L{folder / 'lib'} -lturbojpeg"
    source = "#include <turbojpeg.h>\nvoid *f() { return tjInitDecompress(); }\n"
    output = try_compile(compiler, source, shlex.split(flags))
    if output is None:
        return flags
    if folder is not None:
        raise CannotBuildError(f"--turbojpeg {folder}: libjpeg-turbo cannot be used from there:\n{output}")
    return None


def try_compile(compiler: str, source: str, flags: list[str]) -> str | None:
    """Compile and link a shared library; return None on success, else what the compiler said."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.cpp"
        file.write_text(source)
        # -z defs: what is not found at link time is an error, as it would be at import.
        command = [compiler, "-shared", "-fPIC", str(file), "-o", f"{folder}/trial.so", *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else last_lines(result.stderr, 10)


def compiler_environment(compiler: str, turbojpeg: Path | None) -> dict[str, str]:
    environment: dict[str, str] = {}
    configured = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "")
    if not configured or shutil.which(configured[0]) is None:
        # This Python was built with a compiler that is not on this machine.
        environment |= {"CC": compiler, "CXX": compiler}
    if turbojpeg is not None:
        rpath = f"-Wl,-rpath,{turbojpeg.resolve() / 'lib'}"
        environment["LDFLAGS"] = f"{os.environ.get('LDFLAGS', '')} {rpath}".strip()
    return environment


def apt_install(*packages: str) -> str:
    return f"  Debian, Ubuntu: sudo apt-get install {' '.join(packages)}   then run this again."


def check_packages() -> None:
    missing = [package for module, package in NEEDED_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BuildFailedError(
            f"{sys.executable} lacks {', '.join(missing)}.\n"
            "  Install the project with its ffcv extra first: python -m pip install '.[ffcv]'"
        )


# ------------------------------------------------------------------------------------- build, trial, record


def build(plan: Plan) -> None:
    """Build and install FFCV as planned and try it out; after a failure FFCV is not installed."""
    say(f"Building FFCV {VERSION} against {plan.describe()} ...")
    start = time.monotonic()
    environment = os.environ | plan.environment
    environment |= {
        "PATH": f"{HERE / 'bin'}{os.pathsep}{os.environ['PATH']}",  # our pkg-config comes first
        "FFCV_OPENCV_FLAGS": plan.opencv_flags,
        "FFCV_TURBOJPEG_FLAGS": plan.turbojpeg_flags,
        # As a variable, because the newest pips have no such option any more, and no other way to build.
        "PIP_USE_PEP517": "1",
    }
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Its metadata asks for opencv-python, which needs a display's libraries and overwrites the headless one.
    command += ["--no-deps"]
    # With this environment's setuptools. pip's cache must not answer: it does not know what a wheel was built
    # against.
    command += ["--no-build-isolation", "--no-cache-dir", "--no-binary", "ffcv", "--force-reinstall"]
    command += ["--require-hashes", "--requirement", str(REQUIREMENT)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildFailedError(f"FFCV could not be built, pip says:\n{last_lines(result.stdout + result.stderr, 40)}")
    built = time.monotonic()
    try:
        findings = verify(plan)
    except BuildFailedError:
        uninstall()
        raise
    write_record(plan, findings)
    say(
        f"FFCV {VERSION} is installed and tried out: {plan.describe()} "
        f"({built - start:.0f} s to build, {time.monotonic() - built:.0f} s to try)."
    )


def verify(plan: Plan) -> dict[str, object]:
    """Run verify_ffcv.py in a process of its own and return its findings."""
    command = [sys.executable, str(HERE / "verify_ffcv.py"), *(["--jpeg"] if plan.jpeg else [])]
    try:
        environment = os.environ | {"TQDM_DISABLE": "1"}  # no progress bars among the errors
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    except subprocess.TimeoutExpired:
        raise BuildFailedError("FFCV was built, but its trial did not end within 600 s.") from None
    if result.returncode != 0:
        raise BuildFailedError(f"FFCV was built, but it does not work:\n{last_lines(result.stderr, 30)}")
    findings: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return findings


def uninstall() -> None:
    command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "ffcv"]
    subprocess.run(command, check=False, capture_output=True)


def library_of(distribution: metadata.Distribution) -> Path:
    """Return FFCV's native library."""
    for file in distribution.files or []:
        if file.name.startswith("_libffcv.") and file.suffix == ".so":
            return Path(str(distribution.locate_file(file)))
    raise BuildFailedError("the installed FFCV has no native library.")


def write_record(plan: Plan, findings: dict[str, object]) -> None:
    importlib.invalidate_caches()  # FFCV came after this process looked for it
    distribution = metadata.distribution("ffcv")
    library = library_of(distribution)
    record = {
        "format_version": RECORD_FORMAT,
        "ffcv": distribution.version,
        "opencv": plan.opencv,
        "jpeg": plan.jpeg,
        "python": platform.python_version(),
        "library": library.name,
        "library_sha256": sha256(library),
        "findings": findings,
    }
    installed_files = next(file for file in distribution.files or [] if file.name == "RECORD")
    listing = Path(str(distribution.locate_file(installed_files)))
    (listing.parent / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
    with listing.open("a") as stream:  # so that pip removes it together with FFCV
        stream.write(f"{listing.parent.name}/{RECORD_NAME},,\n")


def installed_record() -> dict[str, object] | None:
    """Return the record of the installed FFCV; None if there is no FFCV, or none that this script built."""
    try:
        distribution = metadata.distribution("ffcv")
        text = distribution.read_text(RECORD_NAME)
        library = library_of(distribution)
    except (metadata.PackageNotFoundError, BuildFailedError):
        return None
    if text is None or distribution.version != VERSION or not library.is_file():
        return None
    record: dict[str, object] = json.loads(text)
    if record.get("format_version") != RECORD_FORMAT or record.get("library_sha256") != sha256(library):
        return None
    return record


def matches(record: dict[str, object], plan: Plan) -> bool:
    return record["opencv"] == plan.opencv and record["jpeg"] == plan.jpeg


def describe_record(record: dict[str, object]) -> str:
    return f"OpenCV: {record['opencv']}, JPEG: {'yes' if record['jpeg'] else 'no'}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last_lines(text: str, count: int) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


if __name__ == "__main__":
    raise SystemExit(main())
