"""A load before it begins: which entry of a checkpoint goes where, and what does not fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from holdfast.format.manifest import TensorEntry
from holdfast.format.structure import Node, kind_of_node
from holdfast.state.layout import local_of
from holdfast.state.stored import Branch, StoredState, as_saved, leaves_of, rebuild

Like = Callable[[TensorEntry, str], torch.Tensor | torch.device | None]
"""`like(entry, name)`: where a tensor belongs that is made anew: as another one lies, such as the
parameter of this name, or on a device. None where nobody knows."""


def nowhere(_: TensorEntry, __: str) -> None:
    """The `Like` of what belongs nowhere but in host memory."""


class Values(Protocol):
    """Entries that have been read."""

    def __call__(self, name: str) -> Any:
        """The tensor or the value of an entry; a value is the caller's own."""
        ...


Check = Callable[[Values], str | None]
"""Looks at entries that have been read; returns a line on what does not fit, or None."""


@dataclass(frozen=True, slots=True)
class Match:
    """Which entry goes where. Nothing is changed before `take`."""

    stored: StoredState
    parameter: Callable[[str], torch.Tensor | None] = lambda _: None
    """`parameter(name)`: a parameter of this run's models."""

    others: frozenset[str] = frozenset()
    """First keys of the paths of what is not the model's."""

    into: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of the state whose memory is filled, by entry."""

    made: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    """Makers of the tensors that have no place yet, by entry."""

    values: dict[str, None] = field(default_factory=dict)
    """Entries that are no tensors, in order."""

    misfits: dict[str, str] = field(default_factory=dict)
    """A line on each entry that is missing or does not fit, by its name."""

    extra: dict[str, None] = field(default_factory=dict)
    """Names of what the structure alone tells of, and this rank has no place for."""

    notes: dict[str, None] = field(default_factory=dict)
    """Lines on what is loaded otherwise than it was saved, and must be said."""

    lacking: list[str] = field(default_factory=list)
    """Tensors that the checkpoint may lack, and does."""

    taken: set[str] = field(default_factory=set)
    """Entries that have a place on this rank."""

    checks: list[tuple[tuple[str, ...], Check]] = field(default_factory=list)
    """Entries that have to be read before anything is changed, each with what looks at them."""

    _takes: list[Callable[[Values], None]] = field(default_factory=list)

    def fill(self, name: str, tensor: torch.Tensor) -> bool:
        """Have a tensor filled with the entry `name`. Returns whether it fits."""
        entry = self.stored.tensor(name)
        line = None
        if entry is None:
            known = name in self.stored.manifest.values
            line = "is a plain value in the checkpoint, a tensor is wanted" if known else None
            line = line or "is not in the checkpoint"
        elif entry.shape != tuple(tensor.shape):
            line = f"is {list(entry.shape)} in the checkpoint, {list(tensor.shape)} is wanted"
        elif not torch.can_cast(getattr(torch, entry.dtype), tensor.dtype):
            line = f"is {entry.dtype} in the checkpoint, {tensor.dtype} is wanted"
        elif is_expanded(local_of(tensor)):
            line = "is expanded here: its elements share memory, so clone it first"
        self.taken.add(name)
        if line is not None:
            self.misfits[name] = f"`{name}` {line}"
            return False
        self.into[name] = tensor
        return True

    def missing(self, name: str) -> None:
        """Note an entry that is wanted and not there."""
        self.misfits[name] = f"`{name}` is not in the checkpoint"

    def fits_not(self, name: str, what: str) -> None:
        """Note what does not fit, by the name of an entry or of a path."""
        self.misfits[name] = f"`{name}` {what}"

    def demand(self, branch: Branch, node: Node, like: Like = nowhere) -> None:
        """Have everything at and below a path read, to be put together by `put_together`."""
        manifest = self.stored.manifest
        for name, at in leaves_of(branch, node):
            self.taken.add(name)
            entry = manifest.tensors.get(name)
            if entry is None:
                self.values[name] = None
                continue
            dtype: torch.dtype = getattr(torch, entry.dtype)
            self.made[name] = self._maker(name, entry, dtype, at, like)

    def _maker(
        self, name: str, entry: TensorEntry, dtype: torch.dtype, node: Node, like: Like
    ) -> Callable[[], torch.Tensor]:
        place = node["tensor"] if isinstance(node, dict) and kind_of_node(node) == "tensor" else {}
        shape = entry.shape
        template = like(entry, place.get("like", ""))
        if isinstance(template, DTensor) and tuple(template.shape) == shape:
            placed = template.detach()
            return lambda: torch.empty_like(placed, dtype=dtype)
        if "like" in place:
            what = "was spread over ranks, and nothing in this run says how it lies here"
            self.fits_not(name, what)
        if isinstance(template, torch.device):
            device = template
        elif template is None or isinstance(template, DTensor):
            device = device_for(place.get("device", "cpu"))
        else:
            device = template.device
        return lambda: torch.empty(shape, dtype=dtype, device=device)

    def check(self, names: Iterable[str], check: Check) -> None:
        """Have a look at these entries, which are read, before anything is changed."""
        self.checks.append((tuple(names), check))

    def then(self, take: Callable[[Values], None]) -> None:
        """Do this once every rank has read all that it wants, in the order of the calls."""
        self._takes.append(take)

    def take(self, values: Values) -> None:
        """Give everything that was read to whom it belongs."""
        for take in self._takes:
            take(values)


def put_together(branch: Branch, node: Node, values: Values) -> Any:
    """The state at and below a path, as it was saved, from what was read."""
    return rebuild(branch, node, lambda name, at: as_saved(values(name), at))


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several elements of a tensor are one in memory."""
    return (
        any(
            not stride and size > 1
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        )
        if tensor.layout is torch.strided
        else False
    )


def device_for(kind: str) -> torch.device:
    """The device of this process of a kind that a checkpoint names; the host where it has none."""
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind == "cpu" or current is None or current.type != kind:
        return torch.device("cpu")
    return torch.device(kind, torch.accelerator.current_device_index())


class MadeValues:
    """Entries that have been read, by name: tensors as they are, values each a copy."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        self._tensors, self._values = tensors, values

    def __call__(self, name: str) -> Any:
        if name in self._tensors:
            return self._tensors[name]
        # One container may stand for many names; each gets a value of its own.
        return copy.deepcopy(self._values[name])


def check_number(name: str, wanted: type) -> Check:
    """A check that a tensor of one element is a number of the type that stands in its place."""

    def check(values: Values) -> str | None:
        number = values(name).item()
        try:
            fits = wanted(number) == number or math.isnan(number)
        except (ValueError, OverflowError):
            fits = False
        return None if fits else f"`{name}` is {number!r} in the checkpoint, no {wanted.__name__}"

    return check


def is_one_number(stored: StoredState, name: str | None, live: Any) -> bool:
    """Whether a tensor of one element is stored where a number stands."""
    entry = stored.tensor(name) if name is not None else None
    return (
        entry is not None
        and type(live) in (int, float)
        and math.prod(entry.shape) == 1
        and not entry.dtype.startswith("complex")
    )
