"""Read `.metadata`, the index of a `torch.distributed.checkpoint` folder, without torch.

Allows only the classes of torch/distributed/checkpoint/metadata.py, filesystem.py and planner.py,
in torch 2.1 to 2.13, and two of Megatron. `tables` writes the file.
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
"""Module of two of the classes in torch 2.1 to 2.3."""

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
    # Megatron stores the plans of all ranks, which nothing here reads.
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
"""Fewest bytes of one chunk in a pickle. A crafted pickle can have fewer, by sharing one list of
chunks between entries."""

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

    The file has neither checksums nor the position of the raw data inside each item: `data_offset`
    of all chunks is None.

    Raises:
        FormatError: it is no such file, or refers to code or to files outside of its folder.
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
    # Old versions without __getstate__ store a dict of the fields, later ones a tuple.
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
            # Otherwise a small file could make a reader allocate any amount of memory.
            raise ValueError(f"`{name}`: an item of {span.nbytes} bytes cannot hold {region}")
        # Uneven sharding may give several empty chunks at the same place: keep the first.
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
"""Start of the `.metadata` of Holdfast: a marker that the pickle pushes and drops."""


def is_ours(data: bytes) -> bool:
    """Whether Holdfast wrote this `.metadata`."""
    return data.startswith(OURS)


_SHORT_TEXT = 0x8C
"""Opcode of a text whose length is one byte."""


def in_subfolder(data: bytes, folder: str) -> bytes | None:
    """Return the `.metadata` of Holdfast for readers one folder above its files, which are in
    `folder`; None if Holdfast has not written it.

    `tables` memoizes the names of the files first, each text followed by MEMOIZE and POP, and
    refers to them by their number. So only these texts change.
    """
    if not is_ours(data):
        return None
    position = len(OURS)
    prefix, parts = f"{folder}/".encode(), []
    while data[position] == _SHORT_TEXT:
        stop = position + 2 + data[position + 1]
        if data[stop : stop + 2] != b"\x940":
            break  # The first name of a module.
        text = prefix + data[position + 2 : stop]
        parts.append(bytes([_SHORT_TEXT, len(text)]) + text + b"\x940")
        position = stop + 2
    return OURS + b"".join(parts) + data[position:]


def leads_to_subfolder(start: bytes) -> bool:
    """Whether `in_subfolder` has made the `.metadata` with these first bytes.

    >>> leads_to_subfolder(OURS + b"\x8c\x09id/__0_0\x940"), leads_to_subfolder(OURS + b"\x8c\x01a")
    (True, False)
    """
    name = start[len(OURS) + 2 : len(OURS) + 2 + 0xFF]
    return is_ours(start) and b"/" in name.partition(b"\x940")[0]
