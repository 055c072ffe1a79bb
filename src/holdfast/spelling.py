"""Human-readable text for bytes, rates, counts and ages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def spelled_bytes(nbytes: float) -> str:
    """Format a number of bytes.

    >>> spelled_bytes(999), spelled_bytes(1536), spelled_bytes(2.2e9)
    ('999 B', '1.5 kB', '2.2 GB')
    """
    size = nbytes
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} PB"


def listed(lines: Sequence[str], num_max: int) -> str:
    """Format the first `num_max` lines, each indented and on a line of its own.

    >>> listed(["a", "b", "c"], 2)
    '\\n  a\\n  b\\n  ... and 1 more'
    """
    more = [f"... and {len(lines) - num_max} more"] if len(lines) > num_max else []
    return "".join(f"\n  {line}" for line in [*lines[:num_max], *more])


def counted(count: int, noun: str) -> str:
    """Format a count with its noun, in the plural where needed.

    >>> counted(1, "file"), counted(1200, "file")
    ('1 file', '1,200 files')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def spelled_layout(layout: Mapping[str, Any]) -> str:
    """Describe the ranks and the parallelism that wrote a checkpoint; empty if unknown.

    >>> spelled_layout({"world_size": 8, "tensor_parallel": 2})
    '8 ranks, tensor_parallel 2'
    """
    ranks = layout.get("world_size")
    texts = [counted(ranks, "rank")] if type(ranks) is int else []
    texts += [f"{name} {value}" for name, value in layout.items() if name != "world_size"]
    return ", ".join(texts)


def spelled_age(seconds: float) -> str:
    """Format an age in its largest fitting unit.

    >>> spelled_age(7200)
    '2 h'
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def rate(nbytes: int, seconds: float) -> str:
    """Format a number of bytes, the time to read or write them, and the rate.

    >>> rate(2_500_000, 0.5)
    '2.5 MB in 0.50 s (5.0 MB/s)'
    """
    per_s = spelled_bytes(nbytes / max(seconds, 1e-9))
    return f"{spelled_bytes(nbytes)} in {seconds:.2f} s ({per_s}/s)"


def finite(value: Any) -> Any:
    """Copy a value for JSON, with infinities and NaN as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [finite(member) for member in value]
    return value


def with_article(noun: str) -> str:
    """Return a noun with its indefinite article.

    >>> with_article("object"), with_article("function")
    ('an object', 'a function')
    """
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"
