"""Two hosts: network namespaces of this machine with names and addresses of their own, joined by one cable.

accelerate_configs/multi_node.yaml is started on both, and then the cable is pulled, or a host is lost. Needs root
(CAP_NET_ADMIN and CAP_SYS_ADMIN) and iproute2; skipped elsewhere, with REQUIRE_HOSTS=1 a failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from simclr.run import checkpoint, runlog
from tests.helpers import ROOT
from tests.launching import (
    NUM_IMAGES,
    accelerate,
    assert_close_weights,
    environment,
    last_step,
    run_here,
    small_run,
    wait_until,
)
from tests.runs import write_shapes

pytestmark = [pytest.mark.hosts, pytest.mark.slow, pytest.mark.distributed]

NAMESPACES = Path("/run/netns")  # ip makes this folder, and mounts it onto itself
TIMEOUT = 6  # seconds that a rank waits for another
EPOCHS = 20
LONGER = ["--epochs", str(EPOCHS), "--log-every-steps", "1", "--timeout-seconds", str(TIMEOUT)]


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Two of them, numbered 0 and 1, with the addresses 10.77.0.1 and 10.77.0.2."""

    name: str
    folder: Path

    def namespace(self, host: int) -> str:
        return f"{self.name}-{host}"

    def on(self, host: int, *command: str) -> list[str]:
        """The command that runs ``command`` on a host: in its network, under its name, with its table of names."""
        enter = f"hostname host{host} && mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts"
        inside = ["unshare", "--uts", "--mount", "sh", "-c", f'{enter} && exec "$@"', "sh", *command]
        return ["ip", "netns", "exec", self.namespace(host), *inside]

    def cable(self, state: str) -> None:
        """Plug it in ("up") or pull it out ("down")."""
        ip("-n", self.namespace(1), "link", "set", "eth0", state)

    def lose(self, host: int) -> None:
        """End everything on a host at once, as a power cut would."""
        while pids := ip("netns", "pids", self.namespace(host)).split():  # one may have started another meanwhile
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    missing = [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]
    if sys.platform != "linux" or missing or os.geteuid() != 0:
        pytest.skip(f"hosts of the test's own need Linux, root and {', '.join(missing) or 'nothing else'}")
    two = Hosts(f"test{secrets.token_hex(2)}", tmp_path_factory.mktemp("hosts"))
    is_first = not NAMESPACES.exists()
    (two.folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n")
    try:
        for host in (0, 1):
            try:
                ip("netns", "add", two.namespace(host))
            except subprocess.CalledProcessError as error:
                pytest.skip(f"this root may not make network namespaces: {error.stderr}")
        ip("-n", two.namespace(0), "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", two.namespace(1))
        for host in (0, 1):
            ip("-n", two.namespace(host), "address", "add", f"10.77.0.{host + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", two.namespace(host), "link", "set", device, "up")
        yield two
    finally:
        for host in (0, 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                two.lose(host)
                ip("netns", "delete", two.namespace(host))
        if is_first and NAMESPACES.exists() and not any(NAMESPACES.iterdir()):
            subprocess.run(["umount", str(NAMESPACES)], check=True)
            NAMESPACES.rmdir()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("images") / "train.beton", NUM_IMAGES)


RANK_1_IS_LOST = "rank 1 is dead or stopped: last heard of at step "
STORE_IS_LOST = "the host of the ranks' common store, rank 0 or the launcher, is gone"


@dataclasses.dataclass
class Launch:
    """A run on both hosts: its launchers, and where each writes."""

    folder: Path
    launchers: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def wait_for(self, host: int, seconds: float = 30) -> None:
        """Wait until a host's launcher has ended, which is after its processes."""
        self.launchers[host].wait(timeout=seconds)

    def log(self, host: int) -> str:
        return self.logs[host].read_text()

    @property
    def saved_step(self) -> int:
        return int(json.loads((self.folder / "status.json").read_text())["step"])


@contextlib.contextmanager
def launched(hosts: Hosts, images: Path, folder: Path) -> Iterator[Launch]:
    """Start the run, one process on each host; at the end nothing of it is left."""
    logs = [folder.with_name(f"{folder.name}-host{host}.log") for host in (0, 1)]
    meeting = ["--main_process_ip", "10.77.0.1", "--num_processes", "2"]
    env = environment()
    del env["GLOO_SOCKET_IFNAME"]  # the hosts' names lead to their addresses
    launchers = []
    try:
        for host in (0, 1):
            words = accelerate("multi_node.yaml", "--machine_rank", str(host), *meeting)
            with logs[host].open("wb") as log:
                command = hosts.on(host, *words, *small_run(images, folder, 2, *LONGER))
                launchers.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
        yield Launch(folder, launchers, logs)
    finally:
        for host in (0, 1):
            hosts.lose(host)
        for launcher in launchers:
            launcher.wait(timeout=20)


def test_a_cut_cable_stops_both_hosts_in_time_and_the_run_goes_on_afterwards(
    hosts: Hosts, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with launched(hosts, images, folder) as cut:
        wait_until("training goes on", lambda: last_step(folder) > 6)
        hosts.cable("down")
        wait_until(
            "both hosts tell of the loss",
            lambda: RANK_1_IS_LOST in cut.log(0) and f"{STORE_IS_LOST} or stands still" in cut.log(1),
            seconds=TIMEOUT + 5,
        )
        for host in (0, 1):
            cut.wait_for(host)
        hosts.cable("up")
    assert all(launcher.returncode not in (0, None) for launcher in cut.launchers)
    saved = cut.saved_step
    assert 4 <= saved < last_step(folder) + 4

    # The cable back in its place: from the checkpoint to the end, and a loose contact on the way.
    with launched(hosts, images, folder) as again:
        wait_until("training goes on", lambda: last_step(folder) > saved + 6)
        hosts.cable("down")
        time.sleep(2)
        hosts.cable("up")
        for host in (0, 1):
            again.wait_for(host, 120)
    assert [launcher.returncode for launcher in again.launchers] == [0, 0], again.log(0) + again.log(1)
    assert f"resuming:   after step {saved} of" in again.log(0)
    assert_close_weights(folder, run_here(images, tmp_path / "one process", *LONGER))
    steps = [line["step"] for line in runlog.read_metrics(folder) if line["kind"] == "step"]
    assert steps == list(range(1, EPOCHS * 4 + 1))


@pytest.mark.parametrize(("lost", "message"), [(0, STORE_IS_LOST), (1, RANK_1_IS_LOST)])
def test_a_lost_host_is_noticed_by_the_other_within_seconds(
    hosts: Hosts, images: Path, tmp_path: Path, lost: int, message: str
) -> None:
    folder = tmp_path / "run"
    with launched(hosts, images, folder) as launch:
        wait_until("training goes on", lambda: last_step(folder) > 6)
        hosts.lose(lost)
        wait_until("the loss is told", lambda: message in launch.log(1 - lost), seconds=5)
        launch.wait_for(1 - lost)
    assert launch.launchers[1 - lost].returncode not in (0, None)
    assert checkpoint.load_resumable(folder / checkpoint.LAST)["step"] >= 4
