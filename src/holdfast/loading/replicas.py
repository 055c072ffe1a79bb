"""What several ranks want alike: read and checked by one of them, and passed on to the others."""

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
from holdfast.loading.read import Wanted, read_tensors, within
from holdfast.planning.read_plan import ReadItem, byte_ranges, read_items
from holdfast.state.shard import Piece

BUNDLE_BYTES = 4 << 20
"""Of one message: whole blocks."""

AHEAD = 4
"""Bundles that a rank has read before it is their turn to be sent, or is reading."""

SENDING = 2
"""Bundles that are still on their way while the next one is taken up."""

_ALIGNMENT = 16
"""Of what lies in a bundle: that of the widest dtype."""

_DIGEST_BYTES = 16

Place = tuple[str, int]
"""A file and an offset in it."""

_Order = tuple[Place, tuple[int, ...], tuple[int, ...], str]
"""Where an item is stored, and what else tells it from others: items are put in this order, in
whatever order a rank names them."""


def _at(move: ReadItem) -> Place:
    return move.chunk.file, move.chunk.item.offset


@dataclass(frozen=True, slots=True, eq=False)
class _Box:
    """A box of a tensor that lies in one chunk."""

    name: str
    dtype: torch.dtype
    move: ReadItem
    target: torch.Tensor

    @property
    def place(self) -> _Order:
        region = self.move.region
        return _at(self.move), region.start, region.stop, self.name

    @property
    def nbytes(self) -> int:
        return self.move.region.num_elements * self.dtype.itemsize

    def wanted(self, room: torch.Tensor) -> Wanted:
        """The box as what is to be read into `room`."""
        shape = self.move.region.shape
        piece = Piece(self.move.region, Region.whole(shape))
        return Wanted(self.name, [piece], room.view(self.dtype).view(shape))

    def take(self, room: torch.Tensor) -> None:
        put(self.target, room.view(self.dtype).view(self.move.region.shape), self.name)


@dataclass(frozen=True, slots=True, eq=False)
class _Stretch:
    """Bytes `start` to `stop` of a chunk, of a box whose elements follow each other there."""

    name: str
    dtype: torch.dtype
    move: ReadItem
    target: torch.Tensor
    """Where the whole box goes, of which byte `first` is the first one."""

    first: int
    start: int
    stop: int

    @property
    def place(self) -> _Order:
        return _at(self.move), (self.start,), (self.stop,), self.name

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def read(self, source: Source, room: torch.Tensor) -> int:
        """Fill `room`, checked. Returns the bytes read."""
        chunk = self.move.chunk
        assert chunk.data_offset is not None
        span = Span(chunk.data_offset, chunk.region.num_elements * self.dtype.itemsize)
        checksums = source.checksums(chunk, span.nbytes)
        spare = torch.empty(ROOM_BYTES, dtype=torch.uint8, device="cpu").numpy().data
        with source.store.open(source.key(chunk.file)) as reader:
            data = ChunkData(source, self.name, (chunk.file, span), checksums, reader, spare)
            data.read(self.start, self.stop, room.numpy().data)
        return data.num_read

    def take(self, room: torch.Tensor) -> None:
        first = (self.start - self.first) // self.dtype.itemsize
        _lay(self.target, first, room.view(self.dtype), self.name)


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """The container of a value."""

    name: str
    entry: ValueEntry
    containers: dict[Place, bytes]

    @property
    def place(self) -> _Order:
        # Not its name: ranks may know one container by different ones.
        return (self.entry.file, self.entry.item.offset), (), (), ""

    @property
    def nbytes(self) -> int:
        return self.entry.item.nbytes

    def read(self, source: Source, room: torch.Tensor) -> int:
        room.numpy().data[:] = read_value(source, self.name, self.entry)
        return self.nbytes

    def take(self, room: torch.Tensor) -> None:
        self.containers[self.place[0]] = room.numpy().tobytes()


_Item = _Box | _Stretch | _Value
"""A part of what is wanted that goes in one message. `take` brings it from there to its own place.
"""


def _lay(target: torch.Tensor, start: int, found: torch.Tensor, name: str) -> None:
    """Copy elements into `target` from number `start` on, in row-major order: whole rows at once,
    and what there is of the rows before and after them."""
    if target.ndim <= 1:
        put(target.reshape(-1)[start : start + len(found)], found, name)
        return
    row = target[0].numel()
    first, skipped = divmod(start, row)
    if skipped or len(found) < row:
        head = min(row - skipped, len(found))
        _lay(target[first], skipped, found[:head], name)
        found, first = found[head:], first + 1
    rows = len(found) // row
    if rows:
        whole = target[first : first + rows]
        put(whole, found[: rows * row].view(whole.shape), name)
    if len(found) > rows * row:
        _lay(target[first + rows], 0, found[rows * row :], name)


# ----------------------------------------------------------------------------- what a rank asks for


@dataclass(frozen=True, slots=True, eq=False)
class _Ask:
    """A piece of a tensor, or a value: what others may want alike."""

    digest: bytes
    items: Callable[[], Iterable[_Item]]
    """Its parts, where it is shared."""

    alone: Wanted | None = None
    """How it is read where nobody else wants it; None for a value, which is read as it is decoded.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """All that a rank wants."""

    asks: Sequence[_Ask]
    alone: Sequence[Wanted]
    """What it reads for itself, whoever else wants it."""

    containers: dict[Place, bytes]
    """Of the values that it shared with others, once they are read."""


def ask(source: Source, wanted: Sequence[Wanted], values: Mapping[str, ValueEntry]) -> Asked:
    """What this rank wants, in a form that `read_shared` can compare with what others want.

    Raises:
        DamagedError: as `read_tensors`, of what the index says.
    """
    asks: list[_Ask] = []
    alone: list[Wanted] = []
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        for piece in want.pieces:
            one = Wanted(want.name, [piece], want.local)
            found = read_items(want.name, entry, piece.region)
            if any(_is_whole_only(move, dtype) for move in found):
                alone.append(one)
            elif found:
                digest = _digest(want.name, *piece.region.start, *piece.region.stop)
                asks.append(_Ask(digest, partial(_items, one, dtype, found), one))
    containers: dict[Place, bytes] = {}
    distinct = {(entry.file, entry.item.offset): (name, entry) for name, entry in values.items()}
    for place, (name, value) in distinct.items():
        asks.append(_Ask(_digest(*place), partial(_value, name, value, containers)))
    return Asked(asks, alone, containers)


def _is_whole_only(move: ReadItem, dtype: torch.dtype) -> bool:
    """Whether a chunk can be checked only by who reads all of it: a large one of a program that
    left one checksum of the whole."""
    nbytes = move.region.num_elements * dtype.itemsize
    return move.chunk.first_block is None and nbytes > BUNDLE_BYTES


def _digest(*what: object) -> bytes:
    return xxh3_128_digest("\0".join(map(str, what)).encode())


def _value(name: str, entry: ValueEntry, containers: dict[Place, bytes]) -> list[_Item]:
    return [_Value(name, entry, containers)]


def _items(want: Wanted, dtype: torch.dtype, found: Sequence[ReadItem]) -> Iterator[_Item]:
    """Parts of one piece, of at most `BUNDLE_BYTES` each. They depend on nothing but the checkpoint
    and the piece: all ranks that want it have the same."""
    (piece,) = want.pieces
    for move in found:
        target = within(want.local, piece.local_of(move.region))
        box, shape = move.region.within(move.chunk.region), move.chunk.region.shape
        part = next(byte_ranges(box, shape, dtype.itemsize, WINDOW_BYTES))
        if move.region.num_elements * dtype.itemsize <= BUNDLE_BYTES:
            yield _Box(want.name, dtype, move, target)
        elif part.contiguous and part.box.shape == box.shape:
            at = part.start
            while at < part.stop:
                stop = min((at // BUNDLE_BYTES + 1) * BUNDLE_BYTES, part.stop)
                yield _Stretch(want.name, dtype, move, target, part.start, at, stop)
                at = stop
        else:
            for region in _rows(move.region, dtype.itemsize):
                into = within(target, region.within(move.region))
                yield _Box(want.name, dtype, ReadItem(move.chunk, region), into)


def _rows(region: Region, itemsize: int) -> Iterator[Region]:
    """A box cut along its first long dim, and further where a row is large."""
    if region.num_elements * itemsize <= BUNDLE_BYTES:
        yield region
        return
    dim = next(d for d, size in enumerate(region.shape) if size > 1)
    row = region.num_elements // region.shape[dim] * itemsize
    rows = max(1, BUNDLE_BYTES // row)
    for first in range(region.start[dim], region.stop[dim], rows):
        last = min(first + rows, region.stop[dim])
        start = (*region.start[:dim], first, *region.start[dim + 1 :])
        stop = (*region.stop[:dim], last, *region.stop[dim + 1 :])
        yield from _rows(Region(start, stop), itemsize)


# ------------------------------------------------------------------------- who reads what, and when


@dataclass(frozen=True, slots=True, eq=False)
class _Bundle:
    """What goes in one message."""

    members: Sequence[int]
    """The ranks that want it: the first reads it, each hands it on to the next."""

    items: Sequence[_Item]

    @property
    def nbytes(self) -> int:
        """Of its message: the last byte says whether what lies before it is good."""
        return sum(map(_room_bytes, self.items)) + 1

    def rooms(self, memory: torch.Tensor) -> Iterator[tuple[_Item, torch.Tensor]]:
        """Where each item lies in the message."""
        at = 0
        for item in self.items:
            yield item, memory[at : at + item.nbytes]
            at += _room_bytes(item)


def _room_bytes(item: _Item) -> int:
    return -(-item.nbytes // _ALIGNMENT) * _ALIGNMENT


def _agree(asked: Asked, ranks: Ranks) -> tuple[list[_Bundle], list[Wanted]]:
    """What goes from rank to rank, in an order that all of them keep, and what this rank reads for
    itself. One message from each rank, and one back. Collective.

    The ranks that want the same share the reading of it by bytes: each takes a run of it, in the
    order of the files, and they take turns.
    """
    sent = ranks.gather(b"".join(one.digest for one in asked.asks))
    groups, numbers = ranks.scatter(_grouped(sent))
    items: dict[int, list[_Item]] = {}
    alone = [*asked.alone]
    for one, number in zip(asked.asks, numbers, strict=True):
        if len(groups[number]) > 1:
            items.setdefault(number, []).extend(one.items())
        elif one.alone is not None:
            alone.append(one.alone)
    turns: list[tuple[tuple[int, int, int], _Bundle]] = []
    for number, wanted in items.items():
        bundles = [*_bundled(sorted(wanted, key=lambda item: item.place))]
        members = groups[number]
        total, before = sum(sum(i.nbytes for i in bundle) for bundle in bundles), 0
        taken = [0] * len(members)
        for bundle in bundles:
            run = before * len(members) // max(1, total)
            before += sum(item.nbytes for item in bundle)
            # Groups with little to read begin with different ranks.
            first = (run + number) % len(members)
            turn = taken[run], number, run
            turns.append((turn, _Bundle((*members[first:], *members[:first]), bundle)))
            taken[run] += 1
    turns.sort(key=lambda turn: turn[0])
    return [bundle for _, bundle in turns], alone


_Groups = dict[int, tuple[int, ...]]


def _grouped(sent: Sequence[bytes]) -> list[tuple[_Groups, list[int]]]:
    """For each rank: the groups of ranks that want the same, each with a number, and the number of
    each of its digests."""
    alike: dict[bytes, list[int]] = {}
    for rank, data in enumerate(sent):
        alike.setdefault(data, []).append(rank)
    wanted_by: dict[bytes, list[int]] = {}
    for data, those in alike.items():
        for digest in _digests(data):
            wanted_by.setdefault(digest, []).extend(those)
    known: dict[tuple[int, ...], int] = {}
    number_of = {
        digest: known.setdefault(tuple(sorted(those)), len(known))
        for digest, those in wanted_by.items()
    }
    groups = {number: group for group, number in known.items()}
    answers = {}
    for data in alike:
        numbers = [number_of[digest] for digest in _digests(data)]
        answers[data] = {number: groups[number] for number in numbers}, numbers
    return [answers[data] for data in sent]


def _digests(data: bytes) -> Iterator[bytes]:
    return (data[at : at + _DIGEST_BYTES] for at in range(0, len(data), _DIGEST_BYTES))


def _bundled(items: Sequence[_Item]) -> Iterator[list[_Item]]:
    bundle: list[_Item] = []
    nbytes = 0
    for item in items:
        if bundle and nbytes + _room_bytes(item) > BUNDLE_BYTES:
            yield bundle
            bundle, nbytes = [], 0
        bundle.append(item)
        nbytes += _room_bytes(item)
    if bundle:
        yield bundle


# ------------------------------------------------------------------------------ reading and passing


def read_shared(source: Source, asked: Asked, ranks: Ranks, threads: int) -> int:
    """Fill all that is wanted; what several ranks want alike is read by one of them. Returns the
    bytes read by this one.

    Beside the target it takes seven bundles, and the memory of the threads that read.

    Collective: every rank calls this. What goes wrong on a rank is raised there, once all ranks
    are through: it says in place of its bundles that there is nothing in them.
    """
    bundles, alone = _agree(asked, ranks)
    passing = _Passing(source, ranks)
    with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-read") as pool:
        passing.run(bundles, pool)
    if passing.error is not None:
        raise passing.error
    return passing.num_read + (read_tensors(source, alone, threads) if passing.good else 0)


class _Passing:
    """One rank's part in handing bundles on."""

    def __init__(self, source: Source, ranks: Ranks) -> None:
        self._source, self._ranks = source, ranks
        self.num_read = 0
        self.good = True
        """Off once anything has gone wrong, here or on a rank before this one."""

        self.error: HoldfastError | None = None
        """The first thing that has gone wrong here."""

    def run(self, bundles: Sequence[_Bundle], pool: ThreadPoolExecutor) -> None:
        """Every bundle in its turn. Receiving waits for ranks that are at an earlier bundle, or at
        this one, never at a later one: so there is no circle of ranks that wait for each other."""
        me = self._ranks.rank
        mine = (bundle for bundle in bundles if bundle.members[0] == me)
        ahead = deque(pool.submit(self._read, bundle) for bundle in islice(mine, AHEAD))
        sending: deque[Sending] = deque()
        for bundle in bundles:
            at = bundle.members.index(me)
            if at == 0:
                memory = self._collect(ahead.popleft())
                ahead.extend(pool.submit(self._read, after) for after in islice(mine, 1))
            else:
                memory = torch.empty(bundle.nbytes, dtype=torch.uint8, device="cpu")
                self._ranks.receive(bundle.members[at - 1], memory)
            if at + 1 < len(bundle.members):
                sending.append(self._ranks.send(bundle.members[at + 1], memory))
            self._note(capture(partial(self._take, bundle, memory)))
            while len(sending) > SENDING:
                sending.popleft()()
        for sent in sending:
            sent()

    def _read(self, bundle: _Bundle) -> tuple[torch.Tensor, int | HoldfastError]:
        memory = torch.empty(bundle.nbytes, dtype=torch.uint8, device="cpu")
        done = capture(partial(self._fill, bundle, memory)) if self.good else 0
        memory[-1] = self.good and not isinstance(done, HoldfastError)
        return memory, done

    def _fill(self, bundle: _Bundle, memory: torch.Tensor) -> int:
        boxes: list[Wanted] = []
        num_read = 0
        for item, room in bundle.rooms(memory):
            if isinstance(item, _Box):
                # Together: small ones that lie close to each other are one read.
                boxes.append(item.wanted(room))
            else:
                num_read += item.read(self._source, room)
        return num_read + read_tensors(self._source, boxes, threads=1)

    def _collect(self, read: Future[tuple[torch.Tensor, int | HoldfastError]]) -> torch.Tensor:
        memory, done = read.result()
        self._note(done)
        self.num_read += 0 if isinstance(done, HoldfastError) else done
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
