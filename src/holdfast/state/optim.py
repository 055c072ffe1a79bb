"""Optimizers by parameter name, so that their state fits whatever the order and number of ranks.

Names are those of torch's flattened optimizer state dict (`state.<parameter>.<slot>` and
`param_groups.<parameter>.<option>`), which is what TorchTitan writes. What `state_dict()` of an
optimizer says is what is saved; its own `load_state_dict` gets it back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from holdfast.errors import UsageError
from holdfast.format.structure import Node
from holdfast.state.match import Match
from holdfast.state.model import named_parameters, outline_of
from holdfast.state.optim_class import ClassCheck
from holdfast.state.stateful import ObjectState
from holdfast.state.tree import (
    Flattener,
    Path,
    Stateful,
    holds_state,
    made_plain,
    type_name,
)

STATE, GROUPS = "state", "param_groups"
"""Keys of an optimizer's state dict."""

OTHERS, EMPTY, MORE, OWN = "others", "empty_groups", "more", "own"
"""Keys, with the number of the optimizer behind a dot: state that belongs to no parameter; the
options of groups without parameters, by the number of the group; what a state dict holds beside
state and groups; and an optimizer that is kept as its own `state_dict` gives it."""


class OptimizerState:
    """One or several optimizers as one component of the state.

    `parts` name the parameters; a parameter that none of them holds is named by its number. An
    optimizer with a `state_dict` of its own is kept as that gives it.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        optimizers: Sequence[Stateful],
        *,
        places: Sequence[str] = (),
    ) -> None:
        """`places`: where each part lies in the state; none where they are parts of one model."""
        self._named: list[Optimizer] = [one for one in optimizers if is_by_parameter(one)]
        self._own = [one for one in optimizers if not is_by_parameter(one)]
        self._single = len(self._own) == len(optimizers) == 1
        self._parts, self._places = parts, places
        self._names: dict[int, str] = {}
        self._named_for: tuple[list[int], list[object]] | None = None
        self._known: dict[tuple[Path, int, str], tuple[list[str], dict[str, Path]]] = {}
        self._find_names()

    def _find_names(self) -> None:
        """Find out what the parameters of the optimizers are called, where these or the places of
        parameters in the modules have changed.

        Names are known by `id`: an optimizer holds on to its parameters, so no other object comes
        to have the `id` of one of them.
        """
        held = [id(one) for optimizer in self._named for one in parameters_of(optimizer)]
        named_for = held, outline_of(self._parts)
        if named_for == self._named_for:
            return
        self._names = self._names_of(held)
        used: set[str] = set()
        for one in held:
            name = self._names[one]
            if name in used:
                raise UsageError(
                    f"`{name}` is in two optimizers, or two parameters have this name",
                    hint="give each parameter to one optimizer, and every model part to the call",
                )
            used.add(name)
        self._named_for = named_for

    def _names_of(self, held: Sequence[int]) -> dict[int, str]:
        """Names of parameters by their `id`. One that no part holds has its number; of several
        parts with one name for different parameters, each gets that of its place before it."""
        names: dict[int, str] = {}
        qualified: dict[int, str] = {}
        for number, part in enumerate(self._parts):
            place = self._places[number] if self._places else ""
            for name, parameter in named_parameters([part]):
                names.setdefault(id(parameter), name)
                if place:
                    qualified.setdefault(id(parameter), f"{place}.{name}")
        counts = Counter(names[one] for one in dict.fromkeys(held) if one in names)
        for one in held:
            if one in qualified and counts[names[one]] > 1:
                names[one] = qualified[one]
        taken = {*names.values()}
        for number, one in enumerate(held):
            if one not in names:
                name = str(number)
                # A parameter of a model may have a number for its name.
                names[one] = name if name not in taken else f"number.{name}"
        return names

    @property
    def named(self) -> Sequence[Optimizer]:
        """Optimizers whose state is kept by the names of their parameters."""
        return self._named

    @property
    def optimizers(self) -> Iterator[Optimizer]:
        """All that are torch's, in whatever form their state is kept."""
        return (one for one in (*self._named, *self._own) if isinstance(one, Optimizer))

    @property
    def is_sharded(self) -> bool:
        """Whether a rank may hold the slots of a part of its parameters alone."""
        return bool(self._own) or any(map(is_zero, self._named))

    @property
    def class_names(self) -> list[str]:
        """Classes of all optimizers, by module and name."""
        return [type_name(one) for one in (*self._named, *self._own)]

    def name_of(self, parameter: torch.Tensor) -> str:
        """The name of a parameter; its number, if no part of the model holds it."""
        return self._names[id(parameter)]

    def stepped(self, above: str) -> tuple[set[int], str]:
        """What changes in a step of the optimizers that are kept by parameter, and at no other
        time: parameters, by their `id`, and entries whose names begin so. `above` is the name of
        this component."""
        parameters = {id(one) for optimizer in self._named for one in parameters_of(optimizer)}
        return parameters, f"{above}.{STATE}." if self._named else ""

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the slots of every parameter, the options of every group, and what else the
        optimizers say."""
        self._find_names()
        for number, optimizer in enumerate(self._named):
            state = state_of(optimizer)
            others = self._flatten_slots(flattener, path, optimizer, state[STATE])
            self._flatten_groups(flattener, path, number, optimizer, state[GROUPS])
            more = {key: value for key, value in state.items() if key not in (STATE, GROUPS)}
            for key, held in ((OTHERS, others), (MORE, more)):
                if held:
                    flattener.put((*path, f"{key}.{number}"), held, rebuilt=True)
        for at, own in self._own_paths(path):
            node = ObjectState(own).flatten(flattener, at)
            if self._single:
                return node
            flattener.state.structure[at] = {"object": node}
        return None

    def match(self, match: Match, path: Path) -> None:
        """Give every optimizer its state, by the names of its parameters."""
        from holdfast.state.optim_match import OptimizerMatch

        self._find_names()
        if self._named:
            OptimizerMatch(self, match, path).run()
        for at, own in self._own_paths(path):
            ClassCheck(match, path).note(own)
            ObjectState(own).match(match, at)

    def _own_paths(self, path: Path) -> Iterator[tuple[Path, Stateful]]:
        for number, own in enumerate(self._own):
            yield (path if self._single else (*path, f"{OWN}.{number}")), own

    def _flatten_slots(
        self, flattener: Flattener, path: Path, optimizer: Optimizer, state: Mapping[Any, Any]
    ) -> dict[Any, Any]:
        """Add the state of every parameter. Returns what belongs to none."""
        above = "".join(f"{key}." for key in path)
        parameters = parameters_of(optimizer)
        others: dict[Any, Any] = {}
        for key, slots in state.items():
            if type(key) is not int or not 0 <= key < len(parameters):
                others[key] = slots
                continue
            parameter = parameters[key]
            name = f"{STATE}.{self.name_of(parameter)}"
            if type(slots) is not dict or not slots or {*map(type, slots)} != {str}:
                flattener.put((*path, name), slots, rebuilt=True)
                continue
            for slot, value in slots.items():
                at = f"{name}.{slot}"
                if lies_like(value, parameter):
                    flattener.add((*path, at), value, above + at)
                elif type(value) is torch.Tensor and value.shape == parameter.shape:
                    # Of its parameter's shape, but whole on every rank.
                    flattener.add((*path, at), value, above + at)
                    flattener.state.structure[*path, at] = {"tensor": {"place": "whole"}}
                else:
                    flattener.put((*path, at), value, rebuilt=True)
        return others

    def _flatten_groups(
        self,
        flattener: Flattener,
        path: Path,
        number: int,
        optimizer: Optimizer,
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        empty = {}
        for index, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
            held = [self.name_of(parameter) for parameter in own["params"]]
            options = {option: value for option, value in group.items() if option != "params"}
            if not held:
                empty[index] = options
            for option, value in options.items() if held else ():
                if type(option) is not str:
                    raise UsageError(
                        f"a group of the optimizer has the option {option!r}, whose name is no text"
                    )
                self._flatten_option(flattener, path, (number, index), option, value, held)
        if empty:
            flattener.put((*path, f"{EMPTY}.{number}"), empty, rebuilt=True)

    def _flatten_option(
        self,
        flattener: Flattener,
        path: Path,
        group: tuple[int, int],
        option: str,
        value: Any,
        held: list[str],
    ) -> None:
        """Add an option of a group: one leaf with the names that it has for all its parameters,
        since there are thousands of these names, and training waits."""
        names = self._spelled(path, group, option, held)
        if not _is_one_leaf(value):
            for name in held:
                flattener.put((*path, f"{GROUPS}.{name}.{option}"), value, rebuilt=True)
            return
        at = next(iter(names.values()))
        plain, types = made_plain(at, value)
        flattener.add_named(names, plain)
        if types:
            structure = flattener.state.structure
            structure.update((one, {"types": types}) for one in names.values())

    def _spelled(
        self, path: Path, group: tuple[int, int], option: str, held: list[str]
    ) -> dict[str, Path]:
        """Names and paths of an option of a group: kept, for every save asks for them."""
        key = (path, group[0] * 10_000 + group[1], option)
        known = self._known.get(key)
        if known is None or known[0] != held:
            paths = [(*path, f"{GROUPS}.{name}.{option}") for name in held]
            known = held, {".".join(map(str, at)): at for at in paths}
            self._known[key] = known
        return known[1]


@dataclass(frozen=True, slots=True)
class _Sharded:
    """What a `ZeroRedundancyOptimizer` has of its own on this rank."""

    optimizer: Any

    def state_dict(self) -> dict[str, Any]:
        """State of the parameters that this rank steps, and the options of all groups."""
        optimizer = self.optimizer
        groups = Optimizer.state_dict(optimizer)[GROUPS]
        numbers = {id(p): number for number, p in enumerate(parameters_of(optimizer))}
        state = {numbers[id(p)]: slots for p, slots in optimizer.optim.state.items()}
        return {STATE: state, GROUPS: groups}


def is_by_parameter(optimizer: object) -> TypeGuard[Optimizer]:
    """Whether an optimizer says its state in torch's form, by the numbers of its parameters."""
    if not isinstance(optimizer, Optimizer):
        return False
    cls = type(optimizer)
    return cls.state_dict is Optimizer.state_dict or is_zero(optimizer)


def is_zero(optimizer: object) -> bool:
    """Whether it is torch's `ZeroRedundancyOptimizer`, which gives its whole state only once that
    has been sent to one rank; each rank's own is enough here."""
    return any(
        cls.__name__ == "ZeroRedundancyOptimizer" and cls.__module__.startswith("torch.")
        for cls in type(optimizer).__mro__
    )


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer says of itself.

    Raises:
        UsageError: a hook of its own has given that another form.
    """
    state: Any = (_Sharded(optimizer) if is_zero(optimizer) else optimizer).state_dict()
    numbers = iter(range(len(parameters_of(optimizer))))
    try:
        fits = isinstance(state[STATE], Mapping) and [g["params"] for g in state[GROUPS]] == [
            [next(numbers) for _ in group["params"]] for group in optimizer.param_groups
        ]
    except (LookupError, TypeError, StopIteration):
        fits = False
    if not fits:
        raise UsageError(
            f"`state_dict()` of {type(optimizer).__qualname__} is not in torch's form: `state` and "
            "`param_groups`, parameters by their numbers",
            hint="does a hook change it? Remove the hook, or override `state_dict` and "
            "`load_state_dict` in a class of your own: what these say is kept as it is",
        )
    return dict(state)


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """All parameters, in the order of their numbers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def lies_like(value: Any, parameter: torch.Tensor) -> bool:
    """Whether a load finds out by itself where a slot belongs."""
    if type(value) is torch.Tensor:
        # Of another shape than its parameter: whole on each rank.
        return not isinstance(parameter, DTensor) or value.shape != parameter.shape
    return (
        type(value) is DTensor
        and isinstance(parameter, DTensor)
        and value.shape == parameter.shape
        and value.placements == parameter.placements
        and value.device_mesh == parameter.device_mesh
    )


_LEAVES = (int, float, complex, bool, str, bytes, type(None))


def _is_one_leaf(value: Any) -> bool:
    """Whether a value is one entry whatever is in it."""
    if type(value) in _LEAVES:
        return True
    return type(value) in (tuple, list) and not holds_state(value)
