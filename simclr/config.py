"""What a run is: frozen dataclasses, and the numbers that follow from them.

Durations are given in epochs and turned into steps in one place (:func:`derive`). Named configurations are in
:mod:`simclr.presets`, conditions for values in :mod:`simclr.schema`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from tyro.conf import OmitArgPrefixes

from simclr import parts, schema
from simclr.distributed import divisible_batches
from simclr.losses import KernelChoice, NTXentForm
from simclr.losses import LossConfig as LossConfig
from simclr.models import ModelConfig, require_known_encoder
from simclr.optim import Momentum
from simclr.optim import OptimizerConfig as OptimizerConfig
from simclr.schedule import learning_rate_at
from simclr.schema import Count, Must, NotNegative, Positive, Seed, Size, require
from simclr.schema import from_json as from_json
from simclr.schema import from_values as from_values
from simclr.schema import to_json as to_json
from simclr.views import ViewSpec

Batch = Annotated[Size, Must(lambda value: value >= 2, "at least 2, since an image is compared with others")]
Timeout = Annotated[float, Must(lambda value: 0 < value <= 1e9, "> 0, and at most 1e9")]
Fraction = Annotated[float, Must(lambda value: 0 < value <= 1, "above 0, and at most 1")]
Loader = Literal["auto", "ffcv", "memory"]
CompileChoice = Literal["auto", "none", "default", "graph", "graph-compiled"]


@dataclass(frozen=True)
class SpeedConfig:
    """How fast, and in how much memory; never what. None of these changes a result by more than rounding."""

    loader: Loader = "auto"
    """Who reads the images; both give the same batches."""

    views: Literal["auto", "fused", "triton", "torch"] = "auto"
    """Who computes the views. fused: one compiled pass on the CPU. triton: one launch on a GPU. torch: batched
    operations on the device. auto: fused on CPUs with numba, triton on GPUs, torch elsewhere and for fp64."""

    compile: CompileChoice = "auto"
    """How a step is computed. none: launch by launch. default: by torch.compile, for the shapes at hand; the first step
    then takes seconds to minutes. graph: the whole step, views included, is one CUDA graph. graph-compiled: both. auto:
    a graph on one GPU, compiled where the run is long enough to pay for it, else none."""

    nt_xent_form: NTXentForm = "auto"
    """How nt_xent is computed: see simclr.losses. auto: by size and device."""

    kernels: KernelChoice = "auto"
    """nt_xent's tiles by torch's operations or by fused Triton kernels (CUDA). auto: Triton where it can."""

    recompute: bool = False
    """Whether the encoder's blocks are computed again in the backward pass instead of kept: the same bits in less
    memory (ResNet-18: 0.61 of it, ResNet-50: 0.41) for one forward pass more."""

    micro_batch_size: Size | None = None
    """Source images that pass the encoder at a time on each device: the memory of so many, for one forward pass more.
    For encoders without batch normalisation."""


@dataclass(frozen=True)
class TrainConfig:
    """A pretraining run. With the data file, this determines the weights, whatever the number of devices."""

    name: str = "custom"
    """The run's name: a preset's, unless you give another."""

    data: Path = Path("data/cifar10/train.beton")
    """Training images, written by data_prep. Labels serve only to measure."""

    output: Path | None = None
    """The run's folder. Default: results/<name>-seed<seed>."""

    seed: Seed = 0
    """Determines the initial weights, the order and the views."""

    epochs: Size = 100
    """How often each image is seen, as two views."""

    global_batch_size: Batch = 512
    """Source images per step over all devices (each gives two views)."""

    loss: LossConfig = field(default_factory=LossConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    view_1: ViewSpec = field(default_factory=ViewSpec)
    view_2: ViewSpec = field(default_factory=ViewSpec)
    speed: OmitArgPrefixes[SpeedConfig] = field(default_factory=SpeedConfig)

    augmentation: str = "standard"
    """standard: the operations of view_1 and view_2. Or one that --parts registers."""

    parts: Path | None = None
    """A Python file that registers an encoder, a projector, an objective or views of your own; it is executed. See
    docs/own_parts.md."""

    view_sizes: tuple[tuple[Size, Positive], ...] = ()
    """Side of the views in pixels, and the share of the epochs that it holds for, such as 16 0.5 24 0.3: smaller views
    first take less time. The epochs after these have views of the stored images' side; so has every measurement."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Number format of the forward pass; losses are computed in float32 at least. bf16, fp16: autocast. auto: bf16
    where the GPU or CPU is fast at it, else fp32. fp64: everything in float64, to show that two runs are the same."""

    global_batch_norm: bool = True
    """Batch normalisation over all devices, so that several devices compute what one would."""

    batch_norm_per_view: bool = False
    """Whether the two views pass the network one after the other, so that batch normalisation sees each by itself
    (as Barlow Twins' code does); otherwise they pass together (as SimCLR's code does), which is faster."""

    num_validation: Count | None = None
    """Images of the training file whose labels measure (kNN: queries); the others are the kNN bank. All images are
    pretrained on, without labels. 0: no measuring. Default: a tenth, at most 5,000."""

    knn_every_epochs: Count = 10
    """How often kNN accuracy is measured; also after the last epoch. 0: only then."""

    checkpoint_every_epochs: Size = 1
    """How often the resumable checkpoint is written."""

    checkpoint_every_steps: Size | None = None
    """How often it is written within an epoch, for long ones. Default: not."""

    keep_checkpoints: Size = 2
    """How many resumable checkpoints stay, the last one and those before it to fall back to."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in the output folder if there is one. never: refuse to touch it. must: refuse to start
    anew."""

    allow_changed: tuple[str, ...] = ()
    """Settings that may differ from those of the run that is continued, such as epochs or optimizer.weight_decay (or
    optimizer, for all of it); data: also other images."""

    timeout_seconds: Timeout = 120.0
    """After the first step, how long a rank waits for another, or stands still itself, before the run ends."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a gradient that is not finite; the weights never take it in. stop: the run ends. skip: it goes on
    without this step, and ends after 10 in a row. With fp16 it is skip, which its search for a scale needs."""

    world_size: Size | None = None
    """Number of processes that must take part; the run stops at once if it is another. Does not start any."""

    stop_at_step: Size | None = None
    """Save and leave after this step, as an interruption would; the schedule stays that of the whole run."""

    log_every_steps: Size = 10
    """How often a line of metrics is written; reading them makes the host wait for the device."""

    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where all that metrics.jsonl has goes too (through accelerate), under the name <name>-seed<seed>."""

    tracker_project: Annotated[str, Must(lambda name: bool(name.strip()), "a name")] = "simclr"
    """The project that trackio and W&B put the run in. TensorBoard has none."""

    def __post_init__(self) -> None:
        """Refuse what cannot run, naming the field, its value and the way out."""
        schema.check_fields(self)
        valid_name = bool(self.name) and not set(self.name) & set("/\\") and self.name not in {".", ".."}
        require(valid_name, "name", self.name, "a name for a folder, without slashes")
        fits = sum(share for _, share in self.view_sizes) <= 1
        require(fits, "view_sizes", self.view_sizes, "shares of the epochs that are at most 1 in all")
        self._require_known_parts()
        names = {field.name for field in dataclasses.fields(self)}
        for name in self.allow_changed:
            require(name.split(".")[0] in names, "allow_changed", name, "the name of a setting")
        warmup, speed = self.optimizer.warmup_epochs, self.speed
        require(warmup < self.epochs, "optimizer.warmup_epochs", warmup, f"less than epochs, {self.epochs}")
        if speed.micro_batch_size is not None or speed.recompute:
            possible = speed.compile in {"auto", "none"}
            require(possible, "compile", speed.compile, "auto or none with micro_batch_size and recompute")
        if self.loss.bf16_matmul:
            require(speed.nt_xent_form != "matrix", "nt_xent_form", "matrix", "another with loss.bf16_matmul")

    def _require_known_parts(self) -> None:
        try:
            require_known_encoder(self.model.encoder)
            parts.PROJECTORS.require(self.model.projector, "model.projector")
            parts.OBJECTIVES.require(self.loss.name, "loss.name")
            parts.require_settings(self.loss.name, (name for name, _ in self.loss.settings))
            parts.VIEWS.require(self.augmentation, "augmentation")
        except ValueError as error:
            if self.parts is None:
                raise
            raise ValueError(
                f"{error}. If {self.parts} registers it, load that file, or the copy in the run's folder, first: "
                f"--parts {self.parts}, or in Python simclr.parts.load({str(self.parts)!r})"
            ) from error

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return self.output or Path("results") / self.full_name

    @property
    def full_name(self) -> str:
        """What tells the run from others that differ in their seed."""
        return f"{self.name}-seed{self.seed}"

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

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0: see :func:`simclr.schedule.learning_rate_at`."""
        return learning_rate_at(
            step, peak=self.peak_learning_rate, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )

    def equations(self, config: TrainConfig) -> list[str]:
        """Return each number with the way it came about, for people."""
        batch, optimizer, left_out = config.global_batch_size, config.optimizer, self.left_out_per_epoch
        share, part = self.per_device_batch_size, config.speed.micro_batch_size
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
        changes.append(f"--global-batch-size {divisible_batches(batch, world_size, num_images)}")
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
    "linear, few labels": {
        "learning_rates": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        "weight_decays": (0.0, 1e-3, 1e-2, 0.1),
    },
    "finetune": {"learning_rates": (0.01, 0.03, 0.1), "weight_decays": (5e-4,)},
}


@dataclass(frozen=True)
class ProbeConfig:
    """An evaluation of a pretrained encoder: kNN, and a linear classifier (or fine-tuning)."""

    run: Path
    """Folder of a pretraining run, or a checkpoint file in it."""

    parts: Path | None = None
    """The file that the run was trained with, if it has parts of its own; it is executed."""

    train: Path | None = None
    """Training images. Default: the file the encoder was pretrained on."""

    test: Path | None = None
    """Test images. Default: test.beton beside the training file."""

    output: Path | None = None
    """Where simclr_lin_best.pt, the figures and the report go. Default: in the run's folder, probe-linear,
    probe-linear-augmented or probe-finetune, with few labels followed by -labels- and the fraction."""

    mode: Literal["linear", "finetune"] = "linear"
    """linear: the encoder stays frozen, which is proven; finetune: it is trained too, from the pretrained weights."""

    features: Literal["cached", "augmented"] = "cached"
    """linear only. cached: features of the plain images, computed once. augmented: of lightly augmented images (random
    crop and flip), anew each epoch."""

    image_sizes: tuple[Size, ...] = ()
    """Sides in pixels at which the encoder reads images; of several, the one with the highest kNN accuracy on the
    validation images is taken. Random crops enlarge, so an encoder often knows larger objects than images have (Touvron
    et al. 2019, arXiv:1906.06423). Default: as stored. For linear with cached features only."""

    epochs: Size = 50
    """Of the classifier's training."""

    batch_size: Size = 512
    """Images per step of it."""

    view: ViewSpec = LIGHT_VIEW
    """Augmentation for features augmented and mode finetune."""

    learning_rates: tuple[Positive, ...] = ()
    """Candidates, chosen on the validation split of the training file. Default: 0.003 0.01 0.03 0.1 0.3 1
    (linear), 0.01 0.03 0.1 (finetune)."""

    weight_decays: tuple[NotNegative, ...] = ()
    """Candidates, chosen likewise. Default: 0 1e-5 1e-4 1e-3 (linear), 0 1e-3 1e-2 1e-1 (linear, few labels), 5e-4
    (finetune)."""

    momentum: Momentum = 0.9
    """Of SGD."""

    num_validation: Size | None = None
    """Images of the training file held out to choose on. Default: those that the run measured kNN on; a tenth, at most
    5,000, of a file of another size."""

    label_fraction: Fraction = 1.0
    """Share of the training file's labels that are used at all, such as 0.01 or 0.1. They are drawn by the seed, as
    many of each class, and written to labels.json. A fifth of them is held out to choose on (num_validation is
    refused then), a folder stands for its last checkpoint, which no label chose, and batches are at most a sixteenth of
    the images fitted on."""

    knn_neighbours: Size | None = None
    """How many neighbours vote. Default: 20, or as many as there are."""

    knn_temperature: Positive = 0.1
    """A neighbour's vote is exp(cosine similarity / temperature)."""

    baselines: bool = True
    """Whether raw pixels and the untrained encoder are measured too."""

    map_points: Count = 2000
    """Test images in the report's map (t-SNE), at most; drawn by the seed. 2,000 take about 7 s. 0: no map."""

    pdf: bool = False
    """Whether the report is written as report.pdf too. Needs WeasyPrint: the extra `pdf`."""

    seed: Seed = 0
    """Of the order of images, and of what is drawn: labels, pictures, map."""

    loader: Loader = "auto"
    """Who reads the images; both give the same."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the encoder's forward pass."""

    def __post_init__(self) -> None:
        """Fill in the candidates that depend on the mode, and refuse what cannot run."""
        schema.check_fields(self)
        reads_plain = self.mode == "linear" and self.features == "cached"
        require(reads_plain or not self.image_sizes, "image_sizes", self.image_sizes, "none with views or fine-tuning")
        if self.label_fraction < 1:
            require(self.num_validation is None, "num_validation", self.num_validation, "none with a label_fraction")
        has_few_labels = self.mode == "linear" and self.label_fraction < 1
        for name, candidates in _CANDIDATES["linear, few labels" if has_few_labels else self.mode].items():
            if not getattr(self, name):
                object.__setattr__(self, name, candidates)


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def settings_of(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Return a configuration as one dict with dotted keys, and values that any tracker takes."""
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flattened(json.loads(to_json(config))).items()
    }
