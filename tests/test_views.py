"""Views: the hash, the distributions drawn from it, and the pixels, each against an independent reference."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from simclr.views import ViewParameters, ViewSpec, apply_view, describe, plain_view, sample_parameters, two_views
from simclr.views.parameters import JitterOperation, Slot, image_keys, uniforms
from simclr.views.pixels import blur_kernel_size

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
UNIT: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # leaves pixels in [0, 1]
# Every statistical test below rejects at this level. Seeds are fixed, so a test passes always or never.
LEVEL = 1e-3
EVERYTHING = ViewSpec(
    crop_scale=(0.08, 1.0),
    interpolation="bicubic",
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    blur_probability=0.5,
    solarise_probability=0.3,
)


def make_images(n: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Noise, flat gray, flat colours and a smooth ramp: every pixel value, and both extremes of saturation."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)
    images[1::7] = images[1::7, :1, :1, :1]
    images[2::7] = images[2::7, :1, :1]
    ramp = torch.linspace(0, 255, width).to(torch.uint8)
    images[3::7, :, :, 0], images[3::7, :, :, 1] = ramp, ramp.flip(0)
    return images


def draw(
    spec: ViewSpec,
    indices: NDArray[np.integer[Any]] | Tensor,
    *,
    seed: int = 0,
    epoch: int = 0,
    view: int = 1,
    height: int = 32,
    width: int = 32,
) -> ViewParameters:
    return sample_parameters(spec, indices, seed=seed, epoch=epoch, view=view, height=height, width=width)


def identity(n: int, height: int = 32, width: int = 32, **changes: Any) -> ViewParameters:
    """Parameters that change nothing, but for ``changes``."""
    fields: dict[str, Any] = {
        "crop_top": np.zeros(n, np.int64),
        "crop_left": np.zeros(n, np.int64),
        "crop_height": np.full(n, height),
        "crop_width": np.full(n, width),
        "jitter_order": np.tile(np.arange(4), (n, 1)),
        "hue": np.zeros(n),
        **{name: np.ones(n) for name in ("brightness", "contrast", "saturation", "blur_sigma")},
        **{name: np.zeros(n, bool) for name in ("flip", "jitter", "grayscale", "blur", "solarise")},
    }
    return ViewParameters(**(fields | changes))


def rows(parameters: ViewParameters, index: Any) -> ViewParameters:
    return ViewParameters(**{f.name: getattr(parameters, f.name)[index] for f in dataclasses.fields(parameters)})


def assert_same_parameters(left: ViewParameters, right: ViewParameters) -> None:
    for field in dataclasses.fields(ViewParameters):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name), err_msg=field.name)


# The hash


class Scalar:
    """The documented hash and slot table in plain Python integers and floats, one image at a time."""

    mask = 2**64 - 1
    golden = 0x9E3779B97F4A7C15

    def __init__(self, index: int, *, seed: int, epoch: int, view: int) -> None:
        self.key = self.mix(self.mix(self.mix(self.mix(seed + self.golden) ^ epoch) ^ index) + view)

    def mix(self, z: int) -> int:
        z &= self.mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self.mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self.mask
        return z ^ (z >> 31)

    def u(self, slot: int) -> float:
        return float(self.mix(self.key + (slot + 1) * self.golden) >> 11) / 2.0**53

    def crop(self, spec: ViewSpec, height: int, width: int) -> tuple[int, int, int, int]:
        low, high = spec.crop_ratio
        for attempt in range(10):
            slot = 16 + 4 * attempt
            area = height * width * (spec.crop_scale[0] + (spec.crop_scale[1] - spec.crop_scale[0]) * self.u(slot))
            ratio = math.exp(math.log(low) + (math.log(high) - math.log(low)) * self.u(slot + 1))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(self.u(slot + 2) * (height - h + 1)), int(self.u(slot + 3) * (width - w + 1)), h, w
        h, w = height, width
        if width / height < low:
            h = round(width / low)
        elif width / height > high:
            w = round(height * high)
        return (height - h) // 2, (width - w) // 2, h, w

    def factor(self, slot: int, amount: float) -> float:
        low = max(0.0, 1 - amount)
        return low + (1 + amount - low) * self.u(slot)


def test_hash_is_splitmix64() -> None:
    # The generator's published first outputs for state 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64").
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = uniforms(np.array([1234567], dtype=np.uint64), range(5))
    np.testing.assert_array_equal(found[0], [(output >> 11) / 2.0**53 for output in published])


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("epoch", [0, 999, 2**40])
def test_hash_equals_integer_arithmetic(seed: int, epoch: int) -> None:
    indices = np.array([0, 1, 2, 49_999, 2**31, 2**62 + 1])
    slots = [0, 1, 10, 16, 55, 1000]
    for view in (0, 1, 2, 2**64 - 1):
        keys = image_keys(indices, seed=seed, epoch=epoch, view=view)
        found = uniforms(keys, slots)
        for row, index in enumerate(indices.tolist()):
            scalar = Scalar(index, seed=seed, epoch=epoch, view=view)
            assert int(keys[row]) == scalar.key
            assert found[row].tolist() == [scalar.u(slot) for slot in slots]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64), (17, 90), (90, 17)])
def test_parameters_are_those_of_the_slot_table(height: int, width: int) -> None:
    spec, indices = dataclasses.replace(EVERYTHING, saturation=1.5, crop_scale=(0.2, 0.9)), np.arange(300)
    found = draw(spec, indices, seed=7, epoch=3, view=2, height=height, width=width)
    assert len(found) == 300
    orders = list(itertools.permutations(range(4)))
    for i in range(300):
        s = Scalar(i, seed=7, epoch=3, view=2)
        box = (found.crop_top[i], found.crop_left[i], found.crop_height[i], found.crop_width[i])
        assert box == s.crop(spec, height, width)
        assert found.flip[i] == (s.u(0) < 0.5)
        assert found.jitter[i] == (s.u(1) < 0.8)
        assert tuple(found.jitter_order[i]) == orders[int(24 * s.u(2))]
        assert found.brightness[i] == pytest.approx(s.factor(3, 0.8), rel=1e-14)
        assert found.contrast[i] == pytest.approx(s.factor(4, 0.8), rel=1e-14)
        assert found.saturation[i] == pytest.approx(s.factor(5, 1.5), rel=1e-14)
        assert found.hue[i] == pytest.approx(0.2 * (2 * s.u(6) - 1), rel=1e-12, abs=1e-15)
        assert found.grayscale[i] == (s.u(7) < 0.2)
        assert found.blur[i] == (s.u(8) < 0.5)
        assert found.blur_sigma[i] == pytest.approx(0.1 + 1.9 * s.u(9), rel=1e-14)
        assert found.solarise[i] == (s.u(10) < 0.3)


# Purity


def test_parameters_do_not_depend_on_batch_order_or_world_layout() -> None:
    indices = np.random.default_rng(0).choice(50_000, 240, replace=False)
    whole = draw(EVERYTHING, indices, seed=5, epoch=11)
    shuffled = np.random.default_rng(1).permutation(240)
    assert_same_parameters(draw(EVERYTHING, indices[shuffled], seed=5, epoch=11), rows(whole, shuffled))
    for world_size in (2, 4, 240):
        b = 240 // world_size
        for rank in range(world_size):
            mine = slice(rank * b, (rank + 1) * b)
            assert_same_parameters(draw(EVERYTHING, indices[mine], seed=5, epoch=11), rows(whole, mine))
    for same in (indices.astype(np.int32), indices.astype(np.uint64), torch.from_numpy(indices)):
        assert_same_parameters(draw(EVERYTHING, same, seed=5, epoch=11), whole)


def test_pixels_do_not_depend_on_the_rest_of_the_batch() -> None:
    images, indices = make_images(48), np.arange(48)
    arguments: dict[str, Any] = {"seed": 1, "epoch": 2, "size": 32, "mean": MEAN, "std": STD}
    whole = torch.stack(two_views(images, indices, EVERYTHING, ViewSpec(), **arguments))
    order = np.random.default_rng(0).permutation(48)
    parts = [
        torch.stack(two_views(images[part], indices[part], EVERYTHING, ViewSpec(), **arguments))
        for part in np.split(order, [1, 8, 30])
    ]
    # The operations are the same; only the split of vectors between SIMD lanes and threads may differ.
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, order], rtol=0, atol=5e-6)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"view": 2}, {"index": 1}])
def test_every_part_of_the_counter_changes_every_uniform(change: dict[str, int]) -> None:
    start = {"seed": 0, "epoch": 0, "view": 1, "index": 0}

    def numbers(counter: dict[str, int]) -> NDArray[np.float64]:
        index = counter["index"] + np.arange(0, 20_000, 2)
        keys = image_keys(index, seed=counter["seed"], epoch=counter["epoch"], view=counter["view"])
        return uniforms(keys, range(56))

    one, other = numbers(start), numbers(start | change)
    assert not np.any(one == other)
    # n pairs of independent uniforms correlate by N(0, 1/n); 56 slots and LEVEL give the bound.
    bound = stats.norm.isf(LEVEL / 2 / 56) / math.sqrt(len(one))
    for slot in range(56):
        assert abs(np.corrcoef(one[:, slot], other[:, slot])[0, 1]) < bound


def test_slots_and_neighbours_are_uncorrelated_and_uniform() -> None:
    n = 20_000
    u = uniforms(image_keys(np.arange(n), seed=3, epoch=0, view=1), range(56))
    pairs = 56 * 55 // 2
    correlation = np.asarray(np.corrcoef(u.T))[np.triu_indices(56, k=1)]
    assert len(correlation) == pairs
    assert np.abs(correlation).max() < stats.norm.isf(LEVEL / 2 / pairs) / math.sqrt(n)
    neighbours = [np.corrcoef(u[:-1, slot], u[1:, slot])[0, 1] for slot in range(56)]
    assert np.abs(neighbours).max() < stats.norm.isf(LEVEL / 2 / 56) / math.sqrt(n)
    for slot in range(56):
        assert stats.kstest(u[:, slot], "uniform").pvalue > LEVEL / 56
    assert u.min() >= 0
    assert u.max() < 1


def test_no_random_generator_is_read_or_moved() -> None:
    def states() -> tuple[Any, ...]:
        numpy_state = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator is what must not move
        assert isinstance(numpy_state, tuple)
        return (torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate())

    def views() -> Tensor:
        return torch.stack(
            two_views(make_images(32), np.arange(32), EVERYTHING, EVERYTHING, seed=0, epoch=0, size=32, **UNIT)
        )

    torch.manual_seed(0)
    before = states()
    first = views()
    assert states() == before
    torch.manual_seed(1)
    random.seed(1)
    assert torch.equal(first, views())


# Distributions, against torchvision's own samplers

NUM_DRAWS = 4000


def torchvision_draws(transform: T.Transform, height: int, width: int) -> dict[str, NDArray[np.float64]]:
    """Parameters of a torchvision transform for NUM_DRAWS images."""
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        drawn = [transform.make_params([image]) for _ in range(NUM_DRAWS)]
    return {name: np.array([np.asarray(one[name]) for one in drawn], dtype=np.float64) for name in drawn[0]}


def same_distribution(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """P-value of the chi-square test on a contingency table of discrete samples; rare values are joined."""
    values, counts = np.unique(np.concatenate([ours, theirs]), return_counts=True)
    edges, filled = [-np.inf], 0
    for value, count in zip(values, counts, strict=True):
        filled += count
        if filled >= 40:
            edges.append(value + 0.5)
            filled = 0
    edges[-1] = np.inf
    table = [np.histogram(sample, edges)[0] for sample in (ours, theirs)]
    assert len(edges) > 2
    return float(stats.chi2_contingency(table).pvalue)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (48, 32, (0.08, 1.0), (1 / 2, 2.0)),
        (32, 80, (0.3, 1.0), (3 / 4, 4 / 3)),  # some attempts fail, and some images fall back to the central crop
    ],
)
def test_crops_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    spec = ViewSpec(crop_scale=scale, crop_ratio=ratio)
    ours = draw(spec, np.arange(NUM_DRAWS), height=height, width=width)
    theirs = torchvision_draws(T.RandomResizedCrop(32, scale=scale, ratio=ratio), height, width)
    for name in ("top", "left", "height", "width"):
        assert same_distribution(getattr(ours, f"crop_{name}"), theirs[name]) > LEVEL, name
    # Jointly too: which side is longer, and whether the crop sits in the first half of the room it has.
    ours_joint, theirs_joint = (
        np.sign(h - w) + 3 * np.sign(2 * top + h - height)
        for top, h, w in (
            (ours.crop_top, ours.crop_height, ours.crop_width),
            (theirs["top"], theirs["height"], theirs["width"]),
        )
    )
    assert same_distribution(ours_joint, theirs_joint) > LEVEL


def test_crop_area_and_ratio_are_distributed_as_torchvisions() -> None:
    # A large image, where integer sides are as good as continuous.
    height, width = 1500, 2000
    ours = draw(ViewSpec(crop_scale=(0.08, 1.0)), np.arange(NUM_DRAWS), height=height, width=width)
    theirs = torchvision_draws(T.RandomResizedCrop(32, scale=(0.08, 1.0)), height, width)
    our_area, their_area = ours.crop_height * ours.crop_width, theirs["height"] * theirs["width"]
    assert stats.ks_2samp(our_area, their_area).pvalue > LEVEL
    assert stats.ks_2samp(ours.crop_width / ours.crop_height, theirs["width"] / theirs["height"]).pvalue > LEVEL
    # Where nothing is rejected the laws are known: uniform area, log-uniform ratio, uniform place.
    small = draw(ViewSpec(crop_scale=(0.1, 0.4)), np.arange(NUM_DRAWS), height=height, width=height)
    area = small.crop_height * small.crop_width / height**2
    assert stats.kstest(area, stats.uniform(0.1, 0.3).cdf).pvalue > LEVEL
    log_ratio = np.log(small.crop_width / small.crop_height)
    assert stats.kstest(log_ratio, stats.uniform(math.log(3 / 4), math.log(16 / 9)).cdf).pvalue > LEVEL
    assert stats.kstest(small.crop_top / (height - small.crop_height), "uniform").pvalue > LEVEL
    assert stats.kstest(small.crop_left / (height - small.crop_width), "uniform").pvalue > LEVEL


@pytest.mark.parametrize(("height", "width"), [(20, 100), (100, 20)])
def test_impossible_crops_fall_back_to_torchvisions_central_crop(height: int, width: int) -> None:
    spec = ViewSpec(crop_scale=(0.9, 1.0))
    ours = draw(spec, np.arange(50), height=height, width=width)
    theirs = T.RandomResizedCrop(32, scale=(0.9, 1.0)).make_params([torch.zeros(3, height, width)])
    for name, value in theirs.items():
        assert getattr(ours, f"crop_{name}").tolist() == [value] * 50


def test_jitter_is_distributed_as_torchvisions() -> None:
    amounts = {"brightness": 0.4, "contrast": 0.8, "saturation": 1.5, "hue": 0.1}
    ours = draw(ViewSpec(**amounts), np.arange(NUM_DRAWS))  # type: ignore[arg-type]
    theirs = torchvision_draws(T.ColorJitter(**amounts), 32, 32)
    for name in amounts:
        found = getattr(ours, name)
        assert stats.ks_2samp(found, theirs[f"{name}_factor"]).pvalue > LEVEL, name
    assert ours.saturation.min() >= 0  # 1 - 1.5 is cut at 0
    code = np.array([1000, 100, 10, 1])
    our_order, their_order = ours.jitter_order @ code, theirs["fn_idx"].astype(np.int64) @ code
    assert len(np.unique(our_order)) == 24
    assert same_distribution(our_order, their_order) > LEVEL


def test_blur_sigma_is_distributed_as_torchvisions() -> None:
    ours = draw(ViewSpec(blur_probability=1, blur_sigma=(0.3, 1.7)), np.arange(NUM_DRAWS))
    theirs = torchvision_draws(T.GaussianBlur(3, sigma=(0.3, 1.7)), 32, 32)
    assert stats.ks_2samp(ours.blur_sigma, theirs["sigma"][:, 0]).pvalue > LEVEL


@pytest.mark.parametrize(
    ("field", "flag"),
    [
        ("flip_probability", "flip"),
        ("jitter_probability", "jitter"),
        ("grayscale_probability", "grayscale"),
        ("blur_probability", "blur"),
        ("solarise_probability", "solarise"),
    ],
)
def test_flags_come_up_with_their_probability(field: str, flag: str) -> None:
    n = 20_000

    def with_probability(probability: float) -> ViewSpec:
        changes: dict[str, Any] = {field: probability}
        return ViewSpec(**changes)

    for probability in (0.05, 0.2, 0.5, 0.8):
        spec = with_probability(probability)
        count = int(getattr(draw(spec, np.arange(n)), flag).sum())
        assert stats.binomtest(count, n, probability).pvalue > LEVEL
    for probability in (0, 1):
        spec = with_probability(probability)
        assert (getattr(draw(spec, np.arange(n)), flag) == bool(probability)).all()


# Pixels, against torchvision's functions in float64 with the same parameters
#
# Bounds: a view is a sum of at most a few dozen products of numbers in [0, 1] per axis, then some ten operations on
# [0, 1] with rounding errors of 2**-24 = 6e-8 each, amplified by at most the product of the jitter factors (1.8**3).

CROP_BOUND = 5e-7
VIEW_BOUND = 5e-6  # torchvision computes hue in float32 whatever it is given, and its hue carries the largest error


def reference_view(
    image: Tensor, p: ViewParameters, spec: ViewSpec, size: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Views of uint8 (b, H, W, 3) by torchvision, one image at a time, (b, 3, S, S), not normalised."""
    views = []
    for i in range(len(image)):
        view = image[i].permute(2, 0, 1).to(dtype) / 255
        box = [int(side[i]) for side in (p.crop_top, p.crop_left, p.crop_height, p.crop_width)]
        mode = T.InterpolationMode(spec.interpolation)
        view = TF.resized_crop(view, *box, [size, size], interpolation=mode, antialias=True)
        view = view.clamp(0, 1)
        if p.flip[i]:
            view = TF.horizontal_flip(view)
        if p.jitter[i]:
            adjust: list[Callable[[Tensor], Tensor]] = [
                lambda x, i=i: TF.adjust_brightness(x, float(p.brightness[i])),  # type: ignore[misc]
                lambda x, i=i: TF.adjust_contrast(x, float(p.contrast[i])),  # type: ignore[misc]
                lambda x, i=i: TF.adjust_saturation(x, float(p.saturation[i])),  # type: ignore[misc]
                lambda x, i=i: TF.adjust_hue(x, float(p.hue[i])),  # type: ignore[misc]
            ]
            for operation in p.jitter_order[i]:
                view = adjust[operation](view)
        if p.grayscale[i]:
            view = TF.rgb_to_grayscale(view, num_output_channels=3)
        if p.blur[i]:
            kernel, sigma = blur_kernel_size(spec, size), float(p.blur_sigma[i])
            view = TF.gaussian_blur(view, [kernel, kernel], [sigma, sigma])
        if p.solarise[i]:
            view = TF.solarize(view, spec.solarise_threshold)
        views.append(view)
    return torch.stack(views)


SIZES = [(32, 32, 32), (48, 40, 32), (32, 32, 96), (37, 53, 24), (96, 96, 32), (224, 180, 160)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_crop_resize_and_flip_equal_torchvision(height: int, width: int, size: int, interpolation: Any) -> None:
    spec = ViewSpec(crop_scale=(0.05, 1.0), interpolation=interpolation)
    n = 60
    drawn = draw(spec, np.arange(n), height=height, width=width)
    p = dataclasses.replace(drawn, **{name: np.zeros(n, bool) for name in ("jitter", "grayscale")})
    # The corners of the space too: one pixel, one row, one column, and the whole image.
    for row, (h, w) in enumerate([(1, 1), (1, width), (height, 1), (height, width)]):
        p.crop_height[row], p.crop_width[row], p.crop_top[row], p.crop_left[row] = h, w, height - h, width - w
    assert p.flip.any()
    assert not p.flip.all()
    images = make_images(n, height, width)
    difference = (apply_view(images, p, spec, size=size, **UNIT) - reference_view(images, p, spec, size)).abs()
    assert difference.max() < CROP_BOUND


FORCED: dict[str, dict[str, Any]] = {
    "brightness": {"jitter": True, "brightness": (0.0, 0.3, 1.0, 1.7)},
    "contrast": {"jitter": True, "contrast": (0.0, 0.3, 1.0, 1.7)},
    "saturation": {"jitter": True, "saturation": (0.0, 0.3, 1.0, 1.7)},
    "hue": {"jitter": True, "hue": (-0.5, -0.1, 0.0, 0.27, 0.5)},
    "grayscale": {"grayscale": True},
    "blur": {"blur": True, "blur_sigma": (0.1, 0.5, 2.0)},
    "solarise": {"solarise": True},
    "flip": {"flip": True},
}


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("size", [32, 96])
def test_each_operation_alone_equals_torchvision(name: str, size: int) -> None:
    n = 30
    changes = {field: np.resize(np.asarray(value), n) for field, value in FORCED[name].items()}
    p, images, spec = identity(n, size, size, **changes), make_images(n, size, size), ViewSpec()
    found = apply_view(images, p, spec, size=size, **UNIT)
    assert (found - reference_view(images, p, spec, size)).abs().max() < VIEW_BOUND
    untouched = plain_view(images, **UNIT)
    assert (found - untouched).abs().max() > 0.1, "the operation did nothing"


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_each_order_of_the_colour_operations_equals_torchvision(order: tuple[int, ...]) -> None:
    n = 12
    rng = np.random.default_rng(sum(10**k * v for k, v in enumerate(order)))
    p = identity(
        n,
        jitter=np.ones(n, bool),
        jitter_order=np.tile(order, (n, 1)),
        hue=rng.uniform(-0.5, 0.5, n),
        brightness=rng.uniform(0.2, 1.8, n),
        contrast=rng.uniform(0.2, 1.8, n),
        saturation=rng.uniform(0.2, 1.8, n),
    )
    images = make_images(n)
    found = apply_view(images, p, ViewSpec(), size=32, **UNIT)
    assert (found - reference_view(images, p, ViewSpec(), 32)).abs().max() < VIEW_BOUND


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_whole_views_equal_torchvision(height: int, width: int, size: int, interpolation: Any) -> None:
    spec = dataclasses.replace(EVERYTHING, interpolation=interpolation)
    n = 80 if size < 100 else 16
    images, p = make_images(n, height, width), draw(spec, np.arange(n), height=height, width=width)
    expected = reference_view(images, p, spec, size)
    found = apply_view(images, p, spec, size=size, **UNIT)
    assert (found - expected).abs().max() < VIEW_BOUND
    normalised = apply_view(images, p, spec, size=size, mean=MEAN, std=STD)
    expected = TF.normalize(expected, list(MEAN), list(STD))
    assert (normalised - expected).abs().max() < VIEW_BOUND / min(STD)


@pytest.mark.parametrize(("height", "width", "size"), SIZES[:-1])
def test_whole_views_equal_torchvision_in_float32(height: int, width: int, size: int) -> None:
    # What a user of torchvision gets. Its float32 resize rounds positions in the image and ours does not, so the
    # difference grows with the side; here it may take 2e-5, half a hundredth of a grey level of 8-bit images.
    images, p = make_images(80, height, width), draw(EVERYTHING, np.arange(80), height=height, width=width)
    expected = reference_view(images, p, EVERYTHING, size, torch.float32)
    assert (apply_view(images, p, EVERYTHING, size=size, **UNIT) - expected).abs().max() < 2e-5


def test_hue_equals_colorsys() -> None:
    # HSV in float64 from the standard library, on images of one pixel; with grays, primaries and near-ties.
    levels = [0, 1, 100, 101, 254, 255]
    pixels = np.array(list(itertools.product(levels, repeat=3)), dtype=np.uint8)
    pixels, turns = np.repeat(pixels, 11, axis=0), np.tile(np.linspace(-0.5, 0.5, 11), len(pixels))
    n = len(pixels)
    p = identity(n, 1, 1, jitter=np.ones(n, bool), hue=turns)
    found = apply_view(torch.from_numpy(pixels).view(n, 1, 1, 3), p, ViewSpec(), size=1, **UNIT).view(n, 3)
    hsv = (colorsys.rgb_to_hsv(*pixel) for pixel in pixels / 255)
    expected = [colorsys.hsv_to_rgb((h + turn) % 1, s, v) for (h, s, v), turn in zip(hsv, turns.tolist(), strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


# Properties


def test_views_are_float32_channels_last_and_differ() -> None:
    images = make_images(16)
    kept = images.clone()
    views = two_views(images, np.arange(16), ViewSpec(), ViewSpec(), seed=0, epoch=0, size=24, mean=MEAN, std=STD)
    for view in views:
        assert view.shape == (16, 3, 24, 24)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert not view.requires_grad
        assert not view.is_inference()
    for one, other in zip(*views, strict=True):
        assert not torch.allclose(one, other)
    assert torch.equal(images, kept)
    plain = plain_view(images, mean=MEAN, std=STD)
    assert plain.is_contiguous(memory_format=torch.channels_last)


def test_plain_view_equals_torchvision() -> None:
    images = make_images(8, 20, 30)
    expected = TF.normalize(images.permute(0, 3, 1, 2).double() / 255, list(MEAN), list(STD))
    found = plain_view(images, mean=MEAN, std=STD)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-6
    for size in (12, 28):
        resized = TF.resize(expected, [size, size], antialias=True)
        assert (plain_view(images, mean=MEAN, std=STD, size=size) - resized).abs().max() < 1e-5
    assert torch.equal(plain_view(images[:, :20, :20], mean=MEAN, std=STD, size=20), found[..., :20])
    nothing = apply_view(images[:, :20, :20], identity(8, 20, 20), ViewSpec(), size=20, mean=MEAN, std=STD)
    torch.testing.assert_close(nothing, found[..., :20], rtol=0, atol=2e-6)


def test_flip_mirrors_and_grayscale_equalises_and_solarise_inverts() -> None:
    images, spec = make_images(8), ViewSpec(solarise_threshold=0.25)
    yes = np.ones(8, bool)
    plain = plain_view(images, **UNIT)
    flipped = apply_view(images, identity(8, flip=yes), spec, size=32, **UNIT)
    torch.testing.assert_close(flipped.flip(3), plain, rtol=0, atol=1e-6)
    gray = apply_view(images, identity(8, grayscale=yes), spec, size=32, **UNIT)
    assert torch.equal(gray[:, 0], gray[:, 1])
    assert torch.equal(gray[:, 0], gray[:, 2])
    solarised = apply_view(images, identity(8, solarise=yes), spec, size=32, **UNIT)
    bright = plain >= 0.25
    torch.testing.assert_close(solarised[bright], 1 - plain[bright], rtol=0, atol=1e-6)
    torch.testing.assert_close(solarised[~bright], plain[~bright], rtol=0, atol=1e-6)


def test_bicubic_overshoot_is_clamped() -> None:
    edge = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    edge[:, :, 16:] = 255
    raw = TF.resize(edge.permute(0, 3, 1, 2).double() / 255, [96, 96], T.InterpolationMode.BICUBIC, antialias=True)
    assert raw.min() < -0.01
    assert raw.max() > 1.01
    found = apply_view(edge, identity(1), ViewSpec(interpolation="bicubic"), size=96, **UNIT)
    assert (found - raw.clamp(0, 1)).abs().max() < CROP_BOUND


def test_each_view_has_its_own_settings() -> None:
    images, indices = make_images(64), np.arange(64)
    plain = ViewSpec(crop_scale=(1, 1), crop_ratio=(1, 1), flip_probability=0, jitter_probability=0)
    plain = dataclasses.replace(plain, grayscale_probability=0)
    solarised = dataclasses.replace(plain, solarise_probability=1)
    untouched = plain_view(images, **UNIT)
    for specs, changed in (((plain, solarised), 1), ((solarised, plain), 0)):
        views = two_views(images, indices, *specs, seed=0, epoch=0, size=32, **UNIT)
        torch.testing.assert_close(views[1 - changed], untouched, rtol=0, atol=1e-6)
        assert (views[changed] - untouched).abs().max() > 0.5


def test_two_views_are_views_1_and_2_of_the_seed_and_epoch() -> None:
    images, indices = make_images(10), np.arange(100, 110)
    specs = (EVERYTHING, ViewSpec())
    views = two_views(images, indices, *specs, seed=3, epoch=4, size=32, mean=MEAN, std=STD)
    for view, (found, spec) in enumerate(zip(views, specs, strict=True), start=1):
        p = draw(spec, indices, seed=3, epoch=4, view=view)
        assert torch.equal(found, apply_view(images, p, spec, size=32, mean=MEAN, std=STD))


def test_reduced_precision_settings_of_training_do_not_reach_the_views() -> None:
    images, p = make_images(32), draw(EVERYTHING, np.arange(32))
    expected = apply_view(images, p, EVERYTHING, size=32, mean=MEAN, std=STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply_view(images, p, EVERYTHING, size=32, mean=MEAN, std=STD)
    assert torch.equal(found, expected)


def test_empty_batch_gives_empty_views() -> None:
    images, indices = make_images(4)[:0], np.arange(0)
    for view in two_views(images, indices, EVERYTHING, ViewSpec(), seed=0, epoch=0, size=24, mean=MEAN, std=STD):
        assert view.shape == (0, 3, 24, 24)


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (16, 3), (64, 7), (96, 9), (224, 23)])
def test_blur_kernel_is_a_tenth_of_the_side_and_odd(size: int, kernel: int) -> None:
    assert blur_kernel_size(ViewSpec(), size) == kernel
    assert blur_kernel_size(ViewSpec(blur_kernel=5), size) == 5


def test_description_tells_every_setting() -> None:
    changes: dict[str, Any] = {
        "crop_scale": (0.3, 1.0),
        "crop_ratio": (0.5, 2.0),
        "interpolation": "bilinear",
        "blur_sigma": (0.2, 1.0),
        "blur_kernel": 5,
        "solarise_threshold": 0.4,
        "hue": 0.3,
    }
    for field in dataclasses.fields(ViewSpec):
        changes.setdefault(field.name, 0.77)
    lines = {describe(dataclasses.replace(EVERYTHING, **{name: value})) for name, value in changes.items()}
    assert len(lines | {describe(EVERYTHING)}) == len(dataclasses.fields(ViewSpec)) + 1
    assert all("\n" not in line for line in lines)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would show that CUDA gives the CPU's views without waiting")
def test_cuda_gives_the_views_of_the_cpu_without_waiting() -> None:
    images, indices = make_images(64, 48, 40), np.arange(64)
    arguments: dict[str, Any] = {"seed": 0, "epoch": 0, "size": 32, "mean": MEAN, "std": STD}
    on_cpu = torch.stack(two_views(images, indices, EVERYTHING, EVERYTHING, **arguments))
    on_device = images.cuda()
    precision = torch.get_float32_matmul_precision()
    torch.cuda.synchronize()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.cuda.set_sync_debug_mode("error")
        found = two_views(on_device, indices, EVERYTHING, EVERYTHING, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(precision)
    torch.testing.assert_close(torch.stack(found).cpu(), on_cpu, rtol=0, atol=VIEW_BOUND / min(STD))


# Wrong input


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("crop_scale", (0.0, 1.0), "0 < low <= high <= 1"),
        ("crop_scale", (0.2, 1.1), "0 < low <= high <= 1"),
        ("crop_scale", (0.9, 0.2), "0 < low <= high <= 1"),
        ("crop_scale", 0.2, "a list of 2"),
        ("crop_scale[0]", (math.nan, 1.0), "a finite number"),
        ("crop_ratio", (0.0, 1.0), "0 < low <= high"),
        ("crop_ratio[1]", (1.0, math.inf), "a finite number"),
        ("crop_ratio", (1.0, 1.0, 1.0), "a list of 2"),
        ("interpolation", "nearest", "one of bilinear, bicubic"),
        ("flip_probability", 1.1, "[0, 1]"),
        ("jitter_probability", -0.1, "[0, 1]"),
        ("grayscale_probability", "0.2", "a number"),
        ("blur_probability", math.nan, "a finite number"),
        ("solarise_probability", True, "a number"),
        ("brightness", -0.4, "at least 0"),
        ("contrast", math.inf, "a finite number"),
        ("saturation", None, "a number"),
        ("hue", 0.6, "[0, 0.5]"),
        ("blur_sigma", (0.0, 2.0), "0 < low <= high"),
        ("blur_sigma[0]", ("a", "b"), "a number"),
        ("blur_kernel", 4, "an odd number, or None"),
        ("blur_kernel", -1, "at least 1"),
        ("blur_kernel", 3.0, "a whole number"),
        ("solarise_threshold", 128.0, "[0, 1]"),
    ],
)
def test_spec_names_field_value_and_range(field: str, value: Any, allowed: str) -> None:
    name, _, place = field.partition("[")
    given = value[int(place[0])] if place else value
    with pytest.raises(ValueError) as error:  # noqa: PT011 - most of the message is compared
        ViewSpec(**{name: value})
    assert str(error.value).startswith(f"{field} is {given!r}, expected ")
    assert allowed in str(error.value)


def test_spec_read_from_json_equals_the_one_written() -> None:
    as_json: dict[str, Any] = {
        name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(EVERYTHING).items()
    }
    assert ViewSpec(**as_json) == EVERYTHING
    assert hash(ViewSpec(**as_json)) == hash(EVERYTHING)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (torch.zeros(2, 32, 32, 3), "torch.float32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"\(2, 3, 32, 32\)"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), r"\(32, 32, 3\)"),
        (torch.zeros(2, 0, 32, 3, dtype=torch.uint8), r"\(2, 0, 32, 3\)"),
    ],
)
def test_images_must_be_uint8_pixels(image: Tensor, found: str) -> None:
    expected = rf"image must be uint8 of shape \(b, H, W, 3\), got .*{found}"
    spec = ViewSpec()
    with pytest.raises(ValueError, match=expected):
        plain_view(image, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=expected):
        apply_view(image, identity(2), spec, size=32, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=expected):
        two_views(image, np.arange(2), spec, spec, seed=0, epoch=0, size=32, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": np.arange(4.0)}, "indices must be integers of shape .* got float64"),
        ({"indices": np.zeros((4, 1), np.int64)}, r"indices must be integers .* \(4, 1\)"),
        ({"indices": np.array([3, -1])}, "indices must be >= 0, got -1"),
        ({"indices": torch.zeros(2, dtype=torch.int64, device="meta")}, "indices must be in host memory"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
        ({"epoch": 2**64}, "epoch must be an integer"),
        ({"epoch": 0.5}, "epoch must be an integer .* got 0.5"),
        ({"view": True}, "view must be an integer .* got True"),
        ({"height": 0}, "height must be an integer >= 1, got 0"),
        ({"width": 3.0}, "width must be an integer >= 1, got 3.0"),
    ],
)
def test_sampling_names_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"indices": np.arange(4), "seed": 0, "epoch": 0, "view": 1, "height": 32, "width": 32}
    sample_parameters(ViewSpec(), **good)
    with pytest.raises(ValueError, match=message):
        sample_parameters(ViewSpec(), **(good | arguments))


@pytest.mark.parametrize(
    ("parameters", "arguments", "message"),
    [
        (identity(3), {}, "crop_top has 3 rows, but there are 4 images"),
        (identity(4, hue=np.zeros(3)), {}, "hue has 3 rows, but there are 4 images"),
        (identity(4, 33, 32), {}, "crop of image 0 leaves the 32 x 32 image: top 0, left 0, height 33, width 32"),
        (identity(4, crop_left=np.array([0, 0, 5, 0])), {}, "crop of image 2 leaves"),
        (identity(4, crop_top=np.array([0, -1, 0, 0])), {}, "crop of image 1 leaves"),
        (identity(4, jitter_order=np.zeros((4, 4), np.int64)), {}, "jitter_order must hold 0, 1, 2 and 3 once"),
        (identity(4), {"size": 0}, "size must be an integer >= 1, got 0"),
        (identity(4), {"mean": (0.5, 0.5)}, "mean must be 3 finite numbers"),
        (identity(4), {"std": (0.5, 0.0, 0.5)}, "std must be 3 finite numbers > 0"),
        (identity(4, blur=np.ones(4, bool)), {"size": 8, "kernel": 17}, "blur_kernel 17 is too wide .* 8 px .* 15"),
    ],
)
def test_applying_names_wrong_arguments(parameters: ViewParameters, arguments: dict[str, Any], message: str) -> None:
    arguments = {"size": 32, "mean": MEAN, "std": STD, **arguments}
    spec = ViewSpec(blur_kernel=arguments.pop("kernel", None))
    with pytest.raises(ValueError, match=message):
        apply_view(make_images(4), parameters, spec, **arguments)


def test_names_of_slots_and_operations_are_those_of_the_table() -> None:
    names = "FLIP JITTER JITTER_ORDER BRIGHTNESS CONTRAST SATURATION HUE GRAYSCALE BLUR BLUR_SIGMA SOLARISE"
    assert [(slot.name, slot.value) for slot in Slot] == [
        *((n, i) for i, n in enumerate(names.split())),
        ("CROP", 16),
        ("OWN", 1024),
    ]
    assert [op.name for op in sorted(JitterOperation)] == ["BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"]
