"""Tensors of an open checkpoint, read by boxes, with every block checked."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from holdfast.catalog.catalog import missing_file_error
from holdfast.catalog.source import ROOM_BYTES, WINDOW_BYTES, ChunkData, Source, locate_chunk
from holdfast.errors import NotFoundError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Chunk, Span, TensorEntry
from holdfast.format.region import Region
from holdfast.format.torchzip import contiguous_strides
from holdfast.planning.read_plan import ByteRange, byte_ranges, read_items
from holdfast.storage.store import PlainReader
from holdfast.tensors.lazy import TensorInfo
from holdfast.tensors.numbers import Array, box_of, raw_type


class StoredTensors:
    """Tensors that a manifest lists, whatever the format of the checkpoint."""

    def __init__(self, source: Source, strides: Mapping[str, tuple[int, ...]]) -> None:
        """`strides`: strides of the tensors that are not row-major, unless their containers state
        them."""
        self._source, self._strides = source, strides
        self._located: dict[tuple[str, int], tuple[Span, tuple[int, ...]]] = {}
        tensors = source.manifest.tensors
        self.infos: dict[str, TensorInfo] = {
            name: TensorInfo(entry.dtype, entry.shape) for name, entry in tensors.items()
        }

    def read(self, name: str, region: Region) -> Array:
        entry = self._source.manifest.tensors[name]
        elements = np.empty(region.shape, raw_type(entry.dtype))
        for item in read_items(name, entry, region):
            within = item.region.within(Region(region.start, item.region.stop))
            try:
                self._fill(name, entry, item.chunk, item.region, box_of(elements, within))
            except NotFoundError as error:
                store, folder = self._source.store, self._source.folder
                raise missing_file_error(store, folder, item.chunk.file) from error
        return elements

    def _fill(
        self, name: str, entry: TensorEntry, chunk: Chunk, region: Region, target: Array
    ) -> None:
        """Read one region of one chunk into `target`, which has the shape of the region."""
        itemsize, shape = dtype_of(entry.dtype).itemsize, chunk.region.shape
        span, strides = self._locate(name, entry, chunk)
        box = region.within(chunk.region)
        row_major = contiguous_strides(shape)
        checksums = self._source.checksums(chunk, chunk.region.num_elements * itemsize)
        reader = PlainReader(self._source.store, self._source.key(chunk.file))
        room = memoryview(bytearray(ROOM_BYTES))
        data = ChunkData(self._source, name, (chunk.file, span), checksums, reader, room)
        if strides != row_major and prod(shape) > 1:
            # Tensors that are not row-major, such as transposed parameters, are rare: to get any
            # part, read the whole chunk.
            elements = np.empty(span.nbytes // itemsize, target.dtype)
            data.read(0, elements.nbytes, _memory(elements))
            strided = as_strided(elements, shape, [stride * itemsize for stride in strides])
            target[...] = box_of(strided, box)
            return
        for byte_range in byte_ranges(box, shape, itemsize, WINDOW_BYTES):
            _read_range(data, byte_range, row_major, target)

    def _locate(self, name: str, entry: TensorEntry, chunk: Chunk) -> tuple[Span, tuple[int, ...]]:
        """Return the span of a chunk's elements in its file, and their strides."""
        shape = chunk.region.shape
        if chunk.data_offset is not None:
            nbytes = chunk.region.num_elements * dtype_of(entry.dtype).itemsize
            return Span(chunk.data_offset, nbytes), contiguous_strides(shape)
        if name in self._strides:
            return chunk.item, self._strides[name]
        key = chunk.file, chunk.item.offset
        if key not in self._located:
            found = locate_chunk(self._source, name, chunk)
            self._located[key] = found.data, found.strides
        return self._located[key]


def _read_range(
    data: ChunkData, byte_range: ByteRange, strides: tuple[int, ...], target: Array
) -> None:
    box = box_of(target, byte_range.box)
    if byte_range.contiguous and box.flags.c_contiguous:
        data.read(byte_range.start, byte_range.stop, _memory(box))
        return
    elements = np.empty((byte_range.stop - byte_range.start) // box.itemsize, box.dtype)
    data.read(byte_range.start, byte_range.stop, _memory(elements))
    box[...] = as_strided(elements, box.shape, [stride * box.itemsize for stride in strides])


def _memory(array: Array) -> memoryview:
    """Return the writable bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data
