"""The ZIP archive that `torch.save` writes around one tensor.

As in torch's `serialization.py`, the archive has the records `data.pkl`, `byteorder`, `version` and
`data/0`, then the directory. The bytes around the raw data depend only on dtype, shape and
position. So a file can be laid out before any element is read, and can be written in one pass.

CRC-32 fields are zero in Holdfast's checkpoints, as torch writes them after
`set_crc32_options(False)`: no version of torch reads them, and the manifest has better checksums.
`.pt` files have no manifest, and therefore real CRC-32s (`torchfile`).
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
    Fetch,
    Record,
    directory_end,
    directory_entry,
    local_header,
    read_records,
    windowed,
)
from holdfast.format.dtypes import BY_STORAGE, dtype_of, nbytes_of
from holdfast.format.dumper import pickled_int, pickled_str
from holdfast.format.manifest import Span
from holdfast.format.pickles import Plain, loads
from holdfast.format.untrusted import check_sizes

PAGE_BYTES = 4096

PHASE_BYTES = 64
"""Distance of large data from the start of a page, in a file. Smaller data starts at a multiple of
this, since pages would be mostly padding.

In memory, glibc usually gives large tensors the same distance. Then `O_DIRECT` can write whole
pages of a tensor from its memory, without a copy.
"""

LARGE_BYTES = 64 << 10
"""Minimum size of large data."""

PICKLE_BYTES_MAX = 256 << 20
"""Maximum size of `data.pkl` in a `.pt` file. It has room for two million tensors."""

_TENSOR_PICKLE_BYTES_MAX = 1 << 20
_PARAMETERS_MAX = 8
"""Maximum number of objects nested around one tensor, such as `Parameter`s. Without a limit,
reading an object that contains itself would never end."""


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor, in elements."""
    sizes = [max(size, 1) for size in shape[:0:-1]]
    return tuple(accumulate(sizes, mul, initial=1))[::-1] if shape else ()


def frame(
    dtype: str, shape: tuple[int, ...], position: int, phase: int = PHASE_BYTES
) -> tuple[bytes, bytes]:
    """Return the bytes of an item before and after the raw data of its tensor. The item is at
    `position` of a file. `phase`: distance of large data from the start of a page. It was 0 in
    older versions of Holdfast."""
    align = PAGE_BYTES if nbytes_of(dtype, shape) >= LARGE_BYTES else PHASE_BYTES
    # The frame depends only on this remainder. Passing just the remainder lets tensors of one shape
    # share a few cached frames.
    return _frame(dtype, shape, align, (position - phase) % align)


@lru_cache(maxsize=1024)
def _frame(dtype: str, shape: tuple[int, ...], align: int, position: int) -> tuple[bytes, bytes]:
    """Return a frame whose data starts at a multiple of `align`, for an item at `position`."""
    nbytes = nbytes_of(dtype, shape)
    head, directory = _records(dtype, shape)
    name = b"archive/data/0"
    prefix = head + local_header(name, nbytes, position=position + len(head), align=align)
    directory += directory_entry(name, nbytes, len(head))
    return prefix, directory + directory_end(4, len(directory), len(prefix) + nbytes)


@lru_cache(maxsize=4096)
def _records(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Return the records before a tensor's data, and their entries in the archive's directory."""
    head = directory = b""
    for name, content in (
        (b"archive/data.pkl", b"\x80\x02" + pickled_tensor(dtype, shape, "0") + b"."),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    ):
        directory += directory_entry(name, len(content), len(head))
        head += local_header(name, len(content)) + content
    return head, directory


def pickled_tensor(dtype: str, shape: tuple[int, ...], key: str) -> bytes:
    """Return the part of a pickle (protocol 2) that makes torch rebuild a row-major tensor.

    The tensor consists of all elements of storage `key`.
    """
    storage = dtype_of(dtype).storage
    numel = prod(shape) if storage else nbytes_of(dtype, shape)
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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Position and layout of the elements of a tensor in a file."""

    data: Span
    """Position in the file, from the first element to the end of the storage."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Strides in elements."""

    crc32: int
    """CRC-32 of `data`; 0 if the writer stored none, or if `data` starts inside the storage."""


def locate(fetch: Fetch, item: Span, *, where: str) -> StoredTensor:
    """Find the elements of a tensor inside an untrusted archive of `torch.save`.

    Raises:
        FormatError: the archive is not that of a tensor, or refers to bytes outside of itself.
    """
    try:
        value, records = read_pickle(fetch, item, GLOBALS, _TENSOR_PICKLE_BYTES_MAX, where=where)
        return stored_tensor(described(value), records, item.offset)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"`{where}` is not a tensor as torch.save writes it: {error}") from error


def read_pickle(
    fetch: Fetch,
    item: Span,
    allowed: Mapping[tuple[str, str], Any],
    nbytes_max: int,
    *,
    where: str,
) -> tuple[Any, dict[str, Record]]:
    """Read the archive at position `item` of a file. Return the object in its pickle, and all of
    its records. `allowed`: see `pickles.loads`.

    Raises:
        FormatError: the pickle refers to a global that is not allowed.
        ValueError, LookupError, struct.error: the bytes are not an archive of `torch.save`, the
            elements are big-endian, or the pickle has more than `nbytes_max`.
    """
    within = windowed(fetch, item)
    records = read_records(within, item.nbytes)
    if "data.pkl" not in records:
        raise ValueError("a ZIP archive of another program, without `data.pkl`")
    if "byteorder" in records and _content(within, records["byteorder"], 16) != b"little":
        raise ValueError("byte order is not little-endian")
    pickled = _content(within, records["data.pkl"], nbytes_max)
    return loads(pickled, allowed, where=where), records


def _content(fetch: Fetch, record: Record, nbytes_max: int) -> bytes:
    """Read a small record, and check its CRC-32 if it has one."""
    if record.data.nbytes > nbytes_max:
        raise ValueError(f"a record of {record.data.nbytes} bytes, more than {nbytes_max}")
    data = fetch(record.data.offset, record.data.nbytes)
    if record.crc32 and zlib.crc32(data) != record.crc32:
        raise ValueError(f"the record at {record.data.offset} does not match its CRC-32")
    return data


def stored_tensor(tensor: Described, records: Mapping[str, Record], position: int) -> StoredTensor:
    """Find the elements of a tensor in an archive that begins at `position` of its file.

    Raises:
        ValueError, KeyError: the storage of the tensor is not in the archive, or is too small.
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
    """A tensor, as a pickle describes it."""

    key: str
    """Key of the tensor's storage, which is the record `data/<key>`."""

    dtype: str
    offset: int
    """Index of the tensor's first element in the storage."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Tensor(Plain):
    """Stands for a tensor in the result of `pickles.loads`."""


class RebuildV2(Tensor):
    """Result of torch's `_rebuild_tensor_v2`. Its first arguments are storage, offset, shape,
    strides."""


class _RebuildV3(Tensor):
    """Result of torch's `_rebuild_tensor_v3`. It has the same first arguments as `RebuildV2`, and
    the dtype as the seventh."""


class _RebuildParameter(Tensor):
    """Result of torch's `_rebuild_parameter`. Its first argument is the tensor; the others are
    ignored."""


class _RebuildFromType(Tensor):
    """Result of torch's `_rebuild_from_type_v2`: a tensor of a subclass or with attributes. Its
    arguments are a function, the class, the arguments of the function, and the attributes, which
    are ignored."""


_TENSOR_CLASS = "torch.Tensor"
"""Stands for the classes `torch.Tensor` and `Parameter`. Their elements are all in the storage."""


def subclass_of(value: object) -> str:
    """Return the name of a tensor's class if it is a subclass of `torch.Tensor` other than
    `Parameter`: such a tensor may compute its elements. Return an empty string for others."""
    if not isinstance(value, _RebuildFromType) or len(value.args) < 2:
        return ""
    cls = value.args[1]
    return "" if cls == _TENSOR_CLASS else str(getattr(cls, "title", type(cls).__name__))


def described(value: object) -> Described:
    """Check a tensor in the result of `pickles.loads`, and return its description.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: `value` is not a valid tensor.
    """
    for _ in range(_PARAMETERS_MAX):
        if isinstance(value, _RebuildParameter):
            value = value.args[0]
        elif isinstance(value, _RebuildFromType) and value.args[1] == _TENSOR_CLASS:
            function, _, args = value.args[:3]
            if function not in (RebuildV2, _RebuildV3) or type(args) is not tuple:
                raise ValueError("a tensor that is made by an unknown function")
            value = function(args)
        else:
            break
    if not isinstance(value, RebuildV2 | _RebuildV3):
        raise ValueError(f"holds {type(value).__name__}, not a tensor")
    storage, offset, shape, strides = value.args[:4]
    bits = value.args[7:] if isinstance(value, _RebuildV3) else value.args[6:]
    if any(bits):
        raise ValueError("its elements are conjugated or negated when they are read")
    # In the stream format, a storage has a sixth member, which says where a view starts.
    kind, storage_dtype, key = storage[:3]
    dtype = value.args[6].name if isinstance(value, _RebuildV3) else storage_dtype
    if kind != "storage" or type(key) is not str or type(dtype) is not str:
        raise ValueError("its storage is not one of torch's")
    view = storage[5] if len(storage) > 5 else None
    start = 0 if view is None else view[1]
    offset, start = check_sizes((offset, start))
    return Described(key, dtype, start + offset, check_sizes(shape), check_sizes(strides))


GLOBALS: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): RebuildV2,
    ("torch._utils", "_rebuild_tensor_v3"): _RebuildV3,
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _RebuildFromType,
    ("torch", "Tensor"): _TENSOR_CLASS,
    ("torch.nn.parameter", "Parameter"): _TENSOR_CLASS,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): "untyped",
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", storage): dtype.name for storage, dtype in BY_STORAGE.items()},
}
"""Globals that the pickle of a tensor may use."""
