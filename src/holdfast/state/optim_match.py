"""Loading of optimizers: entries are sorted by parameter, then passed to `load_state_dict`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.optim import Optimizer

from holdfast.format.manifest import TensorEntry
from holdfast.format.structure import children_of, kind_of_node
from holdfast.state.layout import address_of
from holdfast.state.match import Match
from holdfast.state.optim import (
    EMPTY,
    GROUPS,
    MORE,
    OTHERS,
    STATE,
    OptimizerState,
    parameters_of,
)
from holdfast.state.optim_class import ClassCheck
from holdfast.state.same import same
from holdfast.state.stateful import hand_over
from holdfast.state.stored import Branch, Make, Values
from holdfast.state.tree import Path, dotted

_OF_GROUP = frozenset({"params", "param_names"})
"""Members of a group that say which parameters are in it. A load keeps those of this run."""


@dataclass(frozen=True, slots=True)
class StoredOptimizer:
    """Entries of a checkpoint for optimizers, by parameter name."""

    slots: dict[str, dict[str, Branch]] = field(default_factory=dict)
    whole: dict[str, Branch] = field(default_factory=dict)
    """State of each parameter whose state is not a dict of slots with text keys."""

    options: dict[str, dict[str, Branch]] = field(default_factory=dict)
    groups: list[Branch] = field(default_factory=list)
    """Groups in torch's form, each with a list of its parameters."""


class OptimizerMatch:
    """Matches optimizers with the stored entries of their parameters."""

    def __init__(self, owner: OptimizerState, match: Match, path: Path) -> None:
        self._owner, self._match, self._path = owner, match, path
        self._name = dotted(path)
        self._names = [
            [owner.name_of(parameter) for parameter in parameters_of(optimizer)]
            for optimizer in owner.named
        ]
        self._known = {name for names in self._names for name in names}

    def run(self) -> None:
        """Plan the load of every optimizer from the stored entries."""
        branch = self._match.stored.below(self._path)
        stated = (path[-1] for path in self._match.stored.structure if path[:-1] == self._path)
        keys = list(dict.fromkeys([*branch.children, *stated]))
        if not keys:
            if any(self._known):
                self._match.missing(self._name)
            return
        stored = self._sorted(branch, keys)
        for number, optimizer in enumerate(self._owner.named):
            self._match_optimizer(optimizer, number, stored)

    def _sorted(self, branch: Branch, keys: list[str | int]) -> StoredOptimizer:
        """Sort the entries of `branch` by parameter. `keys`: all keys directly below its path.
        Leave out entries of parameters that no optimizer has."""
        stored = StoredOptimizer()
        for key in keys:
            text, child = str(key), branch.child(key)
            kind, dot, rest = text.partition(".")
            if kind == STATE and dot:
                name, slot = self._split(rest)
                if name is not None:
                    stored.slots.setdefault(name, {})[slot] = child
                elif rest in self._known:
                    stored.whole[rest] = child
            elif kind == GROUPS and dot:
                name, option = self._split(rest)
                if name is not None:
                    stored.options.setdefault(name, {})[option] = child
            elif text == STATE:
                self._sort_nested(stored, child)
            elif text == GROUPS:
                stored.groups.extend(child.child(n) for n in sorted(child.children, key=int))
        return stored

    def _sort_nested(self, stored: StoredOptimizer, state: Branch) -> None:
        """Add to `stored` the slots in `state` that have torch's nested form: a dict of slots per
        parameter, keyed by the parameter's name or number."""
        numbered = [name for names in self._names for name in names]
        for key, slots in state.children.items():
            name = str(key)
            if name not in self._known and name.isdecimal() and int(name) < len(numbered):
                name = numbered[int(name)]
            if name in self._known:
                stored.slots[name] = {str(slot): child for slot, child in slots.children.items()}

    def _split(self, rest: str) -> tuple[str | None, str]:
        """Split a key into a parameter's name and the remainder.

        The name is the longest known one that is a prefix of the key; None if there is none.
        """
        name = rest
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self._known:
                return name, rest[len(name) + 1 :]
        return None, rest

    def _match_optimizer(self, optimizer: Optimizer, number: int, stored: StoredOptimizer) -> None:
        names, parameters = self._names[number], parameters_of(optimizer)
        state: dict[Any, Make] = {}
        groups_of = [group for group in optimizer.param_groups for _ in group["params"]]
        for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
            if not _is_stepped_here(optimizer, parameter):
                continue
            known = name in stored.slots or name in stored.whole or name in stored.options
            if not known and not stored.groups and parameter.requires_grad:
                self._match.missing(f"{self._name}.{STATE}.{name}")
            make = self._match_state(optimizer, name, parameter, groups_of[index], stored)
            if make is not None:
                state[index] = make
        classes = ClassCheck(self._match, self._path)
        if not classes.is_same(optimizer):
            slots = (stored.slots[name] for name in names if name in stored.slots)
            classes.check(optimizer, self._stored_options(names, stored), slots)
        make_groups = self._match_groups(optimizer, number, names, stored)
        self._note_empty(optimizer, number)
        add_others = self._match_others(number)

        def take(values: Values) -> None:
            loaded: dict[str, Any] = {STATE: {key: make(values) for key, make in state.items()}}
            loaded[GROUPS] = make_groups(values)
            add_others(values, loaded)
            with self._exactly(optimizer, names):
                hand_over(optimizer, loaded, self._name)

        self._match.then(take)

    def _match_state(
        self,
        optimizer: Optimizer,
        name: str,
        parameter: torch.Tensor,
        group: Mapping[str, Any],
        stored: StoredOptimizer,
    ) -> Make | None:
        """Return the maker of one parameter's state; None if the checkpoint has none."""
        if name in stored.whole:
            return self._make(stored.whole[name], parameter)
        if name not in stored.slots:
            return None
        live = optimizer.state.get(parameter, {})
        # Optimizers with these options keep their step count on the parameter's device.
        on_device = bool(group.get("fused") or group.get("capturable"))
        makers = {
            slot: self._match_slot(branch, parameter, live.get(slot), on_device=on_device)
            for slot, branch in stored.slots[name].items()
        }
        return lambda values: {slot: make(values) for slot, make in makers.items()}

    def _match_slot(
        self, branch: Branch, parameter: torch.Tensor, live: Any, *, on_device: bool
    ) -> Make:
        node = self._match.stored.node(branch.path)
        is_tensor = node is None or kind_of_node(node) == "tensor"
        if is_tensor and branch.name is not None and self._match.is_alike(branch.name, live):
            # Fill it in place: slots may take half of a GPU's memory, so a copy might not fit.
            self._match.fill(branch.name, live)
            return lambda _: live
        return self._make(branch, parameter, on_device=on_device)

    def _make(self, branch: Branch, parameter: torch.Tensor, *, on_device: bool = False) -> Make:
        """Return the maker of a new slot. A slot of its parameter's shape is placed like the
        parameter, unless it was saved as whole. Other slots are whole on every rank, on the
        parameter's device. But a single number is on the parameter's device only with
        `on_device`, else on the kind of device that it was saved on."""
        match = self._match

        def like(entry: TensorEntry, name: str | None) -> torch.Tensor | torch.device | None:
            if name:
                return match.like_parameter(entry, name)
            node = match.stored.node(entry.path)
            whole = isinstance(node, dict) and "place" in node.get("tensor", {})
            if entry.shape == tuple(parameter.shape) and not whole:
                return parameter
            return parameter.device if entry.shape or on_device else None

        return match.request(branch, match.stored.node(branch.path), like)

    def _match_groups(
        self, optimizer: Optimizer, number: int, names: list[str], stored: StoredOptimizer
    ) -> Callable[[Values], list[dict[str, Any]]]:
        """Return the maker of the optimizer's parameter groups. Stored options replace those of
        this run. Options that are not stored stay."""
        planned: list[tuple[dict[str, Any], list[int], Make | None]] = []
        remaining = iter(range(len(names)))
        for index, group in enumerate(optimizer.param_groups):
            numbers = [next(remaining) for _ in group["params"]]
            own = {option: value for option, value in group.items() if option != "params"}
            if numbers:
                make: Make | None = self._match_options([names[n] for n in numbers], stored)
            else:
                make = self._match.request_at((*self._path, f"{EMPTY}.{number}", str(index)))
            planned.append((own, numbers, make))
        nested = [self._match.request(branch, None) for branch in stored.groups]

        def make_groups(values: Values) -> list[dict[str, Any]]:
            stored_groups = [make(values) for make in nested]
            by_name = {str(n): group for group in stored_groups for n in group.get("params", ())}
            groups = []
            for own, numbers, make in planned:
                group = {**own, **(make(values) if make is not None else {})}
                for n in numbers[:1]:
                    options = by_name.get(names[n], by_name.get(str(n), {}))
                    group |= {k: v for k, v in options.items() if k not in _OF_GROUP}
                groups.append({**group, "params": numbers})
            return groups

        return make_groups

    def _stored_options(self, names: list[str], stored: StoredOptimizer) -> set[str]:
        """Return the names of the options that are stored for an optimizer's groups."""
        options = {str(option) for group in stored.groups for option in group.children}
        options.update(*(stored.options[name] for name in names if name in stored.options))
        return options - _OF_GROUP

    def _note_empty(self, optimizer: Optimizer, number: int) -> None:
        """Note for the log each group that was saved without parameters, and has some here or does
        not exist here. The saved options of such a group are not used."""
        path = (*self._path, f"{EMPTY}.{number}")
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

    def _match_options(self, names: list[str], stored: StoredOptimizer) -> Make:
        """Return the maker of a group's options. The stored options of all its parameters must be
        equal."""
        makers: dict[str, Make] = {}
        firsts: dict[str, Branch] = {}
        values = self._match.stored.manifest.values
        for name in names:
            for option, branch in stored.options.get(name, {}).items():
                if option in _OF_GROUP:
                    self._match.taken.update(branch.entries())
                    continue
                first = firsts.setdefault(option, branch)
                value, first_value = values.get(branch.name or ""), values.get(first.name or "")
                if first is branch:
                    makers[option] = self._make_value(branch)
                elif (
                    value
                    and first_value
                    and (value.file, value.item) == (first_value.file, first_value.item)
                ):
                    # The checkpoint stores an option once for all parameters of a group.
                    self._match.taken.update(branch.entries())
                else:
                    self._compare(option, first, branch, names[0], name)
        return lambda values: {option: make(values) for option, make in makers.items()}

    def _compare(self, option: str, one: Branch, other: Branch, first: str, name: str) -> None:
        """Plan a check that refuses an option if its stored values differ between two parameters of
        one group. `one`, `other`: entries of the option for the parameters `first` and `name`."""
        makers = self._make_value(one), self._make_value(other)

        def check(values: Values) -> str | None:
            saved = [make(values) for make in makers]
            if same(*saved):
                return None
            return (
                f"`{self._name}`: `{first}` and `{name}` are in one group here, but were saved "
                f"with `{option}` {saved[0]!r} and {saved[1]!r}"
            )

        self._match.check([*one.entries(), *other.entries()], check)

    def _make_value(self, branch: Branch) -> Make:
        return self._match.request(branch, self._match.stored.node(branch.path))

    def _match_others(self, number: int) -> Callable[[Values, dict[str, Any]], None]:
        """Return a function that adds the rest of the optimizer's state, which belongs to no
        parameter and no group, to the loaded state dict. `number`: number of the optimizer."""
        makers: list[tuple[str, Make]] = []
        for key in (OTHERS, MORE):
            path = (*self._path, f"{key}.{number}")
            make = self._match.request_at(path, self._match.like_parameter)
            if make is not None:
                makers.append((key, make))

        def add(values: Values, loaded: dict[str, Any]) -> None:
            for key, make in makers:
                (loaded[STATE] if key == OTHERS else loaded).update(make(values))

        return add

    @contextmanager
    def _exactly(self, optimizer: Optimizer, names: list[str]) -> Iterator[None]:
        """Context in which the optimizer's `load_state_dict` does not convert values, if it is
        torch's own. Torch's method casts every slot to its parameter's dtype, even counters and
        8-bit moments, and changes texts.

        The exact values are put back between torch's cast and the optimizer's `__setstate__`, so
        that changes by `__setstate__` and by hooks are kept.
        """
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            yield
            return
        given: dict[str, Any] = {}
        set_state = optimizer.__setstate__
        name_of = dict(zip(map(id, parameters_of(optimizer)), names, strict=True))

        def set_exact_state(cast: dict[str, Any]) -> None:
            parameters = [p for group in cast[GROUPS] for p in group["params"]]
            numbers = [number for group in given[GROUPS] for number in group["params"]]
            for number, parameter in zip(numbers, parameters, strict=True):
                if number in given[STATE] and not self._was_cast(name_of[id(parameter)], parameter):
                    cast[STATE][parameter] = _exact(given[STATE][number], cast[STATE][parameter])
            set_state(cast)

        def keep(_: Optimizer, state: dict[str, Any]) -> None:
            given.update(state)

        hooks = optimizer._optimizer_load_state_dict_pre_hooks
        try:
            # Register it last, so that it sees the changes by all other hooks.
            optimizer.register_load_state_dict_pre_hook(keep)
            optimizer.__dict__["__setstate__"] = set_exact_state
            yield
        finally:
            # By the hook itself: an interrupt may come before its handle is known.
            for key in [key for key, hook in hooks.items() if hook is keep]:
                del hooks[key]
            optimizer.__dict__.pop("__setstate__", None)

    def _was_cast(self, name: str, parameter: torch.Tensor) -> bool:
        """Return whether the parameter has another dtype than in the checkpoint. If so, its slots
        are cast to the parameter's dtype too."""
        stored = self._match.stored.manifest.tensors
        # By memory, since several models may have parameters of this name.
        entry_name = self._filled.get(address_of(parameter))
        names = [entry_name] if entry_name is not None else [name, f"model.{name}"]
        entry = next((stored[n] for n in names if n in stored), None)
        return entry is not None and f"torch.{entry.dtype}" != str(parameter.dtype)

    @cached_property
    def _filled(self) -> dict[int, str]:
        """Name of the entry that each tensor of the state is filled from, by address."""
        filled = {address_of(tensor): name for name, tensor in self._match.into.items()}
        filled.pop(0, None)
        return filled


def _exact(given: Any, cast: Any) -> Any:
    """Return the loaded value `given` with its own dtypes. `cast`: the same value after torch's
    cast. Tensors whose dtype and shape the cast has kept are taken from `cast`."""
    if isinstance(given, torch.Tensor) and isinstance(cast, torch.Tensor):
        if (given.dtype, given.shape) == (cast.dtype, cast.shape):
            return cast
        return given.to(cast.device)
    if isinstance(cast, torch.Tensor):
        return cast
    if type(given) is dict:
        kept = cast if isinstance(cast, dict) else {}
        return {key: _exact(value, kept.get(key)) for key, value in given.items()}
    if type(given) in (list, tuple):
        same_length = isinstance(cast, (list, tuple)) and len(cast) == len(given)
        others = cast if same_length else [None] * len(given)
        return type(given)(_exact(*pair) for pair in zip(given, others, strict=True))
    return given


def _is_stepped_here(optimizer: Any, parameter: torch.Tensor) -> bool:
    """Return whether this rank keeps the parameter's state. `ZeroRedundancyOptimizer` divides the
    parameters among the ranks."""
    owners = getattr(optimizer, "_param_to_rank", None)
    return owners is None or owners[parameter] == optimizer.rank
