"""What a manifest says of a checkpoint as a whole, beside its entries, as a stranger's file has it.

Raises, in each function that reads:
    ValueError, TypeError, AttributeError: something else is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def encode_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers by name; JSON has none that is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def decode_metrics(stored: dict[str, Any]) -> dict[str, float]:
    """The same again; not-a-number for what was not finite."""
    return {name: _metric(value) for name, value in stored.items()}


def _metric(stored: float | None) -> float:
    if stored is None:
        return math.nan
    if type(stored) not in (int, float):
        raise ValueError(f"a metric that is a {type(stored).__name__}")
    return float(stored)


def told(stored: dict[str, Any]) -> dict[str, Any]:
    """What a writer adds, as it is. Python's JSON reads infinities, which JSON has not."""
    json.dumps(stored, allow_nan=False)
    return dict(stored.items())


def components(stored: object) -> tuple[str, ...] | None:
    """Top-level names that are not the model's; None where the writer did not say."""
    if stored is None:
        return None
    if not isinstance(stored, list) or {type(name) for name in stored} - {str}:
        raise ValueError("components that are no list of names")
    return tuple(stored)
