"""Executes assignment.ipynb and keeps what it shows: python notebooks/execute.py [OUTPUT]

Written is the notebook itself, or OUTPUT. Pictures keep 48 colours, which holds the file below 200 kB, and paths are
given from the home directory or from this repository.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

from simclr.files import atomic_write

NOTEBOOK = Path(__file__).resolve().parent / "assignment.ipynb"
REPOSITORY = NOTEBOOK.parents[1]


def main(output: Path) -> None:
    """Execute the notebook in its folder, and write it with its outputs; a cell that raises ends it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    for cell in notebook.cells:
        for shown in cell.get("outputs", []):
            if "text" in shown:
                shown.text = shown.text.replace(f"{REPOSITORY}/", "").replace(str(Path.home()), "~")
            if "image/png" in shown.get("data", {}):
                shown.data["image/png"] = with_few_colours(shown.data["image/png"])
    notebook.metadata.pop("widgets", None)
    with atomic_write(output) as file:
        text: str = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
        file.write(f"{text}\n".encode())


def with_few_colours(encoded: str) -> str:
    """Return a PNG in base64 with 48 colours of its own: a quarter of the size."""
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    small = io.BytesIO()
    picture.quantize(48, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK)
