"""How many images per second get their two views, by this project and by others, on all cores of this machine.

    python -m benchmarks.pipeline --data data/cifar10/train.beton

Every candidate reads the same images, at the same settings: crops of 20 to 100 % of the area, flip, jitter 0.4, 0.4,
0.4, 0.1 with probability 0.8, grayscale 0.2, normalised float32. Each has what suits it: DataLoaders one worker per
core and images decoded beforehand, batched operations all threads. Peers that are not installed are left out; see
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from simclr import beton
from simclr.data import EpochPlan, ImageSource, open_images
from simclr.system import usable_cores
from simclr.views import ViewSpec, two_views
from simclr.views.fused_views import FusedViews

SPEC = ViewSpec()
CORES = usable_cores()
Candidate = Callable[[], object]


def main() -> None:
    """Measure, print a table and write results/benchmarks/pipeline.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/cifar10/train.beton"))
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=common.ROOT / "results" / "benchmarks" / "pipeline.json")
    parser.add_argument(
        "--quick", action="store_true", help="seconds, on made-up images, without peers; not to be quoted"
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.quick:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            options.data, options.output = folder / "noise.beton", folder / "pipeline.json"
            options.batch_size, options.rounds = 32, 1
            common.write_noise(options.data, 128)
        torch.set_num_threads(CORES)
        candidates, calls = prepare(stack, options.data, options.batch_size, quick=options.quick)
        timings = common.interleave(candidates, rounds=options.rounds, calls=calls)
    images = options.batch_size
    print(common.table(timings, images=images, against=OURS))
    common.write_result(
        options.output,
        {
            "what": f"two views of each image, batch {images}, {CORES} cores",
            "candidates": common.as_json(timings, images=images),
        },
    )


OURS = "fused, FFCV"


def prepare(
    stack: contextlib.ExitStack, data: Path, batch_size: int, *, quick: bool
) -> tuple[dict[str, Candidate], dict[str, int]]:
    """Return the candidates, each of which makes one batch a call or times itself, and their calls per round."""
    memory = stack.enter_context(open_images(data, backend="memory"))
    facts = memory.facts
    mean, std = facts.normalisation
    fused = stack.enter_context(FusedViews(SPEC, SPEC, size=facts.height, mean=mean, std=std, threads=CORES))
    candidates: dict[str, Candidate] = {}

    def with_fused(source: ImageSource) -> Candidate:
        return Stream(source, batch_size, lambda image, index: fused(image, index, seed=0, epoch=0))

    def with_torch(image: Tensor, index: Tensor) -> object:
        return two_views(image, index, SPEC, SPEC, seed=0, epoch=0, size=facts.height, mean=mean, std=std)

    ffcv = None
    with contextlib.suppress(ValueError):
        ffcv = stack.enter_context(open_images(data, backend="ffcv", num_workers=CORES))
    if ffcv is not None:
        candidates[OURS] = with_fused(ffcv)
    else:
        candidates[OURS] = with_fused(memory)
        print(f"without FFCV: {OURS} reads from memory")
    candidates["fused, in memory"] = with_fused(memory)
    candidates["this project's batched torch operations, in memory"] = Stream(memory, batch_size, with_torch)
    calls = dict.fromkeys(candidates, 20) | {"this project's batched torch operations, in memory": 3}
    if ffcv is not None:
        candidates["FFCV, stored pixels only (no views)"] = Stream(ffcv, batch_size, lambda image, _: image)
        calls["FFCV, stored pixels only (no views)"] = 60
    if quick:
        return candidates, calls

    if ffcv is not None:  # many calls, as FFCV makes some batches while others are timed
        candidates["FFCV's own crop and flip (no colours, not normalised)"] = FFCVStock(data, batch_size)
        calls["FFCV's own crop and flip (no colours, not normalised)"] = 60
    pixels, _ = beton.read(data)
    pixels = pixels[: 8 * batch_size]
    compiled = torch.compile(static_views, dynamic=False)
    batches = Stream(memory, batch_size, lambda image, _: compiled(image, torch.tensor(mean), torch.tensor(std)))
    candidates["batched torch, torch.compile"] = batches
    calls["batched torch, torch.compile"] = 5
    for name, package, make in (
        ("kornia, batched", "kornia", kornia_views),
        ("lightly's SimCLRTransform, DataLoader", "lightly", lightly_views),
        ("torchvision v2, DataLoader", "torchvision", torchvision_views),
    ):
        if importlib.util.find_spec(package) is None:
            print(f"left out, as it is not installed: {name}")
            continue
        candidates[name] = make(pixels, batch_size, mean, std)
        calls[name] = 3 if package == "kornia" else 1
    return candidates, calls


class Stream:
    """Reads epoch after epoch; a call makes the views of the next batch."""

    def __init__(self, source: ImageSource, batch_size: int, make: Callable[[Tensor, Tensor], object]) -> None:
        self._source, self._make = source, make
        self._plan = EpochPlan(np.arange(source.facts.num_images), batch_size)
        self._batches = self._epochs()

    def _epochs(self) -> Iterator[Any]:
        for epoch in range(1 << 30):
            yield from self._source.batches(self._plan, epoch=epoch)

    def __call__(self) -> None:
        batch = next(self._batches)
        self._make(batch.image, batch.index)


class FFCVStock:
    """What FFCV offers by itself for two views: RandomResizedCrop and RandomHorizontalFlip, on uint8."""

    def __init__(self, data: Path, batch_size: int) -> None:
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline import PipelineSpec
        from ffcv.transforms import RandomHorizontalFlip, ToTensor

        def view() -> Any:
            decoder = RandomResizedCropRGBImageDecoder((32, 32), scale=SPEC.crop_scale, ratio=SPEC.crop_ratio)
            return PipelineSpec("image", decoder=decoder, transforms=[RandomHorizontalFlip(), ToTensor()])

        threads = torch.get_num_threads()
        self._loader = Loader(
            str(data),
            batch_size=batch_size,
            num_workers=CORES,
            os_cache=True,
            order=OrderOption.RANDOM,
            pipelines={"image": view(), "view_2": view(), "label": [IntDecoder(), ToTensor()]},
        )
        torch.set_num_threads(threads)  # a loader sets it
        self._batches = self._epochs()

    def _epochs(self) -> Iterator[Any]:
        while True:
            threads = torch.get_num_threads()
            batches = iter(self._loader)
            torch.set_num_threads(threads)
            yield from batches

    def __call__(self) -> None:
        next(self._batches)


class Loaded:
    """A DataLoader with a worker per core, timed while it is full: from its second batch to its last."""

    def __init__(self, dataset: Any, batch_size: int, batches: int) -> None:
        self._loader = torch.utils.data.DataLoader(
            dataset, batch_size, num_workers=CORES, drop_last=True, multiprocessing_context="fork"
        )
        self._count = batches

    def __call__(self) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
            batches = iter(self._loader)
        next(batches)
        started = time.perf_counter()
        for _ in range(self._count):
            next(batches)
        seconds = (time.perf_counter() - started) / self._count
        del batches  # ends the workers
        return seconds


class Decoded(torch.utils.data.Dataset[Any]):
    """Images as PIL images in memory, so that the transform alone is measured."""

    def __init__(self, pixels: Any, transform: Callable[[Any], Any]) -> None:
        from PIL import Image

        self._images = [Image.fromarray(image) for image in pixels]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        return self._transform(self._images[index])


def lightly_views(pixels: Any, batch_size: int, mean: Any, std: Any) -> Candidate:
    """The transform of lightly for SimCLR."""
    return Loaded(Decoded(pixels, lightly_transform(mean, std)), batch_size, batches=6)


def lightly_transform(mean: Any, std: Any, spec: ViewSpec = SPEC, size: int = 32) -> Callable[[Any], Any]:
    """Return a PIL image's way to its two views with lightly, for settings without blur and solarising."""
    from lightly.transforms import SimCLRTransform

    transform: Callable[[Any], Any] = SimCLRTransform(
        input_size=size,
        cj_prob=spec.jitter_probability,
        cj_strength=1.0,
        cj_bright=spec.brightness,
        cj_contrast=spec.contrast,
        cj_sat=spec.saturation,
        cj_hue=spec.hue,
        min_scale=spec.crop_scale[0],
        random_gray_scale=spec.grayscale_probability,
        gaussian_blur=0.0,
        hf_prob=spec.flip_probability,
        normalize={"mean": list(mean), "std": list(std)},
    )
    return transform


def torchvision_views(pixels: Any, batch_size: int, mean: Any, std: Any) -> Candidate:
    """The v2 transforms of torchvision on PIL images, which is faster than on tensors, twice."""
    return Loaded(Decoded(pixels, torchvision_transform(mean, std)), batch_size, batches=6)


def torchvision_transform(mean: Any, std: Any, spec: ViewSpec = SPEC, size: int = 32) -> Callable[[Any], Any]:
    """Return a PIL image's way to its two views with torchvision, for settings without blur and solarising."""
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    one = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=spec.crop_scale, ratio=spec.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(spec.flip_probability),
            v2.RandomApply([jitter], p=spec.jitter_probability),
            v2.RandomGrayscale(spec.grayscale_probability),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )
    return lambda image: (one(image), one(image))


def kornia_views(pixels: Any, batch_size: int, mean: Any, std: Any) -> Candidate:
    """A sequence of kornia on a whole batch in float32, twice."""
    import kornia.augmentation as K

    views = K.AugmentationSequential(
        K.RandomResizedCrop((32, 32), scale=SPEC.crop_scale, ratio=SPEC.crop_ratio),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.Normalize(torch.tensor(mean), torch.tensor(std)),
    )
    images = torch.from_numpy(pixels[:batch_size])

    @torch.no_grad()
    def make() -> None:
        image = images.permute(0, 3, 1, 2).float() / 255
        views(image), views(image)

    return make


@torch.no_grad()
def static_views(image: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Both views by torch operations that torch.compile can fuse, for uint8 (b, H, W, 3).

    Every image passes every operation, and is masked where it does not apply; crops are products with two small
    matrices; the colour operations have one order for the whole batch (with an order for each image this would take
    several times as long).
    """
    pixels = image.permute(0, 3, 1, 2).float() / 255
    return _static_view(pixels, mean, std), _static_view(pixels, mean, std)


def _static_view(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    b, _, height, width = pixels.shape
    u = torch.rand(12, b, 1, 1, 1)
    area = height * width * (SPEC.crop_scale[0] + (SPEC.crop_scale[1] - SPEC.crop_scale[0]) * u[0])
    ratio = torch.exp(np.log(SPEC.crop_ratio[0]) + np.log(SPEC.crop_ratio[1] / SPEC.crop_ratio[0]) * u[1])
    crop_width = (area * ratio).sqrt().clamp(max=width)
    crop_height = (area / ratio).sqrt().clamp(max=height)

    def matrix(start: Tensor, length: Tensor, source: int) -> Tensor:
        position = torch.arange(32) + 0.5
        centre = start.view(b, 1, 1) + position.view(1, -1, 1) * length.view(b, 1, 1) / 32 - 0.5
        return (1 - (centre - torch.arange(source).view(1, 1, -1)).abs()).clamp(min=0)

    rows = matrix(u[2] * (height - crop_height), crop_height, height)
    columns = matrix(u[3] * (width - crop_width), crop_width, width)
    columns = torch.where(u[4].view(b, 1, 1) < SPEC.flip_probability, columns.flip(1), columns)
    x = torch.einsum("byh,bchw,bxw->bcyx", rows, pixels, columns)
    jitter = u[5] < SPEC.jitter_probability
    brightness, contrast, saturation = 0.6 + 0.8 * u[6], 0.6 + 0.8 * u[7], 0.6 + 0.8 * u[8]
    x = torch.where(jitter, (x * brightness).clamp(0, 1), x)
    x = torch.where(jitter, (contrast * x + (1 - contrast) * _luma(x).mean((2, 3), keepdim=True)).clamp(0, 1), x)
    x = torch.where(jitter, (saturation * x + (1 - saturation) * _luma(x)).clamp(0, 1), x)
    x = torch.where(jitter, _shifted_hue(x, 0.2 * u[9, :, 0] - 0.1), x)
    x = torch.where(u[10] < SPEC.grayscale_probability, _luma(x), x)
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def _luma(x: Tensor) -> Tensor:
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).unsqueeze(1)


def _shifted_hue(x: Tensor, turns: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    largest, smallest = x.amax(1), x.amin(1)
    chroma = largest - smallest
    hue = (green + blue - red + largest - 2 * smallest) / chroma.clamp(min=1e-12)
    hue = torch.where(green >= blue, hue, -hue) + 6 * turns
    hue = hue - 6 * (hue / 6).floor()
    shares = [((hue - centre).abs() - 1).clamp(0, 1) for centre in (3, 2, 4)]
    return torch.stack([smallest + chroma * shares[0], largest - chroma * shares[1], largest - chroma * shares[2]], 1)


if __name__ == "__main__":
    main()
