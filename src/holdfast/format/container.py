"""Read and display values in containers of `torch.save`, without torch. Nothing is imported or
called."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.manifest import Span
from holdfast.format.pickles import AnyGlobal, DtypeName, Other
from holdfast.format.torchzip import GLOBALS, PICKLE_BYTES_MAX, Tensor, described, read_pickle

MEMBERS_SHOWN_MAX = 40
"""Maximum number of members of a list or dict to show."""

DEPTH_SHOWN_MAX = 8

TEXT_SHOWN_MAX = 2000
"""Maximum number of characters to show of a string, or of a whole value. Also the maximum number of
members to visit for one value; a shared member counts each time."""

INT_BITS_MAX = 8000
"""Maximum bits of an int to show in digits. Python refuses to format far larger ints."""


def read_value(data: bytes, *, where: str) -> object:
    """Read the value in a container. In the value, `Plain` objects stand for objects of classes
    that are not imported.

    Raises:
        FormatError: the bytes are not a container of torch.save.
    """

    def fetch(offset: int, nbytes: int) -> bytes:
        return data[offset : offset + nbytes]

    try:
        allowed = AnyGlobal(GLOBALS)
        item = Span(0, len(data))
        value, _ = read_pickle(fetch, item, allowed, PICKLE_BYTES_MAX, where=where)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"`{where}` is no container of torch.save: {error}") from error
    return value


def spelled(value: object) -> str:
    """Format a value as `repr` does, but cut long values short.

    >>> spelled({"step": 3, "betas": (0.9, 0.95)})
    "{'step': 3, 'betas': (0.9, 0.95)}"
    """
    text = _Speller().spell(value)
    return text if len(text) <= TEXT_SHOWN_MAX else f"{text[:TEXT_SHOWN_MAX]}..."


def as_json(value: object, num_max: int) -> Any:
    """Convert a value for JSON. Objects without a JSON type become text.

    Raises:
        FormatError: the value is nested too deep, or has more than `num_max` members. A shared
            member counts each time.
    """
    count = 0

    def convert(node: object, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > num_max or depth > 10 * DEPTH_SHOWN_MAX:
            raise FormatError(f"a value has more than {num_max} members, or contains itself")
        if isinstance(node, Mapping):
            return {str(key): convert(member, depth + 1) for key, member in node.items()}
        if isinstance(node, list | tuple):
            return [convert(member, depth + 1) for member in node]
        plain = node is None or type(node) in (bool, int, float, str)
        large = isinstance(node, int) and node.bit_length() > INT_BITS_MAX
        return node if plain and not large else spelled(node)

    return convert(value, 0)


class _Speller:
    """Formats one value. Stops after `TEXT_SHOWN_MAX` members, since even a small file may refer to
    one member very often."""

    def __init__(self) -> None:
        self._left = TEXT_SHOWN_MAX

    def spell(self, value: object, depth: int = 0) -> str:
        self._left -= 1
        if depth > DEPTH_SHOWN_MAX or self._left < 0:
            return "..."
        match value:
            case Mapping():
                return "{" + self._pairs(value, depth) + "}"
            case list():
                return f"[{self._members(value, depth)}]"
            case tuple():
                return f"({self._members(value, depth)}{',' if len(value) == 1 else ''})"
            case set() | frozenset():
                return "{" + self._members([*value], depth) + "}" if value else "set()"
            case str() | bytes() | bytearray():
                text = repr(value[:TEXT_SHOWN_MAX])
                return text if len(value) <= TEXT_SHOWN_MAX else f"{text}..."
            case DtypeName():
                return f"torch.{value.name}"
            case Tensor():
                return _spelled_tensor(value)
            case Other():
                return self._call(value, depth)
        if isinstance(value, int) and value.bit_length() > INT_BITS_MAX:
            return f"a number of {value.bit_length()} bits"
        return repr(value) if isinstance(value, int | float | None) else type(value).__name__

    def _call(self, value: Other, depth: int) -> str:
        match value.title, value.args:
            case (("set" | "frozenset"), (list(members),)):
                return "{" + self._members(members, depth) + "}" if members else "set()"
            case "complex", (float(real), float(imaginary)):
                return repr(complex(real, imaginary))
            case "_codecs.encode", (str(text), "latin1"):
                return self.spell(text.encode("latin1", "replace"), depth)
        return f"{value.title}({self._members(value.args, depth)})"

    def _pairs(self, value: Mapping[Any, Any], depth: int) -> str:
        spelled_pairs = (
            f"{self.spell(key, depth + 1)}: {self.spell(member, depth + 1)}"
            for key, member in value.items()
        )
        return _joined(spelled_pairs, len(value))

    def _members(self, values: Sequence[Any], depth: int) -> str:
        return _joined((self.spell(member, depth + 1) for member in values), len(values))


def _spelled_tensor(value: Tensor) -> str:
    try:
        tensor = described(value)
    except (ValueError, LookupError, TypeError, AttributeError):
        return "a tensor"
    return f"tensor of {tensor.dtype} {list(tensor.shape)}"


def _joined(spelled_members: Iterator[str], count: int) -> str:
    shown = list(islice(spelled_members, MEMBERS_SHOWN_MAX))
    if len(shown) < count:
        shown.append(f"... {count - len(shown)} more")
    return ", ".join(shown)
