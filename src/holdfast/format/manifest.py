"""The manifest: which tensors and values a checkpoint has, and where their bytes are.

The readers of all formats return a `Manifest`. Holdfast's checkpoints store it as `manifest.json`,
which docs/format.md specifies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

from holdfast.errors import DamagedError, FormatError
from holdfast.format import checksum, timings
from holdfast.format.chunks import Chunk as Chunk
from holdfast.format.chunks import (
    ChunkDecoder,
    ChunkRows,
    DataFile,
    RowFile,
    data_file_of,
    item_of,
    row_file_of,
    rows_of,
)
from holdfast.format.chunks import Span as Span
from holdfast.format.chunks import Table as Table
from holdfast.format.components import OPTIMIZER
from holdfast.format.dtypes import dtype_of, nbytes_of
from holdfast.format.names import ROWS
from holdfast.format.region import Region
from holdfast.format.structure import Node, check_node, members_of, with_classes
from holdfast.format.timings import Stage
from holdfast.format.untrusted import (
    count_of,
    counts_of,
    json_of,
    names_of,
    number_of,
    path_of,
)

VERSIONS = (2, 3)
"""Format versions that Holdfast reads and writes. In version 3, `index.bin` lists the chunks."""

Kind = Literal["full", "model"]
Path = tuple[str | int, ...]


class TensorEntry(NamedTuple):
    """A tensor: its dtype, its global shape, and the chunks that together hold its elements."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]
    path: Path
    """Keys from the root of the saved state to this tensor."""

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    def chunks_in(self, region: Region) -> Iterable[Chunk]:
        """Return the chunks that hold elements of `region`, and perhaps others."""
        chunks = self.chunks
        return chunks.overlapping(region) if isinstance(chunks, ChunkRows) else chunks


@dataclass(frozen=True, slots=True)
class ValueEntry:
    """A value that is not a tensor, in a container of `torch.save`."""

    file: str
    item: Span
    checksum: int | None
    path: Path


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a checkpoint."""

    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, ValueEntry]
    files: Mapping[str, int] = field(default_factory=dict)
    """Size in bytes of each data file; empty if the format does not state it."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    """Table of block checksums of each data file. Only files that Holdfast wrote have one."""

    shared: Mapping[str, int] | None = None
    """Data files that earlier checkpoints of the run contain too. The value of each is the number
    of saves that have linked the file since it was written, or since it was last read and found
    undamaged. None if the run does not deduplicate."""

    block_bytes: int = checksum.BLOCK_BYTES
    """Bytes of raw data under one checksum."""

    step: int | None = None
    kind: Kind | None = None
    """`full` if a run can resume from the checkpoint, `model` if it has only the model. None if
    unknown, as in other formats."""

    components: tuple[str, ...] | None = None
    """Names of the components besides the model: the first keys of their paths. None if unknown."""

    created: str = ""
    """Time of the commit: ISO 8601, UTC."""

    layout: Mapping[str, Any] = field(default_factory=dict)
    """Parallelism of the run that wrote the checkpoint, for display: `world_size`, and entries that
    the run adds."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the software that wrote the checkpoint, by name."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the training loop at this step; NaN for numbers that were not finite."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """Contents of the model's `config.json` in HF format; empty if unknown."""

    timings: Mapping[str, Stage] = field(default_factory=dict)
    """Time of each stage of the save before the commit, over all ranks."""

    metadata: tuple[int, int] | None = None
    """Size in bytes and checksum of the `.metadata` beside the manifest."""

    rows: RowFile | None = None
    """`index.bin`, which lists the chunks; None if the manifest itself lists them."""

    structure: Mapping[Path, Node] | None = None
    """Types of the dicts, lists and keys of the state where its paths do not show them: nodes by
    path, see the module `structure`. None if unknown, as in other formats."""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each data file, and of `index.bin`."""
        return {**self.files, **({} if self.rows is None else {ROWS: self.rows.nbytes})}

    def names(self) -> list[str]:
        return [*self.tensors, *self.values]


def encode_tensor(
    name: str, dtype: str, shape: tuple[int, ...], path: Path, chunks: bytes
) -> bytes:
    """Encode one member of the object `tensors` in `manifest.json`: name and entry of a tensor.
    `chunks`: the members of the list `chunks`."""
    return b'%b,"chunks":[%b]}' % (_start(name, dtype, shape, path), chunks)


def encode_tensor_with_rows(
    name: str, dtype: str, shape: tuple[int, ...], path: Path, rows: Sequence[int]
) -> bytes:
    """Like `encode_tensor`, for a tensor whose chunks are in `index.bin`. `rows`: offset of its
    first row, number of its rows, then length of its longest chunk along each dim."""
    return _start(name, dtype, shape, path) + b',"rows":' + _json(rows) + b"}"


def _start(name: str, dtype: str, shape: tuple[int, ...], path: Path) -> bytes:
    """Encode a tensor's name, and its entry without the last member, which lists the chunks."""
    start = b"%b:%b" % (_json(name), _head(dtype, shape))
    return start if path == (name,) else start + b',"path":' + _json(path)


@lru_cache(maxsize=1024)
def _head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Encode the start of a tensor's entry. Cached: thousands have the same dtype and shape."""
    return _json({"dtype": dtype, "shape": shape})[:-1]


def encode_around(manifest: Manifest, tensors: bytes) -> list[bytes]:
    """Encode `manifest.json`. Return its bytes in parts.

    Ignores `manifest.tensors`. `tensors`: their encoding, which a run makes once for all saves.
    """
    number = {file: index for index, file in enumerate(manifest.files)}
    metrics = {n: v if math.isfinite(v) else None for n, v in manifest.metrics.items()}
    rows = manifest.rows
    optional = {
        "components": manifest.components,
        "metrics": metrics or None,
        "model": dict(manifest.model) or None,
        "timings": {n: asdict(stage) for n, stage in manifest.timings.items()} or None,
        "shared": manifest.shared,
    }
    head = {
        "holdfast": 2 if rows is None else 3,
        "step": manifest.step,
        "kind": manifest.kind,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "layout": dict(manifest.layout),
        **{name: value for name, value in optional.items() if value is not None},
        **members_of(manifest.structure),
        "checksums": _checksums(manifest.block_bytes),
        "metadata": manifest.metadata,
        **({} if rows is None else {"index": [rows.nbytes, *_table(rows.table)]}),
        "files": [
            [file, nbytes, *_table(manifest.tables[file])]
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
    """Group the names and paths of values by their container. Equal values share one container."""
    containers: dict[tuple[str, Span, int | None], list[tuple[str, Path]]] = {}
    for name, entry in values.items():
        container = (entry.file, entry.item, entry.checksum)
        containers.setdefault(container, []).append((name, entry.path))
    return containers


def _table(table: Table) -> tuple[int, str]:
    return table.offset, _hex(table.checksum)


def _hex(value: int) -> str:
    return checksum.to_hex([value])


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _json(value: object) -> bytes:
    return _ENCODER.encode(value).encode()


class LastTensors:
    """Cache of the tensors of the manifest that was decoded last. The manifests of a run often list
    the same tensors, and decoding these takes most of the time."""

    def __init__(self) -> None:
        self._key: object = None
        self._tensors: Mapping[str, TensorEntry] = {}

    def of(
        self, encoded: bytes, files: list[DataFile], block_bytes: int
    ) -> Mapping[str, TensorEntry] | None:
        """Return the tensors in `encoded`, JSON with the one member `tensors`. Decode them unless
        they are in the cache. Return None if the JSON has more members."""
        places = [(file.name, file.nbytes, file.table.offset) for file in files]
        key = encoded, places, block_bytes
        if key != self._key:
            members = json.loads(encoded)
            if members.keys() != {"tensors"}:
                return None
            stored = members["tensors"].items()
            self._tensors = {n: _tensor(n, e, files, block_bytes, None) for n, e in stored}
            self._key = key
        return self._tensors


def decode(
    data: bytes, *, where: str, entries: bool = True, last: LastTensors | None = None
) -> Manifest:
    """Decode the bytes of `manifest.json`. Errors call the file `where`.

    If `entries` is false, the result has no tensors and no values, though it has a `kind`. This
    takes a tenth of the time. `last`: cache of the tensors that several manifests have in common.

    Raises:
        DamagedError: the bytes do not match their checksum.
        FormatError: the bytes are intact, but not a manifest of a known version.
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
        if entries and last is not None and (manifest := _with_last(body, last, where)):
            return manifest
        members = (None if entries else _without_entries(body)) or json.loads(body)
        if not entries:
            keys = (entry.get("path", [name])[0] for name, entry in members["tensors"].items())
            members |= {"kind": members["kind"] or kind_with(keys), "tensors": {}, "values": []}
            members.pop("structure", None)
        return _decode_body(members, where)
    except _INVALID as error:
        raise FormatError(f"`{where}` is not a manifest: {type(error).__name__} {error}") from error


class NewerVersionError(FormatError):
    """A manifest is intact, but has a version that only a newer Holdfast can know."""


_TENSORS, _VALUES = b',"tensors":{', b',"values":['

_NEEDED = {
    "holdfast",
    "step",
    "kind",
    "created",
    "versions",
    "layout",
    "checksums",
    "metadata",
    "files",
}


def _without_entries(body: bytes) -> dict[str, Any] | None:
    """Parse a manifest without its values and tensors, which are its last and by far its largest
    members.

    Returns None if values and tensors are not at the end, or must be read to find the kind.
    """
    members = _before(_VALUES, body)
    return {**members, "values": [], "tensors": {}} if members and members["kind"] else None


def _without_tensors(body: bytes) -> dict[str, Any] | None:
    """Parse a manifest without its tensors, which are its last member. Returns None if the tensors
    are not at the end."""
    members = _before(_TENSORS, body)
    return {**members, "tensors": {}} if members and "values" in members else None


def _before(separator: bytes, body: bytes) -> dict[str, Any] | None:
    """Parse the members of a manifest before `separator`. Return None if the separator is inside a
    member, or if a member that every manifest has does not come before it."""
    head, found, _ = body.partition(separator)
    try:
        members = json.loads(head + b"}")
    except ValueError:
        return None
    is_complete = found and isinstance(members, dict) and members.keys() >= _NEEDED
    if not is_complete or (members["holdfast"] != VERSIONS[0] and "index" not in members):
        return None
    return cast("dict[str, Any]", members)


def _with_last(body: bytes, last: LastTensors, where: str) -> Manifest | None:
    """Decode a manifest with the cache `last`. Return None if the manifest's tensors are not its
    last member, or if its chunks are in `index.bin`."""
    members = _without_tensors(body)
    if members is None or members["holdfast"] != VERSIONS[0]:
        return None
    manifest = _decode_body(members, where)
    files = [DataFile(n, size, manifest.tables[n]) for n, size in manifest.files.items()]
    encoded = b'{"tensors":{' + body.partition(_TENSORS)[2]
    tensors = last.of(encoded, files, manifest.block_bytes)
    if tensors is None or tensors.keys() & manifest.values.keys():
        return None
    return replace(manifest, tensors=tensors)


# OverflowError comes from an int too large for a float.
_INVALID = (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)


def _shared(stored: dict[str, Any] | None, files: Sequence[DataFile]) -> dict[str, int] | None:
    if stored is None:
        return None
    if unknown := stored.keys() - {file.name for file in files}:
        raise ValueError(f"shared files are not listed: {sorted(unknown)}")
    return {name: count_of(num) for name, num in stored.items()}


def _decode_body(body: dict[str, Any], where: str) -> Manifest:
    version = body["holdfast"]
    if type(version) is not int or version not in VERSIONS:
        older = isinstance(version, int) and version < min(VERSIONS)
        newer = type(version) is int and version > max(VERSIONS)
        raise (NewerVersionError if newer else FormatError)(
            f"`{where}` has format version {version}, this holdfast reads "
            + " and ".join(map(str, VERSIONS)),
            hint="no release wrote that version: load it with the code that did, and save it again"
            if older
            else "pip install --upgrade holdfast",
        )
    block_bytes = body["checksums"].get("block_bytes")
    is_known = type(block_bytes) is int and block_bytes in _BLOCK_BYTES
    if not is_known or body["checksums"] != _checksums(block_bytes):
        raise FormatError(f"`{where}` has unknown checksums: {body['checksums']}")
    files = [data_file_of(stored, where) for stored in body["files"]]
    rows = row_file_of(body["index"]) if version > 2 else None
    values = [entry for stored in body["values"] for entry in _values(stored, files)]
    manifest = Manifest(
        tensors={
            name: _tensor(name, entry, files, block_bytes, rows)
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
        rows=rows,
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


def _tensor(
    name: str,
    entry: dict[str, Any],
    files: list[DataFile],
    block_bytes: int,
    rows: RowFile | None,
) -> TensorEntry:
    shape = counts_of(entry["shape"])
    itemsize = dtype_of(entry["dtype"]).itemsize
    decoder = ChunkDecoder(name, shape, itemsize, files, block_bytes)
    chunks: Sequence[Chunk]
    if rows is None:
        chunks = tuple([decoder.decode(counts_of(stored)) for stored in entry["chunks"]])
    else:
        chunks = rows_of(entry["rows"], rows, decoder)
    path = path_of(entry["path"]) if "path" in entry else (name,)
    return TensorEntry(entry["dtype"], shape, chunks, path)


def _values(stored: dict[str, Any], files: list[DataFile]) -> Iterator[tuple[str, ValueEntry]]:
    number, offset, nbytes = map(count_of, stored["item"])
    file, item = files[number].name, item_of(number, offset, nbytes, files)
    (container_checksum,) = checksum.from_hex(stored["checksum"])
    for name, path in stored["entries"].items():
        yield name, ValueEntry(file, item, container_checksum, path_of(path or [name]))


def _metadata(stored: list[int] | None) -> tuple[int, int] | None:
    if stored is None:
        return None
    nbytes, metadata_checksum = map(count_of, stored)
    return nbytes, metadata_checksum


def kind_with(keys: Iterable[str | int]) -> Kind:
    """Return the kind of a checkpoint, given the first keys of its tensors' paths."""
    return "full" if OPTIMIZER in keys else "model"
