"""Folders of images, and lists of them: what ``find`` finds and ``read_image`` reads becomes the images of splits."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from data_prep.convert import (
    Chunk,
    ConversionError,
    Source,
    Storage,
    UnreadableError,
    convert_all,
    map_in_order,
)
from data_prep.find import Found, Tree, as_text
from data_prep.read_image import Loaded, read_image
from simclr.system import usable_cores

UNREADABLE = "unreadable-images.txt"
_CHUNK = 64
_MOST_LISTED = 1000
_MOST_NAMED = 4


def convert_found(
    found: Found, output: Path, resolution: int | None, unreadable: Literal["refuse", "skip"], storage: Storage
) -> str:
    """Convert all splits that were found.

    Args:
        found: What is to be converted; what turns out to be unreadable is added to what is left out.
        output: A folder for SPLIT.beton, or a file FILE.beton for a single split.
        resolution: As in ``image_folder``.
        unreadable: Whether files that cannot be read stop the conversion. "skip" reads all images once more if there
            are such files, since a .beton file begins with the number of its images.
        storage: How to store them.

    Returns:
        What was stored, changed and left out, for people.

    Raises:
        ConversionError: As ``image_folder`` and ``convert_all``. Of unreadable files all are listed, and in a file.
    """
    is_file = output.suffix == ".beton"
    if is_file and len(found.splits) > 1:
        raise ConversionError(f"found the splits {', '.join(found.splits)}; give a folder as --output, not {output}")
    list_path = (output.parent if is_file else output) / UNREADABLE
    reasons: dict[Path, str] = {}
    while True:
        trees = {split: tree.without(set(reasons)) for split, tree in found.splits.items()}
        sources = [image_folder(tree, split, resolution) for split, tree in trees.items()]
        jobs = [(source, output if is_file else output / f"{source.split}.beton") for source in sources]
        try:
            stored = [outcome for _, outcome in convert_all(jobs, storage)]
            break
        except UnreadableError as error:
            reasons |= error.reasons
            list_unreadable(reasons, list_path)
            if unreadable == "refuse":
                raise ConversionError(describe_unreadable(reasons, list_path)) from error
    if reasons:
        found.left_out[f"files that cannot be read, listed in {list_path}", ""] += len(reasons)
    else:
        list_path.unlink(missing_ok=True)  # an earlier attempt's
    return describe_outcome(found, stored, sum((source.changes for source in sources), Counter()))


def image_folder(tree: Tree, split: str, resolution: int | None = None) -> Source:
    """Return the images of one split as a source, the right way up by their EXIF orientation.

    Args:
        tree: What ``find`` found.
        split: Name of the split for the sidecar.
        resolution: Resize the shorter side to this many pixels (bicubic, antialiased) and crop the centre to a
            square; None to store images of one size as they are.

    Raises:
        ConversionError: If the resolution is below 1; from ``chunks`` if images differ in size and there is none.
        UnreadableError: From ``chunks``, if there are unreadable files, with all of them.
    """
    if resolution is not None and resolution < 1:
        raise ConversionError(f"--resolution must be at least 1, got {resolution}")
    description = tree.description
    if resolution is not None:
        description += f", shorter side resized to {resolution} (antialiased bicubic), centre-cropped to a square"
    source = Source(description, split, tree.classes, len(tree.paths), lambda: _chunks(tree, resolution, source))
    return source


def _chunks(tree: Tree, resolution: int | None, source: Source) -> Iterator[Chunk]:
    bad: dict[Path, str] = {}
    size: tuple[int, ...] | None = None
    start = 0
    with ThreadPoolExecutor(usable_cores()) as pool:
        for results in map_in_order(pool, lambda path: read_image(path, resolution), tree.paths, _CHUNK):
            good = []
            for path, result in zip(tree.paths[start : start + len(results)], results, strict=True):
                if not isinstance(result, Loaded):
                    if not bad:
                        tqdm.write(
                            f"cannot read {as_text(path)}; searching for others, before storing", file=sys.stderr
                        )
                    bad[path] = result
                    continue
                good.append(result.pixels)
                source.lossy |= result.is_lossy
                source.changes.update(result.changes)
                if result.pixels.shape[:2] != (size := size or result.pixels.shape[:2]):
                    raise ConversionError(
                        f"images differ in size: {as_text(tree.paths[0])} is {size[1]} x {size[0]}, {as_text(path)} is "
                        f"{result.pixels.shape[1]} x {result.pixels.shape[0]}; choose one size with --resolution"
                    )
            labels = tree.labels[start : start + len(results)]
            start += len(results)
            if not bad:
                yield np.stack(good), labels
    if bad:
        raise UnreadableError(bad)


def list_unreadable(reasons: dict[Path, str], file: Path) -> None:
    """Write a list of files that cannot be read, and why: file, tabulator, reason."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", errors="surrogateescape") as stream:
        stream.writelines(f"{path}\t{reason}\n" for path, reason in reasons.items())


def describe_unreadable(reasons: dict[Path, str], file: Path) -> str:
    """Return what is said of files that cannot be read where they are not skipped; ``file`` lists them."""
    lines = "".join(f"\n  {as_text(path)}: {reason}" for path, reason in [*reasons.items()][:_MOST_LISTED])
    more = f"\n  and {len(reasons) - _MOST_LISTED:,} more" if len(reasons) > _MOST_LISTED else ""
    return (
        f"{len(reasons):,} unreadable images, and no others:{lines}{more}\nNothing was stored. Repair or remove them "
        f"(listed in {file}), or leave them out: --unreadable skip"
    )


def describe_outcome(found: Found, stored: list[str], changes: Counter[str]) -> str:
    """Return what was stored, changed and left out, and what else there is to know, for people."""
    names: dict[str, Counter[str]] = defaultdict(Counter)
    for (kind, name), number in found.left_out.items():
        names[kind][name] += number
    left_out = Counter({_with_names(kind, of_kind): of_kind.total() for kind, of_kind in names.items()})
    lines = ["stored:", *(f"  {file}" for file in stored)]
    for heading, counts in (("changed:", changes), ("left out:", left_out)):
        lines += [heading, *(f"{number:9,} {what}" for what, number in counts.most_common())] if counts else []
    return "\n".join(lines + (["to know:", *(f"  {remark}" for remark in found.remarks)] if found.remarks else []))


def _with_names(kind: str, names: Counter[str]) -> str:
    """Return the kind with its commonest names or suffixes: "videos (.mov 3, .mp4 1): take frames"."""
    commonest = ", ".join(f"{name} {n:,}" if len(names) > 1 else name for name, n in names.most_common(_MOST_NAMED))
    more = f" and {len(names) - _MOST_NAMED} more kinds" if len(names) > _MOST_NAMED else ""
    what, colon, way = kind.partition(":")
    return f"{what} ({commonest}{more}){colon}{way}" if commonest else kind
