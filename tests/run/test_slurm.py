"""Jobs that are interrupted: what the job scripts decide, with stand-ins, and a real SLURM that runs them.

The tests marked slurm start a SLURM of two nodes on this machine (tests/slurm/up.sh). They need root and Debian's
packages slurmctld, slurmd, slurm-client and munge, and are skipped elsewhere; with REQUIRE_SLURM=1 that is a failure.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from simclr.run import runlog
from tests.helpers import ROOT
from tests.launching import (
    JOBS,
    NUM_IMAGES,
    SMALL_RUN,
    assert_close_weights,
    environment,
    last_step,
    needs_bash,
    run_here,
    wait_until,
)
from tests.runs import write_shapes

SLURM_TOOLS = ROOT / "tests" / "slurm"
LONGER = ["--epochs", "20", "--log-every-steps", "1", "--checkpoint-every-epochs", "5"]

# ---------------------------------------------------------------------------------- decisions, with stand-ins
#
# A job of one node whose training follows a script, one line of bash for each time that it is started. SLURM's
# commands are stand-ins that note how they were called.

TOOLS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        [ "$1" != true ] || exec [ -z "$IS_NODE_LOST" ]
        SLURM_NODEID=0 exec "$@"
        """,
    "scontrol": """
        case "$1 $2" in
            "show hostnames") echo 127.0.0.1 ;;
            "show job") echo "   JobState=$JOB_STATE Reason=None"; echo "   PreemptTime=$PREEMPT_TIME" ;;
            "show config") echo "SlurmdTimeout           = 300 sec" ;;
            requeue*) echo requeue >> "$NOTES"; kill -KILL $PPID ;;
        esac
        """,
    # SLURM ends a job that waits for it.
    "sleep": """
        [ "$1" -lt 300 ] || { echo slurm >> "$NOTES"; kill -KILL $PPID; }
        """,
    "python": """
        echo training >> "$NOTES"
        status() { printf '{\\n  "state": "%s",\\n  "step": %s,\\n  "reason": null\\n}\\n' "$@" > "$RUN/status.json"; }
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

    def submit(
        self, script: list[str], name: str = "run", options: tuple[str, ...] = (), **variables: str
    ) -> tuple[int, str]:
        """Run the job until it ends by itself; return its exit status and all output. A killed job is started again."""
        bin_folder = self.folder / "venv" / "bin"
        bin_folder.mkdir(parents=True, exist_ok=True)
        for tool, text in TOOLS.items():
            (bin_folder / tool).write_text("#!/bin/bash\n" + text)
            (bin_folder / tool).chmod(0o755)
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
            IS_NODE_LOST="",
            PREEMPT_TIME="None",
        )
        env |= variables
        env["PATH"] = f"{bin_folder}{os.pathsep}{env['PATH']}"
        output = ""
        for restart in range(10):
            result = subprocess.run(
                ["bash", str(JOBS / "pretrain.sbatch"), str(self.folder / name), str(self.images), "demo", *options],
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
        # What is killed leaves "running" behind, and the lock free
        (["status running 0; kill -KILL $$"] * 3, [T, R, T, R, T], 1, "ended: state died, step 0, status 137"),
        # What training refuses at first it would refuse again; later a node may be to blame
        (["echo refused; exit 1"], [T], 1, "training did not begin; the reason is in"),
        (["status failed 5; exit 1", "exit 1", "status finished 90"], [T, T, R, T], 0, "finished"),
        (["status interrupted 5", *["exit 1"] * 3], [T, R, T, R, T, R, T], 1, "3 attempts in a row ended at"),
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
def test_a_job_whose_node_is_lost_is_left_to_slurm(job: Job) -> None:
    script = ["status failed 5; exit 1", "exit 1", "status finished 90"]
    returned, output = job.submit(script, IS_NODE_LOST="1")
    assert job.notes == [T, T, "slurm", T], output
    assert returned == 0
    assert "a node does not answer: SLURM requeues this job when it has noticed, within some 300 s" in output


@needs_bash
def test_a_job_submitted_again_has_all_its_attempts(job: Job) -> None:
    failing = ["status failed 5; exit 1"] * 9
    assert job.submit(failing)[0] == 1
    first = job.notes
    assert job.submit(failing)[0] == 1
    assert job.notes == [T, R, T, R, T]
    assert first == [T, T, R, T, R, T]


@needs_bash
def test_a_task_of_an_array_has_its_own_seed_and_folder(job: Job) -> None:
    returned, output = job.submit(['RUN=$RUN-3; echo "$*"; status finished 90'], name="run-%a", SLURM_ARRAY_TASK_ID="3")
    assert returned == 0, output
    expected = f"train_simclr.py demo --data {job.images} --output {job.run}-3 --world-size 1 --seed 3"
    assert expected in output


@needs_bash
@pytest.mark.parametrize("status", [0, 3])
def test_a_dry_run_is_started_once_and_ends_the_job_as_it_ended(job: Job, status: int) -> None:
    returned, output = job.submit([f'echo "$*"; exit {status}'], options=("--dry-run", "--seed", "1"))
    assert (returned, job.notes) == (status, [T]), output
    assert f"train_simclr.py demo --data {job.images} --output {job.run} --world-size 1 --dry-run --seed 1" in output


# --------------------------------------------------------------------------------------------------- a real SLURM


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Two nodes of 8 cores and 2 GPUs each (pretended), and the partitions "low" and "high"."""

    folder: Path

    def call(self, *command: str | Path, **variables: str) -> str:
        env = environment(
            SLURM_CONF=str(self.folder / "slurm.conf"),
            MASTER_ADDR="127.0.0.1",  # the nodes' names stand for nothing outside this SLURM
            VENV=sys.prefix,
            **variables,
        )
        result = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def state(self, job: str) -> str:
        match = re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))
        assert match is not None
        return match[1]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"a SLURM of the test's own needs root and {', '.join(missing) or 'nothing else'}")
    # Not under pytest's folder, which munge's own user may not enter, and short, as the path of a socket has to be
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        try:
            subprocess.run([str(SLURM_TOOLS / "up.sh"), name], check=True, timeout=60)
            yield Slurm(folder)
        finally:
            subprocess.run([str(SLURM_TOOLS / "down.sh"), name], check=True, timeout=60)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("job", "asked"),
    [
        ("pretrain.sbatch", {"signal": "B:USR1@120", "requeue": "requeue", "open-mode": "a"}),
        ("probe.sbatch", {"requeue": "requeue", "open-mode": "a"}),
    ],
)
def test_what_slurm_reads_in_a_job(slurm: Slurm, job: str, asked: dict[str, str]) -> None:
    """The time limit itself is waited for by no test: SLURM looks at it every 30 seconds."""
    read = slurm.call("sh", "-c", 'sbatch --verbose --test-only "$0" 2>&1', JOBS / job)
    found = dict(re.findall(r"(?m)^sbatch: ([a-z-]+) +: (\S+)$", read))
    assert asked.items() <= found.items(), read


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.distributed
def test_an_interrupted_job_gives_the_weights_of_an_uninterrupted_run(slurm: Slurm, tmp_path: Path) -> None:
    """Two nodes, one process each: signalled as before the time limit, preempted, requeued by hand; then probed."""
    images = write_shapes(tmp_path / "train.beton", NUM_IMAGES)
    write_shapes(tmp_path / "test.beton", NUM_IMAGES, "test")
    folder, log = tmp_path / "run", tmp_path / "job.log"
    about: list[str | Path] = ["--output", log, "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1"]
    job = slurm.call("sbatch", "--parsable", *about, JOBS / "pretrain.sbatch", folder, images, *SMALL_RUN, *LONGER)
    probe_log = tmp_path / "probe.log"
    probe = ["--num-validation", "8", "--epochs", "1", "--loader", "memory"]
    probe_job = slurm.call(
        "sbatch", "--parsable", f"--dependency=afterok:{job}", "--output", probe_log,
        "--gpus-per-node=1", "--cpus-per-task=1", JOBS / "probe.sbatch", folder, *probe,
    )  # fmt: skip

    def restarts() -> int:
        return log.read_text().count(f"job {job}, restart ") - 1

    def interrupt(*command: str) -> None:
        """Do so once training has gone on, and see that no step is lost."""
        resumed = last_step(folder)
        wait_until("training goes on", lambda: last_step(folder) > resumed + 2)
        begun = restarts()
        slurm.call(*command)
        wait_until("the job is requeued", lambda: slurm.state(job) == "PENDING")
        status = json.loads((folder / "status.json").read_text())
        assert status["state"] == "interrupted", log.read_text()
        assert status["step"] == last_step(folder) > resumed + 2
        # SLURM would hold it for 6 s; but a job that starts in the second of its requeue it refuses to start at all.
        slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now+2seconds")
        wait_until("the job starts again", lambda: restarts() == begun + 1)

    interrupt("scancel", "--signal=USR1", "--batch", job)
    interrupt("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    interrupt("scontrol", "requeue", job)
    wait_until("the job ends", lambda: slurm.state(job) not in {"PENDING", "RUNNING", "COMPLETING"})
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert f"job {job}, restart 3: 2 node(s) x 1 processes = 2, meeting at 127.0.0.1:" in log.read_text()

    assert_close_weights(folder, run_here(images, tmp_path / "reference", *LONGER))
    steps = [line["step"] for line in runlog.read_metrics(folder) if line["kind"] == "step"]
    assert steps == list(range(1, steps[-1] + 1))

    wait_until("the probe ends", lambda: slurm.state(probe_job) not in {"PENDING", "RUNNING", "COMPLETING"})
    assert slurm.state(probe_job) == "COMPLETED", probe_log.read_text()
    assert (folder / "probe-linear" / "simclr_lin_best.pt").exists()
