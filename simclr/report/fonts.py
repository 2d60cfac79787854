"""Fonts for class names of any script in figures: which of the installed ones have the characters."""

from __future__ import annotations

import contextlib
import functools
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

BASE = "DejaVu Sans"  # comes with matplotlib: Latin, Greek, Cyrillic and some others


@dataclass(frozen=True)
class Lettering:
    """How class names are written in figures."""

    families: tuple[str, ...]
    """Fonts, in the order in which they are asked for a character."""
    names: tuple[str, ...]
    """As they are drawn: "class 3" in place of a name that no installed font can write."""
    num_replaced: int


def lettering(names: Sequence[str]) -> Lettering:
    """Choose fonts for some names."""
    needed = {character for name in names for character in name if not character.isspace()}
    families, missing = [BASE], needed - _characters_of(BASE)
    candidates = _installed() if missing else ()
    while missing and candidates:
        best = max(candidates, key=lambda family: len(missing & _characters_of(family)))
        if not missing & _characters_of(best):
            break
        families.append(best)
        missing -= _characters_of(best)
    drawn = tuple(f"class {i}" if missing & set(name) else name for i, name in enumerate(names))
    return Lettering(tuple(families), drawn, sum(a != b for a, b in zip(drawn, names, strict=True)))


def _installed() -> tuple[str, ...]:
    """Return the installed families, those without serifs first, as they suit the rest.

    Fonts that were installed since matplotlib made its list are found too. Left out is Last Resort, which comes with
    matplotlib and has a box for every character.
    """
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - listed):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # one that cannot be read, or is of pictures
            font_manager.fontManager.addfont(path)
    families = {
        entry.name
        for entry in font_manager.fontManager.ttflist
        if entry.weight in (400, "normal", "regular") and (entry.style, entry.stretch) == ("normal", "normal")
        if not entry.name.startswith("Last Resort")
    }
    return tuple(sorted(families, key=lambda name: ("Sans" not in name, "CJK" not in name, name)))


@functools.cache
def _characters_of(family: str) -> frozenset[str]:
    """Return what a font can write; nothing if it is one of pictures, or cannot be read."""
    try:
        font = FT2Font(font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False))
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def width_of(text: Iterable[str]) -> int:
    """Return how many columns a text takes: two for each wide character, such as a Chinese one."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
