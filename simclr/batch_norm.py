"""Batch normalisation over the batch of every device: one message in the forward pass, one in the backward pass.

``torch.nn.SyncBatchNorm`` does this on GPUs, refuses CPU tensors, makes the host wait for the device in every layer and
breaks torch.compile's graph. ``GlobalBatchNorm`` is the same function without these, and takes both views of a batch in
one pass where each is normalised by itself.

Shape letters: g groups of the batch, each normalised by itself; b rows of a group on this rank; c channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr import distributed
from simclr.distributed import at_least_float32


class _Normalise(torch.autograd.Function):
    """Normalise each of g groups of x (g * b, c, ...) by the mean and biased variance over all ranks; scale, shift.

    With xhat = (x - mean) / std over n values of a channel, and y = weight * xhat + bias::

        d loss / d x = weight / std * (dy - (sum dy) / n - xhat * (sum dy * xhat) / n)

    The sums go over all ranks. This rank's share of them is its gradient of bias and weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = at_least_float32(x)
        beside = [groups, 1, -1, *[1] * (x.ndim - 2)]  # the shape of numbers that stand beside grouped values
        mean, variance, count = _over_ranks(_of_rank(wide, groups), beside)
        inverse_std = (variance + eps).rsqrt_()
        scale = inverse_std if weight is None else inverse_std * weight.view(beside[2:])
        shift = -mean * scale if bias is None else torch.addcmul(bias.view(beside[2:]), mean, scale, value=-1)
        # To autograd it is no view, so the layer behind may change it in place.
        y = torch.ops.aten._unsafe_view(torch.addcmul(shift, _grouped(wide, groups), scale), x.shape)
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        wide, gradient = at_least_float32(x), at_least_float32(dy)
        own = _products(gradient, wide, mean, inverse_std)  # (2, g, c): sums of dy * xhat, of dy
        mean_product, mean_gradient = (distributed.total(own) / count).view(2, *mean.shape).unbind()
        scale = inverse_std if weight is None else inverse_std * weight.view(mean.shape[2:])
        # d loss / d x = scale * dy - slope * x + shift
        slope = (scale * inverse_std).mul_(mean_product)
        shift = (slope * mean).addcmul_(scale, mean_gradient, value=-1)
        dx = torch.addcmul(shift, _grouped(gradient, len(mean)), scale)
        dx = dx.addcmul_(_grouped(wide, len(mean)), slope, value=-1).view(x.shape).to(dy.dtype)
        of_weight, of_bias = own.sum(1) if weight is not None else (None, None)
        return dx, of_weight, of_bias, None, None


def _of_rank(x: Tensor, groups: int) -> Tensor:
    """Return what this rank tells of x (g * b, c, ...): means and biased variances, (g, c) each, and their count."""
    count = x.numel() // (groups * x.shape[1])
    if count == 0:
        told = [x.new_zeros(2 * groups * x.shape[1])]
    elif torch.compiler.is_compiling():
        parts = _grouped(x, groups)
        variance, mean = torch.var_mean(parts, [1, *range(3, parts.ndim)], correction=0)
        told = [mean.view(-1), variance.view(-1)]
    else:
        # The kernel of torch's own batch normalisation: one pass, ten times as fast on CPUs as var_mean.
        statistics = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in _parts(x, groups)]
        told = [mean for mean, _ in statistics] + [variance for _, variance in statistics]
    return torch.cat([*told, told[0].new_full((1,), count)])


def _over_ranks(told: Tensor, shape: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance over all ranks, and the count of all, from :func:`_of_rank`, by one message.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance": what the ranks' means add to
    their variances. The mean of squares minus the squared mean would cancel badly.
    """
    every = distributed.gather(told).view(-1, len(told))  # a row for each rank
    counts = every[:, -1]
    total = counts.sum()
    share = (counts / total).view(-1, *[1] * len(shape))
    means, variances = every[:, :-1].view(len(every), 2, *shape).unbind(1)
    mean = (share * means).sum(0)
    return mean, (means - mean).square_().add_(variances).mul_(share).sum(0), total


def _products(dy: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """Return this rank's sums of dy * xhat and of dy, (2, g, c)."""
    groups = len(mean)
    if len(x) == 0:
        return mean.new_zeros(2, groups, mean.shape[2])
    each = zip(_parts(dy, groups), _parts(x, groups), mean.view(groups, -1), inverse_std.view(groups, -1), strict=True)
    found = [
        torch.ops.aten.native_batch_norm_backward(
            gradient, part, None, None, None, own_mean, own_std, True, 0.0, [False, True, True]
        )
        for gradient, part, own_mean, own_std in each
    ]
    sums = torch.cat([of_weight for _, of_weight, _ in found] + [of_bias for _, _, of_bias in found])
    return sums.view(2, groups, -1)


def _parts(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    return x.chunk(groups) if groups > 1 else (x,)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return (g * b, c, ...) as (g, b, c, ...)."""
    return x.view(groups, -1, *x.shape[1:])


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
        self.groups = 1
        """Equal parts of a batch in training, one after the other, each normalised by itself."""

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
        y: Tensor
        groups = self.groups if self.training else 1
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, groups, self.eps)
        if self.training:
            for group in range(groups):  # as if one after the other had passed
                self._update_running_statistics(mean[group].view(-1), variance[group].view(-1), count)
        return y

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Take in the mean and the biased variance (c,) of a batch of ``count`` values per channel."""
        if self.running_mean is None:
            return
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        if not count.is_cuda and not torch.compiler.is_compiling() and count < 2:  # a GPU would be waited for
            raise ValueError("batch normalisation needs more than 1 value per channel over all ranks to train, got 1")
        self.num_batches_tracked.add_(1)
        # momentum None is torch's way to ask for the cumulative average
        weight = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (count / (count - 1)), weight)


def replace_batch_norm(module: nn.Module, groups: int = 1) -> nn.Module:
    """Return ``module`` with every batch normalisation replaced by :class:`GlobalBatchNorm`, in place.

    The parameters and buffers stay the same objects, and state dict keys and training mode stay as they are. So does
    what timm's ``BatchNormAct2d`` applies after normalising (its ``drop`` and ``act``).

    Args:
        module: Any.
        groups: See :attr:`GlobalBatchNorm.groups`.

    Raises:
        ValueError: As :func:`require_known_batch_norm`.
    """
    require_known_batch_norm(module)
    return _replace(module, groups)


def groups_of(module: nn.Module) -> int:
    """Return the parts of a batch that the layers of ``module`` normalise each by itself; 1 where they know of none."""
    return max((layer.groups for layer in module.modules() if isinstance(layer, GlobalBatchNorm)), default=1)


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


def _replace(module: nn.Module, groups: int) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _replace(child, groups))
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module
    replacement = GlobalBatchNorm(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )
    for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        setattr(replacement, name, value)
    for name, child in module.named_children():  # drop and act
        setattr(replacement, name, child)
    replacement.training, replacement.groups = module.training, groups
    return replacement
