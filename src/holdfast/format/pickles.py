"""Read pickles without importing or calling what they refer to.

With Python's C unpickler, a pickle of a kilobyte can take gigabytes or crash the process: it
allocates for any memo index, hashes tuples of any nesting, and makes calls whose results may grow
without limit. `Unpickler` is Python's own unpickler in pure Python, except for the opcodes whose
time or memory would not be proportional to the bytes of the pickle: they are replaced.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, ClassVar

from holdfast.errors import FormatError
from holdfast.format.dtypes import BY_NAME

INVALID = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    struct.error,
    pickle.UnpicklingError,
)
"""Errors that `Unpickler` raises if the bytes are not a complete, valid pickle."""

MARKS_MAX = 10_000
"""Maximum number of open MARK opcodes: those whose list, tuple or dict has not ended yet. torch
opens a few for each level of nesting."""

KEY_MEMBERS_MAX = 64
"""Maximum length of a tuple that is a dict key. Each use of a tuple as a key takes only a byte or
two in the pickle, but hashes all members of the tuple."""

_KEY_INT_BITS = 60

LARGE_KEYS_MAX = 1000
"""Maximum number of dict keys that are ints of more than `_KEY_INT_BITS` bits. A crafted file can
choose such ints with equal hashes, which makes a dict as slow as a list."""


OTHERS_MAX = 10_000
"""Maximum size of an `AnyGlobal`. For each global that is not allowed, it makes a class, and each
class takes a kilobyte of memory."""


def loads(data: bytes, allowed: Mapping[tuple[str, str], Any], *, where: str) -> Any:
    """Return the object in a pickle, with `allowed[module, name]` in place of each global.

    The pickle may call subclasses of `Plain`, `OrderedDict` without arguments or with a list of
    pairs, and `tuple`, `int` and `str` with an argument of the same type. It may refer to other
    allowed values, but not call them. Every `Plain` in the result has the arguments of its call and
    its state.

    Dtypes of `torch` are always allowed and become `DtypeName`. Persistent ids are returned
    unchanged. Time and memory are proportional to the bytes. The result may share objects, and may
    be cyclic. If `allowed` is an `AnyGlobal`, an `Other` stands for each object whose class or
    function is not allowed.

    Raises:
        FormatError: the bytes are not a complete pickle, or refer to a global that is not allowed.
    """
    try:
        return Unpickler(data, allowed, where).load()
    except INVALID as error:
        reason = "it ends early" if isinstance(error, EOFError | IndexError) else error
        raise FormatError(f"`{where}` is not a whole pickle: {reason}") from error


class Plain:
    """Stands for an instance of a class that is not imported. Has the arguments with which the
    pickle makes the instance, and the instance's state."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.state: Any = {}


class Other(Plain):
    """Stands for an object whose class or function is not allowed. Nothing is imported or called.

    Each subclass stands for one class or function.
    """

    title: ClassVar[str] = ""
    """Name of the class or function, with its module unless it is a built-in."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        super().__init__(args)
        self.members: list[Any] = []
        """Members of a list or set. For a dict, keys and values in turn."""

    def append(self, member: Any) -> None:
        self.members.append(member)

    def extend(self, members: list[Any]) -> None:
        self.members += members


class AnyGlobal(dict[tuple[str, str], Any]):
    """The allowed globals. Looking up any other global adds a subclass of `Other` for it."""

    def __missing__(self, key: tuple[str, str]) -> type[Other]:
        title = ".".join(key).replace("__builtin__.", "").removeprefix("builtins.")[:200]
        cls = self[key] = type("Other", (Other,), {"title": title})
        if len(self) > OTHERS_MAX:
            raise ValueError(f"it refers to more than {OTHERS_MAX} classes and functions")
        return cls


@dataclass(frozen=True, slots=True)
class DtypeName:
    """Stands for `torch.<name>`."""

    name: str


if TYPE_CHECKING:

    class _PythonUnpickler:
        """Types of those attributes of Python's unpickler that `Unpickler` uses."""

        dispatch: ClassVar[dict[int, Callable[..., None]]]
        memo: dict[int, Any]
        stack: list[Any]
        metastack: list[list[Any]]
        append: Callable[[Any], None]
        read: Callable[[int], bytes]
        readline: Callable[[], bytes]

        def __init__(self, file: IO[bytes], *, encoding: str, errors: str) -> None: ...
        def load(self) -> Any: ...
        def load_mark(self) -> None: ...
        def load_binbytes8(self) -> None: ...
        def pop_mark(self) -> list[Any]: ...

else:
    # Private, but unlikely to change: `torch.package` derives its unpickler from it too.
    _PythonUnpickler = pickle._Unpickler


class Unpickler(_PythonUnpickler):
    """Reads one pickle. `allowed` has the object for each global that the pickle may refer to."""

    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any], where: str) -> None:
        self._data = io.BytesIO(data)
        self._nbytes = len(data)
        super().__init__(self._data, encoding="utf-8", errors="surrogatepass")
        self._allowed = allowed
        self._where = where
        self._num_large_keys = 0
        self._num_copied = 0

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that stands for a global."""
        if module == "torch" and name in BY_NAME:
            return DtypeName(name)
        try:
            return self._allowed[module, name]
        except KeyError:
            raise FormatError(
                f"`{self._where}` refers to `{module[:200]}.{name[:200]}`, which Holdfast does not "
                "allow in a checkpoint",
                hint="loading a pickle can run code: use `torch.load(weights_only=False)` only if "
                "you trust the writer of the file",
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def load_unsupported(self) -> None:
        raise ValueError(f"unsupported opcode at byte {self._data.tell() - 1}")

    def load_frame(self) -> None:
        # Skip only the length of the frame: the method of the base class would copy the frame.
        self.read(8)

    def load_bytearray8(self) -> None:
        # The method of the base class would allocate the array before it finds that the file ends.
        self.load_binbytes8()
        self.stack[-1] = bytearray(self.stack[-1])

    def load_mark(self) -> None:
        if len(self.metastack) >= MARKS_MAX:
            raise ValueError(f"more than {MARKS_MAX} marks are open")
        super().load_mark()

    def load_put(self) -> None:
        self._put(int(self.readline()))

    def load_long_binput(self) -> None:
        self._put(*struct.unpack("<I", self.read(4)))

    def _put(self, index: int) -> None:
        # A crafted file could choose huge indices with equal hashes, which would make `memo` slow.
        if not 0 <= index <= self._nbytes:
            raise ValueError(f"memo index {index} exceeds the size of the pickle")
        self.memo[index] = self.stack[-1]

    def load_reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if function is OrderedDict and args:
            self._load_ordered_dict(args)
        else:
            self.stack[-1] = _call(function, args)

    load_newobj = load_reduce

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # Keyword arguments, which are ignored.
        args = self.stack.pop()
        cls = self.stack[-1]
        if not (isinstance(cls, type) and issubclass(cls, Other)):
            raise ValueError(f"arguments by name for {_described(cls)}")
        self.stack[-1] = _call(cls, args)

    def _load_ordered_dict(self, args: object) -> None:
        """Make an `OrderedDict` from a list of pairs, as Python 2 pickles it."""
        if type(args) is not tuple or len(args) != 1 or type(args[0]) is not list:
            raise ValueError("an OrderedDict that is not made from a list")
        # Each call copies a list, and many calls may share one list: limit the sum of the copies.
        self._num_copied += len(args[0])
        if self._num_copied > self._nbytes:
            raise ValueError("more pairs than fit into the pickle")
        if any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in args[0]):
            raise ValueError("an OrderedDict that is not made from pairs")
        self.stack[-1] = OrderedDict()
        self._set_items([member for pair in args[0] for member in pair])

    def load_build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, Plain):
            instance.state = state
        elif type(instance) is not OrderedDict:
            # Attributes of an OrderedDict, such as the `_metadata` of a state dict, are ignored.
            raise ValueError(f"a state for {_described(instance)}")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(set())
        self._add_members(items)
        self.stack[-1] = frozenset(items)

    def load_additems(self) -> None:
        self._add_members(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Other):
            target.extend(items)
            return
        if type(target) is not dict and type(target) is not OrderedDict:
            raise ValueError(f"items for {_described(target)}")
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key in items[::2]:
            if type(key) is not str:
                self._check_key(key)
        target.update(zip(items[::2], items[1::2], strict=True))

    def _add_members(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Other):
            target.extend(items)
            return
        if type(target) is not set:
            raise ValueError(f"members for {_described(target)}")
        for item in items:
            self._check_key(item)
        target.update(items)

    def _check_key(self, key: object) -> None:
        """Refuse a key that costs more time to hash or to find than its own bytes justify."""
        members = key if type(key) is tuple else (key,)
        if len(members) > KEY_MEMBERS_MAX:
            raise ValueError(f"a key of {len(members)} members")
        for member in members:
            is_class = isinstance(member, type) and issubclass(member, Other)
            known = str | int | float | bytes | Plain | DtypeName | None
            if not is_class and not isinstance(member, known):
                raise ValueError(f"a key that is {_described(member)}")
            if type(member) is int and member.bit_length() > _KEY_INT_BITS:
                self._num_large_keys += 1
                if self._num_large_keys > LARGE_KEYS_MAX:
                    raise ValueError(f"more than {LARGE_KEYS_MAX} keys are large numbers")


_SUPPORTED = (
    b"\x80\x95(012.N\x88\x89ILFJKMG\x8a\x8bVX\x8c\x8dUTCB\x8e\x96"
    b"\x8f\x90\x91)t\x85\x86\x87]lae}dsuc\x93R\x81\x92bpqrghj\x94PQ"
)
"""Opcodes that a pickle may use. The opcodes for classes of Python 2, registered extensions and
out-of-band buffers are missing, since no version of torch writes them."""

Unpickler.dispatch = {
    **dict.fromkeys(range(256), Unpickler.load_unsupported),
    **{
        opcode: getattr(Unpickler, _PythonUnpickler.dispatch[opcode].__name__)
        for opcode in _SUPPORTED
    },
}


def _call(function: Any, args: object) -> Any:
    """Return the result of a call in a pickle. Does not copy the arguments, since many calls may
    share them."""
    if type(args) is not tuple:
        raise ValueError("a call without a tuple of arguments")
    if isinstance(function, type) and issubclass(function, Plain):
        return function(args)
    if isinstance(function, Other):
        return type(function)(args)
    if function is OrderedDict and not args:
        return OrderedDict()
    if function in (tuple, int, str) and len(args) == 1 and type(args[0]) is function:
        return args[0]
    raise ValueError(f"a call of {_described(function)} with {len(args)} arguments")


def _described(value: object) -> str:
    return f"`{value.__name__}`" if isinstance(value, type) else f"a {type(value).__name__}"
