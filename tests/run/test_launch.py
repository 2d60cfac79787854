"""Every documented way to start pretraining is started here, and gives the weights that one process gives.

SLURM itself is not needed: its job script runs with the variables that SLURM sets, and with stand-ins for ``srun``
and ``scontrol`` that do on this machine what those do on one node.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import train_simclr
from simclr import beton
from simclr.config import SpeedConfig, TrainConfig
from simclr.run import checkpoint, devices, launch
from simclr.run.interruption import SIGNALS, Signals
from simclr.run.opening import statement
from tests.helpers import ROOT, forget_accelerate_state
from tests.launching import (
    BATCH,
    CONFIGS,
    JOBS,
    NUM_IMAGES,
    SMALL_RUN,
    TORCHRUN,
    accelerate,
    assert_close_weights,
    environment,
    free_port,
    needs_bash,
    run,
    run_here,
    small_config,
    small_run,
    started,
)
from tests.ranks import ranks
from tests.runs import train_here, write_shapes

ENTRY = ROOT / "train_simclr.py"
STEPS = 2 * NUM_IMAGES // BATCH


# ------------------------------------------------------------------------------------------ starting and looking


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("images") / "train.beton", NUM_IMAGES)


def take_on(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process an environment."""
    for name in os.environ.keys() - env.keys():
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def assert_is_the_run(folder: Path, reference: Path, world_size: int, tolerance: float = 1e-10) -> None:
    """All steps were taken, by ``world_size`` processes together, and the weights are those of one process."""
    derived = json.loads((folder / "manifest.json").read_text())["derived"]
    assert derived["world_size"] == world_size
    assert derived["per_device_batch_size"] == BATCH // world_size
    assert checkpoint.load_safely(folder / checkpoint.LAST)["step"] == STEPS
    assert_close_weights(folder, reference, tolerance)


@pytest.fixture(scope="module")
def one_process(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without any launcher."""
    return run_here(images, tmp_path_factory.mktemp("run") / "one")


# ------------------------------------------------------------------------------------------ accelerate's files


@dataclasses.dataclass(frozen=True)
class Expected:
    distributed_type: DistributedType
    num_processes: int
    num_machines: int = 1


# -1 is accelerate's word for "must be given": it then starts nothing without --num_processes.
EXPECTED = {
    "cpu.yaml": Expected(DistributedType.MULTI_GPU, 1),
    "single_gpu.yaml": Expected(DistributedType.NO, 1),
    "multi_gpu.yaml": Expected(DistributedType.MULTI_GPU, -1),
    "multi_node.yaml": Expected(DistributedType.MULTI_GPU, -1, num_machines=2),
}


def test_every_configuration_is_known_here() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_a_configuration_as_meant(name: str) -> None:
    # Refuses unknown keys.
    config = load_config_from_file(str(CONFIGS / name))
    assert isinstance(config, ClusterConfig)
    expected = EXPECTED[name]
    assert config.distributed_type == expected.distributed_type
    assert config.num_processes == expected.num_processes
    assert config.num_machines == expected.num_machines
    assert config.use_cpu is (name == "cpu.yaml")
    assert config.mixed_precision is None, "precision is TrainConfig's alone"
    assert not config.dynamo_config


@pytest.mark.parametrize("name", EXPECTED)
def test_a_configuration_begins_with_the_command_that_uses_it(name: str) -> None:
    head = (CONFIGS / name).read_text().split("\n#\n")[0]
    commands = [line.removeprefix("# ") for line in head.splitlines() if "accelerate launch" in line]
    assert commands
    for command in commands:
        assert f"--config_file accelerate_configs/{name} " in command
        launcher, words = command.split(" train_simclr.py ")
        stated = re.search(r"--num_processes (\d+)", launcher)
        if stated or name == "single_gpu.yaml":
            assert words.endswith(f"--world-size {stated[1] if stated else 1}")


@pytest.mark.slow
@pytest.mark.distributed
def test_cpu_configuration_starts_one_process_unless_told_and_hides_gpus(
    images: Path, one_process: Path, tmp_path: Path
) -> None:
    script = tmp_path / "look_and_train.py"
    script.write_text(
        "import os, runpy\n"
        "print('visible GPUs:', os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "runpy.run_path('train_simclr.py', run_name='__main__')\n"
    )
    env = environment(PYTHONPATH=str(ROOT))
    del env["ACCELERATE_USE_CPU"]  # the file alone decides
    _, *options = small_run(images, tmp_path / "run", 1)
    status, output = run(*accelerate("cpu.yaml"), script, *options, env=env)
    assert status == 0, output
    assert "visible GPUs: -1,-1" in output
    assert "1 process on cpu (" in output
    assert_is_the_run(tmp_path / "run", one_process, 1)


@pytest.mark.slow
@pytest.mark.distributed
def test_cpu_configuration_starts_as_many_processes_as_told(images: Path, one_process: Path, tmp_path: Path) -> None:
    env = environment()
    del env["ACCELERATE_USE_CPU"]
    launcher = accelerate("cpu.yaml", "--num_processes", "2")
    status, output = run(*launcher, *small_run(images, tmp_path / "run", 2), env=env)
    assert status == 0, output
    assert "2 processes on cpu (" in output
    assert_is_the_run(tmp_path / "run", one_process, 2)


def launch_from_here(*words: str) -> None:
    """What ``accelerate launch WORDS`` does, without importing everything anew."""
    launch_command(launch_command_parser().parse_args(list(words)))


@pytest.mark.parametrize("name", ["multi_gpu.yaml", "multi_node.yaml"])
def test_the_number_of_gpus_must_be_given(name: str) -> None:
    with pytest.raises(ValueError, match="You need to manually pass in `--num_processes`"):
        launch_from_here("--config_file", str(CONFIGS / name), str(ENTRY), "demo")


@pytest.mark.parametrize("device", [["--cpu"], ["--config_file", str(CONFIGS / "single_gpu.yaml")]])
def test_a_launcher_that_starts_one_process_instead_of_two_is_noticed(
    images: Path, tmp_path: Path, device: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "tells_its_environment.py"  # in a tenth of the time that importing torch takes
    script.write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    take_on(environment(), monkeypatch)
    launch_from_here(*device, "--num_processes", "2", str(script))
    (told,) = capfd.readouterr().out.splitlines()
    take_on(json.loads(told), monkeypatch)
    expected = "world_size is 2, but .* is 1. .* --config_file accelerate_configs/cpu.yaml --num_processes N"
    with pytest.raises(ValueError, match=expected):
        train_here(small_config(images, tmp_path / "run", 2))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines(images: Path, one_process: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def machine(rank: int) -> list[str]:
        meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        launcher = accelerate("multi_node.yaml", "--machine_rank", str(rank), *meeting, "--num_processes", "2")
        return [*launcher, *small_run(images, folder, 2)]

    port = free_port()
    with started(*machine(0)) as first, started(*machine(1)) as second:
        outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert_is_the_run(folder, one_process, 2)
    assert ["2 processes on cpu" in output for output in outputs] == [True, False]


DIES_ONCE = """
import os, runpy, signal, time
from pathlib import Path
from simclr.run.peers import Peers

checkpoint, step_taken = Path(os.environ["CHECKPOINT"]), Peers.step_taken

def step_taken_or_death(self, step):
    if step == 6:
        while not checkpoint.exists():  # of step 4, written in the background
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return step_taken(self, step)

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    Peers.step_taken = step_taken_or_death
runpy.run_path("train_simclr.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_starts_training_again_when_a_process_dies(images: Path, one_process: Path, tmp_path: Path) -> None:
    script, folder = tmp_path / "dies_once.py", tmp_path / "run"
    script.write_text(DIES_ONCE)
    _, *options = small_run(images, folder, 2)
    # Without this, the processes started anew meet the addresses of the dead ones in the store that they share.
    env = environment(
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", PYTHONPATH=str(ROOT), CHECKPOINT=str(folder / checkpoint.LAST)
    )
    status, output = run(*TORCHRUN, "--max-restarts", "1", script, *options, env=env)
    assert status == 0, output
    assert output.count("2 processes on cpu (") == 2
    assert f"resuming:   after step 4 of {STEPS}" in output
    assert_is_the_run(folder, one_process, 2)


ASKS_TO_STOP = """
import os, runpy, signal, time
from simclr.run.peers import Peers

step_taken = Peers.step_taken

steps = 0

def step_taken_after_asking(self, step):
    global steps
    steps += 1
    if steps == 2 and os.environ["RANK"] == "1":
        os.kill({"rank": os.getpid(), "launcher": os.getppid()}[os.environ["ASKED"]], int(os.environ["SIGNAL"]))
    if steps >= 2:
        time.sleep(0.5)  # for the launcher to hand the signal on
    return step_taken(self, step)

if "ASKED" in os.environ:
    Peers.step_taken = step_taken_after_asking
runpy.run_path("train_simclr.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launched_run_that_is_asked_to_stop_saves_every_step_and_goes_on(
    images: Path, one_process: Path, tmp_path: Path, launcher: str
) -> None:
    """Asked through a rank, then, going on, through the launcher."""
    script, folder = tmp_path / "asks_to_stop.py", tmp_path / "run"
    script.write_text(ASKS_TO_STOP)
    _, *options = small_run(images, folder, 2)
    command = {
        "torchrun": TORCHRUN,
        "accelerate": accelerate("cpu.yaml", "--num_processes", "2"),
    }[launcher]
    env = environment(PYTHONPATH=str(ROOT))
    steps = [0]
    for asked, number in (("rank", signal.SIGUSR1), ("launcher", signal.SIGTERM)):
        status, output = run(*command, script, *options, env=env | {"ASKED": asked, "SIGNAL": str(int(number))})
        assert status != 0, output
        said = json.loads((folder / "status.json").read_text())
        assert said["state"] == "interrupted", output
        assert steps[-1] + 2 <= said["step"] < STEPS
        assert number.name in said["reason"]
        assert checkpoint.load_safely(folder / checkpoint.LAST)["step"] == said["step"]
        assert ("resuming:" in output) == (steps != [0])
        steps.append(said["step"])
    status, output = run(*command, script, *options, env=env)
    assert status == 0, output
    assert f"resuming:   after step {steps[-1]} of {STEPS}" in output
    assert_is_the_run(folder, one_process, 2)


# ------------------------------------------------------------------------------------------ before training


def test_all_that_a_result_depends_on_is_compared(images: Path, tmp_path: Path) -> None:
    """Of the settings all but three paths and ways, and what these stand for."""
    config = TrainConfig(data=images)

    def leaves(value: Any, name: str = "") -> set[str]:
        if not isinstance(value, dict):
            return {name}
        return {leaf for key, entry in value.items() for leaf in leaves(entry, f"{name}.{key}" if name else key)}

    said = statement(config, ENTRY)
    assert set(said) >= leaves(dataclasses.asdict(config)) - {"data", "speed.loader", "parts"}
    moved = tmp_path / "moved.beton"
    for path in (images, beton.sidecar_path(images)):
        shutil.copy(path, tmp_path / path.name.replace("train", "moved"))
    assert statement(dataclasses.replace(config, data=moved, speed=SpeedConfig(loader="memory")), ENTRY) == said
    other = write_shapes(tmp_path / "other.beton", NUM_IMAGES, seed=1)
    more = write_shapes(tmp_path / "more.beton", NUM_IMAGES + 1)
    bright = tmp_path / "bright.beton"
    shutil.copy(images, bright)
    beton.save_facts(bright, dataclasses.replace(beton.load_facts(images), channel_mean=(0.1, 0.2, 0.3)))
    for data, named in ((other, "the data"), (more, "the data"), (bright, "the data's channel_mean")):
        there = statement(dataclasses.replace(config, data=data), ENTRY)
        different = {name for name in said if said[name] != there[name]}
        assert named in different
        assert all(name.startswith("the data") for name in different)


def test_accelerates_word_for_cpus_is_true_or_false(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, expected in (("On", True), ("f", False), ("", False)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", word)
        assert launch.cpu_is_asked_for() is expected
    monkeypatch.setenv("ACCELERATE_USE_CPU", "maybe")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU is 'maybe', expected true or false"):
        launch.cpu_is_asked_for()


def test_code_is_compared(tmp_path: Path) -> None:
    entry = tmp_path / "train.py"
    prints = []
    for text in ("a = 1", "a = 2"):
        entry.write_text(text)
        prints.append(launch.fingerprint_of_code(entry))
    assert prints[0] != prints[1]
    assert launch.fingerprint_of_code(entry) == prints[1]


def test_what_differs_is_named_with_the_ranks() -> None:
    same = {"seed": "0", "epochs": "5"}
    launch.require_one_run([same] * 5)
    with pytest.raises(launch.DifferentRunsError) as raised:
        launch.require_one_run([same, same, {**same, "seed": "1"}, same, {"seed": "2", "epochs": "6", "new": "x"}])
    assert str(raised.value) == (
        "these processes are not one run: epochs is 5 on ranks 0 to 3, 6 on rank 4; new is not given on ranks 0 to 3, "
        "x on rank 4; seed is 0 on ranks 0 to 1, 3, 1 on rank 2, 2 on rank 4. Start all of them with the same command, "
        "code and images"
    )
    many = {str(i): "0" for i in range(20)}
    with pytest.raises(launch.DifferentRunsError, match="; and 8 more"):
        launch.require_one_run([many, dict.fromkeys(many, "1")])


def is_another_run(other: TrainConfig, rank: int) -> None:
    """Rank 1 is started by another command than rank 0."""
    main = train_simclr.main

    def main_of_another(config: TrainConfig, signals: Signals | None = None, *, is_dry: bool = False) -> Path:
        return main(other, signals, is_dry=is_dry)

    if rank == 1:
        train_simclr.main = main_of_another


def opens_other_images(other: TrainConfig, rank: int) -> None:
    """As where the file is replaced after the ranks have compared what they are about to read."""
    is_another_run(other, rank)
    setattr(train_simclr, "statement", lambda config, program: {})  # noqa: B010


ALL_OTHERS = "--epochs 3 --optimizer.base-learning-rate 0.2 --micro-batch-size 4 --world-size 3"
ALL_DIFFERENCES = (
    "these processes are not one run: epochs is 2 on rank 0, 3 on rank 1; "
    r"optimizer\.base_learning_rate is 0\.06 on rank 0, 0\.2 on rank 1; "
    r"speed\.micro_batch_size is None on rank 0, 4 on rank 1; "
    rf"the data is {NUM_IMAGES} images with sha256 \w+ on rank 0, {NUM_IMAGES} images with sha256 \w+ on rank 1; "
    r"the data's channel_mean is \(.*\) on rank 0, \(.*\) on rank 1; the data's channel_std is .*; "
    r"world_size is 2 on rank 0, 3 on rank 1\. "
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("break_it", "data", "more", "message"),
    [
        (is_another_run, "other.beton", ALL_OTHERS, ALL_DIFFERENCES),
        (is_another_run, "none.beton", "", r"none\.beton"),
        (opens_other_images, "other.beton", "", "was replaced while the ranks opened it"),
    ],
    ids=["everything", "no images", "images after the comparison"],
)
def test_ranks_that_are_not_one_run_all_refuse_to_begin_and_name_the_difference(
    images: Path, tmp_path: Path, break_it: Callable[[TrainConfig, int], None], data: str, more: str, message: str
) -> None:
    write_shapes(tmp_path / "other.beton", NUM_IMAGES, seed=1)
    other = small_config(tmp_path / data, tmp_path / "run", 2, *more.split())
    config = small_config(images, tmp_path / "run", 2)
    with ranks(config, 2, tmp_path / "logs", functools.partial(break_it, other)) as running:
        assert running.wait(60) == [1, 1]  # a few seconds, most of them for starting
        for rank in (0, 1):
            assert re.search(message, running.output(rank)), running.output(rank)
            assert "Traceback" not in running.output(rank)
    assert break_it is opens_other_images or not (tmp_path / "run").exists()


IMPATIENT = """
import runpy
from simclr.run import launch
launch.SECONDS_UNTIL_SAID = 0.5
runpy.run_path("train_simclr.py", run_name="__main__")
"""
MEETS_ONCE = "import time; from simclr.run import devices; devices.join(); print('met', flush=True); time.sleep(100)"


@pytest.mark.parametrize(
    ("rank", "number", "other"),
    [(0, signal.SIGTERM, ""), (1, signal.SIGINT, ""), (0, signal.SIGTERM, MEETS_ONCE)],
    ids=["rank 0 alone", "rank 1 alone", "the other stops before the second meeting"],
)
def test_a_process_that_waits_for_others_says_so_and_can_be_stopped(
    images: Path, tmp_path: Path, rank: int, number: signal.Signals, other: str
) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    env, its_env = (environment(**meeting, RANK=str(i), LOCAL_RANK=str(i)) for i in (rank, 1 - rank))
    words = [sys.executable, "-c", IMPATIENT, *small_run(images, tmp_path / "run", 2)[1:]]
    with started(sys.executable, "-c", other, env=its_env) as companion, started(*words, env=env) as process:
        assert process.stdout is not None
        assert companion.stdout is not None
        if companion.stdout.readline():
            time.sleep(2)  # it has met once, and said so; ours now waits for it to meet again
        said = process.stdout.readline()
        whom = "the other 1 of 2 processes" if rank == 0 else "rank 0 and the others"
        assert said.startswith(f"rank {rank} waits for {whom} of this run, to meet at 127.0.0.1:")
        assert "unset RANK WORLD_SIZE LOCAL_RANK" in said
        process.send_signal(number)
        rest, _ = process.communicate(timeout=10)
    assert process.returncode == -number
    assert "Traceback" not in rest
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR.*If this was to be the only process: unset RANK WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):  # accelerate fills some in
        monkeypatch.setenv(name, variables.get(name, ""))
        if name not in variables:
            monkeypatch.delenv(name)
    forget_accelerate_state()
    with pytest.raises(ValueError, match=message):
        devices.join()
    forget_accelerate_state()


def test_a_launcher_that_accelerate_does_not_understand_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE in the environment is 2, but this process would train alone"):
        devices.require_world_size(TrainConfig(), 1)


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--recompute"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "--optimizer.gradient-clip-norm"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "MULTI_GPU"),
        ("ACCELERATE_USE_FSDP", "true", "MULTI_GPU"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "MULTI_GPU"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "MULTI_GPU"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "MULTI_GPU"),
        ("ACCELERATE_IN_TPU_POD", "1", "TPU"),
        ("ACCELERATE_DOWNCAST_BF16", "yes", "TPU"),
    ],
)
def test_what_accelerate_is_asked_for_in_vain_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, way_out: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value}: .*{way_out}"):
        train_simclr.main(TrainConfig(data=images, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_the_launcher_sets_by_itself_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in EXPECTED:
        words = ["--config_file", str(CONFIGS / config), "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "train_simclr.py"]))
        prepare = prepare_multi_gpu_env if arguments.multi_gpu else lambda a: prepare_simple_launcher_cmd_env(a)[1]
        with monkeypatch.context() as patch:
            for name, value in prepare(arguments).items():
                patch.setenv(name, value)
            launch.require_known_requests()
            assert launch.mixed_precision_asked_for() is None


def test_accelerates_mixed_precision_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    choices: tuple[Literal["auto", "bf16"], ...] = ("auto", "bf16")
    for chosen in choices:
        config = TrainConfig(precision=chosen)
        assert devices.choose_precision(config, cpu) == ("bf16", "accelerate's mixed precision")
    with pytest.raises(ValueError, match=r"told mixed precision bf16.*but precision is fp32; leave one of the two out"):
        devices.choose_precision(TrainConfig(precision="fp32"), cuda)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert devices.choose_precision(TrainConfig(), cuda)[0] == "fp16"
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        devices.choose_precision(TrainConfig(), cpu)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed precision fp8; here it is no, bf16 or fp16"):
        devices.choose_precision(TrainConfig(), cuda)


def test_the_launchers_report_ends_with_what_was_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(SystemExit):
        train_simclr.conclude(TrainConfig(data=tmp_path / "nowhere.beton"))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    *_, last, _border = str(ChildFailedError("train_simclr.py", {0: failure})).splitlines()
    assert last.startswith(f"  traceback : {tmp_path}/nowhere.beton")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["single_gpu.yaml", "multi_gpu.yaml"])
def test_gpu_configurations(images: Path, one_process: Path, tmp_path: Path, name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    world_size = 1 if name == "single_gpu.yaml" else 2
    if torch.cuda.device_count() < world_size:
        pytest.skip("one GPU only")
    env = environment()
    for variable in ("ACCELERATE_USE_CPU", "GLOO_SOCKET_IFNAME"):
        del env[variable]
    options = ["--num_processes", str(world_size)] if world_size > 1 else []
    status, output = run(*accelerate(name, *options), *small_run(images, tmp_path / "run", world_size), env=env)
    assert status == 0, output
    # The views are float32, and are computed by another device than the reference's.
    assert_is_the_run(tmp_path / "run", one_process, world_size, tolerance=1e-4)
    assert "on cuda (" in output


# ------------------------------------------------------------------------------------------ SLURM's job scripts


@pytest.fixture
def one_node(tmp_path: Path) -> dict[str, str]:
    """The variables of a job on one node with two GPUs, and stand-ins for the two commands that a job calls."""
    tools = tmp_path / "tools"
    tools.mkdir()
    srun = """\
        #!/bin/bash
        echo "srun $*" | head -n 1 >> "$SRUN_CALLS"
        while [[ $1 == --* ]]; do shift; done
        SLURM_NODEID=0 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 exec "$@"
        """
    scontrol = """\
        #!/bin/bash
        case "$*" in
            "show hostnames here") echo 127.0.0.1 ;;
            "show job $SLURM_JOB_ID") echo "JobState=RUNNING PreemptTime=None" ;;
        esac
        """
    for name, text in {"srun": srun, "scontrol": scontrol}.items():
        tool = tools / name
        tool.write_text(re.sub(r"(?m)^ {8}", "", text))
        tool.chmod(0o755)
    env = environment(
        SLURM_JOB_ID=str(free_port()),
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="here",
        SLURM_GPUS_ON_NODE="2",
        SLURM_CPUS_PER_TASK="2",
        SLURM_SUBMIT_DIR=str(ROOT),
        SRUN_CALLS=str(tmp_path / "calls"),
        VENV=sys.prefix,
    )
    return env | {"PATH": f"{tools}{os.pathsep}{env['PATH']}"}


@needs_bash
@pytest.mark.parametrize("path", sorted(JOBS.iterdir()), ids=lambda path: path.name)
def test_job_scripts_are_well_formed(path: Path) -> None:
    assert run("bash", "-n", path) == (0, "")
    if shutil.which("shellcheck"):
        assert run("shellcheck", "-x", path) == (0, "")


@needs_bash
@pytest.mark.slow
@pytest.mark.distributed
def test_pretraining_job(images: Path, one_process: Path, one_node: dict[str, str], tmp_path: Path) -> None:
    preset, *options = SMALL_RUN
    folder = tmp_path / "run with a space"
    # The job uses torchrun, which does not set this; without a GPU, training must find its way to gloo by itself.
    env = one_node | {"CUDA_VISIBLE_DEVICES": ""}
    del env["ACCELERATE_USE_CPU"]
    status, output = run("bash", JOBS / "pretrain.sbatch", folder, images, preset, *options, env=env)
    assert status == 0, output
    port = 10_000 + int(env["SLURM_JOB_ID"]) % 20_000
    assert f"1 node(s) x 2 processes = 2, meeting at 127.0.0.1:{port}; 1 CPU threads each" in output
    assert "2 processes on cpu" in output
    assert_is_the_run(folder, one_process, 2)
    assert (
        (tmp_path / "calls")
        .read_text()
        .startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1 ")
    )


@needs_bash
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "usage: sbatch [SBATCH OPTIONS] slurm/pretrain.sbatch RUN DATA PRESET"),
        (["RUN", "DATA", "--seed"], {}, "usage: sbatch [SBATCH OPTIONS] slurm/pretrain.sbatch RUN DATA PRESET"),
        (["RUN", "DATA", "demo", "--output", "x"], {}, "the run's folder is the first argument, "),
        (["RUN", "nowhere.beton", "demo"], {}, "there is no nowhere.beton; write it first: python -m data_prep --help"),
        (["RUN", "DATA", "demo"], {"SLURM_GPUS_ON_NODE": ""}, "no GPUs were granted: sbatch --gpus-per-node=N"),
        (["RUN", "DATA", "demo"], {"VENV": "/nowhere"}, "there is no Python in /nowhere: run scripts/setup.sh"),
        (["RUN", "DATA", "demo"], {"SLURM_ARRAY_TASK_ID": "1"}, "all tasks of the array would write to "),
        (
            ["RUN", "DATA", "demo"],
            {"SLURM_SUBMIT_DIR": "/"},
            "/ holds no train_simclr.py: submit from the folder of the project",
        ),
        (["RUN", "DATA", "demo"], {"SLURM_SUBMIT_DIR": ""}, "submit this file with sbatch"),
    ],
)
def test_pretraining_job_refuses_at_once(
    images: Path,
    one_node: dict[str, str],
    tmp_path: Path,
    arguments: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    words = [{"RUN": str(tmp_path / "run"), "DATA": str(images)}.get(word, word) for word in arguments]
    status, output = run("bash", JOBS / "pretrain.sbatch", *words, env=one_node | variables)
    assert status != 0
    assert message in output
    assert not Path(one_node["SRUN_CALLS"]).exists()
    assert not (tmp_path / "run").exists()


@needs_bash
def test_probe_job_hands_its_options_on(one_node: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run with a space"
    folder.mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '[%s]' \"$@\"\n")
    python.chmod(0o755)
    env = one_node | {"VENV": str(tmp_path / "venv")}
    status, output = run("bash", JOBS / "probe.sbatch", folder, "--mode", "finetune", env=env)
    assert (status, output) == (0, f"[linear_probe.py][--run][{folder}][--mode][finetune]")
    (tmp_path / "seed3").mkdir()
    status, output = run("bash", JOBS / "probe.sbatch", tmp_path / "seed%a", env=env | {"SLURM_ARRAY_TASK_ID": "3"})
    assert (status, output) == (0, f"[linear_probe.py][--run][{tmp_path}/seed3]")


@needs_bash
@pytest.mark.parametrize("run_folder", [[], ["results/none"]])
def test_probe_job_needs_a_run(one_node: dict[str, str], run_folder: list[str]) -> None:
    status, output = run("bash", JOBS / "probe.sbatch", *run_folder, env=one_node)
    assert status != 0
    expected = "there is no run results/none; pretraining (slurm/pretrain.sbatch) makes it" if run_folder else "usage:"
    assert expected in output
    assert not Path(one_node["SRUN_CALLS"]).exists()
