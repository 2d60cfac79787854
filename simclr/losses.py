"""Contrastive objectives over the projections of every device.

Shape letters used in this file:
    b   source images on this device        n   source images on all devices, n = world_size * b
    d   projection width

What "equal to one device" means here: with z1 and z2 split over W ranks, the mean of the ranks' losses is the loss
of one device on the whole batch, and the mean of the ranks' parameter gradients, which is what DDP computes, is
that device's gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.distributed import gather_with_grad, rank


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float = 0.5) -> Tensor:
    """NT-Xent loss of this device's pairs against the projections of all devices.

    Row i of ``z1`` and row i of ``z2`` come from the same source image. Each of this device's 2b projections is
    scored against all 2n: one positive (its other view), one excluded entry (itself), 2n - 2 negatives.

    Args:
        z1: Projections of the first view, shape (b, d), floating point. Need not be normalised.
        z2: Projections of the second view, same shape, dtype and device as ``z1``.
        temperature: Softmax temperature tau, > 0, unitless. Cosine similarities are divided by it.

    Returns:
        Scalar, in nats: the mean over this device's 2b projections. float32, or float64 for float64 input.
        It is log(2n - 1) when all projections are equal.

    Raises:
        ValueError: If the shapes differ or are not (b, d), the dtypes differ or are not floating point, b or d is 0,
            the whole batch is a single pair (no negatives), ``temperature`` is not a positive finite number, or
            ranks hold different b.

    Note:
        Collective call: every rank must make it. Computed in float32 at least, also inside autocast, because
        1/tau multiplies the rounding errors of the similarities: bfloat16 would leave errors near 0.4 at
        tau = 0.01. (So would ``torch.set_float32_matmul_precision`` below its default, and for the gradient a
        backward pass inside autocast.) A projection of zeros has similarity 0 to all others and gets no gradient.

    Source:
        Chen et al. 2020, arXiv:2002.05709, equation 1 and algorithm 1, which average over 2n. (The authors'
        TensorFlow code adds the two halves instead, which is twice this.)
    """
    _check_pair(z1, z2)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive finite number, got {temperature}; the paper uses 0.1 to 1")
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (_unit_rows(_at_least_float32(z)) for z in (z1, z2))
        all_z1, all_z2 = _gather_pair(z1, z2)
        b, n = len(z1), len(all_z1)
        if n < 2:
            raise ValueError("nt_xent needs at least 2 source images in the whole batch, got 1: there are no negatives")
        similarity = torch.cat([z1, z2]) @ torch.cat([all_z1, all_z2]).T  # (2b, 2n)
        own = rank() * b + torch.arange(b, device=z1.device)  # where this device's images lie in 0..n-1
        itself, positive = torch.cat([own, own + n]), torch.cat([own + n, own])
        logits = (similarity / temperature).scatter(1, itself[:, None], float("-inf"))
        return F.cross_entropy(logits, positive)


def barlow_twins(z1: Tensor, z2: Tensor, *, off_diagonal_weight: float = 5e-3, centre: bool = True) -> Tensor:
    """Barlow Twins loss of the cross-correlation over the projections of all devices.

    C is the (d, d) cross-correlation of the two views over the n images of the global batch; the loss is
    sum_i (1 - C_ii)^2 + off_diagonal_weight * sum_{i != j} C_ij^2.

    Args:
        z1: Projections of the first view, shape (b, d), floating point.
        z2: Projections of the second view, same shape, dtype and device as ``z1``.
        off_diagonal_weight: Weight lambda of the redundancy-reduction term, >= 0, unitless. The paper's 5e-3 was
            tuned for d = 8192; narrow projectors want more, about 1/d.
        centre: Subtract each feature's mean over the global batch first, as the paper says ("mean-centered along
            the batch dimension") and as its code does by batch normalisation. ``False`` leaves it out and so gives
            equation 1 as printed, where the features are divided by their l2 norm over the batch only.

    Returns:
        Scalar, between 0 and d + off_diagonal_weight * d * (d - 1) for centred features: 0 when C is the identity.
        float32, or float64 for float64 input. The same value on every rank.

    Raises:
        ValueError: If the shapes differ or are not (b, d), the dtypes differ or are not floating point, b or d is 0,
            the whole batch is a single image (nothing to correlate), ``off_diagonal_weight`` is negative or not
            finite, or ranks hold different b.

    Note:
        Collective call: every rank must make it. Mean and norm are those of the global batch, so the loss does
        not depend on how the batch is spread over devices. Computed in float32 at least, also inside autocast.
        A feature that is constant over the batch has no correlation: its row and column of C are 0 and it gets no
        gradient. (The authors' batch normalisation adds 1e-5 to the variance instead.)

    Source:
        Zbontar et al. 2021, arXiv:2103.03230, equations 1 and 2. The authors' distributed code sums C outside
        autograd, which divides the gradient by the world size; here the gradient is whole.
    """
    _check_pair(z1, z2)
    if not 0 <= off_diagonal_weight < float("inf"):
        raise ValueError(f"off_diagonal_weight must be finite and >= 0, got {off_diagonal_weight}")
    with torch.autocast(z1.device.type, enabled=False):
        all_z1, all_z2 = _gather_pair(_at_least_float32(z1), _at_least_float32(z2))
        if len(all_z1) < 2:
            raise ValueError("barlow_twins needs at least 2 source images in the whole batch, got 1")
        correlation = _unit_columns(all_z1, centre).T @ _unit_columns(all_z2, centre)  # (d, d)
        diagonal = correlation.diagonal()
        invariance = (1 - diagonal).square().sum()
        redundancy = (correlation - torch.diag(diagonal)).square().sum()
        return invariance + off_diagonal_weight * redundancy


def _gather_pair(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the projections (n, d) of all devices, from one collective call for both views."""
    all_z1, all_z2 = gather_with_grad(torch.stack([z1, z2], dim=1)).unbind(dim=1)
    return all_z1, all_z2


def _unit_rows(z: Tensor) -> Tensor:
    """Scale each row of (b, d) projections to unit l2 norm; rows of zeros, which have no direction, stay."""
    norm: Tensor = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z / norm.masked_fill(norm == 0, torch.inf)  # by infinity: 0, and no gradient


def _unit_columns(z: Tensor, centre: bool) -> Tensor:
    """Scale each feature of (n, d) projections to unit l2 norm over the batch; constant features become 0."""
    norm_before = torch.linalg.vector_norm(z.detach(), dim=0)
    if centre:
        z = z - z.mean(dim=0)
    norm: Tensor = torch.linalg.vector_norm(z, dim=0)
    # What centring leaves of a constant feature is rounding error. Dividing by its norm would amplify it to 1.
    is_constant = norm.detach() <= 8 * torch.finfo(z.dtype).eps * norm_before
    return z / norm.masked_fill(is_constant, torch.inf)  # by infinity: 0, and no gradient


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _check_pair(z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape or z1.numel() == 0:
        raise ValueError(
            f"z1 and z2 must both have shape (b, d) with b, d >= 1, got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    if z1.dtype != z2.dtype or not z1.dtype.is_floating_point:
        raise ValueError(f"z1 and z2 must have the same floating-point dtype, got {z1.dtype} and {z2.dtype}")
