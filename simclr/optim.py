"""Optimizers, their settings, and which parameters they decay."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import distributed
from simclr.schema import Must, NotNegative, Positive

Work = TypeVar("Work")
ClipNorm = Annotated[float, Must(lambda value: value > 0, "> 0, or None for no clipping")]
Momentum = Annotated[float, Must(lambda value: 0 <= value < 1, "in [0, 1)")]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule, a pure function of the step."""

    name: Literal["sgd", "lars", "adamw", "muon"] = "sgd"
    """sgd, lars (for large batches), adamw, or muon (for few epochs)."""

    base_learning_rate: Positive = 0.03
    """Per 256 source images: peak learning rate = base_learning_rate * global_batch_size / 256."""

    momentum: Momentum = 0.9
    """sgd, lars and muon: momentum. adamw: beta 1."""

    weight_decay: NotNegative = 5e-4
    """adamw and muon: decoupled, times the learning rate. sgd and lars: added to the gradient."""

    decay_biases_and_norms: bool = False
    """Whether weight decay (and LARS's adaptation) also holds for biases and normalisation parameters, that is for
    parameters of fewer than two dimensions."""

    warmup_epochs: NotNegative = 0.0
    """The learning rate rises linearly to its peak over this long, then falls to 0 by a cosine."""

    lars_trust_coefficient: Positive = 1e-3
    """LARS's eta."""

    lars_clip: bool = False
    """Whether LARS's factor is limited so that no layer's learning rate exceeds the schedule's (LARC)."""

    gradient_clip_norm: ClipNorm | None = None
    """Global l2 norm to which the gradient is clipped."""


class _Skippable(torch.optim.Optimizer):
    """An optimizer with momentum that can leave a step out on the device.

    Raises:
        ValueError: If an option lies outside its range.

    Attributes:
        _step_supports_amp_scaling: Tells torch's GradScaler that ``step`` heeds ``found_inf``.
    """

    _step_supports_amp_scaling = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            for name, holds, expected in (
                ("lr", group["lr"] >= 0, "at least 0"),
                ("momentum", 0 <= group["momentum"] < 1, "in [0, 1)"),
                ("weight_decay", group["weight_decay"] >= 0, "at least 0"),
                ("trust_coefficient", group.get("trust_coefficient", 1) > 0, "> 0"),
            ):
                if not holds:
                    raise ValueError(f"{type(self).__name__}: {name} is {group[name]}, expected {expected}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; ``closure``, if given, recomputes and returns the loss.

        Nothing changes if the attribute ``found_inf``, as torch's GradScaler sets it, is a tensor that is 1.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


class LARS(_Skippable):
    """SGD with momentum whose step is scaled per parameter tensor by the ratio of its norm to its gradient's.

    For a tensor w with gradient g, at learning rate lr::

        g' = g + weight_decay * w
        scale = trust_coefficient * |w| / |g'|          (clip: min(scale / lr, 1))
        buffer = momentum * buffer + scale * g'
        w = w - lr * buffer

    The scale is 1 where either norm is 0, so that parameters that start at zero do move, and where the group says
    ``adapt=False``.

    Args:
        params: Parameters or groups; a group may set ``adapt``, ``weight_decay`` and the other options.
        lr: Learning rate, >= 0.
        momentum: In [0, 1).
        weight_decay: Added to the gradient as ``weight_decay * w``; >= 0.
        trust_coefficient: eta, > 0.
        clip: Whether the layer's own learning rate ``trust_coefficient * |w| / |g'|`` replaces lr, which is its upper
            limit, instead of multiplying it: LARC's clipping, which solo-learn calls ``clip_lr``.
        adapt: Whether the scale is used at all.

    Raises:
        ValueError: If an option lies outside its range.

    Source:
        You et al. 2017, arXiv:1708.03888, with the decayed gradient's norm in the denominator as the Barlow Twins
        authors' code has it (the paper and solo-learn: |g| + weight_decay * |w|, which is at least as large).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        clip: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "clip": clip,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            self._update_one(parameter, parameter.grad, group)

    def _update_one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        update = gradient.add(parameter, alpha=group["weight_decay"])
        if group["adapt"]:
            # on the device: reading the norms would make the host wait for it at every tensor
            weight_norm, update_norm = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
            scale = group["trust_coefficient"] * weight_norm / update_norm
            if group["clip"]:
                scale = (scale / group["lr"]).clamp(max=1.0)  # lr 0 gives infinity, hence 1
            update *= torch.where((weight_norm > 0) & (update_norm > 0), scale, torch.ones_like(scale))
        buffer = self._momentum(parameter)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            buffer.mul_(group["momentum"]).add_(update)
            parameter.add_(buffer, alpha=-group["lr"])
        else:
            skip = found_inf > 0
            buffer.copy_(torch.where(skip, buffer, buffer * group["momentum"] + update))
            parameter.sub_(torch.where(skip, 0.0, group["lr"] * buffer))


class Muon(_Skippable):
    """Momentum whose step is orthogonalised: every direction in which a weight matrix could move, it moves alike.

    For a tensor w of two or more dimensions, seen as a matrix with ``w.shape[0]`` rows, with gradient g, at learning
    rate lr::

        buffer = momentum * buffer + g
        direction = orthogonalise(g + momentum * buffer)
        w = w - lr * (0.2 * sqrt(max(rows, columns)) * direction + weight_decay * w)

    The factor gives the entries of a step a root mean square of about 0.2, as AdamW's have, so that its learning rates
    hold here too. Of a tensor of one dimension, n entries long, the direction is the vector divided by its norm and the
    factor 0.2 * sqrt(n): what the same rule gives for a matrix of one row.

    With several ranks, whose gradients are equal, each orthogonalises its share of the matrices, and one all-gather
    brings all directions to all. Every rank holds the whole momentum, so that a checkpoint fits any number of ranks.

    Args:
        params: Parameters or groups; a group may set ``weight_decay`` and the other options.
        lr: Learning rate, >= 0.
        momentum: In [0, 1).
        weight_decay: >= 0; decoupled, as AdamW's.

    Raises:
        ValueError: If an option lies outside its range.

    Source:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the factor: Liu et al. 2025,
        arXiv:2502.16982, section 2.2. torch.optim.Muon takes matrices only, no convolutions.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        # Tensors of one shape together: a GPU takes as long for one small product as for several at once.
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        momentum, lr, decay = group["momentum"], group["lr"], group["lr"] * group["weight_decay"]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:  # a step left out is one without gradient, learning rate and loss of momentum
            skip = found_inf > 0
            momentum, lr, decay = (torch.where(skip, one, x) for one, x in ((1.0, momentum), (0.0, lr), (0.0, decay)))
        stacks, device, directions = list(by_shape.values()), parameters[0].device, []
        shares = _shares(tuple((len(alike), *_as_matrix(alike[0]).shape) for alike in stacks), distributed.world_size())
        for alike, share in side_by_side(list(zip(stacks, shares, strict=True)), device):
            buffer = self._momentum_of(alike)
            gradient = torch.stack([_as_matrix(parameter.grad) for parameter in alike if parameter.grad is not None])
            if found_inf is not None:
                gradient = torch.where(skip, 0.0, gradient)
            buffer.mul_(momentum).add_(gradient)
            asked, own = gradient.add_(buffer * group["momentum"]), share[distributed.rank()]
            if own.stop - own.start == len(asked):
                asked = orthogonalise(asked)
            elif own.stop > own.start:
                asked[own] = orthogonalise(asked[own])
            directions.append(asked)
        _exchange(directions, shares)
        for alike, direction in side_by_side(list(zip(stacks, directions, strict=True)), device):
            change = direction.mul_(lr * (0.2 * math.sqrt(max(direction.shape[1:]))))
            if group["weight_decay"]:
                torch._foreach_mul_(alike, 1 - decay)
            torch._foreach_sub_(alike, [_as_tensor(row, alike[0]) for row in change])

    def _momentum_of(self, alike: list[Tensor]) -> Tensor:
        """Return the momentum of tensors of one shape as matrices, (k, rows, columns), of which their states are views.

        It is made anew where it is not that, as at the first step and after a state was loaded.
        """
        buffers = [self._momentum(parameter) for parameter in alike]
        whole: Tensor | None = buffers[0]._base
        if whole is None or [b.data_ptr() for b in buffers] != [row.data_ptr() for row in whole]:
            whole = torch.stack([_as_matrix(buffer) for buffer in buffers])
            for parameter, row in zip(alike, whole, strict=True):
                self.state[parameter]["momentum_buffer"] = _as_tensor(row, parameter)
        return whole


Shares = tuple[tuple[slice, ...], ...]


@functools.cache
def _shares(stacks: tuple[tuple[int, int, int], ...], world_size: int) -> Shares:
    """Return which matrices of each stack (k, rows, columns) each rank orthogonalises: one slice for each rank.

    The dearest matrices come first, each to the rank that is least busy. Vectors are divided by their norms by every
    rank, as that costs less than to send them.
    """
    counts, busy = {}, [0] * world_size

    def cost(stack: tuple[int, int, int]) -> int:
        rows, columns = sorted(stack[1:])
        return 2 * rows * rows * columns + rows**3

    for number, stack in sorted(enumerate(stacks), key=lambda each: -cost(each[1])):
        counts[number] = [0] * world_size
        for _ in range(stack[0]):
            rank = busy.index(min(busy))
            busy[rank] += cost(stack)
            counts[number][rank] += 1
    shares = []
    for number, (k, rows, columns) in enumerate(stacks):
        ends = list(itertools.accumulate(counts[number]))
        of_ranks = [slice(end - count, end) for end, count in zip(ends, counts[number], strict=True)]
        shares.append(tuple([slice(0, k)] * world_size if min(rows, columns) == 1 else of_ranks))
    return tuple(shares)


def _exchange(directions: list[Tensor], shares: Shares) -> None:
    """Fill in the directions (k, rows, columns) that other ranks have computed, by one message. Collective call."""
    stacks = [(each, share) for each, share in zip(directions, shares, strict=True) if share[0] != share[-1]]
    if not stacks:  # a world of one, or vectors only
        return
    of_ranks = [[each[share[rank]] for each, share in stacks] for rank in range(distributed.world_size())]
    sizes = [[part.numel() for part in parts] for parts in of_ranks]
    # On GPUs orthogonalise computes in bfloat16, so nothing is lost by sending its results as such.
    as_sent = torch.bfloat16 if directions[0].is_cuda and directions[0].dtype == torch.float32 else directions[0].dtype
    own = torch.cat([part.reshape(-1) for part in of_ranks[distributed.rank()]]).to(as_sent)
    padded = F.pad(own, (0, max(map(sum, sizes)) - len(own)))
    for parts, of_rank, received in zip(of_ranks, sizes, distributed.gather(padded).chunk(len(sizes)), strict=True):
        pieces = torch.split(received[: sum(of_rank)], of_rank)
        torch._foreach_copy_(parts, [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)])


def side_by_side(work: Sequence[Work], device: torch.device) -> Iterator[Work]:
    """Yield each piece of work; on a GPU, what is done with one does not wait for what is done with the others.

    A product of small matrices leaves most of a GPU idle, and its kernels follow one another for their latency alone.
    """
    if device.type != "cuda":
        yield from work
        return
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in work]  # type: ignore[no-untyped-call]  # of a pool, so not new ones
    for piece, stream in zip(work, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield piece
    for stream in streams:
        current.wait_stream(stream)


def _as_matrix(x: Tensor) -> Tensor:
    """Return (rows, columns) of a tensor, without a copy if it is channels_last; a vector is one row.

    Columns are in the order in which channels_last weights lie in memory; orthogonalising does not depend on it.
    """
    return x.movedim(1, -1).reshape(len(x), -1) if x.ndim > 1 else x.reshape(1, -1)


def _as_tensor(matrix: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_as_matrix` for a tensor of the shape of ``like``."""
    if like.ndim < 2:
        return matrix.view(like.shape)
    rows, channels, *rest = like.shape
    return matrix.view(rows, *rest, channels).movedim(-1, 1)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return nearly U V^T for each matrix U S V^T, without taking it apart: singular values come to lie about 1.

    Five steps of a Newton-Schulz iteration, X <- a X + (b A + c A^2) X with A = X X^T, from X = matrix / |matrix|. Its
    coefficients rise as steeply as they can from 0, and let singular values from 0.01 to 1 end between 0.65 and 1.25;
    smaller ones stay smaller, and 0 stays 0. A matrix of one row is divided by its norm, which is exact. On GPUs the
    iteration's factors are bfloat16, which it was made for.

    Args:
        matrices: (k, rows, columns), float32 or float64.

    Source:
        Jordan et al. 2024, as for :class:`Muon`; Bernstein & Newhouse 2024, arXiv:2409.20325, for the idea.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x: Tensor = matrices / norm.clamp_min(torch.finfo(matrices.dtype).tiny)
    rows, columns = matrices.shape[1:]
    if min(rows, columns) == 1:
        return x
    x = x.mT if rows > columns else x
    if x.is_cuda and x.dtype == torch.float32:
        x = x.bfloat16()
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x).to(matrices.dtype)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split the parameters into those that decay and those that do not.

    Biases and normalisation parameters, that is those of fewer than two dimensions, are neither decayed nor
    adapted by LARS unless ``config.decay_biases_and_norms``. The rule looks at shapes, not names, so that it also
    holds for a downsampling path and the projector.

    Returns:
        Groups with ``params``, ``names`` (of the parameters), ``weight_decay`` and, for LARS, ``adapt``.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    excluded = {name for name, p in named if p.ndim < 2 and not config.decay_biases_and_norms}
    groups = []
    for exclude in (False, True):
        members = [(name, p) for name, p in named if (name in excluded) is exclude]
        if not members:
            continue
        group: dict[str, Any] = {
            "params": [p for _, p in members],
            "names": [name for name, _ in members],
            "weight_decay": 0.0 if exclude else config.weight_decay,
        }
        if config.name == "lars":
            group["adapt"] = not exclude
        groups.append(group)
    return groups


def describe_groups(groups: list[dict[str, Any]]) -> list[str]:
    """Return one line per parameter group for the log."""
    lines = []
    for group in groups:
        size = sum(p.numel() for p in group["params"])
        adaptation = {True: ", LARS adapts", False: ", LARS does not adapt", None: ""}[group.get("adapt")]
        names = group["names"]
        shown = ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")
        lines.append(
            f"{len(names)} tensors, {size:,} parameters, weight decay {group['weight_decay']:g}{adaptation}: {shown}"
        )
    return lines


def make_optimizer(model: nn.Module, config: OptimizerConfig, *, skippable: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer with its parameter groups; its learning rate is set before each step.

    Args:
        model: Whose parameters.
        config: Its settings.
        skippable: For GPUs that nobody waits for: the step changes nothing while the tensor ``found_inf`` of the
            optimizer is 1, and the learning rate of float32 weights is a tensor on the device. It takes torch's fused
            implementations, which are made for that and differ from the others by rounding.
    """
    groups = parameter_groups(model, config)
    for group in groups:
        weight = group["params"][0]
        # The fused kernels read float32. In float64, which compares runs, that would round; nothing is captured then.
        on_device = skippable and weight.dtype == torch.float32
        group["lr"] = torch.zeros((), device=weight.device) if on_device else 0.0
        del group["names"]
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, momentum=config.momentum, fused=skippable or None)
        if skippable and config.momentum:
            # torch 2.14 leaves the buffer as memory happened to be, if the very first step is the one left out.
            for parameter in (p for group in sgd.param_groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if config.name == "adamw":
        adamw = torch.optim.AdamW(groups, betas=(config.momentum, 0.999), fused=skippable or None, capturable=skippable)
        adamw._warned_capturable_if_run_uncaptured = True  # fused: not slower for it
        return adamw
    optimizer: LARS | Muon
    if config.name == "muon":
        optimizer = Muon(groups, lr=0.0, momentum=config.momentum)
    else:
        optimizer = LARS(
            groups,
            lr=0.0,
            momentum=config.momentum,
            trust_coefficient=config.lars_trust_coefficient,
            clip=config.lars_clip,
        )
    optimizer._step_supports_amp_scaling = skippable
    return optimizer


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load an optimizer's state; which implementation it had, perhaps on another kind of device, is not taken over."""
    own = optimizer.state_dict()["param_groups"]
    kept = ("lr", "fused", "foreach", "capturable")  # lr is set before each step
    groups = [
        {**saved, **{name: group[name] for name in kept if name in group}}
        for saved, group in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
