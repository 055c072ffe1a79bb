"""Divide data that several ranks want into parts that one rank reads, and sends to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from holdfast.catalog.source import ROOM_BYTES, WINDOW_BYTES, ChunkData, Source, read_value
from holdfast.format.manifest import Chunk, Span, ValueEntry
from holdfast.format.region import Region, boxes_of_run
from holdfast.loading.fit import put
from holdfast.loading.read import Wanted
from holdfast.planning.divide import aligned, divide
from holdfast.planning.read_plan import ReadItem, byte_ranges
from holdfast.state.layout import box_of
from holdfast.state.shard import Piece

BUNDLE_BYTES = 4 << 20
"""Most bytes of the items that are sent as one message, a multiple of the block size."""

_ALIGNMENT = 16
"""Alignment in bytes of each item in a message: the itemsize of the widest dtype."""

Place = tuple[str, int]
"""A file, and an offset in it."""

Read = Callable[[Source, torch.Tensor], "Wanted | int"]
"""`read(source, room)`: reads an item into the memory `room`, checks it, and returns the number of
bytes read. Or it reads nothing, and returns a `Wanted` for this memory: then the caller reads the
item, together with boxes that lie close to it in the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """Data that several ranks want and that one message can hold: part of a tensor, or a value."""

    sort_key: tuple[Place, tuple[int, ...], tuple[int, ...], str]
    """Place of the chunk or container; start and stop of the region or of the range of bytes; name.
    All ranks sort the items by this key, so that they have the same order."""

    nbytes: int
    read: Read
    take: Callable[[torch.Tensor], None]
    """`take(room)`: copies the item from `room`, its part of the message, to the memory in which
    this rank wants it."""

    rows: Rows | None = None
    """Columns of the item that each rank wants. None if each rank wants the whole item."""

    def nbytes_for(self, rank: int) -> int:
        """Return the number of bytes of the item that `rank` wants."""
        return self.nbytes if self.rows is None else self.rows.nbytes_for(rank)


def room_bytes(nbytes: int) -> int:
    """Return the number of bytes that an item of `nbytes` occupies in a message: `nbytes`, rounded
    up to the alignment."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Run of consecutive elements of some rows of a tensor. Each rank wants only some columns of
    these rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the box that the rows form."""

    first: int
    """Row-major index in this box of the first element of the run."""

    count: int
    """Number of elements in the run."""

    cuts: Mapping[int, Region]
    """Box of columns that each rank wants, keyed by rank. Its position is relative to the first
    element of the rows."""

    def nbytes_for(self, rank: int) -> int:
        elements = sum(part.num_elements for _, _, part in self._parts(self.cuts[rank]))
        return elements * self.dtype.itemsize

    def pack(self, room: torch.Tensor, rank: int, packed: torch.Tensor) -> None:
        """Copy the elements that `rank` wants to `packed`, one after the other. `room`: all
        elements of the run."""
        elements, packed = room.view(self.dtype), packed.view(self.dtype)
        position = 0
        for start, box, part in self._parts(self.cuts[rank]):
            stored = elements[start : start + box.num_elements].view(box.shape)
            stop = position + part.num_elements
            packed[position:stop].view(part.shape).copy_(stored[part.within(box).slices()])
            position = stop

    def unpack(self, packed: torch.Tensor, *, cut: Region, target: torch.Tensor, name: str) -> None:
        """Copy the elements of the box `cut`, which `pack` has packed, to their places in `target`,
        the memory for all elements of this box. `name`: name of the tensor, for messages."""
        packed, position = packed.view(self.dtype), 0
        for _, _, part in self._parts(cut):
            stop = position + part.num_elements
            columns = packed[position:stop].view(part.shape)
            put(target[part.within(cut).slices()], columns, name)
            position = stop

    def _parts(self, cut: Region) -> Iterator[tuple[int, Region, Region]]:
        """Divide the run into boxes, and yield those that have elements of `cut`: the index of the
        box's first element in the run, the box, and the part of the box that is in `cut`."""
        start = 0
        for box in boxes_of_run(self.shape, self.first, self.count):
            part = box & cut
            if part.num_elements:
                yield start, box, part
            start += box.num_elements


def tensor_items(want: Wanted, dtype: torch.dtype, read: Sequence[ReadItem]) -> Iterator[Item]:
    """Divide the only piece of `want` into items of at most `BUNDLE_BYTES`. `read`: the read items
    of this piece. The result depends only on the checkpoint and the piece, so all ranks that want
    the piece make equal items."""
    (piece,) = want.pieces
    for item in read:
        target = box_of(want.local, piece.local_of(item.region))
        box, shape = item.region.within(item.chunk.region), item.chunk.region.shape
        stored = next(byte_ranges(box, shape, dtype.itemsize, WINDOW_BYTES))
        if item.region.num_elements * dtype.itemsize <= BUNDLE_BYTES:
            yield _box_item(want.name, dtype, item, target)
        elif stored.contiguous and stored.box.shape == box.shape:
            whole = Region.whole(item.region.shape)
            yield from _contiguous_items(want.name, dtype, item.chunk, item.region, whole, target)
        else:
            for region in divide(item.region, BUNDLE_BYTES // dtype.itemsize):
                rows = box_of(target, region.within(item.region))
                yield _box_item(want.name, dtype, ReadItem(item.chunk, region), rows)


def _box_item(name: str, dtype: torch.dtype, item: ReadItem, target: torch.Tensor) -> Item:
    """Make the `Item` for a box of elements in one chunk. `target`: memory for these elements."""
    region, shape = item.region, item.region.shape

    def take(room: torch.Tensor) -> None:
        put(target, room.view(dtype).view(shape), name)

    sort_key = (place_of(item.chunk), region.start, region.stop, name)
    nbytes = region.num_elements * dtype.itemsize
    return Item(sort_key, nbytes, _box_reader(name, dtype, region), take)


def rows_items(
    want: Wanted,
    dtype: torch.dtype,
    item: ReadItem,
    rows: Region,
    cuts: Mapping[int, Region],
    rank: int,
) -> Iterator[Item]:
    """Divide whole rows of one chunk into items of at most `BUNDLE_BYTES`. `rows`: position of the
    rows in the whole tensor. `item`: the columns of these rows that this rank wants. `rank`: number
    of this rank. `cuts`: see `Rows`."""
    (piece,) = want.pieces
    target = box_of(want.local, piece.local_of(item.region))
    yield from _contiguous_items(want.name, dtype, item.chunk, rows, cuts[rank], target, cuts=cuts)


def _contiguous_items(
    name: str,
    dtype: torch.dtype,
    chunk: Chunk,
    region: Region,
    cut: Region,
    target: torch.Tensor,
    *,
    cuts: Mapping[int, Region] | None = None,
) -> Iterator[Item]:
    """Divide a box that is contiguous in its chunk into items of at most `BUNDLE_BYTES`. `region`:
    position of the box in the whole tensor. `cut`: part of the box that this rank wants. `target`:
    memory for this part. `cuts`: see `Rows`; None if all ranks want the whole box."""

    def item(
        place: tuple[tuple[int, ...], tuple[int, ...]], first: int, count: int, read: Read
    ) -> Item:
        elements = Rows(dtype, region.shape, first, count, cuts or {})
        return Item(
            sort_key=(place_of(chunk), place[0], place[1], name),
            nbytes=count * dtype.itemsize,
            read=read,
            take=partial(elements.unpack, cut=cut, target=target, name=name),
            rows=None if cuts is None else elements,
        )

    if region.num_elements * dtype.itemsize <= BUNDLE_BYTES:
        reader = _box_reader(name, dtype, region)
        yield item((region.start, region.stop), 0, region.num_elements, reader)
        return
    box = region.within(chunk.region)
    (stored,) = byte_ranges(box, chunk.region.shape, dtype.itemsize, WINDOW_BYTES)
    for start, stop in aligned(stored.start, stored.stop, BUNDLE_BYTES):
        reader = _run_reader(name, dtype, chunk, (start, stop))
        first, count = (start - stored.start) // dtype.itemsize, (stop - start) // dtype.itemsize
        yield item(((start,), (stop,)), first, count, reader)


def _box_reader(name: str, dtype: torch.dtype, region: Region) -> Read:
    """Return a `Read` for the box `region` of a tensor: it returns a `Wanted`, for its caller to
    read."""
    piece = Piece(region, Region.whole(region.shape))
    return lambda _, room: Wanted(name, [piece], room.view(dtype).view(region.shape))


def _run_reader(name: str, dtype: torch.dtype, chunk: Chunk, run: tuple[int, int]) -> Read:
    """Return a `Read` that reads the bytes `run` (start and stop) of a chunk's data."""
    start, stop = run

    def read(source: Source, room: torch.Tensor) -> int:
        assert chunk.data_offset is not None
        span = Span(chunk.data_offset, chunk.region.num_elements * dtype.itemsize)
        checksums = source.checksums(chunk, span.nbytes)
        spare = torch.empty(ROOM_BYTES, dtype=torch.uint8, device="cpu").numpy().data
        with source.store.open(source.key(chunk.file)) as reader:
            data = ChunkData(source, name, (chunk.file, span), checksums, reader, spare)
            data.read(start, stop, room.numpy().data)
        return data.num_read

    return read


def value_items(name: str, entry: ValueEntry, containers: dict[Place, bytes]) -> list[Item]:
    """Return a list with one `Item`: the container of a value. The item's `take` adds the bytes of
    the container to `containers`."""
    place = (entry.file, entry.item.offset)

    def read(source: Source, room: torch.Tensor) -> int:
        room.numpy().data[:] = read_value(source, name, entry)
        return entry.item.nbytes

    def take(room: torch.Tensor) -> None:
        containers[place] = room.numpy().tobytes()

    # The sort key has no name, since ranks may use different names for one container.
    return [Item((place, (), (), ""), entry.item.nbytes, read, take)]


def place_of(chunk: Chunk) -> Place:
    return chunk.file, chunk.item.offset
