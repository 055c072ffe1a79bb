"""Write pickles opcode by opcode, so that equal values always give equal bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A reference to a member of a module, by name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class FileName:
    """A string that names a file. It has its own entry in the memo of the pickler, even if there is
    an equal string that does not name a file."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a global with positional arguments."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance that readers make from its state, without `__init__`."""

    cls: Global
    state: Any


class Dumper:
    """Writes a pickle (protocol 4) of plain values, `Global`, `FileName`, `Call` and `Instance`.

    Equal values always give equal bytes. Each global and string is written once and memoized.
    """

    def __init__(self, start: bytes) -> None:
        self.parts: list[bytes | bytearray] = [start]
        self._memo: dict[object, int] = {}

    def raw(self, opcodes: bytes | bytearray) -> None:
        """Append opcodes, none of which may memoize an object."""
        self.parts.append(opcodes)

    @property
    def num_memoized(self) -> int:
        return len(self._memo)

    def index(self, value: object) -> int:
        """Return the memo index of a memoized global or string."""
        return self._memo[value]

    def get(self, value: object) -> bytes:
        """Return the opcode that pushes a memoized global or string."""
        return _get(self._memo[value])

    def take(self) -> bytes:
        """Remove and return the bytes written so far. Keeps the memo."""
        taken = b"".join(self.parts)
        self.parts = []
        return taken

    def memoize(self, *values: object) -> None:
        """Memoize globals and strings without adding them to the pickled object."""
        for value in values:
            self.put(value)
            self.parts.append(b"0")

    def put_text(self, text: str) -> bytes:
        """Append a string. Returns the opcode that pushes it again."""
        return self._once(text, self._put_str)

    def put(self, value: Any) -> None:
        match value:
            case None:
                self.parts.append(b"N")
            case bool():
                self.parts.append(b"\x88" if value else b"\x89")
            case int():
                self.parts.append(pickled_int(value))
            case str():
                self.put_text(value)
            case FileName():
                self._once(value, lambda file: self._put_str(file.name))
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

    def _once(self, value: Any, put: Any) -> bytes:
        """Append a value that is memoized. Returns the opcode that pushes it again."""
        index = self._memo.get(value)
        if index is not None:
            opcode = _get(index)
            self.parts.append(opcode)
            return opcode
        put(value)
        self.parts.append(b"\x94")
        index = self._memo[value] = len(self._memo)
        return _get(index)

    def _put_str(self, text: str) -> None:
        data = text.encode()
        length = b"\x8c%c" % len(data) if len(data) < 256 else b"X" + _u32(len(data))
        self.parts.append(length + data)

    def _put_global(self, value: Global) -> None:
        self.put_text(value.module)
        self.put_text(value.name)
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


def _get(index: int) -> bytes:
    """Return the opcode that pushes a memoized object."""
    return b"h%c" % index if index < 256 else b"j" + _u32(index)


def pickled_int(value: int) -> bytes:
    """Pickle an int with its shortest opcode."""
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -1 << 31 <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def pickled_str(text: str) -> bytes:
    """Pickle a string with the opcode of protocol 2."""
    return b"X" + _u32(len(text.encode())) + text.encode()


_u32 = struct.Struct("<I").pack
