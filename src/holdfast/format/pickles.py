"""Pickles by allow-list: read without importing what they name, written without it either.

Every global is looked up in the caller's table, and what is not there is refused by name. Nothing
is called: `Plain` objects stand for what would be, with the arguments and the state that it has.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.opcodes import DtypeName, Machine, Plain

__all__ = ["Call", "DtypeName", "Dumper", "Global", "Instance", "Plain", "loads"]


def loads(data: bytes, allowed: Mapping[tuple[str, str], Any], *, where: str) -> Any:
    """The object in a pickle, with `allowed[module, name]` in the place of each global.

    Calls are made of subclasses of `Plain`, of `OrderedDict` without arguments, and of `tuple`,
    `int` and `str` with one of their own; any other value may be named, but not called.

    `torch` dtypes are always allowed, and come as `DtypeName`; persistent ids come as they are.
    Time and memory stay in proportion to the bytes. What comes back may be shared and cyclic.

    Raises:
        FormatError: a global that is not allowed, by name; or not a pickle.
    """
    try:
        return Machine(data, allowed, where).run()
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        reason = "it ends early" if isinstance(error, IndexError) else error
        raise FormatError(f"`{where}` is not a whole pickle: {reason}") from error


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


class Dumper:
    """Writes a pickle (protocol 4) of plain values, `Global`, `Call` and `Instance`.

    The same values always give the same bytes. Globals and strings are written once.
    """

    def __init__(self, start: bytes) -> None:
        self.parts: list[bytes] = [start]
        self._memo: dict[object, int] = {}

    def raw(self, opcodes: bytes) -> None:
        """These bytes as they are; they leave the memo alone."""
        self.parts.append(opcodes)

    @property
    def num_known(self) -> int:
        """Globals and strings in the memo."""
        return len(self._memo)

    def at(self, value: object) -> int:
        """The place in the memo of a global or a string that is known."""
        return self._memo[value]

    def get(self, value: object) -> bytes:
        """What pushes a global or a string that is known."""
        at = self._memo[value]
        return b"h" + bytes([at]) if at < 256 else b"j" + _u32(at)

    def take(self) -> bytes:
        """What was put since the last time; the memo stays."""
        taken = b"".join(self.parts)
        self.parts = []
        return taken

    def know(self, *values: object) -> None:
        """Put globals and strings where nothing comes of them, so that `get` has them."""
        for value in values:
            self.put(value)
            self.parts.append(b"0")

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
        if value in self._memo:
            self.parts.append(self.get(value))
        else:
            put(value)
            self._memo[value] = len(self._memo)
            self.parts.append(b"\x94")

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
