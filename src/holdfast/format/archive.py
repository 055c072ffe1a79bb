"""The records of a ZIP archive as `torch.save` writes it: where each one lies, and its checksum.

After PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16. Of all that a ZIP
file may be, torch writes little: nothing compressed or encrypted, one folder, no comments. What is
outside of that is refused, and so is a record that reaches outside of the archive or into another.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from holdfast.format.manifest import Span

Fetch = Callable[[int, int], bytes]
"""`fetch(offset, nbytes)`: bytes of the file that holds the archive, fewer only where it ends."""

DIRECTORY_BYTES_MAX = 64 << 20
"""Of the directory: half a million records."""

FULL = 0xFFFFFFFF
"""Stands where 32 bits do not hold a number: the ZIP64 field has it."""

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")

_HEAD_BYTES = 4096
_TAIL_BYTES = 2048
_ENCRYPTED = 0x2041


@dataclass(frozen=True, slots=True)
class Record:
    """One file of the archive."""

    header: int
    """Where in the archive its header begins."""

    data: Span
    """Its content, within the archive."""

    crc32: int
    """Of its content; 0 where the writer kept none."""


@dataclass(frozen=True, slots=True)
class _Listed:
    name: str
    header: int
    nbytes: int
    crc32: int


def windowed(fetch: Fetch, item: Span) -> Fetch:
    """The archive's own bytes, counted from its start; its head and tail are fetched once.

    Raises, when called:
        ValueError: bytes outside of the archive.
    """
    head = fetch(item.offset, min(item.nbytes, _HEAD_BYTES))
    tail_at = max(0, item.nbytes - _TAIL_BYTES)
    tail = fetch(item.offset + tail_at, item.nbytes - tail_at)

    def fetch_within(offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > item.nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are outside of the archive")
        if offset + nbytes <= len(head):
            return head[offset : offset + nbytes]
        if offset >= tail_at:
            return tail[offset - tail_at : offset - tail_at + nbytes]
        return fetch(item.offset + offset, nbytes)

    return fetch_within


def read_records(fetch: Fetch, nbytes: int) -> dict[str, Record]:
    """The records of an archive of `nbytes` that begins at 0, by their name below its one folder.

    Raises:
        ValueError, struct.error: not such an archive.
    """
    start, stop, count = _directory_span(fetch, nbytes)
    listed = list(_listed(fetch(start, stop - start)))
    if len(listed) != count:
        raise ValueError(f"the directory has {len(listed)} records, its end says {count}")
    if len({one.name.partition("/")[0] for one in listed}) > 1:
        raise ValueError("the records are in more than one folder")
    records: dict[str, Record] = {}
    for one in listed:
        name = one.name.partition("/")[2]
        if name in records:
            raise ValueError(f"record `{name[:200]}` twice")
        records[name] = _record(fetch, one, start)
    spans = sorted((r.header, r.data.stop) for r in records.values())
    for (_, before), (after, _) in pairwise(spans):
        if after < before:
            raise ValueError(f"records overlap at byte {after}")
    return records


def _directory_span(fetch: Fetch, nbytes: int) -> tuple[int, int, int]:
    """First byte of the directory, one past its last, and how many records it should have."""
    end = nbytes - END.size
    magic, _, _, _, count, length, offset, comment = END.unpack(fetch(end, END.size))
    if magic != b"PK\5\6" or comment:
        raise ValueError("no end of a ZIP directory at its end")
    stop = end
    # torch writes a ZIP64 end always, Holdfast where it is needed.
    locator = fetch(max(end - LOCATOR64.size, 0), LOCATOR64.size)
    if locator[:4] == b"PK\6\7":
        stop, count, length, offset = _end64(fetch, end - LOCATOR64.size)
    if offset + length != stop:
        raise ValueError(f"the directory at {offset} does not end at {stop}")
    if length > DIRECTORY_BYTES_MAX:
        raise ValueError(f"a directory of {length} bytes, more than {DIRECTORY_BYTES_MAX}")
    return offset, stop, count


def _end64(fetch: Fetch, locator: int) -> tuple[int, int, int, int]:
    at = LOCATOR64.unpack(fetch(locator, LOCATOR64.size))[2]
    fields = END64.unpack(fetch(at, END64.size))
    if fields[0] != b"PK\6\6" or at + END64.size != locator:
        raise ValueError("no ZIP64 end of the directory before its locator")
    return at, fields[7], fields[8], fields[9]


def _listed(directory: bytes) -> Iterable[_Listed]:
    at = 0
    while at < len(directory):
        fields = CENTRAL.unpack_from(directory, at)
        magic, flags, method, crc32, packed, nbytes = *fields[:1], *fields[3:5], *fields[7:10]
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        at += CENTRAL.size
        name = directory[at : at + name_bytes].decode()
        extra = directory[at + name_bytes : at + name_bytes + extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        if magic != b"PK\1\2" or at > len(directory):
            raise ValueError("the directory holds what is no record")
        if method or flags & _ENCRYPTED or packed != nbytes:
            raise ValueError(f"record `{name[:200]}` is compressed or encrypted")
        nbytes, header = _sizes64(extra, nbytes, fields[16])
        yield _Listed(name, header, nbytes, crc32)


def _sizes64(extra: bytes, nbytes: int, offset: int) -> tuple[int, int]:
    """Size and offset, taken from the ZIP64 field where 32 bits did not hold them."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            if nbytes == FULL:
                nbytes, packed = values.pop(0), values.pop(0)
                if packed != nbytes:
                    raise ValueError("a record is compressed")
            if offset == FULL:
                offset = values.pop(0)
        at += 4 + length
    return nbytes, offset


def _record(fetch: Fetch, one: _Listed, directory: int) -> Record:
    fields = LOCAL.unpack(fetch(one.header, LOCAL.size))
    name = fetch(one.header + LOCAL.size, fields[9])
    if fields[0] != b"PK\3\4" or fields[3] or name != one.name.encode():
        raise ValueError(f"record `{one.name[:200]}` has no header of its own at {one.header}")
    data = Span(one.header + LOCAL.size + fields[9] + fields[10], one.nbytes)
    if data.stop > directory:
        raise ValueError(f"record `{one.name[:200]}` reaches outside of the archive")
    return Record(one.header, data, one.crc32)
