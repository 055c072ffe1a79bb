"""Digests of tensors and values that several ranks hold, to notice replicas that differ."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from xxhash import xxh3_64, xxh3_64_intdigest

from holdfast.saving.stage import host_windows
from holdfast.state.layout import dtype_name

ROW_WORDS = 2048
"""Row length of the matrix whose row and column sums an accelerator computes, in 8-byte words."""


@torch.no_grad()
def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Compute a digest of each tensor's bytes. Different tensors have the same digest with
    probability 2**-64.

    On an accelerator the digest is a hash of two sums, so tensors can be crafted to collide.
    """
    digests: dict[str, int] = {}
    sums: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_cpu:
            running = xxh3_64()
            for window in host_windows(tensor, dtype_name(tensor.dtype)):
                running.update(window)
            digests[name] = running.intdigest()
        else:
            sums.setdefault(tensor.device, {})[name] = _sums(tensor)
    for of_device in sums.values():
        # One copy for all tensors, since each copy waits for the device.
        values = torch.stack(list(of_device.values())).cpu().tolist()
        for name, pair in zip(of_device, values, strict=True):
            digests[name] = xxh3_64_intdigest(struct.pack("<qq", *pair))
    return digests


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """Compute two sums of the tensor's bytes, on its device. The bytes form a matrix of 8-byte
    words. One sum is weighted by column, the other by row."""
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    # Not by `reshape(-1)`, which keeps the stride of a single element, so that `view` fails.
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


class SharedNames(NamedTuple):
    """Names of one tensor or value. The same ranks hold it under each of these names."""

    group: int
    """Digest of the ranks' numbers, to send instead of the numbers."""

    names: Sequence[str]
    name_sum: int
    """Sum of the digests of the names, modulo `_PRIME`."""


_PRIME = (1 << 61) - 1


def shared_names(
    entries: Iterable[Iterable[str]], groups: Mapping[str, Sequence[int]]
) -> dict[str, list[SharedNames]]:
    """Find the names of each entry that other ranks hold too, grouped by the ranks that hold them.
    The result is keyed by the first name of the entry.

    `entries`: all names of each tensor and value.
    `groups`: ranks that hold each name, without the names that only this rank holds.
    """
    # Hash each group once, by identity: thousands of names share one object, which may list
    # thousands of ranks.
    distinct = {id(group): group for group in groups.values()}
    digests = {key: xxh3_64_intdigest(repr(group).encode()) for key, group in distinct.items()}
    shared: dict[str, list[SharedNames]] = {}
    for names in entries:
        by_group: dict[int, list[str]] = {}
        for name in names:
            if name in groups:
                by_group.setdefault(digests[id(groups[name])], []).append(name)
        if by_group:
            shared[next(iter(names))] = [
                SharedNames(group, held, sum(map(_name_digest, held)) % _PRIME)
                for group, held in by_group.items()
            ]
    return shared


def _name_digest(name: str) -> int:
    return xxh3_64_intdigest(name.encode())


class Digests:
    """Digests of the tensors and values of this rank that other ranks hold too."""

    def __init__(self, entries: Iterable[tuple[Sequence[SharedNames], int]] = ()) -> None:
        """`entries`: shared names and digest of each tensor or value."""
        self._entries = [*entries]

    def by_group(self) -> dict[int, int]:
        """Return one digest per group of ranks, of everything that the group holds, keyed by
        `SharedNames.group`. It is sent instead of thousands of digests.

        The digest is a sum, because ranks may have their entries in different orders, and because a
        value with thousands of names then costs no more than a value with one name.
        """
        sums: dict[int, int] = {}
        for shared_names, digest in self._entries:
            for shared in shared_names:
                product = shared.name_sum * (digest % _PRIME)
                sums[shared.group] = (sums.get(shared.group, 0) + product) % _PRIME
        return sums

    def of(self, groups: Collection[int]) -> dict[str, tuple[int, int]]:
        """Return the group and digest of each tensor and value that these groups hold, by name."""
        return {
            name: (shared.group, digest)
            for shared_names, digest in self._entries
            for shared in shared_names
            if shared.group in groups
            for name in shared.names
        }


class Replicas:
    """Tensors of this rank that other ranks hold too, until `take` replaces them by digests."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], shared: Mapping[str, Sequence[SharedNames]]
    ) -> None:
        self.tensors: Mapping[str, torch.Tensor] = tensors
        self._shared = shared
        self.digests: Digests = Digests()

    def take(self) -> None:
        """Compute the digests of the tensors as they are now, and release the tensors."""
        digests = digests_of(self.tensors)
        self.digests = Digests((self._shared[name], one) for name, one in digests.items())
        self.tensors = {}


def groups_that_differ(everyone: Sequence[Mapping[int, int]]) -> list[int]:
    """Return the groups whose digest is not the same on all ranks of the group. `everyone`: the
    digests of each rank, by group."""
    first: dict[int, int] = {}
    differ: dict[int, None] = {}
    for digests in everyone:
        for group, digest in digests.items():
            if first.setdefault(group, digest) != digest:
                differ[group] = None
    return list(differ)


def names_that_differ(
    everyone: Sequence[Mapping[str, tuple[int, int]]],
) -> dict[str, tuple[int, int]]:
    """Return two ranks whose versions differ for each tensor or value that differs, keyed by name.
    `everyone`: for each rank, the group and digest of each name."""
    first: dict[tuple[str, int], tuple[int, int]] = {}
    differ: dict[str, tuple[int, int]] = {}
    for rank, digests in enumerate(everyone):
        for name, (group, digest) in digests.items():
            first_rank, first_digest = first.setdefault((name, group), (rank, digest))
            if digest != first_digest:
                differ.setdefault(name, (first_rank, rank))
    return differ
