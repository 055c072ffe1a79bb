"""Nested training state as flat names, with the names that `torch.distributed.checkpoint` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from holdfast.errors import UsageError

Path = tuple[str | int, ...]


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
    """Of a value that has several names: all of them, with their paths; that of the leaf first."""


PLAIN = (int, float, str, bytes, tuple, type(None))
"""Values that nobody opens: they hold no state of their own."""

NEVER_OPENED = (torch.Tensor, *PLAIN)
"""Leaves whatever else they may be."""


def flatten(
    state: Mapping[str, Any],
    *,
    root: Path = (),
    opened: Callable[[Path, Any], Any] = lambda _, value: value,
) -> dict[str, Leaf]:
    """Leaves by name: the keys on the way to them, joined by dots.

    Dicts are always entered; lists only where a tensor or a dict lies in them, so that a list of
    numbers is one value. These are the rules of stock DCP from torch 2.4 on, so that stock tools
    find the same names. `opened` may put a dict in the place of an object that holds state.

    Raises:
        UsageError: two leaves have one name.
    """
    leaves: dict[str, Leaf] = {}

    def enter(path: Path, name: str, value: Any) -> None:
        value = opened(path, value)
        members: Iterable[tuple[str | int, Any]]
        if isinstance(value, Mapping):
            if len({*map(str, value)}) < len(value):
                raise UsageError(
                    f"two keys at {path} are spelled alike: {[*value]}",
                    hint="rename one of them: a checkpoint spells every key as text",
                )
            members = ((str(key), member) for key, member in value.items())
        elif isinstance(value, list) and _holds_state(value):
            members = enumerate(value)
        else:
            add(path, name, value)
            return
        before = f"{name}." if path else ""
        for key, member in members:
            # A state has thousands of these, and asking what else they might be takes longest.
            follow = add if isinstance(member, NEVER_OPENED) else enter
            follow((*path, key), f"{before}{key}", member)

    def add(path: Path, name: str, value: Any) -> None:
        if name in leaves:
            raise named_twice(name, leaves[name].path, path)
        leaves[name] = Leaf(path, value)

    enter(root, ".".join(map(str, root)), state)
    return leaves


def named_twice(name: str, one: Path, other: Path) -> UsageError:
    """What is said of two entries that a checkpoint could not tell apart."""
    return UsageError(
        f"two entries have the name `{name}`: {one} and {other}",
        hint="rename one of the keys; dots in keys join them to their parents",
    )


def _holds_state(members: Sequence[Any]) -> bool:
    return any(
        isinstance(member, (Mapping, torch.Tensor))
        or (isinstance(member, list) and _holds_state(member))
        for member in members
    )


def place(state: MutableMapping[str, Any], path: Path, value: Any) -> None:
    """Put a value where `flatten` found one; everything on the way there exists."""
    container: Any = state
    for key in path[:-1]:
        container = container[_key(container, key)]
    container[_key(container, path[-1])] = value


def _key(container: Any, key: str | int) -> Any:
    if isinstance(container, Mapping) and key not in container:
        # `flatten` spells every key of a dict as a string.
        return next(original for original in container if str(original) == key)
    return key
