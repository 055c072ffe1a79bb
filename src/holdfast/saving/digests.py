"""Digests of what several ranks hold alike, to notice where they do not."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from xxhash import xxh3_64, xxh3_64_intdigest

from holdfast.saving.stage import host_windows
from holdfast.state.layout import dtype_name

ROW_WORDS = 2048
"""Words that are summed up at once on an accelerator, along rows and along columns."""

Group = tuple[int, ...]
"""Ranks that hold the same elements."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A tensor that other ranks hold too."""

    name: str
    group: Group
    """All ranks that hold the elements of this one."""


def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A digest of each of these tensors: of its bytes, wherever they lie. Two tensors with the same
    digest are the same, but for one chance in 2**64; on accelerators, where sums stand in for a
    hash, unless somebody has built them to collide."""
    found: dict[str, int] = {}
    sums: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_cpu:
            running = xxh3_64()
            for window in host_windows(tensor, dtype_name(tensor.dtype)):
                running.update(window)
            found[name] = running.intdigest()
        else:
            sums[name] = _sums(tensor)
    if sums:
        # One copy for all: each would wait for the device.
        values = torch.stack(list(sums.values())).cpu().tolist()
        for name, two in zip(sums, values, strict=True):
            found[name] = xxh3_64_intdigest(struct.pack("<qq", *two))
    return {name: found[name] for name in tensors}


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums of the words of a tensor, on its device: one tells its columns apart, one its
    rows."""
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    # Not `reshape(-1)`: a single element counts as contiguous whatever its stride.
    data = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
    whole = data.numel() // 8 * 8
    if data.storage_offset() % 8:
        data = data.clone()
    words = data[:whole].view(torch.int64)
    tail = data[whole:].to(torch.int64)
    rows = len(words) // ROW_WORDS
    square = words[: rows * ROW_WORDS].view(rows, ROW_WORDS)
    rest = torch.cat((words[rows * ROW_WORDS :], tail))
    sums = [_weighted(square.sum(0)) + _weighted(rest), _weighted(square.sum(1)) + rest.sum()]
    return torch.stack(sums)


def _weighted(words: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, 2 * len(words) + 1, 2, dtype=torch.int64, device=words.device)
    return (words * weights).sum()


class Replicas:
    """What a rank holds and others do too, and its digests once they have been taken."""

    def __init__(self, replicas: Sequence[Replica], tensors: Mapping[str, torch.Tensor]) -> None:
        self._replicas, self._tensors = replicas, dict(tensors)
        self._digests: dict[str, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether this rank holds nothing that others hold too."""
        return not self._replicas

    def take(self) -> None:
        """Take the digests, of the tensors as they are now; let go of the tensors."""
        with torch.no_grad():
            self._digests = digests_of(self._tensors)
        self._tensors = {}

    def by_group(self) -> dict[Group, int]:
        """One digest for all tensors that the same ranks hold: it crosses instead of thousands."""
        running: dict[Group, xxh3_64] = {}
        for replica in sorted(self._replicas, key=lambda one: one.name):
            one = running.setdefault(replica.group, xxh3_64())
            one.update(replica.name.encode() + struct.pack("<Q", self._digests[replica.name]))
        return {group: one.intdigest() for group, one in running.items()}

    def of(self, groups: Collection[Group]) -> dict[str, tuple[Group, int]]:
        """The digest of each tensor that these groups hold."""
        return {
            one.name: (one.group, self._digests[one.name])
            for one in self._replicas
            if one.group in groups
        }


_PRIME = (1 << 61) - 1


class SharedNames(NamedTuple):
    """Names of one value that the same ranks hold."""

    group: int
    """Digest of the ranks: it crosses in place of their numbers."""

    names: Sequence[str]
    total: int
    """Sum of the digests of the names."""


def shared_names(names: Iterable[str], group_of: Callable[[str], Group]) -> list[SharedNames]:
    """The names of a value by the ranks that hold them; those of this rank alone are left out."""
    found: dict[Group, list[str]] = {}
    for name in names:
        found.setdefault(group_of(name), []).append(name)
    return [
        SharedNames(
            xxh3_64_intdigest(repr(group).encode()),
            held,
            sum(xxh3_64_intdigest(name.encode()) for name in held) % _PRIME,
        )
        for group, held in found.items()
        if len(group) > 1
    ]


class ValueDigests:
    """Digests of the values that a rank holds and others do too."""

    def __init__(self, values: Iterable[tuple[Sequence[SharedNames], int]]) -> None:
        """The names of each value, and its checksum."""
        self._values = [*values]

    def by_group(self) -> dict[int, int]:
        """One digest for all values that the same ranks hold.

        A sum, whatever the order: ranks may have their values in different orders, and thousands
        of names of one value cost no more than one.
        """
        sums: dict[int, int] = {}
        for shared, value in self._values:
            for one in shared:
                more = one.total * (value % _PRIME)
                sums[one.group] = (sums.get(one.group, 0) + more) % _PRIME
        return sums

    def of(self, groups: Collection[int]) -> dict[str, tuple[int, int]]:
        """The digest of each value that these groups hold."""
        return {
            name: (one.group, value)
            for shared, value in self._values
            for one in shared
            if one.group in groups
            for name in one.names
        }


G = TypeVar("G", bound=Hashable)


def groups_that_differ(everyone: Sequence[Mapping[G, int]]) -> list[G]:
    """Groups of which some rank has another digest than the others."""
    first: dict[G, int] = {}
    differ: dict[G, None] = {}
    for found in everyone:
        for group, digest in found.items():
            if first.setdefault(group, digest) != digest:
                differ[group] = None
    return list(differ)


def names_that_differ(
    everyone: Sequence[Mapping[str, tuple[Hashable, int]]],
) -> dict[str, tuple[int, int]]:
    """Tensors that differ between ranks which hold the same elements of them, or values; with two
    of these ranks."""
    first: dict[tuple[str, Hashable], tuple[int, int]] = {}
    differ: dict[str, tuple[int, int]] = {}
    for rank, found in enumerate(everyone):
        for name, (group, digest) in found.items():
            one, theirs = first.setdefault((name, group), (rank, digest))
            if digest != theirs:
                differ.setdefault(name, (one, rank))
    return differ
