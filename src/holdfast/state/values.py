"""Values that are not tensors, in the format of `torch.save`, read without running code."""

from __future__ import annotations

import io
from typing import Any

import torch

from holdfast.errors import FormatError, UsageError
from holdfast.format.container import spelled
from holdfast.spelling import with_article
from holdfast.state.tree import type_name

_KNOWN_MAX = 1000
_MEMBERS_MAX = 16
_INNER_MAX = 1000
_SCALARS = frozenset({bool, int, float, str, type(None)})
_DEPTH_MAX = 16
_INT_MAX = 1 << 64
"""Larger integers use another pickle opcode, which some versions of torch cannot read."""

_BITS_MAX = 2039
"""Most bits of an integer that `torch.load` reads: a sign and these fit into 255 bytes."""


def encode_value(name: str, value: Any) -> bytes:
    """Return the container of a value, in the format of stock DCP."""
    container = _container(value)
    if container is None:
        inside, part = _culprit(value)
        if _is_too_large(part):
            raise UsageError(
                f"`{name}{inside}` is an int of {part.bit_length():,} bits, expected at most "
                f"{_BITS_MAX:,}: `torch.load` cannot read larger ones",
                hint="save it as text, `hex(number)`, and convert the text by `int(text, 16)`",
            )
        cls = type(part).__name__
        raise UsageError(
            f"`{name}{inside}` is {with_article(type_name(part))}, which a load could rebuild only "
            "by running code that the checkpoint names",
            hint="replace it by tensors and plain values (numbers, texts, bytes, lists, dicts, "
            "tuples), and create the object from them in `load_state_dict`; or trust the class in "
            f"every process that loads: torch.serialization.add_safe_globals([{cls}])",
        )
    return container


def _container(value: Any) -> bytes | None:
    """Return the bytes of a value; None if they could not be read safely."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        if not reads_back(value):
            torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - pickling calls methods of the object
        return None
    return buffer.getvalue()


def _is_too_large(value: Any) -> bool:
    return type(value) is int and value.bit_length() > _BITS_MAX


def _culprit(value: Any, depth: int = 0) -> tuple[str, Any]:
    """Find the innermost part of a value that cannot be stored. Return its position, as text such
    as `[0]['a']`, and the part."""
    members: list[tuple[str, Any]] = []
    if type(value) in (list, tuple):
        members = [(f"[{number}]", member) for number, member in enumerate(value)]
    elif isinstance(value, dict):
        members = [(" (a key)", key) for key in value]
        members += [(f"[{spelled(key)}]", member) for key, member in value.items()]
    elif type(value) in (set, frozenset):
        members = [(" (a member)", member) for member in value]
    for where, member in members if depth < _DEPTH_MAX else ():
        is_scalar = type(member) in _SCALARS
        if _is_too_large(member) or (not is_scalar and _container(member) is None):
            inside, part = _culprit(member, depth + 1)
            return where + inside, part
    return "", value


def reads_back(value: Any, depth: int = 0) -> bool:
    """Return whether a value consists of plain values only, which are known to be readable. A test
    by reading it back would take too long for Python's random state: 625 numbers that change with
    each save."""
    if type(value) is int:
        return -_INT_MAX < value < _INT_MAX
    if type(value) in (list, tuple):
        if {*map(type, value)} == {int}:
            return bool(min(value) > -_INT_MAX and max(value) < _INT_MAX)
        return depth < _DEPTH_MAX and all(reads_back(member, depth + 1) for member in value)
    if type(value) is dict:
        return all(type(key) is str for key in value) and reads_back([*value.values()], depth)
    return type(value) in _SCALARS


class Containers:
    """Encodes values, and caches the containers of small values. Hundreds of the values in a state
    are equal, and many stay the same from save to save."""

    def __init__(self) -> None:
        self._known: dict[tuple[type, str], bytes] = {}

    def of(self, name: str, value: Any) -> bytes:
        """Return the container of a value, as `encode_value` does."""
        if not _is_plain(value):
            return encode_value(name, value)
        # Compare texts: 0.0 and -0.0 are equal as numbers, but need different containers.
        try:
            key = type(value), repr(value)
        except ValueError:
            # Python does not format an int of more than 4,300 digits.
            return encode_value(name, value)
        if key not in self._known:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            self._known[key] = encode_value(name, value)
        return self._known[key]


def _is_plain(value: Any) -> bool:
    """Return whether a value is determined by its type and `repr`, and the `repr` is short enough
    for a key. The limits admit Python's random state: a tuple with 625 numbers in a tuple."""
    if type(value) is not tuple:
        return type(value) in _SCALARS
    return len(value) <= _MEMBERS_MAX and all(
        type(member) in _SCALARS
        or (
            type(member) in (list, tuple)
            and len(member) <= _INNER_MAX
            and _SCALARS.issuperset(map(type, member))
        )
        for member in value
    )


def decode_value(name: str, container: bytes, *, where: str) -> Any:
    """Return the value in a container."""
    try:
        return torch.load(io.BytesIO(container), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        named = next((line.strip() for line in reason if "GLOBAL" in line), reason[0])
        raise FormatError(
            f"`{where}`: value `{name}` cannot be read without running code: {named}",
            hint=f"leave `{name.split('.')[0]}` out of the load",
        ) from error
