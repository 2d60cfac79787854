"""What a run is: frozen dataclasses, and the numbers that follow from them.

Durations are given in epochs and turned into steps in one place (:func:`derive`). Named configurations are in
:mod:`simclr.presets`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from simclr.losses import KernelChoice, NTXentForm
from simclr.models import ModelConfig
from simclr.views import ViewSpec


@dataclass(frozen=True)
class LossConfig:
    """The objective."""

    name: Literal["nt_xent", "barlow_twins"] = "nt_xent"
    """nt_xent: SimCLR. barlow_twins: Barlow Twins."""

    temperature: float = 0.5
    """nt_xent's temperature tau, unitless."""

    off_diagonal_weight: float = 5e-3
    """barlow_twins' weight lambda of the off-diagonal terms, unitless."""

    centre: bool = True
    """Whether barlow_twins subtracts each feature's batch mean (as the paper's code); see simclr.losses."""

    scale: float = 1.0
    """The loss is multiplied by this. It matters to SGD, and to LARS for what it does not adapt."""

    nt_xent_form: NTXentForm = "auto"
    """How nt_xent is computed, with the same result up to rounding: see simclr.losses. auto: by size and device."""

    kernels: KernelChoice = "auto"
    """nt_xent's tiles by torch's operations or by fused Triton kernels (CUDA). auto: Triton where it can."""

    bf16_matmul: bool = False
    """Whether nt_xent rounds the factors of its matrix products to bfloat16."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule, a pure function of the step."""

    name: Literal["sgd", "lars", "adamw", "muon"] = "sgd"

    base_learning_rate: float = 0.03
    """Per 256 source images: peak learning rate = base_learning_rate * global_batch_size / 256."""

    momentum: float = 0.9
    """sgd, lars and muon: momentum. adamw: beta 1."""

    weight_decay: float = 5e-4

    decay_biases_and_norms: bool = False
    """Whether weight decay (and LARS's adaptation) also holds for biases and normalisation parameters, that is for
    parameters of fewer than two dimensions."""

    warmup_epochs: float = 0.0
    """The learning rate rises linearly from 0 over this long, then falls by a cosine."""

    final_learning_rate: float = 0.0
    """Where the cosine ends, as a fraction of the peak."""

    lars_trust_coefficient: float = 1e-3
    """LARS's eta."""

    lars_clip: bool = False
    """Whether LARS's factor is limited so that no layer's learning rate exceeds the schedule's (LARC)."""

    gradient_clip_norm: float | None = None
    """Global l2 norm to which the gradient is clipped."""


@dataclass(frozen=True)
class TrainConfig:
    """A pretraining run. With the data file, this determines the weights, whatever the number of devices."""

    name: str = "custom"
    """Of the run. A preset's name, unless you give another."""

    data: Path = Path("data/cifar10/train.beton")
    """Training images, written by data_prep. Labels serve only to measure."""

    output: Path | None = None
    """Folder of the run. Default: results/<name>-seed<seed>."""

    seed: int = 0
    """Of the weights, the order and the views."""

    epochs: int = 100
    global_batch_size: int = 512
    """Source images per step over all devices (each gives two views)."""

    loss: LossConfig = field(default_factory=LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    view_1: ViewSpec = field(default_factory=ViewSpec)
    view_2: ViewSpec = field(default_factory=ViewSpec)

    view_sizes: tuple[tuple[int, float], ...] = ()
    """Side of the views in pixels, and the share of the epochs that it holds for, such as 16 0.5 24 0.3: smaller views
    first take less time. The epochs after these have views of the stored images' side; so has every measurement."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Of the forward pass; losses are computed in float32 at least. bf16, fp16: autocast. auto: bf16 where the GPU
    or CPU is fast at it, else fp32. fp64: everything in float64, to show that two runs are the same."""

    compile: Literal["none", "default", "reduce-overhead", "graph", "graph-compiled"] = "none"
    """Whether torch.compile makes the forward and backward pass, for the shapes at hand; the first step then takes
    seconds to minutes. reduce-overhead: with CUDA graphs, on GPUs. Results differ by rounding."""

    global_batch_norm: bool = True
    """Batch normalisation over all devices, so that several devices compute what one would."""

    batch_norm_per_view: bool = False
    """Whether the two views pass the network one after the other, so that batch normalisation sees each by itself
    (as Barlow Twins' code does); otherwise they pass together (as SimCLR's code does), which is faster."""

    num_validation: int | None = None
    """Images of the training file whose labels measure (kNN: queries); the others are the kNN bank. All images are
    pretrained on, without labels. 0: no measuring. Default: a tenth, at most 5,000."""

    knn_every_epochs: int = 10
    """How often kNN accuracy is measured; also after the last epoch. 0: only then."""

    checkpoint_every_epochs: int = 1
    """How often the resumable checkpoint is written."""

    checkpoint_every_steps: int | None = None
    """How often it is written within an epoch, for long ones. Default: not."""

    keep_checkpoints: int = 2
    """How many resumable checkpoints stay, the last one and those before it to fall back to."""

    loader: Literal["auto", "ffcv", "memory"] = "auto"
    """Who reads the images; both give the same batches."""

    views: Literal["auto", "fused", "triton", "torch"] = "auto"
    """Who computes the views. fused: one compiled pass on the CPU. torch: batched operations on the device. auto: fused
    on CPUs with numba, torch on GPUs and for fp64. They differ by rounding."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in the output folder if there is one. never: refuse to touch it. must: refuse to start
    anew."""

    recompute: bool = False
    """Whether the encoder's blocks are computed again in the backward pass instead of kept: the same bits in less
    memory (ResNet-18: 0.61 of it, ResNet-50: 0.41) for one forward pass more."""

    micro_batch_size: int | None = None
    """Source images that pass the encoder at a time on each device: the same result in the memory of so many, for one
    forward pass more. For encoders without batch normalisation."""

    allow_changed: tuple[str, ...] = ()
    """Settings that may differ from those of the run that is continued, such as epochs or optimizer.weight_decay (or
    optimizer, for all of it); data: also other images."""

    timeout_seconds: float = 120.0
    """After the first step, how long a rank waits for another, or stands still itself, before the run ends."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a gradient that is not finite; the weights never take it in. stop: the run ends. skip: it goes on
    without this step, and ends after 10 in a row. With fp16 it is skip, which its search for a scale needs."""

    world_size: int | None = None
    """Number of processes that must take part; the run stops at once if it is another. Does not start any."""

    stop_at_step: int | None = None
    """Save and leave after this step, as an interruption would; the schedule stays that of the whole run."""

    log_every_steps: int = 10
    """How often a line of metrics is written; reading them makes the host wait for the device."""

    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl (through accelerate)."""

    def __post_init__(self) -> None:
        """Refuse what cannot run, naming the field, its value and the way out."""
        _require_ordinary(self)
        _make_paths(self, "data", "output")
        valid_name = bool(self.name) and not set(self.name) & set("/\\") and self.name not in {".", ".."}
        _require(valid_name, "name", repr(self.name), "a name for a folder, without slashes")
        batch = self.global_batch_size
        _require(batch >= 2, "global_batch_size", batch, "at least 2, since an image is compared with others")
        for name in ("epochs", "log_every_steps", "checkpoint_every_epochs", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            self.num_validation is None or self.num_validation >= 0, "num_validation", self.num_validation, "at least 0"
        )
        _require(self.knn_every_epochs >= 0, "knn_every_epochs", self.knn_every_epochs, "at least 0")
        for name in ("world_size", "stop_at_step", "micro_batch_size", "checkpoint_every_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        valid = all(side >= 1 and share > 0 for side, share in self.view_sizes)
        valid = valid and sum(share for _, share in self.view_sizes) <= 1
        expected = "pairs of a side of at least 1 and a share > 0 of the epochs, at most 1 in all"
        _require(valid, "view_sizes", self.view_sizes, expected)
        _require(0 < self.timeout_seconds <= 1e9, "timeout_seconds", self.timeout_seconds, "> 0, and at most 1e9")
        fields = {field.name for field in dataclasses.fields(self)}
        for name in self.allow_changed:
            _require(name.split(".")[0] in fields, "allow_changed", repr(name), "the name of a setting")
        optimizer, loss = self.optimizer, self.loss
        _require(optimizer.base_learning_rate > 0, "optimizer.base_learning_rate", optimizer.base_learning_rate, "> 0")
        _require(optimizer.weight_decay >= 0, "optimizer.weight_decay", optimizer.weight_decay, "at least 0")
        _require(0 <= optimizer.momentum < 1, "optimizer.momentum", optimizer.momentum, "in [0, 1)")
        _require(
            0 <= optimizer.warmup_epochs < self.epochs,
            "optimizer.warmup_epochs",
            optimizer.warmup_epochs,
            f"in [0, epochs) = [0, {self.epochs})",
        )
        _require(
            0 <= optimizer.final_learning_rate <= 1,
            "optimizer.final_learning_rate",
            optimizer.final_learning_rate,
            "in [0, 1], a fraction of the peak",
        )
        trust = optimizer.lars_trust_coefficient
        _require(trust > 0, "optimizer.lars_trust_coefficient", trust, "> 0")
        clip = optimizer.gradient_clip_norm
        _require(clip is None or clip > 0, "optimizer.gradient_clip_norm", clip, "> 0, or None for no clipping")
        _require(loss.temperature > 0, "loss.temperature", loss.temperature, "> 0")
        _require(loss.off_diagonal_weight >= 0, "loss.off_diagonal_weight", loss.off_diagonal_weight, "at least 0")
        _require(loss.scale > 0, "loss.scale", loss.scale, "> 0")
        if self.micro_batch_size is not None or self.recompute:
            _require(self.compile == "none", "compile", self.compile, "none with micro_batch_size and recompute")
        if loss.bf16_matmul:
            _require(loss.nt_xent_form != "matrix", "loss.nt_xent_form", "matrix", "another with loss.bf16_matmul")

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.output or Path("results") / f"{self.name}-seed{self.seed}"

    def for_images(self, num_images: int) -> Self:
        """Return the same with what depends on the number of images filled in."""
        if self.num_validation is not None:
            return self
        return dataclasses.replace(self, num_validation=default_num_validation(num_images))

    @property
    def view_stages(self) -> tuple[tuple[int, int], ...]:
        """``view_sizes`` with whole epochs in place of shares; each ends at the last epoch that its share reaches."""
        stages, before, share_before = [], 0, 0.0
        for side, share in self.view_sizes:
            share_before += share
            end = math.floor(share_before * self.epochs + 1e-9)  # 0.7 * 10 is a little less than 7
            stages.append((side, end - before))
            before = end
        return tuple(stages)


def default_num_validation(num_images: int) -> int:
    """Return how many images of a training file are held out to measure on, unless a number is given."""
    return min(num_images // 10, 5000)


@dataclass(frozen=True)
class Derived:
    """What follows from a configuration, the number of images and the number of devices."""

    num_images: int
    world_size: int
    per_device_batch_size: int
    """Source images per step on each device."""
    steps_per_epoch: int
    left_out_per_epoch: int
    """Images that fill no batch and sit out an epoch; other ones each epoch."""
    total_steps: int
    warmup_steps: int
    peak_learning_rate: float

    def equations(self, config: TrainConfig) -> list[str]:
        """Return each number with the way it came about, for people."""
        batch, optimizer, left_out = config.global_batch_size, config.optimizer, self.left_out_per_epoch
        share, part = self.per_device_batch_size, config.micro_batch_size
        return [
            f"per_device_batch_size = global_batch_size / world_size = {batch} / {self.world_size} = "
            f"{share} source images, {2 * share} views",
            *(
                [
                    f"micro_batches = ceil(per_device_batch_size / micro_batch_size) = ceil({share} / {part}) = "
                    f"{-(-share // part)}"
                ]
                if part is not None
                else []
            ),
            f"steps_per_epoch = floor(num_images / global_batch_size) = floor({self.num_images} / {batch}) = "
            f"{self.steps_per_epoch}"
            + (f"; {left_out} images sit out each epoch, other ones each" if left_out else ""),
            f"total_steps = epochs * steps_per_epoch = {config.epochs} * {self.steps_per_epoch} = {self.total_steps}",
            f"warmup_steps = warmup_epochs * steps_per_epoch = {optimizer.warmup_epochs:g} * {self.steps_per_epoch} = "
            f"{self.warmup_steps}",
            f"peak_learning_rate = base_learning_rate * global_batch_size / 256 = {optimizer.base_learning_rate:g} * "
            f"{batch} / 256 = {self.peak_learning_rate:g}",
        ]


def derive(config: TrainConfig, num_images: int, world_size: int) -> Derived:
    """Turn epochs into steps and the global batch into shares: the only place where that is done.

    Args:
        config: The run.
        num_images: Images in the training file.
        world_size: Number of devices.

    Raises:
        ValueError: If the global batch cannot be shared equally, is not filled by all images together, or the
            validation images leave no other ones; one message names all that must change, with values that work.
    """
    batch = config.global_batch_size
    if world_size > num_images:
        raise ValueError(
            f"{world_size} processes take part, but {config.data} has {num_images} images, and each process needs at "
            f"least one per batch; use more images or at most {num_images} processes"
        )
    if num_images < 2:
        raise ValueError(f"{config.data} has 1 image, and pretraining compares an image with others; use more images")
    problems, changes = [], []
    if batch > num_images or batch % world_size:
        if batch > num_images:
            problems.append(f"they do not fill one batch of global_batch_size {batch}")
        if batch % world_size:
            problems.append(f"global_batch_size {batch} is not divisible by the {world_size} processes")
        below = min(batch, num_images) // world_size * world_size
        usable = " or ".join(str(size) for size in (below, below + world_size) if 2 <= size <= num_images)
        changes.append(f"--global-batch-size {usable}")
    if config.num_validation is not None and config.num_validation >= num_images:
        problems.append(f"num_validation {config.num_validation} leaves none of them as neighbours")
        changes.append(f"--num-validation {default_num_validation(num_images)}")
    if problems:
        raise ValueError(f"{config.data} has {num_images} images: {'; '.join(problems)}. Use {', '.join(changes)}")
    steps_per_epoch, left_out = divmod(num_images, batch)
    total_steps = config.epochs * steps_per_epoch
    return Derived(
        num_images=num_images,
        world_size=world_size,
        per_device_batch_size=batch // world_size,
        steps_per_epoch=steps_per_epoch,
        left_out_per_epoch=left_out,
        total_steps=total_steps,
        warmup_steps=min(round(config.optimizer.warmup_epochs * steps_per_epoch), total_steps - 1),
        peak_learning_rate=config.optimizer.base_learning_rate * batch / 256,
    )


LIGHT_VIEW = ViewSpec(crop_scale=(0.5, 1.0), jitter_probability=0.0, grayscale_probability=0.0)
"""Random crop and flip only."""

_CANDIDATES: dict[str, dict[str, tuple[float, ...]]] = {
    "linear": {"learning_rates": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "weight_decays": (0.0, 1e-5, 1e-4, 1e-3)},
    "finetune": {"learning_rates": (0.01, 0.03, 0.1), "weight_decays": (5e-4,)},
}


@dataclass(frozen=True)
class ProbeConfig:
    """An evaluation of a pretrained encoder: kNN, and a linear classifier (or fine-tuning)."""

    run: Path
    """Folder of a pretraining run, or a checkpoint file in it."""

    train: Path | None = None
    """Training images. Default: the file the encoder was pretrained on."""

    test: Path | None = None
    """Test images. Default: test.beton beside the training file."""

    output: Path | None = None
    """Where simclr_lin_best.pt, the figures and the report go. Default: in the run's folder, probe-linear,
    probe-linear-augmented or probe-finetune."""

    mode: Literal["linear", "finetune"] = "linear"
    """linear: the encoder stays frozen, which is proven. finetune: it is trained too, from the pretrained weights."""

    features: Literal["cached", "augmented"] = "cached"
    """linear only. cached: features of the plain images, computed once. augmented: of lightly augmented images (random
    crop and flip), anew each epoch."""

    epochs: int = 50
    batch_size: int = 512
    view: ViewSpec = LIGHT_VIEW
    """Augmentation for features augmented and mode finetune."""

    learning_rates: tuple[float, ...] = ()
    """Candidates, chosen on the validation split of the training file. Default: 0.003 0.01 0.03 0.1 0.3 1
    (linear), 0.01 0.03 0.1 (finetune)."""

    weight_decays: tuple[float, ...] = ()
    """Candidates, chosen likewise. Default: 0 1e-5 1e-4 1e-3 (linear), 5e-4 (finetune)."""

    momentum: float = 0.9
    num_validation: int | None = None
    """Images of the training file held out to choose on. Default: those that the run measured kNN on; a tenth, at most
    5,000, of a file of another size."""

    knn_neighbours: int | None = None
    """Default: 20, or as many as there are."""

    knn_temperature: float = 0.1

    baselines: bool = True
    """Whether raw pixels and the untrained encoder are measured too."""

    seed: int = 0
    loader: Literal["auto", "ffcv", "memory"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder's forward pass."""

    def __post_init__(self) -> None:
        """Fill in the candidates that depend on the mode, and refuse what cannot run."""
        _require_ordinary(self)
        _make_paths(self, "run", "train", "test", "output")
        for name, candidates in _CANDIDATES[self.mode].items():
            if not getattr(self, name):
                object.__setattr__(self, name, candidates)
        for name in ("epochs", "batch_size", "num_validation", "knn_neighbours"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(min(self.learning_rates) > 0, "learning_rates", self.learning_rates, "all > 0")
        _require(min(self.weight_decays) >= 0, "weight_decays", self.weight_decays, "all at least 0")
        _require(self.knn_temperature > 0, "knn_temperature", self.knn_temperature, "> 0")


def _require_ordinary(value: object, name: str = "") -> None:
    """Refuse numbers that no setting may have, in all parts of a configuration, by their dotted names."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            _require_ordinary(part, f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for entry in value:
            _require_ordinary(entry, name)
    elif isinstance(value, float):
        _require(math.isfinite(value), name, value, "a finite number")
    elif isinstance(value, int):
        low, high = (0, 2**64 - 1) if name == "seed" else (-(2**63), 2**63 - 1)
        _require(low <= value <= high, name, value, f"{low} to {high}")


def _make_paths(config: object, *names: str) -> None:
    """Let paths be given as text."""
    for name in names:
        if getattr(config, name) is not None:
            object.__setattr__(config, name, Path(getattr(config, name)))


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, expected {expected}")


Config = TypeVar("Config")

# How checkpoints of earlier versions differ: settings that they lack and had the present default of; settings that they
# have and that changed nothing but rounding, or time.
_ADDED_LATER = frozenset({"TrainConfig.recompute"})
_GIVEN_UP = frozenset({"TrainConfig.loss.barlow_twins_form"})
_RENAMED = {("TrainConfig.loss.nt_xent_form", "ring"): "tiled"}


def to_json(config: Any) -> str:
    """Return a configuration as JSON text; :func:`from_json` gives an equal one back."""
    return json.dumps(dataclasses.asdict(config), default=str, indent=2)


def from_json(kind: type[Config], text: str) -> Config:
    """Build a configuration from :func:`to_json`'s text.

    Raises:
        ValueError: On unknown or missing fields, or values of the wrong type; the message names the field.
    """
    value: Config = _build(kind, json.loads(text), kind.__name__)
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    """Turn parsed JSON into ``kind``: a dataclass, a tuple, a dict, Path, Literal, Optional or a plain type."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        hints = typing.get_type_hints(kind)
        value = {name: entry for name, entry in value.items() if f"{where}.{name}" not in _GIVEN_UP}
        later = {name for name in hints if f"{where}.{name}" in _ADDED_LATER}
        unknown, missing = set(value) - set(hints), set(hints) - later - set(value)
        if unknown or missing:
            raise ValueError(f"{where}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
        assert isinstance(kind, type)
        return kind(**{name: _build(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _build(inner, value, where)
    if origin is Literal:
        value = _RENAMED.get((where, str(value)), value)
        if value not in arguments:
            raise ValueError(f"{where}: {value!r} is none of {list(arguments)}")
        return value
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if not isinstance(value, list) or len(kinds) != len(value):
            raise ValueError(f"{where}: expected a list of {len(kinds)}, got {value!r}")
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        return {name: _build(arguments[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if kind is Path:
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value
