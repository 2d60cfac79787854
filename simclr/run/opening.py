"""Opening a run: devices, images, model, and what an earlier session of it left, until the next step can be taken."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from simclr import distributed, parts, system
from simclr.batch_norm import groups_of
from simclr.beton import Facts, load_facts
from simclr.config import Derived, TrainConfig, derive, settings_of
from simclr.data import EpochPlan, ImageSource, open_images
from simclr.evaluation import DivergedError
from simclr.models import SimCLR, use_global_batch_norm
from simclr.optim import make_optimizer
from simclr.run import checkpoint, launch, runlog
from simclr.run.announcing import say_start, write_manifest
from simclr.run.checkpoint import CheckpointError, CheckpointWriter
from simclr.run.devices import choose_precision, forward_dtype, parameter_dtype, start_devices, tracked
from simclr.run.interruption import Interrupted
from simclr.run.peers import Peers
from simclr.run.resuming import Progress, resume
from simclr.run.runlog import RunLog, Status
from simclr.step.captured import Captured, Way, choose_way
from simclr.step.nonfinite import Guard
from simclr.step.recompute import recompute_blocks, require_independent_images
from simclr.views import whole_stages
from simclr.views.pipeline import ViewFeed


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What the training loop works on."""

    config: TrainConfig
    derived: Derived
    source: ImageSource
    plan: EpochPlan
    """Which images this rank reads at each step."""
    feed: ViewFeed
    """Makes their views."""
    accelerator: Accelerator
    model: nn.Module
    """As accelerate prepared it: autocast, and DDP where several processes launch their steps plainly."""
    plain_model: SimCLR
    """The same weights without those wrappers."""
    optimizer: Any
    update: Callable[[Run, Tensor], tuple[Tensor, ...]]
    """Takes a step on these views: loss, norms of the gradients, projections."""
    guard: Guard
    """Takes optimizer steps."""
    way: Way
    """How steps are computed."""
    progress: Progress
    writer: CheckpointWriter
    peers: Peers
    log: RunLog

    @functools.cached_property
    def passes(self) -> int:
        """Parts of a batch that pass the network one after the other, so that each is normalised by itself."""
        return 2 if self.config.batch_norm_per_view and groups_of(self.plain_model) == 1 else 1

    @functools.cached_property
    def captured(self) -> Captured | None:
        """The step as one CUDA graph, views included, if that is how it is computed."""
        if not self.way.is_captured:
            return None
        return Captured(
            lambda *recipe: self.update(self, self.feed.make(*recipe)),
            self._say_not_captured,
            self.peers.gather,
        )

    def _say_not_captured(self, reason: str) -> None:
        if self.accelerator.is_main_process:
            print(f"step:       launch by launch on all ranks, since it cannot be captured: {reason}", flush=True)

    def let_go(self) -> None:
        """Free what would keep the processes from parting. Not where a rank is lost: the device then waits for it."""
        if self.way.is_captured and self.captured is not None:
            self.captured.close()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.progress.step // self.derived.steps_per_epoch


@contextlib.contextmanager
def open_run(
    config: TrainConfig,
    peers: Peers,
    update: Callable[[Run, Tensor], tuple[Tensor, ...]],
    images_on: torch.device | None = None,
    *,
    is_dry: bool = False,
) -> Iterator[Run]:
    """Open a run, new or to be continued, ready for its next step; while it is open, its folder is locked.

    Args:
        config: The run.
        peers: The other processes of it.
        update: Takes a step on views: see :attr:`Run.update`.
        images_on: Where images that are kept in memory lie; by default where the step runs.
        is_dry: Whether the folder is neither made nor locked nor written to, and nothing is told to a tracker.

    Raises:
        ValueError: If configuration, data, devices and an earlier run in the folder do not fit together.
        DivergedError: What is raised while it is open, with the way out.
    """
    runlog.require_run_or_empty(config.folder)
    if config.parts is not None:
        parts.load(config.parts)
    config = config.for_images(load_facts(config.data).num_images)
    accelerator, precision_reason = start_devices(config)
    is_main = accelerator.is_main_process
    writes = is_main and not is_dry
    kept_memory = system.keep_freed_memory() if accelerator.device.type == "cpu" else None
    with open_images(config.data, backend=config.speed.loader, device=images_on or accelerator.device) as source:
        size = image_size(source.facts, config.data)
        derived = derive(config, source.facts.num_images, accelerator.num_processes)

        feed = ViewFeed(
            source,
            config.view_1,
            config.view_2,
            seed=config.seed,
            view_stages=config.view_stages,
            augmentation=config.augmentation,
            choice=config.speed.views,
            device=accelerator.device,
            dtype=forward_dtype(accelerator, config),
        )
        way = Way.of_all(peers.gather(way_of_steps(config, derived, accelerator, feed)))
        plain_model, model, optimizer = prepare_model(config, derived, size, accelerator, way)
        if config.resume == "must" and not config.folder.exists():
            raise CheckpointError(
                f"resume is must, but there is no {config.folder}; use --resume auto to start a new run"
            )
        with runlog.locked(config.folder, is_main=writes) as lock:
            progress = resume(config, derived, source.facts, plain_model, optimizer, accelerator)
            if is_main:
                say_start(config, derived, source, feed, way, accelerator, precision_reason, plain_model, progress)
                if kept_memory is not None:
                    print(f"memory:     {kept_memory}", flush=True)
            begun = write_manifest(config, derived, source, feed, way, accelerator, progress) if writes else ""
            # Which images this rank reads at each step
            plan = EpochPlan(
                np.arange(derived.num_images),
                config.global_batch_size,
                derived.world_size,
                accelerator.process_index,
                config.seed,
            )
            # The inner ones end first: what is on its way to the disk is written before the status says how it ended.
            with (
                contextlib.nullcontext() if is_dry else tracked(accelerator, config, begun),
                Status(
                    config.folder,
                    is_main=writes,
                    step=progress.step,
                    total_steps=derived.total_steps,
                    is_ours=lock.is_held,
                ) as status,
                RunLog(
                    config.folder,
                    is_main=writes,
                    total_steps=derived.total_steps,
                    first_step=progress.step,
                    track=accelerator.log,
                ) as log,
                CheckpointWriter(
                    config.folder,
                    keep=config.keep_checkpoints,
                    last_step=progress.step_of_last,
                    before=functools.partial(before_save, lock, log),
                    after=status.saved,
                ) as writer,
                peers.explain_lost_ranks(before_exit=status.failed),
                feed,
            ):
                run = Run(
                    config=config,
                    derived=derived,
                    source=source,
                    plan=plan,
                    feed=feed,
                    accelerator=accelerator,
                    model=model,
                    plain_model=plain_model,
                    optimizer=optimizer,
                    guard=Guard(
                        plain_model,
                        optimizer,
                        accelerator.scaler,
                        config.on_nonfinite,
                        None if is_dry else config.folder,
                        plan,
                    ),
                    update=update,
                    way=way,
                    progress=progress,
                    writer=writer,
                    peers=peers,
                    log=log,
                )
                require_same_start(run)
                try:
                    yield run
                except (ValueError, Interrupted) as error:  # after others the device may wait for a lost rank
                    run.let_go()
                    if isinstance(error, DivergedError):
                        raise DivergedError(f"{error}{_way_out(run)}") from error
                    raise
                run.let_go()


def require_same_start(run: Run) -> None:
    """Refuse to train if the ranks continue after different steps, or have opened different images. Waits for all."""
    steps, contents = zip(*run.peers.gather((run.progress.step, str(run.source.facts.identity))), strict=True)
    if len(set(contents)) > 1:  # though their sidecars were equal before: another file has taken the name meanwhile
        raise launch.DifferentRunsError(f"{run.config.data} was replaced while the ranks opened it; start them again")
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the checkpoints that ranks 0 to {len(steps) - 1} found in {run.config.folder} are of steps "
            f"{list(steps)}: is it on a disk that all of them share?"
        )
    require_equal_weights(run)


def require_equal_weights(run: Run) -> None:
    """Refuse to go on if a rank holds other weights than the others. Waits for all.

    Every rank begins with the same weights and takes the same averaged gradient to the same update, so they are equal
    to the last bit, whatever kernels each device chose for its own images. What is compared is a hash of each tensor:
    parameters and, unless they are kept by each device, the running statistics of batch normalisation.

    Raises:
        DifferentRunsError: On all ranks, with the rank and the first tensor that differs.
    """
    if run.derived.world_size == 1:
        return
    model = run.plain_model
    tensors = model.state_dict() if run.config.global_batch_norm else dict(model.named_parameters())
    hashes = torch.stack([torch.hash_tensor(value.detach()).view(torch.int64) for value in tensors.values()])
    of_ranks = [tuple(of_rank) for of_rank in run.peers.gather(hashes.tolist())]
    common, _ = collections.Counter(of_ranks).most_common(1)[0]
    for number, of_rank in enumerate(of_ranks):
        if of_rank != common:
            name = next(name for name, one, other in zip(tensors, of_rank, common, strict=True) if one != other)
            raise launch.DifferentRunsError(
                f"after step {run.progress.step} rank {number} holds other weights than rank {of_ranks.index(common)}: "
                f"{name} differs. All take the same averaged gradient, so a device has computed wrongly, or ranks on "
                "different kinds of devices or numbers of threads have rounded differently; the last good checkpoint "
                f"in {run.config.folder} was saved before"
            )


def way_of_steps(config: TrainConfig, derived: Derived, accelerator: Accelerator, feed: ViewFeed) -> Way:
    """Return how the steps of a run are computed; raise a ValueError if it cannot be done as configured."""
    longest = max(epochs for _, epochs in whole_stages(config.view_stages, feed.source.facts.height, config.epochs))
    in_micro_batches = config.speed.micro_batch_size is not None
    way = choose_way(
        config.speed.compile,
        device=accelerator.device,
        world_size=derived.world_size,
        has_scaler=accelerator.scaler is not None,
        saves_memory=config.speed.recompute or in_micro_batches,
        views=feed.method if feed.method != "own" else config.augmentation,
        longest_stage=longest * derived.steps_per_epoch * config.global_batch_size,
        backend=distributed.backend(),
    )
    return way._replace(averages_gradients=way.is_captured or way.is_compiled or in_micro_batches)


def prepare_model(
    config: TrainConfig, derived: Derived, size: int, accelerator: Accelerator, way: Way
) -> tuple[SimCLR, nn.Module, Any]:
    """Return the model, as it is and as accelerate prepared it, and the optimizer; the same weights on every rank."""
    torch.manual_seed(config.seed)
    plain_model = SimCLR(config.model, size)
    for side, _ in config.view_sizes:
        plain_model.require_size(side)
    if config.speed.micro_batch_size is not None:
        require_independent_images(plain_model)
    if derived.world_size > 1 and config.global_batch_norm:
        use_global_batch_norm(
            plain_model,
            accelerator.device,
            is_compiled=way.is_compiled,
            groups=2 if config.batch_norm_per_view else 1,
        )
    plain_model.to(accelerator.device, dtype=parameter_dtype(config)).to(memory_format=torch.channels_last)
    if config.speed.recompute:
        recompute_blocks(plain_model)
    if way.is_captured:
        torch.backends.cudnn.benchmark = True  # shapes are fixed, and the fastest kernels are found before capture
    if way.is_compiled:
        # In place, so that the weights keep their names; what calls the encoder alone is not compiled.
        plain_model.compile(dynamic=False)
    optimizer = make_optimizer(plain_model, config.optimizer, skippable=accelerator.device.type == "cuda")
    with warnings.catch_warnings():
        # torch 2.14 names DDP's option anew; accelerate and torch 2.11 know the name that start_devices uses.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # Evaluation mode is accelerate's word for "without DDP".
        model = accelerator.prepare_model(plain_model, evaluation_mode=way.averages_gradients)
        optimizer = accelerator.prepare(optimizer)
    return plain_model, model, optimizer


def image_size(facts: Facts, path: Path) -> int:
    """Return the side of the images in pixels."""
    if facts.height != facts.width:
        raise ValueError(
            f"{path} holds images of {facts.height} x {facts.width} pixels; pretraining needs square ones. Convert "
            "them with a --resolution (python -m data_prep --help)"
        )
    return facts.height


def statement(config: TrainConfig, program: Path) -> dict[str, str]:
    """Return all that this rank's results depend on, for :func:`simclr.run.launch.require_one_run`, by name.

    Args:
        config: The run.
        program: The file that was started.
    """
    facts, device = load_facts(config.data), PartialState().device
    settings = {key: str(value) for key, value in settings_of(config).items()}
    # Where the images lie and who reads them may differ; what they are may not.
    return {key: value for key, value in settings.items() if key not in {"data", "speed.loader", "parts"}} | {
        "the data": f"{facts.num_images} images with sha256 {facts.content_sha256[:12]}",
        **{f"the data's {name}": str(value) for name, value in facts.identity.items() if name != "content_sha256"},
        "the code": launch.fingerprint_of_code(*filter(None, (program, config.parts))),
        "the device": device.type,
        "the precision": choose_precision(config, device)[0],
        **{name: importlib.metadata.version(name) for name in ("torch", "accelerate", "timm", "numpy")},
    }


def before_save(lock: runlog.Lock, log: RunLog) -> None:
    """See that the folder is still this run's, and that all lines that a checkpoint continues after are on the disk."""
    lock.require_held()
    log.sync()


def _way_out(run: Run) -> str:
    last = run.config.folder / checkpoint.LAST
    kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
    rate = run.derived.learning_rate(max(run.progress.step - 1, 0))
    return (
        f" (epoch {run.epoch}, learning rate {rate:.3g}); {kept}. A lower --optimizer.base-learning-rate, longer "
        "--optimizer.warmup-epochs, --optimizer.gradient-clip-norm 1 or --precision fp32 may help; give the new run "
        "another --output"
    )
