"""The floors of the house: a module imports what stands on its own floor or below, and no import runs in a circle."""

from __future__ import annotations

import ast
import functools
import graphlib
import re

from tests.helpers import ROOT

FLOORS = [
    {"distributed", "files", "schedule", "schema", "system", "templates", "unit_length", "small_resnet"},
    {"beton", "parts"},
    {"batch_norm", "data", "losses", "models", "optim", "views"},
    {"config", "presets", "command_line"},
    {"evaluation", "step"},
    {"run"},
    {"report", "export", "embed"},
    {"train_simclr", "linear_probe", "data_prep", "hubconf"},
]
"""From the ground up; a folder is one room. docs/design.md says what is in each."""

READS_IMAGES = {("embed", "data_prep")}
"""What may look up: representations of a folder are of images read as the conversion reads them."""


@functools.cache
def imports() -> dict[str, set[str]]:
    """Each module -> the modules of this project that it imports: at once, for types, or in a function."""
    paths = [*(ROOT / "simclr").rglob("*.py"), *(ROOT / "data_prep").glob("*.py"), *ROOT.glob("*.py")]
    names = {re.sub(r"(/__init__)?\.py$", "", str(path.relative_to(ROOT))).replace("/", "."): path for path in paths}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & set(names)
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {each if each in names else node.module for each in wanted} & set(names)
    return {name: others - {name, "simclr"} for name, others in found.items() if name != "simclr"}


def room(module: str) -> str:
    return module.removeprefix("simclr.").split(".")[0]


def test_every_room_stands_on_a_floor() -> None:
    assert {room(module) for module in imports()} == set().union(*FLOORS)


def test_nothing_is_imported_from_a_floor_above() -> None:
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    upward = {
        (room(module), room(other))
        for module, others in imports().items()
        for other in others
        if floor[room(other)] > floor[room(module)]
    }
    assert upward == READS_IMAGES


def test_no_import_runs_in_a_circle_between_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in imports().items():
        rooms.setdefault(room(module), set()).update(room(other) for other in others)
    graph = {name: {o for o in others if o != name and (name, o) not in READS_IMAGES} for name, others in rooms.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_training_does_not_import_what_only_reports_need() -> None:
    reached, waiting = set(), {"train_simclr"}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting |= imports()[module] - reached
    assert {room(module) for module in reached} & {"report", "export", "embed", "templates", "data_prep"} == set()
