from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PROGRAM = """
import resource, numpy as np
from simclr import system
did = system.keep_freed_memory()
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
        output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        number, _, did = output.strip().partition(" ")
        return int(number), did

    number, did = faults()
    assert did == "freed memory is kept for the next step"
    assert number < 100
    number, did = faults(MALLOC_TRIM_THRESHOLD_="100000")  # the user's own choice is left alone
    assert did == "None"
    assert number > 1000


PROGRAMS = ["linear_probe.py", "data_prep"]  # train_simclr.py: tests/run/test_faults.py
PROGRAMS += [f"simclr.{name}" for name in ("embed", "export", "report.compare", "run.runlog")]

# What takes seconds is imported once, and frozen, or each child would look through it for garbage. A child ends as any
# program does, which is when Python would find that what it has printed was not taken, and make the status 120.
ONE_AFTER_THE_OTHER = """
import gc, os, runpy, sys
import accelerate, linear_probe, timm
gc.freeze()
for program in sys.argv[1:]:
    if child := os.fork():
        print(program, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for descriptor in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
    sys.argv = [program, "--help"]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        sys.modules.pop(program, None)
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    sys.exit("--help has not ended the program")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which takes nothing")
def test_every_program_ends_as_it_would_when_nobody_takes_its_output() -> None:
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER, *PROGRAMS]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert ended.splitlines() == [f"{program} 0" for program in PROGRAMS]
