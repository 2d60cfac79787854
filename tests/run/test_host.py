from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, numpy as np
from simclr.run import host
did = host.keep_freed_memory()
def step():
    blocks = [np.ones(5 << 20) for _ in range(3)]  # 40 MiB each
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, did)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="would show that glibc keeps memory; there is none here")
def test_a_step_finds_the_memory_of_the_step_before() -> None:
    def faults(**variables: str) -> tuple[int, str]:
        # numpy asks for large pages, which hide most faults
        environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"} | variables
        environment.pop("GLIBC_TUNABLES", None)
        command = [sys.executable, "-c", PROGRAM]
        root = Path(__file__).resolve().parents[2]
        output = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
        number, _, did = output.strip().partition(" ")
        return int(number), did

    number, did = faults()
    assert did == "freed memory is kept for the next step"
    assert number < 100
    number, did = faults(MALLOC_TRIM_THRESHOLD_="100000")  # the user's own choice is left alone
    assert did == "None"
    assert number > 1000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which takes nothing")
@pytest.mark.parametrize(
    "program",  # train_simclr.py: tests/run/test_faults.py
    [
        "linear_probe.py",
        *(f"-m {m}" for m in ("data_prep", "simclr.run.doctor", "simclr.export", "simclr.run.runlog")),
    ],
)
def test_every_program_ends_as_it_would_when_nobody_takes_its_output(program: str) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, *program.split(), "--help"]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, cwd=root, stdout=full, stderr=full, check=False, timeout=120).returncode == 0
