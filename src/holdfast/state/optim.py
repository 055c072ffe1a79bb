"""Optimizer state by parameter name, so that it fits whatever the order and number of the ranks.

Names are those of torch's flattened optimizer state dict (`state.<parameter>.<slot>` and
`param_groups.<parameter>.<option>`), which is what TorchTitan writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from holdfast.errors import UsageError
from holdfast.state.model import named_parameters
from holdfast.state.tree import NEVER_OPENED, PLAIN, Leaf, Path

TensorInfo = tuple[str, tuple[int, ...]]
"""Dtype by torch's name, and global shape."""


class OptimizerState:
    """One or several optimizers as one `Stateful`.

    `parts` name the parameters; a parameter that none of them holds is named by its number.
    """

    optional: ClassVar = ("param_groups",)
    """Entries that a checkpoint may lack, or have beyond these."""

    def __init__(self, parts: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._names = {id(parameter): name for name, parameter in named_parameters(parts)}
        self._parameters: dict[str, tuple[Optimizer, nn.Parameter]] = {}
        self._known: dict[tuple[Path, int, str], tuple[list[str], dict[str, Path]]] = {}
        for optimizer, parameter in self._in_order():
            name = self._names.setdefault(id(parameter), str(len(self._parameters)))
            if name in self._parameters:
                raise UsageError(
                    f"`{name}` is in two optimizers, or two parameters have this name",
                    hint="give each parameter to one optimizer, and every model part to the call",
                )
            self._parameters[name] = (optimizer, parameter)

    def _in_order(self) -> Iterator[tuple[Optimizer, nn.Parameter]]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield optimizer, parameter

    def parameter_names(self) -> list[str]:
        """Of the parameters that the optimizers change."""
        return list(self._parameters)

    def slots(self) -> dict[str, Any]:
        """The entries of `state_dict` that the optimizers change."""
        return {
            f"state.{self._names[id(parameter)]}.{slot}": value
            for optimizer, parameter in self._in_order()
            for slot, value in optimizer.state.get(parameter, {}).items()
        }

    def parted(self, above: Path) -> tuple[list[tuple[str, Leaf]], dict[str, Any]]:
        """The entries of `state_dict`, below a path, in two parts. Those that nobody opens, by
        name: each option of a group once, with the names that it has for all its parameters. And
        the others, which may hold state of their own, or differ by parameter."""
        leaves: list[tuple[str, Leaf]] = []
        others: dict[str, Any] = {}
        start = "".join(f"{key}." for key in above)
        for key, value in self.slots().items():
            if isinstance(value, NEVER_OPENED):
                leaves.append((start + key, Leaf((*above, key), value)))
            else:
                others[key] = value
        for number, group in enumerate(self._groups()):
            held = [self._names[id(parameter)] for parameter in group["params"]]
            for option, value in _options(group):
                if not isinstance(value, PLAIN):
                    others.update({f"param_groups.{name}.{option}": value for name in held})
                elif held:
                    names = self._spelled(above, number, option, held)
                    first, path = next(iter(names.items()))
                    leaves.append((first, Leaf(path, value, names)))
        return leaves, others

    def state_dict(self) -> dict[str, Any]:
        """Tensors share their memory with the optimizer. A parameter without state has none."""
        leaves, others = self.parted(())
        return {**{n: leaf.value for one, leaf in leaves for n in leaf.names or [one]}, **others}

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    def _spelled(
        self, above: Path, number: int, option: str, held: list[str]
    ) -> Mapping[str, Path]:
        """The names of an option of a group: kept, for every save asks for them."""
        known = self._known.get((above, number, option))
        if known is None or known[0] != held:
            paths = [(*above, f"param_groups.{name}.{option}") for name in held]
            known = held, {".".join(map(str, path)): path for path in paths}
            self._known[above, number, option] = known
        return known[1]

    def room_for(self, stored: Mapping[str, TensorInfo]) -> list[str]:
        """Names of stored tensors that are slots of these parameters, but not there yet."""
        return [f"state.{name}.{slot}" for name, slot, *_ in self._lacking(stored)]

    def prepare(self, stored: Mapping[str, TensorInfo]) -> None:
        """Make room for the tensors of a checkpoint, given by their names below this optimizer's:
        before its first step an optimizer has no state to load into.

        A slot of its parameter's shape lies over the ranks as the parameter does; any other is
        whole on every rank, a single number on the CPU.
        """
        for name, slot, group, parameter in list(self._lacking(stored)):
            # Optimizers with these options keep their step count on the parameter's device.
            on_device = bool(group.get("fused") or group.get("capturable"))
            room = _room_for(*stored[f"state.{name}.{slot}"], parameter, on_device=on_device)
            self._parameters[name][0].state[parameter][slot] = room

    def _lacking(
        self, stored: Mapping[str, TensorInfo]
    ) -> Iterator[tuple[str, str, dict[str, Any], nn.Parameter]]:
        by_parameter = _by_parameter(stored, "state.")
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self._names[id(parameter)]
                    there = optimizer.state.get(parameter, {})
                    for slot in by_parameter.get(name, {}):
                        if slot not in there:
                            yield name, slot, group, parameter

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over options and values; tensors have been loaded in place."""
        for name, slots in _by_parameter(state_dict, "state.").items():
            optimizer, parameter = self._parameters[name]
            for slot, value in slots.items():
                if not isinstance(value, torch.Tensor):
                    optimizer.state[parameter][slot] = value
        options = _by_parameter(state_dict, "param_groups.")
        for group in self._groups():
            for parameter in group["params"][:1]:
                group.update(options.get(self._names[id(parameter)], {}))


def _options(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((option, value) for option, value in group.items() if option != "params")


def _by_parameter(entries: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    """Entries `<prefix><parameter>.<slot>` by parameter and slot."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        if key.startswith(prefix):
            parameter, _, slot = key[len(prefix) :].rpartition(".")
            found.setdefault(parameter, {})[slot] = value
    return found


def _room_for(
    dtype: str, shape: tuple[int, ...], parameter: nn.Parameter, *, on_device: bool
) -> torch.Tensor:
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if shape == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=torch_dtype)
    device = parameter.device if shape or on_device else torch.device("cpu")
    return torch.zeros(shape, dtype=torch_dtype, device=device)
