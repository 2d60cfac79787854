"""The doctor finds what is really wrong: each test provokes one fault."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr import beton
from simclr.run import doctor
from simclr.run.host import usable_cores
from tests.helpers import ROOT, forget_accelerate_state, small_disk
from tests.launching import TORCHRUN, environment, free_port, run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.beton"
    pixels = np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), dtype=np.uint8)
    beton.write(path, pixels, np.arange(600) % 10)
    return path


def examined(*options: object, **variables: str) -> tuple[int, dict[str, list[str]], str]:
    """Exit status of the doctor; by check, its lines as "state found"; the whole output."""
    command = [sys.executable, "-m", "simclr.run.doctor", *map(str, options)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, lines_of(done.stdout), done.stdout + done.stderr


def lines_of(output: str) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {}
    for line in output.splitlines():
        state, check, found = line[:9].strip(), line[9:21].strip(), line[21:]
        if state in {"ok", "warning", "problem"}:
            lines.setdefault(check, []).append(f"{state} {found}")
    return lines


def test_a_sound_machine_passes_and_every_check_has_its_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ON_CPU", True)
    status = doctor.main(doctor.Options(data=images, output=tmp_path))
    forget_accelerate_state()
    output = capsys.readouterr().out
    lines = lines_of(output)
    assert status == 0, output
    checks = {"versions", "GPUs", "bf16", "CPU", "/dev/shm", "FFCV", "data", "disk", "own name", "processes"}
    assert checks <= set(lines)
    assert lines["data"][0].startswith("ok 600 images of 32 x 32, raw,")
    assert lines["processes"] == ["ok 1 take part, 1 are meant to"]
    assert lines["FFCV"][0].startswith("ok " if importlib.util.find_spec("ffcv") else "warning cannot be used: ")
    assert "problem" not in output


def test_another_number_of_processes_than_meant_is_a_problem() -> None:
    (finding,) = doctor.processes(doctor.Options(world_size=2), torch.device("cpu"))
    assert str(finding) == "problem  processes   1 take part, 2 are meant to. See docs/launching.md"


@pytest.mark.parametrize(
    ("address", "world", "state"),
    [
        ("10.77.0.1", 1, "ok"),
        ("10.77.0.1", 2, "ok"),
        ("127.0.1.1", 1, "ok"),  # Debian's own default
        ("127.0.1.1", 2, "problem"),
        ("unknown", 2, "problem"),
    ],
)
def test_an_own_name_that_only_this_machine_reaches_is_a_problem_between_machines(
    monkeypatch: pytest.MonkeyPatch, address: str, world: int, state: str
) -> None:
    def look_up(name: str) -> str:
        if address == "unknown":
            raise socket.gaierror(address)
        return address

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(doctor, "LOCAL", 1)
    monkeypatch.setattr(doctor, "WORLD", world)
    (finding,) = doctor.own_name(doctor.Options())
    assert finding.state == state
    assert address in finding.found
    assert ("GLOO_SOCKET_IFNAME=eth0" in str(finding)) == (not address.startswith("10."))


def test_each_fault_is_a_problem_with_a_way_out(images: Path, tmp_path: Path) -> None:
    """One start, since importing takes seconds: a pixel, FFCV, a file for a folder, network, SLURM, torch, a peer."""
    damaged = tmp_path / "train.beton"
    content = bytearray(images.read_bytes())
    content[3 << 20] ^= 1
    damaged.write_bytes(content)
    beton.sidecar_path(damaged).write_bytes(beton.sidecar_path(images).read_bytes())
    (tmp_path / "file").touch()
    (tmp_path / "ffcv.py").write_text("raise ImportError('built for another machine')")
    status, lines, output = examined(
        *("--data", damaged, "--output", tmp_path / "file" / "run", "--start-seconds", 3),
        **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        PYTHONPATH=str(tmp_path),
        GLOO_SOCKET_IFNAME="nonet7",
        SLURM_JOB_ID="9",
        SLURM_STEP_NUM_TASKS="4",
        TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1",
    )
    assert status == 1
    assert "Traceback" not in output
    assert lines["data"][0].startswith(f"problem {damaged}: the sha256 of its content is")
    assert lines["disk"][0].startswith("problem cannot write in")
    assert lines["FFCV"][0].startswith("warning cannot be used: ")
    assert lines["own name"][0].startswith("problem GLOO_SOCKET_IFNAME is nonet7. There is lo")
    assert "4 task(s) in this step, 2 process(es) take part. Start it as" in lines["SLURM"][0]
    assert lines["environment"][0].endswith("unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    assert lines["processes"][0].startswith("problem they do not find each other: ")


def test_a_full_disk_a_missing_file_and_a_driver_that_torch_cannot_use(tmp_path: Path) -> None:
    mounted = small_disk(tmp_path, "4m") + " && mount -t tmpfs -o size=64m none /dev/shm"
    driver = "printf '#!/bin/sh\\necho NVIDIA H100, 470.1\\n' > nvidia-smi; chmod +x nvidia-smi"
    doctor = f'"{sys.executable}" -m simclr.run.doctor --data "{tmp_path}/no.beton" --output "{tmp_path}/run"'
    path = f'cd "{tmp_path}"; {driver}; cd "{ROOT}"; PATH="{tmp_path}:$PATH"'
    status, output = run("unshare", "-rm", "sh", "-c", f"{mounted}; {path} {doctor}")
    lines = lines_of(output)
    assert status == 1
    assert lines["disk"][0].startswith(f"problem {tmp_path}: 4 MB free; 4 checkpoints of cifar10-simclr-100 take")
    assert "no such file" in lines["data"][0]
    assert lines["/dev/shm"] == [
        "warning 64 MiB free. NCCL may fail, as in containers with 64 MiB: docker run --shm-size 1g"
    ]
    if torch.cuda.is_available() or not os.environ.get("CUDA_VISIBLE_DEVICES", "unset"):
        return  # torch can use the driver here, or is told not to
    assert lines["GPUs"][0].startswith("problem the driver finds NVIDIA H100, 470.1, but torch none")
    assert "Install a newer driver" in lines["GPUs"][0]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_measure_what_lies_between_them_and_tell_of_each_others_faults(tmp_path: Path) -> None:
    # Rank 1 alone looks for a folder that it may not write, and its clock is 5 seconds ahead.
    ahead = tmp_path / "ahead.py"
    ahead.write_text(
        "import runpy, time\nnow = time.time\ntime.time = lambda: now() + 5\n"
        "runpy.run_module('simclr.run.doctor', run_name='__main__', alter_sys=True)\n"
    )
    script = (
        '[ "$RANK" = 1 ] && PYTHONPATH=. exec "$1" "$2" --output /proc/none --world-size 2; '
        'exec "$1" -m simclr.run.doctor --output "$0" --world-size 2'
    )
    cores = usable_cores()
    env = environment(OMP_NUM_THREADS=str(cores))  # for each of two processes
    status, output = run(
        *TORCHRUN, "--no-python", "sh", "-c", script, str(tmp_path), sys.executable, str(ahead), env=env
    )
    lines = lines_of(output)
    assert status == 1
    assert lines["CPU"][0].startswith(
        f"warning 2 process(es) x {cores} threads on {cores} cores. export OMP_NUM_THREADS="
    )
    assert lines["processes"] == ["ok 2 take part, 2 are meant to"]
    assert lines["all-reduce"][0].startswith("ok 64 MiB in ")
    skew = re.match(r"warning at most (\d+)\.\d ms apart", lines["clocks"][0])
    assert skew is not None
    assert 4500 < int(skew[1]) < 5500
    assert len(lines["versions"]) == 1, "rank 1 speaks through rank 0"
    assert [line[:10] for line in lines["disk"]] == ["ok " + str(tmp_path)[:7], "problem ra"]
    assert "rank 1: cannot write in /proc" in lines["disk"][1]
