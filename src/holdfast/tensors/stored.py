"""The tensors of any checkpoint, by its manifest: read by boxes, every block checked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from holdfast.catalog.source import ROOM_BYTES, WINDOW_BYTES, ChunkData, Source, lacks
from holdfast.errors import DamagedError, NotFoundError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Chunk, Span, TensorEntry
from holdfast.format.region import Region
from holdfast.format.torchzip import StoredTensor, contiguous_strides, locate
from holdfast.planning.read_plan import ByteRange, byte_ranges, read_items
from holdfast.storage.store import PlainReader
from holdfast.tensors.lazy import TensorInfo
from holdfast.tensors.numbers import Array, box_of, raw_type


class StoredTensors:
    """What a manifest lists, whatever format it is of."""

    def __init__(self, source: Source, strides: Mapping[str, tuple[int, ...]]) -> None:
        """`strides`: of tensors that do not lie row by row, where the manifest cannot say."""
        self._source, self._strides = source, strides
        self._located: dict[tuple[str, int], StoredTensor] = {}
        tensors = source.manifest.tensors
        self.held = {name: TensorInfo(entry.dtype, entry.shape) for name, entry in tensors.items()}

    def read(self, name: str, region: Region) -> Array:
        entry = self._source.manifest.tensors[name]
        found = np.empty(region.shape, raw_type(entry.dtype))
        for move in read_items(name, entry, region):
            within = move.region.within(Region(region.start, move.region.stop))
            try:
                self._fill(name, entry, move.chunk, move.region, box_of(found, within))
            except NotFoundError as error:
                raise lacks(self._source, move.chunk.file) from error
        return found

    def _fill(
        self, name: str, entry: TensorEntry, chunk: Chunk, region: Region, target: Array
    ) -> None:
        """Bring one region of one chunk into `target`, which has its shape."""
        itemsize, shape = dtype_of(entry.dtype).itemsize, chunk.region.shape
        placed = self._placed(name, entry, chunk)
        box = region.within(chunk.region)
        rows = contiguous_strides(shape)
        checksums = self._source.checksums(chunk, chunk.region.num_elements * itemsize)
        reader = PlainReader(self._source.store, self._source.key(chunk.file))
        room = memoryview(bytearray(ROOM_BYTES))
        data = ChunkData(self._source, name, (chunk.file, placed.data), checksums, reader, room)
        if placed.strides != rows and prod(shape) > 1:
            # As a transposed parameter is kept. Rare: read the chunk whole, then pick.
            whole = np.empty(placed.data.nbytes // itemsize, target.dtype)
            data.read(0, whole.nbytes, _memory(whole))
            seen = as_strided(whole, shape, [stride * itemsize for stride in placed.strides])
            target[...] = box_of(seen, box)
            return
        for part in byte_ranges(box, shape, itemsize, WINDOW_BYTES):
            _read_part(data, part, rows, target)

    def _placed(self, name: str, entry: TensorEntry, chunk: Chunk) -> StoredTensor:
        """Where a chunk's elements are, and how they lie."""
        shape = chunk.region.shape
        nbytes = chunk.region.num_elements * dtype_of(entry.dtype).itemsize
        if chunk.data_offset is not None:
            span = Span(chunk.data_offset, nbytes)
            return StoredTensor(span, entry.dtype, shape, contiguous_strides(shape), 0)
        if name in self._strides:
            return StoredTensor(chunk.item, entry.dtype, shape, self._strides[name], 0)
        key = chunk.file, chunk.item.offset
        if key not in self._located:
            fetch = partial(_fetch, self._source, chunk.file)
            found = locate(fetch, chunk.item, where=f"{chunk.file}:{name}")
            if (found.dtype, found.shape) != (entry.dtype, shape):
                raise DamagedError(
                    f"`{self._source.url}/{chunk.file}`: `{name}` is {found.dtype} "
                    f"{list(found.shape)} in its file, {entry.dtype} {list(shape)} in the index"
                )
            self._located[key] = found
        return self._located[key]


def _read_part(data: ChunkData, part: ByteRange, strides: tuple[int, ...], target: Array) -> None:
    into = box_of(target, part.box)
    if part.contiguous and into.flags.c_contiguous:
        data.read(part.start, part.stop, _memory(into))
        return
    staged = np.empty((part.stop - part.start) // into.itemsize, into.dtype)
    data.read(part.start, part.stop, _memory(staged))
    shape, steps = part.box.shape, [stride * into.itemsize for stride in strides]
    into[...] = staged.reshape(shape) if part.contiguous else as_strided(staged, shape, steps)


def _memory(array: Array) -> memoryview:
    """The bytes of a contiguous array, to write into."""
    return array.reshape(-1).view(np.uint8).data


def _fetch(source: Source, file: str, offset: int, nbytes: int) -> bytes:
    return source.store.read(source.key(file), offset, offset + nbytes)
