"""Read and write `.pt` files, in which `torch.save` stores a whole state, without torch.

A file is one ZIP archive: `data.pkl` describes the objects, `data/<key>` holds the elements of each
storage. Before torch 1.6, a file was a stream (see `torchstream`). The name of an entry is its path
joined by dots, as in a DCP checkpoint. Objects that could be rebuilt only by running code are left
out. Every record that Holdfast writes has a CRC-32, since a `.pt` file has no manifest beside it
that could reveal a flipped bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import FormatError
from holdfast.format import torchstream
from holdfast.format.archive import (
    RECORD,
    Fetch,
    Record,
    directory_end,
    directory_entry,
    local_header,
    record_names,
)
from holdfast.format.dtypes import dtype_of, nbytes_of
from holdfast.format.dumper import pickled_int, pickled_str
from holdfast.format.git_lfs import check_no_pointer
from holdfast.format.manifest import (
    Chunk,
    Manifest,
    Path,
    Span,
    TensorEntry,
    ValueEntry,
)
from holdfast.format.pickles import INVALID, AnyGlobal, Other, Plain
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
    subclass_of,
)
from holdfast.format.untrusted import KEYS_MAX
from holdfast.spelling import counted

ALIGN = 64
"""Alignment of the elements of a tensor, so that a memory-mapped file can be used in place."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """Contents of a `.pt` file."""

    manifest: Manifest
    """Manifest of the file. Chunks of tensors that are not row-major have no `data_offset`."""

    strides: Mapping[str, tuple[int, ...]]
    """Strides, in elements, of tensors that are not row-major. The first element of such a tensor
    is at the start of its item."""

    values: Mapping[str, object]
    """Values by name. An `Other` stands for an object of a class that is not imported."""

    left_out: Mapping[str, str]
    """Objects that are left out, by name: text with the class and the number of tensors in it."""


CUT_SHORT = "a ZIP archive without its directory, which is at the end: it was cut short or changed"


def read_file(fetch: Fetch, nbytes: int, *, file: str, where: str) -> TorchFile:
    """Read the contents of a `.pt` file of `nbytes`. Fetches only its directory and its pickle.

    `file`: name of the file in the manifest. Errors call the file `where`.

    Raises:
        FormatError: the file is not a `.pt` file, or everything in it could be rebuilt only by
            running code.
    """
    names = check_kind(fetch, nbytes, where=where)
    if names is None and fetch(0, len(RECORD)) == RECORD:
        raise FormatError(f"`{where}` is {CUT_SHORT}", hint=_AGAIN)
    allowed = AnyGlobal(GLOBALS)
    try:
        if fetch(0, 1) == b"\x80":
            allowed.update(torchstream.GLOBALS)
            value, records = torchstream.read_stream(fetch, nbytes, allowed, where=where)
        else:
            value, records = read_pickle(
                fetch, Span(0, nbytes), allowed, PICKLE_BYTES_MAX, where=where
            )
        read = _Reader(records, file, nbytes)
        read.add_all(value)
    except INVALID as error:
        ends_early = isinstance(error, EOFError | IndexError)
        raise FormatError(
            f"`{where}` cannot be read as a file of torch.save: "
            f"{'it ends early' if ends_early else error}",
            hint=_AGAIN
            if ends_early
            else "if torch.load opens it, and you trust its writer: torch.save its tensors in a "
            "dict with keys of text",
        ) from error
    if read.left_out and not read.tensors and not read.values:
        name, found = next(iter(read.left_out.items()))
        title = found.partition(",")[0]
        raise FormatError(
            f"`{where}` holds nothing but objects that need code to be rebuilt: `{name}` refers to "
            f"`{title}`",
            hint="in a program that has their classes, torch.save their `state_dict()`",
        )
    manifest = Manifest(read.tensors, read.values_in_file, files={file: nbytes})
    return TorchFile(manifest, read.strides, read.values, read.left_out)


def check_kind(fetch: Fetch, nbytes: int, *, where: str) -> set[str] | None:
    """Refuse files that look like those of `torch.save`, but that something else wrote.

    Returns the names of the records in the file's ZIP archive. Returns None if the file is a stream
    (see `torchstream`), or if the archive's directory cannot be read.

    Raises:
        FormatError: the file does not come from `torch.save`.
    """
    if fetch(0, 1) == b"\x80":
        if torchstream.is_stream(fetch):
            return None
        raise FormatError(
            f"`{where}` is a pickle that torch.save did not write",
            hint="if you trust its writer, load it with `pickle`, and torch.save its tensors",
        )
    check_no_pointer(fetch, where=where)
    names = record_names(fetch, nbytes)
    if names is None or ("data.pkl" in names and "constants.pkl" not in names):
        return names
    for record, kind, way in _OTHER_ARCHIVES:
        if record in names:
            raise FormatError(f"`{where}` is {kind}, which holds a program", hint=way)
    raise FormatError(f"`{where}` is a ZIP archive of another program, without `data.pkl`")


_AGAIN = "copy or download it again"
"""Hint for a file whose end is missing."""

_OTHER_ARCHIVES = (
    (
        "constants.pkl",
        "a TorchScript archive",
        'torch.save(torch.jit.load(path).state_dict(), "weights.pt") writes its tensors',
    ),
    (
        "archive_format",
        "an archive of torch.export",
        'torch.save(torch.export.load(path).state_dict, "weights.pt") writes its tensors',
    ),
    (
        ".data/version",
        "an archive of torch.package",
        "load it with torch.package, and torch.save the `state_dict()` of its model",
    ),
)
"""For each other kind of archive: a record that only this kind has, name of the kind, and hint."""


class _Reader:
    """Finds the tensors and values of a file, and the objects to leave out."""

    def __init__(self, records: Mapping[str, Record], file: str, nbytes: int) -> None:
        self._records, self._file, self._nbytes = records, file, nbytes
        self.tensors: dict[str, TensorEntry] = {}
        self.values_in_file: dict[str, ValueEntry] = {}
        self.strides: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, object] = {}
        self.left_out: dict[str, str] = {}
        self._num_left = records["data.pkl"].data.nbytes
        self._counted: set[int] = set()

    def add_all(self, value: object) -> None:
        """Add all entries of `value`, the object in the file."""
        pickled = self._records["data.pkl"].data
        for path, leaf in _leaves(value, pickled.nbytes):
            name = ".".join(map(str, path))
            if name in self.tensors or name in self.values or name in self.left_out:
                raise ValueError(f"two entries are named `{name[:200]}`")
            title = subclass_of(leaf)
            if isinstance(leaf, Tensor) and not title:
                self._add_tensor(name, path, leaf)
            elif title := title or self._title_of_unsafe(leaf):
                num_tensors = self._num_tensors_in(leaf)
                holding = f", with {counted(num_tensors, 'tensor')}" if num_tensors else ""
                self.left_out[name] = title + holding
            else:
                self.values[name] = leaf
                self.values_in_file[name] = ValueEntry(self._file, pickled, None, path)

    def _title_of_unsafe(self, value: object) -> str:
        """Return the class of the first object in a value that can be rebuilt only by running code;
        empty if there is no such object."""
        waiting = [value]
        while waiting:
            node = waiting.pop()
            self._num_left -= 1
            if self._num_left < 0:
                # Only a crafted file has more objects than bytes.
                raise ValueError("its objects are nested in one another")
            if isinstance(node, Other):
                if node.title not in SAFE:
                    return node.title
                waiting += node.args
            elif isinstance(node, type) and issubclass(node, Other):
                return node.title
            elif isinstance(node, Tensor):
                return "torch.Tensor"
            elif isinstance(node, list | tuple):
                waiting += node
        return ""

    def _num_tensors_in(self, value: object) -> int:
        """Return the number of tensors in an object that is left out. Objects may share tensors, so
        each tensor counts only once in the whole file."""
        waiting, num_tensors = [value], 0
        while waiting:
            node = waiting.pop()
            if id(node) in self._counted:
                continue
            self._counted.add(id(node))
            if isinstance(node, Tensor):
                num_tensors += 1
            elif isinstance(node, Other):
                # Do not unpack `args`: many objects may share one tuple, which is visited once.
                waiting += [node.args, node.members, node.state]
            elif isinstance(node, dict):
                waiting += node.values()
            elif isinstance(node, list | tuple):
                waiting += node
        return num_tensors

    def _add_tensor(self, name: str, path: Path, leaf: Tensor) -> None:
        stored = stored_tensor(described(leaf), self._records, 0)
        region = Region.whole(stored.shape)
        data_bytes = region.num_elements * dtype_of(stored.dtype).itemsize
        if data_bytes > self._nbytes:
            # An expanded tensor (stride 0) may have any size, although it stores only a few bytes.
            raise ValueError(f"`{name[:200]}` has {data_bytes} bytes, the file only {self._nbytes}")
        row_major = stored.strides == contiguous_strides(stored.shape) or region.num_elements < 2
        if row_major:
            item = Span(stored.data.offset, data_bytes)
        else:
            item, self.strides[name] = stored.data, stored.strides
        chunk = Chunk(region, self._file, item, item.offset if row_major else None)
        self.tensors[name] = TensorEntry(stored.dtype, stored.shape, (chunk,), path)


_NESTED = "its objects are nested too deep, or in one another"


def _leaves(value: object, num_max: int) -> Iterator[tuple[Path, object]]:
    """Yield each tensor and value with its path, depth first.

    An object may be shared, or contain itself. So this raises a `ValueError` after `num_max`
    objects. `num_max` is the size of the pickle: only a crafted file has more objects than bytes.
    """
    waiting: list[tuple[Path, object]] = [((), value)]
    while waiting:
        path, node = waiting.pop()
        num_max -= 1
        members: list[tuple[Any, object]] = []
        if isinstance(node, dict):
            members = list(node.items())
        elif isinstance(node, Other) and node.title in _DICTS:
            members = list(zip(node.members[::2], node.members[1::2], strict=True))
        elif isinstance(node, list | tuple):
            members = list(enumerate(node))
        if not members or not _holds_entries(node, KEYS_MAX - len(path)):
            yield path or ("value",), node
            continue
        num_max -= len(members)
        if len(path) >= KEYS_MAX or num_max < 0:
            raise ValueError(_NESTED)
        waiting += [((*path, _key(key)), member) for key, member in reversed(members)]


_DICTS = frozenset({"collections.defaultdict", "collections.Counter"})


def _holds_entries(node: object, num_keys_max: int) -> bool:
    """Return whether the members of a dict, list or tuple are separate entries. A list or tuple
    that has no tensor, dict or object at any depth is one value, as in a save. Raises a
    `ValueError` if lists and tuples are nested deeper than `num_keys_max`."""
    waiting, seen = [(node, 0)], set[int]()
    while waiting:
        member, depth = waiting.pop()
        if isinstance(member, dict | Plain):
            return True
        # Visit each list only once: it may be shared, or contain itself.
        if isinstance(member, list | tuple) and id(member) not in seen:
            if depth > num_keys_max:
                raise ValueError(_NESTED)
            seen.add(id(member))
            waiting += [(inner, depth + 1) for inner in member]
    return False


def _key(key: object) -> str | int:
    if type(key) is int or type(key) is str:
        return key
    if key is None or isinstance(key, bool | float):
        return str(key)
    if isinstance(key, type) and issubclass(key, Other):
        return key.title
    raise ValueError(f"a key that is a {type(key).__name__}")


SAFE = frozenset({"set", "frozenset", "complex", "bytearray", "torch.device", "_codecs.encode"})
"""Classes and functions whose objects are values. Other objects are left out, except tensors."""


# ---------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write to a `.pt` file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    same_as: str = ""
    """Name of the tensor whose elements this one shares; empty if it has its own elements."""

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class _NewRecord:
    """A record to write to a `.pt` file."""

    name: str
    header: int
    nbytes: int
    content: bytes | None = None
    tensor: str = ""
    """Name of the tensor whose elements are the data, if `content` is None."""

    @property
    def data(self) -> Span:
        """Position of the record's data in the file."""
        return Span(self.header + len(self.local(0)), self.nbytes)

    def local(self, crc32: int) -> bytes:
        """Return the header, padded so that the data after it begin at a multiple of `ALIGN`."""
        name = f"archive/{self.name}".encode()
        return local_header(name, self.nbytes, position=self.header, align=ALIGN, crc32=crc32)

    def entry(self, crc32: int) -> bytes:
        """Return the record's entry in the directory."""
        name = f"archive/{self.name}".encode()
        return directory_entry(name, self.nbytes, self.header, crc32=crc32)


@dataclass(frozen=True, slots=True)
class TorchFileLayout:
    """File layout of a `.pt` file: its records, and the positions of the tensors' elements."""

    nbytes: int
    tensors: Mapping[str, Span]
    """Position of each tensor's elements. Does not list tensors that share another's elements."""

    records: tuple[_NewRecord, ...]

    def frames(self, crc32s: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """Yield offset and content of all bytes that are not elements. `crc32s`: CRC-32 of each
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
    """Lay out a `.pt` file with these tensors and values, nested by their paths.

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
    """Pickle nested dicts whose leaves are pickled already. A dict with the keys 0, 1, 2, ...
    becomes a list."""
    if isinstance(node, bytes):
        return node
    if [*node] == [*range(len(node))] and node:
        return b"](" + b"".join(map(_pickled, node.values())) + b"e"
    members = (
        (pickled_int(key) if isinstance(key, int) else pickled_str(key)) + _pickled(member)
        for key, member in node.items()
    )
    return b"}(" + b"".join(members) + b"u"
