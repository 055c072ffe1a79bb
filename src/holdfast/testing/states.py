"""Does a state come back as it was? For states of this project's tests, and of anybody's."""

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
from holdfast.state.subclass import is_ours
from holdfast.state.tree import is_object

MODES = ("save", "disabled", "async", "async_with_pinned_mem")
"""Ways to save: `holdfast.save`, and the three of `CheckpointManager`."""


def round_trip(
    state: Mapping[str, Any],
    *,
    fresh: Mapping[str, Any] | None = None,
    modes: tuple[str, ...] = MODES,
) -> None:
    """Save a state in every mode, load it into `fresh`, and compare every bit.

    `state` is what `holdfast.save` takes: a dict of tensors, plain values, modules, optimizers and
    other objects with `state_dict`. `fresh` is the same as a run makes it before it loads. Left
    out, it is a deep copy: its parameters and buffers hold other bits, its optimizers have no
    state, its values are None. An object of another kind is compared by what reaches its
    `load_state_dict`; pass `fresh` to see what it makes of it. A state that has no deep copy, as
    that of FSDP2, needs `fresh`.

        holdfast.testing.round_trip({"model": model, "optimizer": optimizer, "loader": loader})

    Collective where `torch.distributed` is initialized.

    Raises:
        AssertionError: the first mode in which something differs, with a line on each difference.
        UsageError: the state cannot be kept; the error names the entry and its type.
    """
    said = {key: _said(value) for key, value in state.items()}
    for mode in modes:
        with tempfile.TemporaryDirectory() as folder:
            target = _disturbed(state) if fresh is None else dict(fresh)
            for key, value in target.items():
                target[key] = _Witness(value) if _is_other(value) else value
            _save_and_load(Path(folder), mode, state, target)
            found = [
                line for key in state for line in differences(said[key], _found(target[key]), key)
            ]
        assert not found, f"mode `{mode}`:\n  " + "\n  ".join(found)


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
    for held, is_saved in ((state, True), (target, False)):
        kept = {key: _Held(held, key) for key in held if not _is_component(held[key])}
        with holdfast.CheckpointManager(
            folder / "run",
            model=_models(held),
            optimizers=[one for one in held.values() if isinstance(one, Optimizer)],
            states={**{k: v for k, v in held.items() if _is_other(v)}, **kept},
            config=config,
        ) as manager:
            if is_saved:
                manager.save(1)
            else:
                assert manager.load() == 1


def _models(state: Mapping[str, Any]) -> nn.Module:
    """All modules of a state as one model."""
    found = {key: one for key, one in state.items() if isinstance(one, nn.Module)}
    return nn.ModuleDict(found)


class _Held:
    """A plain value of a state as an object with state."""

    def __init__(self, state: Any, key: str) -> None:
        self._state, self._key = state, key

    def state_dict(self) -> dict[str, Any]:
        return {"value": self._state[self._key]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state[self._key] = state_dict["value"]


class _Witness:
    """Passes on what an object says and is given, and remembers what it was given."""

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


def _is_other(value: Any) -> bool:
    """Whether it is an object with state, but neither a module nor an optimizer."""
    return is_object(value) and not isinstance(value, nn.Module | Optimizer)


def _said(value: Any) -> Any:
    """What a state says of itself, as it is now."""
    if isinstance(value, nn.Module):
        return _copied(dict(own_state(value)))
    if isinstance(value, Optimizer) and is_by_parameter(value):
        return _copied(state_of(value))
    return _copied(value.state_dict() if is_object(value) else value)


def _copied(state: Any) -> Any:
    try:
        return copy.deepcopy(state)
    except (RuntimeError, TypeError, AttributeError):
        # Of a class that has no copies; a save refuses it, or shows that it did not change.
        return state


def _found(value: Any) -> Any:
    """What has come of a state."""
    return value.given if isinstance(value, _Witness) else _said(value)


def _disturbed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy, with other values wherever that can be."""
    try:
        target = dict(copy.deepcopy(dict(state)))
    except Exception as error:
        raise UsageError(
            f"the state has no deep copy to load into: {type(error).__name__}: {error}",
            hint="pass `fresh`, the same state as a run makes it before it loads",
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
    """Turn every bit of a tensor over."""
    if is_ours(tensor) and tensor.numel() and tensor.is_contiguous():
        with torch.no_grad():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
            bits = local.reshape(-1).view(torch.uint8)
            bits.bitwise_xor_(torch.ones((), dtype=torch.uint8, device=bits.device))
