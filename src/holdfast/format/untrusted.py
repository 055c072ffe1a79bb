"""Check members of untrusted files, which anyone may have written.

Raises, in each function whose docstring does not say otherwise:
    ValueError: the member is invalid.
"""

from __future__ import annotations

import json
import math
from typing import Any

from holdfast.errors import FormatError

DIMS_MAX = 64
"""Maximum number of dims of a tensor in torch."""

SIZE_MAX = (1 << 63) - 1

KEYS_MAX = 64
"""Maximum number of keys in a path."""

_KEY_TYPES = frozenset((str, int))
_INTS = frozenset((int,))

_ENCODER = json.JSONEncoder(allow_nan=False)


def count_of(value: object) -> int:
    """Check a whole number that is not negative, such as a size, a position or a rank."""
    if type(value) is not int:
        # Do not quote the value: its text may be huge.
        raise ValueError(f"need a count, got a {type(value).__name__}")
    if value < 0:
        raise ValueError(f"need a count, got {value}")
    return value


def counts_of(values: list[Any]) -> tuple[int, ...]:
    """Check a list of whole numbers that are not negative."""
    # Check thousands of such lists in half the time of a call for each number.
    if not _INTS.issuperset(map(type, values)) or min(values, default=0) < 0:
        return tuple(map(count_of, values))
    return tuple(values)


def number_of(value: object) -> float:
    """Check a number, and convert it to a float."""
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"need a number, got a {type(value).__name__}")
    return float(value)


def seconds_of(value: object) -> float:
    """Check a duration in seconds, and convert it to a float."""
    seconds = value if type(value) is float else number_of(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"need seconds, got {seconds}")
    return seconds


def names_of(value: object) -> tuple[str, ...]:
    """Check a list of names."""
    if not isinstance(value, list) or {type(name) for name in value} - {str}:
        raise ValueError("need a list of names")
    return tuple(value)


def json_of(value: dict[str, Any]) -> dict[str, Any]:
    """Check a JSON object of any content. Refuses NaN and infinities, which Python's parser accepts
    although JSON does not have them."""
    found = dict(value.items())
    # Skip the encoder if all values are ints and strings, as in most objects: these are valid.
    if not _KEY_TYPES.issuperset(map(type, found.values())):
        _ENCODER.encode(found)
    return found


def check_sizes(sizes: object) -> tuple[int, ...]:
    """Check sizes, offsets or strides: at most `DIMS_MAX`, each from 0 to `SIZE_MAX`."""
    if not isinstance(sizes, tuple | list) or len(sizes) > DIMS_MAX:
        raise ValueError(f"need up to {DIMS_MAX} sizes, got a {type(sizes).__name__}")
    for size in sizes:
        if type(size) is not int or not 0 <= size <= SIZE_MAX:
            raise ValueError(f"invalid size {str(size)[:30] if type(size) is int else type(size)}")
    return tuple(sizes)


def path_of(path: object) -> tuple[str | int, ...]:
    """Check the path of a leaf: 1 to `KEYS_MAX` strings and ints."""
    if not isinstance(path, tuple | list) or not 0 < len(path) <= KEYS_MAX:
        raise ValueError(f"a path needs 1 to {KEYS_MAX} keys")
    if not _KEY_TYPES.issuperset(map(type, path)):
        raise ValueError("a path has a key that is neither text nor a number")
    return tuple(path)


def check_file_name(name: object, where: str) -> None:
    """Check that a name can only refer to a file in the checkpoint's own folder.

    Raises:
        FormatError: the name is not a string, or it is a path and not a plain file name.
    """
    if type(name) is not str:
        raise FormatError(f"`{where}` names a file by a {type(name).__name__}")
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise FormatError(f"`{where}` names a file outside of its folder: {name[:200]!r}")
