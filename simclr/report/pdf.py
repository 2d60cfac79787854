"""The report as PDF. The only user of WeasyPrint, an optional dependency."""

from __future__ import annotations

import logging
from pathlib import Path

WAY_OUT = (
    "install it with pip install 'simclr[pdf]' (in a checkout: pip install -e '.[pdf]') and, if it then misses Pango, "
    "apt-get install libpango-1.0-0 libpangoft2-1.0-0; or print report.html to PDF in a browser"
)


def require_pdf() -> None:
    """Raise ValueError, which names the way out, if no PDF can be written here."""
    try:
        import weasyprint  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: the libraries that it binds
        raise ValueError(f"pdf needs WeasyPrint, which is not to be had here ({error}): {WAY_OUT}") from error


def write_pdf(page: str, path: Path) -> None:
    """Write an HTML page that holds all that it shows as PDF.

    Raises:
        ValueError: If WeasyPrint is not to be had.
    """
    require_pdf()
    import weasyprint

    from simclr.run import files

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # which tells every table of every font
    content = weasyprint.HTML(string=page).write_pdf()
    with files.atomic_write(path, durable=False) as file:
        file.write(content)
