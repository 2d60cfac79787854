"""The representations of any folder of images, or of a .beton file, as a table for other programs.

    python -m simclr.embed --run results/cifar10-simclr-100-seed0 --images photos --output features.parquet
    python -m simclr.embed --run results/cifar10-simclr-100-seed0/encoder --images photos --output features.npy

Images are read as ``data_prep`` reads them, and brought to the form of those pretrained on.

features.parquet    a row for each image: file (below the folder), feature (D numbers); needs pyarrow
features.npy        float32 (n, D), with features.json beside it: the files in the order of the rows
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_prep.convert import map_in_order
from data_prep.find import Found, all_images, as_text
from data_prep.image_folder import describe_outcome, describe_unreadable, list_unreadable
from data_prep.read_image import Loaded, read_image
from simclr import beton, files, parts, system
from simclr.evaluation import DivergedError, combined_sha256, fingerprint
from simclr.export import WEIGHTS, Encoder, load_encoder, metadata_of
from simclr.models import representation_width
from simclr.run import checkpoint, launch
from simclr.schema import Size
from simclr.views import plain_view

Add = Callable[[Sequence[str], NDArray[np.float32]], None]
"""Adds rows to an output: names, and representations (m, D)."""


@dataclass(frozen=True)
class Options:
    """What to embed, by which encoder, and where to."""

    run: Path
    """A run's folder, a checkpoint, or what ``python -m simclr.export`` wrote."""
    images: Path
    """A folder: every image in it and in the folders below, with or without classes. Or FILE.beton, whose images are
    named by their class and number, such as cat/17."""
    output: Path
    """FILE.parquet, or FILE.npy with FILE.json beside it."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What to do if some images cannot be read. All of them are listed in either case."""
    batch_size: Size = 256
    """Images at a time."""
    image_size: Size | None = None
    """Side in pixels at which the encoder reads images, such as linear_probe.py --image-sizes finds. Default: as those
    pretrained on are stored, or as exported."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward pass. Features are float32 in either case."""
    parts: Path | None = None
    """The file that the run was trained with, if it has parts of its own; it is executed."""
    device: str | None = None
    """Such as cpu or cuda:1. Default: the first accelerator, the CPU if there is none."""
    force: bool = False
    """Replace an output that is there."""


@files.explain_refusals()
def main(options: Options) -> Path:
    """Embed a folder of images.

    Returns:
        The output.

    Raises:
        ValueError: If the encoder, the images or the output cannot be used as asked; the message says what to do.
    """
    output = options.output
    open_output = _kind_of(output)
    if output.exists() and not options.force:
        raise ValueError(f"{output} is already there; replace it with --force, or choose another --output")
    device = _device(options.device)
    if options.parts is not None:
        parts.load(options.parts)
    encoder = open_encoder(options.run, device, options.image_size)
    representation_width(encoder.encoder, encoder.read_at)
    images = (open_beton if options.images.suffix == ".beton" else open_folder)(options.images, encoder)
    side, read_at = encoder.image_size, encoder.read_at
    then = f", read at {read_at} x {read_at}" if read_at != side else ""
    print(f"encoder:    {options.run} ({encoder.metadata['encoder']}, step {encoder.metadata['step']})")
    print(f"images:     {options.images}: {len(images.names):,} images, brought to {side} x {side}{then}")
    print(f"device:     {device}, {options.precision}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = _about(encoder, options)
    bad_files = output.with_name(output.name + ".unreadable.txt")
    bad_files.unlink(missing_ok=True)  # an earlier attempt's
    changes: Counter[str] = Counter()
    with open_output(output, about) as add:
        reasons = compute(encoder, images, add, changes, options, device)
        if reasons:
            list_unreadable(reasons, bad_files)
            if options.unreadable == "refuse":
                raise ValueError(describe_unreadable(reasons, bad_files))
            images.found.left_out[f"files that cannot be read, listed in {bad_files}", ""] += len(reasons)
        if not (rows := len(images.names) - len(reasons)):
            raise ValueError(f"not one image of {options.images} is readable; nothing was written")
    print(describe_outcome(images.found, [f"{output}: {rows:,} images, {about['width']} numbers each"], changes))
    return output


def open_encoder(path: Path, device: torch.device, read_at: int | None = None) -> Encoder:
    """Load the encoder of a run, a checkpoint, or an export.

    Args:
        path: Where it lies.
        device: Where it goes.
        read_at: Side in pixels that images are resized to for it. None: as stored, or as exported.

    Raises:
        CheckpointError: As :func:`simclr.run.checkpoint.load_pretrained` and :func:`simclr.export.load_encoder`.
    """
    if path.suffix == ".safetensors" or (path / WEIGHTS).is_file():
        encoder = load_encoder(path, device)
        return Encoder(encoder.encoder, encoder.metadata | ({} if read_at is None else {"read_at": str(read_at)}))
    checkpoint.require_safe_loading()
    pretrained = checkpoint.load_pretrained(path)
    return Encoder(pretrained.model.encoder.to(device).eval(), metadata_of(pretrained, read_at))


@dataclass(frozen=True)
class Images:
    """What is embedded."""

    names: Sequence[str]
    """Below the folder, with / between their parts."""
    read: Callable[[int], Loaded | str]
    """An image of the encoder's size by its place in ``names``, or why there is none."""
    found: Found
    """What is left out."""


def open_folder(folder: Path, encoder: Encoder) -> Images:
    """List every image below a folder. Raises ConversionError if there is none."""
    names, found = all_images(folder)

    def read(i: int) -> Loaded | str:
        loaded = read_image(folder / names[i], encoder.image_size)
        return as_stored(loaded, encoder) if isinstance(loaded, Loaded) else loaded

    return Images(names, read, found)


def open_beton(path: Path, encoder: Encoder) -> Images:
    """Take the images of a converted file, in its order.

    Raises:
        BetonError: If it is damaged.
        ValueError: If its images have another size than those pretrained on.
    """
    facts = beton.verify(path)
    side = encoder.image_size
    if (facts.height, facts.width) != (side, side):
        raise ValueError(
            f"{path} holds images of {facts.height} x {facts.width} pixels, but the encoder takes {side} x {side}; "
            "convert them to that size, or name the folder that they came from"
        )
    pixels, labels = beton.read(path)
    names = [f"{facts.classes[label]}/{i}" if label >= 0 else str(i) for i, label in enumerate(labels)]
    return Images(names, lambda i: Loaded(pixels[i], False, ()), Found())


def compute(
    encoder: Encoder, images: Images, add: Add, changes: Counter[str], options: Options, device: torch.device
) -> dict[Path, str]:
    """Compute the representations of all images that can be read.

    Args:
        encoder: On ``device``.
        images: What is asked for.
        add: Gets each batch as soon as it is computed.
        changes: Gets what was done to images, in words that follow a number of them, and how many they are.
        options: How. Where one unreadable file is refused, nothing is computed after it: the rest is only read.
        device: Where to compute.

    Returns:
        Files that cannot be read, and why.

    Raises:
        DivergedError: If a representation is not finite.
    """
    reasons: dict[Path, str] = {}
    started, number, computed = time.perf_counter(), len(images.names), 0
    with (
        ThreadPoolExecutor(system.usable_cores()) as pool,
        tqdm(total=number, unit=" images", disable=None) as progress,
    ):
        start = 0
        for results in map_in_order(pool, images.read, range(number), options.batch_size):
            names: list[str] = []
            pixels = []
            for name, found in zip(images.names[start : start + len(results)], results, strict=True):
                if isinstance(found, Loaded):
                    names.append(as_text(name))
                    pixels.append(found.pixels)
                    changes.update(found.changes)
                else:
                    reasons[options.images / name] = found
            start += len(results)
            progress.update(len(results))
            if not names or (reasons and options.unreadable == "refuse"):
                continue
            batch = torch.from_numpy(np.stack(pixels)).to(device)
            features = embed(encoder, batch, options.precision).cpu().numpy()
            if not np.isfinite(features).all():
                raise DivergedError(
                    f"representations of {names[0]} and others are not finite: the encoder's weights have diverged"
                    + (", or try --precision fp32" if options.precision != "fp32" else "")
                )
            add(names, features)
            computed += len(names)
    seconds = time.perf_counter() - started
    print(f"computed:   {computed:,} images in {seconds:.1f} s, {computed / seconds:,.0f} images/s")
    return reasons


@torch.inference_mode()
def embed(encoder: Encoder, images: Tensor, precision: Literal["fp32", "bf16"] = "fp32") -> Tensor:
    """Return the representations of images as they are stored, as the probe computes them.

    Args:
        encoder: An encoder, and the normalisation of its images.
        images: uint8 (b, H, W, 3), RGB, on the encoder's device.
        precision: Number format of the forward pass.

    Returns:
        float32 (b, D), on the same device.
    """
    mean, std = encoder.normalisation
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        representation: Tensor = encoder.encoder(plain_view(images, mean=mean, std=std, size=encoder.read_at))
    return representation.float()


def as_stored(image: Loaded, encoder: Encoder) -> Loaded:
    """Return the image as the training images were stored: compressed, too, where those are kept as JPEG."""
    quality = json.loads(encoder.metadata["jpeg_quality"])
    if encoder.metadata["encoding"] == "raw" or quality is None:
        return image
    with Image.open(io.BytesIO(beton.encode_jpeg(image.pixels, quality))) as compressed:
        pixels = np.asarray(compressed.convert("RGB"))
    return dataclasses.replace(image, pixels=pixels)


# ---------------------------------------------------------------------------------------------------------------
# Outputs


@contextlib.contextmanager
def _npy(path: Path, about: dict[str, Any]) -> Iterator[Add]:
    """float32 (n, D) in FILE.npy; FILE.json has the files' names, and what the numbers depend on."""
    files_so_far: list[str] = []
    with files.atomic_write(path) as file:

        def write_header() -> None:
            # numpy leaves room in it for any number of rows, so that the one with the final number is as long.
            file.seek(0)
            shape = (len(files_so_far), about["width"])
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})

        def add(names: Sequence[str], features: NDArray[np.float32]) -> None:
            files_so_far.extend(names)
            file.write(features.astype("<f4").tobytes())

        write_header()
        yield add
        write_header()
        path.unlink(missing_ok=True)  # so that no one ever finds numbers beside other names
        names = json.dumps({**about, "files": files_so_far}, indent=1)
        files.replace(path.with_suffix(".json"), names, durable=True)


@contextlib.contextmanager
def _parquet(path: Path, about: dict[str, Any]) -> Iterator[Add]:
    """Columns file and feature; what the numbers depend on stands in the schema's metadata under "simclr"."""
    import pyarrow
    import pyarrow.parquet

    feature = pyarrow.list_(pyarrow.float32(), about["width"])
    columns = [("file", pyarrow.string()), ("feature", feature)]
    schema = pyarrow.schema(columns, metadata={"simclr": json.dumps(about)})
    with files.atomic_write(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as table:

        def add(names: Sequence[str], features: NDArray[np.float32]) -> None:
            values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), type=feature)
            table.write_table(pyarrow.table([pyarrow.array(names), values], schema=schema))

        yield add


def _kind_of(output: Path) -> Callable[[Path, dict[str, Any]], contextlib.AbstractContextManager[Add]]:
    """Return how an output is written, or say before anything is computed why it cannot be."""
    kind = output.suffix.lower()
    if kind not in (".npy", ".parquet"):
        raise ValueError(f"--output {output}: expected a file ending in .parquet or .npy")
    if kind == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f'--output {output} needs pyarrow: pip install "simclr[parquet]", or pip install pyarrow. FILE.npy does not'
        )
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file in it")
    return _npy if kind == ".npy" else _parquet


def _about(encoder: Encoder, options: Options) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "encoder": encoder.metadata["encoder"],
        "encoder_sha256": combined_sha256(fingerprint(encoder.encoder)),
        "pretrained_on": encoder.metadata["pretrained_on"],
        "normalisation": encoder.normalisation,
        "image_size": encoder.image_size,
        "read_at": encoder.read_at,
        "stored_as": [encoder.metadata["encoding"], encoder.metadata["jpeg_quality"]],
        "precision": options.precision,
        "images": str(options.images),
        "width": int(encoder.metadata["representation_dim"]),
    }


def _device(name: str | None) -> torch.device:
    """Return the device that is asked for, or the first accelerator, or the CPU."""
    if name is not None:
        try:
            return torch.zeros(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"--device {name}: {reason}") from error
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and not launch.cpu_is_asked_for():
        return found
    system.keep_freed_memory()
    return torch.device("cpu")


if __name__ == "__main__":
    system.outlive_readers()
    try:
        main(tyro.cli(Options, prog="python -m simclr.embed", description=__doc__))
    except ValueError as error:
        sys.exit(f"simclr.embed: {error}")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
