"""Objects that give their state and take it back: saved as they say it, put together again as it
was saved, and handed to their own `load_state_dict`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from holdfast.errors import HoldfastError, MismatchError
from holdfast.failures import worded
from holdfast.format.manifest import TensorEntry
from holdfast.format.structure import SEQUENCES, Node, children_of, kind_of_node
from holdfast.state.match import Like, Match, Values, put_together
from holdfast.state.stored import Branch, keys_like, rebuild
from holdfast.state.tree import Flattener, Path, Stateful, is_object, spelled, type_name

RANK = "rank_"
"""Begins the key of one rank's own state."""


class ObjectState:
    """Any object with `state_dict` and `load_state_dict` as a component of the state."""

    def __init__(self, owner: Stateful, *, is_asked_after: bool = False) -> None:
        """`is_asked_after`: the object is asked for its state once it has been given one."""
        self._owner, self._is_asked_after = owner, is_asked_after

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add what the object says. A load makes every tensor of it anew."""
        return flattener.walk(path, self._owner.state_dict(), rebuilt=True)

    def match(self, match: Match, path: Path) -> None:
        """Have everything below the path read and handed to the object."""
        stored = match.stored
        branch, node = stored.below(path), stored.node(path)
        if kind_of_node(node) == "object":
            # One level: an object may have said another one.
            assert isinstance(node, dict)
            node = node["object"]
        if stored.states_structure and (node is not None or not branch.is_empty):
            self._match_stated(match, path, branch, node)
        elif stored.states_structure:
            match.missing(spelled(path))
        else:
            self._match_guessed(match, path, branch)

    def _match_stated(self, match: Match, path: Path, branch: Branch, node: Node) -> None:
        """The checkpoint says what the structure is; what a fresh object says is not asked for,
        since asking may have effects: a data loader starts its workers."""
        fresh: Any = self._owner.state_dict() if _needs_fresh(node) else None
        match.demand(branch, node, _like(match, path, fresh))
        fill = _filler(match, path, node, fresh)

        def take(values: Values) -> None:
            state = put_together(branch, node, values)
            self._give(fill(state) if fill is not None else state, path)

        match.then(take)

    def _match_guessed(self, match: Match, path: Path, branch: Branch) -> None:
        """Stock DCP and earlier versions wrote names alone: a fresh object's own state tells the
        types of keys and containers, and what has no entries of its own."""
        fresh: Any = self._owner.state_dict()
        for name in _missing(fresh, branch, path):
            match.missing(name)
        if not branch.is_empty:
            match.demand(branch, None, _like(match, path, fresh))

        def take(values: Values) -> None:
            state = _merged(fresh, branch, lambda name, _: values(name))
            self._give(state, path)

        match.then(take)

    def _give(self, state: Any, path: Path) -> None:
        hand_over(self._owner, state, spelled(path))
        if self._is_asked_after:
            self._owner.state_dict()


class RankState:
    """The state of one rank's own object, below a key of its rank."""

    def __init__(self, state: ObjectState, rank: int, *, may_lack: bool = False) -> None:
        """`may_lack`: a checkpoint of fewer ranks is no reason to refuse it; the object stays as
        it is then."""
        self._state, self._key, self._may_lack = state, f"{RANK}{rank}", may_lack

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the object's state below this rank's key."""
        at = (*path, self._key)
        node = self._state.flatten(flattener, at)
        if node is not None:
            flattener.state.structure[at] = {"object": node}
        return None

    def match(self, match: Match, path: Path) -> None:
        """Have this rank's state read; that of other ranks is theirs."""
        at = (*path, self._key)
        match.taken.update(match.stored.below(path).entries())
        if self._may_lack and match.stored.below(at).is_empty:
            return
        self._state.match(match, at)


class NoState:
    """The component of what this run does not have: all that is stored for it is left over."""

    def flatten(self, flattener: Flattener, path: Path) -> Node:  # noqa: ARG002 - nothing to add
        """Add nothing."""
        return None

    def match(self, match: Match, path: Path) -> None:
        """Take nothing."""


def hand_over(owner: Any, state: Any, name: str) -> None:
    """Call an object's own `load_state_dict`.

    Raises:
        MismatchError: the object refuses the state.
    """
    try:
        with torch.no_grad():
            owner.load_state_dict(state)
    except HoldfastError:
        raise
    except Exception as error:
        raise MismatchError(
            f"`{name}` was not taken: {worded(error).what}",
            hint="make the object as the run that saved it did; or leave it out of this load, and "
            "it stays as it is",
        ) from error


def _needs_fresh(node: Node) -> bool:
    """Whether only the object itself can say where a part of its state belongs."""
    kind = kind_of_node(node)
    if kind == "object":
        return True
    if isinstance(node, dict) and kind == "tensor":
        return "like" in node["tensor"]
    if isinstance(node, dict) and kind == "subclass":
        return any(map(_needs_fresh, node["subclass"]["inner"].values()))
    return any(_needs_fresh(child) for _, child in children_of(node) or ())


def _filler(match: Match, path: Path, node: Node, fresh: Any) -> Callable[[Any], Any] | None:
    """A function that gives the objects inside of a state what belongs to them, and returns the
    state with the objects themselves in it. None where the node states no object.

    `fresh` is what the owner says before the load; an object that it lacks is a difference.
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
            return tuple(fillers[n](one) if n in fillers else one for n, one in enumerate(state))
        for key, filler in fillers.items():
            state[key] = filler(state[key])
        return state

    return fill


def _object_filler(match: Match, path: Path, node: Node, live: Any) -> Callable[[Any], Any]:
    if not is_object(live):
        match.fits_not(spelled(path), f"is an object in the checkpoint, a {type_name(live)} here")
        return lambda state: state
    inner = _filler(match, path, node, live.state_dict() if _needs_fresh(node) else None)

    def fill(state: Any) -> Any:
        hand_over(live, state if inner is None else inner(state), spelled(path))
        return live

    return fill


def _path_key(key: Any, node: Node) -> str | int:
    return key if kind_of_node(node) in SEQUENCES else str(key)


def _like(match: Match, path: Path, fresh: Any) -> Like:
    """Where a tensor lies: as that of a fresh object does, or as a parameter."""

    def like(entry: TensorEntry, name: str) -> torch.Tensor | None:
        found = fresh
        for key in entry.path[len(path) :]:
            found = _child(found, key)
        if isinstance(found, torch.Tensor):
            return found
        return match.parameter(name) if name else None

    return like


def _child(value: Any, key: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(key) if key in value else value.get(keys_like([*value], str(key)))
    if isinstance(value, list | tuple) and type(key) is int and key < len(value):
        return value[key]
    return None


# ------------------------------------------------- checkpoints that do not state their structure


def _missing(fresh: Any, branch: Branch, path: Path) -> Iterator[str]:
    """Names of entries that a fresh object has, and the checkpoint has nothing of."""
    if branch.is_empty:
        flattener = Flattener(enters=lambda f, at, one: f.walk(at, one.state_dict(), rebuilt=True))
        flattener.put(path, fresh)
        yield from flattener.state.leaves
    elif branch.name is None and isinstance(fresh, Mapping):
        for key, member in fresh.items():
            yield from _missing(member, _below(branch, key), (*path, str(key)))


def _below(branch: Branch, key: Any) -> Branch:
    """The branch of a key of a dict, also where the checkpoint states no paths."""
    name = str(key)
    for known in (key, name):
        if known in branch.children:
            return branch.children[known]
    held = {
        one.removeprefix(f"{name}."): child
        for one, child in branch.children.items()
        if type(one) is str and one.startswith(f"{name}.")
    }
    return Branch((*branch.path, name), None, held)  # type: ignore[arg-type]


Take = Callable[[str, Node], Any]


def _merged(fresh: Any, branch: Branch, take: Take) -> Any:
    """What was saved, with the types of a fresh object's keys and containers."""
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
    """The numbers of a list's members below a branch; none where it is no list's."""
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
