"""The training state as one tree: dicts and lists with modules, optimizers and other objects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from holdfast.errors import MismatchError, UsageError
from holdfast.format.manifest import Manifest
from holdfast.state.match import Match
from holdfast.state.model import ModelState, named_parameters, outline_of, refuse_fsdp1
from holdfast.state.optim import OptimizerState
from holdfast.state.plain import PlainMatch, Put, setter
from holdfast.state.schedulers import SchedulerState
from holdfast.state.stateful import ObjectState, RankState
from holdfast.state.stored import StoredState
from holdfast.state.tree import (
    Component,
    FlatState,
    Flattener,
    Path,
    check_depth,
    dotted,
    is_object,
    named_twice,
    names_of,
    type_name,
)


class StateTree:
    """A nested state, with the state of all objects in it.

    `state` is one module, or maps names to tensors, plain values, dicts, lists and objects with a
    `state_dict`. The names of entries below `state[flat]` do not begin with `flat`: TorchTitan
    names a model's entries in this way. A top-level name belongs to the model, unless it is another
    key of `state` or one of `others`. `watch` is called with every optimizer in the tree, at any
    depth, before `flatten` returns.
    """

    def __init__(
        self,
        state: Any,
        *,
        flat: str | None = None,
        others: Collection[str] = (),
        watch: Callable[[Optimizer], None] | None = None,
    ) -> None:
        if isinstance(state, nn.Module):
            state, flat = {"": state}, ""
        if not isinstance(state, Mapping):
            raise UsageError(
                "`state` must be a dict of tensors, values and objects by name, or a module, "
                f"found: a {type_name(state)}",
                hint='{"model": model, "optimizer": optimizer, "step": 7}, for instance',
            )
        self._keys = names_of((), state)
        self._state, self._flat, self._others, self._watch = state, flat, others, watch
        modules = list(_modules(state, ()))
        self._modules = [module for _, module in modules]
        self._module_paths = [dotted(path) for path, _ in modules]
        for module in self._modules:
            refuse_fsdp1(module)
        self._components: dict[Path, tuple[Any, Component]] = {}
        self._placed: dict[Any, list[str]] | None = None
        self._placed_for: list[object] = []

    def flatten(self) -> FlatState:
        """Return every tensor and value by name. Tensors share memory with the state."""
        if self._placed is not None and self._placed_for != outline_of(self._modules):
            self._placed = None
        flattener = Flattener(self.component_of, self._placed_like)
        for name, key in self._keys.items():
            if key != self._flat:
                flattener.put((name,), self._state[key])
        if self._flat_component is not None:
            self._flat_component.flatten(flattener, ())
        state = flattener.state
        _check_names(state)
        return replace(state, stepped=lambda: frozenset(self._stepped(state)))

    def _stepped(self, state: FlatState) -> Iterator[str]:
        for path, (_, component) in self._components.items():
            if isinstance(component, OptimizerState):
                yield from component.stepped(path, state.leaves)

    def match(self, manifest: Manifest, *, strict: bool = True) -> Match:
        """Decide which tensor, object or value of this state each entry of a checkpoint is loaded
        into. With `strict`, the result lists unused entries below this state's top-level names as
        `extra`."""
        stored = StoredState(manifest)
        components = frozenset({*self._others, *self._keys} - {self._flat})
        match = Match(stored, parameter=self._parameter, others=components)
        plain = PlainMatch(match, self.component_of)
        if self._flat_component is not None:
            self._flat_component.match(match, ())
        for name, key in self._keys.items():
            if key != self._flat:
                # With `flat`, `state` is that of a run, which would not notice a value that a load
                # puts into it. So a load refuses such a value.
                put = _refusal(key, self._state[key]) if self._flat else setter(self._state, key)
                plain.member(self._state[key], (name,), put)
        if strict:
            self._note_extra(match)
        else:
            match.extra.clear()
        return match

    @property
    def _flat_component(self) -> Component | None:
        has_flat = self._flat is not None and self._flat in self._state
        return self.component_of((), self._state[self._flat]) if has_flat else None

    def component_of(self, path: Path, value: Any) -> Component | None:
        """Return the `Component` that saves and loads the object `value`; None if `value` is a
        plain dict, list, tensor or value."""
        # Compare the owner too: an object's whole state may be another object, at the same path.
        owner, component = self._components.get(path, (None, None))
        if component is not None and owner is value:
            return component
        component = self._made_component(value)
        if self._watch is not None and isinstance(component, OptimizerState):
            for optimizer in component.optimizers:
                self._watch(optimizer)
        if component is not None and len(path) <= 1 and owner is None:
            # Do not keep the components of deeper objects: a load may replace these objects.
            self._components[path] = value, component
        return component

    def _made_component(self, value: Any) -> Component | None:
        if isinstance(value, nn.Module):
            return ModelState([value])
        if isinstance(value, Optimizer):
            return OptimizerState(self._modules, [value], paths=self._module_paths)
        if _is_component(value):
            return value
        return ObjectState(value) if is_object(value) else None

    def _note_extra(self, match: Match) -> None:
        """Add unused entries below the top-level names of this state to `match.extra`."""
        flat = self._flat_component is not None
        for top, branch in match.stored.root.children.items():
            given = top in self._keys and top != self._flat
            if given or (flat and top not in match.others):
                match.extra.update((n, None) for n in branch.entries() if n not in match.taken)

    def _parameter(self, name: str) -> torch.Tensor | None:
        return next((p for key, p in named_parameters(self._modules) if key == name), None)

    def _placed_like(self, path: Path, tensor: DTensor) -> str | None:
        """Return the name of a parameter with the same placement as a tensor, if possible one
        whose name is part of the path."""
        if self._placed is None:
            self._placed, self._placed_for = {}, outline_of(self._modules)
            for name, parameter in named_parameters(self._modules):
                if isinstance(parameter, DTensor):
                    self._placed.setdefault(_placement(parameter), []).append(name)
        names = self._placed.get(_placement(tensor), [])
        return next((name for name in names if name in dotted(path)), names[0] if names else None)


def _refusal(key: Any, live: Any) -> Put:
    def refuse(value: Any) -> None:
        found, here = type_name(value), type_name(live)
        raise MismatchError(f"`{key}` is a {found} in the checkpoint, a {here} here")

    return refuse


def _placement(tensor: DTensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.placements, tensor.device_mesh


def _is_component(value: Any) -> TypeGuard[Component]:
    kinds = ModelState | OptimizerState | SchedulerState | ObjectState | RankState
    return isinstance(value, kinds)


def _modules(state: Any, path: Path) -> Iterator[tuple[Path, nn.Module]]:
    """Yield the modules in dicts, lists and tuples, at any depth, with their paths."""
    check_depth(path)
    if not isinstance(state, Mapping) and {int, float, str}.issuperset(map(type, state)):
        return
    # A copy, since another thread may change the dict.
    members = list(state.items()) if isinstance(state, Mapping) else enumerate(state)
    for key, value in members:
        if isinstance(value, torch.Tensor):
            continue  # Of thousands of members, most are tensors.
        if isinstance(value, nn.Module):
            yield (*path, str(key)), value
        elif isinstance(value, ModelState):
            yield from (((*path, str(key)), part) for part in value.parts)
        elif isinstance(value, (Mapping, list, tuple)):
            yield from _modules(value, (*path, str(key)))


def _check_names(state: FlatState) -> None:
    """Raise UsageError if two entries have one name."""
    several = [leaf.names for leaf in state.leaves.values() if leaf.names]
    # Counting the names is much cheaper than comparing thousands one by one.
    names: dict[str, object] = {**state.leaves}
    for more in several:
        names.update(more)
    if len(names) == len(state.leaves) + sum(map(len, several)) - len(several):
        return
    paths: dict[str, Path] = {}
    for name, leaf in state.leaves.items():
        for entry, path in (leaf.names or {name: leaf.path}).items():
            if entry in paths:
                raise named_twice(entry, paths[entry], path)
            paths[entry] = path
