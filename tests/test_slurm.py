"""Jobs that are interrupted: what the job scripts decide, with stand-ins, and a real SLURM that runs them.

The tests marked slurm start a SLURM of two nodes on this machine (tests/slurm/up.sh). They need root and Debian's
packages slurmctld, slurmd, slurm-client and munge, and are skipped elsewhere; with REQUIRE_SLURM=1 that is a failure.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_launch import JOBS, ROOT, environment, needs_bash

# ---------------------------------------------------------------------------------- decisions, with stand-ins
#
# A job of one node whose training follows a script, one line of bash for each time that it is started. SLURM's
# commands are stand-ins that note how they were called.

TOOLS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        SLURM_NODEID=0 exec "$@"
        """,
    "scontrol": """
        case "$1 $2" in
            "show hostnames") echo 127.0.0.1 ;;
            "show job") echo "   JobState=$JOB_STATE Reason=None"; echo "   PreemptTime=$PREEMPT_TIME" ;;
            requeue*) echo requeue >> "$NOTES"; kill -KILL $PPID ;;
        esac
        """,
    "python": """
        echo training >> "$NOTES"
        status() { printf '{\\n  "state": "%s",\\n  "step": %s,\\n  "total_steps": 90\\n}\\n' "$@" > "$RUN/status.json"; }
        eval "$(sed -n "$(grep -c training "$NOTES")p" "$SCRIPT")"
        """,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job and the SLURM that it believes in."""

    folder: Path
    images: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def submit(self, script: list[str], **variables: str) -> tuple[int, str]:
        """Run the job until it ends by itself; return its exit status and all output. A killed job is started again."""
        bin_folder = self.folder / "venv" / "bin"
        bin_folder.mkdir(parents=True, exist_ok=True)
        for name, text in TOOLS.items():
            (bin_folder / name).write_text("#!/bin/bash\n" + text)
            (bin_folder / name).chmod(0o755)
        (self.folder / "script").write_text("\n".join(script) + "\n")
        (self.folder / "notes").write_text("")
        env = environment(
            SLURM_JOB_ID="7",
            SLURM_JOB_NUM_NODES="1",
            SLURM_JOB_NODELIST="here",
            SLURM_GPUS_ON_NODE="1",
            SLURM_SUBMIT_DIR=str(ROOT),
            VENV=str(self.folder / "venv"),
            NOTES=str(self.folder / "notes"),
            SCRIPT=str(self.folder / "script"),
            RUN=str(self.run),
            JOB_STATE="RUNNING",
            PREEMPT_TIME="None",
        )
        env |= variables
        env["PATH"] = f"{bin_folder}{os.pathsep}{env['PATH']}"
        output = ""
        for restart in range(10):
            result = subprocess.run(
                ["bash", str(JOBS / "pretrain.sbatch"), str(self.run), str(self.images), "demo"],
                cwd=ROOT,
                env=env | {"SLURM_RESTART_COUNT": str(restart)} if restart else env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=60,
            )
            output += result.stdout
            if result.returncode != -signal.SIGKILL:
                return result.returncode, output
        raise AssertionError(f"started 10 times:\n{output}")

    @property
    def notes(self) -> list[str]:
        """What was called, in order: "training" and "requeue"."""
        return (self.folder / "notes").read_text().split()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "train.beton").touch()
    return Job(tmp_path, tmp_path / "train.beton")


T, R = "training", "requeue"
KILL_JOB = "kill -KILL $PPID"  # as SLURM does when a node is lost


@needs_bash
@pytest.mark.parametrize(
    ("script", "notes", "status", "message"),
    [
        (["status finished 90"], [T], 0, "finished: step 90"),
        (["status interrupted 5", "status finished 90"], [T, R, T], 0, "finished"),
        # Failed further on: again at once, on the same nodes
        (["status failed 5; exit 1", "status running 7; exit 1", "status finished 90"], [T, T, T], 0, "again"),
        # Failed without a new checkpoint: elsewhere, three times at most
        (["status failed 0; exit 1"] * 3, [T, R, T, R, T], 1, "3 attempts in a row ended at the checkpoint of step 0"),
        (
            ["status running 5; exit 1", *["status failed 5; exit 1"] * 3],
            [T, T, R, T, R, T],
            1,
            "3 attempts in a row ended at the checkpoint of step 5",
        ),
        # A preemption that comes too early, again and again, is no progress either
        (["status interrupted 0"] * 3, [T, R, T, R, T, R], 1, "3 attempts in a row"),
        # A job that SLURM itself kills and requeues cannot decide anything, but counts
        ([f"status running 0; {KILL_JOB}"] * 3, [T, T, T], 1, "3 attempts in a row"),
        ([f"status running {step}; {KILL_JOB}" for step in range(1, 6)] + ["status finished 90"], [T] * 6, 0, ""),
        # What training refuses it would refuse again
        (["echo refused; exit 1"], [T], 1, "training did not begin; the reason is in"),
        (["status interrupted 5", "echo refused; exit 1"], [T, R, T], 1, "training did not begin"),
    ],
)
def test_what_follows_when_training_ends(
    job: Job, script: list[str], notes: list[str], status: int, message: str
) -> None:
    returned, output = job.submit(script)
    assert job.notes == notes, output
    assert (returned, message in output) == (status, True), output


@needs_bash
def test_a_cancelled_job_does_not_come_back(job: Job) -> None:
    returned, output = job.submit(["status interrupted 5"], JOB_STATE="COMPLETING")
    assert job.notes == [T]
    assert returned == 1
    assert "SLURM is ending this job" in output


@needs_bash
def test_a_job_preempted_before_training_began_is_requeued(job: Job) -> None:
    returned, output = job.submit(["exit 143"] * 3, PREEMPT_TIME="2026-01-01T00:00:00")
    assert job.notes == [T, R, T, R, T, R]
    assert returned == 1, output


@needs_bash
def test_a_job_submitted_again_has_all_its_attempts(job: Job) -> None:
    failing = ["status failed 5; exit 1"] * 9
    assert job.submit(failing)[0] == 1
    first = job.notes
    assert job.submit(failing)[0] == 1
    assert job.notes == [T, R, T, R, T]
    assert first == [T, T, R, T, R, T]
