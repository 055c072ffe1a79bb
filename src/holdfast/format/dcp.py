"""Read `.metadata`, the index of a `torch.distributed.checkpoint` folder, without torch.

The file is a pickle. It may refer only to classes of metadata.py, filesystem.py and planner.py in
torch/distributed/checkpoint, of torch 2.1 to 2.13, and to two classes of Megatron. The module
`tables` writes the file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import (
    Chunk,
    Manifest,
    Path,
    Span,
    TensorEntry,
    ValueEntry,
)
from holdfast.format.pickles import DtypeName, Plain, loads
from holdfast.format.region import Region
from holdfast.format.untrusted import check_file_name, check_sizes, path_of

_MODULE = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
"""Module of `TensorProperties` and its memory format in torch 2.1 to 2.3."""

_CLASSES = {
    _MODULE: (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "BytesStorageMetadata",
    ),
    _SHARDED: ("TensorProperties",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # Megatron stores the plans of all ranks. Holdfast ignores them.
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath",),
}
"""Classes that `.metadata` may refer to, by module."""

_CHUNK_BYTES_MIN = 16
"""Minimum bytes that one chunk takes in a pickle. A pickle that lists more chunks than fit into it
is refused: in a crafted one, thousands of entries could share one list of chunks."""

_ALLOWED: Mapping[tuple[str, str], Any] = {
    **{(m, name): type(name, (Plain,), {}) for m, names in _CLASSES.items() for name in names},
    (_MODULE, "_MEM_FORMAT_ENCODING"): int,
    (_SHARDED, "MEM_FORMAT_ENCODING"): int,
    ("torch.serialization", "_get_layout"): str,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
}


def decode_metadata(data: bytes, *, where: str) -> Manifest:
    """Decode the bytes of a `.metadata` file.

    The file has no checksums, and does not say where in each item the raw data are. So the chunks
    have no `data_offset`.

    Raises:
        FormatError: the bytes are not a `.metadata` file, or refer to code, or to files outside of
            its folder.
    """
    metadata = loads(data, _ALLOWED, where=where)
    try:
        return _manifest(metadata, len(data), where)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"`{where}` is not DCP metadata: {type(error).__name__} {error}"
        ) from error


def _manifest(metadata: Any, nbytes: int, where: str) -> Manifest:
    items: dict[tuple[str, tuple[int, ...] | None], tuple[str, Span]] = {}
    for index, info in metadata.state["storage_data"].items():
        name, offset = _text(index.state["fqn"]), index.state.get("offset")
        file, span = info.state["relative_path"], Span(info.state["offset"], info.state["length"])
        check_file_name(file, where)
        if info.state.get("transform_descriptors"):
            raise FormatError(f"`{where}`: `{name}` is compressed or encrypted")
        check_sizes((span.offset, span.nbytes))
        items[name, None if offset is None else check_sizes(offset)] = file, span
    paths = metadata.state.get("planner_data") or {}
    tensors: dict[str, TensorEntry] = {}
    values: dict[str, ValueEntry] = {}
    for name, entry in metadata.state["state_dict_metadata"].items():
        path = path_of(paths.get(_text(name), (name,)))
        if type(entry).__name__ == "BytesStorageMetadata":
            file, span = items[name, None]
            values[name] = ValueEntry(file, span, None, path)
        else:
            nbytes -= _CHUNK_BYTES_MIN * len(entry.state["chunks"])
            if nbytes < 0:
                raise ValueError("it lists more chunks than fit into the file")
            tensors[name] = _tensor(name, entry, items, path)
    return Manifest(tensors, values, versions=_versions(metadata.state))


def _tensor(
    name: str, entry: Any, items: Mapping[Any, tuple[str, Span]], path: Path
) -> TensorEntry:
    properties = entry.state["properties"].state
    # In old versions of torch, `TensorProperties` has no `__getstate__`, so the state is a dict of
    # the fields. In later versions it is a tuple.
    dtype: DtypeName = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    shape, itemsize = check_sizes(entry.state["size"]), dtype_of(dtype.name).itemsize
    chunks: dict[tuple[int, ...], Chunk] = {}
    for stored in entry.state["chunks"]:
        start, sizes = check_sizes(stored.state["offsets"]), check_sizes(stored.state["sizes"])
        region = Region(start, tuple(map(int.__add__, start, sizes)))
        if not region.fits(shape) or len(start) != len(sizes):
            raise ValueError(f"`{name}`: chunk {region} is outside of the shape {shape}")
        file, span = items[name, start]
        if region.num_elements * itemsize > span.nbytes:
            # Without this check, a small file could make a reader allocate any amount of memory.
            raise ValueError(f"`{name}`: an item of {span.nbytes} bytes cannot hold {region}")
        # Uneven sharding may give several empty chunks with the same start: keep the first.
        if chunks.setdefault(start, Chunk(region, file, span)).region != region:
            raise ValueError(f"`{name}`: two chunks start at {start}")
    return TensorEntry(dtype.name, shape, tuple(chunks.values()), path)


def _versions(state: Mapping[str, Any]) -> dict[str, str]:
    version = state.get("version")
    return {"dcp": version[:100]} if type(version) is str else {}


def _text(name: object) -> str:
    if type(name) is not str:
        raise ValueError(f"a name is a {type(name).__name__}, not text")
    return name


OURS = b"\x80\x04\x8c\x08holdfast0"
"""First bytes of every `.metadata` that Holdfast writes. The pickle pushes the marker `holdfast`
and drops it at once, so that readers ignore it."""


def is_ours(data: bytes) -> bool:
    """Return whether Holdfast wrote this `.metadata`."""
    return data.startswith(OURS)


_SHORT_TEXT = 0x8C
"""Opcode of a string whose length fits in one byte."""


def in_subfolder(data: bytes, folder: str) -> bytes | None:
    """Return a copy of a `.metadata` that is valid one folder above the data files: it puts
    `folder` before each file name. Return None if Holdfast did not write the `.metadata`.

    The pickle of a `.metadata` by Holdfast begins with the file names. MEMOIZE and POP follow each
    name, and the rest of the pickle refers to the names by memo index. So only these strings
    change.
    """
    if not is_ours(data):
        return None
    position = len(OURS)
    prefix, parts = f"{folder}/".encode(), []
    while data[position] == _SHORT_TEXT:
        stop = position + 2 + data[position + 1]
        if data[stop : stop + 2] != b"\x940":
            break  # After the file names comes the name of a module.
        text = prefix + data[position + 2 : stop]
        parts.append(bytes([_SHORT_TEXT, len(text)]) + text + b"\x940")
        position = stop + 2
    return OURS + b"".join(parts) + data[position:]


def leads_to_subfolder(start: bytes) -> bool:
    r"""Return whether `in_subfolder` has made the `.metadata` that starts with these bytes.

    >>> leads_to_subfolder(OURS + b"\x8c\x09id/__0_0\x940"), leads_to_subfolder(OURS + b"\x8c\x01a")
    (True, False)
    """
    name = start[len(OURS) + 2 : len(OURS) + 2 + 0xFF]
    return is_ours(start) and b"/" in name.partition(b"\x940")[0]
