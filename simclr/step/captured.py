"""A function of tensors as one CUDA graph: the host launches it once, whatever it consists of.

A training step of ResNet-18 is some 1,500 launches of 9 microseconds each, and the GPU's arithmetic takes less than
that. As a graph they are one. What is captured is the plain step itself, so that both compute the same. With several
processes each captures its own step, with NCCL's collectives in it: so either all replay their graphs, or none does.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simclr.config import CompileChoice

WARM_UP = 3  # calls that are made plainly first: what is compiled, chosen or allocated once is there by then

# On an H200, compiling ResNet-18 for one size of view takes 18 s and saves 4.6 microseconds for each source image.
_PAYS_FROM = 4_000_000


class Way(NamedTuple):
    """How the steps of a run are computed, and why."""

    is_compiled: bool
    """Whether torch.compile makes the forward and backward pass."""
    is_captured: bool
    """Whether the whole step is one CUDA graph."""
    reason: str

    averages_gradients: bool = False
    """Whether the step averages gradients over ranks itself, by one all-reduce, in place of DDP: capturing DDP's hooks
    takes eleven steps before it, they break a compiled graph, and they do not see micro-batches."""

    def describe(self) -> str:
        """Return it in words."""
        compiled = "compiled for fixed shapes, for which the first step waits" if self.is_compiled else "not compiled"
        return f"{'one CUDA graph' if self.is_captured else 'launch by launch'}, {compiled} ({self.reason})"

    @staticmethod
    def of_all(ways: Sequence[Way]) -> Way:
        """Return the way that all ranks take, from what each could do, in rank order: what one cannot do, none does."""
        least = min(ways, key=lambda way: way[:2])
        alone = f", on rank {ways.index(least)}" if least[:2] != max(way[:2] for way in ways) else ""
        return least._replace(reason=least.reason + alone)


def choose_way(
    asked: CompileChoice,
    *,
    device: torch.device,
    world_size: int,
    has_scaler: bool,
    saves_memory: bool,
    views: str,
    longest_stage: int,
    backend: str = "",
) -> Way:
    """Return how to compute the steps of a run, as far as this rank is concerned.

    Args:
        asked: What the configuration says.
        device: Where the steps run.
        world_size: Processes.
        has_scaler: Whether fp16's gradient scaler decides on the host about each step.
        saves_memory: Whether parts of the forward pass are computed twice.
        views: Who makes them: see :class:`simclr.views.pipeline.ViewFeed`.
        longest_stage: Source images with views of one size, at most.
        backend: What carries messages between several processes' devices.

    Raises:
        ValueError: If a graph was asked for and is not possible.
    """
    obstacles = {
        f"the run is on {device.type}": device.type != "cuda",
        f"{world_size} processes talk over {backend}, not NCCL": world_size > 1 and backend != "nccl",
        # Captured collectives then hang: pytorch/torchtitan issue 3306.
        "PYTORCH_CUDA_ALLOC_CONF has expandable_segments": world_size > 1 and _has_expandable_segments(),
        "precision is fp16": has_scaler,
        "recompute and micro_batch_size go through parts of a step twice": saves_memory,
        f"views are made by {views}, not by Triton": views != "triton",
    }
    obstacle = next((words for words, holds in obstacles.items() if holds), None)
    if asked.startswith("graph") and obstacle is not None:
        raise ValueError(
            f"compile is {asked}, but a step cannot be one CUDA graph, since {obstacle}; use --compile auto"
        )
    if asked != "auto":
        return Way(asked in {"default", "graph-compiled"}, asked.startswith("graph"), "as configured")
    if obstacle is not None:
        return Way(False, False, f"since {obstacle}")
    pays = longest_stage >= _PAYS_FROM
    why = f"{longest_stage:,} images with views of one size {'pay' if pays else 'do not pay'} for compiling"
    return Way(pays, True, why)


def _has_expandable_segments() -> bool:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch 2.9 gave it the second
    return any("expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "") for name in names)


@dataclass(frozen=True)
class _Graph:
    """A captured call: what it reads, and what it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Captured:
    """Calls a function plainly a few times, and then replays what it did on the GPU.

    Args:
        function: Tensors to tensors on the current CUDA device. Everything else that it reads lies at the same place at
            each call and it never waits for the device; the host's part of it is not done again.
        say: Is told why, if the function cannot be captured and is called plainly from then on.
        gather: Returns every rank's text, in rank order, on every rank; where the function talks to other ranks.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        say: Callable[[str], None],
        gather: Callable[[str], list[str]] = lambda own: [own],
    ) -> None:
        self._function, self._say, self._gather = function, say, gather
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._key: Hashable = None
        self._calls = 0  # with this key
        self._captured: _Graph | None = None
        self._is_plain = False

    def __call__(self, key: Hashable, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return ``function(*inputs)``; what is returned holds until the next call.

        Args:
            key: Names what the shapes of the inputs and the work depend on. A new one is a new graph.
            inputs: On the device.
        """
        if key != self._key:
            self.close()
            self._key, self._calls = key, 0
        self._calls += 1
        if self._is_plain or self._calls <= WARM_UP:
            return self._on_own_stream(inputs)
        if self._captured is None:
            obstacle = ""
            try:
                self._captured = self._capture(inputs)
            except RuntimeError as error:
                obstacle = (str(error).strip() or type(error).__name__).splitlines()[0]
            obstacles = self._gather(obstacle)
            if any(obstacles):
                self.close()
                self._is_plain = True
                rank, first = next((rank, words) for rank, words in enumerate(obstacles) if words)
                self._say(first + (f" (rank {rank})" if len(obstacles) > 1 else ""))
                return self._on_own_stream(inputs)
        assert self._captured is not None
        for held, given in zip(self._captured.inputs, inputs, strict=True):
            held.copy_(given)
        self._captured.graph.replay()
        return self._captured.outputs

    def _on_own_stream(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Call the function on the stream that is captured: autograd remembers where a weight was first used."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self._function(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, inputs: Sequence[Tensor]) -> _Graph:
        held = tuple(given.clone() for given in inputs)
        gc.collect()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may allocate meanwhile: they draw views' parameters, or write a checkpoint.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self._function(*held)
        return _Graph(graph, held, outputs)

    def close(self) -> None:
        """Let the graph go; a later call captures anew.

        To be called before the process group is left, which waits for ever while a graph has its collectives; and not
        while another rank is missing, as the device then waits for it.
        """
        if self._captured is not None:
            torch.cuda.synchronize()
            self._captured.graph.reset()
            self._captured = None
