"""Comparison of two states: types, keys, numbers and every bit of every tensor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from holdfast.state.layout import bytes_of
from holdfast.state.subclass import is_plain_tensor


def same(one: Any, other: Any) -> bool:
    """Return whether two states are equal in every bit.

    >>> same({"a": [1, 2.0]}, {"a": [1, 2.0]}), same([1], (1,)), same(1, 1.0)
    (True, False, False)
    """
    return next(differences(one, other), None) is None


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield one line for each difference between two states."""
    where = path or "the state"
    if _kind(one) is not _kind(other):
        yield f"{where}: {type(one).__qualname__} and {type(other).__qualname__}"
    elif isinstance(one, torch.Tensor):
        yield from _tensor_differences(one, other, where)
    elif isinstance(one, np.ndarray):
        if (one.dtype, one.shape, one.tobytes()) != (other.dtype, other.shape, other.tobytes()):
            yield f"{where}: two arrays"
    elif isinstance(one, Mapping):
        if _keys(one) != _keys(other):
            yield f"{where}: keys {[*one][:10]} and {[*other][:10]}"
            return
        for key in one:
            yield from differences(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{where}: {len(one)} and {len(other)} members"
            return
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}[{number}]")
    elif _comparable(one) != _comparable(other):
        yield f"{where}: {one!r} and {other!r}"


def _keys(mapping: Mapping[Any, Any]) -> object:
    """Return the keys with their types. Only the order of an `OrderedDict` matters."""
    types = {key: type(key) for key in mapping}
    return [*types.items()] if isinstance(mapping, OrderedDict) else types


def _comparable(value: Any) -> Any:
    # The texts of 0.0 and -0.0 differ, and those of two NaNs are equal.
    return repr(value) if isinstance(value, float | complex | np.generic) else value


def _kind(value: Any) -> type:
    # A parameter counts as a tensor: `keep_vars` or a cast may turn one into the other.
    return torch.Tensor if type(value) is torch.nn.Parameter else type(value)


def _tensor_differences(one: torch.Tensor, other: torch.Tensor, where: str) -> Iterator[str]:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        yield f"{where}: {one.dtype} {[*one.shape]} and {other.dtype} {[*other.shape]}"
    elif not is_plain_tensor(one):
        names, context = one.__tensor_flatten__()  # type: ignore[attr-defined]
        other_names, other_context = other.__tensor_flatten__()  # type: ignore[attr-defined]
        yield from differences([*names], [*other_names], f"{where}.names")
        yield from differences(context, other_context, f"{where}.context")
        for name in names:
            yield from differences(getattr(one, name), getattr(other, name), f"{where}.{name}")
    elif isinstance(one, DTensor) and isinstance(other, DTensor):
        if one.placements != other.placements:
            yield f"{where}: {one.placements} and {other.placements}"
            return
        yield from _tensor_differences(one.to_local(), other.to_local(), where)
    elif _bits(one) != _bits(other):
        yield f"{where}: two tensors of {one.dtype} {[*one.shape]}"


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(bytes_of(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()))
