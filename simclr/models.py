"""Encoder and projector. The method's only user of timm, imported where it is needed: see :mod:`simclr.small_resnet`.

Shape letters: b images, H x W pixels, D representation width, d projection width.
"""

from __future__ import annotations

import difflib
import math
import random
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simclr import parts
from simclr.batch_norm import replace_batch_norm, require_known_batch_norm
from simclr.schema import Size, check_fields
from simclr.small_resnet import SmallResNet, initialise, widening

Stem = Literal["auto", "cifar", "patch2", "original"]

# Up to this side an ImageNet stem, which divides it by 4, throws most of the image away.
SMALL_IMAGE = 64

_SMALL_RESNET = re.compile(r"small_resnet_w([1-9]\d*)(?:_d([1-9]\d*))?")

# Names of timm's that presets have: they are known without importing it.
_SURE = re.compile(r"resnet(18|34|50|101|152)(_d[1-9]\d*)?")

# Conv2dSame, which is timm's, pads as TensorFlow does.
_PLAIN_CONVOLUTIONS = {"Conv2d", "Conv2dSame"}

# Input channels that a 1x1 convolution with a stride must have: see _require_right_gradients.
_FEWEST_CHANNELS = 8


@dataclass(frozen=True)
class ModelConfig:
    """What to build."""

    encoder: str = "resnet18"
    """Any timm model name, also one that --parts registers. Or small_resnet_wN (N: width of the first stage, 8 or
    more): one basic block per stage at widths N, 2N, 4N, for CPUs. _dD behind a timm ResNet or a small one: a 1x1
    convolution at the end that widens the representation to D, such as resnet18_d2048."""

    stem: Stem = "auto"
    """First layers. cifar: 3x3 convolution, stride 1, no max-pool (SimCLR appendix B.9). patch2: 2x2 convolution,
    stride 2, no max-pool (a quarter of the compute). original: timm's own. auto: cifar for images of at most 64
    pixels, patch2 for small_resnet, else original; an encoder of your own stays as it is."""

    projector: str = "simclr2"
    """simclr2: linear-ReLU-linear (SimCLR). simclr3: three layers with batch normalisation after each (SimCLR v2).
    barlow3: three layers, batch normalisation and ReLU between them (Barlow Twins). none: the identity. Or one that
    --parts registers."""

    projector_hidden: Size = 512
    """Width of the projector's hidden layers."""

    projection_dim: Size = 128
    """Width d of the projection."""

    projector_batch_norm: bool = True
    """Whether simclr2 normalises its hidden layer. The three-layer kinds always do."""

    def __post_init__(self) -> None:
        """Refuse what builds nothing."""
        check_fields(self, "model")


class SimCLR(nn.Module):
    """Encoder f and projector g: x -> (h, z) with h = f(x), z = g(h).

    Args:
        config: What to build.
        image_size: Side H = W of the images, in pixels; chooses the stem, and a transformer's position embedding.

    Raises:
        ValueError: If timm does not know the encoder, the stem cannot be made for it, or a layer draws random numbers.

    Source:
        Chen et al. 2020, arXiv:2002.05709, section 2.1; the projector is used in pretraining only.
    """

    def __init__(self, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        self.encoder = make_encoder(config.encoder, config.stem, image_size)
        self.representation_dim = representation_width(self.encoder, image_size)
        self.projector = make_projector(config, self.representation_dim)
        if config.projector in parts.PROJECTORS:
            blank = torch.zeros(2, self.representation_dim)
            _output(self.projector, blank, f"the projector {config.projector}", str(tuple(blank.shape)))
        _require_nothing_random(self, torch.zeros(2, 3, image_size, image_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode and project.

        Args:
            x: Normalised images, shape (b, 3, H, W).

        Returns:
            Representation h, shape (b, D), and projection z, shape (b, d).
        """
        h = self.encoder(x)
        return h, self.projector(h)

    def require_size(self, image_size: int) -> None:
        """Raise ValueError unless the encoder also takes images of side ``image_size``, with the same D."""
        width = representation_width(self.encoder, image_size)
        if width != self.representation_dim:
            raise ValueError(
                f"the encoder turns images of side {image_size} into {width} numbers, and others into "
                f"{self.representation_dim}"
            )


def representation_width(encoder: nn.Module, side: int) -> int:
    """Return D for images of side ``side``. Raises ValueError if the encoder cannot take them, or never reads an edge.

    A pixel that is NaN makes the representation NaN, whatever the weights, if it is read at all.
    """
    what = f"{side}x{side} images with this stem"
    for read in range(side, 0, -1):
        x = torch.zeros(2, 3, side, side, device=next(encoder.parameters()).device)
        x[0, :, read - 1] = x[1, :, :, read - 1] = math.nan
        h = _output(encoder, x, "the encoder", what)
        if h.isnan().any(dim=1).all():
            break
    if read < side:
        raise ValueError(
            f"the encoder reads {read} of the {side} rows and columns of {what} and never the others; use images of "
            f"side {read}, or another stem or encoder"
        )
    return h.shape[1]


def make_encoder(name: str, stem: Stem, image_size: int) -> nn.Module:
    """Return a randomly initialised encoder (b, 3, H, W) -> (b, D). Errors as :class:`SimCLR`."""
    require_known_encoder(name)
    if small := _SMALL_RESNET.fullmatch(name):
        encoder: nn.Module = SmallResNet(int(small[1]), int(small[2]) if small[2] else None)
        _fit_first_layers(encoder, "conv1", "patch2" if stem == "auto" else stem, name)
        _require_right_gradients(encoder, name)
        return encoder
    if widened := re.fullmatch(r"(resnet\d+)_d([1-9]\d*)", name):
        encoder = make_encoder(widened[1], stem, image_size)
        stage = encoder.get_submodule("layer4")
        assert isinstance(stage, nn.Sequential)
        assert isinstance(encoder.num_features, int)
        stage.append(widening(encoder.num_features, int(widened[2])))
        return encoder
    import timm

    try:
        facts = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(
            f"timm has no model named {name!r}: {error} (the weights are random, so no tag is needed)"
        ) from error
    if stem == "auto":
        # Of an encoder that somebody has registered timm knows nothing, so it stays as it is.
        stem = "cifar" if image_size <= SMALL_IMAGE and facts is not None else "original"
    first_conv = facts.first_conv if facts else None
    is_transformer = isinstance(first_conv, str) and first_conv.startswith("patch_embed")
    options: dict[str, Any] = {}
    if is_transformer:
        # A transformer has no strided stem to replace: small images get small patches, and the position
        # embedding is made for the image's size. They must divide it, or its edge would never be read.
        near = max(2, image_size // 8)
        dividing = [side for side in range(2, image_size // 2 + 1) if image_size % side == 0]
        patch = min(dividing, key=lambda side: abs(side - near), default=near)
        options = {"img_size": image_size} | ({"patch_size": patch} if stem != "original" else {})
    try:
        try:
            encoder = timm.create_model(name, num_classes=0, drop_rate=0.0, drop_path_rate=0.0, **options)
        except TypeError:  # not every model takes the rates
            encoder = timm.create_model(name, num_classes=0, **options)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"timm cannot build {name} with {options or 'its defaults'}: {error}") from error
    if stem != "original" and not is_transformer:
        if not isinstance(first_conv, str):
            raise ValueError(f"timm does not say which layer of {name} is the first convolution; use stem original")
        _fit_first_layers(encoder, first_conv, stem, name)
    _require_right_gradients(encoder, name)
    return encoder


def require_known_encoder(name: str) -> None:
    """Raise ValueError, with names that are near, if :func:`make_encoder` knows no such encoder."""
    name_of_timm = re.sub(r"^(resnet\d+)_d[1-9]\d*$", r"\1", name)
    if name.startswith("small_resnet_w"):
        if not _SMALL_RESNET.fullmatch(name):
            raise ValueError(
                f"model.encoder {name!r}: expected small_resnet_w and a width, such as small_resnet_w48, or with _d "
                "and the representation's width, such as small_resnet_w48_d768"
            )
        return
    if _SURE.fullmatch(name):
        return
    import timm

    if not timm.is_model(name_of_timm):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0)
        raise ValueError(
            f"timm has no model named {name!r}; near: {', '.join(near)}; or small_resnet_wN; or either with _dD; or "
            "one that --parts registers"
        )


def _require_nothing_random(model: nn.Module, x: Tensor) -> None:
    """Refuse a model that draws random numbers in training: resumed, or on more devices, it would be another run."""

    def states() -> tuple[list[int], object]:
        return torch.get_rng_state().tolist(), random.getstate()

    def compare(layer: nn.Module, *_: object) -> None:
        if states() != before:
            name = next(name for name, one in model.named_modules() if one is layer)
            raise ValueError(
                f"layer {name or '(the model itself)'}, a {type(layer).__name__}, draws random numbers in training, so "
                "that a resumed run, or one on more devices, would be another; build the model without dropout and "
                "stochastic depth (rates of 0), or choose another"
            )

    before = states()
    # The innermost layer is asked first. Statistics of this batch go into copies.
    hooks = [layer.register_forward_hook(compare) for layer in model.modules()]
    try:
        with torch.no_grad():
            torch.func.functional_call(model, {name: value.clone() for name, value in model.named_buffers()}, (x,))
    finally:
        for hook in hooks:
            hook.remove()


def _require_right_gradients(encoder: nn.Module, name: str) -> None:
    """Refuse a network whose gradients some CPUs compute wrongly, on every machine: a run must not depend on its CPU.

    On CPUs with AVX2 and no AVX-512, oneDNN's backward pass of a 1x1 convolution with a stride, in channels_last and
    with fewer than 8 input channels, writes beyond its buffers (uxlfoundation/oneDNN issue 6035): one thread damages
    the heap, two return gradients that are 17 to 50 % off.
    """
    for where, layer in encoder.named_modules():
        is_strided = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
        if is_strided and layer.in_channels < _FEWEST_CHANNELS:
            raise ValueError(
                f"model.encoder {name}: the 1x1 convolution {where} has stride {max(layer.stride)} and "
                f"{layer.in_channels} input channels. On CPUs without AVX-512 its gradient is wrong for fewer than "
                f"{_FEWEST_CHANNELS} (oneDNN issue 6035); use a wider network, such as small_resnet_w8"
            )


def make_projector(config: ModelConfig, representation_dim: int) -> nn.Module:
    """Return the projector (b, D) -> (b, d). Raises ValueError if none has this name."""
    parts.PROJECTORS.require(config.projector, "model.projector")
    if config.projector in parts.PROJECTORS:
        return parts.PROJECTORS[config.projector](representation_dim, config)
    hidden, out = config.projector_hidden, config.projection_dim
    if config.projector == "none":
        return nn.Identity()
    if config.projector == "simclr2":
        # The bias before a batch normalisation would be subtracted again, so it is left out.
        normalise = config.projector_batch_norm
        first = nn.Linear(representation_dim, hidden, bias=not normalise)
        middle = [nn.BatchNorm1d(hidden)] if normalise else []
        return nn.Sequential(first, *middle, nn.ReLU(), nn.Linear(hidden, out))
    layers: list[nn.Module] = []
    for width_in in (representation_dim, hidden):
        layers += [nn.Linear(width_in, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    layers.append(nn.Linear(hidden, out, bias=False))
    if config.projector == "simclr3":
        layers.append(nn.BatchNorm1d(out, affine=False))
    return nn.Sequential(*layers)


def use_global_batch_norm(
    model: nn.Module, device: torch.device, *, is_compiled: bool = False, groups: int = 1
) -> nn.Module:
    """Return ``model`` with every batch normalisation taking its statistics over all ranks.

    :class:`simclr.batch_norm.GlobalBatchNorm` on CPUs, and where the model is compiled: SyncBatchNorm runs on GPUs only
    and breaks torch.compile's graph. torch's fused SyncBatchNorm on GPUs else: it passes through memory less often than
    operations that are launched one by one. State dict keys stay the same, so checkpoints fit either way.

    Args:
        model: Any.
        device: Where it runs.
        is_compiled: Whether torch.compile makes its passes.
        groups: Parts of a batch that are normalised each by itself, as far as the layers can do that:
            :func:`simclr.batch_norm.groups_of` tells.

    Raises:
        ValueError: If a layer keeps batch statistics in a way of its own.
    """
    if device.type == "cuda" and not is_compiled:
        from timm.layers.norm_act import convert_sync_batchnorm

        require_known_batch_norm(model)
        converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    return replace_batch_norm(model, groups)


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _fit_first_layers(encoder: nn.Module, first_conv: str, stem: Stem, name: str) -> None:
    """Replace the first convolution by the stem's, and the max-pool behind it by nothing."""
    if stem == "original":
        return
    parent_name, _, attribute = first_conv.rpartition(".")
    parent = encoder.get_submodule(parent_name)
    old = encoder.get_submodule(first_conv)
    # Another subclass, such as one that standardises its weights, has its reasons.
    if not isinstance(old, nn.Conv2d) or type(old).__name__ not in _PLAIN_CONVOLUTIONS:
        raise ValueError(
            f"the first layer of {name}, {first_conv}, is a {type(old).__name__}, not a plain convolution; "
            "use stem original"
        )
    kernel, stride, padding = (3, 1, 1) if stem == "cifar" else (2, 2, 0)
    new = initialise(nn.Conv2d(3, old.out_channels, kernel, stride, padding, bias=old.bias is not None))
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    setattr(parent, attribute, new)
    for pool in ("maxpool", "features.pool0", "stem.pool"):
        pool_parent, _, pool_attribute = pool.rpartition(".")
        try:
            encoder.get_submodule(pool)
        except AttributeError:
            continue
        setattr(encoder.get_submodule(pool_parent), pool_attribute, nn.Identity())


def _output(module: nn.Module, x: Tensor, whose: str, what: str) -> Tensor:
    """Return a module's outputs in evaluation: (b, ...) -> (b, width) is checked, not assumed."""
    was_training = module.training
    try:
        with torch.no_grad():
            y: Tensor = module.eval()(x)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"{whose} cannot take {what}: {error}") from error
    module.train(was_training)
    if y.ndim != 2 or len(y) != len(x):
        raise ValueError(f"{whose} returns shape {tuple(y.shape)} for {what}, expected ({len(x)}, width)")
    return y
