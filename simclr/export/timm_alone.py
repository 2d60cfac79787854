"""The lines of Python that build an encoder with timm and torch alone, for programs that do not have this project.

They are found by comparing the encoder with timm's own network part by part, and they are proven by running them: lines
that do not give the encoder's own outputs are never handed out.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from simclr.small_resnet import SmallResNet


@dataclass(frozen=True)
class TimmAlone:
    """How timm builds an encoder."""

    lines: str
    """Python that leaves the network, not yet its weights, in ``model``."""
    call: str | None
    """``"NAME", num_classes=0, ...``, arguments of timm.create_model; None if that alone does not do."""
    config: dict[str, Any]
    """What timm reads from a config.json (hf-hub:, local-dir:); empty if ``call`` is None."""


def timm_alone(encoder: nn.Module, name: str, image: Tensor) -> TimmAlone | None:
    """Find the lines that build ``encoder``.

    Args:
        encoder: In eval mode.
        name: What it was built by: timm's name, or this project's.
        image: Normalised images (b, 3, S, S), on which both must give the same numbers.

    Returns:
        The lines, which were run; None if timm does not know the network, or parts of it are of other kinds than
        torch's own.
    """
    arguments = _arguments(encoder, image.shape[-1])
    for base in dict.fromkeys((name, re.sub(r"_d\d+$", "", name))):
        if timm.is_model(base) and not timm.models.model_entrypoint(base).__module__.startswith("timm."):
            continue  # somebody has registered it in this process
        call, imports, start = _beginning(base, arguments)
        try:
            plain = _run(f"{imports}\n{start}")
            changes = list(_changes(plain, encoder, "model"))
            needs_nn = ["from torch import nn"] if changes else []
            lines = "\n".join([imports, *needs_nn, "", start, *changes])
            if not _is_same(_run(lines), encoder, image):
                continue
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):  # no network of timm's
            continue
        if changes or call is None:
            return TimmAlone(lines, None, {})
        return TimmAlone(lines, call, _config(plain, arguments, encoder, image))
    return None


def _arguments(encoder: nn.Module, side: int) -> dict[str, int]:
    """Return what timm must be told of a transformer, which is made for one size of images."""
    patch_size = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
    return {"img_size": side, "patch_size": patch_size[0]} if isinstance(patch_size, tuple) else {}


def _beginning(name: str, arguments: dict[str, int]) -> tuple[str | None, str, str]:
    """Return the arguments of timm.create_model if it can be asked for the network, the imports, and a first line."""
    if small := re.fullmatch(r"small_resnet_w(\d+)", name):
        width = int(small[1])
        imports = "from timm.models.resnet import BasicBlock, ResNet"
        channels = (width, 2 * width, 4 * width)
        return None, imports, f"model = ResNet(BasicBlock, layers=(1, 1, 1), channels={channels}, num_classes=0)"
    call = ", ".join([json.dumps(name), "num_classes=0", *(f"{key}={value}" for key, value in arguments.items())])
    return call, "import timm", f"model = timm.create_model({call})"


def _changes(have: nn.Module, wanted: nn.Module, path: str) -> Iterator[str]:
    """Yield the lines that make ``wanted`` of ``have``, which stands at ``path``."""
    if repr(have) == repr(wanted):
        return
    if isinstance(wanted, SmallResNet):  # timm's, written out: these parts may be other ones
        for name in ("conv1", "maxpool"):
            yield from _changes(have.get_submodule(name), wanted.get_submodule(name), f"{path}.{name}")
        yield f"{path}.layer4 = {_as_code(wanted.layer4)}"  # timm's has none
        return
    parts, wanted_parts = dict(have.named_children()), dict(wanted.named_children())
    if type(have) is not type(wanted) or not wanted_parts or parts.keys() - wanted_parts.keys():
        yield f"{path} = {_as_code(wanted)}"
        return
    for name, part in wanted_parts.items():
        place = f"{path}[{name}]" if name.isdecimal() else f"{path}.{name}"
        if name in parts:
            yield from _changes(parts[name], part, place)
        elif isinstance(wanted, nn.Sequential):
            yield f"{path}.append({_as_code(part)})"
        else:
            yield f"{place} = {_as_code(part)}"


def _as_code(module: nn.Module) -> str:
    """Return the expression that makes a module of torch's own: how torch prints it, less what is its default.

    Raises:
        ValueError: If it is none of torch's own.
    """
    if type(module) is nn.Sequential:
        return f"nn.Sequential({', '.join(map(_as_code, module.children()))})"
    if not type(module).__module__.startswith("torch.nn.") or list(module.children()):
        raise ValueError(f"a {type(module).__name__} is not of torch.nn")
    call = ast.parse(repr(module), mode="eval").body
    if not isinstance(call, ast.Call):
        raise ValueError(f"{module!r} is no expression")
    usual = inspect.signature(type(module)).parameters
    # Arguments that a later torch has besides would be refused by an earlier one.
    call.keywords = [word for word in call.keywords if ast.literal_eval(word.value) != usual[str(word.arg)].default]
    return f"nn.{ast.unparse(call)}"


def _run(lines: str) -> nn.Module:
    """Run lines made here, of this project's words and quoted names alone, and return their ``model``."""
    names: dict[str, Any] = {}
    exec(lines, names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model


def _is_same(model: nn.Module, encoder: nn.Module, image: Tensor) -> bool:
    """Whether ``model`` takes the encoder's weights, all and no others, and then gives its outputs."""
    model.load_state_dict(encoder.state_dict(), strict=True)
    with torch.inference_mode():
        found, expected = model.eval()(image), encoder(image)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _config(plain: nn.Module, arguments: dict[str, int], encoder: nn.Module, image: Tensor) -> dict[str, Any]:
    """Return what timm reads from a config.json, but for the images' size and normalisation."""
    known: dict[str, Any] = dict(plain.pretrained_cfg)  # type: ignore[arg-type]  # an attribute that timm adds
    with torch.inference_mode():
        width = encoder(image[:1]).shape[1]
    return {
        "architecture": known["architecture"],
        "num_classes": 0,
        "num_features": width,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            **{name: known[name] for name in ("first_conv", "classifier") if known.get(name)},
            "num_classes": 0,
            "fixed_input_size": bool(arguments),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "custom_load": False,
        },
    }
