"""Open a checkpoint to read single tensors and values."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from holdfast.arguments import shown
from holdfast.catalog.arguments import region_of
from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.paths import open_parent
from holdfast.catalog.source import Source, read_value
from holdfast.catalog.steady import UNREADABLE
from holdfast.errors import NotFoundError, UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.region import Region
from holdfast.loading.read import Wanted, read_tensors
from holdfast.planning.read_plan import read_items
from holdfast.state.shard import Piece
from holdfast.state.values import decode_value
from holdfast.uncompiled import uncompiled

T = TypeVar("T")


@uncompiled
def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint at `path` and check its structure. No data is read yet.

    Raises:
        UsageError: `path` is not a path.
        NotFoundError: there is no checkpoint at `path`.
        DamagedError: files are missing, or have another size than the manifest says.
    """
    store, name = open_parent(path)
    opened = open_in(store, name)
    return Checkpoint(opened.source(store), opened)


class Checkpoint:
    """A checkpoint of Holdfast, or of stock `torch.distributed.checkpoint`."""

    def __init__(self, source: Source, opened: Opened | None = None) -> None:
        """`opened` recognizes a replacement of the checkpoint."""
        self._source, self._opened = source, opened

    @property
    def manifest(self) -> Manifest:
        """Index of the checkpoint."""
        return self._source.manifest

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Dtype, global shape and chunks of each tensor, by name."""
        return self._source.manifest.tensors

    def names(self) -> list[str]:
        """Names of all tensors, then of all values."""
        return self._source.manifest.names()

    @uncompiled
    def read(self, name: str, region: Region | tuple[slice, ...] | None = None) -> torch.Tensor:
        """Read a tensor, or a box of its elements, into a new tensor on the CPU. Only those blocks
        are read, and they are checked.

        `region`: a `Region`, or one slice per dim as in indexing (without steps).

        Raises:
            UsageError: the region is not inside the tensor.
            NotFoundError: there is no tensor of that name.
            DamagedError: bytes differ from those that were saved.
        """
        entry = self._entry("tensor", name, self.tensors)
        box = region_of(name, entry.shape, region)
        # Before the allocation: a damaged index may state a huge shape that no chunks fill.
        read_items(name, entry, box)
        target = torch.empty(box.shape, dtype=getattr(torch, entry.dtype), device="cpu")
        if box.num_elements:
            wanted = Wanted(name, [Piece(box, Region.whole(box.shape))], target)
            with self._unless_replaced():
                read_tensors(self._source, [wanted])
        return target

    @uncompiled
    def value(self, name: str) -> Any:
        """Read a value.

        Raises:
            NotFoundError: there is no value of that name.
            DamagedError: bytes differ from those that were saved.
        """
        entry = self._entry("value", name, self._source.manifest.values)
        with self._unless_replaced():
            container = read_value(self._source, name, entry)
        return decode_value(name, container, where=f"{self._source.url}/{entry.file}")

    @contextmanager
    def _unless_replaced(self) -> Iterator[None]:
        """Raise NotFoundError in place of DamagedError if another save replaced the checkpoint."""
        try:
            yield
        except UNREADABLE as error:
            if self._opened is None or not self._opened.was_replaced(self._source.store):
                raise
            raise NotFoundError(
                f"`{self._source.url}` has been replaced or deleted since it was opened",
                hint="open it again",
            ) from error

    def _entry(self, kind: str, name: object, entries: Mapping[str, T]) -> T:
        """The entry of that name.

        Raises:
            UsageError: the name is not text.
            NotFoundError: there is no such entry.
        """
        if not isinstance(name, str):
            raise UsageError(f"`name` must be text, found: {shown(name)}")
        if name in entries:
            return entries[name]
        near = difflib.get_close_matches(name, entries, n=3)
        hint = f"near it: {', '.join(near)}" if near else "`names()` lists what is there"
        # A tensor read as a value, or a value read as a tensor, needs the other method.
        other = {"value": self.tensors, "tensor": self._source.manifest.values}[kind]
        if name in other:
            hint = f'`read("{name}")`' if kind == "value" else f'`value("{name}")`'
        raise NotFoundError(f"`{self._source.url}` holds no {kind} `{name}`", hint=hint)
