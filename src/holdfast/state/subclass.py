"""Tensors by their class: those that Holdfast stores as they are, and those that it takes apart."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from holdfast.errors import MismatchError, UsageError

CONTEXT = "__context__"
"""Last key of the path of what a class says beside its inner tensors."""

UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)
"""Parameters of lazy modules that have seen no data yet."""

_OURS = (torch.Tensor, torch.nn.Parameter, DTensor)


@dataclass(frozen=True, slots=True)
class Apart:
    """A traceable wrapper subclass by its inner tensors."""

    class_name: str
    """Module and qualified name."""

    inner: Mapping[str, torch.Tensor]
    context: Any
    """Metadata of `__tensor_flatten__`."""

    size: tuple[int, ...]
    stride: tuple[int, ...]


def is_ours(tensor: torch.Tensor) -> bool:
    """Whether its elements are those in its own memory: a plain tensor, a parameter, a DTensor
    whose local tensor is plain."""
    kind = type(tensor)
    if kind is DTensor:
        return type(tensor._local_tensor) in _OURS  # type: ignore[attr-defined]
    return kind in _OURS


def taken_apart(name: str, tensor: torch.Tensor, *, must_be_known: bool) -> Apart:
    """The inner tensors of a wrapper subclass. `must_be_known`: a load has no such tensor beside
    it to take the class from.

    Raises:
        UsageError: the class does not say what its elements are, or could not be found at a load.
    """
    cls = type(tensor)
    if isinstance(tensor, UNINITIALIZED):
        raise UsageError(
            f"`{name}` is not initialized: its module has not seen data yet",
            hint="run the model once on a batch, then save it",
        )
    if cls is DTensor:
        inner = type(tensor._local_tensor).__qualname__  # type: ignore[attr-defined]
        raise UsageError(
            f"`{name}` is a DTensor whose local tensor is a {inner}",
            hint="convert it to a plain dtype before saving, or leave it out of `state_dict`",
        )
    flat = getattr(tensor, "__tensor_flatten__", None)
    if flat is None or not hasattr(cls, "__tensor_unflatten__"):
        raise UsageError(
            f"`{name}` is a {class_name(cls)}: this class of tensors does not say what its "
            "elements are",
            hint="keep plain tensors in its place; a class with `__tensor_flatten__` and "
            "`__tensor_unflatten__` is taken apart and put together again",
        )
    if must_be_known and cls not in _safe_classes().values():
        raise UsageError(
            f"`{name}` is a {class_name(cls)}, and a load would not know this class",
            hint=f"torch.serialization.add_safe_globals([{cls.__qualname__}]) where you import it",
        )
    names, context = flat()
    size, stride = tuple(tensor.size()), tuple(tensor.stride())
    if {*map(type, (*size, *stride))} - {int}:
        raise UsageError(
            f"`{name}` is a {class_name(cls)} of a size that is known to torch alone",
            hint="keep its parts: `values()` and `offsets()` of a nested tensor",
        )
    return Apart(class_name(cls), {n: getattr(tensor, n) for n in names}, context, size, stride)


def put_together(
    name: str, class_named: str, inner: dict[str, Any], context: Any, described: Mapping[str, Any]
) -> torch.Tensor:
    """A wrapper subclass from its inner tensors.

    Only a class that this process has told torch to be safe is taken: a checkpoint must not choose
    the code that is run.

    Raises:
        MismatchError: the class is not known.
    """
    cls = _safe_classes().get(class_named)
    if cls is None:
        raise MismatchError(
            f"`{name}` was saved as a {class_named}, a class that this process has not declared "
            "to be safe",
            hint="import it, then torch.serialization.add_safe_globals([...]) with it",
        )
    size, stride = torch.Size(described["size"]), tuple(described["stride"])
    made: torch.Tensor = cls.__tensor_unflatten__(inner, context, size, stride)
    return made


def class_name(cls: type) -> str:
    """Module and qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _safe_classes() -> dict[str, Any]:
    """Classes of tensors that were given to `torch.serialization.add_safe_globals`, by name."""
    assert "torch.serialization" in sys.modules
    found: dict[str, Any] = {}
    for one in torch.serialization.get_safe_globals():
        cls = one[0] if isinstance(one, tuple) else one
        if isinstance(cls, type) and issubclass(cls, torch.Tensor):
            found[class_name(cls)] = cls
    return found
