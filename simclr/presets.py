"""Named configurations, each with its source and the result to expect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from simclr.config import LossConfig, OptimizerConfig, TrainConfig
from simclr.models import ModelConfig
from simclr.views import ViewSpec


class Preset(NamedTuple):
    """A recipe with what is known about it."""

    source: str
    """Where the hyperparameters come from, and what differs."""
    expected: str
    """The result to expect, with its protocol, or "not measured"."""
    config: TrainConfig


_SIMCLR_CIFAR10 = TrainConfig(
    epochs=100,
    global_batch_size=512,
    loss=LossConfig(name="nt_xent", temperature=0.5),
    model=ModelConfig(
        encoder="resnet18", projector="simclr2", projector_hidden=1024, projection_dim=128, projector_batch_norm=False
    ),
    optimizer=OptimizerConfig(
        name="sgd", base_learning_rate=0.06, momentum=0.9, weight_decay=5e-4, decay_biases_and_norms=True
    ),
    view_1=ViewSpec(grayscale_probability=0.1),
    view_2=ViewSpec(grayscale_probability=0.1),
    batch_norm_per_view=True,
)
_SIMCLR_SOURCE = (
    "github.com/dkobak/simclr-cifar10 (commit 44b2500): SGD, weight decay on every parameter, no warm-up, projector "
    "512-1024-128 without normalisation; there in float32, on pixels that are not normalised, cosine by epoch"
)
_BARLOW_VIEW = ViewSpec(
    crop_scale=(0.08, 1.0),
    interpolation="bicubic",
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale_probability=0.2,
)
_BARLOW_CIFAR10 = TrainConfig(
    epochs=1000,
    global_batch_size=256,
    loss=LossConfig(name="barlow_twins", off_diagonal_weight=0.0051, scale=0.1),
    model=ModelConfig(encoder="resnet18", projector="barlow3", projector_hidden=2048, projection_dim=2048),
    optimizer=OptimizerConfig(
        name="lars",
        base_learning_rate=0.3,
        weight_decay=1e-4,
        warmup_epochs=10,
        lars_trust_coefficient=0.02,
        lars_clip=True,
    ),
    view_1=_BARLOW_VIEW,
    view_2=dataclasses.replace(_BARLOW_VIEW, solarise_probability=0.2),
    batch_norm_per_view=True,
)
_BARLOW_SOURCE = (
    "github.com/vturrisi/solo-learn (commit 9187ea3): LARS, eta 0.02, clipped, lambda 0.0051, loss times 0.1, "
    "projector 2048-2048-2048; there in float16"
)

_CPU_SIMCLR = TrainConfig(
    epochs=4,
    global_batch_size=256,
    loss=LossConfig(name="nt_xent", temperature=0.2),
    model=ModelConfig(encoder="small_resnet_w32", projector="simclr2", projector_hidden=512, projection_dim=128),
    optimizer=OptimizerConfig(name="sgd", base_learning_rate=0.12, weight_decay=5e-4, warmup_epochs=0.2),
    knn_every_epochs=0,
)
# Found in docs/experiment_log.md, "More from the same minutes" and "A wider representation"
_CPU_MUON = dataclasses.replace(
    _CPU_SIMCLR,
    epochs=6,
    loss=LossConfig(name="nt_xent", temperature=0.1),
    model=dataclasses.replace(_CPU_SIMCLR.model, encoder="small_resnet_w48_d768", projector_hidden=256),
    optimizer=OptimizerConfig(
        name="muon", base_learning_rate=0.02, momentum=0.95, weight_decay=0.05, warmup_epochs=0.3
    ),
    view_sizes=((24, 0.85),),
)
_CPU_BARLOW = dataclasses.replace(
    _CPU_MUON,
    loss=LossConfig(name="barlow_twins", off_diagonal_weight=5e-3),
    model=dataclasses.replace(_CPU_MUON.model, projector="barlow3", projector_hidden=512, projection_dim=512),
)
_CPU_SOURCE = "own search for 2 CPU cores (docs/experiment_log.md)"

# The shapes differ in outline only, so colours are made to tell little, and crops leave most of the shape.
_DEMO_VIEW = ViewSpec(
    crop_scale=(0.4, 1.0), brightness=0.6, contrast=0.6, saturation=0.6, hue=0.3, grayscale_probability=0.3
)
_DEMO = dataclasses.replace(
    _CPU_SIMCLR,
    name="demo",
    data=Path("data/shapes/train.beton"),
    epochs=8,
    global_batch_size=128,
    model=dataclasses.replace(_CPU_SIMCLR.model, encoder="small_resnet_w24"),
    optimizer=dataclasses.replace(_CPU_SIMCLR.optimizer, warmup_epochs=0.5),
    view_1=_DEMO_VIEW,
    view_2=_DEMO_VIEW,
    knn_every_epochs=2,
)

# The views of SimCLR's paper, without its blur (arXiv:2002.05709, appendix A; colours at strength 1)
_STRONG_VIEW = ViewSpec(
    crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale_probability=0.2
)
_BLURRED_VIEW = dataclasses.replace(_STRONG_VIEW, blur_probability=0.5)

# Found on one GPU: docs/experiment_log.md, "ResNet-18 on one H200"
_FAST_SIMCLR = dataclasses.replace(
    _SIMCLR_CIFAR10,
    epochs=90,
    loss=LossConfig(name="nt_xent", temperature=0.1),
    model=dataclasses.replace(_SIMCLR_CIFAR10.model, encoder="resnet18_d2048", projector_batch_norm=True),
    optimizer=OptimizerConfig(name="muon", base_learning_rate=0.02, momentum=0.95, weight_decay=0.05, warmup_epochs=1),
    view_1=_STRONG_VIEW,
    view_2=_STRONG_VIEW,
    view_sizes=((24, 1.0),),
    batch_norm_per_view=False,
    knn_every_epochs=30,
    checkpoint_every_epochs=10,
)
_FAST_BARLOW = dataclasses.replace(
    _FAST_SIMCLR,
    loss=LossConfig(name="barlow_twins", off_diagonal_weight=0.0051),
    model=ModelConfig(encoder="resnet18_d2048", projector="barlow3", projector_hidden=2048, projection_dim=2048),
)
# At 96 of 128 pixels an object in a crop is about as large as it is in the whole image at 128.
_FAST_IMAGENETTE = dataclasses.replace(
    _FAST_SIMCLR,
    data=Path("data/imagenette/train.beton"),
    epochs=300,
    global_batch_size=256,
    optimizer=dataclasses.replace(_FAST_SIMCLR.optimizer, warmup_epochs=5),
    view_1=_BLURRED_VIEW,
    view_2=_BLURRED_VIEW,
    view_sizes=((96, 1.0),),
    knn_every_epochs=50,
    checkpoint_every_epochs=50,
)
# 64 pixels and views of at most 48, in which an object is about as large as in the whole image
_CPU_IMAGENETTE = dataclasses.replace(
    _CPU_MUON,
    data=Path("data/imagenette64/train.beton"),
    epochs=20,
    optimizer=dataclasses.replace(_CPU_MUON.optimizer, warmup_epochs=1),
    view_sizes=((32, 0.7), (48, 0.3)),
    knn_every_epochs=5,
)
# What "reflects the default hyperparameters in our paper", by its authors' README
_IMAGENET_VIEW = dataclasses.replace(_BLURRED_VIEW, interpolation="bicubic")
_IMAGENET_SIMCLR = TrainConfig(
    data=Path("data/imagenet/train.beton"),
    epochs=100,
    global_batch_size=4096,
    loss=LossConfig(name="nt_xent", temperature=0.1),
    model=ModelConfig(
        encoder="resnet50", stem="original", projector="simclr2", projector_hidden=2048, projection_dim=128
    ),
    optimizer=OptimizerConfig(name="lars", base_learning_rate=0.3, momentum=0.9, weight_decay=1e-6, warmup_epochs=10),
    view_1=_IMAGENET_VIEW,
    view_2=_IMAGENET_VIEW,
    checkpoint_every_steps=100,
)

_PRESETS = (
    Preset(
        "own, to show the whole path in minutes on built-in images",
        "test set, one seed on two CPUs: kNN 72.8 and 76.6 %, linear 65.5 and 68.9 % (raw pixels: 31.1 and 13.7)",
        _DEMO,
    ),
    Preset(
        _CPU_SOURCE,
        "CIFAR-10 (JPEG q75), test set, three seeds, 7 minutes: kNN 66.4 to 66.7 %, linear 71.7 to 72.2 %",
        dataclasses.replace(_CPU_MUON, name="cpu-simclr"),
    ),
    Preset(
        _CPU_SOURCE,
        "CIFAR-10 (JPEG q75), test set, three seeds, 30 minutes: kNN 71.3 to 71.8 %, linear 75.6 to 76.2 %",
        dataclasses.replace(
            _CPU_MUON,
            name="cpu-simclr-16",
            epochs=16,
            model=dataclasses.replace(_CPU_MUON.model, encoder="small_resnet_w64_d1024"),
            optimizer=dataclasses.replace(_CPU_MUON.optimizer, warmup_epochs=0.8),
            knn_every_epochs=8,
        ),
    ),
    Preset(
        _CPU_SOURCE,
        "CIFAR-10 (JPEG q75), test set, three seeds, 14 minutes: kNN 60.7 to 61.7 %, linear 68.4 to 69.1 %",
        dataclasses.replace(_CPU_BARLOW, name="cpu-barlow"),
    ),
    Preset(
        "own, for 2 CPU cores and 64-pixel images of Imagenette: cpu-simclr with larger views, the first try",
        "Imagenette (128-pixel copy, at 64), test set, three seeds, 28 processor minutes: kNN 67.1 to 68.5 %, "
        "linear 77.6 to 77.8 %",
        dataclasses.replace(_CPU_IMAGENETTE, name="cpu-imagenette"),
    ),
    Preset(
        "own, for one GPU: docs/experiment_log.md",
        "CIFAR-10 (JPEG q75), test set, 108 s on an H200, three seeds: kNN 80.8 to 81.3 %, linear 84.7 to 85.1 %",
        dataclasses.replace(_FAST_SIMCLR, name="fast-simclr"),
    ),
    Preset(
        "own, for one GPU: the recipe of fast-simclr with the other objective",
        "CIFAR-10 (JPEG q75), test set, 122 s on an H200, seed 0: kNN 81.4 %, linear 85.2 %",
        dataclasses.replace(_FAST_BARLOW, name="fast-barlow"),
    ),
    Preset(
        "own, for one GPU and 128-pixel images of Imagenette",
        "Imagenette (128-pixel copy), test set, 125 s on an H200, seed 0: kNN 88.5 %, linear 90.1 %",
        dataclasses.replace(_FAST_IMAGENETTE, name="fast-imagenette"),
    ),
    Preset(
        _SIMCLR_SOURCE,
        "published for the official pixels, test set: kNN 83.2 %, linear 85.6 %; here, on CIFAR-10 (JPEG q75), one run "
        "on a GPU: kNN 75.1 %, linear 78.8 %",
        dataclasses.replace(_SIMCLR_CIFAR10, name="cifar10-simclr-100"),
    ),
    Preset(
        f"{_SIMCLR_SOURCE}; half the learning rate of 100 epochs",
        "published for the official pixels: kNN 91.4 %, linear 91.9 % on the test set; here not measured",
        dataclasses.replace(
            _SIMCLR_CIFAR10,
            name="cifar10-simclr-1000",
            epochs=1000,
            optimizer=dataclasses.replace(_SIMCLR_CIFAR10.optimizer, base_learning_rate=0.03),
        ),
    ),
    Preset(
        f"{_BARLOW_SOURCE}; a tenth of its epochs",
        "not measured, and nothing published",
        dataclasses.replace(_BARLOW_CIFAR10, name="cifar10-barlow-100", epochs=100),
    ),
    Preset(
        _BARLOW_SOURCE,
        "published for the official pixels: linear 91.6 % (92.1 % trained along) on the test set; here not measured",
        dataclasses.replace(_BARLOW_CIFAR10, name="cifar10-barlow-1000"),
    ),
    Preset(
        "arXiv:2002.05709 and github.com/google-research/simclr (commit 0075cc0), ResNet-50, 224 pixels, for several "
        "GPUs; there the last layer of the projector is normalised too",
        "published for ImageNet: linear 64.5 %; here not measured",
        dataclasses.replace(_IMAGENET_SIMCLR, name="imagenet-simclr-100"),
    ),
)
PRESETS: dict[str, Preset] = {preset.config.name: preset for preset in _PRESETS}

DEFAULT = "cifar10-simclr-100"
