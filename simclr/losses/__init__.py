"""Contrastive objectives over the projections of every device.

Shape letters used in this file:
    b   source images on this device        n   source images on all devices, n = world_size * b
    d   projection width

What "equal to one device" means here: with z1 and z2 split over W ranks, the mean of the ranks' losses is the loss
of one device on the whole batch, and the mean of the ranks' parameter gradients, which is what DDP computes, is
that device's gradient. That holds for every form in which a loss can be computed; they differ in time and memory only.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsFloat, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr import distributed, parts
from simclr.distributed import at_least_float32
from simclr.schema import NotNegative, Positive
from simclr.unit_length import power_of_two, unit_rows

NTXentForm = Literal["auto", "matrix", "tiled"]
Kernels = Literal["torch", "triton"]
KernelChoice = Literal["auto", "torch", "triton"]

# On a GPU, one matrix of similarities of up to this many elements (64 MiB) costs fewer kernel launches than tiles do.
_MATRIX_UP_TO = 1 << 24


@dataclass(frozen=True)
class LossConfig:
    """The objective."""

    name: str = "nt_xent"
    """nt_xent (SimCLR), barlow_twins (Barlow Twins), or one that --parts registers."""

    temperature: Positive = 0.5
    """nt_xent's temperature tau, unitless."""

    off_diagonal_weight: NotNegative = 5e-3
    """barlow_twins' weight lambda of the off-diagonal terms, unitless."""

    scale: Positive = 1.0
    """The loss is multiplied by this. It matters to SGD, and to LARS for what it does not adapt."""

    bf16_matmul: bool = False
    """Whether nt_xent rounds the factors of its matrix products to bfloat16."""

    settings: tuple[tuple[str, float], ...] = ()
    """Keyword arguments of an objective of your own, such as margin 0.2."""

    def describe(self) -> str:
        """Return objective and settings in one line."""
        said = [f"{self.name}, of the run's own parts", *(f"{name} {value:g}" for name, value in self.settings)]
        if self.name == "nt_xent":
            said = [f"nt_xent, temperature {self.temperature:g}"]
        elif self.name == "barlow_twins":
            said = [f"barlow_twins, off-diagonal weight {self.off_diagonal_weight:g}, centred"]
        return ", ".join([*said, *([f"times {self.scale:g}"] if self.scale != 1 else [])])


class Choice(NamedTuple):
    """How a loss is computed, and why."""

    form: str
    kernels: Kernels
    reason: str


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    form: NTXentForm = "auto",
    kernels: KernelChoice = "auto",
    bf16_matmul: bool = False,
) -> Tensor:
    """NT-Xent loss of this device's pairs against the projections of all devices.

    Row i of ``z1`` and row i of ``z2`` come from the same source image. Each of this device's 2b projections is
    scored against all 2n: one positive (its other view), one excluded entry (itself), 2n - 2 negatives.

    Args:
        z1: Projections of the first view, shape (b, d), floating point. Need not be normalised.
        z2: Projections of the second view, same shape, dtype and device as ``z1``.
        temperature: Softmax temperature tau, > 0, unitless, a number. Cosine similarities are divided by it.
        form: "matrix" holds the (2b, 2n) similarities, and is the one that can be differentiated twice. "tiled"
            computes them tile by tile, and again in the backward pass: memory O(n d). "auto": :func:`choose_nt_xent`.
        kernels: What computes the tiles: "torch", or "triton", fused, for float32 on CUDA. "auto": Triton where it
            can.
        bf16_matmul: Whether the factors of matrix products are rounded to bfloat16 (their sums stay float32), which
            GPUs multiply many times faster. The similarities' error is then about 0.002, divided by tau. Not with
            form "matrix".

    Returns:
        Scalar, in nats: the mean over this device's 2b projections. float32, or float64 for float64 input.
        It is log(2n - 1) when all projections are equal.

    Raises:
        ValueError: If the shapes differ or are not (b, d), the dtypes differ or are not floating point, b or d is 0,
            the whole batch is a single pair (no negatives), ``temperature`` is not a positive finite number, ranks
            hold different b, or the form or the kernels cannot compute this.
        TypeError: If ``z1`` or ``z2`` is no tensor, or ``temperature`` no number.

    Note:
        Collective call: every rank must make it, and the backward pass. Computed in float32 at least, also inside
        autocast, because 1/tau multiplies the rounding errors of the similarities: bfloat16 would leave errors near
        0.4 at tau = 0.01. (So would ``torch.set_float32_matmul_precision`` below its default.) A projection of zeros
        has similarity 0 to all others and gets no gradient.

    Source:
        Chen et al. 2020, arXiv:2002.05709, equation 1 and algorithm 1, which average over 2n. (The authors'
        TensorFlow code adds the two halves instead, which is twice this.)
    """
    _check_pair(z1, z2)
    temperature = _number("temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive finite number, got {temperature}; the paper uses 0.1 to 1")
    _check_word("form", form, NTXentForm)
    _check_word("kernels", kernels, KernelChoice)
    distributed.require_equal_rows(z1)
    b, n = len(z1), len(z1) * distributed.world_size()
    if n < 2:
        raise ValueError("nt_xent needs at least 2 source images in the whole batch, got 1: there are no negatives")
    choice = choose_nt_xent(b, z1.device, z1.dtype, form=form, kernels=kernels, bf16_matmul=bf16_matmul)
    if choice.form == "matrix" and bf16_matmul:
        raise ValueError("bf16_matmul needs form tiled, got form matrix")
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([at_least_float32(z1), at_least_float32(z2)])
        if choice.form == "matrix":
            return _nt_xent_matrix(unit_rows(z), temperature)
        from simclr.losses.tiles import nt_xent_of_rows

        return nt_xent_of_rows(z, temperature, kernels=choice.kernels, bf16_matmul=bf16_matmul)


def choose_nt_xent(
    per_device_batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    form: NTXentForm = "auto",
    kernels: KernelChoice = "auto",
    bf16_matmul: bool = False,
) -> Choice:
    """Return how :func:`nt_xent` computes b pairs on each device, with the reason; ``form`` may be given."""
    if kernels == "auto":
        kernels = "triton" if device.type == "cuda" and dtype != torch.float64 and _has_triton() else "torch"
    if form != "auto":
        return Choice(form, kernels, "as configured")
    size = distributed.world_size()
    rows, columns = 2 * per_device_batch_size, 2 * per_device_batch_size * size
    if device.type == "cuda" and rows * columns <= _MATRIX_UP_TO and not bf16_matmul:
        return Choice("matrix", kernels, f"{rows} x {columns} similarities are few")
    where = "one device: half the matrix, which is symmetric" if size == 1 else "all projections on each device"
    return Choice("tiled", kernels, where)


def _nt_xent_matrix(x: Tensor, temperature: float) -> Tensor:
    pairs = torch.stack(x.chunk(2), dim=1)
    all_z1, all_z2 = distributed.gather_with_grad(pairs, known_equal=True).unbind(dim=1)
    b, n = len(pairs), len(all_z1)
    similarity = x @ torch.cat([all_z1, all_z2]).T  # (2b, 2n)
    own = distributed.rank() * b + torch.arange(b, device=x.device)  # where this device's images lie in 0..n-1
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
            finite, or a tensor that requires a gradient, or ranks hold different b.
        TypeError: If ``z1`` or ``z2`` is no tensor, or ``off_diagonal_weight`` no number.

    Note:
        Collective call: every rank must make it, and the backward pass. Differentiable once. Mean and norm are those of
        the global batch, so the loss does not depend on how the batch is spread over devices. Computed in float32 at
        least, also inside autocast. A feature that is constant over the batch, to the last digit, has no correlation:
        its row and column of C are 0 and it gets no gradient. (The authors' batch normalisation adds 1e-5 to the
        variance instead.) So it is with zeros if ``centre`` is False. Every other feature counts, however small its
        deviation. Its gradient grows as 1 / the deviation, to infinity where the dtype does not hold it. Where a
        projection is not finite, the loss is NaN.

    Source:
        Zbontar et al. 2021, arXiv:2103.03230, equations 1 and 2. The authors' distributed code sums C outside
        autograd, which divides the gradient by the world size; here the gradient is whole.
    """
    _check_pair(z1, z2)
    off_diagonal_weight = _number("off_diagonal_weight", off_diagonal_weight)
    if not 0 <= off_diagonal_weight < float("inf"):
        raise ValueError(f"off_diagonal_weight must be finite and >= 0, got {off_diagonal_weight}")
    distributed.require_equal_rows(z1)
    n = len(z1) * distributed.world_size()
    if n < 2:
        raise ValueError("barlow_twins needs at least 2 source images in the whole batch, got 1")
    with torch.autocast(z1.device.type, enabled=False):
        loss: Tensor = _BarlowTwins.apply(at_least_float32(z1), at_least_float32(z2), n, off_diagonal_weight, centre)
    return distributed.shared_gradient(loss)


def own_objective(name: str, z1: Tensor, z2: Tensor, settings: Mapping[str, float]) -> Tensor:
    """Return the value of an objective that somebody has registered (:mod:`simclr.parts`).

    It is a function of the projections of the whole batch, which every rank gathers and computes it from. So any
    function is equal to one device, whatever it does, and need not know of ranks. What that costs is that each rank
    computes the whole loss; ``nt_xent`` shows how a rank can do its share.

    Args:
        name: Of the objective.
        z1: Projections of the first view, shape (b, d), floating point.
        z2: Projections of the second view, same shape, dtype and device as ``z1``.
        settings: Its keyword arguments.

    Returns:
        What the function makes of ``z1`` and ``z2`` of all ranks, (n, d) each, in the order of the batch, in float32 at
        least and outside autocast: a scalar, the same on every rank.

    Raises:
        ValueError: If ``z1`` and ``z2`` do not fit, or the function returns no scalar with a gradient.
        TypeError: If ``z1`` or ``z2`` is no tensor.

    Note:
        Collective call: every rank must make it, and the backward pass.
    """
    _check_pair(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        pairs = torch.stack([at_least_float32(z1), at_least_float32(z2)], dim=1)
        loss = parts.OBJECTIVES[name](*distributed.gather_with_grad(pairs).unbind(dim=1), **settings)
    if not isinstance(loss, Tensor) or loss.ndim != 0 or (z1.requires_grad and not loss.requires_grad):
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"the objective {name} must return a scalar tensor that has a gradient, and returned {what}")
    return loss


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward pass of a Function that has no second derivative, so that asking for it is an error.

    torch's ``once_differentiable`` gives zeros where the gradient that comes in is a constant, as a scalar loss's is.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "barlow_twins and nt_xent in tiles can be differentiated once, and create_graph=True asks for more; "
                'use nt_xent(..., form="matrix"), or leave create_graph out'
            )
        return backward(ctx, *gradients)

    return checked


class _BarlowTwins(torch.autograd.Function):
    """The loss from projections (b, d) of every rank, the same on every rank, and the gradient of this rank's.

    With features y, centred, that have the norms 1 / s over the batch::

        C = s1 (y1^T y2) s2      loss = sum over i of (1 - C_ii)^2  +  weight * sum over i != j of C_ij^2
        G = d loss / d C         d loss / d y1 = y2 (s1 G s2)^T - y1 s1^2 (sum over j of G_ij C_ij)

    The mean needs no gradient of its own: the columns of y2 sum to 0, so this one's do. What autograd makes of the same
    equations passes over the projections two and a half times as often; on CPUs, that takes as long as the products.
    """

    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, n: int, weight: float, centre: bool) -> Tensor:
        (y1, y2), scale, is_constant = _centred((z1, z2), n, centre)
        squares = [torch.stack([block.square().sum(dim=0) for block in _blocks(y)]).sum(dim=0) for y in (y1, y2)]
        products = distributed.sum_over_ranks(torch.cat([y1.T @ y2, torch.stack(squares)]))
        inverse = products[-2:].masked_fill(is_constant, torch.inf).rsqrt()  # of infinity: 0, and no gradient
        correlation = products[:-2].mul_(inverse[0, :, None]).mul_(inverse[1])
        diagonal = correlation.diagonal().clone()
        correlation.diagonal().zero_()
        off_squares = correlation.square()
        rows, columns = off_squares.sum(dim=1), off_squares.sum(dim=0)
        ctx.save_for_backward(y1, y2, scale, inverse, correlation, diagonal, rows, columns)
        ctx.weight = weight
        return (1 - diagonal).square().sum() + weight * rows.sum()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2, scale, inverse, off_diagonal, diagonal, rows, columns = ctx.saved_tensors
        weight, of_diagonal = 2 * ctx.weight * gradient, -2 * gradient * (1 - diagonal)
        g = off_diagonal * (weight * inverse[0, :, None])
        g.diagonal().copy_(of_diagonal * inverse[0])
        g *= inverse[1]
        found: list[Tensor | None] = [None, None]
        for i, (own, other, matrix, squares) in enumerate([(y1, y2, g.T, rows), (y2, y1, g, columns)]):
            if not ctx.needs_input_grad[i]:
                continue
            along = -(weight * squares + of_diagonal * diagonal) * inverse[i].square()
            result = found[i] = torch.empty_like(own)
            for y, others, block in zip(_blocks(own, 512), _blocks(other, 512), _blocks(result, 512), strict=True):
                torch.mul(y, along, out=block).addmm_(others, matrix).mul_(scale[i])
        return (*found, None, None, None)


def _centred(z: tuple[Tensor, Tensor], n: int, centre: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return both views' features less their mean over all ranks, times powers of two; these; which are constant.

    C changes neither if a constant is subtracted from a (centred) feature nor if a feature is multiplied by one, so
    both are chosen to lose no digit. Shapes (b, d) for each view, (2, d), (2, d).
    """
    # First each feature's least value goes, which is exact however far from 0 the mean lies.
    ends = distributed.max_over_ranks(torch.stack([end for view in z for end in (view.amax(dim=0), -view.amin(dim=0))]))
    high, low = ends[::2], -ends[1::2]
    start = low if centre else torch.zeros_like(low)
    spread = torch.maximum(high - start, start - low)
    is_constant = spread == 0
    scale = power_of_two(spread.masked_fill(is_constant, 1))
    y, sums = [torch.empty_like(view, memory_format=torch.contiguous_format) for view in z], []
    for i, view in enumerate(z):
        total = torch.zeros_like(scale[i], dtype=torch.float64)
        for block, out in zip(_blocks(view), _blocks(y[i]), strict=True):
            torch.addcmul(-start[i] * scale[i], block, scale[i], out=out)
            if centre:
                total += _row_sum(out)
        sums.append(total)
    if centre:
        mean = distributed.sum_over_ranks(torch.stack(sums)).div_(n).to(y[0].dtype)
        for i, view in enumerate(y):
            for block in _blocks(view):
                block -= mean[i]
    return y, scale, is_constant


def _blocks(x: Tensor, least: int = 64) -> Sequence[Tensor]:
    """Return (b, d) in blocks of rows, of a MiB in float32: what is done with one on a CPU finds it in its cache."""
    return (x,) if x.is_cuda else torch.split(x, max(least, (1 << 18) // x.shape[1]))


def _row_sum(values: Tensor) -> Tensor:
    """Sum the rows of (b, d) in float64; in the values' own dtype over 64 at a time, which is many times as fast."""
    blocks, left = divmod(len(values), 64)
    whole = len(values) - left
    sums = values[:whole].reshape(blocks, 64, values.shape[1]).sum(dim=1)
    total: Tensor = sums.sum(dim=0, dtype=torch.float64) + values[whole:].sum(dim=0, dtype=torch.float64)
    return total


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_word(name: str, word: str, known: object) -> None:
    if word not in get_args(known):
        raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {word!r}")


def _number(name: str, value: object) -> float:
    """Return a setting as a number; not a tensor that waits for a gradient, which would silently get none."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} is a tensor that requires a gradient, but is a setting and gets none: pass float({name}.detach())"
        )
    if not isinstance(value, SupportsFloat) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _check_pair(z1: Any, z2: Any) -> None:
    if not (isinstance(z1, Tensor) and isinstance(z2, Tensor)):
        kinds = " and ".join(type(z).__name__ for z in (z1, z2))
        raise TypeError(f"z1 and z2 must be torch tensors of shape (b, d), got {kinds}; torch.as_tensor makes one")
    if not z1.layout == z2.layout == torch.strided:
        raise ValueError(f"z1 and z2 must be dense, got {z1.layout} and {z2.layout}; z.to_dense() makes them so")
    if z1.ndim != 2 or z1.shape != z2.shape or z1.numel() == 0:
        raise ValueError(
            f"z1 and z2 must both have shape (b, d) with b, d >= 1, got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    if z1.dtype != z2.dtype or not z1.dtype.is_floating_point:
        raise ValueError(f"z1 and z2 must have the same floating-point dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"z1 and z2 must be on the same device, got {z1.device} and {z2.device}")
