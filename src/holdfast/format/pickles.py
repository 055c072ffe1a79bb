"""Pickles by allow-list: read without importing what they name, written without it either.

The opcodes are those of Python's `pickletools`. Reading goes through the standard library's
unpickler, which imports nothing by itself: every global is looked up in the caller's table, and
what is not there is refused by name.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.dtypes import BY_NAME


class Plain:
    """Stands for an instance of a class that is not imported: its arguments and its state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Plain:
        made = super().__new__(cls)
        made.args = args
        made.state = {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True, slots=True)
class DtypeName:
    """Stands for `torch.<name>`."""

    name: str


def loads(data: bytes, allowed: Mapping[tuple[str, str], Any], *, where: str) -> Any:
    """The object in a pickle, with `allowed[module, name]` in the place of each global.

    A pickle can set attributes of what it names, so only subclasses of `Plain`, built-in types and
    immutable values may stand for anything: a class of Python's own would be changed for all.

    `torch` dtypes are always allowed, and come as `DtypeName`; persistent ids come as they are.

    Raises:
        FormatError: a global that is not allowed, by name; or not a pickle.
    """
    try:
        _check_sizes(data)
        return _Loader(data, allowed, where).load()
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(f"`{where}` is not a whole pickle: {error}") from error


_COUNTED = {
    **dict.fromkeys(b"U\x8cC\x8a", 1),
    **dict.fromkeys(b"TXB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
"""Opcodes whose argument begins with its own size, in so many bytes."""

_LINES = dict.fromkeys(b"FILSVPgp", 1) | dict.fromkeys(b"ci", 2)
"""Opcodes whose argument is so many lines."""

_FIXED = {
    **dict.fromkeys(b"hqK\x80\x82", 1),
    **dict.fromkeys(b"M\x83", 2),
    **dict.fromkeys(b"Jjr\x84", 4),
    **dict.fromkeys(b"G\x95", 8),
}
"""Opcodes whose argument has so many bytes; any other has none."""

_SPECIAL = [op in _COUNTED or op in _LINES or op in b"r." for op in range(256)]
_WIDTHS = [1 + _FIXED.get(op, 0) for op in range(256)]


def _check_sizes(data: bytes) -> None:
    """Refuse a pickle that would make the unpickler take room for more than the file holds: it
    believes any size, and any place of its memo, before it has read what goes there."""
    at, end = 0, len(data)
    while at < end:
        op = data[at]
        if not _SPECIAL[op]:
            at += _WIDTHS[op]
        elif op in _COUNTED:
            start = at + 1 + _COUNTED[op]
            at = start + int.from_bytes(data[at + 1 : start], "little")
        elif op in _LINES:
            first = at + 1
            for _ in range(_LINES[op]):
                at = data.find(b"\n", at + 1)
                if at < 0:
                    raise ValueError("a line without its end")
            if op in b"p" and int(data[first:at]) > end:
                raise ValueError("remembers more than it has")
            at += 1
        elif op in b"r":
            if int.from_bytes(data[at + 1 : at + 5], "little") > end:
                raise ValueError("remembers more than it has")
            at += 5
        else:
            return
    if at > end:
        raise ValueError(f"an argument ends {at - end} bytes after the file")


class _Loader(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any], where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in BY_NAME:
            return DtypeName(name)
        try:
            return self._allowed[module, name]
        except KeyError:
            raise FormatError(
                f"`{self._where}` names `{module}.{name}`, which no checkpoint needs: refused",
                hint="a pickle can run any code; do not open this file with torch.load either",
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


@dataclass(frozen=True, slots=True)
class Global:
    """A module's member, by name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """The result of calling a global."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance made without its `__init__`, then given its state."""

    cls: Global
    state: Any


@dataclass(frozen=True, slots=True)
class Table:
    """A dict whose keys may be instances."""

    items: list[tuple[Any, Any]]


def dumps(value: Any) -> bytes:
    """A pickle (protocol 4) of plain values, `Global`, `Call` and `Instance`.

    The same value always gives the same bytes. Globals and strings are written once.
    """
    out = _Dumper()
    out.put(value)
    return b"\x80\x04" + b"".join(out.parts) + b"."


class _Dumper:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._memo: dict[object, int] = {}

    def put(self, value: Any) -> None:
        match value:
            case None:
                self.parts.append(b"N")
            case bool():
                self.parts.append(b"\x88" if value else b"\x89")
            case int():
                self.parts.append(pickled_int(value))
            case str():
                self._once(value, self._put_str)
            case tuple():
                self._put_tuple(value)
            case list():
                self._put_all(b"](", value, b"e")
            case dict():
                self._put_all(b"}(", [part for item in value.items() for part in item], b"u")
            case Table():
                self._put_all(b"}(", [part for item in value.items for part in item], b"u")
            case Global():
                self._once(value, self._put_global)
            case Call():
                self.put(value.function)
                self.put(value.args)
                self.parts.append(b"R")
            case Instance():
                self.put(value.cls)
                self.parts.append(b")\x81")
                if value.state is not None:
                    self.put(value.state)
                    self.parts.append(b"b")
            case _:
                raise TypeError(f"no plain value: {type(value)}")

    def _once(self, value: Any, put: Any) -> None:
        at = self._memo.get(value)
        if at is None:
            put(value)
            self._memo[value] = len(self._memo)
            self.parts.append(b"\x94")
        else:
            self.parts.append(b"h" + bytes([at]) if at < 256 else b"j" + struct.pack("<I", at))

    def _put_str(self, value: str) -> None:
        text = value.encode()
        short = len(text) < 256
        self.parts.append(b"\x8c" + bytes([len(text)]) if short else b"X" + _u32(len(text)))
        self.parts.append(text)

    def _put_global(self, value: Global) -> None:
        self._once(value.module, self._put_str)
        self._once(value.name, self._put_str)
        self.parts.append(b"\x93")

    def _put_tuple(self, value: tuple[Any, ...]) -> None:
        if 0 < len(value) < 4:
            for member in value:
                self.put(member)
            self.parts.append((b"\x85", b"\x86", b"\x87")[len(value) - 1])
        else:
            self._put_all(b"(", value, b"t")

    def _put_all(self, head: bytes, members: Any, tail: bytes) -> None:
        self.parts.append(head)
        for member in members:
            self.put(member)
        self.parts.append(tail)


def pickled_int(value: int) -> bytes:
    """The shortest opcode for this int."""
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -1 << 31 <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def pickled_str(text: str) -> bytes:
    """A string as protocol 2 has it."""
    return b"X" + _u32(len(text.encode())) + text.encode()


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)
