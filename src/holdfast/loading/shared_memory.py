"""Tensors of the state that share memory. A load must not fill one so that another changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

import torch

from holdfast.state.strides import extent_of

Staged = tuple[torch.Tensor, torch.Tensor]
"""A new tensor, into which an entry is read to be checked, and the tensor of the state to which
it is copied then."""

_ALIGN_BYTES = 16
"""A multiple of the size of every dtype's elements."""


def sharing_memory(
    locals_by_name: Mapping[str, torch.Tensor], is_stored_once: Callable[[str, str], bool]
) -> list[list[str]]:
    """Return groups of names whose tensors lie in memory that others of the group use too. Leave
    out the further names of one view that is stored once. `is_stored_once(one, other)`: whether the
    checkpoint has the same chunks for two names.

    Views that interleave, such as the columns of a matrix, are in one group, although they have no
    element in common.
    """
    places: dict[torch.device, list[tuple[int, int, str]]] = {}
    first_at: dict[tuple[object, ...], str] = {}
    for name, local in locals_by_name.items():
        start, stop = _extent(local)
        if start == stop:
            continue
        first = first_at.setdefault(_view_of(local), name)
        if first == name or not is_stored_once(first, name):
            places.setdefault(local.device, []).append((start, stop, name))
    groups: list[list[str]] = []
    for on_device in places.values():
        reach = 0
        for start, stop, name in sorted(on_device):
            if start >= reach:
                groups.append([])
            groups[-1].append(name)
            reach = max(reach, stop)
    return [group for group in groups if len(group) > 1]


def conflicts(group: Mapping[str, Staged]) -> list[str]:
    """Return a line for each two tensors of a group such that the state cannot hold the entries of
    both."""
    if _all_fit(group):
        return []
    return [
        f"`{one}` and `{other}` {_relation(group[one][1], group[other][1])}"
        for one, other in combinations(group, 2)
        if _meet(group[one][1], group[other][1])
        and not _all_fit({one: group[one], other: group[other]})
    ]


def _meet(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether the memory from the first to the last element of two tensors overlaps."""
    (start, stop), (other_start, other_stop) = _extent(one), _extent(other)
    return start < other_stop and other_start < stop


def _relation(one: torch.Tensor, other: torch.Tensor) -> str:
    if _extent(one) == _extent(other):
        return "are one tensor here, and two that differ in the checkpoint"
    return "share elements here, which differ in the checkpoint"


def _all_fit(group: Mapping[str, Staged]) -> bool:
    """Return whether each tensor has its own elements once all have been copied to their places."""
    extents = [_extent(local) for _, local in group.values()]
    base = min(start for start, _ in extents) // _ALIGN_BYTES * _ALIGN_BYTES
    nbytes = max(stop for _, stop in extents) - base
    room = -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    device = next(iter(group.values()))[1].device
    memory = torch.zeros(room, dtype=torch.uint8, device=device)
    copies = [*_views(memory, base, group)]
    for staged, view in copies:
        view.copy_(staged)
    return all(torch.equal(_bytes(view), _bytes(staged.to(view.dtype))) for staged, view in copies)


def _views(
    memory: torch.Tensor, base: int, group: Mapping[str, Staged]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each staged tensor, and the view of `memory` that lies there as its tensor of the state
    lies from address `base` on."""
    for staged, local in group.values():
        offset = (local.data_ptr() - base) // local.itemsize
        elements = memory.view(local.dtype).as_strided(local.shape, local.stride(), offset)
        if local.is_conj():
            elements = elements.conj()
        yield staged, torch._neg_view(elements) if local.is_neg() else elements


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of the first element of a tensor and the one after its last element; two
    equal numbers if it has no elements."""
    start = tensor.data_ptr()
    return start, start + extent_of(tensor) * tensor.itemsize if start else 0


def _view_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that is equal for equal views of the same memory only."""
    place = tensor.device, tensor.data_ptr(), tensor.dtype
    return (*place, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
