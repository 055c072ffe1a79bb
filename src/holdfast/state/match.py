"""The plan of a load: what each entry of a checkpoint is loaded into, and all mismatches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from holdfast import accelerator
from holdfast.format.manifest import TensorEntry
from holdfast.format.structure import Node, kind_of_node
from holdfast.state.layout import dtype_name, local_of
from holdfast.state.stored import Branch, Enter, Make, StoredState, Values, rebuilder
from holdfast.state.strides import order_in, overlaps_itself
from holdfast.state.subclass import is_plain_tensor
from holdfast.state.tree import Path

Like = Callable[[TensorEntry, str | None], torch.Tensor | torch.device | None]
"""`like(entry, name)` decides where a new tensor is placed: like the returned tensor, or on the
returned device. If it returns None: on the kind of device that the saved tensor was on.

`name`: for a sharded tensor, the parameter that had the same placement at the save, or "" if none
had; None for other tensors.
"""


SHARES_MEMORY = "is an expanded tensor, or another whose elements share memory"
"""Rest of the line about a tensor that a load cannot fill, after its name."""

Check = Callable[[Values], str | None]
"""`check(values)` returns a line about a mismatch in entries that have been read, or None."""


@dataclass(frozen=True, slots=True)
class Match:
    """Plan of a load: the tensors, objects and values of the state that a checkpoint's entries are
    loaded into. Of the methods, only `take` changes the state."""

    stored: StoredState
    parameter: Callable[[str], torch.Tensor | None] = lambda _: None
    """`parameter(name)` returns a parameter of this run's models; None if there is none."""

    others: frozenset[str] = frozenset()
    """Top-level keys of the components other than the model."""

    into: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of the state that are filled in place, by name of the entry."""

    made: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    """Functions that allocate new tensors, by name of the entry."""

    values: dict[str, None] = field(default_factory=dict)
    """Names of the values to read, in order."""

    mismatches: dict[str, str] = field(default_factory=dict)
    """Lines about missing entries and mismatches, by the name of the entry or path."""

    extra: dict[str, None] = field(default_factory=dict)
    """Names of unexpected entries: the checkpoint has them, but the state of this rank does not."""

    notes: dict[str, None] = field(default_factory=dict)
    """Lines for the log about state that is loaded differently than it was saved."""

    lacking: list[str] = field(default_factory=list)
    """Names of tensors that the checkpoint is allowed to lack, and lacks."""

    taken: set[str] = field(default_factory=set)
    """Names of entries that are not `extra`: this rank uses them, reports them as mismatches, or
    leaves them to other ranks."""

    checks: list[tuple[tuple[str, ...], Check]] = field(default_factory=list)
    """Checks to run before the state changes, each with the entries that it needs."""

    _takes: list[Callable[[Values], None]] = field(default_factory=list)

    def fill(self, name: str, tensor: torch.Tensor) -> bool:
        """Plan to fill a tensor with the entry `name`. Return whether it fits."""
        entry = self.stored.tensor(name)
        self.taken.add(name)
        if entry is None:
            if name in self.stored.manifest.values:
                self.mismatch(name, "is a plain value in the checkpoint, expected a tensor")
            else:
                self.missing(name)
        elif entry.shape != tuple(tensor.shape):
            found, expected = list(entry.shape), list(tensor.shape)
            self.mismatch(name, f"has shape {found} in the checkpoint, expected {expected}")
        elif not torch.can_cast(getattr(torch, entry.dtype), tensor.dtype):
            self.mismatch(name, f"is {entry.dtype} in the checkpoint, expected {tensor.dtype}")
        elif overlaps_itself(local_of(tensor)):
            self.mismatch(name, f"{SHARES_MEMORY}: clone it")
        else:
            self.into[name] = tensor
            return True
        return False

    def is_alike(self, name: str | None, live: Any) -> bool:
        """Return whether the entry `name` has the shape and dtype of the plain tensor `live`."""
        entry = self.stored.tensor(name)
        return (
            entry is not None
            and isinstance(live, torch.Tensor)
            and is_plain_tensor(live)
            and (entry.dtype, entry.shape) == (dtype_name(live.dtype), tuple(live.shape))
        )

    def missing(self, name: str) -> None:
        """Note an entry that the checkpoint lacks."""
        self.mismatches[name] = f"`{name}` is not in the checkpoint"

    def mismatch(self, name: str, what: str, branch: Branch | None = None) -> None:
        """Note a mismatch. `what`: rest of its line, after the name of the entry or path. `branch`:
        entries that are then not reported as unexpected too."""
        self.mismatches[name] = f"`{name}` {what}"
        if branch is not None:
            self.taken.update(branch.entries())

    def request(
        self, branch: Branch, node: Node, like: Like = lambda *_: None, enter: Enter | None = None
    ) -> Make:
        """Plan to read all entries of `branch`. Return the maker of their state: a function that
        rebuilds it from the entries once they are read. `node`: structure of this state. `like`:
        decides where new tensors are placed. `enter`: see `rebuilder`."""

        def note(name: str, leaf_node: Node) -> None:
            self.taken.add(name)
            entry = self.stored.tensor(name)
            if entry is None:
                self.values[name] = None
            else:
                self.made[name] = self._allocator(name, entry, leaf_node, like)

        return rebuilder(branch, node, note, enter)

    def request_at(self, path: Path, like: Like = lambda *_: None) -> Make | None:
        """Plan to read everything at and below `path`, and return its maker, as `request` does.
        Return None if the checkpoint has nothing there."""
        branch, node = self.stored.below(path), self.stored.node(path)
        return None if branch.is_empty and node is None else self.request(branch, node, like)

    def like_parameter(self, _: TensorEntry, name: str | None) -> torch.Tensor | None:
        """Return the parameter `name`, so that a tensor is placed like it. This is a `Like`."""
        return self.parameter(name) if name else None

    def _allocator(
        self, name: str, entry: TensorEntry, node: Node, like: Like
    ) -> Callable[[], torch.Tensor]:
        dtype: torch.dtype = getattr(torch, entry.dtype)
        saved = node["tensor"] if isinstance(node, dict) and kind_of_node(node) == "tensor" else {}
        shape = entry.shape
        template = like(entry, saved.get("like"))
        if (
            isinstance(template, torch.Tensor)
            and tuple(template.shape) == shape
            and is_plain_tensor(template)
            and template.layout is torch.strided
        ):
            # With the strides of the template: a fused optimizer requires that its parameter and
            # all slots lie in memory in the same order.
            placed = template.detach()
            return lambda: torch.empty_like(placed, dtype=dtype)
        if "like" in saved:
            what = "was a DTensor, and no parameter or tensor of this run gives it a placement"
            self.mismatch(name, what)
        if isinstance(template, torch.device):
            device = template
        elif template is None or isinstance(template, DTensor):
            device = accelerator.device_for(saved.get("device", "cpu"))
        else:
            device = template.device
        order = order_in(saved, len(shape))
        return lambda: torch.empty_permuted(shape, order, dtype=dtype, device=device)

    def check(self, names: Iterable[str], check: Check) -> None:
        """Plan to read these entries, and to check them before the state changes."""
        self.checks.append((tuple(names), check))

    def then(self, take: Callable[[Values], None]) -> None:
        """Plan a change of the state: the method `take` will call the function `take` that is given
        here. It calls such functions in the order in which they were given."""
        self._takes.append(take)

    def take(self, values: Values) -> None:
        """Pass the entries that were read to the objects, dicts and lists of the state. Call this
        once every rank has read all its entries."""
        for take in self._takes:
            take(values)


class MadeValues:
    """`Values` of entries that have been read: the tensors themselves, and copies of values."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        self._tensors, self._values = tensors, values

    def __call__(self, name: str) -> Any:
        if name in self._tensors:
            return self._tensors[name]
        # Several names may share one stored value, so each gets its own copy.
        return copy.deepcopy(self._values[name])


def check_number(name: str, expected: type) -> Check:
    """Return a check that a stored tensor of one element, once read, holds a number that type
    `expected` can represent."""

    def check(values: Values) -> str | None:
        number = values(name).item()
        try:
            fits = expected(number) == number or math.isnan(number)
        except (ValueError, OverflowError):
            fits = False
        line = f"`{name}` is {number!r} in the checkpoint, expected type {expected.__name__}"
        return None if fits else line

    return check


def is_one_number(stored: StoredState, name: str | None, live: Any) -> bool:
    """Return whether `live` is a number, and the checkpoint has a tensor of one element for it."""
    entry = stored.tensor(name)
    return (
        entry is not None
        and type(live) in (int, float)
        and math.prod(entry.shape) == 1
        and not entry.dtype.startswith("complex")
    )
