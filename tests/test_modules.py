"""The method can be read, and used, without the machinery around it: no module of it imports any of that."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "simclr"
METHOD = frozenset(
    {"batch_norm", "config", "data", "distributed", "evaluation", "losses", "models", "optim", "presets"}
    | {"schema", "unit_length", "views"}
)
MACHINERY = frozenset(
    {"checkpoint", "command_line", "doctor", "export", "files", "finite", "host", "interruption", "launch"}
    | {"memory", "peers", "probe", "report", "runlog"}
)


def imported_by(source: str) -> set[str]:
    """Modules of this package that a text imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("simclr.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "simclr":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("simclr."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("module", sorted(METHOD))
def test_the_method_imports_no_machinery(module: str) -> None:
    assert imported_by((PACKAGE / f"{module}.py").read_text(encoding="utf-8")) & MACHINERY == set()


def test_every_spelling_of_an_import_is_seen() -> None:
    for line in ("import simclr.peers", "from simclr import views, peers", "from simclr.peers import Peers"):
        assert "peers" in imported_by(f"def f():\n    {line}\n")
    assert {path.stem for path in PACKAGE.iterdir()} >= METHOD | MACHINERY  # none has another name by now
