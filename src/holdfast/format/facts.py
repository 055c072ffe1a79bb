"""Encode and decode the members of a manifest that describe the checkpoint as a whole.

Raises, in each function that decodes:
    ValueError, TypeError, AttributeError: the value is invalid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def encode_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Replace infinities and NaN, which JSON lacks, by None."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def decode_metrics(stored: dict[str, Any]) -> dict[str, float]:
    """Decode metrics by name, with NaN for numbers that were not finite."""
    return {name: _metric(value) for name, value in stored.items()}


def _metric(stored: float | None) -> float:
    if stored is None:
        return math.nan
    if type(stored) not in (int, float):
        raise ValueError(f"a metric is a {type(stored).__name__}, not a number")
    return float(stored)


def checked_json(stored: dict[str, Any]) -> dict[str, Any]:
    """Check an object of arbitrary JSON: Python's parser accepts infinities, JSON does not."""
    json.dumps(stored, allow_nan=False)
    return dict(stored.items())


def components(stored: object) -> tuple[str, ...] | None:
    """Decode the top-level names that are not part of the model; None if unknown."""
    if stored is None:
        return None
    if not isinstance(stored, list) or {type(name) for name in stored} - {str}:
        raise ValueError("components are no list of names")
    return tuple(stored)
