"""Read data that several ranks want on one of them only, and pass it on to the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from xxhash import xxh3_128_digest

from holdfast.catalog.source import ROOM_BYTES, WINDOW_BYTES, ChunkData, Source, read_value
from holdfast.comm import Ranks, Sending, capture
from holdfast.errors import HoldfastError
from holdfast.format.manifest import Span, ValueEntry
from holdfast.format.region import Region
from holdfast.loading.fit import put
from holdfast.loading.read import Wanted, read_tensors
from holdfast.planning.divide import aligned, boxes_of_run, divide, grouped
from holdfast.planning.read_plan import ReadItem, byte_ranges, read_items
from holdfast.state.layout import box_of
from holdfast.state.shard import Piece

BUNDLE_BYTES = 4 << 20
"""Largest message: whole blocks."""

AHEAD = 4
"""Number of bundles that a rank reads before their turn."""

SENDING = 2
"""Number of bundles that may still be on their way while the next one is handled."""

_ALIGNMENT = 16
"""Alignment of the items in a bundle: itemsize of the widest dtype."""

_DIGEST_BYTES = 16

Place = tuple[str, int]
"""A file, and an offset in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Data that one rank wants."""

    shared: Sequence[_Request]
    """Pieces and values that other ranks may want too."""

    alone: Sequence[Wanted]
    """Tensors that this rank reads itself, even if others want them too."""

    containers: Mapping[Place, bytes]
    """Containers of values that were passed on, filled by `read_shared`."""


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """A piece of a tensor, or a value."""

    digest: bytes
    """Hash of the request: equal on all ranks that want the same."""

    items: Callable[[], Iterable[_Item]]
    """Makes the items, if the request is shared."""

    alone: Wanted | None = None
    """The piece to read if no other rank wants it. None for a value: it is read when decoded."""


def collect_requests(
    source: Source, wanted: Sequence[Wanted], values: Mapping[str, ValueEntry]
) -> Requests:
    """List the data that this rank wants, so that `read_shared` can compare it with other ranks.

    Raises:
        DamagedError: the index is damaged, as for `read_tensors`.
    """
    shared: list[_Request] = []
    alone: list[Wanted] = []
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        for piece in want.pieces:
            part = Wanted(want.name, [piece], want.local)
            read = read_items(want.name, entry, piece.region)
            if any(_is_read_whole(item, dtype) for item in read):
                alone.append(part)
            elif read:
                digest = _digest(want.name, *piece.region.start, *piece.region.stop)
                shared.append(_Request(digest, partial(_items, part, dtype, read), part))
    containers: dict[Place, bytes] = {}
    distinct = {(entry.file, entry.item.offset): (name, entry) for name, entry in values.items()}
    for place, (name, value) in distinct.items():
        items = partial(_value_items, name, value, containers)
        shared.append(_Request(_digest(*place), items))
    return Requests(shared, alone, containers)


def _is_read_whole(item: ReadItem, dtype: torch.dtype) -> bool:
    """Whether the chunk can be checked only by reading all of it at once: a large chunk of another
    program, which has one checksum for the whole chunk."""
    nbytes = item.region.num_elements * dtype.itemsize
    return item.chunk.first_block is None and nbytes > BUNDLE_BYTES


def _digest(*parts: object) -> bytes:
    return xxh3_128_digest("\0".join(map(str, parts)).encode())


def read_shared(source: Source, requests: Requests, ranks: Ranks, threads: int) -> int:
    """Fill all requests. One rank reads and checks what several want, and passes it on. Returns the
    bytes read by this rank.

    Needs memory for seven bundles and for the buffers of the reading threads.

    Collective: every rank calls this. If a rank fails, it sends bundles marked as bad, and raises
    its error once all bundles have been passed on.
    """
    bundles, alone = _agree(requests, ranks)
    passing = _Passing(source, ranks)
    with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-read") as pool:
        passing.run(bundles, pool)
    if passing.error is not None:
        raise passing.error
    return passing.num_read + (read_tensors(source, alone, threads) if passing.good else 0)


class _Passing:
    """Reads, receives and sends the bundles of one rank."""

    def __init__(self, source: Source, ranks: Ranks) -> None:
        self._source, self._ranks = source, ranks
        self.num_read = 0
        self.good = True
        """False once this rank has failed, or has received a bad bundle."""

        self.error: HoldfastError | None = None
        """First error of this rank."""

    def run(self, bundles: Sequence[_Bundle], pool: ThreadPoolExecutor) -> None:
        """Handle every bundle in its turn.

        A receiving rank waits only for ranks at the same or an earlier bundle, never a later one.
        So no circle of ranks can wait for each other.
        """
        rank = self._ranks.rank
        to_read = (bundle for bundle in bundles if bundle.members[0] == rank)
        reading = deque(pool.submit(self._read, bundle) for bundle in islice(to_read, AHEAD))
        sending: deque[Sending] = deque()
        for bundle in bundles:
            position = bundle.members.index(rank)
            if position == 0:
                memory = self._finish_read(reading.popleft())
                reading.extend(pool.submit(self._read, after) for after in islice(to_read, 1))
            else:
                memory = torch.empty(bundle.nbytes, dtype=torch.uint8, device="cpu")
                self._ranks.receive(bundle.members[position - 1], memory)
            if position + 1 < len(bundle.members):
                sending.append(self._ranks.send(bundle.members[position + 1], memory))
            self._note(capture(partial(self._take, bundle, memory)))
            while len(sending) > SENDING:
                sending.popleft()()
        for wait in sending:
            wait()

    def _read(self, bundle: _Bundle) -> tuple[torch.Tensor, int | HoldfastError]:
        memory = torch.empty(bundle.nbytes, dtype=torch.uint8, device="cpu")
        outcome = capture(partial(self._fill, bundle, memory)) if self.good else 0
        memory[-1] = self.good and not isinstance(outcome, HoldfastError)
        return memory, outcome

    def _fill(self, bundle: _Bundle, memory: torch.Tensor) -> int:
        boxes: list[Wanted] = []
        num_read = 0
        for item, room in bundle.rooms(memory):
            if isinstance(item, _Box):
                # Read together at the end: small boxes that lie close to each other are one read.
                boxes.append(item.wanted(room))
            else:
                num_read += item.read(self._source, room)
        return num_read + read_tensors(self._source, boxes, threads=1)

    def _finish_read(self, read: Future[tuple[torch.Tensor, int | HoldfastError]]) -> torch.Tensor:
        memory, outcome = read.result()
        self._note(outcome)
        self.num_read += 0 if isinstance(outcome, HoldfastError) else outcome
        return memory

    def _take(self, bundle: _Bundle, memory: torch.Tensor) -> None:
        self.good = self.good and bool(memory[-1])
        if self.good:
            for item, room in bundle.rooms(memory):
                item.take(room)

    def _note(self, outcome: object) -> None:
        if isinstance(outcome, HoldfastError):
            self.good = False
            self.error = self.error or outcome


# ---------------------------------------------------------------------------- which rank reads what


@dataclass(frozen=True, slots=True, eq=False)
class _Bundle:
    """Items of one message."""

    members: Sequence[int]
    """Ranks that want it. The first reads it, and each passes it on to the next."""

    items: Sequence[_Item]

    @property
    def nbytes(self) -> int:
        """Size of the message. Its last byte is 1 if the rest is good."""
        return sum(map(_room_bytes, self.items)) + 1

    def rooms(self, memory: torch.Tensor) -> Iterator[tuple[_Item, torch.Tensor]]:
        """Each item, with its bytes of the message."""
        offset = 0
        for item in self.items:
            yield item, memory[offset : offset + item.nbytes]
            offset += _room_bytes(item)


def _room_bytes(item: _Item) -> int:
    return -(-item.nbytes // _ALIGNMENT) * _ALIGNMENT


def _agree(requests: Requests, ranks: Ranks) -> tuple[list[_Bundle], list[Wanted]]:
    """Returns the bundles of this rank, in an order that all ranks keep to, and the tensors that it
    reads for itself.

    Ranks that want the same data share the reading by bytes: each reads one contiguous share of it,
    in file order, and the ranks take turns.

    Collective: one message from each rank, and one back.
    """
    sent = ranks.gather(b"".join(request.digest for request in requests.shared))
    groups, numbers = ranks.scatter(_grouped(sent))
    items: dict[int, list[_Item]] = {}
    alone = [*requests.alone]
    for request, number in zip(requests.shared, numbers, strict=True):
        if len(groups[number]) > 1:
            items.setdefault(number, []).extend(request.items())
        elif request.alone is not None:
            alone.append(request.alone)
    turns: list[tuple[tuple[int, int, int], _Bundle]] = []
    for number, wanted in items.items():
        in_order = sorted(wanted, key=lambda item: item.sort_key)
        bundles = [*grouped(in_order, _room_bytes, BUNDLE_BYTES)]
        members = groups[number]
        total, before = sum(sum(i.nbytes for i in bundle) for bundle in bundles), 0
        num_taken = [0] * len(members)
        for bundle in bundles:
            share = before * len(members) // max(1, total)
            before += sum(item.nbytes for item in bundle)
            # The number of the group shifts it, so that small groups begin with different ranks.
            first = (share + number) % len(members)
            turn = num_taken[share], number, share
            turns.append((turn, _Bundle((*members[first:], *members[:first]), bundle)))
            num_taken[share] += 1
    turns.sort(key=lambda turn: turn[0])
    return [bundle for _, bundle in turns], alone


_Groups = dict[int, tuple[int, ...]]
"""Ranks that want the same data, by number of the group."""


def _grouped(sent: Sequence[bytes]) -> list[tuple[_Groups, list[int]]]:
    """For each rank its groups, and the group of each digest that it sent."""
    senders: dict[bytes, list[int]] = {}
    for rank, data in enumerate(sent):
        senders.setdefault(data, []).append(rank)
    wanted_by: dict[bytes, list[int]] = {}
    for data, ranks in senders.items():
        for digest in _digests(data):
            wanted_by.setdefault(digest, []).extend(ranks)
    known: dict[tuple[int, ...], int] = {}
    number_of = {
        digest: known.setdefault(tuple(sorted(ranks)), len(known))
        for digest, ranks in wanted_by.items()
    }
    groups = {number: group for group, number in known.items()}
    answers = {}
    for data in senders:
        numbers = [number_of[digest] for digest in _digests(data)]
        answers[data] = {number: groups[number] for number in numbers}, numbers
    return [answers[data] for data in sent]


def _digests(data: bytes) -> Iterator[bytes]:
    return (data[at : at + _DIGEST_BYTES] for at in range(0, len(data), _DIGEST_BYTES))


# ------------------------------------------------------------------------------ items of a message


def _items(want: Wanted, dtype: torch.dtype, read: Sequence[ReadItem]) -> Iterator[_Item]:
    """Items of at most `BUNDLE_BYTES` that make up one piece. They depend only on the checkpoint
    and the piece, so all ranks that want the piece make equal ones."""
    (piece,) = want.pieces
    for item in read:
        target = box_of(want.local, piece.local_of(item.region))
        box, shape = item.region.within(item.chunk.region), item.chunk.region.shape
        stored = next(byte_ranges(box, shape, dtype.itemsize, WINDOW_BYTES))
        if item.region.num_elements * dtype.itemsize <= BUNDLE_BYTES:
            yield _Box(want.name, dtype, item, target)
        elif stored.contiguous and stored.box.shape == box.shape:
            for start, stop in aligned(stored.start, stored.stop, BUNDLE_BYTES):
                yield _Run(want.name, dtype, item, target, stored.start, start, stop)
        else:
            for region in divide(item.region, BUNDLE_BYTES // dtype.itemsize):
                rows = box_of(target, region.within(item.region))
                yield _Box(want.name, dtype, ReadItem(item.chunk, region), rows)


def _value_items(name: str, entry: ValueEntry, containers: dict[Place, bytes]) -> list[_Item]:
    return [_Value(name, entry, containers)]


_SortKey = tuple[Place, tuple[int, ...], tuple[int, ...], str]
"""Place of the item, and its region or bytes and its name: gives all ranks the same order."""


def _place(item: ReadItem) -> Place:
    return item.chunk.file, item.chunk.item.offset


@dataclass(frozen=True, slots=True, eq=False)
class _Box:
    """Box of a tensor that lies in one chunk."""

    name: str
    dtype: torch.dtype
    item: ReadItem
    target: torch.Tensor

    @property
    def sort_key(self) -> _SortKey:
        region = self.item.region
        return _place(self.item), region.start, region.stop, self.name

    @property
    def nbytes(self) -> int:
        return self.item.region.num_elements * self.dtype.itemsize

    def wanted(self, room: torch.Tensor) -> Wanted:
        """The box as a tensor to read into `room`."""
        shape = self.item.region.shape
        piece = Piece(self.item.region, Region.whole(shape))
        return Wanted(self.name, [piece], room.view(self.dtype).view(shape))

    def take(self, room: torch.Tensor) -> None:
        """Copy the box from the message to its target."""
        put(self.target, room.view(self.dtype).view(self.item.region.shape), self.name)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Bytes `start` to `stop` of a chunk, part of a box that is contiguous there."""

    name: str
    dtype: torch.dtype
    item: ReadItem
    target: torch.Tensor
    """Memory of the whole box."""

    box_start: int
    """Offset of the box in the chunk's data."""

    start: int
    stop: int

    @property
    def sort_key(self) -> _SortKey:
        return _place(self.item), (self.start,), (self.stop,), self.name

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def read(self, source: Source, room: torch.Tensor) -> int:
        """Read the bytes into `room` and check them. Returns the bytes read."""
        chunk = self.item.chunk
        assert chunk.data_offset is not None
        span = Span(chunk.data_offset, chunk.region.num_elements * self.dtype.itemsize)
        checksums = source.checksums(chunk, span.nbytes)
        spare = torch.empty(ROOM_BYTES, dtype=torch.uint8, device="cpu").numpy().data
        with source.store.open(source.key(chunk.file)) as reader:
            data = ChunkData(source, self.name, (chunk.file, span), checksums, reader, spare)
            data.read(self.start, self.stop, room.numpy().data)
        return data.num_read

    def take(self, room: torch.Tensor) -> None:
        """Copy the elements from the message to their place in the target."""
        elements = room.view(self.dtype)
        first = (self.start - self.box_start) // self.dtype.itemsize
        start = 0
        for box in boxes_of_run(self.target.shape, first, len(elements)):
            stop = start + box.num_elements
            put(self.target[box.slices()], elements[start:stop].view(box.shape), self.name)
            start = stop


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """Container of a value."""

    name: str
    entry: ValueEntry
    containers: dict[Place, bytes]

    @property
    def sort_key(self) -> _SortKey:
        # Without the name: ranks may use different names for one container.
        return (self.entry.file, self.entry.item.offset), (), (), ""

    @property
    def nbytes(self) -> int:
        return self.entry.item.nbytes

    def read(self, source: Source, room: torch.Tensor) -> int:
        """Read the container into `room` and check it. Returns the bytes read."""
        room.numpy().data[:] = read_value(source, self.name, self.entry)
        return self.nbytes

    def take(self, room: torch.Tensor) -> None:
        """Keep the container of the message."""
        self.containers[self.sort_key[0]] = room.numpy().tobytes()


_Item = _Box | _Run | _Value
"""Part of a request that fits into one message."""
