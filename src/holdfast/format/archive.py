"""Read the records of ZIP archives as `torch.save` writes them, and write such archives.

PKWARE's APPNOTE.TXT 6.3.10 specifies the format in sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16.
torch uses a small part of it: no compression, no encryption, no comments, one folder. The reader
refuses anything else. It also refuses records that overlap or reach outside of the archive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from holdfast.format.manifest import Span

Fetch = Callable[[int, int], bytes]
"""Function `fetch(offset, nbytes)`. Returns `nbytes` bytes of a file from `offset` on, or fewer if
the file ends before."""

DIRECTORY_BYTES_MAX = 64 << 20
"""Maximum size of an archive's directory: enough for half a million records."""

RECORD = b"PK\3\4"
"""First bytes of every record, and therefore of every archive."""

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")

_FULL = 0xFFFFFFFF
"""Value of a 32-bit field which means that the number is in the ZIP64 field instead."""

_COUNT_MAX = 0xFFFF
"""Maximum number of records that the end of a directory can state without ZIP64."""

_UTF8 = 0x0800
_ENCRYPTED = 0x2041

_HEAD_BYTES = 4096
_TAIL_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Record:
    """One file in an archive."""

    header: int
    """Offset of the record's header in the archive."""

    data: Span
    """Position of the record's content in the archive."""

    crc32: int
    """CRC-32 of the content; 0 if the writer stored none."""


def windowed(fetch: Fetch, item: Span) -> Fetch:
    """Return a `Fetch` for the archive at position `item` of the file that `fetch` reads. Offset 0
    of the returned `Fetch` is the start of the archive.

    Reads the first and the last bytes of the archive once and keeps them, since all small records
    are there.

    Raises, when the returned function is called:
        ValueError: the bytes are outside of the archive.
    """
    head = fetch(item.offset, min(item.nbytes, _HEAD_BYTES))
    tail_start = max(0, item.nbytes - _TAIL_BYTES)
    tail = fetch(item.offset + tail_start, item.nbytes - tail_start)

    def fetch_within(offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > item.nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are outside of the archive")
        if offset + nbytes <= len(head):
            return head[offset : offset + nbytes]
        if offset >= tail_start:
            return tail[offset - tail_start : offset - tail_start + nbytes]
        return fetch(item.offset + offset, nbytes)

    return fetch_within


def read_records(fetch: Fetch, nbytes: int) -> dict[str, Record]:
    """Return the records of an archive of `nbytes` that starts at offset 0.

    The keys are the names of the records, without the folder that all of them are in.

    Raises:
        ValueError, struct.error: the bytes are not an archive as `torch.save` writes it.
    """
    start, stop, count = _directory_span(fetch, nbytes)
    entries = list(_entries(fetch(start, stop - start)))
    for path, *_, stored in entries:
        if not stored:
            raise ValueError(f"record `{path[:200]}` is compressed or encrypted")
    if len(entries) != count:
        raise ValueError(f"the directory has {len(entries)} records, its end says {count}")
    if len({path.partition("/")[0] for path, *_ in entries}) > 1:
        raise ValueError("the records are in more than one folder")
    records: dict[str, Record] = {}
    for path, header, nbytes, crc32, _ in entries:
        data = _data_span(fetch, path, header, nbytes)
        if data.stop > start:
            raise ValueError(f"record `{path[:200]}` reaches outside of the archive")
        records[path.partition("/")[2]] = Record(header, data, crc32)
    if len(records) != count:
        raise ValueError("two records have one name")
    spans = sorted((r.header, r.data.stop) for r in records.values())
    for (_, before), (after, _) in pairwise(spans):
        if after < before:
            raise ValueError(f"records overlap at byte {after}")
    return records


def record_names(fetch: Fetch, nbytes: int) -> set[str] | None:
    """Return the names of an archive's records, without the folder. Return None if the archive's
    directory cannot be read. Accepts archives of other programs, and compressed records."""
    try:
        start, stop, _ = _directory_span(fetch, nbytes)
        return {path.partition("/")[2] for path, *_ in _entries(fetch(start, stop - start))}
    except (ValueError, LookupError, struct.error):
        return None


def _directory_span(fetch: Fetch, nbytes: int) -> tuple[int, int, int]:
    """Return start and stop of an archive's directory, and the number of records in it, as the end
    of the archive states them. The archive has `nbytes`."""
    end = nbytes - _END.size
    if end < 0:
        raise ValueError(f"{nbytes} bytes are too few")
    magic, _, _, _, count, length, offset, comment = _END.unpack(fetch(end, _END.size))
    if magic != b"PK\5\6" or comment:
        raise ValueError("no end of a ZIP directory at its end")
    stop = end
    # torch always adds a ZIP64 end, which has larger fields. Holdfast adds one only if a number
    # does not fit into the fields of the plain end.
    locator = fetch(max(end - _LOCATOR64.size, 0), _LOCATOR64.size)
    if locator[:4] == b"PK\6\7":
        stop, count, length, offset = _end64(fetch, end - _LOCATOR64.size)
    if offset + length != stop:
        raise ValueError(f"the directory at {offset} does not end at {stop}")
    if length > DIRECTORY_BYTES_MAX:
        raise ValueError(f"a directory of {length} bytes, more than {DIRECTORY_BYTES_MAX}")
    return offset, stop, count


def _end64(fetch: Fetch, locator: int) -> tuple[int, int, int, int]:
    start = _LOCATOR64.unpack(fetch(locator, _LOCATOR64.size))[2]
    fields = _END64.unpack(fetch(start, _END64.size))
    if fields[0] != b"PK\6\6" or start + _END64.size != locator:
        raise ValueError("no ZIP64 end of the directory before its locator")
    return start, fields[7], fields[8], fields[9]


def _entries(directory: bytes) -> Iterable[tuple[str, int, int, int, bool]]:
    """Yield for each record in a directory: its path, the offset of its header, its size, its
    CRC-32, and whether its content is neither compressed nor encrypted."""
    position = 0
    while position < len(directory):
        fields = _CENTRAL.unpack_from(directory, position)
        magic, _, _, flags, method, _, _, crc32, packed, nbytes = fields[:10]
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        position += _CENTRAL.size
        name = directory[position : position + name_bytes].decode()
        position += name_bytes
        extra = directory[position : position + extra_bytes]
        position += extra_bytes + comment_bytes
        if magic != b"PK\1\2" or position > len(directory):
            raise ValueError("the directory has an invalid record")
        is_stored = not method and not flags & _ENCRYPTED and packed == nbytes
        nbytes, header = _sizes64(extra, nbytes, fields[16]) if is_stored else (nbytes, fields[16])
        yield name, header, nbytes, crc32, is_stored


def _sizes64(extra: bytes, nbytes: int, offset: int) -> tuple[int, int]:
    """Return size and offset of a record. `extra`, `nbytes`, `offset`: fields of the record's entry
    in the directory. A number that is `0xFFFFFFFF` is in the ZIP64 field of `extra` instead."""
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        if tag == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            if nbytes == _FULL:
                nbytes, packed = values.pop(0), values.pop(0)
                if packed != nbytes:
                    raise ValueError("a record is compressed")
            if offset == _FULL:
                offset = values.pop(0)
        position += 4 + length
    return nbytes, offset


def _data_span(fetch: Fetch, path: str, header: int, nbytes: int) -> Span:
    """Return the position of a record's content of `nbytes`. It follows the record's header, which
    starts at offset `header`."""
    fields = _LOCAL.unpack(fetch(header, _LOCAL.size))
    start = header + _LOCAL.size
    if fields[0] != RECORD or fields[3] or fetch(start, fields[9]) != path.encode():
        raise ValueError(f"record `{path[:200]}` has no valid header at {header}")
    return Span(start + fields[9] + fields[10], nbytes)


# ---------------------------------------------------------------------------------------- writing


def local_header(
    name: bytes, nbytes: int, *, position: int = 0, align: int = 0, crc32: int = 0
) -> bytes:
    """Return the header of a record of `nbytes`. `position` is the offset of the header.

    With `align`, the header is padded so that the data after it start at a multiple of `align`.
    """
    extra = _field64(nbytes)
    if align:
        padding = -(position + _LOCAL.size + len(name) + len(extra) + 4) % align
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    size, version = min(nbytes, _FULL), 45 if nbytes >= _FULL else 0
    fields = (RECORD, version, _UTF8, 0, 0, 0, crc32, size, size, len(name), len(extra))
    return _LOCAL.pack(*fields) + name + extra


def directory_entry(name: bytes, nbytes: int, header: int, *, crc32: int = 0) -> bytes:
    """Return the directory entry for a record of `nbytes` whose header starts at `header`."""
    extra = _field64(nbytes, header)
    size, version = min(nbytes, _FULL), 45 if extra else 0
    sizes = (size, size, len(name), len(extra), 0, 0, 0, 0, min(header, _FULL))
    fields = (b"PK\1\2", version, version, _UTF8, 0, 0, 0, crc32, *sizes)
    return _CENTRAL.pack(*fields) + name + extra


def _field64(nbytes: int, header: int = 0) -> bytes:
    """Encode, as a ZIP64 field, the numbers that need more than 32 bits; empty if none do."""
    numbers = [nbytes, nbytes] if nbytes >= _FULL else []
    numbers += [header] if header >= _FULL else []
    data = struct.pack(f"<{len(numbers)}Q", *numbers)
    return struct.pack("<2H", 1, len(data)) + data if data else b""


def directory_end(count: int, directory_bytes: int, directory_offset: int) -> bytes:
    """Return the last bytes of an archive, which follow the directory of `count` records."""
    end64 = b""
    if directory_offset >= _FULL or count > _COUNT_MAX:
        sizes = (count, count, directory_bytes, directory_offset)
        end64 = _END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, *sizes)
        end64 += _LOCATOR64.pack(b"PK\6\7", 0, directory_offset + directory_bytes, 1)
    count, offset = min(count, _COUNT_MAX), min(directory_offset, _FULL)
    return end64 + _END.pack(b"PK\5\6", 0, 0, count, count, directory_bytes, offset, 0)
