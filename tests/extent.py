"""How much to test: a part by default, everything with `./run_tests.sh --all`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

EVERYTHING = os.environ.get("HOLDFAST_TESTS_COLD") == "1"


def every(nth: int, items: Sequence[T], *, start: int = 0) -> list[T]:
    """Each `nth` item from number `start % nth` on by default; all of them with `--all`."""
    return list(items if EVERYTHING else items[start % nth :: nth])


def some(items: Sequence[T], count: int) -> list[T]:
    """The first `count` items by default; all of them with `--all`."""
    return list(items if EVERYTHING else items[:count])
