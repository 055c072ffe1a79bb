"""Read the stream that `torch.save` wrote before torch 1.6, without torch.

The format is as in `_legacy_load` of torch/serialization.py. First come five pickles: a magic
number, a version, sizes of C types, the object, and the keys of its storages. Then comes each
storage: its number of elements in 8 bytes, and its elements. The file does not state the length of
the pickles, so ever longer pieces from its beginning are read until one has all five pickles.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import count
from typing import Any

from holdfast.format.archive import Fetch, Record
from holdfast.format.dtypes import BY_STORAGE, dtype_of
from holdfast.format.manifest import Span
from holdfast.format.pickles import INVALID, Unpickler
from holdfast.format.torchzip import PICKLE_BYTES_MAX, RebuildV2
from holdfast.format.untrusted import check_sizes

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_NUM_PICKLES = 5

_PIECE_BYTES = 1 << 20
"""Bytes of the first piece that is read. Each further piece is four times as large."""

GLOBALS: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): RebuildV2,
    **{("torch.cuda", storage): dtype.name for storage, dtype in BY_STORAGE.items()},
}
"""Globals that the pickle of a tensor may use only in a stream."""


def is_stream(fetch: Fetch) -> bool:
    """Return whether a file begins like a stream of `torch.save`."""
    try:
        return bool(_Pickles(fetch(0, 64), {}, "").next() == _MAGIC)
    except INVALID:
        return False


def read_stream(
    fetch: Fetch, nbytes: int, allowed: Mapping[tuple[str, str], Any], *, where: str
) -> tuple[Any, dict[str, Record]]:
    """Read a stream of `nbytes`. Return the object in it, as `pickles.loads` does, and records with
    the positions of its parts.

    The records are named as in a ZIP archive: `data.pkl` is for all pickles, `data/<key>` for one
    storage.

    Raises:
        FormatError: the stream refers to a global that is not allowed.
        ValueError, LookupError, struct.error, ...: the stream is invalid or incomplete, or its
            elements are big-endian. `pickles.INVALID` has all of these errors.
    """
    limit = min(nbytes, PICKLE_BYTES_MAX)
    for power in count():
        piece_bytes = min(limit, _PIECE_BYTES * 4**power)
        try:
            return _read(fetch, fetch(0, piece_bytes), nbytes, allowed, where)
        except INVALID:
            # The pickles may continue after this piece: try again with a longer one.
            if piece_bytes == limit:
                raise
    raise AssertionError("the last piece has all bytes")


class _Pickles(Unpickler):
    """Reads the pickles of a stream."""

    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any], where: str) -> None:
        super().__init__(data, allowed, where)
        self.storages: list[Any] = []
        """Persistent ids of the storages to which the pickles refer, with repetitions."""

    def next(self) -> Any:
        """Return the object in the next pickle."""
        self.memo: dict[int, Any] = {}
        return self.load()

    @property
    def position(self) -> int:
        """Number of bytes read."""
        return int(self._data.tell())

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is tuple and pid[:1] == ("module",):
            # The tuple has the class, and the source code that the class had when it was saved:
            # return only the class.
            return pid[1]
        self.storages.append(pid)
        return pid


def _read(
    fetch: Fetch, data: bytes, nbytes: int, allowed: Mapping[tuple[str, str], Any], where: str
) -> tuple[Any, dict[str, Record]]:
    """Read a stream of `nbytes`. `data`: its first bytes, which must have all pickles."""
    pickles = _Pickles(data, allowed, where)
    magic, version, system, value, keys = (pickles.next() for _ in range(_NUM_PICKLES))
    if magic != _MAGIC or version != _VERSION:
        raise ValueError("it is in an unknown version of torch's stream format")
    if not system["little_endian"]:
        raise ValueError("byte order is not little-endian")
    sizes = _sizes(pickles.storages)
    position = pickles.position
    records = {"data.pkl": Record(0, Span(0, position), 0)}
    for key in keys:
        name, (itemsize, num_elements) = f"data/{key}", sizes[key]
        head = data[position : position + 8]
        (stored,) = struct.unpack("<q", head if len(head) == 8 else fetch(position, 8))
        item = Span(position + 8, num_elements * itemsize)
        if stored != num_elements or name in records:
            raise ValueError(f"storage `{key[:100]}` has {stored} elements, not {num_elements}")
        if item.stop > nbytes:
            raise ValueError(f"it ends inside of storage `{key[:100]}`")
        records[name] = Record(position, item, 0)
        position = item.stop
    return value, records


def _sizes(storages: list[Any]) -> dict[str, tuple[int, int]]:
    """Return bytes per element and number of elements of each storage, by the storage's key.
    `storages`: persistent ids of the storages."""
    sizes: dict[str, tuple[int, int]] = {}
    for storage in storages:
        kind, dtype, key, _, num_elements, *_ = storage
        if kind != "storage" or type(key) is not str or type(dtype) is not str:
            raise ValueError("its storage is not one of torch's")
        (num_elements,) = check_sizes((num_elements,))
        size = 1 if dtype == "untyped" else dtype_of(dtype).itemsize, num_elements
        if sizes.setdefault(key, size) != size:
            raise ValueError(f"storage `{key[:100]}` has two sizes")
    return sizes
