"""Training state as people hold it, modules and optimizers among it, opened into one tree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.state.model import ModelState
from holdfast.state.optim import OptimizerState, TensorInfo
from holdfast.state.tree import Leaf, Path, Stateful, flatten, named_twice, place


class StateTree:
    """A dict of state whose objects are asked for theirs.

    `state` maps names to tensors, plain values, dicts, lists and `Stateful` objects. The entry at
    `flat`, if there is one, adds its own names to the top level instead of lying below its key:
    that is how TorchTitan keeps the model. `others` are top-level names that are not its own.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        *,
        flat: str | None = None,
        others: Collection[str] = (),
    ) -> None:
        self._state = state
        self._flat = flat
        self._others = others
        self._modules = list(_modules(state))
        self._opened: dict[Path, tuple[Stateful, dict[str, Any]]] = {}

    def wants(self, path: Path) -> bool:
        """Whether a stored entry, by its path, lies below one of the names given: leaving it out
        would lose it."""
        if path[0] in self._state and path[0] != self._flat:
            return not self.optional(path)
        return self._flat in self._state and path[0] not in self._others

    def optional(self, path: Path) -> bool:
        """Whether checkpoint and state may differ in this entry: an option that the optimizers of
        another torch have or have not, the generator of a GPU that is or is not there, parameters
        that a base has not."""
        if self.lacks(path):
            return True
        owner = self._wrapped(self._state.get(str(path[0])))
        prefixes: tuple[str, ...] = getattr(owner, "optional", ())
        return len(path) > 1 and str(path[1]).startswith(prefixes)

    def lacks(self, path: Path) -> bool:
        """Whether this is a tensor of the model that its base may not have."""
        model = self._wrapped(self._state.get(self._flat)) if self._flat else None
        return isinstance(model, ModelState) and ".".join(map(str, path)) in model.may_lack

    def room_for(self, stored: Mapping[str, TensorInfo]) -> set[str]:
        """Stored tensors that the state lacks, and `prepare` will make room for."""
        return {
            f"{name}.{key}"
            for name, optimizers in self._optimizers()
            for key in optimizers.room_for(_below(stored, name))
        }

    def prepare(self, stored: Mapping[str, TensorInfo]) -> None:
        """Let the optimizers make room for the tensors that a checkpoint holds."""
        for name, optimizers in self._optimizers():
            optimizers.prepare(_below(stored, name))

    def leaves(self) -> dict[str, Leaf]:
        """Every tensor and value by name, as they are now. Tensors share memory with the state."""
        self._opened.clear()
        return self._leaves(self._open)

    def leaves_to_save(self) -> dict[str, Leaf]:
        """The same, but an option of an optimizer is one leaf with the names of all parameters that
        have it: there are thousands of these names, and training waits."""
        own: list[tuple[str, Leaf]] = []

        def opened(path: Path, value: Any) -> Any:
            wrapped = self._wrapped(value)
            if not isinstance(wrapped, OptimizerState):
                return self._open(path, value)
            leaves, others = wrapped.parted(path)
            own.extend(leaves)
            return others

        opened_leaves = self._leaves(opened)
        leaves = {**opened_leaves}
        leaves.update(own)
        # That no name is there twice is seen by counting them: they are not looked at one by one.
        several = [leaf.names for _, leaf in own if leaf.names]
        names: dict[str, object] = {**leaves}
        for more in several:
            names.update(more)
        wanted = len(opened_leaves) + len(own) + sum(map(len, several)) - len(several)
        if len(names) < wanted:
            raise _named_twice([*opened_leaves.items(), *own])
        return leaves

    def _leaves(self, opened: Callable[[Path, Any], Any]) -> dict[str, Leaf]:
        below = {name: value for name, value in self._state.items() if name != self._flat}
        leaves = flatten(below, opened=opened)
        if self._flat is not None and self._flat in self._state:
            for name, leaf in self._flat_leaves(self._state[self._flat]):
                leaves[name] = leaf
        return leaves

    def take(self, leaves: Mapping[str, Leaf], values: Mapping[str, Any]) -> None:
        """Put loaded values in their place, and give every object its state.

        Call after `leaves`; tensors have been loaded into the memory of the leaves.
        """
        for name, value in values.items():
            path = leaves[name].path
            owner = self._owner(path)
            if owner is None:
                assert isinstance(self._state, MutableMapping), "values need a place to go to"
                place(self._state, path, value)
            else:
                place(self._opened[owner][1], path[len(owner) :], value)
        for stateful, state in self._opened.values():
            stateful.load_state_dict(state)

    def _flat_leaves(self, value: Any) -> Iterator[tuple[str, Leaf]]:
        state = self._open((), value)
        for name, member in state.items():
            yield name, Leaf((name,), member)

    def _owner(self, path: Path) -> Path | None:
        """Path of the object that a leaf belongs to."""
        found = [at for at in self._opened if path[: len(at)] == at]
        longest = max(found, key=len, default=None)
        if longest == () and path[0] in self._state:
            return None
        return longest

    def _optimizers(self) -> Iterator[tuple[str, OptimizerState]]:
        for name, value in self._state.items():
            wrapped = self._wrapped(value)
            if isinstance(wrapped, OptimizerState):
                yield name, wrapped

    def _open(self, path: Path, value: Any) -> Any:
        wrapped = self._wrapped(value)
        if isinstance(wrapped, Stateful) and not isinstance(wrapped, Mapping):
            state = wrapped.state_dict()
            self._opened[path] = (wrapped, state)
            return state
        return value

    def _wrapped(self, value: Any) -> Any:
        match value:
            case nn.Module():
                return ModelState([value])
            case torch.optim.Optimizer():
                return OptimizerState(self._modules, [value])
        return value


def _modules(state: Mapping[str, Any]) -> Iterator[nn.Module]:
    for value in state.values():
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, Mapping):
            yield from _modules(value)


def _named_twice(leaves: Iterable[tuple[str, Leaf]]) -> UsageError:
    """What is said of leaves of which two have one name."""
    paths: dict[str, Path] = {}
    for name, leaf in leaves:
        for one, path in (leaf.names or {name: leaf.path}).items():
            if one in paths:
                return named_twice(one, paths[one], path)
            paths[one] = path
    raise AssertionError("no name is there twice")


def _below(stored: Mapping[str, TensorInfo], name: str) -> dict[str, TensorInfo]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
