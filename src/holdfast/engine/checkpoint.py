"""A checkpoint opened for looking into it: nothing is read before it is asked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from holdfast.arguments import shown
from holdfast.catalog.catalog import open_manifest
from holdfast.engine.arguments import region_of
from holdfast.engine.read import Wanted, read_tensors
from holdfast.engine.reshard import moves
from holdfast.engine.root import open_for_reading
from holdfast.engine.source import Source, read_value
from holdfast.engine.values import decode_value
from holdfast.errors import NotFoundError, UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.region import Region
from holdfast.state.shard import Piece

T = TypeVar("T")


class Checkpoint:
    """A checkpoint of Holdfast, or of stock `torch.distributed.checkpoint`."""

    def __init__(self, source: Source) -> None:
        self._source = source

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
        moves(name, entry, box)
        target = torch.empty(box.shape, dtype=getattr(torch, entry.dtype), device="cpu")
        if box.num_elements:
            read_tensors(
                self._source, [Wanted(name, [Piece(box, Region.whole(box.shape))], target)]
            )
        return target

    def value(self, name: str) -> Any:
        """A value that is not a tensor."""
        entry = self._found("value", name, self._source.manifest.values)
        container = read_value(self._source, name, entry)
        return decode_value(name, container, where=f"{self._source.url}/{entry.file}")

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


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint at `path`, its structure checked.

    Raises:
        UsageError: no path.
        NotFoundError: no checkpoint there.
        DamagedError: files are missing or of another size.
    """
    store, name = open_for_reading(path)
    return Checkpoint(Source(store, name, open_manifest(store, name)))
