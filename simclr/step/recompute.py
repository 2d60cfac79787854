"""The same step in less memory: what the backward pass needs is computed again instead of kept.

Two ways, each for one forward pass more. *Blocks*: each residual block keeps its input only, and is run again when the
backward pass arrives (Chen et al. 2016, arXiv:1604.06174): the same bits, for any encoder. *Micro-batches*: some images
pass the encoder at a time, first all of them without what a backward pass needs; the loss then says what gradient each
representation has; then each micro-batch passes once more, forward and backward (Gao et al. 2021, arXiv:2101.06983).
That needs the memory of one micro-batch; but each image must be encoded by itself, and batch normalisation makes each
depend on all others, in both directions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simclr.batch_norm import GlobalBatchNorm
from simclr.models import SimCLR


def recompute_blocks(model: SimCLR) -> int:
    """Have each block of the encoder computed again in the backward pass; return the number of blocks.

    A block is what stands in a sequence and has parts of its own, as the residual blocks of timm's models do.
    Statistics (buffers) are updated by the first pass alone.

    Raises:
        ValueError: If the encoder has no such blocks.
    """
    blocks = list(_blocks(model.encoder))
    if not blocks:
        raise ValueError(
            f"recompute needs an encoder made of blocks in sequence, and a {type(model.encoder).__name__} has none; "
            "leave recompute out"
        )
    for block in blocks:
        object.__setattr__(block, "forward", functools.partial(_recomputed, block, block.forward))
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        is_block = isinstance(module, nn.Sequential) and not isinstance(child, nn.Sequential)
        if is_block and next(child.children(), None) is not None:
            yield child
        else:
            yield from _blocks(child)


def _recomputed(block: nn.Module, forward: Any, x: Tensor) -> Tensor:
    def contexts() -> tuple[Any, Any]:  # of the first and the second pass
        return contextlib.nullcontext(), _on_copies_of_buffers(block)

    y: Tensor = checkpoint(forward, x, use_reentrant=False, context_fn=contexts)
    return y


@contextlib.contextmanager
def _on_copies_of_buffers(block: nn.Module) -> Iterator[None]:
    """What a pass does to the buffers, such as batch normalisation's running statistics, is thrown away."""
    kept = [(layer, layer._buffers) for layer in block.modules() if layer._buffers]
    for layer, buffers in kept:
        layer._buffers = {name: value if value is None else value.clone() for name, value in buffers.items()}
    try:
        yield
    finally:
        for layer, buffers in kept:
            layer._buffers = buffers


def require_independent_images(model: SimCLR) -> None:
    """Refuse an encoder that micro-batches would make another of.

    Raises:
        ValueError: If a layer of the encoder uses statistics of the batch.
    """
    for name, layer in model.encoder.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | GlobalBatchNorm):
            raise ValueError(
                f"micro_batch_size needs an encoder without batch normalisation, as a ViT or ConvNeXt; layer {name} "
                "makes each image depend on the whole batch. Use --recompute, which takes any encoder"
            )
