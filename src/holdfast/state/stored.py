"""What a checkpoint holds below a path, and state put together again from it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from holdfast.errors import FormatError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.structure import (
    ARRAY,
    EMPTY_BYTES,
    MAPPINGS,
    Node,
    children_of,
    key_of,
    key_text,
    kind_of_node,
)
from holdfast.state.subclass import CONTEXT, put_together
from holdfast.state.tree import Path, spelled


class Branch:
    """Entries of a checkpoint at and below one path."""

    __slots__ = ("children", "name", "path")

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        children: dict[str | int, Branch] | None = None,
    ) -> None:
        """`name` is that of the entry at this path itself."""
        self.path: Path = path
        self.name: str | None = name
        self.children: dict[str | int, Branch] = {} if children is None else children

    def entries(self) -> Iterator[str]:
        """Names of all entries at and below the path."""
        if self.name is not None:
            yield self.name
        for child in self.children.values():
            yield from child.entries()

    def child(self, key: str | int) -> Branch:
        """The branch below one key; an empty one where nothing is there."""
        return self.children.get(key) or Branch((*self.path, key))

    @property
    def is_empty(self) -> bool:
        return self.name is None and not self.children


class StoredState:
    """Entries of a checkpoint by path, and the structure that it states."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.structure: Mapping[Path, Node] = manifest.structure or {}
        self.states_structure: bool = manifest.structure is not None
        """False for what stock DCP or an older Holdfast wrote: only names tell its structure."""
        self._tops: dict[str | int, list[tuple[str, Path]]] | None = None
        self._branches: dict[str | int, Branch] = {}
        self._pathless: list[str] | None = None

    def names(self) -> Iterator[tuple[str, Path]]:
        """Name and path of every entry."""
        for name, tensor in self.manifest.tensors.items():
            yield name, tensor.path
        for name, value in self.manifest.values.items():
            yield name, value.path

    def tops(self) -> Mapping[str | int, Sequence[tuple[str, Path]]]:
        """Entries by the first key of their paths."""
        if self._tops is None:
            self._tops = {}
            for name, path in self.names():
                self._tops.setdefault(path[0], []).append((name, path))
        return self._tops

    def below(self, path: Path) -> Branch:
        """The entries at and below a path."""
        top = path[0]
        if top not in self._branches:
            self._branches[top] = self._grown(top)
        branch = self._branches[top]
        for key in path[1:]:
            branch = branch.child(key)
        return branch

    def holds(self, name: str, path: Path) -> bool:
        """Whether anything is known of a name and its path: the entry itself, one below the path,
        or the structure of the path."""
        return (
            name in self.manifest.tensors or path in self.structure or not self.below(path).is_empty
        )

    def node(self, path: Path) -> Node:
        """The node of a path: its own, or as a part of one above it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.structure:
                return _node_below(self.structure[path[:length]], path[length:])
        return None

    def tensor(self, name: str) -> TensorEntry | None:
        """The tensor of this name."""
        return self.manifest.tensors.get(name)

    def _grown(self, top: str | int) -> Branch:
        root = Branch((top,))
        for name, path in self.tops().get(top, ()):
            branch = root
            for key in path[1:]:
                branch = branch.children.setdefault(key, Branch((*branch.path, key)))
            branch.name = name
        if root.is_empty and type(top) is str:
            self._grow_by_names(root, top)
        return root

    def _grow_by_names(self, root: Branch, top: str) -> None:
        """Stand in for paths that the checkpoint does not state: a name is one key below `top`."""
        if self._pathless is None:
            self._pathless = sorted(name for name, path in self.names() if path == (name,))
        prefix = f"{top}."
        for name in self._pathless[bisect_left(self._pathless, prefix) :]:
            if not name.startswith(prefix):
                break
            key = name.removeprefix(prefix)
            root.children[key] = Branch((top, key), name)


def _node_below(node: Node, keys: Path) -> Node:
    for key in keys:
        node = object_node(node)
        held = children_of(node) or ()
        node = next((child for name, child in held if name == key or str(name) == key), None)
    return node


def object_node(node: Node) -> Node:
    """The node of an object's state, where the node says that there was an object."""
    while isinstance(node, dict) and "object" in node:
        node = node["object"]
    return node


Take = Callable[[str, Node], Any]
"""`take(name, node)`: what an entry holds, as its node says: a tensor or a value."""


def rebuild(branch: Branch, node: Node, take: Take) -> Any:
    """The state below a path, put together as it was saved.

    Raises:
        FormatError: the structure names an entry that is not there.
    """
    node = object_node(node)
    kind = kind_of_node(node)
    if kind == "subclass":
        assert isinstance(node, dict)
        return _rebuild_subclass(branch, node["subclass"], take)
    held = children_of(node)
    if held is None:
        return _rebuild_told(branch, node, take)
    members = [(key, rebuild(_member(branch, key, kind), child, take)) for key, child in held]
    if kind in MAPPINGS:
        assert isinstance(node, dict)
        assert kind is not None
        return _mapping_of(kind, dict(members), node)
    values = [value for _, value in members]
    return tuple(values) if kind == "tuple" else values


def leaves_of(branch: Branch, node: Node) -> Iterator[tuple[str, Node]]:
    """Every entry that `rebuild` takes, with its node.

    Raises:
        FormatError: the structure names an entry that is not there.
    """
    node = object_node(node)
    kind = kind_of_node(node)
    if kind == "subclass":
        assert isinstance(node, dict)
        for name, inner in node["subclass"]["inner"].items():
            yield from leaves_of(branch.child(name), inner)
        yield from leaves_of(branch.child(CONTEXT), None)
        return
    held = children_of(node)
    if held is not None:
        for key, child in held:
            yield from leaves_of(_member(branch, key, kind), child)
    elif branch.name is not None:
        yield branch.name, node
    elif branch.children:
        for below in branch.children.values():
            yield from leaves_of(below, None)
    else:
        raise FormatError(f"the checkpoint states `{spelled(branch.path)}`, and does not hold it")


def _member(branch: Branch, key: Any, kind: str | None) -> Branch:
    return branch.child(str(key) if kind in MAPPINGS else key)


def _rebuild_told(branch: Branch, node: Node, take: Take) -> Any:
    """What the entries tell by themselves: one of them, or dicts and lists around several."""
    if branch.name is not None:
        return take(branch.name, node)
    if not branch.children:
        raise FormatError(f"the checkpoint states `{spelled(branch.path)}`, and does not hold it")
    members = {key: rebuild(child, None, take) for key, child in branch.children.items()}
    if all(type(key) is int for key in members):
        return [members[key] for key in sorted(members, key=int)]
    return {str(key): value for key, value in members.items()}


def _rebuild_subclass(branch: Branch, described: Mapping[str, Any], take: Take) -> torch.Tensor:
    inner = {
        name: rebuild(branch.child(name), node, take) for name, node in described["inner"].items()
    }
    context = rebuild(branch.child(CONTEXT), None, take)
    where = spelled(branch.path)
    return put_together(where, described["class"], inner, context, described)


_FACTORIES: dict[str, Any] = {
    **{cls.__name__: cls for cls in (list, dict, set, int, float, str, bool, tuple)},
    "None": None,
}


def _mapping_of(kind: str, members: dict[Any, Any], node: Mapping[str, Any]) -> Any:
    if kind == "OrderedDict":
        return OrderedDict(members)
    if kind == "Counter":
        return Counter(members)
    if kind == "defaultdict":
        return defaultdict(_FACTORIES[node["default"]], members)
    return members


def as_saved(value: Any, node: Node) -> Any:
    """A tensor or a value with the types that its node states: numpy's, where they were."""
    if node == ARRAY:
        assert isinstance(value, torch.Tensor)
        return value.numpy()
    if isinstance(node, dict) and "types" in node:
        return _typed(value, {tuple(path): name for path, name in node["types"]}, ())
    return value


def _typed(value: Any, types: Mapping[tuple[str, ...], str], at: tuple[str, ...]) -> Any:
    if at in types:
        return b"" if types[at] == EMPTY_BYTES else np.dtype(types[at]).type(value)
    if not any(path[: len(at)] == at for path in types):
        return value
    if type(value) in (list, tuple):
        members = (_typed(one, types, (*at, str(n))) for n, one in enumerate(value))
        return type(value)(members)
    if isinstance(value, dict):
        return type(value)(
            (key, _typed(one, types, (*at, key_text(key) or ""))) for key, one in value.items()
        )
    return value


def keys_like(keys: Sequence[Any], name: str) -> Any:
    """A key of the kind that a dict's others are, from its spelling."""
    by_name = {str(key): key for key in keys}
    if name in by_name:
        return by_name[name]
    if keys and not any(type(key) is str for key in keys):
        try:
            return key_of(name)
        except ValueError:
            return name
    return name
