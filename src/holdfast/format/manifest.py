"""The manifest: what a checkpoint holds, and where each byte of it lies.

Reading any format ends in a `Manifest`. Holdfast's own steps carry it as `manifest.json`; the
layout of that file is specified in docs/format.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from holdfast.errors import DamagedError, FormatError
from holdfast.format import checksum, facts, timings
from holdfast.format.dtypes import dtype_of
from holdfast.format.region import Region
from holdfast.format.structure import Node, check_node, members_of, with_classes
from holdfast.format.timings import Stage

VERSION = 2

OPTIMIZER = "optimizer"
"""First key of the path of what only a run that goes on needs."""

DIMS_MAX = 64
"""torch has no tensors of more."""

SIZE_MAX = (1 << 63) - 1

KEYS_MAX = 64
"""On the path to one entry."""

Kind = Literal["full", "model"]
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of bytes in a file."""

    offset: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """One region of a tensor, stored in one piece."""

    region: Region
    file: str
    item: Span
    """The container around the data: what stock DCP hands to `torch.load`."""

    data_offset: int | None = None
    """Where in the file the raw row-major elements begin; None: only the container knows."""

    first_block: int | None = None
    """Which of the file's checksums is that of the first block of the raw data; those of the other
    blocks follow it. None where none were kept."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its global shape, and the chunks that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    path: Path
    """Keys from the root of the saved state to this tensor."""

    @property
    def nbytes(self) -> int:
        return Region.whole(self.shape).num_elements * dtype_of(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class ValueEntry:
    """One value that is not a tensor, as `torch.save` wrote it."""

    file: str
    item: Span
    checksum: int | None
    path: Path


@dataclass(frozen=True, slots=True)
class Table:
    """Where a data file keeps the checksums of its blocks: from `offset` to its end."""

    offset: int
    checksum: int
    """Of the table itself."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds."""

    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, ValueEntry]
    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each data file; empty where the format does not say."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    """Checksums of the blocks in each data file; only Holdfast's own have them."""

    block_bytes: int = checksum.BLOCK_BYTES
    """Of raw data under one of these checksums."""

    step: int | None = None
    kind: Kind | None = None
    """`full` can be resumed from, `model` holds the model alone; None where nobody said, as in
    formats of others."""

    components: tuple[str, ...] | None = None
    """Top-level names that are not the model's: first keys of the paths of all else. None where the
    writer did not say."""

    created: str = ""
    """When the save was committed: ISO 8601, UTC."""

    layout: Mapping[str, Any] = field(default_factory=dict)
    """What wrote it: `world_size`, and whatever the writer adds, for people to read."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the software that wrote it."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the training loop measured at this step; NaN where it was no finite number."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """What the `config.json` of its model says on the Hugging Face hub, where the writer knew."""

    timings: Mapping[str, Stage] = field(default_factory=dict)
    """How long each stage of the save took over all ranks, up to the commit that it is part of."""

    metadata: tuple[int, int] | None = None
    """Bytes and checksum of the `.metadata` beside it."""

    structure: Mapping[Path, Node] | None = None
    """How the state is put together, by path, where the entries do not tell; see `structure`. None
    where nobody said, as in formats of others."""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def names(self) -> list[str]:
        return [*self.tensors, *self.values]


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: one JSON object whose last member is a checksum of the rest."""
    number = {file: index for index, file in enumerate(manifest.files)}
    tensors = (
        encode_tensor(
            *(name, e.dtype, e.shape, e.path),
            [n for chunk in e.chunks for n in _row(chunk, number)],
        )
        for name, e in manifest.tensors.items()
    )
    return b"".join(encode_around(manifest, joined(tensors)))


def joined(members: Iterable[bytes]) -> bytes:
    """Members of a JSON object as one."""
    return b"{" + b",".join(members) + b"}"


def _row(chunk: Chunk, number: Mapping[str, int]) -> list[int]:
    assert chunk.data_offset is not None, "only Holdfast's own chunks are in a manifest"
    assert chunk.first_block is not None
    item = [number[chunk.file], chunk.item.offset, chunk.item.nbytes]
    return [*item, chunk.data_offset, chunk.first_block, *chunk.region.start, *chunk.region.stop]


def encode_tensor(
    name: str, dtype: str, shape: tuple[int, ...], path: Path, numbers: Sequence[int]
) -> bytes:
    """One member of `tensors`. The numbers of a chunk are: number of its file, offset and bytes of
    its item, offset of its data, number of its first block, start and stop along each dim; those of
    the next chunk follow."""
    # One list a chunk would be a million objects of which the garbage collector keeps track.
    row = "[" + ",".join(["%d"] * (5 + 2 * len(shape))) + "]"
    rows = ",".join([row] * (len(numbers) // (5 + 2 * len(shape)))) % tuple(numbers)
    head = _head(dtype, shape)
    if path != (name,):
        head += b',"path":' + _json(path)
    return _json(name) + b":" + head + b',"chunks":[' + rows.encode() + b"]}"


@lru_cache(maxsize=1024)
def _head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """How a member of `tensors` begins; thousands are alike."""
    return _json({"dtype": dtype, "shape": shape})[:-1]


def encode_around(manifest: Manifest, tensors: bytes) -> list[bytes]:
    """The bytes of `manifest.json` in parts; `tensors` is its member of that name, which is a
    function of the layout alone: those of the manifest are not looked at."""
    number = {file: index for index, file in enumerate(manifest.files)}
    head = {
        "holdfast": VERSION,
        "step": manifest.step,
        "kind": manifest.kind,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "layout": dict(manifest.layout),
        **({} if manifest.components is None else {"components": manifest.components}),
        **({"metrics": facts.encode_metrics(manifest.metrics)} if manifest.metrics else {}),
        **({"model": dict(manifest.model)} if manifest.model else {}),
        **({"timings": timings.encode(manifest.timings)} if manifest.timings else {}),
        **members_of(manifest.structure),
        "checksums": _checksums(manifest.block_bytes),
        "metadata": manifest.metadata,
        "files": [
            [file, nbytes, manifest.tables[file].offset, _hex(manifest.tables[file].checksum)]
            for file, nbytes in manifest.files.items()
        ],
        "values": [
            {
                "item": [number[file], item.offset, item.nbytes],
                "checksum": _hex(found or 0),
                "entries": {n: _path(n, manifest.values[n].path).get("path") for n in names},
            }
            for (file, item, found), names in by_container(manifest.values).items()
        ],
    }
    parts = [_json(head)[:-1] + b',"tensors":', tensors, b"}"]
    running = checksum.Running()
    for part in parts:
        running.add(part)
    return [*parts[:2], b',"checksum":"' + _hex(running.value).encode() + b'"}']


_BLOCK_BYTES = (checksum.BLOCK_BYTES, checksum.BLOCK_BYTES_MAX)


def _checksums(block_bytes: int) -> dict[str, object]:
    return {"algorithm": checksum.ALGORITHM, "block_bytes": block_bytes}


def by_container(
    values: Mapping[str, ValueEntry],
) -> dict[tuple[str, Span, int | None], list[str]]:
    """Names of values by the container that holds them: equal values have one."""
    found: dict[tuple[str, Span, int | None], list[str]] = {}
    for name, entry in values.items():
        found.setdefault((entry.file, entry.item, entry.checksum), []).append(name)
    return found


def _path(name: str, path: Path) -> dict[str, Path]:
    return {} if path == (name,) else {"path": path}


def _hex(value: int) -> str:
    return checksum.to_hex([value])


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _json(value: object) -> bytes:
    return _ENCODER.encode(value).encode()


def decode(data: bytes, *, where: str, entries: bool = True) -> Manifest:
    """The manifest in these bytes. `where` names the file in errors. Without `entries` it has no
    tensors and no values, and always a kind: the checkpoint as a whole, in a tenth of the time.

    Raises:
        DamagedError: the bytes are not those that were written.
        FormatError: they are, but are no manifest of a version known here.
    """
    tail = len(b',"checksum":""}') + checksum.DIGITS
    body = data[:-tail] + b"}"
    if data[-tail:] != (
        b',"checksum":"' + checksum.to_hex([checksum.checksum(body)]).encode() + b'"}'
    ):
        raise DamagedError(
            f"`{where}` does not have the checksum that its last member states",
            hint=f"`holdfast verify {where.rpartition('/')[0]}` lists what is damaged",
        )
    try:
        whole = (None if entries else _without_tensors(body)) or json.loads(body)
        if not entries:
            parts = (entry.get("path", [name])[0] for name, entry in whole["tensors"].items())
            whole |= {"kind": whole["kind"] or kind_with(parts), "tensors": {}, "values": []}
            whole.pop("structure", None)
        return _decode_body(whole, where)
    except _NO_MANIFEST as error:
        raise FormatError(f"`{where}` is not a manifest: {type(error).__name__} {error}") from error


_NEEDED = {"holdfast", "step", "kind", "created", "layout", "checksums", "files", "values"}


def _without_tensors(body: bytes) -> dict[str, Any] | None:
    """A manifest without its tensors, which stand last and are most of it. None where they stand
    elsewhere, or have to tell of what kind the checkpoint is."""
    head, found, _ = body.partition(b',"tensors":{')
    try:
        whole = json.loads(head + b"}")
    except ValueError:
        # Some other member has one of that name.
        return None
    known = found and isinstance(whole, dict) and whole.keys() >= _NEEDED and whole["kind"]
    return {**whole, "tensors": {}} if known else None


_NO_MANIFEST = (
    *(LookupError, TypeError, ValueError, AttributeError, RecursionError),
    OverflowError,  # Of a number that no float holds.
)


def _decode_body(body: dict[str, Any], where: str) -> Manifest:
    if body["holdfast"] != VERSION:
        found = body["holdfast"]
        older = isinstance(found, int) and found < VERSION
        raise FormatError(
            f"`{where}` has format version {found}, this holdfast knows {VERSION}",
            hint="that version was never released: save the step again, from the run that wrote it"
            if older
            else "pip install --upgrade holdfast",
        )
    block_bytes = body["checksums"].get("block_bytes")
    known = type(block_bytes) is int and block_bytes in _BLOCK_BYTES
    if not known or body["checksums"] != _checksums(block_bytes):
        raise FormatError(f"`{where}` has unknown checksums: {body['checksums']}")
    files: list[_File] = []
    for name, nbytes, offset, found in body["files"]:
        check_file_name(name, where)
        files.append(_file(name, count_of(nbytes), count_of(offset), found))
    values = [entry for stored in body["values"] for entry in _values(stored, files)]
    manifest = Manifest(
        tensors={
            name: _tensor(name, entry, files, block_bytes)
            for name, entry in body["tensors"].items()
        },
        values=dict(values),
        files={file.name: file.nbytes for file in files},
        tables={file.name: file.table for file in files},
        block_bytes=block_bytes,
        step=None if body["step"] is None else count_of(body["step"]),
        kind=body["kind"],
        components=facts.components(body.get("components")),
        created=str(body["created"]),
        layout=facts.told(body["layout"]),
        versions={str(name): str(version) for name, version in body["versions"].items()},
        metrics=facts.decode_metrics(body.get("metrics", {})),
        model=facts.told(body.get("model", {})),
        timings=timings.decode(body.get("timings", {})),
        metadata=_seal(body["metadata"]),
        structure=_structure(body.get("structure"), body.get("optimizers", [])),
    )
    if manifest.kind not in ("full", "model", None):
        raise ValueError(f"kind: {manifest.kind}")
    twice = len(manifest.files) != len(files) or len(manifest.values) != len(values)
    if twice or manifest.tensors.keys() & manifest.values.keys():
        raise ValueError("a file or an entry is there twice")
    return manifest


def _structure(stored: list[Any] | None, optimizers: list[Any]) -> dict[Path, Node] | None:
    if stored is None:
        return None
    nodes = {path_of(path): check_node(node) for path, node in stored}
    return with_classes(nodes, {path_of(path): names for path, names in optimizers})


@dataclass(frozen=True, slots=True)
class _File:
    """A data file, as the manifest states it."""

    name: str
    nbytes: int
    table: Table
    num_blocks: int


def _file(name: str, nbytes: int, offset: int, stored: str) -> _File:
    num_blocks, rest = divmod(nbytes - offset, checksum.NBYTES)
    if num_blocks < 0 or rest:
        raise ValueError(f"`{name}`: no table of checksums from {offset} to {nbytes}")
    (found,) = checksum.from_hex(stored)
    return _File(name, nbytes, Table(offset, found), num_blocks)


def _tensor(name: str, entry: dict[str, Any], files: list[_File], block_bytes: int) -> TensorEntry:
    shape = tuple(map(count_of, entry["shape"]))
    itemsize = dtype_of(entry["dtype"]).itemsize
    chunks = []
    for stored in entry["chunks"]:
        number, offset, nbytes, data_offset, first_block, *corners = map(count_of, stored)
        if len(corners) != 2 * len(shape):
            raise ValueError(f"`{name}`: a chunk of {len(corners) // 2} dims, not {len(shape)}")
        region = Region(tuple(corners[: len(shape)]), tuple(corners[len(shape) :]))
        file, item = _item(number, offset, nbytes, files)
        data_bytes = region.num_elements * itemsize
        if not region.fits(shape):
            raise ValueError(f"`{name}`: chunk {region} is outside of the shape {shape}")
        if not item.offset <= data_offset <= data_offset + data_bytes <= item.stop:
            raise ValueError(f"`{name}`: data at {data_offset} is outside of its item {item}")
        if first_block + checksum.num_blocks(data_bytes, block_bytes) > file.num_blocks:
            raise ValueError(f"`{name}`: its checksums are outside of those of `{file.name}`")
        chunks.append(Chunk(region, file.name, item, data_offset, first_block))
    return TensorEntry(entry["dtype"], shape, tuple(chunks), path_of(entry.get("path", [name])))


def _values(stored: dict[str, Any], files: list[_File]) -> Iterator[tuple[str, ValueEntry]]:
    number, offset, nbytes = map(count_of, stored["item"])
    file, item = _item(number, offset, nbytes, files)
    (found,) = checksum.from_hex(stored["checksum"])
    for name, path in stored["entries"].items():
        yield name, ValueEntry(file.name, item, found, path_of(path or [name]))


def _item(number: int, offset: int, nbytes: int, files: list[_File]) -> tuple[_File, Span]:
    file, item = files[number], Span(offset, nbytes)
    if item.stop > file.table.offset:
        raise ValueError(
            f"item {item} is outside of the {file.table.offset} bytes of `{file.name}`"
        )
    return file, item


def _seal(stored: list[int] | None) -> tuple[int, int] | None:
    if stored is None:
        return None
    nbytes, found = map(count_of, stored)
    return nbytes, found


def kind_with(parts: Iterable[str | int]) -> Kind:
    """What a checkpoint with tensors below these top-level names holds."""
    return "full" if OPTIMIZER in parts else "model"


def count_of(value: object) -> int:
    """A size or position, as a stranger's file has it.

    Raises:
        ValueError: no whole number, or one below zero.
    """
    if type(value) is not int:
        # Not its text: it may be a list that holds itself a million times.
        raise ValueError(f"need a count, got a {type(value).__name__}")
    if value < 0:
        raise ValueError(f"need a count, got {value}")
    return value


def check_file_name(name: object, where: str) -> None:
    """Refuse a file that lies anywhere but in the checkpoint's own folder.

    Raises:
        FormatError: the name is a path, or hides one, or is none.
    """
    if type(name) is not str:
        raise FormatError(f"`{where}` names a file by a {type(name).__name__}")
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise FormatError(f"`{where}` names a file outside of its folder: {name[:200]!r}")


def check_sizes(sizes: object) -> tuple[int, ...]:
    """Sizes, offsets or strides as a stranger's file states them, a bounded number of bounded ints.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(sizes, tuple | list) or len(sizes) > DIMS_MAX:
        raise ValueError(f"need up to {DIMS_MAX} sizes, got a {type(sizes).__name__}")
    for size in sizes:
        if type(size) is not int or not 0 <= size <= SIZE_MAX:
            raise ValueError(f"a size that is {str(size)[:30] if type(size) is int else 'none'}")
    return tuple(sizes)


def path_of(path: object) -> Path:
    """Keys from the root of a state to an entry, as a stranger's file states them.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(path, tuple | list) or not 0 < len(path) <= KEYS_MAX:
        raise ValueError(f"a path needs 1 to {KEYS_MAX} keys")
    if {type(key) for key in path} - {str, int}:
        raise ValueError("a path has a key that is neither text nor a number")
    return tuple(path)
