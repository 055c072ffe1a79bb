"""Both indices of a checkpoint, `manifest.json` and `.metadata`, from columns of numbers.

A job of 512 ranks and 2,000 tensors has a million chunks: here each of them is a row, written by
numpy with its neighbours. What the layout alone decides is kept apart from what every save changes,
so that it is written once while the layout stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holdfast.format import manifest as manifests
from holdfast.format.dcp import OURS
from holdfast.format.manifest import Manifest, Path, Span, TensorEntry
from holdfast.format.pickles import Call, Dumper, Global, Instance, pickled_int

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA, _INDEX, _TENSOR, _CHUNK, _PROPERTIES, _VALUE = (
    Global(_MODULE, name)
    for name in (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "BytesStorageMetadata"),
    )
)
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_LAYOUT = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_MEMORY_FORMAT = Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
_CONSTANTS = (
    *(
        _CHUNK,
        _INDEX,
        _INFO,
        _SIZE,
        _VALUE,
        "offsets",
        "sizes",
        "fqn",
        "index",
        "offset",
    ),
    *("relative_path", "length", "storage_meta", "version", "1.0.0"),
    *(_TENSOR, "properties", "chunks"),
)
"""What the parts that are written row by row, or anew, refer to."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorTable:
    """A tensor and its chunks, a row each."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: Ints
    """First element of each chunk: rows by dims."""

    stop: Ints
    places: Ints
    """Of each chunk: number of its file among those of the checkpoint, offset and bytes of its item
    there, offset of its raw elements there, which of the file's checksums is its first."""


def tables_of(manifest: Manifest) -> list[TensorTable]:
    """The tensors of a manifest; unknown numbers are -1."""
    number = {file: index for index, file in enumerate(_files(manifest))}
    return [_table(name, entry, number) for name, entry in manifest.tensors.items()]


def _table(name: str, entry: TensorEntry, number: Mapping[str, int]) -> TensorTable:
    chunks = entry.chunks
    dims = (len(chunks), len(chunks[0].region.start if chunks else entry.shape))
    places = [
        (
            *(number[c.file], c.item.offset, c.item.nbytes),
            *(-1 if known is None else known for known in (c.data_offset, c.first_block)),
        )
        for c in chunks
    ]
    return TensorTable(
        *(name, entry.dtype, entry.shape, entry.path),
        np.array([c.region.start for c in chunks], np.int64).reshape(dims),
        np.array([c.region.stop for c in chunks], np.int64).reshape(dims),
        np.array(places, np.int64).reshape(len(chunks), 5),
    )


def _files(manifest: Manifest) -> list[str]:
    named = dict.fromkeys(manifest.files)
    named |= dict.fromkeys(c.file for t in manifest.tensors.values() for c in t.chunks)
    return [*named | dict.fromkeys(value.file for value in manifest.values.values())]


def encode_tensors(tables: Iterable[TensorTable]) -> bytes:
    """The member `tensors` of `manifest.json`."""
    return manifests.joined(
        manifests.encode_tensor(t.name, t.dtype, t.shape, t.path, _numbers(t)) for t in tables
    )


def _numbers(table: TensorTable) -> list[int]:
    """Those of all chunks, as `manifest.encode_tensor` takes them."""
    columns = (table.places, table.start, table.stop)
    if len(table.places) == 1:
        # Thousands of small tensors have one chunk each: numpy is for many at once.
        return [number for column in columns for number in column[0].tolist()]
    numbers: list[int] = np.hstack(columns).ravel().tolist()
    return numbers


def encode_metadata(manifest: Manifest) -> bytes:
    """The bytes of `.metadata` for what this manifest holds."""
    values = {name: entry.path for name, entry in manifest.values.items()}
    index = StockIndex(tables_of(manifest), values, _files(manifest))
    return b"".join(index.encode({n: (e.file, e.item) for n, e in manifest.values.items()}))


class StockIndex:
    """`.metadata`, all of it but the places of the values, which change from save to save."""

    def __init__(
        self,
        tables: Iterable[TensorTable],
        values: Mapping[str, Path],
        files: Sequence[str],
    ) -> None:
        self._out = out = Dumper(OURS)
        self._known: dict[str, bytes] = {}
        self._alike: dict[tuple[object, ...], bytes] = {}
        out.know(*files, *_CONSTANTS)
        memo = np.array([out.at(file) for file in files], np.int64)
        self._index = out.get(_INDEX) + b")\x81}(" + out.get("fqn")
        self._length = out.get("length")
        self._open(_METADATA)
        out.put("state_dict_metadata")
        out.raw(b"}(")
        paths: dict[str, Path] = {}
        stored = []
        for table in tables:
            out.put(table.name)
            self._put_once(table)
            stored.append(self._places(table, memo))
            paths[table.name] = table.path
        for name in values:
            out.put(name)
            out.put(Instance(_VALUE, None))
        out.raw(b"u")
        out.put("planner_data")
        out.raw(b"}(")
        for name, path in (*paths.items(), *values.items()):
            known = out.get(name)
            if path == (name,):
                out.raw(known + known + b"\x85")
            else:
                out.raw(known)
                out.put(path)
        out.raw(b"u")
        out.put("storage_data")
        out.raw(b"}(")
        self._fixed = [out.take(), *stored]

    def encode(self, values: Mapping[str, tuple[str, Span]]) -> list[bytes]:
        """The bytes, in parts, for the file and the item of each value."""
        out = self._out
        places: dict[tuple[str, Span], bytes] = {}
        for name, place in values.items():
            if place not in places:
                places[place] = self._value_place(*place)
            out.raw(self._index + out.get(name) + places[place])
        out.raw(b"u")
        for constant in ("storage_meta", None, "version", "1.0.0"):
            out.put(constant)
        out.raw(b"ub.")
        return [*self._fixed, out.take()]

    def _open(self, cls: Global) -> None:
        """An instance, up to the first item of its state."""
        self._out.put(cls)
        self._out.raw(b")\x81}(")

    def _put_once(self, table: TensorTable) -> None:
        """As `_put_tensor`; for tensors that lie alike the bytes are made once."""
        key = (table.dtype, table.shape, table.start.tobytes(), table.stop.tobytes())
        if key in self._alike:
            self._out.raw(self._alike[key])
            return
        at, known = len(self._out.parts), self._out.num_known
        self._put_tensor(table)
        if self._out.num_known == known:
            # Where something was new to the memo, the next one is written otherwise.
            self._alike[key] = b"".join(self._out.parts[at:])

    def _put_tensor(self, table: TensorTable) -> None:
        out = self._out
        out.raw(out.get(_TENSOR) + b")\x81}(" + out.get("properties"))
        out.raw(self._properties(table.dtype))
        out.put("size")
        out.put(Call(_SIZE, (table.shape,)))
        out.raw(out.get("chunks") + b"](")
        out.raw(
            _rows(
                len(table.start),
                *(out.get(_CHUNK), b")\x81}("),
                *(out.get("offsets"), *self._size(table.start)),
                *(out.get("sizes"), *self._size(table.stop - table.start)),
                b"ub",
            )
        )
        out.raw(b"eub")

    def _properties(self, dtype: str) -> bytes:
        """Of a tensor of this dtype; the same bytes each time."""
        if dtype not in self._known:
            out, before = self._out, self._out.take()
            fields = (Global("torch", dtype), _LAYOUT, False, _MEMORY_FORMAT, False)
            # All that it refers to, so that nothing in it is new to the memo.
            layout, order = _LAYOUT.function, _MEMORY_FORMAT.function
            out.know(_PROPERTIES, fields[0], layout, *_LAYOUT.args, order)
            known = out.take()
            out.put(Instance(_PROPERTIES, fields))
            self._known[dtype] = out.take()
            out.raw(before + known)
        return self._known[dtype]

    def _places(self, table: TensorTable, memo: Ints) -> bytes:
        """Where each chunk lies; `memo` has the files' places there."""
        out = self._out
        if len(table.start) == 1:
            return self._place(table, memo)
        file, offset, nbytes = table.places.T[:3]
        return _rows(
            len(table.start),
            *(out.get(_INDEX), b")\x81}("),
            *(out.get("fqn"), out.get(table.name)),
            *(out.get("index"), np.arange(len(table.start))),
            *(out.get("offset"), *self._size(table.start)),
            *(b"ub", out.get(_INFO), b")\x81}("),
            *(out.get("relative_path"), _Gets(memo[file])),
            *(out.get("offset"), offset),
            *(out.get("length"), nbytes),
            b"ub",
        )

    def _place(self, table: TensorTable, memo: Ints) -> bytes:
        """As `_places`, of a tensor of one chunk."""
        out, start = self._out, table.start.tobytes()
        file, offset, nbytes = table.places[0].tolist()[:3]
        key = (start, table.start.shape, file)
        if key not in self._alike:
            self._alike[key] = _rows(
                1,
                *(out.get("index"), np.zeros(1, np.int64)),
                *(out.get("offset"), *self._size(table.start)),
                *(b"ub", out.get(_INFO), b")\x81}("),
                *(out.get("relative_path"), _Gets(memo[[file]])),
                out.get("offset"),
            )
        return b"".join(
            (
                *(self._index, out.get(table.name), self._alike[key]),
                *(_number(offset), self._length, _number(nbytes), b"ub"),
            )
        )

    def _value_place(self, file: str, item: Span) -> bytes:
        """What follows the name of a value: it has neither an index nor an offset of its own."""
        get = self._out.get
        return b"".join(
            (
                *(get("index"), b"N", get("offset"), b"Nub"),
                *(get(_INFO), b")\x81}(", get("relative_path"), get(file)),
                *(get("offset"), pickled_int(item.offset)),
                *(self._length, pickled_int(item.nbytes), b"ub"),
            )
        )

    def _size(self, columns: Ints) -> list[_Part]:
        """`torch.Size` of a tuple a row."""
        before, after = b"(", b"t"
        if columns.shape[1] < 4:
            before, after = b"", (b")", b"\x85", b"\x86", b"\x87")[columns.shape[1]]
        return [self._out.get(_SIZE), before, *columns.T, after, b"\x85R"]


@dataclass(frozen=True, slots=True, eq=False)
class _Gets:
    """Places in the memo, a row each."""

    places: Ints


_Part = bytes | Ints | _Gets
"""Of a row: the same in each; or an int of its own, or something known, in each."""

_FEW = 24
"""Rows that are sooner written one by one than all at once by numpy."""


def _rows(count: int, *parts: _Part) -> bytes:
    """So many rows of the parts one after the other."""
    if count < _FEW:
        spelled = [p if isinstance(p, bytes) else _spelled(p) for p in parts]
        return b"".join(p if isinstance(p, bytes) else p[n] for n in range(count) for p in spelled)
    columns = [np.frombuffer(p, np.uint8) if isinstance(p, bytes) else _column(p) for p in parts]
    rows = np.empty((count, sum(column.shape[-1] for column in columns)), np.uint8)
    at = 0
    for column in columns:
        rows[:, at : at + column.shape[-1]] = column
        at += column.shape[-1]
    return rows.tobytes()


def _opcode(part: Ints | _Gets) -> tuple[Ints, bytes, str]:
    """The numbers, the opcode before each, and their type: one as wide as the largest needs."""
    if isinstance(part, _Gets):
        return part.places, b"j", "<u4"
    return part, *_width(int(part.max()) if len(part) else 0)


_WIDTHS = (
    *((b"K", "u1", 1 << 8), (b"M", "<u2", 1 << 16), (b"J", "<i4", 1 << 31)),
    (b"\x8a\x08", "<i8", 1 << 63),
)


def _width(largest: int) -> tuple[bytes, str]:
    """The opcode for ints up to this one, and their type."""
    for opcode, dtype, limit in _WIDTHS:
        if largest < limit:
            return opcode, dtype
    raise OverflowError(f"{largest} is more than 63 bits")


def _number(number: int) -> bytes:
    """An int with its opcode."""
    opcode, dtype = _width(number)
    return opcode + number.to_bytes(int(dtype[-1]), "little")


def _spelled(part: Ints | _Gets) -> list[bytes]:
    """Each number with its opcode, one by one: for few rows."""
    numbers, opcode, dtype = _opcode(part)
    nbytes = int(dtype[-1])
    return [opcode + number.to_bytes(nbytes, "little") for number in numbers.tolist()]


def _column(part: Ints | _Gets) -> Bytes:
    """Each number with its opcode, all at once."""
    numbers, opcode, dtype = _opcode(part)
    column = numbers.astype(dtype)
    made = np.empty((len(column), len(opcode) + column.itemsize), np.uint8)
    made[:, : len(opcode)] = np.frombuffer(opcode, np.uint8)
    made[:, len(opcode) :] = column.view(np.uint8).reshape(len(column), -1)
    return made
