"""Dataclasses whose types say which values are possible: one check for Python, the command line and JSON.

    @dataclass(frozen=True)
    class Part:
        rate: Positive = 0.1
        sides: tuple[Size, ...] = ()

Types may be bool, int, float, str, Path, Literal, tuple, dict[str, T], T | None, Annotated with :class:`Must`, and
dataclasses of these. Each error names the field by its dotted path, what was given, and what was expected.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Must:
    """A condition in a field's ``Annotated`` type: what must hold for a value, and the same in words."""

    hold: Callable[[Any], bool]
    expected: str


Count = Annotated[int, Must(lambda value: 0 <= value < 2**63, "at least 0, and below 2^63")]
Size = Annotated[int, Must(lambda value: 1 <= value < 2**63, "at least 1, and below 2^63")]
Seed = Annotated[int, Must(lambda value: 0 <= value < 2**64, "0 to 2^64 - 1")]
Positive = Annotated[float, Must(lambda value: value > 0, "> 0")]
NotNegative = Annotated[float, Must(lambda value: value >= 0, "at least 0")]
Share = Annotated[float, Must(lambda value: 0 <= value <= 1, "in [0, 1]")]

_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def to_json(value: Any) -> str:
    """Return a dataclass as JSON text; parsed, :func:`from_values` gives an equal one back."""
    return json.dumps(dataclasses.asdict(value), default=str, indent=2)


def from_json(kind: type[T], text: str) -> T:
    """Build a dataclass from :func:`to_json`'s text. Raises ValueError as :func:`from_values`."""
    return from_values(kind, json.loads(text))


def from_values(kind: type[T], values: Any) -> T:
    """Build a dataclass from parsed JSON.

    Raises:
        ValueError: If a field is unknown or missing, or a value is not possible.
    """
    built: T = _convert(kind, values, "")
    return built


def check_fields(instance: Any, path: str = "") -> None:
    """Refuse impossible values in the fields of a dataclass; make numbers float, text a path, where one is expected.

    Args:
        instance: The dataclass, frozen or not.
        path: Of the instance, for the error's message; empty if it is no part of another.

    Raises:
        ValueError: At the first impossible value.
    """
    for name, kind in _field_types(instance.__class__).items():
        object.__setattr__(instance, name, _convert(kind, getattr(instance, name), f"{path}.{name}".lstrip(".")))


def require(holds: bool, path: str, value: object, expected: str) -> None:
    """Raise ValueError about the field ``path`` unless ``holds``."""
    if not holds:
        raise ValueError(f"{path} is {value!r}, expected {expected}")


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    types_by_name = typing.get_type_hints(kind, include_extras=True)
    return {field.name: types_by_name[field.name] for field in dataclasses.fields(kind)}


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Return ``value``, as Python or parsed JSON has it, as ``kind``. Raises ValueError if it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = _convert(arguments[0], value, path)
        for condition in arguments[1:]:
            if isinstance(condition, Must):
                require(condition.hold(value), path, value, condition.expected)
        return value
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _convert(inner, value, path)
    if origin is Literal:
        require(value in arguments, path, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        is_list, any_length = isinstance(value, list | tuple), arguments[-1] is Ellipsis
        fits = is_list and (any_length or len(value) == len(arguments))
        require(fits, path, value, "a list" if any_length else f"a list of {len(arguments)}")
        kinds = arguments[:1] * len(value) if any_length else arguments
        return tuple(_convert(*entry, f"{path}[{i}]") for i, entry in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        require(isinstance(value, dict), path, value, "an object")
        return {name: _convert(arguments[1], entry, f"{path}.{name}") for name, entry in value.items()}
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, path)
    if kind is Path:
        require(isinstance(value, str | Path), path, value, "a path")
        return Path(value)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    require(fits and (kind is bool or not isinstance(value, bool)), path, value, _IN_WORDS[kind])
    if kind is not str:
        require(abs(value) <= 1e30, path, value, "a finite number, at most 1e30")  # float32 ends at 3e38
    return kind(value)


def _convert_dataclass(kind: Any, value: Any, path: str) -> Any:
    if isinstance(value, kind):
        check_fields(value, path)
        return value
    require(isinstance(value, Mapping), path or kind.__name__, value, "an object")
    fields = _field_types(kind)
    wrong = [("unknown", set(value) - set(fields)), ("missing", set(fields) - set(value))]
    if any(names for _, names in wrong):
        problems = " and ".join(f"{what} fields {sorted(names)}" for what, names in wrong if names)
        raise ValueError(f"{path or kind.__name__} has {problems}")
    return kind(**{name: _convert(fields[name], entry, f"{path}.{name}".lstrip(".")) for name, entry in value.items()})
