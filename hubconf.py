"""Encoders by torch.hub, from a copy of this repository.

torch.hub.load(COPY, "pretrained", "results/cifar10-simclr-100-seed0/encoder", source="local")
torch.hub.load(COPY, "encoder", "resnet18", image_size=32, source="local")
"""

from __future__ import annotations

from torch import nn as _nn

dependencies = ["huggingface_hub", "jinja2", "numpy", "safetensors", "timm", "torch", "tqdm", "tyro"]


def pretrained(folder: str, device: str = "cpu") -> _nn.Module:
    """Return the encoder that ``python -m simclr.export`` wrote, in eval mode.

    Args:
        folder: The folder that it wrote, or its model.safetensors. config.json there says what images it takes.
        device: Where it goes.

    Returns:
        The encoder: normalised images, float32 (b, 3, H, W) -> representations (b, D).

    Raises:
        ValueError: If it is missing, damaged or not an export.
    """
    from simclr.export import load_encoder

    return load_encoder(folder, device).encoder


def encoder(name: str = "resnet18", image_size: int = 32, stem: str = "auto") -> _nn.Module:
    """Return an encoder with random weights.

    Args:
        name: Any timm model, or small_resnet_wN; ResNets also with _dD behind, for D outputs. See ModelConfig.
        image_size: Side of the images in pixels; chooses the stem.
        stem: auto, cifar (3x3, stride 1, no max-pool), patch2, or original (timm's own).

    Returns:
        The encoder: (b, 3, H, W) -> (b, D).

    Raises:
        ValueError: If there is no such model, or the stem cannot be made for it.
    """
    from typing import get_args

    from simclr.models import Stem, make_encoder

    if stem not in get_args(Stem):
        raise ValueError(f"stem is {stem!r}, expected one of {', '.join(get_args(Stem))}")
    return make_encoder(name, stem, image_size)  # type: ignore[arg-type]  # checked above
