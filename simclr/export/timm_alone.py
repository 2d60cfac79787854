"""The lines of Python that build an encoder with timm and torch alone, for programs that do not have this project.

They are run before they are handed out: lines that do not give the encoder's own outputs never are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TimmAlone:
    """How timm builds an encoder."""

    lines: str
    """Python that leaves the network, not yet its weights, in ``model``."""
    call: str | None
    """``"NAME", num_classes=0, ...``, arguments of timm.create_model; None if that alone does not do."""
    arguments: Mapping[str, int]
    """What timm must be told of a transformer, which is made for one size of images."""
    model: nn.Module
    """What the lines make, with the encoder's weights."""


def timm_alone(encoder: nn.Module, name: str, image: Tensor) -> TimmAlone | None:
    """Return the lines that build ``encoder``, or None if timm does not know the network.

    Args:
        encoder: In eval mode, as :func:`simclr.models.make_encoder` builds it.
        name: What it was built by.
        image: Normalised images (b, 3, S, S), on which both must give the same numbers.
    """
    widened = re.fullmatch(r"((?:small_)?resnet(?:_w)?\d+)_d(\d+)", name)
    base = widened[1] if widened else name
    call, arguments = None, dict[str, int]()
    first_conv: Any = "conv1"
    small = re.fullmatch(r"small_resnet_w(\d+)", base)
    if small:
        n = int(small[1])
        imports = "from timm.models.resnet import BasicBlock, ResNet"
        lines = [f"model = ResNet(BasicBlock, layers=(1, 1, 1), channels={(n, 2 * n, 4 * n)}, num_classes=0)"]
    # One that somebody has registered in this process is not timm's.
    elif timm.is_model(base) and timm.models.model_entrypoint(base).__module__.startswith("timm."):
        patch_size = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
        if isinstance(patch_size, tuple):
            arguments = {"img_size": image.shape[-1], "patch_size": patch_size[0]}
        call = ", ".join([json.dumps(base), "num_classes=0", *(f"{key}={value}" for key, value in arguments.items())])
        imports, lines = "import timm", [f"model = timm.create_model({call})"]
        first_conv = getattr(timm.get_pretrained_cfg(base), "first_conv", None)
    else:
        return None
    try:
        plain = _run(imports, *lines)
        for place in (first_conv, "maxpool", "features.pool0", "stem.pool"):
            lines += _change(plain, encoder, place)
        if small or widened:
            added = "nn.Identity()"  # timm's small one has no fourth stage, and asks for it
            if widened:
                wide, channels = int(widened[2]), 4 * n if small else encoder.num_features
                added = f"nn.Conv2d({channels}, {wide}, 1, bias=False), nn.BatchNorm2d({wide}), nn.ReLU()"
                added = f"nn.Sequential({added})"
            lines.append(f"model.layer4 = {added}" if small else f"model.layer4.append({added})")
        if len(lines) > 1:
            imports, call = f"{imports}\nfrom torch import nn", None
        model = _run(imports, *lines)
        model.load_state_dict(encoder.state_dict(), strict=True)
        with torch.inference_mode():
            torch.testing.assert_close(model.eval()(image), encoder(image), rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, AssertionError):
        return None
    return TimmAlone("\n".join([imports, "", *lines]), call, arguments, model)


def _change(plain: nn.Module, encoder: nn.Module, place: str) -> list[str]:
    """Return the line that makes timm's first convolution, or pool, the encoder's, where they differ."""
    try:
        have, wanted = plain.get_submodule(place), encoder.get_submodule(place)
    except AttributeError:
        return []
    if repr(have) == repr(wanted):
        return []
    new = "nn.Identity()"
    if isinstance(wanted, nn.Conv2d):
        kernel, stride, padding = (value[0] for value in (wanted.kernel_size, wanted.stride, wanted.padding))
        new = f"nn.Conv2d(3, {wanted.out_channels}, {kernel}, {stride}, {padding}, bias={wanted.bias is not None})"
    path = re.sub(r"\.(\d+)", r"[\1]", place)
    return [f"model.{path} = {new}"]


def _run(*lines: str) -> nn.Module:
    """Run lines made here, of this project's words and quoted names alone, and return their ``model``."""
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model
