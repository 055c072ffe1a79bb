"""Entries of a checkpoint by path, and functions that rebuild state from them."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch

from holdfast.errors import FormatError
from holdfast.format.manifest import Manifest, TensorEntry, ValueEntry
from holdfast.format.structure import (
    ARRAY,
    FACTORIES,
    MAPPINGS,
    Node,
    children_of,
    key_of,
    kind_of_node,
    types_in,
    with_types,
)
from holdfast.state.subclass import CONTEXT, unflatten
from holdfast.state.tree import MAPPING_TYPES, Path, dotted


class Branch:
    """Entries of a checkpoint at and below one path."""

    __slots__ = ("children", "name", "path")

    def __init__(
        self, path: Path, name: str | None = None, children: dict[str | int, Branch] | None = None
    ) -> None:
        """`name`: entry at the path itself, if there is one."""
        self.path: Path = path
        self.name: str | None = name
        self.children: dict[str | int, Branch] = {} if children is None else children

    def entries(self) -> Iterator[str]:
        """Yield the names of all entries at and below the path."""
        if self.name is not None:
            yield self.name
        for child in self.children.values():
            yield from child.entries()

    def child(self, key: str | int) -> Branch:
        """Return the branch below one key; an empty branch if there are no entries."""
        return self.children.get(key) or Branch((*self.path, key))

    @property
    def is_empty(self) -> bool:
        return self.name is None and not self.children


class StoredState:
    """Entries of a checkpoint by path, and the structure that its manifest states."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.structure: Mapping[Path, Node] = manifest.structure or {}
        self.states_structure: bool = manifest.structure is not None
        """False for stock DCP and old versions of Holdfast, which stored only names."""
        self.root: Branch = Branch(())
        self._branches_by_name: dict[str, Branch] = {}
        entries: dict[str, TensorEntry | ValueEntry] = {**manifest.tensors, **manifest.values}
        for name, entry in entries.items():
            branch = self.root
            for key in entry.path:
                if key not in branch.children:
                    branch.children[key] = Branch((*branch.path, key))
                branch = branch.children[key]
            branch.name = name

    def below(self, path: Path) -> Branch:
        """Return the branch at `path`. It is empty if the checkpoint has no entries there."""
        branch = self.root
        for key in path:
            if branch is self.root and key not in branch.children and type(key) is str:
                branch = self._below_name(key)
            else:
                branch = branch.child(key)
        return branch

    def holds(self, name: str, path: Path) -> bool:
        """Return whether the checkpoint has a tensor `name`, or any entry or node at `path`."""
        return (
            name in self.manifest.tensors or path in self.structure or not self.below(path).is_empty
        )

    def node(self, path: Path) -> Node:
        """Return the node at a path, which may be part of the node at a shorter path; None if there
        is none."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.structure:
                return _node_below(self.structure[path[:length]], path[length:])
        return None

    def tensor(self, name: str | None) -> TensorEntry | None:
        """Return the tensor `name`; None if the checkpoint has none."""
        return None if name is None else self.manifest.tensors.get(name)

    def _below_name(self, top: str) -> Branch:
        """Return a branch for a checkpoint without paths. It has each name that begins with `top.`,
        with the rest of the name as one key."""
        if top not in self._branches_by_name:
            branch = self._branches_by_name[top] = Branch((top,))
            prefix = f"{top}."
            for name in self._pathless[bisect_left(self._pathless, prefix) :]:
                if not name.startswith(prefix):
                    break
                key = name.removeprefix(prefix)
                branch.children[key] = Branch((top, key), name)
        return self._branches_by_name[top]

    @cached_property
    def _pathless(self) -> list[str]:
        """Sorted names of the entries whose path is their name."""
        return sorted(name for name, branch in self.root.children.items() if branch.name == name)


def _node_below(node: Node, keys: Path) -> Node:
    for key in keys:
        node = object_node(node)
        children = children_of(node) or ()
        node = next((child for name, child in children if name == key or str(name) == key), None)
    return node


def object_node(node: Node) -> Node:
    """Return the node of an object's state, if `node` marks an object; else `node` itself."""
    while isinstance(node, dict) and "object" in node:
        node = node["object"]
    return node


Values = Callable[[str], Any]
"""`values(name)` returns the tensor of an entry that has been read, or a copy of its value."""

Make = Callable[[Values], Any]
"""`make(values)` builds one part of the state from the entries that were read."""


Note = Callable[[str, Node], None]
"""`note(name, node)` is called for every entry that a rebuild needs."""

Enter = Callable[[Branch, Node], Make]
"""`enter(branch, node)` returns the maker of an object whose state has this node."""


def rebuilder(
    branch: Branch, node: Node, note: Note = lambda *_: None, enter: Enter | None = None
) -> Make:
    """Return the maker of the saved state at and below a path. `branch`, `node`: the entries and
    the structure there.

    Calls `note` for every entry. Without `enter`, inner objects are replaced by their states.
    """
    kind = kind_of_node(node)
    if isinstance(node, dict) and kind == "object":
        inner = node["object"]
        return enter(branch, inner) if enter else rebuilder(branch, inner, note)
    if isinstance(node, dict) and kind == "subclass":
        return _subclass_rebuilder(branch, node["subclass"], note)
    children = children_of(node)
    if children is not None:
        assert isinstance(node, dict)
        assert kind is not None
        named = kind in MAPPINGS
        members = [
            (key, rebuilder(branch.child(str(key) if named else key), child, note, enter))
            for key, child in children
        ]
        return lambda values: _container_of(kind, node, [(k, make(values)) for k, make in members])
    if branch.name is not None:
        name = branch.name
        note(name, node)
        return lambda values: as_saved(values(name), node)
    if not branch.children:
        raise FormatError(
            f"the structure of the checkpoint names `{dotted(branch.path)}`, but it has no such "
            "entry"
        )
    below = {key: rebuilder(child, None, note) for key, child in branch.children.items()}
    if all(type(key) is int for key in below):
        return lambda values: [below[key](values) for key in sorted(below, key=int)]
    return lambda values: {str(key): make(values) for key, make in below.items()}


def _subclass_rebuilder(branch: Branch, described: Mapping[str, Any], note: Note) -> Make:
    inner = {
        name: rebuilder(branch.child(name), node, note) for name, node in described["inner"].items()
    }
    context = rebuilder(branch.child(CONTEXT), None, note)

    def make(values: Values) -> torch.Tensor:
        tensors = {name: make_inner(values) for name, make_inner in inner.items()}
        return unflatten(dotted(branch.path), tensors, context(values), described)

    return make


def _container_of(kind: str, node: Mapping[str, Any], members: Sequence[tuple[Any, Any]]) -> Any:
    if kind in MAPPINGS:
        if kind == "defaultdict":
            return defaultdict(FACTORIES[node["default"]], members)
        return MAPPING_TYPES[kind](dict(members))
    values = [value for _, value in members]
    return tuple(values) if kind == "tuple" else values


def as_saved(value: Any, node: Node) -> Any:
    """Restore the numpy types that a node states for a tensor or value."""
    if node == ARRAY:
        assert isinstance(value, torch.Tensor)
        return value.numpy()
    types = types_in(node)
    return with_types(value, types, numpy_scalar) if types else value


def numpy_scalar(name: str, number: Any) -> Any:
    """Return a number or text as a numpy scalar of the dtype `name`."""
    return np.dtype(name).type(number)


def keys_like(keys: Sequence[Any], name: str) -> Any:
    """Return the key with the text `name`, in the type that a dict's other `keys` have."""
    by_name = {str(key): key for key in keys}
    if name in by_name:
        return by_name[name]
    if keys and not any(type(key) is str for key in keys):
        with suppress(ValueError):
            return key_of(name)
    return name
