"""Writes one rank's file in one pass, with checksums taken on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from holdfast.format import checksum
from holdfast.format.manifest import Span, Table
from holdfast.planning.file_layout import FileLayout, TensorItem
from holdfast.storage.store import Buffer, Creating, Writer
from holdfast.timing import Spans

WINDOW_BYTES = 4 << 20
"""Bytes handed to the store at once: whole blocks, few enough to be in cache from the checksum."""

JOINED_BYTES_MAX = 64 << 10
"""Parts below it are joined to one before they are handed on: each costs more to keep apart, from
here to the disk, than to copy."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What one rank has written, durably."""

    file: str = ""
    nbytes: int = 0
    table: Table = field(default_factory=lambda: Table(0, 0))
    values: Mapping[str, tuple[Span, int]] = field(default_factory=dict)
    """Place and checksum of each value's container."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """What each stage has taken so far."""


WindowsOf = Callable[[TensorItem], Iterable[memoryview]]
"""`windows_of(item)`: the raw bytes of a region of a tensor, row-major, at once or in order: each
but the last of `WINDOW_BYTES`, made as it is asked for."""


def write(
    store: Creating,
    folder: str,
    layout: FileLayout,
    data: WindowsOf | memoryview,
    pace: Pace | None = None,
    spans: Spans | None = None,
) -> WriteResult:
    """Write a file, and make its bytes durable: in `spans` the stages `write` and `sync`, which
    also waits for what is still on its way.

    `data` may be memory that is laid out as the file and has the data of all tensors in its place:
    then all else is put there too, and the file written from where it is.
    """
    if not layout.nbytes:
        return WriteResult()
    spans, pace = spans or Spans(), pace or Pace()
    with ExitStack() as file:
        with spans("write"):
            writer = file.enter_context(store.create(f"{folder}/{layout.name}", layout.nbytes))
            if isinstance(data, memoryview):
                packed = _write_memory(writer, layout, data, pace)
            else:
                packed = _write_parts(writer, layout, data, pace)
        with spans("sync"):
            file.close()
    sums = {offset: checksum.checksum(container) for offset, container in layout.containers}
    values = {name: (span, sums[span.offset]) for names, span in layout.values for name in names}
    table = Table(layout.table_offset, checksum.checksum(packed))
    return WriteResult(layout.name, layout.nbytes, table, values)


def _write_parts(writer: Writer, layout: FileLayout, windows_of: WindowsOf, pace: Pace) -> bytes:
    """Hand on one part of the file after the other. Returns its table of checksums."""
    checksums: list[int] = []
    stream = _Stream(writer, pace)
    for item in layout.tensors:
        stream.put(item.prefix)
        checksums += _put_checked(stream, windows_of(item), item)
        stream.put(item.suffix)
    for _, container in layout.containers:
        stream.put(container)
    packed = checksum.pack(checksums)
    stream.put(packed)
    stream.flush()
    return packed


def _write_memory(writer: Writer, layout: FileLayout, memory: memoryview, pace: Pace) -> bytes:
    """The same from memory that has the data: the parts between are many and small, and each would
    be handed on for itself."""
    checksums: list[int] = []
    written = 0

    def put(offset: int, part: bytes) -> None:
        memory[offset : offset + len(part)] = part

    def write_to(stop: int) -> None:
        nonlocal written
        writer.write(written, [memory[written:stop]])
        pace.keep(stop - written)
        written = stop

    for item in layout.tensors:
        put(item.item.offset, item.prefix)
        put(item.data.stop, item.suffix)
        for start in range(item.data.offset, item.data.stop, WINDOW_BYTES):
            stop = min(start + WINDOW_BYTES, item.data.stop)
            checksums += checksum.block_checksums(memory[start:stop])
            if stop - written >= WINDOW_BYTES:
                write_to(written + WINDOW_BYTES)
    for offset, container in layout.containers:
        put(offset, container)
    packed = checksum.pack(checksums)
    put(layout.table_offset, packed)
    while written < layout.nbytes:
        write_to(min(written + WINDOW_BYTES, layout.nbytes))
    return packed


def _put_checked(stream: _Stream, windows: Iterable[memoryview], item: TensorItem) -> list[int]:
    checksums: list[int] = []
    nbytes = 0
    for data in windows:
        for start in range(0, len(data), WINDOW_BYTES):
            window = data[start : start + WINDOW_BYTES]
            checksums += checksum.block_checksums(window)
            stream.put(window)
        nbytes += len(data)
    assert nbytes == item.data.nbytes, f"{item.name}: {nbytes} bytes for {item.data}"
    return checksums


class Pace:
    """No more than so many bytes a second; None: as many as there are."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._started = time.monotonic()
        self._done = 0

    def keep(self, nbytes: int) -> None:
        """After so many bytes more, wait until they are due."""
        self._done += nbytes
        if self._bytes_per_s:
            due = self._started + self._done / self._bytes_per_s
            time.sleep(max(0.0, due - time.monotonic()))


class _Stream:
    """Parts of a file one after the other, handed on in windows: small items cost no write each,
    and small parts that follow one another are handed on as one."""

    def __init__(self, writer: Writer, pace: Pace) -> None:
        self._writer = writer
        self._pace = pace
        self._parts: list[Buffer] = []
        self._small: list[Buffer] = []
        """Those behind the parts, not joined yet."""

        self._offset = 0
        self._pending = 0

    def put(self, part: Buffer) -> None:
        nbytes = len(part)
        if nbytes >= JOINED_BYTES_MAX:
            self._join()
            self._parts.append(part)
        else:
            self._small.append(part)
        self._pending += nbytes
        if self._pending >= WINDOW_BYTES:
            self.flush()

    def _join(self) -> None:
        if self._small:
            self._parts.append(b"".join(self._small))
            self._small = []

    def flush(self) -> None:
        self._join()
        self._writer.write(self._offset, self._parts)
        self._offset += self._pending
        self._pace.keep(self._pending)
        self._parts, self._pending = [], 0
