"""Let one rank read the data that several ranks want, and send it to the others."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from xxhash import xxh3_128_digest

from holdfast.catalog.source import Source
from holdfast.comm import Ranks, Sending, capture, run_on_all
from holdfast.errors import HoldfastError
from holdfast.format.manifest import ValueEntry
from holdfast.format.region import Region
from holdfast.loading.items import (
    BUNDLE_BYTES,
    Item,
    Place,
    place_of,
    room_bytes,
    rows_items,
    tensor_items,
    value_items,
)
from holdfast.loading.read import Wanted, read_tensors, threads_for
from holdfast.planning.divide import grouped
from holdfast.planning.read_plan import ReadItem, read_items, rows_around
from holdfast.state.shard import Piece

AHEAD = 4
"""Number of bundles that a rank reads in advance."""

SENDING = 2
"""Number of bundles that a rank may still be sending while it handles the next one."""

_DIGEST_BYTES = 16


def read_shared(
    source: Source,
    wanted: Sequence[Wanted],
    values: Mapping[str, ValueEntry],
    ranks: Ranks,
    num_local: int,
) -> tuple[int, Mapping[Place, bytes]]:
    """Fill every wanted tensor, and fetch the containers of those values that several ranks want.
    If several ranks want the same data, or different columns of the same rows, one of them reads
    and checks it, and sends each rank the data that it wants. Returns the bytes read by this rank,
    and the containers, keyed by their places in the files.

    `num_local`: number of ranks on this host.

    A rank needs memory for ten bundles and for the buffers of its reading threads.

    Collective: every rank calls this. An error of one rank is raised on all.

    Raises:
        DamagedError: as for `read_tensors`.
    """
    containers: dict[Place, bytes] = {}
    requests = run_on_all(
        ranks, lambda: [*_requests(source, wanted, values, containers, ranks.rank)]
    )

    def read() -> int:
        bundles, alone = _agree(requests, ranks)
        passing = _Passing(source, ranks)
        # Even if the tensors are on a device, bundles are read into host memory.
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
    """Request of this rank for a piece of a tensor, for some columns of a tensor's rows, or for a
    value."""

    digest: bytes | None
    """Hash of the request, equal on all ranks that want the same data, or columns of the same rows.
    None if each rank reads the data for itself, even if others want it too."""

    items: Callable[[], Iterable[Item]]
    """Function that divides the data into items. It is called if other ranks want the data too."""

    alone: Wanted | None = None
    """Piece to read if no other rank wants it. None for a value, which is read when decoded."""

    cuts: dict[int, Region] = field(default_factory=dict)
    """Box of columns that each rank wants, keyed by rank. Its position is relative to the first
    element of the rows. `_exchange_cuts` adds the boxes of the other ranks. Empty if all ranks want
    the same data."""


def _requests(
    source: Source,
    wanted: Sequence[Wanted],
    values: Mapping[str, ValueEntry],
    containers: dict[Place, bytes],
    rank: int,
) -> Iterator[_Request]:
    repeats: Counter[bytes] = Counter()
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        dtype: torch.dtype = getattr(torch, entry.dtype)
        for piece in want.pieces:
            alike = []
            for item in read_items(want.name, entry, piece.region):
                rows = _rows_of(item, dtype)
                if rows is None:
                    alike.append(item)
                else:
                    of_item = [Piece(item.region, piece.local_of(item.region))]
                    columns = Wanted(want.name, of_item, want.local)
                    yield _columns(columns, dtype, item, rows, rank, repeats)
            if alike:
                parts = [Piece(item.region, piece.local_of(item.region)) for item in alike]
                part = Wanted(want.name, parts, want.local)
                is_alone = any(_is_read_whole(item, dtype) for item in alike)
                digest = _digest(want.name, *piece.region.start, *piece.region.stop)
                whole = Wanted(want.name, [piece], want.local)
                items = partial(tensor_items, whole, dtype, alike)
                yield _Request(None if is_alone else digest, items, part)
    distinct = {(entry.file, entry.item.offset): (name, entry) for name, entry in values.items()}
    for place, (name, value) in distinct.items():
        yield _Request(_digest(*place), partial(value_items, name, value, containers))


def _rows_of(item: ReadItem, dtype: torch.dtype) -> Region | None:
    """If `item` is a box of columns, return the rows that contain it, as a box of the whole tensor.
    One rank reads them for all ranks that want columns of them. Return None for other boxes, and if
    the rows are large and the manifest does not have the offset of their data."""
    chunk = item.chunk
    rows = rows_around(item.region.within(chunk.region), chunk.region.shape, dtype.itemsize)
    if rows is None:
        return None
    is_large = rows.num_elements * dtype.itemsize > BUNDLE_BYTES
    return None if is_large and chunk.data_offset is None else rows.moved(chunk.region.start)


def _columns(
    want: Wanted,
    dtype: torch.dtype,
    item: ReadItem,
    rows: Region,
    rank: int,
    repeats: Counter[bytes],
) -> _Request:
    """Return the request of `rank`, this rank, for `item`, a box of columns of `rows`. `repeats`:
    counts the requests of this rank for the same rows."""
    digest = _digest("rows", want.name, *place_of(item.chunk), *rows.start, *rows.stop)
    repeats[digest] += 1
    cuts = {rank: item.region.within(rows)}
    items = partial(rows_items, want, dtype, item, rows, cuts, rank)
    # A rank may request the same rows several times. The digest includes the number of the request,
    # so that the first requests of all ranks are equal, the second ones too, and so on.
    return _Request(_digest(digest, repeats[digest]), items, want, cuts)


def _is_read_whole(item: ReadItem, dtype: torch.dtype) -> bool:
    """Whether the item's data can be checked only by reading all of it at once: it is large, and
    another program wrote it, with one checksum for the whole chunk."""
    nbytes = item.region.num_elements * dtype.itemsize
    return item.chunk.first_block is None and nbytes > BUNDLE_BYTES


def _digest(*parts: object) -> bytes:
    return xxh3_128_digest("\0".join(map(str, parts)).encode())


class _Passing:
    """Reads, receives and sends the bundles that this rank wants."""

    def __init__(self, source: Source, ranks: Ranks) -> None:
        self._source, self._ranks = source, ranks
        self.num_read: list[int] = []
        """Number of bytes of each read."""

        self.good = True
        """False once this rank has failed, or has received a bad bundle."""

        self.error: HoldfastError | None = None
        """First error of this rank."""

    def run(self, bundles: Sequence[_Bundle], pool: ThreadPoolExecutor) -> None:
        """Handle every bundle in order.

        A rank that receives a bundle waits only for a rank that is at this bundle or an earlier
        one. So ranks cannot wait for each other in a circle.
        """
        rank = self._ranks.rank
        to_read = (bundle for bundle in bundles if bundle.members[0] == rank)
        reading = deque(pool.submit(self._read, bundle) for bundle in islice(to_read, AHEAD))
        sending: deque[list[Sending]] = deque()
        for bundle in bundles:
            if bundle.members[0] == rank:
                memory = reading.popleft().result()
                reading.extend(pool.submit(self._read, after) for after in islice(to_read, 1))
                message = bundle.message(memory, rank)
            else:
                memory = torch.empty(bundle.nbytes_for(rank), dtype=torch.uint8, device="cpu")
                self._ranks.receive(bundle.sender(rank), memory)
                message = memory
            receivers = bundle.receivers(rank)
            sending.append([self._ranks.send(r, bundle.message(memory, r)) for r in receivers])
            self._note(capture(partial(self._take, bundle, message)))
            while len(sending) > SENDING:
                _wait(sending.popleft())
        for waits in sending:
            _wait(waits)

    def _read(self, bundle: _Bundle) -> torch.Tensor:
        """Read a bundle, in a thread of the pool. Returns its memory."""
        memory = torch.empty(bundle.nbytes, dtype=torch.uint8, device="cpu")
        if self.good:
            self._note(capture(partial(self._fill, bundle, memory)))
        memory[-1] = self.good
        return memory

    def _fill(self, bundle: _Bundle, memory: torch.Tensor) -> None:
        boxes: list[Wanted] = []
        for item, room in _rooms(memory, bundle.items, [item.nbytes for item in bundle.items]):
            read = item.read(self._source, room)
            if isinstance(read, int):
                self.num_read.append(read)
            else:
                boxes.append(read)
        self.num_read.append(read_tensors(self._source, boxes, threads=1))

    def _take(self, bundle: _Bundle, message: torch.Tensor) -> None:
        """If a message is good, copy its items to the memory in which this rank wants them."""
        self.good = self.good and bool(message[-1])
        if self.good:
            sizes = [item.nbytes_for(self._ranks.rank) for item in bundle.items]
            for item, room in _rooms(message, bundle.items, sizes):
                item.take(room)

    def _note(self, outcome: object) -> None:
        if isinstance(outcome, HoldfastError):
            self.good = False
            self.error = self.error or outcome


def _wait(sending: Sequence[Sending]) -> None:
    for wait in sending:
        wait()


# ---------------------------------------------------------------------------- which rank reads what


@dataclass(frozen=True, slots=True, eq=False)
class _Bundle:
    """Items that one rank reads together, and sends to the other ranks that want them.

    If these ranks want the same data, one message has all of it, and each rank passes the message
    on to the next. If they want different columns, the rank that reads sends each of the others a
    message with its columns. The last byte of a message is 1 if the data before it is good.
    """

    turn: tuple[int, int, int, int]
    """Position among all bundles: every rank handles its bundles in this order."""

    members: Sequence[int]
    """Ranks that want the bundle. The first of them reads it."""

    items: Sequence[Item]

    @property
    def nbytes(self) -> int:
        """Size of the data that is read, plus the last byte, which says if the data is good."""
        return sum(room_bytes(item.nbytes) for item in self.items) + 1

    def nbytes_for(self, rank: int) -> int:
        """Size of the message to a rank."""
        return sum(room_bytes(item.nbytes_for(rank)) for item in self.items) + 1

    def sender(self, rank: int) -> int:
        """Return the rank that sends the message to `rank`."""
        return self.members[0 if self._is_cut else self.members.index(rank) - 1]

    def receivers(self, rank: int) -> Sequence[int]:
        """Return the ranks that `rank` sends a message to."""
        position = self.members.index(rank)
        if self._is_cut:
            return () if position else self.members[1:]
        return self.members[position + 1 : position + 2]

    def message(self, memory: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the message to `rank`. `memory`: the bundle, as it was read or received."""
        if not self._is_cut:
            return memory
        packed = torch.empty(self.nbytes_for(rank), dtype=torch.uint8, device="cpu")
        rooms = _rooms(packed, self.items, [item.nbytes_for(rank) for item in self.items])
        read = _rooms(memory, self.items, [item.nbytes for item in self.items])
        for (item, stored), (_, room) in zip(read, rooms, strict=True):
            assert item.rows is not None, "a bundle has rows only, or none"
            item.rows.pack(stored, rank, room)
        packed[-1] = memory[-1]
        return packed

    @property
    def _is_cut(self) -> bool:
        return self.items[0].rows is not None


def _rooms(
    memory: torch.Tensor, items: Sequence[Item], sizes: Sequence[int]
) -> Iterator[tuple[Item, torch.Tensor]]:
    """Yield each item with its part of `memory`. `sizes`: bytes of each item there."""
    offset = 0
    for item, nbytes in zip(items, sizes, strict=True):
        yield item, memory[offset : offset + nbytes]
        offset += room_bytes(nbytes)


def _agree(requests: Sequence[_Request], ranks: Ranks) -> tuple[list[_Bundle], list[Wanted]]:
    """Return the bundles that this rank wants, in the order that all ranks use, and the pieces
    that it reads for itself.

    Collective: each rank sends rank 0 a message and gets one back. Ranks that want columns of the
    same rows send each other messages.
    """
    digests = [request.digest for request in requests if request.digest]
    groups, numbers = ranks.scatter(_grouped(ranks.gather(b"".join(digests))))
    number_of = dict(zip(digests, numbers, strict=True))
    shared: dict[int, list[_Request]] = {}
    alone: list[Wanted] = []
    for request in requests:
        number = number_of[request.digest] if request.digest else None
        if number is not None and len(groups[number]) > 1:
            shared.setdefault(number, []).append(request)
        elif request.alone is not None:
            alone.append(request.alone)
    bundles: list[_Bundle] = []
    for number, of_group in sorted(shared.items()):
        columns = [request for request in of_group if request.cuts]
        _exchange_cuts(columns, groups[number], ranks)
        alike = [request for request in of_group if not request.cuts]
        for kind, wanted in enumerate((alike, columns)):
            items = [item for request in wanted for item in request.items()]
            bundles += _bundles(items, groups[number], number, kind)
    return sorted(bundles, key=lambda bundle: bundle.turn), alone


def _exchange_cuts(requests: Sequence[_Request], members: Sequence[int], ranks: Ranks) -> None:
    """For each request, tell the other ranks in `members` which columns this rank wants, and add
    the columns that they want to the `cuts` of the request.

    Collective over `members`, which all have requests with these digests.
    """
    if not requests:
        return
    # Sort, since all members must send and receive the columns in the same order.
    requests = sorted(requests, key=lambda request: request.digest or b"")
    own = [request.cuts[ranks.rank] for request in requests]
    numbers = torch.tensor([n for cut in own for n in cut.start + cut.stop], device="cpu")
    others = [member for member in members if member != ranks.rank]
    sending = [ranks.send(other, numbers) for other in others]
    for other in others:
        theirs = torch.empty_like(numbers)
        ranks.receive(other, theirs)
        received = iter(theirs.tolist())
        for request, cut in zip(requests, own, strict=True):
            start = tuple(islice(received, len(cut.start)))
            request.cuts[other] = Region(start, tuple(islice(received, len(cut.start))))
    _wait(sending)


def _bundles(
    items: Sequence[Item], members: Sequence[int], number: int, kind: int
) -> Iterator[_Bundle]:
    """Divide items into bundles. `members`: the ranks that want the items. `number`: number of this
    group of ranks. `kind`: 0 if all of them want the whole items, 1 if they want columns. `kind`
    only decides the order of the bundles.

    Each member reads an equal share of the bytes, which is contiguous in file order. The order of
    all bundles begins with the first bundle of each member, then the second of each, and so on.
    """
    in_order = sorted(items, key=lambda item: item.sort_key)
    total, before = sum(item.nbytes for item in items), 0
    num_taken = [0] * len(members)
    for bundled in grouped(in_order, lambda item: room_bytes(item.nbytes), BUNDLE_BYTES):
        share = before * len(members) // max(1, total)
        before += sum(item.nbytes for item in bundled)
        # A group with few bytes has only a first share. Add the group's number, so that the lowest
        # rank of each group does not always read it.
        first = (share + number) % len(members)
        in_turn = (*members[first:], *members[:first])
        yield _Bundle((num_taken[share], number, kind, share), in_turn, bundled)
        num_taken[share] += 1


_Groups = dict[int, tuple[int, ...]]
"""Groups of ranks that want the same data, keyed by number of the group."""


def _grouped(sent: Sequence[bytes]) -> list[tuple[_Groups, list[int]]]:
    """Return, for each rank, the groups that it is in, and the group number of each digest that it
    sent. `sent`: concatenated digests of each rank's requests."""
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
