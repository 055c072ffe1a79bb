"""The container around one tensor: a ZIP archive as `torch.save` writes it, stored uncompressed.

Layout after PKWARE's APPNOTE.TXT 6.3.10 (sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16) and torch's
`serialization.py`: records `data.pkl`, `byteorder`, `version` and `data/0`, then the directory.
Everything around the raw data is a function of dtype, shape and position, so that a file can be
laid out, and its bytes written in one pass, before a single element is read.

The CRC-32 fields in Holdfast's own steps are zero, as after `torch.serialization.
set_crc32_options(False)`: no version of torch reads them, and the manifest holds a better checksum.
A `.pt` file has no manifest beside it, and so has true ones (`torchfile`).
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.archive import (
    CENTRAL,
    END,
    END64,
    FULL,
    LOCAL,
    LOCATOR64,
    Fetch,
    Record,
    read_records,
    windowed,
)
from holdfast.format.dtypes import BY_STORAGE, dtype_of
from holdfast.format.manifest import Span, check_sizes
from holdfast.format.pickles import Plain, loads, pickled_int, pickled_str

PAGE_BYTES = 4096
LARGE_BYTES = 64 << 10
"""From this size on data starts on a page, so that it can be read and written past the page cache;
below it, where a page would be mostly padding, on 64 bytes."""

_PICKLE_BYTES_MAX = 1 << 20
_PARAMETERS_MAX = 8
"""A parameter around a parameter is no use, but there it may be; a cycle of them is refused."""

_UTF8 = 0x0800

SHORT = 0xFFFF
"""Records that the end of a directory can count without its 64-bit form."""


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each dim of a row-major tensor."""
    sizes = [max(size, 1) for size in shape[:0:-1]]
    return tuple(accumulate(sizes, mul, initial=1))[::-1] if shape else ()


def frame(dtype: str, shape: tuple[int, ...], position: int) -> tuple[bytes, bytes]:
    """What stands before and after the raw data of a tensor whose item begins at `position`."""
    nbytes = prod(shape) * dtype_of(dtype).itemsize
    align = PAGE_BYTES if nbytes >= LARGE_BYTES else 64
    # No more of the position counts: small tensors that are alike have few frames between them.
    return _frame(dtype, shape, align, position % align)


@lru_cache(maxsize=1024)
def _frame(dtype: str, shape: tuple[int, ...], align: int, position: int) -> tuple[bytes, bytes]:
    nbytes = prod(shape) * dtype_of(dtype).itemsize
    head, directory = _records(dtype, shape)
    name = b"archive/data/0"
    size64 = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if nbytes >= FULL else b""
    padding = -(position + len(head) + LOCAL.size + len(name) + len(size64) + 4) % align
    extra = size64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    prefix = head + local_record(name, nbytes, extra)
    directory += central_record(name, nbytes, len(head), size64)
    return prefix, directory + end_records(4, len(directory), len(prefix) + nbytes)


@lru_cache(maxsize=4096)
def _records(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The records before the data, and their part of the directory."""
    head = directory = b""
    for name, content in (
        (b"archive/data.pkl", _tensor_pickle(dtype, shape)),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    ):
        directory += central_record(name, len(content), len(head), b"")
        head += local_record(name, len(content), b"") + content
    return head, directory


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """`data.pkl`: how torch is to rebuild a row-major tensor from storage "0"."""
    return b"\x80\x02" + pickled_tensor(dtype, shape, "0") + b"."


def pickled_tensor(dtype: str, shape: tuple[int, ...], key: str) -> bytes:
    """A part of a pickle: how torch is to rebuild a row-major tensor that has storage `key` to
    itself."""
    storage = dtype_of(dtype).storage
    numel = prod(shape) if storage else prod(shape) * dtype_of(dtype).itemsize
    return b"".join(
        (
            b"ctorch._utils\n",
            b"_rebuild_tensor_v2\n" if storage else b"_rebuild_tensor_v3\n",
            b"((" + pickled_str("storage"),
            f"ctorch\n{storage}\n".encode() if storage else b"ctorch.storage\nUntypedStorage\n",
            pickled_str(key) + pickled_str("cpu") + pickled_int(numel) + b"tQK\x00",
            b"(" + b"".join(map(pickled_int, shape)) + b"t",
            b"(" + b"".join(map(pickled_int, contiguous_strides(shape))) + b"t",
            b"\x89ccollections\nOrderedDict\n)R",
            b"" if storage else f"ctorch\n{dtype}\n".encode(),
            b"tR",
        )
    )


def local_record(name: bytes, nbytes: int, extra: bytes, crc32: int = 0) -> bytes:
    """What stands before a record of `nbytes`."""
    size, version = min(nbytes, FULL), 45 if nbytes >= FULL else 0
    fields = (b"PK\3\4", version, _UTF8, 0, 0, 0, crc32, size, size, len(name), len(extra))
    return LOCAL.pack(*fields) + name + extra


def central_record(name: bytes, nbytes: int, offset: int, extra: bytes, crc32: int = 0) -> bytes:
    """A record's entry in the directory; `extra` holds what is too large for its own fields."""
    size, version = min(nbytes, FULL), 45 if extra else 0
    offset = min(offset, FULL)
    sizes = (size, size, len(name), len(extra))
    return (
        CENTRAL.pack(b"PK\1\2", version, version, _UTF8, 0, 0, 0, crc32, *sizes, 0, 0, 0, 0, offset)
        + name
        + extra
    )


def end_records(count: int, directory_bytes: int, directory_offset: int) -> bytes:
    """What stands after the directory of `count` records."""
    end64 = b""
    if directory_offset >= FULL or count > SHORT:
        end64 = END64.pack(
            b"PK\6\6", 44, 45, 45, 0, 0, count, count, directory_bytes, directory_offset
        ) + LOCATOR64.pack(b"PK\6\7", 0, directory_offset + directory_bytes, 1)
    return end64 + END.pack(
        *(b"PK\5\6", 0, 0, min(count, SHORT), min(count, SHORT)),
        *(directory_bytes, min(directory_offset, FULL), 0),
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


def locate(fetch: Fetch, item: Span, *, where: str) -> StoredTensor:
    """Find the elements inside a container that anyone's `torch.save` wrote for one tensor.

    Raises:
        FormatError: not such a container, or one that reaches outside of itself.
    """
    try:
        within = windowed(fetch, item)
        records = read_records(within, item.nbytes)
        check_byte_order(within, records)
        made = loads(content(within, records["data.pkl"], _PICKLE_BYTES_MAX), GLOBALS, where=where)
        return place(described(made), records, item.offset)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"`{where}` is not a tensor as torch.save writes it: {error}") from error


def content(fetch: Fetch, record: Record, nbytes_max: int) -> bytes:
    """The bytes of one small record, checked where the writer kept a checksum.

    Raises:
        ValueError: they are too many, or not those that were written.
    """
    if record.data.nbytes > nbytes_max:
        raise ValueError(f"a record of {record.data.nbytes} bytes, more than {nbytes_max}")
    data = fetch(record.data.offset, record.data.nbytes)
    if record.crc32 and zlib.crc32(data) != record.crc32:
        raise ValueError(f"the record at {record.data.offset} does not have its CRC-32")
    return data


def check_byte_order(fetch: Fetch, records: Mapping[str, Record]) -> None:
    """Refuse elements that are not little-endian.

    Raises:
        ValueError: the archive says so.
    """
    if "byteorder" in records and content(fetch, records["byteorder"], 16) != b"little":
        raise ValueError("byte order is not little-endian")


def place(tensor: Described, records: Mapping[str, Record], position: int) -> StoredTensor:
    """Where the elements of a tensor lie, in an archive that begins at `position` of its file.

    Raises:
        ValueError, KeyError: there is no such record, or it is too short.
    """
    record, itemsize = records[f"data/{tensor.key}"], dtype_of(tensor.dtype).itemsize
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if prod(tensor.shape) and (tensor.offset + last + 1) * itemsize > record.data.nbytes:
        raise ValueError(f"tensor reaches outside of its storage of {record.data.nbytes} bytes")
    start = min(tensor.offset * itemsize, record.data.nbytes)
    return StoredTensor(
        Span(position + record.data.offset + start, record.data.nbytes - start),
        tensor.dtype,
        tensor.shape,
        tensor.strides,
        0 if start else record.crc32,
    )


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as a pickle describes it."""

    key: str
    """Of its storage: the record `data/<key>`."""

    dtype: str
    offset: int
    """Elements of the storage before its first one."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Tensor(Plain):
    """Stands for a tensor in what `loads` gives back."""


class _RebuildV2(Tensor):
    """Arguments: storage, offset, shape, strides, and what is of no interest here."""


class _RebuildV3(Tensor):
    """As `_RebuildV2`, with the dtype as the seventh."""


class _RebuildParameter(Tensor):
    """Arguments: the tensor, and what is of no interest here."""


def described(made: object) -> Described:
    """What a pickle says of a tensor.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it says something else.
    """
    for _ in range(_PARAMETERS_MAX):
        if not isinstance(made, _RebuildParameter):
            break
        made = made.args[0]
    if not isinstance(made, _RebuildV2 | _RebuildV3):
        raise ValueError(f"holds {type(made).__name__}, not a tensor")
    storage, offset, shape, strides = made.args[:4]
    kind, named, key = storage[:3]
    dtype = made.args[6].name if isinstance(made, _RebuildV3) else named
    if kind != "storage" or type(key) is not str or type(dtype) is not str:
        raise ValueError("its storage is none of torch's")
    (offset,) = check_sizes((offset,))
    return Described(key, dtype, offset, check_sizes(shape), check_sizes(strides))


GLOBALS: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildV2,
    ("torch._utils", "_rebuild_tensor_v3"): _RebuildV3,
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): "untyped",
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", storage): dtype.name for storage, dtype in BY_STORAGE.items()},
}
"""What the pickle of a tensor may name."""
