"""Read data that several ranks want on one of them only, and pass it on to the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from xxhash import xxh3_128_digest

from holdfast.catalog.source import ROOM_BYTES, WINDOW_BYTES, ChunkData, Source, read_value
from holdfast.comm import Ranks, Sending, capture, run_on_all
from holdfast.errors import HoldfastError
from holdfast.format.manifest import Chunk, Span, ValueEntry
from holdfast.format.region import Region, boxes_of_run
from holdfast.loading.fit import put
from holdfast.loading.read import Wanted, read_tensors, threads_for
from holdfast.planning.divide import aligned, divide, grouped
from holdfast.planning.read_plan import ReadItem, byte_ranges, read_items
from holdfast.state.layout import box_of
from holdfast.state.shard import Piece

BUNDLE_BYTES = 4 << 20
"""Largest message: whole blocks."""

AHEAD = 4
"""Number of bundles that a rank reads in advance."""

SENDING = 2
"""Number of bundles that may still be on their way while the next one is handled."""

_ALIGNMENT = 16
"""Alignment of the items in a bundle: itemsize of the widest dtype."""

_DIGEST_BYTES = 16

Place = tuple[str, int]
"""A file, and an offset in it."""


def read_shared(
    source: Source,
    wanted: Sequence[Wanted],
    values: Mapping[str, ValueEntry],
    ranks: Ranks,
    num_local: int,
) -> tuple[int, Mapping[Place, bytes]]:
    """Fill every wanted tensor, and fetch values. One rank reads and checks what several want, and
    passes it on. Returns the bytes read by this rank, and the containers that were passed on.

    `num_local`: number of ranks on this host. Needs memory for seven bundles and for the buffers of
    the reading threads.

    Collective: every rank calls this. An error of one rank is raised on all.

    Raises:
        DamagedError: as for `read_tensors`.
    """
    containers: dict[Place, bytes] = {}
    requests = run_on_all(ranks, lambda: list(_requests(source, wanted, values, containers)))

    def read() -> int:
        bundles, alone = _agree(requests, ranks)
        passing = _Passing(source, ranks)
        # Bundles are read into host memory, also for devices.
        threads = threads_for(num_local, source)
        with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-read") as pool:
            passing.run(bundles, pool)
        if passing.error is not None:
            raise passing.error
        num_alone = 0
        if passing.good:
            num_alone = read_tensors(source, alone, num_local=num_local)
        return sum(passing.num_read) + num_alone

    return run_on_all(ranks, read), containers


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """A piece of a tensor, or a value, that this rank wants."""

    digest: bytes | None
    """Hash of the request: equal on all ranks that want the same. None if this rank reads it for
    itself even if others want it too."""

    items: Callable[[], Iterable[_Item]]
    """Makes the items, if the request is shared."""

    alone: Wanted | None = None
    """The piece to read if no other rank wants it. None for a value: it is read when decoded."""


def _requests(
    source: Source,
    wanted: Sequence[Wanted],
    values: Mapping[str, ValueEntry],
    containers: dict[Place, bytes],
) -> Iterator[_Request]:
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        for piece in want.pieces:
            read = read_items(want.name, entry, piece.region)
            if read:
                part = Wanted(want.name, [piece], want.local)
                is_alone = any(_is_read_whole(item, dtype) for item in read)
                digest = _digest(want.name, *piece.region.start, *piece.region.stop)
                items = partial(_tensor_items, part, dtype, read)
                yield _Request(None if is_alone else digest, items, part)
    distinct = {(entry.file, entry.item.offset): (name, entry) for name, entry in values.items()}
    for place, (name, value) in distinct.items():
        yield _Request(_digest(*place), partial(_value_items, name, value, containers))


def _is_read_whole(item: ReadItem, dtype: torch.dtype) -> bool:
    """Whether the chunk can be checked only by reading all of it at once: a large chunk of another
    program, which has one checksum for the whole chunk."""
    nbytes = item.region.num_elements * dtype.itemsize
    return item.chunk.first_block is None and nbytes > BUNDLE_BYTES


def _digest(*parts: object) -> bytes:
    return xxh3_128_digest("\0".join(map(str, parts)).encode())


class _Passing:
    """Reads, receives and sends the bundles of one rank."""

    def __init__(self, source: Source, ranks: Ranks) -> None:
        self._source, self._ranks = source, ranks
        self.num_read: list[int] = []
        """Bytes of each read."""

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
                memory = reading.popleft().result()
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

    def _read(self, bundle: _Bundle) -> torch.Tensor:
        """Read a bundle, in a thread of the pool. Returns the message."""
        memory = torch.empty(bundle.nbytes, dtype=torch.uint8, device="cpu")
        if self.good:
            self._note(capture(partial(self._fill, bundle, memory)))
        memory[-1] = self.good
        return memory

    def _fill(self, bundle: _Bundle, memory: torch.Tensor) -> None:
        boxes: list[Wanted] = []
        for item, room in bundle.rooms(memory):
            read = item.read(self._source, room)
            if isinstance(read, int):
                self.num_read.append(read)
            else:
                boxes.append(read)
        self.num_read.append(read_tensors(self._source, boxes, threads=1))

    def _take(self, bundle: _Bundle, memory: torch.Tensor) -> None:
        """Copy the items of a good message to their targets."""
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

    turn: tuple[int, int, int]
    """Position among all bundles: every rank handles its bundles in this order."""

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


def _agree(requests: Sequence[_Request], ranks: Ranks) -> tuple[list[_Bundle], list[Wanted]]:
    """Returns the bundles of this rank, in an order that all ranks keep to, and the tensors that it
    reads for itself.

    Ranks that want the same data share the reading by bytes: each reads one contiguous share of it,
    in file order, and the ranks take turns.

    Collective: one message from each rank, and one back.
    """
    digests = [request.digest for request in requests if request.digest]
    groups, numbers = ranks.scatter(_grouped(ranks.gather(b"".join(digests))))
    number_of = dict(zip(digests, numbers, strict=True))
    items: dict[int, list[_Item]] = {}
    alone: list[Wanted] = []
    for request in requests:
        number = number_of[request.digest] if request.digest else None
        if number is not None and len(groups[number]) > 1:
            items.setdefault(number, []).extend(request.items())
        elif request.alone is not None:
            alone.append(request.alone)
    bundles: list[_Bundle] = []
    for number, wanted in items.items():
        in_order = sorted(wanted, key=lambda item: item.sort_key)
        members = groups[number]
        total, before = sum(item.nbytes for item in wanted), 0
        num_taken = [0] * len(members)
        for bundled in grouped(in_order, _room_bytes, BUNDLE_BYTES):
            share = before * len(members) // max(1, total)
            before += sum(item.nbytes for item in bundled)
            # Without the group's number, low ranks would read the first share of every group.
            first = (share + number) % len(members)
            in_turn = (*members[first:], *members[:first])
            bundles.append(_Bundle((num_taken[share], number, share), in_turn, bundled))
            num_taken[share] += 1
    return sorted(bundles, key=lambda bundle: bundle.turn), alone


_Groups = dict[int, tuple[int, ...]]
"""Ranks that want the same data, by number of the group."""


def _grouped(sent: Sequence[bytes]) -> list[tuple[_Groups, list[int]]]:
    """For each rank: the groups that it is in, and the number of the group of each digest that it
    sent."""
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


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """Part of a request that fits into one message."""

    sort_key: tuple[Place, tuple[int, ...], tuple[int, ...], str]
    """Place of the chunk or container, region or range of bytes, and name: gives all ranks the same
    order."""

    nbytes: int
    read: Callable[[Source, torch.Tensor], Wanted | int]
    """`read(source, room)`: reads the item into `room`, its bytes of the message, checks it, and
    returns the bytes read. Or returns `room` as a tensor to fill, so that boxes close to each other
    are read together."""

    take: Callable[[torch.Tensor], None]
    """`take(room)`: copies the item from the message to its target."""


def _tensor_items(want: Wanted, dtype: torch.dtype, read: Sequence[ReadItem]) -> Iterator[_Item]:
    """Items of at most `BUNDLE_BYTES` that make up one piece. They depend only on the checkpoint
    and the piece, so all ranks that want the piece make equal ones."""
    (piece,) = want.pieces
    for item in read:
        target = box_of(want.local, piece.local_of(item.region))
        box, shape = item.region.within(item.chunk.region), item.chunk.region.shape
        stored = next(byte_ranges(box, shape, dtype.itemsize, WINDOW_BYTES))
        if item.region.num_elements * dtype.itemsize <= BUNDLE_BYTES:
            yield _box_item(want.name, dtype, item, target)
        elif stored.contiguous and stored.box.shape == box.shape:
            for start, stop in aligned(stored.start, stored.stop, BUNDLE_BYTES):
                first = (start - stored.start) // dtype.itemsize
                yield _run_item(want.name, dtype, item.chunk, (start, stop), target, first)
        else:
            for region in divide(item.region, BUNDLE_BYTES // dtype.itemsize):
                rows = box_of(target, region.within(item.region))
                yield _box_item(want.name, dtype, ReadItem(item.chunk, region), rows)


def _box_item(name: str, dtype: torch.dtype, item: ReadItem, target: torch.Tensor) -> _Item:
    """Box of a tensor that lies in one chunk."""
    region, shape = item.region, item.region.shape
    piece = Piece(region, Region.whole(shape))

    def read(_: Source, room: torch.Tensor) -> Wanted:
        return Wanted(name, [piece], room.view(dtype).view(shape))

    def take(room: torch.Tensor) -> None:
        put(target, room.view(dtype).view(shape), name)

    sort_key = (_place(item.chunk), region.start, region.stop, name)
    return _Item(sort_key, region.num_elements * dtype.itemsize, read, take)


def _run_item(
    name: str,
    dtype: torch.dtype,
    chunk: Chunk,
    run: tuple[int, int],
    target: torch.Tensor,
    first: int,
) -> _Item:
    """Bytes `run` of a chunk's data: elements from number `first` on of `target`."""
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

    def take(room: torch.Tensor) -> None:
        elements, position = room.view(dtype), 0
        for box in boxes_of_run(target.shape, first, len(elements)):
            end = position + box.num_elements
            put(target[box.slices()], elements[position:end].view(box.shape), name)
            position = end

    return _Item((_place(chunk), (start,), (stop,), name), stop - start, read, take)


def _value_items(name: str, entry: ValueEntry, containers: dict[Place, bytes]) -> list[_Item]:
    """Container of a value. `take` adds it to `containers`."""
    place = (entry.file, entry.item.offset)

    def read(source: Source, room: torch.Tensor) -> int:
        room.numpy().data[:] = read_value(source, name, entry)
        return entry.item.nbytes

    def take(room: torch.Tensor) -> None:
        containers[place] = room.numpy().tobytes()

    # Without the name: ranks may use different names for one container.
    return [_Item((place, (), (), ""), entry.item.nbytes, read, take)]


def _place(chunk: Chunk) -> Place:
    return chunk.file, chunk.item.offset
