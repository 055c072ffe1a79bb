"""The manifest: which tensors and values a checkpoint has, and where their bytes are.

The readers of all formats return a `Manifest`. Holdfast's checkpoints store it as `manifest.json`,
which docs/format.md specifies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

from holdfast.errors import DamagedError, FormatError
from holdfast.format import checksum, timings
from holdfast.format.components import OPTIMIZER
from holdfast.format.dtypes import dtype_of
from holdfast.format.region import Region
from holdfast.format.structure import Node, check_node, members_of, with_classes
from holdfast.format.timings import Stage
from holdfast.format.untrusted import (
    check_file_name,
    count_of,
    json_of,
    names_of,
    number_of,
    path_of,
)

VERSION = 2

Kind = Literal["full", "model"]
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Contiguous bytes of a file."""

    offset: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """A region of a tensor, stored contiguously."""

    region: Region
    file: str
    item: Span
    """Archive around the data, which stock DCP passes to `torch.load`."""

    data_offset: int | None = None
    """Offset of the raw row-major elements in the file; None if only the archive itself tells."""

    first_block: int | None = None
    """Index, in the file's table, of the checksum of the first block of the raw data; the next ones
    follow. None if the format has no block checksums."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: its global shape, and the chunks that together hold its elements."""

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
    """A value that is not a tensor, in a container of `torch.save`."""

    file: str
    item: Span
    checksum: int | None
    path: Path


@dataclass(frozen=True, slots=True)
class Table:
    """Table of the block checksums of a data file, from `offset` to the end of the file."""

    offset: int
    checksum: int
    """Checksum of the table itself."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a checkpoint."""

    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, ValueEntry]
    files: Mapping[str, int] = field(default_factory=dict)
    """Size in bytes of each data file; empty if the format does not state it."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    """Table of block checksums of each data file; only Holdfast's own files have one."""

    shared: Mapping[str, int] | None = None
    """Data files that an earlier checkpoint of the run has too. Each with the number of saves that
    have linked it since it was written, or read and found good. None if the run does not
    deduplicate."""

    block_bytes: int = checksum.BLOCK_BYTES
    """Bytes of raw data under one checksum."""

    step: int | None = None
    kind: Kind | None = None
    """`full` if a run can resume from it, `model` if it has the model only; None if unknown, as in
    other formats."""

    components: tuple[str, ...] | None = None
    """First keys of all paths that are not part of the model. None if unknown."""

    created: str = ""
    """Time of the commit: ISO 8601, UTC."""

    layout: Mapping[str, Any] = field(default_factory=dict)
    """Layout of the run that wrote it, for display: `world_size`, and others that it adds."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the software that wrote it, by name."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the training loop at this step; NaN for numbers that were not finite."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """Contents of the model's `config.json` in HF format; empty if unknown."""

    timings: Mapping[str, Stage] = field(default_factory=dict)
    """Time of each stage of the save over all ranks, without the commit, which writes this."""

    metadata: tuple[int, int] | None = None
    """Size in bytes and checksum of the `.metadata` beside it."""

    structure: Mapping[Path, Node] | None = None
    """Containers and key types of the state, by path, where the entries alone do not determine
    them (see `structure`). None if unknown, as in other formats."""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def names(self) -> list[str]:
        return [*self.tensors, *self.values]


def encode_tensor(
    name: str, dtype: str, shape: tuple[int, ...], path: Path, numbers: Sequence[int]
) -> bytes:
    """Encode one member of `tensors`.

    `numbers` has, for each chunk: index of its file, offset and bytes of its item, offset of its
    data, index of its first block, then start and stop along each dim.
    """
    # A list per chunk would be a million objects for the garbage collector to track.
    row = "[" + ",".join(["%d"] * (5 + 2 * len(shape))) + "]"
    rows = ",".join([row] * (len(numbers) // (5 + 2 * len(shape)))) % tuple(numbers)
    head = _head(dtype, shape)
    if path != (name,):
        head += b',"path":' + _json(path)
    return _json(name) + b":" + head + b',"chunks":[' + rows.encode() + b"]}"


@lru_cache(maxsize=1024)
def _head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """First bytes of an entry of `tensors`. Cached, since thousands of entries start alike."""
    return _json({"dtype": dtype, "shape": shape})[:-1]


def encode_around(manifest: Manifest, tensors: bytes) -> list[bytes]:
    """Encode `manifest.json`, in parts.

    `tensors` is its encoded member of that name, which a run encodes once for all saves;
    `manifest.tensors` is ignored.
    """
    number = {file: index for index, file in enumerate(manifest.files)}
    metrics = {n: v if math.isfinite(v) else None for n, v in manifest.metrics.items()}
    optional = {
        "components": manifest.components,
        "metrics": metrics or None,
        "model": dict(manifest.model) or None,
        "timings": {n: asdict(stage) for n, stage in manifest.timings.items()} or None,
        "shared": manifest.shared,
    }
    head = {
        "holdfast": VERSION,
        "step": manifest.step,
        "kind": manifest.kind,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "layout": dict(manifest.layout),
        **{name: value for name, value in optional.items() if value is not None},
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
                "checksum": _hex(digest or 0),
                "entries": {name: None if path == (name,) else path for name, path in paths},
            }
            for (file, item, digest), paths in _by_container(manifest.values).items()
        ],
    }
    parts = [_json(head)[:-1] + b',"tensors":', tensors, b"}"]
    digest = checksum.checksum_of_parts(parts)
    return [*parts[:2], b',"checksum":"' + _hex(digest).encode() + b'"}']


_BLOCK_BYTES = (checksum.BLOCK_BYTES, checksum.BLOCK_BYTES_MAX)


def _checksums(block_bytes: int) -> dict[str, object]:
    return {"algorithm": checksum.ALGORITHM, "block_bytes": block_bytes}


def _by_container(
    values: Mapping[str, ValueEntry],
) -> dict[tuple[str, Span, int | None], list[tuple[str, Path]]]:
    """Group names and paths of values by the container, which equal values share."""
    containers: dict[tuple[str, Span, int | None], list[tuple[str, Path]]] = {}
    for name, entry in values.items():
        container = (entry.file, entry.item, entry.checksum)
        containers.setdefault(container, []).append((name, entry.path))
    return containers


def _hex(value: int) -> str:
    return checksum.to_hex([value])


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _json(value: object) -> bytes:
    return _ENCODER.encode(value).encode()


def decode(data: bytes, *, where: str, entries: bool = True) -> Manifest:
    """Decode the bytes of `manifest.json`. Errors call the file `where`.

    Without `entries` the result has no tensors and no values, but always a kind, and decoding takes
    a tenth of the time.

    Raises:
        DamagedError: the bytes do not match their checksum.
        FormatError: they do, but are no manifest of a known version.
    """
    tail = len(b',"checksum":""}') + checksum.DIGITS
    body = data[:-tail] + b"}"
    if data[-tail:] != (
        b',"checksum":"' + checksum.to_hex([checksum.checksum(body)]).encode() + b'"}'
    ):
        raise DamagedError(
            f"`{where}` does not match its own checksum",
            hint=f"`holdfast verify {where.rpartition('/')[0]}` lists what is damaged",
        )
    try:
        members = (None if entries else _without_tensors(body)) or json.loads(body)
        if not entries:
            keys = (entry.get("path", [name])[0] for name, entry in members["tensors"].items())
            members |= {"kind": members["kind"] or kind_with(keys), "tensors": {}, "values": []}
            members.pop("structure", None)
        return _decode_body(members, where)
    except _INVALID as error:
        raise FormatError(f"`{where}` is not a manifest: {type(error).__name__} {error}") from error


_NEEDED = {"holdfast", "step", "kind", "created", "layout", "checksums", "files", "values"}


def _without_tensors(body: bytes) -> dict[str, Any] | None:
    """Parse a manifest up to its tensors, which are its last and by far its largest member.

    Returns None if they are elsewhere, or if they must be read to find the kind.
    """
    head, separator, _ = body.partition(b',"tensors":{')
    try:
        members = json.loads(head + b"}")
    except ValueError:
        # The separator is inside another member, which has a `tensors` of its own.
        return None
    is_complete = separator and isinstance(members, dict) and members.keys() >= _NEEDED
    return {**members, "tensors": {}} if is_complete and members["kind"] else None


# OverflowError comes from an int too large for a float.
_INVALID = (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)


def _shared(stored: dict[str, Any] | None, files: Sequence[_File]) -> dict[str, int] | None:
    if stored is None:
        return None
    if unknown := stored.keys() - {file.name for file in files}:
        raise ValueError(f"shared files are not listed: {sorted(unknown)}")
    return {name: count_of(num) for name, num in stored.items()}


def _decode_body(body: dict[str, Any], where: str) -> Manifest:
    if body["holdfast"] != VERSION:
        version = body["holdfast"]
        older = isinstance(version, int) and version < VERSION
        raise FormatError(
            f"`{where}` has format version {version}, this holdfast reads {VERSION}",
            hint="no release wrote that version: load it with the code that did, and save it again"
            if older
            else "pip install --upgrade holdfast",
        )
    block_bytes = body["checksums"].get("block_bytes")
    is_known = type(block_bytes) is int and block_bytes in _BLOCK_BYTES
    if not is_known or body["checksums"] != _checksums(block_bytes):
        raise FormatError(f"`{where}` has unknown checksums: {body['checksums']}")
    files: list[_File] = []
    for name, nbytes, offset, table_checksum in body["files"]:
        check_file_name(name, where)
        files.append(_file(name, count_of(nbytes), count_of(offset), table_checksum))
    values = [entry for stored in body["values"] for entry in _values(stored, files)]
    manifest = Manifest(
        tensors={
            name: _tensor(name, entry, files, block_bytes)
            for name, entry in body["tensors"].items()
        },
        values=dict(values),
        files={file.name: file.nbytes for file in files},
        tables={file.name: file.table for file in files},
        shared=_shared(body.get("shared"), files),
        block_bytes=block_bytes,
        step=None if body["step"] is None else count_of(body["step"]),
        kind=body["kind"],
        components=names_of(body["components"]) if body.get("components") is not None else None,
        created=str(body["created"]),
        layout=json_of(body["layout"]),
        versions={str(name): str(version) for name, version in body["versions"].items()},
        metrics={
            name: math.nan if value is None else number_of(value)
            for name, value in body.get("metrics", {}).items()
        },
        model=json_of(body.get("model", {})),
        timings=timings.decode(body.get("timings", {})),
        metadata=_metadata(body["metadata"]),
        structure=_structure(body.get("structure"), body.get("optimizers", [])),
    )
    if manifest.kind not in ("full", "model", None):
        raise ValueError(f"kind: {manifest.kind}")
    is_duplicate = len(manifest.files) != len(files) or len(manifest.values) != len(values)
    if is_duplicate or manifest.tensors.keys() & manifest.values.keys():
        raise ValueError("it has a file or an entry twice")
    return manifest


def _structure(stored: list[Any] | None, optimizers: list[Any]) -> dict[Path, Node] | None:
    if stored is None:
        return None
    nodes = {path_of(path): check_node(node) for path, node in stored}
    return with_classes(nodes, {path_of(path): names for path, names in optimizers})


@dataclass(frozen=True, slots=True)
class _File:
    """A data file, as the manifest lists it."""

    name: str
    nbytes: int
    table: Table
    num_blocks: int


def _file(name: str, nbytes: int, offset: int, stored: str) -> _File:
    num_blocks, rest = divmod(nbytes - offset, checksum.NBYTES)
    if num_blocks < 0 or rest:
        raise ValueError(f"`{name}`: no table of checksums from {offset} to {nbytes}")
    (table_checksum,) = checksum.from_hex(stored)
    return _File(name, nbytes, Table(offset, table_checksum), num_blocks)


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
    (container_checksum,) = checksum.from_hex(stored["checksum"])
    for name, path in stored["entries"].items():
        yield name, ValueEntry(file.name, item, container_checksum, path_of(path or [name]))


def _item(number: int, offset: int, nbytes: int, files: list[_File]) -> tuple[_File, Span]:
    file, item = files[number], Span(offset, nbytes)
    if item.stop > file.table.offset:
        raise ValueError(
            f"item {item} is outside of the {file.table.offset} bytes of `{file.name}`"
        )
    return file, item


def _metadata(stored: list[int] | None) -> tuple[int, int] | None:
    if stored is None:
        return None
    nbytes, metadata_checksum = map(count_of, stored)
    return nbytes, metadata_checksum


def kind_with(keys: Iterable[str | int]) -> Kind:
    """Return the kind of a checkpoint whose tensors have these first keys."""
    return "full" if OPTIMIZER in keys else "model"
