"""Check that a state survives saving and loading, bit for bit."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import holdfast
from holdfast.errors import UsageError
from holdfast.state.model import memory_of, own_state
from holdfast.state.optim import is_by_parameter, state_of
from holdfast.state.same import differences
from holdfast.state.subclass import is_plain_tensor
from holdfast.state.tree import is_object

MODES = ("save", "disabled", "async", "async_with_pinned_mem")
"""Ways to save: `holdfast.save`, and a manager with each value of `async_mode`."""


def round_trip(
    state: Mapping[str, Any],
    *,
    fresh: Mapping[str, Any] | None = None,
    modes: tuple[str, ...] = MODES,
) -> None:
    """Save a state in every mode, load it into `fresh`, and compare every bit.

        holdfast.testing.round_trip({"model": model, "optimizer": optimizer, "loader": loader})

    `state` is an argument of `holdfast.save`: a dict of tensors, plain values, modules, optimizers
    and other objects with `state_dict`. `fresh` is the same state as a run has it before it loads.
    By default it is a deep copy in which tensors have other bits, optimizers have no state, and
    values are None. Pass `fresh` if the state cannot be copied, as with FSDP2.

    For objects other than modules and optimizers, the argument of their `load_state_dict` is
    compared.

    Collective if `torch.distributed` is initialized.

    Raises:
        AssertionError: the loaded state differs in some mode; the message lists all differences.
        UsageError: the state cannot be saved; the message names the entry and its type.
    """
    expected = {key: _state_of(value) for key, value in state.items()}
    for mode in modes:
        with tempfile.TemporaryDirectory() as folder:
            target = _altered_copy(state) if fresh is None else dict(fresh)
            for key, value in target.items():
                target[key] = _LoadRecorder(value) if _is_other_object(value) else value
            _save_and_load(Path(folder), mode, state, target)
            loaded = {key: _state_of(target[key]) for key in state}
            lines = [n for key in state for n in differences(expected[key], loaded[key], key)]
        assert not lines, f"mode `{mode}`:\n  " + "\n  ".join(lines)


def _save_and_load(
    folder: Path, mode: str, state: Mapping[str, Any], target: MutableMapping[str, Any]
) -> None:
    if mode == "save":
        holdfast.save(folder / "one", state)
        holdfast.load(folder / "one", target)
        return
    config = holdfast.CheckpointConfig(
        enable=True,
        interval=1,
        last_save_model_only=False,
        async_mode=mode,  # type: ignore[arg-type]
        stop_signals=(),
    )
    for source, is_saved in ((state, True), (target, False)):
        values = {key: _ValueState(source, key) for key in source if not _is_component(source[key])}
        with holdfast.CheckpointManager(
            folder / "run",
            model=nn.ModuleDict({k: v for k, v in source.items() if isinstance(v, nn.Module)}),
            optimizers=[value for value in source.values() if isinstance(value, Optimizer)],
            states={**{k: v for k, v in source.items() if _is_other_object(v)}, **values},
            config=config,
        ) as manager:
            if is_saved:
                manager.save(1)
            else:
                assert manager.load() == 1


class _ValueState:
    """Wrapper that gives a plain value of a state the methods of a stateful object."""

    def __init__(self, state: Any, key: str) -> None:
        self._state, self._key = state, key

    def state_dict(self) -> dict[str, Any]:
        return {"value": self._state[self._key]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state[self._key] = state_dict["value"]


class _LoadRecorder:
    """Wrapper of an object. It keeps a copy of the argument that `load_state_dict` gets."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self.given: Any = None

    def state_dict(self) -> Any:
        return self._owner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.given = copy.deepcopy(state_dict)
        self._owner.load_state_dict(state_dict)


def _is_component(value: Any) -> bool:
    return isinstance(value, nn.Module | Optimizer) or is_object(value)


def _is_other_object(value: Any) -> bool:
    """Whether `value` has `state_dict`, but is neither a module nor an optimizer."""
    return is_object(value) and not isinstance(value, nn.Module | Optimizer)


def _state_of(value: Any) -> Any:
    """Return a copy of the current state of a module, an optimizer, an object or a value.

    For a `_LoadRecorder`, return the argument of its `load_state_dict`.
    """
    if isinstance(value, _LoadRecorder):
        return value.given
    if isinstance(value, nn.Module):
        return _copied(dict(own_state(value)))
    if isinstance(value, Optimizer) and is_by_parameter(value):
        return _copied(state_of(value))
    return _copied(value.state_dict() if is_object(value) else value)


def _copied(state: Any) -> Any:
    try:
        return copy.deepcopy(state)
    except (RuntimeError, TypeError, AttributeError):
        # The state cannot be copied. Then a save refuses it, or it is compared with itself.
        return state


def _altered_copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a state, and change every value that can be changed."""
    try:
        target = dict(copy.deepcopy(dict(state)))
    except Exception as error:
        raise UsageError(
            f"the state has no deep copy to load into: {type(error).__name__}: {error}",
            hint="pass `fresh`, the same state as a run has it before it loads",
        ) from error
    for key, value in target.items():
        if isinstance(value, nn.Module):
            for tensor in memory_of(value).values():
                _flip(tensor)
        elif isinstance(value, Optimizer) and is_by_parameter(value):
            value.state.clear()
            for group in value.param_groups:
                for option in {*group} - {*value.defaults, "params"}:
                    del group[option]
        elif isinstance(value, torch.Tensor):
            _flip(value)
        elif not _is_component(value) and not isinstance(value, Mapping):
            target[key] = None
    return target


def _flip(tensor: torch.Tensor) -> None:
    """Flip a bit of every byte of a tensor."""
    if is_plain_tensor(tensor) and tensor.numel() and tensor.is_contiguous():
        with torch.no_grad():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
            bits = local.reshape(-1).view(torch.uint8)
            bits.bitwise_xor_(torch.ones((), dtype=torch.uint8, device=bits.device))
