"""Test kit for authors of stores and of stateful objects."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.testing.states import round_trip

__all__ = ["round_trip"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module `holdfast.testing` has no attribute `{name}`")
    return getattr(import_module("holdfast.testing.states"), name)
