"""The scripts' own promises, without installing anything; the versions that are written in two places."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")


def _bash(*command: str, **variables: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV")}
    result = subprocess.run(
        ["bash", *command],
        cwd=ROOT,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    return result.returncode, result.stdout


def _fake_python(folder: Path, version: str) -> Path:
    """Make an interpreter that claims a version and can do nothing else."""
    python = folder / f"python-{version}"
    python.write_text(f'#!/bin/sh\ncase "$2" in *sys.exit*) exit 1 ;; *) echo {version} ;; esac\n')
    python.chmod(0o755)
    return python


def test_setup_refuses_an_unknown_option() -> None:
    status, output = _bash("scripts/setup.sh", "--development")
    assert status == 1
    assert "unknown argument '--development'; known are --dev and --without-ffcv" in output


def test_setup_refuses_an_old_python_by_its_version(tmp_path: Path) -> None:
    python = _fake_python(tmp_path, "3.10")
    status, output = _bash("scripts/setup.sh", PYTHON=str(python), VENV=str(tmp_path / "venv"))
    assert status == 1
    assert f"PYTHON={python} is Python 3.10; 3.11 to 3.14 is needed" in output
    assert not (tmp_path / "venv").exists()


def test_setup_without_rights_names_what_to_install(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "basename", "cat", "cksum", "date", "dirname", "uname"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    (tools / "python3").symlink_to(_fake_python(tmp_path, "3.10"))
    status, output = _bash("scripts/setup.sh", PATH=str(tools), VENV=str(tmp_path / "venv"))
    assert status == 1
    assert "python3 is 3.10; Python 3.11 to 3.14 is needed" in output
    assert "sudo apt-get install python3.11 python3.11-venv python3.11-dev" in output


@pytest.mark.skipif(sys.platform != "linux", reason="the stamp names FFCV")
def test_setup_done_once_is_believed_until_something_it_depends_on_changes(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("scripts", "native"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", project)
    environment = project / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    # The stamp as setup.sh writes it, from its own function.
    script = (project / "scripts" / "setup.sh").read_text()
    match = re.search(r"^fingerprint\(\) \{.*?^\}", script, re.MULTILINE | re.DOTALL)
    assert match is not None
    stamp = f"cd {project} && with_ffcv=1\n{match.group()}\nfingerprint > .venv/setup-done"
    assert _bash("-c", stamp) == (0, "")

    # Where a stamp is not believed, this interpreter ends the attempt before anything is installed.
    old = str(_fake_python(tmp_path, "3.10"))
    setup = str(project / "scripts" / "setup.sh")
    assert _bash(setup, PYTHON=old)[0] == 0
    assert _bash(setup, "--dev", PYTHON=old)[0] == 1
    header = project / "native" / "bundled" / "opencv2" / "opencv.hpp"
    header.write_text(header.read_text() + "// changed\n")
    assert _bash(setup, PYTHON=old)[0] == 1


def test_a_failing_command_shows_its_output_and_ends_the_script() -> None:
    script = ". scripts/common.sh; show_only '^shown' sh -c 'echo shown; echo reason; exit 3'; echo went on"
    status, output = _bash("-c", script)
    assert status == 1
    assert "reason" in output
    assert "failed with status 3" in output
    assert "went on" not in output


def test_a_working_command_shows_the_wanted_lines_only() -> None:
    script = ". scripts/common.sh; show_only '^shown' sh -c 'echo shown; echo hidden'; echo went on"
    assert _bash("-c", script) == (0, "shown\nwent on\n")


def test_pre_commit_uses_the_versions_of_pyproject() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    development = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    (ruff,) = [requirement for requirement in development if requirement.startswith("ruff")]
    pinned = re.findall(r"ruff==[\d.]+", hooks)
    assert len(pinned) == 2
    assert set(pinned) == {ruff}
