"""Two random views of each image: settings, parameters and the operations that apply them.

A view's random parameters are a pure function of ``(seed, epoch, dataset index, view)``. There is no
generator and no state, so an image gets the same views on 1 or 64 devices, in any batch, in any order, and
after a resume. The parameters are drawn on the host with numpy for the whole batch; the pixels are then
computed by batched torch operations, which are the same on every device.

``parameters`` draws them, ``pixels`` computes the views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr import parts
from simclr.views.parameters import (
    Slot,
    ViewParameters,
    ViewSpec,
    describe,
    image_keys,
    sample_parameters,
    uniforms,
)
from simclr.views.pixels import apply_view, normalise, plain_view, require_images

__all__ = [
    "View",
    "ViewParameters",
    "ViewSpec",
    "apply_view",
    "describe",
    "own_view",
    "plain_view",
    "require_function_of_the_image",
    "sample_parameters",
    "say_view_stages",
    "size_at",
    "two_views",
    "whole_stages",
]


def two_views(
    image: Tensor,
    indices: NDArray[np.integer[Any]] | Tensor,
    spec_1: ViewSpec,
    spec_2: ViewSpec,
    *,
    seed: int,
    epoch: int,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: str = "standard",
) -> tuple[Tensor, Tensor]:
    """Two views of each image, with the parameters of view 1 and view 2.

    Args:
        image: Stored pixels, uint8, (b, H, W, 3), on any device.
        indices: Dataset indices of the same images, (b,), in host memory.
        spec_1: Settings of the first view.
        spec_2: Settings of the second view.
        seed: Seed of the run, in [0, 2**64).
        epoch: Epoch, in [0, 2**64).
        size: Side S of the views in pixels.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, > 0.
        augmentation: "standard", or the name of one that somebody has registered: see :func:`own_view`.

    Returns:
        view_1 and view_2, each float32, (b, 3, S, S), channels_last, on the device of ``image``.

    Raises:
        ValueError: As ``sample_parameters`` and ``apply_view``.
    """
    require_images(image)
    view_1, view_2 = (View(indices, seed, epoch, number, spec, size) for number, spec in ((1, spec_1), (2, spec_2)))
    if augmentation == "standard":
        return view_1.standard(image, mean, std), view_2.standard(image, mean, std)
    return (
        own_view(augmentation, image, view_1, mean=mean, std=std),
        own_view(augmentation, image, view_2, mean=mean, std=std),
    )


@dataclass(frozen=True, eq=False)
class View:
    """One view of each image of a batch; also what a function that somebody has registered makes its pixels from.

    All that it gives is a function of seed, epoch, image and view, so that views are the same on every number of
    devices and after a resume.
    """

    indices: NDArray[np.integer[Any]] | Tensor
    """Dataset indices of the images, (b,), in host memory."""
    seed: int
    epoch: int
    number: int
    """1 or 2 in pretraining, 0 in evaluations."""
    spec: ViewSpec
    """The settings --view-1 or --view-2."""
    size: int
    """Side S of the view in pixels."""

    def uniforms(self, number: int, device: torch.device | str = "cpu") -> Tensor:
        """Return ``number`` random numbers in [0, 1) for each image, float32 (b, number); the same at every call."""
        keys = image_keys(self.indices, seed=self.seed, epoch=self.epoch, view=self.number)
        u = uniforms(keys, range(Slot.OWN, Slot.OWN + number))
        return torch.from_numpy(np.floor(u * 2**24) * 2.0**-24).float().to(device)  # rounded down, so never to 1

    def standard(self, image: Tensor, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)) -> Tensor:
        """Return the standard view, float32 (b, 3, S, S): pixels in [0, 1], less ``mean``, over ``std``."""
        height, width = image.shape[1:3]
        parameters = sample_parameters(
            self.spec,
            self.indices,
            seed=self.seed,
            epoch=self.epoch,
            view=self.number,
            height=height,
            width=width,
        )
        return apply_view(image, parameters, self.spec, size=self.size, mean=mean, std=std)


@torch.no_grad()
def own_view(name: str, image: Tensor, view: View, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute one view of each image by a function that somebody has registered (:mod:`simclr.parts`).

    Args:
        name: Of the function: (uint8 (b, H, W, 3), :class:`View`) -> pixels in [0, 1], floating point (b, 3, S, S).
        image: Stored pixels, uint8, (b, H, W, 3), on any device.
        view: Which view, of which images.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, > 0.

    Returns:
        float32, (b, 3, S, S), channels_last, on the device of ``image``: (pixel - mean) / std.

    Raises:
        ValueError: If the function returns anything else.
    """
    pixels = parts.VIEWS[name](image, view)
    expected = (len(image), 3, view.size, view.size)
    if not isinstance(pixels, Tensor) or pixels.shape != expected or not pixels.is_floating_point():
        what = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else f"a {type(pixels).__name__}"
        raise ValueError(f"the views {name} must be floating point {expected}, and are {what}")
    return normalise(pixels.to(image.device).permute(1, 0, 2, 3).float().contiguous().clone(), mean, std)


def require_function_of_the_image(name: str, view: ViewSpec, *, size: int, stored: int) -> None:
    """Refuse registered views that leave [0, 1], or depend on anything but seed, epoch, image and view.

    Tried with three images of noise: each alone, and all three in another order.

    Args:
        name: Of the function.
        view: Its settings.
        size: Side of the views in pixels.
        stored: Side of the stored images in pixels.

    Raises:
        ValueError: If it does, or as :func:`own_view`.
    """
    noise = np.random.Philox(key=0).random_raw(3 * stored * stored * 3) % 256
    image, indices = torch.from_numpy(noise.astype(np.uint8)).view(3, stored, stored, 3), np.array([5, 0, 3])

    def make(rows: list[int]) -> Tensor:
        of = View(indices[rows], 1, 2, 1, view, size)
        return own_view(name, image[rows], of, mean=(0, 0, 0), std=(1, 1, 1))

    together, alone = make([2, 0, 1]), torch.cat([make([row]) for row in (2, 0, 1)])
    if not torch.allclose(together, together.clamp(0, 1), rtol=0, atol=1e-3):
        raise ValueError(
            f"the views {name} must be pixels in [0, 1], and reach from {together.min():.3g} to {together.max():.3g}; "
            "divide by 255, clamp, or leave normalising out, which follows by itself"
        )
    if not torch.allclose(together, alone, rtol=0, atol=1e-3):
        raise ValueError(
            f"the views {name} of an image differ from call to call, or with the other images of the batch, so that a "
            "run would depend on the number of devices; draw random numbers from view.uniforms only, and make each "
            "view from its image alone"
        )


def size_at(view_stages: Sequence[tuple[int, int]], epoch: int, stored: int) -> int:
    """Return the side of an epoch's views in pixels.

    Args:
        view_stages: Sides, and the epochs that each holds for, in order.
        epoch: From 0.
        stored: Side of the stored images, which holds after those epochs.
    """
    for side, epochs in view_stages:
        if epoch < epochs:
            return side
        epoch -= epochs
    return stored


def whole_stages(view_stages: Sequence[tuple[int, int]], stored: int, epochs: int) -> list[tuple[int, int]]:
    """Return sides and the epochs that each holds for, with the epochs that are left at the stored images' side."""
    left = epochs - sum(length for _, length in view_stages)
    return [(side, length) for side, length in (*view_stages, (stored, left)) if length]


def say_view_stages(view_stages: Sequence[tuple[int, int]], stored: int, epochs: int) -> str:
    """Return :func:`whole_stages` in words."""
    stages = whole_stages(view_stages, stored, epochs)
    return ", then ".join(f"{side} pixels for {length} epochs" for side, length in stages)
