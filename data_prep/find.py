"""Which images a folder or a list holds, with which labels and in which splits; what is left out, and why."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.convert import ConversionError
from data_prep.read_image import advice_for, readable_suffixes

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
"""Splits, and the names (in any case) that stand for them."""

_SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
_LIKE_SPLITS = {*_SPLIT_OF, "eval", "evaluation", "holdout"}
_SYSTEM_NAMES = {"@eadir", "#recycle", "$recycle.bin", "lost+found", "__macosx"}  # folders
_SYSTEM_NAMES |= {"thumbs.db", "desktop.ini", ".ds_store"}
_MOST_NAMED = 10

# Kinds of what is left out, each with what to do about it.
_OF_SYSTEMS = "files that systems leave behind"
_HIDDEN = "images with hidden names or in hidden folders: rename them if they are to be taken"
_LOOSE = "images beside the class folders: move them into one if they are to be taken"
_BESIDE = "images beside the splits: move them into one if they are to be taken"
_NO_IMAGES = "files that are no images by their names"
_TAKEN = "links to folders that are taken already, or that hold this one"


@dataclass(frozen=True)
class Tree:
    """The images of one split.

    Attributes:
        description: Where they come from, for the sidecar.
        classes: Names in label order; empty if no image has a label.
        paths: Image files, by class, then by folder and name, which is torchvision's order; of a list, in its order.
        labels: Class index of each, int64 (n,); -1 for an image without a label.
    """

    description: str
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]

    def without(self, bad: set[Path]) -> Tree:
        """Return the same without the images ``bad``.

        Raises:
            ConversionError: If none of a class would be left.
        """
        labels = self.labels[np.array([path not in bad for path in self.paths])]
        if lost := sorted(set(self.labels.tolist()) - set(labels.tolist())):
            which = f" of class {quoted(self.classes[label] for label in lost)}" if self.classes else ""
            raise ConversionError(f"{self.description}: not one image{which} is readable. Repair or remove them")
        return replace(self, paths=tuple(path for path in self.paths if path not in bad), labels=labels)


@dataclass
class Found:
    """What a folder or a list holds.

    Attributes:
        splits: Name -> images, training images first.
        left_out: (kind and what to do about it, name or suffix) -> how many.
        remarks: What else the user should know.
    """

    splits: dict[str, Tree] = field(default_factory=dict)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)


class _Row(NamedTuple):
    """An image: its path below the folder, its label if it has one, its split; "" if the whole is one split."""

    path: str
    label: str | None
    split: str


def find(root: Path, test_fraction: float | None = None) -> Found:
    """Find the images of a folder, or of a CSV file that lists them.

    Args:
        root: A folder of images, with one folder per class or without; or one with ``train``, ``test`` and the like
            in it, each of which is such a folder. Or a file ending in .csv, with a column ``path`` (relative to the
            file) and, if there are any, ``label`` and ``split``.
        test_fraction: Make this part of each class of the training images test images: those that come first by
            the SHA-256 of their paths. At least one of each class that has two.

    Raises:
        ConversionError: If there are no images, or it is not clear what they are meant to be.
    """
    found = Found()
    if root.suffix.lower() == ".csv" and root.is_file():
        rows, folder, name = _rows_of_list(root, found), root.parent, root.stem
        described = dict.fromkeys({row.split for row in rows}, f"image list {as_text(root.name)}")
    elif root.is_dir():
        rows, folders = _rows_of_folder(root, found)
        folder, name = root, root.resolve().name
        described = {split: f"image folder {_last_two(place)}" for split, place in folders.items()}
    else:
        raise ConversionError(f"{root} is not a folder; --root should be a folder of images, or a .csv that lists them")
    # An accented letter is one character on Linux and two on macOS, and one class.
    rows = [row._replace(label=row.label and unicodedata.normalize("NFC", row.label)) for row in rows]
    classes = _common_classes(root, rows)
    if folder != root and all(label.isdecimal() for label in classes):  # of a list: 2 before 10
        classes.sort(key=int)
    if not all(described):
        name = _SPLIT_OF.get(name.lower(), as_text(name))
        rows = [row._replace(split=name) for row in rows]
        described = {name: described[""]}
    if test_fraction is not None:
        rows = _draw_test(rows, test_fraction, described, found)

    index = {label: i for i, label in enumerate(classes)}
    for split in _in_order(described):
        chosen = [row for row in rows if row.split == split]
        paths = tuple(folder / row.path for row in chosen)
        labels = np.array([-1 if row.label is None else index[row.label] for row in chosen], np.int64)
        names = tuple(map(as_text, classes)) if (labels >= 0).any() else ()
        found.splits[split] = Tree(described[split], names, paths, labels)
    if escaped := [as_text(label) for label in classes if as_text(label) != label]:
        found.remarks.append(f"stored with escapes, as the names are not UTF-8: {quoted(escaped)}")
    _remark(found)
    return found


def all_images(root: Path) -> tuple[list[str], Found]:
    """Find every image below a folder, whatever its folders mean.

    Args:
        root: The folder.

    Returns:
        Paths below the folder, with / between their parts, sorted; and what is left out, in no splits.

    Raises:
        ConversionError: If it is no folder, or there are no images.
    """
    if not root.is_dir():
        raise ConversionError(f"{root} is not a folder; name a folder of images")
    found = Found()
    walk = _walk(root, found)
    _require_images(root, walk, found)
    return sorted("/".join((*parts, name)) for parts, name in walk.images), found


def _common_classes(root: Path, rows: list[_Row]) -> list[str]:
    """Return the classes, which all splits must share but the one that is called unlabeled."""
    of_split: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.split != "unlabeled":
            of_split[row.split] |= {row.label} if row.label is not None else set()
    first, *others = _in_order(of_split) or [""]
    for split in others:
        if only := sorted(of_split[first] ^ of_split[split]):
            raise ConversionError(
                f"{root}: the classes of {first} and {split} differ: {quoted(only)} in one only. Images whose labels "
                "are not to be used can be in a split called unlabeled"
            )
    return sorted(of_split[first])


def _in_order(splits: Iterable[str]) -> list[str]:
    return sorted(splits, key=[*SPLITS, *splits].index)


def _remark(found: Found) -> None:
    """Says what cannot be measured with these images, and why."""
    classes = next(iter(found.splits.values())).classes
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[name.casefold().lstrip("0 ")].append(name)
    if names := [name for group in alike.values() if len(group) > 1 for name in group]:
        found.remarks.append(f"classes whose names look alike, each a class of its own: {quoted(names)}")
    if not classes:
        found.remarks.append("no labels: the images can be pretrained on, but nothing can be measured on them")
    elif len(classes) == 1:
        found.remarks.append(
            f"one class only ({classes[0]}): the images can be pretrained on, but nothing can be measured on them. If "
            "the folders in it are the classes, name it as --root"
        )
    elif "test" not in found.splits:
        found.remarks.append("no test images, which linear_probe.py needs: --test-fraction 0.1 draws some")
    for split, tree in found.splits.items():
        if tree.classes and (number := int((tree.labels < 0).sum())):
            found.remarks.append(f"{number:,} images of {split} have no label: pretrained on, and never measured on")


def _draw_test(rows: list[_Row], fraction: float, described: dict[str, str], found: Found) -> list[_Row]:
    """Move a part of each class from the training images to a split of their own."""
    if not 0 < fraction < 1:
        raise ConversionError(f"--test-fraction must lie between 0 and 1, got {fraction}")
    if "test" in described or ("train" not in described and len(described) > 1):
        raise ConversionError(f"--test-fraction draws test images from training images; found {quoted(described)}")
    source = "train" if "train" in described else next(iter(described))
    of_class: dict[str | None, list[_Row]] = defaultdict(list)
    for row in rows:
        if row.split == source:
            of_class[row.label].append(row)
    drawn: set[str] = set()
    for members in of_class.values():
        members.sort(key=lambda row: hashlib.sha256(os.fsencode(row.path)).digest())
        number = max(1, round(fraction * len(members)))
        drawn |= {row.path for row in members[: min(number, len(members) - 1)]}
    if not drawn:
        raise ConversionError("--test-fraction: no class has two images, so that none can be spared")
    rule = f"test images: {fraction:g} of each class, by SHA-256 of the path"
    described |= dict.fromkeys(("train", "test"), f"{described[source]}, {rule}")
    if source != "train":
        del described[source]
    alone = sum(len(members) == 1 for members in of_class.values())
    rest = f"; none of the {alone} classes with a single image" if alone else ""
    found.remarks.append(f"{rule}, so the same ones for the same files{rest}")
    return [
        row._replace(split="test" if row.path in drawn else "train") if row.split == source else row for row in rows
    ]


# ---------------------------------------------------------------------------------------------------------------
# Folders


@dataclass
class _Walk:
    """All files of a folder that are neither hidden nor a system's, as (names of folders, name), and the folders."""

    images: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    others: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    folders: list[tuple[str, ...]] = field(default_factory=list)


def _walk(root: Path, found: Found) -> _Walk:
    """List everything below ``root``. Links are followed; each folder is listed once, under its own name if it can."""
    walk, suffixes, seen = _Walk(), readable_suffixes(), set[tuple[int, int]]()
    # A link to a folder that holds this one would bring in all that lies beside it.
    for above in root.resolve().parents:
        seen.add((above.stat().st_dev, above.stat().st_ino))
    folders, links, hidden = queues = [deque[tuple[str, ...]]() for _ in range(3)]
    folders.append(())
    while queue := next(filter(None, queues), None):
        parts = queue.popleft()
        folder = root.joinpath(*parts)
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if queue is hidden:
                found.left_out["hidden folders that cannot be listed", as_text(parts[-1])] += 1
                continue
            raise ConversionError(f"cannot list {as_text(folder)}: {error.strerror}") from error
        if (status.st_dev, status.st_ino) in seen:
            found.left_out[_TAKEN, as_text(parts[-1])] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        kind_of_folder = next(filter(None, map(_kind_of_name, parts)), None)
        if queue is not hidden:
            walk.folders.append(parts)
        for entry in entries:
            inside, is_link = (*parts, entry.name), entry.is_symlink()
            kind = kind_of_folder or _kind_of_name(entry.name)
            if Path(entry).is_dir() if is_link else entry.is_dir():
                (hidden if kind else links if is_link else folders).append(inside)
            elif kind is _OF_SYSTEMS:
                found.left_out[kind, "@eaDir, Thumbs.db and the like"] += 1
            elif _suffix(entry.name) in suffixes and (entry.is_file() or is_link):
                if kind:
                    found.left_out[kind, as_text(next(filter(_kind_of_name, inside)))] += 1
                else:
                    walk.images.append((parts, entry.name))
            elif kind:
                found.left_out["other hidden files", ""] += 1
            else:
                walk.others.append((parts, entry.name))
    for _, name in walk.others:
        found.left_out[advice_for(_suffix(name)) or _NO_IMAGES, as_text(_suffix(name)) or "no suffix"] += 1
    return walk


def _kind_of_name(name: str) -> str | None:
    """Why files and folders of this name are left out; None if they are not."""
    if name.lower() in _SYSTEM_NAMES or name.startswith("._"):
        return _OF_SYSTEMS
    return _HIDDEN if name.startswith(".") else None


def _rows_of_folder(root: Path, found: Found) -> tuple[list[_Row], dict[str, Path]]:
    """Return the images below ``root``, and each split's folder; its only key is "" if the whole is one split."""
    walk = _walk(root, found)
    _require_images(root, walk, found)
    folders: dict[str, tuple[str, ...]] = {split: (name,) for name, split in _splits_among(root, walk, found).items()}
    folders = folders or {"": ()}
    rows = [row for split, place in folders.items() for row in _rows_of_split(root, walk, place, split, found)]
    return rows, {split: root.joinpath(*place) for split, place in folders.items()}


def _require_images(root: Path, walk: _Walk, found: Found) -> None:
    """Raise ConversionError, with what is there, unless there are images."""
    if not walk.images:
        there = "; ".join(
            f"{number:,} {kind} ({name})" for (kind, name), number in found.left_out.most_common(_MOST_NAMED)
        )
        raise ConversionError(f"{as_text(root)} holds no images that can be taken, only: {there or 'no files at all'}")


def _splits_among(root: Path, walk: _Walk, found: Found) -> dict[str, str]:
    """Which folders in ``root`` are splits: name -> split. None of them, if they are classes."""
    names = {parts[0] for parts in walk.folders if parts}
    splits = {name: _SPLIT_OF[name.lower()] for name in sorted(names) if name.lower() in _SPLIT_OF}
    counts = Counter(parts[0] for parts, _ in walk.images if parts)
    others = sorted(counts.keys() - splits.keys())
    alike = [name for name in others if _LIKE_SPLITS.intersection(re.findall("[a-z]+", name.lower()))]
    usual = f"Splits are folders called {', '.join(_SPLIT_OF)}. Rename it, or list the images in a .csv (see --help)"
    if alike and (splits or alike == others):
        raise ConversionError(f"{as_text(root)}: {quoted(alike)} looks like a split, but has no usual name. {usual}")
    if len(set(splits.values())) < len(splits):
        raise ConversionError(f"{as_text(root)}: two of {quoted(splits)} are the same split. Merge or remove one")
    if len(splits) == 1 and others:
        (name,) = splits
        if name.lower() != "train" or any(len(parts) > 1 for parts in walk.folders if parts[:1] == (name,)):
            raise ConversionError(
                f"{as_text(root)}: {name!r} may be a split, or a class like {quoted(others)} beside it. {usual}"
            )
        alike, splits = [name], {}  # the vehicle
    if not splits:
        if alike:
            found.remarks.append(f"taken for classes, though called like splits: {quoted(alike)}")
        return {}
    if "train" not in splits.values():
        raise ConversionError(
            f"{as_text(root)} has the split {' and '.join(splits)} but no train. Add it, or convert one split alone: "
            f"--root {as_text(root / next(iter(splits)))} --output FILE.beton"
        )
    for name in splits:
        if not counts[name]:
            there = _what_is_there([other for other in walk.others if other[0][:1] == (name,)])
            raise ConversionError(f"{as_text(root)}: no images in the split {name!r}. {there}")
    for name in others:
        found.left_out[_BESIDE, as_text(name)] += counts[name]
    if loose := sum(not parts for parts, _ in walk.images):
        found.left_out[_BESIDE, "in no folder"] += loose
    return splits


def _rows_of_split(root: Path, walk: _Walk, place: tuple[str, ...], split: str, found: Found) -> list[_Row]:
    """Return the images below one folder, a class tree or without classes, in torchvision's order."""
    folder, depth = root.joinpath(*place), len(place)
    images = [(parts[depth:], name) for parts, name in walk.images if parts[:depth] == place]
    in_class = Counter(parts[0] for parts, _ in images if parts)
    loose = len(images) - in_class.total()
    if split == "unlabeled" or not in_class:
        in_class.clear()
    else:
        if loose > in_class.total():
            raise ConversionError(
                f"{as_text(folder)}: {loose:,} images lie beside the folders and {in_class.total():,} in them: it is "
                "not clear whether the folders are classes. Move the ones or the others, or list them in a .csv"
            )
        if loose:
            found.left_out[_LOOSE, as_text(folder.name)] += loose
        _check_classes(folder, walk, place, in_class)
        images = [image for image in images if image[0]]
    images.sort(key=lambda image: (image[0][:1], "/".join(image[0]), image[1]))
    return [_Row("/".join((*place, *parts, name)), parts[0] if in_class else None, split) for parts, name in images]


def _check_classes(folder: Path, walk: _Walk, place: tuple[str, ...], in_class: Counter[str]) -> None:
    """Refuses class folders that have no images, or have splits in them."""
    below = sorted(parts[len(place) :] for parts in walk.folders if parts[: len(place)] == place)
    if empty := [parts[0] for parts in below if len(parts) == 1 and not in_class[parts[0]]]:
        there = _what_is_there([other for other in walk.others if other[0][: len(place) + 1] == (*place, empty[0])])
        raise ConversionError(f"{as_text(folder)}: no images in class {quoted(empty)}. {there}")
    if splits := [parts for parts in below if len(parts) == 2 and parts[1].lower() in _SPLIT_OF]:
        raise ConversionError(
            f"{as_text(folder)}: {quoted('/'.join(parts) for parts in splits)} looks like a split inside of a class. "
            f"If the splits are meant: --root {as_text(folder / splits[0][0])}. Otherwise list the images in a .csv"
        )


def _what_is_there(others: list[tuple[tuple[str, ...], str]]) -> str:
    kinds = Counter(_suffix(name) for _, name in others)
    there = ", ".join(f"{as_text(suffix) or 'no suffix'} {n:,}" for suffix, n in kinds.most_common(_MOST_NAMED))
    ways = {way for suffix in kinds if (way := advice_for(suffix))}
    return "; ".join([f"Add images or remove the folder; it holds {there or 'no files'}", *sorted(ways)])


# ---------------------------------------------------------------------------------------------------------------
# Lists


def _rows_of_list(file: Path, found: Found) -> list[_Row]:
    """Return the images that a CSV file lists; those that are not there are noticed when they are read."""
    rows: list[_Row] = []
    wrong: list[str] = []
    lines: dict[str, int] = {}
    # Names of files need not be UTF-8, and come through; utf-8-sig drops the mark that spreadsheets write.
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        header = stream.readline()
        delimiter = max(",;\t", key=header.count)
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if "path" not in names or max(map(names.count, ("path", "label", "split"))) > 1:
            raise ConversionError(
                f"{file}: the columns are {quoted(names)}. Its first line should name the columns: path once, and "
                "label and split at most once"
            )
        if others := [name for name in names if name not in ("path", "label", "split")]:
            found.remarks.append(f"columns that are not read: {quoted(others)}; those that are: path, label, split")
        # Line by line, so that a quote that is not closed cannot swallow the lines after it.
        for number, line in enumerate(stream, start=2):
            try:
                values = next(csv.reader([line], delimiter=delimiter, strict=True), [])
            except csv.Error as error:
                wrong.append(f'line {number}: {error}; quotes come in pairs, around a name within one line: "a,b.jpg"')
                continue
            if not values:
                continue
            cells = dict(zip(names, values, strict=False))
            path, label, split = cells.get("path"), cells.get("label"), cells.get("split", "").strip().lower()
            if len(values) > len(names):
                wrong.append(f'line {number}: more cells than columns; quote names with a comma: "a,b.jpg"')
            elif not path or "\0" in path:
                wrong.append(f"line {number}: no path")
            elif (before := lines.setdefault(os.path.realpath(file.parent / path), number)) != number:
                wrong.append(f"line {number}: {as_text(path)} stands in line {before} too")
            elif "split" in names and split not in _SPLIT_OF:
                wrong.append(f"line {number}: split {split!r} is none of {', '.join(_SPLIT_OF)}")
            else:
                split = _SPLIT_OF.get(split, "")
                rows.append(_Row(path, (label or "").strip() or None if split != "unlabeled" else None, split))
    if wrong or not rows:
        unusable = "".join(f"\n  {line}" for line in wrong[:1000])
        raise ConversionError(f"{file}: {len(wrong):,} lines cannot be used, and {len(rows):,} can:{unusable}")
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Names


def as_text(name: str | Path) -> str:
    r"""Return a name as text that can be printed and stored: bytes that are not UTF-8 become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def quoted(names: Iterable[str]) -> str:
    """Return the first ten names, for a message."""
    names = [f"'{as_text(name)}'" for name in names]
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _suffix(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if stem else ""


def _last_two(folder: Path) -> str:
    folder = folder.resolve()
    return as_text(f"{folder.parent.name}/{folder.name}")
