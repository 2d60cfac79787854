"""One text as Markdown and as one HTML page that holds its figures.

A template is the text; its markup is the macros of ``markdown.jinja`` or ``html.jinja``.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simclr import templates
from simclr.beton import Facts
from simclr.report.figures import Panel
from simclr.run import files


def write_page(folder: Path, name: str, figures: Mapping[str, Sequence[Panel]], **values: Any) -> str:
    """Write a text as ``name.md``, with its figures beside it, and as ``name.html``, which holds them.

    Args:
        folder: Where to; exists.
        name: Of the files, and of the template.
        figures: By the name that the template has for them.
        **values: What else the template takes.

    Returns:
        The HTML page.
    """
    for panel in (panel for panels in figures.values() for panel in panels):
        _write(folder / f"{panel.name}.png", panel.light)
    for markup in ("markdown", "html"):
        text = render(f"{name}.jinja", f"{markup}.jinja", figures=figures, **values)
        _write(folder / f"{name}.{'md' if markup == 'markdown' else 'html'}", text.encode())
    return text


def render(template: str, markup: str, **values: Any) -> str:
    """Return a text in one of the two forms.

    Args:
        template: The text's file.
        markup: The file with the macros: "markdown.jinja" or "html.jinja".
        **values: What the template takes.
    """
    filters: dict[str, Callable[..., Any]] = {
        "g": "{:g}".format,
        "inline": _inline,
        "one_line": lambda text: " ".join(text.split()),
        "items_of": lambda text: [" ".join(item.split()) for item in re.split(r"(?m)^- ", text)[1:]],
        "storage": _storage,
        "embedded": lambda picture: "data:image/png;base64," + base64.b64encode(picture).decode("ascii"),
        "range": lambda counts: " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})),
    }
    return templates.render(Path(__file__).with_name(template), filters, markup=markup, **values).strip() + "\n"


def _write(path: Path, content: bytes) -> None:
    with files.atomic_write(path, durable=False) as file:
        file.write(content)


def _storage(facts: Facts) -> str:
    return "raw pixels" if facts.encoding == "raw" else f"JPEG, quality {facts.jpeg_quality or 'unknown'}"


def _inline(text: object) -> str:
    """Return text as HTML; it may hold `code` and **bold**."""
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(text), quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
