"""One text as Markdown, as one HTML page that holds its figures, and as PDF (by WeasyPrint, which is optional).

A template is the text; its markup is the macros of ``markdown.jinja`` or ``html.jinja``.
"""

from __future__ import annotations

import base64
import html
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simclr import files, templates
from simclr.beton import Facts
from simclr.report.figures import Panel


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
        files.replace(folder / f"{panel.name}.png", panel.png)
    template = Path(__file__).with_name(f"{name}.jinja")
    for ending, markup in (("md", "markdown.jinja"), ("html", "html.jinja")):
        text = templates.render(template, _FILTERS, markup=markup, figures=figures, **values).strip() + "\n"
        files.replace(folder / f"{name}.{ending}", text)
    return text


_WAY_OUT = (
    "install it with pip install 'simclr[pdf]' (in a checkout: pip install -e '.[pdf]') and, if it then misses Pango, "
    "apt-get install libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0; or print report.html to PDF in a browser"
)


def require_pdf() -> None:
    """Raise ValueError, which names the way out, if no PDF can be written here."""
    try:
        import weasyprint  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: the libraries that it binds
        raise ValueError(f"pdf needs WeasyPrint, which is not to be had here ({error}): {_WAY_OUT}") from error


def write_pdf(page: str, path: Path) -> None:
    """Write an HTML page that holds all that it shows as PDF. Raises ValueError as :func:`require_pdf`."""
    require_pdf()
    import weasyprint

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # which tells every table of every font
    files.replace(path, weasyprint.HTML(string=page).write_pdf())


def _storage(facts: Facts) -> str:
    return "raw pixels" if facts.encoding == "raw" else f"JPEG, quality {facts.jpeg_quality or 'unknown'}"


def _inline(text: object) -> str:
    """Return text as HTML; it may hold `code` and **bold**."""
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(text), quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)


_FILTERS: dict[str, Callable[..., Any]] = {
    "g": "{:g}".format,
    "inline": _inline,
    "one_line": lambda text: " ".join(text.split()),
    "items_of": lambda text: [" ".join(item.split()) for item in re.split(r"(?m)^- ", text)[1:]],
    "storage": _storage,
    "embedded": lambda picture: "data:image/png;base64," + base64.b64encode(picture).decode("ascii"),
    "range": lambda counts: " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})),
}
