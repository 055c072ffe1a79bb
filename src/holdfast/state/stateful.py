"""Objects with `state_dict` and `load_state_dict`: a load rebuilds the state that `state_dict`
returned, and passes it to `load_state_dict`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from holdfast.errors import HoldfastError, MismatchError
from holdfast.failures import worded
from holdfast.format.manifest import TensorEntry
from holdfast.format.structure import Node, kind_of_node
from holdfast.state.match import Match
from holdfast.state.stored import Branch, Make, Values, keys_like, rebuilder
from holdfast.state.tree import Flattener, Path, Stateful, dotted, is_object, type_name

RANK = "rank_"
"""Prefix of the keys of states that belong to one rank."""


class ObjectState:
    """Any object with `state_dict` and `load_state_dict` as a component of the state."""

    def __init__(self, owner: Stateful, *, is_read_back: bool = False) -> None:
        """`is_read_back`: whether a load also calls `state_dict`, after `load_state_dict`."""
        self._owner, self._is_read_back = owner, is_read_back

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the object's state. A load creates all of its tensors."""
        return flattener.walk(path, self._owner.state_dict(), rebuilt=True)

    def match(self, match: Match, path: Path) -> None:
        """Plan to read everything below the path and pass it to the object."""
        stored = match.stored
        branch, node = stored.below(path), stored.node(path)
        if kind_of_node(node) == "object":
            # Unwrap one level only: the state of an object may be another object.
            assert isinstance(node, dict)
            node = node["object"]
        if not stored.states_structure:
            self._match_guessed(match, path, branch)
        elif node is None and branch.is_empty:
            match.missing(dotted(path))
        else:
            make = _request(match, self._owner, branch, node)
            match.then(lambda values: self._give(make(values), path))

    def _match_guessed(self, match: Match, path: Path, branch: Branch) -> None:
        """Match a state of stock DCP or of old versions, which stored only names. The types of
        keys, dicts and lists, and everything without entries, come from the state that the object
        has before the load."""
        fresh: Any = self._owner.state_dict()
        for name in _missing(fresh, branch, path):
            match.missing(name)
        if not branch.is_empty:
            match.request(branch, None, lambda entry, _: _tensor_at(fresh, entry.path[len(path) :]))
        match.then(lambda values: self._give(_merged(fresh, branch, values), path))

    def _give(self, state: Any, path: Path) -> None:
        hand_over(self._owner, state, dotted(path))
        if self._is_read_back:
            self._owner.state_dict()


class RankState:
    """State of an object that differs between ranks: each rank stores its own, below a key of the
    rank."""

    def __init__(self, state: ObjectState, rank: int, *, may_lack: bool = False) -> None:
        """`may_lack`: if a checkpoint has no state for this rank, the object stays unchanged."""
        self._state, self._key, self._may_lack = state, f"{RANK}{rank}", may_lack

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the object's state below this rank's key."""
        below = (*path, self._key)
        node = self._state.flatten(flattener, below)
        if node is not None:
            flattener.state.structure[below] = {"object": node}
        return None

    def match(self, match: Match, path: Path) -> None:
        """Plan to read this rank's state. Other ranks' states are not reported as unexpected."""
        below = (*path, self._key)
        match.taken.update(match.stored.below(path).entries())
        if not (self._may_lack and match.stored.below(below).is_empty):
            self._state.match(match, below)


def hand_over(owner: Any, state: Any, name: str) -> None:
    """Pass a loaded state to an object's `load_state_dict`, whose errors become MismatchErrors."""
    try:
        with torch.no_grad():
            owner.load_state_dict(state)
    except HoldfastError:
        raise
    except Exception as error:
        raise MismatchError(
            f"`{name}` could not be loaded: {worded(error).what}",
            hint="create the object as in the run that saved it, or leave it out of this load to "
            "keep its state",
        ) from error


def _request(match: Match, owner: Stateful, branch: Branch, node: Node) -> Make:
    """Plan to read the state of `owner` from `branch`. Return its maker, which also passes the
    states of inner objects to these objects.

    The state that `owner` has before the load shows where its inner objects and sharded tensors
    are.
    """
    # Call `state_dict` only if needed, because the call may have effects, such as to start the
    # workers of a data loader.
    fresh = cache(owner.state_dict)
    depth = len(branch.path)

    def like(entry: TensorEntry, name: str | None) -> torch.Tensor | None:
        if name is None:
            return None
        tensor = _tensor_at(fresh(), entry.path[depth:])
        return match.like_parameter(entry, name) if tensor is None else tensor

    def enter(inner: Branch, inner_node: Node) -> Make:
        name, live = dotted(inner.path), _at(fresh(), inner.path[depth:])
        if not is_object(live):
            match.mismatch(name, f"is an object in the checkpoint, a {type_name(live)} here")
            return match.request(inner, inner_node)
        make = _request(match, live, inner, inner_node)

        def give(values: Values) -> Any:
            hand_over(live, make(values), name)
            return live

        return give

    return match.request(branch, node, like, enter)


def _at(state: Any, keys: Path) -> Any:
    """Return the value below nested keys of a state; None if there is none."""
    for key in keys:
        state = _child(state, key)
    return state


def _tensor_at(state: Any, keys: Path) -> torch.Tensor | None:
    found = _at(state, keys)
    return found if isinstance(found, torch.Tensor) else None


def _child(value: Any, key: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(key) if key in value else value.get(keys_like([*value], str(key)))
    if isinstance(value, list | tuple) and type(key) is int and key < len(value):
        return value[key]
    return None


def _missing(fresh: Any, branch: Branch, path: Path) -> Iterator[str]:
    """Yield the names of entries that `fresh` has and the checkpoint lacks. `fresh`: state of the
    object at `path` before the load."""
    if branch.is_empty:
        flattener = Flattener(lambda _, value: ObjectState(value) if is_object(value) else None)
        flattener.put(path, fresh)
        yield from flattener.state.leaves
    elif branch.name is None and isinstance(fresh, Mapping):
        for key, member in fresh.items():
            yield from _missing(member, _below(branch, key), (*path, str(key)))


def _below(branch: Branch, key: Any) -> Branch:
    """Return the branch below the key of a dict. If the checkpoint stores names without paths, it
    has all entries of `branch` whose names begin with the key."""
    name = str(key)
    for known in (key, name):
        if known in branch.children:
            return branch.children[known]
    prefix = f"{name}."
    children = {
        child_key.removeprefix(prefix): child
        for child_key, child in branch.children.items()
        if type(child_key) is str and child_key.startswith(prefix)
    }
    return Branch((*branch.path, name), None, children)  # type: ignore[arg-type]


def _merged(fresh: Any, branch: Branch, values: Values) -> Any:
    """Return the saved state, with the types of keys, dicts and lists in `fresh`, the state that
    the object had before the load."""
    if branch.name is not None:
        return values(branch.name)
    if branch.is_empty:
        return fresh
    if isinstance(fresh, Mapping):
        return _merged_mapping(fresh, branch, values)
    numbers = _numbers(branch)
    if isinstance(fresh, list) and numbers:
        return [
            _merged(fresh[n] if n < len(fresh) else None, _below(branch, n), values)
            for n in numbers
        ]
    return rebuilder(branch, None)(values)


def _numbers(branch: Branch) -> list[int]:
    """If all keys directly below a branch are list indices, or names that begin with one and a dot,
    return the indices, sorted. Else return an empty list."""
    heads = {str(key).partition(".")[0] for key in branch.children}
    return sorted(map(int, heads)) if all(head.isdecimal() for head in heads) else []


def _merged_mapping(fresh: Mapping[Any, Any], branch: Branch, values: Values) -> Any:
    merged: Any = copy.copy(fresh) if hasattr(fresh, "__setitem__") else dict(fresh)
    done: set[str] = set()
    for key, member in fresh.items():
        below = _below(branch, key)
        done.update(below.entries())
        merged[key] = _merged(member, below, values)
    for name, child in branch.children.items():
        if not done.issuperset(child.entries()):
            merged[keys_like([*fresh], str(name))] = rebuilder(child, None)(values)
    return merged
