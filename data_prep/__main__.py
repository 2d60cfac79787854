"""Command line of the one-time conversion: ``python -m data_prep SOURCE --help``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import tyro

from data_prep.convert import ConversionError, Storage, convert
from simclr import beton, files, system

Stored = tyro.conf.OmitArgPrefixes[Storage]
_AS_IT_IS = Storage()


def cifar10(
    root: Path = Path("data"), output: Path = Path("data/cifar10"), download: bool = True, storage: Stored = _AS_IT_IS
) -> None:
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 in 10 classes.

    Args:
        root: Folder of the official files (cifar-10-python.tar.gz, or unpacked); they are downloaded if missing.
        output: Folder for train.beton and test.beton.
        download: Whether missing files may be downloaded.
        storage: How to store the images.
    """
    from data_prep.torchvision_sets import cifar  # only the commands that need torchvision pay for its import

    for split in ("train", "test"):
        convert(cifar("CIFAR-10", root, split, download), output / f"{split}.beton", storage)


def cifar100(
    root: Path = Path("data"), output: Path = Path("data/cifar100"), download: bool = True, storage: Stored = _AS_IT_IS
) -> None:
    """CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 in 100 classes.

    Args:
        root: Folder of the official files (cifar-100-python.tar.gz, or unpacked); they are downloaded if missing.
        output: Folder for train.beton and test.beton.
        download: Whether missing files may be downloaded.
        storage: How to store the images.
    """
    from data_prep.torchvision_sets import cifar

    for split in ("train", "test"):
        convert(cifar("CIFAR-100", root, split, download), output / f"{split}.beton", storage)


def stl10(
    root: Path = Path("data"),
    output: Path = Path("data/stl10"),
    splits: tuple[Literal["train", "test", "unlabeled", "train+unlabeled"], ...] = ("train", "test", "unlabeled"),
    resolution: int | None = None,
    download: bool = True,
    storage: Stored = _AS_IT_IS,
) -> None:
    """STL-10: 5,000 training, 8,000 test and 100,000 unlabelled images of 96 x 96 in 10 classes.

    Args:
        root: Folder of the official files (stl10_binary.tar.gz, or unpacked); they are downloaded if missing.
        output: Folder for SPLIT.beton.
        splits: Which splits to convert. The unlabelled ones take 3 GB of memory and of disk each at 96 x 96.
        resolution: Resize to this many pixels (bicubic, antialiased); 96 x 96 if not given.
        download: Whether missing files may be downloaded.
        storage: How to store the images.
    """
    from data_prep import torchvision_sets

    for split in splits:
        source = torchvision_sets.stl10(root, split, download, resolution)
        convert(source, output / f"{split}.beton", storage)


def imagefolder(
    root: Path,
    output: Path,
    resolution: int | None = None,
    test_fraction: float | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    storage: Stored = _AS_IT_IS,
) -> None:
    """Any images: a folder with one folder per class or without, train and test folders of either, or a CSV list.

    Args:
        root: A folder of images. Folders in it are classes; or splits, if they are called train, val, test and the
            like. Or FILE.csv with a column path (relative to the file), and label and split if there are any.
        output: A folder for SPLIT.beton; or a file FILE.beton, if root is one split.
        resolution: Resize the shorter side to this many pixels (bicubic, antialiased) and crop the centre to a
            square. Needed if the images differ in size.
        test_fraction: Make this part of each class test images, chosen by a hash of their paths: the same ones each
            time.
        unreadable: What to do if some images cannot be read. All of them are listed in either case.
        storage: How to store the images.
    """
    from data_prep.find import find
    from data_prep.image_folder import convert_found

    print(convert_found(find(root, test_fraction), output, resolution, unreadable, storage))


def shapes(
    output: Path = Path("data/shapes"),
    seed: int = 0,
    num_train: int = 10_000,
    num_test: int = 2_000,
    preview: Path | None = None,
    storage: Stored = _AS_IT_IS,
) -> None:
    """Draw the built-in demonstration from a seed: 32 x 32 images of ten kinds of shape. Needs no download.

    Args:
        output: Folder for train.beton and test.beton.
        seed: Another seed gives other images.
        num_train: Number of training images. A larger set begins with the smaller one.
        num_test: Number of test images.
        preview: Also write a picture of some training images to this PNG file.
        storage: How to store the images.
    """
    from data_prep import shapes as built_in

    sources = [built_in.shapes(seed, "train", num_train), built_in.shapes(seed, "test", num_test)]
    for source in sources:
        convert(source, output / f"{source.split}.beton", storage)
    if preview is not None:
        try:
            built_in.preview(seed).save(preview)
        except (OSError, ValueError) as error:  # Pillow answers an unknown ending with ValueError
            raise ConversionError(f"cannot write {preview}: {error}") from error
        print(f"{preview}: written")


def inspect(file: tyro.conf.Positional[Path], verify: bool = False) -> None:
    """Print the facts about a .beton file, after checking that they belong to it.

    Args:
        file: The .beton file.
        verify: Also compare all images and labels with their checksum.
    """
    facts = beton.load_facts(file)
    (beton.verify if verify else beton.check)(file, facts)
    for field in fields(facts):
        print(f"{field.name:15s} {getattr(facts, field.name)}")
    print(
        f"{file}: " + ("all images are as they were written" if verify else "tables intact; --verify checks the pixels")
    )


def sidecar(
    file: tyro.conf.Positional[Path],
    source: str,
    classes: tuple[str, ...] = (),
    split: str = "train",
    lossy_source: bool = False,
    force: bool = False,
) -> None:
    """Make the sidecar of a .beton file that FFCV's own DatasetWriter wrote.

    The file needs one RGBImageField "image" and one IntField "label", and images of one size and encoding.

    Args:
        file: The .beton file.
        source: Where its images came from.
        classes: Class names in label order; none for unlabelled images (label -1).
        split: train, test, ...
        lossy_source: Whether the images had gone through lossy compression before they were stored.
        force: Replace a sidecar that is there.
    """
    if beton.sidecar_path(file).exists() and not force:
        raise ConversionError(f"{beton.sidecar_path(file)} is already there; replace it with --force")
    facts = beton.describe(file, source=source, split=split, classes=classes, lossy_source=lossy_source)
    beton.save_facts(file, facts)
    print(f"{beton.sidecar_path(file)}: written ({facts.num_images} images)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; user errors end it with a message and exit code 1."""
    commands: tuple[Callable[..., Any], ...] = (cifar10, cifar100, stl10, imagefolder, shapes, inspect, sidecar)
    try:
        with files.explain_refusals():
            tyro.extras.subcommand_cli_from_dict(
                {command.__name__: command for command in commands},
                prog="python -m data_prep",
                description="One-time conversion of images to FFCV's .beton.",
                args=arguments,
            )
    except (beton.BetonError, ConversionError, files.RefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the file under way was not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    system.outlive_readers()
    sys.exit(main())
