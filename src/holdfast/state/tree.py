"""Nested training state as flat entries, and the structure that their names cannot express.

A name is the keys of a path joined by dots, as in `torch.distributed.checkpoint` from torch 2.4 on,
so that stock tools find the same entries.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from holdfast.errors import UsageError
from holdfast.format.container import spelled
from holdfast.format.structure import (
    ARRAY,
    EMPTY_BYTES,
    FACTORIES,
    KEY_CHARS_MAX,
    MAPPINGS,
    NUMBERS,
    Node,
    is_supported_key,
    key_text,
    mapping_node,
)
from holdfast.state.strides import order_of, order_text
from holdfast.state.subclass import CONTEXT, is_plain_tensor, take_apart

if TYPE_CHECKING:
    from holdfast.state.match import Match

Path = tuple[str | int, ...]


@runtime_checkable
class Stateful(Protocol):
    """Any object that returns its state and can restore it: a module, scheduler or data loader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Leaf(NamedTuple):
    """A tensor or a plain value of the state."""

    path: Path
    value: Any
    names: Mapping[str, Path] = MappingProxyType({})
    """Paths of a value with several names, keyed by name, the leaf's own name first; else empty."""


@dataclass(frozen=True, slots=True)
class FlatState:
    """State as entries by name, and the structure that the names cannot express."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    structure: dict[Path, Node] = field(default_factory=dict)
    """Nodes by path, only where the names do not express the structure."""

    unions: dict[Path, str] = field(default_factory=dict)
    """Kinds of components that may have different entries on each rank, by path: `model`,
    `optimizer`, or `sharded` for an optimizer that divides its slots among the ranks."""

    stepped: Callable[[], frozenset[str]] = frozenset
    """Function that returns the names of tensors that change only when an optimizer steps."""


SCALARS = frozenset({int, float, complex, bool, str, bytes, type(None)})
"""Types of values that contain no other values."""

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, DTensor})
"""Types of tensors that have no `state_dict`."""

MAPPING_TYPES: dict[str, type[dict[Any, Any]]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
}
_KIND_OF_MAPPING: dict[type, str] = {cls: kind for kind, cls in MAPPING_TYPES.items()}
_KIND_OF_MAPPING[defaultdict] = "defaultdict"

_GONE = object()

DEPTH_MAX = 60
"""Most levels of nested containers. A checkpoint's paths have at most 64 keys."""


class Component(Protocol):
    """Object that saves and loads a part of the state by its own code."""

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the component's state below a path. Returns the node of the state."""
        ...

    def match(self, match: Match, path: Path) -> None:
        """Plan how the entries below a path are loaded into this component."""
        ...


ComponentOf = Callable[[Path, Any], Component | None]
"""`component_of(path, value)` returns the component that saves and loads an object; None for plain
state."""

PlacedLike = Callable[[Path, DTensor], str | None]
"""`placed_like(path, tensor)` returns the name of a parameter with the placement of `tensor`, or
None."""


class Flattener:
    """Collects state as flat entries.

    Each member of a dict is an entry. A list is split only if it contains a tensor, a dict or an
    object, so that a list of numbers is one value.
    """

    def __init__(
        self, component_of: ComponentOf, placed_like: PlacedLike = lambda *_: None
    ) -> None:
        self.state: FlatState = FlatState()
        self._component_of, self._placed_like = component_of, placed_like
        self._num_values = 0

    def add(
        self,
        path: Path,
        value: Any,
        name: str | None = None,
        names: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        """Add one entry. `names`: all names of a value that has several, this one first."""
        name = dotted(path) if name is None else name
        leaves = self.state.leaves
        if name in leaves:
            raise named_twice(name, leaves[name].path, path)
        leaves[name] = Leaf(path, value, names)
        if not isinstance(value, torch.Tensor):
            self._num_values += 1

    def put(self, path: Path, value: Any, *, rebuilt: bool = False) -> None:
        """Add `value` and everything in it, below one path. `rebuilt`: whether a load creates the
        tensors, so that the structure must state their devices and placements."""
        node = self.walk(path, value, rebuilt=rebuilt)
        if node is not None and node != {"object": None}:
            self.state.structure.setdefault(path, node)

    def walk(self, path: Path, value: Any, *, rebuilt: bool) -> Node:
        """Add `value` and everything in it, below one path. Returns the node of `value`. `rebuilt`:
        see `put`."""
        if type(value) in SCALARS and value != b"":
            self.add(path, value)
            return None
        if isinstance(value, torch.Tensor):
            if is_plain_tensor(value):
                self.add(path, value)
                if not rebuilt and (value.layout is not torch.strided or value.is_contiguous()):
                    return None
                return self._where(path, value, rebuilt=rebuilt)
            return self._subclass(path, value, rebuilt=rebuilt)
        component = self._component_of(path, value)
        if component is not None:
            return {"object": component.flatten(self, path)}
        if isinstance(value, Mapping):
            return self._mapping(path, value, rebuilt=rebuilt)
        if type(value) is list and holds_state(value):
            return self._sequence(path, value, "list")
        if type(value) is tuple and _holds_placed(value):
            return self._sequence(path, value, "tuple")
        if type(value) is np.ndarray:
            self.add(path, _tensor_of(path, value))
            return ARRAY
        plain, types = made_plain(path, value)
        self.add(path, plain)
        return {"types": types} if types else None

    def _where(self, path: Path, tensor: torch.Tensor, *, rebuilt: bool) -> Node:
        """Return the node of a tensor: its order in memory, and if a load creates it, its device or
        placement."""
        where: dict[str, str] = {}
        if isinstance(tensor, DTensor):
            if rebuilt:
                where["like"] = self._placed_like(path, tensor) or ""
            return {"tensor": where} if where else None
        if rebuilt and not tensor.is_cpu:
            where["device"] = tensor.device.type
        if order := order_text(order_of(tensor)):
            where["order"] = order
        return {"tensor": where} if where else None

    def _subclass(self, path: Path, tensor: torch.Tensor, *, rebuilt: bool) -> Node:
        parts, context = take_apart(dotted(path), tensor, must_be_known=rebuilt)
        inner = {n: self.walk((*path, n), part, rebuilt=rebuilt) for n, part in parts.items()}
        self.add((*path, CONTEXT), context)
        described = {"class": type_name(tensor), "inner": inner}
        return {"subclass": {**described, "size": [*tensor.size()], "stride": [*tensor.stride()]}}

    def _mapping(self, path: Path, value: Mapping[Any, Any], *, rebuilt: bool) -> Node:
        kind, fields = _kind_of(path, value)
        check_depth(path)
        children: list[tuple[Any, Node]] = []
        # Names alone express a dict with text keys, but not the order of values in it.
        is_plain = kind == "dict" and bool(value)
        num_values_before = self._num_values
        for name, key in names_of(path, value).items():
            # Not `value[key]`: it would add a missing key to a defaultdict.
            member = value.get(key, _GONE)
            if member is _GONE:
                raise UsageError(
                    f"the dict `{dotted(path)}` changed during the save: its key {key!r} is gone",
                    hint="another thread, or a `state_dict` method, changes it: save a copy that "
                    "nothing else changes, or pause that thread during the save",
                )
            node = self.walk((*path, name), member, rebuilt=rebuilt)
            children.append((key, node))
            # A load finds the caller's own models and optimizers by their paths, so they need no
            # node. It finds the objects inside a rebuilt state only by their nodes.
            is_marked = node is not None and (node != {"object": None} or rebuilt)
            is_plain = is_plain and not is_marked and type(key) is str
        if is_plain and (self._num_values == num_values_before or len(children) == 1):
            return None
        return mapping_node(kind, children, **fields)

    def _sequence(self, path: Path, value: Sequence[Any], kind: str) -> Node:
        check_depth(path)
        # A fresh run may have a shorter list, so a load must be able to create the members.
        nodes = [
            self.walk((*path, number), member, rebuilt=True) for number, member in enumerate(value)
        ]
        if kind == "list" and not any(node is not None for node in nodes):
            return None
        return {kind: nodes}


def dotted(path: Path) -> str:
    """Return the keys of a path joined by dots."""
    return ".".join(map(str, path))


def type_name(value: object) -> str:
    """Return module and name of the type of `value`."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def named_twice(name: str, one: Path, other: Path) -> UsageError:
    """Return the error for two entries with the same name."""
    return UsageError(
        f"two entries have the name `{name}`: {one} and {other}",
        hint="rename one of the keys; dots in keys join them to their parents",
    )


def holds_state(members: Sequence[Any]) -> bool:
    """Return whether a list contains a tensor, dict, array or object, at any depth."""
    if SCALARS.issuperset(map(type, members)):
        return False
    return any(
        isinstance(member, (Mapping, torch.Tensor, np.ndarray))
        or (type(member) is list and holds_state(member))
        or (type(member) is tuple and _holds_placed(member))
        or is_object(member)
        for member in members
    )


def _holds_placed(members: Sequence[Any]) -> bool:
    """Return whether a tuple must be split into entries, because it contains a sharded tensor, a
    tensor on a device, an object, an array or a defaultdict. Any other tuple is one value, as in
    stock DCP."""
    if SCALARS.issuperset(map(type, members)):
        return False
    return any(
        isinstance(member, np.ndarray | defaultdict)
        or (
            isinstance(member, torch.Tensor)
            and not (is_plain_tensor(member) and member.is_cpu and not isinstance(member, DTensor))
        )
        or (type(member) in (tuple, list) and _holds_placed(member))
        or (isinstance(member, Mapping) and _holds_placed([*member.values()]))
        or is_object(member)
        for member in members
    )


def is_object(value: object) -> bool:
    """Return whether a value is an object with state of its own, such as a dict subclass with
    `state_dict` and `load_state_dict`."""
    # Return early for the most common types, since `isinstance` with a protocol is slow.
    if type(value) in _KIND_OF_MAPPING or type(value) in SCALARS or type(value) in _TENSORS:
        return False
    return isinstance(value, Stateful) and not isinstance(value, type)


def _kind_of(path: Path, value: Mapping[Any, Any]) -> tuple[str, dict[str, str]]:
    """Return the kind of a mapping, and further fields of its node."""
    kind = _KIND_OF_MAPPING.get(type(value))
    if kind is None:
        raise UsageError(
            f"`{dotted(path)}` is a {type_name(value)}, which a load could not restore",
            hint=f"use one of {', '.join(MAPPINGS)}, and convert it in `load_state_dict`",
        )
    if not isinstance(value, defaultdict):
        return kind, {}
    factory = value.default_factory
    name = next((name for name, known in FACTORIES.items() if known is factory), None)
    if name is None:
        raise UsageError(
            f"`{dotted(path)}` is a defaultdict of {getattr(factory, '__name__', repr(factory))}, "
            "which is code",
            hint=f"use a defaultdict of one of these: {', '.join(FACTORIES)}",
        )
    return kind, {"default": name}


def names_of(path: Path, value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the keys of a dict, keyed by their text."""
    where = f"`{dotted(path)}`" if path else "the state"
    names: dict[str, Any] = {}
    # A copy of the keys, since another thread may change the dict.
    for key in list(value):
        if type(key) is not str and key_text(key) is None:
            if is_supported_key(key):
                raise UsageError(
                    f"a key of {where} is too long: {spelled(key)[:100]}, expected at most "
                    f"{KEY_CHARS_MAX:,} characters",
                    hint="use a short key, and save the long one as text",
                )
            raise UsageError(
                f"{where} has the key {key!r}, a {type_name(key)}",
                hint="use text, numbers, bytes, None, or tuples of these as keys",
            )
        name = str(key)
        if name in names:
            raise UsageError(
                f"two keys of {where} have the same text: {names[name]!r} and {key!r}",
                hint="rename one of them: a checkpoint stores keys as text",
            )
        names[name] = key
    return names


def check_depth(path: Path) -> None:
    """Raise UsageError if containers are nested too deep, or contain themselves."""
    if len(path) > DEPTH_MAX:
        raise UsageError(
            f"`{dotted(path)}` is {len(path)} levels deep, at most {DEPTH_MAX} are supported",
            hint="check whether a container contains itself, or flatten some of the nesting",
        )


def _tensor_of(path: Path, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return an array as a tensor, which shares its memory if possible."""
    plain = array.flags.writeable and array.flags.c_contiguous
    try:
        return torch.from_numpy(array if plain else array.copy())
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"`{dotted(path)}` is a numpy array of {array.dtype}, which no tensor can have",
            hint="convert it to an array of numbers or to a list",
        ) from error


def made_plain(path: Path, value: Any) -> tuple[Any, list[list[Any]]]:
    """Replace numpy's numbers by Python's, and empty bytes by text: pickle would write them as
    function calls. Returns the value, and the replaced types with their positions in it."""
    if type(value) in SCALARS and value != b"":
        return value, []
    types: list[list[Any]] = []
    plain = _made_plain(path, value, (), types)
    return (plain, types) if types else (value, [])


def _made_plain(path: Path, value: Any, inside: tuple[str, ...], types: list[list[Any]]) -> Any:
    if isinstance(value, np.generic):
        name = {"U": "str", "S": "bytes"}.get(value.dtype.kind, value.dtype.name)
        if name not in NUMBERS:
            where = "".join(f"[{key}]" for key in inside)
            raise UsageError(
                f"`{dotted(path)}{where}` is a {type_name(value)}",
                hint="convert it to a number or text of Python",
            )
        types.append([[*inside], name])
        return value.item()
    if type(value) is bytes and not value:
        types.append([[*inside], EMPTY_BYTES])
        return ""
    kind = type(value)
    if kind in (list, tuple) and not (SCALARS.issuperset(map(type, value)) and b"" not in value):
        if len(inside) > DEPTH_MAX:
            raise UsageError(
                f"`{dotted(path)}` is nested too deep",
                hint="check whether a container contains itself",
            )
        return kind(
            _made_plain(path, member, (*inside, str(number)), types)
            for number, member in enumerate(value)
        )
    if kind in (dict, OrderedDict):
        # A key without a text form is refused later, when the value is encoded.
        return kind(
            (key, _made_plain(path, member, (*inside, key_text(key) or ""), types))
            for key, member in value.items()
        )
    return value
