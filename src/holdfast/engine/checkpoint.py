"""A checkpoint opened for looking into it: nothing is read before it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.catalog.steady import UNREADABLE, fingerprint
from holdfast.engine.opening import open_at
from holdfast.engine.read import Wanted, read_tensors
from holdfast.engine.reshard import moves
from holdfast.engine.source import Source, read_value
from holdfast.engine.values import decode_value
from holdfast.errors import NotFoundError, UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.region import Region
from holdfast.state.shard import Piece


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

    def read(self, name: str, region: Region | tuple[slice, ...] | None = None) -> torch.Tensor:
        """A tensor, or a box of its elements, on the CPU. Reads only that, and checks it.

        `region` is a `Region`, or a slice for each dim as in indexing (no steps).

        Raises:
            NotFoundError: no tensor of that name.
            DamagedError: the bytes are not those that were written.
        """
        entry = self._entry(name)
        box = _box(name, entry.shape, region)
        # First, so that a shape without chunks behind it takes no memory.
        moves(name, entry, box)
        target = torch.empty(box.shape, dtype=getattr(torch, entry.dtype))
        if box.num_elements:
            wanted = Wanted(name, [Piece(box, Region.whole(box.shape))], target)
            with self._unless_replaced():
                read_tensors(self._source, [wanted])
        return target

    def value(self, name: str) -> Any:
        """A value that is not a tensor."""
        try:
            entry = self._source.manifest.values[name]
        except KeyError:
            raise self._unknown("value", name, self._source.manifest.values) from None
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

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise self._unknown("tensor", name, self.tensors) from None

    def _unknown(self, kind: str, name: str, there: Mapping[str, object]) -> NotFoundError:
        import difflib

        near = difflib.get_close_matches(name, there, n=3)
        return NotFoundError(
            f"`{self._source.url}` holds no {kind} `{name}`",
            hint=f"near it: {', '.join(near)}" if near else "`names()` lists what is there",
        )


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint at `path`, its structure checked.

    Raises:
        NotFoundError: no checkpoint there.
        DamagedError: files are missing or of another size.
    """
    store, opened = open_at(path)
    return Checkpoint(Source(store, opened.name, opened.manifest), opened.seen)


def _box(name: str, shape: tuple[int, ...], region: Region | tuple[slice, ...] | None) -> Region:
    if region is None:
        return Region.whole(shape)
    if not isinstance(region, Region):
        if len(region) > len(shape) or any(part.step not in (None, 1) for part in region):
            raise UsageError(f"`{name}` of shape {list(shape)} has no region {region}")
        bounds = [part.indices(size) for part, size in zip(region, shape, strict=False)]
        bounds += [(0, size, 1) for size in shape[len(region) :]]
        region = Region(tuple(b[0] for b in bounds), tuple(max(b[0], b[1]) for b in bounds))
    if not region.fits(shape):
        raise UsageError(f"{region} is outside of `{name}` of shape {list(shape)}")
    return region
