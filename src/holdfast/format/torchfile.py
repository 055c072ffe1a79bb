"""A `.pt` file: what `torch.save` wrote of a whole state, seen as one manifest without torch.

One ZIP archive: `data.pkl` describes the objects, `data/<key>` holds the elements of each storage.
Entries are named by the keys that lead to them, joined by dots, as in a DCP checkpoint. Every
record that is written here has its CRC-32: nothing else goes with the file that tells of a flipped
bit.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.archive import FULL, LOCAL, Fetch, Record, read_records, windowed
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import (
    KEYS_MAX,
    Chunk,
    Manifest,
    Path,
    Span,
    TensorEntry,
    ValueEntry,
)
from holdfast.format.pickles import Plain, loads, pickled_int, pickled_str
from holdfast.format.region import Region
from holdfast.format.torchzip import (
    GLOBALS,
    Tensor,
    central_record,
    check_byte_order,
    content,
    contiguous_strides,
    described,
    end_records,
    local_record,
    pickled_tensor,
    place,
)

PICKLE_BYTES_MAX = 256 << 20
"""Of `data.pkl`: two million tensors."""

ALIGN = 64
"""Of the elements of a tensor, so that they can be used where the file is mapped."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a `.pt` file holds."""

    manifest: Manifest
    """Chunks of tensors that do not lie row by row have no `data_offset`."""

    strides: Mapping[str, tuple[int, ...]]
    """Elements between neighbours, of those tensors; their elements start where their item does."""

    records: Mapping[str, Record]
    """Everything in the archive, with its CRC-32."""


def read_file(fetch: Fetch, nbytes: int, *, file: str, where: str) -> TorchFile:
    """What the `.pt` file of `nbytes` holds. Fetches its directory and its pickle.

    Raises:
        FormatError: no such file, or one that names code.
    """
    start = fetch(0, 4)
    if start[:1] == b"\x80":
        raise FormatError(
            f"`{where}` is a pickle, or in the format of torch before 1.6, which is not read here",
            hint="load it where you trust it, with torch.load, and torch.save it again",
        )
    try:
        within = windowed(fetch, Span(0, nbytes))
        records = read_records(within, nbytes)
        if "data.pkl" not in records:
            raise ValueError("a ZIP archive of another program, without `data.pkl`")
        check_byte_order(within, records)
        pickled = content(within, records["data.pkl"], PICKLE_BYTES_MAX)
        made = loads(pickled, _ALLOWED, where=where)
        return _state(made, len(pickled), records, file, nbytes)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"`{where}` is not a file of torch.save: {error}") from error


def _state(
    made: object, pickle_bytes: int, records: Mapping[str, Record], file: str, nbytes: int
) -> TorchFile:
    tensors: dict[str, TensorEntry] = {}
    values: dict[str, ValueEntry] = {}
    strides: dict[str, tuple[int, ...]] = {}
    for path, leaf in _leaves(made, pickle_bytes):
        name = ".".join(map(str, path))
        if name in tensors or name in values:
            raise ValueError(f"two entries are named `{name[:200]}`")
        if not isinstance(leaf, Tensor):
            values[name] = ValueEntry(file, records["data.pkl"].data, None, path)
            continue
        stored = place(described(leaf), records, 0)
        whole = Region.whole(stored.shape)
        taken = whole.num_elements * dtype_of(stored.dtype).itemsize
        if taken > nbytes:
            # As `expand` makes them: a few bytes could state a tensor of any size.
            raise ValueError(f"`{name[:200]}` states {taken} bytes, the file has {nbytes}")
        rows = stored.strides == contiguous_strides(stored.shape) or whole.num_elements < 2
        if rows:
            item = Span(stored.data.offset, taken)
        else:
            item, strides[name] = stored.data, stored.strides
        chunk = Chunk(whole, file, item, item.offset if rows else None)
        tensors[name] = TensorEntry(stored.dtype, stored.shape, (chunk,), path)
    return TorchFile(Manifest(tensors, values, files={file: nbytes}), strides, records)


def _leaves(made: object, num_max: int) -> Iterator[tuple[Path, object]]:
    """Tensors and values by their path, depth first. An object may be shared, or hold itself: there
    are no more places in it than bytes in the pickle, or it was made to blow up."""
    waiting: list[tuple[Path, object]] = [((), made)]
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
    """Whether these hold nothing but numbers and text, as a shape or the betas of an optimizer."""
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
    """Stands for a value of no interest here."""


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
    """A tensor that a file is to hold."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    same_as: str = ""
    """The tensor whose elements it shares, where it has none of its own."""

    @property
    def nbytes(self) -> int:
        return Region.whole(self.shape).num_elements * dtype_of(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class _NewRecord:
    """A record before it is written."""

    name: str
    header: int
    nbytes: int
    content: bytes | None = None
    tensor: str = ""
    """The tensor whose elements it holds, where it has no content yet."""

    @property
    def data(self) -> Span:
        """Where its data lies in the file."""
        return Span(self.header + len(self.frame(0)), self.nbytes)

    def frame(self, crc32: int) -> bytes:
        """What stands before the record's data; data begins on a multiple of `ALIGN`."""
        named = f"archive/{self.name}".encode()
        size64 = struct.pack("<2Q", self.nbytes, self.nbytes) if self.nbytes >= FULL else b""
        field = _field64(size64)
        padding = -(self.header + LOCAL.size + len(named) + len(field) + 4) % ALIGN
        extra = field + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        return local_record(named, self.nbytes, extra, crc32)

    def listed(self, crc32: int) -> bytes:
        """Its entry in the directory."""
        size64 = struct.pack("<2Q", self.nbytes, self.nbytes) if self.nbytes >= FULL else b""
        at64 = struct.pack("<Q", self.header) if self.header >= FULL else b""
        named = f"archive/{self.name}".encode()
        return central_record(named, self.nbytes, self.header, _field64(size64 + at64), crc32)


@dataclass(frozen=True, slots=True)
class TorchFileLayout:
    """A file before it is written: where the tensors go, and what stands around them."""

    nbytes: int
    tensors: Mapping[str, Span]
    """Where the raw elements go; those that share another's are left out."""

    records: tuple[_NewRecord, ...]

    def frames(self, crc32s: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """Everything but the elements, by position. `crc32s` are those of the elements of each
        tensor: no other checksum goes with a file of this kind."""
        listed = []
        for record in self.records:
            content = record.content
            crc32 = crc32s[record.tensor] if content is None else zlib.crc32(content)
            yield record.header, record.frame(crc32) + (content or b"")
            listed.append(record.listed(crc32))
        directory, stop = b"".join(listed), self.records[-1].data.stop
        yield stop, directory + end_records(len(listed), len(directory), stop)


def lay_out(
    tensors: Mapping[str, NewTensor], values: Mapping[str, tuple[Path, bytes]]
) -> TorchFileLayout:
    """Where everything lies in a file that holds these, as `torch.save` would nest them.

    `values` are paths and pickles (protocol 2) of what is not a tensor.
    """
    stored = [name for name, tensor in tensors.items() if not tensor.same_as]
    keys = {name: str(number) for number, name in enumerate(stored)}
    leaves: dict[Path, bytes] = {}
    for name, tensor in tensors.items():
        key = keys[tensor.same_as or name]
        leaves[tensor.path] = pickled_tensor(tensor.dtype, tensor.shape, key)
    for path, pickled in values.values():
        leaves[path] = pickled[2:-1]  # without the two ends of a pickle of its own
    pickle = b"\x80\x02" + _pickled(_tree(leaves)) + b"."
    small = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    records: list[_NewRecord] = []
    placed: dict[str, Span] = {}
    position = 0
    for name, data in small.items():
        records.append(_NewRecord(name, position, len(data), data))
        position = records[-1].data.stop
    for name in stored:
        nbytes = tensors[name].nbytes
        records.append(_NewRecord(f"data/{keys[name]}", position, nbytes, tensor=name))
        placed[name] = records[-1].data
        position = placed[name].stop
    directory_bytes = sum(len(record.listed(0)) for record in records)
    end = end_records(len(records), directory_bytes, position)
    return TorchFileLayout(position + directory_bytes + len(end), placed, tuple(records))


def _field64(sizes: bytes) -> bytes:
    return struct.pack("<2H", 1, len(sizes)) + sizes if sizes else b""


def _tree(leaves: Mapping[Path, bytes]) -> dict[str | int, Any]:
    root: dict[str | int, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return root


def _pickled(node: Any) -> bytes:
    """A part of a pickle: dicts, lists where the keys are 0, 1, 2, ..., and leaves as they are."""
    if isinstance(node, bytes):
        return node
    if [*node] == [*range(len(node))] and node:
        return b"](" + b"".join(map(_pickled, node.values())) + b"e"
    members = (
        (pickled_int(key) if isinstance(key, int) else pickled_str(key)) + _pickled(member)
        for key, member in node.items()
    )
    return b"}(" + b"".join(members) + b"u"
