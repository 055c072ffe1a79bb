"""Loading of plain state: dicts, lists, tensors and values, which may contain objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.format.structure import MAPPINGS, SEQUENCES, Node, children_of, kind_of_node
from holdfast.spelling import with_article
from holdfast.state.match import Match, check_number, is_one_number
from holdfast.state.same import same
from holdfast.state.stored import Branch, Values, object_node
from holdfast.state.subclass import CONTEXT, is_plain_tensor, take_apart
from holdfast.state.tree import (
    SCALARS,
    ComponentOf,
    Flattener,
    Path,
    check_depth,
    dotted,
    is_object,
    type_name,
)

_NOT_TENSORS = SCALARS - {type(None)}
"""Types of values that a tensor must not replace."""

Put = Callable[[Any], None]
"""Function that stores a loaded value in the dict, list or other container of the old value."""


class PlainMatch:
    """Matches the caller's dicts and lists with their entries in the checkpoint.

    A dict whose keys differ from the stored ones is a mismatch. Tensors and objects are filled in
    place. Saved values replace everything else, whatever its type.
    """

    def __init__(self, match: Match, component_of: ComponentOf) -> None:
        self._match, self._component_of = match, component_of

    def member(self, live: Any, path: Path, put: Put) -> None:
        """Plan the load of `live`, the object or value at `path` in the caller's state. `put`:
        replaces it by a loaded value."""
        match, stored = self._match, self._match.stored
        component = self._component_of(path, live)
        if component is not None:
            component.match(match, path)
            return
        branch, node = stored.below(path), object_node(stored.node(path))
        if isinstance(live, torch.Tensor):
            if is_plain_tensor(live):
                match.fill(branch.name or dotted(path), live)
            else:
                match_inside(match, live, path, branch, node)
        elif branch.is_empty and stored.node(path) is None:
            self._absent(live, path)
        elif isinstance(live, Mapping) and live and _is_mapping(branch, node):
            self._mapping(live, path, branch, node)
        elif type(live) in (list, tuple) and self._keeps_members(live, path, branch, node):
            self._members(live, path, put)
        elif is_one_number(stored, branch.name, live):
            assert branch.name is not None
            match.request(branch, None)
            name, wanted = branch.name, type(live)
            match.check([name], check_number(name, wanted))
            match.then(lambda values: put(wanted(values(name).item())))
        elif type(live) in _NOT_TENSORS and stored.tensor(branch.name) is not None:
            expected = type(live).__name__
            what = f"is a tensor in the checkpoint, expected a {expected}"
            match.mismatch(dotted(path), what, branch)
        elif type(live) is tuple and _has_parameters(live) and _is_value(branch, node):
            self._fill_parameters(live, path, branch, node, put)
        elif (kept := _irreplaceable(live, path)) is not None:
            found = _described(branch, node)
            expected = f"a {type_name(live)} that contains a {type_name(kept)}"
            what = f"is {found} in the checkpoint, expected {expected}"
            match.mismatch(dotted(path), what, branch)
        else:
            make = match.request(branch, node, match.like_parameter)
            if type(live) is list and any(isinstance(m, torch.Tensor) for m in live):
                match.notes[
                    f"`{dotted(path)}`: its tensors were replaced by new ones: a list is filled in "
                    "place only by a list of as many tensors of the same shapes and dtypes"
                ] = None
            match.then(lambda values: _replace(live, make(values), put))

    def _absent(self, live: Any, path: Path) -> None:
        """Note that the checkpoint lacks everything that `live` has at `path`."""
        if self._match.stored.states_structure:
            self._match.missing(dotted(path))
            return
        # Stock DCP stores nothing for an empty dict, so report only leaves.
        flattener = Flattener(self._component_of)
        flattener.put(path, live)
        for name in flattener.state.leaves:
            self._match.missing(name)

    def _mapping(self, live: Mapping[Any, Any], path: Path, branch: Branch, node: Node) -> None:
        known = {str(key) for key in live}
        for key, member in live.items():
            self.member(member, (*path, str(key)), setter(live, key))
        for key, _ in children_of(node) or ():
            if str(key) not in known and str(key) not in branch.children:
                self._match.extra[dotted((*path, str(key)))] = None

    def _members(self, live: list[Any] | tuple[Any, ...], path: Path, put: Put) -> None:
        members = live if isinstance(live, list) else [*live]
        for number, member in enumerate(live):
            self.member(member, (*path, number), setter(members, number))

        def renew(_: Values) -> None:
            # A tuple's members cannot be replaced, so replace the tuple.
            if any(new is not old for new, old in zip(members, live, strict=True)):
                put(tuple(members))

        if members is not live:
            self._match.then(renew)

    def _fill_parameters(
        self, live: tuple[Any, ...], path: Path, branch: Branch, node: Node, put: Put
    ) -> None:
        """Plan to copy the tensors of a stored tuple, which is one value, to the parameters in
        `live`. Other members are replaced."""
        make = self._match.request(branch, node)
        expected = [_kind_of(member) for member in live]

        def check(values: Values) -> str | None:
            stored = make(values)
            members = stored if isinstance(stored, tuple) else ()
            found = [
                _kind_of(member) if isinstance(own, nn.Parameter) else _kind_of(own)
                for member, own in zip_longest(members, live)
            ]
            line = f"`{dotted(path)}` is {stored!r:.200} in the checkpoint, expected {expected}"
            return None if found == expected else line

        def fill(values: Values) -> None:
            made = [
                own.copy_(new) if isinstance(own, nn.Parameter) else new
                for own, new in zip(live, make(values), strict=True)
            ]
            put(tuple(made))

        self._match.check(branch.entries(), check)
        self._match.then(torch.no_grad()(fill))

    def _keeps_members(
        self, live: list[Any] | tuple[Any, ...], path: Path, branch: Branch, node: Node
    ) -> bool:
        """Return whether a list or tuple is filled member by member: if it contains an object or a
        parameter of a module, at any depth, or if all members are tensors with the stored shapes
        and dtypes."""
        count = _length(branch, node)
        if count is not None and _object_in(live, path) is not None:
            if count != len(live):
                line = f"has {count} members in the checkpoint, {len(live)} here"
                self._match.mismatch(dotted(path), line)
            return True
        return (
            count is not None
            and count == len(live) > 0
            and all(self._match.is_alike(branch.child(n).name, live[n]) for n in range(count))
        )


def match_inside(match: Match, live: torch.Tensor, path: Path, branch: Branch, node: Node) -> None:
    """Plan to fill the inner tensors of `live`, a tensor of a wrapper subclass, from `branch`.
    `node`: the stored description of the tensor."""
    parts, live_context = take_apart(dotted(path), live, must_be_known=False)
    described = node.get("subclass") if isinstance(node, dict) else None
    found = None
    if described is None:
        found = "a plain tensor" if branch.name is not None else "missing"
    elif described["class"] != type_name(live) or {*described["inner"]} != {*parts}:
        found = f"a {described['class']}"
    if described is None or found is not None:
        what = f"is {found} in the checkpoint, expected a {type_name(live)}"
        match.mismatch(dotted(path), what, branch)
        return
    for name, inner in parts.items():
        child = branch.child(name)
        if is_plain_tensor(inner):
            match.fill(child.name or dotted(child.path), inner)
        else:
            match_inside(match, inner, child.path, child, described["inner"][name])
    context = branch.child(CONTEXT)
    make_context = match.request(context, None)

    def check(values: Values) -> str | None:
        stored = make_context(values)
        if same(stored, live_context):
            return None
        return f"`{dotted(path)}` was saved with {stored!r}, and has {live_context!r} here"

    match.check(context.entries(), check)


def _is_mapping(branch: Branch, node: Node) -> bool:
    kind = kind_of_node(node)
    if kind is not None:
        return kind in MAPPINGS
    return bool(branch.children) and not any(type(key) is int for key in branch.children)


def _has_parameters(live: tuple[Any, ...]) -> bool:
    return any(isinstance(member, nn.Parameter) for member in live)


def _is_value(branch: Branch, node: Node) -> bool:
    """Return whether one plain value is stored."""
    return branch.name is not None and kind_of_node(node) in (None, "types")


def _kind_of(member: Any) -> str:
    """Describe a member of a tuple: the shape of a tensor, else the type."""
    if isinstance(member, torch.Tensor):
        return f"a tensor of shape {[*member.shape]}"
    return with_article(type_name(member))


def _length(branch: Branch, node: Node) -> int | None:
    """Return the length of a stored list or tuple whose members are entries; None if something else
    is stored."""
    kind = kind_of_node(node)
    if kind in SEQUENCES:
        assert isinstance(node, dict)
        return len(node[kind])
    is_list = kind is None and branch.name is None and {*map(type, branch.children)} == {int}
    return len(branch.children) if is_list else None


def _described(branch: Branch, node: Node) -> str:
    """Describe what the checkpoint has at a path, for a message."""
    kind = kind_of_node(node)
    if kind in (*MAPPINGS, *SEQUENCES, "tensor"):
        return f"a {kind}"
    if kind is None and branch.name is None:
        return "a list" if _length(branch, node) is not None else "a dict"
    return "a plain value"


def _object_in(live: Any, path: Path) -> Any:
    """Return the first object or parameter in nested dicts, lists and tuples; None if there is
    none."""
    check_depth(path)
    members = live.values() if isinstance(live, Mapping) else live
    if SCALARS.issuperset(map(type, members)):
        return None
    for number, member in enumerate(members):
        if is_object(member) or isinstance(member, nn.Parameter):
            return member
        if isinstance(member, Mapping) or type(member) in (list, tuple):
            inner = _object_in(member, (*path, number))
            if inner is not None:
                return inner
    return None


def _irreplaceable(live: Any, path: Path) -> Any:
    """Return what a load must not replace by a plain value: a tensor in the dict `live`, or an
    object with state or a parameter in the dict, list or tuple `live`. Return None if there is
    neither."""
    if isinstance(live, Mapping):
        tensor = next((v for v in live.values() if isinstance(v, torch.Tensor)), None)
        return _object_in(live, path) if tensor is None else tensor
    return _object_in(live, path) if type(live) in (list, tuple) else None


def _replace(live: Any, made: Any, put: Put) -> None:
    """Replace the value `live` by `made`. If both are dicts or both are lists, `live` stays the
    same object, with new members."""
    if type(live) is dict and type(made) is dict:
        live.clear()
        live.update(made)
    elif type(live) is list and type(made) is list:
        live[:] = made
    else:
        put(made)


def setter(container: Any, key: Any) -> Put:
    """Return a function that replaces the value of `key` in `container`."""

    def put(value: Any) -> None:
        try:
            container[key] = value
        except TypeError as error:
            raise UsageError(
                f"`{key}` cannot be replaced in a {type_name(container)}",
                hint="use a dict, whose values a load can replace",
            ) from error

    return put
