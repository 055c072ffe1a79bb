"""The container around one tensor: a ZIP archive as `torch.save` writes it, stored uncompressed.

Layout after PKWARE's APPNOTE.TXT 6.3.10 (sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16) and torch's
`serialization.py`: records `data.pkl`, `byteorder`, `version` and `data/0`, then the directory.
Everything around the raw data is a function of dtype, shape and position, so that a file can be
laid out, and its bytes written in one pass, before a single element is read.

The CRC-32 fields of what Holdfast writes are zero, as after `torch.serialization.
set_crc32_options(False)`: no version of torch reads them, and the manifest holds a better checksum.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul

from holdfast.errors import FormatError
from holdfast.format.dtypes import BY_STORAGE, dtype_of
from holdfast.format.manifest import Span
from holdfast.format.pickles import Plain, loads, pickled_int, pickled_str

PAGE_BYTES = 4096
LARGE_BYTES = 64 << 10
"""From this size on data starts on a page, so that it can be read and written past the page cache;
below it, where a page would be mostly padding, on 64 bytes."""

_FULL = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_UTF8 = 0x0800


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each dim of a row-major tensor."""
    sizes = [max(size, 1) for size in shape[:0:-1]]
    return tuple(accumulate(sizes, mul, initial=1))[::-1] if shape else ()


def frame(dtype: str, shape: tuple[int, ...], position: int) -> tuple[bytes, bytes]:
    """What stands before and after the raw data of a tensor whose item begins at `position`."""
    nbytes = prod(shape) * dtype_of(dtype).itemsize
    align = PAGE_BYTES if nbytes >= LARGE_BYTES else 64
    head, directory = _records(dtype, shape)
    name = b"archive/data/0"
    size64 = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if nbytes >= _FULL else b""
    padding = -(position + len(head) + _LOCAL.size + len(name) + len(size64) + 4) % align
    extra = size64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    prefix = head + _local(name, nbytes, extra)
    directory += _central(name, nbytes, len(head), size64)
    return prefix, directory + _end(4, len(directory), len(prefix) + nbytes)


@lru_cache(maxsize=4096)
def _records(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The records before the data, and their part of the directory."""
    head = directory = b""
    for name, content in (
        (b"archive/data.pkl", _tensor_pickle(dtype, shape)),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    ):
        directory += _central(name, len(content), len(head), b"")
        head += _local(name, len(content), b"") + content
    return head, directory


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """`data.pkl`: how torch is to rebuild a row-major tensor from storage "0"."""
    storage = dtype_of(dtype).storage
    numel = prod(shape) if storage else prod(shape) * dtype_of(dtype).itemsize
    return b"".join(
        (
            b"\x80\x02ctorch._utils\n",
            b"_rebuild_tensor_v2\n" if storage else b"_rebuild_tensor_v3\n",
            b"((" + pickled_str("storage"),
            f"ctorch\n{storage}\n".encode() if storage else b"ctorch.storage\nUntypedStorage\n",
            pickled_str("0") + pickled_str("cpu") + pickled_int(numel) + b"tQK\x00",
            b"(" + b"".join(map(pickled_int, shape)) + b"t",
            b"(" + b"".join(map(pickled_int, contiguous_strides(shape))) + b"t",
            b"\x89ccollections\nOrderedDict\n)R",
            b"" if storage else f"ctorch\n{dtype}\n".encode(),
            b"tR.",
        )
    )


def _local(name: bytes, nbytes: int, extra: bytes) -> bytes:
    size, version = min(nbytes, _FULL), 45 if nbytes >= _FULL else 0
    fields = (b"PK\3\4", version, _UTF8, 0, 0, 0, 0, size, size, len(name), len(extra))
    return _LOCAL.pack(*fields) + name + extra


def _central(name: bytes, nbytes: int, offset: int, extra: bytes) -> bytes:
    size, version = min(nbytes, _FULL), 45 if nbytes >= _FULL else 0
    fields = (b"PK\1\2", version, version, _UTF8, 0, 0, 0, 0, size, size, len(name), len(extra))
    return _CENTRAL.pack(*fields, 0, 0, 0, 0, offset) + name + extra


def _end(count: int, directory_bytes: int, directory_offset: int) -> bytes:
    end64 = b""
    if directory_offset >= _FULL:
        end64 = _END64.pack(
            b"PK\6\6", 44, 45, 45, 0, 0, count, count, directory_bytes, directory_offset
        ) + _LOCATOR64.pack(b"PK\6\7", 0, directory_offset + directory_bytes, 1)
    return end64 + _END.pack(
        b"PK\5\6", 0, 0, count, count, directory_bytes, min(directory_offset, _FULL), 0
    )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a container keeps its elements, and how they lie there."""

    data: Span
    """Within the file."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements between neighbours along each dim."""

    crc32: int
    """Of the storage as a whole; 0 where the writer kept none."""


Fetch = Callable[[int, int], bytes]
"""`fetch(offset, nbytes)`: bytes of the file that holds the container."""


def locate(fetch: Fetch, item: Span, *, where: str) -> StoredTensor:
    """Find the elements inside a container that anyone's `torch.save` wrote for one tensor.

    Raises:
        FormatError: not such a container, or one that reaches outside of itself.
    """
    try:
        return _locate(_windowed(fetch, item), item, where)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"`{where}` is not a tensor as torch.save writes it: {error}") from error


def _locate(fetch: Fetch, item: Span, where: str) -> StoredTensor:
    records = _directory(fetch, item)
    by_name = {name.partition("/")[2]: record for name, record in records.items()}
    if "byteorder" in by_name and _content(fetch, item, by_name["byteorder"]) != b"little":
        raise ValueError("byte order is not little-endian")
    described = _described(loads(_content(fetch, item, by_name["data.pkl"]), _ALLOWED, where=where))
    record = by_name[f"data/{described.key}"]
    data = _data_span(fetch, item, record)
    itemsize = dtype_of(described.dtype).itemsize
    last = sum((n - 1) * s for n, s in zip(described.shape, described.strides, strict=True))
    if prod(described.shape) and (described.offset + last + 1) * itemsize > data.nbytes:
        raise ValueError(f"tensor reaches outside of its storage of {data.nbytes} bytes")
    start = described.offset * itemsize
    return StoredTensor(
        Span(data.offset + start, data.nbytes - start),
        described.dtype,
        described.shape,
        described.strides,
        0 if start else record.crc32,
    )


@dataclass(frozen=True, slots=True)
class _Record:
    offset: int
    nbytes: int
    crc32: int


def _windowed(fetch: Fetch, item: Span) -> Fetch:
    """The same bytes counted from the item's start, its head and tail fetched once."""
    head = fetch(item.offset, min(item.nbytes, 4096))
    tail_at = max(0, item.nbytes - 2048)
    tail = fetch(item.offset + tail_at, item.nbytes - tail_at)

    def fetch_within(offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > item.nbytes:
            raise ValueError(f"record at {offset} is outside of the item")
        if offset + nbytes <= len(head):
            return head[offset : offset + nbytes]
        if offset >= tail_at:
            return tail[offset - tail_at : offset - tail_at + nbytes]
        return fetch(item.offset + offset, nbytes)

    return fetch_within


def _directory(fetch: Fetch, item: Span) -> dict[str, _Record]:
    tail_at = max(0, item.nbytes - 2048)
    tail = fetch(tail_at, item.nbytes - tail_at)
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        raise ValueError("no end of a ZIP directory")
    _, _, _, _, count, nbytes, offset, _ = _END.unpack_from(tail, end)
    if offset == _FULL or nbytes == _FULL or count == 0xFFFF:
        at = tail.rfind(b"PK\6\7", 0, end)
        if at < 0:
            raise ValueError("no ZIP64 locator")
        fields = _END64.unpack(fetch(_LOCATOR64.unpack_from(tail, at)[2], _END64.size))
        nbytes, offset = fields[8], fields[9]
    records: dict[str, _Record] = {}
    directory, at = fetch(offset, nbytes), 0
    while at < len(directory):
        fields = _CENTRAL.unpack_from(directory, at)
        if fields[0] != b"PK\1\2" or fields[4] != 0:
            raise ValueError("a record is compressed, or no record")
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        at += _CENTRAL.size
        name = directory[at : at + name_bytes].decode()
        extra = directory[at + name_bytes : at + name_bytes + extra_bytes]
        size, offset64 = _sizes64(extra, fields[9], fields[16])
        if name in records:
            raise ValueError(f"record `{name}` twice")
        records[name] = _Record(offset64, size, fields[7])
        at += name_bytes + extra_bytes + comment_bytes
    return records


def _sizes64(extra: bytes, nbytes: int, offset: int) -> tuple[int, int]:
    """Size and offset, taken from the ZIP64 field where 32 bits did not hold them."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            if nbytes == _FULL:
                # Uncompressed, then compressed size; both are there, and the same.
                nbytes = values.pop(0)
                values[:1] = []
            if offset == _FULL:
                offset = values.pop(0)
        at += 4 + length
    return nbytes, offset


def _content(fetch: Fetch, item: Span, record: _Record) -> bytes:
    span = _data_span(fetch, item, record)
    return fetch(span.offset - item.offset, span.nbytes)


def _data_span(fetch: Fetch, item: Span, record: _Record) -> Span:
    fields = _LOCAL.unpack(fetch(record.offset, _LOCAL.size))
    if fields[0] != b"PK\3\4":
        raise ValueError("a record without its header")
    start = record.offset + _LOCAL.size + fields[9] + fields[10]
    if start + record.nbytes > item.nbytes:
        raise ValueError(f"record at {start} is outside of the item")
    return Span(item.offset + start, record.nbytes)


@dataclass(frozen=True, slots=True)
class _Tensor:
    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RebuildV2(Plain):
    """Arguments: storage, offset, shape, strides, and what is of no interest here."""


class _RebuildV3(Plain):
    """As `_RebuildV2`, with the dtype as the seventh."""


class _RebuildParameter(Plain):
    """Arguments: the tensor, and what is of no interest here."""


def _described(made: object) -> _Tensor:
    while isinstance(made, _RebuildParameter):
        made = made.args[0]
    if not isinstance(made, (_RebuildV2, _RebuildV3)):
        raise ValueError(f"holds {type(made).__name__}, not a tensor")
    storage, offset, shape, strides = made.args[:4]
    dtype = made.args[6].name if isinstance(made, _RebuildV3) else storage[1]
    for number in (offset, *shape, *strides):
        if type(number) is not int or number < 0:
            raise ValueError(f"shape {shape}, strides {strides}, offset {offset}")
    return _Tensor(storage[2], dtype, offset, tuple(shape), tuple(strides))


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildV2,
    ("torch._utils", "_rebuild_tensor_v3"): _RebuildV3,
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): "untyped",
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", storage): dtype.name for storage, dtype in BY_STORAGE.items()},
}
