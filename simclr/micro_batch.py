"""A step on a batch that does not fit into memory: some images at a time, with the gradient of the whole batch.

A contrastive loss needs the projections of the whole batch, and so does its gradient. They are computed first, without
keeping what a backward pass needs; the loss then says what gradient each projection has; and each micro-batch passes
the network once more, forward and backward. Without batch normalisation that is all: one forward pass more, and the
memory of one micro-batch.

With batch normalisation every layer of it makes each image depend on all others twice: on the way forward through mean
and variance, on the way back through two sums (Ioffe & Szegedy 2015, section 3). No layer can be passed in either
direction before all micro-batches have arrived there. So the network is cut into units, and each unit is run again from
its inputs, which are kept for the whole batch, until all of its layers have their statistics:

    forward    for each layer of batch normalisation in the unit: run all micro-batches as far as there, and merge
               their moments; then run them through
    backward   for each such layer but the first, the last first: run all micro-batches forward, and backward as far as
               there, and add up the two sums; then the same with the first, this time with the parameters' gradients;
               then run from the unit's inputs to the first layer, and back with the gradient that is now known

A unit that begins with its only such layer costs one forward pass more than in a plain step, as one without any does. A
residual block of two convolutions and two normalisations costs 7 thirds of a plain step's operations. Memory is the
units' inputs for this rank's batch, and what a backward pass through one unit keeps of one micro-batch.

Shape letters: R rows (views) of this rank's batch, m rows of a micro-batch, d projection width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr.batch_norm import (
    GlobalBatchNorm,
    all_but_channels,
    along_channels,
    at_least_float32,
    gradient_before,
    gradient_sums,
)
from simclr.distributed import sum_over_ranks
from simclr.models import SimCLR


class BatchInParts:
    """One batch's way through a model and back, in micro-batches.

    Args:
        units: The model's parts, from :func:`split_into_units`, in training mode.
        rows: Rows (views) of a micro-batch, >= 1.
        autocast: Makes the context in which forward passes run.

    Note:
        Collective calls, if there are several ranks; every rank must hold equally many rows. No gradients travel until
        :func:`simclr.distributed.average_gradients`.
    """

    def __init__(
        self, units: list[nn.Sequential], rows: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._units = [_Unit(unit, autocast) for unit in units]
        self._rows = rows
        self._inputs: list[list[Tensor]] = []  # of each unit

    @torch.no_grad()
    def project(self, x: Tensor) -> Tensor:
        """Return the projections (R, d) of all views (R, 3, H, W), and update the running statistics once."""
        parts = list(torch.split(x, self._rows))
        self._inputs = []
        for unit in self._units:
            self._inputs.append(parts)
            parts = unit.forward(parts)
        return torch.cat(parts)

    def backward(self, gradient: Tensor) -> None:
        """Add the parameters' gradients, given that of the projections (R, d); frees what :meth:`project` kept."""
        gradients = list(torch.split(gradient, self._rows))
        for unit in reversed(self._units):
            is_first = unit is self._units[0]  # nobody asks for the gradient of images
            gradients = unit.backward(self._inputs.pop(), gradients, of_inputs=not is_first)


class _Unit:
    """A part of the network, and the statistics of its batch normalisations for one batch."""

    def __init__(self, module: nn.Sequential, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        self._module, self._autocast = module, autocast
        self._states = {
            layer: _State(layer) for layer in module.modules() if isinstance(layer, GlobalBatchNorm) and layer.training
        }
        self._order: list[_State] = []  # of execution

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        while True:
            outputs = []
            reached = None
            for x in parts:
                try:
                    outputs.append(self._run(x))
                except _Reached as stop:
                    reached = stop.state
            if reached is None:
                return outputs
            reached.finish_forward()
            self._order.append(reached)

    def backward(self, parts: list[Tensor], gradients: list[Tensor], *, of_inputs: bool) -> list[Tensor]:
        first, others = (self._order[0], self._order[1:]) if self._order else (None, [])
        for state in reversed(others):
            for x, gradient in zip(parts, gradients, strict=True):
                output = self._run(x)
                (arriving,) = torch.autograd.grad(output, state.normalised, gradient.to(output.dtype))
                state.add_arriving(arriving)
            state.finish_backward()

        leaves = [x.detach().requires_grad_(of_inputs) for x in parts]
        arriving_at_first = []
        for leaf, gradient in zip(leaves, gradients, strict=True):
            output = self._run_cut_at(first, leaf)
            torch.autograd.backward(output, gradient.to(output.dtype))
            if first is not None:
                arriving_at_first.append(first.add_arriving(first.normalised.grad))
        if first is not None:
            first.finish_backward()
            for leaf, arriving in zip(leaves, arriving_at_first, strict=True):
                before = self._run_up_to(first, leaf)
                if before.requires_grad:
                    torch.autograd.backward(before, first.gradient_before(before.detach(), arriving))
        for state in self._order:
            state.forget()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def _run_cut_at(self, state: _State | None, x: Tensor) -> Tensor:
        """Run through; no gradient passes that layer, and what it makes of its input is a leaf."""
        if state is None:
            return self._run(x)
        state.is_cut = True
        try:
            return self._run(x)
        finally:
            state.is_cut = False

    def _run_up_to(self, state: _State, x: Tensor) -> Tensor:
        """Return what arrives at a layer."""
        state.is_end = True
        try:
            self._run(x)
        except _Reached:
            return state.take_input()
        finally:
            state.is_end = False
        raise AssertionError("the unit does not reach a layer that it reached before")

    def _run(self, x: Tensor) -> Tensor:
        for layer, state in self._states.items():
            layer.by_parts = state.normalise
            state.was_run = False
        try:
            with self._autocast():
                output: Tensor = self._module(x)
            return output
        finally:
            for layer in self._states:
                layer.by_parts = None


class _Reached(Exception):  # noqa: N818  not an error
    """A forward pass ends at a layer: its statistics are not known yet, or nothing is wanted behind it."""

    def __init__(self, state: _State) -> None:
        self.state = state


class _State:
    """What one layer knows of the whole batch. Statistics are over all ranks, of (c,) channels."""

    def __init__(self, layer: GlobalBatchNorm) -> None:
        self._layer = layer
        self._moments: list[tuple[Tensor, Tensor, int]] = []  # mean, variance and count of each micro-batch
        self._statistics: tuple[Tensor, Tensor, Tensor] | None = None  # mean, 1 / standard deviation, count
        self._arrived: Tensor | None = None  # (2, c): sums of gradients, and of gradients times normalised values
        self._means_of_gradients: Tensor | None = None  # the same of all ranks, over the count
        self._input: Tensor | None = None
        self.normalised = torch.empty(0)  # of the last pass
        self.is_cut = self.is_end = self.was_run = False

    def normalise(self, x: Tensor) -> Tensor:
        if self.was_run:
            raise ValueError("a batch normalisation runs twice in one pass of the network, which micro-batches cannot")
        self.was_run = True
        if self._statistics is None:
            variance, mean = torch.var_mean(at_least_float32(x), all_but_channels(x), correction=0)
            self._moments.append((mean, variance, x.numel() // x.shape[1]))
        if self.is_end:
            self._input = x
        if self._statistics is None or self.is_end:
            raise _Reached(self)
        mean, inverse_std, _ = self._statistics
        if not torch.is_grad_enabled():
            return _forward(x, mean, inverse_std)
        if self.is_cut:
            self.normalised = _forward(x.detach(), mean, inverse_std)
        else:
            self.normalised = _NormaliseByGiven.apply(x, mean, inverse_std, self._means_of_gradients)
        if not self.normalised.requires_grad:
            self.normalised.requires_grad_()
        return self.normalised

    def take_input(self) -> Tensor:
        """Return what arrived at the layer that a pass was to end at."""
        x, self._input = self._input, None
        assert x is not None
        return x

    def finish_forward(self) -> None:
        means, variances = (torch.stack(list(values)) for values in zip(*[m[:2] for m in self._moments], strict=True))
        counts = means.new_tensor([[count] for *_, count in self._moments])
        total = sum_over_ranks(torch.cat([(means * counts).sum(0), counts.sum(0)]))
        count, mean = total[-1], total[:-1] / total[-1]
        # Each micro-batch's squares around its own mean, moved to the common one: nothing cancels.
        variance = sum_over_ranks((counts * (variances + (means - mean).square())).sum(0)) / count
        self._statistics = mean, (variance + self._layer.eps).rsqrt(), count
        self._moments = []
        self._layer.update_running_statistics(mean, variance, count)

    def add_arriving(self, gradient: Tensor | None) -> Tensor:
        """Take in the gradient of the last pass's normalised values; return it."""
        assert gradient is not None
        sums = gradient_sums(gradient, self.normalised.detach())
        self._arrived = sums if self._arrived is None else self._arrived + sums
        return gradient

    def finish_backward(self) -> None:
        assert self._arrived is not None
        assert self._statistics is not None
        self._means_of_gradients = sum_over_ranks(self._arrived) / self._statistics[2]
        self.forget()

    def forget(self) -> None:
        """Let go of the last pass's graph."""
        self.normalised = torch.empty(0)

    def gradient_before(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of what arrived, given that of what it became; both for one micro-batch."""
        assert self._statistics is not None
        return _backward(x, gradient, *self._statistics[:2], self._means_of_gradients)


# Both directions of batch normalisation, given (c,) statistics of the whole batch. Functions of tensors, not
# of a _State: a graph that led back to what holds it would be freed late.


def _forward(x: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    shape = along_channels(x)
    return ((at_least_float32(x) - mean.view(shape)) * inverse_std.view(shape)).to(x.dtype)


def _backward(x: Tensor, gradient: Tensor, mean: Tensor, inverse_std: Tensor, means: Tensor | None) -> Tensor:
    assert means is not None, "nobody asks before the sums of the whole batch are known"
    return gradient_before(gradient, _forward(x, mean, inverse_std), inverse_std, means)


class _NormaliseByGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, inverse_std: Tensor, means: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, mean, inverse_std, means)
        return _forward(x, mean, inverse_std)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, inverse_std, means = ctx.saved_tensors
        return _backward(x, gradient, mean, inverse_std, means), None, None, None


# ---------------------------------------------------------------------------------------------------------------
# Units


def split_into_units(model: SimCLR, image_size: int) -> list[nn.Sequential]:
    """Cut a model into parts that run one after the other, with as few batch normalisations in each as can be.

    The model's batch normalisations are to be :class:`GlobalBatchNorm` (:func:`simclr.batch_norm.replace_batch_norm`).
    An encoder whose children make it up in order, as timm's ResNets, is cut at residual blocks; whether they do is
    tried on random images. Any other is one part, and as exact: it takes a pass for each batch normalisation in it.

    Raises:
        ValueError: If a layer draws random numbers, which another pass would draw anew.
    """
    for name, layer in model.named_modules():
        if any(isinstance(p, float) and p > 0 for p in (getattr(layer, "p", 0), getattr(layer, "drop_prob", 0))):
            raise ValueError(
                f"layer {name} drops units at random, anew in each pass, so that micro-batches cannot give the step of "
                "the whole batch; choose an encoder without it, or leave micro_batch_size out"
            )
    chain = _flat(model.encoder)
    if not _makes_up(chain, model.encoder, image_size):
        chain = [model.encoder]
    units: list[list[nn.Module]] = [[]]
    for layer in [*chain, *_flat(model.projector)]:
        if units[-1] and any(isinstance(part, GlobalBatchNorm) for part in layer.modules()):
            units.append([])
        units[-1].append(layer)
    return [nn.Sequential(*unit) for unit in units]


def _flat(module: nn.Module) -> list[nn.Module]:
    """Return a module's children, and theirs where a child is no more than a sequence."""
    flat: list[nn.Module] = []
    for child in module.children():
        flat += _flat(child) if type(child) is nn.Sequential else [child]
    return flat


@torch.no_grad()
def _makes_up(chain: list[nn.Module], encoder: nn.Module, image_size: int) -> bool:
    some = next(encoder.parameters())
    x = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(some)
    modes = {part: part.training for part in encoder.modules()}
    encoder.eval()
    try:
        expected = encoder(x)
        for layer in chain:
            x = layer(x)
        return torch.equal(x, expected)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # shapes that do not fit, no forward
        return False
    finally:
        for part, mode in modes.items():
            part.training = mode
