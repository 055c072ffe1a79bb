"""Objects with `state_dict` and `load_state_dict`: their state is saved as they return it, rebuilt
as it was saved, and passed to their own `load_state_dict`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from holdfast.errors import HoldfastError, MismatchError
from holdfast.failures import worded
from holdfast.format.manifest import TensorEntry
from holdfast.format.structure import SEQUENCES, Node, children_of, kind_of_node
from holdfast.state.match import Like, Match, Values
from holdfast.state.stored import Branch, Take, keys_like, rebuild
from holdfast.state.tree import Flattener, Path, Stateful, dotted, is_object, type_name

RANK = "rank_"
"""Prefix of the keys of states that belong to one rank."""


class ObjectState:
    """Any object with `state_dict` and `load_state_dict` as a component of the state."""

    def __init__(self, owner: Stateful, *, is_read_back: bool = False) -> None:
        """`is_read_back`: a load calls `state_dict` of the object after `load_state_dict`."""
        self._owner, self._is_read_back = owner, is_read_back

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the object's state. A load creates all of its tensors."""
        return flattener.walk(path, self._owner.state_dict(), rebuilt=True)

    def match(self, match: Match, path: Path) -> None:
        """Plan to read everything below the path and pass it to the object."""
        stored = match.stored
        branch, node = stored.below(path), stored.node(path)
        if kind_of_node(node) == "object":
            # Only one level: the state of an object may be another object.
            assert isinstance(node, dict)
            node = node["object"]
        if stored.states_structure and (node is not None or not branch.is_empty):
            self._match_stated(match, path, branch, node)
        elif stored.states_structure:
            match.missing(dotted(path))
        else:
            self._match_guessed(match, path, branch)

    def _match_stated(self, match: Match, path: Path, branch: Branch, node: Node) -> None:
        """Match a state whose structure is stored. `state_dict` of the fresh object is called only
        if needed, because it may have effects: it starts the workers of a data loader."""
        fresh: Any = self._owner.state_dict() if _needs_fresh(node) else None
        make = match.request(branch, node, _like(match, path, fresh))
        fill = _filler(match, path, node, fresh)

        def take(values: Values) -> None:
            state = make(values)
            self._give(fill(state) if fill is not None else state, path)

        match.then(take)

    def _match_guessed(self, match: Match, path: Path, branch: Branch) -> None:
        """Match a state of stock DCP or of old versions, which stored only names. The fresh
        object's state gives the types of keys and containers, and parts without entries."""
        fresh: Any = self._owner.state_dict()
        for name in _missing(fresh, branch, path):
            match.missing(name)
        if not branch.is_empty:
            match.request(branch, None, _like(match, path, fresh))

        def take(values: Values) -> None:
            self._give(_merged(fresh, branch, lambda name, _: values(name)), path)

        match.then(take)

    def _give(self, state: Any, path: Path) -> None:
        hand_over(self._owner, state, dotted(path))
        if self._is_read_back:
            self._owner.state_dict()


class RankState:
    """The state of an object that belongs to one rank, stored below the key of that rank."""

    def __init__(self, state: ObjectState, rank: int, *, may_lack: bool = False) -> None:
        """`may_lack`: a checkpoint without a state for this rank leaves the object unchanged."""
        self._state, self._key, self._may_lack = state, f"{RANK}{rank}", may_lack

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the object's state below this rank's key."""
        below = (*path, self._key)
        node = self._state.flatten(flattener, below)
        if node is not None:
            flattener.state.structure[below] = {"object": node}
        return None

    def match(self, match: Match, path: Path) -> None:
        """Plan to read this rank's state. The states of other ranks count as used."""
        below = (*path, self._key)
        match.taken.update(match.stored.below(path).entries())
        if not (self._may_lack and match.stored.below(below).is_empty):
            self._state.match(match, below)


class NoState:
    """A component that this run lacks. A load lists its stored entries as unexpected."""

    def flatten(self, flattener: Flattener, path: Path) -> Node:  # noqa: ARG002 - nothing to add
        """Add nothing."""
        return None

    def match(self, match: Match, path: Path) -> None:
        """Take nothing."""


def hand_over(owner: Any, state: Any, name: str) -> None:
    """Pass a loaded state to an object's own `load_state_dict`.

    Raises:
        MismatchError: `load_state_dict` raised an error.
    """
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


def _needs_fresh(node: Node) -> bool:
    """Return whether a load needs the object's own state, to place a tensor or find an object."""
    kind = kind_of_node(node)
    if kind == "object":
        return True
    if isinstance(node, dict) and kind == "tensor":
        return "like" in node["tensor"]
    if isinstance(node, dict) and kind == "subclass":
        return any(map(_needs_fresh, node["subclass"]["inner"].values()))
    return any(_needs_fresh(child) for _, child in children_of(node) or ())


def _filler(match: Match, path: Path, node: Node, fresh: Any) -> Callable[[Any], Any] | None:
    """Return a function that passes inner objects their states, and returns the state with these
    objects in it. Return None if the node contains no object.

    `fresh` is the owner's state before the load. Objects that it lacks are listed as mismatches.
    """
    if isinstance(node, dict) and kind_of_node(node) == "object":
        return _object_filler(match, path, node["object"], fresh)
    fillers = {
        key: filler
        for key, child in children_of(node) or ()
        if (filler := _filler(match, (*path, _path_key(key, node)), child, _child(fresh, key)))
    }
    if not fillers:
        return None

    def fill(state: Any) -> Any:
        if isinstance(state, tuple):
            return tuple(fillers[n](v) if n in fillers else v for n, v in enumerate(state))
        for key, filler in fillers.items():
            state[key] = filler(state[key])
        return state

    return fill


def _object_filler(match: Match, path: Path, node: Node, live: Any) -> Callable[[Any], Any]:
    if not is_object(live):
        match.mismatch(dotted(path), f"is an object in the checkpoint, a {type_name(live)} here")
        return lambda state: state
    inner = _filler(match, path, node, live.state_dict() if _needs_fresh(node) else None)

    def fill(state: Any) -> Any:
        hand_over(live, state if inner is None else inner(state), dotted(path))
        return live

    return fill


def _path_key(key: Any, node: Node) -> str | int:
    return key if kind_of_node(node) in SEQUENCES else str(key)


def _like(match: Match, path: Path, fresh: Any) -> Like:
    """Return a `Like` that places a tensor like the one of a fresh object, or like a parameter."""

    def like(entry: TensorEntry, name: str) -> torch.Tensor | None:
        fresh_tensor = fresh
        for key in entry.path[len(path) :]:
            fresh_tensor = _child(fresh_tensor, key)
        if isinstance(fresh_tensor, torch.Tensor):
            return fresh_tensor
        return match.parameter(name) if name else None

    return like


def _child(value: Any, key: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(key) if key in value else value.get(keys_like([*value], str(key)))
    if isinstance(value, list | tuple) and type(key) is int and key < len(value):
        return value[key]
    return None


# ----------------------------------------------------------------- checkpoints without structure


def _missing(fresh: Any, branch: Branch, path: Path) -> Iterator[str]:
    """Yield names of entries that a fresh object has and the checkpoint lacks."""
    if branch.is_empty:
        flattener = Flattener(enters=lambda f, p, obj: f.walk(p, obj.state_dict(), rebuilt=True))
        flattener.put(path, fresh)
        yield from flattener.state.leaves
    elif branch.name is None and isinstance(fresh, Mapping):
        for key, member in fresh.items():
            yield from _missing(member, _below(branch, key), (*path, str(key)))


def _below(branch: Branch, key: Any) -> Branch:
    """Return the branch of a dict's key, also if the checkpoint has no paths."""
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


def _merged(fresh: Any, branch: Branch, take: Take) -> Any:
    """Return the saved state, with key types and containers of a fresh object's state."""
    if branch.name is not None:
        return take(branch.name, None)
    if branch.is_empty:
        return fresh
    if isinstance(fresh, Mapping):
        return _merged_mapping(fresh, branch, take)
    numbers = _numbers(branch)
    if isinstance(fresh, list) and numbers:
        return [
            _merged(fresh[n] if n < len(fresh) else None, _below(branch, n), take) for n in numbers
        ]
    return rebuild(branch, None, take)


def _numbers(branch: Branch) -> list[int]:
    """Return the list indices below a branch; an empty list if there are other keys."""
    heads = {str(key).partition(".")[0] for key in branch.children}
    return sorted(map(int, heads)) if all(head.isdecimal() for head in heads) else []


def _merged_mapping(fresh: Mapping[Any, Any], branch: Branch, take: Take) -> Any:
    merged: Any = copy.copy(fresh) if hasattr(fresh, "__setitem__") else dict(fresh)
    done: set[str] = set()
    for key, member in fresh.items():
        below = _below(branch, key)
        done.update(below.entries())
        merged[key] = _merged(member, below, take)
    for name, child in branch.children.items():
        if not done.issuperset(child.entries()):
            merged[keys_like([*fresh], str(name))] = rebuild(child, None, take)
    return merged
