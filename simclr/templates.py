"""Texts from templates (only user of jinja2), and how numbers are written in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from simclr.system import say_duration


def render(path: Path, filters: dict[str, Callable[..., Any]], **values: Any) -> str:
    """Return the text of a template, in which at most one line in a row is empty.

    Args:
        path: The template; those that it includes lie beside it.
        filters: What it uses besides ``count`` (1,234), ``percent`` (of an accuracy, or a dash for None), ``duration``.
        **values: What it takes. A name that it uses and that is not there is an error.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # the macros of html.jinja escape, by the filter inline
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"count": "{:,}".format, "percent": percent, "duration": say_duration} | filters
    return re.sub(r"\n{3,}", "\n\n", templates.get_template(path.name).render(**values))


def percent(value: float | None) -> str:
    """Return an accuracy as tables have it."""
    return "–" if value is None else f"{value:.2f}"
