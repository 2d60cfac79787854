"""The method can be read, and used, without the machinery around it: what imports what is held here."""

from __future__ import annotations

import ast

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "simclr"
METHOD = frozenset(
    {"batch_norm", "config", "data", "distributed", "evaluation", "losses", "models", "optim", "parts", "presets"}
    | {"schema", "small_resnet", "unit_length", "views", "views.parameters", "views.pixels"}
)
DOORS = {"losses": {"fast.tiled"}, "data": {"fast.ffcv_source"}}
"""What a module of the method may import of the machinery, within the function that chooses."""


def imported_by(source: str) -> set[str]:
    """Modules of this package that a text imports, wherever in it, without "simclr."."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("simclr.") for name in found if name.startswith("simclr.")}


def folders(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def read(module: str) -> str:
    path = PACKAGE / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


@pytest.mark.parametrize("module", sorted(METHOD))
def test_the_method_imports_no_machinery(module: str) -> None:
    imported = imported_by(read(module))
    doors = DOORS.get(module, set())
    through = {name for name in imported for door in doors if f"{name}.".startswith(f"{door}.")}
    assert folders(imported - through) & {"fast", "run", "report", "export", "command_line", "embed"} == set()
    at_the_top = {node for node in ast.parse(read(module)).body if isinstance(node, ast.ImportFrom)}
    assert not any("simclr.fast" in str(node.module) for node in at_the_top)


@pytest.mark.parametrize("module", sorted(path.stem for path in (PACKAGE / "fast").glob("[a-z]*.py")))
def test_what_is_fast_imports_the_method_and_not_what_keeps_a_run_alive(module: str) -> None:
    imported = imported_by(read(f"fast.{module}")) - {"run", "run.host", "run.host.usable_cores"}
    assert folders(imported) & {"run", "report", "export"} == set()


def test_every_spelling_of_an_import_is_seen() -> None:
    for line in (
        "import simclr.run.peers",
        "from simclr.run import files, peers",
        "from simclr.run.peers import Peers",
        "from simclr import views, run",
    ):
        assert "run" in folders(imported_by(f"def f():\n    {line}\n"))


def test_no_part_of_the_method_is_left_out() -> None:
    of_views = {f"views.{path.stem}" for path in (PACKAGE / "views").glob("[a-z]*.py")}
    assert {name for name in METHOD if name.startswith("views.")} == of_views
