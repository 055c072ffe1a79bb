"""A checkpoint opened for looking into it: nothing is read before it is asked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from holdfast.arguments import shown
from holdfast.catalog.arguments import region_of
from holdfast.catalog.source import Source, read_value
from holdfast.catalog.steady import UNREADABLE, fingerprint
from holdfast.errors import NotFoundError, UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.region import Region
from holdfast.loading.opening import open_at
from holdfast.loading.read import Wanted, read_tensors
from holdfast.planning.read_plan import read_items
from holdfast.state.shard import Piece
from holdfast.state.values import decode_value
from holdfast.uncompiled import uncompiled

T = TypeVar("T")


class Checkpoint:
    """A checkpoint of Holdfast, or of stock `torch.distributed.checkpoint`."""

    def __init__(self, source: Source, seen: object = None) -> None:
        """`seen` is the fingerprint of the checkpoint when it was opened; None: it is not known."""
        self._source, self._seen = source, seen

    @property
    def manifest(self) -> Manifest:
        """Everything that is known without reading data."""
        return self._source.manifest

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Dtype, global shape and chunks of each tensor, by name."""
        return self._source.manifest.tensors

    def names(self) -> list[str]:
        """Of all entries: tensors, then values."""
        return self._source.manifest.names()

    @uncompiled
    def read(self, name: str, region: Region | tuple[slice, ...] | None = None) -> torch.Tensor:
        """A tensor, or a box of its elements, on the CPU. Reads only that, and checks it.

        `region` is a `Region`, or a slice for each dim as in indexing (no steps).

        Raises:
            UsageError: a region that this tensor does not have.
            NotFoundError: no tensor of that name.
            DamagedError: the bytes are not those that were written.
        """
        entry = self._found("tensor", name, self.tensors)
        box = region_of(name, entry.shape, region)
        # First, so that a shape without chunks behind it takes no memory.
        read_items(name, entry, box)
        target = torch.empty(box.shape, dtype=getattr(torch, entry.dtype), device="cpu")
        if box.num_elements:
            wanted = Wanted(name, [Piece(box, Region.whole(box.shape))], target)
            with self._unless_replaced():
                read_tensors(self._source, [wanted])
        return target

    @uncompiled
    def value(self, name: str) -> Any:
        """A value that is not a tensor."""
        entry = self._found("value", name, self._source.manifest.values)
        with self._unless_replaced():
            container = read_value(self._source, name, entry)
        return decode_value(name, container, where=f"{self._source.url}/{entry.file}")

    @contextmanager
    def _unless_replaced(self) -> Iterator[None]:
        """Tell a checkpoint that another save has replaced from one that is damaged."""
        try:
            yield
        except UNREADABLE as error:
            source = self._source
            if self._seen is None or fingerprint(source.store, source.folder) == self._seen:
                raise
            raise NotFoundError(
                f"`{source.url}` has been replaced or removed since it was opened",
                hint="open it again",
            ) from error

    def _found(self, kind: str, name: object, there: Mapping[str, T]) -> T:
        """The entry of that name.


        Raises:
            UsageError: the name is no text.
            NotFoundError: there is none.
        """
        if not isinstance(name, str):
            raise UsageError(f"`name` must be text, found: {shown(name)}")
        if name in there:
            return there[name]
        near = difflib.get_close_matches(name, there, n=3)
        # A tensor that was asked for as a value, or the other way round, has no other name.
        other = {"value": self.tensors, "tensor": self._source.manifest.values}[kind]
        hint = f"near it: {', '.join(near)}" if near else "`names()` lists what is there"
        if name in other:
            hint = f'`read("{name}")`' if kind == "value" else f'`value("{name}")`'
        raise NotFoundError(f"`{self._source.url}` holds no {kind} `{name}`", hint=hint)


@uncompiled
def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint at `path`, its structure checked.

    Raises:
        UsageError: no path.
        NotFoundError: no checkpoint there.
        DamagedError: files are missing or of another size.
    """
    store, opened = open_at(path)
    return Checkpoint(Source(store, opened.name, opened.manifest), opened.fingerprint)
