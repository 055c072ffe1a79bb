"""State that people hold in dicts and lists of their own, objects among it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol

import torch

from holdfast.errors import UsageError
from holdfast.format.structure import MAPPINGS, SEQUENCES, Node, children_of, kind_of_node
from holdfast.state.match import Like, Match, Values, check_number, is_one_number, put_together
from holdfast.state.same import same
from holdfast.state.stored import Branch, object_node
from holdfast.state.subclass import CONTEXT, is_ours, taken_apart
from holdfast.state.tree import Flattener, Path, check_depth, is_object, spelled, type_name


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

_SCALARS = frozenset({*_NOT_TENSORS, type(None)})

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
        elif type(live) in (list, tuple) and self._keeps_members(live, path, branch, node):
            self._members(live, path, put)
        elif is_one_number(stored, branch.name, live):
            assert branch.name is not None
            match.demand(branch, None)
            name, wanted = branch.name, type(live)
            match.check([name], check_number(name, wanted))
            match.then(lambda values: put(wanted(values(name).item())))
        elif type(live) in _NOT_TENSORS and stored.tensor(branch.name or "") is not None:
            what = f"is a tensor in the checkpoint, a {type(live).__name__} is wanted"
            match.fits_not(spelled(path), what)
            match.taken.update(branch.entries())
        elif (held := _held_in(live, path)) is not None:
            what = f"is {_described(branch, node)} in the checkpoint, a {type_name(live)} with a "
            match.fits_not(spelled(path), f"{what}{type_name(held)} in it is wanted")
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

    def _members(self, live: list[Any] | tuple[Any, ...], path: Path, put: Put) -> None:
        held = live if isinstance(live, list) else [*live]
        for number, member in enumerate(live):
            self.member(member, (*path, number), _setter(held, number))

        def renew(_: Values) -> None:
            # A tuple takes no new members: another one takes its place.
            if any(one is not other for one, other in zip(held, live, strict=True)):
                put(tuple(held))

        if held is not live:
            self._match.then(renew)

    def _keeps_members(
        self, live: list[Any] | tuple[Any, ...], path: Path, branch: Branch, node: Node
    ) -> bool:
        """Whether a list or tuple is filled member by member: an object lies in it at any depth,
        or it is a list of tensors that have the shapes that are stored."""
        count = _length(branch, node)
        if count is not None and _object_in(live, path) is not None:
            if count != len(live):
                what = f"has {count} members in the checkpoint, {len(live)} here"
                self._match.fits_not(spelled(path), what)
            return True
        if type(live) is not list or count != len(live):
            return False
        if not all(isinstance(one, torch.Tensor) for one in live):
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

    def check(values: Values) -> str | None:
        stored = put_together(said, None, values)
        if same(stored, apart.context):
            return None
        return f"`{spelled(path)}` was saved with {stored!r}, and has {apart.context!r} here"

    match.check(said.entries(), check)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_mapping(branch: Branch, node: Node) -> bool:
    kind = kind_of_node(node)
    if kind is not None:
        return kind in MAPPINGS
    return bool(branch.children) and not any(type(key) is int for key in branch.children)


def _length(branch: Branch, node: Node) -> int | None:
    """Number of members of a stored list or tuple that is entered; None for anything else."""
    kind = kind_of_node(node)
    if kind in SEQUENCES:
        assert isinstance(node, dict)
        return len(node[kind])
    told = kind is None and branch.name is None
    return len(branch.children) if told and {*map(type, branch.children)} == {int} else None


def _described(branch: Branch, node: Node) -> str:
    """What a checkpoint has at a path, in words."""
    kind = kind_of_node(node)
    if kind in (*MAPPINGS, *SEQUENCES, "tensor"):
        return f"a {kind}"
    if kind is None and branch.name is None:
        return "a list" if _length(branch, node) is not None else "a dict"
    return "a plain value"


def _object_in(live: Any, path: Path) -> Any:
    """The first object that lies in dicts, lists and tuples, at any depth; None if none does."""
    check_depth(path)
    members = live.values() if isinstance(live, Mapping) else live
    if _SCALARS.issuperset(map(type, members)):
        return None
    for number, member in enumerate(members):
        if is_object(member):
            return member
        if isinstance(member, Mapping) or type(member) in (list, tuple):
            found = _object_in(member, (*path, number))
            if found is not None:
                return found
    return None


def _held_in(live: Any, path: Path) -> Any:
    """What a load cannot replace by something else: an object inside of a container, or a tensor
    inside of a dict, whose keys must stay."""
    if isinstance(live, Mapping):
        found = next((one for one in live.values() if isinstance(one, torch.Tensor)), None)
        return _object_in(live, path) if found is None else found
    return _object_in(live, path) if type(live) in (list, tuple) else None


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
