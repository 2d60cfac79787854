"""Fixtures and session rules of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import shut_down_workers


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_session() -> Iterator[None]:
    yield
    shut_down_workers()
