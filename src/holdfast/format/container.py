"""Values that are not tensors, for people to look at: from the container that `torch.save` wrote,
without torch, and whatever they name: nothing is imported or called."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.archive import Fetch, read_records, windowed
from holdfast.format.manifest import Path, Span
from holdfast.format.pickles import DtypeName, Plain, loads
from holdfast.format.torchzip import GLOBALS, Tensor, content, described

PICKLE_BYTES_MAX = 256 << 20
"""Of `data.pkl`, as for a whole `.pt` file."""

MEMBERS_SHOWN_MAX = 40
"""Of a list or a dict."""

DEPTH_SHOWN_MAX = 8

TEXT_SHOWN_MAX = 2000
"""Characters of one text, and of a value as a whole; and its members, counted at each place."""

INT_BITS_MAX = 8000
"""Of a number that is written in digits: Python refuses to write far larger ones."""


def read_value(data: bytes, *, where: str) -> object:
    """The value in a container of its own; `Plain` objects stand for what only torch could make.

    Raises:
        FormatError: no container of torch.save.
    """

    def fetch(offset: int, nbytes: int) -> bytes:
        return data[offset : offset + nbytes]

    return read_member(fetch, len(data), (), where=where)


def read_member(fetch: Fetch, nbytes: int, path: Path, *, where: str) -> object:
    """The value at this path in a `.pt` file of `nbytes`.

    Raises:
        FormatError: no file of torch.save, or nothing at that path.
    """
    try:
        within = windowed(fetch, Span(0, nbytes))
        records = read_records(within, nbytes)
        pickled = content(within, records["data.pkl"], PICKLE_BYTES_MAX)
        found = loads(pickled, _Any(GLOBALS), where=where)
        for key in path:
            found = _member(found, key)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"`{where}` is no container of torch.save: {error}") from error
    return found


def spelled(value: object) -> str:
    """A value as Python writes it, long ones in part.

    >>> spelled({"step": 3, "betas": (0.9, 0.95)})
    "{'step': 3, 'betas': (0.9, 0.95)}"
    """
    text = _Speller().spell(value)
    return text if len(text) <= TEXT_SHOWN_MAX else f"{text[:TEXT_SHOWN_MAX]}..."


def as_json(value: object, num_max: int) -> Any:
    """A value for JSON: what JSON has not is text.

    Raises:
        FormatError: it has more than `num_max` members, counting what is shared at each place.
    """
    count = 0

    def convert(one: object, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > num_max or depth > 10 * DEPTH_SHOWN_MAX:
            raise FormatError(f"a value of more than {num_max} members, or one that holds itself")
        if isinstance(one, Mapping):
            return {str(key): convert(member, depth + 1) for key, member in one.items()}
        if isinstance(one, list | tuple):
            return [convert(member, depth + 1) for member in one]
        plain = one is None or type(one) in (bool, int, float, str)
        large = isinstance(one, int) and one.bit_length() > INT_BITS_MAX
        return one if plain and not large else spelled(one)

    return convert(value, 0)


class _Named(Plain):
    """Stands for what a global of the pickle would make."""

    title = ""


class _Any(dict[tuple[str, str], Any]):
    """Globals that are known, and a stand-in for every other."""

    def __missing__(self, key: tuple[str, str]) -> type[_Named]:
        title = ".".join(key).replace("__builtin__.", "").removeprefix("builtins.")
        made = self[key] = type("_Named", (_Named,), {"title": title})
        return made


def _member(found: Any, key: str | int) -> Any:
    if isinstance(found, Mapping) and key not in found:
        # A path spells every key of a dict as text.
        return {str(original): member for original, member in found.items()}[str(key)]
    return found[key]


class _Speller:
    """Spells one value; stops after so many members, however often they are shared."""

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
                whole = repr(value[:TEXT_SHOWN_MAX])
                return whole if len(value) <= TEXT_SHOWN_MAX else f"{whole}..."
            case DtypeName():
                return f"torch.{value.name}"
            case Tensor():
                return _spelled_tensor(value)
            case _Named():
                return self._call(value, depth)
        if isinstance(value, int) and value.bit_length() > INT_BITS_MAX:
            return f"a number of {value.bit_length()} bits"
        return repr(value) if isinstance(value, int | float | None) else type(value).__name__

    def _call(self, value: _Named, depth: int) -> str:
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
        return _joined((self.spell(one, depth + 1) for one in values), len(values))


def _spelled_tensor(value: Tensor) -> str:
    try:
        tensor = described(value)
    except (ValueError, LookupError, TypeError, AttributeError):
        return "a tensor"
    return f"tensor of {tensor.dtype} {list(tensor.shape)}"


def _joined(spelled_members: Iterator[str], count: int) -> str:
    shown = list(islice(spelled_members, MEMBERS_SHOWN_MAX))
    more = count - len(shown)
    return ", ".join([*shown, *([f"... {more} more"] if more else [])])
