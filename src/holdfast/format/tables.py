"""Encode `manifest.json`, `index.bin` and `.metadata` from columns of numbers.

A job of 512 ranks and 2,000 tensors has a million chunks. So this module keeps each chunk as a row
of an array, and numpy encodes many rows at once. Bytes that depend only on the layout are encoded
once, and later saves use them again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from holdfast.format.checksum import block_checksums, checksum, pack
from holdfast.format.chunks import BLOCK_BYTES, NUM_PLACES, RowFile, Span, Table
from holdfast.format.dcp import OURS
from holdfast.format.dumper import Call, Dumper, FileName, Global, Instance, pickled_int
from holdfast.format.manifest import Path, encode_tensor, encode_tensor_with_rows

Ints = NDArray[np.int64]

Places = Ints | Sequence[Sequence[int]]
"""Positions of chunks. Lists take less time than an array if there are few chunks."""

_LARGE_CHUNKS_MIN = 512
"""Number of chunks from which a tensor is large: its encoded metadata is then never copied into one
string with that of other tensors."""

_JOINED_BYTES_MAX = 16 << 20
"""Total size up to which the encoded positions of all tensors are joined into one part."""

_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA = Global(_MODULE, "Metadata")
_INDEX = Global(_MODULE, "MetadataIndex")
_TENSOR = Global(_MODULE, "TensorStorageMetadata")
_CHUNK = Global(_MODULE, "ChunkStorageMetadata")
_PROPERTIES = Global(_MODULE, "TensorProperties")
_VALUE = Global(_MODULE, "BytesStorageMetadata")
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_LAYOUT = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_MEMORY_FORMAT = Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
_FIELDS = ("offsets", "sizes", "fqn", "index", "offset", "relative_path", "length")
_MEMBERS = ("storage_meta", "version", "1.0.0", _TENSOR, "properties", "chunks")
_CONSTANTS = (_CHUNK, _INDEX, _INFO, _SIZE, _VALUE, *_FIELDS, *_MEMBERS)
"""Globals and strings that are memoized first, so that every row can refer to them by index."""


class TensorTable(NamedTuple):
    """A tensor, and arrays with one row per chunk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: Ints
    """First element of each chunk, shape (chunks, dims)."""

    stop: Ints
    """One past the last element of each chunk, shape (chunks, dims)."""

    places: Places
    """Position of each chunk, shape (chunks, 5): index of its file, offset and bytes of its item,
    offset of its raw elements, index of its first checksum in the file's table."""


def encode_tensors(tables: Sequence[TensorTable]) -> bytes:
    """Encode the member `tensors` of `manifest.json`."""
    members: list[bytes] = []
    # By the `id()` of the arrays: `tables` keeps them, so that no two have the same.
    regions: dict[tuple[int, int], bytes] = {}
    for table in tables:
        start, stop, places = table.start, table.stop, table.places
        if len(places) == 1:
            # numpy is slower for a single chunk, and thousands of small tensors have only one.
            region = regions.get((id(start), id(stop)))
            if region is None:
                bounds = start[0].tolist() + stop[0].tolist()
                region = b"".join([b",%d" % bound for bound in bounds])
                regions[id(start), id(stop)] = region
            chunks = b"[%d,%d,%d,%d,%d%b]" % (*places[0], region)
        else:
            chunks = _encode_chunks(np.hstack((_array(places), start, stop)))
        members.append(encode_tensor(table.name, table.dtype, table.shape, table.path, chunks))
    return b"{%b}" % b",".join(members)


def _array(places: Places) -> Ints:
    return np.asarray(places, np.int64).reshape(len(places), NUM_PLACES)


def _encode_chunks(rows: Ints) -> bytes:
    """Encode the chunks of a tensor in `manifest.json`. `rows`: for each chunk, its place, then its
    start and stop along each dim."""
    # Flat: with a list per chunk, the garbage collector would track a million lists.
    numbers: list[int] = rows.ravel().tolist()
    return _rows_format(rows.shape[1], len(rows)) % tuple(numbers)


@lru_cache(maxsize=64)
def _rows_format(size: int, count: int) -> bytes:
    """Return a `%` format string for `count` lists of `size` ints, separated by commas."""
    row = b"[" + b",".join([b"%d"] * size) + b"]"
    return b",".join([row] * count)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRows:
    """`index.bin`, and the part of `manifest.json` that refers to it."""

    tensors: bytes
    """Member `tensors` of `manifest.json`."""

    file: RowFile
    parts: Sequence[bytes | memoryview]
    """Content of `index.bin`: all rows, then the table of their checksums."""


def encode_rows(tables: Sequence[TensorTable]) -> EncodedRows:
    """Encode `index.bin`, and the member `tensors` of `manifest.json`, which refers to the rows in
    `index.bin`."""
    sizes = [len(t.places) * (NUM_PLACES + 2 * len(t.shape)) for t in tables]
    numbers = np.empty(sum(sizes), "<i8")
    orders: dict[int, tuple[Ints | None, Ints, list[int]]] = {}
    members, position, size = [], 0, 0
    places: Places | None = None
    for table, next_size in zip(tables, sizes, strict=True):
        # A tied tensor has several names, all of which refer to the same rows.
        if table.places is not places:
            places, position, size = table.places, position + size, next_size
            if id(table.start) not in orders:
                orders[id(table.start)] = _sorted_regions(table)
            order, regions, longest = orders[id(table.start)]
            in_order, width = _array(places), NUM_PLACES + 2 * len(table.shape)
            rows = numbers[position : position + size].reshape(len(in_order), width)
            rows[:, :NUM_PLACES] = in_order if order is None else in_order[order]
            rows[:, NUM_PLACES:] = regions
        member = (position * numbers.itemsize, len(table.places), *longest)
        members.append(
            encode_tensor_with_rows(table.name, table.dtype, table.shape, table.path, member)
        )
    content = numbers[: position + size].view(np.uint8).data
    checksums = pack(block_checksums(content, BLOCK_BYTES))
    file = RowFile(len(content) + len(checksums), Table(len(content), checksum(checksums)))
    return EncodedRows(b"{" + b",".join(members) + b"}", file, [content, checksums])


def _sorted_regions(table: TensorTable) -> tuple[Ints | None, Ints, list[int]]:
    """Return the order that sorts the chunks by their start (None if they are sorted already), the
    start and stop of each chunk in this order, and the length of the longest chunk along each dim.
    """
    start, stop = table.start, table.stop
    # For `lexsort`, the last key is the most important one: so reverse the dims.
    order = np.lexsort(start.T[::-1]) if start.shape[1] else np.arange(len(start))
    longest: list[int] = (stop - start).max(axis=0, initial=0).tolist()
    is_sorted = bool((order[1:] > order[:-1]).all())
    return None if is_sorted else order, np.hstack([start, stop])[order], longest


class StockIndex:
    """Encoder of `.metadata`. Everything but the positions of the values is encoded only once,
    since only these positions change with every save."""

    def __init__(
        self,
        tables: Sequence[TensorTable],
        values: Mapping[str, Path],
        files: Sequence[str],
    ) -> None:
        self._out = out = Dumper(OURS)
        self._properties_of: dict[str, bytes] = {}
        self._of_content: dict[tuple[object, ...], bytes] = {}
        """Encoded metadata of tensors, by dtype, shape and chunks."""

        self._of_layout: dict[tuple[object, ...], bytes] = {}
        """The same by the `id()` of the arrays of the chunks, which tensors of one layout share.
        `tables` keeps the arrays, so that no two have the same."""

        self._around_offset: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}
        """Parts of the position of an only chunk before and after the offset of its item, by the
        `id()` of the array `start`, the index of the file, and the bytes of the item."""

        self._large: list[bytes | bytearray] = []
        """Encoded bytes up to the last large tensor. They are never copied."""

        file_names = [*map(FileName, files)]
        out.memoize(*file_names, *_CONSTANTS)
        file_memo = np.array([out.index(file) for file in file_names], np.int64)
        self._index = out.get(_INDEX) + b")\x81}(" + out.get("fqn")
        self._length = out.get("length")
        out.put(_METADATA)
        out.raw(b")\x81}(")
        out.put("state_dict_metadata")
        out.raw(b"}(")
        paths: list[tuple[bytes, str, Path]] = []
        stored = []
        for table in tables:
            name = out.put_text(table.name)
            self._put_tensor(table)
            place = self._place if len(table.places) == 1 else self._places
            stored.append(place(table, name, file_memo))
            paths.append((name, table.name, table.path))
        for text, path in values.items():
            paths.append((out.put_text(text), text, path))
            out.put(Instance(_VALUE, None))
        out.raw(b"u")
        self._put_paths(paths)
        out.put("storage_data")
        out.raw(b"}(")
        if len(stored) > 1 and sum(map(len, stored)) < _JOINED_BYTES_MAX:
            # Thousands of small parts would take longer to write than one.
            stored = [b"".join(stored)]
        self._fixed = [*self._large, out.take(), *stored]
        # An `id()` is valid only while `tables` lives.
        for cache in (self._of_content, self._of_layout, self._around_offset):
            cache.clear()

    def encode(self, values: Mapping[str, tuple[str, Span]]) -> list[bytes | bytearray]:
        """Encode `.metadata`, given the file and the item of each value. Return it in parts."""
        out = self._out
        places: dict[tuple[str, Span], bytes] = {}
        for name, (file, item) in values.items():
            if (file, item) not in places:
                places[file, item] = self._value_place(file, item)
            out.raw(self._index + out.get(name) + places[file, item])
        out.raw(b"u")
        for constant in ("storage_meta", None, "version", "1.0.0"):
            out.put(constant)
        out.raw(b"ub.")
        return [*self._fixed, out.take()]

    def _put_paths(self, paths: Iterable[tuple[bytes, str, Path]]) -> None:
        """Write the path of each entry. `paths`: the opcode that pushes its name, its name, and its
        path."""
        out = self._out
        out.put("planner_data")
        out.raw(b"}(")
        for name, text, path in paths:
            if path == (text,):
                out.raw(b"%b%b\x85" % (name, name))
            else:
                out.raw(name)
                out.put(path)
        out.raw(b"u")

    def _put_tensor(self, table: TensorTable) -> None:
        """Write the metadata of a tensor. Tensors of equal dtype, shape and chunks share the bytes
        of their metadata."""
        out, start, stop = self._out, table.start, table.stop
        layout = (table.dtype, table.shape, id(start), id(stop))
        encoded = self._of_layout.get(layout)
        if encoded is None:
            num_parts, num_memoized = len(out.parts), out.num_memoized
            content = (table.dtype, table.shape, start.tobytes(), stop.tobytes())
            encoded = self._of_content.get(content)
            if encoded is None:
                self._put_new_tensor(table)
                if out.num_memoized != num_memoized:
                    # These bytes memoize a new object, so they cannot be used again: the next
                    # tensor must refer to that object instead.
                    return
                encoded = b"".join(out.parts[num_parts:])
                del out.parts[num_parts:]
                self._of_content[content] = encoded
            self._of_layout[layout] = encoded
        if len(start) >= _LARGE_CHUNKS_MIN:
            self._large += [out.take(), encoded]
        else:
            out.raw(encoded)

    def _put_new_tensor(self, table: TensorTable) -> None:
        out, start, stop = self._out, table.start, table.stop
        out.raw(out.get(_TENSOR) + b")\x81}(" + out.get("properties"))
        out.raw(self._properties(table.dtype))
        out.put("size")
        out.put(Call(_SIZE, (table.shape,)))
        out.raw(out.get("chunks") + b"](")
        out.raw(
            _rows(
                len(start),
                out.get(_CHUNK) + b")\x81}(" + out.get("offsets"),
                *self._size(start),
                out.get("sizes"),
                *self._size(stop - start),
                b"ub",
            )
        )
        out.raw(b"eub")

    def _properties(self, dtype: str) -> bytes:
        """Return the pickled `TensorProperties` of a dtype: the same bytes for all its tensors."""
        if dtype not in self._properties_of:
            out, before = self._out, self._out.take()
            fields = (Global("torch", dtype), _LAYOUT, False, _MEMORY_FORMAT, False)
            # First memoize everything that the `TensorProperties` refer to, so that their bytes can
            # be used again.
            layout, order = _LAYOUT.function, _MEMORY_FORMAT.function
            out.memoize(_PROPERTIES, fields[0], layout, *_LAYOUT.args, order)
            memoized = out.take()
            out.put(Instance(_PROPERTIES, fields))
            self._properties_of[dtype] = out.take()
            out.raw(before + memoized)
        return self._properties_of[dtype]

    def _places(self, table: TensorTable, name: bytes, file_memo: Ints) -> bytes | bytearray:
        """Encode the positions of a tensor's chunks. `name`: opcode that pushes the tensor's name.
        `file_memo`: memo index of each file name."""
        out, start = self._out, table.start
        file, offset, nbytes = _array(table.places).T[:3]
        return _rows(
            len(start),
            self._index + name + out.get("index"),
            np.arange(len(start)),
            out.get("offset"),
            *self._size(start),
            b"ub" + out.get(_INFO) + b")\x81}(" + out.get("relative_path"),
            _MemoIndices(file_memo[file]),
            out.get("offset"),
            offset,
            self._length,
            nbytes,
            b"ub",
        )

    def _place(self, table: TensorTable, name: bytes, file_memo: Ints) -> bytes:
        """Encode the position of the only chunk of a tensor, like `_places` but faster."""
        out, start = self._out, table.start
        file, offset, nbytes, _, _ = table.places[0]
        key = id(start), file, nbytes
        around = self._around_offset.get(key)
        if around is None:
            row = _rows(
                1,
                out.get("index"),
                np.zeros(1, np.int64),
                out.get("offset"),
                *self._size(start),
                b"ub" + out.get(_INFO) + b")\x81}(" + out.get("relative_path"),
                _MemoIndices(file_memo[[file]]),
                out.get("offset"),
            )
            after = self._length + _packed(nbytes) + b"ub"
            around = self._around_offset[key] = bytes(row), after
        before, after = around
        return b"%b%b%b%b%b" % (self._index, name, before, _packed(offset), after)

    def _value_place(self, file: str, item: Span) -> bytes:
        """Encode the position of a value. The bytes follow the value's name in `.metadata`. A value
        has no chunks, so its fields `index` and `offset` are None."""
        get = self._out.get
        index = get("index") + b"N" + get("offset") + b"Nub"
        info = get(_INFO) + b")\x81}(" + get("relative_path") + get(FileName(file))
        offset = get("offset") + pickled_int(item.offset)
        return index + info + offset + self._length + pickled_int(item.nbytes) + b"ub"

    def _size(self, columns: Ints) -> list[_Part]:
        """Return arguments for `_rows` that pickle each row of `columns` as a `torch.Size`."""
        size = self._out.get(_SIZE)
        if columns.shape[1] > 3:
            return [size + b"(", *columns.T, b"t\x85R"]
        return [size, *columns.T, (b")", b"\x85", b"\x86", b"\x87")[columns.shape[1]] + b"\x85R"]


@dataclass(frozen=True, slots=True, eq=False)
class _MemoIndices:
    """For each row, the memo index of one object."""

    indices: Ints


_Part = bytes | Ints | _MemoIndices
"""A part of all rows: constant bytes, one int per row, or one memoized object per row."""


def _rows(count: int, *parts: _Part) -> bytearray:
    """Encode `count` rows. Each row consists of the `parts`, one after the other."""
    template = bytearray()
    columns: list[tuple[int, str, Ints]] = []
    for part in parts:
        if isinstance(part, bytes):
            template += part
        else:
            numbers, opcode, code = _opcode(part)
            template += opcode
            columns.append((len(template), code, numbers))
            template += bytes(struct.calcsize(code))
    rows = template * count
    for offset, code, numbers in columns if count else ():
        # Write column by column: a structured array of all parts would take three times as long.
        np.ndarray(count, code, rows, offset, len(template))[:] = numbers
    return rows


def _opcode(part: Ints | _MemoIndices) -> tuple[Ints, bytes, str]:
    """Return the numbers, the opcode before each number, and the `struct` code of all numbers."""
    if isinstance(part, _MemoIndices):
        return part.indices, b"j", "<I"
    opcode, code = _OPCODES[int(part.max(initial=0)).bit_length()]
    return part, opcode, code


_OPCODES = [
    *[(b"K", "<B")] * (1 + 8),
    *[(b"M", "<H")] * 8,
    *[(b"J", "<i")] * 15,
    *[(b"\x8a\x08", "<q")] * 32,
]
"""For ints of 0 to 63 bits, the opcode, and the `struct` code of the number after it."""


def _packed(number: int) -> bytes:
    """Encode an int that is not negative, with its opcode."""
    opcode, code = _OPCODES[int(number).bit_length()]
    return opcode + struct.pack(code, number)
