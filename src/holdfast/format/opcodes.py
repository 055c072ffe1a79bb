"""Interpret the pickle opcodes that checkpoints use, in bounded time and memory.

Modeled on Python's `pickletools` and `pickle.py`. The standard library's C unpickler allocates for
any memo index in a file, hashes tuples of any nesting, and makes calls whose results may grow
without limit, so that a kilobyte can take gigabytes or crash the process. Here the time and memory
of every opcode are proportional to its own bytes.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.dtypes import BY_NAME

MARKS_MAX = 10_000
"""Maximum number of open marks. torch opens a few for each level of nesting."""

KEY_MEMBERS_MAX = 64
"""Maximum length of a tuple that is a key. Each use takes a byte or two, and hashes all members."""

_KEY_INT_BITS = 60

LARGE_KEYS_MAX = 1000
"""Most keys that are larger ints: a file can give all of them the same hash, which makes a dict as
slow as a list."""

_U16, _U32, _I32, _U64, _F64 = map(struct.Struct, ("<H", "<I", "<i", "<Q", ">d"))


class Plain:
    """Stands for an instance of a class that is not imported, with its arguments and its state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Plain:
        instance = super().__new__(cls)
        instance.args = args
        instance.state = {}
        return instance


@dataclass(frozen=True, slots=True)
class DtypeName:
    """Stands for `torch.<name>`."""

    name: str


class Machine:
    """Reads one pickle. A mark saves the stack and starts a new one."""

    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any], where: str) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.allowed = allowed
        self.where = where
        self.num_large_keys = 0

    def run(self) -> Any:
        """Execute the pickle and return its object."""
        data, table = self.data, _TABLE
        while (opcode := data[self.position]) != _STOP:
            self.position += 1
            handle = table[opcode]
            if handle is None:
                raise ValueError(f"unsupported opcode {opcode:#04x} at byte {self.position - 1}")
            handle(self)
        return self.stack.pop()

    # ------------------------------------------------------------------------ reading arguments

    def take(self, nbytes: int) -> bytes:
        start, self.position = self.position, self.position + nbytes
        if self.position > len(self.data):
            raise ValueError(f"it ends inside an argument of {nbytes} bytes at byte {start}")
        return self.data[start : self.position]

    def number(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def line(self, encoding: str = "utf-8") -> str:
        stop = self.data.index(b"\n", self.position)
        start, self.position = self.position, stop + 1
        return self.data[start:stop].decode(encoding)

    def text(self, nbytes: int) -> None:
        self.stack.append(self.take(nbytes).decode("utf-8", "surrogatepass"))

    def to_mark(self) -> list[Any]:
        """Return the objects pushed since the last mark, and restore the stack before it."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    # --------------------------------------------------------------------------- making objects

    def push_global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("the name of a global is no text")
        if module == "torch" and name in BY_NAME:
            self.stack.append(DtypeName(name))
            return
        try:
            self.stack.append(self.allowed[module, name])
        except KeyError:
            raise FormatError(
                f"`{self.where}` refers to `{module[:200]}.{name[:200]}`, which Holdfast does not "
                "allow in a checkpoint",
                hint="loading a pickle can run code: use `torch.load(weights_only=False)` only if "
                "you trust the writer of the file",
            ) from None

    def call(self, function: Any, args: object) -> Any:
        """Return the result of a call. Does not copy the arguments: many calls may share them."""
        if type(args) is not tuple:
            raise ValueError("a call without a tuple of arguments")
        if isinstance(function, type) and issubclass(function, Plain):
            instance = Plain.__new__(function)
            instance.args = args
            return instance
        if function is OrderedDict and not args:
            return OrderedDict()
        if function in (tuple, int, str) and len(args) == 1 and type(args[0]) is function:
            return args[0]
        raise ValueError(f"a call of {_described(function)} with {len(args)} arguments")

    def build(self, state: object) -> None:
        instance = self.stack[-1]
        if isinstance(instance, Plain):
            instance.state = state
        elif type(instance) is not OrderedDict:
            # Attributes of an OrderedDict, such as the `_metadata` of a state dict, are ignored.
            raise ValueError(f"a state for {_described(instance)}")

    def put(self, index: int) -> None:
        if index > len(self.data):
            raise ValueError(f"memo index {index} exceeds the size of the pickle")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict and type(target) is not OrderedDict:
            raise ValueError(f"items for {_described(target)}")
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key in items[::2]:
            if type(key) is not str:
                self.check_key(key)
        target.update(zip(items[::2], items[1::2], strict=True))

    def add_members(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not set:
            raise ValueError(f"members for {_described(target)}")
        for item in items:
            self.check_key(item)
        target.update(items)

    def check_key(self, key: object) -> None:
        """Refuse a key that costs more time to hash or to find than its own bytes justify."""
        members = key if type(key) is tuple else (key,)
        if len(members) > KEY_MEMBERS_MAX:
            raise ValueError(f"a key of {len(members)} members")
        for member in members:
            if not isinstance(member, str | int | float | bytes | Plain | DtypeName | None):
                raise ValueError(f"a key that is {_described(member)}")
            if type(member) is int and member.bit_length() > _KEY_INT_BITS:
                self.num_large_keys += 1
                if self.num_large_keys > LARGE_KEYS_MAX:
                    raise ValueError(f"more than {LARGE_KEYS_MAX} keys are large numbers")

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError(f"members for {_described(target)}")
        target.extend(items)

    def make_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]


def _described(value: object) -> str:
    return f"`{value.__name__}`" if isinstance(value, type) else f"a {type(value).__name__}"


def _mark(m: Machine) -> None:
    if len(m.marked) >= MARKS_MAX:
        raise ValueError(f"more than {MARKS_MAX} marks are open")
    m.marked.append(m.stack)
    m.stack = []


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.to_mark()


def _int_line(m: Machine) -> None:
    text = m.line()
    m.stack.append(text == "01" if text in ("00", "01") else int(text))


def _long(m: Machine, nbytes: int) -> None:
    m.stack.append(int.from_bytes(m.take(nbytes), "little", signed=True))


def _set_item(m: Machine) -> None:
    value = m.stack.pop()
    key = m.stack.pop()
    m.set_items([key, value])


def _dict(m: Machine) -> None:
    items = m.to_mark()
    m.stack.append({})
    m.set_items(items)


def _collect(kind: Callable[[list[Any]], Any]) -> Callable[[Machine], None]:
    def collect(m: Machine) -> None:
        items = m.to_mark()
        m.stack.append(kind(items))

    return collect


def _frozen_set(m: Machine) -> None:
    items = m.to_mark()
    m.stack.append(set())
    m.add_members(items)
    m.stack[-1] = frozenset(m.stack[-1])


def _reduce(m: Machine) -> None:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)


def _new_with_keywords(m: Machine) -> None:
    if m.stack.pop():
        raise ValueError("an instance with keyword arguments")
    _reduce(m)


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    m.push_global(m.stack.pop(), name)


def _byte(m: Machine) -> int:
    m.position += 1
    return m.data[m.position - 1]


_STOP = ord(".")

_OPCODES: dict[bytes, Callable[[Machine], Any]] = {
    b"\x80": _byte,
    b"\x95": lambda m: m.number(_U64),
    b"(": _mark,
    b"0": _pop,
    b"1": lambda m: m.to_mark(),
    b"2": lambda m: m.stack.append(m.stack[-1]),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"I": _int_line,
    b"L": lambda m: m.stack.append(int(m.line().removesuffix("L"))),
    b"F": lambda m: m.stack.append(float(m.line())),
    b"J": lambda m: m.stack.append(m.number(_I32)),
    b"K": lambda m: m.stack.append(_byte(m)),
    b"M": lambda m: m.stack.append(m.number(_U16)),
    b"G": lambda m: m.stack.append(m.number(_F64)),
    b"\x8a": lambda m: _long(m, _byte(m)),
    b"\x8b": lambda m: _long(m, m.number(_U32)),
    b"V": lambda m: m.stack.append(m.line("raw-unicode-escape")),
    b"X": lambda m: m.text(m.number(_U32)),
    b"\x8c": lambda m: m.text(_byte(m)),
    b"\x8d": lambda m: m.text(m.number(_U64)),
    b"U": lambda m: m.text(_byte(m)),
    b"T": lambda m: m.text(m.number(_U32)),
    b"C": lambda m: m.stack.append(m.take(_byte(m))),
    b"B": lambda m: m.stack.append(m.take(m.number(_U32))),
    b"\x8e": lambda m: m.stack.append(m.take(m.number(_U64))),
    b"\x96": lambda m: m.stack.append(bytearray(m.take(m.number(_U64)))),
    b"\x8f": lambda m: m.stack.append(set()),
    b"\x90": lambda m: m.add_members(m.to_mark()),
    b"\x91": _frozen_set,
    b")": lambda m: m.stack.append(()),
    b"t": _collect(tuple),
    b"\x85": lambda m: m.make_tuple(1),
    b"\x86": lambda m: m.make_tuple(2),
    b"\x87": lambda m: m.make_tuple(3),
    b"]": lambda m: m.stack.append([]),
    b"l": _collect(list),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.to_mark()),
    b"}": lambda m: m.stack.append({}),
    b"d": _dict,
    b"s": _set_item,
    b"u": lambda m: m.set_items(m.to_mark()),
    b"c": lambda m: m.push_global(m.line(), m.line()),
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _reduce,
    b"\x92": _new_with_keywords,
    b"b": lambda m: m.build(m.stack.pop()),
    b"p": lambda m: m.put(int(m.line())),
    b"q": lambda m: m.put(_byte(m)),
    b"r": lambda m: m.put(m.number(_U32)),
    b"g": lambda m: m.get(int(m.line())),
    b"h": lambda m: m.get(_byte(m)),
    b"j": lambda m: m.get(m.number(_U32)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"P": lambda m: m.stack.append(m.line()),
    b"Q": lambda m: m.stack[-1],
}

_TABLE = [_OPCODES.get(bytes([opcode])) for opcode in range(256)]
