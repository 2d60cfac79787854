"""Batch normalisation over the batch of every device, on any device and backend.

``torch.nn.SyncBatchNorm`` does this on GPUs and refuses CPU tensors. ``GlobalBatchNorm`` is the same function written
with two sums over ranks per pass, so that a run on several CPU processes is the run on one, which is also how the
tests can hold that property on a machine without GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr.distributed import at_least_float32, sum_over_ranks


class _Normalise(torch.autograd.Function):
    """Normalise x (b, c, ...) per channel by the mean and biased variance over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over, shape = all_but_channels(x), along_channels(x)
        wide = at_least_float32(x)
        local = torch.cat([wide.sum(over), wide.new_tensor([x.numel() / x.shape[1]])])
        total = sum_over_ranks(local)
        count, mean = total[-1], total[:-1] / total[-1]
        centred = wide - mean.view(shape)
        # The squares of centred values, in a second sum: the mean of squares minus the squared mean cancels badly.
        variance = sum_over_ranks(centred.square().sum(over)) / count
        inverse_std = (variance + eps).rsqrt()
        normalised = (centred * inverse_std.view(shape)).to(x.dtype)
        ctx.save_for_backward(normalised, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        normalised, inverse_std, count = ctx.saved_tensors
        gradient, y = at_least_float32(gradients[0]), at_least_float32(normalised)
        over, shape = all_but_channels(y), along_channels(y)
        means = sum_over_ranks(torch.stack([gradient.sum(over), (gradient * y).sum(over)])) / count
        through_statistics = means[0].view(shape) + y * means[1].view(shape)
        before = (gradient - through_statistics) * inverse_std.view(shape)
        return before.to(gradients[0].dtype), None


class GlobalBatchNorm(nn.modules.batchnorm._NormBase):
    """``nn.BatchNorm1d/2d/3d`` with the statistics of the batch over all ranks.

    Same parameters, buffers, state dict and (biased for normalising, unbiased for the running estimate) variance as
    torch's. In eval mode, and in a world of one, it computes what torch's does.

    Args:
        x: Tensor of shape (b, c) or (b, c, ...). Each rank may hold a different b.

    Note:
        In training mode a collective call, forward and backward.

    Source:
        Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1, with the mini-batch of all devices.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        # Applied to the result; timm's BatchNormAct2d has other modules here.
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (b, c, ...) per channel; same shape and dtype out."""
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"expected an input of shape (b, {self.num_features}, ...), got {tuple(x.shape)}")
        y: Tensor = self.act(self.drop(self._normalise(x)))
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        normalised: Tensor
        normalised, mean, variance, count = _Normalise.apply(x, self.eps)
        if self.training:
            self._update_running_statistics(mean, variance, count)
        if not self.affine:
            return normalised
        shape = along_channels(x)
        return (normalised * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Take in the mean and the biased variance (c,) of a batch of ``count`` values per channel."""
        if self.running_mean is None:
            return
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        if count < 2:
            raise ValueError("batch normalisation needs more than 1 value per channel over all ranks to train, got 1")
        self.num_batches_tracked.add_(1)
        # momentum None is torch's way to ask for the cumulative average
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


def replace_batch_norm(module: nn.Module) -> nn.Module:
    """Return ``module`` with every batch normalisation replaced by :class:`GlobalBatchNorm`, in place.

    The parameters and buffers stay the same objects, and state dict keys and training mode stay as they are. So does
    what timm's ``BatchNormAct2d`` applies after normalising (its ``drop`` and ``act``).

    Raises:
        ValueError: As :func:`require_known_batch_norm`.
    """
    require_known_batch_norm(module)
    return _replace(module)


def require_known_batch_norm(module: nn.Module) -> None:
    """Raise a ValueError if a layer keeps batch statistics in another way than torch's and timm's usual ones do."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            children = {child for child, _ in layer.named_children()}
            known = type(layer) in _PLAIN or children == {"drop", "act"}
        else:
            known = isinstance(layer, GlobalBatchNorm) or getattr(layer, "running_var", None) is None
        if not known:
            raise ValueError(
                f"layer {name or '(the model itself)'} is a {type(layer).__name__}, whose batch statistics cannot be "
                "taken over all devices; choose another encoder, or leave global batch normalisation out"
            )


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _replace(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _replace(child))
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module
    replacement = GlobalBatchNorm(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )
    for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        setattr(replacement, name, value)
    for name, child in module.named_children():  # drop and act
        setattr(replacement, name, child)
    replacement.training = module.training
    return replacement


def all_but_channels(x: Tensor) -> list[int]:
    """Return the dimensions of (b, c, ...) but the second."""
    return [0, *range(2, x.ndim)]


def along_channels(x: Tensor) -> list[int]:
    """Return the shape in which (c,) values stand beside (b, c, ...) ones."""
    return [1, -1, *[1] * (x.ndim - 2)]
