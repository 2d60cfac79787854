"""The processes and the device of a run, and the precision it computes in. By accelerate."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs

from simclr import distributed
from simclr.config import TrainConfig, settings_of
from simclr.run import launch, runlog
from simclr.run.peers import START_SECONDS, LostPeerError


def join() -> PartialState:
    """Meet the other processes that the launcher has started, or be alone; done once. Returns accelerate's view."""
    use_cpu = launch.cpu_is_asked_for() or not torch.cuda.is_available()
    with launch.saying_who_is_awaited():
        try:
            return PartialState(cpu=use_cpu, timeout=datetime.timedelta(seconds=START_SECONDS))
        except ValueError as error:  # incomplete variables
            raise ValueError(f"{error}. {launch.if_alone()}") from error
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            raise LostPeerError(f"the processes of this run did not meet: {error}") from error


def start_devices(config: TrainConfig) -> tuple[Accelerator, str]:
    """Return accelerate's way to train on this rank's device, and why this precision was chosen."""
    state = join()
    require_world_size(config, state.num_processes)
    precision, reason = choose_precision(config, state.device)
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise ValueError(f"tracker {config.tracker} is not installed: pip install {config.tracker}")
    accelerator = Accelerator(
        cpu=state.device.type == "cpu",
        mixed_precision=precision if precision in {"bf16", "fp16"} else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.folder,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    return accelerator, f"{precision} ({reason})"


@contextlib.contextmanager
def tracked(accelerator: Accelerator, config: TrainConfig, first_session: str) -> Iterator[None]:
    """Open the run at the tracker that was asked for, if one was; a continued run goes on there.

    Args:
        accelerator: Of :func:`start_devices`.
        config: The run.
        first_session: When the run began, to tell it from an earlier one in the same folder.
    """
    name = config.full_name
    key = hashlib.sha256(f"{first_session} {config.folder.absolute()}".encode()).hexdigest()[:16]
    options = {
        "wandb": {"name": name, "id": key, "resume": "allow", "dir": str(config.folder)},
        "trackio": {"name": f"{name}-{key[:4]}", "resume": "allow"},  # its runs are told apart by their names
    }
    if config.tracker != "none":
        accelerator.init_trackers(
            name if config.tracker == "tensorboard" else config.tracker_project,  # its runs are named by their folder
            config=settings_of(config),
            init_kwargs={tracker: kwargs for tracker, kwargs in options.items() if tracker == config.tracker},
        )
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def require_world_size(config: TrainConfig, num_processes: int) -> None:
    """Stop if another number of processes takes part than was asked for, here or of SLURM."""
    if config.world_size is not None and num_processes != config.world_size:
        raise ValueError(
            f"world_size is {config.world_size}, but the number of processes that take part is {num_processes}. "
            "On CPUs, `accelerate launch --cpu --num_processes N` starts one whatever N is: use --config_file "
            "accelerate_configs/cpu.yaml --num_processes N (or torchrun --nproc-per-node N)"
        )
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes < announced:
        raise ValueError(
            f"WORLD_SIZE in the environment is {announced}, but this process would train alone, as {num_processes}: "
            f"accelerate wants LOCAL_RANK too. Start it by torchrun or accelerate launch. {launch.if_alone()}"
        )
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_processes < num_tasks:
        raise ValueError(
            f"srun started {num_tasks} tasks, but this process belongs to a group of {num_processes}: they would train "
            f"{num_tasks} copies of the run. Start it as slurm/pretrain.sbatch does"
        )


def choose_precision(config: TrainConfig, device: torch.device) -> tuple[str, str]:
    """Return the precision and why."""
    asked = launch.mixed_precision_asked_for()
    if asked is not None and config.precision not in {"auto", asked}:
        raise ValueError(
            f"accelerate is told mixed precision {asked} (--mixed_precision, its configuration file or "
            f"ACCELERATE_MIXED_PRECISION), but precision is {config.precision}; leave one of the two out"
        )
    precision = asked or config.precision
    if precision != "auto":
        if precision == "fp16" and device.type == "cpu":
            raise ValueError("precision fp16 needs a GPU; use --precision bf16 or fp32 on a CPU")
        return precision, "accelerate's mixed precision" if asked else "as configured"
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bf16", "the GPU computes with it") if has_bf16 else ("fp32", "the GPU is older than bf16")
    if runlog.cpu_has_fast_bf16():
        return "bf16", "the CPU has AMX"
    return "fp32", "the CPU has no AMX, and bf16 would be slower"


def parameter_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the weights."""
    return torch.float64 if config.precision == "fp64" else torch.float32


def forward_dtype(accelerator: Accelerator, config: TrainConfig) -> torch.dtype:
    """Return the dtype of the forward pass."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return autocast.get(accelerator.mixed_precision, parameter_dtype(config))
