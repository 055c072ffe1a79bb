"""`.pt` files, in which `torch.save` stores a whole state: read and write them without torch.

A file is one ZIP archive: `data.pkl` describes the objects, `data/<key>` holds the elements of each
storage. Entries are named by their path, joined by dots, as in a DCP checkpoint. Every record that
Holdfast writes has its CRC-32, since no manifest beside the file could reveal a flipped bit.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.archive import (
    Fetch,
    Record,
    directory_end,
    directory_entry,
    local_header,
)
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import (
    Chunk,
    Manifest,
    Path,
    Span,
    TensorEntry,
    ValueEntry,
)
from holdfast.format.pickles import Plain, pickled_int, pickled_str
from holdfast.format.region import Region
from holdfast.format.torchzip import (
    GLOBALS,
    PICKLE_BYTES_MAX,
    Tensor,
    contiguous_strides,
    described,
    pickled_tensor,
    read_pickle,
    stored_tensor,
)
from holdfast.format.untrusted import KEYS_MAX

ALIGN = 64
"""Alignment of the elements of a tensor, so that a mapped file can be used in place."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """Contents of a `.pt` file."""

    manifest: Manifest
    """Chunks of tensors that are not row-major have no `data_offset`."""

    strides: Mapping[str, tuple[int, ...]]
    """Strides, in elements, of tensors that are not row-major; they start at their item."""

    records: Mapping[str, Record]
    """All records of the archive."""


def read_file(fetch: Fetch, nbytes: int, *, file: str, where: str) -> TorchFile:
    """Read the contents of a `.pt` file of `nbytes`. Fetches only its directory and its pickle.

    Raises:
        FormatError: it is no `.pt` file, or its pickle refers to code.
    """
    start = fetch(0, 4)
    if start[:1] == b"\x80":
        raise FormatError(
            f"`{where}` is a pickle, or in the format of torch before 1.6, which is not supported",
            hint="if you trust its writer, load it with torch.load and torch.save it again",
        )
    try:
        value, pickle_bytes, records = read_pickle(
            fetch, Span(0, nbytes), _ALLOWED, PICKLE_BYTES_MAX, where=where
        )
        return _state(value, pickle_bytes, records, file, nbytes)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"`{where}` is not a file of torch.save: {error}") from error


def _state(
    value: object, pickle_bytes: int, records: Mapping[str, Record], file: str, nbytes: int
) -> TorchFile:
    tensors: dict[str, TensorEntry] = {}
    values: dict[str, ValueEntry] = {}
    strides: dict[str, tuple[int, ...]] = {}
    for path, leaf in _leaves(value, pickle_bytes):
        name = ".".join(map(str, path))
        if name in tensors or name in values:
            raise ValueError(f"two entries are named `{name[:200]}`")
        if not isinstance(leaf, Tensor):
            values[name] = ValueEntry(file, records["data.pkl"].data, None, path)
            continue
        stored = stored_tensor(described(leaf), records, 0)
        region = Region.whole(stored.shape)
        data_bytes = region.num_elements * dtype_of(stored.dtype).itemsize
        if data_bytes > nbytes:
            # An expanded tensor (stride 0) could claim any size and store only a few bytes.
            raise ValueError(f"`{name[:200]}` has {data_bytes} bytes, the file only {nbytes}")
        row_major = stored.strides == contiguous_strides(stored.shape) or region.num_elements < 2
        if row_major:
            item = Span(stored.data.offset, data_bytes)
        else:
            item, strides[name] = stored.data, stored.strides
        chunk = Chunk(region, file, item, item.offset if row_major else None)
        tensors[name] = TensorEntry(stored.dtype, stored.shape, (chunk,), path)
    return TorchFile(Manifest(tensors, values, files={file: nbytes}), strides, records)


def _leaves(value: object, num_max: int) -> Iterator[tuple[Path, object]]:
    """Yield tensors and values by path, depth first.

    An object may be shared, or contain itself. Raises `ValueError` after `num_max` objects, the
    bytes of the pickle: only a crafted file has more.
    """
    waiting: list[tuple[Path, object]] = [((), value)]
    while waiting:
        path, node = waiting.pop()
        num_max -= 1
        members: list[tuple[Any, object]] = []
        if isinstance(node, dict):
            members = list(node.items())
        elif isinstance(node, list | tuple):
            members = list(enumerate(node))
        if not members or _is_plain(members):
            yield path or ("value",), node
            continue
        num_max -= len(members)
        if len(path) >= KEYS_MAX or num_max < 0:
            raise ValueError("its objects are nested too deep, or in one another")
        waiting += [((*path, _key(key)), member) for key, member in reversed(members)]


def _is_plain(members: list[tuple[Any, object]]) -> bool:
    """Whether a list has only numbers and texts, like a shape or the betas of an optimizer."""
    return all(
        type(key) is int and not isinstance(member, dict | list | tuple | Plain)
        for key, member in members
    )


def _key(key: object) -> str | int:
    if type(key) is int or type(key) is str:
        return key
    if key is None or isinstance(key, bool | float):
        return str(key)
    raise ValueError(f"a key that is a {type(key).__name__}")


class _Value(Plain):
    """Stands for a value that is not read."""


_ALLOWED: Mapping[tuple[str, str], Any] = {
    **GLOBALS,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "device"): _Value,
    ("torch", "Generator"): _Value,
    ("_codecs", "encode"): _Value,
    **{
        (module, name): _Value
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "complex", "bytearray", "slice", "range")
    },
}


# ---------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    same_as: str = ""
    """Name of the tensor whose elements it shares; empty if it has its own."""

    @property
    def nbytes(self) -> int:
        return Region.whole(self.shape).num_elements * dtype_of(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class _NewRecord:
    """A record to write."""

    name: str
    header: int
    nbytes: int
    content: bytes | None = None
    tensor: str = ""
    """Name of the tensor whose elements it holds, if it has no content."""

    @property
    def data(self) -> Span:
        """Position of its data in the file."""
        return Span(self.header + len(self.local(0)), self.nbytes)

    def local(self, crc32: int) -> bytes:
        """Header before its data, which begin on a multiple of `ALIGN`."""
        name = f"archive/{self.name}".encode()
        return local_header(name, self.nbytes, position=self.header, align=ALIGN, crc32=crc32)

    def entry(self, crc32: int) -> bytes:
        """Entry in the directory."""
        name = f"archive/{self.name}".encode()
        return directory_entry(name, self.nbytes, self.header, crc32=crc32)


@dataclass(frozen=True, slots=True)
class TorchFileLayout:
    """Layout of a `.pt` file, decided before it is written."""

    nbytes: int
    tensors: Mapping[str, Span]
    """Position of each tensor's elements, without tensors that share those of another."""

    records: tuple[_NewRecord, ...]

    def frames(self, crc32s: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes except the elements, with their offset. `crc32s` are the CRC-32s of each
        tensor's elements, by name."""
        entries = []
        for record in self.records:
            content = record.content
            crc32 = crc32s[record.tensor] if content is None else zlib.crc32(content)
            yield record.header, record.local(crc32) + (content or b"")
            entries.append(record.entry(crc32))
        directory, stop = b"".join(entries), self.records[-1].data.stop
        yield stop, directory + directory_end(len(entries), len(directory), stop)


def lay_out(
    tensors: Mapping[str, NewTensor], values: Mapping[str, tuple[Path, bytes]]
) -> TorchFileLayout:
    """Lay out a file with these tensors and values, nested by their paths.

    `values` gives the path and the pickle (protocol 2) of each value.
    """
    stored = [name for name, tensor in tensors.items() if not tensor.same_as]
    keys = {name: str(number) for number, name in enumerate(stored)}
    leaves: dict[Path, bytes] = {}
    for name, tensor in tensors.items():
        key = keys[tensor.same_as or name]
        leaves[tensor.path] = pickled_tensor(tensor.dtype, tensor.shape, key)
    for path, pickled in values.values():
        leaves[path] = pickled[2:-1]  # Without the protocol and the stop opcode.
    pickle = b"\x80\x02" + _pickled(_tree(leaves)) + b"."
    small = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    records: list[_NewRecord] = []
    positions: dict[str, Span] = {}
    position = 0
    for name, data in small.items():
        records.append(_NewRecord(name, position, len(data), data))
        position = records[-1].data.stop
    for name in stored:
        nbytes = tensors[name].nbytes
        records.append(_NewRecord(f"data/{keys[name]}", position, nbytes, tensor=name))
        positions[name] = records[-1].data
        position = positions[name].stop
    directory_bytes = sum(len(record.entry(0)) for record in records)
    end = directory_end(len(records), directory_bytes, position)
    return TorchFileLayout(position + directory_bytes + len(end), positions, tuple(records))


def _tree(leaves: Mapping[Path, bytes]) -> dict[str | int, Any]:
    root: dict[str | int, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return root


def _pickled(node: Any) -> bytes:
    """Pickle nested dicts of pickled leaves. A dict with the keys 0, 1, 2, ... becomes a list."""
    if isinstance(node, bytes):
        return node
    if [*node] == [*range(len(node))] and node:
        return b"](" + b"".join(map(_pickled, node.values())) + b"e"
    members = (
        (pickled_int(key) if isinstance(key, int) else pickled_str(key)) + _pickled(member)
        for key, member in node.items()
    )
    return b"}(" + b"".join(members) + b"u"
