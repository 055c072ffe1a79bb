"""Optimizers at a load: what is stored for each parameter, and what `load_state_dict` gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from holdfast.format.manifest import TensorEntry
from holdfast.format.structure import Node, children_of, kind_of_node
from holdfast.state.match import Match, Values, put_together
from holdfast.state.optim_class import ClassCheck
from holdfast.state.same import same
from holdfast.state.stateful import hand_over
from holdfast.state.stored import Branch
from holdfast.state.subclass import is_ours
from holdfast.state.tree import Path, spelled

if TYPE_CHECKING:
    from holdfast.state.optim import OptimizerState

STATE, GROUPS = "state", "param_groups"

Made = Callable[[Values], Any]
"""Makes a part of the state from what was read."""


@dataclass(frozen=True, slots=True)
class StoredOptimizer:
    """What a checkpoint holds for optimizers, by parameter."""

    slots: dict[str, dict[str, Branch]] = field(default_factory=dict)
    whole: dict[str, Branch] = field(default_factory=dict)
    """State of a parameter that is no dict of slots with text keys."""

    options: dict[str, dict[str, Branch]] = field(default_factory=dict)
    groups: list[Branch] = field(default_factory=list)
    """Groups as they are, each with its parameters: torch's form before it is flattened."""


class OptimizerMatch:
    """Matches optimizers with what is stored for their parameters."""

    def __init__(self, owner: OptimizerState, match: Match, path: Path) -> None:
        self._owner, self._match, self._path = owner, match, path
        self._name = spelled(path)
        self._names = [
            [owner.name_of(parameter) for parameter in _parameters(optimizer)]
            for optimizer in owner.named
        ]
        self._known = {name for names in self._names for name in names}

    def run(self) -> None:
        """Say which entry goes where."""
        branch = self._match.stored.below(self._path)
        keys = [*branch.children, *self._stated_keys(branch)]
        if not keys:
            if any(self._known):
                self._match.missing(self._name)
            return
        found = self._sorted(branch, keys)
        for number, optimizer in enumerate(self._owner.named):
            self._match_optimizer(optimizer, number, found)

    def _stated_keys(self, branch: Branch) -> Iterator[str | int]:
        """Keys below the path of which only the structure tells."""
        length = len(self._path)
        for path in self._match.stored.structure:
            below = len(path) == length + 1 and path[:length] == self._path
            if below and path[-1] not in branch.children:
                yield path[-1]

    def _sorted(self, branch: Branch, keys: list[str | int]) -> StoredOptimizer:
        """Everything below the path, by parameter; what belongs to none here is left over."""
        found = StoredOptimizer()
        for key in keys:
            text, child = str(key), branch.child(key)
            kind, dot, rest = text.partition(".")
            if kind == STATE and dot:
                self._sort_slot(found, rest, child)
            elif kind == GROUPS and dot:
                self._sort_option(found, rest, child)
            elif text == STATE:
                self._sort_nested(found, child)
            elif text == GROUPS:
                found.groups.extend(child.child(n) for n in sorted(child.children, key=int))
        return found

    def _sort_slot(self, found: StoredOptimizer, rest: str, child: Branch) -> None:
        name, slot = self._split(rest)
        if name is None and rest in self._known:
            found.whole[rest] = child
        elif name is not None:
            found.slots.setdefault(name, {})[slot] = child

    def _sort_option(self, found: StoredOptimizer, rest: str, child: Branch) -> None:
        name, option = self._split(rest)
        if name is not None:
            found.options.setdefault(name, {})[option] = child

    def _sort_nested(self, found: StoredOptimizer, state: Branch) -> None:
        """Torch's form before it is flattened: by name, or by the number of the parameter."""
        numbered = [name for names in self._names for name in names]
        for key, slots in state.children.items():
            text = str(key)
            if text not in self._known and text.isdecimal() and int(text) < len(numbered):
                text = numbered[int(text)]
            if text in self._known:
                found.slots[text] = {str(slot): one for slot, one in slots.children.items()}

    def _split(self, rest: str) -> tuple[str | None, str]:
        """A parameter's name and what follows it; None where no parameter here has that name."""
        name, dot, last = rest.rpartition(".")
        if name in self._known:
            return name, last
        while dot:
            name, dot, more = name.rpartition(".")
            last = f"{more}.{last}"
            if name in self._known:
                return name, last
        return None, rest

    def _match_optimizer(self, optimizer: Optimizer, number: int, found: StoredOptimizer) -> None:
        names, parameters = self._names[number], _parameters(optimizer)
        state: dict[Any, Made] = {}
        groups_of = [group for group in optimizer.param_groups for _ in group["params"]]
        for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
            if not _is_stepped_here(optimizer, parameter):
                continue
            known = name in found.slots or name in found.whole or name in found.options
            if not known and not found.groups and parameter.requires_grad:
                self._match.missing(f"{self._name}.{STATE}.{name}")
            made = self._match_state(optimizer, name, parameter, groups_of[index], found)
            if made is not None:
                state[index] = made
        classes = ClassCheck(self._match, self._path)
        if not classes.is_same(optimizer):
            slots = (found.slots[name] for name in names if name in found.slots)
            classes.check(optimizer, self._stored_options(names, found), slots)
        groups = self._match_groups(optimizer, number, names, found)
        self._note_empty(optimizer, number)
        others = self._match_others(number)

        def take(values: Values) -> None:
            said: dict[str, Any] = {STATE: {key: made(values) for key, made in state.items()}}
            said[GROUPS] = groups(values)
            said = others(values, said)
            with self._exactly(optimizer, names):
                hand_over(optimizer, said, self._name)

        self._match.then(take)

    # ---------------------------------------------------------------------------------- the slots

    def _match_state(
        self,
        optimizer: Optimizer,
        name: str,
        parameter: torch.Tensor,
        group: Mapping[str, Any],
        found: StoredOptimizer,
    ) -> Made | None:
        """What makes the state of one parameter; None where it has none."""
        if name in found.whole:
            return self._made(found.whole[name], parameter)
        if name not in found.slots:
            return None
        live = optimizer.state.get(parameter, {})
        # Optimizers with these options keep their step count on the parameter's device.
        on_device = bool(group.get("fused") or group.get("capturable"))
        made = {
            slot: self._match_slot(branch, parameter, live.get(slot), on_device=on_device)
            for slot, branch in found.slots[name].items()
        }
        return lambda values: {slot: one(values) for slot, one in made.items()}

    def _match_slot(
        self, branch: Branch, parameter: torch.Tensor, live: Any, *, on_device: bool
    ) -> Made:
        entry = self._match.stored.tensor(branch.name or "")
        node = self._match.stored.node(branch.path)
        fits = (
            entry is not None
            and isinstance(live, torch.Tensor)
            and (node is None or kind_of_node(node) == "tensor")
            and is_ours(live)
            and entry.shape == tuple(live.shape)
            and f"torch.{entry.dtype}" == str(live.dtype)
        )
        if fits and branch.name is not None:
            # Its own memory is filled: what is there may be half of a GPU's.
            self._match.fill(branch.name, live)
            return lambda _: live
        return self._made(branch, parameter, on_device=on_device)

    def _made(self, branch: Branch, parameter: torch.Tensor, *, on_device: bool = False) -> Made:
        """What makes a slot anew. One of its parameter's shape lies as the parameter does; any
        other is whole on every rank, a single number on the host."""
        match = self._match
        node = match.stored.node(branch.path)

        def like(entry: TensorEntry, name: str) -> torch.Tensor | torch.device | None:
            if name:
                return match.parameter(name)
            at = match.stored.node(entry.path)
            whole = isinstance(at, dict) and "place" in at.get("tensor", {})
            if entry.shape == tuple(parameter.shape) and not whole:
                return parameter
            return parameter.device if entry.shape or on_device else None

        match.demand(branch, node, like)
        return lambda values: put_together(branch, node, values)

    # --------------------------------------------------------------------------------- the groups

    def _match_groups(
        self, optimizer: Optimizer, number: int, names: list[str], found: StoredOptimizer
    ) -> Callable[[Values], list[dict[str, Any]]]:
        """What makes the groups: the options that were saved, and this run's where it has more."""
        made: list[tuple[dict[str, Any], list[int], dict[str, Made]]] = []
        start = 0
        for index, group in enumerate(optimizer.param_groups):
            numbers = list(range(start, start + len(group["params"])))
            start += len(numbers)
            held = [names[n] for n in numbers]
            options = self._match_options(held, found) if held else self._empty(number, index)
            own = {option: value for option, value in group.items() if option != "params"}
            made.append((own, numbers, options))
        nested = [self._nested_group(branch) for branch in found.groups]

        def groups(values: Values) -> list[dict[str, Any]]:
            stated = [one(values) for one in nested]
            by_name = {str(n): group for group in stated for n in group.get("params", ())}
            said = []
            for own, numbers, options in made:
                group = {**own, **{option: one(values) for option, one in options.items()}}
                for n in numbers[:1]:
                    theirs = by_name.get(names[n], by_name.get(str(n), {}))
                    group |= {k: v for k, v in theirs.items() if k != "params"}
                said.append({**group, "params": numbers})
            return said

        return groups

    def _stored_options(self, names: list[str], found: StoredOptimizer) -> set[str]:
        """Names of the options that are stored for the groups of an optimizer."""
        options = {str(option) for group in found.groups for option in group.children}
        options.update(*(found.options[name] for name in names if name in found.options))
        return options - {"params"}

    def _note_empty(self, optimizer: Optimizer, number: int) -> None:
        """Have it said which groups had no parameters when they were saved, and are not so here:
        each parameter keeps the options that were saved for it, and theirs belong to none."""
        path = (*self._path, f"empty_groups.{number}")
        branch, node = self._match.stored.below(path), self._match.stored.node(path)
        self._match.taken.update(branch.entries())
        for key in [*branch.children, *(str(key) for key, _ in children_of(node) or ())]:
            index, groups = int(key), optimizer.param_groups
            if index >= len(groups) or groups[index]["params"]:
                here = "has some here" if index < len(groups) else "is not here"
                self._match.notes[
                    f"`{self._name}`: group {index} had no parameters when it was saved, and "
                    f"{here}: every parameter keeps its own options; a scheduler that sets them by "
                    "the number of the group will not follow"
                ] = None

    def _match_options(self, held: list[str], found: StoredOptimizer) -> dict[str, Made]:
        options: dict[str, Made] = {}
        values = self._match.stored.manifest.values
        for name in held:
            for option, branch in found.options.get(name, {}).items():
                first = next(
                    found.options[one][option]
                    for one in held
                    if option in found.options.get(one, {})
                )
                mine, firsts = values.get(branch.name or ""), values.get(first.name or "")
                if first is branch:
                    options[option] = self._made_value(branch)
                elif mine is not None and firsts is not None and _is_one(mine, firsts):
                    # Stored once for all of a group.
                    self._match.taken.update(branch.entries())
                else:
                    self._compare(option, first, branch, held[0], name)
        return options

    def _compare(self, option: str, one: Branch, other: Branch, first: str, name: str) -> None:
        """Refuse options that differ between parameters which are in one group here."""
        makes = self._made_value(one), self._made_value(other)

        def check(values: Values) -> str | None:
            found = [make(values) for make in makes]
            if same(*found):
                return None
            return (
                f"`{self._name}`: `{first}` and `{name}` are in one group here, and were saved "
                f"with `{option}` {found[0]!r} and {found[1]!r}"
            )

        self._match.check([*one.entries(), *other.entries()], check)

    def _empty(self, number: int, index: int) -> dict[str, Made]:
        """The options of a group without parameters."""
        path = (*self._path, f"empty_groups.{number}")
        stored = self._match.stored
        branch, node = stored.below(path), stored.node(path)
        if branch.is_empty and node is None:
            return {}
        self._match.demand(branch, node)
        options: dict[str, Made] = {}
        below = branch.child(str(index))
        for option in below.children:
            options[str(option)] = self._made_value(below.child(option))
        return options

    def _nested_group(self, branch: Branch) -> Made:
        self._match.demand(branch, None)
        return lambda values: put_together(branch, None, values)

    def _made_value(self, branch: Branch) -> Made:
        node = self._match.stored.node(branch.path)
        self._match.demand(branch, node)
        return lambda values: put_together(branch, node, values)

    def _match_others(self, number: int) -> Callable[[Values, dict[str, Any]], dict[str, Any]]:
        """What adds state that belongs to no parameter, and what else the optimizer said."""
        stored = self._match.stored
        parts: list[tuple[str, Branch, Node]] = []
        for key in ("others", "more"):
            path = (*self._path, f"{key}.{number}")
            branch, node = stored.below(path), stored.node(path)
            if not (branch.is_empty and node is None):
                self._match.demand(branch, node, self._like_parameter)
                parts.append((key, branch, node))

        def add(values: Values, said: dict[str, Any]) -> dict[str, Any]:
            for key, branch, node in parts:
                held = put_together(branch, node, values)
                if key == "others":
                    said[STATE].update(held)
                else:
                    said.update(held)
            return said

        return add

    def _like_parameter(self, _: TensorEntry, name: str) -> torch.Tensor | None:
        return self._match.parameter(name) if name else None

    # ---------------------------------------------------------------------------------- afterwards

    @contextmanager
    def _exactly(self, optimizer: Optimizer, names: list[str]) -> Iterator[None]:
        """Undo what torch's own `load_state_dict` changes in what it is given: it casts every slot
        to the dtype of its parameter, counters and 8-bit moments too, and spells texts anew.

        This is done after torch's cast, and before the optimizer's `__setstate__` and hooks see
        the state: what these make of it stands.
        """
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            yield
            return
        given: dict[str, Any] = {}
        # The last of the hooks before the load: what the others have changed is in what it gets.
        hook = optimizer.register_load_state_dict_pre_hook(lambda _, said: given.update(said))
        set_state = optimizer.__setstate__
        name_of = dict(zip(map(id, _parameters(optimizer)), names, strict=True))

        def set_exact_state(cast: dict[str, Any]) -> None:
            parameters = [one for group in cast[GROUPS] for one in group["params"]]
            numbers = [number for group in given[GROUPS] for number in group["params"]]
            for number, parameter in zip(numbers, parameters, strict=True):
                if number in given[STATE] and not self._was_cast(name_of[id(parameter)], parameter):
                    cast[STATE][parameter] = _exact(given[STATE][number], cast[STATE][parameter])
            set_state(cast)

        optimizer.__dict__["__setstate__"] = set_exact_state
        try:
            yield
        finally:
            hook.remove()
            optimizer.__dict__.pop("__setstate__", None)

    def _was_cast(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether the parameter has another dtype than the checkpoint's, so that slots follow."""
        tensors = self._match.stored.manifest.tensors
        entry = tensors.get(name) or tensors.get(f"model.{name}")
        return entry is not None and f"torch.{entry.dtype}" != str(parameter.dtype)


def _is_one(one: Any, other: Any) -> bool:
    return (one.file, one.item) == (other.file, other.item)


def _exact(handed: Any, live: Any) -> Any:
    if isinstance(handed, torch.Tensor) and isinstance(live, torch.Tensor):
        if (handed.dtype, handed.shape) == (live.dtype, live.shape):
            return live
        return handed.to(live.device)
    if isinstance(live, torch.Tensor):
        return live
    if type(handed) is dict:
        kept = live if isinstance(live, dict) else {}
        return {key: _exact(value, kept.get(key)) for key, value in handed.items()}
    if type(handed) in (list, tuple):
        same_length = isinstance(live, (list, tuple)) and len(live) == len(handed)
        others = live if same_length else [None] * len(handed)
        return type(handed)(_exact(one, other) for one, other in zip(handed, others, strict=True))
    return handed


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_stepped_here(optimizer: Any, parameter: torch.Tensor) -> bool:
    """Whether this rank keeps the parameter's state: `ZeroRedundancyOptimizer` shares them out."""
    owners = getattr(optimizer, "_param_to_rank", None)
    return owners is None or owners[parameter] == optimizer.rank
