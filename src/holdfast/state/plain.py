"""State that people hold in dicts and lists of their own, objects among it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol

import torch

from holdfast.errors import MismatchError, UsageError
from holdfast.format.structure import MAPPINGS, Node, children_of, kind_of_node
from holdfast.state.match import Like, Match, Values, as_number, is_one_number, put_together
from holdfast.state.same import same
from holdfast.state.stored import Branch, object_node
from holdfast.state.subclass import CONTEXT, is_ours, taken_apart
from holdfast.state.tree import Flattener, Path, Stateful, spelled, type_name


class Component(Protocol):
    """A part of the state that knows how it is stored."""

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add its state below a path. Returns the node of that state."""
        ...

    def match(self, match: Match, path: Path) -> None:
        """Say which entries below a path go where."""
        ...


_NOT_TENSORS = (int, float, complex, bool, str, bytes)
"""Types of values in whose place no tensor is put: whoever reads them expects such a value."""

Put = Callable[[Any], None]
"""Puts a loaded value in its place."""


class PlainMatch:
    """Matches dicts and lists of the caller's with what is stored for them.

    Dicts keep their keys: what is missing or left over is a difference. Tensors and objects are
    filled where they are. Everything else is replaced by what was saved, whatever that is.
    """

    def __init__(
        self, match: Match, component_of: Callable[[Path, Any], Component | None], like: Like
    ) -> None:
        self._match, self._component_of, self._like = match, component_of, like

    def member(self, live: Any, path: Path, put: Put) -> None:
        """Match what stands at a path; `put` replaces it."""
        match, stored = self._match, self._match.stored
        component = self._component_of(path, live)
        if component is not None:
            component.match(match, path)
            return
        branch, node = stored.below(path), object_node(stored.node(path))
        if isinstance(live, torch.Tensor):
            self._tensor(live, path, branch, node)
        elif branch.is_empty and stored.node(path) is None:
            self._absent(live, path)
        elif isinstance(live, Mapping) and live and _is_mapping(branch, node):
            self._mapping(live, path, branch, node)
        elif isinstance(live, list) and self._keeps_members(live, path, branch, node):
            for number, member in enumerate(live):
                self.member(member, (*path, number), _setter(live, number))
        elif is_one_number(stored, branch.name, live):
            assert branch.name is not None
            match.demand(branch, None)
            name, wanted = branch.name, type(live)
            match.then(lambda values: put(as_number(name, values(name), wanted)))
        elif type(live) in _NOT_TENSORS and stored.tensor(branch.name or "") is not None:
            what = f"is a tensor in the checkpoint, a {type(live).__name__} is wanted"
            match.fits_not(spelled(path), what)
            match.taken.update(branch.entries())
        else:
            match.demand(branch, node, self._like)
            match.then(lambda values: _replace(live, put_together(branch, node, values), put))

    def _tensor(self, live: torch.Tensor, path: Path, branch: Branch, node: Node) -> None:
        if is_ours(live):
            self._match.fill(branch.name or spelled(path), live)
            return
        match_inside(self._match, live, path, branch, node)

    def _absent(self, live: Any, path: Path) -> None:
        """Note that nothing is stored for a value."""
        if self._match.stored.states_structure:
            self._match.missing(spelled(path))
            return
        # Stock DCP keeps nothing of a dict that has no values in it.
        flattener = Flattener()
        flattener.put(path, live)
        for name in flattener.state.leaves:
            self._match.missing(name)

    def _mapping(self, live: Mapping[Any, Any], path: Path, branch: Branch, node: Node) -> None:
        known = {str(key) for key in live}
        for key, member in live.items():
            self.member(member, (*path, str(key)), _setter(live, key))
        for key, _ in children_of(node) or ():
            if str(key) not in known and str(key) not in branch.children:
                self._match.extra[spelled((*path, str(key)))] = None

    def _keeps_members(self, live: list[Any], path: Path, branch: Branch, node: Node) -> bool:
        """Whether a list is filled member by member: it has objects in it, or tensors of the
        shapes that are stored."""
        count = _length(branch, node)
        if any(self._component_of((*path, n), one) is not None for n, one in enumerate(live)):
            if count != len(live):
                what = f"has {count} members in the checkpoint, {len(live)} here"
                self._match.fits_not(spelled(path), what)
            return True
        if count != len(live) or not all(isinstance(one, torch.Tensor) for one in live):
            return False
        entries = [self._match.stored.tensor(branch.child(n).name or "") for n in range(count)]
        return bool(live) and all(
            entry is not None and entry.shape == tuple(one.shape) and entry.dtype == _dtype(one)
            for entry, one in zip(entries, live, strict=True)
        )


def match_inside(match: Match, live: torch.Tensor, path: Path, branch: Branch, node: Node) -> None:
    """Match the inner tensors of a wrapper subclass with those that are stored."""
    apart = taken_apart(spelled(path), live, must_be_known=False)
    described = node.get("subclass") if isinstance(node, dict) else None
    if described is None:
        known = "a plain tensor" if branch.name is not None else "missing"
        match.fits_not(spelled(path), f"is {known} in the checkpoint, a {apart.class_name} here")
        match.taken.update(branch.entries())
        return
    if described["class"] != apart.class_name or {*described["inner"]} != {*apart.inner}:
        match.fits_not(
            spelled(path), f"is a {described['class']} in the checkpoint, a {apart.class_name} here"
        )
        match.taken.update(branch.entries())
        return
    for name, inner in apart.inner.items():
        child = branch.child(name)
        if is_ours(inner):
            match.fill(child.name or spelled(child.path), inner)
        else:
            match_inside(match, inner, child.path, child, described["inner"][name])
    said = branch.child(CONTEXT)
    match.demand(said, None)
    match.then(lambda values: _check_context(spelled(path), apart.context, values, said))


def _check_context(name: str, here: Any, values: Values, said: Branch) -> None:
    stored = put_together(said, None, values)
    if not same(stored, here):
        raise MismatchError(
            f"`{name}` was saved with {stored!r}, and has {here!r} here",
            hint="make the model as the run that saved it did, then load",
        )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_mapping(branch: Branch, node: Node) -> bool:
    kind = kind_of_node(node)
    if kind is not None:
        return kind in MAPPINGS
    return bool(branch.children) and not any(type(key) is int for key in branch.children)


def _length(branch: Branch, node: Node) -> int:
    kind = kind_of_node(node)
    if kind in ("list", "tuple"):
        assert isinstance(node, dict)
        return len(node[kind])
    return len(branch.children)


def _replace(live: Any, made: Any, put: Put) -> None:
    """Put a value in the place of another; into the dict or list that is there, if it is one."""
    if type(live) is dict and type(made) is dict:
        live.clear()
        live.update(made)
    elif type(live) is list and type(made) is list:
        live[:] = made
    else:
        put(made)


def _setter(container: Any, key: Any) -> Put:
    def put(value: Any) -> None:
        if not isinstance(container, MutableMapping | list):
            raise UsageError(
                f"the state holds a {type_name(container)}, which takes no new values",
                hint="pass a dict, whose values a load can replace",
            )
        container[key] = value

    return put


def is_object(value: Any) -> bool:
    """Whether it gives and takes its own state."""
    return (
        isinstance(value, Stateful)
        and not isinstance(value, Mapping)
        and not isinstance(value, type)
    )
