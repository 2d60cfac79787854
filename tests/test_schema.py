from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from simclr.schema import Must, Positive, Size, check_fields, from_values, to_json


@dataclass(frozen=True)
class Part:
    rate: Positive = 0.5
    even: Annotated[Size, Must(lambda value: value % 2 == 0, "even")] = 2


@dataclass(frozen=True)
class Whole:
    name: str
    part: Part = field(default_factory=Part)
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    place: Path | None = None
    pairs: tuple[tuple[Size, Positive], ...] = ()
    table: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)


WHOLE = Whole("n", Part(2.5, 4), "b", True, Path("a b/c"), ((1, 0.5), (2, 1.0)), {"x": "y"})


def test_json_gives_an_equal_dataclass_back() -> None:
    assert from_values(Whole, json.loads(to_json(WHOLE))) == WHOLE
    assert from_values(Whole, json.loads(to_json(Whole("n")))) == Whole("n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 1}, "name is 1, expected text"),
        ({"part": 1}, "part is 1, expected an object"),
        ({"part": {"rate": 0, "even": 2}}, "part.rate is 0.0, expected > 0"),
        ({"part": {"rate": 1, "even": 3}}, "part.even is 3, expected even"),
        ({"part": {"rate": 1, "even": 0}}, "part.even is 0, expected at least 1, and below 2^63"),
        ({"part": {"rate": 1, "even": 2**63}}, f"part.even is {2**63}, expected at least 1, and below 2^63"),
        ({"part": {"rate": 10**400, "even": 2}}, f"part.rate is {10**400}, expected a finite number, at most 1e30"),
        ({"part": {"rate": 1e300, "even": 2}}, "part.rate is 1e+300, expected a finite number, at most 1e30"),
        ({"part": {"rate": math.nan, "even": 2}}, "part.rate is nan, expected a finite number, at most 1e30"),
        ({"part": {"rate": 1}}, "part has missing fields ['even']"),
        ({"part": {"rate": 1, "odd": 1}}, "part has unknown fields ['odd'] and missing fields ['even']"),
        ({"kind": "c"}, "kind is 'c', expected one of a, b"),
        ({"kind": []}, "kind is [], expected one of a, b"),
        ({"flag": 1}, "flag is 1, expected true or false"),
        ({"place": 1}, "place is 1, expected a path"),
        ({"pairs": [[1, 0.5, 2]]}, "pairs[0] is [1, 0.5, 2], expected a list of 2"),
        ({"pairs": [[1, 0.5], [True, 1.0]]}, "pairs[1][0] is True, expected a whole number"),
        ({"pairs": "1"}, "pairs is '1', expected a list"),
        ({"table": {"x": 1}}, "table.x is 1, expected text"),
        ({"table": []}, "table is [], expected an object"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected(changes: dict[str, Any], message: str) -> None:
    values = json.loads(to_json(WHOLE)) | changes
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        from_values(Whole, values)
    assert str(raised.value) == message


def test_python_is_checked_as_json_is_and_converted() -> None:
    whole = Whole("n", Part(3), place="a", pairs=[(1, 1)])  # type: ignore[arg-type]
    assert (whole.place, whole.pairs) == (Path("a"), ((1, 1.0),))
    assert isinstance(whole.part.rate, float)
    with pytest.raises(ValueError, match=r"^part.rate is -1.0, expected > 0$"):
        Whole("n", Part(-1))
    with pytest.raises(ValueError, match=r"^Whole is \[\], expected an object$"):
        from_values(Whole, [])
