"""The representations of any folder of images, or of a .beton file, as a table for other programs.

    python -m simclr.embed --run results/cifar10-simclr-100-seed0 --images photos --output features.parquet
    python -m simclr.embed --run results/cifar10-simclr-100-seed0/encoder --images photos --output features.npy

Images are read as ``data_prep`` reads them, and brought to the form of those pretrained on. A run that was interrupted
goes on when the same command is given again: what was computed lies in OUTPUT.partial until all is.

features.parquet    a row for each image: file (below the folder), feature (D numbers); needs pyarrow
features.npy        float32 (n, D), with features.json beside it: the files in the order of the rows
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

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
from simclr import beton, parts
from simclr.evaluation import DivergedError, combined_sha256, fingerprint
from simclr.export import WEIGHTS, Encoder, load_encoder, metadata_of
from simclr.run import checkpoint, files, host, launch
from simclr.schema import Size
from simclr.views import plain_view

_WRITTEN_AT_ONCE = 4096  # rows


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
    """What to do if some images cannot be read. All of them are listed in either case, and the others are computed."""
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
    """Begin anew, and replace an output that is there."""


@files.explain_refusals()
def main(options: Options) -> Path:
    """Embed a folder of images.

    Returns:
        The output.

    Raises:
        ValueError: If the encoder, the images or the output cannot be used as asked; the message says what to do.
    """
    writer = _writer_for(options.output)
    device = _device(options.device)
    if options.parts is not None:
        parts.load(options.parts)
    encoder = open_encoder(options.run, device, options.image_size)
    images = (open_beton if options.images.suffix == ".beton" else open_folder)(options.images, encoder)
    job = _job(encoder, options.precision, device)
    digest = _digest(job, images.listed)
    partial = options.output.with_name(options.output.name + ".partial")
    if options.output.exists() and not options.force:
        if writer.digest(options.output) != digest:
            raise ValueError(
                f"{options.output} is already there, of other images or another encoder; replace it with --force, or "
                "choose another --output"
            )
        shutil.rmtree(partial, ignore_errors=True)
        print(f"{options.output}: already there, of the same {len(images.listed):,} images and the same encoder")
        return options.output
    print(f"encoder:    {options.run} ({encoder.metadata['encoder']}, step {encoder.metadata.get('step', 'unknown')})")
    side, read_at = encoder.image_size, encoder.read_at
    then = f", read at {read_at} x {read_at}" if read_at != side else ""
    print(f"images:     {options.images}: {len(images.listed):,} images, brought to {side} x {side}{then}")
    print(f"device:     {device}, {options.precision}", flush=True)
    with Journal.open(partial, job, width=job["width"], anew=options.force) as journal:
        reasons = compute(encoder, images, journal, options, device)
        bad_files = options.output.with_name(options.output.name + ".unreadable.txt")
        if reasons:
            list_unreadable(reasons, bad_files)
            if options.unreadable == "refuse":
                what = describe_unreadable(reasons, bad_files)
                raise ValueError(f"{what}. What the others gave is kept in {partial}")
            images.found.left_out[f"files that cannot be read, listed in {bad_files}", ""] += len(reasons)
        else:
            bad_files.unlink(missing_ok=True)  # an earlier attempt's
        rows = [journal.done[entry.name] for entry in images.listed if options.images / entry.name not in reasons]
        if not rows:
            raise ValueError(f"not one image of {options.images} is readable; nothing was written")
        about = {"digest": digest, **job, "images": str(options.images), "num_images": len(rows)}
        writer.write(options.output, journal, rows, about)
    shutil.rmtree(partial)
    changes = sum((Counter(row.changes) for row in rows), Counter())
    outcome = f"{options.output}: {len(rows):,} images, {job['width']} numbers each"
    print(describe_outcome(images.found, [outcome], changes))
    return options.output


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

    listed: Sequence[Listed]
    read: Callable[[Listed], Loaded | str]
    """An image of the encoder's size, or why there is none."""
    found: Found
    """What is left out."""


def open_folder(folder: Path, encoder: Encoder) -> Images:
    """List every image below a folder. Raises ConversionError if there is none."""
    names, found = all_images(folder)

    def read(entry: Listed) -> Loaded | str:
        loaded = read_image(folder / entry.name, encoder.image_size)
        return as_stored(loaded, encoder) if isinstance(loaded, Loaded) else loaded

    return Images([Listed.of(folder, name) for name in names], read, found)


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

    def listed(i: int) -> Listed:
        label = int(labels[i])
        # Told apart by the whole file's content: its images have no dates of their own.
        return Listed(f"{facts.classes[label]}/{i}" if label >= 0 else str(i), i, int(facts.content_sha256[:15], 16))

    return Images([listed(i) for i in range(len(labels))], lambda entry: Loaded(pixels[entry.size], False, ()), Found())


def compute(
    encoder: Encoder, images: Images, journal: Journal, options: Options, device: torch.device
) -> dict[Path, str]:
    """Compute what the journal does not hold yet.

    Args:
        encoder: On ``device``.
        images: What is asked for.
        journal: Gets each batch as soon as it is computed.
        options: How.
        device: Where to compute.

    Returns:
        Files that cannot be read, and why.

    Raises:
        DivergedError: If a representation is not finite.
    """
    listed = images.listed
    missing = [entry for entry in listed if not journal.holds(entry)]
    if len(missing) < len(listed):
        print(f"resumed:    {len(listed) - len(missing):,} images were computed before", flush=True)
    reasons: dict[Path, str] = {}
    started = time.perf_counter()

    with (
        ThreadPoolExecutor(host.usable_cores()) as pool,
        tqdm(total=len(listed), initial=len(listed) - len(missing), unit=" images", disable=None) as progress,
    ):
        batches = map_in_order(pool, images.read, missing, options.batch_size)
        for number, results in enumerate(batches):
            entries = missing[number * options.batch_size : (number + 1) * options.batch_size]
            good = [(entry, found) for entry, found in zip(entries, results, strict=True) if isinstance(found, Loaded)]
            for entry, found in zip(entries, results, strict=True):
                if not isinstance(found, Loaded):
                    reasons[options.images / entry.name] = found
            if good:
                pixels = torch.from_numpy(np.stack([found.pixels for _, found in good]))
                features = embed(encoder, pixels.to(device), options.precision).cpu().numpy()
                if not np.isfinite(features).all():
                    raise DivergedError(
                        f"representations of {as_text(good[0][0].name)} and others are not finite: the encoder's "
                        "weights have diverged" + (", or try --precision fp32" if options.precision != "fp32" else "")
                    )
                journal.add([dataclasses.replace(entry, changes=found.changes) for entry, found in good], features)
            progress.update(len(entries))
    if missing:
        seconds = time.perf_counter() - started
        print(f"computed:   {len(missing):,} images in {seconds:.1f} s, {len(missing) / seconds:,.0f} images/s")
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
    quality = json.loads(encoder.metadata.get("jpeg_quality", "null"))
    if encoder.metadata.get("encoding", "raw") == "raw" or quality is None:
        return image
    with Image.open(io.BytesIO(beton.encode_jpeg(image.pixels, quality))) as compressed:
        pixels = np.asarray(compressed.convert("RGB"))
    return dataclasses.replace(image, pixels=pixels)


# ---------------------------------------------------------------------------------------------------------------
# What was computed so far


@dataclass(frozen=True, slots=True)
class Listed:
    """An image file, as it was when it was listed."""

    name: str
    """Below the folder, with / between its parts."""
    size: int
    """In bytes; of an image in a .beton file, its number."""
    modified_ns: int
    """When it was changed last; in a .beton file, what tells the file's content from others'."""
    changes: tuple[str, ...] = ()
    """What was done to it, in words that follow a number of images."""

    @staticmethod
    def of(folder: Path, name: str) -> Listed:
        """Look at a file. One that is not there is noticed when it is read."""
        try:
            status = (folder / name).stat()
        except OSError:
            return Listed(name, -1, -1)
        return Listed(name, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Row(Listed):
    """An image whose representation is known."""

    place: int = 0
    """Of its representation in the file of them."""


class Journal:
    """Representations on the disk, by file name, while not all are there. At every moment a whole number of them.

    job.json      what the numbers depend on besides the image; another job cannot go on from them
    rows.f32      the representations, one behind another
    files.jsonl   the image of each, written once its representation is on the disk
    """

    def __init__(self, folder: Path, width: int, lock: IO[bytes]) -> None:
        self.width, self._lock = width, lock
        self._rows_path = folder / "rows.f32"
        self._files_path = folder / "files.jsonl"
        self._rows_path.touch()
        self._files_path.touch()
        lines = self._files_path.read_bytes().split(b"\n")[:-1]  # the last is empty, or was cut off
        lines = lines[: self._rows_path.stat().st_size // (4 * width)]
        self.done: dict[str, Row] = {}
        for place, line in enumerate(lines):
            name, size, modified_ns, changes = json.loads(line)
            self.done[name] = Row(name, size, modified_ns, tuple(changes), place)
        self._place = len(lines)
        self._rows, self._files = self._rows_path.open("r+b"), self._files_path.open("r+b")
        self._rows.truncate(self._place * 4 * width)
        self._files.truncate(sum(len(line) + 1 for line in lines))
        for file in (self._rows, self._files):
            file.seek(0, io.SEEK_END)

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, job: dict[str, Any], *, width: int, anew: bool) -> Iterator[Self]:
        """Open the journal of a job, one that was begun before if there is one.

        Raises:
            ValueError: If another job's lies there, or another process writes it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a+b") as lock:
            try:
                files.lock(lock)
            except BlockingIOError:
                raise ValueError(
                    f"another process is writing {folder}; wait for it, or choose another --output"
                ) from None
            path = folder / "job.json"
            if anew:
                for name in ("job.json", "files.jsonl", "rows.f32"):  # in this order: the rest is nothing without it
                    (folder / name).unlink(missing_ok=True)
            if path.exists():
                before = json.loads(path.read_text(encoding="utf-8"))
                if other := sorted(name for name in before.keys() | job.keys() if before.get(name) != job.get(name)):
                    raise ValueError(
                        f"{folder} was begun with another {', '.join(other)}; finish it with that, begin anew with "
                        "--force, or choose another --output"
                    )
            else:
                files.replace(path, json.dumps(job), durable=True)
            journal = cls(folder, width, lock)
            try:
                yield journal
            finally:
                journal._rows.close()
                journal._files.close()

    def holds(self, entry: Listed) -> bool:
        """Whether the representation of this file, as it is now, is known."""
        row = self.done.get(entry.name)
        return row is not None and (row.size, row.modified_ns) == (entry.size, entry.modified_ns)

    def add(self, entries: Sequence[Listed], features: NDArray[np.float32]) -> None:
        """Write representations (m, D) of m images."""
        assert features.shape == (len(entries), self.width), features.shape
        self._rows.write(np.ascontiguousarray(features, "<f4").tobytes())
        files.sync(self._rows)
        for entry in entries:
            line = json.dumps([entry.name, entry.size, entry.modified_ns, entry.changes])
            self._files.write(line.encode() + b"\n")
            self.done[entry.name] = Row(**dataclasses.asdict(entry), place=self._place)
            self._place += 1
        files.sync(self._files)

    def blocks(self, rows: Sequence[Row]) -> Iterator[tuple[Sequence[Row], NDArray[np.float32]]]:
        """Yield rows with their representations (m, D), some thousands at a time."""
        self._rows.flush()
        stored = np.memmap(self._rows_path, "<f4", "r", shape=(self._place, self.width))
        for start in range(0, len(rows), _WRITTEN_AT_ONCE):
            block = rows[start : start + _WRITTEN_AT_ONCE]
            yield block, stored[[row.place for row in block]]


# ---------------------------------------------------------------------------------------------------------------
# Outputs


class _Npy:
    """float32 (n, D) in FILE.npy; FILE.json has the files' names, and what the numbers depend on."""

    @staticmethod
    def _names(path: Path) -> Path:
        return path.with_suffix(".json")

    def digest(self, path: Path) -> str | None:
        """Return what tells whether an output is of the same images and encoder; None if that is not known."""
        try:
            digest: str | None = json.loads(self._names(path).read_text(encoding="utf-8"))["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return digest

    def write(self, path: Path, journal: Journal, rows: Sequence[Row], about: dict[str, Any]) -> None:
        """Write all rows, in that order."""
        path.unlink(missing_ok=True)  # so that no one ever finds numbers beside other names
        names = {**about, "files": [as_text(row.name) for row in rows]}
        files.replace(self._names(path), json.dumps(names, indent=1), durable=True)
        with files.atomic_write(path) as file:
            shape = (len(rows), journal.width)
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for _, features in journal.blocks(rows):
                file.write(features.tobytes())


class _Parquet:
    """Columns file and feature; what the numbers depend on stands in the schema's metadata under "simclr"."""

    def digest(self, path: Path) -> str | None:
        """As :class:`_Npy`'s."""
        import pyarrow
        import pyarrow.parquet

        try:
            about = json.loads((pyarrow.parquet.read_schema(path).metadata or {})[b"simclr"])
        except (OSError, ValueError, KeyError, pyarrow.ArrowException):
            return None
        digest: str | None = about.get("digest")
        return digest

    def write(self, path: Path, journal: Journal, rows: Sequence[Row], about: dict[str, Any]) -> None:
        """Write all rows, in that order."""
        import pyarrow
        import pyarrow.parquet

        feature = pyarrow.list_(pyarrow.float32(), journal.width)
        schema = pyarrow.schema(
            [("file", pyarrow.string()), ("feature", feature)], metadata={"simclr": json.dumps(about)}
        )
        with files.atomic_write(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as table:
            for block, features in journal.blocks(rows):
                values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), type=feature)
                names = pyarrow.array([as_text(row.name) for row in block])
                table.write_table(pyarrow.table([names, values], schema=schema))


def _writer_for(output: Path) -> _Npy | _Parquet:
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
    return _Npy() if kind == ".npy" else _Parquet()


def _job(encoder: Encoder, precision: Literal["fp32", "bf16"], device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on, besides the images."""
    side = encoder.image_size
    blank = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
    return {
        "encoder": encoder.metadata["encoder"],
        "encoder_sha256": combined_sha256(fingerprint(encoder.encoder)),
        "pretrained_on": encoder.metadata.get("pretrained_on"),
        "normalisation": json.loads(json.dumps(encoder.normalisation)),
        "image_size": side,
        "read_at": encoder.read_at,
        "stored_as": [encoder.metadata.get("encoding", "raw"), encoder.metadata.get("jpeg_quality", "null")],
        "precision": precision,
        "width": embed(encoder, blank, precision).shape[1],
    }


def _digest(job: dict[str, Any], listed: Sequence[Listed]) -> str:
    """Return a SHA-256 of all that the output depends on."""
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode())
    for entry in listed:
        digest.update(json.dumps([entry.name, entry.size, entry.modified_ns]).encode())
    return digest.hexdigest()


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
    host.keep_freed_memory()
    return torch.device("cpu")


if __name__ == "__main__":
    host.outlive_readers()
    try:
        main(tyro.cli(Options, prog="python -m simclr.embed", description=__doc__))
    except ValueError as error:
        sys.exit(f"simclr.embed: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
