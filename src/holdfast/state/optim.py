"""Optimizers as components whose state is stored by parameter name, so that any number of ranks
can load it, with parameters in any order.

Names are those of torch's flattened optimizer state dict, as in TorchTitan:
`state.<parameter>.<slot>` and `param_groups.<parameter>.<option>`. This module calls the
optimizer's own `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from holdfast.errors import UsageError
from holdfast.format.structure import OPTIMIZERS, Node
from holdfast.state.match import Match
from holdfast.state.model import named_parameters, outline_of
from holdfast.state.optim_class import ClassCheck
from holdfast.state.stateful import ObjectState
from holdfast.state.tree import (
    SCALARS,
    Flattener,
    Leaf,
    Path,
    Stateful,
    dotted,
    holds_state,
    made_plain,
    type_name,
)

STATE, GROUPS = "state", "param_groups"
"""Keys of an optimizer's state dict."""

OTHERS, EMPTY, MORE, OWN = "others", "empty_groups", "more", "own"
"""Keys, each followed by a dot and the optimizer's number, of: state that belongs to no parameter;
options of groups without parameters, by group number; further entries of the state dict; the whole
state of an optimizer with its own `state_dict`."""


class OptimizerState:
    """One or several optimizers as one component of the state.

    The modules `parts` name the parameters. A parameter of no module is named by its number. The
    state of an optimizer with its own `state_dict` is stored unchanged.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        optimizers: Sequence[Stateful],
        *,
        paths: Sequence[str] = (),
    ) -> None:
        """`paths`: path of each module in the state; empty if `parts` are parts of one model."""
        self.named: list[Optimizer] = [opt for opt in optimizers if is_by_parameter(opt)]
        self._own = [opt for opt in optimizers if not is_by_parameter(opt)]
        self._single = len(self._own) == len(optimizers) == 1
        self._parts, self._paths = parts, paths
        self._names: dict[int, str] = {}
        self._named_for: tuple[list[int], list[object]] | None = None
        self._known: dict[tuple[Path, int, int, str], tuple[list[str], dict[str, Path]]] = {}
        self._find_names()

    def _find_names(self) -> None:
        """Compute the names of the parameters, if parameters or modules have changed.

        Names are kept by `id`, which stays unique: the optimizers keep their parameters alive.
        """
        ids = [id(p) for optimizer in self.named for p in parameters_of(optimizer)]
        named_for = ids, outline_of(self._parts)
        if named_for == self._named_for:
            return
        self._names = self._names_of(ids)
        used: set[str] = set()
        for parameter_id in ids:
            name = self._names[parameter_id]
            if name in used:
                raise UsageError(
                    f"`{name}` is in two optimizers, or two parameters have this name",
                    hint="give each parameter to one optimizer, and pass every part of the model",
                )
            used.add(name)
        self._named_for = named_for

    def _names_of(self, ids: Sequence[int]) -> dict[int, str]:
        """Return the name of each parameter, by `id`.

        A parameter that belongs to no module is named by its number. If different parameters have
        the same name, each of these names begins with the path of its module.
        """
        names: dict[int, str] = {}
        qualified: dict[int, str] = {}
        for number, part in enumerate(self._parts):
            path = self._paths[number] if self._paths else ""
            for name, parameter in named_parameters([part]):
                names.setdefault(id(parameter), name)
                if path:
                    qualified.setdefault(id(parameter), f"{path}.{name}")
        counts = Counter(names[key] for key in dict.fromkeys(ids) if key in names)
        for key in ids:
            if key in qualified and counts[names[key]] > 1:
                names[key] = qualified[key]
        taken = {*names.values()}
        for number, key in enumerate(ids):
            if key not in names:
                # A module may use this number as the name of a parameter.
                names[key] = f"number.{number}" if str(number) in taken else str(number)
        return names

    @property
    def optimizers(self) -> Iterator[Optimizer]:
        """All optimizers whose class is derived from torch's `Optimizer`."""
        return (opt for opt in (*self.named, *self._own) if isinstance(opt, Optimizer))

    def name_of(self, parameter: torch.Tensor) -> str:
        """Return the name of a parameter, or its number if no module contains it."""
        return self._names[id(parameter)]

    def stepped(self, path: Path, leaves: Mapping[str, Leaf]) -> Iterator[str]:
        """Yield the names of those tensors in `leaves` that change only when these optimizers step.
        `path`: path of this component.

        Leave out parameters that a forward may change: those that require no gradients, such as
        codebooks that follow a moving average, and weights of modules with `max_norm`. Leave out
        inference tensors, since torch does not count their changes.
        """
        if not self.named:
            return
        normalized = {id(weight) for weight in _normalized_weights(self._parts)}
        all_parameters = (p for optimizer in self.named for p in parameters_of(optimizer))
        parameters = {id(p) for p in all_parameters if p.requires_grad} - normalized
        slots = f"{dotted(path)}.{STATE}."
        for name, leaf in leaves.items():
            value = leaf.value
            is_stepped = id(value) in parameters or name.startswith(slots)
            if is_stepped and isinstance(value, torch.Tensor) and not value.is_inference():
                yield name

    def flatten(self, flattener: Flattener, path: Path) -> Node:
        """Add the slots of every parameter, the options of every group, and other entries."""
        self._find_names()
        is_sharded = bool(self._own) or any(map(is_zero, self.named))
        flattener.state.unions[path] = "sharded" if is_sharded else "optimizer"
        for number, optimizer in enumerate(self.named):
            state = state_of(optimizer)
            others = self._flatten_slots(flattener, path, optimizer, state[STATE])
            self._flatten_groups(flattener, path, number, optimizer, state[GROUPS])
            more = {key: value for key, value in state.items() if key not in (STATE, GROUPS)}
            for key, rest in ((OTHERS, others), (MORE, more)):
                if rest:
                    flattener.put((*path, f"{key}.{number}"), rest, rebuilt=True)
        node: Node = None
        for own_path, own in self._own_paths(path):
            node = ObjectState(own).flatten(flattener, own_path)
            if not self._single:
                flattener.state.structure[own_path] = {"object": node}
        node = node if self._single else None
        classes = [type_name(optimizer) for optimizer in (*self.named, *self._own)]
        flattener.state.structure[path] = {"object": node, OPTIMIZERS: classes}
        return node

    def match(self, match: Match, path: Path) -> None:
        """Plan the load of every optimizer, by the names of its parameters."""
        from holdfast.state.optim_match import OptimizerMatch

        self._find_names()
        if self.named:
            OptimizerMatch(self, match, path).run()
        for own_path, own in self._own_paths(path):
            ClassCheck(match, path).note(own)
            ObjectState(own).match(match, own_path)

    def _own_paths(self, path: Path) -> Iterator[tuple[Path, Stateful]]:
        for number, own in enumerate(self._own):
            yield (path if self._single else (*path, f"{OWN}.{number}")), own

    def _flatten_slots(
        self, flattener: Flattener, path: Path, optimizer: Optimizer, state: Mapping[Any, Any]
    ) -> dict[Any, Any]:
        """Add the state of every parameter. Returns the state that belongs to no parameter."""
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
                entry = f"{name}.{slot}"
                if is_placed_like(value, parameter):
                    flattener.add((*path, entry), value, above + entry)
                elif type(value) is torch.Tensor and value.shape == parameter.shape:
                    # Mark it as whole: a load would otherwise shard it like the parameter, since
                    # both have the same shape.
                    flattener.add((*path, entry), value, above + entry)
                    flattener.state.structure[*path, entry] = {"tensor": {"place": "whole"}}
                else:
                    flattener.put((*path, entry), value, rebuilt=True)
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
            names = [self.name_of(parameter) for parameter in own["params"]]
            options = {option: value for option, value in group.items() if option != "params"}
            if not names:
                empty[index] = options
            for option, value in options.items() if names else ():
                if type(option) is not str:
                    raise UsageError(
                        f"a parameter group has the option {option!r}, a {type_name(option)}",
                        hint="use text for the names of options",
                    )
                self._flatten_option(flattener, path, (number, index), option, value, names)
        if empty:
            flattener.put((*path, f"{EMPTY}.{number}"), empty, rebuilt=True)

    def _flatten_option(
        self,
        flattener: Flattener,
        path: Path,
        group: tuple[int, int],
        option: str,
        value: Any,
        names: list[str],
    ) -> None:
        """Add an option of a group as one leaf with a name for each parameter. One leaf for each of
        thousands of parameters would take too long, while training waits."""
        named_paths = self._named_paths(path, group, option, names)
        is_leaf = type(value) in (tuple, list) and not holds_state(value)
        if not is_leaf and type(value) not in SCALARS:
            for name in names:
                flattener.put((*path, f"{GROUPS}.{name}.{option}"), value, rebuilt=True)
            return
        plain, types = made_plain(next(iter(named_paths.values())), value)
        flattener.add(next(iter(named_paths.values())), plain, names=named_paths)
        if types:
            structure = flattener.state.structure
            structure.update((named, {"types": types}) for named in named_paths.values())

    def _named_paths(
        self, path: Path, group: tuple[int, int], option: str, names: list[str]
    ) -> dict[str, Path]:
        """Return the path of an option for each parameter in `names`, keyed by name of the entry.
        The result is cached from save to save."""
        key = (path, *group, option)
        known = self._known.get(key)
        if known is None or known[0] != names:
            paths = [(*path, f"{GROUPS}.{name}.{option}") for name in names]
            known = names, {dotted(named): named for named in paths}
            self._known[key] = known
        return known[1]


def is_by_parameter(optimizer: object) -> TypeGuard[Optimizer]:
    """Return whether an optimizer's state has torch's form, keyed by parameter number."""
    if not isinstance(optimizer, Optimizer):
        return False
    cls = type(optimizer)
    return cls.state_dict is Optimizer.state_dict or is_zero(optimizer)


def is_zero(optimizer: object) -> bool:
    """Return whether an optimizer is torch's `ZeroRedundancyOptimizer`.

    The `state_dict` of that class works on one rank only, to which all others have sent their state
    before. Holdfast lets each rank save its own state instead.
    """
    return any(
        cls.__name__ == "ZeroRedundancyOptimizer" and cls.__module__.startswith("torch.")
        for cls in type(optimizer).__mro__
    )


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's `state_dict`, checked to have torch's form."""
    state: Any = _zero_state(optimizer) if is_zero(optimizer) else optimizer.state_dict()
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
            hint="remove hooks that change it, or override `state_dict` and `load_state_dict` in "
            "a subclass, whose state is stored unchanged",
        )
    return dict(state)


def _zero_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of those parameters that this rank's `ZeroRedundancyOptimizer` updates, and
    all groups, in torch's form."""
    numbers = {id(p): number for number, p in enumerate(parameters_of(optimizer))}
    state = {numbers[id(p)]: slots for p, slots in optimizer.optim.state.items()}
    return {STATE: state, GROUPS: Optimizer.state_dict(optimizer)[GROUPS]}


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return all parameters in the order of their numbers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _normalized_weights(parts: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the weights whose rows a forward scales down to `max_norm`, such as those of
    `nn.Embedding` and `nn.EmbeddingBag`."""
    for module in (module for part in parts for module in part.modules()):
        if getattr(module, "max_norm", None) is not None:
            # Not `module.weight`: a parametrized module would compute it.
            weight = module._parameters.get("weight")
            if weight is not None:
                yield weight


def is_placed_like(value: Any, parameter: torch.Tensor) -> bool:
    """Return whether a load can derive the placement of a slot, `value`, from the slot's shape and
    the parameter."""
    if type(value) is torch.Tensor:
        # A slot of a different shape than its parameter is whole on each rank.
        return not isinstance(parameter, DTensor) or value.shape != parameter.shape
    return (
        type(value) is DTensor
        and isinstance(parameter, DTensor)
        and value.shape == parameter.shape
        and value.placements == parameter.placements
        and value.device_mesh == parameter.device_mesh
    )
