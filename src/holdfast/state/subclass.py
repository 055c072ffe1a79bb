"""Tensor subclasses: stored unchanged if they are torch's own, else as their inner tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from holdfast.errors import MismatchError, UsageError

CONTEXT = "__context__"
"""Last key in the path of a wrapper subclass's metadata."""

UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)
"""Parameters and buffers of lazy modules before their first batch."""

_OURS = (torch.Tensor, torch.nn.Parameter, DTensor)


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's own memory contains its elements: a plain tensor, a parameter, or
    a DTensor with a plain local tensor."""
    kind = type(tensor)
    if kind is DTensor:
        return type(tensor._local_tensor) in _OURS  # type: ignore[attr-defined]
    return kind in _OURS


def take_apart(
    name: str, tensor: torch.Tensor, *, must_be_known: bool
) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the inner tensors of a wrapper subclass by attribute, and its metadata.

    `must_be_known`: check that the class is declared safe, since a load creates the tensor.
    """
    cls = type(tensor)
    if isinstance(tensor, UNINITIALIZED):
        raise UsageError(
            f"`{name}` is not initialized: its module has not seen a batch yet",
            hint="run the model on one batch, then save it",
        )
    if cls is DTensor:
        local = type(tensor._local_tensor).__qualname__  # type: ignore[attr-defined]
        raise UsageError(
            f"`{name}` is a DTensor whose local tensor is a {local}",
            hint="convert it to a plain dtype before saving, or leave it out of `state_dict`",
        )
    flat = getattr(tensor, "__tensor_flatten__", None)
    if flat is None or not hasattr(cls, "__tensor_unflatten__"):
        raise UsageError(
            f"`{name}` is a {class_name(cls)}: this tensor class does not expose its elements",
            hint="use plain tensors, or a class with `__tensor_flatten__` and "
            "`__tensor_unflatten__`",
        )
    if must_be_known and cls not in _safe_classes().values():
        raise UsageError(
            f"`{name}` is a {class_name(cls)}, a class that a load would not know",
            hint=f"call torch.serialization.add_safe_globals([{cls.__qualname__}]) first",
        )
    names, context = flat()
    if {*map(type, (*tensor.size(), *tensor.stride()))} - {int}:
        raise UsageError(
            f"`{name}` is a {class_name(cls)} with a symbolic size, which only torch knows",
            hint="save its parts instead: `values()` and `offsets()` of a nested tensor",
        )
    return {name: getattr(tensor, name) for name in names}, context


def unflatten(
    name: str, inner: dict[str, Any], context: Any, described: Mapping[str, Any]
) -> torch.Tensor:
    """Rebuild the tensor `name` of a wrapper subclass from its inner tensors. `context`: its
    metadata. `described`: its class, size and stride, as the checkpoint states them.

    Uses only classes that this process has declared safe: a checkpoint must not choose the code
    that runs.
    """
    cls = _safe_classes().get(described["class"])
    if cls is None:
        raise MismatchError(
            f"`{name}` was saved as a {described['class']}, a class that this process has not "
            "declared to be safe",
            hint="import the class and pass it to torch.serialization.add_safe_globals([...])",
        )
    size, stride = torch.Size(described["size"]), tuple(described["stride"])
    made: torch.Tensor = cls.__tensor_unflatten__(inner, context, size, stride)
    return made


def class_name(cls: type) -> str:
    """Return module and qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _safe_classes() -> dict[str, Any]:
    """Return the tensor classes passed to `torch.serialization.add_safe_globals`, by name."""
    classes: dict[str, Any] = {}
    for entry in torch.serialization.get_safe_globals():
        cls = entry[0] if isinstance(entry, tuple) else entry
        if isinstance(cls, type) and issubclass(cls, torch.Tensor):
            classes[class_name(cls)] = cls
    return classes
