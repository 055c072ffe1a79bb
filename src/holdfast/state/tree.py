"""Nested training state as flat entries, and what their names cannot tell of its structure.

Names are those that `torch.distributed.checkpoint` gives from torch 2.4 on, so that stock tools
find the same entries: the keys on the way to a leaf, joined by dots.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from holdfast.errors import UsageError
from holdfast.format.structure import (
    ARRAY,
    EMPTY_BYTES,
    FACTORIES,
    MAPPINGS,
    NUMBERS,
    Node,
    key_text,
    mapping_node,
)
from holdfast.state.subclass import CONTEXT, is_ours, taken_apart

Path = tuple[str | int, ...]

T = TypeVar("T")


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state and takes it back: a module, a scheduler, a data loader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Leaf(NamedTuple):
    """A tensor or a plain value in a tree of state."""

    path: Path
    value: Any
    names: Mapping[str, Path] = MappingProxyType({})
    """All names of a value that has several, with their paths; the leaf's own comes first."""


@dataclass(frozen=True, slots=True)
class FlatState:
    """State as entries by name, and the structure that the names cannot tell."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    structure: dict[Path, Node] = field(default_factory=dict)
    """Nodes by the path of what they describe; none where the names tell all."""

    unions: dict[Path, str] = field(default_factory=dict)
    """Paths of models and optimizers, whose entries may be others on each rank, with their kind:
    `model`, `optimizer`, or `sharded` for an optimizer whose slots are spread over ranks."""

    stepped: Callable[[], frozenset[str]] = frozenset
    """Names of the tensors that change in a step of an optimizer, and at no other time."""


PLAIN = (int, float, str, bytes, tuple, type(None))
"""Types of values that are never entered: they hold no state of their own."""

_SCALARS = frozenset({int, float, complex, bool, str, bytes, type(None)})

_MAPPING_TYPES = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_KIND_OF_MAPPING: dict[type, str] = {cls: kind for kind, cls in _MAPPING_TYPES.items()}
_KIND_OF_MAPPING[defaultdict] = "defaultdict"

DEPTH_MAX = 60
"""Containers inside one another: a checkpoint's paths have at most 64 keys."""

EntersObject = Callable[["Flattener", Path, Any], Node]
"""Adds the state of an object below a path. Returns the node of that state."""

PlacedLike = Callable[[Path, DTensor], str | None]
"""Name of a parameter that is spread over the ranks as this tensor is; None where there is none."""


def flatten(state: Mapping[str, Any]) -> FlatState:
    """Tensors, values, dicts and lists as flat entries. Objects with a `state_dict` are refused:
    `StateTree` opens these.

    Raises:
        UsageError: two entries have one name, or what could not come back as it is.
    """
    flattener = Flattener()
    for name, key in names_of((), state).items():
        flattener.put((name,), state[key])
    return flattener.state


class Flattener:
    """Collects state as flat entries.

    Dicts are always entered; lists only where a tensor, a dict or an object with state lies in
    them, so that a list of numbers is one value.
    """

    def __init__(
        self, *, enters: EntersObject | None = None, placed_like: PlacedLike | None = None
    ) -> None:
        """`enters` opens objects that hold state; `placed_like` finds a parameter that is spread
        as a tensor is."""
        self.state: FlatState = FlatState()
        self._enters, self._placed_like = enters, placed_like
        self._num_values = 0

    def add(self, path: Path, value: Any, name: str | None = None) -> None:
        """Add one entry."""
        name = ".".join(map(str, path)) if name is None else name
        leaves = self.state.leaves
        if name in leaves:
            raise named_twice(name, leaves[name].path, path)
        leaves[name] = Leaf(path, value)
        self._num_values += not isinstance(value, torch.Tensor)

    def add_named(self, names: Mapping[str, Path], value: Any) -> None:
        """Add one value under several names."""
        first, path = next(iter(names.items()))
        leaves = self.state.leaves
        if first in leaves:
            raise named_twice(first, leaves[first].path, path)
        leaves[first] = Leaf(path, value, names)
        self._num_values += 1

    def put(self, path: Path, value: Any, *, rebuilt: bool = False) -> None:
        """Add everything below one path. `rebuilt`: a load makes its tensors anew, so the structure
        says where they belong."""
        node = self.walk(path, value, rebuilt=rebuilt)
        if node is not None and node != {"object": None}:
            self.state.structure[path] = node

    def walk(self, path: Path, value: Any, *, rebuilt: bool) -> Node:
        """Add everything below one path. Returns its node."""
        if type(value) in _SCALARS and value != b"":
            self.add(path, value)
            return None
        if isinstance(value, torch.Tensor):
            return self._tensor(path, value, rebuilt=rebuilt)
        if isinstance(value, Mapping) and not is_object(value):
            return self._mapping(path, value, rebuilt=rebuilt)
        if type(value) is list and holds_state(value):
            return self._sequence(path, value, "list")
        if type(value) is tuple and _holds_placed(value):
            return self._sequence(path, value, "tuple")
        if type(value) is np.ndarray:
            self.add(path, _tensor_of(path, value))
            return ARRAY
        if is_object(value):
            if self._enters is None:
                raise UsageError(f"`{spelled(path)}` is a {type_name(value)}, an object with state")
            return {"object": self._enters(self, path, value)}
        plain, types = made_plain(path, value)
        self.add(path, plain)
        return {"types": types} if types else None

    def _tensor(self, path: Path, tensor: torch.Tensor, *, rebuilt: bool) -> Node:
        if not is_ours(tensor):
            return self._subclass(path, tensor, rebuilt=rebuilt)
        self.add(path, tensor)
        if not rebuilt:
            return None
        place = {}
        if isinstance(tensor, DTensor):
            like = self._placed_like(path, tensor) if self._placed_like else None
            place = {"like": like} if like is not None else {"like": ""}
        elif not tensor.is_cpu:
            place = {"device": tensor.device.type}
        return {"tensor": place} if place else None

    def _subclass(self, path: Path, tensor: torch.Tensor, *, rebuilt: bool) -> Node:
        apart = taken_apart(spelled(path), tensor, must_be_known=rebuilt)
        inner = {
            name: self.walk((*path, name), part, rebuilt=rebuilt)
            for name, part in apart.inner.items()
        }
        self.add((*path, CONTEXT), apart.context)
        described = {"class": apart.class_name, "inner": inner}
        return {"subclass": {**described, "size": [*apart.size], "stride": [*apart.stride]}}

    def _mapping(self, path: Path, value: Mapping[Any, Any], *, rebuilt: bool) -> Node:
        kind, more = _kind_of(path, value)
        check_depth(path)
        children: list[tuple[Any, Node]] = []
        told = kind == "dict" and bool(value)
        before = self._num_values
        for name, key in names_of(path, value).items():
            node = self.walk((*path, name), value[key], rebuilt=rebuilt)
            children.append((key, node))
            # An object that another one holds is found by its node alone.
            quiet = node is None or (node == {"object": None} and not rebuilt)
            told = told and quiet and type(key) is str
        # Values of a dict lose their order among each other, and to its tensors.
        if told and (self._num_values == before or len(children) == 1):
            return None
        return mapping_node(kind, children, **more)

    def _sequence(self, path: Path, value: Sequence[Any], kind: str) -> Node:
        check_depth(path)
        # A list that grows is not there when a run starts: its tensors are always made anew.
        nodes = [
            self.walk((*path, number), member, rebuilt=True) for number, member in enumerate(value)
        ]
        if kind == "list" and not any(node is not None for node in nodes):
            return None
        return {kind: nodes}


def spelled(path: Path) -> str:
    """A path as errors and names spell it."""
    return ".".join(map(str, path))


def type_name(value: object) -> str:
    """Module and name of the type of `value`."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def named_twice(name: str, one: Path, other: Path) -> UsageError:
    """The error for two entries that a checkpoint could not tell apart."""
    return UsageError(
        f"two entries have the name `{name}`: {one} and {other}",
        hint="rename one of the keys; dots in keys join them to their parents",
    )


def holds_state(members: Sequence[Any]) -> bool:
    """Whether a list is entered: a tensor, a dict, an array or an object with state is in it."""
    if _SCALARS.issuperset(map(type, members)):
        return False
    return any(
        isinstance(member, (Mapping, torch.Tensor, np.ndarray))
        or (type(member) is list and holds_state(member))
        or (type(member) is tuple and _holds_placed(member))
        or is_object(member)
        for member in members
    )


def _holds_placed(members: Sequence[Any]) -> bool:
    """Whether a tuple is entered. One of plain values and tensors in host memory is one value, as
    stock DCP has it; what lies over ranks or on a device cannot be a part of a value."""
    if _SCALARS.issuperset(map(type, members)):
        return False
    return any(
        isinstance(member, np.ndarray | defaultdict)
        or (
            isinstance(member, torch.Tensor)
            and not (is_ours(member) and member.is_cpu and not isinstance(member, DTensor))
        )
        or (type(member) in (tuple, list) and _holds_placed(member))
        or (isinstance(member, Mapping) and _holds_placed([*member.values()]))
        or is_object(member)
        for member in members
    )


def is_object(value: object) -> bool:
    """Whether it gives and takes its own state: also a dict of a class that does."""
    if type(value) in _KIND_OF_MAPPING or type(value) in _SCALARS:
        return False
    return isinstance(value, Stateful) and not isinstance(value, type)


def _kind_of(path: Path, value: Mapping[Any, Any]) -> tuple[str, dict[str, str]]:
    """Kind of a mapping, and what its node says beside its children."""
    kind = _KIND_OF_MAPPING.get(type(value))
    if kind is None:
        raise UsageError(
            f"`{spelled(path)}` is a {type_name(value)}, which would not come back as one",
            hint=f"use one of {', '.join(MAPPINGS)}, and make yours of it in `load_state_dict`",
        )
    if kind != "defaultdict":
        return kind, {}
    assert isinstance(value, defaultdict)
    factory: Any = value.default_factory
    name = "None" if factory is None else getattr(factory, "__name__", "")
    if name not in FACTORIES or (factory is not None and factory.__module__ != "builtins"):
        raise UsageError(
            f"`{spelled(path)}` is a defaultdict of {name or repr(factory)}, which is code",
            hint=f"a defaultdict of one of these comes back: {', '.join(FACTORIES)}",
        )
    return kind, {"default": name}


def names_of(path: Path, value: Mapping[Any, Any]) -> dict[str, Any]:
    """The keys of a dict by their spelling.

    Raises:
        UsageError: a key that has none, or two that are spelled alike.
    """
    where = f"`{spelled(path)}`" if path else "the state"
    names: dict[str, Any] = {}
    for key in value:
        if type(key) is not str and key_text(key) is None:
            raise UsageError(
                f"{where} has the key {key!r}, a {type_name(key)}",
                hint="keys are text, numbers, bytes, None, or tuples of these",
            )
        name = str(key)
        if name in names:
            raise UsageError(
                f"two keys of {where} are spelled alike: {names[name]!r} and {key!r}",
                hint="rename one of them: a checkpoint spells every key as text",
            )
        names[name] = key
    return names


def check_depth(path: Path) -> None:
    """Raises UsageError where containers lie in one another without an end."""
    if len(path) > DEPTH_MAX:
        raise UsageError(
            f"`{spelled(path)}` lies {len(path)} levels deep, {DEPTH_MAX} are the most",
            hint="does it hold itself?",
        )


_ARRAY_KINDS = "biufc"


def _tensor_of(path: Path, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array as a tensor, in its own memory where that can be."""
    dtype = array.dtype
    if dtype.kind not in _ARRAY_KINDS or not dtype.isnative or dtype.itemsize > 16:
        raise UsageError(
            f"`{spelled(path)}` is a numpy array of {dtype}, which is no dtype of a tensor",
            hint="keep it as a list, or as an array of numbers",
        )
    try:
        plain = array.flags.writeable and array.flags.c_contiguous
        return torch.from_numpy(array if plain else array.copy())
    except TypeError as error:
        raise UsageError(f"`{spelled(path)}` is a numpy array of {dtype}: {error}") from error


def made_plain(path: Path, value: Any) -> tuple[Any, list[list[Any]]]:
    """A value with Python's own in place of what pickle could write only as code: numpy's numbers,
    empty bytes. Beside it where each of these was, and its type."""
    if type(value) in _SCALARS and value != b"":
        return value, []
    types: list[list[Any]] = []
    plain = _made_plain(path, value, (), types)
    return (plain, types) if types else (value, [])


def _made_plain(path: Path, value: Any, inside: tuple[str, ...], types: list[list[Any]]) -> Any:
    if isinstance(value, np.generic):
        name = {"U": "str", "S": "bytes"}.get(value.dtype.kind, value.dtype.name)
        if name not in NUMBERS:
            raise UsageError(
                f"`{spelled(path)}{_inside(inside)}` is a {type_name(value)}",
                hint="keep a number or a text of Python's own in its place",
            )
        types.append([[*inside], name])
        return value.item()
    if type(value) is bytes and not value:
        types.append([[*inside], EMPTY_BYTES])
        return ""
    kind = type(value)
    if kind in (list, tuple) and not (_SCALARS.issuperset(map(type, value)) and b"" not in value):
        if len(inside) > DEPTH_MAX:
            raise UsageError(f"`{spelled(path)}` is nested too deep", hint="does it hold itself?")
        return kind(
            _made_plain(path, member, (*inside, str(number)), types)
            for number, member in enumerate(value)
        )
    if kind in (dict, OrderedDict):
        # A key that has no text is refused where the value is encoded, if it must be.
        return kind(
            (key, _made_plain(path, member, (*inside, key_text(key) or ""), types))
            for key, member in value.items()
        )
    return value


def _inside(keys: Iterable[str]) -> str:
    return "".join(f"[{key}]" for key in keys)
