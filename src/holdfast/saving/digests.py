"""Digests of tensors and values that several ranks hold, to notice replicas that differ."""

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
"""Words per row of the square that an accelerator sums along rows and along columns."""

Group = tuple[int, ...]
"""Ranks that hold the same elements."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A tensor of which other ranks hold the same elements."""

    name: str
    group: Group


def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Digest of each tensor's bytes. Different tensors have
    the same digest with probability 2**-64.

    On an accelerator the digest is a hash of two sums, so tensors can be crafted to collide.
    """
    digests: dict[str, int] = {}
    sums: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_cpu:
            running = xxh3_64()
            for window in host_windows(tensor, dtype_name(tensor.dtype)):
                running.update(window)
            digests[name] = running.intdigest()
        else:
            sums[name] = _sums(tensor)
    if sums:
        # One copy for all tensors, since each copy waits for the device.
        values = torch.stack(list(sums.values())).cpu().tolist()
        for name, pair in zip(sums, values, strict=True):
            digests[name] = xxh3_64_intdigest(struct.pack("<qq", *pair))
    return {name: digests[name] for name in tensors}


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums of the tensor's words, on its device: one weighted by column, one by row."""
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    # Not `reshape(-1)`: a single element counts as contiguous with any stride.
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
    """Tensors of this rank that other ranks hold too, and later their digests."""

    def __init__(self, replicas: Sequence[Replica], tensors: Mapping[str, torch.Tensor]) -> None:
        self._replicas, self._tensors = replicas, dict(tensors)
        self._digests: dict[str, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no other rank holds any of this rank's tensors."""
        return not self._replicas

    def take(self) -> None:
        """Compute the digests of the tensors as they are now, and release the tensors."""
        with torch.no_grad():
            self._digests = digests_of(self._tensors)
        self._tensors = {}

    def by_group(self) -> dict[Group, int]:
        """One digest for all tensors that the same ranks hold, to send instead of thousands."""
        running: dict[Group, xxh3_64] = {}
        for replica in sorted(self._replicas, key=lambda replica: replica.name):
            group = running.setdefault(replica.group, xxh3_64())
            group.update(replica.name.encode() + struct.pack("<Q", self._digests[replica.name]))
        return {group: digest.intdigest() for group, digest in running.items()}

    def of(self, groups: Collection[Group]) -> dict[str, tuple[Group, int]]:
        """Group and digest of each tensor that these groups hold."""
        return {
            replica.name: (replica.group, self._digests[replica.name])
            for replica in self._replicas
            if replica.group in groups
        }


_PRIME = (1 << 61) - 1


class SharedNames(NamedTuple):
    """Names under which the same ranks hold one value."""

    group: int
    """Digest of the ranks' numbers, to send instead of the numbers."""

    names: Sequence[str]
    name_sum: int
    """Sum of the digests of the names, modulo `_PRIME`."""


def shared_names(names: Iterable[str], group_of: Callable[[str], Group]) -> list[SharedNames]:
    """The names of one value, by the ranks that hold them. Names of one rank alone are left out."""
    by_group: dict[Group, list[str]] = {}
    for name in names:
        by_group.setdefault(group_of(name), []).append(name)
    return [
        SharedNames(
            group=xxh3_64_intdigest(repr(group).encode()),
            names=shared,
            name_sum=sum(xxh3_64_intdigest(name.encode()) for name in shared) % _PRIME,
        )
        for group, shared in by_group.items()
        if len(group) > 1
    ]


class ValueDigests:
    """Digests of the values of this rank that other ranks hold too."""

    def __init__(self, values: Iterable[tuple[Sequence[SharedNames], int]]) -> None:
        """`values`: shared names and checksum of each value."""
        self._values = [*values]

    def by_group(self) -> dict[int, int]:
        """One digest for all values that the same ranks hold.

        It is a sum, because ranks may have their values in different orders, and because thousands
        of names of one value then cost no more than one name.
        """
        sums: dict[int, int] = {}
        for shared_names, checksum in self._values:
            for shared in shared_names:
                product = shared.name_sum * (checksum % _PRIME)
                sums[shared.group] = (sums.get(shared.group, 0) + product) % _PRIME
        return sums

    def of(self, groups: Collection[int]) -> dict[str, tuple[int, int]]:
        """Group and checksum of each value that these groups hold, by name."""
        return {
            name: (shared.group, checksum)
            for shared_names, checksum in self._values
            for shared in shared_names
            if shared.group in groups
            for name in shared.names
        }


G = TypeVar("G", bound=Hashable)


def groups_that_differ(everyone: Sequence[Mapping[G, int]]) -> list[G]:
    """Groups whose digest is not the same on all ranks."""
    first: dict[G, int] = {}
    differ: dict[G, None] = {}
    for digests in everyone:
        for group, digest in digests.items():
            if first.setdefault(group, digest) != digest:
                differ[group] = None
    return list(differ)


def names_that_differ(
    everyone: Sequence[Mapping[str, tuple[Hashable, int]]],
) -> dict[str, tuple[int, int]]:
    """Names of tensors or values whose replicas differ, with two ranks whose versions differ."""
    first: dict[tuple[str, Hashable], tuple[int, int]] = {}
    differ: dict[str, tuple[int, int]] = {}
    for rank, digests in enumerate(everyone):
        for name, (group, digest) in digests.items():
            first_rank, first_digest = first.setdefault((name, group), (rank, digest))
            if digest != first_digest:
                differ.setdefault(name, (first_rank, rank))
    return differ
